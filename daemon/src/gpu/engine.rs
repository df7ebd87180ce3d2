//! One device's thread: it has the device's copies made and tells what became of them.
//!
//! ```text
//!   shards -- Fill (a slot, and the pages whose bytes it wants) --> +--------+ -- jobs --> Copier --> device
//!   calls --- Ready (more layers), Load, Quiesce, Forget ---------> | Engine | <- ended --
//!                                                                   +--------+
//!   save.rs  pages -> slots, or pages -> pool -> slots;  then sums -> Event::Filled -> the shards
//!   load.rs  pool -> pages, then slots -> pages;         then LoadNews -> the call
//! ```
//! What is copied belongs to the job until the device is done with it, whatever becomes of whoever asked: a deadline, a
//! caller or a session that ends only keeps what has not been begun from being begun.

mod load;
mod order;
mod save;
mod verify;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use kv_arena::Slot;
use kv_block::code::Code;
use kv_block::{Fault, Record};
use kv_gpu::copier::{Copier, CopyDone, Hosts, Job, JobToken};
use kv_gpu::{Device, Error, Place, Reserved};
use tokio::sync::oneshot;

pub use order::{FillOrder, LoadNews, LoadOrder, Of, Order, Resident, Save};

use self::load::{Loading, Once};
use self::save::Filling;
use self::verify::{Verifier, Verifying};
use super::arena::Arenas;
use super::cache::Cache;
use super::sums::Sum;

/// How soon the device is asked again what it has done: more and more seldom while nothing happens.
const LOOK_MIN: Duration = Duration::from_micros(10);
const LOOK_MAX: Duration = Duration::from_micros(500);
/// How often deadlines and callers are looked at.
const TICK: Duration = Duration::from_millis(5);
/// How long an idle thread sleeps.
const IDLE: Duration = Duration::from_secs(1);
/// How long the device may take for what is under way when the daemon ends.
const LAST_COPIES: Duration = Duration::from_secs(10);
/// How soon whoever was refused should try again.
const TRY_AGAIN: Duration = Duration::from_millis(5);

/// The blocks that the daemon keeps in a device's memory; the device's thread moves them on, calls look them up.
pub type Kept = Arc<Mutex<kv_gpu::Cache>>;

/// A pool, if nobody has it at this moment: a caller's thread does not wait for one that may be waiting for the driver.
pub fn try_lock(kept: &Kept) -> Option<MutexGuard<'_, kv_gpu::Cache>> {
    const TRIES: usize = 32;
    for _ in 0..TRIES {
        match kept.try_lock() {
            Ok(pool) => return Some(pool),
            Err(TryLockError::Poisoned(pool)) => return Some(pool.into_inner()),
            Err(TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    }
    None
}

/// A pool, for a moment.
pub fn lock(kept: &Kept) -> MutexGuard<'_, kv_gpu::Cache> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a device has done since the start.
#[derive(Default)]
pub struct Stats {
    /// Bytes from host memory to the device.
    pub bytes_in: AtomicU64,
    /// Bytes from the device to host memory.
    pub bytes_out: AtomicU64,
    /// Bytes within the device's memory, and from another's.
    pub bytes_across: AtomicU64,
    /// Copies that ended well.
    pub done: AtomicU64,
    /// Copies that did not.
    pub failed: AtomicU64,
    /// Blocks of which the sum on one side of the bus was not that on the other.
    pub damaged: AtomicU64,
    /// Copies, and their bytes, that the device has in its queues.
    pub under_way: AtomicU64,
    /// Bytes of those.
    pub under_way_bytes: AtomicU64,
    /// Copies that wait for their turn.
    pub waiting: AtomicU64,
    /// Bytes of the device's memory that nobody has, in any process, as the device said last; 0 when it did not.
    pub free_bytes: AtomicU64,
    /// How pages are copied.
    pub method: OnceLock<String>,
}

impl Stats {
    fn add(count: &AtomicU64, more: u64) {
        count.fetch_add(more, Ordering::Relaxed);
    }
}

/// A job that the copier has.
struct UnderWay {
    /// Whose pages; nobody's where it is between host memory and the pool of our own accord.
    cache: Option<Arc<Cache>>,
    until: Instant,
    /// Why it is not to go on.
    over: Option<Fault>,
    bytes: u64,
    what: What,
}

/// What a job is for.
enum What {
    /// Pages into slots, which the job has; `given` is how often layers were said to be ready for it.
    Save { save: Arc<Save>, fills: Vec<Filling>, given: usize },
    /// Pages into the pool, on the way to slots.
    Gather { save: Arc<Save>, fills: Vec<Filling>, slots: Vec<Slot>, rooms: Vec<Reserved> },
    /// From there into slots, which the job has. They are summed meanwhile, under the number in `verify`.
    Drain { save: Arc<Save>, fills: Vec<Filling>, rooms: Vec<Reserved>, verify: Option<u64> },
    /// From pools into pages; the places stay what they are until then.
    Spread { load: u64, places: Vec<Place> },
    /// From host memory into pages.
    Load { load: u64 },
    /// From host memory into the pool.
    Promote { rooms: Vec<Reserved>, records: Vec<Record> },
}

struct Waiting {
    jobs: Vec<JobToken>,
    answer: oneshot::Sender<()>,
}

/// The thread's state.
pub struct Engine {
    device: Device,
    copier: Copier,
    pool: Option<Kept>,
    arenas: Arc<Arenas>,
    orders: Receiver<Order>,
    sums: Sender<Sum>,
    stats: Arc<Stats>,
    jobs: HashMap<JobToken, UnderWay>,
    loads: HashMap<u64, Loading>,
    verifying: HashMap<u64, Verifying>,
    /// Who sums what is in the pool; nobody without a pool, or without kernels.
    verifier: Option<Verifier>,
    /// Blocks that were loaded from host memory once.
    once: Once,
    next: u64,
    /// Slots that came since the last look.
    fills: Vec<FillOrder>,
    /// Whoever waits for jobs to end.
    quiet: Vec<Waiting>,
    tick_due: Instant,
    facts_due: Instant,
    /// When a failure may be told again, and whether it was told that the device is lost.
    words_due: Instant,
    lost_said: bool,
    /// Bytes of slots that may wait for layers.
    open_bytes_max: u64,
    /// Set when the daemon ends: until when the device may take.
    stopping: Option<Instant>,
    /// A cache was seen: host memory is worth registering ahead of time.
    warm: bool,
}

impl Engine {
    /// A thread's state over an opened device.
    pub fn new(
        copier: Copier,
        pool: Option<Kept>,
        arenas: Arc<Arenas>,
        orders: Receiver<Order>,
        sums: Sender<Sum>,
        stats: Arc<Stats>,
        open_bytes_max: u64,
    ) -> Self {
        let _ = stats.method.set(format!("{:?}", copier.method()).to_lowercase());
        let verifier = pool.as_ref().and_then(|_| Verifier::new(&copier));
        Self {
            device: copier.device().clone(),
            copier,
            pool,
            arenas,
            orders,
            sums,
            stats,
            jobs: HashMap::new(),
            loads: HashMap::new(),
            verifying: HashMap::new(),
            verifier,
            once: Once::default(),
            next: 1,
            fills: Vec::new(),
            quiet: Vec::new(),
            tick_due: Instant::now(),
            facts_due: Instant::now(),
            words_due: Instant::now(),
            lost_said: false,
            open_bytes_max,
            stopping: None,
            warm: false,
        }
    }

    /// Runs until it is told to stop and the device is done.
    pub fn run(mut self) {
        let mut pause = LOOK_MIN;
        loop {
            let pool_idle = self.pool.as_ref().is_none_or(|pool| lock(pool).is_idle());
            let idle = self.copier.is_idle() && self.verifying.is_empty() && pool_idle;
            let wait = match idle {
                // Host memory is registered while there is nothing better to do.
                true if self.warm && self.device.lost().is_none() => Duration::ZERO,
                true => IDLE,
                false => pause,
            };
            match self.orders.recv_timeout(wait) {
                Ok(order) => {
                    self.take(order);
                    // What comes together is copied together.
                    while let Ok(order) = self.orders.try_recv() {
                        self.take(order);
                    }
                    pause = LOOK_MIN;
                }
                Err(RecvTimeoutError::Timeout) => pause = (pause * 2).min(LOOK_MAX),
                // Everybody who could order something is gone.
                Err(RecvTimeoutError::Disconnected) => {
                    self.stop();
                    std::thread::sleep(LOOK_MAX);
                }
            }
            self.begin_fills();
            if self.hear() | self.look_at_sums() {
                pause = LOOK_MIN;
            }
            if let Some(pool) = &self.pool {
                lock(pool).poll();
            }
            self.look_at_deadlines();
            self.count();
            if let Some(until) = self.stopping
                && (self.jobs.is_empty() && self.verifying.is_empty() || Instant::now() >= until)
            {
                return self.last_words();
            }
            if self.warm && idle && self.jobs.is_empty() && self.device.lost().is_none() {
                self.warm = self.arenas.register_next(&self.device);
            }
        }
    }

    fn take(&mut self, order: Order) {
        match order {
            Order::Fill(fill) => self.fills.push(fill),
            Order::Ready(save) => self.more_is_ready(&save),
            Order::Load(load) => self.load(load),
            Order::Quiesce(of, answer) => self.quiesce(&of, answer),
            Order::Forget(of) => {
                for token in self.of(&of) {
                    let gone = "the cache was given up before the copy was made";
                    self.give_up(token, Fault::new(Code::UnknownCache, gone));
                }
            }
            Order::Stop => self.stop(),
        }
    }

    fn stop(&mut self) {
        if self.stopping.is_some() {
            return;
        }
        self.stopping = Some(Instant::now() + LAST_COPIES);
        let all: Vec<JobToken> = self.jobs.keys().copied().collect();
        for token in all {
            self.give_up(token, ends());
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn of(&self, of: &Of) -> Vec<JobToken> {
        self.jobs
            .iter()
            .filter(|(_, job)| job.cache.as_ref().is_some_and(|cache| of.is(cache)))
            .map(|(token, _)| *token)
            .collect()
    }

    fn quiesce(&mut self, of: &Of, answer: oneshot::Sender<()>) {
        // What has come and not begun counts as well.
        self.begin_fills();
        let jobs = self.of(of);
        if jobs.is_empty() {
            let _ = answer.send(());
        } else {
            self.quiet.push(Waiting { jobs, answer });
        }
    }

    /// Hands a job to the copier. When that does not take it, it comes back with the reason.
    fn submit(&mut self, job: Job, under_way: UnderWay) -> Result<(), Box<(Job, UnderWay, Fault)>> {
        let token = job.token;
        match self.copier.submit(job) {
            Ok(()) => {
                self.jobs.insert(token, under_way);
                self.warm = true;
                Ok(())
            }
            Err((job, error)) => {
                Stats::add(&self.stats.failed, 1);
                self.say(&error);
                Err(Box::new((job, under_way, fault_of(&error))))
            }
        }
    }

    /// A job is not to go on. What the device has of it in its queue ends there.
    fn give_up(&mut self, token: JobToken, why: Fault) {
        let Some(job) = self.jobs.get_mut(&token) else { return };
        if job.over.is_none() {
            job.over = Some(why);
            self.copier.cancel(token);
        }
    }

    fn is_well(&self) -> Result<(), Fault> {
        if self.stopping.is_some() {
            return Err(ends());
        }
        match self.device.lost() {
            None => Ok(()),
            Some(why) => {
                let text = format!("{:?} is lost to the daemon: {why}", self.device);
                Err(Fault::new(Code::GpuLost, text))
            }
        }
    }

    /// Hears what the device has done; whether there was anything.
    fn hear(&mut self) -> bool {
        let mut done = Vec::new();
        self.copier.poll(&mut done);
        let any = !done.is_empty();
        for done in done {
            match done {
                CopyDone::Queued { token } => self.queued(token),
                CopyDone::Step { token, steps } => self.arrived(token, steps),
                CopyDone::Ended { token, hosts, result } => self.ended(token, hosts, result),
            }
        }
        any
    }

    fn ended(&mut self, token: JobToken, hosts: Option<Hosts>, result: Result<(), Error>) {
        let Some(UnderWay { cache, until, over, bytes, what }) = self.jobs.remove(&token) else { return };
        Stats::add(if result.is_ok() { &self.stats.done } else { &self.stats.failed }, 1);
        if let Err(error) = &result {
            self.say(error);
        }
        // The device may still be using all of it, and what was to come of it does not come.
        let unended = hosts.is_none() && result.is_err() && self.device.lost().is_none();
        // Why it was given up says more than that it was.
        let given_up = over.clone();
        let result = result.map_err(|error| over.unwrap_or_else(|| fault_of(&error)));
        if unended {
            return self.keep(what, &result.err().unwrap_or_else(ends));
        }
        match what {
            // What was given up is not published, however well it was copied.
            What::Save { save, fills, .. } => {
                let result = result.and(given_up.map_or(Ok(()), Err));
                self.saved((save, fills, Vec::new()), (until, None), bytes, hosts, result);
            }
            What::Drain { save, fills, rooms, verify } => {
                let result = result.and(given_up.map_or(Ok(()), Err));
                self.saved((save, fills, rooms), (until, verify), bytes, hosts, result);
            }
            What::Gather { save, fills, slots, rooms } => {
                // It is half done, and what it was given up for holds for the other half.
                let result = result.and(given_up.map_or(Ok(()), Err));
                self.gathered((token, cache, until), (save, fills, rooms), slots, bytes, result);
            }
            What::Spread { load, .. } => {
                drop(hosts);
                self.spread(token, load, bytes, result.and(given_up.map_or(Ok(()), Err)));
            }
            What::Load { load } => self.loaded(load, bytes, hosts, result),
            What::Promote { rooms, records } => {
                drop(hosts);
                // One that failed is not kept; its blocks are where they were.
                if result.is_ok() {
                    self.promoted(rooms, records, bytes);
                }
            }
        }
        // Behind what it led to: that is part of what is waited for.
        for waiting in &mut self.quiet {
            waiting.jobs.retain(|job| *job != token);
        }
        for waiting in self.quiet.extract_if(.., |waiting| waiting.jobs.is_empty()) {
            let _ = waiting.answer.send(());
        }
    }

    /// Tells operators of a failure, once a second at most; of a device that is lost, once.
    fn say(&mut self, error: &Error) {
        let now = Instant::now();
        let gpu = &self.device;
        match error {
            Error::Lost { .. } => {
                if !std::mem::replace(&mut self.lost_said, true) {
                    let fault = fault_of(error);
                    tracing::error!(code = %fault.code, ?gpu, "{}; only a restart of kvd brings it back", fault.message);
                }
            }
            Error::Cancelled => {}
            _ if now < self.words_due => {}
            error => {
                self.words_due = now + IDLE;
                let fault = fault_of(error);
                tracing::warn!(code = %fault.code, ?gpu, "a copy failed: {}", fault.message);
            }
        }
    }

    /// The device did not say that it is done, and is not lost either. The places of such a job are nobody's any more, and
    /// whoever waits until all is quiet is not told that it is.
    fn keep(&mut self, what: What, fault: &Fault) {
        match what {
            What::Save { fills, .. } => save::fail(fills, fault),
            What::Gather { fills, slots, rooms, .. } => {
                std::mem::forget(rooms);
                drop(slots);
                save::fail(fills, fault);
            }
            What::Drain { save, fills, rooms, verify } => {
                std::mem::forget(rooms);
                save::fail(fills, fault);
                if let Some(number) = verify {
                    self.drained(number, (save, Vec::new(), Vec::new()), None, Instant::now());
                }
            }
            What::Spread { load, places } => {
                std::mem::forget(places);
                self.end_load(load, Err(fault.clone()));
            }
            What::Load { load } => self.end_load(load, Err(fault.clone())),
            What::Promote { rooms, .. } => std::mem::forget(rooms),
        }
    }

    /// One job goes on in another: whoever waits for the first waits for that as well.
    fn goes_on(&mut self, from: JobToken, into: JobToken) {
        for waiting in &mut self.quiet {
            if waiting.jobs.contains(&from) {
                waiting.jobs.push(into);
            }
        }
    }

    fn look_at_deadlines(&mut self) {
        let now = Instant::now();
        if now < self.tick_due {
            return;
        }
        self.tick_due = now + TICK;
        let unheard = |job: &UnderWay| match job.what {
            What::Spread { load, .. } | What::Load { load } => {
                self.loads.get(&load).is_none_or(Loading::is_unheard)
            }
            _ => false,
        };
        let is_late = |job: &UnderWay| job.over.is_none() && (now >= job.until || unheard(job));
        let late_ones: Vec<JobToken> =
            self.jobs.iter().filter(|(_, job)| is_late(job)).map(|(token, _)| *token).collect();
        for token in late_ones {
            self.give_up(token, late("the copy"));
        }
        self.give_up_sums(now);
    }

    fn count(&mut self) {
        let now = Instant::now();
        if now >= self.facts_due {
            // Asked here alone: a driver that does not answer holds up nobody else.
            self.facts_due = now + IDLE;
            self.stats.free_bytes.store(self.device.free_bytes().unwrap_or(0), Ordering::Relaxed);
        }
        let (under_way, bytes) = self.copier.under_way();
        self.stats.under_way.store(under_way as u64, Ordering::Relaxed);
        self.stats.under_way_bytes.store(bytes, Ordering::Relaxed);
        self.stats.waiting.store(self.copier.waiting() as u64, Ordering::Relaxed);
    }

    /// The thread ends. What the device has not given back stays with it.
    fn last_words(self) {
        let Self { jobs, loads, verifying, fills, copier, orders, .. } = self;
        if !jobs.is_empty() {
            tracing::warn!(
                copies = jobs.len(),
                "a device did not end its copies; their memory stays with it"
            );
        }
        let fault = Fault::new(Code::Draining, "the daemon ended before the device was done");
        // Waits for the device once more, with a limit, and keeps what it still uses.
        drop(copier);
        // What is still being summed would be waited for one by one.
        for job in jobs.into_values() {
            match job.what {
                What::Save { fills, .. } | What::Gather { fills, .. } | What::Drain { fills, .. } => {
                    save::fail(fills, &fault);
                }
                What::Spread { .. } | What::Load { .. } | What::Promote { .. } => {}
            }
        }
        verifying.into_values().for_each(|verifying| verifying.end(&fault));
        loads.into_values().for_each(|load| load.end(Err(fault.clone())));
        fills.into_iter().map(Order::Fill).chain(orders.try_iter()).for_each(Order::refuse);
    }
}

fn ends() -> Fault {
    Fault::new(Code::Draining, "the daemon ends")
}

fn late(what: &str) -> Fault {
    Fault::new(Code::DeadlinePassed, format!("{what} did not end in time"))
}

/// What a caller hears of a device's error.
pub fn fault_of(error: &Error) -> Fault {
    let code = match error {
        Error::Lost { .. } => Code::GpuLost,
        Error::Range { .. } => Code::BadRequest,
        Error::OtherDevice { .. } | Error::Gone { .. } | Error::NotShared { .. } => Code::BadHandle,
        Error::Busy { .. } => Code::QueueFull,
        _ => Code::GpuError,
    };
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    let fault = Fault::new(code, text);
    if code == Code::QueueFull { fault.retry_after(TRY_AGAIN) } else { fault }
}
