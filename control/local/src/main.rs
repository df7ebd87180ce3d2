//! The command line of kv-local.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kv_local::stop::{EXIT_STOPPED, Stop};
use kv_local::{daemon, demo, up};

/// Everything of kvd on one machine.
#[derive(Parser)]
#[command(name = "kv-local", version, max_term_width = 100, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Replay real traffic against a real daemon, kill it on the way, and check every byte
    ///
    /// Starts kvd as a process of its own and replays a trace of conversations through worker sessions: each
    /// request looks its prefix up, reads what is there without a copy and stores what is not. Host memory is
    /// too small on purpose, so blocks go to disk and come back. On the way the daemon is killed with SIGKILL
    /// and started again. The exit status is 1 when a single byte was wrong or a durable block was lost.
    ///
    /// With --nodes, requests are spread over several daemons by their number, as a router would that knows
    /// nothing of KV cache. A prefix that another node has is fetched from there; while a node is away its
    /// requests go to the next one. The exit status is also 1 when no block came from another node.
    Demo(Box<demo::Options>),
    /// Run a daemon, or several, on embedded defaults until Ctrl-C, and print where the sockets are
    Up(up::Options),
    /// Run the daemon itself: kv-local kvd ARGS is kvd ARGS
    #[command(disable_help_flag = true)]
    Kvd {
        /// Flags of kvd; see kv-local kvd --help
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let ended = match Cli::parse().command {
        Command::Kvd { args } => return daemon::main(args.into_iter()),
        Command::Demo(options) => Stop::on_signals().and_then(|stop| demonstrate(&options, &stop)),
        Command::Up(options) => {
            Stop::on_signals().and_then(|stop| up::run(&options, &stop)).map(|()| ExitCode::SUCCESS)
        }
    };
    ended.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn demonstrate(options: &demo::Options, stop: &Stop) -> anyhow::Result<ExitCode> {
    let report = match demo::run(options, stop) {
        Err(_) if stop.is_asked() => return Ok(ExitCode::from(EXIT_STOPPED)),
        report => report?,
    };
    if options.json {
        println!("{}", report.json());
    } else {
        print!("{report}");
    }
    Ok(match report.is_right() {
        false => ExitCode::FAILURE,
        true if stop.is_asked() => ExitCode::from(EXIT_STOPPED),
        true => ExitCode::SUCCESS,
    })
}
