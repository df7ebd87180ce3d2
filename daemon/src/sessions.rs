//! Who is connected: one row per worker or gRPC session, node-wide.
//!
//! What a session holds is given back by whoever names it, so a session is bound to the caller that opened it:
//! on a Unix socket to the user, over TCP to callers over TCP. Those are many, so a number is also random, all
//! 64 bits of it: nobody can name what he was not told, and a number of an earlier life is none of this one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use kv_block::code::Code;
use kv_block::{Fault, SessionId};

use crate::handed::{Handed, Line};
use crate::peercred::Caller;

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
    /// Who opened it. Nobody else may name it.
    pub owner: Caller,
    /// The principal whose shards it has to do with.
    pub principal: usize,
    /// Since when.
    pub since: Instant,
}

/// All sessions of this life.
pub struct Sessions {
    max: usize,
    all: Mutex<BTreeMap<SessionId, SessionInfo>>,
    /// The connections of those that came by the worker socket, whose door has them.
    lines: Mutex<BTreeMap<SessionId, Weak<Line>>>,
    closed: OnceLock<Box<dyn Fn(SessionId) + Send + Sync>>,
}

impl Sessions {
    /// No sessions; at most `max` at once.
    pub fn new(max: usize) -> Self {
        Self { max, all: Mutex::default(), lines: Mutex::default(), closed: OnceLock::new() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SessionId, SessionInfo>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lines(&self) -> MutexGuard<'_, BTreeMap<SessionId, Weak<Line>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new session of this caller.
    pub fn open(
        &self,
        name: String,
        door: Door,
        owner: Caller,
        principal: usize,
    ) -> Result<SessionInfo, Fault> {
        let mut all = self.lock();
        if all.len() >= self.max {
            // The daemon's own is no worker's, and not what `limits.sessions_max` is about.
            let callers = all.values().filter(|info| info.owner != Caller::Unknown).count();
            let text = format!("{callers} sessions are open, as many as there may be");
            let wait = std::time::Duration::from_secs(1);
            return Err(Fault::new(Code::TooManySessions, text).retry_after(wait));
        }
        let id = loop {
            let id = SessionId(random()?);
            // 0 says "none" in the protocol.
            if id.0 != 0 && !all.contains_key(&id) {
                break id;
            }
        };
        let info = SessionInfo { id, name, door, owner, principal, since: Instant::now() };
        all.insert(id, info.clone());
        Ok(info)
    }

    /// Says what a session is called, where it could not say so itself.
    pub fn name(&self, id: SessionId, name: &str) {
        if let Some(info) = self.lock().get_mut(&id)
            && info.name != name
        {
            name.clone_into(&mut info.name);
        }
    }

    /// Says over which connection the worker of a session hands descriptors over.
    pub fn attach(&self, id: SessionId, line: &Arc<Line>) {
        self.lines().insert(id, Arc::downgrade(line));
    }

    /// A descriptor that the worker of this session handed over under this number, and has not withdrawn. Everything
    /// that it offered before now counts; the number stays, for whoever names it next.
    pub fn descriptor(&self, id: SessionId, number: u64) -> Option<Handed> {
        let line = self.lines().get(&id).and_then(Weak::upgrade)?;
        line.get(id, number)
    }

    /// Whether it has not ended.
    pub fn is_open(&self, id: SessionId) -> bool {
        self.lock().contains_key(&id)
    }

    /// Whom to tell of every session that ends: whoever keeps things for sessions outside of the shards. Said once.
    pub fn when_closed(&self, tell: impl Fn(SessionId) + Send + Sync + 'static) {
        let _ = self.closed.set(Box::new(tell));
    }

    /// Forgets a session; says whether it was there.
    pub fn close(&self, id: SessionId) -> bool {
        self.lines().remove(&id);
        let known = self.lock().remove(&id).is_some();
        if known && let Some(tell) = self.closed.get() {
            tell(id);
        }
        known
    }

    /// Refuses a number that is not a session of this life, or not this caller's. Gives its principal.
    pub fn check(&self, id: SessionId, caller: Caller) -> Result<usize, Fault> {
        let known = self.lock().get(&id).map(|info| (info.owner, info.principal));
        match known {
            Some((owner, principal)) if caller.may_use_what_is_of(owner) => Ok(principal),
            Some(_) => Err(Fault::new(Code::Denied, format!("session {id} was opened by another caller"))),
            None => Err(Fault::new(Code::UnknownSession, format!("session {id} is not open"))),
        }
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

/// A number that nobody can guess.
fn random() -> Result<u64, Fault> {
    let mut bytes = [0; 8];
    // So few bytes come whole, or not at all.
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(8) => Ok(u64::from_ne_bytes(bytes)),
        Ok(_) => Err(Fault::new(Code::Bug, "the kernel gave half a random number")),
        Err(error) => Err(Fault::new(Code::Bug, format!("the kernel gives no random numbers: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(uid: u32, pid: u32) -> Caller {
        Caller::Process { uid, pid: Some(pid) }
    }

    #[test]
    fn closed_and_unknown_sessions_are_fenced_and_too_many_are_refused() {
        let sessions = Sessions::new(1);
        let open = || sessions.open("w".into(), Door::Grpc, user(1, 1), 0);
        let first = open().unwrap();
        assert_eq!(open().unwrap_err().code, Code::TooManySessions);
        sessions.check(first.id, user(1, 1)).unwrap();
        let stranger = SessionId(first.id.0 ^ 1);
        assert_eq!(sessions.check(stranger, user(1, 1)).unwrap_err().code, Code::UnknownSession);
        assert!(sessions.close(first.id));
        assert_eq!(sessions.check(first.id, user(1, 1)).unwrap_err().code, Code::UnknownSession);
        assert_ne!(open().unwrap().id, first.id, "numbers are not reused");
    }

    #[test]
    fn the_daemons_own_session_is_not_told_among_the_callers() {
        let sessions = Sessions::new(3);
        let open = |owner| sessions.open("w".into(), Door::Grpc, owner, 0);
        for owner in [Caller::Unknown, Caller::Network, user(1, 1)] {
            open(owner).unwrap();
        }
        let words = open(user(1, 1)).unwrap_err().message;
        assert_eq!(words, "2 sessions are open, as many as there may be");
    }

    #[test]
    fn a_session_is_of_the_caller_that_opened_it() {
        let sessions = Sessions::new(8);
        let of = |owner| sessions.open("w".into(), Door::Grpc, owner, 0).unwrap().id;
        let (seven, network, nobody) = (of(user(7, 1)), of(Caller::Network), of(Caller::Unknown));
        let rows = [
            (seven, user(7, 2), true), // another process of the same user
            (seven, user(8, 1), false),
            (seven, user(0, 1), false),
            (seven, Caller::Network, false),
            (seven, Caller::Unknown, false),
            (network, Caller::Network, true),
            (network, user(7, 1), false),
            (nobody, Caller::Unknown, false),
            (nobody, user(0, 1), false),
        ];
        for (session, caller, allowed) in rows {
            let code = sessions.check(session, caller).err().map(|fault| fault.code);
            assert_eq!(code, (!allowed).then_some(Code::Denied), "{session} {caller:?}");
        }
    }

    #[test]
    fn numbers_cannot_be_guessed_from_one_another() {
        let sessions = Sessions::new(64);
        let numbers: Vec<u64> =
            (0..64).map(|_| sessions.open("w".into(), Door::Shm, user(1, 1), 0).unwrap().id.0).collect();
        // Of 64 random numbers every bit is set in some and clear in others, but for a chance of 2^-57.
        assert_eq!(numbers.iter().fold(0, |all, number| all | number), u64::MAX);
        assert_eq!(numbers.iter().fold(u64::MAX, |all, number| all & number), 0);
    }
}
