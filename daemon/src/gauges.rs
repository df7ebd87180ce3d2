//! Carries the numbers of the shards to the metrics, once a second.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_node::ShardReport;
use kv_object::circuit::Standing;
use kv_transport::health::Circuit;
use metrics_exporter_prometheus::PrometheusHandle;

use crate::beats::Beats;
use crate::gpu::Gpus;
use crate::gpu::view::GpuState;
use crate::metrics as m;
use crate::node::Node;
use crate::object::{ObjectView, Objects};
use crate::peers::{PeerView, Peers};
use crate::sessions::Door;
use crate::shard::ShardHandle;

const PERIOD: Duration = Duration::from_secs(1);
/// Every so many periods GPUs give up what the catalog does not know any more.
const SWEEP: u32 = 5;

/// Keeps the metrics up to date for as long as the runtime lives.
pub async fn follow(
    node: Arc<Node>,
    (peers, objects): (Option<Peers>, Option<Objects>),
    gpus: Gpus,
    recorder: PrometheusHandle,
) {
    let mut beat = tokio::time::interval(PERIOD);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut beats = Beats::default();
    let mut seen = Seen::default();
    let mut turn: u32 = 0;
    loop {
        beat.tick().await;
        recorder.run_upkeep();
        // Before anything is asked of the loops: one that is stuck answers nothing.
        let ages = beats.ages(Instant::now(), node.shards.iter().map(ShardHandle::heartbeat));
        for (shard, age) in node.shards.iter().zip(ages) {
            m::LOOP_AGE.gauge(&[&shard.id.to_string()]).set(age.as_secs_f64());
        }
        if let Ok(reports) = node.reports(Instant::now() + PERIOD).await {
            publish(&node, &reports);
        }
        if let Some(peers) = &peers
            && let Ok(views) = peers.views().await
        {
            of_peers(&views);
        }
        for principal in objects.iter().flat_map(Objects::all) {
            of_objects(&principal.view(), &mut seen);
        }
        of_gpus(&gpus);
        turn += 1;
        if turn.is_multiple_of(SWEEP) && gpus.has_pool() {
            let (gpus, node) = (gpus.clone(), Arc::clone(&node));
            tokio::task::spawn_blocking(move || gpus.sweep(&node));
        }
    }
}

fn publish(node: &Node, reports: &[ShardReport]) {
    m::READY.gauge(&[]).set(f64::from(u8::from(!node.is_draining())));
    for door in [Door::Shm, Door::Grpc] {
        let count = node.clients().iter().filter(|info| info.door == door).count();
        m::SESSIONS.gauge(&[door.name()]).set(count as f64);
    }
    for (index, report) in reports.iter().enumerate() {
        let shard = &index.to_string()[..];
        let set = |metric: &m::Metric, labels: &[&str], value: u64| metric.gauge(labels).set(value as f64);
        set(&m::EPOCH, &[shard], node.epoch.0);
        set(&m::TIER_CAPACITY, &[shard, "host"], report.host_bytes_max);
        set(&m::TIER_CONFIGURED, &[shard, "host"], report.host_bytes_wanted);
        set(&m::TIER_USED, &[shard, "host"], report.host_bytes);
        set(&m::TIER_BLOCKS, &[shard, "host"], report.host_blocks);
        set(&m::TIER_SERVING, &[shard, "host"], 1);
        set(&m::PINNED_BYTES, &[shard, "host"], report.pinned_bytes);
        set(&m::LEASED_BYTES, &[shard, "host"], report.leased_bytes);
        if let Some(serving) = report.disk_serving {
            set(&m::TIER_CAPACITY, &[shard, "disk"], node.shards[index].disk_room());
            set(&m::TIER_CONFIGURED, &[shard, "disk"], node.tier_notes[index].disk_bytes_max);
            set(&m::TIER_USED, &[shard, "disk"], report.disk_bytes);
            set(&m::TIER_BLOCKS, &[shard, "disk"], report.disk_blocks);
            set(&m::TIER_SERVING, &[shard, "disk"], u64::from(serving));
        }
        set(&m::PENDING_BLOCKS, &[shard], report.pending);
        set(&m::CATALOG_ENTRIES, &[shard], report.catalog_entries);
        set(&m::QUARANTINED_BLOCKS, &[shard], report.quarantined);
        set(&m::LEASES, &[shard], report.leases);
        set(&m::READING_BLOCKS, &[shard], report.reading);
        set(&m::TRANSFERS_IN_FLIGHT, &[shard], report.in_flight);
        set(&m::EVENTS_NUMBER, &[shard], report.event_number);
    }
    counters(reports);
    tenants(reports);
}

/// Sets counters to the sums over all shards; each only ever grows.
fn counters(reports: &[ShardReport]) {
    let sum =
        |of: fn(&kv_node::Counters) -> u64| reports.iter().map(|report| of(&report.counters)).sum::<u64>();
    m::PUT_BLOCKS.counter(&["stored"]).absolute(sum(|counters| counters.put_blocks));
    m::PUT_BLOCKS.counter(&["already"]).absolute(sum(|counters| counters.put_already));
    m::PUT_BYTES.counter(&[]).absolute(sum(|counters| counters.put_bytes));
    m::TRANSFER_BLOCKS.counter(&["host", "disk"]).absolute(sum(|counters| counters.offload_blocks));
    m::TRANSFER_BYTES.counter(&["host", "disk"]).absolute(sum(|counters| counters.offload_bytes));
    m::TRANSFER_BLOCKS.counter(&["disk", "host"]).absolute(sum(|counters| counters.onboard_blocks));
    m::TRANSFER_BYTES.counter(&["disk", "host"]).absolute(sum(|counters| counters.onboard_bytes));
    m::DISK_WRITTEN.counter(&["offload"]).absolute(sum(|counters| counters.offload_bytes));
    m::DISK_WRITTEN.counter(&["reclaim"]).absolute(sum(|counters| counters.moved_bytes));
    let mut by_label: std::collections::BTreeMap<(&str, String), u64> = std::collections::BTreeMap::new();
    for counters in reports.iter().map(|report| &report.counters) {
        let maps = [
            (m::LOOKUP_BLOCKS.name, &counters.hits),
            (m::LOOKUP_MISS.name, &counters.misses),
            (m::EVICTIONS.name, &counters.evictions),
            (m::CHECKSUM_FAILURES.name, &counters.checksum_failures),
            (m::LEASE_RECLAIMS.name, &counters.lease_reclaims),
        ];
        for (name, map) in maps {
            for (label, count) in map {
                *by_label.entry((name, (*label).to_owned())).or_default() += count;
            }
        }
        for (code, count) in &counters.rejects {
            *by_label.entry((m::REJECTS.name, code.clone())).or_default() += count;
        }
    }
    for ((name, label), count) in by_label {
        if let Some(metric) = m::ALL.iter().find(|metric| metric.name == name) {
            metric.counter(&[&label]).absolute(count);
        }
    }
}

/// What each peer gives and gets.
fn of_peers(views: &[PeerView]) {
    for PeerView { member, reader, served, .. } in views {
        let peer = &member.name[..];
        let down = matches!(reader.circuit, Circuit::Open { .. });
        m::PEER_UP.gauge(&[peer]).set(f64::from(u8::from(!down)));
        m::PEER_STRIKES.counter(&[peer]).absolute(reader.strikes);
        if let Some(rtt) = reader.rtt {
            m::PEER_RTT.gauge(&[peer]).set(rtt.as_secs_f64());
        }
        m::FETCH_BLOCKS.counter(&[peer]).absolute(reader.landed);
        m::FETCH_BYTES.counter(&[peer]).absolute(reader.paths.values().map(|path| path.bytes).sum());
        m::SERVE_BLOCKS.counter(&[peer]).absolute(served.blocks());
        m::SERVE_BYTES.counter(&[peer]).absolute(served.bytes());
        m::SERVE_HELD.gauge(&[peer]).set(served.held_bytes() as f64);
    }
}

/// Counts that begin again at 0 when a store is opened again, as they were the last time. What is published only grows.
#[derive(Default)]
struct Seen(HashMap<(&'static str, String, String, String), u64>);

impl Seen {
    /// `labels` are the values of the metric's labels; three at most.
    fn count(&mut self, metric: &m::Metric, labels: &[&str], now: u64) {
        let label = |at: usize| labels.get(at).copied().unwrap_or_default().to_owned();
        let before = self.0.insert((metric.name, label(0), label(1), label(2)), now).unwrap_or(0);
        let more = if now < before { now } else { now - before };
        metric.counter(labels).increment(more);
    }
}

/// How the object tier of a principal does.
fn of_objects(view: &ObjectView, seen: &mut Seen) {
    let principal = &view.principal[..];
    let set = |metric: &m::Metric, labels: &[&str], value: u64| metric.gauge(labels).set(value as f64);
    let closed = |report: &kv_object::tier::TierReport| report.requests.circuit == Standing::Closed;
    set(&m::OBJECT_SERVING, &[principal], view.report.as_ref().is_some_and(closed).into());
    let (blocks, bytes, tokens) = view.served;
    m::OBJECT_SERVED_BLOCKS.counter(&[principal]).absolute(blocks);
    m::OBJECT_SERVED_BYTES.counter(&[principal]).absolute(bytes);
    m::OBJECT_SERVED_TOKENS.counter(&[principal]).absolute(tokens);
    let Some(report) = &view.report else { return };
    set(&m::OBJECT_PACKS, &[principal, "ok"], report.packs as u64);
    set(&m::OBJECT_PACKS, &[principal, "set_aside"], report.set_aside.len() as u64);
    set(&m::OBJECT_PACKS, &[principal, "unread"], report.packs_unread as u64);
    set(&m::OBJECT_PACK_BYTES, &[principal], report.pack_bytes);
    set(&m::OBJECT_BLOCKS, &[principal], report.blocks as u64);
    set(&m::OBJECT_WAITING, &[principal], report.waiting_bytes + report.writing_bytes);
    for (kind, count) in &report.requests.counts {
        let kind = kind.name();
        seen.count(&m::OBJECT_REQUESTS, &[principal, kind, "ok"], count.well);
        for (error, count) in &count.errors {
            seen.count(&m::OBJECT_REQUESTS, &[principal, kind, error], *count);
        }
        seen.count(&m::OBJECT_RETRIES, &[principal, kind], count.retries);
        seen.count(&m::OBJECT_BYTES, &[principal, kind], count.bytes);
    }
    let totals = &report.totals;
    for (metric, count) in [
        (&m::OBJECT_CIRCUIT_OPENED, report.requests.circuit_opened),
        (&m::OBJECT_CHECKSUM_FAILURES, totals.checksum_failures),
        (&m::OBJECT_PACKS_WRITTEN, totals.packs_written),
        (&m::OBJECT_BLOCKS_WRITTEN, totals.blocks_written),
        (&m::OBJECT_BLOCKS_LOST, totals.blocks_lost),
        (&m::OBJECT_PACKS_GONE, totals.packs_gone),
    ] {
        seen.count(metric, &[principal], count);
    }
}

/// What each GPU does.
fn of_gpus(gpus: &Gpus) {
    let set = |metric: &m::Metric, labels: &[&str], value: u64| metric.gauge(labels).set(value as f64);
    for gpu in gpus.view().gpus {
        let uuid = &gpu.uuid[..];
        set(&m::GPU_SERVING, &[uuid], u64::from(gpu.state == GpuState::Ok));
        set(&m::GPU_CACHES, &[uuid], gpu.caches.into());
        set(&m::GPU_CACHE_BYTES, &[uuid], gpu.cache_bytes);
        set(&m::GPU_COPIES_UNDER_WAY, &[uuid], gpu.copies_under_way);
        set(&m::GPU_COPIES_WAITING, &[uuid], gpu.copies_waiting);
        set(&m::GPU_KEPT, &[uuid], gpu.kept);
        m::GPU_BYTES.counter(&[uuid, "in"]).absolute(gpu.bytes_in);
        m::GPU_BYTES.counter(&[uuid, "out"]).absolute(gpu.bytes_out);
        m::GPU_BYTES.counter(&[uuid, "across"]).absolute(gpu.bytes_across);
        m::GPU_COPIES.counter(&[uuid, "ok"]).absolute(gpu.copies_done);
        m::GPU_COPIES.counter(&[uuid, "failed"]).absolute(gpu.copies_failed);
    }
    m::CHECKSUM_FAILURES.counter(&["device"]).absolute(gpus.damaged());
}

/// The tenants with the most bytes by name, the others together.
fn tenants(reports: &[ShardReport]) {
    let mut all: std::collections::BTreeMap<&str, (u64, u64, u64)> = std::collections::BTreeMap::new();
    for tenant in reports.iter().flat_map(|report| &report.tenants) {
        let row = all.entry(&tenant.tenant).or_default();
        *row = (row.0 + tenant.host_bytes, row.1 + tenant.hits, row.2 + tenant.misses);
    }
    let named = all.len().min(m::TENANTS_MAX);
    let mut other = (0, 0, 0);
    for (index, (tenant, row)) in all.iter().enumerate() {
        if index < named {
            m::TENANT_HOST_BYTES.gauge(&[tenant]).set(row.0 as f64);
            m::TENANT_HITS.counter(&[tenant]).absolute(row.1);
            m::TENANT_MISSES.counter(&[tenant]).absolute(row.2);
        } else {
            other = (other.0 + row.0, other.1 + row.1, other.2 + row.2);
        }
    }
    if all.len() > named {
        m::TENANT_HOST_BYTES.gauge(&["other"]).set(other.0 as f64);
        m::TENANT_HITS.counter(&["other"]).absolute(other.1);
        m::TENANT_MISSES.counter(&["other"]).absolute(other.2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_that_begins_again_goes_on_from_where_it_was() {
        let handle = m::install("node-7");
        let mut seen = Seen::default();
        for (now, wanted) in [(5, 5), (7, 7), (7, 7), (2, 9), (3, 10)] {
            seen.count(&m::OBJECT_RETRIES, &["again", "put"], now);
            let line = format!("kvd_object_retries_total{{principal=\"again\",kind=\"put\"}} {wanted}");
            let text = handle.render();
            assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
        }
    }
}
