//! Whether the store is worth asking. Failures in a row open the circuit, so that reads miss at once instead of
//! waiting; one try at a time closes it again.
//!
//! ```text
//!             strikes_max failures, none of them followed by an answer
//!   Closed ----------------------------------------------------------> Open until t    nobody is let through
//!     ^                                                                 |        ^
//!     | the try is answered                                      t has  |        | it is not: twice as long as
//!     |                                                          passed v        | last time, within bounds
//!     +-------------------------------------------------------------- Trying ----+ one at a time is let through
//! ```
//! An answer is whatever shows that the store works: bytes, but also that there is no such object. That it asks for
//! less is no failure: see [`crate::pace`].

use std::time::Duration;

use crate::random::Random;

/// When a circuit opens, and for how long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CircuitLimits {
    /// Failures in a row that open it.
    pub strikes_max: u32,
    /// How long it stays open at first.
    pub open_min: Duration,
    /// How long it stays open at most, jitter aside.
    pub open_max: Duration,
}

impl Default for CircuitLimits {
    /// 8 failures in a row; open for 0.5 s at first, 60 s at most.
    fn default() -> Self {
        Self { strikes_max: 8, open_min: Duration::from_millis(500), open_max: Duration::from_secs(60) }
    }
}

/// How a circuit stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Standing {
    /// Everything is let through.
    #[default]
    Closed,
    /// Nothing is.
    Open {
        /// Before this, on the clock of its owner.
        until: Duration,
    },
    /// One at a time is.
    Trying {
        /// One is under way.
        taken: bool,
    },
}

/// The health of a store.
#[derive(Clone, Debug)]
pub struct Circuit {
    limits: CircuitLimits,
    random: Random,
    standing: Standing,
    strikes: u32,
    /// Times it opened without an answer in between.
    openings: u32,
    opened: u64,
}

impl Circuit {
    /// The circuit of a store nothing is known about. The seed spreads the tries of many nodes.
    pub fn new(limits: CircuitLimits, seed: u64) -> Self {
        let standing = Standing::Closed;
        Self { limits, random: Random::new(seed), standing, strikes: 0, openings: 0, opened: 0 }
    }

    /// How it stands.
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// Times it opened since the beginning.
    pub fn opened(&self) -> u64 {
        self.opened
    }

    /// Whether one more request may go out at `now`. Time alone brings a circuit from open to trying, here; whoever is
    /// let through ends with [`Self::answered`], [`Self::struck`] or [`Self::dropped`].
    pub fn admit(&mut self, now: Duration) -> bool {
        match self.standing {
            Standing::Closed => true,
            Standing::Open { until } if now < until => false,
            Standing::Trying { taken: true } => false,
            Standing::Open { .. } | Standing::Trying { taken: false } => {
                self.standing = Standing::Trying { taken: true };
                true
            }
        }
    }

    /// The store answered.
    pub fn answered(&mut self) {
        self.strikes = 0;
        // What was sent before it opened and is answered now shows as much as a try.
        self.standing = Standing::Closed;
        self.openings = 0;
    }

    /// The store failed.
    pub fn struck(&mut self, now: Duration) {
        self.strikes = self.strikes.saturating_add(1);
        let opens = match self.standing {
            Standing::Closed => self.strikes >= self.limits.strikes_max,
            Standing::Trying { .. } => true,
            Standing::Open { .. } => false,
        };
        if opens {
            let doubled = self.limits.open_min.saturating_mul(1 << self.openings.min(20));
            let open = doubled.min(self.limits.open_max);
            let quarter = u64::try_from(open.as_micros() / 4).unwrap_or(u64::MAX);
            let jitter = Duration::from_micros(self.random.below(quarter.saturating_add(1)));
            self.standing = Standing::Open { until: now + open + jitter };
            self.openings = self.openings.saturating_add(1);
            self.opened += 1;
        }
    }

    /// A request ended without showing anything: it was dropped, or the store asked for less.
    pub fn dropped(&mut self) {
        if let Standing::Trying { taken } = &mut self.standing {
            *taken = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: CircuitLimits =
        CircuitLimits { strikes_max: 3, open_min: Duration::from_secs(1), open_max: Duration::from_secs(6) };

    fn at(second: u64) -> Duration {
        Duration::from_secs(second)
    }

    fn open() -> Circuit {
        let mut circuit = Circuit::new(LIMITS, 7);
        (0..3).for_each(|_| circuit.struck(at(0)));
        circuit
    }

    #[test]
    fn every_state_knows_every_event() {
        let closed = Circuit::new(LIMITS, 7);
        let mut trying = open();
        assert!(trying.admit(at(10)));
        let mut free = trying.clone();
        free.dropped();
        type Event = fn(&mut Circuit);
        let events: [Event; 4] = [
            |c| assert!(c.admit(at(20)) || c.standing == Standing::Trying { taken: true }),
            |c| c.answered(),
            |c| c.struck(at(20)),
            |c| c.dropped(),
        ];
        use Standing::{Closed, Open, Trying};
        let name = |standing| match standing {
            Closed => "closed",
            Open { .. } => "open",
            Trying { taken: true } => "taken",
            Trying { taken: false } => "free",
        };
        let table = [
            (closed, ["closed", "closed", "closed", "closed"]),
            (open(), ["taken", "closed", "open", "open"]),
            (trying, ["taken", "closed", "open", "free"]),
            (free, ["taken", "closed", "open", "free"]),
        ];
        for (from, wanted) in table {
            for (event, wanted) in events.into_iter().zip(wanted) {
                let mut circuit = from.clone();
                event(&mut circuit);
                assert_eq!(name(circuit.standing), wanted, "from {:?}", from.standing);
            }
        }
    }

    #[test]
    fn only_failures_in_a_row_open_it() {
        let mut circuit = Circuit::new(LIMITS, 7);
        for _ in 0..100 {
            circuit.struck(at(0));
            circuit.struck(at(0));
            circuit.answered();
        }
        assert_eq!((circuit.standing(), circuit.opened()), (Standing::Closed, 0));
    }

    #[test]
    fn it_stays_open_longer_each_time_and_one_at_a_time_tries() {
        let mut circuit = open();
        let mut now = at(0);
        for wanted in [1, 2, 4, 6, 6] {
            let Standing::Open { until } = circuit.standing() else { panic!("{circuit:?}") };
            let open = until - now;
            assert!(open >= at(wanted) && open <= at(wanted) * 5 / 4, "{open:?} for {wanted} s");
            assert!(!circuit.admit(until - Duration::from_micros(1)));
            now = until;
            assert!(circuit.admit(now) && !circuit.admit(now), "one at a time");
            circuit.struck(now);
        }
        assert_eq!(circuit.opened(), 6);
    }
}
