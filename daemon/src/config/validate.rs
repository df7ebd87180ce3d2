//! What must hold between values, and the ranges that a type cannot say.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;

use super::units::{Member, OrAuto, Share, Size, Span, UidRule};
use super::{Config, PRINCIPAL_DEFAULT};

/// Every key whose value cannot stand, with what is expected of it.
pub(super) fn problems(config: &Config) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut refuse = |key: &str, message: String| found.push((key.to_owned(), message));
    let Config { workers, gpu, host, disk, object, catalog, limits, lmcache, peers, .. } = config;

    let numbers: [(&str, u32, RangeInclusive<u32>); 17] = [
        ("workers.ring_entries", workers.ring_entries, 8..=65536),
        ("workers.hazards_max", workers.hazards_max, 1..=1 << 20),
        ("gpu.streams", gpu.streams, 1..=16),
        ("gpu.copies_max", gpu.copies_max, 1..=4096),
        ("gpu.waiting_max", gpu.waiting_max, 1..=1 << 20),
        ("gpu.caches_max", gpu.caches_max, 1..=4096),
        ("disk.queue_depth", disk.queue_depth, 1..=4096),
        ("limits.sessions_max", limits.sessions_max, 1..=65535),
        ("limits.leases_per_session_max", limits.leases_per_session_max, 1..=1 << 24),
        ("limits.keys_per_request_max", limits.keys_per_request_max, 1..=65536),
        ("lmcache.chunk_tokens", lmcache.chunk_tokens, 1..=65536),
        ("lmcache.instances_max", lmcache.instances_max, 1..=256),
        ("object.reads_min", object.reads_min, 0..=3),
        ("object.requests_max", object.requests_max, 1..=1024),
        ("peers.connections", peers.connections, 1..=64),
        ("peers.probe_peers_max", peers.probe_peers_max, 0..=1024),
        ("peers.wants_max", peers.wants_max, 1..=1 << 20),
    ];
    for (key, value, range) in numbers {
        outside(value, range).into_iter().for_each(|message| refuse(key, message));
    }
    let sizes: [(&str, Size, RangeInclusive<Size>); 11] = [
        ("workers.staging_bytes_max", workers.staging_bytes_max, Size::kib(4)..=Size::gib(64)),
        ("gpu.pool_bytes", gpu.pool_bytes, Size(0)..=Size::gib(1024)),
        ("gpu.in_flight_bytes_max", gpu.in_flight_bytes_max, Size::mib(1)..=Size::gib(64)),
        ("disk.segment_bytes", disk.segment_bytes, Size::mib(4)..=Size::gib(4)),
        ("limits.message_bytes_max", limits.message_bytes_max, Size::kib(64)..=Size::mib(256)),
        ("limits.in_flight_bytes_max", limits.in_flight_bytes_max, Size::mib(1)..=Size::gib(1024)),
        ("lmcache.pool_bytes", lmcache.pool_bytes, Size::kib(64)..=Size::gib(1024)),
        ("object.pack_bytes", object.pack_bytes, Size::mib(1)..=Size::mib(512)),
        ("object.request_bytes_max", object.request_bytes_max, Size::mib(1)..=Size::mib(512)),
        ("object.waiting_bytes_max", object.waiting_bytes_max, Size::mib(2)..=Size::gib(64)),
        ("peers.held_bytes_max", peers.held_bytes_max, Size::mib(1)..=Size::gib(1024)),
    ];
    for (key, value, range) in sizes {
        outside(value, range).into_iter().for_each(|message| refuse(key, message));
    }
    let spans: [(&str, Span, RangeInclusive<Span>); 14] = [
        ("disk.slow_limit", disk.slow_limit, Span::millis(1)..=Span::seconds(600)),
        ("limits.pending_ttl", limits.pending_ttl, Span::millis(10)..=Span::seconds(86400)),
        ("lmcache.pending_wait", lmcache.pending_wait, Span::millis(0)..=Span::seconds(60)),
        ("lmcache.peer_wait", lmcache.peer_wait, Span::millis(0)..=Span::seconds(60)),
        ("lmcache.hold_ttl", lmcache.hold_ttl, Span::seconds(1)..=Span::seconds(86400)),
        ("object.age_min", object.age_min, Span::millis(0)..=Span::seconds(86400)),
        ("object.life_min", object.life_min, Span::seconds(0)..=Span::seconds(86400)),
        ("object.pack_wait", object.pack_wait, Span::millis(10)..=Span::seconds(3600)),
        ("object.fetch_limit", object.fetch_limit, Span::millis(10)..=Span::seconds(600)),
        ("object.refresh", object.refresh, Span::millis(100)..=Span::seconds(86400)),
        ("object.collect_every", object.collect_every, Span::seconds(1)..=Span::seconds(86400)),
        ("peers.fetch_limit", peers.fetch_limit, Span::millis(10)..=Span::seconds(600)),
        ("peers.probe_limit", peers.probe_limit, Span::millis(1)..=Span::seconds(60)),
        ("peers.lease_ttl", peers.lease_ttl, Span::millis(100)..=Span::seconds(3600)),
    ];
    for (key, value, range) in spans {
        outside(value, range).into_iter().for_each(|message| refuse(key, message));
    }

    if !workers.ring_entries.is_power_of_two() {
        refuse("workers.ring_entries", format!("{} is not a power of two", workers.ring_entries));
    }
    for (key, size) in [
        ("workers.staging_bytes_max", workers.staging_bytes_max),
        ("disk.segment_bytes", disk.segment_bytes),
        ("lmcache.pool_bytes", lmcache.pool_bytes),
    ] {
        if !size.0.is_multiple_of(4096) {
            refuse(key, format!("{size} is not a multiple of 4KiB"));
        }
    }
    if let OrAuto::Set(region) = host.region_bytes
        && (!region.0.is_power_of_two() || outside(region, Size::mib(2)..=Size::gib(1)).is_some())
    {
        refuse("host.region_bytes", format!("{region} is not a power of two from 2MiB to 1GiB"));
    }
    if host.free_low_ratio >= host.free_high_ratio || host.free_high_ratio.ratio() > 0.5 {
        let (low, high) = (host.free_low_ratio, host.free_high_ratio);
        refuse(
            "host.free_high_ratio",
            format!("{high} must be above host.free_low_ratio ({low}) and not above 50%"),
        );
    }
    for (key, count) in
        [("catalog.entries_max", catalog.entries_max), ("catalog.ghosts_max", catalog.ghosts_max)]
    {
        if let OrAuto::Set(count) = count
            && let Some(message) = outside(count, 64..=1 << 32)
        {
            refuse(key, message);
        }
    }
    if object.waiting_bytes_max.0 < object.pack_bytes.0.saturating_mul(2) {
        let twice = Size(object.pack_bytes.0.saturating_mul(2));
        refuse(
            "object.waiting_bytes_max",
            format!(
                "{} is less than two packs of object.pack_bytes, which are {twice}",
                object.waiting_bytes_max
            ),
        );
    }
    if let Some(ttl) = object.ttl.get()
        && let Some(message) = outside(*ttl, Span::seconds(60)..=Span::seconds(3650 * 86400))
    {
        refuse("object.ttl", message);
    }
    if let Some(message) = outside(object.blocks_max, 1024..=1 << 32) {
        refuse("object.blocks_max", message);
    }
    for (kind, built) in [("s3", cfg!(feature = "s3")), ("azure", cfg!(feature = "azure"))] {
        if !built && config.object_store().is_some_and(|place| place.kind() == kind) {
            refuse("object.store", format!("this kvd was built without its feature `{kind}`"));
        }
    }
    principals(config, &mut refuse);
    members(config, &mut refuse);
    if !kv_block::Scope::is_tenant(&lmcache.tenant) {
        let tenant = &lmcache.tenant;
        refuse(
            "lmcache.tenant",
            format!("`{tenant}` cannot name a tenant: expected 1 to 63 of a-z, 0-9 and '-'"),
        );
    }
    if lmcache.listen.get().is_some() && cfg!(not(feature = "lmcache")) {
        refuse("lmcache.listen", "this kvd was built without its feature `lmcache`".into());
    }
    if let Err(error) = crate::logging::check_level(&config.log.level) {
        refuse("log.level", error);
    }
    for (key, message) in crate::listen::refusals(config) {
        refuse(key, message);
    }
    found
}

/// A principal has users who belong to nobody else, and a share that leaves something for the default one.
fn principals(config: &Config, refuse: &mut dyn FnMut(&str, String)) {
    let mut left = Share::percent(100);
    let mut seen: BTreeMap<u32, String> = BTreeMap::new();
    for rule in &config.workers.uids {
        if let UidRule::Uid(uid) = rule {
            seen.insert(*uid, "workers.uids".to_owned());
        }
    }
    for (name, principal) in &config.principals {
        let (uids, share) = (format!("principals.{name}.uids"), format!("principals.{name}.share"));
        if name == PRINCIPAL_DEFAULT {
            let text = "`default` is whoever is in no other principal: list its users in workers.uids";
            refuse(&uids, text.to_owned());
        }
        if principal.uids.is_empty() {
            refuse(&uids, "a principal without users: list their numbers, as in [1001]".to_owned());
        }
        for uid in &principal.uids {
            if let Some(other) = seen.insert(*uid, uids.clone()).filter(|other| *other != uids) {
                let text = format!("user {uid} is in {other} as well; take it out of one of the two");
                refuse(&uids, text);
            }
        }
        if principal.share.is_zero() {
            refuse(
                &share,
                "a principal without a share: say how much of the tiers is its, as in \"30%\"".into(),
            );
        }
        match left.without(principal.share) {
            Some(rest) if !rest.is_zero() => left = rest,
            _ => {
                let text = format!(
                    "{} leaves nothing for the default principal (workers.uids and the network): with those \
                     before it, less than {} is to be had",
                    principal.share, left
                );
                refuse(&share, text);
            }
        }
    }
}

/// Every node is listed once, and there are no more than can be numbered.
fn members(config: &Config, refuse: &mut dyn FnMut(&str, String)) {
    let members = &config.peers.members;
    let mut names = std::collections::BTreeSet::new();
    for member in members {
        if !names.insert(&member.name) {
            refuse("peers.members", format!("node {} is listed twice", member.name));
        }
    }
    // With the default one.
    let principals = config.principals.len() + 1;
    let among_peers = !members.is_empty() || config.peers.listen.get().is_some();
    if among_peers && principals > kv_wire::frame::PRINCIPALS_MAX {
        let most = kv_wire::frame::PRINCIPALS_MAX;
        let text = format!("with {principals} principals a node has no peers; {most} can be told to them");
        refuse("peers.members", text);
    }
    if members.len() > MEMBERS_MAX {
        refuse("peers.members", format!("{} nodes are listed, {MEMBERS_MAX} may be", members.len()));
    }
}

/// What can stand in the list of nodes, and is more likely a mistake.
pub(super) fn doubts(config: &Config) -> Vec<String> {
    let (members, own) = (&config.peers.members, config.node_name());
    let mut found = Vec::new();
    let mut places: BTreeMap<(&str, u16), &str> = BTreeMap::new();
    for member in members {
        if let Some(other) = places.insert((&member.host, member.port), &member.name) {
            found.push(format!("peers.members: {member} is where node {other} is said to be"));
        }
    }
    let listen = config.peers.listen.get().map(|address| address.0);
    let here = |member: &Member| listen.is_some_and(|listen| member.is_at(listen));
    for member in config.peers().filter(|member| here(member)) {
        found.push(format!("peers.members: {member} is peers.listen of this node, which is called {own}"));
    }
    if !members.is_empty() && members.iter().all(|member| member.name != own) {
        found.push(format!(
            "peers.members: this node is not listed as {own}; nodes that share this list refuse it, unless node.name is set \
             to its name there"
        ));
    }
    found
}

/// Nodes of one static list.
const MEMBERS_MAX: usize = 1024;

fn outside<T: PartialOrd + Display + Copy>(value: T, range: RangeInclusive<T>) -> Option<String> {
    let (least, most) = (range.start(), range.end());
    (!range.contains(&value)).then(|| format!("{value} is not from {least} to {most}"))
}
