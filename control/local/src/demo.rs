//! The demo: one daemon or several, workers that replay a trace, a `kill -9` on the way, and the account at
//! the end.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use kv_client::{Client, Tier, WorkerOptions, v1};
use kvd::config::units::{Admission, Policy, Size, StoreAt, Text};

use crate::audit::Audit;
use crate::daemon::{Daemon, Setup};
use crate::nodes::{self, NODES_MAX};
use crate::places::{Places, Wishes, share};
use crate::progress::Progress;
use crate::replay::{Patience, Plan, Replay, Seat, scope, slice};
use crate::report::{Moved, NodeReport, ObjectReport, Report, Restart};
use crate::stop::Stop;
use crate::tally::Tally;
use crate::trace;

/// How long a daemon may take until it answers, recovery included.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long a worker goes on trying one call.
const CALL_LIMIT: Duration = Duration::from_secs(40);
/// How long a single call may take.
const DEADLINE: Duration = Duration::from_secs(5);
/// One block in so many is stored durably.
const DURABLE_EVERY: u64 = 32;
const STAGING_BYTES_MIN: u64 = 4 << 20;

fn text<T: Text>(value: &str) -> Result<T, String> {
    T::parse(value).ok_or_else(|| format!("expected {}", T::expected()))
}

fn speed(value: &str) -> Result<f64, String> {
    let speed: f64 = value.parse().map_err(|_| "expected a number, such as 1 or 100".to_owned())?;
    if speed.is_finite() && speed > 0.0 { Ok(speed) } else { Err("expected a number above 0".into()) }
}

/// What to run.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// So many nodes, each a daemon of its own, that serve each other's blocks
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=NODES_MAX))]
    pub nodes: u16,
    /// Replay this trace instead of the built-in one; Mooncake's format, one JSON object a line
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// So many times faster than it was recorded [default: as fast as it goes]
    #[arg(long, value_name = "FACTOR", value_parser = speed)]
    pub speed: Option<f64>,
    /// Begin no request after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 40)]
    pub duration: u64,
    /// At most so many requests
    #[arg(long, value_name = "COUNT")]
    pub requests: Option<usize>,
    /// Kill the daemon so often, at equal distances; of several, each but the first in turn
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    pub kills: usize,
    /// Workers, each a thread with a session at every node [default: one a core, 2 to 8]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=32))]
    pub workers: Option<u16>,
    /// Length of a block
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = text::<Size>)]
    pub block_bytes: Size,
    /// Host tier of each node, in shared memory [default: 256MiB for all, less where there is less]
    #[arg(long, value_name = "SIZE", value_parser = text::<Size>)]
    pub host_bytes: Option<Size>,
    /// Disk tier of each node [default: 2GiB, of several 1GiB, less where there is less]
    #[arg(long, value_name = "SIZE", value_parser = text::<Size>)]
    pub disk_bytes: Option<Size>,
    /// Which blocks are written to disk when they leave host memory: budget, frequency, all or never
    #[arg(long, value_name = "WHICH", default_value = "budget", value_parser = text::<Admission>)]
    pub admission: Admission,
    /// Which block goes when room is needed: sieve, s3fifo or lru
    #[arg(long, value_name = "POLICY", default_value = "sieve", value_parser = text::<Policy>)]
    pub policy: Policy,
    /// Share blocks in an object store as well: a directory, s3://BUCKET[/PREFIX] or az://ACCOUNT/CONTAINER[/PREFIX] with
    /// keys from the environment; without a value a directory that is removed at the end
    #[arg(long, value_name = "STORE", num_args = 0..=1, default_missing_value = "")]
    pub object: Option<String>,
    /// A tmpfs for the host tier [default: /dev/shm]
    #[arg(long, value_name = "DIR")]
    pub memory_dir: Option<PathBuf>,
    /// A directory on a disk for the disk tier [default: the one for temporary files]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Print one JSON object instead of the table
    #[arg(long)]
    pub json: bool,
    /// Store one wrong byte, to see that it is found
    #[arg(long, hide = true)]
    pub plant: bool,
}

/// Runs the demo to its end, or until `stop` is asked.
pub fn run(options: &Options, stop: &Stop) -> anyhow::Result<Report> {
    let (name, mut requests) = match &options.trace {
        Some(path) => {
            let requests = trace::read(path).with_context(|| format!("the trace {}", path.display()))?;
            (path.display().to_string(), requests)
        }
        None => ("mooncake-conversation (built in)".to_owned(), trace::parse(trace::BUILT_IN)?),
    };
    requests.truncate(options.requests.unwrap_or(usize::MAX));
    ensure!(!requests.is_empty(), "no request to replay");
    let block_bytes = u32::try_from(options.block_bytes.0).ok().filter(|bytes| *bytes > 0);
    let block_bytes = block_bytes.context("--block-bytes must be from 1B to 4GiB")?;

    let wishes = Wishes {
        host: options.host_bytes,
        disk: options.disk_bytes,
        memory_dir: options.memory_dir.clone(),
        data_dir: options.data_dir.clone(),
    };
    let nodes = usize::from(options.nodes);
    let host = share(Size::mib(256), nodes, Size::mib(16));
    // Enough for all that is durable, as a rule.
    let disk = Size::gib(if nodes == 1 { 2 } else { 1 });
    let places = Places::make(&wishes, host, disk, nodes)?;
    let workers = options.workers.map_or_else(
        || std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 8)),
        usize::from,
    );
    let total = requests.len();
    let (daemons, memory) = match nodes {
        1 => ("a kvd daemon".to_owned(), places.of(0).memory_dir),
        _ => (format!("{nodes} kvd daemons, each"), places.memory().to_owned()),
    };
    eprintln!(
        "{daemons} with {} of host memory and {} of disk; {workers} workers replay {total} requests of {name}\n\
         in blocks of {}; files in {} and {}, removed at the end",
        places.host.about(),
        places.disk.about(),
        Size(block_bytes.into()).about(),
        memory.display(),
        places.data().display(),
    );
    places.notes.iter().for_each(|note| eprintln!("note: {note}"));

    let store = options.object.as_ref().map(|store| object_store(store, &places)).transpose()?;
    let mut settings = vec![
        "listen.http=off".to_owned(),
        format!("disk.admission={}", options.admission),
        format!("host.policy={}", options.policy),
        // With less memory and disk than the trace fills, most of it is evicted. The account needs to hear of every
        // block that it was, so none may be forgotten.
        format!("catalog.ghosts_max={}", trace::blocks(&requests).max(64)),
    ];
    if let Some(store) = &store {
        // The trace goes by a hundred times faster than it was recorded, and so does this.
        let soon = ["age_min=0s", "pack_wait=500ms", "refresh=500ms"].map(|pair| format!("object.{pair}"));
        settings.extend(soon.into_iter().chain([format!("object.store={store}")]));
    }
    let setups = nodes::setups(&places, &settings)?;
    let started: Vec<_> = setups.iter().map(Daemon::start).collect::<Result<_, _>>()?;
    let mut nodes = Vec::new();
    for (setup, mut daemon) in setups.into_iter().zip(started) {
        let client = daemon.wait_ready(START_LIMIT, || stop.is_asked())?.with_deadline(DEADLINE);
        let auditor = session(&client, "auditor", block_bytes)?;
        nodes.push(Node { setup, daemon, client, auditor, kills: 0, fetched: BTreeMap::new() });
    }

    let report = Report {
        trace: name,
        workers,
        block_bytes,
        host_bytes: places.host.0,
        disk_bytes: places.disk.0,
        admission: options.admission.to_string(),
        object: store.clone().map(|store| ObjectReport { store, ..ObjectReport::default() }),
        ..Report::default()
    };
    let abort = Stop::default();
    let patience = Patience { limit: CALL_LIMIT, stop: abort.clone() };
    let mut hands: Vec<Vec<Seat>> = Vec::new();
    for at in 0..workers {
        let mut seats = Vec::new();
        for node in &mut nodes {
            // Each with a connection of its own, as engine processes have.
            let own = node.daemon.wait_ready(START_LIMIT, || stop.is_asked())?.with_deadline(DEADLINE);
            seats.push(session(&own, &format!("worker {at}"), block_bytes)?);
        }
        hands.push(seats);
    }
    let plan = Plan {
        requests,
        speed: options.speed,
        durable_every: DURABLE_EVERY,
        plant: options.plant,
        object: store.is_some(),
    };
    let gate = Director::gate(total, options.kills, 0, workers);
    let replay = Replay::new(plan, patience.clone(), gate, nodes.len());
    let mut director = Director {
        options,
        total,
        workers,
        nodes,
        runtime: tokio::runtime::Builder::new_current_thread().enable_all().build()?,
        patience,
        replay: &replay,
        progress: Progress::new(total as u64, std::io::stderr().is_terminal()),
        tally: Tally::default(),
        report,
    };
    let (directed, done) = std::thread::scope(|scope| {
        let threads: Vec<_> = hands.iter().map(|seats| scope.spawn(|| replay.work(seats))).collect();
        let directed = director.direct(stop);
        if directed.is_err() || stop.is_asked() {
            abort.ask();
        }
        let done: Vec<_> =
            threads.into_iter().map(|thread| thread.join().expect("a worker panicked")).collect();
        (directed, done)
    });
    director.progress.end();
    directed?;
    let mut failed = None;
    for (tally, error) in done {
        director.tally.merge(tally);
        failed = failed.or(error);
    }
    if let Some(error) = failed {
        return Err(error).context("a worker could not go on");
    }
    drop(hands);
    director.close(stop)
    // The daemons ended; `places` removes what is left.
}

/// Where the object store of a run is. A directory may be named from where the command was typed.
fn object_store(wish: &str, places: &Places) -> anyhow::Result<String> {
    let store = match wish {
        "" => places.data().join("objects").display().to_string(),
        url if url.contains("://") => url.to_owned(),
        dir => std::path::absolute(dir).context("--object")?.display().to_string(),
    };
    let known: Result<StoreAt, String> = text(&store);
    known.map_err(anyhow::Error::msg).context("--object")?;
    Ok(store)
}

/// A worker session and its binding.
fn session(client: &Client, name: &str, block_bytes: u32) -> anyhow::Result<Seat> {
    let options = WorkerOptions {
        name: format!("kv-local {name}"),
        staging_bytes: (4 * u64::from(block_bytes)).max(STAGING_BYTES_MIN),
        hazards: 64,
        ring_entries: 256,
        ..WorkerOptions::default()
    };
    let worker = client.worker(options).wait().with_context(|| format!("opening a session for {name}"))?;
    let registered = worker.register(scope(), slice(), block_bytes).wait();
    let context = || {
        let length = Size(block_bytes.into()).about();
        format!("blocks of {length}: take shorter ones with --block-bytes, or more memory with --host-bytes")
    };
    Ok((worker, registered.with_context(context)?))
}

/// A daemon, and what the demo has with it.
struct Node {
    setup: Setup,
    daemon: Daemon,
    client: Client,
    auditor: Seat,
    kills: usize,
    /// What it fetched from each peer, by name, in lives that are over; at the end, in all.
    fetched: BTreeMap<String, Moved>,
}

/// Whoever watches the replay, kills the daemon and keeps the account.
struct Director<'a> {
    options: &'a Options,
    total: usize,
    workers: usize,
    nodes: Vec<Node>,
    runtime: tokio::runtime::Runtime,
    patience: Patience,
    replay: &'a Replay,
    progress: Progress,
    tally: Tally,
    report: Report,
}

impl Director<'_> {
    /// Requests that may begin before kill number `kill` (from 0): enough beyond its point that the daemon dies
    /// at work, few enough that it dies before they are done.
    fn gate(total: usize, kills: usize, kill: usize, workers: usize) -> usize {
        let point = Self::point(total, kills, kill);
        if kill >= kills { total } else { total.min(point + workers + (total - point) / 2) }
    }

    /// Requests after which kill number `kill` is due.
    fn point(total: usize, kills: usize, kill: usize) -> usize {
        (total as u128 * (kill as u128 + 1) / (kills as u128 + 1)) as usize
    }

    /// The node that kill number `kill` (from 0) is for: of several, the first is left alone.
    fn victim(nodes: usize, kill: usize) -> usize {
        if nodes == 1 { 0 } else { 1 + kill % (nodes - 1) }
    }

    /// Until all workers have ended.
    fn direct(&mut self, stop: &Stop) -> anyhow::Result<()> {
        let limit = Duration::from_secs(self.options.duration);
        let kills = self.options.kills;
        self.report.ended = "trace";
        while self.replay.live.ended.load(Ordering::Relaxed) < self.workers as u64 {
            if stop.is_asked() {
                self.report.ended = "signal";
                break;
            }
            let elapsed = self.replay.elapsed();
            let requests = self.replay.live.requests.load(Ordering::Relaxed) as usize;
            let share = elapsed.as_secs_f64() / limit.as_secs_f64().max(0.001);
            let killed = self.report.kills;
            let due_at = (killed + 1) as f64 / (kills + 1) as f64;
            if killed < kills && (requests >= Self::point(self.total, kills, killed) || share >= due_at) {
                self.kill(requests as u64, stop)?;
            } else if elapsed >= limit && self.report.ended == "trace" {
                self.report.ended = "duration";
                self.replay.finish();
            }
            self.nodes.iter_mut().try_for_each(|node| node.daemon.check())?;
            self.progress.show(&self.replay.live);
            std::thread::sleep(Duration::from_millis(2));
        }
        self.report.seconds = self.replay.elapsed().as_secs_f64();
        Ok(())
    }

    fn status(&self, node: usize) -> anyhow::Result<v1::StatusResponse> {
        let ask = async {
            let mut admin = self.nodes[node].client.admin();
            tokio::time::timeout(DEADLINE, admin.status(v1::StatusRequest {})).await
        };
        let answer = self.runtime.block_on(ask).context("the daemon did not tell its status in time")?;
        Ok(answer.context("asking the daemon for its status")?.into_inner())
    }

    /// Enters what a node fetched from its peers in this life of its daemon.
    fn enter_fetched(&mut self, node: usize) -> anyhow::Result<()> {
        if self.nodes.len() == 1 {
            return Ok(());
        }
        let node = &mut self.nodes[node];
        let ask = async {
            let mut admin = node.client.admin();
            tokio::time::timeout(DEADLINE, admin.list_peers(v1::ListPeersRequest {})).await
        };
        let answer = self.runtime.block_on(ask).context("the daemon did not tell of its peers in time")?;
        for peer in answer.context("asking the daemon for its peers")?.into_inner().peers {
            let moved = Moved { blocks: peer.blocks_in, bytes: peer.bytes_in };
            *node.fetched.entry(peer.node).or_default() += moved;
        }
        Ok(())
    }

    /// Settles a node's account, kills its daemon at work, starts the next one and reads the account back.
    fn kill(&mut self, after_requests: u64, stop: &Stop) -> anyhow::Result<()> {
        let victim = Self::victim(self.nodes.len(), self.report.kills);
        let status = self.status(victim)?;
        self.report.disk_bytes_written += status.disk_bytes_written;
        let was = blocks(&status);
        self.enter_fetched(victim)?;
        let asked = self.replay.acked(victim);
        let (worker, binding) = &self.nodes[victim].auditor;
        let look = || Audit::look(worker, binding, &asked);
        let before = self.patience.insist(worker, &mut self.tally.retries, look)?;
        self.replay.settle(victim, &asked, &before.kept);

        let node = &mut self.nodes[victim];
        node.kills += 1;
        node.daemon.kill()?;
        let since = Instant::now();
        self.report.kills += 1;
        let next = Self::gate(self.total, self.options.kills, self.report.kills, self.workers);
        self.replay.open(next);
        node.daemon = Daemon::start(&node.setup)?;
        node.client = node.daemon.wait_ready(START_LIMIT, || stop.is_asked())?.with_deadline(DEADLINE);
        let ready_ms = since.elapsed().as_millis() as u64;

        let recovery = self.status(victim)?.recovery.unwrap_or_default();
        let (worker, binding) = &self.nodes[victim].auditor;
        let after = Audit::read(worker, binding, &before.kept, &self.patience, &mut self.tally)?;
        self.replay.settle(victim, &before.kept, &after.kept);
        let count = |tier: Tier| was.get(&tier).copied().unwrap_or(0);
        let restart = Restart {
            node: self.nodes[victim].setup.name.clone(),
            after_requests,
            ready_ms,
            host_blocks_before: count(Tier::Host),
            host_blocks: recovery.host_blocks,
            disk_blocks_before: count(Tier::Disk),
            disk_blocks: recovery.disk_blocks,
            durable_checked: after.kept.len() as u64 - after.undecided,
        };
        let of = if self.nodes.len() > 1 { format!(" of {}", restart.node) } else { String::new() };
        let Restart { host_blocks, disk_blocks, .. } = restart;
        self.progress.say(&format!(
            "kill -9{of} after {after_requests} requests; back in {ready_ms} ms with {host_blocks} blocks in \
             memory and {disk_blocks} on disk"
        ));
        self.report.recovered_blocks += recovery.host_blocks + recovery.disk_blocks;
        self.report.restarts.push(restart);
        self.enter(victim, &before);
        self.enter(victim, &after);
        Ok(())
    }

    fn enter(&mut self, node: usize, audit: &Audit) {
        if let Some((hash, reason)) = audit.first_lost {
            let words = || format!("block {hash} of {}: {}", self.nodes[node].setup.name, reason.name());
            self.report.first_lost.get_or_insert_with(words);
        }
        self.report.durable_evicted += audit.evicted;
        self.report.lost_durable_blocks += audit.lost;
        // What is undecided stays in the account; only the last word on it counts.
        self.report.durable_undecided = audit.undecided;
    }

    /// Enters what a node has to do with the object store in the last life of its daemon.
    fn enter_object(&mut self, told: &v1::StatusResponse) {
        let Some(object) = &mut self.report.object else { return };
        for tier in told.tiers.iter().filter(|tier| tier.tier() == v1::Tier::Object) {
            object.blocks = object.blocks.max(tier.blocks);
            object.uploaded_bytes += tier.bytes_written;
            object.downloaded_bytes += tier.bytes_read;
            if !tier.reason.is_empty() {
                object.trouble = Some(tier.reason.clone());
            }
        }
    }

    /// Reads the whole account of every node back, ends the daemons in order, and gives the report.
    fn close(mut self, stop: &Stop) -> anyhow::Result<Report> {
        let mut undecided = 0;
        for at in 0..self.nodes.len() {
            let mut told = v1::StatusResponse::default();
            if !stop.is_asked() {
                let (worker, binding) = &self.nodes[at].auditor;
                let asked = self.replay.acked(at);
                let audit = Audit::read(worker, binding, &asked, &self.patience, &mut self.tally)?;
                self.enter(at, &audit);
                undecided += audit.undecided;
                told = self.status(at)?;
                self.report.disk_bytes_written += told.disk_bytes_written;
                self.enter_fetched(at)?;
            }
            self.enter_object(&told);
            let held = blocks(&told);
            let count = |tier: Tier| held.get(&tier).copied().unwrap_or(0);
            self.report.nodes.push(NodeReport {
                node: self.nodes[at].setup.name.clone(),
                kills: self.nodes[at].kills,
                host_blocks: count(Tier::Host),
                disk_blocks: count(Tier::Disk),
                ..NodeReport::default()
            });
        }
        for (at, node) in self.nodes.iter().enumerate() {
            for (peer, moved) in &node.fetched {
                self.report.nodes[at].fetched += *moved;
                let owner = self.report.nodes.iter_mut().find(|report| report.node == *peer);
                owner.into_iter().for_each(|owner| owner.served += *moved);
            }
        }
        self.nodes.iter_mut().try_for_each(|node| node.daemon.end())?;
        for node in &mut self.nodes {
            let name = &node.setup.name;
            ensure!(node.daemon.stop()?, "the daemon {name} did not end in order when it was told to");
        }
        if !stop.is_asked() {
            self.report.durable_undecided = undecided;
        }
        self.report.take(&self.tally);
        Ok(self.report)
    }
}

/// Blocks by tier, over all shards.
fn blocks(status: &v1::StatusResponse) -> BTreeMap<Tier, u64> {
    let mut blocks = BTreeMap::new();
    for info in &status.tiers {
        let tier = match info.tier() {
            v1::Tier::Host => Tier::Host,
            v1::Tier::Disk => Tier::Disk,
            _ => continue,
        };
        *blocks.entry(tier).or_default() += info.blocks;
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_spread_evenly_and_the_gate_opens_at_the_end() {
        assert_eq!([0, 1, 2].map(|kill| Director::point(300, 2, kill)), [100, 200, 300]);
        assert_eq!(Director::gate(300, 2, 0, 4), 204);
        assert_eq!(Director::gate(300, 2, 2, 4), 300);
        assert_eq!(Director::gate(300, 0, 0, 4), 300);
        assert_eq!(Director::gate(1, 1, 0, 4), 1);
    }

    #[test]
    fn the_first_of_several_nodes_is_never_killed_and_the_others_take_turns() {
        assert_eq!([0, 1].map(|kill| Director::victim(1, kill)), [0, 0]);
        assert_eq!([0, 1, 2].map(|kill| Director::victim(2, kill)), [1, 1, 1]);
        assert_eq!([0, 1, 2].map(|kill| Director::victim(3, kill)), [1, 2, 1]);
    }

    #[test]
    fn a_speed_is_a_number_above_zero() {
        assert_eq!(speed("2.5"), Ok(2.5));
        for bad in ["0", "-1", "inf", "NaN", "fast"] {
            assert!(speed(bad).is_err(), "{bad}");
        }
    }
}
