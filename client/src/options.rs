//! How to find the daemon, and what a worker asks it for.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kv_block::place::{GRPC_SOCKET, WORKER_SOCKET, run_dir};
use kv_block::{Priority, SequenceHash};
use kv_shm::door::NAME_BYTES_MAX;

use crate::error::Error;

/// Longest time that any call may take: as long as the daemon allows. What is asked beyond counts as this.
pub(crate) const DEADLINE_MAX: Duration = Duration::from_secs(600);

/// Where the daemon is and how long a call may take.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Where it listens.
    pub endpoint: Endpoint,
    /// How long a call may take when nobody says otherwise.
    pub deadline: Duration,
}

/// Where a daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// On this machine: the run directory, or the path of `kvd.sock` in it.
    Socket(PathBuf),
    /// `http://host:port`, or `https://host:port` with [`Tls`].
    Uri {
        /// The address.
        uri: String,
        /// Files for `https`.
        tls: Option<Tls>,
    },
}

/// PEM files for mutual TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Who signed the daemon's certificate.
    pub ca: PathBuf,
    /// Our certificate and its key; none when the daemon does not ask.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name in the daemon's certificate, when it is not the host of the address.
    pub name: Option<String>,
}

impl Default for ClientOptions {
    /// The daemon of this machine, see [`Endpoint::local`], and two seconds a call.
    fn default() -> Self {
        Self { endpoint: Endpoint::local(), deadline: Duration::from_secs(2) }
    }
}

impl ClientOptions {
    /// The daemon whose run directory or gRPC socket is `path`.
    pub fn socket(path: impl Into<PathBuf>) -> Self {
        Self { endpoint: Endpoint::Socket(path.into()), ..Self::default() }
    }

    /// The daemon at `http://host:port`.
    pub fn uri(uri: impl Into<String>) -> Self {
        Self { endpoint: Endpoint::Uri { uri: uri.into(), tls: None }, ..Self::default() }
    }
}

impl Endpoint {
    /// What the environment variable `KVD_SOCKET` says, else the first run directory with a socket in it:
    /// `/run/kvd`, then this user's own.
    pub fn local() -> Self {
        if let Some(path) = std::env::var_os("KVD_SOCKET").filter(|path| !path.is_empty()) {
            return Self::Socket(path.into());
        }
        let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let own = run_dir(rustix::process::getuid().as_raw(), runtime_dir.as_deref());
        let system = PathBuf::from("/run/kvd");
        Self::Socket(if system.join(GRPC_SOCKET).exists() { system } else { own })
    }

    /// The gRPC socket, if this is one.
    pub(crate) fn grpc_socket(&self) -> Option<PathBuf> {
        let Self::Socket(path) = self else { return None };
        Some(if names_a_socket(path) { path.clone() } else { path.join(GRPC_SOCKET) })
    }

    /// The worker socket beside it.
    pub(crate) fn worker_socket(&self) -> Option<PathBuf> {
        self.grpc_socket().map(|path| path.with_file_name(WORKER_SOCKET))
    }
}

fn names_a_socket(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "sock")
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "{}", path.display()),
            Self::Uri { uri, .. } => f.write_str(uri),
        }
    }
}

/// What a worker asks the daemon for. The daemon may give less.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// What the operator should see, such as `vllm rank 3`.
    pub name: String,
    /// Staging bytes per shard: what may be on its way into the store at once. Rounded up to pages.
    pub staging_bytes: u64,
    /// Blocks of a shard that can be open for reading at once.
    pub hazards: u32,
    /// Ring entries per shard: requests under way at once. Rounded up to a power of two.
    pub ring_entries: u32,
    /// NUMA node this worker runs on: its blocks go to that node's shard.
    pub numa_node: Option<u16>,
    /// Ask to fill arena slots in place. The daemon grants it to users it trusts with everybody's blocks.
    pub trusted: bool,
    /// Use gRPC even where shared memory could be had.
    pub grpc_only: bool,
    /// Looks at the ring before sleeping on the bell. More is faster and costs CPU; none on one core.
    pub spins: u32,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        let alone = std::thread::available_parallelism().is_ok_and(|cores| cores.get() == 1);
        Self {
            name: String::new(),
            staging_bytes: 64 << 20,
            hazards: 4096,
            ring_entries: 1024,
            numa_node: None,
            trusted: false,
            grpc_only: false,
            spins: if alone { 0 } else { 2_000 },
        }
    }
}

impl WorkerOptions {
    pub(crate) fn check(&self) -> Result<(), Error> {
        let wrong = |option, why: String| Err(Error::Option { option, why });
        if self.name.len() > NAME_BYTES_MAX {
            return wrong("name", format!("{} bytes, {NAME_BYTES_MAX} are allowed", self.name.len()));
        }
        if self.staging_bytes > kv_shm::Layout::STAGING_BYTES_MAX {
            return wrong("staging_bytes", format!("{} is too much", self.staging_bytes));
        }
        if self.ring_entries > kv_shm::Layout::ENTRIES_MAX {
            return wrong(
                "ring_entries",
                format!("{}, {} are allowed", self.ring_entries, kv_shm::Layout::ENTRIES_MAX),
            );
        }
        if self.hazards > kv_shm::door::HAZARDS_MAX {
            return wrong("hazards", format!("{}, {} are allowed", self.hazards, kv_shm::door::HAZARDS_MAX));
        }
        Ok(())
    }
}

/// How a block is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PutOptions {
    /// Retention class.
    pub priority: Priority,
    /// Time until it expires, in whole seconds, rounded up; none means never.
    pub ttl: Option<Duration>,
    /// Answer only when it is on disk.
    pub durable: bool,
    /// The block before it in its prefix, where that is known; of many, the block before the first. A tier below may
    /// keep them together; nothing else depends on it.
    pub after: Option<SequenceHash>,
}

impl PutOptions {
    /// The same for one of these blocks, which follow each other.
    pub(crate) fn at(&self, index: usize, hashes: &[SequenceHash]) -> Self {
        Self { after: before(index, hashes, self.after), ..*self }
    }

    pub(crate) fn ttl_s(&self) -> u32 {
        let whole = |ttl: Duration| ttl.as_secs().saturating_add(u64::from(ttl.subsec_nanos() > 0));
        self.ttl.map_or(0, |ttl| u32::try_from(whole(ttl)).unwrap_or(u32::MAX).max(1))
    }
}

/// What comes before one of `all`, which follow each other; `first` comes before the first.
pub(crate) fn before<T: Copy>(index: usize, all: &[T], first: Option<T>) -> Option<T> {
    index.checked_sub(1).map_or(first, |at| all.get(at).copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_directory_and_its_socket_name_the_same_daemon() {
        for path in ["/run/kvd", "/run/kvd/kvd.sock"] {
            let endpoint = Endpoint::Socket(path.into());
            assert_eq!(endpoint.grpc_socket().unwrap(), Path::new("/run/kvd/kvd.sock"));
            assert_eq!(endpoint.worker_socket().unwrap(), Path::new("/run/kvd/worker.sock"));
        }
        let remote = Endpoint::Uri { uri: "http://127.0.0.1:1".into(), tls: None };
        assert_eq!((remote.grpc_socket(), remote.worker_socket()), (None, None));
    }

    #[test]
    fn a_time_to_live_is_never_rounded_to_never() {
        let ttl_s = |ttl| PutOptions { ttl, ..PutOptions::default() }.ttl_s();
        assert_eq!(ttl_s(None), 0);
        assert_eq!(ttl_s(Some(Duration::ZERO)), 1);
        assert_eq!(ttl_s(Some(Duration::from_millis(1_001))), 2);
        assert_eq!(ttl_s(Some(Duration::MAX)), u32::MAX);
    }

    #[test]
    fn each_of_many_blocks_comes_after_the_one_before_it() {
        let hashes = [1_u64, 2, 3].map(SequenceHash::from);
        let after =
            |first, index| PutOptions { after: first, ..PutOptions::default() }.at(index, &hashes).after;
        assert_eq!([0, 1, 2].map(|index| after(None, index)), [None, Some(hashes[0]), Some(hashes[1])]);
        assert_eq!([0, 1].map(|index| after(Some(hashes[2]), index)), [Some(hashes[2]), Some(hashes[0])]);
    }

    #[test]
    fn options_that_no_daemon_could_grant_are_refused_by_name() {
        let wrong = WorkerOptions { ring_entries: 1 << 20, ..WorkerOptions::default() };
        assert!(wrong.check().unwrap_err().to_string().contains("ring_entries"));
        let wrong = WorkerOptions { hazards: 1 << 20, ..WorkerOptions::default() };
        assert!(wrong.check().unwrap_err().to_string().contains("hazards"));
        WorkerOptions::default().check().unwrap();
    }
}
