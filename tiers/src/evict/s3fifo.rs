//! S3-FIFO: new slots stand a part of the tier's time in a probation queue; only those read meanwhile go
//! on to the main queue, where a slot gets one more round for each read, three at most. Blocks that return
//! after they were evicted skip the probation: the catalog's ghosts do the work of the ghost queue.
//! (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.)

use kv_block::Priority;

use super::list::Lists;
use super::{Policy, SCAN_MAX};

const READS_MAX: u8 = 3;
/// The probation queue's share of a class, in tenths. One tenth is what the paper takes for web caches;
/// conversations return later than that, and three tenths hold more of them (`examples/admission.rs`).
const PROBATION_TENTHS: usize = 3;

/// S3-FIFO with two queues per priority class.
#[derive(Default)]
pub struct S3Fifo {
    /// `2 * class` is the probation queue of a class, the next one its main queue; the mark counts reads.
    lists: Lists<6>,
}

impl S3Fifo {
    /// Whose turn it is: probation as long as it has more than its share.
    fn on_probation(&self, class: usize) -> bool {
        let (probation, main) = (self.lists.len(2 * class), self.lists.len(2 * class + 1));
        main == 0 || probation * 10 > (probation + main) * PROBATION_TENTHS
    }

    /// Offers the oldest slot of a queue: it goes, or it starts (another) round in the main queue.
    fn step(&mut self, class: usize, probation: bool, takes: impl FnOnce(u32, u8) -> bool) -> Option<u32> {
        let main = 2 * class + 1;
        let slot = self.lists.oldest(main - usize::from(probation))?;
        let reads = *self.lists.mark(slot)?;
        let taken = takes(slot, reads);
        self.lists.unlink(slot);
        if taken {
            return Some(slot);
        }
        self.lists.push(main, slot);
        if !probation {
            *self.lists.mark(slot)? = reads.saturating_sub(1);
        }
        None
    }
}

impl Policy for S3Fifo {
    fn insert(&mut self, slot: u32, class: Priority, returning: bool) {
        self.lists.unlink(slot);
        self.lists.push(2 * class as usize + usize::from(returning), slot);
    }

    fn touch(&mut self, slot: u32) {
        if let Some(reads) = self.lists.mark(slot) {
            *reads = READS_MAX.min(*reads + 1);
        }
    }

    fn remove(&mut self, slot: u32) -> bool {
        self.lists.unlink(slot).is_some()
    }

    fn victim(&mut self, evictable: &mut dyn FnMut(u32) -> bool) -> Option<u32> {
        (0..3).find_map(|class| {
            let steps = SCAN_MAX.min(self.lists.len(2 * class) + self.lists.len(2 * class + 1));
            let unread = (0..steps).find_map(|_| {
                let probation = self.on_probation(class);
                self.step(class, probation, |slot, reads| reads == 0 && evictable(slot))
            });
            // All were read or pinned: the next evictable one of either queue.
            unread.or_else(|| {
                (0..steps).find_map(|at| {
                    let probation =
                        self.lists.len(2 * class + 1) == 0 || at % 2 == 0 && self.lists.len(2 * class) > 0;
                    self.step(class, probation, |slot, _| evictable(slot))
                })
            })
        })
    }

    fn len(&self) -> usize {
        self.lists.len_total()
    }
}
