//! A node in small: owns the memory, follows every operation to its end, answers reclaims.

#![allow(dead_code, reason = "every test file uses another part of it")]

use std::collections::BTreeMap;

use kv_arena::{Geometry, HazardSet, Held, ShardMemory, Slab};
use kv_block::{BindingTag, BlockKey, Checksum, DiskLocation, Priority, Record, payload};
use kv_ssd::{RecoveryReport, SimDisk, SsdConfig, SsdStore};
use kv_tiers::store::{BlockStore, OpToken, StoreDone, StoreError, StoreOp};

pub(crate) const MIB: u64 = 1 << 20;

/// Polls after which an operation should have ended.
const POLLS_MAX: usize = 60_000;

pub(crate) fn key(n: u64) -> BlockKey {
    BlockKey::from_halves([n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, n])
}

pub(crate) fn number(key: &BlockKey) -> u64 {
    key.halves()[1]
}

pub(crate) fn memory() -> ShardMemory {
    let geometry = Geometry { regions: 24, region_bytes: 2 << 20, table_entries_max: 8 };
    ShardMemory::anonymous(geometry).expect("memory for a test")
}

/// Segments of 1 MiB in 8 MiB.
pub(crate) fn small() -> SsdConfig {
    SsdConfig { segment_bytes: MIB, ..SsdConfig::new("", 8 * MIB) }
}

pub(crate) struct Node {
    pub(crate) store: SsdStore,
    pub(crate) slab: Slab,
    pub(crate) done: BTreeMap<OpToken, StoreDone>,
    pub(crate) offers: Vec<(u32, Vec<(Record, DiskLocation)>)>,
    tokens: u64,
    _memory: ShardMemory,
}

pub(crate) type Found = BTreeMap<BlockKey, (Record, DiskLocation)>;

impl Node {
    pub(crate) fn new(store: SsdStore) -> Self {
        Self::over(memory(), store)
    }

    pub(crate) fn over(memory: ShardMemory, store: SsdStore) -> Self {
        let slab = memory.slab().clone();
        Self { store, slab, done: BTreeMap::new(), offers: Vec::new(), tokens: 0, _memory: memory }
    }

    pub(crate) fn simulated(config: &SsdConfig, disk: &SimDisk) -> (Self, Found, RecoveryReport) {
        let (store, mut recovered) = SsdStore::open_simulated(config, disk).expect("a simulated disk opens");
        let mut found = Found::new();
        for (record, at) in recovered.by_ref().flatten() {
            assert!(found.insert(record.key, (record, at)).is_none(), "a key is named twice");
        }
        (Self::new(store), found, recovered.finish().expect("recovery ends"))
    }

    pub(crate) fn token(&mut self) -> OpToken {
        self.tokens += 1;
        OpToken(self.tokens)
    }

    /// A sealed block whose bytes prove whose they are.
    pub(crate) fn block(&self, n: u64, bytes: u32) -> Held {
        let mut slot = self.slab.take(bytes).expect("a free slot for a test");
        payload::fill(&key(n), &mut slot[..bytes as usize]);
        let checksum = Checksum::of(&key(n), &slot[..bytes as usize]);
        slot.seal(&Record {
            key: key(n),
            checksum,
            bytes,
            tag: BindingTag(n),
            priority: Priority::Normal,
            expires_at: 0,
        })
    }

    pub(crate) fn forget(&self, block: Held) {
        let place = (block.id(), block.generation());
        drop(block);
        // A write that was reported slow keeps a hold of its own.
        if self.slab.retire(place.0, place.1).is_ok() {
            self.slab.sweep(&HazardSet::new());
        }
    }

    pub(crate) fn submit(&mut self, op: StoreOp) -> OpToken {
        let token = op.token();
        assert!(self.store.submit(op).is_ok(), "the store has room");
        token
    }

    pub(crate) fn begin_write(&mut self, n: u64, bytes: u32) -> OpToken {
        let (bytes, token) = (self.block(n, bytes), self.token());
        self.submit(StoreOp::Write { token, record: bytes.record(), bytes })
    }

    pub(crate) fn begin_read(&mut self, record: &Record, at: DiskLocation) -> OpToken {
        let (into, token) = (self.slab.take(record.bytes).expect("a free slot for a test"), self.token());
        self.submit(StoreOp::Read { token, at, record: *record, into })
    }

    pub(crate) fn begin_remove(&mut self, key: BlockKey, at: DiskLocation) -> OpToken {
        let token = self.token();
        self.submit(StoreOp::Remove { token, at, key })
    }

    pub(crate) fn begin_move(&mut self, record: &Record, at: DiskLocation) -> OpToken {
        let token = self.token();
        self.submit(StoreOp::Move { token, at, record: *record })
    }

    pub(crate) fn poll(&mut self) {
        self.store.kick();
        let mut done = Vec::new();
        self.store.poll(&mut done);
        for one in done {
            match one {
                StoreDone::Reclaim { segment, entries, .. } => self.offers.push((segment, entries)),
                one => {
                    let token = one.token().expect("only an offer has none");
                    assert!(self.done.insert(token, one).is_none(), "{token:?} ended twice");
                }
            }
        }
    }

    pub(crate) fn end(&mut self, token: OpToken) -> StoreDone {
        for polls in 0..POLLS_MAX {
            if let Some(done) = self.done.remove(&token) {
                return done;
            }
            self.poll();
            // A real disk on a busy machine may need a while; a simulated one has ended long before.
            if polls > 5_000 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            } else {
                std::thread::yield_now();
            }
        }
        panic!("{token:?} did not end");
    }

    pub(crate) fn end_write(&mut self, token: OpToken) -> (Record, Result<DiskLocation, StoreError>) {
        let StoreDone::Written { bytes, result, .. } = self.end(token) else { panic!("not a write") };
        let record = bytes.record();
        self.forget(bytes);
        (record, result)
    }

    /// The end of a read; bytes that are called right are looked at, every one.
    pub(crate) fn end_read(&mut self, record: &Record, token: OpToken) -> Result<(), StoreError> {
        let StoreDone::Read { into, result, .. } = self.end(token) else { panic!("not a read") };
        if result.is_ok() {
            let wrong = payload::first_wrong_byte(&record.key, &into[..record.bytes as usize]);
            assert_eq!(wrong, None, "a wrong byte of {} was served", record.key);
        }
        result
    }

    pub(crate) fn write(&mut self, n: u64, bytes: u32) -> Result<(Record, DiskLocation), StoreError> {
        let token = self.begin_write(n, bytes);
        let (record, result) = self.end_write(token);
        result.map(|at| (record, at))
    }

    pub(crate) fn read(&mut self, record: &Record, at: DiskLocation) -> Result<(), StoreError> {
        let token = self.begin_read(record, at);
        self.end_read(record, token)
    }

    pub(crate) fn remove(&mut self, key: BlockKey, at: DiskLocation) -> Result<(), StoreError> {
        let token = self.begin_remove(key, at);
        let StoreDone::Removed { result, .. } = self.end(token) else { panic!("not a removal") };
        result
    }

    pub(crate) fn move_block(
        &mut self,
        record: &Record,
        at: DiskLocation,
    ) -> Result<DiskLocation, StoreError> {
        let token = self.begin_move(record, at);
        let StoreDone::Moved { result, .. } = self.end(token) else { panic!("not a move") };
        result
    }

    pub(crate) fn release(&mut self, segment: u32) -> Result<(), StoreError> {
        let token = self.token();
        self.submit(StoreOp::Release { token, segment });
        let StoreDone::Released { result, .. } = self.end(token) else { panic!("not a release") };
        result
    }

    /// Answers the oldest offer: moves what `keep` wants, forgets the rest of it from `alive`.
    pub(crate) fn reclaim(&mut self, alive: &mut Found, keep: impl Fn(&BlockKey) -> bool) -> bool {
        if self.offers.is_empty() {
            return false;
        }
        let (segment, entries) = self.offers.remove(0);
        for (record, at) in &entries {
            if alive.get(&record.key).is_none_or(|(_, place)| place != at) {
                continue;
            }
            if keep(&record.key)
                && let Ok(to) = self.move_block(record, *at)
            {
                alive.insert(record.key, (*record, to));
            } else {
                alive.remove(&record.key);
            }
        }
        let _ = self.release(segment);
        true
    }
}
