//! `kvd.format`, the identity of a data directory, and the names of segment files.
#![no_main]

use kv_ssd::format::Format;
use kv_ssd::segment::{file_name, number_of};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(format) = Format::parse(data) {
        assert_eq!(format.encode().as_bytes(), data, "one text for one meaning");
    }
    // With its checksum mended.
    if let Ok(text) = std::str::from_utf8(data) {
        let crc = crc32fast::hash(data);
        if let Ok(format) = Format::parse(format!("{text}crc {crc:08x}\n").as_bytes()) {
            assert_eq!(Format::parse(format.encode().as_bytes()), Ok(format));
        }
        if let Some(number) = number_of(text) {
            assert_eq!(file_name(number), text);
        }
    }
});
