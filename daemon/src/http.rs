//! Health and metrics over HTTP: `/livez`, `/readyz`, `/startupz` (all with `?verbose`) and `/metrics`.
//!
//! Liveness asks the event loops alone: a daemon whose disk is slow is not to be killed. Readiness turns false
//! while it drains, start-up stays false until recovery is over. Connections are few and short: one request
//! each, a header within [`HEADER_LIMIT`], 16 KiB of it, and at most [`CONNECTIONS_MAX`] at a time, of which the
//! oldest goes when another comes. So a probe gets through however many callers sit there and say nothing.

use std::collections::VecDeque;
use std::fmt::Write;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;

/// Connections at one moment.
pub const CONNECTIONS_MAX: usize = 64;
/// Time within which a caller must have sent its header.
pub const HEADER_LIMIT: Duration = Duration::from_secs(5);
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);

/// One thing that must be well.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Check {
    /// What.
    pub name: String,
    /// `Err` says why it is not well.
    pub state: Result<(), String>,
}

/// What the daemon says of itself. Asked for each request, so it answers at once.
pub trait HealthSource: Send + Sync + 'static {
    /// Whether every event loop comes around.
    fn live(&self) -> Vec<Check>;
    /// Whether new work is taken.
    fn ready(&self) -> Vec<Check>;
    /// Whether recovery is over.
    fn started(&self) -> Vec<Check>;
    /// Brings gauges up to date before they are rendered.
    fn refresh_metrics(&self) {}
}

struct Shared {
    source: Arc<dyn HealthSource>,
    metrics: PrometheusHandle,
}

/// The routes.
pub fn router(source: Arc<dyn HealthSource>, metrics: PrometheusHandle) -> Router {
    type Checks = fn(&dyn HealthSource) -> Vec<Check>;
    let health = |checks: Checks| {
        get(async move |State(shared): State<Arc<Shared>>, Query(query): Query<Vec<(String, String)>>| {
            answer(&checks(&*shared.source), query.iter().any(|(name, _)| name == "verbose"))
        })
    };
    Router::new()
        .route("/", get(async || "kvd\n\n/livez?verbose\n/readyz?verbose\n/startupz?verbose\n/metrics\n"))
        .route("/livez", health(<dyn HealthSource>::live))
        .route("/readyz", health(<dyn HealthSource>::ready))
        .route("/startupz", health(<dyn HealthSource>::started))
        .route("/metrics", get(render))
        .with_state(Arc::new(Shared { source, metrics }))
}

async fn render(State(shared): State<Arc<Shared>>) -> Response {
    shared.source.refresh_metrics();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], shared.metrics.render())
        .into_response()
}

fn answer(checks: &[Check], verbose: bool) -> Response {
    let well = checks.iter().all(|check| check.state.is_ok());
    let mut text = String::new();
    for Check { name, state } in checks {
        let _ = match state {
            Ok(()) if verbose => writeln!(text, "[+] {name} ok"),
            Ok(()) => Ok(()),
            Err(why) => writeln!(text, "[-] {name}: {why}"),
        };
    }
    text.push_str(if well { "ok\n" } else { "failed\n" });
    (if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, text).into_response()
}

/// Opens the listener. The address that was got, with its port, is `local_addr()`.
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Answers until `end` is done. Safe to drop at any point.
pub async fn serve(listener: TcpListener, router: Router, end: impl Future<Output = ()>) {
    let mut open: VecDeque<AbortHandle> = VecDeque::new();
    tokio::pin!(end);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut end => return,
        };
        let Ok((stream, _)) = accepted else {
            // Out of descriptors, or the caller is gone already. Do not spin on the former.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        open.retain(|one| !one.is_finished());
        if open.len() == CONNECTIONS_MAX
            && let Some(oldest) = open.pop_front()
        {
            oldest.abort();
        }
        let service = TowerToHyperService::new(router.clone());
        let answering = tokio::spawn(async move {
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEADER_LIMIT).max_buf_size(16 << 10);
            http.keep_alive(false);
            let connection = http.serve_connection(TokioIo::new(stream), service);
            let _ = tokio::time::timeout(CONNECTION_LIMIT, connection).await;
        });
        open.push_back(answering.abort_handle());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    struct Draining;

    impl HealthSource for Draining {
        fn live(&self) -> Vec<Check> {
            vec![Check { name: "shard-0".into(), state: Ok(()) }]
        }
        fn ready(&self) -> Vec<Check> {
            let draining = Check { name: "drain".into(), state: Err("draining since 3s".into()) };
            [self.live(), vec![draining]].concat()
        }
        fn started(&self) -> Vec<Check> {
            vec![]
        }
        fn refresh_metrics(&self) {
            crate::metrics::READY.gauge(&[]).set(0.0);
        }
    }

    async fn ask(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: k\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    #[tokio::test]
    async fn probes_tell_what_is_wrong() {
        let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let router = router(Arc::new(Draining), crate::metrics::install("node-7"));
        let server = tokio::spawn(serve(listener, router, async { drop(stopped.await) }));

        assert_eq!(ask(address, "/livez").await, (200, "ok\n".into()));
        assert_eq!(ask(address, "/livez?verbose").await, (200, "[+] shard-0 ok\nok\n".into()));
        assert_eq!(ask(address, "/readyz").await, (503, "[-] drain: draining since 3s\nfailed\n".into()));
        let verbose = "[+] shard-0 ok\n[-] drain: draining since 3s\nfailed\n";
        assert_eq!(ask(address, "/readyz?verbose=1").await, (503, verbose.into()));
        assert_eq!(ask(address, "/startupz").await.0, 200);
        assert_eq!(ask(address, "/none").await.0, 404);
        let (status, text) = ask(address, "/metrics").await;
        assert!(status == 200 && text.contains("kvd_ready 0\n"), "{text}");

        // More connections than there are slots, all silent, do not stop those that speak: the oldest go.
        let mut quiet = Vec::new();
        for _ in 0..3 * CONNECTIONS_MAX {
            quiet.push(TcpStream::connect(address).await.unwrap());
        }
        assert_eq!(ask(address, "/livez").await.0, 200);
        assert_eq!(quiet[0].read(&mut [0; 8]).await.unwrap_or(0), 0, "dropped");
        // Nor do those that ask again and again: each connection is for one answer.
        let mut again = TcpStream::connect(address).await.unwrap();
        again.write_all(b"GET /livez HTTP/1.1\r\nhost: k\r\n\r\n").await.unwrap();
        let mut text = String::new();
        again.read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        drop(quiet);
        stop.send(()).unwrap();
        server.await.unwrap();
        assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
    }
}
