//! How blocks move between nodes.
//!
//! ```text
//!   link.rs      one path to a peer: what every device that moves bytes promises
//!   reader.rs    the end that wants blocks of one peer: wants, grants, reads, deadlines, health
//!   owner.rs     the end that has them: what it holds for one reader, and for how long
//! ```
//! Everything here takes events and the time, changes its state and says what is to be done. It owns no socket,
//! thread or clock.

pub mod link;
pub mod owner;
pub mod reader;

/// Monotonic time in microseconds, of whoever drives. Never compared between nodes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Micros(pub u64);
