//! The one door to the daemon: where it is, how to get in, and what to say when nobody opens.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kv_api::v1::admin_client::AdminClient;
use kv_api::v1::blocks_client::BlocksClient;
use kv_api::v1::worker_client::WorkerClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::cli::Global;
use crate::exit::{Exit, Failure};

/// Largest answer taken: a full page of blocks with long names fits many times.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Where a daemon listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Address {
    /// A Unix socket.
    Socket(PathBuf),
    /// `http://host:port` or `https://host:port`.
    Url(String),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "{}", path.display()),
            Self::Url(url) => f.write_str(url),
        }
    }
}

impl Address {
    /// What `--endpoint` says, or the first socket there is in the usual places.
    pub(crate) fn of(endpoint: Option<&str>) -> Result<Self, Failure> {
        match endpoint {
            Some(text) => Self::parse(text),
            None => Ok(Self::Socket(usual_socket(&usual_sockets(), Path::exists))),
        }
    }

    fn parse(text: &str) -> Result<Self, Failure> {
        let socket = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:"));
        if let Some(path) =
            socket.or_else(|| text.contains('/').then_some(text).filter(|t| !t.contains("://")))
        {
            return Ok(Self::Socket(path.into()));
        }
        if text.starts_with("http://") || text.starts_with("https://") {
            return Ok(Self::Url(text.to_owned()));
        }
        Err(Failure::usage(format!("`{text}` is not an endpoint"))
            .help("write a socket path like /run/kvd/kvd.sock, or https://host:port"))
    }
}

/// Where daemons listen when nobody says otherwise, in the order they are looked for.
fn usual_sockets() -> Vec<PathBuf> {
    let user = std::env::var_os("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("kvd/kvd.sock"));
    let own = format!("/tmp/kvd-{}/kvd.sock", rustix::process::getuid().as_raw());
    std::iter::once("/run/kvd/kvd.sock".into()).chain(user).chain([own.into()]).collect()
}

fn usual_socket(candidates: &[PathBuf], exists: impl Fn(&Path) -> bool) -> PathBuf {
    candidates.iter().find(|path| exists(path)).unwrap_or(&candidates[0]).clone()
}

/// A daemon that answered the door.
pub(crate) struct Daemon {
    pub(crate) admin: AdminClient<Channel>,
    pub(crate) blocks: BlocksClient<Channel>,
    pub(crate) worker: WorkerClient<Channel>,
}

/// Connects, within `--timeout`.
pub(crate) async fn connect(global: &Global) -> Result<Daemon, Failure> {
    let address = Address::of(global.endpoint.as_deref())?;
    let endpoint = match &address {
        Address::Socket(path) => {
            knock(path, global.timeout).await?;
            Endpoint::from_shared(format!("unix:{}", path.display()))
        }
        Address::Url(url) => Endpoint::from_shared(url.clone()),
    };
    let mut endpoint = endpoint
        .map_err(|error| Failure::usage(format!("`{address}` is not an endpoint: {error}")))?
        .connect_timeout(global.timeout)
        .timeout(global.timeout);
    if let Address::Url(url) = &address
        && url.starts_with("https://")
    {
        endpoint = endpoint.tls_config(tls(global)?).map_err(|error| {
            Failure::usage(format!("the certificates cannot be used: {}", causes(&error)))
                .help("--ca, --cert and --key name PEM files")
        })?;
    }
    let channel = endpoint.connect().await.map_err(|error| {
        Failure::new(Exit::Unreachable, format!("cannot connect to {address}: {}", causes(&error)))
            .help("see whether kvd listens there; `kvctl doctor` looks at this machine")
    })?;
    Ok(Daemon {
        admin: AdminClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
        blocks: BlocksClient::new(channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX),
        worker: WorkerClient::new(channel),
    })
}

/// Opens the socket once by hand: the errno tells what is wrong, which the layers above would bury.
async fn knock(path: &Path, timeout: Duration) -> Result<(), Failure> {
    let shown = path.display();
    let unreachable = |message: String| Failure::new(Exit::Unreachable, message);
    match tokio::time::timeout(timeout, tokio::net::UnixStream::connect(path)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(match error.kind() {
            ErrorKind::NotFound => unreachable(format!("no daemon: {shown} does not exist"))
                .help("start it with `systemctl start kvd`, or name its socket with --endpoint"),
            ErrorKind::ConnectionRefused => unreachable(format!("no daemon listens on {shown}"))
                .help("it has stopped: see `journalctl -u kvd`, start it with `systemctl start kvd`"),
            ErrorKind::PermissionDenied => {
                Failure::new(Exit::Denied, format!("{shown} may not be opened by this user"))
                    .help("become a member of its group (`ls -l` shows it), or use sudo")
            }
            _ => unreachable(format!("cannot connect to {shown}: {error}")).help("see `kvctl doctor`"),
        }),
        Err(_) => Err(unreachable(format!("{shown} does not take the connection in time"))
            .help("the daemon hangs or is swamped: see `journalctl -u kvd`")),
    }
}

fn tls(global: &Global) -> Result<ClientTlsConfig, Failure> {
    let read = |path: &Path| {
        std::fs::read(path)
            .map_err(|error| Failure::usage(format!("cannot read {}: {error}", path.display())))
    };
    let mut config = ClientTlsConfig::new();
    if let Some(path) = &global.ca {
        config = config.ca_certificate(Certificate::from_pem(read(path)?));
    }
    if let (Some(cert), Some(key)) = (&global.cert, &global.key) {
        config = config.identity(Identity::from_pem(read(cert)?, read(key)?));
    }
    if let Some(name) = &global.server_name {
        config = config.domain_name(name);
    }
    Ok(config)
}

/// An error with all its sources: transport errors say little by themselves.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_sockets_or_urls() {
        for text in ["unix:///run/kvd.sock", "unix:/run/kvd.sock", "/run/kvd.sock"] {
            assert_eq!(Address::parse(text), Ok(Address::Socket("/run/kvd.sock".into())));
        }
        assert_eq!(Address::parse("./kvd.sock"), Ok(Address::Socket("./kvd.sock".into())));
        let url = "https://node:7411";
        assert_eq!(Address::parse(url), Ok(Address::Url(url.into())));
        for wrong in ["node:7411", "ftp://node", ""] {
            assert_eq!(Address::parse(wrong).unwrap_err().exit, Exit::Usage, "{wrong}");
        }
    }

    #[test]
    fn the_first_socket_there_is_wins_and_the_system_one_is_named_when_there_is_none() {
        let candidates = [PathBuf::from("/run/a"), PathBuf::from("/home/b")];
        assert_eq!(usual_socket(&candidates, |path| path.ends_with("b")), Path::new("/home/b"));
        assert_eq!(usual_socket(&candidates, |_| false), Path::new("/run/a"));
    }
}
