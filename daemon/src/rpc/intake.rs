//! What requests may hold before they are whole, and how long they may take to become so.
//!
//! A gRPC message is collected until its last byte is there, and a caller decides when that is. So all messages
//! that are on their way share one budget, and each request ends by its deadline also when its caller says
//! nothing more. A message counts until it is whole; what becomes of it then has bounds of its own.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use kv_api::fault::to_status;
use kv_block::Fault;
use kv_block::code::Code;
use tokio::time::Sleep;
use tonic::Status;
use tonic::body::Body;

use super::too_late;

/// Length of what stands before each message: a flag and a length.
const PREFIX_BYTES: usize = 5;

/// Bytes of messages on their way, of all callers together.
#[derive(Debug)]
pub struct Intake {
    left: AtomicU64,
    max: u64,
}

impl Intake {
    /// Room for so many bytes.
    pub fn new(max: u64) -> Arc<Self> {
        Arc::new(Self { left: AtomicU64::new(max), max })
    }

    /// The same request body, counted here, over by `until`.
    pub fn watch(self: &Arc<Self>, body: Body, until: Instant) -> Body {
        Body::new(Watched {
            body,
            part: Part { intake: Arc::clone(self), held: 0 },
            prefix: [0; PREFIX_BYTES],
            prefix_len: 0,
            missing: 0,
            until: Box::pin(tokio::time::sleep_until(until.into())),
        })
    }
}

/// Bytes taken from an intake; they come back when it is dropped.
struct Part {
    intake: Arc<Intake>,
    held: u64,
}

impl Part {
    fn take(&mut self, bytes: u64) -> Result<(), Status> {
        let less = |left: u64| left.checked_sub(bytes);
        if self.intake.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).is_err() {
            let max = self.intake.max >> 20;
            let text = format!(
                "messages of {max} MiB are on their way already (limits.sessions_max x limits.message_bytes_max)"
            );
            let fault = Fault::new(Code::QueueFull, text).retry_after(Duration::from_millis(50));
            return Err(to_status(&fault));
        }
        self.held += bytes;
        Ok(())
    }

    fn give_back(&mut self) {
        self.intake.left.fetch_add(std::mem::take(&mut self.held), Ordering::AcqRel);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.give_back();
    }
}

struct Watched {
    body: Body,
    part: Part,
    prefix: [u8; PREFIX_BYTES],
    prefix_len: usize,
    /// Bytes of the present message that have not come.
    missing: u64,
    until: Pin<Box<Sleep>>,
}

impl Watched {
    fn came(&mut self, mut data: &[u8]) -> Result<(), Status> {
        while !data.is_empty() {
            if self.missing == 0 {
                let count = data.len().min(PREFIX_BYTES - self.prefix_len);
                self.prefix[self.prefix_len..self.prefix_len + count].copy_from_slice(&data[..count]);
                self.prefix_len += count;
                data = &data[count..];
                if self.prefix_len == PREFIX_BYTES {
                    self.prefix_len = 0;
                    let [_, length @ ..] = self.prefix;
                    self.missing = u32::from_be_bytes(length).into();
                }
                continue;
            }
            let count = self.missing.min(data.len() as u64);
            self.part.take(count)?;
            self.missing -= count;
            data = &data[count as usize..];
            if self.missing == 0 {
                self.part.give_back();
            }
        }
        Ok(())
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                let counted = frame.data_ref().map_or(Ok(()), |data| self.came(data));
                Poll::Ready(Some(counted.map(|()| frame)))
            }
            Poll::Ready(other) => Poll::Ready(other),
            Poll::Pending => {
                self.until.as_mut().poll(context).map(|()| Some(Err(too_late("sending the request"))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body of these pieces, which then says nothing more.
    struct Pieces(Vec<Bytes>);

    impl HttpBody for Pieces {
        type Data = Bytes;
        type Error = Status;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _context: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            if self.0.is_empty() {
                Poll::Pending
            } else {
                Poll::Ready(Some(Ok(Frame::data(self.0.remove(0)))))
            }
        }
    }

    fn message(length: u32, of_it: usize) -> Vec<u8> {
        [&[0][..], &length.to_be_bytes(), &vec![7; of_it]].concat()
    }

    async fn next(body: &mut Body) -> Result<usize, Status> {
        let frame = std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await;
        frame.expect("it does not end").map(|frame| frame.into_data().map_or(0, |data| data.len()))
    }

    #[tokio::test(start_paused = true)]
    async fn messages_share_a_budget_until_they_are_whole_and_end_by_their_deadline() {
        let intake = Intake::new(1000);
        let soon = || Instant::now() + Duration::from_secs(10);
        let body = |pieces: Vec<Vec<u8>>| Body::new(Pieces(pieces.into_iter().map(Bytes::from).collect()));
        let mut whole: Vec<Vec<u8>> = Vec::new();
        for byte in [message(900, 900), message(0, 0), message(900, 900)].concat().chunks(7) {
            whole.push(byte.to_vec());
        }
        let count = whole.len();
        let mut whole = intake.watch(body(whole), soon());
        for _ in 0..count {
            next(&mut whole).await.unwrap();
        }
        assert_eq!(intake.left.load(Ordering::Acquire), 1000, "both were whole");

        let mut first = intake.watch(body(vec![message(900, 600)]), soon());
        let mut second = intake.watch(body(vec![message(900, 600)]), soon());
        assert_eq!(next(&mut first).await.unwrap(), 605);
        let refused = next(&mut second).await.unwrap_err();
        assert_eq!(kv_api::fault::from_status(&refused).code, Code::QueueFull);
        let late = next(&mut first).await.unwrap_err();
        assert_eq!(kv_api::fault::from_status(&late).code, Code::DeadlinePassed);
        drop((first, second));
        assert_eq!(intake.left.load(Ordering::Acquire), 1000, "nothing is lost of it");
    }
}
