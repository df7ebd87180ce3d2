//! A block's way into the host tier, as a chain of guards: each step consumes the one before, and a guard
//! that is dropped gives its slot back.
//!
//! ```text
//!   slot taken --> Filling --seal--> Sealed --publish--> Block
//!                     |                 |                  |
//!                    drop              drop               drop
//!                     v                 v                  v
//!                slot is free      slot is free       one hold less; the block stays until it is retired
//! ```
//! `Filling` and `Sealed` belong to one owner and nobody else can find them. A `Block` is in the catalog:
//! readers share it, and only retiring it ends it ([`crate::host::HostTier::retire`]).

use std::ops::Deref;

use kv_arena::{Held, LentSlot, Slot};
use kv_block::{BlockKey, Checksum, Generation, Record, SlotId};

/// A step that was not taken; what it would have consumed comes back.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The block is longer than the slot.
    #[error("a block of {bytes} bytes does not fit a slot of {slot_bytes}")]
    TooLong {
        /// Its length.
        bytes: u32,
        /// The slot's length.
        slot_bytes: u32,
        /// The slot.
        slot: Slot,
    },
    /// The bytes are not those of the record.
    #[error("{key} failed its checksum: {found} found, {wanted} wanted")]
    Corrupt {
        /// Which block.
        key: BlockKey,
        /// Checksum of the bytes.
        found: Checksum,
        /// Checksum of the record.
        wanted: Checksum,
        /// The slot.
        slot: Slot,
    },
}

/// A slot and the name of what is being written into it.
#[derive(Debug)]
pub struct Filling {
    slot: Slot,
    record: Record,
}

impl Filling {
    /// Begins to fill `slot` with the block of `record`, whose checksum does not count yet.
    pub fn new(slot: Slot, record: Record) -> Result<Self, Error> {
        if record.bytes as usize > slot.len() {
            let slot_bytes = slot.len() as u32;
            return Err(Error::TooLong { bytes: record.bytes, slot_bytes, slot });
        }
        Ok(Self { slot, record })
    }

    /// Exactly the block's bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.slot[..self.record.bytes as usize]
    }

    /// What will be sealed.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The slot, for an operation that owns its memory; [`Self::new`] takes it back.
    pub fn into_slot(self) -> Slot {
        self.slot
    }

    /// The bytes are final, and this is their checksum, taken while they were copied in.
    pub fn seal(mut self, checksum: Checksum) -> Sealed {
        self.record.checksum = checksum;
        Sealed { slot: Owner::Own(self.slot), record: self.record }
    }

    /// The bytes are final; takes their checksum.
    pub fn seal_and_sum(mut self) -> Sealed {
        let key = self.record.key;
        let checksum = Checksum::of(&key, self.bytes_mut());
        self.seal(checksum)
    }

    /// The bytes are final if they are those that `record` was made for.
    pub fn seal_if_right(mut self) -> Result<Sealed, Error> {
        let Record { key, checksum: wanted, .. } = self.record;
        let found = Checksum::of(&key, self.bytes_mut());
        if found != wanted {
            return Err(Error::Corrupt { key, found, wanted, slot: self.slot });
        }
        Ok(self.seal(found))
    }
}

#[derive(Debug)]
enum Owner {
    Own(Slot),
    Lent(LentSlot),
}

/// Final bytes with their record, in a slot that nobody else knows.
#[derive(Debug)]
pub struct Sealed {
    slot: Owner,
    record: Record,
}

impl Sealed {
    /// What a trusted worker says it has written in place. `None` when the slot is too short for it; the
    /// slot is given back then.
    pub fn in_place(slot: LentSlot, record: Record) -> Option<Self> {
        (record.bytes <= slot.slot_bytes()).then_some(Self { slot: Owner::Lent(slot), record })
    }

    /// What it is.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Where it lies.
    pub fn place(&self) -> (SlotId, Generation) {
        match &self.slot {
            Owner::Own(slot) => (slot.id(), slot.generation()),
            Owner::Lent(slot) => (slot.id(), slot.generation()),
        }
    }

    /// Opens the slot to readers. The catalog does this when it publishes: a block that is not in the
    /// catalog would never be retired.
    pub(crate) fn share(self) -> Block {
        Block(match self.slot {
            Owner::Own(slot) => slot.seal(&self.record),
            Owner::Lent(slot) => slot.seal(&self.record),
        })
    }
}

/// A block in host memory that stays where it is as long as this lives. Dereferences to its bytes; a clone
/// is one more hold.
#[derive(Clone, Debug)]
pub struct Block(Held);

impl Block {
    /// Where it lies.
    pub fn place(&self) -> (SlotId, Generation) {
        (self.0.id(), self.0.generation())
    }

    /// What it is.
    pub fn record(&self) -> Record {
        self.0.record()
    }

    /// The hold alone, for an operation that owns its memory.
    pub fn into_held(self) -> Held {
        self.0
    }
}

impl From<Held> for Block {
    fn from(held: Held) -> Self {
        Self(held)
    }
}

impl Deref for Block {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
