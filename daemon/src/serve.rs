//! The control runtime: gRPC on the Unix socket and, where configured, on TCP; health and metrics over HTTP;
//! signals.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kv_api::v1;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic_health::server::HealthReporter;
use tower::layer::util::{Identity, Stack};

use crate::beats::Beats;
use crate::config::{Config, Loaded};
use crate::connections::{Connections, raise_descriptor_limit};
use crate::gpu::{self, Gpus};
use crate::http::{Check, HealthSource};
use crate::node::Node;
use crate::object::{self, Objects};
use crate::peers::{self, Peers};
use crate::plan::Plan;
use crate::requests::Timed;
use crate::rpc::{
    AdminService, BlocksService, CONNECTION_WINDOW_BYTES, DevicesService, EventsService, FRAME_BYTES, Guard,
    Intake, STREAM_WINDOW_BYTES, Shared, WorkerService,
};
use crate::shard::ShardHandle;
use crate::{compose, drain, gauges, http, metrics, systemd, tls};

/// The gRPC servers, until their last connection has ended.
type Servers = tokio::task::JoinSet<Result<(), tonic::transport::Error>>;

/// A loop that has not come around for so long is stuck.
const STUCK_AFTER: Duration = Duration::from_secs(10);
/// How long the last answers may take when the shards have stopped.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// What health is asked of: the whole, and each service.
const SERVICES: [&str; 6] =
    ["", "kv.v1.Blocks", "kv.v1.Devices", "kv.v1.Worker", "kv.v1.Events", "kv.v1.Admin"];

/// Opens the node, serves until a signal says stop, then drains.
pub fn run(loaded: &Loaded, plan: &Plan, plan_text: String) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(plan.control_threads)
        .thread_name("control")
        .enable_all()
        .build()
        .context("starting the control runtime")?;
    // From here on a signal ends the daemon in order, also while it still recovers.
    let signals = runtime.block_on(async { Signals::watch() })?;
    let mut running = compose::start(loaded, plan)?;
    let node = Arc::clone(&running.node);
    let config = Arc::new(loaded.config.clone());
    let fetches = std::mem::replace(&mut running.fetches, tokio::sync::mpsc::unbounded_channel().1);
    let peers = peers::start(&node, &config, plan, fetches)?;
    let known = peers.as_ref().map(|running| running.peers.clone());
    let orders = std::mem::replace(&mut running.objects, object::door().1);
    let objects = object::start(&node, &config, orders)?;
    let stores = objects.as_ref().map(|running| running.objects.clone());
    let gpus = gpu::start(&node, &config, plan)?;
    let listener = running.grpc.try_clone().context("sharing the gRPC socket")?;
    let served = runtime.block_on(serve(
        loaded,
        config,
        plan,
        plan_text,
        node,
        (known, stores),
        gpus.gpus.clone(),
        listener,
        signals,
    ));
    systemd::stopping("stopping shards");
    if let Some(peers) = peers {
        peers.stop();
    }
    if let Some(objects) = objects {
        objects.stop();
    }
    // Before the shards: what is on its way into their slots comes to its end there.
    gpus.stop();
    running.stop();
    // Calls that waited for a shard hear that it stopped.
    let served = served.map(|mut servers| {
        let ended = async { while servers.join_next().await.is_some() {} };
        let _ = runtime.block_on(async { tokio::time::timeout(LAST_WORDS, ended).await });
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    served
}

/// The signals that end the daemon.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn watch() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("watching SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("watching SIGINT")?,
        })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "what the start put together")]
async fn serve(
    loaded: &Loaded,
    config: Arc<Config>,
    plan: &Plan,
    plan_text: String,
    node: Arc<Node>,
    (peers, objects): (Option<Peers>, Option<Objects>),
    gpus: Gpus,
    listener: std::os::unix::net::UnixListener,
    mut signals: Signals,
) -> anyhow::Result<Servers> {
    let recorder = metrics::install(&node.name);
    let (mut health_reporter, health_service) = tonic_health::server::health_reporter();
    say_health(&health_reporter, false).await;
    tokio::spawn(follow_drain(health_reporter.clone(), node.drain.watch()));
    let shared =
        Shared::new(Arc::clone(&node), Arc::clone(&config), (peers.clone(), objects.clone()), gpus.clone());
    let routes = || -> anyhow::Result<Routes> {
        let message_max = config.limits.message_bytes_max.0 as usize;
        let admin = AdminService {
            shared: shared.clone(),
            config_toml: loaded.print_effective(false),
            config_values: config_values(loaded),
            plan: plan_text.clone(),
        };
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(kv_api::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .context("building gRPC reflection")?;
        let mut routes = Routes::builder();
        routes
            .add_service(health_service.clone())
            .add_service(reflection)
            .add_service(
                v1::blocks_server::BlocksServer::new(BlocksService(shared.clone()))
                    .max_decoding_message_size(message_max),
            )
            .add_service(
                v1::devices_server::DevicesServer::new(DevicesService(shared.clone()))
                    .max_decoding_message_size(message_max),
            )
            .add_service(v1::worker_server::WorkerServer::new(WorkerService(shared.clone())))
            .add_service(v1::events_server::EventsServer::new(EventsService(shared.clone())))
            .add_service(v1::admin_server::AdminServer::new(admin));
        Ok(routes.routes())
    };

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let end = |mut stopped: tokio::sync::watch::Receiver<bool>| async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let mut servers = Servers::new();
    listener.set_nonblocking(true)?;
    let unix = UnixListenerStream::new(tokio::net::UnixListener::from_std(listener)?);
    let limits = &config.limits;
    let guard = Guard {
        config: Arc::clone(&config),
        own_uid: rustix::process::geteuid().as_raw(),
        intake: Intake::new(u64::from(limits.sessions_max).saturating_mul(limits.message_bytes_max.0)),
    };
    let connections = Connections::new(raise_descriptor_limit());
    let router = server(Server::builder(), &node, guard.clone(), routes()?);
    servers.spawn(router.serve_with_incoming_shutdown(connections.admit(unix), end(stopped.clone())));
    if let Some(address) = config.listen.tcp.get() {
        let tcp = tokio::net::TcpListener::bind(address.0)
            .await
            .with_context(|| format!("listening on {}", address.0))?;
        let mut builder = Server::builder();
        if let Some(tls) = tls::load(&config.listen.tls)? {
            builder = builder.tls_config(tls).context("using the certificates in listen.tls")?;
        } else if config.listen.insecure {
            tracing::warn!(address = %address.0, "gRPC over TCP without certificates: whoever reaches it reads and writes every block");
        }
        tracing::info!(address = %tcp.local_addr()?, "gRPC over TCP");
        let router = server(builder, &node, guard, routes()?);
        let tcp = connections.admit(TcpListenerStream::new(tcp));
        servers.spawn(router.serve_with_incoming_shutdown(tcp, end(stopped.clone())));
    }
    #[cfg(feature = "lmcache")]
    if let Some((door, listener)) = crate::lmcache::open(&config, plan, &node).await? {
        tokio::spawn(crate::lmcache::follow(Arc::clone(&door)));
        servers.spawn(kv_lmcache::serve(door, listener, end(stopped.clone())));
    }
    #[cfg(not(feature = "lmcache"))]
    let _ = plan;
    let source = Arc::new(Health { node: Arc::clone(&node), beats: std::sync::Mutex::default() });
    if let Some(address) = config.listen.http.get() {
        let http = http::listen(address.0).await.with_context(|| {
            format!(
                "listening on {} for health and metrics; set listen.http to another address, or off",
                address.0
            )
        })?;
        tracing::info!(address = %http.local_addr()?, "health and metrics over HTTP");
        let router = http::router(Arc::clone(&source) as Arc<dyn HealthSource>, recorder.clone());
        tokio::spawn(http::serve(http, router, end(stopped.clone())));
    }
    tokio::spawn(gauges::follow(Arc::clone(&node), (peers, objects), gpus, recorder));
    tokio::spawn(watchdog(Arc::clone(&source)));
    let recovered = &node.recovered;
    tracing::info!(
        node = node.name,
        epoch = node.epoch.0,
        host_blocks = recovered.host_blocks,
        disk_blocks = recovered.disk_blocks,
        took_ms = recovered.took.as_millis() as u64,
        socket = %config.run_dir().join("kvd.sock").display(),
        "kvd serves"
    );
    systemd::ready("serving");

    signals.received().await;
    tracing::info!("draining");
    systemd::stopping("draining");
    node.set_draining(true);
    say_health(&health_reporter, true).await;
    let ended = async {
        // Until then who asks for more is told why not, and can see that we drain.
        node.drain.idle().await;
        let _ = stop.send(true);
        // Whoever watches health has heard the last word, and would keep its connection for ever.
        for service in SERVICES {
            health_reporter.clear_service_status(service).await;
        }
        while servers.join_next().await.is_some() {}
    };
    if tokio::time::timeout(drain::LIMIT, ended).await.is_err() {
        tracing::warn!(
            "some calls did not end while draining; their callers are told, or see the connection close"
        );
        let _ = stop.send(true);
    }
    Ok(servers)
}

async fn say_health(reporter: &HealthReporter, draining: bool) {
    use tonic_health::ServingStatus::{NotServing, Serving};
    for service in SERVICES {
        reporter.set_service_status(service, if draining { NotServing } else { Serving }).await;
    }
}

/// Keeps gRPC health up to date while an operator starts and ends drains.
async fn follow_drain(reporter: HealthReporter, mut drain: tokio::sync::watch::Receiver<bool>) {
    while drain.changed().await.is_ok() {
        let on = *drain.borrow_and_update();
        say_health(&reporter, on).await;
    }
}

fn server(
    builder: Server,
    node: &Node,
    guard: Guard,
    routes: Routes,
) -> Router<Stack<Guard, Stack<Timed, Identity>>> {
    builder
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .http2_max_header_list_size(16 << 10)
        .max_concurrent_streams(1024)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .layer(Timed(Arc::clone(&node.drain)))
        .layer(guard)
        .add_routes(routes)
}

fn config_values(loaded: &Loaded) -> Vec<v1::ConfigValue> {
    let values = loaded.values();
    values.into_iter().map(|(key, value, origin)| v1::ConfigValue { key, value, origin }).collect()
}

/// Tells systemd that the loops come around, as long as they do.
async fn watchdog(source: Arc<Health>) {
    let Some(period) = systemd::watchdog_period() else { return };
    let mut beat = tokio::time::interval(period);
    loop {
        beat.tick().await;
        if source.live().iter().all(|check| check.state.is_ok()) {
            systemd::alive();
        }
    }
}

/// Health of the node: whether its loops come around, whether it takes work.
struct Health {
    node: Arc<Node>,
    beats: std::sync::Mutex<Beats>,
}

impl HealthSource for Health {
    fn live(&self) -> Vec<Check> {
        let mut beats = self.beats.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let shards = &self.node.shards;
        let ages = beats.ages(Instant::now(), shards.iter().map(ShardHandle::heartbeat));
        let check = |(shard, age): (&ShardHandle, Duration)| {
            let stuck = age > STUCK_AFTER;
            let state =
                if stuck { Err(format!("has not come around for {} s", age.as_secs())) } else { Ok(()) };
            Check { name: format!("shard-{}", shard.id), state }
        };
        shards.iter().zip(ages).map(check).collect()
    }

    fn ready(&self) -> Vec<Check> {
        let draining = self.node.is_draining();
        let state = if draining { Err("draining".to_owned()) } else { Ok(()) };
        vec![Check { name: "accepting".into(), state }]
    }

    fn started(&self) -> Vec<Check> {
        vec![Check { name: "recovered".into(), state: Ok(()) }]
    }
}
