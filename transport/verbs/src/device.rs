//! An open device, its registered memory and its threads.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kv_arena::Slab;

use crate::Error;
use crate::engine::{self, Checks, Command, Engine, Inbox, LISTENS, Parts};
use crate::handles::{Context, Cq, Mr, Pd};
use crate::memory::Memory;
use crate::probe::{Exposure, Rail};
use crate::sys;
use crate::trial;

/// How a device is used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceConfig {
    /// Paths to peers at once.
    pub links_max: u32,
    /// Requests that one path has at the device at once; others wait in our own queue.
    pub depth: u32,
    /// Longest single read; the device and its port may take less. Longer blocks are read in pieces.
    pub message_bytes_max: u32,
    /// Operations that one path takes at once.
    pub ops_max: u32,
    /// Blocks that one path exposes at once.
    pub exposures_max: u32,
    /// Memory windows of the device, for all paths together. They are made when they are needed first.
    pub windows_max: u32,
    /// Threads that compare what came with its checksum; 0: the device's own thread does it.
    pub checkers: u32,
    /// How long the device waits before it sends again: 4 us times two to this power, and that seven times. Below 18
    /// a busy peer is taken for a dead one.
    pub timeout: u8,
    /// Traffic class of the packets: the DSCP, times four, of the lossless class on RoCE.
    pub traffic_class: u8,
    /// Service level of the packets, on InfiniBand.
    pub service_level: u8,
    /// How blocks are exposed; `None`: by windows, where a trial shows that they hold, else by regions.
    pub exposure: Option<Exposure>,
    /// An idle peer is asked this often whether it is there.
    pub beat: Duration,
    /// A peer whose device owes an answer for this long is gone.
    pub silence: Duration,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            links_max: 64,
            depth: 128,
            message_bytes_max: 1 << 30,
            ops_max: 1024,
            exposures_max: 4096,
            windows_max: 16 << 10,
            checkers: 2,
            timeout: 18,
            traffic_class: 0,
            service_level: 0,
            exposure: None,
            beat: Duration::from_secs(2),
            silence: Duration::from_secs(60),
        }
    }
}

/// A device in use. Cheap to clone; it ends with its last clone, when all of its links have ended.
#[derive(Clone)]
pub struct Device {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) rail: Rail,
    pub(crate) config: DeviceConfig,
    pub(crate) exposure: Exposure,
    pub(crate) context: Arc<Context>,
    pub(crate) pd: Arc<Pd>,
    pub(crate) cq: Arc<Cq>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) links: Arc<AtomicU32>,
    pub(crate) links_max: u32,
    pub(crate) serial: AtomicU32,
    pub(crate) started: Instant,
    port_is_up: Arc<AtomicBool>,
    /// Ended by being dropped, last. The mutex makes what it holds shareable; nobody locks it.
    _threads: Mutex<Threads>,
}

struct Threads {
    /// Dropped, it stops the one that registers memory.
    registering: Option<mpsc::Sender<()>>,
    engine: Option<JoinHandle<()>>,
    others: Vec<JoinHandle<()>>,
    checks: Arc<Checks>,
    inbox: Arc<Inbox>,
}

/// Requests and completions of one path.
fn completions_per_link(depth: u32) -> u32 {
    // Two more: a question whether the peer is there, and a goodbye.
    depth + 2 + LISTENS
}

/// How a device is to expose blocks, and a note when that is not the best.
fn choose_exposure(
    context: &Arc<Context>,
    rail: &Rail,
    able: Exposure,
    wanted: Option<Exposure>,
) -> (Exposure, Option<String>) {
    match (able, wanted) {
        (Exposure::Regions, _) | (_, Some(Exposure::Regions)) => (Exposure::Regions, None),
        (Exposure::Windows, Some(Exposure::Windows)) => (Exposure::Windows, None),
        (Exposure::Windows, None) => match trial::windows_hold(context, rail) {
            Ok(()) => (Exposure::Windows, None),
            Err(why) => {
                let device = &rail.device;
                let note = format!(
                    "memory windows of {device} are not used ({why}): blocks are exposed by a region each, which \
                     costs two system calls per block"
                );
                (Exposure::Regions, Some(note))
            }
        },
    }
}

impl Device {
    /// Opens a device that the probe found usable, and registers the arenas with it: what has memory of the first
    /// piece at once, the rest on a thread of its own.
    pub fn open(rail: &Rail, arenas: &[Slab], config: &DeviceConfig) -> Result<Self, Error> {
        let device = rail.device.as_str();
        let failed =
            |what: &'static str| move |source| Error::Device { device: device.to_owned(), what, source };
        let library = sys::library().map_err(|why| Error::NoLibrary { why: why.to_owned() })?;
        let context = Context::open(library, device).map_err(failed("open it"))?;
        let context = Arc::new(context.ok_or_else(|| Error::NoDevice { device: device.to_owned() })?);
        let able = rail.capabilities.ok_or_else(|| Error::NoDevice { device: device.to_owned() })?;
        let (exposure, note) = choose_exposure(&context, rail, able.exposure, config.exposure);

        let mut config = config.clone();
        config.depth = config.depth.clamp(1, able.requests_max.saturating_sub(2).clamp(1, 1 << 16));
        config.message_bytes_max = config.message_bytes_max.clamp(4096, 1 << 30).min(able.message_bytes_max);
        config.windows_max = config.windows_max.min(able.windows_max);
        config.timeout = config.timeout.clamp(1, 31);
        let per_link = completions_per_link(config.depth);
        let links_max = config.links_max.clamp(1, (able.completions_max / per_link).max(1));

        let pd = Pd::new(&context).map_err(failed("make a protection domain"))?;
        let cq = Cq::new(&context, links_max * per_link).map_err(failed("make a completion queue"))?;
        let memory = Memory::new(&pd, arenas)
            .map_err(failed("register memory (RLIMIT_MEMLOCK: raise `ulimit -l`, or give CAP_IPC_LOCK)"))?;
        note.into_iter().for_each(|note| memory.note(note));
        let inbox = Arc::new(Inbox::new().map_err(failed("make an eventfd"))?);
        let checks = Arc::new(Checks::default());
        let port_is_up = Arc::new(AtomicBool::new(true));
        let started = Instant::now();

        let mut threads = Threads {
            registering: None,
            engine: None,
            others: Vec::new(),
            checks: Arc::clone(&checks),
            inbox: Arc::clone(&inbox),
        };
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let (sysfs, node) = (rail.sysfs.clone(), rail.numa_node);
            let builder = std::thread::Builder::new().name(name.to_owned());
            let near = move || {
                engine::stay_near(&sysfs, node);
                work();
            };
            builder.spawn(near).map_err(failed("start a thread"))
        };
        let (chores, receiver) = mpsc::channel();
        let (mailbox, domain) = (Arc::clone(&inbox), Arc::clone(&pd));
        let work = move || engine::chores(&receiver, &mailbox, &domain);
        threads.others.push(spawn("kv-rdma-chores", Box::new(work))?);
        for _ in 0..config.checkers {
            let checks = Arc::clone(&checks);
            // An error further on closes them: see the drop of `Threads`.
            threads.others.push(spawn("kv-rdma-check", Box::new(move || checks.work()))?);
        }
        let parts = Parts {
            windows_max: config.windows_max,
            exposure,
            chores,
            checks,
            check_here: config.checkers == 0,
            inbox: Arc::clone(&inbox),
            port_is_up: Arc::clone(&port_is_up),
            started,
            cq: Arc::clone(&cq),
            context: Arc::clone(&context),
            memory: Arc::clone(&memory),
        };
        let engine = Engine::new(parts);
        threads.engine = Some(spawn("kv-rdma", Box::new(move || engine.run()))?);
        let (registering, stop) = mpsc::channel::<()>();
        threads.registering = Some(registering);
        let arenas = Arc::clone(&memory);
        let stopped = move |pause| stop.recv_timeout(pause) != Err(mpsc::RecvTimeoutError::Timeout);
        threads.others.push(spawn("kv-rdma-memory", Box::new(move || arenas.register_all(stopped)))?);

        let inner = Inner {
            rail: rail.clone(),
            config,
            exposure,
            context,
            pd,
            cq,
            memory,
            inbox,
            links: Arc::default(),
            links_max,
            serial: AtomicU32::new(1),
            started,
            port_is_up,
            _threads: Mutex::new(threads),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What it is.
    pub fn rail(&self) -> &Rail {
        &self.inner.rail
    }

    /// How it exposes blocks.
    pub fn exposure(&self) -> Exposure {
        self.inner.exposure
    }

    /// Bytes of the arenas that it can use so far.
    pub fn registered_bytes(&self) -> u64 {
        self.inner.memory.registered_bytes()
    }

    /// Whether its port was up when the device last said something about it.
    pub fn port_is_up(&self) -> bool {
        self.inner.port_is_up.load(Ordering::Relaxed)
    }

    /// What could not be had and what would bring it, one line each.
    pub fn notes(&self) -> Vec<String> {
        self.inner.memory.notes()
    }

    /// What bounds it, one line per owner.
    pub fn bounds(&self) -> Vec<(&'static str, u64)> {
        let Inner { config, links_max, cq, .. } = &*self.inner;
        let links = u64::from(*links_max);
        vec![
            ("paths to peers", links),
            ("requests at the device, all paths", links * u64::from(config.depth)),
            ("operations taken, all paths", links * u64::from(config.ops_max)),
            ("blocks exposed, all paths", links * u64::from(config.exposures_max)),
            ("memory windows", u64::from(config.windows_max)),
            ("completions", cq.entries().into()),
        ]
    }

    /// Registers memory of another device (a GPU's, exported as a dmabuf), so that this one can use it without host
    /// memory in between. [`Error::Unsupported`] carries the kernel's word where it cannot.
    pub fn register_dmabuf(
        &self,
        fd: BorrowedFd<'_>,
        offset: u64,
        bytes: usize,
    ) -> Result<DmabufRegion, Error> {
        let region = self.inner.memory.dmabuf(fd, offset, bytes).map_err(|source| {
            let device = self.inner.rail.device.clone();
            match source.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                    Error::Unsupported { device, what: "register memory of another device (dmabuf)", source }
                }
                _ => Error::Device { device, what: "register memory of another device (dmabuf)", source },
            }
        })?;
        Ok(DmabufRegion { region })
    }
}

/// Memory of another device, registered until this is dropped. Nothing uses it yet: blocks come to GPUs over host
/// memory.
pub struct DmabufRegion {
    region: Mr,
}

impl DmabufRegion {
    /// The device's key for it.
    pub fn local_key(&self) -> u32 {
        self.region.local_key()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.registering = None;
        self.inbox.send(Command::Stop);
        let here = std::thread::current().id();
        let threads = self.engine.take().into_iter().chain(self.others.drain(..));
        let threads: Vec<_> = threads.collect();
        if threads.iter().any(|thread| thread.thread().id() == here) {
            // The last user was a wake-up, which one of them makes: they end by themselves.
            self.checks.close();
            return;
        }
        for (number, thread) in threads.into_iter().enumerate() {
            if thread.join().is_err() {
                tracing::error!("a thread of an RDMA device panicked");
            }
            if number == 0 {
                // The device thread has ended, or never began: nothing more is to be checked.
                self.checks.close();
            }
        }
    }
}
