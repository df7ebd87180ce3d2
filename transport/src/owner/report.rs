//! What an owner is told before it starts, and what it says about itself.

use std::collections::BTreeMap;
use std::time::Duration;

use kv_block::{BlockKey, Epoch};
use kv_wire::message::{Credits, Refused};

use crate::Micros;
use crate::reader::PathId;

/// A path other than TCP, and how good it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OwnerPath {
    /// Which.
    pub path: PathId,
    /// Lower is better; paths of one rank take turns.
    pub rank: u8,
}

/// What an owner must know before it starts. All bounds; none is changed later.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OwnerConfig {
    /// Name of this node.
    pub node: String,
    /// The life of this daemon.
    pub epoch: Epoch,
    /// Nodes that may read here; a secure connection has checked who it is, so one name mostly.
    pub readers: Vec<String>,
    /// Whoever comes is refused, with these words.
    pub refuse: Option<Refused>,
    /// What data connections must show to join. Random.
    pub session: u128,
    /// What the reader may have outstanding.
    pub credits: Credits,
    /// This node leaves soon.
    pub leaving: bool,
    /// What the reader is told about this node's devices.
    pub facts: Vec<u8>,
    /// Paths other than TCP.
    pub paths: Vec<OwnerPath>,
    /// Most principals that a reader may name.
    pub principals_max: usize,
    /// How long the Hello may take.
    pub hello_max: Duration,
    /// How long a want may wait for its block, whatever the reader says.
    pub wait_max: Duration,
    /// How long a granted block is held.
    pub lease_max: Duration,
    /// How long the reader may say nothing while anything is held for it. It pings more often than that.
    pub silence_max: Duration,
    /// Unix time in seconds at the zero of our clock: grants say how long a block has to live.
    pub unix_zero_s: u64,
}

impl Default for OwnerConfig {
    /// Nameless, TCP only, nobody may read; 4,096 wants and 1 GiB outstanding; 2 s for the Hello, 10 s to wait, 30 s to
    /// read, 10 s of silence.
    fn default() -> Self {
        Self {
            node: String::new(),
            epoch: Epoch(0),
            readers: Vec::new(),
            refuse: None,
            session: 0,
            credits: Credits { wants_max: 4096, bytes_max: 1 << 30 },
            leaving: false,
            facts: Vec::new(),
            paths: Vec::new(),
            principals_max: 256,
            hello_max: Duration::from_secs(2),
            wait_max: Duration::from_secs(10),
            lease_max: Duration::from_secs(30),
            silence_max: Duration::from_secs(10),
            unix_zero_s: 0,
        }
    }
}

/// How the connection of a reader stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OwnerState {
    /// It has not said Hello.
    #[default]
    New,
    /// It is served.
    Serving,
    /// It is gone; blocks may still be in the hands of a device.
    Over,
}

/// What an owner says about its reader and itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OwnerReport {
    /// How the connection stands.
    pub state: OwnerState,
    /// Name of the reader's node.
    pub reader: Option<String>,
    /// The reader's life.
    pub epoch: Option<Epoch>,
    /// Version spoken.
    pub version: Option<u16>,
    /// Wants whose block is looked for.
    pub holding: usize,
    /// Wants whose block is here and waits for credit or for a device.
    pub waiting: usize,
    /// Wants that are granted.
    pub granted: usize,
    /// Wants that are over while a device may still read their block.
    pub fenced: usize,
    /// Bytes that devices may read, or might still.
    pub bytes: u64,
    /// Grants since the beginning.
    pub grants: u64,
    /// Their bytes.
    pub bytes_granted: u64,
    /// Grants that ended by their time limit.
    pub expired: u64,
    /// Wants that got nothing, by reason.
    pub misses: BTreeMap<&'static str, u64>,
    /// Grants by the path of their window, TCP where they have none.
    pub paths: BTreeMap<PathId, u64>,
    /// Why the connection was ended here.
    pub last_error: Option<String>,
}

/// What an owner says about one want.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseReport {
    /// Name of the block.
    pub key: BlockKey,
    /// `looking` for it, `waiting` for credit or a device, `granted`, or `fenced`: over, and a device may still read it.
    pub stage: &'static str,
    /// Length in bytes, once a device has it.
    pub bytes: u32,
    /// When it was wanted.
    pub since: Micros,
    /// When this stage ends by itself; what is fenced ends when its devices are done.
    pub until: Option<Micros>,
}
