//! One data connection of a reader: asks, takes what comes, puts it where it belongs.
//!
//! ```text
//!   commands -> queued -> asked (a window of them) -> incoming -> ended
//! ```
//! A long block goes from the socket straight into its slot; what is short, and every frame, comes through the inbox,
//! many at a time. The task owns every slot of its reads, so a cancelled read gives its slot back as soon as the task
//! hears of it: nothing else could write there. The rest of its bytes is thrown away as it comes.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use kv_arena::Slot;
use kv_block::{BlockKey, Checksum, Summer};
use kv_transport::link::LinkError;
use kv_wire::frame::{ITEMS_MAX, Message};
use kv_wire::message::{DataAnswer, DataAsk, ReadId};
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep};

use crate::dial::{Dialer, Target};
use crate::error::Error;
use crate::inbox::Inbox;
use crate::limits::{DATA_FRAME_BYTES_MAX, PASS_BYTES};
use crate::reader::{Command, Ended, Health, Read, Shared};
use crate::stream::{Stream, poll_read_some};

/// Inbox of the connection for small reads, in bytes: so many come with one call.
const SMALL_INBOX_BYTES: usize = 256 << 10;
/// Inbox of the others, in bytes: frames, and the beginning and end of blocks.
const BULK_INBOX_BYTES: usize = 16 << 10;
/// After a block that is longer than this, less is read ahead: the next one will be as long, and copying it out of the
/// inbox costs more than a call. In bytes.
const LONG_BYTES: usize = 16 << 10;
/// What is left of a block goes straight into its slot when it is longer than this, in bytes.
const DIRECT_BYTES: usize = 8 << 10;
/// Most bytes taken from the socket before they are summed: they are in the cache then.
const PIECE_BYTES: usize = 256 << 10;
/// Ended reads are handed over when there are so many, or the pass ends.
const GIVE_READS: usize = 64;
/// First pause after a failed try; each next one is twice as long.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// A read that has not ended, or has and its bytes are still to come.
#[derive(Debug)]
enum Under {
    /// Not asked for yet.
    Queued(Read),
    Asked(Read),
    /// Cancelled after it was asked for; so many bytes of the window are still its.
    Dropped(u32),
}

impl Under {
    /// It is asked for now.
    fn ask(&mut self) {
        *self = match std::mem::replace(self, Self::Dropped(0)) {
            Self::Queued(read) => Self::Asked(read),
            other => other,
        };
    }
}

/// The block whose bytes are coming.
struct Incoming {
    read: ReadId,
    /// Gone when it was cancelled.
    into: Option<Slot>,
    bytes: usize,
    at: usize,
    wanted: Checksum,
    summer: Summer,
}

impl Incoming {
    fn left(&self) -> usize {
        self.bytes - self.at
    }

    /// Takes bytes that came through the inbox.
    fn put(&mut self, bytes: &[u8]) {
        if let Some(into) = &mut self.into {
            self.summer.update(bytes);
            into[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        }
        self.at += bytes.len();
    }

    /// Takes bytes from the socket.
    fn poll_fill(
        &mut self,
        stream: &mut Stream,
        cx: &mut Context<'_>,
        scratch: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let piece = self.left().min(PIECE_BYTES);
        let read = match &mut self.into {
            Some(into) => {
                let place = &mut into[self.at..self.at + piece];
                let read = ready!(poll_read_some(stream, cx, place))?;
                self.summer.update(&place[..read]);
                read
            }
            None => {
                let piece = piece.min(scratch.len());
                ready!(poll_read_some(stream, cx, &mut scratch[..piece]))?
            }
        };
        self.at += read;
        Poll::Ready(Ok(read))
    }
}

/// Why a connection is over.
enum Over {
    /// The link was dropped.
    Link,
    /// It failed.
    Connection(LinkError),
}

pub(crate) struct Reading {
    at: usize,
    shared: Arc<Shared>,
    /// Bytes of reads that have not ended; the link adds, this subtracts.
    outstanding: Arc<AtomicU64>,
    commands: mpsc::UnboundedReceiver<Vec<Command>>,
    dialer: Dialer,
    target: Target,
    session: u128,

    reads: HashMap<ReadId, Under>,
    /// Reads that are not asked for, in order. One that was cancelled is found missing.
    queue: VecDeque<ReadId>,
    ended: Vec<Ended>,
    /// Bytes of those.
    ended_bytes: u64,

    inbox: Inbox,
    /// Most bytes read into it at once.
    fill_bytes: usize,
    incoming: Option<Incoming>,
    scratch: Vec<u8>,
    out: Vec<u8>,
    out_written: usize,
    flushed: bool,
    asked_bytes: u64,
    asked_reads: usize,
    /// Whether this connection has answered anything.
    useful: bool,
    /// Since when nothing has come although something was asked for.
    silent_since: Option<Instant>,
}

impl Reading {
    pub(crate) fn new(
        at: usize,
        shared: Arc<Shared>,
        outstanding: Arc<AtomicU64>,
        commands: mpsc::UnboundedReceiver<Vec<Command>>,
        dialer: Dialer,
        target: Target,
        session: u128,
    ) -> Self {
        Self {
            at,
            shared,
            outstanding,
            commands,
            dialer,
            target,
            session,
            reads: HashMap::new(),
            queue: VecDeque::new(),
            ended: Vec::new(),
            ended_bytes: 0,
            inbox: Inbox::new(0, 0),
            fill_bytes: SMALL_INBOX_BYTES,
            incoming: None,
            scratch: Vec::new(),
            out: Vec::new(),
            out_written: 0,
            flushed: true,
            asked_bytes: 0,
            asked_reads: 0,
            useful: false,
            silent_since: None,
        }
    }

    /// Makes the connection, again and again, until the link is dropped or broken.
    pub(crate) async fn run(mut self) {
        let mut pause = PAUSE_MIN;
        loop {
            let over = match self.connect().await {
                Ok((stream, inbox)) => {
                    self.shared.change(self.at, Health::Up, &LinkError::Cancelled);
                    let joined = Instant::now();
                    self.useful = false;
                    let over = self.carry(stream, inbox).await;
                    // One that is closed again before it was of any use is a try that failed.
                    let lived = self.useful || joined.elapsed() >= PAUSE_MAX;
                    pause = if lived { PAUSE_MIN } else { (2 * pause).min(PAUSE_MAX) };
                    if let Over::Connection(why) = &over {
                        let health = if lived { Health::Lost } else { Health::Failed };
                        self.shared.change(self.at, health, why);
                    }
                    over
                }
                Err(over) => {
                    if let Over::Connection(why) = &over {
                        self.shared.change(self.at, Health::Failed, why);
                        pause = (2 * pause).min(PAUSE_MAX);
                    }
                    over
                }
            };
            let Over::Connection(why) = over else { return };
            tracing::debug!(address = %self.target.address, connection = self.at, %why, "a data connection is over");
            self.fail_all(&why);
            if !self.until_wanted(pause).await {
                return;
            }
        }
    }

    /// A connection that has joined. Commands are taken meanwhile.
    async fn connect(&mut self) -> Result<(Stream, Inbox), Over> {
        let (dialer, target, session) = (self.dialer.clone(), self.target.clone(), self.session);
        let mut joining = pin!(dialer.join(&target, session));
        loop {
            tokio::select! {
                joined = &mut joining => return joined.map_err(|error| Over::Connection(in_words(&error))),
                batch = self.commands.recv() => {
                    self.take(batch.ok_or(Over::Link)?);
                    self.give();
                }
            }
        }
    }

    /// Waits until the connection is worth another try. False when the link was dropped.
    async fn until_wanted(&mut self, pause: Duration) -> bool {
        let mut broken = self.shared.watch();
        let rested = Instant::now() + pause;
        // The last connection is made again at once, to see whether there still is somebody.
        let mut wanted = !self.shared.any_alive();
        let mut at_once = wanted;
        loop {
            let why = broken.borrow_and_update().clone();
            if let Some(why) = why {
                return self.refuse_all(&why).await;
            }
            // A read that was sent here though the connection is down has no other.
            if at_once || !self.queue.is_empty() {
                self.shared.change(self.at, Health::Trying, &LinkError::Cancelled);
                return true;
            }
            tokio::select! {
                batch = self.commands.recv() => {
                    let Some(batch) = batch else { return false };
                    self.take(batch);
                    self.give();
                    wanted = true;
                }
                () = tokio::time::sleep_until(rested), if wanted => at_once = true,
                _ = broken.changed() => {}
            }
        }
    }

    /// The link is broken: whatever still comes goes back.
    async fn refuse_all(&mut self, why: &LinkError) -> bool {
        self.fail_all(why);
        while let Some(batch) = self.commands.recv().await {
            self.take(batch);
            self.fail_all(why);
        }
        false
    }

    /// Moves asks and bytes until the connection or the link is over.
    async fn carry(&mut self, mut stream: Stream, inbox: Inbox) -> Over {
        self.inbox = inbox.with_room(if self.at == 0 { SMALL_INBOX_BYTES } else { BULK_INBOX_BYTES });
        self.inbox.allow(DATA_FRAME_BYTES_MAX);
        // What an owner says before it is asked is wrong, but it was said.
        if let Err(why) = self.digest() {
            return Over::Connection(why);
        }
        self.silent_since = None;
        let mut alarm = pin!(tokio::time::sleep(self.dialer.limits.silence));
        let over = std::future::poll_fn(|cx| {
            let over = self.pass(&mut stream, cx);
            self.give();
            if over.is_ready() { over } else { self.poll_silence(alarm.as_mut(), cx) }
        })
        .await;
        self.inbox = Inbox::new(0, 0);
        self.scratch = Vec::new();
        over
    }

    fn pass(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<Over> {
        let path = |error: io::Error| Over::Connection(LinkError::Path { what: error.to_string() });
        let mut moved = 0;
        loop {
            while let Poll::Ready(batch) = self.commands.poll_recv(cx) {
                let Some(batch) = batch else { return Poll::Ready(Over::Link) };
                self.take(batch);
            }
            self.ask();
            if let Poll::Ready(Err(error)) = self.poll_out(stream, cx) {
                return Poll::Ready(path(error));
            }
            match ready!(self.poll_in(stream, cx)) {
                Ok(0) => return Poll::Ready(path(io::Error::other("the owner closed the connection"))),
                Ok(bytes) => moved += bytes,
                Err(error) => return Poll::Ready(path(error)),
            }
            self.silent_since = None;
            if let Err(why) = self.digest() {
                return Poll::Ready(Over::Connection(why));
            }
            if moved >= PASS_BYTES {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// An owner that was asked and sends nothing is gone, whatever the kernel still hopes for.
    fn poll_silence(&mut self, mut alarm: Pin<&mut Sleep>, cx: &mut Context<'_>) -> Poll<Over> {
        if self.asked_reads == 0 && self.incoming.is_none() {
            self.silent_since = None;
            return Poll::Pending;
        }
        let limit = self.dialer.limits.silence;
        let until = *self.silent_since.get_or_insert_with(Instant::now) + limit;
        // The alarm is set anew only when it rings: bytes that come do not touch it.
        loop {
            ready!(alarm.as_mut().poll(cx));
            if until <= Instant::now() {
                let what = format!("the owner sent nothing for {limit:?} of what it was asked for");
                return Poll::Ready(Over::Connection(LinkError::Path { what }));
            }
            alarm.as_mut().reset(until);
        }
    }

    fn take(&mut self, batch: Vec<Command>) {
        for command in batch {
            match command {
                Command::Cancel(read) => self.cancel(read),
                Command::Read(read) if self.is_under_way(read.read) => {
                    self.end(read, Err(LinkError::Protocol { what: "a read that is under way already" }));
                }
                Command::Read(read) => {
                    self.queue.push_back(read.read);
                    self.reads.insert(read.read, Under::Queued(read));
                }
            }
        }
    }

    fn is_under_way(&self, read: ReadId) -> bool {
        self.reads.contains_key(&read) || self.incoming.as_ref().is_some_and(|incoming| incoming.read == read)
    }

    fn cancel(&mut self, read: ReadId) {
        if let Some(incoming) = self.incoming.as_mut().filter(|incoming| incoming.read == read) {
            if let Some(into) = incoming.into.take() {
                let bytes = incoming.bytes as u32;
                self.put_back(read, bytes, into, Err(LinkError::Cancelled));
            }
            return;
        }
        match self.reads.remove(&read) {
            Some(Under::Queued(read)) => self.end(read, Err(LinkError::Cancelled)),
            // Its bytes are still to come, and others do better by another connection.
            Some(Under::Asked(read)) => {
                let Read { read, record, into, .. } = read;
                self.reads.insert(read, Under::Dropped(record.bytes));
                self.ended.push(Ended { read, bytes: record.bytes, into, result: Err(LinkError::Cancelled) });
            }
            Some(dropped @ Under::Dropped(_)) => {
                self.reads.insert(read, dropped);
            }
            None => {}
        }
    }

    /// Asks for as much as the window takes, in one frame.
    fn ask(&mut self) {
        let limits = &self.dialer.limits;
        if self.queue.is_empty() || self.out_written < self.out.len() {
            return;
        }
        // Many at a time: a window that has only a little room waits for more.
        let full = self.asked_reads >= limits.window_reads.div_ceil(2) && self.asked_reads > 0;
        if full || self.asked_bytes >= limits.window_bytes {
            return;
        }
        let mut asks = Vec::new();
        while self.asked_reads < limits.window_reads && asks.len() < ITEMS_MAX {
            let Some(&id) = self.queue.front() else { break };
            // One that is not queued any more was cancelled meanwhile.
            if let Some(under) = self.reads.get_mut(&id)
                && let Under::Queued(queued) = under
            {
                let bytes = u64::from(queued.record.bytes);
                if self.asked_reads > 0 && self.asked_bytes + bytes > limits.window_bytes {
                    break;
                }
                self.asked_reads += 1;
                self.asked_bytes += bytes;
                asks.push((id, queued.want));
                under.ask();
            }
            self.queue.pop_front();
        }
        if !asks.is_empty() {
            self.out.clear();
            self.out_written = 0;
            DataAsk::Read(asks).encode(&mut self.out);
            self.flushed = false;
        }
    }

    fn poll_out(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.out_written < self.out.len() {
            let written = ready!(Pin::new(&mut *stream).poll_write(cx, &self.out[self.out_written..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out_written += written;
        }
        if !self.flushed {
            ready!(Pin::new(stream).poll_flush(cx))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }

    /// Takes bytes from the socket, once: into the slot, or into the inbox.
    fn poll_in(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        match &mut self.incoming {
            Some(incoming) if incoming.left() > DIRECT_BYTES => {
                if incoming.into.is_none() && self.scratch.is_empty() {
                    self.scratch = vec![0; PIECE_BYTES];
                }
                incoming.poll_fill(stream, cx, &mut self.scratch)
            }
            _ => self.inbox.poll_fill_some(stream, cx, self.fill_bytes),
        }
    }

    /// Everything that is in the inbox, and a block that is complete.
    fn digest(&mut self) -> Result<(), LinkError> {
        loop {
            if let Some(incoming) = &mut self.incoming {
                let here = self.inbox.here();
                let here = &here[..here.len().min(incoming.left())];
                let bytes = here.len();
                incoming.put(here);
                self.inbox.consume(bytes);
                if incoming.left() > 0 {
                    return Ok(());
                }
                self.arrived();
            }
            let answer = self.inbox.take().map_err(|_| protocol("a frame that is none"))?;
            match answer {
                None => return Ok(()),
                Some(DataAnswer::Data(read, bytes)) => self.begin(read, bytes)?,
                Some(DataAnswer::Gone(read)) => {
                    if let (_, Some(read)) = self.answered(read)? {
                        self.end(read, Err(LinkError::Gone));
                    }
                }
                Some(DataAnswer::Joined | DataAnswer::Refused(_)) => {
                    return Err(protocol("an answer to a join that was answered"));
                }
            }
        }
    }

    /// The owner answers a read: it is out of the window. Gives the length that was granted, and the read unless it
    /// was cancelled.
    fn answered(&mut self, read: ReadId) -> Result<(u32, Option<Read>), LinkError> {
        let (bytes, asked) = match self.reads.remove(&read) {
            Some(Under::Asked(read)) => (read.record.bytes, Some(read)),
            Some(Under::Dropped(bytes)) => {
                self.ended_bytes += u64::from(bytes);
                (bytes, None)
            }
            Some(Under::Queued(queued)) => {
                self.reads.insert(read, Under::Queued(queued));
                return Err(protocol("an answer to a read that was not asked for"));
            }
            None => return Err(protocol("an answer to a read that was not asked for")),
        };
        self.useful = true;
        self.asked_reads -= 1;
        self.asked_bytes -= u64::from(bytes);
        Ok((bytes, asked))
    }

    fn begin(&mut self, read: ReadId, bytes: u32) -> Result<(), LinkError> {
        let (wanted, mut asked) = self.answered(read)?;
        if bytes != wanted
            && let Some(other) = asked.take()
        {
            // It is another block than was granted. Its length is known, so what follows can still be told apart.
            self.end(other, Err(LinkError::Corrupt));
        }
        let record = asked.as_ref().map(|asked| asked.record);
        self.fill_bytes = if bytes as usize > LONG_BYTES { BULK_INBOX_BYTES } else { SMALL_INBOX_BYTES };
        self.incoming = Some(Incoming {
            read,
            into: asked.map(|asked| asked.into),
            bytes: bytes as usize,
            at: 0,
            wanted: record.map_or_else(Checksum::default, |record| record.checksum),
            summer: Summer::new(record.map_or(BlockKey([0; 16]), |record| record.key)),
        });
        Ok(())
    }

    /// The last byte of a block is there.
    fn arrived(&mut self) {
        let Some(incoming) = self.incoming.take() else { return };
        let Incoming { read, into: Some(into), bytes, wanted, summer, .. } = incoming else { return };
        let result = if summer.finish() == wanted { Ok(()) } else { Err(LinkError::Corrupt) };
        self.put_back(read, bytes as u32, into, result);
        if self.ended.len() >= GIVE_READS || bytes >= PIECE_BYTES {
            self.give();
        }
    }

    fn end(&mut self, read: Read, result: Result<(), LinkError>) {
        self.put_back(read.read, read.record.bytes, read.into, result);
    }

    fn put_back(&mut self, read: ReadId, bytes: u32, into: Slot, result: Result<(), LinkError>) {
        self.ended_bytes += u64::from(bytes);
        self.ended.push(Ended { read, bytes, into, result });
    }

    /// Hands over what has ended. Once for many reads: an atomic operation behind the copy of a block waits until all
    /// of it has left the store buffer.
    fn give(&mut self) {
        self.outstanding.fetch_sub(std::mem::take(&mut self.ended_bytes), Ordering::Relaxed);
        self.shared.give(&mut self.ended);
    }

    /// The connection is gone, and all its reads with it.
    fn fail_all(&mut self, why: &LinkError) {
        self.queue.clear();
        if let Some(Incoming { read, into: Some(into), bytes, .. }) = self.incoming.take() {
            self.put_back(read, bytes as u32, into, Err(why.clone()));
        }
        for (_, under) in std::mem::take(&mut self.reads) {
            match under {
                Under::Queued(read) | Under::Asked(read) => self.end(read, Err(why.clone())),
                Under::Dropped(bytes) => self.ended_bytes += u64::from(bytes),
            }
        }
        self.out.clear();
        (self.out_written, self.flushed) = (0, true);
        (self.asked_bytes, self.asked_reads) = (0, 0);
        self.give();
    }
}

fn protocol(what: &'static str) -> LinkError {
    LinkError::Protocol { what }
}

/// What kept a connection from coming about, with what lies beneath.
fn in_words(error: &Error) -> LinkError {
    let mut what = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        what = format!("{what}: {error}");
        source = error.source();
    }
    LinkError::Path { what }
}
