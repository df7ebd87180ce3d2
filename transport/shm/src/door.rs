//! How a worker meets its daemon: three messages on a `SOCK_SEQPACKET` Unix socket, and descriptors of device memory
//! later.
//!
//! ```text
//! worker                                                   daemon
//!   | -- Hello (versions, sizes wanted) -------------------> |   uid, gid, pid from the kernel
//!   | <- Welcome (session, epoch, sizes given) + 5 fds each  |   or Refused (code, words)
//!   |    shard: meta, data, hazard, ring, bell               |
//!   |                                                        |
//!   | -- Offer (number) + 1 fd, Withdraw (number) ---------> |   since version 3, whenever it likes; no answer:
//!   |                                                        |   who names the number hears whether it is there
//!   | ........ the connection stays open: its end is the session's end ........ |
//!
//! every message  0 "kvdshm" | 6 kind u8 | 7 zero
//! Hello          8 version_min u16 | 10 version_max u16 | 12 flags u16 (1: wants to write in place)
//!               14 numa_node u16 (65535: none) | 16 hazards u32 | 20 ring_entries u32 | 24 staging_bytes u64
//!               32 length u16 | then `length` bytes of UTF-8: the name that operators see
//! Welcome        8 version u16 | 10 shards u16 | 12 flags u16 (1: may write in place) | 14 zero
//!               16 session u64 | 24 epoch u64 | then per shard, 24 bytes:
//!                0 shard u16 | 2 numa_node u16 | 4 hazards u32 | 8 ring_entries u32 | 12 zero
//!               16 staging_bytes u64
//! Refused        8 code u16 | 10 length u16 | 12 retry_after_ms u32 | then `length` bytes of UTF-8
//! Offer          8 number u64
//! Withdraw       8 number u64
//! ```
//! All integers are little-endian. A message of another length than its kind says is refused.
//!
//! An offered descriptor stays with the daemon under its number, which its session alone can name, until it is
//! withdrawn or the session ends; what was made of it meanwhile stays. A number that is in use is not offered again.
//! Versions 2 and 3 differ in nothing else, so either side may be the older one: a worker offers nothing to a daemon
//! that welcomed it in version 2.

use kv_block::code::Code;
use kv_block::{Epoch, SessionId, ShardId};

use crate::{Error, Layout};

#[cfg(not(loom))]
pub use socket::{Connection, Listener};

/// Newest version of the handshake and the rings that this crate speaks.
pub const VERSION: u16 = 3;
/// Oldest version that this crate speaks.
pub const VERSION_MIN: u16 = 2;
/// The version from which on a worker may hand over descriptors.
pub const VERSION_OFFERS: u16 = 3;
/// Most descriptors of one session that are offered and not withdrawn.
pub const OFFERS_MAX: usize = 4096;
/// Descriptors per shard in a [`Welcome`]: meta, data, hazard, ring, bell.
pub const FDS_PER_SHARD: usize = 5;
/// Most shards of one daemon: all their descriptors fit one message (the kernel's limit is 253).
pub const SHARDS_MAX: usize = 32;
/// Most hazard slots of one worker and shard.
pub const HAZARDS_MAX: u32 = 1 << 16;
/// Longest name of a session.
pub const NAME_BYTES_MAX: usize = 128;

const MAGIC: &[u8; 6] = b"kvdshm";
const MESSAGE_BYTES_MAX: usize = 4096;
const WORDS_BYTES_MAX: usize = 1024;
const NO_NODE: u16 = u16::MAX;
const WRITES: u16 = 1;

/// What a worker wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version it speaks.
    pub version_min: u16,
    /// Newest version it speaks.
    pub version_max: u16,
    /// NUMA node it runs on, if it knows.
    pub numa_node: Option<u16>,
    /// Blocks of one shard it wants to read at the same time.
    pub hazards: u32,
    /// Ring entries it wants per shard.
    pub ring_entries: u32,
    /// Staging bytes it wants per shard.
    pub staging_bytes: u64,
    /// Whether it wants to fill arena slots in place.
    pub wants_write: bool,
    /// What operators see. Cut to [`NAME_BYTES_MAX`] on the way.
    pub name: String,
}

/// What it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Version both speak from here on.
    pub version: u16,
    /// Its session. Names it over gRPC too.
    pub session: SessionId,
    /// Epoch of the daemon.
    pub epoch: Epoch,
    /// Whether it may fill arena slots in place.
    pub may_write: bool,
    /// Every shard of the node.
    pub shards: Vec<ShardWelcome>,
}

/// One shard of a [`Welcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardWelcome {
    /// Which shard.
    pub shard: ShardId,
    /// NUMA node of its memory, where there is one.
    pub numa_node: Option<u16>,
    /// Hazard slots given.
    pub hazards: u32,
    /// Sizes of the ring memory given.
    pub layout: Layout,
}

/// Why it gets nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Stable code.
    pub code: Code,
    /// When to try again, in milliseconds; 0 without a hint.
    pub retry_after_ms: u32,
    /// What is wrong, with the values that matter. Cut to 1024 bytes on the way.
    pub message: String,
}

/// One message on the worker socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Worker to daemon.
    Hello(Hello),
    /// Daemon to worker, with the descriptors.
    Welcome(Welcome),
    /// Daemon to worker, without.
    Refused(Refused),
    /// Worker to daemon, with a descriptor: what it is called from here on.
    Offer {
        /// Its number, of the worker's choice.
        number: u64,
    },
    /// Worker to daemon: the descriptor of this number may be closed.
    Withdraw {
        /// Its number.
        number: u64,
    },
}

impl Hello {
    /// The version both sides speak, the newest first.
    pub fn common_version(&self) -> Option<u16> {
        let newest = self.version_max.min(VERSION);
        (newest >= self.version_min.max(VERSION_MIN)).then_some(newest)
    }
}

fn node_bits(node: Option<u16>) -> u16 {
    node.unwrap_or(NO_NODE)
}

fn flag(on: bool) -> u16 {
    if on { WRITES } else { 0 }
}

impl Message {
    /// The bytes that say this.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        match self {
            Self::Hello(hello) => {
                bytes.extend([1, 0]);
                for number in [hello.version_min, hello.version_max, flag(hello.wants_write)] {
                    bytes.extend(number.to_le_bytes());
                }
                bytes.extend(node_bits(hello.numa_node).to_le_bytes());
                bytes.extend(hello.hazards.to_le_bytes());
                bytes.extend(hello.ring_entries.to_le_bytes());
                bytes.extend(hello.staging_bytes.to_le_bytes());
                let end = hello.name.floor_char_boundary(NAME_BYTES_MAX);
                bytes.extend((end as u16).to_le_bytes());
                bytes.extend(&hello.name.as_bytes()[..end]);
            }
            Self::Welcome(welcome) => {
                bytes.extend([2, 0]);
                for number in [welcome.version, welcome.shards.len() as u16, flag(welcome.may_write), 0] {
                    bytes.extend(number.to_le_bytes());
                }
                bytes.extend(welcome.session.0.to_le_bytes());
                bytes.extend(welcome.epoch.0.to_le_bytes());
                for shard in &welcome.shards {
                    bytes.extend(shard.shard.0.to_le_bytes());
                    bytes.extend(node_bits(shard.numa_node).to_le_bytes());
                    bytes.extend(shard.hazards.to_le_bytes());
                    bytes.extend(shard.layout.entries().to_le_bytes());
                    bytes.extend([0; 4]);
                    bytes.extend(shard.layout.staging_bytes().to_le_bytes());
                }
            }
            Self::Refused(refused) => {
                bytes.extend([3, 0]);
                let end = refused.message.floor_char_boundary(WORDS_BYTES_MAX);
                bytes.extend((refused.code as u16).to_le_bytes());
                bytes.extend((end as u16).to_le_bytes());
                bytes.extend(refused.retry_after_ms.to_le_bytes());
                bytes.extend(&refused.message.as_bytes()[..end]);
            }
            Self::Offer { number } => {
                bytes.extend([4, 0]);
                bytes.extend(number.to_le_bytes());
            }
            Self::Withdraw { number } => {
                bytes.extend([5, 0]);
                bytes.extend(number.to_le_bytes());
            }
        }
        bytes
    }

    /// What `bytes` say; refused unless every byte is accounted for.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let mut rest = Reader(bytes);
        if rest.take::<6>()? != *MAGIC {
            return Err(refuse("not a kvd handshake"));
        }
        let [kind, zero] = rest.take()?;
        if zero != 0 {
            return Err(refuse("a reserved field is not zero"));
        }
        let message = match kind {
            1 => Self::Hello(Self::decode_hello(&mut rest)?),
            2 => Self::Welcome(Self::decode_welcome(&mut rest)?),
            3 => Self::Refused(Self::decode_refused(&mut rest)?),
            4 => Self::Offer { number: rest.u64()? },
            5 => Self::Withdraw { number: rest.u64()? },
            _ => return Err(refuse("unknown message")),
        };
        if rest.0.is_empty() { Ok(message) } else { Err(refuse("the message is too long")) }
    }

    /// Descriptors that come with it.
    #[cfg(not(loom))]
    fn descriptors(&self) -> usize {
        match self {
            Self::Welcome(welcome) => welcome.shards.len() * FDS_PER_SHARD,
            Self::Offer { .. } => 1,
            Self::Hello(_) | Self::Refused(_) | Self::Withdraw { .. } => 0,
        }
    }

    fn decode_hello(rest: &mut Reader<'_>) -> Result<Hello, Error> {
        let (version_min, version_max, flags) = (rest.u16()?, rest.u16()?, rest.u16()?);
        let hello = Hello {
            version_min,
            version_max,
            wants_write: writes(flags)?,
            numa_node: rest.node()?,
            hazards: rest.u32()?,
            ring_entries: rest.u32()?,
            staging_bytes: rest.u64()?,
            name: {
                let length = usize::from(rest.u16()?);
                rest.words(length, NAME_BYTES_MAX)?
            },
        };
        if version_min > version_max {
            return Err(refuse("the version range is empty"));
        }
        Ok(hello)
    }

    fn decode_welcome(rest: &mut Reader<'_>) -> Result<Welcome, Error> {
        let (version, shards, flags) = (rest.u16()?, usize::from(rest.u16()?), rest.u16()?);
        rest.zero(2)?;
        if shards == 0 || shards > SHARDS_MAX {
            return Err(refuse("no shard, or too many"));
        }
        let (session, epoch) = (SessionId(rest.u64()?), Epoch(rest.u64()?));
        let shards = (0..shards).map(|_| {
            let (shard, numa_node, hazards) = (ShardId(rest.u16()?), rest.node()?, rest.u32()?);
            let entries = rest.u32()?;
            rest.zero(4)?;
            let layout = Layout::new(entries, rest.u64()?)?;
            if hazards > HAZARDS_MAX {
                return Err(refuse("too many hazard slots"));
            }
            Ok(ShardWelcome { shard, numa_node, hazards, layout })
        });
        let shards = shards.collect::<Result<_, _>>()?;
        Ok(Welcome { version, session, epoch, may_write: writes(flags)?, shards })
    }

    fn decode_refused(rest: &mut Reader<'_>) -> Result<Refused, Error> {
        let number = rest.u16()?;
        let (length, retry_after_ms) = (usize::from(rest.u16()?), rest.u32()?);
        let message = rest.words(length, WORDS_BYTES_MAX)?;
        // A newer daemon may know codes that we do not: its words still say what is wrong.
        let code = Code::from_number(number).unwrap_or(Code::Version);
        Ok(Refused { code, retry_after_ms, message })
    }
}

fn refuse(why: &'static str) -> Error {
    Error::Handshake { why }
}

fn writes(flags: u16) -> Result<bool, Error> {
    if flags & !WRITES == 0 { Ok(flags == WRITES) } else { Err(refuse("unknown flags")) }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn split(&mut self, bytes: usize) -> Result<&'a [u8], Error> {
        let (head, rest) = self.0.split_at_checked(bytes).ok_or(refuse("the message is too short"))?;
        self.0 = rest;
        Ok(head)
    }

    fn words(&mut self, bytes: usize, bytes_max: usize) -> Result<String, Error> {
        if bytes > bytes_max {
            return Err(refuse("the message is too long"));
        }
        let words = std::str::from_utf8(self.split(bytes)?).map_err(|_| refuse("words are not UTF-8"))?;
        Ok(words.to_owned())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        self.split(N).map(|bytes| bytes.try_into().expect("split gives N bytes"))
    }

    fn u16(&mut self) -> Result<u16, Error> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Error> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.take().map(u64::from_le_bytes)
    }

    fn node(&mut self) -> Result<Option<u16>, Error> {
        self.u16().map(|node| (node != NO_NODE).then_some(node))
    }

    fn zero(&mut self, bytes: usize) -> Result<(), Error> {
        let zero = self.split(bytes)?.iter().all(|byte| *byte == 0);
        if zero { Ok(()) } else { Err(refuse("a reserved field is not zero")) }
    }
}

#[cfg(not(loom))]
mod socket {
    use std::io::{IoSlice, IoSliceMut};
    use std::mem::MaybeUninit;
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::path::Path;
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::fs::Mode;
    use rustix::io::Errno;
    use rustix::net::{
        self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
        SocketType, sockopt,
    };

    use super::{Error, FDS_PER_SHARD, MESSAGE_BYTES_MAX, Message, SHARDS_MAX, refuse};

    const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);
    const FDS_MAX: usize = FDS_PER_SHARD * SHARDS_MAX;

    fn socket(flags: SocketFlags) -> Result<OwnedFd, Error> {
        net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(Error::io("making a worker socket"))
    }

    /// The daemon's door.
    #[derive(Debug)]
    pub struct Listener(OwnedFd);

    impl Listener {
        /// Listens at `path`, which must not exist, with the permission bits `mode`.
        pub fn bind(path: &Path, mode: u32) -> Result<Self, Error> {
            let socket = socket(FLAGS)?;
            let address = SocketAddrUnix::new(path).map_err(Error::io("naming the worker socket"))?;
            net::bind(&socket, &address).map_err(Error::io("binding the worker socket"))?;
            rustix::fs::chmod(path, Mode::from_raw_mode(mode))
                .map_err(Error::io("setting the mode of the worker socket"))?;
            net::listen(&socket, 128).map_err(Error::io("listening on the worker socket"))?;
            Ok(Self(socket))
        }

        /// The next worker; `None` when nobody waits. Wait for the descriptor to become readable.
        pub fn accept(&self) -> Result<Option<Connection>, Error> {
            match net::accept_with(&self.0, FLAGS) {
                Ok(socket) => Ok(Some(Connection(socket))),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
                Err(errno) => Err(Error::io("accepting a worker")(errno)),
            }
        }
    }

    impl From<OwnedFd> for Listener {
        /// A socket that listens already, `SOCK_SEQPACKET` and not blocking.
        fn from(socket: OwnedFd) -> Self {
            Self(socket)
        }
    }

    impl AsFd for Listener {
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    /// One worker and its daemon. Not blocking; the waits here poll.
    #[derive(Debug)]
    pub struct Connection(OwnedFd);

    impl Connection {
        /// Connects to the daemon at `path`. One whose backlog is full is waited for, up to `timeout`: many
        /// workers that start at the same moment all get in.
        pub fn connect(path: &Path, timeout: Duration) -> Result<Self, Error> {
            let connecting = Error::io("connecting to the worker socket");
            let address = SocketAddrUnix::new(path).map_err(Error::io("naming the worker socket"))?;
            // No poll tells when a backlog has room. A connect that blocks waits for it in the kernel, as
            // long as this socket's sends may take; nought would mean for ever.
            let socket = socket(SocketFlags::CLOEXEC)?;
            let limit = timeout.max(Duration::from_millis(1));
            let connected = sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(limit))
                .and_then(|()| rustix::io::retry_on_intr(|| net::connect(&socket, &address)))
                .and_then(|()| rustix::io::ioctl_fionbio(&socket, true));
            connected.map_err(connecting)?;
            Ok(Self(socket))
        }

        /// Two ends without a path.
        pub fn pair() -> Result<(Self, Self), Error> {
            let (left, right) = net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, FLAGS, None)
                .map_err(Error::io("making a pair of sockets"))?;
            Ok((Self(left), Self(right)))
        }

        /// Sends one message with `fds`. Never blocks: the messages of a handshake always find room.
        pub fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
            self.try_send(message, fds).and_then(|sent| match sent {
                true => Ok(()),
                false => Err(Error::io("sending a handshake")(Errno::AGAIN)),
            })
        }

        /// [`Connection::send`] for messages of which there may be many: false when there is no room until the other
        /// side has taken some.
        pub fn try_send(&self, message: &Message, fds: &[BorrowedFd<'_>]) -> Result<bool, Error> {
            self.send_bytes(&message.encode(), fds)
        }

        pub(super) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<bool, Error> {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(refuse("too many descriptors"));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(_) => Ok(true),
                // The last: descriptors that nobody has received yet count against the user's limit.
                Err(Errno::AGAIN | Errno::INTR | Errno::TOOMANYREFS) => Ok(false),
                Err(Errno::PIPE | Errno::CONNRESET) => Err(Error::Closed),
                Err(errno) => Err(Error::io("sending a handshake")(errno)),
            }
        }

        /// The message that lies there, with its descriptors; `None` when there is none yet. `Closed` when
        /// the other side is gone.
        pub fn try_recv(&self) -> Result<Option<(Message, Vec<OwnedFd>)>, Error> {
            let mut bytes = [0; MESSAGE_BYTES_MAX];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = net::recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags);
            // Whatever came is owned from here on and closed when it is not wanted.
            let fds: Vec<OwnedFd> = control
                .drain()
                .filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .collect();
            let received = match received {
                Ok(received) => received,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
                Err(Errno::CONNRESET) => return Err(Error::Closed),
                Err(errno) => return Err(Error::io("receiving a handshake")(errno)),
            };
            if received.bytes == 0 {
                return Err(Error::Closed);
            }
            if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
                return Err(refuse("the message or its descriptors were cut short"));
            }
            let message = Message::decode(&bytes[..received.bytes])?;
            if fds.len() != message.descriptors() {
                return Err(refuse("the message has another number of descriptors than it should"));
            }
            Ok(Some((message, fds)))
        }

        /// Ends the connection in both directions; the descriptor stays. Both sides see it closed.
        pub fn shut(&self) {
            // All that can go wrong is that it has ended already.
            let _ = net::shutdown(&self.0, Shutdown::Both);
        }

        /// [`Connection::try_recv`], waiting up to `timeout`.
        pub fn recv(&self, timeout: Duration) -> Result<Option<(Message, Vec<OwnedFd>)>, Error> {
            let limit = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit)) {
                Ok(0) => Ok(None),
                Ok(_) | Err(Errno::INTR) => self.try_recv(),
                Err(errno) => Err(Error::io("waiting for a handshake")(errno)),
            }
        }
    }

    impl AsFd for Connection {
        /// Readable when a message lies there or the other side is gone.
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::{AsFd, OwnedFd};
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn hello() -> Hello {
        Hello {
            version_min: 1,
            version_max: 3,
            numa_node: Some(1),
            hazards: 64,
            ring_entries: 256,
            staging_bytes: 1 << 20,
            wants_write: true,
            name: "rank 0".into(),
        }
    }

    fn welcome(shards: u16) -> Welcome {
        let shard = |shard| ShardWelcome {
            shard: ShardId(shard),
            numa_node: (shard % 2 == 0).then_some(shard),
            hazards: 64,
            layout: Layout::new(256, 1 << 20).unwrap(),
        };
        Welcome {
            version: 1,
            session: SessionId(7),
            epoch: Epoch(9),
            may_write: false,
            shards: (0..shards).map(shard).collect(),
        }
    }

    fn refused(message: &str) -> Refused {
        Refused { code: Code::Denied, retry_after_ms: 5, message: message.to_owned() }
    }

    fn messages() -> Vec<Message> {
        vec![
            Message::Hello(hello()),
            Message::Hello(Hello { numa_node: None, wants_write: false, name: String::new(), ..hello() }),
            Message::Welcome(welcome(1)),
            Message::Welcome(Welcome { may_write: true, ..welcome(SHARDS_MAX as u16) }),
            Message::Refused(refused("uid 7 may not")),
            Message::Refused(refused("")),
            Message::Offer { number: u64::MAX },
            Message::Withdraw { number: 7 },
        ]
    }

    #[test]
    fn messages_are_written_and_read_back() {
        for message in messages() {
            assert_eq!(Message::decode(&message.encode()).unwrap(), message);
        }
    }

    #[test]
    fn messages_of_every_other_length_are_refused() {
        for message in messages() {
            let whole = message.encode();
            for end in 0..whole.len() {
                assert!(Message::decode(&whole[..end]).is_err(), "{message:?} cut to {end} bytes");
            }
            assert!(Message::decode(&[&whole[..], &[0]].concat()).is_err(), "{message:?} and a byte");
        }
    }

    #[test]
    fn long_words_are_cut_at_a_character() {
        let words = "é".repeat(600);
        let Message::Refused(read) = Message::decode(&Message::Refused(refused(&words)).encode()).unwrap()
        else {
            panic!();
        };
        assert_eq!(read.message, "é".repeat(512));
        let named = Hello { name: format!("{}é", "n".repeat(127)), ..hello() };
        let Message::Hello(read) = Message::decode(&Message::Hello(named).encode()).unwrap() else {
            panic!()
        };
        assert_eq!(read.name, "n".repeat(127));
    }

    #[test]
    fn the_newest_common_version_is_spoken() {
        let speaks = |min, max| Hello { version_min: min, version_max: max, ..hello() }.common_version();
        assert_eq!((speaks(2, 2), speaks(2, 3), speaks(0, 2)), (Some(2), Some(3), Some(2)));
        assert_eq!((speaks(3, 9), speaks(4, 9), speaks(0, 1)), (Some(3), None, None));
    }

    proptest! {
        #[test]
        fn a_changed_byte_never_panics_and_never_hides(
            which in 0..8usize, at: prop::sample::Index, byte: u8
        ) {
            let mut bytes = messages()[which].encode();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            if let Ok(read) = Message::decode(&bytes) {
                // An unknown code is read as another one on purpose.
                prop_assert!(read.encode() == bytes || matches!(read, Message::Refused(_)));
            }
        }

        #[test]
        fn garbage_never_panics(bytes: Vec<u8>) {
            let _ = Message::decode(&bytes);
            let _ = Message::decode(&[&MAGIC[..], &bytes].concat());
        }
    }

    #[test]
    fn descriptors_arrive_with_their_message() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("worker.sock");
        let listener = Listener::bind(&path, 0o600).unwrap();
        assert!(listener.accept().unwrap().is_none());
        let serving = std::thread::spawn(move || {
            let worker = loop {
                if let Some(worker) = listener.accept().unwrap() {
                    break worker;
                }
                std::thread::yield_now();
            };
            let (message, fds) = worker.recv(LONG).unwrap().unwrap();
            assert!(message == Message::Hello(hello()) && fds.is_empty());
            let files: Vec<File> = (0..2 * FDS_PER_SHARD)
                .map(|number| {
                    let mut file = tempfile::tempfile().unwrap();
                    write!(file, "{number}").unwrap();
                    file
                })
                .collect();
            let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
            worker.send(&Message::Welcome(welcome(2)), &fds).unwrap();
            assert!(matches!(worker.recv(LONG), Err(Error::Closed)), "the worker's end is seen");
        });
        let daemon = Connection::connect(&path, Duration::from_secs(1)).unwrap();
        daemon.send(&Message::Hello(hello()), &[]).unwrap();
        let (message, fds) = daemon.recv(LONG).unwrap().unwrap();
        assert_eq!(message, Message::Welcome(welcome(2)));
        for (number, fd) in fds.into_iter().enumerate() {
            let flags = rustix::io::fcntl_getfd(&fd).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
            let (mut file, mut text) = (File::from(fd), String::new());
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, number.to_string());
        }
        drop(daemon);
        serving.join().unwrap();
    }

    #[test]
    fn a_full_backlog_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("worker.sock");
        let listener = Listener::bind(&path, 0o600).unwrap();
        let mut crowd = Vec::new();
        while let Ok(one) = Connection::connect(&path, Duration::from_millis(1)) {
            crowd.push(one);
            assert!(crowd.len() < 10_000, "a backlog has an end");
        }
        let late = std::thread::spawn(move || Connection::connect(&path, LONG).map(drop));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!late.is_finished(), "it waits");
        let _first = listener.accept().unwrap().expect("one of the crowd");
        late.join().unwrap().unwrap();
    }

    #[test]
    fn the_largest_welcome_fits_one_message() {
        let (daemon, worker) = Connection::pair().unwrap();
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        let fds = vec![file.as_fd(); SHARDS_MAX * FDS_PER_SHARD];
        daemon.send(&Message::Welcome(welcome(SHARDS_MAX as u16)), &fds).unwrap();
        let (message, received) = worker.recv(LONG).unwrap().unwrap();
        assert_eq!(message, Message::Welcome(welcome(SHARDS_MAX as u16)));
        assert_eq!(received.len(), fds.len());
    }

    #[test]
    fn descriptors_nobody_asked_for_are_refused_and_closed() {
        let (daemon, worker) = Connection::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        worker.send(&Message::Hello(hello()), &[writer.as_fd()]).unwrap();
        assert!(matches!(daemon.recv(LONG), Err(Error::Handshake { .. })));
        drop(writer);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "the passed descriptor was closed");

        let (daemon, worker) = Connection::pair().unwrap();
        daemon.send(&Message::Welcome(welcome(1)), &[]).unwrap();
        assert!(matches!(worker.recv(LONG), Err(Error::Handshake { .. })), "too few");

        let (daemon, worker) = Connection::pair().unwrap();
        let (reader, _writer) = std::io::pipe().unwrap();
        for fds in [&[][..], &[reader.as_fd(), reader.as_fd()]] {
            worker.send(&Message::Offer { number: 7 }, fds).unwrap();
            assert!(matches!(daemon.recv(LONG), Err(Error::Handshake { .. })), "an offer is of one");
        }
        worker.send(&Message::Withdraw { number: 7 }, &[reader.as_fd()]).unwrap();
        assert!(matches!(daemon.recv(LONG), Err(Error::Handshake { .. })), "a withdrawal is of none");
    }

    #[test]
    fn offers_wait_for_room_and_arrive_in_order() {
        let (daemon, worker) = Connection::pair().unwrap();
        let file: OwnedFd = tempfile::tempfile().unwrap().into();
        let offer = |number| worker.try_send(&Message::Offer { number }, &[file.as_fd()]).unwrap();
        let sent = (0..100_000).take_while(|number| offer(*number)).count() as u64;
        assert!((1..100_000).contains(&sent), "a socket holds so many and no more: {sent}");
        for wanted in 0..sent {
            let (message, fds) = daemon.try_recv().unwrap().unwrap();
            assert_eq!((message, fds.len()), (Message::Offer { number: wanted }, 1));
        }
        assert!(daemon.try_recv().unwrap().is_none() && offer(sent), "there is room again");
    }

    #[test]
    fn a_connection_that_is_shut_is_closed_to_both() {
        let (daemon, worker) = Connection::pair().unwrap();
        daemon.shut();
        assert!(matches!(worker.recv(LONG), Err(Error::Closed)));
        assert!(matches!(daemon.recv(LONG), Err(Error::Closed)));
        assert!(matches!(worker.send(&Message::Withdraw { number: 1 }, &[]), Err(Error::Closed)));
    }

    #[test]
    fn short_long_and_garbage_handshakes_are_refused() {
        let whole = Message::Hello(hello()).encode();
        let long = vec![0; MESSAGE_BYTES_MAX + 1];
        for bytes in [&whole[..3], &whole[..whole.len() - 1], &long, b"GET / HTTP/1.1\r\n\r\n"] {
            let (daemon, worker) = Connection::pair().unwrap();
            worker.send_bytes(bytes, &[]).unwrap();
            assert!(matches!(daemon.recv(LONG), Err(Error::Handshake { .. })));
        }
        let (daemon, _worker) = Connection::pair().unwrap();
        assert!(daemon.recv(Duration::from_millis(1)).unwrap().is_none(), "nobody waits for ever");
    }
}
