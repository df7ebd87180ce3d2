//! Blocks that a leaving node would rather not take along: offered by the node that has them, fetched by the one that
//! is offered them, if it has room.
//!
//! An offer carries what its blocks mean (the record that the registry keeps of a binding, without the tenant's salt),
//! so that the other node can hold blocks whose worker it has never met.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_api::v1;
use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Fault, SessionId};
use kv_node::{BlockReport, BlockState, Event, Filter, Op, PeerId, Reach, Reply};
use kv_wire::frame::BINDING_BYTES_MAX;
use kv_wire::message::{Offer, Taken};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Peers;
use crate::config::Config;
use crate::node::{Node, unexpected};
use crate::registry::Kept;

/// Blocks in one offer.
const OFFER_MAX: usize = 256;
/// Offered blocks that are fetched at once.
const TAKE_MAX: usize = 64;
/// How long one offer may take.
const OFFER_LIMIT: Duration = Duration::from_secs(30);
/// Blocks asked of a shard at once while it is looked through.
const PAGE: usize = 1000;

/// Fetches what a peer offers; says how much of it is here now.
pub(super) async fn take(
    node: &Arc<Node>,
    config: &Config,
    reader: &str,
    principal: &str,
    offer: Offer,
) -> Taken {
    let count = offer.keys.len() as u32;
    let none = Taken { id: offer.id, taken: 0, left: count };
    let hint = config.peers().position(|member| member.name == reader).map(|at| PeerId(at as u16));
    let number = node.principals.iter().position(|one| one.name == principal);
    let (Some(number), false) = (number, node.is_draining()) else { return none };
    if let Err(fault) = introduce(node, &offer.binding).await {
        tracing::warn!(peer = reader, %fault, "an offer is not understood");
        return none;
    }
    let until = Instant::now() + OFFER_LIMIT;
    let (mut tasks, mut taken) = (JoinSet::new(), 0);
    for key in offer.keys {
        if tasks.len() >= TAKE_MAX
            && let Some(done) = tasks.join_next().await
        {
            taken += u32::from(done.unwrap_or(false));
        }
        let node = Arc::clone(node);
        tasks.spawn(async move {
            let reach = Reach::Peers { hint };
            let acquired = node.of(number).acquire(node.guest, &key, (true, reach), until).await;
            let Ok((shard, Ok(grant))) = acquired else { return false };
            if let Some(shard) = node.shard(shard) {
                shard.give_back(node.guest, grant.lease);
            }
            true
        });
    }
    while let Some(done) = tasks.join_next().await {
        taken += u32::from(done.unwrap_or(false));
    }
    Taken { id: offer.id, taken, left: count - taken }
}

/// Makes the binding of an offer known to the shards.
async fn introduce(node: &Arc<Node>, record: &[u8]) -> Result<(), Fault> {
    let bad = |text: String| Fault::new(Code::BadRequest, text);
    let kept: Kept = serde_json::from_slice(record)
        .map_err(|error| bad(format!("its binding cannot be read: {error}")))?;
    let (bound, fresh) = node.registry.introduce(kept)?;
    if fresh {
        node.tell_all(|| Event::Bound(bound.binding()));
        let node = Arc::clone(node);
        // Waits for the disk.
        let _ = tokio::task::spawn_blocking(move || node.registry.save()).await;
    }
    Ok(())
}

/// What of an evacuation a caller asked for.
#[derive(Clone, Debug, Default)]
pub struct Evacuation {
    /// To these; never empty.
    pub peers: Vec<PeerId>,
    /// At most so many bytes; 0: all.
    pub bytes_max: u64,
}

/// Offers blocks of all principals to peers, the most valuable first, and tells how it goes.
pub(crate) async fn evacuate(
    node: Arc<Node>,
    peers: Peers,
    wanted: Evacuation,
    told: mpsc::Sender<Result<v1::EvacuateProgress, tonic::Status>>,
) {
    let work = async {
        let mut progress = v1::EvacuateProgress::default();
        let offers = match plan(&node, wanted.bytes_max).await {
            Ok(offers) => offers,
            Err(fault) => {
                let _ = told.send(Err(crate::rpc::status(fault))).await;
                return;
            }
        };
        progress.total = offers.iter().map(|offer| offer.1.keys.len() as u64).sum();
        // Each peer has one offer at a time: whoever takes faster takes more.
        let mut waiting = offers.into_iter();
        let mut under_way = JoinSet::new();
        for peer in &wanted.peers {
            offer_next(&mut under_way, &peers, *peer, waiting.next());
        }
        while let Some(done) = under_way.join_next().await {
            let Ok((peer, count, block_bytes, taken)) = done else { continue };
            let taken = taken.map_or(0, |taken: Taken| u64::from(taken.taken).min(count));
            progress.offered += count;
            progress.taken += taken;
            progress.left += count - taken;
            progress.bytes += taken * block_bytes;
            let _ = told.try_send(Ok(progress));
            offer_next(&mut under_way, &peers, peer, waiting.next());
        }
        progress.finished = true;
        let _ = told.send(Ok(progress)).await;
    };
    tokio::select! {
        () = work => {}
        // Nobody listens any more.
        () = told.closed() => {}
    }
}

type Outcome = (PeerId, u64, u64, Option<Taken>);

/// Makes the next offer to a peer, if there is one.
fn offer_next(under_way: &mut JoinSet<Outcome>, peers: &Peers, peer: PeerId, next: Option<(u64, Offer)>) {
    let Some((block_bytes, offer)) = next else { return };
    let peers = peers.clone();
    under_way.spawn(async move {
        let count = offer.keys.len() as u64;
        let taken = peers.offer(peer, offer, Instant::now() + OFFER_LIMIT).await;
        (peer, count, block_bytes, taken.ok().flatten())
    });
}

/// All blocks that are here as offers, the most valuable first, with the length of their blocks.
async fn plan(node: &Node, bytes_max: u64) -> Result<Vec<(u64, Offer)>, Fault> {
    let mut offers: Vec<(u8, u64, Offer)> = Vec::new();
    for (number, principal) in node.principals.iter().enumerate() {
        let mut by_binding: BTreeMap<BindingId, Vec<(u8, BlockKey)>> = BTreeMap::new();
        for shard in &node.shards[principal.shards.clone()] {
            for report in list(node, shard).await? {
                let worth = worth(&report);
                by_binding.entry(report.binding).or_default().push((worth, report.key));
            }
        }
        for (binding, mut blocks) in by_binding {
            let Some(bound) = node.registry.get(binding.0.into()) else { continue };
            // Of a block whose scope nobody named in this life there is nothing to tell.
            if bound.scope_id().is_none() {
                continue;
            }
            let record = serde_json::to_vec(&bound.kept).unwrap_or_default();
            if record.is_empty() || record.len() > BINDING_BYTES_MAX {
                continue;
            }
            blocks.sort_by_key(|(worth, key)| (std::cmp::Reverse(*worth), *key));
            for chunk in blocks.chunks(OFFER_MAX) {
                let keys = chunk.iter().map(|(_, key)| *key).collect();
                let offer = Offer { id: 0, principal: number as u8, binding: record.clone(), keys };
                offers.push((chunk[0].0, u64::from(bound.kept.block_bytes), offer));
            }
        }
    }
    offers.sort_by_key(|(worth, ..)| std::cmp::Reverse(*worth));
    let mut room = if bytes_max == 0 { u64::MAX } else { bytes_max };
    let mut kept = Vec::new();
    for (_, block_bytes, mut offer) in offers {
        let fit = usize::try_from(room / block_bytes.max(1)).unwrap_or(usize::MAX);
        offer.keys.truncate(fit);
        if offer.keys.is_empty() {
            continue;
        }
        room -= block_bytes * offer.keys.len() as u64;
        kept.push((block_bytes, offer));
    }
    Ok(kept)
}

/// How much a block is worth to whoever comes next: pinned, often read, near.
fn worth(report: &BlockReport) -> u8 {
    u8::from(report.pinned_until.is_some()) * 32
        + report.priority as u8 * 8
        + report.frequency * 2
        + u8::from(report.host.is_some())
}

/// The blocks that a shard has, all of them.
async fn list(node: &Node, shard: &crate::shard::ShardHandle) -> Result<Vec<BlockReport>, Fault> {
    let mut all = Vec::new();
    let mut cursor = 0;
    loop {
        let until = Instant::now() + Duration::from_secs(10);
        let op = Op::List { cursor, count: PAGE, filter: Filter::default() };
        let (blocks, next) = match node.ask(shard, SessionId(0), until, op, Bytes::new()).await? {
            Reply::Listed { blocks, next } => (blocks, next),
            other => return Err(unexpected(&other)),
        };
        all.extend(blocks.into_iter().filter(|block| block.state == BlockState::Present));
        match next {
            Some(next) => cursor = next,
            None => return Ok(all),
        }
    }
}

/// An offer of blocks that a caller named, which all must be of one binding.
pub(crate) async fn named(node: &Node, keys: Vec<BlockKey>, until: Instant) -> Result<Offer, Fault> {
    let bad = |text: String| Fault::new(Code::BadRequest, text);
    let mut found: Option<(usize, BindingId)> = None;
    for key in &keys {
        let Some((shard, report)) = node.everything().inspect(key, until).await? else {
            return Err(Fault::new(Code::BadRequest, format!("block {key} is not here")));
        };
        let of = usize::from(shard.0);
        let number = node.principals.iter().position(|principal| principal.shards.contains(&of));
        let this = (number.unwrap_or(0), report.binding);
        if found.is_some_and(|known| known != this) {
            return Err(bad("the blocks of one offer are of one binding and one principal".into()));
        }
        found = Some(this);
    }
    let Some((number, binding)) = found else { return Err(bad("no block is named".into())) };
    let bound = node.registry.get(binding.0.into()).filter(|bound| bound.scope_id().is_some());
    let bound = bound.ok_or_else(|| bad("the scope of these blocks is not known; register it".into()))?;
    let record = serde_json::to_vec(&bound.kept).unwrap_or_default();
    if record.is_empty() || record.len() > BINDING_BYTES_MAX {
        return Err(bad(format!("the scope takes more than {BINDING_BYTES_MAX} bytes")));
    }
    Ok(Offer { id: 0, principal: number as u8, binding: record, keys })
}
