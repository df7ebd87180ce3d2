//! Which blocks are worth a write to disk when they leave the host tier.
//!
//! Most blocks of a serving workload are never asked for again, so writing all of them wears the disk out
//! and pushes out of it what would be read. Two kinds choose by **sightings**: a block is seen when it is
//! stored and when it is read, and the count stays when the block is gone.
//!
//! ```text
//! stored or read   -> seen(key)      the counters of the key go up
//! evicted          -> leaves(key)    written if the smallest of its counters is large enough:
//!                                      frequency  2, always
//!                                      budget     as many as keep the writes near three tenths of departures
//! ```
//! [`AdmissionKind::Frequency`] writes little, however much that loses: what it loses are first returns.
//! [`AdmissionKind::Budget`] asks for one sighting less whenever it has saved a run of writes, and for one
//! more when it has overdrawn as many. So it alternates between two numbers, in runs long enough to hold whole
//! prompts: a block is of use only with all blocks before it. The beginning of a prompt is seen at least as
//! often as its end, so asking for a number of sightings seldom writes an end without its beginning.
//! What was seen once is written only while some of that is known to come back.
//!
//! On Mooncake's conversation trace (`examples/admission.rs`; 20,000 blocks in the host, 100,000 on disk):
//! ```text
//!                         LRU: hit ratio    written/hit    SIEVE: hit ratio    written/hit
//! write-through              .377             1.72            .378               1.74
//! all that leave             .380             1.53            .379               1.64
//! budget                     .344              .53            .318                .57
//! frequency                  .338              .43            .296                .36
//! who knows the future       .382              .15            .382                .23
//! ```
//! Nothing about a block that was seen once foretells there whether it comes back, so hits cost writes in
//! proportion; `daemon/docs/decisions/eviction.md` has the figures.
//!
//! Sightings are counted in a count-min sketch, four rows of 4-bit counters, two counters and more for each
//! block. After eight sightings for each block it was made for, all counters are halved, so old popularity
//! fades. Nothing here is random: equal input, equal answers. Block keys are uniform digests and serve as
//! their own hash; a caller who could choose keys could at worst have cold blocks written.

use std::fmt;
use std::str::FromStr;

use kv_block::BlockKey;

/// How admission to disk is decided.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum AdmissionKind {
    /// Everything is written.
    All,
    /// Nothing is written.
    Never,
    /// What was seen at least twice.
    Frequency,
    /// Three tenths of what leaves: what was seen most often, as far as that goes.
    #[default]
    Budget,
}

impl AdmissionKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::All, Self::Never, Self::Frequency, Self::Budget];

    /// Name in configuration, metrics and text.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Never => "never",
            Self::Frequency => "frequency",
            Self::Budget => "budget",
        }
    }
}

impl fmt::Display for AdmissionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no admission.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no disk admission `{text}`; there are all, never, frequency and budget")]
pub struct UnknownAdmission {
    /// What was given.
    pub text: String,
}

impl FromStr for AdmissionKind {
    type Err = UnknownAdmission;
    fn from_str(text: &str) -> Result<Self, UnknownAdmission> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == text);
        known.ok_or_else(|| UnknownAdmission { text: text.to_owned() })
    }
}

/// Decides what is written to disk.
#[derive(Debug)]
pub enum Admission {
    /// Everything.
    All,
    /// Nothing.
    Never,
    /// What was seen often enough.
    Frequency {
        /// How often everything was seen, nearly.
        sketch: Sketch,
        /// Sightings asked for.
        sightings_min: u8,
    },
    /// What was seen most often, as far as a share of all departures goes.
    Budget(Budget),
}

impl Admission {
    /// Sightings to ask for when stored blocks are not read as a matter of course.
    pub const SIGHTINGS_MIN: u8 = 2;
    /// Of ten blocks that leave the host tier, so many may be written within a budget.
    pub const SHARE_TENTHS: u8 = 3;

    /// An admission that has seen nothing. `blocks` is how many different blocks should be told apart:
    /// about as many as both tiers hold; each costs 4 to 8 bytes.
    pub fn new(kind: AdmissionKind, blocks: usize) -> Self {
        match kind {
            AdmissionKind::All => Self::All,
            AdmissionKind::Never => Self::Never,
            AdmissionKind::Frequency => {
                Self::Frequency { sketch: Sketch::new(blocks), sightings_min: Self::SIGHTINGS_MIN }
            }
            AdmissionKind::Budget => Self::Budget(Budget::new(blocks)),
        }
    }

    /// The same, asking for other than [`Self::SIGHTINGS_MIN`] sightings (1 to 15): 3 where every block is
    /// read once soon after it was stored, as decode workers do.
    #[must_use]
    pub fn with_sightings_min(mut self, wanted: u8) -> Self {
        if let Self::Frequency { sightings_min, .. } = &mut self {
            *sightings_min = wanted.clamp(1, 15);
        }
        self
    }

    /// The same, with a budget other than [`Self::SHARE_TENTHS`] (0 to 10).
    #[must_use]
    pub fn with_share(mut self, tenths: u8) -> Self {
        if let Self::Budget(budget) = &mut self {
            budget.share_tenths = tenths.min(10).into();
        }
        self
    }

    /// Notes that a block was stored or read. `resident` says whether it was in the host tier just then.
    pub fn seen(&mut self, key: &BlockKey, resident: bool) {
        match self {
            Self::All | Self::Never => {}
            Self::Frequency { sketch, .. } => sketch.add(key),
            Self::Budget(budget) => budget.seen(key, resident),
        }
    }

    /// A block leaves the host tier for room: whether it should be written to disk. One that is `on_disk`
    /// already never should; it is told all the same, for it counts as a departure.
    pub fn leaves(&mut self, key: &BlockKey, on_disk: bool) -> bool {
        match self {
            Self::All => !on_disk,
            Self::Never => false,
            Self::Frequency { sketch, sightings_min } => !on_disk && sketch.count(key) >= *sightings_min,
            Self::Budget(budget) => budget.leaves(key, on_disk),
        }
    }

    /// Bytes of memory in use.
    pub fn bytes(&self) -> usize {
        match self {
            Self::All | Self::Never => 0,
            Self::Frequency { sketch, .. } => sketch.bytes(),
            Self::Budget(budget) => budget.sketch.bytes(),
        }
    }
}

/// Asks for as many sightings as keep the writes near a fixed share of all departures.
#[derive(Debug)]
pub struct Budget {
    sketch: Sketch,
    /// Of ten departures, so many may be written.
    share_tenths: i64,
    /// Sightings asked for at present.
    sightings_min: u8,
    /// Tenths of a write that were not made though they might have been; below zero, were made too many.
    credit: i64,
    /// Credit or debt at which other sightings are asked for.
    credit_max: i64,
    /// Blocks that left after one sighting, of late.
    once_left: u64,
    /// How many of such came back.
    once_returned: u64,
}

impl Budget {
    /// Of so many blocks that leave after one sighting, one must come back, or none of them is written.
    const WORTH_ONE_IN: u64 = 25;
    /// Departures after one sighting that are remembered, about.
    const ONCE_MAX: u64 = 1 << 15;

    fn new(blocks: usize) -> Self {
        // A run of departures is a few prompts long at least: of a prompt written by halves, hits stop at
        // the first block that is missing.
        let run = (blocks.min(Sketch::BLOCKS_MAX) / 128).max(64);
        Self {
            sketch: Sketch::new(blocks),
            share_tenths: Admission::SHARE_TENTHS.into(),
            sightings_min: Admission::SIGHTINGS_MIN,
            credit: 0,
            credit_max: run as i64 * 10,
            once_left: 0,
            once_returned: 0,
        }
    }

    fn seen(&mut self, key: &BlockKey, resident: bool) {
        self.once_returned += u64::from(!resident && self.sketch.count(key) == 1);
        self.sketch.add(key);
    }

    fn leaves(&mut self, key: &BlockKey, on_disk: bool) -> bool {
        let sightings = self.sketch.count(key);
        self.once_left += u64::from(sightings == 1);
        if self.once_left > Self::ONCE_MAX {
            (self.once_left, self.once_returned) = (self.once_left / 2, self.once_returned / 2);
        }
        let worth = sightings > 1 || self.once_returned * Self::WORTH_ONE_IN >= self.once_left;
        let admitted = !on_disk && worth && sightings >= self.sightings_min;
        self.credit += self.share_tenths - if admitted { 10 } else { 0 };
        if self.credit.abs() >= self.credit_max {
            let wanted = if self.credit > 0 { self.sightings_min - 1 } else { self.sightings_min + 1 };
            self.sightings_min = wanted.clamp(1, Sketch::COUNT_MAX as u8);
            self.credit = 0;
        }
        admitted
    }
}

/// Four rows of 4-bit counters with aging.
#[derive(Debug)]
pub struct Sketch {
    /// All rows, one after another, 16 counters a word.
    rows: Box<[u64]>,
    /// Counters of one row less one; a row is a power of two long.
    mask: u64,
    /// Sightings until all counters are halved.
    left: usize,
}

impl Sketch {
    const ROWS: usize = 4;
    const COUNT_MAX: u64 = 15;
    /// Blocks that one sketch tells apart at most, so that it never takes more than 1 GiB.
    const BLOCKS_MAX: usize = 1 << 28;

    fn new(blocks: usize) -> Self {
        let counters = (blocks.clamp(64, Self::BLOCKS_MAX) * 2).next_power_of_two();
        let mut sketch =
            Self { rows: vec![0; counters / 16 * Self::ROWS].into(), mask: counters as u64 - 1, left: 0 };
        sketch.left = sketch.period();
        sketch
    }

    fn bytes(&self) -> usize {
        self.rows.len() * 8
    }

    fn period(&self) -> usize {
        (self.mask as usize + 1) * 4
    }

    /// Word and shift of the key's counter in each row.
    fn places(&self, key: &BlockKey) -> [(usize, u32); Self::ROWS] {
        let [low, high] = key.halves();
        std::array::from_fn(|row| {
            // Two independent halves of a digest give four independent places.
            let hash = [low, high, low.rotate_left(32), high.rotate_left(32)][row];
            let counter = hash & self.mask;
            let row_words = (self.mask as usize + 1) / 16;
            (row * row_words + counter as usize / 16, (counter % 16) as u32 * 4)
        })
    }

    fn add(&mut self, key: &BlockKey) {
        for (word, shift) in self.places(key) {
            if self.rows[word] >> shift & Self::COUNT_MAX < Self::COUNT_MAX {
                self.rows[word] += 1 << shift;
            }
        }
        self.left -= 1;
        if self.left == 0 {
            // Halves all counters: shift, then clear the bit that came over from the neighbour.
            self.rows.iter_mut().for_each(|word| *word = *word >> 1 & 0x7777_7777_7777_7777);
            self.left = self.period();
        }
    }

    fn count(&self, key: &BlockKey) -> u8 {
        let counts = self.places(key).map(|(word, shift)| (self.rows[word] >> shift & Self::COUNT_MAX) as u8);
        counts.into_iter().min().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key number `n`, spread like a digest.
    fn key(n: u64) -> BlockKey {
        let mix = |n: u64| {
            let n = (n ^ n >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (n ^ n >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ n >> 32
        };
        BlockKey::from_halves([mix(n + 1), mix(!n)])
    }

    fn frequency(blocks: usize) -> Admission {
        Admission::new(AdmissionKind::Frequency, blocks)
    }

    #[test]
    fn names_are_read_back() {
        for kind in AdmissionKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        assert_eq!("some".parse::<AdmissionKind>(), Err(UnknownAdmission { text: "some".into() }));
    }

    #[test]
    fn all_and_never_do_as_they_are_called() {
        assert!(Admission::new(AdmissionKind::All, 1).leaves(&key(1), false));
        let mut never = Admission::new(AdmissionKind::Never, 1);
        (0..10).for_each(|_| never.seen(&key(1), true));
        assert!(!never.leaves(&key(1), false));
    }

    #[test]
    fn a_block_is_written_when_it_was_seen_twice() {
        let mut admission = frequency(1000);
        assert!(!admission.leaves(&key(1), false));
        admission.seen(&key(1), true);
        assert!(!admission.leaves(&key(1), false));
        admission.seen(&key(1), true);
        assert!(admission.leaves(&key(1), false));
        assert!(!admission.leaves(&key(2), false));
    }

    #[test]
    fn more_sightings_can_be_asked_for() {
        let mut admission = frequency(1000).with_sightings_min(3);
        (0..2).for_each(|_| admission.seen(&key(1), true));
        assert!(!admission.leaves(&key(1), false));
        admission.seen(&key(1), true);
        assert!(admission.leaves(&key(1), false));
    }

    #[test]
    fn few_blocks_seen_once_are_taken_for_others() {
        let mut admission = frequency(10_000);
        (0..10_000).for_each(|n| admission.seen(&key(n), true));
        let wrong = (0..10_000).filter(|n| admission.leaves(&key(*n), false)).count();
        assert!(wrong < 300, "{wrong} of 10,000 blocks admitted after one sighting");
    }

    #[test]
    fn old_popularity_fades() {
        let mut admission = frequency(64);
        (0..8).for_each(|_| admission.seen(&key(0), true));
        assert!(admission.leaves(&key(0), false));
        (0..10_000).for_each(|n| admission.seen(&key(1 + n % 20), true));
        assert!(!admission.leaves(&key(0), false), "seen 8 times, 10,000 sightings ago");
        assert!(admission.leaves(&key(1), false), "seen all the time");
    }

    #[test]
    fn memory_is_bounded_and_known_beforehand() {
        assert_eq!(frequency(0).bytes(), 256);
        assert_eq!(frequency(1 << 20).bytes(), 4 << 20);
        let mut admission = frequency(1000);
        let before = admission.bytes();
        (0..100_000).for_each(|n| admission.seen(&key(n), true));
        assert_eq!(admission.bytes(), before);
    }

    /// Blocks leave one after another, each after so many sightings; every fourth one comes back. Which were
    /// written.
    fn written(admission: &mut Admission, blocks: u64, sightings: impl Fn(u64) -> u32) -> Vec<bool> {
        let mut written = Vec::new();
        for n in 0..blocks {
            (0..sightings(n)).for_each(|time| admission.seen(&key(n), time > 0));
            written.push(admission.leaves(&key(n), false));
            if n % 4 == 0 {
                admission.seen(&key(n), false);
            }
        }
        written
    }

    fn share(written: &[bool]) -> f64 {
        written.iter().filter(|written| **written).count() as f64 / written.len() as f64
    }

    #[test]
    fn a_budget_is_kept_however_often_blocks_are_seen() {
        for sightings in [1, 2, 5] {
            let written = written(&mut Admission::new(AdmissionKind::Budget, 100_000), 50_000, |_| sightings);
            // It takes a while until the right number of sightings is found.
            let share = share(&written[20_000..]);
            assert!((0.25..0.35).contains(&share), "{share} written of blocks seen {sightings} times");
        }
    }

    #[test]
    fn a_budget_goes_first_to_what_was_seen_most() {
        let often = |n: u64| n % 50 < 10;
        let mut admission = Admission::new(AdmissionKind::Budget, 100_000);
        let written = written(&mut admission, 50_000, |n| if often(n) { 3 } else { 1 });
        let of = |wanted: bool| {
            let part: Vec<bool> =
                (0..50_000).filter(|n| often(*n) == wanted).map(|n| written[n as usize]).collect();
            share(&part)
        };
        assert_eq!(of(true), 1.0, "a fifth of the blocks, seen three times");
        assert!((0.08..0.2).contains(&of(false)), "{} of what was seen once", of(false));
    }

    #[test]
    fn a_budget_is_spent_in_runs() {
        let written = written(&mut Admission::new(AdmissionKind::Budget, 100_000), 50_000, |_| 1);
        let turns = written.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert!((2..100).contains(&turns), "{turns} turns: prompts are written by halves");
    }

    #[test]
    fn a_budget_is_not_spent_on_what_never_comes_back() {
        let mut admission = Admission::new(AdmissionKind::Budget, 100_000);
        let mut written = 0;
        for n in 0..50_000 {
            admission.seen(&key(n), false);
            written += u32::from(admission.leaves(&key(n), false));
        }
        assert!(written < 500, "{written} of 50,000 blocks that nobody asks for again");
    }

    #[test]
    fn what_is_on_disk_is_not_written_again() {
        for kind in AdmissionKind::ALL {
            let mut admission = Admission::new(kind, 1000);
            (0..20).for_each(|_| admission.seen(&key(1), true));
            assert!(!admission.leaves(&key(1), true), "{kind}");
        }
    }
}
