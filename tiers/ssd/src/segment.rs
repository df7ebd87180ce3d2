//! The bytes of one segment file: what they mean, how they are written, how they are read back.
//!
//! ```text
//!  page 0      pages 1 .. 1+n                      the rest
//! +--------+--------------------------+---------------------------------------+
//! | header | index: n pages x 64 ents | data: blocks, each from a page border |
//! +--------+--------------------------+---------------------------------------+
//!
//! header, one 512-byte sector (the rest of its page is padding that nobody reads)
//!    0 magic "KVDSEGM1"   8 version u32   12 segment u32   16 store id 16 bytes
//!   32 generation u64    40 order u64    48 segment bytes u64   56 index pages u32
//!   60 zero                                                    508 crc32 of bytes 0..508
//!
//! index entry, 64 bytes
//!    0 key 16            16 checksum u64          24 tag u64
//!   32 sequence u64      40 page u32              44 bytes u32
//!   48 expires u32       52 generation u32 (low)  56 flags u8   57 priority u8   58 zero u16
//!   60 crc32 of store id, segment, entry number and bytes 0..60
//! ```
//! All numbers are little-endian, pages have 4 KiB and are counted from the start of the file.
//!
//! - **Generation** counts the lives of a segment. It grows when the segment is released, so everything
//!   that an earlier life left in the index or pointed at from elsewhere no longer counts.
//! - **Order** is the place of this life in the log; zero means that nothing was appended yet, and the
//!   index need not be read.
//! - **Sequence** is the place of an entry in the log. Of two entries for one key the higher one wins. A
//!   removal that had to be carried to a younger segment keeps its sequence and says so in its flags.
//! - An entry's own CRC covers where it stands, so an index page that lands in another file, another store
//!   or another place of the same index is not believed.
//! - Sectors may tear: the header lies in one, an entry never crosses one, and an index page is only ever
//!   rewritten with more entries at its end, so old entries are the same bytes before and after.
//!
//! Parsing takes any bytes whatever and never panics; what it does not believe is simply not there.

use kv_block::{BindingTag, BlockKey, Checksum, DiskLocation, Priority, Record};

/// Unit of layout and of direct I/O, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// Length of an index entry in bytes.
pub const ENTRY_BYTES: usize = 64;
/// Index entries in one page.
pub const ENTRIES_PER_PAGE: u32 = (PAGE_BYTES / ENTRY_BYTES) as u32;
/// Length of the part of the header page that counts, in bytes.
pub const HEADER_BYTES: usize = 512;
/// Version of this format.
pub const VERSION: u32 = 1;
/// Smallest segment, in bytes.
pub const SEGMENT_BYTES_MIN: u64 = 1 << 20;

const MAGIC: &[u8; 8] = b"KVDSEGM1";
const STORED: u8 = 1;
const REMOVED: u8 = 2;
const CARRIED: u8 = 4;

/// Names one store for life, so that a file copied in from another one is not believed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct StoreId(pub [u8; 16]);

impl std::fmt::Display for StoreId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

/// Sizes of a segment's parts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    segment_bytes: u64,
    index_pages: u32,
}

impl Geometry {
    /// A segment of `segment_bytes` (rounded down to whole pages) with an index for blocks of
    /// `index_block_bytes` on average. `None` when the segment is smaller than [`SEGMENT_BYTES_MIN`],
    /// larger than a location can point into, or all index.
    pub fn new(segment_bytes: u64, index_block_bytes: u32) -> Option<Self> {
        let pages = segment_bytes / PAGE_BYTES as u64;
        let per_entry = u64::from(index_block_bytes.max(1)) + ENTRY_BYTES as u64;
        let entries = (segment_bytes - PAGE_BYTES as u64).div_ceil(per_entry);
        let index_pages = entries.div_ceil(u64::from(ENTRIES_PER_PAGE)).max(1);
        Self::from_parts(pages * PAGE_BYTES as u64, u32::try_from(index_pages).ok()?)
    }

    /// The geometry with these parts, as a header tells them; `None` unless they make sense.
    pub fn from_parts(segment_bytes: u64, index_pages: u32) -> Option<Self> {
        let pages = segment_bytes / PAGE_BYTES as u64;
        let sound = segment_bytes >= SEGMENT_BYTES_MIN
            && segment_bytes.is_multiple_of(PAGE_BYTES as u64)
            && pages <= u64::from(DiskLocation::PAGE_MAX) + 1
            && index_pages >= 1
            && u64::from(index_pages) + 1 < pages;
        sound.then_some(Self { segment_bytes, index_pages })
    }

    /// Length of the file in bytes.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Pages of the index.
    pub fn index_pages(&self) -> u32 {
        self.index_pages
    }

    /// Length of the index in bytes.
    pub fn index_bytes(&self) -> usize {
        self.index_pages as usize * PAGE_BYTES
    }

    /// Entries that the index holds.
    pub fn entries_max(&self) -> u32 {
        self.index_pages * ENTRIES_PER_PAGE
    }

    /// First page of the data.
    pub fn data_page_first(&self) -> u32 {
        1 + self.index_pages
    }

    /// Page behind the last one.
    pub fn page_end(&self) -> u32 {
        (self.segment_bytes / PAGE_BYTES as u64) as u32
    }

    /// Pages of data.
    pub fn data_pages(&self) -> u32 {
        self.page_end() - self.data_page_first()
    }

    /// Whether a block of `bytes` at `page` lies within the data.
    pub fn holds(&self, page: u32, bytes: u32) -> bool {
        page >= self.data_page_first()
            && u64::from(page) + u64::from(pages_of(bytes)) <= u64::from(self.page_end())
    }
}

/// Pages that a block of `bytes` takes; at least one, so that every block has a place of its own.
pub fn pages_of(bytes: u32) -> u32 {
    bytes.div_ceil(PAGE_BYTES as u32).max(1)
}

/// What the first page of a segment says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// The store it belongs to.
    pub store: StoreId,
    /// Its number, which its file name repeats.
    pub segment: u32,
    /// Which life of the segment this is.
    pub generation: u64,
    /// Place of this life in the log; 0 before anything was appended.
    pub order: u64,
    /// Where its parts lie.
    pub geometry: Geometry,
}

/// Why a header is not believed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HeaderError {
    /// Fewer bytes than a header has.
    #[error("the file ends within the header")]
    Short,
    /// It does not begin like a segment.
    #[error("not a segment of this store")]
    Magic,
    /// Written by another version of this format.
    #[error("format version {found}, wanted {VERSION}")]
    Version {
        /// The version it names.
        found: u32,
    },
    /// The checksum does not fit.
    #[error("the header fails its checksum")]
    Checksum,
    /// The sizes contradict each other.
    #[error("the header names impossible sizes")]
    Geometry,
}

impl Header {
    /// The header as bytes of its sector.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.segment.to_le_bytes());
        out[16..32].copy_from_slice(&self.store.0);
        out[32..40].copy_from_slice(&self.generation.to_le_bytes());
        out[40..48].copy_from_slice(&self.order.to_le_bytes());
        out[48..56].copy_from_slice(&self.geometry.segment_bytes.to_le_bytes());
        out[56..60].copy_from_slice(&self.geometry.index_pages.to_le_bytes());
        let crc = crc32fast::hash(&out[..HEADER_BYTES - 4]);
        out[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// The header at the beginning of `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        let bytes = bytes.get(..HEADER_BYTES).ok_or(HeaderError::Short)?;
        if &bytes[..8] != MAGIC {
            return Err(HeaderError::Magic);
        }
        if crc32fast::hash(&bytes[..HEADER_BYTES - 4]) != u32_at(bytes, HEADER_BYTES - 4) {
            return Err(HeaderError::Checksum);
        }
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return Err(HeaderError::Version { found: version });
        }
        let geometry =
            Geometry::from_parts(u64_at(bytes, 48), u32_at(bytes, 56)).ok_or(HeaderError::Geometry)?;
        let segment = u32_at(bytes, 12);
        if segment > DiskLocation::SEGMENT_MAX {
            return Err(HeaderError::Geometry);
        }
        Ok(Self {
            store: StoreId(bytes[16..32].try_into().expect("sixteen bytes")),
            segment,
            generation: u64_at(bytes, 32),
            order: u64_at(bytes, 40),
            geometry,
        })
    }

    /// Where a block at `page` of this life lies.
    pub fn location(&self, page: u32) -> Option<DiskLocation> {
        DiskLocation::new(self.segment, self.generation as u32, page)
    }

    /// What every entry's checksum starts from.
    fn seed(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.store.0);
        hasher.update(&self.segment.to_le_bytes());
        hasher.finalize()
    }
}

/// One line of a segment's index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry {
    /// A block was stored.
    Stored {
        /// Place in the log.
        sequence: u64,
        /// What it is.
        record: Record,
        /// Its first page.
        page: u32,
    },
    /// A block was removed: nothing of that key with a lower sequence counts.
    Removed {
        /// Place in the log of the removal.
        sequence: u64,
        /// Whose.
        key: BlockKey,
        /// Where the block lay.
        at: Option<DiskLocation>,
        /// Whether it was copied here from an older segment, and its sequence with it.
        carried: bool,
    },
}

impl Entry {
    /// Place in the log.
    pub fn sequence(&self) -> u64 {
        match self {
            Self::Stored { sequence, .. } | Self::Removed { sequence, .. } => *sequence,
        }
    }

    /// The entry as bytes for place `index` of the segment that `header` describes.
    pub fn encode(&self, header: &Header, index: u32) -> [u8; ENTRY_BYTES] {
        let mut out = [0; ENTRY_BYTES];
        out[32..40].copy_from_slice(&self.sequence().to_le_bytes());
        out[52..56].copy_from_slice(&(header.generation as u32).to_le_bytes());
        match self {
            Self::Stored { record, page, .. } => {
                out[..16].copy_from_slice(&record.key.0);
                out[16..24].copy_from_slice(&record.checksum.0.to_le_bytes());
                out[24..32].copy_from_slice(&record.tag.0.to_le_bytes());
                out[40..44].copy_from_slice(&page.to_le_bytes());
                out[44..48].copy_from_slice(&record.bytes.to_le_bytes());
                out[48..52].copy_from_slice(&record.expires_at.to_le_bytes());
                out[56] = STORED;
                out[57] = record.priority as u8;
            }
            Self::Removed { key, at, carried, .. } => {
                out[..16].copy_from_slice(&key.0);
                out[16..24].copy_from_slice(&at.map_or(0, DiskLocation::bits).to_le_bytes());
                out[56] = if *carried { REMOVED | CARRIED } else { REMOVED };
            }
        }
        let crc = entry_crc(header.seed(), index, &out);
        out[60..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads one entry whose checksum was found right; `None` when its fields contradict the geometry.
    fn decode(header: &Header, bytes: &[u8]) -> Option<Self> {
        let key = BlockKey(bytes[..16].try_into().expect("sixteen bytes"));
        let sequence = u64_at(bytes, 32);
        let flags = bytes[56];
        if bytes[58..60] != [0, 0] {
            return None;
        }
        match flags {
            STORED => {
                let record = Record {
                    key,
                    checksum: Checksum(u64_at(bytes, 16)),
                    tag: BindingTag(u64_at(bytes, 24)),
                    bytes: u32_at(bytes, 44),
                    priority: Priority::from_bits(bytes[57]),
                    expires_at: u32_at(bytes, 48),
                };
                let page = u32_at(bytes, 40);
                header.geometry.holds(page, record.bytes).then_some(Self::Stored { sequence, record, page })
            }
            REMOVED => Some(Self::Removed {
                sequence,
                key,
                at: DiskLocation::from_bits(u64_at(bytes, 16)),
                carried: false,
            }),
            flags if flags == REMOVED | CARRIED => {
                let at = DiskLocation::from_bits(u64_at(bytes, 16));
                Some(Self::Removed { sequence, key, at, carried: true })
            }
            _ => None,
        }
    }
}

fn entry_crc(seed: u32, index: u32, entry: &[u8]) -> u32 {
    let mut covered = [0; ENTRY_BYTES];
    covered[..60].copy_from_slice(&entry[..60]);
    covered[60..].copy_from_slice(&index.to_le_bytes());
    let mut hasher = crc32fast::Hasher::new_with_initial(seed);
    hasher.update(&covered);
    hasher.finalize()
}

/// What an index said.
#[derive(Default, Debug)]
pub struct IndexScan {
    /// Entries of this life, with their place in the index.
    pub entries: Vec<(u32, Entry)>,
    /// Places never written.
    pub empty: u32,
    /// Places with an entry of an earlier life.
    pub stale: u32,
    /// Places with bytes that are no entry of this segment: torn, damaged or misplaced.
    pub broken: u32,
}

/// Reads the entries in `index`, a piece of the index of the segment that `header` describes; its first
/// byte is that of entry `first`. Adds what it finds to `scan`. A piece cut short ends with its last whole
/// entry.
pub fn parse_segment_index(header: &Header, first: u32, index: &[u8], scan: &mut IndexScan) {
    let seed = header.seed();
    for (number, bytes) in (first..header.geometry.entries_max()).zip(index.chunks_exact(ENTRY_BYTES)) {
        let crc = u32_at(bytes, 60);
        if crc == 0 && bytes.iter().all(|byte| *byte == 0) {
            scan.empty += 1;
        } else if crc != entry_crc(seed, number, bytes) {
            scan.broken += 1;
        } else if u32_at(bytes, 52) != header.generation as u32 {
            scan.stale += 1;
        } else if let Some(entry) = Entry::decode(header, bytes) {
            scan.entries.push((number, entry));
        } else {
            scan.broken += 1;
        }
    }
}

/// Reads header and index from the beginning of a segment file, as much of it as there is.
pub fn parse_segment(bytes: &[u8]) -> Result<(Header, IndexScan), HeaderError> {
    let header = Header::parse(bytes)?;
    let mut scan = IndexScan::default();
    let index = bytes.get(PAGE_BYTES..).unwrap_or_default();
    parse_segment_index(&header, 0, &index[..index.len().min(header.geometry.index_bytes())], &mut scan);
    Ok((header, scan))
}

/// Name of the file of segment `number`.
pub fn file_name(number: u32) -> String {
    format!("segment-{number:08}.kv")
}

/// Number of the segment whose file has this name.
pub fn number_of(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("segment-")?.strip_suffix(".kv")?;
    let number = digits.parse().ok().filter(|number| *number <= DiskLocation::SEGMENT_MAX)?;
    (file_name(number) == name).then_some(number)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header() -> Header {
        Header {
            store: StoreId(*b"a store for test"),
            segment: 12,
            generation: 0x1_0000_0007,
            order: 3,
            geometry: Geometry::new(1 << 20, 16 << 10).unwrap(),
        }
    }

    fn record(number: u8) -> Record {
        let key = BlockKey([number; 16]);
        let content: Vec<u8> = (0..5000u32).map(|at| (at as u8) ^ number).collect();
        Record {
            key,
            checksum: Checksum::of(&key, &content),
            bytes: content.len() as u32,
            tag: BindingTag(0x0102_0304_0506_0708),
            priority: Priority::High,
            expires_at: 1_800_000_000,
        }
    }

    fn entries() -> Vec<Entry> {
        let stored = |number: u8| Entry::Stored {
            sequence: 100 + u64::from(number),
            record: record(number),
            page: header().geometry.data_page_first() + 2 * u32::from(number),
        };
        let at = DiskLocation::new(12, 7, 6);
        vec![
            stored(0),
            stored(1),
            Entry::Removed { sequence: 102, key: BlockKey([1; 16]), at, carried: false },
            stored(3),
            Entry::Removed { sequence: 50, key: BlockKey([9; 16]), at: None, carried: true },
        ]
    }

    fn segment_prefix() -> Vec<u8> {
        let header = header();
        let mut bytes = vec![0; PAGE_BYTES + header.geometry.index_bytes()];
        bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
        for (index, entry) in entries().iter().enumerate() {
            let at = PAGE_BYTES + index * ENTRY_BYTES;
            bytes[at..at + ENTRY_BYTES].copy_from_slice(&entry.encode(&header, index as u32));
        }
        bytes
    }

    fn found(bytes: &[u8]) -> Vec<Entry> {
        parse_segment(bytes)
            .map_or(Vec::new(), |(_, scan)| scan.entries.into_iter().map(|(_, e)| e).collect())
    }

    #[test]
    fn golden_bytes_of_version_1() {
        // These bytes stay readable for ever, or are refused by version. Never change the numbers below.
        let bytes = segment_prefix();
        // Not CRC-32: over bytes that end in their own CRC-32 that is the same for all of them.
        let digest = |bytes: &[u8]| Checksum::of(&BlockKey([0; 16]), bytes).0;
        let index = &bytes[PAGE_BYTES..PAGE_BYTES + 5 * ENTRY_BYTES];
        assert_eq!([digest(&bytes[..HEADER_BYTES]), digest(index)], GOLDEN, "the format changed");
        assert_eq!(bytes.len(), 2 * PAGE_BYTES);
        let (header_found, scan) = parse_segment(&bytes).unwrap();
        assert_eq!(header_found, header());
        assert_eq!((scan.empty, scan.stale, scan.broken), (59, 0, 0));
        assert_eq!(found(&bytes), entries());
    }
    const GOLDEN: [u64; 2] = [0xdd01_bee2_ba26_e536, 0xa747_e577_4021_e633];

    #[test]
    fn every_truncation_loses_only_what_it_cuts() {
        let bytes = segment_prefix();
        for end in 0..bytes.len() {
            let whole = entries().into_iter().enumerate();
            let kept: Vec<_> =
                whole.filter(|(at, _)| PAGE_BYTES + (at + 1) * ENTRY_BYTES <= end).map(|(_, e)| e).collect();
            assert_eq!(found(&bytes[..end]), kept, "cut at {end}");
        }
    }

    #[test]
    fn every_flipped_bit_of_the_header_is_refused() {
        let mut bytes = segment_prefix();
        for bit in 0..HEADER_BYTES * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(parse_segment(&bytes).is_err(), "bit {bit} of the header does not count");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn every_flipped_bit_of_an_entry_loses_that_entry_alone() {
        let mut bytes = segment_prefix();
        for bit in 0..5 * ENTRY_BYTES * 8 {
            let byte = PAGE_BYTES + bit / 8;
            bytes[byte] ^= 1 << (bit % 8);
            let mut wanted = entries();
            wanted.remove(bit / 8 / ENTRY_BYTES);
            assert_eq!(found(&bytes), wanted, "bit {bit} of the index");
            bytes[byte] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_misplaced_entry_is_not_believed() {
        let header = header();
        let entry = entries()[0];
        let right = entry.encode(&header, 4);
        let others = [
            (header, 5),
            (Header { segment: 13, ..header }, 4),
            (Header { store: StoreId([1; 16]), ..header }, 4),
        ];
        for (other, first) in others {
            let mut scan = IndexScan::default();
            parse_segment_index(&other, first, &right, &mut scan);
            assert_eq!((scan.entries.len(), scan.broken), (0, 1));
        }
        let mut scan = IndexScan::default();
        parse_segment_index(&Header { generation: header.generation + 1, ..header }, 4, &right, &mut scan);
        assert_eq!((scan.entries.len(), scan.stale), (0, 1), "an earlier life is told from damage");
    }

    #[test]
    fn geometries_leave_room_for_data() {
        let default = Geometry::new(256 << 20, 64 << 10).unwrap();
        assert_eq!(default.index_pages(), 64);
        assert!(u64::from(default.data_pages()) * PAGE_BYTES as u64 > 255 << 20);
        assert_eq!(Geometry::new(1 << 19, 4096), None, "too small");
        assert_eq!(Geometry::new(1 << 37, 4096), None, "more pages than a location can name");
        assert_eq!(Geometry::from_parts(1 << 20, 255), None, "all index");
        for block in [0, 1, 64, 4096, u32::MAX] {
            for bytes in [1 << 20, (1 << 20) + 4097, 64 << 20] {
                if let Some(geometry) = Geometry::new(bytes, block) {
                    assert!(geometry.data_pages() > 0 && geometry.entries_max() > 0);
                }
            }
        }
    }

    #[test]
    fn names_go_there_and_back() {
        assert_eq!(file_name(12), "segment-00000012.kv");
        assert_eq!(number_of("segment-00000012.kv"), Some(12));
        for other in ["segment-12.kv", "segment-00000012.kv.aside-1", "segment-99999999.kv", "kvd.format", ""]
        {
            assert_eq!(number_of(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Header::parse(&bytes);
            let mut scan = IndexScan::default();
            parse_segment_index(&header(), 60, &bytes, &mut scan);
            prop_assert!(scan.entries.is_empty());
        }

        #[test]
        fn what_is_written_is_read(
            key: [u8; 16], checksum: u64, tag: u64, sequence: u64, expires_at: u32, page in 2u32..200,
            bytes in 0u32..100_000, priority in 0u8..3, index in 0u32..64,
        ) {
            let record = Record {
                key: BlockKey(key), checksum: Checksum(checksum), bytes, tag: BindingTag(tag),
                priority: Priority::from_bits(priority), expires_at,
            };
            let entry = Entry::Stored { sequence, record, page };
            let mut scan = IndexScan::default();
            parse_segment_index(&header(), index, &entry.encode(&header(), index), &mut scan);
            prop_assert_eq!(scan.entries, vec![(index, entry)]);
        }
    }
}
