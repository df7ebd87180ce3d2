//! The client inside engine workers: find, read and store blocks of KV cache in the node's daemon.
//!
//! ```no_run
//! use kv_client::{Client, ClientOptions, Got, Scope, SequenceHash, Slice, WorkerOptions};
//! use std::time::Duration;
//!
//! # fn main() -> Result<(), kv_client::Error> {
//! let client = Client::connect(ClientOptions::default()).wait()?;
//! let worker = client.worker(WorkerOptions { name: "rank 0".into(), ..Default::default() }).wait()?;
//! let scope = Scope { model: "m".into(), tenant: "default".into(), block_tokens: 16, ..Default::default() };
//! let binding = worker.register(scope, Slice::whole(32, 8), 64 << 10).wait()?;
//!
//! let prefix: Vec<SequenceHash> = (0..10u64).map(SequenceHash::from).collect();
//! let here = worker.lookup(&binding, &prefix)?.prefix();
//! for got in worker.acquire_many(&binding, &prefix[..here], Duration::from_millis(50))? {
//!     match got {
//!         Got::Block(block) => println!("{} bytes, read where they lie", block.len()),
//!         Got::Miss(miss) => println!("recompute: {miss}"),
//!     }
//! }
//! worker.put(&binding, &prefix[here], &vec![0; 64 << 10])?;
//! # Ok(())
//! # }
//! ```
//! In async code, await what is waited for here ([`Call`] is both). What a worker does with blocks
//! (`lookup`, `acquire`, `put`, `reserve`) are plain functions that take microseconds with shared memory;
//! those that may wait belong on a blocking thread there.
//!
//! ```text
//!   worker.rs   the session: opens it, notices its end, opens the next
//!   session.rs  one life of it: shared memory with every shard, or gRPC alone
//!   read.rs     lookup, acquire: the shared table and the arena, asking the shard only when it must
//!   write.rs    put, reserve, commit: staging slots and the ring
//!   hub.rs      the ring of one shard, for all threads
//!   devices.rs  KV caches in device memory, which the daemon copies blocks to and from by itself
//!   offers.rs   descriptors for the daemon, over the worker socket
//!   events.rs   what happens to blocks, without gaps
//!   client.rs   gRPC
//! ```

mod binding;
mod client;
mod devices;
mod error;
mod events;
mod hub;
mod offers;
mod options;
mod read;
mod runtime;
mod session;
mod worker;
mod write;

pub use binding::Binding;
pub use client::{Client, Description};
pub use devices::{
    DeviceCache, DeviceCacheSpec, LayerSave, Load, LoadOptions, MemoryPiece, PagedBlock, SaveOptions,
    TensorHandles,
};
pub use error::{Error, Miss};
pub use events::{EventBatch, EventCursor, Events, WatchOptions};
pub use kv_api::v1;
pub use kv_block::layout;
pub use kv_block::{
    BlockEvent, BlockKey, Checksum, Epoch, EventKind, Fault, FaultKind, MissReason, Priority, Scope,
    ScopeKind, SequenceHash, SessionId, ShardId, Slice, Tier,
};
pub use options::{ClientOptions, Endpoint, PutOptions, Tls, WorkerOptions};
pub use read::{BlockGuard, Got, Lookup, Sighting};
pub use runtime::Call;
pub use worker::{Doors, Evicted, Pinned, Prefetched, Worker};
pub use write::{Reservation, Stored};
