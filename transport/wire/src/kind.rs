//! The number of each message, and how long it may be.
//!
//! ```text
//!   0x0_   reader, control connection        0x2_   reader, data connection
//!   0x1_   owner, control connection         0x3_   owner, data connection
//! ```
//! The first frame on a connection says by its number which of the two it is: [`HELLO`] or [`JOIN`]. Only
//! [`REFUSED`] is said on both. A number is never given to another message, in any version.

use kv_block::{BlockKey, MissReason};

use crate::codec::Item;
use crate::frame::{BINDING_BYTES_MAX, GREETING_BYTES_MAX, ITEMS_MAX, TEXT_BYTES_MAX, WORDS_BYTES_MAX};
use crate::message::{Grant, ReadId, Sight, Want, WantId};

/// [`crate::message::Ask::Hello`].
pub const HELLO: u8 = 0x01;
/// [`crate::message::Ask::Want`].
pub const WANT: u8 = 0x02;
/// [`crate::message::Ask::Done`].
pub const DONE: u8 = 0x03;
/// [`crate::message::Ask::Probe`].
pub const PROBE: u8 = 0x04;
/// [`crate::message::Ask::Offer`].
pub const OFFER: u8 = 0x05;
/// [`crate::message::Ask::Path`].
pub const READER_PATH: u8 = 0x06;
/// [`crate::message::Ask::Ping`].
pub const PING: u8 = 0x07;

/// [`crate::message::Answer::Welcome`].
pub const WELCOME: u8 = 0x10;
/// [`crate::message::Answer::Refused`] and [`crate::message::DataAnswer::Refused`].
pub const REFUSED: u8 = 0x11;
/// [`crate::message::Answer::Granted`].
pub const GRANTED: u8 = 0x12;
/// [`crate::message::Answer::Missed`].
pub const MISSED: u8 = 0x13;
/// [`crate::message::Answer::Found`].
pub const FOUND: u8 = 0x14;
/// [`crate::message::Answer::Taken`].
pub const TAKEN: u8 = 0x15;
/// [`crate::message::Answer::Path`].
pub const OWNER_PATH: u8 = 0x16;
/// [`crate::message::Answer::Pong`].
pub const PONG: u8 = 0x17;
/// [`crate::message::Answer::Credits`].
pub const CREDITS: u8 = 0x18;
/// [`crate::message::Answer::Leaving`].
pub const LEAVING: u8 = 0x19;
/// [`crate::message::Answer::Staying`].
pub const STAYING: u8 = 0x1a;

/// [`crate::message::DataAsk::Join`].
pub const JOIN: u8 = 0x20;
/// [`crate::message::DataAsk::Read`].
pub const READ: u8 = 0x21;

/// [`crate::message::DataAnswer::Joined`].
pub const JOINED: u8 = 0x30;
/// [`crate::message::DataAnswer::Data`].
pub const DATA: u8 = 0x31;
/// [`crate::message::DataAnswer::Gone`].
pub const GONE: u8 = 0x32;

/// Longest body of a message of this kind; `None` for a number that is no message.
pub fn body_bytes_max(kind: u8) -> Option<usize> {
    Some(match kind {
        HELLO | WELCOME => GREETING_BYTES_MAX,
        WANT => ITEMS_MAX * Want::BYTES,
        DONE => ITEMS_MAX * WantId::BYTES,
        PROBE => 9 + ITEMS_MAX * BlockKey::BYTES,
        OFFER => 11 + BINDING_BYTES_MAX + ITEMS_MAX * BlockKey::BYTES,
        READER_PATH | OWNER_PATH => 1 + WORDS_BYTES_MAX,
        PING | PONG => 8,
        REFUSED => 1 + TEXT_BYTES_MAX,
        GRANTED => ITEMS_MAX * Grant::BYTES,
        MISSED => ITEMS_MAX * <(WantId, MissReason)>::BYTES,
        FOUND => 8 + ITEMS_MAX * Sight::BYTES,
        TAKEN | JOIN | DATA | GONE => 16,
        CREDITS => 12,
        LEAVING | STAYING | JOINED => 0,
        READ => ITEMS_MAX * <(ReadId, WantId)>::BYTES,
        _ => return None,
    })
}
