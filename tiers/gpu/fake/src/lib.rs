//! A CUDA driver over host memory, for tests: what kv-gpu calls, under the driver's own names, in a library that is
//! loaded as the real one is.
//!
//! ```text
//!  memory   allocations in memory files, which other processes open by handle      state    what exists, settings
//!  stream   a thread per stream, so that copies are under way while the caller goes on; events
//!  virtual_memory   memory and addresses apart (`cuMemCreate`), which others get as a descriptor or fabric handle
//!  kernel   the module of kv-gpu, and its kernels carried out in Rust
//! ```
//! It is strict where the real one is lenient or undefined: device addresses cannot be read by the processor, batched
//! copies want registered host memory, no copy goes from one registration or allocation into the next, and memory that is given up under a copy is counted as a violation.
//! It does not play: any other kernels, the legacy default stream, graphs, memory pools, and speed. Of virtual memory it plays
//! whole pieces, mapped as they are.
//!
//! Settings come from the environment variable `FAKE_CUDA` when it is first used, or from `fake_cuda_set` at any time:
//! `key=value`, several by semicolons.
//!
//! | Setting | What it does |
//! |---|---|
//! | `devices=N` | so many devices; before the first use of any |
//! | `memory=BYTES` | of each |
//! | `version=12080` | of the driver, as CUDA counts |
//! | `mps=1` | says that processes share it |
//! | `peers=0` | no device reaches another |
//! | `fabric=0` | no fabric handles; 2: the device has them, and the machine forbids them |
//! | `ask_in_context=1` | questions about addresses want a context |
//! | `delay_us=N` | copies wait so long before each 64 KiB |
//! | `fail=NAME:WHICH:CODE` | the call of that number from now on, once; 0: each |
//! | `lose=DEVICE:CODE` | everything answers so from now on; copies under way stop half way; 0: it is back |
//! | `lie_range=BYTES` | what is said of every allocation |
//! | `hold=1` | copies stand still until it is 0; `hold=DEVICE:1`, those of one device |
//! | `reach_hosts=0` | kernels reach no host memory |
//! | `host_addresses=0` | the device finds registered host memory at addresses of its own |
//! | `flip=WHICH` | the copy of that number from now on, between host memory and a device, lands with a bit changed |
//! | `fail_launch=WHICH:CODE` | the launch of that number from now on is taken, and the device is lost half way in it |
//!
//! `fake_cuda_count` counts: see `State::count`.
#![expect(unsafe_code, reason = "a C library, called with addresses")]
#![expect(missing_docs, reason = "NVIDIA documents the functions")]
#![expect(clippy::missing_safety_doc, reason = "NVIDIA documents the functions")]

/// Defines functions of the driver, and has the compiler compare their arguments with those that cudarc has from
/// NVIDIA's headers. Each counts, and may fail on purpose, before it does anything.
macro_rules! driver {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) $body:block)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $kind),*) -> c_uint {
            let entered = state().enter(stringify!($name));
            let done = entered.and_then(|()| -> Result<(), Code> { $body });
            done.err().map_or(0, |code| code.0)
        }
        const _: unsafe fn($($kind),*) -> CUresult = sys::$name;
    )*};
}

pub mod kernel;
mod memory;
mod state;
mod stream;
pub mod virtual_memory;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdeviceptr, CUevent, CUipcEventHandle, CUipcMemHandle, CUmemcpyAttributes,
    CUresult, CUstream, CUuuid,
};

use memory::{Kind, Mapping};
use state::{Block, CURRENT, Origin, State, context, context_device, state};
use stream::{End, Event, Stream, Work};

/// What a call answers.
#[derive(Clone, Copy, Debug)]
struct Code(u32);

impl Code {
    const fn of(result: CUresult) -> Self {
        Self(result as u32)
    }
}

const INVALID_VALUE: Code = Code::of(CUresult::CUDA_ERROR_INVALID_VALUE);
const NOT_READY: Code = Code::of(CUresult::CUDA_ERROR_NOT_READY);

/// # Safety
/// `to` is null or can be written.
unsafe fn put<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: of the caller.
    unsafe { to.write(value) };
    Ok(())
}

/// # Safety
/// `to` can be written for `room` bytes.
unsafe fn put_text(to: *mut c_char, room: c_int, text: &str) -> Result<(), Code> {
    let room = usize::try_from(room).map_err(|_| INVALID_VALUE)?;
    let length = text.len().min(room.checked_sub(1).ok_or(INVALID_VALUE)?);
    // SAFETY: of the caller; it is cut to the room.
    unsafe {
        to.copy_from(text.as_ptr().cast(), length);
        to.add(length).write(0);
    }
    Ok(())
}

fn queue(
    state: &State,
    stream: CUstream,
    from: End,
    to: End,
    bytes: usize,
) -> Result<(Arc<Stream>, u64), Code> {
    let stream = state.stream(stream as usize)?;
    let ticket = stream.push(Work::Copy { from, to, bytes });
    Ok((stream, ticket))
}

/// Memory that is not registered is read or written before the call returns, as the real one does it.
fn wait_unless_registered(
    address: usize,
    bytes: usize,
    queued: impl FnOnce(&State) -> Result<(Arc<Stream>, u64), Code>,
) -> Result<(), Code> {
    let state = state();
    let is_registered = state.is_registered(address, bytes);
    if !is_registered && state.touches_registered(address, bytes) {
        // From one registration into another, or out of one.
        return Err(INVALID_VALUE);
    }
    let (stream, _) = queued(&state)?;
    drop(state);
    if is_registered { Ok(()) } else { stream.wait() }
}

/// # Safety
/// The lists are as long as they are said to be.
unsafe fn batch(
    destinations: *mut CUdeviceptr,
    sources: *mut CUdeviceptr,
    sizes: *mut usize,
    count: usize,
    attributes: (*mut CUmemcpyAttributes, *mut usize, usize),
    stream: CUstream,
) -> Result<(), (Code, usize)> {
    let nowhere = |code| (code, usize::MAX);
    let (attributes, indices, attribute_count) = attributes;
    if stream.is_null() || count == 0 || attribute_count == 0 || attributes.is_null() || indices.is_null() {
        return Err(nowhere(INVALID_VALUE));
    }
    // SAFETY: of the caller.
    let (first, order) = unsafe { (*indices, (*attributes).srcAccessOrder as u32) };
    if first != 0 || !(1..=3).contains(&order) {
        return Err(nowhere(INVALID_VALUE));
    }
    let state = state();
    let mut work = Vec::with_capacity(count);
    for at in 0..count {
        // SAFETY: of the caller.
        let (to, from, bytes) = unsafe { (*destinations.add(at), *sources.add(at), *sizes.add(at)) };
        let ends = state.anywhere(from, bytes).and_then(|from| Ok((from, state.anywhere(to, bytes)?)));
        let (from, to) = ends.map_err(|code| (code, at))?;
        if bytes == 0 {
            return Err((INVALID_VALUE, at));
        }
        work.push(Work::Copy { from, to, bytes });
    }
    let stream = state.stream(stream as usize).map_err(nowhere)?;
    for work in work {
        stream.push(work);
    }
    Ok(())
}

driver! {
    fn cuInit(_flags: c_uint) {
        let mut state = state();
        if state.devices.is_empty() {
            return Err(Code::of(CUresult::CUDA_ERROR_NO_DEVICE));
        }
        state.initialised = true;
        Ok(())
    }
    fn cuDriverGetVersion(version: *mut c_int) {
        // SAFETY: of the caller.
        unsafe { put(version, state().version) }
    }
    fn cuDeviceGetCount(count: *mut c_int) {
        // SAFETY: of the caller.
        unsafe { put(count, state().devices.len() as c_int) }
    }
    fn cuDeviceGet(device: *mut CUdevice, ordinal: c_int) {
        let found = state().device(ordinal)?;
        // SAFETY: of the caller.
        unsafe { put(device, found as CUdevice) }
    }
    fn cuDeviceGetName(name: *mut c_char, room: c_int, device: CUdevice) {
        let device = state().device(device)?;
        // SAFETY: of the caller.
        unsafe { put_text(name, room, &format!("fake GPU {device}")) }
    }
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: CUdevice) {
        let state = state();
        state.device(device)?;
        // SAFETY: of the caller.
        unsafe { put(bytes, state.memory_bytes as usize) }
    }
    fn cuDeviceGetUuid_v2(uuid: *mut CUuuid, device: CUdevice) {
        let device = state().device(device)?;
        let mut bytes = *b"fake-cuda-GPU-\0\0";
        bytes[15] = device as u8;
        // SAFETY: of the caller.
        unsafe { put(uuid, CUuuid { bytes: bytes.map(|byte| byte as c_char) }) }
    }
    fn cuDeviceGetPCIBusId(name: *mut c_char, room: c_int, device: CUdevice) {
        let device = state().device(device)?;
        // SAFETY: of the caller.
        unsafe { put_text(name, room, &format!("0000:{:02X}:00.0", device + 1)) }
    }
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: CUdevice, peer: CUdevice) {
        let state = state();
        let can_reach = state.device(device)? != state.device(peer)? && state.has_peers;
        // SAFETY: of the caller.
        unsafe { put(can, can_reach.into()) }
    }
    fn cuDevicePrimaryCtxRetain(made: *mut CUcontext, device: CUdevice) {
        let mut state = state();
        let device = state.device(device)?;
        state.devices[device].health.check()?;
        state.devices[device].retained += 1;
        // SAFETY: of the caller.
        unsafe { put(made, context(device) as CUcontext) }
    }
    fn cuDevicePrimaryCtxRelease_v2(device: CUdevice) {
        let mut state = state();
        let device = state.device(device)?;
        let retained = &mut state.devices[device].retained;
        *retained = retained.checked_sub(1).ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_CONTEXT))?;
        if *retained == 0 {
            state.destroy_context(device);
        }
        Ok(())
    }
    fn cuDevicePrimaryCtxGetState(device: CUdevice, flags: *mut c_uint, active: *mut c_int) {
        let state = state();
        let device = state.device(device)?;
        // SAFETY: of the caller.
        unsafe {
            put(flags, 0)?;
            put(active, (state.devices[device].retained > 0).into())
        }
    }
    fn cuCtxPushCurrent_v2(context: CUcontext) {
        let device = context_device(context as usize).ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_CONTEXT))?;
        if state().devices.get(device).is_none_or(|device| device.retained == 0) {
            return Err(Code::of(CUresult::CUDA_ERROR_INVALID_CONTEXT));
        }
        CURRENT.with_borrow_mut(|contexts| contexts.push(context as usize));
        Ok(())
    }
    fn cuCtxPopCurrent_v2(context: *mut CUcontext) {
        let popped = CURRENT.with_borrow_mut(Vec::pop);
        let popped = popped.ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_CONTEXT))?;
        // SAFETY: of the caller.
        unsafe { put(context, popped as CUcontext) }
    }
    fn cuCtxEnablePeerAccess(peer: CUcontext, _flags: c_uint) {
        let state = state();
        let here = state.current()?;
        let peer = context_device(peer as usize).filter(|peer| *peer < state.devices.len());
        match peer.ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_CONTEXT))? {
            peer if peer == here || !state.has_peers => Err(Code::of(CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED)),
            _ => Ok(()),
        }
    }
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        state().current()?;
        // SAFETY: of the caller.
        unsafe {
            put(least, 0)?;
            put(greatest, -5)
        }
    }
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let state = state();
        let device = state.current()?;
        // SAFETY: of the caller.
        unsafe {
            put(free, (state.memory_bytes - state.devices[device].used_bytes) as usize)?;
            put(total, state.memory_bytes as usize)
        }
    }
    fn cuMemAlloc_v2(address: *mut CUdeviceptr, bytes: usize) {
        let mut state = state();
        let device = state.current()?;
        let used = state.devices[device].used_bytes;
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        if bytes as u64 > state.memory_bytes - used {
            return Err(Code::of(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        }
        let mapping = Arc::new(Mapping::on(device, bytes, 0)?);
        state.devices[device].used_bytes += bytes as u64;
        let placed = state.place(Block { device, mapping, origin: Origin::Allocated });
        // SAFETY: of the caller.
        unsafe { put(address, placed) }
    }
    fn cuMemFree_v2(address: CUdeviceptr) {
        let mut state = state();
        state.current()?;
        let block = state.memory.get(&address).filter(|block| block.origin == Origin::Allocated).ok_or(INVALID_VALUE)?;
        if state.streams.values().any(|stream| stream.touches_device(&block.mapping)) {
            state.violations += 1;
        }
        if let Some(block) = state.memory.remove(&address) {
            state.devices[block.device].used_bytes -= block.mapping.bytes as u64;
        }
        Ok(())
    }
    fn cuMemGetAddressRange_v2(base: *mut CUdeviceptr, bytes: *mut usize, address: CUdeviceptr) {
        let state = state();
        state.current()?;
        let (found, block) = state.block(address)?;
        // SAFETY: of the caller.
        unsafe {
            put(base, found)?;
            put(bytes, state.lie_range_bytes.unwrap_or(block.mapping.bytes))
        }
    }
    fn cuMemHostRegister_v2(address: *mut c_void, bytes: usize, flags: c_uint) {
        let mut state = state();
        let device = state.current()?;
        let start = address.expose_provenance();
        if start == 0 || bytes == 0 {
            return Err(INVALID_VALUE);
        }
        let below = state.hosts.range(..start + bytes).next_back();
        if below.is_some_and(|(other, (length, _))| other + length > start) {
            return Err(Code::of(CUresult::CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED));
        }
        state.hosts.insert(start, (bytes, device));
        state.kernels.registered(start, flags);
        Ok(())
    }
    fn cuMemHostUnregister(address: *mut c_void) {
        let mut state = state();
        state.current()?;
        let start = address.addr();
        let gone = state.hosts.remove(&start);
        state.kernels.unregistered(start);
        let (bytes, _) = gone.ok_or(Code::of(CUresult::CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED))?;
        if state.streams.values().any(|stream| stream.touches_host(&(start..start + bytes))) {
            state.violations += 1;
        }
        Ok(())
    }
    fn cuMemcpyHtoDAsync_v2(to: CUdeviceptr, from: *const c_void, bytes: usize, stream: CUstream) {
        let from = from.expose_provenance();
        wait_unless_registered(from, bytes, |state| {
            state.current()?;
            queue(state, stream, End::Host(from), state.on_device(to, bytes)?, bytes)
        })
    }
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize, stream: CUstream) {
        let to = to.expose_provenance();
        wait_unless_registered(to, bytes, |state| {
            state.current()?;
            queue(state, stream, state.on_device(from, bytes)?, End::Host(to), bytes)
        })
    }
    fn cuMemcpyDtoDAsync_v2(to: CUdeviceptr, from: CUdeviceptr, bytes: usize, stream: CUstream) {
        let state = state();
        state.current()?;
        queue(&state, stream, state.on_device(from, bytes)?, state.on_device(to, bytes)?, bytes)?;
        Ok(())
    }
    fn cuMemcpyBatchAsync_v2(
        to: *mut CUdeviceptr, from: *mut CUdeviceptr, sizes: *mut usize, count: usize,
        attributes: *mut CUmemcpyAttributes, indices: *mut usize, attribute_count: usize, stream: CUstream
    ) {
        // SAFETY: of the caller.
        unsafe { batch(to, from, sizes, count, (attributes, indices, attribute_count), stream) }
            .map_err(|(code, _)| code)
    }
    fn cuStreamCreateWithPriority(made: *mut CUstream, _flags: c_uint, _priority: c_int) {
        let mut state = state();
        let device = state.current()?;
        let stream = Stream::new(device, Arc::clone(&state.devices[device].health));
        let handle = state.handle();
        state.streams.insert(handle, stream);
        // SAFETY: of the caller.
        unsafe { put(made, handle as CUstream) }
    }
    fn cuStreamDestroy_v2(stream: CUstream) {
        let mut state = state();
        state.stream(stream as usize)?.close();
        state.streams.remove(&(stream as usize));
        Ok(())
    }
    fn cuStreamQuery(stream: CUstream) {
        let stream = state().stream(stream as usize)?;
        if stream.is_idle() { stream.health.check() } else { Err(NOT_READY) }
    }
    fn cuStreamSynchronize(stream: CUstream) {
        let stream = state().stream(stream as usize)?;
        stream.wait()
    }
    fn cuStreamWaitEvent(stream: CUstream, event: CUevent, _flags: c_uint) {
        let state = state();
        let (stream, event) = (state.stream(stream as usize)?, state.event(event as usize)?);
        let number = event.recorded();
        stream.push(Work::Wait(event, number));
        Ok(())
    }
    fn cuEventCreate(made: *mut CUevent, flags: c_uint) {
        const DISABLE_TIMING: c_uint = 2;
        const INTERPROCESS: c_uint = 4;
        let mut state = state();
        let device = state.current()?;
        let shared = flags & INTERPROCESS != 0;
        if shared && flags & DISABLE_TIMING == 0 {
            return Err(INVALID_VALUE);
        }
        let event = Event::new(Arc::clone(&state.devices[device].health), shared)?;
        let handle = state.handle();
        state.events.insert(handle, Arc::new(event));
        // SAFETY: of the caller.
        unsafe { put(made, handle as CUevent) }
    }
    fn cuEventDestroy_v2(event: CUevent) {
        let mut state = state();
        state.event(event as usize)?;
        state.events.remove(&(event as usize));
        Ok(())
    }
    fn cuEventRecord(event: CUevent, stream: CUstream) {
        let state = state();
        let (stream, event) = (state.stream(stream as usize)?, state.event(event as usize)?);
        let number = event.record();
        stream.push(Work::Record(event, number));
        Ok(())
    }
    fn cuEventQuery(event: CUevent) {
        let event = state().event(event as usize)?;
        if event.is_done() { event.health.check() } else { Err(NOT_READY) }
    }
    fn cuEventSynchronize(event: CUevent) {
        let event = state().event(event as usize)?;
        event.wait()
    }
    fn cuIpcGetMemHandle(handle: *mut CUipcMemHandle, address: CUdeviceptr) {
        let state = state();
        state.current()?;
        let (base, block) = state.block(address)?;
        // What came by a handle cannot be handed on, and what was mapped has no such handle. An address within an
        // allocation is refused, as the documentation would have it.
        if block.origin != Origin::Allocated || address != base {
            return Err(INVALID_VALUE);
        }
        let reserved = block.mapping.handle(Kind::Memory).map(|byte| byte as c_char);
        // SAFETY: of the caller.
        unsafe { put(handle, CUipcMemHandle { reserved }) }
    }
    fn cuIpcOpenMemHandle_v2(address: *mut CUdeviceptr, handle: CUipcMemHandle, flags: c_uint) {
        let mut state = state();
        let device = state.current()?;
        if flags != 1 {
            return Err(INVALID_VALUE);
        }
        let mapping = Mapping::open(&handle.reserved.map(|byte| byte as u8), Kind::Memory)?;
        let known = state.memory.iter_mut().find(|(_, block)| block.mapping.generation == mapping.generation);
        let placed = match known {
            Some((known, Block { origin: Origin::Opened(opened), .. })) => {
                *opened += 1;
                *known
            }
            _ => state.place(Block { device, mapping: Arc::new(mapping), origin: Origin::Opened(1) }),
        };
        // SAFETY: of the caller.
        unsafe { put(address, placed) }
    }
    fn cuIpcCloseMemHandle(address: CUdeviceptr) {
        let mut state = state();
        state.current()?;
        let block = state.memory.get_mut(&address).ok_or(INVALID_VALUE)?;
        let Origin::Opened(opened) = &mut block.origin else { return Err(INVALID_VALUE) };
        *opened -= 1;
        if *opened > 0 {
            return Ok(());
        }
        let mapping = Arc::clone(&block.mapping);
        if state.streams.values().any(|stream| stream.touches_device(&mapping)) {
            state.violations += 1;
        }
        state.memory.remove(&address);
        Ok(())
    }
    fn cuIpcGetEventHandle(handle: *mut CUipcEventHandle, event: CUevent) {
        let event = state().event(event as usize)?;
        let reserved = event.handle().ok_or(INVALID_VALUE)?.map(|byte| byte as c_char);
        // SAFETY: of the caller.
        unsafe { put(handle, CUipcEventHandle { reserved }) }
    }
    fn cuIpcOpenEventHandle(made: *mut CUevent, handle: CUipcEventHandle) {
        let mut state = state();
        let device = state.current()?;
        let health = Arc::clone(&state.devices[device].health);
        let event = Event::open(health, &handle.reserved.map(|byte| byte as u8))?;
        let handle = state.handle();
        state.events.insert(handle, Arc::new(event));
        // SAFETY: of the caller.
        unsafe { put(made, handle as CUevent) }
    }
}

/// What `cuGetProcAddress` gives out. Not the exported functions: a library whose table lacks one of those (a test
/// takes them out) could not be loaded if it used them itself.
mod asked {
    use super::*;

    pub(crate) unsafe extern "C" fn batch_v1(
        to: *mut CUdeviceptr,
        from: *mut CUdeviceptr,
        sizes: *mut usize,
        count: usize,
        attributes: *mut CUmemcpyAttributes,
        indices: *mut usize,
        attribute_count: usize,
        failed: *mut usize,
        stream: CUstream,
    ) -> c_uint {
        if let Err(code) = state().enter("cuMemcpyBatchAsync") {
            return code.0;
        }
        // SAFETY: of the caller.
        match unsafe { batch(to, from, sizes, count, (attributes, indices, attribute_count), stream) } {
            Ok(()) => 0,
            Err((code, at)) => {
                // SAFETY: of the caller.
                let _ = unsafe { put(failed, at) };
                code.0
            }
        }
    }

    pub(crate) unsafe extern "C" fn batch_v2(
        to: *mut CUdeviceptr,
        from: *mut CUdeviceptr,
        sizes: *mut usize,
        count: usize,
        attributes: *mut CUmemcpyAttributes,
        indices: *mut usize,
        attribute_count: usize,
        stream: CUstream,
    ) -> c_uint {
        let entered = state().enter("cuMemcpyBatchAsync_v2").map_err(|code| (code, 0));
        // SAFETY: of the caller.
        let done = entered.and_then(|()| unsafe {
            batch(to, from, sizes, count, (attributes, indices, attribute_count), stream)
        });
        done.err().map_or(0, |(code, _)| code.0)
    }
}

/// With the signature of CUDA 12.8, which cudarc has only when it is built for that version.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyBatchAsync(
    to: *mut CUdeviceptr,
    from: *mut CUdeviceptr,
    sizes: *mut usize,
    count: usize,
    attributes: *mut CUmemcpyAttributes,
    indices: *mut usize,
    attribute_count: usize,
    failed: *mut usize,
    stream: CUstream,
) -> c_uint {
    // SAFETY: of the caller.
    unsafe { asked::batch_v1(to, from, sizes, count, attributes, indices, attribute_count, failed, stream) }
}

/// With numbers in place of cudarc's enums, in which a number that the enum lacks must not be put.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_uint,
    device: CUdevice,
) -> c_uint {
    use sys::CUdevice_attribute as Attribute;
    let state = &mut *state();
    if let Err(code) = state.enter("cuDeviceGetAttribute").and_then(|()| state.device(device)) {
        return code.0;
    }
    // A driver does not know what came after it.
    let since = match attribute {
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED as u32 => 12000,
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED as u32 => 12030,
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_MPS_ENABLED as u32 => 12030,
        _ => 0,
    };
    if state.version < since {
        return INVALID_VALUE.0;
    }
    let found = match attribute {
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as u32 => 9,
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as u32 => 0,
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT as u32 => 3,
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING as u32 => 1,
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as u32 => 4,
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY as u32 => {
            state.kernels.can_reach_hosts.into()
        }
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM as u32 => {
            state.kernels.has_host_addresses.into()
        }
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED as u32 => 1,
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_MPS_ENABLED as u32 => state.has_mps.into(),
        at if at == Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED as u32 => {
            (state.fabric != state::Fabric::None).into()
        }
        _ => 0,
    };
    // SAFETY: of the caller.
    unsafe { put(value, found) }.err().map_or(0, |code| code.0)
}

/// As above, with a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetP2PAttribute(
    value: *mut c_int,
    attribute: c_uint,
    from: CUdevice,
    to: CUdevice,
) -> c_uint {
    let state = &mut *state();
    let found = state.enter("cuDeviceGetP2PAttribute").and_then(|()| {
        if state.device(from)? == state.device(to)? {
            return Err(Code::of(CUresult::CUDA_ERROR_INVALID_DEVICE));
        }
        let value_of = match attribute {
            // How the link is ranked; whether there is access, atomics.
            1 => (from - to).abs() - 1,
            2 | 3 => state.has_peers.into(),
            _ => return Err(INVALID_VALUE),
        };
        // SAFETY: of the caller.
        unsafe { put(value, value_of) }
    });
    found.err().map_or(0, |code| code.0)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: c_uint, name: *mut *const c_char) -> c_uint {
    let known: &CStr = match error {
        0 => c"CUDA_SUCCESS",
        1 => c"CUDA_ERROR_INVALID_VALUE",
        2 => c"CUDA_ERROR_OUT_OF_MEMORY",
        3 => c"CUDA_ERROR_NOT_INITIALIZED",
        34 => c"CUDA_ERROR_STUB_LIBRARY",
        100 => c"CUDA_ERROR_NO_DEVICE",
        101 => c"CUDA_ERROR_INVALID_DEVICE",
        201 => c"CUDA_ERROR_INVALID_CONTEXT",
        205 => c"CUDA_ERROR_MAP_FAILED",
        214 => c"CUDA_ERROR_ECC_UNCORRECTABLE",
        217 => c"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
        218 => c"CUDA_ERROR_INVALID_PTX",
        222 => c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        400 => c"CUDA_ERROR_INVALID_HANDLE",
        500 => c"CUDA_ERROR_NOT_FOUND",
        600 => c"CUDA_ERROR_NOT_READY",
        700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        701 => c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
        712 => c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED",
        713 => c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED",
        719 => c"CUDA_ERROR_LAUNCH_FAILED",
        800 => c"CUDA_ERROR_NOT_PERMITTED",
        801 => c"CUDA_ERROR_NOT_SUPPORTED",
        802 => c"CUDA_ERROR_SYSTEM_NOT_READY",
        999 => c"CUDA_ERROR_UNKNOWN",
        _ => return INVALID_VALUE.0,
    };
    // SAFETY: of the caller.
    unsafe { put(name, known.as_ptr()) }.err().map_or(0, |code| code.0)
}

/// Finds the batched copy alone, in the form that the wanted version has; the rest is found by the loader.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress_v2(
    symbol: *const c_char,
    found: *mut *mut c_void,
    version: c_int,
    _flags: u64,
    status: *mut c_uint,
) -> c_uint {
    if let Err(code) = state().enter("cuGetProcAddress_v2") {
        return code.0;
    }
    // SAFETY: of the caller.
    let wanted = unsafe { CStr::from_ptr(symbol) }.to_bytes();
    let has = state().version;
    let (address, told) = match wanted {
        b"cuMemcpyBatchAsync" if version > has || version < 12080 => (std::ptr::null_mut(), 2),
        b"cuMemcpyBatchAsync" if version >= 13000 => (asked::batch_v2 as *mut c_void, 0),
        b"cuMemcpyBatchAsync" => (asked::batch_v1 as *mut c_void, 0),
        _ => (std::ptr::null_mut(), 1),
    };
    if !status.is_null() {
        // SAFETY: of the caller.
        unsafe { status.write(told) };
    }
    // SAFETY: of the caller.
    unsafe { put(found, address) }.err().map_or(0, |code| code.0)
}

/// Changes settings; 0 when they were understood.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_cuda_set(settings: *const c_char) -> c_uint {
    // SAFETY: of the caller.
    let settings = unsafe { CStr::from_ptr(settings) }.to_string_lossy();
    match state().set(&settings) {
        Ok(()) => 0,
        Err(why) => {
            eprintln!("fake_cuda_set: {why}");
            1
        }
    }
}

/// How many there are; all ones when the word is unknown.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fake_cuda_count(what: *const c_char) -> u64 {
    // SAFETY: of the caller.
    let what = unsafe { CStr::from_ptr(what) }.to_string_lossy();
    state().count(&what).unwrap_or(u64::MAX)
}
