//! The one door to the daemon: where it is, how to get in, and what to say when nobody opens.

use std::future::Future;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kv_api::v1::admin_client::AdminClient;
use kv_api::v1::blocks_client::BlocksClient;
use kv_api::v1::worker_client::WorkerClient;
use kv_block::code::Code;
use kv_block::place::GRPC_SOCKET;
use kv_client::{Client, ClientOptions, Endpoint, Error, Tls};
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use crate::cli::Global;
use crate::exit::{Exit, Failure};

/// Given to the daemon's own answer to arrive after the daemon's deadline.
const GRACE: Duration = Duration::from_millis(200);

/// Where the daemon is looked for: `--endpoint`, else the usual places.
pub(crate) fn endpoint(global: &Global) -> Result<Endpoint, Failure> {
    let Some(text) = global.endpoint.as_deref() else { return Ok(Endpoint::local()) };
    let path = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:"));
    if let Some(path) = path.or_else(|| text.contains('/').then_some(text).filter(|t| !t.contains("://"))) {
        return Ok(Endpoint::Socket(path.into()));
    }
    let uri = text.to_owned();
    match text.split_once("://") {
        Some(("http", _)) => Ok(Endpoint::Uri { uri, tls: None }),
        Some(("https", _)) => {
            let ca = global.tls_ca.clone().ok_or_else(|| {
                Failure::usage("https needs to know who signed the daemon's certificate")
                    .help("add --tls-ca FILE")
            })?;
            let identity = global.tls_cert.clone().zip(global.tls_key.clone());
            Ok(Endpoint::Uri { uri, tls: Some(Tls { ca, identity, name: global.tls_name.clone() }) })
        }
        _ => Err(Failure::usage(format!("`{text}` is not an endpoint"))
            .help("write a socket path like /run/kvd/kvd.sock, or https://host:port")),
    }
}

/// The socket behind an endpoint on this machine.
pub(crate) fn socket(endpoint: &Endpoint) -> Option<PathBuf> {
    match endpoint {
        Endpoint::Socket(path) if path.extension().is_some_and(|extension| extension == "sock") => {
            Some(path.clone())
        }
        Endpoint::Socket(path) => Some(path.join(GRPC_SOCKET)),
        Endpoint::Uri { .. } => None,
    }
}

/// A daemon that answered the door. Every call ends at `--timeout`.
pub(crate) struct Daemon {
    pub(crate) client: Client,
    timeout: Duration,
}

impl Daemon {
    pub(crate) fn admin(&self) -> AdminClient<Channel> {
        self.client.admin()
    }

    pub(crate) fn blocks(&self) -> BlocksClient<Channel> {
        self.client.blocks()
    }

    pub(crate) fn sessions(&self) -> WorkerClient<Channel> {
        self.client.sessions()
    }

    /// A request that tells the daemon how long it has.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    /// How long a call may take.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The same daemon with more patience, or less.
    pub(crate) fn patient(&self, timeout: Duration) -> Self {
        Self { client: self.client.clone(), timeout }
    }

    /// [`Daemon::within`] for calls that older daemons do not know: `None` from them.
    pub(crate) async fn within_if_known<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<Option<T>, Failure> {
        let asked = async {
            match call.await {
                Err(status) if unknown(&status) => Ok(Response::new(None)),
                answer => answer.map(|answer| Response::new(Some(answer.into_inner()))),
            }
        };
        self.within(asked).await
    }

    /// The answer, or what is said when it does not come.
    pub(crate) async fn within<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Failure> {
        match tokio::time::timeout(self.timeout + GRACE, call).await {
            Ok(answer) => Ok(answer?.into_inner()),
            Err(_) => Err(silent()),
        }
    }
}

/// Whether a daemon of another version does not know the call at all. One that knows it and cannot do it says why.
fn unknown(status: &Status) -> bool {
    status.code() == tonic::Code::Unimplemented && status.details().is_empty()
}

/// Connects, within `--timeout`.
pub(crate) async fn connect(global: &Global) -> Result<Daemon, Failure> {
    let endpoint = endpoint(global)?;
    if let Some(path) = socket(&endpoint) {
        knock(&path, global.timeout).await?;
    }
    let options = ClientOptions { endpoint, deadline: global.timeout };
    let client = Client::connect(options).await.map_err(|error| match error {
        Error::Fault(fault) if fault.code == Code::DeadlinePassed => silent(),
        error => error.into(),
    })?;
    Ok(Daemon { client, timeout: global.timeout })
}

/// Opens the socket once by hand: the errno tells what is wrong, which the layers above would bury.
async fn knock(path: &Path, timeout: Duration) -> Result<(), Failure> {
    let shown = path.display();
    let unreachable = |message: String| Failure::new(Exit::Unreachable, message);
    match tokio::time::timeout(timeout, tokio::net::UnixStream::connect(path)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(match error.kind() {
            ErrorKind::NotFound => unreachable(format!("no daemon: {shown} does not exist"))
                .help(format!("start it with `{}`, or name its socket with --endpoint", start())),
            ErrorKind::ConnectionRefused => unreachable(format!("no daemon listens on {shown}"))
                .help(format!("it has stopped: start it with `{}`; its log says why", start())),
            ErrorKind::PermissionDenied => {
                Failure::new(Exit::Denied, format!("{shown} may not be opened by this user"))
                    .help("become a member of its group (`ls -l` shows it), or use sudo")
            }
            _ => unreachable(format!("cannot connect to {shown}: {error}")).help("see `kvctl doctor`"),
        }),
        Err(_) => Err(silent()),
    }
}

/// The command that starts the daemon on this machine.
pub(crate) fn start() -> &'static str {
    if Path::new("/run/systemd/system").exists() { "sudo systemctl start kvd" } else { "kvd" }
}

/// Nothing came in time.
fn silent() -> Failure {
    Failure::new(Exit::Unreachable, "the daemon did not answer in time")
        .help("allow more with --timeout 60s; the daemon's log may tell what keeps it")
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Fault(fault) => fault.into(),
            Error::Option { .. } => Self::usage(error.to_string()).help("see `kvctl options`"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn global(endpoint: &str) -> Global {
        Global {
            endpoint: Some(endpoint.into()),
            timeout: Duration::from_secs(1),
            tls_ca: None,
            tls_cert: None,
            tls_key: None,
            tls_name: None,
        }
    }

    #[test]
    fn endpoints_are_sockets_or_urls() {
        for text in ["unix:///run/kvd.sock", "unix:/run/kvd.sock", "/run/kvd.sock"] {
            assert_eq!(endpoint(&global(text)), Ok(Endpoint::Socket("/run/kvd.sock".into())));
        }
        let directory = endpoint(&global("/run/kvd")).unwrap();
        assert_eq!(socket(&directory), Some("/run/kvd/kvd.sock".into()));
        let url = "http://127.0.0.1:7411";
        assert_eq!(endpoint(&global(url)), Ok(Endpoint::Uri { uri: url.into(), tls: None }));
        for wrong in ["node:7411", "ftp://node", "", "https://no-authority:1"] {
            assert_eq!(endpoint(&global(wrong)).unwrap_err().exit, Exit::Usage, "{wrong}");
        }
    }

    #[test]
    fn https_takes_certificates_from_the_flags() {
        let global = Global {
            tls_ca: Some("ca.pem".into()),
            tls_cert: Some("c.pem".into()),
            tls_key: Some("k.pem".into()),
            ..global("https://node:1")
        };
        let Ok(Endpoint::Uri { tls: Some(tls), .. }) = endpoint(&global) else { panic!("no tls") };
        assert_eq!(tls.identity, Some(("c.pem".into(), "k.pem".into())));
    }
}
