//! A node's memory, and what is true of it.

use std::collections::{BTreeMap, BTreeSet};

use kv_arena::{Geometry, HazardSet, Held, ShardMemory};
use kv_block::{BindingTag, BlockKey, Checksum, Epoch, Generation, Priority, Record, SlotId, payload};
use kv_wire::message::WantId;

use crate::{Micros, Reader};

/// Keys that there are.
pub(super) const KEYS: u64 = 24;

pub(super) fn key(n: u64) -> BlockKey {
    BlockKey::from_halves([n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, n])
}

pub(super) fn number(key: &BlockKey) -> u64 {
    key.halves()[1]
}

/// How long the block of a key is, everywhere.
pub(super) fn bytes_of(n: u64) -> u32 {
    [4096, 100, 4097, 8192][(n % 4) as usize]
}

/// A node in one life.
pub(super) struct Node {
    pub(super) epoch: Epoch,
    pub(super) memory: ShardMemory,
    pub(super) blocks: BTreeMap<u64, Held>,
    /// Evicted while somebody held them.
    pub(super) retiring: Vec<(SlotId, Generation)>,
    /// By peer.
    pub(super) readers: BTreeMap<usize, ReaderSide>,
}

/// A reader and its connection.
pub(super) struct ReaderSide {
    pub(super) reader: Reader,
    /// The attempt that may still become a connection.
    pub(super) attempt: Option<u64>,
    pub(super) conn: Option<u64>,
    pub(super) tick_at: Option<Micros>,
    pub(super) flushing: bool,
}

impl Node {
    pub(super) fn new(epoch: Epoch) -> Self {
        let geometry = Geometry { regions: 6, region_bytes: 2 << 20, table_entries_max: 8 };
        let memory = ShardMemory::anonymous(geometry).expect("memory for a simulated node");
        Self { epoch, memory, blocks: BTreeMap::new(), retiring: Vec::new(), readers: BTreeMap::new() }
    }

    /// Stores the block of a key, if it is not there.
    pub(super) fn store(&mut self, n: u64) {
        let bytes = bytes_of(n);
        let Ok(mut slot) = self.memory.slab().take(bytes) else { return };
        if self.blocks.contains_key(&n) {
            return;
        }
        payload::fill(&key(n), &mut slot[..bytes as usize]);
        let checksum = Checksum::of(&key(n), &slot[..bytes as usize]);
        let (tag, priority) = (BindingTag(n), Priority::Normal);
        let record = Record { key: key(n), checksum, bytes, tag, priority, expires_at: 0 };
        self.blocks.insert(n, slot.seal(&record));
    }

    /// Forgets the block of a key. Its slot is used for something else as soon as nobody holds it.
    pub(super) fn evict(&mut self, n: u64) {
        if let Some(block) = self.blocks.remove(&n) {
            self.retiring.push((block.id(), block.generation()));
        }
        self.sweep();
    }

    pub(super) fn sweep(&mut self) {
        let slab = self.memory.slab();
        self.retiring.retain(|(slot, generation)| slab.retire(*slot, *generation).is_err());
        slab.sweep(&HazardSet::new());
        // Whoever still reads one of them finds this.
        for bytes in [4096, 8192] {
            if let Ok(mut slot) = slab.take(bytes) {
                slot.fill(0xee);
            }
        }
    }

    /// Slots that are not free.
    pub(super) fn used(&self) -> usize {
        let usage = self.memory.slab().usage();
        usage.classes.iter().map(|class| (class.slots - class.free) as usize).sum()
    }

    /// Slots that somebody holds.
    pub(super) fn held(&self) -> usize {
        self.memory.slab().regions().iter().map(|region| region.held as usize).sum()
    }
}

/// A want or a probe that has not ended.
pub(super) struct Open {
    pub(super) node: usize,
    pub(super) peer: usize,
    pub(super) key: u64,
    /// When it must have ended, with a little for the clock.
    pub(super) limit: Micros,
}

/// What is open in the world, and when it is too late.
#[derive(Default)]
pub(super) struct Ledger {
    pub(super) wants: BTreeMap<WantId, Open>,
    pub(super) probes: BTreeMap<u64, Open>,
    limits: BTreeSet<(Micros, u64)>,
}

impl Ledger {
    pub(super) fn want(&mut self, want: WantId, open: Open) {
        self.limits.insert((open.limit, want.0));
        self.wants.insert(want, open);
    }

    pub(super) fn probe(&mut self, probe: u64, open: Open) {
        self.limits.insert((open.limit, probe));
        self.probes.insert(probe, open);
    }

    pub(super) fn end_want(&mut self, want: WantId) -> Option<Open> {
        let open = self.wants.remove(&want)?;
        self.limits.remove(&(open.limit, want.0));
        Some(open)
    }

    pub(super) fn end_probe(&mut self, probe: u64) -> Option<Open> {
        let open = self.probes.remove(&probe)?;
        self.limits.remove(&(open.limit, probe));
        Some(open)
    }

    /// A node died, and with it all that it wanted.
    pub(super) fn forget(&mut self, node: usize) {
        self.wants.retain(|_, open| open.node != node);
        self.probes.retain(|_, open| open.node != node);
        let wants = self.wants.iter().map(|(id, open)| (open.limit, id.0));
        let probes = self.probes.iter().map(|(id, open)| (open.limit, *id));
        self.limits = wants.chain(probes).collect();
    }

    pub(super) fn check(&self, now: Micros) {
        if let Some((limit, id)) = self.limits.first() {
            assert!(*limit >= now, "{id} is open at {now:?}, it should have ended by {limit:?}");
        }
    }
}
