//! Blocks that go to the object tier and come back, as the brain sees it.

mod rig;

use std::time::Duration;

use kv_block::{MissReason, Priority, Record, Tier};
use kv_node::{Keep, ObjectConfig, Op, Reach, Step};
use kv_tiers::upload::UploadLimits;
use rig::{A, Rig, SMALL, Setup, key, object, session, words};

fn setup() -> Setup {
    Setup { object: Some(object()), disk: None, ..Setup::default() }
}

fn record(n: u64) -> Record {
    Rig::peer_record(n, A)
}

fn is_up(rig: &Rig, n: u64) -> bool {
    rig.uploaded.contains(&key(n))
}

#[test]
fn what_was_read_goes_up_when_it_is_old_enough() {
    let mut rig = Rig::new(setup());
    rig.put_all(1..3);
    assert_eq!(rig.read(1), "leased");
    rig.tick();
    rig.advance(29_000);
    assert!(rig.uploaded.is_empty());
    rig.advance(2_000);
    assert!(is_up(&rig, 1) && !is_up(&rig, 2), "only what was read");
    let counters = rig.report().counters;
    assert_eq!((counters.upload_blocks, counters.upload_bytes), (1, SMALL.into()));
    // Read again, it does not go again.
    assert_eq!(rig.read(1), "leased");
    rig.advance(40_000);
    assert_eq!(rig.report().counters.upload_blocks, 1);
    rig.finish();
    rig.check_books();
}

#[test]
fn what_came_before_a_block_is_told_with_it() {
    let upload = UploadLimits { reads_min: 0, age_min: Duration::ZERO, ..UploadLimits::default() };
    let mut rig = Rig::new(Setup { object: Some(ObjectConfig { upload, ..object() }), ..setup() });
    for n in 1..4 {
        let (keep, after) = (Keep::default(), (n > 1).then(|| key(n - 1)));
        let put = Op::Put { key: key(n), binding: A, source: 0, bytes: SMALL, keep, durable: false, after };
        assert_eq!(words(&rig.get(session(1), put)), "stored");
    }
    rig.tick();
    rig.advance(50);
    assert_eq!([1, 2, 3].map(|n| rig.parents[&key(n)]), [None, Some(key(1)), Some(key(2))]);
    rig.finish();
}

#[test]
fn what_is_asked_for_goes_at_once() {
    let mut rig = Rig::new(setup());
    let keep = Keep { priority: Priority::High, expires_at: 0 };
    let put = Op::Put { key: key(1), binding: A, source: 0, bytes: SMALL, keep, durable: false, after: None };
    assert_eq!(words(&rig.get(session(1), put)), "stored");
    rig.put_all(2..4);
    let until = rig.now.micros.plus_ms(60_000);
    rig.get(session(1), Op::Pin { keys: vec![key(2)], until });
    rig.advance(50);
    assert!(is_up(&rig, 1) && is_up(&rig, 2) && !is_up(&rig, 3));
    rig.finish();
}

#[test]
fn what_is_pinned_on_disk_comes_up_and_goes_on() {
    let mut rig = Rig::new(Setup { object: Some(object()), ..Setup::default() });
    assert_eq!(rig.put_durably(1), "stored");
    rig.evict(1, Some(Tier::Host));
    assert_eq!(rig.tiers(1), [Tier::Disk]);
    let until = rig.now.micros.plus_ms(60_000);
    rig.get(session(1), Op::Pin { keys: vec![key(1)], until });
    rig.advance(50);
    rig.settle();
    rig.advance(2_000);
    assert!(is_up(&rig, 1));
    rig.finish();
    rig.check_books();
}

/// Stores and reads blocks until one is to go up before it leaves: which.
fn crowd_out(rig: &mut Rig) -> u64 {
    rig.hold_uploads = true;
    for n in 1.. {
        rig.ask(session(1), Rig::put_op(n, A, false));
        rig.settle();
        if let Some(held) = rig.uploads.values().next() {
            return held.record().key.halves()[1];
        }
        rig.read(n);
    }
    unreachable!("there is room for sixteen");
}

#[test]
fn what_was_read_goes_up_before_it_leaves_host_memory() {
    let mut rig = Rig::new(setup());
    let victim = crowd_out(&mut rig);
    assert!(!is_up(&rig, victim));
    assert_eq!(rig.tiers(victim), [Tier::Host], "it stays until it is copied");
    rig.end_upload(0);
    rig.settle();
    assert!(is_up(&rig, victim) && rig.tiers(victim).is_empty());
    rig.finish();
    rig.check_books();
}

#[test]
fn what_is_refused_leaves_all_the_same() {
    let mut rig = Rig::new(setup());
    let victim = crowd_out(&mut rig);
    rig.end_upload(2);
    rig.settle();
    assert!(!is_up(&rig, victim) && rig.tiers(victim).is_empty());
    assert_eq!(rig.report().counters.upload_blocks, 0);
    rig.finish();
    rig.check_books();
}

#[test]
fn what_the_store_lost_is_offered_again() {
    let mut rig = Rig::new(setup());
    rig.put_all(1..2);
    assert_eq!(rig.read(1), "leased");
    rig.tick();
    rig.advance(31_000);
    assert!(is_up(&rig, 1));
    rig.lose_uploads();
    rig.advance(29_000);
    assert!(!is_up(&rig, 1));
    rig.advance(31_000);
    assert!(is_up(&rig, 1));
    rig.finish();
}

#[test]
fn what_will_not_count_for_long_stays() {
    let mut rig = Rig::new(setup());
    let keep = Keep { priority: Priority::High, expires_at: rig.now.unix + 300 };
    let put = Op::Put { key: key(1), binding: A, source: 0, bytes: SMALL, keep, durable: false, after: None };
    assert_eq!(words(&rig.get(session(1), put)), "stored");
    rig.advance(60_000);
    assert!(rig.uploaded.is_empty());
    rig.finish();
}

#[test]
fn a_block_of_the_object_tier_is_leased_and_does_not_go_up_again() {
    let mut rig = Rig::new(Setup { peers: false, ..setup() });
    let asked = rig.ask(session(1), Rig::fetch_op(1));
    assert_eq!(rig.in_object.len(), 1);
    rig.offer(1, record(1));
    rig.land(1);
    assert_eq!(words(&rig.wait(asked)), "leased");
    let counters = rig.report().counters;
    assert_eq!((counters.download_blocks, counters.fetch_blocks, counters.hits["object"]), (1, 0, 1));
    rig.advance(60_000);
    assert!(rig.uploaded.is_empty(), "it is there");
    rig.finish();
    rig.check_books();
}

#[test]
fn the_peers_are_asked_first_and_then_the_object_tier() {
    let mut rig = Rig::new(setup());
    let asked = rig.ask(session(1), Rig::fetch_op(1));
    assert!(rig.in_object.is_empty());
    rig.lose(1, MissReason::PeerDown);
    assert_eq!((rig.in_object.len(), rig.searches.len()), (1, 1));
    assert!(rig.answer(asked).is_none());
    // What a peer said is more than that nobody knows it.
    rig.lose(1, MissReason::NeverStored);
    assert_eq!(words(&rig.wait(asked)), "peer_down");
    // It failed on its way from a peer.
    let asked = rig.ask(session(1), Rig::fetch_op(2));
    rig.offer(2, record(2));
    rig.lose(2, MissReason::PathFailed);
    rig.offer(2, record(2));
    rig.land(2);
    assert_eq!(words(&rig.wait(asked)), "leased");
    assert_eq!(rig.report().counters.hits["object"], 1);
    rig.finish();
    rig.check_books();
}

#[test]
fn a_look_ahead_asks_no_peer() {
    let mut rig = Rig::new(setup());
    let steps = Step::along(&[key(1), key(2)]).collect();
    assert_eq!(words(&rig.get(session(1), Op::Prefetch { steps, reach: Reach::Object })), "2/0/0");
    assert_eq!(rig.in_object.len(), 2);
    // Whoever comes to want one meanwhile waits for it.
    let asked = rig.ask(session(1), Rig::fetch_op(1));
    rig.offer(1, record(1));
    rig.land(1);
    assert_eq!(words(&rig.wait(asked)), "leased");
    rig.lose(2, MissReason::TierDegraded);
    assert_eq!(rig.read(2), "never_stored");
    rig.finish();
    rig.check_books();
}

#[test]
fn a_worker_that_stores_the_block_meanwhile_ends_the_search() {
    let mut rig = Rig::new(Setup { peers: false, ..setup() });
    let asked = rig.ask(session(1), Rig::fetch_op(1));
    rig.offer(1, record(1));
    assert!(rig.is_landing(1));
    assert_eq!(rig.put(1), "stored");
    assert_eq!(words(&rig.wait(asked)), "leased");
    assert!(rig.searches.is_empty());
    rig.finish();
    rig.check_books();
}

#[test]
fn where_no_reads_are_asked_for_everything_goes() {
    let upload = UploadLimits { reads_min: 0, age_min: Duration::from_secs(1), ..UploadLimits::default() };
    let mut rig = Rig::new(Setup { object: Some(ObjectConfig { upload, ..object() }), ..setup() });
    rig.put_all(1..4);
    rig.tick();
    rig.advance(2_000);
    assert_eq!(rig.uploaded.len(), 3);
    rig.finish();
}
