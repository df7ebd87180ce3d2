//! The 64-byte entries of the two rings, as plain functions of plain bytes.
//!
//! All integers are little-endian; whatever an operation does not use is zero, and an entry where it is
//! not is refused, so that every bit can get a meaning later.
//! ```text
//! submission  0 id u64 | 8 op u8 | 9 version u8 | 10 flags u8 | 11 priority u8 | 12 deadline_us u32
//!            16 key 16 bytes | 32 first u64 | 40 second u64 | 48 bytes u32 | 52 ttl_s u32
//!            56 binding u16 | 58 offset u48
//!            put, reserve, acquire, prefetch: 32 after 16 bytes (zero: none), not first and second
//! completion  0 id u64 | 8 kind u8 | 9 version u8 | 10 flags u8 | 11 reason u8 | 12 code u16 | 14 zero
//!            16 first u64 | 24 slot u32 | 28 generation u32 | 32 retry_after_ms u32 | 36 zero
//! ```

use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Checksum, Generation, LeaseId, MissReason, Priority, SlotId};

/// Length of an entry in bytes.
pub const ENTRY_BYTES: usize = 64;
/// Version byte of every entry.
pub const ENTRY_VERSION: u8 = 2;

/// An entry as it lies in the ring.
pub type Entry = [u8; ENTRY_BYTES];

const DURABLE: u8 = 1;
const IN_PLACE: u8 = 2;
const WAIT: u8 = 4;
const ALREADY: u8 = 1;
/// Where offsets in entries end.
const OFFSET_END: u64 = 1 << 48;
/// Halves of the key that is none.
const NONE: [u64; 2] = [0; 2];

/// Why an entry was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ring entry {id}: {why}")]
pub struct Malformed {
    /// Id of the entry, to answer it.
    pub id: u64,
    /// What is wrong with it.
    pub why: &'static str,
}

/// One request of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submission {
    /// The worker's own number; comes back in the completion.
    pub id: u64,
    /// Microseconds from the moment the shard takes it; 0 means that it may not wait at all.
    pub deadline_us: u32,
    /// What is wanted.
    pub request: Request,
}

/// What a worker asks of a shard.
///
/// `after` is the block before this one in its prefix, where the worker knows it: a hint that nothing depends on. A
/// key of zeros is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Nothing: answers `Done`. Tells that the shard lives.
    Ping,
    /// Store a block from the staging area in one go.
    Put {
        /// Name.
        key: BlockKey,
        /// What it is stored under.
        binding: BindingId,
        /// Where its bytes begin in the staging area, below 2^48.
        offset: u64,
        /// Its length.
        bytes: u32,
        /// Retention class.
        priority: Priority,
        /// Seconds until it expires; 0 means never.
        ttl_s: u32,
        /// Answer only when it is on disk.
        durable: bool,
        /// The block before it.
        after: Option<BlockKey>,
    },
    /// Announce a block, and reserve room for it.
    Reserve {
        /// Name.
        key: BlockKey,
        /// What it is stored under.
        binding: BindingId,
        /// Retention class.
        priority: Priority,
        /// Seconds until it expires; 0 means never.
        ttl_s: u32,
        /// Whether the worker will write the arena slot itself; trusted workers only.
        in_place: bool,
        /// The block before it.
        after: Option<BlockKey>,
    },
    /// The reserved block's bytes lie in the staging area.
    Commit {
        /// Name.
        key: BlockKey,
        /// Where its bytes begin in the staging area.
        offset: u64,
        /// Its length.
        bytes: u32,
        /// Answer only when it is on disk.
        durable: bool,
    },
    /// The reserved block's bytes lie in the arena slot that the reservation named.
    CommitInPlace {
        /// Name.
        key: BlockKey,
        /// The slot of the reservation.
        slot: SlotId,
        /// Its generation.
        generation: Generation,
        /// Checksum of what the worker wrote.
        checksum: Checksum,
        /// Answer only when it is on disk.
        durable: bool,
    },
    /// Give a reservation up.
    Abort {
        /// Name.
        key: BlockKey,
    },
    /// Make a block readable and lease it: bring it up from disk, verify it, wait for it.
    Acquire {
        /// Name.
        key: BlockKey,
        /// Whether to wait for a block that is announced but has not arrived.
        wait: bool,
        /// The block before it.
        after: Option<BlockKey>,
    },
    /// Give a lease back.
    Release {
        /// Which lease.
        lease: LeaseId,
    },
    /// Bring a block up from disk when there is room; answers `Done` at once.
    Prefetch {
        /// Name.
        key: BlockKey,
        /// The block before it.
        after: Option<BlockKey>,
    },
}

/// The answer to one submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Id of the submission.
    pub id: u64,
    /// What became of it.
    pub outcome: Outcome,
}

/// A slot of the shard's host arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which slot.
    pub slot: SlotId,
    /// Its generation.
    pub generation: Generation,
    /// Offset of its first byte in the arena.
    pub offset: u64,
}

/// How a submission ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing more to say.
    Done,
    /// The block is stored.
    Stored {
        /// It was there before; the offered bytes were not needed.
        already: bool,
    },
    /// The block is announced and has room.
    Reserved {
        /// Where to write, when it was reserved in place.
        place: Option<Place>,
    },
    /// Nothing to reserve: the block is there.
    AlreadyThere,
    /// The block can be read until the lease is released.
    Leased {
        /// The lease.
        lease: LeaseId,
        /// Which slot.
        slot: SlotId,
        /// Its generation.
        generation: Generation,
    },
    /// The block is not there.
    Miss(MissReason),
    /// It was not done.
    Fault {
        /// Why.
        code: Code,
        /// When to try again, in milliseconds; 0 without a hint.
        retry_after_ms: u32,
    },
}

#[derive(Default)]
struct Fields {
    id: u64,
    kind: u8,
    flags: u8,
    byte: u8,
    key: [u8; 16],
    deadline_us: u32,
    first: u64,
    second: u64,
    bytes: u32,
    ttl_s: u32,
    binding: u16,
    offset: u64,
}

impl Fields {
    fn write(&self) -> Entry {
        let mut entry = [0; ENTRY_BYTES];
        entry[..8].copy_from_slice(&self.id.to_le_bytes());
        entry[8..12].copy_from_slice(&[self.kind, ENTRY_VERSION, self.flags, self.byte]);
        entry[12..16].copy_from_slice(&self.deadline_us.to_le_bytes());
        entry[16..32].copy_from_slice(&self.key);
        entry[32..40].copy_from_slice(&self.first.to_le_bytes());
        entry[40..48].copy_from_slice(&self.second.to_le_bytes());
        entry[48..52].copy_from_slice(&self.bytes.to_le_bytes());
        entry[52..56].copy_from_slice(&self.ttl_s.to_le_bytes());
        entry[56..58].copy_from_slice(&self.binding.to_le_bytes());
        debug_assert!(self.offset < OFFSET_END, "staging areas are far smaller");
        entry[58..64].copy_from_slice(&self.offset.to_le_bytes()[..6]);
        entry
    }

    fn read(entry: &Entry) -> Self {
        Self {
            id: u64_at(entry, 0),
            kind: entry[8],
            flags: entry[10],
            byte: entry[11],
            deadline_us: u32_at(entry, 12),
            key: entry[16..32].try_into().expect("sixteen bytes"),
            first: u64_at(entry, 32),
            second: u64_at(entry, 40),
            bytes: u32_at(entry, 48),
            ttl_s: u32_at(entry, 52),
            binding: u16::from_le_bytes(entry[56..58].try_into().expect("two bytes")),
            offset: u64_at(entry, 56) >> 16,
        }
    }

    /// The key that lies where `first` and `second` are.
    fn after(&self) -> Option<BlockKey> {
        let halves = [self.first, self.second];
        (halves != NONE).then(|| BlockKey::from_halves(halves))
    }
}

fn u64_at(entry: &Entry, at: usize) -> u64 {
    u64::from_le_bytes(entry[at..at + 8].try_into().expect("eight bytes"))
}

fn u32_at(entry: &Entry, at: usize) -> u32 {
    u32::from_le_bytes(entry[at..at + 4].try_into().expect("four bytes"))
}

fn pair(slot: SlotId, generation: Generation) -> u64 {
    u64::from(slot.0) | u64::from(generation.0) << 32
}

fn priority_of(byte: u8) -> Option<Priority> {
    Priority::ALL.get(usize::from(byte)).copied()
}

impl Submission {
    /// The entry that says this.
    pub fn encode(&self) -> Entry {
        let flag = |on: bool, bit: u8| if on { bit } else { 0 };
        let halves = |after: Option<BlockKey>| after.map_or(NONE, |key| key.halves());
        let mut fields = Fields { id: self.id, deadline_us: self.deadline_us, ..Fields::default() };
        match self.request {
            Request::Ping => fields.kind = 1,
            Request::Put { key, binding, offset, bytes, priority, ttl_s, durable, after } => {
                let [first, second] = halves(after);
                fields = Fields {
                    kind: 2,
                    flags: flag(durable, DURABLE),
                    byte: priority as u8,
                    key: key.0,
                    first,
                    second,
                    bytes,
                    ttl_s,
                    binding: binding.0,
                    offset,
                    ..fields
                };
            }
            Request::Reserve { key, binding, priority, ttl_s, in_place, after } => {
                let [first, second] = halves(after);
                fields = Fields {
                    kind: 3,
                    flags: flag(in_place, IN_PLACE),
                    byte: priority as u8,
                    key: key.0,
                    first,
                    second,
                    ttl_s,
                    binding: binding.0,
                    ..fields
                };
            }
            Request::Commit { key, offset, bytes, durable } => {
                let flags = flag(durable, DURABLE);
                fields = Fields { kind: 4, flags, key: key.0, first: offset, bytes, ..fields };
            }
            Request::CommitInPlace { key, slot, generation, checksum, durable } => {
                fields = Fields {
                    kind: 5,
                    flags: flag(durable, DURABLE),
                    key: key.0,
                    first: pair(slot, generation),
                    second: checksum.0,
                    ..fields
                };
            }
            Request::Abort { key } => fields = Fields { kind: 6, key: key.0, ..fields },
            Request::Acquire { key, wait, after } => {
                let [first, second] = halves(after);
                fields = Fields { kind: 7, flags: flag(wait, WAIT), key: key.0, first, second, ..fields };
            }
            Request::Release { lease } => fields = Fields { kind: 8, first: lease.0, ..fields },
            Request::Prefetch { key, after } => {
                let [first, second] = halves(after);
                fields = Fields { kind: 9, key: key.0, first, second, ..fields };
            }
        }
        fields.write()
    }

    /// What `entry` says; refused unless it is exactly what [`Submission::encode`] would have written.
    pub fn decode(entry: &Entry) -> Result<Self, Malformed> {
        let f = Fields::read(entry);
        let refuse = |why| Malformed { id: f.id, why };
        if entry[9] != ENTRY_VERSION {
            return Err(refuse("unknown entry version"));
        }
        let key = BlockKey(f.key);
        let binding = BindingId(f.binding);
        let (durable, after) = (f.flags & DURABLE != 0, f.after());
        let request = match f.kind {
            1 => Request::Ping,
            2 => {
                let priority = priority_of(f.byte).ok_or(refuse("unknown priority"))?;
                let (offset, bytes, ttl_s) = (f.offset, f.bytes, f.ttl_s);
                Request::Put { key, binding, offset, bytes, priority, ttl_s, durable, after }
            }
            3 => {
                let priority = priority_of(f.byte).ok_or(refuse("unknown priority"))?;
                let in_place = f.flags & IN_PLACE != 0;
                Request::Reserve { key, binding, priority, ttl_s: f.ttl_s, in_place, after }
            }
            4 => Request::Commit { key, offset: f.first, bytes: f.bytes, durable },
            5 => Request::CommitInPlace {
                key,
                slot: SlotId(f.first as u32),
                generation: Generation((f.first >> 32) as u32),
                checksum: Checksum(f.second),
                durable,
            },
            6 => Request::Abort { key },
            7 => Request::Acquire { key, wait: f.flags & WAIT != 0, after },
            8 => Request::Release { lease: LeaseId(f.first) },
            9 => Request::Prefetch { key, after },
            _ => return Err(refuse("unknown operation")),
        };
        let submission = Self { id: f.id, deadline_us: f.deadline_us, request };
        // One comparison finds every bit that should be zero, in every operation.
        if submission.encode() != *entry {
            return Err(refuse("a field that the operation does not use is not zero"));
        }
        Ok(submission)
    }
}

impl Completion {
    /// The entry that says this.
    pub fn encode(&self) -> Entry {
        let mut entry = [0; ENTRY_BYTES];
        let mut put = |at: usize, bytes: &[u8]| entry[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.id.to_le_bytes());
        let (kind, flags, reason) = match self.outcome {
            Outcome::Done => (1, 0, 0),
            Outcome::Stored { already } => (2, if already { ALREADY } else { 0 }, 0),
            Outcome::Reserved { place } => {
                if let Some(place) = place {
                    put(16, &place.offset.to_le_bytes());
                    put(24, &pair(place.slot, place.generation).to_le_bytes());
                }
                (3, if place.is_some() { IN_PLACE } else { 0 }, 0)
            }
            Outcome::AlreadyThere => (4, 0, 0),
            Outcome::Leased { lease, slot, generation } => {
                put(16, &lease.0.to_le_bytes());
                put(24, &pair(slot, generation).to_le_bytes());
                (5, 0, 0)
            }
            Outcome::Miss(reason) => (6, 0, reason as u8),
            Outcome::Fault { code, retry_after_ms } => {
                put(12, &(code as u16).to_le_bytes());
                put(32, &retry_after_ms.to_le_bytes());
                (7, 0, 0)
            }
        };
        put(8, &[kind, ENTRY_VERSION, flags, reason]);
        entry
    }

    /// What `entry` says; refused unless it is exactly what [`Completion::encode`] would have written.
    pub fn decode(entry: &Entry) -> Result<Self, Malformed> {
        let id = u64_at(entry, 0);
        let refuse = |why| Malformed { id, why };
        if entry[9] != ENTRY_VERSION {
            return Err(refuse("unknown entry version"));
        }
        let (first, slot, generation) = (u64_at(entry, 16), u32_at(entry, 24), u32_at(entry, 28));
        let (slot, generation) = (SlotId(slot), Generation(generation));
        let outcome = match entry[8] {
            1 => Outcome::Done,
            2 => Outcome::Stored { already: entry[10] & ALREADY != 0 },
            3 if entry[10] & IN_PLACE != 0 => {
                Outcome::Reserved { place: Some(Place { slot, generation, offset: first }) }
            }
            3 => Outcome::Reserved { place: None },
            4 => Outcome::AlreadyThere,
            5 => Outcome::Leased { lease: LeaseId(first), slot, generation },
            6 => Outcome::Miss(MissReason::from_wire(entry[11]).ok_or(refuse("unknown miss reason"))?),
            7 => {
                let number = u16::from_le_bytes(entry[12..14].try_into().expect("two bytes"));
                let code = Code::from_number(number).ok_or(refuse("unknown code"))?;
                Outcome::Fault { code, retry_after_ms: u32_at(entry, 32) }
            }
            _ => return Err(refuse("unknown outcome")),
        };
        let completion = Self { id, outcome };
        if completion.encode() != *entry {
            return Err(refuse("a field that the outcome does not use is not zero"));
        }
        Ok(completion)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request() -> impl Strategy<Value = Request> {
        let key = any::<[u8; 16]>().prop_map(BlockKey);
        let keys = (key.clone(), prop::option::of(key.prop_filter("is none", |key| key.halves() != NONE)));
        let priority = prop::sample::select(&Priority::ALL[..]);
        let numbers = (any::<u64>(), any::<u64>(), any::<u32>(), any::<u32>(), any::<u16>());
        (0..9u8, keys, priority, numbers, any::<bool>()).prop_map(|(op, keys, priority, numbers, flag)| {
            let (first, second, bytes, ttl_s, binding) = numbers;
            let ((key, after), binding, offset) = (keys, BindingId(binding), first % OFFSET_END);
            match op {
                0 => Request::Ping,
                1 => Request::Put { key, binding, offset, bytes, priority, ttl_s, durable: flag, after },
                2 => Request::Reserve { key, binding, priority, ttl_s, in_place: flag, after },
                3 => Request::Commit { key, offset: first, bytes, durable: flag },
                4 => Request::CommitInPlace {
                    key,
                    slot: SlotId(bytes),
                    generation: Generation(ttl_s),
                    checksum: Checksum(second),
                    durable: flag,
                },
                5 => Request::Abort { key },
                6 => Request::Acquire { key, wait: flag, after },
                7 => Request::Release { lease: LeaseId(first) },
                _ => Request::Prefetch { key, after },
            }
        })
    }

    fn outcome() -> impl Strategy<Value = Outcome> {
        let reason = prop::sample::select(&MissReason::ALL[..]);
        let code = prop::sample::select(Code::ALL);
        let numbers = (any::<u64>(), any::<u32>(), any::<u32>());
        (0..8u8, reason, code, numbers, any::<bool>()).prop_map(|(kind, reason, code, numbers, flag)| {
            let (first, slot, generation) = numbers;
            let retry_after_ms = slot;
            let (slot, generation) = (SlotId(slot), Generation(generation));
            match kind {
                0 => Outcome::Done,
                1 => Outcome::Stored { already: flag },
                2 => Outcome::Reserved { place: None },
                3 => Outcome::Reserved { place: Some(Place { slot, generation, offset: first }) },
                4 => Outcome::AlreadyThere,
                5 => Outcome::Leased { lease: LeaseId(first), slot, generation },
                6 => Outcome::Miss(reason),
                _ => Outcome::Fault { code, retry_after_ms },
            }
        })
    }

    proptest! {
        #[test]
        fn every_submission_is_written_and_read_back(
            id: u64, deadline_us: u32, request in request()
        ) {
            let submission = Submission { id, deadline_us, request };
            prop_assert_eq!(Submission::decode(&submission.encode()), Ok(submission));
        }

        #[test]
        fn every_completion_is_written_and_read_back(id: u64, outcome in outcome()) {
            let completion = Completion { id, outcome };
            prop_assert_eq!(Completion::decode(&completion.encode()), Ok(completion));
        }

        #[test]
        fn what_is_accepted_says_exactly_one_thing(
            request in request(), outcome in outcome(), at in 0..ENTRY_BYTES, byte: u8
        ) {
            let mut entry = Submission { id: 1, deadline_us: 2, request }.encode();
            entry[at] = byte;
            if let Ok(read) = Submission::decode(&entry) {
                prop_assert_eq!(read.encode(), entry);
            }
            let mut entry = Completion { id: 1, outcome }.encode();
            entry[at] = byte;
            if let Ok(read) = Completion::decode(&entry) {
                prop_assert_eq!(read.encode(), entry);
            }
        }

        #[test]
        fn garbage_never_panics(entry: [[u8; 32]; 2]) {
            let entry: Entry = entry.concat().try_into().unwrap();
            let _ = Submission::decode(&entry);
            let _ = Completion::decode(&entry);
        }
    }

    #[test]
    fn every_stray_bit_is_refused() {
        let ping = Submission { id: 0, deadline_us: 0, request: Request::Ping }.encode();
        let done = Completion { id: 0, outcome: Outcome::Done }.encode();
        for bit in 8 * 8..ENTRY_BYTES * 8 {
            let flip = |entry: &Entry| {
                let mut entry = *entry;
                entry[bit / 8] ^= 1 << (bit % 8);
                entry
            };
            if !(96..128).contains(&bit) {
                // Bits of the operation itself may turn it into another whole operation.
                let read = Submission::decode(&flip(&ping));
                assert!(read.is_err() || bit / 8 == 8, "bit {bit}: {read:?}");
            }
            let read = Completion::decode(&flip(&done));
            assert!(read.is_err() || bit / 8 == 8, "bit {bit}: {read:?}");
        }
        assert_eq!(Submission::decode(&[0; ENTRY_BYTES]).unwrap_err().why, "unknown entry version");
    }

    #[test]
    fn the_bytes_of_an_entry_are_stable() {
        let put = Submission {
            id: 0x0102,
            deadline_us: 0x0304,
            request: Request::Put {
                key: BlockKey(*b"0123456789abcdef"),
                binding: BindingId(0x0506),
                offset: 0xa0b0_c0d0_e000,
                bytes: 0x0708,
                priority: Priority::High,
                ttl_s: 9,
                durable: true,
                after: Some(BlockKey(*b"ghijklmnopqrstuv")),
            },
        };
        let mut wanted = [0; ENTRY_BYTES];
        wanted[..14].copy_from_slice(&[2, 1, 0, 0, 0, 0, 0, 0, 2, 2, 1, 2, 4, 3]);
        wanted[16..32].copy_from_slice(b"0123456789abcdef");
        wanted[32..48].copy_from_slice(b"ghijklmnopqrstuv");
        wanted[48..50].copy_from_slice(&[8, 7]);
        wanted[52] = 9;
        wanted[56..].copy_from_slice(&[6, 5, 0, 0xe0, 0xd0, 0xc0, 0xb0, 0xa0]);
        assert_eq!(put.encode(), wanted);
    }

    #[test]
    fn a_key_of_zeros_comes_before_nothing() {
        let key = BlockKey([1; 16]);
        let read = |after| {
            let request = Request::Acquire { key, wait: true, after };
            Submission::decode(&Submission { id: 1, deadline_us: 2, request }.encode()).unwrap().request
        };
        let none = Request::Acquire { key, wait: true, after: None };
        assert_eq!((read(None), read(Some(BlockKey([0; 16])))), (none, none));
        for byte in [0, 7, 8, 15] {
            let mut after = BlockKey([0; 16]);
            after.0[byte] = 1;
            assert_eq!(read(Some(after)), Request::Acquire { key, wait: true, after: Some(after) });
        }
    }
}
