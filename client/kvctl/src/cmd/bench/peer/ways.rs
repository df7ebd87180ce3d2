//! The two ways between this node and a peer: offers go out, wants come in. The connections of both are opened by a
//! scout block before a clock starts, so that what is timed is blocks and no handshakes.

use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use kv_api::{convert, v1};
use kv_block::{FaultKind, MissReason, Scope, SequenceHash, Slice, payload};
use kv_client::{Binding, Got, Priority, PutOptions, Worker, WorkerOptions};

use crate::cmd::peers::{in_words, may_answer, named};
use crate::connect::Daemon;
use crate::exit::{Exit, Failure};
use crate::names;
use crate::units::counted;
use crate::{out, progress};

/// How long the blocks live, wherever they are.
const TTL: Duration = Duration::from_secs(120);
/// Bytes asked for in one request, unless one block is longer.
const BATCH_BYTES: u64 = 32 << 20;
/// Blocks that are fetched one at a time.
const SINGLE_COUNT: usize = 64;
/// The longest that a daemon lets a call last.
const TIME_MAX: Duration = Duration::from_secs(600);
/// Wait after a rejection without a hint.
const BUSY_WAIT: Duration = Duration::from_millis(5);
/// What a peer has just fetched is held for it a moment longer: between two looks, and how many of them.
const LET_GO_WAIT: Duration = Duration::from_millis(50);
const LET_GO_TRIES: u32 = 40;

pub(super) struct Plan {
    pub(super) node: String,
    pub(super) block_bytes: u32,
    pub(super) count: u32,
    /// For each way.
    pub(super) time: Duration,
}

/// What one way came to.
#[derive(Clone, Default)]
pub(super) struct Measured {
    pub(super) name: &'static str,
    /// Blocks that arrived.
    pub(super) blocks: u64,
    pub(super) bytes: u64,
    /// From the first request to the last answer.
    pub(super) spent: Duration,
    /// One per block where they went one at a time, ascending.
    pub(super) latencies_ns: Vec<u64>,
    /// Blocks that did not arrive, and why the last of them did not.
    pub(super) misses: u64,
    pub(super) why: Option<MissReason>,
    /// Blocks that came with other bytes.
    pub(super) wrong: u64,
}

impl Measured {
    pub(super) fn per_second(&self, number: u64) -> u64 {
        (number as f64 / self.spent.as_secs_f64().max(1e-9)) as u64
    }
}

/// Measures until it is done or somebody presses Ctrl-C. Either way no block stays here.
pub(super) async fn run(daemon: &Daemon, plan: &Plan) -> Result<Vec<Measured>, Failure> {
    let options = WorkerOptions { name: "kvctl bench peer".into(), ..Default::default() };
    let worker = daemon.client.worker(options).await?;
    let scope =
        Scope { model: "kvd-bench".into(), tenant: "kvd-bench".into(), salt: salt()?, ..Scope::default() };
    let binding = worker.register(scope, Slice::whole(1, 1), plan.block_bytes).await?;
    let time = plan.time.clamp(Duration::from_millis(1), TIME_MAX);
    let bench = Bench {
        daemon: daemon.patient(time.max(daemon.timeout())),
        worker,
        binding,
        // One more than are timed: the scout.
        hashes: (0..=u64::from(plan.count)).map(SequenceHash::from).collect(),
        node: plan.node.clone(),
        time,
        stopped: Arc::default(),
    };
    let measured = tokio::select! {
        measured = bench.measure() => measured,
        _ = tokio::signal::ctrl_c() => Err(Failure::new(Exit::Failure, "ended before it was measured")
            .help("its blocks are evicted here; what the peer took expires there within two minutes")),
    };
    bench.leave_nothing(daemon).await;
    measured
}

/// Random, so that no block of another run or another node is taken for one of this.
fn salt() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Failure::new(Exit::Failure, format!("no random numbers: {error}")))?;
    Ok(crate::structured::hex(&bytes))
}

struct Bench {
    /// Gives each call as long as a way may take.
    daemon: Daemon,
    worker: Worker,
    binding: Binding,
    /// The scout, then those that are timed.
    hashes: Vec<SequenceHash>,
    node: String,
    time: Duration,
    /// Held while a block is put: once it says so, none is put any more.
    stopped: Arc<Mutex<bool>>,
}

/// Blocks that arrived, and the leases that keep them until they were checked.
#[derive(Default)]
struct Held {
    hashes: Vec<SequenceHash>,
    leases: Vec<u64>,
}

impl Bench {
    async fn measure(&self) -> Result<Vec<Measured>, Failure> {
        let (scout, rest) = self.hashes.split_at(1);
        let bar = progress::bar("putting", "blocks", self.hashes.len() as u64);
        self.put(scout, &bar).await?;
        if self.offer(scout).await?.taken == 0 {
            return Err(self.took_none().await);
        }
        self.put(rest, &bar).await?;
        bar.finish_and_clear();

        let batches: Vec<&[SequenceHash]> = rest.chunks(self.batch_count()).collect();
        let (out, offered) = self.go_out(&batches).await?;
        if out.blocks == 0 {
            return Err(self.took_none().await);
        }
        self.evict(&self.hashes).await?;

        let mut scouted = Measured { name: "in", ..Default::default() };
        let held = self.come_in([scout].as_slice(), &mut scouted, Pace::InTurn).await?;
        self.check(held, &mut scouted).await?;
        let mut back = Measured { name: "in", wrong: scouted.wrong, ..Default::default() };
        let held = self.come_in(&batches[..offered], &mut back, Pace::TwoAtATime).await?;
        // Of whole batches, which say nothing of a block.
        back.latencies_ns.clear();
        let few: Vec<SequenceHash> = held.hashes.iter().take(SINGLE_COUNT).copied().collect();
        self.check(held, &mut back).await?;
        if few.is_empty() {
            return Ok(vec![out, back]);
        }

        self.evict(&few).await?;
        let few: Vec<&[SequenceHash]> = few.chunks(1).collect();
        let mut single = Measured { name: "single", ..Default::default() };
        let held = self.come_in(&few, &mut single, Pace::InTurn).await?;
        single.latencies_ns.sort_unstable();
        self.check(held, &mut single).await?;
        Ok(vec![out, back, single])
    }

    /// Blocks in one request.
    fn batch_count(&self) -> usize {
        let fit = BATCH_BYTES / u64::from(self.binding.block_bytes());
        (fit as usize).clamp(1, self.daemon.client.keys_per_request_max())
    }

    fn names(&self, hashes: &[SequenceHash]) -> Option<v1::Names> {
        names::requests(&self.binding.keys(hashes), hashes.len()).next()
    }

    /// What a worker does with blocks are plain functions: they get a thread of their own.
    async fn on_a_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Worker, &Binding) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let (worker, binding) = (self.worker.clone(), self.binding.clone());
        let done = tokio::task::spawn_blocking(move || work(&worker, &binding)).await;
        done.map_err(|error| Failure::new(Exit::Failure, format!("the load: {error}")))?
    }

    async fn put(&self, hashes: &[SequenceHash], bar: &ProgressBar) -> Result<(), Failure> {
        let (hashes, bar, stopped) = (hashes.to_vec(), bar.clone(), Arc::clone(&self.stopped));
        let end = Instant::now() + self.time;
        let options = PutOptions { priority: Priority::Low, ttl: Some(TTL), ..PutOptions::default() };
        self.on_a_thread(move |worker, binding| {
            let mut bytes = vec![0; binding.block_bytes() as usize];
            for hash in &hashes {
                payload::fill(&binding.key(hash), &mut bytes);
                loop {
                    let stopped = stopped.lock().unwrap_or_else(PoisonError::into_inner);
                    if *stopped {
                        return Ok(());
                    }
                    let put = worker.put_with(binding, hash, &bytes, &options);
                    drop(stopped);
                    match put {
                        Ok(_) => break,
                        Err(error) if error.kind() == FaultKind::Busy && Instant::now() < end => {
                            std::thread::sleep(error.retry_after().unwrap_or(BUSY_WAIT).min(TTL / 100));
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                bar.inc(1);
            }
            Ok(())
        })
        .await
    }

    async fn offer(&self, hashes: &[SequenceHash]) -> Result<v1::OfferResponse, Failure> {
        let request = v1::OfferRequest { node: self.node.clone(), names: self.names(hashes) };
        self.daemon.within(self.daemon.admin().offer(self.daemon.request(request))).await
    }

    /// Has the peer fetch; gives how many of the batches it was offered before the time was over.
    async fn go_out(&self, batches: &[&[SequenceHash]]) -> Result<(Measured, usize), Failure> {
        let bar = bar("out", batches);
        let one = async |batch: &[SequenceHash]| {
            let answer = self.offer(batch).await?;
            bar.inc(batch.len() as u64);
            Ok(answer)
        };
        let started = Instant::now();
        let offered = two_at_a_time(batches, started + self.time, one).await?;
        let mut out = Measured { name: "out", spent: started.elapsed(), ..Default::default() };
        out.blocks = offered.iter().map(|answer| u64::from(answer.taken)).sum();
        out.misses = offered.iter().map(|answer| u64::from(answer.left)).sum();
        out.bytes = out.blocks * u64::from(self.binding.block_bytes());
        bar.finish_and_clear();
        Ok((out, offered.len()))
    }

    async fn acquire(&self, hashes: &[SequenceHash]) -> Result<(v1::AcquireResponse, Duration), Failure> {
        let request = v1::AcquireRequest {
            session: self.worker.session().0,
            names: self.names(hashes),
            // A little less than the call has, so that what does not come is a miss and no failure.
            wait_ms: (self.time - self.time / 16).as_millis().max(1) as u32,
            node: self.node.clone(),
        };
        let started = Instant::now();
        let answer = self.daemon.within(self.daemon.blocks().acquire(self.daemon.request(request))).await?;
        Ok((answer, started.elapsed()))
    }

    /// Fetches from the peer. A lease is all that is asked for: the bytes stay where the daemon put them.
    async fn come_in(
        &self,
        batches: &[&[SequenceHash]],
        way: &mut Measured,
        pace: Pace,
    ) -> Result<Held, Failure> {
        let bar = bar(way.name, batches);
        let one = async |batch: &[SequenceHash]| {
            let answer = self.acquire(batch).await?;
            bar.inc(batch.len() as u64);
            Ok((batch.to_vec(), answer))
        };
        let started = Instant::now();
        let end = started + self.time;
        let answers = match pace {
            Pace::TwoAtATime => two_at_a_time(batches, end, one).await?,
            Pace::InTurn => {
                let next = Cell::new(0);
                lane(batches, &next, end, &one).await?
            }
        };
        way.spent = started.elapsed();
        bar.finish_and_clear();
        let mut held = Held::default();
        for (hashes, (answer, took)) in answers {
            way.latencies_ns.push(took.as_nanos() as u64);
            for (hash, acquired) in hashes.into_iter().zip(answer.acquired) {
                match acquired.what {
                    Some(v1::acquired::What::Lease(lease)) => {
                        held.hashes.push(hash);
                        held.leases.push(lease.lease);
                    }
                    Some(v1::acquired::What::Miss(miss)) => {
                        way.misses += 1;
                        way.why = Some(convert::miss_reason(&miss));
                    }
                    None => way.misses += 1,
                }
            }
        }
        way.blocks = held.hashes.len() as u64;
        way.bytes = way.blocks * u64::from(self.binding.block_bytes());
        Ok(held)
    }

    /// Compares every byte of what arrived, then lets go of it.
    async fn check(&self, held: Held, way: &mut Measured) -> Result<(), Failure> {
        let Held { hashes, leases } = held;
        let stopped = Arc::clone(&self.stopped);
        let wrong = self.on_a_thread(move |worker, binding| {
            let mut wrong = 0;
            for hash in &hashes {
                if *stopped.lock().unwrap_or_else(PoisonError::into_inner) {
                    break;
                }
                let right = match worker.acquire_wait(binding, hash, worker.deadline())? {
                    Got::Block(block) => payload::first_wrong_byte(&binding.key(hash), &block).is_none(),
                    // It is leased, so the daemon gave something away that was not good.
                    Got::Miss(_) => false,
                };
                wrong += u64::from(!right);
            }
            Ok(wrong)
        });
        way.wrong += wrong.await?;
        let session = self.worker.session().0;
        for leases in leases.chunks(self.daemon.client.keys_per_request_max()) {
            let request = v1::ReleaseRequest { session, leases: leases.to_vec() };
            self.daemon.within(self.daemon.blocks().release(self.daemon.request(request))).await?;
        }
        Ok(())
    }

    /// Removes blocks here, all of them: one that stayed would come back from nowhere.
    async fn evict(&self, hashes: &[SequenceHash]) -> Result<(), Failure> {
        let mut stay = 0;
        for _ in 0..LET_GO_TRIES {
            stay = self.worker.evict(&self.binding, hashes, None).await?.in_use;
            if stay == 0 {
                return Ok(());
            }
            tokio::time::sleep(LET_GO_WAIT).await;
        }
        let stay = counted(stay.into(), "block");
        let text = format!("{stay} cannot be evicted here, so fetching them back would measure nothing");
        Err(Failure::new(Exit::Degraded, text)
            .help("somebody still reads them: `kvctl get transfers`, `kvctl get leases`"))
    }

    async fn took_none(&self) -> Failure {
        let text = format!("{} took none of the blocks", self.node);
        match named(&self.daemon, &self.node).await {
            Ok(peer) if !may_answer(&peer) => {
                Failure::new(Exit::Degraded, format!("{text}: {}", in_words(&peer)))
                    .help(format!("`kvctl describe peer {}` says more", self.node))
            }
            _ => Failure::new(Exit::Degraded, text).help(format!(
                "it has no room for them, or a quota of tenant kvd-bench forbids it: `kvctl get tiers` and \
                 `kvctl get tenants` on {}",
                self.node
            )),
        }
    }

    /// Removes what is left here, whatever happened. Goes without a session: the leases of this one end with it, also
    /// those of calls whose answer nobody waited for.
    async fn leave_nothing(self, daemon: &Daemon) {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        let keys = self.binding.keys(&self.hashes);
        drop(self);
        for _ in 0..LET_GO_TRIES {
            let mut stay = 0;
            for names in names::requests(&keys, daemon.client.keys_per_request_max()) {
                let request = v1::EvictRequest { names: Some(names), ..Default::default() };
                let answer = daemon.within(daemon.blocks().evict(daemon.request(request))).await;
                stay += answer.map_or(1, |answer| answer.in_use);
            }
            if stay == 0 {
                return;
            }
            tokio::time::sleep(LET_GO_WAIT).await;
        }
        out::note("some blocks of the bench stay here until they expire, within two minutes");
    }
}

fn bar(way: &'static str, batches: &[&[SequenceHash]]) -> ProgressBar {
    progress::bar(way, "blocks", batches.iter().map(|batch| batch.len() as u64).sum())
}

#[derive(Clone, Copy)]
enum Pace {
    /// Each request when the one before it is answered.
    InTurn,
    /// While one is answered the next is worked on.
    TwoAtATime,
}

/// What `one` gives for the items from the first on, as many as begin before `end`.
async fn two_at_a_time<R>(
    items: &[&[SequenceHash]],
    end: Instant,
    one: impl AsyncFn(&[SequenceHash]) -> Result<R, Failure>,
) -> Result<Vec<R>, Failure> {
    let next = Cell::new(0);
    let (mut first, second) = tokio::try_join!(lane(items, &next, end, &one), lane(items, &next, end, &one))?;
    first.extend(second);
    Ok(first)
}

async fn lane<R>(
    items: &[&[SequenceHash]],
    next: &Cell<usize>,
    end: Instant,
    one: &impl AsyncFn(&[SequenceHash]) -> Result<R, Failure>,
) -> Result<Vec<R>, Failure> {
    let mut done = Vec::new();
    while let Some(item) = items.get(next.get()).filter(|_| Instant::now() < end) {
        next.set(next.get() + 1);
        done.push(one(item).await?);
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_share_the_items_and_end_with_the_time() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let hashes: Vec<SequenceHash> = (0..5).map(SequenceHash::from).collect();
        let items: Vec<&[SequenceHash]> = hashes.chunks(1).collect();
        let one = async |batch: &[SequenceHash]| {
            tokio::task::yield_now().await;
            Ok(batch[0])
        };
        let later = Instant::now() + Duration::from_secs(60);
        let mut all = runtime.block_on(two_at_a_time(&items, later, one)).unwrap();
        all.sort_unstable_by_key(|hash| hash.as_bytes().to_vec());
        assert_eq!(all, hashes);
        assert!(runtime.block_on(two_at_a_time(&items, Instant::now(), one)).unwrap().is_empty());
    }
}
