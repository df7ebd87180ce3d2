//! A daemon that is played: it knows sessions and the service `Devices`, remembers what it heard, and says what a test
//! tells it to. It has no blocks.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_api::fault::to_status;
use kv_api::{convert, v1};
use kv_arena::{Geometry, HazardFile, ShardMemory};
use kv_block::code::Code;
use kv_block::{Epoch, Fault, SessionId, ShardId};
use kv_client::{Client, ClientOptions, Worker, WorkerOptions};
use kv_shm::Layout;
use kv_shm::door::{Connection, Listener, Message, ShardWelcome, VERSION, Welcome};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status, Streaming};

pub(crate) const LONG: Duration = Duration::from_secs(20);
/// Blocks that one request may name.
pub(crate) const KEYS_MAX: usize = 4;

/// Waits until `what` holds.
pub(crate) fn soon(mut what: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !what() {
        assert!(Instant::now() < until, "it never came to be");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What it heard.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Heard {
    Session(u64),
    Bound(u64),
    Offer(u64),
    Withdraw(u64),
    Register(v1::RegisterCacheRequest),
    Forget(u32),
    Quiesce(u32),
    Save(v1::SaveHeader),
    Ready(u32, Option<u32>),
    /// The caller said nothing more.
    SaveEnd,
    Load(v1::LoadRequest),
}

/// What it says to the messages of a load, as they come.
pub(crate) type Script = mpsc::UnboundedReceiver<Result<v1::LoadResponse, Status>>;

/// What outlives its lives.
#[derive(Default)]
pub(crate) struct Board {
    heard: Mutex<Vec<Heard>>,
    /// Answers to registrations, in their order; then each gets a number.
    pub(crate) refusals: Mutex<VecDeque<Fault>>,
    /// Answers to saves, in their order; then all is stored and was not before.
    pub(crate) saves: Mutex<VecDeque<Result<Vec<v1::Saved>, Fault>>>,
    /// Answers to loads, in their order.
    pub(crate) loads: Mutex<VecDeque<Script>>,
    /// Saves and quiesces are not answered.
    pub(crate) hangs: AtomicBool,
    /// Descriptors that were handed over and not withdrawn.
    handed: Mutex<Vec<(u64, OwnedFd)>>,
    epoch: AtomicU64,
    caches: AtomicU32,
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Board {
    fn hear(&self, heard: Heard) {
        lock(&self.heard).push(heard);
    }

    /// All that it heard until now, in order.
    pub(crate) fn heard(&self) -> Vec<Heard> {
        lock(&self.heard).clone()
    }

    /// Registrations that it heard.
    pub(crate) fn registered(&self) -> Vec<v1::RegisterCacheRequest> {
        let one = |heard| if let Heard::Register(request) = heard { Some(request) } else { None };
        self.heard().into_iter().filter_map(one).collect()
    }

    /// Numbers of descriptors that it has.
    pub(crate) fn handed(&self) -> Vec<u64> {
        lock(&self.handed).iter().map(|(number, _)| *number).collect()
    }

    /// Has the next load answered by what is sent to the sender that this gives.
    pub(crate) fn script(&self) -> mpsc::UnboundedSender<Result<v1::LoadResponse, Status>> {
        let (sender, receiver) = mpsc::unbounded_channel();
        lock(&self.loads).push_back(receiver);
        sender
    }

    pub(crate) fn refuse(&self, fault: Fault) {
        lock(&self.refusals).push_back(fault);
    }

    pub(crate) fn answer(&self, saved: Result<Vec<v1::Saved>, Fault>) {
        lock(&self.saves).push_back(saved);
    }
}

/// One life of it.
struct Life {
    /// Its end closes every connection.
    runtime: tokio::runtime::Runtime,
    door: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

/// A played daemon on a directory of its own.
pub(crate) struct Played {
    dir: tempfile::TempDir,
    /// Version that it speaks on the worker socket; none: it has no such socket.
    door_version: Option<u16>,
    pub(crate) board: Arc<Board>,
    life: Option<Life>,
}

impl Played {
    pub(crate) fn start(door_version: Option<u16>) -> Self {
        let dir = tempfile::Builder::new().prefix("kv-played-").tempdir().unwrap();
        let mut played = Self { dir, door_version, board: Arc::default(), life: None };
        played.start_again();
        played
    }

    /// With a worker socket.
    pub(crate) fn with_door() -> Self {
        Self::start(Some(VERSION))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// All connections close, and nobody is there.
    pub(crate) fn kill(&mut self) {
        if let Some(life) = self.life.take() {
            life.stop.store(true, Ordering::Relaxed);
            life.runtime.shutdown_timeout(LONG);
            life.door.map(JoinHandle::join);
        }
        lock(&self.board.handed).clear();
        for name in ["kvd.sock", "worker.sock"] {
            let _ = std::fs::remove_file(self.path(name));
        }
    }

    pub(crate) fn start_again(&mut self) {
        self.kill();
        let epoch = self.board.epoch.fetch_add(1, Ordering::Relaxed) + 1;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let door = self.door_version.map(|version| {
            let listener = Listener::bind(&self.path("worker.sock"), 0o600).unwrap();
            let (board, stop) = (Arc::clone(&self.board), Arc::clone(&stop));
            let dir = self.path("");
            std::thread::spawn(move || greet(&listener, &dir, (version, epoch), &board, &stop))
        });
        let board = Arc::clone(&self.board);
        let path = self.path("kvd.sock");
        runtime.block_on(async {
            let incoming = UnixListenerStream::new(tokio::net::UnixListener::bind(path).unwrap());
            let service = Service(Arc::clone(&board), epoch);
            let server = tonic::transport::Server::builder()
                .add_service(v1::worker_server::WorkerServer::new(service.clone()))
                .add_service(v1::devices_server::DevicesServer::new(service));
            tokio::spawn(server.serve_with_incoming(incoming));
        });
        self.life = Some(Life { runtime, door, stop });
    }

    pub(crate) fn worker(&self) -> Worker {
        let options = ClientOptions { deadline: LONG, ..ClientOptions::socket(self.dir.path()) };
        let client = Client::connect(options).wait().unwrap();
        client.worker(WorkerOptions { spins: 0, ..WorkerOptions::default() }).wait().unwrap()
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a greeted worker maps; nobody does anything with it.
struct Memory {
    _memory: ShardMemory,
    _shard: kv_shm::ShardEnd,
    _hazards: HazardFile,
}

fn greet(listener: &Listener, dir: &Path, (version, epoch): (u16, u64), board: &Board, stop: &AtomicBool) {
    let mut guests: Vec<(Connection, Option<Memory>)> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        while let Ok(Some(connection)) = listener.accept() {
            guests.push((connection, None));
        }
        guests.retain_mut(|(connection, memory)| {
            loop {
                match connection.try_recv() {
                    Ok(None) => return true,
                    Ok(Some((Message::Hello(hello), _))) => {
                        assert!((hello.version_min..=hello.version_max).contains(&version));
                        let session = epoch << 32 | u64::from(hello.hazards);
                        board.hear(Heard::Session(session));
                        *memory = Some(welcome(connection, dir, version, epoch, session));
                    }
                    Ok(Some((Message::Offer { number }, fds))) => {
                        board.hear(Heard::Offer(number));
                        lock(&board.handed).push((number, fds.into_iter().next().unwrap()));
                    }
                    Ok(Some((Message::Withdraw { number }, _))) => {
                        lock(&board.handed).retain(|(known, _)| *known != number);
                        board.hear(Heard::Withdraw(number));
                    }
                    Ok(Some((other, _))) => panic!("{other:?}"),
                    Err(_) => return false,
                }
            }
        });
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn welcome(connection: &Connection, dir: &Path, version: u16, epoch: u64, session: u64) -> Memory {
    let geometry = Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: 64 };
    let memory = ShardMemory::anonymous(geometry).unwrap();
    let layout = Layout::new(16, 0).unwrap();
    let (shard, [ring, bell]) = kv_shm::create(layout).unwrap();
    let hazards = HazardFile::create(dir, ShardId(0), SessionId(session), 1, 1, 16).unwrap();
    let shards = vec![ShardWelcome { shard: ShardId(0), numa_node: None, hazards: 16, layout }];
    let (session, epoch) = (SessionId(session), Epoch(epoch));
    let message = Message::Welcome(Welcome { version, session, epoch, may_write: false, shards });
    let fds = [memory.meta_ro().unwrap(), memory.data_ro().unwrap(), hazards.fd().unwrap(), ring, bell];
    connection.send(&message, &fds.each_ref().map(AsFd::as_fd)).unwrap();
    Memory { _memory: memory, _shard: shard, _hazards: hazards }
}

#[derive(Clone)]
struct Service(Arc<Board>, u64);

impl Service {
    fn check(&self, session: u64) -> Result<(), Status> {
        match session >> 32 == self.1 {
            true => Ok(()),
            false => Err(to_status(&Fault::new(Code::UnknownSession, "of another life"))),
        }
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl v1::worker_server::Worker for Service {
    type OpenStream = Answers<v1::SessionNotice>;

    async fn open(&self, _: Request<v1::OpenRequest>) -> Result<Response<Self::OpenStream>, Status> {
        let session = self.1 << 32;
        self.0.hear(Heard::Session(session));
        let notice = v1::SessionNotice { session, epoch: self.1, draining: false };
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let _ = sender.send(Ok(notice)).await;
            sender.closed().await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterResponse>, Status> {
        let request = request.into_inner();
        self.check(request.session)?;
        self.0.hear(Heard::Bound(request.session));
        let scope = convert::scope(request.scope).map_err(|fault| to_status(&fault))?;
        let scope_id = Bytes::copy_from_slice(scope.id().as_bytes());
        Ok(Response::new(v1::RegisterResponse { binding: 3, scope_id, epoch: self.1 }))
    }

    async fn describe(
        &self,
        _: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        Ok(Response::new(v1::DescribeResponse {
            epoch: self.1,
            shards: 1,
            keys_per_request_max: KEYS_MAX as u32,
            message_bytes_max: 4 << 20,
            block_bytes_max: 1 << 20,
            ..v1::DescribeResponse::default()
        }))
    }
}

#[tonic::async_trait]
impl v1::devices_server::Devices for Service {
    async fn register_cache(
        &self,
        request: Request<v1::RegisterCacheRequest>,
    ) -> Result<Response<v1::RegisterCacheResponse>, Status> {
        let request = request.into_inner();
        self.check(request.session)?;
        self.0.hear(Heard::Register(request));
        if let Some(fault) = lock(&self.0.refusals).pop_front() {
            return Err(to_status(&fault));
        }
        let cache = self.0.caches.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(Response::new(v1::RegisterCacheResponse { cache, epoch: self.1 }))
    }

    async fn forget_cache(
        &self,
        request: Request<v1::ForgetCacheRequest>,
    ) -> Result<Response<v1::ForgetCacheResponse>, Status> {
        let request = request.into_inner();
        self.check(request.session)?;
        self.0.hear(Heard::Forget(request.cache));
        Ok(Response::new(v1::ForgetCacheResponse {}))
    }

    async fn quiesce_cache(
        &self,
        request: Request<v1::QuiesceCacheRequest>,
    ) -> Result<Response<v1::QuiesceCacheResponse>, Status> {
        let request = request.into_inner();
        self.check(request.session)?;
        self.0.hear(Heard::Quiesce(request.cache));
        Ok(Response::new(v1::QuiesceCacheResponse {}))
    }

    async fn save(
        &self,
        request: Request<Streaming<v1::SaveRequest>>,
    ) -> Result<Response<v1::SaveResponse>, Status> {
        use v1::save_request::What;
        let mut messages = request.into_inner();
        let Some(v1::SaveRequest { what: Some(What::Header(header)) }) = messages.message().await? else {
            return Err(Status::invalid_argument("no header"));
        };
        self.check(header.session)?;
        self.0.hear(Heard::Save(header.clone()));
        if self.0.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        let answer = lock(&self.0.saves).pop_front();
        if let Some(Err(fault)) = &answer {
            return Err(to_status(fault));
        }
        // The layers of what the tests register.
        let (all, mut ready) = (2, if header.by_layer { 0 } else { 2 });
        while ready < all {
            match messages.message().await? {
                Some(v1::SaveRequest { what: Some(What::Ready(more)) }) => {
                    self.0.hear(Heard::Ready(more.layers, more.event));
                    ready = more.layers;
                }
                None => {
                    self.0.hear(Heard::SaveEnd);
                    return Err(to_status(&Fault::new(Code::BadRequest, "it ended too early")));
                }
                other => return Err(Status::invalid_argument(format!("{other:?}"))),
            }
        }
        let stored = || v1::Saved { what: Some(v1::saved::What::Already(false)) };
        let usual = || header.blocks.iter().map(|_| stored()).collect();
        let saved = answer.and_then(Result::ok).unwrap_or_else(usual);
        Ok(Response::new(v1::SaveResponse { saved }))
    }

    type LoadStream = Answers<v1::LoadResponse>;

    async fn load(&self, request: Request<v1::LoadRequest>) -> Result<Response<Self::LoadStream>, Status> {
        let request = request.into_inner();
        self.check(request.session)?;
        self.0.hear(Heard::Load(request));
        let script = lock(&self.0.loads).pop_front();
        let script = script.ok_or_else(|| Status::internal("nobody said what to say"))?;
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(script))))
    }
}
