//! All that the door keeps, by the calls of the protocol.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kv_client::{
    Binding, Client, ClientOptions, Doors, Got, PutOptions, Reservation, SequenceHash, SessionId,
    WorkerOptions,
};
use lru::LruCache;
use tokio::sync::{OnceCell, Semaphore};
use tonic::Status;

use crate::POOL_PREFIX;
use crate::instance::{Instance, Transfer, TransferKey, session_name};
use crate::layout::Layout;
use crate::lookup::{Extent, Held, Lookup, Place, extent, further};
use crate::names::{BadKey, Chains, Wanted};
use crate::pack::{self, SlotWords};
use crate::pool::{Pool, SHM_DIR, Slot, remove_left_over};
use crate::service::ConnectionId;
use crate::wire::{IpcCacheServerKey, RegisterKvCacheEngineDrivenContextRequest as Registration};

/// Requests that are remembered at one moment.
const REQUESTS_MAX: usize = 4096;
/// Lookups that run at one moment; the others wait their turn.
const LOOKUPS_MAX: usize = 64;
/// Transfers that are prepared or committed at one moment.
const TRANSFERS_MAX: usize = 16;
/// Tokens of kept chains, all together.
const CHAIN_TOKENS_MAX: usize = 8 << 20;
/// How long a call to kvd may take.
const CALL_LIMIT: Duration = Duration::from_secs(2);
/// How long a load waits for slots of the pool and for blocks that were not held.
const LOAD_WAIT: Duration = Duration::from_secs(2);
/// How long an engine may take to copy into or out of its slots.
const TRANSFER_TTL: Duration = Duration::from_secs(60);
/// The same once its request has ended.
const ENDED_TTL: Duration = Duration::from_secs(10);
/// How long a lookup may let its caller wait in the hope that the answer to the next question is there already.
const LOOKUP_PATIENCE: Duration = Duration::from_millis(5);
/// Longest that a caller may wait for a lookup.
const WAIT_MAX: Duration = Duration::from_secs(30);
/// Instances that were told once that they are not known.
const STRANGERS_MAX: std::num::NonZeroUsize = std::num::NonZeroUsize::new(1024).unwrap();
/// Bytes for which another thread is worth it.
const BYTES_PER_THREAD: usize = 4 << 20;
const THREADS_MAX: usize = 4;
/// How long a store waits for room that kvd is making, and how often it looks.
const ROOM_WAIT: Duration = Duration::from_millis(250);
const ROOM_LOOK: Duration = Duration::from_millis(2);
/// Chunks announced at a time.
const ANNOUNCED_AT_A_TIME: usize = 64;

/// Tells an operator's list what a session is called.
pub type NameSession = Box<dyn Fn(SessionId, &str) + Send + Sync>;

/// What the door is and may take.
pub struct Options {
    /// Run directory of the daemon.
    pub run_dir: PathBuf,
    /// Tokens of a chunk.
    pub chunk_tokens: u32,
    /// Bytes of the pool of one instance.
    pub pool_bytes: u64,
    /// Permission bits of pools.
    pub pool_mode: u32,
    /// Pools are called `lmcache_l1_pool_<this>_<number>`.
    pub shm_name: String,
    /// Instances at one moment.
    pub instances_max: usize,
    /// Tenant of all blocks.
    pub tenant: String,
    /// What numbers `uint8` elements are; without it, who has such is refused.
    pub uint8_as: Option<String>,
    /// How long a lookup waits for blocks that are announced.
    pub pending_wait: Duration,
    /// How long a lookup waits for blocks that other nodes or the object store have; zero: nobody is asked.
    pub peer_wait: Duration,
    /// How long a lookup's blocks are held at most.
    pub hold_ttl: Duration,
    /// Bytes of the longest block that the daemon takes.
    pub block_bytes_max: u64,
    /// Blocks that a session may have open at once.
    pub hazards_max: u32,
    /// Who hears of the names of sessions.
    pub name_session: NameSession,
}

/// What has happened so far, in chunks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Instances registered now.
    pub instances: u64,
    /// Chunks that lookups asked for and were promised.
    pub promised: u64,
    /// Chunks that lookups asked for and were not.
    pub missed: u64,
    /// Chunks copied to engines.
    pub loaded: u64,
    /// Chunks of loads that failed.
    pub load_failed: u64,
    /// Chunks stored.
    pub stored: u64,
    /// Chunks that were announced and could not be stored.
    pub store_failed: u64,
}

#[derive(Default)]
struct Counts {
    promised: AtomicU64,
    missed: AtomicU64,
    loaded: AtomicU64,
    load_failed: AtomicU64,
    stored: AtomicU64,
    store_failed: AtomicU64,
}

/// The door.
pub struct Door {
    pub(crate) options: Options,
    chains: Chains,
    client: OnceCell<Client>,
    connections: Mutex<HashSet<ConnectionId>>,
    instances: Mutex<HashMap<i64, Arc<Instance>>>,
    /// One registration at a time.
    registering: tokio::sync::Mutex<()>,
    strangers: Mutex<LruCache<i64, ()>>,
    requests: Mutex<HashMap<String, Vec<Arc<Lookup>>>>,
    lookups: Arc<Semaphore>,
    pub(crate) transfers: Arc<Semaphore>,
    counts: Counts,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add(to: &AtomicU64, count: usize) {
    to.fetch_add(count as u64, Ordering::Relaxed);
}

impl Door {
    /// A door with nobody in it. Pools that a daemon left behind under the same name are removed.
    pub fn new(options: Options) -> Arc<Self> {
        for number in 0..=options.instances_max {
            let path = pool_path(&pool_name(&options, number));
            if let Err(error) = remove_left_over(&path) {
                tracing::warn!(%error, "a pool of LMCache's that may be in the way");
            }
        }
        Arc::new(Self {
            chains: Chains::new(options.chunk_tokens as usize, CHAIN_TOKENS_MAX),
            options,
            client: OnceCell::new(),
            connections: Mutex::default(),
            instances: Mutex::default(),
            registering: tokio::sync::Mutex::new(()),
            strangers: Mutex::new(LruCache::new(STRANGERS_MAX)),
            requests: Mutex::default(),
            lookups: Arc::new(Semaphore::new(LOOKUPS_MAX)),
            transfers: Arc::new(Semaphore::new(TRANSFERS_MAX)),
            counts: Counts::default(),
        })
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Counts { promised, missed, loaded, load_failed, stored, store_failed } = &self.counts;
        Counters {
            instances: lock(&self.instances).len() as u64,
            promised: read(promised),
            missed: read(missed),
            loaded: read(loaded),
            load_failed: read(load_failed),
            stored: read(stored),
            store_failed: read(store_failed),
        }
    }

    pub(crate) fn connected(&self, connection: ConnectionId) {
        lock(&self.connections).insert(connection);
    }

    /// A connection has closed: what it held goes back.
    pub(crate) fn disconnected(&self, connection: ConnectionId) {
        lock(&self.connections).remove(&connection);
        let gone: Vec<i64> = lock(&self.instances)
            .values()
            .filter(|instance| instance.connection() == connection)
            .map(|instance| instance.id)
            .collect();
        gone.into_iter().for_each(|id| self.remove(id, "its connection closed"));
        self.end_lookups(|_, lookup| lookup.connection == connection);
    }

    fn is_connected(&self, connection: ConnectionId) -> bool {
        lock(&self.connections).contains(&connection)
    }

    /// Gives everything of everybody back.
    pub fn close(&self) {
        let all: Vec<i64> = lock(&self.instances).keys().copied().collect();
        all.into_iter().for_each(|id| self.remove(id, "the daemon stops"));
        self.end_lookups(|_, _| true);
    }

    /// To be called now and then: gives back what was held too long, and says what sessions are called.
    pub(crate) fn tidy(&self) {
        let now = Instant::now();
        let instances: Vec<_> = lock(&self.instances).values().map(Arc::clone).collect();
        for instance in instances {
            (self.options.name_session)(instance.worker.session(), &instance.session_name());
            let expired = instance.expire(now);
            if expired > 0 {
                tracing::warn!(
                    instance = instance.id,
                    expired,
                    "transfers of LMCache's were never committed"
                );
            }
        }
        self.end_lookups(|_, lookup| now.duration_since(lookup.since) > self.options.hold_ttl);
    }

    fn end_lookups(&self, over: impl Fn(&str, &Lookup) -> bool) {
        let mut gone = Vec::new();
        lock(&self.requests).retain(|request, lookups| {
            let (out, stay) = std::mem::take(lookups).into_iter().partition(|lookup| over(request, lookup));
            *lookups = stay;
            gone.extend::<Vec<Arc<Lookup>>>(out);
            !lookups.is_empty()
        });
        gone.iter().for_each(|lookup| lookup.end());
    }

    fn instance(&self, id: i64) -> Option<Arc<Instance>> {
        lock(&self.instances).get(&id).map(Arc::clone)
    }

    fn remove(&self, id: i64, why: &str) {
        let Some(instance) = lock(&self.instances).remove(&id) else { return };
        instance.close();
        tracing::info!(instance = id, model = instance.model, why, "engine of LMCache's gone");
    }

    fn wanted(&self, key: Option<IpcCacheServerKey>) -> Result<Wanted, BadKey> {
        let wanted = Wanted::parse(key, self.options.chunk_tokens as usize);
        wanted.inspect_err(|error| tracing::debug!(%error, "a key of LMCache's that names nothing"))
    }

    // Registration.

    /// Registers an engine worker; gives name and length of its pool.
    pub(crate) async fn register(
        self: &Arc<Self>,
        connection: ConnectionId,
        said: Registration,
    ) -> Result<(String, u64), Status> {
        let Options { chunk_tokens, block_bytes_max, pool_bytes, .. } = self.options;
        let uint8_as = self.options.uint8_as.as_deref();
        let layout = Layout::parse(&said, chunk_tokens, block_bytes_max, pool_bytes, uint8_as)
            .map_err(|error| self.refused(&said, Status::invalid_argument(error.to_string())))?;
        let world = said.world_size as u32;
        let _one = self.registering.lock().await;
        if let Some(known) = self.instance(said.instance_id) {
            if known.model == said.model_name && known.world == world && known.layout == layout {
                known.belongs_to(connection);
                return Ok((known.pool_name.clone(), known.pool.len()));
            }
            self.remove(known.id, "it registered as something else");
        }
        self.may_register(&said, world, &layout).map_err(|status| self.refused(&said, status))?;
        let made = self.open(&said, world, layout, connection).await;
        let instance = made.map_err(|status| self.refused(&said, status))?;
        let answer = (instance.pool_name.clone(), instance.pool.len());
        lock(&self.strangers).pop(&said.instance_id);
        lock(&self.instances).insert(said.instance_id, Arc::clone(&instance));
        (self.options.name_session)(instance.worker.session(), &instance.session_name());
        let Layout { layers, slots, hidden, dtype, ref meaning, bytes, .. } = instance.layout;
        tracing::info!(
            instance = said.instance_id,
            model = said.model_name,
            world,
            layers,
            slots,
            hidden,
            dtype,
            meaning = meaning.as_deref(),
            chunk_bytes = bytes,
            pool = instance.pool_name,
            session = %instance.worker.session(),
            "engine of LMCache's registered"
        );
        if !self.is_connected(connection) {
            self.remove(said.instance_id, "its connection closed");
        }
        Ok(answer)
    }

    fn refused(&self, said: &Registration, status: Status) -> Status {
        tracing::warn!(
            instance = said.instance_id,
            model = said.model_name.chars().take(128).collect::<String>(),
            why = status.message(),
            "an engine of LMCache's was refused"
        );
        status
    }

    fn may_register(&self, said: &Registration, world: u32, layout: &Layout) -> Result<(), Status> {
        let instances = lock(&self.instances);
        if instances.len() >= self.options.instances_max {
            return Err(Status::resource_exhausted(format!(
                "{} engine workers are registered, as many as lmcache.instances_max allows",
                instances.len()
            )));
        }
        let same = instances.values().filter(|other| other.model == said.model_name && other.world == world);
        for other in same {
            if let Some(field) = other.layout.conflict(layout) {
                return Err(Status::failed_precondition(format!(
                    "field `{field}` differs from that of another engine which is registered for model `{}` and \
                     world size {world}: serve one of the two under another model name",
                    said.model_name
                )));
            }
        }
        Ok(())
    }

    async fn open(
        self: &Arc<Self>,
        said: &Registration,
        world: u32,
        layout: Layout,
        connection: ConnectionId,
    ) -> Result<Arc<Instance>, Status> {
        let unavailable =
            |error: kv_client::Error| Status::unavailable(format!("kvd gives no session: {error}"));
        let options = ClientOptions { deadline: CALL_LIMIT, ..ClientOptions::socket(&self.options.run_dir) };
        let client = self.client.get_or_try_init(|| Client::connect(options)).await.map_err(unavailable)?;
        let options = WorkerOptions {
            name: session_name(&said.model_name),
            // Blocks are filled where they stay.
            staging_bytes: 0,
            trusted: true,
            hazards: self.options.hazards_max,
            ..WorkerOptions::default()
        };
        let worker = client.worker(options).await.map_err(unavailable)?;
        if worker.doors() != (Doors::SharedMemory { in_place: true }) {
            tracing::warn!(doors = ?worker.doors(), "the LMCache door copies blocks once more than it should");
        }
        let door = Arc::clone(self);
        let pool = tokio::task::spawn_blocking(move || door.make_pool()).await;
        let pool = pool.map_err(|_| Status::internal("making the pool was interrupted"))??;
        // Announced blocks take cells of the same table; they get the other half.
        let holds_max = (self.options.hazards_max / 2).max(1) as usize;
        let (id, model) = (said.instance_id, said.model_name.clone());
        let instance = Instance::new(id, model, world, layout, worker, pool, holds_max, connection);
        Ok(Arc::new(instance))
    }

    /// A pool under the first name that is free.
    fn make_pool(&self) -> Result<(Pool, String), Status> {
        let taken: HashSet<String> =
            lock(&self.instances).values().map(|instance| instance.pool_name.clone()).collect();
        // An instance that was removed may still be in use for a moment: one name more than there are instances.
        let names = (0..=self.options.instances_max).map(|number| pool_name(&self.options, number));
        let mut last = None;
        for name in names.filter(|name| !taken.contains(name)) {
            match Pool::create(&pool_path(&name), self.options.pool_bytes, self.options.pool_mode) {
                Ok(pool) => return Ok((pool, name)),
                Err(error) => last = Some(error),
            }
        }
        let why = last.map_or_else(
            || "all names are taken".to_owned(),
            |error| {
                let cause =
                    std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
                format!("{error}{cause}")
            },
        );
        Err(Status::resource_exhausted(format!(
            "no shared memory for another engine worker (lmcache.pool_bytes): {why}"
        )))
    }

    pub(crate) fn unregister(&self, id: i64) {
        self.remove(id, "it unregistered");
    }

    /// Whether all is well with an instance. One that is not known must register again, which it does when a
    /// `true` follows a `false`: so it is told once that it is not known.
    pub(crate) fn ping(&self, id: Option<i64>) -> bool {
        let Some(id) = id else { return true };
        if lock(&self.instances).contains_key(&id) {
            return true;
        }
        lock(&self.strangers).put(id, ()).is_some()
    }

    // Lookups.

    /// Begins a lookup. Comes back soon, with or without a result.
    pub(crate) async fn lookup(self: &Arc<Self>, connection: ConnectionId, key: Option<IpcCacheServerKey>) {
        let Ok(wanted) = self.wanted(key) else { return };
        let lookup = Lookup::new(connection);
        let before = {
            let mut requests = lock(&self.requests);
            if requests.len() >= REQUESTS_MAX && !requests.contains_key(&wanted.request) {
                tracing::debug!(
                    requests = REQUESTS_MAX,
                    "as many requests as there may be; a lookup is a miss"
                );
                return;
            }
            let same = requests.entry(wanted.request.clone()).or_default();
            let before = same.iter().position(|other| other.connection == connection);
            let before = before.map(|at| same.swap_remove(at));
            same.push(Arc::clone(&lookup));
            before
        };
        if let Some(before) = before {
            before.end();
        }
        if !self.is_connected(connection) {
            self.end_lookups(|_, other| other.connection == connection);
            return;
        }
        let (door, running) = (Arc::clone(self), Arc::clone(&lookup));
        tokio::spawn(async move {
            let _turn = Arc::clone(&door.lookups).acquire_owned().await;
            let _ = tokio::task::spawn_blocking(move || door.look(&running, &wanted)).await;
        });
        let _ = lookup.wait(LOOKUP_PATIENCE).await;
    }

    fn look(&self, lookup: &Lookup, wanted: &Wanted) {
        let asked = wanted.chunks.end;
        let promised = self.try_look(lookup, wanted).unwrap_or_else(|error| {
            tracing::debug!(%error, "a lookup failed and is a miss");
            None
        });
        if promised.is_none() {
            lookup.promise_nothing();
        }
        let promised = promised.unwrap_or(0);
        add(&self.counts.promised, promised);
        add(&self.counts.missed, asked.saturating_sub(promised));
    }

    fn try_look(&self, lookup: &Lookup, wanted: &Wanted) -> Result<Option<usize>, kv_client::Error> {
        let engines: Vec<Arc<Instance>> = lock(&self.instances)
            .values()
            .filter(|instance| instance.serves(wanted))
            .map(Arc::clone)
            .collect();
        // One for each form: stages of a pipeline may differ in layers.
        let mut forms: Vec<Arc<Instance>> = Vec::new();
        for engine in engines {
            if forms.iter().all(|form| form.layout != engine.layout) {
                forms.push(engine);
            }
        }
        if wanted.tokens.is_empty() || forms.is_empty() {
            return Ok(None);
        }
        let chain = self.chains.of(&wanted.request, &wanted.tokens);
        let pending_counts = !self.options.pending_wait.is_zero();
        let ranks = wanted.rank.map_or(0..wanted.world, |rank| rank..rank + 1);
        let (mut places, mut all) = (Vec::new(), Extent { blocks: chain.names().len(), ..Extent::default() });
        for rank in ranks {
            let mut best: Option<(Extent, Place)> = None;
            for form in &forms {
                let binding = self.binding(form, &wanted.salt, rank)?;
                let place = Place::new(rank, form, &binding, &chain.names()[..all.blocks]);
                let mut extent = extent(&form.worker, &place.keys, pending_counts)?;
                if extent.blocks < place.keys.len() && !self.options.peer_wait.is_zero() {
                    extent = further(&form.worker, &place.keys, pending_counts, extent);
                }
                if best.as_ref().is_none_or(|(best, _)| best.blocks < extent.blocks) {
                    best = Some((extent, place));
                }
            }
            let Some((extent, place)) = best else { return Ok(None) };
            // More than fits the pool could not be fetched.
            let fits = place.instance.pool.slots(place.instance.layout.bytes.into()) as usize;
            all.blocks = all.blocks.min(extent.blocks).min(fits);
            all.pending |= extent.pending;
            all.abroad |= extent.abroad;
            places.push(place);
            if all.blocks == 0 {
                return Ok(None);
            }
        }
        let Options { pending_wait, peer_wait, .. } = self.options;
        let limit = all.pending.then_some(pending_wait).max(all.abroad.then_some(peer_wait));
        Ok(Some(lookup.run(&places, all.blocks, wanted.readers, limit)))
    }

    fn binding(
        &self,
        instance: &Instance,
        salt: &str,
        rank: u32,
    ) -> Result<kv_client::Binding, kv_client::Error> {
        instance.binding(self.options.chunk_tokens, &self.options.tenant, salt, rank)
    }

    fn lookup_of(&self, connection: ConnectionId, request: &str) -> Option<Arc<Lookup>> {
        let requests = lock(&self.requests);
        requests.get(request)?.iter().find(|lookup| lookup.connection == connection).map(Arc::clone)
    }

    /// The promise to a request, `None` while there is none yet. To a request that is not known: nothing.
    pub(crate) fn promised(&self, connection: ConnectionId, request: &str) -> Option<usize> {
        self.lookup_of(connection, request).map_or(Some(0), |lookup| lookup.promised())
    }

    /// The same, and waits for it.
    pub(crate) async fn wait_promised(
        &self,
        connection: ConnectionId,
        request: &str,
        seconds: f64,
    ) -> Option<usize> {
        let limit = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(WAIT_MAX).min(WAIT_MAX);
        match self.lookup_of(connection, request) {
            Some(lookup) => lookup.wait(limit).await,
            None => Some(0),
        }
    }

    /// Gives held blocks back unread.
    pub(crate) fn free(&self, connection: ConnectionId, key: Option<IpcCacheServerKey>) {
        let Ok(wanted) = self.wanted(key) else { return };
        if let Some(lookup) = self.lookup_of(connection, &wanted.request) {
            lookup.release(wanted.rank, wanted.chunks);
        }
    }

    /// The request is over: its held blocks go back; what its workers still copy has a little time left.
    pub(crate) fn end_session(&self, connection: ConnectionId, request: &str) {
        let ended = {
            let mut requests = lock(&self.requests);
            let Some(lookups) = requests.get_mut(request) else { return };
            let (out, stay): (Vec<_>, Vec<_>) =
                std::mem::take(lookups).into_iter().partition(|lookup| lookup.connection == connection);
            *lookups = stay;
            if lookups.is_empty() {
                requests.remove(request);
            }
            out
        };
        ended.iter().for_each(|lookup| lookup.end());
        let instances: Vec<_> = lock(&self.instances).values().map(Arc::clone).collect();
        instances.iter().for_each(|instance| instance.request_ended(request, ENDED_TTL));
    }

    // Transfers.

    /// The instance and rank that a transfer is for.
    fn transfer(&self, id: i64, wanted: &Wanted) -> Option<(Arc<Instance>, u32)> {
        let instance = self.instance(id)?;
        let rank = wanted.rank?;
        (instance.serves(wanted) && !wanted.chunks.is_empty()).then_some((instance, rank))
    }

    /// Copies blocks into slots of the pool; `None` when one of them cannot be had.
    pub(crate) fn prepare_retrieve(&self, id: i64, key: Option<IpcCacheServerKey>) -> Option<Vec<u8>> {
        let wanted = self.wanted(key).ok()?;
        let (instance, rank) = self.transfer(id, &wanted)?;
        let count = wanted.chunks.len();
        let loaded = self.load(&instance, &wanted, rank);
        let (loaded, why) = match loaded {
            Ok(context) => (Some(context), ""),
            Err(why) => (None, why),
        };
        if loaded.is_none() {
            tracing::warn!(instance = id, chunks = count, why, "a load failed; the engine recomputes");
            add(&self.counts.load_failed, count);
        } else {
            add(&self.counts.loaded, count);
        }
        loaded
    }

    fn load(&self, instance: &Arc<Instance>, wanted: &Wanted, rank: u32) -> Result<Vec<u8>, &'static str> {
        let chunks = wanted.chunks.clone();
        let chain = self.chains.of(&wanted.request, &wanted.tokens);
        let names = &chain.names()[chunks.clone()];
        let binding = self.binding(instance, &wanted.salt, rank).map_err(|_| "kvd has no session for it")?;
        let keys = binding.keys(names);
        let lookups: Vec<_> = lock(&self.requests).get(&wanted.request).cloned().unwrap_or_default();
        let mut blocks: Vec<Option<Source>> = vec![];
        blocks.resize_with(keys.len(), || None);
        for lookup in &lookups {
            for (block, held) in blocks.iter_mut().zip(lookup.fetch(rank, chunks.clone(), &keys)) {
                *block = block.take().or(held.map(Source::Held));
            }
        }
        let missing: Vec<usize> = (0..keys.len()).filter(|at| blocks[*at].is_none()).collect();
        if !missing.is_empty() {
            let keys: Vec<_> = missing.iter().map(|at| keys[*at]).collect();
            let got = instance.worker.acquire_keys(&keys, LOAD_WAIT).map_err(|_| "kvd did not answer")?;
            for (at, got) in missing.into_iter().zip(got) {
                let Got::Block(block) = got else { return Err("a block is not there") };
                blocks[at] = Some(Source::Own(block));
            }
        }
        let slots = instance.take_slots(keys.len(), LOAD_WAIT).ok_or("the pool has no room")?;
        let bytes = instance.layout.bytes as usize;
        let copied = each(slots.iter().zip(blocks.iter().flatten()).collect(), bytes, |(slot, block)| {
            matches!(block.block().copy_with(|at, bytes| slot.write(at, bytes)), Ok(true))
        });
        if copied.len() < keys.len() || copied.contains(&false) {
            return Err("a block is damaged, or the pool cannot be written");
        }
        let context = pack::retrieve(&words(&slots, instance));
        let key = TransferKey::new(wanted, rank, names[names.len() - 1], false);
        let transfer = Transfer { until: Instant::now() + TRANSFER_TTL, slots, announced: Vec::new() };
        if !instance.begin(key, transfer) {
            return Err("the engine is gone");
        }
        lookups.iter().for_each(|lookup| lookup.fetched(rank, chunks.clone()));
        Ok(context)
    }

    /// The engine has copied a load out of its slots.
    pub(crate) fn commit_retrieve(&self, id: i64, key: Option<IpcCacheServerKey>) -> bool {
        self.take_transfer(id, key, false);
        true
    }

    fn take_transfer(
        &self,
        id: i64,
        key: Option<IpcCacheServerKey>,
        store: bool,
    ) -> Option<(Arc<Instance>, Transfer)> {
        let wanted = self.wanted(key).ok()?;
        let (instance, rank) = self.transfer(id, &wanted)?;
        let chain = self.chains.of(&wanted.request, &wanted.tokens);
        let last = *chain.names().last()?;
        let transfer = instance.end(&TransferKey::new(&wanted, rank, last, store))?;
        Some((instance, transfer))
    }

    /// Announces the chunks that kvd lacks and gives a slot for each: their context. Those that there is no room
    /// for are not stored, which is nothing that an engine must know.
    pub(crate) fn prepare_store(&self, id: i64, key: Option<IpcCacheServerKey>) -> Vec<u8> {
        let nothing = || pack::store(&[], &[]);
        let Ok(wanted) = self.wanted(key) else { return nothing() };
        let Some((instance, rank)) = self.transfer(id, &wanted) else { return nothing() };
        let chain = self.chains.of(&wanted.request, &wanted.tokens);
        let names = &chain.names()[wanted.chunks.clone()];
        let before = wanted.chunks.start.checked_sub(1).map(|chunk| chain.names()[chunk]);
        let key = TransferKey::new(&wanted, rank, names[names.len() - 1], true);
        // Asked for again, without a commit: what was announced then is announced anew.
        drop(instance.end(&key));
        let binding = match self.binding(&instance, &wanted.salt, rank) {
            Ok(binding) => binding,
            Err(error) => {
                tracing::debug!(%error, instance = id, "a store has no binding and is left out");
                return nothing();
            }
        };
        let mut announced = self.announce(&instance, &binding, names, before);
        announced.sort_by_key(|(chunk, ..)| *chunk);
        let (mut slots, mut reservations, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
        for (chunk, slot, reservation) in announced {
            chunks.push(chunk);
            slots.push(slot);
            reservations.push(reservation);
        }
        let context = pack::store(&words(&slots, &instance), &chunks);
        if slots.is_empty() {
            return context;
        }
        let transfer = Transfer { until: Instant::now() + TRANSFER_TTL, slots, announced: reservations };
        if instance.begin(key, transfer) { context } else { nothing() }
    }

    /// Announces those of the chunks that kvd lacks, as far as there is room in the pool and in kvd, and gives
    /// each a slot. Room that is being made is waited for, a little: the engine stands still meanwhile. `before` is
    /// the chunk before the first.
    fn announce(
        &self,
        instance: &Instance,
        binding: &Binding,
        names: &[SequenceHash],
        before: Option<SequenceHash>,
    ) -> Vec<(usize, Slot, Reservation)> {
        let until = Instant::now() + ROOM_WAIT;
        let mut announced = Vec::new();
        let mut left: VecDeque<usize> = (0..names.len()).collect();
        let mut spare: Vec<Slot> = Vec::new();
        while !left.is_empty() {
            while spare.len() < ANNOUNCED_AT_A_TIME.min(left.len()) {
                let Some(slot) = instance.pool.take(instance.layout.bytes.into()) else { break };
                spare.push(slot);
            }
            let turn: Vec<usize> = left.drain(..spare.len().min(left.len())).collect();
            if turn.is_empty() {
                tracing::debug!(instance = instance.id, "the pool has no room for a store");
                break;
            }
            let asked: Vec<SequenceHash> = turn.iter().map(|chunk| names[*chunk]).collect();
            let after = turn[0].checked_sub(1).map_or(before, |chunk| Some(names[chunk]));
            let options = PutOptions { after, ..PutOptions::default() };
            let reserved = instance.worker.reserve_many(binding, &asked, &options);
            let reserved = reserved.unwrap_or_else(|error| vec![Err(error)]);
            let (mut again, mut failed) = (Vec::new(), None);
            for (chunk, one) in turn.into_iter().zip(reserved) {
                match one {
                    Ok(Some(reservation)) => {
                        announced.extend(spare.pop().map(|slot| (chunk, slot, reservation)));
                    }
                    Ok(None) => {}
                    Err(error) if error.retry_after().is_some() && Instant::now() < until => {
                        again.push(chunk);
                    }
                    Err(error) => failed = Some(error),
                }
            }
            if let Some(error) = failed {
                tracing::debug!(%error, instance = instance.id, "kvd has no room for a store");
                break;
            }
            if !again.is_empty() {
                std::thread::sleep(ROOM_LOOK);
                again.into_iter().rev().for_each(|chunk| left.push_front(chunk));
            }
        }
        announced
    }

    /// Stores what the engine has copied into its slots; whether all of it is stored.
    pub(crate) fn commit_store(&self, id: i64, key: Option<IpcCacheServerKey>) -> bool {
        let Some((instance, transfer)) = self.take_transfer(id, key, true) else { return false };
        let Transfer { slots, announced, .. } = transfer;
        let pairs: Vec<_> = slots.iter().zip(announced).collect();
        let fill = |(slot, mut reservation): (&Slot, Reservation)| {
            let filled = reservation.fill_with(|at, piece| slot.read(at, piece));
            filled
                .inspect_err(|error| tracing::warn!(%error, instance = id, "the pool cannot be read"))
                .ok()?;
            Some(reservation)
        };
        let asked = pairs.len();
        let filled = each(pairs, instance.layout.bytes as usize, fill);
        let stored = Reservation::commit_many(filled.into_iter().flatten().collect());
        if let Some(error) = stored.iter().find_map(|stored| stored.as_ref().err()) {
            tracing::debug!(%error, instance = id, "a chunk was not stored");
        }
        let good = stored.iter().filter(|stored| stored.is_ok()).count();
        add(&self.counts.stored, good);
        add(&self.counts.store_failed, asked - good);
        good == asked
    }

    /// An engine sends the bytes of a store in the call: it could not map its pool.
    pub(crate) fn sent_in_the_call(&self, id: i64) {
        tracing::warn!(
            instance = id,
            "an engine of LMCache's sends blocks over gRPC, which kvd does not take: it cannot map its pool. It \
             must see the same /dev/shm, and be allowed to write the file (lmcache.pool_mode)"
        );
    }
}

/// A block to load: held since the lookup, or acquired just now.
enum Source {
    Held(Arc<Held>),
    Own(kv_client::BlockGuard),
}

impl Source {
    fn block(&self) -> &kv_client::BlockGuard {
        match self {
            Self::Held(held) => &held.block,
            Self::Own(block) => block,
        }
    }
}

fn words<'a>(slots: &[Slot], instance: &'a Instance) -> Vec<SlotWords<'a>> {
    let layout = &instance.layout;
    let one = |slot: &Slot| SlotWords {
        offset: slot.offset(),
        bytes: layout.bytes.into(),
        shape: &instance.shape,
        dtype: layout.dtype,
    };
    slots.iter().map(one).collect()
}

/// Does `work` for each of the jobs, which move `bytes` each, on as many threads as are worth it. In order.
fn each<T: Send, R: Send>(jobs: Vec<T>, bytes: usize, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    let worth = (jobs.len() * bytes).div_ceil(BYTES_PER_THREAD);
    let threads = cores.min(THREADS_MAX).min(worth).max(1);
    if threads == 1 {
        return jobs.into_iter().map(work).collect();
    }
    let share = jobs.len().div_ceil(threads).max(1);
    let mut jobs = jobs.into_iter();
    let work = &work;
    std::thread::scope(|scope| {
        let parts = (0..threads).map(|_| {
            let part: Vec<T> = jobs.by_ref().take(share).collect();
            scope.spawn(move || part.into_iter().map(work).collect::<Vec<R>>())
        });
        let parts: Vec<_> = parts.collect();
        // One that panicked leaves its jobs undone, and the answer shorter: none of it counts then.
        let done = parts.into_iter().map(|part| part.join().ok()).collect::<Option<Vec<Vec<R>>>>();
        done.unwrap_or_default().into_iter().flatten().collect()
    })
}

fn pool_name(options: &Options, number: usize) -> String {
    format!("{POOL_PREFIX}{}_{number}", options.shm_name)
}

fn pool_path(name: &str) -> PathBuf {
    Path::new(SHM_DIR).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_is_shared_out_comes_back_in_order_and_whole() {
        for count in [0, 1, 2, 3, 7, 100] {
            for bytes in [1, 1 << 20, 100 << 20] {
                let done = each((0..count).collect(), bytes, |job: i32| job % 3 == 0);
                assert_eq!(done, (0..count).map(|job| job % 3 == 0).collect::<Vec<_>>());
            }
        }
    }
}
