//! `kvctl verify`: reads every block of a tier, or of those of this node, and checks it.

use std::time::{Duration, Instant};

use clap::Args;
use kv_api::v1;
use kv_block::Tier;

use crate::cli::{Global, Show, tier_parser};
use crate::cmd::object;
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::out;
use crate::progress;
use crate::units::{bytes, counted, milliseconds, rate};

const MORE: &str = "\
Of the object tier every pack is read, whoever wrote it: that takes long, costs
requests, and is done only when the tier is named.";

#[derive(Debug, Args)]
#[command(after_help = MORE)]
pub(crate) struct Arguments {
    /// Only this tier [host and disk]
    #[arg(long, value_parser = tier_parser())]
    tier: Option<Tier>,
    #[command(flatten)]
    show: Show,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let daemon = connect::connect(global).await?;
    let tiers = match arguments.tier {
        Some(Tier::Object) => {
            object::tiers(&daemon).await?;
            vec![Tier::Object]
        }
        Some(tier) => vec![tier],
        None => {
            let listed =
                daemon.within(daemon.admin().list_tiers(daemon.request(v1::ListTiersRequest {}))).await?;
            there(&listed.tiers)
        }
    };
    let started = Instant::now();
    let mut total = v1::Progress { finished: true, ..Default::default() };
    let mut damaged = Vec::new();
    for tier in tiers {
        let request = v1::VerifyRequest { tier: kv_api::convert::tier_message(tier).into() };
        let stream = daemon.within(daemon.admin().verify(request)).await?;
        let last = progress::follow("verifying", stream, global.timeout).await?;
        total.done += last.done;
        total.total += last.total;
        total.failed += last.failed;
        total.bytes += last.bytes;
        damaged.extend(Some(tier).filter(|_| last.failed > 0));
    }
    out::answer(arguments.show.output, &total, || text(&total, started.elapsed()))?;
    if total.failed > 0 {
        let message =
            format!("{} failed the checksum and went out of service", counted(total.failed, "block"));
        return Err(Failure::new(Exit::Failure, message).help(help(&damaged)));
    }
    Ok(Exit::Ok)
}

/// Where to look: memory that lies is another matter than a disk that does.
fn help(damaged: &[Tier]) -> String {
    let look = damaged.iter().map(|tier| match tier {
        Tier::Host => "`kvctl explain KVD-2001` and the machine's memory errors",
        Tier::Object => "`kvctl get packs` for the packs, and the daemon's log",
        _ => "`kvctl explain KVD-2002` and the kernel log of the device",
    });
    format!("none was served; see {}", look.collect::<Vec<_>>().join("; "))
}

/// The tiers of this node that there is something to read on.
fn there(infos: &[v1::TierInfo]) -> Vec<Tier> {
    let has = |tier: &Tier| {
        let number = i32::from(kv_api::convert::tier_message(*tier));
        matches!(tier, Tier::Host | Tier::Disk)
            && infos.iter().any(|info| info.tier == number && info.state != "off")
    };
    Tier::ALL.into_iter().filter(has).collect()
}

fn text(total: &v1::Progress, time: Duration) -> String {
    format!(
        "{} read, {} in {} ({}), {} wrong\n",
        counted(total.done, "block"),
        bytes(total.bytes),
        milliseconds(time.as_millis() as u64),
        rate(total.bytes, time),
        total.failed
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_that_are_off_are_not_read() {
        let info = |tier: v1::Tier, state: &str| v1::TierInfo {
            tier: tier.into(),
            state: state.into(),
            ..Default::default()
        };
        let infos = [
            info(v1::Tier::Disk, "off"),
            info(v1::Tier::Host, "ok"),
            info(v1::Tier::Host, "ok"),
            info(v1::Tier::Object, "ok"),
            info(v1::Tier::Device, "ok"),
        ];
        assert_eq!(there(&infos), [Tier::Host], "nor is what others share unasked");
    }

    #[test]
    fn damage_in_memory_is_told_from_damage_on_disk() {
        assert!(help(&[Tier::Host]).contains("KVD-2001") && !help(&[Tier::Host]).contains("KVD-2002"));
        assert!(help(&[Tier::Disk]).contains("KVD-2002") && !help(&[Tier::Disk]).contains("KVD-2001"));
        let both = help(&[Tier::Host, Tier::Disk]);
        assert!(both.contains("KVD-2001") && both.contains("KVD-2002"), "{both}");
    }

    #[test]
    fn the_answer_has_time_and_rate() {
        let total = v1::Progress { done: 2, total: 2, failed: 0, bytes: 3 << 20, finished: true };
        assert_eq!(
            text(&total, Duration::from_secs(2)),
            "2 blocks read, 3.0MiB in 2.0s (1.5MiB/s), 0 wrong\n"
        );
    }
}
