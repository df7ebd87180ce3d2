//! Checksums of what came from devices: a few threads, so that a device's copies do not wait for them.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use kv_arena::Slot;
use kv_block::code::Code;
use kv_block::{BindingTag, BlockKey, Checksum, Fault, Priority, Record};
use kv_gpu::Reserved;
use kv_node::FillToken;

use super::engine::{Kept, Save, Stats, lock};
use crate::shard::ShardHandle;

/// A block that is in its slot.
pub struct Sum {
    /// Of which call.
    pub save: Arc<Save>,
    /// Whose slot.
    pub shard: ShardHandle,
    /// What its shard calls it.
    pub fill: FillToken,
    /// Its name.
    pub key: BlockKey,
    /// Its length.
    pub bytes: u32,
    /// Where it is.
    pub slot: Slot,
    /// Where a copy of it is that the device may keep.
    pub room: Option<Room>,
    /// CRC-64/NVME of its bytes, as the device had it; `None` where it did not say.
    pub expected: Option<u64>,
    /// Where it is counted that the two differ.
    pub stats: Arc<Stats>,
}

/// A copy of a block in a device's pool, which is made a block of the pool when its checksum is known.
pub struct Room {
    /// Where it is.
    pub reserved: Reserved,
    /// Whose.
    pub pool: Kept,
    /// What it is stored under.
    pub tag: BindingTag,
}

/// The threads. They end with the last sender.
pub struct Sums {
    door: Sender<Sum>,
    threads: Vec<JoinHandle<()>>,
}

impl Sums {
    /// So many threads.
    pub fn start(threads: usize) -> std::io::Result<Self> {
        let (door, work) = mpsc::channel();
        let work = Arc::new(Mutex::new(work));
        let thread = |at| {
            let work = Arc::clone(&work);
            std::thread::Builder::new().name(format!("gpu-sum-{at}")).spawn(move || run(&work))
        };
        Ok(Self { door, threads: (0..threads).map(thread).collect::<Result<_, _>>()? })
    }

    /// Where to leave blocks.
    pub fn door(&self) -> Sender<Sum> {
        self.door.clone()
    }

    /// Ends them, when all other senders are gone.
    pub fn stop(self) {
        drop(self.door);
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

fn run(work: &Mutex<Receiver<Sum>>) {
    loop {
        // Whoever waits has the lock, the others wait for that.
        let next = work.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Sum { save, shard, fill, key, bytes, slot, room, expected, stats }) = next else { return };
        let checksum = Checksum::of(&key, &slot[..bytes as usize]);
        if let Err(fault) = save.check() {
            drop((slot, room));
            shard.tell_filled(fill, Err(fault));
            continue;
        }
        if expected.is_some_and(|expected| checksum.content(&key) != expected) {
            stats.damaged.fetch_add(1, Ordering::Relaxed);
            drop((slot, room));
            let text = format!("block {key} is not the same in host memory as it was on the GPU");
            shard.tell_filled(fill, Err(Fault::new(Code::CorruptTransfer, text)));
            continue;
        }
        if let Some(Room { reserved, pool, tag }) = room {
            // The catalog says whether it may be read, and how long.
            let record = Record { key, checksum, bytes, tag, priority: Priority::Normal, expires_at: 0 };
            let _ = lock(&pool).seal(reserved, record);
        }
        shard.tell_filled(fill, Ok((slot, checksum)));
    }
}
