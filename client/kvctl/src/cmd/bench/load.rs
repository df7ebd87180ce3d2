//! The load: an engine worker's own session, several threads, so many blocks or so much time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use kv_block::{FaultKind, Scope, SequenceHash, Slice, payload};
use kv_client::{Binding, Client, Doors, Error, Got, Priority, PutOptions, Worker, WorkerOptions};

use crate::exit::{Exit, Failure};
use crate::{out, progress};

/// Wait after a rejection without a hint.
const BUSY_WAIT: Duration = Duration::from_millis(5);

#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) blocks: u32,
    pub(super) block_bytes: u32,
    pub(super) threads: u32,
    pub(super) batch: u32,
    pub(super) time: Duration,
    pub(super) grpc: bool,
    pub(super) keep: bool,
}

/// What one kind of operation came to.
#[derive(Clone, Default)]
pub(super) struct Tally {
    pub(super) name: &'static str,
    /// One per operation done, ascending.
    pub(super) latencies_ns: Vec<u64>,
    pub(super) bytes: u64,
    /// Time spent in operations by the busiest thread; making and checking bytes is not in it.
    pub(super) spent: Duration,
    /// Operations that found something not there.
    pub(super) misses: u64,
    /// Blocks that came back with other bytes.
    pub(super) wrong: u64,
    /// Rejections that were tried again.
    pub(super) busy: u64,
}

impl Tally {
    pub(super) fn sorted(mut self) -> Self {
        self.latencies_ns.sort_unstable();
        self
    }

    pub(super) fn count(&self) -> u64 {
        self.latencies_ns.len() as u64
    }

    /// The latency that this share of operations stayed within, in nanoseconds; 0 of nothing.
    pub(super) fn quantile(&self, share: f64) -> u64 {
        super::quantile(&self.latencies_ns, share)
    }

    pub(super) fn per_second(&self, number: u64) -> u64 {
        (number as f64 / self.spent.as_secs_f64().max(1e-9)) as u64
    }

    fn add(&mut self, done: Done, took: Duration) {
        self.latencies_ns.push(took.as_nanos() as u64);
        self.spent += took;
        self.bytes += done.bytes;
        self.misses += u64::from(done.missed);
    }

    fn merge(&mut self, other: Self) {
        self.latencies_ns.extend(other.latencies_ns);
        self.spent = self.spent.max(other.spent);
        self.bytes += other.bytes;
        self.misses += other.misses;
        self.wrong += other.wrong;
        self.busy += other.busy;
    }
}

/// What one operation came to.
#[derive(Clone, Copy, Default)]
struct Done {
    bytes: u64,
    missed: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    /// Stores a block.
    Put,
    /// Asks for the prefix of a batch.
    Lookup,
    /// Opens a block for reading where it lies, and lets go of it.
    Acquire,
    /// Opens a block, copies it out, lets go of it.
    Get,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Lookup => "lookup",
            Self::Acquire => "acquire",
            Self::Get => "get",
        }
    }
}

/// The session, and what its blocks are called.
struct Target {
    plan: Plan,
    worker: Worker,
    binding: Binding,
    /// Keeps the blocks of two runs apart.
    run: u64,
}

impl Target {
    fn hash(&self, index: u32) -> SequenceHash {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.run.to_le_bytes());
        bytes[8..12].copy_from_slice(&index.to_le_bytes());
        SequenceHash::new(&bytes).expect("16 bytes")
    }

    fn hashes(&self, indices: std::ops::Range<u32>) -> Vec<SequenceHash> {
        indices.map(|index| self.hash(index)).collect()
    }

    /// The blocks of one lookup.
    fn batch(&self, index: u32) -> Vec<SequenceHash> {
        let first = index * self.plan.batch;
        self.hashes(first..(first + self.plan.batch).min(self.plan.blocks))
    }
}

/// Puts, looks up, reads, cleans up. Gives the door that was used.
pub(super) async fn run(client: &Client, plan: Plan) -> Result<(&'static str, Vec<Tally>), Failure> {
    let options = WorkerOptions { name: "kvctl bench".into(), grpc_only: plan.grpc, ..Default::default() };
    let worker = client.worker(options).await?;
    let door = match worker.doors() {
        Doors::SharedMemory { .. } => "shm",
        Doors::GrpcOnly { why } => {
            if !plan.grpc {
                out::note(&format!("over gRPC, without shared memory: {why}"));
            }
            "grpc"
        }
    };
    let scope = Scope { model: "kvctl-bench".into(), tenant: "kvctl-bench".into(), ..Scope::default() };
    let binding = worker.register(scope, Slice::whole(1, 1), plan.block_bytes).await?;
    let run = out::now() << 32 | u64::from(std::process::id());
    let target = Arc::new(Target { plan, worker, binding, run });
    let load = {
        let target = target.clone();
        // What a worker does with blocks are plain functions: they get threads of their own.
        tokio::task::spawn_blocking(move || phases(&target, door))
    };
    let tallies = load.await.map_err(|error| Failure::new(Exit::Failure, format!("the load: {error}")))?;
    if !plan.keep {
        let all = target.hashes(0..plan.blocks);
        target.worker.evict(&target.binding, &all, None).await?;
    }
    Ok((door, tallies?))
}

fn phases(target: &Target, door: &str) -> Result<Vec<Tally>, Failure> {
    let phases = [Phase::Put, Phase::Lookup, Phase::Acquire, Phase::Get];
    // Over gRPC every read is a copy: acquiring and getting are the same there.
    let phases = phases.into_iter().filter(|phase| *phase != Phase::Acquire || door == "shm");
    phases.map(|phase| run_phase(target, phase)).collect()
}

fn run_phase(target: &Target, phase: Phase) -> Result<Tally, Failure> {
    let plan = target.plan;
    let count = match phase {
        Phase::Lookup => plan.blocks.div_ceil(plan.batch),
        _ => plan.blocks,
    };
    let bar = progress::bar(phase.name(), "done", count.into());
    let next = AtomicU32::new(0);
    let lane = Lane { target, phase, next: &next, count, end: Instant::now() + plan.time, bar: &bar };
    let mut tally = Tally { name: phase.name(), ..Default::default() };
    let lanes: Vec<Result<Tally, Failure>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..plan.threads.min(count)).map(|_| scope.spawn(|| lane.run())).collect();
        let died = || Err(Failure::new(Exit::Failure, "a thread of the load died"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| died())).collect()
    });
    for lane in lanes {
        tally.merge(lane?);
    }
    bar.finish_and_clear();
    Ok(tally.sorted())
}

/// What each thread does: one operation after the other.
struct Lane<'a> {
    target: &'a Target,
    phase: Phase,
    next: &'a AtomicU32,
    count: u32,
    end: Instant,
    bar: &'a ProgressBar,
}

impl Lane<'_> {
    fn run(&self) -> Result<Tally, Failure> {
        let mut tally = Tally::default();
        let mut buffer = vec![0; self.target.plan.block_bytes as usize];
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count || Instant::now() >= self.end {
                return Ok(tally);
            }
            let hash = self.target.hash(index);
            let batch = if self.phase == Phase::Lookup { self.target.batch(index) } else { Vec::new() };
            let key = self.target.binding.key(&hash);
            if self.phase == Phase::Put {
                payload::fill(&key, &mut buffer);
            }
            // Made before the clock starts, checked after it stops.
            let done = loop {
                let started = Instant::now();
                match self.once(&hash, &batch, &mut buffer) {
                    Ok(done) => {
                        tally.add(done, started.elapsed());
                        break done;
                    }
                    Err(error) => {
                        std::thread::sleep(self.wait_after(&error).ok_or(error)?);
                        tally.busy += 1;
                    }
                }
            };
            if self.phase == Phase::Get && !done.missed {
                tally.wrong += u64::from(payload::first_wrong_byte(&key, &buffer).is_some());
            }
            self.bar.inc(1);
        }
    }

    fn once(&self, hash: &SequenceHash, batch: &[SequenceHash], buffer: &mut [u8]) -> Result<Done, Error> {
        let Target { worker, binding, .. } = self.target;
        match self.phase {
            Phase::Put => {
                let options = PutOptions { priority: Priority::Low, ..PutOptions::default() };
                worker.put_with(binding, hash, buffer, &options)?;
                Ok(Done { bytes: buffer.len() as u64, missed: false })
            }
            Phase::Lookup => {
                let missed = worker.lookup(binding, batch)?.first_miss.is_some();
                Ok(Done { bytes: 0, missed })
            }
            Phase::Acquire | Phase::Get => {
                let Got::Block(block) = worker.acquire_wait(binding, hash, worker.deadline())? else {
                    return Ok(Done { bytes: 0, missed: true });
                };
                if self.phase == Phase::Acquire {
                    return Ok(Done::default());
                }
                buffer.copy_from_slice(&block);
                Ok(Done { bytes: block.len() as u64, missed: false })
            }
        }
    }

    /// How long to wait after a typed rejection; `None` when it is not one or the time is over.
    fn wait_after(&self, error: &Error) -> Option<Duration> {
        let wait = error.retry_after().unwrap_or(BUSY_WAIT).min(Duration::from_secs(1));
        (error.kind() == FaultKind::Busy && Instant::now() + wait < self.end).then_some(wait)
    }
}
