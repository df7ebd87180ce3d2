//! The RDMA devices of this node, as paths to peers.
//!
//! Both nodes say what devices they have, and both work out the same plan of paths ([`kv_transport::plan`]): which device
//! of one speaks with which of the other, and under which number. The reader asks for the planned paths, the owner
//! answers. A node without a device has a plan with nothing but TCP.

use std::sync::Arc;
use std::time::Duration;

use kv_tcp::Security;
use kv_transport::link::{Link, Wake};
use kv_transport::plan::{self, NodeFacts, PATHS_MAX, PathKind, PathPlan, PlannedPath};
use kv_transport::reader::PathId;
use kv_verbs::{Device, DeviceConfig, Devices, Endpoint, Probe, Role, Wanted};
use kv_wire::message::PathEnd;

use super::facts;
use super::line::chain;
use crate::config::Config;
use crate::config::units::Rdma;
use crate::node::Node;

/// Devices used at once.
const RAILS_MAX: usize = PATHS_MAX;
/// How long a peer's device may owe an answer, at the least and at the most: one that is busy is not gone.
const SILENCE_MIN: Duration = Duration::from_secs(2);
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// The devices in use, and what peers are told of them. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Rails {
    devices: Arc<[Device]>,
    /// What this node knows about itself.
    pub(super) facts: NodeFacts,
}

/// What this build has a device for.
const KINDS: plan::Devices = plan::Devices { same_device: false, nvlink: false, rdma: true };

/// What RDMA there is here, as far as the configuration allows it; nothing where it is off.
pub fn probe(config: &Config, register_bytes: u64) -> Option<Probe> {
    if config.peers.rdma == Rdma::Off {
        return None;
    }
    let device = config.peers.rdma_device.get().map(|label| label.0.clone());
    let wanted = device.map(|device| Wanted { device: Some(device), ..Wanted::default() });
    let devices = Devices { wanted: wanted.into_iter().collect(), register_bytes, ..Devices::default() };
    Some(devices.probe())
}

impl Rails {
    /// Opens what can be used, and says what cannot and why.
    pub(super) fn open(node: &Node, config: &Config, security: &Security) -> anyhow::Result<Self> {
        let arenas: Vec<_> = node.shards.iter().map(|shard| shard.slab().clone()).collect();
        let bytes = arenas.iter().map(kv_arena::Slab::data_bytes).sum();
        let numa_node = node.tier_notes.first().map(|notes| notes.numa_node);
        let Some(probe) = probe(config, bytes) else {
            let facts = facts::of_this_node(None, &[], numa_node);
            return Ok(Self { devices: Arc::new([]), facts });
        };
        for line in probe.lines() {
            tracing::info!("RDMA: {line}");
        }
        // A block that waits for a device in vain must have time left to come by TCP.
        let silence = (config.peers.fetch_limit.0 / 2).clamp(SILENCE_MIN, SILENCE_MAX);
        let device = DeviceConfig { silence, ..DeviceConfig::default() };
        let mut devices = Vec::new();
        for rail in probe.nearest(numa_node).into_iter().take(RAILS_MAX) {
            match Device::open(rail, &arenas, &device) {
                Ok(device) => {
                    device.notes().iter().for_each(|note| tracing::info!("RDMA: {}: {note}", rail.device));
                    devices.push(device);
                }
                Err(error) => tracing::warn!("RDMA: {} is not used: {}", rail.device, chain(&error)),
            }
        }
        if devices.is_empty() && config.peers.rdma == Rdma::Required {
            anyhow::bail!("peers.rdma is required, and no device can be used: {}", probe.lines().join("; "));
        }
        if !devices.is_empty() && matches!(security, Security::Mutual(_)) {
            tracing::warn!(
                "blocks that move by RDMA are not encrypted; set peers.rdma = off where they must be"
            );
        }
        let open: Vec<String> = devices.iter().map(|device| device.rail().device.clone()).collect();
        let facts = facts::of_this_node(Some(&probe), &open, numa_node);
        Ok(Self { devices: devices.into(), facts })
    }

    /// The numbers that paths besides TCP may have.
    pub(super) fn paths(&self) -> Vec<PathId> {
        let count = if self.devices.is_empty() { 0 } else { PATHS_MAX as u8 };
        (1..=count).map(PathId).collect()
    }

    /// How this node reads from a peer that said this of itself.
    pub(super) fn plan_to(&self, theirs: &NodeFacts) -> PathPlan {
        plan::plan(&self.facts, theirs, KINDS)
    }

    /// How a peer that said this of itself reads from this node.
    pub(super) fn plan_from(&self, theirs: &NodeFacts) -> PathPlan {
        plan::plan(theirs, &self.facts, KINDS)
    }

    /// The reader's end of a planned path, and the words that the owner needs.
    pub(super) fn ask(&self, planned: &PlannedPath) -> Result<(Endpoint, PathEnd), String> {
        let PathKind::Rdma { ours, .. } = &planned.kind else { return Err(NOT_RDMA.into()) };
        let device = self.device(ours)?;
        let opened = Endpoint::open(device, Role::Reader, planned.path.0);
        let (endpoint, words) = opened.map_err(|error| chain(&error))?;
        Ok((endpoint, PathEnd { path: planned.path.0, words }))
    }

    /// The owner's end of a planned path that the reader asks for, connected, and the words that the reader needs.
    pub(super) fn answer(
        &self,
        planned: &PlannedPath,
        words: &[u8],
        wake: Wake,
    ) -> Result<(Box<dyn Link>, PathEnd), String> {
        let PathKind::Rdma { theirs, .. } = &planned.kind else { return Err(NOT_RDMA.into()) };
        let device = self.device(theirs)?;
        let opened = Endpoint::open(device, Role::Owner, planned.path.0);
        let (endpoint, own) = opened.map_err(|error| chain(&error))?;
        let link = endpoint.connect(words, wake).map_err(|error| chain(&error))?;
        Ok((Box::new(link), PathEnd { path: planned.path.0, words: own }))
    }

    fn device(&self, name: &str) -> Result<&Device, String> {
        let device = self.devices.iter().find(|device| device.rail().device == name);
        device.ok_or_else(|| format!("there is no device {name} in use"))
    }
}

const NOT_RDMA: &str = "it is no path by RDMA";
