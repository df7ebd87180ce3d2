//! When a path besides TCP that is down is asked for again.
//!
//! ```text
//!   asked ---ends are joined---> joined ---a block came---> forgotten: all is well
//!     ^  |                         |
//!     |  | it was refused          | it broke
//!     |  v                         v
//!     +--- down: for PAUSE_MIN at first, then for twice as long as the last time, at most PAUSE_MAX
//! ```
//! That both ends are there says nothing of the network between them, so only a block ends the doubling.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kv_transport::reader::PathId;

/// How long a path stays down before it is asked for again: at first, and at most.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The paths to one peer that have not carried a block yet, or not again.
#[derive(Default)]
pub(super) struct Mending {
    paths: BTreeMap<PathId, Pause>,
}

#[derive(Default)]
struct Pause {
    /// The last one; none for a path that was never down.
    last: Duration,
    /// When it is asked for again. `None`: its ends are joined, and this one says when it is over.
    due: Option<Instant>,
}

impl Pause {
    fn next(&self) -> Duration {
        (2 * self.last).clamp(PAUSE_MIN, PAUSE_MAX)
    }
}

impl Mending {
    /// It was asked for. Every ask is answered while the connection lasts; one that is not is asked again, so late
    /// that no answer to the first can come yet.
    pub(super) fn asked(&mut self, path: PathId, now: Instant) {
        self.paths.entry(path).or_default().due = Some(now + PAUSE_MAX);
    }

    /// Both ends are there.
    pub(super) fn joined(&mut self, path: PathId) {
        self.paths.entry(path).or_default().due = None;
    }

    /// It was refused, or broke. Gives after how long it is due.
    pub(super) fn down(&mut self, path: PathId, now: Instant) -> Duration {
        let pause = self.paths.entry(path).or_default();
        pause.last = pause.next();
        pause.due = Some(now + pause.last);
        pause.last
    }

    /// A block came by it.
    pub(super) fn carried(&mut self, path: PathId) {
        self.paths.remove(&path);
    }

    /// Takes what is due: each is asked for now.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<PathId> {
        let due = self.paths.iter_mut().filter(|(_, pause)| pause.due.is_some_and(|due| due <= now));
        due.map(|(path, pause)| {
            pause.due = None;
            *path
        })
        .collect()
    }

    pub(super) fn next_due(&self) -> Option<Instant> {
        self.paths.values().filter_map(|pause| pause.due).min()
    }

    /// The connection is over, and the paths with it.
    pub(super) fn clear(&mut self) {
        self.paths.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: PathId = PathId(1);

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Asked,
        Joined,
        Down,
        Carried,
        Clear,
    }
    use Event::*;

    /// Why, what comes at which second, and when the path is due after each.
    type Case<'a> = (&'a str, &'a [(u64, Event)], &'a [Option<u64>]);

    /// When the path is due, in seconds, after each of these came at its second.
    fn dues(events: &[(u64, Event)]) -> Vec<Option<u64>> {
        let (zero, mut mending) = (Instant::now(), Mending::default());
        let after = |(at, event): &(u64, Event)| {
            let now = zero + Duration::from_secs(*at);
            match event {
                Asked => mending.asked(PATH, now),
                Joined => mending.joined(PATH),
                Down => assert_eq!(Some(now + mending.down(PATH, now)), mending.next_due()),
                Carried => mending.carried(PATH),
                Clear => mending.clear(),
            }
            mending.next_due().map(|due| (due - zero).as_secs())
        };
        events.iter().map(after).collect()
    }

    #[test]
    fn a_path_is_asked_for_again_when_its_pause_is_over() {
        let refused = [0, 1, 3, 7, 15, 31, 63, 123, 183].map(|at| (at, Down));
        let table: [Case<'_>; 6] = [
            (
                "each refusal makes the pause twice as long, up to a minute",
                &refused,
                &[1, 3, 7, 15, 31, 63, 123, 183, 243].map(Some),
            ),
            (
                "so does a path whose ends are there and that broke before it carried anything",
                &[(0, Down), (1, Asked), (2, Joined), (9, Down), (11, Asked), (12, Joined), (20, Down)],
                &[Some(1), Some(61), None, Some(11), Some(71), None, Some(24)],
            ),
            (
                "a block makes all of it forgotten",
                &[(0, Down), (1, Down), (3, Asked), (3, Joined), (4, Carried), (9, Down)],
                &[Some(1), Some(3), Some(63), None, None, Some(10)],
            ),
            (
                "a path that carries has nothing to wait for",
                &[(0, Asked), (0, Joined), (1, Carried)],
                &[Some(60), None, None],
            ),
            ("an answer that never comes is not waited for without end", &[(5, Asked)], &[Some(65)]),
            (
                "another connection begins anew",
                &[(0, Down), (1, Down), (2, Clear), (9, Down)],
                &[Some(1), Some(3), None, Some(10)],
            ),
        ];
        for (why, events, wanted) in table {
            assert_eq!(dues(events), wanted, "{why}");
        }
    }

    #[test]
    fn what_is_due_is_taken_once_and_each_path_has_its_own_time() {
        let zero = Instant::now();
        let at = |seconds| zero + Duration::from_secs(seconds);
        let mut mending = Mending::default();
        mending.down(PathId(1), at(0));
        mending.down(PathId(2), at(0));
        mending.down(PathId(2), at(1));
        assert_eq!(mending.take_due(zero), [], "nothing is due before its time");
        assert_eq!(mending.take_due(at(1)), [PathId(1)]);
        assert_eq!(mending.take_due(at(1)), [], "it was taken");
        assert_eq!(mending.next_due(), Some(at(3)));
        assert_eq!(mending.take_due(at(9)), [PathId(2)]);
        assert_eq!(mending.next_due(), None);
    }
}
