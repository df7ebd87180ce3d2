//! Blocks that a peer has, as the brain sees it: who waits, what is believed, where the bytes go.

mod rig;

use kv_block::{BindingTag, MissReason, Record, Tier};
use kv_node::{Op, Reach};
use rig::{A, B_LARGE, DEADLINE_MS, Rig, Setup, key, path, session, words};

fn peer_record(n: u64) -> Record {
    Rig::peer_record(n, A)
}

#[test]
fn a_block_of_a_peer_is_leased_and_stays() {
    let mut rig = Rig::new(Setup::default());
    let asked = rig.ask(session(1), Rig::fetch_op(1));
    rig.offer(1, peer_record(1));
    assert!(rig.answer(asked).is_none());
    rig.land(1);
    assert_eq!(words(&rig.wait(asked)), "leased");
    assert_eq!(rig.tiers(1), [Tier::Host]);
    assert_eq!(rig.read(1), "leased");
    let counters = rig.report().counters;
    assert_eq!((counters.fetch_blocks, counters.hits["peer"], counters.hits["host"]), (1, 1, 1));
    rig.finish();
    rig.check_books();
}

#[test]
fn whoever_does_not_wait_or_looks_only_here_asks_no_peer() {
    let mut rig = Rig::new(Setup::default());
    assert_eq!(rig.read(1), "never_stored");
    let reach = Reach::Further { hint: None };
    assert_eq!(
        words(&rig.get(session(1), Op::Acquire { key: key(1), wait: false, reach, after: None })),
        "never_stored"
    );
    assert!(rig.searches.is_empty());
    let mut alone = Rig::new(Setup { peers: false, ..Setup::default() });
    assert_eq!(words(&alone.get(session(1), Rig::fetch_op(1))), "never_stored");
}

#[test]
fn many_who_wait_share_one_search() {
    let mut rig = Rig::new(Setup::default());
    let all: Vec<u64> = (1..=3).map(|of| rig.ask(session(of), Rig::fetch_op(1))).collect();
    // Whoever looks only here and waits waits for what is on its way, too.
    let here = rig.ask(session(1), Rig::acquire_op(1));
    assert_eq!(rig.searches.len(), 1);
    rig.offer(1, peer_record(1));
    rig.land(1);
    for asked in all.into_iter().chain([here]) {
        assert_eq!(words(&rig.wait(asked)), "leased");
    }
}

#[test]
fn a_miss_says_what_became_of_it_here_unless_a_peer_knows_better() {
    let mut rig = Rig::new(Setup::without_disk());
    rig.put_all(1..2);
    rig.evict(1, None);
    let asked = rig.ask(session(1), Rig::fetch_op(1));
    rig.lose(1, MissReason::NeverStored);
    assert_eq!(words(&rig.wait(asked)), "evicted_request");
    let asked = rig.ask(session(1), Rig::fetch_op(1));
    rig.lose(1, MissReason::PeerDown);
    assert_eq!(words(&rig.wait(asked)), "peer_down");
    // It is looked for again each time.
    let asked = rig.ask(session(1), Rig::fetch_op(1));
    rig.offer(1, peer_record(1));
    rig.land(1);
    assert_eq!(words(&rig.wait(asked)), "leased");
}

#[test]
fn a_record_that_is_not_known_here_is_not_believed() {
    let other_key = Record { key: key(2), ..peer_record(1) };
    let other_tag = Record { tag: BindingTag(999), ..peer_record(1) };
    let other_length = Record { bytes: peer_record(1).bytes / 2, ..peer_record(1) };
    for record in [other_key, other_tag, other_length] {
        let mut rig = Rig::new(Setup::default());
        let asked = rig.ask(session(1), Rig::fetch_op(1));
        rig.offer(1, record);
        assert_eq!(rig.declined, Some(MissReason::ScopeDiffers));
        assert!(rig.answer(asked).is_none() && !rig.is_landing(1), "another peer may have it");
        rig.lose(1, MissReason::ScopeDiffers);
        assert_eq!(words(&rig.wait(asked)), "scope_differs");
        assert!(rig.searches.is_empty() && rig.landings.is_empty());
        rig.check_books();
    }
}

#[test]
fn what_one_peer_offers_wrongly_another_gives() {
    let mut rig = Rig::new(Setup::default());
    let asked = rig.ask(session(1), Rig::fetch_op(1));
    rig.offer(1, Record { tag: BindingTag(999), ..peer_record(1) });
    rig.offer(1, peer_record(1));
    // It did not arrive, and the next one lies.
    rig.offer(1, Record { tag: BindingTag(999), ..peer_record(1) });
    rig.offer(1, peer_record(1));
    assert_eq!(rig.declined, None);
    rig.land(1);
    assert_eq!(words(&rig.wait(asked)), "leased");
    rig.finish();
    rig.check_books();
}

#[test]
fn whoever_waits_leaves_at_its_deadline_and_the_block_comes_all_the_same() {
    let mut rig = Rig::new(Setup::default());
    let asked = rig.ask(session(1), Rig::fetch_op(1));
    rig.offer(1, peer_record(1));
    rig.advance(DEADLINE_MS);
    assert_eq!(rig.answer(asked).map(|reply| words(&reply)).as_deref(), Some("tier_timeout"));
    rig.land(1);
    assert_eq!(rig.read(1), "leased");
}

#[test]
fn a_prefetch_brings_blocks_of_peers() {
    let mut rig = Rig::new(Setup::default());
    let op = Op::Prefetch { steps: path(1..3), reach: Reach::Further { hint: None } };
    assert_eq!(words(&rig.get(session(1), op)), "2/0/0");
    rig.offer(1, peer_record(1));
    rig.land(1);
    rig.lose(2, MissReason::NeverStored);
    assert_eq!((rig.read(1).as_str(), rig.read(2).as_str()), ("leased", "never_stored"));
}

#[test]
fn who_stores_the_block_meanwhile_ends_the_search_and_serves_who_waits() {
    for offered in [false, true] {
        let mut rig = Rig::new(Setup::default());
        let asked = rig.ask(session(2), Rig::fetch_op(1));
        if offered {
            rig.offer(1, peer_record(1));
        }
        assert_eq!(rig.put(1), "stored");
        assert!(rig.searches.is_empty() && rig.landings.is_empty(), "the search is left");
        assert_eq!(words(&rig.wait(asked)), "leased");
        rig.finish();
        rig.check_books();
    }
}

#[test]
fn who_announces_the_block_meanwhile_takes_over_who_waits() {
    let mut rig = Rig::new(Setup::default());
    let asked = rig.ask(session(2), Rig::fetch_op(1));
    assert_eq!(words(&rig.get(session(1), Rig::reserve_op(1, false))), "reserved");
    assert!(rig.searches.is_empty());
    rig.get(session(1), Rig::commit_op(1));
    assert_eq!(words(&rig.wait(asked)), "leased");
}

#[test]
fn a_block_of_a_peer_waits_for_room_and_misses_when_there_is_none() {
    let setup = Setup { regions: 1, disk: None, ..Setup::default() };
    let mut rig = Rig::new(setup);
    rig.put_all(1..9);
    let leases: Vec<_> = (1..9).map(|n| rig.lease(session(1), n).lease).collect();
    let asked = rig.ask(session(2), Rig::fetch_op(20));
    rig.offer(20, peer_record(20));
    assert_eq!(words(&rig.wait(asked)), "overloaded");
    assert!(rig.searches.is_empty(), "nothing is fetched for which there is no room");
    rig.release(session(1), leases[0]);
    let asked = rig.ask(session(2), Rig::fetch_op(20));
    rig.offer(20, peer_record(20));
    rig.settle();
    rig.land(20);
    assert_eq!(words(&rig.wait(asked)), "leased");
    rig.check_books();
}

#[test]
fn no_more_searches_run_than_may() {
    let mut rig = Rig::new(Setup { fetches_max: 2, ..Setup::default() });
    let _two: Vec<u64> = (1..3).map(|n| rig.ask(session(1), Rig::fetch_op(n))).collect();
    assert_eq!(words(&rig.get(session(1), Rig::fetch_op(3))), "overloaded");
    rig.lose(1, MissReason::NeverStored);
    let third = rig.ask(session(1), Rig::fetch_op(3));
    rig.offer(3, peer_record(3));
    rig.land(3);
    assert_eq!(words(&rig.wait(third)), "leased");
}

#[test]
fn a_large_block_of_a_peer_pushes_small_ones_out() {
    let mut rig = Rig::new(Setup { regions: 1, ..Setup::default() });
    rig.put_all(1..9);
    let asked = rig.ask(session(2), Rig::fetch_op(20));
    rig.offer(20, Rig::peer_record(20, B_LARGE));
    for _ in 0..20 {
        rig.settle();
        if !rig.landings.is_empty() {
            break;
        }
        rig.advance(1);
    }
    rig.land(20);
    assert_eq!(words(&rig.wait(asked)), "leased");
}
