//! Reading a resident block: in place, by a message through the ring, and over gRPC.
//!
//! ```sh
//! cargo build --release -p kvd && cargo run --release -p kv-benches --bin read -- [reads]
//! ```
//! `in place` looks the block up, acquires it, reads its first byte and releases it. `ring` stores a block
//! that is there already: a message to the shard and back with nothing to do (the worker's copy of 4 KiB into
//! the staging area is in it). `gRPC get` brings a checked copy of all bytes, `gRPC lookup` asks for one name.

use std::hint::black_box;

use anyhow::{Result, bail};
use kv_benches::{Home, binding, hashes, micros, quantile};
use kv_client::{Got, WorkerOptions};

fn main() -> Result<()> {
    let reads = kv_benches::argument(20_000)? as usize;
    let home = Home::new("read", &["--host-bytes", "512MiB"])?;
    let (_daemon, _) = home.start()?;
    let worker = home.worker(WorkerOptions::default())?;
    let remote = home.worker(WorkerOptions { grpc_only: true, ..WorkerOptions::default() })?;
    println!("{:>16} | {:>8} | {:>10} | {:>10}", "way", "KiB", "p50 us", "p99 us");
    let show = |way: &str, kib: usize, mut times: Vec<f64>| {
        let (p50, p99) = (quantile(&mut times, 0.5), quantile(&mut times, 0.99));
        println!("{way:>16} | {kib:>8} | {p50:>10.2} | {p99:>10.2}");
    };
    for kib in [4, 64, 1024] {
        let bytes = vec![7u8; kib << 10];
        let local = binding(&worker, "read", bytes.len() as u32)?;
        let far = binding(&remote, "read", bytes.len() as u32)?;
        let names = hashes(0..64);
        for name in &names {
            worker.put(&local, name, &bytes)?;
        }
        let name = |at: usize| &names[at * 7 % names.len()];
        let time = |count: usize, call: &mut dyn FnMut(usize) -> Result<()>| -> Result<Vec<f64>> {
            for at in 0..count / 10 {
                call(at)?;
            }
            let timed = (0..count).map(|at| {
                let (took, done) = micros(|| call(at));
                done.map(|()| took)
            });
            timed.collect()
        };
        let in_place = time(reads, &mut |at| match worker.acquire(&local, name(at))? {
            Got::Block(block) if block.is_zero_copy() => {
                black_box(block[0]);
                Ok(())
            }
            other => bail!("not in place: {other:?}"),
        })?;
        show("in place", kib, in_place);
        if kib == 4 {
            let ring = time(reads / 4, &mut |at| {
                worker.put(&local, name(at), &bytes)?;
                Ok(())
            })?;
            show("ring", kib, ring);
            let lookup = time(reads / 10, &mut |at| {
                black_box(remote.lookup(&far, std::slice::from_ref(name(at)))?.prefix());
                Ok(())
            })?;
            show("gRPC lookup", kib, lookup);
        }
        let get = time((reads / 10).min(20_000 / kib), &mut |at| {
            match remote.get(&far, name(at))? {
                Some(copy) => black_box(copy[0]),
                None => bail!("a resident block was not found"),
            };
            Ok(())
        })?;
        show("gRPC get", kib, get);
    }
    Ok(())
}
