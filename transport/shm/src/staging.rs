//! The staging area: the worker writes whole blocks into slots of its own, the shard copies them out.
//!
//! The worker's side lends slots first-fit in whole pages; low addresses are used again first, so a
//! worker that stores one block at a time touches the same warm pages. A slot must not be given back while
//! the shard may still read it, or the bytes of the next block could be stored under the name of the last:
//! keep it until its completion.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::region::{PAGE, Region};
use crate::{Error, Layout};

/// The worker's side: lends slots.
#[derive(Clone)]
pub struct WorkerStaging(Arc<Lender>);

struct Lender {
    region: Arc<Region>,
    /// Free runs: first byte to length, neighbours merged.
    free: Mutex<BTreeMap<u64, u64>>,
}

impl WorkerStaging {
    pub(crate) fn new(region: Arc<Region>) -> Self {
        let bytes = region.layout().staging_bytes();
        let free = if bytes > 0 { BTreeMap::from([(0, bytes)]) } else { BTreeMap::new() };
        Self(Arc::new(Lender { region, free: Mutex::new(free) }))
    }

    /// A slot of `bytes` (at least one); `None` while no run of free pages is long enough.
    pub fn take(&self, bytes: usize) -> Option<StagingSlot> {
        let room = u64::try_from(bytes).ok()?.checked_next_multiple_of(PAGE).filter(|room| *room > 0)?;
        let mut free = self.0.free();
        let (offset, length) =
            free.iter().find(|(_, length)| **length >= room).map(|(at, len)| (*at, *len))?;
        free.remove(&offset);
        if length > room {
            free.insert(offset + room, length - room);
        }
        drop(free);
        Some(StagingSlot { lender: Arc::clone(&self.0), offset, bytes })
    }

    /// Bytes not lent, in however many runs.
    pub fn free_bytes(&self) -> u64 {
        self.0.free().values().sum()
    }

    /// Size of the area in bytes.
    pub fn len(&self) -> u64 {
        self.0.region.layout().staging_bytes()
    }

    /// Whether there is no area at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Lender {
    fn free(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.free.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn give_back(&self, mut offset: u64, mut length: u64) {
        let mut free = self.free();
        if let Some((before, run)) = free.range(..offset).next_back().map(|(at, len)| (*at, *len))
            && before + run == offset
        {
            free.remove(&before);
            (offset, length) = (before, length + run);
        }
        if let Some(run) = free.remove(&(offset + length)) {
            length += run;
        }
        free.insert(offset, length);
    }
}

/// A run of the staging area, this worker's alone until dropped. Its first bytes may be anything.
pub struct StagingSlot {
    lender: Arc<Lender>,
    offset: u64,
    bytes: usize,
}

impl StagingSlot {
    /// Where it begins in the staging area.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Copies `bytes` to the front of the slot. Faster than writing through the slice: the shard's core has
    /// the lines of the last block, and stores that go past the caches need not ask for each of them back
    /// (64 KiB: 2.6 us instead of 30 us between two cores). Panics when they are longer than the slot.
    pub fn write(&mut self, bytes: &[u8]) {
        let whole = if cfg!(target_arch = "x86_64") { bytes.len() / 64 * 64 } else { 0 };
        let (streamed, rest) = bytes.split_at(whole);
        let (target, tail) = self[..bytes.len()].split_at_mut(whole);
        #[cfg(target_arch = "x86_64")]
        stream(target, streamed);
        #[cfg(not(target_arch = "x86_64"))]
        target.copy_from_slice(streamed);
        tail.copy_from_slice(rest);
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: `offset` was lent from inside the area.
        unsafe { self.lender.region.staging().add(self.offset as usize) }
    }
}

/// Copies with stores that bypass the caches. `target` begins on a multiple of 16, as slots do.
#[cfg(target_arch = "x86_64")]
fn stream(target: &mut [u8], source: &[u8]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    assert!(target.len() == source.len() && target.as_ptr().addr().is_multiple_of(16));
    for (target, source) in target.chunks_exact_mut(64).zip(source.chunks_exact(64)) {
        for at in [0, 16, 32, 48] {
            // SAFETY: SSE2 is part of x86_64. Both pieces are 64 bytes long, so 16 bytes at `at` lie inside;
            // the target is aligned to 16, the load needs no alignment.
            unsafe {
                let word = _mm_loadu_si128(source.as_ptr().add(at).cast::<__m128i>());
                _mm_stream_si128(target.as_mut_ptr().add(at).cast::<__m128i>(), word);
            }
        }
    }
    // SAFETY: SSE. Streamed stores are not ordered by the ring's release store: this orders them.
    unsafe { _mm_sfence() };
}

impl Deref for StagingSlot {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: a lent run lies inside the mapping that `lender` holds, is lent once, and nobody else in
        // this process has a reference into it; the daemon only reads it, so no other process writes it.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.bytes) }
    }
}

impl DerefMut for StagingSlot {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.bytes) }
    }
}

impl Drop for StagingSlot {
    fn drop(&mut self) {
        self.lender.give_back(self.offset, (self.bytes as u64).next_multiple_of(PAGE));
    }
}

impl std::fmt::Debug for StagingSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StagingSlot({:#x}+{})", self.offset, self.bytes)
    }
}

/// The shard's side: ranges the worker named, checked.
#[derive(Clone)]
pub struct ShardStaging(Arc<Region>);

impl ShardStaging {
    pub(crate) fn new(region: Arc<Region>) -> Self {
        Self(region)
    }

    /// The `bytes` at `offset`; refused when they leave the area or there are none.
    pub fn range(&self, offset: u64, bytes: u32) -> Result<SharedBytes, Error> {
        let staging_bytes = self.0.layout().staging_bytes();
        let end = offset.checked_add(u64::from(bytes));
        if bytes == 0 || end.is_none_or(|end| end > staging_bytes) {
            return Err(Error::Range { offset, bytes: u64::from(bytes), staging_bytes });
        }
        Ok(SharedBytes { region: Arc::clone(&self.0), offset: offset as usize, len: bytes as usize })
    }

    /// Sizes of the memory.
    pub fn layout(&self) -> Layout {
        self.0.layout()
    }
}

/// Bytes that the worker may change at any moment. They can be copied, never borrowed: judge the copy.
#[derive(Clone)]
pub struct SharedBytes {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

impl SharedBytes {
    /// Length in bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// First byte. Valid for reads of [`SharedBytes::len`] bytes while this lives; never make a reference
    /// of it, the other process may write.
    pub fn as_ptr(&self) -> *const u8 {
        // SAFETY: `range` checked that the offset lies inside the area.
        unsafe { self.region.staging().add(self.offset).as_ptr() }
    }

    /// Copies the bytes from `at` on into `to`. Panics when they leave the range.
    pub fn copy_to(&self, at: usize, to: &mut [u8]) {
        let end = at.checked_add(to.len()).expect("end of a copy overflows");
        assert!(end <= self.len, "copy of {at}..{end} out of {} bytes", self.len);
        // SAFETY: source checked above and kept mapped by `region`; the target is ours and elsewhere. The
        // worker may write the source meanwhile: then the copy holds a mix of its bytes, which is all that
        // the caller is promised.
        unsafe { std::ptr::copy_nonoverlapping(self.as_ptr().add(at), to.as_mut_ptr(), to.len()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(pages: u64) -> (ShardStaging, WorkerStaging) {
        let layout = Layout::new(2, pages * PAGE).unwrap();
        let (shard, fds) = crate::create(layout).unwrap();
        (shard.staging, crate::open(layout, fds).unwrap().staging)
    }

    #[test]
    fn ranges_that_leave_the_area_are_refused() {
        let (shard, _) = area(2);
        let end = 2 * PAGE;
        for (offset, bytes) in [
            (0, 0),
            (end, 1),
            (end - 1, 2),
            (0, 2 * PAGE as u32 + 1),
            (u64::MAX, 1),
            (u64::MAX - 7, u32::MAX),
            (1 << 63, u32::MAX),
        ] {
            assert!(matches!(shard.range(offset, bytes), Err(Error::Range { .. })), "{offset}+{bytes}");
        }
        for (offset, bytes) in [(0, 1), (0, 2 * PAGE as u32), (end - 1, 1), (13, 100)] {
            assert_eq!(shard.range(offset, bytes).unwrap().len(), bytes as usize);
        }
    }

    #[test]
    #[should_panic(expected = "copy of 9..11 out of 10 bytes")]
    fn a_copy_cannot_leave_its_range() {
        area(1).0.range(0, 10).unwrap().copy_to(9, &mut [0; 2]);
    }

    #[test]
    fn slots_come_back_and_neighbours_merge() {
        let (_, staging) = area(4);
        let slots: Vec<_> = (0..4).map(|_| staging.take(PAGE as usize).unwrap()).collect();
        assert!(staging.take(1).is_none());
        let mut slots = slots.into_iter();
        let (a, b, c, d) =
            (slots.next().unwrap(), slots.next().unwrap(), slots.next().unwrap(), slots.next().unwrap());
        drop((a, c));
        assert!(staging.take(PAGE as usize + 1).is_none(), "two pages, but not side by side");
        drop(b);
        assert_eq!(staging.take(3 * PAGE as usize).unwrap().offset(), 0);
        drop(d);
        assert_eq!((staging.free_bytes(), staging.len()), (4 * PAGE, 4 * PAGE));
        assert_eq!(staging.take(4 * PAGE as usize).unwrap().len(), 4 * PAGE as usize);
        assert!(staging.take(0).is_none() && staging.take(usize::MAX).is_none());
    }

    #[test]
    fn writing_a_slot_is_copying_into_it() {
        let (shard, staging) = area(4);
        let bytes: Vec<u8> = (0..3 * PAGE as u32 + 77).map(|at| (at * 31) as u8).collect();
        for length in [0, 1, 63, 64, 65, 4096, 4097, bytes.len()] {
            let mut slot = staging.take(length.max(1)).unwrap();
            slot.fill(0xee);
            slot.write(&bytes[5.min(length)..length]);
            let wrote = length - 5.min(length);
            assert_eq!(slot[..wrote], bytes[length - wrote..length]);
            assert!(slot[wrote..].iter().all(|byte| *byte == 0xee));
            let mut landed = vec![0; slot.len()];
            shard.range(slot.offset(), slot.len() as u32).unwrap().copy_to(0, &mut landed);
            assert_eq!(landed, slot[..]);
        }
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn more_than_a_slot_cannot_be_written() {
        area(1).1.take(10).unwrap().write(&[0; 11]);
    }

    #[test]
    fn lent_slots_never_overlap() {
        let (_, staging) = area(64);
        let (mut lent, mut state) = (Vec::<StagingSlot>::new(), 7u32);
        for _ in 0..5_000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if state & 0x100 == 0 && !lent.is_empty() {
                lent.swap_remove((state >> 16) as usize % lent.len());
            } else if let Some(slot) = staging.take((state >> 12) as usize % 30_000 + 1) {
                let range = |slot: &StagingSlot| slot.offset()..slot.offset() + slot.len() as u64;
                let mine = range(&slot);
                assert!(mine.end <= 64 * PAGE);
                for other in lent.iter().map(range) {
                    assert!(mine.end <= other.start || other.end <= mine.start);
                }
                lent.push(slot);
            }
        }
        drop(lent);
        assert_eq!(staging.free_bytes(), 64 * PAGE);
    }
}
