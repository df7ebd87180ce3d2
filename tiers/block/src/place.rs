//! Where a daemon and its callers on the same machine find each other when nobody says.

use std::path::{Path, PathBuf};

/// Name of the gRPC socket in the run directory.
pub const GRPC_SOCKET: &str = "kvd.sock";
/// Name of the socket for shared-memory workers in the run directory.
pub const WORKER_SOCKET: &str = "worker.sock";

/// Directory of the sockets for a process of user `uid` with this `$XDG_RUNTIME_DIR`.
pub fn run_dir(uid: u32, runtime_dir: Option<&Path>) -> PathBuf {
    match runtime_dir.filter(|dir| dir.is_absolute()) {
        _ if uid == 0 => "/run/kvd".into(),
        Some(dir) => dir.join("kvd"),
        None => format!("/tmp/kvd-{uid}").into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_others_have_their_own_run_directory() {
        let xdg = Some(Path::new("/run/user/7"));
        assert_eq!(run_dir(0, xdg), Path::new("/run/kvd"));
        assert_eq!(run_dir(7, xdg), Path::new("/run/user/7/kvd"));
        assert_eq!(run_dir(7, None), Path::new("/tmp/kvd-7"));
        assert_eq!(run_dir(7, Some(Path::new("run"))), Path::new("/tmp/kvd-7"));
    }
}
