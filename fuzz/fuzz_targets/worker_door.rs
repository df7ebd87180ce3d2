//! Messages of the handshake on the worker socket.
#![no_main]

use kv_shm::door::Message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(message) = Message::decode(data) {
        // Not the same bytes: a code that we do not know is read as one that we do.
        let again = Message::decode(&message.encode()).expect("what we write we can read");
        assert_eq!(again, message);
    }
});
