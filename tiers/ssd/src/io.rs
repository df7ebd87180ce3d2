//! What the log asks of a device: reads and writes of whole pages and syncs, queued and completed out of
//! order. Three engines answer: [`crate::ring`] (io_uring), [`crate::threads`] (pread and pwrite) and
//! [`crate::sim`] (memory, with faults on demand).
//!
//! An operation names its memory by address, so that a block goes to the device from where it lies. The
//! log keeps the owner of that memory in a table until the engine gives the completion: this is the one
//! rule that [`BlockIo::submit`] is unsafe for.

use std::alloc::Layout;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use crate::files::SegmentFile;
use crate::segment::PAGE_BYTES;

/// The number under which the health probe's file is attached; no segment has it.
pub(crate) const PROBE_FILE: u32 = u32::MAX;

/// Memory of an operation: an address and a length, owned by whoever submitted it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub(crate) address: *mut u8,
    pub(crate) bytes: u32,
}

// SAFETY: it is a number to Rust; only an engine turns it back into memory, under the contract of
// `BlockIo::submit`.
unsafe impl Send for Memory {}

impl Memory {
    /// What is left of it behind the first `bytes`.
    pub(crate) fn skip(self, bytes: u32) -> Self {
        assert!(bytes <= self.bytes);
        Self { address: self.address.wrapping_add(bytes as usize), bytes: self.bytes - bytes }
    }
}

/// What to do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum IoKind {
    /// Fill the memory from `offset` of the file.
    Read { offset: u64, memory: Memory },
    /// Write the memory to `offset` of the file.
    Write { offset: u64, memory: Memory },
    /// Make what was written durable.
    Sync,
}

/// One operation on one attached file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IoOp {
    pub(crate) token: u64,
    pub(crate) segment: u32,
    pub(crate) kind: IoKind,
}

/// How an operation ended: bytes moved, or the operating system's error number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct IoDone {
    pub(crate) token: u64,
    pub(crate) result: Result<u32, i32>,
}

/// Ends a wait of the engine from another thread.
pub(crate) type Waker = Arc<dyn Fn() + Send + Sync>;

/// How far an engine's preparation got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Prepared {
    /// There is more to do at once.
    More,
    /// There is more, but what it needs is not there yet.
    Later,
    /// Nothing is left.
    All,
}

/// A device engine, used by one thread.
pub(crate) trait BlockIo: Send {
    /// Makes `file` known as number `segment`, in place of what had that number.
    fn attach(&mut self, segment: u32, file: SegmentFile);
    /// Forgets a file. Nothing of it may be in flight.
    fn detach(&mut self, segment: u32);
    /// Takes all of `ops`.
    ///
    /// # Safety
    /// The memory of each operation is valid, is written by nobody else and, for a read, read by nobody
    /// else, until the completion with its token was handed out.
    unsafe fn submit(&mut self, ops: &mut Vec<IoOp>);
    /// Moves what has completed into `done`. When nothing has, waits for at most `wait` (for ever when
    /// that is `Duration::MAX`) or until the waker is called; may return empty-handed.
    fn completions(&mut self, wait: Duration, done: &mut Vec<IoDone>);
    /// Does one piece of slow preparation that makes what follows cheaper. What could not be had is told in
    /// `notes`.
    fn prepare(&mut self, notes: &mut Vec<String>) -> Prepared {
        let _ = notes;
        Prepared::All
    }
    /// What ends the wait from another thread.
    fn waker(&self) -> Waker;
    /// Monotonic time since some fixed moment.
    fn now(&self) -> Duration;
}

/// Page-aligned memory of our own, zero at first.
pub(crate) struct Pages {
    address: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its memory alone, like a boxed slice.
unsafe impl Send for Pages {}

impl Pages {
    pub(crate) fn new(bytes: usize) -> Self {
        let bytes = bytes.next_multiple_of(PAGE_BYTES).max(PAGE_BYTES);
        let layout = Self::layout(bytes);
        // SAFETY: the layout is not empty.
        let address = unsafe { std::alloc::alloc_zeroed(layout) };
        let Some(address) = NonNull::new(address) else { std::alloc::handle_alloc_error(layout) };
        Self { address, bytes }
    }

    /// The first `bytes` of it as an operation's memory.
    pub(crate) fn memory(&mut self, bytes: usize) -> Memory {
        assert!(bytes <= self.bytes);
        Memory { address: self.address.as_ptr(), bytes: bytes as u32 }
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, PAGE_BYTES).expect("a length far below isize::MAX")
    }
}

impl std::ops::Deref for Pages {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: address and length are those of our allocation, which was zeroed.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), self.bytes) }
    }
}

impl std::ops::DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and we are borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), self.bytes) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.address.as_ptr(), Self::layout(self.bytes)) };
    }
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pages({} bytes)", self.bytes)
    }
}

/// The operating system's number of an error; EIO when it has none.
pub(crate) fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// A table of things in flight. A token names its place and how often the place was used, so a completion
/// is never taken for another's.
pub(crate) struct Table<T> {
    places: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
    len: usize,
}

impl<T> Table<T> {
    pub(crate) fn new() -> Self {
        Self { places: Vec::new(), free: Vec::new(), len: 0 }
    }

    pub(crate) fn insert(&mut self, value: T) -> u64 {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push((0, None));
            self.places.len() as u32 - 1
        });
        let (uses, slot) = &mut self.places[place as usize];
        *uses = uses.wrapping_add(1);
        *slot = Some(value);
        self.len += 1;
        u64::from(*uses) << 32 | u64::from(place)
    }

    pub(crate) fn get_mut(&mut self, token: u64) -> Option<&mut T> {
        let (uses, slot) = self.places.get_mut(token as u32 as usize)?;
        if *uses == (token >> 32) as u32 { slot.as_mut() } else { None }
    }

    pub(crate) fn get(&self, token: u64) -> Option<&T> {
        let (uses, slot) = self.places.get(token as u32 as usize)?;
        if *uses == (token >> 32) as u32 { slot.as_ref() } else { None }
    }

    pub(crate) fn remove(&mut self, token: u64) -> Option<T> {
        let (uses, slot) = self.places.get_mut(token as u32 as usize)?;
        if *uses != (token >> 32) as u32 {
            return None;
        }
        let value = slot.take()?;
        self.free.push(token as u32);
        self.len -= 1;
        Some(value)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.places.iter_mut().filter_map(|(_, slot)| slot.as_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_place_has_another_token() {
        let mut table = Table::new();
        let first = table.insert('a');
        assert_eq!(table.remove(first), Some('a'));
        let second = table.insert('b');
        assert_ne!(first, second);
        assert_eq!((table.remove(first), table.get(second), table.len()), (None, Some(&'b'), 1));
    }

    #[test]
    fn pages_are_aligned_and_zero() {
        let mut pages = Pages::new(PAGE_BYTES + 1);
        assert_eq!(pages.len(), 2 * PAGE_BYTES);
        assert!(pages.iter().all(|byte| *byte == 0));
        assert_eq!(pages.memory(8).address as usize % PAGE_BYTES, 0);
    }
}
