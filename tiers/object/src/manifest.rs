//! What a node says it uses: one small object for each life of a node, written anew whenever that changes.
//!
//! ```text
//! name: manifests/<node>/<epoch, 16 hex digits>-<generation, 16 hex digits>
//!
//! kvd manifest
//! format 1
//! node gpu-07
//! epoch 3                     which life of the node
//! generation 12               grows with every manifest of that life
//! round 4                     the newest round of collection that it has honoured; 0 before the first
//! pack <id> 33554432 18464 512 1795420800
//!                             pack bytes, footer bytes, blocks, Unix time of expiry or 0
//! tail <id> 6b7666...         the last bytes of a pack that is new here: its footer and trailer
//! crc 9a3c51e0                CRC-32 of everything above
//! ```
//! Of one node the highest epoch counts, and of that the highest generation. What a manifest lists is not deleted
//! (see [`crate::collect`]), and whoever reads it knows where the footers are without asking, and need not ask for those
//! of new packs at all: otherwise each node would read the footer of each pack of each other. It holds nothing that is not
//! in the packs themselves: when it is lost, listing them and reading their footers gives it back.

use std::fmt::Write as _;

use bytes::Bytes;
use kv_block::Epoch;

use crate::index::Known;
use crate::pack::{PackId, is_node};

/// Where manifests lie.
pub const PREFIX: &str = "manifests/";
const VERSION: &str = "1";

/// A pack that a node uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackRef {
    /// Its name.
    pub id: PackId,
    /// Its length in bytes.
    pub pack_bytes: u64,
    /// Length of its footer in bytes.
    pub footer_bytes: u32,
    /// Blocks in it.
    pub blocks: u32,
    /// Unix time in seconds after which no block of it counts; 0 when some never expire.
    pub expires_at: u32,
}

impl PackRef {
    /// What a manifest says of a pack that is known.
    pub fn of(known: &Known) -> Self {
        let (id, pack_bytes, footer_bytes) = (known.id, known.pack_bytes, known.footer_bytes);
        Self { id, pack_bytes, footer_bytes, blocks: known.blocks() as u32, expires_at: known.expires_at }
    }
}

/// Which manifest.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ManifestName {
    /// Name of the node.
    pub node: String,
    /// Which life of it.
    pub epoch: Epoch,
    /// Which manifest of that life.
    pub generation: u64,
}

impl ManifestName {
    /// The name of the object.
    pub fn object(&self) -> String {
        format!("{PREFIX}{}/{:016x}-{:016x}", self.node, self.epoch.0, self.generation)
    }

    /// Which manifest an object is, if it is one.
    pub fn parse(object: &str) -> Option<Self> {
        let (node, numbers) = object.strip_prefix(PREFIX)?.split_once('/')?;
        let (epoch, generation) = numbers.split_once('-')?;
        let number = |digits| u64::from_str_radix(digits, 16).ok();
        let name =
            Self { node: node.to_owned(), epoch: Epoch(number(epoch)?), generation: number(generation)? };
        // One text for one name.
        (is_node(node) && name.object() == object).then_some(name)
    }
}

/// What a node says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Manifest {
    /// Who, and which of its manifests.
    pub name: ManifestName,
    /// The newest round of collection that it has honoured.
    pub round: u64,
    /// The packs that it uses, in order of their names.
    pub packs: Vec<PackRef>,
    /// Tails of some of them, in order of their names. Not believed before [`crate::pack::parse_tail`] does.
    pub tails: Vec<(PackId, Bytes)>,
}

/// Why a manifest or a round is not believed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TextError {
    /// It does not begin like one.
    #[error("not a {wanted}")]
    Magic {
        /// What it should be.
        wanted: &'static str,
    },
    /// Another version wrote it.
    #[error("format version {found}, wanted {VERSION}")]
    Version {
        /// The version it names.
        found: String,
    },
    /// It is damaged.
    #[error("damaged")]
    Broken,
}

impl Manifest {
    /// Whether it uses this pack.
    pub fn uses(&self, id: &PackId) -> bool {
        self.packs.binary_search_by(|pack| pack.id.cmp(id)).is_ok()
    }

    /// The object's text.
    pub fn encode(&self) -> String {
        let ManifestName { node, epoch, generation } = &self.name;
        let mut text = format!(
            "kvd manifest\nformat {VERSION}\nnode {node}\nepoch {epoch}\ngeneration {generation}\nround {}\n",
            self.round
        );
        for PackRef { id, pack_bytes, footer_bytes, blocks, expires_at } in &self.packs {
            writeln!(text, "pack {id} {pack_bytes} {footer_bytes} {blocks} {expires_at}").expect("memory");
        }
        for (id, tail) in &self.tails {
            write!(text, "tail {id} ").expect("memory");
            for byte in tail {
                text.extend(
                    [byte >> 4, byte & 15].map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)])),
                );
            }
            text.push('\n');
        }
        sign(text)
    }

    /// Reads the object's text.
    pub fn parse(bytes: &[u8]) -> Result<Self, TextError> {
        let mut lines = Lines::open(bytes, "kvd manifest")?;
        let node = lines.field("node")?.to_owned();
        let (epoch, generation) = (Epoch(lines.number("epoch")?), lines.number("generation")?);
        let mut manifest = Self {
            name: ManifestName { node, epoch, generation },
            round: lines.number("round")?,
            packs: Vec::new(),
            tails: Vec::new(),
        };
        while let Some([id, pack_bytes, footer_bytes, blocks, expires_at]) = lines.list("pack")? {
            manifest.packs.push(PackRef {
                id: parsed(id)?,
                pack_bytes: parsed(pack_bytes)?,
                footer_bytes: parsed(footer_bytes)?,
                blocks: parsed(blocks)?,
                expires_at: parsed(expires_at)?,
            });
        }
        while let Some([id, tail]) = lines.list("tail")? {
            manifest.tails.push((parsed(id)?, bytes_of(tail)?));
        }
        let sorted = manifest.packs.windows(2).all(|pair| pair[0].id < pair[1].id)
            && manifest.tails.windows(2).all(|pair| pair[0].0 < pair[1].0)
            && manifest.tails.iter().all(|(id, _)| manifest.uses(id));
        // The one text of these values is the only one accepted: it holds the checksum too.
        let sound = sorted && is_node(&manifest.name.node) && manifest.encode().as_bytes() == bytes;
        if sound { Ok(manifest) } else { Err(TextError::Broken) }
    }
}

pub(crate) fn parsed<T: std::str::FromStr>(text: &str) -> Result<T, TextError> {
    text.parse().map_err(|_| TextError::Broken)
}

/// The bytes that these hexadecimal digits are.
fn bytes_of(digits: &str) -> Result<Bytes, TextError> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).map(|digit| digit as u8);
    let pair = |pair: &[u8]| match pair {
        [high, low] => Some(digit(high)? << 4 | digit(low)?),
        _ => None,
    };
    digits
        .as_bytes()
        .chunks(2)
        .map(pair)
        .collect::<Option<Vec<u8>>>()
        .map(Bytes::from)
        .ok_or(TextError::Broken)
}

/// The text with its checksum.
pub(crate) fn sign(mut text: String) -> String {
    let crc = crc32fast::hash(text.as_bytes());
    writeln!(text, "crc {crc:08x}").expect("memory");
    text
}

/// The lines of a text of ours, one after the other.
pub(crate) struct Lines<'a> {
    lines: std::iter::Peekable<std::str::Lines<'a>>,
}

impl<'a> Lines<'a> {
    pub(crate) fn open(bytes: &'a [u8], magic: &'static str) -> Result<Self, TextError> {
        let text = std::str::from_utf8(bytes).map_err(|_| TextError::Broken)?;
        let mut lines = Self { lines: text.lines().peekable() };
        if lines.lines.next() != Some(magic) {
            return Err(TextError::Magic { wanted: magic });
        }
        let found = lines.field("format")?;
        if found != VERSION {
            return Err(TextError::Version { found: found.to_owned() });
        }
        Ok(lines)
    }

    pub(crate) fn field(&mut self, name: &str) -> Result<&'a str, TextError> {
        let line = self.lines.next().ok_or(TextError::Broken)?;
        line.strip_prefix(name).and_then(|line| line.strip_prefix(' ')).ok_or(TextError::Broken)
    }

    pub(crate) fn number(&mut self, name: &str) -> Result<u64, TextError> {
        parsed(self.field(name)?)
    }

    /// The words of the next line, if it is one of these.
    pub(crate) fn list<const N: usize>(&mut self, name: &str) -> Result<Option<[&'a str; N]>, TextError> {
        let ours = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' '));
        let Some(line) = self.lines.next_if(ours) else { return Ok(None) };
        let words: Vec<_> = line.split(' ').skip(1).collect();
        words.try_into().map(Some).map_err(|_| TextError::Broken)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn sample() -> Manifest {
        let pack = |number: u8| PackRef {
            id: PackId([number; 32]),
            pack_bytes: 32 << 20,
            footer_bytes: 18_464,
            blocks: 512,
            expires_at: u32::from(number),
        };
        let name = ManifestName { node: "gpu-07".into(), epoch: Epoch(3), generation: 12 };
        Manifest { name, round: 4, packs: vec![pack(0), pack(1), pack(0xff)], tails: vec![] }
    }

    /// Every flipped bit and every truncation of a text is refused.
    pub(crate) fn is_tight<T>(text: &str, parse: impl Fn(&[u8]) -> Result<T, TextError>) {
        let mut bytes = text.as_bytes().to_vec();
        assert!(parse(&bytes).is_ok());
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(parse(&bytes).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        for end in 0..bytes.len() {
            assert!(parse(&bytes[..end]).is_err(), "cut at {end}");
        }
        bytes.push(b'\n');
        assert!(parse(&bytes).is_err());
    }

    #[test]
    fn only_what_was_written_is_read() {
        assert_eq!(Manifest::parse(sample().encode().as_bytes()), Ok(sample()));
        is_tight(&sample().encode(), Manifest::parse);
        let none = Manifest { packs: vec![], ..sample() };
        assert_eq!(Manifest::parse(none.encode().as_bytes()), Ok(none));
        let tail = |number: u8| (PackId([number; 32]), Bytes::from(vec![0x0f, 0xa0, number]));
        let tails = Manifest { tails: vec![tail(1), tail(0xff)], ..sample() };
        assert!(tails.encode().contains("0fa0ff\n"));
        is_tight(&tails.encode(), Manifest::parse);
        assert_eq!(Manifest::parse(tails.encode().as_bytes()), Ok(tails));
        for wrong in [vec![tail(1), tail(0)], vec![tail(1), tail(1)], vec![tail(2)]] {
            let wrong = Manifest { tails: wrong, ..sample() };
            assert_eq!(Manifest::parse(wrong.encode().as_bytes()), Err(TextError::Broken), "{wrong:?}");
        }
    }

    #[test]
    fn the_text_of_version_1_stays() {
        let text = Manifest { packs: sample().packs[1..2].to_vec(), ..sample() }.encode();
        let id = "01".repeat(32);
        let wanted = format!(
            "kvd manifest\nformat 1\nnode gpu-07\nepoch 3\ngeneration 12\nround 4\n\
             pack {id} 33554432 18464 512 1\ncrc 9b595857\n"
        );
        assert_eq!(text, wanted);
        let other = text.replace("format 1", "format 2");
        assert_eq!(Manifest::parse(other.as_bytes()), Err(TextError::Version { found: "2".into() }));
        assert_eq!(Manifest::parse(b"kvd round\n"), Err(TextError::Magic { wanted: "kvd manifest" }));
    }

    #[test]
    fn packs_are_in_order_and_once() {
        let mut twice = sample();
        twice.packs[1] = twice.packs[0];
        assert_eq!(Manifest::parse(twice.encode().as_bytes()), Err(TextError::Broken));
        assert!(sample().uses(&PackId([1; 32])) && !sample().uses(&PackId([2; 32])));
    }

    #[test]
    fn names_go_there_and_back() {
        let name = sample().name;
        assert_eq!(name.object(), "manifests/gpu-07/0000000000000003-000000000000000c");
        assert!(crate::store::is_name(&name.object()));
        assert_eq!(ManifestName::parse(&name.object()), Some(name));
        for other in
            ["manifests/a/3-c", "manifests/a", "packs/00", "manifests//0000000000000003-000000000000000c"]
        {
            assert_eq!(ManifestName::parse(other), None, "{other}");
        }
    }
}
