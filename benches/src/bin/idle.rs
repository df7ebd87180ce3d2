//! What a node costs that does nothing: time to start, memory beyond its pools, CPU.
//!
//! ```sh
//! cargo build --release -p kvd && cargo run --release -p kv-benches --bin idle -- [starts]
//! ```
//! Started on empty directories with 256 MiB, 1 GiB and 8 GiB of host memory and a disk tier; ready is when
//! `/readyz` says so, whole when every page of the arena is there. Memory is what is resident and not shared:
//! pools, tables and rings are shared memory. CPU is taken over five seconds with one connected worker that does
//! nothing, when host memory is whole and the disk tier has registered it (20 ms for each 64 MiB).

use std::time::{Duration, Instant};

use anyhow::Result;
use kv_benches::{Home, cpu_time, median};
use kv_client::WorkerOptions;

fn main() -> Result<()> {
    let starts = kv_benches::argument(5)?;
    for host in ["256MiB", "1GiB", "8GiB"] {
        let (mut ready, mut whole, mut memory, mut cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..starts {
            let home = Home::new("idle", &["--host-bytes", host])?.with_disk("1GiB");
            let began = Instant::now();
            let (daemon, took) = home.start()?;
            ready.push(took.as_secs_f64() * 1e3);
            home.wait_until_whole()?;
            whole.push(began.elapsed().as_secs_f64());
            let _worker = home.worker(WorkerOptions::default())?;
            wait_until_quiet(daemon.pid());
            let before = cpu_time(daemon.pid());
            std::thread::sleep(Duration::from_secs(5));
            cpu.push((cpu_time(daemon.pid()) - before).as_secs_f64() / 5.0 * 100.0);
            memory.push(daemon.own_bytes()? as f64 / f64::from(1 << 20));
        }
        println!(
            "{host}: ready after {:.0} ms, whole after {:.2} s, {:.1} MiB beyond pools, {:.2} % of one CPU \
             (medians of {starts} starts)",
            median(&mut ready),
            median(&mut whole),
            median(&mut memory),
            median(&mut cpu)
        );
    }
    Ok(())
}

/// Waits until a second passes in which the process does nothing, for a minute at most.
fn wait_until_quiet(pid: u32) {
    for _ in 0..60 {
        let before = cpu_time(pid);
        std::thread::sleep(Duration::from_secs(1));
        if cpu_time(pid) - before <= Duration::from_millis(10) {
            return;
        }
    }
}
