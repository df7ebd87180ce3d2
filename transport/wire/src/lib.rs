//! What two nodes say to each other: messages, frames, versions. No I/O.
//!
//! ```text
//!   message.rs   what is said, and by whom
//!   kind.rs      the number of each message, and how long it may be
//!   frame.rs     what stands in front of every message: one header, checked before anything is believed
//!   codec.rs     how each message lies in bytes behind it
//! ```
//! Whoever reads from a socket reads [`frame::HEADER_BYTES`], parses them, reads as many bytes more as the header
//! says, and decodes:
//!
//! ```
//! use kv_wire::frame::{HEADER_BYTES, Header, Message};
//! use kv_wire::message::Ask;
//!
//! let mut sent = Vec::new();
//! Ask::Ping(7).encode(&mut sent);
//!
//! let (header, body) = sent.split_first_chunk::<HEADER_BYTES>().unwrap();
//! let header = Header::parse(header)?;
//! assert_eq!(header.body_bytes as usize, body.len());
//! assert_eq!(Ask::decode(&header, body)?, Ask::Ping(7));
//! # Ok::<(), kv_wire::frame::WireError>(())
//! ```

mod codec;
pub mod frame;
pub mod kind;
pub mod message;
