//! Reading a resident block: in place, by a message through the ring, and over gRPC.
//!
//! ```sh
//! cargo build --release -p kvd && cargo run --release -p kv-benches --bin read -- [reads]
//! ```
//! `in place` looks the block up, acquires it, reads its first byte and releases it. `ring` announces a block
//! and takes that back: a message to the shard and back with next to nothing to do. `gRPC lookup` asks for one
//! name, `gRPC lease` acquires a lease and releases it in two calls, `gRPC get` brings a checked copy of all bytes.
//! `socket` is what gRPC cannot be faster than: one byte to another thread and back, both asleep until it comes.

use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Result, bail};
use kv_api::v1;
use kv_api::v1::blocks_client::BlocksClient;
use kv_benches::{Home, binding, hashes, micros, quantile};
use kv_client::{Got, SequenceHash, WorkerOptions};

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
            if worker.put(&local, name, &bytes)?.already {
                bail!("a block of this name is there, and its length may be another");
            }
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
            Got::Block(block) if block.is_zero_copy() && block.len() == bytes.len() => {
                black_box(block[0]);
                Ok(())
            }
            other => bail!("not in place: {other:?}"),
        })?;
        show("in place", kib, in_place);
        if kib == 4 {
            let ring = time(reads / 4, &mut |at| {
                let fresh = SequenceHash::from(1 << 40 | at as u64);
                match worker.reserve(&local, &fresh)? {
                    Some(_announced) => Ok(()),
                    None => bail!("somebody else announces the blocks of this bench"),
                }
            })?;
            show("ring", kib, ring);
            let lookup = time(reads / 10, &mut |at| {
                black_box(remote.lookup(&far, std::slice::from_ref(name(at)))?.prefix());
                Ok(())
            })?;
            show("gRPC lookup", kib, lookup);
            let (mut near, mut echo) = UnixStream::pair()?;
            let echoing = std::thread::spawn(move || std::io::copy(&mut echo.try_clone()?, &mut echo));
            let socket = time(reads / 10, &mut |_| {
                near.write_all(&[1])?;
                Ok(near.read_exact(&mut [0])?)
            })?;
            drop(near);
            echoing.join().map_err(|_| anyhow::anyhow!("the echo panicked"))??;
            show("socket", kib, socket);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let address = format!("unix:{}", home.socket().display());
            let mut blocks = runtime.block_on(BlocksClient::connect(address))?;
            let session = remote.session().0;
            let lease = time(reads / 10, &mut |at| {
                let keys = vec![far.key(name(at)).as_bytes().to_vec().into()];
                let names = Some(v1::Names { keys, ..v1::Names::default() });
                let ask = v1::AcquireRequest { session, names, ..v1::AcquireRequest::default() };
                let acquired = runtime.block_on(blocks.acquire(ask))?.into_inner().acquired;
                let Some(v1::acquired::What::Lease(lease)) = acquired[0].what else {
                    bail!("a resident block was not leased")
                };
                let ask = v1::ReleaseRequest { session, leases: vec![lease.lease] };
                runtime.block_on(blocks.release(ask))?;
                Ok(())
            })?;
            show("gRPC lease", kib, lease);
        }
        let get = time((reads / 10).min(20_000 / kib), &mut |at| {
            match remote.get(&far, name(at))? {
                Some(copy) if copy.len() == bytes.len() => black_box(copy[0]),
                Some(copy) => bail!("{} bytes of {} came", copy.len(), bytes.len()),
                None => bail!("a resident block was not found"),
            };
            Ok(())
        })?;
        show("gRPC get", kib, get);
    }
    Ok(())
}
