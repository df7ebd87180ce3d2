//! The link of the end that has the blocks.
//!
//! ```text
//!   Expose   want -> block, in the table           a connection looks wants up, holds the blocks once more and
//!   Conceal  out of the table; when no write       writes from them; its holds end with the write
//!            touches it: Concealed
//! ```
//! The connections come from the listener and are tasks of their own (`serving.rs`); what they share is the table.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kv_arena::Held;
use kv_transport::link::{Link, LinkDone, LinkError, LinkOp, LinkUsage, Wake};
use kv_wire::message::{ReadId, WantId};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::door::Seat;
use crate::inbox::Inbox;
use crate::limits::Limits;
use crate::listen::Sessions;
use crate::runtimes::Runtimes;
use crate::serving::{Batch, Serving};
use crate::stream::Stream;

/// A block that the reader may read, or one whose last writes are under way.
#[derive(Debug)]
struct Exposed {
    block: Held,
    /// Writes under way that touch it.
    writing: u32,
    /// Since when no write may begin.
    over: Option<Instant>,
}

/// Whether connections can join.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Life {
    /// Nobody has joined yet, or somebody is there, or may come back.
    Open,
    /// Its reader has not come back.
    Broken,
    /// The link was dropped, or its reader is gone.
    Over,
}

struct State {
    life: Life,
    exposed: HashMap<WantId, Exposed>,
    /// Concealed, but not done.
    leaving: HashMap<WantId, Exposed>,
    bytes: u64,
    done: Vec<LinkDone>,
    connections: HashMap<u64, AbortHandle>,
    connections_ever: u64,
}

/// What a link and its connections share.
pub(crate) struct Table {
    state: Mutex<State>,
    wake: Wake,
    node: String,
    limits: Arc<Limits>,
    runtimes: Runtimes,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Table {
    pub(crate) fn new(node: &str, wake: Wake, limits: Arc<Limits>, runtimes: Runtimes) -> Arc<Self> {
        let state = State {
            life: Life::Open,
            exposed: HashMap::new(),
            leaving: HashMap::new(),
            bytes: 0,
            done: Vec::new(),
            connections: HashMap::new(),
            connections_ever: 0,
        };
        let patience = limits.handshake + limits.rejoin;
        let table =
            Arc::new(Self { state: Mutex::new(state), wake, node: node.to_owned(), limits, runtimes });
        table.end_alone_after(patience, 0);
        table
    }

    pub(crate) fn node(&self) -> &str {
        &self.node
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No change is left half done by what may panic in between.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, and wakes who polls when there is something to poll for the first time.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let before = state.done.len();
        let result = change(&mut state);
        let first = before == 0 && !state.done.is_empty();
        drop(state);
        if first {
            (self.wake)();
        }
        result
    }

    /// A connection that showed the right session.
    pub(crate) fn join(table: &Arc<Self>, stream: Stream, inbox: Inbox, seat: Seat) {
        let mut state = table.state();
        if state.life != Life::Open || state.connections.len() >= table.limits.session_connections_max {
            return;
        }
        state.connections_ever += 1;
        let id = state.connections_ever;
        let joined = Joined { id, table: Arc::clone(table), _seat: seat };
        let task = table.runtimes.light.spawn(Serving::new(stream, inbox, joined).run());
        state.connections.insert(id, task.abort_handle());
    }

    /// A connection has long blocks to write: it goes on where those do, unless it was hung up on meanwhile.
    pub(crate) fn move_to_bulk(table: &Arc<Self>, serving: Serving) {
        let mut state = table.state();
        if state.life == Life::Over {
            drop(state);
            return drop(serving);
        }
        let id = serving.joined.id;
        let task = table.runtimes.bulk.spawn(serving.run_on_bulk());
        state.connections.insert(id, task.abort_handle());
    }

    /// Moves asks into a batch until it is full, each with a hold on its block or the word that it is gone.
    pub(crate) fn fill(&self, asks: &mut VecDeque<(ReadId, WantId)>, batch: &mut Batch) {
        let mut state = self.state();
        while let Some(&(read, want)) = asks.front() {
            let exposed = state.exposed.get_mut(&want);
            let bytes = exposed.as_ref().map_or(0, |exposed| exposed.block.len());
            if !batch.takes(bytes) {
                return;
            }
            match exposed {
                None => batch.gone(read),
                Some(exposed) => {
                    exposed.writing += 1;
                    batch.block(read, want, exposed.block.clone());
                }
            }
            asks.pop_front();
        }
    }

    /// Whether one of these ended so long ago that a reader which takes anything had time enough to take it.
    pub(crate) fn overdue(&self, mut wants: impl Iterator<Item = WantId>) -> bool {
        let (state, limit) = (self.state(), self.limits.stall);
        let over = |want: WantId| state.leaving.get(&want).and_then(|leaving| leaving.over);
        wants.any(|want| over(want).is_some_and(|at| at.elapsed() >= limit))
    }

    /// Ends every connection; what they write comes back concealed once it is concealed. No other joins.
    pub(crate) fn hang_up(&self) {
        let mut state = self.state();
        state.life = Life::Over;
        state.connections.values().for_each(AbortHandle::abort);
    }

    /// Writes that touched these are over.
    pub(crate) fn written(&self, wants: impl Iterator<Item = WantId>) {
        self.change(|state| {
            for want in wants {
                if let Some(leaving) = state.leaving.get_mut(&want) {
                    leaving.writing -= 1;
                    if leaving.writing == 0 {
                        state.concealed(want);
                    }
                } else if let Some(exposed) = state.exposed.get_mut(&want) {
                    exposed.writing -= 1;
                }
            }
        });
    }

    /// A connection is gone. The last one may be followed by others for a while.
    fn left(self: &Arc<Self>, id: u64) {
        let mut state = self.state();
        state.connections.remove(&id);
        if !state.connections.is_empty() || state.life != Life::Open {
            return;
        }
        let ever = state.connections_ever;
        drop(state);
        self.end_alone_after(self.limits.rejoin, ever);
    }

    /// Ends the link after `pause` if nobody is there then and nobody was since there were `ever` connections.
    fn end_alone_after(self: &Arc<Self>, pause: Duration, ever: u64) {
        let table = Arc::downgrade(self);
        self.runtimes.light.spawn(async move {
            tokio::time::sleep(pause).await;
            if let Some(table) = table.upgrade() {
                table.change(|state| state.end_alone(ever));
            }
        });
    }
}

impl State {
    /// Gives a block back that no write touches any more.
    fn concealed(&mut self, want: WantId) {
        if let Some(Exposed { block, .. }) = self.leaving.remove(&want) {
            self.bytes -= block.len() as u64;
            self.done.push(LinkDone::Concealed { want, block });
        }
    }

    fn conceal(&mut self, want: WantId) {
        let Some(mut exposed) = self.exposed.remove(&want) else { return };
        exposed.over = Some(Instant::now());
        let writing = exposed.writing;
        self.leaving.insert(want, exposed);
        if writing == 0 {
            self.concealed(want);
        }
    }

    /// Nobody came back since there were `ever` connections: everything comes back, and the link is broken.
    fn end_alone(&mut self, ever: u64) {
        if self.life != Life::Open || !self.connections.is_empty() || self.connections_ever != ever {
            return;
        }
        self.life = Life::Broken;
        let wants: Vec<WantId> = self.exposed.keys().copied().collect();
        wants.into_iter().for_each(|want| self.conceal(want));
        let why = LinkError::Path { what: "the reader has no connection".into() };
        self.done.push(LinkDone::Broken { why });
    }
}

/// A connection's part in a link. Dropped, it has left; its batch is dropped before.
pub(crate) struct Joined {
    id: u64,
    pub(crate) table: Arc<Table>,
    _seat: Seat,
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.table.left(self.id);
    }
}

/// The owner's end of a link. Data connections join it at the listener. Dropped, it ends them.
///
/// It is broken when its reader has no connection for long: none came since it was opened, or none came back. Then
/// every block that was exposed has come back concealed.
pub struct OwnerLink {
    table: Arc<Table>,
    sessions: Sessions,
    session: u128,
    /// Ended within `submit`.
    ended: Vec<LinkDone>,
    /// Whether `wake` was called for them.
    told: bool,
}

impl std::fmt::Debug for OwnerLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the session: it is a secret.
        f.debug_struct("OwnerLink").field("table", &self.table).finish_non_exhaustive()
    }
}

impl OwnerLink {
    pub(crate) fn new(table: Arc<Table>, sessions: Sessions, session: u128) -> Self {
        Self { table, sessions, session, ended: Vec::new(), told: false }
    }
}

impl Link for OwnerLink {
    fn submit(&mut self, op: LinkOp) -> Result<(), LinkOp> {
        match op {
            LinkOp::Expose { want, block } => {
                let mut state = self.table.state();
                let held = state.exposed.len() + state.leaving.len();
                if state.life != Life::Open || held >= self.table.limits.exposures_max {
                    return Err(LinkOp::Expose { want, block });
                }
                if state.exposed.contains_key(&want) || state.leaving.contains_key(&want) {
                    let what = "a want is exposed twice";
                    let result = Err(LinkError::Protocol { what });
                    self.ended.push(LinkDone::Exposed { want, result });
                    return Ok(());
                }
                state.bytes += block.len() as u64;
                state.exposed.insert(want, Exposed { block, writing: 0, over: None });
                self.ended.push(LinkDone::Exposed { want, result: Ok(None) });
            }
            LinkOp::Conceal { want } => self.table.change(|state| state.conceal(want)),
            LinkOp::Read { read, into, .. } => {
                let what = "this is the owner's end".into();
                let result = Err(LinkError::Unsupported { what });
                self.ended.push(LinkDone::Read { read, into, result });
            }
            LinkOp::Cancel { .. } => {}
        }
        Ok(())
    }

    fn kick(&mut self) {
        if !self.ended.is_empty() && !std::mem::replace(&mut self.told, true) {
            (self.table.wake)();
        }
    }

    fn poll(&mut self, done: &mut Vec<LinkDone>) {
        self.told = false;
        // First these: a block is exposed before it is concealed.
        done.append(&mut self.ended);
        done.append(&mut self.table.state().done);
    }

    fn usage(&self) -> LinkUsage {
        let state = self.table.state();
        LinkUsage {
            // An exposure is over when it stands; a conceal, when no write touches the block.
            in_flight: state.leaving.len() + state.done.len() + self.ended.len(),
            in_flight_max: self.table.limits.exposures_max,
            bytes: state.bytes,
        }
    }
}

impl Drop for OwnerLink {
    fn drop(&mut self) {
        self.sessions.forget(self.session, &self.table);
        let mut state = self.table.state();
        state.life = Life::Over;
        state.connections.values().for_each(AbortHandle::abort);
        let exposed = std::mem::take(&mut state.exposed);
        let leaving = std::mem::take(&mut state.leaving);
        let done = std::mem::take(&mut state.done);
        drop(state);
        drop((exposed, leaving, done));
    }
}
