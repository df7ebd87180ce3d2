//! Entries of the two rings, which the other side may overwrite at any time.
#![no_main]

use kv_shm::entry::{ENTRY_BYTES, Entry};
use kv_shm::{Completion, Submission};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for piece in data.chunks(ENTRY_BYTES) {
        let mut entry: Entry = [0; ENTRY_BYTES];
        entry[..piece.len()].copy_from_slice(piece);
        match Submission::decode(&entry) {
            Ok(submission) => assert_eq!(submission.encode(), entry, "one entry for one meaning"),
            Err(refused) => assert_eq!(refused.id.to_le_bytes(), entry[..8], "answered by its id"),
        }
        if let Ok(completion) = Completion::decode(&entry) {
            assert_eq!(completion.encode(), entry, "one entry for one meaning");
        }
    }
});
