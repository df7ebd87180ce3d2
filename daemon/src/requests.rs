//! Counts and times every gRPC request, by method and result.
//!
//! The time ends with the head of the answer: for a call with one answer that is all of it, for a stream it is
//! how long the caller waits for it to begin. Until then it is under way, and a drain waits for it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::http::{Request, Response};
use tonic::Code;
use tower::{Layer, Service};

use crate::drain::Drain;
use crate::metrics::{REQUEST_SECONDS, REQUESTS};

/// Wraps the whole gRPC server.
#[derive(Clone, Default)]
pub struct Timed(pub Arc<Drain>);

/// A service whose requests are counted and timed.
#[derive(Clone)]
pub struct TimedService<S>(S, Arc<Drain>);

impl<S> Layer<S> for Timed {
    type Service = TimedService<S>;
    fn layer(&self, inner: S) -> TimedService<S> {
        TimedService(inner, Arc::clone(&self.0))
    }
}

impl<S, A, B> Service<Request<A>> for TimedService<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let started = Instant::now();
        let under_way = self.1.enter();
        let path = request.uri().path().to_owned();
        let answer = self.0.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            drop(under_way);
            let result = answer
                .headers()
                .get("grpc-status")
                .map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes()));
            let method = method(&path, result);
            REQUESTS.counter(&[method, &format!("{result:?}")]).increment(1);
            REQUEST_SECONDS.histogram(&[method]).record(started.elapsed().as_secs_f64());
            Ok(answer)
        })
    }
}

/// `Service/Method` of our own services; anything else, and methods that are not there, are `other`, so that
/// a caller cannot make series.
fn method(path: &str, result: Code) -> &str {
    let ours = path.strip_prefix("/kv.v1.").filter(|_| result != Code::Unimplemented);
    ours.unwrap_or("other")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_cannot_make_series() {
        assert_eq!(method("/kv.v1.Blocks/Lookup", Code::Ok), "Blocks/Lookup");
        assert_eq!(method("/kv.v1.Blocks/Lookup", Code::ResourceExhausted), "Blocks/Lookup");
        assert_eq!(method("/kv.v1.Blocks/Nonsense", Code::Unimplemented), "other");
        assert_eq!(method("/grpc.health.v1.Health/Check", Code::Ok), "other");
    }

    #[tokio::test]
    async fn requests_are_counted_by_result() {
        let handle = crate::metrics::install("node-7");
        let service = tower::service_fn(async |_: Request<()>| {
            Ok::<_, std::convert::Infallible>(
                Response::builder().header("grpc-status", "8").body(()).unwrap(),
            )
        });
        let request = Request::builder().uri("/kv.v1.Test/Put").body(()).unwrap();
        Timed::default().layer(service).call(request).await.unwrap();
        let line = "kvd_requests_total{method=\"Test/Put\",result=\"ResourceExhausted\"} 1";
        let text = handle.render();
        assert!(text.lines().any(|found| found == line), "{text}");
    }
}
