//! Which block came before which in its prefix, as far as workers say.
//!
//! ```text
//!   put, reserve, acquire, prefetch: key, after --note--> [ in host memory, or on its way there ] --> forgotten
//! ```
//! The object tier keeps blocks of one prefix together, and fetches ahead; without one nothing is remembered. It is a hint and nothing more: workers may
//! say nothing, or nonsense, such as circles. Whoever follows it takes a bounded number of steps and depends on none.

use std::collections::HashMap;

use kv_block::BlockKey;
use kv_tiers::catalog::Catalog;

use crate::brain::{Brain, Pending};

/// What may be noted of blocks that are not here any more, beside as many as are here.
const SPARE: usize = 1024;

/// The block before each, where it is known.
#[derive(Default)]
pub(crate) struct Order {
    before: HashMap<BlockKey, BlockKey>,
}

impl Order {
    /// `after` comes before `key`; what was said last counts.
    pub(crate) fn note(&mut self, key: BlockKey, after: BlockKey) {
        if key != after {
            self.before.insert(key, after);
        }
    }

    pub(crate) fn before(&self, key: &BlockKey) -> Option<BlockKey> {
        self.before.get(key).copied()
    }

    pub(crate) fn forget(&mut self, key: &BlockKey) {
        if !self.before.is_empty() {
            self.before.remove(key);
        }
    }

    /// Forgets all that are not here, of whom nobody said so, once they may be most. `count` blocks are here.
    pub(crate) fn trim(&mut self, count: usize, mut is_here: impl FnMut(&BlockKey) -> bool) {
        if self.before.len() > count * 2 + SPARE {
            self.before.retain(|key, _| is_here(key));
        }
    }
}

impl Brain {
    /// The block before this one in its prefix, as far as somebody said: a hint.
    pub fn before(&self, key: &BlockKey) -> Option<BlockKey> {
        self.order.before(key)
    }

    /// Somebody says what comes before a block that he gives or wants.
    pub(crate) fn follows(&mut self, key: BlockKey, after: Option<BlockKey>) {
        let Some(after) = after.filter(|_| self.config.object.is_some()) else { return };
        if !is_here_soon(&self.pending, &self.catalog, &key) {
            return;
        }
        self.order.note(key, after);
        let (pending, catalog) = (&self.pending, &self.catalog);
        let count = catalog.counts().host as usize + pending.len();
        self.order.trim(count, |key| is_here_soon(pending, catalog, key));
    }

    /// A block did not come: what came before it is of no use, unless it comes another way.
    pub(crate) fn forget_order(&mut self, key: &BlockKey) {
        if self.config.object.is_some() && !is_here_soon(&self.pending, &self.catalog, key) {
            self.order.forget(key);
        }
    }
}

/// Whether a block is in host memory, or on its way there.
fn is_here_soon(pending: &HashMap<BlockKey, Pending>, catalog: &Catalog, key: &BlockKey) -> bool {
    pending.contains_key(key) || catalog.find(key).is_some_and(|entry| entry.host.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u64) -> BlockKey {
        BlockKey::from_halves([n, n])
    }

    #[test]
    fn what_was_said_last_counts_until_it_is_forgotten() {
        let mut order = Order::default();
        order.forget(&key(2));
        assert_eq!(order.before(&key(2)), None);
        order.note(key(2), key(9));
        order.note(key(2), key(1));
        order.note(key(3), key(2));
        assert_eq!((order.before(&key(3)), order.before(&key(2))), (Some(key(2)), Some(key(1))));
        assert_eq!(order.before(&key(1)), None);
        order.forget(&key(2));
        assert_eq!((order.before(&key(3)), order.before(&key(2))), (Some(key(2)), None));
    }

    #[test]
    fn no_block_comes_before_itself() {
        let mut order = Order::default();
        order.note(key(1), key(1));
        assert_eq!(order.before(&key(1)), None);
        order.note(key(1), key(2));
        order.note(key(2), key(1));
        assert_eq!(order.before(&key(1)), Some(key(2)), "a circle is for whoever follows it");
    }

    #[test]
    fn blocks_that_are_not_here_are_forgotten_before_they_are_many() {
        const HERE: u64 = 100;
        let (mut order, mut trims) = (Order::default(), 0);
        for n in 1..100_000 {
            order.note(key(n), key(n - 1));
            let before = order.before.len();
            order.trim(HERE as usize, |one| (1..=HERE).any(|n| key(n) == *one));
            assert!(order.before.len() <= 2 * HERE as usize + SPARE);
            trims += u32::from(order.before.len() < before);
        }
        assert!((1..=100).contains(&trims), "{trims} times");
        assert!((1..=HERE).all(|n| order.before(&key(n)) == Some(key(n - 1))));
    }
}
