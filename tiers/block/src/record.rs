//! What travels with a block's bytes from tier to tier.

use crate::{BindingTag, BlockKey, Checksum, Priority};

/// A sealed block without its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// Name.
    pub key: BlockKey,
    /// Checksum of bytes and name.
    pub checksum: Checksum,
    /// Length in bytes.
    pub bytes: u32,
    /// Scope, slice and block length it was stored under.
    pub tag: BindingTag,
    /// Retention class.
    pub priority: Priority,
    /// Unix time in seconds after which it counts as expired; 0 means never.
    pub expires_at: u32,
}

/// Where a block lies on the disk tier. Opaque to all but the store that gave it; never zero.
///
/// ```text
/// segment generation:20 | segment:20 | offset in 4 KiB pages:24
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct DiskLocation(std::num::NonZeroU64);

impl DiskLocation {
    /// Largest segment number.
    pub const SEGMENT_MAX: u32 = (1 << 20) - 1;
    /// Largest page number within a segment.
    pub const PAGE_MAX: u32 = (1 << 24) - 1;

    /// Page `page` of segment `segment` in that segment's life `generation` (only its low 20 bits count).
    /// `None` when a number is out of range or all of them are zero.
    pub fn new(segment: u32, generation: u32, page: u32) -> Option<Self> {
        if segment > Self::SEGMENT_MAX || page > Self::PAGE_MAX {
            return None;
        }
        let generation = u64::from(generation & Self::SEGMENT_MAX);
        Self::from_bits(generation << 44 | u64::from(segment) << 24 | u64::from(page))
    }

    /// The location with these bits; `None` for zero.
    pub fn from_bits(bits: u64) -> Option<Self> {
        std::num::NonZeroU64::new(bits).map(Self)
    }

    /// All bits.
    pub fn bits(self) -> u64 {
        self.0.get()
    }

    /// Segment number.
    pub fn segment(self) -> u32 {
        (self.bits() >> 24) as u32 & Self::SEGMENT_MAX
    }

    /// Low 20 bits of the segment's generation.
    pub fn generation(self) -> u32 {
        (self.bits() >> 44) as u32
    }

    /// Offset in the segment, in 4 KiB pages.
    pub fn page(self) -> u32 {
        self.bits() as u32 & Self::PAGE_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_gives_back_what_it_was_made_of() {
        let at = DiskLocation::new(DiskLocation::SEGMENT_MAX, 0x1_2345, DiskLocation::PAGE_MAX).unwrap();
        assert_eq!((at.segment(), at.generation(), at.page()), (0xf_ffff, 0x1_2345, 0xff_ffff));
        assert_eq!(DiskLocation::new(0, 0, 0), None);
        assert_eq!(DiskLocation::new(1 << 20, 0, 1), None);
    }
}
