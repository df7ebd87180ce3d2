//! The daemons of a run: one alone, or several that are each other's peers.
//!
//! ```text
//!   node-1  <-- 127.0.0.1:P1 -->  node-2      each with directories of its own (places.rs), the same list of
//!      ^----- 127.0.0.1:P3 -----> node-3      members, and a port where the others fetch its blocks
//! ```

use std::ffi::OsString;
use std::net::TcpListener;

use anyhow::Context as _;

use crate::daemon::{Setup, flags};
use crate::places::Places;

/// Most nodes of a run.
pub const NODES_MAX: i64 = 5;
/// What the only node of a run is called.
const ALONE: &str = "kv-local";

/// What node `at` (from 0) of `count` is called.
pub fn name(at: usize, count: usize) -> String {
    if count == 1 { ALONE.to_owned() } else { format!("node-{}", at + 1) }
}

/// How to start each node, with `more` settings for all of them.
pub fn setups(places: &Places, more: &[String]) -> anyhow::Result<Vec<Setup>> {
    let ports = if places.nodes == 1 { Vec::new() } else { free_ports(places.nodes)? };
    let setup = |at: usize| {
        let place = places.of(at);
        let (host, disk) = (places.host.0, places.disk.0);
        let mut args = flags(&place.run_dir, &place.memory_dir, &place.data_dir, host, disk);
        let mut settings = vec![format!("node.name={}", name(at, places.nodes))];
        settings.extend(peers(&ports, at));
        let settings = settings.iter().chain(more);
        args.extend(settings.flat_map(|setting| [OsString::from("--set"), setting.into()]));
        Setup { name: name(at, places.nodes), args, run_dir: place.run_dir, log: Some(place.log) }
    };
    Ok((0..places.nodes).map(setup).collect())
}

/// What makes the node at `ports[at]` a peer of the others; nothing without ports.
fn peers(ports: &[u16], at: usize) -> Vec<String> {
    let Some(own) = ports.get(at) else { return Vec::new() };
    let member = |(at, port): (usize, &u16)| format!("{}=127.0.0.1:{port}", name(at, ports.len()));
    let members: Vec<String> = ports.iter().enumerate().map(member).collect();
    vec![format!("peers.listen=127.0.0.1:{own}"), format!("peers.members={}", members.join(","))]
}

/// Ports that are free now. Each is held until all are found, so that they differ.
fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    let bind = |_| TcpListener::bind("127.0.0.1:0");
    let held: Result<Vec<_>, _> = (0..count).map(bind).collect();
    let port = |one: &TcpListener| one.local_addr().map(|address| address.port());
    let ports = held.and_then(|held| held.iter().map(port).collect());
    ports.context("finding ports of 127.0.0.1 for the nodes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_share_one_list_of_members_and_listen_each_at_their_own_place_in_it() {
        let ports = [7001, 7002, 7003];
        let all = "peers.members=node-1=127.0.0.1:7001,node-2=127.0.0.1:7002,node-3=127.0.0.1:7003";
        for (at, port) in ports.iter().enumerate() {
            assert_eq!(peers(&ports, at), [format!("peers.listen=127.0.0.1:{port}"), all.to_owned()]);
        }
    }

    #[test]
    fn a_node_alone_has_no_peers_and_the_name_it_always_had() {
        assert!(peers(&[], 0).is_empty());
        assert_eq!([name(0, 1), name(0, 2), name(1, 2)], ["kv-local", "node-1", "node-2"]);
    }

    #[test]
    fn free_ports_differ() {
        let ports: std::collections::HashSet<_> = free_ports(5).unwrap().into_iter().collect();
        assert_eq!(ports.len(), 5);
    }
}
