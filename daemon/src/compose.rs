//! Puts a node together from its plan: opens devices, recovers what is left, starts threads, listens; and
//! takes it apart again when told to stop.
//!
//! ```text
//!   registry -> per shard: memory -> disk -> brain <- adopted host blocks, then blocks found on disk
//!            -> threads: shard 0..n (pinned), growth, worker door, control runtime (gRPC, HTTP)
//!   SIGTERM  -> not ready, no new work -> calls under way end -> listeners close -> shards finish
//!            -> memory stays for the next life
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use kv_arena::{Adoption, Geometry, Grower, HazardSet, MemorySpec, ShardMemory};
use kv_block::code::Code;
use kv_block::{Epoch, Record, SessionId, ShardId};
use kv_node::{Brain, BrainConfig, Event, FetchOp, Micros, Now, ObjectConfig};
use kv_tiers::catalog::Catalog;
use kv_tiers::host::{HostTier, Watermarks};
use kv_tiers::upload::UploadLimits;
use tokio::sync::mpsc;

use crate::config::units::{Admission, HugePages, Policy};
use crate::config::{Config, Loaded};
use crate::disk;
use crate::growth::{Growth, READY_BYTES};
use crate::listen::{RunDir, SocketFile};
use crate::node::{Node, Recovered, TierNotes, quota_share};
use crate::object::ObjectOrders;
use crate::peercred::Caller;
use crate::plan::{Bounds, PRINCIPAL_DIR, Plan, ShardPlan, principal_dir};
use crate::private;
use crate::registry::Registry;
use crate::sessions::{Door, Sessions};
use crate::shard::{Letter, Shard, ShardHandle};
use crate::worker_door::{MemoryFds, MemoryPlace, StopDoor, WorkerDoor};

/// A node whose threads run.
pub struct Running {
    /// What the services ask.
    pub node: Arc<Node>,
    /// The gRPC socket, listening.
    pub grpc: std::os::unix::net::UnixListener,
    threads: Vec<JoinHandle<()>>,
    growth: Growth,
    /// What shards look for among the peers.
    pub fetches: mpsc::UnboundedReceiver<(ShardId, FetchOp, Instant)>,
    /// What they want of the object tier.
    pub objects: ObjectOrders,
    door: Option<(StopDoor, JoinHandle<()>)>,
    /// Held until the end: the run directory's lock and socket files.
    _files: (RunDir, [SocketFile; 2]),
}

/// A shard that is opened and not running yet.
struct Opened {
    shard: Shard,
    handle: ShardHandle,
    fds: MemoryFds,
    notes: TierNotes,
    epoch: Epoch,
    host_blocks: u64,
    disk_blocks: u64,
    /// Nothing on its disk was passed over or set aside.
    seen_all: bool,
    remarks: Vec<String>,
    grower: Option<Grower>,
}

/// Opens everything in the plan and starts the shards.
pub fn start(loaded: &Loaded, plan: &Plan) -> anyhow::Result<Running> {
    let began = Instant::now();
    let config = &loaded.config;
    let run_dir = RunDir::claim(&config.run_dir(), config.listen.socket_mode.0)?;
    let state_dir = config.disk_dir().unwrap_or_else(|| config.memory_dir());
    for dir in std::iter::once(config.memory_dir()).chain(config.disk_dir()) {
        private::dir(&dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    let (registry, note) = Registry::open(Some(state_dir.join("bindings.json")));
    if let Some(note) = &note {
        tracing::warn!(code = %Code::SetAside, "{note}");
    }
    let mut recovered = Recovered { notes: note.into_iter().collect(), ..Recovered::default() };

    let mut epoch = Epoch(1);
    // What arenas opened before will still take, so that one that has no room beside them is refused now.
    let mut promised_bytes = 0;
    let mut opened = Vec::with_capacity(plan.shards.len());
    for shard in &plan.shards {
        let one = open_shard(config, plan, shard, &registry, epoch, promised_bytes)
            .with_context(|| format!("opening shard {}", shard.index))?;
        epoch = epoch.max(one.epoch);
        promised_bytes += one.grower.as_ref().map_or(0, Grower::unclaimed_bytes);
        opened.push(one);
    }

    let left_behind = left_behind(config, plan);
    let seen_all = opened.iter().all(|one| one.seen_all) && left_behind.is_empty() && !others_on_disk(plan);
    recovered.notes.extend(left_behind);
    let forgotten = registry.settle(seen_all);
    tracing::info!(bindings = registry.all().len(), forgotten, "bindings of recovered blocks are known");
    if registry.unnumbered() > 0 {
        let note = format!(
            "{} recovered blocks are of scopes and slices for which no number was left ({}); they are not served",
            registry.unnumbered(),
            Code::TooManyBindings
        );
        tracing::warn!(code = %Code::TooManyBindings, "{note}");
        recovered.notes.push(note);
    }
    let sessions = Sessions::new(config.limits.sessions_max as usize + 1);
    // Of nobody who can call: its number opens nothing.
    let guest = sessions.open("grpc".into(), Door::Grpc, Caller::Unknown, 0).map_err(anyhow::Error::new)?.id;
    let (fetch_door, fetches) = mpsc::unbounded_channel();
    let (object_door, objects) = crate::object::door();
    let mut shards = Vec::new();
    let mut memory = Vec::new();
    let mut notes = Vec::new();
    let mut ready = Vec::new();
    let mut growers = Vec::new();
    for (mut one, shard_plan) in opened.into_iter().zip(&plan.shards) {
        recovered.host_blocks += one.host_blocks;
        recovered.disk_blocks += one.disk_blocks;
        recovered.notes.append(&mut one.remarks);
        let principal = &plan.principals[usize::from(shard_plan.principal)];
        for (tenant, whole) in quotas(config, &plan.shards[principal.shards.clone()]) {
            let home = usize::from(shard_plan.home);
            let bytes_max = Some(quota_share(whole, home, principal.shards.len()));
            one.shard.tell(Event::Quota { tenant, bytes_max });
        }
        // Those that shards opened after this one brought.
        for bound in registry.all() {
            one.shard.tell(Event::Bound(bound.binding()));
        }
        one.shard.tell(Event::Opened { session: guest });
        one.shard.set_peers(fetch_door.clone());
        one.shard.set_object(object_door.clone());
        growers.extend(one.grower.map(|grower| (one.handle.clone(), grower)));
        shards.push(one.handle);
        memory.push(one.fds);
        notes.push(one.notes);
        ready.push((one.shard, shard_plan.shard_cpus.clone(), shard_plan.index));
    }
    let threads = ready
        .into_iter()
        .map(|(shard, cpus, index)| spawn(format!("shard-{index}"), cpus, move || shard.run()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut growth = Growth::default();
    for (shard, grower) in growers {
        growth.add(shard, grower)?;
    }
    recovered.took = began.elapsed();

    let node = Arc::new(Node::new(
        config.node_name().to_owned(),
        epoch,
        shards,
        registry,
        sessions,
        guest,
        recovered,
        notes,
        plan.region_bytes,
        plan.principals.clone(),
    ));
    let (grpc, grpc_file) = run_dir.listen_grpc()?.split();
    let (workers, workers_file) = run_dir.listen_workers()?.split();
    let (door, stop) = WorkerDoor::new(Arc::clone(&node), Arc::new(config.clone()), memory, workers.into())?;
    let door = (stop, spawn("worker-door".into(), Vec::new(), move || door.run())?);
    Ok(Running {
        node,
        grpc,
        threads,
        growth,
        fetches,
        objects,
        door: Some(door),
        _files: (run_dir, [grpc_file, workers_file]),
    })
}

impl Running {
    /// Ends the threads. Host memory and disk keep what they have.
    pub fn stop(mut self) {
        if let Some((stop, thread)) = self.door.take() {
            stop.stop();
            let _ = thread.join();
        }
        self.growth.stop();
        self.node.stop_shards();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a shard ended in a panic; its memory is verified at the next start");
            }
        }
    }
}

pub(crate) fn spawn(
    name: String,
    cpus: Vec<u32>,
    body: impl FnOnce() + Send + 'static,
) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.clone()).spawn(move || {
        if !cpus.is_empty()
            && let Err(error) = kv_arena::numa::pin_current_thread(&cpus)
        {
            tracing::warn!(thread = name, ?cpus, %error, "the thread could not be pinned; it runs where it may");
        }
        body();
    })
}

/// Directories of principals that are in the configuration no more. They take room, and are nobody's to open.
fn left_behind(config: &Config, plan: &Plan) -> Vec<String> {
    let known: Vec<String> =
        plan.principals.iter().skip(1).map(|principal| principal_dir(&principal.name)).collect();
    let dirs = std::iter::once(config.memory_dir()).chain(config.disk_dir());
    let entries = dirs.filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten();
    let left = entries.filter(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with(PRINCIPAL_DIR) && !known.contains(&name)
    });
    left.map(|entry| {
        let path = entry.path();
        format!(
            "{} is of a principal that is not configured: remove it, or bring the principal back",
            path.display()
        )
    })
    .collect()
}

/// Whether the disk has logs of shards that are not in the plan. Their blocks come back when the shards do.
fn others_on_disk(plan: &Plan) -> bool {
    let ours: Vec<&Path> =
        plan.shards.iter().filter_map(|shard| Some(shard.disk.as_ref()?.dir.as_path())).collect();
    let homes = ours.iter().filter_map(|dir| dir.parent());
    let mut entries = homes.filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten();
    entries.any(|entry| {
        let is_log = entry.file_name().to_string_lossy().starts_with("shard-");
        is_log && !ours.contains(&entry.path().as_path())
    })
}

/// Quota of each configured tenant on all shards of a principal together, in bytes.
fn quotas(config: &Config, shards: &[ShardPlan]) -> Vec<(String, u64)> {
    let arena: u64 = shards.iter().map(|shard| shard.arena_bytes).sum();
    let quota = |tenant: &crate::config::Tenant| tenant.bytes_max.get().map(|size| size.of(arena));
    config.tenants.iter().filter_map(|(name, tenant)| Some((name.clone(), quota(tenant)?))).collect()
}

fn open_shard(
    config: &Config,
    plan: &Plan,
    shard: &ShardPlan,
    registry: &Registry,
    epoch_floor: Epoch,
    promised_bytes: u64,
) -> anyhow::Result<Opened> {
    let id = ShardId(shard.index);
    // Files go by principal and home, which stay; numbers of shards follow from who else there is.
    let place = MemoryPlace { dir: shard.memory_dir.clone(), number: ShardId(shard.home) };
    let spec = MemorySpec {
        dir: place.dir.clone(),
        name: format!("shard-{}", place.number),
        geometry: Geometry {
            regions: shard.regions,
            region_bytes: plan.region_bytes,
            table_entries_max: shard.table_entries_max,
        },
        numa_node: shard.numa_node,
        huge: match config.host.huge_pages {
            HugePages::Auto => kv_arena::HugePages::Auto,
            HugePages::Off => kv_arena::HugePages::Off,
            HugePages::Required => kv_arena::HugePages::Required,
        },
        hugetlbfs_dir: config.host.hugetlbfs_dir.get().map(|path| PathBuf::from(&path.0)),
        ready_bytes: READY_BYTES,
        promised_bytes,
    };
    let mut remarks = Vec::new();
    // A reboot takes the memory and its epochs; the clock keeps later lives apart from earlier ones.
    let (mut memory, adoption) = ShardMemory::open(&spec, epoch_floor)?;
    match &adoption {
        Adoption::Fresh => tracing::info!(shard = shard.index, "host memory is new"),
        Adoption::Adopted { previous, slots } => {
            tracing::info!(shard = shard.index, %previous, slots, "host memory was kept");
        }
        Adoption::SetAside { why, to } => {
            let remark =
                format!("host memory of shard {} was set aside as {}: {why}", shard.index, to.display());
            tracing::warn!(code = %Code::SetAside, shard = shard.index, "{remark}");
            remarks.push(remark);
        }
    }
    let grower = memory.take_grower();
    let hazards = HazardSet::adopt(&place.dir, place.number)?;
    let table = memory.take_table()?.context("the catalog table has one writer")?;
    let catalog = Catalog::new(table, shard.ghosts_max as usize);
    let host = HostTier::new(
        memory.slab().clone(),
        match config.host.policy {
            Policy::Sieve => kv_tiers::evict::PolicyKind::Sieve,
            Policy::S3Fifo => kv_tiers::evict::PolicyKind::S3Fifo,
            Policy::Lru => kv_tiers::evict::PolicyKind::Lru,
        },
        Watermarks { low: config.host.free_low_ratio.ratio(), high: config.host.free_high_ratio.ratio() },
    );
    let epoch = memory.epoch();
    let numa_node = shard.numa_node.and_then(|node| u16::try_from(node).ok());
    let fds = MemoryFds::of(id, usize::from(shard.principal), place, numa_node, &memory)?;
    let mut notes = TierNotes {
        host: memory.notes().to_vec(),
        numa_node: shard.numa_node.unwrap_or(0),
        ..TierNotes::default()
    };
    let brain = Brain::new(brain_config(config, &plan.bounds, shard, epoch), catalog, host);
    let (mut one, handle) = Shard::new(id, brain, memory, hazards, plan.bounds.requests_max as usize)?;
    for bound in registry.all() {
        one.tell(Event::Bound(bound.binding()));
    }
    let now = now();
    let mut bind = |record: &Record| Some(registry.recovered(record)?.binding());
    let host_blocks = one.brain_mut().recover_host(now, &mut bind);
    let (mut disk_blocks, mut seen_all) = (0, true);
    if let Some(disk_plan) = &shard.disk {
        let disk::OpenedDisk { store, mut found } =
            disk::open(config, disk_plan, &plan.bounds, shard, handle.slab(), handle.waker())?;
        for batch in found.by_ref() {
            disk_blocks += one.brain_mut().recover_disk(now, &batch, &mut bind);
        }
        let report = found.finish()?;
        seen_all = report.set_aside.is_empty() && report.segments_unread == 0;
        for remark in &report.set_aside {
            tracing::warn!(code = %Code::SetAside, shard = shard.index, "{remark}");
        }
        for note in &report.notes {
            tracing::warn!(shard = shard.index, "{note}");
        }
        notes.disk = store.notes();
        notes.disk.extend(report.set_aside.iter().chain(&report.notes).cloned());
        remarks.extend(report.set_aside);
        notes.disk_bytes_max = disk_plan.segment_bytes * u64::from(disk_plan.segments_max);
        one.set_store(Box::new(store));
    }
    tracing::info!(shard = shard.index, host_blocks, disk_blocks, "recovered");
    Ok(Opened { shard: one, handle, fds, notes, epoch, host_blocks, disk_blocks, seen_all, remarks, grower })
}

fn now() -> Now {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Now { micros: Micros(1), unix: u32::try_from(unix).unwrap_or(u32::MAX) }
}

fn brain_config(config: &Config, bounds: &Bounds, shard: &ShardPlan, epoch: Epoch) -> BrainConfig {
    use kv_tiers::admit::AdmissionKind;
    let admission = match config.disk.admission {
        Admission::Frequency => AdmissionKind::Frequency,
        Admission::Budget => AdmissionKind::Budget,
        Admission::All => AdmissionKind::All,
        Admission::Never => AdmissionKind::Never,
    };
    BrainConfig {
        shard: ShardId(shard.index),
        epoch,
        disk: shard.disk.as_ref().map(|_| admission),
        leases_per_session_max: config.limits.leases_per_session_max as usize,
        sessions_max: config.limits.sessions_max as usize,
        pinned_bytes_max: shard.pinned_bytes_max,
        pending_ttl_ms: config.limits.pending_ttl.0.as_millis() as u64,
        stalled_max: bounds.stalled_max as usize,
        offloads_max: bounds.offloads_max as usize,
        onboards_max: bounds.onboards_max as usize,
        fetches_max: bounds.fetches_max as usize,
        peers: config.peers().next().is_some(),
        fetch_limit_ms: config.peers.fetch_limit.0.as_millis() as u64,
        object: config.object_store().map(|_| ObjectConfig {
            upload: UploadLimits {
                reads_min: config.object.reads_min,
                age_min: config.object.age_min.0,
                life_min: config.object.life_min.0,
            },
            uploads_max: bounds.uploads_max as usize,
            fetch_limit_ms: config.object.fetch_limit.0.as_millis() as u64,
        }),
        events_kept_max: bounds.events_max as usize,
    }
}

/// Tells every shard that a session is over: for sessions that end with this process.
pub fn end_session(node: &Node, session: SessionId) {
    for shard in &node.shards {
        shard.post_surely(Letter::Detach { session });
    }
    node.sessions.close(session);
}
