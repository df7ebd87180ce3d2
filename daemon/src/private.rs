//! Directories and files for the daemon's user alone. Scope ids stand in them, and whoever knows the scope id of
//! a tenant can name its blocks as well as who knows its salt.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

const DIR_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
const OTHERS: u32 = 0o077;
const STICKY: u32 = 0o1000;

/// Makes a directory that nobody else can enter. One that is there and ours is closed to others; one that is
/// shared on purpose (`/dev/shm` itself), or somebody else's, is used as it is, with a warning.
pub fn dir(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(DIR_MODE).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => close(path),
        made => made,
    }
}

fn close(path: &Path) -> io::Result<()> {
    let dir =
        OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::DIRECTORY.bits() as i32).open(path)?;
    let found = dir.metadata()?;
    let mode = found.mode() & 0o7777;
    if mode & OTHERS == 0 {
        return Ok(());
    }
    let shown = path.display();
    if mode & STICKY != 0 || found.uid() != rustix::process::geteuid().as_raw() {
        tracing::warn!(path = %shown, mode = format!("{mode:o}"), "others can enter this directory, and it is not ours alone to close; give kvd one of its own");
        return Ok(());
    }
    match dir.set_permissions(Permissions::from_mode(DIR_MODE)) {
        Ok(()) => {
            tracing::info!(path = %shown, was = format!("{mode:o}"), "the directory was closed to other users");
        }
        Err(error) => {
            tracing::warn!(path = %shown, %error, "others can enter this directory and it cannot be closed");
        }
    }
    Ok(())
}

/// Opens a file for writing that nobody else can read, whoever could before.
pub fn file(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.write(true).mode(FILE_MODE).open(path)?;
    if file.metadata()?.mode() & OTHERS != 0 {
        file.set_permissions(Permissions::from_mode(FILE_MODE))?;
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn what_is_made_is_ours_alone_and_what_was_open_is_closed() {
        let temp = tempfile::tempdir().unwrap();
        let data = temp.path().join("a/data");
        dir(&data).unwrap();
        assert_eq!(mode(&data), 0o700);
        std::fs::set_permissions(&data, Permissions::from_mode(0o755)).unwrap();
        dir(&data).unwrap();
        assert_eq!(mode(&data), 0o700);
        let path = data.join("file");
        std::fs::write(&path, "open").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        file(&mut OpenOptions::new(), &path).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert!(dir(&path).is_err(), "a file is no directory");
    }

    #[test]
    fn a_directory_that_is_shared_on_purpose_stays_shared() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::set_permissions(temp.path(), Permissions::from_mode(0o1777)).unwrap();
        dir(temp.path()).unwrap();
        assert_eq!(mode(temp.path()), 0o1777);
    }
}
