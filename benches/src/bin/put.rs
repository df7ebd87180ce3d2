//! Storing through shared memory, beside a plain copy of the same bytes in the same run.
//!
//! ```sh
//! cargo build --release -p kvd && cargo run --release -p kv-benches --bin put -- [rounds]
//! ```
//! `memcpy` copies the same source into memory that was touched before. `put` is one block at a time, `batch`
//! 16 at once; both copy twice, from the caller's memory to the staging area and from there to the arena. `staged`
//! is a worker that makes its bytes in the staging area: what it does to make them is not counted, what remains
//! is announcing and one copy. `in place` is a trusted worker that fills the arena slot itself, its copy and
//! its checksum counted. Sources and targets walk through more memory than caches hold. A round of each
//! in turn; the median of the rounds is shown. CPU is that of the worker and the daemon together.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;
use kv_benches::{Home, binding, cpu_time, hashes, median, micros, quantile};
use kv_client::{PutOptions, SequenceHash, WorkerOptions};

const SPREAD: usize = 128 << 20;
const BATCH: usize = 16;

fn main() -> Result<()> {
    let rounds = kv_benches::argument(5)?;
    let uid = "workers.trusted_uids=[\"self\"]";
    let home = Home::new("put", &["--host-bytes", "1GiB", "--set", uid])?;
    let (daemon, _) = home.start()?;
    let worker = home.worker(WorkerOptions { trusted: true, ..WorkerOptions::default() })?;
    let plain = home.worker(WorkerOptions::default())?;
    let source: Vec<u8> = (0..SPREAD).map(|n| (n / 61) as u8).collect();
    let mut target = vec![1u8; SPREAD];
    println!(
        "{:>8} | {:>9} | {:>21} | {:>21} | {:>21} | {:>21} | put p50, p99 us, CPU us",
        "KiB", "memcpy", "put", "batch of 16", "staged", "in place"
    );
    for kib in [4, 64, 256, 1024, 2048, 8192] {
        let bytes = kib << 10;
        let count = (SPREAD / bytes).min(2048);
        let binding = binding(&plain, "put", bytes as u32)?;
        let trusted = kv_benches::binding(&worker, "put", bytes as u32)?;
        let (mut speeds, mut each): ([Vec<f64>; 5], Vec<f64>) = Default::default();
        let (mut cpu, mut puts) = (Duration::ZERO, 0);
        let block = |at: usize| &source[at * bytes % (SPREAD - bytes + 1)..][..bytes];
        let speed = |began: Instant| (count * bytes) as f64 / began.elapsed().as_nanos() as f64;
        for round in 0..=rounds {
            let own = |way: u64| hashes((round << 40 | way << 32)..(round << 40 | way << 32) + count as u64);
            let warm_up = round == 0;

            let began = Instant::now();
            for (at, place) in target.chunks_exact_mut(bytes).take(count).enumerate() {
                place.copy_from_slice(black_box(block(at)));
            }
            let copied = speed(began);

            let names = own(1);
            let before = cpu_time(std::process::id()) + cpu_time(daemon.pid());
            let began = Instant::now();
            let mut times = Vec::with_capacity(count);
            for (at, name) in names.iter().enumerate() {
                let (took, stored) = micros(|| plain.put(&binding, name, block(at)));
                assert!(!stored?.already, "every name is new");
                times.push(took);
            }
            let single = speed(began);
            let used = cpu_time(std::process::id()) + cpu_time(daemon.pid()) - before;
            plain.evict(&binding, &names, None).wait()?;

            let names = own(2);
            let blocks: Vec<(SequenceHash, &[u8])> =
                names.iter().enumerate().map(|(at, name)| (*name, block(at))).collect();
            let began = Instant::now();
            for batch in blocks.chunks(BATCH) {
                for stored in plain.put_many(&binding, batch, &PutOptions::default())? {
                    assert!(!stored?.already, "every name is new");
                }
            }
            let batched = speed(began);
            plain.evict(&binding, &names, None).wait()?;

            let names = own(4);
            let mut counted = Duration::ZERO;
            for (at, name) in names.iter().enumerate() {
                let began = Instant::now();
                let mut room = plain.reserve(&binding, name)?.expect("nobody else stores it");
                counted += began.elapsed();
                room.write(block(at));
                let began = Instant::now();
                room.commit()?;
                counted += began.elapsed();
            }
            let staged = (count * bytes) as f64 / counted.as_nanos() as f64;
            plain.evict(&binding, &names, None).wait()?;

            let names = own(3);
            let began = Instant::now();
            for (at, name) in names.iter().enumerate() {
                let mut room = worker.reserve(&trusted, name)?.expect("nobody else stores it");
                assert!(room.is_in_place(), "the daemon trusts its own user here");
                room.write(block(at));
                room.commit()?;
            }
            let in_place = speed(began);
            worker.evict(&trusted, &names, None).wait()?;

            if !warm_up {
                for (all, one) in speeds.iter_mut().zip([copied, single, batched, staged, in_place]) {
                    all.push(one);
                }
                each.append(&mut times);
                cpu += used;
                puts += count as u32;
            }
        }
        let [copied, single, batched, staged, in_place] = speeds.map(|mut all| median(&mut all));
        let show = |speed: f64| format!("{speed:>6.2} GB/s = {:>4.2} of", speed / copied);
        println!(
            "{kib:>8} | {copied:>4.1} GB/s | {:>21} | {:>21} | {:>21} | {:>21} | {:.1}, {:.1}, {:.1}",
            show(single),
            show(batched),
            show(staged),
            show(in_place),
            quantile(&mut each, 0.5),
            quantile(&mut each, 0.99),
            cpu.as_secs_f64() * 1e6 / f64::from(puts),
        );
    }
    black_box(&target);
    many_small(&home)
}

/// 10,000 blocks of 4 KiB in one call.
fn many_small(home: &Home) -> Result<()> {
    let worker = home.worker(WorkerOptions::default())?;
    let binding = binding(&worker, "small", 4096)?;
    let body = vec![7u8; 4096];
    let mut each = Vec::new();
    for round in 0..6u64 {
        let names = hashes(round << 32..(round << 32) + 10_000);
        let blocks: Vec<(SequenceHash, &[u8])> = names.iter().map(|name| (*name, &body[..])).collect();
        let (took, stored) = micros(|| worker.put_many(&binding, &blocks, &PutOptions::default()));
        let fresh = |one: &Result<kv_client::Stored, _>| one.as_ref().is_ok_and(|stored| !stored.already);
        assert!(stored?.iter().all(fresh), "every block is stored, and was not before");
        if round > 0 {
            each.push(took / 10_000.0);
        }
        for names in names.chunks(4096) {
            worker.evict(&binding, names, None).wait()?;
        }
    }
    println!("10,000 x 4 KiB in one call: {:.2} us each", median(&mut each));
    Ok(())
}
