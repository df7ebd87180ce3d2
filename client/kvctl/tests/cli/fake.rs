//! A daemon that says what a test wants to see rendered: canned answers, and a store just good enough for
//! the bench. It listens on a socket in a temporary directory and ends with the test.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kv_api::v1::{self, admin_server, blocks_server, worker_server};
use kv_api::{convert, fault};
use kv_block::code::Code;
use kv_block::{BlockKey, Checksum, Fault, MissReason, Scope, Slice};
use tokio_stream::Stream;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming};

/// How the daemon is today.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mood {
    /// In order.
    Well,
    /// A tier is degraded.
    Warn,
    /// Administers for nobody.
    Denies,
    /// Long work ends before it is finished, checks find damage, reads give wrong bytes.
    Broken,
    /// Its pages have more blocks than were asked for.
    LongPages,
    /// Has two peers, of which one is up.
    Peers,
    /// None of its peers can be reached.
    PeersDown,
    /// Its peers take nothing.
    PeersFull,
    /// Its peers never answer an offer.
    PeersSilent,
    /// Knows nothing of peers or GPUs: it is of an older version.
    Old,
    /// Has an object store with two packs, of which one cannot be read.
    Object,
    /// Has an object store that is not open yet.
    Opening,
    /// Has two GPUs, of which one is lost.
    Gpus,
}

/// A fake daemon; ends when dropped.
pub(crate) struct Fake {
    directory: tempfile::TempDir,
    state: Arc<State>,
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    /// Starts one.
    pub(crate) fn start(mood: Mood) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = {
            let _inside = runtime.enter();
            tokio::net::UnixListener::bind(directory.path().join("kvd.sock")).unwrap()
        };
        let state = Arc::new(State { mood, ..State::default() });
        let service = Service(Arc::clone(&state));
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(admin_server::AdminServer::new(service.clone()))
                .add_service(blocks_server::BlocksServer::new(service.clone()))
                .add_service(worker_server::WorkerServer::new(service))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        Self { directory, state, _runtime: runtime }
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path().join("kvd.sock")
    }

    /// Blocks that were put and not evicted.
    pub(crate) fn stored(&self) -> usize {
        self.state.stored.lock().unwrap().len()
    }

    /// A directory for the test's own files.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Key of the n-th block that the daemon has from the start.
pub(crate) fn key(n: u8) -> String {
    BlockKey([n; 16]).to_string()
}

struct State {
    mood: Mood,
    registered: Mutex<Vec<(Scope, Slice)>>,
    stored: Mutex<HashMap<BlockKey, Vec<u8>>>,
    /// What node-b took.
    taken: Mutex<HashMap<BlockKey, Vec<u8>>>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            mood: Mood::Well,
            registered: Mutex::default(),
            stored: Mutex::default(),
            taken: Mutex::default(),
        }
    }
}

#[derive(Clone)]
struct Service(Arc<State>);

type Answer<T> = Result<Response<T>, Status>;
type Messages<T> = std::pin::Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn status(fault: &Fault) -> Status {
    fault::to_status(fault)
}

fn not_here<T>() -> Answer<T> {
    Err(Status::unimplemented("not of this fake"))
}

fn block(n: u8) -> v1::BlockInfo {
    v1::BlockInfo {
        key: vec![n; 16].into(),
        tiers: vec![v1::Tier::Host.into()],
        bytes: 65_536,
        tenant: "team-a".into(),
        state: "present".into(),
        ..Default::default()
    }
}

impl Service {
    fn admin(&self) -> Result<(), Status> {
        match self.0.mood {
            Mood::Denies => Err(status(&Fault::new(Code::Denied, "uid 1000 may not administer"))),
            _ => Ok(()),
        }
    }

    /// The call is answered only by a daemon that knows it.
    fn peer_calls(&self) -> Result<(), Status> {
        self.admin()?;
        if self.0.mood == Mood::Old { Err(Status::unimplemented("")) } else { Ok(()) }
    }

    fn peers(&self) -> Vec<v1::PeerInfo> {
        let down = |node: &str, address: &str| v1::PeerInfo {
            node: node.into(),
            address: address.into(),
            state: "down".into(),
            reason: "connection refused".into(),
            retry_ms: 4_000,
            misses: [("peer_down".to_owned(), 12)].into(),
            ..Default::default()
        };
        let up = v1::PeerInfo {
            node: "node-b".into(),
            address: "10.0.0.8:9474".into(),
            state: "up".into(),
            version: 1,
            epoch: 7,
            rtt_us: 210,
            paths: vec!["mlx5_0".into(), "tcp".into()],
            wanted: 3,
            reading: 2,
            blocks_in: 5_321,
            bytes_in: 1_288_490_188,
            misses: [("peer_evicted".to_owned(), 12), ("tier_timeout".to_owned(), 6)].into(),
            strikes: 1,
            held: 2,
            held_bytes: 128 << 10,
            blocks_out: 100,
            bytes_out: 6 << 20,
            reads_here: true,
            ..Default::default()
        };
        match self.0.mood {
            Mood::Peers | Mood::PeersFull | Mood::PeersSilent | Mood::Broken => {
                vec![up, down("node-c", "10.0.0.9:9474")]
            }
            Mood::PeersDown => vec![down("node-b", "10.0.0.8:9474"), down("node-c", "10.0.0.9:9474")],
            _ => Vec::new(),
        }
    }

    fn tiers(&self) -> Vec<v1::TierInfo> {
        let host = v1::TierInfo {
            tier: v1::Tier::Host.into(),
            state: "ok".into(),
            bytes_max: 2 << 30,
            bytes_used: 1 << 30,
            blocks: 16_384,
            ..Default::default()
        };
        let state = if self.0.mood == Mood::Warn { "degraded" } else { "ok" };
        let disk = v1::TierInfo { tier: v1::Tier::Disk.into(), state: state.into(), ..host.clone() };
        let object = self.object_tiers().into_iter().map(|tier| v1::TierInfo {
            tier: v1::Tier::Object.into(),
            state: tier.state,
            bytes_used: tier.pack_bytes,
            blocks: tier.blocks,
            principal: tier.principal,
            ..Default::default()
        });
        [host, disk].into_iter().chain(object).collect()
    }

    fn object_tiers(&self) -> Vec<v1::ObjectTierInfo> {
        let opening = v1::ObjectTierInfo {
            principal: "default".into(),
            store: "s3://kv-blocks".into(),
            state: "opening".into(),
            ..Default::default()
        };
        let asked =
            |kind: &str, requests| v1::StoreRequests { kind: kind.into(), requests, ..Default::default() };
        let open = v1::ObjectTierInfo {
            state: "ok".into(),
            circuit: "closed".into(),
            packs: 1,
            pack_bytes: 32 << 20,
            blocks: 512,
            packs_set_aside: 1,
            requests: vec![asked("put", 10), asked("get", 20), asked("list", 5)],
            blocks_written: 512,
            blocks_read: 64,
            served_blocks: 64,
            served_tokens: 1_024,
            ..opening.clone()
        };
        match self.0.mood {
            Mood::Object => vec![open],
            Mood::Opening => vec![opening],
            _ => Vec::new(),
        }
    }

    fn gpus(&self) -> v1::ListGpusResponse {
        if self.0.mood != Mood::Gpus {
            let absent = "no CUDA driver: libcuda.so.1: cannot open shared object file".into();
            return v1::ListGpusResponse { absent, ..Default::default() };
        }
        let well = v1::GpuInfo {
            ordinal: 0,
            uuid: "GPU-0a1b2c3d-0000-0000-0000-000000000000".into(),
            name: "NVIDIA H200".into(),
            bus: "0000:3b:00.0".into(),
            numa_node: Some(0),
            memory_bytes: 141 << 30,
            free_bytes: Some(9 << 30),
            state: "ok".into(),
            method: "auto(batch)".into(),
            caches: 2,
            cache_bytes: 110 << 30,
            copies_under_way: 14,
            copies_waiting: 3,
            bytes_in: 12 << 30,
            bytes_out: 5 << 30,
            copies_failed: 2,
            reaches: vec!["GPU-0a1b0000-0000-0000-0000-000000000001".into()],
            ..Default::default()
        };
        let lost = v1::GpuInfo {
            ordinal: 1,
            uuid: "GPU-0a1b0000-0000-0000-0000-000000000001".into(),
            name: "NVIDIA H200".into(),
            bus: "0000:5e:00.0".into(),
            state: "lost".into(),
            reason: "GPU 1 is lost to this process, as cuEventQuery said".into(),
            kept: 4,
            ..Default::default()
        };
        v1::ListGpusResponse { driver: "12.8".into(), absent: String::new(), gpus: vec![well, lost] }
    }

    fn progress(&self) -> Messages<v1::Progress> {
        let broken = self.0.mood == Mood::Broken;
        let report = |done, finished| {
            Ok(v1::Progress { done, total: 10, failed: u64::from(broken), bytes: done << 16, finished })
        };
        Box::pin(tokio_stream::iter([report(0, false), report(5, false), report(10, true)]))
    }

    fn key_of(&self, binding: u32, hash: &[u8]) -> Result<BlockKey, Status> {
        let registered = self.0.registered.lock().unwrap();
        let (scope, slice) = registered.get(binding as usize).ok_or_else(|| Status::not_found("binding"))?;
        let hash = convert::sequence_hash(hash).map_err(|fault| status(&fault))?;
        Ok(scope.id().block_key(&hash, slice))
    }

    fn keys(&self, names: Option<&v1::Names>) -> Result<Vec<BlockKey>, Status> {
        let names = names.ok_or_else(|| Status::invalid_argument("no names"))?;
        let keys = names.keys.iter().map(|key| convert::key(key).map_err(|fault| status(&fault)));
        let hashes = names.sequence_hashes.iter().map(|hash| self.key_of(names.binding, hash));
        keys.chain(hashes).collect()
    }

    /// Of these, how many are here.
    fn count(&self, names: Option<&v1::Names>) -> Result<(u32, u32), Status> {
        let keys = self.keys(names)?;
        let stored = self.0.stored.lock().unwrap();
        let here = |key: &&BlockKey| (1..=2).any(|n| key.0 == [n; 16]) || stored.contains_key(key);
        let count = keys.iter().filter(here).count() as u32;
        Ok((count, keys.len() as u32 - count))
    }
}

#[tonic::async_trait]
impl admin_server::Admin for Service {
    async fn status(&self, _: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        self.admin()?;
        let warn = matches!(self.0.mood, Mood::Warn | Mood::Gpus);
        let (code, text) = match self.0.mood {
            Mood::Gpus => ("KVD-3007", "GPU 1 (0000:5e:00.0): is lost until kvd restarts"),
            _ => ("KVD-3001", "disk: circuit open for 41s"),
        };
        let warning = v1::Warning { code: code.into(), text: text.into() };
        Ok(Response::new(v1::StatusResponse {
            node: "fake".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            health: if warn { "warn" } else { "ok" }.into(),
            warnings: if warn { vec![warning] } else { Vec::new() },
            tiers: self.tiers(),
            shards: 1,
            fetched_blocks: self.peers().iter().map(|peer| peer.blocks_in).sum(),
            fetched_bytes: self.peers().iter().map(|peer| peer.bytes_in).sum(),
            peers: self.peers().len() as u32,
            peers_down: self.peers().iter().filter(|peer| peer.state == "down").count() as u32,
            object_tiers: self.object_tiers(),
            gpus: self.gpus().gpus,
            ..Default::default()
        }))
    }

    async fn list_tiers(&self, _: Request<v1::ListTiersRequest>) -> Answer<v1::ListTiersResponse> {
        self.admin()?;
        Ok(Response::new(v1::ListTiersResponse { tiers: self.tiers() }))
    }

    async fn list_clients(&self, _: Request<v1::ListClientsRequest>) -> Answer<v1::ListClientsResponse> {
        let client = v1::ClientInfo { session: 7, name: "rank 0\u{1b}[31m".into(), ..Default::default() };
        Ok(Response::new(v1::ListClientsResponse { clients: vec![client] }))
    }

    async fn list_leases(&self, _: Request<v1::ListLeasesRequest>) -> Answer<v1::ListLeasesResponse> {
        Ok(Response::new(v1::ListLeasesResponse::default()))
    }

    async fn list_tenants(&self, _: Request<v1::ListTenantsRequest>) -> Answer<v1::ListTenantsResponse> {
        let tenant = v1::TenantInfo { tenant: "team-a".into(), blocks: 2, ..Default::default() };
        Ok(Response::new(v1::ListTenantsResponse { tenants: vec![tenant] }))
    }

    // One block a page, and an empty page between: as two shards would.
    async fn list_blocks(&self, request: Request<v1::ListBlocksRequest>) -> Answer<v1::ListBlocksResponse> {
        let request = request.into_inner();
        let (blocks, next) = match request.page_token.as_str() {
            "" if self.0.mood == Mood::LongPages => (vec![block(1), block(2)], ""),
            "" => (vec![block(1)], "empty"),
            "empty" => (vec![], "last"),
            _ => (vec![block(2)], ""),
        };
        let wanted = |block: &v1::BlockInfo| {
            BlockKey::from_slice(&block.key).unwrap().to_string().starts_with(&request.key_prefix)
        };
        let blocks = blocks.into_iter().filter(wanted).collect();
        Ok(Response::new(v1::ListBlocksResponse { blocks, next_page_token: next.into() }))
    }

    async fn get_config(&self, _: Request<v1::GetConfigRequest>) -> Answer<v1::GetConfigResponse> {
        let value = |key: &str, value: &str, origin: &str| v1::ConfigValue {
            key: key.into(),
            value: value.into(),
            origin: origin.into(),
        };
        Ok(Response::new(v1::GetConfigResponse {
            toml: "[host]\nbytes_max = \"2GiB\"\n".into(),
            values: vec![value("host.bytes_max", "\"2GiB\"", "flag"), value("a.b", "1", "default")],
            plan: "the plan\n".into(),
        }))
    }

    async fn set_quota(&self, _: Request<v1::SetQuotaRequest>) -> Answer<v1::SetQuotaResponse> {
        Ok(Response::new(v1::SetQuotaResponse {}))
    }

    type PurgeStream = Messages<v1::Progress>;
    async fn purge(&self, request: Request<v1::PurgeRequest>) -> Answer<Self::PurgeStream> {
        let request = request.into_inner();
        assert_ne!(request.tenant.is_empty(), !request.all);
        if self.0.mood == Mood::Broken {
            let half = v1::Progress { done: 5, total: 10, ..Default::default() };
            return Ok(Response::new(Box::pin(tokio_stream::once(Ok(half)))));
        }
        Ok(Response::new(self.progress()))
    }

    type VerifyStream = Messages<v1::Progress>;
    async fn verify(&self, request: Request<v1::VerifyRequest>) -> Answer<Self::VerifyStream> {
        assert_ne!(request.into_inner().tier, 0, "the daemon wants a tier");
        Ok(Response::new(self.progress()))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Answer<v1::DrainResponse> {
        Ok(Response::new(v1::DrainResponse { draining: !request.into_inner().stop }))
    }

    type EvacuateStream = Messages<v1::EvacuateProgress>;
    // Of ten blocks two are left when it may choose the peers.
    async fn evacuate(&self, request: Request<v1::EvacuateRequest>) -> Answer<Self::EvacuateStream> {
        self.peer_calls()?;
        let request = request.into_inner();
        let all = match request.bytes_max {
            0 => 10,
            bytes => bytes >> 16,
        };
        let left = match (self.0.mood, request.nodes.is_empty()) {
            (Mood::PeersFull, _) => all,
            (_, true) => 2,
            (_, false) => 0,
        };
        let half = v1::EvacuateProgress { offered: all / 2, total: all, ..Default::default() };
        let taken = all - left;
        let end = v1::EvacuateProgress {
            offered: all,
            total: all,
            taken,
            left,
            bytes: taken << 16,
            finished: self.0.mood != Mood::Broken,
        };
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(half), Ok(end)]))))
    }

    async fn list_peers(&self, _: Request<v1::ListPeersRequest>) -> Answer<v1::ListPeersResponse> {
        self.peer_calls()?;
        Ok(Response::new(v1::ListPeersResponse { peers: self.peers() }))
    }

    async fn describe_peer(
        &self,
        request: Request<v1::DescribePeerRequest>,
    ) -> Answer<v1::DescribePeerResponse> {
        self.peer_calls()?;
        let node = request.into_inner().node;
        let peer = self.peers().into_iter().find(|peer| peer.node == node);
        let path = |name: &str, rank, reason: &str, blocks_in| v1::PathInfo {
            name: name.into(),
            rank,
            reason: reason.into(),
            up: rank > 0,
            blocks_in,
            bytes_in: blocks_in << 18,
        };
        let paths = vec![
            path("mlx5_1", 0, "its port is down", 0),
            path("tcp", 2, "every machine has it", 321),
            path("mlx5_0", 1, "RDMA on both sides, on this block's NUMA node", 5_000),
        ];
        Ok(Response::new(v1::DescribePeerResponse { peer, paths }))
    }

    async fn list_transfers(
        &self,
        _: Request<v1::ListTransfersRequest>,
    ) -> Answer<v1::ListTransfersResponse> {
        self.peer_calls()?;
        let transfer = |n: u8, node: &str, direction: &str, stage: &str| v1::TransferInfo {
            key: vec![n; 16].into(),
            node: node.into(),
            direction: direction.into(),
            stage: stage.into(),
            bytes: u64::from(n) << 16,
            age_ms: 12,
            left_ms: 9_988,
            shard: (direction == "in").then_some(0),
        };
        let transfers = match self.0.mood {
            Mood::Peers => vec![
                transfer(3, "", "in", "searching"),
                transfer(4, "node-b", "in", "reading"),
                transfer(1, "node-b", "out", "granted"),
            ],
            _ => Vec::new(),
        };
        Ok(Response::new(v1::ListTransfersResponse { transfers }))
    }

    async fn offer(&self, request: Request<v1::OfferRequest>) -> Answer<v1::OfferResponse> {
        self.peer_calls()?;
        let request = request.into_inner();
        assert_eq!(request.node, "node-b");
        let keys = self.keys(request.names.as_ref())?;
        assert!(keys.len() <= 2, "more keys than the daemon takes at once");
        if self.0.mood == Mood::PeersSilent {
            std::future::pending::<()>().await;
        }
        if self.0.mood == Mood::PeersFull {
            return Ok(Response::new(v1::OfferResponse { taken: 0, left: keys.len() as u32 }));
        }
        let (stored, mut peer) = (self.0.stored.lock().unwrap(), self.0.taken.lock().unwrap());
        let there = keys.iter().filter_map(|key| stored.get(key).map(|bytes| (*key, bytes.clone())));
        let before: Vec<_> = there.collect();
        let taken = before.len() as u32;
        peer.extend(before);
        Ok(Response::new(v1::OfferResponse { taken, left: keys.len() as u32 - taken }))
    }

    async fn list_object_tiers(
        &self,
        _: Request<v1::ListObjectTiersRequest>,
    ) -> Answer<v1::ListObjectTiersResponse> {
        self.admin()?;
        Ok(Response::new(v1::ListObjectTiersResponse { tiers: self.object_tiers() }))
    }

    // One pack a page. The second is found only by those who list the store.
    async fn list_packs(&self, request: Request<v1::ListPacksRequest>) -> Answer<v1::ListPacksResponse> {
        let request = request.into_inner();
        if self.0.mood == Mood::Opening {
            let fault = Fault::new(Code::TierDegraded, "the object store s3://kv-blocks is not open yet");
            return Err(status(&fault.retry_after(std::time::Duration::from_secs(1))));
        }
        let first = v1::PackInfo {
            id: vec![0xab; 32].into(),
            bytes: 32 << 20,
            state: "ok".into(),
            blocks: 512,
            writer: "node-b".into(),
            tenants: vec!["team-a".into()],
            ..Default::default()
        };
        let second = v1::PackInfo {
            id: vec![0xac; 32].into(),
            bytes: 1 << 20,
            state: "incompatible".into(),
            reason: "version 2".into(),
            ..Default::default()
        };
        let (pack, next) = match (request.page_token.as_str(), request.rescan) {
            ("", true) => (first, "second"),
            ("", false) => (first, ""),
            _ => (second, ""),
        };
        let hex: String = pack.id.iter().map(|byte| format!("{byte:02x}")).collect();
        let packs = Some(pack).filter(|_| hex.starts_with(&request.id_prefix)).into_iter().collect();
        Ok(Response::new(v1::ListPacksResponse { packs, next_page_token: next.into() }))
    }

    // Two blocks an answer, of three.
    async fn describe_pack(
        &self,
        request: Request<v1::DescribePackRequest>,
    ) -> Answer<v1::DescribePackResponse> {
        let request = request.into_inner();
        let pack = v1::PackInfo { id: request.id, state: "ok".into(), blocks: 3, ..Default::default() };
        let first = request.first_block;
        let block = |n: u64| v1::PackBlock { key: vec![n as u8; 16].into(), ..Default::default() };
        let blocks = (first..3.min(first + 2)).map(block).collect();
        Ok(Response::new(v1::DescribePackResponse { pack: Some(pack), bindings: Vec::new(), blocks }))
    }

    async fn collect_objects(
        &self,
        request: Request<v1::CollectObjectsRequest>,
    ) -> Answer<v1::CollectObjectsResponse> {
        let early = v1::Collected { store: "s3://kv-blocks".into(), ..Default::default() };
        let deleted_ids = vec![vec![0xab; 32].into()];
        let round = v1::Collected { round: 4, packs: 2, deleted: 1, deleted_ids, ..early.clone() };
        let one = if request.into_inner().dry_run { round } else { early };
        Ok(Response::new(v1::CollectObjectsResponse { collected: vec![one] }))
    }

    async fn list_gpus(&self, _: Request<v1::ListGpusRequest>) -> Answer<v1::ListGpusResponse> {
        self.admin()?;
        match self.0.mood {
            Mood::Old => Err(Status::unimplemented("")),
            _ => Ok(Response::new(self.gpus())),
        }
    }
}

#[tonic::async_trait]
impl worker_server::Worker for Service {
    type OpenStream = Messages<v1::SessionNotice>;
    async fn open(&self, _: Request<v1::OpenRequest>) -> Answer<Self::OpenStream> {
        use tokio_stream::StreamExt as _;
        let first = v1::SessionNotice { session: 1, epoch: 1, draining: false };
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(first)).chain(tokio_stream::pending()))))
    }

    async fn register(&self, request: Request<v1::RegisterRequest>) -> Answer<v1::RegisterResponse> {
        let request = request.into_inner();
        let scope = convert::scope(request.scope).map_err(|fault| status(&fault))?;
        let slice = convert::slice(request.slice).map_err(|fault| status(&fault))?;
        let scope_id = scope.id().as_bytes().to_vec().into();
        let mut registered = self.0.registered.lock().unwrap();
        registered.push((scope, slice));
        let binding = registered.len() as u32 - 1;
        Ok(Response::new(v1::RegisterResponse { binding, scope_id, epoch: 1 }))
    }

    async fn describe(&self, _: Request<v1::DescribeRequest>) -> Answer<v1::DescribeResponse> {
        Ok(Response::new(v1::DescribeResponse {
            node: "fake".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            epoch: 1,
            shards: 1,
            keys_per_request_max: 2,
            ..Default::default()
        }))
    }
}

#[tonic::async_trait]
impl blocks_server::Blocks for Service {
    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Answer<v1::LookupResponse> {
        use v1::found::What;
        let request = request.into_inner();
        let keys = self.keys(request.names.as_ref())?;
        let host = What::Tier(v1::Tier::Host.into());
        if request.peers {
            // Of the blocks that are not here node-b has the seventh and expects the eighth.
            let miss = |reason| What::Miss(convert::miss_message(reason, Vec::new()));
            let (what, node) = match (self.0.mood, keys[0].0[0]) {
                (Mood::Peers, 7) => (host, "node-b"),
                (Mood::Peers, 8) => (miss(MissReason::NotComplete), "node-b"),
                _ => (miss(MissReason::NeverStored), ""),
            };
            let found = v1::Found { what: Some(what), node: node.into() };
            return Ok(Response::new(v1::LookupResponse { prefix: 0, found: vec![found] }));
        }
        let found = v1::Found { what: Some(host), ..v1::Found::default() };
        Ok(Response::new(v1::LookupResponse { prefix: keys.len() as u32, found: vec![found; keys.len()] }))
    }

    async fn acquire(&self, request: Request<v1::AcquireRequest>) -> Answer<v1::AcquireResponse> {
        use v1::acquired::What;
        let request = request.into_inner();
        assert_eq!((request.node.as_str(), request.session), ("node-b", 1));
        let keys = self.keys(request.names.as_ref())?;
        assert!(keys.len() <= 2 && request.wait_ms > 0);
        let (mut stored, peer) = (self.0.stored.lock().unwrap(), self.0.taken.lock().unwrap());
        let one = |key: &BlockKey| {
            assert!(!stored.contains_key(key), "it was never away");
            let what = match peer.get(key) {
                Some(bytes) => {
                    stored.insert(*key, bytes.clone());
                    What::Lease(v1::Lease { lease: 9, ..Default::default() })
                }
                None => What::Miss(convert::miss_message(MissReason::PeerEvicted, Vec::new())),
            };
            v1::Acquired { what: Some(what) }
        };
        Ok(Response::new(v1::AcquireResponse { acquired: keys.iter().map(one).collect() }))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Answer<v1::ReleaseResponse> {
        Ok(Response::new(v1::ReleaseResponse { released: request.into_inner().leases.len() as u32 }))
    }

    type GetStream = Messages<v1::GetResponse>;
    async fn get(&self, request: Request<v1::GetRequest>) -> Answer<Self::GetStream> {
        use v1::get_response::What;
        let key = self.keys(request.into_inner().names.as_ref())?[0];
        let message = |what| Ok(v1::GetResponse { what: Some(what) });
        let Some(mut bytes) = self.0.stored.lock().unwrap().get(&key).cloned() else {
            let miss = convert::miss_message(MissReason::NeverStored, Vec::new());
            return Ok(Response::new(Box::pin(tokio_stream::once(message(What::Miss(miss))))));
        };
        if self.0.mood == Mood::Broken {
            // Wrong bytes under a checksum that fits them: only the payload itself tells.
            bytes[17] ^= 1;
        }
        let header = v1::GetHeader {
            bytes: bytes.len() as u32,
            checksum: Checksum::of(&key, &bytes).0,
            key: key.as_bytes().to_vec().into(),
            tier: v1::Tier::Host.into(),
        };
        let messages = [message(What::Header(header)), message(What::Chunk(bytes.into()))];
        Ok(Response::new(Box::pin(tokio_stream::iter(messages))))
    }

    async fn put(&self, request: Request<Streaming<v1::PutRequest>>) -> Answer<v1::PutResponse> {
        let mut messages = request.into_inner();
        let (mut header, mut bytes) = (None, Vec::new());
        while let Some(message) = messages.message().await? {
            header = header.or(message.header);
            bytes.extend_from_slice(&message.chunk);
        }
        let header = header.ok_or_else(|| Status::invalid_argument("no header"))?;
        let key = self.key_of(header.binding, &header.sequence_hash)?;
        let already = self.0.stored.lock().unwrap().insert(key, bytes).is_some();
        Ok(Response::new(v1::PutResponse { already, key: key.as_bytes().to_vec().into() }))
    }

    async fn reserve(&self, _: Request<v1::ReserveRequest>) -> Answer<v1::ReserveResponse> {
        not_here()
    }

    async fn abort(&self, _: Request<v1::AbortRequest>) -> Answer<v1::AbortResponse> {
        not_here()
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Answer<v1::PinResponse> {
        let (pinned, absent) = self.count(request.into_inner().names.as_ref())?;
        Ok(Response::new(v1::PinResponse { pinned, absent }))
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Answer<v1::UnpinResponse> {
        let (unpinned, _) = self.count(request.into_inner().names.as_ref())?;
        Ok(Response::new(v1::UnpinResponse { unpinned }))
    }

    async fn prefetch(&self, _: Request<v1::PrefetchRequest>) -> Answer<v1::PrefetchResponse> {
        not_here()
    }

    async fn evict(&self, request: Request<v1::EvictRequest>) -> Answer<v1::EvictResponse> {
        let request = request.into_inner();
        assert!(request.names.as_ref().unwrap().keys.len() <= 2, "more keys than the daemon takes at once");
        let (evicted, absent) = self.count(request.names.as_ref())?;
        for key in self.keys(request.names.as_ref())? {
            self.0.stored.lock().unwrap().remove(&key);
        }
        Ok(Response::new(v1::EvictResponse { evicted, in_use: 0, absent }))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Answer<v1::ExplainResponse> {
        let names = request.into_inner().names.unwrap_or_default();
        let key = self.keys(Some(&names))?[0];
        let here = (1..=2).find(|n| key.0 == [*n; 16]).map(block);
        let miss = match (&here, names.sequence_hashes.is_empty()) {
            (Some(_), _) => None,
            (None, true) => Some(convert::miss_message(MissReason::NeverStored, Vec::new())),
            (None, false) => Some(convert::miss_message(MissReason::ScopeDiffers, vec!["dtype".into()])),
        };
        let pack = match self.0.mood {
            Mood::Object => vec![0xab; 32].into(),
            _ => Default::default(),
        };
        Ok(Response::new(v1::ExplainResponse {
            key: key.as_bytes().to_vec().into(),
            miss,
            block: here,
            pack,
        }))
    }
}
