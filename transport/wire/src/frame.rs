//! How a message lies in bytes.

use crate::message::WantId;

/// Length of the header of every frame, in bytes.
pub const HEADER_BYTES: usize = 16;
/// Length of the frame in front of a block's bytes ([`crate::message::DataAnswer::Data`]), header included.
pub const DATA_FRAME_BYTES: usize = 32;
/// Longest body of a frame, in bytes; a block's bytes are not part of it.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Most wants, reads, keys or grants in one message. Whoever has more sends several.
pub const ITEMS_MAX: usize = 4096;
/// The only version there is.
pub const VERSION: u16 = 1;
/// Oldest and newest version spoken here.
pub const VERSIONS: (u16, u16) = (VERSION, VERSION);

/// Why bytes are no message.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// It does not begin like a frame of ours.
    #[error("this is no frame of kvd: it begins with {found:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 4],
    },
    /// The body would be longer than any message.
    #[error("a body of {bytes} bytes, {max} is the most")]
    TooLong {
        /// What the header says.
        bytes: u32,
        /// The most.
        max: usize,
    },
    /// Header or body are not what was sent.
    #[error("the frame fails its checksum")]
    Checksum,
    /// A kind that this side does not expect here.
    #[error("kind {kind} is not expected here")]
    Kind {
        /// Its number.
        kind: u8,
    },
    /// A field that cannot be.
    #[error("field `{field}` cannot be so")]
    Field {
        /// Which.
        field: &'static str,
    },
    /// Bytes are missing or left over.
    #[error("{what} in a message of kind {kind}")]
    Length {
        /// `bytes missing` or `bytes left over`.
        what: &'static str,
        /// Its kind.
        kind: u8,
    },
    /// A want that is numbered twice.
    #[error("want {} is numbered twice", want.0)]
    Twice {
        /// Its number.
        want: WantId,
    },
}
