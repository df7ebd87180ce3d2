//! Where completions of one link wait for its owner, and how it learns of them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kv_transport::link::{LinkDone, LinkError, Wake};

#[derive(Default)]
struct State {
    done: Vec<LinkDone>,
    broken: Option<LinkError>,
    /// Some of what was under way never comes back.
    abandoned: bool,
    /// The peer's device has answered something.
    answered: bool,
    /// Its link is gone: what comes is let go, and nobody is called.
    orphan: bool,
}

pub(crate) struct Outbox {
    state: Mutex<State>,
    /// Nothing new is taken.
    closed: AtomicBool,
    wake: Wake,
}

impl Outbox {
    pub(crate) fn new(wake: Wake) -> Self {
        Self { state: Mutex::default(), closed: AtomicBool::new(false), wake }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over what ended, and calls the owner if it does not know yet that there is something.
    pub(crate) fn push(&self, dones: impl IntoIterator<Item = LinkDone>) {
        let mut state = self.lock();
        if state.orphan {
            drop(state);
            // One after the other, and memory with it.
            dones.into_iter().for_each(drop);
            return;
        }
        let before = state.done.len();
        state.done.extend(dones);
        let first = before == 0 && !state.done.is_empty();
        drop(state);
        if first {
            (self.wake)();
        }
    }

    /// The path is gone. `abandoned` when the device did not give back all that it had.
    pub(crate) fn broken(&self, why: LinkError, abandoned: bool) {
        self.close();
        let mut state = self.lock();
        state.broken = Some(why);
        state.abandoned = abandoned;
        let orphan = state.orphan;
        drop(state);
        if !orphan {
            (self.wake)();
        }
    }

    /// The peer's device answered for the first time.
    pub(crate) fn answered(&self) {
        let mut state = self.lock();
        state.answered = true;
        let orphan = state.orphan;
        drop(state);
        if !orphan {
            (self.wake)();
        }
    }

    pub(crate) fn has_answered(&self) -> bool {
        self.lock().answered
    }

    /// Its link is gone.
    pub(crate) fn orphan(&self) {
        self.close();
        let mut state = self.lock();
        state.orphan = true;
        let done = std::mem::take(&mut state.done);
        drop(state);
        drop(done);
    }

    /// From now on nothing new need be submitted.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Appends what ended; gives why the path is gone, if it is, and whether all will have come back.
    pub(crate) fn take(&self, done: &mut Vec<LinkDone>) -> Option<(LinkError, bool)> {
        let mut state = self.lock();
        done.append(&mut state.done);
        let abandoned = state.abandoned;
        state.broken.clone().map(|why| (why, abandoned))
    }
}
