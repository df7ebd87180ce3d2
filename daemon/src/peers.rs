//! This node among its peers: what it fetches from them, what it serves to them.
//!
//! ```text
//!   shards --- searches ---> fetch.rs: one task, the Exchange <--- words --- line.rs: a connection to each peer
//!          <-- blocks ------          '--- reads ---> links: TCP, RDMA ----> straight into the arena
//!
//!   peers ---- wants ------> serve.rs: one task per reader, an Owner -- holds --> shards
//!         <--- bytes -------          '--- links: straight from the arena
//!   rdma.rs      the devices of this node, as paths (facts.rs: what peers are told of them)
//!   offer.rs     blocks that a leaving node would rather not take along, on both sides
//! ```
//! All of it runs on runtimes of its own, so that moving bytes never holds up who asks for the node's health: one for
//! words and small blocks, one for long blocks.
//! What is decided is decided in [`kv_node::Exchange`], [`kv_transport::reader::Reader`] and
//! [`kv_transport::owner::Owner`]; here it is joined to sockets, devices and the clock.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kv_block::code::Code;
use kv_block::{BlockKey, Fault, ShardId};
use kv_node::{FetchOp, PeerId, TransferReport};
use kv_tcp::{Dialer, Limits, Listener, Runtimes, Security, Tls};
use kv_transport::owner::{LeaseReport, OwnerReport, OwnerState};
use kv_transport::plan::PathPlan;
use kv_transport::reader::PeerReport;
use kv_wire::message::{Offer, Sight, Taken};
use tokio::sync::{mpsc, oneshot};

use crate::config::Config;
use crate::config::units::Member;
use crate::node::Node;
use crate::plan::Plan;

pub mod facts;
mod fetch;
mod line;
mod mending;
mod offer;
pub mod rdma;
mod serve;

pub use offer::Evacuation;
pub(crate) use offer::{evacuate, named};
pub(crate) use serve::CONNECTIONS_MAX;

/// Control connections that wait to be taken up.
const ACCEPTED_MAX: usize = 64;
/// How long the tasks may take to end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What each member has from us, by its name.
type Served = Arc<Mutex<BTreeMap<String, ServedPeer>>>;

/// What one reader has from us.
#[derive(Clone, Debug, Default)]
pub struct ServedPeer {
    /// By each of its connections. There may be an old one that does not know yet that it is over.
    now: BTreeMap<u128, Connection>,
    /// Blocks and bytes granted by those before.
    before: (u64, u64),
}

/// One connection of a reader.
#[derive(Clone, Debug)]
struct Connection {
    report: OwnerReport,
    /// What is held for it, block by block, is asked here.
    asks: mpsc::Sender<oneshot::Sender<Vec<LeaseReport>>>,
}

impl ServedPeer {
    /// Blocks that it was let read since the start.
    pub fn blocks(&self) -> u64 {
        self.before.0 + self.reports().map(|now| now.grants).sum::<u64>()
    }

    /// Their bytes.
    pub fn bytes(&self) -> u64 {
        self.before.1 + self.reports().map(|now| now.bytes_granted).sum::<u64>()
    }

    /// Blocks that are held for it.
    pub fn held(&self) -> usize {
        self.reports().map(|now| now.waiting + now.granted + now.fenced).sum()
    }

    /// Bytes that it may read, or might still.
    pub fn held_bytes(&self) -> u64 {
        self.reports().map(|now| now.bytes).sum()
    }

    /// Whether it is connected.
    pub fn reads_here(&self) -> bool {
        self.reports().any(|now| now.state == OwnerState::Serving)
    }

    fn reports(&self) -> impl Iterator<Item = &OwnerReport> {
        self.now.values().map(|connection| &connection.report)
    }

    /// A connection ends, with all that it held.
    fn end(&mut self, session: u128) {
        if let Some(Connection { report: last, .. }) = self.now.remove(&session) {
            self.before = (self.before.0 + last.grants, self.before.1 + last.bytes_granted);
        }
    }
}

/// The node's peers. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    members: Arc<[Member]>,
    orders: mpsc::UnboundedSender<Order>,
    served: Served,
    /// Where peers find this node.
    pub listening: Option<SocketAddr>,
}

/// The runtime that it all runs on.
pub struct Running {
    /// What the services ask.
    pub peers: Peers,
    runtime: tokio::runtime::Runtime,
    bulk: tokio::runtime::Runtime,
    _listener: Option<Listener>,
}

/// What is known of one peer.
#[derive(Clone, Debug)]
pub struct PeerView {
    /// As configured.
    pub member: Member,
    /// What we have from it.
    pub reader: PeerReport,
    /// By which paths it is read, and why; empty before the first connection.
    pub plan: PathPlan,
    /// What it has from us.
    pub served: ServedPeer,
    /// In the exchange's time, what is `now` for the moments in `reader`.
    pub now: kv_transport::Micros,
}

/// Blocks on their way at one moment.
pub struct Transfers {
    /// What is `now` for their moments.
    pub now: kv_transport::Micros,
    /// Those that come here.
    pub incoming: Vec<TransferReport>,
    /// Those that are held for peers, with whom.
    pub outgoing: Vec<(String, LeaseReport)>,
}

/// What is asked of the task that fetches.
enum Order {
    Peers(oneshot::Sender<(kv_transport::Micros, Vec<(PeerReport, PathPlan)>)>),
    Transfers(oneshot::Sender<(kv_transport::Micros, Vec<TransferReport>)>),
    Locate {
        principal: u8,
        keys: Vec<BlockKey>,
        hint: Option<PeerId>,
        deadline: Instant,
        reply: oneshot::Sender<Vec<Place>>,
    },
    Offer {
        peer: PeerId,
        offer: Offer,
        deadline: Instant,
        reply: oneshot::Sender<Option<Taken>>,
    },
}

/// Where a block is among the peers.
type Place = Option<(PeerId, Sight)>;

/// Starts what the configuration asks for; nothing without peers and without a place to listen at.
pub fn start(
    node: &Arc<Node>,
    config: &Arc<Config>,
    plan: &Plan,
    fetches: mpsc::UnboundedReceiver<(ShardId, FetchOp, Instant)>,
) -> anyhow::Result<Option<Running>> {
    let members: Arc<[Member]> = config.peers().cloned().collect();
    if members.is_empty() && config.peers.listen.get().is_none() {
        return Ok(None);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(plan.peer_threads)
        .thread_name("peers")
        .enable_all()
        .build()
        .context("starting the runtime for peers")?;
    let bulk = kv_tcp::bulk_runtime(plan.bulk_threads).context("starting the runtime for long blocks")?;
    let runtimes = Runtimes::new(runtime.handle().clone(), bulk.handle().clone());
    let security = security(config)?;
    let limits = limits(config);
    let served = Served::default();
    let (orders, taken) = mpsc::unbounded_channel();
    let dialer = Dialer::new(runtimes.clone(), security.clone(), limits.clone());
    let clock = Clock::start();
    let rails = rdma::Rails::open(node, config, &security)?;
    let fetching = fetch::Fetching::new(node, config, &members, dialer, rails.clone(), clock);
    runtime.spawn(fetching.run(fetches, taken));
    let mut listener = None;
    if let Some(address) = config.peers.listen.get() {
        let (accepted, arrivals) = mpsc::channel(ACCEPTED_MAX);
        let bound = Listener::bind(&runtimes, address.0, security, limits, accepted)
            .with_context(|| format!("listening on {} for peers; set peers.listen to another", address.0))?;
        tracing::info!(address = %bound.local(), "peers are served");
        let serving = serve::Serving {
            node: Arc::clone(node),
            config: Arc::clone(config),
            members: Arc::clone(&members),
            sessions: bound.sessions(),
            served: Arc::clone(&served),
            rails,
            clock,
        };
        runtime.spawn(Arc::new(serving).accept(arrivals));
        listener = Some(bound);
    }
    let listening = listener.as_ref().map(Listener::local);
    let peers = Peers { members, orders, served, listening };
    Ok(Some(Running { peers, runtime, bulk, _listener: listener }))
}

impl Running {
    /// Ends all connections; blocks under way come back to their shards, which must still run.
    pub fn stop(self) {
        self.runtime.shutdown_timeout(LAST_WORDS);
        self.bulk.shutdown_timeout(LAST_WORDS);
    }
}

impl Peers {
    /// The peers as configured, by number.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The number of a node; a fault that says what to do when it is none of the peers.
    pub fn number(&self, node: &str) -> Result<PeerId, Fault> {
        let at = self.members.iter().position(|member| member.name == node);
        at.map(|at| PeerId(at as u16)).ok_or_else(|| {
            let text = format!("node {node} is not among peers.members; `kvctl get peers` shows who is");
            Fault::new(Code::BadRequest, text)
        })
    }

    /// All that is known of each peer.
    pub async fn views(&self) -> Result<Vec<PeerView>, Fault> {
        let (now, readers) = self.ask(Order::Peers).await?;
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        let view = |(member, (reader, plan)): (&Member, (PeerReport, PathPlan))| PeerView {
            served: served.get(&member.name).cloned().unwrap_or_default(),
            member: member.clone(),
            reader,
            plan,
            now,
        };
        Ok(self.members.iter().zip(readers).map(view).collect())
    }

    /// Blocks on their way here and from here.
    pub async fn transfers(&self) -> Result<Transfers, Fault> {
        let (now, incoming) = self.ask(Order::Transfers).await?;
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut outgoing = Vec::new();
        for (name, reader) in served {
            for Connection { asks, .. } in reader.now.into_values() {
                let (reply, answer) = oneshot::channel();
                // One that ends meanwhile holds nothing any more.
                if asks.send(reply).await.is_ok()
                    && let Ok(leases) = answer.await
                {
                    outgoing.extend(leases.into_iter().map(|lease| (name.clone(), lease)));
                }
            }
        }
        Ok(Transfers { now, incoming, outgoing })
    }

    /// Where each block is among the peers, as far as they answer in time. `hint` is asked in any case.
    pub async fn locate(
        &self,
        principal: u8,
        keys: Vec<BlockKey>,
        hint: Option<PeerId>,
        deadline: Instant,
    ) -> Result<Vec<Place>, Fault> {
        self.ask(|reply| Order::Locate { principal, keys, hint, deadline, reply }).await
    }

    /// Offers blocks to a peer; what it took, or `None` when it did not say in time.
    pub async fn offer(&self, peer: PeerId, offer: Offer, deadline: Instant) -> Result<Option<Taken>, Fault> {
        self.ask(|reply| Order::Offer { peer, offer, deadline, reply }).await
    }

    async fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Result<T, Fault> {
        let (reply, answer) = oneshot::channel();
        let gone = || Fault::new(Code::Draining, "the daemon stops; nobody speaks with the peers any more");
        self.orders.send(order(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

/// The time of all state machines here.
#[derive(Clone, Copy)]
struct Clock {
    zero: Instant,
}

impl Clock {
    fn start() -> Self {
        // A moment of zero would be before the first event.
        Self { zero: Instant::now() - Duration::from_micros(1) }
    }

    fn now(self) -> kv_transport::Micros {
        self.at(Instant::now())
    }

    fn at(self, moment: Instant) -> kv_transport::Micros {
        kv_transport::Micros(moment.saturating_duration_since(self.zero).as_micros() as u64)
    }

    fn moment(self, at: kv_transport::Micros) -> Instant {
        // Far enough for a sleep, and within what an Instant can hold.
        self.zero + Duration::from_micros(at.0.min(1 << 50))
    }
}

fn security(config: &Config) -> anyhow::Result<Security> {
    let tls = &config.listen.tls;
    match (tls.cert.get(), tls.key.get(), tls.client_ca.get()) {
        (Some(cert), Some(key), Some(ca)) => {
            Ok(Security::Mutual(Tls::load(&cert.0, &key.0, &ca.0).context("using listen.tls among peers")?))
        }
        _ => Ok(Security::Plain),
    }
}

fn limits(config: &Config) -> Limits {
    Limits { bulk_connections: config.peers.connections as usize, ..Limits::default() }
}

/// A number that nobody guesses.
fn unguessable() -> std::io::Result<u128> {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(u128::from_le_bytes(bytes))
}

/// Names of the principals, as both sides of a connection count them.
fn principals(node: &Node) -> Vec<String> {
    node.principals.iter().map(|principal| principal.name.clone()).collect()
}
