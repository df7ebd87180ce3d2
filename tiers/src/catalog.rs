//! Which block is where: one entry for each key, all tiers in it.
//!
//! ```text
//!              announce                  publish
//!   (nothing) ----------> Pending -------------------> Present{host}
//!       ^  ^                 | withdraw                  | add_disk      ^ publish (onboarded)
//!       |  +-----------------+                           v               |
//!       |                                         Present{host, disk} ---+---> Present{disk}
//!   forgotten,                                           |   drop_host / drop_disk, the last one, or remove
//!   oldest first                                         v
//!       +------------------------------------------ Ghost(reason)
//! ```
//! The entries lie in shared memory ([`Table`]), where workers look them up by themselves; the transitions
//! are here. A **ghost** remembers why a block is gone, so that a miss can say so and a block that returns
//! is known as such. Ghosts are bounded and the oldest is forgotten first; when the table is full they make
//! room for blocks.
//!
//! What must hold: an entry is `Present` exactly when it is on a tier; the counts are those of the entries
//! at every moment.

use std::collections::VecDeque;

use kv_arena::{Entry, EntryState, Full, Table};
use kv_block::{
    BindingId, BlockKey, Checksum, DiskLocation, Generation, MissReason, Priority, Record, SlotId,
};

use crate::lifecycle::{Block, Sealed};

/// Entries by what they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// All of them.
    pub entries: u64,
    /// Announced.
    pub pending: u64,
    /// On some tier.
    pub present: u64,
    /// In host memory.
    pub host: u64,
    /// On disk.
    pub disk: u64,
    /// Gone and remembered.
    pub ghosts: u64,
    /// Among the ghosts, those that failed their checksum.
    pub quarantined: u64,
}

/// Blocks of one binding.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BindingCounts {
    /// Announced.
    pub pending: u64,
    /// In host memory.
    pub host: u64,
    /// On disk.
    pub disk: u64,
}

/// Answer to a lookup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lookup {
    /// It is on the host, on disk or on both: the entry says where.
    Found(Entry),
    /// It cannot be read, and why.
    Miss(MissReason),
}

/// What an announcement met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Announced {
    /// Nothing: the key is pending now.
    Fresh {
        /// The block was here before and is remembered.
        returning: bool,
    },
    /// Somebody else's announcement.
    Pending,
    /// The block itself.
    Present(Entry),
}

/// What a block that became readable from host memory met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Published {
    /// The block was here before: on disk, or remembered.
    pub returning: bool,
    /// A copy on disk with other bytes. The catalog no longer knows it: remove it from the store.
    pub stale_disk: Option<DiskLocation>,
}

/// Why a block did not enter the catalog.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotEntered {
    /// There is one on that tier already, or one with other bytes on another.
    #[error("the catalog has the block already")]
    Already {
        /// The entry.
        entry: Entry,
    },
    /// The table is full of blocks.
    #[error(transparent)]
    Full(#[from] Full),
}

/// What became of an entry that lost a tier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dropped {
    /// It was not there (any more): nothing changed.
    Unchanged,
    /// It is still on another tier.
    Remains(Entry),
    /// That was the last one; this is what the entry was.
    Gone(Entry),
}

/// The catalog of one shard. Its only writer.
#[derive(Debug)]
pub struct Catalog {
    table: Table,
    /// Ghosts with their numbers, oldest first. A ghost that came back leaves its line here.
    ghosts: VecDeque<(BlockKey, u64)>,
    ghosts_max: usize,
    ghost_number: u64,
    counts: Counts,
    by_binding: Vec<BindingCounts>,
}

/// Whether a block's time to live is over at `now` (Unix seconds).
pub fn is_expired(entry: &Entry, now: u32) -> bool {
    entry.expires_at != 0 && entry.expires_at <= now
}

impl Catalog {
    /// A catalog over an empty table that remembers at most `ghosts_max` blocks after they are gone, at
    /// 24 bytes each beside their entries.
    pub fn new(table: Table, ghosts_max: usize) -> Self {
        debug_assert!(table.is_empty());
        Self {
            table,
            ghosts: VecDeque::new(),
            ghosts_max,
            ghost_number: 0,
            counts: Counts::default(),
            by_binding: Vec::new(),
        }
    }

    /// The entry of `key`, whatever it is.
    pub fn find(&self, key: &BlockKey) -> Option<Entry> {
        self.table.find(key)
    }

    /// Asks the processor for the entry of `key`; a later [`Self::find`] is then quick.
    pub fn prefetch(&self, key: &BlockKey) {
        self.table.prefetch(key);
    }

    /// The entries of many keys, in order, with the memory latencies overlapped.
    pub fn find_each(&self, keys: &[BlockKey], each: impl FnMut(usize, Option<Entry>)) {
        self.table.find_each(keys, each);
    }

    /// Whether `key` can be read at `now` (Unix seconds), and from where.
    pub fn lookup(&self, key: &BlockKey, now: u32) -> Lookup {
        match self.table.find(key) {
            None => Lookup::Miss(MissReason::NeverStored),
            Some(entry) => Self::judge(entry, now),
        }
    }

    /// What an entry means to somebody who wants to read it at `now` (Unix seconds).
    pub fn judge(entry: Entry, now: u32) -> Lookup {
        match entry.state {
            EntryState::Pending => Lookup::Miss(MissReason::NotComplete),
            EntryState::Ghost(reason) => Lookup::Miss(reason),
            EntryState::Present if is_expired(&entry, now) => Lookup::Miss(MissReason::Expired),
            EntryState::Present => Lookup::Found(entry),
        }
    }

    /// Entries by what they are.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Blocks of one binding.
    pub fn counts_of(&self, binding: BindingId) -> BindingCounts {
        self.by_binding.get(usize::from(binding.0)).copied().unwrap_or_default()
    }

    /// Most entries it takes, ghosts included.
    pub fn capacity(&self) -> u64 {
        self.table.capacity()
    }

    /// The entries of `buckets` buckets from bucket `from` on, and where to go on; `None` at the end. For work
    /// in parts: expiry, purges.
    pub fn scan(&self, from: u64, buckets: u64) -> (Vec<Entry>, Option<u64>) {
        let mut entries = Vec::new();
        let next = self.table.scan(from, buckets, |entry| entries.push(entry));
        (entries, next)
    }

    /// The first `count` entries that `wanted` takes, of those at `places` places from place `from` on, and
    /// where to go on; `None` at the end. For listings: no page is longer than asked for.
    pub fn page(
        &self,
        from: u64,
        places: u64,
        count: usize,
        mut wanted: impl FnMut(&Entry) -> bool,
    ) -> (Vec<Entry>, Option<u64>) {
        let end = from.saturating_add(places).min(self.table.places());
        let mut entries = Vec::new();
        for at in from..end {
            if entries.len() >= count {
                return (entries, Some(at));
            }
            entries.extend(self.table.at_place(at).filter(&mut wanted));
        }
        (entries, (end < self.table.places()).then_some(end))
    }

    /// Says that a block will be stored.
    pub fn announce(
        &mut self,
        key: &BlockKey,
        binding: BindingId,
        priority: Priority,
        expires_at: u32,
    ) -> Result<Announced, Full> {
        let before = self.table.find(key);
        let remembered = match before.map(|entry| (entry, entry.state)) {
            Some((entry, EntryState::Present)) => return Ok(Announced::Present(entry)),
            Some((_, EntryState::Pending)) => return Ok(Announced::Pending),
            Some((_, EntryState::Ghost(reason))) => Some(reason),
            None => None,
        };
        let frequency = before.map_or(0, |entry| entry.frequency);
        let checksum = remember(remembered);
        let pending = Entry { priority, expires_at, frequency, checksum, ..Entry::pending(*key, binding) };
        self.set(before, pending)?;
        Ok(Announced::Fresh { returning: remembered.is_some() })
    }

    /// Takes an announcement back: all is as it was before. False when there is none.
    pub fn withdraw(&mut self, key: &BlockKey) -> bool {
        let Some(entry) = self.table.find(key).filter(|entry| entry.state == EntryState::Pending) else {
            return false;
        };
        match remembered(&entry) {
            Some(reason) => self.make_ghost(entry, reason),
            None => self.forget(&entry),
        }
        true
    }

    /// Makes a sealed block readable from host memory: opens its slot and enters it. On failure the slot is
    /// still nobody else's and comes back.
    pub fn publish(
        &mut self,
        sealed: Sealed,
        binding: BindingId,
    ) -> Result<(Block, Published), (NotEntered, Box<Sealed>)> {
        let record = *sealed.record();
        match self.make_room_for(&record.key, binding) {
            Err(why) => Err((why, Box::new(sealed))),
            Ok(before) => {
                let block = sealed.share();
                let published = self.enter_host(before, &record, binding, block.place());
                Ok((block, published))
            }
        }
    }

    /// Enters a block whose slot is open to readers already, whether it was announced, is on disk, or comes
    /// unannounced. A copy on disk stays part of the entry if it has the same checksum. On failure the
    /// caller retires the slot.
    pub fn publish_host(
        &mut self,
        record: &Record,
        binding: BindingId,
        place: (SlotId, Generation),
    ) -> Result<Published, NotEntered> {
        let before = self.make_room_for(&record.key, binding)?;
        Ok(self.enter_host(before, record, binding, place))
    }

    /// The step of publishing that can fail: afterwards there is an entry, and it is not in host memory.
    fn make_room_for(&mut self, key: &BlockKey, binding: BindingId) -> Result<Entry, NotEntered> {
        match self.table.find(key) {
            Some(entry) if entry.host.is_some() => Err(NotEntered::Already { entry }),
            Some(entry) => Ok(entry),
            None => {
                let pending = Entry::pending(*key, binding);
                self.set(None, pending)?;
                Ok(pending)
            }
        }
    }

    fn enter_host(
        &mut self,
        before: Entry,
        record: &Record,
        binding: BindingId,
        place: (SlotId, Generation),
    ) -> Published {
        let returning = before.state != EntryState::Pending || remembered(&before).is_some();
        let (disk, stale_disk) = match before.disk {
            Some(at) if before.checksum == record.checksum => (Some(at), None),
            other => (None, other),
        };
        let after = present(record, binding, Some(place), disk, before.frequency);
        self.replace(Some(before), after);
        Published { returning, stale_disk }
    }

    /// Takes in a block that the store found on disk at start, after those in host memory. One whose bytes
    /// differ from those in host memory is refused, and so is a second one.
    pub fn recover_disk(
        &mut self,
        record: &Record,
        binding: BindingId,
        at: DiskLocation,
    ) -> Result<(), NotEntered> {
        let before = self.table.find(&record.key);
        if let Some(entry) = before.filter(|entry| entry.state == EntryState::Present) {
            if entry.disk.is_some() || entry.checksum != record.checksum {
                return Err(NotEntered::Already { entry });
            }
            self.replace(before, Entry { disk: Some(at), ..entry });
            return Ok(());
        }
        Ok(self.set(before, present(record, binding, None, Some(at), 0))?)
    }

    /// A block with that checksum is on disk now. False when the catalog no longer has the block, has other
    /// bytes under the name, or knows another place: remove the copy from the store then.
    #[must_use]
    pub fn add_disk(&mut self, key: &BlockKey, at: DiskLocation, checksum: Checksum) -> bool {
        self.edit(key, |entry| {
            let takes =
                entry.state == EntryState::Present && entry.checksum == checksum && entry.disk.is_none();
            takes.then(|| entry.disk = Some(at)).is_some()
        })
    }

    /// A block was moved on disk. False when the catalog does not have it at `from`: the copy at `to` is
    /// nobody's then.
    #[must_use]
    pub fn move_disk(&mut self, key: &BlockKey, from: DiskLocation, to: DiskLocation) -> bool {
        self.edit(key, |entry| (entry.disk == Some(from)).then(|| entry.disk = Some(to)).is_some())
    }

    /// The block is no longer in host memory. If that was its last place, `why` is remembered.
    pub fn drop_host(&mut self, key: &BlockKey, why: MissReason) -> Dropped {
        self.drop_tier(key, why, |entry| entry.host.take().is_some())
    }

    /// The block is no longer on disk. If that was its last place, `why` is remembered.
    pub fn drop_disk(&mut self, key: &BlockKey, why: MissReason) -> Dropped {
        self.drop_tier(key, why, |entry| entry.disk.take().is_some())
    }

    /// The block is gone from all tiers, and why. Gives what the entry was; `None` when it was on none.
    pub fn remove(&mut self, key: &BlockKey, why: MissReason) -> Option<Entry> {
        let entry = self.table.find(key).filter(|entry| entry.state == EntryState::Present)?;
        self.make_ghost(entry, why);
        Some(entry)
    }

    /// Changes how a block is to be kept. False when there is none.
    pub fn keep(&mut self, key: &BlockKey, priority: Priority, expires_at: u32) -> bool {
        self.edit(key, |entry| {
            let there = !matches!(entry.state, EntryState::Ghost(_));
            if there {
                (entry.priority, entry.expires_at) = (priority, expires_at);
            }
            there
        })
    }

    /// The block was read: its frequency goes up, to 3 at most.
    pub fn bump(&mut self, key: &BlockKey) {
        self.edit(key, |entry| {
            let more = entry.state == EntryState::Present && entry.frequency < 3;
            entry.frequency += u8::from(more);
            more
        });
    }

    /// The block has had its second chance: its frequency starts anew.
    pub fn cool(&mut self, key: &BlockKey) {
        self.edit(key, |entry| std::mem::take(&mut entry.frequency) > 0);
    }

    /// Forgets everything. On an error the table has no memory behind it any more.
    pub fn clear(&mut self) -> std::io::Result<()> {
        self.ghosts.clear();
        self.counts = Counts::default();
        self.by_binding.clear();
        self.table.clear()
    }

    /// Applies a change to an entry if `change` says that it made one; tells whether it did.
    fn edit(&mut self, key: &BlockKey, change: impl FnOnce(&mut Entry) -> bool) -> bool {
        let Some(before) = self.table.find(key) else { return false };
        let mut after = before;
        let changed = change(&mut after);
        if changed {
            self.replace(Some(before), after);
        }
        changed
    }

    fn drop_tier(
        &mut self,
        key: &BlockKey,
        why: MissReason,
        take: impl FnOnce(&mut Entry) -> bool,
    ) -> Dropped {
        let Some(before) = self.table.find(key) else { return Dropped::Unchanged };
        let mut after = before;
        if !take(&mut after) {
            return Dropped::Unchanged;
        }
        if after.host.is_none() && after.disk.is_none() {
            self.make_ghost(before, why);
            return Dropped::Gone(before);
        }
        self.replace(Some(before), after);
        Dropped::Remains(after)
    }

    fn make_ghost(&mut self, before: Entry, why: MissReason) {
        if self.ghosts_max == 0 {
            return self.forget(&before);
        }
        while self.ghosts.len() >= self.ghosts_max {
            self.forget_oldest_ghost();
        }
        self.ghost_number += 1;
        self.ghosts.push_back((before.key, self.ghost_number));
        let ghost = Entry {
            state: EntryState::Ghost(why),
            host: None,
            disk: None,
            // A ghost has no bytes: its number stands where their checksum was.
            checksum: Checksum(self.ghost_number),
            expires_at: 0,
            ..before
        };
        self.replace(Some(before), ghost);
    }

    /// Drops the oldest line of the ghost queue, and the ghost if the line still is its own.
    fn forget_oldest_ghost(&mut self) -> bool {
        let Some((key, number)) = self.ghosts.pop_front() else { return false };
        let is_it =
            |entry: &Entry| matches!(entry.state, EntryState::Ghost(_)) && entry.checksum == Checksum(number);
        if let Some(ghost) = self.table.find(&key).filter(is_it) {
            self.forget(&ghost);
        }
        true
    }

    fn forget(&mut self, entry: &Entry) {
        self.table.remove(&entry.key);
        self.count(Some(entry), None);
    }

    /// Sets an entry, at the cost of ghosts if there is no room.
    fn set(&mut self, before: Option<Entry>, after: Entry) -> Result<(), Full> {
        loop {
            match self.table.set(&after) {
                Ok(()) => break,
                Err(full) if self.counts.ghosts == 0 || !self.forget_oldest_ghost() => return Err(full),
                Err(_) => {}
            }
        }
        self.count(before.as_ref(), Some(&after));
        Ok(())
    }

    /// Sets an entry whose key is there already, which cannot fail.
    fn replace(&mut self, before: Option<Entry>, after: Entry) {
        self.table.update(&after.key, |entry| *entry = after);
        self.count(before.as_ref(), Some(&after));
    }

    fn count(&mut self, before: Option<&Entry>, after: Option<&Entry>) {
        for (entry, sign) in [(before, -1i64), (after, 1)] {
            let Some(entry) = entry else { continue };
            let add = |count: &mut u64, is: bool| *count = count.wrapping_add_signed(sign * i64::from(is));
            let pending = entry.state == EntryState::Pending;
            let counts = &mut self.counts;
            add(&mut counts.entries, true);
            add(&mut counts.pending, pending);
            add(&mut counts.present, entry.state == EntryState::Present);
            add(&mut counts.host, entry.host.is_some());
            add(&mut counts.disk, entry.disk.is_some());
            add(&mut counts.ghosts, matches!(entry.state, EntryState::Ghost(_)));
            add(&mut counts.quarantined, entry.state == EntryState::Ghost(MissReason::Corrupt));
            let index = usize::from(entry.binding.0);
            if self.by_binding.len() <= index {
                self.by_binding.resize(index + 1, BindingCounts::default());
            }
            let counts = &mut self.by_binding[index];
            add(&mut counts.pending, pending);
            add(&mut counts.host, entry.host.is_some());
            add(&mut counts.disk, entry.disk.is_some());
        }
    }
}

fn present(
    record: &Record,
    binding: BindingId,
    host: Option<(SlotId, Generation)>,
    disk: Option<DiskLocation>,
    frequency: u8,
) -> Entry {
    Entry {
        key: record.key,
        disk,
        checksum: record.checksum,
        host,
        binding,
        state: EntryState::Present,
        priority: record.priority,
        frequency,
        expires_at: record.expires_at,
    }
}

/// A pending entry has no bytes: where their checksum will be stands what the key was a ghost of.
fn remember(ghost: Option<MissReason>) -> Checksum {
    Checksum(ghost.map_or(0, |reason| reason as u64))
}

fn remembered(pending: &Entry) -> Option<MissReason> {
    MissReason::from_wire(u8::try_from(pending.checksum.0).ok()?)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kv_arena::{Geometry, HazardSet, ShardMemory};
    use kv_block::BindingTag;
    use proptest::prelude::*;

    use super::*;
    use crate::lifecycle::Filling;

    fn catalog(entries: u64, ghosts_max: usize) -> (ShardMemory, Catalog) {
        let geometry = Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: entries };
        let mut memory = ShardMemory::anonymous(geometry).unwrap();
        let table = memory.take_table().unwrap().unwrap();
        (memory, Catalog::new(table, ghosts_max))
    }

    fn key(n: u64) -> BlockKey {
        BlockKey::from_halves([n.wrapping_mul(0x9e37_79b9_7f4a_7c15), n])
    }

    /// Content `version` of block `n`.
    fn record(n: u64, version: u64) -> Record {
        Record {
            key: key(n),
            checksum: Checksum(n * 1000 + version),
            bytes: 4096,
            tag: BindingTag(0),
            priority: Priority::Normal,
            expires_at: 0,
        }
    }

    fn at(n: u32) -> DiskLocation {
        DiskLocation::new(1, 1, n).unwrap()
    }

    fn place(n: u32) -> (SlotId, Generation) {
        (SlotId(n), Generation(1))
    }

    const A: BindingId = BindingId(1);
    const WHY: MissReason = MissReason::EvictedCapacity;

    fn announce(catalog: &mut Catalog, n: u64) -> Announced {
        catalog.announce(&key(n), A, Priority::Normal, 0).unwrap()
    }

    #[test]
    fn a_block_goes_down_and_up_the_tiers() {
        let (_memory, mut catalog) = catalog(100, 10);
        assert_eq!(catalog.lookup(&key(1), 0), Lookup::Miss(MissReason::NeverStored));
        assert_eq!(announce(&mut catalog, 1), Announced::Fresh { returning: false });
        assert_eq!(announce(&mut catalog, 1), Announced::Pending);
        assert_eq!(catalog.lookup(&key(1), 0), Lookup::Miss(MissReason::NotComplete));
        assert_eq!(catalog.counts_of(A), BindingCounts { pending: 1, host: 0, disk: 0 });
        let published = catalog.publish_host(&record(1, 0), A, place(3)).unwrap();
        assert_eq!(published, Published { returning: false, stale_disk: None });
        assert!(catalog.add_disk(&key(1), at(5), record(1, 0).checksum));
        assert_eq!(catalog.counts_of(A), BindingCounts { pending: 0, host: 1, disk: 1 });
        let Dropped::Remains(entry) = catalog.drop_host(&key(1), WHY) else { panic!("it is on disk") };
        assert_eq!((entry.host, entry.disk), (None, Some(at(5))));
        let published = catalog.publish_host(&record(1, 0), A, place(4)).unwrap();
        assert_eq!(published, Published { returning: true, stale_disk: None });
        let Lookup::Found(entry) = catalog.lookup(&key(1), 0) else { panic!("it is on both") };
        assert_eq!((entry.host, entry.disk), (Some(place(4)), Some(at(5))));
        assert!(catalog.move_disk(&key(1), at(5), at(6)));
        assert!(!catalog.move_disk(&key(1), at(5), at(7)), "it is not there any more");
        assert!(matches!(catalog.drop_disk(&key(1), MissReason::EvictedReclaim), Dropped::Remains(_)));
        assert_eq!(catalog.drop_disk(&key(1), WHY), Dropped::Unchanged);
        assert!(matches!(catalog.drop_host(&key(1), MissReason::EvictedQuota), Dropped::Gone(_)));
        assert_eq!(catalog.lookup(&key(1), 0), Lookup::Miss(MissReason::EvictedQuota));
        assert_eq!(catalog.counts(), Counts { entries: 1, ghosts: 1, ..Counts::default() });
        assert_eq!(announce(&mut catalog, 1), Announced::Fresh { returning: true });
        assert!(catalog.publish_host(&record(1, 1), A, place(1)).unwrap().returning, "also after a ghost");
    }

    #[test]
    fn a_withdrawn_announcement_leaves_what_was_before() {
        let (_memory, mut catalog) = catalog(100, 10);
        announce(&mut catalog, 1);
        assert!(catalog.withdraw(&key(1)));
        assert_eq!(catalog.find(&key(1)), None);
        assert!(!catalog.withdraw(&key(1)));
        catalog.publish_host(&record(1, 0), A, place(1)).unwrap();
        assert!(!catalog.withdraw(&key(1)), "a block is no announcement");
        catalog.remove(&key(1), MissReason::EvictedRequest);
        announce(&mut catalog, 1);
        assert!(catalog.withdraw(&key(1)));
        assert_eq!(catalog.lookup(&key(1), 0), Lookup::Miss(MissReason::EvictedRequest));
    }

    #[test]
    fn a_disk_copy_counts_only_for_the_same_bytes() {
        let (_memory, mut catalog) = catalog(100, 10);
        assert!(!catalog.add_disk(&key(1), at(1), record(1, 0).checksum), "nothing there");
        announce(&mut catalog, 1);
        assert!(!catalog.add_disk(&key(1), at(1), record(1, 0).checksum), "only announced");
        catalog.publish_host(&record(1, 0), A, place(1)).unwrap();
        assert!(!catalog.add_disk(&key(1), at(1), record(1, 7).checksum), "other bytes");
        assert!(catalog.add_disk(&key(1), at(1), record(1, 0).checksum));
        assert!(!catalog.add_disk(&key(1), at(2), record(1, 0).checksum), "one is enough");
        catalog.drop_host(&key(1), WHY);
        let published = catalog.publish_host(&record(1, 7), A, place(2)).unwrap();
        assert_eq!(published.stale_disk, Some(at(1)), "bytes computed anew may differ");
        assert_eq!(catalog.counts().disk, 0);
    }

    #[test]
    fn a_second_block_in_host_memory_is_refused() {
        let (memory, mut catalog) = catalog(100, 10);
        let filling = || Filling::new(memory.slab().take(4096).unwrap(), record(1, 0)).unwrap();
        let (block, _) = catalog.publish(filling().seal_and_sum(), A).unwrap();
        let Err((NotEntered::Already { entry }, sealed)) = catalog.publish(filling().seal_and_sum(), A)
        else {
            panic!("there is one already")
        };
        assert_eq!(entry.host, Some(block.place()));
        drop(sealed);
        let used: u32 = memory.slab().regions().iter().map(|region| region.used).sum();
        assert_eq!(used, 1, "the second slot is free again");
        let refused = catalog.publish_host(&record(1, 0), A, place(9));
        assert!(matches!(refused, Err(NotEntered::Already { .. })));
    }

    #[test]
    fn time_to_live_ends_at_its_second() {
        let (_memory, mut catalog) = catalog(100, 10);
        let record = Record { expires_at: 100, ..record(1, 0) };
        catalog.publish_host(&record, A, place(1)).unwrap();
        assert!(matches!(catalog.lookup(&key(1), 99), Lookup::Found(_)));
        assert_eq!(catalog.lookup(&key(1), 100), Lookup::Miss(MissReason::Expired));
        assert!(catalog.keep(&key(1), Priority::High, 0));
        let Lookup::Found(entry) = catalog.lookup(&key(1), u32::MAX) else { panic!("kept for ever") };
        assert_eq!(entry.priority, Priority::High);
        catalog.remove(&key(1), MissReason::Expired);
        assert!(!catalog.keep(&key(1), Priority::High, 0), "a ghost is not kept");
    }

    #[test]
    fn frequency_counts_to_three_and_starts_anew() {
        let (_memory, mut catalog) = catalog(100, 10);
        catalog.publish_host(&record(1, 0), A, place(1)).unwrap();
        let frequency = |catalog: &Catalog| catalog.find(&key(1)).unwrap().frequency;
        (0..5).for_each(|_| catalog.bump(&key(1)));
        assert_eq!(frequency(&catalog), 3);
        catalog.cool(&key(1));
        assert_eq!(frequency(&catalog), 0);
        catalog.bump(&key(2));
        assert_eq!(catalog.find(&key(2)), None);
    }

    #[test]
    fn ghosts_are_bounded_and_the_oldest_goes_first() {
        let (_memory, mut catalog) = catalog(100, 3);
        for n in 0..5 {
            catalog.publish_host(&record(n, 0), A, place(1)).unwrap();
            catalog.drop_host(&key(n), WHY);
        }
        let is_ghost = |catalog: &Catalog, n| catalog.find(&key(n)).is_some();
        assert_eq!(
            (0..5).map(|n| is_ghost(&catalog, n)).collect::<Vec<_>>(),
            [false, false, true, true, true]
        );
        assert_eq!(catalog.counts().ghosts, 3);
        // One that came back and left again is young.
        catalog.publish_host(&record(2, 0), A, place(1)).unwrap();
        catalog.drop_host(&key(2), WHY);
        catalog.publish_host(&record(9, 0), A, place(1)).unwrap();
        catalog.drop_host(&key(9), WHY);
        assert_eq!([2, 3, 4, 9].map(|n| is_ghost(&catalog, n)), [true, false, true, true]);
    }

    #[test]
    fn without_ghosts_a_block_is_forgotten() {
        let (_memory, mut catalog) = catalog(100, 0);
        catalog.publish_host(&record(1, 0), A, place(1)).unwrap();
        catalog.remove(&key(1), WHY);
        assert_eq!((catalog.find(&key(1)), catalog.counts()), (None, Counts::default()));
    }

    #[test]
    fn blocks_take_the_room_of_ghosts_and_a_full_table_says_so() {
        let (_memory, mut catalog) = catalog(20, 10);
        for n in 0..10 {
            catalog.publish_host(&record(n, 0), A, place(1)).unwrap();
            catalog.drop_host(&key(n), WHY);
        }
        for n in 100..120 {
            catalog.publish_host(&record(n, 0), A, place(1)).unwrap();
        }
        assert_eq!(catalog.counts(), Counts { entries: 20, present: 20, host: 20, ..Counts::default() });
        let full = Full { capacity: 20 };
        assert_eq!(catalog.announce(&key(500), A, Priority::Normal, 0), Err(full));
        assert_eq!(catalog.publish_host(&record(500, 0), A, place(1)), Err(NotEntered::Full(full)));
        assert_eq!(catalog.recover_disk(&record(500, 0), A, at(1)), Err(NotEntered::Full(full)));
        catalog.remove(&key(100), WHY);
        assert!(catalog.announce(&key(500), A, Priority::Normal, 0).is_ok());
    }

    #[test]
    fn quarantined_blocks_are_counted() {
        let (_memory, mut catalog) = catalog(100, 10);
        catalog.recover_disk(&record(1, 0), A, at(1)).unwrap();
        catalog.drop_disk(&key(1), MissReason::Corrupt);
        assert_eq!(catalog.counts().quarantined, 1);
        announce(&mut catalog, 1);
        assert_eq!(catalog.counts().quarantined, 0);
    }

    #[test]
    fn a_scan_in_parts_sees_everything_once() {
        let (_memory, mut catalog) = catalog(1000, 10);
        for n in 0..800 {
            catalog.recover_disk(&record(n, 0), A, at(n as u32)).unwrap();
        }
        let (mut seen, mut from) = (Vec::new(), Some(0));
        while let Some(bucket) = from {
            let (entries, next) = catalog.scan(bucket, 7);
            seen.extend(entries.iter().map(|entry| entry.key));
            from = next;
        }
        seen.sort_unstable();
        let mut wanted: Vec<_> = (0..800).map(key).collect();
        wanted.sort_unstable();
        assert_eq!(seen, wanted);
    }

    #[test]
    fn pages_are_never_longer_than_asked_for_and_show_everything_once() {
        let (_memory, mut catalog) = catalog(1000, 10);
        for n in 0..800 {
            catalog.recover_disk(&record(n, 0), A, at(n as u32)).unwrap();
        }
        for count in [1, 2, 7, 1000] {
            let (mut seen, mut from) = (Vec::new(), Some(0));
            while let Some(place) = from {
                let (entries, next) = catalog.page(place, 100, count, |entry| entry.key != key(3));
                assert!(entries.len() <= count);
                seen.extend(entries.iter().map(|entry| entry.key));
                from = next;
            }
            seen.sort_unstable();
            let mut wanted: Vec<_> = (0..800).filter(|n| *n != 3).map(key).collect();
            wanted.sort_unstable();
            assert_eq!(seen, wanted);
        }
    }

    /// What the model knows of a key.
    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Known {
        Pending { remembered: Option<MissReason> },
        Present { host: bool, disk: Option<u32>, version: u64 },
        Ghost(MissReason),
    }

    #[derive(Clone, Debug)]
    enum Op {
        Announce(u64),
        Withdraw(u64),
        Publish(u64, u64),
        AddDisk(u64, u32, u64),
        MoveDisk(u64, u32, u32),
        DropHost(u64, MissReason),
        DropDisk(u64, MissReason),
        Remove(u64, MissReason),
        Bump(u64),
        Restart,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let key = || 0u64..10;
        let why = || proptest::sample::select(&[WHY, MissReason::Corrupt, MissReason::EvictedRequest][..]);
        let op = prop_oneof![
            3 => key().prop_map(Op::Announce),
            2 => key().prop_map(Op::Withdraw),
            5 => (key(), 0u64..2).prop_map(|(n, version)| Op::Publish(n, version)),
            4 => (key(), 1u32..4, 0u64..2).prop_map(|(n, at, version)| Op::AddDisk(n, at, version)),
            2 => (key(), 1u32..4, 1u32..4).prop_map(|(n, from, to)| Op::MoveDisk(n, from, to)),
            3 => (key(), why()).prop_map(|(n, why)| Op::DropHost(n, why)),
            3 => (key(), why()).prop_map(|(n, why)| Op::DropDisk(n, why)),
            1 => (key(), why()).prop_map(|(n, why)| Op::Remove(n, why)),
            1 => key().prop_map(Op::Bump),
            1 => Just(Op::Restart),
        ];
        proptest::collection::vec(op, 1..120)
    }

    /// A real catalog, real slots, and a simple model of both.
    struct World {
        memory: ShardMemory,
        catalog: Catalog,
        model: BTreeMap<u64, Known>,
        /// Keys of ghosts, oldest first: the model's queue, without the lines of those that came back.
        ghosts: Vec<(u64, u64)>,
        departures: u64,
        ghosts_max: usize,
    }

    impl World {
        fn new(ghosts_max: usize) -> Self {
            let (memory, catalog) = catalog(1000, ghosts_max);
            let model = BTreeMap::new();
            Self { memory, catalog, model, ghosts: Vec::new(), departures: 0, ghosts_max }
        }

        fn depart(&mut self, n: u64, why: MissReason) {
            if self.ghosts_max == 0 {
                self.model.remove(&n);
                return;
            }
            self.departures += 1;
            self.ghosts.push((n, self.departures));
            self.model.insert(n, Known::Ghost(why));
            if self.ghosts.len() > self.ghosts_max {
                let (oldest, _) = self.ghosts.remove(0);
                let newer = self.ghosts.iter().any(|(key, _)| *key == oldest);
                if !newer && matches!(self.model.get(&oldest), Some(Known::Ghost(_))) {
                    self.model.remove(&oldest);
                }
            }
        }

        fn free_slot(&mut self, n: u64) {
            if let Some((slot, generation)) = self.catalog.find(&key(n)).and_then(|entry| entry.host) {
                self.memory.slab().retire(slot, generation).unwrap();
                self.memory.slab().sweep(&HazardSet::new());
            }
        }

        fn apply(&mut self, op: &Op) {
            match *op {
                Op::Announce(n) => {
                    let wanted = match self.model.get(&n).copied() {
                        None => Announced::Fresh { returning: false },
                        Some(Known::Ghost(_)) => Announced::Fresh { returning: true },
                        Some(Known::Pending { .. }) => Announced::Pending,
                        Some(Known::Present { .. }) => {
                            Announced::Present(self.catalog.find(&key(n)).unwrap())
                        }
                    };
                    assert_eq!(announce(&mut self.catalog, n), wanted);
                    let remembered = match self.model.get(&n) {
                        Some(Known::Ghost(why)) => Some(*why),
                        _ => None,
                    };
                    if matches!(wanted, Announced::Fresh { .. }) {
                        self.model.insert(n, Known::Pending { remembered });
                    }
                }
                Op::Withdraw(n) => {
                    let pending = match self.model.get(&n) {
                        Some(Known::Pending { remembered }) => Some(*remembered),
                        _ => None,
                    };
                    assert_eq!(self.catalog.withdraw(&key(n)), pending.is_some());
                    match pending {
                        Some(Some(why)) => self.depart(n, why),
                        Some(None) => drop(self.model.remove(&n)),
                        None => {}
                    }
                }
                Op::Publish(n, version) => self.publish(n, version),
                Op::AddDisk(n, place, wanted) => {
                    let takes = matches!(self.model.get(&n),
                        Some(Known::Present { disk: None, version, .. }) if *version == wanted);
                    assert_eq!(self.catalog.add_disk(&key(n), at(place), record(n, wanted).checksum), takes);
                    if let Some(Known::Present { disk, .. }) = self.model.get_mut(&n).filter(|_| takes) {
                        *disk = Some(place);
                    }
                }
                Op::MoveDisk(n, from, to) => {
                    let moved = match self.model.get_mut(&n) {
                        Some(Known::Present { disk: disk @ Some(_), .. }) if *disk == Some(from) => {
                            *disk = Some(to);
                            true
                        }
                        _ => false,
                    };
                    assert_eq!(self.catalog.move_disk(&key(n), at(from), at(to)), moved);
                }
                Op::DropHost(n, why) => {
                    self.free_slot(n);
                    let dropped = self.catalog.drop_host(&key(n), why);
                    match self.model.get(&n).copied() {
                        Some(Known::Present { host: true, disk: None, .. }) => {
                            assert!(matches!(dropped, Dropped::Gone(_)));
                            self.depart(n, why);
                        }
                        Some(Known::Present { host: true, disk, version }) => {
                            assert!(matches!(dropped, Dropped::Remains(_)));
                            self.model.insert(n, Known::Present { host: false, disk, version });
                        }
                        _ => assert_eq!(dropped, Dropped::Unchanged),
                    }
                }
                Op::DropDisk(n, why) => {
                    let dropped = self.catalog.drop_disk(&key(n), why);
                    match self.model.get(&n).copied() {
                        Some(Known::Present { host: false, disk: Some(_), .. }) => {
                            assert!(matches!(dropped, Dropped::Gone(_)));
                            self.depart(n, why);
                        }
                        Some(Known::Present { host: true, disk: Some(_), version }) => {
                            assert!(matches!(dropped, Dropped::Remains(_)));
                            self.model.insert(n, Known::Present { host: true, disk: None, version });
                        }
                        _ => assert_eq!(dropped, Dropped::Unchanged),
                    }
                }
                Op::Remove(n, why) => {
                    self.free_slot(n);
                    let present = matches!(self.model.get(&n), Some(Known::Present { .. }));
                    assert_eq!(self.catalog.remove(&key(n), why).is_some(), present);
                    if present {
                        self.depart(n, why);
                    }
                }
                Op::Bump(n) => self.catalog.bump(&key(n)),
                Op::Restart => self.restart(),
            }
        }

        fn publish(&mut self, n: u64, version: u64) {
            let mut known = record(n, version);
            let filling = Filling::new(self.memory.slab().take(4096).unwrap(), known).unwrap();
            known = *filling.record();
            let result = self.catalog.publish(filling.seal(known.checksum), A);
            let before = self.model.get(&n).copied();
            if let Some(Known::Present { host: true, .. }) = before {
                assert!(matches!(result, Err((NotEntered::Already { .. }, _))));
                return;
            }
            let (block, published) = result.unwrap();
            drop(block);
            let (returning, on_disk) = match before {
                None | Some(Known::Pending { remembered: None }) => (false, None),
                Some(Known::Present { disk, version, .. }) => (true, disk.map(|place| (place, version))),
                Some(_) => (true, None),
            };
            let same = on_disk.filter(|(_, there)| *there == version).map(|(place, _)| place);
            let stale = on_disk.filter(|(_, there)| *there != version).map(|(place, _)| at(place));
            assert_eq!(published, Published { returning, stale_disk: stale });
            self.model.insert(n, Known::Present { host: true, disk: same, version });
        }

        /// The table is emptied, then rebuilt from what the slots and the disk know, as after a restart.
        fn restart(&mut self) {
            let before: Vec<Entry> = self.catalog.scan(0, u64::MAX).0;
            self.catalog.clear().unwrap();
            assert_eq!(self.catalog.counts(), Counts::default());
            for entry in before.iter().filter(|entry| entry.host.is_some()) {
                let (slot, _) = entry.host.unwrap();
                let record = self.memory.slab().header(slot).unwrap().record;
                assert_eq!(record.checksum, entry.checksum, "the slot's header is the truth");
                self.catalog.publish_host(&record, A, entry.host.unwrap()).unwrap();
            }
            for entry in before.iter().filter(|entry| entry.disk.is_some()) {
                let record = Record { checksum: entry.checksum, ..record(entry.key.halves()[1], 0) };
                self.catalog.recover_disk(&record, A, entry.disk.unwrap()).unwrap();
                let again = self.catalog.recover_disk(&record, A, entry.disk.unwrap());
                assert!(matches!(again, Err(NotEntered::Already { .. })));
            }
            self.model.retain(|_, known| matches!(known, Known::Present { .. }));
            self.ghosts.clear();
        }

        /// Everything the catalog says is what the model says.
        fn check(&self) {
            let mut counts = Counts::default();
            for n in 0..10 {
                let entry = self.catalog.find(&key(n));
                let found = entry.map(|entry| match entry.state {
                    EntryState::Pending => Known::Pending { remembered: remembered(&entry) },
                    EntryState::Ghost(why) => Known::Ghost(why),
                    EntryState::Present => Known::Present {
                        host: entry.host.is_some(),
                        disk: entry.disk.map(DiskLocation::page),
                        version: entry.checksum.0 % 1000,
                    },
                });
                assert_eq!(found, self.model.get(&n).copied(), "key {n}");
                if let Some(entry) = entry {
                    let present = entry.state == EntryState::Present;
                    let somewhere = entry.host.is_some() || entry.disk.is_some();
                    assert_eq!(present, somewhere, "present exactly when on a tier");
                    counts.entries += 1;
                    counts.pending += u64::from(entry.state == EntryState::Pending);
                    counts.present += u64::from(present);
                    counts.host += u64::from(entry.host.is_some());
                    counts.disk += u64::from(entry.disk.is_some());
                    counts.ghosts += u64::from(matches!(entry.state, EntryState::Ghost(_)));
                    let corrupt = entry.state == EntryState::Ghost(MissReason::Corrupt);
                    counts.quarantined += u64::from(corrupt);
                }
            }
            assert_eq!(self.catalog.counts(), counts);
            let Counts { pending, host, disk, .. } = counts;
            assert_eq!(self.catalog.counts_of(A), BindingCounts { pending, host, disk });
            let used: u32 = self.memory.slab().regions().iter().map(|region| region.used).sum();
            assert_eq!(u64::from(used), host, "a slot leaked, or is used twice");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn the_catalog_agrees_with_a_simple_model(ops in ops(), ghosts_max in 0usize..6) {
            let mut world = World::new(ghosts_max);
            for op in &ops {
                world.apply(op);
                world.check();
            }
        }
    }
}
