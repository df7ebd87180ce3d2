//! Where a run puts its files: directories of its own, gone when it ends.
//!
//! ```text
//! /dev/shm/kv-local-RANDOM/memory    the host tier   (a tmpfs: shared memory)
//!                         /run       the sockets     (short names: a socket's path has 107 bytes at most)
//!                         /kvd.log   what the daemon says
//! /tmp/kv-local-RANDOM/              the disk tier   (no tmpfs: direct I/O, and it should not cost memory)
//! ```
//! Several nodes have a directory `node-1`, `node-2`, ... each in both places, and the same in it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail, ensure};
use kvd::config::units::Size;
use tempfile::TempDir;

/// Least host tier and disk tier that a run makes do with.
const HOST_BYTES_MIN: u64 = 16 << 20;
const DISK_BYTES_MIN: u64 = 256 << 20;
/// What stays free: for the catalog beside the host tier, and for others.
const MEMORY_SPARE: u64 = 64 << 20;
const DISK_SPARE: u64 = 1 << 30;
/// Where shared memory is when nobody says.
const SHARED_MEMORY: &str = "/dev/shm";
const TMPFS: u64 = 0x0102_1994;
const RAMFS: u64 = 0x8584_58f6;

/// What a run was asked for.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// Size of the host tier; none: the default, or less where there is less.
    pub host: Option<Size>,
    /// Size of the disk tier; none: the default, or less where there is less.
    pub disk: Option<Size>,
    /// Where shared memory is.
    pub memory_dir: Option<PathBuf>,
    /// Where the disk tier goes.
    pub data_dir: Option<PathBuf>,
}

/// Directories of this run. They are removed on drop.
#[derive(Debug)]
pub struct Places {
    memory: TempDir,
    data: TempDir,
    /// Nodes that have a place here.
    pub nodes: usize,
    /// Size of the host tier of each.
    pub host: Size,
    /// Size of the disk tier of each.
    pub disk: Size,
    /// What had to be made smaller, in words.
    pub notes: Vec<String>,
}

/// Where one node puts its files.
#[derive(Clone, Debug)]
pub struct Place {
    /// Directory of the sockets.
    pub run_dir: PathBuf,
    /// Directory of the host tier.
    pub memory_dir: PathBuf,
    /// Directory of the disk tier.
    pub data_dir: PathBuf,
    /// Where the daemon's words go.
    pub log: PathBuf,
}

/// What one of several nodes has when they share `total` out: whole steps of `step`, one at least.
pub fn share(total: Size, nodes: usize, step: Size) -> Size {
    if nodes == 1 { total } else { Size((total.0 / nodes as u64 / step.0).max(1) * step.0) }
}

impl Places {
    /// Makes the directories of so many nodes, after a look at what there is room for. Sizes are of each.
    pub fn make(wishes: &Wishes, host: Size, disk: Size, nodes: usize) -> anyhow::Result<Self> {
        let of_each = |bytes: u64| bytes / nodes as u64;
        let shared = wishes.memory_dir.clone().unwrap_or_else(|| SHARED_MEMORY.into());
        let data = match &wishes.data_dir {
            Some(dir) => dir.clone(),
            None => roomiest(&candidates())?,
        };
        let shm = room(&shared).with_context(|| {
            format!(
                "no shared memory at {}: mount a tmpfs there (mount -t tmpfs -o size=2G tmpfs {0}), or name \
                 another one with --memory-dir",
                shared.display()
            )
        })?;
        let memory = shm.min(available_memory().unwrap_or(u64::MAX));
        let mut notes = Vec::new();
        let spare = of_each(memory).saturating_sub(MEMORY_SPARE);
        let host =
            fit("host tier", wishes.host, host, spare, HOST_BYTES_MIN, &mut notes).map_err(|error| {
                let free =
                    available_memory().map_or_else(|| "an unknown amount".into(), |free| Size(free).about());
                anyhow!(
                    "{error}: {} has {} free, this machine {free} of memory; make it larger (docker run \
                 --shm-size=1g, or mount -o remount,size=2G {0}), ask for less with --host-bytes, or name \
                 another tmpfs with --memory-dir",
                    shared.display(),
                    Size(shm).about(),
                )
            })?;
        let free = room(&data).with_context(|| format!("no directory {}", data.display()))?;
        let spare = of_each(free.saturating_sub(DISK_SPARE));
        let disk =
            fit("disk tier", wishes.disk, disk, spare, DISK_BYTES_MIN, &mut notes).map_err(|error| {
                anyhow!(
                    "{error}: {} has {} free; free some, ask for less with --disk-bytes, or name another \
                 directory with --data-dir",
                    data.display(),
                    Size(free).about(),
                )
            })?;
        if is_memory(&data) {
            notes.push(format!("{} is memory, not a disk: name a disk with --data-dir", data.display()));
        }
        let own = |parent: &Path| {
            tempfile::Builder::new()
                .prefix("kv-local-")
                .tempdir_in(parent)
                .with_context(|| format!("cannot make a directory in {}", parent.display()))
        };
        let places = Self { memory: own(&shared)?, data: own(&data)?, nodes, host, disk, notes };
        for node in 0..nodes {
            let run_dir = places.of(node).run_dir;
            ensure!(
                run_dir.as_os_str().len() <= 90,
                "{} is too long a path for sockets; name a shorter one with --memory-dir",
                run_dir.display()
            );
            for dir in places.roots(node) {
                std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
            }
        }
        Ok(places)
    }

    /// Directory in shared memory that has all of a run there.
    pub fn memory(&self) -> &Path {
        self.memory.path()
    }

    /// Directory on disk that has all of a run there.
    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// Where node `at` (from 0) puts its files.
    pub fn of(&self, at: usize) -> Place {
        let [memory, data] = self.roots(at);
        Place {
            run_dir: memory.join("run"),
            memory_dir: memory.join("memory"),
            data_dir: data,
            log: memory.join("kvd.log"),
        }
    }

    /// What a node has in shared memory and on disk.
    fn roots(&self, at: usize) -> [PathBuf; 2] {
        let own = |dir: &TempDir| match self.nodes {
            1 => dir.path().to_owned(),
            _ => dir.path().join(format!("node-{}", at + 1)),
        };
        [own(&self.memory), own(&self.data)]
    }
}

/// The size to use: as asked for, if that fits; else the default, or what there is room for.
fn fit(
    what: &str,
    asked: Option<Size>,
    default: Size,
    room: u64,
    least: u64,
    notes: &mut Vec<String>,
) -> anyhow::Result<Size> {
    if let Some(asked) = asked {
        ensure!(asked.0 <= room, "no room for a {what} of {}", asked.about());
        return Ok(asked);
    }
    if default.0 <= room {
        return Ok(default);
    }
    // Half of what is left, in whole steps: others live here too.
    let less = Size(room / 2 / least * least);
    ensure!(less.0 >= least, "no room for a {what} of even {}", Size(least).about());
    notes.push(format!("{what}: {} instead of {}, there is no room for more", less.about(), default.about()));
    Ok(less)
}

fn candidates() -> Vec<PathBuf> {
    let mut dirs = vec![std::env::temp_dir(), PathBuf::from("/var/tmp")];
    dirs.extend(std::env::current_dir());
    dirs
}

/// The first directory on a disk with room for everything, else the one with most room.
fn roomiest(dirs: &[PathBuf]) -> anyhow::Result<PathBuf> {
    let rooms: Vec<_> = dirs.iter().filter_map(|dir| Some((dir, room(dir).ok()?))).collect();
    let on_disk: Vec<_> = rooms.iter().filter(|(dir, _)| !is_memory(dir)).collect();
    if let Some((dir, _)) = on_disk.iter().find(|(_, free)| *free >= (4 << 30)) {
        return Ok(dir.to_path_buf());
    }
    match on_disk.into_iter().max_by_key(|(_, free)| *free).or_else(|| rooms.first()) {
        Some((dir, _)) => Ok(dir.to_path_buf()),
        None => bail!("no directory for the disk tier; name one with --data-dir"),
    }
}

/// Bytes that this user may still write in a directory.
fn room(dir: &Path) -> std::io::Result<u64> {
    let found = rustix::fs::statvfs(dir)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

fn is_memory(dir: &Path) -> bool {
    rustix::fs::statfs(dir).is_ok_and(|found| matches!(found.f_type as u64, TMPFS | RAMFS))
}

fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_was_asked_for_fits_or_is_refused_and_a_default_shrinks_and_says_so() {
        let mut notes = Vec::new();
        let mut fit =
            |asked: Option<Size>, room| fit("host tier", asked, Size(GIB), room, HOST_BYTES_MIN, &mut notes);
        assert_eq!(fit(None, GIB).unwrap(), Size(GIB));
        assert_eq!(fit(Some(Size(2 * GIB)), 3 * GIB).unwrap(), Size(2 * GIB));
        assert!(fit(Some(Size(2 * GIB)), GIB).unwrap_err().to_string().contains("2GiB"));
        assert_eq!(fit(None, 100 << 20).unwrap(), Size(48 << 20));
        assert!(fit(None, 20 << 20).is_err());
        assert_eq!(notes.len(), 1, "{notes:?}");
    }

    #[test]
    fn nodes_share_a_size_out_in_whole_steps() {
        let (total, step) = (Size::mib(256), Size::mib(16));
        let shares = [1, 2, 3, 5].map(|nodes| share(total, nodes, step));
        assert_eq!(shares, [256, 128, 80, 48].map(Size::mib));
        assert_eq!(share(Size(1), 4, step), step);
    }

    #[test]
    fn too_large_a_wish_says_how_to_get_it() {
        let wishes = Wishes { host: Some(Size(1 << 60)), ..Wishes::default() };
        match Places::make(&wishes, Size(GIB), Size(GIB), 1) {
            Ok(_) => unreachable!("nobody has an exbibyte"),
            Err(error) => assert!(error.to_string().contains("--"), "{error}"),
        }
    }

    #[test]
    fn directories_go_with_the_run() {
        let (memory, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let wishes = Wishes {
            host: Some(Size(0)),
            disk: Some(Size(0)),
            memory_dir: Some(memory.path().to_owned()),
            data_dir: Some(data.path().to_owned()),
        };
        for nodes in [1, 3] {
            let places = Places::make(&wishes, Size(0), Size(0), nodes).unwrap();
            let dirs: HashSet<_> = (0..nodes).map(|node| places.of(node).data_dir).collect();
            assert!(dirs.len() == nodes && dirs.iter().all(|dir| dir.starts_with(data.path())), "{dirs:?}");
            for node in 0..nodes {
                std::fs::create_dir(places.of(node).run_dir).unwrap();
            }
            drop(places);
            for dir in [&memory, &data] {
                assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
            }
        }
    }
}
