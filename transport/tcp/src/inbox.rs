//! Frames out of a stream of bytes.

use std::io;
use std::task::{Context, Poll};

use kv_wire::frame::{HEADER_BYTES, Header, Message, WireError};
use tokio::io::AsyncRead;

use crate::stream::poll_read_some;

/// Bytes that came and were not looked at yet. Grows only for a frame that is longer, and with the bytes that have
/// really come, not with the length that a header claims; then it is as short again as it was.
#[derive(Debug)]
pub(crate) struct Inbox {
    bytes: Vec<u8>,
    bytes_usual: usize,
    start: usize,
    end: usize,
    frame_bytes_max: usize,
}

impl Inbox {
    pub(crate) fn new(bytes: usize, frame_bytes_max: usize) -> Self {
        Self { bytes: vec![0; bytes], bytes_usual: bytes, start: 0, end: 0, frame_bytes_max }
    }

    /// The same with room for `bytes` at rest.
    pub(crate) fn with_room(mut self, bytes: usize) -> Self {
        self.bytes.resize(bytes.max(self.bytes.len()), 0);
        self.bytes_usual = bytes;
        self
    }

    /// Says how long a frame may be from here on, in bytes.
    pub(crate) fn allow(&mut self, frame_bytes_max: usize) {
        self.frame_bytes_max = frame_bytes_max;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// What is there.
    pub(crate) fn here(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(crate) fn consume(&mut self, bytes: usize) {
        self.start += bytes;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Reads once; 0 is the end of the stream. Everything whole was taken before.
    pub(crate) fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        self.poll_fill_some(stream, cx, usize::MAX)
    }

    /// The same, but not more than `most` bytes.
    pub(crate) fn poll_fill_some<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
        most: usize,
    ) -> Poll<io::Result<usize>> {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.bytes.len() {
            let longer = (2 * self.end).min(self.frame_bytes_max).max(self.end + 1);
            self.bytes.resize(longer, 0);
        } else if self.end == 0 && self.bytes.len() > self.bytes_usual {
            self.bytes.truncate(self.bytes_usual);
            self.bytes.shrink_to_fit();
        }
        let end = self.bytes.len().min(self.end.saturating_add(most));
        let read = poll_read_some(stream, cx, &mut self.bytes[self.end..end]);
        if let Poll::Ready(Ok(bytes)) = read {
            self.end += bytes;
        }
        read
    }

    /// The next frame, header and body, when all of it is there.
    pub(crate) fn frame(&mut self) -> Result<Option<(Header, &[u8])>, WireError> {
        let Some((header, _)) = self.here().split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let header = Header::parse(header)?;
        let frame_bytes = HEADER_BYTES + header.body_bytes as usize;
        if frame_bytes > self.frame_bytes_max {
            let max = self.frame_bytes_max - HEADER_BYTES;
            return Err(WireError::TooLong { bytes: header.body_bytes, max });
        }
        if self.end - self.start < frame_bytes {
            return Ok(None);
        }
        let body = self.start + HEADER_BYTES..self.start + frame_bytes;
        Ok(Some((header, &self.bytes[body])))
    }

    /// The next message, when all of it is there.
    pub(crate) fn take<M: Message>(&mut self) -> Result<Option<M>, WireError> {
        let Some((header, body)) = self.frame()? else { return Ok(None) };
        let message = M::decode(&header, body)?;
        let bytes = HEADER_BYTES + body.len();
        self.consume(bytes);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use kv_wire::message::{Ask, WantId};

    use super::*;

    fn fill(inbox: &mut Inbox, bytes: &mut &[u8], most: usize) -> usize {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match inbox.poll_fill_some(bytes, &mut cx, most) {
            Poll::Ready(read) => read.unwrap(),
            Poll::Pending => panic!("a slice is always ready"),
        }
    }

    #[test]
    fn frames_come_whole_however_they_are_torn() {
        let asks: Vec<Ask> = (0..20).map(|at| Ask::Done(vec![WantId(at); 37 * at as usize])).collect();
        let mut sent = Vec::new();
        asks.iter().for_each(|ask| ask.encode(&mut sent));
        for most in [1, 7, 16, 17, 1000, usize::MAX] {
            let (mut inbox, mut rest, mut heard) = (Inbox::new(64, 1 << 20), &sent[..], Vec::new());
            while fill(&mut inbox, &mut rest, most) > 0 {
                while let Some(ask) = inbox.take::<Ask>().unwrap() {
                    heard.push(ask);
                }
            }
            assert!(heard == asks && inbox.is_empty(), "{most} at a time");
        }
    }

    #[test]
    fn memory_comes_with_the_bytes_and_goes_with_them() {
        let mut sent = Vec::new();
        Ask::Done(vec![WantId(1); 4000]).encode(&mut sent);
        let mut inbox = Inbox::new(64, 1 << 20);
        fill(&mut inbox, &mut &sent[..20], usize::MAX);
        assert!(inbox.take::<Ask>().unwrap().is_none());
        assert_eq!(inbox.bytes.len(), 64, "a promise of more is no reason");
        let mut rest = &sent[20..];
        while fill(&mut inbox, &mut rest, usize::MAX) > 0 && inbox.take::<Ask>().unwrap().is_none() {}
        fill(&mut inbox, &mut &b"k"[..], usize::MAX);
        assert_eq!((inbox.bytes.len(), inbox.here()), (64, &b"k"[..]));
        let mut short = Inbox::new(64, 1000);
        fill(&mut short, &mut &sent[..], usize::MAX);
        assert!(matches!(short.frame(), Err(WireError::TooLong { bytes: 32_000.., max: 984 })));
    }
}
