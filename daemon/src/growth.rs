//! Gives host memory its pages while the node serves: a thread for each shard whose arena is not whole.
//!
//! It allocates a piece, tells the shard's brain which regions are whole, and goes on until nothing is missing,
//! the file system is full, or the daemon ends; the next life continues there. It has lower priority than who
//! serves: the first regions are there when the node starts, so nobody waits for this unless memory is filled
//! faster than the kernel clears pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kv_arena::{Error, Grower};
use kv_block::code::Code;
use kv_node::Event;

use crate::shard::{Letter, ShardHandle};

/// Bytes of each arena that have memory before the node serves: some 15 ms.
pub const READY_BYTES: u64 = 32 << 20;
/// Added to the thread's nice value.
const NICE: i32 = 5;

/// The threads of one node.
#[derive(Default)]
pub struct Growth {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Growth {
    /// Lets the arena of a running shard grow.
    pub fn add(&mut self, shard: ShardHandle, grower: Grower) -> std::io::Result<()> {
        let stop = Arc::clone(&self.stop);
        let thread = std::thread::Builder::new().name(format!("grow-{}", shard.id));
        self.threads.push(thread.spawn(move || grow(&shard, grower, &stop))?);
        Ok(())
    }

    /// Ends the threads, each after the piece it is at.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(
                    "a thread that allocates host memory ended in a panic; the next start continues"
                );
            }
        }
    }
}

impl Drop for Growth {
    fn drop(&mut self) {
        self.stop();
    }
}

fn grow(shard: &ShardHandle, mut grower: Grower, stop: &AtomicBool) {
    // Of this thread alone. Where it is refused, serving and growing share the CPUs as equals.
    let _ = rustix::process::nice(NICE);
    while !stop.load(Ordering::Relaxed) {
        let event = match grower.step() {
            Ok(Some(regions)) if regions.is_empty() => continue,
            Ok(Some(regions)) => Event::Grown { regions },
            Ok(None) => {
                tracing::info!(shard = %shard.id, "host memory is whole");
                tell(shard, stop, Event::GrowthEnded);
                return;
            }
            Err(error) => {
                let why = why_short(&grower, error);
                tracing::warn!(shard = %shard.id, code = %Code::HostShort, why, "host memory stays smaller");
                shard.set_host_trouble(why);
                tell(shard, stop, Event::GrowthEnded);
                return;
            }
        };
        tell(shard, stop, event);
    }
}

fn why_short(grower: &Grower, error: Error) -> String {
    let missing = grower.missing_bytes();
    match &error {
        Error::NoSpace { .. } => error.to_string(),
        _ => format!("{missing} bytes cannot be allocated: {:#}", anyhow::Error::new(error)),
    }
}

/// Leaves the event in the shard's mailbox, waiting for room while there is a reason to.
fn tell(shard: &ShardHandle, stop: &AtomicBool, event: Event) {
    let mut letter = Letter::Tell(event);
    while let Err(back) = shard.post(letter) {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        letter = back;
        std::thread::sleep(Duration::from_millis(1));
    }
}
