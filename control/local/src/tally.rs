//! What a worker counts while it replays, and how the counts of all become one.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use kv_client::Tier;

/// How long something took, many times over: 1 ns to a minute, three digits.
#[derive(Clone, Debug)]
pub struct Times(Histogram<u64>);

impl Default for Times {
    fn default() -> Self {
        Self(Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("these bounds are valid"))
    }
}

impl Times {
    /// Counts one.
    pub fn record(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1));
    }

    /// Counts all of `other` too.
    pub fn merge(&mut self, other: &Self) {
        self.0.add(&other.0).expect("the bounds are equal");
    }

    /// How many were counted.
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The time in microseconds that this share of all stayed within; 0 when there were none.
    pub fn quantile_us(&self, share: f64) -> f64 {
        if self.is_empty() { 0.0 } else { self.0.value_at_quantile(share) as f64 / 1e3 }
    }
}

/// Where a block was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Host memory of the node.
    Host,
    /// Disk of the node.
    Disk,
    /// Another node.
    Peer,
    /// The object store.
    Object,
}

impl Source {
    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Disk => "disk",
            Self::Peer => "peer",
            Self::Object => "object",
        }
    }
}

impl From<Tier> for Source {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Device | Tier::Host => Self::Host,
            Tier::Disk => Self::Disk,
            Tier::Object => Self::Object,
        }
    }
}

/// Counts of one worker, or of all.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Requests replayed to their end.
    pub requests: u64,
    /// Of those, what each node did, by its number.
    pub served: BTreeMap<usize, u64>,
    /// Requests that went to another node than their own, which was away.
    pub rerouted: u64,
    /// Bytes read and checked.
    pub bytes_read: u64,
    /// Of those, bytes that were not what had been stored.
    pub wrong_bytes: u64,
    /// The first wrong block, in words.
    pub first_wrong: Option<String>,
    /// Blocks of prefixes read from host memory.
    pub hits_host: u64,
    /// Blocks of prefixes that had to come up from disk.
    pub hits_disk: u64,
    /// Blocks of prefixes that had to come from another node.
    pub hits_peer: u64,
    /// Blocks of prefixes that had to come from the object store.
    pub hits_object: u64,
    /// Blocks that were here, but behind one that was not: of no use to the request, and not read.
    pub behind_gap: u64,
    /// Blocks that were not here, by reason.
    pub misses: BTreeMap<&'static str, u64>,
    /// Blocks stored.
    pub put_blocks: u64,
    /// Of those, blocks acknowledged as durable.
    pub durable_blocks: u64,
    /// Calls made again because the daemon was away, busy or full.
    pub retries: u64,
    /// Reading one block in host memory.
    pub read_host: Times,
    /// Reading one block on disk.
    pub read_disk: Times,
    /// Reading one block of another node: from asking for all that a request wants of others until this one was
    /// here and its turn.
    pub read_peer: Times,
    /// Reading one block of the object store, measured in the same way.
    pub read_object: Times,
    /// Storing one block in host memory.
    pub put: Times,
    /// Storing one block durably.
    pub put_durable: Times,
}

impl Tally {
    /// One block was read.
    pub fn hit(&mut self, source: Source, took: Duration) {
        let (hits, times) = match source {
            Source::Host => (&mut self.hits_host, &mut self.read_host),
            Source::Disk => (&mut self.hits_disk, &mut self.read_disk),
            Source::Peer => (&mut self.hits_peer, &mut self.read_peer),
            Source::Object => (&mut self.hits_object, &mut self.read_object),
        };
        *hits += 1;
        times.record(took);
    }

    /// The bytes of one block were compared; `wrong` of them are not right.
    pub fn checked(&mut self, bytes: usize, wrong: u64, words: impl FnOnce() -> String) {
        self.bytes_read += bytes as u64;
        self.wrong_bytes += wrong;
        if wrong > 0 && self.first_wrong.is_none() {
            self.first_wrong = Some(words());
        }
    }

    /// One block was not here.
    pub fn miss(&mut self, reason: &'static str) {
        *self.misses.entry(reason).or_default() += 1;
    }

    /// Blocks read.
    pub fn blocks_read(&self) -> u64 {
        self.hits_host + self.hits_disk + self.hits_peer + self.hits_object
    }

    /// Blocks that were not here.
    pub fn missed(&self) -> u64 {
        self.misses.values().sum()
    }

    /// Adds the counts of another worker.
    pub fn merge(&mut self, other: Self) {
        self.requests += other.requests;
        for (node, count) in other.served {
            *self.served.entry(node).or_default() += count;
        }
        self.rerouted += other.rerouted;
        self.bytes_read += other.bytes_read;
        self.wrong_bytes += other.wrong_bytes;
        self.first_wrong = self.first_wrong.take().or(other.first_wrong);
        self.hits_host += other.hits_host;
        self.hits_disk += other.hits_disk;
        self.hits_peer += other.hits_peer;
        self.hits_object += other.hits_object;
        self.behind_gap += other.behind_gap;
        for (reason, count) in other.misses {
            *self.misses.entry(reason).or_default() += count;
        }
        self.put_blocks += other.put_blocks;
        self.durable_blocks += other.durable_blocks;
        self.retries += other.retries;
        self.read_host.merge(&other.read_host);
        self.read_disk.merge(&other.read_disk);
        self.read_peer.merge(&other.read_peer);
        self.read_object.merge(&other.read_object);
        self.put.merge(&other.put);
        self.put_durable.merge(&other.put_durable);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_workers_add_up() {
        let mut one = Tally { served: BTreeMap::from([(0, 3)]), ..Tally::default() };
        one.hit(Tier::Host.into(), Duration::from_micros(1));
        one.miss("never_stored");
        one.checked(10, 0, || unreachable!("nothing is wrong"));
        let mut two = one.clone();
        two.hit(Tier::Disk.into(), Duration::from_micros(300));
        two.hit(Source::Peer, Duration::from_micros(900));
        two.hit(Tier::Object.into(), Duration::from_micros(9000));
        two.served.insert(2, 1);
        two.checked(10, 3, || "block b".into());
        one.merge(two);
        assert_eq!((one.hits_host, one.hits_disk, one.missed(), one.blocks_read()), (2, 1, 2, 5));
        assert_eq!((one.hits_peer, one.hits_object), (1, 1));
        assert_eq!(one.served, BTreeMap::from([(0, 6), (2, 1)]));
        assert_eq!((one.bytes_read, one.wrong_bytes, one.first_wrong.as_deref()), (30, 3, Some("block b")));
        assert!((one.read_disk.quantile_us(0.5) - 300.0).abs() < 1.0);
        assert!((one.read_host.quantile_us(0.99) - 1.0).abs() < 0.01);
    }

    #[test]
    fn no_times_have_no_quantiles_and_huge_ones_are_kept_as_the_longest() {
        let mut times = Times::default();
        assert!(times.quantile_us(0.99).abs() < f64::EPSILON);
        times.record(Duration::from_secs(1 << 40));
        times.record(Duration::ZERO);
        assert_eq!(times.len(), 2);
    }
}
