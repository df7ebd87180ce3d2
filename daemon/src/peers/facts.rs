//! What a node tells its peers about its devices, so that both work out the same paths.
//!
//! It is JSON in the Hello and the Welcome, because later versions will know more. What is not understood, or too
//! long, is as good as nothing: blocks then come by TCP.

use kv_transport::plan::{Distance, NodeFacts, PortState, RdmaFacts};
use kv_verbs::{Probe, Rail};
use serde::{Deserialize, Serialize};

/// Devices of one node; what a node says beyond is passed over.
const DEVICES_MAX: usize = 16;
/// Longest text of a fact, in bytes.
const TEXT_BYTES_MAX: usize = 128;

#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
struct Told {
    host: String,
    numa: Option<u32>,
    rdma: Vec<ToldDevice>,
}

#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
struct ToldDevice {
    name: String,
    fabric: String,
    numa: Option<u32>,
    near: bool,
    gbps: u32,
}

/// What is known about this node.
pub(super) fn of_this_node(probe: Option<&Probe>, open: &[String], memory_numa: Option<u32>) -> NodeFacts {
    let fact = |rail: &Rail| RdmaFacts {
        name: rail.device.clone(),
        fabric: rail.link_layer.map_or_else(String::new, |layer| format!("{layer:?}").to_lowercase()),
        numa: rail.numa_node,
        distance: if rail.numa_node == memory_numa { Distance::Socket } else { Distance::Other },
        port: PortState::Active,
        // A slow or unknown link is still a link.
        gbps: (rail.gbit() as u32).max(1),
    };
    let rails = probe.map_or(&[][..], |probe| &probe.rails);
    let used = rails.iter().filter(|rail| rail.usable.is_ok() && open.contains(&rail.device));
    NodeFacts { host: host(), memory_numa, rdma: used.map(fact).collect(), gpus: Vec::new() }
}

/// Tells hosts apart: the kernel's number of this boot.
fn host() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// As it is said.
pub(super) fn tell(facts: &NodeFacts) -> Vec<u8> {
    let device = |device: &RdmaFacts| ToldDevice {
        name: device.name.clone(),
        fabric: device.fabric.clone(),
        numa: device.numa,
        near: device.distance != Distance::Other,
        gbps: device.gbps,
    };
    let told = Told {
        host: facts.host.clone(),
        numa: facts.memory_numa,
        rdma: facts.rdma.iter().take(DEVICES_MAX).map(device).collect(),
    };
    let bytes = serde_json::to_vec(&told).unwrap_or_default();
    if bytes.len() > kv_wire::frame::FACTS_BYTES_MAX { Vec::new() } else { bytes }
}

/// What a peer said; nothing where that cannot be read.
pub fn hear(bytes: &[u8]) -> NodeFacts {
    let told: Told = serde_json::from_slice(bytes).unwrap_or_default();
    let sane = |text: &str| text.len() <= TEXT_BYTES_MAX && !text.contains(char::is_control);
    if !sane(&told.host) {
        return NodeFacts::default();
    }
    let known = |device: &ToldDevice| sane(&device.name) && sane(&device.fabric) && !device.name.is_empty();
    let device = |device: ToldDevice| RdmaFacts {
        name: device.name,
        fabric: device.fabric,
        numa: device.numa,
        distance: if device.near { Distance::Socket } else { Distance::Other },
        port: PortState::Active,
        gbps: device.gbps,
    };
    let rdma = told.rdma.into_iter().filter(known).take(DEVICES_MAX).map(device).collect();
    NodeFacts { host: told.host, memory_numa: told.numa, rdma, gpus: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_heard() {
        let device = RdmaFacts {
            name: "mlx5_0".into(),
            fabric: "ethernet".into(),
            numa: Some(1),
            distance: Distance::Socket,
            port: PortState::Active,
            gbps: 400,
        };
        let facts =
            NodeFacts { host: "h".into(), memory_numa: Some(1), rdma: vec![device], gpus: Vec::new() };
        assert_eq!(hear(&tell(&facts)), facts);
    }

    #[test]
    fn nonsense_and_excess_are_as_good_as_nothing() {
        for bytes in [&b""[..], b"{", b"[1]", b"\xff\xfe", br#"{"host":5}"#] {
            assert_eq!(hear(bytes), NodeFacts::default());
        }
        let long = format!(r#"{{"host":"{}"}}"#, "h".repeat(TEXT_BYTES_MAX + 1));
        assert_eq!(hear(long.as_bytes()), NodeFacts::default());
        let many: Vec<String> = (0..100).map(|n| format!(r#"{{"name":"d{n}"}}"#)).collect();
        let many = format!(r#"{{"host":"h","rdma":[{}],"gpus":["what is that"]}}"#, many.join(","));
        assert_eq!(hear(many.as_bytes()).rdma.len(), DEVICES_MAX);
        let bad = r#"{"host":"h","rdma":[{"name":"a\nb"},{"name":""},{"name":"ok"}]}"#;
        assert_eq!(hear(bad.as_bytes()).rdma.len(), 1);
    }
}
