//! Which paths there are to a peer, best first, and why: a pure function of what both nodes know about themselves.
//!
//! ```text
//!   same device     both ends use one GPU of one host: a copy inside it
//!   NVLink          a GPU of each end in one NVLink domain
//!   RDMA            pairs of devices on one fabric, the nearest to memory first; equally good ones take turns
//!   TCP             every pair of nodes has it; always last
//! ```
//! Both ends number the paths alike because both begin with the reader's facts: an owner asks for
//! `plan(reader, own)`. What is left out is named as well, with the reason: that is what `kvctl describe peer` shows.

use std::fmt;

use crate::owner::OwnerPath;
use crate::reader::PathId;

/// Paths other than TCP that are worth having at one moment.
pub const PATHS_MAX: usize = 8;

/// What one node knows about itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeFacts {
    /// Tells hosts apart, such as a boot id.
    pub host: String,
    /// NUMA node of the arena.
    pub memory_numa: Option<u32>,
    /// Devices that read remote memory.
    pub rdma: Vec<RdmaFacts>,
    /// GPUs whose memory holds blocks; empty when that is not known.
    pub gpus: Vec<GpuFacts>,
}

/// What is known about an RDMA device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RdmaFacts {
    /// Name, such as `mlx5_0`.
    pub name: String,
    /// Network that it is on: devices of one fabric reach each other.
    pub fabric: String,
    /// Its NUMA node.
    pub numa: Option<u32>,
    /// How far it is from the arena's NUMA node.
    pub distance: Distance,
    /// How its port stands.
    pub port: PortState,
    /// Speed of its link in Gb/s.
    pub gbps: u32,
}

/// What is known about a GPU.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GpuFacts {
    /// Its UUID.
    pub uuid: String,
    /// The NVLink domain it is in.
    pub nvlink_domain: Option<String>,
}

/// How far a device is from memory, by PCIe.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Distance {
    /// Below the same PCIe root.
    Root,
    /// On the same socket.
    Socket,
    /// Across sockets, or nobody knows.
    Other,
}

/// How a port stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortState {
    /// It carries data.
    Active,
    /// It has a link and no address yet, or no subnet manager.
    Initializing,
    /// It has no link.
    Down,
}

/// Which kinds of path this build has a device for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Devices {
    /// Copies inside a GPU.
    pub same_device: bool,
    /// Copies between GPUs.
    pub nvlink: bool,
    /// Verbs.
    pub rdma: bool,
}

/// Where a device is to memory, of both ends the worse.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Nearness {
    Numa,
    Socket,
    Other,
}

/// A kind of path, with its devices: ours, then the peer's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PathKind {
    /// Inside one GPU.
    SameDevice {
        /// Its UUID.
        gpu: String,
    },
    /// Between two GPUs.
    NvLink {
        /// Our UUID.
        ours: String,
        /// The peer's.
        theirs: String,
    },
    /// Between two RDMA devices.
    Rdma {
        /// Name of ours.
        ours: String,
        /// Name of the peer's.
        theirs: String,
    },
    /// Between two sockets.
    Tcp,
}

/// A path that is to be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PlannedPath {
    /// Its number.
    pub path: PathId,
    /// Lower is better; paths of one rank take turns.
    pub rank: u8,
    /// What it is.
    pub kind: PathKind,
    /// Why it stands where it stands.
    pub why: String,
}

/// What is not to be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RejectedPath {
    /// What it would be.
    pub what: String,
    /// Why not.
    pub why: String,
}

/// The paths to a peer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PathPlan {
    /// Best first; the last is TCP.
    pub paths: Vec<PlannedPath>,
    /// Left out.
    pub rejected: Vec<RejectedPath>,
}

/// The paths by which a reader, `ours`, reads from an owner, `theirs`.
pub fn plan(ours: &NodeFacts, theirs: &NodeFacts, devices: Devices) -> PathPlan {
    let mut plan = PathPlan::default();
    plan.gpus(ours, theirs, devices);
    plan.rdma(ours, theirs, devices);
    for extra in plan.paths.drain(plan.paths.len().min(PATHS_MAX)..).collect::<Vec<_>>() {
        plan.reject(extra.kind.to_string(), format!("{PATHS_MAX} paths are enough"));
    }
    let rank = plan.paths.last().map_or(0, |path| path.rank + 1);
    let why = "every pair of nodes has it".into();
    plan.paths.push(PlannedPath { path: PathId::TCP, rank, kind: PathKind::Tcp, why });
    for (path, number) in plan.paths.iter_mut().rev().skip(1).rev().zip(1..) {
        path.path = PathId(number);
    }
    plan
}

impl PathPlan {
    /// The paths other than TCP, for an owner.
    pub fn owner_paths(&self) -> Vec<OwnerPath> {
        let others = self.paths.iter().filter(|path| path.path != PathId::TCP);
        others.map(|path| OwnerPath { path: path.path, rank: path.rank }).collect()
    }

    fn reject(&mut self, what: String, why: String) {
        self.rejected.push(RejectedPath { what, why });
    }

    fn add(&mut self, rank: u8, kind: PathKind, why: String) {
        // Numbered when all are there.
        self.paths.push(PlannedPath { path: PathId::TCP, rank, kind, why });
    }

    fn gpus(&mut self, ours: &NodeFacts, theirs: &NodeFacts, devices: Devices) {
        if ours.gpus.is_empty() || theirs.gpus.is_empty() {
            let whose = if ours.gpus.is_empty() { "here" } else { "at the peer" };
            for what in ["same device", "NVLink"] {
                self.reject(what.into(), format!("no GPU is known {whose}"));
            }
            return;
        }
        let same = ours.gpus.iter().find(|gpu| theirs.gpus.iter().any(|other| other.uuid == gpu.uuid));
        match same {
            Some(_) if ours.host != theirs.host => {
                self.reject("same device".into(), "two hosts claim one GPU".into());
            }
            Some(_) if !devices.same_device => self.reject("same device".into(), NO_DEVICE.into()),
            Some(gpu) => {
                let kind = PathKind::SameDevice { gpu: gpu.uuid.clone() };
                self.add(0, kind, "both ends use this GPU".into());
            }
            None => self.reject("same device".into(), "the ends share no GPU".into()),
        }
        let domain = |gpu: &GpuFacts, other: &GpuFacts| {
            gpu.uuid != other.uuid && gpu.nvlink_domain.is_some() && gpu.nvlink_domain == other.nvlink_domain
        };
        let pair = ours
            .gpus
            .iter()
            .find_map(|gpu| Some((gpu, theirs.gpus.iter().find(|other| domain(gpu, other))?)));
        match pair {
            Some(_) if !devices.nvlink => self.reject("NVLink".into(), NO_DEVICE.into()),
            Some((gpu, other)) => {
                let rank = self.paths.last().map_or(0, |path| path.rank + 1);
                let kind = PathKind::NvLink { ours: gpu.uuid.clone(), theirs: other.uuid.clone() };
                let name = gpu.nvlink_domain.as_deref().unwrap_or_default();
                self.add(rank, kind, format!("both GPUs are in NVLink domain {name}"));
            }
            None => self.reject("NVLink".into(), "no two GPUs of the ends are in one NVLink domain".into()),
        }
    }

    fn rdma(&mut self, ours: &NodeFacts, theirs: &NodeFacts, devices: Devices) {
        if ours.rdma.is_empty() || theirs.rdma.is_empty() {
            let whose = if ours.rdma.is_empty() { "here" } else { "at the peer" };
            return self.reject("RDMA".into(), format!("there is no device {whose}"));
        }
        if !devices.rdma {
            return self.reject("RDMA".into(), NO_DEVICE.into());
        }
        if ours.host == theirs.host {
            return self.reject("RDMA".into(), "one host: bytes would leave it and come back".into());
        }
        let (mine, others) = (self.usable(ours, "here"), self.usable(theirs, "at the peer"));
        let mut pairs = Vec::new();
        // How often each of the peer's devices has a partner: equal ones share the load.
        let mut partners = vec![0usize; others.len()];
        for (near, device) in &mine {
            let reached = others.iter().enumerate().filter(|(_, (_, other))| other.fabric == device.fabric);
            let best = reached
                .min_by_key(|(at, (far, other))| (*far.max(near), partners[*at], u32::MAX - other.gbps));
            let Some((at, (far, other))) = best else {
                let why = format!("no usable device of the peer is on its fabric {}", device.fabric);
                self.reject(format!("RDMA {}", device.name), why);
                continue;
            };
            partners[at] += 1;
            pairs.push((*near.max(far), device.gbps.min(other.gbps), *device, *other));
        }
        pairs.sort_by_key(|(near, gbps, ..)| (*near, u32::MAX - gbps));
        let mut rank = self.paths.last().map_or(0, |path| path.rank + 1);
        let mut last = None;
        for (near, gbps, device, other) in &pairs {
            let class = (*near, *gbps);
            if last.is_some_and(|last| last != class) {
                rank += 1;
            }
            last = Some(class);
            let kind = PathKind::Rdma { ours: device.name.clone(), theirs: other.name.clone() };
            let turns = pairs.iter().filter(|(near, gbps, ..)| (*near, *gbps) == class).count();
            let turns = if turns > 1 { format!(", one of {turns} in rotation") } else { String::new() };
            self.add(rank, kind, format!("{gbps} Gb/s, {near}{turns}"));
        }
    }

    /// The devices of a node that can be used, nearest and fastest first.
    fn usable<'a>(&mut self, node: &'a NodeFacts, whose: &str) -> Vec<(Nearness, &'a RdmaFacts)> {
        let mut usable = Vec::new();
        for device in &node.rdma {
            let why = match device.port {
                PortState::Down => "its port has no link",
                PortState::Initializing => "its port is not ready",
                PortState::Active if device.gbps == 0 => "its link has no speed",
                PortState::Active => {
                    usable.push((Nearness::of(node, device), device));
                    continue;
                }
            };
            self.reject(format!("RDMA {} {whose}", device.name), why.into());
        }
        usable.sort_by_key(|(near, device)| (*near, u32::MAX - device.gbps));
        usable
    }
}

const NO_DEVICE: &str = "this build has no device for it";

impl Nearness {
    fn of(node: &NodeFacts, device: &RdmaFacts) -> Self {
        match device.distance {
            _ if device.numa.is_some() && device.numa == node.memory_numa => Self::Numa,
            Distance::Root | Distance::Socket => Self::Socket,
            Distance::Other => Self::Other,
        }
    }
}

impl fmt::Display for Nearness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Numa => "on memory's NUMA node at both ends",
            Self::Socket => "on memory's socket at both ends",
            Self::Other => "far from memory at one end",
        })
    }
}

impl fmt::Display for PathKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SameDevice { gpu } => write!(f, "same device {gpu}"),
            Self::NvLink { ours, theirs } => write!(f, "NVLink {ours} - {theirs}"),
            Self::Rdma { ours, theirs } => write!(f, "RDMA {ours} - {theirs}"),
            Self::Tcp => f.write_str("TCP"),
        }
    }
}

impl fmt::Display for PathPlan {
    /// A line for each path, best first, then one for each that is left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for PlannedPath { path, kind, why, .. } in &self.paths {
            writeln!(f, "path {}: {kind} ({why})", path.0)?;
        }
        self.rejected.iter().try_for_each(|RejectedPath { what, why }| writeln!(f, "not {what}: {why}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Devices = Devices { same_device: true, nvlink: true, rdma: true };

    fn device(name: &str, numa: u32, gbps: u32) -> RdmaFacts {
        let (name, fabric) = (name.into(), "ib0".into());
        let distance = if numa == 0 { Distance::Root } else { Distance::Other };
        RdmaFacts { name, fabric, numa: Some(numa), distance, port: PortState::Active, gbps }
    }

    fn gpu(uuid: &str, domain: Option<&str>) -> GpuFacts {
        GpuFacts { uuid: uuid.into(), nvlink_domain: domain.map(str::to_owned) }
    }

    fn node(host: &str, rdma: Vec<RdmaFacts>, gpus: Vec<GpuFacts>) -> NodeFacts {
        NodeFacts { host: host.into(), memory_numa: Some(0), rdma, gpus }
    }

    #[test]
    fn plans_read_so() {
        let near = |name| device(name, 0, 400);
        let plain = |host| node(host, vec![near("mlx5_0")], vec![]);
        let down = |port| RdmaFacts { port, ..near("mlx5_1") };
        let no_gpu = "not same device: no GPU is known here\nnot NVLink: no GPU is known here\n";
        let table: Vec<(&str, NodeFacts, NodeFacts, Devices, String)> = vec![
            (
                "nothing but sockets",
                node("a", vec![], vec![]),
                node("b", vec![], vec![]),
                ALL,
                format!(
                    "path 0: TCP (every pair of nodes has it)\n{no_gpu}not RDMA: there is no device here\n"
                ),
            ),
            (
                "one device each",
                plain("a"),
                plain("b"),
                ALL,
                format!(
                    "path 1: RDMA mlx5_0 - mlx5_0 (400 Gb/s, on memory's NUMA node at both ends)\n\
                     path 0: TCP (every pair of nodes has it)\n{no_gpu}"
                ),
            ),
            (
                "a build without verbs",
                plain("a"),
                plain("b"),
                Devices::default(),
                format!(
                    "path 0: TCP (every pair of nodes has it)\n{no_gpu}\
                     not RDMA: this build has no device for it\n"
                ),
            ),
            (
                "one host",
                plain("a"),
                plain("a"),
                ALL,
                format!(
                    "path 0: TCP (every pair of nodes has it)\n{no_gpu}\
                     not RDMA: one host: bytes would leave it and come back\n"
                ),
            ),
            (
                "two near devices take turns, a far one comes after them, ports that are not active do not count",
                node(
                    "a",
                    vec![device("mlx5_9", 1, 400), near("mlx5_0"), near("mlx5_2"), down(PortState::Down)],
                    vec![],
                ),
                node("b", vec![near("mlx5_4"), near("mlx5_5"), down(PortState::Initializing)], vec![]),
                ALL,
                format!(
                    "path 1: RDMA mlx5_0 - mlx5_4 (400 Gb/s, on memory's NUMA node at both ends, one of 2 in rotation)\n\
                     path 2: RDMA mlx5_2 - mlx5_5 (400 Gb/s, on memory's NUMA node at both ends, one of 2 in rotation)\n\
                     path 3: RDMA mlx5_9 - mlx5_4 (400 Gb/s, far from memory at one end)\n\
                     path 0: TCP (every pair of nodes has it)\n{no_gpu}\
                     not RDMA mlx5_1 here: its port has no link\n\
                     not RDMA mlx5_1 at the peer: its port is not ready\n"
                ),
            ),
            (
                "another fabric",
                node("a", vec![RdmaFacts { fabric: "ib1".into(), ..near("mlx5_0") }], vec![]),
                plain("b"),
                ALL,
                format!(
                    "path 0: TCP (every pair of nodes has it)\n{no_gpu}\
                     not RDMA mlx5_0: no usable device of the peer is on its fabric ib1\n"
                ),
            ),
            (
                "NVLink before RDMA",
                node("a", vec![near("mlx5_0")], vec![gpu("g1", None), gpu("g2", Some("d"))]),
                node("b", vec![near("mlx5_0")], vec![gpu("g3", Some("d"))]),
                ALL,
                "path 1: NVLink g2 - g3 (both GPUs are in NVLink domain d)\n\
                 path 2: RDMA mlx5_0 - mlx5_0 (400 Gb/s, on memory's NUMA node at both ends)\n\
                 path 0: TCP (every pair of nodes has it)\n\
                 not same device: the ends share no GPU\n"
                    .into(),
            ),
            (
                "the same device before all",
                node("a", vec![], vec![gpu("g1", Some("d")), gpu("g2", Some("d"))]),
                node("a", vec![], vec![gpu("g1", Some("d"))]),
                ALL,
                "path 1: same device g1 (both ends use this GPU)\n\
                 path 2: NVLink g2 - g1 (both GPUs are in NVLink domain d)\n\
                 path 0: TCP (every pair of nodes has it)\n\
                 not RDMA: there is no device here\n"
                    .into(),
            ),
        ];
        for (name, ours, theirs, devices, wanted) in table {
            assert_eq!(plan(&ours, &theirs, devices).to_string(), wanted, "{name}");
        }
    }

    #[test]
    fn nearness_is_that_of_the_worse_end_and_speed_that_of_the_slower() {
        let socket = RdmaFacts { numa: Some(1), distance: Distance::Socket, ..device("mlx5_0", 0, 400) };
        let unknown = RdmaFacts { numa: None, distance: Distance::Other, ..device("mlx5_0", 0, 200) };
        for (ours, theirs, wanted) in [
            (device("mlx5_0", 0, 400), socket.clone(), "400 Gb/s, on memory's socket at both ends"),
            (socket, unknown.clone(), "200 Gb/s, far from memory at one end"),
            (unknown, device("mlx5_0", 0, 400), "200 Gb/s, far from memory at one end"),
        ] {
            let plan = plan(&node("a", vec![ours], vec![]), &node("b", vec![theirs], vec![]), ALL);
            assert_eq!(plan.paths[0].why, wanted);
        }
    }

    #[test]
    fn a_slower_device_is_no_equal() {
        let ours = node("a", vec![device("slow", 0, 100), device("fast", 0, 400)], vec![]);
        let theirs = node("b", vec![device("x", 0, 400), device("y", 0, 400)], vec![]);
        let ranks: Vec<_> = plan(&ours, &theirs, ALL).owner_paths();
        let wanted = [(1, 0), (2, 1)].map(|(path, rank)| OwnerPath { path: PathId(path), rank });
        assert_eq!(ranks, wanted);
    }

    #[test]
    fn more_paths_than_are_worth_having_are_named() {
        let many = |host| node(host, (0..10).map(|n| device(&format!("mlx5_{n}"), 0, 400)).collect(), vec![]);
        let plan = plan(&many("a"), &many("b"), ALL);
        assert_eq!(plan.paths.len(), PATHS_MAX + 1);
        assert_eq!(plan.paths.last().map(|path| &path.kind), Some(&PathKind::Tcp));
        let enough = plan.rejected.iter().filter(|rejected| rejected.why == "8 paths are enough").count();
        assert_eq!(enough, 2);
    }
}
