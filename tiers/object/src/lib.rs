//! The object tier: packs of blocks on S3, Azure Blob or in a directory, shared by all nodes and outliving each.
//!
//! ```text
//!  tier      the tier as a whole, over any store
//!    packer    blocks -> packs                    pack      the bytes of a pack
//!    index     which block lies where             reach     which ranges to ask for
//!    manifest  what a node says it uses           collect   what may be deleted, by rounds
//!    requests  the gate: retry, pace, circuit         gather    what is read together, and ahead
//!  store     what an object store does            landing   where a read's bytes go
//!    dir  s3  azure   the back ends               memory  unreliable   the model, and faults by seed
//!    place     where a store is, in one word      open      the store that is there
//!    contract  the suite that all of them run
//! ```
//! A put: packer (until there are enough) -> pack -> `Put packs/<digest>` -> index. A read: index -> reach -> one
//! `Get` for neighbours -> landing (straight into the slots) -> every checksum. Nothing is overwritten, nobody holds a
//! lock, no two nodes compare their clocks, and nothing is served that failed a check.
//!
//! What decides is plain state that takes time and chance as arguments; only [`tier`], [`requests`] and the back ends
//! wait for anything.

#[cfg(feature = "azure")]
pub mod azure;
pub mod circuit;
pub mod collect;
pub mod contract;
pub mod dir;
pub mod gather;
pub mod index;
pub mod landing;
pub mod manifest;
pub mod memory;
pub mod open;
pub mod pace;
pub mod pack;
pub mod packer;
pub mod place;
pub mod random;
pub mod reach;
pub mod requests;
pub mod retry;
#[cfg(feature = "s3")]
pub mod s3;
pub mod secret;
pub mod store;
pub mod tier;
pub mod unreliable;

mod cursor;
mod join;

pub use store::{Store, StoreError};
pub use tier::{Full, Got, Offer, Tier, TierConfig, TierError, Want};
