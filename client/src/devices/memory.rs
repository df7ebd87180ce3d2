//! Device memory as its worker hands it over: handles, and how pages lie behind them.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use kv_api::{convert, v1};
use kv_block::code::Code;
use kv_block::layout::EngineLayout;
use kv_block::{Fault, SessionId};

use crate::error::{Error, bug};
use crate::offers::Offered;

/// A KV cache in device memory, as a worker registers it.
#[derive(Clone, Debug)]
pub struct DeviceCacheSpec {
    /// UUID of the device; ordinals differ between processes.
    pub device: [u8; 16],
    /// Its tensors, as many as the layout names.
    pub tensors: Vec<TensorHandles>,
    /// How pages lie in them.
    pub layout: EngineLayout,
    /// Events of the worker (`CUipcEventHandle`), by their place here: saves wait for them, loads record them.
    pub events: Vec<[u8; 64]>,
}

/// The memory of one tensor. It keeps its descriptors, since the cache may have to be registered again.
#[derive(Clone, Debug)]
pub struct TensorHandles {
    /// What it is mapped from, in the order of addresses; one, as a rule.
    pub pieces: Vec<MemoryPiece>,
    /// Where in the first piece it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub bytes: u64,
}

/// A piece of device memory, by a handle of the driver.
#[derive(Clone, Debug)]
pub enum MemoryPiece {
    /// `CUipcMemHandle`: a whole allocation of `cuMemAlloc`. It stands alone.
    CudaIpc([u8; 64]),
    /// Memory of `cuMemCreate`. Tensors that share a piece share its descriptor: it is handed over once.
    Descriptor {
        /// What the driver exported.
        fd: Arc<OwnedFd>,
        /// Length of the piece.
        bytes: u64,
    },
    /// `CUmemFabricHandle`.
    Fabric {
        /// What the driver exported.
        handle: [u8; 64],
        /// Length of the piece.
        bytes: u64,
    },
}

impl TensorHandles {
    /// Memory within an allocation of `cuMemAlloc`.
    pub fn ipc(handle: [u8; 64], offset: u64, bytes: u64) -> Self {
        Self { pieces: vec![MemoryPiece::CudaIpc(handle)], offset, bytes }
    }

    /// Part of it, from `offset` on, with those pieces that it needs; it shares their descriptors.
    #[must_use]
    pub fn part(&self, offset: u64, bytes: u64) -> Self {
        let (mut offset, mut pieces) = (self.offset.saturating_add(offset), &self.pieces[..]);
        while let [MemoryPiece::Descriptor { bytes, .. } | MemoryPiece::Fabric { bytes, .. }, rest @ ..] =
            pieces
            && offset >= *bytes
            && !rest.is_empty()
        {
            (offset, pieces) = (offset - bytes, rest);
        }
        let end = offset.saturating_add(bytes);
        let mut there = 0u64;
        let needed = pieces.iter().take_while(|piece| {
            let before = there;
            if let MemoryPiece::Descriptor { bytes, .. } | MemoryPiece::Fabric { bytes, .. } = piece {
                there = there.saturating_add(*bytes);
            }
            before == 0 || before < end
        });
        Self { pieces: needed.cloned().collect(), offset, bytes }
    }

    /// What is wrong with it.
    fn check(&self) -> Result<(), String> {
        let mut there = 0u64;
        for piece in &self.pieces {
            match piece {
                // The driver says how long it is.
                MemoryPiece::CudaIpc(_) if self.pieces.len() == 1 => return Ok(()),
                MemoryPiece::CudaIpc(_) => {
                    return Err(
                        "memory of a CUipcMemHandle is one allocation, and has no other pieces".into()
                    );
                }
                MemoryPiece::Descriptor { bytes, .. } | MemoryPiece::Fabric { bytes, .. } => {
                    there = there.saturating_add(*bytes);
                }
            }
        }
        let end = self.offset.saturating_add(self.bytes);
        if end <= there {
            Ok(())
        } else {
            Err(format!("it ends at {end}, and its pieces have {there} bytes"))
        }
    }

    fn message(
        &self,
        numbers: &HashMap<*const OwnedFd, usize>,
        offered: Option<&Offered<'_>>,
    ) -> Result<v1::DeviceMemory, Error> {
        use v1::device_handle::Handle;
        let piece = |piece: &MemoryPiece| {
            let (handle, bytes) = match piece {
                MemoryPiece::CudaIpc(handle) => (Handle::CudaIpc(Bytes::copy_from_slice(handle)), 0),
                MemoryPiece::Descriptor { fd, bytes } => {
                    let number = offered.zip(numbers.get(&Arc::as_ptr(fd)));
                    let (offered, at) = number.ok_or_else(|| bug("a descriptor that was not offered"))?;
                    (Handle::Descriptor(offered.number(*at)?), *bytes)
                }
                MemoryPiece::Fabric { handle, bytes } => {
                    (Handle::CudaFabric(Bytes::copy_from_slice(handle)), *bytes)
                }
            };
            Ok(v1::DeviceHandle { bytes, handle: Some(handle) })
        };
        let pieces = self.pieces.iter().map(piece).collect::<Result<_, Error>>()?;
        Ok(v1::DeviceMemory { pieces, offset: self.offset, bytes: self.bytes })
    }
}

impl DeviceCacheSpec {
    /// Refuses what no daemon could use.
    pub(super) fn check(&self) -> Result<(), Fault> {
        let bad = |text: String| Err(Fault::new(Code::BadRequest, text));
        let (count, bytes) = (self.layout.tensor_count() as usize, self.layout.tensor_bytes());
        if self.tensors.len() != count {
            return bad(format!("the layout is of {count} tensors, {} are given", self.tensors.len()));
        }
        for (at, tensor) in self.tensors.iter().enumerate() {
            if tensor.bytes < bytes {
                let has = tensor.bytes;
                return bad(format!("tensor {at} has {has} bytes, by the layout it has {bytes} at least"));
            }
            if let Err(why) = tensor.check() {
                return bad(format!("tensor {at}: {why}"));
            }
        }
        Ok(())
    }

    /// Its descriptors, each once.
    pub(super) fn descriptors(&self) -> Vec<Arc<OwnedFd>> {
        let mut all: Vec<Arc<OwnedFd>> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for piece in self.tensors.iter().flat_map(|tensor| &tensor.pieces) {
            if let MemoryPiece::Descriptor { fd, .. } = piece
                && seen.insert(Arc::as_ptr(fd))
            {
                all.push(Arc::clone(fd));
            }
        }
        all
    }

    /// `fds` are its [`DeviceCacheSpec::descriptors`], which were `offered` in that order.
    pub(super) fn message(
        &self,
        session: SessionId,
        fds: &[Arc<OwnedFd>],
        offered: Option<&Offered<'_>>,
    ) -> Result<v1::RegisterCacheRequest, Error> {
        let numbers = fds.iter().enumerate().map(|(at, fd)| (Arc::as_ptr(fd), at)).collect();
        let tensors = self.tensors.iter().map(|tensor| tensor.message(&numbers, offered));
        Ok(v1::RegisterCacheRequest {
            session: session.0,
            device: Bytes::copy_from_slice(&self.device),
            tensors: tensors.collect::<Result<_, _>>()?,
            layout: Some(convert::cache_layout_message(&self.layout)),
            events: self.events.iter().map(|event| Bytes::copy_from_slice(event)).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use kv_block::Slice;
    use kv_block::layout::{Content, EngineOrder, Shape, Tensors};

    use super::*;

    /// Two layers, a tensor each, of 4096 bytes.
    fn spec(tensors: Vec<TensorHandles>) -> DeviceCacheSpec {
        let shape = Shape {
            slice: Slice::whole(2, 2),
            content: Content::KeyValue,
            page_count: 8,
            page_tokens: 4,
            head_dim: 16,
            element_bits: 16,
        };
        let layout = EngineLayout::dense(shape, EngineOrder::LBHNC, Tensors::Layers).unwrap();
        assert_eq!((layout.tensor_count(), layout.tensor_bytes()), (2, 4096));
        DeviceCacheSpec { device: [7; 16], tensors, layout, events: vec![[9; 64]] }
    }

    fn piece(bytes: u64) -> MemoryPiece {
        MemoryPiece::Descriptor { fd: Arc::new(tempfile::tempfile().unwrap().into()), bytes }
    }

    #[test]
    fn memory_that_no_daemon_could_use_is_refused_by_tensor() {
        let whole = || TensorHandles::ipc([1; 64], 512, 4096);
        spec(vec![whole(), whole()]).check().unwrap();
        let shared = TensorHandles { pieces: vec![piece(2048), piece(4096)], offset: 1024, bytes: 4096 };
        spec(vec![whole(), shared.clone()]).check().unwrap();
        let wrong = [
            (vec![whole()], "2 tensors, 1 are given"),
            (vec![whole(), whole(), whole()], "2 tensors, 3 are given"),
            (vec![whole(), TensorHandles { bytes: 4095, ..whole() }], "tensor 1 has 4095 bytes"),
            (vec![TensorHandles { offset: 2049, ..shared.clone() }, whole()], "ends at 6145"),
            (vec![TensorHandles { offset: u64::MAX, ..shared.clone() }, whole()], "tensor 0"),
            (vec![TensorHandles { pieces: vec![], ..whole() }, whole()], "0 bytes"),
            (
                vec![
                    TensorHandles { pieces: vec![MemoryPiece::CudaIpc([1; 64]), piece(9999)], ..shared },
                    whole(),
                ],
                "no other pieces",
            ),
        ];
        for (tensors, words) in wrong {
            let fault = spec(tensors).check().unwrap_err();
            assert!(fault.code == Code::BadRequest && fault.message.contains(words), "{fault}, not {words}");
        }
    }

    #[test]
    fn a_part_has_the_pieces_that_it_needs() {
        let whole = TensorHandles { pieces: (0..4).map(|_| piece(100)).collect(), offset: 30, bytes: 350 };
        let lengths = |part: &TensorHandles| (part.pieces.len(), part.offset, part.bytes);
        for (offset, bytes, wanted) in [
            (0, 350, (4, 30, 350)),
            (0, 70, (1, 30, 70)),
            (0, 71, (2, 30, 71)),
            (69, 2, (2, 99, 2)),
            (70, 100, (1, 0, 100)),
            (70, 101, (2, 0, 101)),
            (340, 10, (1, 70, 10)),
        ] {
            let part = whole.part(offset, bytes);
            assert_eq!(lengths(&part), wanted, "{offset} {bytes}");
            part.check().unwrap();
        }
        // What is not there is not made up.
        assert!(whole.part(340, 100).check().is_err() && whole.part(u64::MAX, 1).check().is_err());
        let one = TensorHandles::ipc([1; 64], 512, 4096).part(1024, 8);
        assert_eq!(lengths(&one), (1, 1536, 8));
    }

    #[test]
    fn a_descriptor_of_several_tensors_is_handed_over_once() {
        let (one, two) = (piece(8192), piece(8192));
        let first = TensorHandles { pieces: vec![one.clone()], offset: 0, bytes: 4096 };
        let second = TensorHandles { pieces: vec![one, two], offset: 4096, bytes: 8192 };
        assert_eq!(spec(vec![first, second]).descriptors().len(), 2);
    }
}
