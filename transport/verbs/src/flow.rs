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
    /// The peer's device answered for the first time.
    Answered,
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
    /// The peer's device has answered something.
    answered: bool,
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
            answered: false,
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
                Ok(()) => {
                    self.heard = now;
                    if !std::mem::replace(&mut self.answered, true) {
                        self.out.push(Output::Answered);
                    }
                }
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
            self.beat(now);
        }
    }

    /// Asks the peer's device whether it is there.
    pub(crate) fn beat(&mut self, now: Micros) {
        (self.beating, self.beat_at, self.heard) = (true, now, now);
        self.out.push(Output::Post(Token::BEAT, Step::Say(Word::Beat)));
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
                Output::Post(..) | Output::Register { .. } | Output::Answered => {}
            }
        }
        // What was refused once is refused to whoever asks next.
        let refused: Vec<u32> =
            self.reads.values().filter(|reading| reading.refused).map(|reading| reading.window.key).collect();
        for (read, reading) in self.reads {
            let result = match () {
                () if reading.cancelled => LinkError::Cancelled,
                () if refused.contains(&reading.window.key) => LinkError::Gone,
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

#[cfg(test)]
mod tests {
    use kv_arena::{Geometry, HazardSet, ShardMemory};
    use kv_block::{BindingTag, BlockKey, Checksum, Priority};
    use proptest::prelude::*;

    use super::*;
    use crate::handles::MrRef;

    const LIMITS: Limits =
        Limits { depth: 4, message_bytes_max: 4096, path: 3, beat: 1_000, silence: 10_000, grace: 500 };

    /// A flow, and a device that does what it is told when it is told.
    struct Rig {
        memory: ShardMemory,
        flow: Flow<u32>,
        now: Micros,
        posted: Vec<(Token, Step)>,
        register: Vec<WantId>,
        deregister: Vec<WantId>,
        windows: u32,
        by_regions: bool,
        done: Vec<LinkDone>,
        came: Vec<ReadId>,
        answers: u32,
    }

    impl Rig {
        fn new(windows: u32, by_regions: bool) -> Self {
            let geometry = Geometry { regions: 4, region_bytes: 2 << 20, table_entries_max: 8 };
            Self {
                memory: ShardMemory::anonymous(geometry).unwrap(),
                flow: Flow::new(LIMITS, Micros(0)),
                now: Micros(0),
                posted: Vec::new(),
                register: Vec::new(),
                deregister: Vec::new(),
                windows,
                by_regions,
                done: Vec::new(),
                came: Vec::new(),
                answers: 0,
            }
        }

        fn block(&self, bytes: u32) -> Held {
            let (key, tag) = (BlockKey([1; 16]), BindingTag(1));
            let slot = self.memory.slab().take(bytes).unwrap();
            slot.seal(&Record {
                key,
                checksum: Checksum(0),
                bytes,
                tag,
                priority: Priority::Normal,
                expires_at: 0,
            })
        }

        fn place(offset: u64) -> Option<Place> {
            Some(Place { at: (1 << 40) + offset, local_key: 9, region: MrRef(std::ptr::null_mut()) })
        }

        fn expose(&mut self, want: u64, bytes: u32) {
            let block = self.block(bytes);
            let place = Self::place(block.offset());
            self.flow.expose(WantId(want), block, place);
            self.move_on();
        }

        fn read(&mut self, read: u64, bytes: u32) {
            let record = self.block(bytes).record();
            let into = self.memory.slab().take(bytes).unwrap();
            let place = Self::place(into.offset());
            let window = Window { path: 3, address: 7_000_000, key: 5 };
            self.flow.read(ReadId(read), Some(window), record, into, place);
            self.move_on();
        }

        fn move_on(&mut self) {
            loop {
                let windows = &mut self.windows;
                let mut lend = || {
                    let left = windows.checked_sub(1);
                    *windows = left.unwrap_or(0);
                    Ok(left.map(|left| Loan { window: left, key: left }))
                };
                let mut supply = if self.by_regions { Supply::Regions } else { Supply::Windows(&mut lend) };
                self.flow.fill(&mut supply, self.now);
                let mut outputs = Vec::new();
                self.flow.outputs(&mut outputs);
                if outputs.is_empty() {
                    return;
                }
                for output in outputs {
                    match output {
                        Output::Post(token, step) => self.posted.push((token, step)),
                        Output::Register { want, .. } => self.register.push(want),
                        Output::Deregister { want, .. } => self.deregister.push(want),
                        Output::Return(_) => self.windows += 1,
                        Output::Answered => self.answers += 1,
                        Output::Done(done) => self.done.push(done),
                        Output::Check { read, into, record: _ } => {
                            self.came.push(read);
                            self.done.push(LinkDone::Read { read, into, result: Ok(()) });
                        }
                    }
                }
            }
        }

        fn end(&mut self, at: usize, result: Result<(), Fault<'_>>) {
            let (token, _) = self.posted.remove(at);
            self.flow.ended(token, result, self.now);
            self.move_on();
        }

        fn tick(&mut self, at: u64) {
            self.now = Micros(at);
            self.flow.tick(self.now);
            self.move_on();
        }
    }

    #[test]
    fn a_long_block_is_read_in_pieces_and_comes_once() {
        let mut rig = Rig::new(0, false);
        rig.read(1, 10_000);
        let pieces: Vec<_> = rig.posted.iter().map(|(_, step)| *step).collect();
        let spans: Vec<_> = pieces
            .iter()
            .map(|step| match step {
                Step::Read { from, bytes, remote_key: 5, local_key: 9, .. } => (from - 7_000_000, *bytes),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(spans, [(0, 4096), (4096, 4096), (8192, 1808)]);
        rig.read(2, 5_000);
        assert_eq!(rig.posted.len(), 4, "no more than the device takes");
        (0..3).for_each(|_| rig.end(0, Ok(())));
        assert_eq!(rig.came, [ReadId(1)]);
        while !rig.posted.is_empty() {
            rig.end(0, Ok(()));
        }
        assert_eq!(rig.came, [ReadId(1), ReadId(2)]);
    }

    #[test]
    fn a_block_comes_back_when_its_key_is_gone_and_not_before() {
        for by_regions in [false, true] {
            let mut rig = Rig::new(8, by_regions);
            rig.expose(1, 4096);
            // In a hurry: before it is even exposed.
            rig.flow.conceal(WantId(1));
            rig.flow.conceal(WantId(1));
            rig.flow.conceal(WantId(2));
            rig.move_on();
            assert!(rig.done.is_empty());
            if by_regions {
                rig.flow.registered(rig.register[0], Ok((4, 77)));
            } else {
                rig.end(0, Ok(()));
            }
            rig.move_on();
            assert!(matches!(rig.done[..], [LinkDone::Exposed { result: Ok(Some(_)), .. }]));
            if by_regions {
                rig.flow.deregistered(rig.deregister[0], true, rig.now);
            } else {
                assert!(matches!(rig.posted[..], [(_, Step::Invalidate { .. })]));
                rig.end(0, Ok(()));
            }
            rig.move_on();
            assert!(matches!(rig.done[..], [_, LinkDone::Concealed { .. }]), "{:?}", rig.done);
        }
    }

    #[test]
    fn a_region_that_cannot_be_closed_keeps_its_block_for_ever() {
        let mut rig = Rig::new(0, true);
        rig.expose(1, 4096);
        rig.flow.registered(WantId(1), Ok((4, 77)));
        rig.flow.conceal(WantId(1));
        rig.move_on();
        rig.flow.deregistered(WantId(1), false, rig.now);
        rig.move_on();
        assert!(rig.flow.is_failing());
        let remains = rig.flow.dismantle();
        assert!(remains.lost && remains.dones.is_empty());
        assert!(!rig.done.iter().any(|done| matches!(done, LinkDone::Concealed { .. })));
    }

    #[test]
    fn a_quiet_peer_is_asked_and_a_silent_one_is_gone() {
        let mut rig = Rig::new(0, false);
        rig.tick(1_001);
        assert!(matches!(rig.posted[..], [(Token::BEAT, Step::Say(Word::Beat))]));
        rig.tick(9_000);
        assert_eq!(rig.posted.len(), 1, "one question at a time");
        rig.end(0, Ok(()));
        rig.tick(10_500);
        rig.read(1, 100);
        rig.end(0, Ok(()));
        assert!(rig.posted.len() == 1 && !rig.flow.is_ending());
        rig.tick(20_400);
        assert!(!rig.flow.is_failing());
        rig.tick(20_600);
        assert!(rig.flow.is_failing() && !rig.flow.is_over(Micros(20_700)), "the read is with the device");
        assert!(rig.flow.is_over(Micros(21_200)), "which does not have for ever");
        let remains = rig.flow.dismantle();
        let LinkError::Path { what } = remains.why else { panic!() };
        assert_eq!(what, "the peer's device has not answered for 10 ms");
    }

    #[test]
    fn a_peer_is_there_when_its_device_has_answered() {
        let mut rig = Rig::new(0, false);
        rig.flow.beat(rig.now);
        rig.move_on();
        assert!(matches!(rig.posted[..], [(Token::BEAT, _)]));
        rig.tick(5_000);
        assert_eq!((rig.posted.len(), rig.answers), (1, 0), "it was asked, and has not answered");
        rig.end(0, Ok(()));
        assert_eq!(rig.answers, 1);
        rig.tick(6_001);
        rig.end(0, Ok(()));
        assert_eq!(rig.answers, 1, "that is told once");

        for broken in [true, false] {
            let mut rig = Rig::new(0, false);
            rig.flow.beat(rig.now);
            rig.move_on();
            if broken {
                rig.end(0, Err(Fault::Other("transport retry counter exceeded")));
            } else {
                rig.tick(10_001);
            }
            assert!(rig.flow.is_failing() && rig.answers == 0);
        }
    }

    #[test]
    fn the_first_certain_reason_is_told_and_what_was_refused_is_gone() {
        let mut rig = Rig::new(0, false);
        for read in 1..=3 {
            rig.read(read, 100);
        }
        rig.flow.cancel(ReadId(3));
        rig.flow.deaf(rig.now);
        assert!(rig.flow.is_failing());
        rig.end(0, Err(Fault::Access));
        rig.end(0, Err(Fault::Flushed));
        assert!(!rig.flow.is_over(rig.now));
        rig.end(0, Err(Fault::Other("transport retry counter exceeded")));
        assert!(rig.flow.is_over(rig.now));
        let remains = rig.flow.dismantle();
        let results: Vec<_> = remains
            .dones
            .iter()
            .map(|done| match done {
                LinkDone::Read { result: Err(why), .. } => why.clone(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(results, [LinkError::Gone, LinkError::Gone, LinkError::Cancelled]);
        let what = "the peer's device refused a read: its grant was over".to_owned();
        assert_eq!(remains.why, LinkError::Path { what });
    }

    #[test]
    fn a_goodbye_is_said_and_heard() {
        let mut rig = Rig::new(0, false);
        rig.flow.close(rig.now);
        rig.move_on();
        assert!(matches!(rig.posted[..], [(Token::BYE, Step::Say(Word::Bye))]));
        assert!(!rig.flow.is_over(rig.now));
        rig.end(0, Ok(()));
        assert!(rig.flow.is_over(rig.now));

        let mut other = Rig::new(8, false);
        other.expose(1, 4096);
        other.end(0, Ok(()));
        other.flow.heard(Word::Beat as u32, other.now);
        other.flow.heard(12_345, other.now);
        assert!(!other.flow.is_ending());
        other.flow.heard(Word::Bye as u32, other.now);
        assert!(other.flow.is_over(other.now));
        let remains = other.flow.dismantle();
        assert_eq!(remains.loans.len(), 1);
        assert!(matches!(remains.dones[..], [LinkDone::Concealed { .. }]));
    }

    #[test]
    fn what_cannot_be_is_refused_at_once() {
        let mut rig = Rig::new(8, false);
        let block = rig.block(4096);
        rig.flow.expose(WantId(1), block.clone(), None);
        rig.move_on();
        assert!(matches!(
            rig.done.pop(),
            Some(LinkDone::Exposed { result: Err(LinkError::Unsupported { .. }), .. })
        ));
        rig.flow.fail("over".to_owned(), true, rig.now);
        rig.flow.expose(WantId(2), block, Rig::place(0));
        rig.move_on();
        let over = LinkError::Path { what: "over".to_owned() };
        assert!(matches!(rig.done.pop(), Some(LinkDone::Exposed { result: Err(why), .. }) if why == over));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

        /// Anything in any order, and a failure at the end: what was taken comes back once, and all memory with it.
        #[test]
        fn what_is_taken_comes_back_once(
            by_regions: bool,
            fails: bool,
            steps in prop::collection::vec((0..8u8, any::<u8>()), 1..150),
        ) {
            let mut rig = Rig::new(12, by_regions);
            let (mut reads, mut wants) = (0, 0);
            for (step, pick) in steps {
                let pick = usize::from(pick);
                match step {
                    0 if reads < 40 => { reads += 1; rig.read(reads, 1 + pick as u32 * 60); }
                    1 if wants < 40 => { wants += 1; rig.expose(wants, 1 + pick as u32); }
                    2 if wants > 0 => rig.flow.conceal(WantId(1 + pick as u64 % wants)),
                    3 if reads > 0 => rig.flow.cancel(ReadId(1 + pick as u64 % reads)),
                    4 if !rig.register.is_empty() => {
                        let want = rig.register.remove(pick % rig.register.len());
                        let made = if pick % 5 == 0 { Err("full".to_owned()) } else { Ok((1, 2)) };
                        rig.flow.registered(want, made);
                    }
                    5 if !rig.deregister.is_empty() => {
                        let want = rig.deregister.remove(pick % rig.deregister.len());
                        rig.flow.deregistered(want, true, rig.now);
                    }
                    // A device ends them in order.
                    _ if !rig.posted.is_empty() => rig.end(0, Ok(())),
                    _ => {}
                }
                rig.move_on();
                prop_assert!(rig.posted.len() <= LIMITS.depth as usize);
            }
            if fails {
                rig.flow.fail("pulled".to_owned(), true, rig.now);
            } else {
                rig.flow.close(rig.now);
            }
            let mut rounds = 0;
            while !rig.flow.is_over(rig.now) {
                rounds += 1;
                prop_assert!(rounds < 1000, "it never ends");
                for want in std::mem::take(&mut rig.register) { rig.flow.registered(want, Ok((1, 2))); }
                for want in std::mem::take(&mut rig.deregister) { rig.flow.deregistered(want, true, rig.now); }
                rig.move_on();
                if !rig.posted.is_empty() {
                    let result = if fails { Err(Fault::Flushed) } else { Ok(()) };
                    rig.end(0, result);
                }
            }
            let remains = rig.flow.dismantle();
            rig.done.extend(remains.dones);
            drop(remains.blocks);
            let count = |fits: &dyn Fn(&LinkDone) -> bool| rig.done.iter().filter(|done| fits(done)).count() as u64;
            for read in 1..=reads {
                let ends = count(&|done| matches!(done, LinkDone::Read { read: ended, .. } if ended.0 == read));
                prop_assert_eq!(ends, 1, "read {}", read);
            }
            for want in 1..=wants {
                let is = |done: &LinkDone, good: bool| {
                    matches!(done, LinkDone::Exposed { want: ended, result } if ended.0 == want && result.is_ok() == good)
                };
                let (good, bad) = (count(&|done| is(done, true)), count(&|done| is(done, false)));
                let back = count(&|done| matches!(done, LinkDone::Concealed { want: ended, .. } if ended.0 == want));
                prop_assert_eq!((good + bad, back), (1, good), "want {}", want);
            }
            rig.done.clear();
            // Every block is unheld, every slot free.
            let slab = rig.memory.slab();
            for region in 0..4 {
                for (slot, generation) in slab.slots_of_region(region) {
                    prop_assert!(slab.retire(slot, generation).is_ok());
                }
            }
            slab.sweep(&HazardSet::new());
            let used: u32 = slab.usage().classes.iter().map(|class| class.slots - class.free).sum();
            prop_assert_eq!(used, 0);
        }
    }
}
