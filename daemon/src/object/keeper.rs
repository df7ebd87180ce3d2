//! What an object tier needs besides being asked: to be opened, to hear of others, to write in time, to tidy up.

use std::sync::Arc;
use std::time::Duration;

use kv_block::Epoch;
use kv_node::UploadDone;
use kv_object::pace::PaceLimits;
use kv_object::packer::PackerLimits;
use kv_object::tier::Stored;
use kv_object::{Tier, TierConfig, TierError, open};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Principal, unix_now};
use crate::config::Config;
use crate::node::Node;
use crate::shard::ShardHandle;

/// How long after a failure it is tried again: at first, and at most.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(60);
/// After being fenced: whoever did it may be alive, and would be fenced in turn.
const AFTER_FENCE: Duration = Duration::from_secs(60);
/// Packs are looked for that have waited long enough no more often than this.
const FLUSH_PAUSE: Duration = Duration::from_millis(50);
/// Of so many rounds of collection, one is preceded by a list of all packs, for those that no manifest names.
const RESCAN_EVERY: u32 = 6;

pub(super) struct Keeper {
    principal: Arc<Principal>,
    shards: Vec<ShardHandle>,
    config: TierConfig,
    refresh: Duration,
    collect: bool,
}

/// Why a tier is not kept any more.
enum Over {
    Stopped,
    /// Another life of this node has begun, or this one was silent too long.
    Fenced(Epoch),
}

impl Keeper {
    pub(super) fn new(node: &Node, config: &Config, number: usize, principal: Arc<Principal>) -> Self {
        let object = &config.object;
        let mut tier = TierConfig::new(node.name.to_ascii_lowercase(), node.epoch);
        tier.packer = PackerLimits {
            pack_bytes: object.pack_bytes.0,
            age_max: object.pack_wait.0,
            waiting_bytes_max: object.waiting_bytes_max.0,
            ..PackerLimits::default()
        };
        tier.reach.span_bytes_max = object.request_bytes_max.0;
        tier.requests.pace = PaceLimits { requests_max: object.requests_max, ..PaceLimits::default() };
        tier.ttl_s = object.ttl.get().map(|ttl| u32::try_from(ttl.0.as_secs()).unwrap_or(u32::MAX));
        tier.round_min = object.collect_every.0;
        tier.blocks_max = usize::try_from(object.blocks_max).unwrap_or(usize::MAX);
        let shards = node.of(number).shards().to_vec();
        Self { principal, shards, config: tier, refresh: object.refresh.0, collect: object.collect }
    }

    pub(super) async fn run(mut self, mut stopped: watch::Receiver<bool>) {
        let mut again = AGAIN;
        loop {
            let opened = tokio::select! {
                opened = self.open() => opened,
                () = told(&mut stopped) => return,
            };
            let wait = match opened {
                Ok(tier) => {
                    again = AGAIN;
                    self.principal.set_trouble(None);
                    self.principal.set_tier(Some(Arc::clone(&tier)));
                    match self.keep(&tier, &mut stopped).await {
                        Over::Stopped => return,
                        Over::Fenced(found) => {
                            self.principal.set_tier(None);
                            self.config.epoch = Epoch(found.0 + 1);
                            let text = format!(
                                "the store has a newer life of node {}: if another daemon is called that, give one of them \
                                 another node.name",
                                self.config.node
                            );
                            tracing::warn!(place = %self.principal.place, "{text}");
                            self.principal.set_trouble(Some(text));
                            AFTER_FENCE
                        }
                    }
                }
                // An earlier life had a higher number: memory that counted them is gone. This one is newer all the same.
                Err(Failed::Tier(TierError::Fenced { found, .. })) if found >= self.config.epoch => {
                    self.config.epoch = Epoch(found.0 + 1);
                    Duration::ZERO
                }
                Err(error) => {
                    let text = chain(&error);
                    tracing::warn!(place = %self.principal.place, error = text, ?again, "the object store cannot be opened; it is tried again");
                    self.principal.set_trouble(Some(text));
                    let wait = again;
                    again = (again * 2).min(AGAIN_MAX);
                    wait
                }
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = told(&mut stopped) => return,
            }
        }
    }

    async fn open(&self) -> Result<Arc<Tier>, Failed> {
        let store = open::open(&self.principal.place).await?;
        let (tier, found) = Tier::open(store, self.config.clone(), unix_now()).await?;
        tracing::info!(
            place = %self.principal.place,
            principal = self.principal.name,
            nodes = found.nodes,
            packs = found.packs,
            blocks = found.blocks,
            incompatible = found.incompatible,
            broken = found.broken,
            unread = found.unread,
            "the object store is open"
        );
        Ok(Arc::new(tier))
    }

    async fn keep(&self, tier: &Arc<Tier>, stopped: &mut watch::Receiver<bool>) -> Over {
        let mut refresh_due = Instant::now() + self.refresh;
        let mut collect_due = Instant::now() + self.config.round_min;
        let mut rounds = 0;
        let mut flushed = Instant::now();
        loop {
            // What is due is taken as soon as the flush runs; when it fails, it fails for more than a moment.
            let flush_due = tier.due_in().map(|left| (Instant::now() + left).max(flushed + FLUSH_PAUSE));
            tokio::select! {
                () = told(stopped) => {
                    self.finish(tier).await;
                    return Over::Stopped;
                }
                () = self.principal.taken.notified() => {}
                () = sleep_until(flush_due.unwrap_or_else(Instant::now)), if flush_due.is_some() => {
                    flushed = Instant::now();
                    // A pack that is slow to write holds up nothing else.
                    let (tier, shards) = (Arc::clone(tier), self.shards.clone());
                    tokio::spawn(async move {
                        match tier.flush(false).await {
                            Ok(stored) => tell_lost(&shards, &stored),
                            Err(error) => tracing::debug!(%error, "packs were not written"),
                        }
                    });
                }
                () = sleep_until(refresh_due) => {
                    refresh_due = Instant::now() + self.refresh;
                    match tier.refresh(unix_now()).await {
                        Err(TierError::Fenced { found, .. }) => return Over::Fenced(found),
                        Err(error) => tracing::debug!(%error, "what others wrote is not known"),
                        Ok(()) => {}
                    }
                }
                () = sleep_until(collect_due), if self.collect => {
                    collect_due = Instant::now() + self.config.round_min;
                    rounds += 1;
                    if let Some(over) = self.collect(tier, rounds % RESCAN_EVERY == 0).await {
                        return over;
                    }
                }
            }
        }
    }

    async fn collect(&self, tier: &Tier, rescan: bool) -> Option<Over> {
        if rescan && let Err(error) = tier.rescan().await {
            tracing::debug!(%error, "the packs of the store could not be listed");
        }
        match tier.collect(false).await {
            Ok(collected) if collected.round > 0 => {
                tracing::info!(
                    round = collected.round,
                    packs = collected.packs,
                    condemned = collected.condemned,
                    deleted = collected.deleted.len(),
                    deleted_bytes = collected.deleted_bytes,
                    "collected in the object store"
                );
                if !collected.unheard.is_empty() {
                    tracing::warn!(
                        nodes = collected.unheard.join(", "),
                        "manifests cannot be read: nothing is condemned in the object store as long as these nodes count"
                    );
                }
            }
            Ok(_) => {}
            Err(TierError::Fenced { found, .. }) => return Some(Over::Fenced(found)),
            Err(error @ TierError::Overwrites) => tracing::debug!(%error),
            Err(error) => tracing::warn!(%error, "nothing is collected in the object store"),
        }
        None
    }

    /// What waits is written, and what this node uses is said, before it goes.
    async fn finish(&self, tier: &Tier) {
        match tier.flush(true).await {
            Ok(stored) if !stored.lost.is_empty() => {
                tracing::warn!(blocks = stored.lost.len(), "the object store did not take the last packs");
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "the last packs were not written"),
        }
        if let Err(error) = tier.publish().await {
            tracing::warn!(%error, "the last manifest was not written");
        }
    }
}

/// Until the daemon ends.
async fn told(stopped: &mut watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Tells the shards which blocks are not in the store after all.
pub(super) fn tell_lost(shards: &[ShardHandle], stored: &Stored) {
    if stored.lost.is_empty() {
        return;
    }
    tracing::warn!(
        blocks = stored.lost.len(),
        "the object store did not take a pack; its blocks are offered again"
    );
    for shard in shards {
        shard.tell_uploaded(UploadDone::Lost { keys: stored.lost.clone() });
    }
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Open(#[from] open::OpenError),
    #[error(transparent)]
    Tier(#[from] TierError),
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // Some say what their source says.
        let more = error.to_string();
        if !text.contains(&more) {
            text += &format!(": {more}");
        }
        source = error.source();
    }
    text
}
