//! The RDMA devices of this node, as paths to peers.
//!
//! Path 1 is the first device, path 2 the second, and so on; path 0 is TCP. A path is asked for by the reader, and the
//! owner answers with the device that has the same place in its own list, so that two nodes of one kind use all of
//! their devices. A node without a device says so, and blocks move by TCP.

use kv_tcp::Security;
use kv_transport::link::{Link, Wake};
use kv_transport::owner::OwnerPath;
use kv_transport::reader::PathId;
use kv_verbs::{Device, DeviceConfig, Devices, Endpoint, Probe, Role, Wanted};
use kv_wire::message::PathEnd;

use super::line::chain;
use crate::config::Config;
use crate::config::units::Rdma;
use crate::node::Node;

/// Devices used at once.
const RAILS_MAX: usize = 8;

/// The devices in use, by path. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Rails(Vec<Device>);

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
        let Some(probe) = probe(config, bytes) else { return Ok(Self::default()) };
        for line in probe.lines() {
            tracing::info!("RDMA: {line}");
        }
        let numa_node = node.tier_notes.first().map(|notes| notes.numa_node);
        let mut devices = Vec::new();
        for rail in probe.nearest(numa_node).into_iter().take(RAILS_MAX) {
            match Device::open(rail, &arenas, &DeviceConfig::default()) {
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
        Ok(Self(devices))
    }

    /// What paths they are.
    pub(super) fn paths(&self) -> Vec<PathId> {
        (1..=self.0.len() as u8).map(PathId).collect()
    }

    /// The paths that a reader may ask for, all alike.
    pub(super) fn served_paths(&self) -> Vec<OwnerPath> {
        let count = if self.0.is_empty() { 0 } else { RAILS_MAX as u8 };
        (1..=count).map(|path| OwnerPath { path: PathId(path), rank: 0 }).collect()
    }

    /// Their names, by path from 1.
    pub(super) fn names(&self) -> Vec<String> {
        self.0.iter().map(|device| device.rail().device.clone()).collect()
    }

    /// The reader's end of a path, and the words that the owner needs.
    pub(super) fn ask(&self, path: PathId) -> Result<(Endpoint, PathEnd), String> {
        let device = self.device(path).ok_or("there is no such device")?;
        let opened = Endpoint::open(device, Role::Reader, path.0);
        let (endpoint, words) = opened.map_err(|error| chain(&error))?;
        Ok((endpoint, PathEnd { path: path.0, words }))
    }

    /// The owner's end of a path that a reader asks for, connected, and the words that the reader needs.
    pub(super) fn answer(&self, end: &PathEnd, wake: Wake) -> Result<(Box<dyn Link>, PathEnd), String> {
        let device = self.device(PathId(end.path)).ok_or("this node has no device for it")?;
        let opened = Endpoint::open(device, Role::Owner, end.path);
        let (endpoint, words) = opened.map_err(|error| chain(&error))?;
        let link = endpoint.connect(&end.words, wake).map_err(|error| chain(&error))?;
        Ok((Box::new(link), PathEnd { path: end.path, words }))
    }

    fn device(&self, path: PathId) -> Option<&Device> {
        let at = usize::from(path.0).checked_sub(1)?;
        self.0.get(at % self.0.len().max(1))
    }
}
