//! A sequence lock in the low half of a word: one writer, readers in any process, no reader ever waits for
//! long or makes the writer wait.
//!
//! ```text
//! head: caller's 32 bits | sequence:32      odd while the writer is inside
//! ```
//! The caller's half changes together with the sequence and is read in the same load.

use crate::sync::{AtomicU64, Ordering, fence};

/// Opens the write; data stores (relaxed) may follow. `first` is the sequence that an untouched lock starts
/// from, even; a different one in every life keeps readers of an older life from being fooled.
pub(crate) fn begin_write(head: &AtomicU64, first: u32) -> u64 {
    let seen = head.load(Ordering::Relaxed);
    let sequence = if seen as u32 == 0 { first } else { seen as u32 };
    let inside = (seen & !0xffff_ffff) | u64::from(sequence.wrapping_add(1) | 1);
    head.store(inside, Ordering::Relaxed);
    // Release fence: whoever sees one of the data stores sees the odd sequence at its second look.
    fence(Ordering::Release);
    inside
}

/// Closes the write that `begin_write` opened, with the caller's half set to `upper`.
pub(crate) fn end_write(head: &AtomicU64, inside: u64, upper: u32) {
    // Zero means untouched, so the sequence steps over it.
    let sequence = match (inside as u32).wrapping_add(1) {
        0 => 2,
        sequence => sequence,
    };
    head.store(u64::from(upper) << 32 | u64::from(sequence), Ordering::Release);
}

/// The head to read under, `None` while the writer is inside.
pub(crate) fn begin_read(head: &AtomicU64) -> Option<u64> {
    let seen = head.load(Ordering::Acquire);
    (seen & 1 == 0).then_some(seen)
}

/// Whether all that was read (relaxed) since `begin_read` belongs together.
pub(crate) fn end_read(head: &AtomicU64, seen: u64) -> bool {
    fence(Ordering::Acquire);
    head.load(Ordering::Relaxed) == seen
}
