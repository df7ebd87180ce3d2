//! The worker's side: find a block and read it where it lies, without asking anybody.
//!
//! Everything the daemon passed is checked once, at [`ShardView::map`], against the sizes of the files. What
//! is read later can be stale but not out of range: a table entry is only a hint, the slot's header decides
//! (state, generation, key) under a hazard, and its length is checked against its class and the mapping.

use std::collections::HashSet;
use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};

use kv_block::{BlockKey, Checksum, Epoch, Generation, Record, SlotId};
use rustix::fs::OFlags;
use rustix::mm::Advice;

use crate::Error;
use crate::hazard::{
    CELLS_OFFSET, HAZARDS_MAX, HEAD_OFFSET, MAGIC, STATE_OFFSET, file_bytes, touches_offset,
};
use crate::map::Mapping;
use crate::meta::{EPOCH_OFFSET, HEADER_BYTES, Header, Layout, epoch_of};
use crate::slab::read_record;
use crate::sync::{AtomicU64, Ordering};
use crate::table::{Buckets, Contended, Entry, EntryState};
use crate::word::{self, Published, SlotState};

/// Looks a read takes at a table entry that moves under it.
const ATTEMPTS_MAX: u32 = 4;

/// Why a read did not happen here. Apart from `NotFound` and most ghosts, the daemon may still have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Absent {
    /// The table does not know the key.
    NotFound,
    /// It is known but not readable in place: announced, gone, on disk only, or not verified yet.
    Entry(Entry),
    /// The slot is not, or no longer, a readable block of that generation.
    Stale,
    /// Every hazard cell of this session is in use.
    HazardsFull,
    /// The daemon changed the entry each time it was looked at, or has not opened this session's hazards yet.
    /// Ask it.
    Contended,
    /// The session this view belongs to is over; connect again.
    Closed,
}

impl From<Contended> for Absent {
    fn from(_: Contended) -> Self {
        Self::Contended
    }
}

/// A session's window on one shard.
#[derive(Debug)]
pub struct ShardView {
    layout: Layout,
    meta: Arc<Mapping>,
    data: Mapping,
    writable: bool,
    hazard: Mapping,
    buckets: Buckets,
    count: u32,
    touches: u32,
    /// One bit per hazard cell: in use.
    cells: Box<[AtomicU64]>,
    hint: AtomicUsize,
    /// Slots this process is filling in place.
    filling: Mutex<HashSet<SlotId>>,
}

fn mismatch<T>(what: &'static str, why: String) -> Result<T, Error> {
    Err(Error::Mismatch { what, why })
}

fn size_of(what: &'static str, file: &File) -> Result<u64, Error> {
    Ok(file.metadata().map_err(Error::io("look at descriptor of", Path::new(what)))?.len())
}

impl ShardView {
    /// Maps what the daemon passed. The arena is mapped for writing when its descriptor allows it.
    pub fn map(meta: OwnedFd, data: OwnedFd, hazard: OwnedFd) -> Result<Arc<Self>, Error> {
        let (meta, data, hazard) = (File::from(meta), File::from(data), File::from(hazard));
        let mut page = [0; HEADER_BYTES];
        meta.read_exact_at(&mut page, 0).map_err(Error::io("read the header of", Path::new("meta")))?;
        let layout = match Header::decode(&page) {
            Ok(header) => header.layout,
            Err(error) => return mismatch("meta", error.to_string()),
        };
        let sizes = [("meta", &meta, layout.meta_bytes), ("data", &data, layout.geometry.data_bytes())];
        for (what, file, wanted) in sizes {
            let found = size_of(what, file)?;
            if found != wanted {
                return mismatch(what, format!("{found} bytes, {wanted} wanted"));
            }
        }
        let mut head = [0; 24];
        hazard.read_exact_at(&mut head, 0).map_err(Error::io("read the header of", Path::new("hazard")))?;
        let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let (count, touches) = (number(8), number(16));
        if number(0) != MAGIC {
            return mismatch("hazard", "it does not begin like a hazard file".into());
        }
        if !(1..=u64::from(HAZARDS_MAX)).contains(&count) || !(1..=1 << 20).contains(&touches) {
            return mismatch("hazard", format!("{count} cells and {touches} touches"));
        }
        let (count, touches) = (count as u32, touches as u32);
        let hazard_bytes = file_bytes(count, touches);
        let found = size_of("hazard", &hazard)?;
        if found < hazard_bytes as u64 {
            return mismatch("hazard", format!("{found} bytes, {hazard_bytes} wanted"));
        }
        let flags = rustix::fs::fcntl_getfl(&data).map_err(Error::io("look at", Path::new("data")))?;
        let writable = flags.contains(OFlags::RDWR);
        let map = |what: &'static str, file: &File, bytes: usize, writable| {
            Mapping::new(file, bytes, writable).map_err(Error::io("map", Path::new(what)))
        };
        let meta = Arc::new(map("meta", &meta, layout.meta_bytes as usize, false)?);
        let data = map("data", &data, layout.geometry.data_bytes() as usize, writable)?;
        // Advice that is refused costs speed or a larger core file, nothing else.
        let table = layout.table as usize;
        let _ = meta.advise_range(table, meta.len() - table, Advice::LinuxHugepage);
        let _ = data.advise(Advice::LinuxHugepage);
        let _ = data.advise(Advice::LinuxDontDump);
        let mut cells: Vec<AtomicU64> = (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        if count % 64 != 0 {
            // Cells that do not exist are always in use.
            cells[(count / 64) as usize] = AtomicU64::new(u64::MAX << (count % 64));
        }
        Ok(Arc::new(Self {
            layout,
            buckets: Buckets::new(Arc::clone(&meta), &layout),
            meta,
            data,
            writable,
            hazard: map("hazard", &hazard, hazard_bytes, true)?,
            count,
            touches,
            cells: cells.into(),
            hint: AtomicUsize::new(0),
            filling: Mutex::new(HashSet::new()),
        }))
    }

    /// The daemon's epoch as it stands now; when it changes, another daemon has taken over.
    pub fn epoch(&self) -> Option<Epoch> {
        epoch_of(self.meta.word(EPOCH_OFFSET).load(Ordering::Acquire))
    }

    /// Whether the daemon ended the session this view belongs to.
    pub fn is_closed(&self) -> bool {
        !matches!(self.file_state().load(Ordering::Acquire), word::UNOPENED | word::OPEN)
    }

    /// Whether slots may be filled in place.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Hazard cells of the session: reads that may be open at once.
    pub fn hazards(&self) -> u32 {
        self.count
    }

    /// What the catalog knows about `key` now.
    pub fn find(&self, key: &BlockKey) -> Result<Option<Entry>, Absent> {
        Ok(self.buckets.find(key)?)
    }

    /// Looks up many keys, in order, with the memory latencies overlapped. `each` gets the index and what
    /// was found, and says whether to go on.
    pub fn find_each(
        &self,
        keys: &[BlockKey],
        mut each: impl FnMut(usize, Result<Option<Entry>, Absent>) -> bool,
    ) {
        self.buckets.find_each(keys, |index, found| each(index, found.map_err(Absent::from)));
    }

    /// How many of the first keys are in host memory, without a gap.
    pub fn resident_prefix(&self, keys: &[BlockKey]) -> usize {
        let mut resident = 0;
        self.find_each(keys, |_, found| {
            let here = matches!(found, Ok(Some(Entry { host: Some(_), state: EntryState::Present, .. })));
            resident += usize::from(here);
            here
        });
        resident
    }

    /// Opens a block for reading where it lies.
    pub fn read(self: &Arc<Self>, key: &BlockKey) -> Result<ReadGuard, Absent> {
        for _ in 0..ATTEMPTS_MAX {
            let entry = self.find(key)?.ok_or(Absent::NotFound)?;
            let (EntryState::Present, Some(place)) = (entry.state, entry.host) else {
                return Err(Absent::Entry(entry));
            };
            match self.open(place, Some(key)) {
                // It moved on between the two looks; the table knows by now.
                Err(Opening::Changed(SlotState::Unverified)) => return Err(Absent::Entry(entry)),
                Err(Opening::Changed(_)) => {}
                Err(Opening::Absent(absent)) => return Err(absent),
                Ok(guard) => return Ok(guard),
            }
        }
        Err(Absent::Contended)
    }

    /// Opens the block in a slot that the daemon named.
    pub fn read_at(self: &Arc<Self>, slot: SlotId, generation: Generation) -> Result<ReadGuard, Absent> {
        self.open((slot, generation), None).map_err(|opening| match opening {
            Opening::Absent(absent) => absent,
            Opening::Changed(_) => Absent::Stale,
        })
    }

    /// Opens a slot that the daemon lent to this worker, for writing its first `bytes` bytes. The view must
    /// be writable. Keep the guard until the daemon has answered the commit.
    pub fn fill(
        self: &Arc<Self>,
        slot: SlotId,
        generation: Generation,
        bytes: u32,
    ) -> Result<FillGuard, Absent> {
        if !self.writable {
            return Err(Absent::Stale);
        }
        let mut filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        if filling.contains(&slot) {
            return Err(Absent::Stale);
        }
        let (cell, offset, class) =
            self.protect((slot, generation), SlotState::Filling).map_err(|o| match o {
                Opening::Absent(absent) => absent,
                Opening::Changed(_) => Absent::Stale,
            })?;
        if u64::from(bytes) > class {
            self.give_cell(cell);
            return Err(Absent::Stale);
        }
        filling.insert(slot);
        drop(filling);
        Ok(FillGuard { view: Arc::clone(self), cell, slot, generation, offset, bytes })
    }

    fn open(
        self: &Arc<Self>,
        (slot, generation): (SlotId, Generation),
        key: Option<&BlockKey>,
    ) -> Result<ReadGuard, Opening> {
        let (cell, offset, class) = self.protect((slot, generation), SlotState::Sealed)?;
        let record = read_record(self.header(slot));
        if u64::from(record.bytes) > class || key.is_some_and(|key| *key != record.key) {
            self.give_cell(cell);
            return Err(Opening::Changed(SlotState::Free));
        }
        Ok(ReadGuard { view: Arc::clone(self), cell, slot, generation, offset, record })
    }

    /// Puts a hazard on the slot; gives the cell, and the slot's place and class.
    fn protect(
        &self,
        (slot, generation): (SlotId, Generation),
        wanted: SlotState,
    ) -> Result<(u32, u64, u64), Opening> {
        if slot.0 >= self.layout.slots() || generation.0 == 0 {
            return Err(Opening::Absent(Absent::Stale));
        }
        let cell = self.take_cell().ok_or(Opening::Absent(Absent::HazardsFull))?;
        let header = self.header(slot);
        match word::publish(self.cell(cell), self.file_state(), &header[0], (slot, generation), wanted) {
            Published::Safe => {}
            Published::Unopened => {
                self.free_cell(cell);
                return Err(Opening::Absent(Absent::Contended));
            }
            Published::Closed => {
                self.free_cell(cell);
                return Err(Opening::Absent(Absent::Closed));
            }
            Published::Changed(word) => {
                self.free_cell(cell);
                return Err(Opening::Changed(word.state().unwrap_or(SlotState::Free)));
            }
        }
        // Only now: a region keeps its class while any slot of it is used, and this one is.
        let class =
            self.meta.word(self.layout.region(slot.0 / self.layout.region_slots)).load(Ordering::Acquire);
        match self.layout.data_offset(slot.0, class) {
            Some(offset) => Ok((cell, offset, class)),
            None => {
                self.give_cell(cell);
                Err(Opening::Changed(SlotState::Free))
            }
        }
    }

    fn header(&self, slot: SlotId) -> &[AtomicU64; 8] {
        self.meta.words(self.layout.header(slot.0))
    }

    fn cell(&self, cell: u32) -> &AtomicU64 {
        self.hazard.word(CELLS_OFFSET + cell as usize * 8)
    }

    fn file_state(&self) -> &AtomicU64 {
        self.hazard.word(STATE_OFFSET)
    }

    fn take_cell(&self) -> Option<u32> {
        let words = self.cells.len();
        let start = self.hint.load(Ordering::Relaxed);
        for step in 0..words {
            let at = (start + step) % words;
            let mut used = self.cells[at].load(Ordering::Relaxed);
            while used != u64::MAX {
                let bit = used.trailing_ones();
                let before = self.cells[at].fetch_or(1 << bit, Ordering::Acquire);
                if before & (1 << bit) == 0 {
                    if step != 0 {
                        self.hint.store(at, Ordering::Relaxed);
                    }
                    return Some(at as u32 * 64 + bit);
                }
                used = before;
            }
        }
        None
    }

    fn free_cell(&self, cell: u32) {
        self.cells[cell as usize / 64].fetch_and(!(1 << (cell % 64)), Ordering::Release);
    }

    fn give_cell(&self, cell: u32) {
        word::clear(self.cell(cell));
        self.free_cell(cell);
    }

    fn touch(&self, slot: SlotId) {
        let at = self.hazard.word(HEAD_OFFSET).fetch_add(1, Ordering::Relaxed) % u64::from(self.touches);
        let place = touches_offset(self.count) + at as usize * 8;
        self.hazard.word(place).store(slot.0.into(), Ordering::Relaxed);
    }
}

/// Why a slot could not be opened.
enum Opening {
    Absent(Absent),
    Changed(SlotState),
}

/// A block open for reading: its bytes stay as they are until this is dropped. Dereferences to them.
#[derive(Debug)]
pub struct ReadGuard {
    view: Arc<ShardView>,
    cell: u32,
    slot: SlotId,
    generation: Generation,
    offset: u64,
    record: Record,
}

impl ReadGuard {
    /// Its name.
    pub fn key(&self) -> &BlockKey {
        &self.record.key
    }

    /// Its checksum, of bytes and name.
    pub fn checksum(&self) -> Checksum {
        self.record.checksum
    }

    /// All that was sealed with it.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Its slot.
    pub fn slot(&self) -> (SlotId, Generation) {
        (self.slot, self.generation)
    }

    /// Where it lies in the arena, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether it still is what the catalog would give: false once the daemon evicted it, although the
    /// bytes stay readable here.
    pub fn still_valid(&self) -> bool {
        let word = word::load(&self.view.header(self.slot)[0]);
        let block = matches!(word.state(), Some(SlotState::Sealed | SlotState::Unverified));
        block && word.generation() == self.generation
    }
}

impl Deref for ReadGuard {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let start = self.view.data.range(self.offset as usize, self.record.bytes as usize);
        // SAFETY: inside the mapping, which `view` keeps alive. The slot was sealed after our hazard was
        // visible, so the daemon writes it to nobody before the hazard is cleared, which is in drop.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), self.record.bytes as usize) }
    }
}

impl Drop for ReadGuard {
    fn drop(&mut self) {
        self.view.give_cell(self.cell);
        self.view.touch(self.slot);
    }
}

/// A lent slot open for writing. Dereferences to the bytes asked for.
#[derive(Debug)]
pub struct FillGuard {
    view: Arc<ShardView>,
    cell: u32,
    slot: SlotId,
    generation: Generation,
    offset: u64,
    bytes: u32,
}

impl FillGuard {
    /// The lent slot.
    pub fn slot(&self) -> (SlotId, Generation) {
        (self.slot, self.generation)
    }
}

impl Deref for FillGuard {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let start = self.view.data.range(self.offset as usize, self.bytes as usize);
        // SAFETY: inside the mapping, which `view` keeps alive; lent to this session alone, and `filling`
        // keeps a second guard away.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), self.bytes as usize) }
    }
}

impl DerefMut for FillGuard {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = self.view.data.range(self.offset as usize, self.bytes as usize);
        // SAFETY: as in `deref`; the view is writable, or there would be no guard. The daemon does not reuse
        // the slot while the hazard stands.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.bytes as usize) }
    }
}

impl Drop for FillGuard {
    fn drop(&mut self) {
        self.view.filling.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.slot);
        self.view.give_cell(self.cell);
    }
}
