//! `kvctl status`: the whole health of a daemon in at most 15 lines of 80 columns.

use std::collections::HashMap;
use std::time::Duration;

use clap::Args;
use kv_api::v1;
use kv_block::Tier;

use crate::cli::{Format, Global, Show, Watch};
use crate::connect;
use crate::exit::{Exit, Failure, printable};
use crate::out;
use crate::paint::{Ink, Paint};
use crate::structured;
use crate::table::ink_of;
use crate::units::{bytes, count, counted, milliseconds, percent, seconds};

const LINES_MAX: usize = 15;
const COLUMNS_MAX: usize = 80;
const MORE: &str = "\
Hits are blocks that kvd was asked for, or that workers read by themselves in shared memory; what workers look for
there and do not find is counted nowhere, so hits and misses make no ratio: the engine has that.

Exits with 0 when all is well, 4 when something is out of order.";

#[derive(Debug, Args)]
#[command(after_help = MORE)]
pub(crate) struct Arguments {
    #[command(flatten)]
    show: Show,
    #[command(flatten)]
    pub(crate) watch: Watch,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let daemon = connect::connect(global).await?;
    let format = arguments.show.output;
    let stream = arguments.watch.watch.is_some();
    out::watched(&arguments.watch, async || {
        let status = daemon.within(daemon.admin().status(daemon.request(v1::StatusRequest {}))).await?;
        let exit = if status.health == "ok" { Exit::Ok } else { Exit::Degraded };
        let text = structured::text(format, stream, || structured::json(&status));
        let text = text.unwrap_or_else(|| match format {
            Format::Name => format!("node/{}\n", printable(&status.node)),
            Format::Wide => page(&status, usize::MAX, usize::MAX, Paint::stdout()),
            _ => page(&status, LINES_MAX, COLUMNS_MAX, Paint::stdout()),
        });
        Ok((text, exit))
    })
    .await
}

/// A line: a label, and words each in its ink.
struct Line {
    label: &'static str,
    words: Vec<(Ink, String)>,
}

impl Line {
    fn new(label: &'static str, text: String) -> Self {
        Self { label, words: vec![(Ink::Plain, text)] }
    }

    /// At most `columns` wide; what does not fit ends in an ellipsis.
    fn render(&self, columns: usize, paint: Paint) -> String {
        let mut text = paint.ink(Ink::Head, &format!("{:9}", self.label));
        let mut room = columns.saturating_sub(9);
        for (ink, word) in &self.words {
            let word = printable(word);
            let length = word.chars().count();
            if length > room {
                let cut: String = word.chars().take(room.saturating_sub(1)).collect();
                text += &paint.ink(*ink, &format!("{cut}…"));
                break;
            }
            text += &paint.ink(*ink, &word);
            room -= length;
        }
        format!("{}\n", text.trim_end())
    }
}

/// The page. Warnings get the lines that the rest leaves.
fn page(status: &v1::StatusResponse, lines_max: usize, columns: usize, paint: Paint) -> String {
    let mut rest = tiers(&status.tiers, &status.object_tiers);
    rest.push(Line::new(
        "blocks",
        format!(
            "{} here, {} arriving; pinned {}",
            count(status.blocks),
            count(status.pending),
            bytes(status.pinned_bytes)
        ),
    ));
    rest.push(Line::new(
        "workers",
        format!(
            "{} with {} and {} open; {} in flight",
            counted(status.clients.into(), "client"),
            counted(status.leases.into(), "lease"),
            counted(status.reading, "block"),
            counted(status.operations_in_flight, "operation")
        ),
    ));
    rest.extend(lookups(status));
    let put = format!("{}, {}", counted(status.put_blocks, "block"), bytes(status.put_bytes));
    rest.push(Line::new("puts", put));
    if status.disk_bytes_written + status.disk_bytes_hit > 0 {
        let (written, hit) = (status.disk_bytes_written, status.disk_bytes_hit);
        let each = if hit == 0 { "-".into() } else { format!("{:.2}", written as f64 / hit as f64) };
        let text = format!("{} written, {} read in hits: {each} written per hit", bytes(written), bytes(hit));
        rest.push(Line::new("disk", text));
    }
    let at = rest.len();
    rest.extend(peers(status));
    rest.push(checks(status));
    rest.extend(status.recovery.as_ref().map(recovery));
    let mut page = vec![head(status)];
    // They may be left out where a warning has no other line: tiers have one already, and a GPU that is lost is among
    // the warnings.
    for line in [gpus(&status.gpus), object(&status.object_tiers)].into_iter().flatten() {
        if page.len() + rest.len() + 1 < lines_max {
            rest.insert(at, line);
        }
    }
    let room = lines_max.saturating_sub(page.len() + rest.len());
    page.extend(warnings(&status.warnings, room));
    page.extend(rest);
    page.iter().map(|line| line.render(columns, paint)).collect()
}

fn head(status: &v1::StatusResponse) -> Line {
    let draining = if status.draining { ", draining" } else { "" };
    let text = format!(
        "  kvd {}, up {}, epoch {}, {}, rss {}{draining}",
        status.version,
        seconds(status.uptime_s),
        status.epoch,
        counted(status.shards.into(), "shard"),
        bytes(status.rss_bytes),
    );
    let health = (ink_of(&status.health), status.health.to_uppercase());
    Line {
        label: "node",
        words: vec![(Ink::Plain, format!("{}  ", status.node)), health, (Ink::Plain, text)],
    }
}

fn warnings(warnings: &[v1::Warning], room: usize) -> Vec<Line> {
    let line = |warning: &v1::Warning| Line {
        label: "",
        words: vec![(Ink::Warn, warning.code.clone()), (Ink::Plain, format!(" {}", warning.text))],
    };
    // There is a line for warnings however full the page is, else they would be silent.
    let room = room.max(1);
    if warnings.len() <= room {
        return warnings.iter().map(line).collect();
    }
    let (shown, hidden) = warnings.split_at(room - 1);
    let text = format!("and {} more; see `kvctl status -o wide`", counted(hidden.len() as u64, "warning"));
    shown.iter().map(line).chain([Line { label: "", words: vec![(Ink::Warn, text)] }]).collect()
}

/// One line a tier, its shards summed up; the state is that of the worst shard.
fn tiers(infos: &[v1::TierInfo], objects: &[v1::ObjectTierInfo]) -> Vec<Line> {
    let mut lines = Vec::new();
    for tier in Tier::ALL {
        let number = i32::from(kv_api::convert::tier_message(tier));
        let shards: Vec<&v1::TierInfo> = infos.iter().filter(|info| info.tier == number).collect();
        let Some(first) = shards.first() else { continue };
        let sum = |of: fn(&v1::TierInfo) -> u64| shards.iter().map(|info| of(info)).sum::<u64>();
        let (used, max) = (sum(|info| info.bytes_used), sum(|info| info.bytes_max));
        let worst =
            shards.iter().map(|info| &info.state).find(|state| *state != "ok").unwrap_or(&first.state);
        let filled = if tier == Tier::Object {
            let packs = objects.iter().map(|object| object.packs).sum();
            let packs = format!("in {}", counted(packs, "pack"));
            format!("{:7}{:>9} {packs:18}  ", tier.name(), bytes(used))
        } else {
            format!("{:7}{:>9} of {:<9}{:>6}  ", tier.name(), bytes(used), bytes(max), percent(used, max))
        };
        let more = format!("{:>14}", counted(sum(|info| info.blocks), "block"));
        let label = if lines.is_empty() { "tiers" } else { "" };
        let words = vec![(Ink::Plain, filled), (ink_of(worst), format!("{worst:9}")), (Ink::Plain, more)];
        lines.push(Line { label, words });
    }
    lines
}

/// Numbers, not shares of each other: workers look into the shared table by themselves, and what they miss there
/// the daemon never hears of.
fn lookups(status: &v1::StatusResponse) -> [Line; 2] {
    let by = |counts: &HashMap<String, u64>, most: usize| {
        let mut pairs: Vec<_> = counts.iter().filter(|(_, number)| **number > 0).collect();
        pairs.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
        let shown: Vec<_> =
            pairs.into_iter().take(most).map(|(name, number)| format!("{name} {}", count(*number))).collect();
        if shown.is_empty() { "none".into() } else { shown.join("  ") }
    };
    let misses = format!("of what kvd was asked: {}", by(&status.misses, 3));
    [Line::new("hits", by(&status.hits, 4)), Line::new("misses", misses)]
}

/// One line for the stores of all principals: what was asked of them, what came from them. The place last, since it may be
/// long.
fn object(tiers: &[v1::ObjectTierInfo]) -> Option<Line> {
    let first = tiers.first()?;
    let requests = tiers.iter().flat_map(|tier| &tier.requests).map(|asked| asked.requests).sum();
    let served = tiers.iter().map(|tier| tier.served_blocks).sum();
    let more = if tiers.len() > 1 { format!(" (+{})", tiers.len() - 1) } else { String::new() };
    let text = format!(
        "{}, {} served; {}{more}",
        counted(requests, "request"),
        counted(served, "block"),
        first.store
    );
    Some(Line::new("object", text))
}

/// One line for all of them. Why one is lost stands in the warnings.
fn gpus(gpus: &[v1::GpuInfo]) -> Option<Line> {
    let sum = |of: fn(&v1::GpuInfo) -> u64| gpus.iter().map(of).sum::<u64>();
    let lost = sum(|gpu| u64::from(gpu.state == "lost"));
    let ink = if lost == 0 { Ink::Plain } else { Ink::Bad };
    let mut text = format!(
        "  in {}, out {}; copies: {} under way, {} waiting",
        bytes(sum(|gpu| gpu.bytes_in)),
        bytes(sum(|gpu| gpu.bytes_out)),
        count(sum(|gpu| gpu.copies_under_way)),
        count(sum(|gpu| gpu.copies_waiting)),
    );
    if sum(|gpu| gpu.pool_bytes_max) > 0 {
        text += &format!("; pool {}", bytes(sum(|gpu| gpu.pool_bytes_used)));
    }
    let words =
        vec![(Ink::Plain, format!("{}, ", gpus.len())), (ink, format!("{lost} lost")), (Ink::Plain, text)];
    (!gpus.is_empty()).then_some(Line { label: "gpus", words })
}

/// One line for all of them. Why one is down stands in the warnings.
fn peers(status: &v1::StatusResponse) -> Option<Line> {
    let (all, down) = (status.peers, status.peers_down);
    // Of those that are not down, some may never have been asked for anything: nobody knows whether they are up.
    let known = (Ink::Plain, format!("{all}, "));
    let ink = if down == 0 { Ink::Plain } else { Ink::Warn };
    let came = format!("  in {} ({})", bytes(status.fetched_bytes), counted(status.fetched_blocks, "block"));
    let words = vec![known, (ink, format!("{down} down")), (Ink::Plain, came)];
    (all > 0).then_some(Line { label: "peers", words })
}

fn checks(status: &v1::StatusResponse) -> Line {
    let (failed, aside) = (status.checksum_failures, status.quarantined);
    let ink = if failed + aside == 0 { Ink::Good } else { Ink::Warn };
    let text =
        format!("{}, {} quarantined; none was served", counted(failed, "checksum failure"), count(aside));
    Line { label: "checks", words: vec![(ink, text)] }
}

fn recovery(recovery: &v1::Recovery) -> Line {
    let time = Duration::from_micros(recovery.seconds_micro);
    let mut text = format!(
        "brought back {} host and {} disk blocks in {}",
        count(recovery.host_blocks),
        count(recovery.disk_blocks),
        milliseconds(time.as_millis() as u64)
    );
    match recovery.notes.as_slice() {
        [] => {}
        [one] => text += &format!("; {one}"),
        [first, more @ ..] => text += &format!("; {first} (+{})", more.len()),
    }
    Line::new("start", text)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn tier(tier: v1::Tier, shard: u32, state: &str, used: u64, max: u64) -> v1::TierInfo {
        v1::TierInfo {
            tier: tier.into(),
            shard,
            state: state.into(),
            bytes_used: used,
            bytes_max: max,
            blocks: 6_017,
            evicted_blocks: 12,
            ..Default::default()
        }
    }

    fn status() -> v1::StatusResponse {
        v1::StatusResponse {
            node: "gpu-a".into(),
            version: "0.1.0".into(),
            epoch: 7,
            uptime_s: 273_600,
            health: "warn".into(),
            warnings: vec![v1::Warning {
                code: "KVD-3001".into(),
                text: "disk of shard 1: circuit open for 41s; reads are recomputed".into(),
            }],
            tiers: vec![
                tier(v1::Tier::Host, 0, "ok", 1_900 << 20, 2 << 30),
                tier(v1::Tier::Host, 1, "ok", 1_900 << 20, 2 << 30),
                tier(v1::Tier::Disk, 0, "ok", 1 << 40, 4 << 40),
                tier(v1::Tier::Disk, 1, "degraded", 1 << 40, 4 << 40),
                tier(v1::Tier::Object, 0, "ok", 40 << 30, 0),
            ],
            object_tiers: vec![v1::ObjectTierInfo {
                store: "s3://kv-blocks/gpu-a?region=eu-central-1".into(),
                packs: 1_280,
                requests: vec![
                    v1::StoreRequests { kind: "put".into(), requests: 1_300, ..Default::default() },
                    v1::StoreRequests { kind: "get".into(), requests: 2_900, ..Default::default() },
                ],
                served_blocks: 9_031,
                ..Default::default()
            }],
            shards: 2,
            clients: 4,
            leases: 1,
            reading: 12,
            blocks: 24_068,
            pending: 3,
            operations_in_flight: 3,
            pinned_bytes: 64 << 20,
            hits: [("host".to_owned(), 610), ("disk".to_owned(), 221)].into(),
            misses: [("never_stored".to_owned(), 121), ("evicted_capacity".to_owned(), 48)].into(),
            put_blocks: 30_000,
            put_bytes: 15 << 30,
            disk_bytes_written: 3 << 30,
            disk_bytes_hit: 12 << 30,
            rss_bytes: 90 << 20,
            peers: 3,
            peers_down: 1,
            fetched_blocks: 5_321,
            fetched_bytes: 1_288_490_188,
            recovery: Some(v1::Recovery {
                host_blocks: 12_034,
                disk_blocks: 400_000,
                seconds_micro: 1_400_000,
                notes: vec!["shard-1.meta was set aside".into(), "x".into()],
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_page_reads_so() {
        let wanted = "\
node     gpu-a  WARN  kvd 0.1.0, up 3d4h, epoch 7, 2 shards, rss 90.0MiB
         KVD-3001 disk of shard 1: circuit open for 41s; reads are recomputed
tiers    host      3.7GiB of 4.0GiB    92.8%  ok        12,034 blocks
         disk      2.0TiB of 8.0TiB    25.0%  degraded  12,034 blocks
         object   40.0GiB in 1,280 packs      ok         6,017 blocks
blocks   24,068 here, 3 arriving; pinned 64.0MiB
workers  4 clients with 1 lease and 12 blocks open; 3 operations in flight
hits     host 610  disk 221
misses   of what kvd was asked: never_stored 121  evicted_capacity 48
puts     30,000 blocks, 15.0GiB
disk     3.0GiB written, 12.0GiB read in hits: 0.25 written per hit
object   4,200 requests, 9,031 blocks served; s3://kv-blocks/gpu-a?region=eu-ce…
peers    3, 1 down  in 1.2GiB (5,321 blocks)
checks   0 checksum failures, 0 quarantined; none was served
start    brought back 12,034 host and 400,000 disk blocks in 1.4s; shard-1.meta…
";
        let page = page(&status(), LINES_MAX, COLUMNS_MAX, Paint::plain());
        assert_eq!(page, wanted, "\n{page}");
    }

    #[test]
    fn however_much_goes_wrong_it_stays_15_lines_of_80_columns() {
        let mut status = status();
        status.node = "n".repeat(200);
        status.draining = true;
        let warning = |n| v1::Warning { code: format!("KVD-30{n:02}"), text: "words ".repeat(40) };
        status.warnings = (0..40).map(warning).collect();
        for shard in 0..8 {
            for kind in [v1::Tier::Device, v1::Tier::Host, v1::Tier::Disk, v1::Tier::Object] {
                status.tiers.push(tier(kind, shard, "degraded", u64::MAX >> 9, u64::MAX >> 8));
            }
        }
        status.misses =
            kv_block::MissReason::ALL.map(|reason| (reason.name().to_owned(), u64::MAX >> 5)).into();
        let gpu = v1::GpuInfo { state: "lost".into(), bytes_in: u64::MAX >> 9, ..Default::default() };
        status.gpus = vec![gpu; 16];
        let page = page(&status, LINES_MAX, COLUMNS_MAX, Paint::plain());
        assert!(page.lines().count() <= LINES_MAX, "{page}");
        assert!(page.lines().all(|line| line.chars().count() <= COLUMNS_MAX), "{page}");
        assert!(page.contains("more; see `kvctl status -o wide`"), "{page}");
    }

    #[test]
    fn an_idle_daemon_divides_by_nothing() {
        let page = page(&v1::StatusResponse::default(), LINES_MAX, COLUMNS_MAX, Paint::plain());
        assert!(page.contains("hits     none\nmisses   of what kvd was asked: none\n"), "{page}");
        assert!(!page.contains("peers"), "nor does it speak of peers that it has not: {page}");
        assert!(!page.contains("object"), "nor of a store: {page}");
        assert!(!page.contains("gpus"), "nor of GPUs: {page}");
    }

    #[test]
    fn gpus_have_one_line_before_the_object_store_has_one() {
        let ok = v1::GpuInfo {
            state: "ok".into(),
            bytes_in: 8 << 40,
            bytes_out: 2 << 40,
            copies_under_way: 7,
            copies_waiting: 1,
            ..Default::default()
        };
        let lost = v1::GpuInfo { state: "lost".into(), bytes_out: 1 << 40, ..Default::default() };
        let mut status = status();
        status.gpus = vec![ok.clone(), ok, lost];
        let line = "\ngpus     3, 1 lost  in 16.0TiB, out 5.0TiB; copies: 14 under way, 2 waiting\n";
        let tight = page(&status, LINES_MAX, COLUMNS_MAX, Paint::plain());
        assert!(tight.contains(line) && !tight.contains("object   4,200"), "{tight}");
        assert_eq!(tight.lines().count(), LINES_MAX, "{tight}");
        status.gpus[0].pool_bytes_max = 1 << 40;
        status.gpus[0].pool_bytes_used = 1 << 30;
        let wide = page(&status, usize::MAX, usize::MAX, Paint::plain());
        assert!(wide.contains("2 waiting; pool 1.0GiB\n"), "{wide}");
        assert!(wide.find("object   4,200") < wide.find("gpus     3"), "{wide}");
    }
}
