//! Least recently used, as engines do it: the comparison that the other policies must beat.

use kv_block::Priority;
use lru::LruCache;

use super::{Policy, SCAN_MAX};

/// LRU with one order per priority class. A slot that cannot leave when its turn comes counts as used.
pub struct Lru {
    classes: [LruCache<u32, ()>; 3],
}

impl Default for Lru {
    fn default() -> Self {
        Self { classes: std::array::from_fn(|_| LruCache::unbounded()) }
    }
}

impl Policy for Lru {
    fn insert(&mut self, slot: u32, class: Priority, _returning: bool) {
        self.remove(slot);
        self.classes[class as usize].put(slot, ());
    }

    fn touch(&mut self, slot: u32) {
        self.classes.iter_mut().any(|class| class.get(&slot).is_some());
    }

    fn remove(&mut self, slot: u32) -> bool {
        self.classes.iter_mut().any(|class| class.pop(&slot).is_some())
    }

    fn victim(&mut self, evictable: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
        self.classes.iter_mut().find_map(|class| {
            (0..SCAN_MAX.min(class.len())).find_map(|_| {
                let (&slot, ()) = class.peek_lru()?;
                if evictable(slot) {
                    class.pop(&slot);
                    return Some(slot);
                }
                class.promote(&slot);
                None
            })
        })
    }

    fn len(&self) -> usize {
        self.classes.iter().map(LruCache::len).sum()
    }
}
