//! A kernel that refuses io_uring, as containers do: threads take over and say how to change it.

#![expect(unsafe_code, reason = "a seccomp filter is the only way to be refused on purpose")]

mod common;

use common::{MIB, Node};
use kv_ssd::{Engine, Error, SsdConfig, SsdStore};

/// Lets `io_uring_setup` fail with EPERM in this thread and those it starts.
fn refuse_io_uring() -> Result<(), std::io::Error> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut filter = [
        // The number of the system call is the first word of what the filter sees.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            jf: 1,
            ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_io_uring_setup as u32)
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: plain system calls; the program outlives the second one, which copies it.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
    };
    if refused { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[test]
fn without_io_uring_threads_take_over_with_a_note() {
    // The filter stays with the thread, so it gets one of its own.
    let thread = std::thread::spawn(|| {
        if let Err(error) = refuse_io_uring() {
            eprintln!("skipped: no seccomp filter: {error}");
            return;
        }
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let config = SsdConfig { segment_bytes: MIB, ..SsdConfig::new(dir.path(), 8 * MIB) };
        let insisting = SsdConfig { engine: Engine::Ring, ..config.clone() };
        let refused = SsdStore::open(insisting, Box::new(|| {})).map(|_| ()).unwrap_err();
        assert!(matches!(refused, Error::NoRing { .. }), "{refused}");
        let (store, recovered) = SsdStore::open(config, Box::new(|| {})).unwrap();
        recovered.finish().unwrap();
        let notes = store.notes();
        assert!(notes.iter().any(|note| note.contains("kernel.io_uring_disabled")), "{notes:?}");
        let mut node = Node::new(store);
        let (record, at) = node.write(1, 100_000).unwrap();
        assert_eq!(node.read(&record, at), Ok(()));
    });
    thread.join().unwrap();
}
