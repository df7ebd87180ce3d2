//! Random histories of a shard against what is known to be right: no wrong byte, every request answered once
//! and in time, everything that is counted equal to what is there, durable blocks found after a crash. The
//! rig checks all of that at every step; here is only what may happen.

mod rig;

use std::collections::BTreeSet;
use std::time::Duration;

use kv_block::{LeaseId, Priority, Tier};
use kv_node::{Event, Filter, Keep, Micros, ObjectConfig, Op, Reach, Reply};
use kv_tiers::admit::AdmissionKind;
use kv_tiers::memory::{MemoryConfig, StoreFault};
use kv_tiers::store::StoreError;
use kv_tiers::upload::UploadLimits;
use proptest::prelude::*;
use rig::{A, B, B_LARGE, GONE, LARGE, Rig, SMALL, Setup, key, path, session};

#[derive(Clone, Debug)]
enum Step {
    Put {
        of: u64,
        n: u64,
        source: u64,
        durable: bool,
        high: bool,
        ttl: u32,
    },
    Reserve {
        of: u64,
        n: u64,
        in_place: bool,
    },
    Commit {
        of: u64,
        n: u64,
        durable: bool,
    },
    Abort {
        of: u64,
        n: u64,
    },
    Acquire {
        of: u64,
        n: u64,
        wait: bool,
        deadline_ms: u64,
    },
    Release {
        of: u64,
        nth: usize,
    },
    Lookup {
        n: u64,
    },
    Prefetch {
        n: u64,
    },
    Pin {
        n: u64,
        ms: u64,
    },
    Unpin {
        n: u64,
    },
    Evict {
        n: u64,
        tier: Option<Tier>,
    },
    Purge {
        tier: Option<Tier>,
    },
    Verify {
        disk: bool,
    },
    Reopen {
        of: u64,
    },
    Quota {
        blocks: u64,
    },
    Serving {
        serving: bool,
    },
    Fault {
        nth: u64,
        kind: u8,
    },
    DamageHost {
        n: u64,
    },
    DamageDisk {
        n: u64,
    },
    HoldStore {
        on: bool,
    },
    HoldFills {
        on: bool,
    },
    Advance {
        ms: u64,
    },
    /// A peer answers the nth search that runs: offers, sends the bytes, or loses the block.
    Peer {
        nth: usize,
        kind: u8,
    },
    Poll,
    Settle,
    HoldUploads {
        on: bool,
    },
    Upload {
        how: u8,
    },
    Crash {
        seed: u64,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let n = || 0u64..24;
    let of = || 1u64..4;
    let tier = || prop_oneof![Just(None), Just(Some(Tier::Host)), Just(Some(Tier::Disk))];
    let put = (of(), n(), any::<[bool; 3]>(), 0u32..12).prop_map(|(of, n, [gone, durable, high], ttl)| {
        let source = if gone && n % 5 == 0 { GONE } else { 0 };
        Step::Put { of, n, source, durable, high, ttl: if ttl > 3 { 0 } else { ttl } }
    });
    let acquire = (of(), n(), any::<bool>(), 1u64..200)
        .prop_map(|(of, n, wait, deadline_ms)| Step::Acquire { of, n, wait, deadline_ms });
    let step = prop_oneof![
        12 => put,
        4 => (of(), n(), any::<bool>()).prop_map(|(of, n, in_place)| Step::Reserve { of, n, in_place }),
        4 => (of(), n(), any::<bool>()).prop_map(|(of, n, durable)| Step::Commit { of, n, durable }),
        1 => (of(), n()).prop_map(|(of, n)| Step::Abort { of, n }),
        12 => acquire,
        8 => (of(), 0usize..8).prop_map(|(of, nth)| Step::Release { of, nth }),
        2 => n().prop_map(|n| Step::Lookup { n }),
        2 => n().prop_map(|n| Step::Prefetch { n }),
        2 => (n(), 1u64..2000).prop_map(|(n, ms)| Step::Pin { n, ms }),
        1 => n().prop_map(|n| Step::Unpin { n }),
        3 => (n(), tier()).prop_map(|(n, tier)| Step::Evict { n, tier }),
        1 => tier().prop_map(|tier| Step::Purge { tier }),
        1 => any::<bool>().prop_map(|disk| Step::Verify { disk }),
        1 => of().prop_map(|of| Step::Reopen { of }),
        1 => (0u64..8).prop_map(|blocks| Step::Quota { blocks }),
        1 => any::<bool>().prop_map(|serving| Step::Serving { serving }),
        3 => (1u64..6, 0u8..6).prop_map(|(nth, kind)| Step::Fault { nth, kind }),
        1 => n().prop_map(|n| Step::DamageHost { n }),
        1 => n().prop_map(|n| Step::DamageDisk { n }),
        2 => any::<bool>().prop_map(|on| Step::HoldStore { on }),
        2 => any::<bool>().prop_map(|on| Step::HoldFills { on }),
        3 => (1u64..700).prop_map(|ms| Step::Advance { ms }),
        8 => (0usize..4, 0u8..8).prop_map(|(nth, kind)| Step::Peer { nth, kind }),
        4 => Just(Step::Poll),
        4 => Just(Step::Settle),
        2 => any::<bool>().prop_map(|on| Step::HoldUploads { on }),
        3 => (0u8..4).prop_map(|how| Step::Upload { how }),
        1 => any::<u64>().prop_map(|seed| Step::Crash { seed }),
    ];
    proptest::collection::vec(step, 1..100)
}

/// Every other one looks among the peers as well.
fn reach(n: u64) -> Reach {
    if n.is_multiple_of(2) { Reach::Further { hint: None } } else { Reach::Here }
}

/// All of them are said to be one prefix.
fn before(n: u64) -> Option<kv_block::BlockKey> {
    n.checked_sub(1).map(key)
}

/// Blocks 0 to 11 are small ones of tenant a, 12 to 19 of tenant b, the rest large.
fn binding_of(n: u64) -> (kv_block::BindingId, u32) {
    match n {
        0..12 => (A, SMALL),
        12..20 => (B, SMALL),
        _ => (B_LARGE, LARGE),
    }
}

struct World {
    rig: Rig,
    lent: std::collections::BTreeMap<u64, (u64, kv_node::Grant)>,
    damaged: BTreeSet<u64>,
}

impl World {
    fn step(&mut self, step: &Step) {
        let rig = &mut self.rig;
        match *step {
            Step::Put { of, n, source, durable, high, ttl } => {
                let (binding, bytes) = binding_of(n);
                let priority = if high { Priority::High } else { Priority::Normal };
                let expires_at = if ttl == 0 { 0 } else { rig.now.unix + ttl };
                let keep = Keep { priority, expires_at };
                rig.ask(
                    session(of),
                    Op::Put { key: key(n), binding, source, bytes, keep, durable, after: before(n) },
                );
            }
            Step::Reserve { of, n, in_place } => {
                let (binding, _) = binding_of(n);
                let op =
                    Op::Reserve { key: key(n), binding, keep: Keep::default(), in_place, after: before(n) };
                let id = rig.ask(session(of), op);
                if let Some(Reply::Reserved { slot: Some(grant) }) = rig.answer(id) {
                    self.lent.insert(n, (of, grant));
                }
            }
            Step::Commit { of, n, durable } => {
                let op = match self.lent.remove(&n) {
                    Some((by, grant)) if by == of => {
                        // The slot may be another's by now: a trusted worker's hazard keeps it, here nobody
                        // writes unless the reservation stands.
                        let pending = rig
                            .inspect(key(n))
                            .is_some_and(|report| report.state == kv_node::BlockState::Pending);
                        let lent = rig.slab().header(grant.slot).is_some_and(|header| {
                            header.generation == grant.generation
                                && header.state == kv_arena::SlotState::Filling
                        });
                        if !pending || !lent {
                            return;
                        }
                        let checksum = rig.fill_in_place(&key(n), &grant);
                        let (slot, generation) = (grant.slot, grant.generation);
                        Op::CommitInPlace { key: key(n), slot, generation, checksum, durable }
                    }
                    _ => Op::Commit { key: key(n), source: 0, bytes: binding_of(n).1, durable },
                };
                rig.ask(session(of), op);
            }
            Step::Abort { of, n } => {
                rig.ask(session(of), Op::Abort { key: key(n) });
            }
            Step::Acquire { of, n, wait, deadline_ms } => {
                let deadline = rig.now.micros.plus_ms(deadline_ms);
                rig.ask_until(
                    session(of),
                    deadline,
                    Op::Acquire { key: key(n), wait, reach: reach(deadline_ms), after: before(n) },
                );
            }
            Step::Peer { nth, kind } => {
                let Some(n) = rig.searches.values().nth(nth).and_then(|of| (0..24).find(|n| key(*n) == *of))
                else {
                    return;
                };
                let (binding, _) = binding_of(n);
                let record = Rig::peer_record(n, binding);
                let landing = rig.is_landing(n);
                match kind {
                    0..5 if landing => rig.land(n),
                    0..4 => rig.offer(n, record),
                    4 => rig.offer(n, kv_block::Record { tag: kv_block::BindingTag(999), ..record }),
                    5 if !landing => rig.offer(n, kv_block::Record { bytes: record.bytes / 2, ..record }),
                    _ => rig.lose(n, kv_block::MissReason::NeverStored),
                }
            }
            Step::Release { of, nth } => {
                let own: Vec<LeaseId> =
                    rig.leases.iter().filter(|(_, (by, ..))| *by == session(of)).map(|one| *one.0).collect();
                let lease = own.get(nth).copied().unwrap_or(LeaseId(u64::MAX));
                rig.ask(session(of), Op::Release { leases: vec![lease] });
            }
            Step::Lookup { n } => {
                let keys = (n..n + 3).map(key).collect();
                rig.ask(session(1), Op::Lookup { keys, all: n % 2 == 0 });
            }
            Step::Prefetch { n } => {
                rig.ask(session(1), Op::Prefetch { steps: path(n..n + 3), reach: reach(n) });
            }
            Step::Pin { n, ms } => {
                let until = rig.now.micros.plus_ms(ms);
                rig.ask(session(1), Op::Pin { keys: (n..n + 2).map(key).collect(), until });
            }
            Step::Unpin { n } => {
                rig.ask(session(1), Op::Unpin { keys: vec![key(n)] });
            }
            Step::Evict { n, tier } => {
                rig.ask(session(1), Op::Evict { keys: vec![key(n)], tier, dry_run: false });
            }
            Step::Purge { tier } => {
                let filter = Filter { tenant: Some("b".into()), ..Filter::default() };
                rig.ask(session(3), Op::Purge { filter, tier, dry_run: false });
            }
            Step::Verify { disk } => {
                rig.ask(session(3), Op::Verify { tier: if disk { Tier::Disk } else { Tier::Host } });
            }
            Step::Reopen { of } => {
                rig.close(session(of));
                self.lent.retain(|_, (by, _)| *by != of);
                rig.open(session(of));
            }
            Step::Quota { blocks } => {
                // Only while it is kept: a quota below what is there, or on its way with nobody waiting, is worked off by
                // puts alone.
                let bytes_max = blocks.checked_sub(1).map(|blocks| blocks * u64::from(SMALL));
                let report = rig.report();
                let held = report.tenants.iter().find(|one| one.tenant == "b").map_or(0, |b| b.host_bytes);
                let quiet = !rig.hold_fills && rig.unanswered() == 0 && report.pending == 0;
                let kept = bytes_max.is_none_or(|quota| held <= quota && quiet);
                if kept {
                    rig.tell(Event::Quota { tenant: "b".into(), bytes_max });
                }
            }
            Step::Serving { serving } => rig.tell(Event::StoreHealth { serving }),
            Step::Fault { nth, kind } => {
                let io = StoreError::Io { operation: "write", segment: 0, errno: 5 };
                let slow = StoreError::Slow { limit: Duration::from_secs(1) };
                let fault = match kind {
                    0 => StoreFault::Fail(io),
                    1 => StoreFault::Fail(slow),
                    2 => StoreFault::Fail(StoreError::Full),
                    3 => StoreFault::Corrupt,
                    4 => StoreFault::Delay { polls: 3 },
                    _ => StoreFault::Never,
                };
                rig.store().inject(nth, fault);
            }
            Step::DamageHost { n } => {
                let there = rig.inspect(key(n)).is_some_and(|report| report.host.is_some());
                // A block that is verified is trusted until it is verified again: damage shows after a crash.
                if there && !rig.leases.values().any(|(_, of, _)| *of == key(n)) {
                    rig.damage_host(key(n));
                    self.damaged.insert(n);
                    let seed = n;
                    self.crash(seed);
                }
            }
            Step::DamageDisk { n } => {
                if rig.inspect(key(n)).is_some_and(|report| report.disk.is_some()) {
                    rig.damage_disk(key(n));
                }
            }
            Step::HoldStore { on } => rig.hold_store = on,
            Step::HoldFills { on: true } => rig.hold_fills = true,
            Step::HoldFills { on: false } => rig.fill_held(),
            Step::Advance { ms } => rig.advance(ms),
            Step::Poll => {
                rig.poll();
                rig.tick();
            }
            Step::Settle => rig.settle(),
            Step::HoldUploads { on } => rig.hold_uploads = on,
            Step::Upload { how: 3 } => rig.lose_uploads(),
            Step::Upload { how } => rig.end_upload(how),
            Step::Crash { seed } => self.crash(seed),
        }
    }

    fn crash(&mut self, seed: u64) {
        self.lent.clear();
        self.rig.crash(seed, |_| {});
    }
}

fn run(steps: &[Step], admission: AdmissionKind, object: bool) {
    let store = MemoryConfig { segments: 6, segment_pages: 256, in_flight_max: 16 };
    let setup = Setup {
        regions: 3,
        disk: Some(admission),
        store,
        stalled_max: 4,
        leases_max: 6,
        offloads_max: 3,
        onboards_max: 3,
        survives: true,
        object: object.then(|| ObjectConfig {
            upload: UploadLimits {
                age_min: Duration::from_millis(300),
                life_min: Duration::from_secs(5),
                ..UploadLimits::default()
            },
            uploads_max: 2,
            fetch_limit_ms: 500,
        }),
        ..Setup::default()
    };
    let mut world = World { rig: Rig::new(setup), lent: Default::default(), damaged: BTreeSet::new() };
    for step in steps {
        world.step(step);
        world.rig.check_books();
    }
    world.rig.finish();
    world.rig.check_books();
    // In the end everything that is there can be read, or says why not.
    for n in 0..24 {
        let until = Micros(world.rig.now.micros.0 + 1_000_000);
        let id = world.rig.ask_until(
            session(2),
            until,
            Op::Acquire { key: key(n), wait: true, reach: Reach::Here, after: None },
        );
        if let Reply::Leased(grant) = world.rig.wait(id) {
            world.rig.ask(session(2), Op::Release { leases: vec![grant.lease] });
        }
    }
    world.rig.finish();
    world.rig.check_books();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn any_history_keeps_every_promise(steps in steps(), admission in 0..AdmissionKind::ALL.len(), object: bool) {
        run(&steps, AdmissionKind::ALL[admission], object);
    }
}
