//! What passes between host memory and the disk tier, and what the disk tier asks for.
//!
//! A block that is read comes with its slot and a verdict. A wrong block is quarantined: it is forgotten on
//! disk, remembered as corrupt, and whoever waited misses. A device that fails or is slow costs a miss and
//! nothing else.

use kv_arena::{Entry, Slot};
use kv_block::code::Code;
use kv_block::{
    BindingId, BlockKey, DiskLocation, Fault, Generation, MissReason, Priority, Record, SlotId, Tier,
};
use kv_tiers::catalog::is_expired;
use kv_tiers::reclaim::{MoveLimit, OnSegment, plan_reclaim};
use kv_tiers::store::{OpToken, StoreDone, StoreError, StoreOp};

use crate::brain::{Brain, DiskOp, Out, Pending, Source, Stalled, Waiter};
use crate::io::{Now, Origin, Reply};
use crate::room::NoRoom;

impl Brain {
    /// Starts to bring a block up from disk, or joins who does already.
    pub(crate) fn onboard(
        &mut self,
        now: Now,
        entry: &Entry,
        from: Option<Origin>,
        out: &mut Out,
    ) -> Result<(), MissReason> {
        let key = entry.key;
        if !self.is_onboarding(&key) {
            if self.disk_serving != Some(true) {
                return Err(MissReason::TierDegraded);
            }
            if self.onboards >= self.config.onboards_max {
                return Err(MissReason::Overloaded);
            }
            self.pending.insert(key, Pending { source: Source::Onboarding, waiters: Vec::new() });
            self.onboards += 1;
            if let Err(true) = self.try_onboard(now, key, out) {
                if self.stalled.len() >= self.config.stalled_max {
                    self.onboard_failed(&key, MissReason::Overloaded, out);
                    return Err(MissReason::Overloaded);
                }
                self.stalled.push_back(Stalled::Onboard { key });
            }
        }
        if let Some(from) = from {
            if !self.is_onboarding(&key) {
                return Err(MissReason::Overloaded);
            }
            self.wait_for(key, Waiter { from, wants_lease: true });
        }
        Ok(())
    }

    /// Finds a slot and has the block read into it. `Err(true)` when it has to wait for room; every other
    /// failure has been answered.
    pub(crate) fn try_onboard(&mut self, now: Now, key: BlockKey, out: &mut Out) -> Result<(), bool> {
        let entry = self.catalog.find(&key).filter(|entry| entry.disk.is_some());
        let Some((entry, at)) = entry.and_then(|entry| entry.disk.map(|at| (entry, at))) else {
            self.onboard_failed(&key, MissReason::EvictedReclaim, out);
            return Err(false);
        };
        let Some(record) = self.record_of(&entry) else {
            self.onboard_failed(&key, MissReason::NeverStored, out);
            return Err(false);
        };
        let tenant = self.tenant_of(entry.binding);
        match self.room(now, record.bytes, tenant, out) {
            Ok(into) => {
                let token = OpToken(self.number());
                self.ops.insert(token, DiskOp::Read { key });
                self.store(StoreOp::Read { token, at, record, into }, out);
                Ok(())
            }
            Err(NoRoom::Soon) => Err(true),
            Err(why) => {
                let reason = if why == NoRoom::Quota { MissReason::Quota } else { MissReason::Overloaded };
                self.onboard_failed(&key, reason, out);
                Err(false)
            }
        }
    }

    fn onboard_failed(&mut self, key: &BlockKey, reason: MissReason, out: &mut Out) {
        self.onboards = self.onboards.saturating_sub(1);
        let Some(pending) = self.pending.remove(key) else { return };
        for waiter in pending.waiters.into_iter().filter(|waiter| waiter.wants_lease) {
            self.miss(waiter.from, key, reason, out);
        }
    }

    /// What the store should find where the catalog says that the block is.
    pub(crate) fn record_of(&self, entry: &Entry) -> Option<Record> {
        let bound = self.bound(entry.binding)?;
        Some(Record {
            key: entry.key,
            checksum: entry.checksum,
            bytes: bound.block_bytes,
            tag: bound.tag,
            priority: entry.priority,
            expires_at: entry.expires_at,
        })
    }

    pub(crate) fn store_done(&mut self, now: Now, done: StoreDone, out: &mut Out) {
        match done {
            StoreDone::Written { token, bytes, result } => {
                let record = bytes.record();
                drop(bytes);
                self.written(now, token, &record, result, out);
            }
            StoreDone::Read { token, into, result } => match self.ops.remove(&token) {
                Some(DiskOp::Read { key }) => self.onboarded(now, &key, into, result, out),
                Some(DiskOp::Check { key }) => {
                    drop(into);
                    self.checked(&key, result, out);
                }
                _ => {}
            },
            StoreDone::Moved { token, result } => self.moved(token, result, out),
            StoreDone::Removed { token, result } => {
                self.ops.remove(&token);
                if let Err(error) = result {
                    tracing::warn!(%error, "a removal did not reach the disk; the block may come back after a restart");
                }
            }
            StoreDone::Released { token, result } => {
                self.ops.remove(&token);
                if let Err(error) = result {
                    tracing::warn!(%error, "a segment could not be released");
                }
            }
            StoreDone::Reclaim { segment, entries } => self.reclaim(now, segment, &entries, out),
        }
    }

    fn written(
        &mut self,
        now: Now,
        token: OpToken,
        record: &Record,
        result: Result<DiskLocation, StoreError>,
        out: &mut Out,
    ) {
        let Some(DiskOp::Write { key, slot, generation, leave, durable_for }) = self.ops.remove(&token)
        else {
            return;
        };
        self.offloads = self.offloads.saturating_sub(1);
        match &result {
            Ok(at) => {
                self.counters.offload_blocks += 1;
                self.counters.offload_bytes += u64::from(record.bytes);
                let entry = self.catalog.find(&key);
                if let Some(older) = entry.and_then(|entry| entry.disk) {
                    // A second copy: the newer one counts, a tombstone would end both.
                    let _moved = self.catalog.move_disk(&key, older, *at);
                } else if self.catalog.add_disk(&key, *at, record.checksum) {
                    self.entered_disk(&key, entry.map_or(BindingId(0), |entry| entry.binding));
                } else {
                    // Gone meanwhile, by request: it must not come back after a restart.
                    self.tombstone(&key, *at, out);
                }
            }
            Err(error) => tracing::debug!(%key, %error, "offload failed"),
        }
        for from in durable_for {
            match &result {
                Ok(_) => self.reply(from, Reply::Stored { already: false }, out),
                Err(error) => {
                    let text = format!("the block is stored in host memory, but not on disk: {error}");
                    self.fault(from, Fault::new(error.code(), text), out);
                }
            }
        }
        if leave {
            self.leave_after_write(&key, slot, generation, result.is_ok(), out);
        }
        self.retry_stalled(now, out);
    }

    /// A victim's write has ended: its slot goes, unless somebody came to want it meanwhile.
    fn leave_after_write(
        &mut self,
        key: &BlockKey,
        slot: SlotId,
        generation: Generation,
        written: bool,
        _out: &mut Out,
    ) {
        if self.host.key_in(slot) != Some(*key) {
            return;
        }
        let why = if written { MissReason::EvictedCapacity } else { MissReason::AdmissionRejected };
        if self.pins.holds(key) {
            self.host.keep(slot, Priority::Normal);
        } else {
            self.leave_host(key, slot, generation, why);
        }
    }

    fn tombstone(&mut self, key: &BlockKey, at: DiskLocation, out: &mut Out) {
        let token = OpToken(self.number());
        self.ops.insert(token, DiskOp::Remove);
        self.store(StoreOp::Remove { token, at, key: *key }, out);
    }

    /// A worker stored other bytes under the name of a block on disk: the newer ones count.
    pub(crate) fn stale_on_disk(
        &mut self,
        key: &BlockKey,
        binding: BindingId,
        at: DiskLocation,
        out: &mut Out,
    ) {
        self.left_disk(binding);
        self.removed_event(*key, Tier::Disk);
        self.tombstone(key, at, out);
    }

    fn onboarded(
        &mut self,
        now: Now,
        key: &BlockKey,
        into: Slot,
        result: Result<(), StoreError>,
        out: &mut Out,
    ) {
        let entry = self.catalog.find(key).filter(|entry| entry.disk.is_some());
        let Some(entry) = entry else {
            drop(into);
            return self.onboard_failed(key, MissReason::EvictedRequest, out);
        };
        match result {
            Ok(()) => {
                let Some(record) = self.record_of(&entry) else { return };
                let block = into.seal(&record);
                self.counters.onboard_blocks += 1;
                self.counters.onboard_bytes += u64::from(record.bytes);
                let place = (block.id(), block.generation());
                if self.catalog.publish_host(&record, entry.binding, place).is_err() {
                    // A put was faster: its block is there, this one goes.
                    drop(block);
                    self.host.retire(place.0, place.1);
                    self.sweep_wanted = true;
                    return self.onboard_failed(key, MissReason::Overloaded, out);
                }
                self.onboards = self.onboards.saturating_sub(1);
                self.entered_host(&block, entry.binding, true);
                self.arrived(now, key, &block, Tier::Disk, out);
                drop(block);
                self.free_ahead(now, out);
            }
            Err(error) => {
                drop(into);
                let reason = self.read_failed(key, &error, out);
                self.onboard_failed(key, reason, out);
            }
        }
    }

    /// What a failed read means for the block.
    fn read_failed(&mut self, key: &BlockKey, error: &StoreError, out: &mut Out) -> MissReason {
        match error {
            StoreError::Corrupt { .. } => {
                *self.counters.checksum_failures.entry(Tier::Disk.name()).or_default() += 1;
                tracing::warn!(%key, code = %Code::CorruptDisk, %error, "a block on disk failed its checksum and is quarantined");
                self.leave_disk(key, MissReason::Corrupt, true, out);
                MissReason::Corrupt
            }
            StoreError::Stale { .. } => {
                self.leave_disk(key, MissReason::EvictedReclaim, false, out);
                MissReason::EvictedReclaim
            }
            StoreError::Slow { .. } => MissReason::TierTimeout,
            StoreError::Full => MissReason::Overloaded,
            _ => MissReason::TierDegraded,
        }
    }

    /// A block was read to be checked, not to be served. Says whether it was right.
    pub(crate) fn checked(&mut self, key: &BlockKey, result: Result<(), StoreError>, out: &mut Out) {
        let right = match &result {
            Ok(()) => true,
            Err(error) => {
                self.read_failed(key, error, out);
                false
            }
        };
        self.job_checked(key, right);
    }

    /// The store wants a segment back: what is worth it moves, the rest is forgotten.
    fn reclaim(&mut self, now: Now, segment: u32, entries: &[(Record, DiskLocation)], out: &mut Out) {
        let alive: u64 = self.tenants.iter().map(|tenant| tenant.disk_bytes).sum();
        let listed: u64 = entries.iter().map(|(record, _)| u64::from(record.bytes)).sum();
        let roomy = alive.saturating_mul(2) <= self.config.disk_bytes_max;
        let limit = if roomy { MoveLimit::All } else { MoveLimit::Bytes(listed / 2) };
        let plan = plan_reclaim(entries, limit, |record, at| {
            let entry = self.catalog.find(&record.key).filter(|entry| entry.disk == Some(at))?;
            Some(OnSegment {
                in_host: entry.host.is_some(),
                expired: is_expired(&entry, now.unix),
                frequency: entry.frequency,
                pinned: self.pins.holds(&record.key),
            })
        });
        for (record, _) in &plan.drops {
            self.leave_disk(&record.key, MissReason::EvictedReclaim, false, out);
        }
        self.reclaims.insert(segment, plan.moves.len());
        for (record, at) in plan.moves {
            let token = OpToken(self.number());
            let op = DiskOp::Move { key: record.key, segment, bytes: record.bytes, from: at };
            self.ops.insert(token, op);
            // A block earns its next move by being read again.
            self.catalog.cool(&record.key);
            self.store(StoreOp::Move { token, at, record }, out);
        }
        self.release_if_empty(segment, out);
    }

    fn moved(&mut self, token: OpToken, result: Result<DiskLocation, StoreError>, out: &mut Out) {
        let Some(DiskOp::Move { key, segment, bytes, from }) = self.ops.remove(&token) else { return };
        let still_there = self.catalog.find(&key).is_some_and(|entry| entry.disk == Some(from));
        match result {
            Ok(at) => {
                self.counters.moved_blocks += 1;
                self.counters.moved_bytes += u64::from(bytes);
                if !self.catalog.move_disk(&key, from, at) {
                    self.tombstone(&key, at, out);
                }
            }
            Err(error) if still_there => {
                let corrupt = matches!(error, StoreError::Corrupt { .. });
                if corrupt {
                    *self.counters.checksum_failures.entry(Tier::Disk.name()).or_default() += 1;
                }
                let why = if corrupt { MissReason::Corrupt } else { MissReason::EvictedReclaim };
                self.leave_disk(&key, why, false, out);
            }
            Err(_) => {}
        }
        if let Some(left) = self.reclaims.get_mut(&segment) {
            *left -= 1;
        }
        self.release_if_empty(segment, out);
    }

    fn release_if_empty(&mut self, segment: u32, out: &mut Out) {
        if self.reclaims.get(&segment) == Some(&0) {
            self.reclaims.remove(&segment);
            let token = OpToken(self.number());
            self.ops.insert(token, DiskOp::Release);
            self.store(StoreOp::Release { token, segment }, out);
        }
    }
}
