//! The event queue of a world: everything that can happen, one match over it, what nodes do by themselves, and what
//! must hold when nothing happens any more.

use std::collections::BTreeMap;
use std::time::Duration;

use kv_arena::Slot;
use kv_block::{Epoch, MissReason, Tier};
use kv_wire::message::{Answer, Ask, Credits, Found, Offer, PathEnd, ReadId, Sight, Taken, WantId};

use super::node::{KEYS, Ledger, Node, Open, ReaderSide, key};
use super::{Tally, Weather};
use crate::health::HealthLimits;
use crate::link::{Link, LinkError};
use crate::memory::MemoryLink;
use crate::owner::OwnerEvent;
use crate::random::Random;
use crate::reader::{PathId, ReaderConfig, ReaderEvent};
use crate::{Micros, Owner, Reader};

/// More than any world needs: one that goes on goes in circles.
pub(super) const EVENTS_MAX: u64 = 2_000_000;
/// How long a driver may let events gather before it flushes, and sees when the next tick is due.
pub(super) const BATCH_US_MAX: u64 = 500;
/// A pipe without news is not polled for ever; what a device never answers is never answered.
pub(super) const IDLE_POLLS_MAX: u32 = 40;
pub(super) const WINDOWED: PathId = PathId(1);
pub(super) const CREDITS: Credits = Credits { wants_max: 8, bytes_max: 5 * 8192 };

/// Something that happens at its time.
pub(super) enum Event {
    Work,
    Arrive { from: usize, to: usize, epoch: Epoch, attempt: u64 },
    Accepted { conn: u64 },
    Refused { from: usize, to: usize, attempt: u64 },
    ToOwner { conn: u64, ask: Ask },
    ToReader { conn: u64, answer: Answer },
    OwnerLost { conn: u64 },
    ReaderLost { conn: u64 },
    Reach { conn: u64 },
    PathUp { conn: u64, path: PathId, up: Result<(), String> },
    Poll { conn: u64, path: PathId },
    Sever { conn: u64, path: PathId },
    Exposed { conn: u64, path: PathId, want: WantId, error: LinkError },
    ReadBack { node: usize, peer: usize, read: ReadId, into: Slot, error: LinkError },
    Hold { conn: u64, want: WantId, key: u64 },
    Looked { conn: u64, id: u64, keys: Vec<u64> },
    Took { conn: u64, taken: Taken },
    Take { node: usize, peer: usize, want: WantId, bytes: u32 },
    TickReader { node: usize, peer: usize },
    FlushReader { node: usize, peer: usize },
    TickOwner { conn: u64 },
    FlushOwner { conn: u64 },
}

/// A connection, as both ends see it.
pub(super) struct Conn {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) attempt: u64,
    pub(super) owner: Option<Owner>,
    pub(super) owner_open: bool,
    pub(super) reader_open: bool,
    pub(super) mute_from: Option<Micros>,
    /// Nothing that is said from now on arrives.
    pub(super) cut: bool,
    /// When the last message of each direction arrives: they do not overtake each other.
    pub(super) last: [Micros; 2],
    pub(super) pipes: BTreeMap<PathId, Pipe>,
    pub(super) tick_at: Option<Micros>,
    pub(super) flushing: bool,
}

/// Both ends of a data path.
pub(super) struct Pipe {
    pub(super) owner: Option<MemoryLink>,
    pub(super) reader: Option<MemoryLink>,
    pub(super) polling: bool,
    pub(super) idle: u32,
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) weather: Weather,
    pub(super) loud: bool,
    pub(super) now: Micros,
    pub(super) next: u64,
    pub(super) queue: BTreeMap<(Micros, u64), Event>,
    pub(super) nodes: Vec<Node>,
    pub(super) conns: BTreeMap<u64, Conn>,
    pub(super) ledger: Ledger,
    /// On which connection a read is.
    pub(super) reads: BTreeMap<(usize, usize, ReadId), (u64, PathId)>,
    /// Directions that are blocked, and until when.
    pub(super) blocked: BTreeMap<(usize, usize), Micros>,
    pub(super) wants_left: u64,
    pub(super) tally: Tally,
}

pub(super) fn name(node: usize) -> String {
    format!("node-{node}")
}

pub(super) fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

impl World {
    pub(super) fn new(seed: u64, weather: Weather, loud: bool) -> Self {
        let mut world = Self {
            random: Random::new(seed),
            wants_left: weather.wants,
            weather,
            loud,
            now: Micros(1),
            next: 0,
            queue: BTreeMap::new(),
            nodes: Vec::new(),
            conns: BTreeMap::new(),
            ledger: Ledger::default(),
            reads: BTreeMap::new(),
            blocked: BTreeMap::new(),
            tally: Tally::default(),
        };
        for node in 0..world.weather.nodes {
            let born = world.born(node, Epoch(1));
            world.nodes.push(born);
        }
        world
    }

    /// A node that has just started, with some blocks.
    pub(super) fn born(&mut self, this: usize, epoch: Epoch) -> Node {
        let mut node = Node::new(epoch);
        (0..KEYS).filter(|_| self.random.per_mille(700)).for_each(|n| node.store(n));
        for peer in (0..self.weather.nodes).filter(|peer| *peer != this) {
            let reader = Reader::new(ReaderConfig {
                node: name(this),
                epoch,
                principals: vec!["p".into()],
                peer: name(peer),
                paths: vec![WINDOWED],
                block_bytes_max: 8192,
                wants_max: 64,
                reads_max: 32,
                connect_max: millis(60),
                ping_every: millis(20),
                silence_max: millis(80),
                cancel_max: millis(100),
                health: HealthLimits {
                    strikes_max: 3,
                    window: millis(200),
                    backoff_min: millis(10),
                    backoff_max: millis(60),
                },
                seed: self.random.bits(),
                ..ReaderConfig::default()
            });
            let side = ReaderSide { reader, attempt: None, conn: None, tick_at: None, flushing: false };
            node.readers.insert(peer, side);
        }
        node
    }

    pub(super) fn run(mut self) -> Tally {
        self.soon(Event::Work);
        self.drain();
        self.check_settled();
        // A reader whose circuit is open tries again by itself; then it is well, and another loss ends it.
        for _ in 0..10 {
            for conn in self.conns.keys().copied().collect::<Vec<_>>() {
                self.soon(Event::ReaderLost { conn });
                self.soon(Event::OwnerLost { conn });
            }
            self.drain();
        }
        assert!(self.conns.is_empty(), "connections that are gone are not forgotten");
        for (this, node) in self.nodes.iter_mut().enumerate() {
            node.sweep();
            let blocks = node.blocks.len();
            assert_eq!((node.used(), node.held()), (blocks, blocks), "node {this} has lost memory");
        }
        self.tally
    }

    pub(super) fn drain(&mut self) {
        let mut events = 0;
        while let Some(((at, _), event)) = self.queue.pop_first() {
            self.now = at;
            self.apply(event);
            self.ledger.check(self.now);
            events += 1;
            assert!(events < EVENTS_MAX, "the world goes in circles");
        }
    }

    /// Nothing happens any more, and connections stand.
    pub(super) fn check_settled(&mut self) {
        assert!(self.ledger.wants.is_empty() && self.ledger.probes.is_empty(), "something never ended");
        for (this, node) in self.nodes.iter().enumerate() {
            for (peer, side) in &node.readers {
                assert!(side.reader.is_idle(), "{this} -> {peer} is not idle: {:?}", side.reader);
            }
        }
        if self.weather.stuck_exposures > 0 {
            return;
        }
        for (id, conn) in &self.conns {
            if let Some(owner) = &conn.owner {
                let report = owner.report();
                let left = [report.holding, report.waiting, report.granted, report.fenced];
                assert_eq!((left, report.bytes), ([0; 4], 0), "connection {id} holds something");
            }
            for link in conn.pipes.values().filter_map(|pipe| pipe.owner.as_ref()) {
                assert_eq!(link.usage().bytes, 0, "connection {id} shows a block that nobody reads");
            }
        }
        for (this, node) in self.nodes.iter_mut().enumerate() {
            node.sweep();
            let blocks = node.blocks.len();
            assert_eq!((node.used(), node.held()), (blocks, blocks), "node {this} holds memory for nobody");
        }
    }

    pub(super) fn at(&mut self, at: Micros, event: Event) {
        self.next += 1;
        self.queue.insert((at, self.next), event);
    }

    pub(super) fn soon(&mut self, event: Event) {
        self.at(self.now, event);
    }

    /// After a while of at most so many microseconds.
    pub(super) fn within(&mut self, max_us: u64, event: Event) {
        let at = self.now.after(Duration::from_micros(self.random.below(max_us + 1)));
        self.at(at, event);
    }

    pub(super) fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(super) fn log(&self, what: impl FnOnce() -> String) {
        if self.loud {
            eprintln!("{:>9} {}", self.now.0, what());
        }
    }

    pub(super) fn apply(&mut self, event: Event) {
        match event {
            Event::Work => self.work(),
            Event::Arrive { from, to, epoch, attempt } => self.arrive(from, to, epoch, attempt),
            Event::Accepted { conn } => self.accepted(conn),
            Event::Refused { from, to, attempt } => {
                let side = self.side(from, to);
                if side.attempt == Some(attempt) && side.conn.is_none() {
                    side.attempt = None;
                    self.reader(from, to, ReaderEvent::Disconnected { why: "refused".into() });
                }
            }
            Event::ToOwner { conn, ask } => {
                if self.conns.get(&conn).is_some_and(|conn| conn.owner_open) {
                    self.owner(conn, OwnerEvent::Heard(ask));
                }
            }
            Event::ToReader { conn, answer } => {
                if let Some((from, to)) = self.current(conn) {
                    self.reader(from, to, ReaderEvent::Heard(answer));
                }
            }
            Event::OwnerLost { conn } => {
                let Some(there) = self.conns.get_mut(&conn) else { return };
                if std::mem::replace(&mut there.owner_open, false) {
                    self.owner(conn, OwnerEvent::Disconnected);
                    self.sever_all(conn, 0);
                }
                self.reap(conn);
            }
            Event::ReaderLost { conn } => {
                if let Some((from, to)) = self.current(conn) {
                    self.leave_conn(from, to);
                    // Data connections may outlive it for a moment.
                    self.sever_all(conn, 3000);
                    self.reader(from, to, ReaderEvent::Disconnected { why: "lost".into() });
                } else if let Some(there) = self.conns.get_mut(&conn) {
                    there.reader_open = false;
                    self.sever_all(conn, 0);
                }
                self.reap(conn);
            }
            Event::Reach { conn } => {
                if let Some((from, to)) = self.current(conn) {
                    let end = PathEnd { path: WINDOWED.0, words: vec![1] };
                    self.reader(from, to, ReaderEvent::Reach(end));
                }
            }
            Event::PathUp { conn, path, up } => {
                if let Some((from, to)) = self.current(conn) {
                    self.reader(from, to, ReaderEvent::Path { path, up });
                }
            }
            Event::Poll { conn, path } => self.poll(conn, path),
            Event::Sever { conn, path } => {
                let pipe = self.conns.get_mut(&conn).and_then(|conn| conn.pipes.get_mut(&path));
                if let Some(pipe) = pipe {
                    [&mut pipe.owner, &mut pipe.reader].into_iter().flatten().for_each(MemoryLink::sever);
                    self.stir(conn, path);
                }
            }
            Event::Exposed { conn, path, want, error } => {
                self.owner(conn, OwnerEvent::Exposed { path, want, result: Err(error) });
            }
            Event::ReadBack { node, peer, read, into, error } => {
                self.reader(node, peer, ReaderEvent::Read { read, into, result: Err(error) });
            }
            Event::Hold { conn, want, key } => self.answer_hold(conn, want, key),
            Event::Looked { conn, id, keys } => {
                let Some(to) = self.conns.get(&conn).map(|conn| conn.to) else { return };
                let sight = |n| {
                    let there = self.nodes[to].blocks.contains_key(n);
                    if there { Sight::In(Tier::Host) } else { Sight::Absent }
                };
                let sights = keys.iter().map(sight).collect();
                self.owner(conn, OwnerEvent::Looked(Found { id, sights }));
            }
            Event::Took { conn, taken } => self.owner(conn, OwnerEvent::Took(taken)),
            Event::Take { node, peer, want, bytes } => self.take(node, peer, want, bytes),
            Event::TickReader { node, peer } => {
                let now = self.now;
                let side = self.side(node, peer);
                if side.tick_at.is_some_and(|at| at <= now) {
                    side.tick_at = None;
                    self.reader(node, peer, ReaderEvent::Tick);
                }
            }
            Event::FlushReader { node, peer } => {
                let (now, mut out) = (self.now, Vec::new());
                let side = self.side(node, peer);
                side.flushing = false;
                side.reader.flush(now, &mut out);
                self.reader_commands(node, peer, out);
                self.arm_reader(node, peer);
            }
            Event::TickOwner { conn } => {
                let now = self.now;
                if let Some(there) = self.conns.get_mut(&conn)
                    && there.tick_at.is_some_and(|at| at <= now)
                {
                    there.tick_at = None;
                    self.owner(conn, OwnerEvent::Tick);
                }
            }
            Event::FlushOwner { conn } => self.flush_owner(conn),
        }
    }

    // What nodes do.

    pub(super) fn work(&mut self) {
        if self.wants_left == 0 {
            return;
        }
        let node = self.random.below(self.weather.nodes as u64) as usize;
        let peer =
            (node + 1 + self.random.below(self.weather.nodes as u64 - 1) as usize) % self.weather.nodes;
        match self.random.below(20) {
            0..14 => {
                let burst = (1 + self.random.below(8)).min(self.wants_left);
                self.wants_left -= burst;
                (0..burst).for_each(|_| self.want(node, peer));
            }
            14 => self.probe(node, peer),
            15 => self.offer(node, peer),
            16 => {
                let open = self.ledger.wants.iter().find(|(_, open)| open.node == node);
                if let Some((want, peer)) = open.map(|(want, open)| (*want, open.peer)) {
                    self.ledger.end_want(want);
                    self.log(|| format!("{node} leaves want {}", want.0));
                    self.reader(node, peer, ReaderEvent::Leave { want });
                    self.tally.count("left");
                }
            }
            17..19 => {
                let n = self.random.below(KEYS);
                if self.random.per_mille(500) { self.nodes[node].evict(n) } else { self.nodes[node].store(n) }
            }
            _ => {
                let conns = self.conns.iter().filter(|(_, conn)| conn.to == node).map(|(id, _)| *id);
                for conn in conns.collect::<Vec<_>>() {
                    let leaving = self.random.per_mille(500);
                    self.owner(conn, OwnerEvent::Leaving { leaving });
                }
            }
        }
        if self.random.per_mille(self.weather.splits) {
            let until = self.now.after(millis(1 + self.random.below(200)));
            self.log(|| format!("{node} -> {peer} is blocked until {}", until.0));
            self.blocked.insert((node, peer), until);
            if self.random.per_mille(500) {
                self.blocked.insert((peer, node), until);
            }
        }
        if self.random.per_mille(self.weather.crashes) {
            self.crash(node);
        }
        self.within(4000, Event::Work);
    }

    pub(super) fn want(&mut self, node: usize, peer: usize) {
        let (want, n) = (WantId(self.id()), self.random.below(KEYS));
        let hurried = self.random.per_mille(300);
        let us = 200 + self.random.below(if hurried { 3_000 } else { 150_000 });
        let deadline = self.now.after(Duration::from_micros(us));
        let limit = deadline.after(Duration::from_micros(us / 10 + BATCH_US_MAX));
        self.log(|| format!("{node} wants {n} of {peer} as {} by {}", want.0, deadline.0));
        self.ledger.want(want, Open { node, peer, key: n, limit });
        let wait = self.random.per_mille(700);
        self.reader(node, peer, ReaderEvent::Want { want, principal: 0, key: key(n), deadline, wait });
    }

    pub(super) fn probe(&mut self, node: usize, peer: usize) {
        let (probe, us) = (self.id(), 1000 + self.random.below(50_000));
        let deadline = self.now.after(Duration::from_micros(us));
        let limit = deadline.after(Duration::from_micros(us / 10 + BATCH_US_MAX));
        let keys = (0..1 + self.random.below(5)).map(key).collect::<Vec<_>>();
        self.ledger.probe(probe, Open { node, peer, key: keys.len() as u64, limit });
        self.reader(node, peer, ReaderEvent::Probe { probe, principal: 0, keys, deadline });
    }

    pub(super) fn offer(&mut self, node: usize, peer: usize) {
        let (id, us) = (self.id(), 1000 + self.random.below(50_000));
        let deadline = self.now.after(Duration::from_micros(us));
        let limit = deadline.after(Duration::from_micros(us / 10 + BATCH_US_MAX));
        let keys = (0..3).map(key).collect::<Vec<_>>();
        self.ledger.probe(id, Open { node, peer, key: 3, limit });
        let offer = Offer { id, principal: 0, binding: vec![], keys };
        self.reader(node, peer, ReaderEvent::Offer { offer, deadline });
    }

    pub(super) fn take(&mut self, node: usize, peer: usize, want: WantId, bytes: u32) {
        let bytes = if self.random.per_mille(20) { 100 } else { bytes };
        match self.nodes[node].memory.slab().take(bytes) {
            Ok(into) if self.random.per_mille(950) => {
                self.reader(node, peer, ReaderEvent::Take { want, into });
            }
            _ => {
                if self.ledger.end_want(want).is_some() {
                    self.reader(node, peer, ReaderEvent::Leave { want });
                    self.tally.count("left");
                }
            }
        }
    }

    pub(super) fn answer_hold(&mut self, conn: u64, want: WantId, n: u64) {
        let Some(to) = self.conns.get(&conn).map(|conn| conn.to) else { return };
        let held = self.nodes[to].blocks.get(&n).cloned();
        let event = match held {
            Some(block) => OwnerEvent::Held { want, block, tier: Tier::Host },
            None => OwnerEvent::NotHeld { want, reason: MissReason::NeverStored },
        };
        self.owner(conn, event);
    }

    /// A node dies, with all that it has, and is there again at once.
    pub(super) fn crash(&mut self, node: usize) {
        self.log(|| format!("{node} dies"));
        self.tally.count("crashed");
        self.ledger.forget(node);
        self.reads.retain(|(reader, ..), _| *reader != node);
        self.queue.retain(|_, event| !matches!(event, Event::ReadBack { node: of, .. } if *of == node));
        for id in self.conns.keys().copied().collect::<Vec<_>>() {
            let Some(conn) = self.conns.get_mut(&id) else { continue };
            if conn.from == node {
                conn.reader_open = false;
                conn.pipes.values_mut().for_each(|pipe| pipe.reader = None);
                self.within(5000, Event::OwnerLost { conn: id });
            } else if conn.to == node {
                conn.owner = None;
                conn.owner_open = false;
                conn.pipes.values_mut().for_each(|pipe| pipe.owner = None);
                self.within(5000, Event::ReaderLost { conn: id });
            }
            self.stir(id, PathId::TCP);
            self.stir(id, WINDOWED);
        }
        let epoch = Epoch(self.nodes[node].epoch.0 + 1);
        let born = self.born(node, epoch);
        let mut dead = std::mem::replace(&mut self.nodes[node], born);
        dead.readers.clear();
        dead.sweep();
        assert_eq!(
            (dead.used(), dead.held()),
            (dead.blocks.len(), dead.blocks.len()),
            "{node} died holding memory"
        );
    }
}
