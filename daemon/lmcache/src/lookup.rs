//! One request's lookup: what was promised, and is held until it is fetched.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kv_client::{Binding, BlockGuard, BlockKey, Error, Got, MissReason, Sighting, Tier, Worker};
use tokio::sync::{OwnedSemaphorePermit, watch};

use crate::instance::Instance;
use crate::service::ConnectionId;

/// Bytes acquired at a time.
const BATCH_BYTES: usize = 64 << 20;
/// Blocks acquired at a time.
const BATCH_BLOCKS: usize = 64;
/// How long a batch may take to come up from disk.
const DISK_WAIT: Duration = Duration::from_secs(5);
/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A block that stays where it is until this is dropped.
pub(crate) struct Held {
    pub(crate) block: BlockGuard,
    _permit: OwnedSemaphorePermit,
}

/// What is held for the workers of one rank.
struct RankHold {
    rank: u32,
    /// Workers of this rank that have not fetched it yet.
    readers: u32,
    /// By chunk; `None` once given back.
    blocks: Vec<Option<Arc<Held>>>,
}

pub(crate) struct Lookup {
    pub(crate) connection: ConnectionId,
    pub(crate) since: Instant,
    gone: AtomicBool,
    held: Mutex<Vec<RankHold>>,
    /// Chunks that are promised, once that is known.
    promised: watch::Sender<Option<usize>>,
}

/// Where the blocks of one rank are to be found.
pub(crate) struct Place {
    pub(crate) rank: u32,
    pub(crate) instance: Arc<Instance>,
    pub(crate) keys: Vec<BlockKey>,
}

/// How far a prefix goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Extent {
    /// Blocks from the first on that are here, on disk, with a peer, in the object store or announced.
    pub(crate) blocks: usize,
    /// Some of them are announced.
    pub(crate) pending: bool,
    /// Some of them are on another node, or in the object store.
    pub(crate) abroad: bool,
}

/// How far these blocks go, with those that are announced where `pending` counts.
pub(crate) fn extent(worker: &Worker, keys: &[BlockKey], pending: bool) -> Result<Extent, Error> {
    let mut extent = Extent::default();
    loop {
        let found = worker.lookup_keys(&keys[extent.blocks..])?;
        extent.blocks += found.prefix();
        match found.first_miss.map(|(_, miss)| miss.reason) {
            Some(MissReason::NotComplete) if pending => extent.pending = true,
            // Changing while it was looked at: whoever acquires it sees.
            Some(MissReason::Overloaded) => {}
            _ => return Ok(extent),
        }
        extent.blocks += 1;
    }
}

/// How much further the peers and the object store take it. Those who do not answer have nothing.
pub(crate) fn further(worker: &Worker, keys: &[BlockKey], pending: bool, mut extent: Extent) -> Extent {
    let sightings = worker.locate_keys(&keys[extent.blocks..], "").wait().unwrap_or_else(|error| {
        tracing::debug!(%error, "nobody beyond this node was asked for chunks");
        Vec::new()
    });
    for sighting in sightings {
        match sighting {
            Sighting::Here(Tier::Object) | Sighting::At { .. } => extent.abroad = true,
            Sighting::Here(_) => {}
            Sighting::Expected { .. } if pending => (extent.pending, extent.abroad) = (true, true),
            Sighting::Absent(miss) if pending && miss.reason == MissReason::NotComplete => {
                extent.pending = true;
            }
            Sighting::Expected { .. } | Sighting::Absent(_) => break,
        }
        extent.blocks += 1;
    }
    extent
}

impl Place {
    pub(crate) fn new(
        rank: u32,
        instance: &Arc<Instance>,
        binding: &Binding,
        names: &[kv_client::SequenceHash],
    ) -> Self {
        Self { rank, instance: Arc::clone(instance), keys: binding.keys(names) }
    }
}

impl Lookup {
    pub(crate) fn new(connection: ConnectionId) -> Arc<Self> {
        Arc::new(Self {
            connection,
            since: Instant::now(),
            gone: AtomicBool::new(false),
            held: Mutex::default(),
            promised: watch::Sender::new(None),
        })
    }

    fn held(&self) -> MutexGuard<'_, Vec<RankHold>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The promise, once it is made.
    pub(crate) fn promised(&self) -> Option<usize> {
        *self.promised.borrow()
    }

    /// Waits for the promise, `limit` at most.
    pub(crate) async fn wait(&self, limit: Duration) -> Option<usize> {
        let mut promised = self.promised.subscribe();
        let known = tokio::time::timeout(limit, promised.wait_for(Option::is_some)).await;
        known.ok()?.ok().and_then(|count| *count)
    }

    /// Promises nothing.
    pub(crate) fn promise_nothing(&self) {
        self.promised.send_replace(Some(0));
    }

    /// Acquires the first `chunks` of every rank and holds what came of all of them, without a gap. `readers`
    /// workers of each rank will fetch it. All of it may take `limit`, where there is one, for what others store or
    /// have. Gives how many chunks that is.
    pub(crate) fn run(
        &self,
        places: &[Place],
        chunks: usize,
        readers: u32,
        limit: Option<Duration>,
    ) -> usize {
        let began = Instant::now();
        let bytes = places.first().map_or(1, |place| place.instance.layout.bytes as usize);
        let batch = (BATCH_BYTES / bytes.max(1)).clamp(1, BATCH_BLOCKS);
        let mut holds: Vec<RankHold> = places
            .iter()
            .map(|place| RankHold { rank: place.rank, readers, blocks: Vec::with_capacity(chunks) })
            .collect();
        let mut promised = 0;
        while promised < chunks && began.elapsed() < LIMIT && !self.gone.load(Ordering::Acquire) {
            let wanted = promised..chunks.min(promised + batch);
            let wait = limit.map_or(DISK_WAIT, |wait| wait.saturating_sub(began.elapsed()));
            for (place, hold) in places.iter().zip(&mut holds) {
                // Not longer than what the ranks before have.
                let wait = wait.max(Duration::from_millis(1));
                hold.blocks.extend(acquire(place, wanted.clone(), wait));
            }
            let least = holds.iter().map(|hold| hold.blocks.len()).min().unwrap_or(0);
            holds.iter_mut().for_each(|hold| hold.blocks.truncate(least));
            promised = least;
            if promised < wanted.end {
                break;
            }
        }
        let mut held = self.held();
        // Ended meanwhile: then nobody will give it back.
        if !self.gone.load(Ordering::Acquire) {
            *held = holds;
        } else {
            promised = 0;
        }
        drop(held);
        self.promised.send_replace(Some(promised));
        promised
    }

    /// What is held of these chunks for a worker of `rank`, under these keys.
    pub(crate) fn fetch(&self, rank: u32, chunks: Range<usize>, keys: &[BlockKey]) -> Vec<Option<Arc<Held>>> {
        let held = self.held();
        let Some(hold) = held.iter().find(|hold| hold.rank == rank) else { return vec![None; keys.len()] };
        let one = |(chunk, key): (usize, &BlockKey)| {
            let found = hold.blocks.get(chunk)?.as_ref()?;
            (found.block.key() == *key).then(|| Arc::clone(found))
        };
        chunks.zip(keys).map(one).collect()
    }

    /// A worker of `rank` has fetched these chunks: after the last one they need not be held.
    pub(crate) fn fetched(&self, rank: u32, chunks: Range<usize>) {
        let mut held = self.held();
        if let Some(hold) = held.iter_mut().find(|hold| hold.rank == rank) {
            hold.readers = hold.readers.saturating_sub(1);
            if hold.readers == 0 {
                hold.release(chunks);
            }
        }
    }

    /// Gives chunks of `rank`, or of all ranks, back unread.
    pub(crate) fn release(&self, rank: Option<u32>, chunks: Range<usize>) {
        let mut held = self.held();
        held.iter_mut()
            .filter(|hold| rank.is_none_or(|rank| rank == hold.rank))
            .for_each(|hold| hold.release(chunks.clone()));
    }

    /// Gives everything back and takes nothing more.
    pub(crate) fn end(&self) {
        self.gone.store(true, Ordering::Release);
        let held = std::mem::take(&mut *self.held());
        drop(held);
        self.promised.send_if_modified(|promised| promised.replace(0) != Some(0));
    }
}

impl RankHold {
    fn release(&mut self, chunks: Range<usize>) {
        let end = chunks.end.min(self.blocks.len());
        let start = chunks.start.min(end);
        self.blocks[start..end].fill(None);
    }
}

/// The blocks of `wanted` up to the first that cannot be had.
fn acquire(place: &Place, wanted: Range<usize>, wait: Duration) -> Vec<Option<Arc<Held>>> {
    let holds = &place.instance.holds;
    let mut permits = Vec::with_capacity(wanted.len());
    for _ in wanted.clone() {
        let Ok(permit) = Arc::clone(holds).try_acquire_owned() else { break };
        permits.push(permit);
    }
    let keys = &place.keys[wanted.start..wanted.start + permits.len()];
    match place.instance.worker.acquire_keys(keys, wait) {
        Ok(got) => got
            .into_iter()
            .map_while(Got::block)
            .zip(permits)
            .map(|(block, permit)| Some(Arc::new(Held { block, _permit: permit })))
            .collect(),
        Err(error) => {
            tracing::debug!(%error, rank = place.rank, "a lookup found no more");
            Vec::new()
        }
    }
}
