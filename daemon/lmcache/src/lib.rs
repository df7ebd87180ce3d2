//! The LMCache door: kvd in the place of `lmcache server`.
//!
//! LMCache's multi-process connector, as vLLM ships it, speaks gRPC to a server on its machine. Here kvd answers
//! it, for engines that move the bytes themselves (engine-driven transfer) through a file in `/dev/shm`. Towards
//! kvd the door is an engine worker like any other: it opens sessions at the daemon's own socket.
//!
//! ```text
//!  vLLM scheduler --Lookup--> chain of names --> session: acquire, verify, hold ----.
//!                 <-count--                                                          |
//!  vLLM worker    --PrepareRetrieve--> held block --copy, sum--> slot of the pool <--'
//!                 copies out, --CommitRetrieve--> slot is free
//!                 --PrepareStore--> announce what kvd lacks, slots of the pool
//!                 copies in, --CommitStore--> slot --copy, sum--> block, stored
//! ```
//!
//! What a client holds (instances, held blocks, slots, announcements) belongs to its connection and is given back
//! when that closes. No fault of kvd's reaches an engine as an error: what cannot be loaded is a miss, what cannot
//! be stored is not stored.
//!
//! ```text
//!   names.rs     token ids to names; chains that are kept
//!   layout.rs    what a registration says, and what blocks of it mean
//!   pool.rs      the file of transit and its slots
//!   pack.rs      the MessagePack of the answers
//!   instance.rs  one registered engine worker: its session, its pool, its transfers
//!   lookup.rs    one request: what is promised, and held until it is fetched
//!   door.rs      all of them, by the calls of the protocol
//!   service.rs   gRPC around it
//! ```

mod door;
mod instance;
mod layout;
mod lookup;
mod names;
mod pack;
mod pool;
mod service;

/// The messages and services of the protocol, as far as the door answers them.
#[allow(missing_docs, clippy::pedantic, reason = "made from lmcache.proto, which says what they are")]
pub mod wire {
    tonic::include_proto!("lmcache.mp");
}

pub use door::{Counters, Door, NameSession, Options};
pub use names::{BadKey, Chain, Chains, TOKENS_MAX, WORLD_MAX, Wanted};
pub use pool::{Pool, PoolError, SHM_DIR};
pub use service::{Listener, serve};

/// What the names of pool files begin with; LMCache's own do.
pub const POOL_PREFIX: &str = "lmcache_l1_pool_";
