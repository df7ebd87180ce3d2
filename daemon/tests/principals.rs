//! Users whose blocks lie apart: what one principal finds, maps and fills is its own.
//!
//! A process of another user needs root to be started; where the tests run as somebody else, these stories
//! say that they were skipped.

mod support;

use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use kv_api::v1;
use kv_block::SequenceHash;
use kv_client::{
    Binding, Client, ClientOptions, Doors, Evicted, MissReason, PutOptions, Tier, WatchOptions, Worker,
    WorkerOptions,
};
use kv_shm::door::{Connection, FDS_PER_SHARD, Hello, Message};
use support::{Door, Home, scope, slice};

const BYTES: u32 = 64 << 10;
/// The user of principal `b`.
const OTHER: u32 = 40_003;
/// Blocks of the default principal.
const OURS: u64 = 100;

fn home(name: &str) -> Home {
    let uids = format!("principals.b.uids=[{OTHER}]");
    Home::new(name).set(&uids).set("principals.b.share=25%").set("disk.admission=all").open_to_all()
}

fn connect(run_dir: std::path::PathBuf, grpc_only: bool) -> (Worker, Binding) {
    let client = Client::connect(ClientOptions::socket(run_dir)).wait().unwrap();
    let worker = client.worker(WorkerOptions { grpc_only, ..WorkerOptions::default() }).wait().unwrap();
    assert_eq!(matches!(worker.doors(), Doors::GrpcOnly { .. }), grpc_only, "{:?}", worker.doors());
    // The same scope and the same hashes as everybody here, the salt included.
    let binding = worker.register(scope("a"), slice(), BYTES).wait().unwrap();
    (worker, binding)
}

fn put(worker: &Worker, binding: &Binding, number: u64) -> bool {
    let hash = SequenceHash::from(number);
    let mut body = vec![0; BYTES as usize];
    kv_block::payload::fill(&binding.key(&hash), &mut body);
    worker.put(binding, &hash, &body).unwrap().already
}

fn hashes(numbers: std::ops::Range<u64>) -> Vec<SequenceHash> {
    numbers.map(SequenceHash::from).collect()
}

/// Not a story: what the stories run as the user of principal `b`.
#[test]
fn other_user() {
    let Some(home) = support::home_of_child() else { return };
    match support::role().as_str() {
        "finds nothing" => finds_nothing(&home),
        "maps its own" => maps_its_own(&home),
        "fills" => {
            let (worker, binding) = connect(home.join("run"), false);
            // Four times of what it may have.
            (0..1000).for_each(|number| assert!(!put(&worker, &binding, number)));
            let (there, _) = connect(home.join("run"), true);
            assert!(
                there.get(&binding, &SequenceHash::from(999)).unwrap().is_some(),
                "its last block is here"
            );
        }
        "finds its own" => {
            let (worker, binding) = connect(home.join("run"), false);
            let block = worker.get(&binding, &SequenceHash::from(7)).unwrap().expect("kept over a restart");
            assert_eq!(
                kv_block::payload::first_wrong_byte(&binding.key(&SequenceHash::from(7)), &block),
                None
            );
        }
        "stores one" => {
            let (worker, binding) = connect(home.join("run"), false);
            assert!(!put(&worker, &binding, 7));
        }
        role => panic!("nobody plays {role}"),
    }
}

/// Every question a worker can ask, by both doors.
fn finds_nothing(home: &std::path::Path) {
    for grpc_only in [false, true] {
        let (worker, binding) = connect(home.join("run"), grpc_only);
        let all = hashes(0..OURS);
        let (at, miss) = worker.lookup(&binding, &all).unwrap().first_miss.unwrap();
        assert_eq!((at, miss.reason), (0, MissReason::NeverStored));
        assert_eq!(worker.get(&binding, &all[1]).unwrap(), None);
        let got = worker.acquire_wait(&binding, &all[2], Duration::from_millis(50)).unwrap();
        assert_eq!(got.miss().unwrap().reason, MissReason::NeverStored);
        let why = worker.explain(&binding, &all[3]).wait().unwrap().expect("it is not here");
        assert_eq!(why.reason, MissReason::NeverStored);
        let evicted = worker.evict(&binding, &all, None).wait().unwrap();
        assert_eq!(evicted, Evicted { absent: OURS as u32, ..Evicted::default() });
        assert_eq!(worker.pin(&binding, &all, Duration::from_secs(60)).wait().unwrap().pinned, 0);
        assert_eq!(worker.unpin(&binding, &all).wait().unwrap(), 0);
        let prefetched = worker.prefetch(&binding, &all).wait().unwrap();
        assert_eq!((prefetched.started, prefetched.resident), (0, 0));
        // What is announced elsewhere is not announced here.
        assert!(worker.reserve(&binding, &SequenceHash::from(OURS)).unwrap().is_some());
        let mut events = worker.client().watch(WatchOptions::default());
        let batch = events.next_within(Duration::from_secs(10)).expect("an inventory").unwrap();
        assert!(batch.snapshot && batch.snapshot_end && batch.events.is_empty(), "{batch:?}");
        let described = worker.client().describe().wait().unwrap();
        assert_eq!((described.shards, described.principal.as_str()), (1, "b"));
    }
    let door = Door::at(&home.join("run"));
    let lookup = v1::LookupRequest {
        names: Some(v1::Names {
            keys: hashes(0..1)
                .iter()
                .map(|hash| scope("a").id().block_key(hash, &slice()).as_bytes().to_vec().into())
                .collect(),
            ..v1::Names::default()
        }),
        ..v1::LookupRequest::default()
    };
    let found = door.runtime.block_on(door.blocks().lookup(lookup)).unwrap().into_inner();
    assert_eq!(found.prefix, 0, "nor does it without a session");
}

/// The descriptors that the worker door gives out are those of its own files, and the others' stay shut.
fn maps_its_own(home: &std::path::Path) {
    let number = |name: &str| -> u64 { std::env::var(name).unwrap().parse().unwrap() };
    let connection = Connection::connect(&home.join("run/worker.sock"), Duration::from_secs(10)).unwrap();
    let hello = Hello {
        version_min: kv_shm::door::VERSION_MIN,
        version_max: kv_shm::door::VERSION,
        numa_node: None,
        hazards: 64,
        ring_entries: 64,
        staging_bytes: 1 << 20,
        wants_write: true,
        name: "stranger".into(),
    };
    connection.send(&Message::Hello(hello), &[]).unwrap();
    let (message, fds) = connection.recv(Duration::from_secs(10)).unwrap().expect("an answer");
    let Message::Welcome(welcome) = message else { panic!("{message:?}") };
    assert_eq!((welcome.shards.len(), fds.len()), (1, FDS_PER_SHARD));
    let inodes: Vec<u64> = fds.iter().map(|fd| rustix::fs::fstat(fd).unwrap().st_ino).collect();
    assert!(inodes.contains(&number("KVD_STORY_OWN_META")) && inodes.contains(&number("KVD_STORY_OWN_DATA")));
    assert!(!inodes.contains(&number("KVD_STORY_META")) && !inodes.contains(&number("KVD_STORY_DATA")));
    // Nor by way of the daemon's open files.
    let theirs = format!("/proc/{}/fd", number("KVD_STORY_PID"));
    assert!(std::fs::read_dir(theirs).is_err(), "the daemon's descriptors are closed to others");
    let again = std::fs::OpenOptions::new().write(true).open(format!("/proc/self/fd/{}", fds[1].as_raw_fd()));
    assert!(again.is_err(), "what is read-only stays so");
}

#[test]
fn a_principal_finds_nothing_of_another_and_its_fill_evicts_nothing_of_it() {
    let home = home("apart");
    let daemon = home.start();
    let (worker, binding) = connect(home.run_dir(), false);
    (0..OURS).for_each(|number| assert!(!put(&worker, &binding, number)));
    let announced = worker.reserve(&binding, &SequenceHash::from(OURS)).unwrap().unwrap();
    if !home.run_as(OTHER, "other_user", "finds nothing", &[]) {
        return;
    }
    let inode = |path: &str| std::fs::metadata(home.memory_dir().join(path)).unwrap().ino();
    let numbers = [
        ("KVD_STORY_META", inode("shard-0.meta")),
        ("KVD_STORY_DATA", inode("shard-0.data")),
        ("KVD_STORY_OWN_META", inode("principal-b/shard-0.meta")),
        ("KVD_STORY_OWN_DATA", inode("principal-b/shard-0.data")),
        ("KVD_STORY_PID", u64::from(daemon.pid())),
    ];
    home.run_as(OTHER, "other_user", "maps its own", &numbers);
    home.run_as(OTHER, "other_user", "fills", &[]);
    let found = worker.lookup(&binding, &hashes(0..OURS)).unwrap();
    assert_eq!(found.tiers, vec![Tier::Host; OURS as usize], "all of ours, where they were");
    drop(announced);

    // An administrator sees both, and each with its name.
    let door = Door::of(&home);
    let tiers = door.runtime.block_on(door.admin().list_tiers(v1::ListTiersRequest {})).unwrap().into_inner();
    let names: Vec<_> = tiers.tiers.iter().map(|tier| (tier.shard, tier.principal.as_str())).collect();
    assert_eq!(names, [(0, "default"), (0, "default"), (1, "b"), (1, "b")]);
    let room: Vec<u64> = tiers.tiers.iter().map(|tier| tier.bytes_wanted).collect();
    assert_eq!(room, [48 << 20, 192 << 20, 16 << 20, 64 << 20]);
    let tenants = door.runtime.block_on(door.admin().list_tenants(v1::ListTenantsRequest {})).unwrap();
    let tenants = tenants.into_inner().tenants;
    let rows: Vec<_> = tenants.iter().map(|row| (row.tenant.as_str(), row.principal.as_str())).collect();
    assert_eq!(rows, [("a", "default"), ("a", "b")]);
    assert_eq!(tenants[0].blocks, OURS);
    // What only b has is found by the administrator, who is a worker of the default principal, and not by the worker.
    let only_b = SequenceHash::from(999);
    let names =
        v1::Names { keys: vec![binding.key(&only_b).as_bytes().to_vec().into()], ..v1::Names::default() };
    let explain = |session: u64| {
        let request = v1::ExplainRequest { names: Some(names.clone()), session };
        let answer = door.runtime.block_on(door.blocks().explain(request)).unwrap().into_inner();
        answer.block.map(|block| block.principal)
    };
    assert_eq!(explain(0).as_deref(), Some("b"));
    assert_eq!(explain(worker.session().0), None);
    let get = v1::GetRequest { session: 0, names: Some(names.clone()), wait_ms: 0, node: String::new() };
    let first = door.runtime.block_on(async { door.blocks().get(get).await?.into_inner().message().await });
    let what = first.unwrap().and_then(|message| message.what);
    assert!(matches!(what, Some(v1::get_response::What::Miss(_))), "bytes do not cross: {what:?}");
    let evict = worker.evict(&binding, &[only_b], None).wait().unwrap();
    assert_eq!((evict.evicted, evict.absent), (0, 1), "a worker evicts its own");
    let evict = v1::EvictRequest { names: Some(names.clone()), ..v1::EvictRequest::default() };
    let evict = door.runtime.block_on(door.blocks().evict(evict)).unwrap().into_inner();
    assert_eq!(evict.evicted, 1, "an administrator evicts anybody's");
}

#[test]
fn each_principal_finds_its_own_blocks_after_a_restart_and_nobody_inherits_them() {
    let home = home("kept");
    let daemon = home.start();
    let (worker, binding) = connect(home.run_dir(), false);
    let durable = PutOptions { durable: true, ..PutOptions::default() };
    let mut body = vec![0; BYTES as usize];
    kv_block::payload::fill(&binding.key(&SequenceHash::from(1)), &mut body);
    worker.put_with(&binding, &SequenceHash::from(1), &body, &durable).unwrap();
    if !home.run_as(OTHER, "other_user", "stores one", &[]) {
        return;
    }
    daemon.kill();
    let daemon = home.start();
    home.run_as(OTHER, "other_user", "finds its own", &[]);
    let (worker, binding) = connect(home.run_dir(), false);
    assert!(worker.get(&binding, &SequenceHash::from(1)).unwrap().is_some());
    assert_eq!(worker.get(&binding, &SequenceHash::from(7)).unwrap(), None);
    daemon.kill();

    // The principal goes: its files stay, closed, and it is said.
    let mut without = home;
    let at = without.args.iter().position(|arg| arg.starts_with("principals.b.share")).unwrap();
    without.args.drain(at - 3..=at);
    assert!(!without.args.iter().any(|arg| arg.contains("principals")), "{:?}", without.args);
    let _daemon = without.start();
    let door = Door::of(&without);
    let binding = door.register(&scope("a"), BYTES);
    assert_eq!(door.get(&scope("a"), binding, 7).unwrap_err().reason(), v1::MissReason::NeverStored);
    let notes = door.status().recovery.unwrap().notes;
    assert!(notes.iter().any(|note| note.contains("principal-b")), "{notes:?}");
    assert!(without.memory_dir().join("principal-b/shard-0.data").exists());
}
