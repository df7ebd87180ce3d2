//! kvd, the KV daemon: one per node.
//!
//! ```text
//!   config, topology --> plan --> compose --> shard threads (brain + memory + rings + disk)
//!                                    |------> growth: host memory gets its pages meanwhile
//!                                    |------> worker_door: shared memory for engine workers
//!                                    '------> serve: gRPC (rpc), health and metrics (http, gauges),
//!                                                     engines that speak LMCache's protocol (lmcache)
//! ```

pub mod beats;
pub mod check;
pub mod compose;
pub mod config;
pub mod connections;
pub mod disk;
pub mod drain;
pub mod gauges;
pub mod gpu;
pub mod growth;
pub mod handed;
pub mod http;
pub mod listen;
#[cfg(feature = "lmcache")]
pub mod lmcache;
pub mod logging;
pub mod metrics;
pub mod node;
pub mod object;
pub mod peercred;
pub mod peers;
pub mod plan;
pub mod private;
pub mod registry;
pub mod requests;
pub mod resources;
pub mod rpc;
pub mod serve;
pub mod sessions;
pub mod shard;
pub mod systemd;
pub mod tls;
pub mod topology;
pub mod worker_door;

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::config::cli::Flags;
use crate::config::{ConfigError, Loaded};

/// Exit status for a configuration that cannot be used (`EX_CONFIG`).
const EXIT_CONFIG: u8 = 78;

/// The daemon's main: parses, builds, runs, drains. `args` begins with the program's name.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let flags = match Flags::try_parse_from(args) {
        Ok(flags) => flags,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    match flags.load().and_then(|loaded| planned(&flags, loaded)) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some((loaded, plan, text))) => match run(&loaded, &plan, text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tracing::error!("{error:#}");
                complain(&format!("error: {error:#}"));
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            complain(&error.to_string());
            ExitCode::from(EXIT_CONFIG)
        }
    }
}

/// Writes what was asked for; a reader who has seen enough may close the pipe.
fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Writes why it ends. The exit status tells it as well, should nobody read this.
fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// What to run, its plan and the plan in words; `None` when printing was all that was asked for.
fn planned(flags: &Flags, loaded: Loaded) -> Result<Option<(Loaded, plan::Plan, String)>, ConfigError> {
    if flags.print_config {
        say(&loaded.print_effective(flags.origin));
        return Ok(None);
    }
    listen::allow_listen(&loaded.config)?;
    check::certificates(&loaded)?;
    let (topology, resources, plan) = check::plan_here(&loaded)?;
    let text = check::report(&loaded, &topology, &resources, &plan);
    if flags.check {
        say(&text);
        return Ok(None);
    }
    Ok(Some((loaded, plan, text)))
}

fn run(loaded: &Loaded, plan: &plan::Plan, text: String) -> anyhow::Result<()> {
    logging::init(&loaded.config.log).map_err(anyhow::Error::msg)?;
    loaded.remarks.iter().for_each(|remark| tracing::warn!("{remark}"));
    serve::run(loaded, plan, text)
}
