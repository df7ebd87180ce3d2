//! What passes between host memory and the disk tier, and what the disk tier asks for.
//!
//! A block that is read comes with its slot and a verdict. A wrong block is quarantined: it is forgotten on
//! disk, remembered as corrupt, and whoever waited misses. A device that fails or is slow costs a miss and
//! nothing else.

use kv_arena::{Entry, EntryState, Slot};
use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, DiskLocation, Fault, Generation, MissReason, Record, SlotId, Tier};
use kv_tiers::catalog::is_expired;
use kv_tiers::reclaim::{MoveLimit, OnSegment, plan_reclaim};
use kv_tiers::store::{OpToken, StoreDone, StoreError, StoreOp};

use crate::brain::{Brain, DiskOp, Out, Pending, Source, Stalled, Timer};
use crate::fetch::Served;
use crate::io::{Now, Reply};
use crate::jobs::Checked;
use crate::removal::DiskCopy;
use crate::room::NoRoom;

/// Segments that a store may keep free or open, beside those that are full.
const SEGMENTS_KEPT_FREE: u64 = 4;
/// After how many milliseconds a segment that could not be released is tried again.
const RELEASE_AGAIN_MS: u64 = 1000;

impl Brain {
    /// Starts to bring a block up from disk, unless somebody does already. On success it is pending.
    pub(crate) fn onboard(&mut self, now: Now, entry: &Entry, out: &mut Out) -> Result<(), MissReason> {
        let key = entry.key;
        if self.pending.contains_key(&key) {
            return Ok(());
        }
        if self.disk_serving != Some(true) {
            return Err(MissReason::TierDegraded);
        }
        if self.onboards >= self.config.onboards_max {
            return Err(MissReason::Overloaded);
        }
        let bytes = self.bytes_of(entry.binding);
        let queue = self.stalled.contains_key(&bytes);
        match if queue { Err(None) } else { self.try_onboard(now, key, out) } {
            Ok(()) => {}
            Err(Some(reason)) => return Err(reason),
            Err(None) if self.stalled_len() >= self.config.stalled_max => {
                return Err(MissReason::Overloaded);
            }
            Err(None) => self.stalled.entry(bytes).or_default().push_back(Stalled::Onboard { key }),
        }
        self.onboards += 1;
        self.pending.insert(key, Pending::from(Source::Onboarding));
        Ok(())
    }

    /// Finds a slot and has the block read into it. `Err(None)` when it has to wait for room, else why it
    /// cannot be.
    pub(crate) fn try_onboard(
        &mut self,
        now: Now,
        key: BlockKey,
        out: &mut Out,
    ) -> Result<(), Option<MissReason>> {
        let Some(entry) = self.catalog.find(&key) else { return Err(Some(MissReason::NeverStored)) };
        let Some(at) = entry.disk else { return Err(Some(why_gone(&entry))) };
        let record = self.record_of(&entry).ok_or(MissReason::NeverStored)?;
        let tenant = self.tenant_of(entry.binding);
        match self.room(now, record.bytes, tenant, out) {
            Ok(into) => {
                let token = OpToken(self.number());
                self.ops.insert(token, DiskOp::Read { key, at, binding: entry.binding });
                self.coming(entry.binding);
                self.store(StoreOp::Read { token, at, record, into }, out);
                Ok(())
            }
            Err(NoRoom::Soon) => Err(None),
            Err(NoRoom::Quota) => Err(Some(MissReason::Quota)),
            Err(_) => Err(Some(MissReason::Overloaded)),
        }
    }

    /// A block does not come up: whoever waited for it misses, and puts of it are tried.
    pub(crate) fn onboard_failed(&mut self, now: Now, key: &BlockKey, reason: MissReason, out: &mut Out) {
        self.onboards -= 1;
        let Some(pending) = self.pending.remove(key) else { return };
        for waiter in pending.waiters {
            self.cancel(waiter.timer);
            self.miss(waiter.from, key, reason, out);
        }
        self.retry_puts(now, pending.puts, out);
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
                self.written(now, token, &record, &result, out);
            }
            StoreDone::Read { token, into, result } => match self.ops.remove(&token) {
                Some(DiskOp::Read { key, at, binding }) => {
                    self.came(binding);
                    self.onboarded(now, &key, at, into, result, out);
                }
                Some(DiskOp::Check { key, at, job }) => {
                    drop(into);
                    self.checked(&key, at, job, &result, out);
                    self.retry_stalled(now, out);
                }
                _ => {}
            },
            StoreDone::Moved { token, result } => self.moved(token, result, out),
            StoreDone::Removed { token, result } => {
                let removed = self.ops.remove(&token);
                if let Err(error) = &result {
                    tracing::warn!(%error, "a removal did not reach the disk; the block may come back after a restart");
                }
                if let Some(DiskOp::Remove { wanted_by: Some(number) }) = removed {
                    self.removal_ended(number, result, out);
                }
            }
            StoreDone::Released { token, result } => self.released(now, token, result),
            StoreDone::Reclaim { segment, entries, room_bytes } => {
                self.reclaim(now, segment, &entries, room_bytes, out);
            }
        }
    }

    fn written(
        &mut self,
        now: Now,
        token: OpToken,
        record: &Record,
        result: &Result<DiskLocation, StoreError>,
        out: &mut Out,
    ) {
        let Some(DiskOp::Write { key, slot, generation, leave, durable_for }) = self.ops.remove(&token)
        else {
            return;
        };
        self.offloads -= 1;
        self.leaving -= usize::from(leave);
        match result {
            Ok(at) => {
                self.counters.offload_blocks += 1;
                self.counters.offload_bytes += u64::from(record.bytes);
                self.landed(&key, record, *at, out);
            }
            Err(error) => tracing::debug!(%key, %error, "offload failed"),
        }
        for waiter in durable_for {
            self.cancel(waiter.timer);
            match result {
                Ok(_) => self.reply(waiter.from, Reply::Stored { already: false }, out),
                Err(error) => {
                    let text = format!("the block is stored in host memory, but not on disk: {error}");
                    self.fault(waiter.from, Fault::new(error.code(), text), out);
                }
            }
        }
        if leave {
            self.leave_after_write(&key, slot, generation);
        }
        self.retry_stalled(now, out);
    }

    /// A block was written to disk; what it was written for may have changed meanwhile.
    fn landed(&mut self, key: &BlockKey, record: &Record, at: DiskLocation, out: &mut Out) {
        let entry = self.catalog.find(key);
        match entry.and_then(|entry| entry.disk) {
            Some(older) => {
                // A second copy. With the same bytes the newer one counts, after a restart as well. With
                // others it is nobody's; a tombstone would end the copy that counts, too.
                if entry.is_some_and(|entry| entry.checksum == record.checksum) {
                    let _moved = self.catalog.move_disk(key, older, at);
                }
            }
            None if self.catalog.add_disk(key, at, record.checksum) => {
                self.entered_disk(key, entry.map_or(BindingId(0), |entry| entry.binding));
            }
            // Gone meanwhile: it must not come back after a restart. A write that is under way came before
            // the tombstone and would be ended by it, too; then rather a block that comes back.
            None if self.ops.values().any(|op| matches!(op, DiskOp::Write { key: of, .. } if of == key)) => {}
            None => self.tombstone(key, at, None, out),
        }
    }

    /// A victim's write has ended: its slot goes, unless somebody came to want it meanwhile.
    fn leave_after_write(&mut self, key: &BlockKey, slot: SlotId, generation: Generation) {
        let there = self.catalog.find(key).filter(|entry| entry.host == Some((slot, generation)));
        let Some(entry) = there else { return };
        if self.pins.holds(key) {
            self.host.keep(slot, entry.priority);
        } else {
            self.leave_host(key, slot, generation, MissReason::EvictedCapacity);
        }
    }

    pub(crate) fn tombstone(
        &mut self,
        key: &BlockKey,
        at: DiskLocation,
        wanted_by: Option<u64>,
        out: &mut Out,
    ) {
        let token = OpToken(self.number());
        self.ops.insert(token, DiskOp::Remove { wanted_by });
        self.store(StoreOp::Remove { token, at, key: *key }, out);
    }

    /// A worker stored a block of which there is a copy on disk. Other bytes count instead of the old ones;
    /// the same ones belong to whoever stored them last.
    pub(crate) fn kept_on_disk(
        &mut self,
        before: &Entry,
        binding: BindingId,
        stale: Option<DiskLocation>,
        out: &mut Out,
    ) {
        self.left_disk(before.binding);
        match stale {
            Some(at) => {
                self.removed_event(before.key, Tier::Disk);
                self.tombstone(&before.key, at, None, out);
            }
            None => self.charge_disk(binding),
        }
    }

    fn onboarded(
        &mut self,
        now: Now,
        key: &BlockKey,
        at: DiskLocation,
        into: Slot,
        result: Result<(), StoreError>,
        out: &mut Out,
    ) {
        let Some(entry) = self.catalog.find(key) else {
            drop(into);
            return self.onboard_failed(now, key, MissReason::NeverStored, out);
        };
        let Some(now_at) = entry.disk else {
            drop(into);
            return self.onboard_failed(now, key, why_gone(&entry), out);
        };
        let record = self.record_of(&entry);
        match (result, record) {
            (Ok(()), Some(record)) => {
                let block = into.seal(&record);
                self.counters.onboard_blocks += 1;
                self.counters.onboard_bytes += u64::from(record.bytes);
                let place = (block.id(), block.generation());
                if let Err(why) = self.catalog.publish_host(&record, entry.binding, place) {
                    tracing::error!(%key, %why, "a block that came up did not enter the catalog");
                    drop(block);
                    self.host.retire(place.0, place.1);
                    self.sweep_wanted = true;
                    return self.onboard_failed(now, key, MissReason::Overloaded, out);
                }
                self.onboards -= 1;
                self.entered_host(&block, entry.binding, true);
                let puts = self.arrived(now, key, &block, Served::By(Tier::Disk), out);
                drop(block);
                self.retry_puts(now, puts, out);
                self.free_ahead(now, out);
            }
            // It was moved while it was read, and the old place was given away: it is read at the new one.
            (Err(StoreError::Stale { .. } | StoreError::Corrupt { .. }), _) if now_at != at => {
                drop(into);
                match self.try_onboard(now, *key, out) {
                    Ok(()) => {}
                    Err(reason) => {
                        let reason = reason.unwrap_or(MissReason::Overloaded);
                        self.onboard_failed(now, key, reason, out);
                    }
                }
            }
            (Err(error), _) => {
                drop(into);
                let reason = self.read_failed(key, &error, out);
                self.onboard_failed(now, key, reason, out);
                self.retry_stalled(now, out);
            }
            (Ok(()), None) => self.onboard_failed(now, key, MissReason::NeverStored, out),
        }
    }

    /// What a failed read, at the place where the catalog has it, means for the block.
    fn read_failed(&mut self, key: &BlockKey, error: &StoreError, out: &mut Out) -> MissReason {
        match error {
            StoreError::Corrupt { .. } => {
                *self.counters.checksum_failures.entry(Tier::Disk.name()).or_default() += 1;
                tracing::warn!(%key, code = %Code::CorruptDisk, %error, "a block on disk failed its checksum and is quarantined");
                self.leave_disk(key, MissReason::Corrupt, DiskCopy::Buried(None), out);
                MissReason::Corrupt
            }
            StoreError::Stale { .. } => {
                self.leave_disk(key, MissReason::EvictedReclaim, DiskCopy::WithSegment, out);
                MissReason::EvictedReclaim
            }
            StoreError::Slow { .. } => MissReason::TierTimeout,
            StoreError::Full => MissReason::Overloaded,
            _ => MissReason::TierDegraded,
        }
    }

    /// A block was read to be checked, not to be served. An error of the device says nothing about it.
    fn checked(
        &mut self,
        key: &BlockKey,
        at: DiskLocation,
        job: u64,
        result: &Result<(), StoreError>,
        out: &mut Out,
    ) {
        let still_there = self.catalog.find(key).is_some_and(|entry| entry.disk == Some(at));
        let checked = match result {
            Err(error) if still_there => match self.read_failed(key, error, out) {
                MissReason::Corrupt => Checked::Wrong,
                _ => Checked::Unread,
            },
            _ => Checked::Right,
        };
        self.job_checked(key, job, checked);
    }

    /// The store wants a segment back: what is worth it moves, the rest is forgotten.
    fn reclaim(
        &mut self,
        now: Now,
        segment: u32,
        entries: &[(Record, DiskLocation)],
        room_bytes: u64,
        out: &mut Out,
    ) {
        let alive: u64 = self.tenants.iter().map(|tenant| tenant.disk_bytes).sum();
        let listed: u64 = entries.iter().map(|(record, _)| u64::from(record.bytes)).sum();
        // On a disk of few segments, what is alive can fill all that are not kept free: moving it around would
        // never end.
        let few = alive.saturating_add(listed.saturating_mul(SEGMENTS_KEPT_FREE)) > room_bytes;
        let roomy = !few && alive.saturating_mul(2) <= room_bytes;
        let limit = if roomy { MoveLimit::All } else { MoveLimit::Bytes(listed / 2) };
        let plan = plan_reclaim(entries, limit, |record, at| {
            let entry = self.catalog.find(&record.key).filter(|entry| entry.disk == Some(at))?;
            Some(OnSegment {
                in_host: entry.host.is_some(),
                expired: is_expired(&entry, now.unix),
                frequency: entry.frequency,
                // Whoever waits for it would miss.
                pinned: self.pins.holds(&record.key) || self.is_onboarding(&record.key),
            })
        });
        for (record, _) in &plan.drops {
            self.leave_disk(&record.key, MissReason::EvictedReclaim, DiskCopy::WithSegment, out);
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
                // If it left the catalog meanwhile, a tombstone follows the move in the log. Another one now
                // would end what was written since under the same name.
                let _moved = self.catalog.move_disk(&key, from, at);
            }
            Err(error) if still_there => {
                let corrupt = matches!(error, StoreError::Corrupt { .. });
                if corrupt {
                    *self.counters.checksum_failures.entry(Tier::Disk.name()).or_default() += 1;
                }
                let why = if corrupt { MissReason::Corrupt } else { MissReason::EvictedReclaim };
                let copy = if corrupt { DiskCopy::Buried(None) } else { DiskCopy::WithSegment };
                self.leave_disk(&key, why, copy, out);
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
            self.release_segment(segment, out);
        }
    }

    pub(crate) fn release_segment(&mut self, segment: u32, out: &mut Out) {
        let token = OpToken(self.number());
        self.ops.insert(token, DiskOp::Release { segment });
        self.store(StoreOp::Release { token, segment }, out);
    }

    /// A segment that could not be released is offered no more: it is tried again, or its space is lost until
    /// the next start.
    fn released(&mut self, now: Now, token: OpToken, result: Result<(), StoreError>) {
        let (Some(DiskOp::Release { segment }), Err(error)) = (self.ops.remove(&token), result) else {
            return;
        };
        tracing::warn!(segment, %error, "a segment could not be released");
        if !matches!(error, StoreError::Stale { .. } | StoreError::Closed) {
            self.start_timer(now.micros.plus_ms(RELEASE_AGAIN_MS), Timer::Release { segment });
        }
    }
}

/// Why a block that is on no tier is gone.
fn why_gone(entry: &Entry) -> MissReason {
    match entry.state {
        EntryState::Ghost(reason) => reason,
        _ => MissReason::NeverStored,
    }
}
