//! What the benches share: a daemon of their own, a worker connected to it, medians and CPU time.
//!
//! Each bench starts `kvd` from beside its own binary (or the one that `KVD` names) on fresh directories, and
//! removes everything it made. Ratios are taken within one run, alternating between what is compared, because
//! a machine that others use too is only comparable with itself.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kv_client::{Binding, Client, ClientOptions, Scope, SequenceHash, Slice, Worker, WorkerOptions};

/// Directories of one daemon over its lives.
pub struct Home {
    root: PathBuf,
    memory: PathBuf,
    data: PathBuf,
    args: Vec<String>,
}

impl Home {
    /// A home with these arguments for every life of its daemon; no disk tier.
    pub fn new(name: &str, args: &[&str]) -> Result<Self> {
        let name = format!("kvd-bench-{name}-{}", std::process::id());
        let root = std::env::temp_dir().join(&name);
        fs::create_dir_all(&root)?;
        let memory = Path::new("/dev/shm").join(name);
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        Ok(Self { data: root.join("data"), root, memory, args })
    }

    /// Adds a disk tier of this size.
    pub fn with_disk(mut self, bytes: &str) -> Self {
        let dir = self.data.display().to_string();
        self.args.extend(["--data-dir".into(), dir, "--disk-bytes".into(), bytes.into()]);
        self
    }

    /// Directory of the disk tier.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The socket of its daemon.
    pub fn socket(&self) -> PathBuf {
        self.root.join("run/kvd.sock")
    }

    /// Starts a life and waits until it is ready to serve. Gives the time that took.
    pub fn start(&self) -> Result<(Daemon, Duration)> {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.root.join("log"))?;
        let run_dir = self.root.join("run");
        let began = Instant::now();
        let child = Command::new(binary()?)
            .arg("--run-dir")
            .arg(&run_dir)
            .arg("--memory-dir")
            .arg(&self.memory)
            .args(["--http", "127.0.0.1:0", "--set", "log.format=text", "--set", "host.huge_pages=off"])
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("starting kvd")?;
        let mut daemon = Daemon(child);
        let limit = began + Duration::from_secs(600);
        // Ready is when `/readyz` answers yes; the listener opens last.
        while !self.is_ready() {
            if let Some(status) = daemon.0.try_wait()? {
                bail!("kvd ended ({status}): {}", fs::read_to_string(self.root.join("log"))?);
            }
            if Instant::now() > limit {
                bail!("kvd is not ready after 10 minutes");
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok((daemon, began.elapsed()))
    }

    /// Starts from the last line in the log that names the HTTP address, which is of this life.
    fn is_ready(&self) -> bool {
        let log = fs::read_to_string(self.root.join("log")).unwrap_or_default();
        let line = log.lines().rev().find(|line| line.contains("over HTTP"));
        let address = line.and_then(|line| line.split("address=").nth(1)?.split_whitespace().next());
        let Some(address) = address else { return false };
        let Ok(mut stream) = std::net::TcpStream::connect(address) else { return false };
        let mut answer = String::new();
        let asked = stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: k\r\nconnection: close\r\n\r\n");
        asked.is_ok() && stream.read_to_string(&mut answer).is_ok() && answer.starts_with("HTTP/1.1 200")
    }

    /// Waits until host memory has got all of its pages.
    pub fn wait_until_whole(&self) -> Result<()> {
        let limit = Instant::now() + Duration::from_secs(600);
        let is_whole = || -> Result<bool> {
            for entry in fs::read_dir(&self.memory)? {
                let entry = entry?;
                if entry.path().extension().is_some_and(|extension| extension == "data") {
                    let facts = entry.metadata()?;
                    if facts.blocks() * 512 < facts.len() {
                        return Ok(false);
                    }
                }
            }
            Ok(true)
        };
        while !is_whole()? {
            if Instant::now() > limit {
                bail!("host memory is not whole after 10 minutes");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// A worker session with the daemon.
    pub fn worker(&self, options: WorkerOptions) -> Result<Worker> {
        let client = Client::connect(ClientOptions::socket(self.socket())).wait()?;
        Ok(client.with_deadline(Duration::from_secs(30)).worker(options).wait()?)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.memory);
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// A running daemon; killed when dropped.
pub struct Daemon(Child);

impl Daemon {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Kills it with SIGKILL and waits for its end.
    pub fn kill(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }

    /// Resident bytes that are its own: without shared memory, which is pools and rings.
    pub fn own_bytes(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let kib = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0)
        };
        Ok((kib("RssAnon:") + kib("RssFile:")) << 10)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn binary() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("KVD") {
        return Ok(named.into());
    }
    let beside = std::env::current_exe()?.with_file_name("kvd");
    if !beside.exists() {
        bail!(
            "{} is not there: build it with `cargo build --release -p kvd`, or name it in KVD",
            beside.display()
        );
    }
    Ok(beside)
}

/// User and system time that a process has used so far, all its threads; to a hundredth of a second.
pub fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}

/// What blocks of a bench mean; each bench and length has its own, or a block of one length would be found
/// under the names of another.
pub fn binding(worker: &Worker, what: &str, block_bytes: u32) -> Result<Binding> {
    let scope =
        Scope { model: format!("bench {what} {block_bytes}"), tenant: "bench".into(), ..Scope::default() };
    Ok(worker.register(scope, Slice::whole(1, 1), block_bytes).wait()?)
}

/// The names `from..to`.
pub fn hashes(range: std::ops::Range<u64>) -> Vec<SequenceHash> {
    range.map(SequenceHash::from).collect()
}

/// The value below which this share of `values` lies.
pub fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((values.len() as f64 * share) as usize).min(values.len() - 1)]
}

/// The value in the middle.
pub fn median(values: &mut [f64]) -> f64 {
    quantile(values, 0.5)
}

/// Microseconds of one call.
pub fn micros<T>(call: impl FnOnce() -> T) -> (f64, T) {
    let began = Instant::now();
    let value = call();
    (began.elapsed().as_nanos() as f64 / 1e3, value)
}

/// The number after the program's name, or `default`.
pub fn argument(default: u64) -> Result<u64> {
    std::env::args().nth(1).map_or(Ok(default), |text| text.parse().with_context(|| format!("`{text}`")))
}
