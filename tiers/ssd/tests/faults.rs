//! Devices that err, come short, lie, dawdle and fill up.

mod common;

use std::time::Duration;

use common::{Found, MIB, Node, key, small};
use kv_block::{BlockKey, DiskLocation};
use kv_ssd::{HealthState, SimDisk, SimFault, SsdConfig};
use kv_tiers::store::{BlockStore, StoreDone, StoreError, StoreOp};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// What the scenario was promised.
#[derive(Default)]
struct Promises {
    acknowledged: Found,
    removed: Vec<BlockKey>,
    refused: u32,
}

/// Opens, writes, moves, removes, reads; whatever fails is just not promised.
fn scenario(disk: &SimDisk) -> Promises {
    let mut promises = Promises::default();
    let (mut node, found, _) = Node::simulated(&small(), disk);
    for (record, at) in found.values() {
        promises.refused += u32::from(node.read(record, *at).is_err());
    }
    let tokens: Vec<_> = (10..14).map(|n| node.begin_write(n, 20_000)).collect();
    for token in tokens {
        let (record, result) = node.end_write(token);
        match result {
            Ok(at) => {
                promises.acknowledged.insert(record.key, (record, at));
            }
            Err(_) => promises.refused += 1,
        }
    }
    for n in [1, 11] {
        let known = promises.acknowledged.get(&key(n)).or(found.get(&key(n))).copied();
        if let Some((_, at)) = known {
            promises.acknowledged.remove(&key(n));
            match node.remove(key(n), at) {
                Ok(()) => promises.removed.push(key(n)),
                Err(_) => promises.refused += 1,
            }
        }
    }
    for n in [2, 12] {
        let known = promises.acknowledged.get(&key(n)).or(found.get(&key(n))).copied();
        if let Some((record, at)) = known {
            match node.move_block(&record, at) {
                Ok(to) => {
                    promises.acknowledged.insert(record.key, (record, to));
                }
                Err(_) => promises.refused += 1,
            }
        }
    }
    let all: Vec<_> = promises.acknowledged.values().copied().collect();
    for (record, at) in all {
        promises.refused += u32::from(node.read(&record, at).is_err());
    }
    promises
}

/// A disk with three blocks on it.
fn begun() -> SimDisk {
    let disk = SimDisk::new(5);
    let (mut node, _, _) = Node::simulated(&small(), &disk);
    for n in 0..3 {
        node.write(n, 9_000).unwrap();
    }
    disk
}

#[test]
fn an_error_of_any_operation_costs_what_it_hit_and_nothing_else() {
    let operations = {
        let disk = begun();
        let before = disk.operations();
        assert_eq!(scenario(&disk).refused, 0);
        disk.operations() - before
    };
    assert!(operations > 20, "{operations}");
    let faults = [SimFault::Errno(EIO), SimFault::Errno(ENOSPC), SimFault::Short, SimFault::Damaged];
    for fault in faults {
        for nth in 0..operations {
            let disk = begun();
            disk.fault(disk.operations() + nth, fault);
            let promises = scenario(&disk);
            let hit = matches!(fault, SimFault::Errno(_) | SimFault::Damaged);
            assert!(hit || promises.refused == 0, "{fault:?} of operation {nth}: a short operation goes on");
            disk.kill();
            let (mut node, found, _) = Node::simulated(&small(), &disk);
            for (record, at) in found.values() {
                let read = node.read(record, *at);
                assert!(read.is_ok() || fault == SimFault::Damaged, "{fault:?} of operation {nth}: {read:?}");
            }
            if fault == SimFault::Damaged {
                // A device that lies loses what it lied about; that it serves nothing wrong is all there is.
                continue;
            }
            for (key, (record, _)) in &promises.acknowledged {
                let there = found.get(key).is_some_and(|(other, _)| other == record);
                assert!(there, "{fault:?} of operation {nth}: {key} was acknowledged and is lost");
            }
            for key in &promises.removed {
                assert!(!found.contains_key(key), "{fault:?} of operation {nth}: {key} came back");
            }
        }
    }
}

#[test]
fn a_device_that_errs_is_bypassed_and_heals() {
    let disk = SimDisk::new(1);
    let (mut node, _, _) = Node::simulated(&small(), &disk);
    let (record, at) = node.write(1, 9_000).unwrap();
    disk.always(Some(SimFault::Errno(EIO)));
    for _ in 0..4 {
        let read = node.read(&record, at);
        assert_eq!(read, Err(StoreError::Io { operation: "read", segment: at.segment(), errno: EIO }));
    }
    assert!(matches!(node.store.health().state, HealthState::Degraded { .. }));
    // Each poll moves the clock to the next probe.
    let before = disk.operations();
    for _ in 0..20 {
        let token = node.begin_read(&record, at);
        let mut done = Vec::new();
        node.store.poll(&mut done);
        let at_once = done.iter().any(|one| one.token() == Some(token));
        assert!(at_once, "refused without waiting for the device");
        assert!(matches!(node.write(2, 9_000), Err(StoreError::Io { .. })));
    }
    for _ in 0..10 {
        node.poll();
    }
    let probes = disk.operations() - before;
    assert!((1..=60).contains(&probes), "only probes reach it: {probes}");
    assert!(matches!(node.store.health().state, HealthState::Degraded { .. }), "failed probes do not heal");
    disk.always(None);
    for _ in 0..100 {
        node.poll();
    }
    assert_eq!(node.store.health().state, HealthState::Healthy);
    assert_eq!(node.read(&record, at), Ok(()));
    assert!(node.write(3, 9_000).is_ok());
    assert_eq!(node.store.health().opened, 1);
}

#[test]
fn slow_writes_are_reported_in_time_and_keep_their_memory() {
    let disk = SimDisk::new(1);
    let config = SsdConfig { slow_limit: Duration::from_millis(100), ..small() };
    let (mut node, _, _) = Node::simulated(&config, &disk);
    node.write(0, 9_000).unwrap();
    disk.always(Some(SimFault::Delay(Duration::from_secs(10))));
    let began = disk.now();
    let token = node.begin_write(1, 9_000);
    let StoreDone::Written { bytes, result, .. } = node.end(token) else { panic!("not a write") };
    assert_eq!(result, Err(StoreError::Slow { limit: config.slow_limit }));
    assert!(disk.now() - began < Duration::from_secs(1), "it did not wait for the device");
    let place = (bytes.id(), bytes.generation());
    drop(bytes);
    assert!(node.slab.retire(place.0, place.1).is_err(), "the device may still read the memory");
    let health = node.store.health();
    assert_eq!((health.slow, health.overdue), (1, 1));
    disk.always(None);
    disk.advance(Duration::from_secs(20));
    for _ in 0..10 {
        node.poll();
    }
    assert!(node.slab.retire(place.0, place.1).is_ok(), "now it has given it back");
    assert_eq!(node.store.health().overdue, 0);
    drop(node);
    let (mut node, found, _) = Node::simulated(&config, &disk);
    for (record, at) in found.values() {
        assert_eq!(node.read(record, *at), Ok(()));
    }
}

#[test]
fn a_dawdling_device_is_taken_out_of_service() {
    let disk = SimDisk::new(1);
    let config = SsdConfig { slow_limit: Duration::from_millis(100), ..small() };
    let (mut node, _, _) = Node::simulated(&config, &disk);
    let (record, at) = node.write(0, 9_000).unwrap();
    disk.always(Some(SimFault::Delay(Duration::from_secs(3))));
    let tokens: Vec<_> = (0..6).map(|_| node.begin_read(&record, at)).collect();
    // A read's slot is with the device, so the read ends when the device gives it back, and not before.
    for _ in 0..10 {
        node.poll();
    }
    assert!(node.done.is_empty());
    let state = node.store.health().state;
    assert!(matches!(state, HealthState::Degraded { reason: StoreError::Slow { .. }, .. }), "{state:?}");
    assert_eq!(node.read(&record, at), Err(StoreError::Slow { limit: config.slow_limit }), "refused at once");
    disk.always(None);
    for token in tokens {
        assert_eq!(node.end_read(&record, token), Ok(()), "late and right");
    }
    for _ in 0..200 {
        node.poll();
    }
    assert_eq!(node.store.health().state, HealthState::Healthy);
}

#[test]
fn a_full_file_system_caps_the_store_at_what_it_has() {
    let disk = SimDisk::new(1);
    let (mut node, mut alive, _) = Node::simulated(&small(), &disk);
    let mut n = 0;
    // Three segments exist when the file system fills up.
    while disk.names().iter().filter(|name| name.starts_with("segment")).count() < 3 {
        let (record, at) = node.write(n, 60_000).unwrap();
        alive.insert(record.key, (record, at));
        n += 1;
    }
    disk.refuse_files(Some(ENOSPC));
    let mut full = 0;
    for n in n..n + 100 {
        match node.write(n, 60_000) {
            Ok((record, at)) => {
                alive.insert(record.key, (record, at));
            }
            Err(StoreError::Full) => {
                full += 1;
                for _ in 0..20 {
                    node.poll();
                }
                node.reclaim(&mut alive, |_| false);
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(full > 0 && alive.contains_key(&key(n + 99)), "it goes on with three segments");
    let health = node.store.health();
    assert_eq!(health.state, HealthState::Healthy, "a full disk is not a sick one");
    assert!(matches!(health.last_error, Some(StoreError::Io { operation: "allocate", errno: ENOSPC, .. })));
    for (record, at) in alive.values() {
        assert_eq!(node.read(record, *at), Ok(()));
    }
    disk.refuse_files(None);
    disk.advance(Duration::from_secs(60));
    for n in n + 100..n + 160 {
        if node.write(n, 60_000).is_err() {
            node.reclaim(&mut alive, |_| false);
        }
    }
    assert!(node.store.stats().segments > 3, "room on the file system is found again");
}

#[test]
fn a_file_system_without_any_room_is_full_and_nothing_else() {
    let disk = SimDisk::new(1);
    disk.refuse_files(Some(ENOSPC));
    let (mut node, _, _) = Node::simulated(&small(), &disk);
    assert_eq!(node.write(1, 9_000).map(|_| ()), Err(StoreError::Full));
    assert_eq!(node.store.health().state, HealthState::Healthy);
}

#[test]
fn what_cannot_be_is_refused_and_the_memory_comes_back() {
    let disk = SimDisk::new(1);
    let (mut node, _, _) = Node::simulated(&small(), &disk);
    let fits = small().block_bytes_max().unwrap() as u32;
    assert!(node.write(1, fits).is_ok());
    assert!(matches!(node.write(2, fits + 1), Err(StoreError::TooLarge { .. })));
    let (record, at) = node.write(3, 9_000).unwrap();
    let elsewhere = [
        DiskLocation::new(at.segment(), at.generation() + 1, at.page()).unwrap(),
        DiskLocation::new(at.segment() + 77, at.generation(), at.page()).unwrap(),
    ];
    for place in elsewhere {
        assert_eq!(node.read(&record, place), Err(StoreError::Stale { segment: place.segment() }));
        assert_eq!(node.move_block(&record, place), Err(StoreError::Stale { segment: place.segment() }));
    }
    let outside = [0, 1, DiskLocation::PAGE_MAX, (MIB / 4096) as u32 - 1];
    for page in outside {
        let place = DiskLocation::new(at.segment(), at.generation(), page).unwrap();
        assert!(matches!(node.read(&record, place), Err(StoreError::Corrupt { .. })), "page {page}");
    }
    assert_eq!(node.release(at.segment()), Err(StoreError::Stale { segment: at.segment() }), "not offered");
    let small_slot = node.slab.take(4096).unwrap();
    let token = node.token();
    node.submit(StoreOp::Read { token, at, record, into: small_slot });
    let StoreDone::Read { into, result, .. } = node.end(token) else { panic!("not a read") };
    assert!(matches!(result, Err(StoreError::Corrupt { .. })) && into.len() == 4096);
}

#[test]
fn what_is_kept_on_a_full_file_system_is_not_written_again_without_end() {
    let disk = SimDisk::new(1);
    let (mut node, _, _) = Node::simulated(&small(), &disk);
    let mut alive = Found::new();
    let mut n = 0;
    while disk.names().iter().filter(|name| name.starts_with("segment")).count() < 4 {
        let (record, at) = node.write(n, 60_000).unwrap();
        alive.insert(record.key, (record, at));
        n += 1;
    }
    disk.refuse_files(Some(ENOSPC));
    while let Ok((record, at)) = node.write(n, 60_000) {
        alive.insert(record.key, (record, at));
        n += 1;
    }
    let room = node.store.usage().bytes_max;
    assert_eq!(room, 4 * small().segment_bytes, "it can hold what there is, whatever was configured");
    let before = node.store.stats();
    for _ in 0..2_000 {
        node.poll();
        // A node that keeps everything: pins, or a mistaken view of the room.
        node.reclaim(&mut alive, |_| true);
    }
    let written = node.store.stats().device_bytes_written - before.device_bytes_written;
    assert!(written < 3 * room, "{written} bytes written to keep {room}");
    for (record, at) in alive.values() {
        assert_eq!(node.read(record, *at), Ok(()));
    }
    // Room on the file system is found again all the same.
    disk.refuse_files(None);
    disk.advance(Duration::from_secs(61));
    for n in n..n + 40 {
        let _ = node.write(n, 60_000);
    }
    assert!(node.store.stats().segments > 4);
}
