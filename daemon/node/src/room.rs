//! Room in host memory: quota, eviction, offload.
//!
//! A put or an onboard takes a free slot. So that it seldom has to wait, slots are freed ahead, between two
//! watermarks:
//! ```text
//!   victim --- on disk already ------------------> slot retired, block stays on disk
//!          --- admitted, disk serving -- write --> slot retired when the write is done
//!          --- otherwise ------------------------> slot retired, block remembered as evicted
//!   retired slot --- nobody's hazard names it ---> free
//! ```

use kv_arena::{EntryState, Held, Slot};
use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Eviction, Fault, Generation, MissReason, SlotId, Tier};
use kv_tiers::store::{OpToken, StoreOp};

use crate::brain::{Brain, DiskOp, Out, Stalled};
use crate::io::{Now, Origin, Reply};

/// Why there is no slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NoRoom {
    /// Slots are on their way back.
    Soon,
    /// Slots are on their way back, but too many requests wait for them.
    Queue,
    /// Everything is pinned, leased or being written.
    Full,
    /// The tenant's quota is used up by blocks that cannot go.
    Quota,
    /// No slot of that size can ever be.
    TooLarge,
}

impl Brain {
    /// A free slot for a block of a tenant; evicts where it must.
    pub(crate) fn room(
        &mut self,
        now: Now,
        bytes: u32,
        tenant: usize,
        out: &mut Out,
    ) -> Result<Slot, NoRoom> {
        if u64::from(bytes) > self.host.block_bytes_max() {
            return Err(NoRoom::TooLarge);
        }
        while self.tenants[tenant].excess(u64::from(bytes)) > 0 {
            if !self.evict_one(now, bytes, Some(tenant), Eviction::Quota, out) {
                return Err(NoRoom::Quota);
            }
        }
        if let Some(slot) = self.host.take(bytes) {
            return Ok(slot);
        }
        self.make_room(now, bytes, out);
        if let Some(slot) = self.host.take(bytes) {
            return Ok(slot);
        }
        if self.host.limbo_len() > 0 || self.offloads > 0 {
            self.sweep_wanted = true;
            return Err(NoRoom::Soon);
        }
        Err(NoRoom::Full)
    }

    pub(crate) fn no_room(&self, why: NoRoom, tenant: usize, bytes: u32) -> Fault {
        let soon = std::time::Duration::from_millis(5);
        match why {
            NoRoom::Soon | NoRoom::Queue => {
                Fault::new(Code::QueueFull, "too many requests wait for host slots").retry_after(soon)
            }
            NoRoom::Full => Fault::new(Code::HostFull, "every host slot is pinned, leased or being written")
                .retry_after(soon),
            NoRoom::Quota => {
                let tenant = &self.tenants[tenant];
                let text = format!("tenant {} may hold {} bytes", tenant.name, tenant.quota_bytes);
                Fault::new(Code::QuotaFull, text)
            }
            NoRoom::TooLarge => Fault::new(
                Code::WrongLength,
                format!(
                    "a block of {bytes} bytes is longer than a region of {}",
                    self.host.block_bytes_max()
                ),
            ),
        }
    }

    /// Starts as many evictions as one more block of this size needs.
    fn make_room(&mut self, now: Now, bytes: u32, out: &mut Out) {
        for _ in 0..self.host.missing(bytes, self.leaving()) {
            if !self.evict_one(now, bytes, None, Eviction::Capacity, out) {
                break;
            }
        }
        if self.host.limbo_len() + self.leaving() == 0 {
            self.steal_region(now, bytes, out);
        }
    }

    /// Writes under way after which a slot comes back.
    fn leaving(&self) -> usize {
        self.offloads
    }

    /// Empties the cheapest region of another block size.
    fn steal_region(&mut self, now: Now, bytes: u32, out: &mut Out) {
        let pins = &self.pins;
        let Some(region) = self.host.region_to_steal(bytes, &mut |key| !pins.holds(key)) else { return };
        for (slot, generation) in self.host.slots_of(region) {
            self.evict_slot(now, slot, generation, Eviction::Capacity, out);
        }
    }

    /// Keeps free slots between the watermarks.
    pub(crate) fn free_ahead(&mut self, now: Now, out: &mut Out) {
        for bytes in self.host.sizes_below_low() {
            let mut missing = self.host.missing_to_high(bytes);
            missing = missing.saturating_sub(self.leaving());
            for _ in 0..missing {
                if !self.evict_one(now, bytes, None, Eviction::Capacity, out) {
                    break;
                }
            }
        }
        if self.host.limbo_len() > 0 {
            self.sweep_wanted = true;
        }
    }

    /// Starts the departure of one block of this size; of one tenant only, for its quota. False when none
    /// can go.
    fn evict_one(
        &mut self,
        now: Now,
        bytes: u32,
        tenant: Option<usize>,
        by: Eviction,
        out: &mut Out,
    ) -> bool {
        let (pins, host, catalog, bindings) = (&self.pins, &mut self.host, &self.catalog, &self.bindings);
        let of_tenant = |key: &BlockKey| {
            tenant.is_none_or(|wanted| {
                let binding = catalog.find(key).map(|entry| usize::from(entry.binding.0));
                let bound = binding.and_then(|at| bindings.get(at)).and_then(Option::as_ref);
                bound.is_some_and(|bound| bound.tenant == wanted)
            })
        };
        let victim = host.victim(bytes, &mut |key| !pins.holds(key) && of_tenant(key));
        let Some((slot, generation)) = victim else { return false };
        self.evict_slot(now, slot, generation, by, out);
        true
    }

    /// Lets the block in a slot leave host memory, by way of the disk when it is worth it.
    fn evict_slot(&mut self, now: Now, slot: SlotId, generation: Generation, by: Eviction, out: &mut Out) {
        let Some(key) = self.host.key_in(slot) else { return };
        let Some(entry) = self.catalog.find(&key) else {
            self.host.retire(slot, generation);
            return;
        };
        let worth = by == Eviction::Capacity
            && entry.disk.is_none()
            && self.disk_serving == Some(true)
            && self.admission.admits(&key);
        if worth
            && self.offloads < self.config.offloads_max
            && self.start_write(now, &key, true, vec![], out).is_some()
        {
            return;
        }
        self.leave_host(&key, slot, generation, by.into());
    }

    /// Takes a block out of host memory now. Does nothing when somebody reads it: it goes back to the policy.
    pub(crate) fn leave_host(
        &mut self,
        key: &BlockKey,
        slot: SlotId,
        generation: Generation,
        why: MissReason,
    ) -> bool {
        let Some(entry) = self.catalog.find(key).filter(|entry| entry.host == Some((slot, generation)))
        else {
            return false;
        };
        if !self.host.retire(slot, generation) {
            self.host.keep(slot, entry.priority);
            return false;
        }
        self.left_host(entry.binding);
        self.catalog.drop_host(key, why);
        self.removed_event(*key, Tier::Host);
        *self.counters.evictions.entry(why.name()).or_default() += 1;
        self.sweep_wanted = true;
        true
    }

    pub(crate) fn entered_host(&mut self, block: &Held, binding: BindingId, returning: bool) {
        let record = block.record();
        self.host.insert(block.id(), record.bytes, record.priority, returning);
        let tenant = self.tenant_of(binding);
        self.tenants[tenant].host_bytes += u64::from(record.bytes);
        self.tenants[tenant].host_blocks += 1;
        self.stored_event(record.key, binding, Tier::Host);
    }

    fn left_host(&mut self, binding: BindingId) {
        let bytes = u64::from(self.bytes_of(binding));
        let tenant = self.tenant_of(binding);
        self.tenants[tenant].host_bytes -= bytes;
        self.tenants[tenant].host_blocks -= 1;
    }

    pub(crate) fn entered_disk(&mut self, key: &BlockKey, binding: BindingId) {
        let tenant = self.tenant_of(binding);
        self.tenants[tenant].disk_bytes += u64::from(self.bytes_of(binding));
        self.tenants[tenant].disk_blocks += 1;
        self.stored_event(*key, binding, Tier::Disk);
    }

    pub(crate) fn left_disk(&mut self, binding: BindingId) {
        let bytes = u64::from(self.bytes_of(binding));
        let tenant = self.tenant_of(binding);
        self.tenants[tenant].disk_bytes -= bytes;
        self.tenants[tenant].disk_blocks -= 1;
    }

    /// Forgets the disk copy of a block; a tombstone keeps it from coming back, unless its segment goes anyway.
    pub(crate) fn leave_disk(&mut self, key: &BlockKey, why: MissReason, tombstone: bool, out: &mut Out) {
        let Some(entry) = self.catalog.find(key) else { return };
        let Some(at) = entry.disk else { return };
        self.left_disk(entry.binding);
        self.catalog.drop_disk(key, why);
        self.removed_event(*key, Tier::Disk);
        *self.counters.evictions.entry(why.name()).or_default() += 1;
        if tombstone {
            let token = OpToken(self.number());
            self.ops.insert(token, DiskOp::Remove);
            self.store(StoreOp::Remove { token, at, key: *key }, out);
        }
    }

    /// A block in host memory is not what was sealed.
    pub(crate) fn host_corrupt(&mut self, key: &BlockKey) {
        *self.counters.checksum_failures.entry(Tier::Host.name()).or_default() += 1;
        tracing::warn!(%key, code = %Code::CorruptHost, "a block kept in host memory failed its checksum");
        let Some((slot, generation)) = self.catalog.find(key).and_then(|entry| entry.host) else { return };
        self.host.forget(slot);
        self.leave_host(key, slot, generation, MissReason::Corrupt);
    }

    /// Removes a block whose time is over; says whether it is over. One in use goes when it is released.
    pub(crate) fn expire_if_due(&mut self, now: Now, key: &BlockKey, out: &mut Out) -> bool {
        let due = self.catalog.find(key).is_some_and(|entry| {
            entry.expires_at != 0 && entry.expires_at <= now.unix && entry.state == EntryState::Present
        });
        if due {
            self.remove_block(key, None, MissReason::Expired, false, out);
        }
        due
    }

    pub(crate) fn evict(
        &mut self,
        from: Origin,
        keys: &[BlockKey],
        tier: Option<Tier>,
        dry_run: bool,
        out: &mut Out,
    ) {
        let (mut done, mut kept, mut absent) = (0, 0, 0);
        for key in keys {
            match self.remove_block(key, tier, MissReason::EvictedRequest, dry_run, out) {
                Removed::Gone => done += 1,
                Removed::InUse => kept += 1,
                Removed::Absent => absent += 1,
            }
        }
        self.reply(from, Reply::Counted { done, kept, absent }, out);
    }

    /// Removes a block from a tier or from all, unless it is pinned or in use.
    pub(crate) fn remove_block(
        &mut self,
        key: &BlockKey,
        tier: Option<Tier>,
        why: MissReason,
        dry_run: bool,
        out: &mut Out,
    ) -> Removed {
        let Some(entry) = self.catalog.find(key) else { return Removed::Absent };
        let from_host = entry.host.filter(|_| tier.is_none_or(|tier| tier == Tier::Host));
        let from_disk = entry.disk.filter(|_| tier.is_none_or(|tier| tier == Tier::Disk));
        if from_host.is_none() && from_disk.is_none() {
            return Removed::Absent;
        }
        let in_use = from_host.is_some_and(|(slot, _)| self.host.holds(slot) > 0);
        if self.pins.holds(key) || in_use || self.is_onboarding(key) {
            return Removed::InUse;
        }
        if dry_run {
            return Removed::Gone;
        }
        if let Some((slot, generation)) = from_host {
            self.host.forget(slot);
            if !self.leave_host(key, slot, generation, why) {
                return Removed::InUse;
            }
        }
        if from_disk.is_some() {
            self.leave_disk(key, why, true, out);
        }
        Removed::Gone
    }

    /// Tries again what waited for room, in order, until one must wait on.
    pub(crate) fn retry_stalled(&mut self, now: Now, out: &mut Out) {
        while let Some(stalled) = self.stalled.pop_front() {
            let again = match stalled {
                Stalled::Put(fill) => {
                    self.try_fill(now, fill, out).map_err(|why| self.fill_failed(fill, why, out))
                }
                Stalled::Onboard { key } => self.try_onboard(now, key, out),
            };
            if let Err(true) = again {
                self.stalled.push_front(stalled);
                return;
            }
        }
    }
}

/// What became of a block that should go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Removed {
    Gone,
    InUse,
    Absent,
}
