//! A worker and its own daemon on one machine: shared rings, the handshake, passed descriptors.
//!
//! ```text
//!  worker                      one sealed memfd per shard                       shard
//!  Submitter --64 B entries--> | submission ring | completion ring | staging | --> ShardRing
//!  Collector <--64 B entries-- |                                             | <-- ShardRing
//!  StagingSlot (writes)        |                                             | SharedBytes (reads)
//!            <------------------- Bell (a socket pair), only when one side sleeps ------------------->
//! ```
//!
//! [`door`] is how both meet: a `SOCK_SEQPACKET` connection, one [`door::Hello`], one [`door::Welcome`]
//! with the descriptors. The connection stays open, for descriptors of device memory that the worker hands over; its end
//! is the session's end.
//!
//! Nothing read from memory that the other side can write is trusted: indices are checked, entries are
//! copied out before they are parsed, offsets are checked before they become pointers, and a bell cannot
//! be made to block whoever rings it.
#![expect(unsafe_code, reason = "maps memory that another process writes; every block says what holds")]

mod bell;
pub mod door;
pub mod entry;
#[cfg(not(loom))]
mod memory;
#[cfg(not(loom))]
pub mod peer;
mod region;
mod ring;
#[cfg(not(loom))]
mod staging;
mod sync;

pub use bell::Bell;
pub use entry::{Completion, Malformed, Outcome, Place, Request, Submission};
#[cfg(not(loom))]
pub use memory::{ShardEnd, WorkerEnd, check_seals, create, open};
pub use region::{Layout, PAGE};
pub use ring::{Collector, ShardRing, Submitter};
#[cfg(not(loom))]
pub use staging::{ShardStaging, SharedBytes, StagingSlot, WorkerStaging};

/// What can go wrong between a worker and its daemon.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused something.
    #[error("{what} failed")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// A ring or staging size that no session may have.
    #[error("{what} is {found}, allowed is {allowed}")]
    Limit {
        /// Which number.
        what: &'static str,
        /// What was asked for.
        found: u64,
        /// What is accepted, in words.
        allowed: &'static str,
    },
    /// The memory file is not as long as its layout says.
    #[error("memory file has {found} bytes, its layout needs {wanted}")]
    Size {
        /// Length in bytes.
        found: u64,
        /// Length in bytes by the layout.
        wanted: u64,
    },
    /// The memory file could still be cut short under a reader.
    #[error("memory file lacks seals: it has {found:#x}, {wanted:#x} are wanted")]
    Unsealed {
        /// Seals of the file.
        found: u32,
        /// Seals wanted.
        wanted: u32,
    },
    /// The other side's ring index cannot be: more entries than the ring holds.
    #[error("{ring} ring index is {distance} entries ahead, the ring has {entries}")]
    Index {
        /// Which ring.
        ring: &'static str,
        /// Entries claimed.
        distance: u32,
        /// Entries there are.
        entries: u32,
    },
    /// More completions than submissions were taken.
    #[error("a completion without a submission in flight")]
    Unsolicited,
    /// No room for another submission until completions are collected.
    #[error("all {entries} ring entries are in flight")]
    Full {
        /// Entries of the ring.
        entries: u32,
    },
    /// A completion that makes no sense.
    #[error(transparent)]
    Malformed(#[from] entry::Malformed),
    /// A range that leaves the staging area.
    #[error("range {offset}+{bytes} leaves the staging area of {staging_bytes} bytes")]
    Range {
        /// Where it begins.
        offset: u64,
        /// Its length.
        bytes: u64,
        /// Size of the area.
        staging_bytes: u64,
    },
    /// A handshake message that makes no sense.
    #[error("handshake: {why}")]
    Handshake {
        /// What is wrong with it.
        why: &'static str,
    },
    /// The other side closed the connection.
    #[error("the connection is closed")]
    Closed,
}

impl Error {
    /// For `map_err`: the kernel refused `what`.
    pub(crate) fn io<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { what, source: source.into() }
    }
}
