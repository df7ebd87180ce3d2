//! Probes and offers: questions that the owner answers once. One whose time is over is kept until its answer comes,
//! so that an answer nobody asked for is known for what it is.

use kv_block::BlockKey;
use kv_wire::frame::ITEMS_MAX;
use kv_wire::message::{Ask, Found, Offer, Probe, Taken};

use super::ReaderCommand;
use super::machine::{Out, Reader, Timer, Trial};
use crate::health::{Proof, Strike};
use crate::{Micros, OFFERS_MAX, PROBES_MAX};

/// A question on its way, or one whose answer nobody waits for any more. On the wire it has a number of its own.
#[derive(Debug)]
pub(super) struct Question {
    /// What the node calls it.
    id: u64,
    kind: Kind,
    /// How many blocks it is about.
    keys: usize,
    deadline: Micros,
    /// `None` when it was said.
    unsaid: Option<Ask>,
    /// The node has its answer.
    ended: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Probe,
    Offer,
}

impl Reader {
    pub(super) fn probe(
        &mut self,
        now: Micros,
        id: u64,
        principal: u8,
        keys: Vec<BlockKey>,
        deadline: Micros,
        out: &mut Out,
    ) {
        let (number, count) = (self.number(), keys.len());
        let unsaid = Some(Ask::Probe(Probe { id: number, principal, keys }));
        let question = Question { id, kind: Kind::Probe, keys: count, deadline, unsaid, ended: false };
        self.ask(now, number, principal, question, out);
    }

    pub(super) fn offer(&mut self, now: Micros, mut offer: Offer, deadline: Micros, out: &mut Out) {
        let number = self.number();
        let (id, principal, keys) =
            (std::mem::replace(&mut offer.id, number), offer.principal, offer.keys.len());
        let unsaid = Some(Ask::Offer(offer));
        let question = Question { id, kind: Kind::Offer, keys, deadline, unsaid, ended: false };
        self.ask(now, number, principal, question, out);
    }

    fn ask(&mut self, now: Micros, number: u64, principal: u8, question: Question, out: &mut Out) {
        let (kind, deadline) = (question.kind, question.deadline);
        let max = if kind == Kind::Probe { PROBES_MAX } else { OFFERS_MAX };
        let under_way = self.questions.values().filter(|other| other.kind == kind).count();
        let sound = deadline > now
            && question.keys <= ITEMS_MAX
            && usize::from(principal) < self.config.principals.len()
            && under_way < max;
        if !sound || !self.admit(now, Trial::Question(number)) {
            return unanswered(&question, out);
        }
        self.timers.insert((deadline, Timer::Question(number)));
        self.questions.insert(number, question);
        self.connect(now, out);
    }

    /// A question's time is over, or that of an answer which nobody waits for any more. Without an end, questions
    /// that are never answered would be all that there may be under way.
    pub(super) fn end_question(&mut self, now: Micros, number: u64, out: &mut Out) {
        self.end_trial(Trial::Question(number));
        let Some(question) = self.questions.get_mut(&number) else { return };
        if question.ended {
            let why = format!("it left a question unanswered for {:?}", self.config.silence_max);
            return self.hangup(now, Strike::Silent, why, out);
        }
        question.ended = true;
        unanswered(question, out);
        if question.unsaid.is_some() {
            self.questions.remove(&number);
        } else {
            question.deadline = now.after(self.config.silence_max);
            self.timers.insert((question.deadline, Timer::Question(number)));
        }
    }

    /// The connection is gone, and with it every answer.
    pub(super) fn end_questions(&mut self, out: &mut Out) {
        for (number, question) in std::mem::take(&mut self.questions) {
            self.timers.remove(&(question.deadline, Timer::Question(number)));
            if !question.ended {
                unanswered(&question, out);
            }
        }
    }

    pub(super) fn say_questions(&mut self, out: &mut Out) {
        let unsaid = self.questions.values_mut().filter_map(|question| question.unsaid.take());
        out.extend(unsaid.map(ReaderCommand::Say));
    }

    pub(super) fn found(&mut self, now: Micros, found: Found, out: &mut Out) -> Result<(), &'static str> {
        let keys = self.asked(found.id, Kind::Probe).ok_or("an answer to a probe that nobody made")?;
        if found.sights.len() != keys {
            return Err("a probe answered with another number of blocks");
        }
        if let Some(probe) = self.answered(now, found.id) {
            out.push(ReaderCommand::Probed { probe, found: Some(Found { id: probe, ..found }) });
        }
        Ok(())
    }

    pub(super) fn offer_taken(
        &mut self,
        now: Micros,
        taken: Taken,
        out: &mut Out,
    ) -> Result<(), &'static str> {
        let keys = self.asked(taken.id, Kind::Offer).ok_or("an answer to an offer that nobody made")?;
        if u64::from(taken.taken) + u64::from(taken.left) > keys as u64 {
            return Err("an offer answered with more blocks than it had");
        }
        if let Some(offer) = self.answered(now, taken.id) {
            out.push(ReaderCommand::Taken { offer, taken: Some(Taken { id: offer, ..taken }) });
        }
        Ok(())
    }

    /// How many blocks a question is about that was said.
    fn asked(&self, number: u64, kind: Kind) -> Option<usize> {
        let question = self.questions.get(&number)?;
        (question.kind == kind && question.unsaid.is_none()).then_some(question.keys)
    }

    /// Takes an answered question out; what the node calls it, if it still waits.
    fn answered(&mut self, now: Micros, number: u64) -> Option<u64> {
        let question = self.questions.remove(&number)?;
        self.timers.remove(&(question.deadline, Timer::Question(number)));
        self.health.proved(now, Proof::Answered);
        self.end_trial(Trial::Question(number));
        (!question.ended).then_some(question.id)
    }
}

fn unanswered(question: &Question, out: &mut Out) {
    out.push(match question.kind {
        Kind::Probe => ReaderCommand::Probed { probe: question.id, found: None },
        Kind::Offer => ReaderCommand::Taken { offer: question.id, taken: None },
    });
}
