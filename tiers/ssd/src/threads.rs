//! The engine for machines without io_uring: a few threads that pread, pwrite and fdatasync.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::files::SegmentFile;
use crate::io::{BlockIo, IoDone, IoKind, IoOp, Memory, Waker};

#[derive(Default)]
struct Queues {
    work: VecDeque<(IoOp, Arc<File>)>,
    done: Vec<IoDone>,
    woken: bool,
    closing: bool,
}

#[derive(Default)]
struct Shared {
    queues: Mutex<Queues>,
    work_came: Condvar,
    done_came: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().expect("no thread panics with the queues in hand")
    }
}

pub(crate) struct Threads {
    shared: Arc<Shared>,
    files: BTreeMap<u32, Arc<File>>,
    threads: Vec<JoinHandle<()>>,
    started: Instant,
}

impl Threads {
    /// `count` threads, on the CPUs of the calling thread.
    pub(crate) fn new(count: u32) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut threads = Vec::new();
        for _ in 0..count.clamp(1, 64) {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name("kv-ssd-io".to_owned());
            threads.push(builder.spawn(move || work(&shared))?);
        }
        Ok(Self { shared, files: BTreeMap::new(), threads, started: Instant::now() })
    }
}

fn work(shared: &Shared) {
    let mut queues = shared.lock();
    loop {
        if let Some((op, file)) = queues.work.pop_front() {
            drop(queues);
            let result = perform(&op, &file);
            drop(file);
            queues = shared.lock();
            queues.done.push(IoDone { token: op.token, result });
            shared.done_came.notify_one();
        } else if queues.closing {
            return;
        } else {
            queues = shared.work_came.wait(queues).expect("no thread panics with the queues in hand");
        }
    }
}

fn perform(op: &IoOp, file: &File) -> Result<u32, i32> {
    let done = match op.kind {
        IoKind::Sync => rustix::fs::fdatasync(file).map(|()| 0),
        IoKind::Read { offset, memory: Memory { address, bytes } } => {
            // SAFETY: the submitter keeps the memory valid and its own until the completion (contract of
            // `submit`).
            let into = unsafe { std::slice::from_raw_parts_mut(address, bytes as usize) };
            rustix::io::pread(file, into, offset)
        }
        IoKind::Write { offset, memory: Memory { address, bytes } } => {
            // SAFETY: the submitter keeps the memory valid and unwritten until the completion (contract of
            // `submit`).
            let from = unsafe { std::slice::from_raw_parts(address, bytes as usize) };
            rustix::io::pwrite(file, from, offset)
        }
    };
    done.map(|count| count as u32).map_err(rustix::io::Errno::raw_os_error)
}

impl BlockIo for Threads {
    fn attach(&mut self, segment: u32, file: SegmentFile) {
        let SegmentFile::Os(file) = file else { panic!("threads have files of the operating system") };
        self.files.insert(segment, file);
    }

    fn detach(&mut self, segment: u32) {
        self.files.remove(&segment);
    }

    unsafe fn submit(&mut self, ops: &mut Vec<IoOp>) {
        if ops.is_empty() {
            return;
        }
        let mut queues = self.shared.lock();
        queues.work.extend(ops.drain(..).map(|op| (op, Arc::clone(&self.files[&op.segment]))));
        self.shared.work_came.notify_all();
    }

    fn completions(&mut self, wait: Duration, done: &mut Vec<IoDone>) {
        let queues = self.shared.lock();
        let nothing = |queues: &mut Queues| queues.done.is_empty() && !queues.woken;
        let mut queues = if wait == Duration::MAX {
            self.shared
                .done_came
                .wait_while(queues, nothing)
                .expect("no thread panics with the queues in hand")
        } else {
            let waited = self.shared.done_came.wait_timeout_while(queues, wait, nothing);
            waited.expect("no thread panics with the queues in hand").0
        };
        queues.woken = false;
        done.append(&mut queues.done);
    }

    fn waker(&self) -> Waker {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || {
            shared.lock().woken = true;
            shared.done_came.notify_one();
        })
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work_came.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
