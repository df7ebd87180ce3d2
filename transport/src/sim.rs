//! Nodes that read from each other over a network that delays, cuts, splits and lies, all from a seed.
//!
//! ```text
//!   sim.rs     what may go wrong in one world, and what is counted
//!   world.rs   the event queue, and what nodes do
//!   net.rs     connections, messages and links
//!   drive.rs   gives events to readers and owners and does what they say, as a daemon does
//!   node.rs    a node's memory and what is true: which blocks it has, which wants are open
//!   lies.rs    words that a broken peer says
//! ```
//! After every event: each want ended once, and none is over its deadline; bytes that landed are those of their key.
//! When nothing happens any more: no want, lease, slot or hold is left, first with the connections standing and then
//! without. In a world without lies and damage nobody is accused of any.

mod drive;
mod lies;
mod net;
mod node;
mod world;

use std::collections::BTreeMap;

use crate::random::Random;

/// What can go wrong in one world. Rates are in a thousand.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Weather {
    /// Nodes.
    pub nodes: usize,
    /// Wants of all nodes together.
    pub wants: u64,
    /// Whether there is a path besides TCP, with windows.
    pub windows: bool,
    /// Connections lost, per message.
    pub cuts: u64,
    /// Directions between two nodes that are blocked for a while, per want.
    pub splits: u64,
    /// Nodes that die and come back, per want.
    pub crashes: u64,
    /// Connection attempts that arrive twice, or never.
    pub attempts: u64,
    /// Owners that fall silent, per connection.
    pub mutes: u64,
    /// Lies of owners, per message.
    pub owner_lies: u64,
    /// Lies of readers, per message.
    pub reader_lies: u64,
    /// Reads that arrive damaged.
    pub damage: u64,
    /// Operations that fail, dawdle or break their path.
    pub faults: u64,
    /// Reads that a device never gives back by itself.
    pub stuck: u64,
    /// Exposures that a device never answers.
    pub stuck_exposures: u64,
}

impl Weather {
    /// The weather of a seed: calm sometimes, everything at once sometimes.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x77ea_7435);
        let mut rate = |max: u64| if random.per_mille(500) { 0 } else { random.below(max) + 1 };
        let (cuts, splits, crashes, attempts) = (rate(8), rate(40), rate(10), rate(200));
        let (mutes, owner_lies, reader_lies) = (rate(200), rate(20), rate(20));
        let (damage, faults, stuck, stuck_exposures) = (rate(100), rate(200), rate(15), rate(15));
        let calm = seed.is_multiple_of(8);
        let unless_calm = |rate: u64| if calm { 0 } else { rate };
        Self {
            nodes: 2 + random.below(3) as usize,
            wants: 60 + random.below(120),
            windows: random.per_mille(600),
            cuts: unless_calm(cuts),
            splits: unless_calm(splits),
            crashes: unless_calm(crashes),
            attempts: unless_calm(attempts),
            mutes: unless_calm(mutes),
            owner_lies: unless_calm(owner_lies),
            reader_lies: unless_calm(reader_lies),
            damage: unless_calm(damage),
            faults: unless_calm(faults),
            stuck: unless_calm(stuck),
            stuck_exposures: unless_calm(stuck_exposures),
        }
    }

    /// Whether nobody breaks a rule and nothing is damaged.
    pub fn is_honest(&self) -> bool {
        self.owner_lies + self.reader_lies + self.damage == 0
    }
}

/// What happened in one world or in many: so that a test can say that it saw everything.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tally {
    /// How often, by name.
    pub counts: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// Once more.
    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// What another one counted as well.
    pub fn add(&mut self, other: &Self) {
        for (what, count) in &other.counts {
            *self.counts.entry(what).or_default() += count;
        }
    }
}

/// Runs the world of a seed to its end, printing what happens if asked.
///
/// # Panics
/// When something does not hold; the message says which seed shows it.
pub fn run(seed: u64, loud: bool) -> Tally {
    run_in(seed, Weather::of(seed), loud)
}

/// Runs the world of a seed in this weather.
///
/// # Panics
/// As [`run`].
pub fn run_in(seed: u64, weather: Weather, loud: bool) -> Tally {
    let _name = Name(seed);
    world::World::new(seed, weather, loud).run()
}

/// Says which seed it was when a check fails.
struct Name(u64);

impl Drop for Name {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("this was seed {0}; KVD_SEED={0} replays it", self.0);
        }
    }
}
