//! The worker socket: a thread that greets workers, gives them their memory, and notices when they are gone.
//!
//! A connection that says nothing, says nonsense or comes from a user who may not is closed. A greeted worker
//! is alive as long as its connection is open and its process lives; whichever ends first ends the session
//! on every shard. What it hands over meanwhile is kept by its [`Line`].

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_arena::{HazardFile, ShardMemory};
use kv_block::code::Code;
use kv_block::{Fault, SessionId, ShardId};
use kv_shm::door::{Connection, Hello, Listener, Message, Refused, ShardWelcome, Welcome};
use kv_shm::{Layout, ShardEnd, peer};
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::config::Config;
use crate::connections::raise_descriptor_limit;
use crate::handed::{Line, Over, Room};
use crate::node::Node;
use crate::peercred::{Caller, Who};
use crate::sessions::Door;
use crate::shard::{Letter, Waker, WorkerLink};

/// A connection must say hello within this.
const HELLO_WITHIN: Duration = Duration::from_secs(2);
/// Connections that have not said hello yet.
const STRANGERS_MAX: usize = 256;

/// Where the shared memory files of one shard are.
#[derive(Clone)]
pub struct MemoryPlace {
    /// Their directory.
    pub dir: std::path::PathBuf,
    /// The number in their names.
    pub number: ShardId,
}

/// Descriptors of one shard's memory, to be passed on.
pub struct MemoryFds {
    /// Which shard.
    pub shard: ShardId,
    /// Whose it is; nobody else gets them.
    pub principal: usize,
    /// Where its files are.
    pub place: MemoryPlace,
    /// NUMA node of its memory.
    pub numa_node: Option<u16>,
    /// Catalog and headers, read-only.
    pub meta: OwnedFd,
    /// The arena, read-only.
    pub data: OwnedFd,
    /// The arena, writable, for trusted workers.
    pub data_writable: OwnedFd,
}

impl MemoryFds {
    /// Descriptors of an opened memory.
    pub fn of(
        shard: ShardId,
        principal: usize,
        place: MemoryPlace,
        numa_node: Option<u16>,
        memory: &ShardMemory,
    ) -> Result<Self, kv_arena::Error> {
        Ok(Self {
            shard,
            principal,
            place,
            numa_node,
            meta: memory.meta_ro()?,
            data: memory.data_ro()?,
            data_writable: memory.data_rw()?,
        })
    }
}

/// The greeting thread's state.
pub struct WorkerDoor {
    node: Arc<Node>,
    config: Arc<Config>,
    memory: Vec<MemoryFds>,
    listener: Listener,
    epoll: OwnedFd,
    next_token: u64,
    guests: HashMap<u64, Guest>,
    /// For what workers hand over.
    room: Arc<Room>,
    own_uid: u32,
    stop: Waker,
    stopped: Arc<std::sync::atomic::AtomicBool>,
}

struct Guest {
    connection: Arc<Connection>,
    peer: peer::Peer,
    since: Instant,
    session: Option<Greeted>,
}

/// What a guest is once it was greeted.
struct Greeted {
    session: SessionId,
    line: Arc<Line>,
    pidfd: Option<OwnedFd>,
}

const LISTENER: u64 = 0;
const STOP: u64 = 1;
/// A token's pidfd is watched under the token with this bit.
const PIDFD: u64 = 1 << 63;

/// Ends the thread.
pub struct StopDoor(Waker, Arc<std::sync::atomic::AtomicBool>);

impl StopDoor {
    /// Asks the thread to end; sessions stay until their connections close.
    pub fn stop(&self) {
        self.1.store(true, std::sync::atomic::Ordering::Release);
        self.0.wake();
    }
}

impl WorkerDoor {
    /// A door on a listening socket.
    pub fn new(
        node: Arc<Node>,
        config: Arc<Config>,
        memory: Vec<MemoryFds>,
        listener: Listener,
    ) -> std::io::Result<(Self, StopDoor)> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let stop = Waker::new()?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        epoll::add(&epoll, stop.fd(), EventData::new_u64(STOP), EventFlags::IN)?;
        let stopped = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let handle = StopDoor(stop.clone(), Arc::clone(&stopped));
        let own_uid = rustix::process::geteuid().as_raw();
        let door = Self {
            node,
            config,
            memory,
            listener,
            epoll,
            next_token: 2,
            guests: HashMap::new(),
            room: Room::of(raise_descriptor_limit()),
            own_uid,
            stop,
            stopped,
        };
        Ok((door, handle))
    }

    /// Greets until told to stop.
    pub fn run(mut self) {
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 64];
        while !self.stopped.load(std::sync::atomic::Ordering::Acquire) {
            let waiting = self.guests.values().any(|guest| guest.session.is_none());
            let limit = rustix::event::Timespec { tv_sec: 0, tv_nsec: 250_000_000 };
            let count = epoll::wait(&self.epoll, &mut events, waiting.then_some(&limit)).unwrap_or(0);
            for event in &events[..count] {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    STOP => self.stop.drain(),
                    token if token & PIDFD != 0 => self.close(token & !PIDFD, "its process ended"),
                    token => self.hear(token),
                }
            }
            self.drop_silent();
        }
    }

    fn accept(&mut self) {
        loop {
            let connection = match self.listener.accept() {
                Ok(Some(connection)) => connection,
                Ok(None) => return,
                Err(error) => {
                    // Out of descriptors, most likely: those who are in go on, the others try again.
                    tracing::warn!(%error, "a worker could not be accepted");
                    std::thread::sleep(Duration::from_millis(10));
                    return;
                }
            };
            let strangers = self.guests.values().filter(|guest| guest.session.is_none()).count();
            let peer = match peer::peer(&connection) {
                Ok(peer) if strangers < STRANGERS_MAX => peer,
                _ => continue,
            };
            let token = self.next_token;
            self.next_token += 1;
            if epoll::add(&self.epoll, &connection, EventData::new_u64(token), EventFlags::IN).is_ok() {
                let connection = Arc::new(connection);
                let guest = Guest { connection, peer, since: Instant::now(), session: None };
                self.guests.insert(token, guest);
            }
        }
    }

    fn hear(&mut self, token: u64) {
        let Some(guest) = self.guests.get(&token) else { return };
        if let Some(Greeted { session, line, .. }) = &guest.session {
            match line.hear(*session) {
                Ok(()) => {}
                Err(Over::Closed) => self.close(token, Over::Closed.why()),
                Err(over) => self.refuse(token, &Fault::new(Code::BadRequest, over.why())),
            }
            return;
        }
        match guest.connection.try_recv() {
            Ok(None) => {}
            Ok(Some((Message::Hello(hello), _))) => self.greet(token, &hello),
            Ok(Some(_)) => self.close(token, "it spoke out of turn"),
            Err(kv_shm::Error::Closed) => self.close(token, Over::Closed.why()),
            Err(error) => {
                let message = error.to_string();
                self.refuse(token, &Fault::new(Code::BadRequest, message));
            }
        }
    }

    fn greet(&mut self, token: u64, hello: &Hello) {
        if let Err(fault) = self.welcome(token, hello) {
            self.refuse(token, &fault);
        }
    }

    fn refuse(&mut self, token: u64, fault: &Fault) {
        if let Some(guest) = self.guests.get(&token) {
            let refused = Refused {
                code: fault.code,
                retry_after_ms: fault.retry_after.map_or(0, |wait| wait.as_millis() as u32),
                message: fault.message.clone(),
            };
            let _ = guest.connection.send(&Message::Refused(refused), &[]);
        }
        self.close(token, &fault.message);
    }

    fn welcome(&mut self, token: u64, hello: &Hello) -> Result<(), Fault> {
        self.node.accepting()?;
        let Some(guest) = self.guests.get(&token) else { return Ok(()) };
        let version = hello.common_version().ok_or_else(|| {
            let text = format!(
                "the worker speaks versions {} to {}, the daemon {} to {}",
                hello.version_min,
                hello.version_max,
                kv_shm::door::VERSION_MIN,
                kv_shm::door::VERSION
            );
            Fault::new(Code::Version, text)
        })?;
        let peer = guest.peer;
        let caller = Caller::Process { uid: peer.uid, pid: Some(peer.pid) };
        let Who { rights, principal, .. } = Who::new(caller, &self.config, self.own_uid);
        if !rights.blocks {
            let text = format!("user id {} may not use shared memory; add it to workers.uids", peer.uid);
            return Err(Fault::new(Code::Denied, text));
        }
        let may_write = hello.wants_write && rights.in_place;
        let limits = &self.config.workers;
        let entries = hello.ring_entries.clamp(1, limits.ring_entries).next_power_of_two();
        let staging = hello.staging_bytes.min(limits.staging_bytes_max.0);
        let layout =
            Layout::new(entries, staging).map_err(|error| Fault::new(Code::BadRequest, error.to_string()))?;
        let hazards = hello.hazards.clamp(1, limits.hazards_max);

        let info = self.node.sessions.open(hello.name.clone(), Door::Shm, caller, principal)?;
        let made = self.make_links(info.id, principal, &peer, layout, hazards);
        let links = match made {
            Ok(links) => links,
            Err(fault) => {
                self.node.sessions.close(info.id);
                return Err(fault);
            }
        };
        let shards = memory_of(&self.memory, principal).map(|memory| ShardWelcome {
            shard: memory.shard,
            numa_node: memory.numa_node,
            hazards,
            layout,
        });
        let welcome = Message::Welcome(Welcome {
            version,
            session: info.id,
            epoch: self.node.epoch,
            may_write,
            shards: shards.collect(),
        });
        let mut passed = Vec::with_capacity(links.len() * kv_shm::door::FDS_PER_SHARD);
        for ((_, hazard, [ring, bell]), memory) in links.iter().zip(memory_of(&self.memory, principal)) {
            let data = if may_write { &memory.data_writable } else { &memory.data };
            passed.extend([memory.meta.as_fd(), data.as_fd(), hazard.1.as_fd(), ring.as_fd(), bell.as_fd()]);
        }
        let Some(guest) = self.guests.get_mut(&token) else { return Ok(()) };
        // A worker that was welcomed may offer, and name what it offered, before we are back here.
        let line = Arc::new(Line::new(Arc::clone(&guest.connection), version, Arc::clone(&self.room)));
        self.node.sessions.attach(info.id, &line);
        if let Err(error) = guest.connection.send(&welcome, &passed) {
            self.node.sessions.close(info.id);
            return Err(Fault::new(Code::BadRequest, error.to_string()));
        }
        drop(passed);
        let pidfd = peer::pidfd(&guest.connection).ok();
        if let Some(pidfd) = &pidfd {
            let _ = epoll::add(&self.epoll, pidfd, EventData::new_u64(token | PIDFD), EventFlags::IN);
        }
        guest.session = Some(Greeted { session: info.id, line, pidfd });
        for ((end, (hazards, _), _), memory) in links.into_iter().zip(memory_of(&self.memory, principal)) {
            let link = Some(Box::new(WorkerLink { end, hazards, may_write }));
            let Some(shard) = self.node.shard(memory.shard) else { continue };
            shard.post_surely(Letter::Attach { session: info.id, link });
        }
        tracing::info!(session = %info.id, pid = peer.pid, uid = peer.uid, may_write, "worker connected");
        Ok(())
    }

    #[allow(clippy::type_complexity, reason = "the parts of a link before it is one")]
    fn make_links(
        &self,
        session: SessionId,
        principal: usize,
        peer: &peer::Peer,
        layout: Layout,
        hazards: u32,
    ) -> Result<Vec<(ShardEnd, (HazardFile, OwnedFd), [OwnedFd; 2])>, Fault> {
        let refused = |error: &dyn std::error::Error| {
            Fault::new(Code::QueueFull, format!("no memory for another session: {error}"))
                .retry_after(Duration::from_secs(1))
        };
        let one = |memory: &MemoryFds| {
            let (end, fds) = kv_shm::create(layout).map_err(|error| refused(&error))?;
            let file = HazardFile::create(
                &memory.place.dir,
                memory.place.number,
                session,
                peer.pid,
                peer.start_time,
                hazards,
            )
            .map_err(|error| refused(&error))?;
            let fd = file.fd().map_err(|error| refused(&error))?;
            Ok((end, (file, fd), fds))
        };
        memory_of(&self.memory, principal).map(one).collect()
    }

    fn close(&mut self, token: u64, why: &str) {
        let Some(guest) = self.guests.remove(&token) else { return };
        let Some(Greeted { session, pidfd, .. }) = &guest.session else {
            tracing::debug!(pid = guest.peer.pid, why, "connection closed before a session began");
            return;
        };
        // A descriptor that a forked child holds stays watched after we close ours: take it out by hand.
        let _ = epoll::delete(&self.epoll, &guest.connection);
        if let Some(pidfd) = pidfd {
            let _ = epoll::delete(&self.epoll, pidfd);
        }
        for shard in &self.node.shards {
            shard.post_surely(Letter::Detach { session: *session });
        }
        self.node.sessions.close(*session);
        tracing::info!(%session, pid = guest.peer.pid, why, "worker gone");
    }

    fn drop_silent(&mut self) {
        let silent = |guest: &Guest| guest.session.is_none() && guest.since.elapsed() > HELLO_WITHIN;
        let tokens: Vec<u64> =
            self.guests.iter().filter(|(_, guest)| silent(guest)).map(|(token, _)| *token).collect();
        for token in tokens {
            self.close(token, "it did not say hello");
        }
    }
}

/// What a worker of this principal maps.
fn memory_of(memory: &[MemoryFds], principal: usize) -> impl Iterator<Item = &MemoryFds> {
    memory.iter().filter(move |memory| memory.principal == principal)
}
