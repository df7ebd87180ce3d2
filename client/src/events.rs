//! KV events that survive a reconnect: the stream goes on from the last cursor it saw, or starts again with
//! the inventory when the daemon can no longer reach back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kv_api::{convert, v1};
use kv_block::{BindingTag, BlockEvent, Epoch, EventKind, FaultKind, ShardId};
use tokio::sync::mpsc;

use crate::client::Client;
use crate::error::{Error, bug, of_status};
use crate::options::DEADLINE_MAX;

const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// What to watch.
#[derive(Clone, Debug, Default)]
pub struct WatchOptions {
    /// Only blocks of these tenants; empty means all that the caller may see.
    pub tenants: Vec<String>,
    /// Where to go on from, one per shard; a shard without one begins with its inventory.
    pub cursors: Vec<EventCursor>,
}

/// A position in one shard's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventCursor {
    /// Which shard.
    pub shard: ShardId,
    /// Life of the daemon.
    pub epoch: Epoch,
    /// Last event that was seen.
    pub number: u64,
}

/// Some events of one shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventBatch {
    /// Position after it.
    pub cursor: EventCursor,
    /// The events are the shard's inventory. What was known of the shard before is void when one begins.
    pub snapshot: bool,
    /// The inventory is complete with this batch.
    pub snapshot_end: bool,
    /// What happened, in order.
    pub events: Vec<BlockEvent>,
}

/// A subscription. Ends when dropped.
#[derive(Debug)]
pub struct Events {
    receiver: mpsc::Receiver<Result<EventBatch, Error>>,
}

impl Events {
    pub(crate) fn start(client: Client, options: WatchOptions) -> Self {
        let (sender, receiver) = mpsc::channel(64);
        let runtime = client.runtime().clone();
        runtime.spawn(follow(client, options, sender));
        Self { receiver }
    }

    /// The next batch. `None` after an error that no reconnect mends, which comes first.
    pub async fn next(&mut self) -> Option<Result<EventBatch, Error>> {
        self.receiver.recv().await
    }

    /// [`Events::next`] for plain threads: waits up to `timeout`, ten minutes at most; `None` when nothing came.
    pub fn next_within(&mut self, timeout: Duration) -> Option<Result<EventBatch, Error>> {
        let until = Instant::now() + timeout.min(DEADLINE_MAX);
        loop {
            match self.receiver.try_recv() {
                Ok(batch) => return Some(batch),
                Err(mpsc::error::TryRecvError::Disconnected) => return None,
                Err(mpsc::error::TryRecvError::Empty) if Instant::now() >= until => return None,
                Err(mpsc::error::TryRecvError::Empty) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// Where the subscription stands, by shard.
#[derive(Debug, Default)]
struct Cursors(BTreeMap<u32, v1::Cursor>);

impl Cursors {
    /// An inventory counts once it is whole: after a cut in the middle it must come again.
    fn advance(&mut self, batch: &v1::EventBatch) {
        let Some(cursor) = batch.cursor else { return };
        if !batch.snapshot || batch.snapshot_end {
            self.0.insert(cursor.shard, cursor);
        } else {
            self.0.remove(&cursor.shard);
        }
    }
}

async fn follow(client: Client, options: WatchOptions, sender: mpsc::Sender<Result<EventBatch, Error>>) {
    let cursor = |at: &EventCursor| {
        let shard = u32::from(at.shard.0);
        (shard, v1::Cursor { shard, epoch: at.epoch.0, number: at.number })
    };
    let mut cursors = Cursors(options.cursors.iter().map(cursor).collect());
    let mut backoff = Duration::from_millis(10);
    loop {
        let request = v1::WatchRequest {
            cursors: cursors.0.values().copied().collect(),
            tenants: options.tenants.clone(),
        };
        let error = match client.within(client.events().watch(request)).await {
            Err(error) => error,
            Ok(mut stream) => loop {
                let message = tokio::select! {
                    message = stream.message() => message,
                    () = sender.closed() => return,
                };
                match message {
                    Ok(Some(batch)) => {
                        backoff = Duration::from_millis(10);
                        let parsed = parse(&batch);
                        let broken = parsed.is_err();
                        if sender.send(parsed).await.is_err() || broken {
                            return;
                        }
                        cursors.advance(&batch);
                    }
                    Ok(None) => break crate::error::unreachable("the daemon ended the stream"),
                    Err(status) => break of_status(&status),
                }
            },
        };
        if matches!(error.kind(), FaultKind::Denied | FaultKind::Invalid | FaultKind::Unsupported) {
            let _ = sender.send(Err(error)).await;
            return;
        }
        tracing::debug!(%error, "event stream broke; it goes on where it was");
        tokio::select! {
            () = tokio::time::sleep(backoff) => backoff = (backoff * 2).min(BACKOFF_MAX),
            () = sender.closed() => return,
        }
    }
}

fn parse(batch: &v1::EventBatch) -> Result<EventBatch, Error> {
    let cursor = batch.cursor.ok_or_else(|| bug("an event batch without a cursor"))?;
    let shard = u16::try_from(cursor.shard).map_err(|_| bug("a shard number out of range"))?;
    let cursor = EventCursor { shard: ShardId(shard), epoch: Epoch(cursor.epoch), number: cursor.number };
    let event = |event: &v1::Event| {
        let tier = convert::tier(event.tier)?.ok_or_else(|| bug("an event without a tier"))?;
        let kind = match v1::event::Kind::try_from(event.kind) {
            Ok(v1::event::Kind::Stored) => {
                EventKind::Stored { key: convert::key(&event.key)?, tag: BindingTag(event.tag), tier }
            }
            Ok(v1::event::Kind::Removed) => EventKind::Removed { key: convert::key(&event.key)?, tier },
            Ok(v1::event::Kind::Cleared) => EventKind::Cleared { tier },
            _ => return Err(bug("an event of an unknown kind")),
        };
        Ok(BlockEvent { epoch: cursor.epoch, number: event.number, kind })
    };
    let events = batch.events.iter().map(event).collect::<Result<_, Error>>()?;
    Ok(EventBatch { cursor, snapshot: batch.snapshot, snapshot_end: batch.snapshot_end, events })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(number: u64, snapshot: bool, snapshot_end: bool) -> v1::EventBatch {
        let cursor = Some(v1::Cursor { shard: 1, epoch: 2, number });
        v1::EventBatch { cursor, snapshot, snapshot_end, events: Vec::new() }
    }

    #[test]
    fn an_inventory_that_was_cut_short_is_asked_for_again() {
        let mut cursors = Cursors::default();
        cursors.advance(&batch(5, false, false));
        assert_eq!(cursors.0[&1].number, 5);
        cursors.advance(&batch(9, true, false));
        assert!(cursors.0.is_empty(), "half an inventory is none");
        cursors.advance(&batch(9, true, true));
        assert_eq!(cursors.0[&1].number, 9);
    }

    #[test]
    fn events_that_make_no_sense_are_refused() {
        let event = |kind: i32, tier: i32, key: &'static [u8]| v1::EventBatch {
            events: vec![v1::Event { number: 3, kind, tier, key: key.into(), tag: 4 }],
            ..batch(3, false, false)
        };
        let good = parse(&event(2, 2, &[7; 16])).unwrap();
        assert_eq!((good.events[0].number, good.events[0].epoch), (3, Epoch(2)));
        for (kind, tier, key) in [(0, 2, &[7; 16][..]), (9, 2, &[7; 16]), (1, 0, &[7; 16]), (1, 2, &[7; 15])]
        {
            assert!(parse(&event(kind, tier, key)).is_err(), "{kind} {tier} {}", key.len());
        }
        assert!(parse(&v1::EventBatch::default()).is_err());
    }
}
