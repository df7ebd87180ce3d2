//! How a block gets its name.
//!
//! The key is the first 16 bytes of BLAKE3, keyed by the scope id, over one message of 64 bytes, or of 128
//! when the sequence hash has more than 51:
//! ```text
//! 0                                 12            13                                     64 or 128
//! | slice: six little-endian u16    | hash length | sequence hash              | zeros   |
//! ```
//! The slice has a fixed length and the hash says its own, so no two names share a message. Every message
//! is whole blocks of BLAKE3 and one chunk: the names of a batch are hashed side by side in vector registers,
//! which a prefix of a thousand blocks needs, and are what [`blake3::keyed_hash`] gives for each alone.

use blake3::platform::Platform;
use blake3::{BLOCK_LEN, IncrementCounter, OUT_LEN};

use crate::{BlockKey, ScopeId, SequenceHash, Slice};

/// Names the blocks of one scope and slice; keeps what is the same for all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namer {
    scope: ScopeId,
    slice: [u8; SLICE_BYTES],
}

const SLICE_BYTES: usize = 12;
const HASH_AT: usize = SLICE_BYTES + 1;
/// Longest sequence hash that shares one BLAKE3 block with the slice.
const SHORT_BYTES_MAX: usize = BLOCK_LEN - HASH_AT;
const SHORT: usize = BLOCK_LEN;
const LONG: usize = 2 * BLOCK_LEN;
/// Messages hashed at once: as many as the widest vectors take.
const LANES: usize = 16;

// Flags of BLAKE3's compression function, by its specification.
const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const ROOT: u8 = 1 << 3;
const KEYED_HASH: u8 = 1 << 4;

impl Namer {
    /// Names blocks that hold `slice` in the scope called `scope`.
    pub fn new(scope: ScopeId, slice: &Slice) -> Self {
        Self { scope, slice: slice.encode() }
    }

    /// The key of the block of the tokens that `hash` names.
    pub fn key(&self, hash: &SequenceHash) -> BlockKey {
        let digest = if is_short(hash) {
            blake3::keyed_hash(&self.scope.0, &self.message::<SHORT>(hash))
        } else {
            blake3::keyed_hash(&self.scope.0, &self.message::<LONG>(hash))
        };
        key_of(digest.as_bytes())
    }

    /// The keys of many, in order; several times faster than one by one.
    pub fn keys(&self, hashes: &[SequenceHash]) -> Vec<BlockKey> {
        let mut keys = Vec::with_capacity(hashes.len());
        // An engine's hashes have one length, so this is one run.
        for run in hashes.chunk_by(|left, right| is_short(left) == is_short(right)) {
            if is_short(&run[0]) {
                self.batch::<SHORT>(run, &mut keys);
            } else {
                self.batch::<LONG>(run, &mut keys);
            }
        }
        keys
    }

    fn message<const BYTES: usize>(&self, hash: &SequenceHash) -> [u8; BYTES] {
        let mut message = [0; BYTES];
        message[..SLICE_BYTES].copy_from_slice(&self.slice);
        message[SLICE_BYTES] = hash.as_bytes().len() as u8;
        let room = SequenceHash::BYTES_MAX.min(BYTES - HASH_AT);
        message[HASH_AT..HASH_AT + room].copy_from_slice(&hash.padded()[..room]);
        message
    }

    /// Hashes that all take messages of `BYTES`, a vector's worth at a time.
    fn batch<const BYTES: usize>(&self, hashes: &[SequenceHash], keys: &mut Vec<BlockKey>) {
        let platform = Platform::detect();
        let words = blake3::platform::words_from_le_bytes_32(&self.scope.0);
        let mut messages = [[0; BYTES]; LANES];
        let mut digests = [0; LANES * OUT_LEN];
        for lanes in hashes.chunks(LANES) {
            for (message, hash) in messages.iter_mut().zip(lanes) {
                *message = self.message(hash);
            }
            let digests = &mut digests[..lanes.len() * OUT_LEN];
            platform.hash_many(
                &messages.each_ref()[..lanes.len()],
                &words,
                0,
                IncrementCounter::No,
                KEYED_HASH,
                CHUNK_START,
                CHUNK_END | ROOT,
                digests,
            );
            keys.extend(digests.as_chunks().0.iter().map(key_of));
        }
    }
}

fn is_short(hash: &SequenceHash) -> bool {
    hash.as_bytes().len() <= SHORT_BYTES_MAX
}

fn key_of(digest: &[u8; OUT_LEN]) -> BlockKey {
    let mut key = [0; BlockKey::BYTES];
    key.copy_from_slice(&digest[..BlockKey::BYTES]);
    BlockKey(key)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn random(seed: &mut u64) -> u8 {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (*seed >> 40) as u8
    }

    fn random_hash(seed: &mut u64, bytes: usize) -> SequenceHash {
        SequenceHash::new(&(0..bytes).map(|_| random(seed)).collect::<Vec<_>>()).unwrap()
    }

    fn random_namer(seed: &mut u64) -> Namer {
        let mut number = || u16::from(random(seed));
        let slice = Slice {
            layers: number()..number(),
            heads: number()..number(),
            layers_total: number(),
            heads_total: number(),
        };
        Namer::new(ScopeId(std::array::from_fn(|_| random(seed))), &slice)
    }

    /// The message as the head of this file draws it, written without the code above.
    fn reference(namer: &Namer, hash: &SequenceHash) -> BlockKey {
        let mut message = namer.slice.to_vec();
        message.push(hash.as_bytes().len() as u8);
        message.extend_from_slice(hash.as_bytes());
        message.resize(if hash.as_bytes().len() <= 51 { 64 } else { 128 }, 0);
        BlockKey::from_slice(&blake3::keyed_hash(&namer.scope.0, &message).as_bytes()[..16]).unwrap()
    }

    #[test]
    fn a_batch_of_any_size_and_length_gives_the_names_that_keyed_blake3_gives_one_by_one() {
        let mut seed = 7;
        for bytes in SequenceHash::BYTES_MIN..=SequenceHash::BYTES_MAX {
            for count in 0..=40 {
                let namer = random_namer(&mut seed);
                let hashes: Vec<_> = (0..count).map(|_| random_hash(&mut seed, bytes)).collect();
                let wanted: Vec<_> = hashes.iter().map(|hash| reference(&namer, hash)).collect();
                assert_eq!(namer.keys(&hashes), wanted, "{count} hashes of {bytes} bytes");
                assert!(hashes.iter().map(|hash| namer.key(hash)).eq(wanted));
            }
        }
    }

    #[test]
    fn lengths_may_be_mixed_in_a_batch() {
        let mut seed = 9;
        for count in 0..=200 {
            let namer = random_namer(&mut seed);
            let hashes: Vec<_> = (0..count)
                .map(|_| {
                    let bytes = SequenceHash::BYTES_MIN + usize::from(random(&mut seed)) % 57;
                    random_hash(&mut seed, bytes)
                })
                .collect();
            assert!(namer.keys(&hashes).into_iter().eq(hashes.iter().map(|hash| reference(&namer, hash))));
        }
    }

    #[test]
    fn what_the_padding_could_confuse_has_different_names() {
        let slices =
            [Slice::whole(1, 1), Slice::whole(1, 256), Slice { heads: 0..2, ..Slice::whole(1, 256) }];
        let mut seen = HashSet::new();
        for slice in &slices {
            let namer = Namer::new(ScopeId([3; 32]), slice);
            for fill in [0, 1] {
                for bytes in SequenceHash::BYTES_MIN..=SequenceHash::BYTES_MAX {
                    // Zeros that belong to the hash are not the zeros behind it.
                    let hash = SequenceHash::new(&vec![fill; bytes]).unwrap();
                    assert!(seen.insert(namer.key(&hash)), "{bytes} bytes of {fill} under {slice}");
                }
            }
        }
    }
}
