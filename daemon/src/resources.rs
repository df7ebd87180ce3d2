//! How much of the machine this process may use, asked of the kernel. Reads, opens nothing.

use std::fs;
use std::path::Path;

use rustix::process::{Resource, getrlimit};

use crate::config::Config;
use crate::plan::Resources;

impl Resources {
    /// Of this machine, for this process and the directories of `config`.
    pub fn of_this_machine(config: &Config) -> Self {
        let limit = |resource| getrlimit(resource).current.unwrap_or(u64::MAX);
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let memlock = if may_lock_memory(&status) { u64::MAX } else { limit(Resource::Memlock) };
        Self {
            ram_bytes: ram_bytes(),
            memory_dir_bytes: file_system_bytes(&config.memory_dir()),
            disk_bytes: config.disk_dir().and_then(|dir| file_system_bytes(&dir)),
            memlock_bytes: Some(memlock),
            descriptors_max: Some(limit(Resource::Nofile)),
        }
    }
}

/// Memory of the machine, or of the control group when that is less.
pub fn ram_bytes() -> u64 {
    let total =
        fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_bytes(&text)).unwrap_or(1 << 30);
    let group = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    group_limits(&group, Path::new("/sys/fs/cgroup")).into_iter().fold(total, u64::min)
}

fn total_bytes(meminfo: &str) -> Option<u64> {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(kib.split_whitespace().next()?.parse::<u64>().ok()?.saturating_mul(1024))
}

/// Memory limits of our control group and of those above it, version 2 and 1. In a container the group's
/// own root is mounted, so the root itself is asked too.
fn group_limits(membership: &str, mount: &Path) -> Vec<u64> {
    let mut limits = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (base, file) = match controllers {
            "" => (mount.to_owned(), "memory.max"),
            all if all.split(',').any(|one| one == "memory") => {
                (mount.join("memory"), "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let group = base.join(path.trim_start_matches('/'));
        for dir in group.ancestors().take_while(|dir| dir.starts_with(&base)) {
            let limit: Option<u64> =
                fs::read_to_string(dir.join(file)).ok().and_then(|text| text.trim().parse().ok());
            limits.extend(limit);
        }
    }
    limits
}

/// Bytes of the file system that holds `path`, or would hold it.
fn file_system_bytes(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|dir| dir.exists())?;
    let stat = rustix::fs::statvfs(there).ok()?;
    stat.f_blocks.checked_mul(stat.f_frsize)
}

/// Whether the limit on locked memory does not bind us (`CAP_IPC_LOCK`).
fn may_lock_memory(status: &str) -> bool {
    const CAP_IPC_LOCK: u64 = 14;
    let held = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = held.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    held.is_some_and(|mask| mask >> CAP_IPC_LOCK & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_of_the_control_groups_above_us_counts() {
        let temp = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = temp.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("memory.max", "max\n");
        put("pods/memory.max", "4096\n");
        put("pods/one/memory.max", "8192\n");
        put("memory/old/memory.limit_in_bytes", "12288\n");
        let limits = |text| group_limits(text, temp.path());
        assert_eq!(limits("0::/pods/one\n"), [8192, 4096]);
        assert_eq!(limits("4:cpu,memory:/old\n1:name=systemd:/x\n0::/\n"), [12288]);
        assert!(limits("nonsense\n\n0::/../..\n").is_empty());
    }

    #[test]
    fn this_machine_has_something() {
        let found = Resources::of_this_machine(&Config::parse("disk.dir = '/tmp/not/there'").unwrap().config);
        assert!(found.ram_bytes > 0 && found.disk_bytes.unwrap() > 0 && found.descriptors_max.unwrap() > 0);
        assert!(may_lock_memory("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        assert!(!may_lock_memory("CapEff:\t0000000000000000\n"));
        assert_eq!(total_bytes("MemTotal:  16 kB\nMemFree: 1 kB\n"), Some(16384));
    }
}
