//! What operators ask: health, tiers, clients, leases, tenants, blocks; purge, verify, drain.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_api::{convert, v1};
use kv_block::code::Code;
use kv_block::{BlockKey, Fault, Scope, SessionId, ShardId, Tier};
use kv_node::{Filter, Op, Reply, ShardReport};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::blocks::block_info;
use super::{Shared, deadline, deadline_asked, gpus, objects, peers, status};
use crate::config::units::Size;
use crate::node::{Node, unexpected};
use crate::peers::{Evacuation, PeerView, evacuate, named};
use crate::shard::ShardHandle;

/// Longest purge or verification.
const JOB_MAX: Duration = Duration::from_secs(3600);
const PAGE_MAX: u32 = 1000;
/// Keys of one offer: what one message between nodes takes.
const OFFER_KEYS_MAX: usize = kv_wire::frame::ITEMS_MAX;

/// The `Admin` service.
pub struct AdminService {
    /// What every service needs.
    pub shared: Shared,
    /// Configuration in force, as TOML.
    pub config_toml: String,
    /// Every value with its origin.
    pub config_values: Vec<v1::ConfigValue>,
    /// What `kvd --check` prints.
    pub plan: String,
}

impl AdminService {
    async fn reports(&self, until: Instant) -> Result<Vec<ShardReport>, Status> {
        self.shared.node.reports(until).await.map_err(status)
    }

    async fn peer_views(&self) -> Result<Vec<PeerView>, Status> {
        match &self.shared.peers {
            Some(known) => known.views().await.map_err(status),
            None => Ok(Vec::new()),
        }
    }

    fn tiers(&self, reports: &[ShardReport]) -> Vec<v1::TierInfo> {
        let mut tiers = Vec::new();
        for (index, report) in reports.iter().enumerate() {
            let notes = &self.shared.node.tier_notes[index];
            let common = v1::TierInfo {
                shard: index as u32,
                numa_node: notes.numa_node,
                principal: self.shared.node.principal_of(ShardId(index as u16)).to_owned(),
                ..v1::TierInfo::default()
            };
            tiers.push(v1::TierInfo {
                tier: v1::Tier::Host.into(),
                bytes_max: report.host_bytes_max,
                bytes_wanted: report.host_bytes_wanted,
                bytes_used: report.host_bytes,
                bytes_pinned: report.pinned_bytes,
                blocks: report.host_blocks,
                state: host_state(report).into(),
                reason: match host_state(report) {
                    "growing" => format!(
                        "{} of {} are allocated, the rest follows",
                        Size(report.host_bytes_max).about(),
                        Size(report.host_bytes_wanted).about()
                    ),
                    "degraded" => self.shared.node.shards[index].host_trouble().unwrap_or_default(),
                    _ => String::new(),
                },
                notes: notes.host.clone(),
                bytes_written: report.counters.put_bytes + report.counters.onboard_bytes,
                evicted_blocks: report.counters.evictions.values().sum(),
                ..common.clone()
            });
            let serving = report.disk_serving;
            let room = self.shared.node.shards[index].disk_room();
            tiers.push(v1::TierInfo {
                tier: v1::Tier::Disk.into(),
                bytes_max: room,
                bytes_wanted: notes.disk_bytes_max,
                bytes_used: report.disk_bytes,
                blocks: report.disk_blocks,
                state: match serving {
                    None => "off",
                    Some(true) if room >= notes.disk_bytes_max => "ok",
                    Some(_) => "degraded",
                }
                .into(),
                reason: match serving {
                    None => "disk.dir is not set".into(),
                    Some(true) if room < notes.disk_bytes_max => NO_ROOM.into(),
                    Some(_) => self.shared.node.shards[index].disk_trouble().unwrap_or_default(),
                },
                notes: notes.disk.clone(),
                bytes_written: report.counters.offload_bytes + report.counters.moved_bytes,
                bytes_read: report.counters.onboard_bytes,
                ..common
            });
        }
        tiers.extend(gpus::tiers(&self.shared.gpus.view()));
        let views = self.shared.object_views();
        tiers.extend(views.iter().map(|view| objects::tier_info(view, reports, &self.shared.node)));
        tiers
    }

    /// Runs one job on every shard and sends one progress for all.
    fn run_job(
        &self,
        until: Option<Instant>,
        op: impl Fn() -> Op,
    ) -> Result<ReceiverStream<Result<v1::Progress, Status>>, Status> {
        let until = until.unwrap_or_else(|| Instant::now() + JOB_MAX);
        let node = &self.shared.node;
        let jobs: Result<Vec<_>, Fault> =
            node.shards.iter().map(|shard: &ShardHandle| node.ask_stream(shard, until, op())).collect();
        let jobs = jobs.map_err(status)?;
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(tell(jobs, sender));
        Ok(ReceiverStream::new(receiver))
    }
}

type Progress = Result<v1::Progress, Status>;

/// Tells the progress of a job until it ends or the caller is gone. Then the shards, whom nobody hears any more,
/// stop as well.
async fn tell(jobs: Vec<mpsc::UnboundedReceiver<Reply>>, sender: mpsc::Sender<Progress>) {
    tokio::select! {
        () = follow(jobs, &sender) => {}
        () = sender.closed() => {}
    }
}

/// Adds up what the shards tell, to the end.
async fn follow(jobs: Vec<mpsc::UnboundedReceiver<Reply>>, sender: &mpsc::Sender<Progress>) {
    let mut parts = vec![kv_node::Progress::default(); jobs.len()];
    for (index, mut job) in jobs.into_iter().enumerate() {
        while let Some(reply) = job.recv().await {
            let finished = match reply {
                Reply::Progress(progress) => {
                    parts[index] = progress;
                    false
                }
                Reply::Finished(progress) => {
                    parts[index] = progress;
                    true
                }
                Reply::Fault(fault) => {
                    let _ = sender.send(Err(status(fault))).await;
                    return;
                }
                other => {
                    let _ = sender.send(Err(status(unexpected(&other)))).await;
                    return;
                }
            };
            // Progress that nobody has taken yet is not worth waiting for.
            let _ = sender.try_send(Ok(sum(&parts, false)));
            if finished {
                break;
            }
        }
    }
    let _ = sender.send(Ok(sum(&parts, true))).await;
}

/// Adds what one shard knows of a tenant.
fn add_up(tenant: &mut v1::TenantInfo, row: &kv_node::TenantReport) {
    tenant.tenant.clone_from(&row.tenant);
    tenant.host_bytes += row.host_bytes;
    tenant.disk_bytes += row.disk_bytes;
    tenant.blocks += row.blocks;
    tenant.pinned_bytes += row.pinned_bytes;
    // Every shard of a principal has a part of the quota, or none has.
    if let Some(part) = row.quota_bytes {
        *tenant.quota_bytes.get_or_insert(0) += part;
    }
    tenant.hits += row.hits;
    tenant.misses += row.misses;
}

/// Refuses what no tenant can be called.
fn tenant_name(name: &str) -> Result<(), Fault> {
    if Scope::is_tenant(name) {
        return Ok(());
    }
    let text = format!("`{name}` cannot name a tenant: expected 1 to 63 of a-z, 0-9 and '-'");
    Err(Fault::new(Code::BadRequest, text))
}

/// Whether a tenant has nothing here and never had to do with it.
fn is_empty(tenant: &v1::TenantInfo) -> bool {
    let name = tenant.tenant.clone();
    *tenant == v1::TenantInfo { tenant: name, ..v1::TenantInfo::default() }
}

fn sum(parts: &[kv_node::Progress], finished: bool) -> v1::Progress {
    let total = |of: fn(&kv_node::Progress) -> u64| parts.iter().map(of).sum();
    v1::Progress {
        done: total(|part| part.done),
        total: total(|part| part.total),
        failed: total(|part| part.failed),
        bytes: total(|part| part.bytes),
        finished,
    }
}

/// What the host tier of a shard is up to.
fn host_state(report: &ShardReport) -> &'static str {
    match (report.host_growing, report.host_bytes_max < report.host_bytes_wanted) {
        (true, _) => "growing",
        (false, true) => "degraded",
        (false, false) => "ok",
    }
}

fn rss_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// Why a disk tier is smaller than configured.
const NO_ROOM: &str = "the file system has no room for more";

/// What is to be said of damaged blocks, by the tier that had them: memory and disk are mended differently.
fn corruption(report: &ShardReport) -> Vec<(Code, String)> {
    if report.quarantined == 0 {
        return Vec::new();
    }
    let say = |(tier, code, place): (Tier, Code, &str)| {
        let failures = *report.counters.checksum_failures.get(tier.name())?;
        let text = format!(
            "{failures} blocks {place} failed their checksum since the start; {} are quarantined",
            report.quarantined
        );
        Some((code, text))
    };
    [(Tier::Host, Code::CorruptHost, "in host memory"), (Tier::Disk, Code::CorruptDisk, "on disk")]
        .into_iter()
        .filter_map(say)
        .collect()
}

fn warnings(node: &Node, reports: &[ShardReport]) -> Vec<v1::Warning> {
    let mut warnings = Vec::new();
    let mut warn = |code: Code, text: String| warnings.push(v1::Warning { code: code.to_string(), text });
    for (shard, report) in reports.iter().enumerate() {
        if report.disk_serving == Some(false) {
            let why = node.shards[shard].disk_trouble().unwrap_or_default();
            warn(
                Code::TierDegraded,
                format!("shard {shard}: the disk tier is out of service, its blocks miss: {why}"),
            );
        }
        let (room, wanted) = (node.shards[shard].disk_room(), node.tier_notes[shard].disk_bytes_max);
        if report.disk_serving == Some(true) && room < wanted {
            let (room, wanted) = (Size(room).about(), Size(wanted).about());
            warn(Code::DiskFull, format!("shard {shard}: the disk tier has {room} of {wanted}: {NO_ROOM}"));
        }
        if host_state(report) == "degraded" {
            let why = node.shards[shard].host_trouble().unwrap_or_default();
            let (has, wanted) = (Size(report.host_bytes_max).about(), Size(report.host_bytes_wanted).about());
            warn(Code::HostShort, format!("shard {shard}: host memory has {has} of {wanted}: {why}"));
        }
        for (code, text) in corruption(report) {
            warn(code, format!("shard {shard}: {text}"));
        }
    }
    if node.is_draining() {
        warn(Code::Draining, "the daemon takes no new work".into());
    }
    warnings
}

#[tonic::async_trait]
impl v1::admin_server::Admin for AdminService {
    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let reports = self.reports(deadline(&request)).await?;
        let node = &self.shared.node;
        let (mut hits, mut misses) = (HashMap::<String, u64>::new(), HashMap::<String, u64>::new());
        for counters in reports.iter().map(|report| &report.counters) {
            for (tier, count) in &counters.hits {
                *hits.entry((*tier).to_owned()).or_default() += count;
            }
            for (reason, count) in &counters.misses {
                *misses.entry((*reason).to_owned()).or_default() += count;
            }
        }
        let total = |of: fn(&ShardReport) -> u64| reports.iter().map(of).sum::<u64>();
        let views = self.peer_views().await?;
        let mut warnings = warnings(node, &reports);
        let down = peers::warnings(&views);
        let peers_down = down.len() as u32;
        warnings.extend(down.into_iter().map(|(code, text)| v1::Warning { code: code.to_string(), text }));
        warnings.extend(objects::warnings(&self.shared.object_views()));
        let gpus = self.shared.gpus.view();
        warnings.extend(gpus::warnings(&gpus));
        for note in &node.recovered.notes {
            warnings.push(v1::Warning { code: Code::SetAside.to_string(), text: note.clone() });
        }
        Ok(Response::new(v1::StatusResponse {
            node: node.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            epoch: node.epoch.0,
            uptime_s: node.started.elapsed().as_secs(),
            health: if warnings.is_empty() { "ok" } else { "warn" }.into(),
            warnings,
            tiers: self.tiers(&reports),
            shards: node.shards.len() as u32,
            clients: node.clients().len() as u32,
            leases: total(|report| report.leases) as u32,
            pinned_bytes: total(|report| report.pinned_bytes),
            blocks: total(|report| report.blocks),
            pending: total(|report| report.pending),
            hits,
            misses,
            put_blocks: total(|report| report.counters.put_blocks),
            put_bytes: total(|report| report.counters.put_bytes),
            checksum_failures: total(|report| report.counters.checksum_failures.values().sum()),
            quarantined: total(|report| report.quarantined),
            recovery: Some(v1::Recovery {
                host_blocks: node.recovered.host_blocks,
                disk_blocks: node.recovered.disk_blocks,
                seconds_micro: node.recovered.took.as_micros() as u64,
                notes: node.recovered.notes.clone(),
            }),
            draining: node.is_draining(),
            disk_bytes_written: total(|report| report.counters.offload_bytes + report.counters.moved_bytes),
            disk_bytes_hit: total(|report| report.counters.onboard_bytes),
            operations_in_flight: total(|report| report.in_flight),
            rss_bytes: rss_bytes(),
            reading: total(|report| report.reading),
            fetched_blocks: total(|report| report.counters.fetch_blocks),
            fetched_bytes: total(|report| report.counters.fetch_bytes),
            peers: views.len() as u32,
            peers_down,
            object_tiers: self.shared.object_tiers(),
            gpus: gpus::list(gpus).gpus,
        }))
    }

    async fn list_tiers(
        &self,
        request: Request<v1::ListTiersRequest>,
    ) -> Result<Response<v1::ListTiersResponse>, Status> {
        let reports = self.reports(deadline(&request)).await?;
        Ok(Response::new(v1::ListTiersResponse { tiers: self.tiers(&reports) }))
    }

    async fn list_clients(
        &self,
        request: Request<v1::ListClientsRequest>,
    ) -> Result<Response<v1::ListClientsResponse>, Status> {
        let reports = self.reports(deadline(&request)).await?;
        let clients = self.shared.node.clients().into_iter().map(|info| {
            let rows =
                reports.iter().flat_map(|report| &report.sessions).filter(|row| row.session == info.id.0);
            let mut client = v1::ClientInfo {
                session: info.id.0,
                name: info.name,
                door: info.door.name().into(),
                pid: info.owner.pid(),
                uid: info.owner.uid().unwrap_or(u32::MAX),
                principal: self.shared.node.principals[info.principal].name.clone(),
                connected_s: info.since.elapsed().as_secs(),
                ..v1::ClientInfo::default()
            };
            for row in rows {
                client.leases += row.leases;
                client.leased_bytes += row.leased_bytes;
                client.reading += row.reading;
                client.pending += row.pending;
                client.puts += row.puts;
                client.gets += row.gets;
            }
            client
        });
        Ok(Response::new(v1::ListClientsResponse { clients: clients.collect() }))
    }

    async fn list_leases(
        &self,
        request: Request<v1::ListLeasesRequest>,
    ) -> Result<Response<v1::ListLeasesResponse>, Status> {
        let until = deadline(&request);
        let session = Some(SessionId(request.into_inner().session)).filter(|session| session.0 != 0);
        let node = &self.shared.node;
        let mut leases = Vec::new();
        for shard in &node.shards {
            let reply = node.ask(shard, SessionId(0), until, Op::Leases { session }, Bytes::new()).await;
            let Reply::Leases(rows) = reply.map_err(status)? else { continue };
            let now = node.started.elapsed().as_micros() as u64;
            leases.extend(rows.into_iter().map(|row| v1::LeaseInfo {
                lease: row.lease.0,
                session: row.session.0,
                key: Bytes::copy_from_slice(row.key.as_bytes()),
                shard: shard.id.0.into(),
                bytes: row.bytes,
                age_ms: now.saturating_sub(row.since.0) / 1000,
            }));
        }
        Ok(Response::new(v1::ListLeasesResponse { leases }))
    }

    async fn list_tenants(
        &self,
        request: Request<v1::ListTenantsRequest>,
    ) -> Result<Response<v1::ListTenantsResponse>, Status> {
        let reports = self.reports(deadline(&request)).await?;
        let node = &self.shared.node;
        let mut tenants = Vec::new();
        for principal in &node.principals {
            let mut own: BTreeMap<String, v1::TenantInfo> = BTreeMap::new();
            for row in reports[principal.shards.clone()].iter().flat_map(|report| &report.tenants) {
                add_up(own.entry(row.tenant.clone()).or_default(), row);
            }
            // Names are known node-wide: of several principals, only those are told that have to do with it.
            let named = |row: v1::TenantInfo| v1::TenantInfo { principal: principal.name.clone(), ..row };
            let told = |row: &v1::TenantInfo| node.principals.len() == 1 || !is_empty(row);
            tenants.extend(own.into_values().filter(told).map(named));
        }
        Ok(Response::new(v1::ListTenantsResponse { tenants }))
    }

    async fn list_blocks(
        &self,
        request: Request<v1::ListBlocksRequest>,
    ) -> Result<Response<v1::ListBlocksResponse>, Status> {
        let until = deadline(&request);
        let request = request.into_inner();
        let node = &self.shared.node;
        let bad = |text: String| status(Fault::new(Code::BadRequest, text));
        let (shard, cursor) = match request.page_token.as_str() {
            "" => (0, 0),
            token => token
                .split_once('.')
                .and_then(|(shard, cursor)| Some((shard.parse::<usize>().ok()?, cursor.parse::<u64>().ok()?)))
                .ok_or_else(|| bad(format!("`{token}` is not a page token of this daemon")))?,
        };
        let Some(handle) = node.shards.get(shard) else {
            return Err(bad(format!("there is no shard {shard}")));
        };
        let digits = request.key_prefix.to_ascii_lowercase();
        if digits.len() > 2 * BlockKey::BYTES || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad(format!("key prefix `{digits}` is not up to 32 hex digits")));
        }
        let filter = Filter {
            tenant: Some(request.tenant).filter(|tenant| !tenant.is_empty()),
            tier: convert::tier(request.tier).map_err(status)?,
            key_prefix: digits,
        };
        let count = match request.page_size {
            0 => 100,
            size => size.min(PAGE_MAX),
        };
        let op = Op::List { cursor, count: count as usize, filter };
        let reply = node.ask(handle, SessionId(0), until, op, Bytes::new()).await.map_err(status)?;
        let Reply::Listed { blocks, next } = reply else { return Err(status(unexpected(&reply))) };
        let next_page_token = match next {
            Some(next) => format!("{shard}.{next}"),
            None if shard + 1 < node.shards.len() => format!("{}.0", shard + 1),
            None => String::new(),
        };
        let blocks = blocks.iter().map(|block| block_info(node, handle.id, block)).collect();
        Ok(Response::new(v1::ListBlocksResponse { blocks, next_page_token }))
    }

    async fn get_config(
        &self,
        _: Request<v1::GetConfigRequest>,
    ) -> Result<Response<v1::GetConfigResponse>, Status> {
        Ok(Response::new(v1::GetConfigResponse {
            toml: self.config_toml.clone(),
            values: self.config_values.clone(),
            plan: self.plan.clone(),
        }))
    }

    async fn set_quota(
        &self,
        request: Request<v1::SetQuotaRequest>,
    ) -> Result<Response<v1::SetQuotaResponse>, Status> {
        let request = request.into_inner();
        tenant_name(&request.tenant).map_err(status)?;
        self.shared.node.set_quota(&request.tenant, request.bytes_max);
        Ok(Response::new(v1::SetQuotaResponse {}))
    }

    type PurgeStream = ReceiverStream<Result<v1::Progress, Status>>;

    async fn purge(&self, request: Request<v1::PurgeRequest>) -> Result<Response<Self::PurgeStream>, Status> {
        let (until, soon) = (deadline_asked(&request), deadline(&request));
        let request = request.into_inner();
        let tier = convert::tier(request.tier).map_err(status)?;
        if tier == Some(Tier::Object) {
            return Err(objects::refuse_to_remove());
        }
        if tier == Some(Tier::Device) {
            let text = "GPUs keep copies alone: what is removed from host memory and disk they give up by themselves, \
                        within seconds";
            return Err(status(Fault::new(Code::BadRequest, text)));
        }
        if request.tenant.is_empty() != request.all {
            let text = "name a `tenant`, or say `all`, not both";
            return Err(status(Fault::new(Code::BadRequest, text)));
        }
        if !request.all {
            // A name that nobody has is a typing error, not a tenant with nothing to purge.
            tenant_name(&request.tenant).map_err(status)?;
            let reports = self.reports(soon).await?;
            let mut known = reports.iter().flat_map(|report| &report.tenants);
            if !known.any(|row| row.tenant == request.tenant) {
                let text = format!("nothing here is of a tenant `{}`", request.tenant);
                return Err(status(Fault::new(Code::UnknownTenant, text)));
            }
        }
        let filter = Filter { tenant: (!request.all).then_some(request.tenant), tier, ..Filter::default() };
        let dry_run = request.dry_run;
        self.run_job(until, move || Op::Purge { filter: filter.clone(), tier, dry_run }).map(Response::new)
    }

    type VerifyStream = ReceiverStream<Result<v1::Progress, Status>>;

    async fn verify(
        &self,
        request: Request<v1::VerifyRequest>,
    ) -> Result<Response<Self::VerifyStream>, Status> {
        let until = deadline_asked(&request);
        let tier = convert::tier(request.into_inner().tier).map_err(status)?;
        match tier {
            Some(tier @ (Tier::Host | Tier::Disk)) => {
                self.run_job(until, move || Op::Verify { tier }).map(Response::new)
            }
            Some(Tier::Object) => self.shared.verify_objects(until).map(Response::new),
            Some(Tier::Device) => {
                let text = "GPUs keep copies, which are summed when they come and compared with the catalog when they \
                            are loaded: there is nothing to verify on tier device";
                Err(status(Fault::new(Code::BadRequest, text)))
            }
            None => {
                let text = "field `tier` is host, disk or object";
                Err(status(Fault::new(Code::BadRequest, text)))
            }
        }
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        let draining = !request.into_inner().stop;
        self.shared.node.set_draining(draining);
        Ok(Response::new(v1::DrainResponse { draining }))
    }

    type EvacuateStream = ReceiverStream<Result<v1::EvacuateProgress, Status>>;

    async fn evacuate(
        &self,
        request: Request<v1::EvacuateRequest>,
    ) -> Result<Response<Self::EvacuateStream>, Status> {
        let request = request.into_inner();
        let known = self.shared.peers()?;
        let named: Result<Vec<_>, Fault> = request.nodes.iter().map(|node| known.number(node)).collect();
        let named = named.map_err(status)?;
        let all = (0..known.members().len() as u16).map(kv_node::PeerId);
        let to = if named.is_empty() { all.collect() } else { named };
        let wanted = Evacuation { peers: to, bytes_max: request.bytes_max };
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(evacuate(Arc::clone(&self.shared.node), known.clone(), wanted, sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn list_peers(
        &self,
        _: Request<v1::ListPeersRequest>,
    ) -> Result<Response<v1::ListPeersResponse>, Status> {
        let views = self.peer_views().await?;
        let peers = views.iter().map(peers::peer_info).collect();
        Ok(Response::new(v1::ListPeersResponse { peers }))
    }

    async fn describe_peer(
        &self,
        request: Request<v1::DescribePeerRequest>,
    ) -> Result<Response<v1::DescribePeerResponse>, Status> {
        let node = request.into_inner().node;
        let known = self.shared.peers()?;
        let number = known.number(&node).map_err(status)?;
        let views = self.peer_views().await?;
        let view = &views[usize::from(number.0)];
        let (peer, paths) = (Some(peers::peer_info(view)), peers::paths(view));
        Ok(Response::new(v1::DescribePeerResponse { peer, paths }))
    }

    async fn list_transfers(
        &self,
        _: Request<v1::ListTransfersRequest>,
    ) -> Result<Response<v1::ListTransfersResponse>, Status> {
        let transfers = match &self.shared.peers {
            Some(known) => peers::transfers(known).await.map_err(status)?,
            None => Vec::new(),
        };
        Ok(Response::new(v1::ListTransfersResponse { transfers }))
    }

    async fn offer(&self, request: Request<v1::OfferRequest>) -> Result<Response<v1::OfferResponse>, Status> {
        let until = deadline(&request);
        let request = request.into_inner();
        let (known, node) = (self.shared.peers()?, &self.shared.node);
        let peer = known.number(&request.node).map_err(status)?;
        let names = convert::names(request.names.as_ref(), OFFER_KEYS_MAX).map_err(status)?;
        let keys = node.keys(&names).map_err(status)?;
        let count = keys.len() as u32;
        let offer = named(node, keys, until).await.map_err(status)?;
        let taken = known.offer(peer, offer, until).await.map_err(status)?;
        let Some(taken) = taken else {
            let views = self.peer_views().await?;
            let last = views.get(usize::from(peer.0)).map_or_else(String::new, peers::reason);
            let why = if last.is_empty() { "it did not say in time what it took".into() } else { last };
            return Err(status(Fault::new(Code::PeerDown, format!("node {}: {why}", request.node))));
        };
        let taken = taken.taken.min(count);
        Ok(Response::new(v1::OfferResponse { taken, left: count - taken }))
    }

    async fn list_object_tiers(
        &self,
        _: Request<v1::ListObjectTiersRequest>,
    ) -> Result<Response<v1::ListObjectTiersResponse>, Status> {
        Ok(Response::new(v1::ListObjectTiersResponse { tiers: self.shared.object_tiers() }))
    }

    async fn list_packs(
        &self,
        request: Request<v1::ListPacksRequest>,
    ) -> Result<Response<v1::ListPacksResponse>, Status> {
        self.shared.list_packs(request.into_inner()).await.map(Response::new)
    }

    async fn describe_pack(
        &self,
        request: Request<v1::DescribePackRequest>,
    ) -> Result<Response<v1::DescribePackResponse>, Status> {
        self.shared.describe_pack(request.get_ref()).map(Response::new)
    }

    async fn collect_objects(
        &self,
        request: Request<v1::CollectObjectsRequest>,
    ) -> Result<Response<v1::CollectObjectsResponse>, Status> {
        self.shared.collect_objects(request.get_ref().dry_run).await.map(Response::new)
    }

    async fn list_gpus(
        &self,
        _: Request<v1::ListGpusRequest>,
    ) -> Result<Response<v1::ListGpusResponse>, Status> {
        Ok(Response::new(gpus::list(self.shared.gpus.view())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_in_memory_is_told_from_damage_on_disk() {
        let codes = |failures: &[(Tier, u64)], quarantined| {
            let checksum_failures = failures.iter().map(|(tier, count)| (tier.name(), *count)).collect();
            let counters = kv_node::Counters { checksum_failures, ..Default::default() };
            let report = ShardReport { counters, quarantined, ..Default::default() };
            corruption(&report).into_iter().map(|(code, _)| code).collect::<Vec<_>>()
        };
        assert_eq!(codes(&[(Tier::Host, 2)], 2), [Code::CorruptHost]);
        assert_eq!(codes(&[(Tier::Disk, 1)], 1), [Code::CorruptDisk]);
        assert_eq!(codes(&[(Tier::Host, 2), (Tier::Disk, 1)], 3), [Code::CorruptHost, Code::CorruptDisk]);
        assert_eq!(codes(&[(Tier::Disk, 1)], 0), [], "it was stored again");
    }

    #[tokio::test]
    async fn when_the_caller_leaves_the_shards_are_not_heard_any_more() {
        let (shard, job) = mpsc::unbounded_channel();
        let (sender, mut receiver) = mpsc::channel(4);
        let told = tokio::spawn(tell(vec![job], sender));
        shard.send(Reply::Progress(kv_node::Progress { done: 7, ..Default::default() })).unwrap();
        assert_eq!(receiver.recv().await.unwrap().unwrap().done, 7);
        drop(receiver);
        told.await.unwrap();
        assert!(shard.is_closed());
    }
}
