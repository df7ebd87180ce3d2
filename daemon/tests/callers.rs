//! Who may do what, told by the kernel and not by the caller: stories with processes of several users.
//!
//! A process of another user needs root to be started; where the tests run as somebody else, these stories
//! say that they were skipped.

mod support;

use kv_api::v1;
use kv_block::SequenceHash;
use kv_block::code::Code;
use kv_client::{Client, ClientOptions, Endpoint, Worker, WorkerOptions};
use support::{Door, Home, scope, slice};

const BYTES: u32 = 64 << 10;
const ADMIN: u32 = 40_001;
const STRANGER: u32 = 40_002;

fn names(number: u64) -> Option<v1::Names> {
    let key = scope("a").id().block_key(&SequenceHash::from(number), &slice());
    Some(v1::Names { keys: vec![key.as_bytes().to_vec().into()], ..v1::Names::default() })
}

fn code<T: std::fmt::Debug>(answer: Result<T, tonic::Status>) -> Option<Code> {
    answer.err().map(|status| kv_api::fault::from_status(&status).code)
}

/// Not a story: what the stories run as another user.
#[test]
fn other_user() {
    let Some(home) = support::home_of_child() else { return };
    let door = Door::at(&home.join("run"));
    let run = &door.runtime;
    match support::role().as_str() {
        "administrator" => {
            let client = Client::connect(ClientOptions::socket(home.join("run"))).wait();
            let client = client.expect("connecting describes the daemon");
            run.block_on(async {
                let (mut blocks, mut admin) = (door.blocks(), door.admin());
                admin.status(v1::StatusRequest {}).await.expect("status");
                let explained =
                    blocks.explain(v1::ExplainRequest { names: names(1), session: 0 }).await.expect("why");
                assert!(explained.into_inner().miss.is_none(), "the block is here");
                let pin = v1::PinRequest { names: names(1), ttl_s: 60, session: 0 };
                assert_eq!(blocks.pin(pin).await.expect("pin").into_inner().pinned, 1);
                let unpin = v1::UnpinRequest { names: names(1), session: 0 };
                assert_eq!(blocks.unpin(unpin).await.expect("unpin").into_inner().unpinned, 1);
                let lookup = v1::LookupRequest { names: names(1), ..v1::LookupRequest::default() };
                assert_eq!(blocks.lookup(lookup).await.expect("lookup").into_inner().prefix, 1);
                let verify = v1::VerifyRequest { tier: v1::Tier::Host.into() };
                admin.verify(verify).await.expect("verify");
                let purge = v1::PurgeRequest { all: true, dry_run: true, ..v1::PurgeRequest::default() };
                admin.purge(purge).await.expect("purge");
                let get = v1::GetRequest { names: names(1), ..v1::GetRequest::default() };
                assert_eq!(code(blocks.get(get).await), Some(Code::Denied), "bytes are for workers");
                let evict = v1::EvictRequest { names: names(1), ..v1::EvictRequest::default() };
                assert_eq!(blocks.evict(evict).await.expect("evict").into_inner().evicted, 1);
            });
            assert!(door.try_register(&scope("a"), BYTES).is_some(), "`kvctl why --scope` registers");
            assert_eq!(
                door.put(&scope("a"), 0, 1, BYTES, false).map_err(|s| code(Err::<(), _>(s))),
                Err(Some(Code::Denied))
            );
            let worker = client.worker(WorkerOptions { grpc_only: true, ..WorkerOptions::default() }).wait();
            assert_eq!(worker.unwrap_err().code(), Some(Code::Denied));
        }
        "thief" => {
            let number = |name: &str| std::env::var(name).unwrap().parse().unwrap();
            let (session, lease): (u64, u64) = (number("KVD_STORY_SESSION"), number("KVD_STORY_LEASE"));
            steal(&door, session, lease);
        }
        role => panic!("nobody plays {role}"),
    }
}

/// Tries everything that a session's number opens.
fn steal(door: &Door, session: u64, lease: u64) {
    let mut blocks = door.blocks();
    door.runtime.block_on(async {
        let release = v1::ReleaseRequest { session, leases: vec![lease] };
        assert_eq!(code(blocks.release(release).await), Some(Code::Denied), "release");
        let abort = v1::AbortRequest { session, names: names(2) };
        assert_eq!(code(blocks.abort(abort).await), Some(Code::Denied), "abort");
        let acquire = v1::AcquireRequest { session, names: names(1), wait_ms: 0, node: String::new() };
        assert_eq!(code(blocks.acquire(acquire).await), Some(Code::Denied), "acquire");
        let get = v1::GetRequest { session, names: names(1), wait_ms: 0, node: String::new() };
        assert_eq!(code(blocks.get(get).await), Some(Code::Denied), "get");
    });
}

/// A session that holds block 1 and has announced block 2: the worker, and its lease.
fn victim(home: &Home, door: &Door) -> (Worker, u64) {
    let client = Client::connect(ClientOptions::socket(home.run_dir())).wait().unwrap();
    let worker = client.worker(WorkerOptions { grpc_only: true, ..WorkerOptions::default() }).wait().unwrap();
    let binding = door.register(&scope("a"), BYTES);
    assert!(!door.put(&scope("a"), binding, 1, BYTES, false).unwrap());
    let session = worker.session().0;
    let lease = door.runtime.block_on(async {
        let mut blocks = door.blocks();
        let names = |number: u64| v1::Names {
            binding,
            sequence_hashes: vec![SequenceHash::from(number).as_bytes().to_vec().into()],
            keys: Vec::new(),
        };
        let reserve = v1::ReserveRequest { session, names: Some(names(2)), ..v1::ReserveRequest::default() };
        assert_eq!(blocks.reserve(reserve).await.unwrap().into_inner().reserved, [true]);
        let acquire = v1::AcquireRequest { session, names: Some(names(1)), wait_ms: 0, node: String::new() };
        match blocks.acquire(acquire).await.unwrap().into_inner().acquired.remove(0).what {
            Some(v1::acquired::What::Lease(lease)) => lease.lease,
            other => panic!("{other:?}"),
        }
    });
    (worker, lease)
}

fn assert_untouched(door: &Door) {
    let status = door.status();
    assert_eq!((status.leases, status.pending), (1, 1), "lease and announcement are still there");
}

#[test]
fn an_administrator_who_is_no_worker_can_do_what_kvctl_offers() {
    let home = Home::new("admin").set(&format!("listen.admin_uids=[{ADMIN}]")).open_to_all();
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("a"), BYTES);
    assert!(!door.put(&scope("a"), binding, 1, BYTES, false).unwrap());
    home.run_as(ADMIN, "other_user", "administrator", &[]);
}

#[test]
fn a_session_belongs_to_the_user_who_opened_it() {
    let home = Home::new("thief").set(&format!("workers.uids=[\"self\", {STRANGER}]")).open_to_all();
    let _daemon = home.start();
    let door = Door::of(&home);
    let (worker, lease) = victim(&home, &door);
    let numbers = [("KVD_STORY_SESSION", worker.session().0), ("KVD_STORY_LEASE", lease)];
    home.run_as(STRANGER, "other_user", "thief", &numbers);
    assert_untouched(&door);
}

#[test]
fn a_session_of_this_machine_is_not_for_callers_over_tcp() {
    let home = Home::new("tcp-thief").set("listen.tcp=127.0.0.1:0");
    let _daemon = home.start();
    let door = Door::of(&home);
    let (worker, lease) = victim(&home, &door);
    let address = home.logged_address("gRPC over TCP");
    let uri = format!("http://{address}");
    steal(&Door::over_tcp(&uri), worker.session().0, lease);
    assert_untouched(&door);
    // Its own sessions are for it as for anybody.
    let endpoint = Endpoint::Uri { uri, tls: None };
    let client = Client::connect(ClientOptions { endpoint, ..ClientOptions::default() }).wait().unwrap();
    let remote = client.worker(WorkerOptions::default()).wait().unwrap();
    let binding = remote.register(scope("a"), slice(), BYTES).wait().unwrap();
    assert!(remote.reserve(&binding, &SequenceHash::from(9)).unwrap().is_some());
}
