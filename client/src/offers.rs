//! Descriptors for the daemon, over the worker socket: memory that has no other handle.
//!
//! ```text
//!   offer   Offer 1..n, each with its descriptor -> a call names the numbers -> Withdraw 1..n, when `Offered` goes
//! ```
//! The daemon answers neither. A withdrawal for which the socket has no room is said before the next offer.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kv_block::Fault;
use kv_block::code::Code;
use kv_shm::door::{Connection, Message, OFFERS_MAX, VERSION_OFFERS};

use crate::error::{Error, bug, timed_out, unreachable};

/// How long to wait until the daemon may have read some of what fills the socket.
const FULL: Duration = Duration::from_millis(1);

/// The worker's end of the socket after the handshake.
pub(crate) struct Offers {
    connection: Connection,
    /// What both speak.
    version: u16,
    next: AtomicU64,
    /// Numbers whose withdrawal is to be said.
    unsaid: Mutex<Vec<u64>>,
}

/// Descriptors that the daemon has, under numbers in a row. Withdrawn when dropped.
pub(crate) struct Offered<'a> {
    offers: &'a Offers,
    numbers: Range<u64>,
}

impl Offers {
    pub(crate) fn new(connection: Connection, version: u16) -> Self {
        Self { connection, version, next: AtomicU64::new(1), unsaid: Mutex::default() }
    }

    /// Offers each of `fds`, `until` at the latest.
    pub(crate) async fn offer(&self, fds: &[Arc<OwnedFd>], until: Instant) -> Result<Offered<'_>, Error> {
        if self.version < VERSION_OFFERS && !fds.is_empty() {
            let text = "this daemon takes no memory by descriptor; upgrade it, or let the memory be allocated as one piece";
            return Err(Fault::new(Code::Version, text).into());
        }
        if fds.len() > OFFERS_MAX {
            let text = format!(
                "{} pieces of memory by descriptor, {OFFERS_MAX} are taken; use larger pieces",
                fds.len()
            );
            return Err(Fault::new(Code::BatchTooLarge, text).into());
        }
        let first = self.next.fetch_add(fds.len() as u64, Ordering::Relaxed);
        // What was sent is withdrawn, however this ends.
        let mut offered = Offered { offers: self, numbers: first..first };
        while !self.withdraw() {
            wait(until).await?;
        }
        for fd in fds {
            let message = Message::Offer { number: offered.numbers.end };
            while !self.connection.try_send(&message, &[fd.as_fd()]).map_err(broken)? {
                wait(until).await?;
            }
            offered.numbers.end += 1;
        }
        Ok(offered)
    }

    /// Says what was not said yet, as far as there is room; whether that was all.
    fn withdraw(&self) -> bool {
        let mut unsaid = self.unsaid.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(number) = unsaid.last() {
            match self.connection.try_send(&Message::Withdraw { number: *number }, &[]) {
                Ok(true) => unsaid.pop(),
                Ok(false) => return false,
                // The session is over, and with it all that was offered.
                Err(_) => return true,
            };
        }
        true
    }
}

impl Offered<'_> {
    /// The number of the `at`th of those that were offered.
    pub(crate) fn number(&self, at: usize) -> Result<u64, Error> {
        let number = self.numbers.start + at as u64;
        self.numbers
            .contains(&number)
            .then_some(number)
            .ok_or_else(|| bug("a descriptor that was not offered"))
    }
}

impl Drop for Offered<'_> {
    fn drop(&mut self) {
        self.offers.unsaid.lock().unwrap_or_else(PoisonError::into_inner).extend(self.numbers.clone());
        self.offers.withdraw();
    }
}

async fn wait(until: Instant) -> Result<(), Error> {
    if Instant::now() >= until {
        return Err(timed_out("handing descriptors over"));
    }
    tokio::time::sleep(FULL).await;
    Ok(())
}

fn broken(error: kv_shm::Error) -> Error {
    match error {
        kv_shm::Error::Closed => unreachable("the daemon closed the connection"),
        error => {
            let cause =
                std::error::Error::source(&error).map_or_else(String::new, |cause| format!(": {cause}"));
            unreachable(format!("handing a descriptor over: {error}{cause}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use kv_block::FaultKind;
    use kv_shm::door::VERSION;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn file() -> Arc<OwnedFd> {
        Arc::new(tempfile::tempfile().unwrap().into())
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
    }

    fn heard(daemon: &Connection) -> Vec<Message> {
        std::iter::from_fn(|| daemon.try_recv().unwrap().map(|(message, _)| message)).collect()
    }

    #[test]
    fn what_is_offered_is_withdrawn_and_numbers_are_not_used_twice() {
        let (daemon, worker) = Connection::pair().unwrap();
        let offers = Offers::new(worker, VERSION);
        let until = Instant::now() + LONG;
        let offered = run(offers.offer(&[file(), file()], until)).unwrap();
        let (first, second) = (offered.number(0).unwrap(), offered.number(1).unwrap());
        assert!(offered.number(2).is_err());
        assert_eq!(heard(&daemon), [first, second].map(|number| Message::Offer { number }));
        drop(offered);
        let withdrawn = heard(&daemon);
        assert_eq!(withdrawn.len(), 2);
        assert!(
            [first, second].iter().all(|number| withdrawn.contains(&Message::Withdraw { number: *number }))
        );
        let again = run(offers.offer(&[file()], until)).unwrap();
        assert!(again.number(0).unwrap() > second);
    }

    #[test]
    fn a_full_socket_is_waited_for_and_what_could_not_be_said_is_said_later() {
        let (daemon, worker) = Connection::pair().unwrap();
        let offers = Offers::new(worker, VERSION);
        let many = vec![file(); OFFERS_MAX];
        let gave_up = run(offers.offer(&many, Instant::now())).err().unwrap();
        assert_eq!(gave_up.kind(), FaultKind::Timeout);
        let left = offers.unsaid.lock().unwrap().len();
        assert!(left > 0, "there was no room for the withdrawals either");
        let offered = heard(&daemon).len();
        // Whoever offers next says them first, while the daemon reads.
        let until = Instant::now() + LONG;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let mut all = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    all.extend(heard(&daemon));
                    std::thread::yield_now();
                }
                all.extend(heard(&daemon));
                all
            });
            drop(run(offers.offer(&many, until)).unwrap());
            while !offers.withdraw() && Instant::now() < until {
                std::thread::yield_now();
            }
            stop.store(true, Ordering::Relaxed);
            let all = reading.join().unwrap();
            let withdrawn = all.iter().filter(|message| matches!(message, Message::Withdraw { .. })).count();
            assert_eq!((all.len() - withdrawn, withdrawn), (OFFERS_MAX, offered + OFFERS_MAX));
        });
    }

    #[test]
    fn an_older_daemon_too_many_and_a_closed_connection_are_said() {
        let until = Instant::now() + LONG;
        let (_daemon, worker) = Connection::pair().unwrap();
        let old = Offers::new(worker, 2);
        assert_eq!(run(old.offer(&[file()], until)).err().unwrap().kind(), FaultKind::Unsupported);
        run(old.offer(&[], until)).unwrap();
        let (daemon, worker) = Connection::pair().unwrap();
        let offers = Offers::new(worker, VERSION);
        let many = vec![file(); OFFERS_MAX + 1];
        assert_eq!(run(offers.offer(&many, until)).err().unwrap().code(), Some(Code::BatchTooLarge));
        drop(daemon);
        assert_eq!(run(offers.offer(&[file()], until)).err().unwrap().kind(), FaultKind::Unavailable);
    }
}
