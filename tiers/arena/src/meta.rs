//! Where everything lies in a shard's meta file.
//!
//! ```text
//! 0        header, one page
//!            0 magic "kvdmeta1" | 8 version u64 | 16 regions | 24 region bytes | 32 table entries
//!            40 data inode | 48 data bytes | 56 check of the above
//!            64 epoch: epoch:48 | check:16
//!            72 grown: regions:32 | check:32, how many from the front of the arena have memory behind them
//! 4096     region table: one u64 per region, the slot bytes of its class, 0 when no class owns it
//! aligned  slot headers: 64 bytes for each 4 KiB of the arena, sparse; see `slab`
//! 2 MiB    catalog table: buckets of 256 bytes; see `table`
//! ```
//! All numbers little-endian. The header is written once, before the file gets its name; only the two words of
//! epoch and growth change later, each in one store. So there is no moment at which a kill leaves a
//! half-written header. A file without a word of growth is of a life that allocated everything at once.

use kv_block::{BlockKey, Checksum, Epoch};

use crate::Error;

/// Smallest piece of the arena.
pub(crate) const PAGE: u64 = 4096;
/// Bytes of one slot header.
pub(crate) const SLOT_HEADER: u64 = 64;
/// What tables and regions are aligned to.
pub(crate) const HUGE_PAGE: u64 = 2 << 20;
pub(crate) const HEADER_BYTES: usize = 4096;
pub(crate) const EPOCH_OFFSET: usize = 64;
pub(crate) const GROWN_OFFSET: usize = 72;
const REGION_TABLE: u64 = PAGE;
const MAGIC: u64 = u64::from_le_bytes(*b"kvdmeta1");
const VERSION: u64 = 1;

/// How much memory a shard has and how it is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Number of regions in the arena.
    pub regions: u32,
    /// Bytes of a region: a power of two, 2 MiB to 2 GiB. A block is at most this long.
    pub region_bytes: u64,
    /// Most entries the catalog table takes.
    pub table_entries_max: u64,
}

impl Geometry {
    /// Region size where nothing else is asked for.
    pub const REGION_BYTES: u64 = 32 << 20;

    /// The geometry with `data_bytes` of arena (rounded down to whole regions, one at least) and room for
    /// `table_entries_max` entries.
    pub fn with_bytes(data_bytes: u64, table_entries_max: u64) -> Self {
        let regions = (data_bytes / Self::REGION_BYTES).clamp(1, u64::from(u32::MAX)) as u32;
        Self { regions, region_bytes: Self::REGION_BYTES, table_entries_max }
    }

    /// Refuses what cannot be laid out.
    pub fn validate(&self) -> Result<(), Error> {
        let fail = |what, found, wanted| Err(Error::Geometry { what, found, wanted });
        if !self.region_bytes.is_power_of_two() || !(HUGE_PAGE..=1 << 31).contains(&self.region_bytes) {
            return fail("region bytes", self.region_bytes, "a power of two from 2 MiB to 2 GiB");
        }
        let slots = u64::from(self.regions) * (self.region_bytes / PAGE);
        if self.regions == 0 || slots >= u64::from(u32::MAX) {
            return fail("regions", self.regions.into(), "at least one and less than 16 TiB in all");
        }
        if !(1..=1 << 40).contains(&self.table_entries_max) {
            return fail("table entries", self.table_entries_max, "1 to 2^40");
        }
        Ok(())
    }

    /// Bytes of the arena.
    pub fn data_bytes(&self) -> u64 {
        u64::from(self.regions) * self.region_bytes
    }

    /// Bytes of the meta file that are taken from the start: header, region table, catalog table. Slot
    /// headers come on top as regions are used: 64 bytes per slot, a page per region at least.
    pub fn meta_bytes(&self) -> u64 {
        let layout = Layout::unchecked(*self);
        layout.headers + layout.buckets * crate::table::BUCKET_BYTES
    }
}

/// A valid geometry with all offsets worked out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    pub(crate) geometry: Geometry,
    /// Slot ids per region.
    pub(crate) region_slots: u32,
    /// Offset of the slot headers.
    pub(crate) headers: u64,
    /// Offset of the buckets.
    pub(crate) table: u64,
    /// Number of buckets.
    pub(crate) buckets: u64,
    /// Length of the meta file.
    pub(crate) meta_bytes: u64,
}

impl Layout {
    pub(crate) fn new(geometry: Geometry) -> Result<Self, Error> {
        geometry.validate()?;
        Ok(Self::unchecked(geometry))
    }

    fn unchecked(geometry: Geometry) -> Self {
        let region_slots = (geometry.region_bytes / PAGE) as u32;
        let headers = (REGION_TABLE + u64::from(geometry.regions) * 8).next_multiple_of(PAGE);
        let header_bytes = u64::from(geometry.regions) * u64::from(region_slots) * SLOT_HEADER;
        let table = (headers + header_bytes).next_multiple_of(HUGE_PAGE);
        let buckets = crate::table::buckets_for(geometry.table_entries_max);
        let meta_bytes = (table + buckets * crate::table::BUCKET_BYTES).next_multiple_of(PAGE);
        Self { geometry, region_slots, headers, table, buckets, meta_bytes }
    }

    /// Offset of a region's word in the region table.
    pub(crate) fn region(&self, region: u32) -> usize {
        (REGION_TABLE + u64::from(region) * 8) as usize
    }

    /// Offset of a slot's header.
    pub(crate) fn header(&self, slot: u32) -> usize {
        (self.headers + u64::from(slot) * SLOT_HEADER) as usize
    }

    /// Number of slot ids.
    pub(crate) fn slots(&self) -> u32 {
        self.geometry.regions * self.region_slots
    }

    /// How many slots of `slot_bytes` fit a region; `None` when that is no class.
    pub(crate) fn class_slots(&self, slot_bytes: u64) -> Option<u32> {
        let fits =
            slot_bytes.is_multiple_of(PAGE) && (PAGE..=self.geometry.region_bytes).contains(&slot_bytes);
        fits.then(|| (self.geometry.region_bytes / slot_bytes) as u32)
    }

    /// Where slot `slot` lies in the arena when its region belongs to `slot_bytes`; `None` when it has no
    /// such slot.
    pub(crate) fn data_offset(&self, slot: u32, slot_bytes: u64) -> Option<u64> {
        let (region, index) = (slot / self.region_slots, slot % self.region_slots);
        if region >= self.geometry.regions || index >= self.class_slots(slot_bytes)? {
            return None;
        }
        Some(u64::from(region) * self.geometry.region_bytes + u64::from(index) * slot_bytes)
    }
}

/// What stands in the header beside the geometry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) layout: Layout,
    pub(crate) data_inode: u64,
    pub(crate) epoch: Epoch,
}

/// Why a header was not accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("it does not begin like a meta file")]
    Magic,
    #[error("it has format version {found}, this program reads {VERSION}")]
    Version { found: u64 },
    #[error("its header is damaged")]
    Damaged,
}

/// The epoch with its check, in one word.
pub(crate) fn epoch_word(epoch: Epoch) -> u64 {
    let value = epoch.0 & 0xffff_ffff_ffff;
    value << 16 | epoch_check(value)
}

/// The epoch in `word`, if its check fits.
pub(crate) fn epoch_of(word: u64) -> Option<Epoch> {
    let value = word >> 16;
    (word & 0xffff == epoch_check(value)).then_some(Epoch(value))
}

/// How many regions have memory, with its check, in one word.
pub(crate) fn grown_word(regions: u32) -> u64 {
    u64::from(regions) << 32 | grown_check(regions)
}

/// The number of regions in `word`, if its check fits.
pub(crate) fn grown_of(word: u64) -> Option<u32> {
    let regions = (word >> 32) as u32;
    (word & 0xffff_ffff == grown_check(regions)).then_some(regions)
}

fn grown_check(regions: u32) -> u64 {
    u64::from(regions).wrapping_add(0x6b76).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32
}

fn epoch_check(value: u64) -> u64 {
    value.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48 ^ 0x6b76
}

fn check(bytes: &[u8]) -> u64 {
    Checksum::of(&BlockKey([0x6d; 16]), bytes).0
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let geometry = &self.layout.geometry;
        let numbers = [
            MAGIC,
            VERSION,
            geometry.regions.into(),
            geometry.region_bytes,
            geometry.table_entries_max,
            self.data_inode,
            geometry.data_bytes(),
        ];
        let mut page = [0; HEADER_BYTES];
        for (at, number) in numbers.into_iter().enumerate() {
            page[at * 8..at * 8 + 8].copy_from_slice(&number.to_le_bytes());
        }
        let sum = check(&page[..56]);
        page[56..64].copy_from_slice(&sum.to_le_bytes());
        page[EPOCH_OFFSET..EPOCH_OFFSET + 8].copy_from_slice(&epoch_word(self.epoch).to_le_bytes());
        page
    }

    pub(crate) fn decode(page: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        let number = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"));
        if number(0) != MAGIC {
            return Err(HeaderError::Magic);
        }
        // The version comes before the check: another version may check otherwise.
        if number(8) != VERSION {
            return Err(HeaderError::Version { found: number(8) });
        }
        let epoch = epoch_of(number(EPOCH_OFFSET)).ok_or(HeaderError::Damaged)?;
        let regions = u32::try_from(number(16)).map_err(|_| HeaderError::Damaged)?;
        let geometry = Geometry { regions, region_bytes: number(24), table_entries_max: number(32) };
        let layout = Layout::new(geometry).map_err(|_| HeaderError::Damaged)?;
        if number(56) != check(&page[..56]) || number(48) != geometry.data_bytes() {
            return Err(HeaderError::Damaged);
        }
        Ok(Self { layout, data_inode: number(40), epoch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let geometry = Geometry { regions: 3, region_bytes: 2 << 20, table_entries_max: 100 };
        Header { layout: Layout::new(geometry).unwrap(), data_inode: 7, epoch: Epoch(9) }
    }

    #[test]
    fn a_header_survives_encoding_and_no_flipped_bit_does() {
        let page = header().encode();
        assert_eq!(Header::decode(&page), Ok(header()));
        for bit in 0..72 * 8 {
            let mut bad = page;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bad).is_err(), "bit {bit} does not count");
        }
    }

    #[test]
    fn growth_is_believed_only_with_its_check() {
        for regions in [0, 1, 7, u32::MAX] {
            let word = grown_word(regions);
            assert_eq!(grown_of(word), Some(regions));
            assert!((0..64).all(|bit| grown_of(word ^ 1 << bit).is_none()), "{regions}");
        }
        assert_eq!(grown_of(0), None, "what an earlier version left there");
    }

    #[test]
    fn another_version_is_named() {
        let mut page = header().encode();
        page[8] = 2;
        assert_eq!(Header::decode(&page), Err(HeaderError::Version { found: 2 }));
    }

    #[test]
    fn geometries_that_cannot_be_laid_out_are_refused() {
        let good = header().layout.geometry;
        for bad in [
            Geometry { regions: 0, ..good },
            Geometry { regions: u32::MAX, ..good },
            Geometry { region_bytes: 3 << 20, ..good },
            Geometry { region_bytes: 1 << 20, ..good },
            Geometry { region_bytes: 1 << 32, ..good },
            Geometry { table_entries_max: 0, ..good },
        ] {
            assert!(matches!(bad.validate(), Err(Error::Geometry { .. })), "{bad:?}");
        }
    }

    #[test]
    fn parts_of_the_meta_file_do_not_overlap() {
        let layout = header().layout;
        assert!(layout.region(2) + 8 <= layout.header(0));
        assert!(layout.header(layout.slots()) as u64 <= layout.table);
        assert!(layout.table + layout.buckets * crate::table::BUCKET_BYTES <= layout.meta_bytes);
        assert_eq!(layout.data_offset(512 * 2 + 1, 4096), Some((4 << 20) + 4096));
        assert_eq!(layout.data_offset(512 * 2 + 1, 2 << 20), None, "one slot fits, this is the second");
        assert_eq!(layout.data_offset(512 * 3, 4096), None);
        assert_eq!(layout.data_offset(0, 5000), None);
    }
}
