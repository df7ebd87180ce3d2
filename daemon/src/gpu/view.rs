//! The GPUs of a node as operators see them: plain data and the words for it. Who made it does not matter here; `rpc`
//! puts it into messages.
//!
//! ```text
//!   driver, devices, copier, pool --> GpusView --> Admin.ListGpus, Admin.Status --> kvctl get gpus, status, doctor
//! ```

/// All GPUs of a node, or why there are none.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GpusView {
    /// For which CUDA the driver is, such as `12.8`; `None` where there is no driver that can be used.
    pub driver: Option<String>,
    /// Why there is no GPU to use: a driver that is missing or refuses, or the configuration. A sentence without a full
    /// stop; `None` where there are some.
    pub absent: Option<String>,
    /// Each of them, by number; those that are not used too.
    pub gpus: Vec<GpuView>,
}

impl GpusView {
    /// None, and why.
    pub fn none(why: impl Into<String>) -> Self {
        Self { absent: Some(why.into()), ..Self::default() }
    }
}

/// One GPU. Counters are since the start of the daemon; bytes are bytes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GpuView {
    /// Its number in the daemon's process; other processes may have another for it.
    pub ordinal: u32,
    /// Its name in every process, as `nvidia-smi -L` has it: `GPU-` and 32 hex digits with dashes.
    pub uuid: String,
    /// What it is called.
    pub name: String,
    /// Where it is: `0000:3b:00.0`.
    pub bus: String,
    /// The NUMA node it hangs on; `None` where the firmware does not tell.
    pub numa_node: Option<u32>,
    /// Its memory.
    pub memory_bytes: u64,
    /// What of that is free, whoever has the rest; `None` where it cannot be asked any more.
    pub free_bytes: Option<u64>,
    /// How it is.
    pub state: GpuState,
    /// Why it is not [`GpuState::Ok`]; empty when it is.
    pub reason: String,
    /// How pages are copied: `kernel`, `batch`, `loop`, or `auto(...)` with what was chosen.
    pub method: String,
    /// KV caches that workers have registered on it.
    pub caches: u32,
    /// Device memory in those; it belongs to the workers.
    pub cache_bytes: u64,
    /// Why the daemon has no pool there that was asked for, or a smaller one; empty where it has.
    pub pool_trouble: String,
    /// Device memory that the daemon's own pool of blocks may have at most; 0 where it has none.
    pub pool_bytes_max: u64,
    /// Of that, in blocks now.
    pub pool_bytes_used: u64,
    /// Blocks in the pool.
    pub pool_blocks: u64,
    /// Blocks that workers got from the pool.
    pub pool_hits: u64,
    /// Copies that the device has in its queues.
    pub copies_under_way: u64,
    /// Bytes in those.
    pub bytes_under_way: u64,
    /// Copies that wait for others to end.
    pub copies_waiting: u64,
    /// Copied from host memory to the device.
    pub bytes_in: u64,
    /// Copied from the device to host memory.
    pub bytes_out: u64,
    /// Copied between this device and another, or within it; each device counts its own.
    pub bytes_across: u64,
    /// Copies that ended well.
    pub copies_done: u64,
    /// Copies that did not.
    pub copies_failed: u64,
    /// Operations of which the device never said that they are over: the memory they use is fenced, and stays so until
    /// the daemon ends.
    pub kept: u64,
    /// UUIDs of the other GPUs whose memory it can access by itself.
    pub reaches: Vec<String>,
}

/// How a GPU is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GpuState {
    /// It is used.
    Ok,
    /// It is lost to this process: nothing works in its context any more, and only a restart brings it back.
    Lost,
    /// It is there and not used: the configuration leaves it out, or it could not be opened.
    #[default]
    Unused,
}

impl GpuState {
    /// Every state.
    pub const ALL: [Self; 3] = [Self::Ok, Self::Lost, Self::Unused];

    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Lost => "lost",
            Self::Unused => "unused",
        }
    }
}
