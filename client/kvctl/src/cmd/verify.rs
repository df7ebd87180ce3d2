//! `kvctl verify`: reads every block of a tier and checks it.

use std::time::Instant;

use clap::Args;
use kv_api::v1;
use kv_block::Tier;

use crate::cli::{Global, Show, tier_parser};
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::out;
use crate::progress;
use crate::units::{bytes, counted, milliseconds, rate};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Only this tier
    #[arg(long, value_parser = tier_parser())]
    tier: Option<Tier>,
    #[command(flatten)]
    show: Show,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let mut daemon = connect::connect(global).await?;
    let tier = arguments.tier.map_or(v1::Tier::Unspecified, kv_api::convert::tier_message).into();
    let started = Instant::now();
    let stream = daemon.admin.verify(v1::VerifyRequest { tier }).await?.into_inner();
    let last = progress::follow("verifying", stream, global.timeout).await?;
    let time = started.elapsed();
    out::answer(arguments.show.output, &last, || {
        let (blocks, took) = (counted(last.done, "block"), milliseconds(time.as_millis() as u64));
        format!(
            "{blocks} read, {} in {took} ({}), {} wrong\n",
            bytes(last.bytes),
            rate(last.bytes, time),
            last.failed
        )
    })?;
    if last.failed > 0 {
        let message =
            format!("{} failed the checksum and went into quarantine", counted(last.failed, "block"));
        return Err(Failure::new(Exit::Failure, message)
            .help("none was served; see `kvctl explain KVD-2002` and the kernel log of the device"));
    }
    Ok(Exit::Ok)
}
