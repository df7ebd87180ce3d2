//! The daemon is killed with -9 at random moments while callers store, read and evict. Afterwards: not one
//! wrong byte, not one durable block lost, not one evicted block back.
//!
//! `KVD_KILL_CYCLES=1000 cargo test -p kvd --test kill` for the long campaign; `KVD_SEED` repeats one.

mod support;

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kv_api::v1;
use kv_block::Scope;
use support::{Door, Home, scope};

const BYTES: u32 = 32 << 10;
const CALLERS: u64 = 3;
const CHECKERS: usize = 4;
const BLOCKS_PER_CALLER: u64 = 1500;

/// What callers know for sure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Known {
    /// Acknowledged as durable.
    Durable,
    /// Acknowledged as evicted.
    Gone,
    /// May be there or not.
    Unsure,
}

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[test]
fn killed_at_random_nothing_durable_is_lost_and_no_byte_is_wrong() {
    let (cycles, seed) = (env("KVD_KILL_CYCLES", 8), env("KVD_SEED", u64::from(std::process::id())));
    eprintln!("{cycles} cycles, KVD_SEED={seed}");
    let mut random = Random(seed);
    // Room on disk for every block, so that nothing durable may leave for room.
    let home =
        Home::sized("kill", "16MiB", Some("512MiB")).set("disk.admission=all").set("disk.segment_bytes=4MiB");
    let known: Mutex<BTreeMap<u64, Known>> = Mutex::default();
    let mut checked = 0;
    for cycle in 0..cycles {
        let daemon = home.start();
        checked += check_all(&home, &known);
        let stop = AtomicBool::new(false);
        std::thread::scope(|threads| {
            for caller in 0..CALLERS {
                let (home, known, stop, seed) = (&home, &known, &stop, random.below(u64::MAX >> 33));
                threads.spawn(move || mix(home, caller, Random(seed), known, stop));
            }
            std::thread::sleep(Duration::from_millis(20 + random.below(400)));
            daemon.kill();
            stop.store(true, Ordering::Relaxed);
        });
        if cycle % 4 == 3 {
            // Now and then host memory is lost as well: what is durable must come from disk alone.
            std::fs::remove_dir_all(home.memory_dir()).unwrap();
        }
    }
    let _daemon = home.start();
    checked += check_all(&home, &known);
    eprintln!("{checked} durable blocks read back over {cycles} kills");
    assert!(checked > cycles, "the campaign stored and checked something");
}

/// Stores, reads and evicts until the daemon is gone.
fn mix(home: &Home, caller: u64, mut random: Random, known: &Mutex<BTreeMap<u64, Known>>, stop: &AtomicBool) {
    let Ok(door) = std::panic::catch_unwind(|| Door::of(home)) else { return };
    let scope = scope("kill");
    let Some(binding) = door.try_register(&scope, BYTES) else { return };
    while !stop.load(Ordering::Relaxed) {
        let number = caller * BLOCKS_PER_CALLER + random.below(BLOCKS_PER_CALLER);
        match random.below(10) {
            0..=5 => {
                let durable = random.below(2) == 0;
                // What is gone may come back from now on, whatever the answer says.
                known.lock().unwrap().entry(number).and_modify(|known| {
                    if *known == Known::Gone {
                        *known = Known::Unsure;
                    }
                });
                match door.put(&scope, binding, number, BYTES, durable) {
                    Ok(_) if durable => known.lock().unwrap().insert(number, Known::Durable),
                    Ok(_) => None,
                    Err(status) if status.code() == tonic::Code::Unavailable => return,
                    Err(_) => None,
                };
            }
            6 => {
                // From now on it may be gone, whatever the answer says.
                known.lock().unwrap().insert(number, Known::Unsure);
                match door.evict(binding, number) {
                    Some(0) => {}
                    Some(_) => drop(known.lock().unwrap().insert(number, Known::Gone)),
                    None => return,
                }
            }
            _ => match door.try_get(&scope, binding, number) {
                Some(_) => {}
                None => return,
            },
        }
    }
}

/// Reads every block back. Gives how many durable ones there were.
fn check_all(home: &Home, known: &Mutex<BTreeMap<u64, Known>>) -> u64 {
    let known: Vec<(u64, Known)> =
        known.lock().unwrap().iter().map(|(number, known)| (*number, *known)).collect();
    let share = known.len().div_ceil(CHECKERS).max(1);
    let durable = std::thread::scope(|threads| {
        let checks: Vec<_> =
            known.chunks(share).map(|share| threads.spawn(move || check(home, share))).collect();
        checks.into_iter().map(|check| check.join().unwrap_or_else(|panic| resume_unwind(panic))).sum()
    });
    assert_eq!(Door::of(home).status().checksum_failures, 0);
    durable
}

fn check(home: &Home, known: &[(u64, Known)]) -> u64 {
    let door = Door::of(home);
    let scope = scope("kill");
    let binding = door.register(&scope, BYTES);
    let mut durable = 0;
    for (number, known) in known {
        match (sooner_or_later(&door, &scope, binding, *number), known) {
            (Ok(_), Known::Durable) => durable += 1,
            (Err(miss), Known::Durable) => panic!("durable block {number} is lost: {:?}", miss.reason()),
            (Err(miss), Known::Unsure) => {
                assert_ne!(miss.reason(), v1::MissReason::Corrupt, "block {number}");
            }
            (Ok(_), Known::Gone) => panic!("block {number} was evicted, and is back"),
            (Err(_), Known::Gone) | (Ok(_), Known::Unsure) => {}
        }
    }
    durable
}

/// A block, or why it is gone for good: a disk that is slow for a while, on a machine that does other work,
/// has not lost what it is slow to give.
fn sooner_or_later(door: &Door, scope: &Scope, binding: u32, number: u64) -> Result<v1::Tier, v1::Miss> {
    let slow = [v1::MissReason::TierTimeout, v1::MissReason::TierDegraded];
    let mut answer = door.get(scope, binding, number);
    for _ in 0..60 {
        match &answer {
            Err(miss) if slow.contains(&miss.reason()) => std::thread::sleep(Duration::from_secs(1)),
            _ => break,
        }
        answer = door.get(scope, binding, number);
    }
    answer
}
