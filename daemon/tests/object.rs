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
    let described = at_b.runtime.block_on(async { at_b.worker().describe(v1::DescribeRequest {}).await });
    assert!(described.expect("describe").into_inner().object, "workers are told whom to ask");
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
    // One pack, however slow this machine is: it is written when the daemon ends.
    let a = node("ahead", "a", &store).set("object.reads_min=0").set("object.pack_wait=1h");
    let b = node("ahead", "b", &store);
    let running_a = a.start();
    let at_a = Door::of(&a);
    until("the store is open", || tier(&at_a).filter(|tier| tier.state == "ok"));
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
    until("they are taken", || tier(&at_a).filter(|tier| tier.bytes_written == 32 * u64::from(BLOCK)));
    assert!(running_a.terminate().success());
    assert_eq!(packs(dir.path()).len(), 1);
    let _b = b.start();
    let at_b = Door::of(&b);
    until("the other node finds them", || tier(&at_b).filter(|tier| tier.blocks == 32));
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

/// The answer of one call to the administrators' service.
fn ask<T>(
    door: &Door,
    call: impl AsyncFnOnce(
        v1::admin_client::AdminClient<tonic::transport::Channel>,
    ) -> Result<tonic::Response<T>, tonic::Status>,
) -> Result<T, kv_block::Fault> {
    let answer = door.runtime.block_on(call(door.admin()));
    answer.map(tonic::Response::into_inner).map_err(|status| kv_api::fault::from_status(&status))
}

fn list_packs(door: &Door, id_prefix: &str, rescan: bool) -> Vec<v1::PackInfo> {
    let mut request =
        v1::ListPacksRequest { id_prefix: id_prefix.into(), rescan, page_size: 1, ..Default::default() };
    let mut all = Vec::new();
    loop {
        let page = ask(door, async |mut admin| admin.list_packs(request.clone()).await).expect("packs");
        assert!(page.packs.len() <= 1);
        all.extend(page.packs);
        if page.next_page_token.is_empty() {
            return all;
        }
        request.page_token = page.next_page_token;
    }
}

fn object_tier(door: &Door) -> v1::ObjectTierInfo {
    let request = v1::ListObjectTiersRequest {};
    let answer = ask(door, async |mut admin| admin.list_object_tiers(request).await);
    answer.expect("object tiers").tiers.remove(0)
}

/// The last word of a verification of the object tier.
fn verify(door: &Door) -> v1::Progress {
    door.runtime.block_on(async {
        let request = v1::VerifyRequest { tier: v1::Tier::Object.into() };
        let mut stream = door.admin().verify(request).await.expect("verify").into_inner();
        let mut last = v1::Progress::default();
        while let Some(progress) = stream.message().await.expect("progress") {
            last = progress;
        }
        last
    })
}

fn explain(door: &Door, binding: u32, number: u64) -> v1::ExplainResponse {
    let request = v1::ExplainRequest { names: names(binding, number..number + 1), session: 0 };
    door.runtime.block_on(async { door.blocks().explain(request).await }).expect("explain").into_inner()
}

fn evict(
    door: &Door,
    binding: u32,
    numbers: std::ops::Range<u64>,
    tier: v1::Tier,
) -> Result<u32, kv_block::Fault> {
    let request =
        v1::EvictRequest { names: names(binding, numbers), tier: tier.into(), ..Default::default() };
    let answer = door.runtime.block_on(async { door.blocks().evict(request).await });
    answer.map(|answer| answer.into_inner().evicted).map_err(|status| kv_api::fault::from_status(&status))
}

/// Puts a pack into the store that no living node wrote. What it says of its scope is no JSON.
fn ghost(store: &Path, number: u8) -> (PathBuf, kv_object::pack::PackId) {
    use kv_object::pack::{Binding, Block, Writer, encode};
    let scope = kv_block::ScopeId([number; 32]);
    let slice = kv_block::Slice::whole(1, 1);
    let binding = Binding { scope, slice, block_bytes: 4096, about: "of an other make".into() };
    let (key, bytes) = (kv_block::BlockKey([number; 16]), vec![number; 4096]);
    let record = kv_block::Record {
        key,
        checksum: kv_block::Checksum::of(&key, &bytes),
        bytes: 4096,
        tag: binding.tag(),
        priority: kv_block::Priority::Normal,
        expires_at: 0,
    };
    let writer = Writer { node: "ghost".into(), epoch: kv_block::Epoch(3), sequence: 9 };
    let block = Block { record, follows: false, bytes: &bytes };
    let pack = encode(writer, vec![binding], &[block]).expect("a pack");
    let path = store.join("packs").join(pack.id.to_string());
    std::fs::write(&path, &pack.bytes).expect("written");
    (path, pack.id)
}

/// Makes it a pack of a later version, sound otherwise.
fn of_another_version(pack: &Path) {
    let mut bytes = std::fs::read(pack).expect("a pack");
    let at = bytes.len() - kv_object::pack::TRAILER_BYTES;
    bytes[at + 8] = 7;
    let crc = crc32fast::hash(&bytes[at..at + 28]);
    bytes[at + 28..].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(pack, bytes).expect("written over");
}

#[test]
fn operators_see_every_pack_and_what_is_in_it() {
    let dir = directory();
    let home = node("packs", "a", &dir.path().display().to_string());
    let _running = home.start();
    let door = Door::of(&home);
    let binding = send_up(&door, 0..16);
    let tier = object_tier(&door);
    assert_eq!(
        (&tier.principal[..], &tier.state[..], &tier.circuit[..]),
        ("default", "ok", "closed"),
        "{tier:?}"
    );
    assert_eq!((tier.blocks, tier.blocks_written, tier.packs_set_aside), (16, 16, 0), "{tier:?}");
    assert_eq!((tier.packs, tier.packs_listed), (tier.packs_written, tier.packs), "{tier:?}");
    let puts = tier.requests.iter().find(|asked| asked.kind == "put").expect("puts");
    assert!(puts.well >= tier.packs && puts.bytes > 16 * u64::from(BLOCK), "{puts:?}");
    // What others left, which no manifest names: found when the store is listed.
    let (_, other) = ghost(dir.path(), 1);
    let (newer, newer_id) = ghost(dir.path(), 2);
    of_another_version(&newer);
    let nonsense = "5".repeat(64);
    std::fs::write(dir.path().join("packs").join(&nonsense), vec![0; 5000]).expect("written");
    let own = list_packs(&door, "", false);
    assert_eq!(own.len() as u64, tier.packs);
    for pack in &own {
        assert_eq!((&pack.state[..], &pack.writer[..], pack.listed), ("ok", "a", true), "{pack:?}");
        assert_eq!(pack.tenants, ["t"], "{pack:?}");
        assert!(pack.expires_at > 0, "{pack:?}");
    }
    let all = list_packs(&door, "", true);
    assert_eq!(all.len(), own.len() + 3, "{all:?}");
    assert!(all.is_sorted_by(|a, b| a.id < b.id), "{all:?}");
    let one = |id: &str| {
        let found = list_packs(&door, &id[..16], false);
        let [pack] = &found[..] else { panic!("{found:?}") };
        pack.clone()
    };
    let pack = one(&newer_id.to_string());
    assert_eq!((&pack.state[..], pack.blocks, pack.listed), ("incompatible", 0, false), "{pack:?}");
    assert!(pack.reason.contains("version 7") && pack.bytes > 4096, "{pack:?}");
    assert_eq!(one(&nonsense).state, "broken");
    let pack = one(&other.to_string());
    assert_eq!((&pack.writer[..], pack.epoch, pack.sequence), ("ghost", 3, 9), "{pack:?}");
    assert_eq!((&pack.state[..], pack.expires_at, pack.tenants.len()), ("ok", 0, 0), "{pack:?}");
    let tier = object_tier(&door);
    assert_eq!((tier.packs_set_aside, tier.set_aside.len()), (2, 2), "{tier:?}");
    // One in full.
    let describe = |id: &bytes::Bytes, first_block| {
        let request = v1::DescribePackRequest { id: id.clone(), first_block };
        ask(&door, async |mut admin| admin.describe_pack(request).await)
    };
    let described = describe(&own[0].id, 0).expect("described");
    let pack = described.pack.expect("a pack");
    assert_eq!(pack, own[0]);
    assert_eq!(described.blocks.len() as u64, pack.blocks);
    assert_eq!((described.blocks[0].offset, described.blocks[0].bytes), (16, BLOCK));
    let [under] = &described.bindings[..] else { panic!("{:?}", described.bindings) };
    let said = scope("t");
    assert_eq!((&under.tenant, &under.model, &under.dtype), (&said.tenant, &said.model, &said.dtype));
    assert_eq!((under.block_tokens, under.block_bytes), (said.block_tokens, BLOCK));
    assert_eq!((under.blocks, &under.scope_id[..]), (pack.blocks, &said.id().as_bytes()[..]));
    let rest = describe(&own[0].id, 1).expect("described");
    assert_eq!((rest.blocks.len() as u64, rest.bindings.len()), (pack.blocks - 1, 0));
    assert!(describe(&pack.id.slice(1..), 0).unwrap_err().message.contains("32 bytes"));
    assert!(describe(&vec![9; 32].into(), 0).unwrap_err().message.contains("is known here"));
    // A block that is not here any more.
    assert_eq!(evict(&door, binding, 0..16, v1::Tier::Unspecified), Ok(16));
    let explained = explain(&door, binding, 3);
    assert!(own.iter().any(|pack| pack.id == explained.pack), "{explained:?}");
    assert!(explained.miss.is_some(), "{explained:?}");
    assert_eq!(explained.block.expect("remembered").tiers, [i32::from(v1::Tier::Object)]);
    assert!(explain(&door, binding, 99).pack.is_empty());
    assert_eq!(get(&door, binding, 3, 5_000, "").0, Ok(()));
    let explained = explain(&door, binding, 3);
    assert!(explained.miss.is_none() && !explained.pack.is_empty(), "{explained:?}");
    let tier = object_tier(&door);
    let tokens = tier.served_blocks * u64::from(said.block_tokens);
    assert!(tier.served_blocks > 0 && tier.blocks_read >= tier.served_blocks, "{tier:?}");
    assert_eq!(tier.served_tokens, tokens, "{tier:?}");
    // The same in the status and in the metrics.
    assert_eq!(door.status().object_tiers.len(), 1);
    until("the metrics tell of it", || {
        let text = metrics(&home);
        let has = |line: &str| text.lines().any(|found| found == line);
        let blocks =
            format!("kvd_object_blocks_written_total{{principal=\"default\"}} {}", tier.blocks_written);
        let aside = "kvd_object_packs{principal=\"default\",state=\"set_aside\"} 2";
        let asked = "kvd_object_requests_total{principal=\"default\",kind=\"put\",result=\"ok\"} ";
        let served = "kvd_object_served_blocks_total{principal=\"default\"} ";
        let begins = |line: &str| text.lines().any(|found| found.starts_with(line) && !found.ends_with(" 0"));
        (has(&blocks) && has(aside) && begins(asked) && begins(served)).then_some(())
    });
}

fn metrics(home: &Home) -> String {
    use std::io::{Read as _, Write as _};
    let address = home.logged_address("health and metrics over HTTP");
    let mut stream = std::net::TcpStream::connect(address).expect("connect");
    let request = "GET /metrics HTTP/1.1\r\nHost: kvd\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).expect("asked");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text
}

#[test]
fn verification_reads_every_pack_and_counts_what_is_damaged() {
    let dir = directory();
    let home = node("verify", "a", &dir.path().display().to_string());
    let _running = home.start();
    let door = Door::of(&home);
    send_up(&door, 0..16);
    let bytes = object_tier(&door).pack_bytes;
    let sound = verify(&door);
    assert_eq!((sound.done, sound.total, sound.failed, sound.finished), (16, 16, 0, true), "{sound:?}");
    assert_eq!(sound.bytes, bytes);
    let path = packs(dir.path()).remove(0);
    let mut body = std::fs::read(&path).expect("a pack");
    body[100] ^= 1;
    std::fs::write(&path, body).expect("written over");
    let damaged = verify(&door);
    assert_eq!((damaged.done, damaged.failed, damaged.finished), (16, 1, true), "{damaged:?}");
    let id = path.file_name().unwrap().to_str().unwrap().to_owned();
    let pack = list_packs(&door, &id, false).remove(0);
    assert_eq!((&pack.state[..], pack.damaged_blocks), ("damaged", 1), "{pack:?}");
    // What lies around the blocks: whoever starts now can read none of them.
    let mut body = std::fs::read(&path).expect("a pack");
    let end = body.len();
    body[end - 1] ^= 1;
    body[100] ^= 1;
    std::fs::write(&path, body).expect("written over");
    assert_eq!(verify(&door).failed, pack.blocks);
    // A pack that is gone is not damaged.
    std::fs::remove_file(&path).expect("removed");
    let gone = verify(&door);
    assert_eq!((gone.failed, gone.total, gone.finished), (0, 16 - pack.blocks, true), "{gone:?}");
}

#[test]
fn packs_that_nobody_lists_are_collected_when_an_operator_says_so() {
    let dir = directory();
    let home = node("collect", "a", &dir.path().display().to_string())
        .set("object.collect=false")
        .set("object.collect_every=1s");
    let _running = home.start();
    let door = Door::of(&home);
    send_up(&door, 0..4);
    let own = packs(dir.path());
    let (path, id) = ghost(dir.path(), 1);
    let collect = |dry_run| {
        let request = v1::CollectObjectsRequest { dry_run };
        let answer = ask(&door, async |mut admin| admin.collect_objects(request).await).expect("collected");
        answer.collected.into_iter().next().expect("one for the only principal")
    };
    let said = |dry: &v1::Collected| dry.condemned == 1;
    let dry = until("this node has said what is its own", || Some(collect(true)).filter(said));
    assert_eq!((dry.round, dry.packs, dry.deleted), (1, own.len() as u64 + 1, 0), "{dry:?}");
    assert_eq!(collect(true), dry, "nothing came of it");
    let deleted = until("it is collected", || {
        // Too early, most of the time.
        let round = collect(false);
        (round.deleted > 0).then_some(round)
    });
    assert_eq!(deleted.deleted_ids, [bytes::Bytes::copy_from_slice(&id.0)], "{deleted:?}");
    assert!(deleted.round > 3 && deleted.deleted_bytes > 4096, "{deleted:?}");
    assert!(!path.exists() && own.iter().all(|own| own.exists()));
    assert_eq!(collect(false).round, 0, "it is too early for another");
}

#[test]
fn single_blocks_are_not_taken_from_packs() {
    let dir = directory();
    let home = node("whole", "a", &dir.path().display().to_string());
    let _running = home.start();
    let door = Door::of(&home);
    let binding = send_up(&door, 0..4);
    let refused = evict(&door, binding, 0..4, v1::Tier::Object).unwrap_err();
    assert_eq!(refused.code, kv_block::code::Code::BadRequest);
    assert!(refused.message.contains("as a whole"), "{refused:?}");
    let purge = v1::PurgeRequest { tier: v1::Tier::Object.into(), all: true, ..Default::default() };
    let refused = ask(&door, async |mut admin| admin.purge(purge).await).map(|_| ()).unwrap_err();
    assert!(refused.message.contains("kvctl object gc"), "{refused:?}");
    // Everywhere is host memory and disk.
    let purge = v1::PurgeRequest { all: true, ..Default::default() };
    ask(&door, async |mut admin| {
        let mut stream = admin.purge(purge).await?.into_inner();
        while stream.message().await?.is_some() {}
        Ok(tonic::Response::new(()))
    })
    .expect("purge");
    assert_eq!(tier(&door).expect("an object tier").blocks, 4);
    assert_eq!(get(&door, binding, 0, 5_000, "").0, Ok(()));
}

#[test]
fn without_a_store_it_is_said_what_to_set() {
    let home = Home::sized("none", "64MiB", None);
    let _running = home.start();
    let door = Door::of(&home);
    let none = ask(&door, async |mut admin| admin.list_object_tiers(v1::ListObjectTiersRequest {}).await);
    assert!(none.expect("object tiers").tiers.is_empty());
    let says = |fault: kv_block::Fault| {
        assert_eq!(fault.code, kv_block::code::Code::BadRequest);
        assert!(fault.message.contains("set object.store"), "{fault:?}");
    };
    says(ask(&door, async |mut admin| admin.list_packs(v1::ListPacksRequest::default()).await).unwrap_err());
    says(
        ask(&door, async |mut admin| admin.describe_pack(v1::DescribePackRequest::default()).await)
            .unwrap_err(),
    );
    says(
        ask(&door, async |mut admin| admin.collect_objects(v1::CollectObjectsRequest::default()).await)
            .unwrap_err(),
    );
    let request = v1::VerifyRequest { tier: v1::Tier::Object.into() };
    says(ask(&door, async |mut admin| admin.verify(request).await).map(|_| ()).unwrap_err());
}
