//! The ordered log of what became readable and what ceased to be, with replay from a number.

use std::collections::VecDeque;

use kv_block::{BlockEvent, Epoch, EventKind};

/// A bounded log. Numbers start at 1 and have no gaps.
pub(crate) struct EventLog {
    epoch: Epoch,
    last: u64,
    kept: VecDeque<EventKind>,
    kept_max: usize,
}

impl EventLog {
    pub(crate) fn new(epoch: Epoch, kept_max: usize) -> Self {
        Self { epoch, last: 0, kept: VecDeque::new(), kept_max }
    }

    pub(crate) fn push(&mut self, kind: EventKind) {
        if self.kept.len() >= self.kept_max {
            self.kept.pop_front();
        }
        self.kept.push_back(kind);
        self.last += 1;
    }

    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// At most `count` events after number `after`; `None` when the log no longer reaches back to it, or
    /// never reached so far.
    pub(crate) fn after(&self, after: u64, count: usize) -> Option<Vec<BlockEvent>> {
        let first_kept = self.last - self.kept.len() as u64 + 1;
        if after > self.last || after + 1 < first_kept {
            return None;
        }
        let skip = (after + 1 - first_kept) as usize;
        let numbered = self.kept.iter().enumerate().skip(skip).take(count);
        Some(
            numbered
                .map(|(at, kind)| BlockEvent {
                    epoch: self.epoch,
                    number: first_kept + at as u64,
                    kind: *kind,
                })
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kv_block::Tier;

    #[test]
    fn replay_has_no_gaps_and_says_when_it_cannot_reach_back() {
        let mut log = EventLog::new(Epoch(1), 3);
        assert_eq!(log.after(0, 9), Some(vec![]));
        assert_eq!(log.after(1, 9), None, "a number from the future is of another life");
        for _ in 0..5 {
            log.push(EventKind::Cleared { tier: Tier::Host });
        }
        let numbers = |after| log.after(after, 9).map(|all| all.iter().map(|e| e.number).collect::<Vec<_>>());
        assert_eq!(numbers(1), None);
        assert_eq!(numbers(2), Some(vec![3, 4, 5]));
        assert_eq!(numbers(4), Some(vec![5]));
        assert_eq!(numbers(5), Some(vec![]));
        assert_eq!(log.after(2, 1).unwrap().len(), 1);
    }
}
