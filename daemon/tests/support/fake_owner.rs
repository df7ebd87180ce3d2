//! A peer that is no daemon: it speaks the protocol from its messages alone, and keeps or breaks one rule of it.
//!
//! It has every block there can be: the bytes of a block follow from its name.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kv_block::{BlockKey, Checksum, Epoch, MissReason, Priority, Tier, payload};
use kv_wire::frame::Message;
use kv_wire::message::{
    Answer, Ask, Credits, DataAnswer, DataAsk, Found, Grant, ReadId, Refusal, Refused, Sight, WantId,
    Welcome, Window,
};

use crate::support::wire::{Wire, encoded};

/// How it behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Manner {
    /// As it should.
    Honest,

    // Before it has taken the connection.
    HangsUpAtOnce,
    SilentAfterHello,
    HangsUpAfterHello,
    Refuses,
    AnotherName,
    AnotherVersion,
    Garbage,
    EndlessHeader,
    WrongFrameChecksum,
    GrantsBeforeWelcome,

    // When it is asked what it has.
    FindsTooFew,
    FindsTooMany,
    FindsUnasked,
    NeverFinds,

    // When it is asked for a block.
    SilentAfterWant,
    HangsUpOnWant,
    HalfAGrant,
    NeverGrants,
    GrantsUnasked,
    GrantsUnaskedForEver,
    GrantsTwice,
    GrantsNothing,
    GrantsTooMuch,
    GrantsHalf,
    GrantsAnotherTag,
    GrantsAnotherBlock,
    GrantsFromDevice,
    GrantsByWindow,
    MissesUnasked,
    WelcomesTwice,
    PongsUnasked,
    NeverPongs,
    SaysLeavingForEver,
    NoCredits,

    // On a data connection.
    HangsUpOnJoin,
    RefusesJoin,
    SilentOnJoin,
    HangsUpAfterJoin,
    SilentAfterRead,
    HangsUpOnRead,
    WrongBytes,
    TooShort,
    TooLong,
    AnotherRead,
    GarbageForData,
    SilentInBlock,
    HangsUpInBlock,
    Trickles,
    GoesOnBehindBlock,
    SaysGone,
}

/// A fake peer. Dropped, it is gone with all its connections.
pub(crate) struct FakeOwner {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    tag: kv_block::BindingTag,
    block_bytes: u32,
    manner: Mutex<Manner>,
    over: AtomicBool,
    wants: Mutex<HashMap<WantId, BlockKey>>,
    sockets: Mutex<Vec<TcpStream>>,
    joins: AtomicUsize,
}

const SESSION: u128 = 7;
const CREDITS: Credits = Credits { wants_max: 1000, bytes_max: 1 << 30 };
/// Between two bytes of a trickle.
const TRICKLE: Duration = Duration::from_millis(50);

impl FakeOwner {
    /// A peer of this name with blocks of this length; it begins honest.
    pub(crate) fn start(name: &str, tag: kv_block::BindingTag, block_bytes: u32) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            tag,
            block_bytes,
            manner: Mutex::new(Manner::Honest),
            over: AtomicBool::new(false),
            wants: Mutex::default(),
            sockets: Mutex::default(),
            joins: AtomicUsize::new(0),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                if accepting.over.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(socket) = socket else { continue };
                let shared = Arc::clone(&accepting);
                shared.sockets.lock().unwrap().extend(socket.try_clone());
                // How a conversation ends is the daemon's affair.
                std::thread::spawn(move || drop(shared.converse(Wire::on(socket))));
            }
        });
        Self { address, shared }
    }

    /// Behaves so from here on, in what is said next. Connections stay as they are.
    pub(crate) fn behave(&self, manner: Manner) {
        *self.shared.manner.lock().unwrap() = manner;
    }

    /// Ends all connections.
    pub(crate) fn hang_up(&self) {
        for socket in self.shared.sockets.lock().unwrap().drain(..) {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Data connections that came so far.
    pub(crate) fn joins(&self) -> usize {
        self.shared.joins.load(Ordering::Relaxed)
    }
}

impl Drop for FakeOwner {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        self.hang_up();
        // The one that the listener waits for.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn manner(&self) -> Manner {
        *self.manner.lock().unwrap()
    }

    fn converse(&self, mut wire: Wire) -> io::Result<()> {
        if self.manner() == Manner::HangsUpAtOnce {
            return wire.hang_up();
        }
        let (header, body) = wire.frame()?;
        match Ask::decode(&header, &body) {
            Ok(Ask::Hello(_)) => self.control(wire),
            _ => match DataAsk::decode(&header, &body) {
                Ok(DataAsk::Join(SESSION)) => self.data(wire),
                other => panic!("the daemon's first words are {other:?}"),
            },
        }
    }

    fn control(&self, mut wire: Wire) -> io::Result<()> {
        let mut welcome = Welcome {
            version: 1,
            node: self.name.clone(),
            epoch: Epoch(1),
            session: SESSION,
            credits: CREDITS,
            leaving: false,
            facts: Vec::new(),
        };
        match self.manner() {
            Manner::SilentAfterHello => return wire.listen_for_ever(),
            Manner::HangsUpAfterHello => return wire.hang_up(),
            Manner::Refuses => {
                wire.say(&Answer::Refused(Refused { why: Refusal::Full, text: "not you".into() }))?;
                return wire.hang_up();
            }
            Manner::AnotherName => welcome.node = "somebody".into(),
            Manner::AnotherVersion => welcome.version = 7,
            Manner::Garbage => wire.raw(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")?,
            Manner::EndlessHeader => {
                let mut frame = encoded(&Answer::Welcome(welcome.clone()));
                frame[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
                wire.raw(&frame)?;
            }
            Manner::WrongFrameChecksum => {
                let mut frame = encoded(&Answer::Welcome(welcome.clone()));
                *frame.last_mut().unwrap() ^= 1;
                wire.raw(&frame)?;
            }
            Manner::GrantsBeforeWelcome => wire.say(&Answer::Granted(Vec::new()))?,
            Manner::NoCredits => welcome.credits.wants_max = 0,
            _ => {}
        }
        let mut stingy = welcome.credits.wants_max == 0;
        wire.say(&Answer::Welcome(welcome))?;
        loop {
            let ask = wire.hear()?;
            if stingy && self.manner() == Manner::Honest {
                stingy = false;
                wire.say(&Answer::Credits(CREDITS))?;
            }
            match ask {
                Ask::Want(wants) => {
                    for want in wants {
                        self.wanted(&mut wire, want.id, want.key)?;
                    }
                }
                Ask::Done(wants) => {
                    let mut known = self.wants.lock().unwrap();
                    known.retain(|want, _| !wants.contains(want));
                }
                Ask::Probe(probe) => {
                    let mut sights = vec![Sight::In(Tier::Host); probe.keys.len()];
                    let mut id = probe.id;
                    match self.manner() {
                        Manner::NeverFinds => continue,
                        Manner::FindsTooFew => drop(sights.pop()),
                        Manner::FindsTooMany => sights.push(Sight::Absent),
                        Manner::FindsUnasked => id += 1000,
                        _ => {}
                    }
                    wire.say(&Answer::Found(Found { id, sights }))?;
                }
                Ask::Ping(_) if matches!(self.manner(), Manner::NeverPongs | Manner::SilentAfterWant) => {}
                Ask::Ping(number) => wire.say(&Answer::Pong(number))?,
                other => panic!("the daemon says {other:?}"),
            }
        }
    }

    fn wanted(&self, wire: &mut Wire, id: WantId, key: BlockKey) -> io::Result<()> {
        self.wants.lock().unwrap().insert(id, key);
        let grant = Grant {
            id,
            checksum: Checksum::of(&key, &self.bytes(&key)),
            bytes: self.block_bytes,
            tag: self.tag,
            priority: Priority::Normal,
            ttl_s: 0,
            tier: Tier::Host,
            window: None,
        };
        let one = |grant| Answer::Granted(vec![grant]);
        match self.manner() {
            Manner::SilentAfterWant | Manner::NeverGrants => Ok(()),
            Manner::HangsUpOnWant => wire.hang_up(),
            Manner::HalfAGrant => {
                let frame = encoded(&one(grant));
                wire.raw(&frame[..frame.len() / 2])?;
                wire.listen_for_ever()
            }
            Manner::GrantsUnasked => wire.say(&one(Grant { id: WantId(id.0 + 1000), ..grant })),
            Manner::GrantsUnaskedForEver => loop {
                wire.say(&Answer::Granted(vec![Grant { id: WantId(id.0 + 1000), ..grant }; 4000]))?;
            },
            Manner::GrantsTwice => wire.say(&Answer::Granted(vec![grant; 2])),
            Manner::GrantsNothing => wire.say(&one(Grant { bytes: 0, ..grant })),
            Manner::GrantsTooMuch => wire.say(&one(Grant { bytes: u32::MAX, ..grant })),
            Manner::GrantsHalf => wire.say(&one(Grant { bytes: self.block_bytes / 2, ..grant })),
            Manner::GrantsAnotherTag => wire.say(&one(Grant { tag: kv_block::BindingTag(1), ..grant })),
            Manner::GrantsAnotherBlock => {
                // All of it is true of another block, and the bytes will be that one's.
                let other = BlockKey([9; 16]);
                self.wants.lock().unwrap().insert(id, other);
                wire.say(&one(Grant { checksum: Checksum::of(&other, &self.bytes(&other)), ..grant }))
            }
            Manner::GrantsFromDevice => wire.say(&one(Grant { tier: Tier::Device, ..grant })),
            Manner::GrantsByWindow => {
                let window = Some(Window { path: 3, address: 4096, key: 1 });
                wire.say(&one(Grant { window, ..grant }))
            }
            Manner::MissesUnasked => {
                wire.say(&Answer::Missed(vec![(WantId(id.0 + 1000), MissReason::NeverStored)]))
            }
            Manner::WelcomesTwice => wire.say(&Answer::Welcome(Welcome {
                version: 1,
                node: self.name.clone(),
                epoch: Epoch(1),
                session: SESSION,
                credits: Credits { wants_max: 1, bytes_max: 1 },
                leaving: false,
                facts: Vec::new(),
            })),
            Manner::PongsUnasked => wire.say(&Answer::Pong(u64::MAX)),
            Manner::SaysLeavingForEver => {
                let many: Vec<u8> = (0..4096).flat_map(|_| encoded(&Answer::Leaving)).collect();
                loop {
                    wire.raw(&many)?;
                }
            }
            _ => wire.say(&one(grant)),
        }
    }

    fn data(&self, mut wire: Wire) -> io::Result<()> {
        self.joins.fetch_add(1, Ordering::Relaxed);
        match self.manner() {
            Manner::HangsUpOnJoin => return wire.hang_up(),
            Manner::RefusesJoin => {
                let refused = Refused { why: Refusal::Session, text: "what session?".into() };
                wire.say(&DataAnswer::Refused(refused))?;
                return wire.hang_up();
            }
            Manner::SilentOnJoin => return wire.listen_for_ever(),
            _ => wire.say(&DataAnswer::Joined)?,
        }
        if self.manner() == Manner::HangsUpAfterJoin {
            return wire.hang_up();
        }
        loop {
            let DataAsk::Read(reads) = wire.hear()? else { panic!("the daemon joins twice") };
            for (read, want) in reads {
                let key = self.wants.lock().unwrap().get(&want).copied();
                match key {
                    Some(key) => self.read(&mut wire, read, &key)?,
                    None => wire.say(&DataAnswer::Gone(read))?,
                }
            }
        }
    }

    fn read(&self, wire: &mut Wire, read: ReadId, key: &BlockKey) -> io::Result<()> {
        let mut bytes = self.bytes(key);
        let half = bytes.len() / 2;
        let data = DataAnswer::Data(read, self.block_bytes);
        match self.manner() {
            Manner::SilentAfterRead => return wire.listen_for_ever(),
            Manner::HangsUpOnRead => return wire.hang_up(),
            Manner::WrongBytes => bytes[half] ^= 1,
            Manner::TooShort => {
                wire.say(&DataAnswer::Data(read, self.block_bytes - 1))?;
                return wire.raw(&bytes[1..]);
            }
            Manner::TooLong => {
                wire.say(&DataAnswer::Data(read, u32::MAX))?;
                return wire.for_ever(&bytes);
            }
            Manner::AnotherRead => wire.say(&DataAnswer::Data(ReadId(read.0 + 1000), self.block_bytes))?,
            Manner::GarbageForData => return wire.for_ever(&bytes),
            Manner::SilentInBlock => {
                wire.say(&data)?;
                wire.raw(&bytes[..half])?;
                return wire.listen_for_ever();
            }
            Manner::HangsUpInBlock => {
                wire.say(&data)?;
                wire.raw(&bytes[..half])?;
                return wire.hang_up();
            }
            Manner::Trickles => {
                wire.say(&data)?;
                for byte in bytes {
                    wire.raw(&[byte])?;
                    std::thread::sleep(TRICKLE);
                }
                return Ok(());
            }
            Manner::GoesOnBehindBlock => {
                wire.say(&data)?;
                wire.raw(&bytes)?;
                return wire.for_ever(&bytes);
            }
            Manner::SaysGone => return wire.say(&DataAnswer::Gone(read)),
            _ => {}
        }
        wire.say(&data)?;
        wire.raw(&bytes)
    }

    fn bytes(&self, key: &BlockKey) -> Vec<u8> {
        let mut bytes = vec![0; self.block_bytes as usize];
        payload::fill(key, &mut bytes);
        bytes
    }
}
