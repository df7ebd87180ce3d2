//! `kvctl evict`: removes blocks from host memory, from disk or from both. What is pinned or in use stays.

use clap::Args;
use kv_api::v1;
use kv_block::Tier;

use crate::ask;
use crate::cli::{Global, Show, tier_parser};
use crate::cmd::object;
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::names::{self, Blocks};
use crate::out;
use crate::units::{count, counted};

/// What the object store has to do with it.
pub(crate) const STAYS: &str = "\
Without --tier they go from host memory and disk of this node. What lies in the
object store goes in whole packs: when they expire, or with `kvctl object gc`.";

#[derive(Debug, Args)]
#[command(after_help = STAYS)]
pub(crate) struct Arguments {
    #[command(flatten)]
    blocks: Blocks,
    /// From this tier only: host or disk
    #[arg(long, value_parser = tier_parser())]
    tier: Option<Tier>,
    /// Say what would go, remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    #[command(flatten)]
    show: Show,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let daemon = connect::connect(global).await?;
    let keys = arguments.blocks.keys(&daemon).await?;
    if !arguments.dry_run {
        let from = arguments.tier.map_or("host memory and disk", Tier::name);
        ask::confirm(&format!("evict {} from {from}", counted(keys.len() as u64, "block")), arguments.yes)?;
    }
    let tier = arguments.tier.map_or(v1::Tier::Unspecified, kv_api::convert::tier_message).into();
    let mut total = v1::EvictResponse::default();
    for names in names::requests(&keys, daemon.client.keys_per_request_max()) {
        let request = v1::EvictRequest { names: Some(names), tier, dry_run: arguments.dry_run, session: 0 };
        let answer = daemon.within(daemon.blocks().evict(daemon.request(request))).await?;
        total.evicted += answer.evicted;
        total.in_use += answer.in_use;
        total.absent += answer.absent;
    }
    out::answer(arguments.show.output, &total, || text(&total, arguments.dry_run))?;
    if arguments.tier.is_none() {
        object::say_what_stays(&daemon).await;
    }
    Ok(exit(&total, arguments.dry_run))
}

fn text(total: &v1::EvictResponse, dry_run: bool) -> String {
    let verb = if dry_run { "would be evicted" } else { "evicted" };
    let mut text = format!("{} {verb}", counted(total.evicted.into(), "block"));
    if total.in_use > 0 {
        text += &format!("; {} stay: pinned or in use", count(total.in_use.into()));
    }
    if total.absent > 0 {
        text += &format!("; {} not here", count(total.absent.into()));
    }
    text + "\n"
}

fn exit(total: &v1::EvictResponse, dry_run: bool) -> Exit {
    match total {
        v1::EvictResponse { in_use: 1.., .. } if !dry_run => Exit::Failure,
        v1::EvictResponse { evicted: 0, absent: 1.., .. } => Exit::NotFound,
        _ => Exit::Ok,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stayed_and_what_was_not_there_is_told_apart() {
        let total = |evicted, in_use, absent| v1::EvictResponse { evicted, in_use, absent };
        assert_eq!(text(&total(2, 0, 0), false), "2 blocks evicted\n");
        assert_eq!(text(&total(1, 0, 0), true), "1 block would be evicted\n");
        assert_eq!(text(&total(0, 1, 2), false), "0 blocks evicted; 1 stay: pinned or in use; 2 not here\n");
        assert_eq!(exit(&total(1, 0, 1), false), Exit::Ok);
        assert_eq!(exit(&total(0, 0, 1), true), Exit::NotFound);
        assert_eq!(exit(&total(5, 1, 0), false), Exit::Failure);
        assert_eq!(exit(&total(5, 1, 0), true), Exit::Ok);
    }
}
