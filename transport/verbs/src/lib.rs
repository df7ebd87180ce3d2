//! The RDMA path: blocks read from a peer's memory by the device alone.
//!
//! ```text
//!  probe    what RDMA there is, what would be used, and why not the rest
//!  device   an open device: registered arenas, threads      words    what two ends must know of each other
//!  link     Endpoint -> VerbsLink, the two ends of a path
//!  flow     what a queue pair is to do and what became of it (a state machine, without a device)
//!  engine   the threads: one posts and polls, one does what takes the kernel long, some compare checksums
//!  memory   arenas, registered piece by piece               handles  what libibverbs gives out, closed in order
//!  trial    whether a device's keys hold                    outbox   completions on their way to a link
//!  sys      libibverbs itself, found at run time
//! ```
//! The way of a block: the owner binds a memory window over exactly its bytes, for one queue pair and for reading;
//! the reader's device reads through it into a slot of its own arena, and the bytes are compared with the record. The
//! owner's processor does nothing meanwhile. A window that is invalidated is refused by the owner's device, which
//! ends the queue pair: a reader that reads what it may not loses the path.

#![expect(unsafe_code, reason = "a device reads and writes memory by address, and its library is C")]

pub mod device;
pub mod link;
pub mod probe;
pub mod words;

mod engine;
mod flow;
mod handles;
#[cfg(test)]
mod keys;
mod memory;
mod outbox;
mod sys;
mod trial;

pub use device::{Device, DeviceConfig, DmabufRegion};
pub use link::{Endpoint, VerbsLink};
pub use probe::{Capabilities, Devices, Exposure, Gid, Probe, Rail, Wanted};
pub use words::{LinkLayer, Role, Words, WordsError};

/// Why a device or an end of a path cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This machine has no RDMA library, or an old one.
    #[error("no RDMA library: {why}")]
    NoLibrary {
        /// In the loader's words.
        why: String,
    },
    /// The device is gone, or was never usable.
    #[error("no usable RDMA device {device}")]
    NoDevice {
        /// Its name.
        device: String,
    },
    /// Its port is down, or lost its address.
    #[error("port {port} of {device} is down or has no address")]
    PortDown {
        /// Its name.
        device: String,
        /// Which port.
        port: u8,
    },
    /// Something failed.
    #[error("{device}: cannot {what}")]
    Device {
        /// Its name.
        device: String,
        /// What.
        what: &'static str,
        /// In the kernel's words.
        source: std::io::Error,
    },
    /// The device or its driver is not able to.
    #[error("{device} is not able to {what}")]
    Unsupported {
        /// Its name.
        device: String,
        /// What.
        what: &'static str,
        /// In the kernel's words.
        source: std::io::Error,
    },
    /// As many paths as it takes.
    #[error("{device} has as many paths as it takes: {links_max}")]
    Full {
        /// Its name.
        device: String,
        /// How many.
        links_max: u32,
    },
    /// The peer's words cannot be used.
    #[error("the peer's words cannot be used")]
    Words(#[from] WordsError),
    /// The peer's end does not fit this one.
    #[error("the peer's end does not fit: {why}")]
    Mismatch {
        /// Why.
        why: &'static str,
    },
}
