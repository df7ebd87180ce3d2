//! The order of a stored block.

use std::ops::Range;

use super::plan::Nest;
use super::{Axis, Content, LayoutError, Order, PlanError, element_bytes, not_zero};
use crate::Slice;

/// Where everything is in a stored block: a dense tensor of layers, K and V, heads, tokens and elements.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockLayout {
    order: Order,
    slice: Slice,
    content: Content,
    block_tokens: u32,
    head_dim: u32,
    element_bytes: u64,
    /// By [`Axis`]; that of `Page` means nothing.
    strides: [u64; 6],
    bytes: u64,
}

impl BlockLayout {
    /// A block of `block_tokens` tokens that holds `slice`, with vectors of `head_dim` elements of `element_bits`.
    pub fn new(
        order: Order,
        slice: Slice,
        content: Content,
        block_tokens: u32,
        head_dim: u32,
        element_bits: u32,
    ) -> Result<Self, LayoutError> {
        let element_bytes = element_bytes(element_bits)?;
        not_zero(&[("block_tokens", block_tokens), ("head_dim", head_dim)])?;
        slice.validate()?;
        let strides = [0; 6];
        let mut layout = Self {
            order,
            slice,
            content,
            block_tokens,
            head_dim,
            element_bytes,
            strides,
            bytes: element_bytes,
        };
        for axis in order.all().into_iter().rev() {
            let count = layout.count(axis);
            if count > 1 && !order.axes().contains(&axis) {
                return Err(LayoutError::Unnamed { axis, count });
            }
            layout.strides[axis as usize] = layout.bytes;
            layout.bytes = layout.bytes.checked_mul(count).ok_or(LayoutError::Overflow { axis })?;
        }
        Ok(layout)
    }

    /// Its order.
    pub fn order(&self) -> Order {
        self.order
    }

    /// The layers and heads that it holds.
    pub fn slice(&self) -> &Slice {
        &self.slice
    }

    /// What it holds of a token.
    pub fn content(&self) -> Content {
        self.content
    }

    /// Tokens that it holds.
    pub fn block_tokens(&self) -> u32 {
        self.block_tokens
    }

    /// Elements of a vector.
    pub fn head_dim(&self) -> u32 {
        self.head_dim
    }

    /// Bytes of an element.
    pub fn element_bytes(&self) -> u64 {
        self.element_bytes
    }

    /// Bytes of the whole block.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes from one index of `axis` to the next; 0 for [`Axis::Page`], which a block does not have.
    pub fn stride(&self, axis: Axis) -> u64 {
        self.strides[axis as usize]
    }

    /// Length of `axis`; 1 for [`Axis::Page`].
    pub fn count(&self, axis: Axis) -> u64 {
        match axis {
            Axis::Page => 1,
            Axis::Layer => self.slice.layers.len() as u64,
            Axis::Kv => u64::from(self.content.vectors()),
            Axis::Head => self.slice.heads.len() as u64,
            Axis::Token => u64::from(self.block_tokens),
            Axis::Dim => u64::from(self.head_dim),
        }
    }

    /// Where the vector of a token begins; `layer` and `head` count as in the whole tensor, `kv` is 0 for K (or a
    /// latent) and 1 for V. Nothing for what the block does not hold.
    pub fn offset(&self, layer: u16, kv: u8, head: u16, token: u32) -> Option<u64> {
        let holds = self.slice.layers.contains(&layer)
            && self.slice.heads.contains(&head)
            && kv < self.content.vectors()
            && token < self.block_tokens;
        let from = |axis, index: u32| u64::from(index) * self.stride(axis);
        holds.then(|| {
            from(Axis::Layer, u32::from(layer - self.slice.layers.start))
                + from(Axis::Kv, kv.into())
                + from(Axis::Head, u32::from(head - self.slice.heads.start))
                + from(Axis::Token, token)
        })
    }

    /// Which bytes of the block hold `part`, ascending, as few ranges as there are.
    pub fn ranges(&self, part: &Slice) -> Result<impl Iterator<Item = Range<u64>>, PlanError> {
        let nest = Nest::within(self, part)?;
        Ok(nest.runs(&[], 0).map(|run| run.block_offset..run.block_offset + run.bytes))
    }
}
