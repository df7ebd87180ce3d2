//! Bytes that prove whose they are: a keystream seeded by the full block key.
//!
//! Any reader can check any byte of any block without a reference copy; a stale, misdirected, truncated or
//! flipped payload is caught where it differs. Tests, load tools and the demo use it; nothing in the data
//! path does.

use crate::BlockKey;

/// Fills `bytes` with the keystream of `key` from its beginning.
pub fn fill(key: &BlockKey, bytes: &mut [u8]) {
    let mut stream = Stream::new(key);
    let mut words = bytes.chunks_exact_mut(8);
    for word in &mut words {
        word.copy_from_slice(&stream.next().to_le_bytes());
    }
    let tail = words.into_remainder();
    let last = stream.next().to_le_bytes();
    tail.copy_from_slice(&last[..tail.len()]);
}

/// Offset of the first byte of `bytes` that is not the keystream of `key`; `None` when all are right.
pub fn first_wrong_byte(key: &BlockKey, bytes: &[u8]) -> Option<usize> {
    let mut stream = Stream::new(key);
    let words = bytes.chunks_exact(8);
    let tail = words.remainder();
    for (at, word) in words.enumerate() {
        let wanted = stream.next().to_le_bytes();
        if word != wanted {
            return Some(at * 8 + differing(word, &wanted));
        }
    }
    let last = stream.next().to_le_bytes();
    (tail != &last[..tail.len()]).then(|| bytes.len() - tail.len() + differing(tail, &last))
}

fn differing(found: &[u8], wanted: &[u8]) -> usize {
    found.iter().zip(wanted).position(|(a, b)| a != b).expect("called on a difference")
}

/// SplitMix64 over both halves of the key: two lanes so that every key bit counts.
struct Stream {
    state: u64,
    lane: u64,
}

impl Stream {
    fn new(key: &BlockKey) -> Self {
        let [state, lane] = key.halves();
        Self { state, lane }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state ^ self.lane.rotate_left((self.state >> 58) as u32);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_found_where_it_is() {
        let key = BlockKey([9; 16]);
        let mut bytes = vec![0; 131];
        fill(&key, &mut bytes);
        assert_eq!(first_wrong_byte(&key, &bytes), None);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(first_wrong_byte(&key, &bytes), Some(bit / 8));
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn another_keys_bytes_are_wrong_from_the_start() {
        let mut bytes = vec![0; 4096];
        fill(&BlockKey([1; 16]), &mut bytes);
        for other in [BlockKey([2; 16]), BlockKey::from_halves([BlockKey([1; 16]).halves()[0], 5])] {
            assert!(first_wrong_byte(&other, &bytes).is_some_and(|at| at < 8));
        }
    }
}
