//! What `doctor` judges by: looked up on this machine and asked of the daemon, without an opinion.

pub(super) mod gpus;

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use kv_api::v1;

use self::gpus::GpuFacts;
use crate::cli::Global;
use crate::connect;
use crate::exit::Failure;

/// All of it.
pub(super) struct Facts {
    /// Where the daemon is looked for.
    pub(super) address: String,
    pub(super) socket: Socket,
    /// `None` when the socket is not open.
    pub(super) daemon: Option<Result<DaemonFacts, Failure>>,
    /// The command that starts the daemon here.
    pub(super) start: &'static str,
    /// The machine is run by systemd.
    pub(super) systemd: bool,
    pub(super) memlock: Memlock,
    pub(super) huge: Option<HugePages>,
    /// Errno and its text when a ring cannot be made.
    pub(super) io_uring: Result<(), (i32, String)>,
    /// kernel.io_uring_disabled, where the kernel has it.
    pub(super) io_uring_disabled: Option<u32>,
    pub(super) memory: MemoryDir,
    /// Size of the host tier, or what it would be by default.
    pub(super) host_bytes_wanted: u64,
    /// `None` when the disk tier is off.
    pub(super) data: Option<(PathBuf, DataDir)>,
    pub(super) numa_nodes: u32,
    pub(super) gpu: GpuFacts,
}

#[derive(Debug)]
pub(super) enum Socket {
    Open { pid: Option<i32>, uid: Option<u32> },
    Remote,
    Absent,
    Refused,
    Denied { group: String },
    Other(String),
}

pub(super) struct DaemonFacts {
    pub(super) node: String,
    pub(super) version: String,
    pub(super) health: String,
    pub(super) shards: u32,
    /// `None`: it is of a version that knows of no GPUs.
    pub(super) gpus: Option<v1::ListGpusResponse>,
}

#[derive(Clone, Copy)]
pub(super) struct Memlock {
    /// `None`: unlimited.
    pub(super) bytes_max: Option<u64>,
    pub(super) of_daemon: bool,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct HugePages {
    pub(super) total: u64,
    pub(super) free: u64,
    pub(super) page_bytes: u64,
}

pub(super) struct MemoryDir {
    pub(super) dir: PathBuf,
    pub(super) space: Result<Space, String>,
}

/// Space of a file system, in bytes.
#[derive(Clone, Copy)]
pub(super) struct Space {
    pub(super) total: u64,
    pub(super) free: u64,
}

pub(super) enum DataDir {
    Direct { free: u64 },
    Buffered,
    Denied,
    Absent,
    Other(String),
}

/// Looks everything up.
pub(super) async fn gather(
    global: &Global,
    data_dir: Option<PathBuf>,
    memory_dir: Option<PathBuf>,
) -> Result<Facts, Failure> {
    let endpoint = connect::endpoint(global)?;
    let path = connect::socket(&endpoint);
    let socket = path.as_deref().map_or(Socket::Remote, look_at_socket);
    let (mut daemon, mut config, mut host_bytes) = (None, toml::Table::new(), None);
    let mut clients = Vec::new();
    if matches!(socket, Socket::Open { .. } | Socket::Remote) {
        daemon = Some(match ask(global).await {
            Ok(told) => {
                let status = told.status;
                let host = i32::from(v1::Tier::Host);
                host_bytes = Some(
                    status
                        .tiers
                        .iter()
                        .filter(|t| t.tier == host)
                        .map(|t| t.bytes_wanted.max(t.bytes_max))
                        .sum(),
                );
                config = told.config;
                clients = told.clients;
                let v1::StatusResponse { node, version, health, shards, .. } = status;
                Ok(DaemonFacts { node, version, health, shards, gpus: told.gpus })
            }
            Err(failure) => Err(failure),
        });
    }
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let pid = if let Socket::Open { pid, .. } = socket { pid } else { None };
    let gpu = gpus::gather(&socket, &clients);
    let memory_dir = memory_dir.or_else(|| configured(&config, "host", "memory_dir"));
    let data_dir = data_dir.or_else(|| configured(&config, "disk", "dir"));
    Ok(Facts {
        address: path.map_or_else(|| endpoint.to_string(), |path| path.display().to_string()),
        socket,
        daemon,
        start: connect::start(),
        systemd: Path::new("/run/systemd/system").exists(),
        memlock: memlock(pid),
        huge: huge_pages(&meminfo),
        io_uring: io_uring::IoUring::new(2)
            .map(drop)
            .map_err(|error| (error.raw_os_error().unwrap_or(0), error.to_string())),
        io_uring_disabled: read_number("/proc/sys/kernel/io_uring_disabled"),
        memory: memory(memory_dir),
        host_bytes_wanted: host_bytes.unwrap_or_else(|| default_host_bytes(&meminfo)),
        data: data_dir.map(|dir| {
            let found = look_at_data(&dir);
            (dir, found)
        }),
        numa_nodes: numa_nodes(),
        gpu,
    })
}

/// What the daemon tells.
struct Told {
    status: v1::StatusResponse,
    config: toml::Table,
    gpus: Option<v1::ListGpusResponse>,
    /// Only where there are GPUs.
    clients: Vec<v1::ClientInfo>,
}

async fn ask(global: &Global) -> Result<Told, Failure> {
    let daemon = connect::connect(global).await?;
    let status = daemon.within(daemon.admin().status(daemon.request(v1::StatusRequest {}))).await?;
    let config = daemon.within(daemon.admin().get_config(daemon.request(v1::GetConfigRequest {}))).await?;
    let request = daemon.request(v1::ListGpusRequest {});
    let gpus = daemon.within_if_known(daemon.admin().list_gpus(request)).await?;
    let mut clients = Vec::new();
    if gpus.as_ref().is_some_and(|told| !told.gpus.is_empty()) {
        let request = daemon.request(v1::ListClientsRequest {});
        clients = daemon.within(daemon.admin().list_clients(request)).await?.clients;
    }
    Ok(Told { status, config: config.toml.parse().unwrap_or_default(), gpus, clients })
}

/// A directory in the daemon's configuration; `off` and `auto` are none.
fn configured(config: &toml::Table, section: &str, key: &str) -> Option<PathBuf> {
    let text = config.get(section)?.get(key)?.as_str()?;
    text.starts_with('/').then(|| text.into())
}

fn look_at_socket(path: &Path) -> Socket {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(stream) => {
            let peer = rustix::net::sockopt::socket_peercred(&stream).ok();
            Socket::Open {
                pid: peer.map(|peer| peer.pid.as_raw_nonzero().get()),
                uid: peer.map(|peer| peer.uid.as_raw()),
            }
        }
        Err(error) => match error.kind() {
            ErrorKind::NotFound => Socket::Absent,
            ErrorKind::ConnectionRefused => Socket::Refused,
            ErrorKind::PermissionDenied => Socket::Denied { group: group_of(path) },
            _ => Socket::Other(error.to_string()),
        },
    }
}

/// Name of the file's group, or its number.
fn group_of(path: &Path) -> String {
    let Ok(gid) = std::fs::metadata(path).map(|meta| meta.gid()) else { return "kvd".into() };
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let named = groups.lines().map(|line| line.split(':')).find_map(|mut parts| {
        let name = parts.next()?;
        (parts.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    });
    named.unwrap_or_else(|| gid.to_string())
}

/// The daemon's own limit where it can be read, else that of this shell.
fn memlock(pid: Option<i32>) -> Memlock {
    let limits = pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/limits")).ok());
    if let Some(bytes_max) = limits.as_deref().and_then(memlock_of_limits) {
        return Memlock { bytes_max, of_daemon: true };
    }
    let own = rustix::process::getrlimit(rustix::process::Resource::Memlock);
    Memlock { bytes_max: own.current, of_daemon: false }
}

/// The soft limit in /proc/PID/limits; the inner `None` is unlimited.
fn memlock_of_limits(limits: &str) -> Option<Option<u64>> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    }
}

/// The number behind `name:` in /proc/meminfo, as it stands there.
fn meminfo_number(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

fn huge_pages(meminfo: &str) -> Option<HugePages> {
    Some(HugePages {
        total: meminfo_number(meminfo, "HugePages_Total")?,
        free: meminfo_number(meminfo, "HugePages_Free")?,
        page_bytes: meminfo_number(meminfo, "Hugepagesize")? << 10,
    })
}

/// What the daemon takes when nobody says otherwise: a quarter of the memory, at most 64 GiB.
fn default_host_bytes(meminfo: &str) -> u64 {
    let total = meminfo_number(meminfo, "MemTotal").unwrap_or(0) << 10;
    (total / 4).min(64 << 30)
}

fn memory(dir: Option<PathBuf>) -> MemoryDir {
    let dir = dir.unwrap_or_else(|| "/dev/shm".into());
    MemoryDir { space: space(&dir), dir }
}

fn space(dir: &Path) -> Result<Space, String> {
    let stat = rustix::fs::statvfs(dir).map_err(|error| error.to_string())?;
    Ok(Space { total: stat.f_blocks * stat.f_frsize, free: stat.f_bavail * stat.f_frsize })
}

/// Whether files in `dir` can be read and written past the page cache; leaves nothing behind.
fn look_at_data(dir: &Path) -> DataDir {
    let flags = (rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::DIRECT).bits() as i32;
    let direct = OpenOptions::new().read(true).write(true).custom_flags(flags).open(dir);
    let found = match direct {
        Ok(file) => write_page(&file),
        Err(error) if error.kind() == ErrorKind::InvalidInput => return DataDir::Buffered,
        Err(error) => Err(error),
    };
    match (found, space(dir)) {
        (Ok(()), Ok(space)) => DataDir::Direct { free: space.free },
        (Ok(()), Err(error)) => DataDir::Other(error),
        (Err(error), _) => match error.kind() {
            ErrorKind::NotFound => DataDir::Absent,
            ErrorKind::PermissionDenied => DataDir::Denied,
            _ => DataDir::Other(error.to_string()),
        },
    }
}

/// Some file systems take the flag and fail the write.
fn write_page(file: &File) -> std::io::Result<()> {
    const PAGE: usize = 4096;
    let buffer = vec![0u8; PAGE * 2];
    let start = buffer.as_ptr().align_offset(PAGE);
    std::os::unix::fs::FileExt::write_all_at(file, &buffer[start..start + PAGE], 0)
}

fn read_number(path: &str) -> Option<u32> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn numa_nodes() -> u32 {
    let online = std::fs::read_to_string("/sys/devices/system/node/online").unwrap_or_default();
    count_list(&online).unwrap_or(1).max(1)
}

/// How many numbers a kernel list like `0-1,3` holds.
fn count_list(list: &str) -> Option<u32> {
    let count = |part: &str| -> Option<u32> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        (last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)?).checked_add(1)
    };
    list.trim().split(',').map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_read() {
        assert_eq!(count_list("0-1,3\n"), Some(3));
        assert_eq!(count_list("0"), Some(1));
        assert_eq!(count_list(""), None);
        assert_eq!(count_list("3-1"), None);
        let limits =
            "Limit   Soft Limit   Hard Limit   Units\nMax locked memory   8388608   8388608   bytes\n";
        assert_eq!(memlock_of_limits(limits), Some(Some(8 << 20)));
        assert_eq!(memlock_of_limits("Max locked memory   unlimited unlimited bytes"), Some(None));
        assert_eq!(memlock_of_limits(""), None);
        let meminfo = "MemTotal:       24583932 kB\nHugePages_Total:     512\nHugePages_Free:        3\nHugepagesize:       2048 kB\n";
        assert_eq!(huge_pages(meminfo), Some(HugePages { total: 512, free: 3, page_bytes: 2 << 20 }));
        assert_eq!(default_host_bytes(meminfo), (24_583_932 << 10) / 4);
        assert_eq!(huge_pages("MemTotal: 1 kB"), None);
    }

    #[test]
    fn a_data_directory_is_tried_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(look_at_data(dir.path()), DataDir::Direct { .. } | DataDir::Buffered));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(matches!(look_at_data(&dir.path().join("x")), DataDir::Absent));
    }

    #[test]
    fn only_directories_count_as_configured() {
        let config: toml::Table =
            "[disk]\ndir = \"off\"\n[host]\nmemory_dir = \"/dev/shm/kvd\"".parse().unwrap();
        assert_eq!(configured(&config, "disk", "dir"), None);
        assert_eq!(configured(&config, "host", "memory_dir"), Some("/dev/shm/kvd".into()));
    }
}
