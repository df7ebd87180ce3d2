//! A durable tier in memory: everybody's fake. It keeps the whole contract of a [`BlockStore`], segments and
//! restarts included, and fails on purpose when told to.
//!
//! ```text
//! segment 3, generation 7 | page 0: block | page 1: block (2 pages) | page 3: free ...
//!   Free --first write--> Open --no room--> Full --few are free--> Offered --Release--> Free, generation + 1
//! ```
//! An operation is done when [`BlockStore::poll`] gives it back, in the order in which they came unless
//! delayed; what was given back survives [`MemoryStore::reopen`], what was not may or may not, by seed.
//! One segment is kept for moves, so that reclaim can always begin.

use std::collections::{BTreeMap, VecDeque};

use kv_block::{BlockKey, Checksum, DiskLocation, Record};

use crate::store::{BlockStore, StoreDone, StoreError, StoreOp, StoreUsage};

const PAGE_BYTES: u32 = 4096;
/// Segments that only moves may open.
const RESERVED: usize = 1;
/// A segment is offered when no more than this many are free.
const FREE_LOW: usize = RESERVED + 1;

/// How large a store is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryConfig {
    /// Segments; 4 at least.
    pub segments: u32,
    /// Pages of 4 KiB in a segment.
    pub segment_pages: u32,
    /// Most operations under way.
    pub in_flight_max: u32,
}

impl Default for MemoryConfig {
    /// 8 segments of 1 MiB, 64 operations.
    fn default() -> Self {
        Self { segments: 8, segment_pages: 256, in_flight_max: 64 }
    }
}

/// Something that goes wrong, once for each time it is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StoreFault {
    /// An operation does nothing and ends with this error.
    Fail(StoreError),
    /// A read finds one bit of the block flipped. On other operations nothing happens.
    Corrupt,
    /// An operation does not end, and neither does its hold on its memory, until the store is dropped.
    Never,
    /// An operation ends so many polls later; others overtake it.
    Delay {
        /// Polls.
        polls: u32,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    Open,
    Full,
    Offered,
}

#[derive(Clone, Debug)]
struct Segment {
    state: State,
    generation: u32,
    page_next: u32,
    /// When it was opened, in the log's order.
    order: u64,
    entries: Vec<(Record, DiskLocation)>,
}

#[derive(Clone, Debug)]
struct Stored {
    record: Record,
    bytes: Vec<u8>,
    sequence: u64,
}

/// What survives.
#[derive(Clone, Debug)]
struct Durable {
    segment_pages: u32,
    segments: Vec<Segment>,
    blocks: BTreeMap<DiskLocation, Stored>,
    /// Nothing of a key with a lower sequence counts.
    removed: BTreeMap<BlockKey, u64>,
    sequence: u64,
    written: u64,
    read: u64,
}

struct Pending {
    op: StoreOp,
    fault: Option<StoreFault>,
    polls: u32,
}

/// The store. See the module.
pub struct MemoryStore {
    config: MemoryConfig,
    durable: Durable,
    pending: VecDeque<Pending>,
    /// By number of the operation, from 1.
    faults: BTreeMap<u64, StoreFault>,
    ops: u64,
}

impl MemoryStore {
    /// An empty store.
    ///
    /// # Panics
    /// When there are fewer than 4 segments, or more pages or segments than a location can name.
    pub fn new(config: MemoryConfig) -> Self {
        assert!((4..=DiskLocation::SEGMENT_MAX).contains(&config.segments), "4 segments at least");
        assert!((1..=DiskLocation::PAGE_MAX).contains(&config.segment_pages), "a page at least");
        let segment =
            Segment { state: State::Free, generation: 1, page_next: 0, order: 0, entries: Vec::new() };
        let durable = Durable {
            segment_pages: config.segment_pages,
            segments: vec![segment; config.segments as usize],
            blocks: BTreeMap::new(),
            removed: BTreeMap::new(),
            sequence: 0,
            written: 0,
            read: 0,
        };
        Self { config, durable, pending: VecDeque::new(), faults: BTreeMap::new(), ops: 0 }
    }

    /// Lets the `nth` operation from now on meet `fault`; 1 is the next one submitted.
    pub fn inject(&mut self, nth: u64, fault: StoreFault) {
        self.faults.insert(self.ops + nth.max(1), fault);
    }

    /// Operations submitted since it was opened.
    pub fn ops(&self) -> u64 {
        self.ops
    }

    /// Flips one bit of what lies at a place, for good. False when nothing lies there.
    pub fn damage(&mut self, at: DiskLocation) -> bool {
        let stored = self.durable.blocks.get_mut(&at).filter(|stored| !stored.bytes.is_empty());
        let damaged = stored.map(|stored| {
            let middle = stored.bytes.len() / 2;
            stored.bytes[middle] ^= 0x10;
        });
        damaged.is_some()
    }

    /// The store as a restart finds it, with what its index names: for each key the newest copy that was not
    /// removed, in log order. Of the operations under way, `seed` decides which had taken effect.
    pub fn reopen(self, seed: u64) -> (Self, Vec<(Record, DiskLocation)>) {
        let mut durable = self.durable;
        let mut random = seed;
        for pending in self.pending {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let refused = matches!(pending.fault, Some(StoreFault::Fail(_)));
            if random >> 63 == 1 && !refused {
                drop(durable.apply(pending.op, None));
            }
        }
        for segment in durable.segments.iter_mut().filter(|segment| segment.state == State::Offered) {
            segment.state = State::Full;
        }
        let found = durable.index();
        let (written, read) = (0, 0);
        let durable = Durable { written, read, ..durable };
        let store =
            Self { config: self.config, durable, pending: VecDeque::new(), faults: BTreeMap::new(), ops: 0 };
        (store, found)
    }
}

impl Durable {
    fn index(&self) -> Vec<(Record, DiskLocation)> {
        let mut newest: BTreeMap<BlockKey, (u64, DiskLocation)> = BTreeMap::new();
        for (at, stored) in &self.blocks {
            let removed =
                self.removed.get(&stored.record.key).is_some_and(|sequence| *sequence > stored.sequence);
            let entry = newest.entry(stored.record.key).or_insert((0, *at));
            if !removed && stored.sequence > entry.0 {
                *entry = (stored.sequence, *at);
            }
        }
        let mut found: Vec<_> = newest.into_values().filter(|(sequence, _)| *sequence > 0).collect();
        found.sort_unstable();
        found.into_iter().map(|(_, at)| (self.blocks[&at].record, at)).collect()
    }

    fn free(&self) -> usize {
        self.segments.iter().filter(|segment| segment.state == State::Free).count()
    }

    /// Does what an operation asks for.
    fn apply(&mut self, op: StoreOp, fault: Option<&StoreFault>) -> StoreDone {
        let failure = match fault {
            Some(StoreFault::Fail(error)) => Some(error.clone()),
            _ => None,
        };
        match op {
            StoreOp::Write { token, record, bytes } => {
                let result = failure.map_or_else(|| self.append(record, &bytes, RESERVED), Err);
                self.written += result.as_ref().map_or(0, |_| u64::from(record.bytes));
                StoreDone::Written { token, bytes, result }
            }
            StoreOp::Read { token, at, record, mut into } => {
                let read = failure.map_or_else(|| self.find(at, &record), Err);
                let result = read.map(|bytes| into[..bytes.len()].copy_from_slice(bytes)).and_then(|()| {
                    let bytes = &mut into[..record.bytes as usize];
                    if fault == Some(&StoreFault::Corrupt)
                        && let Some(byte) = bytes.last_mut()
                    {
                        *byte ^= 1;
                    }
                    check(&record, bytes, at)
                });
                self.read += result.as_ref().map_or(0, |()| u64::from(record.bytes));
                StoreDone::Read { token, into, result }
            }
            StoreOp::Move { token, at, record } => {
                let found = failure.map_or_else(|| self.find(at, &record).map(<[u8]>::to_vec), Err);
                let result = found.and_then(|bytes| {
                    check(&record, &bytes, at)?;
                    self.append(record, &bytes, 0)
                });
                StoreDone::Moved { token, result }
            }
            StoreOp::Remove { token, key, .. } => {
                let result = failure.map_or(Ok(()), Err);
                if result.is_ok() {
                    self.sequence += 1;
                    self.removed.insert(key, self.sequence);
                }
                StoreDone::Removed { token, result }
            }
            StoreOp::Release { token, segment } => {
                let result = failure.map_or(Ok(()), Err).and_then(|()| self.release(segment));
                StoreDone::Released { token, result }
            }
        }
    }

    fn append(&mut self, record: Record, bytes: &[u8], reserved: usize) -> Result<DiskLocation, StoreError> {
        let pages = record.bytes.div_ceil(PAGE_BYTES).max(1);
        if pages > self.segment_pages {
            let segment_bytes = u64::from(self.segment_pages) * u64::from(PAGE_BYTES);
            return Err(StoreError::TooLarge { bytes: record.bytes, segment_bytes });
        }
        self.sequence += 1;
        let number = self.open_segment(pages, reserved)?;
        let segment = &mut self.segments[number];
        let at = DiskLocation::new(number as u32, segment.generation, segment.page_next);
        let at = at.expect("generations begin at 1 and sizes were checked");
        segment.page_next += pages;
        segment.entries.push((record, at));
        self.blocks.insert(at, Stored { record, bytes: bytes.to_vec(), sequence: self.sequence });
        Ok(at)
    }

    /// The open segment if `pages` fit, else a free one.
    fn open_segment(&mut self, pages: u32, reserved: usize) -> Result<usize, StoreError> {
        let open = self.segments.iter().position(|segment| segment.state == State::Open);
        if let Some(number) = open {
            if self.segments[number].page_next + pages <= self.segment_pages {
                return Ok(number);
            }
            if self.free() > reserved {
                self.segments[number].state = State::Full;
            }
        }
        if self.free() <= reserved {
            return Err(StoreError::Full);
        }
        let next = self.segments.iter().position(|segment| segment.state == State::Free);
        let number = next.ok_or(StoreError::Full)?;
        self.segments[number].state = State::Open;
        self.segments[number].order = self.sequence;
        Ok(number)
    }

    fn find(&self, at: DiskLocation, record: &Record) -> Result<&[u8], StoreError> {
        let segment = self.segments.get(at.segment() as usize);
        if segment.is_none_or(|segment| segment.generation & DiskLocation::SEGMENT_MAX != at.generation()) {
            return Err(StoreError::Stale { segment: at.segment() });
        }
        let corrupt = |what| corrupt(record, at, what);
        let stored = self.blocks.get(&at).ok_or_else(|| corrupt("place"))?;
        if stored.record.key != record.key {
            return Err(corrupt("key"));
        }
        if stored.record.bytes != record.bytes {
            return Err(corrupt("length"));
        }
        Ok(&stored.bytes)
    }

    fn release(&mut self, number: u32) -> Result<(), StoreError> {
        let segment =
            self.segments.get_mut(number as usize).filter(|segment| segment.state == State::Offered);
        let segment = segment.ok_or(StoreError::Stale { segment: number })?;
        for (_, at) in segment.entries.drain(..) {
            self.blocks.remove(&at);
        }
        segment.state = State::Free;
        segment.page_next = 0;
        segment.generation += 1;
        Ok(())
    }

    /// The oldest full segment, if free ones are few and none is on offer already.
    fn offer(&mut self) -> Option<StoreDone> {
        let offered = self.segments.iter().any(|segment| segment.state == State::Offered);
        if offered || self.free() > FREE_LOW {
            return None;
        }
        let full = self.segments.iter_mut().enumerate().filter(|(_, segment)| segment.state == State::Full);
        let (number, segment) = full.min_by_key(|(_, segment)| segment.order)?;
        segment.state = State::Offered;
        let entries = segment.entries.clone();
        let room_bytes = self.segments.len() as u64 * u64::from(self.segment_pages * PAGE_BYTES);
        Some(StoreDone::Reclaim { segment: number as u32, entries, room_bytes })
    }
}

fn corrupt(record: &Record, at: DiskLocation, what: &'static str) -> StoreError {
    StoreError::Corrupt { key: record.key, segment: at.segment(), page: at.page(), what }
}

fn check(record: &Record, bytes: &[u8], at: DiskLocation) -> Result<(), StoreError> {
    let right = Checksum::of(&record.key, bytes) == record.checksum;
    right.then_some(()).ok_or_else(|| corrupt(record, at, "checksum"))
}

impl BlockStore for MemoryStore {
    fn submit(&mut self, op: StoreOp) -> Result<(), StoreOp> {
        if self.pending.len() >= self.config.in_flight_max as usize {
            return Err(op);
        }
        self.ops += 1;
        let fault = self.faults.remove(&self.ops);
        let polls = match fault {
            Some(StoreFault::Never) => u32::MAX,
            Some(StoreFault::Delay { polls }) => polls,
            _ => 0,
        };
        self.pending.push_back(Pending { op, fault, polls });
        Ok(())
    }

    fn kick(&mut self) {}

    fn poll(&mut self, done: &mut Vec<StoreDone>) {
        for _ in 0..self.pending.len() {
            let Some(mut pending) = self.pending.pop_front() else { break };
            if pending.polls > 0 {
                pending.polls -= u32::from(pending.polls != u32::MAX);
                self.pending.push_back(pending);
                continue;
            }
            done.push(self.durable.apply(pending.op, pending.fault.as_ref()));
        }
        done.extend(self.durable.offer());
    }

    fn usage(&self) -> StoreUsage {
        let segment_bytes = u64::from(self.config.segment_pages) * u64::from(PAGE_BYTES);
        let used = self.durable.segments.len() - self.durable.free();
        StoreUsage {
            bytes_max: segment_bytes * self.durable.segments.len() as u64,
            bytes_used: segment_bytes * used as u64,
            bytes_written: self.durable.written,
            bytes_read: self.durable.read,
            in_flight: self.pending.len() as u32,
            in_flight_max: self.config.in_flight_max,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kv_arena::{Geometry, Held, ShardMemory};
    use kv_block::{BindingTag, Priority, payload};

    use super::*;
    use crate::contract::Subject;
    use crate::store::OpToken;

    struct InMemory {
        seed: u64,
    }

    impl Subject for InMemory {
        type Store = MemoryStore;
        fn open(&mut self) -> MemoryStore {
            MemoryStore::new(MemoryConfig::default())
        }
        fn reopen(&mut self, store: MemoryStore) -> (MemoryStore, Vec<(Record, DiskLocation)>) {
            self.seed += 1;
            store.reopen(self.seed)
        }
        fn wait(&mut self) {}
    }

    crate::store_contract!(InMemory { seed: 0 });

    fn memory() -> ShardMemory {
        let geometry = Geometry { regions: 2, region_bytes: 2 << 20, table_entries_max: 8 };
        ShardMemory::anonymous(geometry).unwrap()
    }

    fn block(memory: &ShardMemory, n: u8) -> Held {
        let (key, mut slot) = (BlockKey([n; 16]), memory.slab().take(4096).unwrap());
        payload::fill(&key, &mut slot);
        let checksum = Checksum::of(&key, &slot);
        let (tag, priority) = (BindingTag(1), Priority::Normal);
        slot.seal(&Record { key, checksum, bytes: 4096, tag, priority, expires_at: 0 })
    }

    fn write(store: &mut MemoryStore, memory: &ShardMemory, n: u8) -> Record {
        let bytes = block(memory, n);
        let record = bytes.record();
        store.submit(StoreOp::Write { token: OpToken(n.into()), record, bytes }).unwrap();
        record
    }

    fn poll(store: &mut MemoryStore) -> Vec<StoreDone> {
        let mut done = Vec::new();
        store.poll(&mut done);
        done
    }

    fn tokens(done: &[StoreDone]) -> Vec<u64> {
        done.iter().filter_map(|done| done.token().map(|token| token.0)).collect()
    }

    #[test]
    fn faults_meet_the_operation_they_were_meant_for() {
        let (mut store, memory) = (MemoryStore::new(MemoryConfig::default()), memory());
        let slow = StoreError::Slow { limit: Duration::from_millis(1) };
        store.inject(2, StoreFault::Fail(slow.clone()));
        store.inject(3, StoreFault::Delay { polls: 2 });
        store.inject(4, StoreFault::Never);
        for n in 1..=5 {
            write(&mut store, &memory, n);
        }
        let done = poll(&mut store);
        assert_eq!(tokens(&done), [1, 2, 5]);
        let failed = |done: &StoreDone| matches!(done, StoreDone::Written { result: Err(error), .. } if *error == slow);
        assert_eq!(done.iter().map(failed).collect::<Vec<_>>(), [false, true, false]);
        assert_eq!(tokens(&poll(&mut store)), [0; 0]);
        assert_eq!(tokens(&poll(&mut store)), [3]);
        for _ in 0..100 {
            assert!(poll(&mut store).is_empty());
        }
        assert_eq!(store.usage().in_flight, 1);
    }

    #[test]
    fn damage_is_found_by_reads_and_moves() {
        let (mut store, memory) = (MemoryStore::new(MemoryConfig::default()), memory());
        let record = write(&mut store, &memory, 1);
        let done = poll(&mut store);
        let [StoreDone::Written { result: Ok(at), .. }] = done[..] else { panic!("{done:?}") };
        let read = |store: &mut MemoryStore| {
            let into = memory.slab().take(4096).unwrap();
            store.submit(StoreOp::Read { token: OpToken(2), at, record, into }).unwrap();
            let Some(StoreDone::Read { result, .. }) = poll(store).pop() else { panic!("not a read") };
            result
        };
        store.inject(1, StoreFault::Corrupt);
        assert!(matches!(read(&mut store), Err(StoreError::Corrupt { what: "checksum", .. })));
        assert_eq!(read(&mut store), Ok(()), "that was once");
        assert!(store.damage(at));
        assert!(matches!(read(&mut store), Err(StoreError::Corrupt { .. })));
        store.submit(StoreOp::Move { token: OpToken(3), at, record }).unwrap();
        let moved = poll(&mut store).pop();
        assert!(matches!(moved, Some(StoreDone::Moved { result: Err(StoreError::Corrupt { .. }), .. })));
    }

    #[test]
    fn what_was_under_way_at_a_restart_is_decided_by_the_seed() {
        let memory = memory();
        let found = |seed: u64| {
            let mut store = MemoryStore::new(MemoryConfig::default());
            for n in 0..16 {
                write(&mut store, &memory, n);
            }
            store.reopen(seed).1.len()
        };
        let counts: Vec<usize> = (0..20).map(found).collect();
        assert_eq!(counts, (0..20).map(found).collect::<Vec<_>>(), "the same seed, the same world");
        assert!(counts.iter().any(|count| *count != counts[0]), "{counts:?}");
    }

    #[test]
    fn a_block_larger_than_a_segment_is_refused() {
        let config = MemoryConfig { segment_pages: 1, ..MemoryConfig::default() };
        let (mut store, memory) = (MemoryStore::new(config), memory());
        let key = BlockKey([1; 16]);
        let slot = memory.slab().take(4097).unwrap();
        let checksum = Checksum::of(&key, &slot[..4097]);
        let (tag, priority) = (BindingTag(1), Priority::Normal);
        let record = Record { key, checksum, bytes: 4097, tag, priority, expires_at: 0 };
        store.submit(StoreOp::Write { token: OpToken(1), record, bytes: slot.seal(&record) }).unwrap();
        let refused = StoreError::TooLarge { bytes: 4097, segment_bytes: 4096 };
        let done = poll(&mut store).pop();
        assert!(matches!(done, Some(StoreDone::Written { result: Err(error), .. }) if error == refused));
    }
}
