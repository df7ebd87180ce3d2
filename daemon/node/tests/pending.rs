//! A block that is not there yet, and everything that may happen to it: each state against each event.
//!
//! ```text
//!   Announced    reserved by session 1, nothing came yet
//!   Filling      put by session 1, its bytes are being copied
//!   Onboarding   wanted by session 3, being read from disk
//!   Fetching     wanted by session 3, on its way from a peer
//! ```

mod rig;

use kv_block::{MissReason, SessionId, Tier};
use kv_node::{Op, Reach};
use kv_tiers::memory::StoreFault;
use kv_tiers::store::StoreError;
use rig::{A, Rig, Setup, key, session, words};

#[derive(Clone, Copy, PartialEq, Debug)]
enum State {
    Announced,
    Filling,
    Onboarding,
    Fetching,
}

/// What is asked; the sessions are 1, whose block it is, and 2, a stranger.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Event {
    Put,
    DurablePut,
    OwnPut,
    Reserve,
    Commit,
    OwnCommit,
    Abort,
    OwnAbort,
    AcquireNow,
    Acquire,
    Prefetch,
    Lookup,
    Pin,
    Evict,
    Purge,
    OwnerCloses,
    StrangerCloses,
    TimePasses,
}

/// How the block then ends.
#[derive(Clone, Copy, PartialEq, Debug)]
enum End {
    Comes,
    Fails,
}

/// What an event is answered at once (`-`: nothing yet), and in the end when the block comes, when it fails.
/// A last word says what a reader finds then, in both cases.
type Row = (Event, &'static str, [&'static str; 2], [&'static str; 2]);

const ANNOUNCED: [Row; 18] = [
    (Event::Put, "AlreadyReserved", ["", ""], ["leased", "never_stored"]),
    (Event::DurablePut, "AlreadyReserved", ["", ""], ["leased", "never_stored"]),
    // A put by the session that announced the block is its commit.
    (Event::OwnPut, "stored", ["", ""], ["leased", "leased"]),
    (Event::Reserve, "there", ["", ""], ["leased", "never_stored"]),
    (Event::Commit, "NotReserved", ["", ""], ["leased", "never_stored"]),
    (Event::OwnCommit, "stored", ["", ""], ["leased", "leased"]),
    (Event::Abort, "NotReserved", ["", ""], ["leased", "never_stored"]),
    (Event::OwnAbort, "1/0/0", ["", ""], ["never_stored", "never_stored"]),
    (Event::AcquireNow, "not_complete", ["", ""], ["leased", "never_stored"]),
    (Event::Acquire, "-", ["leased", "not_complete"], ["leased", "never_stored"]),
    (Event::Prefetch, "0/0/1", ["", ""], ["leased", "never_stored"]),
    (Event::Lookup, "not_complete", ["", ""], ["leased", "never_stored"]),
    (Event::Pin, "0/0/1", ["", ""], ["leased", "never_stored"]),
    (Event::Evict, "0/0/1", ["", ""], ["leased", "never_stored"]),
    (Event::Purge, "finished 0 failed 0", ["", ""], ["leased", "never_stored"]),
    (Event::OwnerCloses, "", ["", ""], ["never_stored", "never_stored"]),
    (Event::StrangerCloses, "", ["", ""], ["leased", "never_stored"]),
    (Event::TimePasses, "", ["", ""], ["never_stored", "never_stored"]),
];

const FILLING: [Row; 18] = [
    (Event::Put, "-", ["already", "stored"], ["leased", "leased"]),
    (Event::DurablePut, "-", ["stored", "stored"], ["leased", "leased"]),
    (Event::OwnPut, "-", ["already", "stored"], ["leased", "leased"]),
    (Event::Reserve, "there", ["", ""], ["leased", "never_stored"]),
    (Event::Commit, "NotReserved", ["", ""], ["leased", "never_stored"]),
    (Event::OwnCommit, "NotReserved", ["", ""], ["leased", "never_stored"]),
    (Event::Abort, "NotReserved", ["", ""], ["leased", "never_stored"]),
    (Event::OwnAbort, "NotReserved", ["", ""], ["leased", "never_stored"]),
    (Event::AcquireNow, "not_complete", ["", ""], ["leased", "never_stored"]),
    (Event::Acquire, "-", ["leased", "not_complete"], ["leased", "never_stored"]),
    (Event::Prefetch, "0/0/1", ["", ""], ["leased", "never_stored"]),
    (Event::Lookup, "not_complete", ["", ""], ["leased", "never_stored"]),
    (Event::Pin, "0/0/1", ["", ""], ["leased", "never_stored"]),
    (Event::Evict, "0/0/1", ["", ""], ["leased", "never_stored"]),
    (Event::Purge, "finished 0 failed 0", ["", ""], ["leased", "never_stored"]),
    // The copy goes on: its bytes are there already.
    (Event::OwnerCloses, "", ["", ""], ["leased", "never_stored"]),
    (Event::StrangerCloses, "", ["", ""], ["leased", "never_stored"]),
    (Event::TimePasses, "", ["", ""], ["leased", "never_stored"]),
];

const ONBOARDING: [Row; 18] = [
    (Event::Put, "-", ["already", "stored"], ["leased", "leased"]),
    (Event::DurablePut, "-", ["already", "stored"], ["leased", "leased"]),
    (Event::OwnPut, "-", ["already", "stored"], ["leased", "leased"]),
    (Event::Reserve, "there", ["", ""], ["leased", "leased"]),
    (Event::Commit, "NotReserved", ["", ""], ["leased", "leased"]),
    (Event::OwnCommit, "NotReserved", ["", ""], ["leased", "leased"]),
    (Event::Abort, "NotReserved", ["", ""], ["leased", "leased"]),
    (Event::OwnAbort, "NotReserved", ["", ""], ["leased", "leased"]),
    (Event::AcquireNow, "tier_timeout", ["", ""], ["leased", "leased"]),
    (Event::Acquire, "-", ["leased", "tier_degraded"], ["leased", "leased"]),
    (Event::Prefetch, "1/0/0", ["", ""], ["leased", "leased"]),
    (Event::Lookup, "disk", ["", ""], ["leased", "leased"]),
    (Event::Pin, "1/0/0", ["", ""], ["leased", "leased"]),
    (Event::Evict, "0/1/0", ["", ""], ["leased", "leased"]),
    (Event::Purge, "finished 0 failed 1", ["", ""], ["leased", "leased"]),
    (Event::OwnerCloses, "", ["", ""], ["leased", "leased"]),
    (Event::StrangerCloses, "", ["", ""], ["leased", "leased"]),
    (Event::TimePasses, "", ["", ""], ["leased", "leased"]),
];

/// Whoever stores the block meanwhile takes over: its own bytes are the surer ones.
const FETCHING: [Row; 18] = [
    (Event::Put, "stored", ["", ""], ["leased", "leased"]),
    (Event::DurablePut, "-", ["stored", "stored"], ["leased", "leased"]),
    (Event::OwnPut, "stored", ["", ""], ["leased", "leased"]),
    (Event::Reserve, "reserved", ["", ""], ["never_stored", "never_stored"]),
    (Event::Commit, "NotReserved", ["", ""], ["leased", "never_stored"]),
    (Event::OwnCommit, "NotReserved", ["", ""], ["leased", "never_stored"]),
    (Event::Abort, "NotReserved", ["", ""], ["leased", "never_stored"]),
    (Event::OwnAbort, "NotReserved", ["", ""], ["leased", "never_stored"]),
    (Event::AcquireNow, "not_complete", ["", ""], ["leased", "never_stored"]),
    (Event::Acquire, "-", ["leased", "peer_evicted"], ["leased", "never_stored"]),
    (Event::Prefetch, "0/0/1", ["", ""], ["leased", "never_stored"]),
    (Event::Lookup, "not_complete", ["", ""], ["leased", "never_stored"]),
    (Event::Pin, "0/0/1", ["", ""], ["leased", "never_stored"]),
    (Event::Evict, "0/0/1", ["", ""], ["leased", "never_stored"]),
    (Event::Purge, "finished 0 failed 0", ["", ""], ["leased", "never_stored"]),
    (Event::OwnerCloses, "", ["", ""], ["leased", "never_stored"]),
    (Event::StrangerCloses, "", ["", ""], ["leased", "never_stored"]),
    (Event::TimePasses, "", ["", ""], ["leased", "never_stored"]),
];

/// A block in that state; the request that will end it, if that is one.
fn in_state(rig: &mut Rig, state: State, end: End) -> Option<u64> {
    match state {
        State::Announced => {
            rig.get(session(1), Rig::reserve_op(1, false));
            None
        }
        State::Filling => {
            rig.hold_fills = true;
            let Op::Put { key, binding, bytes, keep, durable, .. } = Rig::put_op(1, A, false) else {
                unreachable!("a put is a put")
            };
            let source = if end == End::Fails { rig::GONE } else { 0 };
            Some(rig.ask(session(1), Op::Put { key, binding, source, bytes, keep, durable, after: None }))
        }
        State::Onboarding => {
            rig.send_down(1);
            if end == End::Fails {
                let errno = StoreError::Io { operation: "read", segment: 0, errno: 5 };
                rig.store().inject(1, StoreFault::Fail(errno));
            }
            rig.hold_store = true;
            Some(rig.ask(session(3), Rig::acquire_op(1)))
        }
        State::Fetching => {
            let asked = rig.ask(session(3), Rig::fetch_op(1));
            rig.offer(1, Rig::peer_record(1, A));
            Some(asked)
        }
    }
}

fn happens(rig: &mut Rig, event: Event) -> Option<u64> {
    let (own, other) = (session(1), session(2));
    let keys = vec![key(1)];
    let until = rig.now.micros.plus_ms(100);
    let (of, op) = match event {
        Event::Put => (other, Rig::put_op(1, A, false)),
        Event::DurablePut => (other, Rig::put_op(1, A, true)),
        Event::OwnPut => (own, Rig::put_op(1, A, false)),
        Event::Reserve => (other, Rig::reserve_op(1, false)),
        Event::Commit => (other, Rig::commit_op(1)),
        Event::OwnCommit => (own, Rig::commit_op(1)),
        Event::Abort => (other, Op::Abort { key: key(1) }),
        Event::OwnAbort => (own, Op::Abort { key: key(1) }),
        Event::AcquireNow => {
            (other, Op::Acquire { key: key(1), wait: false, reach: Reach::Here, after: None })
        }
        Event::Acquire => (other, Rig::acquire_op(1)),
        Event::Prefetch => (other, Op::Prefetch { steps: rig::path(1..2), reach: Reach::Here }),
        Event::Lookup => (other, Op::Lookup { keys, all: true }),
        Event::Pin => (other, Op::Pin { keys, until }),
        Event::Evict => (other, Op::Evict { keys, tier: None, dry_run: false }),
        Event::Purge => {
            (SessionId(0), Op::Purge { filter: kv_node::Filter::default(), tier: None, dry_run: false })
        }
        Event::OwnerCloses => {
            rig.close(own);
            return None;
        }
        Event::StrangerCloses => {
            rig.close(other);
            return None;
        }
        Event::TimePasses => {
            rig.advance(600);
            return None;
        }
    };
    let id = rig.ask(of, op);
    if event == Event::Purge {
        rig.settle();
    }
    Some(id)
}

fn ends(rig: &mut Rig, state: State, end: End) {
    match (state, end) {
        (State::Announced, End::Comes) => drop(rig.ask(session(1), Rig::commit_op(1))),
        (State::Announced, End::Fails) => drop(rig.ask(session(1), Op::Abort { key: key(1) })),
        (State::Filling, _) => rig.fill_held(),
        (State::Onboarding, _) => rig.hold_store = false,
        // Somebody took over.
        (State::Fetching, _) if rig.searches.is_empty() => {}
        (State::Fetching, End::Comes) => rig.land(1),
        (State::Fetching, End::Fails) => rig.lose(1, MissReason::PeerEvicted),
    }
    rig.settle();
}

#[test]
fn every_state_of_a_pending_block_meets_every_event() {
    let tables = [
        (State::Announced, ANNOUNCED),
        (State::Filling, FILLING),
        (State::Onboarding, ONBOARDING),
        (State::Fetching, FETCHING),
    ];
    for (state, rows) in tables {
        for (event, at_once, last, found) in rows {
            for (at, end) in [End::Comes, End::Fails].into_iter().enumerate() {
                let mut rig = Rig::new(Setup::default());
                in_state(&mut rig, state, end);
                let asked = happens(&mut rig, event);
                let answer = |rig: &mut Rig| asked.and_then(|id| rig.answer(id)).map(|reply| words(&reply));
                let first = answer(&mut rig);
                let case = format!("{state:?}, {event:?}, {end:?}");
                let wanted = if asked.is_none() { None } else { Some(at_once).filter(|word| *word != "-") };
                assert_eq!(first.as_deref(), wanted, "{case}, at once");
                rig.check_books();
                ends(&mut rig, state, end);
                let second = answer(&mut rig);
                assert_eq!(second.as_deref(), Some(last[at]).filter(|word| !word.is_empty()), "{case}, last");
                rig.finish();
                rig.check_books();
                if event == Event::OwnerCloses {
                    rig.open(session(1));
                }
                assert_eq!(rig.read(1), found[at], "{case}, then");
                assert!(rig.tiers(1).iter().all(|tier| matches!(tier, Tier::Host | Tier::Disk)));
            }
        }
    }
}
