//! What the arena costs: nanoseconds per key of a lookup, and a checked copy beside a plain one.
//!
//! ```sh
//! cargo run --release -p kv-arena --example arena_speed            # 1 M and 10 M entries, copies
//! cargo run --release -p kv-arena --example arena_speed -- 1000000 # that many entries
//! ARENA_DIR=/dev/shm/speed cargo run ...                           # in a named file instead of a memfd
//! ```
//! Each figure is the median of several runs, alternating between what is compared.

#![expect(clippy::disallowed_methods, reason = "this program measures")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use kv_arena::hazard::{HazardFile, Owner};
use kv_arena::{Entry, EntryState, Geometry, HazardSet, HugePages, MemorySpec, ShardMemory, ShardView};
use kv_block::{
    BindingId, BindingTag, BlockKey, Checksum, Epoch, Generation, Priority, Record, SessionId, ShardId,
    SlotId,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let given: Vec<u64> = std::env::args().skip(1).map(|n| n.parse()).collect::<Result<_, _>>()?;
    let sizes = if given.is_empty() { vec![1_000_000, 10_000_000] } else { given };
    for entries in sizes {
        lookups(entries)?;
    }
    reads()?;
    copies()
}

/// A uniform key for a number, as a digest would be.
fn key(number: u64) -> BlockKey {
    let mix = |mut x: u64| {
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    let low = mix(number.wrapping_add(0x9e37_79b9_7f4a_7c15));
    BlockKey::from_halves([low, mix(low ^ 0x5851_f42d_4c95_7f2d)])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn view(memory: &ShardMemory, hazards: &mut HazardSet) -> Result<Arc<ShardView>, kv_arena::Error> {
    let owner = Owner { shard: ShardId(0), session: SessionId(1), pid: std::process::id(), start_time: 0 };
    let file = HazardFile::anonymous(owner, 256)?;
    let view = ShardView::map(memory.meta_ro()?, memory.data_rw()?, file.fd()?)?;
    hazards.add(file);
    Ok(view)
}

fn lookups(entries: u64) -> Result<(), Box<dyn std::error::Error>> {
    const PREFIX: usize = 1000;
    /// Rounds until most pages of the table have been touched through both mappings.
    const WARM_UP: usize = 400;
    let geometry = Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: entries };
    let mut memory = match std::env::var_os("ARENA_DIR") {
        Some(dir) => {
            let spec = MemorySpec {
                dir: dir.into(),
                name: "speed".into(),
                geometry,
                numa_node: None,
                huge: HugePages::Auto,
                hugetlbfs_dir: None,
                ready_bytes: u64::MAX,
                promised_bytes: 0,
            };
            ShardMemory::open(&spec, Epoch(1))?.0
        }
        None => ShardMemory::anonymous(geometry)?,
    };
    let start = Instant::now();
    let mut table = memory.take_table()?.ok_or("the table is ours")?;
    let cleared = start.elapsed();
    let start = Instant::now();
    for number in 0..entries {
        table.set(&Entry {
            host: Some((SlotId(number as u32 % 512), Generation(1))),
            state: EntryState::Present,
            checksum: Checksum(number),
            ..Entry::pending(key(number), BindingId(1))
        })?;
    }
    let set = start.elapsed().as_nanos() as f64 / entries as f64;
    println!(
        "{entries} entries: {:.1} bytes each, table made in {cleared:?}, set {set:.0} ns",
        table.bytes_per_entry()
    );
    memory.notes().iter().filter(|note| note.contains("table")).for_each(|note| println!("  {note}"));
    let mut hazards = HazardSet::new();
    let view = view(&memory, &mut hazards)?;
    let (mut one, mut batch, mut prefix, mut own) = (vec![], vec![], vec![], vec![]);
    let mut random = 7u64;
    for round in 0..WARM_UP + 400 {
        if round == WARM_UP {
            [&mut one, &mut batch, &mut prefix, &mut own].into_iter().for_each(Vec::clear);
        }
        let mut draw = || -> Vec<BlockKey> {
            let mut next = || {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                key((random >> 20) % entries)
            };
            (0..PREFIX).map(|_| next()).collect()
        };
        let per_key = |start: Instant| start.elapsed().as_nanos() as f64 / PREFIX as f64;
        let keys = draw();
        let start = Instant::now();
        assert_eq!(view.resident_prefix(black_box(&keys)), PREFIX);
        prefix.push(per_key(start));
        let (keys, mut found) = (draw(), Vec::with_capacity(PREFIX));
        let start = Instant::now();
        view.find_each(black_box(&keys), |_, entry| {
            found.push(entry);
            true
        });
        batch.push(per_key(start));
        assert!(found.iter().all(|entry| matches!(entry, Ok(Some(_)))));
        let keys = draw();
        let start = Instant::now();
        for key in black_box(&keys) {
            assert!(view.find(key).is_ok_and(|entry| entry.is_some()));
        }
        one.push(per_key(start));
        let (keys, mut here) = (draw(), 0);
        let start = Instant::now();
        table.find_each(black_box(&keys), |_, entry| here += usize::from(entry.is_some()));
        own.push(per_key(start));
        assert_eq!(here, PREFIX);
    }
    println!(
        "  worker: resident_prefix {:.1} ns/key, find_each {:.1}, find {:.1}; daemon: find_each {:.1}",
        median(prefix),
        median(batch),
        median(one),
        median(own)
    );
    Ok(memory.wipe()?)
}

fn reads() -> Result<(), Box<dyn std::error::Error>> {
    let geometry = Geometry { regions: 2, region_bytes: 2 << 20, table_entries_max: 1000 };
    let mut memory = ShardMemory::anonymous(geometry)?;
    let mut table = memory.take_table()?.ok_or("the table is ours")?;
    let mut hazards = HazardSet::new();
    let view = view(&memory, &mut hazards)?;
    let mut slot = memory.slab().take(65536)?;
    let (key, bytes) = (key(1), vec![7; 65536]);
    let checksum = slot.copy_from(&key, &bytes);
    let (tag, priority) = (BindingTag(0), Priority::Normal);
    let held = slot.seal(&Record { key, checksum, bytes: 65536, tag, priority, expires_at: 0 });
    let host = Some((held.id(), held.generation()));
    table.set(&Entry { host, state: EntryState::Present, ..Entry::pending(key, BindingId(0)) })?;
    let start = Instant::now();
    for _ in 0..1_000_000 {
        let guard = view.read(black_box(&key)).map_err(|absent| format!("{absent:?}"))?;
        black_box(guard[0]);
    }
    println!("read and release: {:.0} ns", start.elapsed().as_nanos() as f64 / 1e6);
    Ok(())
}

fn copies() -> Result<(), Box<dyn std::error::Error>> {
    const SPREAD: usize = 256 << 20;
    let geometry = Geometry { regions: 8, region_bytes: 32 << 20, table_entries_max: 1000 };
    let memory = ShardMemory::anonymous(geometry)?;
    let source: Vec<u8> = (0..SPREAD).map(|n| (n / 4096) as u8).collect();
    for kib in [4, 16, 64, 128, 256, 1024, 2048, 4096, 8192] {
        let bytes = kib << 10;
        let key = key(bytes as u64);
        let mut slots = Vec::new();
        while let Ok(mut slot) = memory.slab().take(bytes as u32) {
            slot.fill(1);
            slots.push(slot);
        }
        let mut times: [Vec<f64>; 3] = Default::default();
        for round in 0..(if kib < 1024 { 12 } else { 20 }) {
            // Sources and targets walk through memory that no cache holds.
            for (way, times) in times.iter_mut().enumerate() {
                let start = Instant::now();
                for (at, slot) in slots.iter_mut().enumerate() {
                    let from = (at + round) * bytes % SPREAD;
                    let from = &source[from..from + bytes];
                    match way {
                        0 => slot[..bytes].copy_from_slice(black_box(from)),
                        1 => drop(black_box(slot.copy_from(&key, from))),
                        _ => drop(black_box(slot.copy_with(&key, bytes as u32, |at, tile| {
                            tile.copy_from_slice(&from[at..at + tile.len()]);
                        }))),
                    }
                }
                times.push((slots.len() * bytes) as f64 / start.elapsed().as_nanos() as f64);
            }
        }
        let [plain, own, shared] = times.map(median);
        println!(
            "copy {kib} KiB: plain {plain:.1} GB/s, copy_from {:.2} of it, copy_with {:.2}",
            own / plain,
            shared / plain
        );
    }
    Ok(())
}
