//! What the object tier costs and brings for a request trace: requests to the store for each block that moves, bytes
//! read for each byte that was of use, hits by tier.
//!
//! Run: `cargo run --release -p kv-node --example object_trace -- TRACE.jsonl [OPTION=NUMBER ...]`. A line of the trace
//! is a request, `{"timestamp": ms, "input_length": tokens, "hash_ids": [blocks of 512 tokens]}`, as in Mooncake's
//! published traces; a block that the prompt does not fill is left out.
//!
//! ```text
//!   requests, round robin --> node: kv_node::Brain, host memory, disk --reads, uploads, keeper--> kv_object::Tier --.
//!                         --> node: ...                                                          --> kv_object::Tier -+--> one
//!                         --> node: ...                                                          --> kv_object::Tier -'   store
//! ```
//! Brains and tiers are the real ones, and so is what lies between them (`node.rs` does what the daemon does, on a clock
//! that is not real). There are no peers: what another node has comes by way of the store. A request acquires all its
//! blocks at once, is served those up to the first that misses, and stores the others. Every request to the store is
//! counted (`store.rs`), those of the upkeep too, from opening to the last manifest.
//!
//! A block is of use if a request is served it. What was read ahead and is not, or lies behind a miss, or is read once
//! more after it left, is not.
//!
//! Blocks are 8 KiB here, and stand for longer ones: all limits in bytes are made smaller by the same factor, so that as
//! many blocks as in earnest share a pack and a request. Footers and manifests are as long as in earnest, and are set
//! against blocks in earnest.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use kv_block::{BlockKey, Scope, SequenceHash, Slice};
use tokio::time::{Instant, sleep_until};

mod node;
mod store;

use node::{Node, Served};
use store::Counting;

/// Length of a block here.
pub(crate) const BLOCK_BYTES: u32 = 8 << 10;

/// What can be chosen.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Nodes that share the store.
    pub(crate) nodes: u64,
    /// Blocks in host memory of each.
    pub(crate) host: u64,
    /// Blocks on the disk of each; 0 for none.
    pub(crate) disk: u64,
    /// Length in earnest of a block, in KiB.
    pub(crate) block_kib: u64,
    /// Length of a pack in earnest, in MiB.
    pub(crate) pack_mib: u64,
    /// How long the first block of a pack waits, in seconds.
    pub(crate) wait_s: u64,
    /// Reads that a block needs to be uploaded.
    pub(crate) reads_min: u64,
    /// How long after its first read it is, in seconds.
    pub(crate) age_s: u64,
    /// Time between two looks for what others wrote, in seconds.
    pub(crate) refresh_s: u64,
    /// Bytes of one request in earnest, in MiB; 0 for the default.
    pub(crate) span_mib: u64,
    /// Bytes that nobody wants between two blocks of one request in earnest, in MiB; 0 for the default.
    pub(crate) gap_mib: u64,
    /// Blocks that are read ahead; 0 for the default, 1000000 for none.
    pub(crate) ahead: u64,
    /// Whether the brains are told which block came before which.
    pub(crate) order: u64,
}

impl Options {
    fn parse(words: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let mut options = Self {
            nodes: 4,
            host: 5000,
            disk: 0,
            block_kib: 2048,
            pack_mib: 48,
            wait_s: 10,
            reads_min: 1,
            age_s: 30,
            refresh_s: 30,
            span_mib: 0,
            gap_mib: 0,
            ahead: 0,
            order: 1,
        };
        for word in words {
            let (name, value) =
                word.split_once('=').with_context(|| format!("`{word}` is no OPTION=NUMBER"))?;
            let value = value.parse().with_context(|| format!("`{word}`"))?;
            let place = match name {
                "nodes" => &mut options.nodes,
                "host" => &mut options.host,
                "disk" => &mut options.disk,
                "block_kib" => &mut options.block_kib,
                "pack_mib" => &mut options.pack_mib,
                "wait_s" => &mut options.wait_s,
                "reads_min" => &mut options.reads_min,
                "age_s" => &mut options.age_s,
                "refresh_s" => &mut options.refresh_s,
                "span_mib" => &mut options.span_mib,
                "gap_mib" => &mut options.gap_mib,
                "ahead" => &mut options.ahead,
                "order" => &mut options.order,
                _ => anyhow::bail!("no option is called `{name}`"),
            };
            *place = value;
        }
        Ok(options)
    }

    /// How many times a block in earnest is longer.
    pub(crate) fn scale(&self) -> u64 {
        (self.block_kib << 10) / u64::from(BLOCK_BYTES)
    }
}

struct Request {
    at: Duration,
    keys: Vec<BlockKey>,
}

fn read_trace(path: &str) -> anyhow::Result<Vec<Request>> {
    let scope = Scope { model: "trace".into(), tenant: "trace".into(), ..Scope::default() }.id();
    let whole = Slice::whole(1, 1);
    let mut requests = Vec::new();
    for line in std::fs::read_to_string(path).with_context(|| path.to_owned())?.lines() {
        let request: serde_json::Value = serde_json::from_str(line)?;
        let full = request["input_length"].as_u64().unwrap_or(0) as usize / 512;
        let at = Duration::from_millis(request["timestamp"].as_u64().unwrap_or(0));
        let ids = request["hash_ids"].as_array().map(Vec::as_slice).unwrap_or_default();
        let ids = ids.iter().take(full).filter_map(serde_json::Value::as_u64);
        requests.push(Request {
            at,
            keys: ids.map(|id| scope.block_key(&SequenceHash::from(id), &whole)).collect(),
        });
    }
    Ok(requests)
}

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1);
    let usage = "usage: object_trace TRACE.jsonl [OPTION=NUMBER ...]";
    let requests = read_trace(&words.next().context(usage)?)?;
    let options = Options::parse(words)?;
    println!("{options:?}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    tokio::task::LocalSet::new().block_on(&runtime, replay(requests, options))
}

async fn replay(requests: Vec<Request>, options: Options) -> anyhow::Result<()> {
    let store = Arc::new(Counting::default());
    let mut nodes = Vec::new();
    for number in 0..options.nodes {
        nodes.push(Node::open(number, store.clone(), &options).await?);
    }
    let start = Instant::now();
    let mut under_way = Vec::new();
    let mut asked = 0;
    for (number, request) in requests.into_iter().enumerate() {
        sleep_until(start + request.at).await;
        asked += request.keys.len() as u64;
        let node = Rc::clone(&nodes[number % nodes.len()]);
        under_way.push(tokio::task::spawn_local(async move { node.serve(request.keys).await }));
    }
    let mut served = Served::default();
    for one in under_way {
        served += one.await?;
    }
    let lasted = start.elapsed();
    for node in &nodes {
        node.finish().await?;
    }
    print(&options, &nodes, &store, asked, served, lasted);
    Ok(())
}

fn print(
    options: &Options,
    nodes: &[Rc<Node>],
    store: &Counting,
    asked: u64,
    served: Served,
    lasted: Duration,
) {
    let ratio = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
    let sums: Vec<_> = nodes.iter().map(|node| node.sums()).collect();
    let sum = |of: fn(&node::Sums) -> u64| sums.iter().map(of).sum::<u64>();
    let (up, down, used) = (sum(|sums| sums.uploaded), sum(|sums| sums.downloaded), sum(|sums| sums.used));
    println!(
        "{asked} blocks asked for in {} s: {:.3} from host memory, {:.3} from disk, {:.3} from the store, {:.3} missed; \
         {} found behind a miss",
        lasted.as_secs(),
        ratio(served.host, asked),
        ratio(served.disk, asked),
        ratio(served.object, asked),
        ratio(served.missed, asked),
        served.behind,
    );
    println!(
        "{up} blocks up ({} packs, {} lost), {down} down, {used} of them of use ({} that nobody had waited for)",
        sum(|sums| sums.packs),
        sum(|sums| sums.lost),
        served.ahead,
    );
    let mut requests = 0;
    for ((kind, what), count) in store.counts() {
        requests += count.requests;
        println!("  {:6} {what:9}  {:8} requests  {:12} bytes", kind.name(), count.requests, count.bytes);
    }
    let scale = options.scale();
    let spans = sum(|sums| sums.span_bytes);
    let read_ahead_of = u64::from(BLOCK_BYTES);
    println!(
        "requests per block moved   {:.4}   (goal <= 0.1; one object a block: {:.2}; others: 5)",
        ratio(requests, up + down),
        // A put for each block written; a question and a read for each block that is wanted.
        ratio(up + 2 * used, up + used),
    );
    println!("requests per block of use  {:.4}   (a block written counts, too)", ratio(requests, up + used));
    println!(
        "bytes read per byte of use {:.3}    (goal <= 1.3), of blocks alone {:.3}",
        (spans * scale + store.read_besides()) as f64 / (used * read_ahead_of * scale).max(1) as f64,
        ratio(spans, used * read_ahead_of),
    );
    let (reads, blocks) = (sum(|sums| sums.reads), sum(|sums| sums.read));
    println!("blocks per read            {:.2}", ratio(blocks, reads));
}
