//! What the stories share: specs, and blocks whose bytes prove whose they are.

#![allow(dead_code, reason = "each story uses its part")]

use std::path::Path;
use std::sync::Arc;

use kv_arena::{
    Entry, EntryState, Geometry, HazardFile, HazardSet, Held, HugePages, MemorySpec, ShardMemory, ShardView,
    Slab,
};
use kv_block::{BindingId, BindingTag, BlockKey, Priority, Record, SessionId, ShardId, payload};

pub(crate) const GEOMETRY: Geometry = Geometry { regions: 4, region_bytes: 2 << 20, table_entries_max: 1000 };

pub(crate) fn spec(dir: &Path) -> MemorySpec {
    MemorySpec {
        dir: dir.into(),
        name: "shard-0".into(),
        geometry: GEOMETRY,
        numa_node: Some(0),
        // A machine's hugetlbfs is everybody's: only the story about it goes there, and cleans up.
        huge: HugePages::Off,
        hugetlbfs_dir: None,
        ready_bytes: u64::MAX,
        promised_bytes: 0,
    }
}

pub(crate) fn key(number: u64) -> BlockKey {
    BlockKey::from_halves([number.wrapping_mul(0x9e37_79b9_7f4a_7c15), number])
}

/// A sealed block with the keystream of its key; `None` when the arena is full.
pub(crate) fn store(slab: &Slab, number: u64, bytes: u32) -> Option<Held> {
    let key = key(number);
    let mut slot = slab.take(bytes).ok()?;
    let mut wanted = vec![0; bytes as usize];
    payload::fill(&key, &mut wanted);
    let checksum = slot.copy_from(&key, &wanted);
    let (tag, priority) = (BindingTag(1), Priority::Normal);
    Some(slot.seal(&Record { key, checksum, bytes, tag, priority, expires_at: 0 }))
}

pub(crate) fn entry(held: &Held) -> Entry {
    let record = held.record();
    Entry {
        checksum: record.checksum,
        host: Some((held.id(), held.generation())),
        state: EntryState::Present,
        ..Entry::pending(record.key, BindingId(0))
    }
}

pub(crate) fn is_right(held: &Held) -> bool {
    let record = held.record();
    record.checksum.matches(&record.key, held) && payload::first_wrong_byte(&record.key, held).is_none()
}

/// A session of this very process, its hazard file in `dir`.
pub(crate) fn connect(
    memory: &ShardMemory,
    hazards: &mut HazardSet,
    dir: &Path,
    session: u64,
) -> Arc<ShardView> {
    let pid = std::process::id();
    let start = kv_arena::hazard::process_start_time(pid).unwrap();
    let file = HazardFile::create(dir, ShardId(0), SessionId(session), pid, start, 64).unwrap();
    let view =
        ShardView::map(memory.meta_ro().unwrap(), memory.data_ro().unwrap(), file.fd().unwrap()).unwrap();
    hazards.add(file);
    view
}
