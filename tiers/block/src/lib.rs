//! The common vocabulary of kvd: what a block is called, which bytes of an engine it is made of, where it may live,
//! how it is checked, why it is missing and what a caller should do about a fault.
//!
//! No I/O, no async, no clock, nothing of ours imported. Everybody else imports this crate, so a type is
//! here only when at least two of them need the same meaning.
//!
//! A **block** is an immutable run of bytes. Its [`BlockKey`] is derived, never chosen: the [`Scope`] says
//! what the bytes mean, the [`Slice`] which part of the tensor they are, the [`SequenceHash`] which tokens.

pub mod checksum;
pub mod code;
pub mod event;
pub mod fault;
pub mod id;
pub mod layout;
pub mod miss;
pub mod name;
pub mod payload;
pub mod place;
pub mod record;
pub mod scope;
pub mod slice;
pub mod tier;

pub use checksum::{Checksum, Summer};
pub use event::{BlockEvent, EventKind};
pub use fault::{Fault, FaultKind};
pub use id::{
    BindingId, BindingTag, BlockKey, Epoch, Generation, LeaseId, ParseIdError, ScopeId, SequenceHash,
    SessionId, ShardId, SlotId,
};
pub use miss::{Eviction, MissReason};
pub use name::Namer;
pub use record::{DiskLocation, Record};
pub use scope::{Scope, ScopeError, ScopeKind};
pub use slice::{Slice, SliceError};
pub use tier::{Priority, Tier};
