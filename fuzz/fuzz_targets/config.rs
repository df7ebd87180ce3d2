//! A configuration file.
#![no_main]

use kvd::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match Config::parse(text) {
        Ok(loaded) => {
            let printed = loaded.print_effective(false);
            match Config::parse(&printed) {
                Ok(again) => assert_eq!(again.config, loaded.config, "{printed}"),
                Err(error) => panic!("what is printed is refused: {error}\n{printed}"),
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
