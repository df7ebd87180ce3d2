//! The log: a state machine that turns store operations into page I/O and back. It owns no file, thread or
//! clock; it is given the time, and whoever drives it carries [`IoOp`]s to an engine and [`Job`]s to the
//! directory, and brings back how they ended.
//!
//! ```text
//!  Write, Remove ---------------------+
//!  Move: read old place, check -------+--> queue --place--> data write --+--> ready
//!                                          (segment, entry, pages)       |      |
//!                                           removals need no data -------+      v  one commit at a time,
//!                                                                            of all that is ready:
//!  completions <-- fdatasync of the files touched <--------------- index pages
//! ```
//! - **A life begins with its header.** The header that gives a segment its place in the log is durable
//!   before any entry of that life is written, so nothing that a crash left behind is taken for it later.
//! - **Group commit.** While one commit is under way, data writes go on and what is done becomes ready; the
//!   next commit takes all of it. An entry reaches the index only after its data were written.
//! - **Order.** Entries get their sequence at commit. A removal waits for operations on the same key that
//!   came before it, and holds up those that came after it, so sequence is the order of submission per key.
//! - **Room.** Writes leave one free segment for each one offered to the node, and one at any time, so the
//!   moves that empty a segment always find room.
//! - **Removals outlive what they remove.** They are forgotten with their segment only when no older life is
//!   left that might hold the block; else they are carried to the end of the log first.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use kv_arena::{Held, Slot};
use kv_block::{BlockKey, DiskLocation, Record};
use kv_tiers::store::{OpToken, StoreDone, StoreError, StoreOp, StoreUsage};

use crate::health::{Circuit, CircuitLimits};
use crate::io::{IoDone, IoKind, IoOp, Memory, PROBE_FILE, Pages, Table};
use crate::segment::{
    self, ENTRIES_PER_PAGE, ENTRY_BYTES, Entry, Geometry, Header, IndexScan, PAGE_BYTES, StoreId,
};

/// Entries taken into one commit at most.
const COMMIT_MAX: usize = 1024;
/// Segments offered to the node at once at most.
const OFFERED_MAX: usize = 4;
/// How often the index of a segment to be offered is read before the segment is given up.
const OFFER_TRIES: u32 = 3;
/// After the file system refused a segment, how long until it is asked again.
const CREATE_RETRY: Duration = Duration::from_secs(30);
/// Pages of the probe file; the first is its head.
const PROBE_OFFSET: u64 = PAGE_BYTES as u64;

/// When an operation counts as durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SyncMode {
    /// After an fdatasync: it survives a power cut.
    #[default]
    Always,
    /// After the write: it survives the end of the process, and a power cut only if the device keeps what
    /// it took.
    Never,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct LogConfig {
    pub(crate) store: StoreId,
    pub(crate) geometry: Geometry,
    pub(crate) segments_max: u32,
    pub(crate) in_flight_max: u32,
    pub(crate) data_in_flight_max: u64,
    pub(crate) sync: SyncMode,
    pub(crate) slow_limit: Duration,
    pub(crate) circuit: CircuitLimits,
}

/// Something for the directory, which blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Job {
    /// Make the file of a segment, with this header, in place of any that has its name.
    Create(Header),
    /// Remove the file of a segment.
    Delete(u32),
}

/// What was done since the store was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SsdStats {
    /// Bytes written to the device: blocks, padding, indexes and headers.
    pub device_bytes_written: u64,
    /// Group commits.
    pub commits: u64,
    /// Entries committed.
    pub commit_entries: u64,
    /// fdatasync calls.
    pub syncs: u64,
    /// Segments released.
    pub segments_released: u64,
    /// Removals carried to a younger segment.
    pub removals_carried: u64,
    /// Times that the file system refused a segment.
    pub segments_refused: u64,
    /// Segments there are now, free ones included.
    pub segments: u32,
    /// Segments free now.
    pub segments_free: u32,
    /// Segments whose index could not be read; they stay out of use until the next start.
    pub segments_lost: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum State {
    /// Nothing in it; can be opened.
    Free,
    /// Appended to.
    Active,
    /// Full.
    Sealed,
    /// Its index is read, to be offered.
    Offering,
    /// The node has its list.
    Offered,
    /// The node gave it back; its removals are carried, its header rewritten.
    Releasing,
    /// Unreadable.
    Lost,
}

/// An index page with room, as it is on disk or will be.
#[derive(Debug)]
struct Image {
    page: Pages,
    settled: u32,
}

impl Image {
    fn fresh() -> Self {
        Self { page: Pages::new(PAGE_BYTES), settled: 0 }
    }
}

#[derive(Clone, Copy, Debug)]
struct Removal {
    key: BlockKey,
    sequence: u64,
    at: Option<DiskLocation>,
}

#[derive(Debug)]
pub(crate) struct Segment {
    pub(crate) header: Header,
    pub(crate) state: State,
    /// Entries and pages given out.
    pub(crate) entries_used: u32,
    pub(crate) page_next: u32,
    /// Blocks stored in this life, and those not known to be dead.
    pub(crate) blocks: u32,
    pub(crate) live: u32,
    /// The file is shorter than it should be.
    pub(crate) cut: bool,
    /// Appends placed and not settled; reads under way.
    pending: u32,
    reads: u32,
    /// Whether the header of this life, with its order, is durable.
    begun: bool,
    /// Why nothing can be committed to this life.
    failure: Option<StoreError>,
    images: BTreeMap<u32, Image>,
    removals: Vec<Removal>,
    offer_tries: u32,
    release: Option<OpToken>,
    release_begun: bool,
    carry_left: u32,
}

impl Segment {
    pub(crate) fn new(header: Header, state: State) -> Self {
        Self {
            header,
            state,
            entries_used: 0,
            page_next: header.geometry.data_page_first(),
            blocks: 0,
            live: 0,
            cut: false,
            pending: 0,
            reads: 0,
            begun: true,
            failure: None,
            images: BTreeMap::new(),
            removals: Vec::new(),
            offer_tries: 0,
            release: None,
            release_begun: false,
            carry_left: 0,
        }
    }

    /// Goes on appending behind the entries found by a recovery; `last_page` is the index page that they
    /// end in.
    pub(crate) fn reopen(&mut self, last_page: Pages) {
        self.state = State::Active;
        if !self.entries_used.is_multiple_of(ENTRIES_PER_PAGE) {
            let image = Image { page: last_page, settled: self.entries_used % ENTRIES_PER_PAGE };
            self.images.insert(self.entries_used / ENTRIES_PER_PAGE, image);
        }
    }

    fn fits(&self, pages: u32) -> bool {
        self.entries_used < self.header.geometry.entries_max()
            && pages <= self.header.geometry.page_end() - self.page_next
    }

    fn is_at(&self, at: DiskLocation) -> bool {
        at.generation() == self.header.generation as u32 & DiskLocation::SEGMENT_MAX
    }

    fn settle_image(&mut self, index: u32) {
        let page = index / ENTRIES_PER_PAGE;
        let image = self.images.entry(page).or_insert_with(Image::fresh);
        image.settled += 1;
        if image.settled == ENTRIES_PER_PAGE {
            self.images.remove(&page);
        }
        if self.pending == 0 && self.state != State::Active {
            self.images.clear();
        }
    }
}

/// What an append is for, with the memory it owns.
#[derive(Debug)]
enum AppendKind {
    Write { bytes: Held },
    Move { from: DiskLocation, buffer: Pages },
    Remove { at: DiskLocation },
    Carry { releasing: u32, removal: Removal },
}

#[derive(Debug)]
struct Append {
    /// Its number in the order of submission.
    number: u64,
    token: OpToken,
    key: BlockKey,
    /// What is stored; none for removals.
    record: Option<Record>,
    kind: AppendKind,
    taken: Duration,
    /// Reported slow already; it ends in silence.
    answered: bool,
    segment: u32,
    index: u32,
    /// Its first page; 0 until it is placed.
    page: u32,
}

impl Append {
    fn pages(&self) -> u32 {
        self.record.map_or(0, |record| segment::pages_of(record.bytes))
    }
}

enum What {
    Read { token: OpToken, at: DiskLocation, record: Record, into: Slot },
    MoveRead { append: u64 },
    Data { append: u64 },
    Begin { segment: u32, _header: Option<Pages> },
    Commit { segment: u32 },
    Release { segment: u32, _header: Option<Pages> },
    Offer { segment: u32, buffer: Pages },
    Probe { buffer: Pages, step: u8, wanted: u64, began: Duration },
}

struct Io {
    op: IoOp,
    began: Duration,
    overdue: bool,
    what: What,
}

/// How an operation on the device ended, when it was not resubmitted.
#[derive(Clone, Copy)]
enum End {
    Whole,
    /// A read met the end of the file after so many bytes.
    Cut(usize),
    Errno(i32),
}

struct Commit {
    appends: Vec<u64>,
    touched: BTreeSet<u32>,
    left: usize,
    syncing: bool,
    failed: BTreeMap<u32, StoreError>,
}

enum Room {
    Here,
    Wait,
    None,
}

pub(crate) struct Log {
    config: LogConfig,
    segments: BTreeMap<u32, Segment>,
    free: VecDeque<u32>,
    active: Option<u32>,
    sequence_next: u64,
    order_next: u64,
    generation_newest: u64,
    creating: Option<Header>,
    create_again_at: Duration,
    ios: Table<Io>,
    appends: Table<Append>,
    numbers: u64,
    queue: VecDeque<u64>,
    /// Appends that wait for another one of the same key, and the removals among them.
    blocked: Vec<u64>,
    blocked_removals: BTreeSet<(BlockKey, u64)>,
    /// Writes and moves that have not ended, by key and number.
    storing: BTreeSet<(BlockKey, u64)>,
    ready: VecDeque<u64>,
    commit: Option<Commit>,
    data_in_flight: u64,
    spare_buffer: Vec<Pages>,
    probe_file: bool,
    probes: u64,
    circuit: Circuit,
    stats: SsdStats,
    bytes_written: u64,
    bytes_read: u64,
    closing: bool,
    /// For the engine.
    pub(crate) io: Vec<IoOp>,
    /// For the directory.
    pub(crate) jobs: Vec<Job>,
    /// For the node.
    pub(crate) done: Vec<StoreDone>,
    now: Duration,
}

impl Log {
    /// A log of these segments; `probe_file` says whether [`PROBE_FILE`] is attached.
    pub(crate) fn new(
        config: LogConfig,
        segments: Vec<Segment>,
        sequence_next: u64,
        order_next: u64,
        probe_file: bool,
    ) -> Self {
        let segments: BTreeMap<_, _> = segments.into_iter().map(|one| (one.header.segment, one)).collect();
        let in_state = |state| move |(number, one): (&u32, &Segment)| (one.state == state).then_some(*number);
        let mut log = Self {
            config,
            free: segments.iter().filter_map(in_state(State::Free)).collect(),
            active: segments.iter().find_map(in_state(State::Active)),
            sequence_next,
            order_next,
            generation_newest: segments.values().map(|one| one.header.generation).max().unwrap_or(0),
            segments,
            creating: None,
            create_again_at: Duration::ZERO,
            ios: Table::new(),
            appends: Table::new(),
            numbers: 0,
            queue: VecDeque::new(),
            blocked: Vec::new(),
            blocked_removals: BTreeSet::new(),
            storing: BTreeSet::new(),
            ready: VecDeque::new(),
            commit: None,
            data_in_flight: 0,
            spare_buffer: Vec::new(),
            probe_file,
            probes: 0,
            circuit: Circuit::new(config.circuit),
            stats: SsdStats::default(),
            bytes_written: 0,
            bytes_read: 0,
            closing: false,
            io: Vec::new(),
            jobs: Vec::new(),
            done: Vec::new(),
            now: Duration::ZERO,
        };
        // A free segment of another geometry is made anew when it is needed no less than any other.
        let odd: Vec<_> = log.free.iter().copied().filter(|number| log.is_odd(*number)).collect();
        for number in odd {
            log.free.retain(|one| *one != number);
            log.discard(number);
        }
        log
    }

    /// Takes an operation.
    pub(crate) fn accept(&mut self, now: Duration, op: StoreOp) {
        self.now = now;
        self.numbers += 1;
        let number = self.numbers;
        if let Some(reason) = self.refusal() {
            self.done.push(refuse(op, reason));
            return;
        }
        let append = |token, key, record, kind| Append {
            number,
            token,
            key,
            record,
            kind,
            taken: now,
            answered: false,
            segment: 0,
            index: 0,
            page: 0,
        };
        match op {
            StoreOp::Write { token, record, bytes } => {
                let pages = segment::pages_of(record.bytes);
                let fits = bytes.slot_bytes() as usize >= pages as usize * PAGE_BYTES;
                let refused = if bytes.len() != record.bytes as usize || !fits {
                    Some(StoreError::Corrupt {
                        key: record.key,
                        segment: 0,
                        page: 0,
                        what: "length of its memory",
                    })
                } else if pages > self.config.geometry.data_pages() {
                    let segment_bytes = u64::from(self.config.geometry.data_pages()) * PAGE_BYTES as u64;
                    Some(StoreError::TooLarge { bytes: record.bytes, segment_bytes })
                } else {
                    None
                };
                if let Some(error) = refused {
                    self.done.push(StoreDone::Written { token, bytes, result: Err(error) });
                    return;
                }
                self.storing.insert((record.key, number));
                let one = append(token, record.key, Some(record), AppendKind::Write { bytes });
                let id = self.appends.insert(one);
                self.queue.push_back(id);
            }
            StoreOp::Read { token, at, record, mut into } => {
                let memory = Memory { address: into.as_mut_ptr(), bytes: 0 };
                match self.check_place(at, &record, into.len()) {
                    Ok(()) => self.read(at, &record, memory, What::Read { token, at, record, into }),
                    Err(error) => self.done.push(StoreDone::Read { token, into, result: Err(error) }),
                }
            }
            StoreOp::Move { token, at, record } => {
                let bytes = segment::pages_of(record.bytes) as usize * PAGE_BYTES;
                if let Err(error) = self.check_place(at, &record, bytes) {
                    self.done.push(StoreDone::Moved { token, result: Err(error) });
                    return;
                }
                self.storing.insert((record.key, number));
                let mut buffer = self.buffer(bytes);
                let memory = buffer.memory(0);
                let kind = AppendKind::Move { from: at, buffer };
                let id = self.appends.insert(append(token, record.key, Some(record), kind));
                self.read(at, &record, memory, What::MoveRead { append: id });
            }
            StoreOp::Remove { token, at, key } => {
                let id = self.appends.insert(append(token, key, None, AppendKind::Remove { at }));
                self.queue.push_back(id);
            }
            StoreOp::Release { token, segment } => self.release(token, segment),
        }
    }

    /// Why nothing is taken now.
    fn refusal(&self) -> Option<StoreError> {
        if self.closing { Some(StoreError::Closed) } else { self.circuit.refusal().cloned() }
    }

    /// Whether a block may be read at `at` into `room` bytes.
    fn check_place(&self, at: DiskLocation, record: &Record, room: usize) -> Result<(), StoreError> {
        let (number, page) = (at.segment(), at.page());
        let segment = self.segments.get(&number).filter(|one| {
            matches!(one.state, State::Active | State::Sealed | State::Offering | State::Offered)
                && one.is_at(at)
        });
        let segment = segment.ok_or(StoreError::Stale { segment: number })?;
        let corrupt = |what| Err(StoreError::Corrupt { key: record.key, segment: number, page, what });
        if !segment.header.geometry.holds(page, record.bytes) {
            return corrupt("place");
        }
        if room < segment::pages_of(record.bytes) as usize * PAGE_BYTES {
            return corrupt("length of its slot");
        }
        Ok(())
    }

    fn read(&mut self, at: DiskLocation, record: &Record, memory: Memory, what: What) {
        let bytes = segment::pages_of(record.bytes) * PAGE_BYTES as u32;
        let offset = u64::from(at.page()) * PAGE_BYTES as u64;
        let kind = IoKind::Read { offset, memory: Memory { bytes, ..memory } };
        self.segment(at.segment()).reads += 1;
        self.start(at.segment(), kind, what);
    }

    fn segment(&mut self, number: u32) -> &mut Segment {
        self.segments.get_mut(&number).expect("segments in use are not forgotten")
    }

    fn start(&mut self, segment: u32, kind: IoKind, what: What) {
        let op = IoOp { token: 0, segment, kind };
        let token = self.ios.insert(Io { op, began: self.now, overdue: false, what });
        let io = self.ios.get_mut(token).expect("just inserted");
        io.op.token = token;
        self.io.push(io.op);
        match kind {
            IoKind::Write { memory, .. } => self.stats.device_bytes_written += u64::from(memory.bytes),
            IoKind::Sync => self.stats.syncs += 1,
            IoKind::Read { .. } => {}
        }
    }

    /// Memory for a block on its way from one segment to another.
    fn buffer(&mut self, bytes: usize) -> Pages {
        match self.spare_buffer.iter().position(|pages| pages.len() >= bytes) {
            Some(at) => self.spare_buffer.swap_remove(at),
            None => Pages::new(bytes),
        }
    }

    /// Takes a completion of the engine.
    pub(crate) fn completed(&mut self, now: Duration, done: IoDone) {
        self.now = now;
        let Some(io) = self.ios.get_mut(done.token) else { return };
        let end = match done.result {
            Err(libc::EINTR | libc::EAGAIN) => {
                self.io.push(io.op);
                return;
            }
            Err(errno) => End::Errno(errno),
            Ok(moved) => match &mut io.op.kind {
                IoKind::Sync => End::Whole,
                IoKind::Read { memory, .. } | IoKind::Write { memory, .. } if moved >= memory.bytes => {
                    End::Whole
                }
                // Less than asked for: go on behind the last whole sector.
                IoKind::Read { offset, memory } | IoKind::Write { offset, memory } => {
                    let sectors = moved / 512 * 512;
                    if sectors > 0 {
                        *offset += u64::from(sectors);
                        *memory = memory.skip(sectors);
                        self.io.push(io.op);
                        return;
                    }
                    End::Cut(memory.bytes as usize)
                }
            },
        };
        let io = self.ios.remove(done.token).expect("found above");
        // A read may meet the end of a file that was cut off; a write has nothing to meet.
        let end = match end {
            End::Cut(_) if matches!(io.op.kind, IoKind::Write { .. }) => End::Errno(libc::EIO),
            end => end,
        };
        if io.overdue {
            self.circuit.health.overdue -= 1;
        }
        let in_time = now.saturating_sub(io.began) <= self.config.slow_limit;
        match (end, &io.what) {
            // Probes have their own account.
            (_, What::Probe { .. }) => {}
            (End::Errno(errno), _) => {
                let error = io_error(&io.op, errno);
                self.device_erred(&error);
            }
            _ => self.circuit.worked(in_time),
        }
        self.ended(io, end, in_time);
    }

    fn device_erred(&mut self, error: &StoreError) {
        let before = self.circuit.refusal().is_some();
        self.circuit.erred(self.now, error);
        if !before {
            self.refuse_waiting();
        }
    }

    /// When the circuit has opened, nothing that has not begun goes on waiting.
    fn refuse_waiting(&mut self) {
        let Some(reason) = self.circuit.refusal().cloned() else { return };
        let waiting: Vec<_> = self.queue.drain(..).chain(self.blocked.drain(..)).collect();
        self.blocked_removals.clear();
        for id in waiting {
            self.end_append(id, Err(reason.clone()));
        }
    }

    fn ended(&mut self, io: Io, end: End, in_time: bool) {
        let Io { op, what, began, .. } = io;
        let failure = match end {
            End::Whole | End::Cut(_) => None,
            End::Errno(errno) => Some(io_error(&op, errno)),
        };
        match what {
            What::Read { token, at, record, into } => {
                let result = match (failure, end) {
                    (Some(error), _) => Err(error),
                    (None, End::Cut(_)) => Err(corrupt(at, &record, "end of file")),
                    _ => check(at, &record, &into),
                };
                self.read_ended(at, &record, &result);
                self.done.push(StoreDone::Read { token, into, result });
            }
            What::MoveRead { append } => {
                let one = self.appends.get(append).expect("a move ends after its read");
                let AppendKind::Move { from, buffer } = &one.kind else { unreachable!("a move's read") };
                let (at, record) = (*from, one.record.expect("a move stores"));
                let result = match (failure, end) {
                    (Some(error), _) => Err(error),
                    (None, End::Cut(_)) => Err(corrupt(at, &record, "end of file")),
                    _ => check(at, &record, buffer),
                };
                self.read_ended(at, &record, &result);
                match result.and_then(|()| self.circuit.refusal().cloned().map_or(Ok(()), Err)) {
                    Ok(()) => self.queue.push_back(append),
                    Err(error) => self.end_append(append, Err(error)),
                }
            }
            What::Data { append } => {
                let one = self.appends.get(append).expect("an append ends after its data");
                self.data_in_flight -= u64::from(one.pages()) * PAGE_BYTES as u64;
                match failure {
                    None => self.ready.push_back(append),
                    Some(error) => self.end_append(append, Err(error)),
                }
            }
            What::Begin { segment, .. } => self.life_advanced(segment, &op, failure),
            What::Commit { segment } => {
                let commit = self.commit.as_mut().expect("a commit's operations end before it");
                if let Some(error) = failure {
                    commit.failed.insert(segment, error);
                }
                commit.left -= 1;
                if commit.left == 0 {
                    self.commit_advanced();
                }
            }
            What::Release { segment, .. } => self.release_advanced(segment, &op, failure),
            What::Offer { segment, mut buffer } => {
                if let End::Cut(missing) = end {
                    let length = self.segment(segment).header.geometry.index_bytes();
                    buffer[length - missing..].fill(0);
                }
                self.offered(segment, failure.is_some(), &buffer);
            }
            What::Probe { buffer, step, wanted, began: probe_began } => {
                let whole = matches!(end, End::Whole)
                    && in_time
                    && began.saturating_sub(probe_began) <= self.config.slow_limit;
                self.probe_advanced(buffer, step, wanted, probe_began, whole);
            }
        }
    }

    fn read_ended(&mut self, at: DiskLocation, record: &Record, result: &Result<(), StoreError>) {
        match result {
            Ok(()) => self.bytes_read += u64::from(record.bytes),
            Err(StoreError::Corrupt { .. }) => self.circuit.health.corrupt += 1,
            Err(_) => {}
        }
        self.segment(at.segment()).reads -= 1;
        self.try_release(at.segment());
    }

    /// Does everything that can be done now.
    pub(crate) fn advance(&mut self, now: Duration) {
        self.now = now;
        self.watch();
        if self.circuit.probe_due(now) {
            self.probe();
        }
        self.place();
        if self.commit.is_none() {
            self.begin_commit();
        }
        if self.refusal().is_none() {
            self.offer();
            self.want_segment();
        }
    }

    // ---- appending ----

    fn place(&mut self) {
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
    fn must_wait(&self, one: &Append) -> bool {
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
    fn makeable(&self) -> usize {
        if self.now < self.create_again_at {
            return 0;
        }
        (self.config.segments_max as usize).saturating_sub(self.segments.len())
    }

    /// Segments that are free, or can be.
    fn spare(&self) -> usize {
        self.free.len() + self.makeable()
    }

    /// Segments with the node.
    fn offered_count(&self) -> usize {
        let with_node =
            |one: &&Segment| matches!(one.state, State::Offering | State::Offered | State::Releasing);
        self.segments.values().filter(with_node).count()
    }

    fn room(&mut self, pages: u32, is_write: bool) -> Room {
        let owed = if is_write { self.offered_count().max(1) } else { 0 };
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
        segment.state = State::Active;
        let mut header = header_page(&segment.header);
        let memory = header.memory(PAGE_BYTES);
        let what = What::Begin { segment: next, _header: Some(header) };
        self.start(next, IoKind::Write { offset: 0, memory }, what);
        self.active = Some(next);
        Room::Here
    }

    /// The header of a new life was written, or synced, or neither.
    fn life_advanced(&mut self, number: u32, op: &IoOp, failure: Option<StoreError>) {
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

    fn seal(&mut self) {
        if let Some(active) = self.active.take() {
            let segment = self.segment(active);
            segment.state = State::Sealed;
            if segment.pending == 0 {
                segment.images.clear();
            }
        }
    }

    fn place_one(&mut self, id: u64, pages: u32) {
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
        self.data_in_flight += u64::from(bytes);
        let offset = u64::from(page) * PAGE_BYTES as u64;
        self.start(
            number,
            IoKind::Write { offset, memory: Memory { address, bytes } },
            What::Data { append: id },
        );
    }

    fn begin_commit(&mut self) {
        let mut commit = Commit {
            appends: Vec::new(),
            touched: BTreeSet::new(),
            left: 0,
            syncing: false,
            failed: BTreeMap::new(),
        };
        let mut pages = BTreeSet::new();
        let mut not_begun = VecDeque::new();
        while commit.appends.len() < COMMIT_MAX
            && let Some(id) = self.ready.pop_front()
        {
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
                not_begun.push_back(id);
                continue;
            }
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
            pages.insert((number, index / ENTRIES_PER_PAGE));
            commit.touched.insert(number);
            commit.appends.push(id);
        }
        not_begun.append(&mut self.ready);
        self.ready = not_begun;
        if commit.appends.is_empty() {
            return;
        }
        commit.left = pages.len();
        let mut writes = Vec::new();
        for (number, page) in pages {
            let image = self.segment(number).images.get_mut(&page).expect("entries were put there");
            let memory = image.page.memory(PAGE_BYTES);
            let offset = u64::from(1 + page) * PAGE_BYTES as u64;
            writes.push((number, IoKind::Write { offset, memory }));
        }
        self.stats.commits += 1;
        self.stats.commit_entries += commit.appends.len() as u64;
        self.commit = Some(commit);
        for (segment, kind) in writes {
            self.start(segment, kind, What::Commit { segment });
        }
    }

    /// All operations of the commit's present step have ended.
    fn commit_advanced(&mut self) {
        let commit = self.commit.as_mut().expect("called for it");
        if !commit.syncing && self.config.sync == SyncMode::Always {
            commit.syncing = true;
            let failed = &commit.failed;
            let touched: Vec<_> =
                commit.touched.iter().copied().filter(|one| !failed.contains_key(one)).collect();
            commit.left = touched.len();
            if !touched.is_empty() {
                for segment in touched {
                    self.start(segment, IoKind::Sync, What::Commit { segment });
                }
                return;
            }
        }
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
    fn end_append(&mut self, id: u64, result: Result<Option<DiskLocation>, StoreError>) {
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

    fn settle_place(&mut self, one: &Append, stored: bool) {
        let segment = self.segment(one.segment);
        segment.pending -= 1;
        segment.settle_image(one.index);
        if stored && one.record.is_some() {
            segment.blocks += 1;
            // The node was told that this one failed, so it will never ask for it.
            segment.live += u32::from(!one.answered);
        }
    }

    fn died(&mut self, at: DiskLocation) {
        if let Some(segment) = self.segments.get_mut(&at.segment()).filter(|one| one.is_at(at)) {
            segment.live = segment.live.saturating_sub(1);
        }
    }

    // ---- segments come and go ----

    fn want_segment(&mut self) {
        if self.creating.is_some() || !self.free.is_empty() || self.makeable() == 0 {
            return;
        }
        let number =
            (0..).find(|number| !self.segments.contains_key(number)).expect("fewer segments than numbers");
        self.generation_newest += 1;
        self.create(number, self.generation_newest);
    }

    fn create(&mut self, segment: u32, generation: u64) {
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
                self.segments.insert(header.segment, Segment::new(*header, State::Free));
                self.free.push_back(header.segment);
            }
            Err(errno) => {
                self.stats.segments_refused += 1;
                self.create_again_at = now + CREATE_RETRY;
                let error = StoreError::Io { operation: "allocate", segment: header.segment, errno };
                if errno == libc::ENOSPC || errno == libc::EDQUOT {
                    // Not the device's fault: go on with what there is.
                    self.circuit.health.last_error = Some(error);
                } else {
                    self.device_erred(&error);
                }
            }
        }
    }

    fn is_odd(&self, number: u32) -> bool {
        let segment = &self.segments[&number];
        segment.cut || segment.header.geometry != self.config.geometry
    }

    /// Gives up a free segment's file, which is of no use any more; another is made when one is wanted.
    fn discard(&mut self, number: u32) {
        self.segments.remove(&number);
        self.jobs.push(Job::Delete(number));
    }

    fn offer(&mut self) {
        let low = (self.config.segments_max as usize / 16).clamp(1, 8);
        loop {
            let offered = self.offered_count();
            let excess = self.segments.len() > self.config.segments_max as usize;
            let wanted = self.spare() + offered <= low || (excess && offered == 0);
            if !wanted || offered >= OFFERED_MAX.min(self.spare().max(1)) {
                return;
            }
            if excess && self.free.len() > 1 {
                let number = self.free.pop_back().expect("more than one");
                self.discard(number);
                continue;
            }
            let emptiest =
                self.segments.iter().filter(|(_, one)| one.state == State::Sealed && one.pending == 0);
            let victim = emptiest.min_by_key(|(_, one)| (one.live * 8 / one.blocks.max(1), one.header.order));
            let Some((number, segment)) = victim.map(|(number, one)| (*number, one)) else { return };
            let length = segment.header.geometry.index_bytes();
            let mut buffer = Pages::new(length);
            let memory = buffer.memory(length);
            self.segment(number).state = State::Offering;
            let kind = IoKind::Read { offset: PAGE_BYTES as u64, memory };
            self.start(number, kind, What::Offer { segment: number, buffer });
        }
    }

    /// The index of a segment to be offered was read.
    fn offered(&mut self, number: u32, failed: bool, index: &[u8]) {
        let segment = self.segment(number);
        if failed {
            segment.offer_tries += 1;
            segment.state = if segment.offer_tries < OFFER_TRIES { State::Sealed } else { State::Lost };
            return;
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
        segment.state = State::Offered;
        self.done.push(StoreDone::Reclaim { segment: number, entries });
    }

    fn release(&mut self, token: OpToken, number: u32) {
        let segment = self.segments.get_mut(&number).filter(|one| one.state == State::Offered);
        let Some(segment) = segment else {
            self.done.push(StoreDone::Released { token, result: Err(StoreError::Stale { segment: number }) });
            return;
        };
        segment.state = State::Releasing;
        segment.release = Some(token);
        let (order, removals) = (segment.header.order, std::mem::take(&mut segment.removals));
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

    fn carried(&mut self, number: u32, result: Result<(), StoreError>) {
        self.segment(number).carry_left -= 1;
        match result {
            Ok(()) => self.try_release(number),
            Err(error) => self.release_ended(number, Err(error)),
        }
    }

    /// Begins the durable end of a released segment's life as soon as nobody reads it any more.
    fn try_release(&mut self, number: u32) {
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

    fn release_advanced(&mut self, number: u32, op: &IoOp, failure: Option<StoreError>) {
        if let Some(error) = failure {
            self.release_ended(number, Err(error));
        } else if !matches!(op.kind, IoKind::Sync) {
            self.start(number, IoKind::Sync, What::Release { segment: number, _header: None });
        } else {
            self.release_ended(number, Ok(()));
        }
    }

    fn release_ended(&mut self, number: u32, result: Result<(), StoreError>) {
        let segment = self.segment(number);
        let Some(token) = segment.release.take() else { return };
        segment.release_begun = false;
        match &result {
            // The node may ask again. What was carried already is carried twice then, which does no harm.
            Err(_) => segment.state = State::Offered,
            Ok(()) => {
                let header = Header { generation: segment.header.generation + 1, order: 0, ..segment.header };
                let cut = segment.cut;
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

    // ---- time ----

    /// Looks for operations over the time limit.
    fn watch(&mut self) {
        let (now, limit) = (self.now, self.config.slow_limit);
        let was_open = self.circuit.refusal().is_some();
        for io in self.ios.values_mut() {
            if !io.overdue && now.saturating_sub(io.began) > limit && !matches!(io.what, What::Probe { .. }) {
                io.overdue = true;
                self.circuit.health.overdue += 1;
                self.circuit.slow(now, limit);
            }
        }
        for one in self.appends.values_mut() {
            if one.answered || now.saturating_sub(one.taken) <= limit {
                continue;
            }
            let result = || Err(StoreError::Slow { limit });
            let token = one.token;
            // Its memory stays with us until the device gives it back; the node gets another hold on it.
            let done = match &one.kind {
                AppendKind::Write { bytes } => {
                    StoreDone::Written { token, bytes: bytes.clone(), result: result() }
                }
                AppendKind::Move { .. } => StoreDone::Moved { token, result: result() },
                AppendKind::Remove { .. } => {
                    StoreDone::Removed { token, result: Err(StoreError::Slow { limit }) }
                }
                AppendKind::Carry { .. } => continue,
            };
            one.answered = true;
            self.done.push(done);
        }
        if !was_open {
            self.refuse_waiting();
        }
    }

    /// How long nothing needs to be looked at, if nothing happens.
    pub(crate) fn quiet_for(&self, now: Duration) -> Duration {
        let mut wait = Duration::MAX;
        if self.ios.len() + self.appends.len() > 0 {
            wait = (self.config.slow_limit / 4).clamp(Duration::from_millis(1), Duration::from_secs(1));
        }
        if let Some(probe) = self.circuit.next_probe() {
            wait = wait.min(probe.saturating_sub(now).max(Duration::from_millis(1)));
        }
        wait
    }

    fn probe(&mut self) {
        if !self.probe_file {
            self.circuit.probed(self.now, true);
            return;
        }
        self.probes += 1;
        let wanted = self.probes ^ self.now.as_nanos() as u64;
        let mut buffer = Pages::new(PAGE_BYTES);
        buffer[..8].copy_from_slice(&wanted.to_le_bytes());
        self.probe_step(buffer, 0, wanted, self.now);
    }

    /// Write, sync, read, compare.
    fn probe_step(&mut self, mut buffer: Pages, step: u8, wanted: u64, began: Duration) {
        let memory = buffer.memory(PAGE_BYTES);
        let kind = match step {
            0 => IoKind::Write { offset: PROBE_OFFSET, memory },
            1 => IoKind::Sync,
            _ => IoKind::Read { offset: PROBE_OFFSET, memory },
        };
        self.start(PROBE_FILE, kind, What::Probe { buffer, step, wanted, began });
    }

    fn probe_advanced(&mut self, mut buffer: Pages, step: u8, wanted: u64, began: Duration, whole: bool) {
        if whole && step < 2 {
            if step == 1 {
                buffer.fill(0);
            }
            self.probe_step(buffer, step + 1, wanted, began);
        } else {
            self.circuit.probed(self.now, whole && buffer[..8] == wanted.to_le_bytes());
        }
    }

    // ---- to be asked ----

    /// Takes nothing new; what has not begun is refused.
    pub(crate) fn close(&mut self) {
        self.closing = true;
        let waiting: Vec<_> = self.queue.drain(..).chain(self.blocked.drain(..)).collect();
        self.blocked_removals.clear();
        for id in waiting {
            self.end_append(id, Err(StoreError::Closed));
        }
    }

    /// Whether the device has nothing of ours.
    pub(crate) fn is_idle(&self) -> bool {
        self.ios.len() == 0 && self.appends.len() == 0
    }

    pub(crate) fn usage(&self) -> StoreUsage {
        let in_use = self.segments.values().filter(|one| one.state != State::Free);
        StoreUsage {
            bytes_max: u64::from(self.config.segments_max) * self.config.geometry.segment_bytes(),
            bytes_used: in_use.map(|one| one.header.geometry.segment_bytes()).sum(),
            bytes_written: self.bytes_written,
            bytes_read: self.bytes_read,
            in_flight: 0,
            in_flight_max: self.config.in_flight_max,
        }
    }

    pub(crate) fn stats(&self) -> SsdStats {
        SsdStats {
            segments: self.segments.len() as u32,
            segments_free: self.free.len() as u32,
            segments_lost: self.segments.values().filter(|one| one.state == State::Lost).count() as u32,
            ..self.stats
        }
    }

    pub(crate) fn circuit(&mut self) -> &mut Circuit {
        &mut self.circuit
    }
}

fn put_entry(segment: &mut Segment, index: u32, bytes: &[u8; ENTRY_BYTES]) {
    let image = segment.images.entry(index / ENTRIES_PER_PAGE).or_insert_with(Image::fresh);
    let at = (index % ENTRIES_PER_PAGE) as usize * ENTRY_BYTES;
    image.page[at..at + ENTRY_BYTES].copy_from_slice(bytes);
}

fn header_page(header: &Header) -> Pages {
    let mut page = Pages::new(PAGE_BYTES);
    let bytes = header.encode();
    page[..bytes.len()].copy_from_slice(&bytes);
    page
}

fn corrupt(at: DiskLocation, record: &Record, what: &'static str) -> StoreError {
    StoreError::Corrupt { key: record.key, segment: at.segment(), page: at.page(), what }
}

/// Whether `bytes` begins with the block of `record`.
fn check(at: DiskLocation, record: &Record, bytes: &[u8]) -> Result<(), StoreError> {
    let right = record.checksum.matches(&record.key, &bytes[..record.bytes as usize]);
    if right { Ok(()) } else { Err(corrupt(at, record, "checksum")) }
}

fn io_error(op: &IoOp, errno: i32) -> StoreError {
    let operation = match op.kind {
        IoKind::Read { .. } => "read",
        IoKind::Write { .. } => "write",
        IoKind::Sync => "sync",
    };
    StoreError::Io { operation, segment: op.segment, errno }
}

/// The end of an operation that was not begun.
pub(crate) fn refuse(op: StoreOp, reason: StoreError) -> StoreDone {
    match op {
        StoreOp::Write { token, bytes, .. } => StoreDone::Written { token, bytes, result: Err(reason) },
        StoreOp::Read { token, into, .. } => StoreDone::Read { token, into, result: Err(reason) },
        StoreOp::Move { token, .. } => StoreDone::Moved { token, result: Err(reason) },
        StoreOp::Remove { token, .. } => StoreDone::Removed { token, result: Err(reason) },
        StoreOp::Release { token, .. } => StoreDone::Released { token, result: Err(reason) },
    }
}
