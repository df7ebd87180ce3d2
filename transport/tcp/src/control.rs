//! A control connection: a half that says, a half that hears.

use std::marker::PhantomData;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use kv_wire::frame::{BODY_BYTES_MAX, HEADER_BYTES, Message, WireError};
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;

use crate::door::Seat;
use crate::inbox::Inbox;
use crate::stream::{Stream, write_all};
use crate::tls::PeerIdentity;

/// Room for what came of a control connection, at rest, in bytes.
pub(crate) const INBOX_BYTES: usize = 16 << 10;
/// So much is put together before it is written, in bytes.
const BATCH_BYTES: usize = 256 << 10;
/// So many messages are taken from the queue at once.
const BATCH_MESSAGES: usize = 256;

/// Why a control connection is over.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The other side closed it, after a whole message.
    #[error("the other side closed the connection")]
    Closed,
    /// The other side said something that is no message; nothing behind it can be believed.
    #[error("the other side said what is no message")]
    Nonsense(#[from] WireError),
    /// The connection failed, or the other side takes nothing any more.
    #[error("the connection failed")]
    Io(#[from] std::io::Error),
}

/// A control connection: `Out` is said on it, `In` is heard.
#[derive(Debug)]
pub struct Control<Out, In> {
    stream: Stream,
    inbox: Inbox,
    identity: PeerIdentity,
    peer: SocketAddr,
    stall: Duration,
    seat: Option<Seat>,
    messages: PhantomData<fn(Out) -> In>,
}

impl<Out: Message, In: Message> Control<Out, In> {
    pub(crate) fn new(
        stream: Stream,
        mut inbox: Inbox,
        identity: PeerIdentity,
        peer: SocketAddr,
        stall: Duration,
        seat: Option<Seat>,
    ) -> Self {
        inbox.allow(HEADER_BYTES + BODY_BYTES_MAX);
        Self { stream, inbox, identity, peer, stall, seat, messages: PhantomData }
    }

    /// Whose name the other side carries.
    pub fn identity(&self) -> &PeerIdentity {
        &self.identity
    }

    /// Where the other side is: for data connections, this and not the name that was dialed is the same machine.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Both halves. The connection ends when both are dropped.
    pub fn split(self) -> (ControlWriter<Out>, ControlReader<In>) {
        let (read, write) = tokio::io::split(self.stream);
        let seat = self.seat.map(Arc::new);
        (
            ControlWriter {
                stream: write,
                bytes: Vec::new(),
                stall: self.stall,
                _seat: seat.clone(),
                messages: PhantomData,
            },
            ControlReader { stream: read, inbox: self.inbox, _seat: seat, messages: PhantomData },
        )
    }
}

/// The half that says.
#[derive(Debug)]
pub struct ControlWriter<Out> {
    stream: WriteHalf<Stream>,
    bytes: Vec<u8>,
    stall: Duration,
    _seat: Option<Arc<Seat>>,
    messages: PhantomData<fn(Out)>,
}

impl<Out: Message> ControlWriter<Out> {
    /// Says these, in one write where they fit. Not safe to drop half way: the other side would hear half a message.
    pub async fn say(&mut self, messages: &[Out]) -> Result<(), End> {
        for message in messages {
            message.encode(&mut self.bytes);
            if self.bytes.len() >= BATCH_BYTES {
                self.write().await?;
            }
        }
        self.write().await
    }

    /// Says whatever comes in `queue`, all that is there at once in one write, until nobody can put anything in it;
    /// then closes this direction. The queue's length is the bound: when it is full, the other side does not read.
    pub async fn drain(mut self, mut queue: mpsc::Receiver<Out>) -> Result<(), End> {
        let mut batch = Vec::new();
        while queue.recv_many(&mut batch, BATCH_MESSAGES).await > 0 {
            self.say(&batch).await?;
            batch.clear();
        }
        self.close().await
    }

    /// Ends this direction, behind all that was said.
    pub async fn close(mut self) -> Result<(), End> {
        let stall = self.stall;
        match tokio::time::timeout(stall, self.stream.shutdown()).await {
            Ok(done) => Ok(done?),
            Err(_) => Err(End::Io(std::io::ErrorKind::TimedOut.into())),
        }
    }

    async fn write(&mut self) -> Result<(), End> {
        let written = write_all(&mut self.stream, &self.bytes, self.stall).await;
        self.bytes.clear();
        self.bytes.shrink_to(BATCH_BYTES);
        Ok(written?)
    }
}

/// The half that hears.
#[derive(Debug)]
pub struct ControlReader<In> {
    stream: ReadHalf<Stream>,
    inbox: Inbox,
    _seat: Option<Arc<Seat>>,
    messages: PhantomData<fn() -> In>,
}

impl<In: Message> ControlReader<In> {
    /// The next message. Safe to drop: what has come so far is kept.
    pub async fn hear(&mut self) -> Result<In, End> {
        loop {
            if let Some(message) = self.inbox.take()? {
                return Ok(message);
            }
            let read = std::future::poll_fn(|cx| self.inbox.poll_fill(&mut self.stream, cx)).await?;
            match read {
                0 if self.inbox.is_empty() => return Err(End::Closed),
                0 => return Err(End::Io(std::io::ErrorKind::UnexpectedEof.into())),
                _ => {}
            }
        }
    }

    /// The next message if it is here already.
    pub fn hear_more(&mut self) -> Result<Option<In>, End> {
        Ok(self.inbox.take()?)
    }
}
