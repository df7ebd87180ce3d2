//! The tail of a pack.
//!
//! Random bytes never pass a digest, so the input is read twice: as it is, and as a footer whose name, magic, version
//! and trailer are right, which is what another program could write under the name that it has.
#![no_main]

use kv_object::pack::{FOOTER_BYTES_MAX, HEADER_BYTES, PackId, TRAILER_BYTES, Tail, parse, parse_tail};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for pack_bytes in [data.len() as u64, data.len() as u64 + 1000] {
        assert!(
            !matches!(parse_tail(&PackId([0; 32]), pack_bytes, data), Ok(Tail::Whole(_))),
            "no digest is zero"
        );
    }
    let mut footer = data.to_vec();
    if let Some(fixed) = footer.get_mut(..16) {
        fixed[..12].copy_from_slice(b"KVDFOOT1\x01\0\0\0");
        // Mostly not encrypted, or nothing behind it is looked at.
        fixed[12] &= 1;
        fixed[13..].fill(0);
    }
    check(&footer);
});

/// Whatever is believed lies within the pack and says the same when it is written again.
fn check(footer: &[u8]) {
    let id = PackId(*blake3::hash(footer).as_bytes());
    let data_end =
        footer.get(32..40).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
    let pack_bytes = data_end.wrapping_add((footer.len() + TRAILER_BYTES) as u64);
    let mut tail = footer.to_vec();
    tail.extend(b"KVDTAIL1\x01\0\0\0");
    tail.extend((footer.len() as u32).to_le_bytes());
    tail.extend(pack_bytes.to_le_bytes());
    tail.extend([0; 4]);
    let crc = crc32fast::hash(&tail[footer.len()..]);
    tail.extend(crc.to_le_bytes());
    assert!(footer.len() < FOOTER_BYTES_MAX);
    let Ok(Tail::Whole(parsed)) = parse_tail(&id, pack_bytes, &tail) else { return };
    assert_eq!(parsed.encode().expect("it was encoded once"), footer, "one text for one meaning");
    let mut end = HEADER_BYTES as u64;
    for entry in &parsed.entries {
        assert_eq!(entry.range().start, end, "a block that is not behind the one before it");
        end = entry.range().end;
    }
    assert_eq!(end, parsed.data_end());
    assert!(end + tail.len() as u64 == pack_bytes, "blocks and footer overlap");
    // As a whole pack with blocks of nothing: no block matches, and nothing panics.
    if pack_bytes < 1 << 20 {
        let mut whole = vec![0; end as usize];
        whole.extend(tail);
        assert!(parse(&id, &whole).is_err(), "a header of zeros");
    }
}
