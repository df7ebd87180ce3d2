//! The copies between pages and a block: the axes as loops, joined where both sides are contiguous.
//!
//! ```text
//! layer,kv,head,token,dim of a page in [B, N, H, D]      loops of the plan        rows
//!   head   8 x (block 4096, device  256)                   head                   for each layer, K or V and head:
//!   token 16 x (block  256, device 2048)          ->       token                  16 rows of 256 bytes,
//!   dim  128 x (block    2, device    2)                   256 bytes              every 2048 of the device
//! ```
//! The loops are at most six, one for each axis, so a plan is a small value whatever it plans, and what it yields
//! is computed on the way.

use super::{Axis, BlockLayout, Content, EngineLayout, PageIndex, Place, Step, TensorIndex};
use crate::{Slice, SliceError};

/// One copy: bytes that lie together on both sides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Which tensor of the engine.
    pub tensor: TensorIndex,
    /// Bytes from the beginning of the tensor.
    pub device_offset: u64,
    /// Bytes from the beginning of the block.
    pub block_offset: u64,
    /// Length.
    pub bytes: u64,
}

/// Runs of one length in regular steps on both sides: a copy in two dimensions, or work for a gather kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rows {
    /// The first of them.
    pub first: Run,
    /// How many.
    pub count: u64,
    /// Bytes from row to row in the tensor; 0 when there is one row.
    pub device_stride: u64,
    /// Bytes from row to row in the block; 0 when there is one row.
    pub block_stride: u64,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// The part is none.
    #[error(transparent)]
    Slice(#[from] SliceError),
    /// The part is not in what the engine or the block holds, or they are not of one tensor.
    #[error("{part} are not within {of} of the {side}")]
    Outside {
        /// `engine` or `block`.
        side: &'static str,
        /// What was to be copied.
        part: Slice,
        /// What there is.
        of: Slice,
    },
    /// One side holds keys and values, the other single vectors.
    #[error("the engine caches {engine:?}, the block holds {block:?}")]
    Content {
        /// The engine's.
        engine: Content,
        /// The block's.
        block: Content,
    },
    /// Vectors are not of one length or kind.
    #[error("{what} is {engine} in the engine and {block} in the block")]
    Differs {
        /// `head_dim` or `element_bytes`.
        what: &'static str,
        /// The engine's.
        engine: u64,
        /// The block's.
        block: u64,
    },
    /// The pages are more or less than the block.
    #[error("{pages} pages of {page_tokens} tokens are no block of {block_tokens}")]
    Tokens {
        /// Pages given.
        pages: usize,
        /// Tokens in each.
        page_tokens: u32,
        /// Tokens in the block.
        block_tokens: u32,
    },
    /// The engine does not have that page.
    #[error("page {} of {page_count} pages", page.0)]
    Page {
        /// Which.
        page: PageIndex,
        /// How many there are.
        page_count: u32,
    },
    /// A page stands for two places of the block.
    #[error("page {} is given twice", page.0)]
    PageTwice {
        /// Which.
        page: PageIndex,
    },
}

/// The copies between the pages of an engine and a block, as [`runs`](Self::runs) or as [`rows`](Self::rows), in
/// either direction: one side is read and the other written, each byte once.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    engine: &'a EngineLayout,
    block: &'a BlockLayout,
    pages: &'a [PageIndex],
    part: Slice,
    nest: Nest,
}

/// The copies that bring `part` of `pages`, the block's tokens in their order, to or from `block`. The block may hold
/// more layers and heads than the engine has, and less: what counts is that both have `part`. A page that is given
/// twice is refused, since the block would not say which of its tokens to leave there.
pub fn plan<'a>(
    engine: &'a EngineLayout,
    block: &'a BlockLayout,
    pages: &'a [PageIndex],
    part: &Slice,
) -> Result<Plan<'a>, PlanError> {
    let shape = engine.shape();
    within("engine", part, &shape.slice)?;
    within("block", part, block.slice())?;
    if shape.content != block.content() {
        return Err(PlanError::Content { engine: shape.content, block: block.content() });
    }
    for (what, engine, block) in [
        ("head_dim", u64::from(shape.head_dim), u64::from(block.head_dim())),
        ("element_bytes", engine.element_bytes(), block.element_bytes()),
    ] {
        if engine != block {
            return Err(PlanError::Differs { what, engine, block });
        }
    }
    let (page_tokens, block_tokens) = (shape.page_tokens, block.block_tokens());
    if pages.len() as u64 * u64::from(page_tokens) != u64::from(block_tokens) {
        return Err(PlanError::Tokens { pages: pages.len(), page_tokens, block_tokens });
    }
    let page_count = shape.page_count;
    if let Some(&page) = pages.iter().find(|page| page.0 >= page_count) {
        return Err(PlanError::Page { page, page_count });
    }
    if let Some(page) = twice(pages) {
        return Err(PlanError::PageTwice { page });
    }
    let nest = Nest::between(engine, block, pages, part);
    Ok(Plan { engine, block, pages, part: part.clone(), nest })
}

impl<'a> Plan<'a> {
    /// What it copies.
    pub fn part(&self) -> &Slice {
        &self.part
    }

    /// Single copies in the order of the block, as few as there are: no two of them lie together on both sides.
    pub fn runs(&self) -> Runs<'a> {
        self.nest.runs(self.pages, self.page_stride())
    }

    /// The same bytes as rows in regular steps, in the order of the block. Far fewer than runs where heads or
    /// tokens lie apart.
    pub fn rows(&self) -> RowIter<'a> {
        self.nest.rows(self.pages, self.page_stride())
    }

    /// A plan for each layer alone, in the order of layers: what a forward pass needs next, or has just done.
    pub fn layers(&self) -> impl Iterator<Item = (u16, Self)> {
        self.part.layers.clone().map(|layer| {
            let part = Slice { layers: layer..layer + 1, ..self.part.clone() };
            let nest = Nest::between(self.engine, self.block, self.pages, &part);
            (layer, Self { engine: self.engine, block: self.block, pages: self.pages, part, nest })
        })
    }

    /// Bytes that it copies.
    pub fn bytes(&self) -> u64 {
        let whole = [Axis::Kv, Axis::Token, Axis::Dim].into_iter().map(|axis| self.block.count(axis));
        let part = [self.part.layers.len() as u64, self.part.heads.len() as u64];
        whole.chain(part).product::<u64>() * self.block.element_bytes()
    }

    fn page_stride(&self) -> u64 {
        self.engine.strides().page
    }
}

/// Whether `part` is a part of `of`.
fn within(side: &'static str, part: &Slice, of: &Slice) -> Result<(), PlanError> {
    part.validate()?;
    if of.contains(part) {
        return Ok(());
    }
    Err(PlanError::Outside { side, part: part.clone(), of: of.clone() })
}

fn twice(pages: &[PageIndex]) -> Option<PageIndex> {
    if pages.is_sorted_by(|left, right| left < right) {
        return None;
    }
    let mut sorted = pages.to_vec();
    sorted.sort_unstable();
    sorted.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
}

const LOOPS_MAX: usize = 6;

/// How a loop moves on in the engine's memory.
#[derive(Clone, Copy, Debug)]
enum Move {
    Bytes(u64),
    Tensors(u32),
    /// To the next of the pages, wherever that is.
    Pages,
}

#[derive(Clone, Copy, Debug)]
struct Loop {
    count: u64,
    block: u64,
    device: Move,
}

/// Loops over runs of `bytes`, outermost first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Nest {
    loops: [Loop; LOOPS_MAX],
    depth: usize,
    /// Where the first run is; without the page where a loop looks it up.
    device: Place,
    block: u64,
    bytes: u64,
}

impl Nest {
    fn new(device: Place) -> Self {
        let none = Loop { count: 1, block: 0, device: Move::Bytes(0) };
        Self { loops: [none; LOOPS_MAX], depth: 0, device, block: 0, bytes: 0 }
    }

    /// All of it was checked before: the sums stay below `tensor_bytes` and the block's `bytes`.
    fn between(engine: &EngineLayout, block: &BlockLayout, pages: &[PageIndex], part: &Slice) -> Self {
        let mut nest = Self::new(engine.first());
        let shape = engine.shape();
        for axis in block.order().all() {
            let stride = block.stride(axis);
            let device = match engine.strides().of(axis) {
                Step::Bytes(bytes) => Move::Bytes(bytes),
                Step::Tensors(tensors) => Move::Tensors(tensors),
            };
            match axis {
                Axis::Layer => {
                    nest.skip(part.layers.start - shape.slice.layers.start, device);
                    nest.block += u64::from(part.layers.start - block.slice().layers.start) * stride;
                    nest.push(part.layers.len() as u64, stride, device);
                }
                Axis::Head => {
                    nest.skip(part.heads.start - shape.slice.heads.start, device);
                    nest.block += u64::from(part.heads.start - block.slice().heads.start) * stride;
                    nest.push(part.heads.len() as u64, stride, device);
                }
                Axis::Token => {
                    let page = nest.pages(engine.strides().page, pages);
                    nest.push(pages.len() as u64, stride * u64::from(shape.page_tokens), page);
                    nest.push(shape.page_tokens.into(), stride, device);
                }
                Axis::Kv | Axis::Dim | Axis::Page => nest.push(block.count(axis), stride, device),
            }
        }
        nest.fold(engine.element_bytes());
        nest
    }

    /// `part` of a block, from the block to itself.
    pub(super) fn within(block: &BlockLayout, part: &Slice) -> Result<Self, PlanError> {
        within("block", part, block.slice())?;
        let mut nest = Self::new(Place { tensor: TensorIndex(0), offset: 0 });
        for axis in block.order().all() {
            let stride = block.stride(axis);
            let (skip, count) = match axis {
                Axis::Layer => (part.layers.start - block.slice().layers.start, part.layers.len() as u64),
                Axis::Head => (part.heads.start - block.slice().heads.start, part.heads.len() as u64),
                _ => (0, block.count(axis)),
            };
            nest.skip(skip, Move::Bytes(stride));
            nest.block = nest.device.offset;
            nest.push(count, stride, Move::Bytes(stride));
        }
        nest.fold(block.element_bytes());
        Ok(nest)
    }

    /// Moves the beginning.
    fn skip(&mut self, count: u16, device: Move) {
        match device {
            _ if count == 0 => {}
            Move::Bytes(stride) => self.device.offset += u64::from(count) * stride,
            Move::Tensors(stride) => self.device.tensor.0 += u32::from(count) * stride,
            Move::Pages => unreachable!("a part has all pages"),
        }
    }

    /// Pages in even steps are an axis like any other.
    fn pages(&mut self, page_stride: u64, pages: &[PageIndex]) -> Move {
        let first = pages[0].0;
        let step = pages.get(1).map_or(Some(0), |second| second.0.checked_sub(first));
        let even = |step| pages.windows(2).all(|pair| pair[1].0.checked_sub(pair[0].0) == Some(step));
        match step.filter(|step| even(*step)) {
            Some(step) => {
                self.device.offset += u64::from(first) * page_stride;
                Move::Bytes(u64::from(step) * page_stride)
            }
            None => Move::Pages,
        }
    }

    /// A loop inside of all others. Where the one around it only continues it, the two are one.
    fn push(&mut self, count: u64, block: u64, device: Move) {
        if count == 1 {
            return;
        }
        let next = Loop { count, block, device };
        match self.loops[..self.depth].last_mut() {
            Some(outer) if outer.continues(&next) => *outer = Loop { count: outer.count * count, ..next },
            _ => {
                self.loops[self.depth] = next;
                self.depth += 1;
            }
        }
    }

    /// The innermost loop over runs without a gap between is a longer run.
    fn fold(&mut self, element_bytes: u64) {
        self.bytes = element_bytes;
        while let Some(inner) = self.loops[..self.depth].last() {
            let Move::Bytes(device) = inner.device else { return };
            if device != self.bytes || inner.block != self.bytes {
                return;
            }
            self.bytes *= inner.count;
            self.depth -= 1;
        }
    }

    fn rows<'a>(&self, pages: &'a [PageIndex], page_stride: u64) -> RowIter<'a> {
        let mut outer = *self;
        let inner = match self.loops[..self.depth].last() {
            Some(&Loop { count, block, device: Move::Bytes(device) }) => {
                outer.depth -= 1;
                (count, device, block)
            }
            _ => (1, 0, 0),
        };
        RowIter { nest: outer, inner, pages, page_stride, at: [0; LOOPS_MAX], done: false, next: None }
    }

    pub(super) fn runs<'a>(&self, pages: &'a [PageIndex], page_stride: u64) -> Runs<'a> {
        let none = Run { tensor: TensorIndex(0), device_offset: 0, block_offset: 0, bytes: 0 };
        let rows = Rows { first: none, count: 0, device_stride: 0, block_stride: 0 };
        Runs { iter: self.rows(pages, page_stride), rows, taken: 0, begun: None }
    }
}

impl Loop {
    /// Whether a step of this one is as far as `inner` goes, on both sides.
    fn continues(&self, inner: &Self) -> bool {
        let (Move::Bytes(outer_device), Move::Bytes(inner_device)) = (self.device, inner.device) else {
            return false;
        };
        // A stride may be so long that only fewer steps than `count` fit 64 bits.
        inner.block.checked_mul(inner.count) == Some(self.block)
            && inner_device.checked_mul(inner.count) == Some(outer_device)
    }
}

/// Yields [`Rows`]; from [`Plan::rows`].
#[derive(Clone, Debug)]
pub struct RowIter<'a> {
    /// The loops around a row's.
    nest: Nest,
    /// Count, device stride and block stride.
    inner: (u64, u64, u64),
    pages: &'a [PageIndex],
    page_stride: u64,
    /// One index for each loop.
    at: [u64; LOOPS_MAX],
    done: bool,
    /// May go on yet.
    next: Option<Rows>,
}

impl RowIter<'_> {
    /// As the loops say, before neighbours are joined.
    fn step(&mut self) -> Option<Rows> {
        if self.done {
            return None;
        }
        let Nest { ref loops, depth, device: Place { mut tensor, mut offset }, mut block, bytes } = self.nest;
        let loops = &loops[..depth];
        for (each, &at) in loops.iter().zip(&self.at) {
            block += at * each.block;
            match each.device {
                Move::Bytes(stride) => offset += at * stride,
                Move::Tensors(stride) => tensor.0 += at as u32 * stride,
                Move::Pages => offset += u64::from(self.pages[at as usize].0) * self.page_stride,
            }
        }
        self.done = true;
        for (at, each) in self.at[..depth].iter_mut().zip(loops).rev() {
            *at += 1;
            if *at < each.count {
                self.done = false;
                break;
            }
            *at = 0;
        }
        let (count, device_stride, block_stride) = self.inner;
        let first = Run { tensor, device_offset: offset, block_offset: block, bytes };
        Some(Rows { first, count, device_stride, block_stride })
    }
}

impl Iterator for RowIter<'_> {
    type Item = Rows;

    fn next(&mut self) -> Option<Rows> {
        let mut rows = self.next.take().or_else(|| self.step())?;
        while let Some(next) = self.step() {
            if !rows.join(&next) {
                self.next = Some(next);
                break;
            }
        }
        Some(rows)
    }
}

impl Rows {
    /// Takes `next` in where it only goes on, as pages do that happen to lie side by side.
    fn join(&mut self, next: &Self) -> bool {
        if self.count == 1 && next.count == 1 {
            return self.first.join(&next.first);
        }
        let after =
            |at: u64, stride: u64| stride.checked_mul(self.count).and_then(|span| span.checked_add(at));
        let same = self.device_stride == next.device_stride
            && self.block_stride == next.block_stride
            && self.first.bytes == next.first.bytes
            && self.first.tensor == next.first.tensor;
        let goes_on = same
            && after(self.first.device_offset, self.device_stride) == Some(next.first.device_offset)
            && after(self.first.block_offset, self.block_stride) == Some(next.first.block_offset);
        if goes_on {
            self.count += next.count;
        }
        goes_on
    }

    /// Row `at`, below `count`.
    pub fn run(&self, at: u64) -> Run {
        let Run { tensor, device_offset, block_offset, bytes } = self.first;
        Run {
            tensor,
            device_offset: device_offset + at * self.device_stride,
            block_offset: block_offset + at * self.block_stride,
            bytes,
        }
    }
}

impl Run {
    fn join(&mut self, next: &Self) -> bool {
        let goes_on = self.tensor == next.tensor
            && self.device_offset + self.bytes == next.device_offset
            && self.block_offset + self.bytes == next.block_offset;
        if goes_on {
            self.bytes += next.bytes;
        }
        goes_on
    }
}

/// Yields [`Run`]; from [`Plan::runs`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    iter: RowIter<'a>,
    /// Those that are under way.
    rows: Rows,
    /// How many of them were taken.
    taken: u64,
    /// The first of them, if it was taken only to see whether it goes on from the run before.
    begun: Option<Run>,
}

impl Runs<'_> {
    fn step(&mut self) -> Option<Run> {
        if self.taken == self.rows.count {
            self.rows = self.iter.next()?;
            self.taken = 0;
        }
        self.taken += 1;
        Some(self.rows.run(self.taken - 1))
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let mut run = self.begun.take().or_else(|| self.step())?;
        // Between rows of one kind there is a gap, or they were longer ones.
        while self.taken == self.rows.count
            && let Some(next) = self.step()
        {
            if !run.join(&next) {
                self.begun = Some(next);
                break;
            }
        }
        Some(run)
    }
}
