//! A want on its way: queued, asked, granted, read, landed or missed.
//!
//! What the owner may still say about a want that has ended here is told from a lie by a ping: a **ghost** is a want
//! that was asked and done before it was answered. It counts against the credits until it is answered or a pong
//! comes whose ping was said after it was done; then the owner has nothing to say about it any more.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use kv_arena::Slot;
use kv_block::{BlockKey, MissReason, Record, Tier};
use kv_wire::frame::ITEMS_MAX;
use kv_wire::message::{self, Ask, Credits, Grant, ReadId, WantId, Window};

use super::machine::{Out, Reader, Stage, Timer, Trial};
use super::report::PathState;
use super::{PathId, ReaderCommand};
use crate::Micros;
use crate::health::{Proof, Strike};
use crate::link::LinkError;

/// A want that has not ended.
#[derive(Debug)]
pub(super) struct Want {
    principal: u8,
    key: BlockKey,
    deadline: Micros,
    wait: bool,
    /// On which connection it was said.
    connection: u64,
    stage: WantStage,
}

impl Want {
    pub(super) fn new(principal: u8, key: BlockKey, deadline: Micros, wait: bool) -> Self {
        Self { principal, key, deadline, wait, connection: 0, stage: WantStage::Settled }
    }

    fn record(&self, grant: &Grant) -> Record {
        let Grant { checksum, bytes, tag, priority, .. } = *grant;
        Record { key: self.key, checksum, bytes, tag, priority, expires_at: 0 }
    }

    /// How long the owner may take: a tenth less than there is, so that an honest one has answered by the deadline.
    /// Rounded up so that a little time is not none.
    fn wait_ms(&self, now: Micros) -> u32 {
        let left = (self.deadline.since(now).as_micros() * 9 / 10).div_ceil(1000).max(1);
        if self.wait { u32::try_from(left).unwrap_or(u32::MAX) } else { 0 }
    }
}

#[derive(Debug)]
enum WantStage {
    /// Its place in the queue.
    Queued { place: u64 },
    /// The owner was told.
    Asked,
    /// The node was told.
    Granted { grant: Grant },
    /// There is a slot, and TCP may come up yet.
    Parked { grant: Grant, into: Slot, tried: Tried },
    /// A device has the slot.
    Reading { grant: Grant, read: ReadId, path: PathId, tried: Tried },
    /// Nothing of it is anywhere.
    Settled,
}

/// What was tried for one block.
#[derive(Clone, Copy, Default, Debug)]
struct Tried {
    window: bool,
    tcp: bool,
    corrupt: bool,
}

/// A read that a device has.
#[derive(Debug)]
pub(super) struct Read {
    /// `None` when nobody waits for it any more.
    pub(super) want: Option<WantId>,
    path: PathId,
    connection: u64,
    /// Until when a cancelled one should have come back.
    until: Option<Micros>,
    /// When it began, and how many blocks had landed then.
    since: (Micros, u64),
    /// The want and its bytes, when the owner is to be told that they are done once the device is.
    owes: Option<(WantId, u32)>,
}

/// What was said and is to be said to the owner.
#[derive(Debug, Default)]
pub(super) struct Books {
    /// In the order in which they came.
    queue: BTreeMap<u64, WantId>,
    /// Said, and neither missed nor done: what the owner's credits count.
    said: usize,
    /// Of these, without an answer that is waited for.
    asked: usize,
    /// Of these, ended before their answer.
    ghosts: BTreeSet<WantId>,
    /// Ghosts whose end was said, each with the first ping that came after it.
    laid: VecDeque<(u64, WantId)>,
    /// Ends that were not said yet.
    done: Vec<WantId>,
    /// Bytes of grants that are not done.
    pub(super) granted_bytes: u64,
    /// The longest block of this connection so far: what the next one is taken for.
    likely_bytes: u64,
    /// When the first want ran out since the owner last answered one.
    unanswered_since: Option<Micros>,
}

impl Books {
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.said == 0 && self.done.is_empty()
    }

    /// The connection is gone, and all that was said with it.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Whether one more want fits the owner's credits.
    fn fits(&self, credits: &Credits) -> bool {
        let likely = self.granted_bytes + (self.asked as u64 + 1) * self.likely_bytes;
        let alone = self.asked == 0 && self.granted_bytes == 0;
        self.said < credits.wants_max as usize && (likely <= credits.bytes_max || alone)
    }

    /// A want ran out without an answer: for how long that has been so.
    fn unanswered(&mut self, now: Micros) -> Duration {
        now.since(*self.unanswered_since.get_or_insert(now))
    }

    /// The owner answered a want that had ended. False when it is no such want.
    fn answered(&mut self, want: WantId) -> bool {
        let ghost = self.ghosts.remove(&want);
        self.said -= usize::from(ghost);
        if self.ghosts.is_empty() {
            self.laid.clear();
        }
        ghost
    }

    /// The owner has answered everything that was said before this ping.
    pub(super) fn answered_before(&mut self, ping: u64) {
        while let Some((_, want)) = self.laid.pop_front_if(|(first, _)| *first <= ping) {
            self.answered(want);
        }
    }

    /// Whether a pong would make room: for wants, or in these books.
    pub(super) fn wait_for_answers(&self) -> bool {
        !self.ghosts.is_empty() && (!self.queue.is_empty() || self.laid.len() > ITEMS_MAX)
    }

    /// An asked want ends before its answer.
    fn haunt(&mut self, want: WantId) {
        self.asked -= 1;
        self.ghosts.insert(want);
        self.done.push(want);
    }

    /// A granted want ends.
    fn settle(&mut self, want: WantId, bytes: u32) {
        self.said -= 1;
        self.granted_bytes -= u64::from(bytes);
        self.done.push(want);
    }
}

impl Reader {
    pub(super) fn want(&mut self, now: Micros, id: WantId, mut want: Want, out: &mut Out) {
        if self.wants.contains_key(&id) {
            tracing::error!(want = id.0, peer = self.config.peer, "a want was given twice");
            return;
        }
        let refused = if want.deadline <= now {
            Some(MissReason::TierTimeout)
        } else if usize::from(want.principal) >= self.config.principals.len() {
            tracing::error!(principal = want.principal, peer = self.config.peer, "no such principal");
            Some(MissReason::NeverStored)
        } else if self.wants.len() >= self.config.wants_max {
            Some(MissReason::Overloaded)
        } else {
            (!self.admit(now, Trial::Want(id))).then_some(MissReason::PeerDown)
        };
        if let Some(reason) = refused {
            return self.missed(id, reason, out);
        }
        let place = self.number();
        want.stage = WantStage::Queued { place };
        self.books.queue.insert(place, id);
        self.timers.insert((want.deadline, Timer::Want(id)));
        self.wants.insert(id, want);
        self.connect(now, out);
    }

    pub(super) fn take(&mut self, now: Micros, id: WantId, into: Slot, out: &mut Out) {
        // It may have ended while the node looked for a slot.
        let Some(want) = self.wants.get(&id) else { return };
        let WantStage::Granted { grant } = want.stage else {
            tracing::error!(want = id.0, peer = self.config.peer, "a slot for a want that has no use for it");
            return;
        };
        if into.len() < grant.bytes as usize || self.reads.len() >= self.config.reads_max {
            return self.miss(now, id, MissReason::Overloaded, out);
        }
        self.read(now, id, grant, into, Tried::default(), out);
    }

    pub(super) fn leave(&mut self, now: Micros, id: WantId, out: &mut Out) {
        self.end(now, id, out);
    }

    pub(super) fn miss(&mut self, now: Micros, id: WantId, reason: MissReason, out: &mut Out) {
        if self.end(now, id, out) {
            self.missed(id, reason, out);
        }
    }

    /// A want's time is over. A read that was under way for so long that silence would be a strike, while nothing
    /// landed from this peer, is one: what waits behind it waits in vain. So is a peer that lets wants run out for as
    /// long, and answers none.
    pub(super) fn late(&mut self, now: Micros, id: WantId, out: &mut Out) {
        let limit = self.config.silence_max;
        let read = match self.wants.get(&id).map(|want| &want.stage) {
            Some(WantStage::Reading { read, .. }) => self.reads.get(read),
            Some(WantStage::Queued { .. } | WantStage::Asked) if matches!(self.stage, Stage::Up(_)) => {
                if self.books.unanswered(now) >= limit {
                    self.books.unanswered_since = Some(now);
                    self.health.strike(now, Strike::Unanswered, format!("it answered no want for {limit:?}"));
                }
                None
            }
            _ => None,
        };
        let in_vain = read.is_some_and(|read| {
            let (since, landed) = read.since;
            now.since(since) >= limit && landed == self.landed && read.connection == self.connection
        });
        self.miss(now, id, MissReason::TierTimeout, out);
        if in_vain {
            self.unread(now, format!("nothing could be read for {limit:?}"), out);
        }
    }

    /// Takes a want out, whatever its stage. False when it has ended already.
    fn end(&mut self, now: Micros, id: WantId, out: &mut Out) -> bool {
        let Some(want) = self.wants.remove(&id) else { return false };
        self.timers.remove(&(want.deadline, Timer::Want(id)));
        self.end_trial(Trial::Want(id));
        let leased = want.connection == self.connection && matches!(self.stage, Stage::Up(_));
        match want.stage {
            WantStage::Queued { place } => {
                self.books.queue.remove(&place);
            }
            WantStage::Asked if leased => self.books.haunt(id),
            WantStage::Granted { grant } | WantStage::Parked { grant, .. } if leased => {
                self.books.settle(id, grant.bytes);
            }
            WantStage::Reading { grant, read, .. } => {
                self.cancel(now, read, leased.then_some((id, grant.bytes)), out);
            }
            _ => {}
        }
        true
    }

    /// The device keeps the slot until it is done with it; nobody waits for that. Nor does the owner hear of it before:
    /// a device that still reads what the owner has withdrawn fails, and all that goes by its path with it.
    fn cancel(&mut self, now: Micros, id: ReadId, owes: Option<(WantId, u32)>, out: &mut Out) {
        let Some(read) = self.reads.get_mut(&id) else { return };
        let until = now.after(self.config.cancel_max);
        (read.want, read.owes) = (None, owes);
        read.until = Some(until);
        self.timers.insert((until, Timer::Cancelled(id)));
        out.push(ReaderCommand::Cancel { path: read.path, read: id });
    }

    /// A device still has a read that was cancelled long ago. Closing its path brings the memory back.
    pub(super) fn stuck(&mut self, now: Micros, id: ReadId, out: &mut Out) {
        let Some(read) = self.reads.get_mut(&id) else { return };
        read.until = None;
        if read.connection == self.connection && matches!(self.stage, Stage::Up(_)) {
            let why = format!("path {} keeps a read that was cancelled", read.path.0);
            self.hangup(now, Strike::Stuck, why, out);
        }
    }

    /// The connection is gone: with it every want, but for those whose bytes may be on their way by TCP.
    pub(super) fn end_wants(&mut self, now: Micros, tcp_too: bool, out: &mut Out) {
        let on_tcp = |stage: &WantStage| matches!(stage, WantStage::Reading { path: PathId::TCP, .. });
        let over = self.wants.iter().filter(|(_, want)| tcp_too || !on_tcp(&want.stage));
        for id in over.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.miss(now, id, MissReason::PeerDown, out);
        }
    }

    /// Ends what is still being read.
    pub(super) fn end_reading(&mut self, now: Micros, out: &mut Out) {
        let reading = self.reads.values().filter_map(|read| read.want).collect::<Vec<_>>();
        for id in reading {
            self.miss(now, id, MissReason::PeerDown, out);
        }
    }

    pub(super) fn granted(
        &mut self,
        now: Micros,
        grants: &[Grant],
        out: &mut Out,
    ) -> Result<(), &'static str> {
        if grants.len() > ITEMS_MAX {
            return Err("more grants than one message takes");
        }
        for grant in grants {
            if self.books.answered(grant.id) {
                continue;
            }
            self.check(grant)?;
            let Some(want) = self.wants.get_mut(&grant.id) else { continue };
            want.stage = WantStage::Granted { grant: *grant };
            self.books.asked -= 1;
            self.books.granted_bytes += u64::from(grant.bytes);
            self.books.likely_bytes = self.books.likely_bytes.max(grant.bytes.into());
            let record = want.record(grant);
            out.push(ReaderCommand::Granted { want: grant.id, record, ttl_s: grant.ttl_s, tier: grant.tier });
        }
        self.settled(now, grants.len());
        Ok(())
    }

    /// The owner said what becomes of so many wants.
    fn settled(&mut self, now: Micros, wants: usize) {
        if wants > 0 {
            self.books.unanswered_since = None;
            self.health.proved(now, Proof::Settled);
        }
    }

    /// Nothing in a grant is believed before.
    fn check(&self, grant: &Grant) -> Result<(), &'static str> {
        let want = self.wants.get(&grant.id).ok_or("a grant that nobody asked for")?;
        match want.stage {
            WantStage::Asked => {}
            WantStage::Queued { .. } => return Err("a grant that nobody asked for"),
            _ => return Err("a want granted twice"),
        }
        if grant.bytes == 0 || grant.bytes > self.config.block_bytes_max {
            return Err("a grant of more bytes than a block has, or of none");
        }
        if grant.tier == Tier::Device {
            return Err("a grant from a tier that serves no peer");
        }
        if grant.window.is_some_and(|window| !self.config.paths.contains(&PathId(window.path))) {
            return Err("a window of a path that nobody knows");
        }
        let Stage::Up(session) = &self.stage else { return Ok(()) };
        if self.books.granted_bytes + u64::from(grant.bytes) > session.credits.bytes_max {
            return Err("more bytes granted than its credits allow");
        }
        Ok(())
    }

    pub(super) fn not_granted(
        &mut self,
        now: Micros,
        misses: &[(WantId, MissReason)],
        out: &mut Out,
    ) -> Result<(), &'static str> {
        if misses.len() > ITEMS_MAX {
            return Err("more misses than one message takes");
        }
        self.settled(now, misses.len());
        for (id, reason) in misses {
            if self.books.answered(*id) {
                continue;
            }
            let want = self.wants.get_mut(id).filter(|want| matches!(want.stage, WantStage::Asked));
            want.ok_or("a miss of what nobody asked for")?.stage = WantStage::Settled;
            self.books.asked -= 1;
            self.books.said -= 1;
            self.miss(now, *id, *reason, out);
        }
        Ok(())
    }

    /// The path for the next attempt; `Err` with what that means when there is none.
    fn choose(&self, grant: &Grant, tried: Tried) -> Result<(PathId, Option<Window>), NoPath> {
        let state = |path: PathId| self.paths.get(&path).map(|path| &path.report.state);
        if let Some(window) = grant.window.filter(|_| !tried.window)
            && state(PathId(window.path)) == Some(&PathState::Up)
        {
            return Ok((PathId(window.path), Some(window)));
        }
        match state(PathId::TCP) {
            Some(PathState::Up) if !tried.tcp => Ok((PathId::TCP, None)),
            Some(PathState::Opening) if !tried.tcp => Err(NoPath::Yet),
            _ => Err(NoPath::Left),
        }
    }

    /// Reads a granted block by the best path that was not tried.
    fn read(&mut self, now: Micros, id: WantId, grant: Grant, into: Slot, tried: Tried, out: &mut Out) {
        let choice = self.choose(&grant, tried);
        let read = ReadId(self.number());
        let Some(want) = self.wants.get_mut(&id) else { return };
        match choice {
            Ok((path, window)) => {
                let tcp = path == PathId::TCP;
                let tried = Tried { window: tried.window || !tcp, tcp: tried.tcp || tcp, ..tried };
                want.stage = WantStage::Reading { grant, read, path, tried };
                let record = want.record(&grant);
                let connection = self.connection;
                let since = (now, self.landed);
                let under_way = Read { want: Some(id), path, connection, until: None, since, owes: None };
                self.reads.insert(read, under_way);
                out.push(ReaderCommand::Read { path, read, want: id, window, record, into });
            }
            Err(NoPath::Yet) => want.stage = WantStage::Parked { grant, into, tried },
            Err(NoPath::Left) => {
                let reason = if tried.corrupt { MissReason::Corrupt } else { MissReason::PathFailed };
                self.miss(now, id, reason, out);
            }
        }
    }

    /// A path changed: what waits for one looks again.
    pub(super) fn retry_parked(&mut self, now: Micros, out: &mut Out) {
        let parked = |want: &&mut Want| matches!(want.stage, WantStage::Parked { .. });
        let stages = self.wants.iter_mut().map(|(id, want)| (*id, want)).filter(|(_, want)| parked(want));
        let stages = stages.map(|(id, want)| (id, std::mem::replace(&mut want.stage, WantStage::Settled)));
        for (id, stage) in stages.collect::<Vec<_>>() {
            let WantStage::Parked { grant, into, tried } = stage else { continue };
            if let Some(want) = self.wants.get_mut(&id) {
                want.stage = WantStage::Granted { grant };
            }
            self.read(now, id, grant, into, tried, out);
        }
    }

    pub(super) fn read_ended(
        &mut self,
        now: Micros,
        id: ReadId,
        into: Slot,
        result: Result<(), LinkError>,
        out: &mut Out,
    ) {
        let Some(read) = self.reads.remove(&id) else {
            tracing::error!(read = id.0, peer = self.config.peer, "a read ended that was not under way");
            return;
        };
        if let Some(until) = read.until {
            self.timers.remove(&(until, Timer::Cancelled(id)));
        }
        let here = read.connection == self.connection && matches!(self.stage, Stage::Up(_));
        if let Some((want, bytes)) = read.owes.filter(|_| here) {
            self.books.settle(want, bytes);
        }
        let want = read.want.and_then(|want| Some((want, self.wants.get_mut(&want)?)));
        let Some((id, want)) = want else { return };
        let WantStage::Reading { grant, tried, .. } = want.stage else { return };
        // The device has let go of the slot: there is nothing to cancel any more.
        want.stage = WantStage::Granted { grant };
        let record = want.record(&grant);
        self.count(read.path, &result, grant.bytes, here);
        let Err(error) = result else {
            self.health.proved(now, Proof::Landed);
            self.end(now, id, out);
            self.landed += 1;
            out.push(ReaderCommand::Landed { want: id, into, record, path: read.path });
            return;
        };
        let mut next = tried;
        match &error {
            LinkError::Gone => return self.miss(now, id, MissReason::PeerEvicted, out),
            LinkError::Corrupt => {
                self.health.strike(now, Strike::Corrupt, format!("by path {}: {error}", read.path.0));
                next.corrupt = true;
            }
            LinkError::Protocol { .. } => {
                self.health.strike(now, Strike::Rules, format!("by path {}: {error}", read.path.0));
            }
            LinkError::Path { .. } | LinkError::Cancelled | LinkError::Unsupported { .. } => {}
        }
        match error {
            // Damaged twice, by two paths: it is the owner's memory.
            LinkError::Corrupt if tried.corrupt => self.miss(now, id, MissReason::Corrupt, out),
            LinkError::Corrupt if !here => self.miss(now, id, MissReason::Corrupt, out),
            _ if !here => self.miss(now, id, MissReason::PeerDown, out),
            error => {
                self.read(now, id, grant, into, next, out);
                if let LinkError::Path { what } = error
                    && !self.wants.contains_key(&id)
                {
                    self.unread(now, what, out);
                }
            }
        }
    }

    fn count(&mut self, id: PathId, result: &Result<(), LinkError>, bytes: u32, here: bool) {
        let Some(path) = self.paths.get_mut(&id) else { return };
        match result {
            Ok(()) => {
                path.report.reads += 1;
                path.report.bytes += u64::from(bytes);
                path.errors_in_row = 0;
            }
            Err(LinkError::Gone | LinkError::Cancelled) => {}
            Err(error) => {
                path.report.errors += 1;
                path.report.corrupt += u64::from(*error == LinkError::Corrupt);
                path.report.last_error = Some(error.to_string());
                path.errors_in_row += u32::from(here);
                let alone = path.errors_in_row >= self.config.path_errors_max && id != PathId::TCP;
                if alone && path.report.state == PathState::Up {
                    let why = format!("left alone after {} failed reads: {error}", path.errors_in_row);
                    path.report.state = PathState::Down { why };
                }
            }
        }
    }

    /// Tells the owner what has ended here.
    pub(super) fn say_done(&mut self, out: &mut Out) {
        if self.books.done.is_empty() {
            return;
        }
        let (done, ping) = (std::mem::take(&mut self.books.done), self.next_number + 1);
        let ghosts = done.iter().filter(|want| self.books.ghosts.contains(want));
        self.books.laid.extend(ghosts.map(|want| (ping, *want)));
        out.extend(done.chunks(ITEMS_MAX).map(|done| ReaderCommand::Say(Ask::Done(done.to_vec()))));
    }

    /// Asks for what is wanted, as far as the owner's credits go.
    pub(super) fn say_wants(&mut self, now: Micros, out: &mut Out) {
        let Stage::Up(session) = &self.stage else { return };
        let mut batch = Vec::new();
        while self.books.fits(&session.credits)
            && let Some((_, id)) = self.books.queue.pop_first()
        {
            let Some(want) = self.wants.get_mut(&id) else { continue };
            want.stage = WantStage::Asked;
            want.connection = self.connection;
            self.books.said += 1;
            self.books.asked += 1;
            let (principal, key, wait_ms) = (want.principal, want.key, want.wait_ms(now));
            batch.push(message::Want { id, principal, wait_ms, key });
        }
        out.extend(batch.chunks(ITEMS_MAX).map(|batch| ReaderCommand::Say(Ask::Want(batch.to_vec()))));
    }

    /// Wants queued, asked, granted and being read.
    pub(super) fn wants_by_stage(&self) -> [usize; 4] {
        let mut counts = [0; 4];
        for want in self.wants.values() {
            let stage = match want.stage {
                WantStage::Queued { .. } => 0,
                WantStage::Asked => 1,
                WantStage::Granted { .. } | WantStage::Settled => 2,
                WantStage::Parked { .. } | WantStage::Reading { .. } => 3,
            };
            counts[stage] += 1;
        }
        counts
    }
}

/// Why a block cannot be read now.
enum NoPath {
    /// TCP may come up.
    Yet,
    /// Every path was tried, or is down.
    Left,
}
