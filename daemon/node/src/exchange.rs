//! Who of the peers gives which block. One for a node: it serves the searches of all shards.
//!
//! ```text
//!   Find, with a hint ----> that peer is asked for it at once ----.
//!   Find, without ----> all peers: which of these do you have?    |
//!                         one has it -----------------------------+--> granted -> Offered -> Into -> landed
//!                         one expects it, and nobody has it ------'       |
//!                         nobody ----> Missed                             '--> it failed: the next peer that has it
//! ```
//! Questions of one turn go out in one message per peer, and are bounded in number and time. What one peer is like,
//! its credits, paths and health, is the affair of its [`Reader`]; here is decided whom to ask. Like the brain it owns
//! no socket and no clock: [`ExchangeCommand`] says what is to be done.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use kv_arena::Slot;
use kv_block::{BlockKey, MissReason, ShardId};
use kv_transport::Micros;
use kv_transport::Reader;
use kv_transport::reader::{PeerReport, ReaderCommand, ReaderConfig, ReaderEvent};
use kv_wire::frame::ITEMS_MAX;
use kv_wire::message::{Found, Offer, Sight, Taken, WantId};

use crate::io::{FetchDone, FetchOp, FetchToken, OfferToken, PeerId};

/// So many questions in a row may run out on a silent peer before it is asked no more, until it says something.
const SILENT_QUESTIONS: u32 = 2;

/// What an exchange must know before it starts.
#[derive(Clone, Debug)]
pub struct ExchangeConfig {
    /// The principal of each shard, by the shard's number, as [`kv_wire::message::Hello::principals`] counts them.
    pub principals: Vec<u8>,
    /// How many peers are asked for a block that nobody hinted at.
    pub probe_peers_max: usize,
    /// How long such a question may take, in microseconds.
    pub probe_limit: u64,
}

/// Something that happened.
#[derive(Debug)]
pub enum ExchangeEvent {
    /// A shard wants something. Deadlines are in the exchange's own time.
    Fetch {
        /// Which shard.
        shard: ShardId,
        /// What.
        op: FetchOp,
        /// When a search ends; what stands in the operation is the shard's time.
        deadline: Micros,
    },
    /// Something about one peer.
    Peer {
        /// Which.
        peer: PeerId,
        /// What.
        event: ReaderEvent,
    },
    /// Somebody asks where these are, without wanting them.
    Locate {
        /// Given back.
        id: u64,
        /// Whose.
        principal: u8,
        /// Names.
        keys: Vec<BlockKey>,
        /// Who is asked in any case.
        hint: Option<PeerId>,
        /// When the question ends.
        deadline: Micros,
    },
    /// This node leaves and offers blocks to a peer.
    Offer {
        /// Which.
        peer: PeerId,
        /// What. Its number is given back.
        offer: Offer,
        /// When it ends.
        deadline: Micros,
    },
    /// Nothing; time passed.
    Tick,
}

/// Something to do.
#[derive(Debug)]
pub enum ExchangeCommand {
    /// Connect to a peer, say something to it, read from it: never what the exchange settles by itself.
    Peer {
        /// Which.
        peer: PeerId,
        /// What.
        command: ReaderCommand,
    },
    /// Tell a shard.
    Shard {
        /// Which.
        shard: ShardId,
        /// What.
        done: FetchDone,
    },
    /// Where each block is, in order; `None` where no peer that answered has it.
    Located {
        /// Which question.
        id: u64,
        /// Answers.
        places: Vec<Option<(PeerId, Sight)>>,
    },
    /// What became of an offer; `None` when the peer did not say in time.
    Offered {
        /// To whom.
        peer: PeerId,
        /// Which.
        offer: u64,
        /// How much of it was taken.
        taken: Option<Taken>,
    },
}

/// One search under way, for an administrator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransferReport {
    /// For which shard.
    pub shard: ShardId,
    /// Name.
    pub key: BlockKey,
    /// From whom, once that is known.
    pub peer: Option<PeerId>,
    /// `searching`, `asked`, `granted` or `reading`.
    pub stage: &'static str,
    /// Length in bytes, once that is known.
    pub bytes: u32,
    /// Since when.
    pub since: Micros,
    /// Until when.
    pub deadline: Micros,
}

type SearchId = (ShardId, FetchToken);

struct Search {
    key: BlockKey,
    principal: u8,
    since: Micros,
    deadline: Micros,
    stage: Stage,
    /// Peers that were asked for it, and did not or will not give it.
    tried: Vec<PeerId>,
    /// Peers that have it, or expect it, and were not asked for it yet.
    candidates: Vec<(PeerId, Sight)>,
    /// Whether the peers were asked who has it.
    probed: bool,
    /// Answers that are still to come.
    answers_left: usize,
    /// The most telling reason so far.
    why: MissReason,
    bytes: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Searching,
    Asked(PeerId, WantId),
    Granted(PeerId, WantId),
    Reading(PeerId, WantId),
}

impl Stage {
    fn want(self) -> Option<(PeerId, WantId)> {
        match self {
            Self::Searching => None,
            Self::Asked(peer, want) | Self::Granted(peer, want) | Self::Reading(peer, want) => {
                Some((peer, want))
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Searching => "searching",
            Self::Asked(..) => "asked",
            Self::Granted(..) => "granted",
            Self::Reading(..) => "reading",
        }
    }
}

/// What a probe is for.
enum ProbeFor {
    Searches(Vec<SearchId>),
    /// A question, and the place of the first key of this probe in it.
    Location {
        id: u64,
        first: usize,
    },
}

struct Location {
    places: Vec<Option<(PeerId, Sight)>>,
    answers_left: usize,
}

/// The searches of a node.
pub struct Exchange {
    config: ExchangeConfig,
    readers: Vec<Reader>,
    searches: HashMap<SearchId, Search>,
    wants: HashMap<WantId, SearchId>,
    probes: HashMap<u64, (PeerId, ProbeFor)>,
    locations: HashMap<u64, Location>,
    /// Searches whose question goes out with the next flush.
    unasked: Vec<SearchId>,
    /// With which peer the next question begins, when not all are asked.
    first: usize,
    next_number: u64,
    commands: Vec<ReaderCommand>,
}

impl Exchange {
    /// An exchange with these peers; their numbers are their places here.
    pub fn new(config: ExchangeConfig, peers: Vec<ReaderConfig>) -> Self {
        Self {
            config,
            readers: peers.into_iter().map(Reader::new).collect(),
            searches: HashMap::new(),
            wants: HashMap::new(),
            probes: HashMap::new(),
            locations: HashMap::new(),
            unasked: Vec::new(),
            first: 0,
            next_number: 0,
            commands: Vec::new(),
        }
    }

    /// Takes one event and appends what is to be done about it. After the events of a turn comes [`Self::flush`].
    pub fn handle(&mut self, now: Micros, event: ExchangeEvent, out: &mut Vec<ExchangeCommand>) {
        match event {
            ExchangeEvent::Fetch { shard, op, deadline } => match op {
                FetchOp::Find { fetch, key, hint, .. } => {
                    self.find(now, (shard, fetch), key, hint, deadline, out);
                }
                FetchOp::Into { fetch, offer, into } => self.take_in(now, (shard, fetch), offer, into, out),
                FetchOp::Decline { fetch, offer, reason } => {
                    self.decline(now, (shard, fetch), offer, reason, out);
                }
                FetchOp::Leave { fetch } => self.leave(now, (shard, fetch), out),
            },
            ExchangeEvent::Peer { peer, event } => self.tell(now, peer, event, out),
            ExchangeEvent::Locate { id, principal, keys, hint, deadline } => {
                self.locate(now, id, (principal, &keys), hint, deadline, out);
            }
            ExchangeEvent::Offer { peer, offer, deadline } => {
                if usize::from(peer.0) < self.readers.len() {
                    self.tell(now, peer, ReaderEvent::Offer { offer, deadline }, out);
                } else {
                    out.push(ExchangeCommand::Offered { peer, offer: offer.id, taken: None });
                }
            }
            ExchangeEvent::Tick => {
                for peer in self.peers() {
                    self.tell(now, peer, ReaderEvent::Tick, out);
                }
            }
        }
    }

    /// Sends what was gathered over the events of a turn: questions, wants, what is done.
    pub fn flush(&mut self, now: Micros, out: &mut Vec<ExchangeCommand>) {
        self.ask_around(now, out);
        for peer in self.peers() {
            let mut commands = std::mem::take(&mut self.commands);
            self.readers[usize::from(peer.0)].flush(now, &mut commands);
            self.obey(now, peer, commands, out);
        }
    }

    /// When something must happen without an event.
    pub fn next_tick(&self) -> Option<Micros> {
        self.readers.iter().filter_map(Reader::next_tick).min()
    }

    /// Each peer, as its reader sees it.
    pub fn reports(&self) -> Vec<PeerReport> {
        self.readers.iter().map(Reader::report).collect()
    }

    /// The searches under way, oldest first.
    pub fn transfers(&self) -> Vec<TransferReport> {
        let mut all: Vec<_> = self
            .searches
            .iter()
            .map(|((shard, _), search)| TransferReport {
                shard: *shard,
                key: search.key,
                peer: search.stage.want().map(|(peer, _)| peer),
                stage: search.stage.name(),
                bytes: search.bytes,
                since: search.since,
                deadline: search.deadline,
            })
            .collect();
        all.sort_by_key(|report| (report.since, report.key));
        all
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.searches.is_empty() && self.wants.is_empty() && self.locations.is_empty()
    }

    fn peers(&self) -> impl Iterator<Item = PeerId> + use<> {
        (0..self.readers.len() as u16).map(PeerId)
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn find(
        &mut self,
        now: Micros,
        id: SearchId,
        key: BlockKey,
        hint: Option<PeerId>,
        deadline: Micros,
        out: &mut Vec<ExchangeCommand>,
    ) {
        let principal = self.config.principals.get(usize::from(id.0.0)).copied().unwrap_or(0);
        let search = Search {
            key,
            principal,
            since: now,
            deadline,
            stage: Stage::Searching,
            tried: Vec::new(),
            candidates: Vec::new(),
            probed: false,
            answers_left: 0,
            why: MissReason::NeverStored,
            bytes: 0,
        };
        self.searches.insert(id, search);
        match hint.filter(|hint| usize::from(hint.0) < self.readers.len()) {
            Some(peer) => self.want(now, id, peer, out),
            None => self.unasked.push(id),
        }
    }

    /// Asks one peer for the block.
    fn want(&mut self, now: Micros, id: SearchId, peer: PeerId, out: &mut Vec<ExchangeCommand>) {
        let want = WantId(self.number());
        let Some(search) = self.searches.get_mut(&id) else { return };
        search.stage = Stage::Asked(peer, want);
        search.tried.push(peer);
        let (principal, key, deadline) = (search.principal, search.key, search.deadline);
        self.wants.insert(want, id);
        self.tell(now, peer, ReaderEvent::Want { want, principal, key, deadline, wait: true }, out);
    }

    fn take_in(
        &mut self,
        now: Micros,
        id: SearchId,
        offer: OfferToken,
        into: Slot,
        out: &mut Vec<ExchangeCommand>,
    ) {
        let Some((peer, want)) = self.offered_by(id, offer) else { return };
        if let Some(search) = self.searches.get_mut(&id) {
            search.stage = Stage::Reading(peer, want);
        }
        self.tell(now, peer, ReaderEvent::Take { want, into }, out);
    }

    /// What a peer let us read is of no use: as if it did not have it.
    fn decline(
        &mut self,
        now: Micros,
        id: SearchId,
        offer: OfferToken,
        reason: MissReason,
        out: &mut Vec<ExchangeCommand>,
    ) {
        let Some((peer, want)) = self.offered_by(id, offer) else { return };
        self.tell(now, peer, ReaderEvent::Leave { want }, out);
        self.missed(now, want, reason, out);
    }

    /// Whose offer it is, if it still stands: the want may have ended while the shard looked for room. Then another
    /// offer or a miss is on its way.
    fn offered_by(&self, id: SearchId, offer: OfferToken) -> Option<(PeerId, WantId)> {
        match self.searches.get(&id)?.stage {
            Stage::Granted(peer, want) if want.0 == offer.0 => Some((peer, want)),
            _ => None,
        }
    }

    fn leave(&mut self, now: Micros, id: SearchId, out: &mut Vec<ExchangeCommand>) {
        let Some(search) = self.searches.remove(&id) else { return };
        if let Some((peer, want)) = search.stage.want() {
            self.wants.remove(&want);
            self.tell(now, peer, ReaderEvent::Leave { want }, out);
        }
    }

    fn tell(&mut self, now: Micros, peer: PeerId, event: ReaderEvent, out: &mut Vec<ExchangeCommand>) {
        let Some(reader) = self.readers.get_mut(usize::from(peer.0)) else { return };
        let mut commands = std::mem::take(&mut self.commands);
        reader.handle(now, event, &mut commands);
        self.obey(now, peer, commands, out);
    }

    /// Settles what a reader says, and hands on what is for devices.
    fn obey(
        &mut self,
        now: Micros,
        peer: PeerId,
        mut commands: Vec<ReaderCommand>,
        out: &mut Vec<ExchangeCommand>,
    ) {
        for command in commands.drain(..) {
            match command {
                ReaderCommand::Granted { want, record, ttl_s, .. } => {
                    let Some(id) = self.wants.get(&want).copied() else { continue };
                    let Some(search) = self.searches.get_mut(&id) else { continue };
                    search.stage = Stage::Granted(peer, want);
                    search.bytes = record.bytes;
                    let offer = OfferToken(want.0);
                    let done = FetchDone::Offered { fetch: id.1, offer, record, ttl_s };
                    out.push(ExchangeCommand::Shard { shard: id.0, done });
                }
                ReaderCommand::Missed { want, reason } => self.missed(now, want, reason, out),
                ReaderCommand::Landed { want, into, .. } => {
                    let Some(id) = self.wants.remove(&want) else { continue };
                    self.searches.remove(&id);
                    let done = FetchDone::Landed { fetch: id.1, into };
                    out.push(ExchangeCommand::Shard { shard: id.0, done });
                }
                ReaderCommand::Probed { probe, found } => self.probed(now, probe, found, out),
                ReaderCommand::Taken { offer, taken } => {
                    out.push(ExchangeCommand::Offered { peer, offer, taken });
                }
                command => out.push(ExchangeCommand::Peer { peer, command }),
            }
        }
        // Keep the larger of the two buffers; calls nest when one peer's answer sends us to the next.
        if commands.capacity() > self.commands.capacity() {
            self.commands = commands;
        }
    }

    /// A peer does not give a block: the next that has it is asked, or the peers are asked who does.
    fn missed(&mut self, now: Micros, want: WantId, reason: MissReason, out: &mut Vec<ExchangeCommand>) {
        let Some(id) = self.wants.remove(&want) else { return };
        let Some(search) = self.searches.get_mut(&id) else { return };
        search.why = more_telling(search.why, seen_from_here(reason, search.probed));
        search.stage = Stage::Searching;
        if search.deadline <= now {
            return self.give_up(id, MissReason::TierTimeout, out);
        }
        self.go_on(now, id, out);
    }

    fn go_on(&mut self, now: Micros, id: SearchId, out: &mut Vec<ExchangeCommand>) {
        let Some(search) = self.searches.get_mut(&id) else { return };
        // Who leaves is asked last, when all have answered: it has enough to do, and may be gone before all has come.
        let leaves = |peer: PeerId| self.readers.get(usize::from(peer.0)).is_some_and(Reader::is_leaving);
        let have =
            search.candidates.iter().enumerate().filter(|(_, (_, sight))| matches!(sight, Sight::In(_)));
        let best = have.min_by_key(|(_, (peer, _))| leaves(*peer)).map(|(at, (peer, _))| (at, *peer));
        if let Some((at, peer)) = best.filter(|(_, peer)| search.answers_left == 0 || !leaves(*peer)) {
            search.candidates.remove(at);
            return self.want(now, id, peer, out);
        }
        if !search.probed {
            return self.unasked.push(id);
        }
        if search.answers_left > 0 {
            return;
        }
        // Nobody has it: whoever expects it will.
        match search.candidates.pop() {
            Some((peer, _)) => self.want(now, id, peer, out),
            None => {
                let why = search.why;
                self.give_up(id, why, out);
            }
        }
    }

    fn give_up(&mut self, id: SearchId, reason: MissReason, out: &mut Vec<ExchangeCommand>) {
        self.searches.remove(&id);
        let done = FetchDone::Missed { fetch: id.1, reason };
        out.push(ExchangeCommand::Shard { shard: id.0, done });
    }

    /// Asks the peers who has what is looked for, all of it in as few messages as it takes.
    fn ask_around(&mut self, now: Micros, out: &mut Vec<ExchangeCommand>) {
        if self.unasked.is_empty() {
            return;
        }
        let (peers, all) = self.whom_to_ask(now);
        let mut by_principal: BTreeMap<u8, Vec<(SearchId, BlockKey)>> = BTreeMap::new();
        // As long as the one that has most time: another may end a little late for it.
        let mut deadline = now;
        for id in std::mem::take(&mut self.unasked) {
            let Some(search) = self.searches.get_mut(&id) else { continue };
            (search.probed, search.answers_left) = (true, peers.len());
            deadline = deadline.max(search.deadline);
            if !all {
                search.why = more_telling(search.why, MissReason::PeerDown);
            }
            by_principal.entry(search.principal).or_default().push((id, search.key));
            if peers.is_empty() {
                let why = search.why;
                self.give_up(id, why, out);
            }
        }
        let deadline = deadline.min(Micros(now.0.saturating_add(self.config.probe_limit)));
        for (principal, wanted) in by_principal {
            for chunk in wanted.chunks(ITEMS_MAX) {
                for peer in &peers {
                    let searches = chunk.iter().map(|(id, _)| *id).collect();
                    let keys = chunk.iter().map(|(_, key)| *key).collect();
                    let probe = self.number();
                    self.probes.insert(probe, (*peer, ProbeFor::Searches(searches)));
                    self.tell(now, *peer, ReaderEvent::Probe { probe, principal, keys, deadline }, out);
                }
            }
        }
    }

    /// As many peers as may be asked, others the next time; false when one of them is left out. One that owes an answer
    /// for much longer than a question may take is not asked another: it would cost everybody that time again. Not at
    /// once, for a network that loses a word brings the next one.
    fn whom_to_ask(&mut self, now: Micros) -> (Vec<PeerId>, bool) {
        let (all, most) = (self.readers.len(), self.config.probe_peers_max);
        let turn: Vec<_> = (0..all.min(most)).map(|at| PeerId(((self.first + at) % all) as u16)).collect();
        if all > most {
            self.first = (self.first + most) % all;
        }
        let limit = Duration::from_micros(self.config.probe_limit) * SILENT_QUESTIONS;
        let talks = |peer: &PeerId| self.readers[usize::from(peer.0)].silent_for(now) < limit;
        let peers: Vec<_> = turn.iter().copied().filter(talks).collect();
        let whole = peers.len() == turn.len();
        (peers, whole)
    }

    fn probed(&mut self, now: Micros, probe: u64, found: Option<Found>, out: &mut Vec<ExchangeCommand>) {
        let Some((peer, what_for)) = self.probes.remove(&probe) else { return };
        match what_for {
            ProbeFor::Searches(searches) => {
                for (at, id) in searches.into_iter().enumerate() {
                    let sight = found.as_ref().map(|found| found.sights[at]);
                    self.sighted(now, id, peer, sight, out);
                }
            }
            ProbeFor::Location { id, first } => {
                let Some(location) = self.locations.get_mut(&id) else { return };
                let sights = found.map_or_else(Vec::new, |found| found.sights);
                for (place, sight) in location.places[first..].iter_mut().zip(sights) {
                    if sight != Sight::Absent && place.is_none_or(|(_, known)| sight.is_nearer(known)) {
                        *place = Some((peer, sight));
                    }
                }
                location.answers_left -= 1;
                if location.answers_left == 0 {
                    self.located(id, out);
                }
            }
        }
    }

    /// A peer said whether it has a block; `None` when it did not.
    fn sighted(
        &mut self,
        now: Micros,
        id: SearchId,
        peer: PeerId,
        sight: Option<Sight>,
        out: &mut Vec<ExchangeCommand>,
    ) {
        let Some(search) = self.searches.get_mut(&id) else { return };
        search.answers_left = search.answers_left.saturating_sub(1);
        if sight.is_none() {
            // It may have it, and did not say.
            search.why = more_telling(search.why, MissReason::PeerDown);
        }
        if let Some(sight) = sight.filter(|sight| *sight != Sight::Absent && !search.tried.contains(&peer)) {
            search.candidates.push((peer, sight));
        }
        if search.stage == Stage::Searching {
            self.go_on(now, id, out);
        }
    }

    fn locate(
        &mut self,
        now: Micros,
        id: u64,
        (principal, keys): (u8, &[BlockKey]),
        hint: Option<PeerId>,
        deadline: Micros,
        out: &mut Vec<ExchangeCommand>,
    ) {
        let (mut peers, _) = self.whom_to_ask(now);
        let hint = hint.filter(|hint| usize::from(hint.0) < self.readers.len());
        peers.extend(hint.filter(|hint| !peers.contains(hint)));
        let answers_left = keys.chunks(ITEMS_MAX).len() * peers.len();
        self.locations.insert(id, Location { places: vec![None; keys.len()], answers_left });
        if answers_left == 0 {
            return self.located(id, out);
        }
        for (nth, chunk) in keys.chunks(ITEMS_MAX).enumerate() {
            for peer in &peers {
                let probe = self.number();
                let what_for = ProbeFor::Location { id, first: nth * ITEMS_MAX };
                self.probes.insert(probe, (*peer, what_for));
                let keys = chunk.to_vec();
                self.tell(now, *peer, ReaderEvent::Probe { probe, principal, keys, deadline }, out);
            }
        }
    }

    fn located(&mut self, id: u64, out: &mut Vec<ExchangeCommand>) {
        let Some(location) = self.locations.remove(&id) else { return };
        out.push(ExchangeCommand::Located { id, places: location.places });
    }
}

/// What a peer's reason means to us. Why it is gone from there is its own affair.
fn seen_from_here(reason: MissReason, sighted: bool) -> MissReason {
    match reason {
        MissReason::NeverStored
        | MissReason::EvictedCapacity
        | MissReason::EvictedQuota
        | MissReason::EvictedRequest
        | MissReason::EvictedReclaim
        | MissReason::Expired
        | MissReason::AdmissionRejected => {
            if sighted {
                MissReason::PeerEvicted
            } else {
                MissReason::NeverStored
            }
        }
        other => other,
    }
}

/// The reason that says more: something failed, rather than that somebody does not have it.
fn more_telling(known: MissReason, new: MissReason) -> MissReason {
    if new == MissReason::NeverStored { known } else { new }
}
