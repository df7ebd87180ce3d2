//! Stories of an engine worker: the client crate and the real daemon, over shared memory and over gRPC.

mod support;

use std::time::{Duration, Instant};

use kv_api::v1;
use kv_block::code::Code;
use kv_client::{
    Binding, BlockKey, Client, ClientOptions, Doors, EventKind, Got, MissReason, PutOptions, SequenceHash,
    Tier, WatchOptions, Worker, WorkerOptions,
};
use support::{Door, Home, scope, slice};

const BYTES: u32 = 64 << 10;

fn connect(home: &Home, options: WorkerOptions) -> Worker {
    let client = Client::connect(ClientOptions::socket(home.run_dir())).wait().unwrap();
    client.worker(options).wait().unwrap()
}

fn worker(home: &Home) -> (Worker, Binding) {
    let worker = connect(home, WorkerOptions { name: "story".into(), ..WorkerOptions::default() });
    assert!(matches!(worker.doors(), Doors::SharedMemory { .. }), "{:?}", worker.doors());
    let binding = worker.register(scope("a"), slice(), BYTES).wait().unwrap();
    (worker, binding)
}

fn hashes(range: std::ops::Range<u64>) -> Vec<SequenceHash> {
    range.map(SequenceHash::from).collect()
}

fn body(key: &BlockKey) -> Vec<u8> {
    let mut bytes = vec![0; BYTES as usize];
    kv_block::payload::fill(key, &mut bytes);
    bytes
}

fn put(worker: &Worker, binding: &Binding, range: std::ops::Range<u64>, options: &PutOptions) {
    let bodies: Vec<_> = hashes(range).into_iter().map(|hash| (hash, body(&binding.key(&hash)))).collect();
    let blocks: Vec<_> = bodies.iter().map(|(hash, bytes)| (*hash, &bytes[..])).collect();
    for stored in worker.put_many(binding, &blocks, options).unwrap() {
        assert!(!stored.unwrap().already);
    }
}

/// The block is there and every byte of it is right.
fn check(got: Got) -> kv_client::BlockGuard {
    match got {
        Got::Block(block) => {
            assert_eq!(kv_block::payload::first_wrong_byte(&block.key(), &block), None);
            assert!(block.verify());
            block
        }
        Got::Miss(miss) => panic!("a miss: {miss}"),
    }
}

#[test]
fn blocks_are_put_looked_up_and_read_where_they_lie() {
    let home = Home::new("reads");
    let _daemon = home.start();
    let (worker, binding) = worker(&home);
    put(&worker, &binding, 0..100, &PutOptions::default());
    let found = worker.lookup(&binding, &hashes(0..110)).unwrap();
    assert_eq!(found.prefix(), 100);
    assert!(found.tiers.iter().all(|tier| *tier == Tier::Host));
    let (index, miss) = found.first_miss.unwrap();
    assert_eq!((index, miss.reason), (100, MissReason::NeverStored));
    for hash in hashes(0..100) {
        let block = check(worker.acquire(&binding, &hash).unwrap());
        assert!(block.is_zero_copy() && block.still_valid());
    }
    assert!(
        worker
            .put(&binding, &SequenceHash::from(1), &body(&binding.key(&SequenceHash::from(1))))
            .unwrap()
            .already
    );
    let wrong = worker.put(&binding, &SequenceHash::from(1000), &[0; 100]).unwrap_err();
    assert_eq!(wrong.code(), Some(Code::WrongLength));
    let mut other = scope("a");
    other.dtype = "fp8".into();
    let other = worker.register(other, slice(), BYTES).wait().unwrap();
    assert_eq!(worker.lookup(&other, &hashes(0..3)).unwrap().prefix(), 0);
    let miss = worker.explain(&other, &SequenceHash::from(0)).wait().unwrap().expect("a miss");
    assert_eq!((miss.reason, miss.fields), (MissReason::ScopeDiffers, vec!["dtype".to_owned()]));
}

#[test]
fn what_a_worker_reads_is_never_evicted_under_it() {
    let home = Home::sized("held", "16MiB", None);
    let _daemon = home.start();
    let (worker, binding) = worker(&home);
    put(&worker, &binding, 0..50, &PutOptions::default());
    let held: Vec<_> =
        hashes(0..50).iter().map(|hash| check(worker.acquire(&binding, hash).unwrap())).collect();
    // Four times what host memory holds passes through it meanwhile.
    for start in (1000..2000).step_by(100) {
        put(&worker, &binding, start..start + 100, &PutOptions::default());
    }
    for block in &held {
        assert_eq!(
            kv_block::payload::first_wrong_byte(&block.key(), block),
            None,
            "a block changed under its reader"
        );
    }
    drop(held);
    for start in (3000..4000).step_by(100) {
        put(&worker, &binding, start..start + 100, &PutOptions::default());
    }
    let reason = |got: Got| got.miss().map(|miss| miss.reason);
    let gone = hashes(0..50)
        .into_iter()
        .filter(|hash| reason(worker.acquire(&binding, hash).unwrap()) == Some(MissReason::EvictedCapacity));
    assert!(gone.count() > 25, "released blocks leave when room is needed");
}

#[test]
fn a_reader_waits_for_an_announced_block_and_gets_it_when_it_arrives() {
    let home = Home::new("pending");
    let _daemon = home.start();
    let (writer, binding) = worker(&home);
    let (reader, theirs) = worker(&home);
    let hash = SequenceHash::from(7);
    let mut reservation = writer.reserve(&binding, &hash).unwrap().expect("nobody has it");
    assert!(writer.reserve(&binding, &hash).unwrap().is_none(), "it is announced already");
    let early = reader.acquire(&theirs, &hash).unwrap();
    assert_eq!(early.miss().unwrap().reason, MissReason::NotComplete);
    let waits = Instant::now();
    let late = reader.acquire_wait(&theirs, &hash, Duration::from_millis(600)).unwrap();
    assert_eq!(late.miss().unwrap().reason, MissReason::NotComplete);
    assert!(waits.elapsed() >= Duration::from_millis(590), "it waited for its deadline");
    std::thread::scope(|threads| {
        let waiting =
            threads.spawn(|| check(reader.acquire_wait(&theirs, &hash, Duration::from_secs(10)).unwrap()));
        std::thread::sleep(Duration::from_millis(50));
        kv_block::payload::fill(&binding.key(&hash), &mut reservation);
        assert!(!reservation.commit().unwrap().already);
        waiting.join().unwrap();
    });
    // One that is given up, and one whose writer is gone.
    let given_up = writer.reserve(&binding, &SequenceHash::from(8)).unwrap().unwrap();
    let orphan = writer.reserve(&binding, &SequenceHash::from(9)).unwrap().unwrap();
    std::thread::scope(|threads| {
        let miss = |number: u64| {
            let got =
                reader.acquire_wait(&theirs, &SequenceHash::from(number), Duration::from_secs(10)).unwrap();
            got.miss().map(|miss| miss.reason)
        };
        let (first, second) = (threads.spawn(move || miss(8)), threads.spawn(move || miss(9)));
        std::thread::sleep(Duration::from_millis(50));
        drop(given_up);
        assert_eq!(first.join().unwrap(), Some(MissReason::NotComplete));
        std::mem::forget(orphan);
        drop(writer);
        assert_eq!(second.join().unwrap(), Some(MissReason::NotComplete));
    });
}

#[test]
fn a_worker_goes_on_after_kill_and_restart_and_old_guards_stay_right() {
    let home = Home::new("reconnect");
    let daemon = home.start();
    let (worker, binding) = worker(&home);
    put(&worker, &binding, 0..100, &PutOptions::default());
    let old = check(worker.acquire(&binding, &SequenceHash::from(5)).unwrap());
    let epoch = worker.epoch();
    daemon.kill();
    let limit = Instant::now() + Duration::from_secs(10);
    // While nobody is there every call ends with a fault that says so, and none hangs.
    while worker.is_connected() && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(1));
    }
    let nobody =
        worker.put(&binding, &SequenceHash::from(500), &body(&binding.key(&SequenceHash::from(500))));
    let kind = nobody.unwrap_err().kind();
    assert!(matches!(kind, kv_client::FaultKind::Unavailable | kv_client::FaultKind::Fenced), "{kind:?}");
    let _daemon = home.start();
    assert!(worker.wait_until_connected());
    assert!(worker.epoch() > epoch);
    assert_eq!(worker.lookup(&binding, &hashes(0..100)).unwrap().prefix(), 100, "host memory was kept");
    for hash in hashes(0..100) {
        check(worker.acquire(&binding, &hash).unwrap());
    }
    // The guard of the earlier life still reads right bytes, whatever the new daemon does with its memory.
    for start in (1000..4000).step_by(100) {
        put(&worker, &binding, start..start + 100, &PutOptions::default());
    }
    assert_eq!(kv_block::payload::first_wrong_byte(&old.key(), &old), None);
    assert!(old.epoch() == epoch);
}

#[test]
fn a_trusted_worker_fills_slots_in_place_and_others_may_not() {
    let home = Home::new("in-place").set("workers.trusted_uids=[\"self\"]");
    let _daemon = home.start();
    let trusted = connect(&home, WorkerOptions { trusted: true, ..WorkerOptions::default() });
    assert!(matches!(trusted.doors(), Doors::SharedMemory { in_place: true }), "{:?}", trusted.doors());
    let binding = trusted.register(scope("a"), slice(), BYTES).wait().unwrap();
    for hash in hashes(0..300) {
        let mut reservation = trusted.reserve(&binding, &hash).unwrap().unwrap();
        assert!(reservation.is_in_place());
        kv_block::payload::fill(&binding.key(&hash), &mut reservation);
        reservation.commit().unwrap();
    }
    let (other, theirs) = worker(&home);
    for hash in hashes(0..300) {
        check(other.acquire(&theirs, &hash).unwrap());
    }
    let plain = other.reserve(&theirs, &SequenceHash::from(1000)).unwrap().unwrap();
    assert!(!plain.is_in_place());
}

#[test]
fn blocks_expire_pins_hold_and_every_miss_says_why() {
    let home = Home::sized("keeps", "16MiB", Some("256MiB")).set("disk.admission=all");
    let _daemon = home.start();
    let (worker, binding) = worker(&home);
    let reason = |number: u64| {
        let got = worker.acquire_wait(&binding, &SequenceHash::from(number), Duration::from_secs(5)).unwrap();
        got.miss().map(|miss| miss.reason)
    };
    put(&worker, &binding, 0..1, &PutOptions { ttl: Some(Duration::from_secs(1)), ..PutOptions::default() });
    put(&worker, &binding, 1..3, &PutOptions::default());
    std::thread::sleep(Duration::from_millis(2100));
    assert_eq!(reason(0), Some(MissReason::Expired));
    assert_eq!(reason(1), None);
    let pinned = worker.pin(&binding, &hashes(1..3), Duration::from_secs(60)).wait().unwrap();
    assert_eq!((pinned.pinned, pinned.absent), (2, 0));
    let evicted = worker.evict(&binding, &hashes(1..3), None).wait().unwrap();
    assert_eq!((evicted.evicted, evicted.in_use), (0, 2), "pins hold");
    assert_eq!(worker.unpin(&binding, &hashes(1..3)).wait().unwrap(), 2);
    let evicted = worker.evict(&binding, &hashes(1..2), None).wait().unwrap();
    assert_eq!((evicted.evicted, evicted.in_use), (1, 0));
    assert_eq!(reason(1), Some(MissReason::EvictedRequest));
    assert_eq!(reason(77), Some(MissReason::NeverStored));
    // Overflow to disk, then bring some up ahead of need.
    for start in (1000..1600).step_by(100) {
        put(&worker, &binding, start..start + 100, &PutOptions::default());
    }
    let tiers = worker.lookup(&binding, &hashes(1000..1100)).unwrap().tiers;
    assert!(tiers.contains(&Tier::Disk), "{tiers:?}");
    let prefetched = worker.prefetch(&binding, &hashes(1000..1020)).wait().unwrap();
    assert_eq!(prefetched.started + prefetched.resident, 20);
    assert_eq!((1000..1100).filter_map(reason).count(), 0, "all of them come back");
}

#[test]
fn a_quota_pushes_out_only_its_own_tenant() {
    let home = Home::new("quota").set("tenants.small.bytes_max=1MiB");
    let _daemon = home.start();
    let (worker, ours) = worker(&home);
    put(&worker, &ours, 0..50, &PutOptions::default());
    let small = worker.register(scope("small"), slice(), BYTES).wait().unwrap();
    put(&worker, &small, 0..64, &PutOptions::default());
    let here = |binding: &Binding, range| {
        let found =
            hashes(range).into_iter().filter(|hash| worker.lookup(binding, &[*hash]).unwrap().prefix() == 1);
        found.count()
    };
    assert_eq!(here(&small, 0..64), 16, "1 MiB holds 16 blocks");
    assert_eq!(here(&ours, 0..50), 50);
    let gone = worker.lookup(&small, &hashes(0..1)).unwrap().first_miss.unwrap().1;
    assert_eq!(gone.reason, MissReason::EvictedQuota);
    // A quota of nothing is one, and none is none.
    let door = support::Door::of(&home);
    let set = |bytes_max| {
        let request = kv_api::v1::SetQuotaRequest { tenant: "small".into(), bytes_max };
        door.runtime.block_on(door.admin().set_quota(request)).unwrap();
        let tenants = door.runtime.block_on(door.admin().list_tenants(kv_api::v1::ListTenantsRequest {}));
        let tenants = tenants.unwrap().into_inner().tenants;
        assert_eq!(tenants.iter().find(|row| row.tenant == "small").unwrap().quota_bytes, bytes_max);
        let hash = SequenceHash::from(200);
        worker.put(&small, &hash, &body(&small.key(&hash)))
    };
    assert_eq!(set(Some(0)).unwrap_err().code(), Some(Code::QuotaFull));
    assert!(!set(None).unwrap().already);
}

/// What is readable, and from where.
type Seen = std::collections::BTreeSet<(Tier, BlockKey)>;

#[test]
fn events_tell_exactly_what_is_there() {
    let home = Home::sized("events", "16MiB", Some("256MiB")).set("disk.admission=all");
    let _daemon = home.start();
    let (worker, binding) = worker(&home);
    put(&worker, &binding, 0..40, &PutOptions::default());
    let mut events = worker.client().watch(WatchOptions::default());
    let mut seen = Seen::new();
    let mut apply = |limit: Duration, stop: &mut dyn FnMut(&Seen) -> bool| {
        let until = Instant::now() + limit;
        while Instant::now() < until && !stop(&seen) {
            let Some(batch) = events.next_within(Duration::from_millis(300)) else { continue };
            for event in batch.unwrap().events {
                match event.kind {
                    EventKind::Stored { key, tier, .. } => seen.insert((tier, key)),
                    EventKind::Removed { key, tier } => seen.remove(&(tier, key)),
                    EventKind::Cleared { .. } => false,
                };
            }
        }
        seen.len()
    };
    assert_eq!(apply(Duration::from_secs(10), &mut |seen| seen.len() == 40), 40, "the inventory");
    for start in (1000..1600).step_by(100) {
        put(&worker, &binding, start..start + 100, &PutOptions::default());
    }
    let all: Vec<SequenceHash> = hashes(0..40).into_iter().chain(hashes(1000..1600)).collect();
    // When the node has come to rest, what was told is what it has.
    std::thread::sleep(Duration::from_secs(1));
    let mut wanted = Seen::new();
    for hash in &all {
        if let Some(tier) = worker.lookup(&binding, &[*hash]).unwrap().tiers.first() {
            wanted.insert((*tier, binding.key(hash)));
        }
    }
    apply(Duration::from_secs(10), &mut |seen| wanted.is_subset(seen));
    assert!(wanted.is_subset(&seen));
    let readable: std::collections::BTreeSet<_> = seen.iter().map(|(_, key)| *key).collect();
    assert_eq!(readable, wanted.iter().map(|(_, key)| *key).collect(), "no ghosts");
}

#[test]
fn operators_see_workers_by_name_whatever_their_door() {
    let home = Home::new("names");
    let _daemon = home.start();
    let named = |name: &str, grpc_only| {
        connect(&home, WorkerOptions { name: name.into(), grpc_only, ..WorkerOptions::default() })
    };
    let _workers = (named("rank 0", false), named("remote", true));
    let door = Door::of(&home);
    let listed = door.runtime.block_on(door.admin().list_clients(v1::ListClientsRequest {})).unwrap();
    let clients = listed.into_inner().clients;
    let mut seen: Vec<_> = clients.iter().map(|one| (one.name.as_str(), one.door.as_str())).collect();
    seen.sort_unstable();
    assert_eq!(seen, [("rank 0", "shm"), ("remote", "grpc")]);
}

#[test]
fn blocks_open_in_shared_memory_are_counted_until_they_are_let_go() {
    let home = Home::new("open");
    let _daemon = home.start();
    let (worker, binding) = worker(&home);
    put(&worker, &binding, 0..10, &PutOptions::default());
    let door = Door::of(&home);
    let open = || {
        let listed = door.runtime.block_on(door.admin().list_clients(v1::ListClientsRequest {})).unwrap();
        (door.status().reading, listed.into_inner().clients[0].reading)
    };
    let blocks = worker.acquire_many(&binding, &hashes(0..7), Duration::ZERO).unwrap();
    assert!(blocks.iter().all(|got| matches!(got, Got::Block(block) if block.is_zero_copy())));
    assert_eq!(open(), (7, 7));
    drop(blocks);
    assert_eq!(open(), (0, 0));
}

#[test]
fn a_worker_without_shared_memory_gets_the_same_answers_over_grpc() {
    let home = Home::new("grpc-only");
    let _daemon = home.start();
    let remote = connect(&home, WorkerOptions { grpc_only: true, ..WorkerOptions::default() });
    assert!(matches!(remote.doors(), Doors::GrpcOnly { .. }));
    let binding = remote.register(scope("a"), slice(), BYTES).wait().unwrap();
    let gone = MissReason::EvictedRequest;
    put(&remote, &binding, 0..20, &PutOptions::default());
    assert_eq!(remote.lookup(&binding, &hashes(0..21)).unwrap().prefix(), 20);
    let block = check(remote.acquire(&binding, &SequenceHash::from(3)).unwrap());
    assert!(!block.is_zero_copy());
    // What is not resident any more is the shard's to tell, also behind blocks that are.
    assert_eq!(remote.evict(&binding, &hashes(5..6), None).wait().unwrap().evicted, 1);
    let found = remote.lookup(&binding, &hashes(0..20)).unwrap();
    assert_eq!(found.first_miss.map(|(at, miss)| (at, miss.reason)), Some((5, gone)));
    assert_eq!(remote.acquire(&binding, &SequenceHash::from(5)).unwrap().miss().unwrap().reason, gone);
    let brief = PutOptions { ttl: Some(Duration::from_secs(1)), ..PutOptions::default() };
    put(&remote, &binding, 30..31, &brief);
    std::thread::sleep(Duration::from_millis(2_100));
    let expired = remote.acquire(&binding, &SequenceHash::from(30)).unwrap();
    assert_eq!(expired.miss().unwrap().reason, MissReason::Expired);
    let mut reservation = remote.reserve(&binding, &SequenceHash::from(50)).unwrap().unwrap();
    kv_block::payload::fill(&binding.key(&SequenceHash::from(50)), &mut reservation);
    reservation.commit().unwrap();
    let (near, theirs) = worker(&home);
    check(near.acquire(&theirs, &SequenceHash::from(50)).unwrap());
}

#[test]
fn many_blocks_are_announced_and_committed_at_once_in_place_and_not() {
    let home = Home::new("many").set("workers.trusted_uids=[\"self\"]");
    let _daemon = home.start();
    for (trusted, first) in [(true, 0), (false, 1000)] {
        let worker = connect(&home, WorkerOptions { trusted, ..WorkerOptions::default() });
        assert_eq!(worker.doors(), Doors::SharedMemory { in_place: trusted });
        let binding = worker.register(scope("a"), slice(), BYTES).wait().unwrap();
        put(&worker, &binding, first + 3..first + 5, &PutOptions::default());
        let all = hashes(first..first + 40);
        let reserved = worker.reserve_many(&binding, &all, &PutOptions::default()).unwrap();
        let mut reserved: Vec<_> = reserved.into_iter().map(Result::unwrap).collect();
        let missing = reserved.iter().filter(|one| one.is_some()).count();
        assert_eq!((missing, reserved[3].is_none(), reserved[4].is_none()), (38, true, true));
        drop(reserved[7].take());
        for one in reserved.iter_mut().flatten() {
            let bytes = body(&one.key());
            let filled: Result<(), ()> = one.fill_with(|at, piece| {
                piece.copy_from_slice(&bytes[at..at + piece.len()]);
                Ok(())
            });
            filled.unwrap();
        }
        let committed = kv_client::Reservation::commit_many(reserved.into_iter().flatten().collect());
        assert!(committed.len() == 37 && committed.iter().all(|one| !one.as_ref().unwrap().already));
        for (at, hash) in all.iter().enumerate().filter(|(at, _)| *at != 7) {
            let block = check(worker.acquire(&binding, hash).unwrap());
            let mut copy = Vec::new();
            let right: Result<bool, ()> = block.copy_with(|_, piece| {
                copy.extend_from_slice(piece);
                Ok(())
            });
            assert!(right.unwrap() && copy == *block, "block {at}");
        }
        assert!(worker.acquire(&binding, &all[7]).unwrap().miss().is_some(), "it was taken back");
    }
}
