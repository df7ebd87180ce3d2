//! Which block leaves a tier when room is needed.
//!
//! A [`Policy`] orders slots, not keys: a slot is a small number, so the whole state is a few linked lists
//! threaded through pages of 12-byte nodes and nothing is hashed on the way of a touch. What a slot holds,
//! whether somebody reads it, where its bytes lie, is known elsewhere and asked through a closure.
//!
//! What all policies promise:
//! - The lowest [`Priority`] class goes first; within a class the policy's own order decides.
//! - A victim was inserted, was not removed since, and the closure agreed. The policy forgets it.
//! - One call asks the closure about at most [`SCAN_MAX`] slots twice per class, so a tier that is pinned
//!   from end to end costs a bounded walk. The next call goes on where this one stopped: every slot that
//!   stays evictable is found after at most `len / SCAN_MAX` calls more. The price is that behind more than
//!   `SCAN_MAX` pinned slots in a row a higher class may lose a slot first.
//! - Slots that nobody inserted are ignored: touches come from a lossy log that workers write.

mod list;
mod lru;
mod s3fifo;
mod sieve;

use std::fmt;
use std::str::FromStr;

use kv_block::Priority;

pub use lru::Lru;
pub use s3fifo::S3Fifo;
pub use sieve::Sieve;

/// Most slots of a class that one walk of [`Policy::victim`] looks at.
pub const SCAN_MAX: usize = 128;

/// An order of slots, from which victims are taken.
pub trait Policy: Send {
    /// Takes in a slot that now holds a block of this class. `returning` says that the block was here
    /// before and is remembered (the catalog's ghosts know): it gets the standing of a block that was read.
    /// A slot that is known already starts anew.
    fn insert(&mut self, slot: u32, class: Priority, returning: bool);
    /// Notes that the slot's block was read.
    fn touch(&mut self, slot: u32);
    /// Forgets a slot; tells whether it was known.
    fn remove(&mut self, slot: u32) -> bool;
    /// Chooses a slot to empty and forgets it. `None` when the walk met nothing evictable.
    fn victim(&mut self, evictable: &mut dyn FnMut(u32) -> bool) -> Option<u32>;
    /// Slots known.
    fn len(&self) -> usize;
    /// Whether no slot is known.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Names a policy in the configuration.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum PolicyKind {
    /// [`Sieve`]: one bit per slot, resists scans.
    #[default]
    Sieve,
    /// [`S3Fifo`]: a probation queue before the main one.
    S3Fifo,
    /// [`Lru`]: what engines expect of themselves; for comparison.
    Lru,
}

impl PolicyKind {
    /// Every policy.
    pub const ALL: [Self; 3] = [Self::Sieve, Self::S3Fifo, Self::Lru];

    /// Name in configuration, metrics and text.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sieve => "sieve",
            Self::S3Fifo => "s3fifo",
            Self::Lru => "lru",
        }
    }

    /// An empty policy of this kind.
    pub fn build(self) -> Box<dyn Policy> {
        match self {
            Self::Sieve => Box::new(Sieve::default()),
            Self::S3Fifo => Box::new(S3Fifo::default()),
            Self::Lru => Box::new(Lru::default()),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no policy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no eviction policy `{text}`; there are sieve, s3fifo and lru")]
pub struct UnknownPolicy {
    /// What was given.
    pub text: String,
}

impl FromStr for PolicyKind {
    type Err = UnknownPolicy;
    fn from_str(text: &str) -> Result<Self, UnknownPolicy> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == text);
        known.ok_or_else(|| UnknownPolicy { text: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn each(check: impl Fn(&mut dyn Policy)) {
        for kind in PolicyKind::ALL {
            eprintln!("policy {kind}");
            check(&mut *kind.build());
        }
    }

    fn drain(policy: &mut dyn Policy) -> Vec<u32> {
        std::iter::from_fn(|| policy.victim(&mut |_| true)).collect()
    }

    #[test]
    fn names_are_read_back() {
        for kind in PolicyKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert_eq!("fifo".parse::<PolicyKind>(), Err(UnknownPolicy { text: "fifo".into() }));
    }

    #[test]
    fn untouched_slots_leave_in_order_of_arrival() {
        each(|policy| {
            (0..100).for_each(|slot| policy.insert(slot * 1000, Priority::Normal, false));
            assert_eq!(drain(policy), (0..100).map(|slot| slot * 1000).collect::<Vec<_>>());
            assert!(policy.is_empty());
        });
    }

    #[test]
    fn the_lowest_class_leaves_first_whatever_was_touched() {
        each(|policy| {
            for (slot, class) in
                [(1, Priority::High), (2, Priority::Low), (3, Priority::Normal), (4, Priority::Low)]
            {
                policy.insert(slot, class, false);
            }
            (0..5).for_each(|_| policy.touch(2));
            policy.touch(4);
            let order = drain(policy);
            assert!(order[..2].contains(&2) && order[..2].contains(&4), "{order:?}");
            assert_eq!(order[2..], [3, 1]);
        });
    }

    #[test]
    fn a_touched_slot_outlives_its_untouched_neighbours() {
        each(|policy| {
            (0..50).for_each(|slot| policy.insert(slot, Priority::Normal, false));
            policy.touch(0);
            policy.touch(0);
            let order = drain(policy);
            assert_eq!(order.len(), 50);
            assert_eq!(order.last(), Some(&0));
        });
    }

    #[test]
    fn a_pinned_tier_costs_a_bounded_walk() {
        each(|policy| {
            for slot in 0..30_000 {
                policy.insert(slot, Priority::ALL[slot as usize % 3], false);
                policy.touch(slot);
            }
            for _ in 0..10 {
                let mut asked = 0;
                let victim = policy.victim(&mut |_| {
                    asked += 1;
                    false
                });
                assert_eq!(victim, None);
                assert!(asked <= 2 * 3 * SCAN_MAX, "asked {asked} times");
            }
            assert_eq!(policy.len(), 30_000);
        });
    }

    #[test]
    fn one_evictable_slot_among_many_pinned_ones_is_found_in_the_end() {
        each(|policy| {
            (0..5_000).for_each(|slot| policy.insert(slot, Priority::Normal, false));
            for wanted in [0, 2_500, 4_999] {
                let calls = (0..5_000).find(|_| policy.victim(&mut |slot| slot == wanted) == Some(wanted));
                assert!(calls.is_some_and(|calls| calls <= 5_000 / SCAN_MAX + 1), "{wanted}: {calls:?}");
            }
        });
    }

    #[test]
    fn a_scan_does_not_drive_out_the_working_set() {
        // 60 hot slots are touched all the time while 2,000 others pass through once.
        for kind in [PolicyKind::Sieve, PolicyKind::S3Fifo] {
            let mut policy = kind.build();
            (0..60).for_each(|slot| policy.insert(slot, Priority::Normal, false));
            (0..60).for_each(|slot| policy.touch(slot));
            let mut lost = 0;
            for passing in 100..2_100 {
                if policy.len() >= 100 {
                    lost += u32::from(policy.victim(&mut |_| true).is_some_and(|slot| slot < 60));
                }
                policy.insert(passing, Priority::Normal, false);
                if passing % 20 == 0 {
                    (0..60).for_each(|slot| policy.touch(slot));
                }
            }
            assert_eq!(lost, 0, "{kind} gave up hot slots");
        }
    }

    #[test]
    fn touches_of_strange_slots_do_nothing() {
        each(|policy| {
            policy.insert(7, Priority::Normal, false);
            for slot in [0, 6, 8, 300, 1 << 20, u32::MAX - 1, u32::MAX] {
                policy.touch(slot);
                assert!(!policy.remove(slot));
            }
            assert_eq!(drain(policy), [7]);
        });
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u32, usize, bool),
        Touch(u32),
        Remove(u32),
        Pin(u32),
        Unpin(u32),
        Victim,
    }

    fn op() -> impl Strategy<Value = Op> {
        let slot = prop_oneof![4 => 0u32..40, 1 => 60_000u32..60_010];
        prop_oneof![
            4 => (slot.clone(), 0usize..3, any::<bool>()).prop_map(|(s, c, r)| Op::Insert(s, c, r)),
            3 => slot.clone().prop_map(Op::Touch),
            1 => slot.clone().prop_map(Op::Remove),
            1 => slot.clone().prop_map(Op::Pin),
            1 => slot.prop_map(Op::Unpin),
            3 => Just(Op::Victim),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn policies_agree_with_a_simple_model(ops in proptest::collection::vec(op(), 1..300)) {
            for kind in PolicyKind::ALL {
                let mut policy = kind.build();
                let mut known: BTreeMap<u32, Priority> = BTreeMap::new();
                let mut pinned = std::collections::BTreeSet::new();
                for op in &ops {
                    match *op {
                        Op::Insert(slot, class, returning) => {
                            policy.insert(slot, Priority::ALL[class], returning);
                            known.insert(slot, Priority::ALL[class]);
                        }
                        Op::Touch(slot) => policy.touch(slot),
                        Op::Remove(slot) => {
                            prop_assert_eq!(policy.remove(slot), known.remove(&slot).is_some());
                        }
                        Op::Pin(slot) => { pinned.insert(slot); }
                        Op::Unpin(slot) => { pinned.remove(&slot); }
                        Op::Victim => {
                            // Fewer slots than one walk sees, so the answer is exact.
                            let free = |slot: &u32| !pinned.contains(slot);
                            let lowest = known.iter().filter(|(slot, _)| free(slot)).map(|(_, class)| *class).min();
                            let victim = policy.victim(&mut |slot| free(&slot));
                            prop_assert_eq!(victim.is_some(), lowest.is_some(), "{}", kind);
                            if let Some(slot) = victim {
                                prop_assert!(free(&slot));
                                prop_assert_eq!(known.remove(&slot), lowest, "{} took the wrong class", kind);
                            }
                        }
                    }
                    prop_assert_eq!(policy.len(), known.len());
                }
                let mut rest = drain(&mut *policy);
                rest.sort_unstable();
                prop_assert_eq!(rest, known.into_keys().collect::<Vec<_>>());
            }
        }
    }
}
