//! How many callers may be connected over gRPC, and how long one may take to begin.
//!
//! Each connection costs a descriptor and a buffer, and whoever may connect may connect again and again. So there
//! are at most so many, those beyond are closed at once, and one that does not begin to speak HTTP/2 is closed
//! after [`QUIET_LIMIT`]. (One that did is asked for a sign of life by HTTP/2 itself.)

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::Connected;

/// Time within which a caller must have begun.
pub const QUIET_LIMIT: Duration = Duration::from_secs(10);
/// Most connections, however many descriptors there may be.
const CONNECTIONS_MAX: usize = 1024;
/// How often the log hears of refused ones at most.
const WARN_EVERY: Duration = Duration::from_secs(10);
/// What an HTTP/2 connection begins with: `PRI * HTTP/2.0` and so on.
const PREFACE_BYTES: usize = 24;

/// Lets the process open as many descriptors as it may at all. How many that is.
pub fn raise_descriptor_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The callers of all gRPC listeners together.
#[derive(Clone, Debug)]
pub struct Connections {
    slots: Arc<Semaphore>,
    max: usize,
}

impl Connections {
    /// A quarter of the descriptors: workers and files need the rest.
    pub fn new(descriptors: u64) -> Self {
        let max = usize::try_from(descriptors / 4).unwrap_or(usize::MAX).clamp(16, CONNECTIONS_MAX);
        Self { slots: Arc::new(Semaphore::new(max)), max }
    }

    /// Those of `incoming` for which there is room.
    pub fn admit<IO, S: Stream<Item = io::Result<IO>>>(
        &self,
        incoming: S,
    ) -> impl Stream<Item = io::Result<Connection<IO>>> + use<IO, S> {
        let (slots, max) = (Arc::clone(&self.slots), self.max);
        let mut warned: Option<Instant> = None;
        incoming.filter_map(move |io| {
            let io = match io {
                Ok(io) => io,
                Err(error) => return Some(Err(error)),
            };
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
                    warned = Some(Instant::now());
                    tracing::warn!(max, "as many gRPC connections as there may be; a new one was closed");
                }
                return None;
            };
            let quiet = Some((Box::pin(tokio::time::sleep(QUIET_LIMIT)), PREFACE_BYTES));
            Some(Ok(Connection { io, quiet, _slot: slot }))
        })
    }
}

/// A connection that is counted.
#[derive(Debug)]
pub struct Connection<IO> {
    io: IO,
    /// Until when it must have said how many bytes more; `None` once it has.
    quiet: Option<(Pin<Box<Sleep>>, usize)>,
    _slot: OwnedSemaphorePermit,
}

impl<IO: Connected> Connected for Connection<IO> {
    type ConnectInfo = IO::ConnectInfo;
    fn connect_info(&self) -> IO::ConnectInfo {
        self.io.connect_info()
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Connection<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        let Some((limit, missing)) = &mut self.quiet else { return read };
        *missing = missing.saturating_sub(buffer.filled().len() - before);
        if *missing == 0 {
            self.quiet = None;
        } else if read.is_pending() && limit.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Connection<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn those_beyond_are_closed_and_silent_ones_do_not_stay() {
        let connections = Connections::new(64);
        assert_eq!(connections.max, 16);
        let (mut ends, mut incoming) = (Vec::new(), Vec::new());
        for _ in 0..20 {
            let (near, far) = tokio::io::duplex(64);
            ends.push(near);
            incoming.push(Ok(far));
        }
        let admitted = connections.admit(tokio_stream::iter(incoming));
        let mut admitted: Vec<_> = admitted.map(Result::unwrap).collect().await;
        assert_eq!(admitted.len(), 16);
        assert_eq!(ends[19].read(&mut [0; 1]).await.unwrap(), 0, "closed at once");
        // One says too little, one begins as it should.
        tokio::io::AsyncWriteExt::write_all(&mut ends[0], b"PRI").await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut ends[1], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        assert_eq!(admitted[0].read(&mut [0; 64]).await.unwrap(), 3);
        let began = tokio::time::Instant::now();
        let error = admitted[0].read(&mut [0; 64]).await.unwrap_err();
        assert_eq!((error.kind(), began.elapsed()), (io::ErrorKind::TimedOut, QUIET_LIMIT));
        assert_eq!(admitted[1].read(&mut [0; 64]).await.unwrap(), PREFACE_BYTES);
        let mut buffer = [0; 64];
        let later = tokio::time::timeout(10 * QUIET_LIMIT, admitted[1].read(&mut buffer));
        assert!(later.await.is_err(), "it may be silent from now on");
        admitted.truncate(8);
        assert_eq!(connections.slots.available_permits(), 8);
    }
}
