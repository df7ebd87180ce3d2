//! The link of the end that reads.
//!
//! ```text
//!   submit -> staged, by connection -> kick -> the connection's task -> ended -> poll
//! ```
//! A read goes to the connection with the fewest bytes outstanding; small ones have a connection to themselves. Each
//! connection is a task (`reading.rs`) that owns the slots of its reads. What all share here is small: how each
//! connection is, and what has ended.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kv_arena::Slot;
use kv_block::Record;
use kv_transport::link::{Link, LinkDone, LinkError, LinkOp, LinkUsage, Wake};
use kv_wire::message::{ReadId, WantId};
use tokio::sync::{mpsc, watch};

use crate::dial::{Dialer, Target};
use crate::limits::SMALL_BYTES;
use crate::reading::Reading;

/// A read on its way to its connection.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) read: ReadId,
    pub(crate) want: WantId,
    pub(crate) record: Record,
    pub(crate) into: Slot,
}

/// What a connection is told.
#[derive(Debug)]
pub(crate) enum Command {
    Read(Read),
    Cancel(ReadId),
}

/// A read that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) read: ReadId,
    pub(crate) bytes: u32,
    pub(crate) into: Slot,
    pub(crate) result: Result<(), LinkError>,
}

/// How a connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Health {
    /// It is being made.
    Trying,
    Up,
    /// It was lost; nobody has tried again.
    Lost,
    /// The last try failed.
    Failed,
}

/// How all connections of a link are.
#[derive(Debug)]
struct Connections {
    health: Vec<Health>,
    broken: bool,
}

impl Connections {
    fn any_alive(&self) -> bool {
        self.health.iter().any(|health| matches!(health, Health::Trying | Health::Up))
    }

    /// Takes the change. True when that breaks the link: a try has failed and no other connection is left.
    fn change(&mut self, at: usize, health: Health) -> bool {
        self.health[at] = health;
        let breaks = health == Health::Failed && !self.any_alive() && !self.broken;
        self.broken |= breaks;
        breaks
    }

    /// Where a read goes, given what each connection has outstanding. The first is the one for small reads.
    fn choose(&self, small: bool, outstanding: impl Fn(usize) -> u64) -> usize {
        let rank = |at: &usize| {
            let alive = matches!(self.health[*at], Health::Trying | Health::Up);
            // A small read stays off the others, and a long one off the small ones', as long as there is a choice.
            let (own, at) = (small == (*at == 0), *at);
            (!alive, !own, outstanding(at))
        };
        (0..self.health.len()).min_by_key(rank).unwrap_or(0)
    }
}

/// What a link and its connections share.
pub(crate) struct Shared {
    connections: Mutex<Connections>,
    ended: Mutex<Vec<Ended>>,
    broken: watch::Sender<Option<LinkError>>,
    wake: Wake,
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self) -> MutexGuard<'_, Vec<Ended>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over what has ended, and wakes who polls if that is the first of it.
    pub(crate) fn give(&self, reads: &mut Vec<Ended>) {
        if reads.is_empty() {
            return;
        }
        let mut ended = self.ended();
        let first = ended.is_empty();
        ended.append(reads);
        drop(ended);
        if first {
            (self.wake)();
        }
    }

    /// A connection changes. A failed try that leaves none breaks the link.
    pub(crate) fn change(&self, at: usize, health: Health, why: &LinkError) {
        let breaks = self.connections().change(at, health);
        if breaks {
            self.broken.send_replace(Some(why.clone()));
            (self.wake)();
        }
    }

    /// Whether any connection is there or being made.
    pub(crate) fn any_alive(&self) -> bool {
        self.connections().any_alive()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Option<LinkError>> {
        self.broken.subscribe()
    }
}

/// One connection, as the link sees it.
struct Connection {
    /// Bytes of its reads that have not ended.
    outstanding: Arc<AtomicU64>,
    staged: Vec<Command>,
    commands: mpsc::UnboundedSender<Vec<Command>>,
}

/// The reading end of a link. Dropped, it closes its connections; the memory comes back as they end.
///
/// A connection that fails takes its own reads with it ([`LinkError::Path`]) and is made again when there is something
/// to read, the last one at once. One that ends before it was of use is a try that failed. When a try fails and no connection is left, the link is broken.
pub struct ReaderLink {
    shared: Arc<Shared>,
    connections: Vec<Connection>,
    /// Ended within `submit`.
    ended: Vec<LinkDone>,
    /// Whether `wake` was called for them.
    told: bool,
    /// Reads that the connections have.
    in_flight: usize,
    bytes: u64,
    reads_max: usize,
    broken: bool,
}

impl std::fmt::Debug for ReaderLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReaderLink").field("usage", &self.usage()).finish_non_exhaustive()
    }
}

impl ReaderLink {
    pub(crate) fn new(dialer: &Dialer, target: &Target, session: u128, wake: Wake) -> Self {
        let count = 1 + dialer.limits.bulk_connections.max(1);
        let shared = Arc::new(Shared {
            connections: Mutex::new(Connections { health: vec![Health::Trying; count], broken: false }),
            ended: Mutex::default(),
            broken: watch::Sender::new(None),
            wake,
        });
        let connection = |at| {
            let (commands, heard) = mpsc::unbounded_channel();
            let outstanding = Arc::new(AtomicU64::new(0));
            let load = Arc::clone(&outstanding);
            let reading =
                Reading::new(at, Arc::clone(&shared), load, heard, dialer.clone(), target.clone(), session);
            let runtime = if at == 0 { &dialer.runtimes.light } else { &dialer.runtimes.bulk };
            runtime.spawn(reading.run());
            Connection { outstanding, staged: Vec::new(), commands }
        };
        let connections = (0..count).map(connection).collect();
        let reads_max = dialer.limits.reads_max;
        let ended = Vec::new();
        Self { shared, connections, ended, told: false, in_flight: 0, bytes: 0, reads_max, broken: false }
    }

    fn read(&mut self, read: Read) {
        let bytes = read.record.bytes;
        if read.into.len() < bytes as usize {
            let what = "a slot that is shorter than its block".into();
            let result = Err(LinkError::Unsupported { what });
            self.ended.push(LinkDone::Read { read: read.read, into: read.into, result });
            return;
        }
        let outstanding = |at: usize| self.connections[at].outstanding.load(Ordering::Relaxed);
        let at = self.shared.connections().choose(bytes <= SMALL_BYTES, outstanding);
        let connection = &mut self.connections[at];
        connection.outstanding.fetch_add(bytes.into(), Ordering::Relaxed);
        connection.staged.push(Command::Read(read));
        self.in_flight += 1;
        self.bytes += u64::from(bytes);
    }

    fn hand_over(&mut self) {
        let wanted = self.connections.iter().any(|connection| !connection.staged.is_empty());
        if !wanted {
            return;
        }
        let health = self.shared.connections().health.clone();
        for (connection, health) in self.connections.iter_mut().zip(health) {
            // An empty batch reminds a connection that is down: there is something to read.
            let down = matches!(health, Health::Lost | Health::Failed);
            if down || !connection.staged.is_empty() {
                // A task ends only with the runtime; then nothing of this matters any more.
                let _ = connection.commands.send(std::mem::take(&mut connection.staged));
            }
        }
    }
}

impl Link for ReaderLink {
    fn submit(&mut self, op: LinkOp) -> Result<(), LinkOp> {
        match op {
            LinkOp::Read { .. } if self.in_flight >= self.reads_max || self.shared.connections().broken => {
                return Err(op);
            }
            LinkOp::Read { read, want, record, into, window: _ } => {
                self.read(Read { read, want, record, into });
            }
            LinkOp::Cancel { read } => {
                // Cheaper for all other reads than to remember where each of them went.
                for connection in &mut self.connections {
                    connection.staged.push(Command::Cancel(read));
                }
            }
            LinkOp::Expose { want, block } => {
                drop(block);
                let result = Err(LinkError::Unsupported { what: "this is the reader's end".into() });
                self.ended.push(LinkDone::Exposed { want, result });
            }
            LinkOp::Conceal { .. } => {}
        }
        Ok(())
    }

    fn kick(&mut self) {
        self.hand_over();
        if !self.ended.is_empty() && !std::mem::replace(&mut self.told, true) {
            (self.shared.wake)();
        }
    }

    fn poll(&mut self, done: &mut Vec<LinkDone>) {
        self.told = false;
        done.append(&mut self.ended);
        for Ended { read, bytes, into, result } in std::mem::take(&mut *self.shared.ended()) {
            self.in_flight -= 1;
            self.bytes -= u64::from(bytes);
            done.push(LinkDone::Read { read, into, result });
        }
        if self.broken {
            return;
        }
        let why = self.shared.broken.borrow().clone();
        let Some(why) = why else { return };
        // What was never kicked must come back, too.
        self.hand_over();
        if self.in_flight == 0 {
            self.broken = true;
            done.push(LinkDone::Broken { why });
        }
    }

    fn usage(&self) -> LinkUsage {
        LinkUsage { in_flight: self.in_flight, in_flight_max: self.reads_max, bytes: self.bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_goes_where_the_least_is_outstanding() {
        use Health::{Failed, Lost, Trying, Up};
        // Health of each; bytes outstanding of each; small; chosen.
        let table: [(&[Health], &[u64], bool, usize); 9] = [
            (&[Up, Up, Up], &[0, 0, 0], true, 0),
            (&[Up, Up, Up], &[900, 0, 0], true, 0),
            (&[Up, Up, Up], &[0, 5, 4], false, 2),
            (&[Up, Trying, Up], &[0, 3, 4], false, 1),
            (&[Up, Lost, Up], &[0, 0, 4], false, 2),
            (&[Lost, Up, Up], &[0, 7, 4], true, 2),
            (&[Up, Lost, Failed], &[0, 0, 0], false, 0),
            (&[Lost, Lost, Failed], &[0, 9, 1], false, 2),
            (&[Lost, Failed, Failed], &[0, 0, 0], true, 0),
        ];
        for (health, outstanding, small, wanted) in table {
            let connections = Connections { health: health.to_vec(), broken: false };
            let found = connections.choose(small, |at| outstanding[at]);
            assert_eq!(found, wanted, "{health:?} {outstanding:?} {small}");
        }
    }

    #[test]
    fn a_link_breaks_once_when_the_last_try_fails() {
        let mut connections = Connections { health: vec![Health::Up; 2], broken: false };
        assert!(!connections.change(0, Health::Lost));
        assert!(!connections.change(0, Health::Failed), "another one is up");
        assert!(!connections.change(1, Health::Lost), "nobody has tried again");
        assert!(!connections.change(1, Health::Trying));
        assert!(connections.change(1, Health::Failed));
        assert!(!connections.change(1, Health::Failed), "once");
    }
}
