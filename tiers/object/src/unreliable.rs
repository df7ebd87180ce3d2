//! A store that fails on purpose, by seed: what a network, a proxy and a service under load do to the one behind it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;

use crate::landing::Landing;
use crate::random::Random;
use crate::store::{Object, Page, Reply, Store, StoreError};

/// How often what goes wrong, in thousandths of the operations that it can happen to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rates {
    /// The service fails (5xx) and has done nothing.
    pub failed: u64,
    /// The service asks for less (429, 503).
    pub throttled: u64,
    /// The connection ends before anything was done.
    pub reset: u64,
    /// The operation was done, and the answer is lost.
    pub lost: u64,
    /// It takes up to `slow_max` longer.
    pub slow: u64,
    /// The body of a read ends early.
    pub truncated: u64,
    /// A bit of a read's body is another one.
    pub flipped: u64,
    /// A read brings other bytes of the object than those asked for.
    pub misplaced: u64,
    /// The longest delay.
    pub slow_max: Duration,
    /// A list does not show what was written or deleted in so many operations before it.
    pub list_lag: u64,
}

impl Rates {
    /// Everything `times` in a thousand, delays up to 30 s, lists a few operations late.
    pub fn all(times: u64) -> Self {
        Self {
            failed: times,
            throttled: times,
            reset: times,
            lost: times,
            slow: times,
            truncated: times,
            flipped: times,
            misplaced: times,
            slow_max: Duration::from_secs(30),
            list_lag: 5,
        }
    }
}

/// A store in front of another one.
pub struct Unreliable {
    inner: Arc<dyn Store>,
    state: Mutex<State>,
}

struct State {
    random: Random,
    rates: Rates,
    down: bool,
    operations: u64,
    injected: BTreeMap<&'static str, u64>,
    /// What changed lately: when, what, and its length if it was deleted.
    changes: VecDeque<(u64, String, Option<u64>)>,
}

/// What is done to one operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Harm {
    None,
    Before(Failure),
    Lost,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Failure {
    Failed,
    Throttled(Option<Duration>),
    Reset,
}

impl Failure {
    fn error(self) -> StoreError {
        match self {
            Self::Failed => StoreError::broken("500, on purpose"),
            Self::Throttled(retry_after) => StoreError::Throttled { retry_after },
            Self::Reset => StoreError::broken("connection reset, on purpose"),
        }
    }
}

impl Unreliable {
    /// Fails no operation until it is told to.
    pub fn new(inner: Arc<dyn Store>, seed: u64) -> Self {
        let state = State {
            random: Random::new(seed),
            rates: Rates::default(),
            down: false,
            operations: 0,
            injected: BTreeMap::new(),
            changes: VecDeque::new(),
        };
        Self { inner, state: Mutex::new(state) }
    }

    /// From now on this often.
    pub fn set_rates(&self, rates: Rates) {
        self.with(|state| state.rates = rates);
    }

    /// From now on nothing at all works, or what the rates let through.
    pub fn set_down(&self, down: bool) {
        self.with(|state| state.down = down);
    }

    /// Operations asked for so far.
    pub fn operations(&self) -> u64 {
        self.with(|state| state.operations)
    }

    /// What was done on purpose so far, by kind.
    pub fn injected(&self) -> BTreeMap<&'static str, u64> {
        self.with(|state| state.injected.clone())
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().expect("nothing panics under this lock"))
    }

    /// Begins an operation: waits if it is to be slow, and says how it ends.
    async fn begin(&self) -> Result<bool, StoreError> {
        let (wait, harm) = self.with(State::next);
        if let Some(wait) = wait {
            tokio::time::sleep(wait).await;
        }
        match harm {
            Harm::None => Ok(false),
            Harm::Lost => Ok(true),
            Harm::Before(failure) => Err(failure.error()),
        }
    }

    fn end<T>(lost: bool, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if lost { Err(StoreError::broken("the answer is lost, on purpose")) } else { result }
    }

    fn changed(&self, name: &str, deleted: Option<u64>) {
        self.with(|state| {
            state.changes.push_back((state.operations, name.to_owned(), deleted));
            let lag = state.rates.list_lag;
            while state.changes.front().is_some_and(|(at, ..)| at + lag < state.operations) {
                state.changes.pop_front();
            }
        });
    }

    /// What a list shows that is late: everything of `prefix` without what was just written, with what was just deleted.
    async fn late_list(&self, prefix: &str) -> Result<Vec<Object>, StoreError> {
        let mut objects = BTreeMap::new();
        let mut after = None;
        loop {
            let page = self.inner.list(prefix, after.as_deref(), 1000).await?;
            objects.extend(page.objects.into_iter().map(|object| (object.name, object.bytes)));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        self.with(|state| {
            let since = state.operations.saturating_sub(state.rates.list_lag);
            // Backwards: what an object was before the first of its late changes.
            for (at, name, deleted) in state.changes.iter().rev() {
                if *at < since || !name.starts_with(prefix) {
                    continue;
                }
                match deleted {
                    Some(bytes) => objects.insert(name.clone(), *bytes),
                    None => objects.remove(name),
                };
            }
        });
        Ok(objects.into_iter().map(|(name, bytes)| Object { name, bytes }).collect())
    }
}

impl State {
    fn next(&mut self) -> (Option<Duration>, Harm) {
        self.operations += 1;
        let rates = self.rates;
        let wait = self.hit("slow", rates.slow).then(|| {
            let micros = self.random.below(u64::try_from(rates.slow_max.as_micros()).unwrap_or(u64::MAX));
            Duration::from_micros(micros)
        });
        let harm = if self.down || self.hit("failed", rates.failed) {
            Harm::Before(Failure::Failed)
        } else if self.hit("throttled", rates.throttled) {
            let told = self.random.per_mille(500).then(|| Duration::from_millis(self.random.below(2000)));
            Harm::Before(Failure::Throttled(told))
        } else if self.hit("reset", rates.reset) {
            Harm::Before(Failure::Reset)
        } else if self.hit("lost", rates.lost) {
            Harm::Lost
        } else {
            Harm::None
        };
        (wait, harm)
    }

    fn hit(&mut self, what: &'static str, times: u64) -> bool {
        let hit = self.random.per_mille(times);
        if hit {
            *self.injected.entry(what).or_default() += 1;
        }
        hit
    }

    /// What becomes of a body of `bytes` that lies at `from` of its object.
    fn damage(&mut self, from: &mut u64, body: &mut Vec<u8>) {
        let rates = self.rates;
        if self.hit("misplaced", rates.misplaced) {
            *from = self.random.below(*from + 1);
        }
        if !body.is_empty() && self.hit("truncated", rates.truncated) {
            let left = self.random.below(body.len() as u64) as usize;
            body.truncate(left);
        }
        if !body.is_empty() && self.hit("flipped", rates.flipped) {
            let bit = self.random.below(body.len() as u64 * 8) as usize;
            body[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

impl Store for Unreliable {
    fn describe(&self) -> String {
        format!("unreliable {}", self.inner.describe())
    }

    fn put<'a>(&'a self, name: &'a str, body: Bytes) -> Reply<'a, ()> {
        Box::pin(async move {
            let lost = self.begin().await?;
            let result = self.inner.put(name, body).await;
            if result.is_ok() {
                self.changed(name, None);
            }
            Self::end(lost, result)
        })
    }

    fn get<'a>(&'a self, name: &'a str, from: u64, landing: &'a mut Landing<'_>) -> Reply<'a, ()> {
        Box::pin(async move {
            let lost = self.begin().await?;
            // A copy is damaged, never the object.
            let mut body = vec![0; landing.len() as usize];
            let mut at = from;
            self.with(|state| state.damage(&mut at, &mut body));
            let damaged = std::mem::replace(&mut body, vec![0; landing.len() as usize]);
            self.inner.get(name, at, &mut Landing::of(&mut body)).await?;
            body.truncate(damaged.len());
            body.iter_mut().zip(&damaged).for_each(|(byte, flipped)| *byte ^= flipped);
            landing.push(&body).map_err(StoreError::broken)?;
            if lost || landing.is_full() {
                return Self::end(lost, Ok(()));
            }
            // Some clients notice a short body, others say that all is well.
            if self.with(|state| state.random.per_mille(500)) {
                return Err(StoreError::broken("the body ended early, on purpose"));
            }
            Ok(())
        })
    }

    fn head<'a>(&'a self, name: &'a str) -> Reply<'a, u64> {
        Box::pin(async move {
            let lost = self.begin().await?;
            Self::end(lost, self.inner.head(name).await)
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> Reply<'a, Page> {
        Box::pin(async move {
            let lost = self.begin().await?;
            if self.with(|state| state.rates.list_lag == 0) {
                return Self::end(lost, self.inner.list(prefix, after, limit).await);
            }
            let late = self.late_list(prefix).await?.into_iter();
            let mut objects: Vec<_> =
                late.filter(|object| after.is_none_or(|after| object.name.as_str() > after)).collect();
            let more = objects.len() > limit;
            objects.truncate(limit);
            let next = objects.last().filter(|_| more).map(|last| last.name.clone());
            Self::end(lost, Ok(Page { objects, next }))
        })
    }

    fn delete<'a>(&'a self, name: &'a str) -> Reply<'a, ()> {
        Box::pin(async move {
            let lost = self.begin().await?;
            let bytes = self.inner.head(name).await.ok();
            let result = self.inner.delete(name).await;
            if let (Ok(()), Some(bytes)) = (&result, bytes) {
                self.changed(name, Some(bytes));
            }
            Self::end(lost, result)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;

    struct Subject(Arc<Unreliable>);

    impl crate::contract::Subject for Subject {
        fn store(&self) -> Arc<dyn Store> {
            self.0.clone()
        }
    }

    // As long as nothing is to fail, it is a store like any other.
    crate::object_contract!(Some(Subject(Arc::new(Unreliable::new(Arc::new(Memory::new()), 1)))));

    async fn outcomes(seed: u64, rates: Rates) -> (Vec<String>, BTreeMap<&'static str, u64>) {
        let store = Unreliable::new(Arc::new(Memory::new()), seed);
        store.put("a", vec![7; 1000].into()).await.unwrap();
        store.set_rates(rates);
        let mut outcomes = Vec::new();
        for _ in 0..300 {
            let mut slot = vec![0; 100];
            let mut landing = Landing::of(&mut slot);
            let result = store.get("a", 500, &mut landing).await;
            let taken = landing.taken();
            outcomes.push(format!("{result:?} {taken} {slot:?}"));
        }
        (outcomes, store.injected())
    }

    #[tokio::test(start_paused = true)]
    async fn a_seed_replays_every_fault() {
        let (first, injected) = outcomes(7, Rates::all(100)).await;
        assert_eq!(first, outcomes(7, Rates::all(100)).await.0);
        assert_ne!(first, outcomes(8, Rates::all(100)).await.0);
        let kinds = ["failed", "flipped", "lost", "misplaced", "reset", "slow", "throttled", "truncated"];
        assert!(injected.keys().copied().eq(kinds), "every kind came up: {injected:?}");
    }

    #[tokio::test]
    async fn a_late_list_shows_the_past() {
        let store = Unreliable::new(Arc::new(Memory::new()), 1);
        store.put("a", Bytes::new()).await.unwrap();
        store.set_rates(Rates { list_lag: 3, ..Rates::default() });
        let names = async || {
            let page = store.list("", None, 10).await.unwrap();
            page.objects.into_iter().map(|object| object.name).collect::<Vec<_>>()
        };
        for _ in 0..3 {
            store.head("a").await.unwrap();
        }
        store.put("b", Bytes::new()).await.unwrap();
        store.delete("a").await.unwrap();
        assert_eq!(names().await, ["a"]);
        for _ in 0..3 {
            let _ = store.head("a").await;
        }
        assert_eq!(names().await, ["b"]);
    }

    #[tokio::test]
    async fn a_store_that_is_down_does_nothing() {
        let memory = Arc::new(Memory::new());
        let store = Unreliable::new(memory.clone(), 1);
        store.set_down(true);
        assert!(matches!(store.put("a", Bytes::new()).await, Err(StoreError::Broken { .. })));
        assert!(memory.with(|objects| objects.is_empty()));
    }
}
