//! A want from hold to concealment.
//!
//! A block is in one of three hands: the node's while it is looked for, ours while it waits for credit, and the
//! devices' from `Expose` on. What a device has comes back with its `Concealed`, never sooner.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kv_arena::Held;
use kv_block::{BlockKey, MissReason, Tier};
use kv_wire::frame::ITEMS_MAX;
use kv_wire::message::{Answer, Grant, Want, WantId, Window};

use super::OwnerCommand;
use super::machine::{Out, Owner, Stage};
use super::report::{LeaseReport, OwnerReport};
use crate::Micros;
use crate::link::LinkError;
use crate::reader::PathId;

/// Wants that are over and not concealed, for each that a reader may have outstanding. A device that keeps more than
/// that has enough to do.
const FENCED_PER_WANT: usize = 1;

/// Everything that is held for the reader.
#[derive(Debug, Default)]
pub(super) struct Leases {
    all: BTreeMap<WantId, Lease>,
    timers: BTreeSet<(Micros, WantId)>,
    /// Blocks that are here and wait for bytes of credit, in order.
    queue: VecDeque<WantId>,
    /// Granted and not said.
    granted: Vec<WantId>,
    missed: Vec<(WantId, MissReason)>,
    /// Leases that are not over.
    outstanding: usize,
    /// Bytes that devices have.
    bytes: u64,
    /// Whose turn it is among paths of one rank.
    turn: usize,
    counts: OwnerReport,
}

#[derive(Debug)]
struct Lease {
    key: BlockKey,
    since: Micros,
    stage: LeaseStage,
    until: Micros,
    /// What it weighs, from `Expose` on.
    bytes: u32,
    /// Where devices have it.
    shown: Vec<Shown>,
}

#[derive(Debug)]
enum LeaseStage {
    /// The node looks for it.
    Holding,
    /// It waits for bytes of credit.
    Waiting { block: Held, tier: Tier },
    /// Devices make it readable. The grant is complete but for its window.
    Exposing { grant: Grant },
    /// The reader may read it.
    Granted { grant: Grant },
    /// It is over, and a device may still have it.
    Over,
}

impl LeaseStage {
    fn name(&self) -> &'static str {
        match self {
            Self::Holding => "looking",
            Self::Waiting { .. } | Self::Exposing { .. } => "waiting",
            Self::Granted { .. } => "granted",
            Self::Over => "fenced",
        }
    }
}

/// A block in the hands of one device.
#[derive(Debug)]
struct Shown {
    path: PathId,
    hand: Hand,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hand {
    Exposing,
    Exposed(Option<Window>),
    Concealing,
}

impl Leases {
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }

    pub(super) fn next_timer(&self) -> Option<Micros> {
        self.timers.first().map(|(at, _)| *at)
    }

    pub(super) fn report(&self) -> OwnerReport {
        let count = |stage: fn(&LeaseStage) -> bool| self.all.values().filter(|l| stage(&l.stage)).count();
        OwnerReport {
            holding: count(|stage| matches!(stage, LeaseStage::Holding)),
            waiting: count(|stage| matches!(stage, LeaseStage::Waiting { .. } | LeaseStage::Exposing { .. })),
            granted: count(|stage| matches!(stage, LeaseStage::Granted { .. })),
            fenced: count(|stage| matches!(stage, LeaseStage::Over)),
            bytes: self.bytes,
            ..self.counts.clone()
        }
    }

    /// Each, oldest first.
    pub(super) fn each(&self) -> Vec<LeaseReport> {
        let report = |lease: &Lease| LeaseReport {
            key: lease.key,
            stage: lease.stage.name(),
            bytes: lease.bytes,
            since: lease.since,
            until: (!matches!(lease.stage, LeaseStage::Over)).then_some(lease.until),
        };
        let mut all: Vec<_> = self.all.values().map(report).collect();
        all.sort_by_key(|report| (report.since, report.key));
        all
    }

    /// Sets when a lease's present stage ends by itself.
    fn limit(&mut self, id: WantId, until: Micros) {
        if let Some(lease) = self.all.get_mut(&id) {
            self.timers.remove(&(lease.until, id));
            lease.until = until;
            self.timers.insert((until, id));
        }
    }
}

impl Owner {
    pub(super) fn wants(&mut self, now: Micros, wants: &[Want], out: &mut Out) -> Result<(), &'static str> {
        let Stage::Serving { principals, .. } = &self.stage else { return Ok(()) };
        if wants.len() > ITEMS_MAX {
            return Err("more wants than one message takes");
        }
        let (leases, wants_max) = (&mut self.leases, self.config.credits.wants_max as usize);
        for want in wants {
            let principal = principals.get(usize::from(want.principal));
            let principal = principal.ok_or("a want for a principal that was not named")?.clone();
            if leases.all.contains_key(&want.id) {
                return Err("a want that is numbered twice");
            }
            if leases.outstanding >= wants_max {
                return Err("more wants than the credits allow");
            }
            if leases.all.len() - leases.outstanding > wants_max * FENCED_PER_WANT {
                leases.missed.push((want.id, MissReason::Overloaded));
                continue;
            }
            let wait = std::time::Duration::from_millis(want.wait_ms.into()).min(self.config.wait_max);
            let until = (want.wait_ms > 0).then(|| now.after(wait));
            // A node that does not answer by itself is not waited for for ever.
            let limit = until.unwrap_or(now).after(self.config.wait_max);
            let (key, stage) = (want.key, LeaseStage::Holding);
            let lease = Lease { key, since: now, stage, until: limit, bytes: 0, shown: Vec::new() };
            leases.all.insert(want.id, lease);
            leases.timers.insert((limit, want.id));
            leases.outstanding += 1;
            out.push(OwnerCommand::Hold { want: want.id, principal, key: want.key, until });
        }
        Ok(())
    }

    pub(super) fn done(&mut self, now: Micros, wants: &[WantId], out: &mut Out) -> Result<(), &'static str> {
        if wants.len() > ITEMS_MAX {
            return Err("more wants than one message takes");
        }
        // What is not known has ended here by itself.
        for want in wants {
            self.end(*want, out);
        }
        self.expose_waiting(now, out);
        Ok(())
    }

    pub(super) fn held(&mut self, now: Micros, id: WantId, block: Held, tier: Tier, out: &mut Out) {
        let Some(lease) = self.leases.all.get_mut(&id) else { return };
        if !matches!(lease.stage, LeaseStage::Holding) {
            return;
        }
        let (bytes, bytes_max) = (block.record().bytes, self.config.credits.bytes_max);
        if bytes == 0 || u64::from(bytes) > bytes_max {
            lease.stage = LeaseStage::Over;
            return self.miss(id, MissReason::Overloaded, out);
        }
        lease.stage = LeaseStage::Waiting { block, tier };
        self.leases.queue.push_back(id);
        self.leases.limit(id, now.after(self.config.wait_max));
        self.expose_waiting(now, out);
    }

    pub(super) fn not_held(&mut self, id: WantId, reason: MissReason) {
        let leases = &mut self.leases;
        if leases.all.get(&id).is_some_and(|lease| matches!(lease.stage, LeaseStage::Holding))
            && let Some(lease) = leases.all.remove(&id)
        {
            leases.timers.remove(&(lease.until, id));
            leases.outstanding -= 1;
            leases.missed.push((id, reason));
        }
    }

    /// Gives blocks to the devices as far as there is credit for their bytes.
    fn expose_waiting(&mut self, now: Micros, out: &mut Out) {
        while let Some(id) = self.leases.queue.front().copied() {
            let Some(Lease { stage: LeaseStage::Waiting { block, .. }, .. }) = self.leases.all.get(&id)
            else {
                self.leases.queue.pop_front();
                continue;
            };
            if self.leases.bytes + u64::from(block.record().bytes) > self.config.credits.bytes_max {
                return;
            }
            self.leases.queue.pop_front();
            self.expose(now, id, out);
        }
    }

    fn expose(&mut self, now: Micros, id: WantId, out: &mut Out) {
        let Some(lease) = self.leases.all.get_mut(&id) else { return };
        let LeaseStage::Waiting { block, tier } = std::mem::replace(&mut lease.stage, LeaseStage::Over)
        else {
            return;
        };
        let record = block.record();
        let unix = self.config.unix_zero_s + now.0 / 1_000_000;
        let ttl_s = match record.expires_at {
            0 => 0,
            at if u64::from(at) <= unix => return self.miss(id, MissReason::Expired, out),
            at => (u64::from(at) - unix) as u32,
        };
        let (checksum, bytes) = (record.checksum, record.bytes);
        let (tag, priority) = (record.tag, record.priority);
        let grant = Grant { id, checksum, bytes, tag, priority, ttl_s, tier, window: None };
        lease.stage = LeaseStage::Exposing { grant };
        lease.bytes = bytes;
        self.leases.bytes += u64::from(bytes);
        for path in self.up.iter().copied().chain([PathId::TCP]) {
            lease.shown.push(Shown { path, hand: Hand::Exposing });
            out.push(OwnerCommand::Expose { path, want: id, block: block.clone() });
        }
        self.leases.limit(id, now.after(self.config.lease_max));
    }

    pub(super) fn exposed(
        &mut self,
        now: Micros,
        path: PathId,
        id: WantId,
        result: Result<Option<Window>, LinkError>,
        out: &mut Out,
    ) {
        let Some(lease) = self.leases.all.get_mut(&id) else { return };
        let Some(at) = lease.shown.iter().position(|shown| shown.path == path) else { return };
        if lease.shown[at].hand != Hand::Exposing {
            return;
        }
        let over = matches!(lease.stage, LeaseStage::Over);
        match result {
            Ok(_) if over => {
                lease.shown[at].hand = Hand::Concealing;
                out.push(OwnerCommand::Conceal { path, want: id });
            }
            Ok(window) => lease.shown[at].hand = Hand::Exposed(window),
            Err(error) => {
                tracing::debug!(want = id.0, path = path.0, %error, "a device cannot expose a block");
                lease.shown.swap_remove(at);
            }
        }
        if lease.shown.iter().any(|shown| shown.hand == Hand::Exposing) {
            return;
        }
        if over {
            return self.forget_concealed(now, id, out);
        }
        self.grant(now, id, out);
    }

    /// Every device has said what it can do.
    fn grant(&mut self, now: Micros, id: WantId, out: &mut Out) {
        let leases = &mut self.leases;
        let Some(lease) = leases.all.get_mut(&id) else { return };
        let LeaseStage::Exposing { mut grant } = lease.stage else { return };
        if !lease.shown.iter().any(|shown| shown.path == PathId::TCP) {
            return self.miss(id, MissReason::PathFailed, out);
        }
        let rank = |path: PathId| self.config.paths.iter().find(|known| known.path == path).map(|p| p.rank);
        let windows = lease.shown.iter().filter_map(|shown| match shown.hand {
            Hand::Exposed(Some(window)) => Some((rank(shown.path)?, window)),
            _ => None,
        });
        let mut windows: Vec<_> = windows.collect();
        let best = windows.iter().map(|(rank, _)| *rank).min();
        windows.retain(|(rank, _)| Some(*rank) == best);
        windows.sort_unstable_by_key(|(_, window)| window.path);
        if !windows.is_empty() {
            grant.window = Some(windows[leases.turn % windows.len()].1);
            leases.turn = leases.turn.wrapping_add(1);
        }
        lease.stage = LeaseStage::Granted { grant };
        leases.granted.push(id);
        leases.counts.grants += 1;
        leases.counts.bytes_granted += u64::from(grant.bytes);
        let path = grant.window.map_or(PathId::TCP, |window| PathId(window.path));
        *leases.counts.paths.entry(path).or_default() += 1;
        leases.limit(id, now.after(self.config.lease_max));
    }

    pub(super) fn concealed(&mut self, now: Micros, path: PathId, id: WantId, out: &mut Out) {
        let Some(lease) = self.leases.all.get_mut(&id) else { return };
        lease.shown.retain(|shown| shown.path != path);
        self.forget_concealed(now, id, out);
    }

    /// Forgets a lease that is over when no device has its block any more.
    fn forget_concealed(&mut self, now: Micros, id: WantId, out: &mut Out) {
        let over = |lease: &Lease| matches!(lease.stage, LeaseStage::Over) && lease.shown.is_empty();
        if self.leases.all.get(&id).is_some_and(over) {
            self.forget(id);
            self.expose_waiting(now, out);
        }
    }

    fn forget(&mut self, id: WantId) {
        if let Some(lease) = self.leases.all.remove(&id) {
            self.leases.bytes -= u64::from(lease.bytes);
        }
    }

    fn miss(&mut self, id: WantId, reason: MissReason, out: &mut Out) {
        self.leases.missed.push((id, reason));
        self.end(id, out);
    }

    /// Ends a lease, whatever its stage: it is forgotten at once, or when the devices are done with it.
    fn end(&mut self, id: WantId, out: &mut Out) {
        let Some(lease) = self.leases.all.get_mut(&id) else { return };
        // Its time limit is there as long as it is not over.
        if !self.leases.timers.remove(&(lease.until, id)) {
            return;
        }
        self.leases.outstanding -= 1;
        if let LeaseStage::Holding = std::mem::replace(&mut lease.stage, LeaseStage::Over) {
            out.push(OwnerCommand::Unhold { want: id });
        }
        for shown in &mut lease.shown {
            // A device that is still exposing it is told when it has.
            if let Hand::Exposed(_) = shown.hand {
                shown.hand = Hand::Concealing;
                out.push(OwnerCommand::Conceal { path: shown.path, want: id });
            }
        }
        if lease.shown.is_empty() {
            self.forget(id);
        }
    }

    /// The connection is over: everything ends, and nothing is said about it.
    pub(super) fn end_all(&mut self, out: &mut Out) {
        for id in self.leases.all.keys().copied().collect::<Vec<_>>() {
            self.end(id, out);
        }
        self.leases.queue.clear();
        self.leases.granted.clear();
        self.leases.missed.clear();
    }

    pub(super) fn expire_leases(&mut self, now: Micros, out: &mut Out) {
        let mut freed = false;
        while let Some((at, id)) = self.leases.timers.first().copied()
            && at <= now
        {
            freed = true;
            let stage = self.leases.all.get(&id).map(|lease| &lease.stage);
            match stage {
                Some(LeaseStage::Granted { .. }) => {
                    self.leases.counts.expired += 1;
                    self.end(id, out);
                }
                Some(LeaseStage::Waiting { .. }) => self.miss(id, MissReason::Overloaded, out),
                Some(_) => self.miss(id, MissReason::TierTimeout, out),
                None => {
                    self.leases.timers.remove(&(at, id));
                }
            }
        }
        if freed {
            self.expose_waiting(now, out);
        }
    }

    /// Says grants and misses. A grant that ended before it was said is not.
    pub(super) fn say_leases(&mut self, out: &mut Out) {
        let leases = &mut self.leases;
        let granted = std::mem::take(&mut leases.granted);
        let grants: Vec<Grant> = granted
            .iter()
            .filter_map(|id| match leases.all.get(id)?.stage {
                LeaseStage::Granted { grant } => Some(grant),
                _ => None,
            })
            .collect();
        let missed = std::mem::take(&mut leases.missed);
        for (_, reason) in &missed {
            *leases.counts.misses.entry(reason.name()).or_default() += 1;
        }
        let grants = grants.chunks(ITEMS_MAX).map(|some| Answer::Granted(some.to_vec()));
        let missed = missed.chunks(ITEMS_MAX).map(|some| Answer::Missed(some.to_vec()));
        out.extend(grants.chain(missed).map(OwnerCommand::Say));
    }
}
