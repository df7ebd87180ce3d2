//! Searches of the shards in the object tier, gathered into few requests.
//!
//! What comes within half a millisecond is read together: neighbours in a pack then cost one request. Whoever reads the
//! head of a prefix reads the rest of it next, so that what follows in its pack is asked for in the same breath: its
//! shards are told to prefetch it, and what they want joins the others here.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kv_arena::Slot;
use kv_block::{BlockKey, MissReason, Record, SessionId, ShardId};
use kv_node::{
    Event, FetchDone, FetchOp, FetchToken, Micros, OfferToken, Op, Origin, Reach, RequestId, Step,
};
use kv_object::{Got, Tier, Want};
use kv_wire::message::Sight;
use tokio::sync::mpsc;
use tokio::time::sleep_until;

use super::{FetchOrder, Objects, Principal, principals_of, unix_now};
use crate::node::Node;
use crate::shard::Letter;

/// How long a block that could be read waits for others.
const GATHER: Duration = Duration::from_micros(500);
/// With so many bytes they wait no longer.
const GATHER_BYTES: u64 = 16 << 20;
/// Searches taken in one turn.
const TURN_MAX: usize = 4096;
/// Blocks that are remembered as asked for ahead; when there are more, they are forgotten.
const AHEAD_MAX: usize = 1 << 16;

pub(super) struct Reads {
    node: Arc<Node>,
    objects: Objects,
    /// By shard.
    principals: Vec<usize>,
    /// Offered, and not answered.
    offered: HashMap<(ShardId, FetchToken), Offered>,
    /// By principal: what is read next.
    ready: Vec<Vec<Ready>>,
    ready_bytes: u64,
    ready_since: Option<Instant>,
    /// Asked for because of another: what follows them is not asked for in turn.
    ahead: HashSet<BlockKey>,
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
            ready: objects.all().iter().map(|_| Vec::new()).collect(),
            ready_bytes: 0,
            ready_since: None,
            ahead: HashSet::new(),
        }
    }

    pub(super) async fn run(mut self, mut orders: mpsc::UnboundedReceiver<FetchOrder>) {
        loop {
            let due = self.ready_since.map(|since| since + GATHER);
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
            }
            let gathered = self.ready_since.is_some_and(|since| since.elapsed() >= GATHER);
            if gathered || self.ready_bytes >= GATHER_BYTES {
                self.read();
            }
        }
    }

    fn take(&mut self, (shard, op, deadline): FetchOrder) {
        match op {
            FetchOp::Find { fetch, key, .. } => self.find(shard, fetch, key, deadline),
            FetchOp::Into { fetch, into, .. } => {
                // One that is not known was left meanwhile, and its slot goes back.
                let Some(Offered { record, deadline }) = self.offered.remove(&(shard, fetch)) else { return };
                self.ready_bytes += u64::from(record.bytes);
                self.ready_since.get_or_insert_with(Instant::now);
                let principal = self.principals[usize::from(shard.0)];
                self.ready[principal].push(Ready { shard, fetch, record, deadline, into });
            }
            FetchOp::Decline { fetch, reason, .. } => {
                self.offered.remove(&(shard, fetch));
                self.tell(shard, FetchDone::Missed { fetch, reason });
            }
            FetchOp::Leave { fetch } => {
                self.offered.remove(&(shard, fetch));
                // What is being read comes back all the same, and nobody waits for it.
                let principal = self.principals[usize::from(shard.0)];
                self.ready[principal].retain(|one| (one.shard, one.fetch) != (shard, fetch));
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
        if !self.ahead.remove(&key) {
            self.look_ahead(number, &tier, now, &key);
        }
    }

    /// Has what follows a block in its prefix fetched as well.
    fn look_ahead(&mut self, principal: usize, tier: &Tier, now: u32, key: &BlockKey) {
        let ahead = tier.ahead(now, key).into_iter().map(|(key, _)| key);
        let keys: Vec<BlockKey> = ahead.filter(|key| !self.ahead.contains(key)).collect();
        if keys.is_empty() {
            return;
        }
        if self.ahead.len() + keys.len() > AHEAD_MAX {
            self.ahead.clear();
        }
        let mut by_shard: HashMap<ShardId, Vec<BlockKey>> = HashMap::new();
        for (key, (sight, shard)) in keys.iter().zip(self.node.of(principal).sights(&keys)) {
            if sight == Sight::Absent {
                self.ahead.insert(*key);
                by_shard.entry(shard.id).or_default().push(*key);
            }
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

    /// Reads what is gathered, each request by itself.
    fn read(&mut self) {
        (self.ready_since, self.ready_bytes) = (None, 0);
        for number in 0..self.ready.len() {
            let ready = std::mem::take(&mut self.ready[number]);
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
