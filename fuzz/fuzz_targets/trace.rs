//! A request trace, as `kv-local` replays it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match kv_local::trace::parse(text) {
        Ok(requests) => assert!(requests.len() <= text.lines().count()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
