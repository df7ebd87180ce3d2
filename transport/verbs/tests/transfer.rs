//! Blocks go from one arena slot to another over a real device, and only those that are exposed. Needs an RDMA
//! device: `vm/test` gives it one.

mod common;

use std::time::{Duration, Instant};

use common::{Dice, LIMIT, config, node};
use kv_arena::Held;
use kv_block::payload;
use kv_transport::link::{Link, LinkDone, LinkError, LinkOp};
use kv_verbs::{DeviceConfig, Exposure};
use kv_wire::message::{ReadId, WantId, Window};

/// Both ways to expose a block, the second on any device.
fn ways() -> [DeviceConfig; 2] {
    [config(), DeviceConfig { exposure: Some(Exposure::Regions), checkers: 0, ..config() }]
}

#[test]
fn blocks_of_any_size_arrive_byte_for_byte() {
    for (round, config) in ways().iter().enumerate() {
        let Some(node) = node(64, config) else { return };
        let (mut owner, mut reader) = node.pair();
        let mut dice = Dice(7 + round as u64);
        let fixed = [1, 4096, 4097, 65_536, 1 << 20, (9 << 20) + 5];
        let random = (0..20).map(|_| 1 + dice.below(300_000) as u32).collect::<Vec<_>>();
        for (number, bytes) in fixed.into_iter().chain(random).zip(1..).map(|(bytes, number)| (number, bytes))
        {
            let block = node.block(number, bytes);
            let record = block.record();
            let window = owner.expose(number, block);
            assert_eq!(window.path, 1);
            reader.read(number, window, record, node.slot(bytes));
            let (slot, result) = reader.ended(number);
            assert_eq!(result, Ok(()), "{bytes} bytes");
            assert_eq!(payload::first_wrong_byte(&record.key, &slot[..bytes as usize]), None);
            assert!(slot[bytes as usize..].iter().all(|byte| *byte == 0xee), "nothing is written behind it");
            node.forget(owner.conceal(number));
        }
        assert_eq!((owner.link.usage().in_flight, reader.link.usage().bytes, node.used()), (0, 0, 0));
    }
}

#[test]
fn many_at_once_come_back_each_once() {
    let Some(node) = node(64, &DeviceConfig { depth: 8, ..config() }) else { return };
    let (mut owner, mut reader) = node.pair();
    let started = Instant::now();
    for round in 0..3u64 {
        let blocks: Vec<_> = (0..200).map(|n| node.block(round * 1000 + n, 5_000 + n as u32)).collect();
        let records: Vec<_> = blocks.iter().map(Held::record).collect();
        for (block, want) in blocks.into_iter().zip(0..) {
            owner.link.submit(LinkOp::Expose { want: WantId(want), block }).unwrap();
        }
        owner.link.kick();
        let windows: Vec<_> = (0..200).map(|want| owner.exposed(want).unwrap().unwrap()).collect();
        for ((window, record), read) in windows.iter().zip(&records).zip(0..) {
            let (read, want, into) = (ReadId(read), WantId(read), node.slot(record.bytes));
            let op = LinkOp::Read { read, want, window: Some(*window), record: *record, into };
            reader.link.submit(op).unwrap();
        }
        reader.link.kick();
        assert_eq!(reader.link.usage().in_flight, 200);
        for (record, read) in records.iter().zip(0..) {
            let (slot, result) = reader.ended(read);
            assert_eq!(result, Ok(()));
            assert_eq!(payload::first_wrong_byte(&record.key, &slot[..record.bytes as usize]), None);
        }
        for want in 0..200 {
            owner.start(LinkOp::Conceal { want: WantId(want) });
        }
        for want in 0..200 {
            node.forget(owner.concealed(want));
        }
    }
    assert!(reader.done.is_empty() && owner.done.is_empty());
    assert_eq!(node.used(), 0);
    eprintln!("600 blocks in {:?}", started.elapsed());
}

#[test]
fn what_is_concealed_is_refused_by_the_device_and_ends_the_path() {
    for config in ways() {
        let Some(node) = node(64, &config) else { return };
        let (mut owner, mut reader) = node.pair();
        let (block, other) = (node.block(1, 100_000), node.block(2, 50_000));
        let record = block.record();
        let window = owner.expose(1, block);
        let other_record = other.record();
        let of_other = owner.expose(2, other);
        let back = owner.conceal(1);
        // All at once: the path takes nothing more after the first is refused.
        for (read, window, record) in [(5, window, record), (6, window, record), (7, of_other, other_record)]
        {
            let (read, want, into) = (ReadId(read), WantId(read), node.slot(record.bytes));
            let op = LinkOp::Read { read, want, window: Some(window), record, into };
            reader.link.submit(op).unwrap();
        }
        reader.link.kick();
        let (slot, result) = reader.ended(5);
        assert_eq!(result, Err(LinkError::Gone));
        assert!(slot.iter().all(|byte| *byte == 0xee), "nothing came");
        assert_eq!(reader.ended(6).1, Err(LinkError::Gone), "this one would have been refused too");
        let (_, result) = reader.ended(7);
        let LinkError::Path { what } = result.unwrap_err() else { panic!("the second one follows") };
        assert!(what.contains("refused a read"), "{what}");
        assert!(matches!(reader.broken(), LinkError::Path { .. }));
        // The owner's end goes with it: what stands comes back.
        node.forget(owner.concealed(2));
        let why = owner.broken();
        eprintln!("owner: {why}");
        assert!(owner.link.submit(LinkOp::Expose { want: WantId(9), block: back }).is_err());
        drop(slot);
        assert_eq!(reader.link.usage().in_flight, 0);

        // Healing is a new pair on the same device.
        let (mut owner, mut reader) = node.pair();
        let block = node.block(3, 10_000);
        let record = block.record();
        let window = owner.expose(1, block);
        reader.read(1, window, record, node.slot(10_000));
        assert_eq!(reader.ended(1).1, Ok(()));
    }
}

#[test]
fn keys_of_one_peer_are_none_of_another() {
    for config in ways() {
        let Some(node) = node(64, &config) else { return };
        let (mut owner, _reader) = node.pair();
        let (mut other_owner, mut other_reader) = node.pair();
        let block = node.block(1, 4096);
        let record = block.record();
        let window = owner.expose(1, block);
        other_reader.read(1, window, record, node.slot(4096));
        assert_eq!(other_reader.ended(1).1, Err(LinkError::Gone));
        other_reader.broken();
        other_owner.broken();
        drop(owner.conceal(1));
    }
}

#[test]
fn other_bytes_than_the_record_says_are_not_taken() {
    let Some(node) = node(64, &config()) else { return };
    let (mut owner, mut reader) = node.pair();
    let block = node.block(1, 65_536);
    let mut record = block.record();
    let window = owner.expose(1, block);
    record.checksum.0 ^= 1;
    reader.read(1, window, record, node.slot(65_536));
    assert_eq!(reader.ended(1).1, Err(LinkError::Corrupt));
    record.checksum.0 ^= 1;
    reader.start(LinkOp::Read {
        read: ReadId(2),
        want: WantId(1),
        window: None,
        record,
        into: node.slot(65_536),
    });
    assert!(matches!(reader.ended(2).1, Err(LinkError::Protocol { .. })));
    let far = Window { address: u64::MAX - 5, ..window };
    reader.read(3, far, record, node.slot(65_536));
    assert!(matches!(reader.ended(3).1, Err(LinkError::Protocol { .. })));
    reader.read(4, window, record, node.slot(100));
    assert!(matches!(reader.ended(4).1, Err(LinkError::Unsupported { .. })));
    let foreign = common::memory(16);
    reader.read(5, window, record, foreign.slab().take(65_536).unwrap());
    assert!(matches!(reader.ended(5).1, Err(LinkError::Unsupported { .. })));
    reader.read(6, window, record, node.slot(65_536));
    assert_eq!(reader.ended(6).1, Ok(()), "none of that hurt the path");
}

#[test]
fn ends_do_what_their_role_is_and_give_back_what_is_too_much() {
    let Some(node) = node(64, &DeviceConfig { exposures_max: 2, ..config() }) else { return };
    let (mut owner, mut reader) = node.pair();
    let block = node.block(1, 4096);
    reader.start(LinkOp::Expose { want: WantId(1), block: block.clone() });
    assert!(matches!(reader.exposed(1), Err(LinkError::Unsupported { .. })));
    let window = owner.expose(1, block.clone());
    owner.read(1, window, block.record(), node.slot(4096));
    assert!(matches!(owner.ended(1).1, Err(LinkError::Unsupported { .. })));
    let again = owner.link.submit(LinkOp::Expose { want: WantId(1), block: block.clone() });
    assert!(matches!(again, Err(LinkOp::Expose { .. })), "the number is taken");
    owner.expose(2, block.clone());
    let third = owner.link.submit(LinkOp::Expose { want: WantId(3), block });
    assert!(matches!(third, Err(LinkOp::Expose { .. })), "there are two already");
    owner.start(LinkOp::Conceal { want: WantId(77) });
    owner.start(LinkOp::Conceal { want: WantId(1) });
    owner.start(LinkOp::Conceal { want: WantId(1) });
    drop(owner.concealed(1));
    drop(owner.conceal(2));
    assert_eq!(owner.link.usage().in_flight, 0);
}

#[test]
fn a_cancelled_read_gives_its_slot_back_when_the_device_is_done() {
    let Some(node) = node(96, &DeviceConfig { depth: 2, ..config() }) else { return };
    let (mut owner, mut reader) = node.pair();
    let block = node.block(1, 4 << 20);
    let record = block.record();
    let window = owner.expose(1, block);
    for read in 0..8 {
        reader.read(read, window, record, node.slot(4 << 20));
    }
    for read in 1..8 {
        reader.start(LinkOp::Cancel { read: ReadId(read) });
    }
    reader.start(LinkOp::Cancel { read: ReadId(99) });
    assert_eq!(reader.ended(0).1, Ok(()));
    for read in 1..8 {
        let (slot, result) = reader.ended(read);
        // What the device had begun may have ended well before the cancel came.
        assert!(matches!(result, Err(LinkError::Cancelled) | Ok(())), "{read}: {result:?}");
        drop(slot);
    }
    assert_eq!(reader.link.usage().in_flight, 0);
    let mut late = Vec::new();
    reader.link.poll(&mut late);
    assert!(late.is_empty());
}

#[test]
fn the_end_of_one_end_ends_the_other() {
    let Some(node) = node(64, &config()) else { return };
    for reader_goes in [true, false] {
        let (mut owner, mut reader) = node.pair();
        let block = node.block(1, 1 << 20);
        let record = block.record();
        let window = owner.expose(1, block);
        let started = Instant::now();
        if reader_goes {
            reader.read(1, window, record, node.slot(1 << 20));
            drop(reader);
            drop(owner.concealed(1));
            owner.broken();
        } else {
            drop(owner);
            let why = reader.broken();
            assert_eq!(why, LinkError::Path { what: "the peer closed its end".to_owned() });
        }
        eprintln!("told after {:?}", started.elapsed());
        assert!(common::eventually(|| node.used() <= 1), "{} slots are used", node.used());
        // The block is sealed and nobody holds it; its slot stays with it.
        let (slot, header) = node.memory.slab().slots_of_region(0).first().copied().unwrap();
        node.memory.slab().retire(slot, header).unwrap();
        node.memory.slab().sweep(&kv_arena::HazardSet::new());
        assert_eq!(node.used(), 0);
    }
}

#[test]
fn a_block_whose_grant_ends_in_mid_read_stays_fenced() {
    for (round, config) in ways().into_iter().enumerate() {
        // In pieces, because rxe answers one read to its end before it looks at anything else.
        let config = DeviceConfig { message_bytes_max: 256 << 10, depth: 2, timeout: 15, ..config };
        let Some(node) = node(96, &config) else { return };
        let mut outcomes = [0; 2];
        let attempts = if std::env::var_os("KVD_RDMA_LONG").is_some() { 20 } else { 4 };
        for attempt in 0..attempts {
            let (mut owner, mut reader) = node.pair();
            let bytes = 8 << 20;
            let block = node.block(1, bytes);
            let record = block.record();
            let window = owner.expose(1, block);
            reader.read(1, window, record, node.slot(bytes));
            std::thread::sleep(Duration::from_millis(3 + 8 * attempt));
            // From here on the memory is another block's.
            let ending = Instant::now();
            let back = owner.conceal(1);
            let ending = ending.elapsed();
            let at = back.offset();
            node.forget(back);
            let mut next = node.memory.slab().take(bytes).unwrap();
            assert_eq!(next.offset(), at, "the same memory");
            next.fill(0xb5);
            let (slot, result) = reader.ended(1);
            match result {
                Ok(()) => outcomes[0] += 1,
                Err(LinkError::Gone) => outcomes[1] += 1,
                // When the key goes in the middle of an answer, rxe ends the queue pair and says nothing.
                Err(LinkError::Path { .. }) => outcomes[1] += 1,
                Err(other) => panic!("{other}"),
            }
            // What came is of the old block, and the rest was not written.
            let mut old = vec![0; bytes as usize];
            payload::fill(&record.key, &mut old);
            let cut = slot.iter().zip(&old).position(|(came, old)| came != old).unwrap_or(bytes as usize);
            assert!(slot[cut..].iter().all(|byte| *byte == 0xee), "bytes of after the end came, at {cut}");
            eprintln!(
                "round {round}: after {} ms {result:?}, {cut} bytes came, ended in {ending:?}",
                3 + 8 * attempt
            );
        }
        assert!(outcomes[1] > 0, "no read was cut off: {outcomes:?}");
    }
}

#[test]
fn windows_run_out_and_come_back() {
    let Some(node) = node(64, &DeviceConfig { windows_max: 4, ..config() }) else { return };
    if node.device.exposure() == Exposure::Regions {
        eprintln!("skipped: the device has no windows of type 2");
        return;
    }
    let (mut owner, mut reader) = node.pair();
    let block = node.block(1, 4096);
    for want in 0..4 {
        owner.expose(want, block.clone());
    }
    owner.start(LinkOp::Expose { want: WantId(4), block: block.clone() });
    let LinkError::Unsupported { what } = owner.exposed(4).unwrap_err() else { panic!("there are four") };
    assert_eq!(what, "no memory window: all of them are in use");
    let mut keys = std::collections::BTreeSet::new();
    for want in 10..200 {
        drop(owner.conceal(want % 4));
        let window = owner.expose(want % 4, block.clone());
        keys.insert(window.key);
        reader.read(want, window, block.record(), node.slot(4096));
        assert_eq!(reader.ended(want).1, Ok(()));
    }
    assert!(keys.len() > 150, "keys are fresh: {}", keys.len());
    // A path that breaks takes its windows with it, and there are new ones.
    drop(owner);
    reader.broken();
    let (mut owner, _reader) = node.pair();
    assert!(common::eventually(|| {
        owner.start(LinkOp::Expose { want: WantId(1), block: block.clone() });
        owner.exposed(1).is_ok()
    }));
}

#[test]
fn a_wake_comes_with_completions() {
    let Some(node) = node(64, &config()) else { return };
    let (sender, receiver) = std::sync::mpsc::channel();
    let (reader, asks) = kv_verbs::Endpoint::open(&node.device, kv_verbs::Role::Reader, 1).unwrap();
    let (owner, answers) = kv_verbs::Endpoint::open(&node.device, kv_verbs::Role::Owner, 1).unwrap();
    let mut owner = owner.connect(&asks, std::sync::Arc::new(move || sender.send(()).unwrap_or(()))).unwrap();
    let reader = reader.connect(&answers, std::sync::Arc::new(|| {})).unwrap();
    let mut done = Vec::new();
    for want in 0..3 {
        let op = LinkOp::Expose { want: WantId(want), block: node.block(want, 100) };
        owner.submit(op).unwrap();
        owner.kick();
        receiver.recv_timeout(LIMIT).expect("it is woken");
        owner.poll(&mut done);
        assert!(matches!(done.last(), Some(LinkDone::Exposed { .. })));
    }
    drop(reader);
    while !matches!(done.last(), Some(LinkDone::Broken { .. })) {
        receiver.recv_timeout(LIMIT).expect("it is woken");
        owner.poll(&mut done);
    }
    assert_eq!(done.iter().filter(|done| matches!(done, LinkDone::Concealed { .. })).count(), 3);
    drop(owner);
    while receiver.try_recv().is_ok() {}
}

#[test]
fn a_reader_knows_whether_the_owner_answers() {
    let Some(node) = node(16, &DeviceConfig { silence: Duration::from_secs(2), ..config() }) else { return };
    let (_owner, reader) = node.pair();
    assert!(common::eventually(|| reader.link.has_answered()));

    let (sender, receiver) = std::sync::mpsc::channel();
    let (reader, _) = kv_verbs::Endpoint::open(&node.device, kv_verbs::Role::Reader, 1).unwrap();
    let (_owner, answers) = kv_verbs::Endpoint::open(&node.device, kv_verbs::Role::Owner, 1).unwrap();
    let wake = std::sync::Arc::new(move || sender.send(()).unwrap_or(()));
    let mut reader = common::End::new(reader.connect(&answers, wake).unwrap());
    receiver.recv_timeout(LIMIT).expect("it is told that nobody answers");
    reader.broken();
    assert!(!reader.link.has_answered());
}

#[test]
fn nobody_is_called_for_a_link_that_is_gone() {
    let Some(node) = node(64, &config()) else { return };
    let (mut owner, reader) = node.pair();
    let block = node.block(1, 4 << 20);
    let record = block.record();
    let window = owner.expose(1, block);
    drop(reader);
    let (sender, receiver) = std::sync::mpsc::channel();
    let (reader, asks) = kv_verbs::Endpoint::open(&node.device, kv_verbs::Role::Reader, 1).unwrap();
    let (other, answers) = kv_verbs::Endpoint::open(&node.device, kv_verbs::Role::Owner, 1).unwrap();
    let _other = other.connect(&asks, std::sync::Arc::new(|| {})).unwrap();
    let wake = std::sync::Arc::new(move || sender.send(()).unwrap_or(()));
    let mut reader = reader.connect(&answers, wake).unwrap();
    let (read, want, into) = (ReadId(1), WantId(1), node.slot(4 << 20));
    assert!(reader.submit(LinkOp::Read { read, want, window: Some(window), record, into }).is_ok());
    reader.kick();
    drop(reader);
    while receiver.try_recv().is_ok() {}
    assert!(common::eventually(|| node.used() <= 1), "its slot is back");
    assert!(receiver.recv_timeout(Duration::from_millis(100)).is_err(), "somebody was called");
}

#[test]
fn a_device_whose_windows_do_not_hold_exposes_by_regions() {
    let Some(node) = node(16, &DeviceConfig { exposure: None, ..config() }) else { return };
    eprintln!("{:?} {:?}", node.device.exposure(), node.device.notes());
    assert_eq!(node.device.exposure() == Exposure::Windows, node.device.notes().is_empty());
    let (mut owner, mut reader) = node.pair();
    let block = node.block(1, 10_000);
    let record = block.record();
    let window = owner.expose(1, block);
    reader.read(1, window, record, node.slot(10_000));
    assert_eq!(reader.ended(1).1, Ok(()));
}

#[test]
fn words_of_the_wrong_end_are_refused() {
    let Some(node) = node(16, &config()) else { return };
    let open = |role| kv_verbs::Endpoint::open(&node.device, role, 1).unwrap();
    let (first, _) = open(kv_verbs::Role::Reader);
    let (_second, words) = open(kv_verbs::Role::Reader);
    let nobody = || std::sync::Arc::new(|| {});
    let error = first.connect(&words, nobody()).err().unwrap();
    assert_eq!(error.to_string(), "the peer's end does not fit: both are the same end of a path");
    let (third, _) = open(kv_verbs::Role::Owner);
    assert_eq!(
        third.connect(&[0; 12], nobody()).err().unwrap().to_string(),
        "the peer's words cannot be used"
    );
}

#[test]
fn memory_of_another_device_is_registered_or_politely_refused() {
    let Some(node) = node(16, &config()) else { return };
    let file = tempfile::tempfile().unwrap();
    use std::os::fd::AsFd;
    match node.device.register_dmabuf(file.as_fd(), 0, 4096) {
        Ok(_) => panic!("a file is no dmabuf"),
        Err(error) => {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            eprintln!("{error}: {source:?}");
        }
    }
}
