//! Blocks that a leaving node would rather not take along: offered by the node that has them, fetched by the one that
//! is offered them, if it has room.
//!
//! An offer carries what its blocks mean (the record that the registry keeps of a binding, without the tenant's salt),
//! so that the other node can hold blocks whose worker it has never met.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_api::v1;
use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Fault, SessionId};
use kv_node::{BlockReport, BlockState, Event, Filter, Op, PeerId, Reach, Reply, Step};
use kv_transport::health::Circuit;
use kv_wire::frame::BINDING_BYTES_MAX;
use kv_wire::message::{Offer, Taken};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{PeerView, Peers};
use crate::config::Config;
use crate::node::{Node, unexpected};
use crate::registry::Kept;

/// Blocks in one offer.
const OFFER_MAX: usize = 256;
/// Offered blocks that are fetched at once.
const TAKE_MAX: usize = 64;
/// How long one offer may take.
const OFFER_LIMIT: Duration = Duration::from_secs(30);
/// Offers of one principal that a peer takes nothing of, one after the other, before it is offered no more of them.
const REFUSALS_MAX: usize = 3;
/// Peers that may each take a part of an offer: which part is not told, so that some of it may go to several.
const PARTS_MAX: usize = 3;
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
    let binding = match introduce(node, reader, &offer.binding) {
        Ok(binding) => binding,
        Err(fault) => {
            tracing::warn!(peer = reader, %fault, "what is offered means nothing here");
            return none;
        }
    };
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
            let (step, reach) = (Step { key, after: None }, Reach::Further { hint });
            let acquired = node.of(number).acquire(node.guest, step, (true, reach), until).await;
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
    if taken > 0 && node.registry.came(binding) {
        let node = Arc::clone(node);
        // Waits for the disk.
        let _ = tokio::task::spawn_blocking(move || node.registry.save()).await;
    }
    Taken { id: offer.id, taken, left: count - taken }
}

/// Makes the binding of an offer known to the shards, until a block of it comes for this life alone.
fn introduce(node: &Node, peer: &str, record: &[u8]) -> Result<BindingId, Fault> {
    let kept: Kept = serde_json::from_slice(record)
        .map_err(|error| Fault::new(Code::BadRequest, format!("its binding cannot be read: {error}")))?;
    node.fits(kept.block_bytes)?;
    let (bound, fresh) = node.registry.introduce(peer, kept)?;
    if fresh {
        node.tell_all(|| Event::Bound(bound.binding()));
    }
    Ok(bound.id)
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
        let (offers, unnamed) = offers;
        progress.total = unnamed + offers.iter().map(|offer| offer.1.keys.len() as u64).sum::<u64>();
        progress.offered = unnamed;
        progress.left = unnamed;
        // Whom nothing is known against goes first.
        let (likely, unlikely) = match peers.views().await {
            Ok(views) => wanted.peers.into_iter().partition(|peer| may_take(&views, *peer)),
            Err(_) => (wanted.peers, Vec::new()),
        };
        let mut round = Round::new(offers, likely, unlikely);
        let mut under_way = JoinSet::new();
        loop {
            while let Some((peer, piece)) = round.next() {
                let peers = peers.clone();
                under_way.spawn(async move {
                    let until = Instant::now() + OFFER_LIMIT;
                    let taken = peers.offer(peer, piece.offer.clone(), until).await;
                    (peer, piece, taken.ok().flatten())
                });
            }
            let settled = match under_way.join_next().await {
                Some(Ok((peer, piece, taken))) => round.answered(peer, piece, taken).into_iter().collect(),
                Some(Err(_)) => continue,
                None if round.call_the_unlikely() => continue,
                None => round.give_up(),
            };
            let over = settled.is_empty() && under_way.is_empty() && round.is_over();
            for piece in settled {
                let (count, taken) = (piece.offer.keys.len() as u64, u64::from(piece.taken));
                progress.offered += count;
                progress.taken += taken;
                progress.left += count - taken;
                progress.bytes += taken * piece.block_bytes;
            }
            if over {
                break;
            }
            let _ = told.try_send(Ok(progress));
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

/// Whether nothing is known that keeps a peer from taking blocks.
fn may_take(views: &[PeerView], peer: PeerId) -> bool {
    let view = views.get(usize::from(peer.0));
    view.is_some_and(|view| !view.reader.leaving && !matches!(view.reader.circuit, Circuit::Open { .. }))
}

/// One offer on its way from peer to peer, until one takes it.
#[derive(Debug)]
struct Piece {
    block_bytes: u64,
    offer: Offer,
    /// Who did not take all of it.
    tried: Vec<PeerId>,
    /// The most that one of them took.
    taken: u32,
    /// How many took a part.
    parts: usize,
}

/// Who is offered what next. Each peer has one offer at a time: whoever takes faster takes more. A peer that does not
/// answer is offered nothing more, and its offer goes to the others; what nobody takes is left.
struct Round {
    waiting: VecDeque<Piece>,
    /// Who has no offer to think about.
    idle: Vec<PeerId>,
    /// All that may still be offered something, idle or not.
    within: Vec<PeerId>,
    /// Those who are down or leaving, as far as is known: called when nobody else is left.
    unlikely: Vec<PeerId>,
    /// Offers of a principal, which has its own room, that a peer took nothing of, one after the other.
    refusals: HashMap<(PeerId, u8), usize>,
}

impl Round {
    fn new(offers: Vec<(u64, Offer)>, likely: Vec<PeerId>, unlikely: Vec<PeerId>) -> Self {
        let piece =
            |(block_bytes, offer)| Piece { block_bytes, offer, tried: Vec::new(), taken: 0, parts: 0 };
        let waiting = offers.into_iter().map(piece).collect();
        Self { waiting, idle: likely.clone(), within: likely, unlikely, refusals: HashMap::new() }
    }

    /// The next offer to make, and to whom.
    fn next(&mut self) -> Option<(PeerId, Piece)> {
        let fits = |peer: PeerId| self.waiting.iter().position(|piece| self.suits(peer, piece));
        let (at, found) = self.idle.iter().enumerate().find_map(|(at, peer)| Some((at, fits(*peer)?)))?;
        Some((self.idle.remove(at), self.waiting.remove(found)?))
    }

    /// What a peer said to an offer, if it said anything. Gives the offer when it is settled.
    fn answered(&mut self, peer: PeerId, mut piece: Piece, taken: Option<Taken>) -> Option<Piece> {
        let count = piece.offer.keys.len() as u32;
        let refusals = self.refusals.entry((peer, piece.offer.principal)).or_default();
        match taken {
            None => self.within.retain(|one| *one != peer),
            Some(Taken { taken: 0, .. }) => *refusals += 1,
            Some(Taken { taken, .. }) => {
                *refusals = 0;
                piece.parts += 1;
                piece.taken = piece.taken.max(taken.min(count));
            }
        }
        if taken.is_some() {
            self.idle.push(peer);
        }
        piece.tried.push(peer);
        let others = self.within.iter().chain(&self.unlikely).any(|peer| self.suits(*peer, &piece));
        if piece.taken == count || piece.parts == PARTS_MAX || !others {
            return Some(piece);
        }
        self.waiting.push_front(piece);
        None
    }

    /// Nobody is left who would take more: those come in of whom it was not to be expected. Says whether there are any.
    fn call_the_unlikely(&mut self) -> bool {
        if self.waiting.is_empty() || self.unlikely.is_empty() {
            return false;
        }
        self.within.extend(&self.unlikely);
        self.idle.append(&mut self.unlikely);
        true
    }

    /// What nobody takes.
    fn give_up(&mut self) -> Vec<Piece> {
        self.waiting.drain(..).collect()
    }

    fn is_over(&self) -> bool {
        self.waiting.is_empty()
    }

    fn suits(&self, peer: PeerId, piece: &Piece) -> bool {
        let refusals = self.refusals.get(&(peer, piece.offer.principal));
        refusals.is_none_or(|count| *count < REFUSALS_MAX) && !piece.tried.contains(&peer)
    }
}

/// All blocks that are here as offers, the most valuable first, with the length of their blocks; and how many cannot be
/// offered.
async fn plan(node: &Node, bytes_max: u64) -> Result<(Vec<(u64, Offer)>, u64), Fault> {
    let mut unnamed = 0;
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
            // Of a block whose scope nobody named in this life there is nothing to tell.
            let named = node.registry.get(binding.0.into()).filter(|bound| bound.scope_id().is_some());
            let record = named.as_ref().and_then(|bound| serde_json::to_vec(&bound.kept).ok());
            let record = record.filter(|record| record.len() <= BINDING_BYTES_MAX);
            let (Some(bound), Some(record)) = (named, record) else {
                unnamed += blocks.len() as u64;
                continue;
            };
            blocks.sort_by_key(|(worth, key)| (std::cmp::Reverse(*worth), *key));
            for chunk in blocks.chunks(OFFER_MAX) {
                let keys = chunk.iter().map(|(_, key)| *key).collect();
                let offer = Offer { id: 0, principal: number as u8, binding: record.clone(), keys };
                offers.push((chunk[0].0, u64::from(bound.kept.block_bytes), offer));
            }
        }
    }
    offers.sort_by_key(|(worth, ..)| std::cmp::Reverse(*worth));
    // Of a part that somebody wants, what can be offered is meant.
    let (mut room, unnamed) = if bytes_max == 0 { (u64::MAX, unnamed) } else { (bytes_max, 0) };
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
    Ok((kept, unnamed))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A round of so many offers, of four blocks each.
    fn round(offers: u64, likely: &[u16], unlikely: &[u16]) -> Round {
        let ids = |peers: &[u16]| peers.iter().copied().map(PeerId).collect();
        let keys = vec![BlockKey([0; 16]); 4];
        let offer = |id| (1, Offer { id, principal: 0, binding: Vec::new(), keys: keys.clone() });
        Round::new((0..offers).map(offer).collect(), ids(likely), ids(unlikely))
    }

    /// What is taken and left when each peer takes so many blocks of each offer, or does not answer, and how many offers
    /// each was made.
    fn play(mut round: Round, manner: impl Fn(u16) -> Option<u32>) -> (u64, u64, BTreeMap<u16, usize>) {
        let (mut taken, mut left, mut made) = (0, 0, BTreeMap::new());
        let mut under_way = VecDeque::new();
        loop {
            while let Some((peer, piece)) = round.next() {
                *made.entry(peer.0).or_default() += 1;
                // A peer that fails does so at once.
                match manner(peer.0) {
                    None | Some(0) => under_way.push_front((peer, piece)),
                    Some(_) => under_way.push_back((peer, piece)),
                }
            }
            let settled = match under_way.pop_front() {
                Some((peer, piece)) => {
                    let answer = manner(peer.0).map(|taken| Taken { id: 0, taken, left: 4 - taken });
                    round.answered(peer, piece, answer).into_iter().collect()
                }
                None if round.call_the_unlikely() => continue,
                None => round.give_up(),
            };
            if settled.is_empty() && under_way.is_empty() && round.is_over() {
                return (taken, left, made);
            }
            for piece in settled {
                taken += u64::from(piece.taken);
                left += piece.offer.keys.len() as u64 - u64::from(piece.taken);
            }
        }
    }

    #[test]
    fn what_one_peer_fails_to_take_goes_to_the_others() {
        let all = |manner: fn(u16) -> Option<u32>| play(round(100, &[1, 2], &[]), manner);
        let (taken, left, made) = all(|peer| (peer == 1).then_some(4));
        assert_eq!((taken, left, made[&2]), (400, 0, 1), "who does not answer is asked once");
        let (taken, left, made) = all(|peer| Some(if peer == 1 { 4 } else { 0 }));
        assert_eq!(
            (taken, left, made[&2]),
            (400, 0, REFUSALS_MAX),
            "nor is who takes nothing asked for ever"
        );
        let (taken, left, _) = all(|peer| Some(if peer == 1 { 4 } else { 3 }));
        assert_eq!((taken, left), (400, 0), "what a peer takes in part, another takes whole");
        assert_eq!(all(|_| None), (0, 400, [(1, 1), (2, 1)].into()), "left is what nobody took");
        let (taken, left, _) = all(|_| Some(3));
        assert_eq!((taken, left), (300, 100), "a part is counted once");
    }

    #[test]
    fn who_is_down_or_leaving_is_asked_when_nobody_else_is_left() {
        let (taken, left, made) = play(round(20, &[1], &[2]), |_| Some(4));
        assert_eq!((taken, left, made), (80, 0, [(1, 20)].into()));
        let (taken, left, made) = play(round(20, &[1], &[2]), |peer| (peer == 2).then_some(4));
        assert_eq!((taken, left, made), (80, 0, [(1, 1), (2, 20)].into()));
        assert_eq!(play(round(0, &[1], &[2]), |_| Some(4)), (0, 0, BTreeMap::new()));
        assert_eq!(play(round(2, &[], &[]), |_| Some(4)), (0, 8, BTreeMap::new()));
    }

    #[test]
    fn a_principal_that_a_peer_has_no_room_for_keeps_no_other_from_it() {
        let mut round = round(8, &[1], &[]);
        for (number, piece) in round.waiting.iter_mut().enumerate() {
            piece.offer.principal = u8::from(number >= 4);
        }
        let mut taken = Vec::new();
        while let Some((peer, piece)) = round.next() {
            let count = if piece.offer.principal == 0 { 0 } else { 4 };
            taken.extend(round.answered(peer, piece, Some(Taken { id: 0, taken: count, left: 4 - count })));
        }
        taken.extend(round.give_up());
        assert_eq!(taken.iter().map(|piece| piece.taken).sum::<u32>(), 16);
    }
}
