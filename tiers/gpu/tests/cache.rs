//! What a cache keeps: never a wrong byte, never more than it may, and what is read stays.

mod common;

use std::collections::HashMap;
use std::time::Duration;

use common::{Cuda, LONG, cuda, fake, filled, low, pattern, up, whole};
use kv_arena::{Geometry, HazardSet, Held, ShardMemory};
use kv_block::{BindingTag, BlockKey, Checksum, Priority, Record, payload};
use kv_gpu::{Cache, CacheConfig, Device, HostBuffer, HostRegion, PageCopy, Place, Pool, PoolConfig, Stream};

const BLOCK: u32 = 64 << 10;
/// A pool of eight segments of sixteen blocks.
const SEGMENTS: u64 = 8;
const PER_SEGMENT: u64 = 16;

fn config() -> PoolConfig {
    PoolConfig { segment_bytes: 1 << 20, leave_bytes: 0, ..PoolConfig::new(SEGMENTS << 20) }
}

struct Rig {
    cache: Cache,
    memory: ShardMemory,
    _region: HostRegion,
    stream: Stream,
    buffer: Option<HostBuffer>,
    _device: Device,
}

fn key(n: u64) -> BlockKey {
    BlockKey::from_halves([n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, n])
}

impl Rig {
    fn new(device: &Device, cache: CacheConfig) -> Self {
        let geometry = Geometry { regions: 4, region_bytes: 2 << 20, table_entries_max: 8 };
        let memory = ShardMemory::anonymous(geometry).unwrap();
        let region = device.register(memory.slab(), 0, memory.slab().data_bytes()).unwrap();
        let pool = Pool::open(device, &config()).unwrap();
        let buffer = Some(device.host_buffer(1 << 20).unwrap());
        let stream = low(device);
        let cache = Cache::new(pool, cache);
        Self { cache, memory, _region: region, stream, buffer, _device: device.clone() }
    }

    /// Another `version` of a block has other bytes under the same key.
    fn block(&self, n: u64, version: u8, bytes: u32) -> Held {
        let mut slot = self.memory.slab().take(bytes).unwrap();
        payload::fill(&key(n), &mut slot[..bytes as usize]);
        slot[0] ^= version;
        let checksum = Checksum::of(&key(n), &slot[..bytes as usize]);
        let (tag, priority) = (BindingTag(n), Priority::Normal);
        slot.seal(&Record { key: key(n), checksum, bytes, tag, priority, expires_at: 0 })
    }

    fn put(&mut self, n: u64, version: u8, bytes: u32) -> Record {
        let block = self.block(n, version, bytes);
        let (record, place) = (block.record(), (block.id(), block.generation()));
        self.cache.put(record, block).expect("it has room for an operation");
        self.settle();
        self.memory.slab().retire(place.0, place.1).expect("the cache let go of it");
        self.memory.slab().sweep(&HazardSet::new());
        record
    }

    fn settle(&mut self) {
        for _ in 0..100_000 {
            self.cache.poll();
            if self.cache.is_idle() {
                return;
            }
            std::thread::sleep(Duration::from_micros(10));
        }
        panic!("it does not come to rest");
    }

    fn bytes_at(&mut self, place: &Place) -> Vec<u8> {
        let bytes = u64::from(place.bytes());
        let page = PageCopy { host: 0, host_offset: 0, device_offset: place.offset(), bytes };
        let buffer = vec![self.buffer.take().unwrap()];
        let copying = self.stream.offload(place.memory(), buffer, &[page]);
        let mut copying = copying.unwrap_or_else(|refused| panic!("{}", refused.error));
        let buffer = copying.wait(LONG).unwrap().unwrap().remove(0);
        let copied = buffer[..bytes as usize].to_vec();
        self.buffer = Some(buffer);
        copied
    }

    /// Whether it is there; then its bytes are right.
    fn get(&mut self, record: &Record) -> bool {
        let Some(place) = self.cache.get(&record.key, record) else { return false };
        assert_eq!(place.bytes(), record.bytes);
        let bytes = self.bytes_at(&place);
        assert_eq!(Checksum::of(&record.key, &bytes), record.checksum, "{} has a wrong byte", record.key);
        true
    }
}

fn opened(config: CacheConfig) -> (Cuda, Rig) {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let rig = Rig::new(&device, config);
    (cuda, rig)
}

#[test]
fn a_hit_is_what_the_caller_expects() {
    let (cuda, mut rig) = opened(CacheConfig::default());
    let first = rig.put(1, 0, 10_000);
    assert!(rig.cache.has(&first.key, &first) && rig.get(&first));
    for wrong in [
        Record { bytes: 9_999, ..first },
        Record { checksum: Checksum(first.checksum.0 ^ 1), ..first },
        Record { key: key(2), ..first },
    ] {
        assert!(!rig.cache.has(&wrong.key, &wrong) && !rig.get(&wrong), "{wrong:?}");
    }
    // Another under the same key takes its place.
    let second = rig.put(1, 1, 10_000);
    assert!(rig.get(&second) && !rig.get(&first));
    let report = rig.cache.report();
    assert_eq!((report.blocks, report.bytes, report.hits, report.misses), (1, 10_000, 2, 4));
    // The same again is not written again.
    rig.put(1, 1, 10_000);
    assert_eq!(rig.cache.report().pool.bytes_written, 20_000);

    rig.cache.forget(&key(1));
    assert!(!rig.get(&second));
    assert_eq!((rig.cache.report().blocks, rig.cache.report().bytes), (0, 0));
    // Also one that is being written, whatever comes of that.
    let block = rig.block(3, 0, 10_000);
    let third = block.record();
    rig.cache.put(third, block).unwrap();
    rig.cache.forget(&key(3));
    rig.settle();
    assert!(!rig.get(&third));
    // Of two that are written at once the later one counts.
    for version in [0, 1] {
        let block = rig.block(4, version, 10_000);
        rig.cache.put(block.record(), block).unwrap();
    }
    rig.settle();
    let later = rig.block(4, 1, 10_000).record();
    assert!(rig.get(&later) && rig.cache.report().blocks == 1);
    drop(rig);
    cuda.is_clean();
}

/// A scan of four times the pool, with a few blocks read again and again meanwhile: those stay, the scan's go, and the
/// hot ones are moved less often than they would be written.
#[test]
fn what_is_read_stays_through_a_scan() {
    let (cuda, mut rig) = opened(CacheConfig::default());
    // Three of the scan after each, so that no segment has more of them than may be moved.
    let mut hot = Vec::new();
    for n in 0..24 {
        hot.push(rig.put(n, 0, BLOCK));
        assert!(rig.get(&hot[n as usize]));
        for other in 0..3 {
            rig.put(100 + 3 * n + other, 0, BLOCK);
        }
    }
    let scan = 4 * SEGMENTS * PER_SEGMENT;
    for n in 0..scan {
        rig.put(1000 + n, 0, BLOCK);
        let record = hot[n as usize % hot.len()];
        assert!(rig.get(&record), "block {} after {n} of the scan", n as usize % hot.len());
    }
    let report = rig.cache.report();
    assert!(report.blocks <= SEGMENTS * PER_SEGMENT && report.bytes == report.blocks * u64::from(BLOCK));
    assert!(report.dropped > scan / 2, "{report:?}");
    assert_eq!(report.blocks + report.dropped + report.refused, 4 * 24 + scan);
    assert!(report.moved >= 24 && report.moved < scan, "{report:?}");
    assert_eq!(report.misses, 0);
    assert!(report.pool.bytes_used <= report.pool.bytes_max);
    drop(rig);
    cuda.is_clean();
}

/// More is hot than may be moved: of each segment the share that was read last stays, and reclaim goes on.
#[test]
fn of_too_many_that_are_read_the_latest_stay() {
    let (cuda, mut rig) = opened(CacheConfig { move_percent_max: 25, ..CacheConfig::default() });
    let first: Vec<_> = (0..PER_SEGMENT).map(|n| rig.put(n, 0, BLOCK)).collect();
    // In an order of their own.
    let order: Vec<_> = (0..PER_SEGMENT).map(|n| (n * 5 % PER_SEGMENT) as usize).collect();
    order.iter().for_each(|n| assert!(rig.get(&first[*n])));
    let mut n = 1000;
    while rig.cache.report().moved == 0 {
        rig.put(n, 0, BLOCK);
        n += 1;
    }
    let there = |n: &usize| rig.cache.has(&first[*n].key, &first[*n]);
    let there: Vec<_> = order.iter().copied().filter(there).collect();
    assert_eq!(there, order[order.len() - 4..], "a quarter of sixteen");
    drop(rig);
    cuda.is_clean();
}

#[test]
fn entries_are_bounded_and_the_oldest_give_way() {
    let config = CacheConfig { entries_max: 10, ..CacheConfig::default() };
    let (cuda, mut rig) = opened(config);
    let records: Vec<_> = (0..10).map(|n| rig.put(n, 0, 4096)).collect();
    for n in [0, 3] {
        assert!(rig.get(&records[n]));
    }
    rig.put(100, 0, 4096);
    rig.put(101, 0, 4096);
    let gone: Vec<_> = (0..10).filter(|n| !rig.cache.has(&records[*n].key, &records[*n])).collect();
    assert_eq!(gone, [1, 2], "0 and 3 were read");
    for n in 0..1000 {
        // Put, given up and put again: what it remembers does not grow.
        rig.put(n % 40, (n % 3) as u8, 4096);
        if n % 5 == 0 {
            rig.cache.forget(&key(n % 7));
        }
        assert!(rig.cache.report().blocks <= 10);
    }
    drop(rig);
    cuda.is_clean();
}

/// Puts, gets, forgets and replacements of all sizes in a seeded order, with what is hot drifting; a map says what may
/// be a hit.
#[test]
fn a_seeded_trace_finds_no_wrong_byte() {
    let config = CacheConfig { entries_max: 200, move_percent_max: 40 };
    for seed in 0..3 {
        let (cuda, mut rig) = opened(config);
        let mut chance = pattern(seed + 1, 60_000).into_iter();
        let mut below =
            |limit: u64| chance.by_ref().take(3).fold(0_u64, |sum, byte| sum << 8 | u64::from(byte)) % limit;
        // By number: the record that was put last, if it was not given up.
        let mut put: HashMap<u64, Record> = HashMap::new();
        let mut held = Vec::new();
        let (mut asked, mut hits) = (0, 0);
        for round in 0..2000 {
            // Four of five go to sixty blocks, which drift.
            let n = if below(5) < 4 { round / 20 + below(60) } else { below(1000) };
            match below(10) {
                0..=4 => {
                    let version = below(2) as u8;
                    let bytes = 1 + below(if n % 7 == 0 { 500_000 } else { 70_000 }) as u32;
                    let bytes = put.get(&n).map_or(bytes, |record| record.bytes);
                    let record = rig.put(n, version, bytes);
                    put.insert(n, record);
                }
                5..=8 => {
                    if let Some(record) = put.get(&n).copied() {
                        asked += 1;
                        hits += u64::from(rig.get(&record));
                        let other = Record { checksum: Checksum(record.checksum.0 ^ 2), ..record };
                        assert!(!rig.cache.has(&other.key, &other));
                    } else {
                        let record = rig.block(n, 0, 100).record();
                        assert!(rig.cache.get(&record.key, &record).is_none(), "never put, or given up");
                    }
                }
                _ if below(2) == 0 => {
                    rig.cache.forget(&key(n));
                    put.remove(&n);
                }
                // Held over what comes next, as a copy under way would.
                _ => {
                    if let Some(record) = put.get(&n).copied() {
                        held.extend(rig.cache.get(&record.key, &record).map(|place| (record, place)));
                    }
                }
            }
            if held.len() > 2 {
                let (record, place) = held.remove(0);
                let bytes = rig.bytes_at(&place);
                assert_eq!(Checksum::of(&record.key, &bytes), record.checksum, "round {round}");
            }
            let report = rig.cache.report();
            assert!(report.blocks <= 200 && report.pool.bytes_used <= report.pool.bytes_max, "{report:?}");
            assert!(report.bytes <= report.pool.bytes_used, "{report:?}");
            rig.memory.slab().sweep(&HazardSet::new());
        }
        let report = rig.cache.report();
        assert!(report.moved > 0 && report.dropped > 0, "{report:?}");
        assert!(hits * 2 > asked, "{hits} of {asked}: {report:?}");
        drop((held, rig));
        cuda.is_clean();
    }
}

/// Copied on the device and sealed, as a worker's pages are.
#[test]
fn what_is_copied_on_the_device_is_kept() {
    let (cuda, mut rig) = opened(CacheConfig::default());
    let block = rig.block(5, 0, BLOCK);
    let record = block.record();
    let reserved = rig.cache.reserve(BLOCK).unwrap();
    let device = rig.stream.device().clone();
    let pages = device.allocate(u64::from(BLOCK)).unwrap();
    up(&rig.stream, &pages, vec![filled(&device, &block)], &whole(block.len()));
    let to = (reserved.memory(), reserved.offset());
    let mut copying = rig.stream.copy(to, (&pages, 0), u64::from(BLOCK)).unwrap();
    copying.wait(LONG).unwrap().unwrap();
    assert!(!rig.get(&record), "not before it is sealed");
    rig.cache.seal(reserved, record).unwrap();
    assert!(rig.get(&record));
    drop((copying, pages, block, device, rig));
    cuda.is_clean();
}

/// A device that fails costs hits, and no more.
#[test]
fn a_failing_device_costs_hits_alone() {
    let Some((fake, driver)) = fake("") else { return };
    let device = driver.open(0).unwrap();
    let mut rig = Rig::new(&device, CacheConfig::default());
    let hot = rig.put(0, 0, BLOCK);
    fake.set("fail=cuMemcpyHtoDAsync_v2:1:801");
    let refused = rig.put(1, 0, BLOCK);
    assert!(!rig.get(&refused) && rig.cache.report().refused == 1);
    assert!(rig.get(&hot));
    // Its move fails, so it is dropped, and the segment comes back all the same.
    fake.set("fail=cuMemcpyDtoDAsync_v2:1:801");
    let mut n = 1000;
    while rig.cache.has(&hot.key, &hot) {
        assert!(n < 2000, "it is never moved");
        rig.put(n, 0, BLOCK);
        n += 1;
    }
    assert_eq!(rig.cache.report().moved, 0);
    let dropped = rig.cache.report().dropped;
    for n in 2000..2000 + SEGMENTS * PER_SEGMENT {
        rig.put(n, 0, BLOCK);
    }
    assert!(rig.cache.report().dropped > dropped);

    // Lost: nothing is there any more, and what is put comes back.
    let kept = rig.put(5000, 0, BLOCK);
    let (coming, late) = (rig.block(5001, 0, BLOCK), rig.block(5002, 0, BLOCK));
    rig.cache.put(coming.record(), coming).unwrap();
    fake.set("lose=0:719");
    rig.settle();
    assert!(rig.cache.is_lost() && !rig.cache.has(&kept.key, &kept));
    assert!(rig.cache.get(&kept.key, &kept).is_none());
    assert!(rig.cache.put(late.record(), late).is_err());
    drop((rig, device));
    assert_eq!((fake.count("contexts"), fake.count("violations")), (0, 0));
}
