//! A daemon on embedded defaults until Ctrl-C: nothing to configure, nothing left behind.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use kvd::config::units::{Size, Text};

use crate::daemon::{Daemon, Setup, flags};
use crate::places::{Places, Wishes};
use crate::stop::Stop;

const START_LIMIT: Duration = Duration::from_secs(30);

fn size(value: &str) -> Result<Size, String> {
    Size::parse(value).ok_or_else(|| format!("expected {}", Size::expected()))
}

/// What to run.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Host tier, in shared memory [default: 512MiB, less where there is less]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub host_bytes: Option<Size>,
    /// Disk tier [default: 4GiB, less where there is less]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub disk_bytes: Option<Size>,
    /// A tmpfs for the host tier [default: /dev/shm]
    #[arg(long, value_name = "DIR")]
    pub memory_dir: Option<PathBuf>,
    /// A directory on a disk for the disk tier [default: the one for temporary files]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Address of metrics and health, or off
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub http: String,
}

/// Runs a daemon until `stop` is asked.
pub fn run(options: &Options, stop: &Stop) -> anyhow::Result<()> {
    let wishes = Wishes {
        host: options.host_bytes,
        disk: options.disk_bytes,
        memory_dir: options.memory_dir.clone(),
        data_dir: options.data_dir.clone(),
    };
    let places = Places::make(&wishes, Size::mib(512), Size::gib(4))?;
    places.notes.iter().for_each(|note| eprintln!("note: {note}"));
    let run_dir = places.run_dir();
    let mut args = flags(&run_dir, &places.memory_dir(), places.data_dir(), places.host.0, places.disk.0);
    args.extend(["--http".into(), options.http.clone().into(), "--set".into(), "node.name=kv-local".into()]);
    let mut daemon = Daemon::start(&Setup { args, run_dir: run_dir.clone(), log: None })?;
    daemon.wait_ready(START_LIMIT, || stop.is_asked())?;
    // What a shell can evaluate goes to standard output, the rest beside it.
    println!("export KVD_SOCKET={0} KVCTL_ENDPOINT={0}", run_dir.display());
    eprintln!(
        "kvd serves, process {}: host {}, disk {} in {}\nCtrl-C ends it and removes its files",
        daemon.pid(),
        places.host.about(),
        places.disk.about(),
        places.data_dir().display(),
    );
    while !stop.is_asked() {
        daemon.check()?;
        std::thread::sleep(Duration::from_millis(50));
    }
    daemon.stop()?;
    Ok(())
}
