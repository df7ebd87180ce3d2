//! Memory and addresses apart: pieces of memory that have a handle, addresses that are reserved, and one mapped at the
//! other. A piece is mapped whole; another process gets it as a descriptor.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags,
    CUmemAllocationHandleType, CUmemAllocationProp, CUmemGenericAllocationHandle, CUresult,
};

use crate::memory::Mapping;
use crate::state::{ALIGNED, Block, Origin, Piece, State, state};
use crate::{Code, INVALID_VALUE, put};

const DESCRIPTOR: CUmemAllocationHandleType =
    CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

fn add(state: &mut State, piece: Piece) -> u64 {
    let handle = state.handle() as u64;
    state.pieces.insert(handle, piece);
    handle
}

driver! {
    fn cuMemGetAllocationGranularity(
        bytes: *mut usize, _properties: *const CUmemAllocationProp, _option: CUmemAllocationGranularity_flags
    ) {
        // SAFETY: of the caller.
        unsafe { put(bytes, ALIGNED as usize) }
    }
    fn cuMemCreate(
        handle: *mut CUmemGenericAllocationHandle, bytes: usize, properties: *const CUmemAllocationProp,
        _flags: c_ulonglong
    ) {
        // SAFETY: of the caller.
        let properties = unsafe { properties.as_ref() }.ok_or(INVALID_VALUE)?;
        let mut state = state();
        let device = state.device(properties.location.id)?;
        if bytes == 0 || !(bytes as u64).is_multiple_of(ALIGNED) {
            return Err(INVALID_VALUE);
        }
        if bytes as u64 > state.memory_bytes - state.devices[device].used_bytes {
            return Err(Code::of(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        }
        let mapping = Arc::new(Mapping::new(bytes)?);
        state.devices[device].used_bytes += bytes as u64;
        let made = add(&mut state, Piece { device, mapping, imported: false });
        // SAFETY: of the caller.
        unsafe { put(handle, made) }
    }
    fn cuMemRelease(handle: CUmemGenericAllocationHandle) {
        let mut state = state();
        let Piece { device, mapping, imported } = state.pieces.remove(&handle).ok_or(INVALID_VALUE)?;
        state.settle(device, &mapping, imported);
        Ok(())
    }
    fn cuMemExportToShareableHandle(
        descriptor: *mut c_void, handle: CUmemGenericAllocationHandle, kind: CUmemAllocationHandleType,
        _flags: c_ulonglong
    ) {
        let state = state();
        let piece = state.pieces.get(&handle).filter(|_| kind == DESCRIPTOR).ok_or(INVALID_VALUE)?;
        let exported = piece.mapping.descriptor()?;
        // SAFETY: of the caller; for this kind it is a place for a descriptor.
        unsafe { put(descriptor.cast::<c_int>(), exported.into_raw_fd()) }
    }
    fn cuMemImportFromShareableHandle(
        handle: *mut CUmemGenericAllocationHandle, descriptor: *mut c_void, kind: CUmemAllocationHandleType
    ) {
        let mut state = state();
        let device = state.current()?;
        if kind != DESCRIPTOR || (descriptor.addr() as c_int) < 0 {
            return Err(INVALID_VALUE);
        }
        // SAFETY: of the caller, who has it open.
        let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor.addr() as c_int) };
        let mapping = Arc::new(Mapping::of_descriptor(descriptor)?);
        let made = add(&mut state, Piece { device, mapping, imported: true });
        // SAFETY: of the caller.
        unsafe { put(handle, made) }
    }
    fn cuMemAddressReserve(
        address: *mut CUdeviceptr, bytes: usize, _alignment: usize, _wish: CUdeviceptr, _flags: c_ulonglong
    ) {
        let mut state = state();
        if bytes == 0 || !(bytes as u64).is_multiple_of(ALIGNED) {
            return Err(INVALID_VALUE);
        }
        let reserved = state.reserve(bytes);
        state.reserved.insert(reserved, bytes);
        // SAFETY: of the caller.
        unsafe { put(address, reserved) }
    }
    fn cuMemAddressFree(address: CUdeviceptr, bytes: usize) {
        let mut state = state();
        if state.reserved.get(&address) != Some(&bytes) || state.memory.contains_key(&address) {
            return Err(INVALID_VALUE);
        }
        state.reserved.remove(&address);
        Ok(())
    }
    fn cuMemMap(
        address: CUdeviceptr, bytes: usize, offset: usize, handle: CUmemGenericAllocationHandle, _flags: c_ulonglong
    ) {
        let mut state = state();
        let Piece { device, mapping, imported } = state.pieces.get(&handle).ok_or(INVALID_VALUE)?;
        let (device, imported, mapping) = (*device, *imported, Arc::clone(mapping));
        let fits = state.reserved.get(&address) == Some(&bytes) && mapping.bytes == bytes && offset == 0;
        if !fits || state.memory.contains_key(&address) {
            return Err(INVALID_VALUE);
        }
        let origin = Origin::Mapped { can_be_used: false, imported };
        state.memory.insert(address, Block { device, mapping, origin });
        Ok(())
    }
    fn cuMemSetAccess(address: CUdeviceptr, _bytes: usize, access: *const CUmemAccessDesc, count: usize) {
        // SAFETY: of the caller.
        let access = unsafe { access.as_ref() }.filter(|_| count == 1).ok_or(INVALID_VALUE)?;
        let mut state = state();
        state.device(access.location.id)?;
        let block = state.memory.get_mut(&address).ok_or(INVALID_VALUE)?;
        let Origin::Mapped { can_be_used, .. } = &mut block.origin else { return Err(INVALID_VALUE) };
        *can_be_used = access.flags == CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        Ok(())
    }
    fn cuMemUnmap(address: CUdeviceptr, bytes: usize) {
        let mut state = state();
        let block = state.memory.get(&address).filter(|block| block.mapping.bytes == bytes).ok_or(INVALID_VALUE)?;
        let Origin::Mapped { imported, .. } = block.origin else { return Err(INVALID_VALUE) };
        if state.streams.values().any(|stream| stream.touches_device(&block.mapping)) {
            state.violations += 1;
        }
        if let Some(Block { device, mapping, .. }) = state.memory.remove(&address) {
            state.settle(device, &mapping, imported);
        }
        Ok(())
    }
}
