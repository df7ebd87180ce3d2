//! Request traces in the format that Mooncake publishes: one JSON object a line.
//!
//! ```text
//! {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, ...]}
//!               ms       tokens                             tokens   one a block of 512 tokens
//! ```
//! Only whole blocks are kept: an engine does not cache the one that the prompt does not fill.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// The trace that comes with the program, see `trace/SOURCE.md`.
pub const BUILT_IN: &str = include_str!("../trace/mooncake-conversation.jsonl");
/// Tokens of one block of a trace.
pub const BLOCK_TOKENS: u32 = 512;
/// Most blocks that a request may name.
pub const BLOCKS_MAX: usize = 1 << 16;
/// Longest line and longest file that are read, in bytes.
pub const LINE_BYTES_MAX: usize = 1 << 20;
const FILE_BYTES_MAX: u64 = 1 << 30;

/// One request to an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// When it came, in milliseconds since the trace began.
    pub timestamp_ms: u64,
    /// Names of the whole blocks of its prompt, in order.
    pub blocks: Vec<u64>,
}

/// Why a trace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A line is not a request.
    #[error("line {line}: {why}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// There is no request in it.
    #[error("no request in it")]
    Empty,
    /// The file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Its name.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is larger than any trace.
    #[error("{} has {bytes} bytes, {FILE_BYTES_MAX} are read at most", path.display())]
    Large {
        /// Its name.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
}

#[derive(Deserialize)]
struct Line {
    timestamp: u64,
    input_length: u64,
    hash_ids: Vec<u64>,
}

/// Reads a trace. Empty lines are passed over; fields that are not known are too.
pub fn parse(text: &str) -> Result<Vec<Request>, TraceError> {
    let mut requests = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        requests.push(request(line).map_err(|why| TraceError::Line { line: index + 1, why })?);
    }
    if requests.is_empty() { Err(TraceError::Empty) } else { Ok(requests) }
}

fn request(line: &str) -> Result<Request, String> {
    if line.len() > LINE_BYTES_MAX {
        return Err(format!("{} bytes, {LINE_BYTES_MAX} are allowed", line.len()));
    }
    let Line { timestamp, input_length, hash_ids: mut blocks } =
        serde_json::from_str(line).map_err(|error| error.to_string())?;
    if blocks.len() > BLOCKS_MAX {
        return Err(format!("{} blocks, {BLOCKS_MAX} are allowed", blocks.len()));
    }
    let tokens = u64::from(BLOCK_TOKENS);
    if input_length.div_ceil(tokens) > blocks.len() as u64 {
        return Err(format!("{input_length} tokens in {} blocks of {tokens}", blocks.len()));
    }
    blocks.truncate((input_length / tokens) as usize);
    Ok(Request { timestamp_ms: timestamp, blocks })
}

/// How many different blocks these requests name.
pub fn blocks(requests: &[Request]) -> usize {
    let names: HashSet<u64> = requests.iter().flat_map(|request| &request.blocks).copied().collect();
    names.len()
}

/// Reads the trace in a file.
pub fn read(path: &Path) -> Result<Vec<Request>, TraceError> {
    let failed = |source| TraceError::Read { path: path.to_owned(), source };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(TraceError::Large { path: path.to_owned(), bytes });
    }
    parse(&std::fs::read_to_string(path).map_err(failed)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_built_in_trace_is_whole_and_small_and_says_where_it_is_from() {
        let requests = parse(BUILT_IN).unwrap();
        assert_eq!(requests.len(), 2500);
        assert!(BUILT_IN.len() <= 700_000);
        let different: std::collections::HashSet<_> = requests.iter().flat_map(|one| &one.blocks).collect();
        assert!(different.len() * (64 << 10) > 8 * (256 << 20), "it must overflow the host tier many times");
        assert!(requests.is_sorted_by_key(|one| one.timestamp_ms));
        let source = include_str!("../trace/SOURCE.md");
        assert!(source.contains("Apache-2.0") && source.contains("643,825 bytes"));
        assert_eq!(BUILT_IN.len(), 643_825);
    }

    #[test]
    fn a_malformed_line_is_refused_with_its_number() {
        let good = r#"{"timestamp": 1, "input_length": 1025, "output_length": 1, "hash_ids": [5, 6, 7]}"#;
        let bad = [
            ("{", "EOF"),
            ("[]", "invalid"),
            (r#"{"timestamp": 1, "hash_ids": []}"#, "input_length"),
            (r#"{"timestamp": -1, "input_length": 0, "hash_ids": []}"#, "timestamp"),
            (r#"{"timestamp": 1, "input_length": 513, "hash_ids": [1]}"#, "513 tokens in 1 blocks"),
            (r#"{"timestamp": 1, "input_length": 512, "hash_ids": ["a"]}"#, "string"),
            (r#"{"timestamp": 1, "input_length": 512, "hash_ids": [1]} x"#, "trailing"),
        ];
        for (text, why) in bad {
            let error = parse(&format!("{good}\n\n{text}\n{good}")).unwrap_err();
            assert!(matches!(error, TraceError::Line { line: 3, .. }), "{text}: {error}");
            let said = error.to_string();
            let why_is_said = said.contains(why) || why == "timestamp" && said.contains("-1");
            assert!(why_is_said, "{text}: {error}");
        }
        assert!(matches!(parse("\n \n"), Err(TraceError::Empty)));
    }

    #[test]
    fn only_whole_blocks_are_kept_and_unknown_fields_are_passed_over() {
        let text = r#"{"timestamp": 9, "input_length": 1025, "hash_ids": [5, 6, 7], "chat_id": 1}"#;
        assert_eq!(parse(text).unwrap(), [Request { timestamp_ms: 9, blocks: vec![5, 6] }]);
    }

    #[test]
    fn lines_and_requests_have_a_longest_length() {
        let blanks = format!("{{{}}}", " ".repeat(LINE_BYTES_MAX));
        assert!(parse(&blanks).unwrap_err().to_string().contains("bytes"));
        let many = vec!["1"; BLOCKS_MAX + 1].join(",");
        let text = format!(r#"{{"timestamp":0,"input_length":0,"hash_ids":[{many}]}}"#);
        assert!(parse(&text).unwrap_err().to_string().contains("blocks"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn any_number_of_tokens_is_read_or_refused(tokens: u64, stamp: u64, hash: u64) {
            let line = format!(r#"{{"timestamp":{stamp},"input_length":{tokens},"hash_ids":[{hash}]}}"#);
            prop_assert_eq!(parse(&line).is_ok(), tokens <= 512);
        }
    }
}
