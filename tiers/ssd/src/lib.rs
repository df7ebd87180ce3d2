//! The disk tier: a checksummed segment log over direct I/O on io_uring.
//!
//! ```text
//!  store   the node's handle and the thread behind it
//!  log     operations -> page I/O: placement, group commit, reclaim (a state machine)
//!  recover opening: reads index regions, newest first
//!  segment the bytes of a segment file        format  the identity of a directory
//!  health  the circuit of a sick device       io      what a device engine does
//!  ring    io_uring    threads  pread/pwrite  sim     memory, with faults on demand
//! ```
//! A read of a block: [`SsdStore`] -> log (is the place still that life of its segment?) -> ring (straight
//! into the slot) -> log (checksum, mixed with the key) -> back. Nothing is served that failed a check.

#![expect(unsafe_code, reason = "memory under I/O is named by address, and the kernel writes into it")]

pub mod format;
pub mod health;
pub mod segment;
pub mod sim;
pub mod store;

mod files;
mod io;
mod log;
mod recover;
mod ring;
mod threads;

pub use health::{CircuitLimits, Health, HealthState};
pub use log::{SsdStats, SyncMode};
pub use recover::RecoveryReport;
pub use sim::{SimDisk, SimFault};
pub use store::{Engine, Error, Recovered, SEGMENTS_MIN, SsdConfig, SsdStore};
