//! Daemons on embedded defaults until Ctrl-C: nothing to configure, nothing left behind.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use kvd::config::units::{Size, Text};

use crate::daemon::{Daemon, Setup};
use crate::nodes::{self, NODES_MAX};
use crate::places::{Places, Wishes};
use crate::stop::Stop;

const START_LIMIT: Duration = Duration::from_secs(30);

fn size(value: &str) -> Result<Size, String> {
    Size::parse(value).ok_or_else(|| format!("expected {}", Size::expected()))
}

/// What to run.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// So many nodes, each a daemon of its own, that serve each other's blocks; sizes are of each
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=NODES_MAX))]
    pub nodes: u16,
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

/// Runs daemons until `stop` is asked.
pub fn run(options: &Options, stop: &Stop) -> anyhow::Result<()> {
    let wishes = Wishes {
        host: options.host_bytes,
        disk: options.disk_bytes,
        memory_dir: options.memory_dir.clone(),
        data_dir: options.data_dir.clone(),
    };
    let places = Places::make(&wishes, Size::mib(512), Size::gib(4), options.nodes.into())?;
    places.notes.iter().for_each(|note| eprintln!("note: {note}"));
    let more = [format!("listen.http={}", options.http)];
    let setups = nodes::setups(&places, &more)?;
    let start = |setup: &Setup| Daemon::start(&Setup { log: None, ..setup.clone() });
    let mut daemons: Vec<Daemon> = setups.iter().map(start).collect::<Result<_, _>>()?;
    for daemon in &mut daemons {
        daemon.wait_ready(START_LIMIT, || stop.is_asked())?;
    }
    // What a shell can evaluate goes to standard output, the rest beside it.
    println!("export KVD_SOCKET={0} KVCTL_ENDPOINT={0}", places.of(0).run_dir.display());
    for (at, daemon) in daemons.iter().enumerate() {
        let place = places.of(at);
        let (host, disk) = (places.host.about(), places.disk.about());
        let (pid, data) = (daemon.pid(), place.data_dir.display());
        say(&format!("kvd serves, process {pid}: host {host}, disk {disk} in {data}\n"))?;
        if daemons.len() > 1 {
            eprintln!("  as {}: export KVCTL_ENDPOINT={}", daemon.name(), place.run_dir.display());
        }
    }
    eprintln!("Ctrl-C ends it and removes its files");
    while !stop.is_asked() {
        daemons.iter_mut().try_for_each(Daemon::check)?;
        std::thread::sleep(Duration::from_millis(50));
    }
    daemons.iter_mut().try_for_each(Daemon::end)?;
    for daemon in &mut daemons {
        daemon.stop()?;
    }
    Ok(())
}

/// One write for the whole line: the daemons' logs go to the same standard error, and a line written
/// in pieces can have one of theirs in the middle.
fn say(line: &str) -> std::io::Result<()> {
    std::io::stderr().write_all(line.as_bytes())
}
