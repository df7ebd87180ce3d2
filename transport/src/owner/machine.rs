//! The owner as a whole: one match over everything that can happen, and the life of a reader's connection.

use std::collections::{BTreeMap, BTreeSet};

use kv_block::Epoch;
use kv_wire::frame::{ITEMS_MAX, VERSIONS};
use kv_wire::message::{Answer, Ask, Found, Hello, Offer, PathEnd, Probe, Refusal, Refused, Welcome};

use super::leases::Leases;
use super::report::{LeaseReport, OwnerConfig, OwnerReport, OwnerState};
use super::{OwnerCommand, OwnerEvent};
use crate::reader::PathId;
use crate::{Micros, OFFERS_MAX, PROBES_MAX};

/// Commands under construction.
pub(crate) type Out = Vec<OwnerCommand>;

/// The end that has blocks, for one connection of one reader. See [`crate::owner`].
#[derive(Debug)]
pub struct Owner {
    pub(super) config: OwnerConfig,
    pub(super) stage: Stage,
    pub(super) leases: Leases,
    /// Paths other than TCP that can be used.
    pub(super) up: BTreeSet<PathId>,
    /// Paths whose end is being opened.
    opening: BTreeSet<u8>,
    /// Probes that the node looks at, with how many blocks they are about.
    probes: BTreeMap<u64, usize>,
    offers: BTreeSet<u64>,
    leaving: bool,
    /// Since when the reader has said nothing although something is held for it.
    silent_since: Option<Micros>,
    last_error: Option<String>,
}

#[derive(Debug)]
pub(super) enum Stage {
    /// Until the Hello must have come; the clock begins with the first event.
    New {
        until: Option<Micros>,
    },
    Serving {
        reader: String,
        epoch: Epoch,
        principals: Vec<String>,
        version: u16,
    },
    Over {
        reader: Option<String>,
    },
}

impl Owner {
    /// An owner for a connection that was just accepted. It wants a tick at once, so that it knows the time.
    pub fn new(config: OwnerConfig) -> Self {
        Self {
            leaving: config.leaving,
            config,
            stage: Stage::New { until: None },
            leases: Leases::default(),
            up: BTreeSet::new(),
            opening: BTreeSet::new(),
            probes: BTreeMap::new(),
            offers: BTreeSet::new(),
            silent_since: None,
            last_error: None,
        }
    }

    /// Takes one event and appends what is to be done about it. What is said to the reader in batches comes with
    /// [`Self::flush`].
    pub fn handle(&mut self, now: Micros, event: OwnerEvent, out: &mut Out) {
        self.expire(now, out);
        match event {
            OwnerEvent::Heard(ask) => self.heard(now, ask, out),
            OwnerEvent::Nonsense { why } => self.hangup(why, out),
            OwnerEvent::Disconnected => self.over(out),
            OwnerEvent::Held { want, block, tier } => self.held(now, want, block, tier, out),
            OwnerEvent::NotHeld { want, reason } => self.not_held(want, reason),
            OwnerEvent::Looked(found) => self.looked(found, out),
            OwnerEvent::Took(taken) => {
                if self.offers.remove(&taken.id) {
                    out.push(OwnerCommand::Say(Answer::Taken(taken)));
                }
            }
            OwnerEvent::Exposed { path, want, result } => self.exposed(now, path, want, result, out),
            OwnerEvent::Concealed { path, want, block } => {
                drop(block);
                self.concealed(now, path, want, out);
            }
            OwnerEvent::Path { path, up } => self.path(path, up.is_ok()),
            OwnerEvent::Opened(end) => {
                if self.opening.remove(&end.path) {
                    out.push(OwnerCommand::Say(Answer::Path(end)));
                }
            }
            OwnerEvent::Leaving { leaving } => {
                if leaving != self.leaving && matches!(self.stage, Stage::Serving { .. }) {
                    let answer = if leaving { Answer::Leaving } else { Answer::Staying };
                    out.push(OwnerCommand::Say(answer));
                }
                self.leaving = leaving;
            }
            OwnerEvent::Tick => {}
        }
        self.attend(now);
    }

    /// Says what has gathered since the last time. Called after each batch of events.
    pub fn flush(&mut self, _now: Micros, out: &mut Out) {
        if matches!(self.stage, Stage::Serving { .. }) {
            self.say_leases(out);
        }
    }

    /// When something must happen without an event: then [`OwnerEvent::Tick`] is due, and a flush.
    pub fn next_tick(&self) -> Option<Micros> {
        let stage = match self.stage {
            Stage::New { until } => Some(until.unwrap_or_default()),
            Stage::Serving { .. } => self.silent_since.map(|since| since.after(self.config.silence_max)),
            Stage::Over { .. } => None,
        };
        stage.into_iter().chain(self.leases.next_timer()).min()
    }

    /// Whether the connection has ended and no device can read anything for it any more.
    pub fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Over { .. }) && self.leases.is_empty()
    }

    /// What it knows.
    pub fn report(&self) -> OwnerReport {
        let mut report = OwnerReport { last_error: self.last_error.clone(), ..self.leases.report() };
        match &self.stage {
            Stage::New { .. } => {}
            Stage::Serving { reader, epoch, version, .. } => {
                report.state = OwnerState::Serving;
                report.reader = Some(reader.clone());
                report.epoch = Some(*epoch);
                report.version = Some(*version);
            }
            Stage::Over { reader } => {
                report.state = OwnerState::Over;
                report.reader.clone_from(reader);
            }
        }
        report
    }

    /// Everything that is held for the reader, oldest first.
    pub fn leases(&self) -> Vec<LeaseReport> {
        self.leases.each()
    }

    fn heard(&mut self, now: Micros, ask: Ask, out: &mut Out) {
        self.silent_since = self.silent_since.and(Some(now));
        let broken = match (&self.stage, ask) {
            (Stage::Over { .. }, _) => return,
            (Stage::New { .. }, Ask::Hello(hello)) => return self.hello(hello, out),
            (Stage::New { .. }, _) => {
                return self.refuse(Refusal::Unknown, "the first words are no Hello".into(), out);
            }
            (Stage::Serving { .. }, Ask::Hello(_)) => Err("a second Hello"),
            (Stage::Serving { .. }, Ask::Want(wants)) => self.wants(now, &wants, out),
            (Stage::Serving { .. }, Ask::Done(wants)) => self.done(now, &wants, out),
            (Stage::Serving { principals, .. }, Ask::Probe(probe)) => {
                let principal = principals.get(usize::from(probe.principal)).cloned();
                self.probe(probe, principal, out)
            }
            (Stage::Serving { principals, .. }, Ask::Offer(offer)) => {
                let principal = principals.get(usize::from(offer.principal)).cloned();
                self.offered(offer, principal, out)
            }
            (Stage::Serving { .. }, Ask::Path(end)) => self.reach(end, out),
            (Stage::Serving { .. }, Ask::Ping(number)) => {
                // A pong says that everything before it was answered, so no answer may come behind.
                self.say_leases(out);
                out.push(OwnerCommand::Say(Answer::Pong(number)));
                Ok(())
            }
        };
        if let Err(rule) = broken {
            self.hangup(rule.into(), out);
        }
    }

    fn hello(&mut self, hello: Hello, out: &mut Out) {
        let Hello { versions, node, epoch, principals, facts: _ } = hello;
        if let Some(Refused { why, text }) = self.config.refuse.clone() {
            return self.refuse(why, text, out);
        }
        let version = versions.1.min(VERSIONS.1);
        if version < versions.0.max(VERSIONS.0) {
            let (ours, theirs) = (VERSIONS, versions);
            let text = format!("{} speaks {} to {}, not {theirs:?}", self.config.node, ours.0, ours.1);
            return self.refuse(Refusal::Version, text, out);
        }
        if !self.config.readers.contains(&node) {
            let text = format!("{} knows no node called {node}", self.config.node);
            return self.refuse(Refusal::Unknown, text, out);
        }
        if principals.len() > self.config.principals_max {
            return self.hangup("more principals than a reader may have".into(), out);
        }
        self.stage = Stage::Serving { reader: node, epoch, principals, version };
        out.push(OwnerCommand::Say(Answer::Welcome(Welcome {
            version,
            node: self.config.node.clone(),
            epoch: self.config.epoch,
            session: self.config.session,
            credits: self.config.credits,
            leaving: self.leaving,
            facts: self.config.facts.clone(),
        })));
    }

    fn refuse(&mut self, why: Refusal, text: String, out: &mut Out) {
        out.push(OwnerCommand::Say(Answer::Refused(Refused { why, text: text.clone() })));
        self.hangup(text, out);
    }

    fn hangup(&mut self, why: String, out: &mut Out) {
        if !matches!(self.stage, Stage::Over { .. }) {
            self.last_error = Some(why.clone());
            out.push(OwnerCommand::Hangup { why });
            self.over(out);
        }
    }

    /// The reader is gone: nobody reads anything here any more.
    fn over(&mut self, out: &mut Out) {
        let reader = match &mut self.stage {
            Stage::New { .. } => None,
            Stage::Serving { reader, .. } => Some(std::mem::take(reader)),
            Stage::Over { .. } => return,
        };
        self.stage = Stage::Over { reader };
        self.probes.clear();
        self.offers.clear();
        self.opening.clear();
        self.end_all(out);
    }

    fn probe(&mut self, probe: Probe, principal: Option<String>, out: &mut Out) -> Result<(), &'static str> {
        let principal = principal.ok_or("a probe for a principal that was not named")?;
        if self.probes.len() >= PROBES_MAX || probe.keys.len() > ITEMS_MAX {
            return Err("more probes than a reader may make");
        }
        if self.probes.insert(probe.id, probe.keys.len()).is_some() {
            return Err("a probe that is numbered twice");
        }
        out.push(OwnerCommand::Look { id: probe.id, principal, keys: probe.keys });
        Ok(())
    }

    fn looked(&mut self, found: Found, out: &mut Out) {
        let Some(keys) = self.probes.remove(&found.id) else { return };
        // The reader would take it for a lie.
        if found.sights.len() == keys {
            out.push(OwnerCommand::Say(Answer::Found(found)));
        } else {
            tracing::error!(found = found.sights.len(), keys, "the node answers a probe with another length");
        }
    }

    fn offered(
        &mut self,
        offer: Offer,
        principal: Option<String>,
        out: &mut Out,
    ) -> Result<(), &'static str> {
        let principal = principal.ok_or("an offer for a principal that was not named")?;
        if self.offers.len() >= OFFERS_MAX || offer.keys.len() > ITEMS_MAX {
            return Err("more offers than a reader may make");
        }
        if !self.offers.insert(offer.id) {
            return Err("an offer that is numbered twice");
        }
        out.push(OwnerCommand::Offered { principal, offer });
        Ok(())
    }

    fn reach(&mut self, end: PathEnd, out: &mut Out) -> Result<(), &'static str> {
        if PathId(end.path) == PathId::TCP {
            return Err("an end of a path that has none");
        }
        if !self.config.paths.iter().any(|known| known.path == PathId(end.path)) {
            let none = PathEnd { path: end.path, words: Vec::new() };
            out.push(OwnerCommand::Say(Answer::Path(none)));
            return Ok(());
        }
        if !self.opening.insert(end.path) {
            return Err("a path that is being opened already");
        }
        out.push(OwnerCommand::Open { end });
        Ok(())
    }

    fn path(&mut self, path: PathId, up: bool) {
        if !up {
            self.up.remove(&path);
        } else if self.config.paths.iter().any(|known| known.path == path) {
            self.up.insert(path);
        }
    }

    fn expire(&mut self, now: Micros, out: &mut Out) {
        if let Stage::New { until } = &mut self.stage {
            let limit = *until.get_or_insert(now.after(self.config.hello_max));
            if limit <= now {
                self.hangup("no Hello in time".into(), out);
            }
        }
        let limit = self.config.silence_max;
        let serving = matches!(self.stage, Stage::Serving { .. });
        if serving && self.silent_since.is_some_and(|since| since.after(limit) <= now) {
            self.hangup(format!("it said nothing for {limit:?}"), out);
        }
        self.expire_leases(now, out);
    }

    /// Silence counts from the moment at which something is held.
    fn attend(&mut self, now: Micros) {
        let held = self.leases.outstanding() > 0;
        self.silent_since = held.then(|| self.silent_since.unwrap_or(now));
    }
}
