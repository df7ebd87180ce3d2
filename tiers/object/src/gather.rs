//! What is read together and what is read ahead, for whoever reads on behalf of many. Plain state: time is told.
//!
//! Searches for blocks come one by one, and neighbours in a pack cost one request only if they are asked for together:
//! so the first one waits a moment for others. Whoever reads the head of a prefix reads the rest of it next: so what
//! follows a block in its pack is asked for with it, once.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use kv_block::BlockKey;

/// How long blocks wait for each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GatherLimits {
    /// How long the first one waits.
    pub wait_max: Duration,
    /// With so many bytes it waits no longer.
    pub bytes_max: u64,
}

impl Default for GatherLimits {
    /// Half a millisecond, 16 MiB.
    fn default() -> Self {
        Self { wait_max: Duration::from_micros(500), bytes_max: 16 << 20 }
    }
}

/// Blocks that are read together soon.
#[derive(Debug)]
pub struct Gather<T> {
    limits: GatherLimits,
    waiting: Vec<T>,
    bytes: u64,
    since: Option<Instant>,
}

impl<T> Gather<T> {
    /// Nothing waits.
    pub fn new(limits: GatherLimits) -> Self {
        Self { limits, waiting: Vec::new(), bytes: 0, since: None }
    }

    /// A block of this length is to be read.
    pub fn add(&mut self, now: Instant, block: T, bytes: u32) {
        self.waiting.push(block);
        self.bytes += u64::from(bytes);
        self.since.get_or_insert(now);
    }

    /// Blocks that nobody wants any more do not wait.
    pub fn retain(&mut self, wanted: impl FnMut(&T) -> bool) {
        self.waiting.retain(wanted);
    }

    /// When the first one has waited long enough.
    pub fn due_at(&self) -> Option<Instant> {
        self.since.map(|since| since + self.limits.wait_max)
    }

    /// All of them, in the order of coming, once they have waited long enough; nothing before that.
    pub fn take(&mut self, now: Instant) -> Vec<T> {
        let waited = self.due_at().is_some_and(|due| due <= now);
        if !waited && self.bytes < self.limits.bytes_max {
            return Vec::new();
        }
        (self.bytes, self.since) = (0, None);
        std::mem::take(&mut self.waiting)
    }
}

/// Blocks that are remembered as asked for ahead; when there are more, they are forgotten.
const AHEAD_MAX: usize = 1 << 16;

/// What was asked for because of another block, so that what follows it is not asked for in turn.
#[derive(Debug, Default)]
pub struct Ahead {
    asked: HashSet<BlockKey>,
}

impl Ahead {
    /// Somebody looks for this block: what is to be asked for with it, of those that [`crate::Tier::ahead`] says follow
    /// it. Nothing, when it was itself asked for that way. `is_absent` says which of them are not here.
    pub fn with(
        &mut self,
        key: &BlockKey,
        behind: impl FnOnce() -> Vec<BlockKey>,
        is_absent: impl FnOnce(&[BlockKey]) -> Vec<bool>,
    ) -> Vec<BlockKey> {
        if self.asked.remove(key) {
            return Vec::new();
        }
        let mut keys = behind();
        keys.retain(|key| !self.asked.contains(key));
        let mut absent = is_absent(&keys).into_iter();
        keys.retain(|_| absent.next() == Some(true));
        if self.asked.len() + keys.len() > AHEAD_MAX {
            self.asked.clear();
        }
        self.asked.extend(&keys);
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_wait_for_each_other_but_not_for_long_and_not_for_many() {
        let limits = GatherLimits { wait_max: Duration::from_micros(500), bytes_max: 100 };
        let (mut gather, start) = (Gather::new(limits), tokio::time::Instant::now().into_std());
        let at = |micros| start + Duration::from_micros(micros);
        assert_eq!((gather.due_at(), gather.take(start)), (None, vec![]));
        gather.add(at(0), 'a', 10);
        gather.add(at(400), 'b', 10);
        gather.retain(|one| *one != 'a');
        assert!(gather.take(at(499)).is_empty());
        assert_eq!(gather.due_at(), Some(at(500)));
        assert_eq!(gather.take(at(500)), ['b']);
        assert_eq!(gather.due_at(), None);
        gather.add(at(600), 'c', 60);
        assert!(gather.take(at(600)).is_empty());
        gather.add(at(601), 'd', 40);
        assert_eq!(gather.take(at(601)), ['c', 'd']);
    }

    #[test]
    fn what_follows_is_asked_for_once_and_not_in_turn() {
        let key = |n: u8| BlockKey([n; 16]);
        let mut ahead = Ahead::default();
        let here = |keys: &[BlockKey]| keys.iter().map(|one| *one != key(3)).collect();
        let behind = || vec![key(2), key(3), key(4)];
        assert_eq!(ahead.with(&key(1), behind, here), [key(2), key(4)]);
        assert_eq!(ahead.with(&key(1), behind, here), [], "they are on their way");
        let never = || -> Vec<BlockKey> { panic!("it was asked for because of another") };
        assert_eq!(ahead.with(&key(2), never, here), []);
        assert_eq!(ahead.with(&key(2), || vec![key(3), key(4), key(5)], here), [key(5)], "now by itself");
    }

    #[test]
    fn what_is_remembered_has_a_bound() {
        let mut ahead = Ahead::default();
        for n in 0..3 * AHEAD_MAX as u64 {
            let behind = || vec![BlockKey::from_halves([n, 1])];
            ahead.with(&BlockKey::from_halves([n, 0]), behind, |keys| vec![true; keys.len()]);
            assert!(ahead.asked.len() <= AHEAD_MAX);
        }
    }
}
