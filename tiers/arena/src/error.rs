//! What can go wrong between this crate and the machine.

use std::io;
use std::path::{Path, PathBuf};

/// Why shared memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A geometry that cannot be laid out.
    #[error("{what} is {found}, {wanted} is wanted")]
    Geometry {
        /// Which number.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What would be right.
        wanted: &'static str,
    },
    /// Another daemon uses the same memory.
    #[error("{path} is locked: another daemon uses this memory", path = .path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The file system cannot hold the memory.
    #[error("{path} needs {bytes} bytes, its file system has {free}; {fix}", path = .path.display())]
    NoSpace {
        /// Which file.
        path: PathBuf,
        /// What it needs, in bytes.
        bytes: u64,
        /// What is free, in bytes.
        free: u64,
        /// What to do about it.
        fix: String,
    },
    /// Huge pages were required and are not there.
    #[error("huge pages are required: {why}")]
    HugePages {
        /// What is missing and how to get it.
        why: String,
    },
    /// A file is not what its header or the handshake says.
    #[error("{what} does not fit: {why}")]
    Mismatch {
        /// Which file: `meta`, `data` or `hazard`.
        what: &'static str,
        /// In which way.
        why: String,
    },
    /// The kernel refused.
    #[error("{what} {path}", path = .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
}

impl Error {
    /// Puts `what` was tried on `path` around the kernel's answer.
    pub(crate) fn io<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { what, path: path.to_owned(), source: source.into() }
    }
}
