//! Memory in pieces, by descriptor and by fabric handle; memory that an engine made; what somebody says of either.

mod common;

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use common::engine::{BY_DESCRIPTOR, BY_FABRIC, Engine, NOT, PAGE};
use common::other::{Other, go_on, hex, role, say, unhex};
use common::{Cuda, Fake, LONG, cuda, fake, filled, low, pattern, read, whole, write};
use kv_gpu::{
    Device, DeviceMemory, Error, EventHandle, Exported, ExportedMemory, Reach, SharedPiece, Stream, Uuid,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The engine's memory: three pieces, and of them what begins 4096 bytes in and ends in the last.
const PAGES: [usize; 3] = [1, 2, 1];
const OFFSET: u64 = 4096;
const BYTES: usize = 3 * PAGE + 12_288;

fn pieces_of(exported: Exported) -> (Vec<SharedPiece>, u64, u64) {
    match exported.memory {
        ExportedMemory::Pieces { pieces, offset, bytes } => (pieces, offset, bytes),
        ExportedMemory::Ipc(handle) => panic!("not in pieces: {handle:?}"),
    }
}

fn opened() -> (Cuda, Device, Stream) {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let stream = low(&device);
    (cuda, device, stream)
}

/// What the other process says of its pieces, and the memory that they are here.
fn open_pieces_of(other: &mut Other, device: &Device) -> DeviceMemory {
    let said = other.hear();
    let mut parts = said.split(' ');
    let (offset, bytes) = (parts.next().unwrap().parse().unwrap(), parts.next().unwrap().parse().unwrap());
    let piece = |part: &str| {
        let (word, bytes) = part.split_once(':').unwrap();
        let bytes = bytes.parse().unwrap();
        match word.len() {
            128 => SharedPiece::Fabric { handle: unhex(word), bytes },
            _ => SharedPiece::Descriptor { fd: other.descriptor(word), bytes },
        }
    };
    let pieces: Vec<_> = parts.map(piece).collect();
    device.open_pieces(pieces, offset, bytes).unwrap()
}

/// Not a test of its own: what the tests below start.
#[test]
fn the_other_process() {
    let Some(role) = role() else { return };
    let (cuda, device, stream) = opened();
    match role.as_str() {
        "shares by descriptor" | "shares by fabric" => {
            let kinds = if role == "shares by fabric" { BY_FABRIC } else { BY_DESCRIPTOR };
            let engine = Engine::new(&cuda, 0);
            let segment = engine.segment(&PAGES, kinds);
            let export = || cuda.driver.export_address(segment.address + OFFSET, BYTES as u64).unwrap();
            let (pieces, offset, bytes) = pieces_of(export());
            let ours = device.open_pieces(pieces, offset, bytes).unwrap();
            write(&stream, &ours, &pattern(1, BYTES));
            let (pieces, offset, bytes) = pieces_of(export());
            let word = |piece: &SharedPiece| match piece {
                SharedPiece::Descriptor { fd, bytes } => format!("{}:{bytes}", fd.as_raw_fd()),
                SharedPiece::Fabric { handle, bytes } => format!("{}:{bytes}", hex(handle)),
            };
            let words: Vec<_> = pieces.iter().map(word).collect();
            say(&format!("{offset} {bytes} {}", words.join(" ")));
            go_on();
            assert!(read(&stream, &ours) == pattern(2, BYTES), "what the test wrote");
            say("read");
            go_on();
        }
        "waits for an event" => {
            let memory = device.allocate(BYTES as u64).unwrap();
            write(&stream, &memory, &vec![0; BYTES]);
            let event = device.event(true).unwrap();
            let handle = memory.export().unwrap();
            say(&format!("{} {} {}", hex(&handle.handle), handle.offset, hex(&event.export().unwrap().0)));
            go_on();
            stream.wait_for(&event).unwrap();
            assert!(read(&stream, &memory) == pattern(7, BYTES), "after the event it is there");
            say("read");
            go_on();
        }
        "runs out of descriptors" => {
            let engine = Engine::new(&cuda, 0);
            let segment = engine.segment(&[1; 32], BY_DESCRIPTOR);
            let export = || cuda.driver.export_address(segment.address, 32 * PAGE as u64);
            // Such a limit leaves four.
            let open = std::fs::read_dir("/proc/self/fd").unwrap();
            let open: Vec<u64> =
                open.filter_map(|fd| fd.unwrap().file_name().to_str()?.parse().ok()).collect();
            let limit = (0..).filter(|fd| !open.contains(fd)).nth(4).unwrap();
            let before = getrlimit(Resource::Nofile);
            setrlimit(Resource::Nofile, Rlimit { current: Some(limit), ..before }).unwrap();
            let error = export().unwrap_err();
            assert!(matches!(error, Error::NoDescriptors { pieces: 1..32 }), "{error}");
            assert!(error.to_string().contains("RLIMIT_NOFILE"));
            setrlimit(Resource::Nofile, before).unwrap();
            assert_eq!(pieces_of(export().unwrap()).0.len(), 32);
            engine.unmap(&segment);
            say("done");
            go_on();
        }
        role => panic!("{role} is no role"),
    }
}

/// The limit is a process', so another has it.
#[test]
fn memory_in_more_pieces_than_descriptors_says_so() {
    let mut other = Other::start("runs out of descriptors");
    assert_eq!(other.hear(), "done");
    other.ends_well();
}

/// Read, written, and killed: by descriptor, and by fabric handle where there are such.
#[test]
fn an_engine_s_pieces_are_one_memory_and_outlive_it() {
    for role in ["shares by descriptor", "shares by fabric"] {
        let (cuda, device, stream) = opened();
        if role == "shares by fabric" && matches!(device.allocate_fabric(1), Err(Error::NoFabric { .. })) {
            eprintln!("skipped: this machine has no fabric handles");
            continue;
        }
        let mut other = Other::start(role);
        let memory = open_pieces_of(&mut other, &device);
        assert_eq!(memory.bytes(), BYTES as u64);
        assert!(read(&stream, &memory) == pattern(1, BYTES));
        write(&stream, &memory, &pattern(2, BYTES));
        other.tell();
        assert_eq!(other.hear(), "read");

        // Killed while it is copied from.
        cuda.set("delay_us=20000");
        let buffer = device.host_buffer(BYTES).unwrap();
        let copying = stream.offload(&memory, vec![buffer], &whole(BYTES)).map_err(|refused| refused.error);
        let mut copying = copying.unwrap();
        if cuda.fake.is_some() {
            assert!(copying.wait(Duration::from_millis(5)).unwrap().is_none(), "under way");
        }
        other.kill();
        cuda.set("delay_us=0");
        // It is the copy's now, and nobody else's.
        drop(memory);
        let hosts = copying.wait(LONG).unwrap().expect("it ends");
        assert!(hosts[0][..] == pattern(2, BYTES)[..]);
        drop((copying, hosts, stream, device));
        cuda.is_clean();
    }
}

/// The opener records, the maker waits.
#[test]
fn an_opened_event_is_recorded() {
    let (cuda, device, stream) = opened();
    if !device.facts().has_shared_events {
        eprintln!("skipped: the device has no events for several processes");
        return;
    }
    let mut other = Other::start("waits for an event");
    let said = other.hear();
    let parts: Vec<_> = said.split(' ').collect();
    let memory = kv_gpu::MemoryHandle {
        device: device.facts().uuid,
        handle: unhex(parts[0]),
        offset: parts[1].parse().unwrap(),
        bytes: BYTES as u64,
    };
    let memory = device.open_memory(&memory).unwrap();
    let event = device.open_event(&EventHandle(unhex(parts[2]))).unwrap();
    cuda.set("delay_us=3000");
    let copying = stream.onboard(&memory, vec![filled(&device, &pattern(7, BYTES))], &whole(BYTES));
    let mut copying = copying.map_err(|refused| refused.error).unwrap();
    event.record(&stream).unwrap();
    other.tell();
    assert_eq!(other.hear(), "read");
    assert!(event.is_done().unwrap());
    assert!(copying.wait(LONG).unwrap().is_some());
    other.ends_well();
    drop((copying, memory, event, stream, device));
    cuda.is_clean();
}

fn descriptors(cuda: &Cuda, engine: &Engine, pages: &[usize]) -> Vec<SharedPiece> {
    let segment = engine.segment(pages, BY_DESCRIPTOR);
    let bytes = pages.iter().sum::<usize>() * PAGE;
    let (pieces, offset, _) = pieces_of(cuda.driver.export_address(segment.address, bytes as u64).unwrap());
    assert_eq!((pieces.len(), offset), (pages.len(), 0));
    engine.unmap(&segment);
    pieces
}

fn renamed(piece: SharedPiece, bytes: u64) -> SharedPiece {
    match piece {
        SharedPiece::Descriptor { fd, .. } => SharedPiece::Descriptor { fd, bytes },
        SharedPiece::Fabric { handle, .. } => SharedPiece::Fabric { handle, bytes },
    }
}

#[test]
fn what_is_said_of_pieces_is_not_believed() {
    let (cuda, device, stream) = opened();
    let engine = Engine::new(&cuda, 0);
    let page = PAGE as u64;
    let pieces = || descriptors(&cuda, &engine, &PAGES);
    let refused = |pieces: Vec<SharedPiece>, offset: u64, bytes: u64| {
        device.open_pieces(pieces, offset, bytes).map(drop).unwrap_err()
    };
    for (offset, bytes) in
        [(0, 4 * page + 1), (4 * page, 1), (1, 4 * page), (u64::MAX, 2), (2, u64::MAX), (0, 0)]
    {
        let error = refused(pieces(), offset, bytes);
        assert!(
            matches!(error, Error::Range { within, .. } if within == 4 * page),
            "{offset} {bytes}: {error}"
        );
    }
    assert!(matches!(refused(vec![], 0, 1), Error::Range { within: 0, .. }));
    for (piece, bytes) in [(0, 0), (1, 1), (2, page + 1), (2, u64::MAX / page * page), (0, 3 * page / 2)] {
        let mut pieces = pieces();
        let wrong = renamed(pieces.remove(piece), bytes);
        pieces.insert(piece, wrong);
        let error = refused(pieces, 0, 1);
        assert!(
            matches!(error, Error::Piece { piece: found, .. } if found == piece),
            "{piece} {bytes}: {error}"
        );
    }
    // Longer than what lies behind, and handles that lead nowhere.
    let mut longer = pieces();
    let last = renamed(longer.remove(2), 2 * page);
    longer.push(last);
    assert!(matches!(refused(longer, 0, 5 * page), Error::Gone { device: 0, .. }));
    let mut nowhere = pieces();
    let fd = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    nowhere.insert(1, SharedPiece::Descriptor { fd, bytes: page });
    assert!(matches!(refused(nowhere, 0, 1), Error::Gone { device: 0, .. }));
    let mut nonsense = pieces();
    nonsense.push(SharedPiece::Fabric { handle: [7; 64], bytes: page });
    assert!(matches!(refused(nonsense, 0, 1), Error::Gone { .. } | Error::NoFabric { .. }));
    let fabric = |_| SharedPiece::Fabric { handle: [0; 64], bytes: page };
    let error = refused((0..65_537).map(fabric).collect(), 0, 1);
    assert_eq!(error, Error::ManyPieces { pieces: 65_537, most: 65_536 });

    // The right ones still work, the same piece twice included: it is the same memory at two places.
    let memory = device.open_pieces(pieces(), page - 1, 2).unwrap();
    write(&stream, &memory, &[1, 2]);
    assert_eq!(read(&stream, &memory), [1, 2]);
    drop((memory, stream, device, engine));
    cuda.is_clean();
}

/// Each call on the way fails, at each piece: nothing is left, and the next try works.
#[test]
fn pieces_are_mapped_whole_or_not_at_all() {
    let Some((fake, driver)) = fake("") else { return };
    let cuda = Cuda { driver, fake: Some(fake) };
    let fake = cuda.fake.as_ref().unwrap();
    let (device, engine) = (cuda.driver.open(0).unwrap(), Engine::new(&cuda, 0));
    let each = ["cuMemImportFromShareableHandle", "cuMemGetAllocationPropertiesFromHandle", "cuMemMap"];
    let once = ["cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemSetAccess"];
    let each = each.iter().flat_map(|call| (1..=3).map(move |nth| (*call, nth)));
    for (call, nth) in each.chain(once.map(|call| (call, 1))) {
        let pieces = descriptors(&cuda, &engine, &PAGES);
        fake.set(&format!("fail={call}:{nth}:801"));
        let error = device.open_pieces(pieces, 0, 1).unwrap_err();
        assert!(matches!(error, Error::Gone { .. } | Error::Cuda { .. }), "{call} {nth}: {error}");
        fake.is_clean_but_for(&["contexts"]);
        drop(device.open_pieces(descriptors(&cuda, &engine, &PAGES), 0, 1).unwrap());
        fake.is_clean_but_for(&["contexts"]);
    }
    // Lost half way: the context's end takes what is there.
    let pieces = descriptors(&cuda, &engine, &PAGES);
    fake.set("fail=cuMemMap:2:719");
    assert!(matches!(device.open_pieces(pieces, 0, 1).unwrap_err(), Error::Lost { .. }));
    drop((device, engine));
    assert_eq!((fake.count("contexts"), fake.count("mapped"), fake.count("violations")), (0, 0, 0));
}

/// Whatever pieces are made of: right, of nothing, bent, too long, in any order. What opens is as long as it is said to
/// be and can be used; what does not leaves nothing.
#[test]
fn pieces_that_lie_leave_nothing() {
    let Some((fake, driver)) = fake("devices=2") else { return };
    let cuda = Cuda { driver, fake: Some(fake) };
    let fake = cuda.fake.as_ref().unwrap();
    let (device, engine) = (cuda.driver.open(0).unwrap(), Engine::new(&cuda, 0));
    let elsewhere = Engine::new(&cuda, 1);
    let stream = low(&device);
    let mut chance = pattern(11, 100_000).into_iter();
    let mut below = |limit: usize| {
        let word = chance.by_ref().take(3).fold(0, |sum, byte| sum << 8 | usize::from(byte));
        word % limit
    };
    let (mut right, mut wrong) = (0, 0);
    for round in 0..200 {
        let (mut pieces, mut held) = (Vec::new(), Vec::new());
        for _ in 0..below(4) {
            let pages = 1 + below(2);
            let mut bytes = (pages * PAGE) as u64;
            if below(6) == 0 {
                bytes = [0, 1, bytes - 1, bytes + PAGE as u64, u64::MAX, 1 << 62][below(6)];
            }
            let piece = match below(12) {
                0 => {
                    let fd = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
                    SharedPiece::Descriptor { fd, bytes }
                }
                1 => renamed(descriptors(&cuda, &elsewhere, &[pages]).remove(0), bytes),
                2..=4 => {
                    let memory = device.allocate_fabric(bytes.clamp(1, 4 << 20)).unwrap();
                    let mut handle = memory.export_fabric().unwrap();
                    // Not at the process: its threads answer to numbers too.
                    if below(2) == 0 {
                        handle[12 + below(52)] ^= 1 << below(8);
                    }
                    // Else it is gone before its handle is used.
                    if below(2) == 0 {
                        held.push(memory);
                    }
                    SharedPiece::Fabric { handle, bytes }
                }
                _ => renamed(descriptors(&cuda, &engine, &[pages]).remove(0), bytes),
            };
            pieces.push(piece);
        }
        let (offset, bytes) = (below(PAGE) as u64, 1 + below(2 * PAGE) as u64);
        match device.open_pieces(pieces, offset, bytes) {
            Ok(memory) => {
                right += 1;
                assert_eq!(memory.bytes(), bytes);
                let pattern = pattern(round, bytes as usize);
                write(&stream, &memory, &pattern);
                assert!(read(&stream, &memory) == pattern, "round {round}");
            }
            Err(error) => {
                wrong += 1;
                let is_typed = matches!(
                    error,
                    Error::Piece { .. }
                        | Error::Range { .. }
                        | Error::Gone { .. }
                        | Error::OtherDevice { .. }
                        | Error::Full { .. }
                );
                assert!(is_typed, "round {round}: {error}");
            }
        }
        drop(held);
        fake.is_clean_but_for(&["contexts", "streams"]);
    }
    assert!(right > 30 && wrong > 30, "{right} {wrong}");
    assert!(device.lost().is_none());
    drop((stream, device, engine, elsewhere));
    fake.is_clean();
}

#[test]
fn a_piece_of_another_device_is_refused() {
    let Some((fake, driver)) = fake("devices=2") else { return };
    let cuda = Cuda { driver, fake: Some(fake) };
    let (first, second) = (cuda.driver.open(0).unwrap(), cuda.driver.open(1).unwrap());
    let engine = Engine::new(&cuda, 1);
    let error = first.open_pieces(descriptors(&cuda, &engine, &PAGES), 0, 1).unwrap_err();
    assert_eq!(error, Error::OtherDevice { device: 0, wanted: second.facts().uuid });
    drop(second.open_pieces(descriptors(&cuda, &engine, &PAGES), 0, 1).unwrap());
    drop((first, second, engine));
    cuda.is_clean();
}

#[test]
fn fabric_handles_are_there_or_said_not_to_be() {
    let Some((fake, driver)) = fake("fabric=0") else { return };
    let none = Error::NoFabric { device: 0 };
    let device = driver.open(0).unwrap();
    assert!(!device.facts().has_fabric);
    assert_eq!(device.allocate_fabric(1).unwrap_err(), none);
    let piece = SharedPiece::Fabric { handle: [1; 64], bytes: PAGE as u64 };
    assert_eq!(device.open_pieces(vec![piece], 0, 1).unwrap_err(), none);
    assert_eq!(device.allocate_shared(1).unwrap().export_fabric().unwrap_err(), none);
    drop(device);

    // The device has them and the machine does not let it.
    fake.set("fabric=2");
    let device = driver.open(0).unwrap();
    assert!(device.facts().has_fabric);
    assert_eq!(device.allocate_fabric(1).unwrap_err(), none);
    drop(device);

    fake.set("fabric=1;memory=8388608");
    let device = driver.open(0).unwrap();
    let memory = device.allocate_fabric(1).unwrap();
    assert_eq!(memory.bytes(), PAGE as u64);
    assert!(memory.export_fabric().is_ok());
    let not = Error::NotShared { device: 0 };
    assert_eq!(memory.export_descriptor().unwrap_err(), not);
    assert_eq!(device.allocate_shared(1).unwrap().export_fabric().unwrap_err(), not);
    assert_eq!(device.allocate(1).unwrap().export_fabric().unwrap_err(), not);
    assert_eq!(device.allocate_fabric(1 << 30).unwrap_err(), Error::Full { device: 0, bytes: 1 << 30 });
    drop((memory, device));
    fake.is_clean();
}

#[test]
fn memory_that_somebody_else_made_is_exported() {
    let cuda = cuda();
    let engine = Engine::new(&cuda, 0);
    let uuid = cuda.driver.devices().unwrap()[0].uuid;
    let export = |address: u64, bytes: u64| cuda.driver.export_address(address, bytes);

    // Of an allocation: its handle, and where in it.
    let address = engine.allocate(BYTES);
    let exported = export(address + 4096, 8192).unwrap();
    let ExportedMemory::Ipc(handle) = exported.memory else { panic!("{exported:?}") };
    assert_eq!((exported.device, handle.device, handle.bytes), (uuid, uuid, 8192));
    assert!(handle.offset >= 4096);
    for (from, bytes) in [(0, 1 << 40), (BYTES as u64 - 1, 1 << 30)] {
        let error = export(address + from, bytes).unwrap_err();
        assert!(matches!(error, Error::Range { .. }), "{from} {bytes}: {error}");
    }
    for (address, bytes) in [(address, 0), (address, u64::MAX), (u64::MAX, 1)] {
        assert!(matches!(export(address, bytes).unwrap_err(), Error::Range { .. }));
    }
    engine.free(address);

    // In pieces: each that is touched.
    let segment = engine.segment(&PAGES, BY_DESCRIPTOR);
    let page = PAGE as u64;
    for (offset, bytes, wanted) in [
        (0, 4 * page, vec![page, 2 * page, page]),
        (1, page - 1, vec![page]),
        (page + 1, 2 * page - 1, vec![2 * page]),
        (2 * page + 5, page, vec![2 * page, page]),
    ] {
        let (pieces, within, length) = pieces_of(export(segment.address + offset, bytes).unwrap());
        assert_eq!(pieces.iter().map(SharedPiece::bytes).collect::<Vec<_>>(), wanted);
        let first = if offset < page { 0 } else { page };
        assert_eq!((within, length), (offset - first, bytes));
    }
    if let Some(fake) = &cuda.fake {
        // A driver need not call it an allocation.
        fake.set("fail=cuMemGetAddressRange_v2:1:1");
        assert_eq!(pieces_of(export(segment.address, page).unwrap()).0.len(), 1);
    }
    let error = export(segment.address, 4 * page + 1).unwrap_err();
    assert!(matches!(error, Error::Range { .. }), "{error}");
    engine.unmap(&segment);

    // With a hole, not made to be shared, and nowhere.
    let segment = engine.segment(&[1, 0, 1], BY_DESCRIPTOR);
    assert!(export(segment.address, page).is_ok());
    let error = export(segment.address, 3 * page).unwrap_err();
    assert!(matches!(error, Error::Range { .. }), "{error}");
    engine.unmap(&segment);
    let segment = engine.segment(&PAGES, NOT);
    assert_eq!(export(segment.address, 1).unwrap_err(), Error::NotShared { device: 0 });
    engine.unmap(&segment);
    let nowhere = [0x1000, 1 << 60 | 1 << 50];
    for address in nowhere {
        let error = export(address, 1).unwrap_err();
        assert!(matches!(error, Error::NoMemory { address: found, .. } if found == address), "{error}");
    }
    drop(engine);
    cuda.is_clean();
}

/// A driver that wants a context for a question gets one that is in use, and none is made.
#[test]
fn the_device_of_an_address_is_found_in_a_context_that_is_there() {
    let Some((fake, driver)) = fake("devices=3;ask_in_context=1") else { return };
    let cuda = Cuda { driver, fake: Some(fake) };
    let fake = cuda.fake.as_ref().unwrap();
    let engine = Engine::new(&cuda, 1);
    let address = engine.allocate(PAGE);
    let retained = fake.count("calls:cuDevicePrimaryCtxRetain");
    let exported = cuda.driver.export_address(address, 1).unwrap();
    assert_eq!(exported.device, cuda.driver.devices().unwrap()[1].uuid);
    assert_eq!(fake.count("contexts"), 1, "the engine's");
    assert_eq!(fake.count("calls:cuDevicePrimaryCtxRetain"), retained + 2, "of its device alone");
    engine.free(address);
    let segment = engine.segment(&PAGES, BY_DESCRIPTOR);
    assert_eq!(pieces_of(cuda.driver.export_address(segment.address, BYTES as u64).unwrap()).0.len(), 3);
    engine.unmap(&segment);
    drop(engine);
    let error = cuda.driver.export_address(1 << 60, 1).unwrap_err();
    assert!(matches!(error, Error::NoMemory { .. }), "{error}");
    cuda.is_clean();
}

/// An old driver: what cannot be done has a name, and the rest is done.
#[test]
fn a_driver_without_a_function_says_so() {
    if common::is_real() {
        eprintln!("skipped: a real driver lacks nothing on purpose");
        return;
    }
    let without = |symbols: &[&str]| {
        let fake = Fake::without(symbols, "devices=2");
        let driver = fake.driver().unwrap();
        Cuda { driver, fake: Some(fake) }
    };
    let cuda = without(&["cuPointerGetAttribute"]);
    let error = cuda.driver.export_address(1 << 60, 1).unwrap_err();
    assert_eq!(error, Error::NoCall { call: "cuPointerGetAttribute" });

    let cuda = without(&["cuMemRetainAllocationHandle"]);
    let engine = Engine::new(&cuda, 0);
    let segment = engine.segment(&PAGES, BY_DESCRIPTOR);
    let error = cuda.driver.export_address(segment.address, 1).unwrap_err();
    assert_eq!(error, Error::NoCall { call: "cuMemRetainAllocationHandle" });
    engine.unmap(&segment);
    let address = engine.allocate(1);
    assert!(cuda.driver.export_address(address, 1).is_ok());
    engine.free(address);
    drop(engine);
    cuda.is_clean();

    let cuda = without(&["cuMemGetAllocationPropertiesFromHandle", "cuDeviceGetP2PAttribute"]);
    let reach = cuda.driver.reach(0, 1).unwrap();
    assert_eq!(reach, Reach { is_direct: true, has_atomics: None, rank: None });
    let (device, engine) = (cuda.driver.open(0).unwrap(), Engine::new(&cuda, 0));
    drop(device.open_pieces(descriptors(&cuda, &engine, &PAGES), 0, 1).unwrap());
    drop((device, engine));
    cuda.is_clean();
}

/// Between two devices, with and without a direct way; memory in pieces is opened to the other first.
#[test]
fn blocks_go_between_devices_however_they_reach_each_other() {
    for peers in [true, false] {
        let Some((fake, driver)) = fake(&format!("devices=3;peers={}", u8::from(peers))) else { return };
        let (first, second) = (driver.open(0).unwrap(), driver.open(1).unwrap());
        let (atomics, rank) = (Some(peers), Some(0));
        assert_eq!(driver.reach(0, 1).unwrap(), Reach { is_direct: peers, has_atomics: atomics, rank });
        assert_eq!(driver.reach(0, 2).unwrap().rank, Some(1));
        assert!(driver.reach(0, 3).is_err() && !driver.reach(0, 0).unwrap().is_direct);
        for (from, to) in [(&first, &second), (&second, &first)] {
            assert_eq!(from.can_reach(to).unwrap(), peers);
            assert_eq!(to.reach(from).is_ok(), peers);
            let (here, there) = (from.allocate(PAGE as u64).unwrap(), to.allocate(PAGE as u64).unwrap());
            assert_eq!(here.open_to(to).is_ok(), peers);
            write(&low(from), &here, &pattern(3, PAGE));
            for stream in [low(from), low(to)] {
                write(&low(to), &there, &[0; PAGE]);
                let mut copying = stream.copy((&there, 0), (&here, 0), PAGE as u64).unwrap();
                assert!(copying.wait(LONG).unwrap().is_some());
                assert!(read(&low(to), &there) == pattern(3, PAGE));
            }
            let mapped = to.allocate_shared(PAGE as u64).unwrap();
            let stream = low(from);
            let error = stream.copy((&mapped, 0), (&here, 0), PAGE as u64).map(drop).unwrap_err();
            assert!(matches!(error, Error::Cuda { .. }), "nobody let it: {error}");
            assert_eq!(mapped.open_to(from).is_ok(), peers);
            if peers {
                let mut copying = stream.copy((&mapped, 0), (&here, 0), PAGE as u64).unwrap();
                assert!(copying.wait(LONG).unwrap().is_some());
                assert!(read(&low(to), &mapped) == pattern(3, PAGE));
            }
        }
        let elsewhere = driver.devices().unwrap()[2].uuid;
        assert_ne!(elsewhere, Uuid([0; 16]));
        drop((first, second));
        fake.is_clean();
    }
}
