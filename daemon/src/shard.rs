//! One shard: a pinned thread that joins the brain to real memory, rings and the disk.
//!
//! ```text
//!   worker rings --take--> +-------------------------------+ --push--> worker rings
//!   mailbox (gRPC) ------> | loop: events -> brain -> what | -------> whoever asked over gRPC
//!   disk completions ----> |       it commands, done here  | --submit-> disk
//!   what peers say ------> |                               | -------> whoever speaks with the peers
//!                          +-------------------------------+
//! ```
//! The loop takes what is there, does what follows from it, and sleeps when nothing is left: first it spins
//! for some microseconds, then it waits on one epoll for the bells of all workers, the mailbox and the disk.
//! Whatever sleeps on the other side rings the bell; nothing is polled on a timer but the brain's own clock.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use crossbeam_queue::{ArrayQueue, SegQueue};
use kv_arena::{Entry, EntryState, HazardFile, HazardSet, Held, ShardMemory, Slab, Slot, TableReader};
use kv_block::code::Code;
use kv_block::layout::PageIndex;
use kv_block::{BindingId, BlockKey, Checksum, Fault, LeaseId, MissReason, SessionId, ShardId, SlotId, Tier};
use kv_node::{
    Brain, Command, Event, FetchDone, FetchFrom, FetchOp, FillToken, Keep, Micros, Now, Op, Origin, Reach,
    Reply, RequestId, ShardReport, Step, UploadDone,
};
use kv_shm::{Completion, Outcome, Place, Request, ShardEnd, Submission};
use kv_tiers::store::{BlockStore, StoreDone, StoreOp};
use kv_wire::message::Sight;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};

use crate::gpu::Gpus;
use crate::gpu::engine::{FillOrder, Order, Save};
use crate::object::{ObjectDoor, UploadOrder};

/// Submissions taken from one worker before the next one gets its turn.
const TAKE_MAX: usize = 64;
/// How long the loop looks again before it sleeps.
const SPIN: Duration = Duration::from_micros(20);
/// How often the brain sees time pass while nothing else happens that it waits for.
const TICK: Duration = Duration::from_millis(20);
/// How often hazards of sessions that are over are looked at while there are any, and otherwise.
const REAP_SOON: Duration = Duration::from_millis(100);
const REAP: Duration = Duration::from_secs(1);
/// A deadline of zero still lets the shard do what takes no waiting.
const DEADLINE_US_MIN: u32 = 1_000;
const MAILBOX: u64 = 0;
/// Bytes copied for a worker after which its answers are worth a wake-up of their own: it stages the next
/// blocks meanwhile. Answers to shorter work wait for the rest of the batch.
const NOTIFY_BYTES: u64 = 1 << 20;
/// What gRPC threads read by themselves and the shard has not heard of; more is forgotten.
const UNHEARD_MAX: usize = 4096;

/// A way to wake a sleeping shard. Cheap to clone; any thread may ring it.
#[derive(Clone)]
pub struct Waker(Arc<std::os::fd::OwnedFd>);

impl Waker {
    /// A waker that nobody has rung.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    /// Wakes the shard, now or before it next sleeps.
    pub fn wake(&self) {
        // The only failure is a counter at its maximum, and then the shard is awake.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// What becomes readable when it is rung.
    pub fn fd(&self) -> &std::os::fd::OwnedFd {
        &self.0
    }

    /// Forgets that it was rung.
    pub fn drain(&self) {
        let _ = rustix::io::read(&*self.0, &mut [0; 8]);
    }
}

/// Where the bytes of a put are that came over gRPC.
pub enum Body {
    /// They came along.
    Bytes(Bytes),
    /// In pages of a device's memory.
    Pages(PagedBody),
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self::Bytes(bytes)
    }
}

/// A block in pages, and who copies it.
pub struct PagedBody {
    /// The GPUs of this node.
    pub gpus: Gpus,
    /// The call that it is part of.
    pub save: Arc<Save>,
    /// Its pages.
    pub pages: Arc<[PageIndex]>,
}

/// Where an answer goes.
pub enum ReplyTo {
    /// One answer.
    Once(tokio::sync::oneshot::Sender<Reply>),
    /// Progress, then the answer.
    Stream(tokio::sync::mpsc::UnboundedSender<Reply>),
}

/// What other threads tell a shard.
pub enum Letter {
    /// A session began; workers come with their memory and hazards.
    Attach {
        /// Its number.
        session: SessionId,
        /// Memory shared with the worker; none for gRPC sessions.
        link: Option<Box<WorkerLink>>,
    },
    /// A session ended.
    Detach {
        /// Its number.
        session: SessionId,
    },
    /// A request over gRPC.
    Ask {
        /// Whose.
        session: SessionId,
        /// By when it must end.
        deadline: Instant,
        /// What.
        op: Op,
        /// Bytes of a put.
        body: Body,
        /// Where the answer goes.
        reply: ReplyTo,
    },
    /// Something for the brain.
    Tell(Event),
    /// Finish what is under way and end the thread.
    Stop,
}

/// What a shard keeps of a worker.
pub struct WorkerLink {
    /// Rings and staging area.
    pub end: ShardEnd,
    /// What it reads by itself.
    pub hazards: HazardFile,
    /// Whether it may fill arena slots in place.
    pub may_write: bool,
}

/// What a gRPC thread saw of a shard without asking it.
#[derive(Clone, Copy)]
enum Seen {
    Read { session: SessionId, slot: SlotId },
    Looked { binding: BindingId, count: u32 },
}

/// Where a shard's searches among the peers go. Each carries its deadline.
pub type FetchDoor = tokio::sync::mpsc::UnboundedSender<(ShardId, FetchOp, Instant)>;

/// How other threads reach a shard.
#[derive(Clone)]
pub struct ShardHandle {
    /// Which one.
    pub id: ShardId,
    mailbox: Arc<ArrayQueue<Letter>>,
    waker: Waker,
    heartbeat: Arc<AtomicU64>,
    slab: Slab,
    table: TableReader,
    seen: Arc<ArrayQueue<Seen>>,
    /// No more than a few for each search and each upload that the brain may have under way.
    heard: Arc<SegQueue<Event>>,
    disk_trouble: Arc<Mutex<Option<String>>>,
    disk_room: Arc<AtomicU64>,
    host_trouble: Arc<Mutex<Option<String>>>,
}

impl ShardHandle {
    fn new(id: ShardId, memory: &ShardMemory, mailbox_max: usize) -> std::io::Result<Self> {
        Ok(Self {
            id,
            mailbox: Arc::new(ArrayQueue::new(mailbox_max)),
            waker: Waker::new()?,
            heartbeat: Arc::default(),
            slab: memory.slab().clone(),
            table: memory.table_reader(),
            seen: Arc::new(ArrayQueue::new(UNHEARD_MAX)),
            heard: Arc::default(),
            disk_trouble: Arc::default(),
            disk_room: Arc::default(),
            host_trouble: Arc::default(),
        })
    }

    /// Leaves a letter; gives it back when the mailbox is full.
    #[allow(clippy::result_large_err, reason = "the letter comes back whole")]
    pub fn post(&self, letter: Letter) -> Result<(), Letter> {
        self.mailbox.push(letter)?;
        self.waker.wake();
        Ok(())
    }

    /// Leaves a letter that must arrive, waiting for room.
    pub fn post_surely(&self, mut letter: Letter) {
        while let Err(back) = self.post(letter) {
            letter = back;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Gives back a lease that its session does not hear of.
    pub fn give_back(&self, session: SessionId, lease: LeaseId) {
        self.undo(session, Op::Release { leases: vec![lease] });
    }

    /// Takes back an announcement that its session does not hear of.
    pub fn withdraw(&self, session: SessionId, key: BlockKey) {
        self.undo(session, Op::Abort { key });
    }

    /// It must arrive, and waits for room behind the caller's back; nobody waits for the answer. To be called
    /// where a runtime runs.
    fn undo(&self, session: SessionId, op: Op) {
        let from = Origin { session, request: RequestId(0) };
        let letter = Letter::Tell(Event::Request { from, deadline: Micros::NEVER, op });
        let (Err(mut letter), Ok(runtime)) = (self.post(letter), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        let shard = self.clone();
        // Ends with the runtime, and then the shard and its leases end as well.
        runtime.spawn(async move {
            while let Err(back) = shard.post(letter) {
                letter = back;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
    }

    /// Says what became of searches beyond this node.
    pub fn tell_fetched(&self, done: impl IntoIterator<Item = FetchDone>) {
        done.into_iter().for_each(|done| self.heard.push(Event::Fetch(done)));
        self.waker.wake();
    }

    /// Says what became of a slot that was to be filled from a device's memory.
    pub fn tell_filled(&self, fill: FillToken, filled: Result<(Slot, Checksum), Fault>) {
        self.heard.push(Event::Filled { fill, filled });
        self.waker.wake();
    }

    /// Says what became of blocks for the object tier.
    pub fn tell_uploaded(&self, done: UploadDone) {
        self.heard.push(Event::Upload(done));
        self.waker.wake();
    }

    /// What a look at the table tells of each of these: on which tier it is, or that it is expected.
    pub fn sights(&self, keys: &[BlockKey], mut each: impl FnMut(usize, Sight)) {
        let unix = unix_now();
        let mut at = 0;
        self.table.find_each(keys, |found| {
            each(at, found.map_or(Sight::Absent, |entry| sight(&entry, unix)));
            at += 1;
            true
        });
    }

    /// A waker for devices.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// How often the loop went round; it does so at least every second.
    pub fn heartbeat(&self) -> u64 {
        self.heartbeat.load(Ordering::Relaxed)
    }

    /// Why the disk tier is out of service; `None` while it serves or there is none.
    pub fn disk_trouble(&self) -> Option<String> {
        self.disk_trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How much the disk tier can hold, in bytes; 0 without one.
    pub fn disk_room(&self) -> u64 {
        self.disk_room.load(Ordering::Relaxed)
    }

    /// Why host memory is smaller than configured; `None` while it is not, or still grows.
    pub fn host_trouble(&self) -> Option<String> {
        self.host_trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Host memory stays smaller than configured.
    pub fn set_host_trouble(&self, why: String) {
        *self.host_trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
    }

    /// The shard's host memory, to read blocks that a lease holds.
    pub fn slab(&self) -> &Slab {
        &self.slab
    }

    /// Holds a block that is in host memory, verified and not over, without waking the shard, which hears of
    /// it later. `None`: ask the shard, which knows more.
    pub fn hold_now(&self, session: SessionId, key: &BlockKey) -> Option<Held> {
        let entry = self.table.find(key).filter(|entry| is_in_host(entry, unix_now()))?;
        let (slot, generation) = entry.host?;
        let held = self.slab.hold(slot, generation)?;
        // The entry was a hint; under the hold the header cannot change any more.
        if !held.is_verified() || held.record().key != *key {
            return None;
        }
        self.saw(Seen::Read { session, slot });
        Some(held)
    }

    /// The checksum of a block that can be read here and is not over, for whoever has a copy of its bytes elsewhere. The
    /// shard hears that it was read.
    pub fn known_sum(&self, session: SessionId, key: &BlockKey) -> Option<Checksum> {
        let unix = unix_now();
        let is_over = |entry: &Entry| entry.expires_at != 0 && entry.expires_at <= unix;
        let present = |entry: &Entry| entry.state == EntryState::Present && !is_over(entry);
        let entry = self.table.find(key).filter(present)?;
        if let Some((slot, _)) = entry.host {
            self.saw(Seen::Read { session, slot });
        }
        Some(entry.checksum)
    }

    /// How many of the first `keys` are in host memory without a gap, as far as a look at the table tells.
    pub fn resident_prefix(&self, keys: &[BlockKey]) -> usize {
        let unix = unix_now();
        let mut resident = 0;
        let mut run = (BindingId(0), 0);
        self.table.find_each(keys, |found| {
            let Some(entry) = found.filter(|entry| is_in_host(entry, unix)) else { return false };
            if entry.binding != run.0 {
                self.looked(run);
                run = (entry.binding, 0);
            }
            run.1 += 1;
            resident += 1;
            true
        });
        self.looked(run);
        resident
    }

    fn looked(&self, (binding, count): (BindingId, u32)) {
        if count > 0 {
            self.saw(Seen::Looked { binding, count });
        }
    }

    fn saw(&self, seen: Seen) {
        // Statistics and the order of eviction may miss some; nothing else depends on it.
        let _ = self.seen.push(seen);
    }
}

/// Everything that a shard's thread owns.
pub struct Shard {
    id: ShardId,
    /// How it is reached, for devices that answer later.
    handle: ShardHandle,
    brain: Brain,
    memory: ShardMemory,
    slab: Slab,
    hazards: HazardSet,
    store: Option<Box<dyn DiskTier>>,
    disk_trouble: Arc<Mutex<Option<String>>>,
    disk_room: Arc<AtomicU64>,
    serving: bool,
    mailbox: Arc<ArrayQueue<Letter>>,
    seen: Arc<ArrayQueue<Seen>>,
    heard: Arc<SegQueue<Event>>,
    peers: Option<FetchDoor>,
    object: Option<ObjectDoor>,
    waker: Waker,
    heartbeat: Arc<AtomicU64>,
    epoll: std::os::fd::OwnedFd,
    workers: HashMap<SessionId, Worker>,
    /// Workers in the order in which they are asked.
    turns: Vec<SessionId>,
    asked: HashMap<RequestId, Asked>,
    next_request: u64,
    started: Instant,
    tick_due: Instant,
    reap_due: Instant,
    parked: VecDeque<StoreOp>,
    commands: Vec<Command>,
    doing: Vec<Command>,
    completions: Vec<StoreDone>,
    submissions: Vec<Result<Submission, kv_shm::Malformed>>,
    stopping: bool,
}

/// A disk tier that also says how it is.
pub trait DiskTier: BlockStore {
    /// Why it is out of service; `None` while it serves.
    fn trouble(&self) -> Option<String>;
    /// How much it can hold, in bytes: what it may, or less where the file system has no room for more.
    fn room_bytes(&self) -> u64;
    /// Host memory has more regions than before: they may be made known to the device.
    fn host_grew(&self);
}

struct Worker {
    end: ShardEnd,
    may_write: bool,
    /// It was answered since it was last woken.
    answered: bool,
    /// Bytes copied for it since then.
    copied: u64,
}

impl Worker {
    /// Wakes it, if it sleeps and was answered.
    fn notify(&mut self) {
        self.copied = 0;
        if std::mem::take(&mut self.answered) {
            self.end.ring.notify();
        }
    }
}

enum Asked {
    Ring { id: u64 },
    Rpc { body: Body, reply: ReplyTo },
}

impl Shard {
    /// A shard over opened devices; `mailbox_max` letters may wait.
    pub fn new(
        id: ShardId,
        brain: Brain,
        memory: ShardMemory,
        hazards: HazardSet,
        mailbox_max: usize,
    ) -> std::io::Result<(Self, ShardHandle)> {
        let handle = ShardHandle::new(id, &memory, mailbox_max)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &*handle.waker.0, EventData::new_u64(MAILBOX), EventFlags::IN)?;
        let now = Instant::now();
        let shard = Self {
            id,
            handle: handle.clone(),
            brain,
            memory,
            slab: handle.slab.clone(),
            hazards,
            store: None,
            disk_trouble: Arc::clone(&handle.disk_trouble),
            disk_room: Arc::clone(&handle.disk_room),
            serving: true,
            mailbox: Arc::clone(&handle.mailbox),
            seen: Arc::clone(&handle.seen),
            heard: Arc::clone(&handle.heard),
            peers: None,
            object: None,
            waker: handle.waker.clone(),
            heartbeat: Arc::clone(&handle.heartbeat),
            epoll,
            workers: HashMap::new(),
            turns: Vec::new(),
            asked: HashMap::new(),
            next_request: 1,
            started: now,
            tick_due: now,
            reap_due: now,
            parked: VecDeque::new(),
            commands: Vec::new(),
            doing: Vec::new(),
            completions: Vec::new(),
            submissions: Vec::new(),
            stopping: false,
        };
        Ok((shard, handle))
    }

    /// Joins the disk tier.
    pub fn set_store(&mut self, store: Box<dyn DiskTier>) {
        self.disk_room.store(store.room_bytes(), Ordering::Relaxed);
        self.store = Some(store);
    }

    /// Joins whoever speaks with the peers.
    pub fn set_peers(&mut self, door: FetchDoor) {
        self.peers = Some(door);
    }

    /// Joins the object tier.
    pub fn set_object(&mut self, door: ObjectDoor) {
        self.object = Some(door);
    }

    /// Tells the brain something before the loop starts.
    pub fn tell(&mut self, event: Event) {
        let now = self.now();
        self.brain.handle(now, event, &mut self.commands);
    }

    /// The brain, before the loop starts.
    pub fn brain_mut(&mut self) -> &mut Brain {
        &mut self.brain
    }

    /// Runs until told to stop. The memory stays behind for the next life.
    pub fn run(mut self) {
        let mut idle_since: Option<Instant> = None;
        while !(self.stopping && self.is_quiet()) {
            self.heartbeat.fetch_add(1, Ordering::Relaxed);
            let busy = self.turn();
            if busy {
                idle_since = None;
                continue;
            }
            let since = *idle_since.get_or_insert_with(Instant::now);
            if since.elapsed() < SPIN {
                std::hint::spin_loop();
            } else if self.sleep() {
                idle_since = None;
            }
        }
        tracing::info!(shard = %self.id, epoch = %self.memory.epoch(), "shard stopped; host memory stays");
    }

    fn is_quiet(&self) -> bool {
        self.parked.is_empty() && self.store.as_ref().is_none_or(|store| store.usage().in_flight == 0)
    }

    fn now(&self) -> Now {
        Now { micros: self.micros(Instant::now()), unix: unix_now() }
    }

    fn micros(&self, at: Instant) -> Micros {
        Micros(at.saturating_duration_since(self.started).as_micros() as u64 + 1)
    }

    /// Once around. Says whether there was anything to do.
    fn turn(&mut self) -> bool {
        let now = self.now();
        let mut busy = self.take_letters(now);
        busy |= self.take_rings(now);
        busy |= self.take_store(now);
        busy |= self.take_heard(now);
        let at = Instant::now();
        if at >= self.tick_due {
            self.tick_due = at + TICK;
            self.hear_touches(now);
            self.look_at_room();
            if at >= self.reap_due {
                let waiting = self.hazards.reap();
                self.reap_due = at + if waiting > 0 { REAP_SOON } else { REAP };
                self.stop_unheard(now);
            }
            self.brain.handle(now, Event::Tick, &mut self.commands);
        } else if self.brain.next_tick(now.micros).is_some_and(|due| due <= now.micros) {
            self.brain.handle(now, Event::Tick, &mut self.commands);
            busy = true;
        }
        self.obey(now);
        if let Some(store) = &mut self.store {
            store.kick();
        }
        self.workers.values_mut().for_each(Worker::notify);
        busy
    }

    fn take_letters(&mut self, now: Now) -> bool {
        // Whoever asks now learns of what others read before.
        self.hear_seen(now);
        let mut taken = 0;
        while taken < TAKE_MAX {
            let Some(letter) = self.mailbox.pop() else { break };
            taken += 1;
            match letter {
                Letter::Attach { session, link } => {
                    self.brain.handle(now, Event::Opened { session }, &mut self.commands);
                    if let Some(link) = link {
                        self.attach(session, *link);
                    }
                }
                Letter::Detach { session } => self.detach(now, session),
                Letter::Ask { session, deadline, op, body, reply } => {
                    let from = self.origin(session, Asked::Rpc { body, reply });
                    let deadline = self.micros(deadline);
                    self.brain.handle(now, Event::Request { from, deadline, op }, &mut self.commands);
                }
                Letter::Tell(event) => {
                    let grew = matches!(event, Event::Grown { .. });
                    self.brain.handle(now, event, &mut self.commands);
                    if let Some(store) = self.store.as_ref().filter(|_| grew) {
                        store.host_grew();
                    }
                }
                Letter::Stop => self.stopping = true,
            }
            self.obey(now);
        }
        taken > 0
    }

    fn origin(&mut self, session: SessionId, asked: Asked) -> Origin {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        self.asked.insert(request, asked);
        Origin { session, request }
    }

    fn attach(&mut self, session: SessionId, link: WorkerLink) {
        let WorkerLink { end, hazards, may_write } = link;
        let watched =
            epoll::add(&self.epoll, end.ring.bell().as_fd(), EventData::new_u64(session.0), EventFlags::IN);
        if let Err(error) = watched {
            tracing::error!(%session, %error, "a worker's bell cannot be watched; the session is not served");
            return;
        }
        self.hazards.add(hazards);
        self.workers.insert(session, Worker { end, may_write, answered: false, copied: 0 });
        self.turns.push(session);
    }

    fn detach(&mut self, now: Now, session: SessionId) {
        if let Some(worker) = self.workers.remove(&session) {
            self.turns.retain(|other| *other != session);
            let _ = epoll::delete(&self.epoll, worker.end.ring.bell().as_fd());
            self.hazards.remove(session);
            // Its process may take a moment to die: then what it read is given back on the next look.
            self.reap_due = Instant::now();
        }
        self.brain.handle(now, Event::Closed { session }, &mut self.commands);
    }

    fn take_rings(&mut self, now: Now) -> bool {
        let mut busy = false;
        let mut broken = Vec::new();
        let mut submissions = std::mem::take(&mut self.submissions);
        for at in 0..self.turns.len() {
            // A session that ends meanwhile shortens the list: whoever is passed over has its turn next time.
            let Some(session) = self.turns.get(at).copied() else { break };
            let Some(worker) = self.workers.get_mut(&session) else { continue };
            match worker.end.ring.take(TAKE_MAX, &mut submissions) {
                Ok(0) => continue,
                Ok(_) => busy = true,
                Err(error) => {
                    tracing::warn!(%session, %error, "a worker wrote nonsense into its ring; its session ends");
                    broken.push(session);
                    continue;
                }
            }
            // What was told before a submission was made counts for it: a binding, most of all.
            self.take_letters(now);
            for submission in submissions.iter().flatten() {
                if let Request::Put { key, .. } | Request::Acquire { key, .. } = &submission.request {
                    self.brain.prefetch_entry(key);
                }
            }
            for submission in submissions.drain(..) {
                self.submitted(now, session, submission);
            }
            self.obey(now);
            if let Some(worker) = self.workers.get_mut(&session) {
                worker.notify();
            }
        }
        self.submissions = submissions;
        for session in broken {
            self.detach(now, session);
            self.obey(now);
        }
        busy
    }

    fn submitted(&mut self, now: Now, session: SessionId, submission: Result<Submission, kv_shm::Malformed>) {
        let submission = match submission {
            Ok(submission) => submission,
            Err(malformed) => {
                let outcome = Outcome::Fault { code: Code::BadRequest, retry_after_ms: 0 };
                return self.complete(session, malformed.id, outcome);
            }
        };
        let Submission { id, deadline_us, request } = submission;
        let deadline = Micros(now.micros.0 + u64::from(deadline_us.max(DEADLINE_US_MIN)));
        let keep = |priority, ttl_s: u32| Keep {
            priority,
            expires_at: if ttl_s == 0 { 0 } else { now.unix.saturating_add(ttl_s) },
        };
        let op = match request {
            Request::Ping => return self.complete(session, id, Outcome::Done),
            Request::Put { key, binding, offset, bytes, priority, ttl_s, durable, after } => {
                let keep = keep(priority, ttl_s);
                Op::Put { key, binding, source: offset, bytes, keep, durable, after }
            }
            Request::Reserve { key, binding, priority, ttl_s, in_place, after } => {
                if in_place && !self.workers.get(&session).is_some_and(|worker| worker.may_write) {
                    let outcome = Outcome::Fault { code: Code::Denied, retry_after_ms: 0 };
                    return self.complete(session, id, outcome);
                }
                Op::Reserve { key, binding, keep: keep(priority, ttl_s), in_place, after }
            }
            Request::Commit { key, offset, bytes, durable } => {
                Op::Commit { key, source: offset, bytes, durable }
            }
            Request::CommitInPlace { key, slot, generation, checksum, durable } => {
                Op::CommitInPlace { key, slot, generation, checksum, durable }
            }
            Request::Abort { key } => Op::Abort { key },
            Request::Acquire { key, wait, after } => {
                let (wait, reach) = (wait && deadline_us > 0, Reach::Further { hint: None });
                Op::Acquire { key, wait, reach, after }
            }
            Request::Release { lease } => Op::Release { leases: vec![lease] },
            Request::Prefetch { key, after } => {
                Op::Prefetch { steps: vec![Step { key, after }], reach: Reach::Further { hint: None } }
            }
        };
        let from = self.origin(session, Asked::Ring { id });
        self.brain.handle(now, Event::Request { from, deadline, op }, &mut self.commands);
        self.obey(now);
    }

    fn take_store(&mut self, now: Now) -> bool {
        let Some(store) = &mut self.store else { return false };
        store.poll(&mut self.completions);
        let trouble = store.trouble();
        let serving = trouble.is_none();
        if serving != self.serving {
            self.serving = serving;
            match &trouble {
                Some(why) => {
                    tracing::warn!(code = %Code::TierDegraded, why, "the disk tier is out of service");
                }
                None => tracing::info!("the disk tier serves again"),
            }
            *self.disk_trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
            self.brain.handle(now, Event::StoreHealth { serving }, &mut self.commands);
        }
        let busy = !self.completions.is_empty();
        let mut completions = std::mem::take(&mut self.completions);
        for done in completions.drain(..) {
            self.brain.handle(now, Event::Store(done), &mut self.commands);
            self.obey(now);
        }
        self.completions = completions;
        while let Some(op) = self.parked.pop_front() {
            if !self.submit(op) {
                break;
            }
        }
        busy
    }

    fn take_heard(&mut self, now: Now) -> bool {
        let mut busy = false;
        while let Some(event) = self.heard.pop() {
            busy = true;
            self.brain.handle(now, event, &mut self.commands);
            self.obey(now);
        }
        busy
    }

    fn fetch(&mut self, now: Now, from: FetchFrom, op: FetchOp) {
        let deadline = match &op {
            FetchOp::Find { deadline, .. } => {
                Instant::now() + Duration::from_micros(deadline.0.saturating_sub(now.micros.0))
            }
            FetchOp::Into { .. } | FetchOp::Decline { .. } | FetchOp::Leave { .. } => Instant::now(),
        };
        let refused = match from {
            FetchFrom::Peers => {
                self.peers.as_ref().map(|door| door.send((self.id, op, deadline)).map_err(|op| op.0))
            }
            FetchFrom::Object => self.object.as_ref().map(|door| door.fetch((self.id, op, deadline))),
        };
        let Some(Err((_, refused, _))) = refused else { return };
        // The daemon ends: whoever speaks with the peers and the store is gone before the shards are.
        if let FetchOp::Find { fetch, .. } | FetchOp::Into { fetch, .. } | FetchOp::Decline { fetch, .. } =
            refused
        {
            let reason = match from {
                FetchFrom::Peers => MissReason::PeerDown,
                FetchFrom::Object => MissReason::TierDegraded,
            };
            self.heard.push(Event::Fetch(FetchDone::Missed { fetch, reason }));
        }
    }

    fn upload(&mut self, order: UploadOrder) {
        let upload = order.upload;
        let Some(Err(_)) = self.object.as_ref().map(|door| door.upload(order)) else { return };
        self.heard.push(Event::Upload(UploadDone::Refused { upload }));
    }

    /// False when the disk takes no more for now; the operation waits.
    fn submit(&mut self, op: StoreOp) -> bool {
        let Some(store) = &mut self.store else { return false };
        match store.submit(op) {
            Ok(()) => true,
            Err(back) => {
                self.parked.push_front(back);
                false
            }
        }
    }

    /// How much the disk tier can hold seldom changes: it is asked for at a tick, not at every turn.
    fn look_at_room(&self) {
        let Some(store) = &self.store else { return };
        let room = store.room_bytes();
        let before = self.disk_room.swap(room, Ordering::Relaxed);
        if room < before {
            let (room, wanted) = (room >> 20, before >> 20);
            tracing::warn!(code = %Code::DiskFull, "the file system has no room for more of the disk tier: it goes on with {room} of {wanted} MiB");
        }
    }

    fn hear_seen(&mut self, now: Now) {
        for _ in 0..UNHEARD_MAX {
            let event = match self.seen.pop() {
                None => break,
                Some(Seen::Read { session, slot }) => Event::Read { session, slot },
                Some(Seen::Looked { binding, count }) => Event::Looked { binding, count },
            };
            self.brain.handle(now, event, &mut self.commands);
        }
    }

    fn hear_touches(&mut self, now: Now) {
        let mut slots = Vec::new();
        self.hazards.drain_touches(&mut slots);
        if !slots.is_empty() {
            self.brain.handle(now, Event::Touched(slots), &mut self.commands);
        }
    }

    /// Does what the brain commands, and what follows from that, until nothing is left.
    fn obey(&mut self, now: Now) {
        while !self.commands.is_empty() {
            let mut doing = std::mem::replace(&mut self.commands, std::mem::take(&mut self.doing));
            for command in doing.drain(..) {
                match command {
                    Command::Reply { to, mut reply } => {
                        if let Reply::Report(report) = &mut reply {
                            count_reads(&self.hazards, report);
                        }
                        self.answer(to, reply);
                    }
                    Command::Fill { fill, from, source, bytes, key, slot } => {
                        if let Some(filled) = self.fill((fill, from), source, (key, bytes), slot) {
                            self.brain.handle(now, Event::Filled { fill, filled }, &mut self.commands);
                        }
                    }
                    Command::Store(op) if self.parked.is_empty() => {
                        self.submit(op);
                    }
                    Command::Store(op) => self.parked.push_back(op),
                    Command::Fetch(from, op) => self.fetch(now, from, op),
                    Command::Upload { upload, held, binding, expires_at, parent } => {
                        self.upload(UploadOrder {
                            shard: self.id,
                            upload,
                            held,
                            binding,
                            expires_at,
                            parent,
                        });
                    }
                    Command::Sweep => {
                        let freed = self.slab.sweep(&self.hazards);
                        self.brain.handle(now, Event::Swept { freed }, &mut self.commands);
                    }
                }
            }
            self.doing = doing;
        }
    }

    /// Copies the bytes of a put into its slot. `None`: a device does, and says when it is done.
    fn fill(
        &mut self,
        (fill, from): (FillToken, Origin),
        source: u64,
        (key, bytes): (BlockKey, u32),
        mut slot: Slot,
    ) -> Option<Result<(Slot, Checksum), Fault>> {
        let checksum = match self.asked.get(&from.request) {
            Some(Asked::Rpc { body: Body::Pages(PagedBody { gpus, save, pages }), .. }) => {
                let (save, pages, shard) = (Arc::clone(save), Arc::clone(pages), self.handle.clone());
                let engine = save.paged.cache.engine;
                gpus.order(engine, Order::Fill(FillOrder { save, pages, shard, fill, key, bytes, slot }));
                return None;
            }
            Some(Asked::Rpc { body: Body::Bytes(body), .. }) => {
                (body.len() == bytes as usize).then(|| slot.copy_from(&key, body))
            }
            Some(Asked::Ring { .. }) => self.workers.get_mut(&from.session).and_then(|worker| {
                worker.copied += u64::from(bytes);
                let range = worker.end.staging.range(source, bytes).ok()?;
                Some(slot.copy_with(&key, bytes, |at, piece| range.copy_to(at, piece)))
            }),
            None => None,
        };
        Some(checksum.map(|checksum| (slot, checksum)).ok_or_else(|| {
            Fault::new(Code::StagingRange, "the bytes of the block went away before they were copied")
        }))
    }

    fn answer(&mut self, to: Origin, reply: Reply) {
        if let Reply::Progress(_) = reply {
            let Some(Asked::Rpc { reply: ReplyTo::Stream(stream), .. }) = self.asked.get(&to.request) else {
                return;
            };
            if stream.send(reply).is_err() {
                let now = self.now();
                self.brain.handle(now, Event::Unheard { from: to }, &mut self.commands);
            }
            return;
        }
        match self.asked.remove(&to.request) {
            None => {}
            // Whoever asked may have gone; then nobody misses the answer. A lease that nobody got comes back
            // with the session.
            Some(Asked::Rpc { reply: ReplyTo::Once(sender), .. }) => {
                if let Err(Reply::Leased(grant)) = sender.send(reply) {
                    self.give_back(to.session, grant.lease);
                }
            }
            Some(Asked::Rpc { reply: ReplyTo::Stream(stream), .. }) => {
                let _ = stream.send(reply);
            }
            Some(Asked::Ring { id }) => self.complete(to.session, id, outcome(reply)),
        }
    }

    /// Work that has no progress to tell finds out by itself that nobody listens.
    fn stop_unheard(&mut self, now: Now) {
        let gone = |asked: &Asked| match asked {
            Asked::Rpc { reply: ReplyTo::Stream(stream), .. } => stream.is_closed(),
            _ => false,
        };
        let unheard: Vec<RequestId> =
            self.asked.iter().filter(|(_, asked)| gone(asked)).map(|(request, _)| *request).collect();
        for request in unheard {
            // Streams are for administrators, who have no session.
            let from = Origin { session: SessionId(0), request };
            self.brain.handle(now, Event::Unheard { from }, &mut self.commands);
        }
    }

    fn give_back(&mut self, session: SessionId, lease: LeaseId) {
        let now = self.now();
        let from = Origin { session, request: RequestId(0) };
        let op = Op::Release { leases: vec![lease] };
        self.brain.handle(now, Event::Request { from, deadline: Micros::NEVER, op }, &mut self.commands);
    }

    fn complete(&mut self, session: SessionId, id: u64, outcome: Outcome) {
        let Some(worker) = self.workers.get_mut(&session) else { return };
        if let Err(error) = worker.end.ring.push(&Completion { id, outcome }) {
            tracing::error!(%session, %error, "a completion found no room");
        }
        worker.answered = true;
        if worker.copied >= NOTIFY_BYTES {
            worker.notify();
        }
    }

    /// Sleeps until something happens or the brain's clock is due. False when there was no time to.
    fn sleep(&mut self) -> bool {
        let now = self.micros(Instant::now());
        let tick = self.tick_due.saturating_duration_since(Instant::now());
        let wait = match self.brain.next_tick(now) {
            Some(due) => tick.min(Duration::from_micros(due.0.saturating_sub(now.0))),
            // Nothing waits for a moment: the clock may run slower.
            None => Duration::from_millis(500),
        };
        let mut agreed = self.mailbox.is_empty();
        for worker in self.workers.values() {
            agreed &= worker.end.ring.doze().unwrap_or(false);
        }
        let slept = agreed && !wait.is_zero();
        if slept {
            let limit = rustix::event::Timespec::try_from(wait).ok();
            let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 64];
            let count = epoll::wait(&self.epoll, &mut events, limit.as_ref()).unwrap_or(0);
            for event in &events[..count] {
                match event.data.u64() {
                    MAILBOX => self.waker.drain(),
                    session => self.rung(SessionId(session)),
                }
            }
        }
        for worker in self.workers.values() {
            worker.end.ring.wake();
        }
        slept
    }

    fn rung(&mut self, session: SessionId) {
        let Some(worker) = self.workers.get(&session) else { return };
        if worker.end.ring.bell().drain().is_err() {
            // Its other end is closed; the door will say so. Until then it must not keep us awake.
            let _ = epoll::delete(&self.epoll, worker.end.ring.bell().as_fd());
        }
    }
}

/// Unix time in seconds, for expiry.
fn unix_now() -> u32 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    u32::try_from(since).unwrap_or(u32::MAX)
}

fn sight(entry: &Entry, unix: u32) -> Sight {
    let over = entry.expires_at != 0 && entry.expires_at <= unix;
    match entry.state {
        EntryState::Pending => Sight::Pending,
        EntryState::Present if over => Sight::Absent,
        EntryState::Present if entry.host.is_some() => Sight::In(Tier::Host),
        EntryState::Present => Sight::In(Tier::Disk),
        EntryState::Ghost(_) => Sight::Absent,
    }
}

fn is_in_host(entry: &Entry, unix: u32) -> bool {
    let over = entry.expires_at != 0 && entry.expires_at <= unix;
    entry.state == EntryState::Present && entry.host.is_some() && !over
}

/// An answer of the brain in the words of the ring.
fn outcome(reply: Reply) -> Outcome {
    match reply {
        Reply::Stored { already } => Outcome::Stored { already },
        Reply::AlreadyThere => Outcome::AlreadyThere,
        Reply::Miss(reason) => Outcome::Miss(reason),
        Reply::Counted { .. } => Outcome::Done,
        Reply::Reserved { slot } => {
            let place = slot.map(|grant| Place {
                slot: grant.slot,
                generation: grant.generation,
                offset: grant.offset,
            });
            Outcome::Reserved { place }
        }
        Reply::Leased(grant) => {
            Outcome::Leased { lease: grant.lease, slot: grant.slot, generation: grant.generation }
        }
        Reply::Fault(fault) => fault_outcome(&fault),
        _ => Outcome::Fault { code: Code::Bug, retry_after_ms: 0 },
    }
}

fn fault_outcome(fault: &Fault) -> Outcome {
    let retry_after_ms = fault.retry_after.map_or(0, |wait| wait.as_millis().clamp(1, 60_000) as u32);
    Outcome::Fault { code: fault.code, retry_after_ms }
}

/// Adds what workers read by themselves, which the brain does not see.
fn count_reads(hazards: &HazardSet, report: &mut ShardReport) {
    for (session, reading) in hazards.reading() {
        report.reading += u64::from(reading);
        if let Some(row) = report.sessions.iter_mut().find(|row| row.session == session.0) {
            row.reading += reading;
        }
    }
}

#[cfg(test)]
mod tests {
    use kv_node::{Binding, BrainConfig, Filter};
    use kv_tiers::catalog::Catalog;
    use kv_tiers::evict::PolicyKind;
    use kv_tiers::host::{HostTier, Watermarks};

    use super::*;

    /// A shard without a thread, with blocks of 4 KiB under one binding, and a catalog of many parts.
    fn shard() -> (Shard, ShardHandle) {
        let geometry = kv_arena::Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: 1 << 17 };
        let mut memory = ShardMemory::anonymous(geometry).unwrap();
        let catalog = Catalog::new(memory.take_table().unwrap().unwrap(), 512);
        let host = HostTier::new(memory.slab().clone(), PolicyKind::Sieve, Watermarks::default());
        let config = BrainConfig {
            shard: ShardId(0),
            epoch: memory.epoch(),
            disk: None,
            leases_per_session_max: 64,
            sessions_max: 64,
            pinned_bytes_max: 1 << 20,
            pending_ttl_ms: 500,
            stalled_max: 8,
            offloads_max: 8,
            onboards_max: 8,
            fetches_max: 0,
            peers: false,
            object: None,
            fetch_limit_ms: 1000,
            events_kept_max: 1024,
        };
        let brain = Brain::new(config, catalog, host);
        let (mut shard, handle) = Shard::new(ShardId(0), brain, memory, HazardSet::new(), 64).unwrap();
        let tag = kv_block::BindingTag(7);
        let binding = Binding { id: BindingId(0), tag, block_bytes: 4096, tenant: "a".into() };
        shard.tell(Event::Bound(binding));
        (shard, handle)
    }

    fn ask(shard: &mut Shard, handle: &ShardHandle, op: Op, body: &Bytes) -> Reply {
        let (sender, mut receiver) = tokio::sync::oneshot::channel();
        let deadline = Instant::now() + Duration::from_secs(20);
        let (session, body, reply) = (SessionId(0), body.clone().into(), ReplyTo::Once(sender));
        assert!(handle.post(Letter::Ask { session, deadline, op, body, reply }).is_ok());
        shard.turn();
        receiver.try_recv().unwrap()
    }

    #[test]
    fn a_purge_stops_when_whoever_asked_for_it_is_gone() {
        let (mut shard, handle) = shard();
        for n in 1..=100 {
            let key = BlockKey::from_halves([0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(n), n]);
            let (binding, keep) = (BindingId(0), Keep::default());
            let op = Op::Put { key, binding, source: 0, bytes: 4096, keep, durable: false, after: None };
            let reply = ask(&mut shard, &handle, op, &Bytes::from(vec![0; 4096]));
            assert!(matches!(reply, Reply::Stored { .. }), "{reply:?}");
        }
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        let deadline = Instant::now() + Duration::from_secs(20);
        let op = Op::Purge { filter: Filter::default(), tier: None, dry_run: false };
        let (session, body, reply) = (SessionId(0), Bytes::new().into(), ReplyTo::Stream(sender));
        assert!(handle.post(Letter::Ask { session, deadline, op, body, reply }).is_ok());
        while receiver.is_empty() {
            shard.turn();
        }
        assert!(matches!(receiver.try_recv(), Ok(Reply::Progress(_))));
        drop(receiver);
        while !shard.asked.is_empty() {
            shard.turn();
        }
        let reply = ask(&mut shard, &handle, Op::Report, &Bytes::new());
        let Reply::Report(report) = reply else { panic!("{reply:?}") };
        assert!(report.blocks > 50, "{} blocks are left", report.blocks);
    }

    #[tokio::test]
    async fn a_lease_is_given_back_though_the_mailbox_is_full() {
        let geometry = kv_arena::Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: 64 };
        let memory = ShardMemory::anonymous(geometry).unwrap();
        let handle = ShardHandle::new(ShardId(0), &memory, 1).unwrap();
        assert!(handle.post(Letter::Stop).is_ok());
        handle.give_back(SessionId(7), LeaseId(9));
        assert!(matches!(handle.mailbox.pop(), Some(Letter::Stop)));
        let limit = Instant::now() + Duration::from_secs(20);
        let letter = loop {
            if let Some(letter) = handle.mailbox.pop() {
                break letter;
            }
            assert!(Instant::now() < limit, "the lease never came back");
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        let Letter::Tell(Event::Request { from, op: Op::Release { leases }, .. }) = letter else {
            panic!("another letter than the one that waited")
        };
        assert_eq!((from.session, &leases[..]), (SessionId(7), &[LeaseId(9)][..]));
    }
}
