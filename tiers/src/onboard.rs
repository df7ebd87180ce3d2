//! Up a tier: one read for each block however many ask for it, within the budget of what may be under way.
//!
//! ```text
//!   join(key) --- nobody reads it yet, budget has room --> Start(permit)   submit the read
//!             --- somebody does ------------------------> Joined           wait for the same read
//!             --- budget or waiting room is full --------> Busy(rejected)  miss `overloaded`, with a hint
//!   finish(key) gives everybody who waits, whatever came of the read
//! ```
//! A waiter that gives up leaves; the read goes on and its block is welcome in the host tier.

use std::collections::HashMap;

use kv_block::BlockKey;

use crate::budget::{Budget, Limit, Permit, Rejected};

/// What a reader is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Join {
    /// Begin to read the block; call [`Onboarding::finish`] when that ended.
    Start,
    /// It is on its way.
    Joined,
    /// Too much is on its way.
    Busy(Rejected),
}

struct Flight<W> {
    waiters: Vec<W>,
    _permit: Permit,
}

/// Blocks on their way up and who waits for each. `W` names a waiter.
pub struct Onboarding<W> {
    flights: HashMap<BlockKey, Flight<W>>,
    budget: Budget,
    waiting: usize,
    waiters_max: usize,
}

impl<W> Onboarding<W> {
    /// Reads bounded by `budget`, with `waiters_max` waiters in all.
    pub fn new(budget: Budget, waiters_max: usize) -> Self {
        Self { flights: HashMap::new(), budget, waiting: 0, waiters_max }
    }

    /// Asks for a block of `bytes`. Without a waiter it is a prefetch.
    pub fn join(&mut self, key: &BlockKey, bytes: u32, waiter: Option<W>) -> Join {
        if waiter.is_some() && self.waiting >= self.waiters_max {
            let (used, max) = (self.waiting as u64, self.waiters_max as u64);
            let retry_hint = self.budget.retry_hint();
            return Join::Busy(Rejected { limit: Limit::Ops, wanted: 1, used, max, retry_hint });
        }
        let count = usize::from(waiter.is_some());
        let joined = match self.flights.get_mut(key) {
            Some(flight) => {
                flight.waiters.extend(waiter);
                Join::Joined
            }
            None => match self.budget.reserve(bytes.into()) {
                Err(rejected) => return Join::Busy(rejected),
                Ok(permit) => {
                    let flight = Flight { waiters: waiter.into_iter().collect(), _permit: permit };
                    self.flights.insert(*key, flight);
                    Join::Start
                }
            },
        };
        self.waiting += count;
        joined
    }

    /// The read ended. Gives everybody who waits for it; its part of the budget is free again.
    pub fn finish(&mut self, key: &BlockKey) -> Vec<W> {
        let waiters = self.flights.remove(key).map_or_else(Vec::new, |flight| flight.waiters);
        self.waiting -= waiters.len();
        waiters
    }

    /// Waiters for which `gone` is true wait no longer; gives how many those were.
    pub fn leave(&mut self, mut gone: impl FnMut(&BlockKey, &W) -> bool) -> usize {
        let before = self.waiting;
        for (key, flight) in &mut self.flights {
            let waiters = flight.waiters.len();
            flight.waiters.retain(|waiter| !gone(key, waiter));
            self.waiting -= waiters - flight.waiters.len();
        }
        before - self.waiting
    }

    /// Whether a block is on its way.
    pub fn contains(&self, key: &BlockKey) -> bool {
        self.flights.contains_key(key)
    }

    /// Blocks on their way.
    pub fn len(&self) -> usize {
        self.flights.len()
    }

    /// Whether nothing is on its way.
    pub fn is_empty(&self) -> bool {
        self.flights.is_empty()
    }

    /// Everybody who waits, for any block.
    pub fn waiting(&self) -> usize {
        self.waiting
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const A: BlockKey = BlockKey([1; 16]);
    const B: BlockKey = BlockKey([2; 16]);
    const C: BlockKey = BlockKey([3; 16]);

    fn onboarding(bytes: u64, ops: u64, waiters: usize) -> Onboarding<u32> {
        Onboarding::new(Budget::new(bytes, ops, Duration::from_millis(2)), waiters)
    }

    #[test]
    fn readers_of_one_block_share_one_read() {
        let mut onboarding = onboarding(1000, 10, 10);
        assert_eq!(onboarding.join(&A, 100, Some(1)), Join::Start);
        assert_eq!(onboarding.join(&A, 100, Some(2)), Join::Joined);
        assert_eq!(onboarding.join(&A, 100, None), Join::Joined);
        assert_eq!((onboarding.len(), onboarding.waiting()), (1, 2));
        assert_eq!(onboarding.finish(&A), [1, 2]);
        assert_eq!((onboarding.len(), onboarding.waiting()), (0, 0));
        assert_eq!(onboarding.finish(&A), [0; 0], "ends once");
        assert_eq!(onboarding.join(&A, 100, None), Join::Start);
    }

    #[test]
    fn a_read_waits_for_nothing_when_the_budget_is_full() {
        let mut onboarding = onboarding(250, 10, 10);
        assert_eq!(onboarding.join(&A, 200, Some(1)), Join::Start);
        let Join::Busy(rejected) = onboarding.join(&B, 100, Some(2)) else { panic!("beyond the budget") };
        assert_eq!((rejected.limit, rejected.used, rejected.max), (Limit::Bytes, 200, 250));
        assert_eq!(rejected.retry_hint, Duration::from_millis(2));
        assert_eq!(onboarding.join(&A, 200, Some(3)), Join::Joined, "costs nothing");
        onboarding.finish(&A);
        assert_eq!(onboarding.join(&B, 100, Some(2)), Join::Start);
    }

    #[test]
    fn the_waiting_room_is_bounded() {
        let mut onboarding = onboarding(1000, 10, 2);
        assert_eq!(onboarding.join(&A, 1, Some(1)), Join::Start);
        assert_eq!(onboarding.join(&A, 1, Some(2)), Join::Joined);
        for key in [A, B] {
            assert!(matches!(onboarding.join(&key, 1, Some(3)), Join::Busy(_)));
        }
        assert_eq!(onboarding.join(&C, 1, None), Join::Start, "a prefetch takes no room");
        assert_eq!(onboarding.leave(|_, waiter| *waiter == 1), 1);
        assert_eq!(onboarding.join(&B, 1, Some(3)), Join::Start);
    }

    #[test]
    fn a_read_goes_on_when_its_waiters_left() {
        let mut onboarding = onboarding(1000, 10, 10);
        onboarding.join(&A, 1, Some(1));
        onboarding.join(&B, 1, Some(1));
        assert_eq!(onboarding.leave(|key, _| *key == A), 1);
        assert!(onboarding.contains(&A) && onboarding.contains(&B));
        assert_eq!(onboarding.finish(&A), [0; 0]);
        assert_eq!(onboarding.finish(&B), [1]);
    }
}
