//! What happens to a block, story by story.

mod rig;

use std::time::Duration;

use kv_block::code::Code;
use kv_block::{BlockKey, LeaseId, MissReason, Priority, SessionId, Tier};
use kv_node::{Event, Filter, Keep, Micros, Op, Origin, Reach, Reply, RequestId};
use kv_tiers::admit::AdmissionKind;
use kv_tiers::memory::{MemoryConfig, StoreFault};
use kv_tiers::store::StoreError;
use rig::{
    A, B, B_LARGE, DEADLINE_MS, GONE, LARGE, Rig, SMALL, Setup, is_fault, key, object, path, session, words,
};

fn slow() -> StoreFault {
    StoreFault::Fail(StoreError::Slow { limit: Duration::from_secs(1) })
}

fn broken() -> StoreFault {
    StoreFault::Fail(StoreError::Io { operation: "read", segment: 0, errno: 5 })
}

/// Ends a story: all requests are answered and all books balance.
fn end(mut rig: Rig) {
    rig.finish();
    rig.check_books();
}

#[test]
fn a_block_that_is_put_is_read_back_and_put_again_is_there_already() {
    let mut rig = Rig::new(Setup::default());
    assert_eq!(rig.read(1), "never_stored");
    assert_eq!(rig.put(1), "stored");
    assert_eq!(rig.read(1), "leased");
    assert_eq!(rig.put(1), "already");
    let looked = rig.get(session(1), Op::Lookup { keys: vec![key(1), key(2), key(1)], all: true });
    assert_eq!(words(&looked), "host never_stored host");
    let looked = rig.get(session(1), Op::Lookup { keys: vec![key(2), key(1)], all: false });
    assert_eq!(words(&looked), "never_stored", "a prefix ends at the first absent block");
    assert_eq!(rig.report().counters.put_blocks, 1);
    end(rig);
}

#[test]
fn a_durable_put_is_answered_when_it_is_on_disk_and_not_before() {
    let mut rig = Rig::new(Setup::default());
    rig.hold_store = true;
    let first = rig.ask(session(1), Rig::put_op(1, A, true));
    let second = rig.ask(session(2), Rig::put_op(1, A, true));
    rig.settle();
    assert_eq!((rig.answer(first), rig.answer(second)), (None, None));
    assert_eq!(rig.tiers(1), [Tier::Host], "it can be read meanwhile");
    rig.hold_store = false;
    assert_eq!(words(&rig.wait(first)), "stored");
    rig.wait(second);
    assert_eq!(rig.tiers(1), [Tier::Host, Tier::Disk]);
    assert_eq!(rig.report().counters.offload_blocks, 1, "it was written once");
    assert_eq!(rig.put_durably(1), "already");
    end(rig);
}

#[test]
fn a_durable_put_that_meets_another_put_of_the_block_waits_for_the_disk_as_well() {
    let mut rig = Rig::new(Setup::default());
    (rig.hold_fills, rig.hold_store) = (true, true);
    let plain = rig.ask(session(1), Rig::put_op(1, A, false));
    let durable = rig.ask(session(2), Rig::put_op(1, A, true));
    rig.fill_held();
    assert_eq!(rig.answer(plain).as_ref().map(words).as_deref(), Some("stored"));
    assert_eq!(rig.answer(durable), None);
    rig.hold_store = false;
    rig.wait(durable);
    assert_eq!(rig.tiers(1), [Tier::Host, Tier::Disk]);
    end(rig);
}

#[test]
fn a_put_whose_twin_fails_is_tried_by_itself() {
    let mut rig = Rig::new(Setup::default());
    rig.hold_fills = true;
    let gone = Op::Put {
        key: key(1),
        binding: A,
        source: GONE,
        bytes: SMALL,
        keep: Keep::default(),
        durable: false,
        after: None,
    };
    let first = rig.ask(session(1), gone);
    let second = rig.ask(session(2), Rig::put_op(1, A, false));
    rig.fill_held();
    assert_eq!(words(&rig.wait(first)), "StagingRange");
    assert_eq!(words(&rig.wait(second)), "stored");
    assert_eq!(rig.read(1), "leased");
    end(rig);
}

#[test]
fn a_durable_put_fails_with_what_the_disk_says_and_the_block_stays_in_memory() {
    for (fault, code) in
        [(broken(), "DiskError"), (slow(), "DiskSlow"), (StoreFault::Never, "DeadlinePassed")]
    {
        let mut rig = Rig::new(Setup::default());
        rig.store().inject(1, fault);
        assert_eq!(rig.put_durably(1), code);
        assert_eq!(rig.read(1), "leased");
        end(rig);
    }
    let mut rig = Rig::new(Setup::default());
    rig.tell(Event::StoreHealth { serving: false });
    assert_eq!(rig.put_durably(1), "TierDegraded");
    rig.tell(Event::StoreHealth { serving: true });
    assert_eq!(rig.put_durably(1), "stored");
    assert_eq!(rig.tiers(1), [Tier::Host, Tier::Disk]);
    let mut rig = Rig::new(Setup::without_disk());
    assert_eq!(rig.put_durably(1), "TierDegraded", "there is no disk");
    end(rig);
}

#[test]
fn whoever_waits_for_an_announced_block_gets_a_lease_when_it_is_committed() {
    let mut rig = Rig::new(Setup::default());
    assert_eq!(words(&rig.get(session(1), Rig::reserve_op(1, false))), "reserved");
    assert_eq!(words(&rig.get(session(2), Rig::reserve_op(1, false))), "there");
    let waiter = rig.ask(session(2), Rig::acquire_op(1));
    let now = rig.get(session(2), Op::Acquire { key: key(1), wait: false, reach: Reach::Here, after: None });
    assert_eq!(words(&now), "not_complete", "who does not wait is told");
    assert_eq!(words(&rig.get(session(2), Rig::commit_op(1))), "NotReserved", "it is not his");
    assert_eq!(words(&rig.get(session(1), Rig::commit_op(1))), "stored");
    assert_eq!(words(&rig.wait(waiter)), "leased");
    end(rig);
}

#[test]
fn a_put_by_the_session_that_announced_the_block_is_its_commit() {
    for in_place in [false, true] {
        let mut rig = Rig::new(Setup::default());
        assert_eq!(words(&rig.get(session(1), Rig::reserve_op(1, in_place))), "reserved");
        let waiter = rig.ask(session(2), Rig::acquire_op(1));
        assert_eq!(words(&rig.get(session(2), Rig::put_op(1, A, false))), "AlreadyReserved", "it is not his");
        let other = rig.get(session(1), Rig::put_op(1, B, false));
        assert_eq!(words(&other), "AlreadyReserved", "it was announced under another binding");
        let keep = Keep { priority: Priority::High, expires_at: rig.now.unix + 100 };
        let put =
            Op::Put { key: key(1), binding: A, source: 0, bytes: SMALL, keep, durable: true, after: None };
        assert_eq!(words(&rig.get(session(1), put)), "stored");
        assert_eq!(words(&rig.wait(waiter)), "leased", "who waited has the block");
        let report = rig.inspect(key(1)).unwrap();
        assert_eq!(
            (report.priority, report.expires_at),
            (keep.priority, keep.expires_at),
            "the put has the last word"
        );
        assert_eq!(rig.tiers(1), [Tier::Host, Tier::Disk]);
        assert_eq!(words(&rig.get(session(1), Rig::commit_op(1))), "NotReserved", "the announcement is over");
        end(rig);
    }
}

#[test]
fn an_announcement_ends_by_abort_by_its_session_or_by_its_time_and_waiters_miss() {
    for how in ["abort", "session", "time"] {
        let mut rig = Rig::new(Setup::default());
        rig.get(session(1), Rig::reserve_op(1, how == "time"));
        let waiter = rig.ask(session(2), Rig::acquire_op(1));
        match how {
            "abort" => assert_eq!(words(&rig.get(session(1), Op::Abort { key: key(1) })), "1/0/0"),
            "session" => rig.close(session(1)),
            _ => rig.advance(500),
        }
        assert_eq!(rig.answer(waiter).as_ref().map(words).as_deref(), Some("not_complete"), "{how}");
        assert_eq!(rig.report().pending, 0);
        assert_eq!(words(&rig.get(session(2), Rig::put_op(1, A, false))), "stored", "the name is free again");
        end(rig);
    }
}

#[test]
fn an_announcement_made_again_has_its_own_time() {
    let mut rig = Rig::new(Setup::default());
    rig.get(session(1), Rig::reserve_op(1, false));
    rig.advance(400);
    rig.get(session(1), Op::Abort { key: key(1) });
    rig.get(session(1), Rig::reserve_op(1, false));
    rig.advance(200);
    assert_eq!(words(&rig.get(session(1), Rig::commit_op(1))), "stored");
    end(rig);
}

#[test]
fn waits_end_at_their_deadline_with_what_they_waited_for() {
    let mut rig = Rig::new(Setup::default());
    rig.send_down(1);
    rig.get(session(1), Rig::reserve_op(2, false));
    rig.hold_store = true;
    let until = rig.now.micros.plus_ms(50);
    let from_disk = rig.ask_until(session(2), until, Rig::acquire_op(1));
    let announced = rig.ask_until(session(2), until, Rig::acquire_op(2));
    let durable = rig.ask_until(session(2), until, Rig::put_op(3, A, true));
    rig.advance(49);
    assert_eq!(rig.unanswered(), 3);
    rig.advance(1);
    assert_eq!(words(&rig.wait(from_disk)), "tier_timeout");
    assert_eq!(words(&rig.wait(announced)), "not_complete");
    assert_eq!(words(&rig.wait(durable)), "DeadlinePassed");
    let late = rig.ask_until(session(2), rig.now.micros, Rig::acquire_op(1));
    assert_eq!(words(&rig.wait(late)), "DeadlinePassed");
    rig.hold_store = false;
    rig.settle();
    assert_eq!(rig.tiers(1), [Tier::Host, Tier::Disk], "what was under way went on");
    end(rig);
}

#[test]
fn a_session_that_ends_gives_everything_back_and_leaves_no_request_open() {
    let mut rig = Rig::new(Setup::default());
    rig.put_all(1..3);
    let grant = rig.lease(session(2), 1);
    rig.lease(session(2), 2);
    rig.send_down(3);
    rig.hold_store = true;
    let waits = [
        rig.ask(session(2), Rig::acquire_op(3)),
        rig.ask(session(2), Rig::put_op(4, A, true)),
        rig.ask(session(2), Op::Verify { tier: Tier::Disk }),
    ];
    rig.settle();
    assert!(waits.iter().all(|id| rig.answer(*id).is_none()));
    rig.close(session(2));
    for id in waits {
        assert_eq!(words(&rig.wait(id)), "UnknownSession");
    }
    assert_eq!(rig.slab().header(grant.slot).unwrap().holds, 0);
    assert_eq!(rig.report().counters.lease_reclaims["session_closed"], 2);
    assert_eq!(words(&rig.get(session(2), Rig::acquire_op(1))), "UnknownSession");
    end(rig);
}

#[test]
fn pins_survive_any_pressure_until_they_end() {
    let mut rig = Rig::new(Setup::without_disk());
    rig.put_all(0..4);
    let until = rig.now.micros.plus_ms(5_000);
    assert_eq!(words(&rig.get(session(1), Op::Pin { keys: vec![key(0), key(1), key(99)], until })), "2/0/1");
    assert_eq!(rig.report().pinned_bytes, 2 * u64::from(SMALL));
    rig.put_all(100..150);
    assert_eq!((rig.read(0).as_str(), rig.read(2).as_str()), ("leased", "evicted_capacity"));
    assert_eq!(rig.evict(0, None), "0/1/0", "a pinned block is left alone");
    assert_eq!(words(&rig.get(session(1), Op::Unpin { keys: vec![key(1), key(2)] })), "1/0/1");
    rig.advance(5_000);
    assert_eq!(rig.report().pinned_bytes, 0);
    assert_eq!((rig.evict(0, None), rig.evict(1, None)), ("1/0/0".into(), "1/0/0".into()));
    let forever = rig.get(session(1), Op::Pin { keys: vec![], until: Micros::NEVER });
    assert!(is_fault(&forever, Code::BadRequest), "every pin has an end");
    rig.put_all(300..314);
    let until = rig.now.micros.plus_ms(5_000);
    let many = rig.get(session(1), Op::Pin { keys: (300..314).map(key).collect(), until });
    assert!(is_fault(&many, Code::TooManyPins));
    end(rig);
}

#[test]
fn a_quota_costs_its_own_tenant_blocks_of_any_size_and_nobody_else() {
    let mut rig = Rig::new(Setup { regions: 4, ..Setup::without_disk() });
    rig.tell(Event::Quota { tenant: "b".into(), bytes_max: Some(4 * u64::from(SMALL)) });
    rig.put_all(0..8);
    let put_b = |rig: &mut Rig, n| words(&rig.get(session(1), Rig::put_op(n, B, false)));
    for n in 10..14 {
        assert_eq!(put_b(&mut rig, n), "stored");
    }
    assert_eq!(words(&rig.get(session(1), Rig::put_op(20, B_LARGE, false))), "stored");
    assert_eq!((rig.read(10).as_str(), rig.read(11).as_str()), ("evicted_quota", "evicted_quota"));
    assert_eq!((rig.read(12).as_str(), rig.read(20).as_str()), ("leased", "leased"));
    for n in 0..8 {
        assert_eq!(rig.read(n), "leased", "tenant a has lost nothing");
    }
    for n in [12, 13, 20] {
        rig.lease(session(2), n);
    }
    assert_eq!(put_b(&mut rig, 15), "QuotaFull", "all that is left of b is read");
    assert_eq!(words(&rig.get(session(1), Rig::put_op(50, A, false))), "stored");
    rig.tell(Event::Quota { tenant: "b".into(), bytes_max: Some(u64::from(SMALL)) });
    rig.close(session(2));
    assert_eq!(words(&rig.get(session(1), Rig::put_op(21, B_LARGE, false))), "QuotaFull");
    assert_eq!(rig.read(20), "leased", "a block that can never fit costs nothing");
    rig.tell(Event::Quota { tenant: "b".into(), bytes_max: None });
    end(rig);
}

#[test]
fn a_quota_of_nothing_is_a_quota_and_none_is_none() {
    let mut rig = Rig::new(Setup::default());
    let put_b = |rig: &mut Rig, n| words(&rig.get(session(1), Rig::put_op(n, B, false)));
    rig.tell(Event::Quota { tenant: "b".into(), bytes_max: Some(0) });
    assert_eq!(put_b(&mut rig, 10), "QuotaFull");
    assert_eq!(rig.put(1), "stored", "tenant a has no quota");
    rig.tell(Event::Quota { tenant: "b".into(), bytes_max: None });
    assert_eq!(put_b(&mut rig, 10), "stored");
    end(rig);
}

#[test]
fn a_quota_counts_what_is_on_its_way() {
    let mut rig = Rig::new(Setup::default());
    for n in [10, 11] {
        rig.get(session(1), Rig::put_op(n, B, true));
        rig.evict(n, Some(Tier::Host));
    }
    rig.tell(Event::Quota { tenant: "b".into(), bytes_max: Some(u64::from(SMALL)) });
    rig.hold_store = true;
    let first = rig.ask(session(1), Rig::acquire_op(10));
    let second = rig.ask(session(1), Rig::acquire_op(11));
    assert_eq!(words(&rig.wait(second)), "quota");
    rig.hold_store = false;
    assert_eq!(words(&rig.wait(first)), "leased");
    end(rig);
}

#[test]
fn a_block_that_leaves_for_the_disk_comes_back_equal() {
    let mut rig = Rig::new(Setup::default());
    rig.put_all(0..30);
    assert!(rig.report().disk_blocks >= 12, "admission takes all");
    for n in 0..30 {
        assert_eq!(rig.read(n), "leased", "block {n}; the rig compares the bytes");
    }
    let counters = rig.report().counters;
    assert!(counters.onboard_blocks >= 14 && counters.offload_bytes >= 14 * u64::from(SMALL));
    assert!(counters.hits["disk"] >= 14);
    end(rig);
}

#[test]
fn a_budget_is_spent_on_blocks_stored_once_when_such_come_back() {
    for returns in [false, true] {
        let mut rig = Rig::new(Setup { disk: Some(AdmissionKind::Budget), ..Setup::default() });
        rig.put_all(0..400);
        assert_eq!(rig.report().disk_blocks, 0, "nothing has come back yet");
        if returns {
            rig.put_all(0..100);
        }
        rig.put_all(1000..1400);
        let written = (1000..1400).filter(|n| rig.tiers(*n).contains(&Tier::Disk)).count();
        assert_eq!(written > 0, returns, "{written} blocks stored once are on disk");
        end(rig);
    }
}

#[test]
fn a_prefetched_block_is_in_memory_when_it_is_wanted() {
    let mut rig = Rig::new(Setup::default());
    rig.send_down(1);
    rig.put(2);
    let op = Op::Prefetch { steps: path(1..4), reach: Reach::Here };
    assert_eq!(words(&rig.get(session(1), op)), "1/1/1");
    rig.settle();
    assert_eq!(rig.tiers(1), [Tier::Host, Tier::Disk]);
    end(rig);
}

#[test]
fn what_came_before_a_block_is_known_while_it_is_in_memory_or_expected() {
    let mut rig = Rig::new(Setup { object: Some(object()), ..Setup::default() });
    let put = |n, source, after| {
        let keep = Keep::default();
        Op::Put { key: key(n), binding: A, source, bytes: SMALL, keep, durable: true, after }
    };
    let acquire =
        |n, after| Op::Acquire { key: key(n), wait: true, reach: Reach::Here, after: Some(key(after)) };
    let (one, two) = (Some(key(1)), Some(key(2)));
    for (n, after) in [(1, None), (2, one), (3, two)] {
        assert_eq!(words(&rig.get(session(1), put(n, 0, after))), "stored");
    }
    assert_eq!([1, 2, 3].map(|n| rig.before(n)), [None, one, two]);
    assert_eq!((rig.put(2).as_str(), rig.before(2)), ("already", one), "saying nothing takes nothing back");

    assert_eq!(rig.evict(2, Some(Tier::Host)), "1/0/0");
    assert_eq!([2, 3].map(|n| rig.before(n)), [None, two], "it went down");
    assert_eq!(words(&rig.get(session(1), acquire(2, 1))), "leased");
    assert_eq!(rig.before(2), one, "and up again");
    assert_eq!(rig.evict(3, Some(Tier::Host)), "1/0/0");
    assert_eq!(words(&rig.get(session(1), Op::Prefetch { steps: path(1..4), reach: Reach::Here })), "1/2/0");
    assert_eq!(rig.before(3), two);

    let reserve = Op::Reserve { key: key(4), binding: A, keep: Keep::default(), in_place: false, after: one };
    assert_eq!(words(&rig.get(session(1), reserve)), "reserved");
    assert_eq!(rig.before(4), one);
    rig.get(session(1), Op::Abort { key: key(4) });
    assert_eq!(words(&rig.get(session(1), put(5, GONE, one))), "StagingRange");
    assert_eq!(words(&rig.get(session(1), acquire(6, 1))), "never_stored");
    assert_eq!([4, 5, 6].map(|n| rig.before(n)), [None; 3], "what did not come is forgotten");
    end(rig);
}

#[test]
fn every_miss_says_why() {
    use MissReason as Why;
    type Story = fn(&mut Rig) -> String;
    let stories: [(Why, Setup, Story); 15] = [
        (Why::NeverStored, Setup::default(), |rig| rig.read(1)),
        (Why::EvictedCapacity, Setup::without_disk(), |rig| {
            rig.put_all(1..40);
            rig.read(1)
        }),
        (Why::AdmissionRejected, Setup { disk: Some(AdmissionKind::Never), ..Setup::default() }, |rig| {
            rig.put_all(1..40);
            rig.read(1)
        }),
        (Why::EvictedQuota, Setup::default(), |rig| {
            rig.tell(Event::Quota { tenant: "a".into(), bytes_max: Some(u64::from(SMALL)) });
            rig.put_all(1..3);
            rig.read(1)
        }),
        (Why::EvictedRequest, Setup::default(), |rig| {
            rig.put_durably(1);
            assert_eq!(rig.evict(1, None), "1/0/0");
            assert_eq!(rig.evict(1, None), "0/0/1");
            rig.read(1)
        }),
        (Why::EvictedReclaim, small_disk(), |rig| {
            for n in 1..40 {
                rig.put_durably(n);
                rig.evict(n, Some(Tier::Host));
            }
            rig.read(1)
        }),
        (Why::Expired, Setup::default(), |rig| {
            let keep = Keep { expires_at: rig.now.unix + 2, ..Keep::default() };
            let op = Op::Put {
                key: key(1),
                binding: A,
                source: 0,
                bytes: SMALL,
                keep,
                durable: true,
                after: None,
            };
            rig.get(session(1), op);
            assert_eq!(rig.read(1), "leased");
            rig.advance(3_000);
            rig.read(1)
        }),
        (Why::Corrupt, Setup::default(), |rig| {
            rig.put(1);
            rig.damage_host(key(1));
            let verified = rig.get(session(1), Op::Verify { tier: Tier::Host });
            assert_eq!(words(&verified), "finished 1 failed 1");
            assert_eq!(rig.report().counters.checksum_failures["host"], 1);
            rig.read(1)
        }),
        (Why::Corrupt, Setup::default(), |rig| {
            rig.send_down(1);
            rig.damage_disk(key(1));
            let read = rig.read(1);
            assert_eq!(rig.report().counters.checksum_failures["disk"], 1);
            assert_eq!(rig.report().quarantined, 1);
            assert_eq!(rig.read(1), read, "it is remembered");
            read
        }),
        (Why::TierDegraded, Setup::default(), |rig| {
            rig.send_down(1);
            rig.store().inject(1, broken());
            rig.read(1)
        }),
        (Why::TierDegraded, Setup::default(), |rig| {
            rig.send_down(1);
            rig.tell(Event::StoreHealth { serving: false });
            let looked = rig.get(session(1), Op::Lookup { keys: vec![key(1)], all: true });
            assert_eq!(words(&looked), "tier_degraded");
            let read = rig.read(1);
            rig.tell(Event::StoreHealth { serving: true });
            assert_eq!(rig.read(1), "leased", "it was not lost");
            read
        }),
        (Why::NotComplete, Setup::default(), |rig| {
            rig.get(session(1), Rig::reserve_op(1, false));
            rig.read(1)
        }),
        (Why::Quota, Setup::default(), |rig| {
            rig.send_down(1);
            rig.put(2);
            rig.lease(session(2), 2);
            rig.tell(Event::Quota { tenant: "a".into(), bytes_max: Some(u64::from(SMALL)) });
            rig.read(1)
        }),
        (Why::TierTimeout, Setup::default(), |rig| {
            rig.send_down(1);
            rig.store().inject(1, slow());
            rig.read(1)
        }),
        (Why::Overloaded, Setup { leases_max: 100, ..Setup::default() }, |rig| {
            rig.send_down(99);
            for n in 0..16 {
                assert_eq!(rig.put(n), "stored");
                rig.lease(session(2), n);
            }
            rig.read(99)
        }),
    ];
    for (reason, setup, story) in stories {
        let mut rig = Rig::new(setup);
        assert_eq!(story(&mut rig), reason.name());
        assert!(rig.misses(reason) > 0);
        end(rig);
    }
}

/// A disk of 4 MiB: 16 small blocks, fewer with what is kept for moves.
fn small_disk() -> Setup {
    let store = MemoryConfig { segments: 4, segment_pages: 256, in_flight_max: 16 };
    Setup { store, ..Setup::default() }
}

#[test]
fn reclaim_keeps_what_is_read_and_drops_what_is_not() {
    let mut rig = Rig::new(small_disk());
    rig.send_down(0);
    for n in 1..30 {
        rig.send_down(n);
        assert_eq!(rig.read(0), "leased", "it is read again and again");
        rig.evict(0, Some(Tier::Host));
    }
    let report = rig.report();
    assert!(report.counters.moved_blocks > 0);
    assert_eq!(rig.read(0), "leased");
    assert_eq!(rig.read(1), "evicted_reclaim");
    end(rig);
}

#[test]
fn a_verification_does_not_call_damaged_what_it_could_not_read() {
    let mut rig = Rig::new(Setup::default());
    for n in 0..3 {
        rig.send_down(n);
    }
    rig.store().inject(2, broken());
    assert_eq!(words(&rig.get(SessionId(0), Op::Verify { tier: Tier::Disk })), "DiskError");
    assert_eq!(rig.report().counters.checksum_failures.values().sum::<u64>(), 0);
    for n in 0..3 {
        assert_eq!(rig.read(n), "leased");
    }
    end(rig);
}

#[test]
fn an_eviction_is_done_when_no_crash_brings_the_block_back() {
    for (fault, answer) in
        [(None, "1/0/0"), (Some(broken()), "DiskError"), (Some(StoreFault::Never), "DeadlinePassed")]
    {
        let well = fault.is_none();
        let mut rig = Rig::new(Setup::default());
        rig.send_down(1);
        if let Some(fault) = fault {
            rig.store().inject(1, fault);
        }
        let asked = rig.ask(session(1), Op::Evict { keys: vec![key(1)], tier: None, dry_run: false });
        assert!(rig.answer(asked).is_none(), "the removal has not been written");
        assert_eq!(rig.read(1), "evicted_request", "it is gone at once all the same");
        assert_eq!(words(&rig.wait(asked)), answer);
        if well {
            rig.crash(1, |_| {});
            assert_eq!(rig.read(1), "never_stored");
        }
        end(rig);
    }
}

#[test]
fn a_purge_is_done_when_no_crash_brings_its_blocks_back() {
    let mut rig = Rig::new(Setup::default());
    for n in 0..8 {
        rig.send_down(n);
    }
    rig.store().inject(3, broken());
    let purge = Op::Purge { filter: Filter::default(), tier: None, dry_run: false };
    let asked = rig.ask(SessionId(0), purge);
    assert_eq!(words(&rig.wait(asked)), "DiskError", "one of them may come back, and it says so");
    assert_eq!(rig.report().blocks, 0);
    end(rig);
}

#[test]
fn a_segment_whose_release_fails_is_not_lost() {
    let mut rig = Rig::new(small_disk());
    // Of everything that the store is asked, one in three fails for a while: releases among it.
    for nth in 1..60 {
        if nth % 3 == 0 {
            rig.store().inject(nth, broken());
        }
    }
    for n in 0..60 {
        rig.put_durably(n);
        rig.evict(n, Some(Tier::Host));
        rig.advance(100);
    }
    rig.advance(2_000);
    rig.settle();
    for n in 100..110 {
        assert_eq!(rig.put_durably(n), "stored", "block {n}: there is room on disk");
    }
    end(rig);
}

#[test]
fn a_purged_block_does_not_come_back_after_a_restart() {
    let mut rig = Rig::new(Setup { survives: true, ..Setup::default() });
    for n in 0..6 {
        assert_eq!(rig.put_durably(n), "stored");
    }
    rig.get(session(1), Rig::put_op(10, B, true));
    let filter = Filter { tenant: Some("a".into()), ..Filter::default() };
    let dry = rig.get(SessionId(0), Op::Purge { filter: filter.clone(), tier: None, dry_run: true });
    assert_eq!(words(&dry), "finished 6 failed 0");
    assert_eq!(rig.read(5), "leased");
    let purged = rig.ask(SessionId(0), Op::Purge { filter, tier: None, dry_run: false });
    assert_eq!(words(&rig.wait(purged)), "finished 6 failed 0");
    rig.settle();
    rig.crash(1, |_| {});
    for n in 0..6 {
        assert_eq!(rig.read(n), "never_stored");
    }
    assert_eq!(rig.read(10), "leased");
    end(rig);
}

#[test]
fn what_was_stored_again_after_a_purge_is_there_after_a_restart() {
    let mut rig = Rig::new(Setup { survives: true, ..Setup::default() });
    for _ in 0..3 {
        assert_eq!(rig.put_durably(1), "stored");
        assert_eq!(rig.evict(1, None), "1/0/0");
    }
    assert_eq!(rig.put_durably(1), "stored");
    rig.crash(1, |_| {});
    assert_eq!(rig.read(1), "leased");
    end(rig);
}

#[test]
fn long_work_is_done_in_parts_and_says_how_far_it_is() {
    let mut rig = Rig::new(Setup { entries_max: 1 << 17, ..Setup::default() });
    rig.put_all(0..12);
    for n in 0..12 {
        rig.put_durably(n);
    }
    for (tier, op) in [(Tier::Host, 12), (Tier::Disk, 12)] {
        let id = rig.ask(SessionId(0), Op::Verify { tier });
        assert_eq!(words(&rig.wait(id)), format!("finished {op} failed 0"));
        assert!(rig.progress[&id].len() > 3, "{tier:?} in parts");
    }
    let id = rig.ask(SessionId(0), Op::Purge { filter: Filter::default(), tier: None, dry_run: false });
    assert_eq!(words(&rig.wait(id)), "finished 12 failed 0");
    assert!(rig.progress[&id].len() > 3);
    assert_eq!(rig.list(5).len(), 0);
    end(rig);
}

#[test]
fn long_work_stops_when_nobody_waits_for_it() {
    let mut rig = Rig::new(Setup { entries_max: 1 << 17, ..Setup::default() });
    rig.put_all(0..12);
    for n in 0..12 {
        rig.put_durably(n);
    }
    let purge = Op::Purge { filter: Filter::default(), tier: None, dry_run: false };
    for op in [Op::Verify { tier: Tier::Disk }, purge] {
        let id = rig.ask(SessionId(0), op.clone());
        while !rig.progress.contains_key(&id) {
            rig.tick();
        }
        rig.tell(Event::Unheard { from: Origin { session: SessionId(0), request: RequestId(id) } });
        assert!(matches!(rig.answer(id), Some(Reply::Fault(_))), "{op:?}");
        let parts = rig.progress[&id].len();
        rig.settle();
        rig.advance(1);
        assert_eq!(rig.progress[&id].len(), parts, "{op:?}");
    }
    assert!(rig.list(100).len() >= 6, "one part of many was done");
    end(rig);
}

#[test]
fn a_verification_of_the_disk_finds_damage_without_room_in_memory() {
    let mut rig = Rig::new(Setup::default());
    for n in 0..16 {
        assert_eq!(rig.put_durably(n), "stored");
    }
    rig.damage_disk(key(3));
    // Memory is full: the blocks make room, nothing is skipped.
    let id = rig.ask(SessionId(0), Op::Verify { tier: Tier::Disk });
    assert_eq!(words(&rig.wait(id)), "finished 16 failed 1");
    assert!(rig.progress.get(&id).is_none_or(|parts| parts.len() < 40), "no word without progress");
    end(rig);
}

#[test]
fn a_verification_that_can_find_no_room_ends_with_a_fault() {
    let mut rig = Rig::new(Setup::default());
    rig.send_down(99);
    for n in 0..16 {
        rig.put(n);
        rig.lease(session(2), n);
    }
    assert_eq!(words(&rig.get(SessionId(0), Op::Verify { tier: Tier::Disk })), "HostFull");
    rig.tell(Event::StoreHealth { serving: false });
    assert_eq!(words(&rig.get(SessionId(0), Op::Verify { tier: Tier::Disk })), "TierDegraded");
    end(rig);
}

#[test]
fn pages_of_a_listing_show_every_block_once_and_are_as_long_as_asked_for() {
    let mut rig = Rig::new(Setup::default());
    rig.put_all(0..14);
    for page in [1, 3, 100] {
        let listed = rig.list(page);
        assert_eq!(listed.len(), 14);
    }
    let op = Op::List { cursor: 0, count: 5, filter: Filter::default() };
    let Reply::Listed { blocks, next } = rig.get(SessionId(0), op) else { panic!("no page") };
    assert!(blocks.len() == 5 && next.is_some(), "{}", blocks.len());
    let filter = Filter { key_prefix: key(3).to_string()[..8].to_owned(), ..Filter::default() };
    let op = Op::List { cursor: 0, count: 5, filter };
    let Reply::Listed { blocks, .. } = rig.get(SessionId(0), op) else { panic!("no page") };
    assert_eq!(blocks.iter().map(|block| block.key).collect::<Vec<_>>(), [key(3)]);
    end(rig);
}

#[test]
fn a_subscriber_who_is_too_far_behind_is_told_so() {
    let mut rig = Rig::new(Setup { events_kept_max: 4, ..Setup::default() });
    rig.put_all(0..6);
    let after = |rig: &mut Rig, after| match rig.get(session(1), Op::Events { after, count: 10 }) {
        Reply::Events(events) => events.map(|events| events.len()),
        other => panic!("{other:?}"),
    };
    assert_eq!(after(&mut rig, 0), None);
    assert_eq!(after(&mut rig, 2), Some(4));
    assert_eq!(after(&mut rig, 6), Some(0));
    assert_eq!(after(&mut rig, 7), None, "a number of another life");
    rig.finish();
}

#[test]
fn blocks_in_memory_survive_a_crash_and_a_damaged_one_is_never_served() {
    let mut rig = Rig::new(Setup { survives: true, ..Setup::without_disk() });
    rig.put_all(0..10);
    rig.damage_host(key(3));
    rig.damage_host(key(4));
    rig.crash(1, |_| {});
    // Before anything else: the first use verifies.
    assert_eq!(
        words(
            &rig.get(session(1), Op::Acquire { key: key(3), wait: false, reach: Reach::Here, after: None })
        ),
        "corrupt"
    );
    assert_eq!(rig.put(4), "stored", "a put does not rely on a damaged copy");
    for n in (0..10).filter(|n| *n != 3) {
        assert_eq!(rig.read(n), "leased", "block {n}");
    }
    assert_eq!(rig.report().counters.checksum_failures["host"], 2);
    end(rig);
}

#[test]
fn a_damaged_block_is_onboarded_from_its_good_copy_on_disk() {
    let mut rig = Rig::new(Setup { survives: true, ..Setup::default() });
    assert_eq!(rig.put_durably(1), "stored");
    rig.damage_host(key(1));
    rig.crash(1, |_| {});
    assert_eq!(rig.read(1), "leased");
    end(rig);
}

#[test]
fn a_damaged_block_that_somebody_holds_is_quarantined_at_once_and_freed_later() {
    let mut rig = Rig::new(Setup::without_disk());
    rig.put(1);
    let grant = rig.lease(session(2), 1);
    rig.damage_host(key(1));
    rig.leases.clear(); // the rig would look at its bytes
    let verified = rig.get(session(1), Op::Verify { tier: Tier::Host });
    assert_eq!(words(&verified), "finished 1 failed 1");
    assert_eq!(rig.read(1), "corrupt");
    assert_eq!(rig.put(1), "stored", "the name is free");
    assert_eq!(rig.read(1), "leased");
    assert_eq!(rig.slab().header(grant.slot).unwrap().holds, 1);
    rig.release(session(2), grant.lease);
    rig.advance(20);
    assert_ne!(rig.slab().header(grant.slot).unwrap().generation, grant.generation);
    end(rig);
}

#[test]
fn a_trusted_worker_fills_a_slot_in_place() {
    let mut rig = Rig::new(Setup::default());
    let Reply::Reserved { slot: Some(grant) } = rig.get(session(1), Rig::reserve_op(1, true)) else {
        panic!("no slot")
    };
    let waiter = rig.ask(session(2), Rig::acquire_op(1));
    let checksum = rig.fill_in_place(&key(1), &grant);
    let (slot, generation) = (grant.slot, grant.generation);
    let commit = Op::CommitInPlace { key: key(1), slot, generation, checksum, durable: true };
    assert_eq!(words(&rig.get(session(2), commit.clone())), "NotReserved");
    assert_eq!(words(&rig.get(session(1), commit.clone())), "stored");
    assert_eq!(words(&rig.wait(waiter)), "leased");
    assert_eq!(words(&rig.get(session(1), commit)), "NotReserved", "once is enough");
    assert_eq!(rig.tiers(1), [Tier::Host, Tier::Disk]);
    // Another slot than the one that was given ends the reservation.
    let Reply::Reserved { slot: Some(other) } = rig.get(session(1), Rig::reserve_op(2, true)) else {
        panic!("no slot")
    };
    assert_ne!(other.slot, slot);
    let wrong = Op::CommitInPlace { key: key(2), slot, generation, checksum, durable: false };
    assert_eq!(words(&rig.get(session(1), wrong)), "NotReserved");
    assert_eq!(rig.read(2), "never_stored");
    end(rig);
}

#[test]
fn nonsense_is_refused_and_changes_nothing() {
    let mut rig = Rig::new(Setup::default());
    let put = |binding, bytes| Op::Put {
        key: key(1),
        binding,
        source: 0,
        bytes,
        keep: Keep::default(),
        durable: false,
        after: None,
    };
    let unknown = kv_block::BindingId(77);
    let refusals = [
        (session(1), put(unknown, SMALL), "UnknownBinding"),
        (session(1), put(A, SMALL - 1), "WrongLength"),
        (session(1), put(A, LARGE), "WrongLength"),
        (session(8), put(A, SMALL), "UnknownSession"),
        (session(1), Rig::commit_op(1), "NotReserved"),
        (session(1), Op::Abort { key: key(1) }, "NotReserved"),
        (session(1), Op::Release { leases: vec![LeaseId(0), LeaseId(u64::MAX)] }, "0/0/2"),
        (SessionId(0), Op::Release { leases: vec![LeaseId(1)] }, "UnknownSession"),
    ];
    for (of, op, wanted) in refusals {
        assert_eq!(words(&rig.get(of, op.clone())), wanted, "{op:?}");
    }
    rig.put(1);
    let grant = rig.lease(session(1), 1);
    assert_eq!(rig.release(session(2), grant.lease), "0/0/1", "a lease is its session's");
    assert_eq!(words(&rig.get(SessionId(0), Rig::acquire_op(1))), "UnknownSession");
    rig.tell(Event::Touched((0..2000).chain([u32::MAX]).map(kv_block::SlotId).collect()));
    end(rig);
}

#[test]
fn announcements_count_among_what_a_session_may_hold() {
    let mut rig = Rig::new(Setup { leases_max: 3, ..Setup::default() });
    rig.put_all(0..1);
    assert_eq!(words(&rig.get(session(1), Rig::acquire_op(0))), "leased");
    for n in 1..3 {
        assert_eq!(words(&rig.get(session(1), Rig::reserve_op(n, false))), "reserved");
    }
    assert_eq!(words(&rig.get(session(1), Rig::reserve_op(3, false))), "TooManyLeases");
    assert_eq!(words(&rig.get(session(1), Rig::acquire_op(0))), "TooManyLeases");
    assert_eq!(
        words(&rig.get(session(2), Rig::reserve_op(3, false))),
        "reserved",
        "that is another session's"
    );
    assert_eq!(words(&rig.get(session(1), Op::Abort { key: key(1) })), "1/0/0");
    assert_eq!(words(&rig.get(session(1), Rig::reserve_op(4, false))), "reserved");
    end(rig);
}

#[test]
fn a_session_holds_as_many_leases_as_it_may() {
    let mut rig = Rig::new(Setup { leases_max: 2, ..Setup::default() });
    rig.put_all(0..3);
    let first = rig.lease(session(1), 0);
    rig.lease(session(1), 0);
    assert_eq!(words(&rig.get(session(1), Rig::acquire_op(1))), "TooManyLeases");
    rig.release(session(1), first.lease);
    rig.lease(session(1), 1);
    end(rig);
}

#[test]
fn a_slot_that_a_worker_reads_by_itself_is_not_given_to_another_block() {
    let mut rig = Rig::new(Setup::without_disk());
    let worker = rig.worker();
    rig.put(1);
    let read = worker.read(&key(1)).unwrap();
    let (slot, generation) = read.slot();
    assert_eq!(rig.evict(1, None), "1/0/0", "it leaves the catalog");
    assert_eq!(rig.read(1), "evicted_request");
    rig.put_all(100..160);
    assert_eq!(kv_block::payload::first_wrong_byte(&key(1), &read), None, "its bytes stay as they are");
    assert!(!read.still_valid() || rig.slab().header(slot).unwrap().generation == generation);
    drop(read);
    rig.put_all(200..260);
    let reused = rig.list(100).iter().any(|block| block.host.is_some_and(|(of, _)| of == slot));
    assert!(reused, "afterwards it is");
    end(rig);
}

#[test]
fn reads_that_nobody_reported_count_when_the_worker_says_so() {
    let mut rig = Rig::new(Setup::without_disk());
    rig.put_all(0..16);
    let slots =
        rig.list(100).iter().filter(|block| block.key == key(0)).filter_map(|b| b.host).collect::<Vec<_>>();
    rig.tell(Event::Touched(slots.iter().map(|(slot, _)| *slot).collect()));
    rig.put_all(20..30);
    assert_eq!((rig.read(0).as_str(), rig.read(1).as_str()), ("leased", "evicted_capacity"));
    end(rig);
}

#[test]
fn reads_over_grpc_that_asked_nobody_count_like_all_others() {
    let mut rig = Rig::new(Setup::without_disk());
    rig.put_all(0..16);
    let (slot, _) = rig.list(100).iter().find(|block| block.key == key(0)).and_then(|b| b.host).unwrap();
    let before = rig.report();
    rig.tell(Event::Read { session: session(1), slot });
    rig.tell(Event::Looked { binding: A, count: 5 });
    let after = rig.report();
    let hits = |report: &kv_node::ShardReport| report.counters.hits.values().sum::<u64>();
    let paid = |report: &kv_node::ShardReport| report.tenants.iter().map(|tenant| tenant.hits).sum::<u64>();
    let gets = |report: &kv_node::ShardReport| report.sessions.iter().map(|one| one.gets).sum::<u64>();
    assert_eq!(hits(&after), hits(&before) + 6);
    assert_eq!(paid(&after), paid(&before) + 6);
    assert_eq!(gets(&after), gets(&before) + 1);
    rig.put_all(20..30);
    assert_eq!((rig.read(0).as_str(), rig.read(1).as_str()), ("leased", "evicted_capacity"));
    // Both may come late, when the session or the block is gone.
    rig.tell(Event::Read { session: session(99), slot: kv_block::SlotId(u32::MAX) });
    rig.tell(Event::Looked { binding: kv_block::BindingId(999), count: 1 });
    end(rig);
}

#[test]
fn puts_wait_for_room_in_order_and_one_size_does_not_hold_up_another() {
    let mut rig = Rig::new(Setup { regions: 2, ..Setup::default() });
    // One region of small, one of large blocks, all of them on their way to disk or read.
    rig.put_all(0..8);
    for n in 100..104 {
        assert_eq!(words(&rig.get(session(1), Rig::put_op(n, B_LARGE, false))), "stored");
    }
    for n in 0..8 {
        rig.lease(session(2), n);
    }
    rig.hold_store = true;
    let large: Vec<_> = (110..113).map(|n| rig.ask(session(1), Rig::put_op(n, B_LARGE, false))).collect();
    let small = rig.ask(session(1), Rig::put_op(50, A, false));
    rig.settle();
    assert!(large.iter().all(|id| rig.answer(*id).is_none()), "they wait for the disk");
    rig.close(session(2));
    rig.hold_store = false;
    for id in large {
        assert_eq!(words(&rig.wait(id)), "stored");
    }
    assert_eq!(words(&rig.wait(small)), "stored");
    end(rig);
}

#[test]
fn too_many_that_wait_are_turned_away_with_a_hint() {
    let mut rig = Rig::new(Setup { stalled_max: 2, ..Setup::default() });
    rig.put_all(0..16);
    rig.hold_store = true;
    let waiting: Vec<_> = (20..25).map(|n| rig.ask(session(1), Rig::put_op(n, A, false))).collect();
    rig.settle();
    let answers: Vec<_> = waiting.iter().map(|id| rig.answer(*id)).collect();
    let turned_away = answers.iter().flatten().filter(|reply| is_fault(reply, Code::QueueFull)).count();
    assert_eq!((turned_away, rig.unanswered()), (3, 2));
    assert!(
        answers
            .iter()
            .flatten()
            .all(|reply| matches!(reply, Reply::Fault(fault) if fault.retry_after.is_some()))
    );
    rig.advance(1_000);
    assert_eq!(rig.unanswered(), 0, "the others end at their deadline");
    rig.hold_store = false;
    end(rig);
}

#[test]
fn everything_read_at_once_leaves_no_room_and_a_put_is_told_so() {
    let mut rig = Rig::new(Setup::default());
    for n in 0..16 {
        rig.put(n);
        rig.lease(session(2), n);
    }
    assert_eq!(rig.put(20), "HostFull");
    assert_eq!(words(&rig.get(session(1), Rig::reserve_op(21, true))), "HostFull");
    rig.close(session(2));
    assert_eq!(rig.put(20), "stored");
    end(rig);
}

#[test]
fn other_bytes_under_a_known_name_count_from_then_on() {
    let mut rig = Rig::new(Setup { survives: true, ..Setup::default() });
    rig.send_down(1);
    rig.versions.insert(key(1), [5].into());
    let op = Op::Put {
        key: key(1),
        binding: B,
        source: 5,
        bytes: SMALL,
        keep: Keep::default(),
        durable: true,
        after: None,
    };
    assert_eq!(words(&rig.get(session(1), op)), "stored");
    assert_eq!(rig.read(1), "leased", "the rig knows only the new bytes");
    rig.check_books();
    rig.evict(1, Some(Tier::Host));
    assert_eq!(rig.read(1), "leased");
    rig.crash(3, |_| {});
    assert_eq!(rig.read(1), "leased");
    end(rig);
}

#[test]
fn the_same_bytes_under_another_binding_move_the_bill() {
    let mut rig = Rig::new(Setup::default());
    rig.send_down(1);
    assert_eq!(words(&rig.get(session(1), Rig::put_op(1, B, false))), "stored");
    assert_eq!(rig.tiers(1), [Tier::Host, Tier::Disk]);
    rig.check_books();
    rig.evict(1, None);
    end(rig);
}

#[test]
fn a_put_of_a_block_that_is_coming_up_is_answered_when_it_is_there() {
    for corrupt in [false, true] {
        let mut rig = Rig::new(Setup::default());
        rig.send_down(1);
        if corrupt {
            rig.damage_disk(key(1));
        }
        rig.hold_store = true;
        let reader = rig.ask(session(2), Rig::acquire_op(1));
        let put = rig.ask(session(1), Rig::put_op(1, A, false));
        assert_eq!((rig.answer(reader), rig.answer(put)), (None, None));
        rig.hold_store = false;
        assert_eq!(words(&rig.wait(reader)), if corrupt { "corrupt" } else { "leased" });
        assert_eq!(words(&rig.wait(put)), if corrupt { "stored" } else { "already" });
        assert_eq!(rig.read(1), "leased");
        end(rig);
    }
}

#[test]
fn an_expired_block_that_is_still_read_can_be_stored_again() {
    let mut rig = Rig::new(Setup::default());
    let keep = Keep { expires_at: rig.now.unix + 2, ..Keep::default() };
    let op = Op::Put { key: key(1), binding: A, source: 0, bytes: SMALL, keep, durable: false, after: None };
    rig.get(session(1), op);
    let grant = rig.lease(session(2), 1);
    rig.advance(3_000);
    assert_eq!(rig.read(1), "expired");
    assert_eq!(rig.put(1), "already");
    assert_eq!(rig.read(1), "leased");
    rig.release(session(2), grant.lease);
    rig.advance(3_000);
    assert_eq!(rig.read(1), "leased");
    end(rig);
}

#[test]
fn a_block_that_is_being_evicted_stays_if_somebody_wants_it_meanwhile() {
    let mut rig = Rig::new(Setup::default());
    rig.put_all(0..16);
    rig.hold_store = true;
    let put = rig.ask(session(1), Rig::put_op(20, A, false));
    rig.settle();
    assert!(rig.report().in_flight > 0, "a victim is being written");
    let leases: Vec<_> = (0..16).map(|n| rig.lease(session(2), n)).collect();
    rig.hold_store = false;
    rig.settle();
    for n in 0..16 {
        assert!(rig.tiers(n).contains(&Tier::Host), "block {n} is read");
    }
    for grant in leases {
        rig.release(session(2), grant.lease);
    }
    rig.wait(put);
    end(rig);
}

#[test]
fn high_priority_leaves_last() {
    let mut rig = Rig::new(Setup::without_disk());
    let keep = Keep { priority: Priority::High, ..Keep::default() };
    let op = Op::Put { key: key(1), binding: A, source: 0, bytes: SMALL, keep, durable: false, after: None };
    rig.get(session(1), op);
    rig.put_all(10..60);
    assert_eq!(rig.read(1), "leased");
    end(rig);
}

#[test]
fn a_catalog_that_is_full_of_blocks_says_which_limit_to_raise() {
    let mut rig = Rig::new(Setup { entries_max: 8, regions: 4, ..Setup::without_disk() });
    let answers: Vec<_> = (0..24).map(|n| rig.put(n)).collect();
    assert!(answers.iter().any(|answer| answer == "HostFull"), "{answers:?}");
    let stored = answers.iter().filter(|answer| *answer == "stored").count();
    assert!(stored >= 8);
    let keys: Vec<BlockKey> = rig.list(100).iter().map(|block| block.key).collect();
    assert_eq!(keys.len(), stored);
    end(rig);
}

/// Memory of 20 regions, of which the first is there: 8 small blocks.
fn growing() -> Setup {
    Setup { regions: 20, grows: true, ..Setup::default() }
}

#[test]
fn while_memory_grows_whoever_finds_no_slot_waits_for_the_next_region_and_nobody_leaves() {
    let mut rig = Rig::new(growing());
    rig.send_down(50);
    rig.put_all(0..8);
    let report = rig.report();
    assert!(report.host_growing);
    assert_eq!((report.host_bytes_max, report.host_bytes_wanted), (2 << 20, 40 << 20));
    let put = rig.ask(session(1), Rig::put_op(8, A, false));
    let large = rig.ask(session(1), Rig::put_op(100, B_LARGE, false));
    let read = rig.ask(session(2), Rig::acquire_op(50));
    rig.settle();
    for id in [put, large, read] {
        assert!(rig.answer(id).is_none(), "it waits");
    }
    assert!(!rig.report().counters.evictions.contains_key("evicted_capacity"), "nobody leaves for it");
    assert!(rig.grow());
    assert_eq!(words(&rig.wait(put)), "stored");
    assert_eq!(words(&rig.wait(large)), "stored");
    let Reply::Leased(grant) = rig.wait(read) else { panic!("it came up") };
    rig.release(session(2), grant.lease);
    for n in 0..9 {
        assert_eq!(rig.tiers(n), [Tier::Host], "block {n}");
    }
    while rig.grow() {}
    let report = rig.report();
    assert_eq!((report.host_growing, report.host_bytes_max), (false, 40 << 20));
    end(rig);
}

#[test]
fn a_request_that_waits_for_memory_to_grow_ends_at_its_deadline() {
    let mut rig = Rig::new(growing());
    rig.put_all(0..8);
    let put = rig.ask(session(1), Rig::put_op(8, A, false));
    let leaves = rig.ask(session(3), Rig::put_op(9, A, false));
    rig.close(session(3));
    assert_eq!(words(&rig.answer(leaves).unwrap()), "UnknownSession");
    rig.advance(DEADLINE_MS);
    assert_eq!(words(&rig.answer(put).unwrap()), "DeadlinePassed");
    assert!(rig.grow());
    assert_eq!(rig.put(8), "stored");
    end(rig);
}

#[test]
fn memory_that_stays_small_is_used_as_it_is() {
    let mut rig = Rig::new(Setup { disk: None, ..growing() });
    rig.put_all(0..8);
    let put = rig.ask(session(1), Rig::put_op(8, A, false));
    rig.settle();
    assert!(rig.answer(put).is_none());
    rig.tell(Event::GrowthEnded);
    assert_eq!(words(&rig.wait(put)), "stored");
    assert_eq!(rig.read(0), "evicted_capacity");
    let report = rig.report();
    assert_eq!((report.host_growing, report.host_bytes_max), (false, 2 << 20));
    end(rig);
}

#[test]
fn a_crash_while_memory_grows_loses_no_block() {
    let mut rig = Rig::new(growing());
    rig.put_all(0..8);
    assert!(rig.grow());
    rig.put_all(8..20);
    rig.crash(1, |_| {});
    rig.settle();
    for n in 0..20 {
        assert_eq!(rig.read(n), "leased", "block {n}");
    }
    assert!(rig.report().host_growing);
    while rig.grow() {}
    rig.put_all(20..120);
    assert_eq!(rig.report().host_bytes_max, 40 << 20);
    end(rig);
}
