//! Loom models of the protocols in `word` and `seqlock`: every interleaving that the memory model allows.
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test -p kv-arena --release --lib
//! ```
//! A slot's bytes are an `UnsafeCell`, so a reader and a writer at once fail the model. The daemon's `pread`
//! of a hazard file is a relaxed load: it runs after the fence in program order and promises nothing more.

use kv_block::{Generation, SlotId};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use crate::seqlock;
use crate::word::{self, Published, RetireError, SlotState, Word};

const SLOT: SlotId = SlotId(3);
const FIRST: Generation = Generation(1);

struct Memory {
    word: AtomicU64,
    cells: [AtomicU64; 2],
    file: AtomicU64,
    bytes: UnsafeCell<u64>,
}

impl Memory {
    /// A slot of generation 1 in `state`, holding 7.
    fn new(state: SlotState) -> Arc<Self> {
        Arc::new(Self {
            word: AtomicU64::new(Word::new(FIRST, state).0),
            cells: [AtomicU64::new(0), AtomicU64::new(0)],
            file: AtomicU64::new(word::OPEN),
            bytes: UnsafeCell::new(7),
        })
    }

    fn read(&self, cell: usize) -> Published {
        let found =
            word::publish(&self.cells[cell], &self.file, &self.word, (SLOT, FIRST), SlotState::Sealed);
        if found == Published::Safe {
            self.bytes.with(|bytes| {
                // SAFETY: what the model proves; loom fails on a writer at the same time.
                assert_eq!(unsafe { *bytes }, 7);
            });
            word::clear(&self.cells[cell]);
        }
        found
    }

    fn write(&self, value: u64) {
        self.bytes.with_mut(|bytes| {
            // SAFETY: as above.
            unsafe { *bytes = value };
        });
    }

    /// The daemon's look at the hazard files.
    fn is_named(&self) -> bool {
        word::before_scan();
        let named = self.cells.iter().any(|cell| cell.load(Ordering::Relaxed) != 0);
        word::after_scan();
        named
    }
}

#[test]
fn a_hazard_keeps_its_slot_from_being_reused() {
    loom::model(|| {
        let memory = Memory::new(SlotState::Sealed);
        let readers = [0, 1].map(|cell| {
            let memory = Arc::clone(&memory);
            thread::spawn(move || memory.read(cell))
        });
        word::retire(&memory.word, FIRST).unwrap();
        if !memory.is_named() {
            word::free(&memory.word);
            assert_ne!(word::take(&memory.word), FIRST);
            memory.write(8);
        }
        for reader in readers {
            assert_ne!(reader.join().unwrap(), Published::Closed);
        }
    });
}

#[test]
fn a_reader_sees_what_was_sealed() {
    loom::model(|| {
        let memory = Memory::new(SlotState::Filling);
        let reader = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || memory.read(0))
        };
        memory.write(7);
        word::seal(&memory.word, FIRST);
        word::release(&memory.word);
        reader.join().unwrap();
    });
}

#[test]
fn a_closed_hazard_file_that_names_nothing_can_be_forgotten() {
    loom::model(|| {
        let memory = Memory::new(SlotState::Sealed);
        let reader = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || memory.read(0))
        };
        memory.file.store(word::CLOSED, Ordering::Relaxed);
        if !memory.is_named() {
            // The file is gone: from here on nobody looks at its cells.
            word::retire(&memory.word, FIRST).unwrap();
            word::take(&memory.word);
            memory.write(8);
        }
        reader.join().unwrap();
    });
}

#[test]
fn an_abandoned_lent_slot_waits_for_its_writer() {
    loom::model(|| {
        let memory = Memory::new(SlotState::Filling);
        let worker = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || {
                let place = (SLOT, FIRST);
                let found =
                    word::publish(&memory.cells[0], &memory.file, &memory.word, place, SlotState::Filling);
                if found == Published::Safe {
                    memory.write(9);
                    word::clear(&memory.cells[0]);
                }
            })
        };
        word::condemn(&memory.word);
        if !memory.is_named() {
            word::free(&memory.word);
            word::take(&memory.word);
            memory.write(8);
        }
        worker.join().unwrap();
    });
}

#[test]
fn a_hold_keeps_its_slot_from_being_retired() {
    loom::model(|| {
        let memory = Memory::new(SlotState::Unverified);
        let holders = [0, 1].map(|_| {
            let memory = Arc::clone(&memory);
            thread::spawn(move || {
                if word::hold(&memory.word, FIRST) {
                    // SAFETY: what the model proves.
                    memory.bytes.with(|bytes| assert_eq!(unsafe { *bytes }, 7));
                    word::release(&memory.word);
                }
            })
        });
        match word::retire(&memory.word, FIRST) {
            Ok(()) => memory.write(8),
            Err(RetireError::Held { holds }) => assert!((1..=2).contains(&holds)),
            Err(RetireError::Gone) => unreachable!("nobody else retires"),
        }
        for holder in holders {
            holder.join().unwrap();
        }
        let end = word::load(&memory.word);
        assert_eq!(end.holds(), 0);
        assert!(!word::hold(&memory.word, FIRST) || end.state() == Some(SlotState::Unverified));
    });
}

#[test]
fn a_block_is_retired_once_and_verifying_it_loses_no_hold() {
    loom::model(|| {
        let memory = Memory::new(SlotState::Unverified);
        assert!(word::hold(&memory.word, FIRST));
        let verifier = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || {
                assert!(word::verify(&memory.word, FIRST));
                word::release(&memory.word);
            })
        };
        let retirer = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || word::retire(&memory.word, FIRST).is_ok())
        };
        let mine = word::retire(&memory.word, FIRST).is_ok();
        verifier.join().unwrap();
        let theirs = retirer.join().unwrap();
        assert!(!(mine && theirs));
        let end = word::load(&memory.word);
        let state = if mine || theirs { SlotState::Retired } else { SlotState::Sealed };
        assert_eq!((end.state(), end.holds()), (Some(state), 0));
    });
}

#[test]
fn a_sequence_lock_never_mixes_two_writes() {
    loom::model(|| {
        let bucket = Arc::new([(); 3].map(|()| AtomicU64::new(0)));
        let writer = {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || {
                for value in [1, 2] {
                    let inside = seqlock::begin_write(&bucket[0], 10);
                    bucket[1].store(value, Ordering::Relaxed);
                    bucket[2].store(value, Ordering::Relaxed);
                    seqlock::end_write(&bucket[0], inside, value as u32);
                }
            })
        };
        if let Some(head) = seqlock::begin_read(&bucket[0]) {
            let values = [&bucket[1], &bucket[2]].map(|word| word.load(Ordering::Relaxed));
            if seqlock::end_read(&bucket[0], head) {
                assert_eq!(values, [head >> 32; 2]);
            }
        }
        writer.join().unwrap();
    });
}

#[test]
fn a_hazard_file_is_used_only_once_the_daemon_looks_at_it() {
    loom::model(|| {
        let memory = Memory::new(SlotState::Sealed);
        memory.file.store(word::UNOPENED, Ordering::Relaxed);
        let reader = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || memory.read(0))
        };
        // A sweep that does not know the file: nothing is named.
        word::retire(&memory.word, FIRST).unwrap();
        word::before_scan();
        word::after_scan();
        word::free(&memory.word);
        word::take(&memory.word);
        memory.write(8);
        word::before_scan();
        memory.file.store(word::OPEN, Ordering::Relaxed);
        assert_ne!(reader.join().unwrap(), Published::Safe);
    });
}

/// The models above would be worth nothing if they could not fail.
#[test]
#[should_panic]
fn without_the_readers_fence_the_model_fails() {
    loom::model(|| {
        let memory = Memory::new(SlotState::Sealed);
        let reader = {
            let memory = Arc::clone(&memory);
            thread::spawn(move || {
                memory.cells[0].store(word::name(SLOT, FIRST), Ordering::Relaxed);
                if word::load(&memory.word) == Word::new(FIRST, SlotState::Sealed) {
                    // SAFETY: it is not; that is the point.
                    memory.bytes.with(|bytes| assert_eq!(unsafe { *bytes }, 7));
                    word::clear(&memory.cells[0]);
                }
            })
        };
        word::retire(&memory.word, FIRST).unwrap();
        if !memory.is_named() {
            memory.write(8);
        }
        reader.join().unwrap();
    });
}
