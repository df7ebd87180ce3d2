//! `kvctl drain`: the daemon stops taking new work; its blocks go to its peers; with `--wait` until its workers are
//! gone.
//!
//! ```text
//!   drain (no new work) -> move (offer blocks to peers, the most valuable first) -> --wait (workers leave, I/O ends)
//! ```
//! In this order, so that nothing new comes up behind what was moved. That blocks could not be moved changes nothing
//! of the rest: the node drains all the same, and the exit status says so.

use std::time::{Duration, Instant};

use clap::Args;
use kv_api::v1;
use kv_block::Tier;

use crate::cli::Global;
use crate::cmd::get::tier_name;
use crate::cmd::peers::{self, in_words, may_answer};
use crate::connect::{self, Daemon};
use crate::exit::{Exit, Failure};
use crate::out;
use crate::paint::Paint;
use crate::progress;
use crate::units::{bytes, counted, parse_bytes, parse_duration};

const POLL: Duration = Duration::from_millis(200);
const MORE: &str = "\
Once the node takes no new work its blocks are offered to its peers, those most
worth keeping first; what they take stays here, too. Exits with 4 when there are
peers and some blocks went to none of them.";

#[derive(Debug, Args)]
#[command(after_help = MORE)]
pub(crate) struct Arguments {
    /// Take new work again; the same as `kvctl undrain`
    #[arg(long, conflicts_with_all = ["wait", "no_move", "to", "bytes"])]
    undo: bool,
    /// Wait so long for workers to leave and I/O to end; exits with 4 if they do not
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    wait: Option<Duration>,
    /// Move no blocks to peers
    #[arg(long, conflicts_with_all = ["to", "bytes"])]
    no_move: bool,
    /// Move blocks to this peer only; may be given several times
    #[arg(long, value_name = "NODE")]
    to: Vec<String>,
    /// Move at most so much [all of it]
    #[arg(long, value_name = "SIZE", value_parser = parse_move)]
    bytes: Option<u64>,
}

/// Nothing to be moved is said with `--no-move`: the protocol's 0 stands for everything.
fn parse_move(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        0 => Err("to move nothing: --no-move".into()),
        bytes => Ok(bytes),
    }
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let daemon = connect::connect(global).await?;
    if arguments.undo {
        return take_work(&daemon).await;
    }
    if !arguments.to.is_empty() {
        // A name with a typing error is found out before anything changes.
        let peers = peers::known(&daemon).await?.unwrap_or_default();
        arguments.to.iter().try_for_each(|name| peers::pick(&peers, name).map(|_| ()))?;
    }
    if !set(&daemon, false).await? {
        out::print("taking new work\n")?;
        return Ok(Exit::Failure);
    }
    out::print("draining: no new work is taken\n")?;
    let moved = match arguments.no_move {
        true => Ok(Exit::Ok),
        false => move_blocks(&daemon, global.timeout, &arguments).await,
    };
    let moved = moved.unwrap_or_else(|failure| {
        // Said now: waiting may take long, and may end with a failure of its own.
        out::note(failure.render(Paint::stderr()).trim_end());
        failure.exit
    });
    if let Some(wait) = arguments.wait {
        wait_for_workers(&daemon, wait).await?;
    }
    Ok(moved)
}

/// `kvctl undrain`.
pub(crate) async fn undo(global: &Global) -> Result<Exit, Failure> {
    take_work(&connect::connect(global).await?).await
}

async fn take_work(daemon: &Daemon) -> Result<Exit, Failure> {
    if set(daemon, true).await? {
        return Err(Failure::new(Exit::Failure, "the daemon goes on draining")
            .help("it is about to end: see its log, and start it again when it has"));
    }
    out::print("taking new work\n")?;
    Ok(Exit::Ok)
}

/// Whether the daemon drains afterwards.
async fn set(daemon: &Daemon, stop: bool) -> Result<bool, Failure> {
    let answer = daemon.within(daemon.admin().drain(daemon.request(v1::DrainRequest { stop }))).await?;
    Ok(answer.draining)
}

async fn wait_for_workers(daemon: &Daemon, wait: Duration) -> Result<(), Failure> {
    let end = Instant::now() + wait;
    loop {
        let status = daemon.within(daemon.admin().status(daemon.request(v1::StatusRequest {}))).await?;
        if status.clients == 0 && status.operations_in_flight == 0 {
            return out::print("drained\n");
        }
        if Instant::now() >= end {
            return Err(
                Failure::new(Exit::Degraded, left(&status)).help("`kvctl get clients` shows who stays")
            );
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Offers blocks to peers, if there are any.
async fn move_blocks(daemon: &Daemon, timeout: Duration, arguments: &Arguments) -> Result<Exit, Failure> {
    const OLD: &str = "this kvd is older than kvctl and cannot move blocks to peers; they stay here";
    let Some(peers) = peers::known(daemon).await? else {
        out::note(OLD);
        return Ok(Exit::Ok);
    };
    if peers.is_empty() {
        return Ok(Exit::Ok);
    }
    let nodes: Vec<String> =
        arguments.to.iter().map(|name| name.strip_prefix("peer/").unwrap_or(name).to_owned()).collect();
    reachable(&peers, &nodes)?;
    let request = v1::EvacuateRequest { nodes: nodes.clone(), bytes_max: arguments.bytes.unwrap_or(0) };
    let Some(stream) = daemon.within_if_known(daemon.admin().evacuate(request)).await? else {
        out::note(OLD);
        return Ok(Exit::Ok);
    };
    let last: v1::EvacuateProgress = progress::follow("moving", stream, timeout).await?;
    if last.taken == 0 && last.left > 0 {
        // They may have been lost since.
        reachable(&peers::known(daemon).await?.unwrap_or_default(), &nodes)?;
    }
    out::print(&moved(&last))?;
    if last.left == 0 {
        return Ok(Exit::Ok);
    }
    let tiers = daemon.within(daemon.admin().list_tiers(daemon.request(v1::ListTiersRequest {}))).await?;
    let disk = tiers.tiers.iter().any(|tier| {
        tier_name(tier.tier) == Tier::Disk.name() && !matches!(tier.state.as_str(), "off" | "degraded")
    });
    out::note(&no_loss(&last, disk));
    Ok(Exit::Degraded)
}

/// Fails when none of the peers meant (all, if none is named) can be reached.
fn reachable(peers: &[v1::PeerInfo], nodes: &[String]) -> Result<(), Failure> {
    let meant = || peers.iter().filter(|peer| nodes.is_empty() || nodes.contains(&peer.node));
    if meant().any(may_answer) {
        return Ok(());
    }
    let why = meant().map(in_words).collect::<Vec<_>>().join("; ");
    Err(Failure::new(Exit::Degraded, format!("no peer can be reached, so no block was moved: {why}")).help(
        "the node drains all the same, and what is on disk stays there; `kvctl describe peer` says more, `kvctl drain` \
         tries again",
    ))
}

fn moved(last: &v1::EvacuateProgress) -> String {
    match last.total {
        0 => "nothing to move to peers\n".into(),
        _ => format!("{} with peers now, {}\n", counted(last.taken, "block"), bytes(last.bytes)),
    }
}

/// What becomes of blocks that no peer took.
fn no_loss(last: &v1::EvacuateProgress, disk: bool) -> String {
    let stay = if disk { "what is on disk here stays there, and " } else { "" };
    let (left, total) = (last.left, counted(last.total, "block"));
    format!(
        "{left} of {total} went to no peer; nothing is lost: {stay}what is nowhere is computed again when it is needed"
    )
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

    #[test]
    fn a_disk_is_promised_only_where_there_is_one() {
        let progress = |left| v1::EvacuateProgress { left, total: 10, ..Default::default() };
        assert_eq!(
            no_loss(&progress(2), true),
            "2 of 10 blocks went to no peer; nothing is lost: what is on disk here stays there, and what is nowhere is \
             computed again when it is needed"
        );
        assert_eq!(
            no_loss(&progress(1), false),
            "1 of 10 blocks went to no peer; nothing is lost: what is nowhere is computed again when it is needed"
        );
    }

    #[test]
    fn one_peer_that_may_answer_is_enough_unless_another_is_meant() {
        let peer = |node: &str, state: &str| v1::PeerInfo {
            node: node.into(),
            state: state.into(),
            ..Default::default()
        };
        let peers = [peer("b", "idle"), peer("c", "down"), peer("d", "leaving")];
        assert_eq!(reachable(&peers, &[]), Ok(()));
        let failure = reachable(&peers, &["c".into(), "d".into()]).unwrap_err();
        assert_eq!(failure.exit, Exit::Degraded);
        assert!(failure.message.ends_with("c is down; d is leaving"), "{}", failure.message);
    }

    #[test]
    fn moving_nothing_is_said_with_its_own_flag() {
        assert_eq!(parse_move("1GiB"), Ok(1 << 30));
        assert!(parse_move("0").unwrap_err().contains("--no-move"));
    }
}
