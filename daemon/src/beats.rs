//! How long ago each shard's loop last came around, as far as somebody who looks now and then can tell.

use std::time::{Duration, Instant};

/// What was seen of the loops: the last count of each, and when it was first seen.
#[derive(Debug, Default)]
pub struct Beats(Vec<(u64, Instant)>);

impl Beats {
    /// The age of every loop, given how often each has gone round by now.
    pub fn ages(&mut self, now: Instant, counts: impl IntoIterator<Item = u64>) -> Vec<Duration> {
        let age = |(at, count): (usize, u64)| {
            if at == self.0.len() {
                self.0.push((count, now));
            }
            let seen = &mut self.0[at];
            if seen.0 != count {
                *seen = (count, now);
            }
            now.saturating_duration_since(seen.1)
        };
        counts.into_iter().enumerate().map(age).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_ages_until_it_comes_around_again() {
        let start = Instant::now();
        let mut beats = Beats::default();
        let mut ages = |at: u64, counts: [u64; 2]| {
            let ages = beats.ages(start + Duration::from_secs(at), counts);
            ages.iter().map(Duration::as_secs).collect::<Vec<_>>()
        };
        assert_eq!(ages(0, [0, 7]), [0, 0]);
        assert_eq!(ages(1, [5, 7]), [0, 1]);
        assert_eq!(ages(9, [5, 7]), [8, 9]);
        assert_eq!(ages(10, [5, 8]), [9, 0]);
    }
}
