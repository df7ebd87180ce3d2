//! KV caches in device memory: the daemon copies blocks between its tiers and a worker's pages by itself.
//!
//! ```text
//!   register_cache   handles of the memory, how pages lie in it -> a number, in this session
//!   save             pages -> host memory; the copies wait for an event of the worker, on the device
//!   load             whichever tier has it -> pages; then an event of the worker is recorded
//!   quiesce          answers when no copy is under way any more
//! ```
//! What is registered ends with the session. The worker registers its caches again in the next one, before anything is
//! asked in it; one for which that failed for the moment is registered when it is used.

mod load;
mod memory;
mod save;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_api::v1;
use kv_block::code::Code;
use kv_block::{Fault, FaultKind, SequenceHash, SessionId};
use tokio::sync::Mutex;
use tokio::time::timeout;

pub use load::{Load, LoadOptions};
pub use memory::{DeviceCacheSpec, MemoryPiece, TensorHandles};
pub use save::{LayerSave, SaveOptions};

use crate::binding::Binding;
use crate::client::Client;
use crate::error::{Error, timed_out};
use crate::options::DEADLINE_MAX;
use crate::runtime::Call;
use crate::session::Life;
use crate::worker::{Inner, Worker};

/// Of a block in a message, what is neither its hash nor its pages; and most bytes of a page's number there.
const BLOCK_BYTES_IN_MESSAGE: usize = 16;
const PAGE_BYTES_IN_MESSAGE: usize = 5;

/// A block, and the pages that hold its tokens, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagedBlock {
    /// Its name.
    pub hash: SequenceHash,
    /// Numbers of pages, as many as a block has tokens for.
    pub pages: Vec<u32>,
}

/// A KV cache that the daemon knows. Cheap to clone and to share between threads; the daemon lets go of it with the
/// last clone.
///
/// The pages of a save hold still until it has answered, those of a load are nobody else's until it has. A call that
/// ends with an error other than a refusal (a kind such as `Invalid`, `NotFound`, `Busy`, `Full`, `Unsupported`,
/// `Denied`) may leave copies under way: call [`DeviceCache::quiesce`], and use its pages when that has answered.
///
/// While the daemon is away, calls fail as `Unavailable`. A cache that it does not take back says why when it is used.
#[derive(Clone, Debug)]
pub struct DeviceCache {
    cached: Arc<Cached>,
    deadline: Duration,
}

/// What a worker remembers of a cache.
#[derive(Debug)]
pub(crate) struct Cached {
    worker: Arc<Inner>,
    spec: DeviceCacheSpec,
    state: Mutex<State>,
}

/// Whether the daemon knows it.
#[derive(Clone, Debug)]
enum State {
    /// Not in this session.
    New,
    Known {
        session: SessionId,
        number: u32,
    },
    /// It was refused, and would be again.
    Refused {
        session: SessionId,
        why: Error,
    },
    Forgotten,
}

/// What a call names: in which session, which cache and which binding.
struct Named {
    session: u64,
    cache: u32,
    binding: u32,
}

impl Worker {
    /// Makes a KV cache in device memory known to the daemon. Refused when a handle leads nowhere, is of memory that
    /// is too small for what the layout says, or of a device that the daemon does not have.
    pub fn register_cache(&self, spec: DeviceCacheSpec) -> Call<DeviceCache> {
        if let Err(fault) = spec.check() {
            return Call::failed(fault.into());
        }
        let worker = Arc::clone(&self.inner);
        let cached = Arc::new(Cached { worker, spec, state: Mutex::new(State::New) });
        let (client, deadline) = (self.client(), self.deadline());
        self.client().call(async move {
            // From here on whoever opens the next session registers it too.
            cached.worker.remember(&cached);
            cached.number(&client).await?;
            Ok(DeviceCache { cached, deadline })
        })
    }
}

impl DeviceCache {
    /// The same cache with another deadline per call, ten minutes at most.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self { cached: Arc::clone(&self.cached), deadline: deadline.min(DEADLINE_MAX) }
    }

    /// How long a call may take.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// What was registered.
    pub fn spec(&self) -> &DeviceCacheSpec {
        &self.cached.spec
    }

    /// Answers when no copy of this cache is under way any more that had begun before.
    pub fn quiesce(&self) -> Call<()> {
        let (cached, client) = (Arc::clone(&self.cached), self.client());
        self.client().call(async move {
            let (life, cache) = cached.number(&client).await?;
            let message = v1::QuiesceCacheRequest { session: life.session.0, cache };
            client.within(client.devices().quiesce_cache(client.request(message))).await.map(|_| ())
        })
    }

    /// Has the daemon let go of the cache, for all clones. Copies that have not begun end as failed; answers when the
    /// device is done with the others.
    pub fn forget(&self) -> Call<()> {
        let (cached, client) = (Arc::clone(&self.cached), self.client());
        self.client().call(async move {
            let mut state = cached.lock(&client).await?;
            let was = std::mem::replace(&mut *state, State::Forgotten);
            drop(state);
            let State::Known { session, number } = was else { return Ok(()) };
            match forget(&client, session, number).await {
                // Then it ended with its session.
                Err(error) if matches!(error.kind(), FaultKind::Unavailable | FaultKind::Fenced) => Ok(()),
                answer => answer,
            }
        })
    }

    fn client(&self) -> Client {
        self.cached.worker.client.with_deadline(self.deadline)
    }
}

impl Cached {
    async fn lock(&self, client: &Client) -> Result<tokio::sync::MutexGuard<'_, State>, Error> {
        timeout(client.deadline(), self.state.lock()).await.map_err(|_| timed_out("registering the cache"))
    }

    /// The session that is open, and the cache's number in it, registering it if need be.
    async fn number(&self, client: &Client) -> Result<(Arc<Life>, u32), Error> {
        self.worker.life().check()?;
        let mut state = self.lock(client).await?;
        // Once more: somebody may have registered it in the next session meanwhile.
        let life = self.worker.life();
        life.check()?;
        let number = self.settle(&mut state, client, &life).await?;
        Ok((life, number))
    }

    /// Registers it in a session that is about to be the worker's.
    pub(crate) async fn renew(&self, client: &Client, life: &Life) -> Result<(), Error> {
        let mut state = self.lock(client).await?;
        match *state {
            State::Forgotten => Ok(()),
            _ => self.settle(&mut state, client, life).await.map(|_| ()),
        }
    }

    async fn settle(&self, state: &mut State, client: &Client, life: &Life) -> Result<u32, Error> {
        match state {
            State::Forgotten => return Err(Fault::new(Code::BadRequest, "the cache was forgotten").into()),
            State::Known { session, number } if *session == life.session => return Ok(*number),
            State::Refused { session, why } if *session == life.session => return Err(why.clone()),
            _ => {}
        }
        let again = !matches!(state, State::New);
        match register_once(client, life, &self.spec).await {
            Ok(number) => {
                *state = State::Known { session: life.session, number };
                Ok(number)
            }
            Err(error) => {
                let error = if again { once_more(error) } else { error };
                if is_for_good(&error) {
                    *state = State::Refused { session: life.session, why: error.clone() };
                }
                Err(error)
            }
        }
    }

    async fn named(&self, client: &Client, binding: &Binding) -> Result<Named, Error> {
        let (life, cache) = self.number(client).await?;
        let binding = self.worker.number(client, &life, binding).await?;
        Ok(Named { session: life.session.0, cache, binding: binding.0.into() })
    }
}

impl Drop for Cached {
    fn drop(&mut self) {
        let State::Known { session, number } = *self.state.get_mut() else { return };
        // Whichever session that is: it may be about to be the worker's.
        let client = self.worker.client.clone();
        self.worker.client.runtime().spawn(async move {
            if let Err(error) = forget(&client, session, number).await {
                tracing::debug!(%error, "a cache could not be forgotten; it ends with its session");
            }
        });
    }
}

async fn register_once(client: &Client, life: &Life, spec: &DeviceCacheSpec) -> Result<u32, Error> {
    let until = Instant::now() + client.deadline();
    let fds = spec.descriptors();
    let offered = life.offer(&fds, until).await?;
    let message = spec.message(life.session, &fds, offered.as_ref())?;
    let client = left(client, until)?;
    let answer = client.within(client.devices().register_cache(client.request(message))).await?;
    match answer.epoch == life.epoch.0 {
        true => Ok(answer.cache),
        false => Err(Fault::new(Code::WrongEpoch, "the daemon restarted since the session began").into()),
    }
}

async fn forget(client: &Client, session: SessionId, cache: u32) -> Result<(), Error> {
    let message = v1::ForgetCacheRequest { session: session.0, cache };
    client.within(client.devices().forget_cache(client.request(message))).await.map(|_| ())
}

/// Whether asking again in the same session would give the same answer.
fn is_for_good(error: &Error) -> bool {
    use FaultKind::{Busy, Fenced, Full, Timeout, Unavailable};
    !matches!(error.kind(), Busy | Fenced | Full | Timeout | Unavailable)
}

fn once_more(error: Error) -> Error {
    match error {
        Error::Fault(fault) => {
            let message = format!("the cache could not be registered again: {}", fault.message);
            Error::Fault(Fault { message, ..fault })
        }
        error => error,
    }
}

/// The client with what is left of its time.
fn left(client: &Client, until: Instant) -> Result<Client, Error> {
    match until.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(timed_out("the call")),
        left => Ok(client.with_deadline(left)),
    }
}

/// Blocks of one request.
struct Batch {
    blocks: Vec<v1::PagedBlock>,
    /// The block before the first, where there is one.
    after: Option<SequenceHash>,
}

/// As many in each request as the daemon takes, and as fit its messages.
fn batches(client: &Client, blocks: &[PagedBlock], after: Option<SequenceHash>) -> Vec<Batch> {
    batches_of(blocks, after, client.keys_per_request_max(), client.chunk_bytes())
}

fn batches_of(
    blocks: &[PagedBlock],
    after: Option<SequenceHash>,
    count_max: usize,
    bytes_max: usize,
) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let (mut bytes, mut before) = (0, after);
    for PagedBlock { hash, pages } in blocks {
        let hash_bytes = hash.as_bytes();
        let more = hash_bytes.len() + pages.len() * PAGE_BYTES_IN_MESSAGE + BLOCK_BYTES_IN_MESSAGE;
        let message =
            v1::PagedBlock { sequence_hash: bytes::Bytes::copy_from_slice(hash_bytes), pages: pages.clone() };
        match batches.last_mut() {
            Some(batch) if batch.blocks.len() < count_max && bytes + more <= bytes_max => {
                batch.blocks.push(message);
                bytes += more;
            }
            _ => {
                batches.push(Batch { blocks: vec![message], after: before });
                bytes = more;
            }
        }
        before = Some(*hash);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(count: u64, pages: u32) -> Vec<PagedBlock> {
        let pages: Vec<u32> = (0..pages).collect();
        (0..count).map(|number| PagedBlock { hash: number.into(), pages: pages.clone() }).collect()
    }

    fn counts(batches: &[Batch]) -> Vec<usize> {
        batches.iter().map(|batch| batch.blocks.len()).collect()
    }

    #[test]
    fn requests_hold_as_many_blocks_as_the_daemon_takes_and_follow_each_other() {
        let first = SequenceHash::from(99);
        let batches = batches_of(&blocks(10, 2), Some(first), 4, 1 << 20);
        assert_eq!(counts(&batches), [4, 4, 2]);
        let after: Vec<_> = batches.iter().map(|batch| batch.after).collect();
        assert_eq!(after, [Some(first), Some(3.into()), Some(7.into())]);
        let all: Vec<_> = batches.into_iter().flat_map(|batch| batch.blocks).collect();
        assert_eq!(all.len(), 10);
        assert!(all.iter().all(|block| block.pages == [0, 1]));
        assert!(batches_of(&[], Some(first), 4, 1 << 20).is_empty());
        assert_eq!(batches_of(&blocks(1, 1), None, 4, 1 << 20)[0].after, None);
    }

    #[test]
    fn requests_fit_messages_and_a_block_that_does_not_goes_alone() {
        let one = 8 + 100 * PAGE_BYTES_IN_MESSAGE + BLOCK_BYTES_IN_MESSAGE;
        assert_eq!(counts(&batches_of(&blocks(7, 100), None, 4096, 3 * one)), [3, 3, 1]);
        assert_eq!(counts(&batches_of(&blocks(3, 100), None, 4096, one - 1)), [1, 1, 1]);
    }
}
