//! The threads that connections run on.

use std::io;

use rustix::process::setpriority_process;
use tokio::runtime::{Builder, Handle, Runtime};

/// How much less of a busy processor the threads that move long blocks get than others: nice 10 is about a tenth.
const BULK_NICE: i32 = 10;

/// Two runtimes: one for words and small blocks, and one for long ones. What moves long blocks is never out of work.
/// With threads of its own it holds nothing else up: who waits for a word sleeps, and is let in when it comes.
#[derive(Clone, Debug)]
pub struct Runtimes {
    pub(crate) light: Handle,
    pub(crate) bulk: Handle,
}

impl Runtimes {
    /// Both may be the same, where nobody minds.
    pub fn new(light: Handle, bulk: Handle) -> Self {
        Self { light, bulk }
    }
}

/// A runtime of so many threads for long blocks. Where processors are busy, they come after all others of this program.
pub fn bulk_runtime(threads: usize) -> io::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_name("bulk")
        .on_thread_start(|| {
            // Of the calling thread alone, and allowed to everybody: it is less than before.
            if let Err(error) = setpriority_process(None, BULK_NICE) {
                tracing::debug!(%error, "a thread keeps its priority");
            }
        })
        .enable_all()
        .build()
}
