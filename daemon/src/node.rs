//! The node as the rest of the daemon sees it: every shard behind one set of questions.
//!
//! Shards share nothing, so a question about keys goes to all that the caller sees ([`View`]) and the best answer
//! counts; a question that must have one home (a store, an announcement) goes to the shard that the key picks.
//! Whoever uses blocks sees the shards of its principal, administrators see all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_api::convert::Names;
use kv_arena::Held;
use kv_block::code::Code;
use kv_block::{BlockKey, Checksum, Epoch, Fault, MissReason, Scope, SessionId, ShardId, Slice, Tier};
use kv_node::{BlockReport, Event, Found, Grant, Op, Reach, Reply, ShardReport, Step};
use kv_wire::message::Sight;

use crate::drain::Drain;
use crate::plan::PrincipalPlan;
use crate::registry::{Bound, Registry};
use crate::sessions::{SessionInfo, Sessions};
use crate::shard::{Body, Letter, ReplyTo, ShardHandle};

/// What a start brought back.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// Blocks adopted in host memory.
    pub host_blocks: u64,
    /// Blocks found on disk.
    pub disk_blocks: u64,
    /// How long it took.
    pub took: Duration,
    /// What was set aside or refused, in words.
    pub notes: Vec<String>,
}

/// One running node.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Number of this life.
    pub epoch: Epoch,
    /// When this life began.
    pub started: Instant,
    /// Its shards, by number.
    pub shards: Vec<ShardHandle>,
    /// What blocks mean.
    pub registry: Registry,
    /// Who is connected.
    pub sessions: Sessions,
    /// The session under which callers without one of their own read.
    pub guest: SessionId,
    /// What the start brought back.
    pub recovered: Recovered,
    /// What each tier was given: huge pages, engine, directory; by shard.
    pub tier_notes: Vec<TierNotes>,
    /// Longest block that a shard can hold, in bytes.
    pub block_bytes_max: u64,
    /// Whose the shards are, the default principal first.
    pub principals: Vec<PrincipalPlan>,
    /// Whether new work is taken.
    pub drain: Arc<Drain>,
}

/// What an operator should know of a shard's tiers.
#[derive(Clone, Debug, Default)]
pub struct TierNotes {
    /// Host memory.
    pub host: Vec<String>,
    /// Disk.
    pub disk: Vec<String>,
    /// Bytes the disk tier may use.
    pub disk_bytes_max: u64,
    /// NUMA node.
    pub numa_node: u32,
}

impl Node {
    /// A node over running shards.
    #[allow(clippy::too_many_arguments, reason = "the parts that compose puts together, once")]
    pub fn new(
        name: String,
        epoch: Epoch,
        shards: Vec<ShardHandle>,
        registry: Registry,
        sessions: Sessions,
        guest: SessionId,
        recovered: Recovered,
        tier_notes: Vec<TierNotes>,
        block_bytes_max: u64,
        principals: Vec<PrincipalPlan>,
    ) -> Self {
        let started = Instant::now();
        Self {
            name,
            epoch,
            started,
            shards,
            registry,
            sessions,
            guest,
            recovered,
            tier_notes,
            block_bytes_max,
            principals,
            drain: Arc::default(),
        }
    }

    /// Refuses blocks of a length that no slot here has room for.
    pub fn fits(&self, block_bytes: u32) -> Result<(), Fault> {
        let max = self.block_bytes_max.min(u64::from(u32::MAX));
        if (1..=max).contains(&u64::from(block_bytes)) {
            return Ok(());
        }
        let text =
            format!("field `block_bytes` is {block_bytes}; 1 to {max} is allowed (`host.region_bytes`)");
        Err(Fault::new(Code::BadRequest, text))
    }

    /// Who is connected, without the daemon's own session.
    pub fn clients(&self) -> Vec<SessionInfo> {
        let mut all = self.sessions.all();
        all.retain(|info| info.id != self.guest);
        all
    }

    /// Whether no new work is taken.
    pub fn is_draining(&self) -> bool {
        self.drain.is_on()
    }

    /// Starts or ends draining.
    pub fn set_draining(&self, draining: bool) {
        self.drain.set(draining);
    }

    /// Refuses new work while draining.
    pub fn accepting(&self) -> Result<(), Fault> {
        if self.is_draining() {
            let wait = Duration::from_secs(1);
            return Err(Fault::new(Code::Draining, "the daemon is draining").retry_after(wait));
        }
        Ok(())
    }

    /// The shard with this number.
    pub fn shard(&self, id: ShardId) -> Option<&ShardHandle> {
        self.shards.get(usize::from(id.0))
    }

    /// The shards of one principal.
    pub fn of(&self, principal: usize) -> View<'_> {
        let shards = self.principals.get(principal).map_or(0..0, |principal| principal.shards.clone());
        View { node: self, shards: &self.shards[shards] }
    }

    /// The shards of all principals: what administrators see.
    pub fn everything(&self) -> View<'_> {
        View { node: self, shards: &self.shards }
    }

    /// Name of the principal whose shard this is.
    pub fn principal_of(&self, shard: ShardId) -> &str {
        let of = |principal: &&PrincipalPlan| principal.shards.contains(&usize::from(shard.0));
        self.principals.iter().find(of).map_or("", |principal| &principal.name)
    }

    /// Tells every shard something that it must hear.
    pub fn tell_all(&self, event: impl Fn() -> Event) {
        for shard in &self.shards {
            shard.post_surely(Letter::Tell(event()));
        }
    }

    /// Asks one shard and waits for its answer, `deadline` at the latest.
    pub async fn ask(
        &self,
        shard: &ShardHandle,
        session: SessionId,
        deadline: Instant,
        op: Op,
        body: impl Into<Body>,
    ) -> Result<Reply, Fault> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let letter = Letter::Ask { session, deadline, op, body: body.into(), reply: ReplyTo::Once(sender) };
        post(shard, letter)?;
        let mut answer = Answer { receiver, shard, session };
        // The shard ends everything at its deadline; a little more tells a sick shard from a slow answer.
        let limit = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(250);
        match tokio::time::timeout(limit, &mut answer.receiver).await {
            Ok(Ok(Reply::Fault(fault))) => Err(fault),
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(_)) => Err(Fault::new(Code::Draining, "the shard stopped before it answered")),
            Err(_) => Err(Fault::new(Code::DeadlinePassed, "the shard did not answer in time")),
        }
    }

    /// Asks the shards of a long job for their progress.
    pub fn ask_stream(
        &self,
        shard: &ShardHandle,
        deadline: Instant,
        op: Op,
    ) -> Result<tokio::sync::mpsc::UnboundedReceiver<Reply>, Fault> {
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        let reply = ReplyTo::Stream(sender);
        post(shard, Letter::Ask { session: SessionId(0), deadline, op, body: Bytes::new().into(), reply })?;
        Ok(receiver)
    }

    /// The keys that a request names, checked against the registry.
    pub fn keys(&self, names: &Names) -> Result<Vec<BlockKey>, Fault> {
        match names {
            Names::Keys(keys) => Ok(keys.clone()),
            Names::Hashes { binding, hashes } => {
                let bound = self.binding(*binding)?;
                Ok(bound.namer().ok_or_else(|| unknown_binding(*binding))?.keys(hashes))
            }
        }
    }

    /// The binding with this number.
    pub fn binding(&self, number: u32) -> Result<Arc<Bound>, Fault> {
        self.registry.get(number).ok_or_else(|| unknown_binding(number))
    }

    /// Sets what a tenant may hold on all shards of a principal together, the same for each principal; `None`
    /// lifts its quota.
    pub fn set_quota(&self, tenant: &str, bytes_max: Option<u64>) {
        for principal in &self.principals {
            let count = principal.shards.len();
            for (at, shard) in self.shards[principal.shards.clone()].iter().enumerate() {
                let bytes_max = bytes_max.map(|whole| quota_share(whole, at, count));
                shard.post_surely(Letter::Tell(Event::Quota { tenant: tenant.to_owned(), bytes_max }));
            }
        }
    }

    /// The counters of every shard.
    pub async fn reports(&self, deadline: Instant) -> Result<Vec<ShardReport>, Fault> {
        let mut reports = Vec::with_capacity(self.shards.len());
        for shard in &self.shards {
            match self.ask(shard, SessionId(0), deadline, Op::Report, Bytes::new()).await? {
                Reply::Report(report) => reports.push(*report),
                other => return Err(unexpected(&other)),
            }
        }
        Ok(reports)
    }

    /// Ends every shard; returns when all letters are posted, not when the threads are gone.
    pub fn stop_shards(&self) {
        for shard in &self.shards {
            shard.post_surely(Letter::Stop);
        }
    }
}

/// What a caller sees of a node: some of its shards. A question about keys goes to these, and to no others.
#[derive(Clone, Copy)]
pub struct View<'a> {
    node: &'a Node,
    /// Never empty.
    shards: &'a [ShardHandle],
}

impl std::ops::Deref for View<'_> {
    type Target = Node;
    fn deref(&self) -> &Node {
        self.node
    }
}

impl<'a> View<'a> {
    /// The principal whose shards are seen; of several, the first.
    pub fn principal(&self) -> usize {
        let first = self.shards.first().map_or(0, |shard| usize::from(shard.id.0));
        self.node.principals.iter().position(|principal| principal.shards.contains(&first)).unwrap_or(0)
    }

    /// The shards that are seen.
    pub fn shards(&self) -> &'a [ShardHandle] {
        self.shards
    }

    /// The shard that a key is stored on when its worker has no shard of its own.
    pub fn home(&self, key: &BlockKey) -> &'a ShardHandle {
        &self.shards[(key.halves()[1] % self.shards.len() as u64) as usize]
    }

    /// What a look at the tables tells of each of these, and the shard that it is told of: the home of one that is
    /// nowhere. Asks nobody.
    pub fn sights(&self, keys: &[BlockKey]) -> Vec<(Sight, &'a ShardHandle)> {
        let mut best: Vec<_> = keys.iter().map(|key| (Sight::Absent, self.home(key))).collect();
        for shard in self.shards {
            shard.sights(keys, |at, sight| {
                if sight.is_nearer(best[at].0) {
                    best[at] = (sight, shard);
                }
            });
        }
        best
    }

    /// Where each of these blocks is, over all shards that are seen.
    pub async fn lookup(&self, keys: &[BlockKey], all: bool, deadline: Instant) -> Result<Vec<Found>, Fault> {
        if let [shard] = self.shards {
            // What is resident needs no question; the shard says what becomes of the rest.
            let resident = shard.resident_prefix(keys);
            let mut found = vec![Found::In(Tier::Host); resident];
            if resident < keys.len() {
                found.extend(self.lookup_on(shard, &keys[resident..], all, deadline).await?);
            }
            return Ok(found);
        }
        let mut best = vec![Found::Miss(MissReason::NeverStored); keys.len()];
        for shard in self.shards {
            let found = self.lookup_on(shard, keys, true, deadline).await?;
            for (best, found) in best.iter_mut().zip(found) {
                *best = better(*best, found);
            }
        }
        if !all && let Some(first) = best.iter().position(|found| matches!(found, Found::Miss(_))) {
            best.truncate(first + 1);
        }
        Ok(best)
    }

    async fn lookup_on(
        &self,
        shard: &ShardHandle,
        keys: &[BlockKey],
        all: bool,
        deadline: Instant,
    ) -> Result<Vec<Found>, Fault> {
        let op = Op::Lookup { keys: keys.to_vec(), all };
        match self.ask(shard, SessionId(0), deadline, op, Bytes::new()).await? {
            Reply::Looked(found) => Ok(found),
            other => Err(unexpected(&other)),
        }
    }

    /// The shard that has a block or expects it; its home when none does.
    pub async fn owner(&self, key: &BlockKey, deadline: Instant) -> Result<&'a ShardHandle, Fault> {
        if let [shard] = self.shards {
            return Ok(shard);
        }
        let mut best = (self.home(key), Found::Miss(MissReason::NeverStored));
        for shard in self.shards {
            let report = self.inspect_on(shard, key, deadline).await?;
            let found = report.map_or(Found::Miss(MissReason::NeverStored), |report| found_of(&report));
            if better(best.1, found) != best.1 {
                best = (shard, found);
            }
        }
        Ok(best.0)
    }

    /// All that is known of a block, from the shard that knows most.
    pub async fn inspect(
        &self,
        key: &BlockKey,
        deadline: Instant,
    ) -> Result<Option<(ShardId, BlockReport)>, Fault> {
        let shard = self.owner(key, deadline).await?;
        Ok(self.inspect_on(shard, key, deadline).await?.map(|report| (shard.id, report)))
    }

    async fn inspect_on(
        &self,
        shard: &ShardHandle,
        key: &BlockKey,
        deadline: Instant,
    ) -> Result<Option<BlockReport>, Fault> {
        match self.ask(shard, SessionId(0), deadline, Op::Inspect { key: *key }, Bytes::new()).await? {
            Reply::Inspected(report) => Ok(report.map(|report| *report)),
            other => Err(unexpected(&other)),
        }
    }

    /// A lease on one block: the shard that gave it, and the grant or why not.
    pub async fn acquire(
        &self,
        session: SessionId,
        Step { key, after }: Step,
        (wait, reach): (bool, Reach),
        deadline: Instant,
    ) -> Result<(ShardId, Result<Grant, MissReason>), Fault> {
        let shard = self.owner(&key, deadline).await?;
        let op = Op::Acquire { key, wait, reach, after };
        match self.ask(shard, session, deadline, op, Bytes::new()).await? {
            Reply::Leased(grant) => Ok((shard.id, Ok(grant))),
            Reply::Miss(reason) => Ok((shard.id, Err(reason))),
            other => Err(unexpected(&other)),
        }
    }

    /// A hold on the bytes of one block, for as long as the caller copies them out. Wakes nobody up when the
    /// block is in host memory.
    pub async fn read(
        &self,
        session: SessionId,
        step: Step,
        wait: (bool, Reach),
        deadline: Instant,
    ) -> Result<Result<(Held, Tier), MissReason>, Fault> {
        let key = step.key;
        if let Some(held) = self.shards.iter().find_map(|shard| shard.hold_now(session, &key)) {
            return Ok(Ok((held, Tier::Host)));
        }
        let (shard, grant) = self.acquire(session, step, wait, deadline).await?;
        let grant = match grant {
            Ok(grant) => grant,
            Err(reason) => return Ok(Err(reason)),
        };
        let shard = &self.node.shards[usize::from(shard.0)];
        let held = shard.slab().hold(grant.slot, grant.generation);
        // The hold keeps the block where it is; the lease has done its work.
        shard.give_back(session, grant.lease);
        let held =
            held.ok_or_else(|| Fault::new(Code::Bug, format!("leased block {key} is not in its slot")))?;
        Ok(Ok((held, grant.tier)))
    }

    /// The checksum of a block that can be read here, for whoever has a copy of its bytes elsewhere. Wakes nobody up.
    pub fn known_sum(&self, session: SessionId, key: &BlockKey) -> Option<Checksum> {
        self.shards.iter().find_map(|shard| shard.known_sum(session, key))
    }

    /// Starts bringing blocks up, each on the shard that has it or would: how many are on their way, and how many
    /// need not be. In the order of their prefix, where they have one.
    pub async fn prefetch(
        &self,
        session: SessionId,
        keys: &[BlockKey],
        reach: Reach,
        deadline: Instant,
    ) -> Result<(u64, u64), Fault> {
        let mut by_shard: BTreeMap<ShardId, Vec<Step>> = BTreeMap::new();
        for (step, (_, shard)) in Step::along(keys).zip(self.sights(keys)) {
            by_shard.entry(shard.id).or_default().push(step);
        }
        let mut sum = (0, 0);
        for (shard, steps) in by_shard {
            let shard = &self.node.shards[usize::from(shard.0)];
            match self.ask(shard, session, deadline, Op::Prefetch { steps, reach }, Bytes::new()).await? {
                Reply::Counted { done, kept, .. } => sum = (sum.0 + done, sum.1 + kept),
                other => return Err(unexpected(&other)),
            }
        }
        Ok(sum)
    }

    /// Asks every shard that is seen the same and adds the counts up.
    pub async fn count(
        &self,
        session: SessionId,
        deadline: Instant,
        op: impl Fn() -> Op,
    ) -> Result<(u64, u64, u64), Fault> {
        let mut sum = (0, 0, u64::MAX);
        for shard in self.shards {
            match self.ask(shard, session, deadline, op(), Bytes::new()).await? {
                Reply::Counted { done, kept, absent } => {
                    sum = (sum.0 + done, sum.1 + kept, sum.2.min(absent));
                }
                other => return Err(unexpected(&other)),
            }
        }
        Ok(sum)
    }

    /// The fields in which the nearest stored scope of the same tenant differs, when that is why a block
    /// is missing.
    pub async fn scope_difference(
        &self,
        binding: u32,
        hash: &kv_block::SequenceHash,
        deadline: Instant,
    ) -> Result<Option<Vec<String>>, Fault> {
        let asked = self.binding(binding)?;
        let mut nearest: Option<Vec<String>> = None;
        let others = self.registry.all();
        let same_tenant = others
            .iter()
            .filter(|other| other.id != asked.id && other.kept.scope.tenant == asked.kept.scope.tenant)
            .take(SCOPES_COMPARED_MAX);
        for other in same_tenant {
            let Some(key) = other.key(hash) else { continue };
            let Some((_, report)) = self.inspect(&key, deadline).await? else { continue };
            if report.tiers.is_empty() {
                continue;
            }
            let fields = differing(&asked, &other.kept.scope, (&other.kept.slice, other.kept.block_bytes));
            if nearest.as_ref().is_none_or(|known| fields.len() < known.len()) {
                nearest = Some(fields);
            }
        }
        Ok(nearest)
    }
}

/// The part of a quota that falls to the shard at `at` of `count`: the parts sum to the whole.
pub fn quota_share(whole: u64, at: usize, count: usize) -> u64 {
    let count = count.max(1) as u64;
    whole / count + u64::from((at as u64) < whole % count)
}

/// Scopes of a tenant that an explanation compares with.
pub(crate) const SCOPES_COMPARED_MAX: usize = 64;

/// The fields in which what is asked for and another scope, slice and block length differ; never none.
pub(crate) fn differing(asked: &Bound, scope: &Scope, (slice, block_bytes): (&Slice, u32)) -> Vec<String> {
    let mut fields: Vec<String> =
        asked.kept.scope.differing_fields(scope).into_iter().map(str::to_owned).collect();
    if asked.kept.slice != *slice {
        fields.push("slice".into());
    }
    if asked.kept.block_bytes != block_bytes {
        fields.push("block_bytes".into());
    }
    // Equal in all that is kept, and yet another scope: the salt, which is not.
    if fields.is_empty() {
        fields.push("salt".into());
    }
    fields
}

/// An answer that is waited for. A caller that gives up may do so after the answer came and before it was
/// taken; a lease in it would be nobody's, and the daemon's own session never ends.
struct Answer<'a> {
    receiver: tokio::sync::oneshot::Receiver<Reply>,
    shard: &'a ShardHandle,
    session: SessionId,
}

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        // From here on the shard sees that nobody waits, and takes a lease back by itself.
        self.receiver.close();
        if let Ok(Reply::Leased(grant)) = self.receiver.try_recv() {
            self.shard.give_back(self.session, grant.lease);
        }
    }
}

fn post(shard: &ShardHandle, letter: Letter) -> Result<(), Fault> {
    shard.post(letter).map_err(|_| {
        let wait = Duration::from_millis(10);
        Fault::new(Code::QueueFull, format!("the mailbox of shard {} is full", shard.id)).retry_after(wait)
    })
}

fn unknown_binding(number: u32) -> Fault {
    Fault::new(Code::UnknownBinding, format!("binding {number} is not registered"))
}

/// An answer of a kind that the question cannot have.
pub fn unexpected(reply: &Reply) -> Fault {
    Fault::new(Code::Bug, format!("a shard gave an answer of the wrong kind: {reply:?}"))
}

fn found_of(report: &BlockReport) -> Found {
    match (report.tiers.first(), report.state) {
        (Some(tier), _) => Found::In(*tier),
        (None, kv_node::BlockState::Gone(reason)) => Found::Miss(reason),
        (None, _) => Found::Miss(MissReason::NotComplete),
    }
}

/// The better of two answers about one block: faster tier first, then expected, then gone, then unknown.
fn better(left: Found, right: Found) -> Found {
    let rank = |found| match found {
        Found::In(tier) => tier as u8,
        Found::Miss(MissReason::NotComplete) => 10,
        Found::Miss(MissReason::NeverStored) => 12,
        Found::Miss(_) => 11,
    };
    if rank(right) < rank(left) { right } else { left }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_shared_out_without_a_rest_and_a_small_one_is_not_lifted() {
        for whole in [0, 1, 2, 3, 7, 1 << 30, u64::MAX] {
            for count in 1..9 {
                let parts: Vec<u64> = (0..count).map(|at| quota_share(whole, at, count)).collect();
                assert_eq!(parts.iter().map(|part| u128::from(*part)).sum::<u128>(), u128::from(whole));
                assert!(parts.iter().max().unwrap() - parts.iter().min().unwrap() <= 1, "{parts:?}");
            }
        }
    }
}
