//! Newtypes for everything that is counted or named, so that an index is never taken for a length and a
//! lease never for a session.

use std::fmt;
use std::str::FromStr;

/// Why a textual id was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParseIdError {
    /// The text is not an even number of hex digits.
    #[error("`{text}` is not hexadecimal")]
    NotHex {
        /// What was given.
        text: String,
    },
    /// The text has the wrong number of hex digits.
    #[error("{found} hex digits given, {wanted} wanted")]
    Length {
        /// Digits given.
        found: usize,
        /// Digits wanted, in words because a sequence hash has a range.
        wanted: &'static str,
    },
}

fn parse_hex(text: &str) -> Result<Vec<u8>, ParseIdError> {
    let not_hex = || ParseIdError::NotHex { text: text.to_owned() };
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return Err(not_hex());
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| not_hex()))
        .collect()
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

macro_rules! hex_id {
    ($(#[$doc:meta])* $name:ident, $bytes:literal, $digits:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
        pub struct $name(pub [u8; $bytes]);

        impl $name {
            /// Length in bytes.
            pub const BYTES: usize = $bytes;

            /// The id in `bytes`, if there are exactly enough of them.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }

            /// The raw bytes.
            pub fn as_bytes(&self) -> &[u8; $bytes] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(f, &self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(f, &self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let bytes = parse_hex(text)?;
                Self::from_slice(&bytes).ok_or(ParseIdError::Length { found: text.len(), wanted: $digits })
            }
        }
    };
}

hex_id! {
    /// Names one block on every tier and every node: 128 bits of BLAKE3, keyed by the scope id, over the
    /// slice and the sequence hash ([`crate::name`]). Not guessable without the tenant's salt.
    BlockKey, 16, "32"
}
hex_id! {
    /// BLAKE3 of a canonical [`crate::Scope`] record.
    ScopeId, 32, "64"
}

impl BlockKey {
    /// The two little-endian halves, as they lie in shared memory and on disk.
    pub fn halves(&self) -> [u64; 2] {
        let half = |at: usize| u64::from_le_bytes(self.0[at..at + 8].try_into().expect("eight bytes"));
        [half(0), half(8)]
    }

    /// The key made of two little-endian halves.
    pub fn from_halves(halves: [u64; 2]) -> Self {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&halves[0].to_le_bytes());
        bytes[8..].copy_from_slice(&halves[1].to_le_bytes());
        Self(bytes)
    }
}

/// The engine's own name of a token prefix: 8 to 64 opaque bytes. Never trusted to be unguessable.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceHash {
    len: u8,
    bytes: [u8; 64],
}

impl SequenceHash {
    /// Fewest bytes accepted.
    pub const BYTES_MIN: usize = 8;
    /// Most bytes accepted.
    pub const BYTES_MAX: usize = 64;

    /// The hash in `bytes`; `None` unless there are 8 to 64 of them.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        if !(Self::BYTES_MIN..=Self::BYTES_MAX).contains(&bytes.len()) {
            return None;
        }
        let mut own = [0; 64];
        own[..bytes.len()].copy_from_slice(bytes);
        Some(Self { len: bytes.len() as u8, bytes: own })
    }

    /// The engine's bytes and, behind them, zeros.
    pub(crate) fn padded(&self) -> &[u8; Self::BYTES_MAX] {
        &self.bytes
    }

    /// The engine's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl From<u64> for SequenceHash {
    /// A 64-bit engine hash, little-endian.
    fn from(hash: u64) -> Self {
        Self::new(&hash.to_le_bytes()).expect("eight bytes")
    }
}

impl fmt::Display for SequenceHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, self.as_bytes())
    }
}

impl fmt::Debug for SequenceHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, self.as_bytes())
    }
}

impl FromStr for SequenceHash {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        Self::new(&parse_hex(text)?).ok_or(ParseIdError::Length { found: text.len(), wanted: "16 to 128" })
    }
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number_id! {
    /// One NUMA-bound loop of this node.
    ShardId(u16)
}
number_id! {
    /// A slot of a shard's host arena: region number and index within the region, packed by the arena.
    SlotId(u32)
}
number_id! {
    /// How often a slot changed owners. A reader holding an older generation holds nothing.
    Generation(u32)
}
number_id! {
    /// A registered (scope, slice, block length) of one shard; dense, valid for one daemon epoch.
    BindingId(u16)
}
number_id! {
    /// What a binding is called across restarts: the first eight bytes of BLAKE3 over scope id, slice and
    /// block length. Stands in slot headers and on disk.
    BindingTag(u64)
}
number_id! {
    /// One connected worker, or one gRPC session; never reused within an epoch.
    SessionId(u64)
}
number_id! {
    /// A session's right to read one block where it lies.
    LeaseId(u64)
}
number_id! {
    /// Fencing number of a daemon: grows at every start. What was promised under an older one is void.
    Epoch(u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_text_and_halves() {
        let key = BlockKey(*b"0123456789abcdef");
        assert_eq!(key.to_string().parse::<BlockKey>().unwrap(), key);
        assert_eq!(BlockKey::from_halves(key.halves()), key);
    }

    #[test]
    fn wrong_text_is_refused_with_the_reason() {
        assert_eq!("zz".repeat(16).parse::<BlockKey>(), Err(ParseIdError::NotHex { text: "zz".repeat(16) }));
        assert_eq!("00".parse::<BlockKey>(), Err(ParseIdError::Length { found: 2, wanted: "32" }));
        assert!("é0".parse::<BlockKey>().is_err(), "a multi-byte character must not split");
    }

    #[test]
    fn sequence_hashes_have_8_to_64_bytes() {
        assert!(SequenceHash::new(&[0; 7]).is_none());
        assert!(SequenceHash::new(&[0; 65]).is_none());
        assert_eq!(SequenceHash::new(&[7; 64]).unwrap().as_bytes(), [7; 64]);
        assert_ne!(SequenceHash::new(&[0; 8]), SequenceHash::new(&[0; 9]), "length is part of the name");
    }
}
