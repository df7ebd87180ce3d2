//! What stands in front of every message.
//!
//! ```text
//!  0        4      5       8            12        16
//! +--------+------+-------+------------+---------+------ - - -
//! | "KVDP" | kind | zero  | body bytes | crc-32  | body
//! +--------+------+-------+------------+---------+------ - - -
//!    4 B     u8     3 B       u32          u32     `codec.rs`
//!
//! on a data connection, behind a Data frame:
//! +--------------------------+--------------------------------- - - -
//! | header 16 B | body 16 B  | the block, raw, as many bytes as Data says
//! +--------------------------+--------------------------------- - - -
//! ```
//! Little-endian. The CRC-32 (the one of zlib) is over bytes 0 to 12 and the body. It finds what cables and bugs
//! do, and not what an attacker does; TLS is against those. A block has a checksum of its own.
//!
//! **Bounds before belief.** The header is parsed before any byte of the body is read, and a body is never longer
//! than the longest message of its kind ([`crate::kind::body_bytes_max`]). Whoever takes the first frame of a connection
//! compares the kind of its header with Hello and Join; then a stranger makes nobody allocate more than
//! [`GREETING_BYTES_MAX`]. Items of a batch have a fixed length, so the body's length is their count.
//!
//! **Frozen for all versions:** this header, the messages Hello and Refused with their limits, and that the version
//! is the first thing in a Welcome. Whatever two versions think of each other, they can say so. Hello and Welcome
//! may grow at their end, and who does not know what stands there passes over it; everything else is exactly as long
//! as it must be. A refusal that a later version adds is said only to readers that offered that version.

use crate::kind;
use crate::message::WantId;

/// Length of the header of every frame, in bytes.
pub const HEADER_BYTES: usize = 16;
/// Length of the frame in front of a block's bytes ([`crate::message::DataAnswer::Data`]), header included.
pub const DATA_FRAME_BYTES: usize = 32;
/// Longest body of a frame, in bytes; a block's bytes are not part of it.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Longest body of a Hello or a Welcome, with whatever later versions add: all that a stranger may send.
pub const GREETING_BYTES_MAX: usize = 16 << 10;
/// Most wants, reads, keys or grants in one message. Whoever has more sends several.
pub const ITEMS_MAX: usize = 4096;
/// Most principals in a [`crate::message::Hello`].
pub const PRINCIPALS_MAX: usize = 64;
/// Longest name of a node or principal, in bytes.
pub const NAME_BYTES_MAX: usize = 63;
/// Longest text of a [`crate::message::Refused`], in bytes.
pub const TEXT_BYTES_MAX: usize = 512;
/// Longest [`crate::message::Offer::binding`], in bytes.
pub const BINDING_BYTES_MAX: usize = 4096;
/// Longest [`crate::message::Hello::facts`], in bytes.
pub const FACTS_BYTES_MAX: usize = 4096;
/// Longest [`crate::message::PathEnd::words`].
pub const WORDS_BYTES_MAX: usize = 256;
/// The only version there is.
pub const VERSION: u16 = 1;
/// Oldest and newest version spoken here.
pub const VERSIONS: (u16, u16) = (VERSION, VERSION);

const MAGIC: [u8; 4] = *b"KVDP";

/// Why bytes are no message.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// It does not begin like a frame of ours.
    #[error("this is no frame of kvd: it begins with {found:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 4],
    },
    /// The body would be longer than any message of its kind.
    #[error("a body of {bytes} bytes, {max} is the most")]
    TooLong {
        /// What the header says, or its items come to.
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

impl WireError {
    pub(crate) fn missing(kind: u8) -> Self {
        Self::Length { what: "bytes missing", kind }
    }

    pub(crate) fn left_over(kind: u8) -> Self {
        Self::Length { what: "bytes left over", kind }
    }
}

/// What the first bytes of a frame say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Number of the message, see [`crate::kind`].
    pub kind: u8,
    /// Length of the body that follows; never longer than a message of this kind can be.
    pub body_bytes: u32,
    crc: u32,
}

impl Header {
    /// Reads a header. A magic, kind or length that cannot be is refused here, before the body is read or given
    /// memory; the checksum is compared when both are there ([`Message::decode`]).
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let [m0, m1, m2, m3, kind, zero @ ..] = *bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(WireError::Magic { found: [m0, m1, m2, m3] });
        }
        let max = kind::body_bytes_max(kind).ok_or(WireError::Kind { kind })?;
        if zero[..3] != [0; 3] {
            return Err(WireError::Field { field: "reserved" });
        }
        let header = Self { kind, body_bytes: word(8), crc: word(12) };
        if header.body_bytes as usize > max {
            return Err(WireError::TooLong { bytes: header.body_bytes, max });
        }
        Ok(header)
    }

    /// Whether `body` is what was sent behind this header.
    pub(crate) fn check(&self, body: &[u8]) -> Result<(), WireError> {
        match body.len().cmp(&(self.body_bytes as usize)) {
            std::cmp::Ordering::Less => Err(WireError::missing(self.kind)),
            std::cmp::Ordering::Greater => Err(WireError::left_over(self.kind)),
            std::cmp::Ordering::Equal if crc(&front(self.kind, self.body_bytes), body) != self.crc => {
                Err(WireError::Checksum)
            }
            std::cmp::Ordering::Equal => Ok(()),
        }
    }
}

/// A message, or one of several that are said at the same place.
pub trait Message: Sized {
    /// Appends exactly one whole frame.
    ///
    /// Whoever makes a message keeps its bounds; a debug build asserts them. A release build goes on, and what cannot
    /// be said is never said as something else: of too many items or principals the first ones are sent; a text is
    /// cut between two characters, with spaces for control characters; a name that is none, a binding or words that
    /// are too long are sent empty, and a window on path 0 is none. An empty name and a description of path 0 are
    /// refused by the other side, by their field.
    fn encode(&self, out: &mut Vec<u8>);

    /// Reads the message behind `header`. Its body must be all there; nothing is allocated before it has passed its
    /// checksum, and then once for each list and text: 4,096 wants are one allocation.
    fn decode(header: &Header, body: &[u8]) -> Result<Self, WireError>;
}

/// The version to speak with somebody who speaks from `theirs.0` to `theirs.1`: the highest that both do.
pub fn negotiate(theirs: (u16, u16)) -> Option<u16> {
    highest_common(VERSIONS, theirs)
}

fn highest_common(ours: (u16, u16), theirs: (u16, u16)) -> Option<u16> {
    let (oldest, newest) = (ours.0.max(theirs.0), ours.1.min(theirs.1));
    (oldest <= newest).then_some(newest)
}

/// Whether a node or a principal may be called so: 1 to 63 of the characters a-z, A-Z, 0-9, `.`, `_` and `-`.
pub fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(plain)
}

/// Appends a frame of this kind around what `body` appends.
pub(crate) fn put_frame(out: &mut Vec<u8>, kind: u8, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend([0; HEADER_BYTES]);
    body(out);
    let (header, body) = out[start..].split_at_mut(HEADER_BYTES);
    // The bounds of every message hold its body below `BODY_BYTES_MAX`.
    let front = front(kind, body.len() as u32);
    header[..12].copy_from_slice(&front);
    header[12..].copy_from_slice(&crc(&front, body).to_le_bytes());
}

fn front(kind: u8, body_bytes: u32) -> [u8; 12] {
    let mut front = [0; 12];
    front[..4].copy_from_slice(&MAGIC);
    front[4] = kind;
    front[8..].copy_from_slice(&body_bytes.to_le_bytes());
    front
}

fn crc(front: &[u8; 12], body: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(front);
    crc.update(body);
    crc.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Answer, Ask};

    fn header(kind: u8, body_bytes: u32) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..12].copy_from_slice(&front(kind, body_bytes));
        header
    }

    #[test]
    fn a_header_that_cannot_be_is_refused_before_its_body() {
        let mut other = header(kind::PING, 8);
        other[..4].copy_from_slice(b"GET ");
        assert_eq!(Header::parse(&other), Err(WireError::Magic { found: *b"GET " }));
        assert_eq!(Header::parse(&header(0, 0)), Err(WireError::Kind { kind: 0 }));
        assert_eq!(Header::parse(&header(0x1b, 0)), Err(WireError::Kind { kind: 0x1b }));
        for at in 5..8 {
            let mut reserved = header(kind::PING, 8);
            reserved[at] = 1;
            assert_eq!(Header::parse(&reserved), Err(WireError::Field { field: "reserved" }));
        }
    }

    #[test]
    fn a_body_is_as_long_as_the_longest_of_its_kind_at_most() {
        let mut kinds = 0;
        for kind in 0..=u8::MAX {
            let Some(max) = kind::body_bytes_max(kind) else { continue };
            kinds += 1;
            assert!(max <= BODY_BYTES_MAX, "kind {kind:#x}");
            assert_eq!(Header::parse(&header(kind, max as u32)).unwrap().body_bytes as usize, max);
            for bytes in [max as u32 + 1, BODY_BYTES_MAX as u32 + 1, u32::MAX] {
                assert_eq!(Header::parse(&header(kind, bytes)), Err(WireError::TooLong { bytes, max }));
            }
        }
        assert_eq!(kinds, 23);
    }

    #[test]
    fn a_body_of_another_length_or_content_is_refused() {
        let mut sent = Vec::new();
        Ask::Ping(7).encode(&mut sent);
        let (head, body) = sent.split_first_chunk().unwrap();
        let head = Header::parse(head).unwrap();
        let wrong = |body: &[u8]| Ask::decode(&head, body).unwrap_err();
        assert_eq!(wrong(&body[..7]), WireError::missing(kind::PING));
        assert_eq!(wrong(&[body, &[0]].concat()), WireError::left_over(kind::PING));
        assert_eq!(wrong(&[0; 8]), WireError::Checksum);
        assert_eq!(Answer::decode(&head, body), Err(WireError::Kind { kind: kind::PING }));
    }

    #[test]
    fn the_highest_version_that_both_speak_is_spoken() {
        assert_eq!(negotiate((1, 1)), Some(1));
        assert_eq!(negotiate((1, u16::MAX)), Some(1));
        assert_eq!(negotiate((2, 7)), None);
        for (ours, theirs, spoken) in [
            ((1, 3), (1, 3), Some(3)),
            ((1, 3), (2, 5), Some(3)),
            ((2, 5), (1, 3), Some(3)),
            ((1, 5), (2, 3), Some(3)),
            ((1, 2), (3, 4), None),
            ((3, 4), (1, 2), None),
            ((1, 4), (4, 1), None),
        ] {
            assert_eq!(highest_common(ours, theirs), spoken, "{ours:?} and {theirs:?}");
        }
    }

    #[test]
    fn names_are_short_and_plain() {
        let longest = "n".repeat(NAME_BYTES_MAX);
        for name in ["a", "gpu-07", "GPU_7.rack.example", &longest] {
            assert!(is_name(name), "{name}");
        }
        for text in ["", "a b", "a/b", "é", "a\n", &"n".repeat(NAME_BYTES_MAX + 1)] {
            assert!(!is_name(text), "{text}");
        }
    }
}
