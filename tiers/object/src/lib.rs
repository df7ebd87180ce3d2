//! The object tier: packs of blocks on S3, Azure Blob or in a directory.

#[cfg(feature = "azure")]
pub mod azure;
pub mod circuit;
pub mod collect;
pub mod contract;
pub mod dir;
pub mod index;
pub mod landing;
pub mod manifest;
pub mod memory;
pub mod pace;
pub mod pack;
pub mod packer;
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
