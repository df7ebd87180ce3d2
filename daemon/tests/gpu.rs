//! A real daemon and workers with KV caches in device memory: on the fake driver, which both processes load, or with
//! `KVD_CUDA=real` on the machine's.
//!
//! Every byte is compared with what a slow loop over layers, heads and tokens says.

mod support;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kv_api::{convert, v1};
use kv_block::layout::{Content, EngineLayout, EngineOrder, Shape, Step, Tensors};
use kv_block::{Scope, SequenceHash};
use kv_client::{
    Client, ClientOptions, DeviceCacheSpec, Doors, LoadOptions, MemoryPiece, PagedBlock, SaveOptions,
    TensorHandles, Tier, WorkerOptions,
};
use kv_gpu::{Device, DeviceMemory, Driver, Event, PageCopy, Priority, SharedPiece, Stream};
use support::among::until;
use support::{Door, Home, scope, slice};
use tonic::Status;

const PAGES: u32 = 64;
const PAGE_TOKENS: u32 = 8;
const BLOCK_TOKENS: u32 = 16;
const HEAD_DIM: u32 = 8;
const LAYERS: u32 = 2;
/// Of layers, K and V, heads, tokens and elements of two bytes.
const BLOCK: u32 = LAYERS * 2 * 4 * BLOCK_TOKENS * HEAD_DIM * 2;
/// The driver says at the sixtieth question that the device has failed (`CUDA_ERROR_ILLEGAL_ADDRESS`).
const LOST_LATER: &str = "fail=cuEventQuery:60:700";
const LONG: Duration = Duration::from_secs(30);

fn is_real() -> bool {
    match std::env::var("KVD_CUDA").as_deref() {
        Ok("real") => true,
        Ok(other) => panic!("KVD_CUDA={other}: only `real` means something"),
        Err(_) => false,
    }
}

/// The driver that stands in for the machine's.
fn library() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("libfake_cuda.so")
}

fn node(story: &str) -> Home {
    let home = Home::sized(&format!("gpu-{story}"), "64MiB", None).set("gpu.enabled=required");
    if is_real() { home } else { home.set(&format!("gpu.driver={}", library().display())) }
}

fn laid_out(tenant: &str) -> Scope {
    Scope { layout: "layer,kv,head,token,dim".into(), block_tokens: BLOCK_TOKENS, ..scope(tenant) }
}

fn layout() -> EngineLayout {
    let shape = Shape {
        slice: slice(),
        content: Content::KeyValue,
        page_count: PAGES,
        page_tokens: PAGE_TOKENS,
        head_dim: HEAD_DIM,
        element_bits: 16,
    };
    let order: EngineOrder = "L2BNHD".parse().unwrap();
    EngineLayout::dense(shape, order, Tensors::Layers).unwrap()
}

/// Where an element lies: which tensor, which byte.
fn place(
    layout: &EngineLayout,
    page: u32,
    layer: u64,
    kv: u64,
    head: u64,
    token: u64,
    dim: u64,
) -> (usize, usize) {
    let strides = layout.strides();
    let first = layout.first();
    let (mut tensor, mut offset) = (u64::from(first.tensor.0), first.offset);
    for (index, step) in [(layer, strides.layer), (kv, strides.kv)] {
        match step {
            Step::Bytes(bytes) => offset += index * bytes,
            Step::Tensors(tensors) => tensor += index * u64::from(tensors),
        }
    }
    offset +=
        u64::from(page) * strides.page + head * strides.head + token * strides.token + dim * strides.dim;
    (tensor as usize, offset as usize)
}

/// A block as it is stored, out of pages: the slow way.
fn block_of(layout: &EngineLayout, tensors: &[Vec<u8>], pages: &[u32]) -> Vec<u8> {
    let mut block = Vec::new();
    for layer in 0..u64::from(LAYERS) {
        for kv in 0..2 {
            for head in 0..4 {
                for token in 0..u64::from(BLOCK_TOKENS) {
                    for dim in 0..u64::from(HEAD_DIM) {
                        let page = pages[(token / u64::from(PAGE_TOKENS)) as usize];
                        let token = token % u64::from(PAGE_TOKENS);
                        let (tensor, byte) = place(layout, page, layer, kv, head, token, dim);
                        block.extend_from_slice(&tensors[tensor][byte..byte + 2]);
                    }
                }
            }
        }
    }
    block
}

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// An engine's worker: device memory of its own, and a session.
struct Worker {
    door: Door,
    _open: tonic::Streaming<v1::SessionNotice>,
    session: u64,
    device: Device,
    stream: Stream,
    layout: EngineLayout,
    tensors: Vec<DeviceMemory>,
    events: Vec<Event>,
    cache: u32,
    binding: u32,
}

fn driver() -> Driver {
    static DRIVER: std::sync::LazyLock<Driver> = std::sync::LazyLock::new(|| {
        let loaded = if is_real() { Driver::load() } else { Driver::load_from(library().as_os_str()) };
        loaded.expect("a driver")
    });
    *DRIVER
}

fn device(ordinal: u32) -> Device {
    driver().open(ordinal).expect("its device")
}

impl Worker {
    fn new(home: &Home) -> Self {
        let mut worker = Self::unregistered(home);
        worker.cache = worker.register(|_| {}).expect("register");
        worker
    }

    /// In a process that knows the run directory alone.
    fn at(run_dir: &std::path::Path) -> Self {
        let mut worker = Self::behind(Door::at(run_dir), 0);
        worker.cache = worker.register(|_| {}).expect("register");
        worker
    }

    fn unregistered(home: &Home) -> Self {
        Self::behind(Door::of(home), 0)
    }

    /// On the device of that number.
    fn on(home: &Home, ordinal: u32) -> Self {
        let mut worker = Self::behind(Door::of(home), ordinal);
        worker.cache = worker.register(|_| {}).expect("register");
        worker
    }

    fn behind(door: Door, ordinal: u32) -> Self {
        let name = v1::OpenRequest { name: "a worker".into() };
        let (open, session) = door.runtime.block_on(async {
            let mut open = door.worker().open(name).await.expect("open").into_inner();
            let notice = open.message().await.expect("a notice").expect("one");
            (open, notice.session)
        });
        let device = device(ordinal);
        let stream = device.stream(Priority::Low).unwrap();
        let layout = layout();
        let tensor = |_| device.allocate(layout.tensor_bytes()).expect("device memory");
        let tensors = (0..layout.tensor_count()).map(tensor).collect();
        let events = (0..LAYERS).map(|_| device.event(true).expect("an event")).collect();
        let binding = door.register(&laid_out("t"), BLOCK);
        Self { door, _open: open, session, device, stream, layout, tensors, events, cache: 0, binding }
    }

    fn request(&self) -> v1::RegisterCacheRequest {
        let tensor = |memory: &DeviceMemory| {
            let handle = memory.export().expect("a handle");
            let ipc = v1::device_handle::Handle::CudaIpc(handle.handle.to_vec().into());
            let pieces = vec![v1::DeviceHandle { handle: Some(ipc), bytes: 0 }];
            v1::DeviceMemory { pieces, offset: handle.offset, bytes: handle.bytes }
        };
        v1::RegisterCacheRequest {
            session: self.session,
            device: self.device.facts().uuid.0.to_vec().into(),
            tensors: self.tensors.iter().map(tensor).collect(),
            layout: Some(convert::cache_layout_message(&self.layout)),
            events: self.events.iter().map(|event| event.export().unwrap().0.to_vec().into()).collect(),
        }
    }

    fn devices(&self) -> v1::devices_client::DevicesClient<tonic::transport::Channel> {
        v1::devices_client::DevicesClient::new(self.door.channel.clone())
    }

    /// Registers the cache, with a lie or without.
    fn register(&self, change: impl FnOnce(&mut v1::RegisterCacheRequest)) -> Result<u32, Status> {
        let mut request = self.request();
        change(&mut request);
        let answer = self.door.runtime.block_on(async { self.devices().register_cache(request).await })?;
        Ok(answer.into_inner().cache)
    }

    /// Fills all pages; what each tensor has then.
    fn compute(&self, seed: u64) -> Vec<Vec<u8>> {
        let bytes = self.layout.tensor_bytes() as usize;
        let fill = |(at, memory): (usize, &DeviceMemory)| {
            let noise = noise(seed + at as u64, bytes);
            let mut buffer = self.device.host_buffer(bytes).unwrap();
            buffer.copy_from_slice(&noise);
            let page = PageCopy { host: 0, host_offset: 0, device_offset: 0, bytes: bytes as u64 };
            let mut copying =
                self.stream.onboard(memory, vec![buffer], &[page]).map_err(|no| no.error).unwrap();
            copying.wait(LONG).unwrap().expect("it ends");
            noise
        };
        self.tensors.iter().enumerate().map(fill).collect()
    }

    /// What the tensors have.
    fn look(&self) -> Vec<Vec<u8>> {
        let bytes = self.layout.tensor_bytes() as usize;
        let read = |memory: &DeviceMemory| {
            let buffer = self.device.host_buffer(bytes).unwrap();
            let page = PageCopy { host: 0, host_offset: 0, device_offset: 0, bytes: bytes as u64 };
            let mut copying =
                self.stream.offload(memory, vec![buffer], &[page]).map_err(|no| no.error).unwrap();
            copying.wait(LONG).unwrap().expect("it ends")[0].to_vec()
        };
        self.tensors.iter().map(read).collect()
    }

    fn header(&self, blocks: &[(u64, [u32; 2])]) -> v1::SaveHeader {
        v1::SaveHeader {
            session: self.session,
            cache: self.cache,
            binding: self.binding,
            blocks: paged(blocks),
            ..v1::SaveHeader::default()
        }
    }

    fn save(&self, header: v1::SaveHeader) -> Result<Vec<v1::Saved>, Status> {
        self.save_with(header, Vec::new())
    }

    fn save_with(
        &self,
        header: v1::SaveHeader,
        ready: Vec<v1::LayersReady>,
    ) -> Result<Vec<v1::Saved>, Status> {
        let header = v1::save_request::What::Header(header);
        let ready = ready.into_iter().map(v1::save_request::What::Ready);
        let messages: Vec<_> =
            std::iter::once(header).chain(ready).map(|what| v1::SaveRequest { what: Some(what) }).collect();
        let save = async { self.devices().save(tokio_stream::iter(messages)).await };
        Ok(self.door.runtime.block_on(save)?.into_inner().saved)
    }

    fn save_well(&self, blocks: &[(u64, [u32; 2])]) {
        for saved in self.save(self.header(blocks)).expect("save") {
            assert_eq!(saved.what, Some(v1::saved::What::Already(false)));
        }
    }

    fn load_request(&self, blocks: &[(u64, [u32; 2])]) -> v1::LoadRequest {
        v1::LoadRequest {
            session: self.session,
            cache: self.cache,
            binding: self.binding,
            blocks: paged(blocks),
            ..v1::LoadRequest::default()
        }
    }

    /// Loads, and gives what was said.
    fn load(&self, request: v1::LoadRequest) -> Result<Vec<v1::load_response::What>, Status> {
        self.door.runtime.block_on(async {
            let mut stream = self.devices().load(request).await?.into_inner();
            let mut said = Vec::new();
            while let Some(message) = stream.message().await? {
                said.push(message.what.expect("something"));
            }
            Ok(said)
        })
    }

    /// Loads what must all be there.
    fn load_well(&self, blocks: &[(u64, [u32; 2])]) {
        let said = self.load(self.load_request(blocks)).expect("load");
        let [v1::load_response::What::Queued(queued), v1::load_response::What::Done(_)] = &said[..] else {
            panic!("{said:?}")
        };
        for loaded in &queued.loaded {
            assert!(matches!(loaded.what, Some(v1::loaded::What::Tier(_))), "{loaded:?}");
        }
    }

    /// A block as the daemon gives it to anybody.
    fn get(&self, number: u64) -> Vec<u8> {
        self.try_get(number).unwrap_or_else(|| panic!("block {number} is not there"))
    }

    /// The same of one that may be missing.
    fn try_get(&self, number: u64) -> Option<Vec<u8>> {
        let names =
            v1::Names { binding: self.binding, sequence_hashes: vec![hash(number)], ..v1::Names::default() };
        let request = v1::GetRequest { names: Some(names), ..v1::GetRequest::default() };
        self.door.runtime.block_on(async {
            let mut stream = self.door.blocks().get(request).await.expect("get").into_inner();
            let mut bytes = Vec::new();
            while let Some(message) = stream.message().await.expect("a message") {
                match message.what.expect("something") {
                    v1::get_response::What::Header(_) => {}
                    v1::get_response::What::Chunk(piece) => bytes.extend_from_slice(&piece),
                    v1::get_response::What::Miss(_) => return None,
                }
            }
            Some(bytes)
        })
    }

    fn quiesce(&self) {
        let request = v1::QuiesceCacheRequest { session: self.session, cache: self.cache };
        self.door.runtime.block_on(async { self.devices().quiesce_cache(request).await }).expect("quiesce");
    }
}

fn hash(number: u64) -> bytes::Bytes {
    SequenceHash::from(number).as_bytes().to_vec().into()
}

fn paged(blocks: &[(u64, [u32; 2])]) -> Vec<v1::PagedBlock> {
    let block = |(number, pages): &(u64, [u32; 2])| v1::PagedBlock {
        sequence_hash: hash(*number),
        pages: pages.to_vec(),
    };
    blocks.iter().map(block).collect()
}

#[track_caller]
fn refused(answer: Result<impl std::fmt::Debug, Status>, code: u32, words: &str) {
    let status = answer.expect_err("it cannot be done");
    let fault = kv_api::fault::from_status(&status);
    assert_eq!((fault.code as u16, fault.message.contains(words)), (code as u16, true), "{fault:?}");
}

#[test]
fn pages_are_saved_and_come_back_in_other_pages_byte_for_byte() {
    let home = node("round");
    let _daemon = home.start();
    let worker = Worker::new(&home);
    let before = worker.compute(1);
    let blocks: Vec<(u64, [u32; 2])> =
        (0..20).map(|n| (n, [(7 * n as u32) % 64, (7 * n as u32 + 3) % 64])).collect();
    worker.save_well(&blocks);
    for (number, pages) in &blocks {
        assert_eq!(worker.get(*number), block_of(&worker.layout, &before, pages), "block {number}");
    }
    // What it had is gone; two loads bring it back elsewhere.
    worker.compute(2);
    let elsewhere: Vec<(u64, [u32; 2])> =
        (0..20).map(|n| (n, [63 - 2 * n as u32, 62 - 2 * n as u32])).collect();
    worker.load_well(&elsewhere[..10]);
    worker.load_well(&elsewhere[10..]);
    let after = worker.look();
    for ((number, from), (_, to)) in blocks.iter().zip(&elsewhere) {
        let (was, is) = (block_of(&worker.layout, &before, from), block_of(&worker.layout, &after, to));
        assert_eq!(was, is, "block {number}");
    }
    // Stored once more they are known, and nothing is copied.
    for saved in worker.save(worker.header(&blocks)).unwrap() {
        assert_eq!(saved.what, Some(v1::saved::What::Already(true)));
    }
}

#[test]
fn every_method_of_copying_gives_the_same_bytes() {
    for method in ["kernel", "batch", "loop"] {
        let home = node(&format!("method-{method}")).set(&format!("gpu.method={method}"));
        let _daemon = home.start();
        let worker = Worker::new(&home);
        let before = worker.compute(3);
        worker.save_well(&[(1, [5, 9]), (2, [6, 60])]);
        assert_eq!(worker.get(2), block_of(&worker.layout, &before, &[6, 60]), "{method}");
        worker.compute(4);
        worker.load_well(&[(2, [0, 1])]);
        assert_eq!(block_of(&worker.layout, &worker.look(), &[0, 1]), worker.get(2), "{method}");
    }
}

#[test]
fn layers_are_saved_as_they_are_computed_and_loaded_as_they_are_needed() {
    let home = node("layers");
    let _daemon = home.start();
    let worker = Worker::new(&home);
    let before = worker.compute(5);
    let blocks = [(1, [2, 3]), (2, [4, 5])];
    let mut ready = Vec::new();
    for layer in 0..LAYERS {
        worker.events[layer as usize].record(&worker.stream).unwrap();
        ready.push(v1::LayersReady { layers: layer + 1, event: Some(layer) });
    }
    let header = v1::SaveHeader { by_layer: true, ..worker.header(&blocks) };
    for saved in worker.save_with(header.clone(), ready).expect("save") {
        assert_eq!(saved.what, Some(v1::saved::What::Already(false)));
    }
    assert_eq!(worker.get(2), block_of(&worker.layout, &before, &[4, 5]));

    worker.compute(6);
    // Behind whatever still uses the pages.
    worker.events[1].record(&worker.stream).unwrap();
    let request = v1::LoadRequest {
        event: Some(1),
        by_layer: true,
        events: (0..LAYERS).collect(),
        ..worker.load_request(&[(1, [10, 11]), (2, [12, 13])])
    };
    let said = worker.load(request).expect("load");
    assert!(matches!(said.first(), Some(v1::load_response::What::Queued(_))), "{said:?}");
    assert!(matches!(said.last(), Some(v1::load_response::What::Done(_))), "{said:?}");
    // The worker's stream goes on when the device has recorded the last layer.
    for event in &worker.events {
        worker.stream.wait_for(event).unwrap();
    }
    let after = worker.look();
    assert_eq!(block_of(&worker.layout, &after, &[12, 13]), worker.get(2));

    // A call that ends before all layers were ready stores nothing, and leaves nothing.
    let header = v1::SaveHeader { blocks: paged(&[(9, [2, 3])]), ..header };
    let half = vec![v1::LayersReady { layers: 1, event: None }];
    refused(worker.save_with(header, half), 1001, "1 of 2 layers");
    worker.quiesce();
    let status = worker.door.status();
    assert_eq!(status.pending, 0, "{status:?}");
}

fn tiers(said: &[v1::load_response::What]) -> Vec<v1::Tier> {
    let Some(v1::load_response::What::Queued(queued)) = said.first() else { panic!("{said:?}") };
    let tier = |loaded: &v1::Loaded| match loaded.what {
        Some(v1::loaded::What::Tier(tier)) => v1::Tier::try_from(tier).unwrap(),
        _ => panic!("{loaded:?}"),
    };
    queued.loaded.iter().map(tier).collect()
}

/// Blocks that were saved stay in spare memory of the device, and come from there.
#[test]
fn a_pool_gives_what_was_saved_and_what_is_loaded_again_and_nothing_that_was_removed() {
    let home = node("pool").set("gpu.pool_bytes=8MiB").set("gpu.leave_bytes=0");
    let daemon = home.start();
    let worker = Worker::new(&home);
    let before = worker.compute(21);
    let blocks: Vec<(u64, [u32; 2])> = (0..16).map(|n| (n, [2 * n as u32, 2 * n as u32 + 1])).collect();
    worker.save_well(&blocks);
    for (number, pages) in &blocks {
        assert_eq!(worker.get(*number), block_of(&worker.layout, &before, pages), "block {number}");
    }
    worker.compute(22);
    let elsewhere: Vec<(u64, [u32; 2])> =
        (0..16).map(|n| (n, [32 + 2 * n as u32, 33 + 2 * n as u32])).collect();
    let request = |blocks: &[(u64, [u32; 2])]| worker.load_request(blocks);
    let said = worker.load(request(&elsewhere)).expect("load");
    assert_eq!(tiers(&said), vec![v1::Tier::Device; 16]);
    let after = worker.look();
    for ((number, from), (_, to)) in blocks.iter().zip(&elsewhere) {
        let (was, is) = (block_of(&worker.layout, &before, from), block_of(&worker.layout, &after, to));
        assert_eq!(was, is, "block {number}");
    }
    // Layer by layer as well, and beside what only host memory has.
    worker.door.put(&laid_out("t"), worker.binding, 77, BLOCK, false).expect("put");
    let mixed = [(3, [0, 1]), (77, [2, 3]), (4, [4, 5])];
    let by_layer = |blocks: &[(u64, [u32; 2])]| v1::LoadRequest { by_layer: true, ..request(blocks) };
    let said = worker.load(by_layer(&mixed)).expect("load");
    assert_eq!(tiers(&said), [v1::Tier::Device, v1::Tier::Host, v1::Tier::Device]);
    let after = worker.look();
    for (number, pages) in &mixed {
        assert_eq!(worker.get(*number), block_of(&worker.layout, &after, pages), "block {number}");
    }
    // What host memory gave twice is in the pool a moment later.
    let again = [(77, [6, 7])];
    worker.load_well(&again);
    until("it is kept", || {
        let said = worker.load(request(&again)).expect("load");
        Some(()).filter(|()| tiers(&said) == [v1::Tier::Device])
    });
    assert_eq!(worker.get(77), block_of(&worker.layout, &worker.look(), &[6, 7]));
    let tier = || {
        let tiers = worker.door.status().tiers;
        tiers.into_iter().find(|tier| tier.tier() == v1::Tier::Device).expect("a pool is a tier")
    };
    assert_eq!((tier().blocks, tier().state.as_str()), (17, "ok"));
    // One that it gives up comes from host memory.
    let evict = |number| {
        let names = v1::Names {
            binding: worker.binding,
            sequence_hashes: vec![hash(number)],
            ..v1::Names::default()
        };
        let request =
            v1::EvictRequest { names: Some(names), tier: v1::Tier::Device.into(), ..Default::default() };
        let answer = worker.door.runtime.block_on(async { worker.door.blocks().evict(request).await });
        answer.expect("evict").into_inner().evicted
    };
    assert_eq!((evict(7), evict(7), evict(99)), (1, 0, 0));
    assert_eq!(tiers(&worker.load(request(&[(7, [0, 1])])).expect("load")), [v1::Tier::Host]);
    // What is removed is not served from there.
    assert_eq!(worker.door.evict(worker.binding, 3), Some(1));
    let said = worker.load(request(&[(3, [0, 1])])).expect("load");
    let Some(v1::load_response::What::Queued(queued)) = said.first() else { panic!("{said:?}") };
    assert!(matches!(queued.loaded[0].what, Some(v1::loaded::What::Miss(_))), "{queued:?}");
    until("its copy is given up, too", || Some(()).filter(|()| tier().blocks == 15));
    // Nor is anything after a restart: host memory has it, and gives it.
    daemon.kill();
    let _daemon = home.start();
    let worker = Worker::new(&home);
    worker.load_well(&[(5, [0, 1])]);
    assert_eq!(worker.get(5), block_of(&worker.layout, &worker.look(), &[0, 1]));
}

/// What a worker has begun to save when it goes is not published, though its copies would still be made; and nobody else
/// waits for its event meanwhile.
#[test]
fn a_worker_that_goes_in_mid_save_leaves_no_block_and_holds_nobody_up() {
    const LONG_COPY: u64 = 32 << 20;
    for pool in ["0", "8MiB"] {
        let home = node(&format!("gone-{pool}"))
            .set(&format!("gpu.pool_bytes={pool}"))
            .set("gpu.leave_bytes=0")
            .set("gpu.streams=1");
        let _daemon = home.start();
        let worker = Worker::new(&home);
        let other = Worker::new(&home);
        worker.compute(71);
        let before = other.compute(72);
        // The engine's stream is busy for a second or so, and its event is behind that.
        let (from, to) =
            (worker.device.allocate(LONG_COPY).unwrap(), worker.device.allocate(LONG_COPY).unwrap());
        let copies = if is_real() { 4000 } else { 60 };
        let busy: Vec<_> =
            (0..copies).map(|_| worker.stream.copy((&to, 0), (&from, 0), LONG_COPY).unwrap()).collect();
        worker.events[0].record(&worker.stream).unwrap();
        let header = v1::save_request::What::Header(v1::SaveHeader {
            event: Some(0),
            ..worker.header(&[(1, [2, 3])])
        });
        let mut devices = worker.devices();
        let save = worker.door.runtime.spawn(async move {
            let messages = vec![v1::SaveRequest { what: Some(header) }];
            devices.save(tokio_stream::iter(messages)).await
        });
        until("it is on its way", || {
            Some(()).filter(|()| worker.door.status().pending > 0 || save.is_finished())
        });
        // Others come and go meanwhile, down and up.
        other.save_well(&[(2, [4, 5])]);
        assert_eq!(other.get(2), block_of(&other.layout, &before, &[4, 5]));
        other.load_well(&[(2, [6, 7])]);
        let went_before = !worker.events[0].is_done().unwrap();
        let Worker { door, _open, stream, .. } = worker;
        drop(_open);
        until("the session is over", || {
            let request = v1::ListGpusRequest {};
            let gpus = door.runtime.block_on(async { door.admin().list_gpus(request).await }).expect("list");
            Some(()).filter(|()| gpus.into_inner().gpus[0].caches == 1)
        });
        let _ = door.runtime.block_on(save);
        assert!(stream.wait(LONG).unwrap(), "the engine's stream ends");
        drop(busy);
        until("nothing is pending", || Some(()).filter(|()| door.status().pending == 0));
        if went_before {
            assert_eq!(other.try_get(1), None, "a block of a worker that was gone");
        } else {
            eprintln!("skipped: the stream was done before the worker went");
        }
    }
}

/// Whoever gives a call up and waits until all is quiet may use his pages: nothing of it is copied later.
#[test]
fn what_a_caller_gave_up_is_not_copied_from_pages_that_hold_something_else() {
    if is_real() {
        eprintln!("skipped: a real device is not slow on purpose");
        return;
    }
    for pool in ["0", "8MiB"] {
        let home = node(&format!("left-{pool}"))
            .set("gpu.method=loop")
            .set("gpu.copies_max=1")
            .set(&format!("gpu.pool_bytes={pool}"))
            .set("gpu.leave_bytes=0")
            .with_env("FAKE_CUDA", "delay_us=500");
        let _daemon = home.start();
        let worker = Worker::new(&home);
        let before = worker.compute(61);
        let call = |number| {
            let header = v1::save_request::What::Header(worker.header(&[(number, [2, 3])]));
            let messages = vec![v1::SaveRequest { what: Some(header) }];
            let mut devices = worker.devices();
            async move { devices.save(tokio_stream::iter(messages)).await }
        };
        worker.door.runtime.block_on(async {
            // The first takes the device; the others wait for it, and are given up.
            let first = tokio::spawn(call(1));
            let left: Vec<_> = (2..6).map(|number| tokio::spawn(call(number))).collect();
            tokio::time::sleep(Duration::from_millis(60)).await;
            left.iter().for_each(tokio::task::JoinHandle::abort);
            let saved = first.await.unwrap().expect("save").into_inner().saved;
            assert_eq!(saved[0].what, Some(v1::saved::What::Already(false)));
        });
        worker.quiesce();
        worker.compute(62);
        worker.save_well(&[(9, [4, 5])]);
        let old = block_of(&worker.layout, &before, &[2, 3]);
        assert_eq!(worker.get(1), old);
        for number in 2..6 {
            let found = worker.try_get(number);
            assert!(
                found.is_none_or(|bytes| bytes == old),
                "block {number} is of other pages than were saved"
            );
        }
    }
}

/// A bit that changes on the bus is found where two sums of the block can be compared: with a pool.
#[test]
fn a_block_that_changes_on_the_bus_is_not_stored_and_not_kept() {
    if is_real() {
        eprintln!("skipped: a real bus does not change bits on purpose");
        return;
    }
    // On the way up each load copies a piece for each token of each head, and a whole block goes into the pool behind two.
    const PIECES: u32 = LAYERS * 2 * 4 * BLOCK_TOKENS;
    let node = |way, flip: u32| {
        node(way)
            .set("gpu.pool_bytes=8MiB")
            .set("gpu.leave_bytes=0")
            .with_env("FAKE_CUDA", &format!("flip={flip}"))
    };
    // On the way to host memory.
    let home = node("flip-down", 1);
    let daemon = home.start();
    let worker = Worker::new(&home);
    let before = worker.compute(51);
    let saved = worker.save(worker.header(&[(1, [2, 3])])).expect("the call").remove(0);
    let Some(v1::saved::What::Fault(fault)) = saved.what else { panic!("{saved:?}") };
    assert_eq!(fault.code, 2004, "{fault:?}");
    let said = worker.load(worker.load_request(&[(1, [0, 1])])).expect("load");
    let Some(v1::load_response::What::Queued(queued)) = said.first() else { panic!("{said:?}") };
    assert!(matches!(queued.loaded[0].what, Some(v1::loaded::What::Miss(_))), "{queued:?}");
    worker.save_well(&[(1, [2, 3])]);
    assert_eq!(worker.get(1), block_of(&worker.layout, &before, &[2, 3]));
    daemon.terminate();

    // On the way into the pool.
    let home = node("flip-up", 2 * PIECES + 1);
    let _daemon = home.start();
    let worker = Worker::new(&home);
    worker.door.put(&laid_out("t"), worker.binding, 5, BLOCK, false).expect("put");
    worker.load_well(&[(5, [0, 1])]);
    worker.load_well(&[(5, [2, 3])]);
    until("it is found out", || Some(()).filter(|()| home.log().contains("damaged on its way to the GPU")));
    let said = worker.load(worker.load_request(&[(5, [4, 5])])).expect("load");
    assert_eq!(tiers(&said), [v1::Tier::Host]);
    assert_eq!(block_of(&worker.layout, &worker.look(), &[4, 5]), worker.get(5));
}

/// One engine computes on one device, another goes on on the second: the bytes cross from device to device.
#[test]
fn what_one_device_has_another_loads_without_host_memory() {
    if is_real() && driver().devices().expect("devices").len() < 2 {
        eprintln!("skipped: this machine has one GPU");
        return;
    }
    if !is_real() && std::env::var_os("FAKE_CUDA").is_none() {
        // The driver of this process has one device. Another process asks for two.
        let test = "what_one_device_has_another_loads_without_host_memory";
        let out = std::process::Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture", "--test-threads=1"])
            .env("FAKE_CUDA", "devices=2")
            .output()
            .expect("this binary");
        let words = String::from_utf8_lossy(&out.stdout);
        let why = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success() && words.contains("1 passed"), "{words}{why}");
        return;
    }
    let home =
        node("two").set("gpu.pool_bytes=8MiB").set("gpu.leave_bytes=0").with_env("FAKE_CUDA", "devices=2");
    let _daemon = home.start();
    let prefill = Worker::new(&home);
    let decode = Worker::on(&home, 1);
    let before = prefill.compute(31);
    decode.compute(32);
    prefill.save_well(&[(1, [2, 3]), (2, [4, 5])]);
    let said = decode.load(decode.load_request(&[(2, [60, 61]), (1, [62, 63])])).expect("load");
    assert_eq!(tiers(&said), [v1::Tier::Device; 2]);
    let after = decode.look();
    assert_eq!(block_of(&decode.layout, &after, &[62, 63]), block_of(&prefill.layout, &before, &[2, 3]));
    assert_eq!(block_of(&decode.layout, &after, &[60, 61]), block_of(&prefill.layout, &before, &[4, 5]));
}

/// Tensors as an engine with expandable segments has them: each lies across the end of one piece of memory and the
/// beginning of the next. What the daemon gets are descriptors, on the worker socket.
fn across_pieces(device: &Device, layout: &EngineLayout) -> (Vec<DeviceMemory>, Vec<TensorHandles>) {
    const PIECE: u64 = 2 << 20;
    let tensor = |_| {
        let bytes = layout.tensor_bytes();
        let offset = PIECE - bytes / 2;
        let pieces: Vec<Arc<OwnedFd>> = (0..2)
            .map(|_| {
                let memory = device.allocate_shared(PIECE).expect("a piece");
                Arc::new(memory.export_descriptor().expect("a descriptor"))
            })
            .collect();
        let ours = |fd: &Arc<OwnedFd>| SharedPiece::Descriptor { fd: fd.try_clone().unwrap(), bytes: PIECE };
        let memory = device.open_pieces(pieces.iter().map(ours).collect(), offset, bytes).expect("our own");
        let given = |fd: Arc<OwnedFd>| MemoryPiece::Descriptor { fd, bytes: PIECE };
        (memory, TensorHandles { pieces: pieces.into_iter().map(given).collect(), offset, bytes })
    };
    (0..layout.tensor_count()).map(tensor).unzip()
}

/// The client registers again what it had registered, when the daemon is there again.
#[test]
fn the_client_hands_over_pieces_and_registers_again_after_a_restart() {
    let home = node("client").set("gpu.pool_bytes=8MiB").set("gpu.leave_bytes=0");
    let daemon = home.start();
    let client = Client::connect(ClientOptions::socket(home.run_dir())).wait().expect("connect");
    let engine = client.worker(WorkerOptions::default()).wait().expect("a session");
    assert!(matches!(engine.doors(), Doors::SharedMemory { .. }), "{:?}", engine.doors());
    let binding = engine.register(laid_out("t"), slice(), BLOCK).wait().expect("register");
    let layout = layout();
    // The same memory as a raw worker looks at it.
    let mut worker = Worker::unregistered(&home);
    let (tensors, handles) = across_pieces(&worker.device, &layout);
    let spec = DeviceCacheSpec {
        device: worker.device.facts().uuid.0,
        tensors: handles,
        layout: layout.clone(),
        events: Vec::new(),
    };
    let cache = engine.register_cache(spec.clone()).wait().expect("register the cache");

    worker.tensors = tensors;
    let before = worker.compute(41);
    let block =
        |number: u64, pages: [u32; 2]| PagedBlock { hash: SequenceHash::from(number), pages: pages.to_vec() };
    let saved = cache.save(&binding, &[block(1, [2, 3]), block(2, [63, 0])], &SaveOptions::default()).wait();
    assert!(saved.as_ref().is_ok_and(|saved| saved.iter().all(Result::is_ok)), "{saved:?}");
    assert_eq!(worker.get(2), block_of(&layout, &before, &[63, 0]));

    daemon.kill();
    let _daemon = home.start();
    assert!(engine.wait_until_connected(), "the client comes back");
    worker.compute(42);
    let load = cache.load(&binding, &[block(2, [10, 11]), block(7, [12, 13])], &LoadOptions::default());
    let load = load.wait().expect("it is known again");
    assert_eq!(load.found[0].as_ref().ok(), Some(&Tier::Host), "{:?}", load.found);
    assert!(load.found[1].is_err());
    load.finish().wait().expect("it ends");
    assert_eq!(block_of(&layout, &worker.look(), &[10, 11]), block_of(&layout, &before, &[63, 0]));

    // Layer by layer, by the client.
    // A raw worker of the daemon's second life.
    let again = Worker::unregistered(&home);
    let mut by_layer =
        cache.save_by_layer(&binding, &[block(3, [20, 21])], &SaveOptions::default()).wait().expect("begin");
    let now = worker.look();
    for layers in 1..=LAYERS {
        by_layer.ready(layers, None).expect("ready");
    }
    let saved = by_layer.finish().wait().expect("it ends");
    assert!(saved.iter().all(Result::is_ok), "{saved:?}");
    assert_eq!(again.get(3), block_of(&layout, &now, &[20, 21]));

    // Forgotten by the last who has it; what the client is told then is plain.
    drop(cache);
    let gone = || {
        let request = v1::ListGpusRequest {};
        let gpus = again.door.runtime.block_on(async { again.door.admin().list_gpus(request).await });
        Some(()).filter(|()| gpus.expect("list").into_inner().gpus[0].caches == 0)
    };
    until("the daemon has let go of it", gone);
    engine.register_cache(spec).wait().expect("and takes it again");
}

#[test]
fn what_is_not_here_is_a_miss_and_its_pages_stay_as_they_are() {
    let home = node("miss");
    let _daemon = home.start();
    let worker = Worker::new(&home);
    worker.compute(7);
    worker.save_well(&[(1, [0, 1])]);
    let before = worker.compute(8);
    let said = worker.load(worker.load_request(&[(1, [4, 5]), (77, [6, 7])])).expect("load");
    let Some(v1::load_response::What::Queued(queued)) = said.first() else { panic!("{said:?}") };
    assert!(matches!(queued.loaded[0].what, Some(v1::loaded::What::Tier(_))));
    let Some(v1::loaded::What::Miss(miss)) = &queued.loaded[1].what else { panic!("{queued:?}") };
    assert_eq!(miss.reason(), v1::MissReason::NeverStored);
    let after = worker.look();
    assert_eq!(
        block_of(&worker.layout, &after, &[6, 7]),
        block_of(&worker.layout, &before, &[6, 7]),
        "nothing was written there"
    );
}

#[test]
fn handles_and_layouts_that_lie_are_refused_and_nothing_else_is_disturbed() {
    let home = node("lies");
    let _daemon = home.start();
    let worker = Worker::new(&home);
    let before = worker.compute(9);
    type Lie = Box<dyn FnOnce(&mut v1::RegisterCacheRequest)>;
    let lies: Vec<(Lie, u32, &str)> = vec![
        (Box::new(|it| it.tensors[1].bytes = 1 << 40), 1001, "are not within"),
        (Box::new(|it| it.tensors[1].bytes -= 1), 1015, "tensor 1 has"),
        (Box::new(|it| it.tensors[0].offset = u64::MAX - 7), 1001, "are not within"),
        (Box::new(|it| it.tensors.truncate(1)), 1001, "2 tensors, 1 are registered"),
        (Box::new(|it| it.tensors[0].pieces.clear()), 1001, "`pieces` is empty"),
        (Box::new(|it| it.tensors[0].pieces[0].handle = None), 1001, "no handle"),
        (
            Box::new(|it| {
                let wrong = v1::device_handle::Handle::CudaIpc(vec![0xa5; 64].into());
                it.tensors[0].pieces[0].handle = Some(wrong);
            }),
            1015,
            "leads nowhere",
        ),
        (
            Box::new(|it| {
                let short = v1::device_handle::Handle::CudaIpc(vec![1; 63].into());
                it.tensors[0].pieces[0].handle = Some(short);
            }),
            1001,
            "64 bytes",
        ),
        (
            Box::new(|it| {
                it.tensors[0].pieces[0].handle = Some(v1::device_handle::Handle::Descriptor(5));
            }),
            1015,
            "descriptor 5",
        ),
        (Box::new(|it| it.events[0] = vec![9; 64].into()), 1015, "leads nowhere"),
        (Box::new(|it| it.device = vec![7; 16].into()), 3008, "uses no GPU"),
        (Box::new(|it| it.device = vec![7; 3].into()), 1001, "`device` has 3 bytes"),
        (Box::new(|it| it.layout = None), 1001, "`layout`"),
        (Box::new(|it| it.layout.as_mut().unwrap().page_count = u32::MAX), 1001, "stride"),
        (Box::new(|it| it.layout.as_mut().unwrap().first_offset = 4096), 1015, "tensor 0 has"),
        (Box::new(|it| it.layout.as_mut().unwrap().element_bits = 4), 1001, "whole bytes"),
        (Box::new(|it| it.layout.as_mut().unwrap().page_stride = 1), 1001, "stride"),
        (Box::new(|it| it.session = 99), 1005, "session"),
    ];
    for (lie, code, words) in lies {
        refused(worker.register(lie), code, words);
    }
    // Pages and names that lie.
    let good = worker.header(&[(1, [0, 1])]);
    let with = |blocks| v1::SaveHeader { blocks, ..good.clone() };
    let one = |pages: Vec<u32>| vec![v1::PagedBlock { sequence_hash: hash(1), pages }];
    refused(worker.save(with(one(vec![0, PAGES]))), 1001, "page 64 of 64");
    refused(worker.save(with(one(vec![3, 3]))), 1001, "page 3 is given twice");
    refused(worker.save(with(one(vec![3]))), 1001, "no block of 16");
    refused(worker.save(v1::SaveHeader { cache: 77, ..good.clone() }), 1016, "cache 77");
    refused(worker.save(v1::SaveHeader { binding: 77, ..good.clone() }), 1002, "binding 77");
    refused(worker.save(v1::SaveHeader { event: Some(7), ..good.clone() }), 1001, "event 7 of 2");
    let twice = v1::LoadRequest { ..worker.load_request(&[(1, [0, 1]), (2, [1, 2])]) };
    refused(worker.load(twice), 1001, "page 1 is given for two blocks");
    let event = v1::LoadRequest { event: Some(5), ..worker.load_request(&[(1, [0, 1])]) };
    refused(worker.load(event), 1001, "event 5 of 2");
    // Bindings that the cache does not fit.
    let plain = worker.door.register(&scope("plain"), BLOCK);
    refused(worker.save(v1::SaveHeader { binding: plain, ..good.clone() }), 1001, "order of axes");
    let short = worker.door.register(&laid_out("t"), BLOCK / 2);
    refused(worker.save(v1::SaveHeader { binding: short, ..good.clone() }), 1003, "bytes");
    // Another caller's cache is nobody else's.
    let other = Worker::unregistered(&home);
    let header = v1::SaveHeader { session: other.session, ..good };
    refused(other.save(header), 1016, "not registered by this session");

    worker.save_well(&[(1, [0, 1])]);
    assert_eq!(worker.get(1), block_of(&worker.layout, &before, &[0, 1]));
}

#[test]
fn a_device_that_is_lost_in_mid_copy_costs_what_was_under_way_and_no_more() {
    if is_real() {
        eprintln!("skipped: a real device is not lost on purpose");
        return;
    }
    let home = node("lost").with_env("FAKE_CUDA", LOST_LATER);
    let _daemon = home.start();
    let worker = Worker::new(&home);
    worker.compute(11);
    let mut failed = None;
    for number in 0..200 {
        let saved = worker.save(worker.header(&[(number, [0, 1])]));
        let what = saved.expect("the call itself ends well").remove(0).what;
        if let Some(v1::saved::What::Fault(fault)) = what {
            failed = Some(fault);
            break;
        }
    }
    let fault = failed.expect("the device was to be lost");
    assert_eq!(fault.code, 3007, "{fault:?}");
    // The rest of the daemon goes on, and says what is wrong.
    refused(worker.load(worker.load_request(&[(0, [0, 1])])), 3007, "lost");
    assert!(!worker.get(0).is_empty());
    let plain = worker.door.register(&scope("plain"), 4096);
    worker.door.put(&scope("plain"), plain, 1, 4096, false).expect("put");
    worker.door.get(&scope("plain"), plain, 1).expect("get");
}

#[test]
fn a_killed_worker_leaves_nothing_behind() {
    if let Some(home) = support::home_of_child() {
        return child(&home);
    }
    let home = node("killed");
    let _daemon = home.start();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["a_killed_worker_leaves_nothing_behind", "--exact", "--nocapture", "--test-threads=1"])
        .env("KVD_STORY_HOME", home.run_dir().parent().unwrap())
        .spawn()
        .expect("a second worker");
    let door = Door::of(&home);
    let gpu = || {
        let request = v1::ListGpusRequest {};
        let gpus = door.runtime.block_on(async { door.admin().list_gpus(request).await }).expect("list");
        gpus.into_inner().gpus.remove(0)
    };
    until("it saves", || Some(()).filter(|()| gpu().caches == 1 && gpu().copies_done > 5));
    child.kill().expect("kill");
    child.wait().expect("wait");
    until("its cache is gone", || Some(()).filter(|()| gpu().caches == 0 && gpu().copies_under_way == 0));
    until("its blocks are not waited for", || Some(()).filter(|()| door.status().pending == 0));
    // And another worker is served as before.
    let worker = Worker::new(&home);
    let before = worker.compute(12);
    worker.save_well(&[(1 << 40, [0, 1])]);
    assert_eq!(worker.get(1 << 40), block_of(&worker.layout, &before, &[0, 1]));
}

/// Saves until it is killed.
fn child(root: &std::path::Path) {
    let worker = Worker::at(&root.join("run"));
    worker.compute(13);
    for number in 0.. {
        let _ = worker.save(worker.header(&[(number, [0, 1]), (number + (1 << 32), [2, 3])]));
    }
}

#[test]
fn a_machine_without_a_driver_says_so_and_serves_without() {
    let missing: OsString = "/nowhere/libcuda.so.1".into();
    let home = Home::sized("gpu-none", "64MiB", None).set(&format!("gpu.driver={}", missing.display()));
    let daemon = home.start();
    let worker = Worker::unregistered(&home);
    refused(worker.register(|_| {}), 3008, "no CUDA driver");
    drop(worker);
    daemon.terminate();
    let home = home.set("gpu.enabled=required");
    assert!(!home.start_and_fail().success());
    assert!(home.log().contains("gpu.enabled is required"), "{}", home.log());
}
