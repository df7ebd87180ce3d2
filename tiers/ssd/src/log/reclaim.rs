//! Segments come and go: made when there is room, offered when it runs short, released by the node.

use std::time::Duration;

use kv_tiers::store::{OpToken, StoreDone, StoreError};

use super::{Append, AppendKind, Job, Log, LogConfig, Removal, Segment, State, What, header_page};
use crate::io::{IoKind, IoOp, Pages};
use crate::segment::{self, Entry, Header, IndexScan, PAGE_BYTES};

/// Segments offered to the node at once at most.
const OFFERED_MAX: usize = 4;
/// How often the index of a segment to be offered is read before the segment is given up.
const OFFER_TRIES: u32 = 3;
/// After the file system refused a segment, how long until it is asked again.
const CREATE_RETRY: Duration = Duration::from_secs(30);
/// After a whole round of releases that won nothing, because all of it is kept, how long until the next.
const OFFER_RETRY: Duration = Duration::from_secs(60);

impl Log {
    pub(super) fn want_segment(&mut self) {
        if self.creating.is_some() || !self.free.is_empty() || self.makeable() == 0 {
            return;
        }
        let number =
            (0..).find(|number| !self.segments.contains_key(number)).expect("fewer segments than numbers");
        self.generation_newest += 1;
        self.create(number, self.generation_newest);
    }

    pub(super) fn create(&mut self, segment: u32, generation: u64) {
        let LogConfig { store, geometry, .. } = self.config;
        let header = Header { store, segment, generation, order: 0, geometry };
        self.creating = Some(header);
        self.jobs.push(Job::Create(header));
    }

    /// The file of a segment was made, and is attached; or it was not.
    pub(crate) fn created(&mut self, now: Duration, header: &Header, result: Result<(), i32>) {
        self.now = now;
        self.creating = None;
        match result {
            Ok(()) => {
                self.refused = false;
                self.segments.insert(header.segment, Segment::new(*header, State::Free));
                self.free.push_back(header.segment);
            }
            Err(errno) => {
                self.stats.segments_refused += 1;
                self.create_again_at = now + CREATE_RETRY;
                let error = StoreError::Io { operation: "allocate", segment: header.segment, errno };
                self.refused = errno == libc::ENOSPC || errno == libc::EDQUOT;
                if self.refused {
                    // Not the device's fault: go on with what there is.
                    self.circuit.health.last_error = Some(error);
                } else {
                    self.device_erred(&error);
                }
            }
        }
    }

    pub(super) fn is_odd(&self, number: u32) -> bool {
        let segment = &self.segments[&number];
        segment.cut || segment.header.geometry != self.config.geometry
    }

    /// Gives up a free segment's file, which is of no use any more; another is made when one is wanted.
    pub(super) fn discard(&mut self, number: u32) {
        self.segments.remove(&number);
        self.jobs.push(Job::Delete(number));
    }

    pub(super) fn offer(&mut self) {
        let low = (self.segments_now() / 16).clamp(1, 8);
        loop {
            let offered = self.census.with_node;
            let excess = self.segments.len() > self.config.segments_max as usize;
            let wanted = self.spare() + offered <= low || (excess && offered == 0);
            if !wanted || offered >= OFFERED_MAX.min(self.spare().max(1)) || self.now < self.offer_again_at {
                return;
            }
            if excess && self.free.len() > 1 {
                let number = self.free.pop_back().expect("more than one");
                self.discard(number);
                continue;
            }
            let idle = |one: &Segment| one.state == State::Sealed && one.pending == 0 && one.carry_left == 0;
            let emptiest = self.segments.iter().filter(|(_, one)| idle(one));
            let victim = emptiest.min_by_key(|(_, one)| (one.live * 8 / one.blocks.max(1), one.header.order));
            let Some((number, segment)) = victim.map(|(number, one)| (*number, one)) else { return };
            let length = segment.header.geometry.index_bytes();
            let mut buffer = Pages::new(length);
            let memory = buffer.memory(length);
            self.set_state(number, State::Offering);
            let kind = IoKind::Read { offset: PAGE_BYTES as u64, memory };
            self.start(number, kind, What::Offer { segment: number, buffer });
        }
    }

    /// The index of a segment to be offered was read.
    pub(super) fn offered(&mut self, number: u32, failed: bool, index: &[u8]) {
        let segment = self.segment(number);
        if failed {
            segment.offer_tries += 1;
            let lost = segment.offer_tries >= OFFER_TRIES;
            return self.set_state(number, if lost { State::Lost } else { State::Sealed });
        }
        let mut scan = IndexScan::default();
        segment::parse_segment_index(
            &segment.header,
            0,
            &index[..segment.header.geometry.index_bytes()],
            &mut scan,
        );
        scan.entries.sort_by_key(|(_, entry)| entry.sequence());
        let mut entries = Vec::new();
        segment.removals.clear();
        for (_, entry) in scan.entries {
            match entry {
                Entry::Stored { record, page, .. } => {
                    entries.extend(segment.header.location(page).map(|at| (record, at)));
                }
                Entry::Removed { sequence, key, at, .. } => {
                    segment.removals.push(Removal { key, sequence, at });
                }
            }
        }
        self.set_state(number, State::Offered);
        let room_bytes = self.room_bytes();
        self.done.push(StoreDone::Reclaim { segment: number, entries, room_bytes });
    }

    pub(super) fn release(&mut self, token: OpToken, number: u32) {
        let segment = self.segments.get_mut(&number).filter(|one| one.state == State::Offered);
        let Some(segment) = segment else {
            self.done.push(StoreDone::Released { token, result: Err(StoreError::Stale { segment: number }) });
            return;
        };
        segment.release = Some(token);
        let (order, removals) = (segment.header.order, std::mem::take(&mut segment.removals));
        self.set_state(number, State::Releasing);
        let older =
            |one: &Segment| one.header.order > 0 && one.header.order < order && one.state != State::Free;
        if self.segments.values().any(older) {
            self.segment(number).carry_left = removals.len() as u32;
            for removal in &removals {
                self.numbers += 1;
                let id = self.appends.insert(Append {
                    number: self.numbers,
                    token,
                    key: removal.key,
                    record: None,
                    kind: AppendKind::Carry { releasing: number, removal: *removal },
                    taken: self.now,
                    answered: false,
                    segment: 0,
                    index: 0,
                    page: 0,
                });
                self.queue.push_back(id);
            }
        }
        self.segment(number).removals = removals;
        self.try_release(number);
    }

    /// A segment was released, and what was in it was written again whole, or not. When that happened to as many
    /// in a row as there are, going on would only wear out the device.
    fn count_won(&mut self, nothing: bool) {
        self.released_in_vain = if nothing { self.released_in_vain + 1 } else { 0 };
        if self.released_in_vain > self.segments.len() {
            self.released_in_vain = 0;
            self.offer_again_at = self.now + OFFER_RETRY;
        }
    }

    pub(super) fn carried(&mut self, number: u32, result: Result<(), StoreError>) {
        self.segment(number).carry_left -= 1;
        match result {
            Ok(()) => self.try_release(number),
            Err(error) => self.release_ended(number, Err(error)),
        }
    }

    /// Begins the durable end of a released segment's life as soon as nobody reads it any more.
    pub(super) fn try_release(&mut self, number: u32) {
        let segment = self.segment(number);
        let waits = segment.reads > 0 || segment.carry_left > 0 || segment.release_begun;
        if segment.state != State::Releasing || segment.release.is_none() || waits {
            return;
        }
        segment.release_begun = true;
        let next = Header { generation: segment.header.generation + 1, order: 0, ..segment.header };
        let mut header = header_page(&next);
        let memory = header.memory(PAGE_BYTES);
        let what = What::Release { segment: number, _header: Some(header) };
        self.start(number, IoKind::Write { offset: 0, memory }, what);
    }

    pub(super) fn release_advanced(&mut self, number: u32, op: &IoOp, failure: Option<StoreError>) {
        if let Some(error) = failure {
            self.release_ended(number, Err(error));
        } else if !matches!(op.kind, IoKind::Sync) {
            self.start(number, IoKind::Sync, What::Release { segment: number, _header: None });
        } else {
            self.release_ended(number, Ok(()));
        }
    }

    pub(super) fn release_ended(&mut self, number: u32, result: Result<(), StoreError>) {
        let segment = self.segment(number);
        let Some(token) = segment.release.take() else { return };
        segment.release_begun = false;
        match &result {
            // It will be offered again. What was carried already is carried twice then, which does no harm.
            Err(_) => self.set_state(number, State::Sealed),
            Ok(()) => {
                self.set_state(number, State::Free);
                let segment = self.segment(number);
                let header = Header { generation: segment.header.generation + 1, order: 0, ..segment.header };
                let cut = segment.cut;
                let (moved, used) =
                    (segment.pages_moved, segment.page_next - segment.header.geometry.data_page_first());
                self.count_won(used > 0 && moved >= used - used / 16);
                let segment = self.segment(number);
                *segment = Segment { cut, ..Segment::new(header, State::Free) };
                self.generation_newest = self.generation_newest.max(header.generation);
                self.stats.segments_released += 1;
                if self.is_odd(number) || self.segments.len() > self.config.segments_max as usize {
                    self.discard(number);
                } else {
                    self.free.push_back(number);
                }
            }
        }
        self.done.push(StoreDone::Released { token, result });
    }
}
