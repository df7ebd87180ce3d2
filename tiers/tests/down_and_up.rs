//! A story over all of the crate: blocks fill the host, leave for the disk, come back, survive a restart,
//! and a damaged one is never served. The small node here does what `kv-node` does, with nothing else in it.

use std::collections::BTreeMap;
use std::time::Duration;

use kv_arena::{Geometry, HazardSet, Held, ShardMemory};
use kv_block::{
    BindingId, BindingTag, BlockKey, Checksum, DiskLocation, MissReason, Priority, Record, payload,
};
use kv_tiers::admit::{Admission, AdmissionKind};
use kv_tiers::budget::Budget;
use kv_tiers::catalog::{Catalog, Dropped, Lookup};
use kv_tiers::evict::PolicyKind;
use kv_tiers::host::{HostTier, Watermarks};
use kv_tiers::lifecycle::{Error, Filling};
use kv_tiers::memory::{MemoryConfig, MemoryStore};
use kv_tiers::offload::{DiskRoom, OnSegment, Standing, Victim, plan_offload, plan_reclaim};
use kv_tiers::onboard::{Join, Onboarding};
use kv_tiers::store::{BlockStore, OpToken, StoreDone, StoreError, StoreOp};

const BYTES: u32 = 64 << 10;
const BINDING: BindingId = BindingId(1);
/// Host memory for 64 blocks, disk for 112 and one segment for moves.
const REGIONS: u32 = 2;

struct Node {
    _memory: ShardMemory,
    catalog: Catalog,
    host: HostTier,
    store: MemoryStore,
    admission: Admission,
    onboarding: Onboarding<u32>,
    tokens: u64,
}

fn key(n: u64) -> BlockKey {
    BlockKey::from_halves([n.wrapping_mul(0x9e37_79b9_7f4a_7c15), n])
}

fn record_of(key: BlockKey, checksum: Checksum) -> Record {
    let (tag, priority) = (BindingTag(1), Priority::Normal);
    Record { key, checksum, bytes: BYTES, tag, priority, expires_at: 0 }
}

impl Node {
    fn new(kind: PolicyKind, store: MemoryStore) -> Self {
        let geometry = Geometry { regions: REGIONS, region_bytes: 2 << 20, table_entries_max: 1000 };
        let mut memory = ShardMemory::anonymous(geometry).unwrap();
        let table = memory.take_table().unwrap().unwrap();
        let budget = Budget::new(u64::from(BYTES) * 4, 4, Duration::from_millis(1));
        Self {
            catalog: Catalog::new(table, 300),
            host: HostTier::new(memory.slab().clone(), kind, Watermarks::default()),
            store,
            admission: Admission::new(AdmissionKind::All, 1000),
            onboarding: Onboarding::new(budget, 16),
            tokens: 0,
            _memory: memory,
        }
    }

    fn token(&mut self) -> OpToken {
        self.tokens += 1;
        OpToken(self.tokens)
    }

    /// Runs one operation to its end; answers what the store wants meanwhile.
    fn run(&mut self, op: StoreOp) -> StoreDone {
        let token = op.token();
        self.store.submit(op).expect("one at a time");
        let (mut all, mut own) = (Vec::new(), None);
        self.store.poll(&mut all);
        for done in all {
            match done {
                StoreDone::Reclaim { segment, entries } => self.reclaim(segment, &entries),
                done if done.token() == Some(token) => own = Some(done),
                done => panic!("nobody asked for {done:?}"),
            }
        }
        own.expect("this store answers at once")
    }

    fn reclaim(&mut self, segment: u32, entries: &[(Record, DiskLocation)]) {
        let catalog = &self.catalog;
        let plan = plan_reclaim(entries, u64::from(BYTES) * 4, |record, at| {
            let entry = catalog.find(&record.key).filter(|entry| entry.disk == Some(at))?;
            let (in_host, frequency) = (entry.host.is_some(), entry.frequency);
            Some(OnSegment { in_host, expired: false, frequency, pinned: false })
        });
        for (record, at) in plan.moves {
            let token = self.token();
            let StoreDone::Moved { result, .. } = self.run(StoreOp::Move { token, at, record }) else {
                panic!("not a move")
            };
            assert!(self.catalog.move_disk(&record.key, at, result.expect("room is kept for moves")));
            self.catalog.cool(&record.key);
        }
        for (record, _) in plan.drops {
            assert_ne!(self.catalog.drop_disk(&record.key, MissReason::EvictedReclaim), Dropped::Unchanged);
        }
        let token = self.token();
        let released = self.run(StoreOp::Release { token, segment });
        assert!(matches!(released, StoreDone::Released { result: Ok(()), .. }), "{released:?}");
    }

    /// Frees at least one slot, by way of the disk for what is admitted.
    fn make_room(&mut self) {
        let mut victims = Vec::new();
        for _ in 0..self.host.missing(BYTES, 0).max(1) {
            let Some((slot, generation)) = self.host.victim(BYTES, &mut |_| true) else { break };
            let record = self.host.slab().header(slot).unwrap().record;
            victims.push(Victim { slot, generation, record });
        }
        assert!(!victims.is_empty(), "nothing is held, so something can leave");
        let room = DiskRoom { bytes: u64::MAX, ops: 64, serving: true };
        let (catalog, admission) = (&self.catalog, &self.admission);
        let plan = plan_offload(victims, room, |victim| Standing {
            on_disk: catalog.find(&victim.record.key).is_some_and(|entry| entry.disk.is_some()),
            expired: false,
            admitted: admission.admits(&victim.record.key),
        });
        assert!(plan.over.is_empty());
        for victim in plan.write {
            self.write(&victim);
            self.leave(&victim);
        }
        for (victim, _) in plan.go {
            self.leave(&victim);
        }
        assert!(self.host.sweep(&HazardSet::new()) > 0);
    }

    fn write(&mut self, victim: &Victim) {
        for _ in 0..8 {
            let bytes = self.host.hold(victim.slot, victim.generation).unwrap();
            let (token, record) = (self.token(), victim.record);
            let done = self.run(StoreOp::Write { token, record, bytes });
            let StoreDone::Written { bytes, result, .. } = done else { panic!("not a write") };
            drop(bytes);
            match result {
                Ok(at) => {
                    assert!(self.catalog.add_disk(&record.key, at, record.checksum));
                    return;
                }
                // The answer to the reclaim that came with it has made room.
                Err(StoreError::Full) => {}
                Err(error) => panic!("{error}"),
            }
        }
        panic!("the disk stays full");
    }

    fn leave(&mut self, victim: &Victim) {
        assert!(self.host.retire(victim.slot, victim.generation));
        self.catalog.drop_host(&victim.record.key, MissReason::EvictedCapacity);
    }

    fn slot(&mut self) -> kv_arena::Slot {
        if let Some(slot) = self.host.take(BYTES) {
            return slot;
        }
        self.make_room();
        self.host.take(BYTES).expect("room was just made")
    }

    fn put(&mut self, n: u64) {
        let slot = self.slot();
        let mut filling = Filling::new(slot, record_of(key(n), Checksum::default())).unwrap();
        payload::fill(&key(n), filling.bytes_mut());
        self.publish(filling.seal_and_sum());
    }

    fn publish(&mut self, sealed: kv_tiers::lifecycle::Sealed) {
        let (block, published) = self.catalog.publish(sealed, BINDING).expect("room in the table");
        self.admission.seen(&block.record().key);
        self.host.insert(block.place().0, BYTES, Priority::Normal, published.returning);
    }

    /// Reads a block, from disk if need be. The bytes are checked to the last one.
    fn get(&mut self, n: u64) -> Result<(), MissReason> {
        let held = self.acquire(n)?;
        assert_eq!(payload::first_wrong_byte(&key(n), &held), None, "a wrong byte was served");
        self.host.touch(held.id());
        self.catalog.bump(&key(n));
        Ok(())
    }

    fn acquire(&mut self, n: u64) -> Result<Held, MissReason> {
        let entry = match self.catalog.lookup(&key(n), 0) {
            Lookup::Found(entry) => entry,
            Lookup::Miss(why) => return Err(why),
        };
        if let Some((slot, generation)) = entry.host {
            return Ok(self.host.hold(slot, generation).expect("the catalog names it"));
        }
        assert_eq!(self.onboarding.join(&key(n), BYTES, Some(1)), Join::Start);
        assert_eq!(self.onboarding.join(&key(n), BYTES, Some(2)), Join::Joined);
        let into = self.slot();
        // Making room may have cost the block its place on disk.
        let Some(at) = self.catalog.find(&key(n)).and_then(|entry| entry.disk) else {
            self.onboarding.finish(&key(n));
            return Err(MissReason::EvictedReclaim);
        };
        let (token, record) = (self.token(), record_of(key(n), entry.checksum));
        let StoreDone::Read { into, result, .. } = self.run(StoreOp::Read { token, at, record, into }) else {
            panic!("not a read")
        };
        assert_eq!(self.onboarding.finish(&key(n)), [1, 2]);
        if let Err(error) = result {
            assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
            self.catalog.drop_disk(&key(n), MissReason::Corrupt);
            return Err(MissReason::Corrupt);
        }
        let sealed = match Filling::new(into, record).and_then(Filling::seal_if_right) {
            Ok(sealed) => sealed,
            Err(Error::Corrupt { .. } | Error::TooLong { .. }) => panic!("the store had checked it"),
        };
        self.publish(sealed);
        let (slot, generation) =
            self.catalog.find(&key(n)).and_then(|entry| entry.host).expect("just published");
        Ok(self.host.hold(slot, generation).expect("just published"))
    }

    /// As after the loss of the machine: only the disk is left.
    fn restart(self, kind: PolicyKind) -> Self {
        let (store, found) = self.store.reopen(1);
        let mut node = Self::new(kind, store);
        for (record, at) in found {
            node.catalog.recover_disk(&record, BINDING, at).unwrap();
        }
        node
    }
}

fn disk() -> MemoryStore {
    MemoryStore::new(MemoryConfig { segments: 8, segment_pages: 256, in_flight_max: 8 })
}

#[test]
fn blocks_go_down_come_up_and_are_right_at_every_step() {
    for kind in PolicyKind::ALL {
        let mut node = Node::new(kind, disk());
        for n in 0..100 {
            node.put(n);
        }
        assert_eq!(node.catalog.counts().present, 100, "what left the host is on disk");
        assert!(node.catalog.counts().disk >= 36);
        for n in (0..100).rev() {
            assert_eq!(node.get(n), Ok(()), "block {n} under {kind}");
        }
        assert!(node.onboarding.is_empty() && node.onboarding.waiting() == 0);
    }
}

#[test]
fn both_tiers_together_are_bounded_and_every_miss_has_its_reason() {
    for kind in PolicyKind::ALL {
        let mut node = Node::new(kind, disk());
        let mut outcomes: BTreeMap<Result<(), &str>, u32> = BTreeMap::new();
        for n in 0..600 {
            node.put(n);
            // Old friends are asked for all the time, so reclaim moves them.
            for friend in 0..4.min(n) {
                assert_eq!(node.get(friend), Ok(()), "friend {friend} after {n} blocks under {kind}");
            }
        }
        for n in 0..600 {
            *outcomes.entry(node.get(n).map_err(MissReason::name)).or_default() += 1;
        }
        let counts = node.catalog.counts();
        assert!(counts.host <= 64 && counts.disk <= 128, "{counts:?}");
        assert!(outcomes[&Ok(())] >= 64, "{outcomes:?}");
        let known = [Ok(()), Err("evicted_reclaim"), Err("never_stored")];
        assert!(outcomes.keys().all(|outcome| known.contains(outcome)), "{outcomes:?}");
    }
}

#[test]
fn what_is_on_disk_survives_the_loss_of_memory() {
    let mut node = Node::new(PolicyKind::Sieve, disk());
    (0..100).for_each(|n| node.put(n));
    let on_disk: Vec<u64> =
        (0..100).filter(|n| node.catalog.find(&key(*n)).is_some_and(|entry| entry.disk.is_some())).collect();
    let mut node = node.restart(PolicyKind::Sieve);
    assert_eq!(node.catalog.counts().disk, on_disk.len() as u64);
    for n in 0..100 {
        let wanted = if on_disk.contains(&n) { Ok(()) } else { Err(MissReason::NeverStored) };
        assert_eq!(node.get(n), wanted, "block {n}");
    }
}

#[test]
fn a_damaged_block_is_quarantined_and_its_neighbours_are_served() {
    let mut node = Node::new(PolicyKind::Sieve, disk());
    (0..100).for_each(|n| node.put(n));
    let on_disk_alone = |node: &Node, n| {
        node.catalog.find(&key(n)).filter(|entry| entry.host.is_none()).and_then(|entry| entry.disk)
    };
    let at = on_disk_alone(&node, 3).expect("the first blocks have left the host");
    assert!(node.store.damage(at));
    assert_eq!(node.get(3), Err(MissReason::Corrupt));
    assert_eq!(node.get(3), Err(MissReason::Corrupt), "and it is remembered");
    assert_eq!(node.catalog.counts().quarantined, 1);
    assert_eq!((node.get(2), node.get(4)), (Ok(()), Ok(())));
    node.put(3);
    assert_eq!(node.get(3), Ok(()), "computed again");
    assert_eq!(node.catalog.counts().quarantined, 0);
}
