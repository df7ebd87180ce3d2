//! Blocks.

use std::net::TcpListener;
use std::time::Duration;

use kv_block::Checksum;
use kv_tcp::Limits;
use kv_transport::link::{Link, LinkDone, LinkError, LinkOp};
use kv_wire::frame::DATA_FRAME_BYTES;
use kv_wire::message::{DataAnswer, DataAsk, ReadId, WantId};

use crate::support::{
    Bare, Driven, Nodes, SESSION, asked, assert_is, block, eventually, holds, patient, scripted, slots_used,
};

#[test]
fn every_byte_of_every_size_comes_through() {
    Nodes::each(&patient(), |nodes| {
        let (mut owner, mut reader) = (nodes.owner_link(), nodes.reader_link());
        let kib = 1 << 10;
        let sizes = [
            1,
            31,
            4095,
            4096,
            4097,
            8191,
            8193,
            16 * kib,
            64 * kib - 1,
            64 * kib,
            64 * kib + 1,
            100_003,
            256 * kib - 1,
            256 * kib,
            256 * kib + 33,
            1024 * kib,
            1024 * kib + 3,
            2048 * kib,
            5_000_011,
            16 << 20,
        ];
        let mut records = Vec::new();
        for (want, &bytes) in sizes.iter().enumerate() {
            let (held, record) = block(nodes.owner.slab(), want as u64, bytes);
            owner.expose(want as u64, &held);
            records.push(record);
        }
        // Twice, in both orders: blocks of all lengths behind and before each other on every connection.
        let orders = (0..sizes.len()).chain((0..sizes.len()).rev());
        for (read, want) in orders.clone().enumerate() {
            let slot = nodes.reader.slab().take(records[want].bytes).unwrap();
            reader.read(read as u64, want as u64, records[want], slot);
        }
        let wants: Vec<usize> = orders.collect();
        for done in reader.until(wants.len()) {
            let LinkDone::Read { read, into, result } = done else { panic!("{done:?}") };
            assert_eq!(result, Ok(()));
            assert_is(&records[wants[read.0 as usize]], &into);
        }
        assert_eq!((reader.link.usage().in_flight, reader.link.usage().bytes), (0, 0));
        for want in 0..sizes.len() as u64 {
            owner.submit(LinkOp::Conceal { want: WantId(want) });
        }
        owner.until(sizes.len());
        assert_eq!((owner.link.usage().in_flight, owner.link.usage().bytes), (0, 0));
    });
}

#[test]
fn ten_thousand_small_reads_in_one_call() {
    Nodes::each(&patient(), |nodes| {
        let (mut owner, mut reader) = (nodes.owner_link(), nodes.reader_link());
        let (count, blocks) = (10_000, 100);
        let records: Vec<_> = (0..blocks)
            .map(|want| {
                let (held, record) = block(nodes.owner.slab(), want, 4096);
                owner.expose(want, &held);
                record
            })
            .collect();
        for read in 0..count {
            let slot = nodes.reader.slab().take(4096).unwrap();
            reader.read(read, read % blocks, records[(read % blocks) as usize], slot);
        }
        for done in reader.until(count as usize) {
            let LinkDone::Read { read, into, result: Ok(()) } = done else { panic!("{done:?}") };
            assert_is(&records[(read.0 % blocks) as usize], &into);
        }
    });
}

#[test]
fn what_is_not_exposed_is_gone() {
    Nodes::each(&patient(), |nodes| {
        let (mut owner, mut reader) = (nodes.owner_link(), nodes.reader_link());
        let (held, record) = block(nodes.owner.slab(), 1, 5000);
        let slot = nodes.reader.slab().take(5000).unwrap();
        reader.read(1, 1, record, slot);
        let (_, slot, result) = reader.read_one();
        assert_eq!(result, Err(LinkError::Gone));
        owner.expose(1, &held);
        reader.read(2, 1, record, slot);
        let (_, slot, result) = reader.read_one();
        assert_eq!(result, Ok(()));
        owner.submit(LinkOp::Conceal { want: WantId(1) });
        assert!(matches!(owner.one(), LinkDone::Concealed { want: WantId(1), .. }));
        reader.read(3, 1, record, slot);
        assert_eq!(reader.read_one().2, Err(LinkError::Gone));
    });
}

#[test]
fn other_bytes_than_the_records_are_corrupt_and_the_connection_goes_on() {
    Nodes::each(&patient(), |nodes| {
        let (mut owner, mut reader) = (nodes.owner_link(), nodes.reader_link());
        for bytes in [4096, 3 << 20] {
            let want = u64::from(bytes);
            let (held, record) = block(nodes.owner.slab(), want, bytes);
            owner.expose(want, &held);
            let mut wrong = record;
            wrong.checksum = Checksum(wrong.checksum.0 ^ 1);
            let slot = nodes.reader.slab().take(bytes).unwrap();
            reader.read(1, want, wrong, slot);
            let (_, slot, result) = reader.read_one();
            assert_eq!(result, Err(LinkError::Corrupt));
            reader.read(2, want, record, slot);
            let (_, slot, result) = reader.read_one();
            assert_eq!(result, Ok(()));
            assert_is(&record, &slot);
        }
    });
}

#[test]
fn a_block_of_another_length_is_corrupt_and_the_connection_goes_on() {
    let nodes = Nodes::plain(Limits { bulk_connections: 1, ..patient() });
    let (mut owner, mut reader) = (nodes.owner_link(), nodes.reader_link());
    let (held, record) = block(nodes.owner.slab(), 1, 200_000);
    owner.expose(1, &held);
    for (read, bytes) in [(1, record.bytes - 1), (2, record.bytes + 1), (3, record.bytes)] {
        let slot = nodes.reader.slab().take(record.bytes + 1).unwrap();
        reader.read(read, 1, kv_block::Record { bytes, ..record }, slot);
    }
    let results: Vec<_> = (0..3).map(|_| reader.read_one()).map(|(read, _, result)| (read, result)).collect();
    assert_eq!(results, [(1, Err(LinkError::Corrupt)), (2, Err(LinkError::Corrupt)), (3, Ok(()))]);
}

#[test]
fn small_reads_end_while_long_ones_cannot() {
    // An owner that never sends a long block to its end.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let nodes = Nodes::plain(Limits { bulk_connections: 1, ..patient() });
    let to = listener.local_addr().unwrap();
    let mut reader = Driven::new(|wake| nodes.dialer.link(to, "owner", SESSION, wake).unwrap());
    let mut bares = [Bare::joined_by_reader(&listener), Bare::joined_by_reader(&listener)].map(Some);
    let (_long, long_record) = block(nodes.owner.slab(), 1, 4 << 20);
    let (small, small_record) = block(nodes.owner.slab(), 2, 4096);
    reader.read(1, 1, long_record, nodes.reader.slab().take(4 << 20).unwrap());
    reader.read(2, 2, small_record, nodes.reader.slab().take(4096).unwrap());
    reader.link.kick();
    for bare in &mut bares {
        let mut this = bare.take().unwrap();
        match this.hear::<DataAsk>() {
            DataAsk::Read(reads) if reads == [(ReadId(1), WantId(1))] => {
                this.say(&DataAnswer::Data(ReadId(1), 4 << 20));
                this.send(&[0; 1 << 20]);
            }
            DataAsk::Read(reads) if reads == [(ReadId(2), WantId(2))] => {
                this.say(&DataAnswer::Data(ReadId(2), 4096));
                this.send(&small);
            }
            other => panic!("{other:?}"),
        }
        *bare = Some(this);
    }
    let (read, slot, result) = reader.read_one();
    assert_eq!((read, result), (2, Ok(())));
    assert_is(&small_record, &slot);
}

#[test]
fn a_cancelled_read_gives_its_slot_back_in_the_middle_of_its_bytes() {
    let nodes = Nodes::plain(Limits { bulk_connections: 1, ..patient() });
    let (mut reader, mut bares, _listener) = scripted(&nodes, 2);
    let bytes = 4 << 20;
    let (first, record) = block(nodes.owner.slab(), 1, bytes);
    let (second, other) = block(nodes.owner.slab(), 2, bytes);
    for read in [1, 2] {
        let slot = nodes.reader.slab().take(bytes).unwrap();
        reader.read(read, read, if read == 1 { record } else { other }, slot);
    }
    reader.link.kick();
    let (mut bare, reads) = asked(&mut bares);
    assert_eq!(reads, [(ReadId(1), WantId(1)), (ReadId(2), WantId(2))]);
    bare.say(&DataAnswer::Data(ReadId(1), bytes));
    bare.send(&first[..1 << 20]);
    reader.submit(LinkOp::Cancel { read: ReadId(1) });
    let (read, slot, result) = reader.read_one();
    assert_eq!((read, result), (1, Err(LinkError::Cancelled)));
    drop(slot);
    assert_eq!(slots_used(nodes.reader.slab()), 1);
    // Again, and one that never was: nothing happens.
    reader.submit(LinkOp::Cancel { read: ReadId(1) });
    reader.submit(LinkOp::Cancel { read: ReadId(99) });
    bare.send(&first[1 << 20..]);
    bare.say(&DataAnswer::Data(ReadId(2), bytes));
    bare.send(&second);
    let (read, slot, result) = reader.read_one();
    assert_eq!((read, result), (2, Ok(())));
    assert_is(&other, &slot);
}

#[test]
fn a_cancelled_read_gives_its_slot_back_before_its_bytes_come() {
    let nodes = Nodes::plain(Limits { bulk_connections: 1, window_bytes: 4 << 20, ..patient() });
    let (mut reader, mut bares, _listener) = scripted(&nodes, 2);
    let (held, record) = block(nodes.owner.slab(), 1, 4 << 20);
    // The first two fill the window, the last is not asked for.
    for read in 1..4 {
        let slot = nodes.reader.slab().take(4 << 20).unwrap();
        reader.read(read, 1, record, slot);
    }
    reader.link.kick();
    let (mut bare, reads) = asked(&mut bares);
    assert_eq!(reads, [(ReadId(1), WantId(1))]);
    for read in [3, 1] {
        reader.submit(LinkOp::Cancel { read: ReadId(read) });
        let (found, _, result) = reader.read_one();
        assert_eq!((found, result), (read, Err(LinkError::Cancelled)));
    }
    // What was asked for still comes, is thrown away, and makes room.
    bare.say(&DataAnswer::Data(ReadId(1), 4 << 20));
    bare.send(&held);
    assert_eq!(bare.hear::<DataAsk>(), DataAsk::Read(vec![(ReadId(2), WantId(1))]));
    bare.say(&DataAnswer::Data(ReadId(2), 4 << 20));
    bare.send(&held);
    let (found, slot, result) = reader.read_one();
    assert_eq!((found, result), (2, Ok(())));
    assert_is(&record, &slot);
}

#[test]
fn a_connection_that_breaks_takes_its_own_reads_and_is_made_again() {
    let nodes = Nodes::plain(Limits { bulk_connections: 1, ..patient() });
    let (mut reader, mut bares, listener) = scripted(&nodes, 2);
    let bytes = 4 << 20;
    let (held, record) = block(nodes.owner.slab(), 1, bytes);
    reader.read(1, 1, record, nodes.reader.slab().take(bytes).unwrap());
    reader.link.kick();
    let (mut bare, _) = asked(&mut bares);
    bare.say(&DataAnswer::Data(ReadId(1), bytes));
    bare.send(&held[..1 << 20]);
    drop(bare);
    let (_, slot, result) = reader.read_one();
    assert!(matches!(result, Err(LinkError::Path { .. })), "{result:?}");
    // The next one goes by the connection that is left, if the lost one is not there again before.
    reader.read(2, 1, record, slot);
    reader.link.kick();
    let (mut bare, reads) = asked(&mut bares);
    assert_eq!(reads, [(ReadId(2), WantId(1))]);
    bare.say(&DataAnswer::Data(ReadId(2), bytes));
    bare.send(&held);
    assert_eq!(reader.read_one().2, Ok(()));
    // Something to read made it try again.
    let _again = Bare::joined_by_reader(&listener);
}

#[test]
fn a_connection_on_which_nothing_comes_is_cut_and_made_again() {
    let silence = Duration::from_millis(200);
    let nodes = Nodes::plain(Limits { bulk_connections: 1, silence, ..patient() });
    let (mut reader, mut bares, listener) = scripted(&nodes, 2);
    let bytes = 1 << 20;
    let (held, record) = block(nodes.owner.slab(), 1, bytes);
    reader.read(1, 1, record, nodes.reader.slab().take(bytes).unwrap());
    reader.link.kick();
    let (mut hangs, _) = asked(&mut bares);
    hangs.say(&DataAnswer::Data(ReadId(1), bytes));
    hangs.send(&held[..1000]);
    let (_, slot, result) = reader.read_one();
    let Err(LinkError::Path { what }) = result else { panic!("{result:?}") };
    assert_eq!(what, "the owner sent nothing for 200ms of what it was asked for");
    hangs.assert_closed();
    reader.read(2, 1, record, slot);
    reader.link.kick();
    let _again = Bare::joined_by_reader(&listener);
}

#[test]
fn a_read_stays_off_a_connection_that_owes_the_bytes_of_one_that_was_cancelled() {
    let nodes = Nodes::plain(Limits { bulk_connections: 2, ..patient() });
    let (mut reader, mut bares, _listener) = scripted(&nodes, 3);
    let bytes = 1 << 20;
    let (held, record) = block(nodes.owner.slab(), 1, bytes);
    reader.read(1, 1, record, nodes.reader.slab().take(bytes).unwrap());
    reader.link.kick();
    let (slow, _) = asked(&mut bares);
    reader.submit(LinkOp::Cancel { read: ReadId(1) });
    let (_, mut slot, result) = reader.read_one();
    assert_eq!(result, Err(LinkError::Cancelled));
    let slow_address = slow.0.peer_addr().unwrap();
    let mut slow = Some(slow);
    for number in 2.. {
        reader.read(number, 1, record, slot);
        reader.link.kick();
        let (mut bare, reads) = asked(&mut bares);
        assert_eq!(reads, [(ReadId(number), WantId(1))]);
        bare.say(&DataAnswer::Data(ReadId(number), bytes));
        bare.send(&held);
        slot = reader.read_one().1;
        let came_by = bare.0.peer_addr().unwrap();
        bares.push(bare);
        match slow.take() {
            Some(mut slow) => {
                assert_ne!(came_by, slow_address);
                // Once that is answered, it is as good as the others, and the first of them.
                slow.say(&DataAnswer::Gone(ReadId(1)));
                bares.push(slow);
            }
            None if came_by == slow_address => break,
            None => assert!(number < 1000, "it is left alone for ever"),
        }
    }
}

#[test]
fn a_concealed_block_comes_back_when_its_write_is_over() {
    let nodes = Nodes::plain(patient());
    let mut owner = nodes.owner_link();
    let bytes = 16 << 20;
    let (held, record) = block(nodes.owner.slab(), 1, bytes);
    owner.expose(1, &held);
    let mut bare = Bare::join(nodes.address());
    bare.say(&DataAsk::Read(vec![(ReadId(1), WantId(1)), (ReadId(2), WantId(1))]));
    assert_eq!(bare.hear::<DataAnswer>(), DataAnswer::Data(ReadId(1), bytes));
    owner.submit(LinkOp::Conceal { want: WantId(1) });
    assert_eq!(owner.poll(), 0, "the kernel does not take 16 MiB, so the write is under way");
    assert!(kv_block::payload::first_wrong_byte(&record.key, &bare.bytes(bytes as usize)).is_none());
    match owner.one() {
        LinkDone::Concealed { want: WantId(1), block } => drop(block),
        other => panic!("{other:?}"),
    }
    assert_eq!(bare.hear::<DataAnswer>(), DataAnswer::Gone(ReadId(2)), "no read begins after a conceal");
    assert_eq!(holds(nodes.owner.slab(), &held), 1);
}

#[test]
fn a_reader_that_does_not_read_is_cut_and_stalls_nobody() {
    let limits = Limits { stall: Duration::from_millis(300), ..patient() };
    let nodes = Nodes::plain(limits);
    let (mut owner, bytes) = (nodes.owner_link(), 16 << 20);
    let (held, record) = block(nodes.owner.slab(), 1, bytes);
    owner.expose(1, &held);
    let mut stuck = Bare::join(nodes.address());
    stuck.say(&DataAsk::Read(vec![(ReadId(1), WantId(1))]));
    assert_eq!(stuck.hear::<DataAnswer>(), DataAnswer::Data(ReadId(1), bytes));
    let mut reader = nodes.reader_link();
    reader.read(1, 1, record, nodes.reader.slab().take(bytes).unwrap());
    assert_eq!(reader.read_one().2, Ok(()));
    owner.submit(LinkOp::Conceal { want: WantId(1) });
    match owner.one() {
        LinkDone::Concealed { want: WantId(1), block } => drop(block),
        other => panic!("{other:?}"),
    }
    assert_eq!(holds(nodes.owner.slab(), &held), 1);
    stuck.assert_closed();
}

#[test]
fn a_link_dropped_in_mid_transfer_gives_all_memory_back() {
    Nodes::each(&patient(), |nodes| {
        for owner_first in [true, false] {
            let (mut owner, mut reader) = (nodes.owner_link(), nodes.reader_link());
            let (held, record) = block(nodes.owner.slab(), 1, 16 << 20);
            owner.expose(1, &held);
            for read in 0..4 {
                reader.read(read, 1, record, nodes.reader.slab().take(16 << 20).unwrap());
            }
            assert_eq!(reader.read_one().2, Ok(()));
            if owner_first {
                drop(owner);
                for done in reader.until(3) {
                    assert!(matches!(done, LinkDone::Read { .. }), "{done:?}");
                }
                reader.broken();
                drop(reader);
            } else {
                drop(reader);
                match owner.one() {
                    LinkDone::Concealed { want: WantId(1), block } => drop(block),
                    other => panic!("{other:?}"),
                }
                assert!(matches!(owner.one(), LinkDone::Broken { .. }));
                drop(owner);
            }
            eventually("the reader's slots are free", || slots_used(nodes.reader.slab()) == 0);
            eventually("only this test holds the block", || holds(nodes.owner.slab(), &held) == 1);
            let slab = nodes.owner.slab();
            let (id, generation) = (held.id(), held.generation());
            drop(held);
            slab.retire(id, generation).unwrap();
            slab.sweep(&kv_arena::HazardSet::new());
        }
    });
}

#[test]
fn what_a_broken_link_was_given_comes_back_before_it_says_so() {
    let nodes = Nodes::plain(patient());
    let (_held, record) = block(nodes.owner.slab(), 1, 4096);
    // An owner that takes the connections, says nothing, and is gone.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let mut reader = Driven::new(|wake| nodes.dialer.link(to, "owner", SESSION, wake).unwrap());
    reader.read(1, 1, record, nodes.reader.slab().take(4096).unwrap());
    reader.link.kick();
    reader.read(2, 1, record, nodes.reader.slab().take(4096).unwrap());
    drop(listener);
    let done = reader.until_polled(3);
    for done in &done[..2] {
        assert!(matches!(done, LinkDone::Read { result: Err(LinkError::Path { .. }), .. }), "{done:?}");
    }
    assert!(matches!(done[2], LinkDone::Broken { .. }), "{:?}", done[2]);
    let into = nodes.reader.slab().take(4096).unwrap();
    let op = LinkOp::Read { read: ReadId(3), want: WantId(1), window: None, record, into };
    assert!(matches!(reader.link.submit(op), Err(LinkOp::Read { read: ReadId(3), .. })));
}

#[test]
fn no_more_is_taken_than_the_limits_say() {
    let nodes = Nodes::plain(Limits { reads_max: 2, exposures_max: 1, ..patient() });
    let (mut owner, mut reader) = (nodes.owner_link(), nodes.reader_link());
    let (held, record) = block(nodes.owner.slab(), 1, 4096);
    owner.expose(1, &held);
    let back = owner.link.submit(LinkOp::Expose { want: WantId(2), block: held });
    assert!(matches!(back, Err(LinkOp::Expose { want: WantId(2), .. })));
    let slot = || nodes.reader.slab().take(4096).unwrap();
    reader.read(1, 1, record, slot());
    reader.read(2, 1, record, slot());
    let op = LinkOp::Read { read: ReadId(3), want: WantId(1), window: None, record, into: slot() };
    assert!(reader.link.submit(op).is_err());
    reader.submit(LinkOp::Cancel { read: ReadId(9) });
    reader.until(2);
    reader.read(4, 1, record, slot());
    assert_eq!(reader.read_one().2, Ok(()));
}

#[test]
fn an_end_that_cannot_do_something_says_so() {
    let nodes = Nodes::plain(patient());
    let (mut owner, mut reader) = (nodes.owner_link(), nodes.reader_link());
    let (held, record) = block(nodes.owner.slab(), 1, 10_000);
    reader.submit(LinkOp::Expose { want: WantId(1), block: held.clone() });
    assert!(matches!(reader.one(), LinkDone::Exposed { result: Err(LinkError::Unsupported { .. }), .. }));
    let into = nodes.reader.slab().take(10_000).unwrap();
    owner.submit(LinkOp::Read { read: ReadId(1), want: WantId(1), window: None, record, into });
    assert!(matches!(owner.one(), LinkDone::Read { result: Err(LinkError::Unsupported { .. }), .. }));
    reader.read(1, 1, record, nodes.reader.slab().take(4096).unwrap());
    assert!(matches!(reader.read_one().2, Err(LinkError::Unsupported { .. })));
    owner.expose(1, &held);
    owner.submit(LinkOp::Expose { want: WantId(1), block: held });
    assert!(matches!(owner.one(), LinkDone::Exposed { result: Err(LinkError::Protocol { .. }), .. }));
    assert_eq!(DATA_FRAME_BYTES, 32);
}
