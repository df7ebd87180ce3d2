//! The messages between two nodes.
//!
//! A node that wants blocks is the **reader**; it dials. The node that has them is the **owner**; it answers.
//! Roles are fixed for the life of a connection: to serve each other, two nodes dial each other.
//!
//! ```text
//!   reader                         control connection                            owner
//!     Hello ------------------------------------------------------------------->   versions, who, how much
//!     <------------------------------------------------------------------ Welcome   version, credits, session
//!     Want (keys, how long to wait) --------------------------------------------->   finds, waits, holds
//!     <------------------------------------------------- Granted | Missed (each)    record, and a window on RDMA
//!                                  data connection, or an RDMA read
//!     Read (want) --------------------------------------------------------------->   still granted?
//!     <---------------------------------------------------- Data | Gone (each)      bytes, straight from the arena
//!     Done (wants) -------------------------------------------------------------->   lets go, at once
//! ```
//! A want is numbered by the reader, and its number is the name of the lease that it becomes. Everything the
//! owner holds for a reader ends with the control connection, and each lease with its own time limit.

use kv_block::{BindingTag, BlockKey, Checksum, Epoch, MissReason, Priority, Tier};

/// A want of a reader, and the lease that it becomes: a number that the reader never gives twice on one
/// connection.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct WantId(pub u64);

/// One read of granted bytes, numbered by the reader. Several may be about one grant, after another path failed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ReadId(pub u64);

/// The first words on a control connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Oldest and newest version of the protocol that the reader speaks.
    pub versions: (u16, u16),
    /// Name of the reader's node.
    pub node: String,
    /// The life of the reader's daemon.
    pub epoch: Epoch,
    /// Names of the principals whose blocks it will ask for; [`Want::principal`] counts through them.
    pub principals: Vec<String>,
    /// What the reader knows about its devices, for choosing paths; opaque here. Empty: nothing.
    pub facts: Vec<u8>,
}

/// The owner takes the connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Welcome {
    /// Version that both speak from here on.
    pub version: u16,
    /// Name of the owner's node.
    pub node: String,
    /// The life of the owner's daemon.
    pub epoch: Epoch,
    /// What data connections must show to join. Random; never logged.
    pub session: u128,
    /// How much may be wanted at one moment.
    pub credits: Credits,
    /// The owner takes no new readers for long: it is about to leave.
    pub leaving: bool,
    /// What the owner knows about its devices, as in [`Hello::facts`].
    pub facts: Vec<u8>,
}

/// What a reader may have outstanding: wanted and not done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Credits {
    /// Wants, whether granted or not.
    pub wants_max: u32,
    /// Bytes of grants.
    pub bytes_max: u64,
}

/// The owner does not take a connection, and ends it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// Why.
    pub why: Refusal,
    /// In words, for the reader's operator.
    pub text: String,
}

/// Why a connection was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Refusal {
    /// No version that both speak.
    Version = 1,
    /// The owner does not know this node, or its certificate does not carry the name.
    Unknown = 2,
    /// As many readers as it serves.
    Full = 3,
    /// It is leaving.
    Leaving = 4,
    /// A data connection that belongs to no session.
    Session = 5,
}

/// What the reader says on a control connection.
#[derive(Clone, PartialEq, Debug)]
pub enum Ask {
    /// First of all.
    Hello(Hello),
    /// It wants these blocks.
    Want(Vec<Want>),
    /// It does not want these (any more): an answer on its way is let go by itself.
    Done(Vec<WantId>),
    /// Which of these are there, without a lease. For finding a peer.
    Probe(Probe),
    /// It leaves, and offers blocks that the owner may fetch from it.
    Offer(Offer),
    /// How its end of a path to the owner's memory is reached.
    Path(PathEnd),
    /// Answer this.
    Ping(u64),
}

/// A block that is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Want {
    /// Number.
    pub id: WantId,
    /// Whose, counted through [`Hello::principals`].
    pub principal: u8,
    /// How long the owner may take to bring it up or wait for it, in milliseconds; 0: only if it is in memory now. It
    /// answers by then, one way or the other: wants that run out without an answer are held against it.
    pub wait_ms: u32,
    /// Name.
    pub key: BlockKey,
}

/// Which of these blocks are there?
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Probe {
    /// Given back in the answer.
    pub id: u64,
    /// Whose.
    pub principal: u8,
    /// Names.
    pub keys: Vec<BlockKey>,
}

/// Blocks that the reader would rather not take along when it leaves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// Given back in the answer.
    pub id: u64,
    /// Whose.
    pub principal: u8,
    /// What the blocks mean: canonical record of scope and slice, and block length in bytes; opaque here.
    pub binding: Vec<u8>,
    /// Names, the most valuable first.
    pub keys: Vec<BlockKey>,
}

/// One end of a path other than TCP, as its device describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PathEnd {
    /// Which path, counted from 1; 0 is TCP, which needs no description.
    pub path: u8,
    /// Opaque here; empty: this side has no such path.
    pub words: Vec<u8>,
}

/// What the owner says on a control connection.
#[derive(Clone, PartialEq, Debug)]
pub enum Answer {
    /// It takes the connection.
    Welcome(Welcome),
    /// It does not.
    Refused(Refused),
    /// These may be read now.
    Granted(Vec<Grant>),
    /// These cannot be had.
    Missed(Vec<(WantId, MissReason)>),
    /// What there is of a probe's keys, in order.
    Found(Found),
    /// What became of an offer.
    Taken(Taken),
    /// How its end of a path is reached.
    Path(PathEnd),
    /// Answer to a ping.
    Pong(u64),
    /// From now on so much may be outstanding.
    Credits(Credits),
    /// It leaves soon: ask elsewhere first.
    Leaving,
    /// It stays after all.
    Staying,
}

/// A block that may be read until it is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grant {
    /// Which want.
    pub id: WantId,
    /// Checksum of bytes and name.
    pub checksum: Checksum,
    /// Length in bytes.
    pub bytes: u32,
    /// Scope, slice and block length it was stored under.
    pub tag: BindingTag,
    /// Retention class.
    pub priority: Priority,
    /// Seconds until it expires; 0 never. No clock of one node is compared with another's.
    pub ttl_s: u32,
    /// Where the owner had it.
    pub tier: Tier,
    /// Where it can be read without the owner's help.
    pub window: Option<Window>,
}

/// A piece of the owner's memory that a device lets this reader read, and nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Window {
    /// By which path.
    pub path: u8,
    /// Where it begins, in the device's terms.
    pub address: u64,
    /// The device's key.
    pub key: u32,
}

/// What there is of a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sight {
    /// Nothing.
    Absent,
    /// It is announced.
    Pending,
    /// It can be read, from this tier.
    In(Tier),
}

impl Sight {
    /// Whether the block is sooner had where this was seen than where the other was.
    pub fn is_nearer(self, other: Self) -> bool {
        match (self, other) {
            (Self::In(this), Self::In(other)) => this < other,
            (Self::In(_), _) => true,
            (Self::Pending, Self::Absent) => true,
            _ => false,
        }
    }
}

/// Answer to a probe.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// Which probe.
    pub id: u64,
    /// One for each key, in order.
    pub sights: Vec<Sight>,
}

/// Answer to an offer, when everything in it has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    /// Which offer.
    pub id: u64,
    /// Blocks that the owner has now.
    pub taken: u32,
    /// Blocks that it did not want, or did not get.
    pub left: u32,
}

/// What the reader says on a data connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DataAsk {
    /// First of all: it belongs to this session ([`Welcome::session`]).
    Join(u128),
    /// Send these, in any order.
    Read(Vec<(ReadId, WantId)>),
}

/// What the owner says on a data connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DataAnswer {
    /// It may read.
    Joined,
    /// It may not; the connection ends.
    Refused(Refused),
    /// So many bytes of a block follow, raw. The block's own checksum covers them.
    Data(ReadId, u32),
    /// The grant is over.
    Gone(ReadId),
}
