//! Draining: no new work is taken, and what began before ends by itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;

/// How long the end of the daemon waits for calls under way. Those that are left get KVD-5001.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Whether new work is taken, and how many calls from before it was not are under way.
pub struct Drain {
    on: watch::Sender<bool>,
    calls: AtomicU64,
}

impl Default for Drain {
    fn default() -> Self {
        Self { on: watch::Sender::new(false), calls: AtomicU64::new(0) }
    }
}

impl Drain {
    /// Whether no new work is taken.
    pub fn is_on(&self) -> bool {
        *self.on.borrow()
    }

    /// Starts or ends draining.
    pub fn set(&self, on: bool) {
        self.on.send_replace(on);
    }

    /// To hear of starts and ends.
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.on.subscribe()
    }

    /// A call begins. While draining it does not count: it must not hold up the end.
    pub fn enter(self: &Arc<Self>) -> Option<UnderWay> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        // Counted before the look, so that nobody who starts a drain overlooks it.
        let call = UnderWay(Arc::clone(self));
        (!self.is_on()).then_some(call)
    }

    /// Whether nothing from before is under way.
    pub fn is_idle(&self) -> bool {
        self.calls.load(Ordering::SeqCst) == 0
    }

    /// Waits until nothing from before is under way.
    pub async fn idle(&self) {
        while !self.is_idle() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A call that has not been answered.
pub struct UnderWay(Arc<Drain>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_calls_from_before_hold_up_the_end() {
        let drain = Arc::new(Drain::default());
        let before = drain.enter();
        assert!(before.is_some() && !drain.is_idle());
        drain.set(true);
        assert!(drain.enter().is_none());
        assert!(!drain.is_idle());
        drop(before);
        assert!(drain.is_idle());
        drain.set(false);
        assert!(drain.enter().is_some());
    }
}
