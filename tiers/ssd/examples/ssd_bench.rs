//! Throughput and CPU time of the disk tier, beside fio on the same file system when fio is there.
//!
//! ```text
//! cargo run --release -p kv-ssd --example ssd_bench -- [directory] [MiB per run] [rounds] [job:KiB:depth]
//! ```
//! Each round runs store and fio one after the other, so that a busy machine is busy for both; the table
//! shows the median of the rounds. Both sides use direct I/O, the same block length and depth. Writes append
//! (fio: sequential) to files that were written before; reads are at random and, in the store, checked.
//! CPU time is user and system time of the whole process, kernel workers included.

#![expect(unsafe_code, reason = "the CPU time of the process is asked for by a plain system call")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kv_arena::{Geometry, Held, ShardMemory, Slab};
use kv_block::{BindingTag, BlockKey, Checksum, DiskLocation, Priority, Record};
use kv_ssd::{Engine, SsdConfig, SsdStore, SyncMode};
use kv_tiers::store::{BlockStore, OpToken, StoreDone, StoreError, StoreOp};

const STORE_BYTES: u64 = 3 << 30;

#[derive(Clone, Copy, Default)]
struct Sample {
    gib_per_s: f64,
    cpu_s_per_gib: f64,
}

#[derive(Clone, Copy, PartialEq)]
enum Job {
    Write(SyncMode),
    Read,
}

struct Bench {
    store: SsdStore,
    slab: Slab,
    depth: usize,
    block: Held,
    places: Vec<(Record, DiskLocation)>,
    tokens: u64,
    _memory: ShardMemory,
}

fn cpu_time() -> Duration {
    let usage = |who| {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the kernel fills the structure that it is given.
        let usage = unsafe {
            libc::getrusage(who, usage.as_mut_ptr());
            usage.assume_init()
        };
        let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
        time(usage.ru_utime) + time(usage.ru_stime)
    };
    usage(libc::RUSAGE_SELF)
}

impl Bench {
    fn open(dir: &Path, block_bytes: u32, depth: usize, engine: Engine, sync: SyncMode) -> Self {
        let geometry = Geometry { regions: 16, region_bytes: 32 << 20, table_entries_max: 8 };
        let memory = ShardMemory::anonymous(geometry).expect("512 MiB of memory");
        let slab = memory.slab().clone();
        let owner = std::thread::current();
        let config = SsdConfig {
            engine,
            sync,
            in_flight_max: depth as u32 + 8,
            slow_limit: Duration::from_secs(20),
            arenas: vec![slab.clone()],
            ..SsdConfig::new(dir, STORE_BYTES)
        };
        let (store, recovered) =
            SsdStore::open(config, Box::new(move || owner.unpark())).expect("the store opens");
        recovered.finish().expect("recovery ends");
        let mut slot = slab.take(block_bytes).expect("memory for a block");
        slot.iter_mut().zip(0u64..).for_each(|(byte, n)| *byte = (n.wrapping_mul(n) >> 7) as u8);
        let key = BlockKey([7; 16]);
        let checksum = Checksum::of(&key, &slot[..block_bytes as usize]);
        let (tag, priority) = (BindingTag(1), Priority::Normal);
        let block = slot.seal(&Record { key, checksum, bytes: block_bytes, tag, priority, expires_at: 0 });
        Self { store, slab, depth, block, places: Vec::new(), tokens: 0, _memory: memory }
    }

    fn submit(&mut self, make: impl FnOnce(OpToken) -> StoreOp) {
        self.tokens += 1;
        let op = make(OpToken(self.tokens));
        assert!(self.store.submit(op).is_ok(), "the depth is below the store's limit");
    }

    fn begin(&mut self, job: Job, random: &mut u64) {
        if job == Job::Read {
            *random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let (record, at) = self.places[(*random >> 33) as usize % self.places.len()];
            let into = self.slab.take(record.bytes).expect("memory for a block");
            self.submit(|token| StoreOp::Read { token, at, record, into });
        } else {
            let bytes = self.block.clone();
            self.submit(|token| StoreOp::Write { token, record: bytes.record(), bytes });
        }
    }

    /// Keeps `depth` operations with the store until `total` bytes are done.
    fn run(&mut self, job: Job, total: u64) -> Sample {
        let block_bytes = self.block.len() as u64;
        let count = (total / block_bytes).max(1);
        let (mut begun, mut ended, mut busy, mut random) = (0, 0, 0, 1);
        let (wall, cpu) = (Instant::now(), cpu_time());
        let mut done = Vec::new();
        while ended < count {
            while busy < self.depth && begun < count {
                self.begin(job, &mut random);
                begun += 1;
                busy += 1;
            }
            self.store.kick();
            self.store.poll(&mut done);
            if done.is_empty() {
                std::thread::park_timeout(Duration::from_millis(100));
                continue;
            }
            for one in done.drain(..) {
                match one {
                    StoreDone::Written { bytes, result: Ok(at), .. } => {
                        self.places.push((bytes.record(), at));
                        (ended, busy) = (ended + 1, busy - 1);
                    }
                    StoreDone::Read { result, .. } => {
                        assert_eq!(result, Ok(()), "a read went wrong");
                        (ended, busy) = (ended + 1, busy - 1);
                    }
                    StoreDone::Written { result: Err(StoreError::Full), .. } => {
                        (begun, busy) = (begun - 1, busy - 1);
                    }
                    StoreDone::Reclaim { segment, .. } => {
                        self.places.retain(|(_, at)| at.segment() != segment);
                        self.submit(|token| StoreOp::Release { token, segment });
                    }
                    StoreDone::Released { result, .. } => result.expect("a segment is released"),
                    other => panic!("{other:?}"),
                }
            }
        }
        let gib = (count * block_bytes) as f64 / (1u64 << 30) as f64;
        let cpu = (cpu_time() - cpu).as_secs_f64();
        Sample { gib_per_s: gib / wall.elapsed().as_secs_f64(), cpu_s_per_gib: cpu / gib }
    }
}

fn store(dir: &Path, block_bytes: u32, depth: usize, engine: Engine, job: Job, total: u64) -> Sample {
    let sync = if let Job::Write(sync) = job { sync } else { SyncMode::Never };
    let mut bench = Bench::open(dir, block_bytes, depth, engine, sync);
    // Not measured: memory is registered meanwhile, and reads get something to read.
    let before = if job == Job::Read { total } else { 128 << 20 };
    bench.run(Job::Write(sync), before);
    std::thread::sleep(Duration::from_millis(700));
    bench.run(job, total)
}

/// The same with fio, if it is there.
fn fio(dir: &Path, block_bytes: u32, depth: usize, job: Job, total: u64) -> Option<Sample> {
    let (kind, syncs) = match job {
        Job::Write(SyncMode::Never) => ("write", 0),
        // The store syncs once per group; a group is about what is in flight.
        Job::Write(SyncMode::Always) => ("write", depth),
        Job::Read => ("randread", 0),
    };
    let output = Command::new("fio")
        .args([
            "--name=kv",
            "--ioengine=io_uring",
            "--direct=1",
            "--output-format=terse",
            "--terse-version=3",
        ])
        .args(["--fixedbufs=1", "--registerfiles=1", "--overwrite=1", "--thread=0", "--norandommap=1"])
        .arg(format!("--filename={}", dir.join("fio.data").display()))
        .arg(format!("--size={}", 2u64 << 30))
        .arg(format!("--io_size={total}"))
        .arg(format!("--rw={kind}"))
        .arg(format!("--bs={block_bytes}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--fdatasync={syncs}"))
        .output()
        .ok()?;
    let line = String::from_utf8(output.stdout).ok()?;
    let fields: Vec<_> = line.lines().find(|line| line.starts_with("3;"))?.split(';').collect();
    // Terse version 3: bandwidth of reads in KiB/s is field 7, of writes 48; CPU follows the latencies.
    let number = |at: usize| fields.get(at)?.trim_end_matches('%').parse::<f64>().ok();
    let (kib, runtime_ms) =
        if job == Job::Read { (number(6)?, number(8)?) } else { (number(47)?, number(49)?) };
    let cpu_percent = number(87)? + number(88)?;
    let gib = total as f64 / (1u64 << 30) as f64;
    let cpu_s_per_gib = cpu_percent / 100.0 * runtime_ms / 1000.0 / gib;
    Some(Sample { gib_per_s: kib / f64::from(1 << 20), cpu_s_per_gib })
}

fn median(mut samples: Vec<Sample>) -> Option<Sample> {
    samples.sort_by(|a, b| a.gib_per_s.total_cmp(&b.gib_per_s));
    let gib_per_s = samples.get(samples.len() / 2)?.gib_per_s;
    samples.sort_by(|a, b| a.cpu_s_per_gib.total_cmp(&b.cpu_s_per_gib));
    Some(Sample { gib_per_s, cpu_s_per_gib: samples[samples.len() / 2].cpu_s_per_gib })
}

fn main() {
    let mut args = std::env::args().skip(1);
    let base = args.next().map_or_else(|| std::env::temp_dir().join("kv-ssd-bench"), PathBuf::from);
    let total = args.next().and_then(|text| text.parse().ok()).unwrap_or(1024u64) << 20;
    let rounds = args.next().and_then(|text| text.parse().ok()).unwrap_or(3);
    // For example `read:64:32`; without fio, so that a profiler sees the store alone.
    let only = args.next();
    let dir = base.join("store");
    std::fs::create_dir_all(&dir).expect("the directory can be made");
    // Every segment is written once before anything is measured: first writes pay for allocation.
    Bench::open(&dir, 2 << 20, 16, Engine::Auto, SyncMode::Never)
        .run(Job::Write(SyncMode::Never), 2 * STORE_BYTES);
    let _ = fio(&base, 2 << 20, 16, Job::Write(SyncMode::Never), 2 << 30);
    println!(
        "{:>9} {:>5} {:>8} | {:>17} | {:>17} | {:>6} {:>6}",
        "job", "depth", "block", "store", "fio", "speed", "CPU"
    );
    println!(
        "{:>9} {:>5} {:>8} | {:>7} {:>9} | {:>7} {:>9} | {:>6} {:>6}",
        "", "", "KiB", "GiB/s", "CPU s/GiB", "GiB/s", "CPU s/GiB", "ratio", "ratio"
    );
    let jobs = [
        ("write", Job::Write(SyncMode::Never)),
        ("write+sync", Job::Write(SyncMode::Always)),
        ("read", Job::Read),
    ];
    for (name, job) in jobs {
        for block_bytes in [64 << 10, 256 << 10, 1 << 20, 2 << 20] {
            for depth in [8, 32] {
                let (mut ours, mut theirs) = (Vec::new(), Vec::new());
                let this = format!("{name}:{}:{depth}", block_bytes >> 10);
                if only.as_ref().is_some_and(|only| *only != this) {
                    continue;
                }
                for _ in 0..rounds {
                    ours.push(store(&dir, block_bytes, depth, Engine::Auto, job, total));
                    theirs.extend(if only.is_some() {
                        None
                    } else {
                        fio(&base, block_bytes, depth, job, total)
                    });
                }
                let ours = median(ours).expect("a round at least");
                let theirs = median(theirs).unwrap_or_default();
                println!(
                    "{name:>9} {depth:>5} {:>8} | {:>7.2} {:>9.3} | {:>7.2} {:>9.3} | {:>6.2} {:>6.2}",
                    block_bytes >> 10,
                    ours.gib_per_s,
                    ours.cpu_s_per_gib,
                    theirs.gib_per_s,
                    theirs.cpu_s_per_gib,
                    ours.gib_per_s / theirs.gib_per_s,
                    ours.cpu_s_per_gib / theirs.cpu_s_per_gib,
                );
            }
        }
    }
}
