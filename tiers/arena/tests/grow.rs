//! An arena that gets its memory while it serves: what is handed out, what a kill leaves, what a full file system
//! does.

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use common::{GEOMETRY, is_right, spec, store};
use kv_arena::{Adoption, Error, Geometry, Grower, MemorySpec, ShardMemory, Slab};
use kv_block::Epoch;

const REGION: u32 = 2 << 20;
/// Two steps and a piece.
const REGIONS: u32 = 40;
/// Regions that a step allocates.
const STEP: u32 = 16;

/// An arena of which one region is there when it is opened.
fn growing(dir: &Path) -> MemorySpec {
    let geometry = Geometry { regions: REGIONS, ..GEOMETRY };
    MemorySpec { geometry, ready_bytes: 1, ..spec(dir) }
}

fn open(spec: &MemorySpec) -> (ShardMemory, Option<Grower>, Adoption) {
    let (mut memory, adoption) = ShardMemory::open(spec, Epoch(1)).unwrap();
    let grower = memory.take_grower();
    assert!(memory.take_grower().is_none(), "there is one");
    (memory, grower, adoption)
}

/// Takes every slot of a whole region that there is.
fn fill(slab: &Slab, numbers: &mut std::ops::RangeFrom<u64>) -> u32 {
    let mut stored = 0;
    while let Some(held) = store(slab, numbers.start, REGION) {
        assert!(slab.is_backed(held.offset(), REGION.into()), "a slot in a region without memory");
        numbers.start += 1;
        stored += 1;
    }
    stored
}

/// Regions with memory, and without.
fn books(slab: &Slab) -> (u32, u32) {
    let usage = slab.usage();
    (usage.regions_total, usage.regions_missing)
}

#[test]
fn only_regions_with_memory_are_handed_out_and_all_come_in_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (memory, grower, adoption) = open(&growing(dir.path()));
    assert_eq!(adoption, Adoption::Fresh);
    let (slab, mut grower) = (memory.slab(), grower.unwrap());
    let mut numbers = 0..;
    assert_eq!((books(slab), fill(slab, &mut numbers)), ((1, REGIONS - 1), 1));
    assert_eq!(grower.missing_bytes(), u64::from(REGIONS - 1) * u64::from(REGION));
    let first = grower.step().unwrap().unwrap();
    assert_eq!((first.len(), fill(slab, &mut numbers)), (STEP, 0), "nobody was told yet");
    assert!(!slab.is_backed(0, u64::from(REGION) + 1));
    assert_eq!((slab.grown(first), fill(slab, &mut numbers)), (STEP, STEP));
    while let Some(backed) = grower.step().unwrap() {
        assert!(!backed.is_empty());
        slab.grown(backed);
    }
    assert_eq!((grower.missing_bytes(), books(slab)), (0, (REGIONS, 0)));
    assert_eq!(fill(slab, &mut numbers), REGIONS - 1 - STEP);
    assert!(!slab.is_backed(slab.data_bytes(), 1), "beyond the end there is nothing");
    let file = fs::metadata(dir.path().join("shard-0.data")).unwrap();
    assert!(file.blocks() * 512 >= slab.data_bytes());
}

#[test]
fn a_life_that_ended_while_it_grew_is_continued_and_loses_no_block() {
    let dir = tempfile::tempdir().unwrap();
    let spec = growing(dir.path());
    let (memory, grower, _) = open(&spec);
    let mut grower = grower.unwrap();
    memory.slab().grown(grower.step().unwrap().unwrap());
    let mut numbers = 0..;
    let stored = fill(memory.slab(), &mut numbers);
    assert_eq!(stored, 1 + STEP);
    // Its pages came, and nobody heard of them before the end.
    grower.step().unwrap();
    drop((memory, grower));

    let (memory, grower, adoption) = open(&spec);
    assert_eq!(adoption, Adoption::Adopted { previous: Epoch(1), slots: stored.into() });
    let mut grower = grower.unwrap();
    let grown = 1 + 2 * STEP;
    assert_eq!(grower.missing_bytes(), u64::from(REGIONS - grown) * u64::from(REGION), "it goes on there");
    assert_eq!((books(memory.slab()), fill(memory.slab(), &mut numbers)), ((grown, REGIONS - grown), STEP));
    memory.slab().grown(grower.step().unwrap().unwrap());
    assert_eq!(books(memory.slab()), (REGIONS, 0));
    all_are_right(memory.slab(), stored);
    drop((memory, grower));

    let (memory, grower, _) = open(&spec);
    assert!(grower.is_none(), "nothing is missing");
    assert_eq!(books(memory.slab()), (REGIONS, 0));
}

fn all_are_right(slab: &Slab, wanted: u32) {
    let adopted: Vec<_> = slab.adopted().collect();
    assert_eq!(adopted.len(), wanted as usize);
    for (slot, header) in adopted {
        assert!(is_right(&slab.hold(slot, header.generation).unwrap()));
    }
}

#[test]
fn a_damaged_word_of_growth_costs_another_look_and_no_block() {
    for word in [0u64, u64::MAX, 0x0000_0028_0000_0000] {
        let dir = tempfile::tempdir().unwrap();
        let spec = growing(dir.path());
        let (memory, grower, _) = open(&spec);
        memory.slab().grown(grower.unwrap().step().unwrap().unwrap());
        let stored = fill(memory.slab(), &mut (0..));
        drop(memory);
        let meta = fs::OpenOptions::new().write(true).open(dir.path().join("shard-0.meta")).unwrap();
        meta.write_all_at(&word.to_le_bytes(), 72).unwrap();
        let (memory, grower, _) = open(&spec);
        let mut grower = grower.unwrap();
        assert_eq!(grower.missing_bytes(), memory.slab().data_bytes(), "{word:#x} is not believed");
        assert_eq!(books(memory.slab()), (stored, REGIONS - stored), "where blocks are there is memory");
        while let Some(backed) = grower.step().unwrap() {
            memory.slab().grown(backed);
        }
        assert_eq!(books(memory.slab()), (REGIONS, 0), "no region is counted twice");
        all_are_right(memory.slab(), stored);
    }
}

#[test]
fn holes_that_somebody_punched_are_not_taken_for_memory() {
    let dir = tempfile::tempdir().unwrap();
    let spec = growing(dir.path());
    let (memory, grower, _) = open(&spec);
    grower.unwrap().step().unwrap();
    drop(memory);
    let path = dir.path().join("shard-0.data");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let bytes = file.metadata().unwrap().len();
    file.set_len(0).unwrap();
    file.set_len(bytes).unwrap();
    let (memory, _grower, _) = open(&spec);
    assert_eq!(books(memory.slab()), (0, REGIONS));
    assert!(memory.slab().take(4096).is_err());
}

const INSIDE: &str = "KV_ARENA_GROW_INSIDE";

/// Runs the named test again with a mount namespace of its own; false when this machine has none to give.
fn inside(name: &str, dir: &Path) -> bool {
    let test = std::env::current_exe().unwrap();
    let out = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c"])
        .arg(format!("mount -t tmpfs -o size=96m none {} && exec \"$@\"", dir.display()))
        .arg("sh")
        .arg(test)
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, dir)
        .output();
    let out = match out {
        Ok(out) if out.status.success() => return true,
        Ok(out) => String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr),
        Err(error) => error.to_string(),
    };
    assert!(!out.contains("panicked") && !out.contains("signal"), "{out}");
    eprintln!("skipped: no mount namespace here: {out}");
    false
}

#[test]
fn a_file_system_that_fills_up_makes_a_smaller_arena_and_no_signal() {
    let Some(dir) = std::env::var_os(INSIDE) else {
        inside(
            "a_file_system_that_fills_up_makes_a_smaller_arena_and_no_signal",
            tempfile::tempdir().unwrap().path(),
        );
        return;
    };
    let dir = Path::new(&dir);
    let spec = growing(dir);
    let (memory, grower, _) = open(&spec);
    let mut grower = grower.unwrap();
    memory.slab().grown(grower.step().unwrap().unwrap());
    // 34 of 96 MiB are taken and 46 promised; somebody else takes 40.
    let other = dir.join("other");
    let file = fs::File::create(&other).unwrap();
    file.set_len(40 << 20).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 40 << 20).unwrap();
    let Err(Error::NoSpace { bytes, free, fix, .. }) = grower.step() else { panic!("there is no room") };
    assert_eq!(bytes, u64::from(REGIONS - 1 - STEP) * u64::from(REGION), "all that is missing");
    assert!(free < 32 << 20 && fix.contains("remount"), "{free} {fix}");
    let mut numbers = 0..;
    let stored = fill(memory.slab(), &mut numbers);
    assert_eq!((stored, books(memory.slab())), (1 + STEP, (1 + STEP, REGIONS - 1 - STEP)));
    drop((memory, grower));

    // The next life does not fail for it: what is there is warm. It goes on as soon as there is room.
    let (memory, grower, adoption) = open(&spec);
    assert!(matches!(adoption, Adoption::Adopted { slots, .. } if slots == u64::from(stored)));
    let mut grower = grower.unwrap();
    assert!(matches!(grower.step(), Err(Error::NoSpace { .. })));
    fs::remove_file(other).unwrap();
    drop(file);
    while let Some(backed) = grower.step().unwrap() {
        memory.slab().grown(backed);
    }
    assert_eq!(fill(memory.slab(), &mut numbers), REGIONS - stored);
    drop((memory, grower));

    // What can be known at once is an error at once: another arena has no room beside this one, not even where
    // it would be small at first.
    let more = MemorySpec { name: "shard-1".into(), ..growing(dir) };
    let Err(Error::NoSpace { fix, .. }) = ShardMemory::open(&more, Epoch(1)) else { panic!("it has room") };
    assert!(fix.contains("remount"), "{fix}");
    let small = Geometry { regions: 5, ..GEOMETRY };
    let more = MemorySpec { geometry: small, promised_bytes: 12 << 20, ..more };
    assert!(matches!(ShardMemory::open(&more, Epoch(1)), Err(Error::NoSpace { .. })), "it is promised");
    let more = MemorySpec { promised_bytes: 0, ..more };
    assert!(ShardMemory::open(&more, Epoch(1)).is_ok());
}
