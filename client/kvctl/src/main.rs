//! kvctl, the admin command line of kvd.
//!
//! ```text
//! arguments (cli) -> one file in cmd/ -> a call to the daemon (connect) -> a pure function to text
//!                                                                          (table, structured, cmd/*)
//! ```
//! Data goes to stdout; progress and errors go to stderr. Exit codes are in [`exit`] and stable.

mod ask;
mod cli;
mod cmd;
mod connect;
mod exit;
mod names;
mod out;
mod paint;
mod progress;
mod structured;
mod table;
mod units;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::cli::{Cli, Command};
use crate::exit::{Exit, Failure};
use crate::paint::Paint;

fn main() -> ExitCode {
    let cli = Cli::parse_from(cli::spread(std::env::args_os().collect()));
    let exit = run(cli).unwrap_or_else(|failure| {
        // Nobody is left to tell when stderr is gone; the exit status still does.
        let _ = write!(std::io::stderr(), "{}", failure.render(Paint::stderr()));
        failure.exit
    });
    ExitCode::from(exit as u8)
}

fn run(cli: Cli) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failure, format!("cannot start: {error}")))?;
    runtime.block_on(dispatch(cli))
}

async fn dispatch(Cli { global, command }: Cli) -> Result<Exit, Failure> {
    match command {
        Command::Status(arguments) => cmd::status::run(&global, arguments).await,
        Command::Get(arguments) => cmd::get::run(&global, arguments).await,
        Command::Describe(arguments) => cmd::describe::run(&global, arguments).await,
        Command::Why(arguments) => cmd::why::run(&global, arguments).await,
        Command::Explain(arguments) => cmd::explain::run(&arguments),
        Command::Pin(arguments) => cmd::pin::run(&global, arguments).await,
        Command::Unpin(arguments) => cmd::unpin::run(&global, arguments).await,
        Command::Evict(arguments) => cmd::evict::run(&global, arguments).await,
        Command::Purge(arguments) => cmd::purge::run(&global, arguments).await,
        Command::Verify(arguments) => cmd::verify::run(&global, arguments).await,
        Command::Quota(arguments) => cmd::quota::run(&global, arguments).await,
        Command::Object(arguments) => cmd::object::run(&global, arguments).await,
        Command::Drain(arguments) => cmd::drain::run(&global, arguments).await,
        Command::Undrain => cmd::drain::undo(&global).await,
        Command::Bench(arguments) => cmd::bench::run(&global, arguments).await,
        Command::Doctor(arguments) => cmd::doctor::run(&global, arguments).await,
        Command::Config(arguments) => cmd::config::run(&global, arguments).await,
        Command::Version(arguments) => cmd::version::run(&global, arguments).await,
        Command::Completion(arguments) => cmd::completion::run(&arguments),
        Command::Options => cmd::options::run(),
    }
}
