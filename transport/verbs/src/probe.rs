//! What RDMA there is on this machine: every device and port, which of them would be used, and why not the others.
//!
//! ```text
//!  sysfs    class/infiniband/<device>/ports/<port>/{state,link_layer,rate,gids/*,gid_attrs/*}     what is there
//!           class/infiniband/<device>/device/numa_node, or for rxe: parent -> class/net/<it>/device, upwards
//!  library  libibverbs opens the device and says what it can
//!  limits   RLIMIT_MEMLOCK and CAP_IPC_LOCK, against the memory that is to be registered
//! ```
//! Nothing is kept open. What is decided here is text for operators first, and a choice second.

use std::fmt;
use std::fs;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use rustix::process::Resource;

use crate::handles::Context;
use crate::sys;
use crate::words::LinkLayer;

/// Which device is to be used, as `device`, `device:port` or `device:port:gid`. The default is any.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Wanted {
    /// Its name.
    pub device: Option<String>,
    /// Its port.
    pub port: Option<u8>,
    /// The entry of the port's GID table.
    pub gid_index: Option<u8>,
}

impl std::str::FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let device = parts.next().filter(|name| !name.is_empty()).map(str::to_owned);
        let mut number = |what: &str| {
            let part = parts.next().map(|part| part.parse().map_err(|_| format!("{part:?} is no {what}")));
            part.transpose()
        };
        let (port, gid_index) = (number("port number")?, number("GID index")?);
        if device.is_none() || parts.next().is_some() {
            return Err(format!("{text:?} is not of the form device:port:gid"));
        }
        Ok(Self { device, port, gid_index })
    }
}

/// What to look at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Devices {
    /// Where sysfs is.
    pub sysfs: PathBuf,
    /// What is wanted; several, or none for all.
    pub wanted: Vec<Wanted>,
    /// How much memory is to be registered, with each device.
    pub register_bytes: u64,
}

impl Default for Devices {
    fn default() -> Self {
        Self { sysfs: "/sys".into(), wanted: Vec::new(), register_bytes: 0 }
    }
}

/// How a port is addressed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gid {
    /// Its place in the port's table.
    pub index: u8,
    /// It.
    pub address: [u8; 16],
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = Ipv6Addr::from(self.address);
        match address.to_ipv4_mapped() {
            Some(four) => write!(f, "{four} (GID {})", self.index),
            None => write!(f, "{address} (GID {})", self.index),
        }
    }
}

/// How a device lets a peer read one block and nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exposure {
    /// By memory windows of type 2: one request each, and the key belongs to one queue pair.
    Windows,
    /// By a memory region for each block, which costs a system call each way.
    Regions,
}

/// What a device can do, as far as it concerns us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capabilities {
    /// How blocks are exposed.
    pub exposure: Exposure,
    /// Windows there can be.
    pub windows_max: u32,
    /// Memory regions there can be.
    pub regions_max: u32,
    /// Requests that a queue pair takes at once.
    pub requests_max: u32,
    /// Completions that a queue holds.
    pub completions_max: u32,
    /// Reads of a peer that a queue pair answers at once.
    pub reads_answered: u8,
    /// Reads that a queue pair has under way at once.
    pub reads_asked: u8,
    /// Longest single read.
    pub message_bytes_max: u32,
    /// Longest payload of a packet: 1 to 5 for 256 to 4096 bytes.
    pub mtu: u8,
    /// Address within an InfiniBand subnet.
    pub lid: u16,
}

/// A port of a device: one path to each peer.
#[derive(Clone, PartialEq, Debug)]
pub struct Rail {
    /// Name of the device.
    pub device: String,
    /// Number of the port.
    pub port: u8,
    /// State of the port, in the kernel's words.
    pub state: String,
    /// What carries its packets; `None` when that is nothing we know.
    pub link_layer: Option<LinkLayer>,
    /// Speed, in the kernel's words.
    pub rate: String,
    /// Network interface of the chosen address.
    pub netdev: Option<String>,
    /// NUMA node of the device.
    pub numa_node: Option<u32>,
    /// The chosen address.
    pub gid: Option<Gid>,
    /// What the library says of it.
    pub capabilities: Option<Capabilities>,
    /// Whether it is used, or why not.
    pub usable: Result<(), String>,
    pub(crate) sysfs: PathBuf,
}

impl Rail {
    /// Its speed in Gbit/s; 0 when the kernel does not say.
    pub fn gbit(&self) -> f64 {
        self.rate.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0.0)
    }
}

impl fmt::Display for Rail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {}: {}", self.device, self.port, self.state)?;
        match self.link_layer {
            Some(LinkLayer::InfiniBand) => f.write_str(", InfiniBand")?,
            Some(LinkLayer::Ethernet) => f.write_str(", RoCE")?,
            None => {}
        }
        if !self.rate.is_empty() {
            write!(f, ", {}", self.rate)?;
        }
        if let Some(capabilities) = &self.capabilities {
            write!(f, ", MTU {}", mtu_bytes(capabilities.mtu))?;
        }
        if let Some(gid) = &self.gid {
            write!(f, ", {gid}")?;
        }
        if let Some(netdev) = &self.netdev {
            write!(f, ", {netdev}")?;
        }
        match self.numa_node {
            Some(node) => write!(f, ", NUMA node {node}")?,
            None => f.write_str(", NUMA node unknown")?,
        }
        match (&self.usable, self.capabilities.map(|capabilities| capabilities.exposure)) {
            (Ok(()), Some(Exposure::Windows)) => {
                f.write_str(": used, has memory windows (tried when it is opened)")
            }
            (Ok(()), _) => f.write_str(": used, has no memory windows of type 2: a region for each block"),
            (Err(why), _) => write!(f, ": not used, {why}"),
        }
    }
}

/// Payload of a packet, as the verbs count it.
pub(crate) fn mtu_bytes(mtu: u8) -> u32 {
    128 << mtu
}

/// What was found.
#[derive(Clone, PartialEq, Debug)]
pub struct Probe {
    /// Every port of every device, in the order of their names.
    pub rails: Vec<Rail>,
    /// Why there is no RDMA at all, and what would bring it; `None` when there is.
    pub missing: Option<String>,
}

impl Probe {
    /// The ports that are used.
    pub fn usable(&self) -> impl Iterator<Item = &Rail> {
        self.rails.iter().filter(|rail| rail.usable.is_ok())
    }

    /// The ports that are used, those of this NUMA node first, then those of an unknown one; the faster first
    /// within each.
    pub fn nearest(&self, numa_node: Option<u32>) -> Vec<&Rail> {
        let mut rails: Vec<&Rail> = self.usable().collect();
        let distance = |rail: &Rail| match (rail.numa_node, numa_node) {
            (Some(a), Some(b)) => u8::from(a != b) * 2,
            _ => 1,
        };
        rails.sort_by(|a, b| distance(a).cmp(&distance(b)).then(b.gbit().total_cmp(&a.gbit())));
        rails
    }

    /// All of it in words, one line each.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.rails.iter().map(Rail::to_string).collect();
        lines.extend(self.missing.iter().map(|why| format!("no RDMA: {why}")));
        lines
    }
}

impl Devices {
    /// Looks at the machine.
    pub fn probe(&self) -> Probe {
        let limit = memlock_missing(self.register_bytes, memlock_bytes(), has_ipc_lock());
        match sys::library() {
            Ok(library) => self.decide(&limit, |device, port| {
                let context = Context::open(library, device).map_err(|error| {
                    format!(
                        "it cannot be opened ({error}); its /dev/infiniband/uverbs file must be accessible"
                    )
                })?;
                let context = context.ok_or(
                    "libibverbs has no driver for it (package ibverbs-providers or rdma-core)".to_owned(),
                )?;
                capabilities(&context, port)
            }),
            Err(why) => {
                let mut probe = self.decide(&limit, |_, _| Err("there is no RDMA library".to_owned()));
                probe.missing = Some(format!("{why} (package libibverbs1 brings it)"));
                probe
            }
        }
    }

    /// What is to be made of sysfs and of the library's answers.
    fn decide(
        &self,
        memlock: &Option<String>,
        query: impl Fn(&str, u8) -> Result<Capabilities, String>,
    ) -> Probe {
        let class = self.sysfs.join("class/infiniband");
        let mut rails = Vec::new();
        for device in names(&class) {
            let mut ports: Vec<u8> = names(&class.join(&device).join("ports"))
                .iter()
                .filter_map(|name| name.parse().ok())
                .collect();
            ports.sort_unstable();
            rails.extend(ports.into_iter().map(|port| self.rail(&device, port, memlock, &query)));
        }
        let missing = match rails.is_empty() {
            true => Some(format!("the kernel has no RDMA device ({} is empty or missing)", class.display())),
            false => rails.iter().all(|rail| rail.usable.is_err()).then(|| "no port can be used".to_owned()),
        };
        Probe { rails, missing }
    }

    fn rail(
        &self,
        device: &str,
        port: u8,
        memlock: &Option<String>,
        query: &impl Fn(&str, u8) -> Result<Capabilities, String>,
    ) -> Rail {
        let dir = self.sysfs.join("class/infiniband").join(device);
        let at_port = dir.join("ports").join(port.to_string());
        let link_layer = match text(&at_port.join("link_layer")).as_str() {
            "InfiniBand" => Some(LinkLayer::InfiniBand),
            "Ethernet" => Some(LinkLayer::Ethernet),
            _ => None,
        };
        let state = text(&at_port.join("state"));
        // "4: ACTIVE"
        let state = state.split_once(": ").map_or(state.as_str(), |(_, word)| word).to_lowercase();
        let wanted = |wanted: &&Wanted| {
            wanted.device.as_deref().is_none_or(|name| name == device)
                && wanted.port.is_none_or(|number| number == port)
        };
        let wanted = self.wanted.iter().find(wanted);
        let gid = link_layer
            .and_then(|layer| choose_gid(&at_port, layer, wanted.and_then(|wanted| wanted.gid_index)));
        let netdev = gid.map(|gid| text(&at_port.join("gid_attrs/ndevs").join(gid.index.to_string())));
        let capabilities = query(device, port);
        let usable = match () {
            () if !self.wanted.is_empty() && wanted.is_none() => {
                Err("the configuration names others".to_owned())
            }
            () if link_layer.is_none() => Err("its link layer is unknown".to_owned()),
            () if state != "active" => Err("the port is not active".to_owned()),
            () if gid.is_none() => Err(match wanted.and_then(|wanted| wanted.gid_index) {
                Some(index) => format!("GID {index} is empty or not of RoCE v2"),
                None => {
                    "the port has no RoCE v2 address (give its network interface an IP address)".to_owned()
                }
            }),
            () => match (&capabilities, memlock) {
                (Err(why), _) => Err(why.clone()),
                (Ok(_), Some(why)) => Err(why.clone()),
                (Ok(_), None) => Ok(()),
            },
        };
        Rail {
            device: device.to_owned(),
            port,
            state,
            link_layer,
            rate: text(&at_port.join("rate")),
            netdev: netdev.filter(|name| !name.is_empty()),
            numa_node: numa_node(&self.sysfs, device),
            gid,
            capabilities: capabilities.ok(),
            usable,
            sysfs: self.sysfs.clone(),
        }
    }
}

/// Directory entries in order; those of mlx5_2 come before those of mlx5_10.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let digits = |name: &str| name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    names.sort_by_cached_key(|name| {
        let (stem, number) = name.split_at(digits(name));
        (stem.to_owned(), number.parse::<u64>().unwrap_or(0), name.clone())
    });
    names
}

/// A file of sysfs; empty when it is not there or says nothing.
fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The address that a peer should use: an IPv4 one of RoCE v2 before an IPv6 one before a link-local one.
pub(crate) fn choose_gid(at_port: &Path, layer: LinkLayer, wanted: Option<u8>) -> Option<Gid> {
    let indices = names(&at_port.join("gids")).into_iter().filter_map(|name| name.parse().ok());
    let known = indices.filter(|index| wanted.is_none_or(|wanted| wanted == *index));
    let ranked = known.filter_map(|index: u8| {
        let gid = Gid { index, address: gid_at(at_port, index)? };
        Some((gid_rank(at_port, layer, &gid)?, gid))
    });
    ranked.min_by_key(|(rank, gid)| (*rank, gid.index)).map(|(_, gid)| gid)
}

/// An entry of the table; `None` when it is empty.
pub(crate) fn gid_at(at_port: &Path, index: u8) -> Option<[u8; 16]> {
    let text = text(&at_port.join("gids").join(index.to_string()));
    let address: Ipv6Addr = text.parse().ok()?;
    (!address.is_unspecified()).then(|| address.octets())
}

fn gid_rank(at_port: &Path, layer: LinkLayer, gid: &Gid) -> Option<u8> {
    if layer == LinkLayer::InfiniBand {
        return Some(0);
    }
    // An entry of another network namespace has no type for us. Version 1 is not routed, and goes away.
    let kind = text(&at_port.join("gid_attrs/types").join(gid.index.to_string()));
    let address = Ipv6Addr::from(gid.address);
    match () {
        () if kind != "RoCE v2" => None,
        () if address.to_ipv4_mapped().is_some() => Some(1),
        () if !address.is_unicast_link_local() => Some(2),
        () => Some(3),
    }
}

/// NUMA node of a device: its own word, or that of the network card beneath it, or of a bus above that.
fn numa_node(sysfs: &Path, device: &str) -> Option<u32> {
    let dir = sysfs.join("class/infiniband").join(device);
    let node = |path: &Path| text(&path.join("numa_node")).parse::<u32>().ok();
    if let Some(node) = node(&dir.join("device")) {
        return Some(node);
    }
    let parent = text(&dir.join("parent"));
    if parent.is_empty() || parent.contains('/') {
        return None;
    }
    let card = fs::canonicalize(sysfs.join("class/net").join(parent).join("device")).ok()?;
    let root = fs::canonicalize(sysfs).ok()?;
    card.ancestors().take_while(|path| path.starts_with(&root)).find_map(node)
}

/// The CPUs of a NUMA node.
pub(crate) fn cpus_of_node(sysfs: &Path, node: u32) -> Vec<usize> {
    let list = text(&sysfs.join(format!("devices/system/node/node{node}/cpulist")));
    let mut cpus = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        if let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) {
            cpus.extend(first..=last.min(first + 4096));
        }
    }
    cpus
}

/// What the library says of a port.
fn capabilities(context: &Context, port: u8) -> Result<Capabilities, String> {
    if !context.has_reliable_connections() {
        return Err("it has no reliable connections (such as EFA or iWARP)".to_owned());
    }
    let said = |error: std::io::Error| format!("it cannot be queried ({error})");
    let device = context.device_attr().map_err(said)?;
    let at_port = context.port_attr(port).map_err(said)?;
    if at_port.state != sys::PORT_ACTIVE {
        return Err("the port is not active".to_owned());
    }
    let count = |number: i32| number.max(0) as u32;
    let windows = sys::CAP_MEM_WINDOW_TYPE_2A | sys::CAP_MEM_WINDOW_TYPE_2B;
    let exposure = match device.device_cap_flags & windows != 0 && device.max_mw > 0 {
        true => Exposure::Windows,
        false => Exposure::Regions,
    };
    Ok(Capabilities {
        exposure,
        windows_max: count(device.max_mw),
        regions_max: count(device.max_mr),
        requests_max: count(device.max_qp_wr),
        completions_max: count(device.max_cqe),
        reads_answered: device.max_qp_rd_atom.clamp(1, 255) as u8,
        reads_asked: device.max_qp_init_rd_atom.clamp(1, 255) as u8,
        message_bytes_max: at_port.max_msg_sz.max(1 << 20),
        mtu: at_port.active_mtu.clamp(1, 5) as u8,
        lid: at_port.lid,
    })
}

/// Bytes that this process may pin; `None` without a limit.
fn memlock_bytes() -> Option<u64> {
    rustix::process::getrlimit(Resource::Memlock).current
}

/// Whether the limit does not count for this process.
fn has_ipc_lock() -> bool {
    const CAP_IPC_LOCK: u64 = 1 << 14;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|set| set & CAP_IPC_LOCK != 0)
}

/// Why memory of that size cannot be registered.
fn memlock_missing(bytes: u64, limit: Option<u64>, exempt: bool) -> Option<String> {
    let limit = limit.filter(|limit| !exempt && *limit < bytes)?;
    Some(format!(
        "{} MiB are to be registered and RLIMIT_MEMLOCK is {} KiB; raise `ulimit -l` (LimitMEMLOCK=infinity) \
         or give CAP_IPC_LOCK",
        bytes >> 20,
        limit >> 10
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn can() -> Capabilities {
        Capabilities {
            exposure: Exposure::Windows,
            windows_max: 1 << 16,
            regions_max: 1 << 16,
            requests_max: 1 << 15,
            completions_max: 1 << 22,
            reads_answered: 16,
            reads_asked: 16,
            message_bytes_max: 1 << 30,
            mtu: 5,
            lid: 0,
        }
    }

    struct Fixture(tempfile::TempDir);

    impl Fixture {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }

        fn port(&self, device: &str, port: u8, state: &str, layer: &str, gids: &[(u8, &str, &str)]) {
            let at = format!("class/infiniband/{device}/ports/{port}");
            self.put(&format!("{at}/state"), state);
            self.put(&format!("{at}/link_layer"), layer);
            self.put(&format!("{at}/rate"), "400 Gb/sec (4X NDR)");
            for index in 0..5u8 {
                let (_, gid, kind) = gids.iter().find(|gid| gid.0 == index).unwrap_or(&(0, "::", ""));
                self.put(&format!("{at}/gids/{index}"), gid);
                if !kind.is_empty() {
                    self.put(&format!("{at}/gid_attrs/types/{index}"), kind);
                    self.put(&format!("{at}/gid_attrs/ndevs/{index}"), "eth0");
                }
            }
        }

        fn probe(&self, wanted: &[&str]) -> Probe {
            self.devices(wanted).decide(&None, |_, _| Ok(can()))
        }

        fn devices(&self, wanted: &[&str]) -> Devices {
            let wanted = wanted.iter().map(|text| text.parse().unwrap()).collect();
            Devices { sysfs: self.0.path().to_owned(), wanted, register_bytes: 0 }
        }
    }

    const V4: &str = "0000:0000:0000:0000:0000:ffff:0a4d:0001";
    const LOCAL: &str = "fe80:0000:0000:0000:5054:00ff:fe77:0000";
    const ROCE: [(u8, &str, &str); 4] =
        [(0, LOCAL, "IB/RoCE v1"), (1, LOCAL, "RoCE v2"), (2, V4, "IB/RoCE v1"), (3, V4, "RoCE v2")];

    #[test]
    fn an_ipv4_address_of_roce_v2_is_preferred_and_told() {
        let fixture = Fixture::new();
        fixture.port("mlx5_0", 1, "4: ACTIVE", "Ethernet", &ROCE);
        fixture.put("class/infiniband/mlx5_0/device/numa_node", "1");
        let probe = fixture.probe(&[]);
        assert_eq!(
            probe.lines(),
            [
                "mlx5_0 port 1: active, RoCE, 400 Gb/sec (4X NDR), MTU 4096, 10.77.0.1 (GID 3), eth0, NUMA node 1: \
              used, has memory windows (tried when it is opened)"
            ]
        );
        assert_eq!((probe.rails[0].gbit(), &probe.missing), (400.0, &None));
        let named = fixture.probe(&["mlx5_0:1:1"]);
        assert_eq!(named.rails[0].gid.unwrap().to_string(), "fe80::5054:ff:fe77:0 (GID 1)");
        let version_one = fixture.probe(&["mlx5_0:1:2"]);
        assert_eq!(version_one.rails[0].usable, Err("GID 2 is empty or not of RoCE v2".to_owned()));
    }

    #[test]
    fn every_reason_not_to_use_a_port_is_told() {
        let fixture = Fixture::new();
        let empty = fixture.probe(&[]);
        let class = fixture.0.path().join("class/infiniband");
        let why = format!("the kernel has no RDMA device ({} is empty or missing)", class.display());
        assert_eq!(empty.lines(), [format!("no RDMA: {why}")]);

        fixture.port("mlx5_10", 1, "4: ACTIVE", "InfiniBand", &[(0, LOCAL, "IB/RoCE v1")]);
        fixture.port("mlx5_2", 1, "1: DOWN", "Ethernet", &ROCE);
        fixture.port("mlx5_3", 1, "4: ACTIVE", "Ethernet", &[]);
        fixture.port("odd0", 1, "4: ACTIVE", "Pigeons", &[]);
        let probe = fixture.probe(&[]);
        let why: Vec<_> = probe.rails.iter().map(|rail| (&*rail.device, rail.usable.clone())).collect();
        let no_address = "the port has no RoCE v2 address (give its network interface an IP address)";
        let expected = [
            ("mlx5_2", Err("the port is not active".to_owned())),
            ("mlx5_3", Err(no_address.to_owned())),
            ("mlx5_10", Ok(())),
            ("odd0", Err("its link layer is unknown".to_owned())),
        ];
        assert_eq!(why, expected);
        let others = fixture.probe(&["mlx5_3"]);
        assert_eq!(others.rails[2].usable, Err("the configuration names others".to_owned()));
        assert_eq!(others.missing.as_deref(), Some("no port can be used"));

        let sick = fixture.devices(&[]).decide(&None, |_, _| Err("it cannot be opened".to_owned()));
        assert_eq!(sick.rails[2].usable, Err("it cannot be opened".to_owned()));
        let limit = memlock_missing(64 << 30, Some(8 << 20), false);
        let small = fixture.devices(&[]).decide(&limit, |_, _| Ok(can()));
        assert!(small.lines()[2].ends_with(
            "not used, 65536 MiB are to be registered and RLIMIT_MEMLOCK is 8192 KiB; raise `ulimit -l` \
             (LimitMEMLOCK=infinity) or give CAP_IPC_LOCK"
        ));
        assert_eq!(memlock_missing(64 << 30, Some(8 << 20), true), None);
        assert_eq!(memlock_missing(64 << 30, None, false), None);
    }

    #[test]
    fn the_numa_node_of_rxe_is_that_of_the_card_beneath() {
        let fixture = Fixture::new();
        fixture.port("rxe0", 1, "4: ACTIVE", "Ethernet", &ROCE);
        fixture.put("class/infiniband/rxe0/parent", "eth0");
        fixture.put("devices/pci0000:20/0000:21:00.0/numa_node", "1");
        fs::create_dir_all(fixture.0.path().join("devices/pci0000:20/0000:21:00.0/virtio1")).unwrap();
        fs::create_dir_all(fixture.0.path().join("class/net/eth0")).unwrap();
        let card = fixture.0.path().join("devices/pci0000:20/0000:21:00.0/virtio1");
        symlink(card, fixture.0.path().join("class/net/eth0/device")).unwrap();
        assert_eq!(fixture.probe(&[]).rails[0].numa_node, Some(1));
        // "unknown" in the kernel's words
        fixture.put("devices/pci0000:20/0000:21:00.0/numa_node", "-1");
        assert_eq!(fixture.probe(&[]).rails[0].numa_node, None);
        fixture.put("class/infiniband/rxe0/parent", "../../../devices");
        assert_eq!(fixture.probe(&[]).rails[0].numa_node, None);
    }

    #[test]
    fn the_nearest_come_first_and_the_faster_of_them() {
        let fixture = Fixture::new();
        for (device, node, rate) in [("mlx5_0", "0", "200"), ("mlx5_1", "1", "100"), ("mlx5_2", "1", "400")] {
            fixture.port(device, 1, "4: ACTIVE", "Ethernet", &ROCE);
            fixture.put(&format!("class/infiniband/{device}/device/numa_node"), node);
            fixture.put(&format!("class/infiniband/{device}/ports/1/rate"), &format!("{rate} Gb/sec"));
        }
        let probe = fixture.probe(&[]);
        let names = |node| probe.nearest(node).iter().map(|rail| rail.device.clone()).collect::<Vec<_>>();
        assert_eq!(names(Some(1)), ["mlx5_2", "mlx5_1", "mlx5_0"]);
        assert_eq!(names(Some(0)), ["mlx5_0", "mlx5_2", "mlx5_1"]);
        assert_eq!(names(None), ["mlx5_2", "mlx5_0", "mlx5_1"]);
    }

    #[test]
    fn what_is_wanted_is_said_in_one_word() {
        let wanted = |text: &str| text.parse::<Wanted>();
        let all = Wanted { device: Some("mlx5_0".into()), port: Some(1), gid_index: Some(3) };
        assert_eq!(wanted("mlx5_0:1:3"), Ok(all));
        assert_eq!(wanted("mlx5_0").unwrap().port, None);
        assert_eq!(wanted("mlx5_0:x").unwrap_err(), "\"x\" is no port number");
        assert_eq!(wanted("a:1:2:3").unwrap_err(), "\"a:1:2:3\" is not of the form device:port:gid");
        assert!(wanted(":1").is_err());
    }

    #[test]
    fn cpus_of_a_node_are_read() {
        let fixture = Fixture::new();
        fixture.put("devices/system/node/node1/cpulist", "2-3,8");
        assert_eq!(cpus_of_node(fixture.0.path(), 1), [2, 3, 8]);
        assert!(cpus_of_node(fixture.0.path(), 0).is_empty());
    }

    #[test]
    fn this_machine_is_probed_and_told() {
        for line in Devices::default().probe().lines() {
            eprintln!("{line}");
        }
    }
}
