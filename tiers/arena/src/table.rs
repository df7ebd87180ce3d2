//! The shared catalog table: one writer, lock-free readers in other processes.
//!
//! ```text
//! bucket, 256 bytes    overflow:16 sequence:32 | five tags | entry x 5
//! entry, 48 bytes      key 16 | disk location 8 | checksum 8 | slot 4, generation 4
//!                      binding 2, reason:4 state:4, reason:4 frequency:2 priority:2 | expires at 4
//!                      (of the reason the high bits stand beside the state, the low ones behind it)
//! ```
//! A key's home bucket comes from its low half, its tag from its high half. A full bucket passes the key on
//! to the next and counts it in `overflow`, so a search ends at the first bucket that passed nothing on:
//! there are no tombstones, and an entry never moves. At 85 % load an entry costs 60 bytes.
//!
//! Each bucket has its own sequence lock. A reader that meets the writer tries a few times, then says so;
//! the caller asks the daemon instead. What a reader finds is a hint: before a byte is served, the slot's
//! own header must say the same (see `view`).

use std::cell::Cell;
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kv_block::{
    BindingId, BlockKey, Checksum, DiskLocation, Epoch, Generation, MissReason, Priority, SlotId,
};
use rustix::fs::FallocateFlags;
use rustix::mm::Advice;

use crate::map::Mapping;
use crate::memory::Lock;
use crate::meta::{Layout, PAGE};
use crate::seqlock;
use crate::sync::{AtomicU64, Ordering, spin_loop};

pub(crate) const BUCKET_BYTES: u64 = 256;
const BUCKET_ENTRIES: u64 = 5;
const WORDS: usize = 32;
const LOAD_PERCENT_MAX: u64 = 81;
/// Buckets a key may be passed along. Far beyond what chance does at this load; it bounds every search.
const PROBES_MAX: u64 = 1024;
const RETRIES_MAX: u32 = 64;
const NO_SLOT: u32 = u32::MAX;

pub(crate) fn buckets_for(entries_max: u64) -> u64 {
    // Odd, so that every stride (a power of two) comes by every bucket.
    (entries_max * 100).div_ceil(BUCKET_ENTRIES * LOAD_PERCENT_MAX).max(8) | 1
}

/// What is known about a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryState {
    /// Announced; its bytes have not all arrived.
    Pending,
    /// On the host, on disk, or both.
    Present,
    /// Gone, and why.
    Ghost(MissReason),
}

/// One block in the catalog, all tiers in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Name.
    pub key: BlockKey,
    /// Where it lies on disk.
    pub disk: Option<DiskLocation>,
    /// Checksum of bytes and name.
    pub checksum: Checksum,
    /// Where it lies in the arena.
    pub host: Option<(SlotId, Generation)>,
    /// Scope, slice and length it was stored under; valid for one epoch.
    pub binding: BindingId,
    /// Present, announced or gone.
    pub state: EntryState,
    /// Retention class.
    pub priority: Priority,
    /// How often it was read lately, 0 to 3.
    pub frequency: u8,
    /// Unix time in seconds after which it counts as expired; 0 means never.
    pub expires_at: u32,
}

impl Entry {
    /// An announced block: a name and nothing else.
    pub fn pending(key: BlockKey, binding: BindingId) -> Self {
        Self {
            key,
            disk: None,
            checksum: Checksum::default(),
            host: None,
            binding,
            state: EntryState::Pending,
            priority: Priority::default(),
            frequency: 0,
            expires_at: 0,
        }
    }

    fn encode(&self) -> [u64; 6] {
        let [low, high] = self.key.halves();
        let (slot, generation) = self.host.map_or((NO_SLOT, 0), |(slot, generation)| (slot.0, generation.0));
        let (state, reason) = match self.state {
            EntryState::Pending => (1, 0),
            EntryState::Present => (2, 0),
            EntryState::Ghost(reason) => (3, reason as u64),
        };
        let state = state | reason >> 4 << 4;
        let misc = self.priority as u64 | u64::from(self.frequency.min(3)) << 2 | (reason & 15) << 4;
        [
            low,
            high,
            self.disk.map_or(0, DiskLocation::bits),
            self.checksum.0,
            u64::from(slot) | u64::from(generation) << 32,
            u64::from(self.binding.0) | state << 16 | misc << 24 | u64::from(self.expires_at) << 32,
        ]
    }

    /// `None` for an entry that no version of ours wrote.
    #[inline]
    fn decode(words: [u64; 6]) -> Option<Self> {
        let [low, high, disk, checksum, place, rest] = words;
        let misc = (rest >> 24) as u8;
        let state = (rest >> 16) as u8;
        let state = match (state & 15, state >> 4) {
            (1, 0) => EntryState::Pending,
            (2, 0) => EntryState::Present,
            (3, high) => EntryState::Ghost(MissReason::from_wire(high << 4 | misc >> 4)?),
            _ => return None,
        };
        let slot = place as u32;
        Some(Self {
            key: BlockKey::from_halves([low, high]),
            disk: DiskLocation::from_bits(disk),
            checksum: Checksum(checksum),
            host: (slot != NO_SLOT).then_some((SlotId(slot), Generation((place >> 32) as u32))),
            binding: BindingId(rest as u16),
            state,
            priority: Priority::from_bits(misc & 3),
            frequency: misc >> 2 & 3,
            expires_at: (rest >> 32) as u32,
        })
    }
}

/// The table has as many entries as it was made for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the catalog table is full at {capacity} entries")]
pub struct Full {
    /// Most entries it takes.
    pub capacity: u64,
}

/// The writer was in the way every time a reader looked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Contended;

/// A key's home bucket and what to look for there.
#[derive(Clone, Copy)]
struct Wanted {
    halves: [u64; 2],
    tag: u8,
    home: u64,
    /// Buckets from one place to the next when places are full.
    stride: u64,
    /// Where a batch has walked, and the place its tags point to.
    near: u64,
    place: Option<u32>,
}

/// The buckets as both sides see them.
#[derive(Clone, Debug)]
pub(crate) struct Buckets {
    map: Arc<Mapping>,
    offset: usize,
    count: u64,
}

impl Buckets {
    pub(crate) fn new(map: Arc<Mapping>, layout: &Layout) -> Self {
        Self { map, offset: layout.table as usize, count: layout.buckets }
    }

    #[inline]
    fn wanted(&self, key: &BlockKey) -> Wanted {
        let halves = key.halves();
        let home = ((u128::from(halves[0]) * u128::from(self.count)) >> 64) as u64;
        // Zero marks an empty place. Eight strides keep overfull buckets from growing into runs.
        let (tag, stride) = ((halves[1] as u8).max(1), 1 << (halves[1] >> 8 & 7));
        Wanted { halves, tag, home, stride, near: home, place: None }
    }

    #[inline]
    fn at(&self, bucket: u64) -> usize {
        self.offset + (bucket * BUCKET_BYTES) as usize
    }

    #[inline]
    fn bucket(&self, bucket: u64) -> &[AtomicU64; WORDS] {
        self.map.words(self.at(bucket))
    }

    #[inline]
    fn next(&self, bucket: u64, wanted: &Wanted) -> u64 {
        let next = bucket + wanted.stride;
        if next < self.count { next } else { next % self.count }
    }

    fn probes(&self) -> u64 {
        self.count.min(PROBES_MAX)
    }

    /// Reads under the sequence locks; for everybody but the writer.
    pub(crate) fn find(&self, key: &BlockKey) -> Result<Option<Entry>, Contended> {
        self.find_wanted(&self.wanted(key))
    }

    fn find_wanted(&self, wanted: &Wanted) -> Result<Option<Entry>, Contended> {
        let mut at = wanted.home;
        for _ in 0..self.probes() {
            let (found, passed_on) = read_bucket(self.bucket(at), wanted)?;
            if found.is_some() || !passed_on {
                return Ok(found);
            }
            at = self.next(at, wanted);
        }
        Ok(None)
    }

    /// As [`Self::find`] for many keys, as a pipeline: a key's home bucket is asked for three steps before
    /// it is read, its entry (or the next bucket) two steps, the entry there one step. Most keys are found
    /// with everything near; the others walk on as `find` does.
    pub(crate) fn find_each(
        &self,
        keys: &[BlockKey],
        mut each: impl FnMut(usize, Result<Option<Entry>, Contended>) -> bool,
    ) {
        /// Keys between two steps: enough to cover memory latency, few enough for the line-fill buffers.
        const STEP: usize = 8;
        const RING: usize = 32;
        let none = Wanted { halves: [0; 2], tag: 0, home: 0, stride: 1, near: 0, place: None };
        let mut ring = [none; RING];
        for now in 0..keys.len() + 3 * STEP {
            if let Some(key) = keys.get(now) {
                let wanted = self.wanted(key);
                self.map.prefetch(self.at(wanted.home));
                ring[now % RING] = wanted;
            }
            if now >= STEP {
                self.come_nearer(&mut ring[(now - STEP) % RING]);
            }
            if now >= 2 * STEP && ring[(now - 2 * STEP) % RING].place.is_none() {
                self.come_nearer(&mut ring[(now - 2 * STEP) % RING]);
            }
            if now >= 3 * STEP {
                let wanted = &ring[(now - 3 * STEP) % RING];
                // Found where the tags said: which buckets were passed on the way does not matter.
                let found = match self.read_near(wanted) {
                    None => self.find_wanted(wanted),
                    found => Ok(found),
                };
                if !each(now - 3 * STEP, found) {
                    return;
                }
            }
        }
    }

    /// The entry where the tags pointed to, if it is the wanted one and nobody is writing.
    #[inline]
    fn read_near(&self, wanted: &Wanted) -> Option<Entry> {
        let bucket = self.bucket(wanted.near);
        let head = seqlock::begin_read(&bucket[0])?;
        let words = entry_words(bucket, wanted.place?.min(BUCKET_ENTRIES as u32 - 1) as usize);
        let whole = seqlock::end_read(&bucket[0], head);
        // An empty place has no state that decodes.
        Entry::decode(words).filter(|_| whole && words[..2] == wanted.halves)
    }

    /// Asks for what the bucket's tags point to: the entry, or the next bucket.
    #[inline]
    fn come_nearer(&self, wanted: &mut Wanted) {
        let bucket = self.bucket(wanted.near);
        let places = matches(bucket[1].load(Ordering::Relaxed), wanted.tag);
        if places != 0 {
            let place = places.trailing_zeros() / 8;
            wanted.place = Some(place);
            let entry = self.at(wanted.near) + 16 + 48 * place as usize;
            self.map.prefetch(entry);
            self.map.prefetch(entry + 47);
        } else if bucket[0].load(Ordering::Relaxed) >> 32 != 0 {
            wanted.near = self.next(wanted.near, wanted);
            self.map.prefetch(self.at(wanted.near));
        }
    }
}

/// The places whose tag is `tag`, as the top bits of their bytes; may name a place too many, never too few.
#[inline]
fn matches(tags: u64, tag: u8) -> u64 {
    let differing = tags ^ (u64::from(tag) * 0x01_0101_0101);
    differing.wrapping_sub(0x01_0101_0101) & !differing & 0x80_8080_8080
}

#[inline]
fn entry_words(bucket: &[AtomicU64; WORDS], place: usize) -> [u64; 6] {
    std::array::from_fn(|at| bucket[2 + place * 6 + at].load(Ordering::Relaxed))
}

#[inline]
fn place_of(bucket: &[AtomicU64; WORDS], wanted: &Wanted) -> Option<usize> {
    let tags = bucket[1].load(Ordering::Relaxed);
    let mut places = matches(tags, wanted.tag);
    while places != 0 {
        let place = places.trailing_zeros() as usize / 8;
        let at = 2 + place * 6;
        // The tag again: an empty place named too many holds the bytes of the all-zero key.
        if (tags >> (place * 8)) as u8 == wanted.tag
            && bucket[at].load(Ordering::Relaxed) == wanted.halves[0]
            && bucket[at + 1].load(Ordering::Relaxed) == wanted.halves[1]
        {
            return Some(place);
        }
        places &= places - 1;
    }
    None
}

/// The wanted entry of a bucket, and whether the bucket passed any key on.
#[inline]
fn read_bucket(bucket: &[AtomicU64; WORDS], wanted: &Wanted) -> Result<(Option<Entry>, bool), Contended> {
    for _ in 0..RETRIES_MAX {
        if let Some(head) = seqlock::begin_read(&bucket[0]) {
            let words = place_of(bucket, wanted).map(|place| entry_words(bucket, place));
            if seqlock::end_read(&bucket[0], head) {
                return Ok((words.and_then(Entry::decode), head >> 32 != 0));
            }
        }
        spin_loop();
    }
    Err(Contended)
}

/// The table as its one writer sees it. Belongs to one thread at a time.
#[derive(Debug)]
pub struct Table {
    buckets: Buckets,
    file: Arc<OwnedFd>,
    /// Held as long as anything may write; see `memory`.
    _lock: Lock,
    capacity: u64,
    len: u64,
    first_sequence: u32,
    /// Whether the file system may give huge pages.
    huge: bool,
    one_thread: PhantomData<Cell<()>>,
}

/// The table as other threads of the daemon read it: under the sequence locks, like a worker.
#[derive(Clone, Debug)]
pub struct TableReader(Buckets);

impl TableReader {
    pub(crate) fn new(map: Arc<Mapping>, layout: &Layout) -> Self {
        Self(Buckets::new(map, layout))
    }

    /// The entry of `key`; `None` also when the writer was in the way at every look. Only a hint by the time
    /// it is used: the slot's header decides.
    pub fn find(&self, key: &BlockKey) -> Option<Entry> {
        self.0.find(key).unwrap_or(None)
    }

    /// [`Self::find`] for many keys, in order, with the memory latencies overlapped; `each` says whether to
    /// go on.
    pub fn find_each(&self, keys: &[BlockKey], mut each: impl FnMut(Option<Entry>) -> bool) {
        self.0.find_each(keys, |_, found| each(found.unwrap_or(None)));
    }
}

impl Table {
    /// The table in `map`, emptied.
    pub(crate) fn new(
        map: Arc<Mapping>,
        file: Arc<OwnedFd>,
        lock: Lock,
        huge: bool,
        layout: &Layout,
        epoch: Epoch,
    ) -> std::io::Result<Self> {
        let mut table = Self {
            buckets: Buckets::new(map, layout),
            file,
            _lock: lock,
            capacity: layout.geometry.table_entries_max,
            len: 0,
            first_sequence: (epoch.0 as u32).wrapping_mul(0x9e37_79b1) << 1,
            huge,
            one_thread: PhantomData,
        };
        table.clear()?;
        Ok(table)
    }

    /// Entries in it.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no entry.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Most entries it takes.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Number of buckets, the bound of [`Self::scan`].
    pub fn buckets(&self) -> u64 {
        self.buckets.count
    }

    /// Shared memory per entry when full.
    pub fn bytes_per_entry(&self) -> f64 {
        (self.buckets.count * BUCKET_BYTES) as f64 / self.capacity as f64
    }

    /// Forgets everything and gives the memory back before taking it again. Fails when the file system is
    /// full, and is then empty but without memory behind it: give the table up.
    pub fn clear(&mut self) -> std::io::Result<()> {
        self.len = 0;
        let (offset, len) = (self.buckets.offset as u64, self.buckets.count * BUCKET_BYTES);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&*self.file, punch, offset, len)?;
        if self.huge {
            // Huge pages come only by touching; what does not come so comes below.
            let range = (offset as usize, len as usize & !(PAGE as usize - 1));
            let _ = self.buckets.map.advise_range(range.0, range.1, Advice::LinuxPopulateWrite);
        }
        Ok(rustix::fs::fallocate(&*self.file, FallocateFlags::empty(), offset, len)?)
    }

    /// Asks the processor for the home bucket of `key`; a later call with it is then quick.
    #[inline]
    pub fn prefetch(&self, key: &BlockKey) {
        let at = self.buckets.at(self.buckets.wanted(key).home);
        (0..4).for_each(|line| self.buckets.map.prefetch(at + line * 64));
    }

    /// The entry of `key`.
    pub fn find(&self, key: &BlockKey) -> Option<Entry> {
        let wanted = self.buckets.wanted(key);
        let (at, place) = self.locate(&wanted)?;
        Entry::decode(entry_words(self.buckets.bucket(at), place))
    }

    /// Looks up many keys at once, in order, with the memory latencies overlapped.
    pub fn find_each(&self, keys: &[BlockKey], mut each: impl FnMut(usize, Option<Entry>)) {
        // The writer is here, so nobody is in the way.
        self.buckets.find_each(keys, |index, found| {
            each(index, found.unwrap_or(None));
            true
        });
    }

    /// Inserts the entry, or replaces the one with the same key.
    pub fn set(&mut self, entry: &Entry) -> Result<(), Full> {
        let full = Full { capacity: self.capacity };
        let wanted = self.buckets.wanted(&entry.key);
        let (mut free, mut is_new) = (None, false);
        let mut at = wanted.home;
        for _ in 0..self.buckets.probes() {
            let bucket = self.buckets.bucket(at);
            if let Some(place) = place_of(bucket, &wanted) {
                let tags = bucket[1].load(Ordering::Relaxed);
                self.write(at, tags, overflow(bucket), Some((place, entry.encode())));
                return Ok(());
            }
            if free.is_none() {
                free = free_place(bucket).map(|place| (at, place));
            }
            // Beyond a bucket that passed nothing on, only a free place is of interest.
            is_new |= overflow(bucket) == 0;
            if is_new && free.is_some() {
                break;
            }
            at = self.buckets.next(at, &wanted);
        }
        let (target, place) = free.filter(|_| self.len < self.capacity).ok_or(full)?;
        // First the counts along the way, then the entry: a reader that finds it found its way to it.
        let mut at = wanted.home;
        while at != target {
            let bucket = self.buckets.bucket(at);
            let tags = bucket[1].load(Ordering::Relaxed);
            self.write(at, tags, overflow(bucket).saturating_add(1), None);
            at = self.buckets.next(at, &wanted);
        }
        let bucket = self.buckets.bucket(target);
        let tags = bucket[1].load(Ordering::Relaxed) | u64::from(wanted.tag) << (place * 8);
        self.write(target, tags, overflow(bucket), Some((place, entry.encode())));
        self.len += 1;
        Ok(())
    }

    /// Changes the entry of `key` in place; the key itself stays. Gives the entry as it is now.
    pub fn update(&mut self, key: &BlockKey, change: impl FnOnce(&mut Entry)) -> Option<Entry> {
        let (at, place) = self.locate(&self.buckets.wanted(key))?;
        let bucket = self.buckets.bucket(at);
        let mut entry = Entry::decode(entry_words(bucket, place))?;
        change(&mut entry);
        entry.key = *key;
        self.write(at, bucket[1].load(Ordering::Relaxed), overflow(bucket), Some((place, entry.encode())));
        Some(entry)
    }

    /// Removes the entry of `key` and gives it.
    pub fn remove(&mut self, key: &BlockKey) -> Option<Entry> {
        let wanted = self.buckets.wanted(key);
        let (target, place) = self.locate(&wanted)?;
        let bucket = self.buckets.bucket(target);
        let entry = Entry::decode(entry_words(bucket, place));
        let tags = bucket[1].load(Ordering::Relaxed) & !(0xff << (place * 8));
        self.write(target, tags, overflow(bucket), Some((place, [0; 6])));
        let mut at = wanted.home;
        while at != target {
            let bucket = self.buckets.bucket(at);
            let passed_on = overflow(bucket);
            // A count that reached its end no longer knows; it stays and costs a look at the next bucket.
            let passed_on = if passed_on == u16::MAX { passed_on } else { passed_on.saturating_sub(1) };
            self.write(at, bucket[1].load(Ordering::Relaxed), passed_on, None);
            at = self.buckets.next(at, &wanted);
        }
        self.len -= 1;
        entry
    }

    /// Calls `each` for every entry of `buckets` buckets from bucket `from` on. Gives the bucket to go on
    /// from, `None` at the end. Entries set between two calls may or may not be seen.
    pub fn scan(&self, from: u64, buckets: u64, mut each: impl FnMut(Entry)) -> Option<u64> {
        let end = from.saturating_add(buckets).min(self.buckets.count);
        for at in from..end {
            let bucket = self.buckets.bucket(at);
            let tags = bucket[1].load(Ordering::Relaxed);
            for place in (0..BUCKET_ENTRIES as usize).filter(|place| tags >> (place * 8) & 0xff != 0) {
                if let Some(entry) = Entry::decode(entry_words(bucket, place)) {
                    each(entry);
                }
            }
        }
        (end < self.buckets.count).then_some(end)
    }

    /// Number of places, the bound of [`Self::at_place`].
    pub fn places(&self) -> u64 {
        self.buckets.count * BUCKET_ENTRIES
    }

    /// The entry at a place, if one is there. An entry keeps its place for as long as it is in the table, so
    /// whoever goes through them in order can stop behind any.
    pub fn at_place(&self, at: u64) -> Option<Entry> {
        let (bucket, place) = (at / BUCKET_ENTRIES, (at % BUCKET_ENTRIES) as usize);
        if bucket >= self.buckets.count {
            return None;
        }
        let bucket = self.buckets.bucket(bucket);
        if bucket[1].load(Ordering::Relaxed) >> (place * 8) & 0xff == 0 {
            return None;
        }
        Entry::decode(entry_words(bucket, place))
    }

    fn locate(&self, wanted: &Wanted) -> Option<(u64, usize)> {
        let mut at = wanted.home;
        for _ in 0..self.buckets.probes() {
            let bucket = self.buckets.bucket(at);
            if let Some(place) = place_of(bucket, wanted) {
                return Some((at, place));
            }
            if overflow(bucket) == 0 {
                return None;
            }
            at = self.buckets.next(at, wanted);
        }
        None
    }

    fn write(&mut self, at: u64, tags: u64, overflow: u16, entry: Option<(usize, [u64; 6])>) {
        let bucket = self.buckets.bucket(at);
        let inside = seqlock::begin_write(&bucket[0], self.first_sequence);
        bucket[1].store(tags, Ordering::Relaxed);
        if let Some((place, words)) = entry {
            for (at, word) in words.into_iter().enumerate() {
                bucket[2 + place * 6 + at].store(word, Ordering::Relaxed);
            }
        }
        seqlock::end_write(&bucket[0], inside, overflow.into());
    }
}

fn overflow(bucket: &[AtomicU64; WORDS]) -> u16 {
    (bucket[0].load(Ordering::Relaxed) >> 32) as u16
}

fn free_place(bucket: &[AtomicU64; WORDS]) -> Option<usize> {
    let tags = bucket[1].load(Ordering::Relaxed);
    (0..BUCKET_ENTRIES as usize).find(|place| tags >> (place * 8) & 0xff == 0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{Geometry, ShardMemory};

    fn table(entries: u64) -> Table {
        let geometry = Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: entries };
        ShardMemory::anonymous(geometry).unwrap().take_table().unwrap().unwrap()
    }

    /// Keys whose home, tag and stride collide as often as wanted.
    fn key(low: u64, high: u64) -> BlockKey {
        BlockKey::from_halves([low, high])
    }

    fn entry(key: BlockKey, version: u64) -> Entry {
        Entry {
            disk: DiskLocation::from_bits(version),
            checksum: Checksum(version),
            host: Some((SlotId(version as u32), Generation(version as u32))),
            state: EntryState::Present,
            expires_at: version as u32,
            ..Entry::pending(key, BindingId(version as u16))
        }
    }

    fn entries_of(table: &Table) -> BTreeMap<BlockKey, Entry> {
        let mut all = BTreeMap::new();
        let mut from = 0;
        loop {
            let next = table.scan(from, 3, |entry| assert!(all.insert(entry.key, entry).is_none()));
            let Some(next) = next else { return all };
            from = next;
        }
    }

    #[test]
    fn entries_survive_encoding() {
        let mut entry = Entry::pending(BlockKey([7; 16]), BindingId(9));
        assert_eq!(Entry::decode(entry.encode()), Some(entry));
        for reason in MissReason::ALL {
            for priority in Priority::ALL {
                entry = Entry { state: EntryState::Ghost(reason), priority, frequency: 3, ..entry };
                assert_eq!(Entry::decode(entry.encode()), Some(entry));
            }
        }
        entry = Entry { host: Some((SlotId(1), Generation(2))), expires_at: u32::MAX, ..entry };
        assert_eq!(Entry::decode(entry.encode()), Some(entry));
        assert_eq!(Entry::decode([0; 6]), None, "an empty place is no entry");
        assert_eq!(Entry::decode([u64::MAX; 6]), None);
    }

    #[test]
    fn an_entry_costs_at_most_64_bytes() {
        assert!(table(1_000_000).bytes_per_entry() <= 64.0);
    }

    #[test]
    fn a_table_takes_what_it_was_made_for_and_refuses_one_more() {
        let mut table = table(1000);
        // Consecutive homes would be too kind; multiples of a large odd number spread as digests do.
        let keys: Vec<_> =
            (1..=1001u64).map(|n| key(n.wrapping_mul(0x9e37_79b9_7f4a_7c15), n * 0x1234_5677)).collect();
        for (version, key) in keys[..1000].iter().enumerate() {
            table.set(&entry(*key, version as u64)).unwrap();
        }
        assert_eq!(table.set(&entry(keys[1000], 0)), Err(Full { capacity: 1000 }));
        table.set(&entry(keys[5], 5000)).expect("replacing needs no room");
        assert_eq!(table.find(&keys[5]), Some(entry(keys[5], 5000)));
        assert_eq!(table.remove(&keys[7]), Some(entry(keys[7], 7)));
        table.set(&entry(keys[1000], 0)).unwrap();
        assert_eq!(table.len(), 1000);
        table.clear().unwrap();
        assert!(table.is_empty() && entries_of(&table).is_empty() && table.find(&keys[5]).is_none());
    }

    #[test]
    fn even_keys_that_all_collide_are_found_until_the_probes_end() {
        let mut table = table(10_000);
        let mut taken = 0;
        while table.set(&entry(key(0, taken << 16), taken)).is_ok() {
            taken += 1;
        }
        assert_eq!(taken, PROBES_MAX * BUCKET_ENTRIES);
        assert!((0..taken).all(|n| table.find(&key(0, n << 16)) == Some(entry(key(0, n << 16), n))));
        for n in 0..taken {
            assert!(table.remove(&key(0, n << 16)).is_some());
        }
        let left = (0..table.buckets()).filter(|&at| overflow(table.buckets.bucket(at)) != 0).count();
        assert_eq!(left, 0, "every passed-on key was taken back");
    }

    #[test]
    fn a_batch_finds_what_single_looks_find() {
        let mut table = table(300);
        let keys: Vec<_> = (0..400u64).map(|n| key(n << 56, ((n % 7) << 8) | n)).collect();
        for (version, key) in keys.iter().enumerate().filter(|(n, _)| n % 4 != 3).take(300) {
            table.set(&entry(*key, version as u64)).unwrap();
        }
        for len in [0, 1, 7, 8, 33, 400] {
            let mut found = Vec::new();
            table.find_each(&keys[..len], |index, entry| found.push((index, entry)));
            let wanted: Vec<_> = keys[..len].iter().map(|key| table.find(key)).enumerate().collect();
            assert_eq!(found, wanted);
        }
    }

    #[test]
    fn the_all_zero_key_is_a_key_like_any_other() {
        let mut table = table(8);
        // Beside a key with the same tag, where an empty place looks most like it.
        table.set(&entry(key(0, 1), 1)).unwrap();
        assert_eq!((table.find(&key(0, 0)), table.buckets.find(&key(0, 0))), (None, Ok(None)));
        table.set(&entry(key(0, 0), 2)).unwrap();
        assert_eq!((table.len(), table.find(&key(0, 0))), (2, Some(entry(key(0, 0), 2))));
    }

    #[test]
    fn a_bucket_left_locked_makes_readers_say_so() {
        let mut table = table(8);
        let key = key(1, 1);
        table.set(&entry(key, 1)).unwrap();
        let home = table.buckets.wanted(&key).home;
        seqlock::begin_write(&table.buckets.bucket(home)[0], 2);
        assert_eq!(table.buckets.find(&key), Err(Contended));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set(u64, u64, u64),
        Update(u64, u64),
        Remove(u64, u64),
        Clear,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        // Few homes, tags and strides: chains grow, cross and shrink.
        let low = prop_oneof![Just(0), Just(u64::MAX), 0..4u64].prop_map(|low: u64| low.rotate_right(4));
        let high = 0..0x600u64;
        let step = prop_oneof![
            8 => (low.clone(), high.clone(), any::<u64>()).prop_map(|(l, h, v)| Step::Set(l, h, v)),
            2 => (low.clone(), high.clone()).prop_map(|(l, h)| Step::Update(l, h)),
            6 => (low, high).prop_map(|(l, h)| Step::Remove(l, h)),
            1 => Just(Step::Clear),
        ];
        prop::collection::vec(step, 1..400)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_table_is_a_map(steps in steps()) {
            let mut table = table(60);
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Set(low, high, version) => {
                        let entry = entry(key(low, high % 0x180 * 4), version);
                        if table.set(&entry).is_ok() {
                            model.insert(entry.key, entry);
                        } else {
                            prop_assert!(model.len() == 60 && !model.contains_key(&entry.key));
                        }
                    }
                    Step::Update(low, high) => {
                        let key = key(low, high % 0x180 * 4);
                        let change = |entry: &mut Entry| entry.frequency = (entry.frequency + 1) % 4;
                        let updated = table.update(&key, change);
                        prop_assert_eq!(updated, model.get_mut(&key).map(|entry| { change(entry); *entry }));
                    }
                    Step::Remove(low, high) => {
                        let key = key(low, high % 0x180 * 4);
                        prop_assert_eq!(table.remove(&key), model.remove(&key));
                    }
                    Step::Clear if model.len() > 50 => {
                        table.clear().unwrap();
                        model.clear();
                    }
                    Step::Clear => {}
                }
                prop_assert_eq!(table.len(), model.len() as u64);
            }
            for (key, entry) in &model {
                prop_assert_eq!(table.find(key), Some(*entry));
                prop_assert_eq!(table.buckets.find(key), Ok(Some(*entry)));
            }
            prop_assert_eq!(entries_of(&table), model);
        }
    }
}
