//! How many requests may be under way: one more for every round that goes well, half as many when the store asks for
//! less (AIMD).

use std::time::Duration;

/// Bounds of what is under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PaceLimits {
    /// Requests under way at least.
    pub requests_min: u32,
    /// Requests under way at first and at most.
    pub requests_max: u32,
}

impl Default for PaceLimits {
    /// 1 to 64.
    fn default() -> Self {
        Self { requests_min: 1, requests_max: 64 }
    }
}

/// The window of requests.
#[derive(Clone, Debug)]
pub struct Pace {
    limits: PaceLimits,
    /// In thousandths of a request.
    window: u64,
    under_way: u32,
    /// When it was last halved: what began before says nothing about the window since.
    cut_at: Option<Duration>,
    cuts: u64,
}

impl Pace {
    /// The whole window.
    pub fn new(limits: PaceLimits) -> Self {
        let window = u64::from(limits.requests_max.max(1)) * 1000;
        Self { limits, window, under_way: 0, cut_at: None, cuts: 0 }
    }

    /// Requests that may be under way.
    pub fn window(&self) -> u32 {
        u32::try_from(self.window / 1000).unwrap_or(u32::MAX)
    }

    /// Requests that are.
    pub fn under_way(&self) -> u32 {
        self.under_way
    }

    /// Times it was halved.
    pub fn cuts(&self) -> u64 {
        self.cuts
    }

    /// Begins a request, if there is room; it has to be ended.
    pub fn begin(&mut self) -> bool {
        let room = self.under_way < self.window();
        self.under_way += u32::from(room);
        room
    }

    /// A request that began at `began` ended at `now`, well or because the store asks for less. Anything else says
    /// nothing about how much the store can take: `None`.
    pub fn end(&mut self, began: Duration, now: Duration, well: Option<bool>) {
        self.under_way = self.under_way.saturating_sub(1);
        let (least, most) =
            (u64::from(self.limits.requests_min.max(1)), u64::from(self.limits.requests_max.max(1)));
        match well {
            Some(true) => self.window = (self.window + 1_000_000 / self.window).min(most * 1000),
            Some(false) if self.cut_at.is_none_or(|cut| began >= cut) => {
                self.window = (self.window / 2).max(least * 1000);
                self.cut_at = Some(now);
                self.cuts += 1;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: u64) -> Duration {
        Duration::from_secs(second)
    }

    #[test]
    fn no_more_than_the_window_is_under_way() {
        let mut pace = Pace::new(PaceLimits { requests_min: 1, requests_max: 3 });
        assert!((0..3).all(|_| pace.begin()));
        assert!(!pace.begin());
        pace.end(at(0), at(1), Some(true));
        assert!(pace.begin() && !pace.begin());
        assert_eq!(pace.under_way(), 3);
    }

    #[test]
    fn one_burst_of_throttling_halves_once() {
        let mut pace = Pace::new(PaceLimits { requests_min: 2, requests_max: 64 });
        (0..64).for_each(|_| assert!(pace.begin()));
        for _ in 0..64 {
            pace.end(at(0), at(1), Some(false));
        }
        assert_eq!((pace.window(), pace.cuts()), (32, 1));
        for second in 1..20 {
            assert!(pace.begin());
            pace.end(at(second), at(second), Some(false));
        }
        assert_eq!(pace.window(), 2, "never below the least");
    }

    #[test]
    fn a_round_that_goes_well_adds_one() {
        let mut pace = Pace::new(PaceLimits { requests_min: 1, requests_max: 64 });
        (0..3).for_each(|_| assert!(pace.begin()));
        (1..4).for_each(|second| pace.end(at(second * 10), at(second * 10 + 1), Some(false)));
        assert_eq!(pace.window(), 8);
        for _ in 0..9 {
            assert!(pace.begin());
            pace.end(at(50), at(51), Some(true));
        }
        assert_eq!(pace.window(), 9);
        for _ in 0..10_000 {
            assert!(pace.begin());
            pace.end(at(50), at(51), Some(true));
        }
        assert_eq!(pace.window(), 64);
        assert!(pace.begin());
        pace.end(at(60), at(61), None);
        assert_eq!((pace.window(), pace.under_way()), (64, 0), "other failures say nothing");
    }
}
