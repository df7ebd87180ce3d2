//! Who is at the other end of a Unix socket, told by the kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags};

use crate::Error;

/// The process at the other end, as it was when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id.
    pub pid: u32,
    /// When the process started, in clock ticks since boot: tells it from a later one with the same pid.
    /// 0 when it is gone already or `/proc` does not show it.
    pub start_time: u64,
}

/// The peer of a connected Unix socket.
pub fn peer(socket: impl AsFd) -> Result<Peer, Error> {
    let cred = rustix::net::sockopt::socket_peercred(socket).map_err(Error::io("asking for the peer"))?;
    let pid = cred.pid.as_raw_pid().unsigned_abs();
    Ok(Peer { uid: cred.uid.as_raw(), gid: cred.gid.as_raw(), pid, start_time: start_time(pid).unwrap_or(0) })
}

/// A descriptor that becomes readable when the peer's process ends.
pub fn pidfd(socket: impl AsFd) -> Result<OwnedFd, Error> {
    let socket = socket.as_fd();
    let mut raw: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes one int into `raw`, whose size `length` says.
    let asked = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut raw).cast(),
            &raw mut length,
        )
    };
    if asked == 0 && raw >= 0 {
        // SAFETY: a descriptor made for us by the call above; nobody else has it.
        return Ok(unsafe { OwnedFd::from_raw_fd(raw) });
    }
    // Before Linux 6.5. The pid may have been used again since: the start time in `Peer` tells.
    let pid = rustix::net::sockopt::socket_peercred(socket).map_err(Error::io("asking for the peer"))?.pid;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(Error::io("opening a pidfd"))
}

/// Whether the process of `pidfd` has ended.
pub fn has_ended(pidfd: impl AsFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&now)).is_ok_and(|count| count > 0)
}

/// When process `pid` started, in clock ticks since boot (field 22 of `/proc/<pid>/stat`).
pub fn start_time(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable stat"))
}

/// The name in field 2 may hold spaces and brackets of its own: count from the last closing one.
fn parse_start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// This process, as a peer would see it.
pub fn myself() -> Peer {
    let pid = Pid::as_raw(Some(rustix::process::getpid())).unsigned_abs();
    Peer {
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        pid,
        start_time: start_time(pid).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::door::{Connection, Listener};

    #[test]
    fn the_peer_is_who_connected() {
        let (left, _right) = Connection::pair().unwrap();
        assert_eq!(peer(&left).unwrap(), myself());
        assert!(myself().start_time > 0 && !has_ended(pidfd(&left).unwrap()));
    }

    #[test]
    fn the_end_of_a_process_is_seen() {
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let pid = Pid::from_raw(child.id() as i32).unwrap();
        let fd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
        assert!(!has_ended(&fd));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(has_ended(&fd));
        assert!(start_time(child.id()).is_err());
    }

    #[test]
    fn a_socket_by_name_knows_its_peer_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path, 0o600).unwrap();
        let _client = Connection::connect(&path, std::time::Duration::from_secs(1)).unwrap();
        let server = listener.accept().unwrap().unwrap();
        assert_eq!(peer(&server).unwrap(), myself());
    }

    #[test]
    fn a_name_cannot_forge_the_start_time() {
        let rest = (3..=30).map(|field| field.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(parse_start_time(&format!("7 (a) b) 1 2 {rest}) {rest}")), Some(22));
        assert_eq!(parse_start_time("7 (a) S 1"), None);
    }
}
