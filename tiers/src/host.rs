//! The host tier: who gets a slot, and who leaves so that somebody else can.
//!
//! The arena cuts regions into slots of one size each; a size is a **class**, and each class has its own
//! eviction order. [`HostTier::take`] gives a free slot or none; then [`HostTier::victim`] names a block that
//! nobody holds. What happens to a victim is the caller's business (written to disk first, or not); it ends
//! in [`HostTier::retire`], or in [`HostTier::keep`] when the block was needed after all.
//!
//! ```text
//!  insert         victim             retire            sweep (hazards)
//!  ------> in the ------> leaving ----------> limbo ------------------> free slot
//!          policy <------
//!                  keep
//! ```
//! Numbers:
//! - **Ahead of need**: a class frees slots when less than the low share of its slots is free and no region
//!   is, until the high share is ([`Watermarks`]). Shares are rounded down, so a class of a few slots frees
//!   nothing ahead: it would cost too much.
//! - **Between classes**: a class that owns less than half of its fair share of regions (all regions by
//!   classes in use) takes a whole region from the class that owns the most, rather than evict its own
//!   blocks over and over; so does a class that has nothing to evict. [`HostTier::region_to_steal`] looks at
//!   the regions of the donor's next victims, [`DONORS_MAX`] at most, and takes the first whose blocks can
//!   all leave. One region is emptied at a time; of 32 MiB, that is 8,192 blocks of 4 KiB at most. The arena
//!   hands out none of its slots meanwhile. Emptied, it is kept for the class that wants it while others ask
//!   [`PATIENCE`] times; not emptied after [`DRAIN_TAKES_MAX`] slots were taken elsewhere, it is given up.
//! - **While it grows**: regions get their memory one after the other ([`HostTier::grown`]). Until the last has it,
//!   or will not get it, nobody leaves to make room: a request that finds no slot waits for the next region.
//! - **Memory**: 12 bytes for each slot that was ever used, in the policies.

use std::collections::{BTreeMap, BTreeSet};

use kv_arena::{Backed, HazardSet, Held, Slab, SlabUsage, Slot, SlotHeader, SlotState};
use kv_block::{BlockKey, Generation, Priority, Record, SlotId};

use crate::evict::{Policy, PolicyKind};

/// Regions of a donor that are looked at for one that can be emptied.
pub const DONORS_MAX: usize = 4;
/// Requests of other classes that an emptied region is kept from.
pub const PATIENCE: u32 = 64;
/// Slots taken while a region is being emptied, after which that is given up.
pub const DRAIN_TAKES_MAX: u32 = 8192;
/// Victims of its own that a poor class gives before it looks for a region again, when there was none.
const OWN_VICTIMS: u32 = 64;
/// Most victims that one request for a slot starts.
const BATCH_MAX: u32 = 16;
/// What [`HostTier::blocks_typical`] takes for a block's length, in bytes.
const TYPICAL_BYTES: u64 = 64 << 10;

/// Which share of a class's slots is kept free.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Watermarks {
    /// Freeing ahead begins below this share, 0 to 1.
    pub low: f64,
    /// It ends at this share, 0 to 1.
    pub high: f64,
}

impl Default for Watermarks {
    fn default() -> Self {
        Self { low: 0.03, high: 0.06 }
    }
}

/// A region on its way from one class to another: being emptied, then promised.
#[derive(Clone, Copy, Debug)]
struct Drain {
    region: u32,
    from: u32,
    to: u32,
    /// Slots taken elsewhere since it began.
    takes: u32,
    /// Requests of other classes that are still put off once the region is free.
    patience: u32,
}

/// Host memory of one shard: slots, and the order in which their blocks leave.
pub struct HostTier {
    slab: Slab,
    kind: PolicyKind,
    watermarks: Watermarks,
    classes: BTreeMap<u32, Box<dyn Policy>>,
    drain: Option<Drain>,
    own_victims: u32,
    /// Retired slots that the last sweep could not free.
    stuck: usize,
    region_bytes: u32,
    /// More regions will come.
    growing: bool,
}

impl HostTier {
    /// The tier over an arena. Blocks that came through a restart ([`Self::adopted`]) are put in with
    /// [`Self::insert`].
    pub fn new(slab: Slab, kind: PolicyKind, watermarks: Watermarks) -> Self {
        // At most 2 GiB.
        let region_bytes = slab.region_bytes() as u32;
        let growing = slab.usage().regions_missing > 0;
        Self {
            slab,
            kind,
            watermarks,
            classes: BTreeMap::new(),
            drain: None,
            own_victims: 0,
            stuck: 0,
            region_bytes,
            growing,
        }
    }

    /// Regions that have memory now: their slots are handed out from here on.
    pub fn grown(&mut self, regions: Backed) {
        self.slab.grown(regions);
        self.growing &= self.slab.usage().regions_missing > 0;
    }

    /// No region will come any more: the tier stays as large as it is.
    pub fn growth_ended(&mut self) {
        self.growing = false;
    }

    /// Whether regions are still to come.
    pub fn is_growing(&self) -> bool {
        self.growing
    }

    /// The arena.
    pub fn slab(&self) -> &Slab {
        &self.slab
    }

    /// How the arena stands.
    pub fn usage(&self) -> SlabUsage {
        self.slab.usage()
    }

    /// Bytes of the arena that have memory.
    pub fn bytes_max(&self) -> u64 {
        u64::from(self.slab.usage().regions_total) * u64::from(self.region_bytes)
    }

    /// Bytes of the arena when it is whole.
    pub fn bytes_wanted(&self) -> u64 {
        self.slab.data_bytes()
    }

    /// Longest block that fits, in bytes.
    pub fn block_bytes_max(&self) -> u64 {
        self.region_bytes.into()
    }

    /// How many blocks of 64 KiB the arena holds: by that, tables that grow with the number of blocks are
    /// sized. Smaller blocks are more.
    pub fn blocks_typical(&self) -> usize {
        (self.slab.data_bytes() / TYPICAL_BYTES) as usize
    }

    /// Blocks that could be chosen as victims.
    pub fn len(&self) -> usize {
        self.classes.values().map(|policy| policy.len()).sum()
    }

    /// Whether no block could be chosen.
    pub fn is_empty(&self) -> bool {
        self.classes.values().all(|policy| policy.is_empty())
    }

    /// A free slot for a block of `bytes`, the caller's alone until it is sealed or dropped.
    pub fn take(&mut self, bytes: u32) -> Option<Slot> {
        let class = self.slab.class_for(bytes)?;
        if self.is_promised_away(class) {
            return None;
        }
        let slot = self.slab.take(bytes).ok();
        self.watch_drain(class, slot.is_some());
        slot
    }

    /// A block of `bytes` stands in `slot` now and may leave when its turn comes. `returning`: it was here
    /// before.
    pub fn insert(&mut self, slot: SlotId, bytes: u32, priority: Priority, returning: bool) {
        if let Some(class) = self.slab.class_for(bytes) {
            let kind = self.kind;
            self.classes.entry(class).or_insert_with(|| kind.build()).insert(slot.0, priority, returning);
        }
    }

    /// A victim is not to leave after all: it takes its place in the order anew, as a block that was read.
    pub fn keep(&mut self, slot: SlotId, priority: Priority) {
        if self.drain.is_some_and(|drain| drain.region == self.region_of(slot)) {
            self.stop_drain();
        }
        let Some(header) = self.slab.header(slot).filter(is_block) else { return };
        self.insert(slot, header.record.bytes, priority, true);
    }

    /// The block in `slot` is no victim any more, whatever becomes of it.
    pub fn forget(&mut self, slot: SlotId) {
        if let Some(policy) = self.policy_of(slot) {
            policy.remove(slot.0);
        }
    }

    /// A block was read. The number may come from a worker: a wrong one is ignored.
    pub fn touch(&mut self, slot: SlotId) {
        if let Some(policy) = self.policy_of(slot) {
            policy.touch(slot.0);
        }
    }

    /// Chooses a block to leave so that one of `bytes` can come, and forgets it: [`Self::retire`] or
    /// [`Self::keep`] follows. `evictable` says what the tier cannot know, such as pins; blocks that
    /// somebody holds are never asked about. `None` when nothing of that class can leave now, or when the
    /// class should rather have a region of another ([`Self::region_to_steal`]).
    pub fn victim(
        &mut self,
        bytes: u32,
        evictable: &mut dyn FnMut(&BlockKey) -> bool,
    ) -> Option<(SlotId, Generation)> {
        let class = self.slab.class_for(bytes)?;
        if self.own_victims > 0 {
            self.own_victims -= 1;
        } else if self.drain.is_none() && is_poor(&self.slab.usage(), class) {
            return None;
        }
        let slab = &self.slab;
        let mut generation = Generation(0);
        let slot = self.classes.get_mut(&class)?.victim(&mut |slot| {
            let header = free_to_leave(slab, SlotId(slot), evictable);
            generation = header.map_or(generation, |header| header.generation);
            header.is_some()
        })?;
        Some((SlotId(slot), generation))
    }

    /// Ends a block, victim or not: false when somebody holds it or it is not that block any more. Its slot
    /// is free once a sweep finds no reader.
    pub fn retire(&mut self, slot: SlotId, generation: Generation) -> bool {
        // The class is asked for first: a retired slot may be swept at once.
        let class = self.slab.slot_bytes(slot);
        let retired = self.slab.retire(slot, generation).is_ok();
        if retired && let Some(policy) = class.and_then(|class| self.classes.get_mut(&class)) {
            policy.remove(slot.0);
        }
        retired
    }

    /// Frees retired slots that no worker reads any more; gives how many.
    pub fn sweep(&mut self, hazards: &HazardSet) -> usize {
        let freed = self.slab.sweep(hazards);
        self.swept();
        freed
    }

    /// The arena was swept: what is in limbo now has a reader, and nobody should count on it.
    pub fn swept(&mut self) {
        self.stuck = self.limbo_len();
    }

    /// Retired slots that wait for a sweep, or for the end of a reader.
    pub fn limbo_len(&self) -> usize {
        self.slab.usage().limbo as usize
    }

    /// How many slots of the class of `bytes` are worth freeing at once when there is none: 1/64 of the
    /// class, 1 to 16.
    pub fn batch(&self, bytes: u32) -> usize {
        let usage = self.slab.usage();
        let class = self.slab.class_for(bytes).unwrap_or(0);
        let slots = usage.classes.iter().find(|one| one.slot_bytes == class).map_or(0, |one| one.slots);
        (slots / 64).clamp(1, BATCH_MAX) as usize
    }

    /// How many victims to choose for a request of `bytes` that found no slot: a batch, less what is coming
    /// back. `leaving` is how many were chosen before and are not retired; limbo counts as far as the last
    /// sweep did not leave it there, so that a reader who never ends stops nobody.
    pub fn missing(&self, bytes: u32, leaving: usize) -> usize {
        let coming = leaving + self.limbo_len().saturating_sub(self.stuck);
        self.batch(bytes).saturating_sub(coming)
    }

    /// Slot sizes, in bytes, of which less than the low share is free while no region is, nor will be.
    pub fn sizes_below_low(&self) -> Vec<u32> {
        let usage = self.slab.usage();
        if usage.regions_free > 0 || self.growing {
            return Vec::new();
        }
        let low = |slots: u32| (f64::from(slots) * self.watermarks.low) as u32;
        usage
            .classes
            .iter()
            .filter(|class| class.free < low(class.slots))
            .map(|class| class.slot_bytes)
            .collect()
    }

    /// How many slots of that size must come free until the high share is. Retired ones count as free.
    pub fn missing_to_high(&self, bytes: u32) -> usize {
        let usage = self.slab.usage();
        let class = usage.classes.iter().find(|class| Some(class.slot_bytes) == self.slab.class_for(bytes));
        class.map_or(0, |class| {
            let high = (f64::from(class.slots) * self.watermarks.high) as u32;
            high.saturating_sub(class.free + usage.limbo) as usize
        })
    }

    /// Chooses a region of another class to empty for blocks of `bytes` and stops the arena from handing
    /// its slots out. All its blocks ([`Self::slots_of`]) are victims now: each is to be retired or kept.
    /// `None` when the class has no claim, or no region can be emptied.
    pub fn region_to_steal(
        &mut self,
        bytes: u32,
        evictable: &mut dyn FnMut(&BlockKey) -> bool,
    ) -> Option<u32> {
        let to = self.slab.class_for(bytes)?;
        let usage = self.slab.usage();
        if self.drain.is_some() || usage.regions_free > 0 || self.growing {
            return None;
        }
        let idle = self.classes.get(&to).is_none_or(|policy| policy.is_empty());
        // A class that is not poor may still be pinned from end to end; then it has a claim as well, unless
        // everybody else has less.
        let own = usage.classes.iter().find(|class| class.slot_bytes == to).map_or(0, |class| class.regions);
        let others = usage.classes.iter().filter(|class| class.slot_bytes != to);
        let donor = others.max_by_key(|class| class.regions).filter(|donor| idle || donor.regions >= own)?;
        let found = self.find_donor_region(donor.slot_bytes, evictable);
        let Some(region) = found else {
            self.own_victims = OWN_VICTIMS;
            return None;
        };
        for (slot, _) in self.slab.slots_of_region(region) {
            self.forget(slot);
        }
        self.slab.set_draining(region, true);
        self.drain = Some(Drain { region, from: donor.slot_bytes, to, takes: 0, patience: PATIENCE });
        Some(region)
    }

    /// Every block of a region.
    pub fn slots_of(&self, region: u32) -> Vec<(SlotId, Generation)> {
        self.slab.slots_of_region(region)
    }

    /// One more hold on a block, if it still is that block.
    pub fn hold(&self, slot: SlotId, generation: Generation) -> Option<Held> {
        self.slab.hold(slot, generation)
    }

    /// Holds on the block in a slot.
    pub fn holds(&self, slot: SlotId) -> u32 {
        self.slab.header(slot).map_or(0, |header| header.holds)
    }

    /// Which block is in a slot. The number may come from a worker.
    pub fn key_in(&self, slot: SlotId) -> Option<BlockKey> {
        self.slab.header(slot).filter(is_block).map(|header| header.record.key)
    }

    /// The blocks that came through the restart, unverified, in slot order.
    pub fn adopted(&self) -> Vec<(SlotId, Generation, Record)> {
        self.slab.adopted().map(|(slot, header)| (slot, header.generation, header.record)).collect()
    }

    /// The checksum of an adopted block was right. False when it is no block any more.
    pub fn mark_verified(&self, held: &Held) -> bool {
        self.slab.mark_verified(held)
    }

    fn region_of(&self, slot: SlotId) -> u32 {
        slot.0 / (self.region_bytes / 4096)
    }

    fn policy_of(&mut self, slot: SlotId) -> Option<&mut Box<dyn Policy>> {
        let class = self.slab.slot_bytes(slot)?;
        self.classes.get_mut(&class)
    }

    /// A region of the donor whose blocks can all leave, if one of its next victims lies in such a region.
    fn find_donor_region(&mut self, donor: u32, evictable: &mut dyn FnMut(&BlockKey) -> bool) -> Option<u32> {
        let (slab, region_slots) = (&self.slab, self.region_bytes / 4096);
        let (mut tried, mut found) = (BTreeSet::new(), None);
        // The answer is always no: the caller takes the slot out with its neighbours.
        self.classes.get_mut(&donor)?.victim(&mut |slot| {
            let region = slot / region_slots;
            if found.is_none() && tried.len() < DONORS_MAX && tried.insert(region) {
                let mut blocks = slab.slots_of_region(region).into_iter();
                let empties = blocks.all(|(slot, _)| free_to_leave(slab, slot, evictable).is_some());
                found = empties.then_some(region);
            }
            false
        });
        found
    }

    /// Whether the only free region is kept for another class.
    fn is_promised_away(&mut self, class: u32) -> bool {
        let Some(drain) = self.drain.as_mut().filter(|drain| drain.to != class) else { return false };
        let usage = self.slab.usage();
        let free = usage.classes.iter().find(|one| one.slot_bytes == class).map_or(0, |one| one.free);
        if usage.regions_free != 1 || free > 0 {
            return false;
        }
        drain.patience -= 1;
        if drain.patience == 0 {
            self.drain = None;
            return false;
        }
        true
    }

    /// A slot of `class` was asked for: sees whether the drain has reached its end, or never will.
    fn watch_drain(&mut self, class: u32, taken: bool) {
        let Some(drain) = self.drain.as_mut() else { return };
        drain.takes += 1;
        let (drain, first) = (*drain, drain.region * (self.region_bytes / 4096));
        let emptied = self.slab.slot_bytes(SlotId(first)) != Some(drain.from);
        if emptied && taken && class == drain.to {
            self.drain = None;
        } else if drain.takes >= DRAIN_TAKES_MAX {
            self.stop_drain();
        }
    }

    fn stop_drain(&mut self) {
        if let Some(drain) = self.drain.take() {
            self.slab.set_draining(drain.region, false);
        }
    }
}

fn is_block(header: &SlotHeader) -> bool {
    matches!(header.state, SlotState::Sealed | SlotState::Unverified)
}

/// Whether a class owns less than half of its fair share of the regions, and somebody else more than his.
fn is_poor(usage: &SlabUsage, class: u32) -> bool {
    let own = usage.classes.iter().find(|one| one.slot_bytes == class);
    let classes = usage.classes.len() as u32 + u32::from(own.is_none());
    let fair = usage.regions_total / classes;
    own.map_or(0, |own| own.regions) * 2 < fair && usage.classes.iter().any(|one| one.regions > fair)
}

/// The slot's header, if it holds a block that nobody holds and `evictable` agrees.
fn free_to_leave(
    slab: &Slab,
    slot: SlotId,
    evictable: &mut dyn FnMut(&BlockKey) -> bool,
) -> Option<SlotHeader> {
    let free = |header: &SlotHeader| is_block(header) && header.holds == 0;
    slab.header(slot).filter(free).filter(|header| evictable(&header.record.key))
}

#[cfg(test)]
mod tests {
    use kv_arena::{Geometry, HugePages, MemorySpec, ShardMemory};
    use kv_block::{BindingTag, Checksum, Epoch};

    use super::*;

    const REGION: u64 = 2 << 20;

    struct World {
        memory: ShardMemory,
        tier: HostTier,
        hazards: HazardSet,
        keys: u64,
    }

    impl World {
        fn new(regions: u32, kind: PolicyKind) -> Self {
            let geometry = Geometry { regions, region_bytes: REGION, table_entries_max: 8 };
            let memory = ShardMemory::anonymous(geometry).unwrap();
            let tier = HostTier::new(memory.slab().clone(), kind, Watermarks::default());
            Self { memory, tier, hazards: HazardSet::new(), keys: 0 }
        }

        /// Stores a block and holds it no longer.
        fn store(&mut self, bytes: u32) -> Option<(SlotId, Generation)> {
            let slot = self.tier.take(bytes)?;
            let held = self.seal(slot, bytes);
            let place = (held.id(), held.generation());
            self.tier.insert(place.0, bytes, Priority::Normal, false);
            Some(place)
        }

        fn seal(&mut self, slot: Slot, bytes: u32) -> Held {
            self.keys += 1;
            let key = BlockKey::from_halves([self.keys, 0]);
            let (tag, priority) = (BindingTag(0), Priority::Normal);
            let checksum = Checksum::default();
            slot.seal(&Record { key, checksum, bytes, tag, priority, expires_at: 0 })
        }

        /// Stores as many as fit.
        fn fill(&mut self, bytes: u32) -> Vec<(SlotId, Generation)> {
            std::iter::from_fn(|| self.store(bytes)).collect()
        }

        fn evict(&mut self, bytes: u32) -> bool {
            let Some((slot, generation)) = self.tier.victim(bytes, &mut |_| true) else { return false };
            assert!(self.tier.retire(slot, generation));
            true
        }

        /// What the node does to store a block when there is no room.
        fn store_evicting(&mut self, bytes: u32) -> bool {
            for _ in 0..3 {
                if self.store(bytes).is_some() {
                    return true;
                }
                let mut evicted = 0;
                while evicted < self.tier.missing(bytes, 0).max(1) && self.evict(bytes) {
                    evicted += 1;
                }
                if evicted == 0
                    && let Some(region) = self.tier.region_to_steal(bytes, &mut |_| true)
                {
                    for (slot, generation) in self.tier.slots_of(region) {
                        assert!(self.tier.retire(slot, generation));
                    }
                }
                self.tier.sweep(&self.hazards);
            }
            false
        }

        fn regions_of(&self, bytes: u32) -> u32 {
            let usage = self.tier.usage();
            usage.classes.iter().find(|class| class.slot_bytes == bytes).map_or(0, |class| class.regions)
        }
    }

    #[test]
    fn a_full_class_gives_its_oldest_block_and_the_slot_comes_back() {
        for kind in PolicyKind::ALL {
            let mut world = World::new(1, kind);
            let stored = world.fill(64 << 10);
            assert_eq!(stored.len(), 32);
            let victim = world.tier.victim(64 << 10, &mut |_| true);
            assert_eq!(victim, Some(stored[0]));
            assert!(world.tier.take(64 << 10).is_none(), "leaving is not free");
            assert!(world.tier.retire(stored[0].0, stored[0].1));
            assert!(world.tier.take(64 << 10).is_none(), "limbo is not free");
            assert_eq!(world.tier.limbo_len(), 1);
            assert_eq!(world.tier.sweep(&world.hazards), 1);
            assert!(world.store(64 << 10).is_some());
            assert_eq!(world.tier.len(), 32);
        }
    }

    #[test]
    fn held_and_pinned_blocks_are_no_victims() {
        let mut world = World::new(1, PolicyKind::Sieve);
        let stored = world.fill(512 << 10);
        let _held = world.tier.hold(stored[0].0, stored[0].1).unwrap();
        assert_eq!(world.tier.holds(stored[0].0), 1);
        let pinned = world.tier.key_in(stored[1].0).unwrap();
        let mut free = |key: &BlockKey| *key != pinned;
        assert_eq!(world.tier.victim(512 << 10, &mut free), Some(stored[2]));
        assert_eq!(world.tier.victim(512 << 10, &mut free), Some(stored[3]));
        assert_eq!(world.tier.victim(512 << 10, &mut free), None);
        assert!(!world.tier.retire(stored[0].0, stored[0].1), "somebody holds it");
        assert_eq!(world.tier.len(), 2);
    }

    #[test]
    fn a_victim_that_is_kept_may_be_chosen_again_later() {
        let mut world = World::new(1, PolicyKind::Sieve);
        let stored = world.fill(512 << 10);
        assert_eq!(world.tier.victim(512 << 10, &mut |_| true), Some(stored[0]));
        world.tier.keep(stored[0].0, Priority::Normal);
        let order: Vec<_> = std::iter::from_fn(|| world.tier.victim(512 << 10, &mut |_| true)).collect();
        assert_eq!(order, [stored[1], stored[2], stored[3], stored[0]]);
    }

    #[test]
    fn numbers_from_workers_are_not_believed() {
        let mut world = World::new(2, PolicyKind::Sieve);
        world.store(64 << 10).unwrap();
        for slot in [1, 31, 32, 511, 512, 1023, 1024, u32::MAX - 1, u32::MAX].map(SlotId) {
            world.tier.touch(slot);
            world.tier.forget(slot);
            world.tier.keep(slot, Priority::High);
            assert_eq!((world.tier.key_in(slot), world.tier.holds(slot)), (None, 0));
            assert!(!world.tier.retire(slot, Generation(1)));
        }
        assert_eq!(world.tier.len(), 1);
    }

    #[test]
    fn slots_are_freed_ahead_between_the_watermarks() {
        let mut world = World::new(1, PolicyKind::Sieve);
        let stored = world.fill(4096);
        assert_eq!(stored.len(), 512);
        assert_eq!(world.tier.sizes_below_low(), [4096]);
        assert_eq!(world.tier.missing_to_high(4096), 30, "6 of a hundred");
        for _ in 0..30 {
            assert!(world.evict(4096));
        }
        assert_eq!(world.tier.missing_to_high(4096), 0, "what is in limbo counts");
        world.tier.sweep(&world.hazards);
        assert!(world.tier.sizes_below_low().is_empty());
        while world.store(4096).is_some() && world.tier.sizes_below_low().is_empty() {}
        assert_eq!(
            world.tier.missing_to_high(4096),
            30 - 14,
            "freeing begins again below 15, 3 of a hundred"
        );
    }

    #[test]
    fn a_class_of_few_slots_frees_nothing_ahead() {
        let mut world = World::new(1, PolicyKind::Sieve);
        assert_eq!(world.fill(512 << 10).len(), 4);
        assert!(world.tier.sizes_below_low().is_empty());
        assert_eq!(world.tier.missing_to_high(512 << 10), 0);
    }

    #[test]
    fn a_reader_who_never_ends_stops_nobody_elses_eviction() {
        let mut world = World::new(1, PolicyKind::Sieve);
        world.fill(4096);
        let batch = world.tier.batch(4096);
        assert_eq!(batch, 8);
        assert_eq!(world.tier.missing(4096, 0), batch);
        assert_eq!(world.tier.missing(4096, 3), batch - 3);
        (0..batch).for_each(|_| assert!(world.evict(4096)));
        assert_eq!(world.tier.missing(4096, 0), 0, "they are on their way");
        // A sweep that could free none of them: hazards of some worker name them all.
        world.tier.swept();
        assert_eq!(world.tier.missing(4096, 0), batch);
    }

    #[test]
    fn a_new_size_takes_a_whole_region_from_the_richest() {
        let mut world = World::new(4, PolicyKind::Sieve);
        world.fill(64 << 10);
        assert_eq!(world.regions_of(64 << 10), 4);
        assert!(world.tier.take(1 << 20).is_none());
        assert_eq!(world.tier.victim(1 << 20, &mut |_| true), None);
        let region = world.tier.region_to_steal(1 << 20, &mut |_| true).unwrap();
        assert_eq!(world.tier.region_to_steal(1 << 20, &mut |_| true), None, "one at a time");
        let blocks = world.tier.slots_of(region);
        assert_eq!(blocks.len(), 32);
        assert_eq!(world.tier.len(), 96, "they are not chosen again");
        for (at, (slot, generation)) in blocks.into_iter().enumerate() {
            assert!(world.tier.retire(slot, generation));
            world.tier.sweep(&world.hazards);
            if at < 31 {
                assert!(world.tier.take(64 << 10).is_none(), "its slots are not handed out meanwhile");
            }
        }
        assert!(world.tier.take(64 << 10).is_none(), "the free region is promised");
        assert!(world.store(1 << 20).is_some());
        assert!(world.store(1 << 20).is_some());
        assert_eq!((world.regions_of(64 << 10), world.regions_of(1 << 20)), (3, 1));
    }

    #[test]
    fn an_emptied_region_is_not_kept_for_ever() {
        let mut world = World::new(2, PolicyKind::Sieve);
        world.fill(64 << 10);
        let region = world.tier.region_to_steal(1 << 20, &mut |_| true).unwrap();
        for (slot, generation) in world.tier.slots_of(region) {
            assert!(world.tier.retire(slot, generation));
        }
        world.tier.sweep(&world.hazards);
        let denied = (0..1000).take_while(|_| world.tier.take(64 << 10).is_none()).count();
        assert_eq!(denied, PATIENCE as usize - 1);
    }

    #[test]
    fn a_region_with_a_pinned_block_is_not_stolen() {
        let mut world = World::new(2, PolicyKind::Sieve);
        let stored = world.fill(64 << 10);
        let pinned = world.tier.key_in(stored[5].0).unwrap();
        let region = world.tier.region_to_steal(1 << 20, &mut |key| *key != pinned).unwrap();
        assert_ne!(region, stored[5].0.0 / 512, "that region cannot be emptied");
        let mut world = World::new(2, PolicyKind::Sieve);
        world.fill(64 << 10);
        assert_eq!(world.tier.region_to_steal(1 << 20, &mut |_| false), None);
        assert_eq!(world.tier.len(), 64);
    }

    #[test]
    fn a_block_that_is_kept_ends_the_theft() {
        let mut world = World::new(2, PolicyKind::Sieve);
        world.fill(64 << 10);
        let region = world.tier.region_to_steal(1 << 20, &mut |_| true).unwrap();
        let blocks = world.tier.slots_of(region);
        assert!(world.tier.retire(blocks[0].0, blocks[0].1));
        blocks[1..].iter().for_each(|(slot, _)| world.tier.keep(*slot, Priority::Normal));
        world.tier.sweep(&world.hazards);
        assert!(world.store(64 << 10).is_some(), "its slots are handed out again");
        assert_eq!(world.tier.len(), 64);
    }

    #[test]
    fn two_sizes_in_use_end_up_with_a_fair_share_each() {
        let mut world = World::new(8, PolicyKind::S3Fifo);
        world.fill(64 << 10);
        assert_eq!(world.regions_of(64 << 10), 8);
        for round in 0..600 {
            assert!(world.store_evicting(128 << 10), "round {round}");
            assert!(world.store_evicting(64 << 10), "round {round}");
        }
        let (small, large) = (world.regions_of(64 << 10), world.regions_of(128 << 10));
        assert!(large >= 2 && small >= 2, "{small} and {large} of 8 regions");
    }

    #[test]
    fn nobody_leaves_ahead_while_regions_come_and_a_tier_that_stays_small_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let spec = MemorySpec {
            dir: dir.path().to_owned(),
            name: "shard-0".into(),
            geometry: Geometry { regions: 40, region_bytes: REGION, table_entries_max: 8 },
            numa_node: None,
            huge: HugePages::Off,
            hugetlbfs_dir: None,
            ready_bytes: REGION,
            promised_bytes: 0,
        };
        let (mut memory, _) = ShardMemory::open(&spec, Epoch(1)).unwrap();
        let mut grower = memory.take_grower().unwrap();
        let tier = HostTier::new(memory.slab().clone(), PolicyKind::Sieve, Watermarks::default());
        let mut world = World { memory, tier, hazards: HazardSet::new(), keys: 0 };
        assert!(world.tier.is_growing());
        assert_eq!((world.tier.bytes_max(), world.tier.bytes_wanted()), (REGION, 40 * REGION));
        assert_eq!(world.fill(4096).len(), 512);
        assert!(world.tier.sizes_below_low().is_empty(), "more comes");
        assert_eq!(world.tier.region_to_steal(1 << 20, &mut |_| true), None, "more comes");
        world.tier.grown(grower.step().unwrap().unwrap());
        assert_eq!(world.fill(1 << 20).len(), 32);
        world.tier.growth_ended();
        assert!(!world.tier.is_growing());
        assert_eq!(world.tier.bytes_max(), 17 * REGION);
        assert_eq!(world.tier.sizes_below_low(), [4096], "what is there must do");
        // Shares are of what is there: the one region of small blocks is no more than poor.
        assert!(!is_poor(&world.tier.usage(), 1 << 20) && is_poor(&world.tier.usage(), 4096));
    }

    #[test]
    fn blocks_of_an_earlier_life_are_in_the_order_again() {
        let mut world = World::new(1, PolicyKind::Sieve);
        let stored = world.fill(512 << 10);
        // A tier made anew over the same arena, as after a restart.
        let mut tier = HostTier::new(world.memory.slab().clone(), PolicyKind::Sieve, Watermarks::default());
        assert!(tier.is_empty() && tier.adopted().is_empty(), "these blocks were never away");
        for (slot, _) in &stored {
            tier.insert(*slot, 512 << 10, Priority::Normal, true);
        }
        assert_eq!(tier.len(), 4);
        let victim = tier.victim(512 << 10, &mut |_| true).unwrap();
        assert!(tier.retire(victim.0, victim.1));
    }
}
