//! Whether bytes are what was stored. Every block of the demo is the keystream of its own key
//! ([`kv_block::payload`]), so any reader can tell: stale, swapped, torn and flipped bytes all differ.

use kv_block::{BlockKey, payload};

/// How many of the `wanted` bytes of block `key` are wrong in `bytes`: missing and surplus ones are.
pub fn wrong_bytes(key: &BlockKey, bytes: &[u8], wanted: usize) -> u64 {
    let differing = match payload::first_wrong_byte(key, bytes) {
        None => 0,
        Some(_) => {
            let mut right = vec![0; bytes.len()];
            payload::fill(key, &mut right);
            bytes.iter().zip(&right).filter(|(found, right)| found != right).count()
        }
    };
    (differing + bytes.len().abs_diff(wanted)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: BlockKey = BlockKey([3; 16]);

    fn block() -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        payload::fill(&KEY, &mut bytes);
        bytes
    }

    #[test]
    fn a_planted_wrong_byte_is_found_wherever_it_is() {
        assert_eq!(wrong_bytes(&KEY, &block(), 4096), 0);
        for at in [0, 1, 7, 8, 2048, 4095] {
            let mut bytes = block();
            bytes[at] ^= 0x10;
            assert_eq!(wrong_bytes(&KEY, &bytes, 4096), 1, "byte {at}");
        }
    }

    #[test]
    fn bytes_of_another_block_missing_bytes_and_surplus_bytes_are_wrong() {
        assert!(wrong_bytes(&BlockKey([4; 16]), &block(), 4096) > 4000);
        assert_eq!(wrong_bytes(&KEY, &block()[..4000], 4096), 96);
        assert_eq!(wrong_bytes(&KEY, &[], 4096), 4096);
        let mut long = vec![0; 4100];
        payload::fill(&KEY, &mut long);
        assert_eq!(wrong_bytes(&KEY, &long, 4096), 4);
    }
}
