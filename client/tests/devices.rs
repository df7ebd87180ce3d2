//! KV caches in device memory, against a daemon that is played: what goes over the wire, and what comes of each answer.

mod played;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kv_api::{convert, v1};
use kv_block::code::Code;
use kv_block::{Fault, SequenceHash};
use kv_client::layout::{Content, EngineLayout, EngineOrder, Shape, Tensors};
use kv_client::{
    Binding, DeviceCache, DeviceCacheSpec, Error, FaultKind, LoadOptions, MemoryPiece, MissReason,
    PagedBlock, Priority, SaveOptions, Scope, Slice, TensorHandles, Tier, Worker,
};
use played::{Heard, KEYS_MAX, LONG, Played, soon};

/// Two layers, a tensor each, of 4096 bytes.
fn layout() -> EngineLayout {
    let shape = Shape {
        slice: Slice::whole(2, 2),
        content: Content::KeyValue,
        page_count: 8,
        page_tokens: 4,
        head_dim: 16,
        element_bits: 16,
    };
    EngineLayout::dense(shape, EngineOrder::LBHNC, Tensors::Layers).unwrap()
}

fn spec() -> DeviceCacheSpec {
    let tensor = |number| TensorHandles::ipc([number; 64], 512 * u64::from(number), 4096);
    DeviceCacheSpec {
        device: [7; 16],
        tensors: vec![tensor(1), tensor(2)],
        layout: layout(),
        events: vec![[3; 64], [4; 64]],
    }
}

/// The same by descriptors: both tensors in one piece.
fn spec_of(fd: &Arc<OwnedFd>) -> DeviceCacheSpec {
    let piece = || MemoryPiece::Descriptor { fd: Arc::clone(fd), bytes: 8192 };
    let tensor = |offset| TensorHandles { pieces: vec![piece()], offset, bytes: 4096 };
    DeviceCacheSpec { tensors: vec![tensor(0), tensor(4096)], ..spec() }
}

fn fd() -> Arc<OwnedFd> {
    Arc::new(tempfile::tempfile().unwrap().into())
}

fn bind(worker: &Worker) -> Binding {
    let layout = "layer,kv,head,token,dim".into();
    let scope = Scope { model: "m".into(), tenant: "t".into(), block_tokens: 8, layout, ..Scope::default() };
    worker.register(scope, Slice::whole(2, 2), 2048).wait().unwrap()
}

fn blocks(numbers: std::ops::Range<u32>) -> Vec<PagedBlock> {
    numbers.map(|number| PagedBlock { hash: hash(number), pages: vec![number, number + 100] }).collect()
}

fn hash(number: u32) -> SequenceHash {
    u64::from(number).into()
}

fn open(played: &Played) -> (Worker, Binding, DeviceCache) {
    let worker = played.worker();
    let binding = bind(&worker);
    let cache = worker.register_cache(spec()).wait().unwrap();
    (worker, binding, cache)
}

fn headers(played: &Played) -> Vec<v1::SaveHeader> {
    let one = |heard| if let Heard::Save(header) = heard { Some(header) } else { None };
    played.board.heard().into_iter().filter_map(one).collect()
}

fn loads(played: &Played) -> Vec<v1::LoadRequest> {
    let one = |heard| if let Heard::Load(request) = heard { Some(request) } else { None };
    played.board.heard().into_iter().filter_map(one).collect()
}

fn queued(found: &[Option<v1::Tier>]) -> v1::LoadResponse {
    let one = |found: &Option<v1::Tier>| v1::Loaded {
        what: Some(match found {
            Some(tier) => v1::loaded::What::Tier((*tier).into()),
            None => v1::loaded::What::Miss(convert::miss_message(MissReason::Expired, Vec::new())),
        }),
    };
    let queued = v1::LoadQueued { loaded: found.iter().map(one).collect() };
    v1::LoadResponse { what: Some(v1::load_response::What::Queued(queued)) }
}

fn all_found(count: usize) -> v1::LoadResponse {
    queued(&vec![Some(v1::Tier::Host); count])
}

fn arrived(layers: u32) -> v1::LoadResponse {
    v1::LoadResponse { what: Some(v1::load_response::What::Layers(layers)) }
}

fn done() -> v1::LoadResponse {
    v1::LoadResponse { what: Some(v1::load_response::What::Done(v1::LoadDone {})) }
}

#[test]
fn a_cache_is_registered_as_it_is_and_forgotten_with_its_last_clone() {
    let played = Played::start(None);
    let worker = played.worker();
    let cache = worker.register_cache(spec()).wait().unwrap();
    let [request] = &played.board.registered()[..] else { panic!() };
    assert_eq!((request.session, &request.device[..]), (worker.session().0, &[7; 16][..]));
    assert_eq!(convert::cache_layout(request.layout), Ok(layout()));
    assert_eq!(request.events.iter().map(|event| event[0]).collect::<Vec<_>>(), [3, 4]);
    for (number, tensor) in [1, 2].into_iter().zip(&request.tensors) {
        let handle = v1::device_handle::Handle::CudaIpc(vec![number; 64].into());
        let piece = v1::DeviceHandle { bytes: 0, handle: Some(handle) };
        let offset = 512 * u64::from(number);
        assert_eq!(*tensor, v1::DeviceMemory { pieces: vec![piece], offset, bytes: 4096 });
    }
    let other = cache.clone().with_deadline(Duration::from_secs(3));
    assert_eq!((cache.deadline(), other.deadline()), (LONG, Duration::from_secs(3)));
    other.quiesce().wait().unwrap();
    drop(cache);
    assert_eq!(played.board.heard().last(), Some(&Heard::Quiesce(1)));
    drop(other);
    soon(|| played.board.heard().last() == Some(&Heard::Forget(1)));
}

#[test]
fn a_cache_that_was_forgotten_is_not_for_any_clone() {
    let played = Played::start(None);
    let (_worker, binding, cache) = open(&played);
    let other = cache.clone();
    cache.forget().wait().unwrap();
    assert_eq!(played.board.heard().last(), Some(&Heard::Forget(1)));
    let error = other.save(&binding, &blocks(0..1), &SaveOptions::default()).wait().unwrap_err();
    assert!(error.kind() == FaultKind::Invalid && error.to_string().contains("forgotten"), "{error}");
    cache.forget().wait().unwrap();
    drop((cache, other));
    let forgotten = played.board.heard().iter().filter(|heard| matches!(heard, Heard::Forget(_))).count();
    assert_eq!(forgotten, 1, "and not a second time");
}

#[test]
fn a_refused_cache_is_no_cache() {
    let played = Played::start(None);
    let worker = played.worker();
    played.board.refuse(Fault::new(Code::BadRequest, "the handle of tensor 1 leads nowhere"));
    let error = worker.register_cache(spec()).wait().unwrap_err();
    assert_eq!(error, Fault::new(Code::BadRequest, "the handle of tensor 1 leads nowhere").into());
    let wrong = DeviceCacheSpec { tensors: vec![], ..spec() };
    let error = worker.register_cache(wrong).wait().unwrap_err();
    assert_eq!(error.kind(), FaultKind::Invalid);
    assert_eq!(played.board.registered().len(), 1, "what makes no sense is not even asked");
}

#[test]
fn blocks_are_saved_from_pages_and_each_has_its_answer() {
    let played = Played::start(None);
    let (_worker, binding, cache) = open(&played);
    let full = Fault::new(Code::HostFull, "all slots are pinned").retry_after(Duration::from_millis(7));
    let already = |already| v1::Saved { what: Some(v1::saved::What::Already(already)) };
    let fault = v1::Saved { what: Some(v1::saved::What::Fault(kv_api::fault::message(&full))) };
    let unknown = v1::Fault { kind: 1, code: 9999, message: "of a newer daemon".into(), retry_after_ms: 0 };
    let unknown = v1::Saved { what: Some(v1::saved::What::Fault(unknown)) };
    played.board.answer(Ok(vec![already(false), already(true), fault, unknown]));
    let options = SaveOptions {
        priority: Priority::High,
        ttl: Some(Duration::from_millis(1500)),
        durable: true,
        after: Some(hash(99)),
        event: Some(1),
    };
    let saved = cache.save(&binding, &blocks(0..4), &options).wait().unwrap();
    assert!(!saved[0].as_ref().unwrap().already && saved[1].as_ref().unwrap().already);
    assert_eq!(saved[2], Err(full.into()));
    assert!(saved[3].as_ref().unwrap_err().to_string().contains("of a newer daemon"));
    let [header] = &headers(&played)[..] else { panic!() };
    let paged = |number: u32| v1::PagedBlock {
        sequence_hash: hash(number).as_bytes().to_vec().into(),
        pages: vec![number, number + 100],
    };
    let wanted = v1::SaveHeader {
        session: cache_session(&played),
        cache: 1,
        binding: 3,
        blocks: (0..4).map(paged).collect(),
        priority: v1::Priority::High.into(),
        ttl_s: 2,
        durable: true,
        after: hash(99).as_bytes().to_vec().into(),
        event: Some(1),
        by_layer: false,
    };
    assert_eq!(*header, wanted);
    assert!(cache.save(&binding, &[], &options).wait().unwrap().is_empty());
    assert_eq!(headers(&played).len(), 1, "nothing is not asked for");
    // Fewer answers than blocks are a defect, and no block is taken for stored.
    played.board.answer(Ok(vec![already(false)]));
    let error = cache.save(&binding, &blocks(0..2), &options).wait().unwrap_err();
    assert_eq!(error.kind(), FaultKind::Internal);
}

fn cache_session(played: &Played) -> u64 {
    played.board.registered().last().unwrap().session
}

#[test]
fn more_blocks_than_a_request_takes_go_in_several() {
    let played = Played::start(None);
    let (_worker, binding, cache) = open(&played);
    let options = SaveOptions { after: Some(hash(99)), event: Some(0), ..SaveOptions::default() };
    let saved = cache.save(&binding, &blocks(0..9), &options).wait().unwrap();
    assert_eq!(saved.len(), 9);
    let headers = headers(&played);
    let after: Vec<_> = headers.iter().map(|header| SequenceHash::new(&header.after)).collect();
    assert_eq!(after, [Some(hash(99)), Some(hash(3)), Some(hash(7))]);
    assert!(headers.iter().all(|header| header.event == Some(0) && header.blocks.len() <= KEYS_MAX));
    // One that fails fails all.
    played
        .board
        .answer(Ok((0..4).map(|_| v1::Saved { what: Some(v1::saved::What::Already(false)) }).collect()));
    played.board.answer(Err(Fault::new(Code::QueueFull, "busy")));
    let error = cache.save(&binding, &blocks(0..9), &options).wait().unwrap_err();
    assert_eq!((error.kind(), self::headers(&played).len()), (FaultKind::Busy, 5));
}

#[test]
fn layers_are_saved_as_they_become_ready() {
    let played = Played::start(None);
    let (_worker, binding, cache) = open(&played);
    // Of two requests each hears of each layer.
    let options = SaveOptions { event: Some(1), ..SaveOptions::default() };
    let mut save = cache.save_by_layer(&binding, &blocks(0..6), &options).wait().unwrap();
    soon(|| headers(&played).len() == 2);
    assert!(headers(&played).iter().all(|header| header.by_layer && header.event.is_none()));
    let ready = |played: &Played| {
        let one = |heard| if let Heard::Ready(layers, event) = heard { Some((layers, event)) } else { None };
        played.board.heard().into_iter().filter_map(one).collect::<Vec<_>>()
    };
    for wrong in [0, 3] {
        assert_eq!(save.ready(wrong, None).unwrap_err().kind(), FaultKind::Invalid);
    }
    save.ready(1, Some(0)).unwrap();
    // It is heard at once, while nobody waits for anything.
    soon(|| ready(&played) == [(1, Some(0)); 2]);
    assert_eq!(save.ready(1, None).unwrap_err().kind(), FaultKind::Invalid);
    save.ready(2, None).unwrap();
    let saved = save.finish().wait().unwrap();
    assert_eq!(saved.len(), 6);
    assert_eq!(ready(&played)[2..], [(2, None); 2]);
    let nothing = cache.save_by_layer(&binding, &[], &options).wait().unwrap();
    assert!(nothing.finish().wait().unwrap().is_empty());
}

#[test]
fn a_save_that_is_given_up_or_ends_early_stores_nothing() {
    let played = Played::start(None);
    let (_worker, binding, cache) = open(&played);
    let begin = || cache.save_by_layer(&binding, &blocks(0..2), &SaveOptions::default()).wait().unwrap();
    let ends = || played.board.heard().iter().filter(|heard| **heard == Heard::SaveEnd).count();
    let mut save = begin();
    save.ready(1, None).unwrap();
    drop(save);
    soon(|| ends() == 1);
    let mut save = begin();
    save.ready(1, None).unwrap();
    let error = save.finish().wait().unwrap_err();
    assert!(error.to_string().contains("1 of 2 layers"), "{error}");
    soon(|| ends() == 2);
    // Refused while layers are still computed: whoever says that one is ready hears of it.
    let refused = Fault::new(Code::BadRequest, "block 1: page 900 of 8");
    played.board.answer(Err(refused.clone()));
    let mut save = begin();
    soon(|| save.ready(1, None) == Err(refused.clone().into()));
    assert_eq!(save.finish().wait().unwrap_err(), refused.into());
}

#[test]
fn what_is_found_is_known_before_the_copies_are_over() {
    let played = Played::start(None);
    let (_worker, binding, cache) = open(&played);
    let script = played.board.script();
    script.send(Ok(queued(&[Some(v1::Tier::Host), None, Some(v1::Tier::Disk)]))).unwrap();
    let options = LoadOptions {
        wait: Duration::from_secs(5),
        node: "node-1".into(),
        by_layer: true,
        events: vec![1, 0],
        event: Some(1),
    };
    let load = cache.load(&binding, &blocks(0..3), &options).wait().unwrap();
    assert_eq!(load.found, [Ok(Tier::Host), Err(MissReason::Expired.into()), Ok(Tier::Disk)]);
    let [request] = &loads(&played)[..] else { panic!() };
    assert_eq!((request.cache, request.binding, request.by_layer), (1, 3, true));
    assert_eq!((&request.node[..], &request.events[..]), ("node-1", &[1, 0][..]));
    assert_eq!(request.event, Some(1));
    assert!((1..=5000).contains(&request.wait_ms), "{}", request.wait_ms);
    assert_eq!(request.blocks[2].pages, [2, 102]);
    assert_eq!(load.layers_arrived(), 0);
    load.wait_for_layers(0).wait().unwrap();
    assert_eq!(load.wait_for_layers(3).wait().unwrap_err().kind(), FaultKind::Invalid);
    let first = load.wait_for_layers(1);
    script.send(Ok(arrived(1))).unwrap();
    first.wait().unwrap();
    assert_eq!(load.layers_arrived(), 1);
    // Nobody waits, and it is known all the same.
    script.send(Ok(arrived(2))).unwrap();
    soon(|| load.layers_arrived() == 2);
    script.send(Ok(done())).unwrap();
    load.finish().wait().unwrap();
}

#[test]
fn a_load_that_fails_says_so_to_whoever_waits() {
    let played = Played::start(None);
    let (_worker, binding, cache) = open(&played);
    let lost = Fault::new(Code::TierDegraded, "the GPU is lost");
    let status = || kv_api::fault::to_status(&lost);
    // Before anything is found, after that, and after a layer.
    let script = played.board.script();
    script.send(Err(status())).unwrap();
    let load =
        || cache.load(&binding, &blocks(0..1), &LoadOptions { by_layer: true, ..LoadOptions::default() });
    assert_eq!(load().wait().unwrap_err(), lost.clone().into());
    let script = played.board.script();
    for said in [Ok(all_found(1)), Ok(arrived(1)), Err(status())] {
        script.send(said).unwrap();
    }
    let failed = load().wait().unwrap();
    assert_eq!(failed.wait_for_layers(2).wait(), Err(lost.clone().into()));
    failed.wait_for_layers(1).wait().unwrap();
    assert_eq!(failed.finish().wait(), Err(lost.into()));
    // What makes no sense is a defect of the daemon's, and never taken for loaded.
    let wrong: [&[v1::LoadResponse]; 5] =
        [&[], &[done()], &[all_found(2)], &[all_found(1)], &[all_found(1), all_found(1)]];
    for said in wrong {
        let script = played.board.script();
        said.iter().for_each(|said| script.send(Ok(said.clone())).unwrap());
        drop(script);
        let ended = load().wait().and_then(|load| load.finish().wait());
        assert_eq!(ended.unwrap_err().kind(), FaultKind::Internal, "{said:?}");
    }
}

#[test]
fn a_load_in_several_requests_is_over_with_the_last_and_its_events_stand_for_all() {
    let played = Played::start(None);
    let (_worker, binding, cache) = open(&played);
    let counts = |played: &Played| {
        let one = |load: &v1::LoadRequest| (load.blocks.len(), load.by_layer, load.events.len());
        loads(played).iter().map(one).collect::<Vec<_>>()
    };
    // Without events they are all under way at once.
    let [first, second] = [played.board.script(), played.board.script()];
    first.send(Ok(all_found(4))).unwrap();
    second.send(Ok(queued(&[None, Some(v1::Tier::Object)]))).unwrap();
    let options = LoadOptions { by_layer: true, ..LoadOptions::default() };
    let load = cache.load(&binding, &blocks(0..6), &options).wait().unwrap();
    assert_eq!(load.found[3..], [Ok(Tier::Host), Err(MissReason::Expired.into()), Ok(Tier::Object)]);
    assert_eq!(counts(&played), [(4, true, 0), (2, true, 0)]);
    second.send(Ok(arrived(2))).unwrap();
    first.send(Ok(arrived(1))).unwrap();
    load.wait_for_layers(1).wait().unwrap();
    assert_eq!(load.layers_arrived(), 1, "the slower one counts");
    first.send(Ok(done())).unwrap();
    load.wait_for_layers(2).wait().unwrap();
    second.send(Ok(done())).unwrap();
    load.finish().wait().unwrap();
    // An event stands for the copies of one request: those before are over when it is recorded.
    let [first, second] = [played.board.script(), played.board.script()];
    first.send(Ok(all_found(4))).unwrap();
    second.send(Ok(all_found(2))).unwrap();
    let options = LoadOptions { events: vec![0, 1], ..options };
    let load = cache.load(&binding, &blocks(0..6), &options);
    soon(|| counts(&played).len() == 3);
    assert_eq!(counts(&played)[2..], [(4, false, 0)]);
    first.send(Ok(done())).unwrap();
    let load = load.wait().unwrap();
    assert_eq!(counts(&played)[3..], [(2, true, 2)]);
    assert_eq!(load.layers_arrived(), 0);
    second.send(Ok(done())).unwrap();
    load.finish().wait().unwrap();
}

#[test]
fn a_load_that_nobody_waits_for_goes_on() {
    let played = Played::start(None);
    let (_worker, binding, cache) = open(&played);
    let script = played.board.script();
    script.send(Ok(all_found(1))).unwrap();
    drop(cache.load(&binding, &blocks(0..1), &LoadOptions::default()).wait().unwrap());
    // The daemon would see its answers refused if the stream were gone.
    for _ in 0..100 {
        script.send(Ok(arrived(1))).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!script.is_closed());
    script.send(Ok(done())).unwrap();
}

#[test]
fn a_call_that_is_not_answered_ends_at_its_deadline_and_quiesce_follows() {
    let played = Played::start(None);
    let (_worker, binding, cache) = open(&played);
    played.board.hangs.store(true, Ordering::Relaxed);
    let hasty = cache.with_deadline(Duration::from_millis(50));
    let error = hasty.save(&binding, &blocks(0..1), &SaveOptions::default()).wait().unwrap_err();
    assert_eq!(error.kind(), FaultKind::Timeout);
    let save = hasty.save_by_layer(&binding, &blocks(0..1), &SaveOptions::default()).wait();
    let ended = save.and_then(|mut save| {
        soon(|| save.ready(1, None).is_err_and(|error| error.kind() == FaultKind::Timeout));
        save.finish().wait()
    });
    assert_eq!(ended.unwrap_err().kind(), FaultKind::Timeout);
    let script = played.board.script();
    let error = hasty.load(&binding, &blocks(0..1), &LoadOptions::default()).wait().unwrap_err();
    assert_eq!(error.kind(), FaultKind::Timeout);
    drop(script);
    let script = played.board.script();
    script.send(Ok(all_found(1))).unwrap();
    let load = hasty.load(&binding, &blocks(0..1), &LoadOptions::default()).wait();
    let ended = load.and_then(|load| load.finish().wait());
    assert_eq!(ended.unwrap_err().kind(), FaultKind::Timeout);
    cache.quiesce().wait().unwrap();
    assert_eq!(played.board.heard().last(), Some(&Heard::Quiesce(1)));
}

fn sessions(played: &Played) -> Vec<Heard> {
    let registers = |heard: &Heard| matches!(heard, Heard::Session(_) | Heard::Bound(_) | Heard::Register(_));
    played.board.heard().into_iter().filter(registers).collect()
}

#[test]
fn the_next_daemon_hears_of_all_caches_before_it_is_asked_for_anything() {
    for door in [None, Some(kv_shm::door::VERSION)] {
        let mut played = Played::start(door);
        let worker = played.worker();
        let binding = bind(&worker);
        let fd = fd();
        let spec = if door.is_some() { spec_of(&fd) } else { spec() };
        let cache = worker.register_cache(spec.clone()).wait().unwrap();
        let gone = worker.register_cache(spec.clone()).wait().unwrap();
        let forgotten = worker.register_cache(spec.clone()).wait().unwrap();
        let unwanted = worker.register_cache(spec).wait().unwrap();
        drop(gone);
        forgotten.forget().wait().unwrap();
        soon(|| played.board.heard().contains(&Heard::Forget(2)));
        let before = sessions(&played).len();
        played.kill();
        soon(|| !worker.is_connected());
        let error = cache.save(&binding, &blocks(0..1), &SaveOptions::default()).wait().unwrap_err();
        assert_eq!(error.kind(), FaultKind::Unavailable, "{error}");
        let error = cache.load(&binding, &blocks(0..1), &LoadOptions::default()).wait().unwrap_err();
        assert_eq!(error.kind(), FaultKind::Unavailable, "{error}");
        // With nobody there it is forgotten all the same.
        unwanted.forget().wait().unwrap();
        played.start_again();
        assert!(worker.wait_until_connected());
        let saved = cache.save(&binding, &blocks(0..1), &SaveOptions::default()).wait().unwrap();
        assert!(saved[0].is_ok());
        let [Heard::Session(session), Heard::Bound(bound), Heard::Register(request)] =
            &sessions(&played)[before..]
        else {
            panic!("{:?}", sessions(&played))
        };
        assert!(session == bound && *session == request.session && *session == worker.session().0);
        let header = headers(&played).pop().unwrap();
        assert_eq!((header.session, header.cache), (*session, 5));
        let error = forgotten.quiesce().wait().unwrap_err();
        assert!(error.to_string().contains("forgotten"), "{error}");
    }
}

#[test]
fn a_cache_that_is_not_taken_back_says_why_when_it_is_used() {
    let mut played = Played::start(None);
    let (worker, binding, cache) = open(&played);
    let save = || cache.save(&binding, &blocks(0..1), &SaveOptions::default()).wait();
    let restart = |played: &mut Played, fault: Fault| {
        played.kill();
        soon(|| !worker.is_connected());
        played.board.refuse(fault);
        played.start_again();
        assert!(worker.wait_until_connected(), "blocks come and go all the same");
    };
    restart(&mut played, Fault::new(Code::BadRequest, "no device GPU-0707"));
    let asked = played.board.registered().len();
    for _ in 0..2 {
        let error = save().unwrap_err();
        assert_eq!(error.kind(), FaultKind::Invalid);
        assert!(error.to_string().contains("could not be registered again: no device GPU-0707"), "{error}");
    }
    assert_eq!(played.board.registered().len(), asked, "it would say the same again");
    // What passes is asked again.
    restart(&mut played, Fault::new(Code::TierDegraded, "the GPU is lost"));
    played.board.refuse(Fault::new(Code::TierDegraded, "the GPU is still lost"));
    let error = save().unwrap_err();
    assert!(error.to_string().contains("still lost"), "{error}");
    assert!(save().unwrap()[0].is_ok());
}

#[test]
fn descriptors_are_handed_over_once_and_taken_back_when_the_cache_is_known() {
    let mut played = Played::with_door();
    let worker = played.worker();
    let fd = fd();
    let cache = worker.register_cache(spec_of(&fd)).wait().unwrap();
    let named = |request: &v1::RegisterCacheRequest| {
        let numbers = request.tensors.iter().flat_map(|tensor| &tensor.pieces);
        let number = |piece: &v1::DeviceHandle| match &piece.handle {
            Some(v1::device_handle::Handle::Descriptor(number)) => (*number, piece.bytes),
            other => panic!("{other:?}"),
        };
        numbers.map(number).collect::<Vec<_>>()
    };
    let request = played.board.registered().pop().unwrap();
    let (number, bytes) = named(&request)[0];
    assert_eq!((named(&request), bytes), (vec![(number, 8192); 2], 8192));
    assert_eq!(request.tensors.iter().map(|tensor| tensor.offset).collect::<Vec<_>>(), [0, 4096]);
    soon(|| played.board.heard().contains(&Heard::Withdraw(number)));
    assert!(played.board.handed().is_empty());
    let offers = |played: &Played| {
        played.board.heard().iter().filter(|heard| matches!(heard, Heard::Offer(_))).count()
    };
    soon(|| offers(&played) == 1);
    // The worker keeps its own, for the daemon's next life.
    drop(fd);
    played.start_again();
    soon(|| worker.epoch().0 == 2);
    soon(|| offers(&played) == 2);
    soon(|| played.board.handed().is_empty());
    cache.quiesce().wait().unwrap();
    // A refusal takes them back too.
    played.board.refuse(Fault::new(Code::BadRequest, "no"));
    worker.register_cache(spec_of(&self::fd())).wait().unwrap_err();
    soon(|| offers(&played) == 3);
    soon(|| played.board.handed().is_empty());
}

#[test]
fn descriptors_need_a_worker_socket_that_knows_them() {
    let refused = |played: &Played| -> Error {
        let worker = played.worker();
        worker.register_cache(spec()).wait().unwrap();
        worker.register_cache(spec_of(&fd())).wait().unwrap_err()
    };
    let none = refused(&Played::start(None));
    assert!(none.kind() == FaultKind::Unsupported && none.to_string().contains("worker socket"), "{none}");
    let old = refused(&Played::start(Some(2)));
    assert!(old.kind() == FaultKind::Unsupported && old.to_string().contains("upgrade"), "{old}");
}
