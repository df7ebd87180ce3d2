//! Puts memory behind an arena, region after region, while it already serves.
//!
//! ```text
//! data file  | region 0 | region 1 | region 2 | region 3 | region 4 | ...
//!            '---- handed out -----'---------'--- holes: nobody touches them
//!                                   allocated now
//! ```
//! A touch of a hole takes a page, and when the file system has none left it is a SIGBUS, in the daemon or in a
//! worker. So a region belongs to nobody until all of its pages are there: [`Grower::step`] allocates, the
//! [`Backed`] it gives is the proof, and only `Slab::grown` turns that into slots. What cannot be allocated is
//! never handed out, and the arena is smaller.
//!
//! Regions come in order, so one number says how far an earlier life got; it stands in the meta file. It is
//! stored after the pages came: a kill in between costs a look at pages that are there already.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mm::Advice;

use crate::Error;
use crate::map::Mapping;
use crate::meta::{GROWN_OFFSET, HUGE_PAGE, grown_word};
use crate::numa;
use crate::slab::Slab;
use crate::sync::Ordering;

/// Most bytes that one step allocates: some 10 ms, after which it can be told to stop.
const STEP_BYTES: u64 = 32 << 20;

/// How pages come to a data file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pages {
    /// From a hugetlbfs with pages of this many bytes.
    Hugetlb(u64),
    /// From a tmpfs, which gives huge ones only when they are touched through an advised mapping.
    Touched,
    /// From a tmpfs, 4 KiB each.
    Ordinary,
}

/// Regions with memory behind every page, to be handed out with [`Slab::grown`].
#[derive(PartialEq, Eq, Debug)]
pub struct Backed {
    pub(crate) regions: Range<u32>,
}

impl Backed {
    /// How many. None while a region is longer than a step.
    pub fn len(&self) -> u32 {
        self.regions.end - self.regions.start
    }

    /// Whether no region was completed.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }
}

/// Allocates what an arena lacks. Belongs to a thread of its own: a step blocks.
#[derive(Debug)]
pub struct Grower {
    slab: Slab,
    file: File,
    path: PathBuf,
    pages: Pages,
    /// Bytes from the front that have memory.
    done: u64,
}

impl Grower {
    pub(crate) fn new(slab: Slab, file: File, path: PathBuf, pages: Pages, done: u64) -> Self {
        Self { slab, file, path, pages, done }
    }

    /// Bytes that it has yet to allocate.
    pub fn missing_bytes(&self) -> u64 {
        self.slab.data_bytes() - self.done
    }

    /// Bytes that its file system must still have free for that; none where they are set apart already.
    pub fn unclaimed_bytes(&self) -> u64 {
        if matches!(self.pages, Pages::Hugetlb(_)) { 0 } else { self.missing_bytes() }
    }

    /// Allocates the next piece and gives the regions that are whole now; `None` when nothing is missing. On
    /// an error the arena keeps what it has; another try begins where this one failed.
    pub fn step(&mut self) -> Result<Option<Backed>, Error> {
        let (missing, region_bytes) = (self.missing_bytes(), self.slab.region_bytes());
        if missing == 0 {
            return Ok(None);
        }
        let shared = self.slab.shared();
        let place = Place { file: &self.file, path: &self.path, map: &shared.data, pages: self.pages };
        place.back(self.done, missing.min(STEP_BYTES)).map_err(|error| match error {
            // What was asked for in one step says nothing; what is missing does.
            Error::NoSpace { path, free, fix, .. } => Error::NoSpace { path, bytes: missing, free, fix },
            other => other,
        })?;
        let before = self.done / region_bytes;
        self.done += missing.min(STEP_BYTES);
        let regions = before as u32..(self.done / region_bytes) as u32;
        shared.meta.word(GROWN_OFFSET).store(grown_word(regions.end), Ordering::Release);
        Ok(Some(Backed { regions }))
    }
}

/// A data file and its mapping, bound and advised already.
pub(crate) struct Place<'a> {
    pub(crate) file: &'a File,
    pub(crate) path: &'a Path,
    pub(crate) map: &'a Mapping,
    pub(crate) pages: Pages,
}

impl Place<'_> {
    /// Puts memory behind a range. What has pages keeps them and what they hold.
    pub(crate) fn back(&self, offset: u64, bytes: u64) -> Result<(), Error> {
        if self.pages == Pages::Touched {
            // Only a fault through an advised mapping brings huge pages. What does not come so (the file system
            // is full, memory is in pieces) comes below, or is an error there instead of a signal later.
            let _ = self.map.advise_range(offset as usize, bytes as usize, Advice::LinuxPopulateWrite);
        }
        allocate(self.file, self.path, offset, bytes).map_err(|error| match (error, self.pages) {
            (Error::NoSpace { path, bytes, .. }, Pages::Hugetlb(page_bytes)) => {
                let (kib, more) = (page_bytes >> 10, bytes.div_ceil(page_bytes));
                let fix = format!(
                    "add {more} to /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages, and restart"
                );
                Error::NoSpace {
                    path,
                    bytes,
                    free: numa::free_huge_pages(page_bytes, None) * page_bytes,
                    fix,
                }
            }
            (other, _) => other,
        })
    }

    /// Puts memory behind the front, for a start: about `ready_bytes`, whole pages of any size. Gives how much.
    pub(crate) fn back_front(&self, ready_bytes: u64) -> Result<u64, Error> {
        let all = self.map.len() as u64;
        let unit = if let Pages::Hugetlb(page_bytes) = self.pages { page_bytes } else { HUGE_PAGE };
        let front = ready_bytes.min(all).max(1).next_multiple_of(unit).min(all);
        for offset in (0..front).step_by(STEP_BYTES as usize) {
            self.back(offset, (front - offset).min(STEP_BYTES))?;
        }
        Ok(front)
    }
}

/// The error of a file system that is full, with what can be done about it.
pub(crate) fn space_error(file: &File, path: &Path, bytes: u64) -> Error {
    let free = rustix::fs::fstatvfs(file).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
    let dir = path.parent().unwrap_or(path).display();
    let fix = format!(
        "give the host tier less memory, or enlarge {dir} (mount -o remount,size=...), or remove *.aside-* there"
    );
    Error::NoSpace { path: path.to_owned(), bytes, free, fix }
}

/// Puts memory behind a range of a file.
pub(crate) fn allocate(file: &File, path: &Path, offset: u64, bytes: u64) -> Result<(), Error> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), offset, bytes) {
            Ok(()) => return Ok(()),
            // A signal for this process came to this thread; whoever asked to stop is heard between steps.
            Err(Errno::INTR) => {}
            Err(Errno::NOSPC | Errno::NOMEM) => return Err(space_error(file, path, bytes)),
            Err(error) => return Err(Error::io("make room for", path)(error)),
        }
    }
}
