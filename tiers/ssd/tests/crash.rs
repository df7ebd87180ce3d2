//! Random histories with power cuts, kills, reordering and reclaim, against a map.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Found, MIB, Node, key, number, small};
use kv_block::{BlockKey, Record};
use kv_ssd::{SimDisk, SsdConfig, SyncMode};
use kv_tiers::store::{BlockStore, OpToken, StoreDone, StoreError, StoreOp};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Write {
        n: u64,
        bytes: u32,
    },
    Remove {
        n: u64,
    },
    Read {
        n: u64,
    },
    /// Let so many polls happen.
    Poll {
        times: u8,
    },
    /// Answer an offer; keep a block when its number is even.
    Reclaim,
    /// Begin to move everything out of an offered segment, poll so many times, lose power.
    CutWhileMoving {
        polls: u8,
    },
    PowerCut,
    Kill,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let n = 0..24u64;
    prop_oneof![
        12 => (n.clone(), 1..220_000u32).prop_map(|(n, bytes)| Step::Write { n, bytes }),
        4 => n.clone().prop_map(|n| Step::Remove { n }),
        4 => n.prop_map(|n| Step::Read { n }),
        6 => (1..20u8).prop_map(|times| Step::Poll { times }),
        3 => Just(Step::Reclaim),
        1 => (0..12u8).prop_map(|polls| Step::CutWhileMoving { polls }),
        1 => Just(Step::PowerCut),
        1 => Just(Step::Kill),
        1 => Just(Step::Restart),
    ]
}

/// What may be found of a key after a restart.
#[derive(Clone, Debug, Default)]
struct Model {
    /// What was acknowledged last.
    alive: Found,
    /// Removed, acknowledged, and nothing begun since: must not be there.
    removed: BTreeSet<BlockKey>,
    /// Under way, by token.
    writes: BTreeMap<OpToken, Record>,
    removals: BTreeMap<OpToken, BlockKey>,
    /// Keys with something under way or given up: may be there or not.
    open: BTreeSet<BlockKey>,
    /// Every record ever written.
    written: BTreeSet<(BlockKey, u32)>,
}

fn settle(node: &mut Node, model: &mut Model) {
    for (token, done) in std::mem::take(&mut node.done) {
        match done {
            StoreDone::Written { bytes, result, .. } => {
                let record = bytes.record();
                node.forget(bytes);
                assert_eq!(model.writes.remove(&token), Some(record));
                let other_under_way = model.writes.values().any(|other| other.key == record.key)
                    || model.removals.values().any(|other| *other == record.key);
                match result {
                    Ok(at) => {
                        model.alive.insert(record.key, (record, at));
                        if !other_under_way {
                            model.open.remove(&record.key);
                        }
                    }
                    Err(StoreError::Full) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            StoreDone::Removed { result, .. } => {
                let key = model.removals.remove(&token).expect("a removal of ours");
                match result {
                    Ok(()) => {
                        if !model.writes.values().any(|other| other.key == key) {
                            // Also what a write brought that was under way when the removal came.
                            model.alive.remove(&key);
                            model.removed.insert(key);
                            model.open.remove(&key);
                        }
                    }
                    Err(StoreError::Full) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            other => panic!("nobody asked for {other:?}"),
        }
    }
}

/// After a restart: everything acknowledged is there, nothing removed is, and all of it is right.
fn compare(node: &mut Node, model: &mut Model, found: Found) {
    let mut torn = Vec::new();
    for (key, (record, at)) in &found {
        assert!(model.written.contains(&(*key, record.bytes)), "{key} was never stored like that");
        assert!(!model.removed.contains(key), "block {} was removed and came back", number(key));
        let read = node.read(record, *at);
        if read.is_err() {
            torn.push(*key);
        }
        let acknowledged = model.alive.get(key).is_some_and(|(other, _)| other == record);
        // A write that was cut short may be named, and then its check fails.
        assert!(
            read.is_ok() || (!acknowledged || model.open.contains(key)),
            "block {}: {read:?}",
            number(key)
        );
    }
    for (key, (record, _)) in &model.alive {
        if !model.open.contains(key) {
            let there = found.get(key).is_some_and(|(other, _)| other == record);
            assert!(there, "block {} was acknowledged and is lost", number(key));
        }
    }
    model.alive = found;
    model.removed.clear();
    model.open.clear();
    for key in torn {
        model.alive.remove(&key);
        model.open.insert(key);
    }
    model.writes.clear();
    model.removals.clear();
}

fn run(seed: u64, reorder: bool, config: &SsdConfig, power_cuts: bool, steps: Vec<Step>) {
    let disk = SimDisk::new(seed);
    disk.reorder(reorder);
    let (mut node, _, _) = Node::simulated(config, &disk);
    let mut model = Model::default();
    for step in steps {
        match step {
            Step::Write { n, bytes } => {
                // Of two writes of one key at once either may be the later one: the node never does that.
                let busy = model.writes.values().any(|other| other.key == key(n));
                if busy || node.store.usage().in_flight >= 12 {
                    continue;
                }
                let block = node.block(n, bytes);
                let (record, token) = (block.record(), node.token());
                model.written.insert((record.key, record.bytes));
                model.open.insert(record.key);
                model.removed.remove(&record.key);
                model.writes.insert(token, record);
                node.submit(StoreOp::Write { token, record, bytes: block });
            }
            Step::Remove { n } => {
                let busy = model.removals.values().any(|other| *other == key(n));
                if let Some((_, at)) = model.alive.get(&key(n)).copied()
                    && !busy
                {
                    model.alive.remove(&key(n));
                    model.open.insert(key(n));
                    let token = node.begin_remove(key(n), at);
                    model.removals.insert(token, key(n));
                }
            }
            Step::Read { n } => {
                if let Some((record, at)) = model.alive.get(&key(n)).copied() {
                    let token = node.begin_read(&record, at);
                    let read = node.end_read(&record, token);
                    let open = model.open.contains(&key(n));
                    assert!(read.is_ok() || open, "block {n}: {read:?}");
                }
            }
            Step::Poll { times } => (0..times).for_each(|_| node.poll()),
            Step::Reclaim => {
                let before = model.alive.clone();
                // An old copy is not worth moving while a new one is on its way: it would become the newest.
                let busy: BTreeSet<_> = model.writes.values().map(|record| record.key).collect();
                node.reclaim(&mut model.alive, |key| number(key).is_multiple_of(2) && !busy.contains(key));
                // What was not worth keeping may come back: an older copy of it may lie elsewhere.
                model.open.extend(before.keys().filter(|key| !model.alive.contains_key(*key)));
            }
            Step::CutWhileMoving { .. } if !power_cuts || node.offers.is_empty() => {}
            Step::CutWhileMoving { .. } | Step::PowerCut | Step::Kill | Step::Restart => {
                settle(&mut node, &mut model);
                match step {
                    Step::CutWhileMoving { polls } => {
                        while node.store.usage().in_flight > 20 {
                            node.poll();
                        }
                        let (_, entries) = node.offers.remove(0);
                        for (record, at) in entries {
                            let busy = model.writes.values().any(|other| other.key == record.key);
                            let alive = model.alive.get(&record.key).is_some_and(|(_, place)| *place == at);
                            if alive && !busy {
                                node.begin_move(&record, at);
                            }
                        }
                        (0..polls).for_each(|_| node.poll());
                        node.done.retain(|_, done| !matches!(done, StoreDone::Moved { .. }));
                        settle(&mut node, &mut model);
                        disk.crash();
                    }
                    Step::PowerCut if power_cuts => disk.crash(),
                    Step::Restart => {
                        while node.store.usage().in_flight > 0 {
                            node.poll();
                        }
                        settle(&mut node, &mut model);
                    }
                    _ => disk.kill(),
                }
                drop(node);
                let (next, found, report) = Node::simulated(config, &disk);
                node = next;
                assert_eq!(report.segments_set_aside, 0, "{:?}", report.notes);
                compare(&mut node, &mut model, found);
            }
        }
        settle(&mut node, &mut model);
    }
    while node.store.usage().in_flight > 0 {
        node.poll();
    }
    settle(&mut node, &mut model);
    disk.crash();
    drop(node);
    let (mut node, found, _) = Node::simulated(config, &disk);
    if power_cuts {
        compare(&mut node, &mut model, found);
    }
}

/// Four segments: every history of some length meets reclaim.
fn tight() -> SsdConfig {
    SsdConfig { bytes_max: 4 * MIB, ..small() }
}

/// Histories per test; `KV_SSD_CASES` asks for more.
fn cases() -> u32 {
    std::env::var("KV_SSD_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(192)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_history_loses_or_falsifies_a_block(
        seed: u64, reorder: bool, steps in proptest::collection::vec(step(), 1..220)
    ) {
        run(seed, reorder, &tight(), true, steps);
    }

    #[test]
    fn without_syncs_the_end_of_the_process_loses_nothing(
        seed: u64, reorder: bool, steps in proptest::collection::vec(step(), 1..120)
    ) {
        let config = SsdConfig { sync: SyncMode::Never, ..tight() };
        run(seed, reorder, &config, false, steps);
    }
}

#[test]
fn removals_outlive_the_segments_that_they_stand_in() {
    // The removal of a block stands in a younger segment than the block; the younger one is emptied and
    // reused while the older one still holds the block's bytes.
    let disk = SimDisk::new(2);
    let config = small();
    let (mut node, mut alive, _) = Node::simulated(&config, &disk);
    // Segment 0: a block to be removed, and live ones that keep it from being chosen.
    for n in 0..14 {
        let (record, at) = node.write(n, 64 << 10).unwrap();
        alive.insert(record.key, (record, at));
    }
    let (_, at) = alive.remove(&key(0)).unwrap();
    assert_eq!(at.segment(), 0);
    let mut n = 100;
    while alive.values().filter(|(_, at)| at.segment() == 1).count() < 6 {
        let (record, at) = node.write(n, 64 << 10).unwrap();
        alive.insert(record.key, (record, at));
        n += 1;
    }
    node.remove(key(0), at).unwrap();
    // Everything else in the younger segments dies, so that they are chosen before segment 0.
    let mut carried = 0;
    for _ in 0..200 {
        match node.write(n, 64 << 10) {
            Ok((record, at)) => {
                if at.segment() == 0 {
                    alive.insert(record.key, (record, at));
                } else {
                    node.remove(record.key, at).unwrap();
                }
            }
            Err(StoreError::Full) => {
                for _ in 0..20 {
                    node.poll();
                }
                if let Some(place) = node.offers.iter().position(|(segment, _)| *segment != 0) {
                    let offer = node.offers.remove(place);
                    node.offers.insert(0, offer);
                }
                assert!(node.reclaim(&mut alive, |key| number(key) < 100), "something is offered");
                carried = node.store.stats().removals_carried;
            }
            Err(other) => panic!("{other}"),
        }
        n += 1;
        if carried > 0 && n % 16 == 0 {
            disk.kill();
            drop(node);
            let (next, found, _) = Node::simulated(&config, &disk);
            node = next;
            assert!(!found.contains_key(&key(0)), "the removed block came back");
            alive = found;
        }
    }
    assert!(carried > 0, "the test never carried a removal");
}

#[test]
fn a_move_that_loses_power_leaves_the_block_where_it_was_or_brings_it_over() {
    for seed in 0..48 {
        let disk = SimDisk::new(seed);
        disk.reorder(seed % 2 == 0);
        let (mut node, mut alive, _) = Node::simulated(&small(), &disk);
        let mut n = 0;
        while node.offers.is_empty() {
            let (record, at) = node.write(n, 60_000).unwrap();
            alive.insert(record.key, (record, at));
            n += 1;
            (0..4).for_each(|_| node.poll());
        }
        for (record, at) in node.offers.remove(0).1 {
            node.begin_move(&record, at);
        }
        (0..seed % 16).for_each(|_| node.poll());
        disk.crash();
        drop(node);
        let (mut node, found, _) = Node::simulated(&small(), &disk);
        assert_eq!(found.keys().collect::<Vec<_>>(), alive.keys().collect::<Vec<_>>(), "seed {seed}");
        for (record, at) in found.values() {
            assert_eq!(node.read(record, *at), Ok(()), "seed {seed}");
        }
    }
}

/// Writes under way spanned three segments when the process was killed; what was found then has to outlive a power cut.
#[test]
fn what_is_found_after_a_kill_is_there_after_a_power_cut() {
    use Step::{Kill, Poll, PowerCut, Restart};
    let write = |(n, bytes)| Step::Write { n, bytes };
    let mut steps = vec![write((0, 106_497)), write((1, 118_785)), Poll { times: 5 }];
    steps.extend([(2, 40_961), (3, 135_169)].map(write));
    steps.extend([Restart, PowerCut, PowerCut, PowerCut, PowerCut]);
    steps.extend([(0, 151_553), (8, 200_705), (12, 65_537), (13, 192_513), (1, 151_553)].map(write));
    steps.push(Poll { times: 1 });
    steps.extend([(2, 102_401), (3, 139_265), (4, 184_321), (5, 204_801), (6, 40_961)].map(write));
    steps.extend([Poll { times: 11 }, Kill, write((1, 1))]);
    run(15_580_928_788_452_465_487, true, &tight(), true, steps);
}
