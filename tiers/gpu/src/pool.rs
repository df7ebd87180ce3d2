//! Spare memory of a device as a tier: a log of blocks, for those that somebody wants again soon.
//!
//! ```text
//!   Held --onboard--> | block | block | ..... |        | block | block |        | kept for moves |
//!                     '--- segment, open -----'        '--- segment ---'
//!                         |       |                        |
//!   Slot <---offload------+       +--copy--> a worker's pages, by a place     Move: copy, to the end of the log
//! ```
//! It keeps the whole contract of a [`BlockStore`] but one word: nothing is there after a restart. Its memory is
//! taken from the device when it is opened, in segments; when the device has less, it goes on with fewer.
//!
//! What is read to host memory is compared with its record there, bytes and all. What is copied on the device, by a
//! move or from a place, is compared by its record alone: no processor sees its bytes. Whoever reads it later does.
//!
//! A segment is used again when the device is done with all that was under way in it, whoever asked for that. A copy of
//! which the device never says that it is done keeps its segment for ever. On a device that is lost every operation
//! fails from then on; a read that was under way keeps its slot, and [`Pool::take_lost`] says which ended so.

mod log;
mod place;

use std::time::{Duration, Instant};

use kv_arena::{Held, Slot};
use kv_block::{DiskLocation, Record};
use kv_tiers::store::{BlockStore, OpToken, StoreDone, StoreError, StoreOp, StoreUsage};

pub use place::{Place, Reserved};

use self::log::{For, Hold, Log, PAGE_BYTES, SEGMENTS_MIN, Spot, corrupt};
use crate::Error;
use crate::copy::{Copying, PageCopy};
use crate::device::Device;
use crate::memory::DeviceMemory;
use crate::stream::{Priority, Stream, until};

/// How large a pool is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PoolConfig {
    /// Bytes of the device that it may have; rounded down to whole segments.
    pub bytes_max: u64,
    /// Bytes of the device that it leaves free for others when it is opened.
    pub leave_bytes: u64,
    /// Length of a segment in bytes; rounded up to 4 KiB, and no block is longer.
    pub segment_bytes: u64,
    /// Operations taken at once at most.
    pub in_flight_max: u32,
    /// How long an operation may take before it counts as slow. A write or a move ends then, with
    /// [`StoreError::Slow`]; a read ends when the device gives its slot back.
    pub slow_limit: Duration,
}

impl PoolConfig {
    /// At most so many bytes, and defaults for the rest: segments of 64 MiB, 64 operations, 1 GiB left to others.
    pub fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            leave_bytes: 1 << 30,
            segment_bytes: 64 << 20,
            in_flight_max: 64,
            slow_limit: Duration::from_secs(2),
        }
    }
}

/// An operation that the device has.
struct Work {
    token: OpToken,
    record: Record,
    began: Instant,
    kind: Kind,
    /// Its submitter was told that it is slow, and hears no more of it.
    answered: bool,
}

enum Kind {
    /// With a hold on the bytes for the answer, should the device keep its own.
    Write {
        spot: Spot,
        copying: Copying<Held>,
        bytes: Held,
    },
    Move {
        spot: Spot,
        copying: Copying<()>,
        _from: Hold,
    },
    Read {
        at: DiskLocation,
        copying: Copying<Slot>,
        _from: Hold,
    },
}

/// A pool of blocks in device memory. See the module. Dropped, it waits for the copies that are under way, five slow
/// limits long; what is not done then is kept for ever.
pub struct Pool {
    works: Vec<Work>,
    /// What the device does not have yet, and what was never given to it.
    batch: Vec<StoreOp>,
    ready: Vec<StoreDone>,
    /// Reads whose slot a lost device keeps.
    lost_reads: Vec<OpToken>,
    log: Log,
    /// By segment.
    memory: Vec<DeviceMemory>,
    reads: Stream,
    writes: Stream,
    in_flight_max: u32,
    slow_limit: Duration,
    bytes_written: u64,
    bytes_read: u64,
}

/// Where in its segment a block lies, in bytes.
fn offset(at: DiskLocation) -> u64 {
    u64::from(at.page()) * u64::from(PAGE_BYTES)
}

/// How much of a segment a block takes.
pub(crate) fn footprint(bytes: u32) -> u64 {
    u64::from(bytes.div_ceil(PAGE_BYTES).max(1)) * u64::from(PAGE_BYTES)
}

/// What a device's error is to the node.
fn failed(operation: &'static str, segment: u32, error: &Error) -> StoreError {
    match error {
        Error::Full { .. } => StoreError::Full,
        _ => StoreError::Io { operation, segment, errno: rustix::io::Errno::IO.raw_os_error() },
    }
}

impl Pool {
    /// A pool on a device, empty. [`Error::Full`] when the device has no room for four segments.
    pub fn open(device: &Device, config: &PoolConfig) -> Result<Self, Error> {
        let page = u64::from(PAGE_BYTES);
        let pages_max = u64::from(DiskLocation::PAGE_MAX);
        let segment_pages = config.segment_bytes.div_ceil(page).clamp(1, pages_max);
        let segment_bytes = segment_pages * page;
        let wanted = (config.bytes_max / segment_bytes).min(u64::from(DiskLocation::SEGMENT_MAX));
        let mut memory = Vec::new();
        for _ in 0..wanted {
            if device.free_bytes()? < segment_bytes.saturating_add(config.leave_bytes) {
                break;
            }
            match device.allocate(segment_bytes) {
                Ok(segment) => memory.push(segment),
                Err(Error::Full { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        if memory.len() < SEGMENTS_MIN {
            let bytes = SEGMENTS_MIN as u64 * segment_bytes;
            return Err(Error::Full { device: device.facts().ordinal, bytes });
        }
        Ok(Self {
            works: Vec::new(),
            batch: Vec::new(),
            ready: Vec::new(),
            lost_reads: Vec::new(),
            log: Log::new(memory.len(), segment_pages as u32),
            memory,
            reads: device.stream(Priority::High)?,
            writes: device.stream(Priority::Low)?,
            in_flight_max: config.in_flight_max.max(1),
            slow_limit: config.slow_limit,
            bytes_written: 0,
            bytes_read: 0,
        })
    }

    /// Whose memory it is.
    pub fn device(&self) -> &Device {
        self.reads.device()
    }

    /// Longest block that it takes, in bytes.
    pub fn segment_bytes(&self) -> u64 {
        self.log.segment_bytes()
    }

    /// Where a block lies, for a copy on the device.
    pub fn place(&self, at: DiskLocation, record: &Record) -> Result<Place, StoreError> {
        let hold = self.log.find(at, record)?;
        let memory = self.memory[at.segment() as usize].clone();
        Ok(Place { memory, offset: offset(at), bytes: record.bytes, _hold: hold })
    }

    /// Room for a block that is already on a device: copied there, and then made a block by [`Pool::seal`].
    pub fn reserve(&mut self, bytes: u32) -> Result<Reserved, StoreError> {
        let spot = self.log.append(bytes, For::Write)?;
        let memory = self.memory[spot.at.segment() as usize].clone();
        Ok(Reserved { spot, memory })
    }

    /// Makes what was copied to a place a block, when the device is done with the copy. Its length must be what was
    /// reserved.
    pub fn seal(&mut self, reserved: Reserved, record: Record) -> Result<DiskLocation, StoreError> {
        let Reserved { spot, .. } = reserved;
        if spot.bytes != record.bytes {
            return Err(corrupt(&record, spot.at, "length"));
        }
        let at = self.log.written(&spot, record)?;
        self.bytes_written += u64::from(record.bytes);
        Ok(at)
    }

    /// Reads that ended because the device was lost, since this was called last. Their slots stay with the device until
    /// its context is gone, so they have no completion.
    pub fn take_lost(&mut self) -> Vec<OpToken> {
        std::mem::take(&mut self.lost_reads)
    }

    /// Gives an operation to the device, or answers it.
    fn start(&mut self, op: StoreOp) {
        match op {
            StoreOp::Write { token, record, bytes } => self.start_write(token, record, bytes),
            StoreOp::Read { token, at, record, into } => self.start_read(token, at, record, into),
            StoreOp::Move { token, at, record } => match self.start_move(at, &record) {
                Ok(kind) => self.began(token, record, kind),
                Err(error) => self.ready.push(StoreDone::Moved { token, result: Err(error) }),
            },
            // What nobody names any more is gone: after a restart nothing is there.
            StoreOp::Remove { token, .. } => self.ready.push(StoreDone::Removed { token, result: Ok(()) }),
            StoreOp::Release { token, segment } => {
                let result = self.log.release(segment);
                self.ready.push(StoreDone::Released { token, result });
            }
        }
    }

    fn began(&mut self, token: OpToken, record: Record, kind: Kind) {
        self.works.push(Work { token, record, began: now(), kind, answered: false });
    }

    fn start_write(&mut self, token: OpToken, record: Record, bytes: Held) {
        let spot = match self.log.append(record.bytes, For::Write) {
            Ok(spot) => spot,
            Err(error) => {
                self.ready.push(StoreDone::Written { token, bytes, result: Err(error) });
                return;
            }
        };
        let (segment, ours) = (spot.at.segment(), bytes.clone());
        let begun =
            self.writes.onboard(&self.memory[segment as usize], vec![bytes], &[page(spot.at, &record)]);
        match begun {
            Ok(copying) => self.began(token, record, Kind::Write { spot, copying, bytes: ours }),
            Err(refused) => {
                if refused.hosts.is_none() {
                    // It may still be written at any time, so it is nobody else's ever.
                    std::mem::forget(spot);
                }
                let result = Err(failed("write", segment, &refused.error));
                drop(refused);
                self.ready.push(StoreDone::Written { token, bytes: ours, result });
            }
        }
    }

    fn start_read(&mut self, token: OpToken, at: DiskLocation, record: Record, into: Slot) {
        let from = match self.log.find(at, &record) {
            Ok(from) => from,
            Err(error) => {
                self.ready.push(StoreDone::Read { token, into, result: Err(error) });
                return;
            }
        };
        let memory = &self.memory[at.segment() as usize];
        match self.reads.offload(memory, vec![into], &[page(at, &record)]) {
            Ok(copying) => self.began(token, record, Kind::Read { at, copying, _from: from }),
            Err(mut refused) => match refused.hosts.take().and_then(|mut slots| slots.pop()) {
                Some(into) => {
                    let result = Err(failed("read", at.segment(), &refused.error));
                    self.ready.push(StoreDone::Read { token, into, result });
                }
                None => self.lost_reads.push(token),
            },
        }
    }

    fn start_move(&mut self, at: DiskLocation, record: &Record) -> Result<Kind, StoreError> {
        let from = self.log.find(at, record)?;
        let spot = self.log.append(record.bytes, For::Move)?;
        let (source, target) =
            (&self.memory[at.segment() as usize], &self.memory[spot.at.segment() as usize]);
        let (to, bytes) = ((target, offset(spot.at)), u64::from(record.bytes));
        match self.writes.copy(to, (source, offset(at)), bytes) {
            Ok(copying) => Ok(Kind::Move { spot, copying, _from: from }),
            Err(error) => {
                let result = failed("write", spot.at.segment(), &error);
                if !matches!(self.writes.is_idle(), Ok(true)) {
                    // As above: it may be under way.
                    std::mem::forget((spot, from));
                }
                Err(result)
            }
        }
    }

    /// Looks at one operation that the device has; it comes back while the device is at it.
    fn look(&mut self, mut work: Work, now: Instant) -> Option<Work> {
        let Some(ended) = work.kind.poll() else {
            if !work.answered && now.saturating_duration_since(work.began) > self.slow_limit {
                self.answer_slow(&mut work);
            }
            return Some(work);
        };
        let Work { token, record, kind, answered, .. } = work;
        let done = match kind {
            Kind::Write { spot, copying, bytes } => {
                // With it goes the device's hold on the bytes.
                drop(copying);
                let result = self.settled(&ended, answered, &spot, record);
                StoreDone::Written { token, bytes, result }
            }
            Kind::Move { spot, .. } => {
                StoreDone::Moved { token, result: self.settled(&ended, answered, &spot, record) }
            }
            Kind::Read { at, .. } => {
                let Ok(Some(into)) = ended else {
                    self.lost_reads.push(token);
                    return None;
                };
                let is_right = record.checksum.matches(&record.key, &into[..record.bytes as usize]);
                let result = if is_right { Ok(()) } else { Err(corrupt(&record, at, "checksum")) };
                self.bytes_read += result.as_ref().map_or(0, |()| u64::from(record.bytes));
                StoreDone::Read { token, into, result }
            }
        };
        if !answered {
            self.ready.push(done);
        }
        None
    }

    /// The end of a write or a move. One that nobody waits for any more is dead space.
    fn settled(
        &mut self,
        ended: &Result<Option<Slot>, Error>,
        answered: bool,
        spot: &Spot,
        record: Record,
    ) -> Result<DiskLocation, StoreError> {
        if let Err(error) = ended {
            return Err(failed("write", spot.at.segment(), error));
        }
        if answered {
            return Ok(spot.at);
        }
        self.bytes_written += u64::from(record.bytes);
        self.log.written(spot, record)
    }

    /// Tells the submitter that it is slow. A read has the slot alone, so it waits.
    fn answer_slow(&mut self, work: &mut Work) {
        let (token, limit) = (work.token, self.slow_limit);
        let done = match &work.kind {
            Kind::Read { .. } => return,
            Kind::Write { bytes, .. } => {
                StoreDone::Written { token, bytes: bytes.clone(), result: Err(StoreError::Slow { limit }) }
            }
            Kind::Move { .. } => StoreDone::Moved { token, result: Err(StoreError::Slow { limit }) },
        };
        work.answered = true;
        self.ready.push(done);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let works = &mut self.works;
        // Once for all of them: each by itself would wait as long.
        let _ = until(5 * self.slow_limit, || {
            works.retain_mut(|work| work.kind.poll().is_none());
            Ok(works.is_empty())
        });
        std::mem::forget(std::mem::take(works));
    }
}

impl Kind {
    /// Whether the device is done, or lost; a read's slot comes with it. A question that fails is asked again.
    fn poll(&mut self) -> Option<Result<Option<Slot>, Error>> {
        let polled = match self {
            Self::Write { copying, .. } => copying.poll().map(|held| held.map(|_| None)),
            Self::Move { copying, .. } => copying.poll().map(|nothing| nothing.map(|_| None)),
            Self::Read { copying, .. } => copying.poll().map(|slots| slots.map(|mut slots| slots.pop())),
        };
        match polled {
            Ok(None) | Err(Error::Cuda { .. }) => None,
            Ok(Some(slot)) => Some(Ok(slot)),
            Err(error) => Some(Err(error)),
        }
    }
}

/// All of a block, from the front of its host memory.
fn page(at: DiskLocation, record: &Record) -> PageCopy {
    PageCopy { host: 0, host_offset: 0, device_offset: offset(at), bytes: record.bytes.into() }
}

impl BlockStore for Pool {
    fn submit(&mut self, op: StoreOp) -> Result<(), StoreOp> {
        if self.works.len() + self.batch.len() + self.ready.len() >= self.in_flight_max as usize {
            return Err(op);
        }
        self.batch.push(op);
        Ok(())
    }

    fn kick(&mut self) {
        for op in std::mem::take(&mut self.batch) {
            self.start(op);
        }
    }

    /// Compares what was read with its checksum on the way: so long it takes.
    fn poll(&mut self, done: &mut Vec<StoreDone>) {
        self.kick();
        let now = now();
        for work in std::mem::take(&mut self.works) {
            let still = self.look(work, now);
            self.works.extend(still);
        }
        done.append(&mut self.ready);
        if let Some((segment, entries)) = self.log.offer() {
            let room_bytes = self.log.room_bytes();
            done.push(StoreDone::Reclaim { segment, entries, room_bytes });
        }
    }

    fn usage(&self) -> StoreUsage {
        let unanswered = self.works.iter().filter(|work| !work.answered).count();
        StoreUsage {
            bytes_max: self.log.room_bytes(),
            bytes_used: self.log.in_use() as u64 * self.log.segment_bytes(),
            bytes_written: self.bytes_written,
            bytes_read: self.bytes_read,
            in_flight: (unanswered + self.batch.len() + self.ready.len()) as u32,
            in_flight_max: self.in_flight_max,
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "how long a device takes; nothing that is replayed")]
fn now() -> Instant {
    Instant::now()
}
