//! A disk in memory that fails on demand: the n-th operation errs, comes short, tears or hangs;
//! completions come late and out of order; a crash keeps what was synced and a random part of the rest,
//! sector by sector. One seed, one history.
//!
//! Time is virtual: waiting for a completion moves the clock to it, so tests of time limits take none.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::files::{Directory, SegmentFile};
use crate::io::{BlockIo, IoDone, IoKind, IoOp, Memory, Waker};
use crate::segment::PAGE_BYTES;

const SECTOR_BYTES: usize = 512;

/// What goes wrong with one operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SimFault {
    /// It ends with this error number and does nothing.
    Errno(i32),
    /// It moves only half of its sectors and says so.
    Short,
    /// A write that says it is whole but lost its second half; a read that brings one flipped bit.
    Damaged,
    /// It takes this long.
    Delay(Duration),
}

/// A simulated disk with one directory. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<Disk>>);

struct Disk {
    random: Random,
    names: BTreeMap<String, u64>,
    files: BTreeMap<u64, File>,
    file_next: u64,
    now: Duration,
    operations: u64,
    faults: BTreeMap<u64, SimFault>,
    always: Option<SimFault>,
    create_errno: Option<i32>,
    reorder: bool,
    locked: bool,
    /// Grows at a crash: an engine of an earlier life completes nothing any more.
    life: u64,
    /// Writes on their way: file, offset, bytes.
    flying: BTreeMap<u64, (u64, u64, Vec<u8>)>,
    flying_next: u64,
}

#[derive(Default, Clone)]
struct File {
    bytes: u64,
    /// What a read sees, page by page; a missing page is zero.
    seen: BTreeMap<u64, Vec<u8>>,
    /// What a crash leaves for certain.
    stable: BTreeMap<u64, Vec<u8>>,
    /// Writes since the last sync.
    unsynced: Vec<(u64, Vec<u8>)>,
}

impl File {
    fn put(pages: &mut BTreeMap<u64, Vec<u8>>, offset: u64, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let place = offset + at as u64;
            let within = (place % PAGE_BYTES as u64) as usize;
            let length = (PAGE_BYTES - within).min(bytes.len() - at);
            let page = pages.entry(place / PAGE_BYTES as u64).or_insert_with(|| vec![0; PAGE_BYTES]);
            page[within..within + length].copy_from_slice(&bytes[at..at + length]);
            at += length;
        }
    }

    fn get(&self, offset: u64, out: &mut [u8]) {
        let mut at = 0;
        while at < out.len() {
            let place = offset + at as u64;
            let within = (place % PAGE_BYTES as u64) as usize;
            let length = (PAGE_BYTES - within).min(out.len() - at);
            match self.seen.get(&(place / PAGE_BYTES as u64)) {
                Some(page) => out[at..at + length].copy_from_slice(&page[within..within + length]),
                None => out[at..at + length].fill(0),
            }
            at += length;
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        Self::put(&mut self.seen, offset, bytes);
        self.unsynced.push((offset, bytes.to_vec()));
    }

    fn sync(&mut self) {
        for (offset, bytes) in self.unsynced.drain(..) {
            Self::put(&mut self.stable, offset, &bytes);
        }
    }
}

impl SimDisk {
    /// An empty disk whose history follows from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Disk {
            random: Random(seed),
            names: BTreeMap::new(),
            files: BTreeMap::new(),
            file_next: 0,
            now: Duration::ZERO,
            operations: 0,
            faults: BTreeMap::new(),
            always: None,
            create_errno: None,
            reorder: false,
            locked: false,
            life: 0,
            flying: BTreeMap::new(),
            flying_next: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().expect("no simulated operation panics")
    }

    /// Lets the operation with this number go wrong; numbers count from 0 over the disk's whole life.
    pub fn fault(&self, operation: u64, fault: SimFault) {
        self.lock().faults.insert(operation, fault);
    }

    /// Lets every operation go wrong from now on, or none.
    pub fn always(&self, fault: Option<SimFault>) {
        self.lock().always = fault;
    }

    /// Lets every making of a file fail with this error number (for example ENOSPC), or none.
    pub fn refuse_files(&self, errno: Option<i32>) {
        self.lock().create_errno = errno;
    }

    /// Whether operations complete late and in any order.
    pub fn reorder(&self, on: bool) {
        self.lock().reorder = on;
    }

    /// Operations seen so far.
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Virtual time.
    pub fn now(&self) -> Duration {
        self.lock().now
    }

    /// Moves virtual time on.
    pub fn advance(&self, by: Duration) {
        self.lock().now += by;
    }

    /// Loses power: what was synced stays; of every other write, on its way or completed, each sector
    /// stays or goes by chance. Engines opened before see nothing complete any more.
    pub fn crash(&self) {
        let disk = &mut *self.lock();
        for (file, offset, bytes) in std::mem::take(&mut disk.flying).into_values() {
            if let Some(file) = disk.files.get_mut(&file) {
                file.unsynced.push((offset, bytes));
            }
        }
        for file in disk.files.values_mut() {
            let mut left = std::mem::take(&mut file.stable);
            for (offset, bytes) in file.unsynced.drain(..) {
                let luck = disk.random.below(4);
                for (sector, piece) in bytes.chunks(SECTOR_BYTES).enumerate() {
                    if luck == 0 || (luck < 3 && disk.random.below(2) == 0) {
                        File::put(&mut left, offset + (sector * SECTOR_BYTES) as u64, piece);
                    }
                }
            }
            file.seen.clone_from(&left);
            file.stable = left;
        }
        disk.life += 1;
        disk.locked = false;
    }

    /// Ends the process that uses the disk, not the power: every write that completed stays, and by
    /// chance those on their way.
    pub fn kill(&self) {
        let disk = &mut *self.lock();
        for (file, offset, bytes) in std::mem::take(&mut disk.flying).into_values() {
            if let Some(file) = disk.files.get_mut(&file)
                && disk.random.below(2) == 0
            {
                file.write(offset, &bytes);
            }
        }
        disk.life += 1;
        disk.locked = false;
    }

    /// Names of the files there are.
    pub fn names(&self) -> Vec<String> {
        self.lock().names.keys().cloned().collect()
    }

    /// A copy of a whole file.
    pub fn image(&self, name: &str) -> Option<Vec<u8>> {
        let disk = self.lock();
        let file = &disk.files[disk.names.get(name)?];
        let mut bytes = vec![0; file.bytes as usize];
        file.get(0, &mut bytes);
        Some(bytes)
    }

    /// Puts a whole file in place of what has that name.
    pub fn put_image(&self, name: &str, bytes: &[u8]) {
        let mut disk = self.lock();
        let mut file = File { bytes: bytes.len() as u64, ..File::default() };
        file.write(0, bytes);
        file.sync();
        disk.put_file(name, file);
    }

    /// Flips one bit of a file, counted from its beginning.
    pub fn flip(&self, name: &str, bit: u64) {
        let disk = &mut *self.lock();
        let Some(file) = disk.names.get(name).and_then(|id| disk.files.get_mut(id)) else { return };
        let mut byte = [0];
        file.get(bit / 8, &mut byte);
        byte[0] ^= 1 << (bit % 8);
        File::put(&mut file.seen, bit / 8, &byte);
        File::put(&mut file.stable, bit / 8, &byte);
    }

    /// A copy of the disk as it is, with a history of its own.
    pub fn copy(&self) -> Self {
        let disk = self.lock();
        let copy = Self::new(disk.random.0 ^ 0x5eed);
        {
            let mut other = copy.lock();
            other.names.clone_from(&disk.names);
            other.files.clone_from(&disk.files);
            other.file_next = disk.file_next;
            other.now = disk.now;
        }
        copy
    }

    pub(crate) fn directory(&self) -> Arc<dyn Directory> {
        Arc::new(self.clone())
    }

    /// Takes the directory's lock; false when a store has it.
    pub(crate) fn take_lock(&self) -> bool {
        !std::mem::replace(&mut self.lock().locked, true)
    }

    /// Gives the lock of `life` back.
    pub(crate) fn give_lock(&self, life: u64) {
        let mut disk = self.lock();
        if disk.life == life {
            disk.locked = false;
        }
    }

    pub(crate) fn life(&self) -> u64 {
        self.lock().life
    }

    pub(crate) fn engine(&self) -> SimIo {
        SimIo { disk: self.clone(), life: self.life(), attached: BTreeMap::new(), in_flight: Vec::new() }
    }
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SimDisk({} files)", self.lock().files.len())
    }
}

impl Disk {
    fn put_file(&mut self, name: &str, file: File) -> u64 {
        self.file_next += 1;
        let id = self.file_next;
        if let Some(old) = self.names.insert(name.to_owned(), id) {
            self.files.remove(&old);
        }
        self.files.insert(id, file);
        id
    }

    fn file(&self, name: &str) -> io::Result<(u64, &File)> {
        let id = self.names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok((*id, &self.files[id]))
    }
}

impl Directory for SimDisk {
    fn names(&self) -> io::Result<Vec<String>> {
        Ok(self.lock().names.keys().filter(|name| !name.contains('/')).cloned().collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let disk = self.lock();
        let (_, file) = disk.file(name)?;
        let mut bytes = vec![0; file.bytes as usize];
        file.get(0, &mut bytes);
        Ok(bytes)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.put_image(name, bytes);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut disk = self.lock();
        if disk.names.contains_key(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let id = disk.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        disk.names.insert(to.to_owned(), id);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut disk = self.lock();
        let id = disk.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        disk.files.remove(&id);
        Ok(())
    }

    fn make_dir(&self, name: &str) -> io::Result<()> {
        let mut disk = self.lock();
        disk.put_file(name, File::default());
        Ok(())
    }

    fn open(&self, name: &str) -> io::Result<(SegmentFile, u64)> {
        let disk = self.lock();
        let (id, file) = disk.file(name)?;
        Ok((SegmentFile::Sim(id), file.bytes))
    }

    fn create(&self, name: &str, _scratch: &str, bytes: u64, head: &[u8]) -> io::Result<SegmentFile> {
        let mut disk = self.lock();
        if let Some(errno) = disk.create_errno {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let mut file = File { bytes, ..File::default() };
        file.write(0, head);
        file.sync();
        Ok(SegmentFile::Sim(disk.put_file(name, file)))
    }

    fn is_there(&self) -> bool {
        true
    }

    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

struct InFlight {
    op: IoOp,
    file: u64,
    /// Key of a write's bytes in `Disk::flying`.
    flying: u64,
    due: Duration,
    fault: Option<SimFault>,
}

/// The engine of a simulated disk.
pub(crate) struct SimIo {
    disk: SimDisk,
    life: u64,
    attached: BTreeMap<u32, u64>,
    in_flight: Vec<InFlight>,
}

impl BlockIo for SimIo {
    fn attach(&mut self, segment: u32, file: SegmentFile) {
        let SegmentFile::Sim(id) = file else { panic!("a simulated disk has simulated files") };
        self.attached.insert(segment, id);
    }

    fn detach(&mut self, segment: u32) {
        self.attached.remove(&segment);
    }

    unsafe fn submit(&mut self, ops: &mut Vec<IoOp>) {
        let disk = &mut *self.disk.lock();
        for op in ops.drain(..) {
            let number = disk.operations;
            disk.operations += 1;
            let fault = disk.faults.remove(&number).or(disk.always);
            let luck = if disk.reorder { disk.random.below(1000) } else { 0 };
            let mut due = disk.now + Duration::from_micros(50 + luck);
            if let Some(SimFault::Delay(delay)) = fault {
                due += delay;
            }
            let file = self.attached[&op.segment];
            disk.flying_next += 1;
            let flying = disk.flying_next;
            if let IoKind::Write { offset, memory } = op.kind
                && !matches!(fault, Some(SimFault::Errno(_)))
            {
                // SAFETY: the submitter keeps the memory valid and unwritten until we complete (contract
                // of `submit`).
                let bytes = unsafe { std::slice::from_raw_parts(memory.address, memory.bytes as usize) };
                disk.flying.insert(flying, (file, offset, bytes.to_vec()));
            }
            self.in_flight.push(InFlight { op, file, flying, due, fault });
        }
    }

    fn completions(&mut self, wait: Duration, done: &mut Vec<IoDone>) {
        let disk = &mut *self.disk.lock();
        if self.life != disk.life {
            return;
        }
        let earliest = self.in_flight.iter().map(|one| one.due).min();
        match earliest {
            Some(due) if due <= disk.now.saturating_add(wait) => disk.now = disk.now.max(due),
            _ if wait != Duration::MAX => disk.now += wait,
            _ => {}
        }
        let now = disk.now;
        let mut at = 0;
        while at < self.in_flight.len() {
            if self.in_flight[at].due > now {
                at += 1;
                continue;
            }
            let one = self.in_flight.remove(at);
            let result = disk.perform(&one);
            done.push(IoDone { token: one.op.token, result });
        }
    }

    fn waker(&self) -> Waker {
        Arc::new(|| {})
    }

    fn now(&self) -> Duration {
        self.disk.now()
    }
}

impl Disk {
    fn perform(&mut self, one: &InFlight) -> Result<u32, i32> {
        if let Some(SimFault::Errno(errno)) = one.fault {
            return Err(errno);
        }
        let flipped = self.random.next();
        let file = self.files.get_mut(&one.file).ok_or(libc::EBADF)?;
        let half = |memory: Memory| memory.bytes as usize / 2 / SECTOR_BYTES * SECTOR_BYTES;
        match one.op.kind {
            IoKind::Sync => {
                file.sync();
                Ok(0)
            }
            IoKind::Write { memory, .. } => {
                let mut length = memory.bytes as usize;
                if matches!(one.fault, Some(SimFault::Short | SimFault::Damaged)) {
                    length = half(memory);
                }
                let (_, offset, bytes) = self.flying.remove(&one.flying).ok_or(libc::EIO)?;
                file.write(offset, &bytes[..length]);
                Ok(if one.fault == Some(SimFault::Damaged) { memory.bytes } else { length as u32 })
            }
            IoKind::Read { offset, memory } => {
                let mut length = (file.bytes.saturating_sub(offset) as usize).min(memory.bytes as usize);
                if one.fault == Some(SimFault::Short) {
                    length = length.min(half(memory));
                }
                // SAFETY: the submitter keeps the memory valid and its own until we complete (contract of
                // `submit`).
                let bytes = unsafe { std::slice::from_raw_parts_mut(memory.address, length) };
                file.get(offset, bytes);
                if one.fault == Some(SimFault::Damaged) && length > 0 {
                    bytes[(flipped >> 3) as usize % length] ^= 1 << (flipped & 7);
                }
                Ok(length as u32)
            }
        }
    }
}

/// SplitMix64: small, seeded, good enough to choose sectors.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
