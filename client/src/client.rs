//! The gRPC door: complete, canonical, works from everywhere.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kv_api::v1;
use kv_block::{BlockKey, Epoch};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};
use tonic::{Request, Response, Status};

use crate::error::{Error, of_status, timed_out, unreachable};
use crate::events::{Events, WatchOptions};
use crate::options::{ClientOptions, DEADLINE_MAX, Endpoint, Tls, WorkerOptions};
use crate::runtime::{Call, Runtime};
use crate::worker::Worker;

/// Largest answer taken, in bytes. Blocks come in pieces of 1 MiB.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// Of a message, what is neither keys nor bytes of a block.
const MESSAGE_BYTES_OTHER: u64 = 1024;
/// Bytes that a key takes in a message.
const KEY_BYTES_IN_MESSAGE: usize = BlockKey::BYTES + 2;
/// Longest piece of a block in one message, however much the daemon takes.
const CHUNK_BYTES_MAX: usize = 1 << 20;

/// A connection to one daemon. Cheap to clone; it reconnects by itself.
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
    deadline: Duration,
}

#[derive(Debug)]
struct Inner {
    runtime: Arc<Runtime>,
    channel: Channel,
    endpoint: Endpoint,
    keys_per_request_max: usize,
    chunk_bytes: usize,
}

/// A daemon, as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Name of its node.
    pub node: String,
    /// Its version.
    pub version: String,
    /// Number of its life.
    pub epoch: Epoch,
    /// How many shards it has.
    pub shards: u32,
    /// Most blocks that one request may name.
    pub keys_per_request_max: u32,
    /// Longest block in bytes.
    pub block_bytes_max: u32,
    /// Principal that the caller belongs to: whose blocks it finds.
    pub principal: String,
    /// Longest message that it takes, in bytes. Blocks go in as many as they need.
    pub message_bytes_max: u64,
    /// Names of the nodes that it fetches blocks from.
    pub peers: Vec<String>,
    /// Whether it has an object tier, which it shares with other nodes.
    pub object: bool,
}

impl Client {
    /// Connects to a daemon and asks it to describe itself.
    pub fn connect(options: ClientOptions) -> Call<Self> {
        match Runtime::start() {
            Ok(runtime) => runtime.clone().call(Self::open(runtime, options)),
            Err(error) => Call::failed(error),
        }
    }

    async fn open(runtime: Arc<Runtime>, options: ClientOptions) -> Result<Self, Error> {
        let ClientOptions { endpoint, deadline } = options;
        let deadline = deadline.min(DEADLINE_MAX);
        let opened = tokio::time::timeout(deadline, channel(&endpoint, deadline)).await;
        let channel = opened.map_err(|_| timed_out("connecting"))??;
        let inner = Inner { runtime, channel, endpoint, keys_per_request_max: 1, chunk_bytes: 1 };
        let first = Self { inner: Arc::new(inner), deadline };
        let described = first.describe_now().await?;
        let Inner { runtime, channel, endpoint, .. } =
            Arc::into_inner(first.inner).ok_or_else(|| unreachable("the client was shared too early"))?;
        let message_bytes = described.message_bytes_max.saturating_sub(MESSAGE_BYTES_OTHER);
        let message_bytes = usize::try_from(message_bytes).unwrap_or(usize::MAX);
        let keys_per_request_max =
            (described.keys_per_request_max as usize).min(message_bytes / KEY_BYTES_IN_MESSAGE).max(1);
        let chunk_bytes = message_bytes.clamp(1, CHUNK_BYTES_MAX);
        let inner = Inner { runtime, channel, endpoint, keys_per_request_max, chunk_bytes };
        Ok(Self { inner: Arc::new(inner), deadline })
    }

    /// The same connection with another deadline per call, ten minutes at most.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { inner: Arc::clone(&self.inner), deadline: deadline.min(DEADLINE_MAX) }
    }

    /// How long a call may take.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Where the daemon listens.
    pub fn endpoint(&self) -> &Endpoint {
        &self.inner.endpoint
    }

    /// Most blocks that one request may name.
    pub fn keys_per_request_max(&self) -> usize {
        self.inner.keys_per_request_max
    }

    /// Longest piece of a block that one message to the daemon may carry.
    pub(crate) fn chunk_bytes(&self) -> usize {
        self.inner.chunk_bytes
    }

    /// What the daemon says of itself now.
    pub fn describe(&self) -> Call<Description> {
        let client = self.clone();
        self.call(async move { client.describe_now().await })
    }

    pub(crate) async fn describe_now(&self) -> Result<Description, Error> {
        let answer = self.within(self.sessions().describe(self.request(v1::DescribeRequest {}))).await?;
        Ok(Description {
            node: answer.node,
            version: answer.version,
            epoch: Epoch(answer.epoch),
            shards: answer.shards,
            keys_per_request_max: answer.keys_per_request_max,
            block_bytes_max: answer.block_bytes_max,
            message_bytes_max: answer.message_bytes_max,
            principal: answer.principal,
            peers: answer.peers,
            object: answer.object,
        })
    }

    /// Opens a session: through shared memory where it can be had, else over gRPC.
    pub fn worker(&self, options: WorkerOptions) -> Call<Worker> {
        let client = self.clone();
        self.call(Worker::open(client, options))
    }

    /// What happens to the blocks of this node, without gaps, across reconnects.
    pub fn watch(&self, options: WatchOptions) -> Events {
        Events::start(self.clone(), options)
    }

    /// The `Blocks` service as generated.
    pub fn blocks(&self) -> v1::blocks_client::BlocksClient<Channel> {
        v1::blocks_client::BlocksClient::new(self.inner.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The `Devices` service as generated.
    pub fn devices(&self) -> v1::devices_client::DevicesClient<Channel> {
        v1::devices_client::DevicesClient::new(self.inner.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The `Worker` service as generated.
    pub fn sessions(&self) -> v1::worker_client::WorkerClient<Channel> {
        v1::worker_client::WorkerClient::new(self.inner.channel.clone())
    }

    /// The `Events` service as generated.
    pub fn events(&self) -> v1::events_client::EventsClient<Channel> {
        v1::events_client::EventsClient::new(self.inner.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// The `Admin` service as generated.
    pub fn admin(&self) -> v1::admin_client::AdminClient<Channel> {
        v1::admin_client::AdminClient::new(self.inner.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub(crate) fn runtime(&self) -> &Arc<Runtime> {
        &self.inner.runtime
    }

    /// Starts `work` on the client's own runtime.
    pub(crate) fn call<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Call<T> {
        self.inner.runtime.call(work)
    }

    /// A request that tells the daemon how long it may take.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.deadline);
        request
    }

    /// Ends at the deadline even when the daemon does not.
    pub(crate) async fn within<T>(
        &self,
        work: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        // A little more than the daemon has, so that its own word arrives.
        let limit = self.deadline + (self.deadline / 16).min(Duration::from_millis(100));
        match tokio::time::timeout(limit, work).await {
            Ok(answer) => answer.map(Response::into_inner).map_err(|status| of_status(&status)),
            Err(_) => Err(timed_out("the call")),
        }
    }
}

async fn channel(endpoint: &Endpoint, deadline: Duration) -> Result<Channel, Error> {
    let uri = match endpoint {
        Endpoint::Socket(_) => {
            let path = endpoint.grpc_socket().unwrap_or_default();
            let text = path.to_str().ok_or_else(|| Error::Option {
                option: "endpoint",
                why: format!("{} is not UTF-8", path.display()),
            })?;
            format!("unix:{text}")
        }
        Endpoint::Uri { uri, .. } => uri.clone(),
    };
    let wrong = |why: String| Error::Option { option: "endpoint", why };
    let mut to = tonic::transport::Endpoint::from_shared(uri.clone())
        .map_err(|error| wrong(format!("`{uri}`: {error}")))?
        .connect_timeout(deadline)
        .tcp_nodelay(true)
        // A block of 64 KiB comes in one piece; longer ones only cost page faults.
        .max_frame_size(96 << 10)
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20);
    if let Endpoint::Uri { tls, .. } = endpoint {
        to =
            to.http2_keep_alive_interval(Duration::from_secs(10)).keep_alive_timeout(Duration::from_secs(10));
        if let Some(tls) = tls {
            to = to.tls_config(tls_config(tls)?).map_err(|error| wrong(format!("tls: {error}")))?;
        }
    }
    to.connect().await.map_err(|error| {
        let cause = std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
        unreachable(format!("no daemon at {endpoint}{cause}"))
    })
}

fn tls_config(tls: &Tls) -> Result<ClientTlsConfig, Error> {
    let read = |path: &Path| {
        std::fs::read(path)
            .map_err(|error| Error::Option { option: "tls", why: format!("{}: {error}", path.display()) })
    };
    let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&tls.ca)?));
    if let Some((certificate, key)) = &tls.identity {
        config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    if let Some(name) = &tls.name {
        config = config.domain_name(name);
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use kv_block::FaultKind;

    use super::*;

    #[test]
    fn nobody_at_the_socket_is_unavailable_and_names_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let error = Client::connect(ClientOptions::socket(dir.path())).wait().unwrap_err();
        assert_eq!(error.kind(), FaultKind::Unavailable);
        assert!(error.to_string().contains(&*dir.path().to_string_lossy()), "{error}");
    }

    #[test]
    fn a_daemon_that_never_answers_ends_at_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let _silent = std::os::unix::net::UnixListener::bind(dir.path().join("kvd.sock")).unwrap();
        let options =
            ClientOptions { deadline: Duration::from_millis(50), ..ClientOptions::socket(dir.path()) };
        let error = Client::connect(options).wait().unwrap_err();
        assert!(matches!(error.kind(), FaultKind::Timeout | FaultKind::Unavailable), "{error}");
    }

    #[test]
    fn wrong_addresses_and_missing_certificates_are_named() {
        let error = Client::connect(ClientOptions::uri("no uri at all")).wait().unwrap_err();
        assert!(matches!(error, Error::Option { option: "endpoint", .. }), "{error}");
        let tls = Tls { ca: "/nowhere/ca.pem".into(), identity: None, name: None };
        let endpoint = Endpoint::Uri { uri: "https://127.0.0.1:1".into(), tls: Some(tls) };
        let error =
            Client::connect(ClientOptions { endpoint, ..ClientOptions::default() }).wait().unwrap_err();
        assert!(error.to_string().contains("/nowhere/ca.pem"), "{error}");
    }
}
