//! The order of bytes in an engine's KV tensors and in a block.

mod order;

pub use order::{Axis, EngineOrder, Order, OrderError};
