//! `kvctl purge`: removes everything of a tenant, of a tier, or all there is.

use clap::Args;
use kv_api::v1;
use kv_block::Tier;

use crate::ask;
use crate::cli::{Global, Show, tier_parser};
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::out;
use crate::progress;
use crate::units::{bytes, count, counted};

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["tenant", "tier", "all"]))]
pub(crate) struct Arguments {
    /// Everything of this tenant
    #[arg(long, conflicts_with = "all")]
    tenant: Option<String>,
    /// Everything on this tier; with --tenant: the tenant's share of it
    #[arg(long, conflicts_with = "all", value_parser = tier_parser())]
    tier: Option<Tier>,
    /// Everything
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
    if last.failed > 0 {
        return Err(Failure::new(Exit::Failure, format!("{} stay: in use", counted(last.failed, "block")))
            .help("`kvctl get leases` shows by whom; purge again when they are released"));
    }
    Ok(Exit::Ok)
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
    let gone = last.done.saturating_sub(last.failed);
    format!("{} blocks {verb}, {}\n", count(gone), bytes(last.bytes))
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
    fn a_dry_run_says_would() {
        let last = v1::Progress { done: 1_000, total: 1_000, failed: 1, bytes: 64 << 20, finished: true };
        assert_eq!(text(&last, false), "999 blocks purged, 64.0MiB\n");
        assert_eq!(text(&last, true), "999 blocks would be purged, 64.0MiB\n");
    }
}
