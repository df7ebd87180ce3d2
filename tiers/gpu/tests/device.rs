//! Copies, what owns the memory meanwhile, and what is left when something fails.

mod common;

use std::time::Duration;

use common::{LONG, cuda, down, fake, filled, low, pattern, read, up, whole, write};
use kv_arena::{Geometry, ShardMemory};
use kv_block::{BindingTag, BlockKey, Priority as Importance, Record};
use kv_gpu::{Copying, Error, HostBuffer, PageCopy, Priority};

const PAGE: usize = 4096;

fn arena() -> ShardMemory {
    ShardMemory::anonymous(Geometry { regions: 2, region_bytes: 2 << 20, table_entries_max: 64 }).unwrap()
}

/// Pages in an order that joins few of them: of `count`, page `at * step` goes to place `at`.
fn shuffled(count: usize, step: usize) -> Vec<PageCopy> {
    let page = |at: usize| PageCopy {
        host: 0,
        host_offset: (at * step % count * PAGE) as u64,
        device_offset: (at * PAGE) as u64,
        bytes: PAGE as u64,
    };
    (0..count).map(page).collect()
}

#[test]
fn pages_go_up_and_down_to_where_they_belong() {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let stream = low(&device);
    let memory = device.allocate(64 * PAGE as u64).unwrap();
    let bytes = pattern(1, 64 * PAGE);
    let pages = shuffled(64, 27);
    let mut hosts = up(&stream, &memory, vec![filled(&device, &bytes)], &pages);
    let on_device = read(&stream, &memory);
    for page in &pages {
        let (here, there) = (page.host_offset as usize, page.device_offset as usize);
        assert!(on_device[there..there + PAGE] == bytes[here..here + PAGE]);
    }
    hosts[0].fill(0);
    assert!(down(&stream, &memory, hosts, &pages)[0][..] == bytes[..]);
    // Nothing is a copy too.
    assert!(up(&stream, &memory, vec![filled(&device, &bytes)], &[])[0][..] == bytes[..]);
    assert!(read(&stream, &memory) == on_device);
    drop((memory, stream, device));
    cuda.is_clean();
}

/// Every byte against a model: many hosts, pages of all sizes, several times the same place.
#[test]
fn whatever_is_copied_is_what_a_model_has() {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let stream = device.stream(Priority::High).unwrap();
    const BYTES: usize = 40_000;
    let memory = device.allocate(BYTES as u64).unwrap();
    write(&stream, &memory, &pattern(0, BYTES));
    let mut model = pattern(0, BYTES);
    let mut chance = pattern(7, 200_000).into_iter();
    let mut below =
        |limit: usize| chance.by_ref().take(4).fold(0, |sum, byte| sum << 8 | usize::from(byte)) % limit;
    for round in 0..40 {
        let mut models: Vec<_> =
            (0..1 + below(4)).map(|host| pattern(round * 8 + host as u64, 1 + below(20_000))).collect();
        let hosts: Vec<_> = models.iter().map(|bytes| filled(&device, bytes)).collect();
        let goes_up = below(2) == 0;
        // One place is written once in a copy: the order within it is the device's.
        let mut from = 0;
        let mut pages = Vec::new();
        while from < BYTES.min(models.iter().map(Vec::len).min().unwrap()) {
            let host = below(models.len());
            let left = BYTES.min(models[host].len()) - from;
            let bytes = 1 + below(left.min(3000));
            let elsewhere =
                if goes_up { below(models[host].len() - bytes + 1) } else { below(BYTES - bytes + 1) };
            let (host_offset, device_offset) = if goes_up { (elsewhere, from) } else { (from, elsewhere) };
            let (at_host, at_device) =
                (host_offset..host_offset + bytes, device_offset..device_offset + bytes);
            match goes_up {
                true => model[at_device].copy_from_slice(&models[host][at_host]),
                false => models[host][at_host].copy_from_slice(&model[at_device]),
            }
            let [host_offset, device_offset, bytes] = [host_offset, device_offset, bytes].map(|it| it as u64);
            pages.push(PageCopy { host, host_offset, device_offset, bytes });
            from += bytes as usize;
        }
        let hosts =
            if goes_up { up(&stream, &memory, hosts, &pages) } else { down(&stream, &memory, hosts, &pages) };
        assert!(hosts.iter().zip(&models).all(|(host, model)| host[..] == model[..]), "round {round}");
        assert!(read(&stream, &memory) == model, "round {round}");
    }
    drop((memory, stream, device));
    cuda.is_clean();
}

#[test]
fn blocks_go_between_the_arena_and_a_device() {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let (stream, memory) = (low(&device), device.allocate(2 * PAGE as u64).unwrap());
    let arena = arena();
    let slab = arena.slab();
    let region = device.register(slab, 0, slab.data_bytes()).unwrap();
    assert_eq!(region.bytes() as u64, slab.data_bytes());

    let bytes = pattern(3, 2 * PAGE);
    write(&stream, &memory, &bytes);
    let slots = vec![slab.take(PAGE as u32).unwrap(), slab.take(PAGE as u32).unwrap()];
    let page = |host: usize| PageCopy {
        host,
        host_offset: 0,
        device_offset: (host * PAGE) as u64,
        bytes: PAGE as u64,
    };
    let slots = down(&stream, &memory, slots, &[page(0), page(1)]);
    let seal = |(at, slot): (usize, kv_arena::Slot)| {
        let key = BlockKey([at as u8 + 1; 16]);
        let checksum = kv_block::Checksum::of(&key, &slot);
        let (tag, priority) = (BindingTag(1), Importance::default());
        slot.seal(&Record { key, checksum, bytes: PAGE as u32, tag, priority, expires_at: 0 })
    };
    let held: Vec<_> = slots.into_iter().enumerate().map(seal).collect();
    assert!(held[0][..] == bytes[..PAGE] && held[1][..] == bytes[PAGE..]);

    write(&stream, &memory, &vec![0; 2 * PAGE]);
    up(&stream, &memory, held, &[page(1), page(0)]);
    assert!(read(&stream, &memory) == bytes);

    // Once in a process: it is the same again.
    let again = device.register(slab, PAGE as u64, PAGE as u64).unwrap();
    assert_eq!(again.bytes(), PAGE);
    drop(region);
    assert!(device.register(slab, 0, slab.data_bytes()).is_ok());
    drop(again);
    let half = device.register(slab, 0, slab.data_bytes() / 2).unwrap();
    let error = device.register(slab, 0, slab.data_bytes()).map(drop).unwrap_err();
    assert!(matches!(error, Error::Cuda { call: "cuMemHostRegister", .. }), "half of it is: {error}");
    drop(half);
    let slot = slab.take(PAGE as u32).unwrap();
    let refused = stream.offload(&memory, vec![slot], &[page(0)]).err().unwrap();
    assert_eq!(refused.error, Error::NotRegistered { device: 0, host: 0 });
    assert_eq!(refused.hosts.unwrap().len(), 1);
    drop((memory, stream, device));
    cuda.is_clean();
}

#[test]
fn what_lies_outside_is_refused_and_given_back() {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let (stream, memory) = (low(&device), device.allocate(PAGE as u64).unwrap());
    let page = PageCopy { host: 0, host_offset: 0, device_offset: 0, bytes: PAGE as u64 };
    let wrong = [
        PageCopy { host: 1, ..page },
        PageCopy { host_offset: 1, ..page },
        PageCopy { host_offset: u64::MAX, ..page },
        PageCopy { device_offset: 1, ..page },
        PageCopy { device_offset: u64::MAX, ..page },
        PageCopy { bytes: u64::MAX, ..page },
    ];
    for wrong in wrong {
        let refused =
            stream.onboard(&memory, vec![filled(&device, &[7; PAGE])], &[page, wrong]).err().unwrap();
        assert!(matches!(refused.error, Error::Range { .. }), "{wrong:?}: {}", refused.error);
        assert!(refused.hosts.unwrap()[0][..] == [7; PAGE]);
    }
    let arena = arena();
    let beyond = arena.slab().data_bytes() + 1;
    assert!(matches!(device.register(arena.slab(), 0, beyond), Err(Error::Range { .. })));
    assert!(matches!(stream.copy((&memory, 1), (&memory, 0), PAGE as u64), Err(Error::Range { .. })));
    drop((memory, stream, device));
    cuda.is_clean();
}

#[test]
fn memory_comes_back_when_the_device_is_done_and_not_before() {
    let Some((fake, driver)) = fake("delay_us=100000") else { return };
    let device = driver.open(0).unwrap();
    let (stream, memory) = (low(&device), device.allocate(256 << 10).unwrap());
    let bytes = pattern(4, 256 << 10);
    let mut copying = stream
        .onboard(&memory, vec![filled(&device, &bytes)], &whole(256 << 10))
        .unwrap_or_else(|_| panic!());
    assert!(copying.poll().unwrap().is_none());
    assert!(copying.wait(Duration::from_millis(1)).unwrap().is_none());
    assert!(!stream.is_idle().unwrap());
    // Nobody but the copy has them now.
    drop((memory, stream));
    assert_eq!((fake.count("allocations"), fake.count("streams")), (1, 1));
    assert!(copying.wait(LONG).unwrap().unwrap()[0][..] == bytes[..]);
    assert!(copying.poll().unwrap().is_none(), "it comes once");
    assert_eq!(fake.count("allocations"), 0);

    // Let go of, it does not wait: what is under way is kept, and what is done is not.
    fake.set("hold=1");
    let (stream, memory) = (low(&device), device.allocate(4096).unwrap());
    let start = || {
        stream.onboard(&memory, vec![filled(&device, &[5; 4096])], &whole(4096)).unwrap_or_else(|_| panic!())
    };
    let [done, forgotten] = [start(), start()];
    forgotten.forget();
    assert!(fake.count("under_way") == 2 && device.lost().is_none());
    fake.set("hold=0");
    assert!(stream.wait(LONG).unwrap());
    assert_eq!(fake.count("registered"), 2);
    done.forget();
    assert_eq!(fake.count("registered"), 1);
    drop((memory, stream));
    assert_eq!((fake.count("allocations"), fake.count("streams")), (1, 1), "they are the forgotten one's");

    // Dropped half way, it waits.
    let (stream, memory) = (low(&device), device.allocate(256 << 10).unwrap());
    let copying = stream
        .onboard(&memory, vec![filled(&device, &bytes)], &whole(256 << 10))
        .unwrap_or_else(|_| panic!());
    drop((memory, stream, device));
    drop(copying);
    fake.is_clean_but_for(&["contexts", "streams", "allocations", "bytes", "registered", "events"]);
    assert_eq!((fake.count("contexts"), fake.count("allocations"), fake.count("registered")), (1, 1, 1));
}

/// Threads with streams of their own, copies waited for, asked about and dropped, on one device: whatever the order, no
/// byte is another's and no memory is given up under a copy.
#[test]
fn many_threads_copy_at_once() {
    let cuda = cuda();
    cuda.set("delay_us=100");
    let device = cuda.driver.open(0).unwrap();
    let work = |thread: u64| {
        let device = device.clone();
        move || {
            for round in 0..30_u64 {
                let bytes = pattern(thread * 100 + round, 32 * PAGE);
                let stream =
                    device.stream(if round % 2 == 0 { Priority::Low } else { Priority::High }).unwrap();
                let memory = device.allocate(32 * PAGE as u64).unwrap();
                let up = stream.onboard(&memory, vec![filled(&device, &bytes)], &shuffled(32, 11));
                let down =
                    stream.offload(&memory, vec![device.host_buffer(32 * PAGE).unwrap()], &shuffled(32, 11));
                let (mut up, mut down) = (up.unwrap_or_else(|_| panic!()), down.unwrap_or_else(|_| panic!()));
                drop((memory, stream));
                match round % 3 {
                    0 => drop((up, down)),
                    1 => drop(up.poll().unwrap()),
                    _ => assert!(down.wait(LONG).unwrap().unwrap()[0][..] == bytes[..]),
                }
            }
        }
    };
    let threads: Vec<_> = (0..4).map(|thread| std::thread::spawn(work(thread))).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    drop(device);
    cuda.is_clean();
}

#[test]
fn one_stream_waits_for_another_s_event() {
    let cuda = cuda();
    cuda.set("delay_us=10000");
    let device = cuda.driver.open(0).unwrap();
    let (first, second) = (low(&device), device.stream(Priority::High).unwrap());
    let (from, to) = (device.allocate(128 << 10).unwrap(), device.allocate(128 << 10).unwrap());
    let bytes = pattern(5, 128 << 10);
    let event = device.event(false).unwrap();
    assert!(event.is_done().unwrap(), "never recorded");
    let mut written =
        first.onboard(&from, vec![filled(&device, &bytes)], &whole(128 << 10)).unwrap_or_else(|_| panic!());
    event.record(&first).unwrap();
    second.wait_for(&event).unwrap();
    let mut copied = second.copy((&to, 0), (&from, 0), 128 << 10).unwrap();
    assert!(copied.wait(LONG).unwrap().is_some());
    assert!(event.wait(Duration::ZERO).unwrap());
    assert!(written.poll().unwrap().is_some());
    assert!(read(&second, &to) == bytes);
    drop((written, copied, event, first, second, from, to, device));
    cuda.is_clean();
}

#[test]
fn two_devices_share_registered_memory_and_reach_each_other() {
    let Some((fake, driver)) = fake("devices=2") else { return };
    let (first, second) = (driver.open(0).unwrap(), driver.open(1).unwrap());
    assert!(first.can_reach(&second).unwrap() && !first.can_reach(&first).unwrap());
    first.reach(&second).unwrap();
    let (on_first, on_second) = (first.allocate(PAGE as u64).unwrap(), second.allocate(PAGE as u64).unwrap());
    let streams = (low(&first), low(&second));
    let bytes = pattern(6, PAGE);
    // Registered through the first, used by the second.
    up(&streams.1, &on_second, vec![filled(&first, &bytes)], &whole(PAGE));
    streams.0.copy((&on_first, 0), (&on_second, 0), PAGE as u64).unwrap().wait(LONG).unwrap().unwrap();
    assert!(read(&streams.0, &on_first) == bytes);
    // A stream copies to and from its own device.
    let refused = streams.0.onboard(&on_second, vec![filled(&first, &bytes)], &whole(PAGE)).err().unwrap();
    assert!(matches!(refused.error, Error::OtherDevice { device: 0, .. }), "{}", refused.error);

    // A buffer outlives the device that registered it, as memory and no more.
    let buffer = filled(&first, &bytes);
    drop((refused, on_first, streams.0, first));
    assert_eq!((fake.count("registered"), fake.count("contexts")), (0, 1));
    assert!(buffer[..] == bytes[..]);
    let refused = streams.1.onboard(&on_second, vec![buffer], &whole(PAGE)).err().unwrap();
    assert_eq!(refused.error, Error::NotRegistered { device: 1, host: 0 });
    fake.set("peers=0");
    let first = driver.open(0).unwrap();
    assert!(!first.can_reach(&second).unwrap());
    let error = first.reach(&second).unwrap_err();
    assert!(matches!(error, Error::Cuda { call: "cuCtxEnablePeerAccess", .. }), "{error}");
    drop((refused, on_second, streams.1, first, second));
    fake.is_clean();
}

/// What was registered through a device that is lost is the others' as before, until somebody gives it up.
#[test]
fn a_lost_device_leaves_what_it_registered_to_the_others() {
    for is_closed_first in [false, true] {
        let Some((fake, driver)) = fake("devices=2") else { return };
        let (first, second) = (driver.open(0).unwrap(), driver.open(1).unwrap());
        let (stream, memory) = (low(&second), second.allocate(PAGE as u64).unwrap());
        write(&stream, &memory, &pattern(7, PAGE));
        let arena = arena();
        let slab = arena.slab();
        let region = first.register(slab, 0, slab.data_bytes()).unwrap();
        let reads = || {
            let slots = down(&stream, &memory, vec![slab.take(PAGE as u32).unwrap()], &whole(PAGE));
            assert!(slots[0][..PAGE] == pattern(7, PAGE)[..]);
        };
        reads();
        fake.set("lose=0:719");
        assert_eq!(lost(first.free_bytes()), "CUDA_ERROR_LAUNCH_FAILED");
        reads();
        // It is registered for the other too, and that stays if it is all that does.
        let shared = second.register(slab, 0, slab.data_bytes()).unwrap();
        assert_eq!((shared.bytes() as u64, fake.count("registered")), (slab.data_bytes(), 1));
        assert_eq!(lost(first.register(slab, 0, slab.data_bytes())), "CUDA_ERROR_LAUNCH_FAILED");
        let (first, last) = match is_closed_first {
            true => {
                drop((shared, first));
                (None, region)
            }
            false => {
                drop(region);
                (Some(first), shared)
            }
        };
        reads();
        drop(last);
        assert_eq!(fake.count("registered"), 0, "it was given up through the other");
        let again = second.register(slab, 0, slab.data_bytes()).unwrap();
        reads();
        drop((again, memory, stream, second, first));
        let stays = u64::from(is_closed_first);
        assert_eq!(
            (fake.count("contexts"), fake.count("violations"), fake.count("registered")),
            (stays, 0, 0)
        );
    }
}

#[test]
fn a_full_device_says_so_and_has_room_again() {
    let Some((fake, driver)) = fake("memory=1048576") else { return };
    let device = driver.open(0).unwrap();
    let first = device.allocate(600_000).unwrap();
    assert_eq!(device.free_bytes().unwrap(), 448_576);
    assert_eq!(device.allocate(600_000).unwrap_err(), Error::Full { device: 0, bytes: 600_000 });
    drop(first);
    drop(device.allocate(600_000).unwrap());
    drop(device);
    fake.is_clean();
}

/// Each call of a copy fails once; what was given comes back, and the next copy works.
#[test]
fn a_call_that_fails_gives_everything_back() {
    for version in [12070, 12080, 13000] {
        let Some((fake, driver)) = fake(&format!("version={version};delay_us=2000")) else { return };
        let device = driver.open(0).unwrap();
        let (stream, memory) = (low(&device), device.allocate(8 * PAGE as u64).unwrap());
        let bytes = pattern(8, 8 * PAGE);
        let (batch, nth) = match version {
            12070 => ("cuMemcpyHtoDAsync_v2", 5),
            12080 => ("cuMemcpyBatchAsync", 1),
            _ => ("cuMemcpyBatchAsync_v2", 1),
        };
        for (call, nth) in
            [(batch, nth), ("cuEventCreate", 1), ("cuEventRecord", 1), ("cuCtxPushCurrent_v2", 2)]
        {
            let buffer = filled(&device, &bytes);
            fake.set(&format!("fail={call}:{nth}:801"));
            let refused = stream.onboard(&memory, vec![buffer], &shuffled(8, 3)).err().unwrap();
            let Error::Cuda { source, .. } = refused.error else { panic!("{call}: {}", refused.error) };
            assert_eq!((source.code, source.name), (801, "CUDA_ERROR_NOT_SUPPORTED"), "{call}");
            let hosts = refused.hosts.expect("it was given back");
            assert!(hosts[0][..] == bytes[..] && stream.is_idle().unwrap(), "{call}");
            up(&stream, &memory, hosts, &shuffled(8, 3));
        }
        // A question that fails once changes nothing.
        let mut copying = stream
            .onboard(&memory, vec![filled(&device, &bytes)], &whole(8 * PAGE))
            .unwrap_or_else(|_| panic!());
        fake.set("fail=cuEventQuery:1:801");
        assert!(copying.poll().is_err());
        assert!(copying.wait(LONG).unwrap().is_some());
        // Nor when the copy is dropped.
        let dropped = stream.onboard(&memory, vec![filled(&device, &bytes)], &whole(8 * PAGE));
        fake.set("fail=cuEventQuery:1:999");
        drop(dropped);
        assert!(stream.is_idle().unwrap());
        assert_eq!((device.kept(), fake.count("registered")), (0, 0));
        drop((copying, memory, stream, device));
        fake.is_clean();
    }
}

fn lost<T>(result: Result<T, Error>) -> &'static str {
    match result {
        Err(Error::Lost { source, .. }) => source.name,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("the device is lost"),
    }
}

/// What leaves a context with nothing but errors, by NVIDIA's word, and what does not.
#[test]
fn a_device_is_lost_when_it_says_so() {
    let Some((fake, driver)) = fake("") else { return };
    let fatal = [4, 46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 806, 810, 911];
    let others = [1, 2, 201, 304, 400, 701, 712, 800, 801, 805, 999];
    for (code, is_fatal) in fatal.map(|code| (code, true)).into_iter().chain(others.map(|code| (code, false)))
    {
        let device = driver.open(0).unwrap();
        fake.set(&format!("fail=cuMemGetInfo_v2:1:{code}"));
        assert!(device.free_bytes().is_err());
        assert_eq!(device.lost().map(|lost| lost.code), is_fatal.then_some(code), "{code}");
    }
}

/// What a device that is lost was writing to is nobody's until its context is gone.
#[test]
fn a_device_lost_in_mid_copy_gives_nothing_back() {
    let Some((fake, driver)) = fake("delay_us=100000") else { return };
    let device = driver.open(0).unwrap();
    let (stream, memory) = (low(&device), device.allocate(1 << 20).unwrap());
    let arena = arena();
    let region = device.register(arena.slab(), 0, arena.slab().data_bytes()).unwrap();
    let slot = arena.slab().take(1 << 20).unwrap();
    let used = arena.slab().regions()[0].used;
    let mut copying = stream.offload(&memory, vec![slot], &whole(1 << 20)).unwrap_or_else(|_| panic!());
    let (idle, buffer) = (device.host_buffer(4096).unwrap(), device.host_buffer(1 << 20).unwrap());
    let other: Copying<HostBuffer> =
        stream.offload(&memory, vec![buffer], &whole(1 << 20)).unwrap_or_else(|_| panic!());
    assert!(copying.wait(Duration::from_millis(20)).unwrap().is_none());
    fake.set("lose=0:719");
    assert_eq!(lost(copying.wait(LONG)), "CUDA_ERROR_LAUNCH_FAILED");
    assert!(copying.poll().unwrap().is_none(), "it does not come back");
    drop(other);
    assert_eq!(device.kept(), 2);
    // Nor does what is only registered go: its pages cannot be unregistered any more.
    drop(idle);
    assert_eq!(device.kept(), 3);
    assert_eq!(arena.slab().regions()[0].used, used, "the slot is not free");

    // Everything says the same from now on, and the driver is not asked.
    assert_eq!(device.lost().unwrap().code, 719);
    let calls = fake.count("calls:cuCtxPushCurrent_v2");
    assert_eq!(lost(device.allocate(1)), "CUDA_ERROR_LAUNCH_FAILED");
    assert_eq!(lost(device.stream(Priority::High)), "CUDA_ERROR_LAUNCH_FAILED");
    assert_eq!(lost(stream.is_idle()), "CUDA_ERROR_LAUNCH_FAILED");
    assert_eq!(lost(device.host_buffer(1)), "CUDA_ERROR_LAUNCH_FAILED");
    let refused =
        stream.offload(&memory, vec![arena.slab().take(4096).unwrap()], &whole(4096)).err().unwrap();
    assert_eq!(lost::<()>(Err(refused.error)), "CUDA_ERROR_LAUNCH_FAILED");
    assert_eq!(refused.hosts.unwrap().len(), 1, "it never began");
    assert_eq!(fake.count("calls:cuCtxPushCurrent_v2"), calls);

    drop((copying, region, memory, stream, device));
    assert_eq!(arena.slab().usage().regions_free, 2, "with the context the slot is free");
    for what in ["contexts", "streams", "allocations", "bytes", "violations"] {
        assert_eq!(fake.count(what), 0, "{what}");
    }
}

/// The fifth page of eight finds the device lost: the four before may still be under way.
#[test]
fn a_device_lost_while_pages_are_queued_gives_nothing_back() {
    let Some((fake, driver)) = fake("version=12070;delay_us=100000") else { return };
    let device = driver.open(0).unwrap();
    let (stream, memory) = (low(&device), device.allocate(8 * PAGE as u64).unwrap());
    let buffer = device.host_buffer(8 * PAGE).unwrap();
    fake.set("fail=cuMemcpyDtoHAsync_v2:5:700");
    let refused = stream.offload(&memory, vec![buffer], &shuffled(8, 3)).err().unwrap();
    assert!(refused.hosts.is_none());
    assert_eq!(device.kept(), 1);
    assert_eq!(lost::<()>(Err(refused.error)), "CUDA_ERROR_ILLEGAL_ADDRESS");
    drop((memory, stream, device));
    assert_eq!((fake.count("contexts"), fake.count("violations")), (0, 0));
}

/// Somebody else holds the context: it does not end with us, so what the device was using is never given back.
#[test]
fn a_lost_device_whose_context_stays_keeps_memory_for_ever() {
    let Some((fake, driver)) = fake("delay_us=100000") else { return };
    let other = driver.open(0).unwrap();
    let device = driver.open(0).unwrap();
    let (stream, memory) = (low(&device), device.allocate(1 << 20).unwrap());
    let arena = arena();
    let region = device.register(arena.slab(), 0, arena.slab().data_bytes()).unwrap();
    let slot = arena.slab().take(1 << 20).unwrap();
    let mut copying = stream.offload(&memory, vec![slot], &whole(1 << 20)).unwrap_or_else(|_| panic!());
    fake.set("lose=0:214");
    assert_eq!(lost(copying.wait(LONG)), "CUDA_ERROR_ECC_UNCORRECTABLE");
    drop((copying, region, memory, stream, device));
    assert_eq!(arena.slab().usage().regions_free, 1);
    drop(other);
    assert_eq!(fake.count("contexts"), 0);
}

/// Lost between any two calls of a copy: never a panic, never memory given up under a copy.
#[test]
fn a_device_may_be_lost_at_any_call() {
    for call in
        ["cuCtxPushCurrent_v2", "cuEventCreate", "cuMemcpyBatchAsync_v2", "cuEventRecord", "cuEventQuery"]
    {
        for nth in 1..4 {
            let Some((fake, driver)) = fake("delay_us=1000") else { return };
            let device = driver.open(0).unwrap();
            let (stream, memory) = (low(&device), device.allocate(8 * PAGE as u64).unwrap());
            let buffer = device.host_buffer(8 * PAGE).unwrap();
            fake.set(&format!("fail={call}:{nth}:700"));
            match stream.offload(&memory, vec![buffer], &shuffled(8, 3)) {
                Ok(mut copying) => drop(copying.wait(LONG)),
                Err(refused) => assert_eq!(lost::<()>(Err(refused.error)), "CUDA_ERROR_ILLEGAL_ADDRESS"),
            }
            drop((memory, stream, device));
            for what in ["contexts", "streams", "allocations", "violations"] {
                assert_eq!(fake.count(what), 0, "{call} {nth} {what}");
            }
        }
    }
}
