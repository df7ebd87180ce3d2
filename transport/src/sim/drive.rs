//! The driver: gives events to readers and owners, and does what they say.

use kv_wire::message::Taken;

use super::node::{bytes_of, key, number};
use super::world::{BATCH_US_MAX, CREDITS, Event, World};
use crate::Owner;
use crate::link::{Link, LinkError, LinkOp};
use crate::owner::{OwnerCommand, OwnerEvent, OwnerState};
use crate::reader::{PathId, PeerState, ReaderCommand, ReaderEvent};

impl World {
    pub(super) fn reader(&mut self, node: usize, peer: usize, event: ReaderEvent) {
        let (now, mut out) = (self.now, Vec::new());
        self.log(|| format!("{node} -> {peer} {}", short(&event)));
        let side = self.side(node, peer);
        let lost = matches!(event, ReaderEvent::Disconnected { .. });
        side.reader.handle(now, event, &mut out);
        let lost = lost || out.iter().any(|command| matches!(command, ReaderCommand::Hangup { .. }));
        if !std::mem::replace(&mut side.flushing, true) {
            let delay = self.batch_us();
            self.within(delay, Event::FlushReader { node, peer });
        }
        self.reader_commands(node, peer, out);
        if lost {
            let report = self.side(node, peer).reader.report();
            let open = report.waiting + report.asked + report.granted;
            assert!(
                open == 0 || report.state != PeerState::Idle,
                "wants wait for a connection that nobody opens"
            );
        }
    }

    /// Sees to the next tick.
    pub(super) fn arm_reader(&mut self, node: usize, peer: usize) {
        let (now, side) = (self.now, self.side(node, peer));
        if let Some(at) = side.reader.next_tick()
            && side.tick_at.is_none_or(|known| at < known)
        {
            side.tick_at = Some(at);
            self.at(at.max(now), Event::TickReader { node, peer });
        }
    }

    /// How long events gather before a flush.
    pub(super) fn batch_us(&mut self) -> u64 {
        match self.random.below(10) {
            0..5 => 0,
            5..9 => 15,
            _ => BATCH_US_MAX,
        }
    }

    pub(super) fn reader_commands(&mut self, node: usize, peer: usize, out: Vec<ReaderCommand>) {
        for command in out {
            self.log(|| format!("{node} -> {peer}     {}", short(&command)));
            self.reader_command(node, peer, command);
        }
    }

    pub(super) fn reader_command(&mut self, node: usize, peer: usize, command: ReaderCommand) {
        match command {
            ReaderCommand::Connect => self.dial(node, peer),
            ReaderCommand::Hangup { why } => {
                let report = self.side(node, peer).reader.report();
                let strike = report.last_error.map_or("", |(strike, _)| strike);
                self.tally.count(strike);
                // What a network does to two honest ends. Without a strike of its own it accuses nobody: no path is
                // left, and nothing was wanted; the newest strike is an older one then.
                let network = ["unreachable", "broken", "silent", "stuck", "unanswered", "unread"];
                let fair = strike.is_empty() || network.contains(&strike);
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

    pub(super) fn owner(&mut self, conn: u64, event: OwnerEvent) {
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

    pub(super) fn flush_owner(&mut self, conn: u64) {
        let (now, mut out) = (self.now, Vec::new());
        let Some(there) = self.conns.get_mut(&conn) else { return };
        there.flushing = false;
        let Some(owner) = &mut there.owner else { return };
        owner.flush(now, &mut out);
        self.owner_commands(conn, out);
        self.arm_owner(conn);
    }

    /// As for a reader.
    pub(super) fn arm_owner(&mut self, conn: u64) {
        let now = self.now;
        let Some(there) = self.conns.get_mut(&conn) else { return };
        if let Some(at) = there.owner.as_ref().and_then(Owner::next_tick)
            && there.tick_at.is_none_or(|known| at < known)
        {
            there.tick_at = Some(at);
            self.at(at.max(now), Event::TickOwner { conn });
        }
    }

    pub(super) fn owner_commands(&mut self, conn: u64, out: Vec<OwnerCommand>) {
        for command in out {
            self.log(|| format!("connection {conn}     {}", short(&command)));
            self.owner_command(conn, command);
        }
    }

    pub(super) fn owner_command(&mut self, conn: u64, command: OwnerCommand) {
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
pub(super) fn short(what: &impl std::fmt::Debug) -> String {
    format!("{what:?}").chars().take(160).collect()
}
