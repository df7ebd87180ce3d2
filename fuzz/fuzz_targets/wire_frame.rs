//! A frame of a peer: its header, then its body as a message of each of the four places.
//!
//! Random bytes hardly ever pass a checksum, so the input is read twice: as it is, and with magic, length and
//! checksum mended around whatever body it has.
#![no_main]

use std::fmt::Debug;

use kv_wire::frame::{HEADER_BYTES, Header, Message, WireError};
use kv_wire::kind;
use kv_wire::message::{Answer, Ask, DataAnswer, DataAsk};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some((header, body)) = data.split_first_chunk() {
        check(header, body);
        check(&mended(header, body), body);
    }
});

fn check(header: &[u8; HEADER_BYTES], body: &[u8]) {
    let Ok(header) = Header::parse(header) else { return };
    let max = kind::body_bytes_max(header.kind).expect("a kind that was believed");
    assert!(header.body_bytes as usize <= max, "a body longer than its message can be");
    check_as::<Ask>(&header, body);
    check_as::<Answer>(&header, body);
    check_as::<DataAsk>(&header, body);
    check_as::<DataAnswer>(&header, body);
}

/// Whatever is believed says the same when it is written again.
fn check_as<M: Message + PartialEq + Debug>(header: &Header, body: &[u8]) {
    let Ok(message) = M::decode(header, body) else { return };
    let mut again = Vec::new();
    message.encode(&mut again);
    assert_eq!(read::<M>(&again).as_ref(), Ok(&message));
    let (_, again) = again.split_at(HEADER_BYTES);
    // Behind a greeting stands what later versions add.
    let grows = matches!(header.kind, kind::HELLO | kind::WELCOME);
    assert!(if grows { body.starts_with(again) } else { body == again }, "one form for one message");
}

fn read<M: Message>(frame: &[u8]) -> Result<M, WireError> {
    let (header, body) = frame.split_first_chunk().expect("a header");
    M::decode(&Header::parse(header)?, body)
}

/// A sound header of the same kind around `body`.
fn mended(header: &[u8; HEADER_BYTES], body: &[u8]) -> [u8; HEADER_BYTES] {
    let mut mended = *header;
    mended[..4].copy_from_slice(b"KVDP");
    mended[5..8].fill(0);
    mended[8..12].copy_from_slice(&(body.len() as u32).to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&mended[..12]);
    crc.update(body);
    mended[12..].copy_from_slice(&crc.finalize().to_le_bytes());
    mended
}
