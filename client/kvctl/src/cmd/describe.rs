//! `kvctl describe`: everything about one thing.

use clap::{Args, Subcommand};
use kv_api::v1;
use kv_block::Tier;

use crate::cli::{Format, Global, Show};
use crate::cmd::get::{TIERS, is_object, part, priority_name, tier_name, tier_names};
use crate::cmd::peers::{self, round_trip};
use crate::cmd::{gpus, object};
use crate::connect;
use crate::exit::{Exit, Failure, printable};
use crate::names;
use crate::out;
use crate::paint::Paint;
use crate::structured::{self, Named, hex};
use crate::table::{Cell, Kind, Look, column, fields, section};
use crate::units::{bytes, count, counted, milliseconds, percent, seconds};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// A tier, of one shard or of all: state, reason, what it runs on
    Tier {
        /// host, disk, object; or with the shard: host/0
        name: String,
        #[command(flatten)]
        show: Show,
    },
    /// A block: where it is, who holds it
    Block {
        /// Key in hex, or its first 8 digits or more
        key: String,
        #[command(flatten)]
        show: Show,
    },
    /// A connected worker
    Client {
        /// Session number, or the name it gave itself
        name: String,
        #[command(flatten)]
        show: Show,
    },
    /// A tenant: bytes, quota, hits
    Tenant {
        /// Name as in `kvctl get tenants`
        name: String,
        #[command(flatten)]
        show: Show,
    },
    /// Another node: its state and why, what came from it, the paths to it
    Peer {
        /// Name as in `kvctl get peers`
        name: String,
        #[command(flatten)]
        show: Show,
    },
    /// A pack in the object store: who wrote it, what is in it
    Pack {
        /// Id, or its first digits, as in `kvctl get packs`
        id: String,
        #[command(flatten)]
        show: Show,
    },
    /// A GPU: its state and why, what is registered on it, what is copied
    Gpu {
        /// Its number in `kvctl get gpus`, or the beginning of its UUID
        name: String,
        #[command(flatten)]
        show: Show,
    },
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    match arguments.what {
        What::Tier { name, show } => {
            let (tier, wanted) = parse_tier(&name)?;
            let daemon = connect::connect(global).await?;
            let mut answer =
                daemon.within(daemon.admin().list_tiers(daemon.request(v1::ListTiersRequest {}))).await?;
            let number = i32::from(kv_api::convert::tier_message(tier));
            let is_wanted = |info: &v1::TierInfo| wanted.as_ref().is_none_or(|wanted| part(info) == *wanted);
            answer.tiers.retain(|info| info.tier == number && is_wanted(info));
            if answer.tiers.is_empty() {
                return Err(missing("tier", &name, "kvctl get tiers"));
            }
            let stores = if tier == Tier::Object { object::tiers(&daemon).await? } else { Vec::new() };
            let now = out::now();
            let text = structured::text(show.output, false, || structured::json(&answer));
            let page = |info: &v1::TierInfo| {
                let store = stores.iter().find(|store| store.principal == info.principal);
                tier_page(info, store, now)
            };
            let pages = || answer.tiers.iter().map(page).collect::<Vec<_>>().join("\n");
            out::print(&text.unwrap_or_else(|| match show.output {
                Format::Name => TIERS.names(&answer.tiers),
                _ => pages(),
            }))?;
        }
        What::Block { key, show } => {
            let daemon = connect::connect(global).await?;
            let key = names::resolve(&daemon, &key).await?;
            let names = names::requests(&[key], 1).next();
            let answer = daemon
                .within(daemon.blocks().explain(daemon.request(v1::ExplainRequest { names, session: 0 })))
                .await?;
            let Some(block) = answer.block.filter(|_| answer.miss.is_none()) else {
                let reason = answer
                    .miss
                    .map_or(String::new(), |miss| format!(": {}", kv_api::convert::miss_reason(&miss)));
                return Err(Failure::new(Exit::NotFound, format!("block {key} is not here{reason}"))
                    .help(format!("`kvctl why {key}` says why")));
            };
            print(show.output, &block, &format!("block/{key}"), block_fields(&block, out::now()))?;
        }
        What::Client { name, show } => {
            let name = name.strip_prefix("client/").unwrap_or(&name);
            let daemon = connect::connect(global).await?;
            let clients = daemon
                .within(daemon.admin().list_clients(daemon.request(v1::ListClientsRequest {})))
                .await?
                .clients;
            let found = clients.into_iter().find(|c| c.session.to_string() == name || c.name == name);
            let client = found.ok_or_else(|| missing("client", name, "kvctl get clients"))?;
            print(show.output, &client, &format!("client/{}", client.session), client_fields(&client))?;
        }
        What::Tenant { name, show } => {
            let name = name.strip_prefix("tenant/").unwrap_or(&name);
            let daemon = connect::connect(global).await?;
            let tenants = daemon
                .within(daemon.admin().list_tenants(daemon.request(v1::ListTenantsRequest {})))
                .await?
                .tenants;
            // One for each principal in which the tenant has to do.
            let mut found = tenants.into_iter().filter(|tenant| tenant.tenant == name).peekable();
            if found.peek().is_none() {
                return Err(missing("tenant", name, "kvctl get tenants"));
            }
            for tenant in found {
                print(show.output, &tenant, &format!("tenant/{name}"), tenant_fields(&tenant))?;
            }
        }
        What::Peer { name, show } => {
            let daemon = connect::connect(global).await?;
            let peer = peers::named(&daemon, &name).await?;
            let request = daemon.request(v1::DescribePeerRequest { node: peer.node.clone() });
            let answer = daemon.within(daemon.admin().describe_peer(request)).await?;
            let text = peer_page(answer.peer.as_ref().unwrap_or(&peer), &answer.paths, Paint::stdout());
            print(show.output, &answer, &format!("peer/{}", peer.node), text)?;
        }
        What::Pack { id, show } => {
            let daemon = connect::connect(global).await?;
            let answer = object::described(&daemon, &id).await?;
            let name = answer.pack.as_ref().map_or_else(String::new, |pack| hex(&pack.id));
            let blocks = if show.output == Format::Wide { usize::MAX } else { object::BLOCKS_SHOWN };
            let text = object::pack_page(&answer, blocks, out::now(), Paint::stdout());
            print(show.output, &answer, &format!("pack/{name}"), text)?;
        }
        What::Gpu { name, show } => {
            let daemon = connect::connect(global).await?;
            let answer = gpus::list(&daemon).await?;
            let gpu = gpus::pick(&answer, &name)?;
            let text = gpus::page(gpu, &answer.gpus, Paint::stdout());
            print(show.output, gpu, &format!("gpu/{}", printable(&gpu.uuid)), text)?;
        }
    }
    Ok(Exit::Ok)
}

fn print<M: Named>(format: Format, message: &M, name: &str, text: String) -> Result<(), Failure> {
    out::answer(format, message, || if format == Format::Name { format!("{name}\n") } else { text })
}

pub(crate) fn missing(noun: &str, name: &str, list: &str) -> Failure {
    Failure::new(Exit::NotFound, format!("no {noun} is called `{name}`")).help(format!("`{list}` lists them"))
}

/// `host`, `host/0` or `tier/host/0`; behind `object` a principal.
fn parse_tier(text: &str) -> Result<(Tier, Option<String>), Failure> {
    let name = text.strip_prefix("tier/").unwrap_or(text);
    let (name, part) = name.split_once('/').map_or((name, None), |(name, part)| (name, Some(part)));
    let tier = Tier::ALL.into_iter().find(|tier| tier.name() == name);
    match (tier, part, part.map(str::parse::<u32>).transpose()) {
        (Some(Tier::Object), part, _) => Ok((Tier::Object, part.map(str::to_owned))),
        (Some(tier), _, Ok(shard)) => Ok((tier, shard.map(|shard| shard.to_string()))),
        _ => Err(Failure::usage(format!("`{text}` is not a tier")).help(
            "tiers are device, host, disk and object; a shard goes behind a slash: disk/0, for object a principal",
        )),
    }
}

/// A tier; of an object tier also how its store does.
fn tier_page(tier: &v1::TierInfo, store: Option<&v1::ObjectTierInfo>, now: u64) -> String {
    let since = match tier.since {
        0 => String::new(),
        since => format!("{} ago", seconds(now.saturating_sub(since))),
    };
    // What is shared with other nodes has no shard here, and no bound.
    let own = |text: String| if is_object(tier) { "-".to_owned() } else { text };
    let used = if is_object(tier) {
        bytes(tier.bytes_used)
    } else {
        format!(
            "{} of {} ({})",
            bytes(tier.bytes_used),
            bytes(tier.bytes_max),
            percent(tier.bytes_used, tier.bytes_max)
        )
    };
    let mut pairs = vec![
        ("Tier", tier_name(tier.tier).into()),
        ("Shard", own(tier.shard.to_string())),
        ("Principal", tier.principal.clone()),
        ("NUMA node", own(tier.numa_node.to_string())),
        ("State", tier.state.clone()),
        ("Reason", tier.reason.clone()),
        ("Since", since),
        ("Used", used),
        ("Pinned", own(bytes(tier.bytes_pinned))),
        ("Blocks", count(tier.blocks)),
        ("Evicted", own(count(tier.evicted_blocks))),
        ("Read", bytes(tier.bytes_read)),
        ("Written", bytes(tier.bytes_written)),
        ("Notes", tier.notes.join("; ")),
    ];
    pairs.extend(store.into_iter().flat_map(object::tier_fields));
    fields(&pairs) + &store.map_or_else(String::new, object::unusable)
}

/// All that is known of a block.
pub(crate) fn block_fields(block: &v1::BlockInfo, now: u64) -> String {
    let until = |at: u64, never: &str| match at {
        0 => never.to_owned(),
        at if at <= now => "over".to_owned(),
        at => format!("in {}", seconds(at - now)),
    };
    let in_host = block.tiers.contains(&v1::Tier::Host.into());
    let slot = format!("{} generation {} of shard {}", block.slot, block.generation, block.shard);
    fields(&[
        ("Key", hex(&block.key)),
        ("State", block.state.clone()),
        ("Tiers", tier_names(&block.tiers)),
        ("Bytes", format!("{} ({})", count(block.bytes.into()), bytes(block.bytes.into()))),
        ("Checksum", format!("{:016x}", block.checksum)),
        ("Principal", block.principal.clone()),
        ("Tenant", block.tenant.clone()),
        ("Model", block.model.clone()),
        ("Priority", priority_name(block.priority).into()),
        ("Expires", until(block.expires_at, "never")),
        ("Pin ends", until(block.pinned_until, "not pinned")),
        ("Leases", count(block.leases.into())),
        ("Read lately", format!("{} of 3", block.frequency)),
        ("Host slot", if in_host { slot } else { String::new() }),
        ("Disk", block.disk_location.clone()),
    ])
}

fn client_fields(client: &v1::ClientInfo) -> String {
    fields(&[
        ("Session", client.session.to_string()),
        ("Name", client.name.clone()),
        ("Door", client.door.clone()),
        ("Process", format!("{} of uid {}", client.pid, client.uid)),
        ("Principal", client.principal.clone()),
        ("Connected", format!("for {}", seconds(client.connected_s))),
        ("Leases", format!("{} on {}", count(client.leases.into()), bytes(client.leased_bytes))),
        ("Open", format!("{} in shared memory", count(client.reading.into()))),
        ("Pending", count(client.pending.into())),
        ("Puts", count(client.puts)),
        ("Gets", count(client.gets)),
    ])
}

fn tenant_fields(tenant: &v1::TenantInfo) -> String {
    let quota = match tenant.quota_bytes {
        None => "none".into(),
        Some(quota) => {
            let used = tenant.host_bytes.saturating_add(tenant.disk_bytes);
            format!("{} ({} used)", bytes(quota), percent(used, quota))
        }
    };
    fields(&[
        ("Tenant", tenant.tenant.clone()),
        ("Principal", tenant.principal.clone()),
        ("Blocks", count(tenant.blocks)),
        ("Host", bytes(tenant.host_bytes)),
        ("Disk", bytes(tenant.disk_bytes)),
        ("Pinned", bytes(tenant.pinned_bytes)),
        ("Quota", quota),
        ("Hits", count(tenant.hits)),
        ("Misses", format!("{}, without workers' own lookups", count(tenant.misses))),
    ])
}

/// All that is known of a peer: itself, what comes from it and goes to it, and the paths in the order of their use.
fn peer_page(peer: &v1::PeerInfo, paths: &[v1::PathInfo], paint: Paint) -> String {
    let none = |number: u64, text: String| if number == 0 { String::new() } else { text };
    let blocks = |number, total| format!("{}, {}", counted(number, "block"), bytes(total));
    let misses: u64 = peer.misses.values().sum();
    let reasons =
        by_reason(&peer.misses).iter().map(|(name, n)| format!("{name} {}", count(*n))).collect::<Vec<_>>();
    let head = fields(&[
        ("Node", peer.node.clone()),
        ("Address", peer.address.clone()),
        ("State", peer.state.clone()),
        ("Reason", peer.reason.clone()),
        ("Tried again", none(peer.retry_ms, format!("in {}", milliseconds(peer.retry_ms)))),
        ("Protocol", none(peer.version.into(), format!("version {}", peer.version))),
        ("Epoch", none(peer.epoch, peer.epoch.to_string())),
        ("Round trip", none(peer.rtt_us, round_trip(peer.rtt_us))),
        ("Strikes", count(peer.strikes)),
    ]);
    let from = fields(&[
        ("Blocks", blocks(peer.blocks_in, peer.bytes_in)),
        ("Wanted now", count(peer.wanted)),
        ("On their way", count(peer.reading)),
        ("Misses", [vec![count(misses)], reasons].concat().join("  ")),
    ]);
    let to = fields(&[
        ("Blocks", blocks(peer.blocks_out, peer.bytes_out)),
        ("Held now", blocks(peer.held, peer.held_bytes)),
        ("Reads here", if peer.reads_here { "yes" } else { "no" }.into()),
    ]);
    let (unused, mut used): (Vec<_>, Vec<_>) = paths.iter().cloned().partition(|path| path.rank == 0);
    used.sort_by_key(|path| path.rank);
    let look = Look { wide: false, headers: false, paint, now: 0 };
    let sections = [
        ("From it", from),
        ("To it", to),
        ("Paths, in this order", USED.table(&used, &look, &mut Vec::new())),
        ("Not used", UNUSED.table(&unused, &look, &mut Vec::new())),
    ];
    let sections = sections.iter().filter(|(_, text)| !text.is_empty());
    head + &sections.map(|(title, text)| section(title, text, paint)).collect::<String>()
}

/// The most frequent first.
fn by_reason(misses: &std::collections::HashMap<String, u64>) -> Vec<(String, u64)> {
    let mut pairs: Vec<_> = misses.iter().map(|(name, number)| (printable(name), *number)).collect();
    pairs.retain(|(_, number)| *number > 0);
    pairs.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    pairs
}

const USED: Kind<v1::PathInfo> = Kind {
    noun: "path",
    name: |path| path.name.clone(),
    columns: &[
        column("RANK", |path, _| Cell::count(path.rank)),
        column("PATH", |path, _| Cell::text(&path.name)),
        column("STATE", |path, _| Cell::state(if path.up { "up" } else { "down" })),
        column("IN", |path, _| Cell::number(path.blocks_in, counted(path.blocks_in, "block"))),
        column("IN-BYTES", |path, _| Cell::bytes(path.bytes_in)),
        column("REASON", |path, _| Cell::text(&path.reason)),
    ],
};

const UNUSED: Kind<v1::PathInfo> = Kind {
    noun: "path",
    name: |path| path.name.clone(),
    columns: &[
        column("PATH", |path, _| Cell::text(&path.name)),
        column("REASON", |path, _| Cell::text(&path.reason)),
    ],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_are_named_with_or_without_shard() {
        assert_eq!(parse_tier("host"), Ok((Tier::Host, None)));
        assert_eq!(parse_tier("tier/disk/3"), Ok((Tier::Disk, Some("3".into()))));
        assert_eq!(parse_tier("tier/object/team-a"), Ok((Tier::Object, Some("team-a".into()))));
        for wrong in ["", "dram", "host/x", "host/0/1"] {
            assert_eq!(parse_tier(wrong).unwrap_err().exit, Exit::Usage, "{wrong}");
        }
    }

    #[test]
    fn a_block_reads_so() {
        let block = v1::BlockInfo {
            key: vec![0xab; 16].into(),
            tiers: vec![v1::Tier::Host.into(), v1::Tier::Disk.into()],
            bytes: 65_536,
            checksum: 0xff,
            priority: v1::Priority::High.into(),
            pinned_until: 160,
            principal: "default".into(),
            tenant: "team-a".into(),
            state: "present".into(),
            slot: 9,
            generation: 2,
            frequency: 3,
            ..Default::default()
        };
        let wanted = "\
Key:          abababababababababababababababab
State:        present
Tiers:        host,disk
Bytes:        65,536 (64.0KiB)
Checksum:     00000000000000ff
Principal:    default
Tenant:       team-a
Model:        -
Priority:     high
Expires:      never
Pin ends:     in 1m
Leases:       0
Read lately:  3 of 3
Host slot:    9 generation 2 of shard 0
Disk:         -
";
        let text = block_fields(&block, 100);
        assert_eq!(text, wanted, "\n{text}");
    }

    #[test]
    fn a_peer_reads_so() {
        let peer = v1::PeerInfo {
            node: "node-b".into(),
            address: "10.0.0.8:9474".into(),
            state: "up".into(),
            reason: "a read failed: path\u{1b}".into(),
            version: 1,
            epoch: 7,
            rtt_us: 210,
            wanted: 3,
            reading: 2,
            blocks_in: 5_321,
            bytes_in: 1_288_490_188,
            misses: [("tier_timeout".to_owned(), 6), ("peer_evicted".to_owned(), 12), ("x".to_owned(), 0)]
                .into(),
            held: 1,
            held_bytes: 64 << 10,
            blocks_out: 100,
            bytes_out: 6 << 20,
            reads_here: true,
            ..Default::default()
        };
        let path = |name: &str, rank, blocks_in, reason: &str| v1::PathInfo {
            name: name.into(),
            rank,
            reason: reason.into(),
            up: rank == 1,
            blocks_in,
            bytes_in: blocks_in << 18,
        };
        let paths = [
            path("mlx5_1", 0, 0, "its port is down"),
            path("tcp", 2, 1, "every machine has it"),
            path("mlx5_0", 1, 5_320, "RDMA on both sides"),
        ];
        let wanted = "\
Node:         node-b
Address:      10.0.0.8:9474
State:        up
Reason:       a read failed: path?
Tried again:  -
Protocol:     version 1
Epoch:        7
Round trip:   210us
Strikes:      0

From it
  Blocks:        5,321 blocks, 1.2GiB
  Wanted now:    3
  On their way:  2
  Misses:        18  peer_evicted 12  tier_timeout 6

To it
  Blocks:      100 blocks, 6.0MiB
  Held now:    1 block, 64.0KiB
  Reads here:  yes

Paths, in this order
  1   mlx5_0   up     5,320 blocks   1.3GiB   RDMA on both sides
  2   tcp      down        1 block   256KiB   every machine has it

Not used
  mlx5_1   its port is down
";
        let page = peer_page(&peer, &paths, Paint::plain());
        assert_eq!(page, wanted, "\n{page}");
    }

    #[test]
    fn a_peer_that_nobody_asked_yet_has_no_numbers() {
        let peer = v1::PeerInfo { node: "node-c".into(), state: "idle".into(), ..Default::default() };
        let page = peer_page(&peer, &[], Paint::plain());
        assert!(page.contains("Protocol:     -\n") && page.contains("Round trip:   -\n"), "{page}");
        assert!(page.contains("Misses:        0\n") && !page.contains("Paths"), "{page}");
    }

    #[test]
    fn a_tenant_without_quota_says_so() {
        let tenant = v1::TenantInfo { tenant: "a".into(), hits: 3, misses: 1, ..Default::default() };
        let text = tenant_fields(&tenant);
        let says = |wanted: &str| text.lines().any(|line| line.split_whitespace().eq(wanted.split(' ')));
        assert!(says("Quota: none") && says("Hits: 3"), "{text}");
    }
}
