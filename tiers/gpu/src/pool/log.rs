//! The log of a pool: which segment is in which life, what lies where in it, and who still uses it. No device.
//!
//! ```text
//!   Free --first append--> Open --no room--> Full --few are free, all written--> Offered --release--> Draining --+
//!    ^                                                                                                          |
//!    +-------------------------- nobody holds it any more: the device is done with it --------------------------+
//! ```
//! A released segment begins its next life at once: no location of before leads anywhere. Its memory is used again only
//! when the last hold on it is gone. One free segment is kept for moves, so that reclaim can always begin.

use std::collections::BTreeMap;
use std::sync::Arc;

use kv_block::{DiskLocation, Record};
use kv_tiers::store::StoreError;

/// What a place in a segment is counted in.
pub(super) const PAGE_BYTES: u32 = 4096;
/// Segments that only moves may open.
const RESERVED: usize = 1;
/// A segment is offered when no more than this many are free, or about to be.
const FREE_LOW: usize = RESERVED + 1;
/// Fewer make no log: one open, one for moves, one on offer, one to write to meanwhile.
pub(super) const SEGMENTS_MIN: usize = 4;

/// As long as somebody has one, the segment's memory is not used for anything else.
#[derive(Clone, Debug)]
pub(super) struct Hold(#[expect(dead_code, reason = "counted")] Arc<()>);

/// A place at the end of the log that is somebody's to write. Given up, it is dead space.
#[derive(Debug)]
pub(super) struct Spot {
    pub(super) at: DiskLocation,
    pub(super) bytes: u32,
    /// A segment is not offered while one of these is there.
    writer: Arc<()>,
    _hold: Hold,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Free,
    Open,
    Full,
    Offered,
    Draining,
}

#[derive(Debug)]
struct Segment {
    state: State,
    generation: u32,
    page_next: u32,
    /// When it was opened, in the log's order.
    order: u64,
    /// What is written, by page.
    entries: BTreeMap<u32, Record>,
    writers: Arc<()>,
    holds: Arc<()>,
}

#[derive(Debug)]
pub(super) struct Log {
    segments: Vec<Segment>,
    segment_pages: u32,
    opened: u64,
}

/// Who wants room.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum For {
    Write,
    Move,
}

impl Log {
    pub(super) fn new(segments: usize, segment_pages: u32) -> Self {
        let segment = || Segment {
            state: State::Free,
            generation: 1,
            page_next: 0,
            order: 0,
            entries: BTreeMap::new(),
            writers: Arc::default(),
            holds: Arc::default(),
        };
        let segments = std::iter::repeat_with(segment).take(segments).collect();
        Self { segments, segment_pages, opened: 0 }
    }

    fn count(&self, state: State) -> usize {
        self.segments.iter().filter(|segment| segment.state == state).count()
    }

    pub(super) fn in_use(&self) -> usize {
        self.segments.len() - self.count(State::Free)
    }

    pub(super) fn segment_bytes(&self) -> u64 {
        u64::from(self.segment_pages) * u64::from(PAGE_BYTES)
    }

    pub(super) fn room_bytes(&self) -> u64 {
        self.segments.len() as u64 * self.segment_bytes()
    }

    /// A place at the end of the log.
    pub(super) fn append(&mut self, bytes: u32, what_for: For) -> Result<Spot, StoreError> {
        let pages = bytes.div_ceil(PAGE_BYTES).max(1);
        if pages > self.segment_pages {
            return Err(StoreError::TooLarge { bytes, segment_bytes: self.segment_bytes() });
        }
        let number = self.open_segment(pages, what_for)?;
        let segment = &mut self.segments[number];
        let at = DiskLocation::new(number as u32, segment.generation, segment.page_next);
        let at = at.expect("generations are never zero and sizes were checked");
        segment.page_next += pages;
        let hold = Hold(Arc::clone(&segment.holds));
        Ok(Spot { at, bytes, writer: Arc::clone(&segment.writers), _hold: hold })
    }

    /// The open segment if `pages` fit, else a free one.
    fn open_segment(&mut self, pages: u32, what_for: For) -> Result<usize, StoreError> {
        self.settle();
        let least = if what_for == For::Move { 0 } else { RESERVED };
        let open = self.segments.iter().position(|segment| segment.state == State::Open);
        if let Some(number) = open
            && self.segments[number].page_next + pages <= self.segment_pages
        {
            return Ok(number);
        }
        if self.count(State::Free) <= least {
            return Err(StoreError::Full);
        }
        if let Some(number) = open {
            self.segments[number].state = State::Full;
        }
        let next = self.segments.iter().position(|segment| segment.state == State::Free);
        let number = next.ok_or(StoreError::Full)?;
        self.opened += 1;
        let segment = &mut self.segments[number];
        (segment.state, segment.order, segment.page_next) = (State::Open, self.opened, 0);
        Ok(number)
    }

    /// The block is there now.
    pub(super) fn written(&mut self, spot: &Spot, record: Record) -> Result<DiskLocation, StoreError> {
        let number = spot.at.segment();
        let segment = self.segments.get_mut(number as usize);
        let segment = segment.filter(|segment| Arc::ptr_eq(&segment.writers, &spot.writer));
        segment.ok_or(StoreError::Stale { segment: number })?.entries.insert(spot.at.page(), record);
        Ok(spot.at)
    }

    /// Keeps a segment from being used again while the device reads what is expected at a place.
    pub(super) fn find(&self, at: DiskLocation, record: &Record) -> Result<Hold, StoreError> {
        let stale = StoreError::Stale { segment: at.segment() };
        let segment = self.segments.get(at.segment() as usize);
        let segment = segment.filter(|segment| segment.generation == at.generation()).ok_or(stale)?;
        let found = segment.entries.get(&at.page()).ok_or_else(|| corrupt(record, at, "place"))?;
        let what = match found {
            found if found.key != record.key => "key",
            found if found.bytes != record.bytes => "length",
            found if found.checksum != record.checksum => "checksum",
            _ => return Ok(Hold(Arc::clone(&segment.holds))),
        };
        Err(corrupt(record, at, what))
    }

    /// The oldest segment that is full and written, if few are free and none is on offer already.
    pub(super) fn offer(&mut self) -> Option<(u32, Vec<(Record, DiskLocation)>)> {
        self.settle();
        let soon_free = self.count(State::Free) + self.count(State::Draining);
        if self.count(State::Offered) > 0 || soon_free > FREE_LOW {
            return None;
        }
        let full = self.segments.iter_mut().enumerate().filter(|(_, segment)| segment.state == State::Full);
        let written = full.filter_map(|(number, segment)| {
            let is_written = Arc::get_mut(&mut segment.writers).is_some();
            is_written.then_some((number, segment))
        });
        let (number, segment) = written.min_by_key(|(_, segment)| segment.order)?;
        segment.state = State::Offered;
        let (number, generation) = (number as u32, segment.generation);
        let entry =
            |(page, record): (&u32, &Record)| Some((*record, DiskLocation::new(number, generation, *page)?));
        Some((number, segment.entries.iter().filter_map(entry).collect()))
    }

    /// Ends a segment's life.
    pub(super) fn release(&mut self, number: u32) -> Result<(), StoreError> {
        let segment = self.segments.get_mut(number as usize);
        let segment = segment.filter(|segment| segment.state == State::Offered);
        let segment = segment.ok_or(StoreError::Stale { segment: number })?;
        segment.state = State::Draining;
        segment.entries.clear();
        // Zero would make a location of nothing but zeros.
        segment.generation = ((segment.generation + 1) & DiskLocation::SEGMENT_MAX).max(1);
        self.settle();
        Ok(())
    }

    /// Takes back the memory of released segments that nobody holds any more.
    fn settle(&mut self) {
        let draining = self.segments.iter_mut().filter(|segment| segment.state == State::Draining);
        for segment in draining {
            if Arc::get_mut(&mut segment.holds).is_some() {
                segment.state = State::Free;
            }
        }
    }
}

pub(super) fn corrupt(record: &Record, at: DiskLocation, what: &'static str) -> StoreError {
    StoreError::Corrupt { key: record.key, segment: at.segment(), page: at.page(), what }
}

#[cfg(test)]
mod tests {
    use kv_block::{BindingTag, BlockKey, Checksum, Priority};

    use super::*;

    fn record(n: u8) -> Record {
        let (key, checksum) = (BlockKey([n; 16]), Checksum(n.into()));
        Record { key, checksum, bytes: 4096, tag: BindingTag(1), priority: Priority::Normal, expires_at: 0 }
    }

    fn write(log: &mut Log, n: u8) -> DiskLocation {
        let spot = log.append(4096, For::Write).unwrap();
        log.written(&spot, record(n)).unwrap()
    }

    #[test]
    fn a_released_segment_is_used_again_when_nobody_holds_it() {
        let mut log = Log::new(4, 1);
        let places: Vec<_> = (0..3).map(|n| write(&mut log, n)).collect();
        assert_eq!(log.append(1, For::Write).unwrap_err(), StoreError::Full, "the last is for moves");
        let hold = log.find(places[0], &record(0)).unwrap();
        let (segment, entries) = log.offer().unwrap();
        assert_eq!((segment, entries), (0, vec![(record(0), places[0])]));
        assert_eq!(log.offer(), None, "one at a time");
        log.release(0).unwrap();
        assert_eq!(log.release(0), Err(StoreError::Stale { segment: 0 }));
        assert_eq!(log.find(places[0], &record(0)).unwrap_err(), StoreError::Stale { segment: 0 });
        assert_eq!(log.append(1, For::Write).unwrap_err(), StoreError::Full, "held");
        assert_eq!(log.in_use(), 3, "a segment that is held is in use");
        drop(hold);
        let at = write(&mut log, 9);
        assert_eq!((at.segment(), at.generation()), (0, 2));
        assert_eq!(log.find(places[0], &record(9)).unwrap_err(), StoreError::Stale { segment: 0 });
    }

    #[test]
    fn a_segment_with_a_writer_is_not_offered() {
        let mut log = Log::new(4, 1);
        let spot = log.append(1, For::Write).unwrap();
        let second = write(&mut log, 1);
        write(&mut log, 2);
        assert_eq!(log.offer().unwrap().0, second.segment(), "the first is being written");
        log.release(second.segment()).unwrap();
        let at = log.written(&spot, record(3)).unwrap();
        assert!(log.find(at, &record(3)).is_ok());
        drop(spot);
        write(&mut log, 4);
        assert_eq!(log.offer().unwrap().0, at.segment());
    }

    #[test]
    fn generations_come_round_without_a_zero() {
        let mut log = Log::new(4, 1);
        log.segments[0].generation = DiskLocation::SEGMENT_MAX;
        for n in 0..3 {
            write(&mut log, n);
        }
        let (segment, _) = log.offer().unwrap();
        log.release(segment).unwrap();
        assert_eq!((segment, log.segments[0].generation), (0, 1));
    }

    #[test]
    fn another_log_s_place_is_not_written() {
        let (mut log, mut other) = (Log::new(4, 1), Log::new(4, 1));
        let spot = other.append(1, For::Write).unwrap();
        assert_eq!(log.written(&spot, record(1)), Err(StoreError::Stale { segment: 0 }));
    }
}
