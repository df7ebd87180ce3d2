//! One registered engine worker.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kv_client::{Binding, Error, Reservation, SequenceHash, Worker};
use lru::LruCache;
use tokio::sync::Semaphore;

use crate::layout::Layout;
use crate::names::Wanted;
use crate::pool::{Pool, Slot};
use crate::service::ConnectionId;

/// Bindings kept by an instance: one for each salt and rank.
const BINDINGS_MAX: std::num::NonZeroUsize = std::num::NonZeroUsize::new(256).unwrap();
/// How often to look for slots that others may give back.
const SLOT_LOOK: Duration = Duration::from_millis(1);

/// Which transfer: what it is about, and for which request.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct TransferKey {
    pub(crate) request: String,
    salt: String,
    rank: u32,
    chunks: Range<usize>,
    /// Name of the last chunk, which hangs on all tokens before.
    last: SequenceHash,
    store: bool,
}

impl TransferKey {
    pub(crate) fn new(wanted: &Wanted, rank: u32, last: SequenceHash, store: bool) -> Self {
        Self {
            request: wanted.request.clone(),
            salt: wanted.salt.clone(),
            rank,
            chunks: wanted.chunks.clone(),
            last,
            store,
        }
    }
}

/// Slots that the engine copies into or out of at this moment.
pub(crate) struct Transfer {
    /// When it is given up.
    pub(crate) until: Instant,
    pub(crate) slots: Vec<Slot>,
    /// Of a store: the announced blocks, one for each slot.
    pub(crate) announced: Vec<Reservation>,
}

#[derive(Default)]
struct Transfers {
    /// Nothing new is taken: the instance is gone.
    closed: bool,
    under_way: HashMap<TransferKey, Transfer>,
}

pub(crate) struct Instance {
    pub(crate) id: i64,
    pub(crate) model: String,
    pub(crate) world: u32,
    pub(crate) layout: Layout,
    /// Dimensions of a chunk.
    pub(crate) shape: Vec<u64>,
    pub(crate) worker: Worker,
    pub(crate) pool: Pool,
    pub(crate) pool_name: String,
    /// Blocks that may be held through this session.
    pub(crate) holds: Arc<Semaphore>,
    connection: Mutex<ConnectionId>,
    bindings: Mutex<LruCache<(String, u32), Binding>>,
    transfers: Mutex<Transfers>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Instance {
    #[expect(clippy::too_many_arguments, reason = "what an instance is made of, at the one place")]
    pub(crate) fn new(
        id: i64,
        model: String,
        world: u32,
        layout: Layout,
        worker: Worker,
        (pool, pool_name): (Pool, String),
        holds_max: usize,
        connection: ConnectionId,
    ) -> Self {
        Self {
            id,
            model,
            world,
            shape: layout.shape(),
            layout,
            worker,
            pool,
            pool_name,
            holds: Arc::new(Semaphore::new(holds_max)),
            connection: Mutex::new(connection),
            bindings: Mutex::new(LruCache::new(BINDINGS_MAX)),
            transfers: Mutex::default(),
        }
    }

    /// What an operator sees.
    pub(crate) fn session_name(&self) -> String {
        session_name(&self.model)
    }

    pub(crate) fn connection(&self) -> ConnectionId {
        *lock(&self.connection)
    }

    /// It registered again, maybe from elsewhere.
    pub(crate) fn belongs_to(&self, connection: ConnectionId) {
        *lock(&self.connection) = connection;
    }

    /// Whether a call is about this instance's model and form.
    pub(crate) fn serves(&self, wanted: &Wanted) -> bool {
        self.model == wanted.model && self.world == wanted.world
    }

    /// What the blocks of this rank and salt are called.
    pub(crate) fn binding(
        &self,
        chunk_tokens: u32,
        tenant: &str,
        salt: &str,
        rank: u32,
    ) -> Result<Binding, Error> {
        let key = (salt.to_owned(), rank);
        if let Some(binding) = lock(&self.bindings).get(&key) {
            return Ok(binding.clone());
        }
        let scope = self.layout.scope(&self.model, chunk_tokens, tenant, salt);
        let slice = self.layout.slice(rank, self.world);
        let binding = self.worker.register(scope, slice, self.layout.bytes).wait()?;
        lock(&self.bindings).put(key, binding.clone());
        Ok(binding)
    }

    /// So many slots, waiting up to `wait` for them; none at all when they cannot be had.
    pub(crate) fn take_slots(&self, count: usize, wait: Duration) -> Option<Vec<Slot>> {
        if count as u64 > self.pool.slots(self.layout.bytes.into()) {
            return None;
        }
        let until = Instant::now() + wait;
        let mut slots = Vec::with_capacity(count);
        loop {
            while slots.len() < count {
                let Some(slot) = self.pool.take(self.layout.bytes.into()) else { break };
                slots.push(slot);
            }
            if slots.len() == count {
                return Some(slots);
            }
            // Two that wait for each other's slots would both wait in vain.
            slots.clear();
            if Instant::now() >= until {
                return None;
            }
            std::thread::sleep(SLOT_LOOK);
        }
    }

    /// Remembers a transfer; one of the same name is over then. False, and it is over, when the instance is gone.
    pub(crate) fn begin(&self, key: TransferKey, transfer: Transfer) -> bool {
        let mut transfers = lock(&self.transfers);
        if transfers.closed {
            return false;
        }
        let before = transfers.under_way.insert(key, transfer);
        drop(transfers);
        drop(before);
        true
    }

    /// Takes a transfer out, to end it.
    pub(crate) fn end(&self, key: &TransferKey) -> Option<Transfer> {
        lock(&self.transfers).under_way.remove(key)
    }

    /// The request is over: what it still transfers has `grace` left.
    pub(crate) fn request_ended(&self, request: &str, grace: Duration) {
        let until = Instant::now() + grace;
        for (key, transfer) in &mut lock(&self.transfers).under_way {
            if key.request == request {
                transfer.until = transfer.until.min(until);
            }
        }
    }

    /// Ends transfers that took too long; says how many.
    pub(crate) fn expire(&self, now: Instant) -> usize {
        let mut over = Vec::new();
        let mut transfers = lock(&self.transfers);
        transfers.under_way.retain(|_, transfer| {
            let lives = transfer.until > now;
            if !lives {
                over.push((std::mem::take(&mut transfer.slots), std::mem::take(&mut transfer.announced)));
            }
            lives
        });
        drop(transfers);
        over.len()
    }

    /// Gives everything back and takes nothing more.
    pub(crate) fn close(&self) {
        let mut transfers = lock(&self.transfers);
        transfers.closed = true;
        let under_way = std::mem::take(&mut transfers.under_way);
        drop(transfers);
        drop(under_way);
    }
}

/// What the session of an instance of `model` is called; at most 128 bytes.
pub(crate) fn session_name(model: &str) -> String {
    let mut name = format!("lmcache:{model}");
    let end = (0..=name.len().min(128)).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0);
    name.truncate(end);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_name_is_never_too_long_and_always_text() {
        assert_eq!(session_name("/models/m"), "lmcache:/models/m");
        let long = session_name(&"ü".repeat(100));
        assert!(long.len() <= 128 && long.ends_with('ü'), "{long}");
    }
}
