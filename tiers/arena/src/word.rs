//! The one word that says what a slot is, and the steps that may change it.
//!
//! ```text
//! generation:32 | state:8 | holds:24
//!
//! Free --take--> Filling --seal--> Sealed <--verify-- Unverified (adopted after a restart)
//!  ^               | drop             | retire: holds == 0, generation + 1    | the same
//!  +---- sweep: no hazard names it ---+---- Retired <------------------------+
//! ```
//! *Holds* keep a slot for the daemon itself (I/O in flight, leases by gRPC); *hazards* keep it for workers
//! in other processes. A slot is reused only when it has neither: a retire needs zero holds in the same
//! compare-and-swap, and a sweep looks for hazards after it.
//!
//! Why a reader is safe. Reader: `hazard = name; fence(SeqCst); look at word`. Evictor: `word = Retired;
//! fence(SeqCst); look at hazard`. Sequentially consistent fences are totally ordered, so whoever fences
//! second sees the other's store. The same argument covers closing a hazard file: `file = CLOSED; fence; look`.
//! A file is opened only after the daemon counts it among those it looks at; a reader looks at the file's
//! state before it looks at the word, so it sees every retire that was swept without its file.

use kv_block::{Generation, SlotId};

use crate::sync::{AtomicU64, Ordering, fence};

/// What a slot is to the world.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum SlotState {
    /// Nobody's.
    Free = 0,
    /// One owner is writing it.
    Filling = 1,
    /// Immutable and readable.
    Sealed = 2,
    /// Immutable, from an earlier life of the daemon, checksum not yet looked at.
    Unverified = 3,
    /// No longer findable; free as soon as no hazard names it.
    Retired = 4,
}

/// Why a slot was not retired.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RetireError {
    /// Somebody in this process holds it.
    #[error("the slot has {holds} holds")]
    Held {
        /// How many.
        holds: u32,
    },
    /// It is not a block of that generation any more.
    #[error("the slot is not a block of that generation")]
    Gone,
}

/// A decoded slot word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Word(pub(crate) u64);

impl Word {
    const HOLDS: u64 = (1 << 24) - 1;

    pub(crate) fn new(generation: Generation, state: SlotState) -> Self {
        Self(u64::from(generation.0) << 32 | (state as u64) << 24)
    }

    pub(crate) fn generation(self) -> Generation {
        Generation((self.0 >> 32) as u32)
    }

    /// `None` when the byte is none of ours.
    pub(crate) fn state(self) -> Option<SlotState> {
        Some(match (self.0 >> 24) as u8 {
            0 => SlotState::Free,
            1 => SlotState::Filling,
            2 => SlotState::Sealed,
            3 => SlotState::Unverified,
            4 => SlotState::Retired,
            _ => return None,
        })
    }

    pub(crate) fn holds(self) -> u32 {
        (self.0 & Self::HOLDS) as u32
    }

    fn is(self, generation: Generation, state: SlotState) -> bool {
        self.generation() == generation && self.state() == Some(state)
    }

    fn is_block(self, generation: Generation) -> bool {
        self.is(generation, SlotState::Sealed) || self.is(generation, SlotState::Unverified)
    }

    /// The next generation; zero is never used, so that a name is never zero.
    pub(crate) fn next_generation(self) -> Generation {
        Generation(self.generation().0.wrapping_add(1).max(1))
    }
}

/// What a hazard cell holds: `slot:32 | generation:32`, zero for nothing.
pub(crate) fn name(slot: SlotId, generation: Generation) -> u64 {
    u64::from(slot.0) << 32 | u64::from(generation.0)
}

pub(crate) fn load(word: &AtomicU64) -> Word {
    Word(word.load(Ordering::Acquire))
}

/// One more hold, if it still is a block of that generation.
pub(crate) fn hold(word: &AtomicU64, generation: Generation) -> bool {
    let mut seen = Word(word.load(Ordering::Relaxed));
    loop {
        if !seen.is_block(generation) || u64::from(seen.holds()) == Word::HOLDS {
            return false;
        }
        // Acquire: what the sealer wrote is visible to the holder.
        match word.compare_exchange_weak(seen.0, seen.0 + 1, Ordering::Acquire, Ordering::Relaxed) {
            Ok(_) => return true,
            Err(found) => seen = Word(found),
        }
    }
}

/// Gives one hold back. Release: the holder's reads come before any reuse.
pub(crate) fn release(word: &AtomicU64) {
    word.fetch_sub(1, Ordering::Release);
}

/// Free to Filling, by the owner of the free list; gives the generation of the new owner.
pub(crate) fn take(word: &AtomicU64) -> Generation {
    let seen = Word(word.load(Ordering::Relaxed));
    // A word never written has generation zero, which names nothing.
    let generation = if seen.generation().0 == 0 { seen.next_generation() } else { seen.generation() };
    word.store(Word::new(generation, SlotState::Filling).0, Ordering::Release);
    generation
}

/// Filling to Sealed with one hold, which is the caller's. Release: bytes and record come before.
pub(crate) fn seal(word: &AtomicU64, generation: Generation) {
    word.store(Word::new(generation, SlotState::Sealed).0 + 1, Ordering::Release);
}

/// Filling back to Free. The generation moves on, so a late commit in place finds nothing.
pub(crate) fn free(word: &AtomicU64) {
    let generation = Word(word.load(Ordering::Relaxed)).next_generation();
    word.store(Word::new(generation, SlotState::Free).0, Ordering::Release);
}

/// Anything to Retired, by the only owner (an abandoned filling, a header found broken).
pub(crate) fn condemn(word: &AtomicU64) {
    let generation = Word(word.load(Ordering::Relaxed)).next_generation();
    word.store(Word::new(generation, SlotState::Retired).0, Ordering::Release);
}

/// A block without holds to Retired. Acquire: every former holder's reads are over.
pub(crate) fn retire(word: &AtomicU64, generation: Generation) -> Result<(), RetireError> {
    let mut seen = Word(word.load(Ordering::Relaxed));
    loop {
        if !seen.is_block(generation) {
            return Err(RetireError::Gone);
        }
        if seen.holds() != 0 {
            return Err(RetireError::Held { holds: seen.holds() });
        }
        let retired = Word::new(seen.next_generation(), SlotState::Retired).0;
        match word.compare_exchange_weak(seen.0, retired, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return Ok(()),
            Err(found) => seen = Word(found),
        }
    }
}

/// Unverified to Sealed, holds unchanged; false when it is not an unverified block of that generation.
pub(crate) fn verify(word: &AtomicU64, generation: Generation) -> bool {
    let mut seen = Word(word.load(Ordering::Relaxed));
    loop {
        if !seen.is(generation, SlotState::Unverified) {
            return seen.is(generation, SlotState::Sealed);
        }
        let sealed = Word::new(generation, SlotState::Sealed).0 | u64::from(seen.holds());
        match word.compare_exchange_weak(seen.0, sealed, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(_) => return true,
            Err(found) => seen = Word(found),
        }
    }
}

/// State of a hazard file: the daemon does not look at it yet.
pub(crate) const UNOPENED: u64 = 0;
/// State of a hazard file: what it names is kept.
pub(crate) const OPEN: u64 = 1;
/// State of a hazard file: its session is over. What it named then is kept, what it names from now on is not.
pub(crate) const CLOSED: u64 = 2;

/// What a published hazard turned out to protect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Published {
    /// The slot is as wanted and stays so until the hazard is cleared.
    Safe,
    /// The daemon does not look at this hazard file yet.
    Unopened,
    /// The daemon no longer looks at it.
    Closed,
    /// The slot is something else by now.
    Changed(Word),
}

/// Announces a read of `slot` and looks whether it is still what the reader thinks. On anything but `Safe`
/// the cell is empty again.
pub(crate) fn publish(
    cell: &AtomicU64,
    file: &AtomicU64,
    word: &AtomicU64,
    (slot, generation): (SlotId, Generation),
    wanted: SlotState,
) -> Published {
    cell.store(name(slot, generation), Ordering::Relaxed);
    fence(Ordering::SeqCst);
    // The file first: what was swept before it opened is seen in the word.
    let result = match file.load(Ordering::Acquire) {
        OPEN => match load(word) {
            seen if seen.is(generation, wanted) => return Published::Safe,
            seen => Published::Changed(seen),
        },
        UNOPENED => Published::Unopened,
        _ => Published::Closed,
    };
    cell.store(0, Ordering::Release);
    result
}

/// The read is over. Release: it comes before any reuse of the slot.
pub(crate) fn clear(cell: &AtomicU64) {
    cell.store(0, Ordering::Release);
}

/// Stands between a retire (or the closing of a hazard file) and the look at the hazards.
pub(crate) fn before_scan() {
    fence(Ordering::SeqCst);
}

/// Stands between the look at the hazards and the first write into a slot found free.
pub(crate) fn after_scan() {
    fence(Ordering::Acquire);
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const STATES: [SlotState; 5] =
        [SlotState::Free, SlotState::Filling, SlotState::Sealed, SlotState::Unverified, SlotState::Retired];

    /// What each step makes of each state: the state after it, `None` where the step refuses.
    #[test]
    fn every_step_does_the_right_thing_in_every_state() {
        use SlotState::{Free, Retired, Sealed, Unverified};
        let generation = Generation(5);
        for state in STATES {
            let is_block = matches!(state, Sealed | Unverified);
            let fresh = || AtomicU64::new(Word::new(generation, state).0);

            let word = fresh();
            assert_eq!(hold(&word, generation), is_block);
            assert_eq!(load(&word).holds(), u32::from(is_block));
            if is_block {
                assert_eq!(retire(&word, generation), Err(RetireError::Held { holds: 1 }));
                release(&word);
            }
            assert!(!hold(&word, Generation(4)), "an older generation holds nothing");

            let word = fresh();
            let retired = retire(&word, generation);
            assert_eq!(retired, if is_block { Ok(()) } else { Err(RetireError::Gone) });
            if is_block {
                assert_eq!((load(&word).state(), load(&word).generation()), (Some(Retired), Generation(6)));
            }

            let word = fresh();
            assert_eq!(verify(&word, generation), is_block);
            assert_eq!(load(&word).state(), Some(if state == Unverified { Sealed } else { state }));

            let word = fresh();
            free(&word);
            assert_eq!((load(&word).state(), load(&word).generation()), (Some(Free), Generation(6)));
            assert_eq!(take(&word), Generation(6));
        }
    }

    #[test]
    fn names_are_never_zero_and_generations_step_over_zero() {
        let word = AtomicU64::new(0);
        assert_eq!(take(&word), Generation(1), "untouched memory");
        let last = AtomicU64::new(Word::new(Generation(u32::MAX), SlotState::Sealed).0);
        retire(&last, Generation(u32::MAX)).unwrap();
        assert_eq!(load(&last).generation(), Generation(1));
        assert_ne!(name(SlotId(0), Generation(1)), 0);
    }

    #[test]
    fn holds_do_not_run_into_the_state() {
        let word = AtomicU64::new(Word::new(Generation(1), SlotState::Sealed).0 | Word::HOLDS);
        assert!(!hold(&word, Generation(1)));
        assert_eq!(load(&word).state(), Some(SlotState::Sealed));
    }
}
