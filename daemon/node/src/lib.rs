//! The brain of one shard of a node.
//!
//! It takes an [`Event`], changes its state and emits [`Command`]s. It owns no socket, file, clock, thread or
//! GPU: whoever drives it does what the commands say and reports back. The daemon drives it on a pinned
//! thread with real devices; tests and the simulator drive the same code with others.
//!
//! ```text
//!   brain.rs    the state, and one match over everything that can happen
//!   put.rs      a worker gives blocks: put, reserve, commit, abort
//!   lookup.rs   a worker wants blocks: lookup, acquire, wait, release, pin
//!   order.rs    which block came before which, as far as workers say
//!   room.rs     room in host memory: quota, eviction, offload
//!   disk.rs     what the disk tier answers: onboard, offload, reclaim
//!   fetch.rs    blocks that a peer or the object tier may have
//!   upload.rs   blocks that go to the object tier
//!   exchange.rs one for a node, over all shards: which peer gives which block
//!   jobs.rs     long work done in parts: purge, verify, list
//!   recover.rs  the state that is left after a restart
//! ```
//! What must always hold: every request gets exactly one final reply, at its deadline at the latest; a block
//! becomes visible only with its checksum; a slot is given back by its guard, whatever path is taken.

mod brain;
mod disk;
mod events;
mod exchange;
mod fetch;
mod io;
mod jobs;
mod lookup;
mod order;
mod pins;
mod put;
mod recover;
mod removal;
mod report;
mod room;
mod session;
mod tenant;
mod upload;

pub use brain::{Brain, BrainConfig, ObjectConfig};
pub use exchange::{Exchange, ExchangeCommand, ExchangeConfig, ExchangeEvent, TransferReport};
pub use io::{
    Binding, BlockReport, BlockState, Command, Event, FetchDone, FetchFrom, FetchOp, FetchToken, FillToken,
    Filter, Found, Grant, Keep, LeaseReport, Micros, Now, OfferToken, Op, Origin, PeerId, Progress, Reach,
    Reply, RequestId, Step, UploadDone, UploadToken,
};
pub use report::{Counters, SessionReport, ShardReport, TenantReport};
