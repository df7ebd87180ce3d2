//! The GPUs of this node.

pub mod view;
