//! What a device's thread is asked for, and how it answers.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kv_arena::{Held, Slot};
use kv_block::code::Code;
use kv_block::layout::PageIndex;
use kv_block::{BindingTag, BlockKey, Fault, SessionId};
use kv_gpu::{Event, Place};
use kv_node::FillToken;
use tokio::sync::{mpsc, oneshot};

use crate::gpu::cache::{Cache, Paged};
use crate::shard::ShardHandle;

/// Something for a device's thread.
pub enum Order {
    /// Fill a slot with a block of a save.
    Fill(FillOrder),
    /// More layers of a save are ready, or no more come.
    Ready(Arc<Save>),
    /// Bring blocks into pages.
    Load(LoadOrder),
    /// Say when what is under way for these is done.
    Quiesce(Of, oneshot::Sender<()>),
    /// Begin nothing more for these.
    Forget(Of),
    /// End when the device is done.
    Stop,
}

impl Order {
    /// Ends it: the thread that it was for has ended. Whoever waits for an answer hears that nobody has it any more.
    pub fn refuse(self) {
        let fault = || Fault::new(Code::Draining, "the daemon ends");
        match self {
            Self::Fill(FillOrder { shard, fill, slot, .. }) => {
                drop(slot);
                shard.tell_filled(fill, Err(fault()));
            }
            Self::Load(LoadOrder { news, .. }) => {
                let _ = news.send(LoadNews::Ended(Err(fault())));
            }
            Self::Ready(_) | Self::Quiesce(..) | Self::Forget(..) | Self::Stop => {}
        }
    }
}

/// Whose copies.
#[derive(Clone)]
pub enum Of {
    /// Those of a session.
    Session(SessionId),
    /// Those of a cache, by its number: who orders does not hold it.
    Cache(u32),
    /// Those of caches that were given up, by whomever.
    Forgotten,
}

impl Of {
    pub(super) fn is(&self, cache: &Cache) -> bool {
        match self {
            Self::Session(session) => cache.session == *session,
            Self::Cache(id) => cache.id == *id,
            Self::Forgotten => cache.check().is_err(),
        }
    }
}

/// Blocks of one call that come from pages.
pub struct Save {
    /// Which blocks in which pages.
    pub paged: Paged,
    /// What its blocks are stored under.
    pub tag: BindingTag,
    /// When what has not begun is not begun any more.
    pub until: Instant,
    state: Mutex<SaveState>,
}

#[derive(Default)]
pub(super) struct SaveState {
    /// How many layers from the first on were ready, one after the other, and what the device waits for before each.
    pub(super) ready: Vec<(u16, Option<Arc<Event>>)>,
    /// The call is over.
    pub(super) over: bool,
}

impl Save {
    /// Nothing is ready yet.
    pub fn new(paged: Paged, tag: BindingTag, until: Instant) -> Self {
        Self { paged, tag, until, state: Mutex::default() }
    }

    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, SaveState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many layers are ready once the event has passed. Refuses fewer than before, and more than there are.
    pub fn ready(&self, layers: u32, event: Option<Arc<Event>>) -> Result<(), Fault> {
        let all = u32::from(self.paged.layers());
        let mut state = self.state();
        let before = state.ready.last().map_or(0, |(layers, _)| u32::from(*layers));
        if layers <= before || layers > all {
            let text = format!("{layers} layers are ready, {before} were before, and the blocks have {all}");
            return Err(Fault::new(Code::BadRequest, text));
        }
        state.ready.push((layers as u16, event));
        Ok(())
    }

    /// Refuses what nobody answers for any more: the caller has gone, or its session with the cache. Its pages may not have
    /// held what it meant to save. Asked last thing before a block is published.
    pub fn check(&self) -> Result<(), Fault> {
        self.paged.cache.check()?;
        if self.state().over { Err(unfinished()) } else { Ok(()) }
    }

    /// The call is over: no more layers will be ready, and what has not been begun must not be.
    pub fn end(&self) {
        self.state().over = true;
    }
}

impl SaveState {
    pub(super) fn is_whole(&self, all: u16) -> bool {
        self.ready.last().is_some_and(|(layers, _)| *layers == all)
    }
}

pub(super) fn unfinished() -> Fault {
    Fault::new(Code::BadRequest, "the call ended before the block was stored")
}

/// A slot to be filled from pages.
pub struct FillOrder {
    /// Of which call.
    pub save: Arc<Save>,
    /// The block's pages, checked.
    pub pages: Arc<[PageIndex]>,
    /// Whose slot.
    pub shard: ShardHandle,
    /// What its shard calls it.
    pub fill: FillToken,
    /// The block's name.
    pub key: BlockKey,
    /// Its length.
    pub bytes: u32,
    /// Where it goes.
    pub slot: Slot,
}

/// Where a block is that goes into pages.
pub enum Resident {
    /// In host memory.
    Host(Held),
    /// In the pool of a device.
    Pool(Place),
}

/// Blocks that go into pages.
pub struct LoadOrder {
    /// Which cache.
    pub paged: Paged,
    /// The blocks, and their pages, checked.
    pub blocks: Vec<(Resident, Arc<[PageIndex]>)>,
    /// Layer by layer.
    pub by_layer: bool,
    /// What is recorded: one for each layer, or one behind all.
    pub events: Vec<Arc<Event>>,
    /// When what has not begun is not begun any more.
    pub until: Instant,
    /// What the device waits for before the first byte.
    pub after: Option<Arc<Event>>,
    /// Whom to tell.
    pub news: mpsc::UnboundedSender<LoadNews>,
}

/// How a load gets on.
pub enum LoadNews {
    /// The device has all of it in its queue, and the events are recorded.
    Queued,
    /// So many layers have arrived.
    Layers(u16),
    /// It is over; nothing of it is under way any more, but where the device is lost.
    Ended(Result<(), Fault>),
}
