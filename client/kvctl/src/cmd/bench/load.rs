//! The load: so many requests at a time over gRPC, until the blocks or the time are used up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use kv_api::v1;
use kv_api::v1::blocks_client::BlocksClient;
use kv_block::{BlockKey, FaultKind, Scope, SequenceHash, Slice, payload};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::cli::Global;
use crate::connect::{self, Daemon};
use crate::exit::{Exit, Failure};
use crate::{out, progress};

/// Bytes of one message of a put.
const CHUNK: usize = 1 << 20;
/// Wait after a rejection without a hint.
const BUSY_WAIT: Duration = Duration::from_millis(5);

#[derive(Clone, Copy)]
pub(super) struct Plan {
    pub(super) blocks: u32,
    pub(super) block_bytes: u32,
    pub(super) depth: u32,
    pub(super) batch: u32,
    pub(super) time: Duration,
    pub(super) keep: bool,
}

/// What one kind of operation came to.
#[derive(Clone, Default)]
pub(super) struct Tally {
    pub(super) name: &'static str,
    /// One per operation done, ascending.
    pub(super) latencies_ns: Vec<u64>,
    pub(super) bytes: u64,
    pub(super) wall: Duration,
    /// Blocks that were not there.
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
        let rank = (self.latencies_ns.len() as f64 * share).ceil() as usize;
        self.latencies_ns.get(rank.saturating_sub(1)).copied().unwrap_or(0)
    }

    pub(super) fn per_second(&self, number: u64) -> u64 {
        (number as f64 / self.wall.as_secs_f64().max(1e-9)) as u64
    }

    fn add(&mut self, done: Done, took: Duration) {
        self.latencies_ns.push(took.as_nanos() as u64);
        self.bytes += done.bytes;
        self.misses += u64::from(done.misses);
        self.wrong += u64::from(done.wrong);
    }

    fn merge(&mut self, other: Self) {
        self.latencies_ns.extend(other.latencies_ns);
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
    misses: u32,
    wrong: bool,
}

#[derive(Clone, Copy)]
enum Phase {
    Put,
    Lookup,
    Get,
}

/// What every request needs.
struct Target {
    plan: Plan,
    scope: Scope,
    slice: Slice,
    /// Keeps the blocks of two runs apart.
    run: u64,
    session: u64,
    binding: u32,
}

impl Target {
    fn hash(&self, index: u32) -> SequenceHash {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.run.to_le_bytes());
        bytes[8..12].copy_from_slice(&index.to_le_bytes());
        SequenceHash::new(&bytes).expect("16 bytes")
    }

    fn key(&self, index: u32) -> BlockKey {
        self.scope.id().block_key(&self.hash(index), &self.slice)
    }

    fn names(&self, indices: std::ops::Range<u32>) -> v1::Names {
        let hashes = indices.map(|index| self.hash(index).as_bytes().to_vec().into());
        v1::Names { binding: self.binding, sequence_hashes: hashes.collect(), keys: Vec::new() }
    }
}

/// Puts, looks up, gets, cleans up.
pub(super) async fn run(global: &Global, plan: Plan) -> Result<Vec<Tally>, Failure> {
    let mut daemon = connect::connect(global).await?;
    let open = v1::OpenRequest { name: "kvctl bench".into() };
    // The session lives as long as this stream.
    let mut notices = daemon.worker.open(open).await?.into_inner();
    let first = notices.message().await?;
    let session =
        first.ok_or_else(|| Failure::new(Exit::Failure, "the daemon ended the session at once"))?.session;
    let scope = Scope { model: "kvctl-bench".into(), tenant: "kvctl-bench".into(), ..Scope::default() };
    let slice = Slice::whole(1, 1);
    let request = v1::RegisterRequest {
        session,
        scope: Some(kv_api::convert::scope_message(&scope)),
        slice: Some(kv_api::convert::slice_message(&slice)),
        block_bytes: plan.block_bytes,
    };
    let binding = daemon.worker.register(request).await?.into_inner().binding;
    let run = out::now() << 32 | u64::from(std::process::id());
    let target = Arc::new(Target { plan, scope, slice, run, session, binding });
    let results = phases(&daemon, &target).await;
    if !plan.keep {
        clean_up(&mut daemon, &target).await?;
    }
    drop(notices);
    results
}

async fn phases(daemon: &Daemon, target: &Arc<Target>) -> Result<Vec<Tally>, Failure> {
    let mut results = Vec::new();
    for phase in [Phase::Put, Phase::Lookup, Phase::Get] {
        results.push(run_phase(daemon, target, phase).await?);
    }
    Ok(results)
}

async fn run_phase(daemon: &Daemon, target: &Arc<Target>, phase: Phase) -> Result<Tally, Failure> {
    let plan = target.plan;
    let (name, count) = match phase {
        Phase::Put => ("put", plan.blocks),
        Phase::Lookup => ("lookup", plan.blocks.div_ceil(plan.batch)),
        Phase::Get => ("get", plan.blocks),
    };
    let bar = progress::bar(name, "done", count.into());
    let next = Arc::new(AtomicU32::new(0));
    let started = Instant::now();
    let mut lanes = JoinSet::new();
    for _ in 0..plan.depth.min(count) {
        let lane = Lane {
            blocks: daemon.blocks.clone(),
            target: target.clone(),
            phase,
            next: next.clone(),
            count,
            end: started + plan.time,
            bar: bar.clone(),
        };
        lanes.spawn(lane.run());
    }
    let mut result = Tally { name, ..Default::default() };
    while let Some(lane) = lanes.join_next().await {
        result.merge(lane.map_err(|error| Failure::new(Exit::Failure, format!("{name}: {error}")))??);
    }
    result.wall = started.elapsed();
    bar.finish_and_clear();
    Ok(result.sorted())
}

/// One request at a time; several lanes make the depth.
struct Lane {
    blocks: BlocksClient<Channel>,
    target: Arc<Target>,
    phase: Phase,
    next: Arc<AtomicU32>,
    count: u32,
    end: Instant,
    bar: ProgressBar,
}

impl Lane {
    async fn run(mut self) -> Result<Tally, Failure> {
        let mut result = Tally::default();
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count || Instant::now() >= self.end {
                return Ok(result);
            }
            // The bytes are made before the clock starts.
            let payload = if let Phase::Put = self.phase { self.payload(index) } else { Vec::new() };
            loop {
                let started = Instant::now();
                let done = match self.phase {
                    Phase::Put => self.put(index, &payload).await,
                    Phase::Lookup => self.lookup(index).await,
                    Phase::Get => self.get(index).await,
                };
                match done {
                    Ok(done) => {
                        result.add(done, started.elapsed());
                        break;
                    }
                    Err(status) => {
                        let wait = busy(&status, self.end).ok_or(status)?;
                        result.busy += 1;
                        tokio::time::sleep(wait).await;
                    }
                }
            }
            self.bar.inc(1);
        }
    }

    fn payload(&self, index: u32) -> Vec<u8> {
        let mut bytes = vec![0; self.target.plan.block_bytes as usize];
        payload::fill(&self.target.key(index), &mut bytes);
        bytes
    }

    async fn put(&mut self, index: u32, payload: &[u8]) -> Result<Done, tonic::Status> {
        let header = v1::PutHeader {
            session: self.target.session,
            binding: self.target.binding,
            sequence_hash: self.target.hash(index).as_bytes().to_vec().into(),
            priority: v1::Priority::Low.into(),
            ttl_s: 0,
            durable: false,
        };
        let mut header = Some(header);
        let messages: Vec<v1::PutRequest> = payload
            .chunks(CHUNK)
            .map(|chunk| v1::PutRequest { header: header.take(), chunk: chunk.to_vec().into() })
            .collect();
        self.blocks.put(tokio_stream::iter(messages)).await?;
        Ok(Done { bytes: payload.len() as u64, ..Default::default() })
    }

    async fn lookup(&mut self, index: u32) -> Result<Done, tonic::Status> {
        let first = index * self.target.plan.batch;
        let last = (first + self.target.plan.batch).min(self.target.plan.blocks);
        let names = self.target.names(first..last);
        let request = v1::LookupRequest { names: Some(names), all: true, session: self.target.session };
        let found = self.blocks.lookup(request).await?.into_inner().found;
        let missed = |found: &&v1::Found| matches!(found.what, Some(v1::found::What::Miss(_)));
        Ok(Done { misses: found.iter().filter(missed).count() as u32, ..Default::default() })
    }

    async fn get(&mut self, index: u32) -> Result<Done, tonic::Status> {
        let names = Some(self.target.names(index..index + 1));
        let request = v1::GetRequest { session: self.target.session, names, wait_ms: 1_000 };
        let mut stream = self.blocks.get(request).await?.into_inner();
        let mut bytes = Vec::with_capacity(self.target.plan.block_bytes as usize);
        while let Some(message) = stream.message().await? {
            match message.what {
                Some(v1::get_response::What::Chunk(chunk)) => bytes.extend_from_slice(&chunk),
                Some(v1::get_response::What::Miss(_)) => return Ok(Done { misses: 1, ..Default::default() }),
                Some(v1::get_response::What::Header(_)) | None => {}
            }
        }
        let whole = bytes.len() == self.target.plan.block_bytes as usize;
        let wrong = !whole || payload::first_wrong_byte(&self.target.key(index), &bytes).is_some();
        Ok(Done { bytes: bytes.len() as u64, misses: 0, wrong })
    }
}

/// How long to wait after a typed rejection; `None` when it is not one or the time is over.
fn busy(status: &tonic::Status, end: Instant) -> Option<Duration> {
    let fault = kv_api::fault::from_status(status);
    let wait = fault.retry_after.unwrap_or(BUSY_WAIT).min(Duration::from_secs(1));
    (fault.kind == FaultKind::Busy && Instant::now() + wait < end).then_some(wait)
}

async fn clean_up(daemon: &mut Daemon, target: &Target) -> Result<(), Failure> {
    let plan = target.plan;
    for first in (0..plan.blocks).step_by(1_000) {
        let names = target.names(first..(first + 1_000).min(plan.blocks));
        let request = v1::EvictRequest { names: Some(names), tier: 0, dry_run: false };
        daemon.blocks.evict(request).await?;
    }
    Ok(())
}
