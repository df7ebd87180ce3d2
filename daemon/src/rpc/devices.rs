//! Blocks to and from device memory: a worker names pages, and the daemon copies.
//!
//! ```text
//!   Save  header -> check all pages -> a put for each block, whose bytes are in pages -> shards -> the device's thread
//!         ready  -> more layers may be copied                                        '--> answers, one for each block
//!   Load  header -> check all pages -> hold each block (from whichever tier) -> the device's thread
//!         <- found or missed, when the device has it in its queue  <- layers <- done
//! ```
//! A call that ends before the device is done leaves nothing behind but the copies under way, which own their memory.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_api::{convert, v1};
use kv_block::code::Code;
use kv_block::layout::PageIndex;
use kv_block::{BindingTag, BlockKey, Fault, SessionId, Tier};
use kv_gpu::{Event, EventHandle, Place, Uuid};
use kv_node::{Op, Reach, Reply, Step};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::blocks::{futures_join, keep};
use super::{Shared, deadline, status, too_late, wait_until, who};
use crate::gpu::cache::{Cache, Paged};
use crate::gpu::engine::{LoadNews, LoadOrder, Order, Resident, Save};
use crate::gpu::{Gpus, Registration, Shared as SharedMemory};
use crate::node::{View, unexpected};
use crate::peercred::Who;
use crate::registry::Bound;
use crate::shard::PagedBody;

/// How much longer than its deadline a call waits for the device to be done with what it has begun.
const SETTLE: Duration = Duration::from_secs(10);

/// The `Devices` service.
pub struct DevicesService(pub Shared);

/// A block of a call: its name, and its pages, checked.
struct Block {
    key: BlockKey,
    pages: Arc<[PageIndex]>,
}

/// What a Save and a Load have in common.
struct Call<'a> {
    session: SessionId,
    view: View<'a>,
    bound: Arc<Bound>,
    paged: Paged,
    blocks: Vec<Block>,
}

fn bad(text: impl Into<String>) -> Status {
    status(Fault::new(Code::BadRequest, text.into()))
}

impl DevicesService {
    fn gpus(&self) -> &Gpus {
        &self.0.gpus
    }

    /// The session of a call: what is registered and copied belongs to one.
    fn session(&self, who: Who, number: u64) -> Result<(SessionId, View<'_>), Status> {
        if number == 0 {
            let text = "field `session` is missing; open one with Worker.Open, or on the worker socket";
            return Err(status(Fault::new(Code::UnknownSession, text)));
        }
        let session = SessionId(number);
        let principal = self.0.node.sessions.check(session, who.caller).map_err(status)?;
        Ok((session, self.0.node.of(principal)))
    }

    fn cache(&self, who: Who, session: u64, cache: u32) -> Result<Arc<Cache>, Status> {
        let (session, _) = self.session(who, session)?;
        self.gpus().cache(session, cache).map_err(status)
    }

    fn call(
        &self,
        who: Who,
        (session, cache, binding): (u64, u32, u32),
        blocks: Vec<v1::PagedBlock>,
    ) -> Result<Call<'_>, Status> {
        let (session, view) = self.session(who, session)?;
        let cache = self.gpus().cache(session, cache).map_err(status)?;
        let bound = self.0.node.binding(binding).map_err(status)?;
        let most = self.0.config.limits.keys_per_request_max as usize;
        if blocks.len() > most {
            let text = format!(
                "{} blocks in one call, {most} are allowed (limits.keys_per_request_max)",
                blocks.len()
            );
            return Err(status(Fault::new(Code::BatchTooLarge, text)));
        }
        let paged = Paged::of(cache, &bound).map_err(status)?;
        let block = |(at, block): (usize, v1::PagedBlock)| {
            let about =
                |fault: Fault| status(Fault::new(fault.code, format!("block {at}: {}", fault.message)));
            let hash = convert::sequence_hash(&block.sequence_hash).map_err(about)?;
            let key = bound.key(&hash).ok_or_else(|| {
                let text = format!("binding {binding} has no scope yet; register it");
                status(Fault::new(Code::UnknownBinding, text))
            })?;
            let pages: Arc<[PageIndex]> = block.pages.into_iter().map(PageIndex).collect();
            paged.check(&pages).map_err(about)?;
            Ok(Block { key, pages })
        };
        let blocks = blocks.into_iter().enumerate().map(block).collect::<Result<Vec<_>, Status>>()?;
        Ok(Call { session, view, bound, paged, blocks })
    }

    /// Where a device's pool has a block of which the catalog says that it can be read.
    fn in_pool(&self, call: &Call<'_>, key: &BlockKey) -> Option<Place> {
        if !self.gpus().has_pool() {
            return None;
        }
        let checksum = call.view.known_sum(call.session, key)?;
        self.gpus().resident(&call.paged.cache, key, call.bound.kept.block_bytes, checksum)
    }

    /// Puts one block whose bytes are in pages.
    async fn put(&self, call: &Call<'_>, block: &Block, save: &Arc<Save>, how: &How) -> Result<bool, Fault> {
        let op = Op::Put {
            key: block.key,
            binding: call.bound.id,
            source: 0,
            bytes: call.bound.kept.block_bytes,
            keep: how.keep,
            durable: how.durable,
            after: how.after,
        };
        let body =
            PagedBody { gpus: self.gpus().clone(), save: Arc::clone(save), pages: Arc::clone(&block.pages) };
        let shard = call.view.owner(&block.key, save.until).await?;
        match self.0.node.ask(shard, call.session, save.until, op, crate::shard::Body::Pages(body)).await? {
            Reply::Stored { already } => Ok(already),
            other => Err(unexpected(&other)),
        }
    }
}

/// How the blocks of a Save are kept.
#[derive(Clone, Copy)]
struct How {
    keep: kv_node::Keep,
    durable: bool,
    after: Option<BlockKey>,
}

/// The call is over when this goes, however it goes: nothing of it is begun any more.
struct Open<'a> {
    gpus: &'a Gpus,
    save: Arc<Save>,
}

impl Open<'_> {
    fn ready(&self, layers: u32, event: Option<Arc<Event>>) -> Result<(), Fault> {
        self.save.ready(layers, event)?;
        self.tell();
        Ok(())
    }

    fn tell(&self) {
        self.gpus.order(self.save.paged.cache.engine, Order::Ready(Arc::clone(&self.save)));
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.save.end();
        self.tell();
    }
}

/// Waits until the device is done with something, the deadline at most.
async fn until_quiet(until: Instant, quiet: oneshot::Receiver<()>) -> Result<(), Status> {
    match tokio::time::timeout_at(until.into(), quiet).await {
        // The thread is gone, and what it had under way with it.
        Ok(_) => Ok(()),
        Err(_) => Err(too_late("waiting for the device to be done with the cache")),
    }
}

#[tonic::async_trait]
impl v1::devices_server::Devices for DevicesService {
    async fn register_cache(
        &self,
        request: Request<v1::RegisterCacheRequest>,
    ) -> Result<Response<v1::RegisterCacheResponse>, Status> {
        self.0.node.accepting().map_err(status)?;
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let (session, _) = self.session(who, request.session)?;
        let device = Uuid(bytes(&request.device, "device")?);
        let layout = convert::cache_layout(request.layout).map_err(status)?;
        let event = |handle: &bytes::Bytes| Ok::<_, Status>(EventHandle(bytes(handle, "events")?));
        let events = request.events.iter().map(event).collect::<Result<_, _>>()?;
        let tensors = request.tensors.into_iter().enumerate();
        let tensors = tensors
            .map(|(at, tensor)| {
                self.shared(session, device, tensor).map_err(|fault| {
                    status(Fault::new(fault.code, format!("tensor {at}: {}", fault.message)))
                })
            })
            .collect::<Result<_, _>>()?;
        let registration = Registration { session, device, tensors, layout, events };
        let (gpus, node) = (self.gpus().clone(), Arc::clone(&self.0.node));
        let is_open = move || node.sessions.is_open(session);
        let opened = tokio::task::spawn_blocking(move || gpus.register(registration, is_open)).await;
        let cache =
            opened.map_err(|error| status(Fault::new(Code::Bug, error.to_string())))?.map_err(status)?;
        // Copies of an earlier session may still be on their way into the same pages.
        let id = cache.id;
        if let Err(late) = until_quiet(until, self.gpus().quiesce_forgotten(&cache)).await {
            drop(self.gpus().forget(cache));
            return Err(late);
        }
        Ok(Response::new(v1::RegisterCacheResponse { cache: id, epoch: self.0.node.epoch.0 }))
    }

    async fn forget_cache(
        &self,
        request: Request<v1::ForgetCacheRequest>,
    ) -> Result<Response<v1::ForgetCacheResponse>, Status> {
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let closed = self.gpus().forget(self.cache(who, request.session, request.cache)?);
        until_quiet(until, closed).await?;
        Ok(Response::new(v1::ForgetCacheResponse {}))
    }

    async fn quiesce_cache(
        &self,
        request: Request<v1::QuiesceCacheRequest>,
    ) -> Result<Response<v1::QuiesceCacheResponse>, Status> {
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let cache = self.cache(who, request.session, request.cache)?;
        until_quiet(until, self.gpus().quiesce(&cache)).await?;
        Ok(Response::new(v1::QuiesceCacheResponse {}))
    }

    async fn save(
        &self,
        request: Request<Streaming<v1::SaveRequest>>,
    ) -> Result<Response<v1::SaveResponse>, Status> {
        self.0.node.accepting().map_err(status)?;
        let (until, who) = (deadline(&request), who(&request));
        let mut messages = request.into_inner();
        let Some(v1::save_request::What::Header(header)) = next(&mut messages, until).await? else {
            return Err(bad("the first message of a Save has its header"));
        };
        let by_layer = header.by_layer;
        let call = self.call(who, (header.session, header.cache, header.binding), header.blocks)?;
        let after = match &header.after {
            none if none.is_empty() => None,
            hash => call.bound.key(&convert::sequence_hash(hash).map_err(status)?),
        };
        let keep = keep(header.priority, header.ttl_s).map_err(status)?;
        let cache = Arc::clone(&call.paged.cache);
        let event =
            |number: Option<u32>| number.map(|number| cache.event(number)).transpose().map_err(status);
        let save = Arc::new(Save::new(call.paged.clone(), BindingTag(call.bound.kept.tag), until));
        let open = Open { gpus: self.gpus(), save: Arc::clone(&save) };
        let all = u32::from(call.paged.layers());
        if !by_layer {
            open.ready(all, event(header.event)?).map_err(status)?;
        }
        let keys: Vec<BlockKey> = call.blocks.iter().map(|block| block.key).collect();
        let befores = std::iter::once(after).chain(keys.iter().copied().map(Some));
        let puts = call.blocks.iter().zip(befores).map(|(block, after)| {
            let how = How { keep, durable: header.durable, after };
            let (this, call, save) = (&self, &call, &save);
            async move { this.put(call, block, save, &how).await }
        });
        let mut puts = std::pin::pin!(futures_join(puts));
        let mut ready = if by_layer { 0 } else { all };
        let saved = loop {
            tokio::select! {
                saved = &mut puts => break saved,
                message = next(&mut messages, until), if ready < all => match message? {
                    Some(v1::save_request::What::Ready(more)) => {
                        open.ready(more.layers, event(more.event)?).map_err(status)?;
                        ready = more.layers;
                    }
                    Some(v1::save_request::What::Header(_)) => {
                        return Err(bad("a Save has one header"));
                    }
                    None => {
                        let text = format!("the Save ended when {ready} of {all} layers were ready");
                        return Err(bad(text));
                    }
                },
            }
        };
        let saved = saved.into_iter().map(|saved| {
            let what = match saved {
                Ok(already) => v1::saved::What::Already(already),
                Err(fault) => v1::saved::What::Fault(kv_api::fault::message(&fault)),
            };
            v1::Saved { what: Some(what) }
        });
        Ok(Response::new(v1::SaveResponse { saved: saved.collect() }))
    }

    type LoadStream = ReceiverStream<Result<v1::LoadResponse, Status>>;

    async fn load(&self, request: Request<v1::LoadRequest>) -> Result<Response<Self::LoadStream>, Status> {
        self.0.node.accepting().map_err(status)?;
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let call = self.call(who, (request.session, request.cache, request.binding), request.blocks)?;
        let cache = &call.paged.cache;
        let events = request.events.iter().map(|number| cache.event(*number).map_err(status));
        let events = events.collect::<Result<Vec<_>, _>>()?;
        let after = request.event.map(|number| cache.event(number)).transpose().map_err(status)?;
        let wanted = if request.by_layer { usize::from(call.paged.layers()) } else { 1 };
        if !events.is_empty() && events.len() != wanted {
            return Err(bad(format!("{} events are named, {wanted} would be recorded", events.len())));
        }
        let mut pages: Vec<&PageIndex> = call.blocks.iter().flat_map(|block| block.pages.iter()).collect();
        pages.sort_unstable();
        if let Some(twice) = pages.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(bad(format!("page {} is given for two blocks", twice[0].0)));
        }
        let hint = self.0.hint(&request.node)?;
        let (waited, wait) = wait_until(until, request.wait_ms);
        let keys: Vec<BlockKey> = call.blocks.iter().map(|block| block.key).collect();
        let how = (wait, Reach::Further { hint });
        let reads = Step::along(&keys).map(|step| {
            let call = &call;
            async move {
                if let Some(place) = self.in_pool(call, &step.key) {
                    return Ok(Ok((Resident::Pool(place), Tier::Device)));
                }
                let read = call.view.read(call.session, step, how, waited).await?;
                Ok(read.map(|(held, tier)| (Resident::Host(held), tier)))
            }
        });
        let mut blocks = Vec::new();
        let mut loaded = Vec::new();
        for (found, block) in futures_join(reads).await.into_iter().zip(&call.blocks) {
            let found: Result<_, Fault> = found;
            let what = match found.map_err(status)? {
                Ok((from, tier)) => {
                    blocks.push((from, Arc::clone(&block.pages)));
                    v1::loaded::What::Tier(convert::tier_message(tier).into())
                }
                Err(reason) => v1::loaded::What::Miss(convert::miss_message(reason, Vec::new())),
            };
            loaded.push(v1::Loaded { what: Some(what) });
        }
        let (news, heard) = mpsc::unbounded_channel();
        let order = LoadOrder {
            paged: call.paged.clone(),
            blocks,
            by_layer: request.by_layer,
            events,
            until,
            after,
            news,
        };
        self.gpus().order(cache.engine, Order::Load(order));
        // Room for all that can come: the queued copies, the layers and the end.
        let (sender, receiver) = mpsc::channel(usize::from(call.paged.layers()) + 3);
        tokio::spawn(tell(heard, loaded, sender, until + SETTLE));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl DevicesService {
    /// What a worker shares of its memory, in the words of the driver.
    fn shared(
        &self,
        session: SessionId,
        device: Uuid,
        memory: v1::DeviceMemory,
    ) -> Result<SharedMemory, Fault> {
        use v1::device_handle::Handle;
        let wrong = |text: &str| Fault::new(Code::BadRequest, text.to_owned());
        let v1::DeviceMemory { pieces, offset, bytes } = memory;
        if let [v1::DeviceHandle { handle: Some(Handle::CudaIpc(handle)), .. }] = &pieces[..] {
            let handle = handle[..].try_into().map_err(|_| wrong("field `cuda_ipc` is not 64 bytes long"))?;
            return Ok(SharedMemory::Ipc(kv_gpu::MemoryHandle { device, handle, offset, bytes }));
        }
        let piece = |v1::DeviceHandle { handle, bytes }: v1::DeviceHandle| match handle {
            Some(Handle::Descriptor(number)) => {
                let handed = self.0.node.sessions.descriptor(session, number).ok_or_else(|| {
                    let text = format!("no descriptor {number} was handed over on the worker socket");
                    Fault::new(Code::BadHandle, text)
                })?;
                let fd = handed.as_fd().try_clone_to_owned().map_err(|error| {
                    Fault::new(Code::BadHandle, format!("duplicating descriptor {number}: {error}"))
                })?;
                Ok(kv_gpu::SharedPiece::Descriptor { fd, bytes })
            }
            Some(Handle::CudaFabric(handle)) => {
                let handle = handle[..].try_into();
                let handle = handle.map_err(|_| wrong("field `cuda_fabric` is not 64 bytes long"))?;
                Ok(kv_gpu::SharedPiece::Fabric { handle, bytes })
            }
            Some(Handle::CudaIpc(_)) => {
                Err(wrong("memory of `cuda_ipc` is one allocation, and has no other pieces"))
            }
            None => Err(wrong("a piece has no handle")),
        };
        let pieces: Vec<_> = pieces.into_iter().map(piece).collect::<Result<_, _>>()?;
        if pieces.is_empty() {
            return Err(wrong("field `pieces` is empty"));
        }
        Ok(SharedMemory::Pieces { pieces, offset, bytes })
    }
}

/// The next message of a Save, by its deadline.
async fn next(
    messages: &mut Streaming<v1::SaveRequest>,
    until: Instant,
) -> Result<Option<v1::save_request::What>, Status> {
    let next = tokio::time::timeout_at(until.into(), messages.message()).await;
    let next = next.unwrap_or_else(|_| Err(too_late("saying which layers are ready")))?;
    match next {
        None => Ok(None),
        Some(v1::SaveRequest { what: Some(what) }) => Ok(Some(what)),
        Some(v1::SaveRequest { what: None }) => Err(bad("a message of a Save says nothing")),
    }
}

/// Tells a caller how its load gets on, until it is over; `last` is when even a device that does not answer is not
/// waited for any more.
async fn tell(
    mut heard: mpsc::UnboundedReceiver<LoadNews>,
    loaded: Vec<v1::Loaded>,
    sender: mpsc::Sender<Result<v1::LoadResponse, Status>>,
    last: Instant,
) {
    let mut loaded = Some(loaded);
    let say = |what| Ok(v1::LoadResponse { what: Some(what) });
    loop {
        let news = match tokio::time::timeout_at(last.into(), heard.recv()).await {
            Ok(Some(news)) => news,
            Ok(None) => LoadNews::Ended(Err(Fault::new(Code::Draining, "the daemon ends"))),
            Err(_) => {
                let text = "the device has not ended the copies it began; the cache's pages stay fenced until \
                            QuiesceCache answers";
                LoadNews::Ended(Err(Fault::new(Code::GpuError, text)))
            }
        };
        let queued = matches!(news, LoadNews::Queued | LoadNews::Ended(Ok(())));
        if queued && let Some(loaded) = loaded.take() {
            let _ = sender.try_send(say(v1::load_response::What::Queued(v1::LoadQueued { loaded })));
        }
        let last_word = match news {
            LoadNews::Queued => continue,
            LoadNews::Layers(layers) => {
                let _ = sender.try_send(say(v1::load_response::What::Layers(layers.into())));
                continue;
            }
            LoadNews::Ended(Ok(())) => say(v1::load_response::What::Done(v1::LoadDone {})),
            LoadNews::Ended(Err(fault)) => Err(status(fault)),
        };
        let _ = sender.try_send(last_word);
        return;
    }
}

/// A field that is so many bytes long.
fn bytes<const N: usize>(field: &[u8], name: &str) -> Result<[u8; N], Status> {
    let wrong = |_| bad(format!("field `{name}` has {} bytes, {N} are wanted", field.len()));
    field.try_into().map_err(wrong)
}
