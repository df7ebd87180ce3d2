//! Long work, done a part at every tick so that nothing else waits: purge, verify, listing, expiry, and the
//! verification of what an earlier life left in host memory.

use kv_arena::{Entry, EntryState};
use kv_block::code::Code;
use kv_block::{BlockKey, Fault, MissReason, Tier};
use kv_tiers::store::{OpToken, StoreError, StoreOp};

use crate::brain::{Brain, DiskOp, Out, Timer, TimerId};
use crate::io::{BlockReport, Filter, Micros, Now, Origin, Progress, Reply};
use crate::removal::Unburied;
use crate::room::{NoRoom, Removed, Removing};

/// Catalog buckets that one part looks at.
const BUCKETS_PER_STEP: u64 = 1024;
/// Bytes of host memory that one part sums.
const VERIFY_BYTES_PER_STEP: u64 = 16 << 20;
/// Places of the catalog that one page of a listing looks at.
const LIST_PLACES_MAX: u64 = 5 << 16;
/// Purges and verifications under way.
const JOBS_MAX: usize = 16;
/// Disk blocks that a verification has under way at once.
const CHECKS_MAX: usize = 8;

/// A purge or a verification under way.
pub(crate) struct Job {
    pub(crate) from: Origin,
    pub(crate) number: u64,
    pub(crate) timer: Option<TimerId>,
    /// Nothing can be done before something else happens.
    pub(crate) waits: bool,
    kind: Kind,
    cursor: Option<u64>,
    progress: Progress,
    reading: usize,
    /// Blocks that a verification could not read.
    unread: u64,
    /// Removals that are not on disk yet, and those that will not be.
    burying: usize,
    unburied: Unburied,
}

/// What a verification found of a block on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Checked {
    Right,
    Wrong,
    /// The device gave an error.
    Unread,
}

enum Kind {
    Purge { filter: Filter, tier: Option<Tier>, dry_run: bool },
    Verify { tier: Tier, queue: Vec<BlockKey> },
}

impl Job {
    fn new(from: Origin, kind: Kind) -> Self {
        let (cursor, progress) = (Some(0), Progress::default());
        Self {
            from,
            number: 0,
            timer: None,
            waits: false,
            kind,
            cursor,
            progress,
            reading: 0,
            unread: 0,
            burying: 0,
            unburied: Unburied::default(),
        }
    }

    pub(crate) fn purge(from: Origin, filter: Filter, tier: Option<Tier>, dry_run: bool) -> Self {
        Self::new(from, Kind::Purge { filter, tier, dry_run })
    }

    pub(crate) fn verify(from: Origin, tier: Tier) -> Self {
        Self::new(from, Kind::Verify { tier, queue: Vec::new() })
    }
}

impl Brain {
    pub(crate) fn start_job(&mut self, from: Origin, deadline: Micros, mut job: Job, out: &mut Out) {
        if self.jobs.len() >= JOBS_MAX {
            let text = format!("{JOBS_MAX} purges and verifications are under way");
            return self.fault(from, Fault::new(Code::QueueFull, text), out);
        }
        job.progress.total = self.catalog.counts().present;
        job.number = self.number();
        job.timer = self.start_timer(deadline, Timer::Job { number: job.number });
        self.jobs.push_back(job);
    }

    /// Ends a job that nobody waits for any more. Its reads may still come back; they find no job.
    pub(crate) fn stop_job(&mut self, from: Origin, out: &mut Out) {
        let Some(at) = self.jobs.iter().position(|job| job.from == from) else { return };
        let Some(job) = self.jobs.remove(at) else { return };
        self.cancel(job.timer);
        let text = "nobody waits for the work any more; what was done stays done";
        self.reply(from, Reply::Fault(Fault::new(Code::DeadlinePassed, text)), out);
    }

    /// One part of the job at the front; jobs take turns.
    pub(crate) fn step_jobs(&mut self, now: Now, out: &mut Out) {
        let Some(mut job) = self.jobs.pop_front() else { return };
        let before = (job.progress, job.cursor);
        let done = match &job.kind {
            Kind::Purge { filter, tier, dry_run } => {
                let (filter, tier, dry_run) = (filter.clone(), *tier, *dry_run);
                self.step_purge(&mut job, &filter, tier, dry_run, out)
            }
            Kind::Verify { .. } => self.step_verify(now, &mut job, out),
        };
        let progress = job.progress;
        match done {
            Ok(false) => {
                job.waits = (progress, job.cursor) == before;
                if !job.waits {
                    self.reply(job.from, Reply::Progress(progress), out);
                }
                self.jobs.push_back(job);
            }
            Ok(true) => {
                self.cancel(job.timer);
                self.reply(job.from, Reply::Finished(progress), out);
            }
            Err(fault) => {
                self.cancel(job.timer);
                self.fault(job.from, fault, out);
            }
        }
    }

    /// The next entries of the catalog; the cursor is `None` behind the last.
    fn scan(&self, cursor: &mut Option<u64>) -> Vec<Entry> {
        let Some(at) = *cursor else { return Vec::new() };
        let (entries, next) = self.catalog.scan(at, BUCKETS_PER_STEP);
        *cursor = next;
        entries
    }

    fn step_purge(
        &mut self,
        job: &mut Job,
        filter: &Filter,
        tier: Option<Tier>,
        dry_run: bool,
        out: &mut Out,
    ) -> Result<bool, Fault> {
        let how = if dry_run { Removing::Never } else { Removing::For(job.number) };
        for entry in self.scan(&mut job.cursor) {
            if entry.state != EntryState::Present || !self.passes(&entry, filter) {
                continue;
            }
            let bytes = u64::from(self.bytes_of(entry.binding));
            match self.remove_block(&entry.key, tier, MissReason::EvictedRequest, how, out) {
                Removed::Gone { to_bury } => {
                    job.burying += usize::from(to_bury);
                    job.progress.done += 1;
                    job.progress.bytes += bytes;
                }
                Removed::InUse => job.progress.failed += 1,
                Removed::Absent => {}
            }
        }
        if job.cursor.is_some() || job.burying > 0 {
            return Ok(false);
        }
        job.unburied.fault().map_or(Ok(true), Err)
    }

    /// A removal of a purge is on disk, or will not be.
    pub(crate) fn job_removed(&mut self, number: u64, result: Result<(), StoreError>) {
        let Some(job) = self.jobs.iter_mut().find(|one| one.number == number) else { return };
        job.waits = false;
        job.burying -= 1;
        job.unburied.count(result);
    }

    fn step_verify(&mut self, now: Now, job: &mut Job, out: &mut Out) -> Result<bool, Fault> {
        let Kind::Verify { tier, mut queue } =
            std::mem::replace(&mut job.kind, Kind::Verify { tier: Tier::Host, queue: vec![] })
        else {
            return Ok(true);
        };
        if queue.is_empty() {
            let entries = self.scan(&mut job.cursor);
            let here = |entry: &Entry| match tier {
                Tier::Disk => entry.disk.is_some(),
                _ => entry.host.is_some(),
            };
            queue = entries.into_iter().filter(here).map(|entry| entry.key).collect();
        }
        let mut bytes_left = VERIFY_BYTES_PER_STEP;
        while bytes_left > 0 && job.reading < CHECKS_MAX {
            let Some(key) = queue.pop() else { break };
            let Some(entry) = self.catalog.find(&key) else { continue };
            let bytes = u64::from(self.bytes_of(entry.binding));
            bytes_left = bytes_left.saturating_sub(bytes);
            match tier {
                Tier::Disk if !self.start_check(now, &entry, job, out)? => {
                    queue.push(key);
                    break;
                }
                Tier::Disk => {}
                _ => self.check_host(&entry, bytes, &mut job.progress),
            }
        }
        let done = queue.is_empty() && job.cursor.is_none() && job.reading == 0;
        job.kind = Kind::Verify { tier, queue };
        if done && job.unread > 0 {
            let (unread, checked) = (job.unread, job.progress.done);
            let text = format!(
                "{unread} blocks could not be read, which says nothing about them; {checked} were checked"
            );
            return Err(Fault::new(Code::DiskError, text));
        }
        Ok(done)
    }

    fn check_host(&mut self, entry: &Entry, bytes: u64, progress: &mut Progress) {
        let held = entry.host.and_then(|(slot, generation)| self.host.hold(slot, generation));
        let Some(held) = held else { return };
        progress.done += 1;
        progress.bytes += bytes;
        if !self.verify_held(&held) {
            progress.failed += 1;
            drop(held);
            self.host_corrupt(&entry.key);
        }
    }

    /// Has a block on disk read. False when that must wait for room.
    fn start_check(&mut self, now: Now, entry: &Entry, job: &mut Job, out: &mut Out) -> Result<bool, Fault> {
        let (Some(at), Some(record)) = (entry.disk, self.record_of(entry)) else { return Ok(true) };
        if self.disk_serving != Some(true) {
            let text =
                format!("the disk tier went out of service; {} blocks were checked", job.progress.done);
            return Err(Fault::new(Code::TierDegraded, text));
        }
        let into = match self.room_for_a_while(now, record.bytes, out) {
            Ok(into) => into,
            Err(NoRoom::Soon) => return Ok(false),
            // Its own reads will give their slots back.
            Err(_) if job.reading > 0 => return Ok(false),
            Err(why) => return Err(self.no_room(why, self.tenant_of(entry.binding), record.bytes)),
        };
        let token = OpToken(self.number());
        self.ops.insert(token, DiskOp::Check { key: entry.key, at, job: job.number });
        job.reading += 1;
        self.store(StoreOp::Read { token, at, record, into }, out);
        Ok(true)
    }

    /// A verification has heard of a block that it had read.
    pub(crate) fn job_checked(&mut self, key: &BlockKey, job: u64, checked: Checked) {
        let bytes = self.catalog.find(key).map_or(0, |entry| u64::from(self.bytes_of(entry.binding)));
        let Some(job) = self.jobs.iter_mut().find(|one| one.number == job) else { return };
        job.waits = false;
        job.reading -= 1;
        if checked == Checked::Unread {
            job.unread += 1;
            return;
        }
        job.progress.done += 1;
        job.progress.bytes += bytes;
        job.progress.failed += u64::from(checked == Checked::Wrong);
    }

    fn passes(&self, entry: &Entry, filter: &Filter) -> bool {
        let tier = match filter.tier {
            None => true,
            Some(Tier::Host) => entry.host.is_some(),
            Some(Tier::Disk) => entry.disk.is_some(),
            Some(_) => false,
        };
        let tenant = filter.tenant.as_ref().is_none_or(|name| {
            self.bound(entry.binding).is_some_and(|bound| self.tenants[bound.tenant].name == *name)
        });
        tier && tenant
            && (filter.key_prefix.is_empty() || entry.key.to_string().starts_with(&filter.key_prefix))
    }

    pub(crate) fn list(
        &mut self,
        _now: Now,
        from: Origin,
        cursor: u64,
        count: usize,
        filter: &Filter,
        out: &mut Out,
    ) {
        let shown =
            |entry: &Entry| !matches!(entry.state, EntryState::Ghost(_)) && self.passes(entry, filter);
        let (entries, next) = self.catalog.page(cursor, LIST_PLACES_MAX, count.max(1), shown);
        let blocks: Vec<BlockReport> = entries.iter().map(|entry| self.describe(entry)).collect();
        self.reply(from, Reply::Listed { blocks, next }, out);
    }

    /// Looks for blocks whose time is over, a part of the catalog at a tick.
    pub(crate) fn expire_some(&mut self, now: Now, out: &mut Out) {
        let (entries, next) = self.catalog.scan(self.expiry_cursor, 64);
        self.expiry_cursor = next.unwrap_or(0);
        for entry in entries.iter().filter(|entry| entry.expires_at != 0) {
            self.expire_if_due(now, &entry.key, out);
        }
    }

    /// Verifies a part of what was adopted, so that direct reads work again soon after a restart.
    pub(crate) fn verify_adopted(&mut self) {
        let mut bytes_left = VERIFY_BYTES_PER_STEP;
        while bytes_left > 0 {
            let Some((slot, generation)) = self.unverified.pop_front() else { return };
            let Some(held) = self.host.hold(slot, generation) else { continue };
            if held.is_verified() {
                continue;
            }
            bytes_left = bytes_left.saturating_sub(held.len() as u64);
            if !self.verify_held(&held) {
                let key = held.record().key;
                drop(held);
                self.host_corrupt(&key);
            }
        }
    }
}
