//! A daemon killed at any moment: the next one finds everything that was sealed, and nothing else.
//!
//! The test runs itself as the daemon and kills it with SIGKILL after a moment that differs every time.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{connect, entry, is_right, key, spec, store};
use kv_arena::{Adoption, HazardSet, ShardMemory, SlotState};
use kv_block::{Epoch, ShardId};

const DIR: &str = "KV_ARENA_KILLED_DIR";
const ROUNDS: u64 = 25;

/// What the killed daemon does: takes, fills, abandons, lends, seals, publishes, retires, sweeps, for ever.
#[test]
fn the_daemon_that_gets_killed() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let dir = Path::new(&dir);
    let (mut memory, _) = ShardMemory::open(&spec(dir), Epoch(1)).unwrap();
    let hazards = HazardSet::adopt(dir, ShardId(0)).unwrap();
    let mut table = memory.take_table().unwrap().unwrap();
    let slab = memory.slab().clone();
    let mut live: BTreeMap<u64, _> = BTreeMap::new();
    for (id, header) in slab.adopted() {
        live.insert(header.record.key.halves()[1], (id, header.generation));
    }
    slab.sweep(&hazards);
    println!("\nready");
    let mut random = u64::from(std::process::id());
    let sizes = [1, 4096, 10_000, 65_536, 300_000];
    for number in u64::from(std::process::id()) << 32.. {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let pick = (random >> 33) as usize;
        match pick % 8 {
            0 => drop(slab.take(sizes[pick / 8 % 5])),
            1 => drop(slab.take(sizes[pick / 8 % 5]).map(kv_arena::Slot::lend)),
            2 | 3 => {
                let Some((number, (id, generation))) = live.pop_first() else { continue };
                table.remove(&key(number));
                slab.retire(id, generation).unwrap();
                slab.sweep(&hazards);
            }
            _ => {
                let Some(held) = store(&slab, number, sizes[pick / 8 % 5]) else { continue };
                live.insert(number, (held.id(), held.generation()));
                // The table may be full of what an earlier life left out of it; that is no matter here.
                let _ = table.set(&entry(&held));
            }
        }
    }
}

#[test]
fn a_killed_daemon_loses_no_sealed_block_and_serves_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let (mut adopted_in_all, mut unsealed_in_all) = (0, 0);
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_daemon_that_gets_killed", "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let ready = out.lines().map_while(Result::ok).any(|line| line == "ready");
        // Spread over what a turn of its loop takes.
        std::thread::sleep(Duration::from_micros(500 + round * 1137 % 20_000));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(ready, "the daemon came up");

        let (mut memory, adoption) = ShardMemory::open(&spec(dir.path()), Epoch(0)).unwrap();
        let Adoption::Adopted { slots, .. } = adoption else { panic!("round {round}: {adoption:?}") };
        let mut hazards = HazardSet::adopt(dir.path(), ShardId(0)).unwrap();
        let mut table = memory.take_table().unwrap().unwrap();
        let slab = memory.slab().clone();
        let before = slab.usage();
        let used: u32 = before.classes.iter().map(|class| class.slots - class.free).sum();
        assert_eq!(u64::from(used), slots + u64::from(before.limbo), "a slot is a block or on its way out");
        unsealed_in_all += before.limbo;
        assert_eq!(slab.sweep(&hazards), before.limbo as usize, "no worker, no hazards");
        let view = connect(&memory, &mut hazards, dir.path(), round);
        let all: Vec<_> = slab.adopted().collect();
        for (id, header) in &all {
            assert_eq!((header.state, header.holds), (SlotState::Unverified, 0));
            let held = slab.hold(*id, header.generation).unwrap();
            assert!(is_right(&held), "round {round}: {id} is not what was sealed");
            assert!(slab.mark_verified(&held));
            table.set(&entry(&held)).unwrap();
        }
        for (_, header) in &all {
            let guard = view.read(&header.record.key).unwrap();
            assert_eq!(guard.record(), &header.record);
        }
        adopted_in_all += all.len();
    }
    assert!(adopted_in_all > 0, "the rounds killed daemons that had blocks");
    eprintln!("{ROUNDS} kills: {adopted_in_all} blocks adopted, {unsealed_in_all} slots caught unsealed");
}
