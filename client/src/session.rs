//! One session with one life of the daemon, by either door.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kv_api::v1;
use kv_arena::{EntryState, ShardView};
use kv_block::code::Code;
use kv_block::{BlockKey, Epoch, Fault, MissReason, SessionId};
use kv_shm::WorkerStaging;
use kv_shm::door::{Connection, FDS_PER_SHARD, Hello, Message, VERSION, VERSION_MIN};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::Streaming;

use crate::client::Client;
use crate::error::{Error, bug, of_status, timed_out, unreachable};
use crate::hub::Hub;
use crate::offers::{Offered, Offers};
use crate::options::WorkerOptions;

/// Longest silence of a session stream; the daemon speaks every five seconds.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// A session. Everything that reads its memory holds one, so it outlives the worker that opened it.
pub(crate) struct Life {
    pub(crate) epoch: Epoch,
    pub(crate) session: SessionId,
    pub(crate) way: Way,
    ended: OnceLock<Fault>,
}

/// By which door the session's blocks come and go.
pub(crate) enum Way {
    Shm(Shm),
    /// And why not by shared memory.
    Grpc(String),
}

/// Shared memory with every shard of the node.
pub(crate) struct Shm {
    pub(crate) links: Vec<Link>,
    pub(crate) may_write: bool,
    /// The shard of the worker's own NUMA node.
    near: Option<usize>,
    /// The connection. Its end is the session's end; closed with the last reader.
    offers: Offers,
}

/// Shared memory with one shard.
pub(crate) struct Link {
    pub(crate) view: Arc<ShardView>,
    pub(crate) hub: Hub,
    pub(crate) staging: WorkerStaging,
}

/// Tells when a session is over.
pub(crate) enum End {
    Socket(UnixStream),
    Stream(Streaming<v1::SessionNotice>),
}

/// What shared memory knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    Host,
    Disk,
    Pending,
    Gone(MissReason),
    /// Ask the daemon.
    Unclear,
    Never,
}

impl Known {
    fn rank(self) -> u8 {
        match self {
            Self::Host => 0,
            Self::Disk => 1,
            Self::Pending => 2,
            Self::Unclear => 3,
            Self::Gone(_) => 4,
            Self::Never => 5,
        }
    }

    pub(crate) fn of(entry: Option<&kv_arena::Entry>, unix: u32) -> Self {
        let Some(entry) = entry else { return Self::Never };
        match entry.state {
            EntryState::Ghost(reason) => Self::Gone(reason),
            _ if entry.expires_at != 0 && entry.expires_at <= unix => Self::Gone(MissReason::Expired),
            EntryState::Present if entry.host.is_some() => Self::Host,
            _ if entry.disk.is_some() => Self::Disk,
            EntryState::Pending => Self::Pending,
            EntryState::Present => Self::Unclear,
        }
    }
}

/// Unix time in seconds, for expiry.
pub(crate) fn unix_now() -> u32 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    u32::try_from(since).unwrap_or(u32::MAX)
}

impl Shm {
    /// Where a block is, or where it would go: the link, and what is known there.
    pub(crate) fn locate(&self, key: &BlockKey, unix: u32) -> (usize, Known) {
        let mut best = (self.home(key), Known::Never);
        for (index, link) in self.links.iter().enumerate() {
            let known = match link.view.find(key) {
                Ok(entry) => Known::of(entry.as_ref(), unix),
                Err(_) => Known::Unclear,
            };
            if known.rank() < best.1.rank() {
                best = (index, known);
            }
        }
        best
    }

    /// [`Shm::locate`] for many, with the memory latencies overlapped where there is one shard.
    pub(crate) fn locate_each(&self, keys: &[BlockKey], unix: u32) -> Vec<(usize, Known)> {
        let [link] = &self.links[..] else {
            return keys.iter().map(|key| self.locate(key, unix)).collect();
        };
        let mut places = Vec::with_capacity(keys.len());
        link.view.find_each(keys, |_, found| {
            places.push((0, found.map_or(Known::Unclear, |entry| Known::of(entry.as_ref(), unix))));
            true
        });
        places
    }

    /// Where a block goes that nobody has: to the worker's own NUMA node, else where gRPC would put it.
    fn home(&self, key: &BlockKey) -> usize {
        self.near.unwrap_or((key.halves()[1] % self.links.len() as u64) as usize)
    }
}

impl Life {
    /// Fails when the session is over.
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.ended.get().map_or(Ok(()), |fault| Err(fault.clone().into()))
    }

    /// Ends everything under way with `fault`.
    pub(crate) fn end(&self, fault: &Fault) {
        let _ = self.ended.set(fault.clone());
        if let Way::Shm(shm) = &self.way {
            shm.links.iter().for_each(|link| link.hub.fail(fault.clone()));
        }
    }

    /// Hands descriptors over to the daemon, `until` at the latest; `None` when there are none.
    pub(crate) async fn offer(
        &self,
        fds: &[Arc<OwnedFd>],
        until: Instant,
    ) -> Result<Option<Offered<'_>>, Error> {
        match &self.way {
            _ if fds.is_empty() => Ok(None),
            Way::Shm(shm) => shm.offers.offer(fds, until).await.map(Some),
            Way::Grpc(why) => {
                let text =
                    format!("memory by descriptor goes over the worker socket, which is not in use: {why}");
                Err(Fault::new(Code::Version, text).into())
            }
        }
    }

    /// Opens a session by the better door that is open. `insist`: by shared memory or not at all.
    pub(crate) async fn open(
        client: &Client,
        options: &WorkerOptions,
        insist: bool,
    ) -> Result<(Arc<Self>, End), Error> {
        let why = match client.endpoint().worker_socket() {
            _ if options.grpc_only => "gRPC was asked for".to_owned(),
            None => "the daemon is not on this machine's socket".to_owned(),
            Some(path) => match Self::open_shm(path, options.clone(), client.deadline()).await {
                Ok(opened) => return Ok(opened),
                Err(error) if insist => return Err(error),
                Err(error) => error.to_string(),
            },
        };
        Self::open_grpc(client, options, why).await
    }

    async fn open_shm(
        path: std::path::PathBuf,
        options: WorkerOptions,
        deadline: Duration,
    ) -> Result<(Arc<Self>, End), Error> {
        let greeted = tokio::task::spawn_blocking(move || greet(&path, &options, deadline)).await;
        let (life, watch) = greeted.map_err(|_| bug("the handshake was interrupted"))??;
        // To tokio every connected Unix socket is a stream; all that is read here is its end.
        let socket = UnixStream::from_std(watch.into())
            .map_err(|error| unreachable(format!("watching the worker socket: {error}")))?;
        Ok((life, End::Socket(socket)))
    }

    async fn open_grpc(
        client: &Client,
        options: &WorkerOptions,
        why: String,
    ) -> Result<(Arc<Self>, End), Error> {
        let request = v1::OpenRequest { name: options.name.clone() };
        let mut stream = client.within(client.sessions().open(request)).await?;
        let first = timeout(client.deadline(), stream.message()).await;
        let first = first
            .map_err(|_| timed_out("opening a session"))?
            .map_err(|status| of_status(&status))?
            .ok_or_else(|| unreachable("the daemon closed the session at once"))?;
        let life = Self {
            epoch: Epoch(first.epoch),
            session: SessionId(first.session),
            way: Way::Grpc(why),
            ended: OnceLock::new(),
        };
        Ok((Arc::new(life), End::Stream(stream)))
    }
}

impl End {
    /// Waits for it.
    pub(crate) async fn ended(&mut self) -> Fault {
        let why = match self {
            Self::Socket(socket) => loop {
                // The daemon says nothing after the welcome.
                if let Err(error) = socket.readable().await {
                    break error.to_string();
                }
                match socket.try_read(&mut [0; 64]) {
                    Ok(0) => break "the daemon closed the connection".to_owned(),
                    Ok(_) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => break error.to_string(),
                }
            },
            Self::Stream(stream) => loop {
                match timeout(SILENCE_MAX, stream.message()).await {
                    Ok(Ok(Some(_))) => {}
                    Ok(Ok(None)) => break "the daemon ended it".to_owned(),
                    Ok(Err(status)) => break status.message().to_owned(),
                    Err(_) => break "the daemon is silent".to_owned(),
                }
            },
        };
        Fault::new(Code::Unreachable, format!("the session is over: {why}"))
    }
}

/// The worker's side of the handshake; gives the session and a second descriptor of its connection.
fn greet(path: &Path, options: &WorkerOptions, deadline: Duration) -> Result<(Arc<Life>, OwnedFd), Error> {
    let refused = |error: &dyn std::error::Error| {
        let cause = error.source().map_or_else(String::new, |cause| format!(": {cause}"));
        unreachable(format!("{}: {error}{cause}", path.display()))
    };
    let until = Instant::now() + deadline;
    let connection = Connection::connect(path, deadline).map_err(|error| refused(&error))?;
    let hello = Hello {
        version_min: VERSION_MIN,
        version_max: VERSION,
        numa_node: options.numa_node,
        hazards: options.hazards.max(1),
        ring_entries: options.ring_entries.max(2).next_power_of_two(),
        staging_bytes: options.staging_bytes.next_multiple_of(kv_shm::PAGE),
        wants_write: options.trusted,
        name: options.name.clone(),
    };
    connection.send(&Message::Hello(hello), &[]).map_err(|error| refused(&error))?;
    let (message, fds) = loop {
        let left = until.saturating_duration_since(Instant::now());
        match connection.recv(left).map_err(|error| refused(&error))? {
            Some(received) => break received,
            None if left.is_zero() => return Err(timed_out("the handshake")),
            None => {}
        }
    };
    let welcome = match message {
        Message::Welcome(welcome) => welcome,
        Message::Refused(refused) => {
            let fault = Fault::new(refused.code, refused.message);
            let wait = Duration::from_millis(refused.retry_after_ms.into());
            return Err(if wait.is_zero() { fault } else { fault.retry_after(wait) }.into());
        }
        other => return Err(bug(format!("the daemon greeted with {other:?}"))),
    };
    if !(VERSION_MIN..=VERSION).contains(&welcome.version) {
        return Err(Fault::new(Code::Version, format!("the daemon chose version {}", welcome.version)).into());
    }
    let mut fds = fds.into_iter();
    let mut links = Vec::with_capacity(welcome.shards.len());
    for shard in &welcome.shards {
        let five: Vec<OwnedFd> = fds.by_ref().take(FDS_PER_SHARD).collect();
        let Ok([meta, data, hazard, ring, bell]) = <[OwnedFd; FDS_PER_SHARD]>::try_from(five) else {
            return Err(bug("the welcome lacks descriptors"));
        };
        let view = ShardView::map(meta, data, hazard).map_err(|error| refused(&error))?;
        let end = kv_shm::open(shard.layout, [ring, bell]).map_err(|error| refused(&error))?;
        links.push(Link {
            view,
            hub: Hub::new(end.submitter, end.collector, options.spins),
            staging: end.staging,
        });
    }
    let near = options
        .numa_node
        .and_then(|node| welcome.shards.iter().position(|shard| shard.numa_node == Some(node)));
    let watch = connection
        .as_fd()
        .try_clone_to_owned()
        .map_err(|error| unreachable(format!("no descriptor left: {error}")))?;
    let life = Life {
        epoch: welcome.epoch,
        session: welcome.session,
        way: Way::Shm(Shm {
            links,
            may_write: welcome.may_write,
            near,
            offers: Offers::new(connection, welcome.version),
        }),
        ended: OnceLock::new(),
    };
    Ok((Arc::new(life), watch))
}

impl std::fmt::Debug for Life {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let door = if matches!(self.way, Way::Shm(_)) { "shm" } else { "grpc" };
        write!(f, "Life({door}, session {}, epoch {})", self.session, self.epoch)
    }
}
