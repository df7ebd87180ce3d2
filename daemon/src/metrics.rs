//! Every metric of the daemon by name, unit and labels, and the recorder that renders them for Prometheus.
//!
//! Names begin with `kvd_`, values are in base units (seconds, bytes, ratios), counters end in `_total`. A
//! metric that is [`Stability::Stable`] keeps its name and labels for two minor versions after a newer one
//! takes its place. Labels have few values, so that a daemon stays below 2,000 series: no keys, no sessions;
//! tenants past the first [`TENANTS_MAX`] are counted together as `other`.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use metrics::{Counter, Gauge, Histogram, Label, Unit};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

/// Tenants with series of their own.
pub const TENANTS_MAX: usize = 50;

/// What a number does over time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Only goes up.
    Counter,
    /// Goes up and down.
    Gauge,
    /// How often which value.
    Histogram,
}

/// What people may rely on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stability {
    /// Name and labels stay.
    Stable,
    /// May change with any version.
    Experimental,
}

/// One metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What it does over time.
    pub kind: Kind,
    /// What it counts in.
    pub unit: Unit,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
    /// What people may rely on.
    pub stability: Stability,
}

macro_rules! metrics {
    ($($(#[$stability:ident])? $constant:ident = $name:literal, $kind:ident, $unit:ident, [$($label:literal),*], $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $constant: Metric = Metric {
                name: $name,
                kind: Kind::$kind,
                unit: Unit::$unit,
                labels: &[$($label),*],
                help: $help,
                stability: metrics!(@ $($stability)?),
            };
        )*
        /// Every metric.
        pub const ALL: &[Metric] = &[$($constant),*];
    };
    (@) => { Stability::Stable };
    (@ experimental) => { Stability::Experimental };
}

metrics! {
    BUILD_INFO = "kvd_build_info", Gauge, Count, ["version", "node"],
        "Always 1; says which version runs on which node";
    START_TIME = "kvd_start_time_seconds", Gauge, Seconds, [],
        "When the daemon started, in seconds since 1970";
    EPOCH = "kvd_epoch", Gauge, Count, ["shard"],
        "Number of this life of the shard's memory";
    READY = "kvd_ready", Gauge, Count, [],
        "1 while the daemon takes new work";
    LOOP_AGE = "kvd_loop_age_seconds", Gauge, Seconds, ["shard"],
        "Time since a shard's loop was last seen to come around; it does so twice a second when idle";

    LOOKUP_BLOCKS = "kvd_lookup_blocks_total", Counter, Count, ["tier"],
        "Blocks found, by the tier that had them; of what workers find by themselves, what they read";
    LOOKUP_MISS = "kvd_lookup_miss_total", Counter, Count, ["reason"],
        "Blocks that the daemon was asked for and did not find, by reason; not what workers miss by themselves";
    PUT_BLOCKS = "kvd_put_blocks_total", Counter, Count, ["result"],
        "Blocks offered: stored, or there already";
    PUT_BYTES = "kvd_put_bytes_total", Counter, Bytes, [],
        "Bytes stored";
    TRANSFER_BLOCKS = "kvd_transfer_blocks_total", Counter, Count, ["src", "dst"],
        "Blocks moved between tiers";
    TRANSFER_BYTES = "kvd_transfer_bytes_total", Counter, Bytes, ["src", "dst"],
        "Bytes moved between tiers";
    TRANSFERS_IN_FLIGHT = "kvd_transfers_inflight", Gauge, Count, ["shard"],
        "Copies and disk operations under way";

    PEER_UP = "kvd_peer_up", Gauge, Count, ["peer"],
        "1 unless the circuit of a peer is open";
    PEER_STRIKES = "kvd_peer_strikes_total", Counter, Count, ["peer"],
        "Wrong bytes, nonsense, silence and failed connections of a peer";
    PEER_RTT = "kvd_peer_rtt_seconds", Gauge, Seconds, ["peer"],
        "From a question to a peer to its answer, the newest one";
    FETCH_BLOCKS = "kvd_fetch_blocks_total", Counter, Count, ["peer"],
        "Blocks that came from a peer";
    FETCH_BYTES = "kvd_fetch_bytes_total", Counter, Bytes, ["peer"],
        "Bytes that came from a peer";
    SERVE_BLOCKS = "kvd_serve_blocks_total", Counter, Count, ["peer"],
        "Blocks that a peer was let read";
    SERVE_BYTES = "kvd_serve_bytes_total", Counter, Bytes, ["peer"],
        "Bytes that a peer was let read";
    SERVE_HELD = "kvd_serve_held_bytes", Gauge, Bytes, ["peer"],
        "Bytes of blocks held for a peer";

    GPU_SERVING = "kvd_gpu_serving", Gauge, Count, ["gpu"],
        "Whether the GPU can be used: 0 when it is lost to the daemon";
    GPU_CACHES = "kvd_gpu_caches", Gauge, Count, ["gpu"],
        "KV caches that workers have registered";
    GPU_CACHE_BYTES = "kvd_gpu_cache_bytes", Gauge, Bytes, ["gpu"],
        "Device memory of those";
    GPU_COPIES_UNDER_WAY = "kvd_gpu_copies_under_way", Gauge, Count, ["gpu"],
        "Copies that the device has in its queues";
    GPU_COPIES_WAITING = "kvd_gpu_copies_waiting", Gauge, Count, ["gpu"],
        "Copies that wait for their turn, or for layers to be ready";
    GPU_KEPT = "kvd_gpu_kept_operations", Gauge, Count, ["gpu"],
        "Copies whose memory is fenced because the device never said that it was done";
    GPU_BYTES = "kvd_gpu_copied_bytes_total", Counter, Bytes, ["gpu", "direction"],
        "Bytes copied to the device (in), from it (out) and between devices' memories (across)";
    GPU_COPIES = "kvd_gpu_copies_total", Counter, Count, ["gpu", "result"],
        "Copies that ended";
    OBJECT_SERVING = "kvd_object_serving", Gauge, Count, ["principal"],
        "1 while the object store is open and its circuit closed; else its blocks miss";
    OBJECT_PACKS = "kvd_object_packs", Gauge, Count, ["principal", "state"],
        "Packs in the object store by what they are to this node: ok, set aside or unread";
    OBJECT_PACK_BYTES = "kvd_object_pack_bytes", Gauge, Bytes, ["principal"],
        "Length of the packs that can be read, whoever wrote them";
    OBJECT_BLOCKS = "kvd_object_blocks", Gauge, Count, ["principal"],
        "Blocks in those packs";
    OBJECT_WAITING = "kvd_object_waiting_bytes", Gauge, Bytes, ["principal"],
        "Bytes of blocks that wait to be packed or are being written";
    OBJECT_REQUESTS = "kvd_object_requests_total", Counter, Count, ["principal", "kind", "result"],
        "Requests to the object store, retries included, by what they do and how they ended";
    OBJECT_RETRIES = "kvd_object_retries_total", Counter, Count, ["principal", "kind"],
        "Requests to the object store that repeated one that had failed";
    OBJECT_BYTES = "kvd_object_bytes_total", Counter, Bytes, ["principal", "kind"],
        "Bytes of bodies that went to the object store or came from it";
    OBJECT_CIRCUIT_OPENED = "kvd_object_circuit_opened_total", Counter, Count, ["principal"],
        "Times that the object store was given up for a while";
    OBJECT_CHECKSUM_FAILURES = "kvd_object_checksum_failures_total", Counter, Count, ["principal"],
        "Blocks from the object store that were not what had been sealed; none of them was served";
    OBJECT_PACKS_WRITTEN = "kvd_object_packs_written_total", Counter, Count, ["principal"],
        "Packs that this node wrote";
    OBJECT_BLOCKS_WRITTEN = "kvd_object_blocks_written_total", Counter, Count, ["principal"],
        "Blocks in the packs that this node wrote";
    OBJECT_BLOCKS_LOST = "kvd_object_blocks_lost_total", Counter, Count, ["principal"],
        "Blocks of packs that the object store did not take; they may be offered again";
    OBJECT_PACKS_GONE = "kvd_object_packs_gone_total", Counter, Count, ["principal"],
        "Packs that were gone when a block of them was to be read";
    OBJECT_SERVED_BLOCKS = "kvd_object_served_blocks_total", Counter, Count, ["principal"],
        "Blocks that came from the object store for callers";
    OBJECT_SERVED_BYTES = "kvd_object_served_bytes_total", Counter, Bytes, ["principal"],
        "Bytes of those";
    OBJECT_SERVED_TOKENS = "kvd_object_served_tokens_total", Counter, Count, ["principal"],
        "Tokens of those, which nobody had to compute";

    TIER_CAPACITY = "kvd_tier_capacity_bytes", Gauge, Bytes, ["shard", "tier"],
        "Room of a tier; of host memory, what is allocated";
    TIER_CONFIGURED = "kvd_tier_configured_bytes", Gauge, Bytes, ["shard", "tier"],
        "Room of a tier when it is whole: more than its capacity while host memory grows, or when it found too little";
    TIER_USED = "kvd_tier_used_bytes", Gauge, Bytes, ["shard", "tier"],
        "Bytes of blocks in a tier";
    TIER_BLOCKS = "kvd_tier_blocks", Gauge, Count, ["shard", "tier"],
        "Blocks in a tier";
    TIER_SERVING = "kvd_tier_serving", Gauge, Count, ["shard", "tier"],
        "1 while a tier serves; 0 while its circuit is open";
    PINNED_BYTES = "kvd_tier_pinned_bytes", Gauge, Bytes, ["shard", "tier"],
        "Bytes under pin";
    LEASED_BYTES = "kvd_tier_leased_bytes", Gauge, Bytes, ["shard", "tier"],
        "Bytes under lease";
    PENDING_BLOCKS = "kvd_pending_blocks", Gauge, Count, ["shard"],
        "Blocks announced and not yet stored";
    CATALOG_ENTRIES = "kvd_catalog_entries", Gauge, Count, ["shard"],
        "Entries of the catalog, blocks that are gone but remembered included";
    EVICTIONS = "kvd_evictions_total", Counter, Count, ["cause"],
        "Blocks that left a tier, by cause";

    CHECKSUM_FAILURES = "kvd_checksum_failures_total", Counter, Count, ["tier"],
        "Blocks that were not what had been sealed; none of them was served";
    QUARANTINED_BLOCKS = "kvd_quarantined_blocks", Gauge, Count, ["shard"],
        "Blocks kept out of service because they failed their checksum";
    LEASES = "kvd_leases", Gauge, Count, ["shard"],
        "Leases held";
    READING_BLOCKS = "kvd_reading_blocks", Gauge, Count, ["shard"],
        "Blocks that workers have open in shared memory, without a lease";
    LEASE_RECLAIMS = "kvd_lease_reclaims_total", Counter, Count, ["cause"],
        "Leases taken back, by cause";
    SESSIONS = "kvd_sessions", Gauge, Count, ["door"],
        "Worker sessions, by the door they came in";
    REJECTS = "kvd_rejects_total", Counter, Count, ["code"],
        "Requests refused, by stable code";

    DISK_WRITTEN = "kvd_ssd_written_bytes_total", Counter, Bytes, ["cause"],
        "Bytes of blocks written to disk: offloaded, or moved to free a segment";
    REQUESTS = "kvd_requests_total", Counter, Count, ["method", "result"],
        "gRPC requests, by method and result";
    REQUEST_SECONDS = "kvd_request_seconds", Histogram, Seconds, ["method"],
        "Time from a gRPC request to its answer";

    #[experimental]
    LMCACHE_INSTANCES = "kvd_lmcache_instances", Gauge, Count, [],
        "Engine workers that are registered by LMCache's protocol";
    #[experimental]
    LMCACHE_CHUNKS = "kvd_lmcache_chunks_total", Counter, Count, ["what"],
        "Chunks by what became of them: promised to a lookup or missed, loaded, stored, or failed to be";
    EVENTS_NUMBER = "kvd_events_number", Gauge, Count, ["shard"],
        "Number of the last event";
    #[experimental]
    TENANT_HOST_BYTES = "kvd_tenant_host_bytes", Gauge, Bytes, ["tenant"],
        "Bytes of a tenant's blocks in host memory";
    #[experimental]
    TENANT_HITS = "kvd_tenant_hits_total", Counter, Count, ["tenant"],
        "Blocks found for a tenant, as in kvd_lookup_blocks_total";
    #[experimental]
    TENANT_MISSES = "kvd_tenant_misses_total", Counter, Count, ["tenant"],
        "Blocks not found for a tenant, as in kvd_lookup_miss_total";
}

/// Upper bounds of the buckets of every histogram of times, in seconds: steps of about 3 from 10 us to 10 s.
const SECONDS: [f64; 13] = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0];

impl Metric {
    fn key(&self, kind: Kind, values: &[&str]) -> metrics::Key {
        assert_eq!(self.kind, kind, "{} is no {kind:?}", self.name);
        assert_eq!(self.labels.len(), values.len(), "{} has the labels {:?}", self.name, self.labels);
        let labels = self.labels.iter().zip(values);
        let labels: Vec<_> = labels.map(|(name, value)| Label::new(*name, (*value).to_owned())).collect();
        metrics::Key::from_parts(self.name, labels)
    }

    /// The counter with these values of its labels, in their order. Keep it where it is used often.
    pub fn counter(&self, values: &[&str]) -> Counter {
        metrics::with_recorder(|recorder| recorder.register_counter(&self.key(Kind::Counter, values), &META))
    }

    /// The gauge with these values of its labels, in their order.
    pub fn gauge(&self, values: &[&str]) -> Gauge {
        metrics::with_recorder(|recorder| recorder.register_gauge(&self.key(Kind::Gauge, values), &META))
    }

    /// The histogram with these values of its labels, in their order.
    pub fn histogram(&self, values: &[&str]) -> Histogram {
        metrics::with_recorder(|recorder| {
            recorder.register_histogram(&self.key(Kind::Histogram, values), &META)
        })
    }
}

const META: metrics::Metadata<'static> =
    metrics::Metadata::new("kvd", metrics::Level::INFO, Some(module_path!()));

fn recorder() -> PrometheusRecorder {
    let builder = ALL.iter().filter(|metric| metric.kind == Kind::Histogram).fold(
        PrometheusBuilder::new(),
        |builder, metric| {
            let name = Matcher::Full(metric.name.to_owned());
            builder.set_buckets_for_metric(name, &SECONDS).expect("there are buckets")
        },
    );
    builder.build_recorder()
}

/// Says of every metric what it is.
pub fn describe_all() {
    for metric in ALL {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.unit, metric.help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.unit, metric.help),
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.unit, metric.help),
        }
    }
}

/// Starts recording for the whole process; a second call gives the same handle. `render()` gives the text,
/// `run_upkeep()` is to be called every few seconds.
pub fn install(node: &str) -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    let handle = HANDLE.get_or_init(|| {
        let recorder = recorder();
        let handle = recorder.handle();
        metrics::set_global_recorder(recorder).expect("nobody else records metrics in this process");
        describe_all();
        BUILD_INFO.gauge(&[env!("CARGO_PKG_VERSION"), node]).set(1.0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        START_TIME.gauge(&[]).set(now.as_secs_f64());
        handle
    });
    handle.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_the_conventions() {
        let mut seen = std::collections::HashSet::new();
        for metric in ALL {
            let Metric { name, kind, unit, labels, help, .. } = metric;
            let letters = |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            assert!(seen.insert(name), "{name} is there twice");
            assert!(name.starts_with("kvd_") && letters(name), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            let base = name.trim_end_matches("_total");
            assert_eq!(base.ends_with("_bytes"), *unit == Unit::Bytes, "{name}");
            assert_eq!(base.ends_with("_seconds"), *unit == Unit::Seconds, "{name}");
            assert!(labels.iter().all(|label| letters(label)), "{name}");
            assert!(
                help.starts_with(char::is_uppercase) || help.starts_with("gRPC") || help.starts_with('1'),
                "{name}"
            );
            assert!(!help.ends_with('.'), "{name}");
        }
    }

    #[test]
    fn what_is_recorded_is_rendered() {
        let handle = install("node-7");
        install("node-7");
        PUT_BYTES.counter(&[]).increment(7);
        TIER_USED.gauge(&["0", "host"]).set(3.0);
        REQUEST_SECONDS.histogram(&["Lookup"]).record(0.002);
        let text = handle.render();
        for line in [
            "# HELP kvd_put_bytes_total Bytes stored",
            "# TYPE kvd_put_bytes_total counter",
            "kvd_put_bytes_total 7",
            "kvd_tier_used_bytes{shard=\"0\",tier=\"host\"} 3",
            "kvd_request_seconds_bucket{method=\"Lookup\",le=\"0.003\"} 1",
            "kvd_request_seconds_bucket{method=\"Lookup\",le=\"0.001\"} 0",
            concat!("kvd_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\",node=\"node-7\"} 1"),
        ] {
            assert!(text.lines().any(|found| found == line), "no line `{line}` in\n{text}");
        }
    }
}
