//! A pool: the contract of a store but for durability, and what only a device can do to it.

mod common;

use std::time::Duration;

use common::{Cuda, LONG, cuda, fake, filled, low, pattern, up, whole};
use kv_arena::{Geometry, HazardSet, Held, ShardMemory, Slab};
use kv_block::{BindingTag, BlockKey, Checksum, DiskLocation, Priority, Record, payload};
use kv_gpu::{Device, Error, HostRegion, PageCopy, Place, Pool, PoolConfig, Stream};
use kv_tiers::contract::Subject;
use kv_tiers::store::{BlockStore, OpToken, StoreDone, StoreError, StoreOp};

fn config() -> PoolConfig {
    PoolConfig { segment_bytes: 1 << 20, leave_bytes: 0, ..PoolConfig::new(8 << 20) }
}

/// On the fake driver or a real one; a restart begins with nothing.
struct OnDevice {
    /// Before the device that it is registered with.
    region: Option<HostRegion>,
    device: Device,
    _cuda: Cuda,
}

impl OnDevice {
    fn new() -> Self {
        let cuda = cuda();
        Self { region: None, device: cuda.driver.open(0).unwrap(), _cuda: cuda }
    }
}

impl Subject for OnDevice {
    type Store = Pool;
    fn prepare(&mut self, memory: &Slab) {
        self.region = Some(self.device.register(memory, 0, memory.data_bytes()).unwrap());
    }
    fn open(&mut self) -> Pool {
        Pool::open(&self.device, &config()).unwrap()
    }
    fn reopen(&mut self, store: Pool) -> (Pool, Vec<(Record, DiskLocation)>) {
        drop(store);
        (self.open(), Vec::new())
    }
    fn wait(&mut self) {
        std::thread::sleep(Duration::from_micros(20));
    }
    fn durable(&self) -> bool {
        false
    }
}

mod contract {
    kv_tiers::store_contract!(super::OnDevice::new());
}

/// A device, memory for blocks that it knows, and a pool on it.
struct Rig {
    pool: Pool,
    done: Vec<StoreDone>,
    memory: ShardMemory,
    _region: HostRegion,
    device: Device,
}

impl Rig {
    fn new(device: &Device, config: &PoolConfig) -> Self {
        let geometry = Geometry { regions: 4, region_bytes: 2 << 20, table_entries_max: 8 };
        let memory = ShardMemory::anonymous(geometry).unwrap();
        let region = device.register(memory.slab(), 0, memory.slab().data_bytes()).unwrap();
        let pool = Pool::open(device, config).unwrap();
        Self { pool, done: Vec::new(), memory, _region: region, device: device.clone() }
    }

    fn block(&self, n: u8, bytes: u32) -> Held {
        let (key, mut slot) = (BlockKey([n; 16]), self.memory.slab().take(bytes).unwrap());
        payload::fill(&key, &mut slot[..bytes as usize]);
        let checksum = Checksum::of(&key, &slot[..bytes as usize]);
        let (tag, priority) = (BindingTag(1), Priority::Normal);
        slot.seal(&Record { key, checksum, bytes, tag, priority, expires_at: 0 })
    }

    fn end(&mut self, token: u64) -> StoreDone {
        let token = Some(OpToken(token));
        for _ in 0..100_000 {
            if let Some(at) = self.done.iter().position(|done| done.token() == token) {
                return self.done.remove(at);
            }
            self.pool.poll(&mut self.done);
            std::thread::sleep(Duration::from_micros(20));
        }
        panic!("{token:?} does not end");
    }

    fn submit_write(&mut self, n: u8, bytes: u32) -> Record {
        let block = self.block(n, bytes);
        let record = block.record();
        self.pool.submit(StoreOp::Write { token: OpToken(n.into()), record, bytes: block }).unwrap();
        record
    }

    fn written(&mut self, n: u8) -> Result<DiskLocation, StoreError> {
        let StoreDone::Written { bytes, result, .. } = self.end(n.into()) else { panic!("not a write") };
        assert_eq!(bytes.record().key, BlockKey([n; 16]));
        self.forget(bytes);
        result
    }

    /// Gives the memory of a block back, when nobody else holds it.
    fn forget(&self, block: Held) {
        let (id, generation) = (block.id(), block.generation());
        drop(block);
        if self.memory.slab().retire(id, generation).is_ok() {
            self.memory.slab().sweep(&HazardSet::new());
        }
    }

    fn write(&mut self, n: u8, bytes: u32) -> (Record, DiskLocation) {
        (self.submit_write(n, bytes), self.written(n).unwrap())
    }

    fn read(&mut self, record: Record, at: DiskLocation) -> Result<(), StoreError> {
        let into = self.memory.slab().take(record.bytes).unwrap();
        self.pool.submit(StoreOp::Read { token: OpToken(1000), at, record, into }).unwrap();
        let StoreDone::Read { into, result, .. } = self.end(1000) else { panic!("not a read") };
        if result.is_ok() {
            assert_eq!(payload::first_wrong_byte(&record.key, &into[..record.bytes as usize]), None);
        }
        result
    }

    /// Fills the pool with blocks of half a segment, from this number on, until there is no room.
    fn fill(&mut self, first: u8) -> Vec<(Record, DiskLocation)> {
        let mut written = Vec::new();
        for n in first.. {
            let record = self.submit_write(n, 512 << 10);
            match self.written(n) {
                Ok(at) => written.push((record, at)),
                Err(error) => {
                    assert_eq!(error, StoreError::Full);
                    return written;
                }
            }
        }
        panic!("it is never full");
    }

    /// The segment on offer, released.
    fn release(&mut self) -> u32 {
        let offer = |done: &StoreDone| match done {
            StoreDone::Reclaim { segment, .. } => Some(*segment),
            _ => None,
        };
        self.pool.poll(&mut self.done);
        let at = self.done.iter().position(|done| offer(done).is_some()).expect("a segment is on offer");
        let segment = offer(&self.done.remove(at)).unwrap();
        self.pool.submit(StoreOp::Release { token: OpToken(2000), segment }).unwrap();
        let StoreDone::Released { result: Ok(()), .. } = self.end(2000) else { panic!("not released") };
        segment
    }

    fn bytes_at(&self, place: &Place) -> Vec<u8> {
        let bytes = place.bytes() as usize;
        let buffer = self.device.host_buffer(bytes).unwrap();
        let page = PageCopy { host: 0, host_offset: 0, device_offset: place.offset(), bytes: bytes as u64 };
        let mut copying =
            low(&self.device).offload(place.memory(), vec![buffer], &[page]).unwrap_or_else(|_| panic!());
        copying.wait(LONG).unwrap().unwrap()[0].to_vec()
    }
}

fn on_device(stream: &Stream, to: (&kv_gpu::DeviceMemory, u64), bytes: &[u8]) {
    let memory = stream.device().allocate(bytes.len() as u64).unwrap();
    up(stream, &memory, vec![filled(stream.device(), bytes)], &whole(bytes.len()));
    stream.copy(to, (&memory, 0), bytes.len() as u64).unwrap().wait(LONG).unwrap().unwrap();
}

#[test]
fn a_device_with_less_room_makes_a_smaller_pool() {
    let Some((fake, driver)) = fake("memory=6815744") else { return };
    let device = driver.open(0).unwrap();
    let pool = Pool::open(&device, &config()).unwrap();
    assert_eq!(pool.usage().bytes_max, 6 << 20);
    assert_eq!(pool.usage().bytes_used, 0);
    drop(pool);
    let some_left = PoolConfig { leave_bytes: 1 << 20, ..config() };
    assert_eq!(Pool::open(&device, &some_left).unwrap().usage().bytes_max, 5 << 20);
    let much_left = PoolConfig { leave_bytes: 3 << 20, ..config() };
    let full = Error::Full { device: 0, bytes: 4 << 20 };
    assert_eq!(Pool::open(&device, &much_left).map(drop).unwrap_err(), full);
    let small = PoolConfig { bytes_max: (4 << 20) - 1, ..config() };
    assert_eq!(Pool::open(&device, &small).map(drop).unwrap_err(), full);
    assert_eq!(fake.count("allocations"), 0, "what was taken was given back");
    // The driver says that there is room and then has none.
    fake.set("fail=cuMemAlloc_v2:6:2");
    assert_eq!(Pool::open(&device, &config()).unwrap().usage().bytes_max, 5 << 20);
    fake.set("fail=cuMemAlloc_v2:6:999");
    assert!(matches!(Pool::open(&device, &config()), Err(Error::Cuda { .. })));
    drop(device);
    fake.is_clean();
}

/// Somebody writes over a block on the device, behind the pool's back.
#[test]
fn a_wrong_byte_on_the_device_is_found() {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let mut rig = Rig::new(&device, &config());
    let (record, at) = rig.write(1, 100_000);
    let (other, other_at) = rig.write(2, 100_000);
    let place = rig.pool.place(at, &record).unwrap();
    assert_eq!(rig.bytes_at(&place), *rig.block(1, 100_000));
    on_device(&low(&device), (place.memory(), place.offset() + 99_999), &[1, 2, 3]);
    let corrupt = rig.read(record, at);
    assert!(matches!(corrupt, Err(StoreError::Corrupt { what: "checksum", .. })), "{corrupt:?}");
    // Moved, it is still wrong, and still found.
    rig.pool.submit(StoreOp::Move { token: OpToken(50), at, record }).unwrap();
    let StoreDone::Moved { result: Ok(moved), .. } = rig.end(50) else { panic!("not a move") };
    assert!(matches!(rig.read(record, moved), Err(StoreError::Corrupt { .. })));
    assert_eq!(rig.read(other, other_at), Ok(()));
    drop((rig, place, device));
    cuda.is_clean();
}

#[test]
fn what_is_copied_on_the_device_becomes_a_block() {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let mut rig = Rig::new(&device, &config());
    let block = rig.block(7, 10_000);
    let record = block.record();
    let reserved = rig.pool.reserve(10_000).unwrap();
    assert_eq!((reserved.bytes(), reserved.offset() % 4096), (10_000, 0));
    on_device(&low(&device), (reserved.memory(), reserved.offset()), &block);
    let at = rig.pool.seal(reserved, record).unwrap();
    assert_eq!(rig.read(record, at), Ok(()));
    assert_eq!(rig.pool.usage().bytes_written, 10_000);

    // Another length than was reserved, and bytes that are not the record's.
    let reserved = rig.pool.reserve(10_001).unwrap();
    let refused = rig.pool.seal(reserved, record);
    assert!(matches!(refused, Err(StoreError::Corrupt { what: "length", .. })), "{refused:?}");
    let reserved = rig.pool.reserve(10_000).unwrap();
    on_device(&low(&device), (reserved.memory(), reserved.offset()), &pattern(1, 10_000));
    let at = rig.pool.seal(reserved, record).unwrap();
    assert!(matches!(rig.read(record, at), Err(StoreError::Corrupt { what: "checksum", .. })));
    let too_large = StoreError::TooLarge { bytes: (1 << 20) + 1, segment_bytes: 1 << 20 };
    assert_eq!(rig.pool.reserve((1 << 20) + 1).map(drop), Err(too_large));
    drop((rig, block, device));
    cuda.is_clean();
}

/// As long as a place is held, its bytes are what they were, whatever becomes of the segment.
#[test]
fn a_held_place_keeps_its_segment() {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let mut rig = Rig::new(&device, &config());
    let written = rig.fill(1);
    assert_eq!(written.len(), 14, "one of eight segments is for moves");
    let (record, at) = written[0];
    let place = rig.pool.place(at, &record).unwrap();
    assert_eq!(rig.release(), at.segment());
    assert_eq!(rig.pool.place(at, &record).map(drop), Err(StoreError::Stale { segment: at.segment() }));
    rig.submit_write(100, 512 << 10);
    assert_eq!(rig.written(100), Err(StoreError::Full), "it is released and not free");
    let used = rig.pool.usage().bytes_used;
    assert_eq!(rig.bytes_at(&place)[..], rig.block(1, 512 << 10)[..]);
    drop(place);
    let (_, again) = rig.write(101, 512 << 10);
    assert_eq!(again.segment(), at.segment());
    assert_eq!(rig.pool.usage().bytes_used, used);

    // Room that is reserved keeps its segment from being offered; given up, it is dead.
    drop(rig);
    let mut rig = Rig::new(&device, &config());
    let reserved = rig.pool.reserve(4096).unwrap();
    let written = rig.fill(1);
    assert_eq!(written.len(), 13);
    assert_eq!((rig.release(), rig.release()), (1, 2));
    drop(reserved);
    rig.fill(100);
    assert_eq!(rig.release(), 0);
    drop((rig, device));
    cuda.is_clean();
}

/// A read is under way while its segment is released and filled again.
#[test]
fn a_read_under_way_keeps_its_segment() {
    let Some((fake, driver)) = fake("") else { return };
    let device = driver.open(0).unwrap();
    let mut rig = Rig::new(&device, &config());
    let (record, at) = rig.fill(1)[0];
    rig.pool.poll(&mut rig.done);
    fake.set("delay_us=300000");
    let into = rig.memory.slab().take(record.bytes).unwrap();
    rig.pool.submit(StoreOp::Read { token: OpToken(1000), at, record, into }).unwrap();
    rig.pool.kick();
    assert_eq!(rig.release(), at.segment());
    rig.submit_write(100, 512 << 10);
    assert_eq!(rig.written(100), Err(StoreError::Full));
    fake.set("delay_us=0");
    let StoreDone::Read { into, result, .. } = rig.end(1000) else { panic!("not a read") };
    assert_eq!(result, Ok(()));
    assert_eq!(payload::first_wrong_byte(&record.key, &into[..record.bytes as usize]), None);
    assert_eq!(rig.write(101, 512 << 10).1.segment(), at.segment());
    drop((into, rig, device));
    fake.is_clean();
}

/// Each call of an operation fails once: it ends with an error, its memory comes back, and the next one works.
#[test]
fn an_operation_that_fails_gives_its_memory_back() {
    let Some((fake, driver)) = fake("") else { return };
    let device = driver.open(0).unwrap();
    let mut rig = Rig::new(&device, &config());
    let (record, at) = rig.write(1, 8192);
    for call in ["cuEventCreate", "cuEventRecord", "cuMemcpyHtoDAsync_v2"] {
        fake.set(&format!("fail={call}:1:801"));
        rig.submit_write(2, 8192);
        let io = Err(StoreError::Io { operation: "write", segment: 0, errno: 5 });
        assert_eq!(rig.written(2), io, "{call}");
        let (second, second_at) = rig.write(2, 8192);
        assert_eq!(rig.read(second, second_at), Ok(()), "{call}");
    }
    for call in ["cuEventCreate", "cuEventRecord", "cuMemcpyDtoHAsync_v2"] {
        fake.set(&format!("fail={call}:1:801"));
        let io = Err(StoreError::Io { operation: "read", segment: 0, errno: 5 });
        assert_eq!(rig.read(record, at), io, "{call}");
        assert_eq!(rig.read(record, at), Ok(()), "{call}");
    }
    for call in ["cuEventCreate", "cuEventRecord", "cuMemcpyDtoDAsync_v2"] {
        fake.set(&format!("fail={call}:1:801"));
        rig.pool.submit(StoreOp::Move { token: OpToken(50), at, record }).unwrap();
        let StoreDone::Moved { result, .. } = rig.end(50) else { panic!("not a move") };
        assert_eq!(result, Err(StoreError::Io { operation: "write", segment: 0, errno: 5 }), "{call}");
    }
    // A question that fails is asked again.
    fake.set("fail=cuEventQuery:1:801");
    assert_eq!(rig.read(record, at), Ok(()));
    assert_eq!(rig.pool.usage().in_flight, 0);
    assert_eq!(rig.memory.slab().regions().iter().map(|region| region.used).sum::<u32>(), 0, "all came back");
    drop((rig, device));
    fake.is_clean();
}

/// Slow: the submitter hears so, and what the device does late changes nothing.
#[test]
fn a_slow_write_ends_and_leaves_no_block() {
    let Some((fake, driver)) = fake("delay_us=30000") else { return };
    let device = driver.open(0).unwrap();
    let limit = Duration::from_millis(1);
    let mut rig = Rig::new(&device, &PoolConfig { slow_limit: limit, in_flight_max: 2, ..config() });
    let slow = rig.submit_write(1, 512 << 10);
    let StoreDone::Written { bytes, result, .. } = rig.end(1) else { panic!("not a write") };
    assert_eq!(result, Err(StoreError::Slow { limit }));
    assert_eq!(rig.pool.usage().in_flight, 0);
    // The device has it still, and its memory is bounded by what is taken.
    let held = rig.memory.slab().retire(bytes.id(), bytes.generation());
    assert!(held.is_err(), "{held:?}: the device is using it");
    let second = rig.block(2, 4096);
    rig.pool.submit(StoreOp::Write { token: OpToken(2), record: second.record(), bytes: second }).unwrap();
    let third = rig.block(3, 4096);
    let refused = rig.pool.submit(StoreOp::Write { token: OpToken(3), record: third.record(), bytes: third });
    assert!(refused.is_err());
    fake.set("delay_us=0");
    drop(rig.end(2));
    for _ in 0..1000 {
        rig.pool.poll(&mut rig.done);
        std::thread::sleep(Duration::from_micros(100));
    }
    assert!(rig.done.is_empty(), "it ends once: {:?}", rig.done);
    let at = DiskLocation::new(0, 1, 0).unwrap();
    let nothing = rig.pool.place(at, &slow).map(drop);
    assert!(matches!(nothing, Err(StoreError::Corrupt { what: "place", .. })), "{nothing:?}");
    drop((refused, bytes, rig, device));
    fake.is_clean();
}

/// The device is lost under all kinds of operations: each ends, and no slot is given back that it may still write to.
#[test]
fn a_lost_device_ends_every_operation() {
    let Some((fake, driver)) = fake("") else { return };
    let device = driver.open(0).unwrap();
    let mut rig = Rig::new(&device, &config());
    let (record, at) = rig.write(1, 512 << 10);
    fake.set("delay_us=300000");
    let into = rig.memory.slab().take(record.bytes).unwrap();
    rig.pool.submit(StoreOp::Read { token: OpToken(1000), at, record, into }).unwrap();
    rig.submit_write(2, 512 << 10);
    rig.pool.submit(StoreOp::Move { token: OpToken(50), at, record }).unwrap();
    rig.pool.kick();
    assert_eq!(rig.pool.usage().in_flight, 3);
    fake.set("lose=0:719");
    assert_eq!(rig.written(2), Err(StoreError::Io { operation: "write", segment: 0, errno: 5 }));
    let StoreDone::Moved { result, .. } = rig.end(50) else { panic!("not a move") };
    assert_eq!(result, Err(StoreError::Io { operation: "write", segment: 1, errno: 5 }));
    assert_eq!(rig.pool.take_lost(), [OpToken(1000)]);
    assert_eq!((rig.pool.usage().in_flight, rig.pool.take_lost().len()), (0, 0));

    // What comes after ends at once, with its memory.
    rig.submit_write(3, 4096);
    assert!(matches!(rig.written(3), Err(StoreError::Io { .. })));
    assert!(matches!(rig.read(record, at), Err(StoreError::Io { operation: "read", .. })));
    assert!(device.kept() > 0);
    drop((rig, device));
    assert_eq!((fake.count("contexts"), fake.count("violations")), (0, 0));
}

/// A device that takes longer than anybody waits: what it uses is not given up under it.
#[test]
fn a_dropped_pool_keeps_what_the_device_still_uses() {
    let Some((fake, driver)) = fake("delay_us=50000") else { return };
    let device = driver.open(0).unwrap();
    let limit = Duration::from_millis(1);
    let mut rig = Rig::new(&device, &PoolConfig { slow_limit: limit, ..config() });
    for n in 1..5 {
        rig.submit_write(n, 512 << 10);
    }
    rig.pool.kick();
    drop((rig, device));
    assert!(fake.count("allocations") > 0 && fake.count("streams") > 0);
    assert_eq!(fake.count("violations"), 0);
}

/// Blocks in memory that the device does not know are refused, and come back.
#[test]
fn memory_that_is_not_registered_is_refused() {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let mut pool = Pool::open(&device, &config()).unwrap();
    let geometry = Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: 8 };
    let memory = ShardMemory::anonymous(geometry).unwrap();
    let mut slot = memory.slab().take(4096).unwrap();
    let key = BlockKey([1; 16]);
    payload::fill(&key, &mut slot);
    let checksum = Checksum::of(&key, &slot);
    let (tag, priority) = (BindingTag(1), Priority::Normal);
    let record = Record { key, checksum, bytes: 4096, tag, priority, expires_at: 0 };
    pool.submit(StoreOp::Write { token: OpToken(1), record, bytes: slot.seal(&record) }).unwrap();
    let mut done = Vec::new();
    pool.poll(&mut done);
    assert!(matches!(done[..], [StoreDone::Written { result: Err(StoreError::Io { .. }), .. }]), "{done:?}");
    drop((done, pool, device));
    cuda.is_clean();
}
