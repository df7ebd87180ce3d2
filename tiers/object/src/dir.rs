//! A directory as an object store: the embedded default, and what several nodes share where there is a file system
//! that they all mount.
//!
//! ```text
//!  root/packs/00ff..           an object is a file of its name
//!  root/.writing/4711-0-1      an object being written
//! ```
//! An object is written beside, flushed, and linked to its name, which fails when the name is taken; then the folder
//! is flushed. What a crash leaves in `.writing` is removed by a later opening, when it is older than
//! [`LEFTOVER_AGE`] by the clock of the file system, which is the same for all who share it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;

use crate::landing::Landing;
use crate::store::{Object, PAGE_MAX, Page, Reply, Store, StoreError, check_name, check_prefix};

/// Age at which something half-written is nobody's any more. No write takes as long.
pub const LEFTOVER_AGE: Duration = Duration::from_secs(3600);

const WRITING: &str = ".writing";
/// Read at once into a buffer of the back end's own, in bytes.
const CHUNK_BYTES: u64 = 1 << 20;

/// Objects as files.
pub struct Dir {
    root: Arc<Path>,
    written: AtomicU64,
}

impl Dir {
    /// The store in the directory `root`, which is made if it is not there. Removes what crashes left half-written.
    pub fn open(root: &Path) -> io::Result<Self> {
        let writing = root.join(WRITING);
        fs::create_dir_all(&writing)?;
        let dir = Self { root: root.into(), written: AtomicU64::new(0) };
        let probe = dir.next_writing();
        let now = File::create(&probe)?.metadata()?.modified()?;
        fs::remove_file(&probe)?;
        for entry in fs::read_dir(&writing)? {
            let entry = entry?;
            // Another node may finish or remove it meanwhile.
            let Ok(modified) = entry.metadata().and_then(|metadata| metadata.modified()) else { continue };
            if now.duration_since(modified).is_ok_and(|age| age >= LEFTOVER_AGE) {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(dir)
    }

    /// A name that nobody else writes to: not in this process, and not in another that can be told from it.
    fn next_writing(&self) -> PathBuf {
        static OPENED: AtomicU64 = AtomicU64::new(0);
        let (process, number) = (std::process::id(), self.written.fetch_add(1, Ordering::Relaxed));
        let store = OPENED.fetch_add(1, Ordering::Relaxed);
        self.root.join(WRITING).join(format!("{process}-{store}-{number}"))
    }
}

/// Runs file operations where they may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(StoreError::broken(error)),
    }
}

fn failed(error: io::Error) -> StoreError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::IsADirectory => StoreError::Absent,
        io::ErrorKind::AlreadyExists => StoreError::Exists,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            StoreError::Refused { why: error.to_string() }
        }
        io::ErrorKind::NotADirectory => StoreError::invalid("a part of the name is another object"),
        _ => StoreError::broken(error),
    }
}

fn write(root: &Path, writing: &Path, name: &str, body: &[u8]) -> Result<(), StoreError> {
    let target = root.join(name);
    // Cheap, and saves the writing of what is there already. Whether it is there is decided below.
    if target.symlink_metadata().is_ok_and(|metadata| !metadata.is_dir()) {
        return Err(StoreError::Exists);
    }
    let result = write_new(writing, body).and_then(|()| place(root, writing, &target));
    let _ = fs::remove_file(writing);
    result.map_err(|error| failed_in(root, error))
}

/// A file to be read. What is no file, and could keep us waiting for ever, is no object.
fn open_file(root: &Path, path: &Path) -> Result<File, StoreError> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path);
    let file = file.map_err(|error| failed_in(root, error))?;
    let is_file = file.metadata().map_err(failed)?.is_file();
    if is_file { Ok(file) } else { Err(StoreError::Absent) }
}

/// Why the store as a whole is not there any more, if it is not: unmounted, moved away, another in its place. An object
/// that is not found says nothing then.
fn gone(root: &Path) -> Result<(), StoreError> {
    if root.join(WRITING).is_dir() {
        return Ok(());
    }
    let what = if root.is_dir() { "is another one than was opened" } else { "is not there any more" };
    Err(StoreError::broken(format_args!(
        "the directory {} {what}; bring it back, or start again",
        root.display()
    )))
}

fn failed_in(root: &Path, error: io::Error) -> StoreError {
    match failed(error) {
        StoreError::Absent => gone(root).err().unwrap_or(StoreError::Absent),
        other => other,
    }
}

/// The whole of a new file, flushed. Another process that cannot be told from this one (another host, another
/// namespace) may use the same name at the same moment: then it is not ours.
fn write_new(writing: &Path, body: &[u8]) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).open(writing).map_err(|error| {
        let taken = error.kind() == io::ErrorKind::AlreadyExists;
        if taken { io::Error::other("another process writes under the same name") } else { error }
    })?;
    file.write_all(body)?;
    file.sync_all()
}

/// Gives a written file its name, if nothing has it.
fn place(root: &Path, writing: &Path, target: &Path) -> io::Result<()> {
    let folder = target.parent().unwrap_or(root);
    fs::create_dir_all(folder).map_err(|error| {
        let file = error.kind() == io::ErrorKind::AlreadyExists;
        if file { io::ErrorKind::NotADirectory.into() } else { error }
    })?;
    match fs::hard_link(writing, target) {
        Ok(()) => {}
        // No links on this file system: a rename that replaces nothing.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported) =>
        {
            let (cwd, flags) = (rustix::fs::CWD, rustix::fs::RenameFlags::NOREPLACE);
            rustix::fs::renameat_with(cwd, writing, cwd, target, flags)?;
        }
        Err(error) => return Err(error),
    }
    // Every folder that may be new, from the inside out.
    for folder in folder.ancestors().take_while(|folder| folder.starts_with(root)) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// The names below `folder` that begin with `prefix`, with the folder's own name `under` in front.
fn collect(folder: &Path, under: &str, prefix: &str, names: &mut Vec<String>) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let Ok(part) = entry.file_name().into_string() else { continue };
        let name = format!("{under}{part}");
        if entry.file_type()?.is_dir() {
            let inside = format!("{name}/");
            // Not `.writing`, and nothing that no name can begin with.
            if crate::store::is_name(&name) && (inside.starts_with(prefix) || prefix.starts_with(&inside)) {
                collect(&entry.path(), &inside, prefix, names)?;
            }
        } else if name.starts_with(prefix) && crate::store::is_name(&name) {
            names.push(name);
        }
    }
    Ok(())
}

fn list(root: &Path, prefix: &str, after: Option<&str>, limit: usize) -> Result<Page, StoreError> {
    gone(root)?;
    let mut names = Vec::new();
    // The folder that all of them are in.
    let under = prefix.rfind('/').map_or("", |at| &prefix[..=at]);
    collect(&root.join(under), under, prefix, &mut names).map_err(failed)?;
    names.retain(|name| after.is_none_or(|after| name.as_str() > after));
    names.sort_unstable();
    let more = names.len() > limit;
    names.truncate(limit);
    let next = names.last().filter(|_| more).cloned();
    let objects = names.into_iter().filter_map(|name| {
        // One that was deleted meanwhile is not listed, and what is no file is no object.
        let metadata = root.join(&name).metadata().ok().filter(fs::Metadata::is_file)?;
        Some(Object { name, bytes: metadata.len() })
    });
    Ok(Page { objects: objects.collect(), next })
}

impl Store for Dir {
    fn describe(&self) -> String {
        format!("directory {}", self.root.display())
    }

    fn put<'a>(&'a self, name: &'a str, body: Bytes) -> Reply<'a, ()> {
        Box::pin(async move {
            check_name(name)?;
            let (root, writing, name) = (self.root.clone(), self.next_writing(), name.to_owned());
            blocking(move || write(&root, &writing, &name, &body)).await
        })
    }

    fn get<'a>(&'a self, name: &'a str, from: u64, landing: &'a mut Landing<'_>) -> Reply<'a, ()> {
        Box::pin(async move {
            check_name(name)?;
            let (root, path) = (self.root.clone(), self.root.join(name));
            let mut file = blocking(move || open_file(&root, &path)).await?;
            let (mut at, end) = (from, from + landing.len());
            let mut chunk = vec![0; landing.len().min(CHUNK_BYTES) as usize];
            while at < end {
                chunk.truncate(end.saturating_sub(at).min(CHUNK_BYTES) as usize);
                let offset = at;
                (file, chunk) = blocking(move || {
                    let done = file.read_exact_at(&mut chunk, offset);
                    if done.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::UnexpectedEof) {
                        let bytes = file.metadata().map_err(failed)?.len();
                        return Err(StoreError::Short { bytes, wanted: end });
                    }
                    done.map_err(failed)?;
                    Ok((file, chunk))
                })
                .await?;
                landing.push(&chunk).map_err(StoreError::broken)?;
                at += chunk.len() as u64;
            }
            Ok(())
        })
    }

    fn head<'a>(&'a self, name: &'a str) -> Reply<'a, u64> {
        Box::pin(async move {
            check_name(name)?;
            let path = self.root.join(name);
            let root = self.root.clone();
            let metadata = blocking(move || path.metadata().map_err(|error| failed_in(&root, error))).await?;
            if metadata.is_file() { Ok(metadata.len()) } else { Err(StoreError::Absent) }
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> Reply<'a, Page> {
        Box::pin(async move {
            check_prefix(prefix)?;
            let (root, prefix, after) = (self.root.clone(), prefix.to_owned(), after.map(str::to_owned));
            blocking(move || list(&root, &prefix, after.as_deref(), limit.clamp(1, PAGE_MAX))).await
        })
    }

    fn delete<'a>(&'a self, name: &'a str) -> Reply<'a, ()> {
        Box::pin(async move {
            check_name(name)?;
            let (root, path) = (self.root.clone(), self.root.join(name));
            blocking(move || match fs::remove_file(path).map_err(|error| failed_in(&root, error)) {
                Err(StoreError::Absent) => Ok(()),
                result => result,
            })
            .await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Subject {
        place: tempfile::TempDir,
    }

    impl crate::contract::Subject for Subject {
        fn store(&self) -> Arc<dyn Store> {
            Arc::new(Dir::open(self.place.path()).unwrap())
        }
    }

    crate::object_contract!(Some(Subject { place: tempfile::tempdir().unwrap() }));

    #[tokio::test]
    async fn what_a_crash_left_is_never_listed_and_goes_when_it_is_old() {
        let place = tempfile::tempdir().unwrap();
        let store = Dir::open(place.path()).unwrap();
        store.put("a", Bytes::from_static(b"whole")).await.unwrap();
        let (young, old) = (place.path().join(".writing/1-2-3"), place.path().join(".writing/4-5-6"));
        fs::write(&young, b"ha").unwrap();
        fs::write(&old, b"ha").unwrap();
        let then = fs::metadata(&old).unwrap().modified().unwrap() - LEFTOVER_AGE;
        File::options().write(true).open(&old).unwrap().set_modified(then).unwrap();
        let store = Dir::open(place.path()).unwrap();
        assert!(young.exists() && !old.exists(), "another node may be writing the young one");
        let listed = store.list("", None, 10).await.unwrap();
        assert_eq!(listed.objects, [Object { name: "a".into(), bytes: 5 }]);
        assert!(
            fs::read_dir(place.path().join(".writing")).unwrap().count() == 1,
            "nothing of our own stays"
        );
    }

    #[tokio::test]
    async fn a_directory_that_is_not_there_any_more_is_broken_and_not_empty() {
        let parent = tempfile::tempdir().unwrap();
        let (place, away) = (parent.path().join("store"), parent.path().join("away"));
        let store = Dir::open(&place).unwrap();
        store.put("a", Bytes::from_static(b"whole")).await.unwrap();
        let look = async || {
            let mut slot = [0; 5];
            let got = store.get("a", 0, &mut Landing::of(&mut slot)).await;
            let put = store.put("b", Bytes::from_static(b"more")).await;
            [got.err(), put.err(), store.list("", None, 10).await.err(), store.head("a").await.err()]
        };
        fs::rename(&place, &away).unwrap();
        let broken = |error: &Option<StoreError>| matches!(error, Some(StoreError::Broken { .. }));
        assert!(look().await.iter().all(broken), "moved away");
        fs::create_dir(&place).unwrap();
        assert!(look().await.iter().all(broken), "an empty one in its place");
        fs::remove_dir(&place).unwrap();
        fs::rename(&away, &place).unwrap();
        assert!(look().await.iter().all(Option::is_none), "and back");
    }

    #[tokio::test]
    async fn what_is_no_file_is_no_object_and_keeps_nobody_waiting() {
        let place = tempfile::tempdir().unwrap();
        let store = Dir::open(place.path()).unwrap();
        let made = std::process::Command::new("mkfifo").arg(place.path().join("pipe")).status().unwrap();
        assert!(made.success());
        let mut slot = [0; 5];
        assert_eq!(store.get("pipe", 0, &mut Landing::of(&mut slot)).await, Err(StoreError::Absent));
        assert_eq!(store.list("", None, 10).await.unwrap().objects, []);
    }

    #[tokio::test]
    async fn two_processes_on_one_directory_see_each_other() {
        let place = tempfile::tempdir().unwrap();
        let (one, two) = (Dir::open(place.path()).unwrap(), Dir::open(place.path()).unwrap());
        one.put("a/b", Bytes::from_static(b"1")).await.unwrap();
        assert_eq!(two.put("a/b", Bytes::from_static(b"2")).await, Err(StoreError::Exists));
        assert_eq!(two.head("a/b").await, Ok(1));
        assert_eq!(two.head("a").await, Err(StoreError::Absent), "a folder is no object");
        assert!(matches!(two.put("a/b/c", Bytes::new()).await, Err(StoreError::Invalid { .. })));
    }
}
