//! Header and index of a segment file.
//!
//! Random bytes hardly ever pass a checksum, so the input is read twice: as it is, and with the magic and
//! every checksum mended, which is what damage that a checksum does not catch would look like.
#![no_main]

use kv_ssd::segment::{
    ENTRY_BYTES, Entry, HEADER_BYTES, IndexScan, PAGE_BYTES, parse_segment, parse_segment_index,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check(data);
    if data.len() >= HEADER_BYTES {
        check(&mended(data));
    }
});

/// Whatever is believed says the same when it is written again.
fn check(bytes: &[u8]) {
    let Ok((header, scan)) = parse_segment(bytes) else { return };
    assert!(
        scan.entries.len() as u32 + scan.empty + scan.stale + scan.broken <= header.geometry.entries_max()
    );
    for (index, entry) in &scan.entries {
        let mut again = IndexScan::default();
        parse_segment_index(&header, *index, &entry.encode(&header, *index), &mut again);
        assert_eq!(again.entries, [(*index, *entry)]);
        if let Entry::Stored { record, page, .. } = entry {
            assert!(header.geometry.holds(*page, record.bytes), "a block outside the data of its segment");
        }
    }
}

/// The first bytes are the header, the rest are entries, spread to where they belong.
fn mended(data: &[u8]) -> Vec<u8> {
    let (header, rest) = data.split_at(HEADER_BYTES);
    let mut bytes = header.to_vec();
    bytes[..12].copy_from_slice(b"KVDSEGM1\x01\0\0\0");
    // Sizes that make sense more often than not: 1 MiB times something, few pages of index.
    if header[60] & 1 == 0 {
        let segment_bytes = u64::from(header[48] % 8 + 1) << 20;
        bytes[48..56].copy_from_slice(&segment_bytes.to_le_bytes());
        bytes[56..60].copy_from_slice(&u32::from(header[56] % 4 + 1).to_le_bytes());
    }
    let crc = crc32fast::hash(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    let mut seed = crc32fast::Hasher::new();
    seed.update(&bytes[16..32]);
    seed.update(&bytes[12..16]);
    let seed = seed.finalize();
    bytes.resize(PAGE_BYTES, 0);
    for (index, piece) in rest.chunks_exact(ENTRY_BYTES).enumerate() {
        let mut entry = piece.to_vec();
        // An entry of this life, unless the input insists.
        if piece[63] & 1 == 0 {
            let generation: [u8; 4] = bytes[32..36].try_into().expect("four bytes");
            entry[52..56].copy_from_slice(&generation);
        }
        let mut covered = entry.clone();
        covered[60..].copy_from_slice(&(index as u32).to_le_bytes());
        let mut hasher = crc32fast::Hasher::new_with_initial(seed);
        hasher.update(&covered);
        entry[60..].copy_from_slice(&hasher.finalize().to_le_bytes());
        bytes.extend(entry);
    }
    bytes
}
