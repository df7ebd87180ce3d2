//! Blocks as a person names them: by key, by the beginning of a key, by a line of `get blocks -o name`, or
//! by what they mean (scope, slice and the engine's hash).

use std::io::BufRead as _;
use std::path::{Path, PathBuf};

use clap::Args;
use kv_api::v1;
use kv_block::{BlockKey, Scope, SequenceHash, Slice};

use crate::connect::Daemon;
use crate::exit::{Exit, Failure};

/// Shortest beginning of a key that may stand for it.
const PREFIX_DIGITS_MIN: usize = 8;

/// Blocks on the command line.
#[derive(Debug, Clone, Args)]
pub(crate) struct Blocks {
    /// Key in hex, or its first 8 digits or more; - reads keys from stdin
    #[arg(value_name = "KEY", required_unless_present = "hash", conflicts_with = "scope")]
    keys: Vec<String>,
    #[command(flatten)]
    meaning: Meaning,
}

/// A block named by what it means.
#[derive(Debug, Clone, Args)]
pub(crate) struct Meaning {
    /// TOML file with the scope: model, tenant, dtype, ...
    #[arg(long, value_name = "FILE", requires = "hash")]
    scope: Option<PathBuf>,
    /// The engine's sequence hash, in hex
    #[arg(long, value_name = "HEX", requires = "scope")]
    hash: Option<SequenceHash>,
    /// LAYERS/ALL,HEADS/ALL such as 0..32/32,0..8/8; or `slice` in FILE
    #[arg(long, value_parser = parse_slice, requires = "scope")]
    slice: Option<Slice>,
}

/// Scope, slice and hash, read and checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Named {
    pub(crate) scope: Scope,
    pub(crate) slice: Slice,
    pub(crate) hash: SequenceHash,
}

impl Named {
    pub(crate) fn key(&self) -> BlockKey {
        self.scope.id().block_key(&self.hash, &self.slice)
    }
}

impl Meaning {
    /// What `--scope` and `--hash` name, if they were given.
    pub(crate) fn read(&self) -> Result<Option<Named>, Failure> {
        let (Some(file), Some(hash)) = (&self.scope, self.hash) else { return Ok(None) };
        let text = std::fs::read_to_string(file)
            .map_err(|error| Failure::usage(format!("cannot read {}: {error}", file.display())))?;
        let (scope, slice) = parse_scope(&text).map_err(|failure| located(file, failure))?;
        let slice = self.slice.clone().or(slice).ok_or_else(|| {
            Failure::usage("which slice of the block is not said").help(
                "add --slice 0..32/32,0..8/8 (layers, KV heads), or `slice = \"...\"` to the scope file",
            )
        })?;
        Ok(Some(Named { scope, slice, hash }))
    }
}

fn located(file: &Path, failure: Failure) -> Failure {
    Failure { message: format!("{}: {}", file.display(), failure.message), ..failure }
}

impl Blocks {
    /// What the caller named by meaning, if so.
    pub(crate) fn meaning(&self) -> Result<Option<Named>, Failure> {
        self.meaning.read()
    }

    /// The keys of all blocks named.
    pub(crate) async fn keys(&self, daemon: &Daemon) -> Result<Vec<BlockKey>, Failure> {
        if let Some(named) = self.meaning()? {
            return Ok(vec![named.key()]);
        }
        let mut keys = Vec::new();
        for text in &self.keys {
            if text != "-" {
                keys.push(resolve(daemon, text).await?);
                continue;
            }
            for line in std::io::stdin().lock().lines() {
                let line = line.map_err(|error| {
                    Failure::new(Exit::Failure, format!("cannot read standard input: {error}"))
                })?;
                if !line.trim().is_empty() {
                    keys.push(resolve(daemon, &line).await?);
                }
            }
        }
        Ok(keys)
    }
}

/// What requests name `keys` with, `max` of them in each.
pub(crate) fn requests(keys: &[BlockKey], max: usize) -> impl Iterator<Item = v1::Names> {
    keys.chunks(max.max(1)).map(|chunk| v1::Names {
        keys: chunk.iter().map(|key| key.as_bytes().to_vec().into()).collect(),
        ..Default::default()
    })
}

/// What was typed for a key.
#[derive(Debug, PartialEq)]
enum Typed {
    Key(BlockKey),
    Prefix(String),
}

fn typed(text: &str) -> Result<Typed, Failure> {
    let text = text.trim();
    let digits = text.strip_prefix("block/").unwrap_or(text).to_ascii_lowercase();
    if let Ok(key) = digits.parse() {
        return Ok(Typed::Key(key));
    }
    let hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if hex && (PREFIX_DIGITS_MIN..BlockKey::BYTES * 2).contains(&digits.len()) {
        return Ok(Typed::Prefix(digits));
    }
    Err(Failure::usage(format!("`{text}` is not a block key"))
        .help("a key has 32 hex digits, of which the first 8 are enough; see `kvctl get blocks`"))
}

/// The key that `text` stands for; asks the daemon when only its beginning was given.
pub(crate) async fn resolve(daemon: &Daemon, text: &str) -> Result<BlockKey, Failure> {
    let prefix = match typed(text)? {
        Typed::Key(key) => return Ok(key),
        Typed::Prefix(prefix) => prefix,
    };
    let mut request =
        v1::ListBlocksRequest { page_size: 2, key_prefix: prefix.clone(), ..Default::default() };
    let mut found = Vec::new();
    // A page ends with its shard: an empty one is not the end.
    loop {
        let page = daemon.within(daemon.admin().list_blocks(daemon.request(request.clone()))).await?;
        found.extend(page.blocks);
        if page.next_page_token.is_empty() || found.len() > 1 {
            break;
        }
        request.page_token = page.next_page_token;
    }
    match found.as_slice() {
        [one] => kv_api::convert::key(&one.key).map_err(Failure::from),
        [] => Err(Failure::new(Exit::NotFound, format!("no block's key begins with {prefix}"))
            .help("give the whole key to ask about a block that is gone: `kvctl why KEY`")),
        _ => Err(Failure::usage(format!("several keys begin with {prefix}"))
            .help(format!("list them with `kvctl get blocks --prefix {prefix}`"))),
    }
}

/// Layers and heads from `0..32/32,0..8/8`.
fn parse_slice(text: &str) -> Result<Slice, String> {
    let wrong = || format!("`{text}` is not a slice; write layers and KV heads like 0..32/32,0..8/8");
    let part = |text: &str| {
        let (range, total) = text.trim().split_once('/')?;
        let (start, end) = range.split_once("..")?;
        Some((start.parse().ok()?..end.parse().ok()?, total.parse().ok()?))
    };
    let (layers, heads) = text.split_once(',').ok_or_else(wrong)?;
    let (layers, layers_total) = part(layers).ok_or_else(wrong)?;
    let (heads, heads_total) = part(heads).ok_or_else(wrong)?;
    let slice = Slice { layers, heads, layers_total, heads_total };
    slice.validate().map_err(|error| error.to_string())?;
    Ok(slice)
}

/// A scope file: the fields of [`Scope`], and `slice` as text when the file is about one slice.
fn parse_scope(text: &str) -> Result<(Scope, Option<Slice>), Failure> {
    let wrong = |message: String| {
        Failure::usage(message)
            .help("a scope file holds lines like model = \"llama-3\" and tenant = \"team-a\"")
    };
    let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| wrong(error.to_string()))?;
    let slice = match table.remove("slice") {
        None => None,
        Some(toml::Value::String(text)) => Some(parse_slice(&text).map_err(wrong)?),
        Some(_) => return Err(wrong("`slice` is text like \"0..32/32,0..8/8\"".into())),
    };
    let scope: Scope = table.try_into().map_err(|error: toml::de::Error| wrong(error.to_string()))?;
    scope.validate().map_err(|error| wrong(error.to_string()))?;
    Ok((scope, slice))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_may_be_whole_short_or_listed() {
        let whole = "00112233445566778899aabbccddeeff";
        let key = whole.parse().unwrap();
        assert_eq!(typed(whole), Ok(Typed::Key(key)));
        assert_eq!(typed(&format!(" block/{} ", whole.to_uppercase())), Ok(Typed::Key(key)));
        assert_eq!(typed("0011AABB"), Ok(Typed::Prefix("0011aabb".into())));
        for wrong in ["0011", "", "xyzw1234", &whole.repeat(2)] {
            assert_eq!(typed(wrong).unwrap_err().exit, Exit::Usage, "{wrong}");
        }
    }

    #[test]
    fn slices_are_read_and_checked() {
        let slice = parse_slice("4..8/32, 0..2/8").unwrap();
        assert_eq!(slice, Slice { layers: 4..8, heads: 0..2, layers_total: 32, heads_total: 8 });
        for wrong in ["", "0..4/4", "0..4,0..2", "4..4/8,0..1/1", "0..9/8,0..1/1", "0..99999/9,0..1/1"] {
            assert!(parse_slice(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn scope_files_are_read_and_their_mistakes_named() {
        let (scope, slice) =
            parse_scope("model = \"m\"\ntenant = \"a\"\nblock_tokens = 16\nslice = \"0..2/2,0..4/4\"")
                .unwrap();
        assert_eq!((scope.model.as_str(), scope.block_tokens), ("m", 16));
        assert_eq!(slice, Some(Slice::whole(2, 4)));
        // The same name as everybody else's, down to the key.
        let named = Named { scope, slice: slice.unwrap(), hash: SequenceHash::from(7) };
        assert_eq!(named.key().to_string(), "3bac0924c277bdf44f4843f436950f7d");
        for (text, word) in [("modle = \"m\"", "modle"), ("model = \"m\"", "tenant"), ("slice = 3", "slice")]
        {
            let failure = parse_scope(text).unwrap_err();
            assert!(failure.message.contains(word), "{failure:?}");
        }
    }

    #[test]
    fn long_lists_are_split_into_requests() {
        let keys = [BlockKey([1; 16]); 9];
        let sizes: Vec<usize> = requests(&keys, 4).map(|names| names.keys.len()).collect();
        assert_eq!(sizes, [4, 4, 1]);
    }
}
