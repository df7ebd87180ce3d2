//! One pass that copies and sums.

use kv_block::{BlockKey, Checksum, Summer};

/// Bytes copied before they are summed: small enough to still be in the nearest caches.
pub const TILE_BYTES: usize = 32 << 10;

/// Copies `source` to the front of `target` and gives the checksum of what landed there.
///
/// # Panics
/// When `target` is shorter than `source`.
pub fn copy_and_sum(key: &BlockKey, target: &mut [u8], source: &[u8]) -> Checksum {
    copy_with(key, &mut target[..source.len()], |at, tile| {
        tile.copy_from_slice(&source[at..at + tile.len()]);
    })
}

/// Lets `read` fill `target` piece by piece (offset, piece) and sums each piece after it landed, so the
/// checksum is of the bytes kept, whatever the source does meanwhile.
pub fn copy_with(key: &BlockKey, target: &mut [u8], mut read: impl FnMut(usize, &mut [u8])) -> Checksum {
    let mut summer = Summer::new(*key);
    for (index, tile) in target.chunks_mut(TILE_BYTES).enumerate() {
        read(index * TILE_BYTES, tile);
        summer.update(tile);
    }
    summer.finish()
}
