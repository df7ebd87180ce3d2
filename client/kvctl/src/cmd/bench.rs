//! `kvctl bench`: a bounded load of puts, lookups and gets; every byte read back is checked.
//!
//! The blocks are of a tenant and scope of their own, of low priority, and are evicted at the end. What goes between
//! two nodes is measured by `kvctl bench peer`.

mod load;
mod peer;

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use self::load::{Plan, Tally};
use crate::cli::{Format, Global, Show, parse_block_bytes};
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::out;
use crate::paint::Paint;
use crate::structured;
use crate::table::{Cell, Kind, Look, column, wide};
use crate::units::{bytes, counted, nanoseconds, parse_bytes, parse_duration};

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    load: Load,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Send blocks to a peer and fetch them back
    Peer(peer::Arguments),
}

#[derive(Debug, Args)]
struct Load {
    /// Blocks put, then read back
    #[arg(long, value_name = "COUNT", default_value_t = 1_000)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    blocks: u32,
    /// Length of a block
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = parse_block_bytes)]
    bytes: u32,
    /// Threads that ask at the same time
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// Blocks named in one lookup
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000))]
    batch: u32,
    /// Each kind of operation ends after this long
    #[arg(long, default_value = "30s", value_parser = parse_duration)]
    time: Duration,
    /// Most bytes the load may fill
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_bytes)]
    bytes_max: u64,
    /// Over gRPC even where shared memory could be had
    #[arg(long)]
    grpc: bool,
    /// Leave the blocks there
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    show: Show,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    match arguments.what {
        Some(What::Peer(arguments)) => peer::run(global, arguments).await,
        None => load(global, arguments.load).await,
    }
}

async fn load(global: &Global, arguments: Load) -> Result<Exit, Failure> {
    let all = u64::from(arguments.blocks) * u64::from(arguments.bytes);
    if all > arguments.bytes_max {
        return Err(Failure::usage(format!(
            "{} of blocks are more than {}",
            bytes(all),
            bytes(arguments.bytes_max)
        ))
        .help(format!("they may push others out; if that is meant: --bytes-max {}", bytes(all))));
    }
    let plan = Plan {
        blocks: arguments.blocks,
        block_bytes: arguments.bytes,
        threads: arguments.threads,
        batch: arguments.batch,
        time: arguments.time,
        grpc: arguments.grpc,
        keep: arguments.keep,
    };
    let daemon = connect::connect(global).await?;
    let (door, tallies) = load::run(&daemon.client, plan).await?;
    let format = arguments.show.output;
    let text = structured::text(format, false, || {
        let operations: Vec<_> = tallies.iter().map(json).collect();
        json!({ "door": door, "block_bytes": plan.block_bytes, "threads": plan.threads, "operations": operations })
    });
    if text.is_none() {
        let (length, threads) = (bytes(plan.block_bytes.into()), counted(plan.threads.into(), "thread"));
        out::note(&format!("blocks of {length}, {threads}, by {door}"));
    }
    let look = Look { wide: format == Format::Wide, headers: true, paint: Paint::stdout(), now: 0 };
    out::print(&text.unwrap_or_else(|| match format {
        Format::Name => OPERATIONS.names(&tallies),
        _ => OPERATIONS.table(&tallies, &look, &mut Vec::new()),
    }))?;
    verdict(&tallies)
}

/// Wrong bytes fail the bench; what is merely not there does not: the daemon may evict what it likes.
fn verdict(tallies: &[Tally]) -> Result<Exit, Failure> {
    let wrong: u64 = tallies.iter().map(|tally| tally.wrong).sum();
    if wrong > 0 {
        return Err(wrong_bytes(wrong));
    }
    Ok(Exit::Ok)
}

fn wrong_bytes(wrong: u64) -> Failure {
    Failure::new(Exit::Failure, format!("{} came back with wrong bytes", counted(wrong, "block")))
        .help("this must never happen: keep the data directory and report it with `kvctl status -o json`")
}

/// The latency of these, ascending, that this share of them stayed within; 0 of none.
fn quantile(latencies_ns: &[u64], share: f64) -> u64 {
    let rank = (latencies_ns.len() as f64 * share).ceil() as usize;
    latencies_ns.get(rank.saturating_sub(1)).copied().unwrap_or(0)
}

const OPERATIONS: Kind<Tally> = Kind {
    noun: "operation",
    name: |tally| tally.name.to_owned(),
    columns: &[
        column("OP", |tally, _| Cell::text(tally.name)),
        column("COUNT", |tally, _| Cell::count(tally.count())),
        column("P50", |tally, _| time(tally.quantile(0.5))),
        column("P99", |tally, _| time(tally.quantile(0.99))),
        column("MAX", |tally, _| time(tally.quantile(1.0))),
        column("OPS/S", |tally, _| Cell::count(tally.per_second(tally.count()))),
        column("BYTES/S", |tally, _| match tally.per_second(tally.bytes) {
            0 => Cell::number(0, "-".into()),
            rate => Cell::bytes(rate),
        }),
        column("MISSES", |tally, _| Cell::count(tally.misses)),
        column("WRONG", |tally, _| Cell::count(tally.wrong)),
        wide("BUSY", |tally, _| Cell::count(tally.busy)),
        wide("SPENT", |tally, _| time(tally.spent.as_nanos() as u64)),
    ],
};

fn time(ns: u64) -> Cell {
    Cell::number(ns, nanoseconds(ns))
}

fn json(tally: &Tally) -> serde_json::Value {
    json!({
        "op": tally.name,
        "count": tally.count(),
        "p50_ns": tally.quantile(0.5),
        "p99_ns": tally.quantile(0.99),
        "max_ns": tally.quantile(1.0),
        "ops_per_s": tally.per_second(tally.count()),
        "bytes_per_s": tally.per_second(tally.bytes),
        "misses": tally.misses,
        "wrong": tally.wrong,
        "busy": tally.busy,
        "spent_ns": tally.spent.as_nanos() as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_rates_come_from_what_was_timed() {
        let tally = Tally {
            name: "get",
            latencies_ns: (1..=100).rev().map(|n| n * 1_000).collect(),
            bytes: 100 << 20,
            spent: Duration::from_secs(2),
            misses: 3,
            ..Default::default()
        }
        .sorted();
        assert_eq!(tally.quantile(0.5), 50_000);
        assert_eq!(tally.quantile(0.99), 99_000);
        assert_eq!(tally.quantile(1.0), 100_000);
        let look = Look { wide: false, headers: false, paint: Paint::plain(), now: 0 };
        let row = OPERATIONS.table(std::slice::from_ref(&tally), &look, &mut Vec::new());
        assert_eq!(row, "get   100   50.0us   99.0us   100us   50   50.0MiB   3   0\n");
        assert_eq!(Tally::default().quantile(0.99), 0, "nothing was done");
    }

    #[test]
    fn wrong_bytes_fail_and_misses_do_not() {
        let miss = Tally { misses: 5, ..Default::default() };
        assert_eq!(verdict(&[miss]), Ok(Exit::Ok));
        let wrong = Tally { wrong: 1, ..Default::default() };
        assert_eq!(verdict(&[wrong]).unwrap_err().exit, Exit::Failure);
    }
}
