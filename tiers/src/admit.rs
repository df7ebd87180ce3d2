//! Which blocks are worth a write to disk when they leave the host tier.
//!
//! Most blocks of a serving workload are never asked for again, so writing all of them wears the disk out
//! and pushes out of it what would be read. [`Admission::Frequency`] writes a block that was **seen
//! twice**: read while it was in the host tier, or stored again after it had left (then the first sighting
//! is remembered though the block is gone).
//!
//! What that saves has its price, and how high it is depends on how long the host tier keeps a block. On
//! Mooncake's conversation trace (`examples/admission.rs`; LRU, 20,000 blocks in the host, 100,000 on disk):
//! ```text
//!                                  hit ratio    bytes written for each byte hit
//! write-through                         .377    1.72
//! all that leave the host               .380    1.53
//! frequency                             .338     .43
//! who knows the future                  .382     .15
//! ```
//! The hits that are lost are first returns of conversations, which nothing about a block foretells there.
//!
//! ```text
//! stored or read   -> seen(key)      the counters of the key go up
//! evicted          -> admits(key)    written if the smallest of its counters is at least 2 (`sightings_min`)
//! ```
//! Sightings are counted in a count-min sketch, four rows of 4-bit counters, two counters and more for each
//! block. After eight sightings for each block it was made for, all counters are halved, so old popularity fades. Nothing here is random: equal input, equal answers. Block
//! keys are uniform digests and serve as their own hash; a caller who could choose keys could at worst have
//! cold blocks written.

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
    #[default]
    Frequency,
}

impl AdmissionKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::All, Self::Never, Self::Frequency];

    /// Name in configuration, metrics and text.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Never => "never",
            Self::Frequency => "frequency",
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
#[error("no disk admission `{text}`; there are all, never and frequency")]
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
}

impl Admission {
    /// Sightings to ask for when stored blocks are not read as a matter of course.
    pub const SIGHTINGS_MIN: u8 = 2;

    /// An admission that has seen nothing. `blocks` is how many different blocks should be told apart:
    /// about as many as both tiers hold; each costs 4 to 8 bytes.
    pub fn new(kind: AdmissionKind, blocks: usize) -> Self {
        match kind {
            AdmissionKind::All => Self::All,
            AdmissionKind::Never => Self::Never,
            AdmissionKind::Frequency => {
                Self::Frequency { sketch: Sketch::new(blocks), sightings_min: Self::SIGHTINGS_MIN }
            }
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

    /// Notes that a block was stored or read.
    pub fn seen(&mut self, key: &BlockKey) {
        if let Self::Frequency { sketch, .. } = self {
            sketch.add(key);
        }
    }

    /// Whether a block that leaves the host tier should be written to disk.
    pub fn admits(&self, key: &BlockKey) -> bool {
        match self {
            Self::All => true,
            Self::Never => false,
            Self::Frequency { sketch, sightings_min } => sketch.count(key) >= *sightings_min,
        }
    }

    /// Bytes of memory in use.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Frequency { sketch, .. } => sketch.rows.len() * 8,
            _ => 0,
        }
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
        assert!(Admission::new(AdmissionKind::All, 1).admits(&key(1)));
        let mut never = Admission::new(AdmissionKind::Never, 1);
        (0..10).for_each(|_| never.seen(&key(1)));
        assert!(!never.admits(&key(1)));
    }

    #[test]
    fn a_block_is_written_when_it_was_seen_twice() {
        let mut admission = frequency(1000);
        assert!(!admission.admits(&key(1)));
        admission.seen(&key(1));
        assert!(!admission.admits(&key(1)));
        admission.seen(&key(1));
        assert!(admission.admits(&key(1)));
        assert!(!admission.admits(&key(2)));
    }

    #[test]
    fn more_sightings_can_be_asked_for() {
        let mut admission = frequency(1000).with_sightings_min(3);
        (0..2).for_each(|_| admission.seen(&key(1)));
        assert!(!admission.admits(&key(1)));
        admission.seen(&key(1));
        assert!(admission.admits(&key(1)));
    }

    #[test]
    fn few_blocks_seen_once_are_taken_for_others() {
        let mut admission = frequency(10_000);
        (0..10_000).for_each(|n| admission.seen(&key(n)));
        let wrong = (0..10_000).filter(|n| admission.admits(&key(*n))).count();
        assert!(wrong < 300, "{wrong} of 10,000 blocks admitted after one sighting");
    }

    #[test]
    fn old_popularity_fades() {
        let mut admission = frequency(64);
        (0..8).for_each(|_| admission.seen(&key(0)));
        assert!(admission.admits(&key(0)));
        (0..10_000).for_each(|n| admission.seen(&key(1 + n % 20)));
        assert!(!admission.admits(&key(0)), "seen 8 times, 10,000 sightings ago");
        assert!(admission.admits(&key(1)), "seen all the time");
    }

    #[test]
    fn memory_is_bounded_and_known_beforehand() {
        assert_eq!(frequency(0).bytes(), 256);
        assert_eq!(frequency(1 << 20).bytes(), 4 << 20);
        let mut admission = frequency(1000);
        let before = admission.bytes();
        (0..100_000).for_each(|n| admission.seen(&key(n)));
        assert_eq!(admission.bytes(), before);
    }
}
