//! Two nodes on the loopback, and waiting that ends.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use kv_arena::{Geometry, Held, ShardMemory, Slab, Slot};
use kv_block::{BindingTag, BlockKey, Checksum, Epoch, Priority, Record, payload};
use kv_tcp::{
    Accepted, ControlReader, ControlWriter, Dialer, Limits, Listener, OwnerLink, ReaderLink, Runtimes,
    Security, Tls,
};
use kv_transport::link::{Link, LinkDone, LinkError, LinkOp, Wake};
use kv_wire::frame::{HEADER_BYTES, Header, Message};
use kv_wire::message::{Answer, Ask, DataAnswer, DataAsk, Hello, ReadId, WantId};
use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

/// Nothing here takes so long, on however busy a machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// A session's token.
pub(crate) const SESSION: u128 = 0x5e55_1010;

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Waits for what nobody reports.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..PATIENCE.as_millis() / 5 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("never: {what}");
}

/// Runs a future, but not for ever.
pub(crate) fn block_on<T>(runtime: &Runtime, work: impl Future<Output = T>) -> T {
    runtime.block_on(async { tokio::time::timeout(PATIENCE, work).await.expect("in time") })
}

/// Rung by a link.
#[derive(Default)]
pub(crate) struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    pub(crate) fn wake(self: &Arc<Self>) -> Wake {
        let bell = Arc::clone(self);
        Arc::new(move || {
            *bell.rung.lock().unwrap() = true;
            bell.changed.notify_all();
        })
    }

    /// Waits for a ring, but not long.
    pub(crate) fn wait_a_moment(&self, moment: Duration) {
        let rung = self.rung.lock().unwrap();
        *self.changed.wait_timeout_while(rung, moment, |rung| !*rung).unwrap().0 = false;
    }

    fn wait(&self) {
        let rung = self.rung.lock().unwrap();
        let (mut rung, late) = self.changed.wait_timeout_while(rung, PATIENCE, |rung| !*rung).unwrap();
        assert!(!late.timed_out(), "nobody rang");
        *rung = false;
    }
}

/// A link and what it has said so far.
pub(crate) struct Driven<L> {
    pub(crate) link: L,
    pub(crate) bell: Arc<Bell>,
    pub(crate) done: Vec<LinkDone>,
}

impl<L: Link> Driven<L> {
    pub(crate) fn new(make: impl FnOnce(Wake) -> L) -> Self {
        let bell = Arc::new(Bell::default());
        Self { link: make(bell.wake()), bell, done: Vec::new() }
    }

    pub(crate) fn submit(&mut self, op: LinkOp) {
        assert!(self.link.submit(op).is_ok(), "an operation came back");
    }

    /// Polls, whenever the bell rings, until so many are done.
    pub(crate) fn until(&mut self, count: usize) -> Vec<LinkDone> {
        self.link.kick();
        self.until_polled(count)
    }

    /// The same, without a kick before.
    pub(crate) fn until_polled(&mut self, count: usize) -> Vec<LinkDone> {
        loop {
            self.link.poll(&mut self.done);
            if self.done.len() >= count {
                return self.done.drain(..count).collect();
            }
            self.bell.wait();
        }
    }

    pub(crate) fn one(&mut self) -> LinkDone {
        self.until(1).remove(0)
    }

    /// What is done now.
    pub(crate) fn poll(&mut self) -> usize {
        self.link.poll(&mut self.done);
        self.done.len()
    }
}

impl Driven<OwnerLink> {
    pub(crate) fn expose(&mut self, want: u64, block: &Held) {
        self.submit(LinkOp::Expose { want: WantId(want), block: block.clone() });
        match self.one() {
            LinkDone::Exposed { want: found, result: Ok(None) } if found == WantId(want) => {}
            other => panic!("{other:?}"),
        }
    }
}

impl Driven<ReaderLink> {
    pub(crate) fn read(&mut self, read: u64, want: u64, record: Record, into: Slot) {
        let (read, want) = (ReadId(read), WantId(want));
        self.submit(LinkOp::Read { read, want, window: None, record, into });
    }

    pub(crate) fn read_one(&mut self) -> (u64, Slot, Result<(), LinkError>) {
        match self.one() {
            LinkDone::Read { read, into, result } => (read.0, into, result),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn broken(&mut self) -> LinkError {
        match self.one() {
            LinkDone::Broken { why } => why,
            other => panic!("{other:?}"),
        }
    }
}

/// Memory of a node.
pub(crate) fn memory(regions: u32) -> ShardMemory {
    let geometry = Geometry { regions, region_bytes: 16 << 20, table_entries_max: 8 };
    ShardMemory::anonymous(geometry).unwrap()
}

/// A block that is there, and what it is.
pub(crate) fn block(slab: &Slab, number: u64, bytes: u32) -> (Held, Record) {
    let key = BlockKey::from_halves([number, !number]);
    let mut slot = slab.take(bytes).unwrap();
    payload::fill(&key, &mut slot[..bytes as usize]);
    let record = Record {
        key,
        checksum: Checksum::of(&key, &slot[..bytes as usize]),
        bytes,
        tag: BindingTag(1),
        priority: Priority::Normal,
        expires_at: 0,
    };
    (slot.seal(&record), record)
}

pub(crate) fn assert_is(record: &Record, slot: &Slot) {
    assert_eq!(payload::first_wrong_byte(&record.key, &slot[..record.bytes as usize]), None);
}

/// Slots that somebody has, of all classes.
pub(crate) fn slots_used(slab: &Slab) -> u32 {
    slab.regions().iter().map(|region| region.used).sum()
}

/// A block that only the test holds; it can be thrown away.
pub(crate) fn holds(slab: &Slab, held: &Held) -> u32 {
    slab.header(held.id()).unwrap().holds
}

/// An authority of certificates, in files.
pub(crate) struct Authority {
    pub(crate) folder: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { folder, issuer }
    }

    pub(crate) fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// A certificate for these names, its key beside it.
    pub(crate) fn sign(&self, file: &str, names: &[&str], change: impl FnOnce(&mut CertificateParams)) {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.path(&format!("{file}.pem")), cert.pem()).unwrap();
        std::fs::write(self.path(&format!("{file}.key")), key.serialize_pem()).unwrap();
    }

    pub(crate) fn load(&self, file: &str, ca: &Path) -> Security {
        let (cert, key) = (self.path(&format!("{file}.pem")), self.path(&format!("{file}.key")));
        Security::Mutual(Tls::load(&cert, &key, ca).unwrap())
    }

    pub(crate) fn node(&self, name: &str) -> Security {
        self.sign(name, &[name], |_| {});
        self.load(name, &self.path("ca.pem"))
    }
}

/// Short where a test waits for a limit, long where it does not.
pub(crate) fn patient() -> Limits {
    let rejoin = Duration::from_millis(1);
    Limits { handshake: PATIENCE, stall: PATIENCE, silence: PATIENCE, rejoin, ..Limits::default() }
}

/// A node that has blocks, and one that reads them.
pub(crate) struct Nodes {
    pub(crate) dialer: Dialer,
    pub(crate) accepted: mpsc::Receiver<Accepted>,
    pub(crate) listener: Listener,
    pub(crate) owner: ShardMemory,
    pub(crate) reader: ShardMemory,
    pub(crate) runtime: Runtime,
    _bulk: Runtime,
}

impl Nodes {
    pub(crate) fn new(owner: Security, reader: Security, limits: Limits) -> Self {
        let runtime = runtime();
        let bulk = kv_tcp::bulk_runtime(2).unwrap();
        let (accepts, accepted) = mpsc::channel(16);
        let address = "127.0.0.1:0".parse().unwrap();
        let runtimes = Runtimes::new(runtime.handle().clone(), bulk.handle().clone());
        let listener = Listener::bind(&runtimes, address, owner, limits.clone(), accepts).unwrap();
        let dialer = Dialer::new(runtimes, reader, limits);
        Self { dialer, accepted, listener, owner: memory(48), reader: memory(48), runtime, _bulk: bulk }
    }

    pub(crate) fn plain(limits: Limits) -> Self {
        Self::new(Security::Plain, Security::Plain, limits)
    }

    /// The same test over both kinds of connection.
    pub(crate) fn each(limits: &Limits, test: impl Fn(Self)) {
        test(Self::plain(limits.clone()));
        let authority = Authority::new("ours");
        test(Self::new(authority.node("owner"), authority.node("reader"), limits.clone()));
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local()
    }

    pub(crate) fn owner_link(&self) -> Driven<OwnerLink> {
        Driven::new(|wake| self.listener.sessions().link(SESSION, "reader", wake))
    }

    pub(crate) fn reader_link(&self) -> Driven<ReaderLink> {
        Driven::new(|wake| self.dialer.link(self.address(), "owner", SESSION, wake).unwrap())
    }

    /// A control connection that stands: the reader's halves, and what the owner got.
    pub(crate) fn control(&mut self) -> (ControlWriter<Ask>, ControlReader<Answer>, Accepted) {
        let address = self.address().to_string();
        let Self { runtime, dialer, accepted, .. } = self;
        block_on(runtime, async {
            let (mut says, hears) = dialer.control(&address, "owner").await.unwrap().split();
            says.say(&[Ask::Hello(hello())]).await.unwrap();
            (says, hears, accepted.recv().await.unwrap())
        })
    }
}

pub(crate) fn hello() -> Hello {
    Hello {
        versions: (1, 1),
        node: "reader".into(),
        epoch: Epoch(7),
        principals: vec!["all".into()],
        facts: vec![],
    }
}

/// A socket without manners.
pub(crate) struct Bare(pub(crate) TcpStream);

impl Bare {
    pub(crate) fn dial(address: SocketAddr) -> Self {
        Self::new(TcpStream::connect(address).unwrap())
    }

    pub(crate) fn new(socket: TcpStream) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_write_timeout(Some(PATIENCE)).unwrap();
        Self(socket)
    }

    pub(crate) fn accept(listener: &TcpListener) -> Self {
        Self::new(listener.accept().unwrap().0)
    }

    /// The owner's end of a data connection, joined.
    pub(crate) fn joined_by_reader(listener: &TcpListener) -> Self {
        let mut bare = Self::accept(listener);
        assert_eq!(bare.hear::<DataAsk>(), DataAsk::Join(SESSION));
        bare.say(&DataAnswer::Joined);
        bare
    }

    /// The reader's end of a data connection, joined.
    pub(crate) fn join(address: SocketAddr) -> Self {
        let mut bare = Self::dial(address);
        bare.say(&DataAsk::Join(SESSION));
        assert_eq!(bare.hear::<DataAnswer>(), DataAnswer::Joined);
        bare
    }

    pub(crate) fn say(&mut self, message: &impl Message) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.0.write_all(&bytes).unwrap();
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub(crate) fn hear<M: Message>(&mut self) -> M {
        let mut header = [0; HEADER_BYTES];
        self.0.read_exact(&mut header).unwrap();
        let header = Header::parse(&header).unwrap();
        let mut body = vec![0; header.body_bytes as usize];
        self.0.read_exact(&mut body).unwrap();
        M::decode(&header, &body).unwrap()
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Reads until the other side ends the connection.
    pub(crate) fn assert_closed(mut self) {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("it was not closed: {error}"),
        }
    }
}

/// A reader with all its connections to bare sockets.
pub(crate) fn scripted(nodes: &Nodes, connections: usize) -> (Driven<ReaderLink>, Vec<Bare>, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let reader = Driven::new(|wake| nodes.dialer.link(to, "owner", SESSION, wake).unwrap());
    let bares = (0..connections).map(|_| Bare::joined_by_reader(&listener)).collect();
    (reader, bares, listener)
}

/// Where the reads were asked.
pub(crate) fn asked(bares: &mut Vec<Bare>) -> (Bare, Vec<(ReadId, WantId)>) {
    let mut at = None;
    eventually("it asks", || {
        at = bares.iter().position(|bare| {
            bare.0.set_nonblocking(true).unwrap();
            let came = bare.0.peek(&mut [0]).is_ok_and(|bytes| bytes > 0);
            bare.0.set_nonblocking(false).unwrap();
            came
        });
        at.is_some()
    });
    let mut bare = bares.remove(at.unwrap());
    let DataAsk::Read(reads) = bare.hear() else { panic!("it joins twice") };
    (bare, reads)
}
