//! A real daemon that peers read from which break the rules, vanish, or take nothing of what they asked for.

mod support;

use std::io;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use kv_api::v1;
use kv_block::{BlockKey, Epoch, MissReason, payload};
use kv_wire::message::{
    Answer, Ask, DataAnswer, DataAsk, Grant, Hello, Offer, PathEnd, Probe, ReadId, Refusal, Sight, Want,
    WantId, Welcome,
};
use support::among::{key_of, peer, until, until_nothing_is_left};
use support::wire::{Wire, encoded};
use support::{Door, Home, scope};

const BLOCK: u32 = 64 << 10;

/// The home of a daemon that serves nodes `b`, `c` and `d`, whom it never reaches itself.
fn owner(story: &str, host: &str) -> Home {
    Home::sized(story, host, None)
        .set("node.name=a")
        .set("peers.listen=127.0.0.1:0")
        .set("peers.members=b=127.0.0.1:9,c=127.0.0.1:9,d=127.0.0.1:9")
}

/// A reader that speaks the protocol from its messages alone.
struct Reader {
    address: String,
    control: Wire,
    welcome: Welcome,
}

fn dial(address: &str) -> Wire {
    let wire = Wire::on(TcpStream::connect(address).expect("the port is open"));
    wire.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    wire
}

fn hello(node: &str) -> Hello {
    Hello {
        versions: (1, 1),
        node: node.into(),
        epoch: Epoch(5),
        principals: vec!["default".into()],
        facts: Vec::new(),
    }
}

impl Reader {
    fn greet(address: &str, node: &str) -> Self {
        let mut control = dial(address);
        control.say(&Ask::Hello(hello(node))).unwrap();
        let Answer::Welcome(welcome) = control.hear().unwrap() else { panic!("no welcome") };
        Self { address: address.into(), control, welcome }
    }

    /// A data connection.
    fn join(&self) -> Wire {
        let mut data = dial(&self.address);
        data.say(&DataAsk::Join(self.welcome.session)).unwrap();
        assert_eq!(data.hear::<DataAnswer>().unwrap(), DataAnswer::Joined);
        data
    }

    fn want(&mut self, ids: std::ops::Range<u64>, number: impl Fn(u64) -> u64) {
        self.control.say(&Ask::Want(ids.map(|id| want(id, number(id))).collect())).unwrap();
    }

    /// The next so many grants and misses.
    fn answers(&mut self, count: usize) -> (Vec<Grant>, Vec<(WantId, MissReason)>) {
        let (mut grants, mut misses) = (Vec::new(), Vec::new());
        while grants.len() + misses.len() < count {
            match self.control.hear().unwrap() {
                Answer::Granted(more) => grants.extend(more),
                Answer::Missed(more) => misses.extend(more),
                other => panic!("{other:?}"),
            }
        }
        (grants, misses)
    }

    /// Reads blocks as a reader should; how long the slowest took.
    fn read_well(
        &mut self,
        data: &mut Wire,
        ids: std::ops::Range<u64>,
        number: impl Fn(u64) -> u64,
    ) -> Duration {
        let mut slowest = Duration::ZERO;
        for id in ids {
            let begun = Instant::now();
            self.want(id..id + 1, &number);
            let (grants, misses) = self.answers(1);
            assert!(misses.is_empty(), "{misses:?}");
            let bytes = read(data, ReadId(id), grants[0].id).unwrap().expect("granted");
            assert_eq!(payload::first_wrong_byte(&key_of(number(id)), &bytes), None);
            self.control.say(&Ask::Done(vec![grants[0].id])).unwrap();
            slowest = slowest.max(begun.elapsed());
        }
        slowest
    }
}

fn want(id: u64, number: u64) -> Want {
    Want { id: WantId(id), principal: 0, wait_ms: 2_000, key: key_of(number) }
}

/// A block, or nothing when it is gone.
fn read(data: &mut Wire, read: ReadId, want: WantId) -> io::Result<Option<Vec<u8>>> {
    data.say(&DataAsk::Read(vec![(read, want)]))?;
    match data.hear()? {
        DataAnswer::Gone(gone) => {
            assert_eq!(gone, read);
            Ok(None)
        }
        DataAnswer::Data(of, bytes) => {
            assert_eq!(of, read);
            let mut block = vec![0; bytes as usize];
            io::Read::read_exact(&mut data.stream, &mut block)?;
            Ok(Some(block))
        }
        other => panic!("{other:?}"),
    }
}

fn store(door: &Door, count: u64, bytes: u32) {
    let binding = door.register(&scope("t"), bytes);
    for number in 0..count {
        door.put(&scope("t"), binding, number, bytes, false).expect("put");
    }
}

/// What is held for a node: blocks and bytes.
fn held(door: &Door, node: &str) -> (u64, u64) {
    let peer = peer(door, node);
    (peer.held, peer.held_bytes)
}

/// A daemon with blocks, and where its peers find it.
fn with_blocks<T>(home: &Home, count: u64, bytes: u32, story: impl FnOnce(&Door, &str) -> T) -> T {
    let mut daemon = home.start();
    let door = Door::of(home);
    store(&door, count, bytes);
    let address = home.logged_address("peers are served");
    let told = story(&door, &address);
    until_nothing_is_left(&door, &["b", "c", "d"]);
    // Callers of this node are served as before, and so are its peers.
    let binding = door.register(&scope("t"), bytes);
    for number in 0..count {
        assert_eq!(door.get(&scope("t"), binding, number), Ok(v1::Tier::Host));
    }
    let mut reader = Reader::greet(&address, "d");
    let mut data = reader.join();
    reader.read_well(&mut data, 0..count, |id| id);
    drop((reader, data));
    // Nothing holds them: they can go.
    for number in 0..count {
        until("it can be evicted", || (door.evict(binding, number) == Some(1)).then_some(()));
    }
    assert!(daemon.is_alive());
    told
}

/// The other side hangs up, whatever else it says before.
fn until_hung_up(mut wire: Wire, whom: &str) {
    wire.stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut bytes = [0; 4096];
    loop {
        match io::Read::read(&mut wire.stream, &mut bytes) {
            Ok(0) => return,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return,
            Err(error) => panic!("{whom}: still connected: {error}"),
            Ok(_) => {}
        }
    }
}

#[test]
fn whoever_breaks_a_rule_is_hung_up_on_and_has_nothing_left() {
    type Breach = fn(&mut Reader) -> Vec<u8>;
    let table: [(&str, Breach); 16] = [
        ("wants beyond its credits", |_| encoded(&Ask::Want((100..109).map(|id| want(id, 1)).collect()))),
        ("two wants of one number", |_| {
            // A debug build makes no such message; bytes do.
            let mut all = encoded(&Ask::Want(vec![want(7, 1)]));
            all.extend(encoded(&Ask::Want(vec![want(7, 2)])));
            all
        }),
        ("a number that is granted", |_| encoded(&Ask::Want(vec![want(0, 1)]))),
        ("a want of no principal", |_| encoded(&Ask::Want(vec![Want { principal: 1, ..want(50, 1) }]))),
        ("a probe of no principal", |_| {
            encoded(&Ask::Probe(Probe { id: 1, principal: 9, keys: vec![key_of(1)] }))
        }),
        ("an offer of no principal", |_| {
            encoded(&Ask::Offer(Offer { id: 1, principal: 9, binding: vec![], keys: vec![] }))
        }),
        ("a second hello", |_| encoded(&Ask::Hello(hello("b")))),
        ("words of an owner", |_| encoded(&Answer::Pong(1))),
        ("a join", |reader| encoded(&DataAsk::Join(reader.welcome.session))),
        ("a read", |_| encoded(&DataAsk::Read(vec![(ReadId(1), WantId(0))]))),
        ("garbage", |_| b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()),
        ("a length without end", |_| {
            let mut frame = encoded(&Ask::Ping(1));
            frame[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
            frame
        }),
        ("a wrong checksum", |_| {
            let mut frame = encoded(&Ask::Ping(1));
            frame[16] ^= 1;
            frame
        }),
        ("two offers of one number", |_| {
            let offer = Offer { id: 1, principal: 0, binding: vec![], keys: vec![key_of(9)] };
            encoded(&Ask::Offer(offer)).repeat(2)
        }),
        ("the end of a path that is none", |_| {
            let mut frame = encoded(&Ask::Path(PathEnd { path: 1, words: vec![1] }));
            // Path 0; the checksum is made good again below.
            frame[16] = 0;
            reseal(&mut frame);
            frame
        }),
        ("a kind that is none", |_| {
            let mut frame = encoded(&Ask::Ping(1));
            frame[4] = 0x7f;
            frame
        }),
    ];
    let home = owner("breaks", "16MiB").set("peers.wants_max=8");
    with_blocks(&home, 8, BLOCK, |door, address| {
        for (breach, words) in table {
            let mut reader = Reader::greet(address, "b");
            assert_eq!(reader.welcome.credits.wants_max, 8);
            reader.want(0..2, |id| id);
            assert_eq!(reader.answers(2).0.len(), 2, "{breach}");
            until("it is held", || (held(door, "b") == (2, 2 * u64::from(BLOCK))).then_some(()));
            let words = words(&mut reader);
            reader.control.raw(&words).unwrap();
            until_hung_up(reader.control, breach);
            until("it is let go", || (held(door, "b") == (0, 0)).then_some(()));
        }
    });
}

/// Makes the checksum of a frame right.
fn reseal(frame: &mut [u8]) {
    let (header, body) = frame.split_at_mut(16);
    let mut crc = !0u32;
    for byte in header[..12].iter().chain(body.iter()) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    header[12..].copy_from_slice(&(!crc).to_le_bytes());
}

#[test]
fn strangers_are_refused_with_a_reason() {
    with_blocks(&owner("strangers", "16MiB"), 4, BLOCK, |_, address| {
        for number in 0..100 {
            let mut control = dial(address);
            control.say(&Ask::Hello(hello(&format!("nobody-{number}")))).unwrap();
            let Answer::Refused(refused) = control.hear().unwrap() else { panic!("let in") };
            assert_eq!(refused.why, Refusal::Unknown);
            assert!(refused.text.contains("peers.members"), "{refused:?}");
            until_hung_up(control, "a stranger");
        }
        let mut control = dial(address);
        control.say(&Ask::Hello(Hello { versions: (2, 9), ..hello("b") })).unwrap();
        let Answer::Refused(refused) = control.hear().unwrap() else { panic!("let in") };
        assert_eq!(refused.why, Refusal::Version);
        until_hung_up(control, "a stranger");
        // A data connection shows what it cannot know.
        let reader = Reader::greet(address, "b");
        for session in [0, 1, reader.welcome.session + 1, u128::MAX] {
            let mut data = dial(address);
            data.say(&DataAsk::Join(session)).unwrap();
            let DataAnswer::Refused(refused) = data.hear().unwrap() else { panic!("let in") };
            assert_eq!(refused.why, Refusal::Session);
            until_hung_up(data, "a wrong session");
        }
    });
}

#[test]
fn whoever_vanishes_leaves_nothing_behind() {
    with_blocks(&owner("vanishes", "16MiB"), 8, BLOCK, |door, address| {
        for _ in 0..10 {
            let mut reader = Reader::greet(address, "b");
            let _data = reader.join();
            reader.want(0..8, |id| id);
            assert_eq!(reader.answers(8).0.len(), 8);
            until("they are held", || (held(door, "b").0 == 8).then_some(()));
            drop(reader);
            let gone = Instant::now();
            until("they are let go", || (held(door, "b") == (0, 0)).then_some(()));
            assert!(gone.elapsed() < Duration::from_secs(5), "{:?}", gone.elapsed());
        }
        // It waits for what is not there, and goes.
        let mut reader = Reader::greet(address, "b");
        reader.want(0..8, |id| 1_000 + id);
        drop(reader);
    });
}

#[test]
fn a_grant_ends_by_itself_and_nothing_is_read_that_is_not_granted() {
    let home = owner("lease", "16MiB").set("peers.lease_ttl=500ms");
    with_blocks(&home, 8, BLOCK, |door, address| {
        let mut reader = Reader::greet(address, "b");
        let mut data = reader.join();
        assert_eq!(read(&mut data, ReadId(1), WantId(77)).unwrap(), None, "never wanted");
        reader.want(0..8, |id| id);
        assert_eq!(reader.answers(8).0.len(), 8);
        assert!(read(&mut data, ReadId(2), WantId(0)).unwrap().is_some());
        reader.control.say(&Ask::Done(vec![WantId(1), WantId(1), WantId(500)])).unwrap();
        reader.control.say(&Ask::Ping(1)).unwrap();
        assert_eq!(reader.control.hear::<Answer>().unwrap(), Answer::Pong(1));
        assert_eq!(read(&mut data, ReadId(3), WantId(1)).unwrap(), None, "it is done");
        until("it is told", || (held(door, "b").0 > 0).then_some(()));
        until("the time is over", || (held(door, "b") == (0, 0)).then_some(()));
        assert_eq!(read(&mut data, ReadId(4), WantId(2)).unwrap(), None, "its time is over");
        // The connection lives, and its credit is whole again.
        reader.read_well(&mut data, 100..120, |id| id % 8);
    });
}

#[test]
fn idle_connections_shut_nobody_out() {
    with_blocks(&owner("idle", "16MiB"), 8, BLOCK, |_, address| {
        let mut reader = Reader::greet(address, "b");
        let mut data = reader.join();
        let half = &encoded(&Ask::Hello(hello("c")))[..20];
        let mut idle = Vec::new();
        for number in 0..500 {
            let mut one = dial(address);
            if number % 2 == 0 {
                let _ = one.raw(half);
            }
            idle.push(one);
            if number % 50 == 0 {
                reader.read_well(&mut data, number..number + 8, |id| id % 8);
            }
        }
        // Whoever knows what to say gets in.
        let mut late = Reader::greet(address, "c");
        let mut its_data = late.join();
        late.read_well(&mut its_data, 0..8, |id| id);
        reader.read_well(&mut data, 1_000..1_008, |id| id % 8);
    });
}

#[test]
fn questions_without_end_hold_up_nobody() {
    with_blocks(&owner("questions", "16MiB"), 8, BLOCK, |_, address| {
        let keys: Vec<BlockKey> = (0..4096).map(key_of).collect();
        let mut asker = Reader::greet(address, "b");
        let mut well = Reader::greet(address, "c");
        let mut data = well.join();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                for id in 0..200 {
                    asker.control.say(&Ask::Probe(Probe { id, principal: 0, keys: keys.clone() })).unwrap();
                    let Answer::Found(found) = asker.control.hear().unwrap() else { panic!("no answer") };
                    let here = found.sights.iter().filter(|sight| matches!(sight, Sight::In(_))).count();
                    assert_eq!((found.id, found.sights.len(), here), (id, 4096, 8));
                }
                // It hears no more answers, and goes on asking until it is hung up on.
                let frame = encoded(&Ask::Probe(Probe { id: 1_000, principal: 0, keys: keys.clone() }));
                let limit = Instant::now() + Duration::from_secs(20);
                while asker.control.raw(&frame).is_ok() {
                    assert!(Instant::now() < limit, "it may ask for ever");
                }
            });
            let slowest = well.read_well(&mut data, 0..300, |id| id % 8);
            assert!(slowest < Duration::from_secs(5), "{slowest:?}");
        });
    });
}

/// Longer than what two sockets keep.
const LONG: u32 = 16 << 20;

#[test]
fn whoever_takes_nothing_waits_alone_and_not_for_ever() {
    let home = owner("slow", "128MiB").set("peers.lease_ttl=1s").set("host.region_bytes=16MiB");
    with_blocks(&home, 4, LONG, |door, address| {
        let ask_all = |reader: &mut Reader| {
            let mut data = reader.join();
            reader.want(0..4, |id| id);
            assert_eq!(reader.answers(4).0.len(), 4);
            data.say(&DataAsk::Read((0..4).map(|id| (ReadId(id), WantId(id))).collect())).unwrap();
            data
        };
        // One takes nothing; others are served meanwhile.
        let mut slow = Reader::greet(address, "b");
        let slow_data = ask_all(&mut slow);
        let mut well = Reader::greet(address, "c");
        let mut data = well.join();
        let slowest = well.read_well(&mut data, 0..8, |id| id % 4);
        assert!(slowest < Duration::from_secs(10), "{slowest:?}");
        drop((slow, slow_data));
        // Another one goes, but its data connection stays.
        let mut slow = Reader::greet(address, "b");
        let slow_data = ask_all(&mut slow);
        until("a write is under way", || (held(door, "b").0 > 0).then_some(()));
        drop(slow);
        let gone = Instant::now();
        until("they are let go", || (held(door, "b") == (0, 0)).then_some(()));
        assert!(gone.elapsed() < Duration::from_secs(5), "{:?}", gone.elapsed());
        until_hung_up(slow_data, "a slow reader");

        // One takes a little now and then, for longer than it may.
        let mut slow = Reader::greet(address, "b");
        let mut slow_data = ask_all(&mut slow);
        until("it is held", || (held(door, "b").0 > 0).then_some(()));
        let begun = Instant::now();
        let mut bytes = vec![0; 32 << 10];
        while held(door, "b") != (0, 0) {
            assert!(begun.elapsed() < Duration::from_secs(25), "held for as long as it likes");
            if matches!(io::Read::read(&mut slow_data.stream, &mut bytes), Ok(0) | Err(_)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        drop(slow);
    });
}

#[test]
fn a_reader_is_counted_once_however_often_it_comes() {
    with_blocks(&owner("counts", "16MiB"), 8, BLOCK, |door, address| {
        let mut first = Reader::greet(address, "b");
        let mut first_data = first.join();
        first.read_well(&mut first_data, 0..8, |id| id);
        let mut second = Reader::greet(address, "b");
        let mut second_data = second.join();
        second.read_well(&mut second_data, 0..8, |id| id);
        first.want(100..103, |id| id % 8);
        assert_eq!(first.answers(3).0.len(), 3);
        std::thread::sleep(Duration::from_millis(600));
        for _ in 0..20 {
            let seen = peer(door, "b");
            assert_eq!((seen.blocks_out, seen.held, seen.reads_here), (19, 3, true), "{seen:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
        // There may be a few connections that nobody has ended yet, and no more.
        let more = [(); 2].map(|()| Reader::greet(address, "b"));
        let mut fifth = dial(address);
        fifth.say(&Ask::Hello(hello("b"))).unwrap();
        let Answer::Refused(refused) = fifth.hear().unwrap() else { panic!("let in") };
        assert_eq!(refused.why, Refusal::Full);
        drop((more, fifth));
        drop(first);
        until("its own are let go", || (peer(door, "b").held == 0).then_some(()));
        std::thread::sleep(Duration::from_millis(600));
        let seen = peer(door, "b");
        assert_eq!((seen.blocks_out, seen.reads_here), (19, true), "{seen:?}");
    });
}

/// What a peer says that a scope is.
fn record(id: &kv_block::ScopeId, block_bytes: u32, tenant: &str) -> Vec<u8> {
    let slice = support::slice();
    let tag = id.binding_tag(&slice, block_bytes).0;
    let scope = kv_block::Scope { model: "nonsense".into(), tenant: tenant.into(), ..Default::default() };
    let kept = serde_json::json!({
        "tag": tag, "scope_id": id.to_string(), "block_bytes": block_bytes, "scope": scope, "slice": slice,
    });
    kept.to_string().into_bytes()
}

#[test]
fn a_peer_that_offers_made_up_scopes_takes_no_numbers_away_and_chooses_no_tenant() {
    let home = owner("offers", "16MiB");
    let _daemon = home.start();
    let door = Door::of(&home);
    let address = home.logged_address("peers are served");
    let mut reader = Reader::greet(&address, "b");
    let mut offer = |id: u64, binding: Vec<u8>| {
        reader.control.say(&Ask::Offer(Offer { id, principal: 0, binding, keys: vec![key_of(9)] })).unwrap();
        let answer = reader.control.hear().unwrap();
        assert!(matches!(answer, Answer::Taken(taken) if (taken.id, taken.taken) == (id, 0)), "{answer:?}");
    };
    offer(1, record(&scope("t").id(), BLOCK, "somebody-else"));
    offer(2, record(&scope("u").id(), 0, "u"));
    offer(3, record(&scope("u").id(), 1 << 31, "u"));
    for id in 4..304 {
        let made_up = kv_block::Scope { salt: id.to_string(), ..scope("u") };
        offer(id, record(&made_up.id(), BLOCK, "u"));
    }
    assert_eq!(door.register(&scope("new"), BLOCK), 256, "those of before have one number each");
    let binding = door.register(&scope("t"), BLOCK);
    door.put(&scope("t"), binding, 1, BLOCK, false).expect("put");
    let tenants = door.runtime.block_on(async { door.admin().list_tenants(v1::ListTenantsRequest {}).await });
    let tenants = tenants.expect("tenants").into_inner().tenants;
    let blocks =
        |name: &str| tenants.iter().filter(|row| row.tenant == name).map(|row| row.blocks).sum::<u64>();
    assert_eq!((blocks("t"), blocks("somebody-else")), (1, 0), "{tenants:?}");
}
