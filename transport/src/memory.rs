//! A path in memory: everybody's fake. It keeps the whole contract of a [`Link`] and fails on purpose when told to.
//!
//! ```text
//!   reader's end                              owner's end
//!     Read --poll--> begins: exposed? --poll--> copied, checked, given back
//!                       |  counts as a reader of the block
//!                       +------------------------------- Conceal waits until there is none
//! ```
//! Things move when an end is polled, in the order in which they were submitted unless delayed. What is damaged is
//! found by the same checksum as on a real path.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kv_arena::{Held, Slot};
use kv_block::Record;
use kv_wire::message::{ReadId, WantId, Window};

use crate::link::{Link, LinkDone, LinkError, LinkOp, LinkUsage};

/// What kind of path it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryConfig {
    /// Operations that one end takes at once.
    pub in_flight_max: usize,
    /// The number of the path when reads need a window, as with a device that reads by itself.
    pub windows_of: Option<u8>,
}

impl Default for MemoryConfig {
    /// 64 operations, no windows.
    fn default() -> Self {
        Self { in_flight_max: 64, windows_of: None }
    }
}

/// Something that goes wrong, once for each time it is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkFault {
    /// An operation does nothing and ends with this error; a conceal is done all the same.
    Fail(LinkError),
    /// A read brings one bit of the block flipped. On other operations nothing happens.
    Corrupt,
    /// An operation does not end, cancelled or not, until the path breaks.
    Never,
    /// An operation ends so many polls later; others overtake it.
    Delay {
        /// Polls.
        polls: u32,
    },
    /// The path breaks instead.
    Break,
}

/// One end. See the module.
pub struct MemoryLink {
    pair: Arc<Mutex<Pair>>,
    side: usize,
}

struct Pair {
    config: MemoryConfig,
    ends: [End; 2],
    broken: Option<LinkError>,
    keys: u32,
}

#[derive(Default)]
struct End {
    pending: VecDeque<Pending>,
    exposed: BTreeMap<WantId, Exposed>,
    /// By number of the operation, from 1; cancels do not count.
    faults: BTreeMap<u64, LinkFault>,
    ops: u64,
    told: bool,
}

struct Exposed {
    block: Held,
    window: Option<Window>,
    /// Reads of the other end that touch it.
    readers: usize,
    concealing: bool,
}

struct Pending {
    work: Work,
    fault: Option<LinkFault>,
    polls: u32,
}

enum Work {
    Expose { want: WantId, block: Held },
    Conceal { want: WantId },
    Read(Box<Read>),
}

struct Read {
    id: ReadId,
    want: WantId,
    window: Option<Window>,
    record: Record,
    into: Slot,
    /// The other end's block, from the moment at which the read begins.
    from: Option<Held>,
    cancelled: bool,
}

fn broken(what: &str) -> LinkError {
    LinkError::Path { what: what.into() }
}

impl MemoryLink {
    /// Two ends of one path.
    pub fn pair(config: MemoryConfig) -> (Self, Self) {
        let pair = Pair { config, ends: [End::default(), End::default()], broken: None, keys: 0 };
        let pair = Arc::new(Mutex::new(pair));
        (Self { pair: Arc::clone(&pair), side: 0 }, Self { pair, side: 1 })
    }

    /// Lets the operation with this number of this end, from 1, meet a fault.
    pub fn inject(&mut self, operation: u64, fault: LinkFault) {
        let side = self.side;
        self.lock().ends[side].faults.insert(operation, fault);
    }

    /// Lets the next operation of this end meet a fault.
    pub fn inject_next(&mut self, fault: LinkFault) {
        let side = self.side;
        let end = &mut self.lock().ends[side];
        end.faults.insert(end.ops + 1, fault);
    }

    /// Breaks the path, as when somebody pulls the cable. What was under way comes back with the next polls.
    pub fn sever(&mut self) {
        self.lock().broken.get_or_insert_with(|| broken("severed"));
    }

    fn lock(&self) -> MutexGuard<'_, Pair> {
        // Nothing in here panics half way.
        self.pair.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pair {
    /// Takes one step with an operation; gives it back when it has not ended.
    fn step(&mut self, side: usize, mut one: Pending, done: &mut Vec<LinkDone>) -> Option<Pending> {
        if let Work::Read(read) = &mut one.work
            && read.cancelled
            && one.fault != Some(LinkFault::Never)
        {
            self.end(side, one.work, Err(LinkError::Cancelled), done);
            return None;
        }
        if one.polls > 0 {
            one.polls -= u32::from(one.fault != Some(LinkFault::Never));
            // Delayed or not, a read that began keeps its source.
            return Some(one);
        }
        match one.fault.take() {
            Some(LinkFault::Break) => {
                self.broken = Some(broken("broken on purpose"));
                return Some(one);
            }
            Some(LinkFault::Fail(error)) if !matches!(one.work, Work::Conceal { .. }) => {
                self.end(side, one.work, Err(error), done);
                return None;
            }
            fault => one.fault = fault,
        }
        match &mut one.work {
            Work::Expose { want, .. } => {
                let twice = self.ends[side].exposed.contains_key(want);
                let result = if twice { Err(LinkError::Protocol { what: "exposed twice" }) } else { Ok(()) };
                self.end(side, one.work, result, done);
                None
            }
            Work::Conceal { want } => {
                let want = *want;
                if self.ends[side].exposed.get(&want).is_some_and(|exposed| exposed.readers > 0) {
                    return Some(one);
                }
                // What is not exposed has come back already.
                let exposed = self.ends[side].exposed.remove(&want);
                done.extend(exposed.map(|exposed| LinkDone::Concealed { want, block: exposed.block }));
                None
            }
            Work::Read(read) if read.from.is_none() => match self.begin(1 - side, read) {
                Ok(()) => Some(one),
                Err(error) => {
                    self.end(side, one.work, Err(error), done);
                    None
                }
            },
            Work::Read(read) => {
                let result = read.copy(one.fault == Some(LinkFault::Corrupt));
                self.end(side, one.work, result, done);
                None
            }
        }
    }

    fn begin(&mut self, owner: usize, read: &mut Read) -> Result<(), LinkError> {
        let exposed = self.ends[owner].exposed.get_mut(&read.want).ok_or(LinkError::Gone)?;
        if exposed.concealing || exposed.window != read.window {
            return Err(LinkError::Gone);
        }
        if read.into.len() < read.record.bytes as usize {
            return Err(LinkError::Protocol { what: "a slot shorter than the block" });
        }
        exposed.readers += 1;
        read.from = Some(exposed.block.clone());
        Ok(())
    }

    /// Gives an operation's memory back.
    fn end(&mut self, side: usize, work: Work, result: Result<(), LinkError>, done: &mut Vec<LinkDone>) {
        match work {
            Work::Expose { want, block } => {
                let result = result.map(|()| {
                    self.keys += 1;
                    let (address, key) = (block.offset(), self.keys);
                    let window = self.config.windows_of.map(|path| Window { path, address, key });
                    let exposed = Exposed { block, window, readers: 0, concealing: false };
                    self.ends[side].exposed.insert(want, exposed);
                    window
                });
                done.push(LinkDone::Exposed { want, result });
            }
            Work::Conceal { .. } => {}
            Work::Read(mut read) => {
                if read.from.take().is_some()
                    && let Some(exposed) = self.ends[1 - side].exposed.get_mut(&read.want)
                {
                    exposed.readers -= 1;
                }
                done.push(LinkDone::Read { read: read.id, into: read.into, result });
            }
        }
    }

    /// Everything of an end comes back.
    fn clear(&mut self, side: usize, why: &LinkError, done: &mut Vec<LinkDone>) {
        for one in std::mem::take(&mut self.ends[side].pending) {
            self.end(side, one.work, Err(why.clone()), done);
        }
        for (want, exposed) in std::mem::take(&mut self.ends[side].exposed) {
            // No read of the other end gets another byte of it.
            for one in &mut self.ends[1 - side].pending {
                if let Work::Read(read) = &mut one.work
                    && read.want == want
                {
                    read.from = None;
                }
            }
            done.push(LinkDone::Concealed { want, block: exposed.block });
        }
    }
}

impl Read {
    fn copy(&mut self, damaged: bool) -> Result<(), LinkError> {
        let from = self.from.as_ref().ok_or(LinkError::Gone)?;
        let bytes = self.record.bytes as usize;
        if from.len() != bytes {
            return Err(LinkError::Corrupt);
        }
        let mut checksum = self.into.copy_from(&self.record.key, from);
        if damaged && let Some(byte) = self.into[..bytes].last_mut() {
            *byte ^= 1;
            checksum = kv_block::Checksum::of(&self.record.key, &self.into[..bytes]);
        }
        if checksum == self.record.checksum { Ok(()) } else { Err(LinkError::Corrupt) }
    }
}

impl Link for MemoryLink {
    fn submit(&mut self, op: LinkOp) -> Result<(), LinkOp> {
        let mut pair = self.lock();
        let pair = &mut *pair;
        let end = &mut pair.ends[self.side];
        let work = match op {
            LinkOp::Cancel { read: id } => {
                let reads = end.pending.iter_mut().filter_map(|one| match &mut one.work {
                    Work::Read(read) if read.id == id => Some(read),
                    _ => None,
                });
                reads.for_each(|read| read.cancelled = true);
                return Ok(());
            }
            LinkOp::Conceal { want } => {
                if let Some(exposed) = end.exposed.get_mut(&want) {
                    exposed.concealing = true;
                }
                Work::Conceal { want }
            }
            op if pair.broken.is_some() || end.pending.len() >= pair.config.in_flight_max => return Err(op),
            LinkOp::Expose { want, block } => Work::Expose { want, block },
            LinkOp::Read { read: id, want, window, record, into } => {
                Work::Read(Box::new(Read { id, want, window, record, into, from: None, cancelled: false }))
            }
        };
        end.ops += 1;
        let fault = end.faults.remove(&end.ops);
        let polls = match fault {
            Some(LinkFault::Delay { polls }) => polls,
            Some(LinkFault::Never) => 1,
            _ => 0,
        };
        end.pending.push_back(Pending { work, fault, polls });
        Ok(())
    }

    fn kick(&mut self) {}

    fn poll(&mut self, done: &mut Vec<LinkDone>) {
        let mut pair = self.lock();
        for _ in 0..pair.ends[self.side].pending.len() {
            if pair.broken.is_some() {
                break;
            }
            let Some(one) = pair.ends[self.side].pending.pop_front() else { break };
            if let Some(one) = pair.step(self.side, one, done) {
                pair.ends[self.side].pending.push_back(one);
            }
        }
        if let Some(why) = pair.broken.clone() {
            pair.clear(self.side, &why, done);
            if !std::mem::replace(&mut pair.ends[self.side].told, true) {
                done.push(LinkDone::Broken { why });
            }
        }
    }

    fn usage(&self) -> LinkUsage {
        let pair = self.lock();
        let end = &pair.ends[self.side];
        let pending = end.pending.iter().map(|one| match &one.work {
            Work::Expose { block, .. } => u64::from(block.record().bytes),
            Work::Conceal { .. } => 0,
            Work::Read(read) => u64::from(read.record.bytes),
        });
        let exposed = end.exposed.values().map(|exposed| u64::from(exposed.block.record().bytes));
        LinkUsage {
            in_flight: end.pending.len(),
            in_flight_max: pair.config.in_flight_max,
            bytes: pending.chain(exposed).sum(),
        }
    }
}

impl Drop for MemoryLink {
    fn drop(&mut self) {
        let mut pair = self.lock();
        let mut done = Vec::new();
        let why = pair.broken.get_or_insert_with(|| broken("the other end is gone")).clone();
        pair.clear(self.side, &why, &mut done);
    }
}

#[cfg(test)]
mod tests {
    use kv_arena::{Geometry, ShardMemory, Slab};
    use kv_block::{BindingTag, BlockKey, Checksum, Priority, payload};

    use super::*;
    use crate::contract::Subject;

    struct InMemory(MemoryConfig);

    impl Subject for InMemory {
        fn pair(&mut self, _owner: &Slab, _reader: &Slab) -> (Box<dyn Link>, Box<dyn Link>) {
            let (owner, reader) = MemoryLink::pair(self.0);
            (Box::new(owner), Box::new(reader))
        }
        fn wait(&mut self) {}
    }

    mod plain {
        use super::*;
        crate::link_contract!(InMemory(MemoryConfig::default()));
    }

    mod windowed {
        use super::*;
        crate::link_contract!(InMemory(MemoryConfig { in_flight_max: 3, windows_of: Some(1) }));
    }

    struct Rig {
        owner: MemoryLink,
        reader: MemoryLink,
        memory: ShardMemory,
        record: Record,
    }

    fn rig() -> Rig {
        let (mut owner, reader) = MemoryLink::pair(MemoryConfig::default());
        let geometry = Geometry { regions: 2, region_bytes: 2 << 20, table_entries_max: 8 };
        let memory = ShardMemory::anonymous(geometry).unwrap();
        let (key, mut slot) = (BlockKey([3; 16]), memory.slab().take(4096).unwrap());
        payload::fill(&key, &mut slot);
        let (checksum, tag, priority) = (Checksum::of(&key, &slot), BindingTag(1), Priority::Normal);
        let record = Record { key, checksum, bytes: 4096, tag, priority, expires_at: 0 };
        owner.submit(LinkOp::Expose { want: WantId(1), block: slot.seal(&record) }).unwrap();
        assert!(matches!(poll(&mut owner)[..], [LinkDone::Exposed { result: Ok(None), .. }]));
        Rig { owner, reader, memory, record }
    }

    fn poll(link: &mut MemoryLink) -> Vec<LinkDone> {
        let mut done = Vec::new();
        link.poll(&mut done);
        done
    }

    impl Rig {
        fn read(&mut self, id: u64) {
            let into = self.memory.slab().take(4096).unwrap();
            let (read, want, window) = (ReadId(id), WantId(1), None);
            self.reader.submit(LinkOp::Read { read, want, window, record: self.record, into }).unwrap();
        }

        fn ended(&mut self, polls: usize) -> Vec<(u64, Result<(), LinkError>)> {
            let done: Vec<_> = (0..polls).flat_map(|_| poll(&mut self.reader)).collect();
            let reads = done.into_iter().filter_map(|done| match done {
                LinkDone::Read { read, result, .. } => Some((read.0, result)),
                _ => None,
            });
            reads.collect()
        }
    }

    #[test]
    fn faults_meet_the_operation_they_were_meant_for() {
        let mut rig = rig();
        rig.reader.inject(2, LinkFault::Corrupt);
        rig.reader.inject(3, LinkFault::Fail(LinkError::Gone));
        rig.reader.inject(4, LinkFault::Delay { polls: 3 });
        rig.reader.inject(5, LinkFault::Never);
        (1..=6).for_each(|id| rig.read(id));
        let ended = rig.ended(2);
        assert_eq!(
            ended,
            [(3, Err(LinkError::Gone)), (1, Ok(())), (2, Err(LinkError::Corrupt)), (6, Ok(()))]
        );
        assert_eq!(rig.ended(3), [(4, Ok(()))]);
        rig.reader.submit(LinkOp::Cancel { read: ReadId(5) }).unwrap();
        assert_eq!(rig.ended(100), []);
        assert_eq!(rig.reader.usage().in_flight, 1);
        rig.reader.inject_next(LinkFault::Break);
        rig.read(7);
        let ended: Vec<_> = rig.ended(2).into_iter().map(|(id, _)| id).collect();
        assert_eq!(ended, [5, 7], "a broken path keeps nothing");
        assert!(matches!(poll(&mut rig.owner)[..], [LinkDone::Concealed { .. }, LinkDone::Broken { .. }]));
    }
}
