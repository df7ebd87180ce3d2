//! The object tier: packs of blocks on S3, Azure Blob or in a directory.

pub mod contract;
pub mod dir;
pub mod landing;
pub mod memory;
pub mod pack;
pub mod random;
pub mod store;
pub mod unreliable;

mod cursor;
