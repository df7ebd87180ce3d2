//! The gRPC contract: generated types, conversions to and from [`kv_block`], faults.
//!
//! A malformed message stops in [`convert`]; behind it only types that cannot be wrong. The comments in
//! `proto/kv/v1` are the reference.

pub mod convert;
pub mod fault;

/// Generated from `proto/kv/v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("kv.v1");
}

/// The file descriptor set, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
