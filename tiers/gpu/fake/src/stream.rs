//! Streams: a thread each, which does in order what was queued. Events: what was recorded, and how far it is done.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::Code;
use crate::kernel::{self, Launch};
use crate::memory::{Kind, Mapping};

/// A copy looks this often whether its device is still there, and waits this often when it is to be slow.
const CHUNK_BYTES: usize = 64 << 10;
/// How often a stream looks at an event of another process.
const LOOK: Duration = Duration::from_micros(20);

/// One end of a copy.
#[derive(Clone)]
pub(crate) enum End {
    Host(usize),
    Device(Arc<Mapping>, usize),
}

impl End {
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        match self {
            Self::Host(address) => std::ptr::with_exposed_provenance_mut(address + offset),
            Self::Device(mapping, start) => mapping.at(start + offset),
        }
    }
}

#[derive(Clone)]
pub(crate) enum Work {
    Copy { from: End, to: End, bytes: usize },
    Record(Arc<Event>, u64),
    Wait(Arc<Event>, u64),
    Launch(Arc<Launch>),
}

impl Work {
    /// Whether it reads or writes any of this host memory.
    fn touches_host(&self, range: &Range<usize>) -> bool {
        let overlaps = |(end, bytes): (&End, usize)| match end {
            End::Host(address) => *address < range.end && range.start < address + bytes,
            End::Device(..) => false,
        };
        match self {
            Self::Copy { from, to, bytes } => overlaps((from, *bytes)) || overlaps((to, *bytes)),
            Self::Launch(launch) => launch.ends().any(overlaps),
            Self::Record(..) | Self::Wait(..) => false,
        }
    }

    fn touches_device(&self, memory: &Arc<Mapping>) -> bool {
        if let Self::Launch(launch) = self {
            return kernel::touches_device(launch, memory);
        }
        let Self::Copy { from, to, .. } = self else { return false };
        [from, to]
            .into_iter()
            .any(|end| matches!(end, End::Device(mapping, _) if Arc::ptr_eq(mapping, memory)))
    }
}

impl Work {
    /// Whether it reads or writes any of this part of memory.
    fn touches_part(&self, memory: &Arc<Mapping>, part: &Range<usize>) -> bool {
        let touches = |(end, bytes): (&End, usize)| match end {
            End::Device(mapping, at) => {
                Arc::ptr_eq(mapping, memory) && *at < part.end && part.start < at + bytes
            }
            End::Host(_) => false,
        };
        match self {
            Self::Copy { from, to, bytes } => [from, to].into_iter().any(|end| touches((end, *bytes))),
            Self::Launch(launch) => launch.ends().any(touches),
            Self::Record(..) | Self::Wait(..) => false,
        }
    }
}

impl Stream {
    /// Whether anything queued uses this part of memory.
    pub(crate) fn touches_part(&self, memory: &Arc<Mapping>, part: &Range<usize>) -> bool {
        self.queue().work.iter().any(|work| work.touches_part(memory, part))
    }
}

/// What the streams of one device share.
#[derive(Default)]
pub(crate) struct Health {
    /// What every call answers from now on; 0 while the device is there.
    lost: AtomicU32,
    /// How long a copy waits before each chunk.
    pub(crate) delay_us: AtomicU64,
    /// Whether copies stand still.
    pub(crate) holds: AtomicBool,
    /// After so many copies over the bus, one lands with another bit; 0: none does.
    pub(crate) flips: AtomicU64,
    /// What launches found that no caller may do.
    pub(crate) violations: AtomicU64,
}

impl Health {
    pub(crate) fn lose(&self, code: u32) {
        self.lost.store(code, Ordering::SeqCst);
    }

    pub(crate) fn check(&self) -> Result<(), Code> {
        match self.lost.load(Ordering::SeqCst) {
            0 => Ok(()),
            code => Err(Code(code)),
        }
    }
}

#[derive(Default)]
struct Queue {
    /// The first is being done.
    work: VecDeque<Work>,
    queued: u64,
    done: u64,
    closed: bool,
}

pub(crate) struct Stream {
    pub(crate) device: usize,
    pub(crate) health: Arc<Health>,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// What is queued is not done any more.
    stopped: AtomicBool,
}

impl Stream {
    pub(crate) fn new(device: usize, health: Arc<Health>) -> Arc<Self> {
        let stream = Arc::new(Self {
            device,
            health,
            queue: Mutex::default(),
            changed: Condvar::new(),
            stopped: AtomicBool::new(false),
        });
        let worker = Arc::clone(&stream);
        std::thread::spawn(move || worker.run());
        stream
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues it and says which it is.
    pub(crate) fn push(&self, work: Work) -> u64 {
        let mut queue = self.queue();
        queue.work.push_back(work);
        queue.queued += 1;
        self.changed.notify_all();
        queue.queued
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.queue().work.is_empty()
    }

    /// Waits for all that was queued so far.
    pub(crate) fn wait(&self) -> Result<(), Code> {
        let mut queue = self.queue();
        let last = queue.queued;
        while queue.done < last {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        self.health.check()
    }

    pub(crate) fn touches_host(&self, range: &Range<usize>) -> bool {
        self.queue().work.iter().any(|work| work.touches_host(range))
    }

    pub(crate) fn touches_device(&self, memory: &Arc<Mapping>) -> bool {
        self.queue().work.iter().any(|work| work.touches_device(memory))
    }

    /// Copies and launches that are not done.
    pub(crate) fn copies(&self) -> usize {
        let is_copy = |work: &&Work| matches!(work, Work::Copy { .. } | Work::Launch(_));
        self.queue().work.iter().filter(is_copy).count()
    }

    /// Whether a launch of this module is under way.
    pub(crate) fn runs(&self, module: usize) -> bool {
        let is_of = |work: &Work| matches!(work, Work::Launch(launch) if launch.is_of(module));
        self.queue().work.iter().any(is_of)
    }

    /// Its thread ends after what is queued, as on a device.
    pub(crate) fn close(&self) {
        self.queue().closed = true;
        self.changed.notify_all();
    }

    /// Its context ends: after this returns, nothing of it touches any memory.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.close();
        let mut queue = self.queue();
        while !queue.work.is_empty() {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn goes_on(&self) -> bool {
        !self.stopped.load(Ordering::SeqCst) && self.health.check().is_ok()
    }

    /// Waits as it is to, before so many chunks; `false`: it does not come to them.
    fn comes_to(&self, chunks: u64) -> bool {
        let delay_us = self.health.delay_us.load(Ordering::Relaxed) * chunks;
        if delay_us > 0 {
            std::thread::sleep(Duration::from_micros(delay_us));
        }
        while self.health.holds.load(Ordering::SeqCst) && self.goes_on() {
            std::thread::sleep(LOOK);
        }
        self.goes_on()
    }

    fn run(&self) {
        loop {
            let mut queue = self.queue();
            let work = loop {
                match queue.work.front() {
                    Some(work) => break work.clone(),
                    None if queue.closed => return,
                    None => queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(queue);
            self.perform(&work);
            let mut queue = self.queue();
            queue.work.pop_front();
            queue.done += 1;
            self.changed.notify_all();
        }
    }

    /// The bus changes a bit of the copy of that number, where it was asked to.
    fn may_flip(&self, to: &End) {
        let next = |left: u64| left.checked_sub(1);
        if self.health.flips.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next) == Ok(1) {
            // SAFETY: the first byte of what was just copied there, as above.
            unsafe { *to.at(0) ^= 0x10 };
        }
    }

    fn perform(&self, work: &Work) {
        match work {
            Work::Copy { from, to, bytes } => {
                let mut at = 0;
                while at < *bytes {
                    if !self.comes_to(1) {
                        return;
                    }
                    let length = CHUNK_BYTES.min(bytes - at);
                    // SAFETY: device memory is held by the work; host memory stays until the copy is done by the
                    // contract of the call that queued it, which is what is tested here.
                    unsafe { std::ptr::copy(from.at(at).cast_const(), to.at(at), length) };
                    at += length;
                }
                if let (End::Device(..), End::Host(_)) | (End::Host(_), End::Device(..)) = (from, to) {
                    self.may_flip(to);
                }
            }
            Work::Launch(launch) => {
                launch.carry_out(&self.health, |bytes| self.comes_to(bytes.div_ceil(CHUNK_BYTES) as u64));
            }
            Work::Record(event, number) => {
                event.words()[1].fetch_max(*number, Ordering::SeqCst);
            }
            Work::Wait(event, number) => {
                while event.words()[1].load(Ordering::SeqCst) < *number && self.goes_on() {
                    std::thread::sleep(LOOK);
                }
            }
        }
    }
}

/// Two numbers: how often it was recorded, and the last record that was reached. In shared memory when other
/// processes may look.
pub(crate) struct Event {
    pub(crate) health: Arc<Health>,
    words: Words,
}

enum Words {
    Own([AtomicU64; 2]),
    Shared(Mapping),
}

impl Event {
    pub(crate) fn new(health: Arc<Health>, shared: bool) -> Result<Self, Code> {
        let words = if shared { Words::Shared(Mapping::new(4096)?) } else { Words::Own(Default::default()) };
        Ok(Self { health, words })
    }

    pub(crate) fn open(health: Arc<Health>, handle: &[u8; 64]) -> Result<Self, Code> {
        Ok(Self { health, words: Words::Shared(Mapping::open(handle, Kind::Event)?) })
    }

    pub(crate) fn handle(&self) -> Option<[u8; 64]> {
        match &self.words {
            Words::Own(_) => None,
            Words::Shared(mapping) => Some(mapping.handle(Kind::Event)),
        }
    }

    fn words(&self) -> &[AtomicU64; 2] {
        match &self.words {
            Words::Own(words) => words,
            Words::Shared(mapping) => mapping.words(),
        }
    }

    /// A new record: its number.
    pub(crate) fn record(&self) -> u64 {
        self.words()[0].fetch_add(1, Ordering::SeqCst) + 1
    }

    pub(crate) fn recorded(&self) -> u64 {
        self.words()[0].load(Ordering::SeqCst)
    }

    pub(crate) fn is_done(&self) -> bool {
        let [recorded, done] = self.words();
        done.load(Ordering::SeqCst) >= recorded.load(Ordering::SeqCst)
    }

    pub(crate) fn wait(&self) -> Result<(), Code> {
        while !self.is_done() {
            self.health.check()?;
            std::thread::sleep(LOOK);
        }
        self.health.check()
    }
}
