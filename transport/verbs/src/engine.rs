//! The threads behind a device.
//!
//! ```text
//!   links --commands--> device thread: posts, polls, keeps time --> outboxes --> links
//!                          |        ^                  |
//!                     slow calls    results       reads to check
//!                          v        |                  v
//!                     chores thread: windows,     checkers: compare with the record
//!                     regions, funerals
//! ```
//! The device thread alone posts requests and takes completions, so no queue pair needs a lock. It looks for work for
//! [`SPIN`] before it sleeps, and sleeps on the completion channel and an eventfd together. What takes the kernel long
//! (making windows, closing queue pairs) is the chores thread's.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kv_arena::{Held, Slot};
use kv_block::Record;
use kv_transport::Micros;
use kv_transport::link::{LinkDone, LinkError, LinkOp};
use kv_wire::message::{ReadId, WantId};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::time::Timespec;

use crate::flow::{Fault, Flow, Loan, Output, Step, Supply, Token};
use crate::handles::{Batch, Context, Cq, Mr, Mw, Pd, Qp, Request};
use crate::memory::Memory;
use crate::outbox::Outbox;
use crate::probe::{Exposure, cpus_of_node};
use crate::sys;

/// How long to look for work before sleeping: about what a sleep and its end cost.
const SPIN: Duration = Duration::from_micros(50);
/// How often time is looked at.
const TICK: Duration = Duration::from_millis(250);
/// The same while a path is ending.
const TICK_ENDING: Duration = Duration::from_millis(10);
/// Completions taken at once.
const BATCH: usize = 64;
/// Windows made at once.
const WINDOWS_STEP: u32 = 64;
/// Numbers that a peer may say before one is listened for again.
pub(crate) const LISTENS: u32 = 8;
/// Token of what the peer says.
const HEARD: u32 = u32::MAX - 2;
/// How often, and with what pause, a queue pair is closed that does not want to.
const CLOSE_TRIES: u32 = 20;
const CLOSE_PAUSE: Duration = Duration::from_millis(100);

/// One of the device's places for a queue pair.
pub(crate) struct Permit {
    taken: Arc<AtomicU32>,
}

impl Permit {
    pub(crate) fn take(taken: &Arc<AtomicU32>, max: u32) -> Option<Self> {
        let more = |count: u32| (count < max).then_some(count + 1);
        taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok()?;
        Some(Self { taken: Arc::clone(taken) })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.taken.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A link as the device thread has it. In this order: the queue pair ends before the memory that it may touch.
pub(crate) struct Lane {
    pub(crate) qp: Qp,
    pub(crate) flow: Flow<Mr>,
    /// Of this link's own regions.
    pub(crate) pd: Arc<Pd>,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) permit: Permit,
    /// The queue pair was put into error.
    pub(crate) failed: bool,
}

pub(crate) enum Command {
    Attach(u32, Box<Lane>),
    Ops(u32, Arc<Outbox>, Vec<LinkOp>),
    Close(u32),
    Windows { asked: u32, made: Vec<Mw>, why: Option<String> },
    Registered { serial: u32, want: WantId, made: Result<Mr, String> },
    Deregistered { serial: u32, want: WantId, closed: bool },
    Buried { permit: Permit, windows: u32 },
    Stop,
}

/// The way to the device thread.
pub(crate) struct Inbox {
    commands: Mutex<Vec<Command>>,
    sleeping: AtomicBool,
    event: OwnedFd,
}

impl Inbox {
    pub(crate) fn new() -> std::io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { commands: Mutex::default(), sleeping: AtomicBool::new(false), event })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Command>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn send(&self, command: Command) {
        self.lock().push(command);
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // Only a counter at its end makes this fail, and then the wake-up is already due.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }
}

/// The device's windows: those that are free, and room for those that are not.
struct Pool {
    windows: Vec<Option<Mw>>,
    empty: Vec<u32>,
    /// Taken from the front, so that a key comes back as late as possible.
    free: VecDeque<u32>,
    /// Made or being made.
    count: u32,
    max: u32,
    coming: u32,
    /// To be asked for.
    ask: bool,
    /// Why there will be no more.
    why: Option<String>,
}

impl Pool {
    fn lend(&mut self) -> Result<Option<Loan>, LinkError> {
        if let Some(window) = self.free.pop_front()
            && let Some(Some(mw)) = self.windows.get(window as usize)
        {
            // The low byte is the user's part of a key; the rest names the window.
            let key = mw.key();
            return Ok(Some(Loan { window, key: (key & !0xff) | (key.wrapping_add(1) & 0xff) }));
        }
        if self.coming > 0 {
            return Ok(None);
        }
        if self.count < self.max && self.why.is_none() {
            self.ask = true;
            return Ok(None);
        }
        let why = self.why.as_deref().unwrap_or("all of them are in use");
        Err(LinkError::Unsupported { what: format!("no memory window: {why}") })
    }

    fn add(&mut self, mw: Mw) {
        let window = self.empty.pop().unwrap_or(self.windows.len() as u32);
        match self.windows.get_mut(window as usize) {
            Some(place) => *place = Some(mw),
            None => self.windows.push(Some(mw)),
        }
        self.free.push_back(window);
    }

    /// A window that is not free, to be closed.
    fn remove(&mut self, loan: Loan) -> Option<Mw> {
        let mw = self.windows.get_mut(loan.window as usize)?.take()?;
        self.empty.push(loan.window);
        Some(mw)
    }
}

/// What the chores thread does.
pub(crate) enum Chore {
    Windows(u32),
    Register { serial: u32, pd: Arc<Pd>, want: WantId, start: usize, bytes: usize, at: u64 },
    Deregister { serial: u32, want: WantId, region: Mr },
    Bury(Box<Funeral>),
}

/// A link that has ended, and the memory that goes back when the device has let go of it.
pub(crate) struct Funeral {
    qp: Qp,
    windows: Vec<Mw>,
    regions: Vec<Mr>,
    dones: Vec<LinkDone>,
    blocks: Vec<Held>,
    lost: bool,
    why: LinkError,
    outbox: Arc<Outbox>,
    permit: Permit,
}

/// A read that has come.
struct Check {
    read: ReadId,
    into: Slot,
    record: Record,
    outbox: Arc<Outbox>,
}

impl Check {
    fn perform(self) {
        let Self { read, into, record, outbox } = self;
        let matches = record.checksum.matches(&record.key, &into[..record.bytes as usize]);
        let result = if matches { Ok(()) } else { Err(LinkError::Corrupt) };
        outbox.push([LinkDone::Read { read, into, result }]);
    }
}

/// Reads that wait for a checker. Bounded by the reads that links take.
#[derive(Default)]
pub(crate) struct Checks {
    queue: Mutex<(VecDeque<Check>, bool)>,
    came: Condvar,
}

impl Checks {
    fn lock(&self) -> MutexGuard<'_, (VecDeque<Check>, bool)> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn close(&self) {
        self.lock().1 = true;
        self.came.notify_all();
    }

    /// What a checker does: until it is closed and nothing waits.
    pub(crate) fn work(&self) {
        let mut queue = self.lock();
        loop {
            if let Some(check) = queue.0.pop_front() {
                drop(queue);
                check.perform();
                queue = self.lock();
            } else if queue.1 {
                return;
            } else {
                queue = self.came.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// Keeps the calling thread on the CPUs near a device, if they are known.
pub(crate) fn stay_near(sysfs: &Path, numa_node: Option<u32>) {
    let cpus = numa_node.map(|node| cpus_of_node(sysfs, node)).unwrap_or_default();
    let mut set = rustix::thread::CpuSet::new();
    for cpu in cpus.into_iter().filter(|cpu| *cpu < rustix::thread::CpuSet::MAX_CPU) {
        set.set(cpu);
    }
    if set.count() > 0 {
        // The container may not have these CPUs; then it runs where it may.
        let _ = rustix::thread::sched_setaffinity(None, &set);
    }
}

/// What the device thread works on.
pub(crate) struct Engine {
    lanes: BTreeMap<u32, Lane>,
    /// Links with something to do.
    dirty: BTreeSet<u32>,
    /// Links that wait for a window.
    starved: BTreeSet<u32>,
    pool: Pool,
    exposure: Exposure,
    batch: Batch,
    /// Windows of the batch, with the keys that they get.
    bound: Vec<Loan>,
    outputs: Vec<Output<Mr>>,
    completions: Vec<sys::Wc>,
    /// Of links that have ended; free again when their completions are out of the queue.
    permits: Vec<Permit>,
    funerals: u32,
    stopping: bool,
    chores: Sender<Chore>,
    checks: Arc<Checks>,
    /// Nobody takes from `checks`.
    check_here: bool,
    inbox: Arc<Inbox>,
    port_is_up: Arc<AtomicBool>,
    started: Instant,
    ticked: Instant,
    cq: Arc<Cq>,
    context: Arc<Context>,
    memory: Arc<Memory>,
}

/// What an engine is made of.
pub(crate) struct Parts {
    pub(crate) windows_max: u32,
    pub(crate) exposure: Exposure,
    pub(crate) chores: Sender<Chore>,
    pub(crate) checks: Arc<Checks>,
    pub(crate) check_here: bool,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) port_is_up: Arc<AtomicBool>,
    pub(crate) started: Instant,
    pub(crate) cq: Arc<Cq>,
    pub(crate) context: Arc<Context>,
    pub(crate) memory: Arc<Memory>,
}

impl Engine {
    pub(crate) fn new(parts: Parts) -> Self {
        let pool = Pool {
            windows: Vec::new(),
            empty: Vec::new(),
            free: VecDeque::new(),
            count: 0,
            max: parts.windows_max,
            coming: 0,
            ask: false,
            why: None,
        };
        Self {
            lanes: BTreeMap::new(),
            dirty: BTreeSet::new(),
            starved: BTreeSet::new(),
            pool,
            exposure: parts.exposure,
            batch: Batch::default(),
            bound: Vec::new(),
            outputs: Vec::new(),
            completions: vec![sys::Wc::zeroed(); BATCH],
            permits: Vec::new(),
            funerals: 0,
            stopping: false,
            chores: parts.chores,
            checks: parts.checks,
            check_here: parts.check_here,
            inbox: parts.inbox,
            port_is_up: parts.port_is_up,
            started: parts.started,
            ticked: parts.started,
            cq: parts.cq,
            context: parts.context,
            memory: parts.memory,
        }
    }

    fn now(&self) -> Micros {
        Micros(self.started.elapsed().as_micros() as u64)
    }

    /// The device thread: until it is told to stop and every link has ended.
    pub(crate) fn run(mut self) {
        let mut idle_since = Instant::now();
        while !self.stopping || !self.lanes.is_empty() || self.funerals > 0 {
            if self.turn() {
                idle_since = Instant::now();
            } else if idle_since.elapsed() < SPIN {
                std::hint::spin_loop();
            } else {
                self.sleep();
                idle_since = Instant::now();
            }
        }
    }

    /// One round: what came in, what completed, what is due. Whether there was anything.
    fn turn(&mut self) -> bool {
        let commands = std::mem::take(&mut *self.inbox.lock());
        let mut worked = !commands.is_empty();
        for command in commands {
            self.command(command);
        }
        worked |= self.complete();
        let tick = if self.lanes.values().any(|lane| lane.flow.is_ending()) { TICK_ENDING } else { TICK };
        if self.ticked.elapsed() >= tick {
            self.tick();
        }
        while let Some(serial) = self.dirty.pop_first() {
            self.work(serial);
        }
        worked
    }

    fn sleep(&mut self) {
        self.inbox.sleeping.store(true, Ordering::SeqCst);
        let wake_due = !self.inbox.lock().is_empty();
        // A completion from before the queue is armed wakes nobody, so it is looked for afterwards.
        if wake_due || self.cq.arm().is_err() || self.complete() {
            self.inbox.sleeping.store(false, Ordering::SeqCst);
            return;
        }
        // Without links there is no time to keep.
        let ending = self.lanes.values().map(|lane| lane.flow.is_ending()).max();
        let limit = ending.map(|ending| if ending { TICK_ENDING } else { TICK });
        let limit = limit.map(|limit| Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) });
        let (context, cq) = (Arc::clone(&self.context), Arc::clone(&self.cq));
        let mut fds = [
            PollFd::new(&self.inbox.event, PollFlags::IN),
            PollFd::from_borrowed_fd(cq.channel(), PollFlags::IN),
            PollFd::from_borrowed_fd(context.events(), PollFlags::IN),
        ];
        // A signal, or a limit: the next round finds what there is.
        let _ = poll(&mut fds, limit.as_ref());
        let happened = !fds[2].revents().is_empty();
        self.inbox.sleeping.store(false, Ordering::SeqCst);
        let _ = rustix::io::read(&self.inbox.event, &mut [0; 8]);
        cq.disarm();
        if happened {
            self.events();
        }
    }

    fn command(&mut self, command: Command) {
        let now = self.now();
        match command {
            Command::Attach(serial, lane) => {
                let listening = lane.qp.listen(wr_id(serial, Token(HEARD)), LISTENS);
                self.lanes.insert(serial, *lane);
                if let (Err(error), Some(lane)) = (listening, self.lanes.get_mut(&serial)) {
                    lane.flow.fail(format!("nothing can be heard: {error}"), true, now);
                }
                self.dirty.insert(serial);
            }
            Command::Ops(serial, outbox, ops) => match self.lanes.get_mut(&serial) {
                Some(lane) => {
                    for op in ops {
                        take(&mut lane.flow, &self.memory, op);
                    }
                    self.dirty.insert(serial);
                }
                None => outbox.push(ops.into_iter().filter_map(refuse)),
            },
            Command::Close(serial) => {
                if let Some(lane) = self.lanes.get_mut(&serial) {
                    lane.flow.close(now);
                    self.dirty.insert(serial);
                }
            }
            Command::Windows { asked, made, why } => {
                self.pool.coming -= asked;
                self.pool.count -= asked - made.len() as u32;
                if let Some(why) = &why {
                    self.memory.note(format!(
                        "the device gives no more than {} memory windows ({why})",
                        self.pool.count
                    ));
                }
                self.pool.why = why;
                made.into_iter().for_each(|mw| self.pool.add(mw));
                self.dirty.append(&mut self.starved);
            }
            Command::Registered { serial, want, made } => {
                let made = made.map(|region| {
                    let key = region.remote_key();
                    (region, key)
                });
                // A flow that waits for a region is not dismantled, so it is there.
                if let Some(lane) = self.lanes.get_mut(&serial) {
                    lane.flow.registered(want, made);
                    self.dirty.insert(serial);
                }
            }
            Command::Deregistered { serial, want, closed } => {
                if let Some(lane) = self.lanes.get_mut(&serial) {
                    lane.flow.deregistered(want, closed, now);
                    self.dirty.insert(serial);
                }
            }
            Command::Buried { permit, windows } => {
                self.funerals -= 1;
                self.pool.count -= windows;
                self.permits.push(permit);
                self.dirty.append(&mut self.starved);
            }
            Command::Stop => {
                self.stopping = true;
                for (serial, lane) in &mut self.lanes {
                    lane.flow.close(now);
                    self.dirty.insert(*serial);
                }
            }
        }
    }

    /// Takes what has completed.
    fn complete(&mut self) -> bool {
        let mut worked = false;
        loop {
            let found = match self.cq.poll(&mut self.completions) {
                Ok(found) => found,
                Err(error) => {
                    self.fail_all(&format!("completions cannot be taken: {error}"));
                    return worked;
                }
            };
            let now = self.now();
            for at in 0..found {
                let wc = self.completions[at];
                self.completed(&wc, now);
            }
            worked |= found > 0;
            if found < BATCH {
                // Whatever was in the queue of links that are gone has been taken.
                self.permits.clear();
                return worked;
            }
        }
    }

    fn completed(&mut self, wc: &sys::Wc, now: Micros) {
        let (serial, token) = ((wc.wr_id >> 32) as u32, Token(wc.wr_id as u32));
        // Of a link that is gone, whose flushed requests may come late.
        let Some(lane) = self.lanes.get_mut(&serial) else { return };
        self.dirty.insert(serial);
        let text;
        let result = match wc.status {
            sys::WC_SUCCESS => Ok(()),
            sys::WC_REM_ACCESS_ERR => Err(Fault::Access),
            sys::WC_WR_FLUSH_ERR => Err(Fault::Flushed),
            status => {
                let vendor = wc.vendor_err;
                text = format!("{} (status {status}, vendor {vendor:#x})", self.context.status_text(status));
                Err(Fault::Other(&text))
            }
        };
        if token.0 != HEARD {
            lane.flow.ended(token, result, now);
        } else if result.is_ok() {
            lane.flow.heard(u32::from_be(wc.imm_data), now);
            if let Err(error) = lane.qp.listen(wc.wr_id, 1) {
                lane.flow.fail(format!("nothing can be heard any more: {error}"), true, now);
            }
        } else {
            lane.flow.deaf(now);
        }
    }

    fn fail_all(&mut self, what: &str) {
        let now = self.now();
        for (serial, lane) in &mut self.lanes {
            lane.flow.fail(what.to_owned(), true, now);
            self.dirty.insert(*serial);
        }
    }

    fn tick(&mut self) {
        self.ticked = Instant::now();
        let now = self.now();
        for (serial, lane) in &mut self.lanes {
            lane.flow.tick(now);
            self.dirty.insert(*serial);
        }
    }

    /// What the device says by itself.
    fn events(&mut self) {
        while let Some((event, text)) = self.context.next_event() {
            match event {
                sys::EVENT_DEVICE_FATAL => self.fail_all(&format!("the device failed: {text}")),
                sys::EVENT_PORT_ERR => self.port_is_up.store(false, Ordering::Relaxed),
                sys::EVENT_PORT_ACTIVE => self.port_is_up.store(true, Ordering::Relaxed),
                _ => {}
            }
            tracing::debug!(event = text, "RDMA device event");
        }
    }

    /// Moves one link on as far as it goes.
    fn work(&mut self, serial: u32) {
        let now = self.now();
        let Some(lane) = self.lanes.get_mut(&serial) else { return };
        let mut dones = Vec::new();
        loop {
            let pool = &mut self.pool;
            let mut starved = false;
            let mut lend = || pool.lend().inspect(|loan| starved |= loan.is_none());
            let mut supply = match self.exposure {
                Exposure::Windows => Supply::Windows(&mut lend),
                Exposure::Regions => Supply::Regions,
            };
            lane.flow.fill(&mut supply, now);
            if starved {
                self.starved.insert(serial);
            }
            lane.flow.outputs(&mut self.outputs);
            if self.outputs.is_empty() {
                break;
            }
            self.batch.clear();
            self.bound.clear();
            for output in self.outputs.drain(..) {
                match output {
                    Output::Post(token, step) => {
                        let Some(request) = request(&self.pool, &step) else { continue };
                        if let Step::Bind { loan, .. } = step {
                            self.bound.push(loan);
                        }
                        self.batch.push(wr_id(serial, token), request);
                    }
                    Output::Register { want, start, bytes, at } => {
                        let pd = Arc::clone(&lane.pd);
                        send(&self.chores, Chore::Register { serial, pd, want, start, bytes, at });
                    }
                    Output::Deregister { want, region } => {
                        send(&self.chores, Chore::Deregister { serial, want, region });
                    }
                    Output::Return(loan) => {
                        self.pool.free.push_back(loan.window);
                        self.dirty.append(&mut self.starved);
                    }
                    Output::Answered => lane.outbox.answered(),
                    Output::Done(done) => dones.push(done),
                    Output::Check { read, into, record } => {
                        let check = Check { read, into, record, outbox: Arc::clone(&lane.outbox) };
                        if self.check_here {
                            check.perform();
                        } else {
                            self.checks.lock().0.push_back(check);
                            self.checks.came.notify_one();
                        }
                    }
                }
            }
            // SAFETY: the flow holds the memory of every request until it has ended or the queue pair was closed
            // (`Flow::dismantle`, `bury`), and the pool the windows; this thread alone posts.
            if let Err((_, error)) = unsafe { lane.qp.post(&mut self.batch) } {
                lane.flow.fail(format!("the device takes no requests: {error}"), true, now);
            }
            // A bind that was not taken leaves a window with a key that it does not have; it is closed with the rest.
            for loan in self.bound.drain(..) {
                if let Some(Some(mw)) = self.pool.windows.get_mut(loan.window as usize) {
                    mw.set_key(loan.key);
                }
            }
        }
        if lane.flow.is_failing() && !lane.failed {
            lane.failed = true;
            lane.outbox.close();
            // Refused only when it is in error already, or the device is gone.
            let _ = lane.qp.fail();
        }
        if !dones.is_empty() {
            lane.outbox.push(dones);
        }
        if lane.flow.is_over(now)
            && let Some(lane) = self.lanes.remove(&serial)
        {
            self.bury(lane);
        }
        if self.pool.ask {
            self.pool.ask = false;
            let asked = WINDOWS_STEP.min(self.pool.max - self.pool.count);
            self.pool.count += asked;
            self.pool.coming += asked;
            send(&self.chores, Chore::Windows(asked));
        }
    }

    fn bury(&mut self, lane: Lane) {
        let Lane { qp, flow, outbox, permit, pd: _, failed: _ } = lane;
        outbox.close();
        let remains = flow.dismantle();
        let windows = remains.loans.iter().filter_map(|loan| self.pool.remove(*loan)).collect();
        self.funerals += 1;
        let funeral = Funeral {
            qp,
            windows,
            regions: remains.regions,
            dones: remains.dones,
            blocks: remains.blocks,
            lost: remains.lost,
            why: remains.why,
            outbox,
            permit,
        };
        send(&self.chores, Chore::Bury(Box::new(funeral)));
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Empty, unless the thread panics: then the queue pairs end here, and what the links had with them.
        for lane in self.lanes.values() {
            lane.outbox.broken(LinkError::Path { what: "the device thread panicked".to_owned() }, true);
        }
    }
}

/// The chores thread outlives the device thread, which has its only sender.
fn send(chores: &Sender<Chore>, chore: Chore) {
    assert!(chores.send(chore).is_ok(), "the chores thread has ended before its device");
}

fn wr_id(serial: u32, token: Token) -> u64 {
    u64::from(serial) << 32 | u64::from(token.0)
}

fn request<'a>(pool: &'a Pool, step: &Step) -> Option<Request<'a>> {
    Some(match *step {
        Step::Read { from, remote_key, to, local_key, bytes } => {
            Request::Read { from, remote_key, to, local_key, bytes }
        }
        Step::Bind { loan, place, bytes } => {
            let window = pool.windows.get(loan.window as usize)?.as_ref()?;
            Request::Bind { window, key: loan.key, region: place.region, from: place.at, bytes: bytes.into() }
        }
        Step::Invalidate { loan } => Request::Invalidate { key: loan.key },
        Step::Say(word) => Request::Say { number: word as u32 },
    })
}

fn take(flow: &mut Flow<Mr>, memory: &Memory, op: LinkOp) {
    match op {
        LinkOp::Expose { want, block } => {
            let place = memory.place(&block);
            flow.expose(want, block, place);
        }
        LinkOp::Conceal { want } => flow.conceal(want),
        LinkOp::Read { read, want: _, window, record, into } => {
            let place = memory.place(&into);
            flow.read(read, window, record, into, place);
        }
        LinkOp::Cancel { read } => flow.cancel(read),
    }
}

/// Ends an operation that came too late.
pub(crate) fn refuse(op: LinkOp) -> Option<LinkDone> {
    let why = LinkError::Path { what: "the path is gone".to_owned() };
    match op {
        LinkOp::Expose { want, .. } => Some(LinkDone::Exposed { want, result: Err(why) }),
        LinkOp::Read { read, into, .. } => Some(LinkDone::Read { read, into, result: Err(why) }),
        LinkOp::Conceal { .. } | LinkOp::Cancel { .. } => None,
    }
}

/// The chores thread: until its device thread is gone.
pub(crate) fn chores(chores: &Receiver<Chore>, inbox: &Inbox, pd: &Arc<Pd>) {
    while let Ok(chore) = chores.recv() {
        match chore {
            Chore::Windows(asked) => {
                let (mut made, mut why) = (Vec::new(), None);
                while (made.len() as u32) < asked && why.is_none() {
                    match Mw::new(pd) {
                        Ok(mw) => made.push(mw),
                        Err(error) => why = Some(error.to_string()),
                    }
                }
                inbox.send(Command::Windows { asked, made, why });
            }
            Chore::Register { serial, pd, want, start, bytes, at } => {
                // SAFETY: the flow holds the block, which nobody writes, until the region is closed.
                let made = unsafe { Memory::region(&pd, start, bytes, at) };
                let made = made.map_err(|error| format!("the block cannot be registered: {error}"));
                inbox.send(Command::Registered { serial, want, made });
            }
            Chore::Deregister { serial, want, region } => {
                let closed = insist("memory region", region, Mr::close);
                inbox.send(Command::Deregistered { serial, want, closed });
            }
            Chore::Bury(funeral) => {
                let (permit, windows) = bury(*funeral);
                inbox.send(Command::Buried { permit, windows });
            }
        }
    }
}

/// Closes something, and does not take no for an answer for a while. Whether it is closed; if not, it is left as it is.
fn insist<T>(what: &str, mut object: T, close: impl Fn(T) -> Result<(), (T, std::io::Error)>) -> bool {
    for attempt in 1..=CLOSE_TRIES {
        match close(object) {
            Ok(()) => return true,
            Err((still, error)) if attempt == CLOSE_TRIES => {
                tracing::error!(what, %error, "an RDMA object cannot be closed; its memory stays out of use");
                std::mem::forget(still);
                return false;
            }
            Err((still, _)) => object = still,
        }
        std::thread::sleep(CLOSE_PAUSE);
    }
    false
}

/// Ends a link, and then gives the memory back: first nothing moves any more, then no key is good, then the queue
/// pair goes. A window that is bound holds its queue pair, so it goes before; rxe would wait for it for ever.
fn bury(funeral: Funeral) -> (Permit, u32) {
    let Funeral { qp, windows, regions, dones, blocks, lost, why, outbox, permit } = funeral;
    let count = windows.len() as u32;
    // Refused only when it is in error already, or the device is gone.
    let _ = qp.fail();
    let mut ended = true;
    for window in windows {
        ended &= insist("memory window", window, Mw::close);
    }
    for region in regions {
        ended &= insist("memory region", region, Mr::close);
    }
    ended &= insist("queue pair", qp, Qp::close);
    if ended {
        drop(blocks);
        outbox.push(dones);
    } else {
        // The device may still read or write it.
        std::mem::forget((blocks, dones));
    }
    outbox.broken(why, lost || !ended);
    (permit, count)
}
