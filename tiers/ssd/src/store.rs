//! The disk tier as the node sees it: [`SsdStore`] is a handle, and a pinned thread of its own runs log and
//! engine behind it.
//!
//! ```text
//!  shard thread                                  store thread
//!  submit -> batch --kick--> inbox --eventfd-->  log --IoOp--> engine (io_uring or threads)
//!  poll   <--------- outbox <--waker-----------  log <-IoDone-
//!                                                 |  Job
//!                                                 v
//!                                                clerk thread: makes and removes segment files, and looks
//!                                                now and then whether the directory is still there
//! ```
//! One lock and at most one wake-up per batch and direction. Checksums of what was read are taken on the
//! store thread, right after the device brought the bytes: a block of 2 MiB costs some 40 us there, while
//! the device works on the rest of the queue.
//!
//! A simulated disk runs the same log without threads, inside `poll`, so that a seed tells all.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kv_arena::Slab;
use kv_block::{DiskLocation, Record};
use kv_tiers::store::{BlockStore, StoreDone, StoreError, StoreOp, StoreUsage};

use crate::files::{Directory, OsDirectory, SegmentFile};
use crate::format::{self, Format, PROBE_NAME};
use crate::health::{CircuitLimits, Health, HealthState};
use crate::io::{BlockIo, IoDone, PROBE_FILE, Prepared, Waker, errno};
use crate::log::{Job, Log, LogConfig, SsdStats, SyncMode, refuse};
use crate::recover::{Batch, RecoveryReport, recover};
use crate::ring::Ring;
use crate::segment::{self, Geometry, Header, PAGE_BYTES, StoreId};
use crate::sim::SimDisk;
use crate::threads::Threads;

/// Fewest segments that a store works with: one appended to, one free for moves, two to reclaim from.
pub const SEGMENTS_MIN: u64 = 4;
/// Bytes of data writes with the device at once at most, unless one block alone is longer.
const DATA_IN_FLIGHT_MAX: u64 = 128 << 20;
/// Batches of recovered blocks that may wait for the node.
const RECOVERED_AHEAD: usize = 64;
/// How long blocks are checked before the device is given its next operations.
const CHECK_LIMIT: Duration = Duration::from_micros(200);
/// Files registered with the kernel at most.
const FILE_SLOTS_MAX: u32 = 1 << 14;
/// How often somebody looks whether the directory is still there: open files do not tell.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Which engine does the I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Engine {
    /// io_uring where the kernel has it and lets us, else threads, with a note.
    #[default]
    Auto,
    /// io_uring, or an error.
    Ring,
    /// pread and pwrite on a few threads.
    Threads,
}

/// How a store is opened.
#[derive(Clone)]
pub struct SsdConfig {
    /// Its directory; made when it is missing.
    pub dir: PathBuf,
    /// The node's name, for the format file.
    pub node: String,
    /// Bytes it may use in all; rounded down to whole segments.
    pub bytes_max: u64,
    /// Length of a segment in bytes.
    pub segment_bytes: u64,
    /// Average length of a block in bytes, to size the indexes for. Shorter blocks fill indexes first.
    pub index_block_bytes: u32,
    /// Operations taken at once at most.
    pub in_flight_max: u32,
    /// Which engine.
    pub engine: Engine,
    /// CPUs of the store's threads; empty means any.
    pub cpus: Vec<u32>,
    /// How long an operation may take before it counts as slow. A write, move or removal ends then, with
    /// [`StoreError::Slow`], and what the device still uses of its memory stays held. A read owns its slot
    /// alone, so it ends when the device gives that back, and is right if it is late.
    pub slow_limit: Duration,
    /// When an operation counts as durable.
    pub sync: SyncMode,
    /// When the device is taken out of service and put back.
    pub circuit: CircuitLimits,
    /// Memory that blocks come from and go to, to be registered with the kernel as it gets its pages.
    pub arenas: Vec<Slab>,
}

impl SsdConfig {
    /// A store in `dir` with at most `bytes_max` bytes, and defaults for the rest.
    pub fn new(dir: impl Into<PathBuf>, bytes_max: u64) -> Self {
        Self {
            dir: dir.into(),
            node: String::new(),
            bytes_max,
            segment_bytes: 256 << 20,
            index_block_bytes: 64 << 10,
            in_flight_max: 64,
            engine: Engine::Auto,
            cpus: Vec::new(),
            slow_limit: Duration::from_secs(2),
            sync: SyncMode::Always,
            circuit: CircuitLimits::default(),
            arenas: Vec::new(),
        }
    }

    /// Largest block that a segment of this configuration holds, in bytes; `None` when the sizes are
    /// impossible.
    pub fn block_bytes_max(&self) -> Option<u64> {
        let geometry = Geometry::new(self.segment_bytes, self.index_block_bytes)?;
        Some(u64::from(geometry.data_pages()) * PAGE_BYTES as u64)
    }

    fn log_config(&self) -> Result<LogConfig, Error> {
        let geometry = Geometry::new(self.segment_bytes, self.index_block_bytes)
            .ok_or(Error::SegmentBytes { segment_bytes: self.segment_bytes })?;
        let segments = (self.bytes_max / geometry.segment_bytes()).min(u64::from(DiskLocation::SEGMENT_MAX));
        if segments < SEGMENTS_MIN {
            let bytes_min = SEGMENTS_MIN * geometry.segment_bytes();
            return Err(Error::BytesMax { bytes_max: self.bytes_max, bytes_min });
        }
        Ok(LogConfig {
            store: StoreId::default(),
            geometry,
            segments_max: segments as u32,
            in_flight_max: self.in_flight_max.max(1),
            data_in_flight_max: DATA_IN_FLIGHT_MAX,
            sync: self.sync,
            slow_limit: self.slow_limit,
            circuit: self.circuit,
        })
    }
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another daemon has the directory.
    #[error("{} is in use by another daemon", dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// The operating system refused something.
    #[error("cannot {what} in {}", dir.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The directory.
        dir: PathBuf,
        /// Its answer.
        source: std::io::Error,
    },
    /// The store would have too few segments.
    #[error("a disk tier of {bytes_max} bytes is too small, {bytes_min} is the least for its segments")]
    BytesMax {
        /// What was configured.
        bytes_max: u64,
        /// The least that works with these segments.
        bytes_min: u64,
    },
    /// The segments are too small or too large.
    #[error("segments of {segment_bytes} bytes are impossible; 1 MiB to 64 GiB with room for data are not")]
    SegmentBytes {
        /// What was configured.
        segment_bytes: u64,
    },
    /// io_uring was asked for and is not to be had.
    #[error("io_uring is refused; allow it (sysctl kernel.io_uring_disabled=0, seccomp) or use threads")]
    NoRing {
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The store's thread ended.
    #[error("the store's thread ended before it had opened the store")]
    Ended,
}

/// Blocks found when a store was opened, in batches, newest first; each key at most once.
///
/// The store serves operations only when all were taken (or this was dropped), so drain it soon.
pub struct Recovered {
    messages: mpsc::Receiver<Message>,
    end: Option<Result<RecoveryReport, Error>>,
    /// What was set aside before anything was read.
    set_aside: Vec<String>,
}

enum Message {
    Blocks(Batch),
    End(Result<RecoveryReport, Error>),
}

impl Iterator for Recovered {
    type Item = Vec<(Record, DiskLocation)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.end.is_some() {
            return None;
        }
        match self.messages.recv() {
            Ok(Message::Blocks(blocks)) => return Some(blocks),
            Ok(Message::End(end)) => self.end = Some(end),
            Err(mpsc::RecvError) => self.end = Some(Err(Error::Ended)),
        }
        None
    }
}

impl Recovered {
    /// What opening found; passes over blocks that were not taken.
    pub fn finish(mut self) -> Result<RecoveryReport, Error> {
        while self.next().is_some() {}
        let mut report = self.end.unwrap_or(Err(Error::Ended))?;
        report.set_aside.splice(0..0, self.set_aside);
        Ok(report)
    }
}

/// What the store thread lets others see.
#[derive(Clone, Default)]
struct Published {
    health: Health,
    usage: StoreUsage,
    stats: SsdStats,
    notes: Vec<String>,
}

#[derive(Default)]
struct Inbox {
    ops: Vec<StoreOp>,
    /// When the oldest of them came.
    since: Option<Instant>,
}

struct Shared {
    inbox: Mutex<Inbox>,
    outbox: Mutex<Vec<StoreDone>>,
    published: Mutex<Published>,
    /// The store thread waits, or is about to, and wants to be woken.
    asleep: AtomicBool,
    /// The owner was woken and has not polled since.
    notified: AtomicBool,
    /// The circuit is open.
    refusing: AtomicBool,
    closing: AtomicBool,
    /// The store thread is gone; the wait for that.
    ended: Mutex<bool>,
    ended_changed: Condvar,
}

impl Shared {
    fn new() -> Self {
        Self {
            inbox: Mutex::new(Inbox::default()),
            outbox: Mutex::new(Vec::new()),
            published: Mutex::new(Published::default()),
            asleep: AtomicBool::new(false),
            notified: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            ended: Mutex::new(false),
            ended_changed: Condvar::new(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every holder only moves values in and out, so what a panic elsewhere left is whole.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

enum Driver {
    Thread { wake: Waker, thread: Option<JoinHandle<()>> },
    Inline { machine: Box<Machine>, disk: SimDisk, life: u64 },
}

/// A disk tier. See [`BlockStore`] for what it does; dropping it lets the device finish what it has.
pub struct SsdStore {
    shared: Arc<Shared>,
    driver: Driver,
    /// Submitted and not kicked.
    batch: Vec<StoreOp>,
    /// Ended without the store thread.
    refused: Vec<StoreDone>,
    in_flight: u32,
    in_flight_max: u32,
    slow_limit: Duration,
}

impl SsdStore {
    /// Opens the store in `config.dir`, or makes one. `waker` is called from the store thread when there is
    /// something to poll; it must not block.
    ///
    /// The directory is locked, its format checked (what is not ours or of another version is set aside
    /// and kept), and the index regions are read while the result is already in your hands.
    pub fn open(config: SsdConfig, waker: Box<dyn Fn() + Send + Sync>) -> Result<(Self, Recovered), Error> {
        let mut log_config = config.log_config()?;
        let dir = &config.dir;
        let failed = |what| move |source| Error::Io { what, dir: dir.clone(), source };
        let directory = OsDirectory::open(dir).map_err(|source| match source.kind() {
            std::io::ErrorKind::WouldBlock => Error::InUse { dir: dir.clone() },
            _ => Error::Io { what: "open the data directory", dir: dir.clone(), source },
        })?;
        let directory: Arc<dyn Directory> = Arc::new(directory);
        let mut notes = directory.notes();
        notes.extend(raise_file_limit(log_config.segments_max));
        let fresh = || fresh_format(&config.node);
        let mut set_aside = Vec::new();
        let format =
            format::establish(&*directory, fresh, &mut set_aside).map_err(failed("write the format file"))?;
        log_config.store = format.store;
        let shared = Arc::new(Shared::new());
        let (ready_sender, ready) = mpsc::channel();
        let (sender, messages) = mpsc::sync_channel(RECOVERED_AHEAD);
        let slow_limit = config.slow_limit;
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("kv-ssd".to_owned())
                .spawn(move || {
                    let _ended = Ended(Arc::clone(&shared));
                    let answer = make_engine(&config, &log_config, &mut notes);
                    lock(&shared.published).notes = notes;
                    let engine = match answer {
                        Ok(engine) => engine,
                        Err(error) => return drop(ready_sender.send(Err(error))),
                    };
                    let _ = ready_sender.send(Ok(engine.waker()));
                    let mut send = |message| drop(sender.send(message));
                    if let Some(machine) =
                        Machine::open(&config.dir, directory, engine, log_config, true, &mut send)
                    {
                        drop(sender);
                        serve(machine, &shared, &waker);
                    }
                    // The memory that the kernel knows by address stays mapped until the engine is gone.
                    drop(config);
                })
                .map_err(|source| Error::Io { what: "start a thread", dir: PathBuf::new(), source })?
        };
        let wake = match ready.recv().unwrap_or(Err(Error::Ended)) {
            Ok(wake) => wake,
            Err(error) => {
                // It has the directory's lock until it has ended.
                let _ = thread.join();
                return Err(error);
            }
        };
        let store = Self {
            shared,
            driver: Driver::Thread { wake, thread: Some(thread) },
            batch: Vec::new(),
            refused: Vec::new(),
            in_flight: 0,
            in_flight_max: log_config.in_flight_max,
            slow_limit,
        };
        store.publish_limits(&log_config);
        Ok((store, Recovered { messages, end: None, set_aside }))
    }

    /// Opens a store on a simulated disk. It runs inside [`BlockStore::poll`], on the disk's virtual time,
    /// and needs no waker; `dir`, `engine`, `cpus` and `arenas` of the configuration do not count.
    pub fn open_simulated(config: &SsdConfig, disk: &SimDisk) -> Result<(Self, Recovered), Error> {
        let mut log_config = config.log_config()?;
        let dir = PathBuf::from("simulated");
        if !disk.take_lock() {
            return Err(Error::InUse { dir });
        }
        let life = disk.life();
        let directory = disk.directory();
        let mut set_aside = Vec::new();
        let fresh = || Format { store: StoreId(*b"a simulated disk"), node: config.node.clone(), created: 0 };
        let format = format::establish(&*directory, fresh, &mut set_aside);
        log_config.store = format
            .map_err(|source| Error::Io { what: "write the format file", dir: dir.clone(), source })?
            .store;
        let (sender, messages) = mpsc::channel();
        let mut send = |message| drop(sender.send(message));
        let engine = Box::new(disk.engine());
        let machine =
            Machine::open(&dir, directory, engine, log_config, false, &mut send).ok_or(Error::Ended)?;
        let shared = Arc::new(Shared::new());
        let store = Self {
            shared,
            driver: Driver::Inline { machine: Box::new(machine), disk: disk.clone(), life },
            batch: Vec::new(),
            refused: Vec::new(),
            in_flight: 0,
            in_flight_max: log_config.in_flight_max,
            slow_limit: config.slow_limit,
        };
        store.publish_limits(&log_config);
        Ok((store, Recovered { messages, end: None, set_aside }))
    }

    fn publish_limits(&self, config: &LogConfig) {
        let usage = &mut lock(&self.shared.published).usage;
        usage.bytes_max = u64::from(config.segments_max) * config.geometry.segment_bytes();
        usage.in_flight_max = config.in_flight_max;
    }

    /// Whether the device is in service, and what it did wrong.
    pub fn health(&self) -> Health {
        lock(&self.shared.published).health.clone()
    }

    /// What was done since it was opened.
    pub fn stats(&self) -> SsdStats {
        lock(&self.shared.published).stats
    }

    /// More of the arenas has pages than before: what waits for that goes on.
    pub fn arenas_grew(&self) {
        if let Driver::Thread { wake, .. } = &self.driver {
            wake();
        }
    }

    /// What could not be had when it was opened, each with the switch that brings it back.
    pub fn notes(&self) -> Vec<String> {
        lock(&self.shared.published).notes.clone()
    }
}

impl BlockStore for SsdStore {
    fn submit(&mut self, op: StoreOp) -> Result<(), StoreOp> {
        if self.in_flight >= self.in_flight_max || self.shared.closing.load(Ordering::Relaxed) {
            return Err(op);
        }
        self.in_flight += 1;
        if self.shared.refusing.load(Ordering::Relaxed)
            && let HealthState::Degraded { reason, .. } = &lock(&self.shared.published).health.state
        {
            self.refused.push(refuse(op, reason.clone()));
        } else {
            self.batch.push(op);
        }
        Ok(())
    }

    fn kick(&mut self) {
        match &mut self.driver {
            Driver::Inline { .. } => {}
            Driver::Thread { wake, .. } => {
                let mut inbox = lock(&self.shared.inbox);
                if inbox.since.is_some_and(|since| since.elapsed() > 2 * self.slow_limit) {
                    // The store thread is held up in the kernel: what it has not taken does not wait for it.
                    inbox.since = Some(Instant::now());
                    let reason = StoreError::Slow { limit: self.slow_limit };
                    let stuck = inbox.ops.drain(..).chain(self.batch.drain(..));
                    self.refused.extend(stuck.map(|op| refuse(op, reason.clone())));
                    return;
                }
                if self.batch.is_empty() {
                    return;
                }
                if inbox.ops.is_empty() {
                    inbox.since = Some(Instant::now());
                }
                inbox.ops.append(&mut self.batch);
                drop(inbox);
                if self.shared.asleep.swap(false, Ordering::SeqCst) {
                    wake();
                }
            }
        }
    }

    fn poll(&mut self, done: &mut Vec<StoreDone>) {
        self.kick();
        let before = done.len();
        done.append(&mut self.refused);
        match &mut self.driver {
            Driver::Inline { machine, .. } => {
                machine.take(&mut self.batch);
                let wait = machine.quiet_for();
                machine.turn(wait);
                machine.turn(Duration::ZERO);
                done.append(&mut machine.log.done);
                machine.publish(&self.shared);
            }
            Driver::Thread { .. } => {
                self.shared.notified.store(false, Ordering::SeqCst);
                done.append(&mut lock(&self.shared.outbox));
            }
        }
        let ended = done[before..].iter().filter(|one| one.token().is_some()).count();
        self.in_flight -= ended as u32;
    }

    fn usage(&self) -> StoreUsage {
        StoreUsage { in_flight: self.in_flight, ..lock(&self.shared.published).usage }
    }
}

impl Drop for SsdStore {
    fn drop(&mut self) {
        match &mut self.driver {
            Driver::Inline { disk, life, .. } => disk.give_lock(*life),
            Driver::Thread { wake, thread } => {
                self.shared.closing.store(true, Ordering::SeqCst);
                wake();
                // A device that hangs keeps the thread, and with it the memory it may still write to.
                let limit = 2 * self.slow_limit + Duration::from_secs(1);
                let ended = lock(&self.shared.ended);
                let waited = self.shared.ended_changed.wait_timeout_while(ended, limit, |ended| !*ended);
                if waited.is_ok_and(|(ended, _)| *ended)
                    && let Some(thread) = thread.take()
                {
                    let _ = thread.join();
                }
            }
        }
    }
}

impl std::fmt::Debug for SsdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SsdStore({:?})", self.usage())
    }
}

/// Tells the handle that the thread is gone, however it went.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.closing.store(true, Ordering::SeqCst);
        *lock(&self.0.ended) = true;
        self.0.ended_changed.notify_all();
    }
}

/// Makes room for an open file per segment; a note when there is none.
fn raise_file_limit(segments: u32) -> Option<String> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    // Sockets, memory files and the like of the rest of the daemon.
    let wanted = u64::from(segments) + 1024;
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= wanted) {
        return None;
    }
    let raised = maximum.map_or(wanted, |maximum| maximum.min(wanted));
    let set = setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum });
    (set.is_err() || raised < wanted).then(|| {
        format!(
            "{segments} segments need as many open files and the limit is {raised}; raise `ulimit -n` \
             (LimitNOFILE={wanted}) or choose longer segments, else blocks beyond it are not there"
        )
    })
}

fn fresh_format(node: &str) -> Format {
    let mut store = [0; 16];
    // An identity that only has to differ from other stores': without randomness, the time has to do.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if !matches!(rustix::rand::getrandom(&mut store, rustix::rand::GetRandomFlags::empty()), Ok(16)) {
        store = now.as_nanos().to_le_bytes();
    }
    Format { store: StoreId(store), node: node.to_owned(), created: now.as_secs() }
}

fn make_engine(
    config: &SsdConfig,
    log_config: &LogConfig,
    notes: &mut Vec<String>,
) -> Result<Box<dyn BlockIo>, Error> {
    if let Err(error) = kv_arena::numa::pin_current_thread(&config.cpus) {
        notes.push(format!("the store's threads could not be bound to CPUs {:?}: {error}", config.cpus));
    }
    let depth = log_config.in_flight_max * 2;
    if config.engine != Engine::Threads {
        let range = |slab: &Slab| {
            let range = slab.data_range();
            (range.cast::<u8>().as_ptr() as usize, range.len())
        };
        let memory: Vec<_> = config.arenas.iter().map(range).collect();
        let file_slots = (log_config.segments_max + 64).min(FILE_SLOTS_MAX);
        let arenas = config.arenas.clone();
        let starts: Vec<_> = memory.iter().map(|(start, _)| *start).collect();
        let has_pages = move |address: usize, bytes: usize| {
            let arena = arenas
                .iter()
                .zip(&starts)
                .find(|(slab, start)| (**start..**start + slab.data_bytes() as usize).contains(&address));
            arena.is_some_and(|(slab, start)| slab.is_backed((address - start) as u64, bytes as u64))
        };
        match Ring::new(depth, file_slots, &memory, Box::new(has_pages), notes) {
            Ok(ring) => return Ok(Box::new(ring)),
            Err(source) if config.engine == Engine::Ring => return Err(Error::NoRing { source }),
            Err(error) => notes.push(format!(
                "io_uring is refused ({error}), so threads do the I/O, which costs CPU time; allow it (sysctl \
                 kernel.io_uring_disabled=0, seccomp)"
            )),
        }
    }
    let threads = Threads::new(config.in_flight_max.clamp(1, 16));
    Ok(Box::new(threads.map_err(|source| Error::Io {
        what: "start threads",
        dir: config.dir.clone(),
        source,
    })?))
}

/// Log, engine and clerk, and what carries between them.
struct Machine {
    // Dropped before the log: it waits for what is in flight, and the log owns the memory of that.
    engine: Box<dyn BlockIo>,
    log: Log,
    clerk: Clerk,
    /// Completions not looked at yet.
    ended: VecDeque<IoDone>,
    taken: Vec<IoDone>,
}

impl Machine {
    /// Recovers what is there, telling of it by `send`; `None` when it could not, which was told too.
    fn open(
        dir: &std::path::Path,
        directory: Arc<dyn Directory>,
        mut engine: Box<dyn BlockIo>,
        config: LogConfig,
        threaded: bool,
        send: &mut dyn FnMut(Message),
    ) -> Option<Self> {
        let made =
            match recover(&*directory, &mut *engine, &config, &mut |batch| send(Message::Blocks(batch))) {
                Ok(made) => made,
                Err(source) => {
                    let dir = dir.to_owned();
                    send(Message::End(Err(Error::Io { what: "read the segments", dir, source })));
                    return None;
                }
            };
        // A disk so full that it has no room for two pages is not probed but trusted after a while.
        let probe = directory.create(PROBE_NAME, &format!("{PROBE_NAME}.new"), 2 * PAGE_BYTES as u64, &[0]);
        let probe_file = probe.map(|file| engine.attach(PROBE_FILE, file)).is_ok();
        let log = Log::new(config, made.segments, made.sequence_next, made.order_next, probe_file);
        let clerk = Clerk::new(directory, threaded.then(|| engine.waker()));
        let machine = Self { engine, log, clerk, ended: VecDeque::new(), taken: Vec::new() };
        send(Message::End(Ok(made.report)));
        Some(machine)
    }

    fn take(&mut self, ops: &mut Vec<StoreOp>) {
        let now = self.engine.now();
        for op in ops.drain(..) {
            self.log.accept(now, op);
        }
    }

    fn quiet_for(&self) -> Duration {
        self.log.quiet_for(self.engine.now())
    }

    /// Lets everything happen that can, then waits for the engine at most so long.
    fn turn(&mut self, wait: Duration) {
        self.begin();
        self.finish(wait);
    }

    /// Hands the engine and the clerk what there is to do.
    fn begin(&mut self) {
        let now = self.engine.now();
        while let Some((header, result)) = self.clerk.made() {
            let result = result.map(|file| self.engine.attach(header.segment, file));
            self.log.created(now, &header, result);
        }
        while let Some(there) = self.clerk.looked() {
            self.log.circuit().looked(now, there);
        }
        self.log.advance(now);
        for job in self.log.jobs.drain(..) {
            if let Job::Delete(segment) = job {
                self.engine.detach(segment);
            }
            self.clerk.give(job);
        }
        // SAFETY: the log owns the memory of every operation in its table until `completed` is called
        // with that operation's end, and touches none of it meanwhile.
        unsafe { self.engine.submit(&mut self.log.io) };
    }

    /// Waits for the engine, then looks at what has ended: not at all of it when that takes long, for the
    /// device should get its next operations first.
    fn finish(&mut self, wait: Duration) {
        let wait = if self.ended.is_empty() { wait } else { Duration::ZERO };
        self.engine.completions(wait, &mut self.taken);
        self.ended.extend(self.taken.drain(..));
        let began = self.engine.now();
        while let Some(one) = self.ended.pop_front() {
            let now = self.engine.now();
            self.log.completed(now, one);
            if now - began > CHECK_LIMIT {
                break;
            }
        }
    }

    fn publish(&mut self, shared: &Shared) {
        let now = self.engine.now();
        let circuit = self.log.circuit();
        circuit.health.at = now;
        let health = circuit.health.clone();
        shared.refusing.store(health.state != HealthState::Healthy, Ordering::Relaxed);
        let (usage, stats) = (self.log.usage(), self.log.stats());
        let published = &mut *lock(&shared.published);
        (published.health, published.usage, published.stats) = (health, usage, stats);
    }
}

/// The store thread: takes what came, does what can be done, tells what ended, waits.
fn serve(mut machine: Machine, shared: &Shared, wake_owner: &dyn Fn()) {
    let mut ops = Vec::new();
    let mut prepared = Prepared::More;
    let mut looked = machine.engine.now();
    loop {
        {
            let mut inbox = lock(&shared.inbox);
            std::mem::swap(&mut ops, &mut inbox.ops);
            inbox.since = None;
        }
        machine.take(&mut ops);
        let now = machine.engine.now();
        if now.saturating_sub(looked) >= LOOK_EVERY {
            looked = now;
            machine.clerk.look();
        }
        machine.begin();
        let closing = shared.closing.load(Ordering::SeqCst);
        if closing {
            machine.log.close();
        }
        machine.publish(shared);
        if !machine.log.done.is_empty() {
            lock(&shared.outbox).append(&mut machine.log.done);
            if !shared.notified.swap(true, Ordering::SeqCst) {
                wake_owner();
            }
        }
        if closing && machine.log.is_idle() {
            return;
        }
        let mut wait = machine.quiet_for().min(LOOK_EVERY);
        if prepared != Prepared::All {
            let mut notes = Vec::new();
            prepared = machine.engine.prepare(&mut notes);
            lock(&shared.published).notes.append(&mut notes);
            wait = if prepared == Prepared::More { Duration::ZERO } else { wait };
        }
        shared.asleep.store(true, Ordering::SeqCst);
        let came = !lock(&shared.inbox).ops.is_empty() || (!closing && shared.closing.load(Ordering::SeqCst));
        machine.finish(if came { Duration::ZERO } else { wait });
        shared.asleep.store(false, Ordering::SeqCst);
    }
}

/// A file made for a segment, or the error number that there was instead.
type Made = (Header, Result<SegmentFile, i32>);

/// What the clerk is sent for.
enum Errand {
    Job(Job),
    Look,
}

/// Makes and removes segment files: on a thread of its own, or at once where there are no threads.
struct Clerk {
    directory: Arc<dyn Directory>,
    made_sender: mpsc::Sender<Made>,
    made: mpsc::Receiver<Made>,
    looks: mpsc::Receiver<bool>,
    /// One look at a time: the file system may take long for it.
    looking: bool,
    thread: Option<(mpsc::Sender<Errand>, JoinHandle<()>)>,
}

impl Clerk {
    fn new(directory: Arc<dyn Directory>, wake: Option<Waker>) -> Self {
        let (made_sender, made) = mpsc::channel();
        let (looks_sender, looks) = mpsc::channel();
        let thread = wake.and_then(|wake| {
            let (errands_sender, errands) = mpsc::channel::<Errand>();
            let (directory, made_sender) = (Arc::clone(&directory), made_sender.clone());
            let work = move || {
                for errand in errands {
                    match errand {
                        Errand::Job(job) => perform(&*directory, job, &made_sender),
                        Errand::Look => drop(looks_sender.send(directory.is_there())),
                    }
                    wake();
                }
            };
            let thread = std::thread::Builder::new().name("kv-ssd-files".to_owned()).spawn(work);
            // Without a thread the store thread does it itself, which is slower and no less right.
            Some((errands_sender, thread.ok()?))
        });
        Self { directory, made_sender, made, looks, looking: false, thread }
    }

    fn give(&self, job: Job) {
        match &self.thread {
            Some((errands, _)) => drop(errands.send(Errand::Job(job))),
            None => perform(&*self.directory, job, &self.made_sender),
        }
    }

    /// Looks whether the directory is there, where there is a thread for that.
    fn look(&mut self) {
        if let Some((errands, _)) = self.thread.as_ref().filter(|_| !self.looking) {
            self.looking = errands.send(Errand::Look).is_ok();
        }
    }

    fn looked(&mut self) -> Option<bool> {
        let there = self.looks.try_recv().ok()?;
        self.looking = false;
        Some(there)
    }

    fn made(&self) -> Option<Made> {
        self.made.try_recv().ok()
    }
}

impl Drop for Clerk {
    fn drop(&mut self) {
        if let Some((errands, thread)) = self.thread.take() {
            drop(errands);
            let _ = thread.join();
        }
    }
}

fn perform(directory: &dyn Directory, job: Job, made: &mpsc::Sender<Made>) {
    match job {
        Job::Create(header) => {
            let name = segment::file_name(header.segment);
            let scratch = format!("segment-{:08}.new", header.segment);
            let file = directory.create(&name, &scratch, header.geometry.segment_bytes(), &header.encode());
            let _ = made.send((header, file.map_err(|error| errno(&error))));
        }
        // What cannot be removed is found free at the next start and tried again.
        Job::Delete(segment) => drop(directory.remove(&segment::file_name(segment))),
    }
}
