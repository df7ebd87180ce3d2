//! The LMCache door of this daemon: what `[lmcache]` says, opened and served beside the rest.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use kv_lmcache::{Counters, Door, Listener, Options};

use crate::config::Config;
use crate::config::units::Place;
use crate::metrics::{LMCACHE_CHUNKS, LMCACHE_INSTANCES};
use crate::node::Node;
use crate::plan::Plan;

/// How often the door's numbers reach the metrics.
const PERIOD: Duration = Duration::from_secs(1);

/// The door and where it listens; `None` where it is off.
pub async fn open(
    config: &Config,
    plan: &Plan,
    node: &Arc<Node>,
) -> anyhow::Result<Option<(Arc<Door>, Listener)>> {
    let lmcache = &config.lmcache;
    let listener = match lmcache.listen.get() {
        None => return Ok(None),
        Some(Place::Tcp(address)) => {
            let listener = tokio::net::TcpListener::bind(address)
                .await
                .with_context(|| format!("listening on {address} for LMCache; see lmcache.listen"))?;
            if !address.ip().to_canonical().is_loopback() {
                tracing::warn!(%address, "LMCache's protocol knows no authentication: whoever reaches it reads and writes blocks");
            }
            tracing::info!(address = %listener.local_addr()?, "LMCache's protocol over TCP");
            Listener::Tcp(listener)
        }
        Some(Place::Unix(path)) => {
            let listener = Listener::unix(path, config.listen.socket_mode.0).with_context(|| {
                format!("listening on {} for LMCache; see lmcache.listen", path.display())
            })?;
            tracing::info!(address = %path.display(), "LMCache's protocol on a socket");
            listener
        }
    };
    let sessions = Arc::clone(node);
    let options = Options {
        run_dir: config.run_dir(),
        chunk_tokens: lmcache.chunk_tokens,
        pool_bytes: lmcache.pool_bytes.0,
        pool_mode: lmcache.pool_mode.0,
        shm_name: config.lmcache_shm_name().to_owned(),
        instances_max: lmcache.instances_max as usize,
        tenant: lmcache.tenant.clone(),
        uint8_as: lmcache.uint8_as.get().map(|label| label.0.clone()),
        pending_wait: lmcache.pending_wait.0,
        peer_wait: if config.looks_further() { lmcache.peer_wait.0 } else { Duration::ZERO },
        hold_ttl: lmcache.hold_ttl.0,
        // A block lies in one region of the arena.
        block_bytes_max: plan.region_bytes,
        hazards_max: config.workers.hazards_max,
        name_session: Box::new(move |id, name| sessions.sessions.name(id, name)),
    };
    Ok(Some((Door::new(options), listener)))
}

/// Carries the numbers of the door to the metrics, for as long as the runtime lives.
pub async fn follow(door: Arc<Door>) {
    let mut beat = tokio::time::interval(PERIOD);
    loop {
        beat.tick().await;
        let Counters { instances, promised, missed, loaded, load_failed, stored, store_failed } =
            door.counters();
        LMCACHE_INSTANCES.gauge(&[]).set(instances as f64);
        for (what, count) in [
            ("promised", promised),
            ("missed", missed),
            ("loaded", loaded),
            ("load failed", load_failed),
            ("stored", stored),
            ("store failed", store_failed),
        ] {
            LMCACHE_CHUNKS.counter(&[what]).absolute(count);
        }
    }
}
