//! `bindings.json`, the registry that outlives the daemon.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(bindings) = kvd::registry::parse(text) {
        for kept in bindings {
            let _ = kept.scope.validate();
            let _ = kept.scope.id();
        }
    }
});
