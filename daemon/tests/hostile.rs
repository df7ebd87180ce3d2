//! Workers that mean harm, and workers that die: the daemon goes on, others notice nothing, nothing leaks.

mod support;

use std::io::{BufRead as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Priority, SequenceHash};
use kv_shm::door::{Connection, Hello, Message, Welcome};
use kv_shm::{Outcome, Request, Submission, WorkerEnd};
use support::{Door, Home, scope, slice};

const BYTES: u32 = 64 << 10;
const WAIT: Duration = Duration::from_secs(10);

/// A worker made by hand: what the client crate does, without its manners.
struct RawWorker {
    connection: Connection,
    welcome: Welcome,
    end: WorkerEnd,
    /// The ring memory, to be written at will.
    ring: std::fs::File,
}

fn hello() -> Hello {
    Hello {
        version_min: kv_shm::door::VERSION_MIN,
        version_max: kv_shm::door::VERSION,
        numa_node: None,
        hazards: 64,
        ring_entries: 64,
        staging_bytes: 4 << 20,
        wants_write: true,
        name: "stranger".into(),
    }
}

impl RawWorker {
    fn connect(home: &Home, hello: Hello) -> Self {
        let connection = Connection::connect(&home.run_dir().join("worker.sock"), WAIT).unwrap();
        connection.send(&Message::Hello(hello), &[]).unwrap();
        let (message, fds) = connection.recv(WAIT).unwrap().expect("an answer");
        let Message::Welcome(welcome) = message else { panic!("{message:?}") };
        let mut fds = fds.into_iter();
        let [_meta, _data, _hazard, ring, bell] =
            std::array::from_fn(|_| fds.next().expect("five descriptors"));
        let file = std::fs::File::from(ring.try_clone().unwrap());
        let end = kv_shm::open(welcome.shards[0].layout, [ring, bell]).unwrap();
        Self { connection, welcome, end, ring: file }
    }

    fn ask(&mut self, request: Request) -> Outcome {
        self.end.submitter.submit(&Submission { id: 1, deadline_us: 5_000_000, request }).unwrap();
        self.end.submitter.kick();
        let mut answers = Vec::new();
        let limit = Instant::now() + WAIT;
        while answers.is_empty() {
            assert!(Instant::now() < limit, "no answer to {request:?}");
            self.end.collector.wait(1000, Duration::from_millis(100), &mut answers).unwrap();
        }
        answers[0].outcome
    }
}

fn key(number: u64) -> BlockKey {
    scope("a").id().block_key(&SequenceHash::from(number), &slice())
}

fn fill(door: &Door, blocks: u64) -> u32 {
    let scope = scope("a");
    let binding = door.register(&scope, BYTES);
    (0..blocks).for_each(|number| assert!(!door.put(&scope, binding, number, BYTES, false).unwrap()));
    binding
}

#[test]
fn wrong_ring_requests_are_answered_with_a_typed_fault() {
    let home = Home::new("ring");
    let mut daemon = home.start();
    let door = Door::of(&home);
    let binding = BindingId(fill(&door, 4) as u16);
    let mut worker = RawWorker::connect(&home, hello());
    assert!(!worker.welcome.may_write, "nobody is trusted unless the configuration says so");
    let put = |offset, bytes, binding| Request::Put {
        key: key(100),
        binding,
        offset,
        bytes,
        priority: Priority::Normal,
        ttl_s: 0,
        durable: false,
        after: None,
    };
    let faults = [
        (put((1 << 48) - 4096, BYTES, binding), Code::StagingRange),
        (put(4 << 20, BYTES, binding), Code::StagingRange),
        (put((4 << 20) - 4096, BYTES, binding), Code::StagingRange),
        (put(0, BYTES + 4096, binding), Code::WrongLength),
        (put(0, u32::MAX, binding), Code::WrongLength),
        (put(0, BYTES, BindingId(u16::MAX)), Code::UnknownBinding),
        (Request::Commit { key: key(1), offset: 0, bytes: BYTES, durable: false }, Code::NotReserved),
        (Request::Abort { key: key(1) }, Code::NotReserved),
        (
            Request::Reserve {
                key: key(101),
                binding,
                priority: Priority::Normal,
                ttl_s: 0,
                in_place: true,
                after: Some(key(100)),
            },
            Code::Denied,
        ),
    ];
    for (request, wanted) in faults {
        match worker.ask(request) {
            Outcome::Fault { code, .. } => assert_eq!(code, wanted, "{request:?}"),
            other => panic!("{request:?} gave {other:?}"),
        }
    }
    assert_eq!(worker.ask(put(0, BYTES, binding)), Outcome::Stored { already: false }, "the session goes on");
    assert!(matches!(
        worker.ask(Request::Acquire { key: key(2), wait: false, after: Some(key(2)) }),
        Outcome::Leased { .. }
    ));
    assert!(daemon.is_alive());
}

#[test]
fn a_worker_that_scribbles_over_its_ring_harms_only_itself() {
    let home = Home::new("scribble");
    let mut daemon = home.start();
    let door = Door::of(&home);
    let scope = scope("a");
    let binding = fill(&door, 50);
    let until = Instant::now() + Duration::from_secs(4);
    std::thread::scope(|threads| {
        for seed in 1..=2u64 {
            let home = &home;
            threads.spawn(move || {
                let mut state = seed;
                let mut random = move || {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    state >> 20
                };
                while Instant::now() < until {
                    let worker = RawWorker::connect(home, hello());
                    let rings = worker.welcome.shards[0].layout.staging_offset();
                    for _ in 0..2000 {
                        let bytes = random().to_le_bytes();
                        worker.ring.write_all_at(&bytes, random() % (rings - 8)).unwrap();
                        if random().is_multiple_of(64) {
                            worker.end.submitter.kick();
                        }
                    }
                }
            });
        }
        // An honest caller beside them sees only right bytes.
        while Instant::now() < until {
            for number in 0..50 {
                if let Err(miss) = door.get(&scope, binding, number) {
                    panic!("block {number}: {:?}", miss.reason());
                }
            }
        }
    });
    assert!(daemon.is_alive());
    assert_eq!(door.status().checksum_failures, 0);
    wait_for_no_leases(&door, "scribblers");
}

#[test]
fn garbage_on_the_sockets_is_closed_and_others_are_served() {
    let home = Home::new("garbage");
    let mut daemon = home.start();
    let door = Door::of(&home);
    let binding = fill(&door, 4);
    let path = home.run_dir().join("worker.sock");
    for round in 0..200usize {
        let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
        let kind = rustix::net::SocketType::SEQPACKET;
        let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, kind, None).unwrap();
        rustix::net::connect(&socket, &address).unwrap();
        let garbage: Vec<u8> = (0..round * 7 % 3000).map(|at| (at * round) as u8).collect();
        let _ = rustix::net::send(&socket, &garbage, rustix::net::SendFlags::NOSIGNAL);
    }
    for round in 0..50u8 {
        let mut stream = std::os::unix::net::UnixStream::connect(home.run_dir().join("kvd.sock")).unwrap();
        let garbage: Vec<u8> = (0..4096u32).map(|at| (at * u32::from(round)) as u8).collect();
        let _ = stream.write_all(&garbage);
    }
    // Connections that never say hello do not keep others out. With those above, which a busy daemon may not
    // have closed yet, they are fewer than the strangers it lets in at one moment.
    let silent: Vec<_> = (0..50).map(|_| Connection::connect(&path, WAIT).unwrap()).collect();
    let mut worker = RawWorker::connect(&home, hello());
    assert_eq!(worker.ask(Request::Ping), Outcome::Done);
    drop(silent);
    assert!(daemon.is_alive());
    assert!(door.get(&scope("a"), binding, 1).is_ok());
}

/// Waits until nobody has the other end of a pipe any more.
fn wait_for_end(reader: &std::io::PipeReader) {
    use rustix::event::{PollFd, PollFlags, poll};
    let limit = rustix::time::Timespec { tv_sec: WAIT.as_secs() as i64, tv_nsec: 0 };
    assert_eq!(
        poll(&mut [PollFd::new(reader, PollFlags::HUP)], Some(&limit)),
        Ok(1),
        "somebody still has it"
    );
}

/// Whether somebody has it.
fn is_held(reader: &std::io::PipeReader) -> bool {
    use rustix::event::{PollFd, PollFlags, poll};
    let at_once = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(reader, PollFlags::HUP)], Some(&at_once)) == Ok(0)
}

#[test]
fn handed_over_descriptors_end_with_withdrawal_session_or_nonsense() {
    let home = Home::new("handed");
    let mut daemon = home.start();
    // An end of a pipe each, of which the daemon has the only one.
    let offer = |worker: &RawWorker, number| {
        let (reader, writer) = std::io::pipe().unwrap();
        worker.connection.send(&Message::Offer { number }, &[writer.as_fd()]).unwrap();
        reader
    };
    let mut worker = RawWorker::connect(&home, hello());
    assert_eq!(worker.welcome.version, kv_shm::door::VERSION_OFFERS);
    let [one, two, three] = [1, 2, 3].map(|number| offer(&worker, number));
    worker.connection.send(&Message::Withdraw { number: 2 }, &[]).unwrap();
    wait_for_end(&two);
    assert!(is_held(&one) && is_held(&three));
    assert_eq!(worker.ask(Request::Ping), Outcome::Done);
    // What makes no sense ends it all.
    let second = RawWorker::connect(&home, hello());
    let theirs = [offer(&second, 1), offer(&second, 1)];
    theirs.iter().for_each(wait_for_end);
    assert!(is_held(&one), "each has its own numbers");
    let third = RawWorker::connect(&home, hello());
    let theirs = offer(&third, 1);
    third.connection.send(&Message::Offer { number: 2 }, &[]).unwrap();
    wait_for_end(&theirs);
    // A worker of before there were offers is served, and may not make any.
    let mut old = RawWorker::connect(&home, Hello { version_max: 2, ..hello() });
    assert_eq!((old.welcome.version, old.ask(Request::Ping)), (2, Outcome::Done));
    wait_for_end(&offer(&old, 1));
    drop(worker);
    [one, three].iter().for_each(wait_for_end);
    assert!(daemon.is_alive());
}

/// Not a story: what the next story starts a thousand times. Takes leases, announces blocks, and waits to be
/// killed.
#[test]
fn victim() {
    let Ok(run_dir) = std::env::var("KVD_STORY_RUN_DIR") else { return };
    let connection = Connection::connect(&std::path::Path::new(&run_dir).join("worker.sock"), WAIT).unwrap();
    connection.send(&Message::Hello(hello()), &[]).unwrap();
    println!("greeting");
    let (message, fds) = connection.recv(WAIT).unwrap().expect("an answer");
    let Message::Welcome(welcome) = message else { return };
    let mut fds = fds.into_iter();
    let [_, _, _, ring, bell] = std::array::from_fn(|_| fds.next().expect("five descriptors"));
    let mut end = kv_shm::open(welcome.shards[0].layout, [ring, bell]).unwrap();
    let binding = BindingId(std::env::var("KVD_STORY_BINDING").unwrap().parse().unwrap());
    let pid = u64::from(std::process::id());
    for id in 0..32 {
        let request = match id % 4 {
            0 => Request::Reserve {
                key: key(1_000_000 + pid * 64 + id),
                binding,
                priority: Priority::Normal,
                ttl_s: 0,
                in_place: false,
                after: None,
            },
            1 => Request::Put {
                key: key(2_000_000 + pid * 64 + id),
                binding,
                offset: 0,
                bytes: BYTES,
                priority: Priority::Low,
                ttl_s: 0,
                durable: false,
                after: None,
            },
            _ => Request::Acquire { key: key(id), wait: true, after: None },
        };
        end.submitter.submit(&Submission { id, deadline_us: 1_000_000, request }).unwrap();
        if id % 8 == 7 {
            end.submitter.kick();
        }
    }
    println!("asked");
    std::thread::sleep(Duration::from_secs(30));
}

#[test]
fn a_thousand_workers_killed_at_random_leave_nothing_behind() {
    let victims: u32 = std::env::var("KVD_VICTIMS").ok().and_then(|count| count.parse().ok()).unwrap_or(1000);
    let home = Home::new("victims");
    let mut daemon = home.start();
    let door = Door::of(&home);
    let binding = fill(&door, 40);
    let proc = format!("/proc/{}/fd", daemon.pid());
    let descriptors = || std::fs::read_dir(&proc).unwrap().count();
    let before = descriptors();
    let me = std::env::current_exe().unwrap();
    let mut done = 0;
    while done < victims {
        let mut batch = Vec::new();
        for index in 0..20 {
            let mut child = Command::new(&me)
                .args(["victim", "--exact", "--nocapture", "--test-threads=1"])
                .env("KVD_STORY_RUN_DIR", home.run_dir())
                .env("KVD_STORY_BINDING", binding.to_string())
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            // Some die before they are greeted, some in the middle, most while they hold leases.
            let words = match index % 5 {
                0 => None,
                1 => Some("greeting"),
                _ => Some("asked"),
            };
            let out = child.stdout.take().unwrap();
            if let Some(word) = words {
                let mut lines = std::io::BufReader::new(out).lines();
                lines.find(|line| line.as_ref().is_ok_and(|line| line.contains(word)));
            }
            batch.push(child);
        }
        for mut child in batch {
            child.kill().unwrap();
            child.wait().unwrap();
            done += 1;
        }
    }
    wait_for_no_leases(&door, "a thousand victims");
    assert!(daemon.is_alive());
    let limit = Instant::now() + WAIT;
    while descriptors() > before + 2 && Instant::now() < limit {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(descriptors() <= before + 2, "{} descriptors, {before} before", descriptors());
    let hazards = std::fs::read_dir(home.memory_dir()).unwrap();
    let left =
        hazards.filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().starts_with("hazard-"));
    assert!(left.count() <= 1, "hazard files of dead workers are gone");
}

fn wait_for_no_leases(door: &Door, who: &str) {
    let limit = Instant::now() + Duration::from_secs(1);
    loop {
        let status = door.status();
        if (status.leases, status.reading, status.pending, status.clients) == (0, 0, 0, 0) {
            return;
        }
        assert!(
            Instant::now() < limit,
            "a second after the end of {who}: {} leases, {} open, {} pending, {} clients",
            status.leases,
            status.reading,
            status.pending,
            status.clients
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
