//! What a peer says about its devices: anything is heard, nothing makes more of it than there may be.
#![no_main]

use kvd::peers::facts::hear;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let facts = hear(bytes);
    assert!(facts.rdma.len() <= 16 && facts.host.len() <= 128);
    assert!(facts.rdma.iter().all(|device| !device.name.is_empty() && device.name.len() <= 128));
});
