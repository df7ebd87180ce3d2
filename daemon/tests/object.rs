//! Real daemons that share an object store: what goes up, who finds it, what a sick store costs.

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use kv_api::v1;
use kv_block::{BlockKey, Scope, SequenceHash};
use kv_client::{Binding, Client, ClientOptions, PutOptions, Sighting, Tier, Worker, WorkerOptions};
use support::among::{get, until};
use support::{Door, Home, scope, slice};

const BLOCK: u32 = 64 << 10;

/// A node that sends up what was read as soon as it can, and looks for what others wrote all the time.
fn node(story: &str, name: &str, store: &str) -> Home {
    Home::sized(&format!("{story}-{name}"), "64MiB", None)
        .set(&format!("node.name={name}"))
        .set(&format!("object.store={store}"))
        .set("object.age_min=0s")
        .set("object.pack_wait=200ms")
        .set("object.refresh=200ms")
}

fn put(door: &Door, numbers: std::ops::Range<u64>) -> u32 {
    let binding = door.register(&scope("t"), BLOCK);
    for number in numbers {
        door.put(&scope("t"), binding, number, BLOCK, false).expect("put");
    }
    binding
}

/// Stores and reads blocks, and waits until they are in the store.
fn send_up(door: &Door, numbers: std::ops::Range<u64>) -> u32 {
    let count = numbers.end - numbers.start;
    let before = tier(door).map_or(0, |tier| tier.blocks);
    let binding = put(door, numbers.clone());
    for number in numbers {
        assert_eq!(get(door, binding, number, 0, "").0, Ok(()));
    }
    until("they are up", || tier(door).filter(|tier| tier.blocks == before + count));
    binding
}

fn tier(door: &Door) -> Option<v1::TierInfo> {
    door.status().tiers.into_iter().find(|tier| tier.tier() == v1::Tier::Object)
}

fn names(binding: u32, numbers: std::ops::Range<u64>) -> Option<v1::Names> {
    let hashes = numbers.map(|number| SequenceHash::from(number).as_bytes().to_vec().into());
    Some(v1::Names { binding, sequence_hashes: hashes.collect(), ..v1::Names::default() })
}

/// How many of the first of these the node says can be had.
fn found(door: &Door, binding: u32, numbers: std::ops::Range<u64>, peers: bool) -> (u32, Vec<v1::Tier>) {
    let request = v1::LookupRequest { names: names(binding, numbers), peers, ..v1::LookupRequest::default() };
    let answer =
        door.runtime.block_on(async { door.blocks().lookup(request).await }).expect("lookup").into_inner();
    let tiers = answer.found.iter().filter_map(|found| match found.what {
        Some(v1::found::What::Tier(tier)) => v1::Tier::try_from(tier).ok(),
        _ => None,
    });
    (answer.prefix, tiers.collect())
}

fn worker(home: &Home) -> (Worker, Binding) {
    let client = Client::connect(ClientOptions::socket(home.run_dir())).wait().expect("connect");
    let worker = client.worker(WorkerOptions::default()).wait().expect("a session");
    let binding = worker.register(scope("t"), slice(), BLOCK).wait().expect("register");
    (worker, binding)
}

fn body(key: &BlockKey) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK as usize];
    kv_block::payload::fill(key, &mut bytes);
    bytes
}

fn packs(store: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(store.join("packs")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("kvd-story-").tempdir().expect("a temporary directory")
}

#[test]
fn what_one_node_sent_up_another_finds_and_reads() {
    let dir = directory();
    let store = dir.path().join("objects");
    share(&store.display().to_string(), "share");
    assert!(!packs(&store).is_empty());
}

/// The same on a server, where one is given: `KVD_S3` as the object tier's own tests take it.
#[test]
fn what_one_node_sent_up_another_finds_on_s3() {
    let Ok(server) = std::env::var("KVD_S3") else {
        eprintln!("skipped: KVD_S3 names no server; tiers/object/servers starts one");
        return;
    };
    let [endpoint, bucket, id, secret] = server.split(',').collect::<Vec<_>>()[..] else {
        panic!("KVD_S3 is ENDPOINT,BUCKET,KEY,SECRET");
    };
    let prefix = format!("story-{}", std::process::id());
    let store = format!("s3://{bucket}/{prefix}?endpoint={endpoint}&path_style=true");
    share_as(&store, "s3", &[("AWS_ACCESS_KEY_ID", id), ("AWS_SECRET_ACCESS_KEY", secret)]);
}

fn share(store: &str, story: &str) {
    share_as(store, story, &[]);
}

fn share_as(store: &str, story: &str, keys: &[(&str, &str)]) {
    let with = |home: Home| keys.iter().fold(home, |home, (name, value)| home.with_env(name, value));
    let (a, b) = (with(node(story, "a", store)), with(node(story, "b", store)));
    let (running_a, _b) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    send_up(&at_a, 0..64);
    let binding = at_b.register(&scope("t"), BLOCK);
    until("the other node hears of them", || (found(&at_b, binding, 0..64, true).0 == 64).then_some(()));
    assert_eq!(found(&at_b, binding, 0..1, true).1, [v1::Tier::Object]);
    assert_eq!(found(&at_b, binding, 0..64, false).0, 0, "nobody asked for more than what is here");
    // The writer is gone for good.
    running_a.kill();
    for number in 0..64 {
        assert_eq!(get(&at_b, binding, number, 5_000, "").0, Ok(()), "block {number}");
    }
    let status = at_b.status();
    assert!(status.hits["object"] > 0, "{status:?}");
    let tier = tier(&at_b).expect("an object tier");
    assert_eq!((tier.state.as_str(), tier.blocks), ("ok", 64), "{tier:?}");
    assert_eq!(tier.bytes_read, 64 * u64::from(BLOCK), "each once");
    // What was never stored is a miss, and soon.
    assert_eq!(get(&at_b, binding, 999, 5_000, "").0, Err(v1::MissReason::NeverStored));
}

#[test]
fn whoever_reads_the_head_of_a_prefix_gets_the_rest_with_it() {
    let dir = directory();
    let store = dir.path().display().to_string();
    let (a, b) = (node("ahead", "a", &store).set("object.reads_min=0"), node("ahead", "b", &store));
    let (_a, _b) = (a.start(), b.start());
    let (writer, binding) = worker(&a);
    // Two prefixes, handed over side by side.
    let chain = |first: u64| -> Vec<SequenceHash> { (first..first + 16).map(SequenceHash::from).collect() };
    for hashes in [chain(0), chain(100)] {
        let bodies: Vec<_> = hashes.iter().map(|hash| (*hash, body(&binding.key(hash)))).collect();
        let blocks: Vec<_> = bodies.iter().map(|(hash, bytes)| (*hash, &bytes[..])).collect();
        for stored in writer.put_many(&binding, &blocks, &PutOptions::default()).expect("put") {
            stored.expect("put");
        }
    }
    let at_b = Door::of(&b);
    until("the other node hears of them", || tier(&at_b).filter(|tier| tier.blocks == 32));
    let (reader, binding) = worker(&b);
    let head =
        reader.acquire_wait(&binding, &SequenceHash::from(0), Duration::from_secs(5)).expect("acquire");
    assert_eq!(head.block().expect("a block")[..], body(&binding.key(&SequenceHash::from(0)))[..]);
    // Without being asked for, and nothing of the other prefix.
    until("the rest comes", || {
        (reader.lookup(&binding, &chain(0)).expect("lookup").prefix() == 16).then_some(())
    });
    assert_eq!(reader.lookup(&binding, &chain(100)).expect("lookup").prefix(), 0);
    assert_eq!(tier(&at_b).expect("an object tier").bytes_read, 16 * u64::from(BLOCK));
    let located = reader.locate(&binding, &chain(100)).wait().expect("locate");
    assert_eq!(located, vec![Sighting::Here(Tier::Object); 16]);
}

#[test]
fn a_reader_of_another_layout_misses_and_hears_why() {
    let dir = directory();
    let store = dir.path().display().to_string();
    let (a, b) = (node("layout", "a", &store), node("layout", "b", &store));
    let (_a, _b) = (a.start(), b.start());
    send_up(&Door::of(&a), 0..4);
    let door = Door::of(&b);
    until("the other node hears of them", || tier(&door).filter(|tier| tier.blocks == 4));
    let other = Scope { layout: "layer,kv,token,head,dim".into(), ..scope("t") };
    let binding = door.register(&other, BLOCK);
    let request = v1::ExplainRequest { names: names(binding, 0..1), ..v1::ExplainRequest::default() };
    let told = door.runtime.block_on(async { door.blocks().explain(request).await }).expect("explain");
    let miss = told.into_inner().miss.expect("a miss");
    assert_eq!(miss.reason(), v1::MissReason::ScopeDiffers, "{miss:?}");
    assert_eq!(miss.fields, ["layout"]);
}

#[test]
fn a_node_that_lost_everything_finds_what_it_had_sent_up() {
    let dir = directory();
    let store = dir.path().display().to_string();
    let first = node("lost", "a", &store);
    let running = first.start();
    send_up(&Door::of(&first), 0..16);
    running.terminate();
    drop(first);
    // Other memory, the same name.
    let again = node("lost-again", "a", &store);
    let _running = again.start();
    let door = Door::of(&again);
    until("the store is open", || tier(&door).filter(|tier| tier.blocks == 16));
    let binding = door.register(&scope("t"), BLOCK);
    for number in 0..16 {
        assert_eq!(get(&door, binding, number, 5_000, "").0, Ok(()), "block {number}");
    }
    // And goes on writing.
    send_up(&door, 16..20);
}

#[test]
fn what_waits_to_be_packed_goes_up_when_the_daemon_ends() {
    let dir = directory();
    let store = dir.path().display().to_string();
    let home = node("ends", "a", &store).set("object.pack_wait=1h");
    let running = home.start();
    let door = Door::of(&home);
    until("the store is open", || tier(&door).filter(|tier| tier.state == "ok"));
    let binding = put(&door, 0..8);
    for number in 0..8 {
        assert_eq!(get(&door, binding, number, 0, "").0, Ok(()));
    }
    until("they are taken", || tier(&door).filter(|tier| tier.bytes_written == 8 * u64::from(BLOCK)));
    assert!(packs(dir.path()).is_empty());
    assert!(running.terminate().success());
    assert_eq!(packs(dir.path()).len(), 1);
}

#[test]
fn a_damaged_pack_costs_a_miss_and_no_wrong_byte() {
    let dir = directory();
    let store = dir.path().display().to_string();
    let (a, b) = (node("damage", "a", &store), node("damage", "b", &store));
    let running_a = a.start();
    send_up(&Door::of(&a), 0..16);
    running_a.terminate();
    let _b = b.start();
    let door = Door::of(&b);
    let binding = door.register(&scope("t"), BLOCK);
    until("the store is open", || tier(&door).filter(|tier| tier.blocks == 16));
    for pack in packs(dir.path()) {
        let mut bytes = std::fs::read(&pack).expect("a pack");
        // A byte in each of the first half of its blocks.
        let end = bytes.len() / 2;
        bytes[..end].iter_mut().skip(100).step_by(BLOCK as usize).for_each(|byte| *byte ^= 1);
        std::fs::write(&pack, bytes).expect("written over");
    }
    let mut missed = 0;
    for number in 0..16 {
        // What is read is compared.
        match get(&door, binding, number, 5_000, "").0 {
            Ok(()) => {}
            Err(v1::MissReason::Corrupt | v1::MissReason::NeverStored) => missed += 1,
            other => panic!("block {number}: {other:?}"),
        }
    }
    assert!((4..=12).contains(&missed), "{missed} of 16 missed");
}

#[test]
fn a_store_that_is_not_there_costs_misses_and_nothing_else() {
    // Nobody listens there.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let store = format!("s3://bucket?endpoint=http://127.0.0.1:{port}&path_style=true");
    let home = node("absent", "a", &store)
        .with_env("AWS_ACCESS_KEY_ID", "nobody")
        .with_env("AWS_SECRET_ACCESS_KEY", "do-not-show-this");
    let _running = home.start();
    let door = Door::of(&home);
    let binding = put(&door, 0..4);
    for number in 0..4 {
        assert_eq!(get(&door, binding, number, 1_000, "").0, Ok(()));
    }
    let (answer, took) = get(&door, binding, 99, 5_000, "");
    assert_eq!(answer, Err(v1::MissReason::TierDegraded));
    assert!(took < Duration::from_secs(4), "{took:?}");
    let status = until("it is told", || {
        let status = door.status();
        status.warnings.iter().any(|warning| warning.text.contains("object store")).then_some(status)
    });
    assert_eq!(status.health, "warn");
    assert!(!home.log().contains("do-not-show-this"));
}

#[test]
fn a_wrong_store_is_refused_at_the_start_and_keys_are_not_repeated() {
    for (store, words) in [
        ("ftp://x/y", "object.store"),
        ("s3://bucket?secret=hunter2", "object.store"),
        ("s3://me:hunter2@bucket", "object.store"),
        ("relative/path", "object.store"),
    ] {
        let home = Home::sized("wrong", "64MiB", None).set(&format!("object.store={store}"));
        assert!(!home.start_and_fail().success());
        let log = home.log();
        assert!(log.contains(words) && !log.contains("hunter2"), "{log}");
    }
}
