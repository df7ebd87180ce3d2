//! Opens a shard's disk tier from its plan.

use kv_arena::Slab;
use kv_ssd::{Engine, HealthState, Recovered, SsdConfig, SsdStore, SyncMode};
use kv_tiers::store::BlockStore as _;

use crate::config::Config;
use crate::config::units;
use crate::plan::{Bounds, DiskPlan, ShardPlan};
use crate::shard::{DiskTier, Waker};

/// An opened disk tier, and what its index names: to be drained before the store serves.
pub struct OpenedDisk {
    /// The store.
    pub store: SsdStore,
    /// Blocks that were found, in batches.
    pub found: Recovered,
}

/// Opens the log of one shard. Its arena is registered with the kernel where that is allowed, as far as it has
/// memory: registering takes hold of pages, so it must not be what brings them.
pub fn open(
    config: &Config,
    disk: &DiskPlan,
    bounds: &Bounds,
    shard: &ShardPlan,
    slab: &Slab,
    waker: Waker,
) -> Result<OpenedDisk, kv_ssd::Error> {
    let bytes_max = disk.segment_bytes * u64::from(disk.segments_max);
    let ssd = SsdConfig {
        node: config.node_name().to_owned(),
        segment_bytes: disk.segment_bytes,
        in_flight_max: bounds.disk_queue_depth,
        engine: match config.disk.engine {
            units::Engine::Auto => Engine::Auto,
            units::Engine::Uring => Engine::Ring,
            units::Engine::Threads => Engine::Threads,
        },
        cpus: shard.disk_cpus.clone(),
        slow_limit: config.disk.slow_limit.0,
        sync: match config.disk.sync {
            units::Sync::Always => SyncMode::Always,
            units::Sync::Never => SyncMode::Never,
        },
        arenas: vec![slab.clone()],
        ..SsdConfig::new(&disk.dir, bytes_max)
    };
    let (store, found) = SsdStore::open(ssd, Box::new(move || waker.wake()))?;
    Ok(OpenedDisk { store, found })
}

impl DiskTier for SsdStore {
    fn trouble(&self) -> Option<String> {
        match self.health().state {
            HealthState::Healthy => None,
            HealthState::Degraded { reason, .. } => Some(reason.to_string()),
        }
    }

    fn room_bytes(&self) -> u64 {
        self.usage().bytes_max
    }

    fn host_grew(&self) {
        self.arenas_grew();
    }
}
