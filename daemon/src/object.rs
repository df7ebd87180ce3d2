//! The object tier of this node: blocks in packs that all nodes share, on S3, Azure Blob or in a directory.
//!
//! ```text
//!   shards --- Find, Into ------> reads.rs: gathers, one request for neighbours ---> Tier ---> store
//!          <-- Offered, Landed --     '--- what follows in the prefix: Prefetch ---> shards
//!   shards --- Upload ----------> uploads.rs: copies, packs -----------------------> Tier ---> store
//!   keeper.rs  opens, looks for what others wrote, writes packs that waited long enough, collects
//! ```
//! Each principal has a tier of its own: the default one at the place that is configured, the others beside it in
//! `principals/<name>`. All of it runs on a runtime of its own. A store that cannot be reached is tried again for ever;
//! until then its blocks miss and nothing goes up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use kv_arena::Held;
use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Fault, Scope, SequenceHash, ShardId};
use kv_node::{FetchOp, UploadToken};
use kv_object::circuit::Standing;
use kv_object::place::Place;
use kv_object::requests::RequestError;
use kv_object::tier::TierReport;
use kv_object::{Tier, TierError};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::config::Config;
use crate::node::{Node, SCOPES_COMPARED_MAX, differing};
use crate::registry::Bound;

mod keeper;
mod reads;
mod uploads;

/// How long the last packs may take when the daemon ends.
const LAST_PACKS: Duration = Duration::from_secs(10);
/// How long what is under way may take after that.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// A store that has not been opened after so long is said to be out of service.
const ANSWER: Duration = Duration::from_secs(10);
/// Threads that move bytes and check them.
const THREADS: usize = 2;

/// A search in the object tier, of a shard, with its deadline.
type FetchOrder = (ShardId, FetchOp, Instant);

/// A block to be copied for the object tier.
pub struct UploadOrder {
    /// Of which shard.
    pub shard: ShardId,
    /// Given back.
    pub upload: UploadToken,
    /// The block.
    pub held: Held,
    /// What it was stored under.
    pub binding: BindingId,
    /// Unix seconds after which it counts as expired; 0 never.
    pub expires_at: u32,
    /// The block before it in its prefix, if that is known.
    pub parent: Option<BlockKey>,
}

/// Where shards hand over what they want of the object tier.
#[derive(Clone)]
pub struct ObjectDoor {
    fetches: mpsc::UnboundedSender<FetchOrder>,
    uploads: mpsc::UnboundedSender<UploadOrder>,
}

/// What comes through it.
pub struct ObjectOrders {
    fetches: mpsc::UnboundedReceiver<FetchOrder>,
    uploads: mpsc::UnboundedReceiver<UploadOrder>,
}

/// A door and its other side. What may wait in it is bounded by what each brain may have under way.
pub fn door() -> (ObjectDoor, ObjectOrders) {
    let (fetch_door, fetches) = mpsc::unbounded_channel();
    let (upload_door, uploads) = mpsc::unbounded_channel();
    (ObjectDoor { fetches: fetch_door, uploads: upload_door }, ObjectOrders { fetches, uploads })
}

impl ObjectDoor {
    /// Hands over a search; gives it back when the other side is gone.
    #[allow(clippy::result_large_err, reason = "the order comes back whole")]
    pub fn fetch(&self, order: FetchOrder) -> Result<(), FetchOrder> {
        self.fetches.send(order).map_err(|order| order.0)
    }

    /// Hands over a block; gives it back when the other side is gone.
    #[allow(clippy::result_large_err, reason = "the order comes back whole")]
    pub fn upload(&self, order: UploadOrder) -> Result<(), UploadOrder> {
        self.uploads.send(order).map_err(|order| order.0)
    }
}

/// The object tiers of a node, by principal. Cheap to clone.
#[derive(Clone)]
pub struct Objects {
    all: Arc<[Arc<Principal>]>,
    runtime: Handle,
}

/// The object tier of one principal.
pub struct Principal {
    /// Whose.
    pub name: String,
    /// Where.
    pub place: Place,
    /// `None` until it could be opened.
    tier: RwLock<Option<Arc<Tier>>>,
    /// Since when it is to be opened.
    since: Instant,
    /// Why it cannot be opened, or is not what it should be.
    trouble: Mutex<Option<String>>,
    /// Something was taken that is to be packed in time.
    taken: Notify,
    /// What came from it for callers.
    served: Served,
}

/// What came from an object tier since the start.
#[derive(Default)]
struct Served {
    blocks: AtomicU64,
    bytes: AtomicU64,
    tokens: AtomicU64,
}

/// One object tier as operators see it.
#[derive(Clone, Debug)]
pub struct ObjectView {
    /// Whose.
    pub principal: String,
    /// Where.
    pub place: Place,
    /// How it does; `None` before it was opened.
    pub report: Option<TierReport>,
    /// Why it is not as it should be.
    pub trouble: Option<String>,
    /// Blocks, bytes and tokens that came from it since the start.
    pub served: (u64, u64, u64),
}

impl ObjectView {
    /// `opening`, `ok` or `degraded`.
    pub fn state(&self) -> &'static str {
        match (&self.report, &self.trouble) {
            (None, None) => "opening",
            (Some(_), None) => "ok",
            (_, Some(_)) => "degraded",
        }
    }
}

impl Principal {
    fn new(name: String, place: Place) -> Self {
        Self {
            name,
            place,
            tier: RwLock::default(),
            since: Instant::now(),
            trouble: Mutex::default(),
            taken: Notify::new(),
            served: Served::default(),
        }
    }

    /// The tier, once it is open.
    pub fn tier(&self) -> Option<Arc<Tier>> {
        self.tier.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The fields in which the nearest scope of the same tenant differs that has a block of this hash in the store.
    pub fn scope_difference(&self, asked: &Bound, hash: &SequenceHash) -> Option<Vec<String>> {
        let tier = self.tier()?;
        let others = tier.bindings().into_iter().filter_map(|other| {
            let scope: Scope = serde_json::from_str(&other.about).ok()?;
            let other_tenant = scope.tenant != asked.kept.scope.tenant;
            let same = other.tag().0 == asked.kept.tag;
            (!other_tenant && !same).then_some((other, scope))
        });
        let now = unix_now();
        let there = others.take(SCOPES_COMPARED_MAX).filter(|(other, _)| {
            let key = other.scope.namer(&other.slice).key(hash);
            tier.find(now, &[key]).first().is_some_and(Result::is_ok)
        });
        let fields = there.map(|(other, scope)| differing(asked, &scope, (&other.slice, other.block_bytes)));
        fields.min_by_key(Vec::len)
    }

    fn set_tier(&self, tier: Option<Arc<Tier>>) {
        *self.tier.write().unwrap_or_else(PoisonError::into_inner) = tier;
    }

    fn set_trouble(&self, why: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How it does.
    pub fn view(&self) -> ObjectView {
        let report = self.tier().map(|tier| tier.report());
        let circuit = report.as_ref().map(|report| report.requests.circuit);
        let sick = circuit.filter(|circuit| *circuit != Standing::Closed).map(|_| {
            let last = report.as_ref().and_then(|report| report.requests.last_error.clone());
            last.unwrap_or_else(|| "it fails".to_owned())
        });
        let served = &self.served;
        let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
        ObjectView {
            principal: self.name.clone(),
            place: self.place.clone(),
            trouble: self.trouble().or(sick).or_else(|| self.complaint(report.as_ref())),
            report,
            served: (count(&served.blocks), count(&served.bytes), count(&served.tokens)),
        }
    }
}

impl Principal {
    /// What is wrong although the store answers, or why it does not.
    fn complaint(&self, report: Option<&TierReport>) -> Option<String> {
        let Some(report) = report else {
            let waited = self.since.elapsed();
            return (waited > ANSWER).then(|| format!("it has not answered for {} s", waited.as_secs()));
        };
        report.write_trouble.as_ref().map(|why| format!("it does not take packs: {why}"))
    }
}

impl Objects {
    /// The tier of a principal, by its number.
    pub fn of(&self, principal: usize) -> Option<&Arc<Principal>> {
        self.all.get(principal)
    }

    /// The tiers of all principals.
    pub fn all(&self) -> &[Arc<Principal>] {
        &self.all
    }

    /// Those that are open, which is what an order of an administrator needs: a fault that says why one is not.
    pub fn open(&self) -> Result<Vec<(&Principal, Arc<Tier>)>, Fault> {
        let opened = |one: &'_ Arc<Principal>| {
            one.tier().ok_or_else(|| {
                let why = one.trouble().unwrap_or_else(|| "it is being opened".to_owned());
                let text = format!("the object store {} is not open yet: {why}", one.place);
                Fault::new(Code::TierDegraded, text).retry_after(Duration::from_secs(1))
            })
        };
        self.all.iter().map(|one| Ok((&**one, opened(one)?))).collect()
    }

    /// Does something where the tiers live: connections to a store end with the runtime that made them.
    pub fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime.spawn(work)
    }

    /// The same, and waits for it. It goes on when the caller does not wait any more.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, TierError>> + Send + 'static,
    ) -> Result<T, TierError> {
        // The runtime ends with the daemon.
        self.spawn(work).await.unwrap_or(Err(TierError::Request(RequestError::Degraded)))
    }
}

/// The runtime that it all runs on.
pub struct Running {
    /// What the services ask.
    pub objects: Objects,
    runtime: tokio::runtime::Runtime,
    stop: watch::Sender<bool>,
    keepers: JoinSet<()>,
}

/// Starts what the configuration asks for; nothing without a store. Waits for nobody.
pub fn start(node: &Arc<Node>, config: &Config, orders: ObjectOrders) -> anyhow::Result<Option<Running>> {
    let Some(place) = config.object_store() else { return Ok(None) };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("object")
        .enable_all()
        .build()
        .context("starting the runtime of the object tier")?;
    let one = |(at, name): (usize, &str)| {
        let place = if at == 0 { place.clone() } else { place.within(&format!("principals/{name}")) };
        Arc::new(Principal::new(name.to_owned(), place))
    };
    let all: Vec<_> = config.principal_names().enumerate().map(one).collect();
    let objects = Objects { all: all.into(), runtime: runtime.handle().clone() };
    let (stop, stopped) = watch::channel(false);
    let mut keepers = JoinSet::new();
    for (number, principal) in objects.all().iter().enumerate() {
        let keeper = keeper::Keeper::new(node, config, number, Arc::clone(principal));
        keepers.spawn_on(keeper.run(stopped.clone()), runtime.handle());
    }
    runtime.spawn(reads::Reads::new(node, &objects).run(orders.fetches));
    runtime.spawn(uploads::Uploads::new(node, &objects).run(orders.uploads));
    Ok(Some(Running { objects, runtime, stop, keepers }))
}

impl Running {
    /// Writes what waits to be packed, as far as it goes in a few seconds, and ends. Blocks under way come back to their
    /// shards, which must still run.
    pub fn stop(mut self) {
        let _ = self.stop.send(true);
        let ended = async { while self.keepers.join_next().await.is_some() {} };
        if self.runtime.block_on(async { tokio::time::timeout(LAST_PACKS, ended).await }).is_err() {
            tracing::warn!(
                "the object store did not take the last packs in time; their blocks may be offered again"
            );
        }
        self.runtime.shutdown_timeout(LAST_WORDS);
    }
}

/// The principal whose shard each is, by the shard's number.
fn principals_of(node: &Node) -> Vec<usize> {
    let of = |shard: usize| node.principals.iter().position(|principal| principal.shards.contains(&shard));
    (0..node.shards.len()).map(|shard| of(shard).unwrap_or(0)).collect()
}

/// Unix time in seconds.
pub(crate) fn unix_now() -> u32 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    u32::try_from(since).unwrap_or(u32::MAX)
}
