//! `kvctl purge`: removes everything of a tenant, of a tier, or all that this node has.

use clap::Args;
use kv_api::v1;
use kv_block::Tier;

use crate::ask;
use crate::cli::{Global, Show, parse_tenant, tier_parser};
use crate::cmd::evict::STAYS;
use crate::cmd::object;
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::out;
use crate::progress;
use crate::units::{bytes, count, counted};

#[derive(Debug, Args)]
#[command(after_help = STAYS)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["tenant", "tier", "all"]))]
pub(crate) struct Arguments {
    /// Everything of this tenant
    #[arg(long, conflicts_with = "all", value_parser = parse_tenant)]
    tenant: Option<String>,
    /// Everything on this tier, host or disk; with --tenant: its share of it
    #[arg(long, conflicts_with = "all", value_parser = tier_parser())]
    tier: Option<Tier>,
    /// Everything on this node
    #[arg(long)]
    all: bool,
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
    if !arguments.dry_run {
        let what = what(arguments.tenant.as_deref(), arguments.tier);
        ask::confirm(&format!("purge {what}"), arguments.yes)?;
    }
    let daemon = connect::connect(global).await?;
    let request = v1::PurgeRequest {
        // A tier's purge is one of all tenants.
        all: arguments.all || arguments.tenant.is_none(),
        tenant: arguments.tenant.unwrap_or_default(),
        tier: arguments.tier.map_or(v1::Tier::Unspecified, kv_api::convert::tier_message).into(),
        dry_run: arguments.dry_run,
    };
    let stream = daemon.within(daemon.admin().purge(request)).await?;
    let last = progress::follow("purging", stream, global.timeout).await?;
    out::answer(arguments.show.output, &last, || text(&last, arguments.dry_run))?;
    if arguments.tier.is_none() {
        object::say_what_stays(&daemon).await;
    }
    stayed(&last, arguments.dry_run)
}

/// What was to go and did not is a failure; what would not go is an answer.
fn stayed(last: &v1::Progress, dry_run: bool) -> Result<Exit, Failure> {
    if last.failed == 0 || dry_run {
        return Ok(Exit::Ok);
    }
    let message = format!("{} stayed: pinned or in use", counted(last.failed, "block"));
    Err(Failure::new(Exit::Failure, message).help(
        "`kvctl get blocks -o wide` shows pins and their end, `kvctl get leases` who reads; purge again when they are \
         over",
    ))
}

fn what(tenant: Option<&str>, tier: Option<Tier>) -> String {
    match (tenant, tier) {
        (Some(tenant), Some(tier)) => format!("everything of tenant {tenant} from {}", tier.name()),
        (Some(tenant), None) => format!("everything of tenant {tenant}"),
        (None, Some(tier)) => format!("everything on {}", tier.name()),
        (None, None) => "everything".into(),
    }
}

fn text(last: &v1::Progress, dry_run: bool) -> String {
    let verb = if dry_run { "would be purged" } else { "purged" };
    let mut text = format!("{} {verb}, {}", counted(last.done, "block"), bytes(last.bytes));
    if last.failed > 0 {
        text += &format!("; {} stay: pinned or in use", count(last.failed));
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_names_what_goes() {
        assert_eq!(what(Some("a"), Some(Tier::Disk)), "everything of tenant a from disk");
        assert_eq!(what(None, Some(Tier::Host)), "everything on host");
        assert_eq!(what(None, None), "everything");
    }

    #[test]
    fn what_went_and_what_stayed_are_counted_apart() {
        let all = v1::Progress { done: 1_000, total: 1_000, failed: 0, bytes: 64 << 20, finished: true };
        assert_eq!(text(&all, false), "1,000 blocks purged, 64.0MiB\n");
        assert_eq!(stayed(&all, false), Ok(Exit::Ok));
        let some = v1::Progress { done: 2_900, total: 3_000, failed: 100, ..all };
        assert_eq!(text(&some, false), "2,900 blocks purged, 64.0MiB; 100 stay: pinned or in use\n");
        assert_eq!(text(&some, true), "2,900 blocks would be purged, 64.0MiB; 100 stay: pinned or in use\n");
        let failure = stayed(&some, false).unwrap_err();
        assert_eq!(
            (failure.exit, &failure.message[..]),
            (Exit::Failure, "100 blocks stayed: pinned or in use")
        );
        assert_eq!(stayed(&some, true), Ok(Exit::Ok), "nothing failed that was not tried");
    }
}
