//! `kvd.format`: what a data directory is, in words an operator can read.
//!
//! ```text
//! kvd disk tier
//! format 1
//! store 5f1c...               32 hex digits, names the store for life
//! node gpu-07
//! created 1795420800          Unix time, seconds
//! crc 9a3c51e0                CRC-32 of everything above
//! ```
//! A directory without a sound file of this version is not ours to write into: what lies there under our
//! names is moved into `aside-<n>/` and kept, and a fresh log starts.

use std::io;

use crate::files::Directory;
use crate::segment::{self, StoreId};

/// Name of the file.
pub(crate) const FORMAT_FILE: &str = "kvd.format";
/// Name of the file that a sick device is tried on.
pub(crate) const PROBE_NAME: &str = "kvd.probe";

/// Identity of a data directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Format {
    /// Names the store for life.
    pub store: StoreId,
    /// The node that made it.
    pub node: String,
    /// When, in Unix seconds.
    pub created: u64,
}

/// Why a format file is not believed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FormatError {
    /// It does not begin like one.
    #[error("not a kvd data directory")]
    Magic,
    /// Another version wrote it.
    #[error("written by format version {found}, this is version {}", segment::VERSION)]
    Version {
        /// The version it names.
        found: String,
    },
    /// It is damaged.
    #[error("the format file is damaged")]
    Broken,
}

impl Format {
    /// The file's text.
    pub fn encode(&self) -> String {
        let version = segment::VERSION;
        let node: String = self.node.chars().filter(|c| !c.is_control()).collect();
        let body = format!(
            "kvd disk tier\nformat {version}\nstore {}\nnode {node}\ncreated {}\n",
            self.store, self.created
        );
        let crc = crc32fast::hash(body.as_bytes());
        format!("{body}crc {crc:08x}\n")
    }

    /// Reads the file's text.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let text = std::str::from_utf8(bytes).map_err(|_| FormatError::Broken)?;
        let mut lines = text.lines();
        if lines.next() != Some("kvd disk tier") {
            return Err(FormatError::Magic);
        }
        let mut field = |name: &str| {
            let value = lines.next().and_then(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.ok_or(FormatError::Broken)
        };
        let version = field("format")?;
        if version != segment::VERSION.to_string() {
            return Err(FormatError::Version { found: version.to_owned() });
        }
        let store = u128::from_str_radix(field("store")?, 16).map_err(|_| FormatError::Broken)?;
        let node = field("node")?.to_owned();
        let created = field("created")?.parse().map_err(|_| FormatError::Broken)?;
        let format = Self { store: StoreId(store.to_be_bytes()), node, created };
        // The one text of these values is the only one accepted: it holds the checksum too.
        if format.encode().as_bytes() == bytes { Ok(format) } else { Err(FormatError::Broken) }
    }
}

/// Reads the directory's identity, or gives it one. What was set aside is told in `told`.
pub(crate) fn establish(
    directory: &dyn Directory,
    fresh: impl FnOnce() -> Format,
    told: &mut Vec<String>,
) -> io::Result<Format> {
    let names = directory.names()?;
    let found = names.iter().any(|name| name == FORMAT_FILE);
    let ours = |name: &String| {
        name == FORMAT_FILE || name == PROBE_NAME || (name.starts_with("segment-") && name.contains(".kv"))
    };
    let why = match found.then(|| directory.read(FORMAT_FILE)) {
        Some(Ok(bytes)) => match Format::parse(&bytes) {
            Ok(format) => return Ok(format),
            Err(error) => Some(error.to_string()),
        },
        // A directory or a link of that name: nothing of ours, and a rename takes it away as well.
        Some(Err(error)) if matches!(error.raw_os_error(), Some(libc::EISDIR | libc::ELOOP)) => {
            Some(format!("{FORMAT_FILE} is not a file"))
        }
        Some(Err(error)) => return Err(error),
        None if names.iter().any(|name| segment::number_of(name).is_some()) => {
            Some("segments without a format file".to_owned())
        }
        None => None,
    };
    if let Some(why) = why {
        let aside = free_name(&names, "aside");
        directory.make_dir(&aside)?;
        // The format file goes last: a crash in between finds the directory still not ours.
        let mut moved: Vec<_> = names.iter().filter(|name| ours(name)).collect();
        moved.sort_by_key(|name| *name == FORMAT_FILE);
        for name in moved {
            directory.rename(name, &format!("{aside}/{name}"))?;
        }
        told.push(format!(
            "the data directory was set aside into {aside}/: {why}; run the version that wrote it, or remove \
             {aside}/ when it is not wanted"
        ));
    }
    let format = fresh();
    directory.write(FORMAT_FILE, format.encode().as_bytes())?;
    Ok(format)
}

/// The first of `stem-1`, `stem-2`, ... that is not among `names`.
pub(crate) fn free_name(names: &[String], stem: &str) -> String {
    let mut candidates = (1u32..).map(|number| format!("{stem}-{number}"));
    candidates.find(|name| !names.contains(name)).expect("fewer files than numbers")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimDisk;

    fn format() -> Format {
        Format { store: StoreId([0xab; 16]), node: "gpu-07".to_owned(), created: 1_795_420_800 }
    }

    #[test]
    fn every_flipped_bit_of_the_format_file_is_refused() {
        let text = format().encode();
        assert_eq!(Format::parse(text.as_bytes()), Ok(format()));
        let mut bytes = text.into_bytes();
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Format::parse(&bytes).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        for end in 0..bytes.len() {
            assert!(Format::parse(&bytes[..end]).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn another_version_is_named() {
        let text = format().encode().replace("format 1", "format 2");
        assert_eq!(Format::parse(text.as_bytes()), Err(FormatError::Version { found: "2".to_owned() }));
    }

    #[test]
    fn foreign_contents_are_set_aside_and_kept() {
        let disk = SimDisk::new(1);
        let directory = disk.directory();
        let mut notes = Vec::new();
        assert_eq!(establish(&*directory, format, &mut notes).unwrap(), format());
        assert_eq!(notes, [""; 0]);
        directory.write(FORMAT_FILE, b"kvd disk tier\nformat 9\n").unwrap();
        directory.write("segment-00000003.kv", b"old").unwrap();
        directory.write("lost+found", b"not ours").unwrap();
        establish(&*directory, format, &mut notes).unwrap();
        assert!(notes[0].contains("aside-1") && notes[0].contains("version 9"), "{notes:?}");
        assert_eq!(directory.read("aside-1/segment-00000003.kv").unwrap(), b"old");
        assert_eq!(directory.read("lost+found").unwrap(), b"not ours");
        directory.write("segment-00000004.kv", b"").unwrap();
        directory.remove(FORMAT_FILE).unwrap();
        establish(&*directory, format, &mut notes).unwrap();
        assert!(directory.read("aside-2/segment-00000004.kv").is_ok());
    }
}
