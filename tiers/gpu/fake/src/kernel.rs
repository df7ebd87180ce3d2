//! Modules and launches: the one module there is, kv-gpu's own, whose kernels are carried out here in Rust.
//!
//! Strict again: a table that changes while a launch has it is a violation, as is a module that is unloaded under a
//! launch; host memory must be registered for kernels to reach it, and is called by the device's address for it. A
//! launch that leads to an address which is nobody's is taken, and the device is lost when it comes to it.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, c_char, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::sys::{self, CUdeviceptr, CUfunction, CUmodule, CUresult, CUstream};

use crate::memory::Mapping;
use crate::state::{DEVICE_ADDRESSES, State, state};
use crate::stream::{End, Health, Work};
use crate::{Code, INVALID_VALUE, put};

/// What alone is taken.
const PTX: &str = include_str!("../../kernel/pages.ptx");
/// The first version that takes PTX 7.8.
const VERSION_MIN: i32 = 11080;
/// Where a device finds registered host memory, if it is not to find it at the processor's address.
const HOST_ADDRESSES: u64 = 0x0800_0000_0000_0000;
/// `CU_MEMHOSTREGISTER_DEVICEMAP`.
const DEVICEMAP: c_uint = 2;
const ILLEGAL_ADDRESS: Code = Code::of(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Pages,
    Checksums,
}

/// What the driver knows of kernels.
pub(crate) struct Kernels {
    /// By handle, with their devices.
    modules: HashMap<usize, usize>,
    /// By handle, with their modules.
    functions: HashMap<usize, (Kernel, usize)>,
    /// Where the registered host memory begins that kernels may reach.
    reachable: BTreeSet<usize>,
    /// Whether they may at all.
    pub(crate) can_reach_hosts: bool,
    /// Whether they reach it by the processor's address.
    pub(crate) has_host_addresses: bool,
    /// Which launch from now on fails when it is carried out, and how.
    fails: Option<(u64, u32)>,
}

impl Default for Kernels {
    fn default() -> Self {
        Self {
            modules: HashMap::new(),
            functions: HashMap::new(),
            reachable: BTreeSet::new(),
            can_reach_hosts: true,
            has_host_addresses: true,
            fails: None,
        }
    }
}

impl Kernels {
    pub(crate) fn fail(&mut self, nth: u64, code: u32) {
        self.fails = Some((nth.max(1), code));
    }

    pub(crate) fn registered(&mut self, start: usize, flags: c_uint) {
        if flags & DEVICEMAP != 0 {
            self.reachable.insert(start);
        }
    }

    pub(crate) fn unregistered(&mut self, start: usize) {
        self.reachable.remove(&start);
    }

    pub(crate) fn modules(&self) -> usize {
        self.modules.len()
    }

    pub(crate) fn destroy_context(&mut self, device: usize) {
        self.modules.retain(|_, of| *of != device);
        self.functions.retain(|_, (_, module)| self.modules.contains_key(module));
    }
}

/// A launch, as it is carried out.
pub(crate) struct Launch {
    kernel: Kernel,
    module: usize,
    /// The table, and what was in it when it was launched.
    table: End,
    words: Vec<u64>,
    /// What it reads and writes, and how much; a sum's end is written alone.
    moves: Vec<(End, End, usize)>,
    /// What becomes of the device on the way.
    fault: Option<Code>,
}

impl Launch {
    pub(crate) fn is_of(&self, module: usize) -> bool {
        self.module == module
    }

    /// All that it reads or writes.
    pub(crate) fn ends(&self) -> impl Iterator<Item = (&End, usize)> {
        let written = |bytes| if self.kernel == Kernel::Checksums { 8 } else { bytes };
        let moves =
            self.moves.iter().flat_map(move |(from, to, bytes)| [(from, *bytes), (to, written(*bytes))]);
        moves.chain([(&self.table, self.words.len() * 8)])
    }

    /// `goes_on` is asked before each piece and may wait.
    pub(crate) fn carry_out(&self, health: &Health, goes_on: impl Fn(usize) -> bool) {
        if words(&self.table, self.words.len()) != self.words {
            health.violations.fetch_add(1, Ordering::SeqCst);
        }
        // One that fails does half of it.
        let count = if self.fault.is_some() { self.moves.len() / 2 } else { self.moves.len() };
        for (from, to, bytes) in &self.moves[..count] {
            if !goes_on(*bytes) {
                return;
            }
            // SAFETY: device memory is held by the launch; host memory stays until it is done by the contract of the
            // call that launched it, which is what is tested here.
            unsafe {
                match self.kernel {
                    Kernel::Pages => std::ptr::copy(from.at(0).cast_const(), to.at(0), *bytes),
                    Kernel::Checksums => {
                        let summed = std::slice::from_raw_parts(from.at(0).cast_const(), *bytes);
                        to.at(0).cast::<u64>().write_unaligned(crc_64_nvme(summed));
                    }
                }
            }
        }
        if let Some(Code(code)) = self.fault {
            health.lose(code);
        }
    }
}

fn words(table: &End, count: usize) -> Vec<u64> {
    // SAFETY: memory of a launch that is under way, whose length was compared with that of its memory.
    (0..count).map(|at| unsafe { table.at(at * 8).cast::<u64>().read_unaligned() }).collect()
}

fn crc_64_nvme(bytes: &[u8]) -> u64 {
    const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;
    const TABLE: [u64; 256] = {
        let (mut table, mut at) = ([0; 256], 0);
        while at < 256 {
            let (mut value, mut bit) = (at as u64, 0);
            while bit < 8 {
                value = (value >> 1) ^ if value & 1 == 1 { POLYNOMIAL } else { 0 };
                bit += 1;
            }
            table[at] = value;
            at += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |sum, byte| (sum >> 8) ^ TABLE[usize::from(sum as u8 ^ byte)])
}

impl State {
    /// Memory as a kernel of this device reaches it.
    fn reached(&self, device: usize, address: u64, bytes: usize) -> Result<End, Code> {
        if address >= DEVICE_ADDRESSES {
            let (_, block) = self.block(address)?;
            if block.device != device {
                return Err(ILLEGAL_ADDRESS);
            }
            return self.on_device(address, bytes);
        }
        let base = if self.kernels.has_host_addresses { 0 } else { HOST_ADDRESSES };
        let host = address.checked_sub(base).ok_or(ILLEGAL_ADDRESS)? as usize;
        let (start, _) = self.hosts.range(..=host).next_back().ok_or(ILLEGAL_ADDRESS)?;
        if !self.is_registered(host, bytes) || !self.kernels.reachable.contains(start) {
            return Err(ILLEGAL_ADDRESS);
        }
        Ok(End::Host(host))
    }

    fn launch(
        &self,
        (kernel, module): (Kernel, usize),
        device: usize,
        table: u64,
        count: usize,
        sums: u64,
    ) -> Result<Launch, Code> {
        let entry_words = if kernel == Kernel::Pages { 3 } else { 2 };
        let of_table = self.reached(device, table, count * entry_words * 8)?;
        let words = words(&of_table, count * entry_words);
        let ends = |(at, entry): (usize, &[u64])| {
            let (to, from, bytes, written) = match *entry {
                [to, from, bytes] => (to, from, bytes as usize, bytes as usize),
                [from, bytes] => (sums + at as u64 * 8, from, bytes as usize, 8),
                _ => return Err(INVALID_VALUE),
            };
            Ok((self.reached(device, from, bytes)?, self.reached(device, to, written)?, bytes))
        };
        let moves = words.chunks(entry_words).enumerate().map(ends).collect::<Result<_, _>>()?;
        Ok(Launch { kernel, module, table: of_table, words, moves, fault: None })
    }
}

driver! {
    fn cuModuleLoadData(made: *mut CUmodule, image: *const c_void) {
        // SAFETY: of the caller; PTX is a text that ends with a zero.
        let image = unsafe { CStr::from_ptr(image.cast()) };
        let mut state = state();
        let device = state.current()?;
        if state.version < VERSION_MIN {
            return Err(Code::of(CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION));
        }
        if image.to_bytes() != PTX.as_bytes() {
            return Err(Code::of(CUresult::CUDA_ERROR_INVALID_PTX));
        }
        let handle = state.handle();
        state.kernels.modules.insert(handle, device);
        // SAFETY: of the caller.
        unsafe { put(made, handle as CUmodule) }
    }
    fn cuModuleUnload(module: CUmodule) {
        let mut state = state();
        state.current()?;
        let module = module as usize;
        state.kernels.modules.remove(&module).ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_HANDLE))?;
        state.kernels.functions.retain(|_, (_, of)| *of != module);
        if state.streams.values().any(|stream| stream.runs(module)) {
            state.violations += 1;
        }
        Ok(())
    }
    fn cuModuleGetFunction(made: *mut CUfunction, module: CUmodule, name: *const c_char) {
        // SAFETY: of the caller.
        let name = unsafe { CStr::from_ptr(name) };
        let mut state = state();
        let module = module as usize;
        if !state.kernels.modules.contains_key(&module) {
            return Err(Code::of(CUresult::CUDA_ERROR_INVALID_HANDLE));
        }
        let kernel = match name.to_bytes() {
            b"pages" => Kernel::Pages,
            b"checksums" => Kernel::Checksums,
            _ => return Err(Code::of(CUresult::CUDA_ERROR_NOT_FOUND)),
        };
        let handle = state.handle();
        state.kernels.functions.insert(handle, (kernel, module));
        // SAFETY: of the caller.
        unsafe { put(made, handle as CUfunction) }
    }
    fn cuLaunchKernel(
        function: CUfunction, blocks_x: c_uint, blocks_y: c_uint, blocks_z: c_uint, threads_x: c_uint,
        threads_y: c_uint, threads_z: c_uint, _shared_bytes: c_uint, stream: CUstream,
        arguments: *mut *mut c_void, _extra: *mut *mut c_void
    ) {
        let mut state = state();
        let device = state.current()?;
        let known = state.kernels.functions.get(&(function as usize)).copied();
        let (kernel, module) = known.ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_HANDLE))?;
        // The kernels have one dimension, and count on their threads.
        let is_flat = [blocks_y, blocks_z, threads_y, threads_z] == [1; 4];
        if !is_flat || blocks_x == 0 || threads_x != 256 || arguments.is_null() {
            return Err(INVALID_VALUE);
        }
        let stream = state.stream(stream as usize)?;
        if stream.device != device {
            return Err(Code::of(CUresult::CUDA_ERROR_INVALID_HANDLE));
        }
        // SAFETY: of the caller: as many as the kernel has, of its kinds.
        let (table, count, sums) = unsafe {
            let table = (*arguments).cast::<u64>().read();
            let count = (*arguments.add(1)).cast::<u32>().read();
            let sums = if kernel == Kernel::Checksums { (*arguments.add(2)).cast::<u64>().read() } else { 0 };
            (table, count as usize, sums)
        };
        let launch = state.launch((kernel, module), device, table, count, sums);
        let mut launch = launch.unwrap_or_else(|_| Launch {
            kernel, module, table: End::Host(0), words: Vec::new(), moves: Vec::new(), fault: Some(ILLEGAL_ADDRESS),
        });
        if let Some((left, code)) = &mut state.kernels.fails {
            *left -= 1;
            if *left == 0 {
                launch.fault = Some(Code(*code));
                state.kernels.fails = None;
            }
        }
        stream.push(Work::Launch(Arc::new(launch)));
        Ok(())
    }
    fn cuMemHostGetDevicePointer_v2(address: *mut CUdeviceptr, host: *mut c_void, flags: c_uint) {
        let state = state();
        state.current()?;
        let start = host.addr();
        if flags != 0 || !state.kernels.reachable.contains(&start) {
            return Err(INVALID_VALUE);
        }
        let base = if state.kernels.has_host_addresses { 0 } else { HOST_ADDRESSES };
        // SAFETY: of the caller.
        unsafe { put(address, base + start as u64) }
    }
}

/// Whether a launch touches this memory, on either side.
pub(crate) fn touches_device(launch: &Launch, memory: &Arc<Mapping>) -> bool {
    launch.ends().any(|(end, _)| matches!(end, End::Device(mapping, _) if Arc::ptr_eq(mapping, memory)))
}
