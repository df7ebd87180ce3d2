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
//! - **Memory**: 12 bytes for each slot that was ever used, in the policies.

use std::collections::{BTreeMap, BTreeSet};

use kv_arena::{HazardSet, Held, Slab, SlabUsage, Slot, SlotHeader, SlotState};
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
}

impl HostTier {
    /// The tier over an arena. Blocks that came through a restart ([`Self::adopted`]) are put in with
    /// [`Self::insert`].
    pub fn new(slab: Slab, kind: PolicyKind, watermarks: Watermarks) -> Self {
        let regions = u64::from(slab.usage().regions_total).max(1);
        // At most 2 GiB.
        let region_bytes = (slab.data_bytes() / regions) as u32;
        Self {
            slab,
            kind,
            watermarks,
            classes: BTreeMap::new(),
            drain: None,
            own_victims: 0,
            stuck: 0,
            region_bytes,
        }
    }

    /// The arena.
    pub fn slab(&self) -> &Slab {
        &self.slab
    }

    /// How the arena stands.
    pub fn usage(&self) -> SlabUsage {
        self.slab.usage()
    }

    /// Bytes of the arena.
    pub fn bytes_max(&self) -> u64 {
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

    /// Slot sizes, in bytes, of which less than the low share is free while no region is.
    pub fn sizes_below_low(&self) -> Vec<u32> {
        let usage = self.slab.usage();
        if usage.regions_free > 0 {
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
        if self.drain.is_some() || usage.regions_free > 0 {
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
