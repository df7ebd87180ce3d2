//! SIEVE: new slots enter at the front, a hand walks from the back; a slot with its bit set loses the bit
//! and stays where it is, one without leaves. Blocks read once in a long scan never get in the way of
//! blocks read again. (Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024.)
//!
//! Ours differs in one thing: a block that returns enters with its bit set. Conversations come back after
//! their blocks were evicted, and plain SIEVE forgets that; `examples/admission.rs` shows what it brings.

use kv_block::Priority;

use super::list::Lists;
use super::{Policy, SCAN_MAX};

/// SIEVE with one list and one hand per priority class.
#[derive(Default)]
pub struct Sieve {
    /// By class; the mark is the "visited" bit.
    lists: Lists<3>,
    /// Where the walk of each class goes on; `None` is the oldest slot.
    hands: [Option<u32>; 3],
}

impl Sieve {
    /// Walks on until `takes` agrees to a slot, at most once around and [`SCAN_MAX`] steps.
    fn walk(&mut self, class: usize, mut takes: impl FnMut(u32, &mut u8) -> bool) -> Option<u32> {
        for _ in 0..SCAN_MAX.min(self.lists.len(class)) {
            let at = self.hands[class].or(self.lists.oldest(class))?;
            self.hands[class] = self.lists.newer(at);
            if takes(at, self.lists.mark(at)?) {
                self.lists.unlink(at);
                return Some(at);
            }
        }
        None
    }
}

impl Policy for Sieve {
    fn insert(&mut self, slot: u32, class: Priority, returning: bool) {
        self.remove(slot);
        self.lists.push(class as usize, slot);
        if returning {
            self.touch(slot);
        }
    }

    fn touch(&mut self, slot: u32) {
        if let Some(visited) = self.lists.mark(slot) {
            *visited = 1;
        }
    }

    fn remove(&mut self, slot: u32) -> bool {
        let newer = self.lists.newer(slot);
        let Some(class) = self.lists.unlink(slot) else { return false };
        if self.hands[class] == Some(slot) {
            self.hands[class] = newer;
        }
        true
    }

    fn victim(&mut self, evictable: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
        (0..3).find_map(|class| {
            let unvisited = self.walk(class, |slot, visited| std::mem::take(visited) == 0 && evictable(slot));
            // All were visited or pinned: the next evictable one it is.
            unvisited.or_else(|| self.walk(class, |slot, _| evictable(slot)))
        })
    }

    fn len(&self) -> usize {
        self.lists.len_total()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hand_goes_on_behind_a_removed_slot() {
        let mut sieve = Sieve::default();
        (0..5).for_each(|slot| sieve.insert(slot, Priority::Normal, false));
        sieve.touch(0);
        sieve.touch(1);
        assert_eq!(sieve.victim(&mut |_| true), Some(2), "the hand passed 0 and 1 and took their bits");
        assert!(sieve.remove(3), "the hand stood there");
        assert_eq!(sieve.victim(&mut |_| true), Some(4));
        assert_eq!(sieve.victim(&mut |_| true), Some(0), "and begins again at the back");
    }

    #[test]
    fn a_returning_block_outlives_a_new_one() {
        let mut sieve = Sieve::default();
        sieve.insert(1, Priority::Normal, true);
        sieve.insert(2, Priority::Normal, false);
        assert_eq!(sieve.victim(&mut |_| true), Some(2));
    }
}
