//! What one queue pair is to do, and what became of it: a state machine, without a device.
//!
//! ```text
//!   operations --> queue (ours, first come first served) --> requests under way, at most `depth` --> completions
//!   reader   Read      waits -> pieces are read -> all have come -> to be checked
//!   owner    Expose    waits for a window -> is bound -> Exposed .. Conceal -> is invalidated -> Concealed
//! ```
//! It holds the memory of everything that it was given. When the queue pair fails, nothing new begins, and
//! [`Flow::dismantle`] gives all of it to whoever ends the queue pair first: only then nothing reads or writes it.

use std::collections::{BTreeMap, VecDeque};

use kv_arena::{Held, Slot};
use kv_block::Record;
use kv_transport::Micros;
use kv_transport::link::{LinkDone, LinkError};
use kv_wire::message::{ReadId, WantId, Window};

use crate::memory::Place;

/// What bounds a flow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Requests under way, besides the two that say something.
    pub(crate) depth: u32,
    /// Longest single read.
    pub(crate) message_bytes_max: u32,
    /// Path number, for windows.
    pub(crate) path: u8,
    /// After this long without an answer of the peer's device it is asked for one.
    pub(crate) beat: u64,
    /// After this long without an answer, though one is owed, the peer counts as gone.
    pub(crate) silence: u64,
    /// How long the device may take to give back what it flushes, and the peer to take a goodbye.
    pub(crate) grace: u64,
}

/// A window of the pool: its number there and a key that it did not have before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Loan {
    pub(crate) window: u32,
    pub(crate) key: u32,
}

/// How a flow comes to keys.
pub(crate) enum Supply<'a> {
    /// From a pool of windows: a loan, or `Ok(None)` when one is on its way.
    Windows(&'a mut dyn FnMut() -> Result<Option<Loan>, LinkError>),
    /// By a region for each block, made elsewhere.
    Regions,
}

/// What peers say to each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Word {
    /// Are you there? The device answers by itself.
    Beat = 1,
    /// This end closes.
    Bye = 2,
}

/// A request for the device, in this order.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    /// Reads a piece.
    Read { from: u64, remote_key: u32, to: u64, local_key: u32, bytes: u32 },
    /// Binds a window.
    Bind { loan: Loan, place: Place, bytes: u32 },
    /// Ends its key.
    Invalidate { loan: Loan },
    /// Says something.
    Say(Word),
}

/// Names a request under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Token(pub(crate) u32);

impl Token {
    const BEAT: Self = Self(u32::MAX);
    const BYE: Self = Self(u32::MAX - 1);
}

/// What a flow wants done.
pub(crate) enum Output<R> {
    /// Post this.
    Post(Token, Step),
    /// Register a block that this flow holds: [`Flow::registered`] follows.
    Register { want: WantId, start: usize, bytes: usize, at: u64 },
    /// Close its region: [`Flow::deregistered`] follows.
    Deregister { want: WantId, region: R },
    /// A window is free.
    Return(Loan),
    /// Something ended.
    Done(LinkDone),
    /// A read has come and is to be checked.
    Check { read: ReadId, into: Slot, record: Record },
}

/// How a request failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault<'a> {
    /// The peer's device does not let us read that.
    Access,
    /// It never began, or was cut off: another one failed before.
    Flushed,
    /// Otherwise, in the library's words.
    Other(&'a str),
}

#[derive(Clone, Copy, Debug)]
enum Next {
    Read(ReadId),
    Bind(WantId),
    Unbind(WantId),
}

#[derive(Clone, Copy, Debug)]
enum Posted {
    Read(ReadId),
    Bind(WantId),
    Unbind(WantId),
}

#[derive(Debug)]
struct Reading {
    into: Slot,
    record: Record,
    to: Place,
    window: Window,
    /// Bytes that were asked for.
    asked: u32,
    /// Pieces under way.
    pieces: u32,
    cancelled: bool,
    /// The peer's device refused it.
    refused: bool,
}

#[derive(Debug)]
enum Grip<R> {
    /// In the queue, or its region is being made.
    Waiting,
    /// By this window; under way or standing.
    Binding(Loan),
    Bound(Loan),
    Unbinding(Loan),
    /// By a region of its own.
    Region(R),
    /// That is being closed.
    Closing,
}

#[derive(Debug)]
struct Exposure<R> {
    block: Held,
    place: Place,
    grip: Grip<R>,
    conceal: bool,
}

/// Where the end of a path stands.
#[derive(Clone, PartialEq, Eq, Debug)]
enum State {
    Open,
    /// The goodbye is on its way.
    Closing {
        since: Micros,
    },
    /// Nothing works any more; what is under way is coming back as flushed.
    Failing {
        since: Micros,
        why: LinkError,
        /// Somebody said why, and not only that.
        certain: bool,
    },
}

/// What is left of a flow. The memory in here may still be read or written by the device until the queue pair
/// is closed, the windows too, and the regions.
pub(crate) struct Remains<R> {
    /// Everything that was under way, ended.
    pub(crate) dones: Vec<LinkDone>,
    /// Blocks whose exposure failed: let go of.
    pub(crate) blocks: Vec<Held>,
    /// Windows that are bound.
    pub(crate) loans: Vec<Loan>,
    /// Regions that are open.
    pub(crate) regions: Vec<R>,
    /// Some of what was under way never comes back.
    pub(crate) lost: bool,
    /// Why.
    pub(crate) why: LinkError,
}

/// One queue pair's work.
pub(crate) struct Flow<R> {
    limits: Limits,
    state: State,
    queue: VecDeque<Next>,
    posted: Vec<Option<Posted>>,
    free: Vec<u32>,
    reads: BTreeMap<ReadId, Reading>,
    wants: BTreeMap<WantId, Exposure<R>>,
    /// Pieces of reads that the device has.
    pieces: u32,
    /// Regions that are being made or closed, by others, with blocks of ours.
    elsewhere: u32,
    /// The last time that the peer's device answered, or owed no answer.
    heard: Micros,
    beat_at: Micros,
    beating: bool,
    leaving: bool,
    /// Something never comes back.
    lost: bool,
    out: Vec<Output<R>>,
}

impl<R> Flow<R> {
    pub(crate) fn new(limits: Limits, now: Micros) -> Self {
        Self {
            limits,
            state: State::Open,
            queue: VecDeque::new(),
            posted: (0..limits.depth).map(|_| None).collect(),
            free: (0..limits.depth).rev().collect(),
            reads: BTreeMap::new(),
            wants: BTreeMap::new(),
            pieces: 0,
            elsewhere: 0,
            heard: now,
            beat_at: now,
            beating: false,
            leaving: false,
            lost: false,
            out: Vec::new(),
        }
    }

    /// Takes what is to be done, in order.
    pub(crate) fn outputs(&mut self, into: &mut Vec<Output<R>>) {
        into.append(&mut self.out);
    }

    fn done(&mut self, done: LinkDone) {
        self.out.push(Output::Done(done));
    }

    fn is_open(&self) -> bool {
        self.state == State::Open
    }

    /// Whether the queue pair is to be put into error, so that all of it is flushed.
    pub(crate) fn is_failing(&self) -> bool {
        matches!(self.state, State::Failing { .. })
    }

    /// Whether it needs to be looked at soon even if nothing happens.
    pub(crate) fn is_ending(&self) -> bool {
        !self.is_open()
    }

    /// Why nothing begins here any more.
    fn refusal(&self) -> LinkError {
        match &self.state {
            State::Failing { why, .. } => why.clone(),
            _ => LinkError::Path { what: "this end is closed".to_owned() },
        }
    }

    /// Lets the peer read a block, which lies there for the device.
    pub(crate) fn expose(&mut self, want: WantId, block: Held, place: Option<Place>) {
        let refuse = if !self.is_open() {
            Some(self.refusal())
        } else if block.is_empty() {
            Some(LinkError::Unsupported { what: "a window of no bytes".to_owned() })
        } else if place.is_none() {
            Some(LinkError::Unsupported { what: "the block's memory is not registered".to_owned() })
        } else {
            None
        };
        match (refuse, place) {
            (None, Some(place)) => {
                self.wants.insert(want, Exposure { block, place, grip: Grip::Waiting, conceal: false });
                self.queue.push_back(Next::Bind(want));
            }
            (why, _) => {
                let why = why.unwrap_or_else(|| self.refusal());
                self.done(LinkDone::Exposed { want, result: Err(why) });
            }
        }
    }

    /// Ends that. What the flow does not know ended by itself.
    pub(crate) fn conceal(&mut self, want: WantId) {
        let Some(exposure) = self.wants.get_mut(&want).filter(|exposure| !exposure.conceal) else { return };
        exposure.conceal = true;
        if !matches!(exposure.grip, Grip::Waiting | Grip::Binding(_)) {
            self.release(want);
        }
    }

    /// Begins to take a standing exposure back.
    fn release(&mut self, want: WantId) {
        let Some(exposure) = self.wants.get_mut(&want) else { return };
        match std::mem::replace(&mut exposure.grip, Grip::Closing) {
            Grip::Region(region) => {
                self.elsewhere += 1;
                self.out.push(Output::Deregister { want, region });
            }
            bound => {
                exposure.grip = bound;
                self.queue.push_back(Next::Unbind(want));
            }
        }
    }

    /// Reads a block of the peer into a slot, which lies there for the device.
    pub(crate) fn read(
        &mut self,
        read: ReadId,
        window: Option<Window>,
        record: Record,
        into: Slot,
        place: Option<Place>,
    ) {
        let result = match (window, place) {
            _ if !self.is_open() => Err(self.refusal()),
            _ if (into.len() as u64) < u64::from(record.bytes) => {
                Err(LinkError::Unsupported { what: "a block that is longer than its slot".to_owned() })
            }
            (None, _) => Err(LinkError::Protocol { what: "a grant on this path carries a window" }),
            (_, None) => {
                Err(LinkError::Unsupported { what: "the slot's memory is not registered".to_owned() })
            }
            (Some(window), Some(to)) => match window.address.checked_add(record.bytes.into()) {
                None => Err(LinkError::Protocol { what: "a window lies within the address space" }),
                Some(_) => Ok((window, to)),
            },
        };
        match result {
            Err(why) => self.done(LinkDone::Read { read, into, result: Err(why) }),
            Ok(_) if record.bytes == 0 => self.out.push(Output::Check { read, into, record }),
            Ok((window, to)) => {
                let reading = Reading {
                    into,
                    record,
                    to,
                    window,
                    asked: 0,
                    pieces: 0,
                    cancelled: false,
                    refused: false,
                };
                self.reads.insert(read, reading);
                self.queue.push_back(Next::Read(read));
            }
        }
    }

    /// Ends a read early: at once if the device does not have it, else as soon as it is done with it.
    pub(crate) fn cancel(&mut self, read: ReadId) {
        let Some(reading) = self.reads.get_mut(&read) else { return };
        reading.cancelled = true;
        if reading.pieces == 0
            && let Some(reading) = self.reads.remove(&read)
        {
            self.done(LinkDone::Read { read, into: reading.into, result: Err(LinkError::Cancelled) });
        }
    }

    /// Hands as much of the queue to the device as it takes.
    pub(crate) fn fill(&mut self, supply: &mut Supply<'_>, now: Micros) {
        while self.is_open()
            && let Some(next) = self.queue.front()
        {
            let moved = match *next {
                Next::Read(read) => self.fill_read(read, now),
                Next::Bind(want) => self.fill_bind(want, supply),
                Next::Unbind(want) => self.fill_unbind(want),
            };
            if !moved {
                return;
            }
            self.queue.pop_front();
        }
    }

    fn post(&mut self, posted: Posted, step: Step) -> bool {
        let Some(token) = self.free.pop() else { return false };
        self.posted[token as usize] = Some(posted);
        self.out.push(Output::Post(Token(token), step));
        true
    }

    /// Whether the device has all of it.
    fn fill_read(&mut self, read: ReadId, now: Micros) -> bool {
        while let Some(reading) = self.reads.get(&read) {
            if reading.cancelled || reading.asked == reading.record.bytes {
                return true;
            }
            let (at, bytes) = (reading.asked, reading.record.bytes - reading.asked);
            let bytes = bytes.min(self.limits.message_bytes_max);
            let step = Step::Read {
                from: reading.window.address + u64::from(at),
                remote_key: reading.window.key,
                to: reading.to.at + u64::from(at),
                local_key: reading.to.local_key,
                bytes,
            };
            let owed = self.owes_answer();
            if !self.post(Posted::Read(read), step) {
                return false;
            }
            self.pieces += 1;
            if !owed {
                self.heard = now;
            }
            if let Some(reading) = self.reads.get_mut(&read) {
                reading.asked += bytes;
                reading.pieces += 1;
            }
        }
        true
    }

    fn fill_bind(&mut self, want: WantId, supply: &mut Supply<'_>) -> bool {
        let Some(exposure) = self.wants.get(&want) else { return true };
        let (start, bytes) = (exposure.block.as_ptr() as usize, exposure.block.len());
        let place = exposure.place;
        let lend = match supply {
            Supply::Regions => {
                self.elsewhere += 1;
                self.out.push(Output::Register { want, start, bytes, at: place.at });
                return true;
            }
            Supply::Windows(_) if self.free.is_empty() => return false,
            Supply::Windows(lend) => lend(),
        };
        match lend {
            Ok(None) => false,
            Ok(Some(loan)) => {
                // There is a token, so it is posted.
                self.post(Posted::Bind(want), Step::Bind { loan, place, bytes: bytes as u32 });
                if let Some(exposure) = self.wants.get_mut(&want) {
                    exposure.grip = Grip::Binding(loan);
                }
                true
            }
            Err(why) => {
                self.wants.remove(&want);
                self.done(LinkDone::Exposed { want, result: Err(why) });
                true
            }
        }
    }

    fn fill_unbind(&mut self, want: WantId) -> bool {
        let Some(Exposure { grip: Grip::Bound(loan), .. }) = self.wants.get(&want) else { return true };
        let loan = *loan;
        if !self.post(Posted::Unbind(want), Step::Invalidate { loan }) {
            return false;
        }
        if let Some(exposure) = self.wants.get_mut(&want) {
            exposure.grip = Grip::Unbinding(loan);
        }
        true
    }

    /// A request has ended.
    pub(crate) fn ended(&mut self, token: Token, result: Result<(), Fault<'_>>, now: Micros) {
        if token == Token::BEAT || token == Token::BYE {
            self.beating &= token != Token::BEAT;
            self.leaving &= token != Token::BYE;
            match result {
                Ok(()) => self.heard = now,
                Err(fault) => self.fault(fault, now),
            }
            return;
        }
        let Some(posted) = self.posted.get_mut(token.0 as usize).and_then(Option::take) else { return };
        self.free.push(token.0);
        if let Posted::Read(read) = posted {
            self.pieces -= 1;
            if let Some(reading) = self.reads.get_mut(&read) {
                reading.pieces -= 1;
                reading.refused |= result == Err(Fault::Access);
            }
        }
        if let Err(fault) = result {
            self.fault(fault, now);
            return;
        }
        match posted {
            Posted::Read(read) => {
                self.heard = now;
                self.read_ended(read);
            }
            Posted::Bind(want) => {
                if let Some(exposure) = self.wants.get_mut(&want)
                    && let Grip::Binding(loan) = exposure.grip
                {
                    exposure.grip = Grip::Bound(loan);
                    let place = exposure.place;
                    self.exposed(want, place, loan.key);
                }
            }
            Posted::Unbind(want) => {
                if let Some(exposure) = self.wants.remove(&want) {
                    if let Grip::Unbinding(loan) = exposure.grip {
                        self.out.push(Output::Return(loan));
                    }
                    self.done(LinkDone::Concealed { want, block: exposure.block });
                }
            }
        }
    }

    fn read_ended(&mut self, read: ReadId) {
        let Some(reading) = self.reads.get(&read) else { return };
        let all = reading.cancelled || reading.asked == reading.record.bytes;
        if reading.pieces > 0 || !all {
            return;
        }
        let Some(Reading { into, record, cancelled, .. }) = self.reads.remove(&read) else { return };
        if cancelled {
            self.done(LinkDone::Read { read, into, result: Err(LinkError::Cancelled) });
        } else {
            self.out.push(Output::Check { read, into, record });
        }
    }

    fn exposed(&mut self, want: WantId, place: Place, key: u32) {
        let window = Window { path: self.limits.path, address: place.at, key };
        self.done(LinkDone::Exposed { want, result: Ok(Some(window)) });
        if self.wants.get(&want).is_some_and(|exposure| exposure.conceal) {
            self.release(want);
        }
    }

    /// A block's region was made, with this key, or could not be.
    pub(crate) fn registered(&mut self, want: WantId, made: Result<(R, u32), String>) {
        self.elsewhere -= 1;
        match made {
            Ok((region, key)) => {
                if let Some(exposure) = self.wants.get_mut(&want) {
                    exposure.grip = Grip::Region(region);
                    let place = exposure.place;
                    self.exposed(want, place, key);
                }
            }
            Err(what) => {
                if self.wants.remove(&want).is_some() {
                    self.done(LinkDone::Exposed { want, result: Err(LinkError::Unsupported { what }) });
                }
            }
        }
    }

    /// A block's region was closed; or cannot be, and then the block is lost: the peer may still read it.
    pub(crate) fn deregistered(&mut self, want: WantId, closed: bool, now: Micros) {
        self.elsewhere -= 1;
        let Some(exposure) = self.wants.remove(&want) else { return };
        if closed {
            self.done(LinkDone::Concealed { want, block: exposure.block });
        } else {
            std::mem::forget(exposure.block);
            self.lost = true;
            self.fail("a memory region cannot be closed".to_owned(), true, now);
        }
    }

    fn fault(&mut self, fault: Fault<'_>, now: Micros) {
        let what = match fault {
            Fault::Access => "the peer's device refused a read: its grant was over",
            Fault::Flushed => {
                "the queue pair failed: the peer used a key that it has not, or the device is sick"
            }
            Fault::Other(text) => text,
        };
        self.fail(what.to_owned(), fault != Fault::Flushed, now);
    }

    /// The path is over. What only followed from it does not hide why.
    pub(crate) fn fail(&mut self, what: String, certain: bool, now: Micros) {
        match &mut self.state {
            State::Failing { certain: true, .. } => {}
            State::Failing { why, certain: known, .. } if certain => {
                *why = LinkError::Path { what };
                *known = true;
            }
            State::Failing { .. } => {}
            State::Open | State::Closing { .. } => {
                self.state = State::Failing { since: now, why: LinkError::Path { what }, certain };
            }
        }
    }

    /// The peer said something.
    pub(crate) fn heard(&mut self, number: u32, now: Micros) {
        self.heard = now;
        if number == Word::Bye as u32 {
            self.fail("the peer closed its end".to_owned(), true, now);
        }
    }

    /// This end closes: nothing begins any more, and the peer is told.
    pub(crate) fn close(&mut self, now: Micros) {
        if self.is_open() {
            self.state = State::Closing { since: now };
            self.leaving = true;
            self.out.push(Output::Post(Token::BYE, Step::Say(Word::Bye)));
        }
    }

    /// The peer cannot be heard any more: the queue pair is in error.
    pub(crate) fn deaf(&mut self, now: Micros) {
        self.fault(Fault::Flushed, now);
    }

    fn owes_answer(&self) -> bool {
        self.beating || self.pieces > 0
    }

    /// Time passes.
    pub(crate) fn tick(&mut self, now: Micros) {
        if !self.is_open() {
            return;
        }
        let owed = self.owes_answer();
        let quiet = now.0.saturating_sub(self.heard.0);
        if owed && quiet > self.limits.silence {
            let what = format!("the peer's device has not answered for {} ms", quiet / 1000);
            self.fail(what, true, now);
        } else if !owed && now.0.saturating_sub(self.beat_at.0.max(self.heard.0)) > self.limits.beat {
            (self.beating, self.beat_at, self.heard) = (true, now, now);
            self.out.push(Output::Post(Token::BEAT, Step::Say(Word::Beat)));
        }
    }

    /// Whether nothing more comes of waiting, and it is to be dismantled.
    pub(crate) fn is_over(&self, now: Micros) -> bool {
        if self.elsewhere > 0 {
            return false;
        }
        let (since, waiting) = match self.state {
            State::Open => return false,
            State::Closing { since } => (since, self.leaving),
            State::Failing { since, .. } => (since, self.free.len() < self.posted.len()),
        };
        !waiting || now.0.saturating_sub(since.0) > self.limits.grace
    }

    /// Ends everything.
    pub(crate) fn dismantle(mut self) -> Remains<R> {
        let why = self.refusal();
        let (mut dones, mut blocks) = (Vec::new(), Vec::new());
        let (mut loans, mut regions) = (Vec::new(), Vec::new());
        for output in self.out.drain(..) {
            match output {
                Output::Done(done) => dones.push(done),
                Output::Check { read, into, .. } => {
                    dones.push(LinkDone::Read { read, into, result: Err(why.clone()) });
                }
                Output::Return(loan) => loans.push(loan),
                Output::Deregister { region, .. } => regions.push(region),
                Output::Post(..) | Output::Register { .. } => {}
            }
        }
        for (read, reading) in self.reads {
            let result = match () {
                () if reading.cancelled => LinkError::Cancelled,
                () if reading.refused => LinkError::Gone,
                () => why.clone(),
            };
            dones.push(LinkDone::Read { read, into: reading.into, result: Err(result) });
        }
        for (want, exposure) in self.wants {
            match exposure.grip {
                Grip::Waiting | Grip::Binding(_) => {
                    dones.push(LinkDone::Exposed { want, result: Err(why.clone()) });
                    if let Grip::Binding(loan) = exposure.grip {
                        loans.push(loan);
                    }
                    blocks.push(exposure.block);
                    continue;
                }
                Grip::Bound(loan) | Grip::Unbinding(loan) => loans.push(loan),
                Grip::Region(region) => regions.push(region),
                Grip::Closing => {}
            }
            dones.push(LinkDone::Concealed { want, block: exposure.block });
        }
        Remains { dones, blocks, loans, regions, lost: self.lost, why }
    }
}
