//! What the two ends of a queue pair must know of each other, as bytes for the control connection.
//!
//! ```text
//!  0 magic "kvRC" | 4 version | 5 oldest version that can read this | 6 role: 1 reader, 2 owner | 7 link layer
//!  8 queue pair 4 | 12 first packet 4 | 16 gid 16 | 32 lid 2 | 34 mtu, as the verbs count it
//! 35 reads it answers at once | 36 reads it asks at once | 37 zero 3
//! ```
//! Little endian; what follows the fields of a version belongs to a later one and is not looked at. The bytes come
//! from another machine, so every field has a range, and what is out of it is an error that says so. They give
//! nobody access to memory: that takes a window's key, which only a grant carries.

use std::net::Ipv6Addr;

/// Bytes of this version.
pub const WORDS_BYTES: usize = 40;
/// Most bytes that are looked at.
pub const WORDS_BYTES_MAX: usize = 256;
const MAGIC: [u8; 4] = *b"kvRC";
const VERSION: u8 = 1;

/// Which end of a path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Role {
    /// It reads the peer's blocks. Its own memory cannot be reached.
    Reader = 1,
    /// It lets the peer read.
    Owner = 2,
}

/// What carries the packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum LinkLayer {
    /// InfiniBand: addressed by LID within a subnet.
    InfiniBand = 1,
    /// RoCE v2: UDP over IP, addressed by GID.
    Ethernet = 2,
}

/// One end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Words {
    /// Which.
    pub role: Role,
    /// What it is attached to.
    pub link_layer: LinkLayer,
    /// Its queue pair, 24 bits.
    pub queue_pair: u32,
    /// Number of the first packet that it sends, 24 bits.
    pub first_packet: u32,
    /// Its address.
    pub gid: [u8; 16],
    /// Its address within an InfiniBand subnet; 0 on Ethernet.
    pub lid: u16,
    /// Longest payload of a packet: 1 to 5 for 256 to 4096 bytes.
    pub mtu: u8,
    /// Reads that its device answers at once.
    pub reads_answered: u8,
    /// Reads that its device has under way at once.
    pub reads_asked: u8,
}

/// Why bytes are no words.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WordsError {
    /// Not of a sensible length.
    #[error("{bytes} bytes, and there should be {WORDS_BYTES} to {WORDS_BYTES_MAX}")]
    Length {
        /// How many there are.
        bytes: usize,
    },
    /// Of something else.
    #[error("these are no words of a queue pair")]
    Magic,
    /// Too new.
    #[error("version {oldest} is needed to read them, and this is version {VERSION}")]
    Version {
        /// Which could read them.
        oldest: u8,
    },
    /// A field is out of its range.
    #[error("{field} cannot be {value:#x}")]
    Field {
        /// Which.
        field: &'static str,
        /// What it is.
        value: u64,
    },
}

impl Words {
    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(WORDS_BYTES);
        bytes.extend(MAGIC);
        bytes.extend([VERSION, VERSION, self.role as u8, self.link_layer as u8]);
        bytes.extend(self.queue_pair.to_le_bytes());
        bytes.extend(self.first_packet.to_le_bytes());
        bytes.extend(self.gid);
        bytes.extend(self.lid.to_le_bytes());
        bytes.extend([self.mtu, self.reads_answered, self.reads_asked, 0, 0, 0]);
        bytes
    }

    /// From bytes of anybody.
    pub fn decode(bytes: &[u8]) -> Result<Self, WordsError> {
        if !(WORDS_BYTES..=WORDS_BYTES_MAX).contains(&bytes.len()) {
            return Err(WordsError::Length { bytes: bytes.len() });
        }
        if bytes[..4] != MAGIC {
            return Err(WordsError::Magic);
        }
        if bytes[5] > VERSION {
            return Err(WordsError::Version { oldest: bytes[5] });
        }
        let long = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let bad = |field, value| Err(WordsError::Field { field, value });
        let role = match bytes[6] {
            1 => Role::Reader,
            2 => Role::Owner,
            other => return bad("a role", other.into()),
        };
        let link_layer = match bytes[7] {
            1 => LinkLayer::InfiniBand,
            2 => LinkLayer::Ethernet,
            other => return bad("a link layer", other.into()),
        };
        let mut gid = [0; 16];
        gid.copy_from_slice(&bytes[16..32]);
        let words = Self {
            role,
            link_layer,
            queue_pair: long(8),
            first_packet: long(12),
            gid,
            lid: u16::from_le_bytes([bytes[32], bytes[33]]),
            mtu: bytes[34],
            reads_answered: bytes[35],
            reads_asked: bytes[36],
        };
        // 0 and 1 are the subnet's own queue pairs.
        if !(2..1 << 24).contains(&words.queue_pair) {
            return bad("a queue pair", words.queue_pair.into());
        }
        if words.first_packet >= 1 << 24 {
            return bad("a packet number", words.first_packet.into());
        }
        if !(1..=5).contains(&words.mtu) {
            return bad("an mtu", words.mtu.into());
        }
        let address = Ipv6Addr::from(gid);
        let mapped = address.to_ipv4_mapped();
        let multicast = address.is_multicast() || mapped.is_some_and(|four| four.is_multicast());
        let nobody = address.is_unspecified() || mapped.is_some_and(|four| four.is_unspecified());
        if multicast || nobody {
            return bad("the first byte of a gid", gid[0].into());
        }
        // From 0xc000 on they are multicast.
        if link_layer == LinkLayer::InfiniBand && !(1..0xc000).contains(&words.lid) {
            return bad("a lid", words.lid.into());
        }
        if words.reads_answered == 0 && role == Role::Owner {
            return bad("the reads that an owner answers", 0);
        }
        Ok(words)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words() -> Words {
        let gid = std::net::Ipv4Addr::new(10, 77, 0, 1).to_ipv6_mapped().octets();
        Words {
            role: Role::Owner,
            link_layer: LinkLayer::Ethernet,
            queue_pair: 0x11,
            first_packet: 0xab_cdef,
            gid,
            lid: 0,
            mtu: 5,
            reads_answered: 16,
            reads_asked: 8,
        }
    }

    #[test]
    fn words_have_these_bytes() {
        let golden = "6b7652430101020211000000efcdab0000000000000000000000ffff0a4d00010000051008000000";
        let hex: String = words().encode().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, golden);
        assert_eq!(Words::decode(&words().encode()), Ok(words()));
        let mut later = words().encode();
        later[4] = 9;
        later.extend([7; 20]);
        assert_eq!(Words::decode(&later), Ok(words()), "a later version that this one can read");
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        let refused = |at: usize, value: u8| {
            let mut bytes = words().encode();
            bytes[at] = value;
            Words::decode(&bytes).unwrap_err().to_string()
        };
        assert_eq!(refused(0, 0), "these are no words of a queue pair");
        assert_eq!(refused(5, 2), "version 2 is needed to read them, and this is version 1");
        assert_eq!(refused(6, 3), "a role cannot be 0x3");
        assert_eq!(refused(7, 0), "a link layer cannot be 0x0");
        assert_eq!(refused(8, 1), "a queue pair cannot be 0x1");
        assert_eq!(refused(11, 1), "a queue pair cannot be 0x1000011");
        assert_eq!(refused(15, 0xff), "a packet number cannot be 0xffabcdef");
        assert_eq!(refused(16, 0xff), "the first byte of a gid cannot be 0xff");
        assert_eq!(refused(34, 6), "an mtu cannot be 0x6");
        assert_eq!(refused(35, 0), "the reads that an owner answers cannot be 0x0");
        assert_eq!(refused(7, 1), "a lid cannot be 0x0");
        let long = Words::decode(&[0; 257]).unwrap_err().to_string();
        assert_eq!(long, "257 bytes, and there should be 40 to 256");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Any bytes are answered, and what is taken comes out again as it went in.
        #[test]
        fn any_bytes_are_answered(tail in prop::collection::vec(any::<u8>(), 0..300), head: bool) {
            let mut bytes = if head { words().encode()[..6].to_vec() } else { Vec::new() };
            bytes.extend(tail);
            if let Ok(words) = Words::decode(&bytes) {
                prop_assert_eq!(Words::decode(&words.encode()), Ok(words));
            }
        }
    }
}
