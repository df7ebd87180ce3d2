//! The arena's slots: taken, filled, sealed, held, retired, swept.
//!
//! ```text
//! arena   | region 0: 16 slots of 2 MiB | region 1: 8192 slots of 4 KiB | region 2: free | ...
//!
//! slot header, 64 bytes
//!   0 word (see `word`) | 8 key 16 | 24 checksum | 32 tag | 40 bytes, expires at | 48 priority | 56 check
//! ```
//! A slot is an exact multiple of 4 KiB; a region belongs to one such class while any of its slots is used,
//! then goes back to the pool. A region without memory behind all of it is in no pool (see `grow`). Slot ids are `region * (region bytes / 4096) + index`. The header says all
//! that a restart needs; free lists live in private memory and are rebuilt from the headers.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kv_block::{BindingTag, BlockKey, Checksum, Generation, Priority, Record, SlotId};
use rustix::fs::FallocateFlags;

use crate::copy::{copy_and_sum, copy_with};
use crate::grow::Backed;
use crate::hazard::HazardSet;
use crate::map::Mapping;
use crate::memory::Lock;
use crate::meta::{Layout, PAGE, SLOT_HEADER};
use crate::sync::{AtomicU64, Ordering};
use crate::word::{self, RetireError, SlotState, Word};

/// A slot's header as it was at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotHeader {
    /// Life of the slot.
    pub generation: Generation,
    /// What it is.
    pub state: SlotState,
    /// Holds by this process.
    pub holds: u32,
    /// What was sealed; means something only for `Sealed` and `Unverified`.
    pub record: Record,
}

/// Why there is no slot of a size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NoSlotReason {
    /// All slots of the class are used and no region is free.
    Exhausted,
    /// The size is beyond what a region holds, or zero.
    Size,
    /// A region is free but its headers found no memory (the file system of the meta file is full).
    Headers,
}

/// There is no slot of the wanted size.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no slot of {slot_bytes} bytes: {reason:?}, the class has {class_slots}")]
pub struct NoSlot {
    /// The class that was asked for.
    pub slot_bytes: u32,
    /// Slots that the class owns now.
    pub class_slots: u32,
    /// Why.
    pub reason: NoSlotReason,
}

/// How one class stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClassUsage {
    /// Bytes of a slot.
    pub slot_bytes: u32,
    /// Slots it owns.
    pub slots: u32,
    /// How many of them can be taken at once.
    pub free: u32,
    /// Regions it owns.
    pub regions: u32,
}

/// How the arena stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlabUsage {
    /// Regions with memory behind them.
    pub regions_total: u32,
    /// Regions that have none, yet or for ever.
    pub regions_missing: u32,
    /// Regions that no class owns.
    pub regions_free: u32,
    /// Retired slots that wait for a sweep.
    pub limbo: u32,
    /// Classes that own a region, smallest first.
    pub classes: Vec<ClassUsage>,
}

/// How one region stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegionInfo {
    /// Its number.
    pub region: u32,
    /// Its class; 0 when it is free.
    pub slot_bytes: u32,
    /// Slots that are not free (limbo included).
    pub used: u32,
    /// Slots that this process holds.
    pub held: u32,
}

/// One region's private books.
#[derive(Clone, Debug, Default)]
struct Region {
    /// 0: in the pool.
    slot_bytes: u32,
    slots: u32,
    used: u32,
    /// Slots from here on were not taken since the class came.
    fresh: u32,
    /// Slots below `fresh` that are free.
    free: Vec<u32>,
    /// Being emptied: its free slots are not handed out.
    draining: bool,
    /// Place in the class's list of regions with free slots.
    listed: Option<u32>,
    /// Header bytes that certainly have memory behind them.
    header_bytes: u64,
    /// All of its pages are there.
    backed: bool,
}

impl Region {
    fn free_slots(&self) -> u32 {
        self.slots - self.used
    }

    /// The region without a class: what is known about its memory stays.
    fn bare(&self) -> Self {
        Self { header_bytes: self.header_bytes, backed: self.backed, ..Self::default() }
    }
}

#[derive(Debug, Default)]
struct Class {
    regions: u32,
    slots: u32,
    /// Regions with a free slot; the last one is taken from.
    open: Vec<u32>,
}

#[derive(Debug)]
struct Books {
    regions: Vec<Region>,
    /// Free regions with memory, taken from the end. The lowest is there at first: what is warm is used again.
    pool: VecDeque<u32>,
    classes: BTreeMap<u32, Class>,
    limbo: Vec<SlotId>,
    /// Regions with memory.
    backed: u32,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) layout: Layout,
    pub(crate) meta: Arc<Mapping>,
    pub(crate) meta_file: Arc<OwnedFd>,
    pub(crate) data: Mapping,
    books: Mutex<Books>,
    /// Held as long as anything may write; see `memory`.
    _lock: Lock,
}

/// The arena's allocator. Cheap to clone, usable from any thread of the daemon.
#[derive(Clone, Debug)]
pub struct Slab {
    shared: Arc<Shared>,
}

/// Words of a slot header behind the first.
fn encode_record(record: &Record) -> [u64; 7] {
    let [low, high] = record.key.halves();
    let sizes = u64::from(record.bytes) | u64::from(record.expires_at) << 32;
    let words = [low, high, record.checksum.0, record.tag.0, sizes, record.priority as u64];
    let [a, b, c, d, e, f] = words;
    [a, b, c, d, e, f, record_check(&words)]
}

fn record_check(words: &[u64; 6]) -> u64 {
    let mut bytes = [0; 48];
    for (at, word) in words.iter().enumerate() {
        bytes[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
    Checksum::of(&BlockKey([0x73; 16]), &bytes).0
}

fn decode_record(words: &[u64; 7]) -> Record {
    let [low, high, checksum, tag, sizes, priority, _] = *words;
    Record {
        key: BlockKey::from_halves([low, high]),
        checksum: Checksum(checksum),
        bytes: sizes as u32,
        tag: BindingTag(tag),
        priority: Priority::from_bits(priority as u8),
        expires_at: (sizes >> 32) as u32,
    }
}

fn load_record(header: &[AtomicU64; 8]) -> [u64; 7] {
    std::array::from_fn(|at| header[at + 1].load(Ordering::Relaxed))
}

/// The record in a header whose word was just found `Sealed` under a hazard or a hold.
pub(crate) fn read_record(header: &[AtomicU64; 8]) -> Record {
    decode_record(&load_record(header))
}

impl Shared {
    fn books(&self) -> MutexGuard<'_, Books> {
        // The books are changed by code that does not panic half way; a poisoned lock is still consistent.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn header(&self, slot: SlotId) -> &[AtomicU64; 8] {
        self.meta.words(self.layout.header(slot.0))
    }

    fn header_checked(&self, slot: SlotId) -> Option<&[AtomicU64; 8]> {
        (slot.0 < self.layout.slots()).then(|| self.header(slot))
    }

    fn class_of(&self, slot: SlotId) -> u64 {
        let region = slot.0 / self.layout.region_slots;
        if region >= self.layout.geometry.regions {
            return 0;
        }
        self.meta.word(self.layout.region(region)).load(Ordering::Acquire)
    }

    fn offset(&self, slot: SlotId) -> Option<u64> {
        self.layout.data_offset(slot.0, self.class_of(slot))
    }

    /// A slot that had an owner and has none any more goes back to its region.
    fn give_back(&self, books: &mut Books, slot: SlotId) {
        let number = slot.0 / self.layout.region_slots;
        let region = &mut books.regions[number as usize];
        let class = books.classes.entry(region.slot_bytes).or_default();
        region.used -= 1;
        if region.used > 0 {
            region.free.push(slot.0 % self.layout.region_slots);
            if !region.draining && region.listed.is_none() {
                region.listed = Some(class.open.len() as u32);
                class.open.push(number);
            }
            return;
        }
        class.regions -= 1;
        class.slots -= region.slots;
        if let Some(place) = region.listed.take() {
            class.open.swap_remove(place as usize);
            if let Some(&moved) = class.open.get(place as usize) {
                books.regions[moved as usize].listed = Some(place);
            }
        }
        let region = &mut books.regions[number as usize];
        if books.classes.get(&region.slot_bytes).is_some_and(|class| class.regions == 0) {
            books.classes.remove(&region.slot_bytes);
        }
        *region = region.bare();
        self.meta.word(self.layout.region(number)).store(0, Ordering::Release);
        books.pool.push_back(number);
    }

    fn take(&self, slot_bytes: u32) -> Result<SlotId, NoSlotReason> {
        let mut books = self.books();
        let books = &mut *books;
        if books.classes.get(&slot_bytes).is_none_or(|class| class.open.is_empty()) {
            self.open_region(books, slot_bytes)?;
        }
        let class = books.classes.get_mut(&slot_bytes).ok_or(NoSlotReason::Exhausted)?;
        let number = *class.open.last().ok_or(NoSlotReason::Exhausted)?;
        let region = &mut books.regions[number as usize];
        let index = region.free.pop().unwrap_or_else(|| {
            region.fresh += 1;
            region.fresh - 1
        });
        region.used += 1;
        if region.free_slots() == 0 {
            region.listed = None;
            class.open.pop();
        }
        Ok(SlotId(number * self.layout.region_slots + index))
    }

    /// Gives a region of the pool to a class.
    fn open_region(&self, books: &mut Books, slot_bytes: u32) -> Result<(), NoSlotReason> {
        let slots = self.layout.class_slots(slot_bytes.into()).ok_or(NoSlotReason::Size)?;
        let &number = books.pool.back().ok_or(NoSlotReason::Exhausted)?;
        let region = &mut books.regions[number as usize];
        let header_bytes = u64::from(slots) * SLOT_HEADER;
        if region.header_bytes < header_bytes {
            // Memory first: a store into a hole of a full file system would be a SIGBUS.
            let at = self.layout.header(number * self.layout.region_slots) as u64;
            rustix::fs::fallocate(&*self.meta_file, FallocateFlags::empty(), at, header_bytes)
                .map_err(|_| NoSlotReason::Headers)?;
            region.header_bytes = header_bytes;
        }
        books.pool.pop_back();
        *region = Region { slot_bytes, slots, ..region.bare() };
        let first = number * self.layout.region_slots;
        let is_free = |index: &u32| {
            let seen = word::load(&self.header(SlotId(first + index))[0]);
            seen.state() == Some(SlotState::Free)
        };
        let (free, foreign): (Vec<u32>, Vec<u32>) = (0..slots).rev().partition(is_free);
        if !foreign.is_empty() {
            // Only damage in an earlier life leaves such headers in a region without a class. Nobody may
            // find them under the new class, and whoever still reads them is waited for.
            region.fresh = slots;
            region.used = foreign.len() as u32;
            region.free = free;
            for index in foreign {
                word::condemn(&self.header(SlotId(first + index))[0]);
                books.limbo.push(SlotId(first + index));
            }
        }
        let class = books.classes.entry(slot_bytes).or_default();
        class.regions += 1;
        class.slots += slots;
        if region.free_slots() > 0 {
            region.listed = Some(class.open.len() as u32);
            class.open.push(number);
        }
        self.meta.word(self.layout.region(number)).store(slot_bytes.into(), Ordering::Release);
        Ok(())
    }

    /// An abandoned slot that no worker was let into.
    fn free(&self, slot: SlotId) {
        let mut books = self.books();
        word::free(&self.header(slot)[0]);
        self.give_back(&mut books, slot);
    }

    /// An abandoned slot that a worker may still be writing.
    fn condemn(&self, slot: SlotId) {
        let mut books = self.books();
        word::condemn(&self.header(slot)[0]);
        books.limbo.push(slot);
    }
}

impl Slab {
    /// The slab over two mappings: empty for a new meta file, else with every slot that survived as
    /// `Unverified`. Nobody else uses the files. The first `grown` regions have memory, and so has each that
    /// a class owns.
    pub(crate) fn new(
        layout: Layout,
        meta: Arc<Mapping>,
        meta_file: Arc<OwnedFd>,
        data: Mapping,
        lock: Lock,
        adopt: bool,
        grown: u32,
    ) -> Self {
        let regions = vec![Region::default(); layout.geometry.regions as usize];
        let mut books =
            Books { regions, pool: VecDeque::new(), classes: BTreeMap::new(), limbo: Vec::new(), backed: 0 };
        for number in (0..layout.geometry.regions).rev() {
            let owner = meta.word(layout.region(number));
            let slot_bytes = owner.load(Ordering::Acquire);
            let slots = if adopt { layout.class_slots(slot_bytes) } else { None };
            let mut region = Region { backed: number < grown || slots.is_some(), ..Region::default() };
            books.backed += u32::from(region.backed);
            if let Some(slots) = slots {
                region.slots = slots;
                region.fresh = slots;
                region.slot_bytes = slot_bytes as u32;
                region.header_bytes = u64::from(slots) * SLOT_HEADER;
                for index in (0..slots).rev() {
                    let slot = number * layout.region_slots + index;
                    match adopt_slot(meta.words(layout.header(slot)), slot_bytes) {
                        SlotState::Free => region.free.push(index),
                        SlotState::Retired => books.limbo.push(SlotId(slot)),
                        _ => {}
                    }
                }
                region.used = slots - region.free.len() as u32;
            }
            if region.used == 0 {
                // Also what was no class at all: an unknown value there owns nothing.
                if adopt && slot_bytes != 0 {
                    owner.store(0, Ordering::Release);
                }
                if region.backed {
                    books.pool.push_back(number);
                }
                books.regions[number as usize] = region.bare();
                continue;
            }
            let class = books.classes.entry(region.slot_bytes).or_default();
            class.regions += 1;
            class.slots += region.slots;
            if region.free_slots() > 0 {
                region.listed = Some(class.open.len() as u32);
                class.open.push(number);
            }
            books.regions[number as usize] = region;
        }
        let books = Mutex::new(books);
        Self { shared: Arc::new(Shared { layout, meta, meta_file, data, books, _lock: lock }) }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Hands out regions that have memory now; gives how many are new. They come from a grower of this arena.
    pub fn grown(&self, backed: Backed) -> u32 {
        let mut books = self.shared.books();
        let books = &mut *books;
        let mut new = 0;
        for number in backed.regions {
            let region = &mut books.regions[number as usize];
            if !std::mem::replace(&mut region.backed, true) {
                // In front: regions that were used before are warm.
                books.pool.push_front(number);
                new += 1;
            }
        }
        books.backed += new;
        new
    }

    /// Whether every region that these bytes of the data file lie in has memory, so that a device may pin them.
    pub fn is_backed(&self, offset: u64, bytes: u64) -> bool {
        let region_bytes = self.region_bytes();
        let numbers = (offset / region_bytes) as usize..(offset + bytes).div_ceil(region_bytes) as usize;
        let books = self.shared.books();
        books.regions.get(numbers).is_some_and(|regions| regions.iter().all(|region| region.backed))
    }

    /// Bytes of a region.
    pub fn region_bytes(&self) -> u64 {
        self.shared.layout.geometry.region_bytes
    }

    /// The class that takes `bytes`: the next multiple of 4 KiB. `None` when no region is that long.
    pub fn class_for(&self, bytes: u32) -> Option<u32> {
        let slot_bytes = u64::from(bytes.max(1)).next_multiple_of(PAGE);
        self.shared.layout.class_slots(slot_bytes)?;
        u32::try_from(slot_bytes).ok()
    }

    /// A slot for `bytes` bytes, the caller's alone.
    pub fn take(&self, bytes: u32) -> Result<Slot, NoSlot> {
        let no_slot = |slot_bytes: u32, reason| {
            let books = self.shared.books();
            let class_slots = books.classes.get(&slot_bytes).map_or(0, |class| class.slots);
            NoSlot { slot_bytes, class_slots, reason }
        };
        let slot_bytes = self.class_for(bytes).ok_or_else(|| no_slot(bytes, NoSlotReason::Size))?;
        let id = self.shared.take(slot_bytes).map_err(|reason| no_slot(slot_bytes, reason))?;
        let generation = word::take(&self.shared.header(id)[0]);
        let Some(offset) = self.shared.offset(id) else {
            // The region table was just written by us, so this cannot be; the slot stays out of use.
            return Err(no_slot(slot_bytes, NoSlotReason::Exhausted));
        };
        Ok(Slot { place: Place { shared: Arc::clone(&self.shared), id, generation, offset, slot_bytes } })
    }

    /// Bytes of a slot's class; `None` when its region is free or the id is none of this arena's.
    pub fn slot_bytes(&self, slot: SlotId) -> Option<u32> {
        let class = self.shared.class_of(slot);
        self.shared.layout.data_offset(slot.0, class)?;
        u32::try_from(class).ok()
    }

    /// Where a slot lies in the data file, in bytes; `None` as for [`Self::slot_bytes`].
    pub fn offset(&self, slot: SlotId) -> Option<u64> {
        self.shared.offset(slot)
    }

    /// Bytes of the whole arena, those without memory included.
    pub fn data_bytes(&self) -> u64 {
        self.shared.layout.geometry.data_bytes()
    }

    /// Address of the whole arena, for registering it with a device (io_uring buffers, page locking).
    pub fn data_range(&self) -> NonNull<[u8]> {
        let len = self.shared.data.len();
        NonNull::slice_from_raw_parts(self.shared.data.range(0, len), len)
    }

    /// The header of a slot that some class owns.
    pub fn header(&self, slot: SlotId) -> Option<SlotHeader> {
        self.shared.offset(slot)?;
        let header = self.shared.header(slot);
        let word = word::load(&header[0]);
        Some(SlotHeader {
            generation: word.generation(),
            state: word.state()?,
            holds: word.holds(),
            record: read_record(header),
        })
    }

    /// One more hold on a block, if `slot` still is the block of that generation, sealed or unverified.
    pub fn hold(&self, slot: SlotId, generation: Generation) -> Option<Held> {
        let header = self.shared.header_checked(slot)?;
        if !word::hold(&header[0], generation) {
            return None;
        }
        let bytes = read_record(header).bytes;
        let offset = self.shared.offset(slot).filter(|_| u64::from(bytes) <= self.shared.class_of(slot));
        let Some(offset) = offset else {
            word::release(&header[0]);
            return None;
        };
        Some(Held { shared: Arc::clone(&self.shared), id: slot, generation, offset, bytes })
    }

    /// Ends a block that nobody holds. Its slot is free after a sweep finds no hazard on it.
    pub fn retire(&self, slot: SlotId, generation: Generation) -> Result<(), RetireError> {
        let header = self.shared.header_checked(slot).ok_or(RetireError::Gone)?;
        if self.shared.offset(slot).is_none() {
            return Err(RetireError::Gone);
        }
        word::retire(&header[0], generation)?;
        self.shared.books().limbo.push(slot);
        Ok(())
    }

    /// Frees every retired slot that no hazard names; gives how many. One look at the hazard files serves
    /// all of them. If a hazard file cannot be read, nothing is freed.
    pub fn sweep(&self, hazards: &HazardSet) -> usize {
        let limbo = std::mem::take(&mut self.shared.books().limbo);
        if limbo.is_empty() {
            return 0;
        }
        word::before_scan();
        let named = hazards.scan_slots();
        word::after_scan();
        let mut books = self.shared.books();
        let Ok(named) = named else {
            books.limbo.extend(limbo);
            return 0;
        };
        let mut freed = 0;
        for slot in limbo {
            // Whatever the generation: a hazard on a slot keeps the slot.
            if named.binary_search(&slot).is_ok() {
                books.limbo.push(slot);
                continue;
            }
            word::free(&self.shared.header(slot)[0]);
            self.shared.give_back(&mut books, slot);
            freed += 1;
        }
        freed
    }

    /// The checksum of an adopted block was right: workers may read it. False when it is no block any more.
    pub fn mark_verified(&self, held: &Held) -> bool {
        word::verify(&self.shared.header(held.id)[0], held.generation)
    }

    /// Every block that came through the restart and was not verified yet, in slot order.
    pub fn adopted(&self) -> impl Iterator<Item = (SlotId, SlotHeader)> + '_ {
        (0..self.shared.layout.geometry.regions)
            .flat_map(|region| self.region_headers(region))
            .filter(|(_, header)| header.state == SlotState::Unverified)
    }

    /// Every block of a region, so that its owner can empty it for another class.
    pub fn slots_of_region(&self, region: u32) -> Vec<(SlotId, Generation)> {
        let block = |state| matches!(state, SlotState::Sealed | SlotState::Unverified);
        let headers = self.region_headers(region).filter(|(_, header)| block(header.state));
        headers.map(|(slot, header)| (slot, header.generation)).collect()
    }

    /// Stops (or starts again) handing out slots of a region. When the last slot of a draining region is
    /// free, the region goes back to the pool and is as any other.
    pub fn set_draining(&self, region: u32, draining: bool) {
        let mut books = self.shared.books();
        let books = &mut *books;
        let Some(entry) = books.regions.get_mut(region as usize).filter(|entry| entry.slot_bytes != 0) else {
            return;
        };
        let Some(class) = books.classes.get_mut(&entry.slot_bytes) else { return };
        entry.draining = draining;
        if draining {
            if let Some(place) = entry.listed.take() {
                class.open.swap_remove(place as usize);
                if let Some(&moved) = class.open.get(place as usize) {
                    books.regions[moved as usize].listed = Some(place);
                }
            }
        } else if entry.listed.is_none() && entry.free_slots() > 0 {
            entry.listed = Some(class.open.len() as u32);
            class.open.push(region);
        }
    }

    /// How every region stands.
    pub fn regions(&self) -> Vec<RegionInfo> {
        let books: Vec<(u32, u32)> =
            self.shared.books().regions.iter().map(|region| (region.slot_bytes, region.used)).collect();
        let info = |(region, (slot_bytes, used))| {
            let region = region as u32;
            let held = self.region_headers(region).filter(|(_, header)| header.holds > 0).count() as u32;
            RegionInfo { region, slot_bytes, used, held }
        };
        books.into_iter().enumerate().map(info).collect()
    }

    /// How the arena stands.
    pub fn usage(&self) -> SlabUsage {
        let books = self.shared.books();
        let free = |class: &Class| {
            class.open.iter().map(|&region| books.regions[region as usize].free_slots()).sum()
        };
        let backed = books.backed;
        SlabUsage {
            regions_total: backed,
            regions_missing: books.regions.len() as u32 - backed,
            regions_free: books.pool.len() as u32,
            limbo: books.limbo.len() as u32,
            classes: books
                .classes
                .iter()
                .map(|(&slot_bytes, class)| ClassUsage {
                    slot_bytes,
                    slots: class.slots,
                    free: free(class),
                    regions: class.regions,
                })
                .collect(),
        }
    }

    fn region_headers(&self, region: u32) -> impl Iterator<Item = (SlotId, SlotHeader)> + '_ {
        let first = region.saturating_mul(self.shared.layout.region_slots);
        let class = self.shared.class_of(SlotId(first));
        let slots = self.shared.layout.class_slots(class).unwrap_or(0);
        (first..first + slots).filter_map(|slot| Some((SlotId(slot), self.header(SlotId(slot))?)))
    }
}

/// What a header left by an earlier life is worth now; leaves it in that state.
fn adopt_slot(header: &[AtomicU64; 8], slot_bytes: u64) -> SlotState {
    let seen = word::load(&header[0]);
    match seen.state() {
        Some(SlotState::Free) => SlotState::Free,
        Some(SlotState::Sealed | SlotState::Unverified) => {
            let words = load_record(header);
            let [a, b, c, d, e, f, check] = words;
            let sound = check == record_check(&[a, b, c, d, e, f])
                && u64::from(decode_record(&words).bytes) <= slot_bytes
                && seen.generation().0 != 0;
            if sound {
                // Holds were the dead process's.
                let word = Word::new(seen.generation(), SlotState::Unverified);
                header[0].store(word.0, Ordering::Release);
                return SlotState::Unverified;
            }
            word::condemn(&header[0]);
            SlotState::Retired
        }
        // Through limbo: a worker that lived on may be reading it, or writing it in place.
        Some(SlotState::Filling | SlotState::Retired) | None => {
            word::condemn(&header[0]);
            SlotState::Retired
        }
    }
}

/// What a slot's owner needs to know about it.
#[derive(Debug)]
struct Place {
    shared: Arc<Shared>,
    id: SlotId,
    generation: Generation,
    offset: u64,
    slot_bytes: u32,
}

impl Place {
    fn start(&self) -> NonNull<u8> {
        self.shared.data.range(self.offset as usize, self.slot_bytes as usize)
    }

    fn seal(&self, record: &Record) -> Held {
        assert!(record.bytes <= self.slot_bytes, "a record of more bytes than its slot");
        let header = self.shared.header(self.id);
        for (word, value) in header[1..].iter().zip(encode_record(record)) {
            word.store(value, Ordering::Relaxed);
        }
        word::seal(&header[0], self.generation);
        Held {
            shared: Arc::clone(&self.shared),
            id: self.id,
            generation: self.generation,
            offset: self.offset,
            bytes: record.bytes,
        }
    }
}

/// A slot that is being filled, its owner's alone. Dereferences to all of its bytes, whatever they held
/// before. Dropped unsealed, it is free again.
#[derive(Debug)]
pub struct Slot {
    place: Place,
}

impl Slot {
    /// Its number.
    pub fn id(&self) -> SlotId {
        self.place.id
    }

    /// Its life.
    pub fn generation(&self) -> Generation {
        self.place.generation
    }

    /// Where it lies in the data file, in bytes.
    pub fn offset(&self) -> u64 {
        self.place.offset
    }

    /// Makes the first `record.bytes` bytes immutable and readable under `record`.
    ///
    /// # Panics
    /// When the record has more bytes than the slot.
    pub fn seal(self, record: &Record) -> Held {
        let held = self.place.seal(record);
        disarm(self, |slot| &slot.place);
        held
    }

    /// Copies `source` to the front and gives its checksum, in one pass.
    ///
    /// # Panics
    /// When `source` is longer than the slot.
    pub fn copy_from(&mut self, key: &BlockKey, source: &[u8]) -> Checksum {
        copy_and_sum(key, self, source)
    }

    /// Lets `read` (offset, piece to fill) bring `bytes` bytes piece by piece from memory that somebody else
    /// may be scribbling on. The checksum is of what landed here.
    ///
    /// # Panics
    /// When `bytes` is more than the slot has.
    pub fn copy_with(&mut self, key: &BlockKey, bytes: u32, read: impl FnMut(usize, &mut [u8])) -> Checksum {
        copy_with(key, &mut self[..bytes as usize], read)
    }

    /// Lets a trusted worker write the slot in place: the daemon keeps its hands off the bytes until it is
    /// sealed, and an abandoned one waits until the worker's hazard on it is gone.
    pub fn lend(self) -> LentSlot {
        let Place { shared, id, generation, offset, slot_bytes } = &self.place;
        let (id, generation, offset, slot_bytes) = (*id, *generation, *offset, *slot_bytes);
        let place = Place { shared: Arc::clone(shared), id, generation, offset, slot_bytes };
        disarm(self, |slot| &slot.place);
        LentSlot { place }
    }
}

/// Drops a guard without what its `Drop` does to the slot.
fn disarm<T>(guard: T, place: impl Fn(&T) -> &Place) {
    let guard = std::mem::ManuallyDrop::new(guard);
    // SAFETY: the guard is never used or dropped again, so its reference count is moved out exactly once.
    drop(unsafe { std::ptr::read(&place(&guard).shared) });
}

impl Deref for Slot {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: inside the mapping (checked by `range`), which `shared` keeps alive. Filling and not lent:
        // no other process writes it and nobody else here has it.
        unsafe { std::slice::from_raw_parts(self.place.start().as_ptr(), self.place.slot_bytes as usize) }
    }
}

impl DerefMut for Slot {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and no reader: the sweep found no hazard, the retire found no hold.
        unsafe { std::slice::from_raw_parts_mut(self.place.start().as_ptr(), self.place.slot_bytes as usize) }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.place.shared.free(self.place.id);
    }
}

/// A slot that a trusted worker fills in place. Dropped unsealed, it is free once no hazard names it.
#[derive(Debug)]
pub struct LentSlot {
    place: Place,
}

impl LentSlot {
    /// Its number.
    pub fn id(&self) -> SlotId {
        self.place.id
    }

    /// Its life.
    pub fn generation(&self) -> Generation {
        self.place.generation
    }

    /// Where it lies in the data file, in bytes.
    pub fn offset(&self) -> u64 {
        self.place.offset
    }

    /// Its length in bytes.
    pub fn slot_bytes(&self) -> u32 {
        self.place.slot_bytes
    }

    /// Takes the worker's word that the bytes are final.
    ///
    /// # Panics
    /// When the record has more bytes than the slot.
    pub fn seal(self, record: &Record) -> Held {
        let held = self.place.seal(record);
        disarm(self, |slot| &slot.place);
        held
    }
}

impl Drop for LentSlot {
    fn drop(&mut self) {
        self.place.shared.condemn(self.place.id);
    }
}

/// A block that stays where it is as long as this lives. Dereferences to exactly its bytes.
#[derive(Debug)]
pub struct Held {
    shared: Arc<Shared>,
    id: SlotId,
    generation: Generation,
    offset: u64,
    bytes: u32,
}

impl Held {
    /// The slot's number.
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// The slot's life.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Where the block lies in the data file, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of its slot: up to there, reads by a device stay within it.
    pub fn slot_bytes(&self) -> u32 {
        self.shared.class_of(self.id) as u32
    }

    /// What was sealed.
    pub fn record(&self) -> Record {
        read_record(self.shared.header(self.id))
    }

    /// Whether workers may read it: not so for an adopted block before its checksum was looked at.
    pub fn is_verified(&self) -> bool {
        word::load(&self.shared.header(self.id)[0]).state() == Some(SlotState::Sealed)
    }
}

impl Clone for Held {
    fn clone(&self) -> Self {
        let held = word::hold(&self.shared.header(self.id)[0], self.generation);
        // Sixteen million holds on one slot are a leak; going on would free memory in use.
        assert!(held, "a slot has as many holds as can be counted");
        let shared = Arc::clone(&self.shared);
        Self { shared, id: self.id, generation: self.generation, offset: self.offset, bytes: self.bytes }
    }
}

impl Deref for Held {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let start = self.shared.data.range(self.offset as usize, self.bytes as usize);
        // SAFETY: inside the mapping, which `shared` keeps alive. Our hold keeps the slot from being
        // retired, and a block that is not retired is not written by anybody.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), self.bytes as usize) }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        word::release(&self.shared.header(self.id)[0]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::hazard::{HazardFile, Owner};
    use crate::{Geometry, ShardMemory, ShardView};
    use kv_block::{SessionId, ShardId, payload};

    const REGION: u64 = 2 << 20;

    fn memory(regions: u32) -> ShardMemory {
        ShardMemory::anonymous(Geometry { regions, region_bytes: REGION, table_entries_max: 8 }).unwrap()
    }

    fn record(number: u64, bytes: u32) -> Record {
        Record {
            key: BlockKey::from_halves([number, !number]),
            checksum: Checksum(number),
            bytes,
            tag: BindingTag(number + 1),
            priority: Priority::High,
            expires_at: 77,
        }
    }

    /// A view with its hazards, as a worker has them.
    fn worker(memory: &ShardMemory) -> (Arc<ShardView>, HazardSet) {
        let owner = Owner { shard: ShardId(0), session: SessionId(1), pid: 1, start_time: 0 };
        let file = HazardFile::anonymous(owner, 4).unwrap();
        let (meta, data) = (memory.meta_ro().unwrap(), memory.data_rw().unwrap());
        let view = ShardView::map(meta, data, file.fd().unwrap()).unwrap();
        let mut hazards = HazardSet::new();
        hazards.add(file);
        (view, hazards)
    }

    /// The meta file taken over by a second life, as after a kill.
    fn next_life(memory: &ShardMemory) -> Slab {
        let shared = &memory.slab().shared;
        let map = |file: &OwnedFd, len| Mapping::new(file, len, true).unwrap();
        let meta = Arc::new(map(&shared.meta_file, shared.meta.len()));
        let data = Mapping::new(memory.data_rw().unwrap(), shared.data.len(), true).unwrap();
        let grown = shared.layout.geometry.regions;
        Slab::new(shared.layout, meta, Arc::clone(&shared.meta_file), data, None, true, grown)
    }

    #[test]
    fn a_block_goes_all_the_way_round() {
        let memory = memory(1);
        let slab = memory.slab();
        let record = record(1, 5000);
        let mut slot = slab.take(5000).unwrap();
        assert_eq!((slot.len(), slot.offset()), (8192, 0));
        payload::fill(&record.key, &mut slot[..5000]);
        let (id, generation) = (slot.id(), slot.generation());
        assert!(slab.hold(id, generation).is_none(), "not readable while it is filled");
        let held = slot.seal(&record);
        assert_eq!((held.len(), held.record(), held.slot_bytes()), (5000, record, 8192));
        assert_eq!(payload::first_wrong_byte(&record.key, &held), None);
        let again = slab.hold(id, generation).unwrap();
        assert_eq!(slab.header(id).unwrap().holds, 2);
        assert_eq!(slab.retire(id, generation), Err(RetireError::Held { holds: 2 }));
        drop((held, again));
        slab.retire(id, generation).unwrap();
        assert!(slab.hold(id, generation).is_none());
        assert_eq!((slab.usage().limbo, slab.usage().regions_free), (1, 0));
        assert_eq!(slab.sweep(&HazardSet::new()), 1);
        assert_eq!((slab.usage().regions_free, slab.slot_bytes(id)), (1, None));
        assert_ne!(slab.take(5000).unwrap().generation(), generation);
    }

    #[test]
    fn classes_are_multiples_of_a_page_and_a_region_has_one() {
        let memory = memory(2);
        let slab = memory.slab();
        let small: Vec<Slot> = (0..512).map(|_| slab.take(1).unwrap()).collect();
        let big = slab.take(REGION as u32).unwrap();
        assert_eq!((small[0].len(), big.len() as u64), (4096, REGION));
        let refused = slab.take(4096).unwrap_err();
        let wanted = NoSlot { slot_bytes: 4096, class_slots: 512, reason: NoSlotReason::Exhausted };
        assert_eq!(refused, wanted);
        assert_eq!(slab.take(REGION as u32 + 1).unwrap_err().reason, NoSlotReason::Size);
        drop(big);
        let odd = slab.take(20_000).unwrap();
        assert_eq!((odd.len(), slab.usage().classes.len()), (20_480, 2));
        drop(small);
        assert_eq!(slab.usage().regions_free, 1);
    }

    #[test]
    fn a_draining_region_hands_nothing_out_and_comes_back_empty() {
        let memory = memory(1);
        let slab = memory.slab();
        let (first, second) = (slab.take(1 << 20).unwrap(), slab.take(1 << 20).unwrap());
        drop(first);
        slab.set_draining(0, true);
        assert!(slab.take(1 << 20).is_err());
        let held = second.seal(&record(1, 1));
        assert_eq!(slab.slots_of_region(0), [(held.id(), held.generation())]);
        let info = RegionInfo { region: 0, slot_bytes: 1 << 20, used: 1, held: 1 };
        assert_eq!(slab.regions(), [info]);
        let (id, generation) = (held.id(), held.generation());
        drop(held);
        slab.retire(id, generation).unwrap();
        slab.sweep(&HazardSet::new());
        assert_eq!(slab.take(4096).unwrap().len(), 4096, "another class has it now");
        let kept = slab.take(1 << 20).unwrap();
        slab.set_draining(0, true);
        slab.set_draining(0, false);
        assert!(slab.take(1 << 20).is_ok());
        drop(kept);
    }

    #[test]
    fn a_slot_under_a_hazard_is_not_swept() {
        let memory = memory(1);
        let (view, hazards) = worker(&memory);
        let slab = memory.slab();
        let mut slot = slab.take(4096).unwrap();
        slot.fill(5);
        let held = slot.seal(&record(1, 4096));
        let (id, generation) = (held.id(), held.generation());
        drop(held);
        let guard = view.read_at(id, generation).unwrap();
        assert!(guard.still_valid());
        slab.retire(id, generation).unwrap();
        assert_eq!(slab.sweep(&hazards), 0);
        assert!(!guard.still_valid() && guard.iter().all(|&byte| byte == 5));
        assert!(view.read_at(id, generation).is_err());
        drop(guard);
        assert_eq!(slab.sweep(&hazards), 1);
    }

    #[test]
    fn a_lent_slot_is_written_in_place_and_outlives_its_abort() {
        let memory = memory(1);
        let (view, hazards) = worker(&memory);
        let slab = memory.slab();
        let lent = slab.take(4096).unwrap().lend();
        let mut fill = view.fill(lent.id(), lent.generation(), 100).unwrap();
        assert!(view.fill(lent.id(), lent.generation(), 100).is_err(), "one writer at a time");
        fill.fill(9);
        let held = lent.seal(&record(1, 100));
        drop(fill);
        assert!(held.iter().all(|&byte| byte == 9));
        assert!(view.fill(held.id(), held.generation(), 1).is_err(), "sealed is sealed");

        let lent = slab.take(4096).unwrap().lend();
        let (id, generation) = (lent.id(), lent.generation());
        let fill = view.fill(id, generation, 4096).unwrap();
        drop(lent);
        assert_eq!(slab.sweep(&hazards), 0, "the worker may still write");
        drop(fill);
        assert_eq!(slab.sweep(&hazards), 1);
        assert!(view.fill(id, generation, 1).is_err());
    }

    #[test]
    fn every_header_state_is_adopted_as_it_should_be() {
        let memory = memory(2);
        let slab = memory.slab();
        let take = |number| {
            let mut slot = slab.take(64 << 10).unwrap();
            slot.fill(number as u8);
            slot
        };
        let held = take(1).seal(&record(1, 60_000));
        let unheld = take(2).seal(&record(2, 60_000));
        let (unheld_id, _) = (unheld.id(), drop(unheld));
        let filling = take(3);
        let retired = take(4).seal(&record(4, 60_000));
        let (retired_id, generation, _) = (retired.id(), retired.generation(), drop(retired));
        let [retired_id] = [retired_id].map(|id| (slab.retire(id, generation).unwrap(), id).1);
        let lent = take(5).lend();
        let flipped = take(6).seal(&record(6, 60_000));
        slab.shared.header(flipped.id())[3].fetch_xor(1 << 40, Ordering::Relaxed);
        let long = take(7).seal(&record(7, 60_000));
        let words = encode_record(&record(7, 65_537));
        slab.shared.header(long.id())[1..].iter().zip(words).for_each(|(w, v)| w.store(v, Ordering::Relaxed));
        let unknown = take(8).seal(&record(8, 60_000));
        slab.shared.header(unknown.id())[0].store(u64::MAX, Ordering::Relaxed);
        let nameless = take(9).seal(&record(9, 60_000));
        slab.shared.header(nameless.id())[0].store((SlotState::Sealed as u64) << 24, Ordering::Relaxed);

        let next = next_life(&memory);
        let adopted: Vec<_> = next.adopted().map(|(id, header)| (id, header.record, header.holds)).collect();
        assert_eq!(adopted, [(held.id(), record(1, 60_000), 0), (unheld_id, record(2, 60_000), 0)]);
        let condemned =
            [filling.id(), retired_id, lent.id(), flipped.id(), long.id(), unknown.id(), nameless.id()];
        for id in condemned {
            assert_eq!(next.header(id).unwrap().state, SlotState::Retired, "{id}");
        }
        assert_eq!((next.usage().limbo, next.usage().regions_free), (7, 1));
        assert_eq!(next.sweep(&HazardSet::new()), 7);
        let kept = next.hold(held.id(), held.generation()).expect("same generation as before");
        assert!(!kept.is_verified() && kept.iter().all(|&byte| byte == 1));
        assert!(next.mark_verified(&kept) && kept.is_verified());
        assert_eq!(next.adopted().count(), 1);
        let class = ClassUsage { slot_bytes: 64 << 10, slots: 32, free: 30, regions: 1 };
        assert_eq!(next.usage().classes, [class]);
        // The first life is over; its guards must not touch what the second one owns.
        std::mem::forget((held, filling, lent, flipped, long, unknown, nameless));
    }

    #[test]
    fn a_region_of_no_class_is_free_and_what_lay_in_it_is_not_found() {
        let memory = memory(1);
        let slab = memory.slab();
        let held = slab.take(4096).unwrap().seal(&record(1, 4096));
        let (id, generation) = (held.id(), held.generation());
        slab.shared.meta.word(slab.shared.layout.region(0)).store(12_345, Ordering::Relaxed);
        let next = next_life(&memory);
        assert_eq!((next.adopted().count(), next.usage().regions_free), (0, 1));
        let slot = next.take(4096).unwrap();
        assert_ne!(slot.id(), id, "it waits for readers of the damaged life");
        assert!(next.hold(id, generation).is_none());
        assert_eq!((next.usage().limbo, next.sweep(&HazardSet::new())), (1, 1));
        std::mem::forget(held);
    }

    #[test]
    fn numbers_from_elsewhere_are_answered_not_believed() {
        let memory = memory(1);
        let (view, _hazards) = worker(&memory);
        let slab = memory.slab();
        for slot in [0, 511, 512, 513, u32::MAX].map(SlotId) {
            assert!(slab.hold(slot, Generation(1)).is_none());
            assert_eq!(slab.retire(slot, Generation(1)), Err(RetireError::Gone));
            assert!(slab.header(slot).is_none() && slab.slot_bytes(slot).is_none());
            assert!(view.read_at(slot, Generation(1)).is_err());
            assert!(view.fill(slot, Generation(0), 1).is_err());
        }
        slab.set_draining(7, true);
        assert!(slab.slots_of_region(u32::MAX).is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        /// Random takes, seals, drops, retires and sweeps: no two owners overlap, the books add up, and a
        /// restart finds what was sealed.
        #[test]
        fn slots_never_overlap_and_the_books_add_up(steps in prop::collection::vec((0..6u8, any::<u16>()), 1..200)) {
            let memory = memory(3);
            let slab = memory.slab();
            let sizes = [4096, 12_288, 700_000, 2 << 20];
            let (mut slots, mut blocks) = (Vec::new(), Vec::new());
            let mut owned = BTreeMap::new();
            for (step, pick) in steps {
                let pick = usize::from(pick);
                match step {
                    0 | 1 => if let Ok(slot) = slab.take(sizes[pick % 4]) {
                        let range = (slot.offset(), slot.offset() + slot.len() as u64);
                        let before: Option<(&u64, &u64)> = owned.range(..range.1).next_back();
                        prop_assert!(before.is_none_or(|(_, &end)| end <= range.0));
                        owned.insert(range.0, range.1);
                        slots.push(slot);
                    },
                    2 if !slots.is_empty() => {
                        let slot = slots.swap_remove(pick % slots.len());
                        owned.remove(&slot.offset());
                    }
                    3 if !slots.is_empty() => {
                        let slot = slots.swap_remove(pick % slots.len());
                        let number = u64::from(slot.id().0);
                        blocks.push(slot.seal(&record(number, 4096)));
                    }
                    4 if !blocks.is_empty() => {
                        let block = blocks.swap_remove(pick % blocks.len());
                        let (id, generation, offset) = (block.id(), block.generation(), block.offset());
                        drop(block);
                        slab.retire(id, generation).unwrap();
                        owned.remove(&offset);
                        slab.sweep(&HazardSet::new());
                    }
                    _ => {}
                }
                let usage = slab.usage();
                let used: u32 = usage.classes.iter().map(|class| class.slots - class.free).sum();
                prop_assert_eq!(used as usize, slots.len() + blocks.len());
                let regions: u32 = usage.classes.iter().map(|class| class.regions).sum();
                prop_assert_eq!(regions + usage.regions_free, 3);
            }
            let next = next_life(&memory);
            let mut sealed: Vec<_> = blocks.iter().map(Held::id).collect();
            sealed.sort_unstable();
            prop_assert_eq!(next.adopted().map(|(id, _)| id).collect::<Vec<_>>(), sealed);
            prop_assert_eq!(next.sweep(&HazardSet::new()), slots.len());
            std::mem::forget((slots, blocks));
        }
    }
}
