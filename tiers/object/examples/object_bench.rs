//! How fast blocks go into a store and come back, and at how many requests.
//!
//!   cargo run --release -p kv-object --example object_bench -- [DIRECTORY] [BLOCKS] [BLOCK_BYTES]
//!
//! Without a directory: in memory, which is the cost of the tier itself. Reads are prefixes of 64 blocks, all checked,
//! by a second node that knows nothing at first. In a directory, the same bytes as large objects
//! without a tier stand beside it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kv_block::{BlockKey, Checksum, Epoch, Priority, Record, ScopeId, Slice, payload};
use kv_object::Store;
use kv_object::dir::Dir;
use kv_object::landing::Landing;
use kv_object::memory::Memory;
use kv_object::pack::Binding;
use kv_object::tier::{Got, Offer, Tier, TierConfig, Want};
use tokio::time::Instant;

const PREFIX: u64 = 64;
const OBJECT_BYTES: usize = 32 << 20;

fn key(number: u64) -> BlockKey {
    BlockKey::from_halves([number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, number])
}

fn rate(bytes: u64, began: Instant) -> String {
    let seconds = began.elapsed().as_secs_f64();
    format!("{:7.0} MiB/s", bytes as f64 / f64::from(1 << 20) / seconds)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let word = |at: usize| words.get(at).map(String::as_str).filter(|word| !word.is_empty());
    let blocks: u64 = word(1).unwrap_or("4096").parse()?;
    let bytes: u32 = word(2).unwrap_or("65536").parse()?;
    let total = blocks * u64::from(bytes);
    let store: Arc<dyn Store> = match word(0) {
        Some(place) => Arc::new(Dir::open(Path::new(place))?),
        None => Arc::new(Memory::new()),
    };
    println!("{}: {blocks} blocks of {bytes} bytes", store.describe());

    let about = String::new();
    let binding =
        Arc::new(Binding { scope: ScopeId([7; 32]), slice: Slice::whole(2, 4), block_bytes: bytes, about });
    let offers: Vec<Offer> = (0..blocks)
        .map(|number| {
            let (key, mut content) = (key(number), vec![0; bytes as usize]);
            payload::fill(&key, &mut content);
            let checksum = Checksum::of(&key, &content);
            let priority = Priority::Normal;
            let record = Record { key, checksum, bytes, tag: binding.tag(), priority, expires_at: 0 };
            let parent = (!number.is_multiple_of(PREFIX)).then(|| self::key(number - 1));
            Offer { binding: binding.clone(), record, parent, bytes: content.into() }
        })
        .collect();

    if word(0).is_some() {
        // The same bytes as they are, one object after the other. In memory that would be no copy at all.
        let plain = Bytes::from(vec![7; OBJECT_BYTES]);
        let count = total.div_ceil(OBJECT_BYTES as u64);
        let began = Instant::now();
        for number in 0..count {
            store.put(&format!("plain/{number}"), plain.clone()).await?;
        }
        println!("plain put   {}", rate(count * OBJECT_BYTES as u64, began));
        let mut slot = vec![0; OBJECT_BYTES];
        let began = Instant::now();
        for number in 0..count {
            store.get(&format!("plain/{number}"), 0, &mut Landing::of(&mut slot)).await?;
        }
        println!("plain get   {}", rate(count * OBJECT_BYTES as u64, began));
    }

    let one = Tier::open(store.clone(), TierConfig::new("one", Epoch(1)), 1).await?.0;
    let began = Instant::now();
    for some in offers.chunks(PREFIX as usize) {
        one.put(1, some.to_vec()).await?;
    }
    one.flush(true).await?;
    println!("tier put    {}", rate(total, began));
    one.refresh(1).await?;

    let began = Instant::now();
    let (two, opened) = Tier::open(store.clone(), TierConfig::new("two", Epoch(1)), 1).await?;
    println!("tier open   {:7.1} ms, {} blocks found", began.elapsed().as_secs_f64() * 1e3, opened.blocks);
    let mut slots = vec![vec![0; bytes as usize]; PREFIX as usize];
    let began = Instant::now();
    let mut hits = 0;
    for first in (0..blocks).step_by(PREFIX as usize) {
        let numbers = first..blocks.min(first + PREFIX);
        let mut wants: Vec<Want<'_>> =
            numbers.zip(&mut slots).map(|(number, slot)| Want { key: key(number), into: slot }).collect();
        let got = two.read(1, Duration::from_secs(60), &mut wants).await;
        hits += got.iter().filter(|got| matches!(got, Got::Read(_))).count();
    }
    println!("tier read   {}, {hits} of {blocks} hit", rate(total, began));
    let totals = two.report().totals;
    let requests =
        |tier: &Tier| tier.report().requests.counts.values().map(|count| count.requests).sum::<u64>();
    println!(
        "requests    {:.4} a block written, {:.4} a block read",
        requests(&one) as f64 / blocks as f64,
        requests(&two) as f64 / blocks as f64
    );
    println!(
        "read        {:.3} bytes for each that was used",
        totals.bytes_read as f64 / totals.bytes_used as f64
    );
    Ok(())
}
