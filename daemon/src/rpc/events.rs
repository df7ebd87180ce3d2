//! KV events: per shard a snapshot where it must be, then what happened since, without a gap.

use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_api::{convert, v1};
use kv_block::{EventKind, Fault, SessionId, Tier};
use kv_node::{BlockState, Filter, Op, Reply};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Shared, deadline_asked, status, too_late, who};
use crate::node::{Node, unexpected};
use crate::shard::ShardHandle;

/// How often a subscription looks for news.
const POLL: Duration = Duration::from_millis(50);
/// Events and blocks in one message.
const BATCH: usize = 1024;
/// How long one question to a shard may take.
const ASK: Duration = Duration::from_secs(5);

/// The `Events` service.
pub struct EventsService(pub Shared);

#[tonic::async_trait]
impl v1::events_server::Events for EventsService {
    type WatchStream = ReceiverStream<Result<v1::EventBatch, Status>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (who, until) = (who(&request), deadline_asked(&request));
        let request = request.into_inner();
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        for shard in self.0.view(who).shards().to_vec() {
            let subscription = Subscription {
                node: self.0.node.clone(),
                cursor: request.cursors.iter().find(|cursor| cursor.shard == u32::from(shard.id.0)).copied(),
                tenants: request.tenants.clone(),
                shard,
                sender: sender.clone(),
            };
            tokio::spawn(subscription.run(until));
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// One subscriber's view of one shard.
struct Subscription {
    node: std::sync::Arc<Node>,
    shard: ShardHandle,
    cursor: Option<v1::Cursor>,
    tenants: Vec<String>,
    sender: tokio::sync::mpsc::Sender<Result<v1::EventBatch, Status>>,
}

impl Subscription {
    async fn run(self, until: Option<Instant>) {
        let ended = match until {
            Some(until) => tokio::time::timeout_at(until.into(), self.follow()).await,
            None => Ok(self.follow().await),
        };
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(fault)) => drop(self.sender.send(Err(status(fault))).await),
            // A reader that leaves no room for the word sees the end of the stream.
            Err(_) => drop(self.sender.try_send(Err(too_late("the subscription")))),
        }
    }

    async fn follow(&self) -> Result<(), Fault> {
        let resumed =
            self.cursor.filter(|cursor| cursor.epoch == self.node.epoch.0).map(|cursor| cursor.number);
        let mut number = match resumed {
            Some(number) => number,
            None => match self.snapshot().await? {
                Some(number) => number,
                None => return Ok(()),
            },
        };
        loop {
            let Some(events) = self.events(number).await? else {
                // The log no longer reaches back: start again from the inventory.
                match self.snapshot().await? {
                    Some(fresh) => number = fresh,
                    None => return Ok(()),
                }
                continue;
            };
            let Some(last) = events.last() else {
                tokio::select! {
                    () = tokio::time::sleep(POLL) => {}
                    () = self.sender.closed() => return Ok(()),
                }
                // A subscriber resumes from its cursor with the next daemon.
                self.node.accepting()?;
                continue;
            };
            number = last.number;
            let shown = events.iter().filter(|event| self.wants(&event.kind)).map(message).collect();
            if !self.send(number, false, false, shown).await {
                return Ok(());
            }
        }
    }

    async fn ask(&self, op: Op) -> Result<Reply, Fault> {
        self.node.ask(&self.shard, SessionId(0), Instant::now() + ASK, op, Bytes::new()).await
    }

    async fn events(&self, after: u64) -> Result<Option<Vec<kv_block::BlockEvent>>, Fault> {
        match self.ask(Op::Events { after, count: BATCH }).await? {
            Reply::Events(events) => Ok(events),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends everything that is there. Gives the number from which to go on: events from before the listing
    /// ended may say again what the listing said, never less. `None` when the subscriber is gone.
    async fn snapshot(&self) -> Result<Option<u64>, Fault> {
        let start = match self.ask(Op::Report).await? {
            Reply::Report(report) => report.event_number,
            other => return Err(unexpected(&other)),
        };
        let mut cursor = Some(0);
        while let Some(at) = cursor {
            let op = Op::List { cursor: at, count: BATCH, filter: Filter::default() };
            let Reply::Listed { blocks, next } = self.ask(op).await? else {
                return Err(Fault::new(kv_block::code::Code::Bug, "a listing gave another answer"));
            };
            cursor = next;
            let mut events = Vec::new();
            for block in blocks.iter().filter(|block| block.state == BlockState::Present) {
                let Some(bound) = self.node.registry.get(block.binding.0.into()) else { continue };
                if !self.tenants.is_empty() && !self.tenants.contains(&bound.kept.scope.tenant) {
                    continue;
                }
                events.extend(block.tiers.iter().map(|tier| v1::Event {
                    number: 0,
                    kind: v1::event::Kind::Stored.into(),
                    tier: convert::tier_message(*tier).into(),
                    key: Bytes::copy_from_slice(block.key.as_bytes()),
                    tag: bound.kept.tag,
                }));
            }
            if !self.send(start, true, cursor.is_none(), events).await {
                return Ok(None);
            }
        }
        Ok(Some(start))
    }

    fn wants(&self, kind: &EventKind) -> bool {
        let EventKind::Stored { tag, .. } = kind else { return true };
        if self.tenants.is_empty() {
            return true;
        }
        let all = self.node.registry.all();
        // The last one is in force where a tag has two numbers.
        let bound = all.iter().rev().find(|bound| bound.kept.tag == tag.0);
        bound.is_some_and(|bound| self.tenants.contains(&bound.kept.scope.tenant))
    }

    async fn send(&self, number: u64, snapshot: bool, snapshot_end: bool, events: Vec<v1::Event>) -> bool {
        let cursor = v1::Cursor { shard: self.shard.id.0.into(), epoch: self.node.epoch.0, number };
        let batch = v1::EventBatch { cursor: Some(cursor), snapshot, snapshot_end, events };
        self.sender.send(Ok(batch)).await.is_ok()
    }
}

fn message(event: &kv_block::BlockEvent) -> v1::Event {
    let (kind, tier, key, tag) = match event.kind {
        EventKind::Stored { key, tag, tier } => (v1::event::Kind::Stored, tier, Some(key), tag.0),
        EventKind::Removed { key, tier } => (v1::event::Kind::Removed, tier, Some(key), 0),
        EventKind::Cleared { tier } => (v1::event::Kind::Cleared, tier, None, 0),
    };
    let tier: Tier = tier;
    v1::Event {
        number: event.number,
        kind: kind.into(),
        tier: convert::tier_message(tier).into(),
        key: key.map_or_else(Bytes::new, |key| Bytes::copy_from_slice(key.as_bytes())),
        tag,
    }
}
