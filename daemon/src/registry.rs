//! What blocks mean, node-wide: registered scopes and slices and their numbers.
//!
//! A binding has a number for this life of the daemon (dense, the same on every shard) and a tag for ever
//! (in slot headers and on disk). The registry remembers bindings over restarts in a small log beside the
//! durable data, so that recovered blocks have a tenant and a model again before any worker returns. The
//! tenant's salt is never written: the scope id, which it went into, is.
//!
//! ```text
//!  {"format":2}                              one line per binding; a new one is appended and synced before
//!  {"tag":1,"scope_id":"ab..","scope":{..}}  its worker is answered, by a thread that may wait for the disk
//! ```
//! What peers say of bindings is believed as far as it must be. A binding that a peer introduced is written down when a block
//! of it has come; those that no block came of are few for each peer, and all of peers together leave numbers to the
//! workers of this node. A scope id does not tell what a peer's record of it is worth, since the salt that went into it
//! is not in the record: when a worker of this node registers, its own record counts.
//!
//! What the log remembers gets a number when a recovered block or a worker names it. When a start has seen
//! everything that is kept, the rest is forgotten: there is no block that it could speak of.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use kv_block::code::Code;
use kv_block::{BindingId, BindingTag, BlockKey, Fault, Namer, Record, Scope, ScopeId, SequenceHash, Slice};
use rustix::fs::RenameFlags;
use serde::{Deserialize, Serialize};

use crate::private;

/// One registered scope, slice and block length.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bound {
    /// Number in this life.
    pub id: BindingId,
    /// What is kept of it.
    pub kept: Kept,
    /// `None` for a binding that only its tag is known of.
    scope_id: Option<ScopeId>,
    namer: Option<Namer>,
}

/// What is kept of a binding over restarts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// Name for ever.
    pub tag: u64,
    /// Identity of the scope, hexadecimal.
    pub scope_id: String,
    /// Length of a block in bytes.
    pub block_bytes: u32,
    /// What the blocks mean, without the salt.
    pub scope: Scope,
    /// Which part of the tensor.
    pub slice: Slice,
}

impl Kept {
    /// Whether the tag is that of the rest.
    fn is_itself(&self) -> bool {
        let scope_id = self.scope_id.parse::<ScopeId>();
        scope_id.is_ok_and(|scope_id| scope_id.binding_tag(&self.slice, self.block_bytes).0 == self.tag)
    }
}

impl Bound {
    fn new(id: BindingId, kept: Kept) -> Self {
        let scope_id = kept.scope_id.parse().ok();
        let namer = scope_id.map(|scope: ScopeId| scope.namer(&kept.slice));
        Self { id, kept, scope_id, namer }
    }

    /// The binding as the shards know it.
    pub fn binding(&self) -> kv_node::Binding {
        kv_node::Binding {
            id: self.id,
            tag: BindingTag(self.kept.tag),
            block_bytes: self.kept.block_bytes,
            tenant: self.kept.scope.tenant.clone(),
        }
    }

    /// Identity of the scope; `None` for a binding that only its tag is known of.
    pub fn scope_id(&self) -> Option<ScopeId> {
        self.scope_id
    }

    /// What gives blocks under this binding their keys; `None` as for [`Bound::scope_id`].
    pub fn namer(&self) -> Option<&Namer> {
        self.namer.as_ref()
    }

    /// The key of a block under this binding.
    pub fn key(&self, hash: &SequenceHash) -> Option<BlockKey> {
        Some(self.namer()?.key(hash))
    }
}

/// All bindings of a node.
pub struct Registry {
    state: RwLock<State>,
    /// Taken before the state, never after it: whoever looks a binding up does not wait for the disk.
    log: Mutex<Log>,
}

#[derive(Default)]
struct State {
    by_number: Vec<Arc<Bound>>,
    by_tag: HashMap<u64, BindingId>,
    /// Remembered from an earlier life and not named in this one, by tag.
    asleep: HashMap<u64, Kept>,
    /// Named and not in the log yet, in order.
    unsaved: Vec<Arc<Bound>>,
    /// Introduced by peers and never registered here.
    introduced: HashMap<BindingId, Introduced>,
    /// How many of those of each peer no block has come of.
    promised: HashMap<String, usize>,
    /// Recovered blocks that no number was left for.
    unnumbered: u64,
}

/// How a binding that no worker of this node registered got here.
struct Introduced {
    /// By which peer.
    by: String,
    /// Whether a block of it has come.
    came: bool,
}

/// The file.
#[derive(Default)]
struct Log {
    /// `None` keeps nothing.
    path: Option<PathBuf>,
    /// Where the next line goes; `None` when the file must be written anew first.
    file: Option<File>,
    /// Lines found, when the file was whole.
    lines: Option<usize>,
}

/// The first line.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    format: u32,
}

/// All of the file as format 1 had it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Format1 {
    format: u32,
    bindings: Vec<Kept>,
}

const FORMAT: u32 = 2;
const BINDINGS_MAX: usize = u16::MAX as usize;
/// Numbers that bindings introduced by peers may have, all together: the rest is for this node's workers.
const INTRODUCED_MAX: usize = BINDINGS_MAX / 2;
/// Bindings of one peer that no block has come of.
const PROMISED_MAX: usize = 256;

impl Registry {
    /// The registry kept in `path`, or an empty one. A file that is not whole is set aside; the second value
    /// says so. What can be read of it counts.
    pub fn open(path: Option<PathBuf>) -> (Self, Option<String>) {
        let mut state = State::default();
        let mut log = Log { path, ..Log::default() };
        let mut note = None;
        if let Some(path) = log.path.clone() {
            let Parsed { bindings, lines, broken } = read(&path);
            state.asleep = bindings.into_iter().map(|kept| (kept.tag, kept)).collect();
            log.lines = lines;
            if let Some(why) = broken {
                let shown = path.display();
                note = Some(match set_aside(&path) {
                    Ok(aside) => format!("{shown} was set aside as {}: {why}", aside.display()),
                    Err(error) => {
                        // Whatever it is, it is not to be written over.
                        log.path = None;
                        format!("{shown}: {why}; it could not be set aside, so no binding is kept: {error}")
                    }
                });
            }
        }
        (Self { state: RwLock::new(state), log: Mutex::new(log) }, note)
    }

    fn read_state(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every binding with a number, by number.
    pub fn all(&self) -> Vec<Arc<Bound>> {
        self.read_state().by_number.clone()
    }

    /// The binding with this number.
    pub fn get(&self, number: u32) -> Option<Arc<Bound>> {
        self.read_state().by_number.get(number as usize).cloned()
    }

    /// The binding with this tag, if it has a number in this life.
    pub fn by_tag(&self, tag: BindingTag) -> Option<Arc<Bound>> {
        let state = self.read_state();
        let id = state.by_tag.get(&tag.0)?;
        state.by_number.get(usize::from(id.0)).cloned()
    }

    /// Makes a scope and slice known. When the second value says so, the shards must hear of it, and it is
    /// kept over a restart only after [`Registry::save`].
    pub fn register(
        &self,
        scope: &Scope,
        slice: &Slice,
        block_bytes: u32,
    ) -> Result<(Arc<Bound>, bool), Fault> {
        let scope_id = scope.id();
        let tag = scope_id.binding_tag(slice, block_bytes);
        let mut state = self.write_state();
        let known = state.by_tag.get(&tag.0).map(|id| Arc::clone(&state.by_number[usize::from(id.0)]));
        if let Some(known) = known {
            let kept = kept(scope, scope_id, slice, block_bytes, tag);
            if known.kept == kept {
                if state.keep_promise(known.id) {
                    state.unsaved.push(Arc::clone(&known));
                }
                state.introduced.remove(&known.id);
                let unsaved = state.unsaved.iter().any(|one| one.id == known.id);
                return Ok((known, unsaved));
            }
            if known.scope_id().is_some() && known.kept.scope.tenant != kept.scope.tenant {
                // A peer had named another tenant. Who pays for the blocks under that number cannot change any more,
                // but no block comes to stand there from here on.
                let bound = state.add(kept).ok_or_else(no_number)?;
                state.unsaved.push(Arc::clone(&bound));
                return Ok((bound, true));
            }
            // Known by its tag alone, from a block that was recovered, or by what a peer says: now it has its meaning.
            state.keep_promise(known.id);
            state.introduced.remove(&known.id);
            return Ok((state.rename(known.id, kept), true));
        }
        let kept = kept(scope, scope_id, slice, block_bytes, tag);
        let bound = state.add(kept).ok_or_else(no_number)?;
        if state.asleep.remove(&tag.0).as_ref() != Some(&bound.kept) {
            state.unsaved.push(Arc::clone(&bound));
        }
        Ok((bound, true))
    }

    /// Makes known what a peer says of a binding. As [`Registry::register`], without the tenant's salt: the scope id,
    /// which it went into, is what counts. It is kept over a restart when a block of it came: [`Registry::came`].
    pub fn introduce(&self, by: &str, mut kept: Kept) -> Result<(Arc<Bound>, bool), Fault> {
        let bad = |text: String| Fault::new(Code::BadRequest, text);
        // Ours to forget, should the other node have told it.
        kept.scope.salt.clear();
        kept.scope.validate().map_err(|error| bad(error.to_string()))?;
        kept.slice.validate().map_err(|error| bad(error.to_string()))?;
        if !kept.is_itself() {
            let text = format!("the tag {:016x} is not that of the scope, slice and length told", kept.tag);
            return Err(bad(text));
        }
        let mut state = self.write_state();
        let known = state.by_tag.get(&kept.tag).map(|id| Arc::clone(&state.by_number[usize::from(id.0)]));
        if let Some(known) = known.as_ref().filter(|known| known.scope_id().is_some()) {
            return Ok((Arc::clone(known), false));
        }
        if let Some(known) = known {
            // Blocks of it are here already.
            return Ok((state.rename(known.id, kept), true));
        }
        if let Some(ours) = state.asleep.remove(&kept.tag) {
            let Some(bound) = state.add(ours.clone()) else {
                state.asleep.insert(kept.tag, ours);
                return Err(no_number());
            };
            return Ok((bound, true));
        }
        let promised = state.promised.get(by).copied().unwrap_or(0);
        if promised >= PROMISED_MAX || state.introduced.len() >= INTRODUCED_MAX {
            let text = format!(
                "peers introduced {} scopes and slices, and of {promised} that {by} introduced no block has come",
                state.introduced.len()
            );
            return Err(Fault::new(Code::TooManyBindings, text));
        }
        let bound = state.add(kept).ok_or_else(no_number)?;
        state.introduced.insert(bound.id, Introduced { by: by.to_owned(), came: false });
        *state.promised.entry(by.to_owned()).or_default() += 1;
        Ok((bound, true))
    }

    /// A block of a binding is here. Says whether there is something to save.
    pub fn came(&self, id: BindingId) -> bool {
        let mut state = self.write_state();
        if state.keep_promise(id) {
            let bound = Arc::clone(&state.by_number[usize::from(id.0)]);
            state.unsaved.push(bound);
        }
        !state.unsaved.is_empty()
    }

    /// The binding of a recovered block; one without a meaning when only its tag is known, and `None`, which
    /// is counted, when there is no number left.
    pub fn recovered(&self, record: &Record) -> Option<Arc<Bound>> {
        let mut state = self.write_state();
        let tag = record.tag.0;
        if let Some(id) = state.by_tag.get(&tag) {
            return Some(Arc::clone(&state.by_number[usize::from(id.0)]));
        }
        let kept = state.asleep.get(&tag).cloned().unwrap_or_else(|| Kept {
            tag,
            scope_id: String::new(),
            block_bytes: record.bytes,
            scope: Scope { model: "unknown".into(), tenant: "unknown".into(), ..Scope::default() },
            slice: Slice::whole(1, 1),
        });
        let bound = state.add(kept);
        match bound {
            Some(_) => drop(state.asleep.remove(&tag)),
            None => state.unnumbered += 1,
        }
        bound
    }

    /// Recovered blocks that found no number.
    pub fn unnumbered(&self) -> u64 {
        self.read_state().unnumbered
    }

    /// The start is over. If it has seen every block that is kept, what none of them named is forgotten;
    /// gives how many.
    pub fn settle(&self, seen_all: bool) -> usize {
        let mut log = self.lock_log();
        let mut state = self.write_state();
        let mut forgotten = 0;
        if seen_all && state.unnumbered == 0 {
            forgotten = std::mem::take(&mut state.asleep).len();
        }
        drop(state);
        let all = self.to_keep();
        log.settle(&all).unwrap_or_else(|error| log.failed(&error));
        forgotten
    }

    /// Makes what was registered so far outlive this process. Waits for the disk; what several register at once
    /// goes out together.
    pub fn save(&self) {
        let mut log = self.lock_log();
        let unsaved = self.read_state().unsaved.clone();
        if unsaved.is_empty() {
            return;
        }
        let lines: Vec<_> = unsaved.iter().map(|bound| &bound.kept).collect();
        let written = if log.file.is_some() { log.append(&lines) } else { log.rewrite(&self.to_keep()) };
        written.unwrap_or_else(|error| log.failed(&error));
        // When it failed, the next one writes all of it again.
        self.write_state().unsaved.drain(..unsaved.len());
    }

    fn lock_log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that the log should hold.
    fn to_keep(&self) -> Vec<Kept> {
        let state = self.read_state();
        let is_kept = |bound: &&Arc<Bound>| {
            let promised = state.introduced.get(&bound.id).is_some_and(|introduced| !introduced.came);
            // One that a worker registered anew stands there twice.
            let current = state.by_tag.get(&bound.kept.tag) == Some(&bound.id);
            bound.scope_id().is_some() && current && !promised
        };
        let named = state.by_number.iter().filter(is_kept);
        named.map(|bound| bound.kept.clone()).chain(state.asleep.values().cloned()).collect()
    }
}

impl State {
    /// Gives the next number; `None` when all are taken.
    fn add(&mut self, kept: Kept) -> Option<Arc<Bound>> {
        let number = u16::try_from(self.by_number.len()).ok();
        let id = BindingId(number.filter(|number| usize::from(*number) < BINDINGS_MAX)?);
        self.by_tag.insert(kept.tag, id);
        let bound = Arc::new(Bound::new(id, kept));
        self.by_number.push(Arc::clone(&bound));
        Some(bound)
    }

    /// There are blocks of a binding, or will be. Says whether only a peer had promised them so far.
    fn keep_promise(&mut self, id: BindingId) -> bool {
        let Some(introduced) = self.introduced.get_mut(&id).filter(|introduced| !introduced.came) else {
            return false;
        };
        introduced.came = true;
        if let Some(promised) = self.promised.get_mut(&introduced.by) {
            *promised -= 1;
        }
        true
    }

    /// Gives a number another meaning, to be saved.
    fn rename(&mut self, id: BindingId, kept: Kept) -> Arc<Bound> {
        let named = Arc::new(Bound::new(id, kept));
        self.by_number[usize::from(id.0)] = Arc::clone(&named);
        self.unsaved.push(Arc::clone(&named));
        named
    }
}

impl Log {
    /// Goes on behind what is there when that is just `all`; else writes it anew.
    fn settle(&mut self, all: &[Kept]) -> io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        if self.lines != Some(all.len()) {
            return self.rewrite(all);
        }
        self.file = Some(private::file(OpenOptions::new().append(true), path)?);
        Ok(())
    }

    fn rewrite(&mut self, all: &[Kept]) -> io::Result<()> {
        self.file = None;
        let Some(path) = &self.path else { return Ok(()) };
        let fresh = path.with_extension("new");
        let file = private::file(OpenOptions::new().create(true).truncate(true), &fresh)?;
        let mut out = io::BufWriter::new(&file);
        write_line(&mut out, &Head { format: FORMAT })?;
        all.iter().try_for_each(|kept| write_line(&mut out, kept))?;
        out.flush()?;
        drop(out);
        file.sync_all()?;
        std::fs::rename(&fresh, path)?;
        sync_dir(path)?;
        self.file = Some(file);
        Ok(())
    }

    fn append(&mut self, lines: &[&Kept]) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut bytes = Vec::new();
        lines.iter().try_for_each(|kept| write_line(&mut bytes, kept))?;
        file.write_all(&bytes)?;
        file.sync_data()
    }

    fn failed(&mut self, error: &io::Error) {
        self.file = None;
        let path = self.path.as_deref().unwrap_or(Path::new("")).display();
        tracing::warn!(%path, %error, "the registry was not saved; after a restart its tenants are unknown until workers return");
    }
}

fn write_line(out: &mut impl io::Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}

fn sync_dir(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(dir) => File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

fn no_number() -> Fault {
    let text = format!("{BINDINGS_MAX} scopes and slices are registered, as many as there are numbers");
    Fault::new(Code::TooManyBindings, text)
}

fn kept(scope: &Scope, scope_id: ScopeId, slice: &Slice, block_bytes: u32, tag: BindingTag) -> Kept {
    let scope = Scope { salt: String::new(), ..scope.clone() };
    Kept { tag: tag.0, scope_id: scope_id.to_string(), block_bytes, scope, slice: slice.clone() }
}

/// Renames a file to the first `<stem>.aside-<n>` that there is not, closed to others like the rest.
fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let mut number = 1;
    loop {
        let aside = path.with_extension(format!("aside-{number}"));
        let cwd = rustix::fs::CWD;
        match rustix::fs::renameat_with(cwd, path, cwd, &aside, RenameFlags::NOREPLACE) {
            Err(rustix::io::Errno::EXIST) => number += 1,
            Err(error) => return Err(error.into()),
            Ok(()) => {
                // It may be a directory; and where it is, it is in a directory that is closed.
                let _ = private::file(&mut OpenOptions::new(), &aside);
                return Ok(aside);
            }
        }
    }
}

fn read(path: &Path) -> Parsed {
    match std::fs::read(path) {
        Ok(bytes) => parse(&bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Parsed::default(),
        Err(error) => Parsed { broken: Some(error.to_string()), ..Parsed::default() },
    }
}

/// What a registry file holds.
#[derive(Debug, Default)]
pub struct Parsed {
    /// The bindings that can be read, in order.
    pub bindings: Vec<Kept>,
    /// How many lines there are for them; `None` when the file must be written anew before it grows.
    pub lines: Option<usize>,
    /// What is wrong with it. An end that was being written when the process ended is not.
    pub broken: Option<String>,
}

/// Reads the bytes of a registry file.
pub fn parse(bytes: &[u8]) -> Parsed {
    if let Ok(Format1 { format: 1, mut bindings }) = serde_json::from_slice(bytes) {
        bindings.retain(Kept::is_itself);
        return Parsed { bindings, ..Parsed::default() };
    }
    let mut parsed = Parsed::default();
    let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
    let head = lines.next().map(serde_json::from_slice::<Head>);
    parsed.broken = match head {
        Some(Ok(Head { format: FORMAT })) => None,
        Some(Ok(Head { format })) => Some(format!("it has format {format}, this version reads {FORMAT}")),
        Some(Err(error)) => Some(error.to_string()),
        None => Some("it is empty".to_owned()),
    };
    if parsed.broken.is_some() {
        return parsed;
    }
    let mut torn = !bytes.ends_with(b"\n");
    for (at, line) in lines.enumerate() {
        torn = !line.ends_with(b"\n");
        match serde_json::from_slice::<Kept>(line) {
            _ if torn => {}
            Ok(kept) if kept.is_itself() => parsed.bindings.push(kept),
            Ok(_) => parsed.broken = Some(format!("line {}: its tag is of another binding", at + 2)),
            Err(error) => parsed.broken = Some(format!("line {}: {error}", at + 2)),
        }
    }
    parsed.lines = (!torn && parsed.broken.is_none()).then_some(parsed.bindings.len());
    parsed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(salt: &str) -> Scope {
        Scope { model: "m".into(), tenant: "t".into(), salt: salt.into(), ..Scope::default() }
    }

    fn slice() -> Slice {
        Slice::whole(1, 2)
    }

    fn record(tag: BindingTag) -> Record {
        Record {
            key: BlockKey([1; 16]),
            checksum: kv_block::Checksum(0),
            bytes: 4096,
            tag,
            priority: kv_block::Priority::Normal,
            expires_at: 0,
        }
    }

    /// A registry as a start leaves it, with these bindings saved.
    fn saved(path: &Path, salts: &[&str]) -> Registry {
        let (registry, note) = Registry::open(Some(path.to_owned()));
        assert_eq!(note, None);
        registry.settle(false);
        for salt in salts {
            registry.register(&scope(salt), &slice(), 4096).unwrap();
            registry.save();
        }
        registry
    }

    fn tag(salt: &str) -> BindingTag {
        scope(salt).id().binding_tag(&slice(), 4096)
    }

    fn tenant_after_restart(path: &Path, salt: &str) -> String {
        let (registry, _) = Registry::open(Some(path.to_owned()));
        registry.recovered(&record(tag(salt))).unwrap().kept.scope.tenant.clone()
    }

    #[test]
    fn bindings_outlive_a_restart_and_salts_do_not_reach_the_file() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        let registry = saved(&path, &["s3cret"]);
        let (_, new) = registry.register(&scope("s3cret"), &slice(), 4096).unwrap();
        assert!(!new, "it is known and saved");
        assert!(!std::fs::read_to_string(&path).unwrap().contains("s3cret"));
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let (again, note) = Registry::open(Some(path.clone()));
        assert_eq!((note, again.all().len()), (None, 0), "a number is for what is named");
        let bound = again.recovered(&record(tag("s3cret"))).unwrap();
        assert_eq!(bound.scope_id(), Some(scope("s3cret").id()));
        assert_eq!(bound.kept.scope.tenant, "t");
        let (same, new) = again.register(&scope("s3cret"), &slice(), 4096).unwrap();
        assert_eq!((same.id, new), (bound.id, false));
        let (other, new) = again.register(&scope("other"), &slice(), 4096).unwrap();
        assert!(new && other.id != bound.id, "another salt is another scope");
    }

    #[test]
    fn what_no_block_names_is_forgotten_once_everything_was_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        drop(saved(&path, &["used", "unused"]));
        for (seen_all, wanted) in [(false, "t"), (true, "unknown")] {
            let (registry, _) = Registry::open(Some(path.clone()));
            registry.recovered(&record(tag("used"))).unwrap();
            assert_eq!(registry.settle(seen_all), usize::from(seen_all));
            assert_eq!(tenant_after_restart(&path, "unused"), wanted);
            assert_eq!(tenant_after_restart(&path, "used"), "t");
        }
        let registry = saved(&path, &["unused"]);
        assert_eq!(registry.all()[0].kept.tag, tag("unused").0, "it comes back under the same tag");
    }

    #[test]
    fn numbers_run_out_and_are_never_given_twice() {
        let (registry, _) = Registry::open(None);
        for number in 0..BINDINGS_MAX as u64 {
            let bound = registry.recovered(&record(BindingTag(number))).unwrap();
            assert_eq!(u64::from(bound.id.0), number);
        }
        assert_eq!(registry.recovered(&record(BindingTag(1 << 40))), None);
        assert_eq!(registry.recovered(&record(BindingTag(1 << 41))), None);
        assert_eq!((registry.unnumbered(), registry.all().len()), (2, BINDINGS_MAX));
        assert_eq!(registry.recovered(&record(BindingTag(7))).unwrap().id, BindingId(7));
        let refused = registry.register(&scope("late"), &slice(), 4096).unwrap_err();
        assert_eq!(refused.code, Code::TooManyBindings);
    }

    #[test]
    fn a_binding_without_a_number_is_not_forgotten_while_a_block_has_its_tag() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        drop(saved(&path, &["late"]));
        let (registry, _) = Registry::open(Some(path.clone()));
        for number in 0..BINDINGS_MAX as u64 {
            let found = registry.recovered(&record(BindingTag(number)));
            assert!(found.is_some(), "what is only remembered takes no number");
        }
        assert_eq!(registry.recovered(&record(tag("late"))), None);
        assert_eq!(registry.settle(true), 0);
        assert_eq!(tenant_after_restart(&path, "late"), "t");
    }

    #[test]
    fn a_torn_last_line_is_ignored_and_the_next_one_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        drop(saved(&path, &["a", "b"]));
        let whole = std::fs::read(&path).unwrap();
        let last = whole[..whole.len() - 1].iter().rposition(|byte| *byte == b'\n').unwrap() + 1;
        for end in last..whole.len() {
            std::fs::write(&path, &whole[..end]).unwrap();
            drop(saved(&path, &["c"]));
            let found = parse(&std::fs::read(&path).unwrap());
            assert_eq!((found.broken, found.bindings.len()), (None, 2), "cut at {end}");
        }
    }

    #[test]
    fn a_binding_costs_its_own_line_and_a_whole_file_is_not_written_again() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        drop(saved(&path, &["a"]));
        let before = std::fs::metadata(&path).unwrap();
        drop(saved(&path, &["b"]));
        let after = std::fs::metadata(&path).unwrap();
        assert_eq!(before.ino(), after.ino());
        assert!(after.len() > before.len());
        assert_eq!(tenant_after_restart(&path, "a"), "t");
    }

    #[test]
    fn who_looks_a_binding_up_does_not_wait_for_the_disk() {
        let (registry, _) = Registry::open(None);
        let saving = registry.lock_log();
        let (bound, new) = registry.register(&scope("s"), &slice(), 4096).unwrap();
        assert!(new);
        assert_eq!(registry.get(0), Some(bound));
        let (_, unsaved) = registry.register(&scope("s"), &slice(), 4096).unwrap();
        assert!(unsaved, "who comes second waits for the same line");
        drop(saving);
        registry.save();
        assert!(!registry.register(&scope("s"), &slice(), 4096).unwrap().1);
    }

    #[test]
    fn broken_files_are_set_aside_beside_each_other_and_what_can_be_read_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        drop(saved(&path, &["a"]));
        let line = std::fs::read_to_string(&path).unwrap();
        let other_tag = line.replace("\"block_bytes\":4096", "\"block_bytes\":4097");
        let texts = ["{", "", "{\"format\":3}\n", &other_tag, &format!("{line}nonsense\n{line}")];
        for (number, text) in (1..).zip(texts) {
            std::fs::write(&path, text).unwrap();
            let (registry, note) = Registry::open(Some(path.clone()));
            assert!(note.unwrap().contains("set aside"), "{text}");
            let aside = path.with_extension(format!("aside-{number}"));
            assert_eq!(std::fs::read_to_string(aside).unwrap(), text);
            let tenant = &registry.recovered(&record(tag("a"))).unwrap().kept.scope.tenant;
            assert_eq!(tenant, if number == 5 { "t" } else { "unknown" });
        }
        std::fs::create_dir(&path).unwrap();
        assert!(Registry::open(Some(path.clone())).1.unwrap().contains("aside-6"));
        assert!(!path.exists());
    }

    #[test]
    fn the_first_format_is_read_and_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        let kept = kept(&scope("a"), scope("a").id(), &slice(), 4096, tag("a"));
        let text = serde_json::json!({ "format": 1, "bindings": [kept] }).to_string();
        std::fs::write(&path, text).unwrap();
        drop(saved(&path, &[]));
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("{\"format\":2}\n"));
        assert_eq!(tenant_after_restart(&path, "a"), "t");
    }

    /// What a peer says of a scope: its identity, and a record that may be of another.
    fn told(salt: &str, tenant: &str) -> Kept {
        let record = Scope { tenant: tenant.into(), ..scope("") };
        kept(&record, scope(salt).id(), &slice(), 4096, tag(salt))
    }

    #[test]
    fn what_a_worker_registers_counts_before_what_a_peer_said_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        let registry = saved(&path, &[]);
        let (false_one, new) = registry.introduce("evil", told("s", "somebody-else")).unwrap();
        assert!(new);
        registry.came(false_one.id);
        registry.save();
        assert_eq!(tenant_after_restart(&path, "s"), "somebody-else");
        let (own, new) = registry.register(&scope("s"), &slice(), 4096).unwrap();
        registry.save();
        assert!(new && own.id != false_one.id, "what stands under a number has its payer for good");
        assert_eq!((own.kept.scope.tenant.as_str(), own.kept.tag), ("t", false_one.kept.tag));
        assert_eq!(registry.recovered(&record(tag("s"))).unwrap().id, own.id);
        assert_eq!(registry.register(&scope("s"), &slice(), 4096).unwrap(), (Arc::clone(&own), false));
        let (again, new) = registry.introduce("evil", told("s", "somebody-else")).unwrap();
        assert_eq!((again.kept.scope.tenant.as_str(), new), ("t", false), "nor does it change any more");
        assert_eq!(tenant_after_restart(&path, "s"), "t");
        registry.settle(false);
        drop(registry);
        assert_eq!(tenant_after_restart(&path, "s"), "t");
        // What changes nothing for those who pay is put right under the same number.
        let (registry, _) = Registry::open(None);
        let mut nonsense = told("s", "t");
        nonsense.scope.model = "nonsense".into();
        let (told, _) = registry.introduce("evil", nonsense).unwrap();
        let (own, new) = registry.register(&scope("s"), &slice(), 4096).unwrap();
        assert_eq!((own.id, own.kept.scope.model.as_str(), new), (told.id, "m", true));
    }

    #[test]
    fn what_was_remembered_counts_before_what_a_peer_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        drop(saved(&path, &["s"]));
        let (registry, _) = Registry::open(Some(path.clone()));
        let (bound, new) = registry.introduce("evil", told("s", "somebody-else")).unwrap();
        assert_eq!((bound.kept.scope.tenant.as_str(), new), ("t", true));
    }

    #[test]
    fn a_peer_introduces_few_bindings_that_no_block_comes_of() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        let registry = saved(&path, &[]);
        let introduce =
            |by: &str, salt: &str| registry.introduce(by, told(salt, "t")).map(|known| known.0.id);
        let first = introduce("b", "0").unwrap();
        for number in 1..PROMISED_MAX {
            introduce("b", &number.to_string()).unwrap();
        }
        assert_eq!(introduce("b", "more").unwrap_err().code, Code::TooManyBindings);
        assert_eq!(introduce("b", "7").unwrap(), BindingId(7), "what is known is no more of them");
        introduce("c", "of another peer").unwrap();
        assert!(registry.came(first));
        registry.save();
        introduce("b", "more").unwrap();
        registry.register(&scope("8"), &slice(), 4096).unwrap();
        introduce("b", "and more").unwrap();
        assert_eq!(introduce("b", "too many").unwrap_err().code, Code::TooManyBindings);
        registry.save();
        // Those that nothing came of are not kept.
        for settled in [false, true] {
            if settled {
                registry.settle(false);
            }
            let found = parse(&std::fs::read(&path).unwrap()).bindings;
            let tags: Vec<_> = found.iter().map(|kept| kept.tag).collect();
            assert_eq!(tags, [tag("0").0, tag("8").0]);
        }
    }

    #[test]
    fn peers_leave_numbers_to_the_workers_of_this_node() {
        let (registry, _) = Registry::open(None);
        for number in 0..INTRODUCED_MAX {
            let (bound, _) = registry.introduce("b", told(&number.to_string(), "t")).unwrap();
            registry.came(bound.id);
        }
        assert_eq!(registry.introduce("c", told("late", "t")).unwrap_err().code, Code::TooManyBindings);
        registry.register(&scope("late"), &slice(), 4096).unwrap();
    }

    #[test]
    fn a_peer_introduces_nothing_that_a_worker_could_not_register() {
        let (registry, _) = Registry::open(None);
        let changes: [fn(&mut Kept); 5] = [
            |kept| kept.scope.tenant = "Not a label".into(),
            |kept| kept.scope.model.clear(),
            |kept| kept.scope.lora = "x".repeat(Scope::FIELD_BYTES_MAX + 1),
            |kept| kept.slice.layers.start = 9,
            |kept| kept.slice.heads.end = 99,
        ];
        for change in changes {
            let mut kept = told("s", "t");
            change(&mut kept);
            kept.tag = scope("s").id().binding_tag(&kept.slice, kept.block_bytes).0;
            assert_eq!(registry.introduce("b", kept).unwrap_err().code, Code::BadRequest);
        }
        let other_tag = Kept { tag: 1, ..told("s", "t") };
        assert_eq!(registry.introduce("b", other_tag).unwrap_err().code, Code::BadRequest);
        assert!(registry.all().is_empty());
    }

    #[test]
    fn a_recovered_tag_gets_its_meaning_when_the_worker_returns() {
        let (registry, _) = Registry::open(None);
        let unknown = registry.recovered(&record(tag("s"))).unwrap();
        assert_eq!(unknown.kept.scope.tenant, "unknown");
        let (named, new) = registry.register(&scope("s"), &slice(), 4096).unwrap();
        assert!(new);
        assert_eq!((named.id, named.kept.scope.tenant.as_str()), (unknown.id, "t"));
    }
}
