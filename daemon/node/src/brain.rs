//! The state of a shard, and one match over everything that can happen to it.

use std::collections::{BTreeMap, HashMap, VecDeque};

use kv_arena::LentSlot;
use kv_block::code::Code;
use kv_block::{
    BindingId, BindingTag, BlockKey, DiskLocation, Epoch, EventKind, Fault, Generation, LeaseId, MissReason,
    SessionId, ShardId, SlotId, Tier,
};
use kv_tiers::admit::{Admission, AdmissionKind};
use kv_tiers::catalog::Catalog;
use kv_tiers::host::HostTier;
use kv_tiers::store::{OpToken, StoreOp};
use kv_tiers::upload::UploadLimits;

use crate::events::EventLog;
use crate::fetch::Fetching;
use crate::io::{
    Binding, Command, Event, FetchToken, FillToken, Keep, LeaseReport, Micros, Now, Op, Origin, Reply,
};
use crate::jobs::Job;
use crate::order::Order;
use crate::pins::Pins;
use crate::removal::Removals;
use crate::report::{Counters, SessionReport, ShardReport, TenantReport};
use crate::session::Session;
use crate::tenant::Tenants;
use crate::upload::Uploads;

/// What a brain must know before it starts. All bounds; none is changed later.
#[derive(Clone, Debug)]
pub struct BrainConfig {
    /// Which shard this is.
    pub shard: ShardId,
    /// The daemon's life.
    pub epoch: Epoch,
    /// How admission to disk is decided; `None` without a disk tier.
    pub disk: Option<AdmissionKind>,
    /// Leases that one session may hold.
    pub leases_per_session_max: usize,
    /// Sessions served at once.
    pub sessions_max: usize,
    /// Bytes that may be pinned in all.
    pub pinned_bytes_max: u64,
    /// Milliseconds after which an announcement that was not followed by bytes is taken back.
    pub pending_ttl_ms: u64,
    /// Requests that may wait for room.
    pub stalled_max: usize,
    /// Blocks that may be on their way to disk.
    pub offloads_max: usize,
    /// Blocks that may be on their way up from disk.
    pub onboards_max: usize,
    /// Blocks that may be on their way from peers and from the object tier.
    pub fetches_max: usize,
    /// Whether there are peers.
    pub peers: bool,
    /// Milliseconds after which a search among the peers and its transfer end.
    pub fetch_limit_ms: u64,
    /// The object tier; `None` without one.
    pub object: Option<ObjectConfig>,
    /// Events kept for replay.
    pub events_kept_max: usize,
}

/// What a brain must know of the object tier.
#[derive(Clone, Debug)]
pub struct ObjectConfig {
    /// Which blocks go there.
    pub upload: UploadLimits,
    /// Blocks that may be held at one moment to be copied for it.
    pub uploads_max: usize,
    /// Milliseconds after which the search for a block in it and its transfer end.
    pub fetch_limit_ms: u64,
}

/// One shard's brain.
pub struct Brain {
    pub(crate) config: BrainConfig,
    pub(crate) catalog: Catalog,
    pub(crate) host: HostTier,
    pub(crate) admission: Admission,
    pub(crate) bindings: Vec<Option<Bound>>,
    pub(crate) by_tag: HashMap<BindingTag, BindingId>,
    pub(crate) tenants: Tenants,
    pub(crate) sessions: HashMap<SessionId, Session>,
    pub(crate) pending: HashMap<BlockKey, Pending>,
    pub(crate) pins: Pins,
    pub(crate) order: Order,
    pub(crate) timers: BTreeMap<(Micros, u64), Timer>,
    pub(crate) fills: HashMap<FillToken, Fill>,
    pub(crate) ops: HashMap<OpToken, DiskOp>,
    pub(crate) fetches: HashMap<FetchToken, Fetching>,
    pub(crate) uploads: Uploads,
    pub(crate) reclaims: HashMap<u32, usize>,
    pub(crate) removals: Removals,
    /// By block length, oldest first: one length that finds no slot holds up no other.
    pub(crate) stalled: BTreeMap<u32, VecDeque<Stalled>>,
    pub(crate) jobs: VecDeque<Job>,
    pub(crate) unverified: VecDeque<(SlotId, Generation)>,
    /// Damaged blocks that the catalog has forgotten and somebody still holds.
    pub(crate) condemned: Vec<(SlotId, Generation)>,
    pub(crate) expiry_cursor: u64,
    pub(crate) log: EventLog,
    pub(crate) counters: Counters,
    /// `None` without a disk tier; otherwise whether it serves.
    pub(crate) disk_serving: Option<bool>,
    /// Writes under way.
    pub(crate) offloads: usize,
    /// Those of them, and of the uploads, after which a slot comes back.
    pub(crate) leaving: usize,
    pub(crate) onboards: usize,
    pub(crate) sweep_wanted: bool,
    next_number: u64,
}

/// A binding as the brain keeps it.
#[derive(PartialEq, Eq)]
pub(crate) struct Bound {
    pub(crate) tag: BindingTag,
    pub(crate) block_bytes: u32,
    pub(crate) tenant: usize,
}

/// A block that is announced, being copied in, coming up from disk, from a peer or the object tier, and who waits for it.
pub(crate) struct Pending {
    pub(crate) source: Source,
    pub(crate) waiters: Vec<Waiter>,
    /// Puts of the same block: answered when the first is through, tried when it is not.
    pub(crate) puts: Vec<Fill>,
}

impl Pending {
    pub(crate) fn from(source: Source) -> Self {
        Self { source, waiters: Vec::new(), puts: Vec::new() }
    }

    /// Whether it is to come from a peer or the object tier.
    pub(crate) fn is_fetched(&self) -> bool {
        matches!(self.source, Source::Fetching { .. })
    }
}

/// Where a pending block will come from.
pub(crate) enum Source {
    /// A session said that it will store it.
    Announced {
        session: SessionId,
        binding: BindingId,
        keep: Keep,
        slot: Option<LentSlot>,
        timer: Option<TimerId>,
    },
    /// Its bytes are being copied, or wait for room to be.
    Filling,
    /// It is read from disk.
    Onboarding,
    /// It is looked for among the peers or in the object tier, or on its way from there.
    Fetching { fetch: FetchToken },
}

/// Somebody who waits for a block.
#[derive(Clone, Copy)]
pub(crate) struct Waiter {
    pub(crate) from: Origin,
    pub(crate) timer: Option<TimerId>,
}

/// A put whose bytes are on their way into a slot.
#[derive(Clone, Copy)]
pub(crate) struct Fill {
    pub(crate) from: Origin,
    pub(crate) deadline: Micros,
    pub(crate) put: PutOf,
    /// Runs while it waits for something.
    pub(crate) timer: Option<TimerId>,
}

/// What a put is about.
#[derive(Clone, Copy)]
pub(crate) struct PutOf {
    pub(crate) key: BlockKey,
    pub(crate) binding: BindingId,
    pub(crate) source: u64,
    pub(crate) bytes: u32,
    pub(crate) keep: Keep,
    pub(crate) durable: bool,
}

/// A disk operation under way.
pub(crate) enum DiskOp {
    /// A block goes down. `leave` says that its slot is wanted back.
    Write { key: BlockKey, slot: SlotId, generation: Generation, leave: bool, durable_for: Vec<Waiter> },
    /// A block comes up.
    Read { key: BlockKey, at: DiskLocation, binding: BindingId },
    /// A block is moved out of a segment.
    Move { key: BlockKey, segment: u32, bytes: u32, from: DiskLocation },
    /// A tombstone, and the number of the eviction or job that waits for it.
    Remove { wanted_by: Option<u64> },
    /// A segment goes back.
    Release { segment: u32 },
    /// A block is read to be checked, for a job.
    Check { key: BlockKey, at: DiskLocation, job: u64 },
}

/// A request that waits for a free slot.
#[derive(Clone, Copy)]
pub(crate) enum Stalled {
    Put(Fill),
    Onboard { key: BlockKey },
    Fetch { fetch: FetchToken },
}

/// Names a timer that runs.
pub(crate) type TimerId = (Micros, u64);

/// What a deadline ends.
#[derive(Clone, Copy)]
pub(crate) enum Timer {
    /// Somebody waits for a block.
    Waiter { key: BlockKey, from: Origin },
    /// An announcement lapses.
    Announcement { key: BlockKey },
    /// A put waits for room.
    Stalled { bytes: u32, from: Origin },
    /// A put waits for what becomes of another of the same block.
    Queued { key: BlockKey, from: Origin },
    /// A put waits to be durable.
    Durable { token: OpToken, from: Origin },
    /// A purge or a verification.
    Job { number: u64 },
    /// An eviction waits for its removals to be durable.
    Eviction { number: u64 },
    /// A segment could not be released: it is tried again.
    Release { segment: u32 },
}

/// Commands under construction.
pub(crate) type Out = Vec<Command>;

impl Brain {
    /// A brain over a catalog and a host tier, both as they are after [`Brain::recover_host`] or empty.
    pub fn new(config: BrainConfig, catalog: Catalog, host: HostTier) -> Self {
        let blocks = host.blocks_typical().max(1024);
        Self {
            admission: Admission::new(config.disk.unwrap_or(AdmissionKind::Never), blocks * 4),
            disk_serving: config.disk.map(|_| true),
            log: EventLog::new(config.epoch, config.events_kept_max),
            config,
            catalog,
            host,
            bindings: Vec::new(),
            by_tag: HashMap::new(),
            tenants: Tenants::default(),
            sessions: HashMap::new(),
            pending: HashMap::new(),
            pins: Pins::default(),
            order: Order::default(),
            timers: BTreeMap::new(),
            fills: HashMap::new(),
            ops: HashMap::new(),
            fetches: HashMap::new(),
            uploads: Uploads::default(),
            reclaims: HashMap::new(),
            removals: Removals::default(),
            stalled: BTreeMap::new(),
            jobs: VecDeque::new(),
            unverified: VecDeque::new(),
            condemned: Vec::new(),
            expiry_cursor: 0,
            counters: Counters::default(),
            offloads: 0,
            leaving: 0,
            onboards: 0,
            sweep_wanted: false,
            next_number: 1,
        }
    }

    /// Takes one event and appends what is to be done about it.
    pub fn handle(&mut self, now: Now, event: Event, out: &mut Out) {
        match event {
            Event::Opened { session } => {
                self.sessions.entry(session).or_default();
            }
            Event::Closed { session } => self.close(now, session, out),
            Event::Bound(binding) => self.bind(&binding),
            Event::Request { from, deadline, op } => self.request(now, from, deadline, op, out),
            Event::Unheard { from } => self.stop_job(from, out),
            Event::Filled { fill, filled } => self.filled(now, fill, filled, out),
            Event::Store(done) => self.store_done(now, done, out),
            Event::Fetch(done) => self.fetch_done(now, done, out),
            Event::Upload(done) => self.upload_done(now, done, out),
            Event::StoreHealth { serving } => self.disk_serving = self.disk_serving.map(|_| serving),
            Event::Swept { freed } => {
                self.host.swept();
                if freed > 0 {
                    self.retry_stalled(now, out);
                }
            }
            Event::Grown { regions } => {
                self.host.grown(regions);
                self.retry_stalled(now, out);
            }
            Event::GrowthEnded => {
                self.host.growth_ended();
                self.retry_stalled(now, out);
            }
            Event::Touched(slots) => self.touched(&slots),
            Event::Read { session, slot } => {
                if let Some(session) = self.sessions.get_mut(&session) {
                    session.gets += 1;
                }
                self.touched(&[slot]);
            }
            Event::Looked { binding, count } => self.looked(binding, count.into()),
            Event::Quota { tenant, bytes_max } => {
                let tenant = self.tenants.index(&tenant);
                self.tenants[tenant].quota_bytes = bytes_max;
            }
            Event::Tick => self.tick(now, out),
        }
        if std::mem::take(&mut self.sweep_wanted) {
            out.push(Command::Sweep);
        }
    }

    /// Asks the processor for the entry of a block that an event is about to name.
    pub fn prefetch_entry(&self, key: &BlockKey) {
        self.catalog.prefetch(key);
    }

    /// When something must happen without an event: a timer, or work that is done in parts.
    pub fn next_tick(&self, now: Micros) -> Option<Micros> {
        if !self.unverified.is_empty() || self.jobs.iter().any(|job| !job.waits) {
            return Some(now);
        }
        let timer = self.timers.first_key_value().map(|((at, _), _)| *at);
        let waiting = !self.stalled.is_empty() || !self.jobs.is_empty();
        let look_again = match (waiting, self.host.limbo_len()) {
            (true, _) => Some(now.plus_ms(1)),
            // Nobody waits for the slot: whoever still reads it may take its time.
            (false, limbo) => (limbo > 0).then(|| now.plus_ms(20)),
        };
        [timer, look_again].into_iter().flatten().min()
    }

    /// A number that was not given out before in this life.
    pub(crate) fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn request(&mut self, now: Now, from: Origin, deadline: Micros, op: Op, out: &mut Out) {
        let administrator = from.session == SessionId(0);
        if !administrator && !self.sessions.contains_key(&from.session) {
            let text = format!("session {} is not known here", from.session);
            return self.fault(from, Fault::new(Code::UnknownSession, text), out);
        }
        if deadline <= now.micros {
            let text = "the request arrived after its deadline";
            return self.fault(from, Fault::new(Code::DeadlinePassed, text), out);
        }
        match op {
            Op::Put { key, binding, source, bytes, keep, durable, after } => {
                let put = PutOf { key, binding, source, bytes, keep, durable };
                self.put(now, Fill { from, deadline, put, timer: None }, out);
                self.follows(key, after);
            }
            Op::Reserve { key, binding, keep, in_place, after } => {
                self.reserve(now, from, key, binding, keep, in_place, out);
                self.follows(key, after);
            }
            Op::Commit { key, source, bytes, durable } => {
                self.commit(now, from, deadline, key, source, bytes, durable, out);
            }
            Op::CommitInPlace { key, slot, generation, checksum, durable } => {
                self.commit_in_place(now, from, key, slot, generation, checksum, durable, deadline, out);
            }
            Op::Abort { key } => self.abort(now, from, &key, out),
            Op::Acquire { key, wait, reach, after } => {
                self.acquire(now, from, deadline, key, (wait, reach), out);
                self.follows(key, after);
            }
            Op::Release { leases } => self.release(from, &leases, out),
            Op::Lookup { keys, all } => self.lookup(now, from, &keys, all, out),
            Op::Prefetch { steps, reach } => self.prefetch(now, from, &steps, reach, out),
            Op::Pin { keys, until } => self.pin(now, from, &keys, until, out),
            Op::Unpin { keys } => self.unpin(from, &keys, out),
            Op::Evict { keys, tier, dry_run } => self.evict((from, deadline), &keys, tier, dry_run, out),
            Op::Inspect { key } => {
                let report = self.inspect(now, &key, out).map(Box::new);
                self.reply(from, Reply::Inspected(report), out);
            }
            Op::List { cursor, count, filter } => self.list(now, from, cursor, count, &filter, out),
            Op::Purge { filter, tier, dry_run } => {
                self.start_job(from, deadline, Job::purge(from, filter, tier, dry_run), out);
            }
            Op::Verify { tier } => self.start_job(from, deadline, Job::verify(from, tier), out),
            Op::Report => {
                let report = Box::new(self.report());
                self.reply(from, Reply::Report(report), out);
            }
            Op::Events { after, count } => {
                let events = self.log.after(after, count);
                self.reply(from, Reply::Events(events), out);
            }
            Op::Leases { session } => {
                let leases = self.leases(session);
                self.reply(from, Reply::Leases(leases), out);
            }
        }
    }

    fn tick(&mut self, now: Now, out: &mut Out) {
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > now.micros {
                break;
            }
            let timer = entry.remove();
            self.timer_ended(now, timer, out);
        }
        while let Some((key, pin)) = self.pins.pop_ended(now.micros) {
            self.tenants[pin.tenant].pinned_bytes -= u64::from(pin.bytes);
            tracing::debug!(%key, "pin ended");
        }
        self.verify_adopted();
        self.retire_condemned();
        self.step_jobs(now, out);
        self.expire_some(now, out);
        self.retry_stalled(now, out);
        self.free_ahead(now, out);
        self.look_at_uploads(now, out);
        if self.host.limbo_len() > 0 {
            self.sweep_wanted = true;
        }
    }

    fn timer_ended(&mut self, now: Now, timer: Timer, out: &mut Out) {
        match timer {
            Timer::Waiter { key, from } => {
                let Some(pending) = self.pending.get_mut(&key) else { return };
                let before = pending.waiters.len();
                pending.waiters.retain(|waiter| waiter.from != from);
                if pending.waiters.len() == before {
                    return;
                }
                let reason = match pending.source {
                    Source::Announced { .. } | Source::Filling => MissReason::NotComplete,
                    Source::Onboarding | Source::Fetching { .. } => MissReason::TierTimeout,
                };
                self.miss(from, &key, reason, out);
            }
            Timer::Announcement { key } => self.withdraw(now, &key, out),
            Timer::Stalled { bytes, from } => {
                let Some(fill) = self.unstall(bytes, from) else { return };
                self.withdraw(now, &fill.put.key, out);
                let text = format!("no host slot of {bytes} bytes became free in time");
                self.fault(from, Fault::new(Code::DeadlinePassed, text), out);
            }
            Timer::Queued { key, from } => {
                let Some(pending) = self.pending.get_mut(&key) else { return };
                let before = pending.puts.len();
                pending.puts.retain(|fill| fill.from != from);
                if pending.puts.len() < before {
                    let text = "another put of the same block did not end in time";
                    self.fault(from, Fault::new(Code::DeadlinePassed, text), out);
                }
            }
            Timer::Durable { token, from } => {
                let Some(DiskOp::Write { durable_for, .. }) = self.ops.get_mut(&token) else { return };
                let before = durable_for.len();
                durable_for.retain(|waiter| waiter.from != from);
                if durable_for.len() < before {
                    let text = "the block is stored in host memory, but was not on disk in time";
                    self.fault(from, Fault::new(Code::DeadlinePassed, text), out);
                }
            }
            Timer::Job { number } => {
                let Some(at) = self.jobs.iter().position(|job| job.number == number) else { return };
                if let Some(job) = self.jobs.remove(at) {
                    let text = "the work was stopped at its deadline; what was done stays done";
                    self.fault(job.from, Fault::new(Code::DeadlinePassed, text), out);
                }
            }
            Timer::Eviction { number } => self.eviction_late(number, out),
            Timer::Release { segment } => self.release_segment(segment, out),
        }
    }

    pub(crate) fn start_timer(&mut self, at: Micros, timer: Timer) -> Option<TimerId> {
        if at == Micros::NEVER {
            return None;
        }
        let id = (at, self.number());
        self.timers.insert(id, timer);
        Some(id)
    }

    /// What was waited for happened. Timers that nobody needs must not pile up until they end.
    pub(crate) fn cancel(&mut self, timer: Option<TimerId>) {
        if let Some(id) = timer {
            self.timers.remove(&id);
        }
    }

    pub(crate) fn bind(&mut self, binding: &Binding) {
        let tenant = self.tenants.index(&binding.tenant);
        let index = usize::from(binding.id.0);
        if self.bindings.len() <= index {
            self.bindings.resize_with(index + 1, || None);
        }
        let bound = Bound { tag: binding.tag, block_bytes: binding.block_bytes, tenant };
        let place = &mut self.bindings[index];
        // Blocks stand under it: what they weigh and who pays for them cannot change any more.
        if let Some(known) = place {
            if *known != bound {
                tracing::error!(binding = %binding.id, "a binding came again with other properties; the first ones count");
            }
            return;
        }
        *place = Some(bound);
        self.by_tag.insert(binding.tag, binding.id);
    }

    pub(crate) fn bound(&self, id: BindingId) -> Option<&Bound> {
        self.bindings.get(usize::from(id.0))?.as_ref()
    }

    /// The tenant of a binding. Blocks only ever stand under bindings that are known.
    pub(crate) fn tenant_of(&self, id: BindingId) -> usize {
        self.bound(id).map_or(0, |bound| bound.tenant)
    }

    pub(crate) fn bytes_of(&self, id: BindingId) -> u32 {
        self.bound(id).map_or(0, |bound| bound.block_bytes)
    }

    /// Ends a session: what it holds comes back, what it waits for is answered, though nobody may read it.
    fn close(&mut self, now: Now, session: SessionId, out: &mut Out) {
        let Some(gone) = self.sessions.remove(&session) else { return };
        if !gone.leases.is_empty() {
            let leases = gone.leases.len() as u64;
            *self.counters.lease_reclaims.entry("session_closed").or_default() += leases;
        }
        let (announced, mut unanswered) = (gone.announced, Vec::new());
        drop(gone.leases);
        let ended = |from: Origin| from.session == session;
        let mut stalled = Vec::new();
        self.stalled.retain(|_, queue| {
            queue.retain(|one| match one {
                Stalled::Put(fill) if ended(fill.from) => {
                    stalled.push(*fill);
                    false
                }
                _ => true,
            });
            !queue.is_empty()
        });
        for pending in self.pending.values_mut() {
            let waiters = pending.waiters.extract_if(.., |waiter| ended(waiter.from));
            unanswered.extend(waiters.map(|waiter| (waiter.from, waiter.timer)));
            let puts = pending.puts.extract_if(.., |fill| ended(fill.from));
            unanswered.extend(puts.map(|fill| (fill.from, fill.timer)));
        }
        for op in self.ops.values_mut() {
            if let DiskOp::Write { durable_for, .. } = op {
                let waiters = durable_for.extract_if(.., |waiter| ended(waiter.from));
                unanswered.extend(waiters.map(|waiter| (waiter.from, waiter.timer)));
            }
        }
        self.jobs.retain(|job| {
            if ended(job.from) {
                unanswered.push((job.from, job.timer));
            }
            !ended(job.from)
        });
        unanswered.extend(self.removals.forget(ended));
        unanswered.extend(stalled.iter().map(|fill| (fill.from, fill.timer)));
        unanswered.sort_unstable_by_key(|(from, _)| from.request.0);
        for (from, timer) in unanswered {
            self.cancel(timer);
            self.fault(from, Fault::new(Code::UnknownSession, "the session ended meanwhile"), out);
        }
        for fill in stalled {
            self.withdraw(now, &fill.put.key, out);
        }
        let mut announced: Vec<BlockKey> = announced.into_iter().collect();
        announced.sort_unstable();
        for key in announced {
            self.withdraw(now, &key, out);
        }
    }

    /// Takes a put out of the queue for room.
    fn unstall(&mut self, bytes: u32, from: Origin) -> Option<Fill> {
        let queue = self.stalled.get_mut(&bytes)?;
        let at = queue.iter().position(|one| matches!(one, Stalled::Put(fill) if fill.from == from))?;
        let fill = queue.remove(at);
        if queue.is_empty() {
            self.stalled.remove(&bytes);
        }
        match fill {
            Some(Stalled::Put(fill)) => Some(fill),
            _ => None,
        }
    }

    /// Requests that wait for room.
    pub(crate) fn stalled_len(&self) -> usize {
        self.stalled.values().map(VecDeque::len).sum()
    }

    pub(crate) fn reply(&mut self, to: Origin, reply: Reply, out: &mut Out) {
        out.push(Command::Reply { to, reply });
    }

    pub(crate) fn fault(&mut self, to: Origin, fault: Fault, out: &mut Out) {
        *self.counters.rejects.entry(fault.code.to_string()).or_default() += 1;
        out.push(Command::Reply { to, reply: Reply::Fault(fault) });
    }

    pub(crate) fn miss(&mut self, to: Origin, key: &BlockKey, reason: MissReason, out: &mut Out) {
        self.counters.miss(reason);
        if let Some(entry) = self.catalog.find(key) {
            let tenant = self.tenant_of(entry.binding);
            if let Some(tenant) = self.tenants.get_mut(tenant) {
                tenant.misses += 1;
            }
        }
        out.push(Command::Reply { to, reply: Reply::Miss(reason) });
    }

    pub(crate) fn store(&mut self, op: StoreOp, out: &mut Out) {
        out.push(Command::Store(op));
    }

    pub(crate) fn stored_event(&mut self, key: BlockKey, binding: BindingId, tier: Tier) {
        let tag = self.bound(binding).map_or(BindingTag(0), |bound| bound.tag);
        self.log.push(EventKind::Stored { key, tag, tier });
    }

    pub(crate) fn removed_event(&mut self, key: BlockKey, tier: Tier) {
        self.log.push(EventKind::Removed { key, tier });
    }

    fn leases(&self, only: Option<SessionId>) -> Vec<LeaseReport> {
        let sessions = self.sessions.iter().filter(|(id, _)| only.is_none_or(|only| only == **id));
        let mut all: Vec<_> = sessions
            .flat_map(|(id, session)| {
                session.leases.iter().map(|(lease, of)| LeaseReport {
                    lease: *lease,
                    session: *id,
                    key: of.held.record().key,
                    bytes: of.held.record().bytes,
                    since: of.since,
                })
            })
            .collect();
        all.sort_by_key(|report| (report.session, report.lease));
        all
    }

    fn report(&self) -> ShardReport {
        let counts = self.catalog.counts();
        let mut sessions: Vec<_> = self
            .sessions
            .iter()
            .map(|(id, session)| SessionReport {
                session: id.0,
                leases: session.leases.len() as u32,
                leased_bytes: session.leased_bytes,
                reading: 0,
                pending: session.announced.len() as u32,
                puts: session.puts,
                gets: session.gets,
            })
            .collect();
        sessions.sort_by_key(|report| report.session);
        ShardReport {
            counters: self.counters.clone(),
            host_bytes: self.tenants.iter().map(|tenant| tenant.host_bytes).sum(),
            host_bytes_max: self.host.bytes_max(),
            host_bytes_wanted: self.host.bytes_wanted(),
            host_growing: self.host.is_growing(),
            host_blocks: self.tenants.iter().map(|tenant| tenant.host_blocks).sum(),
            disk_blocks: self.tenants.iter().map(|tenant| tenant.disk_blocks).sum(),
            disk_bytes: self.tenants.iter().map(|tenant| tenant.disk_bytes).sum(),
            pending: counts.pending,
            blocks: counts.present,
            quarantined: counts.quarantined,
            catalog_entries: counts.entries,
            leases: sessions.iter().map(|session| u64::from(session.leases)).sum(),
            leased_bytes: sessions.iter().map(|session| session.leased_bytes).sum(),
            reading: 0,
            pinned_bytes: self.pins.bytes(),
            in_flight: (self.ops.len() + self.fills.len() + self.uploads.under_way()) as u64,
            fetching: self.fetches.len() as u64,
            disk_serving: self.disk_serving,
            tenants: self
                .tenants
                .iter()
                .map(|tenant| TenantReport {
                    tenant: tenant.name.clone(),
                    host_bytes: tenant.host_bytes,
                    disk_bytes: tenant.disk_bytes,
                    blocks: tenant.host_blocks.max(tenant.disk_blocks),
                    pinned_bytes: tenant.pinned_bytes,
                    quota_bytes: tenant.quota_bytes,
                    hits: tenant.hits,
                    misses: tenant.misses,
                })
                .collect(),
            sessions,
            event_number: self.log.last(),
        }
    }

    pub(crate) fn lease_number(&mut self) -> LeaseId {
        LeaseId(self.number())
    }
}
