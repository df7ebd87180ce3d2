//! One data connection of an owner: takes asks, writes blocks straight from where they are held.
//!
//! ```text
//!   asks -> batch: header | block | header | block | gone ...   written with one vectored write where it fits
//! ```
//! Small blocks share a batch; a long one has a batch to itself and is written piece by piece. A batch holds its
//! blocks until all of it is written: a reader that takes nothing holds up its own connection and at most one batch.
//! One that takes a little now and then does so until the time limit of a stall has passed since its grant ended.

use std::collections::{HashSet, VecDeque};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use kv_arena::Held;
use kv_wire::frame::{DATA_FRAME_BYTES, ITEMS_MAX, Message};
use kv_wire::message::{DataAnswer, DataAsk, ReadId, WantId};
use tokio::io::AsyncWrite;
use tokio::time::Instant;

use crate::inbox::Inbox;
use crate::limits::{DATA_FRAME_BYTES_MAX, PASS_BYTES, SMALL_BYTES};
use crate::owner::{Joined, Table};
use crate::stream::{Stream, in_time, write_all};

/// Room for what was asked, at rest, in bytes: a window of reads.
const INBOX_BYTES: usize = 8 << 10;
/// Blocks of a batch, together, in bytes; one longer block is a batch by itself.
const BATCH_BYTES: usize = 256 << 10;
/// Answers of a batch.
const BATCH_ANSWERS: usize = 64;
/// Most bytes given to the kernel in one call: a small read of another connection waits no longer than for that.
const PIECE_BYTES: usize = 256 << 10;
/// A reader that takes less than this holds memory for longer than it is worth, in bytes.
const BYTES_PER_SECOND_MIN: u64 = 256 << 10;
/// Asks that wait here; more wait in the socket.
const ASKS_MAX: usize = 2 * ITEMS_MAX;

/// One answer: its frame, and the block behind it.
#[derive(Debug)]
struct Answer {
    read: ReadId,
    frame: Range<usize>,
    block: Option<(WantId, Held)>,
}

impl Answer {
    fn len(&self) -> usize {
        self.frame.len() + self.block.as_ref().map_or(0, |(_, block)| block.len())
    }
}

/// Answers that are written together, and how far they are. Its blocks are held; dropped, they are let go.
#[derive(Debug)]
pub(crate) struct Batch {
    table: Arc<Table>,
    frames: Vec<u8>,
    answers: Vec<Answer>,
    block_bytes: usize,
    /// Answers that are written, and bytes of the next one.
    written: (usize, usize),
}

impl Batch {
    fn new(table: &Arc<Table>) -> Self {
        let frames = Vec::with_capacity(BATCH_ANSWERS * DATA_FRAME_BYTES);
        let answers = Vec::with_capacity(BATCH_ANSWERS);
        Self { table: Arc::clone(table), frames, answers, block_bytes: 0, written: (0, 0) }
    }

    /// Whether an answer with a block of so many bytes still fits.
    pub(crate) fn takes(&self, bytes: usize) -> bool {
        let fits = self.answers.len() < BATCH_ANSWERS && self.block_bytes + bytes <= BATCH_BYTES;
        fits || self.answers.is_empty()
    }

    pub(crate) fn block(&mut self, read: ReadId, want: WantId, block: Held) {
        self.block_bytes += block.len();
        let frame = self.frame(&DataAnswer::Data(read, block.len() as u32));
        self.answers.push(Answer { read, frame, block: Some((want, block)) });
    }

    pub(crate) fn gone(&mut self, read: ReadId) {
        let frame = self.frame(&DataAnswer::Gone(read));
        self.answers.push(Answer { read, frame, block: None });
    }

    fn longest(&self) -> usize {
        let blocks = self.answers.iter().filter_map(|answer| answer.block.as_ref());
        blocks.map(|(_, block)| block.len()).max().unwrap_or(0)
    }

    fn wants(&self) -> impl Iterator<Item = WantId> {
        self.answers.iter().filter_map(|answer| answer.block.as_ref().map(|(want, _)| *want))
    }

    fn frame(&mut self, answer: &DataAnswer) -> Range<usize> {
        let start = self.frames.len();
        answer.encode(&mut self.frames);
        start..self.frames.len()
    }

    /// Lets go of what was written, or never will be.
    fn clear(&mut self) {
        let answers = self.answers.drain(..);
        // The holds end first: what comes back as concealed is held by nobody here.
        let wants: Vec<WantId> = answers.filter_map(|answer| Some(answer.block?.0)).collect();
        if !wants.is_empty() {
            self.table.written(wants.into_iter());
        }
        self.frames.clear();
        (self.block_bytes, self.written) = (0, (0, 0));
    }

    fn poll_write(&mut self, stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut pieces = [IoSlice::new(&[]); 2 * BATCH_ANSWERS];
        let count = self.pieces(&mut pieces);
        let written = Pin::new(stream).poll_write_vectored(cx, &pieces[..count]);
        match written {
            Poll::Ready(Ok(0)) => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            Poll::Ready(Ok(bytes)) => {
                self.advance(bytes);
                Poll::Ready(Ok(bytes))
            }
            other => other,
        }
    }

    /// What is to be written next, at most [`PIECE_BYTES`]; gives how many pieces.
    fn pieces<'a>(&'a self, pieces: &mut [IoSlice<'a>]) -> usize {
        let (first, mut skip) = self.written;
        let (mut count, mut room) = (0, PIECE_BYTES);
        for answer in &self.answers[first..] {
            let block: &[u8] = answer.block.as_ref().map_or(&[], |(_, block)| block);
            for whole in [&self.frames[answer.frame.clone()], block] {
                // Only the first answer can have begun: somewhere in its frame, or in its block.
                let rest = &whole[skip.min(whole.len())..];
                skip -= whole.len() - rest.len();
                let piece = &rest[..room.min(rest.len())];
                if !piece.is_empty() {
                    pieces[count] = IoSlice::new(piece);
                    count += 1;
                    room -= piece.len();
                }
            }
        }
        count
    }

    fn advance(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let left = self.answers[self.written.0].len() - self.written.1;
            if bytes < left {
                self.written.1 += bytes;
                return;
            }
            bytes -= left;
            self.written = (self.written.0 + 1, 0);
        }
    }

    fn is_written(&self) -> bool {
        self.written.0 == self.answers.len()
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A connection that is served. It begins among the words and small blocks; with its first long block it moves to
/// where those are, for good.
pub(crate) struct Serving {
    stream: Stream,
    inbox: Inbox,
    asks: VecDeque<(ReadId, WantId)>,
    /// Reads that were asked for and not answered.
    under_way: HashSet<ReadId>,
    batch: Batch,
    // Dropped last: what the batch holds is let go before the connection has left.
    pub(crate) joined: Joined,
}

/// Why a connection is not served here any more.
enum Over {
    /// The reader closed it.
    Closed,
    /// A long block is next.
    Long,
}

impl Serving {
    pub(crate) fn new(stream: Stream, inbox: Inbox, joined: Joined) -> Self {
        let mut inbox = inbox.with_room(INBOX_BYTES);
        inbox.allow(DATA_FRAME_BYTES_MAX);
        let batch = Batch::new(&joined.table);
        Self { stream, inbox, asks: VecDeque::new(), under_way: HashSet::new(), batch, joined }
    }

    /// Serves it to its end, or to its first long block, with which it goes on elsewhere.
    pub(crate) async fn run(mut self) {
        let over = match self.greet().await {
            Ok(()) => self.answer(SMALL_BYTES as usize).await,
            Err(error) => Err(error),
        };
        match over {
            Ok(Over::Long) => {
                let table = Arc::clone(&self.joined.table);
                Table::move_to_bulk(&table, self);
            }
            over => self.say_over(over),
        }
    }

    /// The rest of it.
    pub(crate) async fn run_on_bulk(mut self) {
        let over = self.answer(usize::MAX).await;
        self.say_over(over);
    }

    fn say_over(&self, over: io::Result<Over>) {
        let node = self.joined.table.node();
        match over {
            Ok(_) => tracing::debug!(node, "a reader closed a data connection"),
            Err(why) if matches!(why.kind(), io::ErrorKind::InvalidData | io::ErrorKind::TimedOut) => {
                tracing::warn!(node, %why, "a data connection was cut");
            }
            Err(why) => tracing::debug!(node, %why, "a data connection failed"),
        }
    }

    async fn greet(&mut self) -> io::Result<()> {
        let mut bytes = Vec::new();
        DataAnswer::Joined.encode(&mut bytes);
        write_all(&mut self.stream, &bytes, self.joined.table.limits().stall).await?;
        self.hear()
    }

    /// Answers what is asked, until the next block is longer than `bytes_max`.
    async fn answer(&mut self, bytes_max: usize) -> io::Result<Over> {
        let table = Arc::clone(&self.joined.table);
        let stall = table.limits().stall;
        let mut pass = 0;
        loop {
            // Not so when it comes from elsewhere, with a batch.
            if self.batch.is_written() {
                if std::future::poll_fn(|cx| self.poll_asks(cx)).await? {
                    return Ok(Over::Closed);
                }
                table.fill(&mut self.asks, &mut self.batch);
            }
            let (batch, stream) = (&mut self.batch, &mut self.stream);
            if batch.longest() > bytes_max {
                return Ok(Over::Long);
            }
            let limit = stall + Duration::from_secs(batch.block_bytes as u64 / BYTES_PER_SECOND_MIN);
            let begun = Instant::now();
            let written = async {
                while !batch.is_written() {
                    // Whoever takes a little now and then must not keep a block for as long as it likes.
                    if begun.elapsed() >= stall && table.overdue(batch.wants()) {
                        let why = "the reader takes too long for a grant";
                        return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                    }
                    pass += in_time(stall, |cx| batch.poll_write(stream, cx)).await?;
                    if pass >= PASS_BYTES {
                        pass = 0;
                        tokio::task::yield_now().await;
                    }
                }
                in_time(stall, |cx| Pin::new(&mut *stream).poll_flush(cx)).await
            };
            match tokio::time::timeout(limit, written).await {
                Ok(written) => written?,
                Err(_) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the reader takes too little")),
            }
            for answer in &self.batch.answers {
                self.under_way.remove(&answer.read);
            }
            self.batch.clear();
        }
    }

    /// Takes what was asked, and waits for it only when there is nothing else to do. True at the end of the stream.
    fn poll_asks(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            if self.asks.len() >= ASKS_MAX {
                return Poll::Ready(Ok(false));
            }
            match self.inbox.poll_fill(&mut self.stream, cx) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(true)),
                Poll::Ready(Ok(_)) => self.hear()?,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending if self.asks.is_empty() => return Poll::Pending,
                Poll::Pending => return Poll::Ready(Ok(false)),
            }
        }
    }

    /// Everything whole that is in the inbox.
    fn hear(&mut self) -> io::Result<()> {
        let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        while let Some(ask) = self.inbox.take().map_err(|error| wrong(error.to_string()))? {
            let DataAsk::Read(reads) = ask else { return Err(wrong("it joins twice".into())) };
            for (read, want) in reads {
                if !self.under_way.insert(read) {
                    return Err(wrong(format!("read {} is asked for while it is under way", read.0)));
                }
                self.asks.push_back((read, want));
            }
        }
        Ok(())
    }
}
