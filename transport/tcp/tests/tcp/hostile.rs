//! Peers that break the rules, and strangers.

use std::net::TcpListener;
use std::time::Duration;

use kv_tcp::Limits;
use kv_transport::link::{Link, LinkDone, LinkError};
use kv_wire::frame::{HEADER_BYTES, Message};
use kv_wire::message::{Answer, Ask, DataAnswer, DataAsk, ReadId, Refusal, WantId};

use crate::support::{
    Bare, Driven, Nodes, PATIENCE, SESSION, asked, assert_is, block, block_on, hello, patient, scripted,
};

#[test]
fn a_flood_of_silent_connections_stops_nobody() {
    let limits = Limits { unproven_max: 20, per_source_max: 60, ..patient() };
    let mut nodes = Nodes::plain(limits);
    let (_says, _hears, early) = nodes.control();
    let mut owner = nodes.owner_link();
    let mut reader = nodes.reader_link();
    let (held, record) = block(nodes.owner.slab(), 1, 4096);
    owner.expose(1, &held);
    reader.read(1, 1, record, nodes.reader.slab().take(4096).unwrap());
    assert_eq!(reader.read_one().2, Ok(()), "before");
    // All of them from this host, like the honest ones.
    let mut flood: Vec<Bare> = (0..200).map(|_| Bare::dial(nodes.address())).collect();
    let (mut says, _hears, late) = nodes.control();
    reader.read(2, 1, record, nodes.reader.slab().take(4096).unwrap());
    let (_, slot, result) = reader.read_one();
    assert_eq!(result, Ok(()), "those inside do not notice");
    assert_is(&record, &slot);
    let another = Driven::new(|wake| nodes.dialer.link(nodes.address(), "owner", SESSION, wake).unwrap());
    let mut another = another;
    another.read(1, 1, record, slot);
    assert_eq!(another.read_one().2, Ok(()), "newcomers get in");
    block_on(&nodes.runtime, async {
        says.say(&[Ask::Ping(1)]).await.unwrap();
        let (_answers, mut asks) = late.control.split();
        assert_eq!(asks.hear().await.unwrap(), Ask::Ping(1));
        let (mut answers, _asks) = early.control.split();
        answers.say(&[Answer::Leaving]).await.unwrap();
    });
    // The oldest were sent out.
    flood.drain(..150).for_each(Bare::assert_closed);
}

#[test]
fn who_does_not_say_what_it_is_in_time_is_sent_out() {
    let nodes = Nodes::plain(Limits { handshake: Duration::from_millis(100), ..patient() });
    let silent = Bare::dial(nodes.address());
    let mut slow = Bare::dial(nodes.address());
    slow.send(b"kv");
    silent.assert_closed();
    slow.assert_closed();
}

#[test]
fn a_wrong_first_frame_ends_the_connection() {
    let mut nodes = Nodes::plain(patient());
    let _owner = nodes.owner_link();
    let mut firsts: Vec<Vec<u8>> = vec![b"GET / HTTP/1.1\r\nHost: kvd\r\n\r\n".to_vec(), vec![0; 64]];
    let mut put = |message: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = Vec::new();
        message(&mut bytes);
        firsts.push(bytes);
    };
    put(&|out| Ask::Ping(1).encode(out));
    put(&|out| DataAsk::Read(vec![(ReadId(1), WantId(1))]).encode(out));
    put(&|out| DataAnswer::Joined.encode(out));
    put(&|out| {
        Ask::Hello(hello()).encode(out);
        let last = out.len() - 1;
        out[last] ^= 1;
    });
    // A header that promises more than a stranger may send.
    put(&|out| {
        Ask::Done(vec![WantId(1); 4000]).encode(out);
        out.truncate(HEADER_BYTES);
    });
    for first in firsts {
        let mut bare = Bare::dial(nodes.address());
        bare.send(&first);
        bare.assert_closed();
    }
    let mut wrong = Bare::dial(nodes.address());
    wrong.say(&DataAsk::Join(SESSION + 1));
    let DataAnswer::Refused(refused) = wrong.hear() else { panic!("not refused") };
    assert_eq!(refused.why, Refusal::Session);
    wrong.assert_closed();
    assert!(nodes.accepted.try_recv().is_err(), "none of them counts as a reader");
}

#[test]
fn a_reader_that_breaks_the_rules_loses_its_connection() {
    let nodes = Nodes::plain(Limits { rejoin: PATIENCE, ..patient() });
    let mut owner = nodes.owner_link();
    let (held, _) = block(nodes.owner.slab(), 1, 16 << 20);
    owner.expose(1, &held);
    let mut garbage = Bare::join(nodes.address());
    garbage.send(&[7; 100]);
    garbage.assert_closed();
    let mut again = Bare::join(nodes.address());
    again.say(&DataAsk::Join(SESSION));
    again.assert_closed();
    let mut twice = Bare::join(nodes.address());
    twice.say(&DataAsk::Read(vec![(ReadId(1), WantId(1)), (ReadId(1), WantId(1))]));
    twice.assert_closed();
    let mut later = Bare::join(nodes.address());
    let mut bytes = Vec::new();
    DataAsk::Read(vec![(ReadId(1), WantId(1))]).encode(&mut bytes);
    DataAsk::Read(vec![(ReadId(1), WantId(1))]).encode(&mut bytes);
    later.send(&bytes);
    later.assert_closed();
    // A number is free again when its answer is there.
    let mut honest = Bare::join(nodes.address());
    for _ in 0..3 {
        honest.say(&DataAsk::Read(vec![(ReadId(1), WantId(9))]));
        assert_eq!(honest.hear::<DataAnswer>(), DataAnswer::Gone(ReadId(1)));
    }
}

#[test]
fn an_owner_that_breaks_the_rules_fails_the_reads_of_that_connection() {
    type Lie = fn(&mut Bare);
    let lies: [(&str, Lie); 5] = [
        ("not asked for", |bare| bare.say(&DataAnswer::Data(ReadId(77), 8192))),
        ("not asked for", |bare| bare.say(&DataAnswer::Gone(ReadId(77)))),
        ("that is none", |bare| bare.send(b"HTTP/1.1 200 OK\r\n\r\n")),
        ("that is none", |bare| bare.say(&Answer::Pong(1))),
        ("a join that was answered", |bare| bare.say(&DataAnswer::Joined)),
    ];
    for (what, lie) in lies {
        let nodes = Nodes::plain(Limits { bulk_connections: 1, ..patient() });
        let (mut reader, mut bares, listener) = scripted(&nodes, 2);
        drop(listener);
        let (_held, record) = block(nodes.owner.slab(), 1, 8192);
        reader.read(1, 1, record, nodes.reader.slab().take(8192).unwrap());
        reader.link.kick();
        let (mut liar, _) = asked(&mut bares);
        lie(&mut liar);
        match reader.read_one().2 {
            Err(LinkError::Protocol { what: found }) => assert!(found.contains(what), "{found}"),
            other => panic!("{what}: {other:?}"),
        }
        liar.assert_closed();
        drop(bares);
        assert!(matches!(reader.one(), LinkDone::Broken { .. }), "nobody listens there any more");
    }
}

#[test]
fn an_owner_that_never_answers_is_given_up() {
    let nodes = Nodes::plain(Limits { handshake: Duration::from_millis(200), ..patient() });
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let mut reader = Driven::new(|wake| nodes.dialer.link(to, "owner", SESSION, wake).unwrap());
    let (_held, record) = block(nodes.owner.slab(), 1, 8192);
    reader.read(1, 1, record, nodes.reader.slab().take(8192).unwrap());
    let (_, _, result) = reader.read_one();
    assert!(matches!(result, Err(LinkError::Path { .. })), "{result:?}");
    assert!(reader.broken().to_string().contains("did not answer in time"));
}

#[test]
fn an_owner_that_lets_in_and_sends_out_is_given_up() {
    let nodes = Nodes::plain(patient());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let door = std::thread::spawn(move || {
        // All connections of a link, each once; a link that tried for ever would find nobody afterwards.
        (0..5).for_each(|_| drop(Bare::joined_by_reader(&listener)));
        listener
    });
    let mut reader = Driven::new(|wake| nodes.dialer.link(to, "owner", SESSION, wake).unwrap());
    assert!(matches!(reader.broken(), LinkError::Path { .. }));
    drop(door.join().unwrap());
}
