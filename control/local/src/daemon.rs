//! The daemon as a process of its own: this program again, with `kvd` as its first argument.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kv_client::{Client, ClientOptions};
use rustix::process::{Pid, Signal, kill_process};

/// Pid of the program that started the daemon and takes it along when it dies.
const PARENT: &str = "KV_LOCAL_PARENT";
/// How long a daemon may take to end in order.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// The main function of `kv-local kvd ARGS`: the daemon's own.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    if let Some(parent) = std::env::var(PARENT).ok().and_then(|text| text.parse::<i32>().ok()) {
        // A demo that is killed must not leave a daemon behind.
        let armed = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
        let now = rustix::process::getppid().map(Pid::as_raw_nonzero);
        if armed.is_err() || now.is_none_or(|now| now.get() != parent) {
            eprintln!("the program that started this daemon is gone");
            return ExitCode::FAILURE;
        }
    }
    kvd::main(std::iter::once("kvd".into()).chain(args))
}

/// How to start the daemon, again and again.
#[derive(Clone, Debug)]
pub struct Setup {
    /// What its node is called.
    pub name: String,
    /// Its flags.
    pub args: Vec<OsString>,
    /// Its run directory.
    pub run_dir: PathBuf,
    /// File that its words are added to; none: where ours go.
    pub log: Option<PathBuf>,
}

/// A daemon that runs. It is killed on drop.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    setup: Setup,
}

impl Daemon {
    /// Starts it. Call this from a thread that lives as long as the daemon is to.
    pub fn start(setup: &Setup) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program's own file")?;
        let words = match &setup.log {
            Some(log) => {
                let file = File::options().create(true).append(true).open(log);
                Stdio::from(file.with_context(|| format!("opening {}", log.display()))?)
            }
            None => Stdio::inherit(),
        };
        let mut command = Command::new(program);
        command.arg("kvd").args(&setup.args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(words);
        // A Ctrl-C at the terminal is for us; we end the daemon in order.
        command.process_group(0);
        // Nothing but our flags decides what runs.
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_setting(name)) {
            command.env_remove(name);
        }
        command.env(PARENT, std::process::id().to_string());
        let child = command.spawn().context("starting the daemon")?;
        Ok(Self { child, setup: setup.clone() })
    }

    /// What its node is called.
    pub fn name(&self) -> &str {
        &self.setup.name
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects to it as soon as it answers, within `limit`; gives up early when it dies or `over` says so.
    pub fn wait_ready(&mut self, limit: Duration, over: impl Fn() -> bool) -> anyhow::Result<Client> {
        let until = Instant::now() + limit;
        loop {
            self.check()?;
            let options = ClientOptions {
                deadline: Duration::from_secs(2),
                ..ClientOptions::socket(&self.setup.run_dir)
            };
            match Client::connect(options).wait() {
                Ok(client) => return Ok(client),
                Err(_) if over() => bail!("stopped while the daemon started"),
                Err(error) if Instant::now() >= until => {
                    return Err(error).context(format!("the daemon does not answer{}", self.last_words()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// An error when it has ended by itself.
    pub fn check(&mut self) -> anyhow::Result<()> {
        let Some(status) = self.child.try_wait().context("asking after the daemon")? else { return Ok(()) };
        let how = match (status.code(), status.signal()) {
            (Some(code), _) => format!("with status {code}"),
            (None, Some(signal)) => format!("by signal {signal}"),
            (None, None) => "somehow".into(),
        };
        bail!("the daemon {} ended {how}{}", self.setup.name, self.last_words())
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().context("killing the daemon")?;
        self.child.wait().context("waiting for the killed daemon")?;
        Ok(())
    }

    /// Tells it to end in order; does not wait.
    pub fn end(&mut self) -> anyhow::Result<()> {
        if self.child.try_wait()?.is_none() {
            kill_process(Pid::from_child(&self.child), Signal::TERM).context("stopping the daemon")?;
        }
        Ok(())
    }

    /// Ends it in order; says whether it managed to within its time.
    pub fn stop(&mut self) -> anyhow::Result<bool> {
        self.end()?;
        let until = Instant::now() + DRAIN_LIMIT;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.success());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill()?;
        Ok(false)
    }

    fn last_words(&self) -> String {
        let log = self.setup.log.as_deref().and_then(|log| std::fs::read(log).ok()).unwrap_or_default();
        let text = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = text.lines().rev().take(8).collect();
        let lines: String = lines.into_iter().rev().map(|line| format!("\n  {line}")).collect();
        if lines.is_empty() { lines } else { format!("; its last words:{lines}") }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.kill();
        }
    }
}

/// Whether an environment variable would change the daemon's configuration.
fn is_setting(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"KVD_")
}

/// The flags of a daemon on directories of its own that reads no configuration of the machine.
pub fn flags(run: &Path, memory: &Path, data: &Path, host: u64, disk: u64) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::new();
    for (flag, dir) in [("--run-dir", run), ("--memory-dir", memory), ("--data-dir", data)] {
        args.extend([flag.into(), dir.into()]);
    }
    let host = format!("{host}B");
    let disk = format!("{disk}B");
    // An empty file in place of /etc/kvd. Huge pages would be files elsewhere.
    let words = ["--host-bytes", &host, "--disk-bytes", &disk, "--config", "/dev/null"];
    args.extend(words.into_iter().chain(["--set", "host.huge_pages=off"]).map(OsString::from));
    args
}
