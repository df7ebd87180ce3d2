//! `kvctl get`: lists of what a daemon has, as kubectl lists things.

use clap::{Args, Subcommand};
use kv_api::v1;
use kv_block::Tier;

use crate::cli::{Format, Global, Listing, parse_key_prefix, parse_tenant, tier_parser};
use crate::cmd::{gpus, object, peers};
use crate::connect::{self, Daemon};
use crate::exit::{Exit, Failure};
use crate::out;
use crate::paint::Paint;
use crate::structured::{self, Named, hex};
use crate::table::{Cell, Column, Kind, Look, column, wide};

/// Blocks asked for at once.
const PAGE: u32 = 1_000;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Tiers of every shard: how full, in what state
    #[command(visible_alias = "tier")]
    Tiers(Listing),
    /// Blocks in the catalog
    #[command(visible_alias = "block")]
    Blocks(Blocks),
    /// Connected workers
    #[command(visible_alias = "client")]
    Clients(Listing),
    /// What workers hold for reading
    #[command(visible_alias = "lease")]
    Leases(Leases),
    /// Tenants: bytes, quota, hits
    #[command(visible_alias = "tenant")]
    Tenants(Listing),
    /// Other nodes: state, paths, what comes from them and goes to them
    #[command(visible_alias = "peer")]
    Peers(Listing),
    /// Blocks on their way from and to peers
    #[command(visible_alias = "transfer")]
    Transfers(Listing),
    /// Packs in the object store that this node knows
    #[command(visible_alias = "pack")]
    Packs(Packs),
    /// GPUs: state, what workers registered on them, what is copied
    #[command(visible_alias = "gpu")]
    Gpus(Listing),
}

#[derive(Debug, Args)]
struct Packs {
    #[command(flatten)]
    listing: Listing,
    /// Only ids that begin so (hex digits)
    #[arg(long, value_name = "HEX", default_value = "", hide_default_value = true)]
    #[arg(value_parser = object::parse_pack_prefix)]
    prefix: String,
    /// Most packs listed; 0 for all
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    limit: u64,
}

#[derive(Debug, Args)]
struct Blocks {
    #[command(flatten)]
    listing: Listing,
    /// Only blocks of this tier
    #[arg(long, value_parser = tier_parser())]
    tier: Option<Tier>,
    /// Only blocks of this tenant
    #[arg(long, value_parser = parse_tenant)]
    tenant: Option<String>,
    /// Only keys that begin so (hex digits)
    #[arg(long, value_name = "HEX", value_parser = parse_key_prefix)]
    prefix: Option<String>,
    /// Most blocks listed; 0 for all
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    limit: u64,
}

#[derive(Debug, Args)]
struct Leases {
    #[command(flatten)]
    listing: Listing,
    /// Only those of this session
    #[arg(long, value_name = "NUMBER", default_value_t = 0, hide_default_value = true)]
    session: u64,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let daemon = connect::connect(global).await?;
    match arguments.what {
        What::Tiers(listing) => {
            list(
                &listing,
                &TIERS,
                |r: &mut v1::ListTiersResponse| &mut r.tiers,
                async || {
                    daemon.within(daemon.admin().list_tiers(daemon.request(v1::ListTiersRequest {}))).await
                },
            )
            .await
        }
        What::Clients(listing) => {
            list(
                &listing,
                &CLIENTS,
                |r: &mut v1::ListClientsResponse| &mut r.clients,
                async || {
                    daemon
                        .within(daemon.admin().list_clients(daemon.request(v1::ListClientsRequest {})))
                        .await
                },
            )
            .await
        }
        What::Leases(Leases { listing, session }) => {
            list(
                &listing,
                &LEASES,
                |r: &mut v1::ListLeasesResponse| &mut r.leases,
                async || {
                    daemon
                        .within(daemon.admin().list_leases(daemon.request(v1::ListLeasesRequest { session })))
                        .await
                },
            )
            .await
        }
        What::Tenants(listing) => {
            list(
                &listing,
                &TENANTS,
                |r: &mut v1::ListTenantsResponse| &mut r.tenants,
                async || {
                    daemon
                        .within(daemon.admin().list_tenants(daemon.request(v1::ListTenantsRequest {})))
                        .await
                },
            )
            .await
        }
        What::Peers(listing) => {
            list(
                &listing,
                &peers::PEERS,
                |r: &mut v1::ListPeersResponse| &mut r.peers,
                async || {
                    let answer = daemon
                        .within(daemon.admin().list_peers(daemon.request(v1::ListPeersRequest {})))
                        .await?;
                    say_when(answer.peers.is_empty(), &listing, peers::NO_PEERS);
                    Ok(answer)
                },
            )
            .await
        }
        What::Transfers(listing) => {
            list(
                &listing,
                &peers::TRANSFERS,
                |r: &mut v1::ListTransfersResponse| &mut r.transfers,
                async || {
                    let answer = daemon
                        .within(daemon.admin().list_transfers(daemon.request(v1::ListTransfersRequest {})))
                        .await?;
                    say_when(answer.transfers.is_empty(), &listing, peers::NO_TRANSFERS);
                    Ok(answer)
                },
            )
            .await
        }
        What::Packs(Packs { listing, prefix, limit }) => {
            list(
                &listing,
                &object::PACKS,
                |r: &mut v1::ListPacksResponse| &mut r.packs,
                async || {
                    let answer = object::packs(&daemon, &prefix, limit, false).await?;
                    say_when(answer.packs.is_empty(), &listing, object::NO_PACKS);
                    let more = !answer.next_page_token.is_empty();
                    if more && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
                        let listed = answer.packs.len();
                        out::note(&format!("the first {listed} are listed; --limit 0 lists all"));
                    }
                    Ok(answer)
                },
            )
            .await
        }
        What::Gpus(listing) => {
            list(
                &listing,
                &gpus::GPUS,
                |r: &mut v1::ListGpusResponse| &mut r.gpus,
                async || {
                    let answer = gpus::list(&daemon).await?;
                    say_when(answer.gpus.is_empty(), &listing, &gpus::none(&answer));
                    Ok(answer)
                },
            )
            .await
        }
        What::Blocks(arguments) => blocks(&daemon, &arguments).await,
    }
}

/// Asks with `ask`, sorts, prints; again and again with `--watch`.
async fn list<M: Named, T>(
    listing: &Listing,
    kind: &Kind<T>,
    items: impl Fn(&mut M) -> &mut Vec<T>,
    mut ask: impl AsyncFnMut() -> Result<M, Failure>,
) -> Result<Exit, Failure> {
    out::watched(&listing.watch, async || {
        let mut answer = ask().await?;
        Ok((listed(listing, kind, &items, &mut answer, out::now(), Paint::stdout())?, Exit::Ok))
    })
    .await
}

/// Says to the person why the list is empty: beside the data, so that a script counts no line too many.
fn say_when(empty: bool, listing: &Listing, why: &str) {
    if empty && matches!(listing.show.output, Format::Table | Format::Wide) {
        out::note(why);
    }
}

/// The text of a list, sorted and in the format wanted.
pub(crate) fn listed<M: Named, T>(
    listing: &Listing,
    kind: &Kind<T>,
    items: impl Fn(&mut M) -> &mut Vec<T>,
    answer: &mut M,
    now: u64,
    paint: Paint,
) -> Result<String, Failure> {
    if let Some(by) = &listing.sort_by {
        kind.sort(items(answer), by, now)?;
    }
    let format = listing.show.output;
    let text = structured::text(format, listing.watch.watch.is_some(), || structured::json(answer));
    Ok(text.unwrap_or_else(|| match format {
        Format::Name => kind.names(items(answer)),
        _ => kind.table(items(answer), &look(listing, now, paint), &mut Vec::new()),
    }))
}

fn look(listing: &Listing, now: u64, paint: Paint) -> Look {
    Look { wide: listing.show.output == Format::Wide, headers: !listing.no_headers, paint, now }
}

/// Lists blocks. What can be shown page by page is: a daemon has millions.
async fn blocks(daemon: &Daemon, arguments: &Blocks) -> Result<Exit, Failure> {
    let listing = &arguments.listing;
    let whole = listing.sort_by.is_some()
        || listing.watch.watch.is_some()
        || matches!(listing.show.output, Format::Json | Format::Yaml);
    if whole {
        return list(
            listing,
            &BLOCKS,
            |r: &mut v1::ListBlocksResponse| &mut r.blocks,
            async || {
                let mut all = v1::ListBlocksResponse::default();
                all.next_page_token = pages(daemon, arguments, |mut page| {
                    all.blocks.append(&mut page);
                    Ok(())
                })
                .await?;
                Ok(all)
            },
        )
        .await;
    }
    let mut look = look(listing, out::now(), Paint::stdout());
    let mut widths = Vec::new();
    let mut listed = 0;
    let rest = pages(daemon, arguments, |page| {
        listed += page.len();
        let name = listing.show.output == Format::Name;
        let text = if name { BLOCKS.names(&page) } else { BLOCKS.table(&page, &look, &mut widths) };
        look.headers = false;
        out::print(&text)
    })
    .await?;
    // For the person who looks at the list, not for the log of a script.
    if !rest.is_empty() && std::io::IsTerminal::is_terminal(&std::io::stdout()) {
        out::note(&format!("the first {listed} are listed; --limit 0 lists all"));
    }
    Ok(Exit::Ok)
}

/// Hands page after page to `take`, up to the limit. Gives the token of what is left, empty at the end.
async fn pages(
    daemon: &Daemon,
    arguments: &Blocks,
    mut take: impl FnMut(Vec<v1::BlockInfo>) -> Result<(), Failure>,
) -> Result<String, Failure> {
    let mut left = if arguments.limit == 0 { u64::MAX } else { arguments.limit };
    let mut request = v1::ListBlocksRequest {
        page_token: String::new(),
        page_size: 0,
        key_prefix: arguments.prefix.clone().unwrap_or_default(),
        tier: arguments.tier.map_or(v1::Tier::Unspecified, kv_api::convert::tier_message).into(),
        tenant: arguments.tenant.clone().unwrap_or_default(),
    };
    loop {
        request.page_size = left.min(PAGE.into()) as u32;
        let page = daemon.within(daemon.admin().list_blocks(daemon.request(request.clone()))).await?;
        // The next page begins behind all of these, so none is left out, were it one more than asked for.
        left = left.saturating_sub(page.blocks.len() as u64);
        take(page.blocks)?;
        if page.next_page_token.is_empty() || left == 0 {
            return Ok(page.next_page_token);
        }
        request.page_token = page.next_page_token;
    }
}

/// Name of a tier by its wire number.
pub(crate) fn tier_name(number: i32) -> &'static str {
    kv_api::convert::tier(number).ok().flatten().map_or("unknown", Tier::name)
}

/// Names of tiers by wire number, fastest first.
pub(crate) fn tier_names(numbers: &[i32]) -> String {
    numbers.iter().map(|number| tier_name(*number)).collect::<Vec<_>>().join(",")
}

/// Name of a priority by its wire number.
pub(crate) fn priority_name(number: i32) -> &'static str {
    kv_api::convert::priority(number).map_or("unknown", kv_block::Priority::name)
}

fn share(part: u64, whole: u64) -> Cell {
    let thousandths = (u128::from(part) * 1_000).checked_div(u128::from(whole)).unwrap_or(0);
    Cell::number(thousandths as u64, crate::units::percent(part, whole))
}

/// Which part of its tier it is: a shard, or the object tier of a principal.
pub(crate) fn part(tier: &v1::TierInfo) -> String {
    if is_object(tier) { tier.principal.clone() } else { tier.shard.to_string() }
}

/// Whether it is shared with other nodes: then no shard has it, and nothing here bounds it.
pub(crate) fn is_object(tier: &v1::TierInfo) -> bool {
    tier.tier() == v1::Tier::Object
}

/// What only a tier of this node has.
fn own(tier: &v1::TierInfo, cell: Cell) -> Cell {
    if is_object(tier) { Cell::number(0, "-".into()) } else { cell }
}

pub(crate) const TIERS: Kind<v1::TierInfo> = Kind {
    noun: "tier",
    name: |tier| format!("{}/{}", tier_name(tier.tier), part(tier)),
    columns: &[
        column("TIER", |tier, _| Cell::text(tier_name(tier.tier))),
        column("SHARD", |tier, _| own(tier, Cell::count(tier.shard))),
        column("STATE", |tier, _| Cell::state(&tier.state)),
        column("USED", |tier, _| Cell::bytes(tier.bytes_used)),
        column("MAX", |tier, _| own(tier, Cell::bytes(tier.bytes_max))),
        column("USE%", |tier, _| share(tier.bytes_used, tier.bytes_max)),
        column("PINNED", |tier, _| own(tier, Cell::bytes(tier.bytes_pinned))),
        column("BLOCKS", |tier, _| Cell::count(tier.blocks)),
        column("EVICTED", |tier, _| own(tier, Cell::count(tier.evicted_blocks))),
        wide("PRINCIPAL", |tier, _| Cell::text(&tier.principal)),
        wide("NUMA", |tier, _| own(tier, Cell::count(tier.numa_node))),
        wide("READ", |tier, _| Cell::bytes(tier.bytes_read)),
        wide("WRITTEN", |tier, _| Cell::bytes(tier.bytes_written)),
        wide("SINCE", |tier, now| match tier.since {
            0 => Cell::number(0, "-".into()),
            since => Cell::number(since, crate::units::seconds(now.saturating_sub(since))),
        }),
        wide("REASON", |tier, _| Cell::text(&tier.reason)),
        wide("NOTES", |tier, _| Cell::text(tier.notes.join("; "))),
    ],
};

const CLIENTS: Kind<v1::ClientInfo> = Kind {
    noun: "client",
    name: |client| client.session.to_string(),
    columns: &[
        column("SESSION", |client, _| Cell::count(client.session)),
        column("NAME", |client, _| Cell::text(&client.name)),
        column("DOOR", |client, _| Cell::text(&client.door)),
        column("PID", |client, _| Cell::count(client.pid)),
        column("AGE", |client, _| Cell::seconds(client.connected_s)),
        column("LEASES", |client, _| Cell::count(client.leases)),
        column("LEASED", |client, _| Cell::bytes(client.leased_bytes)),
        column("OPEN", |client, _| Cell::count(client.reading)),
        column("PENDING", |client, _| Cell::count(client.pending)),
        wide("PRINCIPAL", |client, _| Cell::text(&client.principal)),
        wide("UID", |client, _| Cell::count(client.uid)),
        wide("PUTS", |client, _| Cell::count(client.puts)),
        wide("GETS", |client, _| Cell::count(client.gets)),
    ],
};

const LEASES: Kind<v1::LeaseInfo> = Kind {
    noun: "lease",
    name: |lease| lease.lease.to_string(),
    columns: &[
        column("LEASE", |lease, _| Cell::count(lease.lease)),
        column("SESSION", |lease, _| Cell::count(lease.session)),
        column("KEY", |lease, _| Cell::text(hex(&lease.key))),
        column("SHARD", |lease, _| Cell::count(lease.shard)),
        column("BYTES", |lease, _| Cell::bytes(lease.bytes)),
        column("AGE", |lease, _| Cell::milliseconds(lease.age_ms)),
    ],
};

const TENANTS: Kind<v1::TenantInfo> = Kind {
    noun: "tenant",
    name: |tenant| tenant.tenant.clone(),
    columns: &[
        column("TENANT", |tenant, _| Cell::text(&tenant.tenant)),
        column("BLOCKS", |tenant, _| Cell::count(tenant.blocks)),
        column("HOST", |tenant, _| Cell::bytes(tenant.host_bytes)),
        column("DISK", |tenant, _| Cell::bytes(tenant.disk_bytes)),
        column("PINNED", |tenant, _| Cell::bytes(tenant.pinned_bytes)),
        column("QUOTA", |tenant, _| match tenant.quota_bytes {
            None => Cell::number(u64::MAX, "none".into()),
            Some(quota) => Cell::bytes(quota),
        }),
        // No ratio: workers' own lookups in shared memory are hits when they read on, and no misses ever.
        column("HITS", |tenant, _| Cell::count(tenant.hits)),
        column("MISSES", |tenant, _| Cell::count(tenant.misses)),
        wide("PRINCIPAL", |tenant, _| Cell::text(&tenant.principal)),
    ],
};

const BLOCK_COLUMNS: &[Column<v1::BlockInfo>] = &[
    column("KEY", |block, _| Cell::text(hex(&block.key))),
    column("STATE", |block, _| Cell::state(&block.state)),
    column("TIERS", |block, _| Cell::text(tier_names(&block.tiers))),
    column("BYTES", |block, _| Cell::bytes(block.bytes)),
    column("LEASES", |block, _| Cell::count(block.leases)),
    column("FREQ", |block, _| Cell::count(block.frequency)),
    column("TENANT", |block, _| Cell::text(&block.tenant)),
    wide("PRINCIPAL", |block, _| Cell::text(&block.principal)),
    wide("SHARD", |block, _| Cell::count(block.shard)),
    wide("PRIORITY", |block, _| Cell::text(priority_name(block.priority))),
    wide("EXPIRES", |block, now| Cell::until(block.expires_at, now)),
    wide("PINNED", |block, now| Cell::until(block.pinned_until, now)),
    wide("MODEL", |block, _| Cell::text(&block.model)),
    wide("SLOT", |block, _| Cell::count(block.slot)),
    wide("GENERATION", |block, _| Cell::count(block.generation)),
    wide("DISK", |block, _| Cell::text(&block.disk_location)),
    wide("CHECKSUM", |block, _| Cell::text(format!("{:016x}", block.checksum))),
];

const BLOCKS: Kind<v1::BlockInfo> =
    Kind { noun: "block", name: |block| hex(&block.key), columns: BLOCK_COLUMNS };

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        listing: Listing,
    }

    fn tiers() -> v1::ListTiersResponse {
        let host = v1::TierInfo {
            tier: v1::Tier::Host.into(),
            state: "ok".into(),
            bytes_max: 2 << 30,
            bytes_used: 1 << 30,
            bytes_pinned: 64 << 20,
            blocks: 16_384,
            evicted_blocks: 7,
            notes: vec!["ordinary 4 KiB pages".into()],
            ..Default::default()
        };
        let disk = v1::TierInfo {
            tier: v1::Tier::Disk.into(),
            state: "degraded".into(),
            reason: "write p99 2.1s".into(),
            since: 1_000,
            bytes_max: 30 << 40,
            bytes_used: 10 << 40,
            ..host.clone()
        };
        let object = v1::TierInfo {
            tier: v1::Tier::Object.into(),
            state: "ok".into(),
            bytes_used: 3 << 30,
            blocks: 49_152,
            principal: "default".into(),
            notes: vec!["s3://bucket".into()],
            ..Default::default()
        };
        v1::ListTiersResponse { tiers: vec![host, disk, object] }
    }

    fn shown(line: &str) -> Result<String, Failure> {
        let listing = Line::try_parse_from(line.split_whitespace()).unwrap().listing;
        let mut answer = tiers();
        listed(
            &listing,
            &TIERS,
            |r: &mut v1::ListTiersResponse| &mut r.tiers,
            &mut answer,
            1_041,
            Paint::plain(),
        )
    }

    #[test]
    fn tiers_read_so() {
        let wanted = "\
TIER     SHARD   STATE         USED       MAX    USE%    PINNED   BLOCKS   EVICTED
host         0   ok          1.0GiB    2.0GiB   50.0%   64.0MiB    16384         7
disk         0   degraded   10.0TiB   30.0TiB   33.3%   64.0MiB    16384         7
object       -   ok          3.0GiB         -       -         -    49152         -
";
        assert_eq!(shown("get").unwrap(), wanted);
    }

    #[test]
    fn order_headers_and_formats_follow_the_flags() {
        let text = shown("get --sort-by -used --no-headers").unwrap();
        assert!(text.starts_with("disk"), "{text}");
        assert_eq!(shown("get -o name").unwrap(), "tier/host/0\ntier/disk/0\ntier/object/default\n");
        let wide = shown("get -o wide").unwrap();
        assert!(wide.contains("41s") && wide.contains("write p99 2.1s"), "{wide}");
        let json: serde_json::Value =
            serde_json::from_str(&shown("get -o json --sort-by tier").unwrap()).unwrap();
        assert_eq!(json["tiers"][0]["tier"], "disk");
        assert!(shown("get -o yaml").unwrap().starts_with("tiers:\n- tier: host\n  shard: 0\n"));
        assert_eq!(shown("get --sort-by colour").unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn a_tenant_without_quota_sorts_last() {
        let tenant = |name: &str, quota_bytes| v1::TenantInfo {
            tenant: name.into(),
            quota_bytes,
            ..Default::default()
        };
        let mut items = vec![tenant("free", None), tenant("tight", Some(1))];
        TENANTS.sort(&mut items, "quota", 0).unwrap();
        assert_eq!(TENANTS.names(&items), "tenant/tight\ntenant/free\n");
    }
}
