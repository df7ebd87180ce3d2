//! A worker gives blocks.
//!
//! ```text
//!   put      -> [room] -> Fill -> Filled -> sealed, visible -> reply (or, durable: disk write -> reply)
//!   reserve  -> announced: readers may wait -> commit, or a put by the same session -> as put
//!            -> abort, session end, ttl: withdrawn, waiters miss
//! ```

use kv_arena::{Held, LentSlot, Slot};
use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Checksum, Fault, Generation, MissReason, Record, SlotId, Tier};
use kv_tiers::catalog::NotEntered;
use kv_tiers::store::{OpToken, StoreOp};

use crate::brain::{Brain, DiskOp, Fill, Out, Pending, PutOf, Source, Stalled, Timer, Waiter};
use crate::fetch::Served;
use crate::io::{Command, FillToken, Grant, Keep, Micros, Now, Origin, Reply};
use crate::room::NoRoom;

impl Brain {
    /// Why a put under this binding and length cannot be.
    fn check_put(&self, binding: BindingId, bytes: Option<u32>) -> Result<(), Fault> {
        let Some(bound) = self.bound(binding) else {
            return Err(unknown_binding(binding));
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
        let PutOf { key, binding, bytes, .. } = fill.put;
        if let Err(fault) = self.check_put(binding, Some(bytes)) {
            return self.fault(fill.from, fault, out);
        }
        let own = |source: &Source| {
            matches!(source, Source::Announced { session, binding: announced, .. }
                if *session == fill.from.session && *announced == binding)
        };
        if self.pending.get(&key).is_some_and(|pending| own(&pending.source)) {
            // These are the bytes of what the session announced. Whoever waits for the block gets it.
            self.admission.seen(&key, false);
            return match self.end_announcement(fill.from, &key) {
                Ok(_) => self.fill(now, fill, out),
                Err(fault) => self.fault(fill.from, fault, out),
            };
        }
        self.sighted(&key);
        self.expire_if_due(now, &key, out);
        if self.is_sound_in_host(&key) {
            return self.already_stored(now, fill, out);
        }
        match self.pending.get(&key).map(|pending| &pending.source) {
            None | Some(Source::Fetching { .. }) => {}
            Some(Source::Onboarding | Source::Filling) => return self.queue_put(fill, out),
            Some(Source::Announced { .. }) => {
                let text = format!("block {key} is announced and has not arrived");
                return self.fault(fill.from, Fault::new(Code::AlreadyReserved, text), out);
            }
        }
        if let Err(fault) = self.announce(&key, binding, fill.put.keep, Source::Filling, out) {
            return self.fault(fill.from, fault, out);
        }
        self.fill(now, fill, out);
    }

    /// Lets a put wait for what becomes of another of the same block, or of its way up from disk: only then
    /// is known whether the block is stored.
    fn queue_put(&mut self, mut fill: Fill, out: &mut Out) {
        let key = fill.put.key;
        if self.pending.get(&key).is_some_and(|pending| pending.puts.len() >= self.config.stalled_max) {
            let fault = self.no_room(NoRoom::Queue, 0, fill.put.bytes);
            return self.fault(fill.from, fault, out);
        }
        fill.timer = self.start_timer(fill.deadline, Timer::Queued { key, from: fill.from });
        if let Some(pending) = self.pending.get_mut(&key) {
            pending.puts.push(fill);
        }
    }

    /// Puts that waited for another are tried by themselves: it is through, or it came to nothing.
    pub(crate) fn retry_puts(&mut self, now: Now, puts: Vec<Fill>, out: &mut Out) {
        for mut fill in puts {
            self.cancel(fill.timer.take());
            self.put(now, fill, out);
        }
    }

    /// Whether host memory has the block. One kept from an earlier life is verified before it is relied on.
    fn is_sound_in_host(&mut self, key: &BlockKey) -> bool {
        let place = self.catalog.find(key).and_then(|entry| entry.host);
        let Some(held) = place.and_then(|(slot, generation)| self.host.hold(slot, generation)) else {
            return false;
        };
        let sound = held.is_verified() || self.verify_held(&held);
        drop(held);
        if !sound {
            self.host_corrupt(key);
        }
        sound
    }

    fn already_stored(&mut self, now: Now, fill: Fill, out: &mut Out) {
        let PutOf { key, keep, durable, .. } = fill.put;
        self.counters.put_already += 1;
        self.touch_key(&key);
        self.renew(now, &key, keep, out);
        let on_disk = self.catalog.find(&key).is_some_and(|entry| entry.disk.is_some());
        if durable && (!on_disk || self.write_under_way(&key).is_some()) {
            return self.write_durably(now, fill, true, out);
        }
        self.reply(fill.from, Reply::Stored { already: true }, out);
    }

    /// Keeps a block of host memory for as long as who stores it again says.
    fn renew(&mut self, now: Now, key: &BlockKey, keep: Keep, out: &mut Out) {
        let entry = self.catalog.find(key).filter(|entry| entry.host.is_some());
        let Some(entry) = entry.filter(|_| self.keep_longer(key, keep)) else { return };
        if entry.disk.is_some() && self.disk_serving == Some(true) {
            // The copy on disk says when it ends: another one says it anew.
            self.start_write(now, key, false, out);
        }
    }

    /// Who stores a block again wants it for as long as he says; a block that is about to expire, or has and
    /// is still in use, must not be reported as stored and then missed. Says whether that is longer than before.
    pub(crate) fn keep_longer(&mut self, key: &BlockKey, keep: Keep) -> bool {
        let Some(entry) = self.catalog.find(key) else { return false };
        let longer = entry.expires_at != 0 && (keep.expires_at == 0 || keep.expires_at > entry.expires_at);
        if longer {
            self.catalog.keep(key, entry.priority, keep.expires_at);
        }
        longer
    }

    fn write_under_way(&self, key: &BlockKey) -> Option<OpToken> {
        let of_it = |op: &DiskOp| matches!(op, DiskOp::Write { key: of, .. } if of == key);
        self.ops.iter().find_map(|(token, op)| of_it(op).then_some(*token))
    }

    /// Enters a block that is not readable yet. What was known of it on disk stays known. A search for it among
    /// the peers ends: whoever waits for that waits for this instead.
    fn announce(
        &mut self,
        key: &BlockKey,
        binding: BindingId,
        keep: Keep,
        source: Source,
        out: &mut Out,
    ) -> Result<(), Fault> {
        let full =
            |_| Fault::new(Code::HostFull, "the catalog has no free entry; raise `catalog.entries_max`");
        self.catalog.announce(key, binding, keep.priority, keep.expires_at).map_err(full)?;
        let waiters = self.overtake_fetch(key, out);
        self.pending.insert(*key, Pending { waiters, ..Pending::from(source) });
        Ok(())
    }

    /// Finds a slot and has the bytes copied; or lets the put wait for room, behind those that wait already.
    fn fill(&mut self, now: Now, mut fill: Fill, out: &mut Out) {
        let bytes = fill.put.bytes;
        if !self.stalled.contains_key(&bytes) {
            match self.try_fill(now, fill, out) {
                Ok(()) => return,
                Err(NoRoom::Soon) => {}
                Err(why) => return self.fill_failed(now, fill, why, out),
            }
        }
        if self.stalled_len() >= self.config.stalled_max {
            return self.fill_failed(now, fill, NoRoom::Queue, out);
        }
        fill.timer = self.start_timer(fill.deadline, Timer::Stalled { bytes, from: fill.from });
        self.stalled.entry(bytes).or_default().push_back(Stalled::Put(fill));
    }

    pub(crate) fn try_fill(&mut self, now: Now, mut fill: Fill, out: &mut Out) -> Result<(), NoRoom> {
        let tenant = self.tenant_of(fill.put.binding);
        let slot = self.room(now, fill.put.bytes, tenant, out)?;
        self.cancel(fill.timer.take());
        let token = FillToken(self.number());
        self.fills.insert(token, fill);
        self.coming(fill.put.binding);
        let PutOf { key, source, bytes, .. } = fill.put;
        out.push(Command::Fill { fill: token, from: fill.from, source, bytes, key, slot });
        Ok(())
    }

    /// A put found no slot and will find none.
    pub(crate) fn fill_failed(&mut self, now: Now, fill: Fill, why: NoRoom, out: &mut Out) {
        self.cancel(fill.timer);
        let fault = self.no_room(why, self.tenant_of(fill.put.binding), fill.put.bytes);
        self.fault(fill.from, fault, out);
        self.withdraw(now, &fill.put.key, out);
    }

    pub(crate) fn filled(
        &mut self,
        now: Now,
        token: FillToken,
        filled: Result<(Slot, Checksum), Fault>,
        out: &mut Out,
    ) {
        let Some(fill) = self.fills.remove(&token) else { return };
        self.came(fill.put.binding);
        let sealed =
            filled.and_then(|(slot, checksum)| Ok(slot.seal(&self.record_for(&fill.put, checksum)?)));
        match sealed {
            Ok(block) => self.publish(now, fill, block, out),
            Err(fault) => {
                self.fault(fill.from, fault, out);
                self.withdraw(now, &fill.put.key, out);
                self.retry_stalled(now, out);
            }
        }
    }

    fn record_for(&self, put: &PutOf, checksum: Checksum) -> Result<Record, Fault> {
        let PutOf { key, bytes, keep: Keep { priority, expires_at }, .. } = *put;
        let tag =
            self.bound(put.binding).map(|bound| bound.tag).ok_or_else(|| unknown_binding(put.binding))?;
        Ok(Record { key, checksum, bytes, tag, priority, expires_at })
    }

    /// Makes a sealed block visible.
    fn publish(&mut self, now: Now, fill: Fill, block: Held, out: &mut Out) {
        let PutOf { key, binding, bytes, durable, .. } = fill.put;
        let (record, place) = (block.record(), (block.id(), block.generation()));
        let before = self.catalog.find(&key);
        let published = match self.catalog.publish_host(&record, binding, place) {
            Ok(published) => published,
            Err(why) => {
                drop(block);
                self.host.retire(place.0, place.1);
                self.sweep_wanted = true;
                if let NotEntered::Already { .. } = why {
                    return self.already_stored(now, fill, out);
                }
                let text = format!("block {key} did not enter the catalog: {why}");
                self.fault(fill.from, Fault::new(Code::HostFull, text), out);
                return self.withdraw(now, &key, out);
            }
        };
        let mut on_disk = false;
        if let Some(before) = before.filter(|before| before.disk.is_some()) {
            on_disk = published.stale_disk.is_none() && before.expires_at == record.expires_at;
            self.kept_on_disk(&before, binding, published.stale_disk, out);
        }
        self.entered_host(&block, binding, published.returning);
        self.counters.put_blocks += 1;
        self.counters.put_bytes += u64::from(bytes);
        if let Some(session) = self.sessions.get_mut(&fill.from.session) {
            session.puts += 1;
        }
        let puts = self.arrived(now, &key, &block, Served::By(Tier::Host), out);
        drop(block);
        if durable && !on_disk {
            self.write_durably(now, fill, false, out);
        } else {
            self.reply(fill.from, Reply::Stored { already: false }, out);
        }
        self.retry_puts(now, puts, out);
        self.free_ahead(now, out);
    }

    /// Answers when the block is on disk, writing it there if nobody does yet. `again`: it was in host memory
    /// before, so somebody may.
    fn write_durably(&mut self, now: Now, fill: Fill, again: bool, out: &mut Out) {
        let key = fill.put.key;
        if self.disk_serving != Some(true) {
            let text =
                "the block is stored in host memory; there is no disk tier in service to make it durable";
            return self.fault(fill.from, Fault::new(Code::TierDegraded, text), out);
        }
        let under_way = if again { self.write_under_way(&key) } else { None };
        let Some(token) = under_way.or_else(|| self.start_write(now, &key, false, out)) else {
            let text = "the block left host memory before it could be written to disk";
            return self.fault(fill.from, Fault::new(Code::TierDegraded, text), out);
        };
        let timer = self.start_timer(fill.deadline, Timer::Durable { token, from: fill.from });
        if let Some(DiskOp::Write { durable_for, .. }) = self.ops.get_mut(&token) {
            durable_for.push(Waiter { from: fill.from, timer });
        }
    }

    /// Sends a block of host memory to disk. `None` when it is not there any more.
    pub(crate) fn start_write(
        &mut self,
        _now: Now,
        key: &BlockKey,
        leave: bool,
        out: &mut Out,
    ) -> Option<OpToken> {
        let entry = self.catalog.find(key)?;
        let (slot, generation) = entry.host?;
        let bytes = self.host.hold(slot, generation)?;
        // It may be kept longer by now than when it was sealed.
        let record = Record { expires_at: entry.expires_at, ..bytes.record() };
        let token = OpToken(self.number());
        let durable_for = Vec::new();
        self.ops.insert(token, DiskOp::Write { key: *key, slot, generation, leave, durable_for });
        self.offloads += 1;
        self.leaving += usize::from(leave);
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
        let expected = self.pending.get(&key).is_some_and(|pending| !pending.is_fetched());
        if present || expected {
            self.renew(now, &key, keep, out);
            return self.reply(from, Reply::AlreadyThere, out);
        }
        let holds = self.sessions.get(&from.session);
        let more = holds.map_or(Ok(()), |session| session.may_hold_more(self.config.leases_per_session_max));
        if let Err(fault) = more {
            return self.fault(from, fault, out);
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
        if slot.is_some() {
            self.coming(binding);
        }
        let lapses = now.micros.plus_ms(self.config.pending_ttl_ms);
        let timer = self.start_timer(lapses, Timer::Announcement { key });
        let source = Source::Announced { session: from.session, binding, keep, slot, timer };
        if let Err(fault) = self.announce(&key, binding, keep, source, out) {
            self.cancel(timer);
            if grant.is_some() {
                self.came(binding);
            }
            return self.fault(from, fault, out);
        }
        if let Some(session) = self.sessions.get_mut(&from.session) {
            session.announced.insert(key);
        }
        self.reply(from, Reply::Reserved { slot: grant }, out);
    }

    /// Ends the announcement of `key` by this session: its bytes come now, or the caller withdraws it.
    fn end_announcement(
        &mut self,
        from: Origin,
        key: &BlockKey,
    ) -> Result<(BindingId, Keep, Option<LentSlot>), Fault> {
        let own =
            |source: &Source| matches!(source, Source::Announced { session, .. } if *session == from.session);
        let announced = match self.pending.get_mut(key) {
            Some(pending) if own(&pending.source) => std::mem::replace(&mut pending.source, Source::Filling),
            _ => Source::Filling,
        };
        let Source::Announced { session, binding, keep, slot, timer } = announced else {
            let text = format!("block {key} is not reserved by this session");
            return Err(Fault::new(Code::NotReserved, text));
        };
        self.cancel(timer);
        if slot.is_some() {
            self.came(binding);
        }
        if let Some(session) = self.sessions.get_mut(&session) {
            session.announced.remove(key);
        }
        Ok((binding, keep, slot))
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
        let (binding, keep, slot) = match self.end_announcement(from, &key) {
            Ok(announced) => announced,
            Err(fault) => return self.fault(from, fault, out),
        };
        drop(slot); // reserved in place but sent by staging: the copy finds its own slot
        if let Err(fault) = self.check_put(binding, Some(bytes)) {
            self.fault(from, fault, out);
            return self.withdraw(now, &key, out);
        }
        self.admission.seen(&key, false);
        let put = PutOf { key, binding, source, bytes, keep, durable };
        self.fill(now, Fill { from, deadline, put, timer: None }, out);
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
        let (binding, keep, filled) = match self.end_announcement(from, &key) {
            Ok(announced) => announced,
            Err(fault) => return self.fault(from, fault, out),
        };
        let Some(filled) = filled.filter(|own| own.id() == slot && own.generation() == generation) else {
            let text = format!("slot {slot} generation {generation} is not the one reserved for block {key}");
            self.fault(from, Fault::new(Code::NotReserved, text), out);
            return self.withdraw(now, &key, out);
        };
        self.admission.seen(&key, false);
        let put = PutOf { key, binding, source: 0, bytes: self.bytes_of(binding), keep, durable };
        let record = match self.record_for(&put, checksum) {
            Ok(record) => record,
            Err(fault) => {
                self.fault(from, fault, out);
                return self.withdraw(now, &key, out);
            }
        };
        let fill = Fill { from, deadline, put, timer: None };
        self.publish(now, fill, filled.seal(&record), out);
    }

    pub(crate) fn abort(&mut self, now: Now, from: Origin, key: &BlockKey, out: &mut Out) {
        match self.end_announcement(from, key) {
            Ok(_) => {
                self.withdraw(now, key, out);
                self.reply(from, Reply::Counted { done: 1, kept: 0, absent: 0 }, out);
            }
            Err(fault) => self.fault(from, fault, out),
        }
    }

    /// Takes an announcement back: the block is no longer expected, whoever waits for it misses, and other
    /// puts of it are tried. Its slot, if it had one, comes back.
    pub(crate) fn withdraw(&mut self, now: Now, key: &BlockKey, out: &mut Out) {
        let Some(Pending { source, waiters, puts }) = self.pending.remove(key) else { return };
        if let Source::Announced { session, binding, slot, timer, .. } = source {
            self.cancel(timer);
            if slot.is_some() {
                self.came(binding);
            }
            if let Some(session) = self.sessions.get_mut(&session) {
                session.announced.remove(key);
            }
        }
        self.catalog.withdraw(key);
        for waiter in waiters {
            self.cancel(waiter.timer);
            self.miss(waiter.from, key, MissReason::NotComplete, out);
        }
        self.retry_puts(now, puts, out);
        self.forget_order(key);
    }
}

fn unknown_binding(binding: BindingId) -> Fault {
    Fault::new(Code::UnknownBinding, format!("binding {binding} is not registered"))
}
