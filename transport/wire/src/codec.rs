//! How each message lies in bytes, behind the header of `frame.rs`.
//!
//! Packed and little-endian. `[..]` is an item that comes as often as the body has room for: a batch has no count
//! that could differ from its length. A **name** is its length in one byte and its characters.
//! ```text
//!       reader, control connection
//! 0x01  Hello    oldest u16 | newest u16 | epoch u64 | node name | principals u8 | so many names
//!                | facts bytes u16 | facts | more
//! 0x02  Want     [ want u64 | key 16 | wait_ms u32 | principal u8 ]                               29 B each
//! 0x03  Done     [ want u64 ]                                                                      8 B each
//! 0x04  Probe    id u64 | principal u8 | [ key 16 ]                                               16 B each
//! 0x05  Offer    id u64 | principal u8 | binding bytes u16 | binding | [ key 16 ]                 16 B each
//! 0x06  Path     path u8 | words, to the end
//! 0x07  Ping     u64
//!       owner, control connection
//! 0x10  Welcome  version u16 | epoch u64 | session 16 | wants_max u32 | bytes_max u64 | leaving u8
//!                | node name | facts bytes u16 | facts | more
//! 0x11  Refused  why u8 | text, to the end
//! 0x12  Granted  [ want u64 | checksum u64 | tag u64 | bytes u32 | ttl_s u32 | priority u8 | tier u8
//!                | path u8 | address u64 | key u32 ]                                              47 B each
//! 0x13  Missed   [ want u64 | reason u8 ]                                                          9 B each
//! 0x14  Found    id u64 | [ sight u8 ]                                                             1 B each
//! 0x15  Taken    id u64 | taken u32 | left u32
//! 0x16  Path     as above
//! 0x17  Pong     u64
//! 0x18  Credits  wants_max u32 | bytes_max u64
//! 0x19  Leaving
//! 0x1a  Staying
//!       reader, data connection
//! 0x20  Join     session 16
//! 0x21  Read     [ read u64 | want u64 ]                                                          16 B each
//!       owner, data connection; once it is joined, every frame of the owner has 32 bytes
//! 0x30  Joined
//! 0x11  Refused  as above
//! 0x31  Data     read u64 | bytes u32 | zero u32        then the block, outside the frame
//! 0x32  Gone     read u64 | zero u64
//!
//! priority  0 low, 1 normal, 2 high             sight   0 absent, 128 pending, else the tier it is in
//! tier      1 device, 2 host, 3 disk, 4 object  path    0: no window, address and key are zero
//! reason    as in `MissReason`                  why     as in `Refusal`
//! ```
//! One message has one form: what was accepted encodes to the same bytes again, but for what later versions put
//! where it says `more`.

use kv_block::{BindingTag, BlockKey, Checksum, Epoch, MissReason, Priority, Tier};

use crate::frame::{
    BINDING_BYTES_MAX, FACTS_BYTES_MAX, Header, ITEMS_MAX, Message, PRINCIPALS_MAX, TEXT_BYTES_MAX, VERSIONS,
    WORDS_BYTES_MAX, WireError, is_name, put_frame,
};
use crate::kind;
use crate::message::{
    Answer, Ask, Credits, DataAnswer, DataAsk, Found, Grant, Hello, Offer, PathEnd, Probe, ReadId, Refusal,
    Refused, Sight, Taken, Want, WantId, Welcome, Window,
};

/// Something that comes many times in one message, always as long.
pub(crate) trait Item: Sized {
    /// Its length.
    const BYTES: usize;
    /// Appends exactly so many.
    fn put(&self, out: &mut Vec<u8>);
    /// Takes exactly so many.
    fn take(body: &mut Body<'_>) -> Result<Self, WireError>;
}

impl Message for Ask {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello(hello) => put_frame(out, kind::HELLO, |out| put_hello(out, hello)),
            Self::Want(wants) => put_frame(out, kind::WANT, |out| put_items(out, wants)),
            Self::Done(wants) => put_frame(out, kind::DONE, |out| put_items(out, wants)),
            Self::Probe(probe) => put_frame(out, kind::PROBE, |out| {
                out.extend(probe.id.to_le_bytes());
                out.push(probe.principal);
                put_items(out, &probe.keys);
            }),
            Self::Offer(offer) => put_frame(out, kind::OFFER, |out| {
                let binding = at_most(&offer.binding, BINDING_BYTES_MAX);
                out.extend(offer.id.to_le_bytes());
                out.push(offer.principal);
                out.extend((binding.len() as u16).to_le_bytes());
                out.extend(binding);
                put_items(out, &offer.keys);
            }),
            Self::Path(end) => put_frame(out, kind::READER_PATH, |out| put_path(out, end)),
            Self::Ping(number) => put_frame(out, kind::PING, |out| out.extend(number.to_le_bytes())),
        }
    }

    fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut body = Body::of(header, body)?;
        match header.kind {
            kind::HELLO => take_hello(&mut body).map(Self::Hello),
            kind::WANT => {
                let wants = body.items()?;
                numbered_once(&wants)?;
                Ok(Self::Want(wants))
            }
            kind::DONE => body.items().map(Self::Done),
            kind::PROBE => {
                Ok(Self::Probe(Probe { id: body.u64()?, principal: body.u8()?, keys: body.items()? }))
            }
            kind::OFFER => {
                let (id, principal, bytes) = (body.u64()?, body.u8()?, usize::from(body.u16()?));
                if bytes > BINDING_BYTES_MAX {
                    return Err(WireError::Field { field: "binding" });
                }
                let binding = body.bytes(bytes)?.to_vec();
                Ok(Self::Offer(Offer { id, principal, binding, keys: body.items()? }))
            }
            kind::READER_PATH => take_path(body).map(Self::Path),
            kind::PING => {
                let number = body.u64()?;
                body.end(Self::Ping(number))
            }
            kind => Err(WireError::Kind { kind }),
        }
    }
}

impl Message for Answer {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Welcome(welcome) => put_frame(out, kind::WELCOME, |out| put_welcome(out, welcome)),
            Self::Refused(refused) => put_frame(out, kind::REFUSED, |out| put_refused(out, refused)),
            Self::Granted(grants) => put_frame(out, kind::GRANTED, |out| put_items(out, grants)),
            Self::Missed(misses) => put_frame(out, kind::MISSED, |out| put_items(out, misses)),
            Self::Found(found) => put_frame(out, kind::FOUND, |out| {
                out.extend(found.id.to_le_bytes());
                put_items(out, &found.sights);
            }),
            Self::Taken(taken) => put_frame(out, kind::TAKEN, |out| {
                out.extend(taken.id.to_le_bytes());
                out.extend(taken.taken.to_le_bytes());
                out.extend(taken.left.to_le_bytes());
            }),
            Self::Path(end) => put_frame(out, kind::OWNER_PATH, |out| put_path(out, end)),
            Self::Pong(number) => put_frame(out, kind::PONG, |out| out.extend(number.to_le_bytes())),
            Self::Credits(credits) => put_frame(out, kind::CREDITS, |out| put_credits(out, credits)),
            Self::Leaving => put_frame(out, kind::LEAVING, |_| ()),
            Self::Staying => put_frame(out, kind::STAYING, |_| ()),
        }
    }

    fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut body = Body::of(header, body)?;
        match header.kind {
            kind::WELCOME => take_welcome(&mut body).map(Self::Welcome),
            kind::REFUSED => take_refused(body).map(Self::Refused),
            kind::GRANTED => body.items().map(Self::Granted),
            kind::MISSED => body.items().map(Self::Missed),
            kind::FOUND => Ok(Self::Found(Found { id: body.u64()?, sights: body.items()? })),
            kind::TAKEN => {
                let taken = Taken { id: body.u64()?, taken: body.u32()?, left: body.u32()? };
                body.end(Self::Taken(taken))
            }
            kind::OWNER_PATH => take_path(body).map(Self::Path),
            kind::PONG => {
                let number = body.u64()?;
                body.end(Self::Pong(number))
            }
            kind::CREDITS => {
                let credits = take_credits(&mut body)?;
                body.end(Self::Credits(credits))
            }
            kind::LEAVING => body.end(Self::Leaving),
            kind::STAYING => body.end(Self::Staying),
            kind => Err(WireError::Kind { kind }),
        }
    }
}

impl Message for DataAsk {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Join(session) => put_frame(out, kind::JOIN, |out| out.extend(session.to_le_bytes())),
            Self::Read(reads) => put_frame(out, kind::READ, |out| put_items(out, reads)),
        }
    }

    fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut body = Body::of(header, body)?;
        match header.kind {
            kind::JOIN => {
                let session = body.u128()?;
                body.end(Self::Join(session))
            }
            kind::READ => body.items().map(Self::Read),
            kind => Err(WireError::Kind { kind }),
        }
    }
}

impl Message for DataAnswer {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Joined => put_frame(out, kind::JOINED, |_| ()),
            Self::Refused(refused) => put_frame(out, kind::REFUSED, |out| put_refused(out, refused)),
            Self::Data(read, bytes) => put_frame(out, kind::DATA, |out| {
                out.extend(read.0.to_le_bytes());
                out.extend(bytes.to_le_bytes());
                out.extend([0; 4]);
            }),
            Self::Gone(read) => put_frame(out, kind::GONE, |out| {
                out.extend(read.0.to_le_bytes());
                out.extend([0; 8]);
            }),
        }
    }

    fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError> {
        let mut body = Body::of(header, body)?;
        match header.kind {
            kind::JOINED => body.end(Self::Joined),
            kind::REFUSED => take_refused(body).map(Self::Refused),
            kind::DATA => {
                let (read, bytes) = (ReadId(body.u64()?), body.u32()?);
                body.zero::<4>()?;
                body.end(Self::Data(read, bytes))
            }
            kind::GONE => {
                let read = ReadId(body.u64()?);
                body.zero::<8>()?;
                body.end(Self::Gone(read))
            }
            kind => Err(WireError::Kind { kind }),
        }
    }
}

fn put_hello(out: &mut Vec<u8>, hello: &Hello) {
    out.extend(hello.versions.0.to_le_bytes());
    out.extend(hello.versions.1.to_le_bytes());
    out.extend(hello.epoch.0.to_le_bytes());
    put_name(out, &hello.node);
    let principals = first(&hello.principals, PRINCIPALS_MAX);
    out.push(principals.len() as u8);
    principals.iter().for_each(|name| put_name(out, name));
    put_facts(out, &hello.facts);
}

fn take_hello(body: &mut Body<'_>) -> Result<Hello, WireError> {
    let versions = (body.u16()?, body.u16()?);
    if versions.0 > versions.1 {
        return Err(WireError::Field { field: "versions" });
    }
    let epoch = Epoch(body.u64()?);
    let node = body.name("node")?;
    let count = usize::from(body.u8()?);
    if count > PRINCIPALS_MAX {
        return Err(WireError::Field { field: "principals" });
    }
    let mut principals = Vec::with_capacity(count);
    for _ in 0..count {
        principals.push(body.name("principals")?);
    }
    let facts = take_facts(body)?;
    // What follows is of a later version.
    Ok(Hello { versions, node, epoch, principals, facts })
}

fn put_welcome(out: &mut Vec<u8>, welcome: &Welcome) {
    out.extend(welcome.version.to_le_bytes());
    out.extend(welcome.epoch.0.to_le_bytes());
    out.extend(welcome.session.to_le_bytes());
    put_credits(out, &welcome.credits);
    out.push(u8::from(welcome.leaving));
    put_name(out, &welcome.node);
    put_facts(out, &welcome.facts);
}

fn take_welcome(body: &mut Body<'_>) -> Result<Welcome, WireError> {
    let version = body.u16()?;
    if !(VERSIONS.0..=VERSIONS.1).contains(&version) {
        return Err(WireError::Field { field: "version" });
    }
    let (epoch, session, credits) = (Epoch(body.u64()?), body.u128()?, take_credits(body)?);
    let leaving = match body.u8()? {
        0 => false,
        1 => true,
        _ => return Err(WireError::Field { field: "leaving" }),
    };
    let node = body.name("node")?;
    let facts = take_facts(body)?;
    // What follows is of a later version.
    Ok(Welcome { version, node, epoch, session, credits, leaving, facts })
}

/// Facts that are too long are as good as none: blocks then come by TCP.
fn put_facts(out: &mut Vec<u8>, facts: &[u8]) {
    debug_assert!(facts.len() <= FACTS_BYTES_MAX, "facts of {} bytes", facts.len());
    let facts = if facts.len() > FACTS_BYTES_MAX { &[] } else { facts };
    out.extend((facts.len() as u16).to_le_bytes());
    out.extend_from_slice(facts);
}

fn take_facts(body: &mut Body<'_>) -> Result<Vec<u8>, WireError> {
    let bytes = usize::from(body.u16()?);
    if bytes > FACTS_BYTES_MAX {
        return Err(WireError::Field { field: "facts" });
    }
    Ok(body.bytes(bytes)?.to_vec())
}

fn put_refused(out: &mut Vec<u8>, refused: &Refused) {
    debug_assert!(refused.text.len() <= TEXT_BYTES_MAX, "a text of {} bytes", refused.text.len());
    out.push(refused.why as u8);
    let room = out.len() + TEXT_BYTES_MAX;
    for character in refused.text.chars() {
        // It ends up in somebody's log, on one line.
        let character = if character.is_control() { ' ' } else { character };
        if out.len() + character.len_utf8() > room {
            break;
        }
        out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
    }
}

fn take_refused(mut body: Body<'_>) -> Result<Refused, WireError> {
    let why = refusal_of(body.u8()?).ok_or(WireError::Field { field: "why" })?;
    let text = std::str::from_utf8(body.rest).ok().filter(|text| !text.contains(char::is_control));
    match text {
        Some(text) if text.len() <= TEXT_BYTES_MAX => Ok(Refused { why, text: text.to_owned() }),
        _ => Err(WireError::Field { field: "text" }),
    }
}

fn put_path(out: &mut Vec<u8>, end: &PathEnd) {
    debug_assert!(end.path != 0, "path 0 needs no description");
    out.push(end.path);
    out.extend(at_most(&end.words, WORDS_BYTES_MAX));
}

fn take_path(mut body: Body<'_>) -> Result<PathEnd, WireError> {
    let path = body.u8()?;
    if path == 0 {
        return Err(WireError::Field { field: "path" });
    }
    if body.rest.len() > WORDS_BYTES_MAX {
        return Err(WireError::Field { field: "words" });
    }
    Ok(PathEnd { path, words: body.rest.to_vec() })
}

fn put_credits(out: &mut Vec<u8>, credits: &Credits) {
    out.extend(credits.wants_max.to_le_bytes());
    out.extend(credits.bytes_max.to_le_bytes());
}

fn take_credits(body: &mut Body<'_>) -> Result<Credits, WireError> {
    Ok(Credits { wants_max: body.u32()?, bytes_max: body.u64()? })
}

impl Item for Want {
    const BYTES: usize = 29;

    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.id.0.to_le_bytes());
        out.extend(self.key.0);
        out.extend(self.wait_ms.to_le_bytes());
        out.push(self.principal);
    }

    fn take(body: &mut Body<'_>) -> Result<Self, WireError> {
        let (id, key) = (WantId(body.u64()?), BlockKey(body.array()?));
        Ok(Self { id, key, wait_ms: body.u32()?, principal: body.u8()? })
    }
}

impl Item for WantId {
    const BYTES: usize = 8;

    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.0.to_le_bytes());
    }

    fn take(body: &mut Body<'_>) -> Result<Self, WireError> {
        body.u64().map(Self)
    }
}

impl Item for BlockKey {
    const BYTES: usize = 16;

    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.0);
    }

    fn take(body: &mut Body<'_>) -> Result<Self, WireError> {
        body.array().map(Self)
    }
}

impl Item for Grant {
    const BYTES: usize = 47;

    fn put(&self, out: &mut Vec<u8>) {
        debug_assert!(self.window.is_none_or(|window| window.path != 0), "path 0 has no windows");
        let nowhere = Window { path: 0, address: 0, key: 0 };
        let window = self.window.filter(|window| window.path != 0).unwrap_or(nowhere);
        out.extend(self.id.0.to_le_bytes());
        out.extend(self.checksum.0.to_le_bytes());
        out.extend(self.tag.0.to_le_bytes());
        out.extend(self.bytes.to_le_bytes());
        out.extend(self.ttl_s.to_le_bytes());
        out.extend([priority_number(self.priority), tier_number(self.tier), window.path]);
        out.extend(window.address.to_le_bytes());
        out.extend(window.key.to_le_bytes());
    }

    fn take(body: &mut Body<'_>) -> Result<Self, WireError> {
        let (id, checksum, tag) = (WantId(body.u64()?), Checksum(body.u64()?), BindingTag(body.u64()?));
        let (bytes, ttl_s) = (body.u32()?, body.u32()?);
        let priority = priority_of(body.u8()?).ok_or(WireError::Field { field: "priority" })?;
        let tier = tier_of(body.u8()?).ok_or(WireError::Field { field: "tier" })?;
        let window = match (Window { path: body.u8()?, address: body.u64()?, key: body.u32()? }) {
            Window { path: 0, address: 0, key: 0 } => None,
            Window { path: 0, .. } => return Err(WireError::Field { field: "window" }),
            window => Some(window),
        };
        Ok(Self { id, checksum, bytes, tag, priority, ttl_s, tier, window })
    }
}

impl Item for (WantId, MissReason) {
    const BYTES: usize = 9;

    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        out.push(self.1 as u8);
    }

    fn take(body: &mut Body<'_>) -> Result<Self, WireError> {
        let want = WantId::take(body)?;
        Ok((want, MissReason::from_wire(body.u8()?).ok_or(WireError::Field { field: "reason" })?))
    }
}

impl Item for (ReadId, WantId) {
    const BYTES: usize = 16;

    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.0.0.to_le_bytes());
        self.1.put(out);
    }

    fn take(body: &mut Body<'_>) -> Result<Self, WireError> {
        Ok((ReadId(body.u64()?), WantId::take(body)?))
    }
}

impl Item for Sight {
    const BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        out.push(match *self {
            Self::Absent => 0,
            Self::Pending => PENDING,
            Self::In(tier) => tier_number(tier),
        });
    }

    fn take(body: &mut Body<'_>) -> Result<Self, WireError> {
        match body.u8()? {
            0 => Ok(Self::Absent),
            PENDING => Ok(Self::Pending),
            number => tier_of(number).map(Self::In).ok_or(WireError::Field { field: "sight" }),
        }
    }
}

const PENDING: u8 = 128;

fn tier_number(tier: Tier) -> u8 {
    match tier {
        Tier::Device => 1,
        Tier::Host => 2,
        Tier::Disk => 3,
        Tier::Object => 4,
    }
}

fn tier_of(number: u8) -> Option<Tier> {
    Tier::ALL.into_iter().find(|tier| tier_number(*tier) == number)
}

fn priority_number(priority: Priority) -> u8 {
    match priority {
        Priority::Low => 0,
        Priority::Normal => 1,
        Priority::High => 2,
    }
}

fn priority_of(number: u8) -> Option<Priority> {
    Priority::ALL.into_iter().find(|priority| priority_number(*priority) == number)
}

fn refusal_of(number: u8) -> Option<Refusal> {
    use Refusal::{Full, Leaving, Session, Unknown, Version};
    [Version, Unknown, Full, Leaving, Session].into_iter().find(|why| *why as u8 == number)
}

/// No number may come twice: it would be one lease for two blocks. Numbers that only rise, as a counter gives them,
/// are seen at once; others are sorted, on the stack.
fn numbered_once(wants: &[Want]) -> Result<(), WireError> {
    if wants.is_sorted_by(|one, next| one.id < next.id) {
        return Ok(());
    }
    let mut numbers = [WantId(0); ITEMS_MAX];
    let numbers = &mut numbers[..wants.len()];
    numbers.iter_mut().zip(wants).for_each(|(number, want)| *number = want.id);
    numbers.sort_unstable();
    match numbers.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(WireError::Twice { want: pair[0] }),
        None => Ok(()),
    }
}

/// As many items as one message takes.
fn put_items<T: Item>(out: &mut Vec<u8>, items: &[T]) {
    let items = first(items, ITEMS_MAX);
    out.reserve(items.len() * T::BYTES);
    items.iter().for_each(|item| item.put(out));
}

fn first<T>(items: &[T], max: usize) -> &[T] {
    debug_assert!(items.len() <= max, "{} items in one message", items.len());
    &items[..items.len().min(max)]
}

/// All of `bytes`, or none of them: half of something opaque is worse than nothing.
fn at_most(bytes: &[u8], max: usize) -> &[u8] {
    debug_assert!(bytes.len() <= max, "{} opaque bytes", bytes.len());
    if bytes.len() <= max { bytes } else { &[] }
}

/// A name; what is none is sent empty, for half a name would be another's.
fn put_name(out: &mut Vec<u8>, name: &str) {
    debug_assert!(is_name(name), "`{name}` is no name");
    let name = if is_name(name) { name } else { "" };
    out.push(name.len() as u8);
    out.extend(name.as_bytes());
}

/// What of a body has not been taken yet.
pub(crate) struct Body<'a> {
    kind: u8,
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    /// The body behind `header`, whole and as it was sent.
    fn of(header: &Header, body: &'a [u8]) -> Result<Self, WireError> {
        header.check(body)?;
        Ok(Self { kind: header.kind, rest: body })
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (array, rest) = self.rest.split_first_chunk().ok_or(WireError::missing(self.kind))?;
        self.rest = rest;
        Ok(*array)
    }

    fn bytes(&mut self, bytes: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(WireError::missing(self.kind))?;
        self.rest = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    fn u128(&mut self) -> Result<u128, WireError> {
        self.array().map(u128::from_le_bytes)
    }

    fn zero<const N: usize>(&mut self) -> Result<(), WireError> {
        if self.array::<N>()? == [0; N] { Ok(()) } else { Err(WireError::Field { field: "reserved" }) }
    }

    fn name(&mut self, field: &'static str) -> Result<String, WireError> {
        let bytes = usize::from(self.u8()?);
        let name = std::str::from_utf8(self.bytes(bytes)?).ok().filter(|text| is_name(text));
        name.map(str::to_owned).ok_or(WireError::Field { field })
    }

    /// All that is left, as items. Their list is as long as the bytes that are there, and allocated once.
    fn items<T: Item>(&mut self) -> Result<Vec<T>, WireError> {
        let pieces = std::mem::take(&mut self.rest).chunks_exact(T::BYTES);
        if !pieces.remainder().is_empty() {
            return Err(WireError::left_over(self.kind));
        }
        if pieces.len() > ITEMS_MAX {
            let bytes = (pieces.len() * T::BYTES) as u32;
            return Err(WireError::TooLong { bytes, max: ITEMS_MAX * T::BYTES });
        }
        let mut items = Vec::with_capacity(pieces.len());
        for piece in pieces {
            items.push(T::take(&mut Body { kind: self.kind, rest: piece })?);
        }
        Ok(items)
    }

    /// `message`, unless bytes are left over.
    fn end<T>(&self, message: T) -> Result<T, WireError> {
        if self.rest.is_empty() { Ok(message) } else { Err(WireError::left_over(self.kind)) }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::frame::{DATA_FRAME_BYTES, GREETING_BYTES_MAX, HEADER_BYTES, NAME_BYTES_MAX};

    fn encoded(message: &impl Message) -> Vec<u8> {
        let mut out = Vec::new();
        message.encode(&mut out);
        out
    }

    fn decoded<M: Message>(frame: &[u8]) -> Result<M, WireError> {
        let (header, body) = frame.split_first_chunk::<HEADER_BYTES>().expect("a header");
        M::decode(&Header::parse(header)?, body)
    }

    /// A sound frame around any body.
    fn sealed(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_frame(&mut out, kind, |out| out.extend_from_slice(body));
        out
    }

    fn name() -> impl Strategy<Value = String> {
        let plain = select(b"abcxyzABCXYZ0189._-".to_vec());
        vec(plain, 1..=NAME_BYTES_MAX).prop_map(|bytes| String::from_utf8(bytes).unwrap())
    }

    fn key() -> impl Strategy<Value = BlockKey> {
        any::<[u8; 16]>().prop_map(BlockKey)
    }

    fn hello() -> impl Strategy<Value = Hello> {
        let versions = (any::<u16>(), any::<u16>()).prop_map(|(a, b)| (a.min(b), a.max(b)));
        let parts = (versions, name(), any::<u64>(), vec(name(), 0..=PRINCIPALS_MAX), facts());
        parts.prop_map(|(versions, node, epoch, principals, facts)| Hello {
            versions,
            node,
            epoch: Epoch(epoch),
            principals,
            facts,
        })
    }

    fn facts() -> impl Strategy<Value = Vec<u8>> {
        vec(any::<u8>(), 0..=FACTS_BYTES_MAX)
    }

    fn credits() -> impl Strategy<Value = Credits> {
        (any::<u32>(), any::<u64>()).prop_map(|(wants_max, bytes_max)| Credits { wants_max, bytes_max })
    }

    fn welcome() -> impl Strategy<Value = Welcome> {
        let parts = (name(), any::<u64>(), any::<u128>(), credits(), any::<bool>(), facts());
        parts.prop_map(|(node, epoch, session, credits, leaving, facts)| Welcome {
            version: VERSIONS.1,
            node,
            epoch: Epoch(epoch),
            session,
            credits,
            leaving,
            facts,
        })
    }

    fn refused() -> impl Strategy<Value = Refused> {
        let text = "[a-z \u{e9}\u{2014}\u{1f980}]{0,120}";
        (1..=5u8, text).prop_map(|(why, text)| Refused { why: refusal_of(why).unwrap(), text })
    }

    /// Numbered once, in no order.
    fn wants() -> impl Strategy<Value = Vec<Want>> {
        let numbers = prop::collection::hash_set(any::<u64>(), 0..40);
        let rest = vec((any::<u8>(), any::<u32>(), key()), 40);
        (numbers, rest).prop_map(|(numbers, rest)| {
            let both = numbers.into_iter().zip(rest);
            both.map(|(id, (principal, wait_ms, key))| Want { id: WantId(id), principal, wait_ms, key })
                .collect()
        })
    }

    fn path() -> impl Strategy<Value = PathEnd> {
        (1..=u8::MAX, vec(any::<u8>(), 0..=WORDS_BYTES_MAX)).prop_map(|(path, words)| PathEnd { path, words })
    }

    fn grant() -> impl Strategy<Value = Grant> {
        let window = (1..=u8::MAX, any::<u64>(), any::<u32>());
        let window = window.prop_map(|(path, address, key)| Window { path, address, key });
        let record = (any::<u64>(), any::<u32>(), any::<u64>(), select(&Priority::ALL[..]), any::<u32>());
        (any::<u64>(), record, select(&Tier::ALL[..]), option::of(window)).prop_map(
            |(id, (checksum, bytes, tag, priority, ttl_s), tier, window)| Grant {
                id: WantId(id),
                checksum: Checksum(checksum),
                bytes,
                tag: BindingTag(tag),
                priority,
                ttl_s,
                tier,
                window,
            },
        )
    }

    fn sight() -> impl Strategy<Value = Sight> {
        prop_oneof![Just(Sight::Absent), Just(Sight::Pending), select(&Tier::ALL[..]).prop_map(Sight::In)]
    }

    fn ask() -> impl Strategy<Value = Ask> {
        let probe = (any::<u64>(), any::<u8>(), vec(key(), 0..40));
        let offer = (any::<u64>(), any::<u8>(), vec(any::<u8>(), 0..200), vec(key(), 0..40));
        prop_oneof![
            hello().prop_map(Ask::Hello),
            wants().prop_map(Ask::Want),
            vec(any::<u64>().prop_map(WantId), 0..40).prop_map(Ask::Done),
            probe.prop_map(|(id, principal, keys)| Ask::Probe(Probe { id, principal, keys })),
            offer.prop_map(|(id, principal, binding, keys)| Ask::Offer(Offer {
                id,
                principal,
                binding,
                keys
            })),
            path().prop_map(Ask::Path),
            any::<u64>().prop_map(Ask::Ping),
        ]
    }

    fn answer() -> impl Strategy<Value = Answer> {
        let miss = (any::<u64>().prop_map(WantId), select(&MissReason::ALL[..]));
        let found = (any::<u64>(), vec(sight(), 0..40));
        let taken = (any::<u64>(), any::<u32>(), any::<u32>());
        prop_oneof![
            welcome().prop_map(Answer::Welcome),
            refused().prop_map(Answer::Refused),
            vec(grant(), 0..40).prop_map(Answer::Granted),
            vec(miss, 0..40).prop_map(Answer::Missed),
            found.prop_map(|(id, sights)| Answer::Found(Found { id, sights })),
            taken.prop_map(|(id, taken, left)| Answer::Taken(Taken { id, taken, left })),
            path().prop_map(Answer::Path),
            any::<u64>().prop_map(Answer::Pong),
            credits().prop_map(Answer::Credits),
            Just(Answer::Leaving),
            Just(Answer::Staying),
        ]
    }

    fn data_ask() -> impl Strategy<Value = DataAsk> {
        let read = (any::<u64>().prop_map(ReadId), any::<u64>().prop_map(WantId));
        prop_oneof![any::<u128>().prop_map(DataAsk::Join), vec(read, 0..40).prop_map(DataAsk::Read)]
    }

    fn data_answer() -> impl Strategy<Value = DataAnswer> {
        prop_oneof![
            Just(DataAnswer::Joined),
            refused().prop_map(DataAnswer::Refused),
            (any::<u64>(), any::<u32>()).prop_map(|(read, bytes)| DataAnswer::Data(ReadId(read), bytes)),
            any::<u64>().prop_map(|read| DataAnswer::Gone(ReadId(read))),
        ]
    }

    fn comes_back<M: Message + PartialEq + Debug>(message: &M) -> Result<(), TestCaseError> {
        // Behind other bytes, which stay as they were.
        let mut out = b"before".to_vec();
        message.encode(&mut out);
        let frame = out.strip_prefix(b"before").unwrap();
        prop_assert_eq!(&decoded::<M>(frame).unwrap(), message);
        Ok(())
    }

    /// Whatever body is accepted is the only one that says this, but for what a later version adds.
    fn says_one_thing<M: Message>(kind: u8, body: &[u8]) -> Result<(), TestCaseError> {
        let frame = sealed(kind, body);
        let Ok(message) = decoded::<M>(&frame) else { return Ok(()) };
        let again = encoded(&message);
        if matches!(kind, kind::HELLO | kind::WELCOME) {
            prop_assert!(body.starts_with(&again[HEADER_BYTES..]));
        } else {
            prop_assert_eq!(again, frame);
        }
        Ok(())
    }

    fn damaged<M: Message>(message: &M, at: usize, byte: u8, end: usize) -> Result<(), TestCaseError> {
        let frame = encoded(message);
        let (kind, mut body) = (frame[4], frame[HEADER_BYTES..].to_vec());
        if let Some(changed) = body.len().checked_sub(1).map(|last| at.min(last)) {
            body[changed] = byte;
        }
        says_one_thing::<M>(kind, &body)?;
        says_one_thing::<M>(kind, &body[..end.min(body.len())])?;
        body.push(byte);
        says_one_thing::<M>(kind, &body)
    }

    proptest! {
        #[test]
        fn every_ask_comes_back(message in ask()) {
            comes_back(&message)?;
        }

        #[test]
        fn every_answer_comes_back(message in answer()) {
            comes_back(&message)?;
        }

        #[test]
        fn every_data_ask_comes_back(message in data_ask()) {
            comes_back(&message)?;
        }

        #[test]
        fn every_data_answer_comes_back(message in data_answer()) {
            comes_back(&message)?;
        }

        #[test]
        fn what_is_accepted_says_exactly_one_thing(
            messages in (ask(), answer(), data_ask(), data_answer()),
            at in 0..120usize, byte: u8, end in 0..120usize
        ) {
            damaged(&messages.0, at, byte, end)?;
            damaged(&messages.1, at, byte, end)?;
            damaged(&messages.2, at, byte, end)?;
            damaged(&messages.3, at, byte, end)?;
        }

        #[test]
        fn garbage_in_a_sound_frame_never_panics(kind in 0..0x33u8, body in vec(any::<u8>(), 0..300)) {
            says_one_thing::<Ask>(kind, &body)?;
            says_one_thing::<Answer>(kind, &body)?;
            says_one_thing::<DataAsk>(kind, &body)?;
            says_one_thing::<DataAnswer>(kind, &body)?;
        }
    }

    fn want(id: u64) -> Want {
        Want { id: WantId(id), principal: 0, wait_ms: 5, key: BlockKey([id as u8; 16]) }
    }

    fn no_field(field: &'static str) -> WireError {
        WireError::Field { field }
    }

    #[test]
    fn the_frame_in_front_of_a_block_and_the_one_instead_are_32_bytes() {
        assert_eq!(encoded(&DataAnswer::Data(ReadId(u64::MAX), u32::MAX)).len(), DATA_FRAME_BYTES);
        assert_eq!(encoded(&DataAnswer::Gone(ReadId(0))).len(), DATA_FRAME_BYTES);
        assert_eq!(encoded(&DataAsk::Read(vec![(ReadId(1), WantId(2))])).len(), 32);
    }

    #[test]
    fn as_many_items_as_a_message_takes_come_back_in_one_allocation() {
        let wants: Vec<_> = (0..ITEMS_MAX as u64).map(want).collect();
        let frame = encoded(&Ask::Want(wants.clone()));
        let Ok(Ask::Want(read)) = decoded(&frame) else { panic!("refused") };
        assert_eq!((read.len(), read.capacity()), (ITEMS_MAX, ITEMS_MAX));
        assert_eq!(read, wants);
        let offer = Offer {
            id: 1,
            principal: 63,
            binding: vec![7; BINDING_BYTES_MAX],
            keys: vec![BlockKey([9; 16]); ITEMS_MAX],
        };
        assert_eq!(decoded(&encoded(&Ask::Offer(offer.clone()))), Ok(Ask::Offer(offer)));
        let found = Answer::Found(Found { id: 1, sights: vec![Sight::Pending; ITEMS_MAX] });
        assert_eq!(decoded(&encoded(&found)), Ok(found));
    }

    #[test]
    fn one_item_too_many_is_refused() {
        let max = ITEMS_MAX * Want::BYTES;
        let body = vec![0; max + Want::BYTES];
        let bytes = body.len() as u32;
        assert_eq!(decoded::<Ask>(&sealed(kind::WANT, &body)), Err(WireError::TooLong { bytes, max }));
        // Room that a short binding leaves is no room for more keys.
        let body = vec![0; 11 + 16 * (ITEMS_MAX + 1)];
        let too_long = WireError::TooLong { bytes: body.len() as u32 - 11, max: 16 * ITEMS_MAX };
        assert_eq!(decoded::<Ask>(&sealed(kind::OFFER, &body)), Err(too_long));
    }

    #[test]
    fn a_want_that_is_numbered_twice_is_refused_wherever_it_stands() {
        let mut falling: Vec<_> = (0..ITEMS_MAX as u64).rev().map(want).collect();
        assert!(decoded::<Ask>(&encoded(&Ask::Want(falling.clone()))).is_ok());
        falling[4000].id = WantId(4095);
        let twice = |wants: &[Want]| decoded::<Ask>(&encoded(&Ask::Want(wants.to_vec())));
        assert_eq!(twice(&falling), Err(WireError::Twice { want: WantId(4095) }));
        assert_eq!(twice(&[want(0), want(0)]), Err(WireError::Twice { want: WantId(0) }));
        assert_eq!(twice(&[want(1), want(2), want(1)]), Err(WireError::Twice { want: WantId(1) }));
    }

    #[test]
    fn hello_and_welcome_may_grow_at_their_end_and_nothing_else_may() {
        let hello = Hello {
            versions: (1, 9),
            node: "n".repeat(NAME_BYTES_MAX),
            epoch: Epoch(3),
            principals: vec!["p".repeat(NAME_BYTES_MAX); PRINCIPALS_MAX],
            facts: vec![7; FACTS_BYTES_MAX],
        };
        let mut body = encoded(&Ask::Hello(hello.clone()))[HEADER_BYTES..].to_vec();
        body.resize(GREETING_BYTES_MAX, 0xee);
        assert_eq!(decoded(&sealed(kind::HELLO, &body)), Ok(Ask::Hello(hello)));
        let welcome = Welcome {
            version: 1,
            node: "owner".to_owned(),
            epoch: Epoch(4),
            session: 5,
            credits: Credits { wants_max: 6, bytes_max: 7 },
            leaving: true,
            facts: vec![8; 9],
        };
        let mut body = encoded(&Answer::Welcome(welcome.clone()))[HEADER_BYTES..].to_vec();
        body.push(0xee);
        assert_eq!(decoded(&sealed(kind::WELCOME, &body)), Ok(Answer::Welcome(welcome)));

        let ask = |kind, bytes: usize| decoded::<Ask>(&sealed(kind, &vec![1; bytes])).unwrap_err();
        assert_eq!(ask(kind::DONE, 9), WireError::left_over(kind::DONE));
        assert_eq!(ask(kind::PROBE, 9 + 17), WireError::left_over(kind::PROBE));
        assert_eq!(ask(kind::PROBE, 8), WireError::missing(kind::PROBE));
        assert_eq!(ask(kind::PING, 7), WireError::missing(kind::PING));
        let answer = |kind, bytes: usize| decoded::<Answer>(&sealed(kind, &vec![1; bytes])).unwrap_err();
        assert_eq!(answer(kind::MISSED, 10), WireError::left_over(kind::MISSED));
        assert_eq!(answer(kind::CREDITS, 11), WireError::missing(kind::CREDITS));
    }

    #[test]
    fn fields_that_cannot_be_are_named() {
        let hello = |body: &[u8]| decoded::<Ask>(&sealed(kind::HELLO, body)).unwrap_err();
        let front = |oldest: u8, newest: u8| [oldest, 0, newest, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(hello(&front(2, 1)), no_field("versions"));
        assert_eq!(hello(&[&front(1, 1)[..], b"\0\0"].concat()), no_field("node"));
        assert_eq!(hello(&[&front(1, 1)[..], b"\x03a b\0"].concat()), no_field("node"));
        assert_eq!(hello(&[&front(1, 1)[..], b"\x02\xc3\x28\0"].concat()), no_field("node"));
        assert_eq!(hello(&[&front(1, 1)[..], b"\x01a\x41"].concat()), no_field("principals"));
        assert_eq!(hello(&[&front(1, 1)[..], b"\x01a\x01\x01/"].concat()), no_field("principals"));
        let long = [&front(1, 1)[..], b"\x40", &[b'a'; 64], b"\0"].concat();
        assert_eq!(hello(&long), no_field("node"));
        assert_eq!(hello(&front(1, 1)), WireError::missing(kind::HELLO));

        let answer = |kind, body: &[u8]| decoded::<Answer>(&sealed(kind, body)).unwrap_err();
        let welcome = |version: u8, leaving: u8| {
            let mut body = [0; 43];
            (body[0], body[38], body[39], body[40]) = (version, leaving, 1, b'o');
            decoded::<Answer>(&sealed(kind::WELCOME, &body))
        };
        assert!(welcome(1, 1).is_ok());
        assert_eq!(welcome(2, 0), Err(no_field("version")));
        assert_eq!(welcome(0, 0), Err(no_field("version")));
        assert_eq!(welcome(1, 2), Err(no_field("leaving")));
        assert_eq!(answer(kind::REFUSED, &[0]), no_field("why"));
        assert_eq!(answer(kind::REFUSED, &[6]), no_field("why"));
        assert_eq!(answer(kind::REFUSED, b"\x01two\nlines"), no_field("text"));
        assert_eq!(answer(kind::REFUSED, b"\x01\xff"), no_field("text"));
        assert_eq!(answer(kind::MISSED, &[0; 9]), no_field("reason"));
        assert_eq!(answer(kind::MISSED, &[18; 9]), no_field("reason"));
        assert_eq!(answer(kind::FOUND, &[5; 9]), no_field("sight"));
        assert_eq!(answer(kind::OWNER_PATH, &[0]), no_field("path"));
        for (at, byte, field) in
            [(32, 3, "priority"), (33, 0, "tier"), (33, 5, "tier"), (35, 1, "window"), (46, 1, "window")]
        {
            let mut grant = [0; 47];
            grant[33] = 1;
            grant[at] = byte;
            assert_eq!(answer(kind::GRANTED, &grant), no_field(field), "byte {at}");
        }
        let mut offer = [0; 11 + BINDING_BYTES_MAX + 1];
        offer[9..11].copy_from_slice(&(BINDING_BYTES_MAX as u16 + 1).to_le_bytes());
        assert_eq!(decoded::<Ask>(&sealed(kind::OFFER, &offer)), Err(no_field("binding")));
        assert_eq!(decoded::<Ask>(&sealed(kind::READER_PATH, &[0, 1])), Err(no_field("path")));
        for (kind, at) in [(kind::DATA, 12), (kind::GONE, 8)] {
            let mut body = [0; 16];
            body[at] = 1;
            assert_eq!(decoded::<DataAnswer>(&sealed(kind, &body)), Err(no_field("reserved")));
        }
    }

    #[test]
    fn a_message_of_another_place_is_not_expected() {
        let ping = encoded(&Ask::Ping(1));
        let wrong = Err(WireError::Kind { kind: kind::PING });
        assert_eq!(decoded::<Answer>(&ping), wrong.map(|()| Answer::Leaving));
        assert!(decoded::<DataAsk>(&ping).is_err() && decoded::<DataAnswer>(&ping).is_err());
        assert!(decoded::<Ask>(&encoded(&DataAsk::Join(1))).is_err());
        // But a refusal is the same on both connections.
        let refused = Refused { why: Refusal::Session, text: "no such session".to_owned() };
        let frame = encoded(&DataAnswer::Refused(refused.clone()));
        assert_eq!(decoded(&frame), Ok(Answer::Refused(refused)));
    }

    /// The frame of a message that breaks its bounds; `None` in a debug build, which asserts them.
    fn unbounded(message: &impl Message) -> Option<Vec<u8>> {
        let frame = catch_unwind(AssertUnwindSafe(|| encoded(message)));
        assert_eq!(frame.is_err(), cfg!(debug_assertions));
        frame.ok()
    }

    #[test]
    fn a_message_beyond_its_bounds_is_cut_or_refused_by_the_peer_and_never_says_another_thing() {
        let wants: Vec<_> = (0..=ITEMS_MAX as u64).map(want).collect();
        if let Some(frame) = unbounded(&Ask::Want(wants.clone())) {
            assert_eq!(decoded(&frame), Ok(Ask::Want(wants[..ITEMS_MAX].to_vec())));
        }
        for node in ["".to_owned(), "n".repeat(NAME_BYTES_MAX + 1), "a b".to_owned()] {
            let hello = Hello { versions: (1, 1), node, epoch: Epoch(1), principals: vec![], facts: vec![] };
            if let Some(frame) = unbounded(&Ask::Hello(hello)) {
                assert_eq!(decoded::<Ask>(&frame), Err(no_field("node")));
            }
        }
        let text = "x".to_owned() + &"\u{e9}".repeat(TEXT_BYTES_MAX / 2);
        if let Some(frame) = unbounded(&Answer::Refused(Refused { why: Refusal::Full, text: text.clone() })) {
            let text = text[..TEXT_BYTES_MAX - 1].to_owned();
            assert_eq!(decoded(&frame), Ok(Answer::Refused(Refused { why: Refusal::Full, text })));
        }
        let offer = Offer { id: 1, principal: 0, binding: vec![1; BINDING_BYTES_MAX + 1], keys: Vec::new() };
        if let Some(frame) = unbounded(&Ask::Offer(offer.clone())) {
            assert_eq!(decoded(&frame), Ok(Ask::Offer(Offer { binding: Vec::new(), ..offer })));
        }
        let words = vec![1; WORDS_BYTES_MAX + 1];
        if let Some(frame) = unbounded(&Answer::Path(PathEnd { path: 1, words })) {
            assert_eq!(decoded(&frame), Ok(Answer::Path(PathEnd { path: 1, words: Vec::new() })));
        }
        if let Some(frame) = unbounded(&Answer::Path(PathEnd { path: 0, words: Vec::new() })) {
            assert_eq!(decoded::<Answer>(&frame), Err(no_field("path")));
        }
    }

    #[test]
    fn refusals_keep_their_numbers() {
        use Refusal::{Full, Leaving, Session, Unknown, Version};
        for (why, number) in [(Version, 1), (Unknown, 2), (Full, 3), (Leaving, 4), (Session, 5)] {
            let frame = encoded(&Answer::Refused(Refused { why, text: String::new() }));
            assert_eq!(frame[HEADER_BYTES..], [number]);
        }
    }

    #[test]
    fn a_text_is_one_line_and_ends_between_two_characters() {
        let text = "a\nb\u{0}c\u{85}".to_owned();
        let frame = encoded(&Answer::Refused(Refused { why: Refusal::Leaving, text }));
        let Ok(Answer::Refused(refused)) = decoded(&frame) else { panic!("refused") };
        assert_eq!(refused.text, "a b c ");
    }

    #[test]
    fn every_item_is_as_long_as_it_says() {
        fn check<T: Item>(item: &T) {
            let mut out = Vec::new();
            item.put(&mut out);
            assert_eq!(out.len(), T::BYTES);
        }
        check(&want(1));
        check(&WantId(1));
        check(&BlockKey([1; 16]));
        check(&(WantId(1), MissReason::Expired));
        check(&(ReadId(1), WantId(1)));
        check(&Sight::Pending);
    }
}
