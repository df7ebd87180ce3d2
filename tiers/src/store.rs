//! What the node expects of a durable tier, whatever the device. One that keeps nothing over a restart is empty after
//! it, and the same in all else.
//!
//! A store takes owned operations and gives them back as completions; memory under I/O belongs to the
//! operation and returns with it, success or not. Nothing blocks: [`BlockStore::submit`] queues,
//! [`BlockStore::poll`] collects. Every operation that was taken ends in exactly one completion.
//!
//! ```text
//!            submit(Write{record, Held})  ->  Written{at}             the block is durable
//!            submit(Read{at, record, Slot}) -> Read{Slot, outcome}    bytes checked against the record
//!            submit(Remove{at, key})      ->  Removed                 stays gone after a restart
//!   store:   Reclaim{segment, entries}    ->  the node answers with Move for what is worth keeping
//!            submit(Move{at, record})     ->  Moved{at}
//!            submit(Release{segment})     ->  Released                the segment's space is free again
//! ```
//! The store is a log, not an index: who owns the catalog decides what is alive. A segment is offered once,
//! when free ones are few; until it is released its blocks can be read. After a restart the store names, for
//! each key, the newest copy that was not removed. [`crate::contract`] holds every store to all of this, and
//! [`crate::memory::MemoryStore`] is the one that can fail on purpose.

use std::time::Duration;

use kv_arena::{Held, Slot};
use kv_block::code::Code;
use kv_block::{DiskLocation, Record};

/// Names an operation in flight; chosen by the submitter, given back in the completion.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct OpToken(pub u64);

/// One operation. It owns its memory.
#[derive(Debug)]
pub enum StoreOp {
    /// Append a sealed block; done when it would survive a crash.
    Write {
        /// Given back in the completion.
        token: OpToken,
        /// What it is.
        record: Record,
        /// Its bytes, held until the device is done with them.
        bytes: Held,
    },
    /// Read a block into a free slot and check it.
    Read {
        /// Given back in the completion.
        token: OpToken,
        /// Where it lies.
        at: DiskLocation,
        /// What is expected there: length and checksum are compared.
        record: Record,
        /// Where to put it; at least the block's length rounded up to 4 KiB.
        into: Slot,
    },
    /// Copy a block out of a segment that is being reclaimed to the end of the log, checking it on the way.
    Move {
        /// Given back in the completion.
        token: OpToken,
        /// Where it lies.
        at: DiskLocation,
        /// What is expected there.
        record: Record,
    },
    /// Make sure that a block does not come back after a restart: neither this copy nor an older one of the
    /// same key. What is written later under the key counts again.
    Remove {
        /// Given back in the completion.
        token: OpToken,
        /// Where it lies.
        at: DiskLocation,
        /// Its key.
        key: kv_block::BlockKey,
    },
    /// Take back a segment offered by [`StoreDone::Reclaim`]; all its blocks are gone or moved.
    Release {
        /// Given back in the completion.
        token: OpToken,
        /// Which one.
        segment: u32,
    },
}

impl StoreOp {
    /// The operation's name in flight.
    pub fn token(&self) -> OpToken {
        match self {
            Self::Write { token, .. }
            | Self::Read { token, .. }
            | Self::Move { token, .. }
            | Self::Remove { token, .. }
            | Self::Release { token, .. } => *token,
        }
    }
}

/// Why a store operation failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    /// The place holds something else, or bytes that fail the checksum.
    #[error("{key} at segment {segment} page {page} failed its check: {what}")]
    Corrupt {
        /// Which block.
        key: kv_block::BlockKey,
        /// Where.
        segment: u32,
        /// Where in the segment, in 4 KiB pages.
        page: u32,
        /// Which check.
        what: &'static str,
    },
    /// The location belongs to an earlier life of its segment.
    #[error("segment {segment} has been reused since")]
    Stale {
        /// Which segment.
        segment: u32,
    },
    /// The device failed.
    #[error("{operation} failed on segment {segment}")]
    Io {
        /// `read`, `write`, `sync`, `allocate`.
        operation: &'static str,
        /// Which segment.
        segment: u32,
        /// The operating system's error number.
        errno: i32,
    },
    /// No room; segments must be reclaimed first or the device is full.
    #[error("no free segment")]
    Full,
    /// The operation ran into the device's time limit.
    #[error("the device did not answer within {limit:?}")]
    Slow {
        /// The limit.
        limit: Duration,
    },
    /// The block is larger than a segment holds.
    #[error("a block of {bytes} bytes does not fit a segment of {segment_bytes}")]
    TooLarge {
        /// Its length.
        bytes: u32,
        /// What a segment holds.
        segment_bytes: u64,
    },
    /// What is written goes where no later life looks.
    #[error("the data directory was removed, or another one is in its place")]
    Gone,
    /// The store is closing.
    #[error("the store is closing")]
    Closed,
}

impl StoreError {
    /// The code an operator sees.
    pub fn code(&self) -> Code {
        match self {
            Self::Corrupt { .. } => Code::CorruptDisk,
            Self::Stale { .. } => Code::UnknownLease,
            Self::Io { .. } | Self::Gone => Code::DiskError,
            Self::Full => Code::DiskFull,
            Self::Slow { .. } => Code::DiskSlow,
            Self::TooLarge { .. } => Code::WrongLength,
            Self::Closed => Code::Draining,
        }
    }
}

/// One thing that a store has to say.
#[derive(Debug)]
pub enum StoreDone {
    /// A write ended.
    Written {
        /// The operation's.
        token: OpToken,
        /// The submitter's hold on the bytes.
        bytes: Held,
        /// Where the block lies, durably.
        result: Result<DiskLocation, StoreError>,
    },
    /// A read ended. The slot comes back whatever happened; its bytes are right only on success.
    Read {
        /// The operation's.
        token: OpToken,
        /// The submitter's slot.
        into: Slot,
        /// Whether the bytes are those of the record.
        result: Result<(), StoreError>,
    },
    /// A move ended.
    Moved {
        /// The operation's.
        token: OpToken,
        /// Where the block lies now.
        result: Result<DiskLocation, StoreError>,
    },
    /// A removal is durable.
    Removed {
        /// The operation's.
        token: OpToken,
        /// Whether it took.
        result: Result<(), StoreError>,
    },
    /// A segment's space is free again.
    Released {
        /// The operation's.
        token: OpToken,
        /// Whether it took.
        result: Result<(), StoreError>,
    },
    /// The store wants this segment back. The node moves what is worth it, then releases the segment.
    Reclaim {
        /// Which segment.
        segment: u32,
        /// Everything its index names, dead or alive, in log order.
        entries: Vec<(Record, DiskLocation)>,
        /// How much the store can hold now, in bytes of segments: less than it may where the file system has
        /// no room for more.
        room_bytes: u64,
    },
}

impl StoreDone {
    /// Which operation ended; `None` for what nobody asked for.
    pub fn token(&self) -> Option<OpToken> {
        match self {
            Self::Written { token, .. }
            | Self::Read { token, .. }
            | Self::Moved { token, .. }
            | Self::Removed { token, .. }
            | Self::Released { token, .. } => Some(*token),
            Self::Reclaim { .. } => None,
        }
    }
}

/// How full a store is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StoreUsage {
    /// Bytes it can hold in all: what it may, or less where the file system has no room for more.
    pub bytes_max: u64,
    /// Bytes of segments in use, dead blocks included.
    pub bytes_used: u64,
    /// Bytes of blocks written since it was opened, block data only.
    pub bytes_written: u64,
    /// Bytes of blocks read since it was opened.
    pub bytes_read: u64,
    /// Operations taken and not completed.
    pub in_flight: u32,
    /// Most operations it takes at once.
    pub in_flight_max: u32,
}

/// A durable tier.
pub trait BlockStore: Send {
    /// Takes one operation; gives it back when `in_flight_max` are under way or the store is closing.
    fn submit(&mut self, op: StoreOp) -> Result<(), StoreOp>;
    /// Sends what was submitted on its way. Cheap when there is nothing.
    fn kick(&mut self);
    /// Moves everything that has happened since into `done`. Never blocks.
    fn poll(&mut self, done: &mut Vec<StoreDone>);
    /// How full it is.
    fn usage(&self) -> StoreUsage;
}
