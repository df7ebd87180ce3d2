//! The end that wants blocks of one peer.
//!
//! ```text
//!   Want --> queued --credits--> asked --> Granted --Take--> reading --> Landed
//!               |                  |           |                | another path, with the same slot
//!               +------------------+-----------+----------------+--> Missed, at the deadline at the latest
//! ```
//! Here stands what a reader is told and what it says; the machine is in four files:
//! ```text
//!   machine.rs   the connection: handshake, silence, strikes, deadlines; one match over every event
//!   wants.rs     a want on its way
//!   asks.rs      probes and offers
//!   report.rs    what a reader knows, and what it says about itself
//! ```

use kv_arena::Slot;
use kv_block::{BlockKey, MissReason, Record, Tier};
use kv_wire::message::{Answer, Ask, Found, Offer, PathEnd, ReadId, Taken, WantId, Window};

use crate::Micros;
use crate::link::LinkError;

mod asks;
pub(crate) mod machine;
mod report;
#[cfg(test)]
mod tests;
mod wants;

pub use report::{PathReport, PathState, PeerReport, PeerState, ReaderConfig};

/// Which path of a peer: 0 is TCP, others as in [`kv_wire::message::PathEnd`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PathId(pub u8);

impl PathId {
    /// The path that every pair of nodes has.
    pub const TCP: Self = Self(0);
}

/// Something that happened to a reader.
#[derive(Debug)]
pub enum ReaderEvent {
    /// The control connection stands; the reader says Hello.
    Connected,
    /// It does not come about, or is gone.
    Disconnected {
        /// Why, in words.
        why: String,
    },
    /// The owner said something.
    Heard(Answer),
    /// The owner said something that is no message.
    Nonsense {
        /// What.
        why: String,
    },
    /// How this side's end of a path is reached: the owner is told.
    Reach(PathEnd),
    /// A path can be used, or no longer. Each connection begins with none: until the first word about TCP, what has
    /// no other path waits for it.
    Path {
        /// Which.
        path: PathId,
        /// Whether.
        up: Result<(), String>,
    },
    /// A read has ended.
    Read {
        /// Which.
        read: ReadId,
        /// The slot, back.
        into: Slot,
        /// How.
        result: Result<(), LinkError>,
    },
    /// A block is wanted, by its deadline.
    Want {
        /// Never given twice.
        want: WantId,
        /// Whose.
        principal: u8,
        /// Name.
        key: BlockKey,
        /// When the want ends by itself.
        deadline: Micros,
        /// Whether the owner may bring it up or wait for it.
        wait: bool,
    },
    /// A granted block is to be read into this.
    Take {
        /// Which.
        want: WantId,
        /// Where; at least as long as the block.
        into: Slot,
    },
    /// It is not wanted any more.
    Leave {
        /// Which.
        want: WantId,
    },
    /// Which of these does the peer have?
    Probe {
        /// Given back.
        probe: u64,
        /// Whose.
        principal: u8,
        /// Names; at most as many as one message takes.
        keys: Vec<BlockKey>,
        /// When the probe ends by itself.
        deadline: Micros,
    },
    /// Offer these to the peer.
    Offer {
        /// What.
        offer: Offer,
        /// When it ends by itself.
        deadline: Micros,
    },
    /// Nothing; time passed.
    Tick,
}

/// Something to do.
#[derive(Debug)]
pub enum ReaderCommand {
    /// Open a control connection.
    Connect,
    /// Close it, with all data paths; no `Disconnected` follows.
    Hangup {
        /// Why, for the log.
        why: String,
    },
    /// Say this on it.
    Say(Ask),
    /// The owner took us: open the data paths. `Path` says how each comes out.
    Open {
        /// What data connections show to join.
        session: u128,
        /// Version that both speak.
        version: u16,
        /// What the owner says about its devices.
        facts: Vec<u8>,
    },
    /// How the owner's end of a path is reached; without words, it has none.
    Join(PathEnd),
    /// Read a granted block.
    Read {
        /// On this path.
        path: PathId,
        /// Given back.
        read: ReadId,
        /// Which grant.
        want: WantId,
        /// Where, for a path that needs it.
        window: Option<Window>,
        /// What is expected.
        record: Record,
        /// Where to put it.
        into: Slot,
    },
    /// End a read early; its `Read` still comes.
    Cancel {
        /// On this path.
        path: PathId,
        /// Which.
        read: ReadId,
    },
    /// The peer lets us read it: answer with `Take` or `Leave`.
    Granted {
        /// Which.
        want: WantId,
        /// What it is. Its expiry is by our own clock's time to live, see [`kv_wire::message::Grant::ttl_s`].
        record: Record,
        /// Seconds it has to live; 0: for ever.
        ttl_s: u32,
        /// Where the owner had it.
        tier: Tier,
    },
    /// The want has ended without a block.
    Missed {
        /// Which.
        want: WantId,
        /// Why.
        reason: MissReason,
    },
    /// The block is there and checked. The want has ended.
    Landed {
        /// Which.
        want: WantId,
        /// Its bytes.
        into: Slot,
        /// What it is.
        record: Record,
        /// By which path it came.
        path: PathId,
    },
    /// A probe has ended; `None` when the peer did not answer in time.
    Probed {
        /// Which.
        probe: u64,
        /// What it said.
        found: Option<Found>,
    },
    /// An offer has ended; `None` when the peer did not answer in time.
    Taken {
        /// Which.
        offer: u64,
        /// What it said.
        taken: Option<Taken>,
    },
}
