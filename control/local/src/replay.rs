//! Plays a trace through worker sessions, as engines would: each request looks up how much of its prefix is
//! here, reads that, and stores what it had to compute.
//!
//! Workers take the next request of the trace, one after the other. Calls that fail because the daemon is
//! away, busy or full are made again; a killed daemon costs time, not requests.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kv_block::payload;
use kv_client::{
    Binding, Error, FaultKind, Got, MissReason, PutOptions, Scope, ScopeKind, SequenceHash, Slice, Tier,
    Worker,
};

use crate::check::wrong_bytes;
use crate::stop::Stop;
use crate::tally::Tally;
use crate::trace::{BLOCK_TOKENS, Request};

/// How long a worker waits for a block to come up from disk, or from the worker that is storing it.
const READ_WAIT: Duration = Duration::from_secs(2);
/// A pause before trying again, when the daemon names none.
const PAUSE: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// What the blocks of the demo mean.
pub fn scope() -> Scope {
    Scope {
        kind: ScopeKind::Kv,
        block_tokens: BLOCK_TOKENS,
        model: "kv-local-demo".into(),
        dtype: "keystream".into(),
        attention: "full".into(),
        layout: "layer,kv,head,token,dim".into(),
        tenant: "demo".into(),
        ..Scope::default()
    }
}

/// The part of the tensor they are: all of it.
pub fn slice() -> Slice {
    Slice::whole(1, 1)
}

/// How long to go on trying.
#[derive(Clone, Debug)]
pub struct Patience {
    /// For one call.
    pub limit: Duration,
    /// Ends all trying.
    pub stop: Stop,
}

/// Whether the same call may succeed later.
fn may_try_again(error: &Error) -> bool {
    matches!(
        error.kind(),
        FaultKind::Busy
            | FaultKind::Full
            | FaultKind::Moved
            | FaultKind::Fenced
            | FaultKind::LeaseExpired
            | FaultKind::Timeout
            | FaultKind::Unavailable
    )
}

impl Patience {
    /// Calls until it succeeds, fails for good, or patience ends; counts the calls made again.
    pub fn insist<T>(
        &self,
        worker: &Worker,
        retries: &mut u64,
        mut call: impl FnMut() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let until = Instant::now() + self.limit;
        loop {
            let error = match call() {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if !may_try_again(&error) || self.stop.is_asked() || Instant::now() >= until {
                return Err(error);
            }
            *retries += 1;
            if worker.is_connected() || worker.wait_until_connected() {
                std::thread::sleep(error.retry_after().unwrap_or(PAUSE).min(PAUSE_MAX));
            }
        }
    }
}

/// What to replay, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The requests, in order.
    pub requests: Vec<Request>,
    /// How much faster than it was recorded; none: as fast as it goes.
    pub speed: Option<f64>,
    /// One block in so many is stored durably.
    pub durable_every: u64,
    /// Store one byte of the first block wrong, to see that it is found.
    pub plant: bool,
}

/// Counts that others may watch meanwhile.
#[derive(Debug, Default)]
pub struct Live {
    /// Requests replayed to their end.
    pub requests: AtomicU64,
    /// Blocks read from host memory.
    pub hits_host: AtomicU64,
    /// Blocks read from disk.
    pub hits_disk: AtomicU64,
    /// Blocks that were not here.
    pub misses: AtomicU64,
    /// Wrong bytes.
    pub wrong_bytes: AtomicU64,
    /// Workers that have ended.
    pub ended: AtomicU64,
}

/// One replay, shared by its workers and whoever directs them.
#[derive(Debug)]
pub struct Replay {
    plan: Plan,
    patience: Patience,
    began: Instant,
    next: AtomicUsize,
    /// Requests from this one on are not begun yet.
    gate: AtomicUsize,
    finished: AtomicBool,
    /// Hashes of blocks acknowledged as durable.
    acked: Mutex<HashSet<u64>>,
    /// To be watched.
    pub live: Live,
}

impl Replay {
    /// A replay that begins now. Requests from `gate` on wait until [`Replay::open`] lets them through.
    pub fn new(plan: Plan, patience: Patience, gate: usize) -> Self {
        Self {
            plan,
            patience,
            began: Instant::now(),
            next: AtomicUsize::new(0),
            gate: AtomicUsize::new(gate),
            finished: AtomicBool::new(false),
            acked: Mutex::default(),
            live: Live::default(),
        }
    }

    /// Moves the gate.
    pub fn open(&self, gate: usize) {
        self.gate.store(gate, Ordering::Release);
    }

    /// Begins no further request.
    pub fn finish(&self) {
        self.finished.store(true, Ordering::Release);
    }

    /// Since it began.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Blocks acknowledged as durable so far, by hash, in order.
    pub fn acked(&self) -> Vec<u64> {
        let acked = self.acked.lock().unwrap_or_else(PoisonError::into_inner);
        let mut hashes: Vec<u64> = acked.iter().copied().collect();
        hashes.sort_unstable();
        hashes
    }

    /// Of the blocks `asked` about, only the `kept` ones stay in the account.
    pub fn settle(&self, asked: &[u64], kept: &[u64]) {
        let mut acked = self.acked.lock().unwrap_or_else(PoisonError::into_inner);
        for hash in asked {
            acked.remove(hash);
        }
        acked.extend(kept);
    }

    /// One worker: takes requests until there are none. Gives its counts, and what ended it early.
    pub fn work(&self, worker: &Worker, binding: &Binding) -> (Tally, Option<Error>) {
        let mut hand = Hand {
            replay: self,
            worker,
            binding,
            tally: Tally::default(),
            buffer: vec![0; binding.block_bytes() as usize],
        };
        let mut failed = None;
        while let Some(request) = self.take() {
            if let Err(error) = hand.request(request) {
                failed = (!self.patience.stop.is_asked()).then_some(error);
                break;
            }
            hand.tally.requests += 1;
            self.live.requests.fetch_add(1, Ordering::Relaxed);
        }
        self.live.ended.fetch_add(1, Ordering::Relaxed);
        (hand.tally, failed)
    }

    /// The next request, when it is time for it; `None` when there is none or all is over.
    fn take(&self) -> Option<&Request> {
        let index = self.next.fetch_add(1, Ordering::AcqRel);
        let request = self.plan.requests.get(index)?;
        let first = self.plan.requests.first().map_or(0, |first| first.timestamp_ms);
        let since_first = request.timestamp_ms.saturating_sub(first) as f64 / 1e3;
        let due = self.plan.speed.map_or(Duration::ZERO, |speed| {
            Duration::try_from_secs_f64(since_first / speed).unwrap_or(Duration::MAX)
        });
        loop {
            let is_open = index < self.gate.load(Ordering::Acquire);
            let early = due.saturating_sub(self.elapsed());
            if self.patience.stop.is_asked() || self.finished.load(Ordering::Acquire) {
                return None;
            }
            match (is_open, early) {
                (true, Duration::ZERO) => return Some(request),
                (true, early) => std::thread::sleep(early.min(Duration::from_millis(20))),
                (false, _) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// A worker at work.
struct Hand<'a> {
    replay: &'a Replay,
    worker: &'a Worker,
    binding: &'a Binding,
    tally: Tally,
    buffer: Vec<u8>,
}

impl Hand<'_> {
    fn request(&mut self, request: &Request) -> Result<(), Error> {
        let names: Vec<SequenceHash> = request.blocks.iter().copied().map(SequenceHash::from).collect();
        let (worker, binding) = (self.worker, self.binding);
        let found = self.insist(|| worker.lookup(binding, &names))?;
        let mut missing = Vec::new();
        for (at, tier) in found.tiers.iter().enumerate() {
            if let Some(reason) = self.read(&names[at], *tier)? {
                self.miss(reason);
                missing.push(at);
            }
        }
        if let Some((first, miss)) = found.first_miss {
            self.miss(miss.reason);
            missing.push(first);
            for (at, name) in names.iter().enumerate().skip(first + 1) {
                match self.insist(|| worker.lookup(binding, &[*name]))?.first_miss {
                    None => self.tally.behind_gap += 1,
                    Some((_, miss)) => {
                        self.miss(miss.reason);
                        missing.push(at);
                    }
                }
            }
        }
        missing.into_iter().try_for_each(|at| self.store(request.blocks[at]))
    }

    fn insist<T>(&mut self, call: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
        self.replay.patience.insist(self.worker, &mut self.tally.retries, call)
    }

    fn miss(&mut self, reason: MissReason) {
        self.tally.miss(reason.name());
        self.replay.live.misses.fetch_add(1, Ordering::Relaxed);
    }

    /// Reads one block and checks every byte of it; gives the reason when it is gone by now.
    fn read(&mut self, name: &SequenceHash, tier: Tier) -> Result<Option<MissReason>, Error> {
        let (worker, binding) = (self.worker, self.binding);
        let mut took = Duration::ZERO;
        let got = self.insist(|| {
            let asked = Instant::now();
            let got = worker.acquire_wait(binding, name, READ_WAIT);
            took = asked.elapsed();
            got
        });
        let block = match got {
            Ok(Got::Block(block)) => block,
            Ok(Got::Miss(miss)) => return Ok(Some(miss.reason)),
            // The client saw bytes that fail their checksum, and gave us none.
            Err(error) if error.kind() == FaultKind::Corrupt => return Ok(Some(MissReason::Corrupt)),
            Err(error) => return Err(error),
        };
        let live = &self.replay.live;
        self.tally.hit(tier, took);
        let hits = if tier == Tier::Disk { &live.hits_disk } else { &live.hits_host };
        hits.fetch_add(1, Ordering::Relaxed);
        let key = binding.key(name);
        let wrong = wrong_bytes(&key, &block, binding.block_bytes() as usize);
        live.wrong_bytes.fetch_add(wrong, Ordering::Relaxed);
        self.tally.checked(block.len(), wrong, || format!("block {key} of {name}, from {}", tier.name()));
        Ok(None)
    }

    /// Stores one block.
    fn store(&mut self, hash: u64) -> Result<(), Error> {
        let plan = &self.replay.plan;
        let name = SequenceHash::from(hash);
        let mut buffer = std::mem::take(&mut self.buffer);
        payload::fill(&self.binding.key(&name), &mut buffer);
        let first = plan.requests.iter().find_map(|request| request.blocks.first());
        if plan.plant && first == Some(&hash) {
            buffer[0] ^= 1;
        }
        let durable = plan.durable_every > 0 && hash.is_multiple_of(plan.durable_every);
        let options = PutOptions { durable, ..PutOptions::default() };
        let (worker, binding) = (self.worker, self.binding);
        let mut took = Duration::ZERO;
        let stored = self.insist(|| {
            let asked = Instant::now();
            let stored = worker.put_with(binding, &name, &buffer, &options);
            took = asked.elapsed();
            stored
        });
        self.buffer = buffer;
        stored?;
        self.tally.put_blocks += 1;
        if durable {
            self.tally.durable_blocks += 1;
            self.tally.put_durable.record(took);
            self.replay.acked.lock().unwrap_or_else(PoisonError::into_inner).insert(hash);
        } else {
            self.tally.put.record(took);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replay(count: u64, speed: Option<f64>, gate: usize) -> Replay {
        let requests = (0..count).map(|at| Request { timestamp_ms: at * 3_600_000, blocks: vec![at] });
        let plan = Plan { requests: requests.collect(), speed, durable_every: 1, plant: false };
        Replay::new(plan, Patience { limit: Duration::ZERO, stop: Stop::default() }, gate)
    }

    #[test]
    fn requests_are_taken_in_order_up_to_the_gate_and_on_when_it_opens() {
        let replay = replay(4, None, 2);
        assert_eq!([0, 1].map(|_| replay.take().unwrap().blocks[0]), [0, 1]);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| replay.take().map(|request| request.blocks[0]));
            replay.open(4);
            assert_eq!(waiting.join().unwrap(), Some(2));
        });
        replay.finish();
        assert_eq!(replay.take(), None);
    }

    #[test]
    fn a_request_that_is_not_due_ends_with_the_replay() {
        let replay = replay(2, Some(1.0), 2);
        assert!(replay.take().is_some());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| replay.take().is_none());
            while replay.next.load(Ordering::Acquire) < 2 {
                std::thread::yield_now();
            }
            replay.finish();
            assert!(waiting.join().unwrap());
        });
    }

    #[test]
    fn the_account_of_durable_blocks_keeps_what_was_acknowledged_meanwhile() {
        let replay = replay(1, None, 1);
        replay.acked.lock().unwrap().extend([1, 2, 3]);
        let asked = replay.acked();
        replay.acked.lock().unwrap().insert(4);
        replay.settle(&asked, &[2]);
        assert_eq!(replay.acked(), [2, 4]);
    }
}
