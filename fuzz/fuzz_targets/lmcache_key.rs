//! A key of LMCache's protocol: from wire bytes to names, with chains that are kept from call to call.
#![no_main]

use std::sync::LazyLock;

use kv_lmcache::{Chains, Wanted, wire};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

const CHUNK_TOKENS: usize = 4;

/// Kept over all inputs: what one leaves must not change the names of another.
static CHAINS: LazyLock<Chains> = LazyLock::new(|| Chains::new(CHUNK_TOKENS, 4096));

fuzz_target!(|data: &[u8]| {
    let Ok(key) = wire::IpcCacheServerKey::decode(data) else { return };
    let tokens = key.token_ids.len();
    let Ok(wanted) = Wanted::parse(Some(key), CHUNK_TOKENS) else { return };
    assert_eq!(wanted.tokens.len(), wanted.chunks.end * CHUNK_TOKENS);
    assert!(wanted.tokens.len() <= tokens && wanted.chunks.start <= wanted.chunks.end);
    assert!(wanted.rank.is_none_or(|rank| rank < wanted.world));
    let chain = CHAINS.of(&wanted.request, &wanted.tokens);
    assert_eq!(chain.names().len(), wanted.chunks.end);
    let anew = Chains::new(CHUNK_TOKENS, 4096);
    assert_eq!(chain.names(), anew.of("", &wanted.tokens).names());
});
