//! The network and the devices: connections that are dialled, cut and forgotten, messages that take their time, links
//! that are polled whenever.

use std::collections::BTreeMap;
use std::time::Duration;

use kv_block::Epoch;
use kv_wire::message::{Answer, Ask};

use super::lies;
use super::node::ReaderSide;
use super::world::{CREDITS, Conn, Event, IDLE_POLLS_MAX, Pipe, WINDOWED, World, millis, name};
use crate::link::{Link, LinkDone, LinkError};
use crate::memory::{LinkFault, MemoryConfig, MemoryLink};
use crate::owner::{OwnerConfig, OwnerEvent, OwnerPath};
use crate::reader::{PathId, ReaderEvent};
use crate::{Micros, Owner};

impl World {
    pub(super) fn side(&mut self, node: usize, peer: usize) -> &mut ReaderSide {
        self.nodes[node].readers.get_mut(&peer).expect("a reader for each peer")
    }

    /// Reader and owner of a connection that the reader still has.
    pub(super) fn current(&mut self, conn: u64) -> Option<(usize, usize)> {
        let there = self.conns.get(&conn).filter(|there| there.reader_open)?;
        let (from, to) = (there.from, there.to);
        (self.side(from, to).conn == Some(conn)).then_some((from, to))
    }

    /// When a message of this direction arrives that is sent now.
    pub(super) fn arrival(&mut self, from: usize, to: usize) -> Micros {
        let slow = self.random.per_mille(50);
        let delay = 20 + self.random.below(if slow { 20_000 } else { 800 });
        let free = self.blocked.get(&(from, to)).copied().unwrap_or_default();
        self.now.max(free).after(Duration::from_micros(delay))
    }

    pub(super) fn dial(&mut self, from: usize, to: usize) {
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

    pub(super) fn arrive(&mut self, from: usize, to: usize, epoch: Epoch, attempt: u64) {
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

    pub(super) fn accepted(&mut self, conn: u64) {
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

    pub(super) fn pipe(&mut self, conn: u64, path: PathId, windows_of: Option<u8>) {
        let (owner, reader) = MemoryLink::pair(MemoryConfig { in_flight_max: 16, windows_of });
        let pipe = Pipe { owner: Some(owner), reader: Some(reader), polling: false, idle: 0 };
        if let Some(conn) = self.conns.get_mut(&conn) {
            conn.pipes.insert(path, pipe);
        }
    }

    pub(super) fn send_to_owner(&mut self, conn: u64, ask: Ask) {
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

    pub(super) fn send_to_reader(&mut self, conn: u64, answer: Answer) {
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
    pub(super) fn cut(&mut self, conn: u64) -> bool {
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

    pub(super) fn sever_all(&mut self, conn: u64, within_us: u64) {
        for path in [PathId::TCP, WINDOWED] {
            self.within(within_us, Event::Sever { conn, path });
        }
    }

    /// The reader's side has no connection any more.
    pub(super) fn leave_conn(&mut self, node: usize, peer: usize) -> Option<u64> {
        let side = self.side(node, peer);
        side.attempt = None;
        let conn = side.conn.take()?;
        self.conns.get_mut(&conn)?.reader_open = false;
        Some(conn)
    }

    /// Forgets a connection that neither side has, when its devices have let go of everything.
    pub(super) fn reap(&mut self, conn: u64) {
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

    /// What may go wrong with the next operation of a link.
    pub(super) fn fault(&mut self, reading: bool) -> Option<LinkFault> {
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
    pub(super) fn stir(&mut self, conn: u64, path: PathId) {
        let pipe = self.conns.get_mut(&conn).and_then(|conn| conn.pipes.get_mut(&path));
        if let Some(pipe) = pipe {
            pipe.idle = 0;
            if !std::mem::replace(&mut pipe.polling, true) {
                self.within(600, Event::Poll { conn, path });
            }
        }
    }

    pub(super) fn poll(&mut self, conn: u64, path: PathId) {
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

    pub(super) fn owner_done(&mut self, conn: u64, path: PathId, done: LinkDone) {
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

    pub(super) fn reader_done(&mut self, conn: u64, path: PathId, done: LinkDone) {
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
}
