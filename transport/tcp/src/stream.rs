//! A socket with or without TLS, and what is set on it.
//!
//! No buffer size is set: a size that is set is a size that stays, while the kernel grows receive and send buffers to
//! what the path's delay and rate call for (`tcp_rmem`, `tcp_wmem`). Frames are written whole and in batches, so
//! waiting for more to send (Nagle) would only add a round trip.

use std::io;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::limits::Limits;

/// Silence after which the kernel asks whether the other host is there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// Time between two such questions.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How many go without an answer before the connection is dead.
const KEEPALIVE_PROBES: u32 = 3;
/// How long sent bytes may go unacknowledged, or a full receiver may stay full. Longer than the time limit of a
/// stall, which gives a better reason.
const UNACKNOWLEDGED: Duration = Duration::from_secs(25);

/// What every connection has set on it. A kernel that refuses one of these still moves bytes.
pub(crate) fn tune(socket: &TcpStream, limits: &Limits) {
    let set = || -> rustix::io::Result<()> {
        sockopt::set_tcp_nodelay(socket, true)?;
        sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES)?;
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_user_timeout(socket, UNACKNOWLEDGED.as_millis() as u32)?;
        limits.congestion.as_ref().map_or(Ok(()), |name| sockopt::set_tcp_congestion(socket, name))
    };
    if let Err(error) = set() {
        tracing::warn!(%error, "a socket option was refused");
    }
}

/// What TLS reads from: rustls takes 4 KiB at a time, the kernel gives as much as there is.
pub(crate) type Ahead = BufReader<TcpStream>;

/// Room for what is read ahead of TLS, in bytes.
const AHEAD_BYTES: usize = 64 << 10;

pub(crate) fn ahead(socket: TcpStream) -> Ahead {
    BufReader::with_capacity(AHEAD_BYTES, socket)
}

/// Both directions of a connection.
#[derive(Debug)]
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<Ahead>>),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buf),
            Self::Tls(session) => Pin::new(session).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Tls(session) => Pin::new(session).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write_vectored(cx, pieces),
            Self::Tls(session) => Pin::new(session).poll_write_vectored(cx, pieces),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(session) => Pin::new(session).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(session) => Pin::new(session).poll_shutdown(cx),
        }
    }
}

/// Reads into `place`; 0 is the end of the stream, however rudely it came.
pub(crate) fn poll_read_some<S: AsyncRead + Unpin>(
    stream: &mut S,
    cx: &mut Context<'_>,
    place: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut buf = ReadBuf::new(place);
    match ready!(Pin::new(stream).poll_read(cx, &mut buf)) {
        Ok(()) => Poll::Ready(Ok(buf.filled().len())),
        // TLS without a word of goodbye: nothing here takes the end of a stream for the end of a message.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(0)),
        Err(error) => Poll::Ready(Err(error)),
    }
}

/// Waits for a write, but no longer than `limit`. A clock is only started when it cannot be done at once.
pub(crate) async fn in_time<T>(
    limit: Duration,
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<io::Result<T>>,
) -> io::Result<T> {
    let first = std::future::poll_fn(|cx| match poll(cx) {
        Poll::Ready(done) => Poll::Ready(Some(done)),
        Poll::Pending => Poll::Ready(None),
    });
    if let Some(done) = first.await {
        return done;
    }
    match tokio::time::timeout(limit, std::future::poll_fn(poll)).await {
        Ok(done) => done,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the other end takes nothing")),
    }
}

/// Writes all of `bytes`; each piece may take as long as `limit`.
pub(crate) async fn write_all<S: AsyncWrite + Unpin>(
    stream: &mut S,
    mut bytes: &[u8],
    limit: Duration,
) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = in_time(limit, |cx| Pin::new(&mut *stream).poll_write(cx, bytes)).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        bytes = &bytes[written..];
    }
    in_time(limit, |cx| Pin::new(&mut *stream).poll_flush(cx)).await
}
