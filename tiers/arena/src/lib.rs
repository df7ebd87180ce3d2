//! Host memory as both sides of the fence see it: slots, the shared catalog table, hazard slots.
//!
//! One shard has one [`ShardMemory`]: two files that outlive the daemon. The daemon writes them, workers map
//! them read-only through a [`ShardView`].
//!
//! ```text
//! shard-0.meta   header | region table | slot headers | catalog table      read-only for every worker
//! shard-0.data   the arena: regions of equal size, each cut into slots     writable for trusted workers
//! hazard-0-...   one per worker session: what that worker reads right now  writable for that worker
//!
//! a worker reads                          the daemon evicts
//!   table: key -> slot, generation          header: Retired, generation + 1
//!   hazard cell = slot, generation          full fence
//!   full fence                              read every hazard file (pread)
//!   header unchanged and Sealed?            not named: the slot is free
//!     yes: the bytes stay until cleared     named: try again later
//! ```
//! Either the worker's second look sees the retired header, or the daemon sees the hazard: the two fences
//! leave no third case. `word`, `seqlock` and their loom models hold all of that reasoning; the rest of the
//! crate is bookkeeping around them.
//!
//! This crate owns raw memory, so it may use `unsafe`. Everything it offers is safe.
#![expect(unsafe_code, reason = "maps shared memory and hands out typed pieces of it")]
// Under loom only the protocols and their models are built.
#![cfg_attr(loom, allow(dead_code))]

#[cfg(all(test, loom))]
mod model;
mod seqlock;
mod sync;
mod word;

#[cfg(not(loom))]
pub mod copy;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
mod grow;
#[cfg(not(loom))]
pub mod hazard;
#[cfg(not(loom))]
mod map;
#[cfg(not(loom))]
pub mod memory;
#[cfg(not(loom))]
mod meta;
#[cfg(not(loom))]
pub mod numa;
#[cfg(not(loom))]
pub mod slab;
#[cfg(not(loom))]
pub mod table;
#[cfg(not(loom))]
pub mod view;

pub use word::{RetireError, SlotState};
#[cfg(not(loom))]
pub use {
    error::Error,
    grow::{Backed, Grower},
    hazard::{HazardFile, HazardSet},
    memory::{Adoption, HugePages, MemorySpec, ShardMemory},
    meta::Geometry,
    slab::{ClassUsage, Held, LentSlot, NoSlot, NoSlotReason, RegionInfo, Slab, SlabUsage, Slot, SlotHeader},
    table::{Entry, EntryState, Full, Table, TableReader},
    view::{Absent, FillGuard, ReadGuard, ShardView},
};
