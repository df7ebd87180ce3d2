//! What every [`Link`] must do, as tests that any path can run: implement [`Subject`] and put
//! [`link_contract!`](crate::link_contract) in a test module.
//!
//! The suite holds both ends of a path as two nodes do: it owns the memory, follows every operation to its one end,
//! and looks whether all memory is there afterwards. It panics where a path breaks its word.

use std::collections::{BTreeMap, BTreeSet};

use kv_arena::{Geometry, HazardSet, Held, ShardMemory, Slab, Slot};
use kv_block::{BindingTag, BlockKey, Checksum, Priority, Record, payload};
use kv_wire::message::{ReadId, WantId, Window};

use crate::link::{Link, LinkDone, LinkError, LinkOp};

/// A kind of path, for the suite.
pub trait Subject {
    /// The owner's and the reader's end of a new path. Operations move memory of these arenas and no other.
    fn pair(&mut self, owner: &Slab, reader: &Slab) -> (Box<dyn Link>, Box<dyn Link>);
    /// Lets time pass for a path that has not answered yet. Called between polls, a bounded number of times.
    fn wait(&mut self);
    /// Whether a read that the owner's device refuses ends the path, as it does where a device enforces the grant and
    /// nobody in between can say no politely. Then the suite goes on with another one.
    fn refusal_ends_path(&self) -> bool {
        false
    }
}

/// Makes a test of every case for the subject that `$subject` evaluates to, a new one for each.
#[macro_export]
macro_rules! link_contract {
    ($subject:expr) => {
        $crate::link_contract!(@cases $subject,
            bytes_arrive_exactly_at_every_length,
            many_reads_at_once_bring_each_its_own_block,
            what_is_not_exposed_is_gone,
            what_was_concealed_is_gone,
            concealed_means_that_no_read_touches_it,
            a_conceal_ends_although_reads_keep_coming,
            another_record_is_corrupt,
            a_window_of_another_block_reads_nothing,
            a_cancelled_read_ends_once,
            a_lost_owner_ends_every_read_and_then_the_path,
            a_lost_reader_gives_every_block_back_and_ends_the_path,
            beyond_in_flight_max_the_operation_comes_back,
            a_dropped_end_gives_all_its_memory_back,
            usage_counts_what_is_under_way,
        );
    };
    (@cases $subject:expr, $($case:ident,)*) => {
        $(
            #[test]
            fn $case() {
                $crate::contract::$case(&mut $subject);
            }
        )*
    };
}

const POLLS_MAX: usize = 100_000;
const BLOCK_BYTES: u32 = 64 << 10;
const MIB: u32 = 1 << 20;

/// A node's side: its memory and its end of the path.
struct Side {
    link: Option<Box<dyn Link>>,
    memory: ShardMemory,
    broken: u32,
}

impl Side {
    fn used(&self) -> u32 {
        let slab = self.memory.slab();
        slab.sweep(&HazardSet::new());
        slab.usage().classes.iter().map(|class| class.slots - class.free).sum()
    }

    fn link(&mut self) -> &mut Box<dyn Link> {
        self.link.as_mut().expect("this end was not dropped")
    }
}

/// A path under test and everything it was promised.
struct Driver<'a, S: Subject> {
    subject: &'a mut S,
    owner: Side,
    reader: Side,
    next: u64,
    exposed: BTreeMap<WantId, Result<Option<Window>, LinkError>>,
    concealed: BTreeMap<WantId, Held>,
    reading: BTreeMap<ReadId, Record>,
    read: BTreeMap<ReadId, Result<(), LinkError>>,
    /// Blocks of the owner, to be forgotten at the end.
    blocks: Vec<Held>,
}

fn key(n: u64) -> BlockKey {
    BlockKey::from_halves([n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, n])
}

impl<'a, S: Subject> Driver<'a, S> {
    fn new(subject: &'a mut S) -> Self {
        let side = || {
            let geometry = Geometry { regions: 8, region_bytes: 4 << 20, table_entries_max: 8 };
            let memory = ShardMemory::anonymous(geometry).expect("memory for a test");
            Side { link: None, memory, broken: 0 }
        };
        let (owner, reader) = (side(), side());
        let mut driver = Self {
            subject,
            owner,
            reader,
            next: 0,
            exposed: BTreeMap::new(),
            concealed: BTreeMap::new(),
            reading: BTreeMap::new(),
            read: BTreeMap::new(),
            blocks: Vec::new(),
        };
        driver.connect();
        driver
    }

    /// Whether a read of a block that was concealed meanwhile may end so. A device that is cut off in mid-answer may not
    /// get to say why.
    fn is_over(&self, result: &Result<(), LinkError>) -> bool {
        let cut_off = self.subject.refusal_ends_path() && matches!(result, Err(LinkError::Path { .. }));
        cut_off || matches!(result, Ok(()) | Err(LinkError::Gone))
    }

    fn connect(&mut self) {
        let (one, other) = self.subject.pair(self.owner.memory.slab(), self.reader.memory.slab());
        (self.owner.link, self.reader.link) = (Some(one), Some(other));
    }

    /// After a refusal: another path if this one ended with it. Whether it did.
    fn renew(&mut self) -> bool {
        if !self.subject.refusal_ends_path() {
            return false;
        }
        self.until("Broken at both ends", |driver| driver.owner.broken > 0 && driver.reader.broken > 0);
        (self.owner.broken, self.reader.broken) = (0, 0);
        self.concealed.clear();
        self.connect();
        true
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A sealed block whose bytes prove whose they are.
    fn block(&mut self, bytes: u32) -> Held {
        let key = key(self.number());
        let mut slot = self.owner.memory.slab().take(bytes).expect("a free slot for a test");
        payload::fill(&key, &mut slot[..bytes as usize]);
        let checksum = Checksum::of(&key, &slot[..bytes as usize]);
        let (tag, priority) = (BindingTag(7), Priority::Normal);
        let block = slot.seal(&Record { key, checksum, bytes, tag, priority, expires_at: 0 });
        self.blocks.push(block.clone());
        block
    }

    fn slot(&self, bytes: u32) -> Slot {
        self.reader.memory.slab().take(bytes.max(1)).expect("a free slot for a test")
    }

    fn poll(&mut self) {
        for turn in 0..2 {
            let side = if turn == 0 { &mut self.owner } else { &mut self.reader };
            let Some(link) = &mut side.link else { continue };
            let mut done = Vec::new();
            link.kick();
            link.poll(&mut done);
            assert!(side.broken == 0 || done.is_empty(), "words after the path was gone: {done:?}");
            let broken = |done: &LinkDone| matches!(done, LinkDone::Broken { .. });
            side.broken += done.iter().filter(|done| broken(done)).count() as u32;
            assert!(side.broken <= 1, "a path breaks once");
            assert!(side.broken == 0 || done.last().is_none_or(broken), "something came after Broken");
            // Before the other end moves: what is said now must be so now.
            done.into_iter().for_each(|done| self.enter(done));
        }
    }

    fn enter(&mut self, done: LinkDone) {
        match done {
            LinkDone::Exposed { want, result } => {
                assert!(self.exposed.insert(want, result).is_none(), "{want:?} was exposed twice");
            }
            LinkDone::Concealed { want, block } => {
                let holds = self.owner.memory.slab().header(block.id()).map(|header| header.holds);
                assert_eq!(holds, Some(2), "{want:?} is concealed and held by more than it and the suite");
                assert!(self.concealed.insert(want, block).is_none(), "{want:?} was concealed twice");
            }
            LinkDone::Read { read, into, result } => {
                let record = self.reading.remove(&read);
                let record = record.unwrap_or_else(|| panic!("{read:?} ended twice, or was never begun"));
                if result.is_ok() {
                    let wrong = payload::first_wrong_byte(&record.key, &into[..record.bytes as usize]);
                    assert_eq!(wrong, None, "a wrong byte was delivered");
                }
                self.read.insert(read, result);
            }
            LinkDone::Broken { .. } => {}
        }
    }

    /// Polls until something is so.
    fn until(&mut self, what: &str, so: impl Fn(&Self) -> bool) {
        for _ in 0..POLLS_MAX {
            if so(self) {
                return;
            }
            self.poll();
            if !so(self) {
                self.subject.wait();
            }
        }
        panic!("{what} did not come in {POLLS_MAX} polls");
    }

    /// Submits to the owner's end, polling as long as it takes nothing.
    fn submit_to_owner(&mut self, mut op: LinkOp) {
        for _ in 0..POLLS_MAX {
            match self.owner.link().submit(op) {
                Ok(()) => return,
                Err(back) => op = back,
            }
            self.poll();
            self.subject.wait();
        }
        panic!("the owner's end never takes {op:?}");
    }

    fn expose_begin(&mut self, bytes: u32) -> (WantId, Record) {
        let block = self.block(bytes);
        let (want, record) = (WantId(self.number()), block.record());
        self.submit_to_owner(LinkOp::Expose { want, block });
        (want, record)
    }

    fn expose_end(&mut self, want: WantId) -> Option<Window> {
        self.until("Exposed", |driver| driver.exposed.contains_key(&want));
        let result = self.exposed.remove(&want).expect("it is there");
        result.unwrap_or_else(|error| panic!("a block could not be exposed: {error}"))
    }

    fn expose(&mut self, bytes: u32) -> (WantId, Record, Option<Window>) {
        let (want, record) = self.expose_begin(bytes);
        (want, record, self.expose_end(want))
    }

    fn conceal(&mut self, want: WantId) -> Held {
        assert!(self.owner.link().submit(LinkOp::Conceal { want }).is_ok(), "a conceal is always taken");
        self.until("Concealed", |driver| driver.concealed.contains_key(&want));
        self.concealed.remove(&want).expect("it is there")
    }

    /// Begins a read, or gives the slot back when the link takes no more.
    fn try_read(&mut self, want: WantId, window: Option<Window>, record: Record) -> Option<ReadId> {
        let into = self.slot(record.bytes);
        let (place, read) = ((into.id(), into.generation()), ReadId(self.number()));
        match self.reader.link().submit(LinkOp::Read { read, want, window, record, into }) {
            Ok(()) => {
                self.reading.insert(read, record);
                Some(read)
            }
            Err(LinkOp::Read { read: back, into, .. }) => {
                assert_eq!((back, into.id(), into.generation()), (read, place.0, place.1));
                None
            }
            Err(op) => panic!("another operation came back: {op:?}"),
        }
    }

    fn read_begin(&mut self, want: WantId, window: Option<Window>, record: Record) -> ReadId {
        for _ in 0..POLLS_MAX {
            if let Some(read) = self.try_read(want, window, record) {
                return read;
            }
            self.poll();
            self.subject.wait();
        }
        panic!("the reader's end never takes a read");
    }

    fn read_end(&mut self, read: ReadId) -> Result<(), LinkError> {
        self.until("a read", |driver| driver.read.contains_key(&read));
        self.read.remove(&read).expect("it is there")
    }

    fn read(&mut self, want: WantId, window: Option<Window>, record: Record) -> Result<(), LinkError> {
        let read = self.read_begin(want, window, record);
        self.read_end(read)
    }

    /// Forgets a block that nobody holds any more.
    fn forget(&mut self, block: Held) {
        let place = (block.id(), block.generation());
        self.blocks.retain(|held| held.id() != place.0);
        drop(block);
        self.owner.memory.slab().retire(place.0, place.1).expect("nobody holds it: it was concealed");
        self.owner.memory.slab().sweep(&HazardSet::new());
    }

    fn drop_owner(&mut self) {
        self.owner.link = None;
    }

    fn drop_reader(&mut self) {
        self.reader.link = None;
        self.reading.clear();
    }

    /// Both ends go; every slot of both nodes is free afterwards.
    fn finish(mut self) {
        self.drop_reader();
        self.drop_owner();
        self.concealed.clear();
        let ours = |driver: &Self, block: &Held| {
            driver.owner.memory.slab().header(block.id()).is_some_and(|header| header.holds == 1)
        };
        for _ in 0..POLLS_MAX {
            if self.reader.used() == 0 && self.blocks.iter().all(|block| ours(&self, block)) {
                break;
            }
            self.subject.wait();
        }
        for block in std::mem::take(&mut self.blocks) {
            let place = (block.id(), block.generation());
            drop(block);
            let retired = self.owner.memory.slab().retire(place.0, place.1);
            assert_eq!(retired, Ok(()), "a device that is gone holds a block of the owner");
        }
        assert_eq!((self.owner.used(), self.reader.used()), (0, 0), "memory was lost");
    }
}

/// Blocks of all kinds of lengths arrive byte for byte.
pub fn bytes_arrive_exactly_at_every_length(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    for bytes in [1, 4095, 4096, 4097, 65_536, 100_000, 2 * MIB, 2 * MIB + 1] {
        let (want, record, window) = driver.expose(bytes);
        assert_eq!(driver.read(want, window, record), Ok(()), "{bytes} bytes");
        let block = driver.conceal(want);
        driver.forget(block);
    }
    driver.finish();
}

/// Many reads at once, several of each block.
pub fn many_reads_at_once_bring_each_its_own_block(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let wants: Vec<_> = (0..32).map(|_| driver.expose_begin(BLOCK_BYTES)).collect();
    let blocks: Vec<_> =
        wants.iter().map(|(want, record)| (*want, *record, driver.expose_end(*want))).collect();
    let mut reads = Vec::new();
    for turn in 0..3 {
        for at in 0..blocks.len() {
            let (want, record, window) = blocks[(at * 7 + turn) % blocks.len()];
            reads.push(driver.read_begin(want, window, record));
        }
    }
    for read in reads {
        assert_eq!(driver.read_end(read), Ok(()));
    }
    for (want, ..) in blocks {
        driver.conceal(want);
    }
    driver.finish();
}

/// A read of what the owner did not expose is gone, and the path goes on, if its kind can.
pub fn what_is_not_exposed_is_gone(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (mut want, mut record, mut window) = driver.expose(BLOCK_BYTES);
    // A device that reads by itself is told by its window where; one of nothing that is there.
    let nowhere = window.map(|window| Window { key: window.key ^ 0x5a5a_5a5a, ..window });
    assert_eq!(driver.read(WantId(u64::MAX), nowhere, record), Err(LinkError::Gone));
    if driver.renew() {
        (want, record, window) = driver.expose(BLOCK_BYTES);
    }
    assert_eq!(driver.read(want, window, record), Ok(()));
    driver.conceal(want);
    driver.finish();
}

/// A read of what was concealed is gone, and the path goes on, if its kind can.
pub fn what_was_concealed_is_gone(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (mut other, mut of_other, mut window_of_other) = driver.expose(BLOCK_BYTES);
    let (want, record, window) = driver.expose(BLOCK_BYTES);
    assert_eq!(driver.read(want, window, record), Ok(()));
    driver.conceal(want);
    assert_eq!(driver.read(want, window, record), Err(LinkError::Gone));
    if driver.renew() {
        (other, of_other, window_of_other) = driver.expose(BLOCK_BYTES);
    }
    assert_eq!(driver.read(other, window_of_other, of_other), Ok(()));
    driver.conceal(other);
    driver.finish();
}

/// A block is concealed while reads of it run. When it comes back nobody holds it, its slot is used for something
/// else, and whatever read still ends has the right bytes or none.
pub fn concealed_means_that_no_read_touches_it(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    for round in 0..20 {
        let (want, record, window) = driver.expose(MIB);
        let reads: Vec<_> = (0..3).filter_map(|_| driver.try_read(want, window, record)).collect();
        driver.reader.link().kick();
        // More or less of them have begun.
        (0..round % 5).for_each(|_| driver.poll());
        let block = driver.conceal(want);
        let place = block.id();
        driver.forget(block);
        let mut next = driver.owner.memory.slab().take(MIB).expect("the slot that was just freed");
        assert_eq!(next.id(), place, "the suite means to use the same slot");
        next.fill(0xee);
        let mut refused = false;
        for read in reads {
            let result = driver.read_end(read);
            assert!(driver.is_over(&result), "round {round}: {result:?}");
            refused |= result.is_err();
        }
        if refused {
            driver.renew();
        }
    }
    driver.finish();
}

/// A reader that never stops reading a block does not keep its owner from it: once it is to be concealed, none begins.
pub fn a_conceal_ends_although_reads_keep_coming(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (want, record, window) = driver.expose(4096);
    let mut reads: Vec<_> = (0..2).filter_map(|_| driver.try_read(want, window, record)).collect();
    driver.poll();
    assert!(driver.owner.link().submit(LinkOp::Conceal { want }).is_ok(), "a conceal is always taken");
    for _ in 0..2000 {
        if driver.concealed.contains_key(&want) {
            break;
        }
        reads.extend(driver.try_read(want, window, record));
        driver.poll();
        driver.subject.wait();
    }
    assert!(driver.concealed.remove(&want).is_some(), "reads that keep coming keep the block");
    for read in reads {
        let result = driver.read_end(read);
        assert!(driver.is_over(&result), "{result:?}");
    }
    driver.finish();
}

/// A read that expects other bytes, another name or another length than what is exposed is refused.
pub fn another_record_is_corrupt(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (want, record, window) = driver.expose(BLOCK_BYTES);
    for wrong in [
        Record { checksum: Checksum(record.checksum.0 ^ 1), ..record },
        Record { key: key(u64::MAX), ..record },
        Record { bytes: record.bytes - 1, ..record },
    ] {
        assert_eq!(driver.read(want, window, wrong), Err(LinkError::Corrupt), "{wrong:?}");
    }
    // Beyond the block is not the reader's: a device may refuse to go there.
    let long = driver.read(want, window, Record { bytes: record.bytes + 1, ..record });
    assert!(long.is_err(), "bytes that are not the block's were read");
    driver.conceal(want);
    driver.finish();
}

/// What a window shows is one block, whatever the read calls it.
pub fn a_window_of_another_block_reads_nothing(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (one, of_one, window_of_one) = driver.expose(BLOCK_BYTES);
    let (other, _, window_of_other) = driver.expose(BLOCK_BYTES);
    if window_of_one.is_some() {
        let crossed = driver.read(one, window_of_other, of_one);
        assert!(crossed.is_err(), "the bytes of another block were taken");
    }
    assert_eq!(driver.read(one, window_of_one, of_one), Ok(()));
    driver.conceal(one);
    driver.conceal(other);
    driver.finish();
}

/// A cancelled read ends once, sooner or as it would have; a cancel of what has ended does nothing.
pub fn a_cancelled_read_ends_once(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (want, record, window) = driver.expose(MIB);
    for round in 0..8 {
        let read = driver.read_begin(want, window, record);
        let other = driver.try_read(want, window, record);
        (0..round % 4).for_each(|_| driver.poll());
        assert!(driver.reader.link().submit(LinkOp::Cancel { read }).is_ok(), "a cancel is always taken");
        let result = driver.read_end(read);
        assert!(matches!(result, Ok(()) | Err(LinkError::Cancelled)), "round {round}: {result:?}");
        if let Some(other) = other {
            assert_eq!(driver.read_end(other), Ok(()), "the cancel was not about this one");
        }
        assert!(driver.reader.link().submit(LinkOp::Cancel { read }).is_ok());
    }
    let unknown = LinkOp::Cancel { read: ReadId(u64::MAX) };
    assert!(driver.reader.link().submit(unknown).is_ok());
    assert_eq!(driver.read(want, window, record), Ok(()));
    driver.conceal(want);
    driver.finish();
}

/// The owner's end is dropped while reads run: each comes back, then the path is broken, and takes nothing more.
pub fn a_lost_owner_ends_every_read_and_then_the_path(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (want, record, window) = driver.expose(MIB);
    let reads: Vec<_> = (0..4).filter_map(|_| driver.try_read(want, window, record)).collect();
    driver.reader.link().kick();
    driver.drop_owner();
    driver.until("Broken", |driver| driver.reader.broken > 0);
    for read in reads {
        let result = driver.read.remove(&read).expect("it came back before Broken");
        assert_ne!(result, Err(LinkError::Corrupt), "a lost end damages nothing");
    }
    assert!(driver.try_read(want, window, record).is_none(), "a broken path takes a read");
    assert_eq!(driver.reader.link().usage().in_flight, 0);
    driver.finish();
}

/// The reader's end is dropped: the owner's end breaks, and every block comes back, by itself or when concealed.
pub fn a_lost_reader_gives_every_block_back_and_ends_the_path(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let wants: Vec<_> = (0..3).map(|_| driver.expose(MIB)).collect();
    for (want, record, window) in &wants {
        driver.try_read(*want, *window, *record);
    }
    driver.reader.link().kick();
    driver.drop_reader();
    driver.until("Broken", |driver| driver.owner.broken > 0);
    for (want, ..) in wants {
        if !driver.concealed.contains_key(&want) {
            // Broken was the last word of its own accord; a conceal is still answered.
            driver.owner.broken = 0;
            driver.conceal(want);
        }
    }
    let block = driver.block(BLOCK_BYTES);
    let refused = driver.owner.link().submit(LinkOp::Expose { want: WantId(u64::MAX), block });
    assert!(matches!(refused, Err(LinkOp::Expose { .. })), "a broken path takes a block");
    drop(refused);
    driver.finish();
}

/// An end takes as many operations as it says, and gives the next one back whole.
pub fn beyond_in_flight_max_the_operation_comes_back(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (want, record, window) = driver.expose(4096);
    let max = driver.reader.link().usage().in_flight_max;
    let max_tested = max.min(4000);
    let reads: Vec<_> = (0..max_tested).map_while(|_| driver.try_read(want, window, record)).collect();
    assert_eq!(reads.len(), max_tested, "it takes {max} at once, it says");
    if max_tested == max {
        assert_eq!(driver.try_read(want, window, record), None, "it takes more than {max}");
    }
    assert_eq!(driver.reader.link().usage().in_flight, max_tested);
    for read in reads {
        assert_eq!(driver.read_end(read), Ok(()));
    }
    assert_eq!(driver.read(want, window, record), Ok(()), "there is room again");
    driver.conceal(want);
    driver.finish();
}

/// An end that is dropped in the middle of everything lets go of all memory.
pub fn a_dropped_end_gives_all_its_memory_back(subject: &mut impl Subject) {
    for owner_first in [false, true] {
        let mut driver = Driver::new(subject);
        let wants: Vec<_> = (0..3).map(|_| driver.expose(MIB)).collect();
        for (want, record, window) in &wants {
            driver.try_read(*want, *window, *record);
        }
        let _ = driver.expose_begin(BLOCK_BYTES);
        assert!(driver.owner.link().submit(LinkOp::Conceal { want: wants[0].0 }).is_ok());
        driver.poll();
        if owner_first {
            driver.drop_owner();
        }
        driver.finish();
    }
}

/// What is under way is counted until it has come back.
pub fn usage_counts_what_is_under_way(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (want, record, window) = driver.expose(BLOCK_BYTES);
    assert_eq!(driver.owner.link().usage().in_flight, 0, "what is exposed is not under way");
    let reads: BTreeSet<_> = (0..2).filter_map(|_| driver.try_read(want, window, record)).collect();
    let usage = driver.reader.link().usage();
    assert_eq!((usage.in_flight, usage.bytes), (reads.len(), reads.len() as u64 * u64::from(BLOCK_BYTES)));
    for read in reads {
        assert_eq!(driver.read_end(read), Ok(()));
    }
    let usage = driver.reader.link().usage();
    assert_eq!((usage.in_flight, usage.bytes), (0, 0));
    driver.conceal(want);
    assert_eq!(driver.owner.link().usage().bytes, 0);
    driver.finish();
}
