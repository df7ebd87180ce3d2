//! `kvctl doctor`: names every missing prerequisite and the command that mends it.
//!
//! ```text
//! gather (looks at this machine and asks the daemon) -> Facts -> judge (pure) -> Findings -> text or JSON
//! ```

mod facts;
mod gpus;

use clap::Args;
use serde_json::json;

use self::facts::{DataDir, Facts, Memlock, Socket};
use crate::cli::{Format, Global, Show};
use crate::cmd::version::{OWN, skew};
use crate::exit::{Exit, Failure, printable};
use crate::out;
use crate::paint::{Ink, Paint};
use crate::structured;
use crate::units::{bytes, counted};

/// Below this, registered I/O buffers and locked memory soon run out.
const MEMLOCK_BYTES_WANTED: u64 = 1 << 30;
const EXITS: &str = "Exits with 1 when something required is missing, 0 when all of it is there.";

#[derive(Debug, Args)]
#[command(after_help = EXITS)]
pub(crate) struct Arguments {
    /// Data directory to look at [that of the daemon]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<std::path::PathBuf>,
    /// Directory for shared memory to look at [that of the daemon, or /dev/shm]
    #[arg(long, value_name = "DIR")]
    memory_dir: Option<std::path::PathBuf>,
    /// Exit with 4 when something optional is missing
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    show: Show,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let facts = facts::gather(global, arguments.data_dir, arguments.memory_dir).await?;
    let findings = judge(&facts);
    let format = arguments.show.output;
    let text = structured::text(format, false, || findings.iter().map(Finding::json).collect());
    out::print(&text.unwrap_or_else(|| match format {
        Format::Name => {
            findings.iter().filter(|f| f.mark != Mark::Ok).map(|f| format!("{}\n", f.check)).collect()
        }
        _ => page(&findings, Paint::stdout()),
    }))?;
    Ok(exit(&findings, arguments.strict))
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Mark {
    /// As it should be.
    Ok,
    /// It works without, but less well.
    Hint,
    /// It does not work without.
    Missing,
}

/// One thing looked at.
#[derive(Clone, PartialEq, Debug)]
struct Finding {
    mark: Mark,
    check: &'static str,
    found: String,
    /// A command or a line that mends it.
    fix: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { mark: Mark::Ok, check, found: found.into(), fix: None }
    }

    fn hint(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { mark: Mark::Hint, check, found: found.into(), fix: Some(fix.into()) }
    }

    fn missing(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { mark: Mark::Missing, check, found: found.into(), fix: Some(fix.into()) }
    }

    fn json(&self) -> serde_json::Value {
        let state = match self.mark {
            Mark::Ok => "ok",
            Mark::Hint => "hint",
            Mark::Missing => "missing",
        };
        json!({ "check": self.check, "state": state, "found": self.found, "fix": self.fix })
    }
}

fn exit(findings: &[Finding], strict: bool) -> Exit {
    match findings.iter().map(|finding| finding.mark).max() {
        Some(Mark::Missing) => Exit::Failure,
        Some(Mark::Hint) if strict => Exit::Degraded,
        _ => Exit::Ok,
    }
}

fn page(findings: &[Finding], paint: Paint) -> String {
    let mut text = String::new();
    for finding in findings {
        let (ink, word) = match finding.mark {
            Mark::Ok => (Ink::Good, "ok      "),
            Mark::Hint => (Ink::Warn, "hint    "),
            Mark::Missing => (Ink::Bad, "missing "),
        };
        text += &format!("{}{:12}{}\n", paint.ink(ink, word), finding.check, printable(&finding.found));
        if let Some(fix) = &finding.fix {
            text += &format!("{:20}{} {}\n", "", paint.ink(Ink::Note, "mend:"), printable(fix));
        }
    }
    let number = |mark| findings.iter().filter(|finding| finding.mark == mark).count() as u64;
    text + &format!("{}, {} missing\n", counted(number(Mark::Hint), "hint"), number(Mark::Missing))
}

/// What the facts mean.
fn judge(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![socket(facts)];
    findings.extend(daemon(facts));
    findings.extend([
        memlock(facts),
        huge_pages(facts),
        io_uring(facts),
        memory_dir(facts),
        data_dir(facts),
        numa(facts),
    ]);
    findings.extend(gpus::judge(facts));
    findings
}

fn socket(facts: &Facts) -> Finding {
    let at = &facts.address;
    let start = facts.start;
    match &facts.socket {
        Socket::Open { .. } => Finding::ok("socket", at),
        Socket::Remote => Finding::ok("socket", format!("{at}, not on this machine")),
        Socket::Absent => Finding::missing("socket", format!("{at} does not exist"), start),
        Socket::Refused => Finding::missing("socket", format!("nobody listens on {at}"), start),
        Socket::Denied { group } => Finding::missing(
            "socket",
            format!("{at} may not be opened by this user"),
            format!("sudo usermod -aG {group} $USER, then log in again"),
        ),
        Socket::Other(error) => Finding::missing("socket", format!("{at}: {error}"), start),
    }
}

fn daemon(facts: &Facts) -> Vec<Finding> {
    let daemon = match &facts.daemon {
        None => return Vec::new(),
        Some(Err(failure)) => {
            let fix = failure.help.clone().unwrap_or_else(|| "kvctl status".into());
            return vec![Finding::missing("daemon", failure.message.clone(), fix)];
        }
        Some(Ok(daemon)) => daemon,
    };
    let found = format!("{} answers, health {}", daemon.node, daemon.health);
    let health = if daemon.health == "ok" {
        Finding::ok("daemon", found)
    } else {
        Finding::hint("daemon", found, "kvctl status")
    };
    let version = match skew(OWN, &daemon.version) {
        None => Finding::ok("version", format!("kvctl {OWN}, kvd {}", daemon.version)),
        Some(skew) => Finding::missing(
            "version",
            format!("kvctl {OWN}, kvd {}: {skew}", daemon.version),
            "install both from one release, then: sudo systemctl restart kvd",
        ),
    };
    vec![health, version]
}

fn memlock(facts: &Facts) -> Finding {
    let Memlock { bytes_max, of_daemon } = facts.memlock;
    let whose = if of_daemon { "of kvd" } else { "of this shell" };
    match bytes_max {
        None => Finding::ok("memlock", format!("unlimited ({whose})")),
        Some(limit) if limit >= MEMLOCK_BYTES_WANTED => {
            Finding::ok("memlock", format!("{} ({whose})", bytes(limit)))
        }
        Some(limit) => {
            let found = format!("{} ({whose}): I/O buffers cannot be registered", bytes(limit));
            Finding::hint("memlock", found, memlock_fix(facts))
        }
    }
}

/// What raises the limit of memory that may be locked.
fn memlock_fix(facts: &Facts) -> &'static str {
    if facts.systemd {
        "sudo systemctl edit kvd, add [Service] LimitMEMLOCK=infinity; then restart kvd"
    } else {
        "ulimit -l unlimited, as root, in the shell that starts kvd"
    }
}

fn huge_pages(facts: &Facts) -> Finding {
    let Some(huge) = facts.huge else {
        return Finding::hint("huge pages", "this kernel has none", "use a kernel with CONFIG_HUGETLBFS");
    };
    let found = format!("{} of {} free, {} each", huge.free, huge.total, bytes(huge.page_bytes));
    if huge.total > 0 {
        return Finding::ok("huge pages", found);
    }
    let pages = facts.host_bytes_wanted.div_ceil(huge.page_bytes.max(1));
    let fix = format!("echo {pages} | sudo tee /proc/sys/vm/nr_hugepages");
    Finding::hint("huge pages", format!("{found}: ordinary pages are used"), fix)
}

fn io_uring(facts: &Facts) -> Finding {
    let Err((errno, error)) = &facts.io_uring else {
        return Finding::ok("io_uring", "allowed");
    };
    let found = format!("{error}: the disk tier falls back to threads");
    let fix = match (facts.io_uring_disabled, rustix::io::Errno::from_raw_os_error(*errno)) {
        (Some(1 | 2), _) => "sudo sysctl kernel.io_uring_disabled=0",
        (_, rustix::io::Errno::NOSYS) => "use a kernel of 5.10 or later with CONFIG_IO_URING",
        (_, rustix::io::Errno::NOMEM) => "ulimit -l unlimited, as root, in the shell that starts kvd",
        _ => "allow io_uring_setup, _enter and _register in the container's seccomp profile",
    };
    Finding::hint("io_uring", found, fix)
}

fn memory_dir(facts: &Facts) -> Finding {
    let memory = &facts.memory;
    let (dir, wanted) = (memory.dir.display(), facts.host_bytes_wanted);
    let space = match &memory.space {
        Ok(space) => space,
        Err(error) => {
            let fix = format!("sudo mount -t tmpfs -o size={} tmpfs {dir}", mount_size(wanted));
            return Finding::missing("memory dir", format!("{dir}: {error}"), fix);
        }
    };
    let found = format!("{dir}: {} free of {}", bytes(space.free), bytes(space.total));
    // A daemon that runs has its memory already.
    if facts.daemon.as_ref().is_some_and(Result::is_ok) || space.free >= wanted {
        return Finding::ok("memory dir", found);
    }
    let size = mount_size(space.total.saturating_sub(space.free) + wanted);
    let fix = format!(
        "sudo mount -o remount,size={size} {dir}, or start kvd with --host-bytes {}",
        bytes(space.free / 2)
    );
    Finding::missing("memory dir", format!("{found}, {} wanted", bytes(wanted)), fix)
}

/// A size as mount takes it, rounded up to whole GiB.
fn mount_size(wanted: u64) -> String {
    format!("{}g", wanted.div_ceil(1 << 30).max(1))
}

fn data_dir(facts: &Facts) -> Finding {
    let Some((dir, data)) = &facts.data else {
        return Finding::ok("data dir", "the disk tier is off; kvd --data-dir DIR turns it on");
    };
    let dir = dir.display();
    match data {
        DataDir::Direct { free } => {
            Finding::ok("data dir", format!("{dir}: direct I/O, {} free", bytes(*free)))
        }
        DataDir::Buffered => Finding::missing(
            "data dir",
            format!("{dir}: its file system does not do direct I/O"),
            "put it on ext4 or xfs: kvd --data-dir DIR",
        ),
        DataDir::Denied => {
            Finding::hint("data dir", format!("{dir} cannot be seen by this user"), "sudo kvctl doctor")
        }
        DataDir::Absent => Finding::missing(
            "data dir",
            format!("{dir} does not exist"),
            format!("sudo install -d -o kvd {dir}"),
        ),
        DataDir::Other(error) => {
            Finding::missing("data dir", format!("{dir}: {error}"), format!("ls -ld {dir}; mount"))
        }
    }
}

fn numa(facts: &Facts) -> Finding {
    let nodes = counted(facts.numa_nodes.into(), "NUMA node");
    match &facts.daemon {
        Some(Ok(daemon)) if daemon.shards < facts.numa_nodes => Finding::hint(
            "numa",
            format!("{nodes}, {}: some memory is far from its shard", counted(daemon.shards.into(), "shard")),
            "let kvd use the CPUs of all nodes: remove AllowedCPUs=, cpuset or taskset around it",
        ),
        Some(Ok(daemon)) => {
            Finding::ok("numa", format!("{nodes}, {}", counted(daemon.shards.into(), "shard")))
        }
        _ => Finding::ok("numa", nodes),
    }
}

#[cfg(test)]
mod tests {
    use kv_api::v1;

    use super::facts::gpus::GpuFacts;
    use super::facts::{DaemonFacts, HugePages, MemoryDir, Space};
    use super::*;

    pub(super) fn healthy() -> Facts {
        Facts {
            address: "/run/kvd/kvd.sock".into(),
            socket: Socket::Open { pid: Some(7), uid: Some(0) },
            daemon: Some(Ok(DaemonFacts {
                node: "a".into(),
                version: OWN.into(),
                health: "ok".into(),
                shards: 1,
                gpus: Some(v1::ListGpusResponse::default()),
            })),
            start: "sudo systemctl start kvd",
            systemd: true,
            memlock: Memlock { bytes_max: None, of_daemon: true },
            huge: Some(HugePages { total: 512, free: 3, page_bytes: 2 << 20 }),
            io_uring: Ok(()),
            io_uring_disabled: Some(0),
            memory: MemoryDir { dir: "/dev/shm".into(), space: Ok(Space { total: 8 << 30, free: 6 << 30 }) },
            host_bytes_wanted: 4 << 30,
            data: Some(("/d".into(), DataDir::Direct { free: 1 << 40 })),
            numa_nodes: 1,
            gpu: GpuFacts::default(),
        }
    }

    #[test]
    fn a_machine_in_order_gets_no_advice() {
        let findings = judge(&healthy());
        assert!(findings.iter().all(|finding| finding.fix.is_none()), "{findings:?}");
        assert_eq!(exit(&findings, true), Exit::Ok);
        assert!(page(&findings, Paint::plain()).ends_with("0 hints, 0 missing\n"));
    }

    #[test]
    fn each_missing_thing_is_named_with_the_command_that_mends_it() {
        type Break = fn(&mut Facts);
        let cases: [(&str, Mark, &str, Break); 13] = [
            ("socket", Mark::Missing, "systemctl start kvd", |f| f.socket = Socket::Absent),
            ("socket", Mark::Missing, "systemctl start kvd", |f| f.socket = Socket::Refused),
            ("socket", Mark::Missing, "usermod -aG kvd", |f| {
                f.socket = Socket::Denied { group: "kvd".into() }
            }),
            ("daemon", Mark::Missing, "kvctl status", |f| {
                f.daemon = Some(Err(Failure::new(Exit::Unreachable, "hangs")));
            }),
            ("version", Mark::Missing, "restart kvd", |f| {
                f.daemon.as_mut().unwrap().as_mut().unwrap().version = "99.0.0".into();
            }),
            ("memlock", Mark::Hint, "LimitMEMLOCK=infinity", |f| f.memlock.bytes_max = Some(8 << 20)),
            ("huge pages", Mark::Hint, "echo 2048 | sudo tee", |f| f.huge.as_mut().unwrap().total = 0),
            ("io_uring", Mark::Hint, "kernel.io_uring_disabled=0", |f| {
                f.io_uring = Err((1, "not permitted".into()));
                f.io_uring_disabled = Some(2);
            }),
            ("io_uring", Mark::Hint, "seccomp", |f| f.io_uring = Err((1, "not permitted".into()))),
            ("memory dir", Mark::Missing, "remount,size=6g /dev/shm", |f| {
                f.daemon = None;
                f.memory.space = Ok(Space { total: 3 << 30, free: 1 << 30 });
            }),
            ("data dir", Mark::Missing, "ext4 or xfs", |f| f.data.as_mut().unwrap().1 = DataDir::Buffered),
            ("data dir", Mark::Missing, "install -d", |f| f.data.as_mut().unwrap().1 = DataDir::Absent),
            ("numa", Mark::Hint, "CPUs of all nodes", |f| f.numa_nodes = 2),
        ];
        for (check, mark, word, break_it) in cases {
            let mut facts = healthy();
            break_it(&mut facts);
            let findings = judge(&facts);
            let bad: Vec<&Finding> = findings.iter().filter(|finding| finding.mark != Mark::Ok).collect();
            let [finding] = bad[..] else { panic!("{check}: {bad:?}") };
            assert_eq!((finding.check, finding.mark), (check, mark));
            assert!(finding.fix.as_ref().unwrap().contains(word), "{finding:?}");
        }
    }

    #[test]
    fn only_what_is_required_fails_unless_strict() {
        let mut facts = healthy();
        facts.huge = None;
        assert_eq!(exit(&judge(&facts), false), Exit::Ok);
        assert_eq!(exit(&judge(&facts), true), Exit::Degraded);
        facts.socket = Socket::Absent;
        assert_eq!(exit(&judge(&facts), false), Exit::Failure);
    }
}
