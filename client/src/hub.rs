//! The ring of one shard, shared by all threads of a worker without a thread of its own.
//!
//! Whoever waits and finds the collector free becomes the leader: it polls, then sleeps on the bell, and
//! hands every completion to the table. Everybody else sleeps on a condition variable until the table has
//! theirs or the collector is free. A single thread therefore pays two uncontended locks and nothing else.
//!
//! Memory under a request belongs to it: the staging slot or arena slot of a put stays in the table until the
//! shard has answered, whether or not anybody still waits, so that no byte of the next block can end under
//! the name of the last.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kv_arena::FillGuard;
use kv_block::code::Code;
use kv_block::{BlockKey, Fault};
use kv_shm::{Collector, Completion, Outcome, Request, StagingSlot, Submission, Submitter};

use crate::error::{Error, timed_out};

/// What a request under way keeps alive.
#[derive(Debug)]
pub(crate) enum Hold {
    Nothing,
    Staging(#[allow(dead_code, reason = "kept for its drop")] StagingSlot),
    InPlace(#[allow(dead_code, reason = "kept for its drop")] FillGuard),
}

/// One shard's ring.
pub(crate) struct Hub {
    state: Mutex<State>,
    progress: Condvar,
    spins: u32,
}

struct State {
    submitter: Submitter,
    /// Taken out by the leader.
    collector: Option<Collector>,
    next_id: u64,
    entries: HashMap<u64, Entry>,
    followers: usize,
    dead: Option<Fault>,
}

struct Entry {
    /// Nobody waits for the outcome any more.
    alone: bool,
    undo: Undo,
    outcome: Option<Outcome>,
    hold: Hold,
}

/// What takes an outcome back that comes when nobody waits for it any more.
#[derive(Clone, Copy)]
enum Undo {
    Nothing,
    Release,
    Abort(BlockKey),
}

/// A request that was submitted; wait for it with [`Ticket::wait`] or give it up by dropping.
#[must_use]
pub(crate) struct Ticket<'a> {
    hub: &'a Hub,
    id: u64,
}

impl Ticket<'_> {
    /// The outcome of the request; ends a little after `until` at the latest, with the shard's own word if
    /// it has one.
    pub(crate) fn wait(self, asked: Instant, until: Instant) -> Result<Outcome, Error> {
        // The shard keeps the same deadline; its answer needs a moment to arrive, a longer one where processes
        // wait for a processor.
        let grace = (until.saturating_duration_since(asked) / 16).min(Duration::from_millis(100));
        let until = until + grace + Duration::from_millis(20);
        let mut state = self.hub.lock();
        loop {
            if state.entries.get(&self.id).is_some_and(|entry| entry.outcome.is_some()) {
                let entry = state.entries.remove(&self.id);
                drop(state);
                // Nothing is left that its drop would look for.
                std::mem::forget(self);
                return entry.and_then(|entry| entry.outcome).ok_or_else(|| timed_out("the request"));
            }
            if let Some(fault) = &state.dead {
                return Err(fault.clone().into());
            }
            if Instant::now() >= until {
                return Err(timed_out("the shard"));
            }
            state = self.hub.step(state, until);
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut state = self.hub.lock();
        match state.entries.get_mut(&self.id) {
            None => {}
            Some(entry) if entry.outcome.is_none() => entry.alone = true,
            // It was answered but nobody looked: same as answered later.
            Some(_) => {
                if let Some(entry) = state.entries.remove(&self.id) {
                    state.undo(&entry);
                }
                state.submitter.kick();
            }
        }
    }
}

impl Hub {
    pub(crate) fn new(submitter: Submitter, collector: Collector, spins: u32) -> Self {
        let state = State {
            submitter,
            collector: Some(collector),
            next_id: 1,
            entries: HashMap::new(),
            followers: 0,
            dead: None,
        };
        Self { state: Mutex::new(state), progress: Condvar::new(), spins }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends everything under way, and everything to come, with `fault`.
    pub(crate) fn fail(&self, fault: Fault) {
        self.lock().dead.get_or_insert(fault);
        self.progress.notify_all();
    }

    /// Puts a request into the ring, waiting for a free entry if need be, and wakes the shard if it sleeps,
    /// which costs a look.
    pub(crate) fn submit(&self, request: Request, hold: Hold, until: Instant) -> Result<Ticket<'_>, Error> {
        let mut state = self.lock();
        while state.dead.is_none() && state.is_full() {
            if Instant::now() >= until {
                return Err(timed_out("waiting for a ring entry"));
            }
            state.submitter.kick();
            state = self.step(state, until);
        }
        if let Some(fault) = &state.dead {
            return Err(fault.clone().into());
        }
        let id = state.push(request, hold, false, until)?;
        state.submitter.kick();
        Ok(Ticket { hub: self, id })
    }

    /// Submits without caring for the answer. Lost when the ring is full or dead, which the daemon makes up
    /// for when the session ends.
    pub(crate) fn post(&self, request: Request) {
        let mut state = self.lock();
        if state.is_full() {
            self.collect_now(&mut state);
        }
        if state.dead.is_none() && !state.is_full() {
            let soon = Instant::now() + Duration::from_secs(1);
            if state.push(request, Hold::Nothing, true, soon).is_ok() {
                state.submitter.kick();
            }
        }
    }

    /// Collects what has arrived, without waiting.
    pub(crate) fn collect(&self) {
        let mut state = self.lock();
        self.collect_now(&mut state);
    }

    /// Waits until something was answered, `until` at the latest. False when nothing is under way that
    /// could be.
    pub(crate) fn wait_for_any(&self, until: Instant) -> bool {
        let state = self.lock();
        if state.dead.is_some() || state.submitter.in_flight() == 0 {
            return false;
        }
        state.submitter.kick();
        drop(self.step(state, until));
        true
    }

    fn collect_now(&self, state: &mut State) {
        let Some(collector) = &mut state.collector else { return };
        let mut out = Vec::new();
        let polled = collector.poll(&mut out);
        state.settle(out, polled.map(|_| ()));
        self.wake_followers(state);
    }

    /// Lets time pass until something may have happened: as the leader, or behind one.
    fn step<'a>(&'a self, mut state: MutexGuard<'a, State>, until: Instant) -> MutexGuard<'a, State> {
        let left = until.saturating_duration_since(Instant::now());
        let Some(mut collector) = state.collector.take() else {
            state.followers += 1;
            let waited = self.progress.wait_timeout(state, left);
            let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.followers -= 1;
            return state;
        };
        drop(state);
        let mut out = Vec::new();
        let polled = collector.wait(self.spins, left, &mut out);
        let mut state = self.lock();
        state.collector = Some(collector);
        state.settle(out, polled.map(|_| ()));
        // One of them takes the collector if the leader goes.
        self.wake_followers(&state);
        state
    }

    fn wake_followers(&self, state: &State) {
        if state.followers > 0 {
            self.progress.notify_all();
        }
    }
}

impl State {
    fn is_full(&self) -> bool {
        self.submitter.in_flight() >= self.submitter.entries()
    }

    fn push(&mut self, request: Request, hold: Hold, alone: bool, until: Instant) -> Result<u64, Error> {
        let left = until.saturating_duration_since(Instant::now());
        let deadline_us = u32::try_from(left.as_micros()).unwrap_or(u32::MAX);
        let id = self.next_id;
        let undo = match request {
            Request::Acquire { .. } => Undo::Release,
            Request::Reserve { key, .. } => Undo::Abort(key),
            _ => Undo::Nothing,
        };
        let submission = Submission { id, deadline_us, request };
        self.submitter.submit(&submission).map_err(|_| {
            Fault::new(Code::QueueFull, "the ring is full").retry_after(Duration::from_millis(1))
        })?;
        self.next_id += 1;
        self.entries.insert(id, Entry { alone, undo, outcome: None, hold });
        Ok(id)
    }

    /// Files completions, and takes back those that nobody waits for.
    fn settle(&mut self, completions: Vec<Completion>, polled: Result<(), kv_shm::Error>) {
        let mut undone = false;
        for Completion { id, outcome } in completions {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            entry.outcome = Some(outcome);
            entry.hold = Hold::Nothing;
            if entry.alone
                && let Some(entry) = self.entries.remove(&id)
            {
                undone |= self.undo(&entry);
            }
        }
        if undone {
            self.submitter.kick();
        }
        if let Err(error) = polled {
            let code = match error {
                kv_shm::Error::Closed => Code::Unreachable,
                _ => Code::UnknownSession,
            };
            let fault = Fault::new(code, format!("the session with the daemon ended: {error}"));
            self.dead.get_or_insert(fault);
        }
    }

    fn undo(&mut self, entry: &Entry) -> bool {
        let request = match (entry.undo, entry.outcome) {
            (Undo::Release, Some(Outcome::Leased { lease, .. })) => Request::Release { lease },
            (Undo::Abort(key), Some(Outcome::Reserved { .. })) => Request::Abort { key },
            _ => return false,
        };
        let soon = Instant::now() + Duration::from_secs(1);
        self.push(request, Hold::Nothing, true, soon).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use kv_block::{Generation, LeaseId, SlotId};
    use kv_shm::{Layout, ShardEnd, WorkerStaging};

    use super::*;

    fn pair(entries: u32) -> (ShardEnd, Hub, WorkerStaging) {
        let layout = Layout::new(entries, 16 * kv_shm::PAGE).unwrap();
        let (shard, fds) = kv_shm::create(layout).unwrap();
        let worker = kv_shm::open(layout, fds).unwrap();
        (shard, Hub::new(worker.submitter, worker.collector, 10), worker.staging)
    }

    fn in_ms(ms: u64) -> Instant {
        Instant::now() + Duration::from_millis(ms)
    }

    /// Answers everything with what `answer` says, until told to stop; then hangs up.
    fn serve(
        mut shard: ShardEnd,
        stop: Arc<AtomicBool>,
        mut answer: impl FnMut(Submission) -> Option<Outcome> + Send + 'static,
    ) -> std::thread::JoinHandle<Vec<Request>> {
        std::thread::spawn(move || {
            let (mut taken, mut seen) = (Vec::new(), Vec::new());
            while !stop.load(Ordering::Relaxed) {
                if shard.ring.take(8, &mut taken).unwrap() == 0 {
                    if shard.ring.doze().unwrap() {
                        shard.ring.bell().wait(Duration::from_millis(1)).ok();
                        shard.ring.wake();
                    }
                    continue;
                }
                for submission in taken.drain(..).map(Result::unwrap) {
                    seen.push(submission.request);
                    if let Some(outcome) = answer(submission) {
                        shard.ring.push(&Completion { id: submission.id, outcome }).unwrap();
                    }
                }
                shard.ring.notify();
            }
            seen
        })
    }

    #[test]
    fn many_threads_share_one_ring_and_each_gets_its_own_answer() {
        let (shard, hub, _) = pair(8);
        let stop = Arc::new(AtomicBool::new(false));
        let lease_of = |submission: Submission| match submission.request {
            Request::Release { lease } => {
                Some(Outcome::Leased { lease, slot: SlotId(0), generation: Generation(1) })
            }
            _ => Some(Outcome::Done),
        };
        let shard = serve(shard, Arc::clone(&stop), lease_of);
        std::thread::scope(|scope| {
            for thread in 0..6u64 {
                let hub = &hub;
                scope.spawn(move || {
                    for turn in 0..500 {
                        let (asked, until) = (Instant::now(), in_ms(20_000));
                        let lease = LeaseId(thread << 32 | turn);
                        let ticket = hub.submit(Request::Release { lease }, Hold::Nothing, until).unwrap();
                        let outcome = ticket.wait(asked, until).unwrap();
                        assert!(matches!(outcome, Outcome::Leased { lease: mine, .. } if mine == lease));
                    }
                });
            }
        });
        stop.store(true, Ordering::Relaxed);
        shard.join().unwrap();
        assert!(hub.lock().entries.is_empty());
    }

    #[test]
    fn a_slot_stays_taken_until_the_shard_has_answered_even_when_nobody_waits() {
        let (mut shard, hub, staging) = pair(4);
        let slot = staging.take(16 * 4096).unwrap();
        let (asked, until) = (Instant::now(), in_ms(1));
        let ticket = hub.submit(Request::Ping, Hold::Staging(slot), until).unwrap();
        let gave_up = ticket.wait(asked, until).unwrap_err();
        assert_eq!(gave_up.code(), Some(Code::DeadlinePassed));
        hub.collect();
        assert!(staging.take(1).is_none(), "the shard may still read it");
        shard.ring.take(1, &mut Vec::new()).unwrap();
        shard.ring.push(&Completion { id: 1, outcome: Outcome::Done }).unwrap();
        hub.collect();
        assert!(staging.take(1).is_some());
    }

    #[test]
    fn a_lease_that_comes_too_late_is_given_back() {
        let (mut shard, hub, _) = pair(4);
        let key = BlockKey([1; 16]);
        let (asked, until) = (Instant::now(), in_ms(1));
        let ticket =
            hub.submit(Request::Acquire { key, wait: true, after: None }, Hold::Nothing, until).unwrap();
        ticket.wait(asked, until).unwrap_err();
        drop(
            hub.submit(
                Request::Reserve {
                    key,
                    binding: kv_block::BindingId(0),
                    priority: kv_block::Priority::Normal,
                    ttl_s: 0,
                    in_place: false,
                    after: None,
                },
                Hold::Nothing,
                in_ms(1000),
            )
            .unwrap(),
        );
        let mut taken = Vec::new();
        shard.ring.take(9, &mut taken).unwrap();
        let leased = Outcome::Leased { lease: LeaseId(7), slot: SlotId(0), generation: Generation(1) };
        shard.ring.push(&Completion { id: 1, outcome: leased }).unwrap();
        shard.ring.push(&Completion { id: 2, outcome: Outcome::Reserved { place: None } }).unwrap();
        hub.collect();
        taken.clear();
        shard.ring.take(9, &mut taken).unwrap();
        let requests: Vec<_> = taken.drain(..).map(|one| one.unwrap().request).collect();
        assert_eq!(requests, [Request::Release { lease: LeaseId(7) }, Request::Abort { key }]);
    }

    #[test]
    fn a_full_ring_waits_and_ends_at_its_deadline() {
        let (_shard, hub, _) = pair(2);
        let first = hub.submit(Request::Ping, Hold::Nothing, in_ms(1000)).unwrap();
        let second = hub.submit(Request::Ping, Hold::Nothing, in_ms(1000)).unwrap();
        let third = hub.submit(Request::Ping, Hold::Nothing, in_ms(5)).err().unwrap();
        assert_eq!(third.code(), Some(Code::DeadlinePassed));
        hub.post(Request::Ping);
        assert_eq!(hub.lock().entries.len(), 2, "what nobody waits for is dropped");
        drop((first, second));
    }

    #[test]
    fn a_daemon_that_goes_away_ends_every_wait() {
        let (shard, hub, _) = pair(4);
        std::thread::scope(|scope| {
            let waiting: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let (asked, until) = (Instant::now(), in_ms(60_000));
                        let ticket = hub.submit(Request::Ping, Hold::Nothing, until)?;
                        ticket.wait(asked, until)
                    })
                })
                .collect();
            drop(shard);
            for one in waiting {
                assert_eq!(one.join().unwrap().unwrap_err().code(), Some(Code::Unreachable));
            }
        });
        assert!(hub.submit(Request::Ping, Hold::Nothing, in_ms(10)).is_err());
    }
}
