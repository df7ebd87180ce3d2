//! Which blocks a pool keeps: an index by key, and a second chance for those that were read.
//!
//! ```text
//!   put, seal ---> end of the log                                          get: a place, and "read since then"
//!                       |
//!   oldest segment <----+--- is read since it was written? ---> moved to the end: most recently read first, up to a
//!     on offer          |                                       share of the segment
//!                       '--- else --------------------------> dropped; then the segment is released
//! ```
//! So what passes through once goes after one round of the log, and what is read stays, as long as it is less than the
//! share. A block is somewhere else too, or it may be lost: this is a cache.
//!
//! A hit is a block whose length and checksum are what the caller's catalog says of its key; whoever put another under
//! the key is not believed. Everything here is bounded: entries by configuration, operations by the pool.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};

use kv_arena::Held;
use kv_block::{BlockKey, DiskLocation, Record};
use kv_tiers::store::{BlockStore as _, OpToken, StoreDone, StoreError, StoreOp, StoreUsage};

use crate::pool::{Place, Pool, Reserved, footprint};

/// More of a segment is never moved, so that reclaim frees more than it takes.
const MOVE_PERCENT_MAX: u32 = 90;

/// How much a cache remembers, and how much it moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CacheConfig {
    /// Blocks at most; beyond, the oldest that were not read give way.
    pub entries_max: usize,
    /// How much of a segment is written again when it is reclaimed, at most: percent, 90 at most.
    pub move_percent_max: u32,
}

impl Default for CacheConfig {
    /// A million blocks, half of a segment.
    fn default() -> Self {
        Self { entries_max: 1_000_000, move_percent_max: 50 }
    }
}

/// What a cache holds, and what it did since it was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Blocks.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Asked for and there.
    pub hits: u64,
    /// Asked for and not there, or not what was expected.
    pub misses: u64,
    /// Written again because they were read.
    pub moved: u64,
    /// Given up for room, or because a move failed.
    pub dropped: u64,
    /// Put and not kept: no room at that moment, or the device failed.
    pub refused: u64,
    /// The pool.
    pub pool: StoreUsage,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    record: Record,
    at: DiskLocation,
    /// The tick of the last read since it was written; 0: none.
    read: u64,
}

enum UnderWay {
    Write(Record),
    Move(Record, DiskLocation),
    Release,
}

fn is_same(record: &Record, expected: &Record) -> bool {
    (record.bytes, record.checksum) == (expected.bytes, expected.checksum)
}

/// A segment that is on offer.
struct Reclaim {
    segment: u32,
    moves: VecDeque<(Record, DiskLocation)>,
    /// Moves under way.
    moving: usize,
    releasing: bool,
}

/// A pool and what it keeps. See the module.
pub struct Cache {
    pool: Pool,
    config: CacheConfig,
    entries: HashMap<BlockKey, Entry>,
    bytes: u64,
    /// As they were written, oldest first; some are somewhere else since.
    order: VecDeque<(BlockKey, DiskLocation)>,
    /// Which write of a key counts.
    writing: HashMap<BlockKey, OpToken>,
    under_way: HashMap<OpToken, UnderWay>,
    reclaims: VecDeque<Reclaim>,
    ticks: u64,
    tokens: u64,
    counted: Report,
    done: Vec<StoreDone>,
}

impl Cache {
    /// Over a pool that is empty.
    pub fn new(pool: Pool, config: CacheConfig) -> Self {
        let config = CacheConfig { entries_max: config.entries_max.max(1), ..config };
        Self {
            pool,
            config,
            entries: HashMap::new(),
            bytes: 0,
            order: VecDeque::new(),
            writing: HashMap::new(),
            under_way: HashMap::new(),
            reclaims: VecDeque::new(),
            ticks: 0,
            tokens: 0,
            counted: Report::default(),
            done: Vec::new(),
        }
    }

    /// Its pool.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Where a block lies on the device, if it is there and is what is expected. It stays there as long as the place
    /// lives.
    pub fn get(&mut self, key: &BlockKey, expected: &Record) -> Option<Place> {
        let is_lost = self.is_lost();
        let found = self.entries.get_mut(key).filter(|_| !is_lost);
        let place = found.filter(|entry| is_same(&entry.record, expected)).and_then(|entry| {
            let place = self.pool.place(entry.at, &entry.record).ok()?;
            self.ticks += 1;
            entry.read = self.ticks;
            Some(place)
        });
        match place {
            Some(_) => self.counted.hits += 1,
            None => self.counted.misses += 1,
        }
        place
    }

    /// Whether a block is there and is what is expected. Nobody reads it by that.
    pub fn has(&self, key: &BlockKey, expected: &Record) -> bool {
        !self.is_lost() && self.entries.get(key).is_some_and(|entry| is_same(&entry.record, expected))
    }

    /// Whether its device is lost: from then on nothing is there.
    pub fn is_lost(&self) -> bool {
        self.pool.device().lost().is_some()
    }

    /// Copies a block to the device; it is there some polls later, unless there is no room then. What is there
    /// already, or on its way, is not copied again. The bytes come back at once when too much is under way or the
    /// device is lost.
    pub fn put(&mut self, record: Record, bytes: Held) -> Result<(), Held> {
        let writing = self.writing.get(&record.key).and_then(|token| self.under_way.get(token));
        let is_coming = matches!(writing, Some(UnderWay::Write(coming)) if is_same(coming, &record));
        if is_coming || (writing.is_none() && self.has(&record.key, &record)) {
            return Ok(());
        }
        if self.is_lost() {
            return Err(bytes);
        }
        let token = self.token();
        match self.pool.submit(StoreOp::Write { token, record, bytes }) {
            Ok(()) => {
                self.under_way.insert(token, UnderWay::Write(record));
                self.writing.insert(record.key, token);
                Ok(())
            }
            Err(StoreOp::Write { bytes, .. }) => Err(bytes),
            Err(_) => unreachable!("a store gives back what it was given"),
        }
    }

    /// Room for a block that is on a device already: see [`Pool::reserve`].
    pub fn reserve(&mut self, bytes: u32) -> Result<Reserved, StoreError> {
        self.pool.reserve(bytes)
    }

    /// Keeps what was copied there: see [`Pool::seal`].
    pub fn seal(&mut self, reserved: Reserved, record: Record) -> Result<(), StoreError> {
        let at = self.pool.seal(reserved, record)?;
        self.writing.remove(&record.key);
        self.insert(record, at);
        Ok(())
    }

    /// Gives up a block, also one that is being written.
    pub fn forget(&mut self, key: &BlockKey) {
        self.writing.remove(key);
        self.remove(key);
    }

    /// Gives up all blocks but those of which `keep` says so; how many went.
    pub fn retain(&mut self, mut keep: impl FnMut(&BlockKey) -> bool) -> usize {
        let gone: Vec<BlockKey> = self.keys().filter(|key| !keep(key)).collect();
        gone.iter().for_each(|key| self.forget(key));
        gone.len()
    }

    /// Whether it has a block under this name, or is writing one, whatever its bytes. Nobody reads it by that.
    pub fn contains(&self, key: &BlockKey) -> bool {
        self.entries.contains_key(key) || self.writing.contains_key(key)
    }

    /// The blocks that it has, or that are being written, in no order; some twice.
    pub fn keys(&self) -> impl Iterator<Item = BlockKey> + '_ {
        self.entries.keys().chain(self.writing.keys()).copied()
    }

    /// Takes what has happened since, and answers the pool. Never blocks.
    pub fn poll(&mut self) {
        let mut done = std::mem::take(&mut self.done);
        self.pool.poll(&mut done);
        for done in done.drain(..) {
            self.apply(done);
        }
        self.done = done;
        self.reclaim();
        self.pool.kick();
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.under_way.is_empty() && self.reclaims.is_empty()
    }

    /// What it holds and what it did.
    pub fn report(&self) -> Report {
        Report {
            blocks: self.entries.len() as u64,
            bytes: self.bytes,
            pool: self.pool.usage(),
            ..self.counted
        }
    }

    fn token(&mut self) -> OpToken {
        self.tokens += 1;
        OpToken(self.tokens)
    }

    fn insert(&mut self, record: Record, at: DiskLocation) {
        self.remove(&record.key);
        while self.entries.len() >= self.config.entries_max && self.make_room() {}
        self.entries.insert(record.key, Entry { record, at, read: 0 });
        self.bytes += u64::from(record.bytes);
        self.line_up(record.key, at);
    }

    fn remove(&mut self, key: &BlockKey) -> bool {
        let removed = self.entries.remove(key);
        self.bytes -= removed.map_or(0, |entry| u64::from(entry.record.bytes));
        removed.is_some()
    }

    fn line_up(&mut self, key: BlockKey, at: DiskLocation) {
        self.order.push_back((key, at));
        // Those that are somewhere else since are as many as the others at most.
        if self.order.len() > 2 * self.config.entries_max {
            let entries = &self.entries;
            self.order.retain(|(key, at)| entries.get(key).is_some_and(|entry| entry.at == *at));
        }
    }

    /// Gives up the oldest that was not read; those before it that were count as not read and as the youngest. False
    /// when there is none.
    fn make_room(&mut self) -> bool {
        while let Some((key, at)) = self.order.pop_front() {
            match self.entries.get_mut(&key) {
                Some(entry) if entry.at == at && entry.read > 0 => {
                    entry.read = 0;
                    self.order.push_back((key, at));
                }
                Some(entry) if entry.at == at => {
                    self.remove(&key);
                    self.counted.dropped += 1;
                    return true;
                }
                _ => {}
            }
        }
        false
    }

    fn apply(&mut self, done: StoreDone) {
        if let StoreDone::Reclaim { segment, entries, .. } = done {
            self.plan(segment, &entries);
            return;
        }
        let what = done.token().and_then(|token| Some((token, self.under_way.remove(&token)?)));
        match (what, done) {
            (Some((token, UnderWay::Write(record))), StoreDone::Written { result, .. }) => {
                let counts = self.writing.get(&record.key) == Some(&token);
                if counts {
                    self.writing.remove(&record.key);
                }
                match result {
                    Ok(at) if counts => self.insert(record, at),
                    Ok(_) => {}
                    Err(_) => self.counted.refused += 1,
                }
            }
            (Some((_, UnderWay::Move(record, from))), StoreDone::Moved { result, .. }) => {
                if let Some(reclaim) = self.reclaims.front_mut() {
                    reclaim.moving -= 1;
                }
                self.moved(&record, from, result.ok());
            }
            (Some((_, UnderWay::Release)), _) => {
                self.reclaims.pop_front();
            }
            _ => {}
        }
    }

    /// What of a segment stays: of what was read since it was written, the most recent.
    fn plan(&mut self, segment: u32, entries: &[(Record, DiskLocation)]) {
        let percent = self.config.move_percent_max.min(MOVE_PERCENT_MAX);
        let mut room = self.pool.segment_bytes() * u64::from(percent) / 100;
        let here = entries.iter().filter_map(|(record, at)| {
            let entry = self.entries.get(&record.key).filter(|entry| entry.at == *at)?;
            Some((entry.read, entry.record, *at))
        });
        let mut here: Vec<_> = here.collect();
        here.sort_by_key(|(read, ..)| Reverse(*read));
        let mut moves = VecDeque::new();
        for (read, record, at) in here {
            let bytes = footprint(record.bytes);
            if read > 0 && bytes <= room {
                room -= bytes;
                moves.push_back((record, at));
                // From now on it counts again.
                if let Some(entry) = self.entries.get_mut(&record.key) {
                    entry.read = 0;
                }
            } else {
                self.remove(&record.key);
                self.counted.dropped += 1;
            }
        }
        self.reclaims.push_back(Reclaim { segment, moves, moving: 0, releasing: false });
    }

    /// A move's end. Whoever took the key meanwhile keeps it.
    fn moved(&mut self, record: &Record, from: DiskLocation, to: Option<DiskLocation>) {
        let Some(entry) = self.entries.get_mut(&record.key).filter(|entry| entry.at == from) else { return };
        match to {
            Some(to) => {
                entry.at = to;
                self.counted.moved += 1;
                self.line_up(record.key, to);
            }
            None => {
                self.remove(&record.key);
                self.counted.dropped += 1;
            }
        }
    }

    /// Goes on with the segment on offer, as far as the pool takes operations.
    fn reclaim(&mut self) {
        loop {
            let Some(reclaim) = self.reclaims.front_mut() else { return };
            let (token, segment) = (OpToken(self.tokens + 1), reclaim.segment);
            let (op, what) = match reclaim.moves.pop_front() {
                // Given up since, or somewhere else.
                Some((record, at)) if self.entries.get(&record.key).is_none_or(|entry| entry.at != at) => {
                    continue;
                }
                Some((record, at)) => (StoreOp::Move { token, at, record }, UnderWay::Move(record, at)),
                None if reclaim.moving == 0 && !reclaim.releasing => {
                    (StoreOp::Release { token, segment }, UnderWay::Release)
                }
                None => return,
            };
            match self.pool.submit(op) {
                Ok(()) => {
                    self.tokens += 1;
                    reclaim.moving += usize::from(matches!(what, UnderWay::Move(..)));
                    reclaim.releasing = matches!(what, UnderWay::Release);
                    self.under_way.insert(token, what);
                }
                Err(StoreOp::Move { at, record, .. }) => {
                    reclaim.moves.push_front((record, at));
                    return;
                }
                Err(_) => return,
            }
        }
    }
}
