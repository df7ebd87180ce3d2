//! What talks for a [`crate::Client`], so that callers need no runtime of their own.
//!
//! There is one runtime and, behind it, one thread. A caller that waits in a plain thread runs the runtime
//! itself meanwhile: handing a call to the other thread and being woken by it would cost two wake-ups, as
//! much as the daemon takes to answer. The thread behind steps aside for callers and takes over again when
//! none came for [`LINGER`], or at once when somebody awaits a call elsewhere.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};

use crate::error::{Error, unreachable};

/// How long nobody may run the runtime: what the daemon says unasked waits so long at most.
const LINGER: Duration = Duration::from_millis(1);

/// A small runtime and the thread behind it; they end with the last handle.
#[derive(Debug)]
pub(crate) struct Runtime {
    // Dropped before `_stop`, so that the thread has the last one and ends the runtime.
    shared: Arc<Shared>,
    _stop: oneshot::Sender<()>,
}

#[derive(Debug)]
struct Shared {
    runtime: tokio::runtime::Runtime,
    drivers: Mutex<Drivers>,
    changed: Condvar,
    step_aside: Notify,
}

/// Who runs the runtime.
#[derive(Debug)]
struct Drivers {
    /// The thread behind does, or is about to.
    behind: bool,
    callers: usize,
    /// When the last caller stopped.
    last: Instant,
}

impl Shared {
    fn drivers(&self) -> MutexGuard<'_, Drivers> {
        self.drivers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the thread behind does until it is stopped.
    fn run(&self, mut stopped: oneshot::Receiver<()>) {
        loop {
            let aside = async {
                tokio::select! {
                    _ = &mut stopped => false,
                    () = self.step_aside.notified() => true,
                }
            };
            if !self.runtime.block_on(aside) {
                return;
            }
            let mut drivers = self.drivers();
            while !drivers.behind && (drivers.callers > 0 || drivers.last.elapsed() < LINGER) {
                let waited = self.changed.wait_timeout(drivers, LINGER);
                drivers = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            drivers.behind = true;
        }
    }

    /// Runs the runtime here until `work` has ended.
    fn drive<T>(&self, work: impl Future<Output = T>) -> T {
        struct Driving<'a>(&'a Shared);
        impl Drop for Driving<'_> {
            fn drop(&mut self) {
                let mut drivers = self.0.drivers();
                drivers.callers -= 1;
                drivers.last = Instant::now();
            }
        }
        {
            let mut drivers = self.drivers();
            drivers.callers += 1;
            if std::mem::take(&mut drivers.behind) {
                self.step_aside.notify_one();
            }
        }
        let _driving = Driving(self);
        self.runtime.block_on(work)
    }

    /// Has the thread behind run the runtime: somebody depends on it who does not.
    fn run_behind(&self) {
        let mut drivers = self.drivers();
        if !drivers.behind {
            drivers.behind = true;
            self.changed.notify_one();
        }
    }
}

impl Runtime {
    pub(crate) fn start() -> Result<Arc<Self>, Error> {
        let failed = |error: std::io::Error| unreachable(format!("no thread for the client: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let shared = Arc::new(Shared {
            runtime,
            drivers: Mutex::new(Drivers { behind: true, callers: 0, last: Instant::now() }),
            changed: Condvar::new(),
            step_aside: Notify::new(),
        });
        let behind = Arc::clone(&shared);
        let run = move || {
            // Ends when `stop` is dropped; what still runs then is dropped with the runtime.
            behind.run(stopped);
            if let Some(shared) = Arc::into_inner(behind) {
                shared.runtime.shutdown_background();
            }
        };
        std::thread::Builder::new().name("kv-client".into()).spawn(run).map_err(failed)?;
        Ok(Arc::new(Self { shared, _stop: stop }))
    }

    /// Starts `work`. It runs to its end whether or not anybody waits for it.
    pub(crate) fn call<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Call<T> {
        let (sender, receiver) = oneshot::channel();
        self.shared.runtime.spawn(async move {
            let _ = sender.send(work.await);
        });
        Call { answer: Answer::Coming(receiver), runtime: Some(Arc::clone(self)) }
    }

    /// [`Runtime::spawn`] for work that gives something.
    pub(crate) fn task<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::task::JoinHandle<T> {
        let task = self.shared.runtime.spawn(work);
        self.shared.run_behind();
        task
    }

    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.shared.runtime.spawn(work);
        self.shared.run_behind();
    }
}

/// A call under way: `.await` it in any executor, or [`Call::wait`] for it in a plain thread. It has a
/// deadline of its own and runs on when dropped.
#[must_use = "a call may fail; await it or wait for it"]
#[derive(Debug)]
pub struct Call<T> {
    answer: Answer<T>,
    runtime: Option<Arc<Runtime>>,
}

#[derive(Debug)]
enum Answer<T> {
    Coming(oneshot::Receiver<Result<T, Error>>),
    Known(Option<Error>),
}

impl<T> Unpin for Call<T> {}

impl<T> Answer<T> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<T, Error>> {
        match self {
            Self::Coming(receiver) => Pin::new(receiver)
                .poll(context)
                .map(|answer| answer.unwrap_or_else(|_| Err(unreachable("the client was closed")))),
            Self::Known(error) => {
                Poll::Ready(Err(error.take().unwrap_or_else(|| unreachable("the call has ended"))))
            }
        }
    }
}

impl<T> Call<T> {
    pub(crate) fn failed(error: Error) -> Self {
        Self { answer: Answer::Known(Some(error)), runtime: None }
    }

    /// Blocks this thread until the call has ended. Do not use it where other futures share the thread.
    pub fn wait(mut self) -> Result<T, Error> {
        struct Unpark(Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        // A thread that belongs to a runtime cannot run another.
        if let Some(runtime) = self.runtime.clone()
            && tokio::runtime::Handle::try_current().is_err()
        {
            return runtime.shared.drive(std::future::poll_fn(|context| self.answer.poll(context)));
        }
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        loop {
            match Pin::new(&mut self).poll(&mut context) {
                Poll::Ready(answer) => return answer,
                Poll::Pending => std::thread::park(),
            }
        }
    }
}

impl<T> Future for Call<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let polled = self.answer.poll(context);
        if let (Poll::Pending, Some(runtime)) = (&polled, &self.runtime) {
            runtime.shared.run_behind();
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_call_can_be_waited_for_without_a_runtime_and_awaited_in_another_one() {
        let runtime = Runtime::start().unwrap();
        let work = || async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok(7)
        };
        assert_eq!(runtime.call(work()).wait(), Ok(7));
        let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!(other.block_on(runtime.call(work())), Ok(7));
    }

    #[test]
    fn calls_that_are_waited_for_and_calls_that_are_awaited_share_one_runtime() {
        let runtime = Runtime::start().unwrap();
        let nap = |us| async move {
            tokio::time::sleep(Duration::from_micros(us)).await;
            Ok(us)
        };
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let runtime = &runtime;
                scope.spawn(move || {
                    for turn in 0..50 {
                        let us = thread * 100 + turn;
                        assert_eq!(runtime.call(nap(us)).wait(), Ok(us));
                    }
                });
            }
            scope.spawn(|| {
                let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
                other.block_on(async {
                    for us in 0..50 {
                        assert_eq!(runtime.call(nap(us)).await, Ok(us));
                    }
                });
            });
        });
    }

    #[test]
    fn what_nobody_waits_for_goes_on_after_a_caller_has_stepped_back() {
        let runtime = Runtime::start().unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        drop(runtime.call(async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let _ = sender.send(());
            Ok(())
        }));
        assert_eq!(runtime.call(async { Ok(7) }).wait(), Ok(7));
        // The caller that ran the runtime is here and does not run it any more.
        receiver.recv_timeout(Duration::from_secs(30)).unwrap();
    }

    #[test]
    fn a_thread_of_another_runtime_may_wait_too() {
        let runtime = Runtime::start().unwrap();
        let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!(runtime.call(async { Ok(1) }).wait(), Ok(1));
        other.block_on(async {
            let call = runtime.call(async {
                tokio::time::sleep(Duration::from_millis(5)).await;
                Ok(2)
            });
            assert_eq!(call.wait(), Ok(2));
        });
    }

    #[test]
    fn a_call_keeps_its_runtime_and_a_failed_one_says_so() {
        let runtime = Runtime::start().unwrap();
        let call = runtime.call(async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            Ok(())
        });
        drop(runtime);
        assert_eq!(call.wait(), Ok(()));
        assert_eq!(Call::<()>::failed(unreachable("x")).wait(), Err(unreachable("x")));
    }
}
