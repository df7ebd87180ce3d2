//! The object tier: packs of blocks on S3, Azure Blob or in a directory.

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
pub mod store;
pub mod tier;
pub mod unreliable;

mod cursor;
mod join;
