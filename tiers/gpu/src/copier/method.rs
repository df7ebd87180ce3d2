//! How pages are copied: what was asked for, what there is, and what comes of the two.

use super::Method;
use crate::Error;
use crate::device::Device;
use crate::pieces::{Direction, Piece};
use crate::stream::Stream;

/// What a copier copies with.
pub(super) struct Chosen {
    pub(super) method: Method,
    pub(super) why: String,
}

impl Chosen {
    pub(super) fn of(device: &Device, asked: Method) -> Self {
        let has_batch = device.driver().has_batched_copies();
        let (method, why) = match asked {
            Method::Loop => (Method::Loop, "as asked for".to_owned()),
            Method::Batch if has_batch => (Method::Batch, "as asked for".to_owned()),
            _ if has_batch => (Method::Batch, "the driver has batched copies".to_owned()),
            _ => (Method::Loop, format!("CUDA {} has no batched copies", device.driver().version())),
        };
        Self { method, why }
    }

    pub(super) fn queue(&self, stream: &Stream, direction: Direction, pieces: &[Piece]) -> Result<(), Error> {
        match self.method {
            Method::Loop => stream.queue_each(direction, pieces),
            _ => stream.queue(direction, pieces),
        }
    }
}
