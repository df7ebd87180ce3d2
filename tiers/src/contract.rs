//! What every [`BlockStore`] must do, as tests that any store can run: implement [`Subject`] and put
//! [`store_contract!`](crate::store_contract) in a test module.
//!
//! The suite drives a store as the node does: it owns the memory, follows every operation to its one end,
//! answers reclaims, restarts. It panics where a store breaks its word. A subject should hold 4 to 64 MiB in
//! segments of 1 MiB at least, so that filling it is quick.

use std::collections::{BTreeMap, BTreeSet};

use kv_arena::{Geometry, HazardSet, Held, ShardMemory, Slab};
use kv_block::{BindingTag, BlockKey, Checksum, DiskLocation, Priority, Record, payload};

use crate::store::{BlockStore, OpToken, StoreDone, StoreError, StoreOp};

/// A kind of store, for the suite.
pub trait Subject {
    /// The store.
    type Store: BlockStore;
    /// An empty store.
    fn open(&mut self) -> Self::Store;
    /// Ends a store as a kill would, and opens what it left; with what was found there.
    fn reopen(&mut self, store: Self::Store) -> (Self::Store, Vec<(Record, DiskLocation)>);
    /// Lets time pass for a store that has not answered yet. Called between polls, a bounded number of times.
    fn wait(&mut self);
    /// The memory that blocks will come from and go to, before the store is opened: some devices want to know it.
    fn prepare(&mut self, _memory: &Slab) {}
    /// Whether the store keeps its blocks over a restart. One that does not must be empty then.
    fn durable(&self) -> bool {
        true
    }
}

/// Makes a test of every case for the subject that `$subject` evaluates to, a new one for each.
#[macro_export]
macro_rules! store_contract {
    ($subject:expr) => {
        $crate::store_contract!(@cases $subject,
            written_blocks_read_back_equal,
            another_key_length_or_checksum_is_corrupt,
            another_place_is_corrupt,
            a_full_store_offers_segments_and_their_space_comes_back,
            a_location_in_a_released_segment_is_stale,
            removed_blocks_stay_gone,
            every_operation_ends_once_and_returns_its_memory,
            beyond_in_flight_max_the_operation_comes_back,
            a_restart_finds_exactly_what_was_acknowledged,
            a_restart_with_operations_under_way_serves_no_wrong_byte,
            usage_counts_what_was_done,
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

/// A store under test and everything it was promised.
struct Driver<'a, S: Subject> {
    subject: &'a mut S,
    store: S::Store,
    slab: Slab,
    under_way: BTreeSet<OpToken>,
    done: BTreeMap<OpToken, StoreDone>,
    reclaims: Vec<(u32, Vec<(Record, DiskLocation)>)>,
    tokens: u64,
    _memory: ShardMemory,
}

fn key(n: u64) -> BlockKey {
    BlockKey::from_halves([n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, n])
}

impl<'a, S: Subject> Driver<'a, S> {
    fn new(subject: &'a mut S) -> Self {
        let geometry = Geometry { regions: 8, region_bytes: 2 << 20, table_entries_max: 8 };
        let memory = ShardMemory::anonymous(geometry).expect("memory for a test");
        subject.prepare(memory.slab());
        Self {
            store: subject.open(),
            slab: memory.slab().clone(),
            subject,
            under_way: BTreeSet::new(),
            done: BTreeMap::new(),
            reclaims: Vec::new(),
            tokens: 0,
            _memory: memory,
        }
    }

    fn token(&mut self) -> OpToken {
        self.tokens += 1;
        OpToken(self.tokens)
    }

    /// A sealed block whose bytes prove whose they are.
    fn block(&self, n: u64, bytes: u32) -> Held {
        let mut slot = self.slab.take(bytes).expect("a free slot for a test");
        payload::fill(&key(n), &mut slot[..bytes as usize]);
        let checksum = Checksum::of(&key(n), &slot[..bytes as usize]);
        let (tag, priority) = (BindingTag(n), Priority::Normal);
        slot.seal(&Record { key: key(n), checksum, bytes, tag, priority, expires_at: 0 })
    }

    fn forget(&self, block: Held) {
        let place = (block.id(), block.generation());
        drop(block);
        self.slab.retire(place.0, place.1).expect("nobody else holds it");
        self.slab.sweep(&HazardSet::new());
    }

    fn try_submit(&mut self, op: StoreOp) -> Result<OpToken, StoreOp> {
        let token = op.token();
        self.store.submit(op)?;
        assert!(self.under_way.insert(token), "the test used a token twice");
        Ok(token)
    }

    fn submit(&mut self, op: StoreOp) -> OpToken {
        match self.try_submit(op) {
            Ok(token) => token,
            Err(op) => panic!("the store has room and does not take {op:?}"),
        }
    }

    fn poll(&mut self) {
        self.store.kick();
        let mut done = Vec::new();
        self.store.poll(&mut done);
        for done in done {
            match done {
                StoreDone::Reclaim { segment, entries, .. } => self.reclaims.push((segment, entries)),
                done => {
                    let token = done.token().expect("only a reclaim has none");
                    assert!(self.under_way.remove(&token), "{token:?} ended twice, or was never begun");
                    self.done.insert(token, done);
                }
            }
        }
    }

    fn end(&mut self, token: OpToken) -> StoreDone {
        for _ in 0..POLLS_MAX {
            if let Some(done) = self.done.remove(&token) {
                return done;
            }
            self.poll();
            if !self.done.contains_key(&token) {
                self.subject.wait();
            }
        }
        panic!("{token:?} did not end in {POLLS_MAX} polls");
    }

    fn write(&mut self, n: u64, bytes: u32) -> Result<(Record, DiskLocation), StoreError> {
        let block = self.block(n, bytes);
        let (record, place, token) = (block.record(), (block.id(), block.generation()), self.token());
        self.submit(StoreOp::Write { token, record, bytes: block });
        let StoreDone::Written { bytes: block, result, .. } = self.end(token) else { panic!("not a write") };
        assert_eq!((block.id(), block.generation()), place, "another block's memory came back");
        self.forget(block);
        result.map(|at| (record, at))
    }

    /// Reads a block; right bytes are checked to the last one.
    fn read(&mut self, record: &Record, at: DiskLocation) -> Result<(), StoreError> {
        let into = self.slab.take(record.bytes.max(1)).expect("a free slot for a test");
        let (place, token) = ((into.id(), into.generation()), self.token());
        self.submit(StoreOp::Read { token, at, record: *record, into });
        let StoreDone::Read { into, result, .. } = self.end(token) else { panic!("not a read") };
        assert_eq!((into.id(), into.generation()), place, "another slot came back");
        if result.is_ok() {
            let wrong = payload::first_wrong_byte(&record.key, &into[..record.bytes as usize]);
            assert_eq!(wrong, None, "a wrong byte was served");
        }
        result
    }

    fn move_block(&mut self, record: &Record, at: DiskLocation) -> Result<DiskLocation, StoreError> {
        let token = self.token();
        self.submit(StoreOp::Move { token, at, record: *record });
        let StoreDone::Moved { result, .. } = self.end(token) else { panic!("not a move") };
        result
    }

    fn remove(&mut self, key: BlockKey, at: DiskLocation) -> Result<(), StoreError> {
        let token = self.token();
        self.submit(StoreOp::Remove { token, at, key });
        let StoreDone::Removed { result, .. } = self.end(token) else { panic!("not a removal") };
        result
    }

    fn release(&mut self, segment: u32) -> Result<(), StoreError> {
        let token = self.token();
        self.submit(StoreOp::Release { token, segment });
        let StoreDone::Released { result, .. } = self.end(token) else { panic!("not a release") };
        result
    }

    /// Answers the oldest offer as the node does: moves the blocks of `alive` that `keep` wants, forgets the
    /// others. False when there is no offer.
    fn reclaim(&mut self, alive: &mut Alive, keep: impl Fn(&BlockKey) -> bool) -> bool {
        if self.reclaims.is_empty() {
            return false;
        }
        let (segment, entries) = self.reclaims.remove(0);
        for (record, at) in &entries {
            assert_eq!(at.segment(), segment, "an offer names another segment's blocks");
            if alive.get(&record.key).is_none_or(|(_, place)| place != at) {
                continue;
            }
            if keep(&record.key) {
                let to = self.move_block(record, *at).expect("a segment's blocks can be moved");
                assert_ne!(to.segment(), segment, "moved into the segment that is given up");
                alive.insert(record.key, (*record, to));
            } else {
                alive.remove(&record.key);
            }
        }
        let lost = alive.values().find(|(_, at)| at.segment() == segment);
        assert_eq!(lost, None, "the offer did not name this block");
        self.release(segment).expect("an offered segment can be released");
        true
    }

    /// Writes a block, answering reclaims as long as the store is full.
    fn write_with_reclaim(
        &mut self,
        alive: &mut Alive,
        n: u64,
        bytes: u32,
        keep: impl Fn(&BlockKey) -> bool,
    ) {
        for _ in 0..1000 {
            match self.write(n, bytes) {
                Ok((record, at)) => {
                    alive.insert(record.key, (record, at));
                    return;
                }
                Err(StoreError::Full) => {
                    for _ in 0..100 {
                        if !self.reclaims.is_empty() {
                            break;
                        }
                        self.poll();
                        self.subject.wait();
                    }
                    assert!(self.reclaim(alive, &keep), "the store is full and offers no segment");
                }
                Err(error) => panic!("writing block {n}: {error}"),
            }
        }
        panic!("no room for block {n} after 1000 reclaims");
    }

    fn reopen(mut self) -> (Self, Alive) {
        let (store, found) = self.subject.reopen(self.store);
        self.store = store;
        self.under_way.clear();
        self.done.clear();
        self.reclaims.clear();
        let count = found.len();
        let found: Alive = found.into_iter().map(|(record, at)| (record.key, (record, at))).collect();
        assert_eq!(found.len(), count, "a restart names a key twice");
        (self, found)
    }

    /// What a restart must find of what was acknowledged.
    fn survivors(&self, alive: &Alive) -> Vec<Record> {
        if self.subject.durable() { records(alive) } else { Vec::new() }
    }

    /// After a restart of a store that keeps nothing: no place of before gives bytes.
    fn assert_forgotten(&mut self, alive: &Alive) {
        for (record, at) in alive.values().filter(|_| !self.subject.durable()).copied().collect::<Vec<_>>() {
            let read = self.read(&record, at);
            let is_refused = matches!(read, Err(StoreError::Stale { .. } | StoreError::Corrupt { .. }));
            assert!(is_refused, "block {} came back: {read:?}", record.key);
        }
    }

    fn assert_reads(&mut self, alive: &Alive) {
        for (record, at) in alive.values() {
            let read = self.read(record, *at);
            assert_eq!(read, Ok(()), "block {} at {at:?}", record.key);
        }
    }
}

/// What a store should have, by key.
type Alive = BTreeMap<BlockKey, (Record, DiskLocation)>;

fn records(alive: &Alive) -> Vec<Record> {
    alive.values().map(|(record, _)| *record).collect()
}

/// Blocks of all kinds of lengths come back byte for byte, in any order.
pub fn written_blocks_read_back_equal(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let mut alive = Alive::new();
    for (n, bytes) in [1, 511, 512, 4095, 4096, 4097, 65_536, 100_000, 262_144].into_iter().enumerate() {
        let (record, at) = driver.write(n as u64, bytes).expect("an empty store has room");
        alive.insert(record.key, (record, at));
    }
    driver.assert_reads(&alive);
    let again: Vec<_> = alive.values().rev().copied().collect();
    for (record, at) in again {
        assert_eq!(driver.read(&record, at), Ok(()));
    }
}

/// A read that expects another key, length or checksum than what lies there is refused.
pub fn another_key_length_or_checksum_is_corrupt(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (record, at) = driver.write(1, 10_000).expect("an empty store has room");
    driver.write(2, 10_000).expect("an empty store has room");
    for wrong in [
        Record { key: key(2), ..record },
        Record { bytes: 9_999, ..record },
        Record { bytes: 10_001, ..record },
        Record { bytes: 4_096, ..record },
        Record { checksum: Checksum(record.checksum.0 ^ 1), ..record },
    ] {
        let refused = driver.read(&wrong, at);
        assert!(matches!(refused, Err(StoreError::Corrupt { .. })), "{refused:?} for {wrong:?}");
        let refused = driver.move_block(&wrong, at);
        assert!(matches!(refused, Err(StoreError::Corrupt { .. })), "{refused:?} for moving {wrong:?}");
    }
    assert_eq!(driver.read(&record, at), Ok(()));
}

/// A read at another block's place, or where nothing begins, is refused.
pub fn another_place_is_corrupt(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (record, at) = driver.write(1, 10_000).expect("an empty store has room");
    let (_, other) = driver.write(2, 10_000).expect("an empty store has room");
    let next_page = DiskLocation::new(at.segment(), at.generation(), at.page() + 1).expect("not zero");
    for place in [other, next_page] {
        let refused = driver.read(&record, place);
        assert!(matches!(refused, Err(StoreError::Corrupt { .. })), "{refused:?} at {place:?}");
    }
    assert_eq!(driver.read(&record, at), Ok(()));
}

/// Three times the store's size goes through it; what is moved at each reclaim survives to the end.
pub fn a_full_store_offers_segments_and_their_space_comes_back(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let mut alive = Alive::new();
    let blocks = driver.store.usage().bytes_max * 3 / u64::from(BLOCK_BYTES);
    // A few of the first, which every reclaim meets again.
    let kept = |key: &BlockKey| key.halves()[1] < 8;
    for n in 0..blocks {
        driver.write_with_reclaim(&mut alive, n, BLOCK_BYTES, kept);
        let usage = driver.store.usage();
        assert!(usage.bytes_used <= usage.bytes_max, "{usage:?}");
    }
    assert_eq!(alive.keys().filter(|key| kept(key)).count(), 8, "a moved block was lost");
    assert!(alive.contains_key(&key(blocks - 1)));
    driver.assert_reads(&alive);
    let (mut driver, found) = driver.reopen();
    for record in driver.survivors(&alive) {
        assert!(found.get(&record.key).is_some_and(|(there, _)| *there == record), "{} is lost", record.key);
    }
    assert!(driver.subject.durable() || found.is_empty(), "{found:?} came back");
    driver.assert_forgotten(&alive);
    driver.assert_reads(&found);
}

/// A location from before a segment was released is refused, also when the segment is in use again.
pub fn a_location_in_a_released_segment_is_stale(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let mut alive = Alive::new();
    let (first, at) = driver.write(0, BLOCK_BYTES).expect("an empty store has room");
    alive.insert(first.key, (first, at));
    let blocks = driver.store.usage().bytes_max * 3 / u64::from(BLOCK_BYTES);
    let mut refusals = 0;
    for n in 1..blocks {
        driver.write_with_reclaim(&mut alive, n, BLOCK_BYTES, |_| false);
        if !alive.contains_key(&first.key) && n % 8 == 0 {
            assert_eq!(driver.read(&first, at), Err(StoreError::Stale { segment: at.segment() }));
            refusals += 1;
        }
    }
    assert!(refusals > 0, "the first segment was never offered");
}

/// What was removed is not named after a restart; written again, it is.
pub fn removed_blocks_stay_gone(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let mut alive = Alive::new();
    for n in 0..12 {
        let (record, at) = driver.write(n, 5_000).expect("an empty store has room");
        alive.insert(record.key, (record, at));
    }
    for n in [1, 5, 11] {
        let (_, at) = alive.remove(&key(n)).expect("just written");
        assert_eq!(driver.remove(key(n), at), Ok(()));
    }
    let (mut driver, found) = driver.reopen();
    assert_eq!(records(&found), driver.survivors(&alive));
    driver.assert_forgotten(&alive);
    let (record, at) = driver.write(5, 5_000).expect("there is room");
    let mut alive = found;
    alive.insert(record.key, (record, at));
    let (mut driver, found) = driver.reopen();
    assert_eq!(records(&found), driver.survivors(&alive));
    driver.assert_reads(&found);
}

/// Many operations at once: each ends once, and the memory that comes back is its own.
pub fn every_operation_ends_once_and_returns_its_memory(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let most = driver.store.usage().in_flight_max.min(16) as usize;
    let mut expected = BTreeMap::new();
    for n in 0..most as u64 {
        let (bytes, token) = (driver.block(n, 8192), driver.token());
        expected.insert(token, (bytes.id(), bytes.record()));
        driver.submit(StoreOp::Write { token, record: bytes.record(), bytes });
    }
    let mut places = Vec::new();
    for (token, (slot, record)) in expected {
        let StoreDone::Written { bytes, result, .. } = driver.end(token) else { panic!("not a write") };
        assert_eq!((bytes.id(), bytes.record()), (slot, record));
        driver.forget(bytes);
        places.push((record, result.expect("an empty store has room")));
    }
    let mut expected = BTreeMap::new();
    for (record, at) in places {
        let (into, token) = (driver.slab.take(8192).expect("a free slot for a test"), driver.token());
        expected.insert(token, (into.id(), record));
        driver.submit(StoreOp::Read { token, at, record, into });
    }
    for (token, (slot, record)) in expected {
        let StoreDone::Read { into, result, .. } = driver.end(token) else { panic!("not a read") };
        assert_eq!((into.id(), result), (slot, Ok(())));
        assert_eq!(payload::first_wrong_byte(&record.key, &into[..8192]), None);
    }
    for _ in 0..10 {
        driver.poll();
    }
    assert!(driver.done.is_empty() && driver.under_way.is_empty());
    assert_eq!(driver.store.usage().in_flight, 0);
    let used: u32 = driver.slab.regions().iter().map(|region| region.used).sum();
    assert_eq!(used, 0, "memory was not given back");
}

/// A store that is busy refuses at once, takes nothing, and goes on when something ended.
pub fn beyond_in_flight_max_the_operation_comes_back(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let (record, at) = driver.write(1, 4096).expect("an empty store has room");
    let most = driver.store.usage().in_flight_max;
    let mut taken = Vec::new();
    let refused = loop {
        assert!(taken.len() <= most as usize, "more than in_flight_max were taken");
        let (into, token) = (driver.slab.take(4096).expect("a free slot for a test"), driver.token());
        let slot = into.id();
        match driver.try_submit(StoreOp::Read { token, at, record, into }) {
            Ok(token) => taken.push(token),
            Err(StoreOp::Read { token: given, into, .. }) => {
                assert_eq!((given, into.id()), (token, slot), "another operation came back");
                break given;
            }
            Err(other) => panic!("another operation came back: {other:?}"),
        }
    };
    assert_eq!(driver.store.usage().in_flight, most);
    for token in taken {
        assert!(matches!(driver.end(token), StoreDone::Read { result: Ok(()), .. }));
    }
    assert_eq!(driver.read(&record, at), Ok(()), "it goes on");
    assert!(!driver.done.contains_key(&refused), "a refused operation ended");
}

/// After writes, moves, removals and overwrites, a restart names what was acknowledged and nothing else.
pub fn a_restart_finds_exactly_what_was_acknowledged(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let mut alive = Alive::new();
    for n in 0..40 {
        let (record, at) = driver.write(n, 3_000 + n as u32 * 500).expect("an empty store has room");
        alive.insert(record.key, (record, at));
    }
    for n in (0..40).step_by(7) {
        let (_, at) = alive.remove(&key(n)).expect("just written");
        driver.remove(key(n), at).expect("a removal");
    }
    for n in (0..40).step_by(5) {
        // Also some that were removed.
        let (record, at) = driver.write(n, 2_000).expect("there is room");
        alive.insert(record.key, (record, at));
    }
    for _ in 0..3 {
        let (next, found) = driver.reopen();
        driver = next;
        assert_eq!(records(&found), driver.survivors(&alive));
        driver.assert_forgotten(&alive);
        driver.assert_reads(&found);
    }
    let (record, at) = driver.write(100, 3_000).expect("there is room");
    assert_eq!(driver.read(&record, at), Ok(()), "it goes on after a restart");
}

/// What was not acknowledged may be there or not; what is named is right.
pub fn a_restart_with_operations_under_way_serves_no_wrong_byte(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let mut alive = Alive::new();
    for round in 0..6 {
        for n in 0..4 {
            let (record, at) = driver.write(round * 100 + n, 20_000).expect("there is room");
            alive.insert(record.key, (record, at));
        }
        for n in 50..58 {
            let (bytes, token) = (driver.block(round * 100 + n, 20_000), driver.token());
            driver.submit(StoreOp::Write { token, record: bytes.record(), bytes });
        }
        if round % 2 == 1 {
            driver.store.kick();
        }
        let (next, found) = driver.reopen();
        driver = next;
        for Record { key, .. } in driver.survivors(&alive) {
            assert!(found.contains_key(&key), "{key} was acknowledged and is lost");
        }
        assert!(driver.subject.durable() || found.is_empty(), "{found:?} came back");
        driver.assert_reads(&found);
        alive = found;
    }
}

/// The numbers say what was done.
pub fn usage_counts_what_was_done(subject: &mut impl Subject) {
    let mut driver = Driver::new(subject);
    let before = driver.store.usage();
    assert_eq!((before.bytes_written, before.bytes_read, before.in_flight), (0, 0, 0));
    assert!(before.in_flight_max > 0 && before.bytes_max > 0);
    let (record, at) = driver.write(1, 10_000).expect("an empty store has room");
    driver.read(&record, at).expect("it was written");
    let after = driver.store.usage();
    assert_eq!((after.bytes_written, after.bytes_read, after.in_flight), (10_000, 10_000, 0));
    assert!(after.bytes_used >= 10_000 && after.bytes_used <= after.bytes_max, "{after:?}");
}
