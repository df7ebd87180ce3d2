//! Searches of the shards in the object tier, gathered into few requests.
//!
//! What comes within half a millisecond is read together, and what follows a block in its pack is asked for with it: its
//! shards are told to prefetch that, and what they want joins the others here. [`kv_object::gather`] decides both.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kv_arena::Slot;
use kv_block::{BlockKey, MissReason, Record, SessionId, ShardId};
use kv_node::{
    Event, FetchDone, FetchOp, FetchToken, Micros, OfferToken, Op, Origin, Reach, RequestId, Step,
};
use kv_object::gather::{Ahead, Gather, GatherLimits};
use kv_object::{Got, Tier, Want};
use kv_wire::message::Sight;
use tokio::sync::mpsc;
use tokio::time::sleep_until;

use super::{FetchOrder, Objects, Principal, principals_of, unix_now};
use crate::node::Node;
use crate::shard::Letter;

/// How often it is looked for searches that have waited too long for room.
const SWEEP: Duration = Duration::from_millis(250);
/// Searches taken in one turn.
const TURN_MAX: usize = 4096;

pub(super) struct Reads {
    node: Arc<Node>,
    objects: Objects,
    /// By shard.
    principals: Vec<usize>,
    /// Offered, and not answered.
    offered: HashMap<(ShardId, FetchToken), Offered>,
    ready: Gather<Ready>,
    /// By principal.
    ahead: Vec<Ahead>,
}

struct Offered {
    record: Record,
    deadline: Instant,
}

/// A block with room for it.
struct Ready {
    shard: ShardId,
    fetch: FetchToken,
    record: Record,
    deadline: Instant,
    into: Slot,
}

impl Reads {
    pub(super) fn new(node: &Arc<Node>, objects: &Objects) -> Self {
        Self {
            node: Arc::clone(node),
            objects: objects.clone(),
            principals: principals_of(node),
            offered: HashMap::new(),
            ready: Gather::new(GatherLimits::default()),
            ahead: objects.all().iter().map(|_| Ahead::default()).collect(),
        }
    }

    pub(super) async fn run(mut self, mut orders: mpsc::UnboundedReceiver<FetchOrder>) {
        let mut sweep = tokio::time::interval(SWEEP);
        loop {
            let due = self.ready.due_at();
            tokio::select! {
                order = orders.recv() => {
                    let Some(order) = order else { return };
                    let mut turn = vec![order];
                    while turn.len() < TURN_MAX && let Ok(order) = orders.try_recv() {
                        turn.push(order);
                    }
                    turn.into_iter().for_each(|order| self.take(order));
                }
                () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {}
                _ = sweep.tick(), if !self.offered.is_empty() => self.end_late(Instant::now()),
            }
            let ready = self.ready.take(Instant::now());
            self.read(ready);
        }
    }

    /// Ends what waits for room in host memory beyond its time.
    fn end_late(&mut self, now: Instant) {
        let late: Vec<_> = self.offered.extract_if(|_, offered| offered.deadline <= now).collect();
        for ((shard, fetch), _) in late {
            self.tell(shard, FetchDone::Missed { fetch, reason: MissReason::TierTimeout });
        }
    }

    fn take(&mut self, (shard, op, deadline): FetchOrder) {
        match op {
            FetchOp::Find { fetch, key, .. } => self.find(shard, fetch, key, deadline),
            FetchOp::Into { fetch, into, .. } => {
                // One that is not known was left meanwhile, and its slot goes back.
                let Some(Offered { record, deadline }) = self.offered.remove(&(shard, fetch)) else { return };
                let ready = Ready { shard, fetch, record, deadline, into };
                self.ready.add(Instant::now(), ready, record.bytes);
            }
            FetchOp::Decline { fetch, reason, .. } => {
                self.offered.remove(&(shard, fetch));
                self.tell(shard, FetchDone::Missed { fetch, reason });
            }
            FetchOp::Leave { fetch } => {
                self.offered.remove(&(shard, fetch));
                // What is being read comes back all the same, and nobody waits for it.
                self.ready.retain(|one| (one.shard, one.fetch) != (shard, fetch));
            }
        }
    }

    fn find(&mut self, shard: ShardId, fetch: FetchToken, key: BlockKey, deadline: Instant) {
        let number = self.principals[usize::from(shard.0)];
        let Some(tier) = self.objects.of(number).and_then(|principal| principal.tier()) else {
            return self.tell(shard, FetchDone::Missed { fetch, reason: MissReason::TierDegraded });
        };
        let now = unix_now();
        let found = tier.find(now, &[key]).pop().unwrap_or(Err(MissReason::NeverStored));
        let record = match found {
            Ok(record) => record,
            Err(reason) => return self.tell(shard, FetchDone::Missed { fetch, reason }),
        };
        let ttl_s = if record.expires_at == 0 { 0 } else { record.expires_at.saturating_sub(now).max(1) };
        self.offered.insert((shard, fetch), Offered { record, deadline });
        // One offer a search: there is nobody else who could make another.
        let offer = OfferToken(fetch.0);
        self.tell(shard, FetchDone::Offered { fetch, offer, record, ttl_s });
        self.look_ahead(number, &tier, now, &key);
    }

    /// Has what follows a block in its prefix fetched as well.
    fn look_ahead(&mut self, principal: usize, tier: &Tier, now: u32, key: &BlockKey) {
        let Self { node, ahead, .. } = self;
        let view = node.of(principal);
        let behind = || tier.ahead(now, key).into_iter().map(|(key, _)| key).collect();
        let is_absent =
            |keys: &[BlockKey]| view.sights(keys).iter().map(|(sight, _)| *sight == Sight::Absent).collect();
        let keys = ahead[principal].with(key, behind, is_absent);
        let mut by_shard: HashMap<ShardId, Vec<BlockKey>> = HashMap::new();
        // None of them is anywhere here: each comes to its home.
        for key in keys {
            by_shard.entry(view.home(&key).id).or_default().push(key);
        }
        for (shard, keys) in by_shard {
            let from = Origin { session: SessionId(0), request: RequestId(0) };
            let steps = keys.into_iter().map(|key| Step { key, after: None }).collect();
            let op = Op::Prefetch { steps, reach: Reach::Object };
            let letter = Letter::Tell(Event::Request { from, deadline: Micros::NEVER, op });
            // A shard that is that busy has no time for guesses.
            if let Some(shard) = self.node.shard(shard) {
                let _ = shard.post(letter);
            }
        }
    }

    /// Reads what was gathered, each request by itself.
    fn read(&self, ready: Vec<Ready>) {
        let mut by_principal: Vec<Vec<Ready>> = self.objects.all().iter().map(|_| Vec::new()).collect();
        for one in ready {
            by_principal[self.principals[usize::from(one.shard.0)]].push(one);
        }
        for (number, ready) in by_principal.into_iter().enumerate() {
            let Some(principal) = self.objects.of(number).filter(|_| !ready.is_empty()) else { continue };
            let Some(tier) = principal.tier() else {
                for one in ready {
                    self.tell(
                        one.shard,
                        FetchDone::Missed { fetch: one.fetch, reason: MissReason::TierDegraded },
                    );
                }
                continue;
            };
            let keys: Vec<BlockKey> = ready.iter().map(|one| one.record.key).collect();
            let mut ready: Vec<Option<Ready>> = ready.into_iter().map(Some).collect();
            for group in tier.spread(unix_now(), &keys) {
                let blocks = group.into_iter().filter_map(|at| ready[at].take()).collect();
                let (node, principal) = (Arc::clone(&self.node), Arc::clone(principal));
                tokio::spawn(read(node, principal, Arc::clone(&tier), blocks));
            }
        }
    }

    fn tell(&self, shard: ShardId, done: FetchDone) {
        if let Some(shard) = self.node.shard(shard) {
            shard.tell_fetched([done]);
        }
    }
}

/// Reads blocks into their slots and gives those back to their shards.
async fn read(node: Arc<Node>, principal: Arc<Principal>, tier: Arc<Tier>, mut blocks: Vec<Ready>) {
    let now = Instant::now();
    let within =
        blocks.iter().map(|one| one.deadline.saturating_duration_since(now)).max().unwrap_or_default();
    let mut wants: Vec<Want<'_>> = blocks
        .iter_mut()
        .map(|one| Want { key: one.record.key, into: &mut one.into[..one.record.bytes as usize] })
        .collect();
    let got = tier.read(unix_now(), within, &mut wants).await;
    let mut by_shard: HashMap<ShardId, Vec<FetchDone>> = HashMap::new();
    for (Ready { shard, fetch, record, into, .. }, got) in blocks.into_iter().zip(got) {
        let done = match got {
            // What was offered is what came, or it is not what the shard is waiting for.
            Got::Read(read) if (read.checksum, read.bytes) == (record.checksum, record.bytes) => {
                served(&node, &principal, &record);
                FetchDone::Landed { fetch, into }
            }
            Got::Read(_) | Got::TooLong { .. } => FetchDone::Missed { fetch, reason: MissReason::Corrupt },
            Got::Missed(reason) => FetchDone::Missed { fetch, reason },
        };
        by_shard.entry(shard).or_default().push(done);
    }
    for (shard, done) in by_shard {
        if let Some(shard) = node.shard(shard) {
            shard.tell_fetched(done);
        }
    }
}

fn served(node: &Node, principal: &Principal, record: &Record) {
    let served = &principal.served;
    let tokens = node.registry.by_tag(record.tag).map_or(0, |bound| bound.kept.scope.block_tokens);
    served.blocks.fetch_add(1, Ordering::Relaxed);
    served.bytes.fetch_add(record.bytes.into(), Ordering::Relaxed);
    served.tokens.fetch_add(tokens.into(), Ordering::Relaxed);
}
