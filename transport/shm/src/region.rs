//! The shared memory of one session with one shard: where the indices, the rings and the staging area lie.
//!
//! ```text
//!    0  submission head   (shard writes)      each on its own 128 bytes, so that neither side's writes
//!  128  submission tail   (worker writes)     take the other's line away
//!  256  completion head   (worker writes)
//!  384  completion tail   (shard writes)
//!  512  worker asleep     (worker sets, shard clears)
//!  640  shard asleep      (shard sets, worker clears)
//! 4096  submissions, entries * 64
//!       completions, entries * 64
//!       padding to a page
//!       staging area
//! ```
//! Head and tail run freely over 32 bits; the entry is the number modulo the ring's size. Everything here
//! can be written by the other side at any time, so all of it is read through atomics.

use crate::Error;
use crate::sync::{Arc, AtomicU32, AtomicU64, Ordering};

/// Granularity of the staging area in bytes.
pub const PAGE: u64 = 4096;

/// Sizes of one session's memory with one shard; everything else follows from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    entries: u32,
    staging_bytes: u64,
}

impl Layout {
    /// Fewest entries of a ring.
    pub const ENTRIES_MIN: u32 = 2;
    /// Most entries of a ring.
    pub const ENTRIES_MAX: u32 = 1 << 15;
    /// Largest staging area in bytes.
    pub const STAGING_BYTES_MAX: u64 = 1 << 38;

    /// Rings of `entries` (a power of two) and `staging_bytes` (whole pages, or none).
    pub fn new(entries: u32, staging_bytes: u64) -> Result<Self, Error> {
        let range = Self::ENTRIES_MIN..=Self::ENTRIES_MAX;
        if !entries.is_power_of_two() || !range.contains(&entries) {
            let allowed = "a power of two from 2 to 32768";
            return Err(Error::Limit { what: "ring entries", found: u64::from(entries), allowed });
        }
        if !staging_bytes.is_multiple_of(PAGE) || staging_bytes > Self::STAGING_BYTES_MAX {
            let allowed = "a multiple of 4096 up to 2^38";
            return Err(Error::Limit { what: "staging bytes", found: staging_bytes, allowed });
        }
        Ok(Self { entries, staging_bytes })
    }

    /// Entries of each ring.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Length of the staging area in bytes.
    pub fn staging_bytes(&self) -> u64 {
        self.staging_bytes
    }

    /// Where the staging area begins in the file.
    pub fn staging_offset(&self) -> u64 {
        (PAGE + 2 * 64 * u64::from(self.entries)).next_multiple_of(PAGE)
    }

    /// Length of the whole file in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.staging_offset() + self.staging_bytes
    }
}

/// A value alone on its cache lines.
#[cfg_attr(not(loom), repr(C, align(128)))]
pub(crate) struct Line(pub(crate) AtomicU32);

#[cfg_attr(not(loom), repr(C))]
pub(crate) struct Control {
    pub(crate) submission_head: Line,
    pub(crate) submission_tail: Line,
    pub(crate) completion_head: Line,
    pub(crate) completion_tail: Line,
    pub(crate) worker_asleep: Line,
    pub(crate) shard_asleep: Line,
}

/// Words of an entry. The model checker pays for each one, and one proves as much as eight.
const WORDS: usize = if cfg!(loom) { 1 } else { 8 };

/// One entry of a ring. Relaxed words: a torn entry is the writer's own fault and fails to parse or says
/// something else that the writer could have said.
#[cfg_attr(not(loom), repr(C, align(64)))]
pub(crate) struct Cell([AtomicU64; WORDS]);

impl Cell {
    pub(crate) fn store(&self, entry: &crate::entry::Entry) {
        for (word, bytes) in self.0.iter().zip(entry.chunks_exact(8)) {
            word.store(u64::from_le_bytes(bytes.try_into().expect("eight bytes")), Ordering::Relaxed);
        }
    }

    pub(crate) fn load(&self) -> crate::entry::Entry {
        let mut entry = [0; crate::entry::ENTRY_BYTES];
        for (word, bytes) in self.0.iter().zip(entry.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        entry
    }
}

#[cfg(not(loom))]
pub(crate) use mapped::Region;
#[cfg(not(loom))]
mod mapped {
    use std::os::fd::BorrowedFd;
    use std::ptr::NonNull;

    use rustix::mm::{MapFlags, ProtFlags};

    use super::{Arc, Cell, Control, Error, Layout};

    const _: () = assert!(size_of::<Control>() == 768 && size_of::<Cell>() == 64);

    /// One process's mapping of the memory.
    pub(crate) struct Region {
        base: NonNull<u8>,
        layout: Layout,
    }

    // SAFETY: the mapping belongs to no thread; the shared parts are reached through atomics only, and the
    // staging area is handed out as raw pointers whose users keep the rules of `staging.rs`.
    unsafe impl Send for Region {}
    // SAFETY: as above.
    unsafe impl Sync for Region {}

    impl Region {
        /// Maps `fd`, whose length and seals the caller has checked against `layout`.
        pub(crate) fn map(fd: BorrowedFd<'_>, layout: Layout) -> Result<Arc<Self>, Error> {
            // SAFETY: a fresh shared mapping at an address of the kernel's choice touches nothing of ours.
            // The file cannot shrink (sealed), so no access within `total_bytes` can fault.
            let base = unsafe {
                rustix::mm::mmap(
                    std::ptr::null_mut(),
                    layout.total_bytes() as usize,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED,
                    fd,
                    0,
                )
            }
            .map_err(Error::io("mapping the ring memory"))?;
            let base = NonNull::new(base.cast()).expect("mmap never gives null");
            Ok(Arc::new(Self { base, layout }))
        }

        pub(crate) fn layout(&self) -> Layout {
            self.layout
        }

        pub(crate) fn control(&self) -> &Control {
            // SAFETY: page aligned, inside the mapping, all bit patterns valid, atomics only.
            unsafe { self.base.cast().as_ref() }
        }

        pub(crate) fn submission(&self, number: u32) -> &Cell {
            self.cell(number & (self.layout.entries - 1))
        }

        pub(crate) fn completion(&self, number: u32) -> &Cell {
            self.cell(self.layout.entries + (number & (self.layout.entries - 1)))
        }

        fn cell(&self, index: u32) -> &Cell {
            // SAFETY: `index` is masked to below 2 * entries by both callers, which the layout has room for
            // behind the first page; aligned, all bit patterns valid, atomics only.
            unsafe { self.base.add(super::PAGE as usize).cast::<Cell>().add(index as usize).as_ref() }
        }

        /// The worker's memory, to write into it what a worker never would.
        #[cfg(test)]
        pub(crate) fn map_for_test(worker: &mut crate::WorkerEnd) -> Arc<Self> {
            worker.submitter.region()
        }

        /// Writes `next()` into every word of the control lines, the rings and the staging area.
        #[cfg(test)]
        pub(crate) fn scribble(&self, mut next: impl FnMut() -> u64) {
            for at in (0..self.layout.total_bytes() as usize).step_by(8) {
                // SAFETY: in range and aligned; the control lines and cells are atomics, and the tests that
                // call this hold no reference into the staging area.
                let word = unsafe { self.base.add(at).cast::<super::AtomicU64>().as_ref() };
                word.store(next(), super::Ordering::Relaxed);
            }
        }

        /// First byte of the staging area.
        pub(crate) fn staging(&self) -> NonNull<u8> {
            // SAFETY: inside the mapping, or one past its end when there is no staging area.
            unsafe { self.base.add(self.layout.staging_offset() as usize) }
        }
    }

    impl Drop for Region {
        fn drop(&mut self) {
            // SAFETY: mapped by `map` with this length; every pointer into it lives in something that holds
            // an `Arc` of this.
            let _ =
                unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.layout.total_bytes() as usize) };
        }
    }
}

#[cfg(loom)]
pub(crate) use modelled::Region;
#[cfg(loom)]
mod modelled {
    use super::{Arc, AtomicU32, AtomicU64, Cell, Control, Layout, Line, WORDS};

    /// The same memory on the heap, for the model checker.
    pub(crate) struct Region {
        control: Control,
        cells: Vec<Cell>,
        layout: Layout,
    }

    impl Region {
        pub(crate) fn model(layout: Layout) -> Arc<Self> {
            let line = || Line(AtomicU32::new(0));
            let cell = |_| Cell(std::array::from_fn::<_, WORDS, _>(|_| AtomicU64::new(0)));
            let control = Control {
                submission_head: line(),
                submission_tail: line(),
                completion_head: line(),
                completion_tail: line(),
                worker_asleep: line(),
                shard_asleep: line(),
            };
            Arc::new(Self { control, cells: (0..2 * layout.entries).map(cell).collect(), layout })
        }

        pub(crate) fn layout(&self) -> Layout {
            self.layout
        }

        pub(crate) fn control(&self) -> &Control {
            &self.control
        }

        pub(crate) fn submission(&self, number: u32) -> &Cell {
            &self.cells[(number & (self.layout.entries - 1)) as usize]
        }

        pub(crate) fn completion(&self, number: u32) -> &Cell {
            &self.cells[(self.layout.entries + (number & (self.layout.entries - 1))) as usize]
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn sizes_outside_the_limits_are_refused() {
        for entries in [0, 1, 3, 1 << 16, u32::MAX] {
            assert!(matches!(Layout::new(entries, 0), Err(Error::Limit { what: "ring entries", .. })));
        }
        for bytes in [1, PAGE - 1, (1 << 38) + PAGE, u64::MAX] {
            assert!(matches!(Layout::new(2, bytes), Err(Error::Limit { what: "staging bytes", .. })));
        }
        let layout = Layout::new(64, 3 * PAGE).unwrap();
        assert_eq!((layout.staging_offset(), layout.total_bytes()), (3 * PAGE, 6 * PAGE));
    }
}
