//! What this machine would run: a pure function of topology, configuration and resources.
//!
//! ```text
//!   node 0  cpus 0-31    --> shard 0: arena on node 0, its thread on cpu 30, its disk thread on cpu 31
//!   node 1  cpus 32-63   --> shard 1: the same on node 1
//!   node 2  memory only  --> no shard; callers near it go to the nearest
//! ```
//! One shard for each NUMA node that has both memory and CPUs we may use; with `[principals]`, one for each of
//! them as well, which shares nothing with the others. Bytes are split by the memory of the nodes, everything
//! else evenly. Every queue and pool gets its bound here, and the sum of what they may take
//! is a table with one line per owner.

use std::ops::Range;
use std::path::PathBuf;

use kv_ssd::SEGMENTS_MIN;

use crate::config::units::{OrAuto, Share, Size, SizeOrShare};
use crate::config::{Config, ConfigError, Loaded, Problem};
use crate::growth::READY_BYTES;
use crate::topology::{DeviceKind, NumaNode, Topology};

/// Host memory taken when nobody says: this share of the machine's...
pub const HOST_SHARE: Share = Share::percent(25);
/// ...and at most this.
pub const HOST_AUTO_MAX: Size = Size::gib(64);
/// Part of the memory file system that `auto` leaves to others.
const MEMORY_DIR_SHARE: Share = Share::percent(80);
/// Bytes of shared catalog per entry: a bucket of 256 bytes holds five and is filled to 85 %.
pub const TABLE_BYTES_PER_ENTRY: u64 = 60;
/// Bytes of slot header per 4 KiB of arena.
pub const SLOT_HEADER_BYTES: u64 = 64;
const PAGE_BYTES: u64 = 4096;
/// With fewer CPUs than this in a node, its threads go where the scheduler likes within the node.
const PIN_CPUS_MIN: usize = 8;
/// Blocks are taken to be at least this large when the catalog is sized by itself.
const BLOCK_BYTES_TYPICAL: u64 = 32 << 10;

/// What the machine has, beyond its topology. `None` means unknown, and is not checked against.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Resources {
    /// Memory this process may use: the machine's, or less by its control group.
    pub ram_bytes: u64,
    /// Size of the file system that holds `host.memory_dir`.
    pub memory_dir_bytes: Option<u64>,
    /// Size of the file system that holds `disk.dir`.
    pub disk_bytes: Option<u64>,
    /// Bytes this process may lock in memory; `u64::MAX` for no limit.
    pub memlock_bytes: Option<u64>,
    /// Descriptors this process may have open.
    pub descriptors_max: Option<u64>,
}

/// What is run.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// One for each NUMA node that serves and each principal, by principal. Never empty.
    pub shards: Vec<ShardPlan>,
    /// The principals, the default one first.
    pub principals: Vec<PrincipalPlan>,
    /// Unit in which arena memory goes to one block size, in bytes.
    pub region_bytes: u64,
    /// Threads of the control runtime.
    pub control_threads: usize,
    /// Threads for words of peers, searches and small blocks.
    pub peer_threads: usize,
    /// Threads that long blocks from and to peers move on.
    pub bulk_threads: usize,
    /// GPUs of the machine, by bus address, and the CPUs near each.
    pub gpus: Vec<GpuPlan>,
    /// Bounds of queues and pools.
    pub bounds: Bounds,
    /// What may be taken at most, one line per owner.
    pub budget: Vec<BudgetLine>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Users whose blocks lie apart: a set of shards, one on each NUMA node that serves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PrincipalPlan {
    /// Its name.
    pub name: String,
    /// Its shards, by number.
    pub shards: Range<usize>,
}

/// Where a GPU hangs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GpuPlan {
    /// Bus address, as sysfs has it.
    pub address: String,
    /// Its NUMA node; 0 where the firmware does not tell.
    pub node: u32,
    /// CPUs of that node which this process may use.
    pub cpus: Vec<u32>,
}

/// One shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardPlan {
    /// Its number, from 0.
    pub index: u16,
    /// Whose it is: place in [`Plan::principals`].
    pub principal: u16,
    /// Its number among the shards of its principal. Its files are named by it.
    pub home: u16,
    /// Directory of its shared memory files.
    pub memory_dir: PathBuf,
    /// NUMA node its memory is bound to; `None` where there is nothing to choose.
    pub numa_node: Option<u32>,
    /// NUMA nodes whose workers call it home; its own first.
    pub serves: Vec<u32>,
    /// CPUs its own thread may use. Empty: any.
    pub shard_cpus: Vec<u32>,
    /// CPUs its disk thread may use. Empty: any.
    pub disk_cpus: Vec<u32>,
    /// Regions of the arena.
    pub regions: u32,
    /// Bytes of the arena: regions times [`Plan::region_bytes`].
    pub arena_bytes: u64,
    /// Bytes of it that may be pinned.
    pub pinned_bytes_max: u64,
    /// Catalog entries, those of blocks that are gone included.
    pub table_entries_max: u64,
    /// Of those, entries of blocks that are gone.
    pub ghosts_max: u64,
    /// Its part of the disk tier.
    pub disk: Option<DiskPlan>,
    /// Devices on its nodes, by the kernel's name.
    pub devices: Vec<String>,
}

/// A shard's part of the disk tier.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskPlan {
    /// Its own directory.
    pub dir: PathBuf,
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Segments it may have.
    pub segments_max: u32,
}

/// Bounds, per shard unless they say otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bounds {
    /// Disk operations under way.
    pub disk_queue_depth: u32,
    /// Blocks on their way to disk.
    pub offloads_max: u32,
    /// Blocks on their way up from disk.
    pub onboards_max: u32,
    /// Blocks on their way from peers and the object tier; 0 without either.
    pub fetches_max: u32,
    /// Blocks held to be copied for the object tier.
    pub uploads_max: u32,
    /// Requests that wait for room.
    pub stalled_max: u32,
    /// Requests from gRPC not yet taken by the shard.
    pub requests_max: u32,
    /// Events kept for replay.
    pub events_max: u32,
}

/// What one owner may take at most, all shards together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BudgetLine {
    /// Who.
    pub owner: &'static str,
    /// How the number comes about.
    pub how: String,
    /// Bytes of memory.
    pub bytes: u64,
}

impl Plan {
    /// Where the GPU with this bus address hangs, where that is known.
    pub fn gpu(&self, address: &str) -> Option<&GpuPlan> {
        self.gpus.iter().find(|gpu| gpu.address == address)
    }

    /// Memory that may be taken at most, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.budget.iter().map(|line| line.bytes).fold(0, u64::saturating_add)
    }

    /// The shard that a worker on this NUMA node calls home.
    pub fn home_shard(&self, numa_node: u32) -> u16 {
        let home = self.shards.iter().find(|shard| shard.serves.contains(&numa_node));
        home.map_or(0, |shard| shard.index)
    }
}

/// Works out what to run. Errors name the key that must change, and where it was set.
pub fn plan(topology: &Topology, loaded: &Loaded, resources: &Resources) -> Result<Plan, ConfigError> {
    let config = &loaded.config;
    let refuse = |key: &str, message: String| ConfigError {
        problems: vec![Problem { origin: loaded.origin(key), message: format!("{key}: {message}") }],
    };
    let mut notes = Vec::new();

    let homes: Vec<&NumaNode> =
        topology.nodes.iter().filter(|node| !node.cpus.is_empty() && node.memory_bytes > 0).collect();
    // The affinity may leave us only CPUs of a node without memory; its nearest memory serves then.
    let homes = if homes.is_empty() { fallback_home(topology) } else { homes };
    let count = homes.len() as u64;
    let shares: Vec<Share> = config.principals.values().map(|principal| principal.share).collect();

    let (host_bytes, region_bytes) = host_bytes(config, resources, count, &shares, &mut notes, &refuse)?;
    let weights: Vec<u64> = homes.iter().map(|node| node.memory_bytes.max(1)).collect();
    let slots_max = host_bytes / region_bytes * (region_bytes / PAGE_BYTES);
    if slots_max >= u64::from(u32::MAX) * count {
        return Err(refuse(
            "host.bytes_max",
            format!("{} is more than slots can be numbered for", Size(host_bytes)),
        ));
    }
    let disk_bytes = disk_bytes(config, resources, count, &mut notes, &refuse)?;
    let entries = config
        .catalog
        .entries_max
        .get()
        .copied()
        .unwrap_or_else(|| ((host_bytes + disk_bytes) / BLOCK_BYTES_TYPICAL).clamp(1 << 16, 16 << 20));
    let ghosts = config.catalog.ghosts_max.get().copied().unwrap_or(entries / 4).min(entries);

    let whole = Part {
        regions: host_bytes / region_bytes,
        segments: disk_bytes / config.disk.segment_bytes.0,
        entries,
        ghosts,
    };
    let mut plans: Vec<ShardPlan> = Vec::new();
    let mut principals = Vec::new();
    for (at, (name, part)) in config.principal_names().zip(whole.shared_out(&shares)).enumerate() {
        part.check(name, count, region_bytes, config, &refuse)?;
        let regions = split(part.regions, &weights);
        // Files lie apart as well, so that what was kept is never taken for another principal's.
        let apart = |dir: PathBuf| if at == 0 { dir } else { dir.join(principal_dir(name)) };
        let first = plans.len();
        for (home, (node, regions)) in homes.iter().zip(&regions).enumerate() {
            let serves = serves(topology, &homes, node.number);
            let (shard_cpus, disk_cpus) = cpus(node, at);
            let near = topology.devices.iter().filter(|device| serves.contains(&device.node));
            let arena_bytes = regions * region_bytes;
            plans.push(ShardPlan {
                index: plans.len() as u16,
                principal: at as u16,
                home: home as u16,
                memory_dir: apart(config.memory_dir()),
                numa_node: (topology.nodes.len() > 1).then_some(node.number),
                shard_cpus,
                disk_cpus,
                regions: *regions as u32,
                arena_bytes,
                pinned_bytes_max: config.limits.pinned_ratio_max.of(arena_bytes),
                table_entries_max: (part.entries + part.ghosts).div_ceil(count),
                ghosts_max: part.ghosts.div_ceil(count),
                disk: config.disk_dir().map(|dir| DiskPlan {
                    dir: apart(dir).join(format!("shard-{home}")),
                    segment_bytes: config.disk.segment_bytes.0,
                    segments_max: (part.segments / count) as u32,
                }),
                devices: near.map(|device| device.name.clone()).collect(),
                serves,
            });
        }
        principals.push(PrincipalPlan { name: name.to_owned(), shards: first..plans.len() });
    }
    for (home, node) in homes.iter().enumerate() {
        let here = plans.iter().filter(|shard| usize::from(shard.home) == home);
        let arenas: u64 = here.map(|shard| shard.arena_bytes).sum();
        if arenas > node.memory_bytes && !topology.guessed {
            return Err(refuse(
                "host.bytes_max",
                format!(
                    "shard {home} would get {} of NUMA node {}, which has {}",
                    Size(arenas).about(),
                    node.number,
                    Size(node.memory_bytes).about()
                ),
            ));
        }
    }
    notes.extend(topology_notes(topology, &plans[..homes.len()]));

    let bounds = bounds(config);
    let budget = budget(config, &plans, count, &bounds);
    let shards = plans.len() as u64;
    let cpus: usize = topology.nodes.iter().map(|node| node.cpus.len()).sum();
    let mut plan = Plan {
        shards: plans,
        principals,
        region_bytes,
        control_threads: (cpus / 8).clamp(1, 8),
        peer_threads: (cpus / 16).clamp(1, 4),
        bulk_threads: (cpus / 4).clamp(2, 8),
        gpus: gpus(topology),
        bounds,
        budget,
        notes,
    };
    let total = plan.memory_bytes();
    if total > resources.ram_bytes {
        plan.notes.push(format!(
            "with every session and queue at its bound, {} of memory are used; the machine has {}",
            Size(total).about(),
            Size(resources.ram_bytes).about()
        ));
    }
    let descriptors = 64 + u64::from(config.limits.sessions_max) * (4 + 4 * count) + 8 * shards;
    if let Some(open_max) = resources.descriptors_max.filter(|open_max| *open_max < descriptors) {
        plan.notes.push(format!(
            "{descriptors} descriptors may be needed, {open_max} are allowed: raise `ulimit -n` or LimitNOFILE"
        ));
    }
    let arenas: u64 = plan.shards.iter().map(|shard| shard.arena_bytes).sum();
    if config.disk_dir().is_some()
        && let Some(memlock) = resources.memlock_bytes.filter(|memlock| *memlock < arenas)
    {
        plan.notes.push(format!(
            "{} may be locked in memory, so arenas are not registered with io_uring: raise `ulimit -l` or \
             LimitMEMLOCK, or grant CAP_IPC_LOCK",
            Size(memlock).about()
        ));
    }
    Ok(plan)
}

/// The GPUs, each with the CPUs of its node.
fn gpus(topology: &Topology) -> Vec<GpuPlan> {
    let gpus = topology.devices.iter().filter(|device| device.kind == DeviceKind::Gpu);
    gpus.map(|device| {
        let home = topology.nodes.iter().find(|node| node.number == device.node);
        let cpus = home.map_or_else(Vec::new, |node| node.cpus.clone());
        GpuPlan { address: device.address.clone(), node: device.node, cpus }
    })
    .collect()
}

/// The node to use when none has both CPUs and memory for us: the memory nearest to a CPU we may use.
fn fallback_home(topology: &Topology) -> Vec<&NumaNode> {
    let ours: Vec<u32> =
        topology.nodes.iter().filter(|node| !node.cpus.is_empty()).map(|node| node.number).collect();
    let far = |node: &&NumaNode| ours.iter().map(|own| topology.distance(*own, node.number)).min();
    let with_memory = topology.nodes.iter().filter(|node| node.memory_bytes > 0).min_by_key(far);
    with_memory.or(topology.nodes.first()).into_iter().collect()
}

/// The nodes that call `home` theirs: itself, then those without a shard that it is the nearest to.
fn serves(topology: &Topology, homes: &[&NumaNode], home: u32) -> Vec<u32> {
    let nearest = |node: &NumaNode| {
        homes.iter().map(|home| (topology.distance(node.number, home.number), home.number)).min()
    };
    let is_home = |node: &NumaNode| homes.iter().any(|home| home.number == node.number);
    let guests = topology.nodes.iter().filter(|node| !is_home(node));
    let guests = guests.filter(|node| nearest(node).is_some_and(|(_, number)| number == home));
    std::iter::once(home).chain(guests.map(|node| node.number)).collect()
}

/// CPUs of the thread and of the disk thread of the `at`th shard of a node: one each from the end of the node,
/// where interrupts and engines are rarer, if the node has that many for each; else all of the node.
fn cpus(node: &NumaNode, at: usize) -> (Vec<u32>, Vec<u32>) {
    let all = &node.cpus;
    match all.len().checked_sub(2 * (at + 1)).map(|from| &all[from..]) {
        Some([shard, disk, ..]) if all.len() >= PIN_CPUS_MIN * (at + 1) => (vec![*shard], vec![*disk]),
        _ => (all.clone(), all.clone()),
    }
}

/// Directory of a principal's files, within those of the default one. One of a principal that is gone is left
/// alone: its blocks are not for whoever comes after.
pub fn principal_dir(name: &str) -> String {
    format!("{PRINCIPAL_DIR}{name}")
}

/// What the names of such directories begin with.
pub const PRINCIPAL_DIR: &str = "principal-";

/// What one principal gets, all its shards together.
struct Part {
    regions: u64,
    segments: u64,
    entries: u64,
    ghosts: u64,
}

impl Part {
    /// The parts of the principals with these shares, after what they leave: the default one's.
    fn shared_out(&self, shares: &[Share]) -> Vec<Self> {
        let [regions, segments, entries, ghosts] =
            [self.regions, self.segments, self.entries, self.ghosts].map(|whole| shared_out(whole, shares));
        let part = |at: usize| Self {
            regions: regions[at],
            segments: segments[at],
            entries: entries[at].max(ENTRIES_MIN),
            ghosts: ghosts[at],
        };
        (0..=shares.len()).map(part).collect()
    }

    /// Refuses what is too little for a shard on each of `homes` nodes.
    fn check(
        &self,
        name: &str,
        homes: u64,
        region_bytes: u64,
        config: &Config,
        refuse: Refuse<'_>,
    ) -> Result<(), ConfigError> {
        let named = config.principals.contains_key(name);
        let key =
            |tier: &str| if named { format!("principals.{name}.share") } else { format!("{tier}.bytes_max") };
        if self.regions < homes {
            let least = Size(region_bytes);
            let text = format!(
                "too little host memory for principal {name}: less than one region of {least} for each of {homes} shard(s)"
            );
            return Err(refuse(&key("host"), text));
        }
        if config.disk_dir().is_some() && self.segments / homes < SEGMENTS_MIN {
            let least = config.disk.segment_bytes;
            let text = format!(
                "too little disk for principal {name}: less than {SEGMENTS_MIN} segments of {least} for each of {homes} shard(s)"
            );
            return Err(refuse(&key("disk"), text));
        }
        Ok(())
    }
}

/// Entries that a principal gets at least.
const ENTRIES_MIN: u64 = 64;

/// What the shares leave of `whole`, then what each share is of it.
fn shared_out(whole: u64, shares: &[Share]) -> Vec<u64> {
    let parts = shares.iter().map(|share| share.of(whole));
    let rest = whole - parts.clone().sum::<u64>().min(whole);
    std::iter::once(rest).chain(parts).collect()
}

/// Parts of `whole` in proportion to `weights`, summing to `whole`, each at least 1 while there is enough.
fn split(whole: u64, weights: &[u64]) -> Vec<u64> {
    let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    let part = |weight: &u64| (u128::from(whole) * u128::from(*weight) / total.max(1)) as u64;
    let mut parts: Vec<u64> = weights.iter().map(|weight| part(weight).max(1)).collect();
    loop {
        let sum: u64 = parts.iter().sum();
        let largest = (0..parts.len()).max_by_key(|at| parts[*at]).expect("there are weights");
        match sum.cmp(&whole) {
            std::cmp::Ordering::Equal => return parts,
            std::cmp::Ordering::Less => parts[largest] += whole - sum,
            std::cmp::Ordering::Greater if parts[largest] > 1 => parts[largest] -= 1,
            std::cmp::Ordering::Greater => return parts,
        }
    }
}

type Refuse<'a> = &'a dyn Fn(&str, String) -> ConfigError;

/// Bytes of all arenas, a multiple of the region, and the region.
fn host_bytes(
    config: &Config,
    resources: &Resources,
    shards: u64,
    shares: &[Share],
    notes: &mut Vec<String>,
    refuse: Refuse<'_>,
) -> Result<(u64, u64), ConfigError> {
    let asked = match config.host.bytes_max {
        OrAuto::Set(asked) => asked.of(resources.ram_bytes),
        OrAuto::Auto => {
            let share = HOST_SHARE.of(resources.ram_bytes).min(HOST_AUTO_MAX.0);
            let room = resources.memory_dir_bytes.map_or(u64::MAX, |bytes| MEMORY_DIR_SHARE.of(bytes));
            if room < share {
                notes.push(format!(
                    "host memory is {} because {} is a file system of {}: enlarge it (`mount -o remount,size=...`, \
                     `docker run --shm-size`) or set host.memory_dir",
                    Size(room).about(),
                    config.memory_dir().display(),
                    Size(resources.memory_dir_bytes.unwrap_or(0)).about()
                ));
            }
            share.min(room)
        }
    };
    // At least 64 regions a shard where 2 MiB regions allow it, so that several block sizes find room.
    let least = shared_out(asked, shares).into_iter().min().unwrap_or(asked);
    let region_bytes = config.host.region_bytes.get().map_or_else(
        || (least / shards / 64).clamp(2 << 20, 32 << 20).next_power_of_two().min(32 << 20),
        |region| region.0,
    );
    let bytes = asked / region_bytes * region_bytes;
    if bytes < region_bytes * shards {
        return Err(refuse(
            "host.bytes_max",
            format!(
                "{} is less than one region of {} for each of {shards} shard(s)",
                Size(asked).about(),
                Size(region_bytes)
            ),
        ));
    }
    if bytes > resources.ram_bytes {
        let (asked, has) = (Size(bytes).about(), Size(resources.ram_bytes).about());
        return Err(refuse("host.bytes_max", format!("{asked} is more than the {has} of memory there are")));
    }
    if let Some(room) = resources.memory_dir_bytes.filter(|room| *room < bytes) {
        return Err(refuse(
            "host.bytes_max",
            format!(
                "{} does not fit {}, a file system of {}: enlarge it (`mount -o remount,size=...`, \
                 `docker run --shm-size`) or set host.memory_dir",
                Size(bytes).about(),
                config.memory_dir().display(),
                Size(room).about()
            ),
        ));
    }
    Ok((bytes, region_bytes))
}

/// Bytes of the disk tier on all shards, a multiple of the segment; 0 without one.
fn disk_bytes(
    config: &Config,
    resources: &Resources,
    shards: u64,
    notes: &mut Vec<String>,
    refuse: Refuse<'_>,
) -> Result<u64, ConfigError> {
    let Some(dir) = config.disk_dir() else { return Ok(0) };
    let (asked, segment) = (config.disk.bytes_max, config.disk.segment_bytes);
    let bytes = match (asked, resources.disk_bytes) {
        (SizeOrShare::Size(size), _) => size.0,
        (SizeOrShare::Share(share), Some(room)) => share.of(room),
        (SizeOrShare::Share(share), None) => {
            return Err(refuse(
                "disk.bytes_max",
                format!("{share} of {}, whose size cannot be told: give a size", dir.display()),
            ));
        }
    };
    // What the disk tier refuses to start with is refused here, where the key is known.
    if bytes / segment.0 / shards < SEGMENTS_MIN {
        return Err(refuse(
            "disk.bytes_max",
            format!(
                "{} is less than {SEGMENTS_MIN} segments of {segment} for each of {shards} shard(s)",
                Size(bytes).about()
            ),
        ));
    }
    let segments_max = u64::from(kv_block::DiskLocation::SEGMENT_MAX) * shards;
    if bytes / segment.0 > segments_max {
        return Err(refuse(
            "disk.segment_bytes",
            format!("{segment} makes more than {segments_max} segments"),
        ));
    }
    if let Some(room) = resources.disk_bytes.filter(|room| *room < bytes) {
        notes.push(format!(
            "the disk tier may grow to {}, but the file system of {} has {}",
            Size(bytes).about(),
            dir.display(),
            Size(room).about()
        ));
    }
    Ok(bytes / segment.0 * segment.0)
}

fn topology_notes(topology: &Topology, shards: &[ShardPlan]) -> Vec<String> {
    let mut notes = Vec::new();
    if topology.guessed {
        notes.push("the kernel tells nothing of NUMA nodes: taken as one".to_owned());
    }
    for node in &topology.nodes {
        let home = shards.iter().find(|shard| shard.serves.contains(&node.number));
        let Some(home) = home.filter(|home| home.serves[0] != node.number) else { continue };
        let why = match (node.cpus_online, node.cpus.len(), node.memory_bytes) {
            (0, _, _) => "has no CPUs",
            (_, 0, _) => "has no CPUs that this process may use",
            _ => "has no memory",
        };
        notes.push(format!("NUMA node {} {why}; shard {} serves it", node.number, home.index));
    }
    notes
}

/// Blocks that a shard has on their way from peers and the object tier at one moment.
const FETCHES_MAX: u32 = 16384;
/// Blocks of a shard that are held at one moment to be copied for the object tier.
const UPLOADS_MAX: u32 = 64;

fn bounds(config: &Config) -> Bounds {
    let depth = config.disk.queue_depth;
    Bounds {
        disk_queue_depth: depth,
        offloads_max: depth * 2,
        onboards_max: depth * 2,
        fetches_max: if config.looks_further() { FETCHES_MAX } else { 0 },
        uploads_max: UPLOADS_MAX,
        stalled_max: config.limits.sessions_max.saturating_mul(16),
        requests_max: 1024,
        events_max: 1 << 16,
    }
}

/// `homes`: shards that one session meets, those of its principal.
fn budget(config: &Config, shards: &[ShardPlan], homes: u64, bounds: &Bounds) -> Vec<BudgetLine> {
    let Config { workers, limits, .. } = config;
    let (count, sessions) = (shards.len() as u64, u64::from(limits.sessions_max));
    let arena: u64 = shards.iter().map(|shard| shard.arena_bytes).sum();
    let entries: u64 = shards.iter().map(|shard| shard.table_entries_max).sum();
    let ring = u64::from(workers.ring_entries) * 64 * 2 + PAGE_BYTES;
    let hazards = u64::from(workers.hazards_max) * 16 + PAGE_BYTES;
    let leases = u64::from(limits.leases_per_session_max);
    let staging = workers.staging_bytes_max;
    let events = u64::from(bounds.events_max) * count;
    let (in_flight, message) = (limits.in_flight_bytes_max, limits.message_bytes_max);
    let line = |owner, how, bytes| BudgetLine { owner, how, bytes };
    let mut lines = vec![
        line(
            "host arenas",
            format!("{count} shard(s), blocks of callers; {} each are there at start", Size(READY_BYTES)),
            arena,
        ),
        line(
            "slot headers",
            "64B for each 4KiB slot; less for larger blocks".into(),
            arena / PAGE_BYTES * SLOT_HEADER_BYTES,
        ),
        line(
            "catalog",
            format!("{entries} entries of {TABLE_BYTES_PER_ENTRY}B"),
            entries * TABLE_BYTES_PER_ENTRY,
        ),
        line("staging", format!("{sessions} sessions of {staging}"), sessions.saturating_mul(staging.0)),
        line(
            "rings",
            format!("{sessions} sessions, {homes} shard(s), {} entries both ways", workers.ring_entries),
            sessions * homes * ring,
        ),
        line(
            "hazards",
            format!("{sessions} sessions, {homes} shard(s), {} each", workers.hazards_max),
            sessions * homes * hazards,
        ),
        line(
            "leases",
            format!("{sessions} sessions of {leases}, 64B each"),
            sessions.saturating_mul(leases * 64),
        ),
        line("blocks coming over gRPC", "limits.in_flight_bytes_max".into(), in_flight.0),
        line("requests", format!("{sessions} messages of {message}"), sessions.saturating_mul(message.0)),
        line("events", format!("{events} kept, 48B each"), events * 48),
    ];
    let peers = config.peers().count() as u64;
    if config.looks_further() {
        // A search, its want and its read; what it lands in is of the arena.
        let searches = u64::from(bounds.fetches_max) * count;
        lines.push(line(
            "searches beyond",
            format!("{count} shard(s) of {}, 512B each", bounds.fetches_max),
            searches * 512,
        ));
    }
    if config.peers.listen.get().is_some() {
        let wants = u64::from(config.peers.wants_max);
        let readers = peers.max(1) * crate::peers::CONNECTIONS_MAX as u64;
        lines.push(line(
            "wants of peers",
            format!(
                "{readers} readers of {wants}, 256B each; a node may have {} at once",
                crate::peers::CONNECTIONS_MAX
            ),
            readers * wants * 256,
        ));
    }
    if config.object_store().is_some() {
        let principals = config.principal_names().count() as u64;
        let (waiting, blocks) = (config.object.waiting_bytes_max, config.object.blocks_max);
        lines.push(line(
            "packs on their way",
            format!("{principals} principal(s), {waiting} of blocks and as much as they are written"),
            principals.saturating_mul(waiting.0.saturating_mul(2)),
        ));
        lines.push(line(
            "blocks of the object store",
            format!("{principals} principal(s), {blocks} known, 100B each"),
            principals.saturating_mul(blocks * 100),
        ));
    }
    if config.lmcache.listen.get().is_some() {
        let (instances, pool) = (config.lmcache.instances_max, config.lmcache.pool_bytes);
        lines.push(line(
            "lmcache pools",
            format!("{instances} engine workers of {pool}, each made when it registers"),
            u64::from(instances).saturating_mul(pool.0),
        ));
    }
    lines
}
