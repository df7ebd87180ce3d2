//! The io_uring engine: one ring, owned by one thread.
//!
//! What the kernel gives is probed at start and the rest done without: SINGLE_ISSUER with DEFER_TASKRUN
//! (completions are worked through when we ask, not by interrupting us), registered buffers (no page
//! pinning per operation) and registered files (no reference counting per operation). Each thing that is
//! missing becomes a note that names the switch which brings it back.
//!
//! A read of an eventfd is always in flight in the same ring, so one wait covers completions and calls
//! from other threads.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use rustix::event::{EventfdFlags, eventfd};

use crate::files::SegmentFile;
use crate::io::{BlockIo, IoDone, IoKind, IoOp, Memory, PROBE_FILE, Prepared, Waker, errno};

/// Memory is registered in pieces of this length: pinning one takes some 20 ms, during which nothing else is
/// done, and the kernel takes no more than 1 GiB at once. A multiple of the arena's usual regions; a block
/// that lies across two pieces goes unregistered.
const PIECE_BYTES: usize = 64 << 20;
/// Says whether an address range has pages. Registering takes hold of them, and where there are none it would
/// have to bring them, from a file system that may be full.
pub(crate) type HasPages = Box<dyn Fn(usize, usize) -> bool + Send>;

/// Completion token of the armed eventfd read; no operation has it.
const WAKE: u64 = u64::MAX;

/// An open file and its place in the registered table, if it has one.
struct Attached {
    file: Arc<File>,
    fixed: Option<u32>,
}

pub(crate) struct Ring {
    ring: IoUring,
    event: Arc<OwnedFd>,
    // The kernel writes here at any time, so it is reached through this pointer alone.
    event_word: NonNull<u64>,
    armed: bool,
    files: BTreeMap<u32, Attached>,
    file_slots: u32,
    /// Address ranges registered as buffers, ascending: start, end, number.
    buffers: Vec<(usize, usize, u16)>,
    /// Ranges still to be registered, last first, each with its number.
    pieces: Vec<(usize, usize, u16)>,
    has_pages: HasPages,
    backlog: VecDeque<IoOp>,
    in_flight: usize,
    depth: usize,
    started: Instant,
}

// SAFETY: the word behind `event_word` is this ring's alone; everything else is Send by itself. Another
// thread may own the ring, though the kernel will serve only the one that made it.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring for `depth` operations at once on files numbered below `file_slots`, with `memory`
    /// (addresses and lengths) registered where the kernel allows it, piece by piece as `has_pages` says so.
    /// Must be used by the calling thread alone. What could not be had is told in `notes`.
    pub(crate) fn new(
        depth: u32,
        file_slots: u32,
        memory: &[(usize, usize)],
        has_pages: HasPages,
        notes: &mut Vec<String>,
    ) -> io::Result<Self> {
        let depth = depth.clamp(8, 4096).next_power_of_two();
        let ring = build(depth, notes)?;
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let mut made = Self {
            ring,
            event,
            event_word: NonNull::from(Box::leak(Box::new(0))),
            armed: false,
            files: BTreeMap::new(),
            file_slots: 0,
            buffers: Vec::new(),
            pieces: Vec::new(),
            has_pages,
            backlog: VecDeque::new(),
            in_flight: 0,
            depth: depth as usize,
            started: Instant::now(),
        };
        match made.ring.submitter().register_files_sparse(file_slots) {
            Ok(()) => made.file_slots = file_slots,
            Err(error) => notes.push(format!(
                "{file_slots} files could not be registered with io_uring ({error}), which costs CPU time; \
                 raise `ulimit -n` (LimitNOFILE)"
            )),
        }
        made.plan(memory, notes);
        Ok(made)
    }

    /// Cuts `memory` into pieces to be registered one by one.
    fn plan(&mut self, memory: &[(usize, usize)], notes: &mut Vec<String>) {
        let mut pieces = Vec::new();
        for (address, bytes) in memory {
            for start in (*address..address + bytes).step_by(PIECE_BYTES) {
                pieces.push((start, (start + PIECE_BYTES).min(address + bytes)));
            }
        }
        pieces.sort_unstable();
        // The most that the kernel's table takes.
        pieces.truncate(16 << 10);
        if pieces.is_empty() {
            return;
        }
        match self.ring.submitter().register_buffers_sparse(pieces.len() as u32) {
            Ok(()) => {
                self.pieces = pieces.into_iter().zip(0..).map(|((start, end), n)| (start, end, n)).collect();
                self.pieces.reverse();
            }
            Err(error) => notes.push(format!(
                "host memory is not registered with io_uring ({error}), which costs CPU time; Linux 5.19 brings \
                 registration piece by piece"
            )),
        }
    }

    fn register(&self, start: usize, end: usize, number: u16) -> io::Result<()> {
        let piece = libc::iovec { iov_base: start as *mut _, iov_len: end - start };
        // SAFETY: the kernel pins the pages itself, so nothing dangles when the mapping goes; and as long as
        // this engine lives, whoever made it keeps the mapping (`SsdConfig::arenas`), so that an address
        // never means other pages than those registered.
        unsafe { self.ring.submitter().register_buffers_update(u32::from(number), &[piece], None) }
    }

    fn buffer_of(&self, address: usize, bytes: u32) -> Option<u16> {
        let at = self.buffers.partition_point(|(start, _, _)| *start <= address).checked_sub(1)?;
        let (_, end, number) = self.buffers[at];
        (address + bytes as usize <= end).then_some(number)
    }

    fn entry(&self, op: &IoOp) -> squeue::Entry {
        let attached = &self.files[&op.segment];
        let (fd, flags) = match attached.fixed {
            Some(slot) => (Fd(slot as i32), squeue::Flags::FIXED_FILE),
            None => (Fd(attached.file.as_raw_fd()), squeue::Flags::empty()),
        };
        let entry = match op.kind {
            IoKind::Read { offset, memory: Memory { address, bytes } } => {
                match self.buffer_of(address as usize, bytes) {
                    Some(number) => opcode::ReadFixed::new(fd, address, bytes, number).offset(offset).build(),
                    None => opcode::Read::new(fd, address, bytes).offset(offset).build(),
                }
            }
            IoKind::Write { offset, memory: Memory { address, bytes } } => {
                match self.buffer_of(address as usize, bytes) {
                    Some(number) => {
                        opcode::WriteFixed::new(fd, address, bytes, number).offset(offset).build()
                    }
                    None => opcode::Write::new(fd, address, bytes).offset(offset).build(),
                }
            }
            IoKind::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        };
        entry.flags(flags).user_data(op.token)
    }

    /// Puts as much of the backlog into the submission queue as kernel and ring take.
    fn fill(&mut self) {
        if !self.armed {
            let fd = Fd(self.event.as_raw_fd());
            let entry = opcode::Read::new(fd, self.event_word.as_ptr().cast(), 8).build().user_data(WAKE);
            // SAFETY: the word lives until `drop` has seen the read complete, or for ever.
            self.armed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        }
        while self.in_flight < self.depth
            && let Some(op) = self.backlog.front()
        {
            let entry = self.entry(op);
            // SAFETY: the memory it names is valid until its completion (contract of `submit`), and the
            // file stays open because `detach` is only called when nothing of it is in flight.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
            self.in_flight += 1;
        }
    }

    /// Enters the kernel: hands over what is queued and waits for a completion if `wait` is not zero.
    fn enter(&mut self, wait: Duration) {
        let submitter = self.ring.submitter();
        let entered = if wait.is_zero() {
            submitter.submit()
        } else if wait == Duration::MAX {
            submitter.submit_and_wait(1)
        } else {
            let limit = Timespec::from(wait);
            submitter.submit_with_args(1, &SubmitArgs::new().timespec(&limit))
        };
        match entered.map_err(|error| errno(&error)) {
            Ok(_) | Err(libc::ETIME | libc::EINTR) => {}
            // The completion queue is full or the kernel short of memory: completions are taken next, and
            // then it is tried again.
            Err(libc::EBUSY | libc::EAGAIN | libc::ENOMEM) => std::thread::yield_now(),
            Err(other) => panic!("io_uring_enter refuses a ring that it gave us: error {other}"),
        }
    }

    fn reap(&mut self, done: &mut Vec<IoDone>) {
        for entry in self.ring.completion() {
            if entry.user_data() == WAKE {
                self.armed = false;
                continue;
            }
            self.in_flight -= 1;
            let result = u32::try_from(entry.result()).map_err(|_| -entry.result());
            done.push(IoDone { token: entry.user_data(), result });
        }
    }
}

/// The best ring that the kernel makes.
fn build(depth: u32, notes: &mut Vec<String>) -> io::Result<IoUring> {
    type Flags = fn(&mut io_uring::Builder);
    let attempts: [(Flags, &str); 3] = [
        (
            |builder| {
                builder.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun().setup_taskrun_flag();
            },
            "",
        ),
        (
            |builder| {
                builder.setup_coop_taskrun().setup_taskrun_flag();
            },
            "io_uring without DEFER_TASKRUN costs CPU time; Linux 6.1 brings it",
        ),
        (|_| {}, "io_uring without COOP_TASKRUN costs CPU time; Linux 5.19 brings it"),
    ];
    let mut last = io::Error::from_raw_os_error(libc::ENOSYS);
    for (flags, note) in attempts {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_cqsize(depth * 2);
        flags(&mut builder);
        match builder.build(depth) {
            Ok(ring) if ring.params().is_feature_nodrop() && ring.params().is_feature_ext_arg() => {
                if !note.is_empty() {
                    notes.push(note.to_owned());
                }
                return Ok(ring);
            }
            // Too old to wait with a limit.
            Ok(_) => return Err(io::Error::from_raw_os_error(libc::ENOSYS)),
            Err(error) => last = error,
        }
        if last.raw_os_error() != Some(libc::EINVAL) {
            break;
        }
    }
    Err(last)
}

impl BlockIo for Ring {
    fn attach(&mut self, segment: u32, file: SegmentFile) {
        let SegmentFile::Os(file) = file else { panic!("io_uring has files of the operating system") };
        let slot = if segment == PROBE_FILE { 0 } else { segment.saturating_add(1) };
        let registered = slot < self.file_slots
            && self.ring.submitter().register_files_update(slot, &[file.as_raw_fd()]).is_ok();
        self.files.insert(segment, Attached { file, fixed: registered.then_some(slot) });
    }

    fn detach(&mut self, segment: u32) {
        if let Some(Attached { fixed: Some(slot), .. }) = self.files.remove(&segment) {
            // A slot that stays taken is overwritten by the next attach and costs nothing until then.
            let _ = self.ring.submitter().register_files_update(slot, &[-1]);
        }
    }

    unsafe fn submit(&mut self, ops: &mut Vec<IoOp>) {
        self.backlog.extend(ops.drain(..));
    }

    fn completions(&mut self, wait: Duration, done: &mut Vec<IoDone>) {
        let before = done.len();
        self.fill();
        // Something may have completed already; then hand over what is new without waiting.
        let ready = !self.ring.completion().is_empty();
        self.enter(if ready { Duration::ZERO } else { wait });
        self.reap(done);
        if done.len() > before && !self.backlog.is_empty() {
            self.fill();
            self.enter(Duration::ZERO);
            self.reap(done);
        }
    }

    fn prepare(&mut self, notes: &mut Vec<String>) -> Prepared {
        // In ascending order, as pages come, and as `buffers` must be.
        let Some((start, end, number)) = self.pieces.pop() else { return Prepared::All };
        if !(self.has_pages)(start, end - start) {
            self.pieces.push((start, end, number));
            return Prepared::Later;
        }
        match self.register(start, end, number) {
            Ok(()) => self.buffers.push((start, end, number)),
            Err(error) => {
                let unregistered = self.pieces.iter().map(|(start, end, _)| end - start).sum::<usize>();
                notes.push(format!(
                    "{} MiB of host memory could not be registered with io_uring ({error}), which costs CPU time; \
                     raise `ulimit -l` (LimitMEMLOCK=infinity) or give CAP_IPC_LOCK",
                    (unregistered + end - start) >> 20
                ));
                self.pieces.clear();
            }
        }
        if self.pieces.is_empty() { Prepared::All } else { Prepared::More }
    }

    fn waker(&self) -> Waker {
        let event = Arc::clone(&self.event);
        Arc::new(move || {
            // Only a counter at its end makes this fail, and then the wake-up is already due.
            let _ = rustix::io::write(&*event, &1u64.to_ne_bytes());
        })
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // End the armed read, so that the kernel is done with its word. The store has drained the blocks
        // before, unless it panics; then their memory has to wait here for the device.
        (self.waker())();
        let mut done = Vec::new();
        while self.armed || self.in_flight > 0 {
            self.enter(Duration::from_millis(100));
            self.reap(&mut done);
        }
        // SAFETY: leaked from a box in `new`; the kernel's only use of it has completed.
        drop(unsafe { Box::from_raw(self.event_word.as_ptr()) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::{Directory, OsDirectory};
    use crate::io::Pages;
    use crate::segment::PAGE_BYTES;

    /// The ring, unless this machine has none.
    fn ring(memory: &[(usize, usize)]) -> Option<Ring> {
        let mut notes = Vec::new();
        let made = Ring::new(32, 8, memory, Box::new(|_, _| true), &mut notes).map(|mut ring| {
            while ring.prepare(&mut notes) == Prepared::More {}
            ring
        });
        eprintln!("{notes:?}");
        made.inspect_err(|error| eprintln!("skipped: no io_uring: {error}")).ok()
    }

    fn run(ring: &mut Ring, ops: &mut Vec<IoOp>) -> Vec<IoDone> {
        let wanted = ops.len();
        let mut done = Vec::new();
        // SAFETY: every test keeps its pages until here and touches them only afterwards.
        unsafe { ring.submit(ops) };
        while done.len() < wanted {
            ring.completions(Duration::MAX, &mut done);
        }
        done
    }

    #[test]
    fn pages_go_there_and_back_registered_or_not() {
        let mut ours = Pages::new(64 * PAGE_BYTES);
        let start = ours.memory(0).address as usize;
        for registered in [vec![], vec![(start, ours.len())]] {
            let Some(mut ring) = ring(&registered) else { return };
            let dir = tempfile::tempdir().unwrap();
            let directory = OsDirectory::open(dir.path()).unwrap();
            for segment in [3, 900] {
                let file = directory.create("segment-00000003.kv", "scratch", 1 << 20, &[1]).unwrap();
                ring.attach(segment, file);
                let mut ops = Vec::new();
                for page in 0..64u32 {
                    let at = page as usize * PAGE_BYTES;
                    ours[at..at + PAGE_BYTES].fill(page as u8);
                    let memory = Memory { bytes: PAGE_BYTES as u32, ..ours.memory(0) };
                    let memory = Memory { address: memory.address.wrapping_add(at), ..memory };
                    let kind = IoKind::Write { offset: at as u64, memory };
                    ops.push(IoOp { token: u64::from(page), segment, kind });
                }
                let done = run(&mut ring, &mut ops);
                assert!(done.iter().all(|one| one.result == Ok(PAGE_BYTES as u32)), "{done:?}");
                ops.push(IoOp { token: 7, segment, kind: IoKind::Sync });
                assert_eq!(run(&mut ring, &mut ops)[0].result, Ok(0));
                ours.fill(0);
                let memory = ours.memory(64 * PAGE_BYTES);
                ops.push(IoOp { token: 8, segment, kind: IoKind::Read { offset: 0, memory } });
                assert_eq!(run(&mut ring, &mut ops)[0].result, Ok(64 * PAGE_BYTES as u32));
                assert!(ours.chunks(PAGE_BYTES).zip(0u8..).all(|(page, n)| page.iter().all(|b| *b == n)));
                ring.detach(segment);
            }
        }
    }

    #[test]
    fn memory_is_registered_when_it_has_pages_and_not_before() {
        let mut ours = Pages::new(PIECE_BYTES + PAGE_BYTES);
        let (start, bytes) = (ours.memory(0).address as usize, ours.len());
        let there = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let end = Arc::clone(&there);
        let has_pages =
            move |at: usize, len| at + len <= start + end.load(std::sync::atomic::Ordering::Relaxed);
        let mut notes = Vec::new();
        let Ok(mut ring) = Ring::new(32, 8, &[(start, bytes)], Box::new(has_pages), &mut notes) else {
            eprintln!("skipped: no io_uring");
            return;
        };
        if ring.pieces.is_empty() {
            eprintln!("skipped: {notes:?}");
            return;
        }
        assert_eq!(ring.prepare(&mut notes), Prepared::Later);
        assert_eq!((ring.buffers.len(), ring.pieces.len()), (0, 2));
        there.store(PIECE_BYTES, std::sync::atomic::Ordering::Relaxed);
        let first = ring.prepare(&mut notes);
        if ring.pieces.is_empty() {
            eprintln!("skipped: {notes:?}");
            return;
        }
        assert_eq!((first, ring.prepare(&mut notes)), (Prepared::More, Prepared::Later));
        assert!(ring.buffer_of(start, 4096).is_some() && ring.buffer_of(start + PIECE_BYTES, 4096).is_none());
        there.store(bytes, std::sync::atomic::Ordering::Relaxed);
        assert_eq!((ring.prepare(&mut notes), ring.prepare(&mut notes)), (Prepared::All, Prepared::All));
        assert!(ring.buffer_of(start + PIECE_BYTES, 4096).is_some());
    }

    #[test]
    fn a_waker_ends_the_wait_each_time() {
        let Some(mut ring) = ring(&[]) else { return };
        for _ in 0..3 {
            let waker = ring.waker();
            let thread = std::thread::spawn(move || waker());
            ring.completions(Duration::MAX, &mut Vec::new());
            thread.join().unwrap();
        }
    }
}
