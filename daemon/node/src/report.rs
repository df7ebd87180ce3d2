//! What a shard can say of itself, in numbers.

use std::collections::BTreeMap;

use kv_block::{MissReason, Tier};

/// Monotonic counters of one shard since it started.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Counters {
    /// Blocks found, by tier that served them, or `peer`.
    pub hits: BTreeMap<&'static str, u64>,
    /// Blocks not found, by reason.
    pub misses: BTreeMap<&'static str, u64>,
    /// Blocks stored, without those that were there already.
    pub put_blocks: u64,
    /// Their bytes.
    pub put_bytes: u64,
    /// Puts of blocks that were there already.
    pub put_already: u64,
    /// Bytes brought up from disk.
    pub onboard_bytes: u64,
    /// Blocks brought up from disk.
    pub onboard_blocks: u64,
    /// Blocks that came from peers.
    pub fetch_blocks: u64,
    /// Their bytes.
    pub fetch_bytes: u64,
    /// Blocks that came from the object tier.
    pub download_blocks: u64,
    /// Their bytes.
    pub download_bytes: u64,
    /// Blocks handed over for the object tier.
    pub upload_blocks: u64,
    /// Their bytes.
    pub upload_bytes: u64,
    /// Blocks written to disk.
    pub offload_blocks: u64,
    /// Bytes written to disk for blocks, moves not counted.
    pub offload_bytes: u64,
    /// Blocks moved by segment reclaim.
    pub moved_blocks: u64,
    /// Bytes moved by segment reclaim.
    pub moved_bytes: u64,
    /// Blocks that left a tier, by cause.
    pub evictions: BTreeMap<&'static str, u64>,
    /// Blocks that failed their checksum, by tier.
    pub checksum_failures: BTreeMap<&'static str, u64>,
    /// Requests refused, by code.
    pub rejects: BTreeMap<String, u64>,
    /// Leases taken back, by cause.
    pub lease_reclaims: BTreeMap<&'static str, u64>,
}

impl Counters {
    /// Counts `count` blocks served from `tier`.
    pub fn hit(&mut self, tier: Tier, count: u64) {
        self.hit_from(tier.name(), count);
    }

    /// Counts `count` blocks served from a place of this name.
    pub fn hit_from(&mut self, place: &'static str, count: u64) {
        *self.hits.entry(place).or_default() += count;
    }

    /// Counts a miss.
    pub fn miss(&mut self, reason: MissReason) {
        *self.misses.entry(reason.name()).or_default() += 1;
    }
}

/// Gauges and counters of one shard at one moment.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct ShardReport {
    /// Counters.
    pub counters: Counters,
    /// Bytes of blocks in host memory.
    pub host_bytes: u64,
    /// Bytes of the arena that have memory.
    pub host_bytes_max: u64,
    /// Bytes of the arena when it is whole.
    pub host_bytes_wanted: u64,
    /// Whether the rest is still coming.
    pub host_growing: bool,
    /// Blocks in host memory.
    pub host_blocks: u64,
    /// Blocks readable from disk.
    pub disk_blocks: u64,
    /// Bytes of blocks readable from disk.
    pub disk_bytes: u64,
    /// Announced blocks.
    pub pending: u64,
    /// Blocks known under any state but gone.
    pub blocks: u64,
    /// Quarantined blocks.
    pub quarantined: u64,
    /// Entries of the catalog, ghosts included.
    pub catalog_entries: u64,
    /// Leases held.
    pub leases: u64,
    /// Bytes under lease.
    pub leased_bytes: u64,
    /// Blocks that workers have open in shared memory, without a lease. The brain does not see them: its shard
    /// fills this in.
    pub reading: u64,
    /// Bytes under pin.
    pub pinned_bytes: u64,
    /// Disk operations and copies under way, those for the object tier among them.
    pub in_flight: u64,
    /// Blocks looked for among the peers or in the object tier, or on their way from there.
    pub fetching: u64,
    /// Whether the disk tier serves; `None` without one.
    pub disk_serving: Option<bool>,
    /// Per tenant.
    pub tenants: Vec<TenantReport>,
    /// Per session: leases, leased bytes, announced blocks, puts, gets.
    pub sessions: Vec<SessionReport>,
    /// Number of the last event.
    pub event_number: u64,
}

/// One tenant in numbers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct TenantReport {
    /// Name.
    pub tenant: String,
    /// Bytes in host memory.
    pub host_bytes: u64,
    /// Bytes on disk.
    pub disk_bytes: u64,
    /// Blocks anywhere.
    pub blocks: u64,
    /// Pinned bytes.
    pub pinned_bytes: u64,
    /// Quota for host memory; 0 none.
    pub quota_bytes: Option<u64>,
    /// Blocks found.
    pub hits: u64,
    /// Blocks not found.
    pub misses: u64,
}

/// One session in numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SessionReport {
    /// Number.
    pub session: u64,
    /// Leases held.
    pub leases: u32,
    /// Bytes under lease.
    pub leased_bytes: u64,
    /// Blocks open in shared memory, as [`ShardReport::reading`].
    pub reading: u32,
    /// Blocks announced and not stored.
    pub pending: u32,
    /// Blocks stored.
    pub puts: u64,
    /// Blocks leased, ever.
    pub gets: u64,
}
