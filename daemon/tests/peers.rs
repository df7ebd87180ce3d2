//! Two and three real daemons that serve each other's blocks on this machine.

mod support;

use kv_api::v1;
use kv_block::SequenceHash;
use support::among::{get, nodes, peer, transfers, until};
use support::{Daemon, Door, scope};

const BLOCK: u32 = 64 << 10;

fn store(door: &Door, numbers: std::ops::Range<u64>) -> u32 {
    let binding = door.register(&scope("t"), BLOCK);
    for number in numbers {
        door.put(&scope("t"), binding, number, BLOCK, false).expect("put");
    }
    binding
}

#[test]
fn a_block_stored_on_one_node_is_read_on_another() {
    let [a, b] = nodes("two", "64MiB", None);
    let (_a, _b) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    store(&at_a, 0..20);
    let binding = at_b.register(&scope("t"), BLOCK);
    for number in 0..20 {
        assert_eq!(get(&at_b, binding, number, 5_000, "").0, Ok(()), "block {number}");
    }
    let status = at_b.status();
    assert_eq!((status.fetched_blocks, status.hits["peer"]), (20, 20), "{status:?}");
    // They stay: what is asked for again does not come from the peer again.
    assert_eq!(get(&at_b, binding, 3, 5_000, "").0, Ok(()));
    assert_eq!(at_b.status().fetched_blocks, 20);
    let known = peer(&at_b, "a");
    assert_eq!((known.state.as_str(), known.blocks_in, known.strikes), ("up", 20, 0), "{known:?}");
    assert_eq!(known.bytes_in, 20 * u64::from(BLOCK));
    let served = until("what was served is told", || {
        let served = peer(&at_a, "b");
        (served.blocks_out == 20 && served.held == 0).then_some(served)
    });
    assert!(served.reads_here, "{served:?}");
    // Without time to wait, nobody is asked.
    assert_eq!(get(&at_b, binding, 99, 0, "").0, Err(v1::MissReason::NeverStored));
    assert_eq!(get(&at_b, binding, 99, 5_000, "").0, Err(v1::MissReason::NeverStored));
}

#[test]
fn a_block_on_the_disk_of_a_peer_is_read() {
    let [a, b] = nodes("disk", "64MiB", Some("256MiB"));
    let (_a, _b) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    let binding = at_a.register(&scope("t"), BLOCK);
    at_a.put(&scope("t"), binding, 1, BLOCK, true).expect("put");
    let names = v1::Names {
        binding,
        sequence_hashes: vec![SequenceHash::from(1).as_bytes().to_vec().into()],
        ..v1::Names::default()
    };
    let evict =
        v1::EvictRequest { names: Some(names), tier: v1::Tier::Host.into(), ..v1::EvictRequest::default() };
    at_a.runtime.block_on(async { at_a.blocks().evict(evict).await }).expect("evict");
    let binding = at_b.register(&scope("t"), BLOCK);
    assert_eq!(get(&at_b, binding, 1, 5_000, "").0, Ok(()));
}

#[test]
fn a_block_that_is_still_being_computed_elsewhere_is_waited_for() {
    let [a, b] = nodes("pending", "64MiB", None);
    let (_a, _b) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    let binding_a = at_a.register(&scope("t"), BLOCK);
    let open = v1::OpenRequest { name: "prefill".into() };
    let session = at_a.runtime.block_on(async { at_a.worker().open(open).await }).expect("open").into_inner();
    let mut session = session;
    let session = at_a.runtime.block_on(session.message()).expect("a session").expect("a session").session;
    let names = v1::Names {
        binding: binding_a,
        sequence_hashes: vec![SequenceHash::from(7).as_bytes().to_vec().into()],
        ..v1::Names::default()
    };
    let reserve = v1::ReserveRequest { session, names: Some(names), ..v1::ReserveRequest::default() };
    at_a.runtime.block_on(async { at_a.blocks().reserve(reserve).await }).expect("reserve");
    let binding = at_b.register(&scope("t"), BLOCK);
    std::thread::scope(|threads| {
        let waiting = threads.spawn(|| get(&at_b, binding, 7, 10_000, ""));
        until("node b waits for it", || (peer(&at_b, "a").wanted == 1).then_some(()));
        let hash = SequenceHash::from(7);
        for (door, node, direction, stage) in [(&at_b, "a", "in", "asked"), (&at_a, "b", "out", "looking")] {
            let key = scope("t").id().block_key(&hash, &support::slice());
            until("both say so", || {
                let all = transfers(door);
                let [one] = &all[..] else { return None };
                assert_eq!((one.node.as_str(), one.direction.as_str()), (node, direction), "{one:?}");
                (one.stage == stage && one.key == key.as_bytes()[..]).then_some(())
            });
        }
        let mut body = vec![0; BLOCK as usize];
        kv_block::payload::fill(&scope("t").id().block_key(&hash, &support::slice()), &mut body);
        let header = v1::PutHeader {
            session,
            binding: binding_a,
            sequence_hash: hash.as_bytes().to_vec().into(),
            ..v1::PutHeader::default()
        };
        let put = vec![v1::PutRequest { header: Some(header), chunk: body.into() }];
        at_a.runtime.block_on(async { at_a.blocks().put(tokio_stream::iter(put)).await }).expect("put");
        assert_eq!(waiting.join().unwrap().0, Ok(()));
    });
}

#[test]
fn lookups_see_what_peers_have_when_they_are_told_to() {
    let [a, b, c] = nodes("lookup", "64MiB", None);
    let (_a, _b, _c) = (a.start(), b.start(), c.start());
    let (at_a, at_b, at_c) = (Door::of(&a), Door::of(&b), Door::of(&c));
    store(&at_a, 0..2);
    store(&at_b, 2..4);
    let binding = at_c.register(&scope("t"), BLOCK);
    let hashes = |range: std::ops::Range<u64>| {
        range.map(|number| SequenceHash::from(number).as_bytes().to_vec().into()).collect()
    };
    let look = |peers| {
        let names = v1::Names { binding, sequence_hashes: hashes(0..5), ..v1::Names::default() };
        let request = v1::LookupRequest { names: Some(names), peers, ..v1::LookupRequest::default() };
        at_c.runtime.block_on(async { at_c.blocks().lookup(request).await }).expect("lookup").into_inner()
    };
    assert_eq!(look(false).prefix, 0);
    let found = look(true);
    assert_eq!(found.prefix, 4, "{found:?}");
    let nodes: Vec<&str> = found.found.iter().map(|found| found.node.as_str()).collect();
    assert_eq!(nodes, ["a", "a", "b", "b", ""]);
    // What is here behind a gap that a peer fills counts as well.
    store(&at_c, 4..5);
    assert_eq!(look(true).prefix, 5);
    assert_eq!(look(false).prefix, 0);
    // Nothing has moved.
    assert_eq!(at_c.status().fetched_blocks, 0);
}

#[test]
fn a_lookup_asks_the_node_it_names_where_nobody_else_would_be_asked() {
    let [a, b] = nodes("named", "64MiB", None);
    let b = b.set("peers.probe_peers_max=0");
    let (_a, _b) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    store(&at_a, 0..2);
    let binding = at_b.register(&scope("t"), BLOCK);
    let look = |node: &str| {
        let hashes = (0..3).map(|number| SequenceHash::from(number).as_bytes().to_vec().into()).collect();
        let names = v1::Names { binding, sequence_hashes: hashes, ..v1::Names::default() };
        let node = node.to_owned();
        let request = v1::LookupRequest { names: Some(names), peers: true, node, ..Default::default() };
        at_b.runtime.block_on(async { at_b.blocks().lookup(request).await })
    };
    assert_eq!(look("").expect("lookup").into_inner().prefix, 0);
    assert_eq!(look("a").expect("lookup").into_inner().prefix, 2);
    let refused = look("nowhere").unwrap_err();
    assert!(refused.message().contains("peers.members"), "{refused}");
}

#[test]
fn a_hint_is_followed_first_and_an_unknown_one_is_refused() {
    let [a, b, c] = nodes("hint", "64MiB", None);
    let (_a, _b, _c) = (a.start(), b.start(), c.start());
    let (at_a, at_b, at_c) = (Door::of(&a), Door::of(&b), Door::of(&c));
    store(&at_a, 0..4);
    store(&at_b, 0..2);
    let binding = at_c.register(&scope("t"), BLOCK);
    assert_eq!(get(&at_c, binding, 0, 5_000, "b").0, Ok(()));
    assert_eq!((peer(&at_c, "a").blocks_in, peer(&at_c, "b").blocks_in), (0, 1));
    assert_eq!(peer(&at_c, "a").state, "idle", "nobody was asked but the one named");
    // A wrong hint costs a question and nothing else.
    assert_eq!(get(&at_c, binding, 3, 5_000, "b").0, Ok(()));
    assert_eq!(peer(&at_c, "a").blocks_in, 1);
    let names = v1::Names {
        binding,
        sequence_hashes: vec![SequenceHash::from(1).as_bytes().to_vec().into()],
        ..v1::Names::default()
    };
    let request = v1::PrefetchRequest { names: Some(names), session: 0, node: "nowhere".into() };
    let refused = at_c.runtime.block_on(async { at_c.blocks().prefetch(request).await }).unwrap_err();
    assert!(refused.message().contains("peers.members"), "{refused}");
}

#[test]
fn a_peer_that_is_killed_costs_a_miss_and_is_found_again() {
    let [a, b] = nodes("killed", "64MiB", None);
    let (first, _b) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    store(&at_a, 0..8);
    let binding = at_b.register(&scope("t"), BLOCK);
    assert_eq!(get(&at_b, binding, 0, 5_000, "").0, Ok(()));
    first.kill();
    let (got, _) = get(&at_b, binding, 1, 3_000, "a");
    assert!(got.is_err(), "{got:?}");
    until("its circuit opens", || {
        let _ = get(&at_b, binding, 1, 1_000, "a");
        (peer(&at_b, "a").state == "down").then_some(())
    });
    let (got, _) = get(&at_b, binding, 1, 3_000, "a");
    assert_eq!(got, Err(v1::MissReason::PeerDown));
    let warnings = at_b.status().warnings;
    assert!(warnings.iter().any(|warning| warning.code == "KVD-3006"), "{warnings:?}");
    // Host memory survived; so does the way to it.
    let _again = a.start();
    until("node a is found again", || get(&at_b, binding, 1, 2_000, "a").0.ok());
    assert_eq!(peer(&at_b, "a").state, "up");
}

#[test]
fn a_peer_that_comes_back_is_well_again_though_nothing_is_wanted() {
    let [a, b] = nodes("healed", "64MiB", None);
    let (first, _b) = (a.start(), b.start());
    let at_b = Door::of(&b);
    let binding = at_b.register(&scope("t"), BLOCK);
    let _ = get(&at_b, binding, 0, 5_000, "a");
    first.kill();
    until("its circuit opens", || {
        let _ = get(&at_b, binding, 1, 500, "a");
        (peer(&at_b, "a").state == "down").then_some(())
    });
    let _again = a.start();
    until("it is up", || (peer(&at_b, "a").state == "up").then_some(()));
    assert!(at_b.status().warnings.iter().all(|warning| warning.code != "KVD-3006"));
}

#[test]
fn a_peer_that_leaves_is_asked_last_until_it_stays_after_all() {
    let [a, b, c] = nodes("leaving", "64MiB", None);
    // Whoever does not answer in time is not waited for, and this machine may be busy.
    let c = c.set("peers.probe_limit=5s");
    let (_a, _b, _c) = (a.start(), b.start(), c.start());
    let (at_a, at_b, at_c) = (Door::of(&a), Door::of(&b), Door::of(&c));
    store(&at_a, 0..40);
    store(&at_b, 0..40);
    let binding = at_c.register(&scope("t"), BLOCK);
    let drain = |stop| {
        let drain = v1::DrainRequest { stop };
        at_a.runtime.block_on(async { at_a.admin().drain(drain).await }).expect("drain");
    };
    assert_eq!(get(&at_c, binding, 0, 5_000, "a").0, Ok(()));
    drain(false);
    until("node a says so", || (peer(&at_c, "a").state == "leaving").then_some(()));
    (1..30).for_each(|number| assert_eq!(get(&at_c, binding, number, 5_000, "").0, Ok(())));
    assert_eq!((peer(&at_c, "a").blocks_in, peer(&at_c, "b").blocks_in), (1, 29));
    drain(true);
    until("it stays", || (peer(&at_c, "a").state == "up").then_some(()));
}

fn signal(daemon: &Daemon<'_>, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(daemon.pid() as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[test]
fn a_peer_that_stops_answering_holds_nobody_beyond_the_deadline() {
    let [a, b] = nodes("stopped", "64MiB", None);
    let (first, _b) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    store(&at_a, 0..40);
    let binding = at_b.register(&scope("t"), BLOCK);
    assert_eq!(get(&at_b, binding, 0, 5_000, "").0, Ok(()));
    signal(&first, rustix::process::Signal::STOP);
    for wait_ms in [100, 500, 1_000, 300] {
        // That it ends in time is looked at by whoever asks.
        let (got, _) = get(&at_b, binding, 1, wait_ms, "a");
        assert!(matches!(got, Err(v1::MissReason::TierTimeout | v1::MissReason::PeerDown)), "{got:?}");
    }
    signal(&first, rustix::process::Signal::CONT);
    until("it answers again", || get(&at_b, binding, 2, 2_000, "").0.ok());
    until("nothing is left", || {
        let (there, here) = (peer(&at_a, "b"), peer(&at_b, "a"));
        (there.held == 0 && here.wanted + here.reading == 0).then_some(())
    });
}

#[test]
fn offered_blocks_are_taken_with_what_they_mean() {
    let [a, b] = nodes("offer", "64MiB", None);
    let (_a, _b) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    let binding = store(&at_a, 0..30);
    let names = v1::Names {
        binding,
        sequence_hashes: (0..10).map(|n: u64| SequenceHash::from(n).as_bytes().to_vec().into()).collect(),
        ..v1::Names::default()
    };
    let request = v1::OfferRequest { node: "b".into(), names: Some(names) };
    let taken =
        at_a.runtime.block_on(async { at_a.admin().offer(request).await }).expect("offer").into_inner();
    assert_eq!((taken.taken, taken.left), (10, 0));
    // The other node knows them without having met their worker.
    let tenants = at_b.runtime.block_on(async { at_b.admin().list_tenants(v1::ListTenantsRequest {}).await });
    let tenants = tenants.expect("tenants").into_inner().tenants;
    assert!(tenants.iter().any(|row| row.tenant == "t" && row.blocks == 10), "{tenants:?}");
    let done = evacuate(&at_a);
    assert!(done.finished && (done.total, done.taken, done.left) == (30, 30, 0), "{done:?}");
    let binding = at_b.register(&scope("t"), BLOCK);
    drop(_a);
    for number in 0..30 {
        assert_eq!(get(&at_b, binding, number, 0, "").0, Ok(()), "block {number}");
    }
}

/// Offers all blocks to the peers, to the end.
fn evacuate(door: &Door) -> v1::EvacuateProgress {
    let evacuation = door.runtime.block_on(async {
        let mut stream = door.admin().evacuate(v1::EvacuateRequest::default()).await?.into_inner();
        let mut last = v1::EvacuateProgress::default();
        while let Some(progress) = stream.message().await? {
            last = progress;
        }
        Ok::<_, tonic::Status>(last)
    });
    evacuation.expect("evacuate")
}

#[test]
fn one_peer_that_takes_nothing_does_not_keep_blocks_from_the_others() {
    const COUNT: u64 = 1_500;
    const SHORT: u32 = 4 << 10;
    for dead in [true, false] {
        let [a, b, c] = nodes(if dead { "dead" } else { "draining" }, "64MiB", None);
        let (_a, _b, other) = (a.start(), b.start(), c.start());
        let (at_a, at_b, at_c) = (Door::of(&a), Door::of(&b), Door::of(&c));
        if dead {
            other.kill();
        } else {
            let drain = v1::DrainRequest { stop: false };
            at_c.runtime.block_on(async { at_c.admin().drain(drain).await }).expect("drain");
        }
        let binding = at_a.register(&scope("t"), SHORT);
        for number in 0..COUNT {
            at_a.put(&scope("t"), binding, number, SHORT, false).expect("put");
        }
        let done = evacuate(&at_a);
        assert!(
            done.finished && (done.total, done.taken, done.left) == (COUNT, COUNT, 0),
            "{dead}: {done:?}"
        );
        assert_eq!(at_b.status().blocks, COUNT);
    }
}
