//! What blocks mean, node-wide: registered scopes and slices and their numbers.
//!
//! A binding has a number for this life of the daemon (dense, the same on every shard) and a tag for ever
//! (in slot headers and on disk). The registry remembers bindings over restarts in a small file beside the
//! durable data, so that recovered blocks have a tenant and a model again before any worker returns. The
//! tenant's salt is never written: the scope id, which it went into, is.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};

use kv_block::code::Code;
use kv_block::{BindingId, BindingTag, BlockKey, Fault, Namer, Record, Scope, ScopeId, SequenceHash, Slice};
use serde::{Deserialize, Serialize};

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
    file: Option<PathBuf>,
}

#[derive(Default)]
struct State {
    by_number: Vec<Arc<Bound>>,
    by_tag: HashMap<u64, BindingId>,
}

/// The file's shape.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    bindings: Vec<Kept>,
}

const FORMAT: u32 = 1;
const BINDINGS_MAX: usize = u16::MAX as usize;

impl Registry {
    /// The registry kept in `file`, or an empty one. A file that cannot be read is set aside; the second
    /// value says so.
    pub fn open(file: Option<PathBuf>) -> (Self, Option<String>) {
        let mut state = State::default();
        let mut note = None;
        if let Some(path) = &file {
            match read(path) {
                Ok(bindings) => bindings.into_iter().for_each(|kept| {
                    state.add(kept);
                }),
                Err(why) => {
                    let aside = path.with_extension("aside");
                    let moved = std::fs::rename(path, &aside);
                    note = Some(match moved {
                        Ok(()) => format!("{} was set aside as {}: {why}", path.display(), aside.display()),
                        Err(error) => {
                            format!("{}: {why}; it could not be set aside: {error}", path.display())
                        }
                    });
                }
            }
        }
        (Self { state: RwLock::new(state), file }, note)
    }

    fn read_state(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write_state(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Every binding, by number.
    pub fn all(&self) -> Vec<Arc<Bound>> {
        self.read_state().by_number.clone()
    }

    /// The binding with this number.
    pub fn get(&self, number: u32) -> Option<Arc<Bound>> {
        self.read_state().by_number.get(number as usize).cloned()
    }

    /// Makes a scope and slice known. The second value says whether it was not before.
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
            if known.scope_id() == Some(scope_id) {
                return Ok((known, false));
            }
            // Known by its tag alone, from a block that was recovered: now it has a meaning.
            let named = Arc::new(Bound::new(known.id, kept(scope, scope_id, slice, block_bytes, tag)));
            state.by_number[usize::from(known.id.0)] = Arc::clone(&named);
            self.save(&state);
            return Ok((named, true));
        }
        if state.by_number.len() >= BINDINGS_MAX {
            let text =
                format!("{BINDINGS_MAX} scopes and slices are registered, as many as there are numbers");
            return Err(Fault::new(Code::TooManyBindings, text));
        }
        let bound = state.add(kept(scope, scope_id, slice, block_bytes, tag));
        self.save(&state);
        Ok((bound, true))
    }

    /// The binding of a recovered block; one without a meaning when only its tag is known.
    pub fn recovered(&self, record: &Record) -> Arc<Bound> {
        let mut state = self.write_state();
        if let Some(id) = state.by_tag.get(&record.tag.0) {
            return Arc::clone(&state.by_number[usize::from(id.0)]);
        }
        let scope = Scope { model: "unknown".into(), tenant: "unknown".into(), ..Scope::default() };
        state.add(Kept {
            tag: record.tag.0,
            scope_id: String::new(),
            block_bytes: record.bytes,
            scope,
            slice: Slice::whole(1, 1),
        })
    }

    fn save(&self, state: &State) {
        let Some(path) = &self.file else { return };
        let named = state.by_number.iter().filter(|bound| !bound.kept.scope_id.is_empty());
        let file = File { format: FORMAT, bindings: named.map(|bound| bound.kept.clone()).collect() };
        if let Err(error) = write(path, &file) {
            tracing::warn!(path = %path.display(), %error, "the registry was not saved; after a restart its tenants are unknown until workers return");
        }
    }
}

impl State {
    fn add(&mut self, kept: Kept) -> Arc<Bound> {
        let id = BindingId(self.by_number.len() as u16);
        self.by_tag.insert(kept.tag, id);
        let bound = Arc::new(Bound::new(id, kept));
        self.by_number.push(Arc::clone(&bound));
        bound
    }
}

fn kept(scope: &Scope, scope_id: ScopeId, slice: &Slice, block_bytes: u32, tag: BindingTag) -> Kept {
    let scope = Scope { salt: String::new(), ..scope.clone() };
    Kept { tag: tag.0, scope_id: scope_id.to_string(), block_bytes, scope, slice: slice.clone() }
}

fn read(path: &std::path::Path) -> Result<Vec<Kept>, String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.to_string()),
    };
    parse(&text)
}

/// The bindings in a registry file.
pub fn parse(text: &str) -> Result<Vec<Kept>, String> {
    let file: File = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if file.format != FORMAT {
        return Err(format!("it has format {}, this version reads {FORMAT}", file.format));
    }
    if file.bindings.len() > BINDINGS_MAX {
        return Err(format!(
            "it has {} bindings, at most {BINDINGS_MAX} can be numbered",
            file.bindings.len()
        ));
    }
    Ok(file.bindings)
}

fn write(path: &std::path::Path, file: &File) -> std::io::Result<()> {
    let fresh = path.with_extension("new");
    let text = serde_json::to_vec_pretty(file)?;
    let mut out = std::fs::File::create(&fresh)?;
    std::io::Write::write_all(&mut out, &text)?;
    out.sync_all()?;
    std::fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(salt: &str) -> Scope {
        Scope { model: "m".into(), tenant: "t".into(), salt: salt.into(), ..Scope::default() }
    }

    #[test]
    fn bindings_outlive_a_restart_and_salts_do_not_reach_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        let (registry, note) = Registry::open(Some(path.clone()));
        assert_eq!(note, None);
        let (bound, new) = registry.register(&scope("s3cret"), &Slice::whole(1, 2), 4096).unwrap();
        assert!(new);
        assert!(!std::fs::read_to_string(&path).unwrap().contains("s3cret"));
        let (again, _) = Registry::open(Some(path));
        assert_eq!(again.get(0).unwrap().scope_id(), Some(scope("s3cret").id()));
        let (same, new) = again.register(&scope("s3cret"), &Slice::whole(1, 2), 4096).unwrap();
        assert_eq!((same.id, new), (bound.id, false));
        let (other, new) = again.register(&scope("other"), &Slice::whole(1, 2), 4096).unwrap();
        assert!(new && other.id != bound.id, "another salt is another scope");
    }

    #[test]
    fn a_broken_file_is_set_aside_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bindings.json");
        for text in ["{", r#"{"format":2,"bindings":[]}"#] {
            std::fs::write(&path, text).unwrap();
            let (registry, note) = Registry::open(Some(path.clone()));
            assert!(registry.all().is_empty());
            assert!(note.unwrap().contains("set aside"));
            assert_eq!(std::fs::read_to_string(path.with_extension("aside")).unwrap(), text);
        }
    }

    #[test]
    fn a_recovered_tag_gets_its_meaning_when_the_worker_returns() {
        let (registry, _) = Registry::open(None);
        let (slice, id) = (Slice::whole(1, 2), scope("s").id());
        let record = Record {
            key: BlockKey([1; 16]),
            checksum: kv_block::Checksum(0),
            bytes: 4096,
            tag: id.binding_tag(&slice, 4096),
            priority: kv_block::Priority::Normal,
            expires_at: 0,
        };
        let unknown = registry.recovered(&record);
        assert_eq!(unknown.kept.scope.tenant, "unknown");
        let (named, new) = registry.register(&scope("s"), &slice, 4096).unwrap();
        assert!(new);
        assert_eq!((named.id, named.kept.scope.tenant.as_str()), (unknown.id, "t"));
    }
}
