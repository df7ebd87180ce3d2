//! The shared catalog table: one writer, lock-free readers in other processes.
//!
//! ```text
//! bucket, 256 bytes    overflow:16 sequence:32 | five tags | entry x 5
//! entry, 48 bytes      key 16 | disk location 8 | checksum 8 | slot 4, generation 4
//!                      binding 2, state 1, reason:4 frequency:2 priority:2 | expires at 4
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

use crate::map::Mapping;
use crate::meta::Layout;
use crate::seqlock;
use crate::sync::{AtomicU64, Ordering, spin_loop};

pub(crate) const BUCKET_BYTES: u64 = 256;
const BUCKET_ENTRIES: u64 = 5;
const WORDS: usize = 32;
const LOAD_PERCENT_MAX: u64 = 85;
/// Buckets a key may be passed along. Far beyond what chance does at this load; it bounds every search.
const PROBES_MAX: u64 = 1024;
const RETRIES_MAX: u32 = 64;
const NO_SLOT: u32 = u32::MAX;

pub(crate) fn buckets_for(entries_max: u64) -> u64 {
    (entries_max * 100).div_ceil(BUCKET_ENTRIES * LOAD_PERCENT_MAX).max(8)
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
        let misc = self.priority as u64 | u64::from(self.frequency.min(3)) << 2 | reason << 4;
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
        let state = match (rest >> 16) as u8 {
            1 => EntryState::Pending,
            2 => EntryState::Present,
            3 => EntryState::Ghost(MissReason::from_wire(misc >> 4)?),
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
        // Zero marks an empty place.
        Wanted { halves, tag: (halves[1] as u8).max(1), home }
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
    fn next(&self, bucket: u64) -> u64 {
        if bucket + 1 == self.count { 0 } else { bucket + 1 }
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
            at = self.next(at);
        }
        Ok(None)
    }

    /// As [`Self::find`] for many keys, each bucket asked for well before it is looked at.
    pub(crate) fn find_each(
        &self,
        keys: &[BlockKey],
        mut each: impl FnMut(usize, Result<Option<Entry>, Contended>) -> bool,
    ) {
        const BATCH: usize = 32;
        let mut wanted = [Wanted { halves: [0; 2], tag: 0, home: 0 }; BATCH];
        for (batch, keys) in keys.chunks(BATCH).enumerate() {
            for (want, key) in wanted.iter_mut().zip(keys) {
                *want = self.wanted(key);
                self.map.prefetch(self.at(want.home));
            }
            for want in &wanted[..keys.len()] {
                let tags = self.bucket(want.home)[1].load(Ordering::Relaxed);
                let place = matches(tags, want.tag).trailing_zeros() / 8;
                let at = self.at(want.home) + 16 + 48 * place as usize;
                self.map.prefetch(at);
                self.map.prefetch(at + 47);
            }
            for (index, want) in wanted[..keys.len()].iter().enumerate() {
                if !each(batch * BATCH + index, self.find_wanted(want)) {
                    return;
                }
            }
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
    let mut places = matches(bucket[1].load(Ordering::Relaxed), wanted.tag);
    while places != 0 {
        let place = places.trailing_zeros() as usize / 8;
        let at = 2 + place * 6;
        if bucket[at].load(Ordering::Relaxed) == wanted.halves[0]
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
    capacity: u64,
    len: u64,
    first_sequence: u32,
    one_thread: PhantomData<Cell<()>>,
}

impl Table {
    /// The table in `map`, emptied.
    pub(crate) fn new(
        map: Arc<Mapping>,
        file: Arc<OwnedFd>,
        layout: &Layout,
        epoch: Epoch,
    ) -> std::io::Result<Self> {
        let mut table = Self {
            buckets: Buckets::new(map, layout),
            file,
            capacity: layout.geometry.table_entries_max,
            len: 0,
            first_sequence: (epoch.0 as u32).wrapping_mul(0x9e37_79b1) << 1,
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
        let mut free = None;
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
            if overflow(bucket) == 0 && free.is_some() {
                break;
            }
            at = self.buckets.next(at);
        }
        let (target, place) = free.filter(|_| self.len < self.capacity).ok_or(full)?;
        // First the counts along the way, then the entry: a reader that finds it found its way to it.
        let mut at = wanted.home;
        while at != target {
            let bucket = self.buckets.bucket(at);
            let tags = bucket[1].load(Ordering::Relaxed);
            self.write(at, tags, overflow(bucket).saturating_add(1), None);
            at = self.buckets.next(at);
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
            at = self.buckets.next(at);
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
            at = self.buckets.next(at);
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
