//! What operators ask about the object tiers of a node, in the words of the protocol.

use std::collections::{BTreeSet, HashMap};
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_api::{convert, v1};
use kv_block::code::Code;
use kv_block::{BlockKey, Fault};
use kv_node::ShardReport;
use kv_object::circuit::Standing;
use kv_object::index::Known;
use kv_object::pack::{Binding, PackId};
use kv_object::tier::{Collected, Inside, PackView, SetAside, TierReport, Verified};
use kv_object::{Tier, TierError};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{Shared, status, too_late};
use crate::node::Node;
use crate::object::{ObjectView, Objects, Principal, unix_now};

/// Packs of a page, and in all.
const PAGE_DEFAULT: u32 = 100;
const PAGE_MAX: u32 = 1000;
/// A page ends early when what its packs say of themselves is longer than so many bytes.
const PAGE_BYTES_MAX: usize = 1 << 20;
/// Packs set aside that a tier tells of.
const ASIDE_MAX: usize = 100;
/// Bindings that are looked at for tenants and models, and tenants and models told of one pack.
const ABOUTS_MAX: usize = 64;
const NAMES_MAX: usize = 8;
/// Bindings and blocks of one answer about a pack.
const BINDINGS_MAX: usize = 256;
const BLOCKS_MAX: usize = 10_000;
/// Deleted packs that are named.
const DELETED_MAX: usize = 1000;

/// An open tier, and whose it is.
type Open<'a> = (&'a Principal, Arc<Tier>);
type Progress = Result<v1::Progress, Status>;

impl Shared {
    /// The object tiers, one of each principal; none where there is no store.
    pub(super) fn object_views(&self) -> Vec<ObjectView> {
        let all = self.objects.iter().flat_map(Objects::all);
        all.map(|principal| principal.view()).collect()
    }

    /// The object tiers as messages.
    pub(super) fn object_tiers(&self) -> Vec<v1::ObjectTierInfo> {
        self.object_views().iter().map(object_tier).collect()
    }

    /// The object tiers; a fault that says what to set where there are none.
    fn objects(&self) -> Result<&Objects, Status> {
        self.objects.as_ref().ok_or_else(|| {
            let text = "this node has no object tier: set object.store to a directory, s3://BUCKET[/PREFIX] or \
                        az://ACCOUNT/CONTAINER[/PREFIX]";
            status(Fault::new(Code::BadRequest, text))
        })
    }

    fn open_objects(&self) -> Result<(&Objects, Vec<Open<'_>>), Status> {
        let objects = self.objects()?;
        Ok((objects, objects.open().map_err(status)?))
    }

    /// The pack of one of these principals' stores that has a block.
    pub(super) fn pack_of(&self, principals: Range<usize>, key: &BlockKey) -> Option<PackId> {
        let objects = self.objects.as_ref()?;
        let now = unix_now();
        principals.into_iter().find_map(|number| objects.of(number)?.tier()?.pack_of(now, key))
    }

    pub(super) async fn list_packs(
        &self,
        request: v1::ListPacksRequest,
    ) -> Result<v1::ListPacksResponse, Status> {
        let (objects, open) = self.open_objects()?;
        let ids = beginning_with(&request.id_prefix).map_err(status)?;
        let (first, from) = match request.page_token.as_str() {
            "" => (0, *ids.start()),
            token => page(token).map_err(status)?,
        };
        if request.rescan && request.page_token.is_empty() {
            for (principal, tier) in &open {
                let tier = Arc::clone(tier);
                let listed = objects.run(async move { tier.rescan().await }).await;
                listed.map_err(|error| failed(&principal.place.to_string(), &error))?;
            }
        }
        let count = match request.page_size {
            0 => PAGE_DEFAULT,
            size => size.min(PAGE_MAX),
        } as usize;
        let (mut packs, mut bytes) = (Vec::new(), 0);
        for (number, (principal, tier)) in open.iter().enumerate().skip(first) {
            let from = if number == first { from } else { *ids.start() };
            // One more than there is room for tells that it goes on.
            for view in tier.inventory(from..=*ids.end(), count - packs.len() + 1) {
                if packs.len() == count || bytes > PAGE_BYTES_MAX {
                    let next_page_token = format!("{number}.{}", view.id);
                    return Ok(v1::ListPacksResponse { packs, next_page_token });
                }
                let pack = pack_info(&principal.name, &view);
                bytes += pack.tenants.iter().chain(&pack.models).map(String::len).sum::<usize>();
                packs.push(pack);
            }
        }
        Ok(v1::ListPacksResponse { packs, next_page_token: String::new() })
    }

    pub(super) fn describe_pack(
        &self,
        request: &v1::DescribePackRequest,
    ) -> Result<v1::DescribePackResponse, Status> {
        let (_, open) = self.open_objects()?;
        let bad = |text: String| status(Fault::new(Code::BadRequest, text));
        let id: [u8; 32] =
            request.id[..].try_into().map_err(|_| bad("an id of a pack has 32 bytes".into()))?;
        let id = PackId(id);
        let found = open.iter().find_map(|(principal, tier)| {
            Some((pack_info(&principal.name, tier.inventory(id..=id, 1).first()?), tier.pack(&id)))
        });
        let Some((pack, known)) = found else {
            return Err(bad(format!("no pack {id} is known here; list them with `rescan`")));
        };
        let first = usize::try_from(request.first_block).unwrap_or(usize::MAX);
        let known = known.as_ref();
        let bindings = known.filter(|_| first == 0).map_or_else(Vec::new, bindings);
        let blocks = known.into_iter().flat_map(|known| known.entries().skip(first).take(BLOCKS_MAX));
        let blocks = blocks.map(|entry| v1::PackBlock {
            key: Bytes::copy_from_slice(entry.record.key.as_bytes()),
            offset: entry.offset.into(),
            bytes: entry.record.bytes,
            checksum: entry.record.checksum.0,
            expires_at: entry.record.expires_at.into(),
            priority: convert::priority_message(entry.record.priority).into(),
            follows: entry.follows,
        });
        Ok(v1::DescribePackResponse { pack: Some(pack), bindings, blocks: blocks.collect() })
    }

    /// Begins a round in each store, one after the other. One that has begun goes on when nobody waits for it any more.
    pub(super) async fn collect_objects(&self, dry_run: bool) -> Result<v1::CollectObjectsResponse, Status> {
        let (objects, open) = self.open_objects()?;
        let mut collected = Vec::new();
        for (principal, tier) in open {
            let round = objects.run(async move { tier.collect(dry_run).await }).await;
            let round = round.map_err(|error| failed(&principal.place.to_string(), &error))?;
            collected.push(told(&principal.name, principal.place.to_string(), &round));
        }
        Ok(v1::CollectObjectsResponse { collected })
    }

    /// Reads every pack of every store and compares the blocks, until the caller leaves or its time is over.
    pub(super) fn verify_objects(&self, until: Option<Instant>) -> Result<ReceiverStream<Progress>, Status> {
        let (objects, open) = self.open_objects()?;
        let tiers = open.into_iter().map(|(principal, tier)| (principal.place.to_string(), tier)).collect();
        let (sender, receiver) = mpsc::channel(4);
        objects.spawn(async move {
            // Nothing is left undone when it is dropped.
            tokio::select! {
                () = verify(tiers, &sender) => {}
                () = sender.closed() => {}
                () = over(until) => {
                    let _ = sender.send(Err(too_late("reading the packs"))).await;
                }
            }
        });
        Ok(ReceiverStream::new(receiver))
    }
}

/// At that time, or never.
async fn over(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until.into()).await,
        None => std::future::pending().await,
    }
}

/// Says what goes for blocks that are to be removed one by one or by tenant.
pub(super) fn refuse_to_remove() -> Status {
    let text = "field `tier` is object: a pack goes as a whole, when it expires (object.ttl, or the blocks' own time) or \
                when no node lists it any more (`kvctl object gc`)";
    status(Fault::new(Code::BadRequest, text))
}

async fn verify(tiers: Vec<(String, Arc<Tier>)>, sender: &mpsc::Sender<Progress>) {
    let all = PackId([0; 32])..=PackId([0xff; 32]);
    let mut packs = Vec::new();
    for (place, tier) in &tiers {
        for view in tier.inventory(all.clone(), usize::MAX) {
            match view.inside {
                Inside::Blocks { blocks, .. } => {
                    packs.push((place, tier, view.id, blocks as u64, view.pack_bytes));
                }
                // How many blocks it had nobody can say.
                Inside::Aside(SetAside::Broken { .. }) => {
                    packs.push((place, tier, view.id, 0, view.pack_bytes));
                }
                // Of another version, or not read yet: nothing is wrong with it as far as anybody knows.
                Inside::Aside(SetAside::Incompatible { .. }) | Inside::Unread => {}
            }
        }
    }
    let total = packs.iter().map(|(.., blocks, _)| blocks).sum();
    let mut progress = v1::Progress { total, ..v1::Progress::default() };
    for (place, tier, id, blocks, bytes) in packs {
        let _ = sender.try_send(Ok(progress));
        let damaged = match tier.verify(&id).await {
            Ok(Verified::Sound { .. }) => 0,
            // Where what lies around the blocks is damaged, the next life of a node can read none of them.
            Ok(Verified::Damaged { error, blocks: damaged }) => {
                tracing::warn!(%id, %place, %error, blocks = damaged.len(), "a pack is damaged");
                // One, where it is not known how many.
                if damaged.is_empty() { blocks.max(1) } else { damaged.len() as u64 }
            }
            Ok(Verified::Incompatible) => {
                tracing::warn!(%id, %place, "a pack is not any more what it was");
                blocks
            }
            // It was collected meanwhile.
            Ok(Verified::Absent) => {
                progress.total -= blocks;
                continue;
            }
            Err(error) => {
                let _ = sender.send(Err(failed(place, &error))).await;
                return;
            }
        };
        progress.done += blocks;
        progress.failed += damaged;
        progress.bytes += bytes;
    }
    let _ = sender.send(Ok(v1::Progress { finished: true, ..progress })).await;
}

fn failed(place: &str, error: &TierError) -> Status {
    let fault = Fault::new(Code::TierDegraded, format!("{place}: {error}"));
    status(match error {
        TierError::Request(_) => fault.retry_after(Duration::from_secs(1)),
        // Somebody has to do something about it.
        _ => fault,
    })
}

/// The ids that begin with these hex digits.
fn beginning_with(digits: &str) -> Result<RangeInclusive<PackId>, Fault> {
    let bad = || Fault::new(Code::BadRequest, format!("id prefix `{digits}` is not up to 64 hex digits"));
    let fill = |with: char| {
        let digits = digits.to_ascii_lowercase();
        let all = digits.chars().chain(std::iter::repeat(with)).take(64.max(digits.len()));
        all.collect::<String>().parse::<PackId>().map_err(|_| bad())
    };
    Ok(fill('0')?..=fill('f')?)
}

/// Number of the principal and first pack of a page.
fn page(token: &str) -> Result<(usize, PackId), Fault> {
    let parts = token.split_once('.').and_then(|(number, id)| Some((number.parse().ok()?, id.parse().ok()?)));
    let bad = || Fault::new(Code::BadRequest, format!("`{token}` is not a page token of this daemon"));
    parts.ok_or_else(bad)
}

/// A pack as a message.
fn pack_info(principal: &str, view: &PackView) -> v1::PackInfo {
    let common = v1::PackInfo {
        id: Bytes::copy_from_slice(&view.id.0),
        principal: principal.to_owned(),
        bytes: view.pack_bytes,
        listed: view.listed,
        ..v1::PackInfo::default()
    };
    let state = |state: &str, reason: String| v1::PackInfo { state: state.into(), reason, ..common.clone() };
    match &view.inside {
        Inside::Blocks { writer, blocks, spoilt, expires_at, bindings } => {
            let (word, reason) = match spoilt {
                0 => ("ok", String::new()),
                spoilt => ("damaged", format!("{spoilt} of its blocks fail their checksum")),
            };
            let abouts: Vec<About> = bindings.iter().take(ABOUTS_MAX).map(About::of).collect();
            let names = |field: &str| {
                let names: BTreeSet<String> = abouts.iter().map(|about| about.text(field)).collect();
                names.into_iter().filter(|name| !name.is_empty()).take(NAMES_MAX).collect()
            };
            v1::PackInfo {
                blocks: *blocks as u64,
                damaged_blocks: (*spoilt).into(),
                writer: writer.node.clone(),
                epoch: writer.epoch.0,
                sequence: writer.sequence,
                expires_at: (*expires_at).into(),
                tenants: names("tenant"),
                models: names("model"),
                ..state(word, reason)
            }
        }
        Inside::Aside(SetAside::Incompatible { version }) => {
            state("incompatible", format!("version {version}, this is a reader of version {VERSION}"))
        }
        Inside::Aside(SetAside::Broken { why }) => state("broken", why.clone()),
        Inside::Unread => state("unread", "its footer could not be read yet".into()),
    }
}

const VERSION: u32 = kv_object::pack::VERSION;

/// What a writer said of a scope, for people. It may be nothing, or not what we would say.
struct About(serde_json::Value);

impl About {
    fn of(binding: &Binding) -> Self {
        Self(serde_json::from_str(&binding.about).unwrap_or_default())
    }

    fn text(&self, field: &str) -> String {
        self.0.get(field).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
    }

    fn number(&self, field: &str) -> u32 {
        let number = self.0.get(field).and_then(serde_json::Value::as_u64);
        number.and_then(|number| u32::try_from(number).ok()).unwrap_or_default()
    }
}

/// What the blocks of a pack were stored under.
fn bindings(known: &Known) -> Vec<v1::PackBinding> {
    let mut blocks = HashMap::new();
    for record in known.records() {
        *blocks.entry(record.tag).or_default() += 1;
    }
    let binding = |binding: &Binding| {
        let about = About::of(binding);
        v1::PackBinding {
            scope_id: Bytes::copy_from_slice(binding.scope.as_bytes()),
            tenant: about.text("tenant"),
            model: about.text("model"),
            dtype: about.text("dtype"),
            layout: about.text("layout"),
            block_tokens: about.number("block_tokens"),
            slice: Some(convert::slice_message(&binding.slice)),
            block_bytes: binding.block_bytes,
            blocks: blocks.get(&binding.tag()).copied().unwrap_or_default(),
        }
    };
    known.bindings.iter().take(BINDINGS_MAX).map(binding).collect()
}

/// What a collection came to, as a message.
fn told(principal: &str, store: String, round: &Collected) -> v1::Collected {
    let ids = round.deleted.iter().take(DELETED_MAX);
    v1::Collected {
        principal: principal.to_owned(),
        store,
        round: round.round,
        packs: round.packs as u64,
        condemned: round.condemned as u64,
        deleted: round.deleted.len() as u64,
        deleted_bytes: round.deleted_bytes,
        deleted_ids: ids.map(|id| Bytes::copy_from_slice(&id.0)).collect(),
        dead: round.dead.clone(),
    }
}

/// An object tier as a message.
fn object_tier(view: &ObjectView) -> v1::ObjectTierInfo {
    let (served_blocks, served_bytes, served_tokens) = view.served;
    let known = view.report.as_ref().map(|report| known(&view.principal, report)).unwrap_or_default();
    v1::ObjectTierInfo {
        principal: view.principal.clone(),
        store: view.place.to_string(),
        state: view.state().into(),
        reason: view.trouble.clone().unwrap_or_default(),
        served_blocks,
        served_bytes,
        served_tokens,
        ..known
    }
}

/// What is known of a tier that is open.
fn known(principal: &str, report: &TierReport) -> v1::ObjectTierInfo {
    let aside = report.set_aside.iter().take(ASIDE_MAX).map(|(id, why)| {
        let inside = Inside::Aside(why.clone());
        pack_info(principal, &PackView { id: *id, pack_bytes: 0, listed: false, inside })
    });
    let (requests, totals) = (&report.requests, &report.totals);
    let asked = requests.counts.iter().map(|(kind, count)| v1::StoreRequests {
        kind: kind.name().into(),
        requests: count.requests,
        retries: count.retries,
        bytes: count.bytes,
        well: count.well,
        errors: count.errors.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect(),
    });
    v1::ObjectTierInfo {
        packs: report.packs as u64,
        pack_bytes: report.pack_bytes,
        blocks: report.blocks as u64,
        packs_listed: report.packs_listed as u64,
        packs_unread: report.packs_unread as u64,
        packs_set_aside: report.set_aside.len() as u64,
        set_aside: aside.collect(),
        waiting_bytes: report.waiting_bytes,
        writing_bytes: report.writing_bytes,
        round: report.round,
        round_unreadable: report.round_unreadable,
        overwrites: report.overwrites,
        circuit: match requests.circuit {
            Standing::Closed => "closed",
            Standing::Open { .. } => "open",
            Standing::Trying { .. } => "trying",
        }
        .into(),
        circuit_opened: requests.circuit_opened,
        circuit_refused: requests.circuit_refused,
        window: requests.window,
        under_way: requests.under_way,
        window_cuts: requests.cuts,
        last_error: requests.last_error.clone().unwrap_or_default(),
        requests: asked.collect(),
        packs_written: totals.packs_written,
        blocks_written: totals.blocks_written,
        blocks_lost: totals.blocks_lost,
        blocks_read: totals.blocks_read,
        bytes_used: totals.bytes_used,
        bytes_read: totals.bytes_read,
        reads: totals.reads,
        checksum_failures: totals.checksum_failures,
        packs_gone: totals.packs_gone,
        ..v1::ObjectTierInfo::default()
    }
}
/// An object tier among the tiers of a node. It belongs to all shards of its principal; the first one stands for it.
pub(super) fn tier_info(view: &ObjectView, reports: &[ShardReport], node: &Node) -> v1::TierInfo {
    let principal = node.principals.iter().find(|principal| principal.name == view.principal);
    let shards = principal.map_or(0..0, |principal| principal.shards.clone());
    let total = |of: fn(&ShardReport) -> u64| reports[shards.clone()].iter().map(of).sum::<u64>();
    let report = view.report.as_ref();
    let mut notes = vec![view.place.to_string()];
    if let Some(report) = report {
        notes.push(format!("{} packs, {} of them in use here", report.packs, report.packs_listed));
        if report.packs_unread > 0 {
            notes.push(format!("{} packs are not read yet", report.packs_unread));
        }
        if !report.set_aside.is_empty() {
            notes.push(format!("{} packs cannot be used", report.set_aside.len()));
        }
    }
    v1::TierInfo {
        tier: v1::Tier::Object.into(),
        shard: shards.start as u32,
        bytes_used: report.map_or(0, |report| report.pack_bytes),
        blocks: report.map_or(0, |report| report.blocks as u64),
        state: view.state().into(),
        reason: view.trouble.clone().unwrap_or_default(),
        notes,
        bytes_written: total(|report| report.counters.upload_bytes),
        bytes_read: total(|report| report.counters.download_bytes),
        principal: view.principal.clone(),
        ..v1::TierInfo::default()
    }
}

/// What is wrong with the object tiers.
pub(super) fn warnings(views: &[ObjectView]) -> Vec<v1::Warning> {
    let warn = |view: &ObjectView| {
        let why = view.trouble.as_ref()?;
        let text = format!("object store: {why} ({})", view.place);
        Some(v1::Warning { code: Code::TierDegraded.to_string(), text })
    };
    let unreadable = |view: &ObjectView| {
        let round = view.report.as_ref()?.round_unreadable?;
        let text = format!(
            "round {round} of collection in {} cannot be read: nothing is deleted there until it is removed",
            view.place
        );
        Some(v1::Warning { code: Code::TierDegraded.to_string(), text })
    };
    let unheard = |view: &ObjectView| {
        let nodes = &view.report.as_ref()?.unheard;
        (!nodes.is_empty()).then(|| {
            let text = format!(
                "manifests of {} cannot be read: nothing is collected as long as they count; are they of another version? ({})",
                nodes.join(", "),
                view.place
            );
            v1::Warning { code: Code::TierDegraded.to_string(), text }
        })
    };
    let overwrites = |view: &ObjectView| {
        view.report.as_ref().filter(|report| report.overwrites)?;
        let text = format!(
            "{} writes over what is there: nothing is collected there; have a rule of the bucket expire objects",
            view.place
        );
        Some(v1::Warning { code: Code::TierDegraded.to_string(), text })
    };
    views
        .iter()
        .flat_map(|view| [warn(view), unreadable(view), unheard(view), overwrites(view)])
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use kv_block::{ScopeId, Slice};

    use super::*;

    fn binding(about: &str) -> Binding {
        Binding {
            scope: ScopeId([7; 32]),
            slice: Slice::whole(1, 1),
            block_bytes: 64,
            about: about.to_owned(),
        }
    }

    #[test]
    fn a_prefix_stands_for_all_ids_that_begin_so() {
        let all = beginning_with("").unwrap();
        assert_eq!((all.start().0, all.end().0), ([0; 32], [0xff; 32]));
        let some = beginning_with("aB3").unwrap();
        assert!(some.start().to_string().starts_with("ab300") && some.end().to_string().starts_with("ab3ff"));
        let one = beginning_with(&"5".repeat(64)).unwrap();
        assert_eq!(one.start(), one.end());
        for wrong in ["x", "0x12", &"0".repeat(65)] {
            assert_eq!(beginning_with(wrong).unwrap_err().code, Code::BadRequest, "{wrong}");
        }
        assert_eq!(page(&format!("3.{}", "5".repeat(64))).unwrap(), (3, *one.start()));
        assert!(page("3").is_err() && page("x.55").is_err());
    }

    #[test]
    fn what_a_pack_says_of_its_scopes_is_told_as_far_as_it_goes() {
        let abouts = [
            r#"{"tenant":"team-a","model":"m","block_tokens":16,"new_in_a_later_version":[1]}"#,
            r#"{"tenant":7,"model":"n"}"#,
            "[1, 2]",
            "",
            "not JSON",
        ];
        let about = About::of(&binding(abouts[0]));
        assert_eq!((about.text("tenant"), about.number("block_tokens")), ("team-a".into(), 16));
        assert_eq!((about.text("dtype"), about.number("tenant")), (String::new(), 0));
        let writer = kv_object::pack::Writer { node: "a".into(), epoch: kv_block::Epoch(1), sequence: 1 };
        let inside = Inside::Blocks {
            writer,
            blocks: 9,
            spoilt: 2,
            expires_at: 0,
            bindings: abouts.map(binding).into(),
        };
        let view = PackView { id: PackId([1; 32]), pack_bytes: 5, listed: true, inside };
        let pack = pack_info("default", &view);
        assert_eq!((pack.tenants, pack.models), (vec!["team-a".into()], vec!["m".into(), "n".to_owned()]));
        assert_eq!((&pack.state[..], pack.damaged_blocks), ("damaged", 2));
    }
}
