//! The copier: jobs in steps under bounds, what they own meanwhile, and that each ends once.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use common::{Fake, LONG, cuda, fake, filled, low, pattern, read, write};
use kv_arena::{Geometry, Held, ShardMemory, Slot};
use kv_block::{BindingTag, BlockKey, Priority as Importance, Record};
use kv_gpu::{
    Copier, CopierConfig, CopyDone, Device, DeviceMemory, Driver, Error, HostRegion, Hosts, Job, JobToken,
    Method, PagePiece, Priority, Step,
};

const PAGE: u64 = 4096;
/// All blocks of the arena are of this class.
const SLOT: u64 = 64 << 10;
const METHODS: [Method; 4] = [Method::Auto, Method::Kernel, Method::Batch, Method::Loop];

/// A device with an arena that is registered, and what a test wants of them.
struct Bench {
    copier: Copier,
    arena: ShardMemory,
    region: HostRegion,
    device: Device,
}

impl Bench {
    fn new(driver: &Driver, change: impl FnOnce(&mut CopierConfig)) -> Self {
        let device = driver.open(0).unwrap();
        let arena =
            ShardMemory::anonymous(Geometry { regions: 4, region_bytes: 4 << 20, table_entries_max: 64 });
        let arena = arena.unwrap();
        let region = device.register(arena.slab(), 0, arena.slab().data_bytes()).unwrap();
        let mut config = CopierConfig::default();
        change(&mut config);
        let copier = Copier::new(&device, config).unwrap();
        Self { copier, arena, region, device }
    }

    fn slot(&self) -> Slot {
        self.arena.slab().take(SLOT as u32).unwrap()
    }

    fn held(&self, bytes: &[u8]) -> Held {
        let mut slot = self.slot();
        let key = BlockKey([bytes.len() as u8; 16]);
        let checksum = slot.copy_from(&key, bytes);
        let (tag, priority) = (BindingTag(1), Importance::default());
        slot.seal(&Record { key, checksum, bytes: bytes.len() as u32, tag, priority, expires_at: 0 })
    }

    /// Slots that are not free, and how many of them are held.
    fn used(&self) -> (u32, u32) {
        let regions = self.arena.slab().regions();
        (regions.iter().map(|region| region.used).sum(), regions.iter().map(|region| region.held).sum())
    }

    fn memory(&self, bytes: u64) -> DeviceMemory {
        self.device.allocate(bytes).unwrap()
    }

    fn submit(&mut self, job: Job) {
        self.copier.submit(job).map_err(|(_, error)| error).unwrap();
    }

    /// Polls until so many jobs have ended.
    fn ends(&mut self, count: usize) -> BTreeMap<u64, End> {
        let mut watch = Watch::default();
        self.watch(&mut watch, |watch| watch.ended.len() >= count);
        assert_eq!(watch.ended.len(), count);
        watch.ended
    }

    fn only_end(&mut self) -> End {
        self.ends(1).pop_first().unwrap().1
    }

    fn watch(&mut self, watch: &mut Watch, is_enough: impl Fn(&Watch) -> bool) {
        let mut done = Vec::new();
        // Each pause is no shorter than it is asked to be, so all of them are no shorter than `LONG`.
        let mut pauses = LONG.as_micros() / 50;
        loop {
            self.copier.poll(&mut done);
            done.drain(..).for_each(|done| watch.take(done));
            if is_enough(watch) {
                return;
            }
            pauses -= 1;
            assert!(pauses > 0, "{} jobs ended, and no more", watch.ended.len());
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// What became of a job, when it is over.
#[derive(Debug)]
struct End {
    queued: bool,
    steps: usize,
    hosts: Option<Hosts>,
    result: Result<(), Error>,
}

/// What is said of jobs, in the order in which it may be said.
#[derive(Default)]
struct Watch {
    known: BTreeMap<u64, (bool, usize)>,
    ended: BTreeMap<u64, End>,
}

impl Watch {
    fn take(&mut self, done: CopyDone) {
        match done {
            CopyDone::Queued { token } => {
                assert!(!self.ended.contains_key(&token.0), "{token:?} has ended");
                let queued = &mut self.known.entry(token.0).or_default().0;
                assert!(!*queued, "{token:?} is queued once");
                *queued = true;
            }
            CopyDone::Step { token, steps } => {
                assert!(!self.ended.contains_key(&token.0), "{token:?} has ended");
                let known = &mut self.known.entry(token.0).or_default().1;
                assert!(*known < steps, "{token:?} goes on");
                *known = steps;
            }
            CopyDone::Ended { token, hosts, result } => {
                let (queued, steps) = self.known.remove(&token.0).unwrap_or_default();
                let end = End { queued, steps, hosts, result };
                assert!(self.ended.insert(token.0, end).is_none(), "{token:?} ends once");
            }
        }
    }
}

fn job(token: u64, memories: &[&DeviceMemory], hosts: Hosts, steps: Vec<Step>) -> Job {
    let memories = memories.iter().copied().cloned().collect();
    Job { token: JobToken(token), memories, hosts, steps, open: false, urgent: false }
}

fn step(pieces: Vec<PagePiece>) -> Step {
    Step { after: None, pieces, then: None }
}

fn piece(memory: u32, device_offset: u64, other: u32, other_offset: u64, bytes: u64) -> PagePiece {
    PagePiece { memory, device_offset, other, other_offset, bytes }
}

/// From the beginning of the one to the beginning of the other.
fn whole(bytes: u64) -> Step {
    step(vec![piece(0, 0, 0, 0, bytes)])
}

/// Pages that are not joined: in the reverse order on the other side.
fn scattered(count: u64, bytes: u64) -> Step {
    step((0..count).map(|at| piece(0, at * bytes, 0, (count - 1 - at) * bytes, bytes)).collect())
}

fn slots(end: End) -> Vec<Slot> {
    end.result.unwrap();
    match end.hosts {
        Some(Hosts::To(slots)) => slots,
        other => panic!("{other:?}"),
    }
}

fn lost<T: std::fmt::Debug>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Lost { .. }))
}

/// Numbers by chance.
fn dice(seed: u64) -> impl FnMut(usize) -> usize {
    let mut bytes = pattern(seed, 1 << 20).into_iter();
    move |limit| bytes.by_ref().take(4).fold(0, |sum, byte| sum << 8 | usize::from(byte)) % limit
}

/// Pieces by chance: each byte of `to` is written once at most. `to` and `from` are the lengths of several memories.
fn pieces(
    below: &mut impl FnMut(usize) -> usize,
    to: &[usize],
    from: &[usize],
) -> Vec<(usize, usize, usize, usize, usize)> {
    let longest = [40, 700, 9000][below(3)];
    let alignment = [1, 2, 16][below(3)];
    let mut pieces = Vec::new();
    for (memory, length) in to.iter().enumerate() {
        let mut at = 0;
        for _ in 0..60 {
            at += below(200) / alignment * alignment;
            let other = below(from.len());
            let bytes = 1 + below(longest);
            if at + bytes > *length || bytes > from[other] {
                break;
            }
            let other_at = below(from[other] - bytes + 1) / alignment * alignment;
            pieces.push((memory, at, other, other_at, bytes));
            at += bytes.next_multiple_of(alignment);
        }
    }
    // In no order.
    for at in (1..pieces.len()).rev() {
        let other = below(at + 1);
        pieces.swap(at, other);
    }
    pieces
}

/// Up, down and across, with several memories on both sides, in several steps, against a model.
fn copies_what_a_model_has(driver: &Driver, method: Method, seed: u64) {
    let mut bench = Bench::new(driver, |config| config.method = method);
    let stream = low(&bench.device);
    let mut below = dice(seed);
    let lengths = [50_000, 30_000, 1_000];
    let memories: Vec<_> = lengths.iter().map(|bytes| bench.memory(*bytes as u64)).collect();
    let mut model: Vec<_> =
        lengths.iter().enumerate().map(|(at, bytes)| pattern(at as u64, *bytes)).collect();
    memories.iter().zip(&model).for_each(|(memory, bytes)| write(&stream, memory, bytes));
    for round in 0..24 {
        let blocks: Vec<_> =
            (0..1 + below(3)).map(|at| pattern(round * 8 + at as u64, 1 + below(20_000))).collect();
        let of_blocks: Vec<_> = blocks.iter().map(Vec::len).collect();
        let of_slots = vec![SLOT as usize; 2];
        let (way, steps) = (round % 4, 1 + below(3));
        let mut wanted = Vec::new();
        let (hosts, others): (_, Vec<Vec<u8>>) = match way {
            0 => (Hosts::From(blocks.iter().map(|bytes| bench.held(bytes)).collect()), blocks),
            1 => (Hosts::To(vec![bench.slot(), bench.slot()]), vec![vec![0; SLOT as usize]; 2]),
            _ => {
                let others: Vec<_> = of_blocks.iter().map(|bytes| bench.memory(*bytes as u64)).collect();
                others.iter().zip(&blocks).for_each(|(memory, bytes)| write(&stream, memory, bytes));
                (if way == 2 { Hosts::FromDevice(others) } else { Hosts::ToDevice(others) }, blocks)
            }
        };
        let (hosts, mut others) = match hosts {
            Hosts::To(mut slots) => {
                slots.iter_mut().for_each(|slot| slot.fill(0));
                (Hosts::To(slots), others)
            }
            hosts => (hosts, others),
        };
        let goes_in = matches!(way, 0 | 2);
        let of_others: &[usize] = if way == 1 { &of_slots } else { &of_blocks };
        for _ in 0..steps {
            let table = if goes_in {
                pieces(&mut below, &lengths, of_others)
            } else {
                pieces(&mut below, of_others, &lengths)
            };
            let mut of_step = Vec::new();
            for (to, to_at, from, from_at, bytes) in table {
                let (memory, at, other, other_at) =
                    if goes_in { (to, to_at, from, from_at) } else { (from, from_at, to, to_at) };
                let (here, there) =
                    (&mut model[memory][at..at + bytes], &mut others[other][other_at..][..bytes]);
                if goes_in {
                    here.copy_from_slice(there);
                } else {
                    there.copy_from_slice(here);
                }
                let [at, other_at, bytes] = [at, other_at, bytes].map(|it| it as u64);
                of_step.push(piece(memory as u32, at, other as u32, other_at, bytes));
            }
            wanted.push(step(of_step));
        }
        let memories: Vec<_> = memories.iter().collect();
        bench.submit(job(round, &memories, hosts, wanted));
        let end = bench.only_end();
        end.result.unwrap();
        assert!(end.queued && end.steps == steps, "{method:?} round {round}");
        match end.hosts.unwrap() {
            Hosts::From(held) => assert!(held.iter().zip(&others).all(|(held, bytes)| held[..] == bytes[..])),
            Hosts::To(slots) => {
                for (slot, bytes) in slots.iter().zip(&others) {
                    assert!(slot[..] == bytes[..], "{method:?} round {round}");
                }
            }
            Hosts::FromDevice(memories) | Hosts::ToDevice(memories) => {
                for (memory, bytes) in memories.iter().zip(&others) {
                    assert!(read(&stream, memory) == *bytes, "{method:?} round {round}");
                }
            }
        }
        for (memory, bytes) in memories.iter().zip(&model) {
            assert!(read(&stream, memory) == *bytes, "{method:?} round {round}");
        }
    }
    assert!(bench.copier.is_idle() && bench.copier.under_way() == (0, 0));
}

/// Whoever polls may be another thread than whoever made it.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Copier>();
};

#[test]
fn every_method_copies_what_a_model_has() {
    for (seed, method) in METHODS.into_iter().enumerate() {
        let cuda = cuda();
        copies_what_a_model_has(&cuda.driver, method, seed as u64);
        cuda.is_clean();
    }
}

#[test]
fn a_device_with_addresses_of_its_own_for_host_memory_is_given_those() {
    let Some((fake, driver)) = fake("host_addresses=0") else { return };
    copies_what_a_model_has(&driver, Method::Kernel, 9);
    assert_eq!(fake.count("calls:cuMemHostGetDevicePointer_v2") > 0, has_kernels());
    // The driver's batched copy has no place to say them; between memories of the device it needs none.
    for method in [Method::Auto, Method::Batch] {
        let batches = fake.count("calls:cuMemcpyBatchAsync_v2");
        copies_what_a_model_has(&driver, method, 9);
        assert!(fake.count("calls:cuMemcpyBatchAsync_v2") > batches || method == Method::Auto);
        let bench = Bench::new(&driver, |config| config.method = method);
        assert!(
            bench.copier.method_why().ends_with("other addresses for it"),
            "{}",
            bench.copier.method_why()
        );
    }
    fake.is_clean();
}

/// The driver refuses a copy out of one registration or allocation into the next, though the addresses follow.
#[test]
fn neighbours_in_different_memories_are_copied_apart() {
    for (method, settings) in
        METHODS.into_iter().map(|method| (method, "")).chain([(Method::Kernel, "host_addresses=0")])
    {
        let Some((fake, driver)) = fake(settings) else { return };
        let Bench { mut copier, arena, region, device } =
            Bench::new(&driver, |config| config.method = method);
        drop(region);
        let slab = arena.slab();
        let half = slab.data_bytes() / 2;
        let halves = [0, half].map(|at| device.register(slab, at, half).unwrap());
        // The last slot of the one and the first of the other, and one beside it in the same.
        let start = |slot: &Slot| slot.as_ptr().addr() as u64;
        let mut slots: Vec<_> = std::iter::from_fn(|| slab.take(SLOT as u32).ok()).collect();
        slots.sort_by_key(start);
        let begins = start(&slots[0]);
        let end = slots.iter().position(|slot| start(slot) == begins + half).unwrap();
        let three: Vec<_> = slots.drain(end - 2..=end).collect();
        assert_eq!(start(&three[0]) + 2 * SLOT, start(&three[2]));
        drop(slots);
        // Two allocations that follow each other, too.
        let memories = [0; 2].map(|_| device.allocate(2 << 20).unwrap());
        let stream = low(&device);
        let bytes = pattern(6, 2 << 20);
        memories.iter().for_each(|memory| write(&stream, memory, &bytes));
        let steps = vec![
            // One device memory and three slots; then two device memories and one.
            step((0..3).map(|at| piece(0, at * SLOT, at as u32, 0, SLOT)).collect()),
            step(vec![piece(0, (2 << 20) - PAGE, 2, 0, PAGE), piece(1, 0, 2, PAGE, PAGE)]),
        ];
        let calls = fake.count("calls:cuMemcpyDtoHAsync_v2");
        let job = job(1, &[&memories[0], &memories[1]], Hosts::To(three), steps);
        copier.submit(job).map_err(|(_, error)| error).unwrap();
        let [region, other] = halves;
        let mut bench = Bench { copier, arena, region, device };
        let three = self::slots(bench.only_end());
        let (first, last) = (&bytes[..3 * SLOT as usize], &bytes[(2 << 20) - PAGE as usize..]);
        let copied: Vec<u8> = three.iter().flat_map(|slot| slot.iter().copied()).collect();
        assert!(copied[..2 * SLOT as usize] == first[..2 * SLOT as usize], "{method:?}");
        assert!(copied[2 * SLOT as usize..][..PAGE as usize] == *last, "{method:?}");
        let second = &copied[2 * SLOT as usize + PAGE as usize..];
        assert!(second[..PAGE as usize] == bytes[..PAGE as usize], "{method:?}");
        assert!(second[PAGE as usize..] == first[2 * SLOT as usize + 2 * PAGE as usize..], "{method:?}");
        if method == Method::Loop {
            let calls = fake.count("calls:cuMemcpyDtoHAsync_v2") - calls;
            assert_eq!(calls, 4, "the two slots of one registration are joined, and nothing else");
        }
        drop((three, memories, stream, other, bench));
        fake.is_clean();
    }
}

/// What the tests are to find when they are run without kernels.
fn has_kernels() -> bool {
    !std::env::var("KVD_CUDA_WITHOUT").unwrap_or_default().contains("cuModule")
}

#[test]
fn the_length_of_pieces_says_how_they_are_copied() {
    let names = ["cuLaunchKernel", "cuMemcpyBatchAsync_v2", "cuMemcpyHtoDAsync_v2"];
    // Method, settings, pieces, bytes of each: launches, batches, calls.
    use Method::{Auto, Batch, Kernel, Loop};
    let table = [
        // Without MPS a kernel would be in the way of the engine's.
        (Auto, "", 16, 4096, [0, 1, 0]),
        (Auto, "", 2, 4096, [0, 1, 0]),
        (Auto, "", 1, 65536, [0, 0, 1]),
        (Auto, "", 4, 100_000, [0, 1, 0]),
        (Auto, "mps=1", 16, 4096, [1, 0, 0]),
        (Auto, "mps=1", 2, 4096, [0, 1, 0]),
        (Auto, "mps=1", 1, 65536, [0, 0, 1]),
        (Auto, "mps=1", 4, 100_000, [0, 1, 0]),
        (Auto, "host_addresses=0", 16, 4096, [1, 0, 0]),
        (Auto, "version=12070", 16, 4096, [1, 0, 0]),
        (Auto, "version=12070", 4, 100_000, [0, 0, 4]),
        (Auto, "version=12070;mps=1", 4, 100_000, [1, 0, 0]),
        (Auto, "version=12070", 2, 4096, [0, 0, 2]),
        (Kernel, "", 1, 16, [1, 0, 0]),
        (Kernel, "", 4, 200_000, [1, 0, 0]),
        (Kernel, "", 1000, 16, [2, 0, 0]),
        (Batch, "", 16, 4096, [0, 1, 0]),
        (Batch, "host_addresses=0", 16, 4096, [0, 0, 16]),
        (Batch, "version=12070", 4, 4096, [0, 0, 4]),
        (Loop, "", 16, 4096, [0, 0, 16]),
    ];
    if !has_kernels() {
        eprintln!("skipped: the driver has no kernels");
        return;
    }
    for (method, settings, count, bytes, wanted) in table {
        let Some((fake, driver)) = fake(settings) else { return };
        let mut bench = Bench::new(&driver, |config| config.method = method);
        let memory = bench.memory(1 << 20);
        let block = bench.arena.slab().take(1 << 20).unwrap();
        // Up, out of a block of a class of its own.
        let record = Record {
            key: BlockKey([1; 16]),
            checksum: Default::default(),
            bytes: 1 << 20,
            tag: BindingTag(1),
            priority: Importance::default(),
            expires_at: 0,
        };
        let held = block.seal(&record);
        let before = names.map(|name| fake.count(&format!("calls:{name}")));
        let steps = vec![scattered(count, bytes)];
        bench.submit(job(1, &[&memory], Hosts::From(vec![held]), steps));
        bench.only_end().result.unwrap();
        let after = names.map(|name| fake.count(&format!("calls:{name}")));
        let counted: [u64; 3] = std::array::from_fn(|at| after[at] - before[at]);
        let why = bench.copier.method_why();
        assert_eq!(counted, wanted, "{method:?} {settings} {count} of {bytes}: {why}");
        drop((bench, memory));
        fake.is_clean();
    }
    // On the device a kernel is soon done.
    for (settings, bytes, wanted) in [("", 4096, 1), ("", 100_000, 0), ("version=12070", 100_000, 1)] {
        let Some((fake, driver)) = fake(settings) else { return };
        let mut bench = Bench::new(&driver, |_| {});
        let memories = [bench.memory(1 << 20), bench.memory(1 << 20)];
        let launches = fake.count("calls:cuLaunchKernel");
        let steps = vec![scattered(8, bytes)];
        bench.submit(job(1, &[&memories[0]], Hosts::FromDevice(vec![memories[1].clone()]), steps));
        bench.only_end().result.unwrap();
        assert_eq!(fake.count("calls:cuLaunchKernel") - launches, wanted, "{settings} {bytes}");
        drop((bench, memories));
        fake.is_clean();
    }
}

#[test]
fn a_driver_without_kernels_says_why_and_copies() {
    let missing: &[&str] = &["cuLaunchKernel"];
    let table: [(&[&str], &str, Method, &str); 9] = [
        (missing, "", Method::Batch, "the driver lacks cuLaunchKernel"),
        (
            &["cuMemHostGetDevicePointer_v2"],
            "version=12070",
            Method::Loop,
            "CUDA 12.7, has no batched copies",
        ),
        (&[], "version=11070", Method::Loop, "cuModuleLoadData answers CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
        (&[], "reach_hosts=0", Method::Batch, "it does not reach host memory by itself"),
        (
            &[],
            "fail=cuModuleLoadData:1:218",
            Method::Batch,
            "cuModuleLoadData answers CUDA_ERROR_INVALID_PTX",
        ),
        (
            &[],
            "fail=cuModuleGetFunction:2:500",
            Method::Batch,
            "cuModuleGetFunction answers CUDA_ERROR_NOT_FOUND",
        ),
        (&[], "fail=cuLaunchKernel:1:701", Method::Batch, "cuLaunchKernel answers CUDA_ERROR_LAUNCH_OUT"),
        (&[], "fail=cuLaunchKernel:2:701", Method::Batch, "cuLaunchKernel answers CUDA_ERROR_LAUNCH_OUT"),
        (
            &[],
            "host_addresses=0;fail=cuMemHostGetDevicePointer_v2:1:801",
            Method::Batch,
            "cuMemHostGetDevicePointer answers CUDA_ERROR_NOT_SUPPORTED",
        ),
    ];
    if common::is_real() {
        eprintln!("skipped: a real driver does not fail on purpose");
        return;
    }
    for (missing, settings, method, why) in table {
        for asked in [Method::Auto, Method::Kernel] {
            let fake = Fake::without(missing, settings);
            fake.set(settings);
            let driver = fake.driver().unwrap();
            let mut bench = Bench::new(&driver, |config| config.method = asked);
            assert_eq!(bench.copier.method(), method, "{settings}");
            assert!(bench.copier.method_why().contains(why), "{settings}: {}", bench.copier.method_why());
            assert!(bench.copier.kernels().is_none());
            let memory = bench.memory(SLOT);
            let bytes = pattern(1, SLOT as usize);
            let held = bench.held(&bytes);
            bench.submit(job(1, &[&memory], Hosts::From(vec![held]), vec![scattered(16, PAGE)]));
            bench.only_end().result.unwrap();
            let slot = bench.slot();
            bench.submit(job(2, &[&memory], Hosts::To(vec![slot]), vec![scattered(16, PAGE)]));
            assert!(slots(bench.only_end())[0][..] == bytes[..], "{settings}");
            drop((bench, memory));
            fake.is_clean();
        }
    }
    // Lost is another thing.
    let Some((fake, driver)) = fake("fail=cuModuleLoadData:1:719") else { return };
    if has_kernels() {
        let device = driver.open(0).unwrap();
        assert!(lost(&Copier::new(&device, CopierConfig::default()).map(|_| ())));
        drop(device);
        assert_eq!((fake.count("contexts"), fake.count("violations")), (0, 0));
    }
}

#[test]
fn steps_wait_for_events_and_record_their_own() {
    let cuda = cuda();
    let mut bench = Bench::new(&cuda.driver, |_| {});
    cuda.set("hold=1");
    let memory = bench.memory(3 * PAGE);
    let event = || Arc::new(bench.device.event(false).unwrap());
    let (first, last) = (event(), event());
    // What the job waits for: bytes that come to its source on another stream.
    let stream = low(&bench.device);
    let (slow, copied) = (bench.memory(256 << 10), bench.memory(3 * PAGE));
    let bytes = pattern(5, 256 << 10);
    let mut written = stream
        .onboard(&slow, vec![filled(&bench.device, &bytes)], &common::whole(256 << 10))
        .map_err(|refused| refused.error)
        .unwrap();
    let ready = event();
    ready.record(&stream).unwrap();
    let page = |at: u64| vec![piece(0, at * PAGE, 0, at * PAGE, PAGE)];
    let steps = vec![
        Step { after: Some(ready), pieces: page(0), then: Some(Arc::clone(&first)) },
        step(page(1)),
        Step { after: None, pieces: page(2), then: Some(Arc::clone(&last)) },
    ];
    bench.submit(job(1, &[&memory], Hosts::FromDevice(vec![slow]), steps));
    // Nothing of it is queued before that.
    let mut watch = Watch::default();
    if cuda.fake.is_some() {
        let mut done = Vec::new();
        bench.copier.poll(&mut done);
        assert!(done.is_empty() && bench.copier.under_way() == (0, 0));
    }
    cuda.set("hold=0");
    // Who waits for the job: a copy of what it wrote.
    bench.watch(&mut watch, |watch| watch.known.get(&1).is_some_and(|(queued, _)| *queued));
    let second = bench.device.stream(Priority::High).unwrap();
    second.wait_for(&last).unwrap();
    let mut read_on = second.copy((&copied, 0), (&memory, 0), 3 * PAGE).unwrap();
    assert!(read_on.wait(LONG).unwrap().is_some());
    assert!(first.is_done().unwrap() && last.is_done().unwrap());
    assert!(read(&second, &copied) == bytes[..3 * PAGE as usize]);
    bench.watch(&mut watch, |watch| !watch.ended.is_empty());
    assert_eq!(watch.ended[&1].steps, 3);
    watch.ended[&1].result.clone().unwrap();
    written.wait(LONG).unwrap().unwrap();
    drop((watch, bench, first, last, stream, second, memory, copied, written, read_on));
    cuda.is_clean();
}

/// A worker that hangs never reaches its event: whoever waits for that waits alone, and can be cancelled.
#[test]
fn an_event_that_is_never_reached_holds_up_nobody() {
    let Some((fake, driver)) = fake("devices=2;hold=1:1") else { return };
    let mut bench = Bench::new(&driver, |config| {
        config.streams_each_way = 1;
        config.under_way_max = 1;
        config.waiting_max = 2;
    });
    let memory = bench.memory(SLOT);
    let bytes = pattern(4, SLOT as usize);
    write(&low(&bench.device), &memory, &bytes);
    let other = driver.open(1).unwrap();
    let (stream, busy) = (low(&other), other.allocate(PAGE).unwrap());
    let copying = stream.onboard(&busy, vec![filled(&other, &[1; 8])], &common::whole(8));
    let hung = Arc::new(other.event(false).unwrap());
    hung.record(&stream).unwrap();
    let after = |at: u64| Step { after: Some(Arc::clone(&hung)), ..step(vec![piece(0, at, 0, at, PAGE)]) };
    let page = |at: u64| step(vec![piece(0, at, 0, at, PAGE)]);
    let down = |bench: &Bench, token, steps| job(token, &[&memory], Hosts::To(vec![bench.slot()]), steps);

    // As many as may wait, urgent and not, and one more.
    for token in 0..3 {
        let mut job = down(&bench, token, vec![after(0), page(PAGE)]);
        job.urgent = token == 1;
        bench.submit(job);
    }
    let (refused, error) = bench.copier.submit(down(&bench, 3, vec![after(0)])).unwrap_err();
    assert_eq!(error, Error::Busy { device: 0, waiting: 3 });
    assert!(refused.steps[0].after.is_some());
    drop(refused);
    // The others go past them.
    let mut watch = Watch::default();
    for token in 4..8 {
        bench.submit(down(&bench, token, vec![page(0), page(PAGE)]));
        assert!(bench.copier.waiting() == 0 && bench.copier.under_way().0 == 1);
        bench.watch(&mut watch, |watch| watch.ended.contains_key(&token));
        drop(slots(watch.ended.remove(&token).unwrap()));
    }
    assert_eq!(bench.copier.under_way(), (0, 0));
    // One that is begun takes nobody's place either, and its own order stays.
    bench.copier.cancel(JobToken(0));
    bench.submit(down(&bench, 8, vec![page(0), after(PAGE), page(2 * PAGE)]));
    bench.watch(&mut watch, |watch| watch.known.get(&8).is_some_and(|(_, steps)| *steps == 1));
    assert_eq!(bench.copier.under_way(), (0, 0));
    bench.submit(down(&bench, 9, vec![page(0)]));
    bench.watch(&mut watch, |watch| watch.ended.contains_key(&9));
    assert!(!watch.known[&8].0, "the rest is not queued");
    bench.copier.cancel(JobToken(8));
    bench.watch(&mut watch, |watch| watch.ended.len() == 3);
    for (token, steps) in [(0, 0), (8, 1)] {
        let end = watch.ended.remove(&token).unwrap();
        assert_eq!((end.result, end.queued, end.steps), (Err(Error::Cancelled), false, steps));
        assert!(matches!(end.hosts, Some(Hosts::To(slots)) if slots.len() == 1));
    }
    drop(watch.ended.remove(&9));
    // Reached after all, both of the others go on.
    assert!(!bench.copier.is_idle() && watch.ended.is_empty());
    fake.set("hold=1:0");
    bench.watch(&mut watch, |watch| watch.ended.len() == 2);
    for token in [1, 2] {
        let end = watch.ended.remove(&token).unwrap();
        assert!(end.queued && end.steps == 2);
        assert!(slots(end)[0][..2 * PAGE as usize] == bytes[..2 * PAGE as usize]);
    }
    assert_eq!(fake.count("calls:cuStreamWaitEvent"), 0);
    drop((copying, bench, memory, hung, busy, stream, other));
    fake.is_clean();
}

#[test]
fn an_open_job_takes_steps_while_it_runs() {
    let cuda = cuda();
    let mut bench = Bench::new(&cuda.driver, |config| config.under_way_max = 1);
    let memory = bench.memory(SLOT);
    let bytes = pattern(2, SLOT as usize);
    write(&low(&bench.device), &memory, &bytes);
    let slot = bench.slot();
    let page = |at: u64| step(vec![piece(0, at * PAGE, 0, at * PAGE, PAGE)]);
    let mut open = job(7, &[&memory], Hosts::To(vec![slot]), vec![page(0)]);
    open.open = true;
    bench.submit(open);
    let mut watch = Watch::default();
    for at in 1..16 {
        // All that it has is done, and it has not ended.
        bench.watch(&mut watch, |watch| watch.known.get(&7).is_some_and(|(_, steps)| *steps == at));
        assert!(watch.ended.is_empty() && !bench.copier.is_idle());
        if at == 8 {
            let wrong = step(vec![piece(0, SLOT, 0, 0, 1)]);
            let error = bench.copier.add(JobToken(7), wrong, true).unwrap_err();
            assert!(matches!(error, Error::Range { .. }), "{error}");
        }
        bench.copier.add(JobToken(7), page(at as u64), false).unwrap();
    }
    // While it waits for more it takes nobody's place.
    bench.watch(&mut watch, |watch| watch.known.get(&7).is_some_and(|(_, steps)| *steps == 16));
    assert_eq!(bench.copier.under_way(), (0, 0));
    let other = bench.slot();
    bench.submit(job(8, &[&memory], Hosts::To(vec![other]), vec![page(3)]));
    bench.watch(&mut watch, |watch| watch.ended.contains_key(&8));
    assert!(watch.ended.remove(&8).unwrap().result.is_ok() && watch.ended.is_empty());
    // The last may be nothing but the last.
    bench.copier.add(JobToken(7), Step::default(), true).unwrap();
    let error = bench.copier.add(JobToken(7), page(0), true).unwrap_err();
    assert_eq!(error, Error::NoJob { token: 7 });
    bench.watch(&mut watch, |watch| !watch.ended.is_empty());
    let end = watch.ended.remove(&7).unwrap();
    assert_eq!(end.steps, 17);
    assert!(slots(end)[0][..] == bytes[..]);
    assert_eq!(bench.copier.add(JobToken(7), page(0), true).unwrap_err(), Error::NoJob { token: 7 });
    // Nothing to copy is a job too.
    bench.submit(job(7, &[], Hosts::From(vec![]), vec![]));
    let end = bench.only_end();
    assert!(end.result.is_ok() && end.steps == 0);
    drop((bench, memory));
    cuda.is_clean();
}

#[test]
fn a_job_that_is_cancelled_ends_with_what_it_was_given() {
    let Some((fake, driver)) = fake("") else { return };
    let mut bench = Bench::new(&driver, |config| {
        config.under_way_max = 1;
        config.method = Method::Loop;
    });
    let memory = bench.memory(SLOT);
    let bytes = pattern(3, SLOT as usize);
    write(&low(&bench.device), &memory, &bytes);
    let down = |bench: &Bench, token, steps| {
        let mut slot = bench.slot();
        slot.fill(0);
        job(token, &[&memory], Hosts::To(vec![slot]), steps)
    };
    let pages = || (0..4).map(|at| step(vec![piece(0, at * PAGE, 0, at * PAGE, PAGE)])).collect::<Vec<_>>();
    let first = down(&bench, 1, pages());
    fake.set("hold=1");
    bench.submit(first);
    let second = down(&bench, 2, pages());
    bench.submit(second);
    assert_eq!((bench.copier.under_way().0, bench.copier.waiting()), (1, 1));
    // One that waits never begins.
    let calls = fake.count("calls:cuMemcpyDtoHAsync_v2");
    bench.copier.cancel(JobToken(2));
    let end = bench.only_end();
    assert_eq!(end.result, Err(Error::Cancelled));
    assert!(!end.queued && end.steps == 0);
    assert!(matches!(end.hosts, Some(Hosts::To(slots)) if slots[0].iter().all(|byte| *byte == 0)));
    assert_eq!(fake.count("calls:cuMemcpyDtoHAsync_v2"), calls);
    // One that is queued as a whole ends as ever.
    bench.copier.cancel(JobToken(1));
    bench.copier.cancel(JobToken(1));
    bench.copier.cancel(JobToken(99));
    fake.set("hold=0");
    let end = bench.only_end();
    assert_eq!(end.steps, 4);
    drop(slots(end));
    // An open one ends when the device is done with what it has, and not before.
    let mut open = down(&bench, 3, pages());
    open.open = true;
    fake.set("hold=1");
    bench.submit(open);
    bench.copier.cancel(JobToken(3));
    assert_eq!(bench.copier.add(JobToken(3), Step::default(), true), Err(Error::NoJob { token: 3 }));
    let mut done = Vec::new();
    bench.copier.poll(&mut done);
    assert!(!done.iter().any(|done| matches!(done, CopyDone::Ended { .. })));
    fake.set("hold=0");
    let mut watch = Watch::default();
    done.into_iter().for_each(|done| watch.take(done));
    bench.watch(&mut watch, |watch| !watch.ended.is_empty());
    let end = watch.ended.remove(&3).unwrap();
    assert_eq!((end.result, end.steps), (Err(Error::Cancelled), 4));
    assert!(
        matches!(end.hosts, Some(Hosts::To(slots)) if slots[0][..4 * PAGE as usize] == bytes[..4 * PAGE as usize])
    );
    assert_eq!(bench.used(), (0, 0));
    drop((bench, memory));
    fake.is_clean();
}

#[test]
fn no_more_is_under_way_than_there_may_be() {
    for method in [Method::Loop, Method::Batch] {
        let Some((fake, driver)) = fake("delay_us=3000") else { return };
        let mut bench = Bench::new(&driver, |config| {
            config.under_way_max = 3;
            config.under_way_bytes_max = 10 * PAGE;
            config.waiting_max = 9;
            config.method = method;
        });
        let memory = bench.memory(SLOT);
        // One page, or four, or more than may be under way together.
        let pages = |token: u64| if token == 5 { 16 } else { 1 + token % 4 };
        for token in 0..12 {
            let slot = bench.slot();
            bench.submit(job(token, &[&memory], Hosts::To(vec![slot]), vec![whole(pages(token) * PAGE)]));
        }
        let slot = bench.slot();
        let (refused, error) =
            bench.copier.submit(job(12, &[&memory], Hosts::To(vec![slot]), vec![whole(PAGE)])).unwrap_err();
        assert_eq!(error, Error::Busy { device: 0, waiting: 9 });
        assert!(refused.token == JobToken(12) && refused.steps.len() == 1);
        assert!(matches!(&refused.hosts, Hosts::To(slots) if slots.len() == 1));
        drop(refused);
        let mut watch = Watch::default();
        while watch.ended.len() < 12 {
            let (jobs, bytes) = bench.copier.under_way();
            assert!(jobs <= 3 && (bytes <= 10 * PAGE || (jobs, bytes) == (1, 16 * PAGE)), "{jobs} {bytes}");
            // A piece a job: what the device has is no more than what the copier says it has.
            assert!(fake.count("under_way") <= jobs as u64);
            let ended = watch.ended.len();
            bench.watch(&mut watch, |watch| watch.ended.len() > ended);
        }
        assert!(watch.ended.values().all(|end| end.result.is_ok() && end.queued && end.steps == 1));
        drop((watch, bench, memory));
        fake.is_clean();
    }
}

#[test]
fn what_is_urgent_goes_past_what_waits() {
    let Some((fake, driver)) = fake("delay_us=10000") else { return };
    let mut bench = Bench::new(&driver, |config| config.under_way_max = 1);
    let memory = bench.memory(SLOT);
    for token in 0..4 {
        let slot = bench.slot();
        let mut job = job(token, &[&memory], Hosts::To(vec![slot]), vec![whole(PAGE)]);
        job.urgent = token == 3;
        bench.submit(job);
    }
    let mut watch = Watch::default();
    let mut order = Vec::new();
    while order.len() < 4 {
        bench.watch(&mut watch, |watch| !watch.ended.is_empty());
        order.extend(std::mem::take(&mut watch.ended).into_keys());
    }
    assert_eq!(order, [0, 3, 1, 2]);
    drop((watch, bench, memory));
    fake.is_clean();
}

/// More tables than there are, at once and in one step.
#[test]
fn launches_wait_for_tables() {
    let Some((fake, driver)) = fake("delay_us=20") else { return };
    let mut bench = Bench::new(&driver, |config| config.method = Method::Kernel);
    let memory = bench.memory(SLOT);
    let bytes = pattern(6, SLOT as usize);
    write(&low(&bench.device), &memory, &bytes);
    let slot = bench.slot();
    let page = |at: u64| step(vec![piece(0, at * 64, 0, at * 64, 64)]);
    bench.submit(job(1, &[&memory], Hosts::To(vec![slot]), (0..1024).map(page).collect()));
    let end = bench.only_end();
    assert!(end.queued && end.steps == 1024);
    assert!(slots(end)[0][..] == bytes[..]);
    // A byte each: as many entries as 128 tables have, and more, which the driver gets.
    fake.set("delay_us=0");
    for count in [30_001_u64, 130_003] {
        let (from, to) = (bench.memory(200_000), bench.memory(200_000));
        let bytes = pattern(7, 200_000);
        write(&low(&bench.device), &from, &bytes);
        let step = step((0..count).map(|at| piece(0, at, 0, at * 7 % count, 1)).collect());
        bench.submit(job(2, &[&to], Hosts::FromDevice(vec![from]), vec![step]));
        bench.only_end().result.unwrap();
        let copied = read(&low(&bench.device), &to);
        assert!((0..count).all(|at| copied[at as usize] == bytes[(at * 7 % count) as usize]), "{count}");
    }
    drop((bench, memory));
    fake.is_clean();
}

#[test]
fn what_cannot_be_is_refused_as_it_was() {
    let Some((fake, driver)) = fake("devices=2") else { return };
    let mut bench = Bench::new(&driver, |_| {});
    let memory = bench.memory(PAGE);
    let other = driver.open(1).unwrap();
    let (elsewhere, event) = (other.allocate(PAGE).unwrap(), Arc::new(other.event(false).unwrap()));
    let wrong = [
        piece(1, 0, 0, 0, 1),
        piece(u32::MAX, 0, 0, 0, 1),
        piece(0, 0, 1, 0, 1),
        piece(0, 1, 0, 0, PAGE),
        piece(0, u64::MAX, 0, 0, 1),
        piece(0, 0, 0, SLOT, 1),
        piece(0, 0, 0, u64::MAX, 1),
        piece(0, 0, 0, 0, u64::MAX),
    ];
    for wrong in wrong {
        let slot = bench.slot();
        let steps = vec![whole(PAGE), step(vec![piece(0, 0, 0, 0, 1), wrong])];
        let (job, error) = bench.copier.submit(job(1, &[&memory], Hosts::To(vec![slot]), steps)).unwrap_err();
        assert!(matches!(error, Error::Range { .. }), "{wrong:?}: {error}");
        assert!(job.steps[1].pieces[1] == wrong && job.memories.len() == 1);
    }
    let refused = |bench: &mut Bench, job| bench.copier.submit(job).unwrap_err().1;
    let error = refused(&mut bench, job(1, &[&elsewhere], Hosts::From(vec![]), vec![]));
    assert!(matches!(error, Error::OtherDevice { device: 0, .. }), "{error}");
    let then = Step { after: None, pieces: vec![], then: Some(Arc::clone(&event)) };
    let error = refused(&mut bench, job(1, &[&memory], Hosts::From(vec![]), vec![then]));
    assert!(matches!(error, Error::OtherDevice { device: 0, .. }), "{error}");
    let unregistered =
        ShardMemory::anonymous(Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: 8 });
    let slot = unregistered.unwrap().slab().take(4096).unwrap();
    let registered = bench.slot();
    let error = refused(&mut bench, job(1, &[&memory], Hosts::To(vec![registered, slot]), vec![]));
    assert_eq!(error, Error::NotRegistered { device: 0, host: 1 });
    // A name is taken until its job has ended.
    let mut open = job(1, &[&memory], Hosts::From(vec![]), vec![]);
    open.open = true;
    bench.submit(open);
    assert_eq!(refused(&mut bench, job(1, &[], Hosts::From(vec![]), vec![])), Error::JobTwice { token: 1 });
    bench.copier.cancel(JobToken(1));
    assert_eq!(bench.only_end().result, Err(Error::Cancelled));
    assert_eq!(bench.used(), (0, 0));
    // To wait for another device's event is no more than to wait, and its memory can be the other side.
    event.record(&low(&other)).unwrap();
    let after = Step { after: Some(event), pieces: vec![piece(0, 0, 0, 0, PAGE)], then: None };
    let bytes = pattern(8, PAGE as usize);
    write(&low(&other), &elsewhere, &bytes);
    bench.submit(job(1, &[&memory], Hosts::FromDevice(vec![elsewhere]), vec![after]));
    bench.only_end().result.unwrap();
    assert!(read(&low(&bench.device), &memory) == bytes);
    drop((bench, memory, other));
    fake.is_clean();
}

/// Each call that a job makes fails once: it ends with the error and what it was given, the others as ever.
#[test]
fn a_call_that_fails_ends_its_job_and_no_other() {
    let kernel = if has_kernels() { "cuLaunchKernel" } else { "cuMemcpyBatchAsync_v2" };
    let calls = [
        (Method::Kernel, kernel, 1),
        (Method::Batch, "cuMemcpyBatchAsync_v2", 2),
        (Method::Loop, "cuMemcpyDtoHAsync_v2", 3),
        (Method::Loop, "cuMemcpyDtoHAsync_v2", 1),
        (Method::Auto, "cuEventCreate", 1),
        (Method::Auto, "cuEventRecord", 1),
        (Method::Auto, "cuEventRecord", 2),
        (Method::Auto, "cuEventRecord", 3),
        (Method::Auto, "cuEventQuery", 1),
        (Method::Auto, "cuCtxPushCurrent_v2", 3),
    ];
    for (method, call, nth) in calls {
        let Some((fake, driver)) = fake("delay_us=2000") else { return };
        let mut bench = Bench::new(&driver, |config| config.method = method);
        let memory = bench.memory(SLOT);
        let bytes = pattern(9, SLOT as usize);
        write(&low(&bench.device), &memory, &bytes);
        let (after, then) =
            (Arc::new(bench.device.event(false).unwrap()), Arc::new(bench.device.event(false).unwrap()));
        let with_events =
            |step: Step| Step { after: Some(Arc::clone(&after)), then: Some(Arc::clone(&then)), ..step };
        let steps = || vec![with_events(scattered(8, PAGE)), with_events(scattered(16, PAGE))];
        let down = |bench: &Bench, token| job(token, &[&memory], Hosts::To(vec![bench.slot()]), steps());
        let first = down(&bench, 1);
        // Its first step leaves an event to use again, but none before that.
        fake.set(&format!("fail={call}:{nth}:801"));
        bench.submit(first);
        let second = down(&bench, 2);
        bench.submit(second);
        let mut ended = bench.ends(2);
        let first = ended.remove(&1).unwrap();
        let Err(Error::Cuda { source, .. }) = first.result else { panic!("{call}: {:?}", first.result) };
        assert_eq!((source.code, first.queued), (801, false), "{call}");
        assert!(first.steps < 2 || call == "cuEventRecord", "{call}");
        assert!(matches!(first.hosts, Some(Hosts::To(slots)) if slots.len() == 1), "{call}: it comes back");
        let second = slots(ended.remove(&2).unwrap());
        let pages = bytes.chunks(PAGE as usize).rev().zip(second[0].chunks(PAGE as usize));
        assert!(pages.into_iter().all(|(from, to)| from == to), "{call}");
        drop(second);
        assert_eq!((bench.used(), bench.copier.under_way(), bench.device.kept()), ((0, 0), (0, 0), 0));
        drop((bench, memory, after, then));
        fake.is_clean();
    }
    // A question that fails changes nothing.
    let Some((fake, driver)) = fake("delay_us=2000") else { return };
    let mut bench = Bench::new(&driver, |_| {});
    let memory = bench.memory(PAGE);
    let slot = bench.slot();
    bench.submit(job(1, &[&memory], Hosts::To(vec![slot]), vec![whole(PAGE)]));
    fake.set("fail=cuEventQuery:1:999");
    bench.only_end().result.unwrap();
    drop((bench, memory));
    fake.is_clean();
}

/// What a lost device was using is nobody's until its context is gone; what it had not begun comes back.
#[test]
fn a_device_lost_in_mid_copy_keeps_the_memory_and_ends_every_job_once() {
    for method in METHODS {
        let Some((fake, driver)) = fake("") else { return };
        let mut bench = Bench::new(&driver, |config| {
            config.under_way_max = 2;
            config.method = method;
        });
        let memory = bench.memory(SLOT);
        fake.set("hold=1");
        for token in 0..4 {
            let slot = bench.slot();
            let mut job = job(token, &[&memory], Hosts::To(vec![slot]), vec![scattered(16, PAGE); 3]);
            job.open = token == 1;
            bench.submit(job);
        }
        let block = bench.held(&pattern(1, 100));
        bench.submit(job(4, &[&memory], Hosts::From(vec![block]), vec![whole(100)]));
        let mut done = Vec::new();
        bench.copier.poll(&mut done);
        fake.set("lose=0:719");
        let mut watch = Watch::default();
        done.into_iter().for_each(|done| watch.take(done));
        bench.watch(&mut watch, |watch| watch.ended.len() == 5);
        for (token, end) in &watch.ended {
            assert!(lost(&end.result), "{method:?} {token}: {:?}", end.result);
            assert_eq!(end.hosts.is_none(), *token < 2, "{method:?} {token}");
        }
        assert_eq!(bench.used(), (5, 1), "{method:?}");
        watch.ended.clear();
        assert_eq!(bench.used(), (3, 0), "{method:?}: two slots are kept, and a block that nobody holds");
        assert!(bench.copier.is_idle() && bench.copier.under_way() == (0, 0));
        let slot = bench.slot();
        let refused = bench.copier.submit(job(9, &[&memory], Hosts::To(vec![slot]), vec![])).unwrap_err();
        assert!(lost(&Err::<(), _>(refused.1)));
        bench.copier.poll(&mut Vec::new());
        drop(refused.0);
        let Bench { copier, arena, region, device } = bench;
        drop((copier, region, memory, device));
        assert_eq!(arena.slab().regions().iter().map(|region| region.used).sum::<u32>(), 1, "{method:?}");
        for what in ["contexts", "streams", "allocations", "bytes", "violations"] {
            assert_eq!(fake.count(what), 0, "{method:?} {what}");
        }
    }
}

#[test]
fn a_launch_that_fails_on_the_way_loses_the_device() {
    if !has_kernels() {
        eprintln!("skipped: the driver has no kernels");
        return;
    }
    let Some((fake, driver)) = fake("") else { return };
    let mut bench = Bench::new(&driver, |config| config.method = Method::Kernel);
    let memory = bench.memory(SLOT);
    fake.set("fail_launch=2:700");
    let mut taken = 0;
    for token in 0..3 {
        let slot = bench.slot();
        // It may be lost before the last is submitted.
        let steps = vec![scattered(16, PAGE)];
        match bench.copier.submit(job(token, &[&memory], Hosts::To(vec![slot]), steps)) {
            Ok(()) => taken += 1,
            Err((_, error)) => assert!(lost(&Err::<(), _>(error))),
        }
    }
    let ended = bench.ends(taken);
    assert!(ended.values().any(|end| lost(&end.result)));
    assert!(ended.values().all(|end| end.result.is_ok() == (end.hosts.is_some() && end.steps == 1)));
    assert_eq!(bench.device.lost().unwrap().name, "CUDA_ERROR_ILLEGAL_ADDRESS");
    drop((bench, memory, ended));
    assert_eq!((fake.count("contexts"), fake.count("violations")), (0, 0));
}

/// Lost between any two calls: never a panic, never memory given up under a copy, and each job ends once.
#[test]
fn a_device_may_be_lost_at_any_call() {
    let calls = [
        "cuCtxPushCurrent_v2",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventQuery",
        "cuMemcpyBatchAsync_v2",
        "cuLaunchKernel",
    ];
    for (call, method) in calls.into_iter().flat_map(|call| [(call, Method::Kernel), (call, Method::Batch)]) {
        for nth in 1..5 {
            let Some((fake, driver)) = fake("delay_us=300") else { return };
            let mut bench = Bench::new(&driver, |config| {
                config.method = method;
                config.under_way_max = 2;
            });
            let memory = bench.memory(SLOT);
            let after = Some(Arc::new(bench.device.event(false).unwrap()));
            fake.set(&format!("fail={call}:{nth}:700"));
            let mut taken = 0;
            for token in 0..3 {
                let slot = bench.slot();
                let steps = vec![Step { after: after.clone(), ..scattered(8, PAGE) }; 2];
                match bench.copier.submit(job(token, &[&memory], Hosts::To(vec![slot]), steps)) {
                    Ok(()) => taken += 1,
                    Err((_, error)) => assert!(lost(&Err::<(), _>(error))),
                }
            }
            let ended = bench.ends(taken);
            assert!(ended.values().all(|end| end.result.is_ok() || lost(&end.result)), "{call} {nth}");
            assert!(ended.values().all(|end| end.result.is_err() || end.hosts.is_some()), "{call} {nth}");
            drop((ended, memory, after, bench));
            for what in ["contexts", "streams", "allocations", "violations"] {
                assert_eq!(fake.count(what), 0, "{call} {nth} {what}");
            }
        }
    }
}

#[test]
fn a_copier_that_is_dropped_waits_for_the_device() {
    let Some((fake, driver)) = fake("") else { return };
    let mut bench = Bench::new(&driver, |config| config.under_way_max = 3);
    let memory = bench.memory(SLOT);
    fake.set("delay_us=1000;hold=1");
    for token in 0..5 {
        let slot = bench.slot();
        let mut job = job(token, &[&memory], Hosts::To(vec![slot]), vec![scattered(4, PAGE); 2]);
        job.open = token == 2;
        bench.submit(job);
    }
    drop(memory);
    assert!(fake.count("under_way") > 0 && fake.count("allocations") == 1);
    let Bench { copier, arena, region, device } = bench;
    fake.set("hold=0");
    drop(copier);
    assert_eq!((fake.count("under_way"), fake.count("allocations")), (0, 0));
    assert_eq!(arena.slab().regions().iter().map(|region| region.used).sum::<u32>(), 0);
    drop((region, device));
    fake.is_clean();
}

/// Neither lost nor done, for as long as anybody waits: what it may still use is never used again.
#[test]
fn a_device_that_never_answers_keeps_the_memory_for_ever() {
    let silent = || {
        let Some((fake, driver)) = fake("") else { return };
        let mut bench = Bench::new(&driver, |config| config.method = Method::Kernel);
        let memory = bench.memory(SLOT);
        fake.set("hold=1;fail=cuEventQuery:0:999");
        for token in 0..2 {
            let slot = bench.slot();
            bench.submit(job(token, &[&memory], Hosts::To(vec![slot]), vec![scattered(16, PAGE)]));
        }
        for (_, end) in bench.ends(2) {
            assert!(matches!(end.result, Err(Error::Cuda { .. })) && end.hosts.is_none(), "{:?}", end.result);
        }
        assert_eq!((bench.used(), bench.copier.under_way()), ((2, 0), (0, 0)));
        // It is told from a device that is lost: this one may come to itself again, and to what it had.
        assert!(bench.device.lost().is_none() && fake.count("under_way") > 0);
        fake.set("hold=0;fail=cuEventQuery:1:999");
        let slot = bench.slot();
        bench.submit(job(0, &[&memory], Hosts::To(vec![slot]), vec![scattered(16, PAGE)]));
        drop(slots(bench.only_end()));
        let Bench { copier, arena, region, device } = bench;
        drop((copier, region, memory, device));
        assert_eq!(arena.slab().regions().iter().map(|region| region.used).sum::<u32>(), 2);
        assert_eq!((fake.count("contexts"), fake.count("allocations"), fake.count("violations")), (1, 1, 0));
    };
    let dropped = || {
        let Some((fake, driver)) = fake("") else { return };
        let mut bench = Bench::new(&driver, |_| {});
        let memory = bench.memory(SLOT);
        fake.set("hold=1");
        let slot = bench.slot();
        bench.submit(job(0, &[&memory], Hosts::To(vec![slot]), vec![scattered(16, PAGE)]));
        let Bench { copier, arena, region, device } = bench;
        drop((copier, region, memory, device));
        assert_eq!(arena.slab().regions().iter().map(|region| region.used).sum::<u32>(), 1);
        assert_eq!((fake.count("contexts"), fake.count("allocations"), fake.count("violations")), (1, 1, 0));
    };
    // One that answers nothing else either is lost, whatever it says.
    let broken = || {
        let Some((fake, driver)) = fake("") else { return };
        let mut bench = Bench::new(&driver, |_| {});
        let memory = bench.memory(SLOT);
        fake.set("hold=1;fail=cuEventQuery:0:999;fail=cuMemGetInfo_v2:0:999");
        let slot = bench.slot();
        bench.submit(job(0, &[&memory], Hosts::To(vec![slot]), vec![scattered(16, PAGE)]));
        let end = bench.only_end();
        assert!(lost(&end.result) && end.hosts.is_none(), "{:?}", end.result);
        assert_eq!((bench.device.lost().unwrap().code, bench.device.kept()), (999, 1));
        drop((bench, memory));
        assert_eq!((fake.count("contexts"), fake.count("violations")), (0, 0));
    };
    std::thread::scope(|scope| {
        scope.spawn(silent);
        scope.spawn(broken);
        scope.spawn(dropped);
    });
}

/// Jobs of all kinds by chance, cancelled and added to by chance: each ends once, and everything comes back.
#[test]
fn whatever_is_asked_for_every_slot_and_hold_comes_back() {
    for seed in 0..6 {
        let Some((fake, driver)) = fake("delay_us=30") else { return };
        let mut below = dice(100 + seed);
        let mut bench = Bench::new(&driver, |config| {
            config.under_way_max = 1 + below(6);
            config.under_way_bytes_max = (1 + below(40) as u64) * PAGE;
            config.waiting_max = below(12);
            config.method = METHODS[below(4)];
        });
        let memories = [bench.memory(SLOT), bench.memory(SLOT)];
        let blocks: Vec<_> = (0..3).map(|at| bench.held(&pattern(at, SLOT as usize))).collect();
        let events: Vec<_> = (0..3).map(|_| Arc::new(bench.device.event(false).unwrap())).collect();
        let (mut watch, mut done) = (Watch::default(), Vec::new());
        let (mut taken, mut open) = (0, Vec::new());
        for _ in 0..200 {
            let mut any_step = |_| {
                let (after, then) = (events.get(below(6)).cloned(), events.get(below(6)).cloned());
                let count = [0, 1, 3, 20][below(4)];
                let page = |_| {
                    let [from, to, bytes] =
                        [below(30_000), below(30_000), 1 + below(5000)].map(|it| it as u64);
                    piece(below(2) as u32, from, below(2) as u32, to, bytes)
                };
                Step { after, pieces: (0..count).map(page).collect(), then }
            };
            let steps: Vec<_> = (0..taken % 4).map(&mut any_step).collect();
            match below(6) {
                0..3 => {
                    let hosts = match below(4) {
                        0 => Hosts::From(blocks[..2].to_vec()),
                        1 => Hosts::FromDevice(vec![memories[0].clone(), memories[1].clone()]),
                        2 => Hosts::ToDevice(vec![memories[1].clone(), memories[0].clone()]),
                        _ => Hosts::To(vec![bench.slot(), bench.slot()]),
                    };
                    let mut job = job(taken as u64, &[&memories[0], &memories[1]], hosts, steps);
                    (job.open, job.urgent) = (below(3) == 0, below(4) == 0);
                    let is_open = job.open;
                    match bench.copier.submit(job) {
                        Ok(()) => {
                            open.extend(is_open.then_some(taken as u64));
                            taken += 1;
                        }
                        Err((job, Error::Busy { .. })) => drop(job),
                        Err((_, error)) => panic!("{error}"),
                    }
                }
                3 if !open.is_empty() => {
                    let (at, last) = (below(open.len()), below(3) == 0);
                    let token = if last { open.swap_remove(at) } else { open[at] };
                    let step = steps.into_iter().next().unwrap_or_default();
                    bench.copier.add(JobToken(token), step, last).unwrap();
                }
                4 if taken > 0 && below(3) == 0 => {
                    let token = below(taken) as u64;
                    open.retain(|open| *open != token);
                    bench.copier.cancel(JobToken(token));
                }
                _ => {
                    bench.copier.poll(&mut done);
                    done.drain(..).for_each(|done| watch.take(done));
                    // What has ended is let go of as it comes.
                    watch.ended.values_mut().for_each(|end| drop(end.hosts.take()));
                }
            }
        }
        open.drain(..).for_each(|token| bench.copier.cancel(JobToken(token)));
        bench.watch(&mut watch, |watch| watch.ended.len() == taken);
        assert!(
            watch.ended.values().all(|end| matches!(end.result, Ok(()) | Err(Error::Cancelled))),
            "seed {seed}"
        );
        assert!(bench.copier.is_idle() && bench.copier.under_way() == (0, 0) && bench.copier.waiting() == 0);
        drop((watch, done, blocks, events));
        assert_eq!(bench.used(), (3, 0), "seed {seed}: the three blocks, which nobody holds");
        drop((bench, memories));
        fake.is_clean();
    }
}
