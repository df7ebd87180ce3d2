//! Two processes and one device: handed over, given up, killed.

mod common;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use common::other::{Other, go_on, hex, role, say, say_memory, unhex};
use common::{LONG, cuda, filled, low, pattern, read, whole, write};
use kv_gpu::{Device, Error, EventHandle, MemoryHandle, Stream, Uuid};

const BYTES: usize = 3 << 20;
/// Not a test of its own: what the tests below start.
#[test]
fn the_other_process() {
    let Some(role) = role() else { return };
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let stream = low(&device);
    let memory = device.allocate(BYTES as u64).unwrap();
    write(&stream, &memory, &pattern(1, BYTES));
    match role.as_str() {
        "hands memory over" => {
            say_memory(&memory.export().unwrap());
            go_on();
            assert!(read(&stream, &memory) == pattern(2, BYTES), "what the test wrote");
            drop(memory);
            say("freed");
            go_on();
        }
        "writes slowly" | "writes for ever" => {
            write(&stream, &memory, &vec![0; BYTES]);
            let event = device.event(true).unwrap();
            say_memory(&memory.export().unwrap());
            cuda.set(if role == "writes slowly" { "delay_us=3000" } else { "delay_us=60000000" });
            let buffer = filled(&device, &pattern(3, BYTES));
            let copying =
                stream.onboard(&memory, vec![buffer], &whole(BYTES)).map_err(|refused| refused.error);
            event.record(&stream).unwrap();
            say(&hex(&event.export().unwrap().0));
            go_on();
            drop(copying);
        }
        "shares by descriptor" => {
            let shared = device.allocate_shared(BYTES as u64).unwrap();
            write(&stream, &shared, &pattern(4, shared.bytes() as usize));
            let descriptor = shared.export_descriptor().unwrap();
            say(&format!("{} {}", descriptor.as_raw_fd(), shared.bytes()));
            go_on();
            assert!(read(&stream, &shared) == pattern(5, shared.bytes() as usize), "what the test wrote");
            say("read");
            go_on();
        }
        role => panic!("{role} is no role"),
    }
}

fn opened() -> (common::Cuda, Device, Stream) {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let stream = low(&device);
    (cuda, device, stream)
}

#[test]
fn memory_of_another_process_is_read_and_written() {
    let (cuda, device, stream) = opened();
    let mut other = Other::start("hands memory over");
    let handle = other.memory();
    let memory = device.open_memory(&handle).unwrap();
    assert_eq!(memory.bytes(), BYTES as u64);
    assert!(read(&stream, &memory) == pattern(1, BYTES));

    // A piece of it, and the same twice.
    let piece = MemoryHandle { offset: handle.offset + 4096, bytes: 4096, ..handle.clone() };
    let piece = device.open_memory(&piece).unwrap();
    assert!(read(&stream, &piece) == pattern(1, BYTES)[4096..8192]);
    drop(piece);
    assert!(read(&stream, &memory) == pattern(1, BYTES));

    // What came by a handle is not handed on, and what is ours is not opened here.
    write(&stream, &memory, &pattern(2, BYTES));
    let own = device.allocate(4096).unwrap().export().unwrap();
    let error = device.open_memory(&own).unwrap_err();
    assert!(matches!(error, Error::Gone { device: 0, .. }), "{error}");
    drop(memory);

    other.tell();
    assert_eq!(other.hear(), "freed");
    let error = device.open_memory(&handle).unwrap_err();
    assert!(matches!(error, Error::Gone { device: 0, .. }), "{error}");
    other.ends_well();
    let error = device.open_memory(&handle).unwrap_err();
    assert!(matches!(error, Error::Gone { device: 0, .. }), "{error}");
    drop((stream, device));
    cuda.is_clean();
}

#[test]
fn what_a_handle_says_is_not_believed() {
    let (cuda, device, stream) = opened();
    let mut other = Other::start("hands memory over");
    let handle = other.memory();
    for (offset, bytes) in [(0, u64::MAX), (u64::MAX, 1), (1 << 40, 1), (handle.offset + 1, u64::MAX - 1)] {
        let wrong = MemoryHandle { offset, bytes, ..handle.clone() };
        let error = device.open_memory(&wrong).unwrap_err();
        assert!(matches!(error, Error::Range { what: "the memory of the handle", .. }), "{error}");
    }
    let wrong = MemoryHandle { device: Uuid([9; 16]), ..handle.clone() };
    assert_eq!(
        device.open_memory(&wrong).unwrap_err(),
        Error::OtherDevice { device: 0, wanted: Uuid([9; 16]) }
    );
    if let Some(fake) = &cuda.fake {
        // Real handles are opaque, so only ours are bent. Not at the process: its threads answer to numbers too.
        for at in (0..8).chain(12..36) {
            let mut wrong = handle.clone();
            wrong.handle[at] ^= 1;
            let error = device.open_memory(&wrong).unwrap_err();
            assert!(matches!(error, Error::Gone { .. }), "byte {at}: {error}");
        }
        // And a driver that says less than it should.
        fake.set("lie_range=4096");
        assert!(matches!(device.open_memory(&handle).unwrap_err(), Error::Range { within: 4096, .. }));
        assert_eq!(fake.count("imports"), 0);
    }
    drop((other, stream, device));
    cuda.is_clean();
}

#[test]
fn another_process_s_event_is_waited_for() {
    let (cuda, device, stream) = opened();
    if !device.facts().has_shared_events {
        eprintln!("skipped: the device has no events for several processes");
        return;
    }
    let mut other = Other::start("writes slowly");
    let memory = device.open_memory(&other.memory()).unwrap();
    let event = device.open_event(&EventHandle(unhex(&other.hear()))).unwrap();
    stream.wait_for(&event).unwrap();
    assert!(read(&stream, &memory) == pattern(3, BYTES));
    assert!(event.is_done().unwrap());
    assert!(device.event(false).unwrap().export().is_err(), "it was not made to be shared");
    drop((memory, event));
    other.ends_well();
    drop((stream, device));
    cuda.is_clean();
}

/// Killed while this process copies its memory: the copy ends, with what was there or with an error that has a name.
#[test]
fn the_owner_is_killed_while_its_memory_is_copied() {
    let (cuda, device, stream) = opened();
    let mut other = Other::start("hands memory over");
    let handle = other.memory();
    let memory = device.open_memory(&handle).unwrap();
    cuda.set("delay_us=50000");
    let buffer = device.host_buffer(BYTES).unwrap();
    let copying = stream.offload(&memory, vec![buffer], &whole(BYTES)).map_err(|refused| refused.error);
    let mut copying = copying.unwrap();
    if cuda.fake.is_some() {
        assert!(copying.wait(Duration::from_millis(5)).unwrap().is_none(), "under way");
    }
    other.child.kill().unwrap();
    other.child.wait().unwrap();
    cuda.set("delay_us=0");
    match copying.wait(LONG) {
        Ok(Some(hosts)) => assert!(hosts[0][..] == pattern(1, BYTES)[..]),
        Ok(None) => panic!("it does not end"),
        Err(error) => println!("{error}"),
    }
    let error = device.open_memory(&handle).unwrap_err();
    assert!(matches!(error, Error::Gone { .. } | Error::Lost { .. }), "{error}");
    drop((copying, memory, stream, device));
    cuda.is_clean();
    if cuda.fake.is_some() {
        // This process has nothing of that memory any more, and it never had a name.
        let generation = u64::from_le_bytes(std::array::from_fn(|byte| handle.handle[16 + byte]));
        let name = format!("fake-cuda-{generation:016x}");
        assert!(!std::fs::read_to_string("/proc/self/maps").unwrap().contains(&name));
    }
    let left = std::fs::read_dir("/dev/shm").unwrap().map(|file| file.unwrap().file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().contains("fake-cuda")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn memory_is_shared_by_descriptor_and_outlives_its_owner() {
    let (cuda, device, stream) = opened();
    let mut other = Other::start("shares by descriptor");
    let said = other.hear();
    let (descriptor, bytes) = said.split_once(' ').unwrap();
    let (descriptor, bytes): (OwnedFd, u64) = (other.descriptor(descriptor), bytes.parse().unwrap());
    assert!(bytes >= BYTES as u64);
    for wrong in [0, 2 * bytes, bytes + 1] {
        let error = device.import(descriptor.as_fd(), wrong).unwrap_err();
        assert!(matches!(error, Error::Gone { device: 0, .. }), "{wrong}: {error}");
    }
    let memory = device.import(descriptor.as_fd(), bytes).unwrap();
    assert!(read(&stream, &memory) == pattern(4, bytes as usize));
    write(&stream, &memory, &pattern(5, bytes as usize));
    other.tell();
    assert_eq!(other.hear(), "read");

    other.child.kill().unwrap();
    other.child.wait().unwrap();
    assert!(read(&stream, &memory) == pattern(5, bytes as usize));
    drop((memory, descriptor));

    let no_memory = std::fs::File::open("/dev/null").unwrap();
    let error = device.import(no_memory.as_fd(), bytes).unwrap_err();
    assert!(matches!(error, Error::Gone { device: 0, .. }), "{error}");
    drop((stream, device));
    cuda.is_clean();
}

/// Each call on the way fails once: nothing is left, and the next try works.
#[test]
fn shared_memory_is_made_whole_or_not_at_all() {
    let Some((fake, driver)) = common::fake("memory=8388608") else { return };
    let device = driver.open(0).unwrap();
    let calls =
        ["cuMemGetAllocationGranularity", "cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"];
    for call in calls {
        fake.set(&format!("fail={call}:1:801"));
        let error = device.allocate_shared(BYTES as u64).unwrap_err();
        assert!(matches!(error, Error::Cuda { call: failed, .. } if failed == call), "{call}: {error}");
        fake.is_clean_but_for(&["contexts"]);
        drop(device.allocate_shared(BYTES as u64).unwrap());
        fake.is_clean_but_for(&["contexts"]);
    }
    for bytes in [8_388_609, u64::MAX] {
        assert_eq!(device.allocate_shared(bytes).unwrap_err(), Error::Full { device: 0, bytes });
    }
    let memory = device.allocate(4096).unwrap();
    assert_eq!(memory.export_descriptor().unwrap_err(), Error::NotShared { device: 0 });
    drop((memory, device));
    fake.is_clean();
}

/// Killed while it writes and somebody waits for its event: the wait ends at its limit at the latest.
#[test]
fn the_owner_is_killed_before_its_event() {
    let (cuda, device, stream) = opened();
    if cuda.fake.is_none() {
        eprintln!("skipped: a real copy is done before anybody can be killed");
        return;
    }
    let mut other = Other::start("writes for ever");
    let memory = device.open_memory(&other.memory()).unwrap();
    let event = device.open_event(&EventHandle(unhex(&other.hear()))).unwrap();
    other.child.kill().unwrap();
    other.child.wait().unwrap();
    assert!(!event.wait(Duration::from_millis(50)).unwrap());
    assert!(read(&stream, &memory) != pattern(3, BYTES), "half of it");
    drop((memory, event, stream, device));
    cuda.is_clean();
}
