//! One scenario, again and again: each time another operation of the store meets another fault. It ends, and
//! no byte is wrong.

mod rig;

use std::time::Duration;

use kv_block::Tier;
use kv_node::{Filter, Op};
use kv_tiers::memory::{MemoryConfig, StoreFault};
use kv_tiers::store::StoreError;
use rig::{A, Rig, Setup, key, session, words};

fn setup() -> Setup {
    let store = MemoryConfig { segments: 5, segment_pages: 256, in_flight_max: 8 };
    Setup { regions: 1, store, survives: true, ..Setup::default() }
}

/// Stores more than memory and disk hold, reads all of it back, removes some, restarts, reads again.
fn scenario(nth: u64, fault: &StoreFault) -> u64 {
    let mut rig = Rig::new(setup());
    rig.store().inject(nth, fault.clone());
    for n in 0..20 {
        let op = Rig::put_op(n, A, n % 2 == 0);
        let answer = words(&rig.get(session(1), op));
        let known =
            ["stored", "DiskError", "DiskSlow", "DiskFull", "DeadlinePassed", "HostFull", "QueueFull"];
        assert!(known.contains(&answer.as_str()), "{answer}");
        rig.check_books();
    }
    for n in 0..20 {
        rig.read(n);
    }
    rig.evict(4, None);
    let filter = Filter { key_prefix: key(6).to_string(), ..Filter::default() };
    rig.get(session(1), Op::Purge { filter, tier: Some(Tier::Disk), dry_run: false });
    rig.get(session(1), Op::Verify { tier: Tier::Disk });
    rig.finish();
    rig.check_books();
    let ops = rig.store().ops();
    rig.crash(nth, |_| {});
    for n in 0..20 {
        rig.read(n);
    }
    rig.finish();
    rig.check_books();
    ops
}

#[test]
fn whichever_operation_of_the_store_fails_everything_ends_and_no_byte_is_wrong() {
    let ops = scenario(u64::MAX / 2, &StoreFault::Corrupt);
    assert!(ops > 60, "the scenario uses the store: {ops}");
    let io = |operation| StoreFault::Fail(StoreError::Io { operation, segment: 0, errno: 5 });
    let faults = [
        io("write"),
        StoreFault::Fail(StoreError::Full),
        StoreFault::Fail(StoreError::Slow { limit: Duration::from_secs(1) }),
        StoreFault::Corrupt,
        StoreFault::Never,
        StoreFault::Delay { polls: 5 },
    ];
    for nth in 1..=ops {
        // Each kind of fault meets each kind of operation, many times over.
        scenario(nth, &faults[(nth as usize * 5 + nth as usize / 6) % faults.len()]);
    }
}
