//! What a reader is told before it starts, and what it says about itself.

use std::collections::BTreeMap;
use std::time::Duration;

use kv_block::Epoch;

use super::PathId;
use crate::health::{Circuit, HealthLimits};

/// What a reader must know before it starts. All bounds; none is changed later.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReaderConfig {
    /// Name of this node.
    pub node: String,
    /// The life of this daemon.
    pub epoch: Epoch,
    /// Names of the principals whose blocks are asked for; wants count through them.
    pub principals: Vec<String>,
    /// What the owner is told about this node's devices.
    pub facts: Vec<u8>,
    /// Name of the peer's node. Nobody else may answer.
    pub peer: String,
    /// Paths to it other than TCP.
    pub paths: Vec<PathId>,
    /// Longest block that there can be, in bytes.
    pub block_bytes_max: u32,
    /// Wants under way, whatever the owner's credits.
    pub wants_max: usize,
    /// Reads that devices have, those that nobody waits for any more among them.
    pub reads_max: usize,
    /// Reads in a row that a path other than TCP may fail before it is left alone until the next connection.
    pub path_errors_max: u32,
    /// How long connecting and shaking hands may take.
    pub connect_max: Duration,
    /// How often the owner is pinged while it owes an answer.
    pub ping_every: Duration,
    /// How long it may say nothing while it owes an answer.
    pub silence_max: Duration,
    /// How long a device may keep a read that was cancelled.
    pub cancel_max: Duration,
    /// When the circuit opens.
    pub health: HealthLimits,
    /// Spreads retries.
    pub seed: u64,
}

impl Default for ReaderConfig {
    /// Nameless, TCP only; 8,192 wants, 4,096 reads, blocks up to 64 MiB; 2 s to connect, a ping every 500 ms, 2 s of
    /// silence.
    fn default() -> Self {
        Self {
            node: String::new(),
            epoch: Epoch(0),
            principals: Vec::new(),
            facts: Vec::new(),
            peer: String::new(),
            paths: Vec::new(),
            block_bytes_max: 64 << 20,
            wants_max: 8192,
            reads_max: 4096,
            path_errors_max: 3,
            connect_max: Duration::from_secs(2),
            ping_every: Duration::from_millis(500),
            silence_max: Duration::from_secs(2),
            cancel_max: Duration::from_secs(5),
            health: HealthLimits::default(),
            seed: 0,
        }
    }
}

/// How the connection to a peer stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PeerState {
    /// There is none: nobody wants anything, or the circuit is open.
    #[default]
    Idle,
    /// It is being opened.
    Connecting,
    /// We said Hello.
    Greeting,
    /// The owner took us.
    Connected,
}

/// How a path stands.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum PathState {
    /// Nothing was heard of it yet on this connection.
    #[default]
    Opening,
    /// It carries reads.
    Up,
    /// It does not.
    Down {
        /// Why.
        why: String,
    },
}

/// How a path stands and what it did since the beginning.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PathReport {
    /// Whether it is used.
    pub state: PathState,
    /// Blocks that came by it.
    pub reads: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Reads that failed on it, cancelled ones aside.
    pub errors: u64,
    /// Those of them that brought wrong bytes.
    pub corrupt: u64,
    /// The newest error.
    pub last_error: Option<String>,
}

/// What a reader says about its peer and itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerReport {
    /// Name of the peer as configured.
    pub peer: String,
    /// How the connection stands.
    pub state: PeerState,
    /// Version spoken now or last.
    pub version: Option<u16>,
    /// Name that the owner gave itself now or last.
    pub node: Option<String>,
    /// The owner's life now or last.
    pub epoch: Option<Epoch>,
    /// It leaves soon.
    pub leaving: bool,
    /// Wants that were not said yet.
    pub waiting: usize,
    /// Wants that the owner has not answered.
    pub asked: usize,
    /// Wants that were granted and are not being read.
    pub granted: usize,
    /// Wants that are being read.
    pub reading: usize,
    /// Reads that devices still have and nobody waits for.
    pub cancelled: usize,
    /// Probes and offers without an answer.
    pub questions: usize,
    /// Bytes of grants that are not done.
    pub granted_bytes: u64,
    /// Wants that ended with a block.
    pub landed: u64,
    /// Wants that ended without, by reason.
    pub misses: BTreeMap<&'static str, u64>,
    /// Each path.
    pub paths: BTreeMap<PathId, PathReport>,
    /// Connections that came about.
    pub connections: u64,
    /// What the peer did wrong since the beginning.
    pub strikes: u64,
    /// Times the circuit opened.
    pub opened: u64,
    /// How the circuit stands, and until when.
    pub circuit: Circuit,
    /// The newest strike: its kind and words.
    pub last_error: Option<(&'static str, String)>,
    /// Round-trip time of the newest ping.
    pub rtt: Option<Duration>,
}
