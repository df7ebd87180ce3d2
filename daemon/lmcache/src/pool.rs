//! The file in `/dev/shm` that an engine copies into and out of.
//!
//! The engine maps it by its name and may write all of it at any moment, so it is a place of transit: no block
//! lives here, and the door does not map it at all. It reads and writes with `pread` and `pwrite`, which cannot
//! be made to fault by cutting the file short. Each instance has a file of its own, so that one which writes
//! late, into a slot that it was given long ago, can only spoil what it brings itself.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, FlockOperation, OFlags};

/// Where POSIX shared memory objects are, to whoever opens them by name.
pub const SHM_DIR: &str = "/dev/shm";
/// Slots begin on whole pages.
const PAGE: u64 = 4096;
/// Memory asked of the kernel at a time.
const STEP_BYTES: u64 = 64 << 20;

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// A step failed in the kernel.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody else's.
    #[error("{} is in the way: it {why}; choose another name with lmcache.shm_name", path.display())]
    Taken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
}

fn failed<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> PoolError {
    move |source| PoolError::Io { what, path: path.to_owned(), source: source.into() }
}

/// A file of transit; lends slots. The file is removed with the last handle.
#[derive(Clone, Debug)]
pub struct Pool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Its lock says that it is in use.
    file: File,
    path: PathBuf,
    inode: u64,
    bytes: u64,
    /// Free runs: first byte to length, neighbours merged.
    free: Mutex<BTreeMap<u64, u64>>,
}

impl Pool {
    /// Makes the file anew, with memory behind every page: one that is left over from a daemon that is gone is
    /// removed, never cut or reused, for an engine may still have it mapped.
    pub fn create(path: &Path, bytes: u64, mode: u32) -> Result<Self, PoolError> {
        remove_left_over(path)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(path)
            .map_err(failed("making", path))?;
        let inode = file.metadata().map_err(failed("looking at", path))?.ino();
        let free = Mutex::new(BTreeMap::from([(0, bytes)]));
        let shared = Shared { file, path: path.to_owned(), inode, bytes, free };
        rustix::fs::flock(&shared.file, FlockOperation::NonBlockingLockExclusive)
            .map_err(failed("locking", path))?;
        for at in (0..bytes).step_by(STEP_BYTES as usize) {
            let step = STEP_BYTES.min(bytes - at);
            rustix::fs::fallocate(&shared.file, FallocateFlags::empty(), at, step)
                .map_err(failed("getting memory for", path))?;
        }
        let mode = std::fs::Permissions::from_mode(mode);
        shared.file.set_permissions(mode).map_err(failed("setting the mode of", path))?;
        Ok(Self(Arc::new(shared)))
    }

    /// A slot of `bytes`; `None` while no run of free pages is long enough.
    pub fn take(&self, bytes: u64) -> Option<Slot> {
        let room = bytes.checked_next_multiple_of(PAGE).filter(|room| *room > 0)?;
        let mut free = self.0.free();
        let (offset, length) =
            free.iter().find(|(_, length)| **length >= room).map(|(at, length)| (*at, *length))?;
        free.remove(&offset);
        if length > room {
            free.insert(offset + room, length - room);
        }
        drop(free);
        Some(Slot { pool: Arc::clone(&self.0), offset, bytes })
    }

    /// Slots of `bytes` that an empty pool has.
    pub fn slots(&self, bytes: u64) -> u64 {
        self.0.bytes / bytes.max(1).next_multiple_of(PAGE)
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.0.bytes
    }

    /// Whether it has no room at all.
    pub fn is_empty(&self) -> bool {
        self.0.bytes == 0
    }

    /// Bytes not lent.
    pub fn free_bytes(&self) -> u64 {
        self.0.free().values().sum()
    }
}

/// Removes the pool file of a daemon that is gone. Fine when there is none.
pub(crate) fn remove_left_over(path: &Path) -> Result<(), PoolError> {
    let taken = |why| Err(PoolError::Taken { path: path.to_owned(), why });
    let found = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found.map_err(failed("looking at", path))?,
    };
    if !found.is_file() {
        return taken("is no plain file");
    }
    if found.uid() != rustix::process::geteuid().as_raw() {
        return taken("belongs to another user");
    }
    let open = OpenOptions::new().read(true).custom_flags(OFlags::NOFOLLOW.bits() as i32).open(path);
    let file = match open {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        open => open.map_err(failed("opening", path))?,
    };
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return taken("is in use by another daemon");
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.map_err(failed("removing", path)),
    }
}

impl Shared {
    fn free(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, u64>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_back(&self, mut offset: u64, mut length: u64) {
        let mut free = self.free();
        if let Some((before, run)) = free.range(..offset).next_back().map(|(at, length)| (*at, *length))
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

impl Drop for Shared {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A run of the pool, lent once until dropped. Its bytes may change at any moment: judge what was read.
#[derive(Debug)]
pub struct Slot {
    pool: Arc<Shared>,
    offset: u64,
    bytes: u64,
}

impl Slot {
    /// Where it begins in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Fills `to` with the bytes from `at` on.
    pub fn read(&self, at: usize, to: &mut [u8]) -> io::Result<()> {
        self.pool.file.read_exact_at(to, self.place(at, to.len())?)
    }

    /// Writes `from` at `at`.
    pub fn write(&self, at: usize, from: &[u8]) -> io::Result<()> {
        self.pool.file.write_all_at(from, self.place(at, from.len())?)
    }

    fn place(&self, at: usize, bytes: usize) -> io::Result<u64> {
        let end = (at as u64).checked_add(bytes as u64);
        match end.is_some_and(|end| end <= self.bytes) {
            true => Ok(self.offset + at as u64),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, "outside the slot")),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pool.give_back(self.offset, self.bytes.next_multiple_of(PAGE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("pool");
        (temp, path)
    }

    #[test]
    fn slots_are_lent_once_and_merge_when_they_come_back() {
        let (_temp, path) = place();
        let pool = Pool::create(&path, 8 * PAGE, 0o600).unwrap();
        assert_eq!((pool.slots(PAGE + 1), pool.slots(PAGE)), (4, 8));
        let slots: Vec<_> = (0..4).map(|_| pool.take(PAGE + 1).unwrap()).collect();
        assert!(pool.take(1).is_none());
        let offsets: Vec<_> = slots.iter().map(Slot::offset).collect();
        assert_eq!(offsets, [0, 2 * PAGE, 4 * PAGE, 6 * PAGE]);
        slots[1].write(0, &[7; 4097]).unwrap();
        let mut read = [0; 2];
        slots[1].read(4095, &mut read).unwrap();
        assert_eq!(read, [7, 7]);
        assert!(slots[1].write(4096, &[7; 2]).is_err() && slots[1].read(usize::MAX, &mut read).is_err());
        drop(slots);
        assert_eq!(pool.free_bytes(), 8 * PAGE);
        assert!(pool.take(8 * PAGE).is_some());
        assert!(pool.take(0).is_none() && pool.take(u64::MAX).is_none());
    }

    #[test]
    fn a_file_left_over_is_replaced_and_whoever_maps_it_keeps_what_it_maps() {
        let (_temp, path) = place();
        std::fs::write(&path, vec![9; 3 * PAGE as usize]).unwrap();
        let mapped = File::open(&path).unwrap();
        let pool = Pool::create(&path, PAGE, 0o640).unwrap();
        assert_eq!(mapped.metadata().unwrap().len(), 3 * PAGE, "not cut under its readers");
        let made = std::fs::metadata(&path).unwrap();
        assert_eq!((made.len(), made.mode() & 0o777), (PAGE, 0o640));
        assert!(made.blocks() * 512 >= PAGE, "there is memory behind it");
        let refused = Pool::create(&path, PAGE, 0o600).unwrap_err();
        assert!(matches!(refused, PoolError::Taken { .. }), "{refused}");
        drop(pool);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_pool_is_left_alone() {
        let (temp, path) = place();
        std::os::unix::fs::symlink(temp.path().join("elsewhere"), &path).unwrap();
        assert!(matches!(Pool::create(&path, PAGE, 0o600), Err(PoolError::Taken { .. })));
        assert!(std::fs::symlink_metadata(&path).unwrap().is_symlink());
    }

    #[test]
    fn a_file_cut_short_is_an_error_and_nothing_worse() {
        let (_temp, path) = place();
        let pool = Pool::create(&path, PAGE, 0o600).unwrap();
        let slot = pool.take(PAGE).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
        assert!(slot.read(0, &mut [0; 8]).is_err());
    }
}
