//! What this machine shows of GPUs, and of the processes that are to share memory of theirs.

use std::path::Path;

use kv_api::v1;

use super::{Socket, Space, space};

/// NVIDIA's number among those who make PCI devices.
const VENDOR: &str = "0x10de";
/// Class of display devices: with a screen, or with none.
const CLASS: &str = "0x03";
const SHM: &str = "/dev/shm";

/// All of it. Nothing where the daemon is on another machine.
#[derive(Default)]
pub(crate) struct GpuFacts {
    /// Bus addresses of NVIDIA's display devices.
    pub(crate) on_bus: Vec<String>,
    /// Its device files: `nvidia0`, `nvidiactl`, `nvidia-uvm`.
    pub(crate) files: Vec<String>,
    /// The daemon's own process.
    pub(crate) daemon: Process,
    /// Workers of this machine that are connected, without those inside the daemon.
    pub(crate) workers: Vec<Worker>,
    /// Space in /dev/shm.
    pub(crate) shm: Option<Space>,
}

impl GpuFacts {
    /// Whether there is a GPU of NVIDIA, whoever may use it. A file with a number is one GPU's. `nvidiactl` alone says
    /// nothing: the driver's library makes it wherever root loads it.
    pub(crate) fn has_hardware(&self) -> bool {
        let is_gpu =
            |file: &String| file.strip_prefix("nvidia").is_some_and(|rest| rest.parse::<u32>().is_ok());
        !self.on_bus.is_empty() || self.files.iter().any(is_gpu)
    }
}

/// A process, as far as it can be seen from here.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Process {
    /// Its user.
    pub(crate) uid: Option<u32>,
    /// The number that it has for itself: in the innermost of its PID namespaces.
    pub(crate) own_pid: Option<u32>,
    /// What it has at /dev/shm.
    pub(crate) shm: Option<Mount>,
}

/// A file system, and the directory of it that is mounted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Mount {
    pub(crate) device: String,
    pub(crate) root: String,
}

/// A worker that is connected.
pub(crate) struct Worker {
    /// What it calls itself, else its session.
    pub(crate) name: String,
    /// The daemon sees its process. It does not when the worker is in a PID namespace beside its own.
    pub(crate) is_seen: bool,
    pub(crate) process: Process,
}

/// Looks it up. `clients` are those whom the daemon tells of.
pub(super) fn gather(socket: &Socket, clients: &[v1::ClientInfo]) -> GpuFacts {
    if matches!(socket, Socket::Remote) {
        return GpuFacts::default();
    }
    let proc = Path::new("/proc");
    let (pid, uid) = match socket {
        Socket::Open { pid, uid } => (pid.and_then(|pid| u32::try_from(pid).ok()), *uid),
        _ => (None, None),
    };
    let pids = pid.map_or_else(Vec::new, |pid| namespace_pids(proc, pid));
    let daemon = Process {
        uid,
        own_pid: pids.last().copied(),
        shm: pid.and_then(|pid| shm_mount(&read(&proc.join(pid.to_string()).join("mountinfo")))),
    };
    // What the daemon calls a process is its number here only where the daemon has no namespace below ours.
    let same_numbers = pids.len() == 1;
    let ours = clients.iter().filter(|client| client.uid != u32::MAX && Some(client.pid) != pid);
    let workers = ours.map(|client| worker(proc, client, same_numbers)).collect();
    GpuFacts {
        on_bus: on_bus(Path::new("/sys/bus/pci/devices")),
        files: names(Path::new("/dev")).into_iter().filter(|name| name.starts_with("nvidia")).collect(),
        daemon,
        workers,
        shm: space(Path::new(SHM)).ok(),
    }
}

fn worker(proc: &Path, client: &v1::ClientInfo, same_numbers: bool) -> Worker {
    let name =
        if client.name.is_empty() { format!("session {}", client.session) } else { client.name.clone() };
    let mut process = Process { uid: Some(client.uid), ..Process::default() };
    if client.pid != 0 && same_numbers {
        process.own_pid = namespace_pids(proc, client.pid).last().copied();
        process.shm = shm_mount(&read(&proc.join(client.pid.to_string()).join("mountinfo")));
    }
    Worker { name, is_seen: client.pid != 0, process }
}

/// The numbers of a process, from our PID namespace inwards; none when it is gone.
fn namespace_pids(proc: &Path, pid: u32) -> Vec<u32> {
    let status = read(&proc.join(pid.to_string()).join("status"));
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    line.split_whitespace().filter_map(|number| number.parse().ok()).collect()
}

/// What is mounted last at /dev/shm, by a process' `mountinfo`; `None` where nothing is.
fn shm_mount(mountinfo: &str) -> Option<Mount> {
    mountinfo.lines().rev().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let (device, root, at) = (fields.next()?, fields.next()?, fields.next()?);
        (at == SHM).then(|| Mount { device: device.into(), root: root.into() })
    })
}

/// Bus addresses of NVIDIA's display devices, below `/sys/bus/pci/devices`.
fn on_bus(devices: &Path) -> Vec<String> {
    let is_one = |address: &String| {
        let device = devices.join(address);
        read(&device.join("vendor")).trim() == VENDOR && read(&device.join("class")).starts_with(CLASS)
    };
    names(devices).into_iter().filter(is_one).collect()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Names in a directory, in order; none where it is not there.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            let path = dir.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
    }

    #[test]
    fn only_nvidias_display_devices_count() {
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            &[
                ("0000:3b:00.0/vendor", "0x10de\n"),
                ("0000:3b:00.0/class", "0x030200\n"),
                // A switch of NVLink, and a network card of theirs.
                ("0000:5e:00.0/vendor", "0x10de\n"),
                ("0000:5e:00.0/class", "0x068000\n"),
                ("0000:00:02.0/vendor", "0x8086\n"),
                ("0000:00:02.0/class", "0x030000\n"),
                ("0000:01:00.0/vendor", "0x10de\n"),
                ("0000:01:00.0/class", "0x030000\n"),
                ("0000:02:00.0/class", "0x030000\n"),
            ],
        );
        assert_eq!(on_bus(dir.path()), ["0000:01:00.0", "0000:3b:00.0"]);
        assert_eq!(on_bus(&dir.path().join("none")), [""; 0]);
    }

    #[test]
    fn only_a_file_with_a_number_is_a_gpu() {
        let with = |files: &[&str]| {
            let files = files.iter().map(|file| (*file).to_owned()).collect();
            GpuFacts { files, ..GpuFacts::default() }.has_hardware()
        };
        assert!(with(&["nvidia0", "nvidiactl"]) && with(&["nvidia15"]));
        assert!(!with(&[]) && !with(&["nvidia-caps", "nvidia-uvm", "nvidiactl"]));
    }

    #[test]
    fn what_is_mounted_last_at_dev_shm_counts() {
        let mountinfo = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
25 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=1k
26 24 0:23 / /dev/shm/x rw - tmpfs tmpfs rw
30 25 0:27 /pods/7 /dev/shm rw,relatime shared:4 - tmpfs tmpfs rw
";
        let wanted = Mount { device: "0:27".into(), root: "/pods/7".into() };
        assert_eq!(shm_mount(mountinfo), Some(wanted));
        assert_eq!(shm_mount("22 27 0:21 / /proc rw - proc proc rw\nnonsense\n"), None);
    }

    #[test]
    fn a_worker_in_a_container_has_its_own_number_and_dev_shm() {
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            &[
                ("41/status", "Name:\tpython\nPid:\t41\nNSpid:\t41\t1\n"),
                ("41/mountinfo", "30 25 0:99 / /dev/shm rw - tmpfs shm rw\n"),
            ],
        );
        let client = v1::ClientInfo { session: 7, pid: 41, uid: 1_000, ..Default::default() };
        let seen = worker(dir.path(), &client, true);
        assert_eq!((&*seen.name, seen.is_seen), ("session 7", true));
        let shm = Some(Mount { device: "0:99".into(), root: "/".into() });
        assert_eq!(seen.process, Process { uid: Some(1_000), own_pid: Some(1), shm });
        // Where the daemon counts processes otherwise than we do, a number of its is nobody's here.
        let unknown = Process { uid: Some(1_000), ..Process::default() };
        assert_eq!(worker(dir.path(), &client, false).process, unknown);
        let hidden = v1::ClientInfo { pid: 0, name: "rank 0".into(), ..client };
        let hidden = worker(dir.path(), &hidden, true);
        assert_eq!((&*hidden.name, hidden.is_seen, hidden.process), ("rank 0", false, unknown.clone()));
        let gone = v1::ClientInfo { pid: 42, uid: 1_000, ..Default::default() };
        assert_eq!(worker(dir.path(), &gone, true).process, unknown);
    }

    #[test]
    fn this_process_is_seen_as_it_is() {
        let own = std::process::id();
        let client = |session, pid, uid| v1::ClientInfo { session, pid, uid, ..Default::default() };
        // One inside the daemon, one from the network, and one of this machine that is hidden.
        let clients = [client(1, own, 5), client(2, 0, u32::MAX), client(3, 0, 5)];
        let socket = Socket::Open { pid: i32::try_from(own).ok(), uid: Some(5) };
        let facts = gather(&socket, &clients);
        let sessions: Vec<_> = facts.workers.iter().map(|worker| &*worker.name).collect();
        assert_eq!(sessions, ["session 3"]);
        assert_eq!(facts.daemon.uid, Some(5));
        assert!(facts.daemon.own_pid.is_some(), "the kernel tells of namespaces since 4.1");
        let remote = gather(&Socket::Remote, &clients);
        assert!(!remote.has_hardware() && remote.workers.is_empty() && remote.shm.is_none());
    }
}
