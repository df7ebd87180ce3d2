//! Which bytes of an engine's KV tensors make up a block, and in which order.
//!
//! An engine keeps **pages** of a few tokens in tensors of its own order; a **block** is one run of bytes in an order
//! of ours. Both are the same six axes with other strides:
//! ```text
//! engine   tensor = first.tensor + layer x step + kv x step             (where an axis steps from tensor to tensor)
//!          byte   = first.offset + page x stride + layer x stride + kv x stride + head x stride + token x stride + ...
//! block    byte   = the same sum, densely packed in the block's order; tokens run on through its pages
//! ```
//! So there is one planner for all engines. [`plan()`] walks the axes in the block's order, outermost first, joins
//! what is contiguous on both sides and yields what is left, as single copies or as rows in regular steps. Packed
//! K‖V is a `kv` axis just outside of `dim`; a latent of MLA is one vector without a `kv` axis and with one head;
//! tensors for each layer, or for K and V apart, are axes that step from tensor to tensor.
//!
//! Everything here is a pure function of plain values. What comes in is checked once, when an [`EngineLayout`] or a
//! [`BlockLayout`] is made and when a plan is: sums that overflow, strides that overlap and ranges that leave the
//! whole are refused there, so no copy of a plan needs checking but against the length of the memory itself
//! ([`EngineLayout::tensor_bytes`], [`BlockLayout::bytes`]).
//!
//! Not covered: elements that are not whole bytes (name pairs of them as one byte), K and V of unequal lengths
//! (name both together as one vector), head groups outside of a page's other axes (name each group as its own slice).

mod block;
mod cover;
mod engine;
mod order;
mod plan;

pub use block::BlockLayout;
pub use cover::{CoverError, Piece, SplitError, cover, heads_of_rank};
pub use engine::{EngineLayout, PageIndex, Place, Shape, Step, Strides, TensorIndex, Tensors};
pub use order::{Axis, EngineOrder, Order, OrderError};
pub use plan::{Plan, PlanError, RowIter, Rows, Run, Runs, plan};

use crate::SliceError;

/// What is cached of a token, in one layer and one head.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Content {
    /// A key and a value, of the same length each.
    KeyValue,
    /// One vector: a latent of MLA, an indexer's key, or K and V taken together. What every rank has alike, as a
    /// latent, is head 0 of 1 on each of them.
    Latent,
}

impl Content {
    /// Length of the `kv` axis.
    pub fn vectors(self) -> u8 {
        match self {
            Self::KeyValue => 2,
            Self::Latent => 1,
        }
    }
}

/// Why a layout was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// A length of zero.
    #[error("{what} is zero")]
    Zero {
        /// Which.
        what: &'static str,
    },
    /// Elements that are not whole bytes: no copy could begin at each of them.
    #[error("elements of {bits} bits are not whole bytes")]
    SubByte {
        /// Bits of an element.
        bits: u32,
    },
    /// Layers or heads.
    #[error(transparent)]
    Slice(#[from] SliceError),
    /// An axis that the block's order leaves out is longer than 1.
    #[error("the order does not say where {axis} is, of which there are {count}")]
    Unnamed {
        /// Which.
        axis: Axis,
        /// Its length.
        count: u64,
    },
    /// Two elements would share a byte, or no proof is at hand that they do not: each stride must be at least
    /// what all smaller ones span.
    #[error("{axis} has a stride of {stride} where what is inside spans {inner}")]
    Overlap {
        /// Which.
        axis: Axis,
        /// Its stride, in bytes, or in tensors where it steps from tensor to tensor.
        stride: u64,
        /// What the axes with smaller strides span, in the same unit.
        inner: u64,
    },
    /// The layout does not fit 64 bits of address, or 32 bits of tensor index.
    #[error("{axis} leads beyond what an address can say")]
    Overflow {
        /// Where the sum overflows.
        axis: Axis,
    },
}

/// Bytes of an element.
fn element_bytes(bits: u32) -> Result<u64, LayoutError> {
    match bits {
        0 => Err(LayoutError::Zero { what: "element_bits" }),
        _ if !bits.is_multiple_of(8) => Err(LayoutError::SubByte { bits }),
        _ => Ok(u64::from(bits / 8)),
    }
}

fn not_zero(lengths: &[(&'static str, u32)]) -> Result<(), LayoutError> {
    lengths
        .iter()
        .find(|(_, length)| *length == 0)
        .map_or(Ok(()), |(what, _)| Err(LayoutError::Zero { what }))
}
