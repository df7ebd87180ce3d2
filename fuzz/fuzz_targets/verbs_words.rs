//! What a peer says of its end of an RDMA path.
#![no_main]

use kv_verbs::words::{WORDS_BYTES, WORDS_BYTES_MAX, Words};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(words) = Words::decode(data) else { return };
    assert!((WORDS_BYTES..=WORDS_BYTES_MAX).contains(&data.len()));
    assert!(words.queue_pair < 1 << 24 && words.first_packet < 1 << 24, "wider than the wire");
    assert_eq!(Words::decode(&words.encode()), Ok(words), "one meaning");
});
