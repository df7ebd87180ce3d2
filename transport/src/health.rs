//! Whether a peer is worth asking. Strikes open a circuit, so that wants miss at once instead of waiting; one try at
//! a time closes it again.
//!
//! ```text
//!             strikes_max strikes within `window`
//!   Closed -------------------------------------> Open until t     nobody is let through
//!     ^                                            |        ^
//!     | the try proves                     t has   |        | a strike: twice as long as last time,
//!     | what was in doubt                  passed  v        | within bounds, and some jitter
//!     +------------------------------------------ Trying ---+      one at a time is let through
//! ```
//! What was in doubt decides what proves: a peer that could not be reached has to welcome us, one that fell silent
//! or broke the rules has to answer, one that let wants run out has to answer one, and one that sent damaged bytes, or
//! none, has to send good ones.

use std::collections::VecDeque;
use std::time::Duration;

use crate::Micros;
use crate::random::Random;

/// What a peer did wrong.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Strike {
    /// No connection came about, or no welcome in time.
    Unreachable,
    /// It did not take the connection, or is not who it should be.
    Refused,
    /// The connection ended under us.
    Broken,
    /// It said nothing although there was something to say.
    Silent,
    /// It broke the rules of the protocol.
    Rules,
    /// A read of its memory did not come back after it was cancelled.
    Stuck,
    /// It said something, and nothing about what was wanted of it.
    Unanswered,
    /// It let us read, and nothing could be read.
    Unread,
    /// It sent bytes that are not those it promised.
    Corrupt,
}

impl Strike {
    /// Every kind.
    pub const ALL: [Self; 9] = [
        Self::Unreachable,
        Self::Refused,
        Self::Broken,
        Self::Silent,
        Self::Rules,
        Self::Stuck,
        Self::Unanswered,
        Self::Unread,
        Self::Corrupt,
    ];

    /// Name in metrics and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Refused => "refused",
            Self::Broken => "broken",
            Self::Silent => "silent",
            Self::Rules => "rules",
            Self::Stuck => "stuck",
            Self::Unanswered => "unanswered",
            Self::Unread => "unread",
            Self::Corrupt => "corrupt",
        }
    }

    /// What makes up for it.
    fn needs(self) -> Proof {
        match self {
            Self::Unreachable | Self::Refused => Proof::Welcomed,
            Self::Broken | Self::Silent | Self::Rules | Self::Stuck => Proof::Answered,
            Self::Unanswered => Proof::Settled,
            Self::Unread | Self::Corrupt => Proof::Landed,
        }
    }
}

/// What a peer did right, each worth more than the one before.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Proof {
    /// It took a connection.
    Welcomed,
    /// It answered what it was asked.
    Answered,
    /// It said what becomes of a want.
    Settled,
    /// Bytes of it arrived and were right.
    Landed,
}

/// When a circuit opens, and for how long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HealthLimits {
    /// Strikes that open it.
    pub strikes_max: usize,
    /// Within this time.
    pub window: Duration,
    /// How long it stays open at first.
    pub backoff_min: Duration,
    /// How long it stays open at most, jitter aside.
    pub backoff_max: Duration,
}

impl Default for HealthLimits {
    /// 3 strikes in 30 s; open for 0.5 s at first, 30 s at most.
    fn default() -> Self {
        Self {
            strikes_max: 3,
            window: Duration::from_secs(30),
            backoff_min: Duration::from_millis(500),
            backoff_max: Duration::from_secs(30),
        }
    }
}

/// How a circuit stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Circuit {
    /// Everything is let through.
    #[default]
    Closed,
    /// Nothing is.
    Open {
        /// Before this.
        until: Micros,
    },
    /// One at a time is.
    Trying,
}

/// Whether something may go to the peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admitted {
    /// As any other.
    Yes,
    /// As the one try: whoever it is says [`Health::freed`] when it has ended.
    Try,
    /// Not now.
    No,
}

/// A peer's health.
#[derive(Debug)]
pub struct Health {
    limits: HealthLimits,
    random: Random,
    circuit: Circuit,
    /// A try is under way.
    trying: bool,
    needs: Proof,
    /// The newest strikes, `strikes_max` at most.
    recent: VecDeque<(Micros, Strike)>,
    /// Times it opened since it was last well for longer than `window`.
    openings: u32,
    closed_at: Option<Micros>,
    strikes: u64,
    opened: u64,
    last: Option<(Strike, String)>,
}

impl Health {
    /// The health of a peer nothing is known about. The seed spreads retries of many readers.
    pub fn new(limits: HealthLimits, seed: u64) -> Self {
        Self {
            limits,
            random: Random::new(seed),
            circuit: Circuit::Closed,
            trying: false,
            needs: Proof::Welcomed,
            recent: VecDeque::new(),
            openings: 0,
            closed_at: None,
            strikes: 0,
            opened: 0,
            last: None,
        }
    }

    /// How the circuit stands.
    pub fn circuit(&self) -> Circuit {
        self.circuit
    }

    /// Strikes since the beginning.
    pub fn strikes(&self) -> u64 {
        self.strikes
    }

    /// Times the circuit opened since the beginning.
    pub fn opened(&self) -> u64 {
        self.opened
    }

    /// The newest strike, in words too.
    pub fn last(&self) -> Option<&(Strike, String)> {
        self.last.as_ref()
    }

    /// Whether one more may go to the peer. Time alone brings a circuit from open to trying, here.
    pub fn admit(&mut self, now: Micros) -> Admitted {
        match self.circuit {
            Circuit::Closed => return Admitted::Yes,
            Circuit::Open { until } if now < until => return Admitted::No,
            Circuit::Open { .. } => self.circuit = Circuit::Trying,
            Circuit::Trying if self.trying => return Admitted::No,
            Circuit::Trying => {}
        }
        self.trying = true;
        Admitted::Try
    }

    /// The try has ended, whatever it proved.
    pub fn freed(&mut self) {
        self.trying = false;
    }

    /// Whether it is open and may be tried again.
    pub fn is_due(&self, now: Micros) -> bool {
        matches!(self.circuit, Circuit::Open { until } if until <= now)
    }

    /// Whether a try is under way.
    pub fn is_trying(&self) -> bool {
        self.trying
    }

    /// The peer did something right.
    pub fn proved(&mut self, now: Micros, proof: Proof) {
        if self.circuit == Circuit::Trying && proof >= self.needs {
            self.circuit = Circuit::Closed;
            self.trying = false;
            self.closed_at = Some(now);
            self.recent.clear();
        }
    }

    /// The peer did something wrong.
    pub fn strike(&mut self, now: Micros, strike: Strike, why: String) {
        self.strikes += 1;
        self.last = Some((strike, why));
        if self.recent.len() >= self.limits.strikes_max {
            self.recent.pop_front();
        }
        self.recent.push_back((now, strike));
        let window = self.limits.window;
        let open = match self.circuit {
            Circuit::Open { .. } => false,
            Circuit::Trying => true,
            Circuit::Closed => {
                let oldest = self.recent.front().map_or(now, |(at, _)| *at);
                self.recent.len() >= self.limits.strikes_max && now.since(oldest) <= window
            }
        };
        if !open {
            return;
        }
        if self.closed_at.take().is_some_and(|at| now.since(at) > window) {
            self.openings = 0;
        }
        let needs = self.recent.iter().map(|(_, strike)| strike.needs()).max();
        self.needs = needs.unwrap_or(Proof::Welcomed);
        self.circuit = Circuit::Open { until: now.after(self.backoff()) };
        self.trying = false;
        self.openings += 1;
        self.opened += 1;
    }

    /// How long the next opening lasts: doubled each time, within bounds, and up to a quarter more.
    fn backoff(&mut self) -> Duration {
        let doubled = self.limits.backoff_min.saturating_mul(1 << self.openings.min(20));
        let backoff = doubled.min(self.limits.backoff_max);
        let quarter = u64::try_from(backoff.as_micros() / 4).unwrap_or(u64::MAX);
        backoff + Duration::from_micros(self.random.below(quarter.saturating_add(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HealthLimits = HealthLimits {
        strikes_max: 3,
        window: Duration::from_secs(10),
        backoff_min: Duration::from_secs(1),
        backoff_max: Duration::from_secs(6),
    };

    fn second(at: u64) -> Micros {
        Micros(at * 1_000_000)
    }

    fn struck(strike: Strike, at: &[u64]) -> Health {
        let mut health = Health::new(LIMITS, 7);
        at.iter().for_each(|at| health.strike(second(*at), strike, "said so".into()));
        health
    }

    #[test]
    fn strikes_open_it_only_when_they_come_close_together() {
        for (at, open) in
            [(&[0, 1][..], false), (&[0, 1, 2], true), (&[0, 5, 11], false), (&[0, 5, 11, 12], true)]
        {
            let health = struck(Strike::Unreachable, at);
            assert_eq!(matches!(health.circuit(), Circuit::Open { .. }), open, "{at:?}");
        }
    }

    #[test]
    fn what_was_in_doubt_decides_what_proves() {
        use Proof::{Answered, Landed, Settled, Welcomed};
        let table = [
            (Strike::Unreachable, [true; 4]),
            (Strike::Refused, [true; 4]),
            (Strike::Broken, [false, true, true, true]),
            (Strike::Silent, [false, true, true, true]),
            (Strike::Rules, [false, true, true, true]),
            (Strike::Stuck, [false, true, true, true]),
            (Strike::Unanswered, [false, false, true, true]),
            (Strike::Unread, [false, false, false, true]),
            (Strike::Corrupt, [false, false, false, true]),
        ];
        assert!(table.iter().map(|(strike, _)| *strike).eq(Strike::ALL));
        for (strike, closes) in table {
            for (proof, closes) in [Welcomed, Answered, Settled, Landed].into_iter().zip(closes) {
                let mut health = struck(strike, &[0, 0, 0]);
                health.proved(second(0), proof);
                assert!(
                    matches!(health.circuit(), Circuit::Open { .. }),
                    "nothing closes it while it is open"
                );
                assert_eq!(health.admit(second(2)), Admitted::Try);
                health.proved(second(2), proof);
                assert_eq!(health.circuit() == Circuit::Closed, closes, "{strike:?} and {proof:?}");
            }
        }
    }

    #[test]
    fn one_at_a_time_tries() {
        let mut health = struck(Strike::Corrupt, &[0, 0, 0]);
        assert_eq!(health.admit(second(0)), Admitted::No);
        assert_eq!([0; 3].map(|_| health.admit(second(2))), [Admitted::Try, Admitted::No, Admitted::No]);
        health.freed();
        assert_eq!([0; 2].map(|_| health.admit(second(2))), [Admitted::Try, Admitted::No]);
        health.proved(second(2), Proof::Landed);
        assert_eq!([0; 2].map(|_| health.admit(second(2))), [Admitted::Yes, Admitted::Yes]);
    }

    #[test]
    fn it_stays_open_twice_as_long_each_time_within_bounds() {
        let mut health = struck(Strike::Silent, &[0, 0]);
        let (mut now, mut seconds) = (second(0), Vec::new());
        for _ in 0..5 {
            health.strike(now, Strike::Silent, String::new());
            let Circuit::Open { until } = health.circuit() else { panic!("{health:?}") };
            seconds.push(until.since(now).as_millis());
            now = until;
            assert_eq!(health.admit(now), Admitted::Try);
        }
        for (millis, least) in seconds.iter().zip([1000, 2000, 4000, 6000, 6000]) {
            assert!((least..=least * 5 / 4).contains(millis), "{seconds:?}");
        }
        health.proved(now, Proof::Answered);
        (0..3).for_each(|_| health.strike(now, Strike::Silent, String::new()));
        let Circuit::Open { until } = health.circuit() else { panic!("{health:?}") };
        assert!(until.since(now) >= LIMITS.backoff_max, "it was well for no time at all");
        health.admit(until);
        health.proved(until, Proof::Answered);
        let later = until.after(LIMITS.window * 2);
        (0..3).for_each(|_| health.strike(later, Strike::Silent, String::new()));
        let Circuit::Open { until } = health.circuit() else { panic!("{health:?}") };
        assert!(until.since(later) < LIMITS.backoff_min * 2, "it was well for long");
        assert_eq!((health.strikes(), health.opened()), (13, 7));
    }

    #[test]
    fn readers_with_other_seeds_come_back_at_other_times() {
        let until = |seed| {
            let mut health = Health::new(LIMITS, seed);
            (0..3).for_each(|_| health.strike(second(0), Strike::Silent, String::new()));
            health.circuit()
        };
        assert_eq!(until(1), until(1));
        assert_ne!(until(1), until(2));
    }
}
