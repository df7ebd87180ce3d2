//! Peers: the other nodes, as several commands speak of them.

use kv_api::v1;

use crate::cmd::describe::missing;
use crate::connect::Daemon;
use crate::exit::{Exit, Failure};
use crate::structured::hex;
use crate::table::{Cell, Kind, column, wide};
use crate::units::{milliseconds, nanoseconds};

/// How a node comes to have peers.
pub(crate) const NO_PEERS: &str = "\
no peers: this node fetches from no other. To change that, name the others in the configuration, as in
  peers.members = [\"node-b=10.0.0.8:9474\"]
and restart kvd; `peers.listen` is for the others to fetch from here";
/// Why nothing may be listed.
pub(crate) const NO_TRANSFERS: &str =
    "no block is on its way from or to a peer now; `kvctl get peers` shows who there is";

/// As `get peers` lists them.
pub(crate) const PEERS: Kind<v1::PeerInfo> = Kind {
    noun: "peer",
    name: |peer| peer.node.clone(),
    columns: &[
        column("NODE", |peer, _| Cell::text(&peer.node)),
        column("STATE", |peer, _| Cell::state(&peer.state)),
        column("PATHS", |peer, _| Cell::text(peer.paths.join(","))),
        column("RTT", |peer, _| match peer.rtt_us {
            0 => Cell::number(u64::MAX, "-".into()),
            rtt_us => Cell::number(rtt_us, round_trip(rtt_us)),
        }),
        column("IN", |peer, _| Cell::count(peer.blocks_in)),
        column("IN-BYTES", |peer, _| Cell::bytes(peer.bytes_in)),
        column("OUT", |peer, _| Cell::count(peer.blocks_out)),
        column("OUT-BYTES", |peer, _| Cell::bytes(peer.bytes_out)),
        column("MISSES", |peer, _| Cell::count(peer.misses.values().sum::<u64>())),
        column("STRIKES", |peer, _| Cell::count(peer.strikes)),
        wide("ADDRESS", |peer, _| Cell::text(&peer.address)),
        wide("VERSION", |peer, _| Cell::count(peer.version)),
        wide("EPOCH", |peer, _| Cell::count(peer.epoch)),
        wide("WANTED", |peer, _| Cell::count(peer.wanted)),
        wide("READING", |peer, _| Cell::count(peer.reading)),
        wide("HELD", |peer, _| Cell::count(peer.held)),
        wide("HELD-BYTES", |peer, _| Cell::bytes(peer.held_bytes)),
        wide("REASON", |peer, _| Cell::text(why_so(peer))),
    ],
};

/// Time of a question and its answer.
pub(crate) fn round_trip(us: u64) -> String {
    nanoseconds(us.saturating_mul(1_000))
}

/// Why a peer is in its state, and when that may change.
pub(crate) fn why_so(peer: &v1::PeerInfo) -> String {
    let again = match peer.retry_ms {
        0 => String::new(),
        retry_ms => format!("tried again in {}", milliseconds(retry_ms)),
    };
    [peer.reason.as_str(), again.as_str()]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

/// As `get transfers` lists them.
pub(crate) const TRANSFERS: Kind<v1::TransferInfo> = Kind {
    noun: "transfer",
    name: |transfer| hex(&transfer.key),
    columns: &[
        column("KEY", |transfer, _| Cell::text(hex(&transfer.key))),
        column("NODE", |transfer, _| Cell::text(&transfer.node)),
        column("DIR", |transfer, _| Cell::text(&transfer.direction)),
        column("STAGE", |transfer, _| Cell::text(&transfer.stage)),
        column("BYTES", |transfer, _| Cell::bytes(transfer.bytes)),
        column("AGE", |transfer, _| Cell::milliseconds(transfer.age_ms)),
        column("LEFT", |transfer, _| Cell::milliseconds(transfer.left_ms)),
        column("SHARD", |transfer, _| match transfer.shard {
            Some(shard) => Cell::count(shard),
            None => Cell::number(u64::MAX, "-".into()),
        }),
    ],
};

/// The peers of a daemon; `None` when it is of a version that knows of none.
pub(crate) async fn known(daemon: &Daemon) -> Result<Option<Vec<v1::PeerInfo>>, Failure> {
    let request = daemon.request(v1::ListPeersRequest {});
    let answer = daemon.within_if_known(daemon.admin().list_peers(request)).await?;
    Ok(answer.map(|answer| answer.peers))
}

/// The peer called so, `peer/` before its name or not.
pub(crate) async fn named(daemon: &Daemon, name: &str) -> Result<v1::PeerInfo, Failure> {
    let request = daemon.request(v1::ListPeersRequest {});
    let peers = daemon.within(daemon.admin().list_peers(request)).await?.peers;
    pick(&peers, name).cloned()
}

/// The peer called so among these.
pub(crate) fn pick<'a>(peers: &'a [v1::PeerInfo], name: &str) -> Result<&'a v1::PeerInfo, Failure> {
    let name = name.strip_prefix("peer/").unwrap_or(name);
    if peers.is_empty() {
        return Err(Failure::new(Exit::NotFound, format!("there is no peer `{name}`: this node has none"))
            .help("name the others with peers.members in the configuration, and restart kvd"));
    }
    peers.iter().find(|peer| peer.node == name).ok_or_else(|| missing("peer", name, "kvctl get peers"))
}

/// Whether it may take blocks, as far as is known: one that was not asked yet may well.
pub(crate) fn may_answer(peer: &v1::PeerInfo) -> bool {
    !matches!(peer.state.as_str(), "down" | "leaving")
}

/// `node-c is down: connection refused; tried again in 4.0s`.
pub(crate) fn in_words(peer: &v1::PeerInfo) -> String {
    let why = match why_so(peer) {
        why if why.is_empty() => why,
        why => format!(": {why}"),
    };
    format!("{} is {}{why}", peer.node, peer.state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_is_down_says_why_and_until_when() {
        let peer = v1::PeerInfo { node: "node-c".into(), state: "down".into(), ..Default::default() };
        assert_eq!(in_words(&peer), "node-c is down");
        let peer = v1::PeerInfo { reason: "connection refused".into(), retry_ms: 4_000, ..peer };
        assert_eq!(in_words(&peer), "node-c is down: connection refused; tried again in 4.0s");
        assert!(!may_answer(&peer) && may_answer(&v1::PeerInfo { state: "idle".into(), ..peer }));
    }

    #[test]
    fn a_peer_goes_by_its_name_with_or_without_noun() {
        let peers = [v1::PeerInfo { node: "node-b".into(), ..Default::default() }];
        assert_eq!(pick(&peers, "peer/node-b").unwrap().node, "node-b");
        assert!(pick(&peers, "node-x").unwrap_err().help.unwrap().contains("kvctl get peers"));
        assert!(pick(&[], "node-b").unwrap_err().help.unwrap().contains("peers.members"));
    }
}
