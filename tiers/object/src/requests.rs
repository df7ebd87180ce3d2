//! Every request to the store goes through here: not more at once than the store takes, none while its circuit is
//! open, again when that may help, and over when the deadline is.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::circuit::{Circuit, CircuitLimits, Standing};
use crate::pace::{Pace, PaceLimits};
use crate::random::Random;
use crate::retry::{Budget, RetryLimits};
use crate::store::StoreError;

/// What a request does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// Writes an object.
    Put,
    /// Reads a range.
    Get,
    /// Asks for a length.
    Head,
    /// Lists a page.
    List,
    /// Deletes an object.
    Delete,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Put, Self::Get, Self::Head, Self::List, Self::Delete];

    /// Label in metrics and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::Head => "head",
            Self::List => "list",
            Self::Delete => "delete",
        }
    }
}

/// Bounds of all requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RequestLimits {
    /// How often and how soon again.
    pub retry: RetryLimits,
    /// How many at once.
    pub pace: PaceLimits,
    /// When not at all.
    pub circuit: CircuitLimits,
    /// Longest time of one attempt that moves little.
    pub attempt_max: Duration,
    /// Longest time of one attempt that writes a pack.
    pub put_attempt_max: Duration,
}

impl Default for RequestLimits {
    /// 10 s an attempt, 60 s for one that writes.
    fn default() -> Self {
        Self {
            retry: RetryLimits::default(),
            pace: PaceLimits::default(),
            circuit: CircuitLimits::default(),
            attempt_max: Duration::from_secs(10),
            put_attempt_max: Duration::from_secs(60),
        }
    }
}

/// Why something was not done.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RequestError {
    /// The store's last word, or what came instead of one.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The circuit is open: nothing was asked.
    #[error("the store is out of service")]
    Degraded,
}

/// Counts of one kind of request.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Count {
    /// Attempts, the first of each operation too.
    pub requests: u64,
    /// Attempts that were not the first.
    pub retries: u64,
    /// Attempts that went well.
    pub well: u64,
    /// Bytes of bodies, of attempts that went well.
    pub bytes: u64,
    /// How attempts ended that did not go well, by [`StoreError::name`].
    pub errors: BTreeMap<&'static str, u64>,
}

/// How the store does.
#[derive(Clone, Debug)]
pub struct RequestReport {
    /// Counts by kind.
    pub counts: BTreeMap<Kind, Count>,
    /// Requests that may be under way.
    pub window: u32,
    /// Requests that are.
    pub under_way: u32,
    /// Times the window was halved.
    pub cuts: u64,
    /// How the circuit stands.
    pub circuit: Standing,
    /// Times it opened.
    pub circuit_opened: u64,
    /// Operations that were not even tried because it was open.
    pub circuit_refused: u64,
    /// Retries left.
    pub retries_left: u32,
    /// The newest failure, in words. Holds no secret.
    pub last_error: Option<String>,
}

/// The gate that every request passes.
pub struct Requests {
    limits: RequestLimits,
    zero: Instant,
    state: Mutex<State>,
    room: Notify,
}

struct State {
    pace: Pace,
    budget: Budget,
    circuit: Circuit,
    random: Random,
    counts: BTreeMap<Kind, Count>,
    refused: u64,
    last_error: Option<String>,
}

impl Requests {
    /// The gate before a store nothing is known about. The seed spreads the retries of many nodes.
    pub fn new(limits: RequestLimits, seed: u64) -> Self {
        let state = State {
            pace: Pace::new(limits.pace),
            budget: Budget::new(limits.retry),
            circuit: Circuit::new(limits.circuit, seed ^ 1),
            random: Random::new(seed),
            counts: Kind::ALL.map(|kind| (kind, Count::default())).into(),
            refused: 0,
            last_error: None,
        };
        Self { limits, zero: Instant::now(), state: Mutex::new(state), room: Notify::new() }
    }

    /// Time since the beginning, on the clock that everything here is measured by.
    pub fn now(&self) -> Duration {
        self.zero.elapsed()
    }

    /// How the store does.
    pub fn report(&self) -> RequestReport {
        self.with(|state| RequestReport {
            counts: state.counts.clone(),
            window: state.pace.window(),
            under_way: state.pace.under_way(),
            cuts: state.pace.cuts(),
            circuit: state.circuit.standing(),
            circuit_opened: state.circuit.opened(),
            circuit_refused: state.refused,
            retries_left: state.budget.left(),
            last_error: state.last_error.clone(),
        })
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().expect("nothing panics under this lock"))
    }

    /// So many bytes were moved by requests of this kind that went well.
    pub(crate) fn moved(&self, kind: Kind, bytes: u64) {
        self.with(|state| state.counts.entry(kind).or_default().bytes += bytes);
    }

    /// One operation that has to end by `deadline`; see [`attempts`].
    pub(crate) fn operation(&self, kind: Kind, deadline: Instant) -> Operation<'_> {
        Operation { requests: self, kind, deadline, attempts: 0, wait: Duration::ZERO, last: None }
    }
}

/// One operation and its attempts.
pub(crate) struct Operation<'a> {
    requests: &'a Requests,
    kind: Kind,
    deadline: Instant,
    attempts: u32,
    wait: Duration,
    last: Option<StoreError>,
}

/// The result of an operation of `$requests`, after as many attempts as it takes. `$attempt` makes the future of one.
macro_rules! attempts {
    ($requests:expr, $kind:expr, $deadline:expr, $attempt:expr) => {{
        let mut operation = $requests.operation($kind, $deadline);
        loop {
            let pass = match operation.admit().await {
                Ok(pass) => pass,
                Err(error) => break Err(error),
            };
            let result = pass.run($attempt).await;
            if let Some(result) = operation.settle(result) {
                break result;
            }
        }
    }};
}
pub(crate) use attempts;

impl<'a> Operation<'a> {
    /// Waits until the next attempt may be made.
    pub(crate) async fn admit(&mut self) -> Result<Pass<'a>, RequestError> {
        let requests = self.requests;
        if !self.wait.is_zero() {
            tokio::time::sleep(self.wait).await;
        }
        loop {
            let room = requests.room.notified();
            let now = requests.now();
            let begun = requests.with(|state| {
                if !state.pace.begin() {
                    return Ok(false);
                }
                if state.circuit.admit(now) {
                    // Who is let in passes the word on, if there is room for more.
                    if state.pace.under_way() < state.pace.window() {
                        requests.room.notify_one();
                    }
                    return Ok(true);
                }
                state.pace.end(now, now, None);
                state.refused += 1;
                Err(RequestError::Degraded)
            });
            match begun {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => {
                    requests.room.notify_one();
                    return Err(self.last.take().map_or(error, RequestError::Store));
                }
            }
            if tokio::time::timeout_at(self.deadline, room).await.is_err() {
                return Err(self.last.take().unwrap_or(StoreError::Timeout).into());
            }
        }
        self.attempts += 1;
        let retry = u64::from(self.attempts > 1);
        requests.with(|state| {
            let count = state.counts.entry(self.kind).or_default();
            count.requests += 1;
            count.retries += retry;
        });
        let longest = match self.kind {
            Kind::Put => requests.limits.put_attempt_max,
            _ => requests.limits.attempt_max,
        };
        let until = self.deadline.min(Instant::now() + longest);
        Ok(Pass { requests, began: requests.now(), until, ended: false })
    }

    /// What an attempt came to: the operation's result, or `None` when it is to be tried again.
    pub(crate) fn settle<T>(&mut self, result: Result<T, StoreError>) -> Option<Result<T, RequestError>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        self.requests.with(|state| {
            let error = match result {
                Ok(value) => {
                    state.budget.earn();
                    state.counts.entry(self.kind).or_default().well += 1;
                    return Some(Ok(value));
                }
                Err(error) => error,
            };
            *state.counts.entry(self.kind).or_default().errors.entry(error.name()).or_default() += 1;
            if !error.is_passing() {
                return Some(Err(error.into()));
            }
            let told = match &error {
                StoreError::Throttled { retry_after } => *retry_after,
                _ => None,
            };
            state.last_error = Some(error.to_string());
            let Some(wait) = state.budget.retry(self.attempts, told, left, &mut state.random) else {
                return Some(Err(error.into()));
            };
            self.wait = wait;
            self.last = Some(error);
            None
        })
    }
}

/// The right to make one attempt. Gives its place back when it is dropped.
pub(crate) struct Pass<'a> {
    requests: &'a Requests,
    began: Duration,
    until: Instant,
    ended: bool,
}

impl Pass<'_> {
    /// Makes the attempt, in the time that there is.
    pub(crate) async fn run<T>(
        mut self,
        attempt: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let result = match tokio::time::timeout_at(self.until, attempt).await {
            Ok(result) => result,
            Err(_) => Err(StoreError::Timeout),
        };
        let well = match &result {
            // Whatever the store says, it works.
            Ok(_) | Err(StoreError::Absent | StoreError::Exists | StoreError::Short { .. }) => Some(true),
            Err(StoreError::Throttled { .. }) => Some(false),
            Err(_) => None,
        };
        let now = self.requests.now();
        self.requests.with(|state| {
            state.pace.end(self.began, now, well);
            match (well, &result) {
                (Some(true), _) => state.circuit.answered(),
                // The request was wrong, not the store.
                (Some(false), _) | (_, Err(StoreError::Invalid { .. })) => state.circuit.dropped(),
                _ => state.circuit.struck(now),
            }
            if let (None, Err(error)) = (well, &result) {
                state.last_error = Some(error.to_string());
            }
        });
        self.ended = true;
        result
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let now = self.requests.now();
            self.requests.with(|state| {
                state.pace.end(self.began, now, None);
                state.circuit.dropped();
            });
        }
        self.requests.room.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn broken() -> StoreError {
        StoreError::broken("on purpose")
    }

    async fn run(
        requests: &Requests,
        within: Duration,
        mut attempt: impl FnMut(u32) -> Result<u32, StoreError>,
    ) -> Result<u32, RequestError> {
        let mut number = 0;
        attempts!(requests, Kind::Get, Instant::now() + within, {
            number += 1;
            let result = attempt(number);
            async move { result }
        })
    }

    const LONG: Duration = Duration::from_secs(100);

    #[tokio::test(start_paused = true)]
    async fn what_passes_is_tried_again_and_what_lasts_is_not() {
        let requests = Requests::new(RequestLimits::default(), 1);
        let third = run(&requests, LONG, |number| if number == 3 { Ok(number) } else { Err(broken()) }).await;
        assert_eq!(third, Ok(3));
        assert_eq!(run(&requests, LONG, |_| Err(StoreError::Absent)).await, Err(StoreError::Absent.into()));
        assert_eq!(run(&requests, LONG, |_| Err(broken())).await, Err(broken().into()));
        let count = &requests.report().counts[&Kind::Get];
        assert_eq!((count.requests, count.retries), (3 + 1 + 5, 2 + 4));
        assert_eq!(count.errors, [("absent", 1), ("broken", 7)].into());
    }

    #[tokio::test(start_paused = true)]
    async fn an_operation_ends_by_its_deadline() {
        let requests = Requests::new(RequestLimits::default(), 1);
        for within in [1, 20, 200, 3000].map(Duration::from_millis) {
            let began = Instant::now();
            let result: Result<(), _> =
                attempts!(requests, Kind::Get, began + within, std::future::pending());
            assert!(matches!(result, Err(RequestError::Store(StoreError::Timeout))));
            assert!(began.elapsed() <= within + Duration::from_millis(2), "{:?}", began.elapsed());
        }
        // One that is told to come again too late ends at once.
        let told = StoreError::Throttled { retry_after: Some(LONG) };
        let began = Instant::now();
        assert_eq!(run(&requests, LONG, |_| Err(told.clone())).await, Err(told.clone().into()));
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_sick_store_is_left_alone_and_tried_one_at_a_time() {
        let requests = Requests::new(RequestLimits::default(), 1);
        while requests.report().circuit == Standing::Closed {
            let _ = run(&requests, LONG, |_| Err(broken())).await;
        }
        let before = requests.report();
        let asked = before.counts[&Kind::Get].requests;
        for _ in 0..100 {
            assert_eq!(run(&requests, LONG, |_| Ok(1)).await, Err(RequestError::Degraded));
        }
        let report = requests.report();
        assert_eq!(
            (report.counts[&Kind::Get].requests, report.circuit_refused),
            (asked, before.circuit_refused + 100)
        );
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(run(&requests, LONG, Ok).await, Ok(1));
        assert_eq!(requests.report().circuit, Standing::Closed);
    }

    #[tokio::test(start_paused = true)]
    async fn throttling_lowers_how_many_are_under_way_at_once() {
        let requests = Arc::new(Requests::new(RequestLimits::default(), 1));
        let (now, most) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let wave = async |throttle: bool| {
            most.store(0, Ordering::SeqCst);
            let tasks: Vec<_> = (0..200)
                .map(|_| {
                    let (requests, now, most) = (requests.clone(), now.clone(), most.clone());
                    tokio::spawn(async move {
                        let mut first = throttle;
                        let result: Result<(), _> =
                            attempts!(requests, Kind::Get, Instant::now() + LONG, async {
                                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                                tokio::time::sleep(Duration::from_millis(10)).await;
                                now.fetch_sub(1, Ordering::SeqCst);
                                let refused = std::mem::take(&mut first);
                                if refused {
                                    Err(StoreError::Throttled { retry_after: None })
                                } else {
                                    Ok(())
                                }
                            });
                        result
                    })
                })
                .collect();
            let mut well = 0;
            for task in tasks {
                well += u32::from(task.await.unwrap().is_ok());
            }
            (well, most.load(Ordering::SeqCst))
        };
        assert_eq!(wave(false).await, (200, 64));
        let before = requests.report().window;
        wave(true).await;
        let report = requests.report();
        assert!(report.window < before / 2 && report.cuts >= 3, "{report:?}");
        let (well, most) = wave(false).await;
        assert!(well == 200 && most < 40, "{most} at once after throttling");
        assert_eq!(report.under_way, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_attempt_gives_its_place_back() {
        let requests = Requests::new(RequestLimits::default(), 1);
        for _ in 0..1000 {
            let attempt = async {
                let result: Result<(), _> =
                    attempts!(requests, Kind::Put, Instant::now() + LONG, std::future::pending());
                result
            };
            let _ = tokio::time::timeout(Duration::from_millis(1), attempt).await;
        }
        assert_eq!(requests.report().under_way, 0);
        assert_eq!(run(&requests, LONG, Ok).await, Ok(1));
    }
}
