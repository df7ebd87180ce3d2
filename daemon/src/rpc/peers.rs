//! What operators ask about the peers of a node, in the words of the protocol.

use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_api::v1;
use kv_block::code::Code;
use kv_block::{Fault, MissReason, Tier};
use kv_node::{Found, PeerId};
use kv_transport::Micros;
use kv_transport::health::Circuit;
use kv_transport::reader::{PathId, PathState, PeerState};
use kv_wire::message::Sight;
use tonic::Status;

use super::{Shared, status};
use crate::object::unix_now;
use crate::peers::{PeerView, Peers, Transfers};

impl Shared {
    /// The peers; a fault that says what to set where there are none.
    pub(super) fn peers(&self) -> Result<&Peers, Status> {
        self.peers.as_ref().ok_or_else(|| {
            let text = "this node has no peers: set peers.members, and peers.listen on each of them";
            status(Fault::new(Code::BadRequest, text))
        })
    }

    /// Looks among the peers, then in the object tier, for what was not found here. What one of the peers has counts as
    /// found, at the node named beside it; what one expects stays a miss, with that node's name.
    pub(super) async fn look_further(
        &self,
        principal: usize,
        keys: &[kv_block::BlockKey],
        hint: Option<PeerId>,
        answers: &mut [Found],
        until: Instant,
    ) -> Result<Vec<String>, Fault> {
        let mut nodes = vec![String::new(); keys.len()];
        if let Some(peers) = self.peers.as_ref().filter(|peers| !peers.members().is_empty()) {
            self.look_among(peers, principal, keys, hint, (answers, &mut nodes), until).await?;
        }
        if let Some(tier) = self.objects.as_ref().and_then(|objects| objects.of(principal)?.tier()) {
            let absent = absent(answers);
            let asked: Vec<_> = absent.iter().map(|at| keys[*at]).collect();
            for (at, found) in absent.into_iter().zip(tier.find(unix_now(), &asked)) {
                if found.is_ok() {
                    answers[at] = Found::In(Tier::Object);
                    nodes[at].clear();
                }
            }
        }
        Ok(nodes)
    }

    async fn look_among(
        &self,
        peers: &Peers,
        principal: usize,
        keys: &[kv_block::BlockKey],
        hint: Option<PeerId>,
        (answers, nodes): (&mut [Found], &mut [String]),
        until: Instant,
    ) -> Result<(), Fault> {
        let absent = absent(answers);
        let until = until.min(Instant::now() + self.config.peers.probe_limit.0);
        let asked = absent.iter().map(|at| keys[*at]).collect();
        let places = peers.locate(principal as u8, asked, hint, until).await?;
        for (at, place) in absent.into_iter().zip(places) {
            let Some((peer, sight)) = place else { continue };
            nodes[at].clone_from(&peers.members()[usize::from(peer.0)].name);
            answers[at] = match sight {
                Sight::In(tier) => Found::In(tier),
                Sight::Pending | Sight::Absent => Found::Miss(MissReason::NotComplete),
            };
        }
        Ok(())
    }
}

/// Places of what was not found.
fn absent(answers: &[Found]) -> Vec<usize> {
    (0..answers.len()).filter(|at| matches!(answers[*at], Found::Miss(_))).collect()
}

/// A peer as a message.
pub(super) fn peer_info(view: &PeerView) -> v1::PeerInfo {
    let PeerView { member, reader, served, now, .. } = view;
    let open_until = match reader.circuit {
        Circuit::Open { until } => Some(until),
        _ => None,
    };
    let state = match (open_until, reader.state) {
        (Some(_), _) => "down",
        (None, PeerState::Connected) if reader.leaving => "leaving",
        (None, PeerState::Connected) => "up",
        (None, PeerState::Connecting | PeerState::Greeting) => "connecting",
        (None, PeerState::Idle) => "idle",
    };
    let paths = reader.paths.iter().filter(|(_, path)| path.state == PathState::Up);
    v1::PeerInfo {
        node: member.name.clone(),
        address: place(member),
        state: state.into(),
        reason: reason(view),
        retry_ms: open_until.map_or(0, |until| left_ms(until, *now)),
        version: reader.version.unwrap_or(0).into(),
        epoch: reader.epoch.map_or(0, |epoch| epoch.0),
        rtt_us: reader.rtt.map_or(0, |rtt| rtt.as_micros() as u64),
        paths: paths.map(|(id, _)| path_name(view, *id)).collect(),
        wanted: (reader.waiting + reader.asked + reader.granted) as u64,
        reading: reader.reading as u64,
        blocks_in: reader.landed,
        bytes_in: reader.paths.values().map(|path| path.bytes).sum(),
        misses: reader.misses.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect(),
        strikes: reader.strikes,
        held: served.held() as u64,
        held_bytes: served.held_bytes(),
        blocks_out: served.blocks(),
        bytes_out: served.bytes(),
        reads_here: served.reads_here(),
    }
}

/// The paths to a peer, best first, then those that are left out.
pub(super) fn paths(view: &PeerView) -> Vec<v1::PathInfo> {
    let planned = view.plan.paths.iter().map(|planned| {
        let report = view.reader.paths.get(&planned.path);
        let (up, state) = match report.map(|report| &report.state) {
            Some(PathState::Up) => (true, String::new()),
            Some(PathState::Down { why }) => (false, format!("; down: {why}")),
            Some(PathState::Opening) | None => (false, "; not open".to_owned()),
        };
        v1::PathInfo {
            name: planned.kind.to_string(),
            rank: if up { u32::from(planned.rank) + 1 } else { 0 },
            reason: format!("{}{state}", planned.why),
            up,
            blocks_in: report.map_or(0, |report| report.reads),
            bytes_in: report.map_or(0, |report| report.bytes),
        }
    });
    let left_out = view.plan.rejected.iter().map(|rejected| v1::PathInfo {
        name: rejected.what.clone(),
        reason: rejected.why.clone(),
        ..v1::PathInfo::default()
    });
    planned.chain(left_out).collect()
}

/// What a path is called in a list.
fn path_name(view: &PeerView, id: PathId) -> String {
    let planned = view.plan.paths.iter().find(|planned| planned.path == id);
    planned.map_or_else(|| format!("path {}", id.0), |planned| planned.kind.to_string())
}

/// What is on its way, as messages.
pub(super) async fn transfers(peers: &Peers) -> Result<Vec<v1::TransferInfo>, Fault> {
    let Transfers { now, incoming, outgoing } = peers.transfers().await?;
    let name = |peer: PeerId| peers.members()[usize::from(peer.0)].name.clone();
    let incoming = incoming.into_iter().map(|transfer| v1::TransferInfo {
        key: Bytes::copy_from_slice(transfer.key.as_bytes()),
        node: transfer.peer.map_or_else(String::new, name),
        direction: "in".into(),
        stage: transfer.stage.into(),
        bytes: transfer.bytes.into(),
        age_ms: now.since(transfer.since).as_millis() as u64,
        left_ms: left_ms(transfer.deadline, now),
        shard: Some(transfer.shard.0.into()),
    });
    let outgoing = outgoing.into_iter().map(|(node, lease)| v1::TransferInfo {
        key: Bytes::copy_from_slice(lease.key.as_bytes()),
        node,
        direction: "out".into(),
        stage: lease.stage.into(),
        bytes: lease.bytes.into(),
        age_ms: now.since(lease.since).as_millis() as u64,
        left_ms: lease.until.map_or(0, |until| left_ms(until, now)),
        shard: None,
    });
    Ok(incoming.chain(outgoing).collect())
}

/// What an operator must know: peers that are down.
pub(super) fn warnings(views: &[PeerView]) -> Vec<(Code, String)> {
    let down = views.iter().filter(|view| matches!(view.reader.circuit, Circuit::Open { .. }));
    down.map(|view| {
        let text = format!("peer {} is down, its blocks miss: {}", view.member.name, reason(view));
        (Code::PeerDown, text)
    })
    .collect()
}

/// The last thing that went wrong with a peer.
pub(super) fn reason(view: &PeerView) -> String {
    let last = view.reader.last_error.as_ref();
    last.map_or_else(String::new, |(kind, why)| format!("{kind}: {why}"))
}

fn place(member: &crate::config::units::Member) -> String {
    let text = member.to_string();
    text.split_once('=').map_or(text.clone(), |(_, place)| place.to_owned())
}

fn left_ms(until: Micros, now: Micros) -> u64 {
    let left: Duration = until.since(now);
    left.as_millis() as u64
}
