//! How blocks move between nodes.
//!
//! ```text
//!   link.rs      one path to a peer: what every device that moves bytes promises
//!   reader.rs    the end that wants blocks of one peer: wants, grants, reads, deadlines
//!   owner.rs     the end that has them: what it holds for one reader, and for how long
//!   health.rs    whether a peer is worth asking
//!   plan.rs      which paths there are to a peer, best first, and why
//!   sim.rs       many of both over a network that fails, from a seed
//!   contract.rs  the promises of a path, as tests that every device runs; memory.rs is the fake that keeps them
//! ```
//! Everything here takes events and the time, changes its state and says what is to be done. It owns no socket,
//! thread or clock.

pub mod contract;
pub mod health;
pub mod link;
pub mod memory;
pub mod owner;
pub mod plan;
pub mod random;
pub mod reader;
pub mod sim;

use std::time::Duration;

pub use owner::machine::Owner;
pub use reader::machine::Reader;

/// Monotonic time in microseconds, of whoever drives. Never compared between nodes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Micros(pub u64);

impl Micros {
    /// So much later.
    pub fn after(self, time: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX)))
    }

    /// How long it is from `earlier` to here; zero when that is not earlier.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// Probes that an owner has to answer for one reader at one moment; a reader has no more under way.
pub const PROBES_MAX: usize = 64;
/// Offers of one reader that an owner has to answer at one moment.
pub const OFFERS_MAX: usize = 4;
