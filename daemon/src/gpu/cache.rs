//! What workers register of their devices' memory: the tensors of a KV cache, how its pages lie in them, and events.
//!
//! A cache belongs to a session and is let go with it. Its memory stays open for as long as a copy uses it: whoever
//! copies holds the cache, and when the last has let go of it, `closer.rs` closes the memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use kv_block::code::Code;
use kv_block::layout::{BlockLayout, EngineLayout, LayoutError, Order, PageIndex, Plan, PlanError, plan};
use kv_block::{Fault, SessionId, Slice};
use kv_gpu::copier::PagePiece;
use kv_gpu::{DeviceMemory, Event};
use tokio::sync::oneshot;

use super::closer::Closing;
use crate::registry::Bound;

/// A KV cache in a device's memory.
pub struct Cache {
    /// Its number, in this life of the daemon.
    pub id: u32,
    /// Whose it is.
    pub session: SessionId,
    /// On which of this node's devices, by their order here.
    pub engine: usize,
    /// Its tensors.
    pub tensors: Vec<DeviceMemory>,
    /// How pages lie in them.
    pub layout: EngineLayout,
    /// The worker's events.
    pub events: Vec<Arc<Event>>,
    gone: AtomicBool,
    closer: Sender<Closing>,
    /// Who is told when all of it is closed.
    told: Mutex<Vec<oneshot::Sender<()>>>,
}

impl Drop for Cache {
    fn drop(&mut self) {
        let told = std::mem::take(self.told.get_mut().unwrap_or_else(PoisonError::into_inner));
        let (tensors, events) = (std::mem::take(&mut self.tensors), std::mem::take(&mut self.events));
        // Without the thread it is closed here.
        let _ = self.closer.send(Closing { tensors, events, told });
    }
}

impl Cache {
    /// Refuses tensors that are fewer or shorter than the layout says.
    pub fn new(
        id: u32,
        session: SessionId,
        engine: usize,
        tensors: Vec<DeviceMemory>,
        layout: EngineLayout,
        events: Vec<Arc<Event>>,
        closer: Sender<Closing>,
    ) -> Result<Self, Fault> {
        let (count, bytes) = (layout.tensor_count() as usize, layout.tensor_bytes());
        if tensors.len() != count {
            return Err(bad(format!("the layout has {count} tensors, {} are registered", tensors.len())));
        }
        let short = tensors.iter().position(|tensor| tensor.bytes() < bytes);
        if let Some(at) = short {
            let has = tensors[at].bytes();
            let text = format!(
                "tensor {at} has {has} bytes, the layout's last page ends at {bytes}: it lies about one of them"
            );
            return Err(Fault::new(Code::BadHandle, text));
        }
        let (gone, told) = (AtomicBool::new(false), Mutex::default());
        Ok(Self { id, session, engine, tensors, layout, events, gone, closer, told })
    }

    /// Bytes of its tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(DeviceMemory::bytes).sum()
    }

    /// What comes back is told when its memory is closed: when nobody has the cache any more, and some time after.
    pub fn when_closed(&self) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.told.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        receiver
    }

    /// No copy of it is begun any more.
    pub fn forget(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// Refuses one that was forgotten.
    pub fn check(&self) -> Result<(), Fault> {
        if self.gone.load(Ordering::Acquire) { Err(unknown(self.id)) } else { Ok(()) }
    }

    /// The event of this number.
    pub fn event(&self, number: u32) -> Result<Arc<Event>, Fault> {
        let found = self.events.get(number as usize).cloned();
        let count = self.events.len();
        found.ok_or_else(|| bad(format!("event {number} of {count} that were registered with the cache")))
    }
}

/// What is said of a cache that is not there.
pub fn unknown(id: u32) -> Fault {
    Fault::new(Code::UnknownCache, format!("cache {id} is not registered by this session"))
}

fn bad(text: String) -> Fault {
    Fault::new(Code::BadRequest, text)
}

/// Blocks of one binding in the pages of one cache. Cheap to clone.
#[derive(Clone)]
pub struct Paged {
    /// The cache.
    pub cache: Arc<Cache>,
    block: Arc<BlockLayout>,
}

impl Paged {
    /// Refuses a binding whose blocks do not say how they lie, or are of another shape than the cache.
    pub fn of(cache: Arc<Cache>, bound: &Bound) -> Result<Self, Fault> {
        let (scope, slice) = (&bound.kept.scope, &bound.kept.slice);
        let order: Order = scope.layout.parse().map_err(|error| {
            bad(format!(
                "binding {}: its scope's layout is `{}`, and pages are copied to and from an order of axes such as \
                 `layer,kv,head,token,dim` ({error})",
                bound.id, scope.layout
            ))
        })?;
        let shape = cache.layout.shape();
        let block = BlockLayout::new(
            order,
            slice.clone(),
            shape.content,
            scope.block_tokens,
            shape.head_dim,
            shape.element_bits,
        );
        let block = block.map_err(|error: LayoutError| bad(format!("binding {}: {error}", bound.id)))?;
        if block.bytes() != u64::from(bound.kept.block_bytes) {
            let text = format!(
                "binding {}: its blocks have {} bytes, what the cache has of its slice makes {}",
                bound.id,
                bound.kept.block_bytes,
                block.bytes()
            );
            return Err(Fault::new(Code::WrongLength, text));
        }
        Ok(Self { cache, block: Arc::new(block) })
    }

    /// Refuses pages that are no block of this cache.
    pub fn check(&self, pages: &[PageIndex]) -> Result<(), Fault> {
        self.plan(pages, 0..self.layers()).map(|_| ()).map_err(|error| bad(error.to_string()))
    }

    /// Layers of a block.
    pub fn layers(&self) -> u16 {
        self.block.slice().layers.len() as u16
    }

    /// Bytes of a block.
    pub fn bytes(&self) -> u64 {
        self.block.bytes()
    }

    fn plan<'a>(
        &'a self,
        pages: &'a [PageIndex],
        layers: std::ops::Range<u16>,
    ) -> Result<Plan<'a>, PlanError> {
        let whole = self.block.slice();
        let first = whole.layers.start;
        let part = Slice { layers: first + layers.start..first + layers.end, ..whole.clone() };
        plan(&self.cache.layout, &self.block, pages, &part)
    }

    /// The copies of some layers of one block, which begins at `offset` in the `other`th memory of a job's other side.
    /// Pages that were not checked give none.
    pub fn pieces(
        &self,
        pages: &[PageIndex],
        layers: std::ops::Range<u16>,
        (other, offset): (u32, u64),
        pieces: &mut Vec<PagePiece>,
    ) {
        let Ok(plan) = self.plan(pages, layers) else { return };
        pieces.extend(plan.runs().map(|run| PagePiece {
            memory: run.tensor.0,
            device_offset: run.device_offset,
            other,
            other_offset: offset + run.block_offset,
            bytes: run.bytes,
        }));
    }
}
