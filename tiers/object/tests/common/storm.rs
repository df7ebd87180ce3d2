//! A tier on a real server behind a bad network.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use kv_object::requests::RequestLimits;
use kv_object::retry::RetryLimits;
use kv_object::store::Store;
use kv_object::tier::{Got, Tier, TierConfig};
use tokio::time::Instant;

use super::proxy::Proxy;
use super::{NOW, config, hits, offer, read};

/// Stores and reads through `proxy` while it is bad: no wrong byte, every operation in its time, retries within their
/// bound. When it is well again, a node that knows nothing finds all that landed.
pub async fn weather(store: Arc<dyn Store>, proxy: &Proxy) {
    let retry = RetryLimits { backoff_min: Duration::from_millis(5), ..RetryLimits::default() };
    let retry = RetryLimits { backoff_max: Duration::from_millis(50), budget_max: 10_000, ..retry };
    let requests = RequestLimits { retry, attempt_max: Duration::from_secs(2), ..RequestLimits::default() };
    let requests = RequestLimits { put_attempt_max: Duration::from_secs(2), ..requests };
    let config = |node| TierConfig { requests, upkeep_max: Duration::from_secs(10), ..config(node, 1) };
    let tier = Tier::open(store.clone(), config("a"), NOW).await.unwrap().0;
    proxy.set_bad(true);
    let mut landed = BTreeSet::new();
    let (mut read_well, mut reads) = (0, 0);
    for round in 0..12u64 {
        let offers = (0..20).map(|n| offer(round * 20 + n, 4000, None, 0)).collect();
        let mut stored = tier.put(NOW, offers).await.unwrap();
        stored.landed.extend(tier.flush(true).await.unwrap().landed);
        landed.extend(stored.landed.iter().map(|key| key.halves()[1]));
        let wanted: Vec<_> = landed.iter().copied().collect();
        let (within, began) = (Duration::from_secs(4), Instant::now());
        let got = read(&tier, NOW, within, &wanted).await;
        assert!(began.elapsed() < within + Duration::from_millis(500), "{:?}", began.elapsed());
        reads += got.len();
        read_well += got.iter().filter(|got| matches!(got, Got::Read(_))).count();
        let _ = tier.refresh(NOW).await;
    }
    let report = tier.report();
    proxy.set_bad(false);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let stranger = Tier::open(store, TierConfig { node: "b".into(), ..config("b") }, NOW).await.unwrap().0;
    let landed: Vec<_> = landed.into_iter().collect();
    assert_eq!(hits(&stranger, &landed).await, landed.len());
    eprintln!(
        "{} of 240 blocks landed, {read_well} of {reads} reads hit, {} connections harmed, {:?}",
        landed.len(),
        proxy.faults(),
        report.requests.counts
    );
    assert!(
        landed.len() > 20 && read_well > 20 && proxy.faults() > 20,
        "it did something, and something was done"
    );
    for (kind, count) in &report.requests.counts {
        let first = count.requests - count.retries;
        assert!(count.requests <= first * u64::from(retry.attempts_max), "{kind:?}: {count:?}");
    }
}
