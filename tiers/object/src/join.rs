//! Several futures at once that borrow from their caller, in one task.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;

/// The results of all, in their order. Every wake-up looks at every one that is not ready: for tens of them.
pub(crate) async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut futures: Vec<Pin<Box<F>>> = futures.into_iter().map(Box::pin).collect();
    let mut outputs: Vec<Option<F::Output>> = futures.iter().map(|_| None).collect();
    poll_fn(|context| {
        let mut pending = false;
        for (future, output) in futures.iter_mut().zip(&mut outputs).filter(|(_, output)| output.is_none()) {
            match future.as_mut().poll(context) {
                Poll::Ready(ready) => *output = Some(ready),
                Poll::Pending => pending = true,
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    outputs.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_run_at_once_and_stay_in_order() {
        let began = tokio::time::Instant::now();
        let futures = (0..10u64).rev().map(|number| async move {
            tokio::time::sleep(Duration::from_secs(number)).await;
            number
        });
        assert!(join_all(futures.collect()).await.into_iter().eq((0..10).rev()));
        assert_eq!(began.elapsed(), Duration::from_secs(9));
        assert!(join_all(Vec::<std::future::Ready<()>>::new()).await.is_empty());
    }
}
