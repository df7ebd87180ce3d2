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
    /// in parts: expiry, listings, purges.
    pub fn scan(&self, from: u64, buckets: u64) -> (Vec<Entry>, Option<u64>) {
        let mut entries = Vec::new();
        let next = self.table.scan(from, buckets, |entry| entries.push(entry));
        (entries, next)
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
