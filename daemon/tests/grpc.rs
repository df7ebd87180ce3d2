//! The gRPC door by itself, with generated messages alone: what any language can do, and that all of it ends.

mod support;

use std::time::{Duration, Instant};

use kv_api::v1;
use kv_block::code::Code;
use kv_block::{SequenceHash, payload};
use support::{Door, Home, scope, slice};

const BYTES: u32 = 64 << 10;
const LARGE: u32 = 16 << 20;
const SOON: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(20);

fn code(status: &tonic::Status) -> Code {
    kv_api::fault::from_status(status).code
}

/// A request that says how long it may take.
fn within<T>(limit: Duration, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(limit);
    request
}

fn named(binding: u32, number: u64) -> v1::Names {
    v1::Names {
        binding,
        sequence_hashes: vec![SequenceHash::from(number).as_bytes().to_vec().into()],
        keys: Vec::new(),
    }
}

/// The first message of a put; the bytes follow.
fn header(session: u64, binding: u32, number: u64) -> v1::PutRequest {
    let header = v1::PutHeader {
        session,
        binding,
        sequence_hash: SequenceHash::from(number).as_bytes().to_vec().into(),
        ..v1::PutHeader::default()
    };
    v1::PutRequest { header: Some(header), chunk: bytes::Bytes::new() }
}

/// The bytes of a block, in messages of this length.
fn pieces(number: u64, bytes: u32, piece: usize) -> Vec<v1::PutRequest> {
    let mut body = vec![0; bytes as usize];
    payload::fill(&scope("a").id().block_key(&SequenceHash::from(number), &slice()), &mut body);
    let one = |piece: &[u8]| v1::PutRequest { header: None, chunk: bytes::Bytes::copy_from_slice(piece) };
    body.chunks(piece).map(one).collect()
}

/// Opens a session: its number, and the stream that keeps it.
async fn open(door: &Door) -> (u64, tonic::Streaming<v1::SessionNotice>) {
    let mut stream = door.worker().open(v1::OpenRequest { name: "raw".into() }).await.unwrap().into_inner();
    let notice = stream.message().await.unwrap().expect("a first notice");
    (notice.session, stream)
}

/// Waits until the daemon says so; time alone decides nothing.
fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let limit = Instant::now() + LONG;
    while !is() {
        assert!(Instant::now() < limit, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_announced_block_arrives_by_a_put_of_the_same_session_and_waiters_get_it() {
    let home = Home::new("announce");
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("a"), BYTES);
    door.runtime.block_on(async {
        let (session, _open) = open(&door).await;
        let reserve = v1::ReserveRequest { session, names: Some(named(binding, 1)), ..Default::default() };
        assert_eq!(door.blocks().reserve(reserve).await.unwrap().into_inner().reserved, [true]);
        // One waits for a lease and one for the bytes, by another session and by none.
        let (other, _other) = open(&door).await;
        let (mut leases, mut reads) = (door.blocks(), door.blocks());
        let acquire = v1::AcquireRequest {
            session: other,
            names: Some(named(binding, 1)),
            wait_ms: 20_000,
            node: String::new(),
        };
        let leased = tokio::spawn(async move { leases.acquire(acquire).await });
        let get = v1::GetRequest {
            session: 0,
            names: Some(named(binding, 1)),
            wait_ms: 20_000,
            node: String::new(),
        };
        let read = tokio::spawn(async move {
            let mut stream = reads.get(get).await?.into_inner();
            let first = stream.message().await?.and_then(|message| message.what);
            Ok::<_, tonic::Status>(matches!(first, Some(v1::get_response::What::Header(_))))
        });
        let mut stranger = vec![header(other, binding, 1)];
        stranger.extend(pieces(1, BYTES, 1000));
        let refused = door.blocks().put(tokio_stream::iter(stranger)).await.unwrap_err();
        assert_eq!(code(&refused), Code::AlreadyReserved, "only who announced it brings it");
        let mut own = vec![header(session, binding, 1)];
        own.extend(pieces(1, BYTES, 1000));
        let stored = door.blocks().put(tokio_stream::iter(own)).await.unwrap().into_inner();
        assert!(!stored.already);
        let leased = leased.await.unwrap().unwrap().into_inner();
        assert!(matches!(leased.acquired[0].what, Some(v1::acquired::What::Lease(_))), "{leased:?}");
        assert!(read.await.unwrap().unwrap(), "the block, not a miss");
        let abort = v1::AbortRequest { session, names: Some(named(binding, 1)) };
        assert_eq!(door.blocks().abort(abort).await.unwrap().into_inner().aborted, 0, "nothing is announced");
    });
    assert_eq!(door.get(&scope("a"), binding, 1), Ok(v1::Tier::Host));
}

#[test]
fn a_put_that_stalls_ends_at_its_deadline_and_leaves_nothing() {
    let home = Home::new("stall");
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("a"), BYTES);
    let stalled = door.runtime.block_on(async {
        use tokio_stream::StreamExt as _;
        let half = pieces(1, BYTES, 1000).into_iter().take(10);
        let messages = tokio_stream::iter(std::iter::once(header(0, binding, 1)).chain(half));
        let messages = messages.chain(tokio_stream::pending());
        tokio::time::timeout(LONG, door.blocks().put(within(SOON, messages))).await
    });
    let refused = stalled.expect("it ends").unwrap_err();
    assert_eq!(code(&refused), Code::DeadlinePassed, "{refused}");
    assert!(!door.put(&scope("a"), binding, 1, BYTES, false).unwrap(), "nothing came of it");
}

#[test]
fn the_block_before_a_block_is_a_sequence_hash_or_none_and_need_not_be_there() {
    let home = Home::new("after");
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("a"), BYTES);
    let put = |after: &[u8]| {
        let mut first = header(0, binding, 1);
        let header = first.header.as_mut().expect("a first message has one");
        header.after = bytes::Bytes::copy_from_slice(after);
        let messages = tokio_stream::iter(std::iter::once(first).chain(pieces(1, BYTES, 1000)));
        door.runtime.block_on(async { door.blocks().put(within(LONG, messages)).await })
    };
    assert_eq!(code(&put(&[7; 3]).unwrap_err()), Code::BadRequest);
    assert!(!put(SequenceHash::from(99).as_bytes()).unwrap().into_inner().already);
    assert!(put(&[]).unwrap().into_inner().already);
}

#[test]
fn puts_that_stall_keep_room_from_others_until_their_deadline_and_past_a_bound_nobody_waits() {
    let home = Home::new("room").set("limits.in_flight_bytes_max=1MiB");
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("a"), 1 << 20);
    let codes = door.runtime.block_on(async {
        use tokio_stream::StreamExt as _;
        let mut puts = Vec::new();
        for number in 0..64 {
            let mut blocks = door.blocks();
            puts.push(tokio::spawn(async move {
                let messages =
                    tokio_stream::iter([header(0, binding, number)]).chain(tokio_stream::pending());
                code(&blocks.put(within(Duration::from_secs(3), messages)).await.unwrap_err())
            }));
        }
        let mut codes = Vec::new();
        for put in puts {
            codes.push(tokio::time::timeout(LONG, put).await.expect("it ends").unwrap());
        }
        codes
    });
    let count = |wanted| codes.iter().filter(|code| **code == wanted).count();
    assert!(count(Code::QueueFull) > 0, "{codes:?}");
    assert_eq!(count(Code::QueueFull) + count(Code::DeadlinePassed), 64, "{codes:?}");
    assert!(!door.put(&scope("a"), binding, 1, 1 << 20, false).unwrap(), "all room has come back");
}

#[test]
fn waiting_ends_at_the_deadline_and_a_reader_who_stalls_holds_a_block_no_longer() {
    let home = Home::sized("reader", "64MiB", None).set("host.region_bytes=16MiB");
    let _daemon = home.start();
    let door = Door::of(&home);
    let (small, large) = (door.register(&scope("a"), BYTES), door.register(&scope("a"), LARGE));
    assert!(!door.put(&scope("a"), large, 1, LARGE, false).unwrap());
    // A block that does not come. Whichever clock strikes first says so.
    door.runtime.block_on(async {
        let (session, _open) = open(&door).await;
        let reserve = v1::ReserveRequest { session, names: Some(named(small, 7)), ..Default::default() };
        door.blocks().reserve(reserve).await.unwrap();
        let acquire = v1::AcquireRequest {
            session,
            names: Some(named(small, 7)),
            wait_ms: u32::MAX,
            node: String::new(),
        };
        let mut blocks = door.blocks();
        let asked = blocks.acquire(within(SOON, acquire));
        match tokio::time::timeout(LONG, asked).await.expect("it ends") {
            Ok(answer) => match &answer.into_inner().acquired[0].what {
                Some(v1::acquired::What::Miss(miss)) => {
                    assert_eq!(miss.reason(), v1::MissReason::NotComplete);
                }
                other => panic!("{other:?}"),
            },
            Err(status) => assert_eq!(code(&status), Code::DeadlinePassed),
        }
    });
    // A reader takes the head of a block that does not fit into what the connection keeps under way.
    let mut stream = door.runtime.block_on(async {
        let get =
            v1::GetRequest { session: 0, names: Some(named(large, 1)), wait_ms: 0, node: String::new() };
        let mut stream = door.blocks().get(within(SOON, get)).await.unwrap().into_inner();
        let first = stream.message().await.unwrap().and_then(|message| message.what);
        assert!(matches!(first, Some(v1::get_response::What::Header(_))), "{first:?}");
        stream
    });
    // On a connection of its own: nobody takes what comes on the first one meanwhile.
    let other = Door::of(&home);
    eventually("the block is held for ever", || {
        let evict = v1::EvictRequest { names: Some(named(large, 1)), ..Default::default() };
        other.runtime.block_on(other.blocks().evict(evict)).unwrap().into_inner().evicted == 1
    });
    let last = door.runtime.block_on(async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                other => break other,
            }
        }
    });
    assert_eq!(code(&last.unwrap_err()), Code::DeadlinePassed);
}

#[test]
fn tenants_are_named_as_scopes_name_them_and_a_purge_of_nobody_says_so() {
    let home = Home::sized("tenants", "32MiB", None);
    let _daemon = home.start();
    let door = Door::of(&home);
    let refused = |status: tonic::Status| code(&status);
    let quota = |tenant: &str| {
        let request = v1::SetQuotaRequest { tenant: tenant.into(), bytes_max: Some(1 << 30) };
        door.runtime.block_on(async { door.admin().set_quota(request).await })
    };
    let purge = |tenant: &str| {
        let request = v1::PurgeRequest { tenant: tenant.into(), ..v1::PurgeRequest::default() };
        door.runtime.block_on(async { door.admin().purge(request).await })
    };
    for name in ["", "Bad Name", &"a".repeat(64)] {
        assert_eq!(quota(name).map(|_| ()).map_err(refused), Err(Code::BadRequest), "`{name}`");
        assert_eq!(purge(name).map(|_| ()).map_err(refused), Err(Code::BadRequest), "`{name}`");
    }
    assert_eq!(purge("team-a").map(|_| ()).map_err(refused), Err(Code::UnknownTenant));
    quota("team-a").expect("a tenant may get its quota before its first block");
    purge("team-a").expect("it is known by its quota");
}

#[test]
fn a_message_that_is_too_long_is_a_bad_request_with_a_fault_of_ours() {
    let home = Home::sized("too-long", "32MiB", None).set("limits.message_bytes_max=64KiB");
    let _daemon = home.start();
    let door = Door::of(&home);
    let names = v1::Names { keys: vec![vec![7; 65 << 10].into()], ..v1::Names::default() };
    let request = v1::LookupRequest { names: Some(names), ..v1::LookupRequest::default() };
    let status = door.runtime.block_on(async { door.blocks().lookup(request).await }).unwrap_err();
    assert!(!status.details().is_empty(), "{status:?}");
    assert_eq!(code(&status), Code::BadRequest);
    assert!(status.message().contains("limits.message_bytes_max"), "{status:?}");
}

#[test]
fn streams_end_at_their_deadline_and_a_session_with_its_stream() {
    let home = Home::new("streams");
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("a"), BYTES);
    assert!(!door.put(&scope("a"), binding, 1, BYTES, false).unwrap());
    door.runtime.block_on(async {
        let watch = within(SOON, v1::WatchRequest::default());
        let mut events = door.events().watch(watch).await.unwrap().into_inner();
        let mut told = 0;
        let end = loop {
            match tokio::time::timeout(LONG, events.message()).await.expect("it ends") {
                Ok(Some(batch)) => told += batch.events.len(),
                Ok(None) => panic!("it ended without a word"),
                Err(status) => break status,
            }
        };
        assert_eq!((code(&end), told), (Code::DeadlinePassed, 1));
        let mut session = door
            .worker()
            .open(within(SOON, v1::OpenRequest { name: "brief".into() }))
            .await
            .unwrap()
            .into_inner();
        let end = loop {
            match tokio::time::timeout(LONG, session.message()).await.expect("it ends") {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended without a word"),
                Err(status) => break status,
            }
        };
        assert_eq!(code(&end), Code::DeadlinePassed);
    });
    eventually("the session outlives its stream", || door.status().clients == 0);
}

#[test]
fn announcements_of_one_request_are_all_made_or_none() {
    let home = Home::new("reserve").set("limits.leases_per_session_max=10");
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("a"), BYTES);
    let (mine, _one) = door.runtime.block_on(open(&door));
    let (other, _two) = door.runtime.block_on(open(&door));
    let reserve = |session, numbers: std::ops::Range<u64>| {
        let sequence_hashes = numbers.flat_map(|number| named(binding, number).sequence_hashes).collect();
        let names = Some(v1::Names { binding, sequence_hashes, keys: Vec::new() });
        let request = within(LONG, v1::ReserveRequest { session, names, ..Default::default() });
        door.runtime.block_on(door.blocks().reserve(request)).map(|answer| answer.into_inner().reserved)
    };
    let refused = reserve(mine, 0..11).unwrap_err();
    assert_eq!(code(&refused), Code::TooManyLeases);
    assert_eq!(
        reserve(other, 0..10).unwrap(),
        [true; 10],
        "those that were made are taken back before the answer"
    );
}

/// What the standard health service says of a service.
async fn health(door: &Door, service: &str) -> tonic_health::pb::health_check_response::ServingStatus {
    let mut client = tonic_health::pb::health_client::HealthClient::new(door.channel.clone());
    let request = tonic_health::pb::HealthCheckRequest { service: service.into() };
    client.check(request).await.unwrap().into_inner().status()
}

const SERVICES: [&str; 5] = ["", "kv.v1.Blocks", "kv.v1.Worker", "kv.v1.Events", "kv.v1.Admin"];

#[test]
fn a_drain_shows_in_the_health_of_every_service_and_its_end_does_too() {
    use tonic_health::pb::health_check_response::ServingStatus::{NotServing, Serving};
    let home = Home::new("health");
    let _daemon = home.start();
    let door = Door::of(&home);
    for (stop, wanted) in [(true, Serving), (false, NotServing), (true, Serving)] {
        let drain = v1::DrainRequest { stop };
        door.runtime.block_on(async { door.admin().drain(drain).await }).unwrap();
        eventually("health follows", || {
            SERVICES.iter().all(|service| door.runtime.block_on(health(&door, service)) == wanted)
        });
    }
}

#[test]
fn calls_that_wait_end_by_themselves_while_the_daemon_drains_and_the_rest_hear_why() {
    use tonic_health::pb::health_check_response::ServingStatus::NotServing;
    let home = Home::new("goodbye").set("limits.pending_ttl=60s");
    let daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("a"), BYTES);
    door.runtime.block_on(async {
        let (announcer, _open) = open(&door).await;
        let reserve = |number| v1::ReserveRequest {
            session: announcer,
            names: Some(named(binding, number)),
            ..Default::default()
        };
        assert_eq!(door.blocks().reserve(reserve(1)).await.unwrap().into_inner().reserved, [true]);
        let (session, _other) = open(&door).await;
        let acquire = |wait_ms| {
            let request =
                v1::AcquireRequest { session, names: Some(named(binding, 1)), wait_ms, node: String::new() };
            let mut blocks = door.blocks();
            tokio::spawn(async move { blocks.acquire(within(LONG, request)).await })
        };
        let (short, long) = (acquire(1_500), acquire(19_000));
        tokio::time::sleep(SOON).await;
        let began = Instant::now();
        let pid = rustix::process::Pid::from_raw(daemon.pid() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        tokio::time::sleep(SOON).await;
        for service in SERVICES {
            assert_eq!(health(&door, service).await, NotServing, "{service}");
        }
        let refused = door.blocks().reserve(reserve(2)).await.unwrap_err();
        assert_eq!(code(&refused), Code::Draining, "new work is refused with the reason");
        let missed = short.await.unwrap().unwrap().into_inner();
        assert!(matches!(missed.acquired[0].what, Some(v1::acquired::What::Miss(_))), "{missed:?}");
        let cut = long.await.unwrap().unwrap_err();
        assert_eq!((code(&cut), cut.code()), (Code::Draining, tonic::Code::Unavailable), "{cut:?}");
        assert!(began.elapsed() > Duration::from_secs(9), "it had its time: {:?}", began.elapsed());
    });
    assert!(daemon.terminate().success());
}

#[test]
fn a_daemon_that_nobody_waits_for_ends_at_once_though_its_health_is_watched() {
    let home = Home::new("watched");
    let daemon = home.start();
    let door = Door::of(&home);
    let (session, mut notices, mut watch) = door.runtime.block_on(async {
        let (session, notices) = open(&door).await;
        let mut client = tonic_health::pb::health_client::HealthClient::new(door.channel.clone());
        let request = tonic_health::pb::HealthCheckRequest { service: String::new() };
        let mut watch = client.watch(request).await.unwrap().into_inner();
        watch.message().await.unwrap().expect("a first word");
        (session, notices, watch)
    });
    let began = Instant::now();
    assert!(daemon.terminate().success());
    assert!(began.elapsed() < Duration::from_secs(9), "it took {:?}", began.elapsed());
    door.runtime.block_on(async {
        let last = watch.message().await.unwrap().expect("a last word");
        assert_eq!(last.status(), tonic_health::pb::health_check_response::ServingStatus::NotServing);
        let notice = notices.message().await.unwrap().expect("a notice");
        assert_eq!((notice.session, notice.draining), (session, true));
    });
}
