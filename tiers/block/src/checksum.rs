//! The checksum that every block carries from the moment it is sealed: CRC-64/NVME over the bytes, mixed
//! with the key, so that a swapped or misdirected block fails as surely as a damaged one.
//!
//! The CRC of the bytes alone is what S3 calls `x-amz-checksum-crc64nvme`; [`Checksum::content`] gives it
//! back. The mix is an XOR with a bijection of the key: it loses nothing and costs nothing.

use crc_fast::{CrcAlgorithm, Digest};

use crate::BlockKey;

/// Checksum of a block: of its bytes and its name together.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Checksum(pub u64);

impl std::fmt::Debug for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl std::fmt::Display for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Checksum {
    /// Checksum of `bytes` under the name `key`.
    pub fn of(key: &BlockKey, bytes: &[u8]) -> Self {
        Self::from_content(key, crc_fast::checksum(CrcAlgorithm::Crc64Nvme, bytes))
    }

    /// The checksum of a block whose bytes have the CRC-64/NVME `content`.
    pub fn from_content(key: &BlockKey, content: u64) -> Self {
        Self(content ^ name_mask(key))
    }

    /// CRC-64/NVME of the bytes alone.
    pub fn content(self, key: &BlockKey) -> u64 {
        self.0 ^ name_mask(key)
    }

    /// Whether `bytes` are what was sealed under `key`.
    pub fn matches(self, key: &BlockKey, bytes: &[u8]) -> bool {
        self == Self::of(key, bytes)
    }
}

fn name_mask(key: &BlockKey) -> u64 {
    let [low, high] = key.halves();
    // A key is a uniform digest; the rotation keeps (a, b) and (b, a) apart and the constant keeps the
    // all-zero key from being the identity.
    low ^ high.rotate_left(29) ^ 0x6b76_642e_626c_6f63
}

/// The same checksum taken piece by piece, in order.
pub struct Summer {
    key: BlockKey,
    digest: Digest,
}

impl Summer {
    /// Nothing summed yet, under the name `key`.
    pub fn new(key: BlockKey) -> Self {
        Self { key, digest: Digest::new(CrcAlgorithm::Crc64Nvme) }
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
    }

    /// The checksum of all that was added.
    pub fn finish(self) -> Checksum {
        Checksum::from_content(&self.key, self.digest.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_crc_64_nvme() {
        // Check value of CRC-64/NVME in the catalogue of parametrised CRC algorithms.
        let key = BlockKey([3; 16]);
        assert_eq!(Checksum::of(&key, b"123456789").content(&key), 0xae8b_1486_0a79_9888);
    }

    #[test]
    fn pieces_and_whole_agree() {
        let bytes: Vec<u8> = (0..100_000u32).map(|n| (n * 7) as u8).collect();
        let mut summer = Summer::new(BlockKey([1; 16]));
        bytes.chunks(4097).for_each(|piece| summer.update(piece));
        assert_eq!(summer.finish(), Checksum::of(&BlockKey([1; 16]), &bytes));
    }

    #[test]
    fn another_name_never_matches() {
        let bytes = [5; 64];
        let sealed = Checksum::of(&BlockKey([1; 16]), &bytes);
        assert!(sealed.matches(&BlockKey([1; 16]), &bytes));
        for bit in 0..128 {
            let mut other = [1; 16];
            other[bit / 8] ^= 1 << (bit % 8);
            assert!(!sealed.matches(&BlockKey(other), &bytes), "bit {bit} of the key does not count");
        }
    }
}
