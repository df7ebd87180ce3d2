//! The bytes of one pack: what they mean, how they are written, how they are read back.
//!
//! ```text
//!  0        16                             data end                    end - 32     end
//! +--------+------------------------------+---------------------------+---------+
//! | header | blocks, back to back         | footer: who, what, where  | trailer |
//! +--------+------------------------------+---------------------------+---------+
//!
//! header, 16 bytes
//!    0 magic "KVDPACK1"   8 version u32   12 crc32 of bytes 0..12
//!
//! footer
//!    0 magic "KVDFOOT1"   8 version u32   12 cipher u32: 0, the blocks are not encrypted
//!   16 epoch u64         24 sequence u64  32 data end u64: where the footer begins
//!   40 bindings u32      44 entries u32   48 node bytes u32   52 zero u32
//!   56 node, text
//!      then each binding
//!        0 tag u64        8 scope id 32   40 slice, six u16   52 block bytes u32   56 about bytes u32
//!       60 about, text: the scope in words, without its salt; for people, nothing is decided by it
//!      then each entry, in the order of the blocks
//!        0 key 16        16 checksum u64  24 bytes u32        28 expires u32
//!       32 binding u16   34 priority u8   35 flags u8: 1, it continues the prefix of the block before it
//!
//! trailer, 32 bytes
//!    0 magic "KVDTAIL1"   8 version u32   12 footer bytes u32  16 pack bytes u64
//!   24 zero u32          28 crc32 of bytes 0..28
//! ```
//! All numbers are little-endian.
//!
//! - A pack is called by BLAKE3 of its footer. The footer holds the checksum of every block and the life of the
//!   node that wrote it, so a name is never given twice, a write can be tried again without asking what became
//!   of the last one, and whoever knows the name knows that the footer is whole.
//! - The trailer lies at the end and has one length in all versions: one read of the tail finds the footer, and
//!   as a rule has it already.
//! - A block's checksum is mixed with its key, and where it lies follows from the lengths before it.
//! - A tag is derived from what its binding says, so a binding that contradicts its tag is not believed.
//! - Another version, or a cipher, is [`Tail::Incompatible`]: not damaged, only not for this reader.
//!
//! Parsing takes any bytes whatever and never panics.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use kv_block::{BindingTag, BlockKey, Checksum, Epoch, Priority, Record, ScopeId, Slice};

use crate::cursor::Cursor;

/// Version of this format.
pub const VERSION: u32 = 1;
/// Length of the header in bytes; the first block begins here.
pub const HEADER_BYTES: usize = 16;
/// Length of the trailer in bytes, in every version.
pub const TRAILER_BYTES: usize = 32;
/// Longest pack in bytes, so that an offset is 32 bits.
pub const PACK_BYTES_MAX: u64 = u32::MAX as u64;
/// Longest footer that a reader takes into memory, in bytes.
pub const FOOTER_BYTES_MAX: usize = 64 << 20;
/// Longest name of a node in bytes.
pub const NODE_BYTES_MAX: usize = 63;
/// Most bindings in one pack.
pub const BINDINGS_MAX: usize = 4096;
/// Longest description of a binding in bytes.
pub const ABOUT_BYTES_MAX: usize = 16 << 10;

const HEADER_MAGIC: &[u8; 8] = b"KVDPACK1";
const FOOTER_MAGIC: &[u8; 8] = b"KVDFOOT1";
const TRAILER_MAGIC: &[u8; 8] = b"KVDTAIL1";
const FOOTER_FIXED_BYTES: usize = 56;
const BINDING_FIXED_BYTES: usize = 60;
const ENTRY_BYTES: usize = 36;
const PLAIN: u32 = 0;
const FOLLOWS: u8 = 1;

/// Names a pack: BLAKE3 of its footer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackId(pub [u8; 32]);

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not 64 lower-case hex digits.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{text}` names no pack")]
pub struct NoPackId {
    /// What was given.
    pub text: String,
}

impl FromStr for PackId {
    type Err = NoPackId;
    fn from_str(text: &str) -> Result<Self, NoPackId> {
        let id = text.parse::<ScopeId>().map(|digest| Self(digest.0));
        // One text for one pack: no upper case.
        id.ok().filter(|id| id.to_string() == text).ok_or_else(|| NoPackId { text: text.to_owned() })
    }
}

/// Whether a node can have this name in an object store: 1 to 63 of a-z, 0-9, '-', '_' and '.', the first a letter
/// or a digit.
pub fn is_node(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte);
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    first && name.len() <= NODE_BYTES_MAX && name.bytes().all(inner)
}

/// Who wrote a pack, and which of its packs it is.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Writer {
    /// Name of the node; see [`is_node`].
    pub node: String,
    /// Which life of the node.
    pub epoch: Epoch,
    /// Counts the packs of that life.
    pub sequence: u64,
}

/// A scope, slice and block length that blocks of a pack were stored under.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Binding {
    /// What the bytes mean.
    pub scope: ScopeId,
    /// Which part of the tensor they are.
    pub slice: Slice,
    /// Length of a whole block in bytes.
    pub block_bytes: u32,
    /// The scope in words, without its salt. For people.
    pub about: String,
}

impl Binding {
    /// What the binding is called.
    pub fn tag(&self) -> BindingTag {
        self.scope.binding_tag(&self.slice, self.block_bytes)
    }
}

/// One block of a pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// What it is.
    pub record: Record,
    /// Where it begins, in bytes from the start of the pack.
    pub offset: u32,
    /// It continues the prefix of the block before it.
    pub follows: bool,
}

impl Entry {
    /// Where it lies, in bytes from the start of the pack.
    pub fn range(&self) -> Range<u64> {
        let from = u64::from(self.offset);
        from..from + u64::from(self.record.bytes)
    }
}

/// What a pack says about itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Footer {
    /// Who wrote it.
    pub writer: Writer,
    /// What its blocks were stored under.
    pub bindings: Vec<Binding>,
    /// Its blocks, in the order in which they lie.
    pub entries: Vec<Entry>,
}

/// A block to be packed.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// What it is.
    pub record: Record,
    /// It continues the prefix of the block before it.
    pub follows: bool,
    /// Its bytes.
    pub bytes: &'a [u8],
}

/// A pack as it is written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pack {
    /// Its name.
    pub id: PackId,
    /// All of its bytes.
    pub bytes: Vec<u8>,
    /// What it says about itself.
    pub footer: Footer,
    /// Length of its footer in bytes.
    pub footer_bytes: u32,
}

/// What the tail of a pack says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Tail {
    /// Everything.
    Whole(Footer),
    /// The footer begins before the bytes that were read.
    More {
        /// So many of the pack's last bytes hold all of it.
        tail_bytes: u64,
    },
    /// It is a pack, and not for this reader.
    Incompatible {
        /// The format's version that it names; this one's when it is only the cipher.
        version: u32,
        /// The cipher it names, where this reader could read that far.
        cipher: u32,
    },
}

/// Why bytes are no pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PackError {
    /// Fewer bytes than the smallest pack has.
    #[error("{bytes} bytes are too few for a pack")]
    Short {
        /// How many there are.
        bytes: u64,
    },
    /// It does not end or begin like a pack.
    #[error("not a pack")]
    Magic,
    /// A checksum of its own parts does not fit.
    #[error("the {part} fails its checksum")]
    Checksum {
        /// `header`, `trailer` or `footer`.
        part: &'static str,
    },
    /// The pack has another length than it says.
    #[error("{found} bytes long, {wanted} wanted")]
    Length {
        /// Length found.
        found: u64,
        /// Length wanted.
        wanted: u64,
    },
    /// Something in it contradicts something else.
    #[error("{what} is impossible")]
    Impossible {
        /// What.
        what: &'static str,
    },
    /// A block is not what was sealed under its name.
    #[error("block {key} fails its checksum")]
    Block {
        /// Its name.
        key: BlockKey,
    },
}

fn impossible(what: &'static str) -> PackError {
    PackError::Impossible { what }
}

/// Makes a pack of blocks, in this order. Refuses what no reader would believe: a name or number out of its limits, a
/// tag that no binding has, bytes that are not what was sealed.
pub fn encode(writer: Writer, bindings: Vec<Binding>, blocks: &[Block<'_>]) -> Result<Pack, PackError> {
    let data_bytes: usize = blocks.iter().map(|block| block.bytes.len()).sum();
    let mut bytes = Vec::with_capacity(HEADER_BYTES + data_bytes + ENTRY_BYTES * blocks.len() + 4096);
    bytes.extend(header());
    let mut entries = Vec::with_capacity(blocks.len());
    for Block { record, follows, bytes: content } in blocks {
        if content.len() != record.bytes as usize || !record.checksum.matches(&record.key, content) {
            return Err(PackError::Block { key: record.key });
        }
        let offset = u32::try_from(bytes.len()).map_err(|_| impossible("the pack's length"))?;
        entries.push(Entry { record: *record, offset, follows: *follows });
        bytes.extend_from_slice(content);
    }
    let footer = Footer { writer, bindings, entries };
    let encoded = footer.encode().ok_or(impossible("a number"))?;
    // A pack that we would not read is not written.
    if Footer::parse(&encoded)? != Parsed::Plain(footer.clone()) {
        return Err(impossible("the order of its parts"));
    }
    let id = PackId(*blake3::hash(&encoded).as_bytes());
    let footer_bytes = u32::try_from(encoded.len()).map_err(|_| impossible("the footer's length"))?;
    let pack_bytes = (bytes.len() + encoded.len() + TRAILER_BYTES) as u64;
    if pack_bytes > PACK_BYTES_MAX || encoded.len() > FOOTER_BYTES_MAX {
        return Err(impossible("the pack's length"));
    }
    bytes.extend(encoded);
    bytes.extend(trailer(footer_bytes, pack_bytes));
    Ok(Pack { id, bytes, footer, footer_bytes })
}

/// Reads the last bytes of a pack called `id` that is `pack_bytes` long.
pub fn parse_tail(id: &PackId, pack_bytes: u64, tail: &[u8]) -> Result<Tail, PackError> {
    let smallest = (HEADER_BYTES + FOOTER_FIXED_BYTES + TRAILER_BYTES) as u64;
    if pack_bytes < smallest || tail.len() < TRAILER_BYTES || tail.len() as u64 > pack_bytes {
        return Err(PackError::Short { bytes: pack_bytes.min(tail.len() as u64) });
    }
    let (front, trailer) = tail.split_at(tail.len() - TRAILER_BYTES);
    if &trailer[..8] != TRAILER_MAGIC {
        return Err(PackError::Magic);
    }
    let number = |at: usize| u32::from_le_bytes(trailer[at..at + 4].try_into().expect("four bytes"));
    if crc32fast::hash(&trailer[..28]) != number(28) {
        return Err(PackError::Checksum { part: "trailer" });
    }
    if number(8) != VERSION {
        return Ok(Tail::Incompatible { version: number(8), cipher: PLAIN });
    }
    let footer_bytes = number(12) as usize;
    let wanted = u64::from_le_bytes(trailer[16..24].try_into().expect("eight bytes"));
    if wanted != pack_bytes {
        return Err(PackError::Length { found: pack_bytes, wanted });
    }
    let room = pack_bytes - (HEADER_BYTES + TRAILER_BYTES) as u64;
    let sound = (FOOTER_FIXED_BYTES..=FOOTER_BYTES_MAX).contains(&footer_bytes);
    if number(24) != 0 || !sound || footer_bytes as u64 > room || pack_bytes > PACK_BYTES_MAX {
        return Err(impossible("the footer's length"));
    }
    let Some(at) = front.len().checked_sub(footer_bytes) else {
        return Ok(Tail::More { tail_bytes: (footer_bytes + TRAILER_BYTES) as u64 });
    };
    let footer = &front[at..];
    if blake3::hash(footer).as_bytes() != &id.0 {
        return Err(PackError::Checksum { part: "footer" });
    }
    match Footer::parse(footer)? {
        Parsed::Cipher(cipher) => Ok(Tail::Incompatible { version: VERSION, cipher }),
        Parsed::Plain(parsed) if parsed.data_end() + (footer_bytes + TRAILER_BYTES) as u64 == pack_bytes => {
            Ok(Tail::Whole(parsed))
        }
        Parsed::Plain(_) => Err(impossible("where the blocks end")),
    }
}

/// Reads a whole pack and compares the checksum of every block.
pub fn parse(id: &PackId, bytes: &[u8]) -> Result<Tail, PackError> {
    let tail = parse_tail(id, bytes.len() as u64, bytes)?;
    if let Tail::Whole(footer) = &tail {
        if bytes[..HEADER_BYTES] != header() {
            return Err(PackError::Checksum { part: "header" });
        }
        for Entry { record, offset, .. } in &footer.entries {
            let content = &bytes[*offset as usize..][..record.bytes as usize];
            if !record.checksum.matches(&record.key, content) {
                return Err(PackError::Block { key: record.key });
            }
        }
    }
    Ok(tail)
}

fn header() -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..8].copy_from_slice(HEADER_MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let crc = crc32fast::hash(&out[..12]);
    out[12..].copy_from_slice(&crc.to_le_bytes());
    out
}

fn trailer(footer_bytes: u32, pack_bytes: u64) -> [u8; TRAILER_BYTES] {
    let mut out = [0; TRAILER_BYTES];
    out[..8].copy_from_slice(TRAILER_MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&footer_bytes.to_le_bytes());
    out[16..24].copy_from_slice(&pack_bytes.to_le_bytes());
    let crc = crc32fast::hash(&out[..28]);
    out[28..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// What a footer said.
#[derive(PartialEq)]
enum Parsed {
    Plain(Footer),
    Cipher(u32),
}

impl Footer {
    /// Where the last block ends and the footer begins, in bytes from the start of the pack.
    pub fn data_end(&self) -> u64 {
        self.entries.last().map_or(HEADER_BYTES as u64, |entry| entry.range().end)
    }

    /// Unix time in seconds after which no block of it counts; 0 when some never expire.
    pub fn expires_at(&self) -> u32 {
        let never = self.entries.iter().any(|entry| entry.record.expires_at == 0);
        let latest = self.entries.iter().map(|entry| entry.record.expires_at).max();
        if never { 0 } else { latest.unwrap_or(0) }
    }

    /// The footer as bytes; `None` when a record has a tag that no binding has, or something is too long to count.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(FOOTER_FIXED_BYTES + 256 + ENTRY_BYTES * self.entries.len());
        out.extend_from_slice(FOOTER_MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend(PLAIN.to_le_bytes());
        out.extend(self.writer.epoch.0.to_le_bytes());
        out.extend(self.writer.sequence.to_le_bytes());
        out.extend(self.data_end().to_le_bytes());
        for count in [self.bindings.len(), self.entries.len(), self.writer.node.len(), 0] {
            out.extend(u32::try_from(count).ok()?.to_le_bytes());
        }
        out.extend_from_slice(self.writer.node.as_bytes());
        for binding in &self.bindings {
            out.extend(binding.tag().0.to_le_bytes());
            out.extend(binding.scope.0);
            out.extend(binding.slice.encode());
            out.extend(binding.block_bytes.to_le_bytes());
            out.extend(u32::try_from(binding.about.len()).ok()?.to_le_bytes());
            out.extend_from_slice(binding.about.as_bytes());
        }
        let tags: Vec<_> = self.bindings.iter().map(Binding::tag).collect();
        for Entry { record, follows, .. } in &self.entries {
            let binding = tags.iter().position(|tag| *tag == record.tag)?;
            out.extend(record.key.0);
            out.extend(record.checksum.0.to_le_bytes());
            out.extend(record.bytes.to_le_bytes());
            out.extend(record.expires_at.to_le_bytes());
            out.extend(u16::try_from(binding).ok()?.to_le_bytes());
            out.push(record.priority as u8);
            out.push(if *follows { FOLLOWS } else { 0 });
        }
        Some(out)
    }

    /// Reads a footer whose digest was found right: whatever is wrong with it now was written so.
    fn parse(bytes: &[u8]) -> Result<Parsed, PackError> {
        let mut at = Cursor::new(bytes);
        let short = || impossible("the footer's length");
        if at.array() != Some(*FOOTER_MAGIC) {
            return Err(PackError::Magic);
        }
        if at.u32() != Some(VERSION) {
            return Err(impossible("the footer's version"));
        }
        let cipher = at.u32().ok_or_else(short)?;
        if cipher != PLAIN {
            return Ok(Parsed::Cipher(cipher));
        }
        let epoch = Epoch(at.u64().ok_or_else(short)?);
        let sequence = at.u64().ok_or_else(short)?;
        let data_end = at.u64().ok_or_else(short)?;
        let binding_count = at.u32().ok_or_else(short)? as usize;
        let entry_count = at.u32().ok_or_else(short)? as usize;
        let node_bytes = at.u32().ok_or_else(short)? as usize;
        // Before anything is allocated: so many cannot be in so few bytes.
        let least = binding_count.checked_mul(BINDING_FIXED_BYTES).zip(entry_count.checked_mul(ENTRY_BYTES));
        let fits = least.and_then(|(a, b)| a.checked_add(b)).is_some_and(|least| least <= bytes.len());
        if at.u32() != Some(0) || !fits || binding_count > BINDINGS_MAX {
            return Err(impossible("a count"));
        }
        let node = text(&mut at, node_bytes).filter(|node| is_node(node)).ok_or(impossible("the node"))?;
        let mut bindings: Vec<Binding> = Vec::with_capacity(binding_count);
        let mut tags = Vec::with_capacity(binding_count);
        for _ in 0..binding_count {
            let (tag, binding) = parse_binding(&mut at).ok_or(impossible("a binding"))?;
            if binding.tag() != tag || tags.contains(&tag) {
                return Err(impossible("a binding's tag"));
            }
            tags.push(tag);
            bindings.push(binding);
        }
        let mut entries = Vec::with_capacity(entry_count);
        let mut offset = HEADER_BYTES as u64;
        for index in 0..entry_count {
            let entry = parse_entry(&mut at, &tags, offset).ok_or(impossible("an entry"))?;
            if entry.follows && index == 0 {
                return Err(impossible("what the first block follows"));
            }
            offset = entry.range().end;
            entries.push(entry);
        }
        if !at.is_empty() || offset != data_end || data_end > PACK_BYTES_MAX {
            return Err(impossible("where the blocks end"));
        }
        let writer = Writer { node: node.to_owned(), epoch, sequence };
        Ok(Parsed::Plain(Self { writer, bindings, entries }))
    }
}

fn text<'a>(at: &mut Cursor<'a>, bytes: usize) -> Option<&'a str> {
    std::str::from_utf8(at.take(bytes)?).ok()
}

fn parse_binding(at: &mut Cursor<'_>) -> Option<(BindingTag, Binding)> {
    let tag = BindingTag(at.u64()?);
    let scope = ScopeId(at.array()?);
    let (layers, heads) = (at.u16()?..at.u16()?, at.u16()?..at.u16()?);
    let slice = Slice { layers, heads, layers_total: at.u16()?, heads_total: at.u16()? };
    let block_bytes = at.u32()?;
    let about_bytes = at.u32()? as usize;
    if about_bytes > ABOUT_BYTES_MAX {
        return None;
    }
    let about = text(at, about_bytes)?.to_owned();
    Some((tag, Binding { scope, slice, block_bytes, about }))
}

fn parse_entry(at: &mut Cursor<'_>, tags: &[BindingTag], offset: u64) -> Option<Entry> {
    let key = BlockKey(at.array()?);
    let checksum = Checksum(at.u64()?);
    let bytes = at.u32().filter(|bytes| *bytes > 0)?;
    let expires_at = at.u32()?;
    let tag = *tags.get(usize::from(at.u16()?))?;
    let priority = at.u8()?;
    let flags = at.u8().filter(|flags| flags & !FOLLOWS == 0)?;
    let known = Priority::from_bits(priority);
    if known as u8 != priority {
        return None;
    }
    let record = Record { key, checksum, bytes, tag, priority: known, expires_at };
    Some(Entry { record, offset: u32::try_from(offset).ok()?, follows: flags == FOLLOWS })
}

#[cfg(test)]
mod tests {
    use kv_block::payload;
    use proptest::prelude::*;

    use super::*;

    /// Written by version 1; the bytes stay readable for ever, or are refused by version. Never change the file.
    const GOLDEN: &[u8] = include_bytes!("../tests/fixtures/pack-1.kvpack");
    const GOLDEN_ID: &str = "f44ec42e711ef9621d9290c0f2fb192db1dd9221b970fc058ed15169bc7609f8";

    fn binding(block_bytes: u32) -> Binding {
        let about = r#"{"model":"m","tenant":"a"}"#.to_owned();
        Binding { scope: ScopeId([7; 32]), slice: Slice::whole(2, 4), block_bytes, about }
    }

    fn record(number: u8, bytes: u32, tag: BindingTag) -> (Record, Vec<u8>) {
        let key = BlockKey([number; 16]);
        let mut content = vec![0; bytes as usize];
        payload::fill(&key, &mut content);
        let checksum = Checksum::of(&key, &content);
        let priority = Priority::ALL[usize::from(number) % 3];
        let record = Record { key, checksum, bytes, tag, priority, expires_at: u32::from(number) * 1000 };
        (record, content)
    }

    fn sample() -> Pack {
        let bindings = vec![binding(300), binding(100)];
        let blocks: Vec<_> = [(1, 300, 0), (2, 300, 0), (3, 100, 1), (4, 7, 1)]
            .into_iter()
            .map(|(number, bytes, at): (u8, u32, usize)| record(number, bytes, bindings[at].tag()))
            .collect();
        let blocks: Vec<_> = blocks
            .iter()
            .map(|(record, bytes)| Block { record: *record, follows: record.key.0[0] == 2, bytes })
            .collect();
        let writer = Writer { node: "node-a".into(), epoch: Epoch(3), sequence: 9 };
        encode(writer, bindings, &blocks).unwrap()
    }

    #[test]
    fn golden_bytes_of_version_1() {
        let pack = sample();
        assert_eq!(pack.id.to_string(), GOLDEN_ID);
        assert!(pack.bytes == GOLDEN, "the format changed");
        assert_eq!(parse(&GOLDEN_ID.parse().unwrap(), GOLDEN), Ok(Tail::Whole(pack.footer)));
    }

    #[test]
    fn every_block_lies_where_the_footer_says() {
        let pack = sample();
        for entry in &pack.footer.entries {
            let range = entry.range();
            let content = &pack.bytes[range.start as usize..range.end as usize];
            assert_eq!(payload::first_wrong_byte(&entry.record.key, content), None);
        }
        assert_eq!(pack.footer.expires_at(), 4000);
    }

    #[test]
    fn one_read_of_the_tail_is_enough_or_says_how_much_is() {
        let pack = sample();
        let whole = pack.bytes.len();
        let needed = pack.footer_bytes as usize + TRAILER_BYTES;
        for tail in TRAILER_BYTES..=whole {
            let found = parse_tail(&pack.id, whole as u64, &pack.bytes[whole - tail..]).unwrap();
            let wanted = if tail < needed {
                Tail::More { tail_bytes: needed as u64 }
            } else {
                Tail::Whole(pack.footer.clone())
            };
            assert_eq!(found, wanted, "a tail of {tail}");
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let mut pack = sample();
        for bit in 0..pack.bytes.len() * 8 {
            pack.bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&pack.id, &pack.bytes).is_err(), "bit {bit} does not count");
            pack.bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn every_truncation_and_every_byte_more_is_found() {
        let mut pack = sample();
        for end in 0..pack.bytes.len() {
            assert!(parse(&pack.id, &pack.bytes[..end]).is_err(), "cut at {end}");
        }
        pack.bytes.push(0);
        assert!(parse(&pack.id, &pack.bytes).is_err());
    }

    #[test]
    fn another_version_or_cipher_is_incompatible_and_no_error() {
        let mut pack = sample();
        let whole = pack.bytes.len();
        let trailer = &mut pack.bytes[whole - TRAILER_BYTES..];
        trailer[8] = 9;
        let crc = crc32fast::hash(&trailer[..28]);
        trailer[28..].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(parse(&pack.id, &pack.bytes), Ok(Tail::Incompatible { version: 9, cipher: 0 }));

        let mut pack = sample();
        let from = whole - TRAILER_BYTES - pack.footer_bytes as usize;
        pack.bytes[from + 12] = 1;
        let id = PackId(*blake3::hash(&pack.bytes[from..whole - TRAILER_BYTES]).as_bytes());
        assert_eq!(parse(&id, &pack.bytes), Ok(Tail::Incompatible { version: VERSION, cipher: 1 }));
    }

    #[test]
    fn another_life_gives_another_name() {
        let name = |epoch, sequence| {
            let writer = Writer { node: "n".into(), epoch: Epoch(epoch), sequence };
            encode(writer, vec![], &[]).unwrap().id
        };
        assert_ne!(name(1, 1), name(2, 1));
        assert_ne!(name(1, 1), name(1, 2));
        assert_eq!(name(1, 1), name(1, 1), "the same pack may be written twice");
    }

    #[test]
    fn what_no_reader_would_believe_is_not_written() {
        let writer = Writer { node: "n".into(), epoch: Epoch(1), sequence: 1 };
        let binding = binding(100);
        let (sound, bytes) = record(1, 100, binding.tag());
        let try_with = |writer: &Writer, record: Record, follows, bytes: &[u8]| {
            encode(writer.clone(), vec![binding.clone()], &[Block { record, follows, bytes }])
                .map(|pack| pack.footer.entries.len())
        };
        assert_eq!(try_with(&writer, sound, false, &bytes), Ok(1));
        assert_eq!(
            try_with(&writer, sound, false, &bytes[1..]),
            Err(PackError::Block { key: sound.key }),
            "too short"
        );
        let other = Record { checksum: Checksum(1), ..sound };
        assert_eq!(try_with(&writer, other, false, &bytes), Err(PackError::Block { key: sound.key }));
        assert!(try_with(&writer, Record { tag: BindingTag(1), ..sound }, false, &bytes).is_err());
        assert!(try_with(&writer, sound, true, &bytes).is_err(), "nothing is before the first");
        let nameless = Writer { node: "../x".into(), ..writer };
        assert!(try_with(&nameless, sound, false, &bytes).is_err());
    }

    #[test]
    fn names_go_there_and_back() {
        let id = sample().id;
        assert_eq!(id.to_string().parse(), Ok(id));
        for other in ["", "00", &id.to_string().to_uppercase(), &format!("{id}0"), &"zz".repeat(32)] {
            assert!(other.parse::<PackId>().is_err(), "{other}");
        }
        for (name, sound) in
            [("a", true), ("gpu-07.rack_1", true), ("", false), ("-a", false), ("A", false), ("a/b", false)]
        {
            assert_eq!(is_node(name), sound, "{name}");
        }
        assert!(is_node(&"a".repeat(63)) && !is_node(&"a".repeat(64)));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600), pack_bytes in 0u64..1000) {
            let _ = Footer::parse(&bytes);
            prop_assert!(parse_tail(&PackId([0; 32]), pack_bytes, &bytes).is_err());
        }
    }
}
