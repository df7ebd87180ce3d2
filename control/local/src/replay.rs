//! Plays a trace through worker sessions, as engines would: each request looks up how much of its prefix is
//! here, reads that, and stores what it had to compute.
//!
//! Workers take the next request of the trace, one after the other. Calls that fail because the daemon is
//! away, busy or full are made again; a killed daemon costs time, not requests.
//!
//! Of several nodes, each request has its own: its number modulo their count, as a router without an eye for
//! KV cache would spread them. A prefix that another node has comes from there, and what none has from the object store,
//! where there is one. While a node is away, its
//! requests go to the next one.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kv_block::payload;
use kv_client::{
    Binding, Error, FaultKind, Got, MissReason, PutOptions, Scope, ScopeKind, SequenceHash, Sighting, Slice,
    Worker,
};

use crate::check::wrong_bytes;
use crate::stop::Stop;
use crate::tally::{Source, Tally};
use crate::trace::{BLOCK_TOKENS, Request};

/// How long a worker waits for a block to come up from disk, from another node, or from the worker that is
/// storing it.
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

/// What a worker has with one node: a session, and the binding of its blocks there.
pub type Seat = (Worker, Binding);

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
        call: impl FnMut() -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.insist_unless(|| false, worker, retries, call)
    }

    /// [`Patience::insist`] that also ends with a failure after which `leave` says so.
    pub fn insist_unless<T>(
        &self,
        leave: impl Fn() -> bool,
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
            if !may_try_again(&error) || self.stop.is_asked() || leave() || Instant::now() >= until {
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
    /// There is an object store behind the nodes.
    pub object: bool,
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
    /// Blocks read that came from another node.
    pub hits_peer: AtomicU64,
    /// Blocks read that came from the object store.
    pub hits_object: AtomicU64,
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
    /// For each node, hashes of blocks that it acknowledged as durable.
    acked: Vec<Mutex<HashSet<u64>>>,
    /// To be watched.
    pub live: Live,
}

impl Replay {
    /// A replay over so many nodes that begins now. Requests from `gate` on wait until [`Replay::open`] lets
    /// them through.
    pub fn new(plan: Plan, patience: Patience, gate: usize, nodes: usize) -> Self {
        Self {
            plan,
            patience,
            began: Instant::now(),
            next: AtomicUsize::new(0),
            gate: AtomicUsize::new(gate),
            finished: AtomicBool::new(false),
            acked: (0..nodes).map(|_| Mutex::default()).collect(),
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

    /// Blocks that a node acknowledged as durable so far, by hash, in order.
    pub fn acked(&self, node: usize) -> Vec<u64> {
        let acked = self.acked[node].lock().unwrap_or_else(PoisonError::into_inner);
        let mut hashes: Vec<u64> = acked.iter().copied().collect();
        hashes.sort_unstable();
        hashes
    }

    /// Of the blocks that a node was `asked` about, only the `kept` ones stay in its account.
    pub fn settle(&self, node: usize, asked: &[u64], kept: &[u64]) {
        let mut acked = self.acked[node].lock().unwrap_or_else(PoisonError::into_inner);
        for hash in asked {
            acked.remove(hash);
        }
        acked.extend(kept);
    }

    /// One worker, with a seat at each node: takes requests until there are none. Gives its counts, and what
    /// ended it early.
    pub fn work(&self, seats: &[Seat]) -> (Tally, Option<Error>) {
        let block_bytes = seats.first().map_or(0, |(_, binding)| binding.block_bytes());
        let buffer = vec![0; block_bytes as usize];
        let mut hand =
            Hand { replay: self, seats, at: 0, called: self.began, tally: Tally::default(), buffer };
        let mut failed = None;
        while let Some((number, request)) = self.take() {
            if let Err(error) = hand.request(number, request) {
                failed = (!self.patience.stop.is_asked()).then_some(error);
                break;
            }
            hand.tally.requests += 1;
            self.live.requests.fetch_add(1, Ordering::Relaxed);
        }
        self.live.ended.fetch_add(1, Ordering::Relaxed);
        (hand.tally, failed)
    }

    /// The next request and its number, when it is time for it; `None` when there is none or all is over.
    fn take(&self) -> Option<(usize, &Request)> {
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
                (true, Duration::ZERO) => return Some((index, request)),
                (true, early) => std::thread::sleep(early.min(Duration::from_millis(20))),
                (false, _) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// The node that a request goes to: its own, or the next one that is up.
fn route(number: usize, nodes: usize, is_up: impl Fn(usize) -> bool) -> usize {
    let own = number % nodes;
    (own..own + nodes).map(|at| at % nodes).find(|at| is_up(*at)).unwrap_or(own)
}

/// Whether the node of the seat in use is away while another one is there.
fn may_leave(seats: &[Seat], at: usize) -> bool {
    let is_up = |(worker, _): &Seat| worker.is_connected();
    !is_up(&seats[at]) && seats.iter().any(is_up)
}

/// Where a block is, as far as a request cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    In(Source),
    Absent(MissReason),
}

impl From<Sighting> for Seen {
    fn from(sighting: Sighting) -> Self {
        match sighting {
            Sighting::Here(tier) => Self::In(tier.into()),
            Sighting::At { .. } => Self::In(Source::Peer),
            Sighting::Expected { .. } => Self::Absent(MissReason::NotComplete),
            Sighting::Absent(miss) => Self::Absent(miss.reason),
        }
    }
}

/// Blocks from the first on that can be read, without a gap.
fn prefix(seen: &[Seen]) -> usize {
    seen.iter().take_while(|seen| matches!(seen, Seen::In(_))).count()
}

/// A worker at work.
struct Hand<'a> {
    replay: &'a Replay,
    seats: &'a [Seat],
    /// The node in use.
    at: usize,
    /// When it was asked for blocks of other nodes.
    called: Instant,
    tally: Tally,
    buffer: Vec<u8>,
}

impl<'a> Hand<'a> {
    fn here(&self) -> (&'a Worker, &'a Binding) {
        let (worker, binding) = &self.seats[self.at];
        (worker, binding)
    }

    /// Does a request at its own node; begins it again elsewhere when that one goes away.
    fn request(&mut self, number: usize, request: &Request) -> Result<(), Error> {
        let (seats, nodes) = (self.seats, self.seats.len());
        loop {
            self.at = route(number, nodes, |node| seats[node].0.is_connected());
            match self.serve(request) {
                Ok(()) => break,
                Err(error) if self.replay.patience.stop.is_asked() || !may_try_again(&error) => {
                    return Err(error);
                }
                Err(_) if may_leave(seats, self.at) => {}
                Err(error) => return Err(error),
            }
        }
        *self.tally.served.entry(self.at).or_default() += 1;
        self.tally.rerouted += u64::from(self.at != number % nodes);
        Ok(())
    }

    /// Reads what there is of a request's prefix and stores the rest.
    fn serve(&mut self, request: &Request) -> Result<(), Error> {
        let names: Vec<SequenceHash> = request.blocks.iter().copied().map(SequenceHash::from).collect();
        let seen = self.look(&names)?;
        let prefix = prefix(&seen);
        self.call_in(&names[..prefix], &seen)?;
        let mut missing = Vec::new();
        for (at, seen) in seen.into_iter().enumerate() {
            let miss = match seen {
                Seen::In(source) if at < prefix => self.read(&names[at], source)?,
                Seen::In(_) => {
                    self.tally.behind_gap += 1;
                    None
                }
                Seen::Absent(reason) => Some(reason),
            };
            if let Some(reason) = miss {
                self.miss(reason);
                missing.push(at);
            }
        }
        let before = |at: usize| at.checked_sub(1).map(|before| request.blocks[before]);
        missing.into_iter().try_for_each(|at| self.store(request.blocks[at], before(at)))
    }

    /// Where the blocks are: at this node without a call, or else wherever the daemon finds them.
    fn look(&mut self, names: &[SequenceHash]) -> Result<Vec<Seen>, Error> {
        let (worker, binding) = self.here();
        let found = self.insist(|| worker.lookup(binding, names))?;
        let mut seen: Vec<Seen> = found.tiers.iter().map(|tier| Seen::In((*tier).into())).collect();
        let Some((first, miss)) = found.first_miss else { return Ok(seen) };
        if self.seats.len() > 1 || self.replay.plan.object {
            let located = self.insist(|| worker.locate(binding, &names[first..]).wait())?;
            seen.extend(located.into_iter().map(Seen::from));
            return Ok(seen);
        }
        seen.push(Seen::Absent(miss.reason));
        for name in &names[first + 1..] {
            let found = self.insist(|| worker.lookup(binding, &[*name]))?;
            let tier = found.tiers.first().map(|tier| Seen::In((*tier).into()));
            seen.extend(found.first_miss.map(|(_, miss)| Seen::Absent(miss.reason)).or(tier));
        }
        Ok(seen)
    }

    /// Has blocks of other nodes and of the object store come here, all at once.
    fn call_in(&mut self, names: &[SequenceHash], seen: &[Seen]) -> Result<(), Error> {
        let elsewhere = |seen: &Seen| matches!(seen, Seen::In(Source::Peer | Source::Object));
        let elsewhere = names.iter().zip(seen).filter(|(_, seen)| elsewhere(seen));
        let elsewhere: Vec<SequenceHash> = elsewhere.map(|(name, _)| *name).collect();
        if elsewhere.is_empty() {
            return Ok(());
        }
        let (worker, binding) = self.here();
        self.called = Instant::now();
        self.insist(|| worker.prefetch(binding, &elsewhere).wait())?;
        Ok(())
    }

    fn insist<T>(&mut self, call: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
        let (seats, at) = (self.seats, self.at);
        let leave = || may_leave(seats, at);
        self.replay.patience.insist_unless(leave, &seats[at].0, &mut self.tally.retries, call)
    }

    fn miss(&mut self, reason: MissReason) {
        self.tally.miss(reason.name());
        self.replay.live.misses.fetch_add(1, Ordering::Relaxed);
    }

    /// Reads one block and checks every byte of it; gives the reason when it is gone by now.
    fn read(&mut self, name: &SequenceHash, source: Source) -> Result<Option<MissReason>, Error> {
        let (worker, binding) = self.here();
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
        if matches!(source, Source::Peer | Source::Object) {
            took = self.called.elapsed();
        }
        let live = &self.replay.live;
        self.tally.hit(source, took);
        let hits = match source {
            Source::Host => &live.hits_host,
            Source::Disk => &live.hits_disk,
            Source::Peer => &live.hits_peer,
            Source::Object => &live.hits_object,
        };
        hits.fetch_add(1, Ordering::Relaxed);
        let key = binding.key(name);
        let wrong = wrong_bytes(&key, &block, binding.block_bytes() as usize);
        live.wrong_bytes.fetch_add(wrong, Ordering::Relaxed);
        self.tally.checked(block.len(), wrong, || format!("block {key} of {name}, from {}", source.name()));
        Ok(None)
    }

    /// Stores one block, which stands behind another in its prefix.
    fn store(&mut self, hash: u64, before: Option<u64>) -> Result<(), Error> {
        let plan = &self.replay.plan;
        let name = SequenceHash::from(hash);
        let mut buffer = std::mem::take(&mut self.buffer);
        let (worker, binding) = self.here();
        payload::fill(&binding.key(&name), &mut buffer);
        let first = plan.requests.iter().find_map(|request| request.blocks.first());
        if plan.plant && first == Some(&hash) {
            buffer[0] ^= 1;
        }
        let durable = plan.durable_every > 0 && hash.is_multiple_of(plan.durable_every);
        let after = before.map(SequenceHash::from);
        let options = PutOptions { durable, after, ..PutOptions::default() };
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
            let acked = &self.replay.acked[self.at];
            acked.lock().unwrap_or_else(PoisonError::into_inner).insert(hash);
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
        let plan =
            Plan { requests: requests.collect(), speed, durable_every: 1, plant: false, object: false };
        Replay::new(plan, Patience { limit: Duration::ZERO, stop: Stop::default() }, gate, 2)
    }

    #[test]
    fn requests_are_taken_in_order_up_to_the_gate_and_on_when_it_opens() {
        let replay = replay(4, None, 2);
        assert_eq!([0, 1].map(|_| replay.take().unwrap().0), [0, 1]);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| replay.take().map(|(number, request)| (number, request.blocks[0])));
            replay.open(4);
            assert_eq!(waiting.join().unwrap(), Some((2, 2)));
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
        replay.acked[1].lock().unwrap().extend([1, 2, 3]);
        let asked = replay.acked(1);
        replay.acked[1].lock().unwrap().insert(4);
        replay.settle(1, &asked, &[2]);
        assert_eq!((replay.acked(0), replay.acked(1)), (vec![], vec![2, 4]));
    }

    #[test]
    fn a_request_goes_to_its_own_node_or_the_next_one_that_is_there() {
        let routes = |up: &[bool]| [0, 1, 2, 3, 7].map(|number| route(number, up.len(), |node| up[node]));
        assert_eq!(routes(&[true]), [0, 0, 0, 0, 0]);
        assert_eq!(routes(&[true, true, true]), [0, 1, 2, 0, 1]);
        assert_eq!(routes(&[true, false, true]), [0, 2, 2, 0, 2]);
        assert_eq!(routes(&[false, true, false]), [1, 1, 1, 1, 1]);
        // Nobody is there: it waits for its own.
        assert_eq!(routes(&[false, false, false]), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn a_block_is_of_use_from_wherever_it_can_be_read_and_only_without_a_gap_before_it() {
        use kv_client::Tier;

        let node = || "node-2".to_owned();
        let sightings = vec![
            Sighting::Here(Tier::Disk),
            Sighting::At { node: node(), tier: Tier::Disk },
            Sighting::Expected { node: node() },
            Sighting::Here(Tier::Host),
            Sighting::Absent(MissReason::EvictedCapacity.into()),
        ];
        let seen: Vec<Seen> = sightings.into_iter().map(Seen::from).collect();
        let wanted = [
            Seen::In(Source::Disk),
            Seen::In(Source::Peer),
            Seen::Absent(MissReason::NotComplete),
            Seen::In(Source::Host),
            Seen::Absent(MissReason::EvictedCapacity),
        ];
        assert_eq!(seen, wanted);
        assert_eq!(prefix(&seen), 2);
    }
}
