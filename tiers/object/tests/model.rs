//! Random operations of several nodes on a store that fails in every way, against a map of what was stored.
//!
//! Whatever happens: no wrong byte (every block proves its own), every operation ends in time, the store is not asked
//! more than the limits say, and when the faults are over all that landed is there, for every node and for one that
//! knows nothing. `KV_OBJECT_SEEDS` runs more of them.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use common::{NOW, config, key, offer, read};
use kv_object::memory::Memory;
use kv_object::random::Random;
use kv_object::store::Store;
use kv_object::tier::{Got, Tier, TierError};
use kv_object::unreliable::{Rates, Unreliable};
use tokio::time::Instant;

const NODES: usize = 3;
const KEYS: u64 = 120;

struct World {
    store: Arc<Unreliable>,
    random: Random,
    epoch: u64,
    nodes: Vec<Option<Tier>>,
    /// What was acknowledged.
    landed: BTreeSet<u64>,
    reads: u64,
    hits: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let store = Arc::new(Unreliable::new(Arc::new(Memory::new()), seed));
        let nodes = (0..NODES).map(|_| None).collect();
        Self {
            store,
            random: Random::new(!seed),
            epoch: 0,
            nodes,
            landed: BTreeSet::new(),
            reads: 0,
            hits: 0,
        }
    }

    async fn open(&mut self, name: &str) -> Result<Tier, TierError> {
        self.epoch += 1;
        let config = config(name, self.epoch);
        let bound = config.upkeep_max * 60;
        let began = Instant::now();
        let opened = Tier::open(self.store.clone() as Arc<dyn Store>, config, NOW).await;
        assert!(began.elapsed() <= bound, "opening took {:?}", began.elapsed());
        opened.map(|(tier, _)| tier)
    }

    fn acknowledge(&mut self, keys: &[kv_block::BlockKey]) {
        self.landed.extend(keys.iter().map(|key| key.halves()[1]));
    }

    /// One thing of one node.
    async fn step(&mut self, collecting: bool) {
        let index = self.random.below(NODES as u64) as usize;
        let Some(tier) = self.nodes[index].take() else {
            self.nodes[index] = self.open(&format!("n{index}")).await.ok();
            return;
        };
        let mut lives = true;
        match self.random.below(20) {
            0..6 => {
                let first = self.random.below(KEYS);
                let count = self.random.below(24);
                let offers = (first..first + count).map(|n| {
                    let bytes = 500 + (n % 7) as u32 * 600;
                    offer(n, bytes, n.checked_sub(1), 0)
                });
                match tier.put(NOW, offers.collect()).await {
                    Ok(stored) => self.acknowledge(&stored.landed),
                    Err(error) => lives = !matches!(error, TierError::Fenced { .. }),
                }
            }
            6..8 => match tier.flush(self.random.per_mille(500)).await {
                Ok(stored) => self.acknowledge(&stored.landed),
                Err(error) => lives = !matches!(error, TierError::Fenced { .. }),
            },
            8..14 => {
                let within = Duration::from_millis(1 + self.random.below(20_000));
                let wanted: Vec<_> =
                    (0..self.random.below(30)).map(|_| self.random.below(KEYS + 10)).collect();
                let began = Instant::now();
                let got = read(&tier, NOW, within, &wanted).await;
                assert!(began.elapsed() <= within + Duration::from_millis(20), "a read without end");
                self.reads += got.len() as u64;
                self.hits += got.iter().filter(|got| matches!(got, Got::Read(_))).count() as u64;
            }
            14..16 => {
                let result = tier.refresh(NOW).await;
                lives = !matches!(result, Err(TierError::Fenced { .. }));
            }
            16 => {
                // Dropped in the middle of something.
                let within = Duration::from_millis(self.random.below(3000));
                let _ = tokio::time::timeout(within, tier.refresh(NOW)).await;
                if let Ok(Ok(stored)) = tokio::time::timeout(within, tier.flush(true)).await {
                    self.acknowledge(&stored.landed);
                }
            }
            17 if collecting => {
                tokio::time::sleep(Duration::from_secs(61)).await;
                let _ = tier.collect(false).await;
            }
            17 => tokio::time::sleep(Duration::from_secs(self.random.below(10))).await,
            // Killed: what waits is gone.
            18 => lives = false,
            _ => {
                let rates = match self.random.below(4) {
                    0 => Rates::default(),
                    1 => Rates::all(20),
                    2 => Rates { list_lag: 0, ..Rates::all(100) },
                    _ => Rates { slow: 300, ..Rates::all(50) },
                };
                self.store.set_rates(rates);
                self.store.set_down(self.random.per_mille(100));
            }
        }
        let report = tier.report().requests;
        let attempts_max = u64::from(tier.config().requests.retry.attempts_max);
        for (kind, count) in &report.counts {
            let first = count.requests - count.retries;
            assert!(count.requests <= first * attempts_max, "{kind:?}: {count:?}");
        }
        let all =
            |pick: fn(&kv_object::requests::Count) -> u64| report.counts.values().map(pick).sum::<u64>();
        let budget = u64::from(tier.config().requests.retry.budget_max);
        assert!(all(|c| c.retries) <= budget + all(|c| c.requests) / 5, "retries without bound");
        assert_eq!(report.under_way, 0, "a place was lost");
        if lives {
            self.nodes[index] = Some(tier);
        }
    }

    /// The faults are over: everybody finds everything, also who starts with nothing.
    async fn settle(&mut self, collecting: bool) {
        self.store.set_rates(Rates::default());
        self.store.set_down(false);
        // Circuits close.
        tokio::time::sleep(Duration::from_secs(200)).await;
        let all: Vec<_> = self.landed.iter().copied().collect();
        let stranger = self.open("stranger").await.expect("a store that is well");
        let got = read(&stranger, NOW, Duration::from_secs(600), &all).await;
        let missed: Vec<_> = got.iter().zip(&all).filter(|(got, _)| !matches!(got, Got::Read(_))).collect();
        // What was collected may be gone; nothing else.
        assert!(collecting || missed.is_empty(), "lost: {missed:?}");
        for (index, tier) in std::mem::take(&mut self.nodes).into_iter().enumerate() {
            let Some(tier) = tier else { continue };
            match tier.refresh(NOW).await {
                Ok(()) => {}
                Err(TierError::Fenced { .. }) if collecting => continue,
                Err(error) => panic!("a store that is well: {error}"),
            }
            tier.rescan().await.expect("a store that is well");
            let got = read(&tier, NOW, Duration::from_secs(600), &all).await;
            let damaged = tier.report().totals.checksum_failures > 0;
            for (got, number) in got.iter().zip(&all) {
                // Two reads that were damaged on the way look like a damaged pack; until it is opened again, that
                // node does without.
                let there = matches!(got, Got::Read(_)) || damaged || collecting;
                assert!(
                    there || !tier.report().set_aside.is_empty(),
                    "node {index} misses block {number}: {got:?}"
                );
            }
            assert_eq!(tier.find(NOW, &[key(KEYS + 500)]).len(), 1);
        }
    }
}

fn run(seeds: std::ops::Range<u64>, collecting: bool) {
    let (mut reads, mut hits, mut landed) = (0, 0, 0);
    let mut injected = std::collections::BTreeMap::<&str, u64>::new();
    for seed in seeds {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let mut world = World::new(seed);
        let story = std::panic::AssertUnwindSafe(|| {
            runtime.unwrap().block_on(async {
                for _ in 0..60 {
                    world.step(collecting).await;
                }
                world.settle(collecting).await;
            });
        });
        if let Err(panic) = std::panic::catch_unwind(story) {
            eprintln!("seed {seed} failed");
            std::panic::resume_unwind(panic);
        }
        (reads, hits, landed) = (reads + world.reads, hits + world.hits, landed + world.landed.len() as u64);
        for (kind, count) in world.store.injected() {
            *injected.entry(kind).or_default() += count;
        }
    }
    eprintln!("{reads} reads under faults, {hits} hits, 0 wrong bytes; {landed} blocks landed; {injected:?}");
    assert!(hits * 20 > reads && landed > 0, "the faults leave something to look at");
}

fn seeds() -> u64 {
    std::env::var("KV_OBJECT_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(300)
}

#[test]
fn no_wrong_byte_and_nothing_lost_whatever_the_store_does() {
    run(0..seeds(), false);
}

#[test]
fn no_wrong_byte_while_packs_are_collected() {
    run(1_000_000..1_000_000 + seeds(), true);
}
