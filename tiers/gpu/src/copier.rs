//! All copies of one device: many jobs at a time under a bound, on several streams, and never a wait.
//!
//! ```text
//!                    no room          least bytes of its way
//!  submit ---------> waits in line ---> stream: | copy, record an event | the next step | ...
//!     |   \           ^     |                                 |
//!  refused \          | passed                      poll: Queued, Step, Step, Ended with the hosts
//!           \-> waits for an event <--- the next step has one of its own
//!                 |
//!              cancel: ended
//! ```
//! A job is a list of steps, which go one behind the other on one stream: a layer each, say, so that an engine
//! computes with the first while the last is still under way. An open job gets its steps while it runs.
//!
//! What must hold is what [`copy`](crate::copy) promises: memory belongs to the job until an event behind its last
//! piece has passed. A call that fails ends no copy: what may be under way is waited for, and only then the job ends.
//! When the device is lost, or does not answer for 10 s, the job ends without its memory, which is kept.
//!
//! Each job that was taken ends once, with [`CopyDone::Ended`]. That two jobs do not meet in the same bytes is for
//! those who submit them to see to: on different streams they have no order but by events.
//!
//! A stream waits for nothing but itself. The event that a step waits for may be another process', which may hang or
//! die before it is reached; on a stream that many share it would hold up all of them, and for good. So the copier asks
//! the event, at each poll, and queues the step when it has passed. Until then the job is the caller's to cancel, others
//! go past it, and it counts for nothing on the device. That makes a step a poll later than the device could be; a
//! wait without an end would cost more. An event must have been recorded when a step that waits for it is given: one
//! that never was counts as passed. One that is recorded again meanwhile is waited for again.

mod job;
mod lane;
mod method;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use kv_arena::{Held, Slot};

use crate::Error;
use crate::device::Device;
use crate::in_use::SETTLE;
use crate::kernel::{Kernels, Reach};
use crate::memory::DeviceMemory;
use crate::stream::{Event, until};

use job::{Pending, Work};
use lane::{Lane, Mark};
use method::{By, Chosen};

/// Bounds of a [`Copier`], and how it copies.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopierConfig {
    /// Streams for jobs up and as many for jobs down that are not urgent. Urgent jobs have one more each way, and
    /// copies from device to device two. A device serves eight streams of a process at once, if
    /// `CUDA_DEVICE_MAX_CONNECTIONS` does not say otherwise: see [`crate::Driver::load`].
    pub streams_each_way: usize,
    /// Jobs that have something on the device at once.
    pub under_way_max: usize,
    /// Bytes on the device at once. A step that is more goes alone.
    pub under_way_bytes_max: u64,
    /// Jobs that wait for room on the device; more are refused. As many again, and as many as may be under way, may
    /// wait for the event of their first step.
    pub waiting_max: usize,
    /// How pages are copied.
    pub method: Method,
}

impl Default for CopierConfig {
    fn default() -> Self {
        Self {
            streams_each_way: 2,
            under_way_max: 64,
            under_way_bytes_max: 256 << 20,
            waiting_max: 4096,
            method: Method::Auto,
        }
    }
}

/// How pages are copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    /// By what the driver has, how long the pieces are, and whether kernels of several processes run at once (MPS).
    Auto,
    /// A kernel that gathers and scatters. Without MPS others on the device wait while it runs.
    Kernel,
    /// The driver's batched copy, of CUDA 12.8 and newer.
    Batch,
    /// A call for each piece.
    Loop,
}

/// The caller's name for a job. One that has ended may be used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct JobToken(pub u64);

/// The other side of a copy. It says the direction too.
#[derive(Debug)]
pub enum Hosts {
    /// Blocks of the arena, which are copied up to the device.
    From(Vec<Held>),
    /// Slots of the arena, which are filled from the device.
    To(Vec<Slot>),
    /// Memory of this or another device, which is read.
    FromDevice(Vec<DeviceMemory>),
    /// Memory of this or another device, which is written.
    ToDevice(Vec<DeviceMemory>),
}

/// Bytes and their two places.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PagePiece {
    /// Which of the job's memories.
    pub memory: u32,
    /// Where in that.
    pub device_offset: u64,
    /// Which of the other side.
    pub other: u32,
    /// Where in that.
    pub other_offset: u64,
    /// How many.
    pub bytes: u64,
}

/// A part of a job with a beginning and an end that others can be told of.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// The step is not queued before this has passed, and what comes after it in the job neither. Of any device or
    /// process, and recorded already. An error when it is asked ends the job as a call that failed; how long it may take
    /// is for the caller to say, with [`Copier::cancel`].
    pub after: Option<Arc<Event>>,
    /// What it copies, in any order.
    pub pieces: Vec<PagePiece>,
    /// Recorded when all of that is copied. Of the copier's device. Not recorded when the step is never begun or a
    /// call fails.
    pub then: Option<Arc<Event>>,
}

/// Copies between memories of the device and another side.
///
/// One whose first step waits for an event is not begun: others go past it, and when the event has passed it joins the
/// end of its line. One that is begun and waits for the event of a later step has nobody's place meanwhile either.
#[derive(Debug)]
pub struct Job {
    /// Its name; none that is taken now.
    pub token: JobToken,
    /// Memories of the copier's device.
    pub memories: Vec<DeviceMemory>,
    /// The other side.
    pub hosts: Hosts,
    /// One after the other.
    pub steps: Vec<Step>,
    /// More steps follow. An open job ends when its last step was given, or when it is cancelled, and not before.
    pub open: bool,
    /// Goes before others: past those that wait, and on a stream that the device serves first.
    pub urgent: bool,
}

/// What became of a job.
#[derive(Debug)]
pub enum CopyDone {
    /// All the steps that it began with are on the device, and so their events are recorded. A job of which a call
    /// failed, or which was cancelled before, is never said to be.
    Queued {
        /// Which job.
        token: JobToken,
    },
    /// Steps are done.
    Step {
        /// Of which job.
        token: JobToken,
        /// How many, from the first on.
        steps: usize,
    },
    /// It is over, and nothing more is said of it.
    Ended {
        /// Which job.
        token: JobToken,
        /// What it was given. `None`: the device may still be using it, so it is kept. If the device is lost
        /// ([`Device::lost`]), that ends with its context. If it is not, it only did not answer for 10 s, and may still
        /// come to it: then all else that the copy touches must never be used again either. The job's memories and what
        /// it was given are kept here; what the caller has of its own, such as a reservation of the place that is
        /// written or a promise that nobody else writes it, is the caller's to forget (`std::mem::forget`).
        hosts: Option<Hosts>,
        /// Whether all of it was copied.
        result: Result<(), Error>,
    },
}

/// Steps of one job that wait for room on the device, at most.
const STEPS_WAITING_MAX: usize = 4096;
/// Events that are kept to be used again.
const EVENTS_IDLE_MAX: usize = 1024;

/// How far a job was queued.
enum Fed {
    /// To the end of what it has.
    All,
    /// To where there was no room for more.
    NoRoom,
    /// To a step whose event has not passed, or does not say.
    Blocked(Result<bool, Error>),
}

/// The copies of one device. It belongs to one thread, whose calls it never makes wait; dropped, it waits for the
/// device, for 10 s.
pub struct Copier {
    device: Device,
    config: CopierConfig,
    chosen: Chosen,
    lanes: Vec<Lane>,
    /// All that were taken and have not ended.
    jobs: BTreeMap<JobToken, Work>,
    /// Jobs that are not begun: the urgent ones, and the others.
    waiting: [VecDeque<JobToken>; 2],
    /// Jobs that are under way with steps that are not: before all that are not begun.
    hungry: VecDeque<JobToken>,
    /// Jobs whose next step waits for an event, begun or not. They are in none of the lines.
    blocked: Vec<JobToken>,
    events: Vec<Event>,
    under_way: usize,
    under_way_bytes: u64,
    /// What the next poll says.
    told: Vec<CopyDone>,
}

impl Copier {
    /// One for this device.
    pub fn new(device: &Device, config: CopierConfig) -> Result<Self, Error> {
        let lanes = lane::open(device, config.streams_each_way.max(1))?;
        Ok(Self {
            device: device.clone(),
            chosen: Chosen::of(device, config.method)?,
            config,
            lanes,
            jobs: BTreeMap::new(),
            waiting: Default::default(),
            hungry: VecDeque::new(),
            blocked: Vec::new(),
            events: Vec::new(),
            under_way: 0,
            under_way_bytes: 0,
            told: Vec::new(),
        })
    }

    /// Takes a job, or gives it back as it was. Nothing of a job that is refused is copied.
    #[expect(clippy::result_large_err, reason = "what was given comes back as it was")]
    pub fn submit(&mut self, mut job: Job) -> Result<(), (Job, Error)> {
        match self.plan(&mut job) {
            Ok((planned, passed)) => {
                let token = job.token;
                self.jobs.insert(token, planned.of(job));
                self.put(token, passed);
                self.pump();
                Ok(())
            }
            Err(error) => Err((job, error)),
        }
    }

    /// Gives an open job its next step; `last` closes it. A step that is refused changes nothing: the job is as open
    /// as it was, and the caller's to go on with or to cancel. That there is no such job, or that it takes no more, is
    /// an error too: it may have failed a moment ago, and then its end is told by the next poll.
    pub fn add(&mut self, token: JobToken, step: Step, last: bool) -> Result<(), Error> {
        let no_job = || Error::NoJob { token: token.0 };
        let work = self.jobs.get_mut(&token).filter(|work| work.open).ok_or_else(no_job)?;
        if work.pending.len() >= STEPS_WAITING_MAX {
            return Err(Error::Busy { device: self.device.facts().ordinal, waiting: work.pending.len() });
        }
        let pieces = work.plan(&self.device, &step)?;
        work.open = !last;
        work.pending.push_back(Pending::of(step, pieces));
        // Else it is in a line already, or waits for an event of another step.
        if work.lane.is_some() && !self.hungry.contains(&token) && !self.blocked.contains(&token) {
            self.hungry.push_back(token);
        }
        self.pump();
        self.finish(token);
        Ok(())
    }

    /// What of a job is not queued is not begun, and it takes no more steps. It ends when the device is done with the
    /// rest; as ever, when all of it was queued already. A token that nobody has is nothing to cancel.
    pub fn cancel(&mut self, token: JobToken) {
        let Some(work) = self.jobs.get_mut(&token) else { return };
        if work.open || !work.pending.is_empty() || work.lane.is_none() {
            work.stop(Error::Cancelled);
        }
        self.finish(token);
        self.pump();
    }

    /// Says what happened since it was asked last. It never waits for the device.
    pub fn poll(&mut self, done: &mut Vec<CopyDone>) {
        self.look();
        for token in std::mem::take(&mut self.blocked) {
            let passed = self.jobs.get(&token).map_or(Ok(true), Work::is_passed);
            self.put(token, passed);
        }
        self.pump();
        done.append(&mut self.told);
    }

    /// Whether every job that was taken has ended and said so.
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty() && self.told.is_empty()
    }

    /// Jobs and bytes that the device has.
    pub fn under_way(&self) -> (usize, u64) {
        (self.under_way, self.under_way_bytes)
    }

    /// Jobs that wait for room on the device, and not for an event.
    pub fn waiting(&self) -> usize {
        self.waiting.iter().map(VecDeque::len).sum()
    }

    /// How it copies: what was asked for, if it can be had.
    pub fn method(&self) -> Method {
        self.chosen.method
    }

    /// Why it copies so, in words.
    pub fn method_why(&self) -> &str {
        &self.chosen.why
    }

    /// Its kernels, if it has any.
    pub fn kernels(&self) -> Option<&Kernels> {
        self.chosen.kernels.as_ref()
    }

    /// With [`Method::Auto`], a step that may go by kernel is left to the driver if its pieces are longer than this on
    /// average. Whoever has measured it for the device may say so.
    pub fn set_kernel_piece_bytes_max(&mut self, bytes: u64) {
        self.chosen.kernel_piece_bytes_max = Some(bytes);
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// With whether what the first step waits for has passed.
    fn plan(&self, job: &mut Job) -> Result<(job::Planned, Result<bool, Error>), Error> {
        let ordinal = self.device.facts().ordinal;
        if self.jobs.contains_key(&job.token) {
            return Err(Error::JobTwice { token: job.token.0 });
        }
        let steps = job.steps.len();
        if steps > STEPS_WAITING_MAX {
            return Err(Error::Busy { device: ordinal, waiting: steps });
        }
        self.device.is_there()?;
        let planned = job::plan(&self.device, self.chosen.kernels.as_ref(), job)?;
        let passed = job.steps.first().map_or(Ok(true), |step| job::is_passed(step.after.as_ref()));
        let (waiting, is_refused) = match passed {
            Ok(true) => {
                let waiting = self.waiting();
                let is_full = waiting >= self.config.waiting_max;
                (waiting, is_full && !self.is_next(job.urgent, planned.bytes()))
            }
            _ => {
                let most = self.config.waiting_max.saturating_add(self.config.under_way_max.max(1));
                (self.blocked.len(), self.blocked.len() >= most)
            }
        };
        if is_refused {
            return Err(Error::Busy { device: ordinal, waiting });
        }
        Ok((planned, passed))
    }

    /// Puts a job where it belongs, when the event of its next step was asked: into a line, or to those that wait.
    fn put(&mut self, token: JobToken, passed: Result<bool, Error>) {
        let Some(work) = self.jobs.get_mut(&token) else { return };
        match passed {
            Ok(true) => {
                work.goes_on();
                match work.lane {
                    Some(_) => self.hungry.push_back(token),
                    None => self.waiting[usize::from(!work.urgent)].push_back(token),
                }
            }
            Ok(false) => self.blocked.push(token),
            // The next look ends all jobs.
            Err(_) if self.device.lost().is_some() => self.blocked.push(token),
            Err(error) => {
                work.stop(error);
                self.finish(token);
            }
        }
    }

    /// Whether such a job would begin at once.
    fn is_next(&self, urgent: bool, bytes: u64) -> bool {
        let [urgent_ones, others] = &self.waiting;
        let is_first = urgent_ones.is_empty() && (urgent || others.is_empty());
        is_first && self.hungry.is_empty() && self.has_room(bytes)
    }

    fn has_room(&self, bytes: u64) -> bool {
        self.under_way < self.config.under_way_max.max(1) && self.has_room_for_step(bytes)
    }

    fn has_room_for_step(&self, bytes: u64) -> bool {
        let left = self.config.under_way_bytes_max.saturating_sub(self.under_way_bytes);
        bytes <= left || self.under_way_bytes == 0
    }

    /// Queues what there is room for, in order: steps of jobs that are under way, urgent jobs, the others. In the lines
    /// are none that wait for an event, so the first of a line waits for room alone.
    fn pump(&mut self) {
        loop {
            while let Some(token) = self.hungry.front().copied() {
                let passed = match self.feed(token) {
                    Fed::NoRoom => return,
                    Fed::Blocked(passed) => Some(passed),
                    Fed::All => None,
                };
                self.hungry.retain(|hungry| *hungry != token);
                match passed {
                    Some(passed) => self.put(token, passed),
                    None => self.finish(token),
                }
            }
            let line = usize::from(self.waiting[0].is_empty());
            let Some(token) = self.waiting[line].front().copied() else { return };
            let bytes = self.jobs.get(&token).map_or(0, Work::bytes_to_admit);
            if !self.has_room(bytes) {
                return;
            }
            self.waiting[line].pop_front();
            self.begin(token);
        }
    }

    /// Puts a job on the stream of its kind that has least to do.
    fn begin(&mut self, token: JobToken) {
        let Some(work) = self.jobs.get_mut(&token) else { return };
        let (direction, urgent) = (work.direction(), work.urgent);
        let fits = |(_, lane): &(usize, &Lane)| lane.direction == direction && lane.urgent == urgent;
        let lanes = self.lanes.iter().enumerate().filter(fits);
        work.lane = lanes.min_by_key(|(_, lane)| lane.load()).map(|(lane, _)| lane);
        work.admitted = work.to_admit().count();
        self.hungry.push_back(token);
    }

    /// Queues what a job has to be queued.
    fn feed(&mut self, token: JobToken) -> Fed {
        while let Some(work) = self.jobs.get_mut(&token) {
            let Some(step) = work.pending.front() else { break };
            if step.after.is_some() {
                // Who puts it in line again looks at the steps behind it too.
                return Fed::Blocked(work.is_passed());
            }
            let by = self.chosen.by(work.direction(), &step.pieces, work.reach.is_some());
            let (is_admitted, is_begun, bytes) = (work.admitted > 0, work.on_device > 0, step.bytes);
            let has_room = if is_begun { self.has_room_for_step(bytes) } else { self.has_room(bytes) };
            if by == By::Wait || !(is_admitted || has_room) {
                return Fed::NoRoom;
            }
            self.queue_next(token, by);
        }
        if let Some(work) = self.jobs.get_mut(&token).filter(|work| work.stopped.is_none() && !work.told) {
            work.told = true;
            self.told.push(CopyDone::Queued { token });
        }
        Fed::All
    }

    /// Queues the next step of a job that has a lane. When a call fails, the job gets no further.
    fn queue_next(&mut self, token: JobToken, by: By) {
        let Some(work) = self.jobs.get_mut(&token) else { return };
        let (Some(step), Some(lane)) = (work.pending.pop_front(), work.lane) else { return };
        work.admitted = work.admitted.saturating_sub(1);
        let lane = &mut self.lanes[lane];
        let event = match self.events.pop().map_or_else(|| self.device.event(false), Ok) {
            Ok(event) => event,
            // Nothing of this step is queued.
            Err(error) => return work.stop(error),
        };
        let (direction, near) = (work.direction(), Reach::default());
        let reach = work.reach.as_ref().unwrap_or(&near);
        let (tables, queued) = self.chosen.queue(by, &lane.stream, direction, &step.pieces, reach);
        let told = queued.and_then(|()| step.then.as_ref().map_or(Ok(()), |then| then.record(&lane.stream)));
        // Whatever failed, part of it may be under way: from here on only the device gives the memory back.
        let recorded = event.record(&lane.stream);
        let (is_step, event) = (told.is_ok(), recorded.is_ok().then_some(event));
        let failed = told.and(recorded).err();
        let bytes = step.bytes;
        lane.bytes += bytes;
        self.under_way_bytes += bytes;
        // An open job that waits for its steps takes nobody's place.
        self.under_way += usize::from(work.on_device == 0);
        work.on_device += 1;
        lane.marks.push_back(Mark { token, event, bytes, is_step, tables, _then: step.then });
        if let Some(error) = failed {
            work.stop(error);
        }
    }

    /// Takes from the lanes what the device has passed.
    fn look(&mut self) {
        for lane in 0..self.lanes.len() {
            loop {
                let idle = &mut self.events;
                let made = || idle.pop().map_or_else(|| self.device.event(false), Ok);
                match self.lanes[lane].passed(made) {
                    lane::Passed::Mark(mark) => self.pass(lane, mark),
                    lane::Passed::None => break,
                    lane::Passed::NoAnswer(error) => {
                        // If it is lost, that is of all lanes, and below.
                        if self.device.is_well().is_ok() {
                            self.give_up(lane, &error);
                        }
                        break;
                    }
                }
            }
        }
        if let Err(lost) = self.device.is_there() {
            self.lose(&lost);
        }
    }

    fn pass(&mut self, lane: usize, mark: Mark) {
        let Mark { token, event, bytes, is_step, tables, .. } = mark;
        self.chosen.give_back(tables);
        self.lanes[lane].bytes -= bytes;
        self.under_way_bytes -= bytes;
        self.events.extend(event.filter(|_| self.events.len() < EVENTS_IDLE_MAX));
        let Some(work) = self.jobs.get_mut(&token) else { return };
        work.on_device -= 1;
        self.under_way -= usize::from(work.on_device == 0);
        if is_step {
            work.done += 1;
            match self.told.last_mut() {
                Some(CopyDone::Step { token: last, steps }) if *last == token => *steps = work.done,
                _ => self.told.push(CopyDone::Step { token, steps: work.done }),
            }
        }
        self.finish(token);
    }

    /// Ends a job if nothing of it is to come.
    fn finish(&mut self, token: JobToken) {
        if self.jobs.get(&token).is_some_and(Work::is_over) {
            self.end(token, None);
        }
    }

    /// Ends a job: with its hosts if the device has nothing of it.
    fn end(&mut self, token: JobToken, error: Option<&Error>) {
        let Some(work) = self.jobs.remove(&token) else { return };
        self.blocked.retain(|blocked| *blocked != token);
        match work.lane {
            Some(_) => self.hungry.retain(|hungry| *hungry != token),
            None => self.waiting[usize::from(!work.urgent)].retain(|waiting| *waiting != token),
        }
        let result = match (work.stopped, error) {
            (Some(stopped), _) => Err(stopped),
            (None, Some(error)) => Err(error.clone()),
            (None, None) => Ok(()),
        };
        let hosts = if work.on_device == 0 {
            Some(work.used.hosts)
        } else {
            self.under_way -= 1;
            let lane = work.lane.map(|lane| self.lanes[lane].stream.clone());
            job::keep(work.used, &self.device, lane);
            None
        };
        self.told.push(CopyDone::Ended { token, hosts, result });
    }

    /// A lane does not answer: its jobs end without their memory.
    fn give_up(&mut self, lane: usize, error: &Error) {
        let marks = self.lanes[lane].clear();
        self.under_way_bytes -= marks.iter().map(|mark| mark.bytes).sum::<u64>();
        for mark in &marks {
            self.end(mark.token, Some(error));
        }
        if self.device.lost().is_none() && !marks.is_empty() {
            self.chosen.forget(marks.iter().map(|mark| mark.tables.len()).sum());
            std::mem::forget(marks);
        }
    }

    fn lose(&mut self, lost: &Error) {
        for lane in 0..self.lanes.len() {
            self.give_up(lane, lost);
        }
        while let Some(token) = self.jobs.first_key_value().map(|(token, _)| *token) {
            self.end(token, Some(lost));
        }
        self.hungry.clear();
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        // What is not begun is not the device's.
        let begun = |work: &Work| work.on_device > 0;
        let _ = until(SETTLE, || {
            self.look();
            Ok(!self.jobs.values().any(begun))
        });
        for lane in 0..self.lanes.len() {
            self.give_up(lane, &Error::Cancelled);
        }
    }
}
