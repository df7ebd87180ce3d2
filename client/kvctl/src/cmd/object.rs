//! `kvctl object`: the object store that a node shares with others; and what several commands say of packs.

use clap::{Args, Subcommand};
use kv_api::v1;
use serde_json::json;

use crate::cli::{Format, Global, Listing, Show};
use crate::cmd::describe::missing;
use crate::cmd::get::{listed, priority_name};
use crate::connect::{self, Daemon};
use crate::exit::{Exit, Failure, printable};
use crate::out;
use crate::paint::{Ink, Paint};
use crate::structured::{self, hex};
use crate::table::{Cell, Kind, Look, column, fields, wide};
use crate::units::{bytes, count, counted, seconds};

/// Packs asked for at once.
const PAGE: u32 = 1_000;
/// How long a list or a round of a whole store may take, at least: the store is asked while we wait.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(300);
/// Why nothing may be listed.
pub(crate) const NO_PACKS: &str = "no pack is known here; `kvctl object ls` lists the store itself";
/// Digits of an id that a table shows.
const SHORT: usize = 12;
/// Fewest digits that may stand for an id.
const PREFIX_DIGITS_MIN: usize = 4;
/// What a GB of storage is to those who bill it.
const GB: f64 = (1u64 << 30) as f64;

const PRICES: &str = "\
The prices are those of S3 Standard in us-east-1; deleting is free. All requests
of this node count, those that find packs and keep order too; other nodes pay
for their own, storage is paid once.";

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// List every pack in the store, those that cannot be used too
    Ls(Listing),
    /// Begin a round of collection; delete what three rounds found unused
    Gc {
        /// Say what would go, delete nothing
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        show: Show,
    },
    /// What this node asked of the store, and about what it costs
    #[command(after_help = PRICES)]
    Cost {
        #[command(flatten)]
        prices: Prices,
        #[command(flatten)]
        show: Show,
    },
}

#[derive(Debug, Clone, Copy, Args)]
struct Prices {
    /// USD for 1000 requests that write or list
    #[arg(long, value_name = "USD", default_value_t = 0.005, value_parser = parse_price)]
    put_price: f64,
    /// USD for 1000 requests that read
    #[arg(long, value_name = "USD", default_value_t = 0.0004, value_parser = parse_price)]
    get_price: f64,
    /// USD for a GB stored a month
    #[arg(long, value_name = "USD", default_value_t = 0.023, value_parser = parse_price)]
    storage_price: f64,
}

fn parse_price(text: &str) -> Result<f64, String> {
    let price = text.strip_prefix('$').unwrap_or(text).parse().ok();
    let price = price.filter(|price: &f64| price.is_finite() && *price >= 0.0);
    price.ok_or_else(|| format!("`{text}` is no price; write it like 0.005"))
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let daemon = connect::connect(global).await?;
    match arguments.what {
        What::Ls(listing) => {
            out::watched(&listing.watch, async || {
                let mut answer = packs(&daemon, "", 0, true).await?;
                let total = total(&answer.packs);
                let text = listed(
                    &listing,
                    &PACKS,
                    |answer: &mut v1::ListPacksResponse| &mut answer.packs,
                    &mut answer,
                    out::now(),
                    Paint::stdout(),
                )?;
                let people = matches!(listing.show.output, Format::Table | Format::Wide);
                Ok((if people { text + &total } else { text }, Exit::Ok))
            })
            .await
        }
        What::Gc { dry_run, show } => {
            tiers(&daemon).await?;
            let patient = daemon.patient(daemon.timeout().max(PATIENCE));
            let request = patient.request(v1::CollectObjectsRequest { dry_run });
            let answer = patient.within(patient.admin().collect_objects(request)).await?;
            let text = structured::text(show.output, false, || structured::json(&answer));
            out::print(&text.unwrap_or_else(|| match show.output {
                Format::Name => deleted(&answer).map(|id| format!("pack/{id}\n")).collect(),
                _ => answer.collected.iter().map(|one| collected(one, dry_run)).collect(),
            }))?;
            Ok(Exit::Ok)
        }
        What::Cost { prices, show } => {
            let tiers = tiers(&daemon).await?;
            // Before it is open nothing of it is known.
            if let Some(closed) = tiers.iter().find(|tier| tier.circuit.is_empty()) {
                return Err(not_open(closed));
            }
            let text = structured::text(
                show.output,
                false,
                || json!({ "tiers": tiers.iter().map(|tier| Cost::of(tier, &prices).json(tier)).collect::<Vec<_>>() }),
            );
            let pages = || tiers.iter().map(|tier| Cost::of(tier, &prices).page(tier, Paint::stdout()));
            out::print(&text.unwrap_or_else(|| match show.output {
                Format::Name => {
                    tiers.iter().map(|tier| format!("tier/object/{}\n", tier.principal)).collect()
                }
                _ => pages().collect::<Vec<_>>().join("\n"),
            }))?;
            Ok(Exit::Ok)
        }
    }
}

/// The object tiers of a daemon; what to set when it has none.
pub(crate) async fn tiers(daemon: &Daemon) -> Result<Vec<v1::ObjectTierInfo>, Failure> {
    let request = daemon.request(v1::ListObjectTiersRequest {});
    let tiers = daemon.within(daemon.admin().list_object_tiers(request)).await?.tiers;
    if tiers.is_empty() {
        return Err(Failure::new(Exit::NotFound, "this node has no object tier").help(
            "set object.store to a directory, s3://BUCKET[/PREFIX] or az://ACCOUNT/CONTAINER[/PREFIX] in the \
             configuration, and restart kvd",
        ));
    }
    Ok(tiers)
}

fn not_open(tier: &v1::ObjectTierInfo) -> Failure {
    let why = if tier.reason.is_empty() { "it is being opened" } else { &tier.reason };
    Failure::new(Exit::Degraded, format!("the object store {} is not open yet: {why}", tier.store)).help(
        "ask again in a moment: it is tried by itself, and `kvctl describe tier object` says how it goes",
    )
}

/// Tells the person who removed blocks from this node what the object store still has.
pub(crate) async fn say_what_stays(daemon: &Daemon) {
    // Who may evict may not administer: then it is not known, and was not wanted enough to fail.
    let request = daemon.request(v1::ListTiersRequest {});
    let Ok(answer) = daemon.within(daemon.admin().list_tiers(request)).await else { return };
    if answer.tiers.iter().any(|tier| tier.tier() == v1::Tier::Object) {
        out::note(
            "note: what lies in the object store stays there until it expires, and can be read from there again",
        );
    }
}

/// Packs whose ids begin so, `limit` at most; 0 for all.
pub(crate) async fn packs(
    daemon: &Daemon,
    prefix: &str,
    limit: u64,
    rescan: bool,
) -> Result<v1::ListPacksResponse, Failure> {
    tiers(daemon).await?;
    let patient = if rescan {
        daemon.patient(daemon.timeout().max(PATIENCE))
    } else {
        daemon.patient(daemon.timeout())
    };
    let mut request = v1::ListPacksRequest { id_prefix: prefix.to_owned(), rescan, ..Default::default() };
    let mut all = v1::ListPacksResponse::default();
    loop {
        let left = if limit == 0 { u64::MAX } else { limit - all.packs.len() as u64 };
        request.page_size = left.min(PAGE.into()) as u32;
        let page = patient.within(patient.admin().list_packs(patient.request(request.clone()))).await?;
        all.packs.extend(page.packs);
        all.next_page_token = page.next_page_token;
        if all.next_page_token.is_empty() || (limit > 0 && all.packs.len() as u64 >= limit) {
            return Ok(all);
        }
        request.page_token.clone_from(&all.next_page_token);
    }
}

/// The beginning of an id, as `get packs -o name` or a table has it.
pub(crate) fn parse_pack_prefix(text: &str) -> Result<String, String> {
    let digits = text.strip_prefix("pack/").unwrap_or(text).to_ascii_lowercase();
    let hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if hex && digits.len() <= 64 { Ok(digits) } else { Err("not up to 64 hex digits".into()) }
}

/// The pack that `text` stands for, with all of its blocks.
pub(crate) async fn described(daemon: &Daemon, text: &str) -> Result<v1::DescribePackResponse, Failure> {
    let prefix = parse_pack_prefix(text).ok().filter(|prefix| prefix.len() >= PREFIX_DIGITS_MIN);
    let prefix = prefix.ok_or_else(|| {
        Failure::usage(format!("`{text}` names no pack"))
            .help("an id has 64 hex digits, of which the first few are enough; see `kvctl get packs`")
    })?;
    let found = packs(daemon, &prefix, 2, false).await?.packs;
    let [pack] = &found[..] else {
        return Err(match found.len() {
            0 => missing("pack", &prefix, "kvctl object ls"),
            _ => Failure::usage(format!("several packs begin with {prefix}"))
                .help(format!("list them with `kvctl get packs --prefix {prefix}`")),
        });
    };
    let mut request = v1::DescribePackRequest { id: pack.id.clone(), first_block: 0 };
    let mut all = v1::DescribePackResponse::default();
    loop {
        let part = daemon.within(daemon.admin().describe_pack(daemon.request(request.clone()))).await?;
        let more = !part.blocks.is_empty();
        if request.first_block == 0 {
            (all.pack, all.bindings) = (part.pack, part.bindings);
        }
        all.blocks.extend(part.blocks);
        request.first_block = all.blocks.len() as u64;
        let blocks = all.pack.as_ref().map_or(0, |pack| pack.blocks);
        if !more || request.first_block >= blocks {
            return Ok(all);
        }
    }
}

fn short(id: &[u8]) -> String {
    hex(id).chars().take(SHORT).collect()
}

/// What only a pack that can be read has.
fn if_read(pack: &v1::PackInfo, cell: Cell) -> Cell {
    match pack.state.as_str() {
        "ok" | "damaged" => cell,
        _ => Cell::number(0, "-".into()),
    }
}

/// As `get packs` and `object ls` list them.
pub(crate) const PACKS: Kind<v1::PackInfo> = Kind {
    noun: "pack",
    name: |pack| hex(&pack.id),
    columns: &[
        column("PACK", |pack, _| Cell::text(short(&pack.id))),
        column("STATE", |pack, _| Cell::state(&pack.state)),
        column("BYTES", |pack, _| Cell::bytes(pack.bytes)),
        column("BLOCKS", |pack, _| if_read(pack, Cell::count(pack.blocks))),
        column("WRITER", |pack, _| Cell::text(&pack.writer)),
        column("EXPIRES", |pack, now| if_read(pack, Cell::until(pack.expires_at, now))),
        column("LISTED", |pack, _| Cell::text(if pack.listed { "yes" } else { "no" })),
        column("TENANTS", |pack, _| Cell::text(pack.tenants.join(","))),
        wide("PRINCIPAL", |pack, _| Cell::text(&pack.principal)),
        wide("EPOCH", |pack, _| if_read(pack, Cell::count(pack.epoch))),
        wide("SEQUENCE", |pack, _| if_read(pack, Cell::count(pack.sequence))),
        wide("MODELS", |pack, _| Cell::text(pack.models.join(","))),
        wide("ID", |pack, _| Cell::text(hex(&pack.id))),
        column("REASON", |pack, _| Cell::text(&pack.reason)),
    ],
};

/// Under the list: how much of what.
fn total(packs: &[v1::PackInfo]) -> String {
    let sum = |of: fn(&v1::PackInfo) -> u64| packs.iter().map(of).sum::<u64>();
    let mut text = format!(
        "{}, {}, {}",
        counted(packs.len() as u64, "pack"),
        bytes(sum(|pack| pack.bytes)),
        counted(sum(|pack| pack.blocks), "block")
    );
    for state in ["damaged", "incompatible", "broken", "unread"] {
        let number = packs.iter().filter(|pack| pack.state == state).count() as u64;
        if number > 0 {
            text += &format!("; {} {state}", count(number));
        }
    }
    text + "\n"
}

fn deleted(answer: &v1::CollectObjectsResponse) -> impl Iterator<Item = String> {
    answer.collected.iter().flat_map(|one| &one.deleted_ids).map(|id| hex(id))
}

/// What a round came to, in words.
fn collected(one: &v1::Collected, dry_run: bool) -> String {
    let store = printable(&one.store);
    if one.round == 0 {
        return format!(
            "{store}: too early for another round (object.collect_every), or another node was first; nothing was \
             deleted. `--dry-run` looks all the same\n"
        );
    }
    let (begun, deleted) = if dry_run { (" would begin", "would be deleted") } else { ("", "deleted") };
    let mut text = format!(
        "{store}: round {}{begun}: {}, {} that nobody lists; {} {deleted}, {}\n",
        one.round,
        counted(one.packs, "pack"),
        count(one.condemned),
        count(one.deleted),
        bytes(one.deleted_bytes)
    );
    text.extend(one.deleted_ids.iter().map(|id| format!("  {}\n", hex(id))));
    let more = one.deleted - (one.deleted_ids.len() as u64).min(one.deleted);
    if more > 0 {
        text += &format!("  and {} more\n", count(more));
    }
    if !one.dead.is_empty() {
        let nodes: Vec<_> = one.dead.iter().map(|node| printable(node)).collect();
        text += &format!("  silent too long, and not counted any more: {}\n", nodes.join(", "));
    }
    text
}

/// One line of requests.
struct Row {
    kind: String,
    requests: u64,
    retries: u64,
    bytes: u64,
    failed: u64,
    usd: f64,
}

const ROWS: Kind<Row> = Kind {
    noun: "request",
    name: |row| row.kind.clone(),
    columns: &[
        column("KIND", |row, _| Cell::text(&row.kind)),
        column("REQUESTS", |row, _| Cell::number(row.requests, count(row.requests))),
        column("RETRIES", |row, _| Cell::number(row.retries, count(row.retries))),
        column("NOT-OK", |row, _| Cell::number(row.failed, count(row.failed))),
        column("BYTES", |row, _| Cell::bytes(row.bytes)),
        column("COST", |row, _| Cell::number(0, usd(row.usd))),
    ],
};

/// What a tier asked of its store and about what that costs.
struct Cost {
    rows: Vec<Row>,
    requests: u64,
    usd: f64,
    storage_usd_per_month: f64,
    /// `None` where there is nothing to divide by.
    per_block_written: Option<f64>,
    per_block_read: Option<f64>,
    requests_per_million_tokens: Option<f64>,
    usd_per_million_tokens: Option<f64>,
}

impl Cost {
    fn of(tier: &v1::ObjectTierInfo, prices: &Prices) -> Self {
        let row = |asked: &v1::StoreRequests| {
            let price = match asked.kind.as_str() {
                "put" | "list" => prices.put_price,
                "get" | "head" => prices.get_price,
                _ => 0.0,
            };
            Row {
                kind: asked.kind.clone(),
                requests: asked.requests,
                retries: asked.retries,
                bytes: asked.bytes,
                failed: asked.errors.values().sum(),
                usd: asked.requests as f64 / 1e3 * price,
            }
        };
        let rows: Vec<Row> = tier.requests.iter().map(row).collect();
        let of = |kinds: &[&str]| {
            let rows = rows.iter().filter(|row| kinds.contains(&row.kind.as_str()));
            rows.map(|row| row.requests).sum::<u64>()
        };
        let requests = rows.iter().map(|row| row.requests).sum();
        let usd = rows.iter().map(|row| row.usd).sum();
        let each = |part: f64, whole: u64| (whole > 0).then(|| part / whole as f64);
        let tokens = tier.served_tokens;
        Self {
            requests,
            usd,
            storage_usd_per_month: tier.pack_bytes as f64 / GB * prices.storage_price,
            per_block_written: each(of(&["put"]) as f64, tier.blocks_written),
            per_block_read: each(of(&["get", "head"]) as f64, tier.blocks_read),
            requests_per_million_tokens: each(requests as f64 * 1e6, tokens),
            usd_per_million_tokens: each(usd * 1e6, tokens),
            rows,
        }
    }

    fn page(&self, tier: &v1::ObjectTierInfo, paint: Paint) -> String {
        let each = |number: Option<f64>| number.map_or_else(|| "-".into(), |number| format!("{number:.3}"));
        let total = Row {
            kind: "total".into(),
            requests: self.requests,
            retries: self.rows.iter().map(|row| row.retries).sum(),
            bytes: self.rows.iter().map(|row| row.bytes).sum(),
            failed: self.rows.iter().map(|row| row.failed).sum(),
            usd: self.usd,
        };
        let head = fields(&[("Store", tier.store.clone()), ("Principal", tier.principal.clone())]);
        let look = Look { wide: false, headers: true, paint, now: 0 };
        let mut widths = Vec::new();
        // Twice: the line below may be the widest.
        ROWS.table(std::slice::from_ref(&total), &look, &mut widths);
        let table = ROWS.table(&self.rows, &look, &mut widths)
            + &ROWS.table(&[total], &Look { headers: false, ..look }, &mut widths);
        let table: String = table.lines().map(|line| format!("  {line}\n")).collect();
        let per_million = match (self.requests_per_million_tokens, self.usd_per_million_tokens) {
            (Some(requests), Some(cost)) => {
                format!("{} requests, {}", count(requests.round() as u64), usd(cost))
            }
            _ => "-".into(),
        };
        let written = format!("{}, {} puts each", count(tier.blocks_written), each(self.per_block_written));
        let read = format!("{}, {} gets each", count(tier.blocks_read), each(self.per_block_read));
        let served = format!(
            "{}, {}, {}",
            counted(tier.served_blocks, "block"),
            bytes(tier.served_bytes),
            counted(tier.served_tokens, "token")
        );
        let storage = format!(
            "{} in {}, {} a month",
            bytes(tier.pack_bytes),
            counted(tier.packs, "pack"),
            usd(self.storage_usd_per_month)
        );
        let tail = fields(&[
            ("Blocks written", written),
            ("Blocks read", read),
            ("Served", served),
            ("Per million tokens served", per_million),
            ("Storage", storage),
        ]);
        format!("{head}\n{}\n{table}\n{tail}", paint.ink(Ink::Head, "Requests since the start, by this node"))
    }

    fn json(&self, tier: &v1::ObjectTierInfo) -> serde_json::Value {
        let rows = self.rows.iter().map(|row| {
            json!({
                "kind": row.kind, "requests": row.requests, "retries": row.retries, "failed": row.failed,
                "bytes": row.bytes, "usd": row.usd,
            })
        });
        json!({
            "principal": tier.principal,
            "store": tier.store,
            "requests": rows.collect::<Vec<_>>(),
            "requests_total": self.requests,
            "usd_total": self.usd,
            "blocks_written": tier.blocks_written,
            "requests_per_block_written": self.per_block_written,
            "blocks_read": tier.blocks_read,
            "requests_per_block_read": self.per_block_read,
            "served_blocks": tier.served_blocks,
            "served_bytes": tier.served_bytes,
            "served_tokens": tier.served_tokens,
            "requests_per_million_tokens_served": self.requests_per_million_tokens,
            "usd_per_million_tokens_served": self.usd_per_million_tokens,
            "pack_bytes": tier.pack_bytes,
            "storage_usd_per_month": self.storage_usd_per_month,
        })
    }
}

/// `$1.20`, `$0.0004`, `$0`: two digits that matter.
fn usd(amount: f64) -> String {
    if amount == 0.0 {
        return "$0".into();
    }
    if amount < 1e-9 {
        return "<$0.000000001".into();
    }
    let digits = if amount >= 1.0 { 2 } else { (1 - amount.log10().floor() as i32).max(2) as usize };
    format!("${amount:.digits$}")
}

/// All that is known of a store, under what `get tiers` says of its tier.
pub(crate) fn tier_fields(tier: &v1::ObjectTierInfo) -> Vec<(&'static str, String)> {
    let kinds = tier.requests.iter().filter(|asked| asked.requests > 0);
    let asked: Vec<_> = kinds.map(|asked| format!("{} {}", asked.kind, count(asked.requests))).collect();
    let packs = format!(
        "{}, {} listed here, {} not read, {} that cannot be used",
        count(tier.packs),
        count(tier.packs_listed),
        count(tier.packs_unread),
        count(tier.packs_set_aside)
    );
    let window = format!("{} at once, {} now; cut {} times", tier.window, tier.under_way, tier.window_cuts);
    let circuit = format!(
        "{}; opened {} times, {} refused",
        tier.circuit,
        count(tier.circuit_opened),
        counted(tier.circuit_refused, "request")
    );
    let written = format!(
        "{} in {}; {} lost",
        counted(tier.blocks_written, "block"),
        counted(tier.packs_written, "pack"),
        count(tier.blocks_lost)
    );
    let read = format!(
        "{} with {}; {} failed their checksum, {} gone",
        counted(tier.blocks_read, "block"),
        counted(tier.reads, "request"),
        count(tier.checksum_failures),
        counted(tier.packs_gone, "pack")
    );
    let round = match tier.round_unreadable {
        Some(round) => format!("{}; {round} cannot be read, so that nothing is deleted", tier.round),
        None if tier.overwrites => {
            "none: the store writes over what is there, so that nothing is deleted".into()
        }
        None => tier.round.to_string(),
    };
    let opened = !tier.circuit.is_empty();
    let known = |text: String| if opened { text } else { String::new() };
    vec![
        ("Store", tier.store.clone()),
        ("Packs", known(packs)),
        (
            "Waiting",
            known(format!("{}, {} being written", bytes(tier.waiting_bytes), bytes(tier.writing_bytes))),
        ),
        ("Requests", asked.join("  ")),
        ("Window", known(window)),
        ("Circuit", known(circuit)),
        ("Last error", tier.last_error.clone()),
        ("Blocks up", known(written)),
        ("Blocks down", known(read)),
        ("Round", known(round)),
        (
            "Served",
            format!("{}, {}", counted(tier.served_blocks, "block"), counted(tier.served_tokens, "token")),
        ),
    ]
}

/// A line for each pack that cannot be used.
pub(crate) fn unusable(tier: &v1::ObjectTierInfo) -> String {
    let mut text = String::new();
    for pack in &tier.set_aside {
        text +=
            &format!("  {} is {}: {}\n", short(&pack.id), printable(&pack.state), printable(&pack.reason));
    }
    text
}

/// Blocks of a pack that are listed for people, unless they want all.
pub(crate) const BLOCKS_SHOWN: usize = 20;

const BINDINGS: Kind<v1::PackBinding> = Kind {
    noun: "binding",
    name: |binding| hex(&binding.scope_id),
    columns: &[
        column("TENANT", |binding, _| Cell::text(&binding.tenant)),
        column("MODEL", |binding, _| Cell::text(&binding.model)),
        column("DTYPE", |binding, _| Cell::text(&binding.dtype)),
        column("LAYOUT", |binding, _| Cell::text(&binding.layout)),
        column("TOKENS", |binding, _| Cell::count(binding.block_tokens)),
        column("SLICE", |binding, _| Cell::text(binding.slice.as_ref().map_or_else(String::new, slice))),
        column("BLOCK", |binding, _| Cell::bytes(binding.block_bytes)),
        column("BLOCKS", |binding, _| Cell::count(binding.blocks)),
    ],
};

/// Layers and heads as `--slice` takes them.
fn slice(slice: &v1::Slice) -> String {
    let v1::Slice { layer_start, layer_end, head_start, head_end, layers_total, heads_total } = slice;
    format!("{layer_start}..{layer_end}/{layers_total},{head_start}..{head_end}/{heads_total}")
}

const BLOCKS: Kind<v1::PackBlock> = Kind {
    noun: "block",
    name: |block| hex(&block.key),
    columns: &[
        column("KEY", |block, _| Cell::text(hex(&block.key))),
        column("OFFSET", |block, _| Cell::count(block.offset)),
        column("BYTES", |block, _| Cell::bytes(block.bytes)),
        column("EXPIRES", |block, now| Cell::until(block.expires_at, now)),
        column("PRIORITY", |block, _| Cell::text(priority_name(block.priority))),
        column("FOLLOWS", |block, _| Cell::text(if block.follows { "yes" } else { "no" })),
        column("CHECKSUM", |block, _| Cell::text(format!("{:016x}", block.checksum))),
    ],
};

/// All that is known of a pack, with the first `blocks_max` of its blocks.
pub(crate) fn pack_page(
    answer: &v1::DescribePackResponse,
    blocks_max: usize,
    now: u64,
    paint: Paint,
) -> String {
    let pack = answer.pack.clone().unwrap_or_default();
    let readable = !pack.writer.is_empty();
    let known = |text: String| if readable { text } else { String::new() };
    let expires = match pack.expires_at {
        0 => "some of its blocks never do".into(),
        at if at <= now => "it has".into(),
        at => format!("in {}", seconds(at - now)),
    };
    let writer = format!("{}, epoch {}, pack {} of it", pack.writer, pack.epoch, pack.sequence);
    let head = fields(&[
        ("Pack", hex(&pack.id)),
        ("Principal", pack.principal.clone()),
        ("State", pack.state.clone()),
        ("Reason", pack.reason.clone()),
        ("Bytes", format!("{} ({})", count(pack.bytes), bytes(pack.bytes))),
        ("Blocks", known(count(pack.blocks))),
        ("Damaged", known(count(pack.damaged_blocks))),
        ("Writer", known(writer)),
        ("Expires", known(expires)),
        ("Listed here", if pack.listed { "yes" } else { "no" }.into()),
    ]);
    let look = Look { wide: true, headers: true, paint, now };
    let shown = &answer.blocks[..answer.blocks.len().min(blocks_max)];
    let mut blocks = BLOCKS.table(shown, &look, &mut Vec::new());
    if answer.blocks.len() > shown.len() {
        let more = (answer.blocks.len() - shown.len()) as u64;
        blocks += &format!("and {} more; -o wide has them all\n", count(more));
    }
    let sections = [
        (
            "Stored under",
            BINDINGS.table(&answer.bindings, &look, &mut Vec::new()),
            answer.bindings.is_empty(),
        ),
        ("Blocks, as they lie", blocks, answer.blocks.is_empty()),
    ];
    let section = |(title, text, empty): &(&str, String, bool)| {
        let lines: String = text.lines().map(|line| format!("  {line}\n")).collect();
        if *empty { String::new() } else { format!("\n{}\n{lines}", paint.ink(Ink::Head, title)) }
    };
    head + &sections.iter().map(section).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(kind: &str, requests: u64, retries: u64, bytes: u64) -> v1::StoreRequests {
        v1::StoreRequests {
            kind: kind.into(),
            requests,
            retries,
            bytes,
            well: requests,
            ..Default::default()
        }
    }

    fn tier() -> v1::ObjectTierInfo {
        v1::ObjectTierInfo {
            principal: "default".into(),
            store: "s3://kv-blocks".into(),
            packs: 1_000,
            pack_bytes: 32_000 << 20,
            requests: vec![
                asked("put", 1_200, 3, 32_000 << 20),
                asked("get", 500, 0, 2_000 << 20),
                asked("head", 0, 0, 0),
                asked("list", 800, 0, 0),
                asked("delete", 20, 0, 0),
            ],
            blocks_written: 512_000,
            blocks_read: 32_000,
            served_blocks: 32_000,
            served_bytes: 2_000 << 20,
            served_tokens: 512_000,
            ..Default::default()
        }
    }

    const S3: Prices = Prices { put_price: 0.005, get_price: 0.0004, storage_price: 0.023 };

    #[test]
    fn what_it_costs_reads_so() {
        let wanted = "\
Store:      s3://kv-blocks
Principal:  default

Requests since the start, by this node
  KIND     REQUESTS   RETRIES   NOT-OK     BYTES       COST
  put         1,200         3        0   31.2GiB    $0.0060
  get           500         0        0    2.0GiB   $0.00020
  head            0         0        0        0B         $0
  list          800         0        0        0B    $0.0040
  delete         20         0        0        0B         $0
  total       2,520         3        0   33.2GiB     $0.010

Blocks written:             512,000, 0.002 puts each
Blocks read:                32,000, 0.016 gets each
Served:                     32,000 blocks, 2.0GiB, 512,000 tokens
Per million tokens served:  4,922 requests, $0.020
Storage:                    31.2GiB in 1,000 packs, $0.72 a month
";
        let page = Cost::of(&tier(), &S3).page(&tier(), Paint::plain());
        assert_eq!(page, wanted, "\n{page}");
    }

    #[test]
    fn where_nothing_was_served_nothing_is_divided() {
        let idle = v1::ObjectTierInfo { requests: vec![asked("list", 3, 0, 0)], ..Default::default() };
        let cost = Cost::of(&idle, &S3);
        let page = cost.page(&idle, Paint::plain());
        assert!(page.contains("Per million tokens served:  -\n"), "{page}");
        assert!(page.contains("Blocks written:             0, - puts each\n"), "{page}");
        let json = cost.json(&idle);
        assert_eq!(json["usd_per_million_tokens_served"], serde_json::Value::Null);
        assert!((json["usd_total"].as_f64().unwrap() - 0.000_015).abs() < 1e-12, "{json}");
    }

    #[test]
    fn money_is_told_in_two_digits_that_matter() {
        for (amount, text) in [
            (0.0, "$0"),
            (1e-12, "<$0.000000001"),
            (0.000_123_4, "$0.00012"),
            (0.0042, "$0.0042"),
            (0.5, "$0.50"),
            (12.345, "$12.35"),
        ] {
            assert_eq!(usd(amount), text, "{amount}");
        }
        assert_eq!(parse_price("$0.005"), Ok(0.005));
        for wrong in ["", "-1", "inf", "NaN", "much"] {
            assert!(parse_price(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_round_says_what_went_or_why_nothing_did() {
        let early = v1::Collected { store: "s3://b".into(), ..Default::default() };
        assert!(collected(&early, false).contains("too early"), "{}", collected(&early, false));
        let round = v1::Collected {
            store: "s3://b".into(),
            round: 7,
            packs: 12,
            condemned: 3,
            deleted: 2,
            deleted_bytes: 64 << 20,
            deleted_ids: vec![vec![0xab; 32].into()],
            dead: vec!["gpu-7".into()],
            ..Default::default()
        };
        let ab = "ab".repeat(32);
        let wanted = format!(
            "s3://b: round 7: 12 packs, 3 that nobody lists; 2 deleted, 64.0MiB\n  {ab}\n  and 1 more\n  silent \
             too long, and not counted any more: gpu-7\n"
        );
        assert_eq!(collected(&round, false), wanted);
        assert!(
            collected(&round, true)
                .contains("round 7 would begin: 12 packs, 3 that nobody lists; 2 would be")
        );
    }

    #[test]
    fn packs_read_so() {
        let ok = v1::PackInfo {
            id: vec![0xab; 32].into(),
            principal: "default".into(),
            bytes: 32 << 20,
            state: "ok".into(),
            blocks: 512,
            writer: "gpu-a".into(),
            epoch: 7,
            sequence: 3,
            expires_at: 160,
            listed: true,
            tenants: vec!["team-a".into(), "team-b".into()],
            ..Default::default()
        };
        let newer = v1::PackInfo {
            id: vec![0x01; 32].into(),
            bytes: 9 << 20,
            state: "incompatible".into(),
            reason: "version 2".into(),
            ..Default::default()
        };
        let packs = [ok, newer];
        let look = Look { wide: false, headers: true, paint: Paint::plain(), now: 100 };
        let wanted = "\
PACK           STATE            BYTES   BLOCKS   WRITER   EXPIRES   LISTED   TENANTS         REASON
abababababab   ok             32.0MiB      512   gpu-a         1m   yes      team-a,team-b   -
010101010101   incompatible    9.0MiB        -   -              -   no       -               version 2
";
        let table = PACKS.table(&packs, &look, &mut Vec::new());
        assert_eq!(table, wanted, "\n{table}");
        assert_eq!(total(&packs), "2 packs, 41.0MiB, 512 blocks; 1 incompatible\n");
        assert_eq!(PACKS.names(&packs[1..]), format!("pack/{}\n", "01".repeat(32)));
        assert_eq!(parse_pack_prefix("pack/AB01"), Ok("ab01".into()));
        assert!(parse_pack_prefix("xy").is_err() && parse_pack_prefix(&"0".repeat(65)).is_err());
    }

    #[test]
    fn a_pack_is_described_with_some_of_its_blocks() {
        let block = |n: u8| v1::PackBlock {
            key: vec![n; 16].into(),
            offset: 16,
            bytes: 4096,
            checksum: 255,
            priority: v1::Priority::High.into(),
            follows: n > 1,
            ..Default::default()
        };
        let pack =
            v1::PackInfo { state: "ok".into(), writer: "a".into(), blocks: 3, ..v1::PackInfo::default() };
        let binding = v1::PackBinding {
            tenant: "team-a".into(),
            model: "m".into(),
            slice: Some(v1::Slice {
                layer_end: 2,
                head_end: 4,
                layers_total: 2,
                heads_total: 4,
                ..Default::default()
            }),
            block_bytes: 4096,
            blocks: 3,
            ..Default::default()
        };
        let answer = v1::DescribePackResponse {
            pack: Some(pack),
            bindings: vec![binding],
            blocks: (1..=3).map(block).collect(),
        };
        let page = pack_page(&answer, 2, 0, Paint::plain());
        assert!(page.contains("0..2/2,0..4/4") && page.contains("00000000000000ff"), "{page}");
        assert!(page.contains("  and 1 more; -o wide has them all\n"), "{page}");
        assert!(!pack_page(&answer, usize::MAX, 0, Paint::plain()).contains("more;"));
        let broken =
            v1::PackInfo { state: "broken".into(), reason: "not a pack".into(), ..Default::default() };
        let answer = v1::DescribePackResponse { pack: Some(broken), ..Default::default() };
        let page = pack_page(&answer, 2, 0, Paint::plain());
        assert!(page.contains("not a pack") && !page.contains("Stored under"), "{page}");
    }
}
