//! What stories about peers ask of a daemon.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kv_api::v1;
use kv_block::{BlockKey, SequenceHash, payload};

use super::{Door, Home, scope, slice};

/// Homes of nodes `a`, `b`, ... that know each other, each with `host` memory and `disk`.
pub(crate) fn nodes<const N: usize>(story: &str, host: &str, disk: Option<&str>) -> [Home; N] {
    // Ports that were free a moment ago; all are taken before the first is given back.
    let free: Vec<_> = (0..N).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let ports: Vec<u16> = free.iter().map(|one| one.local_addr().unwrap().port()).collect();
    let name = |at: usize| char::from(b'a' + at as u8).to_string();
    let member = |(at, port): (usize, &u16)| format!("{}=127.0.0.1:{port}", name(at));
    let members: Vec<String> = ports.iter().enumerate().map(member).collect();
    drop(free);
    std::array::from_fn(|at| {
        Home::sized(&format!("{story}-{}", name(at)), host, disk)
            .set(&format!("node.name={}", name(at)))
            .set(&format!("peers.listen=127.0.0.1:{}", ports[at]))
            .set(&format!("peers.members={}", members.join(",")))
    })
}

/// Waits until `look` finds something, a minute at most: a peer that was down for long is tried again within half of it.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let limit = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < limit, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A peer as the daemon behind this door sees it.
pub(crate) fn peer(door: &Door, node: &str) -> v1::PeerInfo {
    let request = v1::DescribePeerRequest { node: node.into() };
    let answer = door.runtime.block_on(async { door.admin().describe_peer(request).await });
    answer.expect("describe peer").into_inner().peer.expect("a peer")
}

/// Blocks on their way to it.
pub(crate) fn transfers(door: &Door) -> Vec<v1::TransferInfo> {
    let answer =
        door.runtime.block_on(async { door.admin().list_transfers(v1::ListTransfersRequest {}).await });
    answer.expect("transfers").into_inner().transfers
}

/// Waits until the daemon has nothing on its way from or for any of these peers.
pub(crate) fn until_nothing_is_left(door: &Door, nodes: &[&str]) {
    let left = Mutex::new(String::new());
    until_or(
        "nothing is left",
        || left.lock().unwrap().clone(),
        || {
            let busy: Vec<_> = nodes
                .iter()
                .map(|node| peer(door, node))
                .filter(|peer| peer.wanted + peer.reading + peer.held + peer.held_bytes > 0)
                .collect();
            let transfers = transfers(door);
            let operations = door.status().operations_in_flight;
            let idle = busy.is_empty() && transfers.is_empty() && operations == 0;
            *left.lock().unwrap() = format!("{operations} operations, {transfers:?}, {busy:?}");
            idle.then_some(())
        },
    );
}

fn until_or<T>(what: &str, why: impl Fn() -> String, mut look: impl FnMut() -> Option<T>) -> T {
    let limit = Instant::now() + Duration::from_secs(40);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < limit, "{what}: not within 40 s: {}", why());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The name of the block that the number names.
pub(crate) fn key_of(number: u64) -> BlockKey {
    key_in("t", number)
}

fn key_in(tenant: &str, number: u64) -> BlockKey {
    scope(tenant).id().block_key(&SequenceHash::from(number), &slice())
}

/// Asks for a block and waits for so long. Its bytes are compared; otherwise, why it is missing. It must not take
/// longer than it may: by a tenth, and by as much as this machine is late for everybody.
pub(crate) fn get(
    door: &Door,
    binding: u32,
    number: u64,
    wait_ms: u32,
    node: &str,
) -> (Result<(), v1::MissReason>, Duration) {
    get_of("t", door, binding, number, wait_ms, node)
}

/// The same of another tenant.
pub(crate) fn get_of(
    tenant: &str,
    door: &Door,
    binding: u32,
    number: u64,
    wait_ms: u32,
    node: &str,
) -> (Result<(), v1::MissReason>, Duration) {
    let lateness = Lateness::watch();
    let begun = Instant::now();
    let names = v1::Names {
        binding,
        sequence_hashes: vec![SequenceHash::from(number).as_bytes().to_vec().into()],
        ..v1::Names::default()
    };
    let request = v1::GetRequest { session: 0, names: Some(names), wait_ms, node: node.into() };
    let key = key_in(tenant, number);
    let got = door.runtime.block_on(async {
        let mut stream = match door.blocks().get(request).await {
            Ok(stream) => stream.into_inner(),
            // A shard that was kept from its core for longer than a caller waits says so, instead of a miss.
            Err(late) if late.code() == tonic::Code::DeadlineExceeded => {
                return Err(v1::MissReason::TierTimeout);
            }
            Err(fault) => panic!("get: {fault}"),
        };
        let (mut bytes, mut wanted) = (Vec::new(), None);
        while let Some(message) = stream.message().await.expect("a message") {
            match message.what.expect("something") {
                v1::get_response::What::Header(header) => wanted = Some(header.bytes as usize),
                v1::get_response::What::Chunk(piece) => bytes.extend_from_slice(&piece),
                v1::get_response::What::Miss(miss) => return Err(miss.reason()),
            }
        }
        assert_eq!(Some(bytes.len()), wanted, "block {number} is shorter than its header says");
        assert_eq!(payload::first_wrong_byte(&key, &bytes), None, "wrong bytes in block {number}");
        Ok(())
    });
    let took = begun.elapsed();
    let limit = Duration::from_millis(u64::from(wait_ms) * 11 / 10 + 200) + 5 * lateness.most();
    assert!(took < limit, "{took:?} for a wait of {wait_ms} ms, and {:?} late: {got:?}", lateness.most());
    (got, took)
}

/// How late this machine wakes whoever sleeps: a limit on time means nothing without it, beside a build.
struct Lateness {
    most: &'static AtomicU64,
    before: u64,
}

impl Lateness {
    fn watch() -> Self {
        static MOST: AtomicU64 = AtomicU64::new(0);
        static WATCHED: AtomicBool = AtomicBool::new(false);
        if !WATCHED.swap(true, Ordering::Relaxed) {
            std::thread::spawn(|| {
                let nap = Duration::from_millis(5);
                loop {
                    let begun = Instant::now();
                    std::thread::sleep(nap);
                    // Forgets by halves within a second or so.
                    let late = begun.elapsed().saturating_sub(nap).as_micros() as u64;
                    let faded = MOST.load(Ordering::Relaxed) * 127 / 128;
                    MOST.store(faded.max(late), Ordering::Relaxed);
                }
            });
        }
        Self { most: &MOST, before: MOST.load(Ordering::Relaxed) }
    }

    fn most(&self) -> Duration {
        Duration::from_micros(self.before.max(self.most.load(Ordering::Relaxed)))
    }
}

/// Stores as many blocks as there is room for, finds how many stay, and removes them all. Memory that somebody keeps
/// shows as fewer.
pub(crate) fn room_for_blocks(door: &Door, block_bytes: u32, put: u64) -> u64 {
    let purge = || {
        let request = v1::PurgeRequest { all: true, ..v1::PurgeRequest::default() };
        let purged = door.runtime.block_on(async {
            let mut stream = door.admin().purge(request).await?.into_inner();
            while stream.message().await?.is_some() {}
            Ok::<_, tonic::Status>(())
        });
        purged.expect("purge");
    };
    purge();
    let binding = door.register(&scope("room"), block_bytes);
    for number in 0..put {
        door.put(&scope("room"), binding, number, block_bytes, false).expect("put");
    }
    let stay = door.status().blocks;
    purge();
    stay
}

/// Reasons as a set, for a table.
pub(crate) fn reasons(all: &[v1::MissReason]) -> BTreeSet<i32> {
    all.iter().map(|reason| *reason as i32).collect()
}
