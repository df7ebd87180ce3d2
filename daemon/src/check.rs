//! What `kvd --check` prints: the plan as tables for people. It opens nothing, and reads certificates alone.

use std::fmt::Write;

use crate::config::units::{GpuUse, Size};
use crate::config::{ConfigError, Loaded};
use crate::plan::{Plan, Resources, plan};
use crate::tls;
use crate::topology::{DeviceKind, Topology, print_cpus};

/// The plan for this machine and process.
pub fn plan_here(loaded: &Loaded) -> Result<(Topology, Resources, Plan), ConfigError> {
    let resources = Resources::of_this_machine(&loaded.config);
    let topology = Topology::of_this_machine(resources.ram_bytes);
    let plan = plan(&topology, loaded, &resources)?;
    Ok((topology, resources, plan))
}

/// Reads and tries the certificates of the TCP listener, where there is one. What they name is a part of the
/// configuration: a file that is missing or wrong is refused like a wrong value.
pub fn certificates(loaded: &Loaded) -> Result<(), ConfigError> {
    let listen = &loaded.config.listen;
    if listen.tcp.get().is_none() {
        return Ok(());
    }
    tls::load(&listen.tls).map(|_| ()).map_err(|error| {
        let origin = loaded.origin(error.key());
        ConfigError::at(origin, format!("{:#}", anyhow::Error::from(error)))
    })
}

/// All that a person wants to know before the daemon runs.
pub fn report(loaded: &Loaded, topology: &Topology, resources: &Resources, plan: &Plan) -> String {
    let config = &loaded.config;
    let mut out = String::new();
    let mut say = |line: String| out.push_str(&(line + "\n"));

    say(format!("node      {}", config.node_name()));
    say(format!("run dir   {}", config.run_dir().display()));
    let memory = format!("memory    {}", config.memory_dir().display());
    say(format!("{memory}  huge pages {}, policy {}", config.host.huge_pages, config.host.policy));
    let gpu = &config.gpu;
    match (gpu.enabled, gpu.pool_bytes.0) {
        (GpuUse::Off, _) => say("gpu       off".into()),
        (enabled, 0) => say(format!("gpu       {enabled}  copies by {}, no pool", gpu.method)),
        (enabled, _) => say(format!(
            "gpu       {enabled}  copies by {}, pool of {} on each, {} left to others",
            gpu.method, gpu.pool_bytes, gpu.leave_bytes
        )),
    }
    match config.disk_dir() {
        None => say("disk      off".into()),
        Some(dir) => {
            let disk = &config.disk;
            let (engine, admission, sync) = (disk.engine, disk.admission, disk.sync);
            say(format!("disk      {}  engine {engine}, admission {admission}, sync {sync}", dir.display()));
        }
    }
    match config.object_store() {
        None => say("object    off".into()),
        Some(place) => {
            let object = &config.object;
            let (reads, pack, ttl) = (object.reads_min, object.pack_bytes, object.ttl);
            say(format!("object    {place}  {reads} reads, packs of {pack}, ttl {ttl}"));
        }
    }
    let secure = if config.listen.tls.client_ca.get().is_some() { "  mutual TLS" } else { "" };
    say(format!("tcp       {}{secure}", config.listen.tcp));
    say(format!("http      {}", config.listen.http));
    let peers: Vec<String> = config.peers().map(ToString::to_string).collect();
    let secure = if config.has_mutual_tls() { "mutual TLS" } else { "plain" };
    match (peers.is_empty(), config.peers.listen.get()) {
        (true, None) => say("peers     off".into()),
        _ => say(format!(
            "peers     {}  {secure}, rdma {}, members {}",
            config.peers.listen,
            config.peers.rdma,
            if peers.is_empty() { "none".into() } else { peers.join(", ") }
        )),
    }
    let lmcache = &config.lmcache;
    match lmcache.listen.get() {
        None => say("lmcache   off".into()),
        Some(place) => say(format!(
            "lmcache   {place}  chunks of {} tokens, pools {} in /dev/shm/lmcache_l1_pool_{}_*",
            lmcache.chunk_tokens,
            lmcache.pool_bytes,
            config.lmcache_shm_name()
        )),
    }

    say(String::new());
    let nodes = topology.nodes.iter().map(|node| {
        let devices = |kind| {
            let here =
                topology.devices.iter().filter(|device| device.kind == kind && device.node == node.number);
            here.count().to_string()
        };
        vec![
            node.number.to_string(),
            dash(print_cpus(&node.cpus)),
            Size(node.memory_bytes).about(),
            Size(node.huge_free_bytes).about(),
            devices(DeviceKind::Gpu),
            devices(DeviceKind::Nvme),
            devices(DeviceKind::Nic),
            plan.home_shard(node.number).to_string(),
        ]
    });
    let head = ["numa node", "cpus", "memory", "huge free", "gpus", "nvme", "nics", "home shard"];
    say(table(&head, nodes.collect()));

    let several = plan.principals.len() > 1;
    if several {
        let rows = plan.principals.iter().map(|principal| {
            let shards = &plan.shards[principal.shards.clone()];
            let own = config.principals.get(&principal.name);
            let uids = own.map_or("workers.uids, network".into(), |own| {
                own.uids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
            });
            let disks = shards.iter().filter_map(|shard| shard.disk.as_ref());
            vec![
                principal.name.clone(),
                uids,
                own.map_or("rest".into(), |own| own.share.to_string()),
                shards.iter().map(|shard| shard.index.to_string()).collect::<Vec<_>>().join(","),
                Size(shards.iter().map(|shard| shard.arena_bytes).sum()).about(),
                Size(disks.map(|disk| u64::from(disk.segments_max) * disk.segment_bytes).sum()).about(),
            ]
        });
        say(table(&["principal", "users", "share", "shards", "host", "disk"], rows.collect()));
    }

    let shards = plan.shards.iter().map(|shard| {
        let disk = shard.disk.as_ref();
        vec![
            shard.index.to_string(),
            shard.numa_node.map_or("any".into(), |node| node.to_string()),
            dash(print_cpus(&shard.shard_cpus)),
            dash(print_cpus(&shard.disk_cpus)),
            Size(shard.arena_bytes).about(),
            format!("{} x {}", shard.regions, Size(plan.region_bytes)),
            shard.table_entries_max.to_string(),
            Size(shard.pinned_bytes_max).about(),
            disk.map_or("-".into(), |disk| Size(u64::from(disk.segments_max) * disk.segment_bytes).about()),
        ]
    });
    let head = ["shard", "numa node", "cpu", "disk cpu", "arena", "regions", "entries", "pinned", "disk"];
    say(table(&head, shards.collect()));

    let bounds = &plan.bounds;
    let rows = [
        ("disk operations", bounds.disk_queue_depth.to_string()),
        ("blocks going to disk", bounds.offloads_max.to_string()),
        ("blocks coming from disk", bounds.onboards_max.to_string()),
        ("requests waiting for room", bounds.stalled_max.to_string()),
        ("requests waiting for the shard", bounds.requests_max.to_string()),
        ("events kept", bounds.events_max.to_string()),
    ];
    let rows = rows.into_iter().map(|(what, most)| vec![what.to_owned(), most]);
    say(table(&["bound of a shard", "at most"], rows.collect()));

    let mut rows: Vec<_> = plan
        .budget
        .iter()
        .map(|line| vec![line.owner.to_owned(), Size(line.bytes).about(), line.how.clone()])
        .collect();
    let of = format!("of {}", Size(resources.ram_bytes).about());
    rows.push(vec!["sum".into(), Size(plan.memory_bytes()).about(), of]);
    say(table(&["memory", "at most", "how"], rows));

    let rows: Vec<_> = loaded.set().map(|(key, origin)| vec![key.to_owned(), origin.to_string()]).collect();
    if !rows.is_empty() {
        say(table(&["set", "by"], rows));
    }
    for note in plan.notes.iter().chain(&loaded.remarks) {
        say(format!("note: {note}"));
    }
    say("the configuration is good".into());
    out
}

fn dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

/// Columns as wide as their widest cell, two spaces between, none at the end of a line.
fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let head = vec![head.iter().map(ToString::to_string).collect::<Vec<_>>()];
    let lines: Vec<_> = head.into_iter().chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..lines[0].len()).map(width).collect();
    let mut out = String::new();
    for line in &lines {
        let mut text = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            let _ = write!(text, "{cell:width$}  ");
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}
