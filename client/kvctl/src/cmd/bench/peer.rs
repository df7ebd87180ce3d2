//! `kvctl bench peer`: how fast blocks go to a peer and come back, measured with what every block goes by.
//!
//! ```text
//!   put here -> offer (the peer fetches: out) -> evict here -> acquire (this node fetches: in) -> check every byte
//! ```
//! The blocks are of a tenant and a scope of their own that no other run shares. Here they are evicted at the end;
//! what the peer took expires there by itself.

mod ways;

use std::time::Duration;

use clap::Args;
use serde_json::json;

use self::ways::{Measured, Plan};
use super::{quantile, time};
use crate::cli::{Format, Global, Show, parse_block_bytes};
use crate::cmd::peers::{in_words, may_answer, named};
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::out;
use crate::paint::Paint;
use crate::structured;
use crate::table::{Cell, Kind, Look, column, wide};
use crate::units::{bytes, counted, parse_bytes, parse_duration};

/// Blocks when nobody says how many: more of the small ones tell nothing new.
const COUNT_MAX: u64 = 4_096;
const MORE: &str = "\
Puts blocks here, has the peer fetch them (out), evicts them here, fetches them
back (in), then one at a time (single), and checks every byte. What the peer
took expires there within two minutes. Exits with 4 when blocks were missed.";

#[derive(Debug, Args)]
#[command(after_help = MORE)]
pub(crate) struct Arguments {
    /// Name as in `kvctl get peers`
    name: String,
    /// Length of a block
    #[arg(long, value_name = "SIZE", default_value = "2MiB", value_parser = parse_block_bytes)]
    block_bytes: u32,
    /// Blocks sent [as many as --bytes-max holds, 4096 at most]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: Option<u32>,
    /// Each way ends after this long
    #[arg(long, default_value = "30s", value_name = "TIME", value_parser = parse_duration)]
    seconds: Duration,
    /// Most bytes it may fill, here and there
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = parse_bytes)]
    bytes_max: u64,
    #[command(flatten)]
    show: Show,
}

impl Arguments {
    fn plan(&self, node: String) -> Result<Plan, Failure> {
        let fit = self.bytes_max / u64::from(self.block_bytes);
        let count = self.count.map_or(fit.min(COUNT_MAX), u64::from);
        if count == 0 || count > fit {
            let all = count.max(1) * u64::from(self.block_bytes);
            return Err(Failure::usage(format!(
                "{} of blocks are more than {}",
                bytes(all),
                bytes(self.bytes_max)
            ))
            .help(format!("they may push others out; if that is meant: --bytes-max {}", bytes(all))));
        }
        Ok(Plan { node, block_bytes: self.block_bytes, count: count as u32, time: self.seconds })
    }
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    // What makes no sense is said before anybody is asked.
    arguments.plan(String::new())?;
    let daemon = connect::connect(global).await?;
    let peer = named(&daemon, &arguments.name).await?;
    if !may_answer(&peer) {
        return Err(Failure::new(Exit::Degraded, in_words(&peer))
            .help(format!("`kvctl describe peer {}` says more", peer.node)));
    }
    let plan = arguments.plan(peer.node)?;
    let ways = ways::run(&daemon, &plan).await?;
    let format = arguments.show.output;
    let text = structured::text(format, false, || {
        let ways: Vec<_> = ways.iter().map(json).collect();
        json!({ "node": plan.node, "block_bytes": plan.block_bytes, "blocks": plan.count, "ways": ways })
    });
    if text.is_none() {
        let (blocks, length) = (counted(plan.count.into(), "block"), bytes(plan.block_bytes.into()));
        out::note(&format!("{blocks} of {length}, to {} and back", plan.node));
    }
    let look = Look { wide: format == Format::Wide, headers: true, paint: Paint::stdout(), now: 0 };
    out::print(&text.unwrap_or_else(|| match format {
        Format::Name => WAYS.names(&ways),
        _ => WAYS.table(&ways, &look, &mut Vec::new()),
    }))?;
    verdict(&ways, &plan.node)
}

/// Wrong bytes fail the bench, and blocks that did not come leave it short of what was to be measured.
fn verdict(ways: &[Measured], node: &str) -> Result<Exit, Failure> {
    let wrong: u64 = ways.iter().map(|way| way.wrong).sum();
    if wrong > 0 {
        return Err(super::wrong_bytes(wrong));
    }
    let Some(short) = ways.iter().find(|way| way.blocks == 0 || way.misses > 0) else { return Ok(Exit::Ok) };
    let why = short.why.map_or(String::new(), |reason| format!(": {reason}"));
    let (missed, all) = (short.misses, counted(short.blocks + short.misses, "block"));
    let text = match (short.name, short.blocks) {
        ("out", _) => format!("{node} did not take {missed} of {all}"),
        (_, 0) => format!("{node} took the blocks, and none came back{why}"),
        _ => format!("{missed} of {all} did not come back from {node}{why}"),
    };
    let help = match short.why {
        Some(reason) => {
            format!("`kvctl explain {reason}` says more; with fewer blocks: --bytes-max, --count")
        }
        None => {
            "is there room for them? `kvctl get tiers` on that node; with fewer blocks: --bytes-max, --count"
                .into()
        }
    };
    Err(Failure::new(Exit::Degraded, text).help(help))
}

const WAYS: Kind<Measured> = Kind {
    noun: "way",
    name: |way| way.name.to_owned(),
    columns: &[
        column("WAY", |way, _| Cell::text(way.name)),
        column("BLOCKS", |way, _| Cell::count(way.blocks)),
        column("BYTES", |way, _| Cell::bytes(way.bytes)),
        column("BLOCKS/S", |way, _| Cell::count(way.per_second(way.blocks))),
        column("BYTES/S", |way, _| Cell::bytes(way.per_second(way.bytes))),
        column("P50", |way, _| latency(way, 0.5)),
        column("P99", |way, _| latency(way, 0.99)),
        column("MISSES", |way, _| Cell::count(way.misses)),
        column("WRONG", |way, _| Cell::count(way.wrong)),
        wide("SPENT", |way, _| time(way.spent.as_nanos() as u64)),
    ],
};

/// Of a way that went in batches there is none.
fn latency(way: &Measured, share: f64) -> Cell {
    match quantile(&way.latencies_ns, share) {
        0 => Cell::number(0, "-".into()),
        ns => time(ns),
    }
}

fn json(way: &Measured) -> serde_json::Value {
    let latency = |share| Some(quantile(&way.latencies_ns, share)).filter(|ns| *ns > 0);
    json!({
        "way": way.name,
        "blocks": way.blocks,
        "bytes": way.bytes,
        "blocks_per_s": way.per_second(way.blocks),
        "bytes_per_s": way.per_second(way.bytes),
        "p50_ns": latency(0.5),
        "p99_ns": latency(0.99),
        "misses": way.misses,
        "wrong": way.wrong,
        "spent_ns": way.spent.as_nanos() as u64,
    })
}

#[cfg(test)]
mod tests {
    use kv_block::MissReason;

    use super::*;

    fn way(name: &'static str, blocks: u64) -> Measured {
        Measured { name, blocks, bytes: blocks << 21, spent: Duration::from_secs(2), ..Default::default() }
    }

    #[test]
    fn a_way_reads_so() {
        let single =
            Measured { latencies_ns: (1..=64).map(|n| n * 10_000).collect(), misses: 1, ..way("single", 64) };
        let look = Look { wide: false, headers: true, paint: Paint::plain(), now: 0 };
        let wanted = "\
WAY      BLOCKS    BYTES   BLOCKS/S   BYTES/S     P50     P99   MISSES   WRONG
in          100   200MiB         50    100MiB       -       -        0       0
single       64   128MiB         32   64.0MiB   320us   640us        1       0
";
        let table = WAYS.table(&[way("in", 100), single], &look, &mut Vec::new());
        assert_eq!(table, wanted, "\n{table}");
    }

    #[test]
    fn the_load_is_bounded_in_bytes() {
        let arguments = |count, block_bytes, bytes_max| Arguments {
            name: "b".into(),
            block_bytes,
            count,
            seconds: Duration::from_secs(1),
            bytes_max,
            show: Show { output: Format::Table },
        };
        let count = |count, block_bytes, bytes_max| {
            arguments(count, block_bytes, bytes_max).plan("b".into()).map(|plan| plan.count)
        };
        assert_eq!(count(None, 2 << 20, 256 << 20), Ok(128));
        assert_eq!(count(None, 4 << 10, 256 << 20), Ok(4_096), "no more than tell something");
        assert_eq!(count(Some(128), 2 << 20, 256 << 20), Ok(128));
        for wrong in [count(Some(129), 2 << 20, 256 << 20), count(None, 2 << 20, 1 << 20)] {
            assert_eq!(wrong.unwrap_err().exit, Exit::Usage);
        }
    }

    #[test]
    fn wrong_bytes_fail_and_so_does_a_way_on_which_blocks_were_missed() {
        assert_eq!(verdict(&[way("out", 5), way("in", 5)], "b"), Ok(Exit::Ok));
        let said = |misses, why, way| {
            let failure = verdict(&[Measured { misses, why, ..way }], "b").unwrap_err();
            assert_eq!(failure.exit, Exit::Degraded);
            failure.message
        };
        assert_eq!(said(3, None, way("out", 2)), "b did not take 3 of 5 blocks");
        let evicted = Some(MissReason::PeerEvicted);
        assert_eq!(said(4, evicted, way("in", 1)), "4 of 5 blocks did not come back from b: peer_evicted");
        let wrong = Measured { wrong: 1, ..way("in", 5) };
        assert_eq!(verdict(&[wrong], "b").unwrap_err().exit, Exit::Failure);
        let none = Measured { why: Some(MissReason::PeerEvicted), ..way("in", 0) };
        let failure = verdict(&[way("out", 5), none], "b").unwrap_err();
        assert_eq!((failure.exit, failure.message.contains("peer_evicted")), (Exit::Degraded, true));
    }
}
