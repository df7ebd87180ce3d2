//! What two nodes say to each other: messages, frames, versions. No I/O.
//!
//! ```text
//!   message.rs   what is said, and by whom
//!   frame.rs     how a message lies in bytes: one header, one body, checked before anything is believed
//! ```

pub mod frame;
pub mod message;
