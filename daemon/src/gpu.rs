//! GPUs of this node: workers register what of a device's memory is their KV cache, and the daemon copies blocks between
//! that and its own memory.
//!
//! ```text
//!   calls (rpc/devices) -- RegisterCache --> cache.rs   handles opened, layout checked; goes with its session
//!                       -- Save, Load -----> engine.rs  one thread for each device: copies, in order and bounded
//!   arena.rs  host memory made known to the driver     sums.rs  checksums of what came     view.rs  for operators
//! ```
//! A machine without a driver or a device has none of this, and everything else goes on as it does: blocks come and go
//! through host memory. Nothing here outlives the daemon; after a restart workers register again.

pub mod arena;
pub mod cache;
pub mod closer;
pub mod engine;
pub mod sums;
pub mod view;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use anyhow::Context as _;
use kv_block::code::Code;
use kv_block::layout::EngineLayout;
use kv_block::{BindingTag, BlockKey, Checksum, Fault, Priority, Record, SessionId};
use kv_gpu::copier::{Copier, CopierConfig, Method};
use kv_gpu::{
    Device, DeviceMemory, Driver, Event, EventHandle, Facts, MemoryHandle, Place, Pool, PoolConfig,
    SharedPiece, Uuid,
};
use kv_tiers::store::BlockStore as _;
use kv_wire::message::Sight;
use tokio::sync::oneshot;

use self::arena::Arenas;
use self::cache::{Cache, unknown};
use self::closer::Closing;
use self::engine::{Engine, Kept, Of, Order, Stats, fault_of, lock, try_lock};
use self::sums::Sums;
use self::view::{GpuState, GpuView, GpusView};
use crate::config::Config;
use crate::config::units::{CopyMethod, GpuUse, Size};
use crate::node::Node;
use crate::plan::{GpuPlan, Plan};

/// Unit in which a pool gives memory back, unless the pool is small: then it has so many at least.
const POOL_SEGMENT_BYTES: u64 = 64 << 20;
const POOL_SEGMENTS_MIN: u64 = 8;
/// Tensors and events of one cache, at most.
const PARTS_MAX: usize = 65_536;

/// The GPUs of a node. Cheap to clone.
#[derive(Clone)]
pub struct Gpus(Arc<Inner>);

struct Inner {
    /// Why there are none.
    absent: Option<String>,
    driver: Option<String>,
    engines: Vec<Handle>,
    /// Devices that could not be opened.
    unused: Vec<GpuView>,
    caches: Mutex<HashMap<u32, Arc<Cache>>>,
    next: AtomicU32,
    caches_max: usize,
}

/// How the others reach a device's thread.
struct Handle {
    device: Device,
    numa_node: Option<u32>,
    /// UUIDs of the others whose memory it can read and write by itself.
    reaches: Vec<String>,
    orders: Sender<Order>,
    stats: Arc<Stats>,
    /// Blocks in its spare memory.
    pool: Option<Kept>,
    /// Why there is none, or less of it than was asked for.
    pool_trouble: Option<String>,
    /// Where what workers shared is let go.
    closer: Sender<Closing>,
}

/// GPUs whose threads run.
pub struct Running {
    /// What the services ask.
    pub gpus: Gpus,
    threads: Vec<JoinHandle<()>>,
    sums: Option<Sums>,
}

/// What a worker shares of a device's memory.
pub enum Shared {
    /// An allocation.
    Ipc(MemoryHandle),
    /// Pieces at addresses in a row, of which `bytes` from `offset` on.
    Pieces {
        /// In their order.
        pieces: Vec<SharedPiece>,
        /// Where it begins in the first.
        offset: u64,
        /// How long it is.
        bytes: u64,
    },
}

/// A cache to be registered.
pub struct Registration {
    /// Whose.
    pub session: SessionId,
    /// On which device.
    pub device: Uuid,
    /// Its tensors.
    pub tensors: Vec<Shared>,
    /// How pages lie in them.
    pub layout: EngineLayout,
    /// The worker's events.
    pub events: Vec<EventHandle>,
}

/// Looks for GPUs and starts a thread for each. Ends the daemon where they are required and there is none.
pub fn start(node: &Arc<Node>, config: &Config, plan: &Plan) -> anyhow::Result<Running> {
    let none =
        |why: String| Running { gpus: Gpus(Arc::new(Inner::none(why))), threads: Vec::new(), sums: None };
    if config.gpu.enabled == GpuUse::Off {
        return Ok(none("gpu.enabled is off".into()));
    }
    let found = match config.gpu.driver.get() {
        Some(path) => Driver::load_from(path.0.as_os_str()),
        None => Driver::load(),
    };
    let driver = match found {
        Ok(driver) => driver,
        Err(why) if config.gpu.enabled == GpuUse::Required => {
            return Err(anyhow::Error::new(why).context("gpu.enabled is required, and no GPU can be used"));
        }
        Err(why) => {
            tracing::info!(%why, "no GPU is used");
            return Ok(none(why.to_string()));
        }
    };
    let slabs = node.shards.iter().map(|shard| shard.slab().clone()).collect();
    let arenas = Arc::new(Arenas::new(slabs));
    let open_bytes_max = plan.shards.iter().map(|shard| shard.arena_bytes).sum::<u64>() / 4;
    let sums = Sums::start(sum_threads(config)).context("starting the threads that sum")?;
    let (mut engines, mut threads) = (Vec::new(), Vec::new());
    let devices =
        driver.devices().map_err(|error| anyhow::anyhow!("asking the CUDA driver for its devices: {error}"));
    let devices = match devices {
        Ok(devices) => devices,
        Err(error) if config.gpu.enabled == GpuUse::Required => return Err(error),
        Err(error) => {
            tracing::warn!(code = %Code::GpuError, "{error:#}; no GPU is used");
            return Ok(none(format!("{error:#}")));
        }
    };
    let mut unused = Vec::new();
    for facts in &devices {
        let ordinal = facts.ordinal;
        let home = plan.gpu(&facts.pci);
        let opened = driver.open(ordinal).and_then(|device| {
            let copier = Copier::new(&device, copier_config(config))?;
            let (pool, trouble) = pool(&device, config)?;
            Ok((device, copier, pool, trouble))
        });
        let (device, copier, pool, pool_trouble) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                tracing::warn!(code = %Code::GpuError, ordinal, %error, "a GPU cannot be used");
                unused.push(unused_view(facts, home, &error));
                continue;
            }
        };
        let (door, orders) = mpsc::channel();
        let stats = Arc::new(Stats::default());
        tracing::info!(gpu = ?device, name = device.facts().name, method = copier.method_why(), "a GPU is used");
        let parts = (copier, pool.clone(), Arc::clone(&arenas), orders, sums.door(), Arc::clone(&stats));
        let numa_node = home.map(|home| home.node);
        let cpus = home.map_or_else(Vec::new, |home| home.cpus.clone());
        threads.push(crate::compose::spawn(format!("gpu-{ordinal}"), cpus, move || {
            let (copier, pool, arenas, orders, sums, stats) = parts;
            Engine::new(copier, pool, arenas, orders, sums, stats, open_bytes_max).run();
        })?);
        engines.push(Handle {
            device,
            numa_node,
            reaches: Vec::new(),
            orders: door,
            stats,
            pool,
            pool_trouble,
            closer: closer::start(ordinal)?,
        });
    }
    if engines.is_empty() && config.gpu.enabled == GpuUse::Required {
        let reasons: Vec<String> = unused.iter().map(|gpu| gpu.reason.clone()).collect();
        anyhow::bail!("gpu.enabled is required, and no GPU can be used: {}", reasons.join("; "));
    }
    meet(&mut engines);
    let gpus = Gpus(Arc::new(Inner {
        absent: engines
            .is_empty()
            .then(|| "no device of the CUDA driver can be used; see the log".to_owned()),
        driver: Some(driver.version().to_string()),
        engines,
        unused,
        caches: Mutex::default(),
        next: AtomicU32::new(1),
        caches_max: config.gpu.caches_max as usize,
    }));
    let of_session = gpus.clone();
    node.sessions.when_closed(move |session| of_session.forget_session(session));
    Ok(Running { gpus, threads, sums: Some(sums) })
}

impl Running {
    /// Ends the threads when their devices are done, after a while in any case. What waits for them is told.
    pub fn stop(self) {
        for engine in &self.gpus.0.engines {
            let _ = engine.orders.send(Order::Stop);
        }
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a GPU's thread ended in a panic");
            }
        }
        if let Some(sums) = self.sums {
            sums.stop();
        }
        self.gpus.lock().clear();
    }
}

impl Inner {
    fn none(why: String) -> Self {
        Self {
            absent: Some(why),
            driver: None,
            engines: Vec::new(),
            unused: Vec::new(),
            caches: Mutex::default(),
            next: AtomicU32::new(1),
            caches_max: 0,
        }
    }
}

impl Gpus {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<Cache>>> {
        self.0.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens what a worker shares. Calls of the driver: not for a thread that must not wait. `is_open`: whether its session
    /// still is, which may end meanwhile, with nobody to give the cache back.
    pub fn register(
        &self,
        registration: Registration,
        is_open: impl Fn() -> bool,
    ) -> Result<Arc<Cache>, Fault> {
        let Registration { session, device: uuid, tensors, layout, events } = registration;
        if let Some(why) = &self.0.absent {
            return Err(Fault::new(Code::NoGpu, format!("this node uses no GPU: {why}")));
        }
        let at = self.0.engines.iter().position(|engine| engine.device.facts().uuid == uuid);
        let Some(at) = at else {
            let here: Vec<String> =
                self.0.engines.iter().map(|engine| engine.device.facts().uuid.to_string()).collect();
            let text = format!("this node uses no GPU {uuid}; it has {}", here.join(", "));
            return Err(Fault::new(Code::NoGpu, text));
        };
        let has = self.lock().values().filter(|cache| cache.session == session).count();
        if has >= self.0.caches_max {
            let text = format!("the session has registered {has} caches, as many as it may (gpu.caches_max)");
            return Err(Fault::new(Code::TooManyCaches, text));
        }
        if tensors.len().max(events.len()) > PARTS_MAX {
            let text = format!("a cache has at most {PARTS_MAX} tensors and as many events");
            return Err(Fault::new(Code::TooManyCaches, text));
        }
        let device = &self.0.engines[at].device;
        let open = |shared: Shared| match shared {
            Shared::Ipc(handle) => device.open_memory(&handle),
            Shared::Pieces { pieces, offset, bytes } => device.open_pieces(pieces, offset, bytes),
        };
        let tensors: Vec<DeviceMemory> =
            tensors.into_iter().map(open).collect::<Result<_, _>>().map_err(|error| fault_of(&error))?;
        let open = |handle: EventHandle| device.open_event(&handle).map(Arc::new);
        let events: Vec<Arc<Event>> =
            events.into_iter().map(open).collect::<Result<_, _>>().map_err(|error| fault_of(&error))?;
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let closer = self.0.engines[at].closer.clone();
        let cache = Arc::new(Cache::new(id, session, at, tensors, layout, events, closer)?);
        self.lock().insert(id, Arc::clone(&cache));
        if !is_open() {
            self.lock().remove(&id);
            let text = format!("session {session} ended while the cache was registered");
            return Err(Fault::new(Code::UnknownSession, text));
        }
        Ok(cache)
    }

    /// A cache of this session.
    pub fn cache(&self, session: SessionId, id: u32) -> Result<Arc<Cache>, Fault> {
        let found = self.lock().get(&id).filter(|cache| cache.session == session).cloned();
        found.ok_or_else(|| unknown(id))
    }

    /// Lets go of a cache. What comes back is told when its memory is closed: then its owner may free it.
    pub fn forget(&self, cache: Arc<Cache>) -> oneshot::Receiver<()> {
        self.lock().remove(&cache.id);
        cache.forget();
        let closed = cache.when_closed();
        self.order(cache.engine, Order::Forget(Of::Cache(cache.id)));
        // It is closed when nobody has it, and this would be somebody.
        drop(cache);
        closed
    }

    /// What comes back is told when no copy of it is under way any more that had begun before.
    pub fn quiesce(&self, cache: &Arc<Cache>) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.order(cache.engine, Order::Quiesce(Of::Cache(cache.id), sender));
        receiver
    }

    /// What comes back is told when no copy is under way any more of caches that were given up on this cache's device. Its
    /// pages may be theirs: a worker that lost its session registers again.
    pub fn quiesce_forgotten(&self, cache: &Arc<Cache>) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.order(cache.engine, Order::Quiesce(Of::Forgotten, sender));
        receiver
    }

    /// A session is over: its caches go, as soon as the devices are done with them.
    pub fn forget_session(&self, session: SessionId) {
        let gone: Vec<Arc<Cache>> =
            self.lock().extract_if(|_, cache| cache.session == session).map(|(_, cache)| cache).collect();
        let mut engines: Vec<usize> = gone.iter().map(|cache| cache.engine).collect();
        gone.iter().for_each(|cache| cache.forget());
        engines.sort_unstable();
        engines.dedup();
        for engine in engines {
            self.order(engine, Order::Forget(Of::Session(session)));
        }
    }

    /// Hands an order to the thread of a device. When that has ended, so has the order.
    pub fn order(&self, engine: usize, order: Order) {
        let Some(engine) = self.0.engines.get(engine) else { return order.refuse() };
        if let Err(back) = engine.orders.send(order) {
            back.0.refuse();
        }
    }

    /// Where a pool has this block, for a copy to this cache: that of its own device, or of one that it reaches. The block
    /// is what the catalog says: of this length and checksum.
    pub fn resident(&self, cache: &Cache, key: &BlockKey, bytes: u32, checksum: Checksum) -> Option<Place> {
        let record = Record {
            key: *key,
            checksum,
            bytes,
            tag: BindingTag(0),
            priority: Priority::Normal,
            expires_at: 0,
        };
        let own = self.0.engines.get(cache.engine)?;
        let is_near = |other: &&Handle| own.reaches.contains(&other.device.facts().uuid.to_string());
        let pools = std::iter::once(own).chain(self.0.engines.iter().filter(is_near));
        pools.filter_map(|engine| engine.pool.as_ref()).find_map(|pool| try_lock(pool)?.get(key, &record))
    }

    /// Whether a pool has something under this name.
    pub fn has(&self, key: &BlockKey) -> bool {
        self.pools().any(|pool| lock(pool).contains(key))
    }

    /// Gives up what pools have of this block; whether any had something. With `dry_run` that is all that is found out.
    pub fn evict(&self, key: &BlockKey, dry_run: bool) -> bool {
        let had = self.has(key);
        if had && !dry_run {
            self.pools().for_each(|pool| lock(pool).forget(key));
        }
        had
    }

    fn pools(&self) -> impl Iterator<Item = &Kept> {
        self.0.engines.iter().filter_map(|engine| engine.pool.as_ref())
    }

    /// Whether any device has a pool.
    pub fn has_pool(&self) -> bool {
        self.pools().next().is_some()
    }

    /// Gives up what pools have of blocks that the catalog does not know any more: after an operator removed some.
    pub fn sweep(&self, node: &Node) {
        for pool in self.pools() {
            let keys: Vec<BlockKey> = lock(pool).keys().collect();
            let sights = node.everything().sights(&keys);
            let gone = keys.iter().zip(sights).filter(|(_, (sight, _))| *sight == Sight::Absent);
            let gone: HashSet<BlockKey> = gone.map(|(key, _)| *key).collect();
            if !gone.is_empty() {
                lock(pool).retain(|key| !gone.contains(key));
            }
        }
    }

    /// What operators see.
    pub fn view(&self) -> GpusView {
        let caches = self.lock();
        let of = |at: usize| caches.values().filter(move |cache| cache.engine == at);
        let gpus = self.0.engines.iter().enumerate().map(|(at, engine)| {
            let Handle { device, numa_node, reaches, stats, pool, pool_trouble, .. } = engine;
            let pool = pool.as_ref().and_then(|pool| Some(try_lock(pool)?.report())).unwrap_or_default();
            let facts = device.facts();
            let lost = device.lost();
            let count = |number: &std::sync::atomic::AtomicU64| number.load(Ordering::Relaxed);
            GpuView {
                ordinal: facts.ordinal,
                uuid: facts.uuid.to_string(),
                name: facts.name.clone(),
                bus: facts.pci.clone(),
                numa_node: *numa_node,
                memory_bytes: facts.memory_bytes,
                free_bytes: Some(count(&stats.free_bytes)).filter(|bytes| *bytes > 0),
                state: if lost.is_some() { GpuState::Lost } else { GpuState::Ok },
                reason: lost.map(|why| why.to_string()).unwrap_or_default(),
                method: stats.method.get().cloned().unwrap_or_default(),
                caches: of(at).count() as u32,
                cache_bytes: of(at).map(|cache| cache.bytes()).sum(),
                copies_under_way: count(&stats.under_way),
                bytes_under_way: count(&stats.under_way_bytes),
                copies_waiting: count(&stats.waiting),
                bytes_in: count(&stats.bytes_in),
                bytes_out: count(&stats.bytes_out),
                copies_done: count(&stats.done),
                copies_failed: count(&stats.failed),
                kept: device.kept() as u64,
                pool_trouble: pool_trouble.clone().unwrap_or_default(),
                pool_bytes_max: pool.pool.bytes_max,
                pool_bytes_used: pool.bytes,
                pool_blocks: pool.blocks,
                pool_hits: pool.hits,
                bytes_across: count(&stats.bytes_across),
                reaches: reaches.clone(),
            }
        });
        GpusView {
            driver: self.0.driver.clone(),
            absent: self.0.absent.clone(),
            gpus: gpus.chain(self.0.unused.iter().cloned()).collect(),
        }
    }

    /// Blocks that changed on their way to or from a device since the start.
    pub fn damaged(&self) -> u64 {
        self.0.engines.iter().map(|engine| engine.stats.damaged.load(Ordering::Relaxed)).sum()
    }
}

fn unused_view(facts: &Facts, home: Option<&GpuPlan>, why: &kv_gpu::Error) -> GpuView {
    GpuView {
        ordinal: facts.ordinal,
        uuid: facts.uuid.to_string(),
        name: facts.name.clone(),
        bus: facts.pci.clone(),
        numa_node: home.map(|home| home.node),
        memory_bytes: facts.memory_bytes,
        state: GpuState::Unused,
        reason: fault_of(why).message,
        ..GpuView::default()
    }
}

/// Lets devices copy from each other's memory where they can.
fn meet(engines: &mut [Handle]) {
    for at in 0..engines.len() {
        let this = &engines[at].device;
        let near = |other: &&Handle| {
            let is_other = other.device.facts().uuid != this.facts().uuid;
            is_other && this.can_reach(&other.device).unwrap_or(false) && this.reach(&other.device).is_ok()
        };
        let reaches =
            engines.iter().filter(near).map(|other| other.device.facts().uuid.to_string()).collect();
        engines[at].reaches = reaches;
    }
}

/// A pool in the device's spare memory, where that is asked for. A device that has no room for it goes on without.
fn pool(device: &Device, config: &Config) -> Result<(Option<Kept>, Option<String>), kv_gpu::Error> {
    let bytes = config.gpu.pool_bytes.0;
    if bytes == 0 {
        return Ok((None, None));
    }
    let segment_bytes =
        POOL_SEGMENT_BYTES.min((bytes / POOL_SEGMENTS_MIN).next_power_of_two() / 2).max(1 << 20);
    let leave_bytes = config.gpu.leave_bytes.0;
    let free = Size(device.free_bytes()?).about();
    let leave = config.gpu.leave_bytes;
    let trouble = |has: &str| {
        let text = format!(
            "{has} of gpu.pool_bytes ({}): {free} were free, of which gpu.leave_bytes leaves {leave} to others, and it takes 4 \
             segments of {} at least",
            config.gpu.pool_bytes,
            Size(segment_bytes)
        );
        tracing::warn!(code = %Code::GpuError, gpu = ?device, "the pool has {text}");
        text
    };
    match Pool::open(device, &PoolConfig { segment_bytes, leave_bytes, ..PoolConfig::new(bytes) }) {
        Ok(pool) => {
            let has = pool.usage().bytes_max;
            let less = (has + segment_bytes <= bytes).then(|| trouble(&Size(has).about()));
            let kept = kv_gpu::Cache::new(pool, kv_gpu::CacheConfig::default());
            Ok((Some(Arc::new(Mutex::new(kept))), less))
        }
        Err(kv_gpu::Error::Full { .. }) => Ok((None, Some(trouble("nothing")))),
        Err(error) => Err(error),
    }
}

fn copier_config(config: &Config) -> CopierConfig {
    let gpu = &config.gpu;
    CopierConfig {
        streams_each_way: gpu.streams as usize,
        under_way_max: gpu.copies_max as usize,
        under_way_bytes_max: gpu.in_flight_bytes_max.0,
        waiting_max: gpu.waiting_max as usize,
        method: match gpu.method {
            CopyMethod::Auto => Method::Auto,
            CopyMethod::Kernel => Method::Kernel,
            CopyMethod::Batch => Method::Batch,
            CopyMethod::Loop => Method::Loop,
        },
    }
}

fn sum_threads(config: &Config) -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let auto = (cpus / 4).clamp(1, 4);
    config.gpu.sum_threads.get().map_or(auto, |count| (*count).clamp(1, 64) as usize)
}
