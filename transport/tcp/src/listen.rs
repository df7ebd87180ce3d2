//! Taking connections, and telling them apart.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kv_transport::link::Wake;
use kv_wire::frame::{HEADER_BYTES, Message, WireError};
use kv_wire::message::{Answer, Ask, DataAnswer, DataAsk, Hello, Refusal, Refused};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_rustls::{TlsAcceptor, TlsStream};

use crate::control::{Control, End, INBOX_BYTES};
use crate::door::{Door, Seat};
use crate::error::Error;
use crate::inbox::Inbox;
use crate::limits::{FIRST_FRAME_BYTES_MAX, Limits};
use crate::owner::{OwnerLink, Table};
use crate::runtimes::Runtimes;
use crate::stream::{Stream, ahead, tune, write_all};
use crate::tls::{PROTOCOL, PeerIdentity, Security};

/// Connections that the kernel keeps while nobody has taken them.
const BACKLOG: u32 = 1024;
/// Pause after the kernel could give no connection (no descriptors, no memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A reader has come.
#[derive(Debug)]
pub struct Accepted {
    /// Its first words. Whether its certificate carries [`Hello::node`] is for the receiver to see:
    /// `control.identity().carries(&hello.node)`.
    pub hello: Hello,
    /// The connection.
    pub control: Control<Answer, Ask>,
}

/// An open port. Dropped, it is closed, together with every connection that has not said what it is; others live on.
#[derive(Debug)]
pub struct Listener {
    local: SocketAddr,
    sessions: Sessions,
    door: Arc<Door>,
    accepting: AbortHandle,
}

impl Listener {
    /// Opens a port; what comes there goes to `accepted` (control connections) or to the links of
    /// [`Self::sessions`] (data connections).
    pub fn bind(
        runtimes: &Runtimes,
        address: SocketAddr,
        security: Security,
        limits: Limits,
        accepted: mpsc::Sender<Accepted>,
    ) -> Result<Self, Error> {
        let limits = Arc::new(limits);
        let (listener, local) = {
            let _inside = runtimes.light.enter();
            let listening = listen(address).and_then(|listener| Ok((listener.local_addr()?, listener)));
            let failed = |source| Error::Io { what: "listen at", address: address.to_string(), source };
            let (local, listener) = listening.map_err(failed)?;
            (listener, local)
        };
        let door = Door::new(Arc::clone(&limits));
        let table = Arc::new(Mutex::default());
        let sessions = Sessions { runtimes: runtimes.clone(), limits: Arc::clone(&limits), table };
        let greeter = Greeter { security, limits, accepted, sessions: sessions.clone() };
        let accepting = accept(listener, runtimes.light.clone(), Arc::clone(&door), Arc::new(greeter));
        let accepting = runtimes.light.spawn(accepting).abort_handle();
        Ok(Self { local, sessions, door, accepting })
    }

    /// Where it listens, with the port that the kernel chose if none was given.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Where links are opened. Stays valid without the listener, but nothing joins any more.
    pub fn sessions(&self) -> Sessions {
        self.sessions.clone()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.accepting.abort();
        self.door.clear();
    }
}

/// The sessions whose links data connections may join. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sessions {
    runtimes: Runtimes,
    limits: Arc<Limits>,
    table: Arc<Mutex<HashMap<u128, Arc<Table>>>>,
}

impl Sessions {
    /// The owner's end of a link. It must be there before the Welcome that names `session` is said. With certificates,
    /// only connections whose certificate carries `node`, the reader's name, may join it.
    pub fn link(&self, session: u128, node: &str, wake: Wake) -> OwnerLink {
        let table = Table::new(node, wake, Arc::clone(&self.limits), self.runtimes.clone());
        self.entries().insert(session, Arc::clone(&table));
        OwnerLink::new(table, self.clone(), session)
    }

    /// Ends the data connections of a session whose control connection is over, whatever they are writing.
    pub fn hang_up(&self, session: u128) {
        if let Some(table) = self.find(session) {
            table.hang_up();
        }
    }

    pub(crate) fn forget(&self, session: u128, table: &Arc<Table>) {
        let mut entries = self.entries();
        if entries.get(&session).is_some_and(|entry| Arc::ptr_eq(entry, table)) {
            entries.remove(&session);
        }
    }

    fn find(&self, session: u128) -> Option<Arc<Table>> {
        self.entries().get(&session).cloned()
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<u128, Arc<Table>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A daemon that starts again takes its port back though connections of its last life linger.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn accept(listener: TcpListener, runtime: Handle, door: Arc<Door>, greeter: Arc<Greeter>) {
    let mut well = true;
    loop {
        let (socket, from) = match listener.accept().await {
            Ok(come) => come,
            Err(error) => {
                if std::mem::take(&mut well) {
                    tracing::warn!(%error, "no connection can be taken");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        well = true;
        let Some(seat) = door.enter(from.ip()) else {
            tracing::debug!(%from, "no place for a connection");
            continue;
        };
        let id = seat.id();
        let greeter = Arc::clone(&greeter);
        let task = runtime.spawn(async move { greeter.greet(socket, from, seat).await });
        door.watch(id, task.abort_handle());
    }
}

/// What a connection turned out to be.
enum First {
    Hello(Hello),
    Join(u128),
}

/// Takes a connection to its first frame and then to where it belongs.
#[derive(Debug)]
struct Greeter {
    security: Security,
    limits: Arc<Limits>,
    accepted: mpsc::Sender<Accepted>,
    sessions: Sessions,
}

impl Greeter {
    async fn greet(&self, socket: TcpStream, from: SocketAddr, seat: Seat) {
        let mut inbox = Inbox::new(1 << 10, FIRST_FRAME_BYTES_MAX);
        let shaken = tokio::time::timeout(self.limits.handshake, async {
            let (mut stream, identity) = self.secure(socket).await?;
            let first = first(&mut stream, &mut inbox).await?;
            Ok::<_, End>((stream, identity, first))
        });
        let (stream, identity, first) = match shaken.await {
            Ok(Ok(shaken)) => shaken,
            Ok(Err(why)) => {
                let why: &dyn std::error::Error = &why;
                return tracing::debug!(%from, why, "a connection did not say what it is");
            }
            Err(_) => return tracing::debug!(%from, "a connection did not say in time what it is"),
        };
        match first {
            First::Hello(hello) => self.hello(stream, inbox, identity, from, seat, hello).await,
            First::Join(session) => self.join(stream, inbox, &identity, from, seat, session).await,
        }
    }

    async fn secure(&self, socket: TcpStream) -> std::io::Result<(Stream, PeerIdentity)> {
        tune(&socket, &self.limits);
        let Security::Mutual(tls) = &self.security else {
            return Ok((Stream::Plain(socket), PeerIdentity::plain()));
        };
        let secured = TlsAcceptor::from(Arc::clone(&tls.server)).accept(ahead(socket)).await?;
        let (_, session) = secured.get_ref();
        if session.alpn_protocol() != Some(PROTOCOL) {
            return Err(std::io::Error::other("it wants another service than a node's"));
        }
        let identity = PeerIdentity::proven(session.peer_certificates());
        Ok((Stream::Tls(Box::new(TlsStream::Server(secured))), identity))
    }

    async fn hello(
        &self,
        stream: Stream,
        inbox: Inbox,
        identity: PeerIdentity,
        from: SocketAddr,
        seat: Seat,
        hello: Hello,
    ) {
        if !seat.prove() {
            return;
        }
        let inbox = inbox.with_room(INBOX_BYTES);
        let control = Control::new(stream, inbox, identity, from, self.limits.stall, Some(seat));
        let accepted = self.accepted.send_timeout(Accepted { hello, control }, self.limits.handshake);
        if accepted.await.is_err() {
            tracing::warn!(%from, "nobody takes a new reader");
        }
    }

    async fn join(
        &self,
        mut stream: Stream,
        inbox: Inbox,
        identity: &PeerIdentity,
        from: SocketAddr,
        seat: Seat,
        session: u128,
    ) {
        let table = self.sessions.find(session).filter(|table| identity.carries(table.node()));
        if let Some(table) = table
            && seat.prove()
        {
            // A full or ended session closes it without a word.
            return Table::join(&table, stream, inbox, seat);
        }
        tracing::debug!(%from, "a data connection belongs to no session");
        let refused = Refused { why: Refusal::Session, text: "no such session".into() };
        let mut bytes = Vec::new();
        DataAnswer::Refused(refused).encode(&mut bytes);
        // It may not hear it; it hears the end of the connection in any case.
        let _ = write_all(&mut stream, &bytes, self.limits.handshake).await;
    }
}

async fn first(stream: &mut Stream, inbox: &mut Inbox) -> Result<First, End> {
    loop {
        if let Some((header, body)) = inbox.frame()? {
            let bytes = HEADER_BYTES + body.len();
            let first = match Ask::decode(&header, body) {
                Ok(Ask::Hello(hello)) => First::Hello(hello),
                Ok(_) => return Err(WireError::Kind { kind: header.kind }.into()),
                Err(WireError::Kind { .. }) => match DataAsk::decode(&header, body)? {
                    DataAsk::Join(session) => First::Join(session),
                    DataAsk::Read(_) => return Err(WireError::Kind { kind: header.kind }.into()),
                },
                Err(error) => return Err(error.into()),
            };
            inbox.consume(bytes);
            return Ok(first);
        }
        if std::future::poll_fn(|cx| inbox.poll_fill(stream, cx)).await? == 0 {
            return Err(End::Closed);
        }
    }
}
