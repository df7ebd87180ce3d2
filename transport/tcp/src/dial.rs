//! Opening connections.

use std::net::SocketAddr;
use std::sync::Arc;

use kv_transport::link::Wake;
use kv_wire::frame::Message;
use kv_wire::message::{Answer, Ask, DataAnswer, DataAsk};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, TlsStream};

use crate::control::{Control, INBOX_BYTES};
use crate::error::Error;
use crate::inbox::Inbox;
use crate::limits::{FIRST_FRAME_BYTES_MAX, Limits};
use crate::reader::ReaderLink;
use crate::runtimes::Runtimes;
use crate::stream::{Stream, ahead, tune, write_all};
use crate::tls::{PROTOCOL, PeerIdentity, Security};

/// Opens connections to other nodes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Dialer {
    pub(crate) runtimes: Runtimes,
    security: Security,
    pub(crate) limits: Arc<Limits>,
}

/// Who is dialed.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    /// The name that its certificate must carry; none when nothing is proven.
    name: Option<ServerName<'static>>,
}

impl Dialer {
    /// A dialer; its links run on `runtimes`.
    pub fn new(runtimes: Runtimes, security: Security, limits: Limits) -> Self {
        Self { runtimes, security, limits: Arc::new(limits) }
    }

    /// A control connection to `node` at `address` (`host:port`). Its first words must be a Hello, soon. Runs in a
    /// task of the light runtime; may be dropped at any time.
    pub async fn control(&self, address: &str, node: &str) -> Result<Control<Ask, Answer>, Error> {
        let name = self.name(node)?;
        self.in_time(address, async {
            let found = tokio::net::lookup_host(address).await.map_err(failed("resolve", address))?;
            let mut last = Error::Io {
                what: "resolve",
                address: address.to_owned(),
                source: std::io::ErrorKind::NotFound.into(),
            };
            for address in found {
                match self.open(&Target { address, name: name.clone() }).await {
                    Ok((stream, identity)) => {
                        let inbox = Inbox::new(INBOX_BYTES, FIRST_FRAME_BYTES_MAX);
                        let stall = self.limits.stall;
                        return Ok(Control::new(stream, inbox, identity, address, stall, None));
                    }
                    Err(error) => last = error,
                }
            }
            Err(last)
        })
        .await
    }

    /// The reading end of a link to `node` at `address`, for the session that its Welcome named. It begins to connect
    /// at once.
    pub fn link(
        &self,
        address: SocketAddr,
        node: &str,
        session: u128,
        wake: Wake,
    ) -> Result<ReaderLink, Error> {
        let target = Target { address, name: self.name(node)? };
        Ok(ReaderLink::new(self, &target, session, wake))
    }

    fn name(&self, node: &str) -> Result<Option<ServerName<'static>>, Error> {
        match self.security {
            Security::Plain => Ok(None),
            Security::Mutual(_) => match ServerName::try_from(node.to_owned()) {
                Ok(name) => Ok(Some(name)),
                Err(_) => Err(Error::Name { node: node.to_owned() }),
            },
        }
    }

    /// A connection that the owner has let join the session, and what came behind its answer.
    pub(crate) async fn join(&self, target: &Target, session: u128) -> Result<(Stream, Inbox), Error> {
        let address = target.address.to_string();
        self.in_time(&address, async {
            let (mut stream, _) = self.open(target).await?;
            let mut bytes = Vec::new();
            DataAsk::Join(session).encode(&mut bytes);
            let told = write_all(&mut stream, &bytes, self.limits.stall).await;
            told.map_err(failed("talk to", &address))?;
            let mut inbox = Inbox::new(1 << 10, FIRST_FRAME_BYTES_MAX);
            loop {
                let nonsense = |source| Error::Nonsense { address: address.clone(), source };
                match inbox.take().map_err(nonsense)? {
                    Some(DataAnswer::Joined) => return Ok((stream, inbox)),
                    Some(DataAnswer::Refused(refused)) => {
                        return Err(Error::Refused { address: address.clone(), refused });
                    }
                    Some(_) => return Err(Error::Closed { address: address.clone() }),
                    None => {}
                }
                let read = std::future::poll_fn(|cx| inbox.poll_fill(&mut stream, cx)).await;
                if read.map_err(failed("talk to", &address))? == 0 {
                    return Err(Error::Closed { address: address.clone() });
                }
            }
        })
        .await
    }

    async fn open(&self, target: &Target) -> Result<(Stream, PeerIdentity), Error> {
        let address = target.address.to_string();
        let socket = TcpStream::connect(target.address).await.map_err(failed("reach", &address))?;
        tune(&socket, &self.limits);
        let (Security::Mutual(tls), Some(name)) = (&self.security, &target.name) else {
            return Ok((Stream::Plain(socket), PeerIdentity::plain()));
        };
        let secured = TlsConnector::from(Arc::clone(&tls.client)).connect(name.clone(), ahead(socket)).await;
        let secured = secured.map_err(|source| Error::Tls { address: address.clone(), source })?;
        let (_, session) = secured.get_ref();
        if session.alpn_protocol() != Some(PROTOCOL) {
            let source = std::io::Error::other("it is another service than a node's");
            return Err(Error::Tls { address, source });
        }
        let identity = PeerIdentity::proven(session.peer_certificates());
        Ok((Stream::Tls(Box::new(TlsStream::Client(secured))), identity))
    }

    async fn in_time<T>(
        &self,
        address: &str,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout(self.limits.handshake, work).await {
            Ok(done) => done,
            Err(_) => Err(Error::TimedOut { address: address.to_owned() }),
        }
    }
}

fn failed(what: &'static str, address: &str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Io { what, address: address.to_owned(), source }
}
