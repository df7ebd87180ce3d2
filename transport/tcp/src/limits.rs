//! Every bound, with its default.

use std::time::Duration;

use kv_wire::frame::{GREETING_BYTES_MAX, HEADER_BYTES};

/// Reads up to this length go by the connection for small reads, in bytes.
pub(crate) const SMALL_BYTES: u32 = 64 << 10;
/// One pass of a task moves about this much, then others of its thread have their turn.
pub(crate) const PASS_BYTES: usize = 256 << 10;
/// Longest first frame of a connection: who has not said who it is gets no more memory, in bytes.
pub(crate) const FIRST_FRAME_BYTES_MAX: usize = HEADER_BYTES + GREETING_BYTES_MAX;
/// Longest frame on a data connection: 4096 reads of 16 bytes, and some. In bytes.
pub(crate) const DATA_FRAME_BYTES_MAX: usize = 128 << 10;

/// How much, how many, how long; and how fast, as far as one can say. The same for both ends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Limits {
    /// From a new connection to its first frame, and from dialing to the answer of the other side.
    pub handshake: Duration,
    /// How long the other end may take nothing of what is written to it. Then the connection is cut, and the memory
    /// that waited for it comes back.
    pub stall: Duration,
    /// How long an owner may send nothing on a connection on which it was asked for something. Then the connection is
    /// cut, its reads take another path, and the next one takes another way through the network.
    pub silence: Duration,
    /// How long an owner's link lives without any connection before it is broken: time for its reader to come back.
    /// For the first to come, it is this and the time of a handshake.
    pub rejoin: Duration,
    /// Connections of a link for reads that are not small; at least one.
    pub bulk_connections: usize,
    /// What one connection has asked for and not got, in bytes; a single longer block is asked for alone.
    pub window_bytes: u64,
    /// The same, in reads.
    pub window_reads: usize,
    /// Reads that a reader's link takes at once.
    pub reads_max: usize,
    /// Blocks that an owner's link exposes at once.
    pub exposures_max: usize,
    /// Connections inside a listener, of all kinds.
    pub connections_max: usize,
    /// How many of them may be without a valid first frame. One more makes the oldest of the busiest source go.
    pub unproven_max: usize,
    /// How many of them may come from one address (IPv6: one /64).
    pub per_source_max: usize,
    /// Data connections that join one session.
    pub session_connections_max: usize,
    /// Congestion control of every connection, by its name in the kernel; `None`: what the host has chosen. It is the
    /// sending side that decides: for blocks, the owner.
    pub congestion: Option<String>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(5),
            stall: Duration::from_secs(10),
            silence: Duration::from_secs(3),
            rejoin: Duration::from_secs(5),
            bulk_connections: 4,
            window_bytes: 8 << 20,
            window_reads: 256,
            reads_max: 16 << 10,
            exposures_max: 64 << 10,
            connections_max: 4096,
            unproven_max: 64,
            per_source_max: 512,
            session_connections_max: 16,
            congestion: None,
        }
    }
}
