//! Appending: where a block goes, when its data are written, and the commit that makes it durable.

use kv_block::DiskLocation;
use kv_tiers::store::{StoreDone, StoreError};

use super::{
    Append, AppendKind, Commit, Image, Log, Room, Segment, State, Step, SyncMode, What, header_page,
};
use crate::io::{IoKind, IoOp, Memory};
use crate::segment::{ENTRIES_PER_PAGE, ENTRY_BYTES, Entry, PAGE_BYTES, pages_of};

/// Entries taken into one commit at most.
const COMMIT_MAX: usize = 1024;

impl Log {
    pub(super) fn place(&mut self) {
        while let Some(id) = self.queue.front().copied() {
            let one = self.appends.get(id).expect("queued appends are in the table");
            let pages = one.pages();
            let bytes = u64::from(pages) * PAGE_BYTES as u64;
            if one.answered {
                self.queue.pop_front();
                self.end_append(id, Ok(None));
                continue;
            }
            if self.must_wait(one) {
                if one.record.is_none() {
                    self.blocked_removals.insert((one.key, one.number));
                }
                self.queue.pop_front();
                self.blocked.push(id);
                continue;
            }
            if self.data_in_flight > 0 && self.data_in_flight + bytes > self.config.data_in_flight_max {
                break;
            }
            let is_write = matches!(one.kind, AppendKind::Write { .. });
            match self.room(pages, is_write) {
                Room::Here => {
                    self.queue.pop_front();
                    self.place_one(id, pages);
                }
                Room::Wait => break,
                Room::None => {
                    self.queue.pop_front();
                    self.end_append(id, Err(StoreError::Full));
                }
            }
        }
    }

    /// Whether an operation on the same key has to end first.
    pub(super) fn must_wait(&self, one: &Append) -> bool {
        let before = (one.key, 0)..(one.key, one.number);
        match one.kind {
            AppendKind::Remove { .. } => {
                self.storing.range(before.clone()).next().is_some()
                    || self.blocked_removals.range(before).next().is_some()
            }
            AppendKind::Write { .. } | AppendKind::Move { .. } => {
                self.blocked_removals.range(before).next().is_some()
            }
            AppendKind::Carry { .. } => false,
        }
    }

    /// Segments that may still be made.
    pub(super) fn makeable(&self) -> usize {
        if self.now < self.create_again_at {
            return 0;
        }
        (self.config.segments_max as usize).saturating_sub(self.segments.len())
    }

    /// Segments that there are or can be: fewer than configured while the file system refuses more.
    pub(super) fn segments_now(&self) -> usize {
        let more = if self.refused { 0 } else { self.makeable() };
        (self.segments.len() + more).min(self.config.segments_max as usize)
    }

    /// The same in bytes.
    pub(super) fn room_bytes(&self) -> u64 {
        self.segments_now() as u64 * self.config.geometry.segment_bytes()
    }

    /// Segments that are free, or can be.
    pub(super) fn spare(&self) -> usize {
        self.free.len() + self.makeable()
    }

    pub(super) fn room(&mut self, pages: u32, is_write: bool) -> Room {
        let owed = if is_write { self.census.with_node.max(1) } else { 0 };
        if let Some(active) = self.active
            && self.segments[&active].fits(pages)
        {
            return if self.spare() >= owed { Room::Here } else { Room::None };
        }
        if self.spare() < owed + 1 {
            // With very few segments the full one is the only one that can be reclaimed.
            let reclaimable = |one: &Segment| !matches!(one.state, State::Free | State::Active | State::Lost);
            if is_write && !self.segments.values().any(reclaimable) {
                self.seal();
            }
            return Room::None;
        }
        let Some(next) = self.free.pop_front() else {
            self.want_segment();
            return Room::Wait;
        };
        self.seal();
        let order = self.order_next;
        self.order_next += 1;
        let segment = self.segment(next);
        segment.header.order = order;
        segment.begun = false;
        let mut header = header_page(&segment.header);
        let memory = header.memory(PAGE_BYTES);
        self.set_state(next, State::Active);
        let what = What::Begin { segment: next, _header: Some(header) };
        self.start(next, IoKind::Write { offset: 0, memory }, what);
        self.active = Some(next);
        Room::Here
    }

    /// The header of a new life was written, or synced, or neither.
    pub(super) fn life_advanced(&mut self, number: u32, op: &IoOp, failure: Option<StoreError>) {
        let Some(error) = failure else {
            if matches!(op.kind, IoKind::Sync) {
                self.segment(number).begun = true;
            } else {
                self.start(number, IoKind::Sync, What::Begin { segment: number, _header: None });
            }
            return;
        };
        if self.active == Some(number) {
            self.seal();
        }
        self.segment(number).failure = Some(error);
    }

    pub(super) fn seal(&mut self) {
        if let Some(active) = self.active.take() {
            self.set_state(active, State::Sealed);
            let segment = self.segment(active);
            if segment.pending == 0 {
                segment.images.clear();
            }
        }
    }

    pub(super) fn place_one(&mut self, id: u64, pages: u32) {
        let number = self.active.expect("room was found in it");
        let segment = self.segment(number);
        let (index, page) = (segment.entries_used, segment.page_next);
        segment.entries_used += 1;
        segment.page_next += pages;
        segment.pending += 1;
        let one = self.appends.get_mut(id).expect("queued appends are in the table");
        (one.segment, one.index, one.page) = (number, index, page);
        if pages == 0 {
            self.ready.push_back(id);
            return;
        }
        let bytes = pages * PAGE_BYTES as u32;
        let address = match &mut one.kind {
            AppendKind::Write { bytes } => bytes.as_ptr().cast_mut(),
            AppendKind::Move { buffer, .. } => buffer.memory(0).address,
            AppendKind::Remove { .. } | AppendKind::Carry { .. } => unreachable!("removals have no data"),
        };
        self.data_writes += 1;
        self.data_in_flight += u64::from(bytes);
        let offset = u64::from(page) * PAGE_BYTES as u64;
        self.start(
            number,
            IoKind::Write { offset, memory: Memory { address, bytes } },
            What::Data { append: id },
        );
    }

    pub(super) fn begin_commit(&mut self) {
        let mut commit = Commit::default();
        while commit.appends.len() < COMMIT_MAX
            && let Some(id) = self.ready.pop_front()
        {
            // What follows one that has to wait waits too, so that sequence is the order of placement.
            let one = self.appends.get(id).expect("ready appends are in the table");
            if one.answered {
                self.end_append(id, Ok(None));
                continue;
            }
            let (number, index) = (one.segment, one.index);
            if let Some(error) = self.segments[&number].failure.clone() {
                self.end_append(id, Err(error));
                continue;
            }
            if !self.segments[&number].begun {
                self.ready.push_front(id);
                break;
            }
            let is_move = matches!(one.kind, AppendKind::Move { .. });
            let sequence = self.sequence_next;
            self.sequence_next += 1;
            let entry = match (&one.kind, one.record) {
                (AppendKind::Write { .. } | AppendKind::Move { .. }, Some(record)) => {
                    Entry::Stored { sequence, record, page: one.page }
                }
                (AppendKind::Carry { removal, .. }, _) => Entry::Removed {
                    sequence: removal.sequence,
                    key: removal.key,
                    at: removal.at,
                    carried: true,
                },
                (AppendKind::Remove { at }, _) => {
                    Entry::Removed { sequence, key: one.key, at: Some(*at), carried: false }
                }
                (_, None) => unreachable!("writes and moves have a record"),
            };
            let segment = self.segment(number);
            let bytes = entry.encode(&segment.header, index);
            put_entry(segment, index, &bytes);
            commit.pages.insert((number, index / ENTRIES_PER_PAGE));
            commit.touched.insert(number);
            if is_move {
                commit.moved_into.insert(number);
            }
            commit.appends.push(id);
        }
        if commit.appends.is_empty() {
            return;
        }
        self.stats.commits += 1;
        self.stats.commit_entries += commit.appends.len() as u64;
        if self.config.sync == SyncMode::Never {
            commit.moved_into.clear();
        }
        self.commit = Some(commit);
        self.commit_step(Step::Data);
    }

    /// Begins a step, or the next one when there is nothing to do in it.
    pub(super) fn commit_step(&mut self, step: Step) {
        let commit = self.commit.as_mut().expect("called for it");
        commit.step = step;
        let sound = |segment: &u32| !commit.failed.contains_key(segment);
        let mut ops = Vec::new();
        match step {
            Step::Data => ops.extend(commit.moved_into.iter().map(|segment| (*segment, IoKind::Sync))),
            Step::Index => {
                for (segment, page) in commit.pages.iter().copied().filter(|(segment, _)| sound(segment)) {
                    let images = &mut self.segments.get_mut(&segment).expect("it is in use").images;
                    let image = images.get_mut(&page).expect("entries were put there");
                    let memory = image.page.memory(PAGE_BYTES);
                    ops.push((
                        segment,
                        IoKind::Write { offset: u64::from(1 + page) * PAGE_BYTES as u64, memory },
                    ));
                }
            }
            Step::Sync if self.config.sync == SyncMode::Always => {
                ops.extend(
                    commit.touched.iter().copied().filter(sound).map(|segment| (segment, IoKind::Sync)),
                );
            }
            Step::Sync => {}
        }
        commit.left = ops.len();
        if ops.is_empty() {
            return self.commit_advanced();
        }
        for (segment, kind) in ops {
            self.start(segment, kind, What::Commit { segment });
        }
    }

    /// All operations of the commit's present step have ended.
    pub(super) fn commit_advanced(&mut self) {
        match self.commit.as_ref().expect("called for it").step {
            Step::Data => self.commit_step(Step::Index),
            Step::Index => self.commit_step(Step::Sync),
            Step::Sync => self.commit_ended(),
        }
    }

    pub(super) fn commit_ended(&mut self) {
        let commit = self.commit.take().expect("called for it");
        for id in commit.appends {
            let one = self.appends.get(id).expect("committed appends are in the table");
            let (number, index) = (one.segment, one.index);
            let result = match commit.failed.get(&number) {
                // A removal needs no place; the one told says that it is there.
                None if one.record.is_none() => Ok(self.segments[&number].header.location(1)),
                None => Ok(self.segments[&number].header.location(one.page)),
                Some(error) => {
                    let error = error.clone();
                    put_entry(self.segment(number), index, &[0; ENTRY_BYTES]);
                    Err(error)
                }
            };
            self.end_append(id, result);
        }
        // A place that failed is left alone from now on.
        if self.active.is_some_and(|active| commit.failed.contains_key(&active)) {
            self.seal();
        }
    }

    /// The one end of every append: its memory goes back, its place is settled, what waited for it goes on.
    /// `Ok(None)` for one that was given up after it had been answered.
    pub(super) fn end_append(&mut self, id: u64, result: Result<Option<DiskLocation>, StoreError>) {
        let one = self.appends.remove(id).expect("an append ends once");
        let stored = result.as_ref().is_ok_and(Option::is_some);
        if one.page != 0 {
            self.settle_place(&one, stored);
        }
        if one.record.is_some() {
            self.storing.remove(&(one.key, one.number));
        }
        let token = one.token;
        let limit = self.config.slow_limit;
        let end = |result: Result<Option<DiskLocation>, StoreError>| {
            result.and_then(|at| at.ok_or(StoreError::Slow { limit }))
        };
        match one.kind {
            AppendKind::Write { bytes } => {
                if stored {
                    self.bytes_written += one.record.map_or(0, |record| u64::from(record.bytes));
                }
                if !one.answered {
                    self.done.push(StoreDone::Written { token, bytes, result: end(result) });
                }
            }
            AppendKind::Move { from, buffer } => {
                if self.spare_buffer.len() < 8 {
                    self.spare_buffer.push(buffer);
                }
                if stored {
                    self.died(from);
                    let pages = one.record.map_or(0, |record| pages_of(record.bytes));
                    if let Some(left) = self.segments.get_mut(&from.segment()).filter(|one| one.is_at(from)) {
                        left.pages_moved += pages;
                    }
                }
                if !one.answered {
                    self.done.push(StoreDone::Moved { token, result: end(result) });
                }
            }
            AppendKind::Remove { at } => {
                if stored {
                    self.died(at);
                }
                if !one.answered {
                    self.done.push(StoreDone::Removed { token, result: end(result).map(|_| ()) });
                }
            }
            AppendKind::Carry { releasing, .. } => {
                self.stats.removals_carried += u64::from(stored);
                self.carried(releasing, end(result).map(|_| ()));
            }
        }
        if !self.blocked.is_empty() {
            self.blocked_removals.clear();
            let mut again = std::mem::take(&mut self.blocked);
            again.sort_by_key(|id| self.appends.get(*id).map(|one| one.number));
            for id in again.into_iter().rev() {
                self.queue.push_front(id);
            }
        }
    }

    pub(super) fn settle_place(&mut self, one: &Append, stored: bool) {
        let segment = self.segment(one.segment);
        segment.pending -= 1;
        segment.settle_image(one.index);
        if stored && one.record.is_some() {
            segment.blocks += 1;
            // The node was told that this one failed, so it will never ask for it.
            segment.live += u32::from(!one.answered);
        }
    }

    pub(super) fn died(&mut self, at: DiskLocation) {
        if let Some(segment) = self.segments.get_mut(&at.segment()).filter(|one| one.is_at(at)) {
            segment.live = segment.live.saturating_sub(1);
        }
    }
}

fn put_entry(segment: &mut Segment, index: u32, bytes: &[u8; ENTRY_BYTES]) {
    let image = segment.images.entry(index / ENTRIES_PER_PAGE).or_insert_with(Image::fresh);
    let at = (index % ENTRIES_PER_PAGE) as usize * ENTRY_BYTES;
    image.page[at..at + ENTRY_BYTES].copy_from_slice(bytes);
}
