//! Sessions and what their blocks mean.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_api::{convert, v1};
use kv_block::code::Code;
use kv_block::{Fault, SessionId};
use kv_node::Event;
use kv_shm::door::NAME_BYTES_MAX;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Shared, deadline_asked, status, too_late, who};
use crate::sessions::Door;
use crate::shard::Letter;

/// How often an open stream says that the daemon is there.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// The `Worker` service.
pub struct WorkerService(pub Shared);

/// Waits until a moment; for ever when there is none.
async fn passed(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until.into()).await,
        None => std::future::pending().await,
    }
}

#[tonic::async_trait]
impl v1::worker_server::Worker for WorkerService {
    type OpenStream = ReceiverStream<Result<v1::SessionNotice, Status>>;

    async fn open(&self, request: Request<v1::OpenRequest>) -> Result<Response<Self::OpenStream>, Status> {
        let node = self.0.node.clone();
        node.accepting().map_err(status)?;
        let (who, until) = (who(&request), deadline_asked(&request));
        let name = request.into_inner().name;
        if name.len() > NAME_BYTES_MAX {
            let text = format!("field `name` has {} bytes, {NAME_BYTES_MAX} are allowed", name.len());
            return Err(status(Fault::new(Code::BadRequest, text)));
        }
        let info = node.sessions.open(name, Door::Grpc, who.caller, who.principal).map_err(status)?;
        for shard in node.of(who.principal).shards() {
            shard.post_surely(Letter::Attach { session: info.id, link: None });
        }
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        tokio::spawn(async move {
            let mut beat = tokio::time::interval(KEEP_ALIVE);
            let mut look = tokio::time::interval(Duration::from_millis(250));
            let mut told = false;
            loop {
                tokio::select! {
                    _ = beat.tick() => {}
                    _ = look.tick() => {
                        let draining = node.is_draining();
                        if !draining || (told && !node.drain.is_idle()) {
                            continue;
                        }
                    }
                    // The stream is gone: that is the session's end.
                    () = sender.closed() => break,
                    () = passed(until) => {
                        let _ = sender.try_send(Err(too_late("the session")));
                        break;
                    }
                }
                let notice = v1::SessionNotice {
                    session: info.id.0,
                    epoch: node.epoch.0,
                    draining: node.is_draining(),
                };
                told = notice.draining;
                // A reader that takes nothing for many beats is as good as gone.
                if sender.send_timeout(Ok(notice), 4 * KEEP_ALIVE).await.is_err() {
                    break;
                }
                // What calls wait for under this session would end with it.
                if told && node.drain.is_idle() {
                    break;
                }
            }
            for shard in node.of(who.principal).shards() {
                shard.post_surely(Letter::Detach { session: info.id });
            }
            node.sessions.close(info.id);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterResponse>, Status> {
        let node = &self.0.node;
        let caller = who(&request).caller;
        let request = request.into_inner();
        if request.session != 0 {
            node.sessions.check(SessionId(request.session), caller).map_err(status)?;
        }
        let scope = convert::scope(request.scope).map_err(status)?;
        let slice = convert::slice(request.slice).map_err(status)?;
        node.fits(request.block_bytes).map_err(status)?;
        let (bound, new) = node.registry.register(&scope, &slice, request.block_bytes).map_err(status)?;
        if new {
            node.tell_all(|| Event::Bound(bound.binding()));
            let node = Arc::clone(node);
            let saved = tokio::task::spawn_blocking(move || node.registry.save()).await;
            saved.map_err(|error| status(Fault::new(Code::Bug, format!("saving the registry: {error}"))))?;
        }
        Ok(Response::new(v1::RegisterResponse {
            binding: bound.id.0.into(),
            scope_id: Bytes::copy_from_slice(scope.id().as_bytes()),
            epoch: node.epoch.0,
        }))
    }

    async fn describe(
        &self,
        request: Request<v1::DescribeRequest>,
    ) -> Result<Response<v1::DescribeResponse>, Status> {
        let (node, config, who) = (&self.0.node, &self.0.config, who(&request));
        Ok(Response::new(v1::DescribeResponse {
            node: node.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            epoch: node.epoch.0,
            shards: self.0.view(who).shards().len() as u32,
            keys_per_request_max: config.limits.keys_per_request_max,
            message_bytes_max: config.limits.message_bytes_max.0,
            worker_socket: config.run_dir().join("worker.sock").display().to_string(),
            block_bytes_max: node.block_bytes_max.min(u64::from(u32::MAX)) as u32,
            principal: node.principals[who.principal].name.clone(),
            peers: config.peers().map(|member| member.name.clone()).collect(),
            object: config.object_store().is_some(),
        }))
    }
}
