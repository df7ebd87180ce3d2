//! A shard's memory: two named files, made or taken over from an earlier life of the daemon.
//!
//! ```text
//! <dir>/shard-0.lock       flock: one daemon at a time (of its own, because locks travel with passed
//!                          descriptors and this one is never passed)
//! <dir>/shard-0.meta       see `meta`; gets its name when its header is complete
//! <dir>/shard-0.data       the arena; on a hugetlbfs instead when there is one with room
//! <dir>/*.aside-<n>        what an open could not use; kept for a person to look at
//! ```
//! Opening decides from what it finds: nothing, or an arena without its meta file (a creation that was
//! killed): fresh. A sound header of the same version and geometry, with its own data file: adopted, see
//! `Slab`. Anything else is renamed and never written.
//!
//! Only the front of the arena has memory when it is opened; the rest gets it from a [`Grower`] while the node
//! serves. What can be known before that is an error here: a file system that says it has no room.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kv_block::Epoch;
use rustix::fs::{FlockOperation, MemfdFlags, OFlags};
use rustix::io::Errno;
use rustix::mm::Advice;

use crate::Error;
use crate::grow::{self, Grower, Pages, allocate, space_error};
use crate::map::Mapping;
use crate::meta::{
    EPOCH_OFFSET, GROWN_OFFSET, Geometry, HEADER_BYTES, HUGE_PAGE, Header, HeaderError, Layout, epoch_of,
    epoch_word, grown_of, grown_word,
};
use crate::numa::{self, Bound, HugeMount};
use crate::slab::Slab;
use crate::sync::Ordering;
use crate::table::{Table, TableReader};

/// Whether to look for huge pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HugePages {
    /// Take them where they are to be had.
    #[default]
    Auto,
    /// Ordinary pages only.
    Off,
    /// Refuse to start without.
    Required,
}

/// What memory a shard is to have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemorySpec {
    /// Directory of the named files, on a tmpfs. Made when missing, for the daemon's user alone.
    pub dir: PathBuf,
    /// Stem of the file names, such as `shard-0`.
    pub name: String,
    /// How much and how cut.
    pub geometry: Geometry,
    /// NUMA node the pages are to come from.
    pub numa_node: Option<u32>,
    /// Whether to look for huge pages.
    pub huge: HugePages,
    /// The hugetlbfs to use; else one is looked for in `/proc/mounts`.
    pub hugetlbfs_dir: Option<PathBuf>,
    /// About how much of a new arena gets its memory before it is opened; the rest is for the grower.
    pub ready_bytes: u64,
    /// Bytes of the file system of `dir` that were promised to others and are not taken yet.
    pub promised_bytes: u64,
}

/// What opening found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Adoption {
    /// Nothing: all is new.
    Fresh,
    /// The memory of an earlier life.
    Adopted {
        /// Epoch of that life.
        previous: Epoch,
        /// Blocks that wait for verification.
        slots: u64,
    },
    /// Files that could not be used; all is new.
    SetAside {
        /// Why.
        why: String,
        /// What the meta file is called now.
        to: PathBuf,
    },
}

/// The memory of one shard, of which this is the one writer.
#[derive(Debug)]
pub struct ShardMemory {
    slab: Slab,
    meta: Arc<Mapping>,
    meta_file: Arc<OwnedFd>,
    data_file: OwnedFd,
    layout: Layout,
    table_taken: bool,
    epoch: Epoch,
    huge: bool,
    /// Why the table cannot have huge pages; `None` when it may.
    table_small: Option<&'static str>,
    notes: Vec<String>,
    /// `None` when the arena has all of its memory, or when it was taken.
    grower: Option<Grower>,
    /// Removed by `wipe`, in this order.
    paths: Vec<PathBuf>,
    lock: Lock,
}

/// The lock file of named memory. Everything that may write has a share, so that nobody else opens the
/// memory before the last of them is gone.
pub(crate) type Lock = Option<Arc<File>>;

/// What the files on disk turned out to be.
enum Found {
    Nothing,
    Usable { meta: File, data: File, data_path: PathBuf, header: Header },
    Unusable { why: String, epoch: Option<Epoch> },
}

impl ShardMemory {
    /// Opens the memory in `spec`: takes over what an earlier life left, or makes it new. The new epoch is
    /// one more than the last, and `epoch_floor` at least (files that a reboot took remember nothing).
    pub fn open(spec: &MemorySpec, epoch_floor: Epoch) -> Result<(Self, Adoption), Error> {
        let layout = Layout::new(spec.geometry)?;
        let mut dir = fs::DirBuilder::new();
        dir.recursive(true)
            .mode(0o700)
            .create(&spec.dir)
            .map_err(Error::io("create directory", &spec.dir))?;
        let absolute = fs::canonicalize(&spec.dir).map_err(Error::io("resolve", &spec.dir))?;
        let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
        let mut place = Place { spec, absolute, mounts, lock: None };
        let lock_path = place.lock()?;
        let meta_path = place.file("meta");
        let (mut memory, adoption) = match place.find(&layout)? {
            Found::Nothing => (place.create(layout, epoch_floor)?, Adoption::Fresh),
            Found::Usable { meta, data, data_path, header } => {
                let epoch = Epoch(header.epoch.0 + 1).max(epoch_floor);
                let memory = place.adopt(layout, epoch, meta, data, data_path)?;
                let slots = memory.slab.adopted().count() as u64;
                (memory, Adoption::Adopted { previous: header.epoch, slots })
            }
            Found::Unusable { why, epoch } => {
                let to = place.set_aside()?;
                let next = epoch.map_or(Epoch(0), |epoch| Epoch(epoch.0 + 1)).max(epoch_floor);
                (place.create(layout, next)?, Adoption::SetAside { why, to })
            }
        };
        let option = numa::tmpfs_huge_option(&place.mounts, &meta_path);
        memory.table_small = match option.as_deref() {
            _ if spec.huge == HugePages::Off => Some("huge pages are off"),
            None => Some("its file is not on a tmpfs"),
            Some("never") => Some("its tmpfs has huge=never (mount -o remount,huge=advise)"),
            Some(_) => None,
        };
        memory.paths.insert(0, meta_path);
        memory.paths.push(lock_path);
        Ok((memory, adoption))
    }

    /// Nameless memory that ends with its last user: for tests and simulation.
    pub fn anonymous(geometry: Geometry) -> Result<Self, Error> {
        let layout = Layout::new(geometry)?;
        let make = |name: &'static str, bytes: u64| {
            let path = Path::new(name);
            let file =
                rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map_err(Error::io("create", path))?;
            rustix::fs::ftruncate(&file, bytes).map_err(Error::io("size", path))?;
            Ok::<_, Error>(File::from(file))
        };
        let (meta, data) = (make("kvd-meta", layout.meta_bytes)?, make("kvd-data", geometry.data_bytes())?);
        let data_inode = data.metadata().map_err(Error::io("look at", Path::new("kvd-data")))?.ino();
        let header = Header { layout, data_inode, epoch: Epoch(1) };
        meta.write_all_at(&header.encode(), 0).map_err(Error::io("write", Path::new("kvd-meta")))?;
        let map = |file: &File, bytes: u64| {
            Mapping::new(file, bytes as usize, true).map_err(Error::io("map", Path::new("memfd")))
        };
        let maps = (map(&meta, layout.meta_bytes)?, map(&data, geometry.data_bytes())?);
        // Nobody limits a memfd, so its pages may come when they are touched.
        Ok(Self::assemble(layout, Epoch(1), (meta, data), maps, None, false, geometry.regions))
    }

    fn assemble(
        layout: Layout,
        epoch: Epoch,
        (meta_file, data_file): (File, File),
        (meta, data): (Mapping, Mapping),
        lock: Lock,
        adopt: bool,
        grown: u32,
    ) -> Self {
        let (meta, meta_file) = (Arc::new(meta), Arc::new(OwnedFd::from(meta_file)));
        meta.word(GROWN_OFFSET).store(grown_word(grown), Ordering::Release);
        let files = (Arc::clone(&meta), Arc::clone(&meta_file));
        let slab = Slab::new(layout, files.0, files.1, data, lock.clone(), adopt, grown);
        Self {
            slab,
            meta,
            meta_file,
            data_file: data_file.into(),
            layout,
            table_taken: false,
            epoch,
            huge: false,
            table_small: Some("its file has no name"),
            notes: Vec::new(),
            grower: None,
            paths: Vec::new(),
            lock,
        }
    }

    /// Gives the rest of the arena, from `done` bytes on, to a grower.
    fn leave_to_grower(&mut self, data: File, path: &Path, pages: Pages, done: u64) {
        if done < self.layout.geometry.data_bytes() {
            self.grower = Some(Grower::new(self.slab.clone(), data, path.to_owned(), pages, done));
        }
    }

    /// The epoch that began with this open.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The geometry it was opened with.
    pub fn geometry(&self) -> &Geometry {
        &self.layout.geometry
    }

    /// The arena's allocator.
    pub fn slab(&self) -> &Slab {
        &self.slab
    }

    /// What allocates the rest of the arena; `None` when nothing is missing, and from the second time on.
    pub fn take_grower(&mut self) -> Option<Grower> {
        self.grower.take()
    }

    /// The catalog table, emptied; `None` from the second time on, because it has one writer.
    pub fn take_table(&mut self) -> Result<Option<Table>, Error> {
        if self.table_taken {
            return Ok(None);
        }
        self.table_taken = true;
        let (meta, file) = (Arc::clone(&self.meta), Arc::clone(&self.meta_file));
        let path = self.paths.first().map_or(Path::new("meta memfd"), PathBuf::as_path);
        let huge = self.table_small.is_none();
        let table = Table::new(meta, file, self.lock.clone(), huge, &self.layout, self.epoch);
        let table = table.map_err(Error::io("make room for the catalog table in", path))?;
        self.notes.push(self.table_note());
        Ok(Some(table))
    }

    /// What pages the catalog table got: with millions of entries, walking page tables is a good part of a lookup.
    fn table_note(&self) -> String {
        let why = self.table_small.map(str::to_owned).or_else(|| {
            let wanted = self.layout.buckets * crate::table::BUCKET_BYTES;
            let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
            let got = numa::huge_bytes_in_smaps(&smaps, self.meta.range(0, self.meta.len()).as_ptr() as u64);
            (got * 2 < wanted).then(|| format!("the tmpfs gave {got} of {wanted} bytes in huge ones"))
        });
        why.map_or_else(
            || "catalog table in huge pages by tmpfs".to_owned(),
            |why| format!("catalog table in ordinary 4 KiB pages: {why}"),
        )
    }

    /// The catalog table for other threads of this process to look at.
    pub fn table_reader(&self) -> TableReader {
        TableReader::new(Arc::clone(&self.meta), &self.layout)
    }

    /// A descriptor of the meta file to pass to a worker, for reading.
    pub fn meta_ro(&self) -> Result<OwnedFd, Error> {
        reopen(&self.meta_file)
    }

    /// A descriptor of the arena to pass to a worker, for reading.
    pub fn data_ro(&self) -> Result<OwnedFd, Error> {
        reopen(&self.data_file)
    }

    /// A descriptor of the arena to pass to a trusted worker, for reading and writing.
    pub fn data_rw(&self) -> Result<OwnedFd, Error> {
        let path = Path::new("arena descriptor");
        rustix::io::fcntl_dupfd_cloexec(&self.data_file, 0).map_err(Error::io("duplicate", path))
    }

    /// Whether the arena lies on huge pages.
    pub fn huge_pages(&self) -> bool {
        self.huge
    }

    /// What was got and why, one line each, with what to do where that is not the best.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Removes the files. Whoever still has them mapped keeps the memory until it lets go.
    pub fn wipe(self) -> Result<(), Error> {
        for path in &self.paths {
            match fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The same file with rights to read alone.
fn reopen(file: &OwnedFd) -> Result<OwnedFd, Error> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).map_err(Error::io("open read-only", &path))
}

fn open_existing(path: &Path) -> Result<Option<File>, Error> {
    match OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("open", path)(error)),
    }
}

fn create_new(path: &Path, bytes: u64) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(Error::io("create", path))?;
    file.set_len(bytes).map_err(Error::io("size", path))?;
    Ok(file)
}

fn remove_if_there(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// A spec with what the machine says about its directory.
struct Place<'a> {
    spec: &'a MemorySpec,
    absolute: PathBuf,
    mounts: String,
    lock: Lock,
}

/// Places looked at to judge a kept arena.
const SAMPLES: usize = 64;

/// Where the arena came to lie.
struct Arena {
    file: File,
    path: PathBuf,
    map: Mapping,
    pages: Pages,
    huge: bool,
    /// Bytes from the front that have memory.
    done: u64,
    notes: Vec<String>,
}

impl Arena {
    /// Bytes that its file system must still have free.
    fn unclaimed_bytes(&self) -> u64 {
        if matches!(self.pages, Pages::Hugetlb(_)) { 0 } else { self.map.len() as u64 - self.done }
    }
}

impl Place<'_> {
    fn file(&self, extension: &str) -> PathBuf {
        self.absolute.join(format!("{}.{extension}", self.spec.name))
    }

    /// hugetlbfs mounts are shared by everybody on the machine, so the name says whose file it is.
    fn huge_file(&self, mount: &Path) -> PathBuf {
        let owner = self.absolute.to_string_lossy().replace('/', "%");
        mount.join(format!("{owner}%{}.data", self.spec.name))
    }

    fn huge_mounts(&self) -> Vec<HugeMount> {
        let mut found = numa::huge_mounts(&self.mounts, numa::default_huge_page_bytes());
        if let Some(dir) = &self.spec.hugetlbfs_dir {
            let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.clone());
            found.retain(|mount| dir.starts_with(&mount.dir));
            found.iter_mut().for_each(|mount| mount.dir.clone_from(&dir));
        }
        // The smallest pages first: they fit more geometries.
        found.sort_by_key(|mount| mount.page_bytes);
        found
    }

    fn data_paths(&self) -> Vec<PathBuf> {
        let huge = self.huge_mounts().into_iter().map(|mount| self.huge_file(&mount.dir));
        huge.chain([self.file("data")]).collect()
    }

    /// Takes the lock; gives the name of its file.
    fn lock(&mut self) -> Result<PathBuf, Error> {
        let path = self.file("lock");
        loop {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
            let file = file.map_err(Error::io("open lock file", &path))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(Error::Locked { path }),
                Err(error) => return Err(Error::io("lock", &path)(error)),
            }
            // Somebody may have wiped the file between our open and our lock: then ours has no name.
            let mine = file.metadata().map_err(Error::io("look at", &path))?.ino();
            if fs::metadata(&path).is_ok_and(|named| named.ino() == mine) {
                self.lock = Some(Arc::new(file));
                return Ok(path);
            }
        }
    }

    fn find(&self, layout: &Layout) -> Result<Found, Error> {
        let path = self.file("meta");
        let Some(meta) = open_existing(&path)? else { return Ok(Found::Nothing) };
        let unusable = |why: String, epoch| Ok(Found::Unusable { why, epoch });
        let mut page = [0; HEADER_BYTES];
        if let Err(error) = meta.read_exact_at(&mut page, 0) {
            if error.kind() != std::io::ErrorKind::UnexpectedEof {
                return Err(Error::io("read", &path)(error));
            }
            return unusable("the meta file is shorter than its header".into(), None);
        }
        let epoch_bytes = page[EPOCH_OFFSET..EPOCH_OFFSET + 8].try_into().expect("eight bytes");
        let header = match Header::decode(&page) {
            Ok(header) => header,
            Err(error) => {
                // Another version keeps its epoch in the same place; a damaged word fails its check.
                let epoch = epoch_of(u64::from_le_bytes(epoch_bytes));
                let epoch = epoch.filter(|_| matches!(error, HeaderError::Version { .. }));
                return unusable(format!("the meta file is not usable: {error}"), epoch);
            }
        };
        let epoch = Some(header.epoch);
        if header.layout != *layout {
            let (had, wants) = (header.layout.geometry, layout.geometry);
            return unusable(format!("the geometry was {had:?} and now is {wants:?}"), epoch);
        }
        let bytes = meta.metadata().map_err(Error::io("look at", &path))?.len();
        if bytes != layout.meta_bytes {
            return unusable(format!("the meta file has {bytes} bytes, not {}", layout.meta_bytes), epoch);
        }
        for data_path in self.data_paths() {
            let Some(data) = open_existing(&data_path)? else { continue };
            let facts = data.metadata().map_err(Error::io("look at", &data_path))?;
            if facts.ino() == header.data_inode && facts.len() == layout.geometry.data_bytes() {
                return Ok(Found::Usable { meta, data, data_path, header });
            }
        }
        unusable("the data file of this meta file is gone".into(), epoch)
    }

    /// Renames the meta file and every data file of this name; gives the new name of the meta file.
    fn set_aside(&self) -> Result<PathBuf, Error> {
        let aside = |path: &Path, number: u32| PathBuf::from(format!("{}.aside-{number}", path.display()));
        let mut paths = vec![self.file("meta")];
        paths.extend(self.data_paths());
        let free = |number: &u32| paths.iter().all(|path| !aside(path, *number).exists());
        let number = (1..u32::MAX).find(free).unwrap_or(u32::MAX);
        for path in paths.iter().filter(|path| path.exists()) {
            fs::rename(path, aside(path, number)).map_err(Error::io("set aside", path))?;
        }
        Ok(aside(&paths[0], number))
    }

    fn create(&self, layout: Layout, epoch: Epoch) -> Result<ShardMemory, Error> {
        // An arena without a meta file is what a killed creation leaves; nothing was ever sealed in it. Old
        // mappings of it, if any, keep their memory.
        for path in self.data_paths() {
            remove_if_there(&path)?;
        }
        let unnamed = self.file("meta.new");
        remove_if_there(&unnamed)?;
        let arena = self.create_arena(&layout)?;
        let built = self.create_meta(layout, epoch, &unnamed, &arena);
        let (meta_file, meta) = built.inspect_err(|_| {
            let _ = fs::remove_file(&arena.path);
            let _ = fs::remove_file(&unnamed);
        })?;
        let another = arena.file.try_clone().map_err(Error::io("duplicate", &arena.path))?;
        let mut memory = ShardMemory::assemble(
            layout,
            epoch,
            (meta_file, arena.file),
            (meta, arena.map),
            self.lock.clone(),
            false,
            (arena.done / layout.geometry.region_bytes) as u32,
        );
        memory.leave_to_grower(another, &arena.path, arena.pages, arena.done);
        memory.paths.push(arena.path);
        memory.huge = arena.huge;
        memory.notes = arena.notes;
        Ok(memory)
    }

    fn create_meta(
        &self,
        layout: Layout,
        epoch: Epoch,
        unnamed: &Path,
        arena: &Arena,
    ) -> Result<(File, Mapping), Error> {
        let file = create_new(unnamed, layout.meta_bytes)?;
        let map = Mapping::new(&file, layout.meta_bytes as usize, true).map_err(Error::io("map", unnamed))?;
        if let Some(node) = self.spec.numa_node {
            // Only nearness is lost when this fails, and the arena's note has said so.
            let _ = numa::bind(&map, node);
        }
        self.advise_meta(&map);
        allocate(&file, unnamed, 0, layout.headers)?;
        let table_bytes = layout.buckets * crate::table::BUCKET_BYTES;
        check_space(&file, unnamed, table_bytes + arena.unclaimed_bytes(), self.spec.promised_bytes)?;
        let data_inode = arena.file.metadata().map_err(Error::io("look at", &arena.path))?.ino();
        let header = Header { layout, data_inode, epoch };
        file.write_all_at(&header.encode(), 0).map_err(Error::io("write", unnamed))?;
        let path = self.file("meta");
        fs::rename(unnamed, &path).map_err(Error::io("name", &path))?;
        Ok((file, map))
    }

    /// Huge pages for the table alone: the slot headers are sparse and shall stay so.
    fn advise_meta(&self, meta: &Mapping) {
        if self.spec.huge == HugePages::Off {
            return;
        }
        if let Ok(layout) = Layout::new(self.spec.geometry) {
            let table = layout.table as usize;
            let _ = meta.advise_range(table, meta.len() - table, Advice::LinuxHugepage);
        }
    }

    fn create_arena(&self, layout: &Layout) -> Result<Arena, Error> {
        let mut notes = Vec::new();
        if self.spec.huge != HugePages::Off {
            for mount in self.huge_mounts() {
                match self.create_huge_arena(layout, &mount) {
                    Ok(arena) => return Ok(arena),
                    Err(why) => notes.push(why),
                }
            }
        }
        let path = self.file("data");
        self.create_small_arena(layout, &path, notes).inspect_err(|_| {
            let _ = fs::remove_file(&path);
        })
    }

    /// The arena on a hugetlbfs, or in words why not.
    fn create_huge_arena(&self, layout: &Layout, mount: &HugeMount) -> Result<Arena, String> {
        let bytes = layout.geometry.data_bytes();
        let (page_kib, dir) = (mount.page_bytes >> 10, mount.dir.display());
        if !bytes.is_multiple_of(mount.page_bytes) {
            return Err(format!("{dir}: {bytes} bytes are no multiple of its {page_kib} KiB pages"));
        }
        let (wanted, free) =
            (bytes / mount.page_bytes, numa::free_huge_pages(mount.page_bytes, self.spec.numa_node));
        if free < wanted {
            let more = wanted - free;
            return Err(format!(
                "{dir}: {wanted} pages of {page_kib} KiB wanted, {free} free; add {more} to \
                 /sys/kernel/mm/hugepages/hugepages-{page_kib}kB/nr_hugepages"
            ));
        }
        let (path, pages) = (self.huge_file(&mount.dir), Pages::Hugetlb(mount.page_bytes));
        let made = || {
            let file = create_new(&path, bytes)?;
            // From here on its pages are set apart for this file, though they do not come before they are asked for.
            let map = Mapping::new(&file, bytes as usize, true).map_err(Error::io("map", &path))?;
            let note = self.bind_note(&map);
            let _ = map.advise(Advice::LinuxDontDump);
            let place = grow::Place { file: &file, path: &path, map: &map, pages };
            let done = place.back_front(self.spec.ready_bytes)?;
            Ok::<_, Error>((file, map, done, note))
        };
        match made() {
            Ok((file, map, done, note)) => {
                let mut notes = Vec::from_iter(note);
                notes.push(format!("huge pages of {page_kib} KiB at {}", path.display()));
                Ok(Arena { file, path, map, pages, huge: true, done, notes })
            }
            Err(error) => {
                let _ = fs::remove_file(&path);
                let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                Err(format!("{error}: {source}"))
            }
        }
    }

    /// The arena on the tmpfs of the directory. `notes` says why it is not on a hugetlbfs.
    fn create_small_arena(
        &self,
        layout: &Layout,
        path: &Path,
        mut notes: Vec<String>,
    ) -> Result<Arena, Error> {
        let bytes = layout.geometry.data_bytes();
        let file = create_new(path, bytes)?;
        let map = Mapping::new(&file, bytes as usize, true).map_err(Error::io("map", path))?;
        // Before any page comes.
        notes.extend(self.bind_note(&map));
        let _ = map.advise(Advice::LinuxDontDump);
        check_space(&file, path, bytes, self.spec.promised_bytes)?;
        let option = numa::tmpfs_huge_option(&self.mounts, path);
        let why = match (&self.spec.huge, option.as_deref()) {
            (HugePages::Off, _) => Some("huge pages are off".to_owned()),
            (_, None) => Some(format!("{} is not on a tmpfs", path.display())),
            (_, Some("never")) => Some(format!(
                "no hugetlbfs with room (echo {} > /proc/sys/vm/nr_hugepages, and mount one), and the tmpfs \
                 of {} has huge=never (mount -o remount,huge=advise)",
                bytes.div_ceil(2 << 20),
                path.display()
            )),
            (_, Some(_)) => None,
        };
        let pages = if why.is_none() { Pages::Touched } else { Pages::Ordinary };
        if pages == Pages::Touched {
            let _ = map.advise(Advice::LinuxHugepage);
        }
        let place = grow::Place { file: &file, path, map: &map, pages };
        let done = place.back_front(self.spec.ready_bytes)?;
        let why = why.or_else(|| {
            // The front stands for the rest, which comes the same way.
            let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
            let got = numa::huge_bytes_in_smaps(&smaps, map.range(0, map.len()).as_ptr() as u64);
            let few =
                || format!("the tmpfs gave {got} of {done} bytes in huge pages; memory may be fragmented");
            (got * 2 < done).then(few)
        });
        match &why {
            None => notes.push(format!("huge pages by tmpfs at {}", path.display())),
            Some(why) if self.spec.huge == HugePages::Required => {
                notes.push(why.clone());
                return Err(Error::HugePages { why: notes.join("; ") });
            }
            Some(why) => notes.push(format!("ordinary 4 KiB pages: {why}")),
        }
        Ok(Arena { file, path: path.to_owned(), map, pages, huge: why.is_none(), done, notes })
    }

    /// How many regions from the front of a kept arena certainly have memory. Every other region with blocks gets
    /// it now: there are none unless the word of growth was damaged.
    fn grown(&self, layout: &Layout, meta: &Mapping, data: &grow::Place<'_>) -> Result<u32, Error> {
        let Geometry { regions, region_bytes, .. } = layout.geometry;
        let facts = data.file.metadata().map_err(Error::io("look at", data.path))?;
        let there = facts.blocks() * 512;
        if there >= layout.geometry.data_bytes() {
            return Ok(regions);
        }
        let said = grown_of(meta.word(GROWN_OFFSET).load(Ordering::Acquire));
        // Somebody may have punched holes into the file since.
        let grown = said.filter(|grown| *grown <= regions && u64::from(*grown) * region_bytes <= there);
        let grown = grown.unwrap_or(0);
        for region in grown..regions {
            if meta.word(layout.region(region)).load(Ordering::Acquire) != 0 {
                data.back(u64::from(region) * region_bytes, region_bytes)?;
            }
        }
        Ok(grown)
    }

    /// Whether a kept tmpfs file has huge pages, judged by a few places.
    fn has_huge_pages(&self, map: &Mapping, path: &Path, bytes: u64) -> bool {
        let option = numa::tmpfs_huge_option(&self.mounts, path);
        if self.spec.huge == HugePages::Off || option.is_none_or(|option| option == "never") {
            return false;
        }
        let _ = map.advise(Advice::LinuxHugepage);
        // Beyond what has grown there may be holes, which must not be touched.
        let pages = (bytes / HUGE_PAGE) as usize;
        if pages == 0 {
            return false;
        }
        let step = pages.div_ceil(SAMPLES);
        for page in (0..pages).step_by(step) {
            map.word(page * HUGE_PAGE as usize).load(Ordering::Relaxed);
        }
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
        let got = numa::huge_bytes_in_smaps(&smaps, map.range(0, map.len()).as_ptr() as u64);
        got * 2 >= pages.div_ceil(step) as u64 * HUGE_PAGE
    }

    fn bind_note(&self, map: &Mapping) -> Option<String> {
        let node = self.spec.numa_node?;
        match numa::bind(map, node) {
            Ok(Bound::Strict | Bound::SingleNode) => None,
            Ok(Bound::Preferred) => Some(format!("pages prefer NUMA node {node} but are not bound to it")),
            Err(error) => Some(format!("pages are not bound to NUMA node {node}: {error}")),
        }
    }

    fn adopt(
        &self,
        layout: Layout,
        epoch: Epoch,
        meta_file: File,
        data_file: File,
        data_path: PathBuf,
    ) -> Result<ShardMemory, Error> {
        let meta_path = self.file("meta");
        let bytes = layout.geometry.data_bytes();
        let meta = Mapping::new(&meta_file, layout.meta_bytes as usize, true)
            .map_err(Error::io("map", &meta_path))?;
        let data = Mapping::new(&data_file, bytes as usize, true).map_err(Error::io("map", &data_path))?;
        let on_hugetlbfs = data_path != self.file("data");
        let mut notes = Vec::from_iter(self.bind_note(&data));
        let _ = data.advise(Advice::LinuxDontDump);
        let pages = if on_hugetlbfs {
            let stat = rustix::fs::fstatvfs(&data_file).map_err(Error::io("look at", &data_path))?;
            Pages::Hugetlb(stat.f_bsize.max(HUGE_PAGE))
        } else {
            let option = numa::tmpfs_huge_option(&self.mounts, &data_path);
            let touched = self.spec.huge != HugePages::Off && option.is_some_and(|option| option != "never");
            if touched { Pages::Touched } else { Pages::Ordinary }
        };
        let place = grow::Place { file: &data_file, path: &data_path, map: &data, pages };
        let grown = self.grown(&layout, &meta, &place)?;
        let done = u64::from(grown) * layout.geometry.region_bytes;
        // Warm memory outweighs the wish for ordinary pages, but not the refusal to go without huge ones.
        let huge = on_hugetlbfs || self.has_huge_pages(&data, &data_path, done);
        if self.spec.huge == HugePages::Required && !huge && done > 0 {
            let path = data_path.display();
            return Err(Error::HugePages {
                why: format!("{path} was made without; remove it to start anew"),
            });
        }
        self.advise_meta(&meta);
        allocate(&meta_file, &meta_path, 0, layout.headers)?;
        notes.push(format!("arena kept from before at {}", data_path.display()));
        meta.word(EPOCH_OFFSET).store(epoch_word(epoch), Ordering::SeqCst);
        let another = data_file.try_clone().map_err(Error::io("duplicate", &data_path))?;
        let mut memory = ShardMemory::assemble(
            layout,
            epoch,
            (meta_file, data_file),
            (meta, data),
            self.lock.clone(),
            true,
            grown,
        );
        memory.leave_to_grower(another, &data_path, pages, done);
        memory.huge = huge;
        memory.paths.push(data_path);
        memory.notes = notes;
        Ok(memory)
    }
}

/// Fails before any page is taken when the file system says that it has no room for these bytes, beside what it
/// owes to others.
fn check_space(file: &File, path: &Path, bytes: u64, promised: u64) -> Result<(), Error> {
    match rustix::fs::fstatvfs(file) {
        Ok(stat) if stat.f_blocks > 0 && stat.f_bavail * stat.f_frsize < bytes.saturating_add(promised) => {
            let mut error = space_error(file, path, bytes);
            if let Error::NoSpace { free, .. } = &mut error {
                *free = free.saturating_sub(promised);
            }
            Err(error)
        }
        _ => Ok(()),
    }
}
