//! Opening after whatever happened: reads headers and index regions, nothing else, newest life first.
//!
//! ```text
//!  headers of all files --> lives in descending order --> index regions, deep queue --> entries by
//!  (one page each)          (free ones are not read)      (a few MiB ahead)             descending sequence
//! ```
//! The first word on a key is the newest, so it alone counts: a stored block is handed out, a removal
//! hides what comes later. Only a removal that was carried to a younger segment speaks of its own past;
//! it hides what has a lower sequence than itself. What is torn, damaged, misplaced or cut off is not
//! there. A file whose header is not believed is renamed and kept.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::time::Duration;

use kv_block::{DiskLocation, Record};

use crate::files::Directory;
use crate::format::free_name;
use crate::io::{BlockIo, IoDone, IoKind, IoOp, Memory, Pages};
use crate::log::{LogConfig, Segment, State};
use crate::segment::{
    self, ENTRIES_PER_PAGE, ENTRY_BYTES, Entry, Header, HeaderError, IndexScan, PAGE_BYTES, pages_of,
};

/// Longest single read, in bytes.
const READ_BYTES: usize = 1 << 20;
/// Bytes of index read ahead at most, unless one index alone is longer.
const AHEAD_BYTES: usize = 32 << 20;
/// Headers read at once.
const HEADERS_AHEAD: usize = 64;
/// Blocks handed out at once.
const BATCH: usize = 8192;

/// What opening found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RecoveryReport {
    /// Segment files taken over.
    pub segments: u32,
    /// Those of them that were free.
    pub segments_free: u32,
    /// Files whose header was not believed; renamed and kept.
    pub segments_set_aside: u32,
    /// Files that could not be read, in whole or in part. They are left alone, and their blocks may come back.
    pub segments_unread: u32,
    /// Blocks handed out.
    pub blocks: u64,
    /// Entries that a newer one of the same key, or a removal, made void.
    pub superseded: u64,
    /// Removals read.
    pub removals: u64,
    /// Places in an index that held neither zero nor an entry: torn, damaged or misplaced.
    pub entries_broken: u64,
    /// Entries that point behind the end of their file.
    pub entries_cut: u64,
    /// Bytes of index read.
    pub index_bytes: u64,
    /// Time from the first read to the last block.
    pub took: Duration,
    /// What was renamed and kept, a sentence each: of segments, and of the whole directory.
    pub set_aside: Vec<String>,
    /// What else an operator should know, with the switch that changes it.
    pub notes: Vec<String>,
}

/// So many of the newest lives are synced before the log goes on: more than writes under way ever span.
const SYNCED_MAX: usize = 16;

/// What the log starts from.
pub(crate) struct Recovery {
    pub(crate) segments: Vec<Segment>,
    pub(crate) sequence_next: u64,
    pub(crate) order_next: u64,
    pub(crate) report: RecoveryReport,
}

/// Blocks handed out, newest first.
pub(crate) type Batch = Vec<(Record, DiskLocation)>;

/// Reads the store in `directory` and attaches its segments to `engine`.
pub(crate) fn recover(
    directory: &dyn Directory,
    engine: &mut dyn BlockIo,
    config: &LogConfig,
    hand_out: &mut dyn FnMut(Batch),
) -> io::Result<Recovery> {
    let began = engine.now();
    let mut report = RecoveryReport::default();
    let mut lives = open_files(directory, engine, config, &mut report)?;
    lives.sort_by_key(|life| std::cmp::Reverse(life.header.order));
    let mut recovery = Recovery {
        segments: Vec::new(),
        sequence_next: 1,
        order_next: lives.first().map_or(0, |life| life.header.order) + 1,
        report,
    };
    let in_use = lives.iter().take_while(|life| life.header.order > 0).count();
    for life in lives.drain(in_use..) {
        let mut segment = Segment::new(life.header, State::Free);
        segment.cut = life.bytes < life.header.geometry.segment_bytes();
        recovery.report.segments_free += 1;
        recovery.segments.push(segment);
    }
    let mut settler = Settler {
        seen: HashSet::default(),
        carried: HashMap::default(),
        batch: Vec::new(),
        scan: IndexScan::default(),
    };
    let mut tail = None;
    read_indexes(engine, &lives, &mut |place, index, unread| {
        let life = &lives[place];
        let segment = settler.settle(life, index, unread, &mut recovery, hand_out);
        let geometry = life.header.geometry;
        let room = segment.entries_used < geometry.entries_max() && segment.page_next < geometry.page_end();
        if place == 0 && room && unread == 0 && !segment.cut && geometry == config.geometry {
            tail = Some((recovery.segments.len(), last_page(life, index, segment.entries_used)));
        }
        recovery.segments.push(segment);
    });
    // What was read may not have reached the medium yet: the newest lives may have been written to at the same time.
    let newest = lives.iter().take(SYNCED_MAX).enumerate();
    let syncs = newest
        .map(|(place, life)| (place, IoOp { token: 0, segment: life.header.segment, kind: IoKind::Sync }));
    let mut synced = true;
    run(engine, syncs.collect(), &mut |_, result| synced &= result.is_ok());
    if let Some((place, page)) = tail
        && synced
    {
        recovery.segments[place].reopen(page);
    }
    if !settler.batch.is_empty() {
        hand_out(settler.batch);
    }
    recovery.report.segments = recovery.segments.len() as u32;
    recovery.report.took = engine.now().saturating_sub(began);
    if recovery.report.entries_broken > 0 {
        recovery.report.notes.push(format!(
            "{} index entries were torn or damaged and are not there; after a power cut a few are usual",
            recovery.report.entries_broken
        ));
    }
    Ok(recovery)
}

/// A file with a sound header.
struct Life {
    header: Header,
    bytes: u64,
}

fn open_files(
    directory: &dyn Directory,
    engine: &mut dyn BlockIo,
    config: &LogConfig,
    report: &mut RecoveryReport,
) -> io::Result<Vec<Life>> {
    let names = directory.names()?;
    let mut files = Vec::new();
    for name in &names {
        if name.starts_with("segment-") && name.ends_with(".new") {
            directory.remove(name)?;
        }
        let Some(number) = segment::number_of(name) else { continue };
        match directory.open(name) {
            Ok((file, bytes)) => {
                engine.attach(number, file);
                files.push((number, bytes));
            }
            Err(error) => {
                report.segments_unread += 1;
                report.notes.push(format!("{name} cannot be opened and is left alone: {error}"));
            }
        }
    }
    let mut lives = Vec::new();
    for group in files.chunks(HEADERS_AHEAD) {
        let mut pages: Vec<_> = group.iter().map(|_| Pages::new(PAGE_BYTES)).collect();
        let mut reads = Vec::new();
        for (place, ((number, _), page)) in group.iter().zip(&mut pages).enumerate() {
            reads.push((
                place,
                IoOp {
                    token: 0,
                    segment: *number,
                    kind: IoKind::Read { offset: 0, memory: page.memory(PAGE_BYTES) },
                },
            ));
        }
        let mut failed = vec![None; group.len()];
        run(engine, reads, &mut |place, result| failed[place] = result.err());
        for (((number, bytes), page), failed) in group.iter().zip(&pages).zip(failed) {
            let name = segment::file_name(*number);
            if let Some(errno) = failed {
                engine.detach(*number);
                let error = io::Error::from_raw_os_error(errno);
                report.segments_unread += 1;
                report.notes.push(format!("{name} cannot be read and is left alone: {error}"));
                continue;
            }
            match believe(&page[..(*bytes).min(PAGE_BYTES as u64) as usize], *number, config) {
                Ok(header) => lives.push(Life { header, bytes: *bytes }),
                Err(why) => {
                    engine.detach(*number);
                    let aside = free_name(&names, &format!("{name}.aside"));
                    directory.rename(&name, &aside)?;
                    report.segments_set_aside += 1;
                    report
                        .set_aside
                        .push(format!("{name} was set aside as {aside}: {why}; its blocks are not served"));
                }
            }
        }
    }
    Ok(lives)
}

fn believe(page: &[u8], number: u32, config: &LogConfig) -> Result<Header, String> {
    let header = Header::parse(page).map_err(|error: HeaderError| error.to_string())?;
    if header.segment != number {
        return Err(format!("it is segment {} under another name", header.segment));
    }
    if header.store != config.store {
        return Err(format!("it belongs to store {}", header.store));
    }
    Ok(header)
}

/// Carries reads through the engine until all have ended. A read that meets the end of its file is whole:
/// what is missing stays as it was.
fn run(engine: &mut dyn BlockIo, reads: Vec<(usize, IoOp)>, each: &mut dyn FnMut(usize, Result<(), i32>)) {
    let mut places: HashMap<u64, (usize, IoOp)> = HashMap::new();
    let mut ops = Vec::new();
    for (token, (place, mut op)) in (0..).zip(reads) {
        op.token = token;
        places.insert(token, (place, op));
        ops.push(op);
    }
    let mut done = Vec::new();
    while !places.is_empty() {
        // SAFETY: the caller keeps the memory and does not touch it until its place was given to `each`,
        // and this function does not return before that.
        unsafe { engine.submit(&mut ops) };
        engine.completions(Duration::MAX, &mut done);
        for one in done.drain(..) {
            let Some((place, op)) = places.get_mut(&one.token) else { continue };
            if let Some(result) = progress(op, &one) {
                each(*place, result);
                places.remove(&one.token);
            } else {
                ops.push(*op);
            }
        }
    }
}

/// What a completion makes of a read: its end, or `None` when `op` is what is left to be done.
fn progress(op: &mut IoOp, done: &IoDone) -> Option<Result<(), i32>> {
    let moved = match done.result {
        Ok(moved) => moved,
        Err(libc::EINTR | libc::EAGAIN) => return None,
        Err(errno) => return Some(Err(errno)),
    };
    let IoKind::Read { offset, memory } = &mut op.kind else { return Some(Ok(())) };
    let sectors = moved / 512 * 512;
    if moved >= memory.bytes || sectors == 0 {
        return Some(Ok(()));
    }
    *offset += u64::from(sectors);
    *memory = memory.skip(sectors);
    None
}

/// What is done with one index: place in the list of lives, bytes, and how many pieces of it could not be
/// read.
type EachIndex<'a> = dyn FnMut(usize, &[u8], usize) + 'a;

/// Reads the indexes of `lives` in order, some ahead.
fn read_indexes(engine: &mut dyn BlockIo, lives: &[Life], each: &mut EachIndex<'_>) {
    struct Reading {
        place: usize,
        index: Pages,
        left: usize,
        unread: usize,
    }
    let mut window: VecDeque<Reading> = VecDeque::new();
    let mut ahead = 0;
    let mut next = 0;
    let mut flying: HashMap<u64, (usize, IoOp)> = HashMap::new();
    let mut token = 0;
    let (mut ops, mut done) = (Vec::new(), Vec::new());
    while next < lives.len() || !window.is_empty() {
        while next < lives.len() && (window.is_empty() || ahead < AHEAD_BYTES) {
            let header = &lives[next].header;
            let length = header.geometry.index_bytes();
            let mut index = Pages::new(length);
            let whole = index.memory(length);
            let mut left = 0;
            for start in (0..length).step_by(READ_BYTES) {
                let bytes = READ_BYTES.min(length - start) as u32;
                let memory = Memory { bytes, ..whole.skip(start as u32) };
                token += 1;
                left += 1;
                let kind = IoKind::Read { offset: (PAGE_BYTES + start) as u64, memory };
                let op = IoOp { token, segment: header.segment, kind };
                flying.insert(token, (next, op));
                ops.push(op);
            }
            ahead += length;
            window.push_back(Reading { place: next, index, left, unread: 0 });
            next += 1;
        }
        // SAFETY: the window owns the memory and gives it up, or looks at it, only when nothing is left to
        // be read into it; nothing here returns before the window is empty.
        unsafe { engine.submit(&mut ops) };
        engine.completions(Duration::MAX, &mut done);
        for one in done.drain(..) {
            let Some((place, op)) = flying.get_mut(&one.token) else { continue };
            let Some(result) = progress(op, &one) else {
                ops.push(*op);
                continue;
            };
            let first = window.front().map_or(0, |reading| reading.place);
            let reading = &mut window[*place - first];
            reading.left -= 1;
            reading.unread += usize::from(result.is_err());
            flying.remove(&one.token);
        }
        while let Some(front) = window.pop_front_if(|reading| reading.left == 0) {
            ahead -= front.index.len();
            each(front.place, &front.index, front.unread);
        }
    }
}

/// Keys are digests: eight bytes of one are as good as any hash of it.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for word in bytes.chunks_exact(8) {
            self.0 = self.0.rotate_left(5) ^ u64::from_le_bytes(word.try_into().expect("eight bytes"));
        }
    }
    fn write_u64(&mut self, word: u64) {
        self.0 = self.0.rotate_left(5) ^ word;
    }
}

type ByKey = BuildHasherDefault<KeyHasher>;

/// Decides which entry of a key counts.
struct Settler {
    seen: HashSet<[u64; 2], ByKey>,
    carried: HashMap<[u64; 2], u64, ByKey>,
    batch: Batch,
    scan: IndexScan,
}

impl Settler {
    fn settle(
        &mut self,
        life: &Life,
        index: &[u8],
        unread: usize,
        recovery: &mut Recovery,
        hand_out: &mut dyn FnMut(Batch),
    ) -> Segment {
        let Recovery { report, sequence_next, .. } = recovery;
        let mut segment = Segment::new(life.header, State::Sealed);
        segment.cut = life.bytes < life.header.geometry.segment_bytes();
        self.scan.entries.clear();
        (self.scan.broken, self.scan.empty, self.scan.stale) = (0, 0, 0);
        segment::parse_segment_index(&life.header, 0, index, &mut self.scan);
        report.index_bytes += index.len() as u64;
        report.entries_broken += u64::from(self.scan.broken);
        if unread > 0 {
            // Numbers may be in use that could not be seen.
            *sequence_next += 1 << 32;
            report.segments_unread += 1;
            report.notes.push(format!(
                "{}: {unread} pieces of its index could not be read; their blocks are not there",
                segment::file_name(life.header.segment)
            ));
        }
        if !self.scan.entries.is_sorted_by_key(|(_, entry)| entry.sequence()) {
            self.scan.entries.sort_by_key(|(_, entry)| entry.sequence());
        }
        for (place, entry) in self.scan.entries.iter().rev() {
            segment.entries_used = segment.entries_used.max(place + 1);
            *sequence_next = (*sequence_next).max(entry.sequence() + 1);
            match entry {
                Entry::Stored { sequence, record, page } => {
                    let end = page + pages_of(record.bytes);
                    if u64::from(end) * PAGE_BYTES as u64 > life.bytes {
                        report.entries_cut += 1;
                        continue;
                    }
                    segment.page_next = segment.page_next.max(end);
                    segment.blocks += 1;
                    let key = record.key.halves();
                    let removed = !self.carried.is_empty()
                        && self.carried.get(&key).is_some_and(|after| sequence < after);
                    match life.header.location(*page) {
                        Some(at) if !removed && self.seen.insert(key) => {
                            segment.live += 1;
                            report.blocks += 1;
                            self.batch.push((*record, at));
                        }
                        _ => report.superseded += 1,
                    }
                }
                Entry::Removed { key, carried: false, .. } => {
                    report.removals += 1;
                    self.seen.insert(key.halves());
                }
                Entry::Removed { key, sequence, carried: true, .. } => {
                    report.removals += 1;
                    let after = self.carried.entry(key.halves()).or_insert(0);
                    *after = (*after).max(*sequence);
                }
            }
            if self.batch.len() >= BATCH {
                hand_out(std::mem::replace(&mut self.batch, Vec::with_capacity(BATCH)));
            }
        }
        segment
    }
}

/// The index page that the entries of a life end in, with its believed entries and nothing else.
fn last_page(life: &Life, index: &[u8], entries_used: u32) -> Pages {
    let mut page = Pages::new(PAGE_BYTES);
    let first = entries_used / ENTRIES_PER_PAGE * ENTRIES_PER_PAGE;
    let mut scan = IndexScan::default();
    if first < life.header.geometry.entries_max() {
        let start = first as usize * ENTRY_BYTES;
        segment::parse_segment_index(&life.header, first, &index[start..start + PAGE_BYTES], &mut scan);
    }
    for (place, _) in scan.entries {
        let (from, to) = (place as usize * ENTRY_BYTES, (place - first) as usize * ENTRY_BYTES);
        page[to..to + ENTRY_BYTES].copy_from_slice(&index[from..from + ENTRY_BYTES]);
    }
    page
}
