//! `bindings.json`, the registry that outlives the daemon.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for kept in kvd::registry::parse(bytes).bindings {
        let _ = kept.scope.validate();
        let _ = kept.scope.id();
    }
});
