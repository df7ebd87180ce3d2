//! Blocks over gRPC: the complete and canonical door. Bytes are copied; workers on shared memory do better.

use std::ops::Range;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use kv_api::{convert, v1};
use kv_arena::Held;
use kv_block::code::Code;
use kv_block::{BlockKey, Fault, LeaseId, MissReason, SessionId, ShardId, Tier};
use kv_node::{BlockReport, BlockState, Found, Keep, Micros, Op, Reach, Reply, Step};
use kv_wire::message::Sight;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Shared, deadline, objects, status, too_late, wait_until, who};
use crate::node::{Node, View, unexpected};
use crate::peercred::Who;

/// Longest piece of a block in one message, however much a message may hold.
const CHUNK_BYTES_MAX: usize = 64 << 10;
/// Of a message, what is not bytes of a block.
const MESSAGE_BYTES_OTHER: usize = 1024;

/// The `Blocks` service.
pub struct BlocksService(pub Shared);

impl BlocksService {
    fn node(&self) -> &Node {
        &self.0.node
    }

    fn names(&self, names: Option<&v1::Names>) -> Result<convert::Names, Fault> {
        convert::names(names, self.0.config.limits.keys_per_request_max as usize)
    }

    fn keys(&self, names: Option<&v1::Names>) -> Result<Vec<BlockKey>, Status> {
        self.names(names).and_then(|names| self.node().keys(&names)).map_err(status)
    }

    /// How far the search for a block goes; `node` is the one to ask first.
    fn reach(&self, node: &str) -> Result<Reach, Status> {
        Ok(Reach::Further { hint: self.0.hint(node)? })
    }

    fn one_key(&self, names: Option<&v1::Names>) -> Result<BlockKey, Status> {
        match self.keys(names)?[..] {
            [key] => Ok(key),
            ref keys => {
                let text = format!("exactly one block is wanted here, {} are named", keys.len());
                Err(status(Fault::new(Code::BadRequest, text)))
            }
        }
    }

    /// For whoever stores and reads: the caller's session, or the guest's when it has none, and its shards.
    fn session(&self, who: Who, number: u64) -> Result<(SessionId, View<'_>), Status> {
        let (session, principal) = match SessionId(number) {
            SessionId(0) => (self.node().guest, who.principal),
            session => (session, self.node().sessions.check(session, who.caller).map_err(status)?),
        };
        Ok((session, self.node().of(principal)))
    }

    /// A session that can own something: leases and announcements end with it.
    fn own_session(&self, who: Who, number: u64) -> Result<(SessionId, View<'_>), Status> {
        if number == 0 {
            let text = "field `session` is missing; open one with Worker.Open";
            return Err(status(Fault::new(Code::UnknownSession, text)));
        }
        self.session(who, number)
    }

    /// What a question goes to that moves no bytes: without a session, an administrator means everything.
    fn view(&self, who: Who, session: u64) -> Result<View<'_>, Status> {
        if session == 0 {
            return Ok(self.0.view(who));
        }
        Ok(self.session(who, session)?.1)
    }

    /// The principals whose object tiers the same question goes to.
    fn principals(&self, who: Who, session: u64) -> Result<Range<usize>, Status> {
        let one = match session {
            0 if who.rights.admin => return Ok(0..self.node().principals.len()),
            0 => who.principal,
            session => self.node().sessions.check(SessionId(session), who.caller).map_err(status)?,
        };
        Ok(one..one + 1)
    }

    /// Why a block is missing, with the scope fields that differ when that is why.
    async fn miss(
        &self,
        view: View<'_>,
        names: &convert::Names,
        at: usize,
        reason: MissReason,
        until: Instant,
    ) -> v1::Miss {
        if let (MissReason::NeverStored, convert::Names::Hashes { binding, hashes }) = (reason, names)
            && let Some(hash) = hashes.get(at)
        {
            let mut fields = view.scope_difference(*binding, hash, until).await.ok().flatten();
            if fields.is_none()
                && let Some(objects) = &self.0.objects
                && let (Some(principal), Ok(asked)) =
                    (objects.of(view.principal()), self.node().binding(*binding))
            {
                fields = principal.scope_difference(&asked, hash);
            }
            if let Some(fields) = fields {
                return convert::miss_message(MissReason::ScopeDiffers, fields);
            }
        }
        convert::miss_message(reason, Vec::new())
    }
}

/// Takes `ttl_s` from now; 0 stays 0.
pub(super) fn keep(priority: i32, ttl_s: u32) -> Result<Keep, Fault> {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as u32);
    let expires_at = if ttl_s == 0 { 0 } else { unix.saturating_add(ttl_s) };
    Ok(Keep { priority: convert::priority(priority)?, expires_at })
}

/// A block of the catalog as a message.
pub(super) fn block_info(node: &Node, shard: ShardId, report: &BlockReport) -> v1::BlockInfo {
    let bound = node.registry.get(report.binding.0.into());
    let scope = bound.as_ref().map(|bound| &bound.kept.scope);
    let pinned_until = report.pinned_until.map_or(0, |until| {
        let left = until.0.saturating_sub(node.started.elapsed().as_micros() as u64);
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        unix + left / 1_000_000
    });
    let state = match report.state {
        BlockState::Present => "present".to_owned(),
        BlockState::Pending => "pending".to_owned(),
        BlockState::Gone(MissReason::Corrupt) => "quarantined".to_owned(),
        BlockState::Gone(reason) => format!("gone: {reason}"),
    };
    v1::BlockInfo {
        key: Bytes::copy_from_slice(report.key.as_bytes()),
        shard: shard.0.into(),
        tiers: report.tiers.iter().map(|tier| convert::tier_message(*tier).into()).collect(),
        bytes: report.bytes,
        checksum: report.checksum.0,
        priority: convert::priority_message(report.priority).into(),
        expires_at: report.expires_at.into(),
        leases: report.leases,
        pinned_until,
        frequency: report.frequency.into(),
        tenant: scope.map_or_else(String::new, |scope| scope.tenant.clone()),
        model: scope.map_or_else(String::new, |scope| scope.model.clone()),
        disk_location: report
            .disk
            .map_or_else(String::new, |at| format!("segment {} page {}", at.segment(), at.page())),
        slot: report.host.map_or(0, |(slot, _)| slot.0),
        generation: report.host.map_or(0, |(_, generation)| generation.0),
        state,
        principal: node.principal_of(shard).to_owned(),
    }
}

#[tonic::async_trait]
impl v1::blocks_server::Blocks for BlocksService {
    async fn lookup(
        &self,
        request: Request<v1::LookupRequest>,
    ) -> Result<Response<v1::LookupResponse>, Status> {
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let view = self.view(who, request.session)?;
        let names = self.names(request.names.as_ref()).map_err(status)?;
        let keys = self.node().keys(&names).map_err(status)?;
        // Behind the first block that is not here may be others that are, and the peers fill the gap.
        let all = request.all || request.peers;
        let mut answers = view.lookup(&keys, all, until).await.map_err(status)?;
        let mut nodes = Vec::new();
        if request.peers && answers.iter().any(|found| matches!(found, Found::Miss(_))) {
            let hint = self.0.hint(&request.node)?;
            let further = self.0.look_further(who.principal, &keys, hint, &mut answers, until).await;
            nodes = further.map_err(status)?;
            let first = answers.iter().position(|found| matches!(found, Found::Miss(_)));
            if let Some(first) = first.filter(|_| !request.all) {
                answers.truncate(first + 1);
            }
        }
        let prefix = answers.iter().take_while(|found| matches!(found, Found::In(_))).count() as u32;
        let mut found = Vec::with_capacity(answers.len());
        let mut explained = false;
        for (at, answer) in answers.into_iter().enumerate() {
            let what = match answer {
                Found::In(tier) => v1::found::What::Tier(convert::tier_message(tier).into()),
                // Only the first one is worth a comparison of scopes: the rest follows from it.
                Found::Miss(reason) if !explained => {
                    explained = true;
                    v1::found::What::Miss(self.miss(view, &names, at, reason, until).await)
                }
                Found::Miss(reason) => v1::found::What::Miss(convert::miss_message(reason, Vec::new())),
            };
            let node = nodes.get_mut(at).map(std::mem::take).unwrap_or_default();
            found.push(v1::Found { what: Some(what), node });
        }
        Ok(Response::new(v1::LookupResponse { found, prefix }))
    }

    async fn acquire(
        &self,
        request: Request<v1::AcquireRequest>,
    ) -> Result<Response<v1::AcquireResponse>, Status> {
        self.node().accepting().map_err(status)?;
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let (session, view) = self.own_session(who, request.session)?;
        let names = self.names(request.names.as_ref()).map_err(status)?;
        let keys = self.node().keys(&names).map_err(status)?;
        let (until, wait) = wait_until(until, request.wait_ms);
        // All at once, so that waits overlap.
        let reach = self.reach(&request.node)?;
        let asked = Step::along(&keys).map(|step| view.acquire(session, step, (wait, reach), until));
        let answers = futures_join(asked).await;
        if let Some(fault) = answers.iter().find_map(|answer| answer.as_ref().err()) {
            // The caller hears of no lease, so none may stay.
            for (shard, grant) in answers.iter().flatten() {
                if let (Some(shard), Ok(grant)) = (self.node().shard(*shard), grant) {
                    shard.give_back(session, grant.lease);
                }
            }
            return Err(status(fault.clone()));
        }
        let mut acquired = Vec::with_capacity(keys.len());
        for (at, answer) in answers.into_iter().enumerate() {
            let (shard, grant) = answer.map_err(status)?;
            let what = match grant {
                Ok(grant) => v1::acquired::What::Lease(v1::Lease {
                    lease: grant.lease.0,
                    shard: shard.0.into(),
                    slot: grant.slot.0,
                    generation: grant.generation.0,
                    offset: grant.offset,
                    bytes: grant.bytes,
                    checksum: grant.checksum.0,
                }),
                Err(reason) => v1::acquired::What::Miss(self.miss(view, &names, at, reason, until).await),
            };
            acquired.push(v1::Acquired { what: Some(what) });
        }
        Ok(Response::new(v1::AcquireResponse { acquired }))
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let (session, view) = self.own_session(who, request.session)?;
        let leases: Vec<_> = request.leases.into_iter().map(LeaseId).collect();
        let op = || Op::Release { leases: leases.clone() };
        let (released, _, _) = view.count(session, until, op).await.map_err(status)?;
        Ok(Response::new(v1::ReleaseResponse { released: released as u32 }))
    }

    type GetStream = ReceiverStream<Result<v1::GetResponse, Status>>;

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let (session, view) = self.session(who, request.session)?;
        let names = self.names(request.names.as_ref()).map_err(status)?;
        let key = self.one_key(request.names.as_ref())?;
        let (waited, wait) = wait_until(until, request.wait_ms);
        let (sender, receiver) = tokio::sync::mpsc::channel(3);
        let reach = self.reach(&request.node)?;
        match view.read(session, Step { key, after: None }, (wait, reach), waited).await.map_err(status)? {
            Ok((held, tier)) => {
                let chunk_bytes = self.0.config.limits.message_bytes_max.0 as usize - MESSAGE_BYTES_OTHER;
                let chunk_bytes = chunk_bytes.min(CHUNK_BYTES_MAX);
                // Kept for the last word: a reader that does not read leaves no room for it later.
                let word = sender.clone().try_reserve_owned().map_err(|_| too_late("reading the block"))?;
                let in_one_piece = held.len() <= chunk_bytes;
                let sent = send_block(sender, key, held, tier, chunk_bytes);
                let sent = async move {
                    if tokio::time::timeout_at(until.into(), sent).await.is_err() {
                        word.send(Err(too_late("reading the block")));
                    }
                };
                if in_one_piece {
                    // There is room for its two messages: this waits for nobody, and lets go of the slot at once.
                    sent.await;
                } else {
                    tokio::spawn(sent);
                }
            }
            Err(reason) => {
                let miss = self.miss(view, &names, 0, reason, until).await;
                let what = Some(v1::get_response::What::Miss(miss));
                let _ = sender.send(Ok(v1::GetResponse { what })).await;
            }
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn put(
        &self,
        request: Request<Streaming<v1::PutRequest>>,
    ) -> Result<Response<v1::PutResponse>, Status> {
        self.node().accepting().map_err(status)?;
        let (until, who) = (deadline(&request), who(&request));
        let mut messages = request.into_inner();
        let bad = |text: String| status(Fault::new(Code::BadRequest, text));
        let first = next_piece(&mut messages, until).await?;
        let first = first.ok_or_else(|| bad("a put has at least one message".into()))?;
        let header = first.header.ok_or_else(|| bad("the first message of a put has no `header`".into()))?;
        let (session, view) = self.session(who, header.session)?;
        let bound = self.node().binding(header.binding).map_err(status)?;
        let hash = convert::sequence_hash(&header.sequence_hash).map_err(status)?;
        let key = bound.key(&hash).ok_or_else(|| {
            status(Fault::new(
                Code::UnknownBinding,
                format!("binding {} has no scope yet; register it", header.binding),
            ))
        })?;
        let after = match &header.after {
            none if none.is_empty() => None,
            hash => bound.key(&convert::sequence_hash(hash).map_err(status)?),
        };
        let keep = keep(header.priority, header.ttl_s).map_err(status)?;

        let bytes = bound.kept.block_bytes;
        let too_long = |found: usize| {
            let text =
                format!("{found} bytes and more offered, blocks of binding {} have {bytes}", header.binding);
            status(Fault::new(Code::WrongLength, text))
        };
        let _room = self.0.room_for(bytes, until).await?;
        let mut body = BytesMut::with_capacity(bytes as usize);
        let mut chunk = Some(first.chunk);
        while let Some(piece) = chunk {
            if body.len() + piece.len() > bytes as usize {
                return Err(too_long(body.len() + piece.len()));
            }
            body.extend_from_slice(&piece);
            chunk = next_piece(&mut messages, until).await?.map(|message| message.chunk);
        }
        let op = Op::Put {
            key,
            binding: bound.id,
            source: 0,
            bytes: body.len() as u32,
            keep,
            durable: header.durable,
            after,
        };
        let node = self.node();
        let shard = view.owner(&key, until).await.map_err(status)?;
        match node.ask(shard, session, until, op, body.freeze()).await.map_err(status)? {
            Reply::Stored { already } => {
                Ok(Response::new(v1::PutResponse { already, key: Bytes::copy_from_slice(key.as_bytes()) }))
            }
            other => Err(status(unexpected(&other))),
        }
    }

    async fn reserve(
        &self,
        request: Request<v1::ReserveRequest>,
    ) -> Result<Response<v1::ReserveResponse>, Status> {
        self.node().accepting().map_err(status)?;
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let (session, view) = self.own_session(who, request.session)?;
        let names = self.names(request.names.as_ref()).map_err(status)?;
        let convert::Names::Hashes { binding, .. } = &names else {
            let text = "an announcement names its blocks by binding and sequence hash";
            return Err(status(Fault::new(Code::BadRequest, text)));
        };
        let binding = self.node().binding(*binding).map_err(status)?.id;
        let keep = keep(request.priority, request.ttl_s).map_err(status)?;
        let (mut reserved, mut announced) = (Vec::new(), Vec::new());
        for Step { key, after } in Step::along(&self.node().keys(&names).map_err(status)?) {
            let asked = async {
                let op = Op::Reserve { key, binding, keep, in_place: false, after };
                let shard = view.owner(&key, until).await?;
                match self.node().ask(shard, session, until, op, Bytes::new()).await? {
                    Reply::Reserved { .. } => Ok(Some(shard)),
                    Reply::AlreadyThere => Ok(None),
                    other => Err(unexpected(&other)),
                }
            };
            match asked.await {
                Ok(shard) => {
                    reserved.push(shard.is_some());
                    announced.extend(shard.map(|shard| (shard, key)));
                }
                Err(fault) => {
                    // The caller hears of no announcement, so none may stay.
                    for (shard, key) in announced {
                        shard.withdraw(session, key);
                    }
                    return Err(status(fault));
                }
            }
        }
        Ok(Response::new(v1::ReserveResponse { reserved }))
    }

    async fn abort(&self, request: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let (session, view) = self.own_session(who, request.session)?;
        let mut aborted = 0;
        for key in self.keys(request.names.as_ref())? {
            let shard = view.owner(&key, until).await.map_err(status)?;
            match self.node().ask(shard, session, until, Op::Abort { key }, Bytes::new()).await {
                Ok(_) => aborted += 1,
                Err(fault) if fault.code == Code::NotReserved => {}
                Err(fault) => return Err(status(fault)),
            }
        }
        Ok(Response::new(v1::AbortResponse { aborted }))
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Result<Response<v1::PinResponse>, Status> {
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        if request.ttl_s == 0 {
            let text = "field `ttl_s` is 0: every pin has an end";
            return Err(status(Fault::new(Code::BadRequest, text)));
        }
        let (session, _) = self.session(who, request.session)?;
        let view = self.view(who, request.session)?;
        let keys = self.keys(request.names.as_ref())?;
        let pin_until = self.node().started.elapsed() + Duration::from_secs(request.ttl_s.into());
        let op = || Op::Pin { keys: keys.clone(), until: Micros(pin_until.as_micros() as u64) };
        let (pinned, _, absent) = view.count(session, until, op).await.map_err(status)?;
        Ok(Response::new(v1::PinResponse { pinned: pinned as u32, absent: absent as u32 }))
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Result<Response<v1::UnpinResponse>, Status> {
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let view = self.view(who, request.session)?;
        let keys = self.keys(request.names.as_ref())?;
        let op = || Op::Unpin { keys: keys.clone() };
        let (unpinned, _, _) = view.count(SessionId(0), until, op).await.map_err(status)?;
        Ok(Response::new(v1::UnpinResponse { unpinned: unpinned as u32 }))
    }

    async fn prefetch(
        &self,
        request: Request<v1::PrefetchRequest>,
    ) -> Result<Response<v1::PrefetchResponse>, Status> {
        self.node().accepting().map_err(status)?;
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let view = self.view(who, request.session)?;
        let keys = self.keys(request.names.as_ref())?;
        let reach = self.reach(&request.node)?;
        let asked = view.prefetch(self.node().guest, &keys, reach, until).await;
        let (started, resident) = asked.map_err(status)?;
        Ok(Response::new(v1::PrefetchResponse { started: started as u32, resident: resident as u32 }))
    }

    async fn evict(&self, request: Request<v1::EvictRequest>) -> Result<Response<v1::EvictResponse>, Status> {
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let view = self.view(who, request.session)?;
        let keys = self.keys(request.names.as_ref())?;
        let tier = convert::tier(request.tier).map_err(status)?;
        if tier == Some(Tier::Object) {
            return Err(objects::refuse_to_remove());
        }
        if tier == Some(Tier::Device) {
            // What somebody may not see he may not have removed either.
            let seen = keys.iter().zip(view.sights(&keys)).filter(|(_, (sight, _))| *sight != Sight::Absent);
            let had = seen.filter(|(key, _)| self.0.gpus.evict(key, request.dry_run));
            let evicted = had.count() as u32;
            let absent = keys.len() as u32 - evicted;
            return Ok(Response::new(v1::EvictResponse { evicted, in_use: 0, absent }));
        }
        let op = || Op::Evict { keys: keys.clone(), tier, dry_run: request.dry_run };
        let (evicted, in_use, absent) = view.count(SessionId(0), until, op).await.map_err(status)?;
        let number = |count: u64| count as u32;
        Ok(Response::new(v1::EvictResponse {
            evicted: number(evicted),
            in_use: number(in_use),
            absent: number(absent),
        }))
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        let (until, who) = (deadline(&request), who(&request));
        let request = request.into_inner();
        let view = self.view(who, request.session)?;
        let names = self.names(request.names.as_ref()).map_err(status)?;
        let key = self.one_key(request.names.as_ref())?;
        let known = view.inspect(&key, until).await.map_err(status)?;
        let reason = match known.as_ref().map(|(_, report)| (report.state, report.tiers.first())) {
            None => Some(MissReason::NeverStored),
            Some((BlockState::Gone(reason), _)) => Some(reason),
            Some((BlockState::Pending, None)) => Some(MissReason::NotComplete),
            Some((_, Some(Tier::Disk))) => {
                match view.lookup(&[key], true, until).await.map_err(status)?[..] {
                    [Found::Miss(reason)] => Some(reason),
                    _ => None,
                }
            }
            Some(_) => None,
        };
        let miss = match reason {
            Some(reason) => Some(self.miss(view, &names, 0, reason, until).await),
            None => None,
        };
        let pack = self.0.pack_of(self.principals(who, request.session)?, &key);
        let mut block = known.map(|(shard, report)| block_info(self.node(), shard, &report));
        if let Some(block) = &mut block
            && !block.tiers.is_empty()
            && self.0.gpus.has(&key)
        {
            block.tiers.insert(0, v1::Tier::Device.into());
        }
        if let (Some(block), Some(_)) = (&mut block, pack) {
            block.tiers.push(v1::Tier::Object.into());
        }
        let pack = pack.map_or_else(Bytes::new, |id| Bytes::copy_from_slice(&id.0));
        Ok(Response::new(v1::ExplainResponse {
            key: Bytes::copy_from_slice(key.as_bytes()),
            miss,
            block,
            pack,
        }))
    }
}

/// The next message of a put, by its deadline.
async fn next_piece(
    messages: &mut Streaming<v1::PutRequest>,
    until: Instant,
) -> Result<Option<v1::PutRequest>, Status> {
    let next = tokio::time::timeout_at(until.into(), messages.message()).await;
    next.unwrap_or_else(|_| Err(too_late("sending the block")))
}

/// Sends a block in chunks. The bytes are copied out of the arena piece by piece; whoever reads slowly holds
/// one block, until its deadline at the latest.
async fn send_block(
    sender: tokio::sync::mpsc::Sender<Result<v1::GetResponse, Status>>,
    key: BlockKey,
    held: Held,
    tier: Tier,
    chunk_bytes: usize,
) {
    let record = held.record();
    let header = v1::GetHeader {
        bytes: record.bytes,
        checksum: record.checksum.0,
        key: Bytes::copy_from_slice(key.as_bytes()),
        tier: convert::tier_message(tier).into(),
    };
    let mut whats = std::iter::once(v1::get_response::What::Header(header)).chain(
        held.chunks(chunk_bytes).map(|piece| v1::get_response::What::Chunk(Bytes::copy_from_slice(piece))),
    );
    for what in &mut whats {
        if sender.send(Ok(v1::GetResponse { what: Some(what) })).await.is_err() {
            return;
        }
    }
}

/// Waits for all of them, in order of asking.
pub(super) async fn futures_join<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut pending: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        let mut ready = true;
        for (future, output) in &mut pending {
            if output.is_none() {
                match future.as_mut().poll(context) {
                    std::task::Poll::Ready(value) => *output = Some(value),
                    std::task::Poll::Pending => ready = false,
                }
            }
        }
        if ready { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
    pending.into_iter().filter_map(|(_, output)| output).collect()
}
