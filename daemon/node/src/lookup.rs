//! A worker wants blocks: where they are, a lease on them, to be told why they are not there.

use kv_arena::{Entry, EntryState, Held};
use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Checksum, Fault, LeaseId, MissReason, SlotId, Tier};

use crate::brain::{Brain, Fill, Out, Source, Timer, Waiter};
use crate::fetch::Served;
use crate::io::{BlockReport, BlockState, Found, Grant, Micros, Now, Origin, Reach, Reply, Step};
use crate::pins::Pin;

/// Where a block is, with a hold on it when it is in host memory.
enum Located {
    Host(Held),
    Disk(Entry),
    Pending,
    Gone(MissReason),
}

impl Brain {
    /// Where a block is now. A block kept from an earlier life is verified here, before its first use.
    fn locate(&mut self, now: Now, key: &BlockKey, out: &mut Out) -> Located {
        if self.expire_if_due(now, key, out) {
            return Located::Gone(MissReason::Expired);
        }
        let on_its_way = self.pending.contains_key(key);
        let Some(entry) = self.catalog.find(key) else {
            return if on_its_way { Located::Pending } else { Located::Gone(MissReason::NeverStored) };
        };
        if let Some((slot, generation)) = entry.host
            && let Some(held) = self.host.hold(slot, generation)
        {
            if held.is_verified() || self.verify_held(&held) {
                return Located::Host(held);
            }
            drop(held);
            // Another copy, or why there is none: it is not in host memory any more.
            self.host_corrupt(key);
            return self.locate(now, key, out);
        }
        match entry.state {
            EntryState::Ghost(reason) if !on_its_way => Located::Gone(reason),
            _ if entry.disk.is_some() && !self.is_filling(key) => Located::Disk(entry),
            _ if on_its_way => Located::Pending,
            _ => Located::Gone(MissReason::NeverStored),
        }
    }

    /// Compares an adopted block with its checksum and, when right, opens it to direct readers.
    pub(crate) fn verify_held(&mut self, held: &Held) -> bool {
        let record = held.record();
        let right = Checksum::of(&record.key, held) == record.checksum;
        if right {
            self.host.mark_verified(held);
        }
        right
    }

    /// Somebody stores or wants a block: admission is told whether it is in host memory, or about to be.
    pub(crate) fn sighted(&mut self, key: &BlockKey) {
        let in_host = self.catalog.find(key).is_some_and(|entry| entry.host.is_some());
        self.admission.seen(key, in_host || self.pending.contains_key(key));
    }

    pub(crate) fn acquire(
        &mut self,
        now: Now,
        from: Origin,
        deadline: Micros,
        key: BlockKey,
        (wait, reach): (bool, Reach),
        out: &mut Out,
    ) {
        self.sighted(&key);
        match self.locate(now, &key, out) {
            Located::Host(held) => {
                self.touch_slot(held.id());
                self.grant(now, from, held, Served::By(Tier::Host), out);
            }
            Located::Gone(reason) if !wait => self.miss(from, &key, reason, out),
            Located::Gone(reason) => match self.fetch(now, key, reason, reach, out) {
                Ok(()) => self.wait_for(key, from, deadline),
                Err(reason) => self.miss(from, &key, reason, out),
            },
            Located::Pending if !wait => self.miss(from, &key, MissReason::NotComplete, out),
            Located::Disk(_) if !wait => self.miss(from, &key, MissReason::TierTimeout, out),
            Located::Pending => {
                self.wait_for(key, from, deadline);
            }
            Located::Disk(entry) => match self.onboard(now, &entry, out) {
                Ok(()) => self.wait_for(key, from, deadline),
                Err(reason) => self.miss(from, &key, reason, out),
            },
        }
    }

    /// Lets a request wait for a pending block.
    fn wait_for(&mut self, key: BlockKey, from: Origin, deadline: Micros) {
        let timer = self.start_timer(deadline, Timer::Waiter { key, from });
        if let Some(pending) = self.pending.get_mut(&key) {
            pending.waiters.push(Waiter { from, timer });
        }
    }

    /// Gives `from` a lease on a block that it may now read.
    pub(crate) fn grant(&mut self, now: Now, from: Origin, held: Held, served: Served, out: &mut Out) {
        let record = held.record();
        let lease = self.lease_number();
        let leases_max = self.config.leases_per_session_max;
        let Some(session) = self.sessions.get_mut(&from.session) else {
            return self.no_session(from, out);
        };
        if let Err(fault) = session.may_hold_more(leases_max) {
            return self.fault(from, fault, out);
        }
        let grant = Grant {
            lease,
            slot: held.id(),
            generation: held.generation(),
            offset: held.offset(),
            bytes: record.bytes,
            checksum: record.checksum,
            tier: served.tier(),
        };
        session.grant(lease, held, now.micros);
        self.count_hit(&record.key, served);
        self.reply(from, Reply::Leased(grant), out);
    }

    pub(crate) fn count_hit(&mut self, key: &BlockKey, served: Served) {
        self.counters.hit_from(served.name(), 1);
        if let Some(entry) = self.catalog.find(key) {
            let tenant = self.tenant_of(entry.binding);
            self.tenants[tenant].hits += 1;
        }
    }

    /// Leases belong to sessions; whoever has none can neither get nor give one back.
    fn no_session(&mut self, from: Origin, out: &mut Out) {
        let text = format!("session {} is not known here: leases need one", from.session);
        self.fault(from, Fault::new(Code::UnknownSession, text), out);
    }

    /// A block became readable in host memory: whoever waited for it gets a lease. Gives the puts of it that
    /// waited, to be tried again.
    #[must_use]
    pub(crate) fn arrived(
        &mut self,
        now: Now,
        key: &BlockKey,
        held: &Held,
        served: Served,
        out: &mut Out,
    ) -> Vec<Fill> {
        let Some(pending) = self.pending.remove(key) else { return Vec::new() };
        if !pending.waiters.is_empty() {
            // It is read: that counts when it is to leave the host, or its segment the disk.
            self.touch_slot(held.id());
        }
        for waiter in pending.waiters {
            self.cancel(waiter.timer);
            self.grant(now, waiter.from, held.clone(), served, out);
        }
        pending.puts
    }

    pub(crate) fn release(&mut self, from: Origin, leases: &[LeaseId], out: &mut Out) {
        let Some(session) = self.sessions.get_mut(&from.session) else {
            return self.no_session(from, out);
        };
        let done = leases.iter().filter(|lease| session.release(**lease)).count() as u64;
        let absent = leases.len() as u64 - done;
        self.reply(from, Reply::Counted { done, kept: 0, absent }, out);
    }

    pub(crate) fn lookup(&mut self, now: Now, from: Origin, keys: &[BlockKey], all: bool, out: &mut Out) {
        let mut answers = Vec::with_capacity(keys.len());
        for key in keys {
            let found = self.found(now, key, out);
            match found {
                Found::In(tier) => self.count_hit(key, Served::By(tier)),
                Found::Miss(reason) => self.counters.miss(reason),
            }
            answers.push(found);
            if !all && matches!(found, Found::Miss(_)) {
                break;
            }
        }
        self.reply(from, Reply::Looked(answers), out);
    }

    fn found(&mut self, now: Now, key: &BlockKey, out: &mut Out) -> Found {
        match self.locate(now, key, out) {
            Located::Host(_) => Found::In(Tier::Host),
            Located::Disk(_) if self.disk_serving == Some(true) => Found::In(Tier::Disk),
            Located::Disk(_) => Found::Miss(MissReason::TierDegraded),
            Located::Pending => Found::Miss(MissReason::NotComplete),
            Located::Gone(reason) => Found::Miss(reason),
        }
    }

    pub(crate) fn prefetch(&mut self, now: Now, from: Origin, steps: &[Step], reach: Reach, out: &mut Out) {
        let (mut started, mut resident, mut absent) = (0, 0, 0);
        for &Step { key, after } in steps {
            match self.locate(now, &key, out) {
                Located::Host(_) => resident += 1,
                Located::Disk(entry) if self.onboard(now, &entry, out).is_ok() => started += 1,
                Located::Gone(why) if self.fetch(now, key, why, reach, out).is_ok() => started += 1,
                _ => absent += 1,
            }
            self.follows(key, after);
        }
        self.reply(from, Reply::Counted { done: started, kept: resident, absent }, out);
    }

    pub(crate) fn pin(&mut self, now: Now, from: Origin, keys: &[BlockKey], until: Micros, out: &mut Out) {
        if until == Micros::NEVER || until <= now.micros {
            let text = "a pin needs an end in the future";
            return self.fault(from, Fault::new(Code::BadRequest, text), out);
        }
        let (mut done, mut absent) = (0, 0);
        for key in keys {
            self.expire_if_due(now, key, out);
            let entry = self.catalog.find(key).filter(|entry| entry.host.is_some() || entry.disk.is_some());
            let Some(entry) = entry else {
                absent += 1;
                continue;
            };
            let bytes = self.bytes_of(entry.binding);
            let fresh = !self.pins.holds(key);
            if fresh && self.pins.bytes() + u64::from(bytes) > self.config.pinned_bytes_max {
                let text = format!(
                    "{done} of {} blocks pinned; {} bytes are pinned, {} may be",
                    keys.len(),
                    self.pins.bytes(),
                    self.config.pinned_bytes_max
                );
                return self.fault(from, Fault::new(Code::TooManyPins, text), out);
            }
            let tenant = self.tenant_of(entry.binding);
            if self.pins.pin(*key, Pin { until, bytes, tenant }) {
                self.tenants[tenant].pinned_bytes += u64::from(bytes);
            }
            self.note_for_upload(key);
            done += 1;
        }
        self.reply(from, Reply::Counted { done, kept: 0, absent }, out);
    }

    pub(crate) fn unpin(&mut self, from: Origin, keys: &[BlockKey], out: &mut Out) {
        let mut done = 0;
        for key in keys {
            if self.unpin_one(key) {
                done += 1;
            }
        }
        self.reply(from, Reply::Counted { done, kept: 0, absent: keys.len() as u64 - done }, out);
    }

    pub(crate) fn unpin_one(&mut self, key: &BlockKey) -> bool {
        let Some(pin) = self.pins.unpin(key) else { return false };
        self.tenants[pin.tenant].pinned_bytes -= u64::from(pin.bytes);
        true
    }

    /// Slots that workers read by themselves, as far as their lossy log tells.
    pub(crate) fn touched(&mut self, slots: &[SlotId]) {
        for slot in slots {
            let Some(key) = self.host.key_in(*slot) else { continue };
            self.touch_slot(*slot);
            self.admission.seen(&key, true);
            self.count_hit(&key, Served::By(Tier::Host));
        }
    }

    /// Blocks of one binding that clients found in host memory without asking.
    pub(crate) fn looked(&mut self, binding: BindingId, count: u64) {
        self.counters.hit(Tier::Host, count);
        let tenant = self.tenant_of(binding);
        if let Some(tenant) = self.tenants.get_mut(tenant) {
            tenant.hits += count;
        }
    }

    pub(crate) fn touch_key(&mut self, key: &BlockKey) {
        if let Some((slot, _)) = self.catalog.find(key).and_then(|entry| entry.host) {
            self.touch_slot(slot);
        }
    }

    pub(crate) fn touch_slot(&mut self, slot: SlotId) {
        self.host.touch(slot);
        if let Some(key) = self.host.key_in(slot) {
            self.catalog.bump(&key);
            self.note_for_upload(&key);
        }
    }

    pub(crate) fn inspect(&mut self, now: Now, key: &BlockKey, out: &mut Out) -> Option<BlockReport> {
        self.expire_if_due(now, key, out);
        let entry = self.catalog.find(key)?;
        Some(self.describe(&entry))
    }

    pub(crate) fn describe(&self, entry: &Entry) -> BlockReport {
        let mut tiers = Vec::new();
        if entry.host.is_some() {
            tiers.push(Tier::Host);
        }
        if entry.disk.is_some() {
            tiers.push(Tier::Disk);
        }
        let leases = entry.host.map_or(0, |(slot, _)| self.host.holds(slot));
        BlockReport {
            key: entry.key,
            state: match entry.state {
                EntryState::Present => BlockState::Present,
                EntryState::Pending => BlockState::Pending,
                EntryState::Ghost(reason) => BlockState::Gone(reason),
            },
            tiers,
            bytes: self.bytes_of(entry.binding),
            checksum: entry.checksum,
            priority: entry.priority,
            expires_at: entry.expires_at,
            leases,
            pinned_until: self.pins.get(&entry.key).map(|pin| pin.until),
            frequency: entry.frequency,
            binding: entry.binding,
            disk: entry.disk,
            host: entry.host,
        }
    }

    /// Whether its bytes are being stored right now.
    fn is_filling(&self, key: &BlockKey) -> bool {
        self.pending.get(key).is_some_and(|pending| !matches!(pending.source, Source::Onboarding))
    }

    /// Whether somebody is bringing this block up already.
    pub(crate) fn is_onboarding(&self, key: &BlockKey) -> bool {
        self.pending.get(key).is_some_and(|pending| matches!(pending.source, Source::Onboarding))
    }
}
