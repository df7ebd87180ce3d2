//! A second process: the test's own program again, with `KVD_GPU_OTHER` saying what it is to do. It says a line when
//! something is done and goes on when it is sent one.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use kv_gpu::{MemoryHandle, Uuid};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

const ROLE: &str = "KVD_GPU_OTHER";
/// Before a line that is meant for the test; the test harness says lines too.
const SAYS: &str = "other process: ";

pub(crate) struct Other {
    pub(crate) child: Child,
    from: BufReader<ChildStdout>,
    to: ChildStdin,
}

impl Other {
    pub(crate) fn start(role: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "the_other_process", "--nocapture"]).env(ROLE, role);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (from, to) = (BufReader::new(child.stdout.take().unwrap()), child.stdin.take().unwrap());
        Self { child, from, to }
    }

    pub(crate) fn hear(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.from.read_line(&mut line).unwrap() > 0, "the other process ended");
            // The harness may have begun the line.
            if let Some((_, said)) = line.split_once(SAYS) {
                return said.trim().to_owned();
            }
        }
    }

    pub(crate) fn tell(&mut self) {
        self.to.write_all(b"\n").unwrap();
    }

    pub(crate) fn memory(&mut self) -> MemoryHandle {
        let said = self.hear();
        let parts: Vec<_> = said.split(' ').collect();
        MemoryHandle {
            device: Uuid(unhex(parts[0])),
            handle: unhex(parts[1]),
            offset: parts[2].parse().unwrap(),
            bytes: parts[3].parse().unwrap(),
        }
    }

    /// A descriptor of the other process, by the number that it said: taken from it, as its parent may.
    pub(crate) fn descriptor(&self, number: &str) -> OwnedFd {
        let process = Pid::from_raw(self.child.id() as i32).unwrap();
        let process = rustix::process::pidfd_open(process, PidfdFlags::empty()).unwrap();
        rustix::process::pidfd_getfd(&process, number.parse().unwrap(), PidfdGetfdFlags::empty()).unwrap()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn ends_well(mut self) {
        self.tell();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What this process is to do, if it is the other.
pub(crate) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn unhex<const N: usize>(text: &str) -> [u8; N] {
    std::array::from_fn(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap())
}

pub(crate) fn say(line: &str) {
    println!("{SAYS}{line}");
}

pub(crate) fn say_memory(handle: &MemoryHandle) {
    say(&format!("{} {} {} {}", hex(&handle.device.0), hex(&handle.handle), handle.offset, handle.bytes));
}

/// The next line of the test; when the test has ended, so does this.
pub(crate) fn go_on() {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line).unwrap() == 0 {
        std::process::exit(1);
    }
}
