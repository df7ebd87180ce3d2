//! The reader as a whole: one match over everything that can happen, and the life of a connection.
//!
//! ```text
//!            wanted          Connected, Hello          Welcome
//!     Down ----------> Connecting ----------> Greeting ----------> Up
//!      ^                   |                     |                  |
//!      +-------------------+---------------------+------------------+   failure, refusal, silence, broken rules
//! ```
//! Whatever ends a connection ends every want that has no bytes on the way.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kv_block::{Epoch, MissReason};
use kv_wire::frame::VERSIONS;
use kv_wire::message::{Answer, Ask, Credits, Hello, ReadId, WantId, Welcome};

use super::asks::Question;
use super::report::{PathReport, PathState, PeerReport, PeerState, ReaderConfig};
use super::wants::{Books, Read, Want};
use super::{PathId, ReaderCommand, ReaderEvent};
use crate::Micros;
use crate::health::{Admitted, Circuit, Health, Proof, Strike};

/// Commands under construction.
pub(crate) type Out = Vec<ReaderCommand>;

/// The end that wants blocks of one peer. See [`crate::reader`].
#[derive(Debug)]
pub struct Reader {
    pub(super) config: ReaderConfig,
    pub(super) health: Health,
    pub(super) stage: Stage,
    /// Which want or question is the one try of a circuit that is not closed.
    pub(super) trial: Option<Trial>,
    pub(super) wants: BTreeMap<WantId, Want>,
    pub(super) books: Books,
    pub(super) reads: BTreeMap<ReadId, Read>,
    pub(super) questions: BTreeMap<u64, Question>,
    pub(super) timers: BTreeSet<(Micros, Timer)>,
    pub(super) paths: BTreeMap<PathId, Path>,
    /// Of reads, questions, pings and places in the queue.
    pub(super) next_number: u64,
    /// Connections so far: tells what belongs to this one.
    pub(super) connection: u64,
    pub(super) landed: u64,
    /// When it was last found that nothing could be read.
    unread_at: Option<Micros>,
    misses: BTreeMap<&'static str, u64>,
    met: Option<Met>,
    rtt: Option<Duration>,
}

/// How the connection stands.
#[derive(Debug)]
pub(super) enum Stage {
    Down,
    Connecting { until: Micros },
    Greeting { until: Micros },
    Up(Session),
}

/// A connection that the owner took.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) credits: Credits,
    leaving: bool,
    /// Since when the owner has said nothing although it owes an answer.
    silent_since: Option<Micros>,
    /// The ping that waits for its pong.
    pub(super) ping: Option<(u64, Micros)>,
    pinged_at: Option<Micros>,
}

/// Who answered last.
#[derive(Debug)]
struct Met {
    node: String,
    epoch: Epoch,
    version: u16,
}

/// A path and what it did.
#[derive(Debug, Default)]
pub(super) struct Path {
    pub(super) report: PathReport,
    pub(super) errors_in_row: u32,
}

/// What a deadline ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Timer {
    Want(WantId),
    Question(u64),
    /// A device has a read that was cancelled.
    Cancelled(ReadId),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Trial {
    Want(WantId),
    Question(u64),
    /// A connection and a ping, when a circuit has been open for long enough and nobody has asked for anything.
    Ping,
}

impl Reader {
    /// A reader of one peer. It connects when something is wanted.
    pub fn new(config: ReaderConfig) -> Self {
        let paths = config.paths.iter().copied().chain([PathId::TCP]);
        Self {
            health: Health::new(config.health, config.seed),
            paths: paths.map(|path| (path, Path::default())).collect(),
            config,
            stage: Stage::Down,
            trial: None,
            wants: BTreeMap::new(),
            books: Books::default(),
            reads: BTreeMap::new(),
            questions: BTreeMap::new(),
            timers: BTreeSet::new(),
            next_number: 0,
            connection: 0,
            landed: 0,
            unread_at: None,
            misses: BTreeMap::new(),
            met: None,
            rtt: None,
        }
    }

    /// Takes one event and appends what is to be done about it. What is said to the owner in batches comes with
    /// [`Self::flush`].
    pub fn handle(&mut self, now: Micros, event: ReaderEvent, out: &mut Out) {
        if let ReaderEvent::Leave { want } = event {
            // Before its deadline is looked at: whoever left hears nothing more of it.
            self.leave(now, want, out);
        }
        self.expire(now, out);
        match event {
            ReaderEvent::Connected => self.connected(out),
            ReaderEvent::Disconnected { why } => self.disconnected(now, why, out),
            ReaderEvent::Heard(answer) => self.heard(now, answer, out),
            ReaderEvent::Nonsense { why } => {
                if matches!(self.stage, Stage::Greeting { .. } | Stage::Up(_)) {
                    self.hangup(now, Strike::Rules, why, out);
                }
            }
            ReaderEvent::Reach(end) => {
                if matches!(self.stage, Stage::Up(_)) {
                    out.push(ReaderCommand::Say(Ask::Path(end)));
                }
            }
            ReaderEvent::Path { path, up } => self.path(now, path, up, out),
            ReaderEvent::Read { read, into, result } => self.read_ended(now, read, into, result, out),
            ReaderEvent::Want { want, principal, key, deadline, wait } => {
                self.want(now, want, Want::new(principal, key, deadline, wait), out);
            }
            ReaderEvent::Take { want, into } => self.take(now, want, into, out),
            ReaderEvent::Probe { probe, principal, keys, deadline } => {
                self.probe(now, probe, principal, keys, deadline, out);
            }
            ReaderEvent::Offer { offer, deadline } => self.offer(now, offer, deadline, out),
            ReaderEvent::Tick => self.try_again(now, out),
            ReaderEvent::Leave { .. } => {}
        }
        self.attend(now);
    }

    /// Says what has gathered since the last time. Called after each batch of events, so that many wants become few
    /// messages.
    pub fn flush(&mut self, now: Micros, out: &mut Out) {
        if matches!(self.stage, Stage::Up(_)) {
            self.say_questions(out);
            self.say_done(out);
            self.say_wants(now, out);
            self.attend(now);
            self.ping(now, out);
        }
    }

    /// When something must happen without an event: then [`ReaderEvent::Tick`] is due, and a flush.
    pub fn next_tick(&self) -> Option<Micros> {
        let stage = match &self.stage {
            Stage::Down => None,
            Stage::Connecting { until } | Stage::Greeting { until } => Some(*until),
            Stage::Up(session) => session.silent_since.map(|since| {
                let silence = since.after(self.config.silence_max);
                match (session.ping, session.pinged_at) {
                    (Some((_, at)), _) => silence.min(at.after(self.pong_max())),
                    (None, Some(at)) => silence.min(at.after(self.config.ping_every)),
                    (None, None) => silence,
                }
            }),
        };
        let trial = match (self.health.circuit(), &self.stage) {
            (Circuit::Open { until }, Stage::Down) => Some(until),
            _ => None,
        };
        stage.into_iter().chain(trial).chain(self.timers.first().map(|(at, _)| *at)).min()
    }

    /// What it knows.
    pub fn report(&self) -> PeerReport {
        let session = match &self.stage {
            Stage::Up(session) => Some(session),
            _ => None,
        };
        let [waiting, asked, granted, reading] = self.wants_by_stage();
        PeerReport {
            peer: self.config.peer.clone(),
            state: match &self.stage {
                Stage::Down => PeerState::Idle,
                Stage::Connecting { .. } => PeerState::Connecting,
                Stage::Greeting { .. } => PeerState::Greeting,
                Stage::Up(_) => PeerState::Connected,
            },
            version: self.met.as_ref().map(|met| met.version),
            node: self.met.as_ref().map(|met| met.node.clone()),
            epoch: self.met.as_ref().map(|met| met.epoch),
            leaving: session.is_some_and(|session| session.leaving),
            waiting,
            asked,
            granted,
            reading,
            cancelled: self.reads.values().filter(|read| read.want.is_none()).count(),
            questions: self.questions.len(),
            granted_bytes: self.books.granted_bytes,
            landed: self.landed,
            misses: self.misses.clone(),
            paths: self.paths.iter().map(|(id, path)| (*id, path.report.clone())).collect(),
            connections: self.connection,
            strikes: self.health.strikes(),
            opened: self.health.opened(),
            circuit: self.health.circuit(),
            last_error: self.health.last().map(|(strike, why)| (strike.name(), why.clone())),
            rtt: self.rtt,
        }
    }

    /// Whether the owner said that it leaves.
    pub fn is_leaving(&self) -> bool {
        matches!(&self.stage, Stage::Up(session) if session.leaving)
    }

    /// For how long the peer has owed a word and said none: a connection, a welcome, an answer.
    pub fn silent_for(&self, now: Micros) -> Duration {
        match &self.stage {
            Stage::Down => Duration::ZERO,
            Stage::Connecting { until } | Stage::Greeting { until } => {
                self.config.connect_max.saturating_sub(until.since(now))
            }
            Stage::Up(session) => session.silent_since.map_or(Duration::ZERO, |since| now.since(since)),
        }
    }

    /// Whether nothing is under way, not even a read that was cancelled.
    pub fn is_idle(&self) -> bool {
        let nothing_open = self.wants.is_empty() && self.questions.is_empty() && self.books.is_empty();
        nothing_open && self.reads.is_empty() && !self.health.is_trying()
    }

    pub(super) fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    pub(super) fn missed(&mut self, want: WantId, reason: MissReason, out: &mut Out) {
        *self.misses.entry(reason.name()).or_default() += 1;
        out.push(ReaderCommand::Missed { want, reason });
    }

    /// Whether something may go to the peer now, and whether it is the one try.
    pub(super) fn admit(&mut self, now: Micros, what: Trial) -> bool {
        match self.health.admit(now) {
            Admitted::Yes => true,
            Admitted::Try => {
                self.trial = Some(what);
                true
            }
            Admitted::No => false,
        }
    }

    /// Something has ended; when it was the one try, another may be made.
    pub(super) fn end_trial(&mut self, what: Trial) {
        if self.trial == Some(what) {
            self.trial = None;
            self.health.freed();
        }
    }

    /// Opens a connection if there is none.
    pub(super) fn connect(&mut self, now: Micros, out: &mut Out) {
        if matches!(self.stage, Stage::Down) {
            self.stage = Stage::Connecting { until: now.after(self.config.connect_max) };
            out.push(ReaderCommand::Connect);
        }
    }

    fn connected(&mut self, out: &mut Out) {
        let Stage::Connecting { until } = self.stage else { return };
        self.stage = Stage::Greeting { until };
        out.push(ReaderCommand::Say(Ask::Hello(Hello {
            versions: VERSIONS,
            node: self.config.node.clone(),
            epoch: self.config.epoch,
            principals: self.config.principals.clone(),
            facts: self.config.facts.clone(),
        })));
    }

    fn disconnected(&mut self, now: Micros, why: String, out: &mut Out) {
        match &self.stage {
            Stage::Down => return,
            Stage::Connecting { .. } | Stage::Greeting { .. } => {
                self.health.strike(now, Strike::Unreachable, why);
            }
            // An owner may go while nothing is wanted of it.
            Stage::Up(_) if self.owed() => self.health.strike(now, Strike::Broken, why),
            Stage::Up(_) => {}
        }
        self.down(now, false, out);
    }

    /// Ends the connection, and with it everything.
    pub(super) fn hangup(&mut self, now: Micros, strike: Strike, why: String, out: &mut Out) {
        self.health.strike(now, strike, why.clone());
        self.close(now, why, out);
    }

    fn close(&mut self, now: Micros, why: String, out: &mut Out) {
        out.push(ReaderCommand::Hangup { why });
        self.down(now, true, out);
    }

    /// What was granted could not be read, by any path. Reads fail together when a connection ends: that is one
    /// strike. When there were enough, paths that carry nothing are not kept for the next try.
    pub(super) fn unread(&mut self, now: Micros, why: String, out: &mut Out) {
        let again = |at: Micros| now.since(at) < self.config.ping_every;
        if self.unread_at.is_some_and(again) || !matches!(self.stage, Stage::Up(_)) {
            return;
        }
        self.unread_at = Some(now);
        self.health.strike(now, Strike::Unread, why.clone());
        if matches!(self.health.circuit(), Circuit::Open { .. }) {
            self.close(now, why, out);
        }
    }

    fn down(&mut self, now: Micros, tcp_too: bool, out: &mut Out) {
        self.stage = Stage::Down;
        self.books.forget();
        for path in self.paths.values_mut() {
            path.report.state = PathState::Opening;
            path.errors_in_row = 0;
        }
        self.end_wants(now, tcp_too, out);
        self.end_questions(out);
        self.trial = None;
        self.health.freed();
    }

    fn heard(&mut self, now: Micros, answer: Answer, out: &mut Out) {
        match &mut self.stage {
            // Words that were on their way when we hung up.
            Stage::Down | Stage::Connecting { .. } => return,
            Stage::Greeting { .. } => return self.greeted(now, answer, out),
            Stage::Up(session) => session.silent_since = session.silent_since.and(Some(now)),
        }
        let broken = match answer {
            Answer::Granted(grants) => self.granted(now, &grants, out),
            Answer::Missed(misses) => self.not_granted(now, &misses, out),
            Answer::Found(found) => self.found(now, found, out),
            Answer::Taken(taken) => self.offer_taken(now, taken, out),
            Answer::Pong(number) => self.pong(now, number),
            Answer::Credits(credits) => {
                self.session(|session| session.credits = credits);
                Ok(())
            }
            Answer::Leaving => {
                self.session(|session| session.leaving = true);
                Ok(())
            }
            Answer::Staying => {
                self.session(|session| session.leaving = false);
                Ok(())
            }
            Answer::Path(end) if self.config.paths.contains(&PathId(end.path)) => {
                out.push(ReaderCommand::Join(end));
                Ok(())
            }
            Answer::Path(_) => Err("it describes a path that nobody knows"),
            Answer::Welcome(_) => Err("it welcomes us twice"),
            Answer::Refused(_) => Err("it refuses a connection that it took"),
        };
        if let Err(rule) = broken {
            self.hangup(now, Strike::Rules, rule.into(), out);
        }
    }

    fn greeted(&mut self, now: Micros, answer: Answer, out: &mut Out) {
        match answer {
            Answer::Welcome(welcome) if welcome.node != self.config.peer => {
                let why = format!("it is called {}, not {}", welcome.node, self.config.peer);
                self.hangup(now, Strike::Refused, why, out);
            }
            Answer::Welcome(welcome) if !(VERSIONS.0..=VERSIONS.1).contains(&welcome.version) => {
                let why = format!("it speaks version {}, which we did not offer", welcome.version);
                self.hangup(now, Strike::Refused, why, out);
            }
            Answer::Welcome(welcome) => self.welcomed(now, welcome, out),
            Answer::Refused(refused) => {
                let why = format!("it refused us: {:?}, {}", refused.why, refused.text);
                self.hangup(now, Strike::Refused, why, out);
            }
            _ => self.hangup(now, Strike::Rules, "its first words are no welcome".into(), out),
        }
    }

    fn welcomed(&mut self, now: Micros, welcome: Welcome, out: &mut Out) {
        let Welcome { version, node, epoch, session, credits, leaving, facts } = welcome;
        let reborn = self.met.as_ref().is_some_and(|met| met.epoch != epoch);
        self.connection += 1;
        self.met = Some(Met { node, epoch, version });
        self.stage = Stage::Up(Session { credits, leaving, silent_since: None, ping: None, pinged_at: None });
        if reborn {
            // Only bytes of the last life can be on their way, and nobody stands by them any more.
            self.end_reading(now, out);
        }
        self.health.proved(now, Proof::Welcomed);
        out.push(ReaderCommand::Open { session, version, facts });
    }

    /// Lets everything end whose time is over.
    fn expire(&mut self, now: Micros, out: &mut Out) {
        while let Some((at, timer)) = self.timers.first().copied()
            && at <= now
        {
            self.timers.remove(&(at, timer));
            match timer {
                Timer::Want(want) => self.late(now, want, out),
                Timer::Question(number) => self.end_question(now, number, out),
                Timer::Cancelled(read) => self.stuck(now, read, out),
            }
        }
        match &self.stage {
            Stage::Connecting { until } if *until <= now => {
                self.hangup(now, Strike::Unreachable, "no connection in time".into(), out);
            }
            Stage::Greeting { until } if *until <= now => {
                self.hangup(now, Strike::Unreachable, "no welcome in time".into(), out);
            }
            Stage::Up(session) => {
                let limit = self.config.silence_max;
                if session.silent_since.is_some_and(|since| since.after(limit) <= now) {
                    let why = format!("it said nothing for {limit:?}");
                    return self.hangup(now, Strike::Silent, why, out);
                }
                let limit = self.pong_max();
                let late = session.ping.is_some_and(|(_, at)| at.after(limit) <= now);
                if late && session.silent_since.is_some() {
                    let why = format!("it talked, and answered no ping for {limit:?}");
                    self.hangup(now, Strike::Silent, why, out);
                }
            }
            _ => {}
        }
    }

    /// A circuit that has been open for long enough is tried, whether anything is wanted or not.
    fn try_again(&mut self, now: Micros, out: &mut Out) {
        let due = matches!(self.stage, Stage::Down) && self.health.is_due(now);
        if due && self.admit(now, Trial::Ping) {
            self.connect(now, out);
        }
    }

    /// How long a pong may take while other words come: these may have been under way for as long as one may be silent.
    fn pong_max(&self) -> Duration {
        2 * self.config.silence_max
    }

    /// Whether the owner owes us an answer, or we it a word.
    fn owed(&self) -> bool {
        let pinged = self.trial == Some(Trial::Ping);
        pinged || !self.wants.is_empty() || !self.questions.is_empty() || !self.books.is_empty()
    }

    /// Silence counts from the moment at which there is something to say.
    fn attend(&mut self, now: Micros) {
        let owed = self.owed();
        self.session(|session| {
            session.silent_since = owed.then(|| session.silent_since.unwrap_or(now));
        });
    }

    fn ping(&mut self, now: Micros, out: &mut Out) {
        let hurry = self.books.wait_for_answers();
        let (every, number) = (self.config.ping_every, self.next_number + 1);
        let Stage::Up(session) = &mut self.stage else { return };
        let due = session.pinged_at.is_none_or(|at| at.after(every) <= now) || hurry;
        if session.ping.is_none() && session.silent_since.is_some() && due {
            session.ping = Some((number, now));
            session.pinged_at = Some(now);
            self.next_number = number;
            out.push(ReaderCommand::Say(Ask::Ping(number)));
        }
    }

    fn pong(&mut self, now: Micros, number: u64) -> Result<(), &'static str> {
        let Stage::Up(session) = &mut self.stage else { return Ok(()) };
        let (_, at) = session.ping.take_if(|(sent, _)| *sent == number).ok_or("a pong without a ping")?;
        self.rtt = Some(now.since(at));
        self.books.answered_before(number);
        self.health.proved(now, Proof::Answered);
        self.end_trial(Trial::Ping);
        Ok(())
    }

    pub(super) fn session(&mut self, change: impl FnOnce(&mut Session)) {
        if let Stage::Up(session) = &mut self.stage {
            change(session);
        }
    }

    fn path(&mut self, now: Micros, id: PathId, up: Result<(), String>, out: &mut Out) {
        // Paths belong to a connection: what ends after it says nothing about the next one.
        if !matches!(self.stage, Stage::Up(_)) {
            return;
        }
        let Some(path) = self.paths.get_mut(&id) else {
            tracing::error!(path = id.0, peer = self.config.peer, "a path that was not configured");
            return;
        };
        path.errors_in_row = 0;
        path.report.state = match &up {
            Ok(()) => PathState::Up,
            Err(why) => PathState::Down { why: why.clone() },
        };
        if id == PathId::TCP
            && let Err(why) = up
        {
            // Only a new connection brings it back. An owner may go while nothing is wanted of it.
            let why = format!("no path carries anything: {why}");
            return if self.owed() {
                self.hangup(now, Strike::Unread, why, out);
            } else {
                self.close(now, why, out);
            };
        }
        self.retry_parked(now, out);
    }
}
