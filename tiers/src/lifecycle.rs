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

#[cfg(test)]
mod tests {
    use kv_arena::{Geometry, HazardSet, ShardMemory, Slab, SlotState};
    use kv_block::{BindingTag, Priority};

    use super::*;

    fn memory() -> ShardMemory {
        let geometry = Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: 64 };
        ShardMemory::anonymous(geometry).unwrap()
    }

    fn record() -> Record {
        Record {
            key: BlockKey([7; 16]),
            checksum: Checksum::default(),
            bytes: 5000,
            tag: BindingTag(3),
            priority: Priority::High,
            expires_at: 9,
        }
    }

    fn filling(slab: &Slab) -> Filling {
        let mut filling = Filling::new(slab.take(5000).unwrap(), record()).unwrap();
        filling.bytes_mut().fill(1);
        filling
    }

    fn used(slab: &Slab) -> u32 {
        slab.regions().iter().map(|region| region.used).sum()
    }

    /// The guards as one value, to walk every state through every event.
    enum Stage {
        Filling(Filling),
        Sealed(Sealed),
        Block(Block),
        Gone,
    }

    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Event {
        Seal,
        SealWrong,
        Share,
        Drop,
        Retire,
    }

    fn step(slab: &Slab, stage: Stage, event: Event) -> Stage {
        match (stage, event) {
            (Stage::Filling(filling), Event::Seal) => Stage::Sealed(filling.seal_and_sum()),
            // The record has no checksum that fits: the slot comes back in the error and is dropped.
            (Stage::Filling(filling), Event::SealWrong) => {
                assert!(matches!(filling.seal_if_right(), Err(Error::Corrupt { .. })));
                Stage::Gone
            }
            (Stage::Sealed(sealed), Event::Share) => Stage::Block(sealed.share()),
            (Stage::Block(block), Event::Retire) => {
                let (slot, generation) = block.place();
                assert!(slab.retire(slot, generation).is_err(), "a block in use was retired");
                drop(block);
                slab.retire(slot, generation).unwrap();
                slab.sweep(&HazardSet::new());
                Stage::Gone
            }
            (stage @ (Stage::Filling(_) | Stage::Sealed(_) | Stage::Block(_)), Event::Drop) => {
                drop(stage);
                Stage::Gone
            }
            // No method leads from here: the event does not exist in this state.
            (stage, _) => stage,
        }
    }

    #[test]
    fn every_stage_meets_every_event() {
        use Event::{Drop, Retire, Seal, SealWrong, Share};
        // Stage reached by, event, then: is it a block or gone, slots still in use.
        let table: [(&[Event], &str, u32); 13] = [
            (&[], "filling", 1),
            (&[Seal], "sealed", 1),
            (&[SealWrong], "gone", 0),
            (&[Share], "filling", 1),
            (&[Drop], "gone", 0),
            (&[Retire], "filling", 1),
            (&[Seal, Seal], "sealed", 1),
            (&[Seal, Share], "block", 1),
            (&[Seal, Drop], "gone", 0),
            (&[Seal, Share, Seal], "block", 1),
            (&[Seal, Share, Drop], "gone", 1),
            (&[Seal, Share, Retire], "gone", 0),
            (&[Seal, Share, Retire, Drop], "gone", 0),
        ];
        for (events, wanted, in_use) in table {
            let memory = memory();
            let slab = memory.slab();
            let stage = Stage::Filling(filling(slab));
            let stage = events.iter().fold(stage, |stage, event| step(slab, stage, *event));
            let found = match &stage {
                Stage::Filling(_) => "filling",
                Stage::Sealed(_) => "sealed",
                Stage::Block(_) => "block",
                Stage::Gone => "gone",
            };
            assert_eq!((found, used(slab)), (wanted, in_use), "{events:?}");
        }
    }

    #[test]
    fn nobody_can_read_a_slot_before_it_is_a_block() {
        let memory = memory();
        let state = |(slot, generation): (SlotId, Generation)| {
            let held = memory.slab().hold(slot, generation);
            (memory.slab().header(slot).unwrap().state, held.is_some())
        };
        let sealed = filling(memory.slab()).seal_and_sum();
        assert_eq!(state(sealed.place()), (SlotState::Filling, false));
        let block = sealed.share();
        assert_eq!(state(block.place()), (SlotState::Sealed, true));
        assert_eq!(*block, [1; 5000]);
        let record = block.record();
        assert!(record.checksum.matches(&record.key, &block));
        assert_eq!((record.tag, record.priority, record.expires_at), (BindingTag(3), Priority::High, 9));
    }

    #[test]
    fn bytes_are_sealed_only_if_they_are_those_of_the_record() {
        let memory = memory();
        let right = Record { checksum: Checksum::of(&record().key, &[1; 5000]), ..record() };
        let mut filling = Filling::new(memory.slab().take(5000).unwrap(), right).unwrap();
        filling.bytes_mut().fill(1);
        let slot = filling.into_slot();
        let mut filling = Filling::new(slot, right).unwrap();
        filling.bytes_mut()[4999] ^= 1;
        let Err(Error::Corrupt { slot, wanted, .. }) = filling.seal_if_right() else { panic!("a wrong bit") };
        assert_eq!(wanted, right.checksum);
        let mut filling = Filling::new(slot, right).unwrap();
        filling.bytes_mut()[4999] ^= 1;
        assert_eq!(filling.seal_if_right().unwrap().record(), &right);
    }

    #[test]
    fn a_slot_that_is_too_short_comes_back() {
        let memory = memory();
        let slot = memory.slab().take(4096).unwrap();
        let refused = Filling::new(slot, record());
        assert!(matches!(refused, Err(Error::TooLong { bytes: 5000, slot_bytes: 4096, .. })));
        drop(refused);
        let lent = memory.slab().take(4096).unwrap().lend();
        assert!(Sealed::in_place(lent, record()).is_none());
        memory.slab().sweep(&HazardSet::new());
        assert_eq!(used(memory.slab()), 0);
    }
}
