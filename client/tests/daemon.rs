//! The client against the real daemon: both doors, restarts, deadlines, events.
//!
//! Wants the `kvd` binary: `KVD_BINARY`, or the one beside this test's target directory (`cargo build -p kvd`).
//! Without it every story says that it was skipped.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kv_client::{
    Binding, BlockKey, Client, ClientOptions, Doors, EventKind, Evicted, FaultKind, Got, MissReason,
    PutOptions, Scope, SequenceHash, Sighting, Slice, Tier, WatchOptions, Worker, WorkerOptions,
};

const BLOCK: usize = 64 << 10;
const LONG: Duration = Duration::from_secs(20);

/// A daemon on directories of its own; killed, and its directories removed, when the story ends.
struct Daemon {
    root: tempfile::TempDir,
    memory: PathBuf,
    binary: PathBuf,
    child: Child,
    settings: &'static [&'static str],
}

impl Daemon {
    fn start(name: &str) -> Option<Self> {
        Self::start_with(name, &[])
    }

    /// With settings of its own.
    fn start_with(name: &str, settings: &'static [&'static str]) -> Option<Self> {
        let Some(binary) = binary() else {
            eprintln!("skipped: no kvd binary; build it with `cargo build -p kvd` or set KVD_BINARY");
            return None;
        };
        let root = tempfile::Builder::new().prefix("kv-client-").tempdir().unwrap();
        let memory = PathBuf::from(format!("/dev/shm/kv-client-{name}-{}", std::process::id()));
        let child = spawn(&binary, &root, &memory, settings);
        let daemon = Self { root, memory, binary, child, settings };
        daemon.connect(LONG);
        Some(daemon)
    }

    fn options(&self) -> ClientOptions {
        ClientOptions {
            deadline: Duration::from_secs(10),
            ..ClientOptions::socket(self.root.path().join("run"))
        }
    }

    fn connect(&self, within: Duration) -> Client {
        let until = Instant::now() + within;
        loop {
            match Client::connect(self.options()).wait() {
                Ok(client) => return client,
                Err(error) if Instant::now() > until => {
                    panic!("{error}\n{}", std::fs::read_to_string(self.root.path().join("log")).unwrap())
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn worker(&self, options: WorkerOptions) -> Worker {
        self.connect(LONG).worker(options).wait().unwrap()
    }

    fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// Stops the process and waits until each of its threads stands still.
    fn freeze(&self) {
        self.signal("-STOP");
        let tasks = format!("/proc/{}/task", self.child.id());
        let runs = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('T'))
        };
        while std::fs::read_dir(&tasks).unwrap().any(runs) {
            std::thread::yield_now();
        }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn start_again(&mut self) {
        self.child = spawn(&self.binary, &self.root, &self.memory, self.settings);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.root.path().join("log")).unwrap_or_default());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.memory);
    }
}

fn binary() -> Option<PathBuf> {
    let named = std::env::var_os("KVD_BINARY").map(PathBuf::from);
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join("kvd")));
    named.into_iter().chain(beside).find(|path| path.exists())
}

fn spawn(binary: &PathBuf, root: &tempfile::TempDir, memory: &std::path::Path, settings: &[&str]) -> Child {
    let path = |name: &str| root.path().join(name).display().to_string();
    let log = std::fs::OpenOptions::new().create(true).append(true).open(root.path().join("log")).unwrap();
    Command::new(binary)
        .args(["--run-dir", &path("run"), "--data-dir", &path("data"), "--disk-bytes", "256MiB"])
        .args(["--memory-dir", &memory.display().to_string(), "--host-bytes", "64MiB", "--http", "off"])
        .args([
            "--set",
            "host.huge_pages=off",
            "--set",
            "log.format=text",
            "--set",
            "disk.segment_bytes=8MiB",
        ])
        .args(settings.iter().flat_map(|setting| ["--set", setting]))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

fn scope() -> Scope {
    Scope { model: "story".into(), tenant: "t".into(), block_tokens: 16, ..Scope::default() }
}

fn bind(worker: &Worker) -> Binding {
    worker.register(scope(), Slice::whole(2, 4), BLOCK as u32).wait().unwrap()
}

fn hash(number: u64) -> SequenceHash {
    SequenceHash::from(number)
}

fn body(key: &BlockKey) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    kv_block::payload::fill(key, &mut bytes);
    bytes
}

fn put(worker: &Worker, binding: &Binding, number: u64) -> bool {
    worker.put(binding, &hash(number), &body(&binding.key(&hash(number)))).unwrap().already
}

fn assert_right(binding: &Binding, number: u64, bytes: &[u8]) {
    assert_eq!(bytes.len(), BLOCK);
    assert_eq!(kv_block::payload::first_wrong_byte(&binding.key(&hash(number)), bytes), None);
}

fn reason(got: &Got) -> Option<MissReason> {
    got.miss().map(|miss| miss.reason)
}

fn both_doors(name: &str, story: impl Fn(&Daemon, &Worker)) {
    for grpc_only in [false, true] {
        let Some(daemon) = Daemon::start(&format!("{name}-{grpc_only}")) else { return };
        let worker = daemon.worker(WorkerOptions { grpc_only, ..WorkerOptions::default() });
        assert_eq!(matches!(worker.doors(), Doors::GrpcOnly { .. }), grpc_only, "{:?}", worker.doors());
        story(&daemon, &worker);
    }
}

/// Two daemons that are each other's peers.
fn pair(name: &str) -> Option<[Daemon; 2]> {
    // Ports that were free a moment ago; both are taken before the first is given back.
    let free = [0, 1].map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let ports = free.each_ref().map(|one| one.local_addr().unwrap().port());
    drop(free);
    let start = |at: usize| {
        let settings = [
            format!("node.name=node-{at}"),
            format!("peers.listen=127.0.0.1:{}", ports[at]),
            format!("peers.members=node-0=127.0.0.1:{},node-1=127.0.0.1:{}", ports[0], ports[1]),
        ];
        let settings = settings.map(|setting| &*String::leak(setting));
        Daemon::start_with(&format!("{name}-{at}"), Vec::leak(settings.to_vec()))
    };
    Some([start(0)?, start(1)?])
}

#[test]
fn what_a_peer_has_is_located_and_comes_to_whoever_waits() {
    for grpc_only in [false, true] {
        let Some([there, here]) = pair(&format!("pair-{grpc_only}")) else { return };
        let theirs = there.worker(WorkerOptions::default());
        let worker = here.worker(WorkerOptions { grpc_only, ..WorkerOptions::default() });
        let (binding, from) = (bind(&worker), bind(&theirs));
        (0..2).for_each(|number| assert!(!put(&theirs, &from, number)));
        assert!(!put(&worker, &binding, 2));
        let hashes: Vec<_> = (0..4).map(hash).collect();
        let at = || Sighting::At { node: "node-0".into(), tier: Tier::Host };
        let absent = Sighting::Absent(MissReason::NeverStored.into());
        let located = worker.locate(&binding, &hashes).wait().unwrap();
        assert_eq!(located, [at(), at(), Sighting::Here(Tier::Host), absent]);
        // Whoever has no time gets what is here.
        let got = worker.acquire(&binding, &hash(0)).unwrap();
        assert_eq!(reason(&got), Some(MissReason::NeverStored));
        let got = worker.acquire_many(&binding, &hashes, LONG).unwrap();
        for (number, got) in (0..3).zip(&got) {
            let Got::Block(block) = got else { panic!("block {number}: {got:?}") };
            assert_right(&binding, number, block);
        }
        assert_eq!(reason(&got[3]), Some(MissReason::NeverStored));
        assert_eq!(worker.lookup(&binding, &hashes).unwrap().prefix(), 3, "what came stays");
    }
}

#[test]
fn a_block_is_stored_found_and_read_by_both_doors() {
    both_doors("story", |_, worker| {
        let binding = bind(worker);
        let hashes: Vec<_> = (0..4).map(hash).collect();
        let nothing = worker.lookup(&binding, &hashes).unwrap();
        assert_eq!((nothing.prefix(), nothing.first_miss.unwrap().1.reason), (0, MissReason::NeverStored));
        assert!(!put(worker, &binding, 0) && put(worker, &binding, 0), "the second time it is there");
        let bodies: Vec<_> = (1..3).map(|number| (hash(number), body(&binding.key(&hash(number))))).collect();
        let blocks: Vec<_> = bodies.iter().map(|(hash, body)| (*hash, &body[..])).collect();
        for stored in worker.put_many(&binding, &blocks, &PutOptions::default()).unwrap() {
            assert!(!stored.unwrap().already);
        }
        let found = worker.lookup(&binding, &hashes).unwrap();
        assert_eq!(found.tiers, [Tier::Host; 3]);
        assert_eq!(found.first_miss.unwrap().0, 3);
        let got = worker.acquire_many(&binding, &hashes, Duration::ZERO).unwrap();
        assert_eq!(reason(&got[3]), Some(MissReason::NeverStored));
        for (number, got) in got.into_iter().take(3).enumerate() {
            let block = got.block().unwrap();
            assert_right(&binding, number as u64, &block);
            assert!(
                block.verify() && block.still_valid() && block.key() == binding.key(&hash(number as u64))
            );
            assert_eq!(block.is_zero_copy(), matches!(worker.doors(), Doors::SharedMemory { .. }));
        }
        assert_right(&binding, 1, &worker.get(&binding, &hash(1)).unwrap().unwrap());
        assert_eq!(worker.get(&binding, &hash(9)).unwrap(), None);
        let short = worker.put(&binding, &hash(5), &[0; 100]).unwrap_err();
        assert_eq!(short.kind(), FaultKind::Invalid);
    });
}

#[test]
fn an_announced_block_is_waited_for_and_a_withdrawn_one_is_a_miss() {
    both_doors("announce", |_, worker| {
        let binding = bind(worker);
        let mut room = worker.reserve(&binding, &hash(1)).unwrap().unwrap();
        assert!(worker.reserve(&binding, &hash(1)).unwrap().is_none(), "it is announced");
        let got = worker.acquire(&binding, &hash(1)).unwrap();
        assert_eq!(reason(&got), Some(MissReason::NotComplete));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| worker.acquire_wait(&binding, &hash(1), LONG).unwrap());
            std::thread::sleep(Duration::from_millis(20));
            let bytes = body(&room.key());
            room.write(&bytes);
            assert!(!room.commit().unwrap().already);
            match waiting.join().unwrap() {
                Got::Block(block) => assert_right(&binding, 1, &block),
                Got::Miss(miss) => panic!("who waits for a block that comes must get it: {miss}"),
            }
        });
        let room = worker.reserve(&binding, &hash(2)).unwrap().unwrap();
        drop(room);
        let until = Instant::now() + LONG;
        while worker.reserve(&binding, &hash(2)).unwrap().is_none() {
            assert!(Instant::now() < until, "the announcement was never taken back");
        }
    });
}

#[test]
fn a_block_as_long_as_a_region_comes_and_goes_in_small_messages() {
    // Room for half a block: each goes alone, and all of them go.
    let settings = &["limits.message_bytes_max=64KiB", "limits.in_flight_bytes_max=1MiB"];
    let Some(daemon) = Daemon::start_with("large", settings) else { return };
    let worker = daemon.worker(WorkerOptions { grpc_only: true, ..WorkerOptions::default() });
    let described = worker.client().describe().wait().unwrap();
    assert_eq!(described.message_bytes_max, 64 << 10);
    let bytes = described.block_bytes_max;
    assert!(u64::from(bytes) > described.message_bytes_max * 8, "{bytes}");
    let binding = worker.register(scope(), Slice::whole(2, 4), bytes).wait().unwrap();
    let right = |number: u64| {
        let mut body = vec![0; bytes as usize];
        kv_block::payload::fill(&binding.key(&hash(number)), &mut body);
        body
    };
    std::thread::scope(|threads| {
        for number in 0..4 {
            let (worker, binding, right) = (&worker, &binding, &right);
            threads.spawn(move || {
                assert!(!worker.put(binding, &hash(number), &right(number)).unwrap().already);
                let block = worker.get(binding, &hash(number)).unwrap().unwrap();
                assert!(block == right(number), "block {number} arrives as it went");
            });
        }
    });
    let mut room = worker.reserve(&binding, &hash(9)).unwrap().unwrap();
    room.write(&right(9));
    assert!(!room.commit().unwrap().already, "announced blocks come in several messages too");
    // More names than one message holds are asked for in several.
    let many: Vec<_> = (0..4096).map(hash).collect();
    assert_eq!(worker.lookup(&binding, &many).unwrap().prefix(), 4);
    let found = worker.pin(&binding, &many, LONG).wait().unwrap();
    assert_eq!(found.pinned, 5);
}

#[test]
fn blocks_come_up_from_disk_and_evicted_ones_say_so() {
    both_doors("disk", |_, worker| {
        let binding = bind(worker);
        let durable = PutOptions { durable: true, ..PutOptions::default() };
        let bytes = body(&binding.key(&hash(1)));
        worker.put_with(&binding, &hash(1), &bytes, &durable).unwrap();
        let evicted = worker.evict(&binding, &[hash(1)], Some(Tier::Host)).wait().unwrap();
        assert_eq!(evicted, Evicted { evicted: 1, ..Evicted::default() });
        assert_eq!(worker.lookup(&binding, &[hash(1)]).unwrap().tiers, [Tier::Disk]);
        assert!(worker.acquire(&binding, &hash(1)).unwrap().block().is_none(), "not without waiting");
        let block = worker.acquire_wait(&binding, &hash(1), LONG).unwrap().block().unwrap();
        assert_right(&binding, 1, &block);
        drop(block);
        // The lease goes back by the ring, which this call may overtake: until then the block is in use.
        let until = Instant::now() + LONG;
        while worker.evict(&binding, &[hash(1)], None).wait().unwrap().in_use > 0 {
            assert!(Instant::now() < until, "a block that nobody reads stays in use");
        }
        let (_, miss) = worker.lookup(&binding, &[hash(1)]).unwrap().first_miss.unwrap();
        assert_eq!(miss.reason, MissReason::EvictedRequest);
    });
}

#[test]
fn pins_hold_and_explanations_name_the_field() {
    both_doors("pins", |_, worker| {
        let binding = bind(worker);
        put(worker, &binding, 1);
        let pinned = worker.pin(&binding, &[hash(1), hash(2)], Duration::from_secs(60)).wait().unwrap();
        assert_eq!((pinned.pinned, pinned.absent), (1, 1));
        let kept = worker.evict(&binding, &[hash(1)], None).wait().unwrap();
        assert_eq!((kept.evicted, kept.in_use), (0, 1));
        assert_eq!(worker.unpin(&binding, &[hash(1)]).wait().unwrap(), 1);
        assert_eq!(worker.prefetch(&binding, &[hash(1)]).wait().unwrap().resident, 1);
        let other = Scope { lora: "other".into(), ..scope() };
        let other = worker.register(other, Slice::whole(2, 4), BLOCK as u32).wait().unwrap();
        let miss = worker.explain(&other, &hash(1)).wait().unwrap().unwrap();
        assert_eq!((miss.reason, &miss.fields[..]), (MissReason::ScopeDiffers, &["lora".to_owned()][..]));
        assert_eq!(worker.explain(&binding, &hash(1)).wait().unwrap(), None);
    });
}

#[test]
fn a_killed_daemon_ends_calls_and_the_next_one_is_found_with_all_blocks() {
    for grpc_only in [false, true] {
        let Some(mut daemon) = Daemon::start(&format!("kill-{grpc_only}")) else { return };
        let worker = daemon.worker(WorkerOptions { grpc_only, ..WorkerOptions::default() });
        let binding = bind(&worker);
        (0..50).for_each(|number| assert!(!put(&worker, &binding, number)));
        let held = worker.acquire(&binding, &hash(7)).unwrap().block().unwrap();
        let epoch = worker.epoch();
        daemon.kill();
        let started = Instant::now();
        let error = worker.put(&binding, &hash(99), &body(&binding.key(&hash(99)))).unwrap_err();
        assert_eq!(error.kind(), FaultKind::Unavailable, "{error}");
        assert!(started.elapsed() < Duration::from_secs(9), "it ends before its deadline");
        assert_right(&binding, 7, &held);
        if !grpc_only {
            let block = worker.acquire(&binding, &hash(8)).unwrap().block().unwrap();
            assert_right(&binding, 8, &block);
        }
        daemon.start_again();
        let until = Instant::now() + LONG;
        while worker.epoch() == epoch {
            assert!(Instant::now() < until, "never connected again");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(worker.epoch() > epoch && worker.is_connected());
        assert_eq!(matches!(worker.doors(), Doors::GrpcOnly { .. }), grpc_only);
        for number in 0..50 {
            let got = worker.acquire(&binding, &hash(number)).unwrap();
            assert_right(&binding, number, &got.block().expect("host memory survives kill -9"));
        }
        assert!(!put(&worker, &binding, 99), "the binding was registered again");
        assert_right(&binding, 7, &held);
        assert!(held.epoch() == epoch);
    }
}

#[test]
fn a_daemon_that_hangs_costs_a_call_its_deadline_and_no_more() {
    both_doors("hang", |daemon, worker| {
        let binding = bind(worker);
        put(worker, &binding, 1);
        let worker = worker.with_deadline(Duration::from_millis(100));
        daemon.freeze();
        let ended = [
            worker.put(&binding, &hash(2), &body(&binding.key(&hash(2)))).unwrap_err(),
            worker.reserve(&binding, &hash(3)).unwrap_err(),
            worker.pin(&binding, &[hash(1)], LONG).wait().unwrap_err(),
        ];
        if matches!(worker.doors(), Doors::SharedMemory { .. }) {
            let block = worker.acquire(&binding, &hash(1)).unwrap().block().unwrap();
            assert_right(&binding, 1, &block);
        }
        daemon.signal("-CONT");
        for error in ended {
            assert_eq!(error.kind(), FaultKind::Timeout, "{error}");
        }
        // Nothing is left behind: the same blocks can be stored now.
        let worker = worker.with_deadline(LONG);
        let until = Instant::now() + LONG;
        for number in [2, 3] {
            while let Err(error) = worker.put(&binding, &hash(number), &body(&binding.key(&hash(number)))) {
                assert!(error.kind() == FaultKind::Busy && Instant::now() < until, "{error}");
            }
            assert_right(&binding, number, &worker.get(&binding, &hash(number)).unwrap().unwrap());
        }
    });
}

#[test]
fn events_go_on_after_a_restart_without_a_gap() {
    let Some(mut daemon) = Daemon::start("events") else { return };
    let worker = daemon.worker(WorkerOptions::default());
    let binding = bind(&worker);
    put(&worker, &binding, 1);
    let mut events = worker.client().watch(WatchOptions::default());
    let (mut seen, mut numbers) = (std::collections::BTreeSet::new(), None);
    let mut until_seen = |seen: &mut std::collections::BTreeSet<BlockKey>, key: BlockKey| {
        let until = Instant::now() + LONG;
        while !seen.contains(&key) {
            assert!(Instant::now() < until, "no event of {key}");
            let Some(batch) = events.next_within(Duration::from_millis(100)) else { continue };
            let batch = batch.unwrap();
            if batch.snapshot {
                numbers = None;
            }
            for event in &batch.events {
                if !batch.snapshot {
                    assert!(numbers.is_none_or(|last| event.number == last + 1), "a gap before {event:?}");
                    numbers = Some(event.number);
                }
                if let EventKind::Stored { key, .. } = event.kind {
                    seen.insert(key);
                }
            }
        }
    };
    until_seen(&mut seen, binding.key(&hash(1)));
    put(&worker, &binding, 2);
    until_seen(&mut seen, binding.key(&hash(2)));
    daemon.kill();
    daemon.start_again();
    seen.clear();
    let epoch = worker.epoch();
    let until = Instant::now() + LONG;
    while worker.epoch() == epoch && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    put(&worker, &binding, 3);
    (1..=3).for_each(|number| until_seen(&mut seen, binding.key(&hash(number))));
}

#[test]
fn many_threads_share_a_worker_and_every_byte_is_right() {
    let Some(daemon) = Daemon::start("threads") else { return };
    // Little of everything, so that all of it runs out.
    let worker = daemon.worker(WorkerOptions {
        staging_bytes: 4 * BLOCK as u64,
        ring_entries: 4,
        hazards: 2,
        ..WorkerOptions::default()
    });
    let binding = bind(&worker);
    std::thread::scope(|scope| {
        for thread in 0..6u64 {
            let (worker, binding) = (&worker, &binding);
            scope.spawn(move || {
                for turn in 0..60 {
                    // Threads meet on the same blocks, and all of them together do not fit into host memory.
                    let number = (thread / 2) * 1000 + turn * 7 % 400;
                    put(worker, binding, number);
                    let blocks: Vec<_> = (0..3).map(|step| hash(number + step * 7)).collect();
                    for (step, got) in
                        worker.acquire_many(binding, &blocks, Duration::ZERO).unwrap().into_iter().enumerate()
                    {
                        if let Got::Block(block) = got {
                            assert_right(binding, number + step as u64 * 7, &block);
                        }
                    }
                }
            });
        }
    });
}

#[test]
fn a_trusted_worker_fills_the_arena_in_place() {
    let Some(daemon) = Daemon::start("trusted") else { return };
    let worker = daemon.worker(WorkerOptions { trusted: true, ..WorkerOptions::default() });
    if worker.doors() != (Doors::SharedMemory { in_place: true }) {
        eprintln!("skipped: the daemon does not let this user write in place: {:?}", worker.doors());
        return;
    }
    let binding = bind(&worker);
    let mut room = worker.reserve(&binding, &hash(1)).unwrap().unwrap();
    assert!(room.is_in_place());
    let key = room.key();
    room.copy_from_slice(&body(&key));
    room.commit().unwrap();
    let block = worker.acquire(&binding, &hash(1)).unwrap().block().unwrap();
    assert_right(&binding, 1, &block);
    assert!(block.verify());
    drop(worker.reserve(&binding, &hash(2)).unwrap().unwrap());
    put(&worker, &binding, 3);
    assert_right(&binding, 3, &worker.get(&binding, &hash(3)).unwrap().unwrap());
}

#[test]
fn an_evicted_block_stays_readable_for_whoever_holds_it() {
    let Some(daemon) = Daemon::start("evicted") else { return };
    let worker = daemon.worker(WorkerOptions::default());
    let binding = bind(&worker);
    put(&worker, &binding, 1);
    let held = worker.acquire(&binding, &hash(1)).unwrap().block().unwrap();
    worker.evict(&binding, &[hash(1)], None).wait().unwrap();
    assert!(worker.acquire(&binding, &hash(1)).unwrap().block().is_none());
    // More than host memory holds, so every free slot is used again.
    (100..1300).for_each(|number| assert!(!put(&worker, &binding, number)));
    assert_right(&binding, 1, &held);
    assert!(!held.still_valid());
    drop(worker);
    assert_right(&binding, 1, &held);
}
