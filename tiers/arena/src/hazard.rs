//! Who reads what right now, written by workers, asked by the daemon before a slot is reused.
//!
//! ```text
//! hazard-<shard>-<session>-<pid>-<start time>[-<n>]  one file per worker session
//!   0     magic | 8 count | 16 touches | 24 state | 32 touch head, each u64
//!   4096  cells: slot:32 generation:32 each, 0 for nothing
//!   then  touches: a ring of u64 slot ids, written at head, lost when nobody drains it in time
//! ```
//! The worker may write the whole file, cut it or grow it; the daemon therefore never maps it and never
//! believes more than a number: `pread` gives short answers where a mapping would give a signal, and a
//! worker that lies about its own hazards harms itself alone.
//!
//! A file opens (state 1) when it is added to the set that sweeps look at, not before: a worker that is
//! quicker than its shard asks the daemon meanwhile. It outlives the daemon. The next one closes it (state
//! 2, so that the worker's next read fails and it connects again), and honours what it still names until that is cleared or the process is gone.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kv_block::{Generation, SessionId, ShardId, SlotId};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::Error;
use crate::word;

pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"kvdhaz01");
const COUNT_OFFSET: usize = 8;
pub(crate) const STATE_OFFSET: usize = 24;
pub(crate) const HEAD_OFFSET: usize = 32;
pub(crate) const CELLS_OFFSET: usize = 4096;
/// Most reads a session may have open at once.
pub const HAZARDS_MAX: u32 = 1 << 16;
/// Touches kept until the daemon drains them.
pub const TOUCHES: u32 = 1 << 12;

/// Closed files of one process and session number that may wait at once.
const LIVES_MAX: u32 = 1000;

/// Offset of the touch ring.
pub(crate) fn touches_offset(count: u32) -> usize {
    CELLS_OFFSET + count as usize * 8
}

/// Length of a file with `count` cells and `touches` touches.
pub(crate) fn file_bytes(count: u32, touches: u32) -> usize {
    touches_offset(count) + touches as usize * 8
}

/// Who wrote a hazard file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Shard whose slots it names.
    pub shard: ShardId,
    /// The session.
    pub session: SessionId,
    /// Process id of the worker, as the daemon sees it.
    pub pid: u32,
    /// Start time of that process (field 22 of `/proc/<pid>/stat`), so that a reused id is not taken for it.
    pub start_time: u64,
}

impl Owner {
    fn file_name(&self) -> String {
        format!("hazard-{}-{}-{}-{}", self.shard, self.session, self.pid, self.start_time)
    }

    fn parse(name: &str) -> Option<Self> {
        let mut fields = name.strip_prefix("hazard-")?.split('-');
        let owner = Self {
            shard: ShardId(fields.next()?.parse().ok()?),
            session: SessionId(fields.next()?.parse().ok()?),
            pid: fields.next()?.parse().ok()?,
            start_time: fields.next()?.parse().ok()?,
        };
        let number = fields.next().map(str::parse::<u32>);
        (!matches!(number, Some(Err(_))) && fields.next().is_none()).then_some(owner)
    }

    fn is_alive(&self) -> bool {
        process_start_time(self.pid) == Some(self.start_time)
    }
}

/// Start time of a process in clock ticks since boot; `None` when there is no such process or it is dead
/// and only waits to be collected.
pub fn process_start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold anything, so count from its closing parenthesis: state is field 3.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let dead = matches!(fields.next()?, "Z" | "X" | "x");
    fields.nth(18)?.parse().ok().filter(|_| !dead)
}

/// One session's hazard file, on the daemon's side.
#[derive(Debug)]
pub struct HazardFile {
    owner: Owner,
    file: OwnedFd,
    /// Where it is named; empty for an anonymous one.
    path: Option<PathBuf>,
    count: u32,
    /// Touches drained so far.
    drained: u64,
    /// In a set, now or in an earlier life: from then on the file has to be there for the next one.
    added: bool,
    /// No longer written by a session of ours; kept for what it still names.
    closed: bool,
    /// The worker's views can see that.
    told: bool,
}

impl HazardFile {
    /// A file with `count` cells (1 to [`HAZARDS_MAX`]) for a session of `pid`.
    pub fn create(
        dir: &Path,
        shard: ShardId,
        session: SessionId,
        pid: u32,
        start_time: u64,
        count: u32,
    ) -> Result<Self, Error> {
        let owner = Owner { shard, session, pid, start_time };
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut path = dir.join(owner.file_name());
        // Session numbers start again with every life of the daemon, so a closed file may have the name.
        for number in 1.. {
            match rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR) {
                Err(Errno::EXIST) if number <= LIVES_MAX => {
                    path.set_file_name(format!("{}-{number}", owner.file_name()));
                }
                opened => {
                    let file = opened.map_err(Error::io("create hazard file", &path))?;
                    let made = Self::with_file(owner, file, Some(path.clone()), count);
                    return made.inspect_err(|_| drop(fs::remove_file(&path)));
                }
            }
        }
        Err(Error::io("create hazard file", &path)(Errno::EXIST))
    }

    /// A nameless one, for tests and simulation.
    pub fn anonymous(owner: Owner, count: u32) -> Result<Self, Error> {
        let path = Path::new("hazard memfd");
        let file =
            rustix::fs::memfd_create("kvd-hazard", MemfdFlags::CLOEXEC).map_err(Error::io("create", path))?;
        Self::with_file(owner, file, None, count)
    }

    fn with_file(owner: Owner, file: OwnedFd, path: Option<PathBuf>, count: u32) -> Result<Self, Error> {
        if !(1..=HAZARDS_MAX).contains(&count) {
            return Err(Error::Geometry { what: "hazards", found: count.into(), wanted: "1 to 65536" });
        }
        let name = path.clone().unwrap_or_else(|| owner.file_name().into());
        let bytes = file_bytes(count, TOUCHES) as u64;
        // Memory at once: the worker's first store must not be a SIGBUS on a full file system.
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)
            .map_err(Error::io("make room for", &name))?;
        let mut header = [0; 24];
        header[..8].copy_from_slice(&MAGIC.to_le_bytes());
        header[8..16].copy_from_slice(&u64::from(count).to_le_bytes());
        header[16..].copy_from_slice(&u64::from(TOUCHES).to_le_bytes());
        rustix::io::pwrite(&file, &header, 0).map_err(Error::io("write", &name))?;
        Ok(Self { owner, file, path, count, drained: 0, added: false, closed: false, told: false })
    }

    /// Whose it is.
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Number of cells.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// A descriptor to pass to the worker.
    pub fn fd(&self) -> Result<OwnedFd, Error> {
        let name = self.path.clone().unwrap_or_else(|| self.owner.file_name().into());
        rustix::io::fcntl_dupfd_cloexec(&self.file, 0).map_err(Error::io("duplicate", &name))
    }

    /// Bytes of the file from `offset` on; as many as there are.
    fn read(&self, offset: usize, bytes: usize) -> Result<Vec<u8>, Error> {
        let mut buffer = vec![0; bytes];
        let mut got = 0;
        while got < bytes {
            match rustix::io::pread(&self.file, &mut buffer[got..], (offset + got) as u64) {
                Ok(0) => break,
                Ok(more) => got += more,
                Err(Errno::INTR) => {}
                Err(error) => {
                    let name = self.path.clone().unwrap_or_else(|| self.owner.file_name().into());
                    return Err(Error::io("read", &name)(error));
                }
            }
        }
        buffer.truncate(got);
        Ok(buffer)
    }

    /// Adds every slot named right now; gives how many.
    fn scan(&self, into: &mut Vec<(SlotId, Generation)>) -> Result<usize, Error> {
        let before = into.len();
        let bytes = self.read(CELLS_OFFSET, self.count as usize * 8)?;
        into.extend(
            numbers(&bytes)
                .filter(|&cell| cell != 0)
                .map(|cell| (SlotId((cell >> 32) as u32), Generation(cell as u32))),
        );
        Ok(into.len() - before)
    }

    /// Tells the worker's views that they are over.
    fn close(&mut self) {
        self.closed = true;
        // A file that was cut short simply grows again. If this fails, the views read on, and their hazards
        // are honoured until the process ends.
        let written = self.write_state(word::CLOSED);
        self.told |= written;
    }

    fn write_state(&self, state: u64) -> bool {
        rustix::io::pwrite(&self.file, &state.to_le_bytes(), STATE_OFFSET as u64) == Ok(8)
    }

    fn unlink(&self) {
        if let Some(path) = &self.path {
            // Already gone is as good.
            let _ = fs::remove_file(path);
        }
    }
}

impl Drop for HazardFile {
    fn drop(&mut self) {
        if !self.added {
            // Its session never began.
            self.unlink();
        }
    }
}

impl AsFd for HazardFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
}

/// All hazard files of a shard. What it does not hold, a sweep does not see: make it with [`Self::adopt`]
/// before the first sweep.
#[derive(Debug, Default)]
pub struct HazardSet {
    files: Vec<HazardFile>,
}

impl HazardSet {
    /// No hazards: for anonymous memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes over what an earlier daemon left in `dir` for `shard`: files of dead processes are removed,
    /// those of living ones closed and honoured.
    pub fn adopt(dir: &Path, shard: ShardId) -> Result<Self, Error> {
        let mut set = Self::new();
        for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
            let entry = entry.map_err(Error::io("list", dir))?;
            let owner = entry.file_name().to_str().and_then(Owner::parse);
            let Some(owner) = owner.filter(|owner| owner.shard == shard) else { continue };
            let path = entry.path();
            if !owner.is_alive() {
                fs::remove_file(&path).map_err(Error::io("remove", &path))?;
                continue;
            }
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let file = rustix::fs::open(&path, flags, Mode::empty())
                .map_err(Error::io("open hazard file", &path))?;
            let mut file = HazardFile {
                owner,
                file,
                path: Some(path),
                count: 0,
                drained: 0,
                added: true,
                closed: false,
                told: false,
            };
            // A worker that changed its own header takes the protection from its own reads alone.
            let count = file.read(COUNT_OFFSET, 8)?;
            file.count = numbers(&count).next().unwrap_or(0).min(HAZARDS_MAX.into()) as u32;
            file.close();
            set.files.push(file);
        }
        set.reap();
        Ok(set)
    }

    /// A new session's file. From here on its worker may read in place.
    pub fn add(&mut self, mut file: HazardFile) {
        file.added = true;
        self.files.push(file);
        // All sweeps before this one are visible to whoever sees the file open.
        word::before_scan();
        if let Some(file) = self.files.last() {
            // Refused, it stays unopened and the worker asks the daemon for every block.
            let _ = file.write_state(word::OPEN);
        }
    }

    /// The session is over. Its hazards are void if its process is dead; else they are honoured until they
    /// are cleared, and new reads by its views fail.
    pub fn remove(&mut self, session: SessionId) {
        for file in self.files.iter_mut().filter(|file| file.owner.session == session) {
            file.close();
        }
        self.reap();
    }

    /// Drops closed files that name nothing or whose process is dead; gives how many stay. Call it now and
    /// then while this is not zero.
    pub fn reap(&mut self) -> usize {
        word::before_scan();
        let mut named = Vec::new();
        self.files.retain(|file| {
            let mut idle = || file.told && matches!(file.scan(&mut named), Ok(0));
            let done = file.closed && (!file.owner.is_alive() || idle());
            if done {
                file.unlink();
            }
            !done
        });
        self.files.iter().filter(|file| file.closed).count()
    }

    /// Number of files.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether there is no file.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Everything that is named right now.
    pub fn scan(&self) -> Result<Vec<(SlotId, Generation)>, Error> {
        let mut named = Vec::new();
        for file in &self.files {
            file.scan(&mut named)?;
        }
        Ok(named)
    }

    /// For each session's file how many reads are under way. Costs a look at every slot of every file.
    pub fn reading(&self) -> Vec<(SessionId, u32)> {
        let mut named = Vec::new();
        // What cannot be read any more names nothing that we could count.
        let mut count = |file: &HazardFile| file.scan(&mut named).unwrap_or(0) as u32;
        self.files.iter().map(|file| (file.owner.session, count(file))).collect()
    }

    /// The named slots, sorted.
    pub(crate) fn scan_slots(&self) -> Result<Vec<SlotId>, Error> {
        let mut slots: Vec<SlotId> = self.scan()?.into_iter().map(|(slot, _)| slot).collect();
        slots.sort_unstable();
        Ok(slots)
    }

    /// Adds to `slots` which slots were read since the last call, as far as the logs reach back. The numbers
    /// are the workers' word: any may be wrong.
    pub fn drain_touches(&mut self, slots: &mut Vec<SlotId>) {
        for file in self.files.iter_mut().filter(|file| !file.closed) {
            let Ok(head) = file.read(HEAD_OFFSET, 8) else { continue };
            let Some(head) = numbers(&head).next() else { continue };
            let fresh = head.wrapping_sub(file.drained).min(TOUCHES.into()) as u32;
            file.drained = head;
            if fresh == 0 {
                continue;
            }
            // The newest `fresh` places of the ring, in at most two pieces.
            let start = (head.wrapping_sub(fresh.into()) % u64::from(TOUCHES)) as u32;
            let first = fresh.min(TOUCHES - start);
            for (at, len) in [(start, first), (0, fresh - first)] {
                let offset = touches_offset(file.count) + at as usize * 8;
                let bytes = file.read(offset, len as usize * 8).unwrap_or_default();
                slots.extend(numbers(&bytes).map(|slot| SlotId(slot as u32)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me(session: u64) -> Owner {
        let pid = std::process::id();
        let start_time = process_start_time(pid).unwrap();
        Owner { shard: ShardId(2), session: SessionId(session), pid, start_time }
    }

    fn create(dir: &Path, owner: Owner) -> HazardFile {
        HazardFile::create(dir, owner.shard, owner.session, owner.pid, owner.start_time, 8).unwrap()
    }

    /// What a worker would write through its mapping.
    fn write(file: &HazardFile, offset: usize, value: u64) {
        rustix::io::pwrite(&file.file, &value.to_le_bytes(), offset as u64).unwrap();
    }

    fn names(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn owners_survive_the_file_name() {
        let owner = me(7);
        assert_eq!(Owner::parse(&owner.file_name()), Some(owner));
        assert_eq!(Owner::parse(&format!("{}-3", owner.file_name())), Some(owner));
        for bad in
            ["", "hazard-", "hazard-1-2-3", "hazard-1-2-3-4-5-6", "hazard-1-2-3-4-x", "hazard-99999-1-1-1"]
        {
            assert_eq!(Owner::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_process_has_a_start_time_and_nobody_has_none() {
        assert!(process_start_time(std::process::id()).is_some());
        assert_eq!(process_start_time(u32::MAX), None);
    }

    #[test]
    fn a_scan_names_what_the_cells_hold() {
        let mut set = HazardSet::new();
        let file = HazardFile::anonymous(me(1), 8).unwrap();
        write(&file, CELLS_OFFSET + 7 * 8, word::name(SlotId(5), Generation(6)));
        write(&file, CELLS_OFFSET, word::name(SlotId(9), Generation(1)));
        set.add(file);
        assert_eq!(set.scan().unwrap(), [(SlotId(9), Generation(1)), (SlotId(5), Generation(6))]);
        assert_eq!(set.scan_slots().unwrap(), [SlotId(5), SlotId(9)]);
    }

    #[test]
    fn a_file_cut_short_is_a_file_without_hazards() {
        let mut set = HazardSet::new();
        let file = HazardFile::anonymous(me(1), 8).unwrap();
        write(&file, CELLS_OFFSET, word::name(SlotId(9), Generation(1)));
        write(&file, HEAD_OFFSET, u64::MAX);
        rustix::fs::ftruncate(&file.file, CELLS_OFFSET as u64 + 3).unwrap();
        set.add(file);
        let mut touches = Vec::new();
        set.drain_touches(&mut touches);
        assert!(set.scan().unwrap().is_empty() && touches.is_empty());
        rustix::fs::ftruncate(&set.files[0].file, 0).unwrap();
        set.drain_touches(&mut touches);
        set.remove(SessionId(1));
        assert!(set.is_empty() && touches.is_empty());
    }

    #[test]
    fn touches_are_drained_once_and_lost_when_the_ring_laps() {
        let mut set = HazardSet::new();
        let file = HazardFile::anonymous(me(1), 8).unwrap();
        let touch = |file: &HazardFile, at: u64| {
            write(file, touches_offset(8) + (at % u64::from(TOUCHES)) as usize * 8, at);
            write(file, HEAD_OFFSET, at + 1);
        };
        (0..3).for_each(|at| touch(&file, at));
        set.add(file);
        let drain = |set: &mut HazardSet| {
            let mut slots = Vec::new();
            set.drain_touches(&mut slots);
            slots.into_iter().map(|slot| u64::from(slot.0)).collect::<Vec<_>>()
        };
        assert_eq!(drain(&mut set), [0, 1, 2]);
        assert!(drain(&mut set).is_empty());
        let all = 3..3 + 2 * u64::from(TOUCHES);
        all.clone().for_each(|at| touch(&set.files[0], at));
        assert_eq!(drain(&mut set), all.skip(TOUCHES as usize).collect::<Vec<_>>());
        write(&set.files[0], HEAD_OFFSET, 0);
        assert_eq!(drain(&mut set).len(), TOUCHES as usize, "a head that jumps costs one ring of nonsense");
    }

    #[test]
    fn a_closed_session_is_honoured_while_it_names_a_slot() {
        let dir = tempfile::tempdir().unwrap();
        let mut set = HazardSet::new();
        let file = create(dir.path(), me(1));
        let worker = file.fd().unwrap();
        write(&file, CELLS_OFFSET, word::name(SlotId(9), Generation(1)));
        set.add(file);
        set.remove(SessionId(1));
        assert_eq!((set.len(), names(dir.path())), (1, 1), "the process lives and reads");
        let mut closed = [0; 8];
        rustix::io::pread(&worker, &mut closed, STATE_OFFSET as u64).unwrap();
        assert_eq!(u64::from_le_bytes(closed), word::CLOSED);
        rustix::io::pwrite(&worker, &[0; 8], CELLS_OFFSET as u64).unwrap();
        assert_eq!((set.reap(), set.len(), names(dir.path())), (0, 0, 0));
    }

    #[test]
    fn the_next_life_keeps_the_living_and_removes_the_dead() {
        let dir = tempfile::tempdir().unwrap();
        let (living, idle, dead) = (me(1), me(2), Owner { start_time: 1, ..me(3) });
        let other_shard = Owner { shard: ShardId(3), ..dead };
        for owner in [living, idle, dead, other_shard] {
            let mut file = create(dir.path(), owner);
            file.added = true;
            write(&file, touches_offset(8), 6);
            if owner != idle {
                write(&file, CELLS_OFFSET, word::name(SlotId(owner.session.0 as u32), Generation(1)));
            }
        }
        fs::write(dir.path().join("hazard-of-something-else"), "").unwrap();
        let set = HazardSet::adopt(dir.path(), ShardId(2)).unwrap();
        assert_eq!(set.scan_slots().unwrap(), [SlotId(1)]);
        assert_eq!((set.len(), names(dir.path())), (1, 3));
        // The same process in a session that got the same number.
        let again = create(dir.path(), living);
        assert_ne!(again.path, set.files[0].path);
    }

    #[test]
    fn a_session_that_never_began_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = create(dir.path(), me(1));
        assert_eq!(names(dir.path()), 1);
        drop(file);
        assert_eq!(names(dir.path()), 0);
    }

    #[test]
    fn counts_out_of_range_are_refused() {
        for count in [0, HAZARDS_MAX + 1] {
            assert!(matches!(HazardFile::anonymous(me(1), count), Err(Error::Geometry { .. })));
        }
    }
}
