//! What `doctor` says of GPUs. A machine without any gets one line, and no advice.

use kv_api::v1;

use super::facts::gpus::{GpuFacts, Process, Worker};
use super::facts::{Facts, Memlock};
use super::{Finding, MEMLOCK_BYTES_WANTED, memlock_fix, mount_size};
use crate::units::{bytes, count, counted};

/// CUDA keeps small files for what processes share in /dev/shm. Below this there is soon no room for another.
const SHM_BYTES_WANTED: u64 = 16 << 20;
/// GPUs, or pairs of them, that one line names.
const NAMED_MAX: usize = 6;

/// The findings about GPUs.
pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![driver(facts)];
    let told = facts.daemon.as_ref().and_then(|daemon| daemon.as_ref().ok()?.gpus.as_ref());
    if let Some(gpus) = told.map(|told| &told.gpus[..]).filter(|gpus| !gpus.is_empty()) {
        findings.extend([lost(gpus, facts.systemd), peers(gpus), ipc(&facts.gpu, gpus), memory(facts)]);
    }
    findings
}

fn driver(facts: &Facts) -> Finding {
    const CHECK: &str = "gpu driver";
    let machine = &facts.gpu;
    let none = || Finding::ok(CHECK, "no GPU");
    let seen = match machine.on_bus.len() as u64 {
        0 => "device files of NVIDIA".to_owned(),
        number => counted(number, "NVIDIA GPU"),
    };
    let Some(Ok(daemon)) = &facts.daemon else {
        let found = format!("{seen} on this machine; whether kvd can use them it says when it runs");
        return if machine.has_hardware() { Finding::ok(CHECK, found) } else { none() };
    };
    match &daemon.gpus {
        Some(told) if !told.gpus.is_empty() => Finding::ok(CHECK, in_use(told, machine)),
        // Somebody named a driver, so he wants to have a GPU.
        Some(told) if !machine.has_hardware() && told.absent.contains("no CUDA driver: /") => {
            let fix = "gpu.driver names it: kvctl config print --effective shows its [gpu]";
            Finding::hint(CHECK, &told.absent, fix)
        }
        // What the driver says is of use to whoever expected one.
        Some(told) if !machine.has_hardware() && told.absent.starts_with("the CUDA driver") => {
            Finding::ok(CHECK, format!("no GPU; {}", told.absent))
        }
        _ if !machine.has_hardware() => none(),
        None => Finding::hint(
            CHECK,
            format!("{seen} on this machine, and this kvd knows nothing of GPUs"),
            "install the kvd that came with this kvctl, then restart it",
        ),
        // Somebody wants it so.
        Some(told) if told.absent.contains("gpu.enabled") => Finding::ok(CHECK, &told.absent),
        Some(told) => {
            let why = if told.absent.is_empty() { "kvd uses no GPU" } else { &told.absent };
            Finding::hint(CHECK, why, mend(why, &machine.files))
        }
    }
}

/// `CUDA 12.8, 7 of 8 GPUs; GPU 3 (0000:3b:00.0) is not used: ...`
fn in_use(told: &v1::ListGpusResponse, machine: &GpuFacts) -> String {
    let unused: Vec<_> = told.gpus.iter().filter(|gpu| gpu.state == "unused").collect();
    let used = told.gpus.len() - unused.len();
    // Some may be hidden from the daemon: by CUDA_VISIBLE_DEVICES, or by its container.
    let all = told.gpus.len().max(machine.on_bus.len()) as u64;
    let of = if used as u64 == all { String::new() } else { format!("{used} of ") };
    let mut text = format!("CUDA {}, {of}{}", told.driver, counted(all, "GPU"));
    for gpu in unused.iter().take(NAMED_MAX) {
        let why = if gpu.reason.is_empty() { String::new() } else { format!(": {}", gpu.reason) };
        text += &format!("; {} is not used{why}", title(gpu));
    }
    text
}

/// What to do about what a driver says; the words of daemon/docs/gpu.md.
const MENDS: [(&str, &str); 8] = [
    (
        "no CUDA driver",
        "install the NVIDIA driver; in a container its runtime must pass it on: --gpus all, \
         NVIDIA_DRIVER_CAPABILITIES=compute",
    ),
    (
        "CUDA_ERROR_SYSTEM_NOT_READY",
        "on a machine with NVSwitch, start the fabric manager: sudo systemctl start nvidia-fabricmanager",
    ),
    (
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        "library and kernel module differ: restart after an upgrade; in a container, do not install a driver",
    ),
    (
        "CUDA_ERROR_STUB_LIBRARY",
        "take the toolkit's stubs off the loader's path: LD_LIBRARY_PATH, /etc/ld.so.conf.d",
    ),
    ("CUDA_ERROR_UNKNOWN", "give kvd's user access to /dev/nvidia*: ls -l /dev/nvidia*"),
    (
        "has no device",
        "unset CUDA_VISIBLE_DEVICES for kvd, or see with nvidia-smi whether the driver has any",
    ),
    ("lacks", NEWER),
    ("is for CUDA", NEWER),
];
const NEWER: &str = "install a driver for CUDA 11.4 (R470) or newer";
const OTHERWISE: &str = "the log of kvd says more of it; kvctl config print --effective shows its [gpu]";

/// A line that mends what the driver says. `files` are the device files that there are.
fn mend(why: &str, files: &[String]) -> &'static str {
    // The module is loaded by a helper with root's rights, which a service without new privileges does not get.
    if why.contains("CUDA_ERROR_UNKNOWN") && !files.iter().any(|file| file == "nvidia-uvm") {
        return "/dev/nvidia-uvm is missing: sudo nvidia-modprobe -u -c=0, then restart kvd";
    }
    MENDS.iter().find(|(words, _)| why.contains(words)).map_or(OTHERWISE, |(_, fix)| fix)
}

fn lost(gpus: &[v1::GpuInfo], systemd: bool) -> Finding {
    const CHECK: &str = "gpu lost";
    let restart = if systemd { "sudo systemctl restart kvd" } else { "restart kvd" };
    let lost: Vec<_> = gpus.iter().filter(|gpu| gpu.state == "lost").collect();
    if !lost.is_empty() {
        let each = lost.iter().map(|gpu| format!("{}: {}", title(gpu), gpu.reason));
        let fix = format!("sudo dmesg | grep -i xid, then nvidia-smi; when it is well again: {restart}");
        return Finding::missing(CHECK, named(each, "; "), fix);
    }
    let kept: Vec<_> = gpus.iter().filter(|gpu| gpu.kept > 0).collect();
    if !kept.is_empty() {
        let each = kept.iter().map(|gpu| format!("{} {}", count(gpu.kept), title(gpu)));
        let found = format!("copies that never ended keep their memory: {}", named(each, "; "));
        return Finding::hint(CHECK, found, format!("to have it back: {restart}"));
    }
    Finding::ok(CHECK, "none")
}

fn peers(gpus: &[v1::GpuInfo]) -> Finding {
    const CHECK: &str = "gpu peers";
    let used = gpus.iter().filter(|gpu| gpu.state == "ok").count() as u64;
    let apart = apart(gpus);
    if apart.is_empty() {
        let found = if used < 2 { counted(used, "GPU") } else { format!("all {used} reach each other") };
        return Finding::ok(CHECK, found);
    }
    let each = apart.iter().map(|pair| match pair {
        (one, other, false) => format!("{one} and {other}"),
        (from, to, true) => format!("{from} to {to}"),
    });
    let found = format!("cannot reach each other: {}; blocks take the way by host memory", named(each, ", "));
    Finding::hint(
        CHECK,
        found,
        "nvidia-smi topo -p2p r says why; it takes NVLink or one PCIe root, with ACS and IOMMU out of the way",
    )
}

/// Every pair of GPUs in use of which one cannot access the other's memory: the one, the other, and whether it can at
/// least the other way round.
fn apart(gpus: &[v1::GpuInfo]) -> Vec<(u32, u32, bool)> {
    let used: Vec<_> = gpus.iter().filter(|gpu| gpu.state == "ok").collect();
    let reaches = |from: &v1::GpuInfo, to: &v1::GpuInfo| from.reaches.contains(&to.uuid);
    let mut pairs = Vec::new();
    for (at, one) in used.iter().enumerate() {
        for other in &used[at + 1..] {
            match (reaches(one, other), reaches(other, one)) {
                (true, true) => {}
                (false, back) => pairs.push((one.ordinal, other.ordinal, back)),
                (true, false) => pairs.push((other.ordinal, one.ordinal, true)),
            }
        }
    }
    pairs
}

/// What keeps a worker's device memory, or its events, from the daemon.
struct Obstacle {
    is: fn(&Process, &Worker) -> bool,
    /// Behind the worker's name.
    found: &'static str,
    fix: &'static str,
}

/// A handle of memory is found by the driver, wherever its owner runs, as long as the two processes have other numbers. A
/// handle of an event is found in a file in /dev/shm, which its owner alone may open.
const OBSTACLES: [Obstacle; 4] = [
    Obstacle {
        is: |kvd, worker| worker.process.own_pid.is_some() && worker.process.own_pid == kvd.own_pid,
        found: "has the same process number in its container as kvd in its own: the driver takes its memory for kvd's",
        fix: "let both see the same processes: hostPID: true in both pods, or docker --pid=host",
    },
    Obstacle {
        is: |_, worker| !worker.is_seen,
        found: "is in another PID namespace: the driver refuses its memory when their numbers agree",
        fix: "let both see the same processes: hostPID: true in both pods, or docker --pid=host",
    },
    Obstacle {
        is: |kvd, worker| differ(kvd.shm.as_ref(), worker.process.shm.as_ref()),
        found: "has another /dev/shm than kvd: its events cannot be opened",
        fix: "mount the host's /dev/shm into both (hostPath), or hostIPC: true; docker --ipc=host",
    },
    Obstacle {
        is: |kvd, worker| differ(kvd.uid, worker.process.uid),
        found: "runs as another user than kvd: CUDA's files of its events in /dev/shm are that user's alone",
        fix: "run kvd and the worker as one user",
    },
];

/// Both are known, and are not the same.
fn differ<T: PartialEq>(one: Option<T>, other: Option<T>) -> bool {
    one.zip(other).is_some_and(|(one, other)| one != other)
}

fn ipc(machine: &GpuFacts, gpus: &[v1::GpuInfo]) -> Finding {
    const CHECK: &str = "gpu ipc";
    let workers = &machine.workers[..];
    if workers.is_empty() {
        return Finding::ok(CHECK, "no worker of this machine is connected");
    }
    let caches: u64 = gpus.iter().map(|gpu| u64::from(gpu.caches)).sum();
    let connected = format!(
        "{} with {} on GPUs",
        counted(workers.len() as u64, "worker"),
        counted(caches, "registered cache")
    );
    // What works needs no advice: a cache is registered when its memory and its events have been opened.
    if caches >= workers.len() as u64 {
        return Finding::ok(CHECK, connected);
    }
    for obstacle in &OBSTACLES {
        let behind: Vec<_> = workers.iter().filter(|worker| (obstacle.is)(&machine.daemon, worker)).collect();
        if let [first, more @ ..] = &behind[..] {
            let more = if more.is_empty() { String::new() } else { format!(" (+{})", more.len()) };
            return Finding::hint(CHECK, format!("{}{more} {}", first.name, obstacle.found), obstacle.fix);
        }
    }
    let all_known = machine.daemon.shm.is_some() && workers.iter().all(|worker| worker.process.shm.is_some());
    let known = if all_known { "one /dev/shm for all" } else { "whether they share /dev/shm cannot be seen" };
    Finding::ok(CHECK, format!("{connected}; {known}"))
}

fn memory(facts: &Facts) -> Finding {
    const CHECK: &str = "gpu memory";
    if let Some(shm) = facts.gpu.shm.filter(|shm| shm.free < SHM_BYTES_WANTED) {
        let size = mount_size(shm.total.saturating_add(SHM_BYTES_WANTED));
        return Finding::hint(
            CHECK,
            format!(
                "/dev/shm: {} free of {}; CUDA needs room there for what processes share",
                bytes(shm.free),
                bytes(shm.total)
            ),
            format!("sudo mount -o remount,size={size} /dev/shm; docker --shm-size"),
        );
    }
    let wanted = facts.host_bytes_wanted;
    match facts.memlock {
        // The limit of this shell says nothing of what the daemon may lock, and of a very low one `memlock` has said it.
        Memlock { bytes_max: Some(limit), of_daemon: true }
            if (MEMLOCK_BYTES_WANTED..wanted).contains(&limit) =>
        {
            let (limit, wanted) = (bytes(limit), bytes(wanted));
            let found = format!(
                "kvd may lock {limit} of the {wanted} of host memory that GPUs are to reach: a driver that \
                 counts it refuses the rest"
            );
            Finding::hint(CHECK, found, memlock_fix(facts))
        }
        _ => Finding::ok(CHECK, format!("{} of host memory for GPUs to reach", bytes(wanted))),
    }
}

/// `GPU 3 (0000:3b:00.0)`: the kernel's messages go by the bus address.
fn title(gpu: &v1::GpuInfo) -> String {
    format!("GPU {} ({})", gpu.ordinal, gpu.bus)
}

/// The first of these, and how many there are beside them.
fn named(each: impl ExactSizeIterator<Item = String>, between: &str) -> String {
    let more = each.len().saturating_sub(NAMED_MAX);
    let text = each.take(NAMED_MAX).collect::<Vec<_>>().join(between);
    if more == 0 { text } else { format!("{text} (+{more})") }
}

#[cfg(test)]
mod tests {
    use super::super::facts::gpus::Mount;
    use super::super::facts::{DaemonFacts, Space};
    use super::super::tests::healthy;
    use super::super::{Mark, exit};
    use super::*;
    use crate::exit::{Exit, Failure};

    fn gpu(ordinal: u32, uuid: &str, reaches: &[&str]) -> v1::GpuInfo {
        v1::GpuInfo {
            ordinal,
            uuid: uuid.into(),
            bus: format!("0000:{ordinal:02x}:00.0"),
            state: "ok".into(),
            reaches: reaches.iter().map(|uuid| (*uuid).into()).collect(),
            ..Default::default()
        }
    }

    fn shm(device: &str) -> Option<Mount> {
        Some(Mount { device: device.into(), root: "/".into() })
    }

    fn worker(name: &str) -> Worker {
        let process = Process { uid: Some(7), own_pid: Some(41), shm: shm("0:23") };
        Worker { name: name.into(), is_seen: true, process }
    }

    /// A machine with two GPUs that kvd uses, and a worker that has not registered yet.
    fn with_gpus() -> Facts {
        let mut facts = healthy();
        facts.gpu = GpuFacts {
            on_bus: vec!["0000:00:00.0".into(), "0000:01:00.0".into()],
            files: ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"].map(str::to_owned).into(),
            daemon: Process { uid: Some(7), own_pid: Some(1), shm: shm("0:23") },
            workers: vec![worker("rank 0")],
            shm: Some(Space { total: 8 << 30, free: 6 << 30 }),
        };
        let gpus = vec![gpu(0, "GPU-a", &["GPU-b"]), gpu(1, "GPU-b", &["GPU-a"])];
        let told = v1::ListGpusResponse { driver: "12.8".into(), gpus, ..Default::default() };
        daemon(&mut facts).gpus = Some(told);
        facts
    }

    fn daemon(facts: &mut Facts) -> &mut DaemonFacts {
        facts.daemon.as_mut().unwrap().as_mut().unwrap()
    }

    fn gpus(facts: &mut Facts) -> &mut Vec<v1::GpuInfo> {
        &mut daemon(facts).gpus.as_mut().unwrap().gpus
    }

    /// kvd uses no GPU, and says so.
    fn absent(facts: &mut Facts, why: &str) {
        daemon(facts).gpus = Some(v1::ListGpusResponse { absent: why.into(), ..Default::default() });
    }

    fn found<'a>(findings: &'a [Finding], check: &str) -> &'a str {
        &findings.iter().find(|finding| finding.check == check).unwrap().found
    }

    #[test]
    fn gpus_in_order_get_no_advice() {
        let findings = judge(&with_gpus());
        let told: Vec<_> = findings.iter().map(|f| (f.check, f.mark, &*f.found)).collect();
        assert_eq!(
            told,
            [
                ("gpu driver", Mark::Ok, "CUDA 12.8, 2 GPUs"),
                ("gpu lost", Mark::Ok, "none"),
                ("gpu peers", Mark::Ok, "all 2 reach each other"),
                ("gpu ipc", Mark::Ok, "1 worker with 0 registered caches on GPUs; one /dev/shm for all"),
                ("gpu memory", Mark::Ok, "4.0GiB of host memory for GPUs to reach"),
            ]
        );
    }

    #[test]
    fn a_machine_without_gpus_gets_one_line_whatever_the_driver_says() {
        let no_gpu = |facts: &Facts, words: &str| {
            let findings = judge(facts);
            assert_eq!(findings, [Finding::ok("gpu driver", words)]);
        };
        let mut facts = with_gpus();
        (facts.gpu.on_bus, facts.gpu.files) = (Vec::new(), vec!["nvidiactl".into()]);
        let refuses = "the CUDA driver does not start: CUDA_ERROR_UNKNOWN (999)";
        let said = format!("no GPU; {refuses}");
        for (why, words) in [("no CUDA driver: x", "no GPU"), (refuses, &said), ("", "no GPU")] {
            absent(&mut facts, why);
            no_gpu(&facts, words);
        }
        daemon(&mut facts).gpus = None;
        no_gpu(&facts, "no GPU");
        facts.daemon = Some(Err(Failure::new(Exit::Unreachable, "hangs")));
        no_gpu(&facts, "no GPU");
        facts.daemon = None;
        no_gpu(&facts, "no GPU");
    }

    #[test]
    fn a_driver_that_somebody_named_and_that_is_not_there_is_told() {
        let mut facts = with_gpus();
        (facts.gpu.on_bus, facts.gpu.files) = (Vec::new(), Vec::new());
        absent(&mut facts, "no CUDA driver: /opt/libcuda.so.1: cannot open shared object file");
        let findings = judge(&facts);
        let [finding] = &findings[..] else { panic!("{findings:?}") };
        assert_eq!(finding.mark, Mark::Hint);
        assert!(finding.fix.as_ref().unwrap().contains("gpu.driver"), "{finding:?}");
    }

    #[test]
    fn a_driver_that_cannot_be_used_is_a_hint_with_the_mending_words() {
        for (why, word) in [
            ("no CUDA driver: libcuda.so.1: cannot open shared object file", "--gpus all"),
            ("the CUDA driver libcuda.so.1 lacks cuDeviceGetUuid_v2; 11.4 or newer is needed", "R470"),
            ("the CUDA driver is for CUDA 10.2; 11.4 or newer is needed", "R470"),
            ("the CUDA driver does not start: CUDA_ERROR_SYSTEM_NOT_READY (802)", "fabricmanager"),
            ("the CUDA driver does not start: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)", "after an upgrade"),
            ("the CUDA driver does not start: CUDA_ERROR_STUB_LIBRARY (34)", "stubs"),
            ("the CUDA driver does not start: CUDA_ERROR_UNKNOWN (999)", "access to /dev/nvidia*"),
            ("the CUDA driver has no device (none is installed, or ...)", "CUDA_VISIBLE_DEVICES"),
            ("this build does not look for GPUs", "the log of kvd"),
            ("", "the log of kvd"),
        ] {
            for hide in [|_: &mut Facts| {}, |f: &mut Facts| f.gpu.on_bus.clear()] {
                let mut facts = with_gpus();
                absent(&mut facts, why);
                hide(&mut facts);
                let findings = judge(&facts);
                let [finding] = &findings[..] else { panic!("{why}: {findings:?}") };
                assert_eq!((finding.check, finding.mark), ("gpu driver", Mark::Hint), "{why}");
                assert!(finding.fix.as_ref().unwrap().contains(word), "{finding:?}");
                assert!(why.is_empty() || finding.found == why, "{finding:?}");
                assert_eq!(exit(&findings, false), Exit::Ok, "the node goes on without");
            }
        }
        let mut facts = with_gpus();
        absent(&mut facts, "the CUDA driver does not start: CUDA_ERROR_UNKNOWN (999)");
        facts.gpu.files.retain(|file| file != "nvidia-uvm");
        assert!(judge(&facts)[0].fix.as_ref().unwrap().contains("nvidia-modprobe -u"));
    }

    #[test]
    fn every_error_of_the_driver_in_the_documents_has_a_mend() {
        let page = include_str!("../../../../../daemon/docs/gpu.md");
        let words = page.lines().filter(|line| line.starts_with('|'));
        let words = words.flat_map(|line| line.split(|c: char| !(c.is_ascii_uppercase() || c == '_')));
        let errors: Vec<_> = words.filter(|word| word.starts_with("CUDA_ERROR_")).collect();
        assert!(errors.len() >= 4, "{errors:?}");
        for error in errors {
            assert_ne!(mend(error, &["nvidia-uvm".into()]), OTHERWISE, "{error}");
        }
    }

    #[test]
    fn what_nobody_can_say_or_somebody_wants_is_no_trouble() {
        let mut facts = with_gpus();
        absent(&mut facts, "gpu.enabled is off");
        assert_eq!(judge(&facts), [Finding::ok("gpu driver", "gpu.enabled is off")]);
        facts.daemon = None;
        let findings = judge(&facts);
        assert_eq!(findings[0].mark, Mark::Ok);
        assert!(findings[0].found.starts_with("2 NVIDIA GPUs on this machine; whether"), "{findings:?}");
        let mut facts = with_gpus();
        daemon(&mut facts).gpus = None;
        let findings = judge(&facts);
        assert_eq!((findings.len(), findings[0].mark), (1, Mark::Hint), "an older daemon uses none of them");
        let mut facts = with_gpus();
        gpus(&mut facts)[1].state = "unused".into();
        gpus(&mut facts)[1].reason = "gpu.devices leaves it out".into();
        facts.gpu.on_bus.push("0000:02:00.0".into());
        let findings = judge(&facts);
        assert_eq!(
            found(&findings, "gpu driver"),
            "CUDA 12.8, 1 of 3 GPUs; GPU 1 (0000:01:00.0) is not used: gpu.devices leaves it out"
        );
        assert_eq!(found(&findings, "gpu peers"), "1 GPU");
        assert_eq!(exit(&findings, true), Exit::Ok);
    }

    #[test]
    fn each_trouble_is_named_with_what_mends_it() {
        type Break = fn(&mut Facts);
        let cases: [(&str, Mark, &str, &str, Break); 13] = [
            ("gpu lost", Mark::Missing, "GPU 1 (0000:01:00.0): gone", "systemctl restart kvd", |f| {
                gpus(f)[1].state = "lost".into();
                gpus(f)[1].reason = "gone".into();
                gpus(f)[1].kept = 3;
            }),
            ("gpu lost", Mark::Hint, "2 GPU 0 (0000:00:00.0)", "to have it back", |f| gpus(f)[0].kept = 2),
            ("gpu peers", Mark::Hint, "each other: 0 and 1;", "topo -p2p", |f| {
                gpus(f).iter_mut().for_each(|gpu| gpu.reaches.clear());
            }),
            ("gpu peers", Mark::Hint, "each other: 1 to 0;", "topo -p2p", |f| gpus(f)[1].reaches.clear()),
            ("gpu peers", Mark::Hint, "1 and 4, 1 and 5 (+10);", "topo -p2p", |f| {
                // Two islands of four.
                let of = |island: u32| (island * 4..island * 4 + 4).map(|at| format!("GPU-{at}"));
                let one = |at| gpu(at, &format!("GPU-{at}"), &[]);
                *gpus(f) =
                    (0..8).map(|at| v1::GpuInfo { reaches: of(at / 4).collect(), ..one(at) }).collect();
            }),
            ("gpu ipc", Mark::Hint, "rank 0 has the same process number", "hostPID", |f| {
                f.gpu.workers[0].process.own_pid = Some(1);
            }),
            ("gpu ipc", Mark::Hint, "rank 0 is in another PID namespace", "--pid=host", |f| {
                f.gpu.workers[0].is_seen = false;
                f.gpu.workers[0].process.own_pid = None;
            }),
            ("gpu ipc", Mark::Hint, "rank 0 has another /dev/shm", "hostIPC", |f| {
                f.gpu.workers[0].process.shm = shm("0:99");
            }),
            ("gpu ipc", Mark::Hint, "rank 1 (+1) has another /dev/shm", "hostIPC", |f| {
                for name in ["rank 1", "rank 2"] {
                    let mut inside = worker(name);
                    inside.process.shm.as_mut().unwrap().root = "/pods/7".into();
                    f.gpu.workers.push(inside);
                }
            }),
            ("gpu ipc", Mark::Hint, "rank 0 runs as another user", "as one user", |f| {
                f.gpu.workers[0].process.uid = Some(8);
            }),
            ("gpu memory", Mark::Hint, "/dev/shm: 1.0MiB free of 8.0GiB", "remount,size=9g", |f| {
                f.gpu.shm.as_mut().unwrap().free = 1 << 20;
            }),
            ("gpu memory", Mark::Hint, "may lock 2.0GiB of the 4.0GiB", "LimitMEMLOCK", |f| {
                f.memlock.bytes_max = Some(2 << 30);
            }),
            ("gpu memory", Mark::Hint, "may lock 2.0GiB", "ulimit -l unlimited", |f| {
                f.memlock.bytes_max = Some(2 << 30);
                f.systemd = false;
            }),
        ];
        for (check, mark, words, fix, break_it) in cases {
            let mut facts = with_gpus();
            break_it(&mut facts);
            let findings = judge(&facts);
            let bad: Vec<&Finding> = findings.iter().filter(|finding| finding.mark != Mark::Ok).collect();
            let [finding] = bad[..] else { panic!("{words}: {bad:?}") };
            assert_eq!((finding.check, finding.mark), (check, mark), "{finding:?}");
            assert!(finding.found.contains(words), "{words}: {finding:?}");
            assert!(finding.fix.as_ref().unwrap().contains(fix), "{fix}: {finding:?}");
        }
    }

    #[test]
    fn what_cannot_be_seen_or_works_already_gets_no_advice() {
        type Change = fn(&mut Facts);
        let cases: [(&str, Change); 6] = [
            ("no worker of this machine is connected", |f| f.gpu.workers.clear()),
            ("1 worker with 0 registered caches on GPUs; whether they share /dev/shm cannot be seen", |f| {
                f.gpu.workers[0].process.shm = None;
            }),
            ("1 worker with 0 registered caches on GPUs; whether they share /dev/shm cannot be seen", |f| {
                f.gpu.daemon = Process::default();
            }),
            ("1 worker with 1 registered cache on GPUs", |f| {
                f.gpu.workers[0].is_seen = false;
                gpus(f)[0].caches = 1;
            }),
            // What this shell may lock is not what kvd may; and of a low limit another line has said it.
            ("1 worker with 0 registered caches on GPUs; one /dev/shm for all", |f| {
                f.memlock = Memlock { bytes_max: Some(2 << 30), of_daemon: false };
            }),
            ("1 worker with 0 registered caches on GPUs; one /dev/shm for all", |f| {
                f.memlock.bytes_max = Some(8 << 20);
            }),
        ];
        for (words, change) in cases {
            let mut facts = with_gpus();
            change(&mut facts);
            let findings = judge(&facts);
            assert_eq!(found(&findings, "gpu ipc"), words);
            assert_eq!(exit(&findings, true), Exit::Ok, "{findings:?}");
        }
    }

    #[test]
    fn pairs_that_are_apart_are_found_whichever_way() {
        let all = ["a", "b", "c"];
        let whole: Vec<_> = (0..3).map(|at| gpu(at, all[at as usize], &all)).collect();
        assert_eq!(apart(&whole), []);
        assert_eq!(apart(&whole[..1]), []);
        let mut some = whole.clone();
        some[0].reaches = vec!["c".into()];
        some[2].reaches = vec!["b".into()];
        assert_eq!(apart(&some), [(0, 1, true), (2, 0, true)]);
        some[1].reaches.clear();
        assert_eq!(apart(&some), [(0, 1, false), (2, 0, true), (1, 2, true)]);
        some[0].state = "lost".into();
        some[1].state = "unused".into();
        assert_eq!(apart(&some), [], "those that are not used reach nobody");
    }
}
