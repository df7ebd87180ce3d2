//! Workers read while the daemon evicts under them: never a wrong byte.

#![expect(clippy::disallowed_methods, reason = "the test is bounded in time")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{GEOMETRY, connect, entry, key, store};
use kv_arena::hazard::Owner;
use kv_arena::{Absent, EntryState, HazardFile, HazardSet, ShardMemory, ShardView};
use kv_block::{SessionId, ShardId, payload};

#[test]
fn readers_meet_the_evictor_and_never_read_a_wrong_byte() {
    const KEYS: u64 = 200;
    const ROUNDS: u64 = 3000;
    let dir = tempfile::tempdir().unwrap();
    let mut memory = ShardMemory::anonymous(GEOMETRY).unwrap();
    let mut table = memory.take_table().unwrap().unwrap();
    let mut hazards = HazardSet::new();
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    let views = [1, 2].map(|session| connect(&memory, &mut hazards, dir.path(), session));
    std::thread::scope(|scope| {
        for (seed, view) in views.iter().enumerate() {
            let (stop, reads) = (&stop, &reads);
            scope.spawn(move || {
                let (mut number, mut kept) = (seed as u64, Vec::new());
                while !stop.load(Ordering::Relaxed) {
                    number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let key = key((number >> 33) % KEYS);
                    match view.read(&key) {
                        Ok(guard) => {
                            assert_eq!(*guard.key(), key);
                            assert_eq!(payload::first_wrong_byte(&key, &guard), None);
                            reads.fetch_add(1, Ordering::Relaxed);
                            kept.push(guard);
                        }
                        Err(Absent::NotFound | Absent::Contended) => {}
                        Err(other) => panic!("{other:?}"),
                    }
                    if kept.len() > 8 {
                        let oldest = kept.remove(0);
                        assert_eq!(payload::first_wrong_byte(oldest.key(), &oldest), None, "after a while");
                    }
                }
            });
        }
        let slab = memory.slab();
        let sizes = [4096, 9000, 70_000];
        let started = Instant::now();
        let mut round = 0;
        // Rounds enough, and then until somebody has read: the machine may be busy elsewhere.
        while round < ROUNDS
            || (reads.load(Ordering::Relaxed) < 100 && started.elapsed() < Duration::from_secs(60))
        {
            round += 1;
            let number = round.wrapping_mul(0x9e37_79b9) % KEYS;
            let present = |found: &kv_arena::Entry| found.state == EntryState::Present;
            if let Some(place) = table.remove(&key(number)).filter(present).and_then(|found| found.host) {
                slab.retire(place.0, place.1).unwrap();
            }
            if round % 8 == 0 {
                slab.sweep(&hazards);
            }
            if let Some(held) = store(slab, number, sizes[round as usize % 3]) {
                table.set(&entry(&held)).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reads.load(Ordering::Relaxed) >= 100);
    let mut touched = Vec::new();
    hazards.drain_touches(&mut touched);
    assert!(!touched.is_empty());
    memory.slab().sweep(&hazards);
    assert_eq!(memory.slab().usage().limbo, 0, "all hazards are cleared");
}

#[test]
fn a_worker_quicker_than_its_shard_asks_the_daemon() {
    let mut memory = ShardMemory::anonymous(GEOMETRY).unwrap();
    let mut table = memory.take_table().unwrap().unwrap();
    let owner = Owner { shard: ShardId(0), session: SessionId(1), pid: 1, start_time: 1 };
    let file = HazardFile::anonymous(owner, 8).unwrap();
    let (meta, data) = (memory.meta_ro().unwrap(), memory.data_ro().unwrap());
    let view = ShardView::map(meta, data, file.fd().unwrap()).unwrap();
    let held = store(memory.slab(), 1, 4096).unwrap();
    table.set(&entry(&held)).unwrap();
    assert_eq!(view.read(&key(1)).unwrap_err(), Absent::Contended);
    assert!(!view.is_closed());
    let mut hazards = HazardSet::new();
    hazards.add(file);
    assert!(view.read(&key(1)).is_ok());
    hazards.remove(SessionId(1));
    assert!(view.is_closed());
    assert_eq!(view.read(&key(1)).unwrap_err(), Absent::Closed);
}

#[test]
fn a_session_has_as_many_reads_as_cells() {
    let dir = tempfile::tempdir().unwrap();
    let mut memory = ShardMemory::anonymous(GEOMETRY).unwrap();
    let mut table = memory.take_table().unwrap().unwrap();
    let mut hazards = HazardSet::new();
    let view = connect(&memory, &mut hazards, dir.path(), 1);
    let held = store(memory.slab(), 1, 4096).unwrap();
    table.set(&entry(&held)).unwrap();
    let mut guards: Vec<_> = (0..64).map(|_| view.read(&key(1)).unwrap()).collect();
    assert_eq!(view.read(&key(1)).unwrap_err(), Absent::HazardsFull);
    assert_eq!(hazards.scan().unwrap().len(), 64);
    guards.pop();
    assert!(view.read(&key(1)).is_ok());
    drop(guards);
    assert!(hazards.scan().unwrap().is_empty());
}

#[test]
fn an_entry_that_points_at_another_block_is_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let mut memory = ShardMemory::anonymous(GEOMETRY).unwrap();
    let mut table = memory.take_table().unwrap().unwrap();
    let mut hazards = HazardSet::new();
    let view = connect(&memory, &mut hazards, dir.path(), 1);
    let held = store(memory.slab(), 1, 4096).unwrap();
    table.set(&kv_arena::Entry { key: key(2), ..entry(&held) }).unwrap();
    assert_eq!(view.read(&key(2)).unwrap_err(), Absent::Contended);
    let keys = [key(1), key(2)];
    assert_eq!((view.resident_prefix(&keys), view.resident_prefix(&keys[1..])), (0, 1));
    assert!(hazards.scan().unwrap().is_empty());
}
