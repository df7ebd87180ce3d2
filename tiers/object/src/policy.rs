//! What is worth a request: which blocks go up into packs, and which come down again. Plain functions of plain values;
//! whoever knows the values asks.

use std::time::Duration;

use kv_block::Priority;

/// What is known of a block that could go up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Its retention class.
    pub priority: Priority,
    /// Somebody pinned it.
    pub pinned: bool,
    /// Times it was read since it was stored.
    pub reads: u32,
    /// How long ago it was stored.
    pub age: Duration,
    /// How long it will still count; `None`: for ever.
    pub life: Option<Duration>,
    /// It is about to leave the last tier of this node that has it.
    pub leaving: bool,
}

/// What goes up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AscentLimits {
    /// Reads that a normal block needs.
    pub reads_min: u32,
    /// Age that it needs as well: what is young is read by those who made it.
    pub age_min: Duration,
    /// What counts for less than this is not worth a pack.
    pub life_min: Duration,
}

impl Default for AscentLimits {
    /// 1 read, 30 s, 10 minutes.
    fn default() -> Self {
        Self { reads_min: 1, age_min: Duration::from_secs(30), life_min: Duration::from_secs(600) }
    }
}

/// Whether a block goes up, and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ascent {
    /// Somebody pinned it or gave it high priority: it goes at once.
    Asked,
    /// It was read, and not only when it was young.
    Proven,
    /// It was read, and would be gone otherwise.
    Leaving,
    /// Not yet; ask again.
    TooYoung,
    /// Nobody reads it.
    Unread,
    /// It has low priority.
    Low,
    /// It will not count for long.
    ShortLived,
}

impl Ascent {
    /// Whether it goes.
    pub fn goes(self) -> bool {
        matches!(self, Self::Asked | Self::Proven | Self::Leaving)
    }
}

/// Whether a block goes up. What was asked for goes whatever else is said, unless it will not count for long.
pub fn ascend(candidate: &Candidate, limits: &AscentLimits) -> Ascent {
    let Candidate { priority, pinned, reads, age, life, leaving } = *candidate;
    let read = reads >= limits.reads_min;
    match priority {
        _ if life.is_some_and(|life| life < limits.life_min) => Ascent::ShortLived,
        _ if pinned => Ascent::Asked,
        Priority::High => Ascent::Asked,
        Priority::Low => Ascent::Low,
        Priority::Normal if !read => Ascent::Unread,
        Priority::Normal if leaving => Ascent::Leaving,
        Priority::Normal if age < limits.age_min => Ascent::TooYoung,
        Priority::Normal => Ascent::Proven,
    }
}

/// What reading from the store costs now, as it was measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DescentCost {
    /// Until the first byte of a request.
    pub latency: Duration,
    /// Bytes of all requests together.
    pub bytes_per_s: u64,
    /// Computing one block anew.
    pub recompute_per_block: Duration,
}

/// Whether blocks come down sooner than they are computed, and within `left`.
pub fn descends(blocks: u32, bytes: u64, left: Duration, cost: &DescentCost) -> bool {
    let micros = u128::from(bytes) * 1_000_000 / u128::from(cost.bytes_per_s.max(1));
    let moving = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
    let reading = cost.latency.saturating_add(moving);
    blocks > 0 && reading < left && reading < cost.recompute_per_block.saturating_mul(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_is_read_goes_up_and_what_is_asked_for_goes_at_once() {
        let plain = Candidate {
            priority: Priority::Normal,
            pinned: false,
            reads: 1,
            age: seconds(30),
            life: None,
            leaving: false,
        };
        let table = [
            (plain, Ascent::Proven),
            (Candidate { reads: 0, ..plain }, Ascent::Unread),
            (Candidate { reads: 0, leaving: true, ..plain }, Ascent::Unread),
            (Candidate { age: seconds(29), ..plain }, Ascent::TooYoung),
            (Candidate { age: seconds(29), leaving: true, ..plain }, Ascent::Leaving),
            (Candidate { priority: Priority::Low, ..plain }, Ascent::Low),
            (Candidate { priority: Priority::Low, pinned: true, ..plain }, Ascent::Asked),
            (Candidate { priority: Priority::High, reads: 0, age: seconds(0), ..plain }, Ascent::Asked),
            (Candidate { pinned: true, life: Some(seconds(599)), ..plain }, Ascent::ShortLived),
            (Candidate { life: Some(seconds(600)), ..plain }, Ascent::Proven),
        ];
        for (candidate, wanted) in table {
            assert_eq!(ascend(&candidate, &AscentLimits::default()), wanted, "{candidate:?}");
        }
        let goes = [Ascent::Asked, Ascent::Proven, Ascent::Leaving];
        assert!(table.iter().all(|(_, ascent)| ascent.goes() == goes.contains(ascent)));
    }

    #[test]
    fn what_is_computed_sooner_is_not_fetched() {
        let cost = DescentCost {
            latency: Duration::from_millis(40),
            bytes_per_s: 1 << 30,
            recompute_per_block: Duration::from_millis(5),
        };
        assert!(!descends(8, 8 << 20, seconds(1), &cost), "40 ms to compute, 47.8 to read");
        assert!(descends(10, 8 << 20, seconds(1), &cost));
        assert!(!descends(10, 8 << 20, Duration::from_millis(47), &cost), "too late");
        assert!(!descends(0, 0, seconds(1), &cost));
        assert!(!descends(1, u64::MAX, seconds(1), &DescentCost { bytes_per_s: 0, ..cost }));
    }
}
