//! What a name costs: keys of a prefix of 1,000 blocks, one by one and as a batch.
//!
//! ```sh
//! cargo run --release -p kv-block --example names
//! ```
//! Nanoseconds a name, the median of 1,000 prefixes, for the lengths of hashes that engines use and for one
//! that needs two blocks of BLAKE3.

#![expect(clippy::disallowed_methods, reason = "this program measures")]

use std::hint::black_box;
use std::time::Instant;

use kv_block::{Scope, SequenceHash, Slice};

const PREFIX: usize = 1_000;

fn main() {
    let scope = Scope { model: "m".into(), tenant: "t".into(), ..Scope::default() };
    let namer = scope.id().namer(&Slice::whole(32, 8));
    println!("{:>10} | {:>10} | {:>10}", "hash bytes", "one by one", "batch");
    for bytes in [8, 16, 32, 64] {
        let hashes: Vec<_> = (0..PREFIX as u64)
            .map(|number| {
                let mut hash = vec![7; bytes];
                hash[..8].copy_from_slice(&number.to_le_bytes());
                SequenceHash::new(&hash).expect("8 to 64 bytes")
            })
            .collect();
        let one_by_one = median_ns(|| hashes.iter().map(|hash| namer.key(hash)).collect::<Vec<_>>());
        let batch = median_ns(|| namer.keys(&hashes));
        println!("{bytes:>10} | {one_by_one:>10.1} | {batch:>10.1}");
    }
}

fn median_ns<T>(call: impl Fn() -> T) -> f64 {
    let mut times: Vec<_> = (0..1_000)
        .map(|_| {
            let began = Instant::now();
            black_box(call());
            began.elapsed().as_nanos() as f64 / PREFIX as f64
        })
        .collect();
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}
