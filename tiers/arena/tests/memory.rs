//! Opening a shard's memory: made, taken over, refused, set aside.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{GEOMETRY, connect, entry, is_right, key, spec, store};
use kv_arena::{
    Absent, Adoption, Error, Geometry, HazardFile, HazardSet, HugePages, MemorySpec, RetireError,
    ShardMemory, ShardView,
};
use kv_block::{Epoch, SessionId, ShardId};

fn files(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

#[test]
fn what_was_sealed_is_there_in_the_next_life_and_waits_for_verification() {
    let dir = tempfile::tempdir().unwrap();
    let (mut memory, adoption) = ShardMemory::open(&spec(dir.path()), Epoch(7)).unwrap();
    assert_eq!((adoption, memory.epoch()), (Adoption::Fresh, Epoch(7)));
    assert!(!memory.notes().is_empty(), "it says what pages it got");
    let mut table = memory.take_table().unwrap().unwrap();
    assert!(memory.take_table().unwrap().is_none(), "one writer");
    let about_table =
        memory.notes().iter().filter(|note| note.contains("catalog table in ordinary 4 KiB pages"));
    assert_eq!(about_table.count(), 1, "huge pages are off: {:?}", memory.notes());
    let held = store(memory.slab(), 1, 100_000).unwrap();
    table.set(&entry(&held)).unwrap();
    let (id, generation) = (held.id(), held.generation());
    drop(memory);
    drop(table);
    assert!(
        matches!(ShardMemory::open(&spec(dir.path()), Epoch(0)), Err(Error::Locked { .. })),
        "a hold keeps the memory ours"
    );
    drop(held);

    let (mut memory, adoption) = ShardMemory::open(&spec(dir.path()), Epoch(0)).unwrap();
    assert_eq!(adoption, Adoption::Adopted { previous: Epoch(7), slots: 1 });
    assert_eq!(memory.epoch(), Epoch(8));
    let table = memory.take_table().unwrap().unwrap();
    assert_eq!((table.len(), table.find(&key(1))), (0, None), "rebuilt by its owner");
    let (found, header) = memory.slab().adopted().next().unwrap();
    assert_eq!((found, header.generation), (id, generation));
    let held = memory.slab().hold(id, generation).unwrap();
    assert!(is_right(&held));
    drop((held, table));
    memory.wipe().unwrap();
    assert!(files(dir.path()).is_empty());
}

#[test]
fn two_daemons_never_share_memory() {
    let dir = tempfile::tempdir().unwrap();
    let (memory, _) = ShardMemory::open(&spec(dir.path()), Epoch(1)).unwrap();
    assert!(matches!(ShardMemory::open(&spec(dir.path()), Epoch(1)), Err(Error::Locked { .. })));
    let passed = (memory.meta_ro().unwrap(), memory.data_rw().unwrap());
    drop(memory);
    let again = ShardMemory::open(&spec(dir.path()), Epoch(1));
    assert!(again.is_ok(), "descriptors that workers keep hold no lock");
    drop(passed);
}

/// Overwrites one byte of the meta file.
fn write(dir: &Path, at: u64, byte: u8) {
    let file = fs::OpenOptions::new().write(true).open(dir.join("shard-0.meta")).unwrap();
    file.write_all_at(&[byte], at).unwrap();
}

#[test]
fn whatever_is_not_usable_is_set_aside_and_never_destroyed() {
    type Damage = fn(&Path, &mut MemorySpec);
    // (what is done, word in the reason, epoch after an epoch of 5)
    let damages: [(Damage, &str, u64); 8] = [
        (|dir, _| write(dir, 0, b'x'), "begin", 0),
        (|dir, _| write(dir, 8, 9), "version 9", 6),
        (|dir, _| write(dir, 20, 1), "damaged", 0),
        (|dir, _| write(dir, 64, 1), "damaged", 0),
        (|dir, _| fs::write(dir.join("shard-0.meta"), "short").unwrap(), "shorter", 0),
        (|dir, _| write(dir, 64 << 20, 0), "bytes", 6),
        (|_, spec| spec.geometry.regions = 5, "geometry", 6),
        (|dir, _| fs::remove_file(dir.join("shard-0.data")).unwrap(), "gone", 6),
    ];
    for (damage, reason, epoch) in damages {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = spec(dir.path());
        let (memory, _) = ShardMemory::open(&spec, Epoch(5)).unwrap();
        store(memory.slab(), 1, 5000).unwrap();
        drop(memory);
        damage(dir.path(), &mut spec);
        let kept = fs::read(dir.path().join("shard-0.meta")).unwrap();
        let (memory, adoption) = ShardMemory::open(&spec, Epoch(0)).unwrap();
        let Adoption::SetAside { why, to } = adoption else { panic!("{reason}: {adoption:?}") };
        assert!(why.contains(reason), "{why}");
        assert_eq!(memory.epoch(), Epoch(epoch), "{reason}");
        assert_eq!(memory.slab().adopted().count(), 0);
        assert!(fs::read(&to).unwrap() == kept, "{reason}: kept as it was");
        drop(memory);
        // And a second time: another number, the first one untouched.
        fs::write(dir.path().join("shard-0.meta"), "again").unwrap();
        let (_, adoption) = ShardMemory::open(&spec, Epoch(0)).unwrap();
        assert!(matches!(adoption, Adoption::SetAside { to: second, .. } if second != to));
        assert!(fs::read(&to).unwrap() == kept);
    }
}

#[test]
fn a_data_file_of_another_life_is_not_mistaken_for_ours() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in [&one, &two] {
        let (memory, _) = ShardMemory::open(&spec(dir.path()), Epoch(1)).unwrap();
        store(memory.slab(), 1, 5000).unwrap();
    }
    fs::copy(two.path().join("shard-0.data"), one.path().join("other")).unwrap();
    fs::rename(one.path().join("other"), one.path().join("shard-0.data")).unwrap();
    let (_, adoption) = ShardMemory::open(&spec(one.path()), Epoch(1)).unwrap();
    assert!(matches!(adoption, Adoption::SetAside { .. }));
}

#[test]
fn a_creation_that_was_killed_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("shard-0.data"), "half an arena").unwrap();
    fs::write(dir.path().join("shard-0.meta.new"), "half a header").unwrap();
    let (_, adoption) = ShardMemory::open(&spec(dir.path()), Epoch(1)).unwrap();
    assert_eq!(adoption, Adoption::Fresh);
    assert_eq!(files(dir.path()), ["shard-0.data", "shard-0.lock", "shard-0.meta"]);
}

#[test]
fn memory_that_does_not_fit_is_an_error_that_names_the_fix() {
    let dir = tempfile::tempdir().unwrap();
    let geometry = Geometry { regions: 4096, region_bytes: 1 << 31, table_entries_max: 10 };
    let error = ShardMemory::open(&MemorySpec { geometry, ..spec(dir.path()) }, Epoch(1)).unwrap_err();
    match &error {
        Error::NoSpace { bytes, .. } => {
            assert_eq!(*bytes, 8 << 40);
            assert!(error.to_string().contains("remount"), "{error}");
        }
        other => eprintln!("skipped: this file system refuses a file of 8 TiB outright: {other}"),
    }
    assert_eq!(files(dir.path()), ["shard-0.lock"], "nothing stays behind");
    let (_, adoption) = ShardMemory::open(&spec(dir.path()), Epoch(1)).unwrap();
    assert_eq!(adoption, Adoption::Fresh);
}

#[test]
fn required_huge_pages_are_there_or_refused_with_the_way_to_get_them() {
    let dir = tempfile::tempdir().unwrap();
    let spec = MemorySpec { huge: HugePages::Required, ..spec(dir.path()) };
    match ShardMemory::open(&spec, Epoch(1)) {
        Ok((memory, _)) => {
            assert!(memory.huge_pages());
            store(memory.slab(), 1, 5000).unwrap();
            drop(memory);
            let (memory, adoption) = ShardMemory::open(&spec, Epoch(1)).unwrap();
            assert!(memory.huge_pages() && matches!(adoption, Adoption::Adopted { slots: 1, .. }));
            memory.wipe().unwrap();
        }
        Err(Error::HugePages { why }) => {
            eprintln!("skipped: no huge pages here: {why}");
            assert_eq!(files(dir.path()), ["shard-0.lock"]);
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn an_old_view_ends_with_the_life_of_its_daemon_and_what_it_reads_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (mut memory, _) = ShardMemory::open(&spec(dir.path()), Epoch(1)).unwrap();
    let mut hazards = HazardSet::adopt(dir.path(), ShardId(0)).unwrap();
    let mut table = memory.take_table().unwrap().unwrap();
    let view = connect(&memory, &mut hazards, dir.path(), 1);
    let held = store(memory.slab(), 1, 50_000).unwrap();
    table.set(&entry(&held)).unwrap();
    let guard = view.read(&key(1)).unwrap();
    // Killed: nothing is dropped in order, but in one process the lock has to go.
    drop((held, table, hazards));
    drop(memory);

    let (mut memory, _) = ShardMemory::open(&spec(dir.path()), Epoch(1)).unwrap();
    assert_eq!(view.epoch(), Some(Epoch(2)), "the worker can see it");
    let mut hazards = HazardSet::adopt(dir.path(), ShardId(0)).unwrap();
    let mut table = memory.take_table().unwrap().unwrap();
    let (id, header) = memory.slab().adopted().next().unwrap();
    let held = memory.slab().hold(id, header.generation).unwrap();
    assert!(view.is_closed());
    table.set(&entry(&held)).unwrap();
    assert_eq!(view.read(&key(1)).unwrap_err(), Absent::Closed);
    let new_view = connect(&memory, &mut hazards, dir.path(), 1);
    assert!(matches!(new_view.read(&key(1)), Err(Absent::Entry(_))), "not verified yet");
    assert!(is_right(&held) && memory.slab().mark_verified(&held));
    assert!(new_view.read(&key(1)).is_ok());
    drop(held);
    memory.slab().retire(id, header.generation).unwrap();
    assert_eq!(memory.slab().retire(id, header.generation), Err(RetireError::Gone));
    assert_eq!(memory.slab().sweep(&hazards), 0, "a guard of the earlier life still reads");
    assert!(guard.record().checksum.matches(guard.key(), &guard));
    drop(guard);
    assert_eq!(hazards.reap(), 0);
    assert_eq!(memory.slab().sweep(&hazards), 1);
}

#[test]
fn a_view_refuses_files_that_do_not_fit_each_other() {
    let small = ShardMemory::anonymous(GEOMETRY).unwrap();
    let large = ShardMemory::anonymous(Geometry { regions: 5, ..GEOMETRY }).unwrap();
    let owner = kv_arena::hazard::Owner { shard: ShardId(0), session: SessionId(1), pid: 1, start_time: 1 };
    let hazard = HazardFile::anonymous(owner, 8).unwrap();
    let map = |meta: &ShardMemory, data: &ShardMemory, hazard: std::os::fd::OwnedFd| {
        ShardView::map(meta.meta_ro().unwrap(), data.data_ro().unwrap(), hazard)
    };
    assert!(map(&small, &small, hazard.fd().unwrap()).is_ok());
    let wrong = |result: Result<_, Error>, what: &str| match result {
        Err(Error::Mismatch { what: found, .. }) => assert_eq!(found, what),
        other => panic!("{what}: {other:?}"),
    };
    wrong(map(&small, &large, hazard.fd().unwrap()), "data");
    wrong(map(&small, &small, small.data_rw().unwrap()), "hazard");
    let swapped = ShardView::map(small.data_ro().unwrap(), small.meta_ro().unwrap(), hazard.fd().unwrap());
    wrong(swapped, "meta");
    let short = hazard.fd().unwrap();
    rustix::fs::ftruncate(&short, 4100).unwrap();
    wrong(map(&small, &small, short), "hazard");
}

#[test]
fn a_view_for_reading_writes_nothing() {
    let memory = ShardMemory::anonymous(GEOMETRY).unwrap();
    let mut hazards = HazardSet::new();
    let dir = tempfile::tempdir().unwrap();
    let view = connect(&memory, &mut hazards, dir.path(), 1);
    let lent = memory.slab().take(4096).unwrap().lend();
    assert!(!view.is_writable());
    assert_eq!(view.fill(lent.id(), lent.generation(), 1).unwrap_err(), Absent::Stale);
}
