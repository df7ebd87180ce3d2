//! What the tier needs of an object store: write once, read ranges, list, delete. Nothing is ever overwritten, so
//! there are no versions, no locks and no conditions but "if absent".
//!
//! An operation may be dropped at any time: it owns what it needs or borrows it from its caller, and no back end lets
//! anybody else write into the caller's memory. What became of a write that was dropped or failed is unknown; writing
//! the same name again finds out.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;

use crate::landing::Landing;

/// An operation under way.
pub type Reply<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// An object store, or a part of one under a prefix. Names are relative to that.
///
/// A name is made of parts of a-z, 0-9, '-', '_' and '.' with '/' between them; see [`is_name`]. One operation is one
/// attempt: retries are the caller's.
pub trait Store: Send + Sync {
    /// Which store this is, for people: kind, place, prefix. Holds no secret.
    fn describe(&self) -> String;

    /// Writes an object that is not there yet: [`StoreError::Exists`] if one of that name is. An object is there
    /// entirely or not at all.
    fn put<'a>(&'a self, name: &'a str, body: Bytes) -> Reply<'a, ()>;

    /// Reads the bytes from `from` on, as many as `landing` takes. An object that is shorter than that is
    /// [`StoreError::Short`]. `Ok` means that every byte is there.
    fn get<'a>(&'a self, name: &'a str, from: u64, landing: &'a mut Landing<'_>) -> Reply<'a, ()>;

    /// Length of an object in bytes.
    fn head<'a>(&'a self, name: &'a str) -> Reply<'a, u64>;

    /// The objects whose names begin with `prefix`, in order of their names, `limit` at most (1 to [`PAGE_MAX`]);
    /// `after` is the `next` of the page before.
    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> Reply<'a, Page>;

    /// Deletes an object. That there is none is as good.
    fn delete<'a>(&'a self, name: &'a str) -> Reply<'a, ()>;
}

/// Most objects in one page.
pub const PAGE_MAX: usize = 1000;
/// Longest name in bytes.
pub const NAME_BYTES_MAX: usize = 512;

/// One object in a list.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Object {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Some of the objects that were asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Page {
    /// In order of their names.
    pub objects: Vec<Object>,
    /// Where the next page begins, if there is one. Opaque to all but the store that gave it.
    pub next: Option<String>,
}

/// How an operation ended that did not do what it should.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("no such object")]
    Absent,
    /// An object of that name is there already.
    #[error("the object is there already")]
    Exists,
    /// The object ends before the bytes that were asked for.
    #[error("the object ends at {bytes} bytes, {wanted} were asked for")]
    Short {
        /// Its length, or 0 where the store does not say.
        bytes: u64,
        /// Where the bytes asked for end.
        wanted: u64,
    },
    /// The store has too much to do (429, 503).
    #[error("the store asks for less")]
    Throttled {
        /// When it says to come again.
        retry_after: Option<Duration>,
    },
    /// The store does not know us, or does not let us (401, 403).
    #[error("refused: {why}")]
    Refused {
        /// What it said. Holds no secret.
        why: String,
    },
    /// No answer in time.
    #[error("no answer in time")]
    Timeout,
    /// No connection, a connection that ended, an answer that makes no sense or says that the store failed (5xx).
    #[error("broken: {why}")]
    Broken {
        /// What happened.
        why: String,
    },
    /// The request or the configuration is wrong: a name that cannot be, a bucket that is not there.
    #[error("invalid: {why}")]
    Invalid {
        /// What is wrong.
        why: String,
    },
}

impl StoreError {
    /// The same, as a label in metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Exists => "exists",
            Self::Short { .. } => "short",
            Self::Throttled { .. } => "throttled",
            Self::Refused { .. } => "refused",
            Self::Timeout => "timeout",
            Self::Broken { .. } => "broken",
            Self::Invalid { .. } => "invalid",
        }
    }

    /// Whether the same may go well when it is tried again.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Throttled { .. } | Self::Timeout | Self::Broken { .. })
    }

    pub(crate) fn broken(why: impl std::fmt::Display) -> Self {
        Self::Broken { why: why.to_string() }
    }

    pub(crate) fn invalid(why: impl std::fmt::Display) -> Self {
        Self::Invalid { why: why.to_string() }
    }
}

/// Whether an object can have this name: parts of a-z, 0-9, '-', '_' and '.', of which none is empty, begins with a
/// dot or is longer than 255 bytes, with '/' between them; [`NAME_BYTES_MAX`] bytes at most.
pub fn is_name(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte);
    let part =
        |part: &str| (1..=255).contains(&part.len()) && !part.starts_with('.') && part.bytes().all(inner);
    name.len() <= NAME_BYTES_MAX && name.split('/').all(part)
}

/// Whether names can be asked for by this prefix: one that a name can begin with.
pub fn is_prefix(prefix: &str) -> bool {
    prefix.is_empty() || is_name(prefix) || prefix.strip_suffix('/').is_some_and(is_name)
}

pub(crate) fn check_name(name: &str) -> Result<(), StoreError> {
    if is_name(name) { Ok(()) } else { Err(StoreError::invalid(format_args!("`{name}` names no object"))) }
}

pub(crate) fn check_prefix(prefix: &str) -> Result<(), StoreError> {
    if is_prefix(prefix) { Ok(()) } else { Err(StoreError::invalid(format_args!("`{prefix}` is no prefix"))) }
}

/// Whether the answer is the range that was asked for, by its `Content-Range`.
#[cfg(any(feature = "s3", feature = "azure", test))]
pub(crate) fn check_range(told: Option<&str>, from: u64, end: u64) -> Result<(), StoreError> {
    let range = told.and_then(|told| {
        let (range, total) = told.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?, total.parse::<u64>().ok()))
    });
    match range {
        Some((first, last, _)) if first == from && last + 1 == end => Ok(()),
        Some((first, last, Some(bytes))) if first == from && last + 1 == bytes && bytes < end => {
            Err(StoreError::Short { bytes, wanted: end })
        }
        _ => Err(StoreError::broken("other bytes than those that were asked for")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_place() {
        for name in ["a", "packs/00ff", "manifests/gpu-07.rack_1/1-2"] {
            assert!(is_name(name) && is_prefix(name), "{name}");
        }
        for name in ["", "/a", "a//b", "a/", "../a", "a/..", "a/.b", "A", "a b", "a\\b", "a?b", "é", "a\0"] {
            assert!(!is_name(name), "{name}");
        }
        assert!(is_prefix("") && is_prefix("packs/") && !is_prefix("packs//") && !is_prefix("/"));
        assert!(is_name(&"a".repeat(255)) && !is_name(&"a".repeat(256)));
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let passing = [
            StoreError::Throttled { retry_after: None },
            StoreError::Timeout,
            StoreError::Broken { why: "reset".into() },
        ];
        assert!(passing.iter().all(StoreError::is_passing));
        let lasting = [
            StoreError::Absent,
            StoreError::Exists,
            StoreError::Short { bytes: 1, wanted: 2 },
            StoreError::Refused { why: "403".into() },
            StoreError::Invalid { why: "name".into() },
        ];
        assert!(!lasting.iter().any(StoreError::is_passing));
    }

    #[test]
    fn only_the_range_that_was_asked_for_is_taken() {
        for (told, from, end, wanted) in [
            ("bytes 5-9/100", 5, 10, Ok(())),
            ("bytes 5-9/*", 5, 10, Ok(())),
            ("bytes 5-7/8", 5, 10, Err(StoreError::Short { bytes: 8, wanted: 10 })),
        ] {
            assert_eq!(check_range(Some(told), from, end), wanted, "{told}");
        }
        for told in ["bytes 4-9/100", "bytes 5-8/100", "bytes 0-99/100", "5-9/100", "bytes 5-x/9", ""] {
            assert!(matches!(check_range(Some(told), 5, 10), Err(StoreError::Broken { .. })), "{told}");
        }
        assert!(check_range(None, 5, 10).is_err());
    }
}
