//! What the machine looks like, read from sysfs: NUMA nodes with their CPUs, memory and distances, and the
//! devices that hang on each.
//!
//! Reading never fails. What is missing or makes no sense is left out, unknown places mean node 0, and a
//! machine without `/sys` is one node with the CPUs this process may use. Tests pass another root.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Highest CPU or node number that is believed.
const NUMBER_MAX: u32 = 65_535;

/// A machine, as far as this process may use it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Topology {
    /// Its NUMA nodes, by number. Never empty.
    pub nodes: Vec<NumaNode>,
    /// GPUs, NVMe drives and network cards, by bus address.
    pub devices: Vec<Device>,
    /// Whether there was no NUMA information at all, so that the one node is a guess.
    pub guessed: bool,
}

/// One NUMA node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NumaNode {
    /// The kernel's number; there may be holes.
    pub number: u32,
    /// CPUs that are online and that this process may run on.
    pub cpus: Vec<u32>,
    /// CPUs that are online, whoever may use them.
    pub cpus_online: usize,
    /// Memory in bytes; 0 for a node without.
    pub memory_bytes: u64,
    /// Free bytes in huge pages of 2 MiB and of 1 GiB.
    pub huge_free_bytes: u64,
    /// Distance to each node that is there; 10 is its own.
    pub distances: BTreeMap<u32, u32>,
}

/// What a device is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum DeviceKind {
    /// Display or 3D controller.
    Gpu,
    /// NVMe drive.
    Nvme,
    /// Network card.
    Nic,
}

/// A PCI device that matters to placement.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// What it is.
    pub kind: DeviceKind,
    /// Bus address, such as `0000:17:00.0`.
    pub address: String,
    /// What the kernel calls it (`nvme0`, `eth0`, `mlx5_0`), or the bus address.
    pub name: String,
    /// NUMA node it hangs on; 0 where the firmware does not tell.
    pub node: u32,
}

impl Topology {
    /// Reads the tree at `root` (`/sys`). `allowed` are the CPUs this process may run on; `memory_bytes` is
    /// the machine's memory, for when sysfs does not tell.
    pub fn read(root: &Path, allowed: &[u32], memory_bytes: u64) -> Self {
        let online = read(&root.join("devices/system/cpu/online")).and_then(|text| cpu_list(&text));
        let usable = |cpu: &u32| online.as_ref().is_none_or(|online| online.contains(cpu));
        let mut nodes: Vec<_> = numbered(&root.join("devices/system/node"), "node")
            .into_iter()
            .map(|(number, dir)| {
                let listed = read(&dir.join("cpulist")).and_then(|text| cpu_list(&text)).unwrap_or_default();
                let listed: Vec<u32> = listed.into_iter().filter(usable).collect();
                NumaNode {
                    number,
                    cpus_online: listed.len(),
                    cpus: listed.into_iter().filter(|cpu| allowed.contains(cpu)).collect(),
                    memory_bytes: read(&dir.join("meminfo")).map_or(0, |text| total_bytes(&text)),
                    huge_free_bytes: huge_free_bytes(&dir.join("hugepages")),
                    distances: BTreeMap::new(),
                }
            })
            .collect();
        let numbers: Vec<u32> = nodes.iter().map(|node| node.number).collect();
        for node in &mut nodes {
            let path = root.join(format!("devices/system/node/node{}/distance", node.number));
            let text = read(&path).unwrap_or_default();
            // One number for each node that is online, in their order.
            let far: Vec<u32> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            if far.len() == numbers.len() {
                node.distances = numbers.iter().copied().zip(far).collect();
            }
        }
        let devices = devices(&root.join("bus/pci/devices"), &numbers);
        let guessed = nodes.iter().all(|node| node.cpus_online == 0 || node.memory_bytes == 0);
        if guessed {
            let cpus: Vec<u32> = allowed.iter().copied().filter(usable).collect();
            let huge_free_bytes = nodes.iter().map(|node| node.huge_free_bytes).sum();
            let (number, cpus_online) = (0, cpus.len());
            let distances = BTreeMap::from([(0, 10)]);
            nodes = vec![NumaNode { number, cpus, cpus_online, memory_bytes, huge_free_bytes, distances }];
        }
        Self { nodes, devices, guessed }
    }

    /// Of this machine, for this process.
    pub fn of_this_machine(memory_bytes: u64) -> Self {
        Self::read(Path::new("/sys"), &allowed_cpus(), memory_bytes)
    }

    /// How far memory of `to` is from CPUs of `from`: the firmware's number, or 10 at home and 20 elsewhere.
    pub fn distance(&self, from: u32, to: u32) -> u32 {
        let node = self.nodes.iter().find(|node| node.number == from);
        let told = node.and_then(|node| node.distances.get(&to));
        told.copied().unwrap_or(if from == to { 10 } else { 20 })
    }
}

/// CPUs that this process may run on.
pub fn allowed_cpus() -> Vec<u32> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return vec![0] };
    (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).map(|cpu| cpu as u32).collect()
}

/// A CPU list as the kernel writes it: `0-3,8,10-11`. `None` when it is none.
pub fn cpu_list(text: &str) -> Option<BTreeSet<u32>> {
    let mut cpus = BTreeSet::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last > NUMBER_MAX {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// A CPU list as the kernel writes it.
pub fn print_cpus(cpus: &[u32]) -> String {
    let runs = cpus.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
        [one] => one.to_string(),
        [first, .., last] => format!("{first}-{last}"),
        [] => String::new(),
    });
    runs.collect::<Vec<_>>().join(",")
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Folders of `dir` whose name is `prefix` and a number, by that number.
fn numbered(dir: &Path, prefix: &str) -> BTreeMap<u32, std::path::PathBuf> {
    let number = |name: &str| name.strip_prefix(prefix)?.parse().ok().filter(|number| *number <= NUMBER_MAX);
    names(dir).iter().filter_map(|name| Some((number(name)?, dir.join(name)))).collect()
}

/// `Node 0 MemTotal:  4417740 kB`.
fn total_bytes(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.split_once("MemTotal:"));
    let kib: Option<u64> = line.and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Free bytes in `hugepages-<size>kB/free_hugepages`, all sizes.
fn huge_free_bytes(dir: &Path) -> u64 {
    let size = |name: &str| name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok();
    let free = |name: &str| read(&dir.join(name).join("free_hugepages"))?.trim().parse().ok();
    let bytes = |name: &String| -> Option<u64> {
        let (kib, pages): (u64, u64) = (size(name)?, free(name)?);
        kib.checked_mul(1024)?.checked_mul(pages)
    };
    names(dir).iter().filter_map(bytes).fold(0, u64::saturating_add)
}

fn devices(dir: &Path, numbers: &[u32]) -> Vec<Device> {
    let mut found = Vec::new();
    for address in names(dir) {
        let device = dir.join(&address);
        let Some(class) = read(&device.join("class")) else { continue };
        let class = u32::from_str_radix(class.trim().trim_start_matches("0x"), 16).unwrap_or(0);
        let kind = match (class >> 16, class >> 8) {
            (0x03, _) => DeviceKind::Gpu,
            (_, 0x0108) => DeviceKind::Nvme,
            (0x02, _) => DeviceKind::Nic,
            _ => continue,
        };
        let told = read(&device.join("numa_node")).and_then(|text| text.trim().parse::<u32>().ok());
        // -1, and numbers of nodes that are not there, mean that the firmware does not tell.
        let node = told.filter(|node| numbers.contains(node)).unwrap_or(0);
        found.push(Device {
            kind,
            name: kernel_name(&device, kind).unwrap_or_else(|| address.clone()),
            address,
            node,
        });
    }
    found
}

/// What the kernel calls the device: the first name in the folder of its class, also below a virtio layer.
fn kernel_name(device: &Path, kind: DeviceKind) -> Option<String> {
    let classes: &[&str] = match kind {
        DeviceKind::Gpu => &["drm"],
        DeviceKind::Nvme => &["nvme"],
        DeviceKind::Nic => &["infiniband", "net"],
    };
    let below =
        names(device).into_iter().filter(|name| name.starts_with("virtio")).map(|name| device.join(name));
    let places: Vec<_> = std::iter::once(device.to_owned()).chain(below).collect();
    let first = |class: &&str| places.iter().find_map(|place| names(&place.join(class)).into_iter().next());
    classes.iter().find_map(first)
}
