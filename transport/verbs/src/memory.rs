//! The arenas as a device sees them: registered piece after piece, as they get memory.
//!
//! ```text
//! arena      | region | region | region | region | (holes)       registered up to here, the rest follows
//! device     |<------- piece, lkey ----->| piece |               addresses count from the arena's start, not ours
//! ```
//! A piece is for local use and for binding windows: the device writes what it reads from peers into it, and no
//! peer has a key for it. Pages of a hole are not touched: pinning would have to bring them, from a file system
//! that may be full, so a region waits until the slab says that it is backed.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use kv_arena::Slab;

use crate::handles::{Mr, MrRef, Pd};
use crate::sys;

/// Longest piece. A device keeps few keys in its cache, so long ones are better; pinning 1 GiB takes some 300 ms
/// with pages of 4 KiB, on a thread of its own.
const PIECE_BYTES: u64 = 1 << 30;
/// Pause before a region that has no memory yet is looked at again.
const PAUSE: Duration = Duration::from_millis(100);

struct Arena {
    slab: Slab,
    address: usize,
    /// Where the device sees it.
    base: u64,
    /// Bytes from the front that are registered.
    done: AtomicU64,
    /// How many more had memory at the last look: when they stay as many, they are registered as they are.
    seen: AtomicU64,
}

struct Piece {
    start: usize,
    end: usize,
    base: u64,
    region: Mr,
}

/// Where some bytes lie for the device. Good as long as the [`Memory`] that said it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) at: u64,
    pub(crate) local_key: u32,
    pub(crate) region: MrRef,
}

/// Registered memory.
pub(crate) struct Memory {
    /// Ascending. Before `arenas`: a region ends before the mapping that it pins may.
    pieces: RwLock<Vec<Piece>>,
    arenas: Vec<Arena>,
    pd: Arc<Pd>,
    notes: Mutex<Vec<String>>,
}

/// What one step came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Progress {
    All,
    More,
    Later,
}

impl Memory {
    /// The arenas, each with its first piece registered if it has memory.
    pub(crate) fn new(pd: &Arc<Pd>, slabs: &[Slab]) -> io::Result<Arc<Self>> {
        let mut base = 1 << 40;
        let arenas = slabs.iter().map(|slab| {
            let address = slab.data_range().cast::<u8>().as_ptr() as usize;
            let arena =
                Arena { slab: slab.clone(), address, base, done: AtomicU64::new(0), seen: AtomicU64::new(0) };
            base += (slab.data_bytes() + PIECE_BYTES).next_multiple_of(PIECE_BYTES);
            arena
        });
        let memory = Self {
            pieces: RwLock::default(),
            arenas: arenas.collect(),
            pd: Arc::clone(pd),
            notes: Mutex::default(),
        };
        for arena in &memory.arenas {
            memory.step(arena)?;
        }
        Ok(Arc::new(memory))
    }

    /// Registers the rest, until all of it is or `stopped` says so.
    pub(crate) fn register_all(&self, stopped: impl Fn(Duration) -> bool) {
        loop {
            let mut all = Progress::All;
            for arena in &self.arenas {
                match self.step(arena) {
                    Ok(Progress::All) => {}
                    Ok(Progress::More) => all = Progress::More,
                    Ok(Progress::Later) if all == Progress::All => all = Progress::Later,
                    Ok(Progress::Later) => {}
                    Err(error) => {
                        let missing = arena.slab.data_bytes() - arena.done.load(Ordering::Relaxed);
                        self.note(format!(
                            "{} MiB of host memory could not be registered for RDMA ({error}) and go by TCP; raise \
                             `ulimit -l` (LimitMEMLOCK=infinity) or give CAP_IPC_LOCK",
                            missing >> 20
                        ));
                        return;
                    }
                }
            }
            let pause = if all == Progress::Later { PAUSE } else { Duration::ZERO };
            if all == Progress::All || stopped(pause) {
                return;
            }
        }
    }

    fn step(&self, arena: &Arena) -> io::Result<Progress> {
        let (from, region) = (arena.done.load(Ordering::Relaxed), arena.slab.region_bytes());
        let missing = arena.slab.data_bytes() - from;
        if missing == 0 {
            return Ok(Progress::All);
        }
        let most = (PIECE_BYTES / region).max(1) * region;
        let most = most.min(missing);
        let mut bytes = 0;
        while bytes < most && arena.slab.is_backed(from + bytes, region) {
            bytes += region;
        }
        if bytes == 0 || (bytes < most && arena.seen.swap(bytes, Ordering::Relaxed) != bytes) {
            return Ok(Progress::Later);
        }
        let start = arena.address + from as usize;
        let access = sys::ACCESS_LOCAL_WRITE | sys::ACCESS_MW_BIND;
        // SAFETY: within the mapping, which the slab keeps as long as this memory does (`arenas`). Everything in
        // it is reached through slots and held blocks, which belong to a request while it is under way (`flow`).
        let mr = unsafe { Mr::new(&self.pd, start, bytes as usize, arena.base + from, access) }?;
        let piece = Piece { start, end: start + bytes as usize, base: arena.base + from, region: mr };
        let mut pieces = self.pieces.write().unwrap_or_else(PoisonError::into_inner);
        let at = pieces.partition_point(|piece| piece.start < start);
        pieces.insert(at, piece);
        arena.done.store(from + bytes, Ordering::Relaxed);
        arena.seen.store(0, Ordering::Relaxed);
        Ok(if bytes == missing { Progress::All } else { Progress::More })
    }

    /// Where the device sees these bytes; `None` while they are not registered, or when they are of no arena.
    pub(crate) fn place(&self, bytes: &[u8]) -> Option<Place> {
        let (start, end) = (bytes.as_ptr() as usize, bytes.as_ptr() as usize + bytes.len());
        let pieces = self.pieces.read().unwrap_or_else(PoisonError::into_inner);
        let piece = &pieces[pieces.partition_point(|piece| piece.start <= start).checked_sub(1)?];
        (end <= piece.end).then(|| Place {
            at: piece.base + (start - piece.start) as u64,
            local_key: piece.region.local_key(),
            region: piece.region.name(),
        })
    }

    /// Registers one block for the queue pairs of `pd` to be read by, where there are no windows.
    ///
    /// # Safety
    /// The bytes stay mapped and unwritten until the region is closed.
    pub(crate) unsafe fn region(pd: &Arc<Pd>, start: usize, bytes: usize, at: u64) -> io::Result<Mr> {
        // SAFETY: by the contract of this function.
        unsafe { Mr::new(pd, start, bytes, at, sys::ACCESS_REMOTE_READ) }
    }

    /// Registers memory of another device.
    pub(crate) fn dmabuf(&self, fd: BorrowedFd<'_>, offset: u64, bytes: usize) -> io::Result<Mr> {
        Mr::dmabuf(&self.pd, fd, offset, bytes, sys::ACCESS_LOCAL_WRITE | sys::ACCESS_MW_BIND)
    }

    pub(crate) fn registered_bytes(&self) -> u64 {
        self.arenas.iter().map(|arena| arena.done.load(Ordering::Relaxed)).sum()
    }

    pub(crate) fn note(&self, note: String) {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).push(note);
    }

    pub(crate) fn notes(&self) -> Vec<String> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
