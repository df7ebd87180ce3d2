//! `kvctl drain`: the daemon stops taking new work; with `--wait` until its workers are gone.

use std::time::{Duration, Instant};

use clap::Args;
use kv_api::v1;

use crate::cli::Global;
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::out;
use crate::units::{counted, parse_duration};

const POLL: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Take new work again
    #[arg(long, conflicts_with = "wait")]
    undo: bool,
    /// Wait so long for workers to leave and I/O to end; exits with 4 if they do not
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    wait: Option<Duration>,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let daemon = connect::connect(global).await?;
    let answer = daemon
        .within(daemon.admin().drain(daemon.request(v1::DrainRequest { stop: arguments.undo })))
        .await?;
    if !answer.draining {
        out::print("taking new work\n")?;
        return Ok(if arguments.undo { Exit::Ok } else { Exit::Failure });
    }
    out::print("draining: no new work is taken\n")?;
    let Some(wait) = arguments.wait else { return Ok(Exit::Ok) };
    let end = Instant::now() + wait;
    loop {
        let status = daemon.within(daemon.admin().status(daemon.request(v1::StatusRequest {}))).await?;
        if status.clients == 0 && status.operations_in_flight == 0 {
            out::print("drained\n")?;
            return Ok(Exit::Ok);
        }
        if Instant::now() >= end {
            return Err(
                Failure::new(Exit::Degraded, left(&status)).help("`kvctl get clients` shows who stays")
            );
        }
        tokio::time::sleep(POLL).await;
    }
}

fn left(status: &v1::StatusResponse) -> String {
    let clients = counted(status.clients.into(), "client");
    format!("{clients} and {} in flight are left", counted(status.operations_in_flight, "operation"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_counted_as_what_it_is() {
        let status = v1::StatusResponse { clients: 1, operations_in_flight: 3, ..Default::default() };
        assert_eq!(left(&status), "1 client and 3 operations in flight are left");
    }
}
