//! The one thread behind a [`crate::Client`] that talks, so that callers need no runtime of their own.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use tokio::sync::oneshot;

use crate::error::{Error, unreachable};

/// A small runtime on its own thread; it ends with the last handle.
#[derive(Debug)]
pub(crate) struct Runtime {
    handle: tokio::runtime::Handle,
    _stop: oneshot::Sender<()>,
}

impl Runtime {
    pub(crate) fn start() -> Result<Arc<Self>, Error> {
        let failed = |error: std::io::Error| unreachable(format!("no thread for the client: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let run = move || {
            // Ends when `stop` is dropped; what still runs then is dropped with the runtime.
            let _ = runtime.block_on(stopped);
            runtime.shutdown_background();
        };
        std::thread::Builder::new().name("kv-client".into()).spawn(run).map_err(failed)?;
        Ok(Arc::new(Self { handle, _stop: stop }))
    }

    /// Starts `work` on the thread. It runs to its end whether or not anybody waits for it.
    pub(crate) fn call<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Call<T> {
        let (sender, receiver) = oneshot::channel();
        self.handle.spawn(async move {
            let _ = sender.send(work.await);
        });
        Call { answer: Answer::Coming(receiver), _runtime: Some(Arc::clone(self)) }
    }

    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(work);
    }
}

/// A call under way: `.await` it in any executor, or [`Call::wait`] for it in a plain thread. It has a
/// deadline of its own and runs on when dropped.
#[must_use = "a call may fail; await it or wait for it"]
#[derive(Debug)]
pub struct Call<T> {
    answer: Answer<T>,
    _runtime: Option<Arc<Runtime>>,
}

#[derive(Debug)]
enum Answer<T> {
    Coming(oneshot::Receiver<Result<T, Error>>),
    Known(Option<Error>),
}

impl<T> Unpin for Call<T> {}

impl<T> Call<T> {
    pub(crate) fn failed(error: Error) -> Self {
        Self { answer: Answer::Known(Some(error)), _runtime: None }
    }

    /// Blocks this thread until the call has ended. Do not use it where other futures share the thread.
    pub fn wait(mut self) -> Result<T, Error> {
        struct Unpark(Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
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
        match &mut self.answer {
            Answer::Coming(receiver) => Pin::new(receiver)
                .poll(context)
                .map(|answer| answer.unwrap_or_else(|_| Err(unreachable("the client was closed")))),
            Answer::Known(error) => {
                Poll::Ready(Err(error.take().unwrap_or_else(|| unreachable("the call has ended"))))
            }
        }
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
