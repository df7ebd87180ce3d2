//! Looking up prefixes of 1,000 blocks, alone and while others store.
//!
//! ```sh
//! cargo build --release -p kvd && cargo run --release -p kv-benches --bin lookup -- [blocks stored meanwhile]
//! ```
//! The prefixes are drawn at random from 200,000 resident blocks of 4 KiB, and looked up by the engine's hashes
//! (the keys are derived each time) and by keys that were kept, in turn. Then a second worker, a process of
//! its own, stores blocks of 4 KiB in batches while the lookups go on. On two cores three busy threads (this
//! one, the storing worker, the shard) share what there is, so p99 there is the scheduler's as well.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};
use kv_benches::{Home, binding, hashes, micros, quantile};
use kv_client::{Client, ClientOptions, PutOptions, SequenceHash, Worker, WorkerOptions};

const RESIDENT: u64 = 200_000;
const PREFIX: usize = 1_000;

fn main() -> Result<()> {
    if let Ok(socket) = std::env::var("LOOKUP_STORES_AT") {
        return store_many(&socket, kv_benches::argument(0)?);
    }
    let stored = kv_benches::argument(1_000_000)?;
    // Room for what is looked up; what is stored meanwhile passes through the rest.
    let sizes = ["--host-bytes", "2GiB", "--set", "catalog.entries_max=1500000", "--set", "host.policy=lru"];
    let home = Home::new("lookup", &sizes)?;
    let (_daemon, _) = home.start()?;
    let worker = home.worker(WorkerOptions::default())?;
    let resident = binding(&worker, "lookup", 4096)?;
    store(&worker, &resident, 0..RESIDENT)?;
    let names = hashes(0..RESIDENT);
    let keys = resident.keys(&names);

    let mut random = 7u64;
    // Nanoseconds a block by hashes, and by keys.
    let mut turn = || -> Result<[f64; 2]> {
        let mut draw = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 20) as usize % names.len()
        };
        let by_hash: Vec<_> = (0..PREFIX).map(|_| names[draw()]).collect();
        let by_key: Vec<_> = (0..PREFIX).map(|_| keys[draw()]).collect();
        let (hashes_took, with_hashes) = micros(|| worker.lookup(&resident, &by_hash));
        let (keys_took, with_keys) = micros(|| worker.lookup_keys(&by_key));
        for found in [with_hashes?.prefix(), with_keys?.prefix()] {
            if found != PREFIX {
                bail!("{found} of {PREFIX} found: the resident blocks were evicted");
            }
        }
        Ok([hashes_took, keys_took].map(|took| took * 1e3 / PREFIX as f64))
    };
    for _ in 0..500 {
        turn()?;
    }
    let alone = (0..5_000).map(|_| turn()).collect::<Result<Vec<_>>>()?;

    let mut child = Command::new(std::env::current_exe()?)
        .arg(stored.to_string())
        .env("LOOKUP_STORES_AT", home.socket())
        .stdout(Stdio::inherit())
        .spawn()?;
    let mut meanwhile = Vec::new();
    let status = loop {
        meanwhile.push(turn()?);
        if let Some(status) = child.try_wait()? {
            break status;
        }
    };
    if !status.success() {
        bail!("the storing worker ended with {status}");
    }
    for (what, times) in [("alone", &alone), ("while stores run", &meanwhile)] {
        for (at, by) in ["hashes", "keys"].into_iter().enumerate() {
            let mut times: Vec<_> = times.iter().map(|took| took[at]).collect();
            let (p50, p99) = (quantile(&mut times, 0.5), quantile(&mut times, 0.99));
            println!(
                "{what:>16}, by {by:>6}: {p50:.1} ns a block, p99 {p99:.1} ({} prefixes of {PREFIX})",
                times.len()
            );
        }
    }
    Ok(())
}

fn store(worker: &Worker, binding: &kv_client::Binding, range: std::ops::Range<u64>) -> Result<()> {
    let body = vec![7u8; 4096];
    for start in range.clone().step_by(512) {
        let names = hashes(start..(start + 512).min(range.end));
        let blocks: Vec<(SequenceHash, &[u8])> = names.iter().map(|name| (*name, &body[..])).collect();
        for stored in worker.put_many(binding, &blocks, &PutOptions::default())? {
            stored?;
        }
    }
    Ok(())
}

/// The other process: stores `count` blocks, forgetting old ones so that memory is enough.
fn store_many(socket: &str, count: u64) -> Result<()> {
    const ROUND: u64 = 100_000;
    let client = Client::connect(ClientOptions::socket(socket)).wait()?;
    let worker = client.worker(WorkerOptions::default()).wait()?;
    let binding = binding(&worker, "stored meanwhile", 4096)?;
    let began = std::time::Instant::now();
    for start in (0..count).step_by(ROUND as usize) {
        let end = (start + ROUND).min(count);
        store(&worker, &binding, start..end)?;
        for names in hashes(start..end).chunks(4096) {
            worker.evict(&binding, names, None).wait()?;
        }
    }
    println!("{count} blocks stored in {:.1} s meanwhile", began.elapsed().as_secs_f64());
    Ok(())
}
