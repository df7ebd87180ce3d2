//! Memory and addresses apart: pieces of memory that have a handle, addresses that are reserved, and pieces mapped at
//! addresses, several in a row where somebody wants that. A piece is mapped whole; another process gets it as a
//! descriptor, another machine by a fabric handle, for which another process stands here.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags,
    CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationProp_st__bindgen_ty_1,
    CUmemAllocationType, CUmemFabricHandle, CUmemGenericAllocationHandle, CUmemLocation, CUmemLocationType,
    CUpointer_attribute as Attribute, CUresult,
};

use crate::memory::{Kind, Mapping};
use crate::state::{ALIGNED, Block, Fabric, Origin, Piece, State, context, state};
use crate::{Code, INVALID_VALUE, put};

const DESCRIPTOR: CUmemAllocationHandleType =
    CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
const FABRIC: CUmemAllocationHandleType = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_FABRIC;

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
        let kinds = properties.requestedHandleTypes;
        match state.fabric {
            _ if (kinds & FABRIC).0 == 0 => {}
            Fabric::There => {}
            Fabric::None => return Err(Code::of(CUresult::CUDA_ERROR_NOT_SUPPORTED)),
            Fabric::Forbidden => return Err(Code::of(CUresult::CUDA_ERROR_NOT_PERMITTED)),
        }
        let mapping = Arc::new(Mapping::on(device, bytes, kinds.0)?);
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
        place: *mut c_void, handle: CUmemGenericAllocationHandle, kind: CUmemAllocationHandleType,
        _flags: c_ulonglong
    ) {
        let state = state();
        let piece = state.pieces.get(&handle).ok_or(INVALID_VALUE)?;
        if piece.mapping.kinds & kind.0 == 0 || !(kind == DESCRIPTOR || kind == FABRIC) {
            return Err(INVALID_VALUE);
        }
        if kind == FABRIC {
            let data = piece.mapping.handle(Kind::Fabric);
            // SAFETY: of the caller; for this kind it is a place for such a handle.
            return unsafe { put(place.cast(), CUmemFabricHandle { data }) };
        }
        let exported = piece.mapping.descriptor()?;
        // SAFETY: of the caller; for this kind it is a place for a descriptor.
        unsafe { put(place.cast::<c_int>(), exported.into_raw_fd()) }
    }
    fn cuMemImportFromShareableHandle(
        handle: *mut CUmemGenericAllocationHandle, word: *mut c_void, kind: CUmemAllocationHandleType
    ) {
        let mut state = state();
        let device = state.current()?;
        let mapping = if kind == FABRIC && state.fabric == Fabric::There {
            // SAFETY: of the caller; for this kind it is the address of such a handle.
            let fabric = unsafe { word.cast::<CUmemFabricHandle>().as_ref() }.ok_or(INVALID_VALUE)?;
            Mapping::open(&fabric.data, Kind::Fabric)?
        } else if kind == DESCRIPTOR && word.addr() as c_int >= 0 {
            // SAFETY: of the caller, who has it open.
            Mapping::of_descriptor(unsafe { BorrowedFd::borrow_raw(word.addr() as c_int) })?
        } else {
            return Err(INVALID_VALUE);
        };
        let made = add(&mut state, Piece { device, mapping: Arc::new(mapping), imported: true });
        // SAFETY: of the caller.
        unsafe { put(handle, made) }
    }
    fn cuMemRetainAllocationHandle(handle: *mut CUmemGenericAllocationHandle, address: *mut c_void) {
        let mut state = state();
        let (_, block) = state.block(address.addr() as u64)?;
        let Origin::Mapped { imported, .. } = block.origin else { return Err(INVALID_VALUE) };
        let piece = Piece { device: block.device, mapping: Arc::clone(&block.mapping), imported };
        let retained = add(&mut state, piece);
        // SAFETY: of the caller.
        unsafe { put(handle, retained) }
    }
    fn cuMemGetAllocationPropertiesFromHandle(
        properties: *mut CUmemAllocationProp, handle: CUmemGenericAllocationHandle
    ) {
        let state = state();
        let Piece { mapping, .. } = state.pieces.get(&handle).ok_or(INVALID_VALUE)?;
        let told = CUmemAllocationProp {
            type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: sys::CUmemAllocationHandleType_enum(mapping.kinds),
            location: CUmemLocation {
                type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
                id: mapping.device() as c_int,
            },
            win32HandleMetaData: std::ptr::null_mut(),
            allocFlags: CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: 0,
                usage: 0,
                reserved: [0; 4],
            },
        };
        // SAFETY: of the caller.
        unsafe { put(properties, told) }
    }
    fn cuMemAddressReserve(
        address: *mut CUdeviceptr, bytes: usize, _alignment: usize, _wish: CUdeviceptr, _flags: c_ulonglong
    ) {
        let mut state = state();
        if bytes == 0 || !(bytes as u64).is_multiple_of(ALIGNED) {
            return Err(INVALID_VALUE);
        }
        let region = Arc::new(Mapping::addresses(bytes)?);
        let reserved = state.reserve(bytes);
        state.reserved.insert(reserved, region);
        // SAFETY: of the caller.
        unsafe { put(address, reserved) }
    }
    fn cuMemAddressFree(address: CUdeviceptr, bytes: usize) {
        let mut state = state();
        let is_all = state.reserved.get(&address).is_some_and(|region| region.bytes == bytes);
        if !is_all || state.memory.range(address..address + bytes as u64).next().is_some() {
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
        let (start, region) = state.reservation(address, bytes)?;
        let end = address + bytes as u64;
        let last = state.memory.range(..end).next_back();
        let is_free = last.is_none_or(|(base, block)| base + block.mapping.bytes as u64 <= address);
        if !is_free || mapping.bytes != bytes || offset != 0 || !address.is_multiple_of(ALIGNED) {
            return Err(INVALID_VALUE);
        }
        region.lay((address - start) as usize, &mapping)?;
        state.memory.insert(address, Block { device, mapping, origin: Origin::Mapped { used_by: 0, imported } });
        Ok(())
    }
    fn cuMemSetAccess(address: CUdeviceptr, bytes: usize, access: *const CUmemAccessDesc, count: usize) {
        // SAFETY: of the caller.
        let access = unsafe { access.as_ref() }.filter(|_| count == 1).ok_or(INVALID_VALUE)?;
        let mut state = state();
        let (device, has_peers) = (state.device(access.location.id)?, state.has_peers);
        for at in state.mapped(address, bytes)? {
            let Some(Block { origin: Origin::Mapped { used_by, .. }, mapping, .. }) = state.memory.get_mut(&at)
            else {
                return Err(INVALID_VALUE);
            };
            if mapping.device() != device && !has_peers {
                return Err(Code::of(CUresult::CUDA_ERROR_INVALID_DEVICE));
            }
            match access.flags == CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE {
                true => *used_by |= 1 << device,
                false => *used_by &= !(1 << device),
            }
        }
        Ok(())
    }
    fn cuMemUnmap(address: CUdeviceptr, bytes: usize) {
        let mut state = state();
        let pieces = state.mapped(address, bytes)?;
        let (start, region) = state.reservation(address, bytes)?;
        let (offset, region) = ((address - start) as usize, Arc::clone(region));
        let part = offset..offset + bytes;
        if state.streams.values().any(|stream| stream.touches_part(&region, &part)) {
            // Counted, and left there: what uses it would end the process.
            state.violations += 1;
        } else {
            region.clear(offset, bytes)?;
        }
        for at in pieces {
            if let Some(Block { device, mapping, origin: Origin::Mapped { imported, .. } }) = state.memory.remove(&at) {
                state.settle(device, &mapping, imported);
            }
        }
        Ok(())
    }
}

/// With a number in place of cudarc's enum, in which a number that the enum lacks must not be put.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttribute(
    place: *mut c_void,
    attribute: c_uint,
    address: CUdeviceptr,
) -> c_uint {
    let state = &mut *state();
    let found = state.enter("cuPointerGetAttribute").and_then(|()| {
        if state.asks_in_context {
            state.current()?;
        }
        let (base, block) = state.block(address)?;
        let is_mapped = matches!(block.origin, Origin::Mapped { .. });
        // SAFETY: of the caller, who has a place for what this question is answered with.
        unsafe {
            match attribute {
                at if at == Attribute::CU_POINTER_ATTRIBUTE_CONTEXT as c_uint => {
                    put(place.cast::<usize>(), if is_mapped { 0 } else { context(block.device) })
                }
                at if at == Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL as c_uint => {
                    put(place.cast::<c_int>(), block.device as c_int)
                }
                at if at == Attribute::CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR as c_uint => {
                    put(place.cast::<CUdeviceptr>(), base)
                }
                at if at == Attribute::CU_POINTER_ATTRIBUTE_MAPPING_SIZE as c_uint => {
                    put(place.cast::<usize>(), block.mapping.bytes)
                }
                _ => Err(INVALID_VALUE),
            }
        }
    });
    found.err().map_or(0, |code| code.0)
}
