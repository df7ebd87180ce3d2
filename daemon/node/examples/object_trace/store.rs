//! A store that counts what is asked of it, and takes its time.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use kv_object::Store;
use kv_object::landing::Landing;
use kv_object::memory::Memory;
use kv_object::requests::Kind;
use kv_object::store::{Page, Reply};
use tokio::time::sleep;

/// How long every answer takes.
const LATENCY: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Default)]
pub(crate) struct Count {
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
}

#[derive(Default)]
pub(crate) struct Counting {
    memory: Memory,
    counts: Mutex<BTreeMap<(Kind, &'static str), Count>>,
}

/// What of a pack is read by a request that ends where the pack does.
const FOOTERS: &str = "footers";

impl Counting {
    pub(crate) fn counts(&self) -> BTreeMap<(Kind, &'static str), Count> {
        self.counts.lock().expect("nobody panics").clone()
    }

    /// Bytes read that are none of blocks.
    pub(crate) fn read_besides(&self) -> u64 {
        let counts = self.counts();
        let besides = counts.iter().filter(|((kind, what), _)| *kind == Kind::Get && *what != "packs");
        besides.map(|(_, count)| count.bytes).sum()
    }

    async fn count(&self, kind: Kind, name: &str, bytes: u64) {
        let what = ["packs", "manifests", "rounds", FOOTERS].into_iter().find(|what| name.starts_with(what));
        {
            let mut counts = self.counts.lock().expect("nobody panics");
            let count = counts.entry((kind, what.unwrap_or("other"))).or_default();
            count.requests += 1;
            count.bytes += bytes;
        }
        sleep(LATENCY).await;
    }
}

impl Store for Counting {
    fn describe(&self) -> String {
        "counting".to_owned()
    }

    fn put<'a>(&'a self, name: &'a str, body: Bytes) -> Reply<'a, ()> {
        Box::pin(async move {
            self.count(Kind::Put, name, body.len() as u64).await;
            self.memory.put(name, body).await
        })
    }

    fn get<'a>(&'a self, name: &'a str, from: u64, landing: &'a mut Landing<'_>) -> Reply<'a, ()> {
        Box::pin(async move {
            let end = from + landing.len();
            let whole = self.memory.with(|objects| objects.get(name).map(|body| body.len() as u64));
            let is_footer = name.starts_with("packs") && whole == Some(end);
            self.count(Kind::Get, if is_footer { FOOTERS } else { name }, landing.len()).await;
            self.memory.get(name, from, landing).await
        })
    }

    fn head<'a>(&'a self, name: &'a str) -> Reply<'a, u64> {
        Box::pin(async move {
            self.count(Kind::Head, name, 0).await;
            self.memory.head(name).await
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> Reply<'a, Page> {
        Box::pin(async move {
            self.count(Kind::List, prefix, 0).await;
            self.memory.list(prefix, after, limit).await
        })
    }

    fn delete<'a>(&'a self, name: &'a str) -> Reply<'a, ()> {
        Box::pin(async move {
            self.count(Kind::Delete, name, 0).await;
            self.memory.delete(name).await
        })
    }
}
