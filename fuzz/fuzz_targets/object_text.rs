//! Manifests and rounds of the object tier, and the names of objects.
#![no_main]

use kv_object::collect::Round;
use kv_object::manifest::{Manifest, ManifestName};
use kv_object::pack::PackId;
use kv_object::store::is_name;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check(data);
    // With its checksum mended.
    let mut mended = data.to_vec();
    mended.extend(format!("crc {:08x}\n", crc32fast::hash(data)).bytes());
    check(&mended);
});

/// What is believed is the one text of what it says.
fn check(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(bytes) {
        assert_eq!(manifest.encode().as_bytes(), bytes);
        assert!(is_name(&manifest.name.object()));
        assert!(manifest.packs.iter().all(|pack| manifest.uses(&pack.id)));
    }
    if let Ok(round) = Round::parse(bytes) {
        assert_eq!(round.encode().as_bytes(), bytes);
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Some(name) = ManifestName::parse(text) {
        assert_eq!(name.object(), text);
    }
    if let Some(number) = Round::number_of(text) {
        assert_eq!(Round::object(number), text);
    }
    if let Ok(id) = text.parse::<PackId>() {
        assert_eq!(id.to_string(), text);
    }
}
