//! Messages of the handshake on the worker socket.
#![no_main]

use kv_shm::door::Message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(message) = Message::decode(data) {
        assert_eq!(message.encode(), data, "every byte is accounted for");
    }
});
