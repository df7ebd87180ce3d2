//! A shard without a thread: the brain over real arena memory and a store in memory, driven as the daemon's
//! executor does, with a clock that moves only when told to.
//!
//! It checks by itself, all the time: every request gets exactly one final answer, at its deadline at the
//! latest; every lease is on the right bytes; the event log has no gaps.
#![allow(dead_code, unreachable_pub, reason = "a module of several test binaries, each of which uses a part")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::unix::fs::FileExt;

use kv_arena::hazard::Owner;
use kv_arena::{
    Adoption, Geometry, Grower, HazardFile, HazardSet, Held, HugePages, MemorySpec, ShardMemory, ShardView,
    Slab, Slot,
};
use kv_block::code::Code;
use kv_block::{
    BindingId, BindingTag, BlockKey, Checksum, DiskLocation, Epoch, EventKind, Fault, LeaseId, MissReason,
    Record, SessionId, ShardId, Tier, payload,
};
use kv_node::{
    Binding, BlockReport, BlockState, Brain, BrainConfig, Command, Event, FetchDone, FetchFrom, FetchOp,
    FetchToken, Filter, Found, Grant, Keep, Micros, Now, ObjectConfig, OfferToken, Op, Origin, Progress,
    Reach, Reply, RequestId, ShardReport, Step, UploadDone, UploadToken,
};
use kv_tiers::admit::AdmissionKind;
use kv_tiers::catalog::Catalog;
use kv_tiers::evict::PolicyKind;
use kv_tiers::host::{HostTier, Watermarks};
use kv_tiers::memory::{MemoryConfig, MemoryStore};
use kv_tiers::store::{BlockStore, StoreDone, StoreOp};
use kv_tiers::upload::UploadLimits;

/// Length of a block of the first binding: 8 in a region.
pub const SMALL: u32 = 256 << 10;
/// Length of a block of the last binding: 4 in a region.
pub const LARGE: u32 = 512 << 10;
/// Bindings: small blocks of two tenants, large blocks of the second.
pub const A: BindingId = BindingId(0);
pub const B: BindingId = BindingId(1);
pub const B_LARGE: BindingId = BindingId(2);
/// A source whose bytes are gone when they are to be copied. Others are versions of a block's bytes.
pub const GONE: u64 = u64::MAX;
/// How long a request may take unless a test says otherwise, in milliseconds.
pub const DEADLINE_MS: u64 = 1000;

pub fn key(n: u64) -> BlockKey {
    BlockKey::from_halves([n.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 7, n])
}

/// These blocks, each after the one before it.
pub fn path(numbers: std::ops::Range<u64>) -> Vec<Step> {
    Step::along(&numbers.map(key).collect::<Vec<_>>()).collect()
}

pub fn session(n: u64) -> SessionId {
    SessionId(n)
}

/// An object tier as the daemon has it by default, with little room.
pub fn object() -> ObjectConfig {
    ObjectConfig { upload: UploadLimits::default(), uploads_max: 4, fetch_limit_ms: 1000 }
}

/// What a rig is made of.
#[derive(Clone)]
pub struct Setup {
    pub regions: u32,
    pub entries_max: u64,
    pub disk: Option<AdmissionKind>,
    pub store: MemoryConfig,
    pub stalled_max: usize,
    pub leases_max: usize,
    pub offloads_max: usize,
    pub onboards_max: usize,
    pub fetches_max: usize,
    pub peers: bool,
    pub object: Option<ObjectConfig>,
    pub pinned_bytes_max: u64,
    pub events_kept_max: usize,
    /// In files, so that it can crash.
    pub survives: bool,
    /// In files as well; only the first region has memory until [`Rig::grow`].
    pub grows: bool,
}

impl Default for Setup {
    /// Two regions, so 16 small blocks; a disk that takes everything, 8 MiB.
    fn default() -> Self {
        Self {
            regions: 2,
            entries_max: 4096,
            disk: Some(AdmissionKind::All),
            store: MemoryConfig::default(),
            stalled_max: 8,
            leases_max: 64,
            offloads_max: 16,
            onboards_max: 8,
            fetches_max: 8,
            peers: true,
            object: None,
            pinned_bytes_max: 3 << 20,
            events_kept_max: 1 << 20,
            survives: false,
            grows: false,
        }
    }
}

impl Setup {
    pub fn without_disk() -> Self {
        Self { disk: None, ..Self::default() }
    }
}

/// A request that has no final answer yet.
struct Asked {
    deadline: Micros,
    op: Op,
    session: SessionId,
}

/// What outlives a crash.
struct Devices {
    memory: ShardMemory,
    store: Option<MemoryStore>,
}

pub struct Rig {
    setup: Setup,
    dir: Option<tempfile::TempDir>,
    brain: Option<Brain>,
    devices: Option<Devices>,
    pub slab: Option<Slab>,
    pub hazards: HazardSet,
    pub now: Now,
    commands: Vec<Command>,
    parked: VecDeque<StoreOp>,
    asked: BTreeMap<u64, Asked>,
    answers: BTreeMap<u64, Reply>,
    pub progress: BTreeMap<u64, Vec<Progress>>,
    next_request: u64,
    pub sessions: BTreeSet<SessionId>,
    /// Leases that are out, with what they are on.
    pub leases: BTreeMap<LeaseId, (SessionId, BlockKey, Grant)>,
    /// Versions of a block's bytes that may be served, where not only the first may.
    pub versions: BTreeMap<BlockKey, BTreeSet<u8>>,
    /// While set, copies are not done, or completions of the store not heard.
    pub hold_fills: bool,
    pub hold_store: bool,
    held_fills: Vec<Command>,
    /// What was asked of the peers and has no answer yet: searches, and slots to land in.
    pub searches: BTreeMap<u64, BlockKey>,
    pub landings: BTreeMap<u64, Slot>,
    /// While set, what is asked of the peers goes there instead.
    pub asked_of_peers: Option<VecDeque<FetchOp>>,
    /// Those of the searches that ask the object tier.
    pub in_object: BTreeSet<u64>,
    /// While set, blocks for the object tier stay with whoever is to copy them, by token.
    pub hold_uploads: bool,
    pub uploads: BTreeMap<u64, Held>,
    /// What came before each that was to be copied.
    pub parents: BTreeMap<BlockKey, Option<BlockKey>>,
    /// Blocks that were copied for the object tier.
    pub uploaded: BTreeSet<BlockKey>,
    /// Why an offer was declined, if the last one was.
    pub declined: Option<MissReason>,
    /// How many were offered.
    pub offers: u64,
    /// The inventory as the event log tells it.
    pub inventory: BTreeSet<(BlockKey, Tier)>,
    heard: u64,
    /// Blocks that are durable by word of the daemon and were not reported gone since, with their end.
    pub durable: BTreeMap<BlockKey, u32>,
    pub swept: usize,
    grower: Option<Grower>,
}

fn bindings() -> [Binding; 3] {
    let of = |id: BindingId, tag: u64, block_bytes, tenant: &str| Binding {
        id,
        tag: BindingTag(tag),
        block_bytes,
        tenant: tenant.to_owned(),
    };
    [of(A, 100, SMALL, "a"), of(B, 200, SMALL, "b"), of(B_LARGE, 300, LARGE, "b")]
}

impl Rig {
    pub fn new(setup: Setup) -> Self {
        let dir = (setup.survives || setup.grows).then(|| {
            let shm = std::path::Path::new("/dev/shm");
            let parent = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
            tempfile::Builder::new().prefix("kvd-node-test-").tempdir_in(parent).unwrap()
        });
        let store = setup.disk.map(|_| MemoryStore::new(setup.store));
        let mut rig = Self {
            setup,
            dir,
            brain: None,
            devices: None,
            slab: None,
            hazards: HazardSet::new(),
            now: Now { micros: Micros(1_000_000), unix: 1_000_000 },
            commands: Vec::new(),
            parked: VecDeque::new(),
            asked: BTreeMap::new(),
            answers: BTreeMap::new(),
            progress: BTreeMap::new(),
            next_request: 1,
            sessions: BTreeSet::new(),
            leases: BTreeMap::new(),
            versions: BTreeMap::new(),
            hold_fills: false,
            hold_store: false,
            held_fills: Vec::new(),
            searches: BTreeMap::new(),
            in_object: BTreeSet::new(),
            hold_uploads: false,
            uploads: BTreeMap::new(),
            parents: BTreeMap::new(),
            uploaded: BTreeSet::new(),
            declined: None,
            offers: 0,
            landings: BTreeMap::new(),
            asked_of_peers: None,
            inventory: BTreeSet::new(),
            heard: 0,
            durable: BTreeMap::new(),
            swept: 0,
            grower: None,
        };
        rig.start(store, &[]);
        rig
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            regions: self.setup.regions,
            region_bytes: 2 << 20,
            table_entries_max: self.setup.entries_max,
        }
    }

    fn start(&mut self, store: Option<MemoryStore>, found: &[(Record, DiskLocation)]) {
        let mut memory = match &self.dir {
            None => ShardMemory::anonymous(self.geometry()).unwrap(),
            Some(dir) => {
                let spec = MemorySpec {
                    dir: dir.path().to_owned(),
                    name: "shard-0".to_owned(),
                    geometry: self.geometry(),
                    numa_node: None,
                    huge: HugePages::Off,
                    hugetlbfs_dir: None,
                    ready_bytes: if self.setup.grows { 1 } else { u64::MAX },
                    promised_bytes: 0,
                };
                let (mut memory, adoption) = ShardMemory::open(&spec, Epoch(1)).unwrap();
                assert!(!matches!(adoption, Adoption::SetAside { .. }), "{adoption:?}");
                self.grower = memory.take_grower();
                memory
            }
        };
        let table = memory.take_table().unwrap().unwrap();
        let slab = memory.slab().clone();
        let host = HostTier::new(slab.clone(), PolicyKind::Sieve, Watermarks::default());
        let config = BrainConfig {
            shard: ShardId(0),
            epoch: memory.epoch(),
            disk: self.setup.disk,
            leases_per_session_max: self.setup.leases_max,
            sessions_max: 64,
            pinned_bytes_max: self.setup.pinned_bytes_max,
            pending_ttl_ms: 500,
            stalled_max: self.setup.stalled_max,
            offloads_max: self.setup.offloads_max,
            onboards_max: self.setup.onboards_max,
            fetches_max: self.setup.fetches_max,
            peers: self.setup.peers,
            object: self.setup.object.clone(),
            fetch_limit_ms: 2 * DEADLINE_MS,
            events_kept_max: self.setup.events_kept_max,
        };
        let mut brain = Brain::new(config, Catalog::new(table, 512), host);
        for binding in bindings() {
            brain.handle(self.now, Event::Bound(binding), &mut self.commands);
        }
        let mut bind = |record: &Record| panic!("nobody stored {record:?}");
        brain.recover_host(self.now, &mut bind);
        brain.recover_disk(self.now, found, &mut bind);
        self.brain = Some(brain);
        self.slab = Some(slab);
        self.devices = Some(Devices { memory, store });
        for n in 1..=3 {
            self.open(session(n));
        }
        self.hear();
    }

    /// The daemon dies; its memory and its disk stay, and are adopted by the next life. `meanwhile` may damage
    /// the store.
    pub fn crash(&mut self, seed: u64, meanwhile: impl FnOnce(&mut Vec<(Record, DiskLocation)>)) {
        self.brain = None;
        self.slab = None;
        self.grower = None;
        self.commands.clear();
        self.held_fills.clear();
        self.searches.clear();
        self.in_object.clear();
        self.uploads.clear();
        self.hold_uploads = false;
        self.landings.clear();
        self.parked.clear();
        self.asked.clear();
        self.leases.clear();
        self.sessions.clear();
        self.inventory.clear();
        (self.heard, self.hold_fills, self.hold_store) = (0, false, false);
        let Some(Devices { memory, store }) = self.devices.take() else { panic!("it has devices") };
        let (store, mut found) = match store {
            None => (None, Vec::new()),
            Some(store) => {
                let (store, found) = store.reopen(seed);
                (Some(store), found)
            }
        };
        drop(memory);
        meanwhile(&mut found);
        self.start(store, &found);
        // What was promised before is kept; found out by whoever asks.
        let unix = self.now.unix;
        self.durable.retain(|_, ends| *ends == 0 || *ends > unix);
        let there = |key: &BlockKey| self.inventory.contains(&(*key, Tier::Disk));
        let lost: Vec<_> = self.durable.keys().filter(|key| !there(key)).collect();
        assert!(lost.is_empty(), "durable blocks were lost: {lost:?}");
    }

    /// What is said to come before a block.
    pub fn before(&self, n: u64) -> Option<BlockKey> {
        self.brain.as_ref().unwrap().before(&key(n))
    }

    pub fn store(&mut self) -> &mut MemoryStore {
        self.devices.as_mut().unwrap().store.as_mut().unwrap()
    }

    pub fn slab(&self) -> &Slab {
        self.slab.as_ref().unwrap()
    }

    pub fn open(&mut self, session: SessionId) {
        self.sessions.insert(session);
        self.tell(Event::Opened { session });
    }

    pub fn close(&mut self, session: SessionId) {
        self.sessions.remove(&session);
        self.leases.retain(|_, (of, ..)| *of != session);
        self.tell(Event::Closed { session });
        let left: Vec<_> = self.asked.iter().filter(|(_, asked)| asked.session == session).collect();
        let copied = left.iter().all(|(_, asked)| matches!(asked.op, Op::Put { .. } | Op::Commit { .. }));
        assert!(left.is_empty() || (copied && self.hold_fills), "a closed session's request has no answer");
    }

    /// What a worker process maps: it reads by itself, under its own hazards.
    pub fn worker(&mut self) -> std::sync::Arc<ShardView> {
        let pid = std::process::id();
        let start_time = kv_arena::hazard::process_start_time(pid).unwrap();
        let owner = Owner { shard: ShardId(0), session: session(1), pid, start_time };
        let file = HazardFile::anonymous(owner, 64).unwrap();
        let hazards = file.fd().unwrap();
        self.hazards.add(file);
        let memory = &self.devices.as_ref().unwrap().memory;
        ShardView::map(memory.meta_ro().unwrap(), memory.data_ro().unwrap(), hazards).unwrap()
    }

    /// Fills a slot that was lent to a trusted worker.
    pub fn fill_in_place(&mut self, key: &BlockKey, grant: &Grant) -> Checksum {
        let mut bytes = vec![0; grant.bytes as usize];
        payload::fill(key, &mut bytes);
        let file = std::fs::File::from(self.devices.as_ref().unwrap().memory.data_rw().unwrap());
        file.write_all_at(&bytes, grant.offset).unwrap();
        Checksum::of(key, &bytes)
    }

    /// Flips a bit of a block in host memory, as broken memory would.
    pub fn damage_host(&mut self, key: BlockKey) {
        let report = self.inspect(key).expect("a block to damage");
        let (slot, _) = report.host.expect("a block in host memory");
        let offset = self.slab().offset(slot).unwrap() + u64::from(report.bytes) / 2;
        let file = std::fs::File::from(self.devices.as_ref().unwrap().memory.data_rw().unwrap());
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
    }

    pub fn damage_disk(&mut self, key: BlockKey) {
        let at = self.inspect(key).and_then(|report| report.disk).expect("a block on disk");
        assert!(self.store().damage(at));
        self.durable.remove(&key);
    }

    /// The next regions get their memory; false when none is missing.
    pub fn grow(&mut self) -> bool {
        let regions = self.grower.as_mut().and_then(|grower| grower.step().unwrap());
        let any = regions.is_some();
        self.tell(regions.map_or(Event::GrowthEnded, |regions| Event::Grown { regions }));
        any
    }

    /// Gives the brain one event and does what it commands.
    pub fn tell(&mut self, event: Event) {
        let mut brain = self.brain.take().unwrap();
        brain.handle(self.now, event, &mut self.commands);
        self.brain = Some(brain);
        self.obey();
    }

    fn obey(&mut self) {
        for round in 0.. {
            assert!(round < 100_000, "commands without end");
            let Some(mut brain) = self.brain.take() else { return };
            let commands = std::mem::take(&mut self.commands);
            if commands.is_empty() {
                self.brain = Some(brain);
                return;
            }
            for command in commands {
                match command {
                    Command::Reply { to, reply } => self.answered(to, reply),
                    Command::Fill { .. } if self.hold_fills => self.held_fills.push(command),
                    Command::Fill { fill, from: _, source, bytes, key, mut slot } => {
                        let filled = if source == GONE {
                            Err(Fault::new(Code::StagingRange, "the bytes went away"))
                        } else {
                            let into = &mut slot[..bytes as usize];
                            payload::fill(&key, into);
                            into[0] ^= source as u8;
                            let checksum = Checksum::of(&key, into);
                            Ok((slot, checksum))
                        };
                        brain.handle(self.now, Event::Filled { fill, filled }, &mut self.commands);
                    }
                    Command::Store(op) => self.parked.push_back(op),
                    Command::Fetch(from, op) => {
                        if let (FetchFrom::Object, FetchOp::Find { fetch, .. }) = (from, &op) {
                            self.in_object.insert(fetch.0);
                        }
                        self.fetch(op);
                    }
                    Command::Upload { upload, held, parent, .. } => {
                        let record = held.record();
                        self.parents.insert(record.key, parent);
                        assert_eq!(
                            Checksum::of(&record.key, &held),
                            record.checksum,
                            "a wrong block is uploaded"
                        );
                        assert!(self.uploads.insert(upload.0, held).is_none(), "a token is used twice");
                        if !self.hold_uploads {
                            let done = self.copied(upload.0);
                            brain.handle(self.now, Event::Upload(done), &mut self.commands);
                        }
                    }
                    Command::Sweep => {
                        let freed = self.slab.as_ref().unwrap().sweep(&self.hazards);
                        self.swept += freed;
                        brain.handle(self.now, Event::Swept { freed }, &mut self.commands);
                    }
                }
            }
            self.brain = Some(brain);
            self.submit();
        }
    }

    fn fetch(&mut self, op: FetchOp) {
        if let Some(queue) = &mut self.asked_of_peers {
            return queue.push_back(op);
        }
        match op {
            FetchOp::Find { fetch, key, deadline, .. } => {
                assert!(deadline > self.now.micros, "a search that is over before it begins");
                assert!(self.searches.insert(fetch.0, key).is_none(), "a search that runs already");
            }
            FetchOp::Into { fetch, offer, into } => {
                assert!(self.searches.contains_key(&fetch.0), "a slot for no search");
                assert!(offer.0 <= self.offers, "a slot for no offer");
                assert!(self.landings.insert(fetch.0, into).is_none(), "a second slot for one search");
            }
            FetchOp::Decline { fetch, offer, reason } => {
                assert!(self.searches.contains_key(&fetch.0), "an offer for no search is declined");
                assert_eq!(offer.0, self.offers, "it is declined at once");
                self.landings.remove(&fetch.0);
                self.declined = Some(reason);
            }
            FetchOp::Leave { fetch } => {
                assert!(self.searches.remove(&fetch.0).is_some(), "a search that does not run is left");
                self.landings.remove(&fetch.0);
            }
        }
    }

    /// An upload is copied, and let go of.
    fn copied(&mut self, upload: u64) -> UploadDone {
        let held = self.uploads.remove(&upload).expect("an upload under way");
        let record = held.record();
        self.uploaded.insert(record.key);
        UploadDone::Taken { upload: UploadToken(upload), bytes: record.bytes }
    }

    /// The oldest upload that is held ends: taken, known already, or refused.
    pub fn end_upload(&mut self, how: u8) {
        let Some(upload) = self.uploads.keys().next().copied() else { return };
        let done = match how {
            0 => self.copied(upload),
            other => {
                self.uploads.remove(&upload);
                let upload = UploadToken(upload);
                if other == 1 { UploadDone::Known { upload } } else { UploadDone::Refused { upload } }
            }
        };
        self.tell(Event::Upload(done));
    }

    /// The pack of every block that was uploaded is lost.
    pub fn lose_uploads(&mut self) {
        let keys = std::mem::take(&mut self.uploaded).into_iter().collect();
        self.tell(Event::Upload(UploadDone::Lost { keys }));
    }

    /// A peer offers block `n` to whoever looks for it.
    pub fn offer(&mut self, n: u64, record: Record) {
        let fetch = self.search_of(n);
        self.declined = None;
        self.offers += 1;
        let offer = OfferToken(self.offers);
        self.tell(Event::Fetch(FetchDone::Offered { fetch, offer, record, ttl_s: 0 }));
    }

    /// Block `n` as a peer has it.
    pub fn peer_record(n: u64, binding: BindingId) -> Record {
        let of = bindings().into_iter().find(|one| one.id == binding).expect("a binding");
        let mut bytes = vec![0; of.block_bytes as usize];
        payload::fill(&key(n), &mut bytes);
        let checksum = Checksum::of(&key(n), &bytes);
        let priority = kv_block::Priority::Normal;
        Record { key: key(n), checksum, bytes: of.block_bytes, tag: of.tag, priority, expires_at: 0 }
    }

    /// The bytes of block `n` arrive.
    pub fn land(&mut self, n: u64) {
        let fetch = self.search_of(n);
        let mut into = self.landings.remove(&fetch.0).expect("a slot to land in");
        self.searches.remove(&fetch.0);
        // Whatever its length: the rest of the slot is nobody's.
        payload::fill(&key(n), &mut into);
        self.tell(Event::Fetch(FetchDone::Landed { fetch, into }));
    }

    /// No peer gives block `n`.
    pub fn lose(&mut self, n: u64, reason: MissReason) {
        let fetch = self.search_of(n);
        self.searches.remove(&fetch.0);
        self.landings.remove(&fetch.0);
        self.tell(Event::Fetch(FetchDone::Missed { fetch, reason }));
    }

    /// Whether block `n` has a slot to land in.
    pub fn is_landing(&self, n: u64) -> bool {
        self.landings.contains_key(&self.search_of(n).0)
    }

    fn search_of(&self, n: u64) -> FetchToken {
        let search = self.searches.iter().find(|(_, of)| **of == key(n));
        FetchToken(*search.unwrap_or_else(|| panic!("nobody looks for block {n}")).0)
    }

    fn submit(&mut self) {
        let Some(store) = self.devices.as_mut().and_then(|devices| devices.store.as_mut()) else {
            assert!(self.parked.is_empty(), "a store operation without a store");
            return;
        };
        while let Some(op) = self.parked.pop_front() {
            if let Err(back) = store.submit(op) {
                self.parked.push_front(back);
                return;
            }
        }
    }

    /// Copies that were held back are done now.
    pub fn fill_held(&mut self) {
        self.hold_fills = false;
        self.commands.append(&mut self.held_fills);
        self.obey();
    }

    /// Takes the completions of the store; says whether there were any.
    pub fn poll(&mut self) -> bool {
        self.submit();
        if self.hold_store {
            return false;
        }
        let mut done = Vec::new();
        if let Some(store) = self.devices.as_mut().and_then(|devices| devices.store.as_mut()) {
            store.kick();
            store.poll(&mut done);
        }
        let any = !done.is_empty();
        for done in done {
            self.tell(Event::Store(done));
        }
        any
    }

    /// Tells the brain a completion that no store sent.
    pub fn forge(&mut self, done: StoreDone) {
        self.tell(Event::Store(done));
    }

    pub fn tick(&mut self) {
        self.tell(Event::Tick);
        let late: Vec<_> = self
            .asked
            .iter()
            .filter(|(_, asked)| asked.deadline <= self.now.micros)
            .filter(|(_, asked)| {
                // A copy that the executor does not finish is its own affair.
                !(self.hold_fills && matches!(asked.op, Op::Put { .. } | Op::Commit { .. }))
            })
            .map(|(id, asked)| (id, &asked.op))
            .collect();
        assert!(late.is_empty(), "no answer at the deadline: {late:?}");
        self.hear();
    }

    /// Everything that happens without time passing.
    pub fn settle(&mut self) {
        for _ in 0..10_000 {
            let due = |rig: &Self| {
                let next = rig.brain.as_ref().unwrap().next_tick(rig.now.micros);
                next.is_some_and(|due| due <= rig.now.micros)
            };
            if !self.poll() && !due(self) {
                return self.tick();
            }
            self.tick();
        }
        panic!("it never comes to rest");
    }

    pub fn advance(&mut self, ms: u64) {
        self.now.micros = self.now.micros.plus_ms(ms);
        self.now.unix = (self.now.micros.0 / 1_000_000) as u32 + 999_999;
        self.poll();
        self.tick();
    }

    fn answered(&mut self, to: Origin, reply: Reply) {
        let id = to.request.0;
        if let Reply::Progress(progress) = reply {
            assert!(self.asked.contains_key(&id), "progress of a request that has its answer");
            self.progress.entry(id).or_default().push(progress);
            return;
        }
        let asked = self.asked.remove(&id);
        let asked = asked.unwrap_or_else(|| panic!("request {id} has its answer already, now {reply:?}"));
        assert_eq!(asked.session, to.session);
        match (&reply, &asked.op) {
            (Reply::Leased(grant), Op::Acquire { key, .. }) => {
                self.check_bytes(key, grant);
                if self.sessions.contains(&to.session) {
                    self.leases.insert(grant.lease, (to.session, *key, *grant));
                }
            }
            (Reply::Leased(_), op) => panic!("a lease for {op:?}"),
            (Reply::Stored { .. }, Op::Put { key, durable: true, keep, .. }) => {
                self.durable.entry(*key).or_insert(keep.expires_at);
            }
            (Reply::Stored { .. }, Op::Commit { key, durable: true, .. })
            | (Reply::Stored { .. }, Op::CommitInPlace { key, durable: true, .. }) => {
                self.durable.entry(*key).or_insert(0);
            }
            _ => {}
        }
        self.answers.insert(id, reply);
    }

    /// Whether a lease is on the bytes that were stored under that name.
    pub fn check_bytes(&self, key: &BlockKey, grant: &Grant) {
        let held = self.slab().hold(grant.slot, grant.generation).expect("a lease holds its block");
        assert_eq!(held.record().key, *key, "a lease on another block");
        assert_eq!(held.len(), grant.bytes as usize);
        let first = BTreeSet::from([0]);
        let versions = self.versions.get(key).unwrap_or(&first);
        let right = versions.iter().any(|version| {
            let mut wanted = [0; 8];
            payload::fill(key, &mut wanted);
            wanted[0] ^= version;
            held[..8] == wanted && {
                let mut bytes = held.to_vec();
                bytes[0] ^= version;
                payload::first_wrong_byte(key, &bytes).is_none()
            }
        });
        assert!(right, "wrong bytes were served for {key}");
        assert_eq!(Checksum::of(key, &held), grant.checksum);
    }

    pub fn ask_until(&mut self, session: SessionId, deadline: Micros, op: Op) -> u64 {
        let id = self.next_request;
        self.next_request += 1;
        let from = Origin { session, request: RequestId(id) };
        self.asked.insert(id, Asked { deadline, op: op.clone(), session });
        if let Op::Release { leases } = &op {
            for lease in leases {
                if self.leases.get(lease).is_some_and(|(of, ..)| *of == session) {
                    self.leases.remove(lease);
                }
            }
        }
        self.tell(Event::Request { from, deadline, op });
        id
    }

    pub fn ask(&mut self, session: SessionId, op: Op) -> u64 {
        let deadline = self.now.micros.plus_ms(DEADLINE_MS);
        self.ask_until(session, deadline, op)
    }

    /// The answer, if there is one.
    pub fn answer(&mut self, id: u64) -> Option<Reply> {
        self.answers.remove(&id)
    }

    /// Asks, and lets time pass until the answer is there.
    pub fn get(&mut self, session: SessionId, op: Op) -> Reply {
        let id = self.ask(session, op);
        self.wait(id)
    }

    pub fn wait(&mut self, id: u64) -> Reply {
        for _ in 0..2 * DEADLINE_MS {
            if let Some(reply) = self.answer(id) {
                return reply;
            }
            self.settle();
            if let Some(reply) = self.answer(id) {
                return reply;
            }
            self.advance(1);
        }
        panic!("request {id} has no answer");
    }

    pub fn unanswered(&self) -> usize {
        self.asked.len()
    }

    /// All deadlines pass: whatever was asked has its answer afterwards.
    pub fn finish(&mut self) {
        self.fill_held();
        self.hold_uploads = false;
        while !self.uploads.is_empty() {
            self.end_upload(0);
        }
        self.hold_store = false;
        self.settle();
        let last = self.asked.values().map(|asked| asked.deadline).filter(|at| *at != Micros::NEVER).max();
        if let Some(last) = last.filter(|last| *last > self.now.micros) {
            self.advance((last.0 - self.now.micros.0).div_ceil(1000));
        }
        self.settle();
        assert!(self.asked.is_empty(), "{} requests have no answer", self.asked.len());
    }

    // ---- what a worker says, in short

    pub fn put_op(n: u64, binding: BindingId, durable: bool) -> Op {
        let bytes = if binding == B_LARGE { LARGE } else { SMALL };
        Op::Put { key: key(n), binding, source: 0, bytes, keep: Keep::default(), durable, after: None }
    }

    pub fn put(&mut self, n: u64) -> String {
        words(&self.get(session(1), Self::put_op(n, A, false)))
    }

    pub fn put_durably(&mut self, n: u64) -> String {
        words(&self.get(session(1), Self::put_op(n, A, true)))
    }

    pub fn put_all(&mut self, numbers: std::ops::Range<u64>) {
        for n in numbers {
            assert_eq!(self.put(n), "stored");
        }
    }

    pub fn acquire_op(n: u64) -> Op {
        Op::Acquire { key: key(n), wait: true, reach: Reach::Here, after: None }
    }

    /// As [`Self::acquire_op`], and the peers are asked as well.
    pub fn fetch_op(n: u64) -> Op {
        Op::Acquire { key: key(n), wait: true, reach: Reach::Further { hint: None }, after: None }
    }

    /// Acquires and gives the lease back at once; what it got, in a word.
    pub fn read(&mut self, n: u64) -> String {
        let reply = self.get(session(1), Self::acquire_op(n));
        if let Reply::Leased(grant) = &reply {
            self.get(session(1), Op::Release { leases: vec![grant.lease] });
        }
        words(&reply)
    }

    pub fn lease(&mut self, of: SessionId, n: u64) -> Grant {
        match self.get(of, Self::acquire_op(n)) {
            Reply::Leased(grant) => grant,
            other => panic!("no lease on block {n}: {other:?}"),
        }
    }

    pub fn release(&mut self, of: SessionId, lease: LeaseId) -> String {
        words(&self.get(of, Op::Release { leases: vec![lease] }))
    }

    pub fn evict(&mut self, n: u64, tier: Option<Tier>) -> String {
        words(&self.get(session(1), Op::Evict { keys: vec![key(n)], tier, dry_run: false }))
    }

    /// Moves a block to disk: written durably, then out of host memory.
    pub fn send_down(&mut self, n: u64) {
        assert_eq!(self.put_durably(n), "stored");
        assert_eq!(self.evict(n, Some(Tier::Host)), "1/0/0");
        assert_eq!(self.tiers(n), [Tier::Disk]);
    }

    pub fn reserve_op(n: u64, in_place: bool) -> Op {
        Op::Reserve { key: key(n), binding: A, keep: Keep::default(), in_place, after: None }
    }

    pub fn commit_op(n: u64) -> Op {
        Op::Commit { key: key(n), source: 0, bytes: SMALL, durable: false }
    }

    pub fn inspect(&mut self, key: BlockKey) -> Option<Box<BlockReport>> {
        match self.get(SessionId(0), Op::Inspect { key }) {
            Reply::Inspected(report) => report,
            other => panic!("{other:?}"),
        }
    }

    pub fn tiers(&mut self, n: u64) -> Vec<Tier> {
        self.inspect(key(n)).map_or_else(Vec::new, |report| report.tiers)
    }

    pub fn report(&mut self) -> Box<ShardReport> {
        match self.get(SessionId(0), Op::Report) {
            Reply::Report(report) => report,
            other => panic!("{other:?}"),
        }
    }

    pub fn misses(&mut self, reason: MissReason) -> u64 {
        self.report().counters.misses.get(reason.name()).copied().unwrap_or(0)
    }

    pub fn list(&mut self, count: usize) -> Vec<BlockReport> {
        let (mut all, mut cursor) = (Vec::new(), 0);
        loop {
            let op = Op::List { cursor, count, filter: Filter::default() };
            let Reply::Listed { blocks, next } = self.get(SessionId(0), op) else { panic!("no page") };
            all.extend(blocks);
            match next {
                None => return all,
                Some(next) => {
                    assert!(next > cursor, "a listing goes on");
                    cursor = next;
                }
            }
        }
    }

    /// Reads the event log on, and keeps the inventory by it.
    pub fn hear(&mut self) {
        if self.brain.is_none() || self.setup.events_kept_max < 1000 {
            return;
        }
        let id = self.ask(SessionId(0), Op::Events { after: self.heard, count: usize::MAX });
        let Some(Reply::Events(Some(events))) = self.answer(id) else { panic!("the log reaches back") };
        for event in events {
            self.heard += 1;
            assert_eq!(event.number, self.heard, "no gaps");
            match event.kind {
                EventKind::Stored { key, tier, .. } => {
                    assert!(self.inventory.insert((key, tier)), "{key} was stored on {tier:?} twice");
                }
                EventKind::Removed { key, tier } => {
                    assert!(self.inventory.remove(&(key, tier)), "{key} was not on {tier:?}");
                    if tier == Tier::Disk {
                        self.durable.remove(&key);
                    }
                }
                EventKind::Cleared { .. } => panic!("nothing clears a tier"),
            }
        }
    }

    /// Compares everything that is counted with what is there.
    pub fn check_books(&mut self) {
        self.hear();
        let blocks = self.list(7);
        let report = self.report();
        let keys: BTreeSet<_> = blocks.iter().map(|block| block.key).collect();
        assert_eq!(keys.len(), blocks.len(), "a listing shows every block once");
        let on = |tier: Tier| blocks.iter().filter(move |block| block.tiers.contains(&tier));
        let bytes = |tier: Tier| on(tier).map(|block| u64::from(block.bytes)).sum::<u64>();
        assert_eq!(report.host_bytes, bytes(Tier::Host));
        assert_eq!(report.disk_bytes, bytes(Tier::Disk));
        assert_eq!(report.host_blocks, on(Tier::Host).count() as u64);
        assert_eq!(report.disk_blocks, on(Tier::Disk).count() as u64);
        for tenant in &report.tenants {
            let own = |block: &&BlockReport| (block.binding == A) == (tenant.tenant == "a");
            let bytes = |tier: Tier| on(tier).filter(own).map(|block| u64::from(block.bytes)).sum::<u64>();
            assert_eq!(tenant.host_bytes, bytes(Tier::Host), "{}", tenant.tenant);
            assert_eq!(tenant.disk_bytes, bytes(Tier::Disk), "{}", tenant.tenant);
            assert!(tenant.quota_bytes.is_none_or(|quota| tenant.host_bytes <= quota));
        }
        let pending = blocks.iter().filter(|block| block.state == BlockState::Pending).count() as u64;
        assert_eq!(report.pending, pending);
        assert_eq!(report.blocks + report.pending, blocks.len() as u64);
        assert_eq!(report.leases, self.leases.len() as u64);
        let pinned =
            |report: &ShardReport| report.tenants.iter().map(|tenant| tenant.pinned_bytes).sum::<u64>();
        assert_eq!(report.pinned_bytes, pinned(&report));
        let listed: BTreeSet<_> =
            blocks.iter().flat_map(|block| block.tiers.iter().map(|tier| (block.key, *tier))).collect();
        assert_eq!(self.inventory, listed, "events tell the inventory");
        if report.in_flight == 0 {
            for block in on(Tier::Host) {
                let leases = self.leases.values().filter(|(_, key, _)| *key == block.key).count() as u32;
                assert_eq!(block.leases, leases, "holds on {}", block.key);
            }
        }
        for (_, key, grant) in self.leases.values() {
            self.check_bytes(key, grant);
        }
    }
}

/// An answer in a word.
pub fn words(reply: &Reply) -> String {
    match reply {
        Reply::Stored { already: false } => "stored".into(),
        Reply::Stored { already: true } => "already".into(),
        Reply::Reserved { .. } => "reserved".into(),
        Reply::AlreadyThere => "there".into(),
        Reply::Leased(_) => "leased".into(),
        Reply::Miss(reason) => reason.name().into(),
        Reply::Counted { done, kept, absent } => format!("{done}/{kept}/{absent}"),
        Reply::Looked(found) => found
            .iter()
            .map(|found| match found {
                Found::In(tier) => tier.name(),
                Found::Miss(reason) => reason.name(),
            })
            .collect::<Vec<_>>()
            .join(" "),
        Reply::Finished(progress) => format!("finished {} failed {}", progress.done, progress.failed),
        Reply::Fault(fault) => format!("{:?}", fault.code),
        other => format!("{other:?}"),
    }
}

/// The answer is a fault of this code.
pub fn is_fault(reply: &Reply, code: Code) -> bool {
    matches!(reply, Reply::Fault(fault) if fault.code == code)
}
