//! The two rings of a session with one shard, and how either side sleeps without losing a wake-up.
//!
//! Single producer, single consumer, each way. A side trusts only the indices it keeps itself:
//! - the worker has at most as many submissions in flight (published, completion not yet collected) as the
//!   ring has entries, so an entry is never overwritten before it was taken;
//! - the shard takes a submission only while its completion is sure to find room, so a worker that does
//!   not collect, or lies about it, stops itself and nobody else.
//!
//! Sleeping: set `asleep`, full fence, look once more, wait for the bell. Waking: publish, full fence, see
//! `asleep`, clear it, ring. The fences order one side's publish against the other's last look, so at least
//! one of them sees the other. `loom` walks through all of it below.

use std::time::Duration;

use crate::Error;
use crate::bell::Bell;
#[cfg(loom)]
use crate::entry;
use crate::entry::{Completion, Entry, Malformed, Submission};
use crate::region::{Layout, Line, Region};
use crate::sync::{Arc, AtomicU32, Ordering, fence, spin_loop};

/// How far `ahead` is in front of `behind`; refused when that is more than the ring holds.
fn distance(ring: &'static str, ahead: u32, behind: u32, entries: u32) -> Result<u32, Error> {
    let distance = ahead.wrapping_sub(behind);
    if distance > entries { Err(Error::Index { ring, distance, entries }) } else { Ok(distance) }
}

/// Rings `bell` if the side that set `asleep` may be asleep. Called after something was published.
fn rouse(asleep: &Line, bell: &Bell) {
    fence(Ordering::SeqCst);
    if asleep.0.load(Ordering::Relaxed) == 1
        && asleep.0.compare_exchange(1, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    {
        bell.ring();
    }
}

/// The worker's end of the submission ring. One thread at a time.
pub struct Submitter {
    region: Arc<Region>,
    bell: Arc<Bell>,
    published: u32,
    /// Completions collected, told by the [`Collector`]; memory of this process alone.
    collected: Arc<AtomicU32>,
}

/// The worker's end of the completion ring. One thread at a time, another one than the [`Submitter`]'s if
/// you like.
pub struct Collector {
    region: Arc<Region>,
    bell: Arc<Bell>,
    seen: u32,
    collected: Arc<AtomicU32>,
}

/// The shard's end of both rings. Everything it reads was written by somebody who may mean harm.
pub struct ShardRing {
    region: Arc<Region>,
    bell: Bell,
    taken: u32,
    in_flight: u32,
    completed: u32,
}

pub(crate) fn worker_ends(region: &Arc<Region>, bell: Bell) -> (Submitter, Collector) {
    let (bell, collected) = (Arc::new(bell), Arc::new(AtomicU32::new(0)));
    let submitter = Submitter {
        region: Arc::clone(region),
        bell: Arc::clone(&bell),
        published: 0,
        collected: Arc::clone(&collected),
    };
    (submitter, Collector { region: Arc::clone(region), bell, seen: 0, collected })
}

impl Submitter {
    /// Puts one submission into the ring. The shard sees it at once when it is awake, else after
    /// [`Submitter::kick`]. `Full` when as many are in flight as the ring has entries.
    pub fn submit(&mut self, submission: &Submission) -> Result<(), Error> {
        let entries = self.entries();
        if self.in_flight() >= entries {
            return Err(Error::Full { entries });
        }
        self.region.submission(self.published).store(&submission.encode());
        self.published = self.published.wrapping_add(1);
        self.region.control().submission_tail.0.store(self.published, Ordering::Release);
        Ok(())
    }

    /// Wakes the shard if it sleeps: once after any number of submissions.
    pub fn kick(&self) {
        rouse(&self.region.control().shard_asleep, &self.bell);
    }

    /// Submissions whose completions were not collected yet.
    pub fn in_flight(&self) -> u32 {
        self.published.wrapping_sub(self.collected.load(Ordering::Acquire))
    }

    #[cfg(all(test, not(loom)))]
    pub(crate) fn region(&self) -> Arc<Region> {
        Arc::clone(&self.region)
    }

    /// Entries of the ring: as many submissions can be in flight.
    pub fn entries(&self) -> u32 {
        self.region.layout().entries()
    }
}

impl Collector {
    /// Appends all completions there are to `out` and tells how many. An error ends the session: the
    /// daemon's end of the ring makes no sense.
    pub fn poll(&mut self, out: &mut Vec<Completion>) -> Result<usize, Error> {
        let control = self.region.control();
        let tail = control.completion_tail.0.load(Ordering::Acquire);
        let count = distance("completion", tail, self.seen, self.region.layout().entries())?;
        for _ in 0..count {
            let entry = self.region.completion(self.seen).load();
            self.seen = self.seen.wrapping_add(1);
            out.push(parse_completion(&entry)?);
        }
        if count > 0 {
            control.completion_head.0.store(self.seen, Ordering::Release);
            self.collected.store(self.seen, Ordering::Release);
        }
        Ok(count as usize)
    }

    /// [`Collector::poll`] that first looks `spins` times, then sleeps up to `timeout`. Gives 0 when nothing
    /// came, or sometimes earlier: look at the clock and call again. `Closed` when the daemon is gone.
    pub fn wait(&mut self, spins: u32, timeout: Duration, out: &mut Vec<Completion>) -> Result<usize, Error> {
        for _ in 0..spins {
            if self.is_ready() {
                return self.poll(out);
            }
            spin_loop();
        }
        let control = self.region.control();
        control.worker_asleep.0.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let woken = if self.is_ready() { Ok(true) } else { self.bell.wait(timeout) };
        control.worker_asleep.0.store(0, Ordering::Relaxed);
        let count = self.poll(out)?;
        // What the daemon completed before it went away still counts.
        if count == 0 { woken.map(|_| 0) } else { Ok(count) }
    }

    fn is_ready(&self) -> bool {
        self.region.control().completion_tail.0.load(Ordering::Acquire) != self.seen
    }

    /// What the daemon rings; closed when the daemon is gone.
    pub fn bell(&self) -> &Bell {
        &self.bell
    }
}

impl ShardRing {
    pub(crate) fn new(region: Arc<Region>, bell: Bell) -> Self {
        Self { region, bell, taken: 0, in_flight: 0, completed: 0 }
    }

    /// Appends up to `max` submissions to `out` and tells how many; a malformed one counts, and wants an
    /// answer like every other. Work is bounded by `max` whatever the worker does. An error means that the
    /// worker wrote nonsense into its indices: close the session.
    pub fn take(&mut self, max: usize, out: &mut Vec<Result<Submission, Malformed>>) -> Result<usize, Error> {
        let count = (self.takeable()? as usize).min(max) as u32;
        for _ in 0..count {
            let entry = self.region.submission(self.taken).load();
            self.taken = self.taken.wrapping_add(1);
            out.push(parse_submission(&entry));
        }
        if count > 0 {
            self.in_flight += count;
            self.region.control().submission_head.0.store(self.taken, Ordering::Release);
        }
        Ok(count as usize)
    }

    /// Submissions that are there and whose completions would find room.
    fn takeable(&self) -> Result<u32, Error> {
        let (control, entries) = (self.region.control(), self.layout().entries());
        let tail = control.submission_tail.0.load(Ordering::Acquire);
        let waiting = distance("submission", tail, self.taken, entries)?;
        let head = control.completion_head.0.load(Ordering::Acquire);
        let uncollected = distance("completion", self.completed, head, entries)?;
        Ok(waiting.min(entries.saturating_sub(self.in_flight + uncollected)))
    }

    /// Answers one submission. The worker sees it at once when it is awake, else after
    /// [`ShardRing::notify`].
    pub fn push(&mut self, completion: &Completion) -> Result<(), Error> {
        self.in_flight = self.in_flight.checked_sub(1).ok_or(Error::Unsolicited)?;
        self.region.completion(self.completed).store(&completion.encode());
        self.completed = self.completed.wrapping_add(1);
        self.region.control().completion_tail.0.store(self.completed, Ordering::Release);
        Ok(())
    }

    /// Wakes the worker if it sleeps: once after any number of completions. At most one bell.
    pub fn notify(&self) {
        rouse(&self.region.control().worker_asleep, &self.bell);
    }

    /// Call before sleeping: true when nothing is there to take, and from now on the worker rings the bell.
    /// With many rings: doze on all of them, and sleep only if all agree.
    pub fn doze(&self) -> Result<bool, Error> {
        let asleep = &self.region.control().shard_asleep.0;
        asleep.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.takeable()? == 0 {
            return Ok(true);
        }
        asleep.store(0, Ordering::Relaxed);
        Ok(false)
    }

    /// Call after sleeping: the worker need not ring any more.
    pub fn wake(&self) {
        self.region.control().shard_asleep.0.store(0, Ordering::Relaxed);
    }

    /// What the worker rings. Wait until it is readable, then [`Bell::drain`] it.
    pub fn bell(&self) -> &Bell {
        &self.bell
    }

    /// Taken submissions that were not answered yet.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Sizes of the memory.
    pub fn layout(&self) -> Layout {
        self.region.layout()
    }
}

#[cfg(not(loom))]
fn parse_submission(entry: &Entry) -> Result<Submission, Malformed> {
    Submission::decode(entry)
}

#[cfg(not(loom))]
fn parse_completion(entry: &Entry) -> Result<Completion, Malformed> {
    Completion::decode(entry)
}

// The model's entries are one word long: the id is all there is.
#[cfg(loom)]
fn parse_submission(entry: &Entry) -> Result<Submission, Malformed> {
    let id = u64::from_le_bytes(entry[..8].try_into().expect("eight bytes"));
    Ok(Submission { id, deadline_us: 0, request: entry::Request::Ping })
}

#[cfg(loom)]
fn parse_completion(entry: &Entry) -> Result<Completion, Malformed> {
    let id = u64::from_le_bytes(entry[..8].try_into().expect("eight bytes"));
    Ok(Completion { id, outcome: entry::Outcome::Done })
}

#[cfg(all(test, loom))]
mod model {
    use loom::thread;

    use super::*;
    use crate::entry::{Outcome, Request};

    /// `count` submissions, one after another or `in_flight` at once, each answered; both sides sleep
    /// whenever they find nothing. Without time in the model, a lost wake-up is a deadlock, which loom
    /// reports.
    fn exchange(count: u64, in_flight: u64) {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(move || {
            let region = Region::model(Layout::new(2, 0).unwrap());
            let (worker, shard) = Bell::pair().unwrap();
            let (mut submitter, mut collector) = worker_ends(&region, worker);
            let mut shard = ShardRing::new(region, shard);
            let serving = thread::spawn(move || {
                let (mut answered, mut taken) = (0, Vec::new());
                while answered < count {
                    if shard.take(2, &mut taken).unwrap() == 0 {
                        if shard.doze().unwrap() {
                            shard.bell().wait(Duration::ZERO).unwrap();
                            shard.wake();
                        }
                        continue;
                    }
                    for submission in taken.drain(..) {
                        let id = submission.unwrap().id;
                        assert_eq!(id, answered, "an entry was lost, doubled or torn");
                        shard.push(&Completion { id, outcome: Outcome::Done }).unwrap();
                        answered += 1;
                    }
                    shard.notify();
                }
            });
            let (mut sent, mut got) = (0, Vec::new());
            while (got.len() as u64) < count {
                while sent < count && sent - (got.len() as u64) < in_flight {
                    submitter
                        .submit(&Submission { id: sent, deadline_us: 0, request: Request::Ping })
                        .unwrap();
                    sent += 1;
                }
                submitter.kick();
                collector.wait(0, Duration::ZERO, &mut got).unwrap();
            }
            assert!(got.iter().map(|completion| completion.id).eq(0..count));
            serving.join().unwrap();
        });
    }

    #[test]
    fn no_wake_up_is_lost_one_at_a_time() {
        exchange(2, 1);
    }

    #[test]
    fn no_wake_up_is_lost_with_two_in_flight() {
        exchange(3, 2);
    }
}
