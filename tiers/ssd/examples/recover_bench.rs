//! How long a store takes to open: fabricates one with many entries, then opens it.
//!
//! ```text
//! cargo run --release -p kv-ssd --example recover_bench -- [directory] [million entries]
//! ```
//! Segments of 256 MiB for blocks of 64 KiB, all full; the files are sparse, only headers and indexes are
//! written, since recovery reads nothing else. The page cache is out of it: direct I/O.

use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Instant;

use kv_block::{BindingTag, BlockKey, Checksum, Priority, Record};
use kv_ssd::format::Format;
use kv_ssd::segment::{ENTRY_BYTES, Entry, Geometry, Header, PAGE_BYTES, StoreId, file_name};
use kv_ssd::{SsdConfig, SsdStore};

fn mix(n: u64) -> u64 {
    let mixed = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().map_or_else(|| std::env::temp_dir().join("kv-ssd-recover"), PathBuf::from);
    let entries = args.next().map_or(Ok(10), |text| text.parse::<u64>())? * 1_000_000;
    let geometry = Geometry::new(256 << 20, 64 << 10).ok_or("a geometry")?;
    let per_segment = u64::from(geometry.data_pages() / 16).min(u64::from(geometry.entries_max()));
    let segments = entries.div_ceil(per_segment);
    let store = StoreId([9; 16]);
    if !dir.join("kvd.format").exists() {
        std::fs::create_dir_all(&dir)?;
        let mut sequence = 0;
        for segment in 0..segments as u32 {
            let header = Header { store, segment, generation: 1, order: u64::from(segment) + 1, geometry };
            let mut bytes = vec![0; PAGE_BYTES + geometry.index_bytes()];
            bytes[..512].copy_from_slice(&header.encode());
            for index in 0..per_segment.min(entries - sequence) as u32 {
                sequence += 1;
                let record = Record {
                    key: BlockKey::from_halves([mix(sequence), mix(!sequence)]),
                    checksum: Checksum(sequence),
                    bytes: 64 << 10,
                    tag: BindingTag(1),
                    priority: Priority::Normal,
                    expires_at: 0,
                };
                let entry = Entry::Stored { sequence, record, page: geometry.data_page_first() + index * 16 };
                let at = PAGE_BYTES + index as usize * ENTRY_BYTES;
                bytes[at..at + ENTRY_BYTES].copy_from_slice(&entry.encode(&header, index));
            }
            let mut file = std::fs::File::create(dir.join(file_name(segment)))?;
            file.set_len(geometry.segment_bytes())?;
            file.write_all_at(&bytes, 0)?;
            file.seek(SeekFrom::Start(0))?;
        }
        let format = Format { store, node: "bench".to_owned(), created: 0 };
        std::fs::File::create(dir.join("kvd.format"))?.write_all(format.encode().as_bytes())?;
        rustix::fs::sync();
    }
    let bytes_max = (segments + 8) * geometry.segment_bytes();
    for _ in 0..3 {
        let began = Instant::now();
        let (store, mut recovered) = SsdStore::open(SsdConfig::new(&dir, bytes_max), Box::new(|| {}))?;
        let opened = began.elapsed();
        let found: usize = recovered.by_ref().map(|batch| batch.len()).sum();
        let took = began.elapsed();
        let report = recovered.finish()?;
        println!(
            "{found} blocks in {} segments: open returned after {opened:?}, the last block came after {took:?}; \
             {:.0} MiB of index, {:.2} s of CPU",
            report.segments,
            report.index_bytes as f64 / f64::from(1 << 20),
            cpu_seconds()
        );
        drop(store);
    }
    Ok(())
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}
