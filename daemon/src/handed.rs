//! Descriptors that workers hand over on the worker socket: memory of their devices, until it is registered.
//!
//! ```text
//! worker -- Offer 7 + fd --> socket --> hear() --> 7: fd <-- get(7) <-- the RPC that names 7
//!        -- Withdraw 7 ---->        by the door, and by whoever asks for a number
//! ```
//! A worker offers, then calls by gRPC, and the call may be here first. What was offered before it lies in the socket
//! by then, so whoever misses a number hears the socket out and looks again: nobody waits for the door's thread.
//!
//! A descriptor is not taken but shared: one piece of memory may hold several tensors, and several caches may be in it.
//! It stays until its worker withdraws it, or its session ends.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kv_block::SessionId;
use kv_shm::door::{Connection, Message, OFFERS_MAX, VERSION_OFFERS};

/// Most descriptors of all sessions together, however many the process may have.
const HANDED_MAX: usize = 4 * OFFERS_MAX;
/// Messages that are heard before anybody else has a turn: more than a socket holds of those that a worker may send.
const TURN: usize = 1024;

/// How many descriptors of workers there are, and may be.
#[derive(Debug)]
pub struct Room {
    held: AtomicUsize,
    max: usize,
}

impl Room {
    /// Of a process that may open so many: an eighth, since the connections themselves and the memory of sessions need
    /// more.
    pub fn of(descriptors: u64) -> Arc<Self> {
        let max = usize::try_from(descriptors / 8).unwrap_or(usize::MAX).min(HANDED_MAX);
        Arc::new(Self { held: AtomicUsize::new(0), max })
    }

    /// How many there are.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    fn take(self: &Arc<Self>) -> Option<Place> {
        let more = |held| (held < self.max).then_some(held + 1);
        let taken = self.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.is_ok().then(|| Place(Arc::clone(self)))
    }
}

/// A place in the room, given back when dropped.
#[derive(Debug)]
struct Place(Arc<Room>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A descriptor that a worker handed over. It is closed with the last who has it.
#[derive(Clone, Debug)]
pub struct Handed(Arc<(OwnedFd, Place)>);

impl AsFd for Handed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

/// Why a session's connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// The worker closed it.
    Closed,
    /// It said what it may not; in words.
    Wrong(&'static str),
}

impl Over {
    /// In words.
    pub fn why(self) -> &'static str {
        match self {
            Self::Closed => "it closed its connection",
            Self::Wrong(why) => why,
        }
    }
}

/// The connection of a greeted worker, and what it handed over.
#[derive(Debug)]
pub struct Line {
    connection: Arc<Connection>,
    /// Most that it may have handed over; none when the version it speaks knows no offers.
    offers_max: usize,
    room: Arc<Room>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    handed: BTreeMap<u64, Handed>,
    over: Option<Over>,
    /// It was said already that some were not kept.
    told: bool,
}

impl Line {
    /// Of a worker that was welcomed in `version`.
    pub fn new(connection: Arc<Connection>, version: u16, room: Arc<Room>) -> Self {
        let offers_max = if version >= VERSION_OFFERS { OFFERS_MAX } else { 0 };
        Self { connection, offers_max, room, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what the worker says; `Err` when it is over, and then for ever.
    pub fn hear(&self, session: SessionId) -> Result<(), Over> {
        self.hear_in(&mut self.lock(), session)
    }

    /// The descriptor of this number, as long as the worker has not withdrawn it. Everything that it offered before now
    /// counts.
    pub fn get(&self, session: SessionId, number: u64) -> Option<Handed> {
        let mut state = self.lock();
        if let Some(handed) = state.handed.get(&number) {
            return Some(handed.clone());
        }
        if self.hear_in(&mut state, session).is_err() {
            // The door sees that it is shut, and asks why.
            self.connection.shut();
        }
        state.handed.get(&number).cloned()
    }

    fn hear_in(&self, state: &mut State, session: SessionId) -> Result<(), Over> {
        for _ in 0..TURN {
            if let Some(over) = state.over {
                return Err(over);
            }
            let heard = match self.connection.try_recv() {
                Ok(None) => return Ok(()),
                Ok(Some((message, mut fds))) => self.apply(state, session, &message, fds.pop()),
                Err(kv_shm::Error::Closed) => Err(Over::Closed),
                Err(kv_shm::Error::Handshake { why }) => Err(Over::Wrong(why)),
                Err(_) => Err(Over::Wrong("its connection broke")),
            };
            if let Err(over) = heard {
                state.handed.clear();
                state.over = Some(over);
            }
        }
        Ok(())
    }

    fn apply(
        &self,
        state: &mut State,
        session: SessionId,
        message: &Message,
        fd: Option<OwnedFd>,
    ) -> Result<(), Over> {
        match (message, fd) {
            (Message::Offer { number }, Some(fd)) if self.offers_max > 0 => {
                if state.handed.len() >= self.offers_max {
                    return Err(Over::Wrong("it offered more descriptors than it may"));
                }
                if state.handed.contains_key(number) {
                    return Err(Over::Wrong("it offered a number that is in use"));
                }
                match self.room.take() {
                    Some(place) => {
                        state.handed.insert(*number, Handed(Arc::new((fd, place))));
                    }
                    // Not this worker's doing. Who names the number hears that it is not there.
                    None if !state.told => {
                        state.told = true;
                        let max = self.room.max;
                        tracing::warn!(%session, max, "workers handed over as many descriptors as there may be; one was not kept");
                    }
                    None => {}
                }
                Ok(())
            }
            (Message::Withdraw { number }, None) if self.offers_max > 0 => {
                // One that was not kept is withdrawn as well.
                state.handed.remove(number);
                Ok(())
            }
            _ => Err(Over::Wrong("it spoke out of turn")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read as _;

    use kv_shm::door::{Hello, VERSION, VERSION_MIN};

    use super::*;

    const SESSION: SessionId = SessionId(7);

    fn line(version: u16, room: &Arc<Room>) -> (Connection, Line) {
        let (daemon, worker) = Connection::pair().unwrap();
        (worker, Line::new(Arc::new(daemon), version, Arc::clone(room)))
    }

    fn offer(worker: &Connection, number: u64, fd: &impl AsFd) {
        worker.send(&Message::Offer { number }, &[fd.as_fd()]).unwrap();
    }

    fn file() -> File {
        tempfile::tempfile().unwrap()
    }

    /// Whether nobody has the other end of this pipe any more.
    fn is_closed(mut reader: std::io::PipeReader) -> bool {
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        matches!(reader.read(&mut [0]), Ok(0))
    }

    #[test]
    fn a_number_is_there_as_soon_as_it_was_offered_and_until_it_is_withdrawn() {
        let room = Room::of(1 << 20);
        let (worker, line) = line(VERSION, &room);
        assert!(line.get(SESSION, 1).is_none());
        let (reader, writer) = std::io::pipe().unwrap();
        offer(&worker, 1, &writer);
        drop(writer);
        // Nobody has heard the socket since.
        let held = line.get(SESSION, 1).unwrap();
        assert_eq!(line.get(SESSION, 1).map(|again| again.as_fd().try_clone_to_owned().is_ok()), Some(true));
        assert_eq!(room.held(), 1);
        worker.send(&Message::Withdraw { number: 1 }, &[]).unwrap();
        worker.send(&Message::Withdraw { number: 99 }, &[]).unwrap();
        assert_eq!(line.hear(SESSION), Ok(()));
        assert!(line.get(SESSION, 1).is_none());
        assert!(!is_closed(reader.try_clone().unwrap()), "who has it keeps it");
        drop(held);
        assert!(is_closed(reader));
        assert_eq!(room.held(), 0);
    }

    #[test]
    fn they_end_with_their_session() {
        let room = Room::of(1 << 20);
        let (worker, line) = line(VERSION, &room);
        let (reader, writer) = std::io::pipe().unwrap();
        (0..10).for_each(|number| offer(&worker, number, &writer));
        drop(writer);
        assert_eq!(line.hear(SESSION), Ok(()));
        assert_eq!(room.held(), 10);
        drop(line);
        assert!(is_closed(reader));
        assert_eq!(room.held(), 0);
    }

    #[test]
    fn what_makes_no_sense_ends_the_session_for_ever() {
        let hello = Hello {
            version_min: VERSION_MIN,
            version_max: VERSION,
            numa_node: None,
            hazards: 1,
            ring_entries: 1,
            staging_bytes: 0,
            wants_write: false,
            name: String::new(),
        };
        type Say<'a> = &'a dyn Fn(&Connection);
        let wrong: [(u16, &str, Say<'_>); 6] = [
            (VERSION, "out of turn", &|worker| worker.send(&Message::Hello(hello.clone()), &[]).unwrap()),
            (2, "out of turn", &|worker| offer(worker, 2, &file())),
            (2, "out of turn", &|worker| worker.send(&Message::Withdraw { number: 1 }, &[]).unwrap()),
            (VERSION, "descriptors", &|worker| worker.send(&Message::Offer { number: 1 }, &[]).unwrap()),
            (VERSION, "in use", &|worker| offer(worker, 1, &file())),
            (VERSION, "descriptors", &|worker| {
                let file = file();
                worker.send(&Message::Withdraw { number: 1 }, &[file.as_fd()]).unwrap();
            }),
        ];
        for (version, words, say) in wrong {
            let room = Room::of(1 << 20);
            let (worker, line) = line(version, &room);
            if version >= VERSION_OFFERS {
                offer(&worker, 1, &file());
                assert!(line.get(SESSION, 1).is_some());
            }
            say(&worker);
            // Found by whoever asks for a number, the door hears of it all the same.
            assert!(line.get(SESSION, 5).is_none());
            let over = line.hear(SESSION).unwrap_err();
            assert!(matches!(over, Over::Wrong(why) if why.contains(words)), "{over:?}, not {words}");
            assert_eq!(room.held(), 0, "nothing of it is kept");
            assert!(line.get(SESSION, 1).is_none());
            assert!(matches!(worker.recv(std::time::Duration::from_secs(10)), Err(kv_shm::Error::Closed)));
        }
    }

    #[test]
    fn a_worker_that_is_gone_is_told_from_one_that_speaks_nonsense() {
        let (worker, line) = line(VERSION, &Room::of(1 << 20));
        drop(worker);
        assert_eq!(line.hear(SESSION), Err(Over::Closed));
    }

    #[test]
    fn one_session_has_so_many_and_no_more() {
        let (worker, mut line) = line(VERSION, &Room::of(u64::MAX));
        assert_eq!(line.offers_max, OFFERS_MAX);
        line.offers_max = 8;
        let file = file();
        (0..8).for_each(|number| offer(&worker, number, &file));
        assert_eq!(line.hear(SESSION), Ok(()));
        worker.send(&Message::Withdraw { number: 3 }, &[]).unwrap();
        offer(&worker, 8, &file);
        assert_eq!(line.hear(SESSION), Ok(()));
        offer(&worker, 9, &file);
        let over = line.hear(SESSION).unwrap_err();
        assert!(matches!(over, Over::Wrong(why) if why.contains("more descriptors")), "{over:?}");
    }

    #[test]
    fn when_all_have_many_one_more_is_not_kept_and_its_worker_goes_on() {
        let room = Room::of(16);
        let (first, one) = line(VERSION, &room);
        let (second, other) = line(VERSION, &room);
        (0..2).for_each(|number| offer(&first, number, &file()));
        assert!(one.get(SESSION, 1).is_some());
        offer(&second, 1, &file());
        assert!(other.get(SessionId(8), 1).is_none());
        second.send(&Message::Withdraw { number: 1 }, &[]).unwrap();
        assert_eq!(other.hear(SessionId(8)), Ok(()));
        drop(one);
        offer(&second, 1, &file());
        assert!(other.get(SessionId(8), 1).is_some(), "there is room again");
    }
}
