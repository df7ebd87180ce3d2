//! What a message to the shard and back costs: `cargo run --release -p kv-shm --example latency`.
//!
//! Once with both sides spinning, once with both sleeping on their bells. The spinning figure needs two
//! free cores; on fewer, both figures are the scheduler's.

#![expect(clippy::disallowed_methods, reason = "this program measures")]

use std::time::{Duration, Instant};

use kv_shm::{Completion, Layout, Outcome, Request, Submission, create, open};

const ROUNDS: u64 = 100_000;

fn main() -> Result<(), kv_shm::Error> {
    for (name, spins) in [("spin", 100_000), ("sleep", 0)] {
        let layout = Layout::new(64, 0)?;
        let (mut shard, fds) = create(layout)?;
        let mut worker = open(layout, fds)?;
        let serving = std::thread::spawn(move || -> Result<(), kv_shm::Error> {
            let (mut answered, mut taken, mut idle) = (0, Vec::new(), 0);
            while answered < ROUNDS {
                if shard.ring.take(16, &mut taken)? == 0 {
                    idle += 1;
                    if idle > spins && shard.ring.doze()? {
                        shard.ring.bell().wait(Duration::from_secs(1))?;
                        shard.ring.wake();
                    }
                    std::hint::spin_loop();
                    continue;
                }
                idle = 0;
                for id in taken.drain(..).map(|one| one.map_or_else(|bad| bad.id, |one| one.id)) {
                    shard.ring.push(&Completion { id, outcome: Outcome::Done })?;
                    answered += 1;
                }
                shard.ring.notify();
            }
            Ok(())
        });
        let (mut nanos, mut got) = (Vec::with_capacity(ROUNDS as usize), Vec::new());
        for id in 0..ROUNDS {
            let start = Instant::now();
            worker.submitter.submit(&Submission { id, deadline_us: 0, request: Request::Ping })?;
            worker.submitter.kick();
            while worker.collector.wait(spins, Duration::from_secs(1), &mut got)? == 0 {}
            nanos.push(start.elapsed().as_nanos() as u64);
            got.clear();
        }
        serving.join().expect("the shard's thread does not panic")?;
        nanos.sort_unstable();
        let at = |share: f64| nanos[(nanos.len() as f64 * share) as usize] as f64 / 1e3;
        println!("{name:>5}: p50 {:.2} us, p99 {:.2} us", at(0.5), at(0.99));
    }
    Ok(())
}
