//! Who is connected: one row per worker or gRPC session, node-wide.
//!
//! A session number carries the daemon's epoch in its upper half, so a number from an earlier life is never
//! taken for one of this life.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use kv_block::code::Code;
use kv_block::{Epoch, Fault, SessionId};

/// By which way a session came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Door {
    /// The worker socket.
    Shm,
    /// A `Worker.Open` stream.
    Grpc,
}

impl Door {
    /// Name in text.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shm => "shm",
            Self::Grpc => "grpc",
        }
    }
}

/// What is known of a session.
#[derive(Clone, Debug)]
pub struct SessionInfo {
    /// Its number.
    pub id: SessionId,
    /// What the worker calls itself.
    pub name: String,
    /// How it came.
    pub door: Door,
    /// Process id, 0 when not known.
    pub pid: u32,
    /// User id; `None` over TCP.
    pub uid: Option<u32>,
    /// Since when.
    pub since: Instant,
}

/// All sessions of this life.
pub struct Sessions {
    epoch: Epoch,
    next: AtomicU32,
    max: usize,
    all: Mutex<BTreeMap<SessionId, SessionInfo>>,
}

impl Sessions {
    /// No sessions; at most `max` at once.
    pub fn new(epoch: Epoch, max: usize) -> Self {
        Self { epoch, next: AtomicU32::new(1), max, all: Mutex::new(BTreeMap::new()) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<SessionId, SessionInfo>> {
        self.all.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A new session.
    pub fn open(&self, name: String, door: Door, pid: u32, uid: Option<u32>) -> Result<SessionInfo, Fault> {
        let mut all = self.lock();
        if all.len() >= self.max {
            let text = format!("{} sessions are open, as many as there may be", self.max);
            let wait = std::time::Duration::from_secs(1);
            return Err(Fault::new(Code::TooManySessions, text).retry_after(wait));
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let id = SessionId((self.epoch.0 << 32) | u64::from(number));
        let info = SessionInfo { id, name, door, pid, uid, since: Instant::now() };
        all.insert(id, info.clone());
        Ok(info)
    }

    /// Forgets a session; says whether it was there.
    pub fn close(&self, id: SessionId) -> bool {
        self.lock().remove(&id).is_some()
    }

    /// Refuses a number that is not a session of this life.
    pub fn check(&self, id: SessionId) -> Result<(), Fault> {
        if self.lock().contains_key(&id) {
            return Ok(());
        }
        let epoch = self.epoch.0;
        if id.0 >> 32 != epoch & 0xffff_ffff {
            let text = format!("session {id} is of epoch {}, this is epoch {epoch}", id.0 >> 32);
            return Err(Fault::new(Code::WrongEpoch, text));
        }
        Err(Fault::new(Code::UnknownSession, format!("session {id} is not open")))
    }

    /// Everybody, by number.
    pub fn all(&self) -> Vec<SessionInfo> {
        self.lock().values().cloned().collect()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether nobody is connected.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_another_life_are_fenced_and_too_many_are_refused() {
        let sessions = Sessions::new(Epoch(7), 1);
        let open = || sessions.open("w".into(), Door::Grpc, 0, None);
        let first = open().unwrap();
        assert_eq!(open().unwrap_err().code, Code::TooManySessions);
        sessions.check(first.id).unwrap();
        assert_eq!(sessions.check(SessionId(6 << 32 | 1)).unwrap_err().code, Code::WrongEpoch);
        assert!(sessions.close(first.id));
        assert_eq!(sessions.check(first.id).unwrap_err().code, Code::UnknownSession);
        assert_ne!(open().unwrap().id, first.id, "numbers are not reused");
    }
}
