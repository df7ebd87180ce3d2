//! How long a node takes to come back, and what it still has.
//!
//! ```sh
//! cargo build --release -p kvd && cargo run --release -p kv-benches --bin restart -- [million entries]
//! ```
//! Disk: a log of so many entries is fabricated (sparse files: headers and indexes alone, since recovery reads
//! nothing else), then the daemon is started on it, killed, started again. Host: 8,192 blocks of 64 KiB are
//! stored, the daemon is killed with SIGKILL and started again, and the worker reads and checks every block.

use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kv_benches::{Home, binding, hashes, micros};
use kv_block::{BindingTag, BlockKey, Checksum, Priority, Record};
use kv_client::{Got, PutOptions, SequenceHash, WorkerOptions};
use kv_ssd::format::Format;
use kv_ssd::segment::{ENTRY_BYTES, Entry, Geometry, HEADER_BYTES, Header, PAGE_BYTES, StoreId, file_name};

/// As `disk.segment_bytes` below.
const SEGMENT_BYTES: u64 = 1 << 30;
const BLOCK_BYTES: u32 = 64 << 10;

fn main() -> Result<()> {
    let millions = kv_benches::argument(1)?;
    host()?;
    disk(millions * 1_000_000)
}

fn host() -> Result<()> {
    const BLOCKS: u64 = 8192;
    let home = Home::new("restart-host", &["--host-bytes", "768MiB"])?;
    let (daemon, _) = home.start()?;
    let worker = home.worker(WorkerOptions::default())?;
    let binding = binding(&worker, "restart", BLOCK_BYTES)?;
    let body: Vec<u8> = (0..BLOCK_BYTES).map(|n| (n / 3) as u8).collect();
    let names = hashes(0..BLOCKS);
    for names in names.chunks(256) {
        let blocks: Vec<(SequenceHash, &[u8])> = names.iter().map(|name| (*name, &body[..])).collect();
        for stored in worker.put_many(&binding, &blocks, &PutOptions::default())? {
            stored?;
        }
    }
    daemon.kill()?;
    let (_daemon, ready) = home.start()?;
    let began = Instant::now();
    let worker = home.worker(WorkerOptions::default())?;
    let binding = kv_benches::binding(&worker, "restart", BLOCK_BYTES)?;
    let (mut kept, mut wrong) = (0, 0);
    for name in &names {
        if let Got::Block(block) = worker.acquire_wait(&binding, name, Duration::from_secs(1))? {
            kept += 1;
            wrong += u64::from(block[..] != body[..]);
        }
    }
    println!(
        "host: ready {:.0} ms after kill -9, {kept} of {BLOCKS} blocks kept, {wrong} wrong, all read in {:.2} s",
        ready.as_secs_f64() * 1e3,
        began.elapsed().as_secs_f64()
    );
    Ok(())
}

fn disk(entries: u64) -> Result<()> {
    let geometry = Geometry::new(SEGMENT_BYTES, BLOCK_BYTES).context("a geometry")?;
    let per_segment = u64::from(geometry.data_pages() / 16).min(u64::from(geometry.entries_max()));
    let segments = entries.div_ceil(per_segment);
    let catalog = format!("catalog.entries_max={}", entries + entries / 10);
    let ghosts = "catalog.ghosts_max=1024";
    let sets =
        ["--host-bytes", "256MiB", "--set", "disk.segment_bytes=1GiB", "--set", &catalog, "--set", ghosts];
    let home = Home::new("restart-disk", &sets)?.with_disk(&format!("{}GiB", segments + 8));
    fabricate(&home.data().join("shard-0"), geometry, entries, per_segment)?;
    for turn in ["first start", "after kill -9"] {
        let (daemon, ready) = home.start()?;
        let worker = home.worker(WorkerOptions::default())?;
        let (took, found) = micros(|| worker.lookup_keys(&[key(1), key(entries / 2), key(entries)]));
        if found?.prefix() != 3 {
            bail!("blocks in the log were not found");
        }
        println!(
            "disk: {entries} entries in {segments} segments, {turn}: ready after {:.2} s, {:.0} MiB beyond \
             pools, first lookup {took:.0} us",
            ready.as_secs_f64(),
            daemon.own_bytes()? as f64 / f64::from(1 << 20)
        );
        daemon.kill()?;
    }
    Ok(())
}

fn key(number: u64) -> BlockKey {
    let mix = |mut n: u64| {
        n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        n ^ (n >> 31)
    };
    BlockKey::from_halves([mix(number), mix(!number)])
}

fn fabricate(dir: &Path, geometry: Geometry, entries: u64, per_segment: u64) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    let store = StoreId([9; 16]);
    let mut sequence = 0;
    for segment in 0..entries.div_ceil(per_segment) as u32 {
        let header = Header { store, segment, generation: 1, order: u64::from(segment) + 1, geometry };
        let mut bytes = vec![0; PAGE_BYTES + geometry.index_bytes()];
        bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
        for index in 0..per_segment.min(entries - sequence) as u32 {
            sequence += 1;
            let record = Record {
                key: key(sequence),
                checksum: Checksum(sequence),
                bytes: BLOCK_BYTES,
                tag: BindingTag(1),
                priority: Priority::Normal,
                expires_at: 0,
            };
            let entry = Entry::Stored { sequence, record, page: geometry.data_page_first() + index * 16 };
            let at = PAGE_BYTES + index as usize * ENTRY_BYTES;
            bytes[at..at + ENTRY_BYTES].copy_from_slice(&entry.encode(&header, index));
        }
        let file = std::fs::File::create(dir.join(file_name(segment)))?;
        file.set_len(geometry.segment_bytes())?;
        file.write_all_at(&bytes, 0)?;
        file.sync_all()?;
    }
    let format = Format { store, node: "bench".to_owned(), created: 0 };
    std::fs::File::create(dir.join("kvd.format"))?.write_all(format.encode().as_bytes())?;
    Ok(())
}
