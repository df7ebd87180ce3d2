//! One node: a brain over real memory, and between it and the tier what the daemon's `object/` does.
//!
//! ```text
//!   serve --Acquire, Put--> tell: Brain --Find, Into--> reads   --Offered, Landed--> tell
//!                                       --Upload------> uploads --Taken, Known-----> tell      keeper: flush, refresh, collect
//! ```

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::AddAssign;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use kv_arena::hazard::HazardSet;
use kv_arena::table::TableReader;
use kv_arena::{EntryState, Geometry, Held, ShardMemory, Slab, Slot};
use kv_block::{
    BindingId, BlockKey, Checksum, Epoch, MissReason, Record, ScopeId, SessionId, ShardId, Slice, Tier as In,
    payload,
};
use kv_node::{
    Brain, BrainConfig, Command, Event, FetchDone, FetchOp, FetchToken, Keep, Micros, Now, ObjectConfig,
    OfferToken, Op, Origin, Reach, Reply, RequestId, Step, UploadDone, UploadToken,
};
use kv_object::gather::{Ahead, Gather, GatherLimits};
use kv_object::pack::Binding;
use kv_object::{Got, Offer, Store, Tier, TierConfig, Want};
use kv_tiers::admit::AdmissionKind;
use kv_tiers::catalog::Catalog;
use kv_tiers::evict::PolicyKind;
use kv_tiers::host::{HostTier, Watermarks};
use kv_tiers::memory::{MemoryConfig, MemoryStore};
use kv_tiers::store::{BlockStore as _, StoreOp};
use kv_tiers::upload::UploadLimits;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, sleep_until};

use crate::{BLOCK_BYTES, Options};

/// The session of all requests.
const WORKER: SessionId = SessionId(1);
const DEADLINE: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(20);
/// Unix time when it begins.
const BEGAN: u32 = 1_800_000_000;
/// As the daemon's defaults.
const TTL_S: u32 = 7 * 86400;
const UPLOADS_MAX: usize = 64;
const FETCHES_MAX: usize = 16384;
const FETCH_LIMIT_MS: u64 = 10_000;
const COLLECT_EVERY: Duration = Duration::from_secs(600);
const RESCAN_EVERY: u32 = 6;
/// Pages of a segment of the disk.
const SEGMENT_PAGES: u32 = 512;

/// Where the blocks of requests came from.
#[derive(Clone, Copy, Default)]
pub(crate) struct Served {
    pub(crate) host: u64,
    pub(crate) disk: u64,
    pub(crate) object: u64,
    pub(crate) missed: u64,
    /// Found behind one that missed, so of no use.
    pub(crate) behind: u64,
    /// From the store, and in host memory before anybody asked.
    pub(crate) ahead: u64,
}

impl AddAssign for Served {
    fn add_assign(&mut self, other: Self) {
        self.host += other.host;
        self.disk += other.disk;
        self.object += other.object;
        self.missed += other.missed;
        self.behind += other.behind;
        self.ahead += other.ahead;
    }
}

/// What a node did in all.
#[derive(Default)]
pub(crate) struct Sums {
    pub(crate) uploaded: u64,
    pub(crate) lost: u64,
    pub(crate) packs: u64,
    pub(crate) downloaded: u64,
    pub(crate) used: u64,
    pub(crate) reads: u64,
    pub(crate) read: u64,
    pub(crate) span_bytes: u64,
}

pub(crate) struct Node {
    tier: Arc<Tier>,
    binding: Arc<Binding>,
    started: Instant,
    table: TableReader,
    inner: RefCell<Inner>,
    events: RefCell<VecDeque<Event>>,
    telling: Cell<bool>,
    /// Something was taken that is to be packed in time.
    taken: Notify,
    /// Came from the store, and no request was served it since.
    fresh: RefCell<HashSet<BlockKey>>,
    downloaded: Cell<u64>,
    used: Cell<u64>,
    /// Whether the brain is told which block comes before which.
    in_order: bool,
    refresh: Duration,
}

/// A block to be copied for the tier.
struct UploadOrder {
    upload: UploadToken,
    held: Held,
    expires_at: u32,
    parent: Option<BlockKey>,
}

struct Inner {
    brain: Brain,
    slab: Slab,
    hazards: HazardSet,
    disk: Option<MemoryStore>,
    parked: VecDeque<StoreOp>,
    asked: HashMap<u64, oneshot::Sender<Reply>>,
    last_request: u64,
    fetches: mpsc::UnboundedSender<FetchOp>,
    uploads: mpsc::UnboundedSender<UploadOrder>,
    _memory: ShardMemory,
}

impl Node {
    pub(crate) async fn open(
        number: u64,
        store: Arc<dyn Store>,
        options: &Options,
    ) -> anyhow::Result<Rc<Self>> {
        let scale = options.scale();
        let mut config = TierConfig::new(format!("node-{number}"), Epoch(1));
        config.seed = number;
        config.packer.pack_bytes = (options.pack_mib << 20) / scale;
        config.packer.age_max = Duration::from_secs(options.wait_s);
        config.packer.waiting_bytes_max /= scale;
        config.ttl_s = Some(TTL_S);
        config.round_min = COLLECT_EVERY;
        let reach = &mut config.reach;
        if options.span_mib > 0 {
            reach.span_bytes_max = options.span_mib << 20;
        }
        if options.gap_mib > 0 {
            reach.gap_bytes_max = options.gap_mib << 20;
        }
        match options.ahead {
            0 => {}
            1_000_000 => reach.ahead_blocks_max = 0,
            some => reach.ahead_blocks_max = some as usize,
        }
        for bytes in [&mut reach.gap_bytes_max, &mut reach.span_bytes_max, &mut reach.ahead_bytes_max] {
            *bytes /= scale;
        }
        let mut gather = GatherLimits::default();
        gather.bytes_max /= scale;
        let tier = Arc::new(Tier::open(store, config, BEGAN).await?.0);

        let entries = (options.host + options.disk) * 2;
        let regions = (options.host * u64::from(BLOCK_BYTES)).div_ceil(2 << 20) as u32;
        let ghosts = options.host * 4;
        let geometry = Geometry { regions, region_bytes: 2 << 20, table_entries_max: entries + ghosts };
        let mut memory = ShardMemory::anonymous(geometry)?;
        let table = memory.table_reader();
        let catalog = Catalog::new(memory.take_table()?.expect("it is new"), ghosts as usize);
        let slab = memory.slab().clone();
        let host = HostTier::new(slab.clone(), PolicyKind::Sieve, Watermarks::default());
        let segments = options.disk * u64::from(BLOCK_BYTES) / 4096 / u64::from(SEGMENT_PAGES);
        let disk = (options.disk > 0).then(|| {
            MemoryStore::new(MemoryConfig {
                segments: segments as u32,
                segment_pages: SEGMENT_PAGES,
                in_flight_max: 256,
            })
        });
        let mut brain = Brain::new(
            BrainConfig {
                shard: ShardId(0),
                epoch: Epoch(1),
                disk: disk.as_ref().map(|_| AdmissionKind::Frequency),
                leases_per_session_max: 1 << 20,
                sessions_max: 64,
                pinned_bytes_max: 0,
                pending_ttl_ms: 30_000,
                stalled_max: 1 << 14,
                offloads_max: 256,
                onboards_max: 256,
                fetches_max: FETCHES_MAX,
                peers: false,
                fetch_limit_ms: 10_000,
                object: Some(ObjectConfig {
                    upload: UploadLimits {
                        reads_min: options.reads_min as u32,
                        age_min: Duration::from_secs(options.age_s),
                        ..UploadLimits::default()
                    },
                    uploads_max: UPLOADS_MAX,
                    fetch_limit_ms: FETCH_LIMIT_MS,
                }),
                events_kept_max: 1024,
            },
            catalog,
            host,
        );
        let binding = Binding {
            scope: ScopeId([1; 32]),
            slice: Slice::whole(1, 1),
            block_bytes: BLOCK_BYTES,
            about: String::new(),
        };
        let mut commands = Vec::new();
        let bound = kv_node::Binding {
            id: BindingId(0),
            tag: binding.tag(),
            block_bytes: BLOCK_BYTES,
            tenant: "trace".to_owned(),
        };
        brain.handle(Now::default(), Event::Bound(bound), &mut commands);
        brain.handle(Now::default(), Event::Opened { session: WORKER }, &mut commands);
        let (fetches, fetch_orders) = mpsc::unbounded_channel();
        let (uploads, upload_orders) = mpsc::unbounded_channel();
        let inner = Inner {
            brain,
            slab,
            hazards: HazardSet::new(),
            disk,
            parked: VecDeque::new(),
            asked: HashMap::new(),
            last_request: 0,
            fetches,
            uploads,
            _memory: memory,
        };
        let node = Rc::new(Self {
            tier,
            binding: Arc::new(binding),
            started: Instant::now(),
            table,
            inner: RefCell::new(inner),
            events: RefCell::default(),
            telling: Cell::new(false),
            taken: Notify::new(),
            fresh: RefCell::default(),
            downloaded: Cell::new(0),
            used: Cell::new(0),
            in_order: options.order > 0,
            refresh: Duration::from_secs(options.refresh_s),
        });
        spawn_local(Reads::new(&node, gather).run(fetch_orders));
        spawn_local(Rc::clone(&node).upload(upload_orders));
        spawn_local(Rc::clone(&node).keep(Duration::from_secs(options.refresh_s * number / options.nodes)));
        spawn_local(Rc::clone(&node).tick());
        Ok(node)
    }

    fn now(&self) -> Now {
        let micros = self.started.elapsed().as_micros() as u64;
        Now { micros: Micros(micros), unix: self.unix() }
    }

    fn unix(&self) -> u32 {
        BEGAN + self.started.elapsed().as_secs() as u32
    }

    /// Gives the brain an event, and those that follow from it, and does what it commands.
    fn tell(&self, event: Event) {
        self.events.borrow_mut().push_back(event);
        if self.telling.replace(true) {
            return;
        }
        let mut inner = self.inner.borrow_mut();
        let mut commands = Vec::new();
        loop {
            let event = self.events.borrow_mut().pop_front();
            let Some(event) = event else { break };
            inner.brain.handle(self.now(), event, &mut commands);
            for command in commands.drain(..) {
                self.obey(&mut inner, command);
            }
            self.use_disk(&mut inner);
        }
        self.telling.set(false);
    }

    fn then(&self, event: Event) {
        self.events.borrow_mut().push_back(event);
    }

    fn obey(&self, inner: &mut Inner, command: Command) {
        match command {
            Command::Reply { to, reply } => {
                if let Some(asked) = inner.asked.remove(&to.request.0) {
                    let _ = asked.send(reply);
                }
            }
            Command::Fill { fill, bytes, key, mut slot, .. } => {
                let into = &mut slot[..bytes as usize];
                payload::fill(&key, into);
                let checksum = Checksum::of(&key, into);
                self.then(Event::Filled { fill, filled: Ok((slot, checksum)) });
            }
            Command::Store(op) => inner.parked.push_back(op),
            Command::Fetch(_, op) => inner.fetches.send(op).expect("it reads to the end"),
            Command::Upload { upload, held, expires_at, parent, .. } => {
                let order = UploadOrder { upload, held, expires_at, parent };
                inner.uploads.send(order).unwrap_or_else(|_| panic!("it uploads to the end"));
            }
            Command::Sweep => {
                let freed = inner.slab.sweep(&inner.hazards);
                self.then(Event::Swept { freed });
            }
        }
    }

    /// The disk is as fast as can be.
    fn use_disk(&self, inner: &mut Inner) {
        let Some(disk) = &mut inner.disk else { return };
        while let Some(op) = inner.parked.pop_front() {
            if let Err(back) = disk.submit(op) {
                inner.parked.push_front(back);
                break;
            }
        }
        let mut done = Vec::new();
        disk.kick();
        disk.poll(&mut done);
        for done in done {
            self.then(Event::Store(done));
        }
    }

    async fn tick(self: Rc<Self>) {
        loop {
            let next = self.inner.borrow().brain.next_tick(self.now().micros);
            let early = next.map_or(TICK, |next| {
                Duration::from_micros(next.0.saturating_sub(self.now().micros.0))
                    .max(Duration::from_millis(1))
            });
            sleep(early.min(TICK)).await;
            self.tell(Event::Tick);
        }
    }

    fn ask(&self, session: SessionId, op: Op) -> oneshot::Receiver<Reply> {
        let (sender, receiver) = oneshot::channel();
        let request = {
            let mut inner = self.inner.borrow_mut();
            inner.last_request += 1;
            let request = inner.last_request;
            inner.asked.insert(request, sender);
            RequestId(request)
        };
        let deadline = Micros(self.now().micros.0 + DEADLINE.as_micros() as u64);
        self.tell(Event::Request { from: Origin { session, request }, deadline, op });
        receiver
    }

    /// A request of an engine: it takes what is there, and stores the rest.
    pub(crate) async fn serve(&self, keys: Vec<BlockKey>) -> Served {
        let reach = Reach::Further { hint: None };
        let steps = Step::along(&keys)
            .map(|Step { key, after }| Step { key, after: after.filter(|_| self.in_order) });
        let steps: Vec<_> = steps.collect();
        let acquire = |&Step { key, after }: &Step| Op::Acquire { key, wait: true, reach, after };
        let answers: Vec<_> = steps.iter().map(|step| self.ask(WORKER, acquire(step))).collect();
        let (mut served, mut whole, mut leases, mut absent) =
            (Served::default(), true, Vec::new(), Vec::new());
        for (step, answer) in steps.iter().zip(answers) {
            match answer.await {
                Ok(Reply::Leased(grant)) => {
                    leases.push(grant.lease);
                    if !whole {
                        served.behind += 1;
                        continue;
                    }
                    let fresh = self.fresh.borrow_mut().remove(&step.key);
                    self.used.set(self.used.get() + u64::from(fresh));
                    served.ahead += u64::from(fresh && grant.tier != In::Object);
                    match grant.tier {
                        _ if fresh => served.object += 1,
                        In::Object => served.object += 1,
                        In::Disk => served.disk += 1,
                        _ => served.host += 1,
                    }
                }
                _ => {
                    whole = false;
                    absent.push(*step);
                }
            }
        }
        served.missed = keys.len() as u64 - served.host - served.disk - served.object;
        let _ = self.ask(WORKER, Op::Release { leases }).await;
        for Step { key, after } in absent {
            let (keep, bytes) = (Keep::default(), BLOCK_BYTES);
            let put = Op::Put { key, binding: BindingId(0), source: 0, bytes, keep, durable: false, after };
            let _ = self.ask(WORKER, put).await;
        }
        served
    }

    /// As the daemon's `object/uploads.rs`.
    async fn upload(self: Rc<Self>, mut orders: mpsc::UnboundedReceiver<UploadOrder>) {
        while let Some(UploadOrder { upload, held, expires_at, parent }) = orders.recv().await {
            let record = Record { expires_at, ..held.record() };
            let now = self.unix();
            if self.tier.find(now, &[record.key])[0].is_ok() {
                drop(held);
                self.tell(Event::Upload(UploadDone::Known { upload }));
                continue;
            }
            let bytes = bytes::Bytes::copy_from_slice(&held);
            drop(held);
            let offer = Offer { binding: Arc::clone(&self.binding), record, parent, bytes };
            let done = match self.tier.take(now, vec![offer]) {
                Err(_) => UploadDone::Refused { upload },
                Ok((stored, full)) => {
                    if full.is_empty() {
                        self.taken.notify_one();
                    } else {
                        let node = Rc::clone(&self);
                        spawn_local(async move { node.lost(node.tier.write_full(full).await.lost) });
                    }
                    match (stored.refused.is_empty(), stored.known.is_empty()) {
                        (false, _) => UploadDone::Refused { upload },
                        (true, false) => UploadDone::Known { upload },
                        (true, true) => UploadDone::Taken { upload, bytes: record.bytes },
                    }
                }
            };
            self.tell(Event::Upload(done));
            tokio::task::yield_now().await;
        }
    }

    fn lost(&self, keys: Vec<BlockKey>) {
        if !keys.is_empty() {
            self.tell(Event::Upload(UploadDone::Lost { keys }));
        }
    }

    /// As the daemon's `object/keeper.rs`; nodes do not look at the same moments.
    async fn keep(self: Rc<Self>, late: Duration) {
        let mut refresh_due = Instant::now() + self.refresh + late;
        let mut collect_due = Instant::now() + COLLECT_EVERY + late;
        let mut rounds = 0;
        loop {
            let flush_due = self.tier.due_in().map(|left| Instant::now() + left);
            tokio::select! {
                () = self.taken.notified() => {}
                () = sleep_until(flush_due.unwrap_or_else(Instant::now)), if flush_due.is_some() => {
                    let node = Rc::clone(&self);
                    spawn_local(async move {
                        let stored = node.tier.flush(false).await.expect("nobody else is called that");
                        node.lost(stored.lost);
                    });
                    tokio::task::yield_now().await;
                    sleep(Duration::from_millis(1)).await;
                }
                () = sleep_until(refresh_due) => {
                    refresh_due = Instant::now() + self.refresh;
                    self.tier.refresh(self.unix()).await.expect("the store does not fail");
                }
                () = sleep_until(collect_due) => {
                    collect_due = Instant::now() + COLLECT_EVERY;
                    rounds += 1;
                    if rounds % RESCAN_EVERY == 0 {
                        self.tier.rescan().await.expect("the store does not fail");
                    }
                    self.tier.collect(false).await.expect("the store does not fail");
                }
            }
        }
    }

    /// What waits is written, and what this node uses is said.
    pub(crate) async fn finish(&self) -> anyhow::Result<()> {
        self.tier.flush(true).await?;
        Ok(self.tier.publish().await?)
    }

    pub(crate) fn sums(&self) -> Sums {
        let totals = self.tier.report().totals;
        Sums {
            uploaded: totals.blocks_written,
            lost: totals.blocks_lost,
            packs: totals.packs_written,
            downloaded: self.downloaded.get(),
            used: self.used.get(),
            reads: totals.reads,
            read: totals.blocks_read,
            span_bytes: totals.bytes_read,
        }
    }
}

/// As the daemon's `object/reads.rs`.
struct Reads {
    node: Rc<Node>,
    offered: HashMap<FetchToken, (Record, Instant)>,
    ready: Gather<Ready>,
    ahead: Ahead,
}

struct Ready {
    fetch: FetchToken,
    record: Record,
    deadline: Instant,
    into: Slot,
}

impl Reads {
    fn new(node: &Rc<Node>, limits: GatherLimits) -> Self {
        Self {
            node: Rc::clone(node),
            offered: HashMap::new(),
            ready: Gather::new(limits),
            ahead: Ahead::default(),
        }
    }

    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<FetchOp>) {
        loop {
            let due = self.ready.due_at();
            tokio::select! {
                order = orders.recv() => {
                    let Some(order) = order else { return };
                    let mut turn = vec![order];
                    while let Ok(order) = orders.try_recv() {
                        turn.push(order);
                    }
                    self.take(turn);
                }
                () = sleep_until(due.map_or_else(Instant::now, Instant::from_std)), if due.is_some() => {}
            }
            let mut ready: Vec<_> =
                self.ready.take(Instant::now().into_std()).into_iter().map(Some).collect();
            let keys: Vec<BlockKey> = ready.iter().flatten().map(|one| one.record.key).collect();
            for group in self.node.tier.spread(self.node.unix(), &keys) {
                let blocks = group.into_iter().filter_map(|at| ready[at].take()).collect();
                spawn_local(read(Rc::clone(&self.node), blocks));
            }
        }
    }

    fn take(&mut self, orders: Vec<FetchOp>) {
        let mut found = Vec::new();
        for op in orders {
            match op {
                FetchOp::Find { fetch, key, deadline, .. } => found.push((fetch, key, deadline)),
                FetchOp::Into { fetch, into, .. } => {
                    let Some((record, deadline)) = self.offered.remove(&fetch) else { continue };
                    let ready = Ready { fetch, record, deadline, into };
                    self.ready.add(Instant::now().into_std(), ready, record.bytes);
                }
                FetchOp::Decline { fetch, reason, .. } => {
                    self.offered.remove(&fetch);
                    self.tell(FetchDone::Missed { fetch, reason });
                }
                FetchOp::Leave { fetch } => {
                    self.offered.remove(&fetch);
                    self.ready.retain(|one| one.fetch != fetch);
                }
            }
        }
        for (fetch, key, deadline) in found {
            self.find(fetch, key, self.node.started + Duration::from_micros(deadline.0));
        }
    }

    fn find(&mut self, fetch: FetchToken, key: BlockKey, deadline: Instant) {
        let (node, now) = (Rc::clone(&self.node), self.node.unix());
        let found = node.tier.find(now, &[key]).pop().unwrap_or(Err(MissReason::NeverStored));
        let record = match found {
            Ok(record) => record,
            Err(reason) => return self.tell(FetchDone::Missed { fetch, reason }),
        };
        let ttl_s = if record.expires_at == 0 { 0 } else { record.expires_at.saturating_sub(now).max(1) };
        self.offered.insert(fetch, (record, deadline));
        self.tell(FetchDone::Offered { fetch, offer: OfferToken(fetch.0), record, ttl_s });
        let behind = || node.tier.ahead(now, &key).into_iter().map(|(key, _)| key).collect();
        let is_absent = |keys: &[BlockKey]| {
            let mut absent = Vec::new();
            node.table.find_each(keys, |entry| {
                absent.push(entry.is_none_or(|entry| matches!(entry.state, EntryState::Ghost(_))));
                true
            });
            absent
        };
        let keys = self.ahead.with(&key, behind, is_absent);
        if !keys.is_empty() {
            let steps = keys.into_iter().map(|key| Step { key, after: None }).collect();
            drop(node.ask(SessionId(0), Op::Prefetch { steps, reach: Reach::Object }));
        }
    }

    fn tell(&self, done: FetchDone) {
        self.node.tell(Event::Fetch(done));
    }
}

async fn read(node: Rc<Node>, mut blocks: Vec<Ready>) {
    let now = Instant::now();
    let within =
        blocks.iter().map(|one| one.deadline.saturating_duration_since(now)).max().unwrap_or_default();
    let mut wants: Vec<Want<'_>> = blocks
        .iter_mut()
        .map(|one| Want { key: one.record.key, into: &mut one.into[..one.record.bytes as usize] })
        .collect();
    let got = node.tier.read(node.unix(), within, &mut wants).await;
    for (Ready { fetch, record, into, .. }, got) in blocks.into_iter().zip(got) {
        let done = match got {
            Got::Read(read) if (read.checksum, read.bytes) == (record.checksum, record.bytes) => {
                node.downloaded.set(node.downloaded.get() + 1);
                node.fresh.borrow_mut().insert(record.key);
                FetchDone::Landed { fetch, into }
            }
            Got::Read(_) | Got::TooLong { .. } => FetchDone::Missed { fetch, reason: MissReason::Corrupt },
            Got::Missed(reason) => FetchDone::Missed { fetch, reason },
        };
        node.tell(Event::Fetch(done));
    }
}
