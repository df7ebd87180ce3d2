//! A worker gives blocks.
//!
//! ```text
//!   put      -> [room] -> Fill -> Filled -> sealed, visible -> reply (or, durable: disk write -> reply)
//!   reserve  -> announced: readers may wait -> commit -> as put
//!            -> abort, session end, ttl: withdrawn, waiters miss
//! ```

use kv_arena::{Held, LentSlot, Slot};
use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Checksum, Fault, Generation, MissReason, Record, SlotId, Tier};
use kv_tiers::store::{OpToken, StoreOp};

use crate::brain::{Brain, DiskOp, Fill, Out, Pending, PutOf, Source, Stalled, Timer};
use crate::io::{Command, FillToken, Grant, Keep, Micros, Now, Origin, Reply};
use crate::room::NoRoom;

impl Brain {
    /// Why a put under this binding and length cannot be.
    fn check_put(&self, binding: BindingId, bytes: Option<u32>) -> Result<(), Fault> {
        let Some(bound) = self.bound(binding) else {
            return Err(Fault::new(Code::UnknownBinding, format!("binding {binding} is not registered")));
        };
        match bytes {
            Some(bytes) if bytes != bound.block_bytes => Err(Fault::new(
                Code::WrongLength,
                format!("{bytes} bytes offered, blocks of binding {binding} have {}", bound.block_bytes),
            )),
            _ => Ok(()),
        }
    }

    pub(crate) fn put(&mut self, now: Now, fill: Fill, out: &mut Out) {
        let PutOf { key, binding, bytes, durable, .. } = fill.put;
        if let Err(fault) = self.check_put(binding, Some(bytes)) {
            return self.fault(fill.from, fault, out);
        }
        self.admission.seen(&key);
        self.expire_if_due(now, &key, out);
        if self.catalog.find(&key).is_some_and(|entry| entry.host.is_some()) {
            return self.already_stored(now, fill, durable, out);
        }
        match self.pending.get(&key).map(|pending| &pending.source) {
            None => {}
            Some(Source::Onboarding | Source::Filling) => {
                self.counters.put_already += 1;
                return self.reply(fill.from, Reply::Stored { already: true }, out);
            }
            Some(Source::Announced { .. }) => {
                let text = format!("block {key} is announced by another session");
                return self.fault(fill.from, Fault::new(Code::AlreadyReserved, text), out);
            }
        }
        if let Err(fault) = self.announce(&key, binding, fill.put.keep, Source::Filling) {
            return self.fault(fill.from, fault, out);
        }
        self.fill(now, fill, out);
    }

    fn already_stored(&mut self, now: Now, fill: Fill, durable: bool, out: &mut Out) {
        self.counters.put_already += 1;
        self.touch_key(&fill.put.key);
        let on_disk = self.catalog.find(&fill.put.key).is_some_and(|entry| entry.disk.is_some());
        if durable && !on_disk {
            return self.write_durably(now, fill, out);
        }
        self.reply(fill.from, Reply::Stored { already: true }, out);
    }

    /// Enters a block that is not readable yet. What was known of it on disk stays known.
    fn announce(
        &mut self,
        key: &BlockKey,
        binding: BindingId,
        keep: Keep,
        source: Source,
    ) -> Result<(), Fault> {
        let full =
            |_| Fault::new(Code::HostFull, "the catalog has no free entry; raise `catalog.entries_max`");
        self.catalog.announce(key, binding, keep.priority, keep.expires_at).map_err(full)?;
        self.pending.insert(*key, Pending { source, waiters: Vec::new() });
        Ok(())
    }

    /// Finds a slot and has the bytes copied; or lets the put wait for room.
    fn fill(&mut self, now: Now, fill: Fill, out: &mut Out) {
        let Err(why) = self.try_fill(now, fill, out) else { return };
        let queue = self.stalled.len() < self.config.stalled_max;
        let why = if why == NoRoom::Soon && !queue { NoRoom::Queue } else { why };
        if self.fill_failed(fill, why, out) {
            self.start_timer(fill.deadline, Timer::Stalled { from: fill.from });
            self.stalled.push_back(Stalled::Put(fill));
        }
    }

    pub(crate) fn try_fill(&mut self, now: Now, fill: Fill, out: &mut Out) -> Result<(), NoRoom> {
        let tenant = self.tenant_of(fill.put.binding);
        let slot = self.room(now, fill.put.bytes, tenant, out)?;
        let token = FillToken(self.number());
        self.fills.insert(token, fill);
        let PutOf { key, source, bytes, .. } = fill.put;
        out.push(Command::Fill { fill: token, from: fill.from, source, bytes, key, slot });
        Ok(())
    }

    /// A put found no slot: true when it may wait, otherwise it has been answered.
    pub(crate) fn fill_failed(&mut self, fill: Fill, why: NoRoom, out: &mut Out) -> bool {
        if why == NoRoom::Soon {
            return true;
        }
        self.withdraw(&fill.put.key, out);
        let fault = self.no_room(why, self.tenant_of(fill.put.binding), fill.put.bytes);
        self.fault(fill.from, fault, out);
        false
    }

    pub(crate) fn filled(
        &mut self,
        now: Now,
        token: FillToken,
        slot: Slot,
        checksum: Option<Checksum>,
        out: &mut Out,
    ) {
        let Some(fill) = self.fills.remove(&token) else { return };
        let Some(checksum) = checksum else {
            self.withdraw(&fill.put.key, out);
            let text = "the bytes of the block went away before they were copied";
            return self.fault(fill.from, Fault::new(Code::StagingRange, text), out);
        };
        let Some(record) = self.record_for(&fill.put, checksum) else { return };
        self.publish(now, fill, slot.seal(&record), out);
    }

    fn record_for(&self, put: &PutOf, checksum: Checksum) -> Option<Record> {
        let PutOf { key, bytes, keep: Keep { priority, expires_at }, .. } = *put;
        let tag = self.bound(put.binding)?.tag;
        Some(Record { key, checksum, bytes, tag, priority, expires_at })
    }

    /// Makes a sealed block visible.
    fn publish(&mut self, now: Now, fill: Fill, block: Held, out: &mut Out) {
        let PutOf { key, binding, bytes, durable, .. } = fill.put;
        let (record, place) = (block.record(), (block.id(), block.generation()));
        let published = match self.catalog.publish_host(&record, binding, place) {
            Ok(published) => published,
            Err(why) => {
                drop(block);
                self.host.retire(place.0, place.1);
                self.withdraw(&key, out);
                let text = format!("block {key} did not enter the catalog: {why}");
                return self.fault(fill.from, Fault::new(Code::HostFull, text), out);
            }
        };
        if let Some(at) = published.stale_disk {
            self.stale_on_disk(&key, binding, at, out);
        }
        self.entered_host(&block, binding, published.returning);
        self.counters.put_blocks += 1;
        self.counters.put_bytes += u64::from(bytes);
        if let Some(session) = self.sessions.get_mut(&fill.from.session) {
            session.puts += 1;
            session.announced.remove(&key);
        }
        self.arrived(now, &key, &block, Tier::Host, out);
        drop(block);
        if durable {
            self.write_durably(now, fill, out);
        } else {
            self.reply(fill.from, Reply::Stored { already: false }, out);
        }
        self.free_ahead(now, out);
    }

    /// Answers when the block is on disk, writing it there if nobody does yet.
    fn write_durably(&mut self, now: Now, fill: Fill, out: &mut Out) {
        let key = fill.put.key;
        if self.disk_serving != Some(true) {
            let text =
                "the block is stored in host memory; there is no disk tier in service to make it durable";
            return self.fault(fill.from, Fault::new(Code::TierDegraded, text), out);
        }
        let under_way = self.ops.iter_mut().find_map(|(token, op)| match op {
            DiskOp::Write { key: of, durable_for, .. } if *of == key => Some((*token, durable_for)),
            _ => None,
        });
        if let Some((token, durable_for)) = under_way {
            durable_for.push(fill.from);
            return self.start_timer(fill.deadline, Timer::Durable { token, from: fill.from });
        }
        match self.start_write(now, &key, false, vec![fill.from], out) {
            Some(token) => self.start_timer(fill.deadline, Timer::Durable { token, from: fill.from }),
            None => {
                let text = "the block left host memory before it could be written to disk";
                self.fault(fill.from, Fault::new(Code::TierDegraded, text), out);
            }
        }
    }

    /// Sends a block of host memory to disk. `None` when it is not there any more.
    pub(crate) fn start_write(
        &mut self,
        _now: Now,
        key: &BlockKey,
        leave: bool,
        durable_for: Vec<Origin>,
        out: &mut Out,
    ) -> Option<OpToken> {
        let (slot, generation) = self.catalog.find(key)?.host?;
        let bytes = self.host.hold(slot, generation)?;
        let record = bytes.record();
        let token = OpToken(self.number());
        self.ops.insert(token, DiskOp::Write { key: *key, slot, generation, leave, durable_for });
        self.offloads += 1;
        self.store(StoreOp::Write { token, record, bytes }, out);
        Some(token)
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one request")]
    pub(crate) fn reserve(
        &mut self,
        now: Now,
        from: Origin,
        key: BlockKey,
        binding: BindingId,
        keep: Keep,
        in_place: bool,
        out: &mut Out,
    ) {
        if let Err(fault) = self.check_put(binding, None) {
            return self.fault(from, fault, out);
        }
        self.expire_if_due(now, &key, out);
        let present =
            self.catalog.find(&key).is_some_and(|entry| entry.host.is_some() || entry.disk.is_some());
        if present || self.pending.contains_key(&key) {
            return self.reply(from, Reply::AlreadyThere, out);
        }
        let mut slot = None;
        if in_place {
            let tenant = self.tenant_of(binding);
            match self.room(now, self.bytes_of(binding), tenant, out) {
                Ok(free) => slot = Some(free.lend()),
                Err(why) => {
                    let fault = self.no_room(why, tenant, self.bytes_of(binding));
                    return self.fault(from, fault, out);
                }
            }
        }
        let grant = slot.as_ref().map(|slot: &LentSlot| Grant {
            lease: kv_block::LeaseId(0),
            slot: slot.id(),
            generation: slot.generation(),
            offset: slot.offset(),
            bytes: self.bytes_of(binding),
            checksum: Checksum::default(),
            tier: Tier::Host,
        });
        let source = Source::Announced { session: from.session, binding, keep, slot };
        if let Err(fault) = self.announce(&key, binding, keep, source) {
            return self.fault(from, fault, out);
        }
        if let Some(session) = self.sessions.get_mut(&from.session) {
            session.announced.insert(key);
        }
        let lapses = now.micros.plus_ms(self.config.pending_ttl_ms);
        self.start_timer(lapses, Timer::Announcement { key, session: from.session });
        self.reply(from, Reply::Reserved { slot: grant }, out);
    }

    /// The announcement of `key` by this session, taken out of the table for a moment.
    fn announced_by(
        &mut self,
        from: Origin,
        key: &BlockKey,
    ) -> Result<(BindingId, Keep, Option<LentSlot>), Fault> {
        let not_reserved = || {
            let text = format!("block {key} is not reserved by this session");
            Fault::new(Code::NotReserved, text)
        };
        let pending = self.pending.get_mut(key).ok_or_else(not_reserved)?;
        match &mut pending.source {
            Source::Announced { session, binding, keep, slot } if *session == from.session => {
                Ok((*binding, *keep, slot.take()))
            }
            _ => Err(not_reserved()),
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one request")]
    pub(crate) fn commit(
        &mut self,
        now: Now,
        from: Origin,
        deadline: Micros,
        key: BlockKey,
        source: u64,
        bytes: u32,
        durable: bool,
        out: &mut Out,
    ) {
        let (binding, keep, slot) = match self.announced_by(from, &key) {
            Ok(announced) => announced,
            Err(fault) => return self.fault(from, fault, out),
        };
        drop(slot); // reserved in place but sent by staging: the copy finds its own slot
        if let Err(fault) = self.check_put(binding, Some(bytes)) {
            self.withdraw(&key, out);
            return self.fault(from, fault, out);
        }
        self.admission.seen(&key);
        if let Some(pending) = self.pending.get_mut(&key) {
            pending.source = Source::Filling;
        }
        let put = PutOf { key, binding, source, bytes, keep, durable };
        self.fill(now, Fill { from, deadline, put }, out);
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of one request")]
    pub(crate) fn commit_in_place(
        &mut self,
        now: Now,
        from: Origin,
        key: BlockKey,
        slot: SlotId,
        generation: Generation,
        checksum: Checksum,
        durable: bool,
        deadline: Micros,
        out: &mut Out,
    ) {
        let (binding, keep, filled) = match self.announced_by(from, &key) {
            Ok(announced) => announced,
            Err(fault) => return self.fault(from, fault, out),
        };
        let Some(filled) = filled.filter(|own| own.id() == slot && own.generation() == generation) else {
            self.withdraw(&key, out);
            let text = format!("slot {slot} generation {generation} is not the one reserved for block {key}");
            return self.fault(from, Fault::new(Code::NotReserved, text), out);
        };
        self.admission.seen(&key);
        let put = PutOf { key, binding, source: 0, bytes: self.bytes_of(binding), keep, durable };
        let Some(record) = self.record_for(&put, checksum) else { return };
        self.publish(now, Fill { from, deadline, put }, filled.seal(&record), out);
    }

    pub(crate) fn abort(&mut self, from: Origin, key: &BlockKey, out: &mut Out) {
        match self.announced_by(from, key) {
            Ok(_) => {
                self.withdraw(key, out);
                self.reply(from, Reply::Counted { done: 1, kept: 0, absent: 0 }, out);
            }
            Err(fault) => self.fault(from, fault, out),
        }
    }

    /// Takes an announcement back: the block is no longer expected, whoever waits for it misses.
    pub(crate) fn withdraw(&mut self, key: &BlockKey, out: &mut Out) {
        let Some(pending) = self.pending.remove(key) else { return };
        if let Source::Announced { session, .. } = &pending.source
            && let Some(session) = self.sessions.get_mut(session)
        {
            session.announced.remove(key);
        }
        self.catalog.withdraw(key);
        for waiter in pending.waiters.into_iter().filter(|waiter| waiter.wants_lease) {
            self.miss(waiter.from, key, MissReason::NotComplete, out);
        }
    }
}
