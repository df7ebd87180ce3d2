//! What wakes the side that sleeps: one end each of a socket pair.
//!
//! Not an eventfd: both sides would share one open file description, and a worker could clear its
//! `O_NONBLOCK`, fill its counter and so stop the shard that rings it. The two ends of a socket pair have a
//! description each, and `MSG_DONTWAIT` does not ask the flags. It also shows the other side's end.

#[cfg(not(loom))]
pub use real::Bell;
#[cfg(not(loom))]
mod real {
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::io::Errno;
    use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

    use crate::Error;

    /// One end of a pair: rings the other, and hears it.
    #[derive(Debug)]
    pub struct Bell(OwnedFd);

    impl Bell {
        /// A worker's end and a shard's end; both are alike.
        pub fn pair() -> Result<(Self, Self), Error> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let (left, right) = net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)
                .map_err(Error::io("making a bell"))?;
            Ok((Self(left), Self(right)))
        }

        /// Wakes the other side. Never blocks; a bell that is full has been rung.
        pub fn ring(&self) {
            let _ = net::send(&self.0, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }

        /// Takes what was rung so far, a bounded amount a call. `Closed` when the other end is gone.
        pub fn drain(&self) -> Result<(), Error> {
            match net::recv(&self.0, &mut [0u8; 256], RecvFlags::DONTWAIT) {
                Ok((0, _)) => Err(Error::Closed),
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
                Err(Errno::CONNRESET) => Err(Error::Closed),
                Err(errno) => Err(Error::io("draining a bell")(errno)),
            }
        }

        /// Sleeps until it is rung or `timeout` is over; tells whether it was rung. `Closed` when the other
        /// end is gone.
        pub fn wait(&self, timeout: Duration) -> Result<bool, Error> {
            let timeout = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => Ok(false),
                Ok(_) => self.drain().map(|()| true),
                Err(Errno::INTR) => Ok(true),
                Err(errno) => Err(Error::io("waiting for a bell")(errno)),
            }
        }
    }

    impl AsFd for Bell {
        /// To wait for many bells at once: readable when rung.
        fn as_fd(&self) -> BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    impl From<OwnedFd> for Bell {
        fn from(fd: OwnedFd) -> Self {
            Self(fd)
        }
    }

    impl From<Bell> for OwnedFd {
        fn from(bell: Bell) -> Self {
            bell.0
        }
    }
}

#[cfg(loom)]
pub use modelled::Bell;
#[cfg(loom)]
mod modelled {
    use std::time::Duration;

    use loom::sync::{Arc, Condvar, Mutex};

    use crate::Error;

    type Ear = Arc<(Mutex<bool>, Condvar)>;

    /// The bell as the model checker sees it: without time, so a lost wake-up is a deadlock.
    #[derive(Debug)]
    pub struct Bell {
        mine: Ear,
        other: Ear,
    }

    impl Bell {
        /// Two ends.
        pub fn pair() -> Result<(Self, Self), Error> {
            let (left, right) = (Ear::default(), Ear::default());
            let here = Self { mine: Arc::clone(&left), other: Arc::clone(&right) };
            Ok((here, Self { mine: right, other: left }))
        }

        /// Wakes the other side.
        pub fn ring(&self) {
            *self.other.0.lock().unwrap() = true;
            self.other.1.notify_one();
        }

        /// Takes what was rung so far.
        pub fn drain(&self) -> Result<(), Error> {
            *self.mine.0.lock().unwrap() = false;
            Ok(())
        }

        /// Sleeps until it is rung.
        pub fn wait(&self, _timeout: Duration) -> Result<bool, Error> {
            let mut rung = self.mine.0.lock().unwrap();
            while !*rung {
                rung = self.mine.1.wait(rung).unwrap();
            }
            *rung = false;
            Ok(true)
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Error;

    #[test]
    fn a_bell_rung_for_ever_never_blocks_and_is_heard_once() {
        let (worker, shard) = Bell::pair().unwrap();
        for _ in 0..100_000 {
            worker.ring();
        }
        assert!(shard.wait(Duration::ZERO).unwrap());
        while shard.wait(Duration::ZERO).unwrap() {}
        worker.ring();
        assert!(shard.wait(Duration::from_secs(10)).unwrap());
    }

    #[test]
    fn the_end_of_the_other_side_is_heard() {
        let (worker, shard) = Bell::pair().unwrap();
        drop(worker);
        assert!(matches!(shard.wait(Duration::from_secs(10)), Err(Error::Closed)));
        shard.ring();
    }
}
