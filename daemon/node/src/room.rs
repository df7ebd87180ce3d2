//! Room in host memory: quota, eviction, offload.
//!
//! A put or an onboard takes a free slot. So that it seldom has to wait, slots are freed ahead, between two
//! watermarks:
//! ```text
//!   victim --- worth it, not up yet --- upload ---> as below when it is copied
//!          --- on disk already ------------------> slot retired, block stays on disk
//!          --- admitted, disk serving -- write --> slot retired when the write is done
//!          --- otherwise ------------------------> slot retired, block remembered as evicted
//!   retired slot --- nobody's hazard names it ---> free
//! ```
//! While host memory still grows, nobody leaves: whoever finds no slot waits for the next region.

use std::collections::VecDeque;

use kv_arena::{Entry, EntryState, Held, Slot};
use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Fault, Generation, MissReason, Priority, SlotId, Tier};

use crate::brain::{Brain, Out, Stalled};
use crate::io::{Micros, Now, Origin, Reply};
use crate::removal::DiskCopy;

/// Blocks of a tenant that one eviction for its quota looks at.
const QUOTA_SCAN_MAX: usize = 1024;

/// Why there is no slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NoRoom {
    /// Slots are on their way back, or new ones on their way.
    Soon,
    /// They are on their way, but too many requests wait for them.
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
        if !self.tenants[tenant].may_hold(u64::from(bytes)) {
            return Err(NoRoom::Quota);
        }
        while self.tenants[tenant].excess(u64::from(bytes)) > 0 {
            if !self.evict_of_tenant(tenant) {
                return Err(NoRoom::Quota);
            }
        }
        self.take_or_evict(now, bytes, out)
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
                let quota = tenant.quota_bytes.unwrap_or(u64::MAX);
                let text = format!("tenant {} may hold {quota} bytes of this shard", tenant.name);
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

    /// A free slot for bytes that nobody will keep; on behalf of no tenant.
    pub(crate) fn room_for_a_while(&mut self, now: Now, bytes: u32, out: &mut Out) -> Result<Slot, NoRoom> {
        self.take_or_evict(now, bytes, out)
    }

    fn take_or_evict(&mut self, now: Now, bytes: u32, out: &mut Out) -> Result<Slot, NoRoom> {
        if let Some(slot) = self.host.take(bytes) {
            return Ok(slot);
        }
        // Nobody leaves for a slot that is about to come anyway.
        if self.host.is_growing() {
            return Err(NoRoom::Soon);
        }
        self.make_room(now, bytes, out);
        if let Some(slot) = self.host.take(bytes) {
            return Ok(slot);
        }
        if self.host.limbo_len() > 0 || self.offloads > 0 || self.leaving > 0 {
            self.sweep_wanted = true;
            return Err(NoRoom::Soon);
        }
        Err(NoRoom::Full)
    }

    /// Starts as many evictions as one more block of this size needs.
    fn make_room(&mut self, now: Now, bytes: u32, out: &mut Out) {
        for _ in 0..self.host.missing(bytes, self.leaving) {
            if !self.evict_one(now, bytes, out) {
                break;
            }
        }
        if self.host.limbo_len() + self.leaving == 0 {
            self.steal_region(now, bytes, out);
        }
    }

    /// Empties the cheapest region of another block size.
    fn steal_region(&mut self, now: Now, bytes: u32, out: &mut Out) {
        let pins = &self.pins;
        let Some(region) = self.host.region_to_steal(bytes, &mut |key| !pins.holds(key)) else { return };
        for (slot, generation) in self.host.slots_of(region) {
            self.evict_slot(now, slot, generation, out);
        }
    }

    /// Keeps free slots between the watermarks.
    pub(crate) fn free_ahead(&mut self, now: Now, out: &mut Out) {
        for bytes in self.host.sizes_below_low() {
            let mut missing = self.host.missing_to_high(bytes);
            missing = missing.saturating_sub(self.leaving);
            for _ in 0..missing {
                if !self.evict_one(now, bytes, out) {
                    break;
                }
            }
        }
        if self.host.limbo_len() > 0 {
            self.sweep_wanted = true;
        }
    }

    /// Starts the departure of one block of this size. False when none can go.
    fn evict_one(&mut self, now: Now, bytes: u32, out: &mut Out) -> bool {
        let (pins, host) = (&self.pins, &mut self.host);
        let victim = host.victim(bytes, &mut |key| !pins.holds(key));
        let Some((slot, generation)) = victim else { return false };
        self.evict_slot(now, slot, generation, out);
        true
    }

    /// Takes out one block of a tenant, whatever its size: the oldest that was not read lately, as far as
    /// [`QUOTA_SCAN_MAX`] looks reach. False when none can go.
    fn evict_of_tenant(&mut self, tenant: usize) -> bool {
        let looks = self.tenants[tenant].order.len().min(QUOTA_SCAN_MAX);
        for look in 0..looks * 2 {
            let Some((slot, generation)) = self.tenants[tenant].order.pop_front() else { return false };
            let key = self.host.key_in(slot);
            let entry = key.and_then(|key| self.catalog.find(&key));
            let Some(entry) = entry.filter(|entry| entry.host == Some((slot, generation))) else { continue };
            let warm = look < looks && (entry.frequency > 0 || entry.priority == Priority::High);
            if warm {
                self.catalog.cool(&entry.key);
            }
            if warm || self.pins.holds(&entry.key) || self.host.holds(slot) > 0 {
                self.tenants[tenant].order.push_back((slot, generation));
                continue;
            }
            self.host.forget(slot);
            if self.leave_host(&entry.key, slot, generation, MissReason::EvictedQuota) {
                return true;
            }
        }
        false
    }

    /// Lets the block in a slot leave host memory, by way of the object tier and of the disk when it is worth it.
    fn evict_slot(&mut self, now: Now, slot: SlotId, generation: Generation, out: &mut Out) {
        let Some(key) = self.host.key_in(slot) else { return };
        let entry = self.catalog.find(&key).filter(|entry| entry.host == Some((slot, generation)));
        let Some(entry) = entry else {
            // Forgotten already, only somebody held it then.
            self.sweep_wanted |= self.host.retire(slot, generation);
            return;
        };
        if !self.upload_before_it_leaves(now, &entry, out) {
            self.depart(now, &entry, slot, generation, out);
        }
    }

    /// Lets a block leave host memory whose place in the object tier is settled, one way or the other.
    pub(crate) fn depart(
        &mut self,
        now: Now,
        entry: &Entry,
        slot: SlotId,
        generation: Generation,
        out: &mut Out,
    ) {
        let key = entry.key;
        let mut why = MissReason::EvictedCapacity;
        let on_disk = entry.disk.is_some();
        let admitted = self.disk_serving == Some(true) && self.admission.leaves(&key, on_disk);
        if !on_disk && self.disk_serving == Some(true) {
            if !admitted {
                why = MissReason::AdmissionRejected;
            } else if self.offloads < self.config.offloads_max
                && self.start_write(now, &key, true, out).is_some()
            {
                return;
            }
        }
        self.leave_host(&key, slot, generation, why);
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
        self.forget_host(&entry, why);
        true
    }

    /// The catalog knows a block in host memory no longer; its slot is on its way back, or held.
    fn forget_host(&mut self, entry: &Entry, why: MissReason) {
        self.left_host(entry.binding);
        self.uploads.left_host(&entry.key);
        self.catalog.drop_host(&entry.key, why);
        self.order.forget(&entry.key);
        self.removed_event(entry.key, Tier::Host);
        *self.counters.evictions.entry(why.name()).or_default() += 1;
        self.sweep_wanted = true;
    }

    /// A slot is being filled with a block of this binding: its quota must hold that, too.
    pub(crate) fn coming(&mut self, binding: BindingId) {
        let (tenant, bytes) = (self.tenant_of(binding), u64::from(self.bytes_of(binding)));
        self.tenants[tenant].coming_bytes += bytes;
    }

    /// It is filled, or will not be.
    pub(crate) fn came(&mut self, binding: BindingId) {
        let (tenant, bytes) = (self.tenant_of(binding), u64::from(self.bytes_of(binding)));
        self.tenants[tenant].coming_bytes -= bytes;
    }

    pub(crate) fn entered_host(&mut self, block: &Held, binding: BindingId, returning: bool) {
        let record = block.record();
        self.host.insert(block.id(), record.bytes, record.priority, returning);
        let tenant = self.tenant_of(binding);
        self.tenants[tenant].host_bytes += u64::from(record.bytes);
        self.tenants[tenant].host_blocks += 1;
        self.queue_for_quota(tenant, (block.id(), block.generation()));
        self.stored_event(record.key, binding, Tier::Host);
        self.note_if_asked(&record.key, record.priority);
    }

    fn left_host(&mut self, binding: BindingId) {
        let bytes = u64::from(self.bytes_of(binding));
        let tenant = self.tenant_of(binding);
        self.tenants[tenant].host_bytes -= bytes;
        self.tenants[tenant].host_blocks -= 1;
    }

    /// The block is the youngest of its tenant. Places that blocks have left are swept out when they are most.
    fn queue_for_quota(&mut self, tenant: usize, place: (SlotId, Generation)) {
        let (host, catalog) = (&self.host, &self.catalog);
        let tenant = &mut self.tenants[tenant];
        tenant.order.push_back(place);
        if tenant.order.len() as u64 > tenant.host_blocks * 2 + 64 {
            tenant.order.retain(|place| {
                let entry = host.key_in(place.0).and_then(|key| catalog.find(&key));
                entry.is_some_and(|entry| entry.host == Some(*place))
            });
        }
    }

    pub(crate) fn entered_disk(&mut self, key: &BlockKey, binding: BindingId) {
        self.charge_disk(binding);
        self.stored_event(*key, binding, Tier::Disk);
    }

    pub(crate) fn charge_disk(&mut self, binding: BindingId) {
        let tenant = self.tenant_of(binding);
        self.tenants[tenant].disk_bytes += u64::from(self.bytes_of(binding));
        self.tenants[tenant].disk_blocks += 1;
    }

    pub(crate) fn left_disk(&mut self, binding: BindingId) {
        let bytes = u64::from(self.bytes_of(binding));
        let tenant = self.tenant_of(binding);
        self.tenants[tenant].disk_bytes -= bytes;
        self.tenants[tenant].disk_blocks -= 1;
    }

    /// Forgets the disk copy of a block; a tombstone keeps it from coming back, unless its segment goes anyway.
    pub(crate) fn leave_disk(&mut self, key: &BlockKey, why: MissReason, copy: DiskCopy, out: &mut Out) {
        let Some(entry) = self.catalog.find(key) else { return };
        let Some(at) = entry.disk else { return };
        self.left_disk(entry.binding);
        self.catalog.drop_disk(key, why);
        self.removed_event(*key, Tier::Disk);
        *self.counters.evictions.entry(why.name()).or_default() += 1;
        if let DiskCopy::Buried(wanted_by) = copy {
            self.tombstone(key, at, wanted_by, out);
        }
    }

    /// A block in host memory is not what was sealed.
    pub(crate) fn host_corrupt(&mut self, key: &BlockKey) {
        *self.counters.checksum_failures.entry(Tier::Host.name()).or_default() += 1;
        tracing::warn!(%key, code = %Code::CorruptHost, "a block kept in host memory failed its checksum");
        let Some(entry) = self.catalog.find(key) else { return };
        let Some((slot, generation)) = entry.host else { return };
        self.host.forget(slot);
        // Whoever reads it cannot be stopped; nobody else gets it.
        if !self.host.retire(slot, generation) {
            self.condemned.push((slot, generation));
        }
        self.forget_host(&entry, MissReason::Corrupt);
    }

    /// Gives back the slots of damaged blocks that nobody holds any more.
    pub(crate) fn retire_condemned(&mut self) {
        let host = &mut self.host;
        self.condemned.retain(|&(slot, generation)| {
            !host.retire(slot, generation) && host.hold(slot, generation).is_some()
        });
    }

    /// Removes a block whose time is over; says whether it is over. One in use goes when it is released.
    pub(crate) fn expire_if_due(&mut self, now: Now, key: &BlockKey, out: &mut Out) -> bool {
        let due = self.catalog.find(key).is_some_and(|entry| {
            entry.expires_at != 0 && entry.expires_at <= now.unix && entry.state == EntryState::Present
        });
        if due {
            self.remove_block(key, None, MissReason::Expired, Removing::Now, out);
        }
        due
    }

    pub(crate) fn evict(
        &mut self,
        asked: (Origin, Micros),
        keys: &[BlockKey],
        tier: Option<Tier>,
        dry_run: bool,
        out: &mut Out,
    ) {
        let (mut done, mut kept, mut absent, mut left) = (0, 0, 0, 0);
        let number = self.number();
        let how = if dry_run { Removing::Never } else { Removing::For(number) };
        for key in keys {
            match self.remove_block(key, tier, MissReason::EvictedRequest, how, out) {
                Removed::Gone { to_bury } => {
                    done += 1;
                    left += usize::from(to_bury);
                }
                Removed::InUse => kept += 1,
                Removed::Absent => absent += 1,
            }
        }
        self.eviction_asked(number, asked, left, Reply::Counted { done, kept, absent }, out);
    }

    /// Removes a block from a tier or from all, unless it is pinned or in use.
    pub(crate) fn remove_block(
        &mut self,
        key: &BlockKey,
        tier: Option<Tier>,
        why: MissReason,
        how: Removing,
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
        if how == Removing::Never {
            return Removed::Gone { to_bury: false };
        }
        if let Some((slot, generation)) = from_host {
            self.host.forget(slot);
            if !self.leave_host(key, slot, generation, why) {
                return Removed::InUse;
            }
        }
        let wanted_by = if let Removing::For(number) = how { Some(number) } else { None };
        if from_disk.is_some() {
            self.leave_disk(key, why, DiskCopy::Buried(wanted_by), out);
        }
        Removed::Gone { to_bury: from_disk.is_some() }
    }

    /// Tries again what waited for room: of each block length in order, until one must wait on.
    pub(crate) fn retry_stalled(&mut self, now: Now, out: &mut Out) {
        let lengths: Vec<u32> = self.stalled.keys().copied().collect();
        for bytes in lengths {
            while let Some(stalled) = self.stalled.get_mut(&bytes).and_then(VecDeque::pop_front) {
                let must_wait = match stalled {
                    Stalled::Put(fill) => match self.try_fill(now, fill, out) {
                        Ok(()) => false,
                        Err(NoRoom::Soon) => true,
                        Err(why) => {
                            self.fill_failed(now, fill, why, out);
                            false
                        }
                    },
                    Stalled::Fetch { fetch } => match self.try_take_in(now, fetch, out) {
                        Ok(()) => false,
                        Err(None) => true,
                        Err(Some(reason)) => {
                            self.fetch_refused(now, fetch, reason, out);
                            false
                        }
                    },
                    Stalled::Onboard { key } => match self.try_onboard(now, key, out) {
                        Ok(()) => false,
                        Err(None) => true,
                        Err(Some(reason)) => {
                            self.onboard_failed(now, &key, reason, out);
                            false
                        }
                    },
                };
                if must_wait {
                    self.stalled.entry(bytes).or_default().push_front(stalled);
                    break;
                }
            }
            if self.stalled.get(&bytes).is_some_and(VecDeque::is_empty) {
                self.stalled.remove(&bytes);
            }
        }
    }
}

/// Why a block should go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Removing {
    /// It should not, somebody only asks.
    Never,
    /// Nobody waits for it.
    Now,
    /// The eviction or job of this number waits until no crash brings it back.
    For(u64),
}

/// What became of a block that should go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Removed {
    /// `to_bury`: its disk copy has yet to be.
    Gone {
        to_bury: bool,
    },
    InUse,
    Absent,
}
