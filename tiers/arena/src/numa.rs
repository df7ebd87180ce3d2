//! Which memory is near: binding ranges and threads to NUMA nodes, and checking where pages went.

use std::ffi::c_void;
use std::io;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use rustix::thread::CpuSet;

use crate::map::Mapping;

/// How firmly a range was bound.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bound {
    /// Pages come from the node or not at all.
    Strict,
    /// Pages come from the node while it has some.
    Preferred,
    /// The machine has one node.
    SingleNode,
}

/// Whether the machine has more than one NUMA node; a machine that does not say has one.
pub fn has_several_nodes() -> bool {
    let online = std::fs::read_to_string("/sys/devices/system/node/online").unwrap_or_default();
    !matches!(online.trim(), "" | "0")
}

/// Binds the pages of a mapping that are yet to come to `node`.
pub(crate) fn bind(map: &Mapping, node: u32) -> io::Result<Bound> {
    if !has_several_nodes() {
        return Ok(Bound::SingleNode);
    }
    if node as usize >= NODES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let start = map.range(0, map.len());
    match mbind(start, map.len(), libc::MPOL_BIND, node) {
        Ok(()) => Ok(Bound::Strict),
        Err(_) => mbind(start, map.len(), libc::MPOL_PREFERRED, node).map(|()| Bound::Preferred),
    }
}

const NODES_MAX: usize = 1024;

fn mbind(start: NonNull<u8>, len: usize, policy: i32, node: u32) -> io::Result<()> {
    let mut nodes = [0u64; NODES_MAX / 64];
    nodes[node as usize / 64] |= 1 << (node % 64);
    // SAFETY: the range is a whole mapping of ours, the mask outlives the call and is as long as said (the
    // kernel reads one bit less than `maxnode`). A policy changes where pages come from, not what they hold.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start.as_ptr().cast::<c_void>(),
            len,
            policy,
            nodes.as_ptr(),
            NODES_MAX + 1,
            0,
        )
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets the calling thread run on these CPUs only. An empty list changes nothing.
pub fn pin_current_thread(cpus: &[u32]) -> io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for &cpu in cpus {
        if cpu as usize >= CpuSet::MAX_CPU {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        set.set(cpu as usize);
    }
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// One mapping in `/proc/<pid>/numa_maps`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NumaMap {
    /// First address.
    pub start: u64,
    /// Policy as the kernel writes it: `default`, `bind:0`, `prefer:1`.
    pub policy: String,
    /// The mapped file, when there is one.
    pub file: Option<PathBuf>,
    /// Pages on each node that has some: (node, pages).
    pub pages: Vec<(u32, u64)>,
    /// Size of those pages, in KiB.
    pub page_kib: u64,
}

impl NumaMap {
    /// Share of the pages that lie on `node`, 0 to 1; `None` when there are none at all.
    pub fn share_on(&self, node: u32) -> Option<f64> {
        let all: u64 = self.pages.iter().map(|(_, pages)| pages).sum();
        let there: u64 = self.pages.iter().filter(|(at, _)| *at == node).map(|(_, pages)| pages).sum();
        (all > 0).then(|| there as f64 / all as f64)
    }
}

/// Reads the text of `/proc/<pid>/numa_maps`. Lines that make no sense are left out.
pub fn parse_numa_maps(text: &str) -> Vec<NumaMap> {
    text.lines().filter_map(parse_numa_line).collect()
}

fn parse_numa_line(line: &str) -> Option<NumaMap> {
    let mut words = line.split_ascii_whitespace();
    let start = u64::from_str_radix(words.next()?, 16).ok()?;
    let policy = words.next()?.to_owned();
    let mut map = NumaMap { start, policy, file: None, pages: Vec::new(), page_kib: 4 };
    for word in words {
        let Some((name, value)) = word.split_once('=') else { continue };
        if name == "file" {
            map.file = Some(PathBuf::from(value));
        } else if name == "kernelpagesize_kB" {
            map.page_kib = value.parse().ok()?;
        } else if let Some(node) = name.strip_prefix('N').and_then(|node| node.parse().ok()) {
            map.pages.push((node, value.parse().ok()?));
        }
    }
    Some(map)
}

/// Bytes of the mapping at `start` that are mapped by huge pages, from the text of `/proc/<pid>/smaps`.
pub fn huge_bytes_in_smaps(text: &str, start: u64) -> u64 {
    let mut inside = false;
    let mut kib = 0;
    for line in text.lines() {
        let first = line.split_ascii_whitespace().next().unwrap_or_default();
        if let Some((from, _)) = first.split_once('-') {
            inside = u64::from_str_radix(from, 16) == Ok(start);
        } else if inside && matches!(first, "ShmemPmdMapped:" | "FilePmdMapped:" | "Shared_Hugetlb:") {
            kib += line.split_ascii_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    kib * 1024
}

/// A mounted hugetlbfs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HugeMount {
    /// Where.
    pub dir: PathBuf,
    /// Its page size in bytes.
    pub page_bytes: u64,
}

/// The hugetlbfs mounts in the text of `/proc/mounts`, `default_page_bytes` where an entry names no size.
pub fn huge_mounts(mounts: &str, default_page_bytes: u64) -> Vec<HugeMount> {
    let mounted = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (dir, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        let size = options.split(',').find_map(|option| option.strip_prefix("pagesize="));
        let page_bytes = size.map_or(Some(default_page_bytes), parse_size)?;
        (kind == "hugetlbfs").then(|| HugeMount { dir: PathBuf::from(unescape(dir)), page_bytes })
    };
    mounts.lines().filter_map(mounted).collect()
}

/// The `huge=` option of the tmpfs that `path` lies on: `never` when there is none, `None` when it is no tmpfs.
pub(crate) fn tmpfs_huge_option(mounts: &str, path: &Path) -> Option<String> {
    let mut best: Option<(PathBuf, Option<String>)> = None;
    for line in mounts.lines() {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (Some(dir), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let dir = PathBuf::from(unescape(dir));
        // A later mount on the same place hides the earlier one.
        let longer = best.as_ref().is_none_or(|(other, _)| dir.as_os_str().len() >= other.as_os_str().len());
        if path.starts_with(&dir) && longer {
            let huge = options.split(',').find_map(|option| option.strip_prefix("huge="));
            best = Some((dir, (kind == "tmpfs").then(|| huge.unwrap_or("never").to_owned())));
        }
    }
    best?.1
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text.as_bytes().get(digits.len()) {
        None => 1,
        Some(b'k' | b'K') => 1 << 10,
        Some(b'm' | b'M') => 1 << 20,
        Some(b'g' | b'G') => 1 << 30,
        Some(_) => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// `/proc/mounts` writes blanks in paths as `\040`.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
}

/// Huge pages of `page_bytes` that nobody has taken or been promised, on one node or on all.
pub(crate) fn free_huge_pages(page_bytes: u64, node: Option<u32>) -> u64 {
    let read =
        |path: String| std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let pool = format!("hugepages/hugepages-{}kB", page_bytes >> 10);
    let all = format!("/sys/kernel/mm/{pool}");
    let free = read(format!("{all}/free_hugepages")).unwrap_or(0);
    let promised = read(format!("{all}/resv_hugepages")).unwrap_or(0);
    let free = free.saturating_sub(promised);
    match node.filter(|_| has_several_nodes()) {
        Some(node) => {
            let here = read(format!("/sys/devices/system/node/node{node}/{pool}/free_hugepages"));
            here.map_or(free, |here| here.min(free))
        }
        None => free,
    }
}

/// The machine's default huge page, in bytes.
pub(crate) fn default_huge_page_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
    let kib = line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(2 << 20, |kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numa_maps_lines_are_read() {
        let text = "7f00 bind:1 file=/dev/shm/kvd/shard-1.data dirty=3 N0=1 N1=3 kernelpagesize_kB=2048\n\
                    nonsense\n\
                    7fff default stack:1 anon=2 N0=2\n";
        let maps = parse_numa_maps(text);
        assert_eq!(maps.len(), 2);
        assert_eq!(maps[0].file.as_deref(), Some(Path::new("/dev/shm/kvd/shard-1.data")));
        assert_eq!((maps[0].policy.as_str(), maps[0].page_kib), ("bind:1", 2048));
        assert_eq!(maps[0].share_on(1), Some(0.75));
        assert_eq!(maps[1].pages, [(0, 2)]);
    }

    #[test]
    fn mounts_tell_of_huge_pages() {
        let mounts = "tmpfs /dev/shm tmpfs rw,nosuid,huge=advise 0 0\n\
                      tmpfs /dev/shm/in\\040ner tmpfs rw 0 0\n\
                      none /mnt/1g hugetlbfs rw,pagesize=1024M 0 0\n\
                      none /dev/hugepages hugetlbfs rw 0 0\n\
                      /dev/vda / ext4 rw 0 0\n";
        let huge = |path| tmpfs_huge_option(mounts, Path::new(path));
        assert_eq!(huge("/dev/shm/kvd").as_deref(), Some("advise"));
        assert_eq!(huge("/dev/shm/in ner/x").as_deref(), Some("never"));
        assert_eq!(huge("/home/kvd"), None);
        let found = huge_mounts(mounts, 2 << 20);
        assert_eq!(found[0], HugeMount { dir: "/mnt/1g".into(), page_bytes: 1 << 30 });
        assert_eq!(found[1], HugeMount { dir: "/dev/hugepages".into(), page_bytes: 2 << 20 });
    }

    #[test]
    fn huge_bytes_count_only_the_asked_mapping() {
        let text = "7f00-7f10 rw-s 0 00:1 1 /a\nRss: 4 kB\nShmemPmdMapped:   2048 kB\n\
                    8f00-8f10 rw-s 0 00:1 1 /b\nShmemPmdMapped:   4096 kB\n";
        assert_eq!(huge_bytes_in_smaps(text, 0x7f00), 2 << 20);
        assert_eq!(huge_bytes_in_smaps(text, 0x9f00), 0);
    }

    #[test]
    fn a_thread_can_be_pinned_to_where_it_may_run() {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let cpu = (0..CpuSet::MAX_CPU).find(|&cpu| allowed.is_set(cpu)).unwrap();
        std::thread::spawn(move || {
            pin_current_thread(&[cpu as u32]).unwrap();
            assert_eq!(rustix::thread::sched_getaffinity(None).unwrap().count(), 1);
            pin_current_thread(&[]).unwrap();
            assert!(pin_current_thread(&[u32::MAX]).is_err());
        })
        .join()
        .unwrap();
    }
}
