//! Stories of the LMCache door: the protocol of LMCache's multi-process connector against the real daemon.
#![cfg(feature = "lmcache")]

mod support;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kv_api::v1;
use kv_lmcache::wire;
use kv_lmcache::wire::controller_service_client::ControllerServiceClient;
use kv_lmcache::wire::engine_driven_service_client::EngineDrivenServiceClient;
use kv_lmcache::wire::lm_cache_driven_service_client::LmCacheDrivenServiceClient;
use kv_lmcache::wire::lookup_service_client::LookupServiceClient;
use kv_lmcache::wire::observability_service_client::ObservabilityServiceClient;
use prost::Message as _;
use support::among::{self, nodes, peer};
use support::{Door, Home};
use tonic::transport::Channel;
use tonic::{Code, Status};

const CHUNK: i64 = 64;
/// Bytes of a chunk of [`registration`].
const BYTES: usize = 4 * 64 * 256 * 4;
/// Longest that anything is waited for.
const LIMIT: Duration = Duration::from_secs(30);

/// A home whose daemon has the door; its pools go with it, also those of lives that were killed.
struct Story {
    home: Home,
    name: &'static str,
}

impl std::ops::Deref for Story {
    type Target = Home;
    fn deref(&self) -> &Home {
        &self.home
    }
}

impl Drop for Story {
    fn drop(&mut self) {
        pools(self.name).iter().for_each(|pool| drop(std::fs::remove_file(pool)));
    }
}

fn home(name: &'static str) -> Story {
    with_door(Home::new(name), name)
}

fn with_door(home: Home, name: &'static str) -> Story {
    let home = home
        .set("lmcache.listen=127.0.0.1:0")
        .set("lmcache.chunk_tokens=64")
        .set("lmcache.pool_bytes=8MiB")
        .set("lmcache.pending_wait=20s")
        .set(&format!("lmcache.shm_name=story-{name}-{}", std::process::id()));
    Story { home, name }
}

/// The pools that this story's daemon has made.
fn pools(name: &str) -> Vec<PathBuf> {
    let begins = format!("lmcache_l1_pool_story-{name}-{}_", std::process::id());
    let files = std::fs::read_dir("/dev/shm").unwrap().filter_map(Result::ok).map(|file| file.path());
    files.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(&begins)).collect()
}

/// Waits for what must come true, however slow the machine is.
fn until(what: &str, mut true_now: impl FnMut() -> bool) {
    let limit = Instant::now() + LIMIT;
    while !true_now() {
        assert!(Instant::now() < limit, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The process of an engine, as far as the door sees it: one connection.
struct Engine {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
}

/// Slots that the door lent, in its file.
struct Slots {
    file: File,
    slots: Vec<(u64, u64)>,
    chunks: Vec<u64>,
}

impl Engine {
    fn of(home: &Home) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut channel = None;
        // The last address in the log may be one of an earlier life for a moment.
        until("the door is open", || {
            let address = home.logged_address("LMCache's protocol over TCP");
            let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).unwrap();
            channel = runtime.block_on(endpoint.timeout(Duration::from_secs(60)).connect()).ok();
            channel.is_some()
        });
        let channel = channel.expect("a channel");
        Self { runtime, channel }
    }

    fn register(&self, said: wire::RegisterKvCacheEngineDrivenContextRequest) -> Result<PathBuf, Status> {
        let mut client = EngineDrivenServiceClient::new(self.channel.clone());
        let answer =
            self.runtime.block_on(client.register_kv_cache_engine_driven_context(said))?.into_inner();
        let path = Path::new("/dev/shm").join(&answer.shm_name);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), answer.pool_size as u64);
        Ok(path)
    }

    fn ping(&self, instance_id: Option<i64>) -> bool {
        let mut client = ControllerServiceClient::new(self.channel.clone());
        self.runtime.block_on(client.ping(wire::PingRequest { instance_id })).unwrap().into_inner().ok
    }

    fn look(&self, key: &wire::IpcCacheServerKey) {
        let mut client = LookupServiceClient::new(self.channel.clone());
        let request = wire::LookupRequest {
            key: Some(wire::IpcCacheServerKey { worker_id: None, ..key.clone() }),
            tp_size: 1,
        };
        self.runtime.block_on(client.lookup(request)).unwrap();
    }

    fn query(&self, request_id: &str) -> Option<i64> {
        let mut client = LookupServiceClient::new(self.channel.clone());
        let request = wire::QueryPrefetchStatusRequest { request_id: request_id.into() };
        self.runtime.block_on(client.query_prefetch_status(request)).unwrap().into_inner().chunk_count
    }

    fn wait(&self, request_id: &str) -> Option<i64> {
        let mut client = LookupServiceClient::new(self.channel.clone());
        let request = wire::WaitPrefetchStatusRequest { request_id: request_id.into(), timeout: 30.0 };
        self.runtime.block_on(client.wait_prefetch_status(request)).unwrap().into_inner().chunk_count
    }

    /// Chunks that a request is promised.
    fn lookup(&self, key: &wire::IpcCacheServerKey) -> i64 {
        self.look(key);
        self.wait(&key.request_id).expect("a promise")
    }

    fn end(&self, request_id: &str) {
        let mut client = LookupServiceClient::new(self.channel.clone());
        let request = wire::EndSessionRequest { request_id: request_id.into() };
        self.runtime.block_on(client.end_session(request)).unwrap();
    }

    fn prepare_store(&self, pool: &Path, id: i64, key: &wire::IpcCacheServerKey) -> Slots {
        let mut client = EngineDrivenServiceClient::new(self.channel.clone());
        let request = wire::PrepareStoreRequest { key: Some(key.clone()), instance_id: id };
        let answer = self.runtime.block_on(client.prepare_store(request)).unwrap().into_inner();
        slots(pool, &answer.encoded_context)
    }

    fn commit_store(&self, id: i64, key: &wire::IpcCacheServerKey) -> bool {
        let mut client = EngineDrivenServiceClient::new(self.channel.clone());
        let request = wire::CommitStoreRequest { key: Some(key.clone()), instance_id: id, data: Vec::new() };
        self.runtime.block_on(client.commit_store(request)).unwrap().into_inner().success
    }

    /// Stores what is missing; gives the chunks that were.
    fn store(&self, pool: &Path, id: i64, key: &wire::IpcCacheServerKey, seed: u8) -> Vec<u64> {
        let slots = self.prepare_store(pool, id, key);
        slots.fill(seed);
        assert!(slots.chunks.is_empty() || self.commit_store(id, key));
        slots.chunks
    }

    fn prepare_load(&self, pool: &Path, id: i64, key: &wire::IpcCacheServerKey) -> Option<Slots> {
        let mut client = EngineDrivenServiceClient::new(self.channel.clone());
        let request = wire::PrepareRetrieveRequest { key: Some(key.clone()), instance_id: id };
        let answer = self.runtime.block_on(client.prepare_retrieve(request)).unwrap().into_inner();
        answer.success.then(|| slots(pool, &answer.encoded_context))
    }

    fn commit_load(&self, id: i64, key: &wire::IpcCacheServerKey) {
        let mut client = EngineDrivenServiceClient::new(self.channel.clone());
        let request = wire::CommitRetrieveRequest { key: Some(key.clone()), instance_id: id };
        assert!(self.runtime.block_on(client.commit_retrieve(request)).unwrap().into_inner().success);
    }

    /// Loads and checks every byte; gives how many chunks that were.
    fn load(&self, pool: &Path, id: i64, key: &wire::IpcCacheServerKey, seed: u8) -> Option<usize> {
        let slots = self.prepare_load(pool, id, key)?;
        slots.check(seed, (key.start / CHUNK) as u64);
        self.commit_load(id, key);
        Some(slots.slots.len())
    }
}

fn pattern(seed: u8, chunk: u64) -> Vec<u8> {
    (0..BYTES).map(|at| (at as u64 / 7 + chunk * 31) as u8 ^ seed).collect()
}

impl Slots {
    fn fill(&self, seed: u8) {
        for ((offset, _), chunk) in self.slots.iter().zip(&self.chunks) {
            self.file.write_all_at(&pattern(seed, *chunk), *offset).unwrap();
        }
    }

    /// Loads have a slot for each chunk from `first` on.
    fn check(&self, seed: u8, first: u64) {
        for ((offset, bytes), chunk) in self.slots.iter().zip(first..) {
            let mut read = vec![0; *bytes as usize];
            self.file.read_exact_at(&mut read, *offset).unwrap();
            assert!(read == pattern(seed, chunk), "wrong bytes in chunk {chunk}");
        }
    }
}

/// What an answer says of slots, in the pool at `pool`.
fn slots(pool: &Path, context: &[u8]) -> Slots {
    let unpacked = unpack(&mut &context[..]);
    let found = unpacked
        .get("slots")
        .list()
        .iter()
        .map(|slot| (slot.get("offset").number(), slot.get("length").number()));
    let chunks = match &unpacked {
        Packed::Map(map) if map.contains_key("chunk_indices") => {
            unpacked.get("chunk_indices").list().iter().map(Packed::number).collect()
        }
        _ => Vec::new(),
    };
    let file = File::options().read(true).write(true).open(pool).expect("the pool");
    Slots { file, slots: found.collect(), chunks }
}

/// As much of MessagePack as such answers use.
#[derive(PartialEq, Debug, Clone)]
enum Packed {
    Number(u64),
    Text(String),
    List(Vec<Packed>),
    Map(HashMap<String, Packed>),
}

impl Packed {
    fn get(&self, key: &str) -> &Packed {
        let Self::Map(map) = self else { panic!("{self:?} is no map") };
        &map[key]
    }
    fn list(&self) -> &[Packed] {
        let Self::List(list) = self else { panic!("{self:?} is no list") };
        list
    }
    fn number(&self) -> u64 {
        let Self::Number(number) = self else { panic!("{self:?} is no number") };
        *number
    }
    /// Without what each server chooses for itself.
    fn form(self) -> Packed {
        match self {
            Self::List(list) => Self::List(list.into_iter().map(Packed::form).collect()),
            Self::Map(map) => Self::Map(
                map.into_iter()
                    .filter(|(key, _)| key != "offset")
                    .map(|(key, value)| (key, value.form()))
                    .collect(),
            ),
            other => other,
        }
    }
}

fn unpack(bytes: &mut &[u8]) -> Packed {
    fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
        let (head, rest) = bytes.split_first_chunk::<N>().expect("more bytes");
        *bytes = rest;
        *head
    }
    fn text(bytes: &mut &[u8], length: usize) -> Packed {
        let (head, rest) = bytes.split_at(length);
        *bytes = rest;
        Packed::Text(std::str::from_utf8(head).unwrap().into())
    }
    fn list(bytes: &mut &[u8], length: usize) -> Packed {
        Packed::List((0..length).map(|_| unpack(bytes)).collect())
    }
    let [tag] = take(bytes);
    match tag {
        0..=0x7f => Packed::Number(tag.into()),
        0x80..=0x8f => {
            let pair = |_| match unpack(bytes) {
                Packed::Text(key) => (key, unpack(bytes)),
                other => panic!("{other:?} is no key"),
            };
            Packed::Map((0..tag & 15).map(pair).collect())
        }
        0x90..=0x9f => list(bytes, (tag & 15).into()),
        0xa0..=0xbf => text(bytes, (tag & 31).into()),
        0xcc => Packed::Number(take::<1>(bytes)[0].into()),
        0xcd => Packed::Number(u16::from_be_bytes(take(bytes)).into()),
        0xce => Packed::Number(u32::from_be_bytes(take(bytes)).into()),
        0xcf => Packed::Number(u64::from_be_bytes(take(bytes))),
        0xdc => {
            let length = u16::from_be_bytes(take(bytes));
            list(bytes, length.into())
        }
        other => panic!("{other:#x} is not expected here"),
    }
}

fn registration(instance_id: i64) -> wire::RegisterKvCacheEngineDrivenContextRequest {
    wire::RegisterKvCacheEngineDrivenContextRequest {
        instance_id,
        model_name: "m".into(),
        world_size: 1,
        block_size: 32,
        num_layers: 4,
        hidden_dim_size: 256,
        dtype_str: "float32".into(),
        use_mla: true,
        num_physical_slots: Some(CHUNK),
    }
}

/// Of `chunks` chunks and a few tokens more.
fn key(request: &str, first: i64, chunks: i64) -> wire::IpcCacheServerKey {
    wire::IpcCacheServerKey {
        model_name: "m".into(),
        world_size: 1,
        worker_id: Some(0),
        token_ids: (first..first + chunks * CHUNK + 9).collect(),
        start: 0,
        end: chunks * CHUNK,
        request_id: request.into(),
        num_kv_readers: 1,
        ..wire::IpcCacheServerKey::default()
    }
}

/// Messages as they are: what goes out is somebody else's, what comes back is judged here.
#[derive(Clone, Copy, Default)]
struct Raw;

impl tonic::codec::Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        Self
    }
    fn decoder(&mut self) -> Self {
        Self
    }
}

impl tonic::codec::Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn encode(&mut self, item: Vec<u8>, to: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(to, &item);
        Ok(())
    }
}

impl tonic::codec::Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;
    fn decode(&mut self, from: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut item = vec![0; bytes::Buf::remaining(from)];
        bytes::Buf::copy_to_slice(from, &mut item);
        Ok(Some(item))
    }
}

/// Method, request and answer of every recorded call, in the order of the requests.
fn recorded() -> Vec<(String, Vec<u8>, Vec<u8>)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lmcache/session.bin");
    let recording = std::fs::read(path).unwrap();
    let mut bytes = &recording[..];
    let mut take = |length: usize| -> Vec<u8> {
        let (head, rest) = bytes.split_at(length.min(bytes.len()));
        bytes = rest;
        head.to_vec()
    };
    let (mut calls, mut waiting) = (Vec::<(String, Vec<u8>, Vec<u8>)>::new(), Vec::<usize>::new());
    loop {
        let length = take(2);
        if length.is_empty() {
            assert!(waiting.is_empty(), "every call was answered");
            return calls;
        }
        let method = String::from_utf8(take(u16::from_le_bytes([length[0], length[1]]).into())).unwrap();
        let kind = take(1)[0];
        let length = u32::from_le_bytes(take(4).try_into().unwrap());
        let message = take(length as usize);
        if kind == 0 {
            waiting.push(calls.len());
            calls.push((method, message, Vec::new()));
        } else {
            assert_eq!(kind, 1, "no call of the recording failed");
            let at = waiting.iter().position(|call| calls[*call].0 == method).expect("an answer to a call");
            calls[waiting.remove(at)].2 = message;
        }
    }
}

impl Engine {
    fn raw(&self, method: &str, message: Vec<u8>) -> Vec<u8> {
        let path = format!("/{}", method.trim_start_matches('/')).parse().unwrap();
        self.runtime.block_on(async {
            let mut client = tonic::client::Grpc::new(self.channel.clone());
            client.ready().await.unwrap();
            let answer = client.unary(tonic::Request::new(message), path, Raw).await;
            answer.unwrap_or_else(|status| panic!("{method}: {status}")).into_inner()
        })
    }
}

#[test]
fn a_recorded_session_is_answered_as_it_was_and_hits_after_the_daemon_was_killed() {
    let home = home("recorded");
    let mut daemon = Some(home.start());
    let mut engine = Engine::of(&home);
    let (mut pool, mut loads, mut lives) = (PathBuf::new(), 0, 1);
    let mut over = false;
    for (method, request, wanted) in recorded() {
        let name = method.rsplit('/').next().unwrap();
        if over {
            // Between the two engines of the recording.
            daemon.take().unwrap().kill();
            daemon = Some(home.start());
            engine = Engine::of(&home);
            (over, lives) = (false, lives + 1);
        }
        let mut got = engine.raw(&method, request.clone());
        match name {
            "RegisterKvCacheEngineDrivenContext" => {
                let got = wire::RegisterKvCacheEngineDrivenContextResponse::decode(&got[..]).unwrap();
                assert!(got.shm_name.starts_with("lmcache_l1_pool_"), "{got:?}");
                pool = Path::new("/dev/shm").join(got.shm_name);
                assert_eq!(std::fs::metadata(&pool).unwrap().len(), got.pool_size as u64);
            }
            "GetExperimental" => assert_eq!(got, [0; 0], "nothing is promised that is not done"),
            "QueryPrefetchStatus" => {
                // The recorded answers were final; ours may take a moment more.
                until("a promise", || {
                    got = engine.raw(&method, request.clone());
                    wire::QueryPrefetchStatusResponse::decode(&got[..]).unwrap().chunk_count.is_some()
                });
                assert_eq!(got, wanted, "chunks promised");
            }
            "PrepareStore" => {
                let got = wire::PrepareStoreResponse::decode(&got[..]).unwrap().encoded_context;
                let wanted = wire::PrepareStoreResponse::decode(&wanted[..]).unwrap().encoded_context;
                assert_eq!(unpack(&mut &got[..]).form(), unpack(&mut &wanted[..]).form());
                slots(&pool, &got).fill(7);
            }
            "PrepareRetrieve" => {
                let got = wire::PrepareRetrieveResponse::decode(&got[..]).unwrap();
                let wanted = wire::PrepareRetrieveResponse::decode(&wanted[..]).unwrap();
                assert_eq!((got.success, got.data), (wanted.success, wanted.data));
                let form = |context: &[u8]| unpack(&mut &context[..]).form();
                assert_eq!(form(&got.encoded_context), form(&wanted.encoded_context));
                slots(&pool, &got.encoded_context).check(7, 0);
                loads += 1;
            }
            "UnregisterKvCacheEngineDrivenContext" => {
                assert_eq!(got, wanted);
                assert!(!pool.exists(), "its pool is gone");
                over = true;
            }
            _ => assert_eq!(got, wanted, "{name}"),
        }
    }
    assert_eq!((lives, loads), (2, 2), "both engines of the recording loaded");
}

#[test]
fn blocks_of_one_salt_model_or_form_are_not_found_by_another() {
    let home = home("apart");
    let _daemon = home.start();
    let engine = Engine::of(&home);
    let pool = engine.register(registration(1)).unwrap();
    let mine = key("a", 0, 3);
    assert_eq!(engine.store(&pool, 1, &mine, 1), [0, 1, 2]);
    assert_eq!(engine.lookup(&mine), 3);

    let salted = wire::IpcCacheServerKey { cache_salt: "s".into(), request_id: "b".into(), ..mine.clone() };
    assert_eq!(engine.lookup(&salted), 0);
    assert_eq!(engine.load(&pool, 1, &salted, 1), None);
    assert_eq!(engine.store(&pool, 1, &salted, 2), [0, 1, 2], "it is stored beside the other");
    assert_eq!(engine.load(&pool, 1, &salted, 2), Some(3));

    let others = [
        wire::RegisterKvCacheEngineDrivenContextRequest { model_name: "n".into(), ..registration(2) },
        wire::RegisterKvCacheEngineDrivenContextRequest { world_size: 2, ..registration(3) },
    ];
    for said in others {
        let theirs = wire::IpcCacheServerKey {
            model_name: said.model_name.clone(),
            world_size: said.world_size,
            request_id: said.model_name.clone(),
            ..mine.clone()
        };
        let (id, their_pool) = (said.instance_id, engine.register(said).unwrap());
        assert_ne!(their_pool, pool, "each has a pool of its own");
        assert_eq!(engine.lookup(&theirs), 0);
        assert_eq!(engine.load(&their_pool, id, &theirs, 1), None);
    }
    // The same model with other numbers, once nobody serves the first any more.
    drop(engine);
    let engine = Engine::of(&home);
    let said =
        wire::RegisterKvCacheEngineDrivenContextRequest { dtype_str: "float16".into(), ..registration(4) };
    until("the first engine is forgotten", || engine.register(said.clone()).is_ok());
    assert_eq!(engine.lookup(&mine), 0);

    let changed = wire::IpcCacheServerKey {
        token_ids: mine.token_ids.iter().map(|token| if *token == 70 { 7000 } else { *token }).collect(),
        ..key("c", 0, 3)
    };
    drop(engine);
    let engine = Engine::of(&home);
    let mut pool = PathBuf::new();
    until("the second engine is forgotten", || {
        engine.register(registration(5)).is_ok_and(|made| {
            pool = made;
            true
        })
    });
    assert_eq!(engine.lookup(&changed), 1, "one token in the second chunk is another");
    assert_eq!(engine.load(&pool, 5, &wire::IpcCacheServerKey { end: CHUNK, ..changed }, 1), Some(1));
}

#[test]
fn bytes_are_taken_once_the_operator_has_said_what_they_are() {
    let home = with_door(Home::new("bare").set("lmcache.uint8_as=fp8_e4m3"), "bare");
    let _daemon = home.start();
    let engine = Engine::of(&home);
    let said = wire::RegisterKvCacheEngineDrivenContextRequest {
        dtype_str: "uint8".into(),
        hidden_dim_size: 4 * registration(1).hidden_dim_size,
        ..registration(1)
    };
    let pool = engine.register(said).unwrap();
    assert_eq!(engine.store(&pool, 1, &key("a", 0, 3), 10), [0, 1, 2]);
    assert_eq!(engine.lookup(&key("b", 0, 3)), 3);
    assert_eq!(engine.load(&pool, 1, &key("b", 0, 3), 10), Some(3));
    // What says it itself is not called so.
    let refused = engine.register(registration(2)).unwrap_err();
    assert!(refused.message().contains("dtype_str"), "{refused}");
}

#[test]
fn every_rank_must_have_a_chunk_before_it_is_promised_and_gets_its_own_bytes() {
    let home = home("ranks");
    let _daemon = home.start();
    let engine = Engine::of(&home);
    let said = |id| wire::RegisterKvCacheEngineDrivenContextRequest { world_size: 2, ..registration(id) };
    let pools = [engine.register(said(1)).unwrap(), engine.register(said(2)).unwrap()];
    let of = |rank, chunks| wire::IpcCacheServerKey {
        world_size: 2,
        worker_id: Some(rank),
        ..key("r", 0, chunks)
    };
    assert_eq!(engine.store(&pools[0], 1, &of(0, 4), 10), [0, 1, 2, 3]);
    assert_eq!(engine.lookup(&of(0, 4)), 0, "the other rank has nothing yet");
    assert_eq!(engine.store(&pools[1], 2, &of(1, 2), 20), [0, 1]);
    assert_eq!(engine.lookup(&of(0, 4)), 2, "as far as both have it");
    assert_eq!(engine.load(&pools[0], 1, &of(0, 2), 10), Some(2));
    assert_eq!(engine.load(&pools[1], 2, &of(1, 2), 20), Some(2));
    let beyond = wire::IpcCacheServerKey { worker_id: Some(2), ..of(0, 2) };
    assert_eq!(engine.load(&pools[0], 1, &beyond, 10), None);
}

#[test]
fn what_cannot_be_served_is_refused_at_registration_with_the_field_and_what_to_do() {
    let home = with_door(Home::new("refused").set("lmcache.instances_max=1"), "refused");
    let _daemon = home.start();
    let engine = Engine::of(&home);
    type Change = fn(&mut wire::RegisterKvCacheEngineDrivenContextRequest);
    let rows: [(Change, &str); 8] = [
        (|said| said.dtype_str = "complex64".into(), "dtype_str"),
        (|said| said.dtype_str = "int8".into(), "dtype_str"),
        (|said| said.dtype_str = "uint8".into(), "lmcache.uint8_as"),
        (|said| said.num_layers = 0, "num_layers"),
        (|said| said.hidden_dim_size = -5, "hidden_dim_size"),
        (|said| said.hidden_dim_size = 1 << 20, "lmcache.chunk_tokens"),
        (|said| said.world_size = 0, "world_size"),
        (|said| said.model_name.clear(), "model_name"),
    ];
    for (change, words) in rows {
        let mut said = registration(1);
        change(&mut said);
        let refused = engine.register(said).unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(words), "{refused}");
    }
    let mut client = LmCacheDrivenServiceClient::new(engine.channel.clone());
    let refused = engine.runtime.block_on(client.register_kv_cache(wire::RefusedRequest {})).unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    assert!(refused.message().contains("engine_driven"), "{refused}");
    let mut client = ObservabilityServiceClient::new(engine.channel.clone());
    let mut events = engine
        .runtime
        .block_on(client.subscribe_kv_events(wire::SubscribeKvEventsRequest::default()))
        .unwrap()
        .into_inner();
    assert!(!engine.runtime.block_on(events.message()).unwrap().unwrap().enabled);

    engine.register(registration(1)).unwrap();
    engine.register(registration(1)).expect("the same again is the same");
    let refused = engine.register(registration(2)).unwrap_err();
    assert!(refused.message().contains("lmcache.instances_max"), "{refused}");
    assert_eq!(pools("refused").len(), 1);
}

#[test]
fn what_an_engine_held_is_back_when_its_connection_closes_in_the_middle() {
    let home = home("dropped");
    let daemon = home.start();
    let door = Door::of(&home);
    let clients = || {
        let all =
            door.runtime.block_on(door.admin().list_clients(v1::ListClientsRequest::default())).unwrap();
        all.into_inner().clients.into_iter().map(|client| client.name).collect::<Vec<_>>()
    };
    let nothing_held = || {
        until("the session is closed", || clients().is_empty());
        until("no block is announced", || door.status().pending == 0);
        until("the pool is gone", || pools("dropped").is_empty());
    };

    // In the middle of a store.
    let engine = Engine::of(&home);
    let pool = engine.register(registration(1)).unwrap();
    assert_eq!(clients(), ["lmcache:m"]);
    assert_eq!(engine.prepare_store(&pool, 1, &key("a", 0, 4)).chunks, [0, 1, 2, 3]);
    until("the chunks are announced", || door.status().pending == 4);
    drop(engine);
    nothing_held();

    // In the middle of a load, with more held than that.
    let engine = Engine::of(&home);
    let pool = engine.register(registration(1)).unwrap();
    assert_eq!(engine.store(&pool, 1, &key("b", 0, 4), 3), [0, 1, 2, 3], "nobody else has announced them");
    assert_eq!(engine.lookup(&key("c", 0, 4)), 4);
    let part = wire::IpcCacheServerKey { end: 2 * CHUNK, ..key("c", 0, 4) };
    assert_eq!(engine.prepare_load(&pool, 1, &part).unwrap().slots.len(), 2);
    drop(engine);
    nothing_held();

    // And an end in order.
    let engine = Engine::of(&home);
    let pool = engine.register(registration(1)).unwrap();
    assert_eq!(engine.lookup(&key("d", 0, 4)), 4);
    assert_eq!(engine.load(&pool, 1, &key("d", 0, 4), 3), Some(4));
    engine.end("d");
    assert_eq!(engine.query("d"), Some(0), "nothing is promised any more");
    let mut client = EngineDrivenServiceClient::new(engine.channel.clone());
    let request = wire::UnregisterKvCacheEngineDrivenContextRequest { instance_id: 1 };
    engine.runtime.block_on(client.unregister_kv_cache_engine_driven_context(request)).unwrap();
    nothing_held();

    // And when the daemon stops, with an engine connected.
    engine.register(registration(1)).unwrap();
    assert_eq!(pools("dropped").len(), 1);
    assert!(daemon.terminate().success());
    assert!(pools("dropped").is_empty(), "nothing is left in /dev/shm");
}

#[test]
fn the_plan_shows_the_door_and_an_open_one_is_refused() {
    let check = |listen: &str, more: &[&str]| {
        let dirs = ["--run-dir", "/tmp/kvd-story-check", "--memory-dir", "/dev/shm/kvd-story-check"];
        let checked = std::process::Command::new(env!("CARGO_BIN_EXE_kvd"))
            .args(["--check", "--host-bytes", "64MiB"])
            .args(dirs)
            .args(more)
            .env("KVD_LMCACHE__LISTEN", listen)
            .output()
            .unwrap();
        let text = [checked.stdout, checked.stderr].concat();
        (checked.status.code(), String::from_utf8(text).unwrap())
    };
    let (status, plan) = check("127.0.0.1:6555", &["--set", "lmcache.pool_bytes=3MiB"]);
    assert_eq!(status, Some(0), "{plan}");
    let row = plan.lines().find(|line| line.starts_with("lmcache pools")).expect("a row of the budget");
    assert!(row.contains("24MiB") && plan.contains("lmcache   127.0.0.1:6555"), "{plan}");
    assert!(!check("off", &[]).1.contains("lmcache pools"));
    for (listen, more) in [
        ("0.0.0.0:6555", &[][..]),
        ("somewhere", &[]),
        ("6555", &["--set", "lmcache.chunk_tokens=0"]),
        ("6555", &["--set", "lmcache.tenant=A"]),
        ("6555", &["--set", "lmcache.pool_bytes=5000000"]),
    ] {
        let (status, words) = check(listen, more);
        assert_eq!(status, Some(78), "{listen} {more:?}: {words}");
        assert!(words.contains("lmcache."), "{words}");
    }
    assert_eq!(check("0.0.0.0:6555", &["--insecure"]).0, Some(0));
    assert_eq!(check("unix:/tmp/lmcache.sock", &["--lmcache-listen", "off"]).0, Some(0));
}

#[test]
fn an_engine_finds_what_another_is_still_storing() {
    let home = home("pending");
    let _daemon = home.start();
    let (prefill, decode) = (Engine::of(&home), Engine::of(&home));
    let pool = prefill.register(registration(1)).unwrap();
    let decode_pool = decode.register(registration(2)).unwrap();
    let slots = prefill.prepare_store(&pool, 1, &key("p", 0, 5));
    assert_eq!(slots.chunks, [0, 1, 2, 3, 4]);
    assert_eq!(
        decode.prepare_store(&decode_pool, 2, &key("d", 0, 5)).chunks,
        [0; 0],
        "they are on their way"
    );
    decode.look(&key("d", 0, 5));
    assert_eq!(decode.query("d"), None, "not known while they are");
    slots.fill(9);
    assert!(prefill.commit_store(1, &key("p", 0, 5)));
    assert_eq!(decode.wait("d"), Some(5));
    assert_eq!(decode.load(&decode_pool, 2, &key("d", 0, 5), 9), Some(5));

    // One that never comes is a miss, and nobody waits for ever.
    prefill.prepare_store(&pool, 1, &key("q", 50_000, 2));
    decode.look(&key("e", 50_000, 2));
    assert_eq!(decode.query("e"), None);
    drop(prefill);
    assert_eq!(decode.wait("e"), Some(0));
}

/// Two nodes with doors, which fetch from each other.
fn two_doors(names: [&'static str; 2]) -> [Story; 2] {
    let mut names = names.into_iter();
    nodes(names.as_slice()[0], "64MiB", None).map(|home| with_door(home, names.next().unwrap()))
}

#[test]
fn an_engine_finds_what_one_of_another_node_has_stored() {
    let [a, b] = two_doors(["far-a", "far-b"]);
    let (_a, _b) = (a.start(), b.start());
    let (prefill, decode) = (Engine::of(&a), Engine::of(&b));
    let pool = prefill.register(registration(1)).unwrap();
    let decode_pool = decode.register(registration(1)).unwrap();
    assert_eq!(prefill.store(&pool, 1, &key("p", 0, 8), 3).len(), 8);
    // The first ones are here, the next ones there, and the last ones nowhere.
    assert_eq!(decode.store(&decode_pool, 1, &key("first", 0, 2), 3), [0, 1]);
    assert_eq!(decode.lookup(&key("d", 0, 11)), 8);
    assert_eq!(decode.load(&decode_pool, 1, &key("d", 0, 8), 3), Some(8));
    decode.end("d");
    let at_b = Door::of(&b);
    assert_eq!(peer(&at_b, "a").blocks_in, 6);
    assert_eq!(at_b.status().fetched_blocks, 6);
    // They are here now.
    assert_eq!(decode.lookup(&key("again", 0, 8)), 8);
    assert_eq!(at_b.status().fetched_blocks, 6);
}

#[test]
fn an_engine_finds_what_one_of_another_node_is_still_storing() {
    let [a, b] = two_doors(["coming-a", "coming-b"]);
    let (_a, _b) = (a.start(), b.start());
    let (prefill, decode) = (Engine::of(&a), Engine::of(&b));
    let pool = prefill.register(registration(1)).unwrap();
    let decode_pool = decode.register(registration(1)).unwrap();
    let slots = prefill.prepare_store(&pool, 1, &key("p", 0, 5));
    decode.look(&key("d", 0, 5));
    assert_eq!(decode.query("d"), None, "not known while they are on their way");
    slots.fill(9);
    assert!(prefill.commit_store(1, &key("p", 0, 5)));
    assert_eq!(decode.wait("d"), Some(5));
    assert_eq!(decode.load(&decode_pool, 1, &key("d", 0, 5), 9), Some(5));
}

#[test]
fn a_node_that_is_gone_or_stands_still_is_a_miss_and_holds_no_engine_up() {
    let [a, b] = two_doors(["gone-a", "gone-b"]);
    let (first, _b) = (a.start(), b.start());
    let (prefill, decode) = (Engine::of(&a), Engine::of(&b));
    let pool = prefill.register(registration(1)).unwrap();
    let decode_pool = decode.register(registration(1)).unwrap();
    assert_eq!(prefill.store(&pool, 1, &key("p", 0, 8), 3).len(), 8);
    assert_eq!(decode.store(&decode_pool, 1, &key("first", 0, 2), 3), [0, 1]);
    // They speak with each other.
    assert_eq!(decode.lookup(&key("d", 0, 3)), 3);
    let pid = rustix::process::Pid::from_raw(first.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    // What is here is promised all the same. The door waits for 30 seconds at most, and then for no answer.
    assert_eq!(decode.lookup(&key("still", 0, 8)), 3);
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    first.kill();
    assert_eq!(decode.lookup(&key("gone", 0, 8)), 3);
    assert_eq!(decode.load(&decode_pool, 1, &key("gone", 0, 3), 3), Some(3));
}

#[test]
fn an_engine_finds_what_one_of_another_node_has_sent_to_the_object_store() {
    let store = tempfile::Builder::new().prefix("kvd-story-").tempdir().expect("a temporary directory");
    let [a, b] = ["shared-a", "shared-b"].map(|name| {
        let home = Home::sized(name, "64MiB", None)
            .set(&format!("node.name={name}"))
            .set(&format!("object.store={}", store.path().display()))
            .set("object.reads_min=0")
            .set("object.age_min=0s")
            .set("object.pack_wait=200ms")
            .set("object.refresh=200ms");
        with_door(home, name)
    });
    let (first, _b) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    let object = |door: &Door| door.status().tiers.into_iter().find(|tier| tier.tier() == v1::Tier::Object);
    // What is offered before that is offered again only after half a minute.
    until("the store is open", || object(&at_a).is_some_and(|tier| tier.state == "ok"));
    let (prefill, decode) = (Engine::of(&a), Engine::of(&b));
    let pool = prefill.register(registration(1)).unwrap();
    let decode_pool = decode.register(registration(1)).unwrap();
    assert_eq!(prefill.store(&pool, 1, &key("p", 0, 8), 3).len(), 8);
    // Longer than half a minute, for what is offered again.
    among::until("the other node knows of all of them", || object(&at_b).filter(|tier| tier.blocks == 8));
    // The first ones are here, the next ones in the store, and the last ones nowhere.
    assert_eq!(decode.store(&decode_pool, 1, &key("first", 0, 2), 3), [0, 1]);
    // Who stored them is gone for good.
    first.kill();
    assert_eq!(decode.lookup(&key("d", 0, 11)), 8);
    assert_eq!(decode.load(&decode_pool, 1, &key("d", 0, 8), 3), Some(8));
    assert!(at_b.status().hits["object"] > 0);
}

#[test]
fn an_engine_that_cannot_map_its_pool_fails_its_stores_and_nothing_else() {
    let home = home("pickle");
    let _daemon = home.start();
    let engine = Engine::of(&home);
    engine.register(registration(1)).unwrap();
    for bytes in [1, 1 << 20, 40 << 20] {
        let mut client = EngineDrivenServiceClient::new(engine.channel.clone());
        let request =
            wire::CommitStoreRequest { key: Some(key("a", 0, 3)), instance_id: 1, data: vec![7; bytes] };
        let answer = engine.runtime.block_on(client.commit_store(request));
        assert!(!answer.expect("an answer, not an error").into_inner().success, "{bytes} bytes in the call");
    }
    until("the log says what to do", || home.log().contains("lmcache.pool_mode"));
    assert_eq!(engine.lookup(&key("a", 0, 3)), 0);
}

#[test]
fn an_instance_that_is_not_known_is_told_so_once_and_misses_until_it_registers_again() {
    let home = home("unknown");
    let daemon = home.start();
    let engine = Engine::of(&home);
    let pool = engine.register(registration(1)).unwrap();
    engine.store(&pool, 1, &key("a", 0, 3), 1);
    assert!(engine.ping(Some(1)) && engine.ping(None));
    daemon.kill();
    assert!(pool.exists(), "left behind");

    let _daemon = home.start();
    let engine = Engine::of(&home);
    assert!(pools("unknown").is_empty(), "what was left behind is gone, and not reused under its mapping");
    assert_eq!(engine.lookup(&key("b", 0, 3)), 0);
    let mut client = EngineDrivenServiceClient::new(engine.channel.clone());
    let request = wire::PrepareStoreRequest { key: Some(key("b", 0, 3)), instance_id: 1 };
    let answer = engine.runtime.block_on(client.prepare_store(request)).unwrap().into_inner();
    assert_eq!(unpack(&mut &answer.encoded_context[..]).get("slots").list(), []);
    assert!(!engine.commit_store(1, &key("b", 0, 3)));
    assert!(engine.prepare_load(&pool, 1, &key("b", 0, 3)).is_none());
    engine.commit_load(1, &key("b", 0, 3));
    assert!(!engine.ping(Some(1)), "it learns that it is not known");
    assert!(engine.ping(Some(1)), "and that somebody is here to register with");
    let pool = engine.register(registration(1)).unwrap();
    assert!(engine.ping(Some(1)));
    assert_eq!(engine.lookup(&key("c", 0, 3)), 3, "its blocks were kept");
    assert_eq!(engine.load(&pool, 1, &key("c", 0, 3), 1), Some(3));
}

#[test]
fn more_is_never_promised_than_the_pool_takes_and_slots_come_back() {
    let home = home("pool");
    let _daemon = home.start();
    let engine = Engine::of(&home);
    let pool = engine.register(registration(1)).unwrap();
    let fits = (8 << 20) / BYTES;
    let long = key("a", 0, fits as i64 + 10);
    assert_eq!(engine.store(&pool, 1, &long, 4).len(), fits);
    assert_eq!(engine.store(&pool, 1, &long, 4).len(), 10, "the rest, the next time");
    assert_eq!(engine.lookup(&long), fits as i64);
    for round in 0..3 {
        let part = wire::IpcCacheServerKey {
            end: fits as i64 * CHUNK,
            request_id: format!("{round}"),
            ..long.clone()
        };
        assert_eq!(engine.load(&pool, 1, &part, 4), Some(fits), "round {round}");
    }
    assert_eq!(engine.load(&pool, 1, &long, 4), None, "all of it at once is more than the pool");
}

#[test]
fn blocks_come_up_from_disk_and_damaged_ones_are_not_promised() {
    let home = with_door(Home::sized("damage", "16MiB", Some("256MiB")).set("disk.admission=all"), "damage");
    let daemon = home.start();
    let engine = Engine::of(&home);
    let pool = engine.register(registration(1)).unwrap();
    let prompt = |number: i64| key(&format!("r{number}"), number * 10_000, 8);
    for number in 0..16 {
        until("all of it is stored", || engine.store(&pool, 1, &prompt(number), number as u8).is_empty());
    }
    let loaded = |engine: &Engine, pool: &Path| {
        let mut chunks = 0;
        for number in 0..16 {
            let promised = engine.lookup(&prompt(number));
            chunks += promised;
            if promised > 0 {
                let part = wire::IpcCacheServerKey { end: promised * CHUNK, ..prompt(number) };
                let got = engine.load(pool, 1, &part, number as u8);
                assert_eq!(got, Some(promised as usize), "what is promised is there");
            }
            engine.end(&format!("r{number}"));
        }
        chunks
    };
    let whole = loaded(&engine, &pool);
    assert!(
        whole as usize * BYTES > 16 << 20,
        "{whole} chunks: more than host memory holds came up from disk"
    );
    drop(engine);
    daemon.kill();

    let flip = |path: &Path| {
        let file = File::options().read(true).write(true).open(path).unwrap();
        for at in (0..file.metadata().unwrap().len()).step_by(BYTES / 4).map(|at| at + 5000) {
            let mut byte = [0];
            if file.read_exact_at(&mut byte, at).is_ok() {
                file.write_all_at(&[byte[0] ^ 8], at).unwrap();
            }
        }
    };
    flip(&home.memory_dir().join("shard-0.data"));
    let segments =
        std::fs::read_dir(home.data_dir().join("shard-0")).unwrap().map(|file| file.unwrap().path());
    segments.filter(|path| path.extension().is_some_and(|end| end == "kv")).for_each(|path| flip(&path));
    let _daemon = home.start();
    let engine = Engine::of(&home);
    let pool = engine.register(registration(1)).unwrap();
    assert_eq!(loaded(&engine, &pool), 0, "every block has a wrong bit");
    assert!(Door::of(&home).status().checksum_failures > 0);
}

#[test]
fn a_store_waits_for_room_that_is_being_made() {
    // Full after four prompts: from then on each needs as much room as a quarter of all there is.
    let home = with_door(Home::sized("room", "16MiB", Some("512MiB")).set("disk.admission=all"), "room");
    let _daemon = home.start();
    let engine = Engine::of(&home);
    let pool = engine.register(registration(1)).unwrap();
    let prompts = 60;
    let whole = (0..prompts)
        .filter(|number| {
            let prompt = key(&format!("r{number}"), number * 10_000, 8);
            let stored = engine.store(&pool, 1, &prompt, *number as u8).len();
            engine.end(&format!("r{number}"));
            stored == 8
        })
        .count();
    // A disk that is slow for longer than an engine may stand still makes some of them short.
    assert!(whole as i64 > prompts * 9 / 10, "{whole} of {prompts} were stored whole");
}
