//! `kvctl pin`: keeps blocks from being evicted. Every pin has an end.

use std::time::Duration;

use clap::Args;
use kv_api::v1;

use crate::cli::{Global, Show};
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::names::{self, Blocks};
use crate::out;
use crate::units::{counted, parse_duration, seconds};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    blocks: Blocks,
    /// Time after which the pin ends by itself
    #[arg(long, default_value = "1h", value_parser = parse_duration)]
    ttl: Duration,
    #[command(flatten)]
    show: Show,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let ttl_s = u32::try_from(arguments.ttl.as_secs())
        .ok()
        .filter(|ttl| *ttl > 0)
        .ok_or_else(|| Failure::usage("a pin lasts from one second to 136 years").help("write --ttl 30m"))?;
    let daemon = connect::connect(global).await?;
    let keys = arguments.blocks.keys(&daemon).await?;
    let mut total = v1::PinResponse::default();
    for names in names::requests(&keys, daemon.client.keys_per_request_max()) {
        let request = v1::PinRequest { names: Some(names), ttl_s, session: 0 };
        let answer = daemon.within(daemon.blocks().pin(daemon.request(request))).await?;
        total.pinned += answer.pinned;
        total.absent += answer.absent;
    }
    out::answer(arguments.show.output, &total, || text(&total, ttl_s))?;
    Ok(if total.absent > 0 { Exit::NotFound } else { Exit::Ok })
}

fn text(total: &v1::PinResponse, ttl_s: u32) -> String {
    let absent = if total.absent > 0 { format!("; {} not here", total.absent) } else { String::new() };
    format!("{} pinned for {}{absent}\n", counted(total.pinned.into(), "block"), seconds(ttl_s.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_blocks_are_counted() {
        assert_eq!(text(&v1::PinResponse { pinned: 1, absent: 0 }, 3_600), "1 block pinned for 1h\n");
        assert_eq!(
            text(&v1::PinResponse { pinned: 2, absent: 1 }, 90),
            "2 blocks pinned for 1m30s; 1 not here\n"
        );
    }
}
