//! The object tier: packs of blocks on S3, Azure Blob or in a directory.

pub mod pack;

mod cursor;
