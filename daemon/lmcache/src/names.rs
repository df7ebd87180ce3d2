//! From token ids to the names of blocks.
//!
//! A chunk is named by all tokens up to its end, in a chain:
//! ```text
//! name 0 = BLAKE3(root | tokens of chunk 0)      root: a constant of this door
//! name n = BLAKE3(name n-1 | tokens of chunk n)  tokens: u32, little-endian
//! ```
//! Every call of a request carries all of its tokens, a long prompt in each of its steps. So chains are kept: for
//! the next call of the same request, and for prompts that begin alike. A chain is used as far as its tokens are
//! the same ones, compared one by one; a hash that merely collides is not enough.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use kv_client::SequenceHash;
use lru::LruCache;

use crate::wire::IpcCacheServerKey;

/// Most tokens of one request.
pub const TOKENS_MAX: usize = 4 << 20;
/// Most workers that the cache of one token may be cut up for.
pub const WORLD_MAX: u32 = 1024;
/// Longest name of a model, request or salt in bytes.
const TEXT_BYTES_MAX: usize = 1024;
/// Chains that begin alike and are looked through for the one that goes along furthest.
const ALIKE_MAX: usize = 8;

/// Why a key names nothing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadKey {
    /// There is none.
    #[error("the call has no key")]
    None,
    /// A number that cannot be.
    #[error("field `{field}` is {value}: expected {expected}")]
    Number {
        /// Which.
        field: &'static str,
        /// What was said.
        value: i64,
        /// What could be.
        expected: &'static str,
    },
    /// A text that is too long, or empty.
    #[error("field `{field}` has {bytes} bytes: expected {least} to {TEXT_BYTES_MAX}")]
    Text {
        /// Which.
        field: &'static str,
        /// Its length.
        bytes: usize,
        /// The least it may have.
        least: usize,
    },
    /// More tokens than are taken.
    #[error("{tokens} tokens: at most {TOKENS_MAX} are taken")]
    Long {
        /// How many.
        tokens: usize,
    },
}

/// What a call is about: a key of the protocol that makes sense.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wanted {
    /// Model, as the engine calls it.
    pub model: String,
    /// Pieces that the cache of one token is cut into.
    pub world: u32,
    /// Which piece; none means all.
    pub rank: Option<u32>,
    /// Tokens of the whole chunks up to the end of what is meant.
    pub tokens: Vec<u32>,
    /// Chunks that are meant.
    pub chunks: Range<usize>,
    /// Name of the request.
    pub request: String,
    /// Whose blocks; empty without one.
    pub salt: String,
    /// Workers that will read each piece; at least 1.
    pub readers: u32,
}

impl Wanted {
    /// Reads a key where chunks have `chunk_tokens` (at least 1). A part of a chunk at the end does not count;
    /// one at the beginning counts as the whole.
    pub fn parse(key: Option<IpcCacheServerKey>, chunk_tokens: usize) -> Result<Self, BadKey> {
        let key = key.ok_or(BadKey::None)?;
        let texts = [
            ("model_name", &key.model_name, 1),
            ("request_id", &key.request_id, 0),
            ("cache_salt", &key.cache_salt, 0),
        ];
        for (field, text, least) in texts {
            if !(least..=TEXT_BYTES_MAX).contains(&text.len()) {
                return Err(BadKey::Text { field, bytes: text.len(), least });
            }
        }
        let number =
            |field, value, range: std::ops::RangeInclusive<i64>, expected| match range.contains(&value) {
                true => Ok(value as u32),
                false => Err(BadKey::Number { field, value, expected }),
            };
        let world = number("world_size", key.world_size, 1..=i64::from(WORLD_MAX), "1 to 1024")?;
        let rank = key.worker_id.map(|rank| {
            number("worker_id", rank, 0..=i64::from(world) - 1, "0 or more, and less than world_size")
        });
        let tokens = key.token_ids.len();
        if tokens > TOKENS_MAX {
            return Err(BadKey::Long { tokens });
        }
        let position = |field, value| {
            number(field, value, 0..=TOKENS_MAX as i64, "a position among the tokens").map(|at| at as usize)
        };
        let (start, end) = (position("start", key.start)?, position("end", key.end)?);
        let chunks_end = end.min(tokens) / chunk_tokens;
        let whole = &key.token_ids[..chunks_end * chunk_tokens];
        let token = |id: &i64| {
            u32::try_from(*id).map_err(|_| BadKey::Number {
                field: "token_ids",
                value: *id,
                expected: "numbers from 0 to 4294967295",
            })
        };
        Ok(Self {
            world,
            rank: rank.transpose()?,
            tokens: whole.iter().map(token).collect::<Result<_, _>>()?,
            chunks: (start / chunk_tokens).min(chunks_end)..chunks_end,
            readers: key.num_kv_readers.clamp(1, i64::from(WORLD_MAX)) as u32,
            model: key.model_name,
            request: key.request_id,
            salt: key.cache_salt,
        })
    }
}

/// Tokens and the names of their chunks.
#[derive(PartialEq, Eq, Debug)]
pub struct Chain {
    tokens: Vec<u32>,
    names: Vec<SequenceHash>,
}

impl Chain {
    /// The name of every chunk, from the first on.
    pub fn names(&self) -> &[SequenceHash] {
        &self.names
    }

    /// Chunks from the first on that have the same tokens.
    fn alike(&self, tokens: &[u32], chunk_tokens: usize) -> usize {
        let chunks = self.tokens.chunks_exact(chunk_tokens).zip(tokens.chunks_exact(chunk_tokens));
        chunks.take_while(|(mine, theirs)| mine == theirs).count()
    }
}

/// Names the chunks of `tokens`, whose first chunks are called `known` already.
fn chain(tokens: Vec<u32>, chunk_tokens: usize, known: &[SequenceHash]) -> Chain {
    let mut names = Vec::with_capacity(tokens.len() / chunk_tokens);
    names.extend_from_slice(known);
    let mut message = Vec::with_capacity(32 + 4 * chunk_tokens);
    for chunk in tokens.chunks_exact(chunk_tokens).skip(known.len()) {
        message.clear();
        match names.last() {
            Some(parent) => message.extend_from_slice(parent.as_bytes()),
            None => message.extend_from_slice(&blake3::derive_key("kvd: chunks of LMCache, version 1", &[])),
        }
        message.extend(chunk.iter().flat_map(|token| token.to_le_bytes()));
        let name = SequenceHash::new(blake3::hash(&message).as_bytes()).expect("a hash has 32 bytes");
        names.push(name);
    }
    Chain { tokens, names }
}

/// Chains of late, found again by their request and by how they begin.
pub struct Chains {
    chunk_tokens: usize,
    tokens_max: usize,
    kept: Mutex<Kept>,
}

struct Kept {
    by_request: LruCache<String, Arc<Chain>>,
    /// Requests whose chains begin with the chunk of this name, the newest last.
    by_head: HashMap<SequenceHash, Vec<String>>,
    tokens: usize,
}

impl Chains {
    /// None yet. Chunks have `chunk_tokens`; at most `tokens_max` tokens are kept, and the newest chain.
    pub fn new(chunk_tokens: usize, tokens_max: usize) -> Self {
        let kept = Kept { by_request: LruCache::unbounded(), by_head: HashMap::new(), tokens: 0 };
        Self { chunk_tokens, tokens_max, kept: Mutex::new(kept) }
    }

    /// The chain of these tokens, which `request` has.
    pub fn of(&self, request: &str, tokens: &[u32]) -> Arc<Chain> {
        let chunks = tokens.len() / self.chunk_tokens;
        let known = self.longest(request, tokens);
        if let Some((known, alike)) = &known
            && *alike == chunks
            && known.names.len() == chunks
        {
            return Arc::clone(known);
        }
        let prefix = known.as_ref().map_or(&[][..], |(known, alike)| &known.names[..*alike]);
        let made = Arc::new(chain(tokens[..chunks * self.chunk_tokens].to_vec(), self.chunk_tokens, prefix));
        if chunks > 0 {
            self.keep(request, &made);
        }
        made
    }

    /// The kept chain that goes along with these tokens furthest, and how far.
    fn longest(&self, request: &str, tokens: &[u32]) -> Option<(Arc<Chain>, usize)> {
        let mut candidates = Vec::new();
        {
            let mut kept = self.lock();
            candidates.extend(kept.by_request.get(request).map(Arc::clone));
        }
        let far = |chain: &Arc<Chain>| chain.alike(tokens, self.chunk_tokens);
        let chunks = tokens.len() / self.chunk_tokens;
        // The request's own chain covers it, as a rule; only else is a head worth hashing.
        if chunks > 0 && candidates.first().is_none_or(|own| far(own) < chunks) {
            let head = chain(tokens[..self.chunk_tokens].to_vec(), self.chunk_tokens, &[]).names[0];
            let kept = self.lock();
            let requests = kept.by_head.get(&head).into_iter().flatten();
            candidates.extend(requests.filter_map(|request| kept.by_request.peek(request)).map(Arc::clone));
        }
        let measured = candidates.into_iter().map(|chain| (far(&chain), chain));
        measured.max_by_key(|(far, _)| *far).map(|(far, chain)| (chain, far))
    }

    fn keep(&self, request: &str, chain: &Arc<Chain>) {
        let mut kept = self.lock();
        kept.forget(request);
        kept.tokens += chain.tokens.len();
        let alike = kept.by_head.entry(chain.names[0]).or_default();
        alike.push(request.to_owned());
        let beyond = (alike.len() > ALIKE_MAX).then(|| alike[0].clone());
        kept.by_request.put(request.to_owned(), Arc::clone(chain));
        if let Some(oldest) = beyond {
            kept.forget(&oldest);
        }
        while kept.tokens > self.tokens_max && kept.by_request.len() > 1 {
            let Some((oldest, _)) =
                kept.by_request.peek_lru().map(|(request, chain)| (request.clone(), chain))
            else {
                break;
            };
            kept.forget(&oldest);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn forget(&mut self, request: &str) {
        let Some(chain) = self.by_request.pop(request) else { return };
        self.tokens -= chain.tokens.len();
        if let Some(alike) = self.by_head.get_mut(&chain.names[0]) {
            alike.retain(|other| other != request);
            if alike.is_empty() {
                self.by_head.remove(&chain.names[0]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(tokens: impl IntoIterator<Item = i64>) -> IpcCacheServerKey {
        let token_ids: Vec<i64> = tokens.into_iter().collect();
        IpcCacheServerKey {
            model_name: "m".into(),
            world_size: 2,
            end: token_ids.len() as i64,
            token_ids,
            request_id: "r".into(),
            ..IpcCacheServerKey::default()
        }
    }

    #[test]
    fn only_whole_chunks_up_to_the_end_are_meant() {
        let parse = |start, end| {
            let wanted = Wanted::parse(Some(IpcCacheServerKey { start, end, ..key(0..10) }), 4).unwrap();
            (wanted.chunks, wanted.tokens.len())
        };
        assert_eq!(parse(0, 10), (0..2, 8));
        assert_eq!(parse(4, 8), (1..2, 8));
        assert_eq!(parse(5, 8), (1..2, 8));
        assert_eq!(parse(0, 7), (0..1, 4));
        assert_eq!(parse(8, 4), (1..1, 4));
        assert_eq!(parse(0, 100), (0..2, 8));
        assert_eq!(parse(0, 0), (0..0, 0));
    }

    #[test]
    fn a_key_that_cannot_be_says_which_field() {
        type Change = fn(&mut IpcCacheServerKey);
        let rows: [(Change, &str); 9] = [
            (|key| key.model_name.clear(), "model_name"),
            (|key| key.cache_salt = "s".repeat(2000), "cache_salt"),
            (|key| key.world_size = 0, "world_size"),
            (|key| key.world_size = 1 << 40, "world_size"),
            (|key| key.worker_id = Some(2), "worker_id"),
            (|key| key.worker_id = Some(-1), "worker_id"),
            (|key| key.start = -1, "start"),
            (|key| key.end = i64::MAX, "end"),
            (|key| key.token_ids[3] = -7, "token_ids"),
        ];
        for (change, field) in rows {
            let mut key = key(0..10);
            change(&mut key);
            let refused = Wanted::parse(Some(key), 4).unwrap_err().to_string();
            assert!(refused.contains(field), "{refused}");
        }
        assert_eq!(Wanted::parse(None, 4), Err(BadKey::None));
    }

    #[test]
    fn names_are_stable_and_hang_on_every_token_before() {
        let named = chain((0..12).collect(), 4, &[]);
        // They outlive the program that made them: a change here orphans every stored block.
        let first: String = named.names[0].as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(first, "60ff27376adcb3675a73bce92c51082e52d03a05b861acf1fa46e31d1c937fb2");
        let other = chain([9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11].to_vec(), 4, &[]);
        assert!(named.names.iter().zip(&other.names).all(|(one, other)| one != other));
        let later = chain([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12].to_vec(), 4, &[]);
        assert_eq!(
            (named.names[..2].to_vec(), named.names[2] == later.names[2]),
            (later.names[..2].to_vec(), false)
        );
    }

    #[test]
    fn what_is_kept_stays_within_its_bound() {
        let chains = Chains::new(4, 100);
        for request in 0..50 {
            chains.of(&request.to_string(), &[request; 24]);
            let kept = chains.lock();
            assert!(kept.tokens <= 100 && kept.tokens == 24 * kept.by_request.len());
            assert!(kept.by_head.len() <= kept.by_request.len());
        }
        chains.of("longer than all of it", &[7; 400]);
        assert_eq!(chains.lock().by_request.len(), 1);
        for request in 0..50 {
            chains.of(&request.to_string(), &[7, 7, 7, 7]);
            assert!(chains.lock().by_head.values().all(|alike| alike.len() <= ALIKE_MAX));
        }
    }

    proptest! {
        #[test]
        fn kept_chains_never_change_a_name(
            calls in prop::collection::vec((0..6u8, prop::collection::vec(0..3u32, 0..40)), 1..60)
        ) {
            let chains = Chains::new(3, 120);
            for (request, tokens) in calls {
                let named = chains.of(&request.to_string(), &tokens);
                let anew = chain(tokens, 3, &[]);
                prop_assert_eq!(named.names(), anew.names());
            }
        }
    }
}
