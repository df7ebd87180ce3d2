//! The data directory: names, whole small files and the opening of segments. Everything here blocks; the
//! store calls it while opening, and from a helper thread afterwards.
//!
//! ```text
//! kvd.format              one per directory, text; see [`crate::format`]
//! segment-00000012.kv     a segment
//! segment-00000012.new    a segment being made; removed when found
//! segment-00000012.kv.aside-1, aside-1/    kept, never read
//! kvd.probe               two pages that a sick device is tried on
//! ```
//! An exclusive `flock` on the directory itself keeps a second daemon out. Each open segment is locked too,
//! and for another reason: the kernel's requests hold on to the open file, so the lock outlives a killed
//! daemon until the last of its writes has landed, and the next daemon waits for that.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags};

use crate::format::FORMAT_FILE;
use crate::io::Pages;
use crate::segment::PAGE_BYTES;

/// How long opening waits for what an earlier process has in flight, over all files.
const LANDING_LIMIT: Duration = Duration::from_secs(10);

/// An open segment, as its engine knows it.
#[derive(Clone, Debug)]
pub(crate) enum SegmentFile {
    /// A file of the operating system.
    Os(Arc<File>),
    /// A file of a simulated disk.
    Sim(u64),
}

/// What the store needs of a directory.
pub(crate) trait Directory: Send + Sync {
    /// Names of everything in it.
    fn names(&self) -> io::Result<Vec<String>>;
    /// A whole small file.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Replaces a whole small file, durably.
    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// Renames durably; never over something that exists.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file, durably.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes a directory within.
    fn make_dir(&self, name: &str) -> io::Result<()>;
    /// Opens a file for page I/O, with its length in bytes.
    fn open(&self, name: &str) -> io::Result<(SegmentFile, u64)>;
    /// Makes a file of `bytes` that begins with `head` and is zero behind it, allocated and durable; any
    /// file of that name is replaced. `scratch` is a name to use meanwhile.
    fn create(&self, name: &str, scratch: &str, bytes: u64, head: &[u8]) -> io::Result<SegmentFile>;
    /// Whether it is where it was, so that a later life finds what is written.
    fn is_there(&self) -> bool;
    /// What an operator may want to know, with the switch that changes it.
    fn notes(&self) -> Vec<String>;
}

/// A directory of the operating system, locked.
pub(crate) struct OsDirectory {
    directory: File,
    path: PathBuf,
    direct: bool,
    opened: Instant,
    /// Device and inode of what stood at the path.
    identity: Option<(u64, u64)>,
}

impl OsDirectory {
    /// Opens and locks `path`, making it when it is missing. `WouldBlock` when another daemon has it.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let directory = File::open(path)?;
        rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
        let mut opened =
            Self { directory, path: path.to_owned(), direct: true, opened: Instant::now(), identity: None };
        opened.direct = opened.probe_direct()?;
        // After the first file was made there: a layered file system may give the directory its number then.
        opened.identity = identity(path).ok();
        Ok(opened)
    }

    /// Whether the file system takes direct I/O of our pages.
    fn probe_direct(&self) -> io::Result<bool> {
        let name = "kvd.direct";
        let _ = rustix::fs::unlinkat(&self.directory, name, AtFlags::empty());
        let made = self.openat(name, OFlags::CREATE | OFlags::DIRECT);
        let direct = match made {
            Ok(file) => {
                let page = Pages::new(PAGE_BYTES);
                rustix::io::pwrite(&file, &page, 0).is_ok_and(|n| n == PAGE_BYTES)
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => false,
            Err(error) => return Err(error),
        };
        rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())?;
        Ok(direct)
    }

    fn openat(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(File::from(rustix::fs::openat(&self.directory, name, flags, Mode::from_raw_mode(0o600))?))
    }

    /// Waits until nobody else, living or not, has requests in flight on the file.
    fn lock_file(&self, file: &File) -> io::Result<()> {
        loop {
            match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) if self.opened.elapsed() < LANDING_LIMIT => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(io::Error::other("an earlier process still has requests in flight on it"));
                }
                // A file system that knows no locks.
                Ok(()) | Err(_) => return Ok(()),
            }
        }
    }

    fn page_flags(&self) -> OFlags {
        if self.direct { OFlags::DIRECT } else { OFlags::empty() }
    }

    fn settle(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.directory)?)
    }
}

impl Directory for OsDirectory {
    fn names(&self) -> io::Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.path)?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = rustix::fs::openat(
            &self.directory,
            name,
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::empty(),
        )?;
        // Small files only: whatever calls itself a format file and is longer is not one.
        io::Read::read_to_end(&mut io::Read::take(File::from(file), 1 << 16), &mut bytes)?;
        Ok(bytes)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let scratch = format!("{name}.new");
        let mut file = self.openat(&scratch, OFlags::CREATE | OFlags::TRUNC)?;
        io::Write::write_all(&mut file, bytes)?;
        file.sync_all()?;
        rustix::fs::renameat(&self.directory, &scratch, &self.directory, name)?;
        self.settle()
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        rustix::fs::renameat_with(&self.directory, from, &self.directory, to, RenameFlags::NOREPLACE)?;
        self.settle()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        rustix::fs::unlinkat(&self.directory, name, AtFlags::empty())?;
        self.settle()
    }

    fn make_dir(&self, name: &str) -> io::Result<()> {
        rustix::fs::mkdirat(&self.directory, name, Mode::from_raw_mode(0o700))?;
        self.settle()
    }

    fn open(&self, name: &str) -> io::Result<(SegmentFile, u64)> {
        let file = self.openat(name, self.page_flags())?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.lock_file(&file)?;
        Ok((SegmentFile::Os(Arc::new(file)), metadata.len()))
    }

    fn create(&self, name: &str, scratch: &str, bytes: u64, head: &[u8]) -> io::Result<SegmentFile> {
        let made = (|| {
            let file = self.openat(scratch, OFlags::CREATE | OFlags::TRUNC | self.page_flags())?;
            self.lock_file(&file)?;
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
                // A file system without preallocation: the length alone, and the room when it is used.
                Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes)?,
                done => done?,
            }
            let mut page = Pages::new(head.len());
            page[..head.len()].copy_from_slice(head);
            if rustix::io::pwrite(&file, &page, 0)? != page.len() {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            file.sync_all()?;
            rustix::fs::renameat(&self.directory, scratch, &self.directory, name)?;
            self.settle()?;
            Ok(file)
        })();
        if made.is_err() {
            let _ = rustix::fs::unlinkat(self.directory.as_fd(), scratch, AtFlags::empty());
        }
        Ok(SegmentFile::Os(Arc::new(made?)))
    }

    fn is_there(&self) -> bool {
        let gone = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        };
        let format = || rustix::fs::statat(&self.directory, FORMAT_FILE, AtFlags::SYMLINK_NOFOLLOW);
        match identity(&self.path).and_then(|found| Ok((found, format()?))) {
            Ok((found, _)) => self.identity.is_none_or(|identity| identity == found),
            // Any other error is the device's, and told when it is used.
            Err(error) => !gone(&error),
        }
    }

    fn notes(&self) -> Vec<String> {
        if self.direct {
            return Vec::new();
        }
        vec![format!(
            "{}: its file system refuses direct I/O, so blocks pass through the page cache; use ext4 or xfs \
             on a local disk",
            self.path.display()
        )]
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = std::fs::metadata(path)?;
    Ok((found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let first = OsDirectory::open(dir.path()).unwrap();
        let second = OsDirectory::open(dir.path()).map(|_| ()).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::WouldBlock);
        drop(first);
        OsDirectory::open(dir.path()).unwrap();
    }

    #[test]
    fn nobody_else_can_read_what_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("principal-b/shard-0");
        let directory = OsDirectory::open(&path).unwrap();
        directory.write("kvd.format", b"one").unwrap();
        directory.create("segment-00000001.kv", "segment-00000001.new", 1 << 20, b"head").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(path.parent().unwrap()), mode(&path)), (0o700, 0o700));
        for name in ["kvd.format", "segment-00000001.kv"] {
            assert_eq!(mode(&path.join(name)), 0o600, "{name}");
        }
    }

    #[test]
    fn files_are_made_whole_and_renamed_never_over_another() {
        let dir = tempfile::tempdir().unwrap();
        let directory = OsDirectory::open(dir.path()).unwrap();
        directory.write("kvd.format", b"one").unwrap();
        directory.write("kvd.format", b"two").unwrap();
        assert_eq!(directory.read("kvd.format").unwrap(), b"two");
        directory.create("segment-00000001.kv", "segment-00000001.new", 1 << 20, b"head").unwrap();
        let (_, bytes) = directory.open("segment-00000001.kv").unwrap();
        assert_eq!(bytes, 1 << 20);
        assert!(directory.rename("kvd.format", "segment-00000001.kv").is_err());
        let mut names = directory.names().unwrap();
        names.sort();
        assert_eq!(names, ["kvd.format", "segment-00000001.kv"]);
    }
}
