//! gRPC around the door: connections that are known by number, and the services of the protocol.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::Stream;
use tonic::body::Body;
use tonic::codec::EncodeBody;
use tonic::codegen::http;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};

use crate::door::Door;
use crate::wire::*;

/// Connections at one moment; those beyond are closed at once.
const CONNECTIONS_MAX: usize = 256;
/// Calls under way on one connection.
const STREAMS_MAX: u32 = 256;
/// Bytes of one message: all tokens of the longest request, and some.
const MESSAGE_BYTES_MAX: usize = 32 << 20;
/// Received at one time on a connection, and on one call of it.
const WINDOW_BYTES: u32 = 4 << 20;
/// A client that is silent for so long is asked for a sign of life...
const ASK_AFTER: Duration = Duration::from_secs(20);
/// ...which must come within this.
const ANSWER_WITHIN: Duration = Duration::from_secs(40);
/// How often to look for what was held too long.
const TIDY_EVERY: Duration = Duration::from_secs(1);

/// Number of a connection, never used twice.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct ConnectionId(u64);

/// Where the door listens.
pub enum Listener {
    /// On TCP.
    Tcp(tokio::net::TcpListener),
    /// On a Unix socket.
    Unix(tokio::net::UnixListener),
}

impl Listener {
    /// Listens on a Unix socket with this mode; a file that nobody answers on is replaced.
    pub fn unix(path: &Path, mode: u32) -> io::Result<Self> {
        use std::os::unix::net::{UnixListener, UnixStream};
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let answered = UnixStream::connect(path);
                if !answered.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
                    return Err(error);
                }
                std::fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            bound => bound?,
        };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        listener.set_nonblocking(true)?;
        Ok(Self::Unix(tokio::net::UnixListener::from_std(listener)?))
    }

    async fn accept(&self) -> io::Result<Io> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Io::Tcp(stream))
            }
            Self::Unix(listener) => Ok(Io::Unix(listener.accept().await?.0)),
        }
    }
}

enum Io {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

/// A connection that is counted, and heard of when it closes.
struct Connection {
    io: Io,
    id: ConnectionId,
    closed: mpsc::UnboundedSender<ConnectionId>,
    _slot: OwnedSemaphorePermit,
}

impl Drop for Connection {
    fn drop(&mut self) {
        let _ = self.closed.send(self.id);
    }
}

impl Connected for Connection {
    type ConnectInfo = ConnectionId;
    fn connect_info(&self) -> ConnectionId {
        self.id
    }
}

macro_rules! either {
    ($self:ident, $io:ident => $do:expr) => {
        match &mut $self.io {
            Io::Tcp($io) => $do,
            Io::Unix($io) => $do,
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, io => Pin::new(io).poll_read(context, buffer))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, io => Pin::new(io).poll_write(context, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, io => Pin::new(io).poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, io => Pin::new(io).poll_shutdown(context))
    }
}

fn incoming(
    door: Arc<Door>,
    listener: Listener,
    closed: mpsc::UnboundedSender<ConnectionId>,
) -> impl Stream<Item = io::Result<Connection>> {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let next = AtomicU64::new(1);
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let io = tokio::select! {
                io = listener.accept() => io,
                () = sender.closed() => return,
            };
            let io = match io {
                Ok(io) => io,
                Err(error) => {
                    // Out of descriptors, most likely: those who are in go on.
                    tracing::warn!(%error, "an engine of LMCache's could not be accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                tracing::warn!(
                    max = CONNECTIONS_MAX,
                    "as many LMCache connections as there may be; one was closed"
                );
                continue;
            };
            let id = ConnectionId(next.fetch_add(1, Ordering::Relaxed));
            door.connected(id);
            let connection = Connection { io, id, closed: closed.clone(), _slot: slot };
            if sender.send(Ok(connection)).await.is_err() {
                return;
            }
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(receiver)
}

/// Serves until `stop`, then lets calls under way end. Everything that clients held is given back then.
pub async fn serve(
    door: Arc<Door>,
    listener: Listener,
    stop: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let (closed, mut closing) = mpsc::unbounded_channel();
    let tidy = Arc::clone(&door);
    let keeper = tokio::spawn(async move {
        let mut beat = tokio::time::interval(TIDY_EVERY);
        loop {
            let door = Arc::clone(&tidy);
            let done = tokio::select! {
                connection = closing.recv() => {
                    let Some(connection) = connection else { return };
                    tokio::task::spawn_blocking(move || door.disconnected(connection))
                }
                _ = beat.tick() => tokio::task::spawn_blocking(move || door.tidy()),
            };
            let _ = done.await;
        }
    });
    let service = || Service(Arc::clone(&door));
    let served = Server::builder()
        .http2_keepalive_interval(Some(ASK_AFTER))
        .http2_keepalive_timeout(Some(ANSWER_WITHIN))
        .http2_max_header_list_size(16 << 10)
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .layer(Oversize)
        .add_service(controller_service_server::ControllerServiceServer::new(service()))
        .add_service(debug_service_server::DebugServiceServer::new(service()))
        .add_service(
            lookup_service_server::LookupServiceServer::new(service())
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            engine_driven_service_server::EngineDrivenServiceServer::new(service())
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            observability_service_server::ObservabilityServiceServer::new(service())
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(lm_cache_driven_service_server::LmCacheDrivenServiceServer::new(service()))
        .add_service(q_store_service_server::QStoreServiceServer::new(service()))
        .add_service(blend_service_server::BlendServiceServer::new(service()))
        .add_service(p2p_service_server::P2pServiceServer::new(service()))
        .serve_with_incoming_shutdown(incoming(Arc::clone(&door), listener, closed), stop)
        .await;
    keeper.abort();
    let _ = tokio::task::spawn_blocking(move || door.close()).await;
    served
}

/// Answers a store whose bytes come in the call, and are more than one message may have, like a shorter one: a
/// failed store. As an error it would end the engine.
#[derive(Clone)]
struct Oversize;

#[derive(Clone)]
struct OversizeService<S>(S);

impl<S> tower::Layer<S> for Oversize {
    type Service = OversizeService<S>;
    fn layer(&self, inner: S) -> OversizeService<S> {
        OversizeService(inner)
    }
}

impl<S, B> tower::Service<http::Request<Body>> for OversizeService<S>
where
    S: tower::Service<http::Request<Body>, Response = http::Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    B: Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let uri = request.uri().clone();
        let again = uri.path().ends_with("/CommitStore").then(|| self.0.clone());
        let answer = self.0.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            let status =
                answer.headers().get("grpc-status").map(|code| tonic::Code::from_bytes(code.as_bytes()));
            let Some(mut again) = again.filter(|_| status == Some(tonic::Code::OutOfRange)) else {
                return Ok(answer);
            };
            let short = CommitStoreRequest { data: vec![0], ..CommitStoreRequest::default() };
            let short = tokio_stream::once(Ok(short));
            let body = EncodeBody::new_client(tonic_prost::ProstEncoder::default(), short, None, None);
            let mut request = http::Request::new(Body::new(body));
            *request.method_mut() = http::Method::POST;
            *request.version_mut() = http::Version::HTTP_2;
            *request.uri_mut() = uri;
            request.headers_mut().insert("content-type", http::HeaderValue::from_static("application/grpc"));
            std::future::poll_fn(|context| again.poll_ready(context)).await?;
            again.call(request).await
        })
    }
}

struct Service(Arc<Door>);

impl Service {
    /// Runs what may wait beside the calls of others.
    async fn transfer<T: Send + 'static>(
        &self,
        otherwise: T,
        work: impl FnOnce(&Door) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let _turn = Arc::clone(&self.0.transfers).acquire_owned().await;
        let door = Arc::clone(&self.0);
        Ok(tokio::task::spawn_blocking(move || work(&door)).await.unwrap_or(otherwise))
    }
}

/// Of whose connection a call came.
fn connection<T>(request: &Request<T>) -> ConnectionId {
    request.extensions().get::<ConnectionId>().copied().unwrap_or(ConnectionId(0))
}

fn answer<T>(message: T) -> Result<Response<T>, Status> {
    Ok(Response::new(message))
}

#[tonic::async_trait]
impl controller_service_server::ControllerService for Service {
    async fn clear(&self, _: Request<ClearRequest>) -> Result<Response<ClearResponse>, Status> {
        Err(Status::unimplemented(
            "kvd is not cleared by an engine: other engines' blocks are in it; use `kvctl purge`",
        ))
    }

    async fn get_chunk_size(
        &self,
        _: Request<GetChunkSizeRequest>,
    ) -> Result<Response<GetChunkSizeResponse>, Status> {
        answer(GetChunkSizeResponse { chunk_size: self.0.options.chunk_tokens.into() })
    }

    async fn get_experimental(
        &self,
        _: Request<GetExperimentalRequest>,
    ) -> Result<Response<GetExperimentalResponse>, Status> {
        answer(GetExperimentalResponse { names: Vec::new() })
    }

    async fn ping(&self, request: Request<PingRequest>) -> Result<Response<PingResponse>, Status> {
        answer(PingResponse { ok: self.0.ping(request.get_ref().instance_id) })
    }

    async fn server_module_call(
        &self,
        request: Request<ServerModuleCallRequest>,
    ) -> Result<Response<ServerModuleCallResponse>, Status> {
        let method: String = request.get_ref().method.chars().take(64).collect();
        let error = format!("kvd has no server module, and no `{method}`");
        answer(ServerModuleCallResponse { success: false, payload: Vec::new(), error })
    }
}

#[tonic::async_trait]
impl debug_service_server::DebugService for Service {
    async fn noop(&self, _: Request<NoopRequest>) -> Result<Response<NoopResponse>, Status> {
        answer(NoopResponse { message: "OK".into() })
    }
}

#[tonic::async_trait]
impl engine_driven_service_server::EngineDrivenService for Service {
    async fn register_kv_cache_engine_driven_context(
        &self,
        request: Request<RegisterKvCacheEngineDrivenContextRequest>,
    ) -> Result<Response<RegisterKvCacheEngineDrivenContextResponse>, Status> {
        let connection = connection(&request);
        let (shm_name, pool_bytes) = self.0.register(connection, request.into_inner()).await?;
        answer(RegisterKvCacheEngineDrivenContextResponse { shm_name, pool_size: pool_bytes as i64 })
    }

    async fn unregister_kv_cache_engine_driven_context(
        &self,
        request: Request<UnregisterKvCacheEngineDrivenContextRequest>,
    ) -> Result<Response<UnregisterKvCacheEngineDrivenContextResponse>, Status> {
        let id = request.get_ref().instance_id;
        self.transfer((), move |door| door.unregister(id)).await?;
        answer(UnregisterKvCacheEngineDrivenContextResponse {})
    }

    async fn prepare_store(
        &self,
        request: Request<PrepareStoreRequest>,
    ) -> Result<Response<PrepareStoreResponse>, Status> {
        let PrepareStoreRequest { key, instance_id } = request.into_inner();
        let nothing = crate::pack::store(&[], &[]);
        let encoded_context =
            self.transfer(nothing, move |door| door.prepare_store(instance_id, key)).await?;
        answer(PrepareStoreResponse { encoded_context })
    }

    async fn commit_store(
        &self,
        request: Request<CommitStoreRequest>,
    ) -> Result<Response<CommitStoreResponse>, Status> {
        let CommitStoreRequest { key, instance_id, data } = request.into_inner();
        if !data.is_empty() {
            self.0.sent_in_the_call(instance_id);
            return answer(CommitStoreResponse { success: false });
        }
        let success = self.transfer(false, move |door| door.commit_store(instance_id, key)).await?;
        answer(CommitStoreResponse { success })
    }

    async fn prepare_retrieve(
        &self,
        request: Request<PrepareRetrieveRequest>,
    ) -> Result<Response<PrepareRetrieveResponse>, Status> {
        let PrepareRetrieveRequest { key, instance_id } = request.into_inner();
        let context = self.transfer(None, move |door| door.prepare_retrieve(instance_id, key)).await?;
        // An empty MessagePack map where there is nothing: the client decodes it all the same.
        let (success, encoded_context) = context.map_or((false, vec![0x80]), |context| (true, context));
        answer(PrepareRetrieveResponse { success, data: Vec::new(), encoded_context })
    }

    async fn commit_retrieve(
        &self,
        request: Request<CommitRetrieveRequest>,
    ) -> Result<Response<CommitRetrieveResponse>, Status> {
        let CommitRetrieveRequest { key, instance_id } = request.into_inner();
        let success = self.transfer(true, move |door| door.commit_retrieve(instance_id, key)).await?;
        answer(CommitRetrieveResponse { success })
    }
}

fn count(chunks: Option<usize>) -> Option<i64> {
    chunks.map(|chunks| chunks as i64)
}

#[tonic::async_trait]
impl lookup_service_server::LookupService for Service {
    async fn lookup(&self, request: Request<LookupRequest>) -> Result<Response<LookupResponse>, Status> {
        let connection = connection(&request);
        self.0.lookup(connection, request.into_inner().key).await;
        answer(LookupResponse {})
    }

    async fn query_prefetch_status(
        &self,
        request: Request<QueryPrefetchStatusRequest>,
    ) -> Result<Response<QueryPrefetchStatusResponse>, Status> {
        let promised = self.0.promised(connection(&request), &request.get_ref().request_id);
        answer(QueryPrefetchStatusResponse { chunk_count: count(promised) })
    }

    async fn wait_prefetch_status(
        &self,
        request: Request<WaitPrefetchStatusRequest>,
    ) -> Result<Response<WaitPrefetchStatusResponse>, Status> {
        let connection = connection(&request);
        let WaitPrefetchStatusRequest { request_id, timeout } = request.into_inner();
        let promised = self.0.wait_promised(connection, &request_id, timeout).await;
        answer(WaitPrefetchStatusResponse { chunk_count: count(promised) })
    }

    async fn free_lookup_locks(
        &self,
        request: Request<FreeLookupLocksRequest>,
    ) -> Result<Response<FreeLookupLocksResponse>, Status> {
        let connection = connection(&request);
        let key = request.into_inner().key;
        self.transfer((), move |door| door.free(connection, key)).await?;
        answer(FreeLookupLocksResponse {})
    }

    async fn end_session(
        &self,
        request: Request<EndSessionRequest>,
    ) -> Result<Response<EndSessionResponse>, Status> {
        let connection = connection(&request);
        let id = request.into_inner().request_id;
        self.transfer((), move |door| door.end_session(connection, &id)).await?;
        answer(EndSessionResponse {})
    }
}

#[tonic::async_trait]
impl observability_service_server::ObservabilityService for Service {
    type SubscribeKvEventsStream = tokio_stream::Once<Result<KvEventBatch, Status>>;

    async fn report_block_allocation(
        &self,
        _: Request<ReportBlockAllocationRequest>,
    ) -> Result<Response<ReportBlockAllocationResponse>, Status> {
        answer(ReportBlockAllocationResponse {})
    }

    async fn subscribe_kv_events(
        &self,
        request: Request<SubscribeKvEventsRequest>,
    ) -> Result<Response<Self::SubscribeKvEventsStream>, Status> {
        // kvd does not keep the tokens of blocks, which such events must carry. The client reports its own
        // stores instead when it hears that.
        let next_cursor = request.get_ref().cursor;
        let batch = KvEventBatch { enabled: false, incarnation: 0, next_cursor, lost: false };
        answer(tokio_stream::once(Ok(batch)))
    }
}

fn engine_driven<T>(what: &str) -> Result<Response<T>, Status> {
    Err(Status::unimplemented(format!(
        "kvd does not take {what} from LMCache's connector. It serves engine-driven transfer: set \
         \"lmcache.mp.mp_transfer_mode\": \"engine_driven\" in kv_connector_extra_config"
    )))
}

#[tonic::async_trait]
impl lm_cache_driven_service_server::LmCacheDrivenService for Service {
    async fn register_kv_cache(
        &self,
        _: Request<RefusedRequest>,
    ) -> Result<Response<RefusedResponse>, Status> {
        engine_driven("handles of device memory (RegisterKvCache)")
    }

    async fn unregister_kv_cache(
        &self,
        _: Request<RefusedRequest>,
    ) -> Result<Response<RefusedResponse>, Status> {
        answer(RefusedResponse {})
    }

    async fn store(&self, _: Request<RefusedRequest>) -> Result<Response<RefusedResponse>, Status> {
        engine_driven("handles of device memory (Store)")
    }

    async fn retrieve(&self, _: Request<RefusedRequest>) -> Result<Response<RefusedResponse>, Status> {
        engine_driven("handles of device memory (Retrieve)")
    }
}

#[tonic::async_trait]
impl q_store_service_server::QStoreService for Service {
    async fn register_q_cache(
        &self,
        _: Request<RefusedRequest>,
    ) -> Result<Response<RefusedResponse>, Status> {
        engine_driven("query tensors (transfer_intermediate_tensors)")
    }
}

#[tonic::async_trait]
impl blend_service_server::BlendService for Service {
    async fn cb_protocol_handshake(
        &self,
        _: Request<RefusedRequest>,
    ) -> Result<Response<RefusedResponse>, Status> {
        engine_driven("blended segments (CacheBlend)")
    }

    async fn cb_register_rope(
        &self,
        _: Request<RefusedRequest>,
    ) -> Result<Response<RefusedResponse>, Status> {
        engine_driven("blended segments (CacheBlend)")
    }

    async fn cb_unified_lookup(
        &self,
        _: Request<RefusedRequest>,
    ) -> Result<Response<RefusedResponse>, Status> {
        engine_driven("blended segments (CacheBlend)")
    }
}

#[tonic::async_trait]
impl p2p_service_server::P2pService for Service {
    async fn p2p_lookup_and_lock(
        &self,
        _: Request<RefusedRequest>,
    ) -> Result<Response<RefusedResponse>, Status> {
        engine_driven("lookups of peers (P2P)")
    }
}
