//! A shared mapping of a file, unmapped on drop.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::sync::AtomicU64;

/// `len` bytes of a file, shared with every other process that maps it.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is an address range owned by this value. What may be touched through it from several
// threads is atomics (`words`) or ranges whose owner the slot protocol decides (`range`).
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `file`. The caller has checked that the file is that long.
    pub(crate) fn new(file: impl AsFd, len: usize, writable: bool) -> io::Result<Self> {
        let rights = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let file: BorrowedFd<'_> = file.as_fd();
        // SAFETY: a fresh address range chosen by the kernel; nothing of ours lies there.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, rights, MapFlags::SHARED, file, 0) }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// `N` words at `offset`, which must be a multiple of eight and leave room for them.
    #[inline]
    pub(crate) fn words<const N: usize>(&self, offset: usize) -> &[AtomicU64; N] {
        assert!(offset.is_multiple_of(8) && offset <= self.len && self.len - offset >= N * 8);
        // SAFETY: in range and aligned (just checked; mmap gives page alignment). Every access to these
        // bytes, here and in other processes, is atomic; the mapping lives as long as the borrow.
        unsafe { &*self.start.as_ptr().add(offset).cast::<[AtomicU64; N]>() }
    }

    /// The word at `offset`.
    #[inline]
    pub(crate) fn word(&self, offset: usize) -> &AtomicU64 {
        let [word] = self.words::<1>(offset);
        word
    }

    /// Address of `len` bytes at `offset`, checked to lie inside.
    #[inline]
    pub(crate) fn range(&self, offset: usize, len: usize) -> NonNull<u8> {
        assert!(offset <= self.len && self.len - offset >= len);
        // SAFETY: inside the mapping, just checked.
        unsafe { self.start.add(offset) }
    }

    /// Asks the processor to bring the cache line at `offset` near. Never faults, whatever the offset.
    #[inline]
    pub(crate) fn prefetch(&self, offset: usize) {
        let at = self.start.as_ptr().wrapping_add(offset);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch is a hint; it neither faults nor changes what the program sees.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = at;
    }

    /// Gives the kernel advice about the whole range.
    pub(crate) fn advise(&self, advice: Advice) -> io::Result<()> {
        self.advise_range(0, self.len, advice)
    }

    /// Gives the kernel advice about `len` bytes at `offset`.
    pub(crate) fn advise_range(&self, offset: usize, len: usize, advice: Advice) -> io::Result<()> {
        let start = self.range(offset, len).as_ptr().cast::<c_void>();
        debug_assert!(!matches!(advice, Advice::LinuxDontNeed | Advice::LinuxRemove));
        // SAFETY: only advice that keeps contents is passed (checked in debug builds; callers are ours).
        Ok(unsafe { rustix::mm::madvise(start, len, advice) }?)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and whoever borrowed from it kept this value alive. A failure would
        // mean the range is not mapped, which leaves nothing to do.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
