//! Whether to try again, and when: inside the deadline, with jitter, and never more in total than a small part of
//! what goes well, so that a store in trouble is not asked several times as much as one that is well.

use std::time::Duration;

use crate::random::Random;

/// How often and how soon.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RetryLimits {
    /// Attempts of one operation at most, the first one too.
    pub attempts_max: u32,
    /// The first wait at most.
    pub backoff_min: Duration,
    /// Every later wait at most; a store that says how long to wait may say more.
    pub backoff_max: Duration,
    /// Retries that may be made at once after long quiet.
    pub budget_max: u32,
    /// Operations that have to go well for one more retry.
    pub successes_per_retry: u32,
}

impl Default for RetryLimits {
    /// 5 attempts, 50 ms to 5 s apart; 100 retries at once, then one for every 5 operations that go well.
    fn default() -> Self {
        Self {
            attempts_max: 5,
            backoff_min: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
            budget_max: 100,
            successes_per_retry: 5,
        }
    }
}

/// How many retries are left to everybody together.
#[derive(Clone, Debug)]
pub struct Budget {
    limits: RetryLimits,
    /// In operations that went well.
    saved: u32,
}

impl Budget {
    /// A full budget.
    pub fn new(limits: RetryLimits) -> Self {
        Self { limits, saved: limits.budget_max.saturating_mul(limits.successes_per_retry.max(1)) }
    }

    /// An operation went well.
    pub fn earn(&mut self) {
        let full = self.limits.budget_max.saturating_mul(self.limits.successes_per_retry.max(1));
        self.saved = self.saved.saturating_add(1).min(full);
    }

    /// Retries left.
    pub fn left(&self) -> u32 {
        self.saved / self.limits.successes_per_retry.max(1)
    }

    /// The wait before the attempt that follows `attempts` failed ones, `left` before the deadline; `None` when it is
    /// not worth it: too many attempts, no budget, or no time. Takes from the budget.
    pub fn retry(
        &mut self,
        attempts: u32,
        told: Option<Duration>,
        left: Duration,
        random: &mut Random,
    ) -> Option<Duration> {
        if attempts >= self.limits.attempts_max || self.left() == 0 {
            return None;
        }
        let doubled = self.limits.backoff_min.saturating_mul(1 << (attempts.max(1) - 1).min(20));
        let longest = doubled.min(self.limits.backoff_max);
        // Half of it for certain, the other half by chance.
        let half = u64::try_from(longest.as_micros() / 2).unwrap_or(u64::MAX);
        let jittered = Duration::from_micros(half.saturating_add(random.below(half.saturating_add(1))));
        let wait = told.map_or(jittered, |told| told.saturating_add(jittered));
        if wait >= left {
            return None;
        }
        self.saved -= self.limits.successes_per_retry.max(1);
        Some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(1000);

    #[test]
    fn waits_double_within_bounds_and_are_spread() {
        let limits = RetryLimits { attempts_max: 20, ..RetryLimits::default() };
        for (attempts, longest_ms) in [(1, 50), (2, 100), (3, 200), (7, 3200), (8, 5000), (19, 5000)] {
            let waits: Vec<_> = (0..50)
                .map(|seed| Budget::new(limits).retry(attempts, None, LONG, &mut Random::new(seed)).unwrap())
                .collect();
            let (low, high) = (Duration::from_millis(longest_ms / 2), Duration::from_millis(longest_ms));
            assert!(waits.iter().all(|wait| (low..=high).contains(wait)), "{attempts}: {waits:?}");
            assert!(waits.iter().any(|wait| wait != &waits[0]));
        }
    }

    #[test]
    fn a_wait_ends_before_the_deadline_or_is_not_begun() {
        let mut random = Random::new(1);
        let mut budget = Budget::new(RetryLimits::default());
        assert_eq!(budget.retry(1, None, Duration::from_millis(20), &mut random), None);
        let told = Some(Duration::from_secs(2));
        assert_eq!(budget.retry(1, told, Duration::from_secs(2), &mut random), None);
        assert_eq!(budget.left(), 100, "what is not done costs nothing");
        assert!(
            budget.retry(1, told, Duration::from_secs(3), &mut random).unwrap() >= Duration::from_secs(2)
        );
        assert_eq!(budget.retry(5, None, LONG, &mut random), None, "attempts are counted");
    }

    #[test]
    fn retries_are_a_part_of_what_goes_well() {
        let mut random = Random::new(1);
        let mut budget = Budget::new(RetryLimits::default());
        let mut retries = 0;
        while budget.retry(1, None, LONG, &mut random).is_some() {
            retries += 1;
        }
        assert_eq!(retries, 100);
        for _ in 0..49 {
            budget.earn();
        }
        assert_eq!(budget.left(), 9);
        (0..10_000).for_each(|_| budget.earn());
        assert_eq!(budget.left(), 100, "quiet times do not add up");
    }
}
