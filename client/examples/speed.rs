//! What a worker pays: `cargo run --release -p kv-client --example speed`, against the daemon of this machine
//! (`KVD_SOCKET` names another).

use std::time::{Duration, Instant};

use kv_client::{Client, ClientOptions, PutOptions, Scope, SequenceHash, Slice, WorkerOptions};

const ROUNDS: u64 = 2_000;

fn main() -> Result<(), kv_client::Error> {
    let client = Client::connect(ClientOptions::default()).wait()?;
    for grpc_only in [false, true] {
        let worker = client.worker(WorkerOptions { grpc_only, ..WorkerOptions::default() }).wait()?;
        println!("{:?}", worker.doors());
        for block_bytes in [4 << 10, 64 << 10, 1 << 20u32] {
            let rounds = ROUNDS.min((200 << 20) / u64::from(block_bytes));
            let scope = Scope { model: "speed".into(), tenant: "speed".into(), ..Scope::default() };
            let binding = worker.register(scope, Slice::whole(1, 1), block_bytes).wait()?;
            let bytes = vec![7u8; block_bytes as usize];
            let start =
                u64::from(std::process::id()) << 32 | u64::from(block_bytes) << 1 | u64::from(grpc_only);
            let hashes: Vec<_> = (0..rounds).map(|n| SequenceHash::from(start + n * 4)).collect();
            let many: Vec<_> = (rounds..2 * rounds).map(|n| SequenceHash::from(start + n * 4)).collect();
            let each = |what: &str, work: &mut dyn FnMut(&SequenceHash) -> Result<(), kv_client::Error>| {
                let mut micros = Vec::with_capacity(hashes.len());
                for hash in &hashes {
                    let begin = Instant::now();
                    work(hash)?;
                    micros.push(begin.elapsed().as_nanos() as f64 / 1e3);
                }
                micros.sort_by(f64::total_cmp);
                let at = |share: f64| micros[(micros.len() as f64 * share) as usize];
                println!("  {block_bytes:>8} B {what:<9} p50 {:>8.2} us  p99 {:>8.2} us", at(0.5), at(0.99));
                Ok::<_, kv_client::Error>(())
            };
            each("put", &mut |hash| worker.put(&binding, hash, &bytes).map(|_| ()))?;
            worker.with_deadline(Duration::from_secs(30)).evict(&binding, &hashes, None).wait()?;
            // The same slots again: without the page faults of memory that nobody has touched yet.
            each("put again", &mut |hash| worker.put(&binding, hash, &bytes).map(|_| ()))?;
            each("acquire", &mut |hash| {
                worker.acquire(&binding, hash).map(|got| drop(std::hint::black_box(got.block())))
            })?;
            let blocks: Vec<_> = many.iter().map(|hash| (*hash, &bytes[..])).collect();
            let begin = Instant::now();
            for batch in blocks.chunks(64) {
                worker.put_many(&binding, batch, &PutOptions::default())?;
            }
            let per_block = begin.elapsed().as_secs_f64() * 1e6 / blocks.len() as f64;
            println!("  {block_bytes:>8} B put_many          {per_block:>8.2} us a block");
            let keys = binding.keys(&hashes[..hashes.len().min(1000)]);
            let begin = Instant::now();
            let turns: u32 = if grpc_only { 10 } else { 1000 };
            (0..turns)
                .try_for_each(|_| worker.lookup_keys(&keys).map(|found| drop(std::hint::black_box(found))))?;
            let per_block = begin.elapsed().as_secs_f64() * 1e9 / f64::from(turns) / keys.len() as f64;
            println!("  {block_bytes:>8} B lookup            {per_block:>8.2} ns a block of {}", keys.len());
            worker
                .with_deadline(Duration::from_secs(30))
                .evict(&binding, &[&hashes[..], &many].concat(), None)
                .wait()?;
        }
    }
    Ok(())
}
