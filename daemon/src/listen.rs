//! Who may be listened to, and where: the rules a configuration must keep before anything is opened, and the
//! run directory with its Unix sockets.
//!
//! A Unix socket is guarded by its directory and its mode, so it needs no more. TCP beyond this machine needs
//! mutual TLS, because it has no other idea of who calls. One daemon owns a run directory at a time: a lock on
//! `kvd.lock` says so, and dies with the process. A socket file that nobody answers on is left over from a
//! daemon that was killed, and is replaced; one that is answered is somebody else's.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kv_block::place::{GRPC_SOCKET, WORKER_SOCKET};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::config::units::{Address, OrOff, Place};
use crate::config::{Config, ConfigError, Origin, Problem};

/// Longest path of a Unix socket, in bytes: `sun_path` less its closing zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Whether a daemon may start with these listeners. [`Config::load`] asks this too.
pub fn allow_listen(config: &Config) -> Result<(), ConfigError> {
    let problems: Vec<_> = refusals(config)
        .into_iter()
        .map(|(key, message)| Problem { origin: Origin::Default, message: format!("{key}: {message}") })
        .collect();
    if problems.is_empty() { Ok(()) } else { Err(ConfigError { problems }) }
}

/// Keys of listeners that may not be, and why.
pub(crate) fn refusals(config: &Config) -> Vec<(&'static str, String)> {
    let listen = &config.listen;
    let mut found = Vec::new();
    let (cert, key, client_ca) = (
        listen.tls.cert.get().is_some(),
        listen.tls.key.get().is_some(),
        listen.tls.client_ca.get().is_some(),
    );
    match (cert, key) {
        (true, false) => found.push(("listen.tls.key", "a certificate is given without its key".into())),
        (false, true) => found.push(("listen.tls.cert", "a key is given without its certificate".into())),
        (false, false) if client_ca => {
            found.push(("listen.tls.cert", "a client CA is given, but no certificate of this node".into()));
        }
        _ => {}
    }
    let beyond_this_machine = |address: &OrOff<Address>| {
        address.get().map(|address| address.0).filter(|address| !address.ip().to_canonical().is_loopback())
    };
    if let Some(address) = beyond_this_machine(&listen.tcp)
        && !(cert && key && client_ca)
        && !listen.insecure
    {
        found.push((
            "listen.tcp",
            format!(
                "{address} can be reached from other machines, and there is no mutual TLS: set listen.tls.cert, \
                 listen.tls.key and listen.tls.client_ca, or listen.insecure = true (--insecure) where the \
                 network itself is trusted"
            ),
        ));
    }
    if let Some(address) = beyond_this_machine(&listen.http)
        && !listen.http_public
    {
        found.push((
            "listen.http",
            format!(
                "{address} can be reached from other machines: set listen.http_public = true if anybody there \
                 may read health and metrics"
            ),
        ));
    }
    if let Some(address) = beyond_this_machine(&config.peers.listen)
        && !config.has_mutual_tls()
        && !listen.insecure
    {
        found.push((
            "peers.listen",
            format!(
                "{address} can be reached from other machines, and there is no mutual TLS: set listen.tls.cert, \
                 listen.tls.key and listen.tls.client_ca, or listen.insecure = true (--insecure) where the \
                 network itself is trusted"
            ),
        ));
    }
    if let Some(member) = config.peers().find(|member| !member.is_local())
        && !config.has_mutual_tls()
        && !listen.insecure
    {
        found.push((
            "peers.members",
            format!(
                "{member} is another machine, and there is no mutual TLS: set listen.tls.cert, listen.tls.key and \
                 listen.tls.client_ca, or listen.insecure = true (--insecure) where the network itself is trusted"
            ),
        ));
    }
    match config.lmcache.listen.get() {
        Some(Place::Tcp(address)) if !address.ip().to_canonical().is_loopback() && !listen.insecure => {
            found.push((
                "lmcache.listen",
                format!(
                    "{address} can be reached from other machines, and LMCache's protocol knows no authentication: \
                     listen on 127.0.0.1, or set listen.insecure = true (--insecure) where the network itself is \
                     trusted"
                ),
            ));
        }
        Some(Place::Unix(path)) if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX => {
            let bytes = path.as_os_str().len();
            found.push((
                "lmcache.listen",
                format!("the socket path has {bytes} bytes; the kernel takes {SOCKET_PATH_BYTES_MAX}"),
            ));
        }
        _ => {}
    }
    let longest = config.run_dir().join(WORKER_SOCKET.max(GRPC_SOCKET)).as_os_str().len();
    if longest > SOCKET_PATH_BYTES_MAX {
        found.push((
            "listen.run_dir",
            format!("its socket paths have {longest} bytes; the kernel takes {SOCKET_PATH_BYTES_MAX}"),
        ));
    }
    found
}

/// Why the run directory or a socket in it cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A step failed in the kernel.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Someone else could put files there.
    #[error("the run directory {} {why}; choose another with --run-dir", path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Another daemon has it.
    #[error("a daemon (pid {pid}) already runs in {}; stop it, or choose another with --run-dir", path.display())]
    Taken {
        /// The directory.
        path: PathBuf,
        /// What it wrote into its lock.
        pid: String,
    },
    /// Somebody answers there.
    #[error("another program listens on {}", path.display())]
    Answered {
        /// The socket.
        path: PathBuf,
    },
    /// What stands there was not made by a daemon.
    #[error("{} is in the way and is no socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
}

fn io<E: Into<std::io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> ListenError {
    move |source| ListenError::Io { what, path: path.to_owned(), source: source.into() }
}

/// The run directory, ours until dropped.
pub struct RunDir {
    path: PathBuf,
    socket_mode: u32,
    /// Held for its lock.
    _lock: File,
}

impl RunDir {
    /// Makes the directory where it is missing and takes it. Who may enter follows from `socket_mode`.
    pub fn claim(path: &Path, socket_mode: u32) -> Result<Self, ListenError> {
        let class = |bits: u32, enter: u32| if socket_mode & bits == 0 { 0 } else { enter };
        let dir_mode = 0o700 | class(0o060, 0o050) | class(0o006, 0o005);
        if !path.exists() {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(io("create", parent))?;
            }
            match DirBuilder::new().mode(dir_mode).create(path) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(io("create", path)(error));
                }
                _ => {}
            }
        }
        let meta = std::fs::symlink_metadata(path).map_err(io("look at", path))?;
        let own = rustix::process::getuid().as_raw();
        let unsafe_because = if !meta.is_dir() {
            Some("is not a directory".to_owned())
        } else if meta.uid() != own && meta.uid() != 0 {
            Some(format!("belongs to user {}", meta.uid()))
        } else if meta.mode() & 0o002 != 0 {
            Some("can be written by everybody".to_owned())
        } else {
            None
        };
        if let Some(why) = unsafe_because {
            return Err(ListenError::Unsafe { path: path.to_owned(), why });
        }
        let lock_path = path.join("kvd.lock");
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open(&lock_path)
            .map_err(io("open", &lock_path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                let _ = lock.take(20).read_to_string(&mut pid);
                return Err(ListenError::Taken { path: path.to_owned(), pid: pid.trim().to_owned() });
            }
            done => done.map_err(io("lock", &lock_path))?,
        }
        lock.set_len(0).and_then(|()| lock.rewind()).map_err(io("write", &lock_path))?;
        writeln!(lock, "{}", std::process::id()).map_err(io("write", &lock_path))?;
        Ok(Self { path: path.to_owned(), socket_mode, _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Listens on the gRPC socket. Non-blocking.
    pub fn listen_grpc(&self) -> Result<Listening<std::os::unix::net::UnixListener>, ListenError> {
        let Listening { socket, path, inode } = self.listen(GRPC_SOCKET, SocketType::STREAM)?;
        Ok(Listening { socket: socket.into(), path, inode })
    }

    /// Listens on the socket of shared-memory workers: `SOCK_SEQPACKET`, non-blocking.
    pub fn listen_workers(&self) -> Result<Listening<OwnedFd>, ListenError> {
        self.listen(WORKER_SOCKET, SocketType::SEQPACKET)
    }

    fn listen(&self, name: &str, kind: SocketType) -> Result<Listening<OwnedFd>, ListenError> {
        let path = self.path.join(name);
        let address = SocketAddrUnix::new(&path).map_err(io("name", &path))?;
        let open = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).map_err(io("open", &path))
        };
        let socket = open()?;
        match rustix::net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => {
                let meta = std::fs::symlink_metadata(&path).map_err(io("look at", &path))?;
                if !meta.file_type().is_socket() {
                    return Err(ListenError::NotASocket { path });
                }
                if rustix::net::connect(open()?, &address) != Err(Errno::CONNREFUSED) {
                    return Err(ListenError::Answered { path });
                }
                std::fs::remove_file(&path).map_err(io("remove", &path))?;
                rustix::net::bind(&socket, &address).map_err(io("listen on", &path))?;
            }
            done => done.map_err(io("listen on", &path))?,
        }
        // The mode is right before the first caller: nobody can connect until `listen`.
        let mode = std::fs::Permissions::from_mode(self.socket_mode);
        std::fs::set_permissions(&path, mode).map_err(io("set the mode of", &path))?;
        rustix::net::listen(&socket, 128).map_err(io("listen on", &path))?;
        let inode = std::fs::symlink_metadata(&path).map_err(io("look at", &path))?.ino();
        Ok(Listening { socket, path, inode })
    }
}

/// A listening socket, and what removes its file. Keep it as long as the run directory.
pub struct Listening<S> {
    socket: S,
    path: PathBuf,
    inode: u64,
}

/// Removes the socket file when dropped, if it is still the one that was made.
pub struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl<S> Listening<S> {
    /// The socket, and its file to be held until nobody shall connect any more.
    pub fn split(self) -> (S, SocketFile) {
        (self.socket, SocketFile { path: self.path, inode: self.inode })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|meta| meta.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::units::{FilePath, Text};
    use std::os::unix::net::UnixStream;

    #[test]
    fn nothing_listens_beyond_this_machine_without_mutual_tls_or_a_word() {
        let file = || OrOff::Set(FilePath("/f".into()));
        let rows: [(&str, &str, bool, bool, Option<&str>); 16] = [
            ("off", "", false, false, None),
            ("127.0.0.1:1", "", false, false, None),
            ("127.9.9.9:1", "", false, false, None),
            ("[::1]:1", "", false, false, None),
            ("[::ffff:127.0.0.1]:1", "", false, false, None),
            ("127.0.0.1:1", "cert key ca", false, false, None),
            ("127.0.0.1:1", "cert", false, false, Some("listen.tls.key")),
            ("127.0.0.1:1", "key", false, false, Some("listen.tls.cert")),
            ("127.0.0.1:1", "ca", false, false, Some("listen.tls.cert")),
            ("0.0.0.0:1", "", false, false, Some("listen.tcp")),
            ("[::]:1", "", false, false, Some("listen.tcp")),
            ("10.0.0.1:1", "cert key", false, false, Some("listen.tcp")),
            ("10.0.0.1:1", "cert key", true, false, None),
            ("10.0.0.1:1", "", true, false, None),
            ("10.0.0.1:1", "cert key ca", false, false, None),
            ("10.0.0.1:1", "cert ca", true, false, Some("listen.tls.key")),
        ];
        for (tcp, tls, insecure, http_public, refused) in rows {
            let mut config = Config::default();
            config.listen.tcp = OrOff::parse(tcp).unwrap();
            config.listen.insecure = insecure;
            config.listen.http_public = http_public;
            for part in tls.split_whitespace() {
                match part {
                    "cert" => config.listen.tls.cert = file(),
                    "key" => config.listen.tls.key = file(),
                    _ => config.listen.tls.client_ca = file(),
                }
            }
            let keys: Vec<_> = refusals(&config).into_iter().map(|(key, _)| key).collect();
            assert_eq!(keys, refused.into_iter().collect::<Vec<_>>(), "{tcp} {tls} insecure={insecure}");
            assert_eq!(allow_listen(&config).is_ok(), refused.is_none());
        }
    }

    #[test]
    fn http_beyond_this_machine_needs_a_word_and_insecure_is_not_it() {
        let mut config = Config::default();
        config.listen.http = OrOff::parse("0.0.0.0:1").unwrap();
        config.listen.insecure = true;
        assert_eq!(refusals(&config)[0].0, "listen.http");
        config.listen.http_public = true;
        assert_eq!(allow_listen(&config), Ok(()));
    }

    #[test]
    fn the_door_of_lmcache_stays_on_this_machine_without_a_word() {
        let rows = [
            ("off", false, true),
            ("127.0.0.1:6555", false, true),
            ("[::1]:6555", false, true),
            ("unix:/run/kvd/lmcache.sock", false, true),
            ("0.0.0.0:6555", false, false),
            ("10.0.0.1:6555", false, false),
            ("10.0.0.1:6555", true, true),
        ];
        for (text, insecure, allowed) in rows {
            let mut config = Config::default();
            config.lmcache.listen = OrOff::parse(text).unwrap();
            config.listen.insecure = insecure;
            assert_eq!(allow_listen(&config).is_ok(), allowed, "{text} insecure={insecure}");
            assert!(allowed || refusals(&config)[0].0 == "lmcache.listen");
        }
        let mut config = Config::default();
        config.lmcache.listen = OrOff::parse(&format!("unix:/{}", "s".repeat(200))).unwrap();
        assert_eq!(refusals(&config)[0].0, "lmcache.listen");
    }

    #[test]
    fn a_run_directory_has_one_daemon() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("run");
        let first = RunDir::claim(&dir, 0o660).unwrap();
        assert_eq!(std::fs::metadata(&dir).unwrap().mode() & 0o007, 0, "others stay out");
        let second = RunDir::claim(&dir, 0o660).err().unwrap().to_string();
        assert!(second.contains(&format!("pid {}", std::process::id())), "{second}");
        drop(first);
        RunDir::claim(&dir, 0o660).unwrap();
    }

    #[test]
    fn a_run_directory_that_others_can_write_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::set_permissions(temp.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let refused = RunDir::claim(temp.path(), 0o660).err().unwrap();
        assert!(matches!(refused, ListenError::Unsafe { .. }), "{refused}");
        let link = tempfile::tempdir().unwrap().keep().join("link");
        std::os::unix::fs::symlink(temp.path(), &link).unwrap();
        let refused = RunDir::claim(&link, 0o660).err().unwrap();
        assert!(matches!(refused, ListenError::Unsafe { .. }), "{refused}");
        std::fs::remove_dir_all(link.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_socket_left_over_is_replaced_and_one_that_answers_is_not() {
        let temp = tempfile::tempdir().unwrap();
        let run = RunDir::claim(&temp.path().join("run"), 0o600).unwrap();
        let path = run.path().join(GRPC_SOCKET);

        let (socket, file) = run.listen_grpc().unwrap().split();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert!(matches!(run.listen_grpc().err().unwrap(), ListenError::Answered { .. }));

        // As after kill -9: the file stays, nobody listens.
        std::mem::forget(file);
        drop(socket);
        let (_socket, file) = run.listen_grpc().unwrap().split();
        UnixStream::connect(&path).unwrap();
        drop(file);
        assert!(!path.exists());

        std::fs::write(&path, "").unwrap();
        assert!(matches!(run.listen_grpc().err().unwrap(), ListenError::NotASocket { .. }));

        let (_workers, file) = run.listen_workers().unwrap().split();
        assert!(matches!(run.listen_workers().err().unwrap(), ListenError::Answered { .. }));
        // A newer daemon's socket is not removed by an older one's end.
        std::fs::remove_file(run.path().join(WORKER_SOCKET)).unwrap();
        std::fs::write(run.path().join(WORKER_SOCKET), "").unwrap();
        drop(file);
        assert!(run.path().join(WORKER_SOCKET).exists());
    }
}
