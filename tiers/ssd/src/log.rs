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
//!  completions <-- fdatasync of the files touched <-- index pages <-- fdatasync of moved data
//! ```
//! - **A life begins with its header.** The header that gives a segment its place in the log is durable
//!   before any entry of that life is written, so nothing that a crash left behind is taken for it later.
//! - **Group commit.** While one commit is under way, data writes go on and what is done becomes ready; the
//!   next commit takes all of it. An entry reaches the index only after its data were written.
//! - **Order.** Entries get their sequence at commit. A removal waits for operations on the same key that
//!   came before it, and holds up those that came after it, so it takes effect where it was submitted.
//! - **Room.** Writes leave one free segment for each one offered to the node, and one at any time, so the
//!   moves that empty a segment always find room.
//! - **Removals outlive what they remove.** They are forgotten with their segment only when no older life is
//!   left that might hold the block; else they are carried to the end of the log first.

mod append;
mod reclaim;
mod watch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use kv_arena::{Held, Slot};
use kv_block::{BlockKey, DiskLocation, Record};
use kv_tiers::store::{OpToken, StoreDone, StoreError, StoreOp, StoreUsage};

use crate::health::{Circuit, CircuitLimits};
use crate::io::{IoDone, IoKind, IoOp, Memory, Pages, Table};
use crate::segment::{self, ENTRIES_PER_PAGE, Geometry, Header, PAGE_BYTES, StoreId};

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
    /// Pages of it that were written again elsewhere.
    pages_moved: u32,
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
            pages_moved: 0,
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

/// What a commit is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Step {
    /// Makes the data of moves durable before their entries are written: until the old copy is released,
    /// a power cut must find one or the other, and not an entry that hides the old copy and has no data.
    #[default]
    Data,
    /// Writes index pages.
    Index,
    /// Makes data and index durable.
    Sync,
}

#[derive(Default)]
struct Commit {
    step: Step,
    appends: Vec<u64>,
    /// Segments with entries in it, and those of them with moves.
    touched: BTreeSet<u32>,
    moved_into: BTreeSet<u32>,
    /// Index pages to be written.
    pages: BTreeSet<(u32, u32)>,
    /// Operations of this step that have not ended.
    left: usize,
    failed: BTreeMap<u32, StoreError>,
}

/// Segments by state, counted as they change: there are thousands, and every operation asks.
#[derive(Default)]
struct Census {
    /// Offered, or about to be, or being released.
    with_node: usize,
    lost: u32,
    bytes_in_use: u64,
}

impl Census {
    fn count(&mut self, segment: &Segment, add: bool) {
        let step = |count: &mut u64, by: u64| *count = if add { *count + by } else { *count - by };
        let (mut with_node, mut lost) = (self.with_node as u64, u64::from(self.lost));
        match segment.state {
            State::Free => return,
            State::Offering | State::Offered | State::Releasing => step(&mut with_node, 1),
            State::Lost => step(&mut lost, 1),
            State::Active | State::Sealed => {}
        }
        (self.with_node, self.lost) = (with_node as usize, lost as u32);
        step(&mut self.bytes_in_use, segment.header.geometry.segment_bytes());
    }
}

enum Room {
    Here,
    Wait,
    None,
}

pub(crate) struct Log {
    config: LogConfig,
    segments: BTreeMap<u32, Segment>,
    census: Census,
    free: VecDeque<u32>,
    active: Option<u32>,
    sequence_next: u64,
    order_next: u64,
    generation_newest: u64,
    creating: Option<Header>,
    create_again_at: Duration,
    /// The file system had no room for the last segment that was wanted.
    refused: bool,
    offer_again_at: Duration,
    /// Releases in a row that won no room.
    released_in_vain: usize,
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
    /// Data writes with the device, and their bytes.
    data_writes: usize,
    data_in_flight: u64,
    spare_buffer: Vec<Pages>,
    probe_file: bool,
    probes: u64,
    circuit: Circuit,
    stats: SsdStats,
    bytes_written: u64,
    bytes_read: u64,
    closing: bool,
    /// When the time limits are looked at next.
    watch_at: Duration,
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
        let mut census = Census::default();
        segments.values().for_each(|one| census.count(one, true));
        let mut log = Self {
            config,
            census,
            free: segments.iter().filter_map(in_state(State::Free)).collect(),
            active: segments.iter().find_map(in_state(State::Active)),
            sequence_next,
            order_next,
            generation_newest: segments.values().map(|one| one.header.generation).max().unwrap_or(0),
            segments,
            creating: None,
            create_again_at: Duration::ZERO,
            refused: false,
            offer_again_at: Duration::ZERO,
            released_in_vain: 0,
            ios: Table::new(),
            appends: Table::new(),
            numbers: 0,
            queue: VecDeque::new(),
            blocked: Vec::new(),
            blocked_removals: BTreeSet::new(),
            storing: BTreeSet::new(),
            ready: VecDeque::new(),
            commit: None,
            data_writes: 0,
            data_in_flight: 0,
            spare_buffer: Vec::new(),
            probe_file,
            probes: 0,
            circuit: Circuit::new(config.circuit),
            stats: SsdStats::default(),
            bytes_written: 0,
            bytes_read: 0,
            closing: false,
            watch_at: Duration::ZERO,
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

    fn set_state(&mut self, number: u32, state: State) {
        let segment = self.segments.get_mut(&number).expect("segments in use are not forgotten");
        self.census.count(segment, false);
        segment.state = state;
        self.census.count(segment, true);
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
                self.data_writes -= 1;
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
        if now >= self.watch_at {
            self.watch_at = now + self.config.slow_limit / 16;
            self.watch();
        }
        if self.circuit.probe_due(now) {
            self.probe();
        }
        self.place();
        // What is being written will be ready soon: a commit is worth more when it does not come for one
        // block alone. When as much is ready as is not, nobody waits for a straggler.
        if self.commit.is_none() && self.ready.len() >= self.data_writes {
            self.begin_commit();
        }
        if self.refusal().is_none() {
            self.offer();
            self.want_segment();
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
        StoreUsage {
            bytes_max: self.room_bytes(),
            bytes_used: self.census.bytes_in_use,
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
            segments_lost: self.census.lost,
            ..self.stats
        }
    }

    pub(crate) fn circuit(&mut self) -> &mut Circuit {
        &mut self.circuit
    }
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
