//! The event queue of a world. It drives readers and owners as a daemon does: one event, its commands, and a flush
//! after a little while; ticks when they are due; links polled whenever.

use std::collections::BTreeMap;
use std::time::Duration;

use kv_arena::Slot;
use kv_block::{Epoch, MissReason, Tier};
use kv_wire::message::{Answer, Ask, Credits, Found, Offer, PathEnd, ReadId, Sight, Taken, WantId};

use super::node::{KEYS, Ledger, Node, Open, ReaderSide, bytes_of, key, number};
use super::{Tally, Weather, lies};
use crate::health::HealthLimits;
use crate::link::{Link, LinkDone, LinkError, LinkOp};
use crate::memory::{LinkFault, MemoryConfig, MemoryLink};
use crate::owner::{OwnerCommand, OwnerConfig, OwnerEvent, OwnerPath, OwnerState};
use crate::random::Random;
use crate::reader::{PathId, PeerState, ReaderCommand, ReaderConfig, ReaderEvent};
use crate::{Micros, Owner, Reader};

/// More than any world needs: one that goes on goes in circles.
const EVENTS_MAX: u64 = 2_000_000;
/// How long a driver may let events gather before it flushes, and sees when the next tick is due.
const BATCH_US_MAX: u64 = 500;
/// A pipe without news is not polled for ever; what a device never answers is never answered.
const IDLE_POLLS_MAX: u32 = 40;
const WINDOWED: PathId = PathId(1);
const CREDITS: Credits = Credits { wants_max: 8, bytes_max: 5 * 8192 };

/// Something that happens at its time.
enum Event {
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
struct Conn {
    from: usize,
    to: usize,
    attempt: u64,
    owner: Option<Owner>,
    owner_open: bool,
    reader_open: bool,
    mute_from: Option<Micros>,
    /// Nothing that is said from now on arrives.
    cut: bool,
    /// When the last message of each direction arrives: they do not overtake each other.
    last: [Micros; 2],
    pipes: BTreeMap<PathId, Pipe>,
    tick_at: Option<Micros>,
    flushing: bool,
}

/// Both ends of a data path.
struct Pipe {
    owner: Option<MemoryLink>,
    reader: Option<MemoryLink>,
    polling: bool,
    idle: u32,
}

pub(super) struct World {
    random: Random,
    weather: Weather,
    loud: bool,
    now: Micros,
    next: u64,
    queue: BTreeMap<(Micros, u64), Event>,
    nodes: Vec<Node>,
    conns: BTreeMap<u64, Conn>,
    ledger: Ledger,
    /// On which connection a read is.
    reads: BTreeMap<(usize, usize, ReadId), (u64, PathId)>,
    /// Directions that are blocked, and until when.
    blocked: BTreeMap<(usize, usize), Micros>,
    wants_left: u64,
    tally: Tally,
}

fn name(node: usize) -> String {
    format!("node-{node}")
}

fn millis(millis: u64) -> Duration {
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
    fn born(&mut self, this: usize, epoch: Epoch) -> Node {
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
        for conn in self.conns.keys().copied().collect::<Vec<_>>() {
            self.soon(Event::ReaderLost { conn });
            self.soon(Event::OwnerLost { conn });
        }
        self.drain();
        assert!(self.conns.is_empty(), "connections that are gone are not forgotten");
        for (this, node) in self.nodes.iter_mut().enumerate() {
            node.sweep();
            let blocks = node.blocks.len();
            assert_eq!((node.used(), node.held()), (blocks, blocks), "node {this} has lost memory");
        }
        self.tally
    }

    fn drain(&mut self) {
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
    fn check_settled(&mut self) {
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

    fn at(&mut self, at: Micros, event: Event) {
        self.next += 1;
        self.queue.insert((at, self.next), event);
    }

    fn soon(&mut self, event: Event) {
        self.at(self.now, event);
    }

    /// After a while of at most so many microseconds.
    fn within(&mut self, max_us: u64, event: Event) {
        let at = self.now.after(Duration::from_micros(self.random.below(max_us + 1)));
        self.at(at, event);
    }

    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn log(&self, what: impl FnOnce() -> String) {
        if self.loud {
            eprintln!("{:>9} {}", self.now.0, what());
        }
    }

    fn apply(&mut self, event: Event) {
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

    fn work(&mut self) {
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

    fn want(&mut self, node: usize, peer: usize) {
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

    fn probe(&mut self, node: usize, peer: usize) {
        let (probe, us) = (self.id(), 1000 + self.random.below(50_000));
        let deadline = self.now.after(Duration::from_micros(us));
        let limit = deadline.after(Duration::from_micros(us / 10 + BATCH_US_MAX));
        let keys = (0..1 + self.random.below(5)).map(key).collect::<Vec<_>>();
        self.ledger.probe(probe, Open { node, peer, key: keys.len() as u64, limit });
        self.reader(node, peer, ReaderEvent::Probe { probe, principal: 0, keys, deadline });
    }

    fn offer(&mut self, node: usize, peer: usize) {
        let (id, us) = (self.id(), 1000 + self.random.below(50_000));
        let deadline = self.now.after(Duration::from_micros(us));
        let limit = deadline.after(Duration::from_micros(us / 10 + BATCH_US_MAX));
        let keys = (0..3).map(key).collect::<Vec<_>>();
        self.ledger.probe(id, Open { node, peer, key: 3, limit });
        let offer = Offer { id, principal: 0, binding: vec![], keys };
        self.reader(node, peer, ReaderEvent::Offer { offer, deadline });
    }

    fn take(&mut self, node: usize, peer: usize, want: WantId, bytes: u32) {
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

    fn answer_hold(&mut self, conn: u64, want: WantId, n: u64) {
        let Some(to) = self.conns.get(&conn).map(|conn| conn.to) else { return };
        let held = self.nodes[to].blocks.get(&n).cloned();
        let event = match held {
            Some(block) => OwnerEvent::Held { want, block, tier: Tier::Host },
            None => OwnerEvent::NotHeld { want, reason: MissReason::NeverStored },
        };
        self.owner(conn, event);
    }

    /// A node dies, with all that it has, and is there again at once.
    fn crash(&mut self, node: usize) {
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

    // The network.

    fn side(&mut self, node: usize, peer: usize) -> &mut ReaderSide {
        self.nodes[node].readers.get_mut(&peer).expect("a reader for each peer")
    }

    /// Reader and owner of a connection that the reader still has.
    fn current(&mut self, conn: u64) -> Option<(usize, usize)> {
        let there = self.conns.get(&conn).filter(|there| there.reader_open)?;
        let (from, to) = (there.from, there.to);
        (self.side(from, to).conn == Some(conn)).then_some((from, to))
    }

    /// When a message of this direction arrives that is sent now.
    fn arrival(&mut self, from: usize, to: usize) -> Micros {
        let slow = self.random.per_mille(50);
        let delay = 20 + self.random.below(if slow { 20_000 } else { 800 });
        let free = self.blocked.get(&(from, to)).copied().unwrap_or_default();
        self.now.max(free).after(Duration::from_micros(delay))
    }

    fn dial(&mut self, from: usize, to: usize) {
        let (attempt, epoch) = (self.id(), self.nodes[from].epoch);
        self.side(from, to).attempt = Some(attempt);
        let odd = self.random.per_mille(self.weather.attempts);
        let times = if odd { self.random.below(3) } else { 1 };
        for _ in 0..times {
            let at = self.arrival(from, to);
            self.at(at, Event::Arrive { from, to, epoch, attempt });
        }
        if odd && times == 0 && self.random.per_mille(500) {
            self.within(5000, Event::Refused { from, to, attempt });
        }
    }

    fn arrive(&mut self, from: usize, to: usize, epoch: Epoch, attempt: u64) {
        if self.nodes[from].epoch != epoch {
            return;
        }
        let id = self.id();
        let paths = if self.weather.windows { vec![OwnerPath { path: WINDOWED, rank: 0 }] } else { vec![] };
        let owner = Owner::new(OwnerConfig {
            node: name(to),
            epoch: self.nodes[to].epoch,
            readers: vec![name(from)],
            session: u128::from(id),
            credits: CREDITS,
            paths,
            hello_max: millis(60),
            wait_max: millis(80),
            lease_max: millis(60),
            silence_max: millis(150),
            ..OwnerConfig::default()
        });
        let mute = self.random.per_mille(self.weather.mutes);
        let mute_from = mute.then(|| self.now.after(millis(self.random.below(60))));
        self.log(|| format!("{from} -> {to} is connection {id}, silent from {mute_from:?}"));
        let conn = Conn {
            from,
            to,
            attempt,
            owner: Some(owner),
            owner_open: true,
            reader_open: true,
            mute_from,
            cut: false,
            last: [self.now; 2],
            pipes: BTreeMap::new(),
            tick_at: None,
            flushing: false,
        };
        self.conns.insert(id, conn);
        self.pipe(id, PathId::TCP, None);
        self.owner(id, OwnerEvent::Tick);
        let at = self.arrival(to, from);
        self.at(at, Event::Accepted { conn: id });
    }

    fn accepted(&mut self, conn: u64) {
        let Some(there) = self.conns.get_mut(&conn).filter(|there| there.reader_open) else { return };
        let (from, to, attempt) = (there.from, there.to, there.attempt);
        let side = self.side(from, to);
        if side.attempt == Some(attempt) && side.conn.is_none() {
            side.conn = Some(conn);
            return self.reader(from, to, ReaderEvent::Connected);
        }
        // Nobody asked for this one. Whoever holds its other end finds out, or waits for a Hello.
        if let Some(there) = self.conns.get_mut(&conn) {
            there.reader_open = false;
        }
        self.sever_all(conn, 0);
        if self.random.per_mille(500) {
            self.within(1000, Event::OwnerLost { conn });
        }
    }

    fn pipe(&mut self, conn: u64, path: PathId, windows_of: Option<u8>) {
        let (owner, reader) = MemoryLink::pair(MemoryConfig { in_flight_max: 16, windows_of });
        let pipe = Pipe { owner: Some(owner), reader: Some(reader), polling: false, idle: 0 };
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.pipes.insert(path, pipe);
        }
    }

    fn send_to_owner(&mut self, conn: u64, ask: Ask) {
        let asks = if self.random.per_mille(self.weather.reader_lies) {
            self.tally.count("reader lied");
            lies::ask(&mut self.random, ask)
        } else {
            vec![ask]
        };
        if self.cut(conn) {
            return;
        }
        for ask in asks {
            let Some((from, to)) = self.conns.get(&conn).map(|conn| (conn.from, conn.to)) else { return };
            let at = self.arrival(from, to);
            let Some(there) = self.conns.get_mut(&conn) else { return };
            there.last[0] = there.last[0].max(at);
            let at = there.last[0];
            self.at(at, Event::ToOwner { conn, ask });
        }
    }

    fn send_to_reader(&mut self, conn: u64, answer: Answer) {
        let Some(there) = self.conns.get(&conn) else { return };
        if there.mute_from.is_some_and(|from| from <= self.now) {
            return;
        }
        let answers = if self.random.per_mille(self.weather.owner_lies) {
            self.tally.count("owner lied");
            lies::answer(&mut self.random, answer)
        } else {
            vec![answer]
        };
        if self.cut(conn) {
            return;
        }
        for answer in answers {
            let Some((from, to)) = self.conns.get(&conn).map(|conn| (conn.from, conn.to)) else { return };
            let at = self.arrival(to, from);
            let Some(there) = self.conns.get_mut(&conn) else { return };
            there.last[1] = there.last[1].max(at);
            let at = there.last[1];
            self.at(at, Event::ToReader { conn, answer });
        }
    }

    /// Perhaps the connection is lost instead. The two ends find out at their own times.
    fn cut(&mut self, conn: u64) -> bool {
        let now = self.random.per_mille(self.weather.cuts);
        let Some(there) = self.conns.get_mut(&conn) else { return true };
        if now && !std::mem::replace(&mut there.cut, true) {
            self.log(|| format!("connection {conn} is cut"));
            self.tally.count("cut");
            self.within(30_000, Event::OwnerLost { conn });
            self.within(30_000, Event::ReaderLost { conn });
        }
        self.conns.get(&conn).is_none_or(|there| there.cut)
    }

    fn sever_all(&mut self, conn: u64, within_us: u64) {
        for path in [PathId::TCP, WINDOWED] {
            self.within(within_us, Event::Sever { conn, path });
        }
    }

    /// The reader's side has no connection any more.
    fn leave_conn(&mut self, node: usize, peer: usize) -> Option<u64> {
        let side = self.side(node, peer);
        side.attempt = None;
        let conn = side.conn.take()?;
        self.conns.get_mut(&conn)?.reader_open = false;
        Some(conn)
    }

    /// Forgets a connection that neither side has, when its devices have let go of everything.
    fn reap(&mut self, conn: u64) {
        let Some(there) = self.conns.get_mut(&conn) else { return };
        if there.owner.as_ref().is_some_and(Owner::is_over) {
            for link in there.pipes.values().filter_map(|pipe| pipe.owner.as_ref()) {
                let usage = link.usage();
                assert_eq!(
                    (usage.bytes, usage.in_flight),
                    (0, 0),
                    "connection {conn} is over and shows a block"
                );
            }
            there.owner = None;
            there.pipes.values_mut().for_each(|pipe| pipe.owner = None);
            self.stir(conn, PathId::TCP);
            self.stir(conn, WINDOWED);
        }
        let Some(there) = self.conns.get(&conn) else { return };
        let drained = there.pipes.values().all(|pipe| pipe.reader.is_none());
        if there.owner.is_none() && !there.reader_open && drained {
            self.conns.remove(&conn);
        }
    }

    // Devices.

    /// What may go wrong with the next operation of a link.
    fn fault(&mut self, reading: bool) -> Option<LinkFault> {
        let stuck = if reading { self.weather.stuck } else { self.weather.stuck_exposures };
        if self.random.per_mille(stuck) {
            self.tally.count("stuck");
            return Some(LinkFault::Never);
        }
        if reading && self.random.per_mille(self.weather.damage) {
            self.tally.count("damaged");
            return Some(LinkFault::Corrupt);
        }
        let fault = self.random.per_mille(self.weather.faults);
        fault.then(|| match self.random.below(8) {
            0..3 => LinkFault::Fail(LinkError::Path { what: "failed on purpose".into() }),
            3 => LinkFault::Fail(LinkError::Unsupported { what: "not today".into() }),
            4..7 => LinkFault::Delay { polls: self.random.below(20) as u32 },
            _ => LinkFault::Break,
        })
    }

    /// There is something to poll for.
    fn stir(&mut self, conn: u64, path: PathId) {
        let pipe = self.conns.get_mut(&conn).and_then(|conn| conn.pipes.get_mut(&path));
        if let Some(pipe) = pipe {
            pipe.idle = 0;
            if !std::mem::replace(&mut pipe.polling, true) {
                self.within(600, Event::Poll { conn, path });
            }
        }
    }

    fn poll(&mut self, conn: u64, path: PathId) {
        let Some(there) = self.conns.get_mut(&conn) else { return };
        let (from, to) = (there.from, there.to);
        let Some(pipe) = there.pipes.get_mut(&path) else { return };
        pipe.polling = false;
        let (mut of_owner, mut of_reader) = (Vec::new(), Vec::new());
        if let Some(link) = &mut pipe.owner {
            link.poll(&mut of_owner);
        }
        if let Some(link) = &mut pipe.reader {
            link.poll(&mut of_reader);
        }
        pipe.idle = if of_owner.is_empty() && of_reader.is_empty() { pipe.idle + 1 } else { 0 };
        let busy = |link: &MemoryLink| link.usage().in_flight > 0;
        let more = [&pipe.owner, &pipe.reader].into_iter().flatten().any(busy) || pipe.idle == 0;
        // The data path is blocked where the control connection is, in either direction.
        let free = [(from, to), (to, from)].map(|way| self.blocked.get(&way).copied().unwrap_or_default());
        let wait = free.into_iter().max().unwrap_or_default().max(self.now);
        if more && pipe.idle < IDLE_POLLS_MAX {
            pipe.polling = true;
            let at = wait.after(Duration::from_micros(1 + self.random.below(600)));
            self.at(at, Event::Poll { conn, path });
        }
        for done in of_owner {
            self.owner_done(conn, path, done);
        }
        for done in of_reader {
            self.reader_done(conn, path, done);
        }
        self.reap(conn);
    }

    fn owner_done(&mut self, conn: u64, path: PathId, done: LinkDone) {
        let event = match done {
            LinkDone::Exposed { want, result } => OwnerEvent::Exposed { path, want, result },
            LinkDone::Concealed { want, block } => OwnerEvent::Concealed { path, want, block },
            LinkDone::Broken { why } => {
                if let Some(there) = self.conns.get_mut(&conn)
                    && let Some(pipe) = there.pipes.get_mut(&path)
                {
                    pipe.owner = None;
                }
                // Without the path that every pair of nodes has, a connection is worth nothing: a daemon begins anew.
                if path == PathId::TCP && self.random.per_mille(800) {
                    self.within(2000, Event::OwnerLost { conn });
                    self.within(2000, Event::ReaderLost { conn });
                }
                OwnerEvent::Path { path, up: Err(why.to_string()) }
            }
            LinkDone::Read { .. } => panic!("an owner reads nothing"),
        };
        self.owner(conn, event);
    }

    fn reader_done(&mut self, conn: u64, path: PathId, done: LinkDone) {
        let Some(there) = self.conns.get_mut(&conn) else { return };
        let (from, to) = (there.from, there.to);
        match done {
            LinkDone::Read { read, into, result } => {
                self.reads.remove(&(from, to, read));
                self.reader(from, to, ReaderEvent::Read { read, into, result });
            }
            LinkDone::Broken { why } => {
                if let Some(pipe) = there.pipes.get_mut(&path) {
                    pipe.reader = None;
                }
                if self.current(conn).is_some() {
                    self.reader(from, to, ReaderEvent::Path { path, up: Err(why.to_string()) });
                }
            }
            LinkDone::Exposed { .. } | LinkDone::Concealed { .. } => panic!("a reader shows nothing"),
        }
    }

    // Readers.

    fn reader(&mut self, node: usize, peer: usize, event: ReaderEvent) {
        let (now, mut out) = (self.now, Vec::new());
        self.log(|| format!("{node} -> {peer} {}", short(&event)));
        let side = self.side(node, peer);
        side.reader.handle(now, event, &mut out);
        if !std::mem::replace(&mut side.flushing, true) {
            let delay = self.batch_us();
            self.within(delay, Event::FlushReader { node, peer });
        }
        self.reader_commands(node, peer, out);
        let report = self.side(node, peer).reader.report();
        let open = report.waiting + report.asked + report.granted;
        assert!(
            open == 0 || report.state != PeerState::Idle,
            "wants wait for a connection that nobody opens"
        );
    }

    /// Sees to the next tick.
    fn arm_reader(&mut self, node: usize, peer: usize) {
        let (now, side) = (self.now, self.side(node, peer));
        if let Some(at) = side.reader.next_tick()
            && side.tick_at.is_none_or(|known| at < known)
        {
            side.tick_at = Some(at);
            self.at(at.max(now), Event::TickReader { node, peer });
        }
    }

    /// How long events gather before a flush.
    fn batch_us(&mut self) -> u64 {
        match self.random.below(10) {
            0..5 => 0,
            5..9 => 15,
            _ => BATCH_US_MAX,
        }
    }

    fn reader_commands(&mut self, node: usize, peer: usize, out: Vec<ReaderCommand>) {
        for command in out {
            self.log(|| format!("{node} -> {peer}     {}", short(&command)));
            self.reader_command(node, peer, command);
        }
    }

    fn reader_command(&mut self, node: usize, peer: usize, command: ReaderCommand) {
        match command {
            ReaderCommand::Connect => self.dial(node, peer),
            ReaderCommand::Hangup { why } => {
                let report = self.side(node, peer).reader.report();
                let strike = report.last_error.map_or("", |(strike, _)| strike);
                self.tally.count(strike);
                let fair = ["unreachable", "silent", "stuck"].contains(&strike);
                assert!(fair || !self.weather.is_honest(), "an honest peer is accused: {strike}, {why}");
                if let Some(conn) = self.leave_conn(node, peer) {
                    self.sever_all(conn, 0);
                    self.within(5000, Event::OwnerLost { conn });
                }
            }
            ReaderCommand::Say(ask) => {
                let conn = self.side(node, peer).conn.expect("a reader speaks on its connection");
                self.send_to_owner(conn, ask);
            }
            ReaderCommand::Open { session, .. } => {
                let conn = self.side(node, peer).conn.expect("a reader was welcomed on its connection");
                assert_eq!(session, u128::from(conn));
                let fails = self.random.per_mille(self.weather.faults / 4);
                let up = if fails { Err("not joined".into()) } else { Ok(()) };
                self.within(3000, Event::PathUp { conn, path: PathId::TCP, up });
                if self.weather.windows {
                    self.within(3000, Event::Reach { conn });
                }
            }
            ReaderCommand::Join(end) => {
                let conn = self.side(node, peer).conn.expect("an owner was heard on its connection");
                let up = if end.words.is_empty() { Err("it has none".into()) } else { Ok(()) };
                self.within(3000, Event::PathUp { conn, path: PathId(end.path), up });
            }
            ReaderCommand::Read { path, read, want, window, record, into } => {
                assert!(into.len() >= record.bytes as usize);
                let conn = self.side(node, peer).conn.expect("a reader reads on its connection");
                let fault = self.fault(true);
                let pipe = self.conns.get_mut(&conn).and_then(|conn| conn.pipes.get_mut(&path));
                let op = LinkOp::Read { read, want, window, record, into };
                let back = match pipe.and_then(|pipe| pipe.reader.as_mut()) {
                    Some(link) => {
                        fault.into_iter().for_each(|fault| link.inject_next(fault));
                        link.submit(op).err()
                    }
                    None => Some(op),
                };
                match back {
                    Some(LinkOp::Read { into, .. }) => {
                        let error = LinkError::Path { what: "busy or broken".into() };
                        self.soon(Event::ReadBack { node, peer, read, into, error });
                    }
                    _ => drop(self.reads.insert((node, peer, read), (conn, path))),
                }
                self.stir(conn, path);
            }
            ReaderCommand::Cancel { path, read } => {
                let Some((conn, on)) = self.reads.get(&(node, peer, read)).copied() else { return };
                assert_eq!(path, on, "a read is cancelled on another path");
                let pipe = self.conns.get_mut(&conn).and_then(|conn| conn.pipes.get_mut(&path));
                if let Some(link) = pipe.and_then(|pipe| pipe.reader.as_mut()) {
                    assert!(link.submit(LinkOp::Cancel { read }).is_ok());
                }
                self.stir(conn, path);
            }
            ReaderCommand::Granted { want, record, .. } => {
                let open = self.ledger.wants.get(&want);
                let n = open.expect("a want is granted that is open").key;
                assert_eq!(record.key, key(n));
                self.tally.count("granted");
                let us = if self.random.per_mille(50) { 150_000 } else { 2000 };
                if self.random.per_mille(970) {
                    self.within(us, Event::Take { node, peer, want, bytes: record.bytes });
                }
            }
            ReaderCommand::Missed { want, reason } => {
                let open = self.ledger.end_want(want);
                assert!(open.is_some(), "want {} ended twice, or after it was left: {reason}", want.0);
                self.tally.count(reason.name());
            }
            ReaderCommand::Landed { want, into, record, path } => {
                let open = self.ledger.end_want(want).expect("a want ended twice, or after it was left");
                assert_eq!((record.key, record.bytes), (key(open.key), bytes_of(open.key)));
                let wrong = kv_block::payload::first_wrong_byte(&record.key, &into[..record.bytes as usize]);
                assert_eq!(wrong, None, "want {} landed with wrong bytes", want.0);
                self.tally.count(if path == PathId::TCP { "landed by tcp" } else { "landed by window" });
            }
            ReaderCommand::Probed { probe, found } => {
                let open = self.ledger.end_probe(probe).expect("a probe ended twice");
                if let Some(found) = &found {
                    assert_eq!((found.id, found.sights.len() as u64), (probe, open.key));
                }
                self.tally.count(if found.is_some() { "found" } else { "not found" });
            }
            ReaderCommand::Taken { offer, taken } => {
                self.ledger.end_probe(offer).expect("an offer ended twice");
                self.tally.count(if taken.is_some() { "taken" } else { "not taken" });
            }
        }
    }

    // Owners.

    fn owner(&mut self, conn: u64, event: OwnerEvent) {
        let (now, mut out) = (self.now, Vec::new());
        let loud = self.loud;
        let Some(there) = self.conns.get_mut(&conn) else { return };
        let Some(owner) = &mut there.owner else { return };
        if loud {
            eprintln!("{:>9} connection {conn} {}", now.0, short(&event));
        }
        owner.handle(now, event, &mut out);
        let report = owner.report();
        assert!(report.bytes <= CREDITS.bytes_max, "more bytes shown than there is credit for");
        let open = report.holding + report.waiting + report.granted;
        assert!(open <= CREDITS.wants_max as usize, "more leases than there is credit for");
        assert!(open == 0 || report.state == OwnerState::Serving, "leases outlive their connection");
        if !std::mem::replace(&mut there.flushing, true) {
            let delay = self.batch_us();
            self.within(delay, Event::FlushOwner { conn });
        }
        self.owner_commands(conn, out);
        for pipe in self.conns.get(&conn).into_iter().flat_map(|there| there.pipes.values()) {
            let shown = pipe.owner.as_ref().map_or(0, |link| link.usage().bytes);
            assert!(
                shown <= CREDITS.bytes_max,
                "more bytes in the hands of a device than there is credit for"
            );
        }
        self.reap(conn);
    }

    fn flush_owner(&mut self, conn: u64) {
        let (now, mut out) = (self.now, Vec::new());
        let Some(there) = self.conns.get_mut(&conn) else { return };
        there.flushing = false;
        let Some(owner) = &mut there.owner else { return };
        owner.flush(now, &mut out);
        self.owner_commands(conn, out);
        self.arm_owner(conn);
    }

    /// As for a reader.
    fn arm_owner(&mut self, conn: u64) {
        let now = self.now;
        let Some(there) = self.conns.get_mut(&conn) else { return };
        if let Some(at) = there.owner.as_ref().and_then(Owner::next_tick)
            && there.tick_at.is_none_or(|known| at < known)
        {
            there.tick_at = Some(at);
            self.at(at.max(now), Event::TickOwner { conn });
        }
    }

    fn owner_commands(&mut self, conn: u64, out: Vec<OwnerCommand>) {
        for command in out {
            self.log(|| format!("connection {conn}     {}", short(&command)));
            self.owner_command(conn, command);
        }
    }

    fn owner_command(&mut self, conn: u64, command: OwnerCommand) {
        match command {
            OwnerCommand::Say(answer) => self.send_to_reader(conn, answer),
            OwnerCommand::Hangup { why } => {
                let fair = ["no Hello in time", "it said nothing"].iter().any(|fair| why.starts_with(fair));
                assert!(fair || !self.weather.is_honest(), "an honest reader is accused: {why}");
                self.tally.count("owner hung up");
                if let Some(there) = self.conns.get_mut(&conn) {
                    there.owner_open = false;
                }
                self.sever_all(conn, 0);
                self.within(5000, Event::ReaderLost { conn });
            }
            OwnerCommand::Hold { want, key, until, .. } => {
                let late = until.is_some() && self.random.per_mille(200);
                let never = self.random.per_mille(10);
                if !never {
                    self.within(
                        if late { 100_000 } else { 500 },
                        Event::Hold { conn, want, key: number(&key) },
                    );
                }
            }
            OwnerCommand::Unhold { .. } => {}
            OwnerCommand::Look { id, keys, .. } => {
                let keys = keys.iter().map(number).collect();
                self.within(2000, Event::Looked { conn, id, keys });
            }
            OwnerCommand::Offered { offer, .. } => {
                let taken = Taken { id: offer.id, taken: 1, left: offer.keys.len() as u32 - 1 };
                self.within(60_000, Event::Took { conn, taken });
            }
            OwnerCommand::Expose { path, want, block } => {
                let fault = self.fault(false);
                let pipe = self.conns.get_mut(&conn).and_then(|conn| conn.pipes.get_mut(&path));
                let taken = pipe.and_then(|pipe| pipe.owner.as_mut()).is_some_and(|link| {
                    fault.into_iter().for_each(|fault| link.inject_next(fault));
                    link.submit(LinkOp::Expose { want, block }).is_ok()
                });
                if !taken {
                    let error = LinkError::Path { what: "busy or broken".into() };
                    self.soon(Event::Exposed { conn, path, want, error });
                }
                self.stir(conn, path);
            }
            OwnerCommand::Conceal { path, want } => {
                let pipe = self.conns.get_mut(&conn).and_then(|conn| conn.pipes.get_mut(&path));
                if let Some(link) = pipe.and_then(|pipe| pipe.owner.as_mut()) {
                    assert!(link.submit(LinkOp::Conceal { want }).is_ok());
                }
                self.stir(conn, path);
            }
            OwnerCommand::Open { mut end } => {
                let path = PathId(end.path);
                if self.random.per_mille(150) {
                    end.words.clear();
                } else {
                    self.pipe(conn, path, Some(end.path));
                    self.owner(conn, OwnerEvent::Path { path, up: Ok(()) });
                }
                self.owner(conn, OwnerEvent::Opened(end));
            }
        }
    }
}

/// The beginning of what a thing looks like.
fn short(what: &impl std::fmt::Debug) -> String {
    format!("{what:?}").chars().take(160).collect()
}
