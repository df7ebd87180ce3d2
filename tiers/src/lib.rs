//! Where blocks live: the catalog, the host tier, eviction, admission and the store trait.
//!
//! ```text
//!              reserve             seal               publish
//!   host ----------------> Filling ------> Sealed ----------------> Block      `lifecycle`, `catalog`
//!    ^  victims: `evict`                                              |
//!    |                                                        leaves the host
//!    |                onboard: read, check, seal                      v
//!    +------------------------------- disk <------------------ admit -+---> gone: a ghost
//!                                    `store`, `reclaim`
//! ```
//! Nothing here does I/O, keeps time or rolls dice: the node's brain calls, devices are behind
//! [`store::BlockStore`], and whoever needs the hour is told it. This crate owns the decisions; `kv-arena`
//! beneath it owns the memory.

pub mod admit;
pub mod catalog;
pub mod contract;
pub mod evict;
pub mod host;
pub mod lifecycle;
pub mod memory;
pub mod reclaim;
pub mod store;
pub mod upload;
