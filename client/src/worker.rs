//! An engine worker's session with its node: it outlives restarts of the daemon.

use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use kv_api::{convert, v1};
use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Epoch, Fault, FaultKind, Scope, SequenceHash, SessionId, Slice, Tier};
use tokio::sync::Notify;

use crate::binding::{Binding, Bound};
use crate::client::Client;
use crate::devices::Cached;
use crate::error::{Error, Miss, bug};
use crate::options::{DEADLINE_MAX, WorkerOptions};
use crate::runtime::Call;
use crate::session::{End, Life, Way};

const BACKOFF_MIN: Duration = Duration::from_millis(5);
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// How long a reconnecting worker insists on the door it had.
const INSIST: Duration = Duration::from_secs(10);

/// A session with the daemon. Cheap to clone and to share between threads.
///
/// Reading, looking up and storing are plain functions; they end at the deadline. Where the session has
/// shared memory they cost no more than the work itself; else they are gRPC calls underneath. What only
/// gRPC can do gives a [`Call`]: await it, or wait for it.
///
/// When the daemon goes away, what is under way ends as `Unavailable`. The worker reconnects by itself and
/// registers its bindings and caches again; until then, calls fail at once and blocks in host memory stay readable.
#[derive(Clone, Debug)]
pub struct Worker {
    pub(crate) inner: Arc<Inner>,
    deadline: Duration,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) client: Client,
    options: WorkerOptions,
    life: RwLock<Arc<Life>>,
    bindings: Mutex<Vec<Weak<Bound>>>,
    caches: Mutex<Vec<Weak<Cached>>>,
    stop: Arc<Notify>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.notify_one();
    }
}

/// By which doors a worker talks to its daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doors {
    /// Shared memory for blocks, gRPC for the rest.
    SharedMemory {
        /// The daemon lets this worker fill arena slots in place.
        in_place: bool,
    },
    /// gRPC for everything: bytes are copied.
    GrpcOnly {
        /// Why shared memory could not be had.
        why: String,
    },
}

/// What an `evict` did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Evicted {
    /// Blocks removed.
    pub evicted: u32,
    /// Left alone: pinned or in use.
    pub in_use: u32,
    /// Not here.
    pub absent: u32,
}

/// What a `pin` did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Pinned {
    /// Blocks pinned.
    pub pinned: u32,
    /// Not here.
    pub absent: u32,
}

/// What a `prefetch` did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Prefetched {
    /// Blocks on their way up.
    pub started: u32,
    /// In host memory already.
    pub resident: u32,
}

impl Worker {
    pub(crate) async fn open(client: Client, options: WorkerOptions) -> Result<Self, Error> {
        options.check()?;
        let (life, end) = Life::open(&client, &options, false).await?;
        if let Way::Grpc(why) = &life.way
            && !options.grpc_only
        {
            tracing::warn!(why, "no shared memory with the daemon; blocks are copied over gRPC");
        }
        let stop = Arc::new(Notify::new());
        let deadline = client.deadline();
        let inner = Arc::new(Inner {
            client,
            options,
            life: RwLock::new(life),
            bindings: Mutex::default(),
            caches: Mutex::default(),
            stop: Arc::clone(&stop),
        });
        inner.client.runtime().spawn(supervise(Arc::downgrade(&inner), end, stop));
        Ok(Self { inner, deadline })
    }

    /// The same session with another deadline per call, ten minutes at most.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { inner: Arc::clone(&self.inner), deadline: deadline.min(DEADLINE_MAX) }
    }

    /// How long a call may take.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// The connection behind it.
    pub fn client(&self) -> Client {
        self.inner.client.with_deadline(self.deadline)
    }

    /// Which doors are in use now.
    pub fn doors(&self) -> Doors {
        match &self.life().way {
            Way::Shm(shm) => Doors::SharedMemory { in_place: shm.may_write },
            Way::Grpc(why) => Doors::GrpcOnly { why: why.clone() },
        }
    }

    /// Life of the daemon that the session belongs to.
    pub fn epoch(&self) -> Epoch {
        self.life().epoch
    }

    /// The session's number.
    pub fn session(&self) -> SessionId {
        self.life().session
    }

    /// Whether the session is up at this moment. A worker that is not reconnects by itself.
    pub fn is_connected(&self) -> bool {
        self.life().check().is_ok()
    }

    /// Waits until the session is up, the deadline at most; says whether it is.
    pub fn wait_until_connected(&self) -> bool {
        let until = Instant::now() + self.deadline;
        while !self.is_connected() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.is_connected()
    }

    /// Names what the worker's blocks mean. Registering the same again gives the same binding.
    pub fn register(&self, scope: Scope, slice: Slice, block_bytes: u32) -> Call<Binding> {
        let checked = scope.validate().map_err(|error| error.to_string());
        let checked = checked.and_then(|()| slice.validate().map_err(|error| error.to_string()));
        if let Err(why) = checked {
            return Call::failed(Fault::new(Code::BadRequest, why).into());
        }
        let binding = Binding::new(scope, slice, block_bytes);
        let (inner, client) = (Arc::clone(&self.inner), self.client());
        self.client().call(async move {
            let session = inner.life().session;
            register_once(&client, session, binding.bound()).await?;
            let mut bindings = inner.bindings.lock().unwrap_or_else(PoisonError::into_inner);
            bindings.retain(|bound| bound.strong_count() > 0);
            bindings.push(Arc::downgrade(binding.bound()));
            Ok(binding)
        })
    }

    /// Keeps blocks from being evicted until `ttl` is over.
    pub fn pin(&self, binding: &Binding, hashes: &[SequenceHash], ttl: Duration) -> Call<Pinned> {
        let (client, session) = (self.client(), self.session());
        let ttl_s = u32::try_from(ttl.as_secs().max(1)).unwrap_or(u32::MAX);
        let requests = self.batches(binding, hashes);
        self.client().call(async move {
            let mut sum = Pinned::default();
            for names in requests {
                let message = v1::PinRequest { names, ttl_s, session: session.0 };
                let answer = client.within(client.blocks().pin(client.request(message))).await?;
                sum.pinned += answer.pinned;
                sum.absent += answer.absent;
            }
            Ok(sum)
        })
    }

    /// Ends pins; gives how many there were.
    pub fn unpin(&self, binding: &Binding, hashes: &[SequenceHash]) -> Call<u32> {
        let (client, session) = (self.client(), self.session());
        let requests = self.batches(binding, hashes);
        self.client().call(async move {
            let mut unpinned = 0;
            for names in requests {
                let message = v1::UnpinRequest { names, session: session.0 };
                unpinned += client.within(client.blocks().unpin(client.request(message))).await?.unpinned;
            }
            Ok(unpinned)
        })
    }

    /// Starts bringing blocks up to host memory: from disk, from whichever peer has them, or from the object store.
    ///
    /// In the order of their prefix, where they have one: a tier below may keep them together; nothing else depends
    /// on it.
    pub fn prefetch(&self, binding: &Binding, hashes: &[SequenceHash]) -> Call<Prefetched> {
        self.prefetch_from(binding, hashes, "")
    }

    /// [`Worker::prefetch`] that asks `node` first for what is not here: whoever knows where blocks are saves the
    /// daemon the search. Empty: nobody in particular.
    pub fn prefetch_from(
        &self,
        binding: &Binding,
        hashes: &[SequenceHash],
        node: impl Into<String>,
    ) -> Call<Prefetched> {
        let (client, session, node) = (self.client(), self.session(), node.into());
        let requests = self.batches(binding, hashes);
        self.client().call(async move {
            let mut sum = Prefetched::default();
            for names in requests {
                let message = v1::PrefetchRequest { names, session: session.0, node: node.clone() };
                let answer = client.within(client.blocks().prefetch(client.request(message))).await?;
                sum.started += answer.started;
                sum.resident += answer.resident;
            }
            Ok(sum)
        })
    }

    /// Removes blocks from `tier`, or from everywhere.
    pub fn evict(&self, binding: &Binding, hashes: &[SequenceHash], tier: Option<Tier>) -> Call<Evicted> {
        let (client, session) = (self.client(), self.session());
        let requests = self.batches(binding, hashes);
        let tier = tier.map_or(0, |tier| convert::tier_message(tier).into());
        self.client().call(async move {
            let mut sum = Evicted::default();
            for names in requests {
                let message = v1::EvictRequest { names, tier, dry_run: false, session: session.0 };
                let answer = client.within(client.blocks().evict(client.request(message))).await?;
                sum.evicted += answer.evicted;
                sum.in_use += answer.in_use;
                sum.absent += answer.absent;
            }
            Ok(sum)
        })
    }

    /// Why a block is not here, down to the scope fields that differ; `None` when it is. Asks the daemon.
    pub fn explain(&self, binding: &Binding, hash: &SequenceHash) -> Call<Option<Miss>> {
        let (inner, client) = (Arc::clone(&self.inner), self.client());
        let session = self.session();
        let (binding, hash) = (binding.clone(), *hash);
        self.client().call(async move {
            let number = inner.number(&client, &inner.life(), &binding).await?;
            let names = v1::Names {
                binding: number.0.into(),
                sequence_hashes: vec![bytes::Bytes::copy_from_slice(hash.as_bytes())],
                keys: Vec::new(),
            };
            let message = v1::ExplainRequest { names: Some(names), session: session.0 };
            let answer = client.within(client.blocks().explain(client.request(message))).await?;
            Ok(answer.miss.map(miss))
        })
    }

    /// The blocks' names, as many in each request as the daemon takes.
    pub(crate) fn batches(&self, binding: &Binding, hashes: &[SequenceHash]) -> Vec<Option<v1::Names>> {
        let batch = |hashes: &[SequenceHash]| Some(names_of(&binding.keys(hashes)));
        hashes.chunks(self.inner.client.keys_per_request_max()).map(batch).collect()
    }

    pub(crate) fn life(&self) -> Arc<Life> {
        self.inner.life()
    }

    /// The binding's number in this life, asking for it if need be.
    pub(crate) fn number(&self, life: &Arc<Life>, binding: &Binding) -> Result<BindingId, Error> {
        if let Some(number) = binding.number_in(life.epoch) {
            return Ok(number);
        }
        let (inner, client, life) = (Arc::clone(&self.inner), self.client(), Arc::clone(life));
        let binding = binding.clone();
        self.client().call(async move { inner.number(&client, &life, &binding).await }).wait()
    }
}

impl Inner {
    pub(crate) fn life(&self) -> Arc<Life> {
        Arc::clone(&self.life.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) async fn number(
        &self,
        client: &Client,
        life: &Life,
        binding: &Binding,
    ) -> Result<BindingId, Error> {
        if let Some(number) = binding.number_in(life.epoch) {
            return Ok(number);
        }
        register_once(client, life.session, binding.bound()).await?;
        binding.number_in(life.epoch).ok_or_else(|| {
            Fault::new(Code::WrongEpoch, "the daemon restarted since the session began").into()
        })
    }

    /// Registers a cache again in each session to come, until it is gone.
    pub(crate) fn remember(&self, cached: &Arc<Cached>) {
        let mut caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        caches.retain(|cached| cached.strong_count() > 0);
        caches.push(Arc::downgrade(cached));
    }

    /// A new session in place of the one that ended, with all bindings and caches.
    async fn renew(&self, insist: bool) -> Result<End, Error> {
        let (life, end) = Life::open(&self.client, &self.options, insist).await?;
        let bindings: Vec<Arc<Bound>> = {
            let mut all = self.bindings.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|bound| bound.strong_count() > 0);
            all.iter().filter_map(Weak::upgrade).collect()
        };
        for bound in bindings {
            if let Err(error) = register_once(&self.client, life.session, &bound).await {
                // Nobody there: the whole attempt is void. Else the binding is asked for again when used.
                if matches!(error.kind(), FaultKind::Unavailable | FaultKind::Timeout) {
                    return Err(error);
                }
                tracing::warn!(%error, "a binding could not be registered again");
            }
        }
        let caches: Vec<Arc<Cached>> = {
            let caches = self.caches.lock().unwrap_or_else(PoisonError::into_inner);
            caches.iter().filter_map(Weak::upgrade).collect()
        };
        for cached in caches {
            if let Err(error) = cached.renew(&self.client, &life).await {
                // As above. A GPU that is not there for the moment keeps nobody from the blocks.
                if matches!(error.code(), Some(Code::Unreachable | Code::Draining)) {
                    return Err(error);
                }
                tracing::warn!(%error, "a KV cache in device memory is not registered");
            }
        }
        tracing::info!(epoch = %life.epoch, session = %life.session, "connected to the daemon again");
        *self.life.write().unwrap_or_else(PoisonError::into_inner) = life;
        Ok(end)
    }
}

/// Notices the end of a session and opens the next one, until the worker is dropped.
async fn supervise(worker: Weak<Inner>, mut end: End, stop: Arc<Notify>) {
    loop {
        let fault = tokio::select! {
            fault = end.ended() => fault,
            () = stop.notified() => return,
        };
        let had_shared_memory = {
            let Some(worker) = worker.upgrade() else { return };
            let life = worker.life();
            life.end(&fault);
            matches!(life.way, Way::Shm(_))
        };
        tracing::info!(%fault, "session lost; connecting again");
        let (since, mut backoff) = (Instant::now(), BACKOFF_MIN);
        end = loop {
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                () = stop.notified() => return,
            }
            let Some(worker) = worker.upgrade() else { return };
            match worker.renew(had_shared_memory && since.elapsed() < INSIST).await {
                Ok(end) => break end,
                Err(error) => tracing::debug!(%error, "not yet"),
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        };
    }
}

async fn register_once(client: &Client, session: SessionId, bound: &Bound) -> Result<(), Error> {
    let message = v1::RegisterRequest {
        session: session.0,
        scope: Some(convert::scope_message(&bound.scope)),
        slice: Some(convert::slice_message(&bound.slice)),
        block_bytes: bound.block_bytes,
    };
    let answer = client.within(client.sessions().register(client.request(message))).await?;
    let number = u16::try_from(answer.binding).map_err(|_| bug("a binding number out of range"))?;
    if answer.scope_id != bound.scope.id().as_bytes()[..] {
        return Err(bug("daemon and client derive different names from one scope"));
    }
    bound.set_number(Epoch(answer.epoch), BindingId(number));
    Ok(())
}

pub(crate) fn names_of(keys: &[BlockKey]) -> v1::Names {
    let keys = keys.iter().map(|key| bytes::Bytes::copy_from_slice(key.as_bytes())).collect();
    v1::Names { keys, ..v1::Names::default() }
}

pub(crate) fn miss(message: v1::Miss) -> Miss {
    Miss { reason: convert::miss_reason(&message), fields: message.fields }
}
