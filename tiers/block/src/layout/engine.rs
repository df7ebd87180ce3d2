//! How an engine lays out its pages.

use super::{Axis, BlockLayout, Content, EngineOrder, LayoutError, Order, element_bytes, not_zero};
use crate::Slice;

/// A page of an engine (vLLM: block), by its number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PageIndex(pub u32);

/// A tensor of a worker, by its place among those that it registered.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct TensorIndex(pub u32);

/// A byte of a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Place {
    /// Which tensor.
    pub tensor: TensorIndex,
    /// Bytes from its beginning.
    pub offset: u64,
}

/// The lengths of the axes of a worker's cache.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Layers and heads of this worker, of how many.
    pub slice: Slice,
    /// What is cached of a token.
    pub content: Content,
    /// Pages.
    pub page_count: u32,
    /// Tokens in a page.
    pub page_tokens: u32,
    /// Elements of a vector: of K or V each, or of a latent.
    pub head_dim: u32,
    /// Bits of an element; whole bytes.
    pub element_bits: u32,
}

/// How to get from one index of an axis to the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// So many bytes further in the same tensor.
    Bytes(u64),
    /// To the same byte so many tensors further.
    Tensors(u32),
}

/// How to get from one element to the next along each axis; bytes. That of an axis of length 1 means nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Strides {
    /// From layer to layer.
    pub layer: Step,
    /// From K to V.
    pub kv: Step,
    /// From page to page.
    pub page: u64,
    /// From head to head.
    pub head: u64,
    /// From token to token of a page.
    pub token: u64,
    /// From element to element of a vector.
    pub dim: u64,
}

impl Strides {
    pub(super) fn of(&self, axis: Axis) -> Step {
        match axis {
            Axis::Page => Step::Bytes(self.page),
            Axis::Layer => self.layer,
            Axis::Kv => self.kv,
            Axis::Head => Step::Bytes(self.head),
            Axis::Token => Step::Bytes(self.token),
            Axis::Dim => Step::Bytes(self.dim),
        }
    }
}

/// How a cache is handed over: as how many tensors, in which sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tensors {
    /// As one.
    One,
    /// As one for each layer.
    Layers,
    /// As one for K and one for V.
    Halves,
    /// As one for K of each layer, then one for V of each.
    HalvesOfLayers,
}

/// What a worker registers of its KV tensors: where the first element is, and the strides from there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EngineLayout {
    shape: Shape,
    strides: Strides,
    first: Place,
    element_bytes: u64,
    tensor_bytes: u64,
    tensor_count: u32,
}

impl EngineLayout {
    /// `first`: the first element of page 0, of the worker's first layer and head, of K.
    ///
    /// Refuses strides of which it cannot say that no two elements share a byte: sorted, each must be at least what
    /// all smaller ones span. Any order of axes with any padding passes.
    pub fn new(shape: Shape, strides: Strides, first: Place) -> Result<Self, LayoutError> {
        let element_bytes = element_bytes(shape.element_bits)?;
        not_zero(&[
            ("page_count", shape.page_count),
            ("page_tokens", shape.page_tokens),
            ("head_dim", shape.head_dim),
        ])?;
        shape.slice.validate()?;
        let (mut bytes, mut tensors) = (Vec::with_capacity(6), Vec::with_capacity(2));
        for axis in Axis::ALL {
            match strides.of(axis) {
                _ if shape.count(axis) == 1 => {}
                Step::Bytes(stride) => bytes.push((stride, axis)),
                Step::Tensors(stride) => tensors.push((u64::from(stride), axis)),
            }
        }
        let beyond = LayoutError::Overflow { axis: Axis::Page };
        let span = shape.span(bytes, element_bytes)?;
        let tensor_bytes = first.offset.checked_add(span).ok_or(beyond)?;
        let beyond = LayoutError::Overflow { axis: Axis::Layer };
        let span = u32::try_from(shape.span(tensors, 1)?).ok();
        let tensor_count = span.and_then(|span| first.tensor.0.checked_add(span)).ok_or(beyond)?;
        Ok(Self { shape, strides, first, element_bytes, tensor_bytes, tensor_count })
    }

    /// A cache without gaps in `order`. Where it is handed over as several tensors, they are views of it, as vLLM's
    /// are of a cache that has pages outside of layers; with the axis outermost that is a tensor of its own.
    pub fn dense(shape: Shape, order: EngineOrder, tensors: Tensors) -> Result<Self, LayoutError> {
        let mut strides = [0; 6];
        let mut inner = element_bytes(shape.element_bits)?;
        for axis in order.axes().into_iter().rev() {
            strides[axis as usize] = inner;
            inner = inner.checked_mul(shape.count(axis)).ok_or(LayoutError::Overflow { axis })?;
        }
        let bytes = |axis: Axis| strides[axis as usize];
        let apart = |tensors| Step::Tensors(tensors);
        let (layer, kv) = match tensors {
            Tensors::One => (Step::Bytes(bytes(Axis::Layer)), Step::Bytes(bytes(Axis::Kv))),
            Tensors::Layers => (apart(1), Step::Bytes(bytes(Axis::Kv))),
            Tensors::Halves => (Step::Bytes(bytes(Axis::Layer)), apart(1)),
            Tensors::HalvesOfLayers => (apart(1), apart(shape.count(Axis::Layer) as u32)),
        };
        let strides = Strides {
            layer,
            kv,
            page: bytes(Axis::Page),
            head: bytes(Axis::Head),
            token: bytes(Axis::Token),
            dim: bytes(Axis::Dim),
        };
        Self::new(shape, strides, Place { tensor: TensorIndex(0), offset: 0 })
    }

    /// A stored block as if it were an engine's cache of one page, to cut one block out of another.
    pub fn of_block(block: &BlockLayout) -> Self {
        let shape = Shape {
            slice: block.slice().clone(),
            content: block.content(),
            page_count: 1,
            page_tokens: block.block_tokens(),
            head_dim: block.head_dim(),
            element_bits: (block.element_bytes() * 8) as u32,
        };
        let strides = Strides {
            layer: Step::Bytes(block.stride(Axis::Layer)),
            kv: Step::Bytes(block.stride(Axis::Kv)),
            page: block.bytes(),
            head: block.stride(Axis::Head),
            token: block.stride(Axis::Token),
            dim: block.stride(Axis::Dim),
        };
        let first = Place { tensor: TensorIndex(0), offset: 0 };
        let (element_bytes, tensor_bytes) = (block.element_bytes(), block.bytes());
        Self { shape, strides, first, element_bytes, tensor_bytes, tensor_count: 1 }
    }

    /// The layout of a block that holds `pages` pages of all that this worker has, in `order`.
    pub fn block(&self, order: Order, pages: u32) -> Result<BlockLayout, LayoutError> {
        let Shape { slice, content, page_tokens, head_dim, element_bits, .. } = self.shape.clone();
        let axis = Axis::Token;
        let block_tokens = page_tokens.checked_mul(pages).ok_or(LayoutError::Overflow { axis })?;
        BlockLayout::new(order, slice, content, block_tokens, head_dim, element_bits)
    }

    /// The lengths of its axes.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// From one element to the next.
    pub fn strides(&self) -> &Strides {
        &self.strides
    }

    /// Where the first element is.
    pub fn first(&self) -> Place {
        self.first
    }

    /// Bytes of an element.
    pub fn element_bytes(&self) -> u64 {
        self.element_bytes
    }

    /// Bytes that each tensor must have: one past the last byte that a plan can name.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensor_bytes
    }

    /// Tensors that there must be: one past the last that a plan can name.
    pub fn tensor_count(&self) -> u32 {
        self.tensor_count
    }
}

impl Shape {
    /// Length of `axis`.
    pub fn count(&self, axis: Axis) -> u64 {
        match axis {
            Axis::Page => u64::from(self.page_count),
            Axis::Layer => self.slice.layers.len() as u64,
            Axis::Kv => u64::from(self.content.vectors()),
            Axis::Head => self.slice.heads.len() as u64,
            Axis::Token => u64::from(self.page_tokens),
            Axis::Dim => u64::from(self.head_dim),
        }
    }

    /// From the first to one past the last, along all of `strides`, with `inner` at each index.
    fn span(&self, mut strides: Vec<(u64, Axis)>, inner: u64) -> Result<u64, LayoutError> {
        strides.sort_unstable();
        strides.into_iter().try_fold(inner, |inner, (stride, axis)| {
            if stride < inner {
                return Err(LayoutError::Overlap { axis, stride, inner });
            }
            let more = stride.checked_mul(self.count(axis) - 1).and_then(|more| more.checked_add(inner));
            more.ok_or(LayoutError::Overflow { axis })
        })
    }
}
