//! The CUDA driver's library, found at run time: the entry points that we use, each looked up before the first is
//! called.
//!
//! The types are cudarc's, made from NVIDIA's headers. The table is ours, for three reasons. cudarc finds the library
//! by a list of names alone, and takes `libcuda.so` before `libcuda.so.1`: with a CUDA toolkit that can be the stub
//! for linkers, and a test could not name its own library. It panics when the library or a symbol is missing, where
//! we want to go on without a GPU. And its functions return a Rust enum, for which a number that a newer driver
//! invents would be undefined behaviour; ours return the number.
//!
//! A name with its suffix (`cuMemFree_v2`) means one signature for ever, so the symbol table answers what there is.
//! The one function that changed under its own name is the batched copy: 12.8 has `cuMemcpyBatchAsync` with an
//! argument that `cuMemcpyBatchAsync_v2` of 13.0 dropped. Where the table lacks the one that the driver's version
//! promises, `cuGetProcAddress` is asked, which knows both by one name and a version.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::fmt;

use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUipcEventHandle, CUipcMemHandle,
    CUmemAccessDesc, CUmemAllocationGranularity_flags, CUmemAllocationHandleType, CUmemAllocationProp,
    CUmemGenericAllocationHandle, CUmemcpyAttributes, CUmodule, CUresult, CUstream, CUuuid,
};

use crate::memory::Registry;

/// An error of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CudaError {
    /// Its number.
    pub code: u32,
    /// Its name, by the driver.
    pub name: &'static str,
}

impl fmt::Display for CudaError {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{} ({})", self.name, self.code)
    }
}

impl std::error::Error for CudaError {}

impl CudaError {
    pub(crate) fn is(&self, result: CUresult) -> bool {
        self.code == result as u32
    }

    /// Whether the context is done for: from now on every call in it answers so, as NVIDIA's headers say.
    /// `CUDA_ERROR_UNKNOWN` is not taken for it: some drivers say that of a handle that is nonsense, and a worker that
    /// sends one must not cost the device. Where it is all that a device says for long, the copier asks it something
    /// that always works.
    pub(crate) fn is_fatal(&self) -> bool {
        [
            CUresult::CUDA_ERROR_DEINITIALIZED,
            CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE,
            CUresult::CUDA_ERROR_ECC_UNCORRECTABLE,
            CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE,
            CUresult::CUDA_ERROR_CONTAINED,
            CUresult::CUDA_ERROR_ASSERT,
            CUresult::CUDA_ERROR_TENSOR_MEMORY_LEAK,
            CUresult::CUDA_ERROR_MPS_RPC_FAILURE,
            CUresult::CUDA_ERROR_MPS_CLIENT_TERMINATED,
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            CUresult::CUDA_ERROR_LAUNCH_TIMEOUT,
            CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED,
            CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR,
            CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION,
            CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
            CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE,
            CUresult::CUDA_ERROR_INVALID_PC,
            CUresult::CUDA_ERROR_LAUNCH_FAILED,
            CUresult::CUDA_ERROR_EXTERNAL_DEVICE,
        ]
        .into_iter()
        .any(|fatal| self.is(fatal))
    }
}

macro_rules! entries {
    ($($name:ident: ($($argument:ty),*),)*) => {
        /// The entry points without which there is no GPU tier.
        #[expect(non_snake_case, reason = "the driver's names")]
        pub(crate) struct Entries {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> c_uint,)*
            /// These two with numbers in place of cudarc's enums.
            pub(crate) cuDeviceGetAttribute: unsafe extern "C" fn(*mut c_int, c_uint, CUdevice) -> c_uint,
            pub(crate) cuGetErrorName: unsafe extern "C" fn(c_uint, *mut *const c_char) -> c_uint,
        }

        impl Entries {
            /// All of their names.
            pub(crate) const NAMES: &[&str] =
                &[$(stringify!($name),)* "cuDeviceGetAttribute", "cuGetErrorName"];

            /// All, or the name of the first that is missing.
            fn find(loaded: &'static libloading::Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $($name: find(loaded, stringify!($name)).ok_or(stringify!($name))?,)*
                    cuDeviceGetAttribute: find(loaded, "cuDeviceGetAttribute").ok_or("cuDeviceGetAttribute")?,
                    cuGetErrorName: find(loaded, "cuGetErrorName").ok_or("cuGetErrorName")?,
                })
            }
        }

        // The arguments are those of NVIDIA's headers, as cudarc has them.
        $(const _: unsafe fn($($argument),*) -> CUresult = sys::$name;)*
    };
}

entries! {
    cuInit: (c_uint),
    cuDriverGetVersion: (*mut c_int),
    cuDeviceGetCount: (*mut c_int),
    cuDeviceGet: (*mut CUdevice, c_int),
    cuDeviceGetName: (*mut c_char, c_int, CUdevice),
    cuDeviceTotalMem_v2: (*mut usize, CUdevice),
    cuDeviceGetUuid_v2: (*mut CUuuid, CUdevice),
    cuDeviceGetPCIBusId: (*mut c_char, c_int, CUdevice),
    cuDeviceCanAccessPeer: (*mut c_int, CUdevice, CUdevice),
    cuDevicePrimaryCtxRetain: (*mut CUcontext, CUdevice),
    cuDevicePrimaryCtxRelease_v2: (CUdevice),
    cuDevicePrimaryCtxGetState: (CUdevice, *mut c_uint, *mut c_int),
    cuCtxPushCurrent_v2: (CUcontext),
    cuCtxPopCurrent_v2: (*mut CUcontext),
    cuCtxEnablePeerAccess: (CUcontext, c_uint),
    cuCtxGetStreamPriorityRange: (*mut c_int, *mut c_int),
    cuMemGetInfo_v2: (*mut usize, *mut usize),
    cuMemAlloc_v2: (*mut CUdeviceptr, usize),
    cuMemFree_v2: (CUdeviceptr),
    cuMemGetAddressRange_v2: (*mut CUdeviceptr, *mut usize, CUdeviceptr),
    cuMemGetAllocationGranularity:
        (*mut usize, *const CUmemAllocationProp, CUmemAllocationGranularity_flags),
    cuMemCreate: (*mut CUmemGenericAllocationHandle, usize, *const CUmemAllocationProp, c_ulonglong),
    cuMemRelease: (CUmemGenericAllocationHandle),
    cuMemExportToShareableHandle:
        (*mut c_void, CUmemGenericAllocationHandle, CUmemAllocationHandleType, c_ulonglong),
    cuMemImportFromShareableHandle:
        (*mut CUmemGenericAllocationHandle, *mut c_void, CUmemAllocationHandleType),
    cuMemAddressReserve: (*mut CUdeviceptr, usize, usize, CUdeviceptr, c_ulonglong),
    cuMemAddressFree: (CUdeviceptr, usize),
    cuMemMap: (CUdeviceptr, usize, usize, CUmemGenericAllocationHandle, c_ulonglong),
    cuMemUnmap: (CUdeviceptr, usize),
    cuMemSetAccess: (CUdeviceptr, usize, *const CUmemAccessDesc, usize),
    cuMemHostRegister_v2: (*mut c_void, usize, c_uint),
    cuMemHostUnregister: (*mut c_void),
    cuMemcpyHtoDAsync_v2: (CUdeviceptr, *const c_void, usize, CUstream),
    cuMemcpyDtoHAsync_v2: (*mut c_void, CUdeviceptr, usize, CUstream),
    cuMemcpyDtoDAsync_v2: (CUdeviceptr, CUdeviceptr, usize, CUstream),
    cuStreamCreateWithPriority: (*mut CUstream, c_uint, c_int),
    cuStreamDestroy_v2: (CUstream),
    cuStreamQuery: (CUstream),
    cuStreamWaitEvent: (CUstream, CUevent, c_uint),
    cuEventCreate: (*mut CUevent, c_uint),
    cuEventDestroy_v2: (CUevent),
    cuEventRecord: (CUevent, CUstream),
    cuEventQuery: (CUevent),
    cuIpcGetMemHandle: (*mut CUipcMemHandle, CUdeviceptr),
    cuIpcOpenMemHandle_v2: (*mut CUdeviceptr, CUipcMemHandle, c_uint),
    cuIpcCloseMemHandle: (CUdeviceptr),
    cuIpcGetEventHandle: (*mut CUipcEventHandle, CUevent),
    cuIpcOpenEventHandle: (*mut CUevent, CUipcEventHandle),
}

macro_rules! optional {
    ($($name:ident: ($($argument:ty),*),)*) => {
        /// Entry points that some drivers lack; what wants one says so when it is missing. Enums of the headers are
        /// numbers here.
        #[expect(non_snake_case, reason = "the driver's names")]
        pub(crate) struct Optional {
            $(pub(crate) $name: Option<unsafe extern "C" fn($($argument),*) -> c_uint>,)*
        }

        impl Optional {
            fn find(loaded: &'static libloading::Library) -> Self {
                Self { $($name: find(loaded, stringify!($name)),)* }
            }
        }
    };
}

optional! {
    cuDeviceGetP2PAttribute: (*mut c_int, c_uint, CUdevice, CUdevice),
    cuPointerGetAttribute: (*mut c_void, c_uint, CUdeviceptr),
    cuMemRetainAllocationHandle: (*mut CUmemGenericAllocationHandle, *mut c_void),
    cuMemGetAllocationPropertiesFromHandle: (*mut Properties, CUmemGenericAllocationHandle),
}

/// `CUmemAllocationProp` as the driver writes it: with numbers, for an enum must not hold one that it lacks.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Properties {
    pub(crate) kind: c_uint,
    pub(crate) handle_types: c_uint,
    pub(crate) location: c_uint,
    pub(crate) location_id: c_int,
    pub(crate) meta_data: usize,
    pub(crate) flags: [u8; 8],
}
const _: () = {
    assert!(size_of::<Properties>() == size_of::<CUmemAllocationProp>());
    assert!(
        std::mem::offset_of!(Properties, location) == std::mem::offset_of!(CUmemAllocationProp, location)
    );
    assert!(std::mem::offset_of!(Properties, flags) == std::mem::offset_of!(CUmemAllocationProp, allocFlags));
};

type BatchV2 = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    CUstream,
) -> c_uint;
const _: unsafe fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    CUstream,
) -> CUresult = sys::cuMemcpyBatchAsync_v2;

/// Of CUDA 12.8: the argument before the stream is where the index of what failed goes.
type BatchV1 = unsafe extern "C" fn(
    *mut CUdeviceptr,
    *mut CUdeviceptr,
    *mut usize,
    usize,
    *mut CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    CUstream,
) -> c_uint;

type GetProcAddress =
    unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut c_uint) -> c_uint;

/// The batched copy, in the form that the driver has.
#[derive(Clone, Copy)]
pub(crate) enum Batch {
    V2(BatchV2),
    V1(BatchV1),
    None,
}

/// The first version with the batched copy, and the one that changed it.
const BATCH_V1: i32 = 12080;
const BATCH_V2: i32 = 13000;

fn find<F: Copy>(loaded: &'static libloading::Library, name: &str) -> Option<F> {
    // SAFETY: used below alone, with the types of NVIDIA's headers for these names; the library is never unloaded, so
    // the function stays.
    unsafe { loaded.get::<F>(name) }.ok().map(|symbol| *symbol)
}

impl Batch {
    fn find(loaded: &'static libloading::Library, version: i32) -> Self {
        if version >= BATCH_V2 {
            let function = find(loaded, "cuMemcpyBatchAsync_v2").or_else(|| {
                let address = proc_address(loaded, c"cuMemcpyBatchAsync", BATCH_V2)?;
                // SAFETY: for this name and version the driver gives the function of this signature.
                Some(unsafe { std::mem::transmute::<*mut c_void, BatchV2>(address) })
            });
            if let Some(function) = function {
                return Self::V2(function);
            }
        }
        if version >= BATCH_V1 {
            let function = find(loaded, "cuMemcpyBatchAsync").or_else(|| {
                let address = proc_address(loaded, c"cuMemcpyBatchAsync", BATCH_V1)?;
                // SAFETY: as above.
                Some(unsafe { std::mem::transmute::<*mut c_void, BatchV1>(address) })
            });
            if let Some(function) = function {
                return Self::V1(function);
            }
        }
        Self::None
    }
}

/// What the driver has under a name since a version; never null.
fn proc_address(loaded: &'static libloading::Library, name: &CStr, version: i32) -> Option<*mut c_void> {
    let ask: GetProcAddress = find(loaded, "cuGetProcAddress_v2")?;
    let (mut address, mut status) = (std::ptr::null_mut(), 0);
    // SAFETY: places to write to, and a name that ends with a zero.
    let code = unsafe { ask(name.as_ptr(), &mut address, version, 0, &mut status) };
    (code == 0 && status == 0 && !address.is_null()).then_some(address)
}

// ---- kernels

macro_rules! optional_entries {
    ($(#[$about:meta])* struct $table:ident { $($name:ident: ($($argument:ty),*),)* }) => {
        $(#[$about])*
        #[expect(non_snake_case, reason = "the driver's names")]
        pub(crate) struct $table {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> c_uint,)*
        }

        impl $table {
            /// All, or the name of the first that is missing.
            fn find(loaded: &'static libloading::Library) -> Result<Self, &'static str> {
                Ok(Self { $($name: find(loaded, stringify!($name)).ok_or(stringify!($name))?,)* })
            }
        }

        // The arguments are those of NVIDIA's headers, as cudarc has them.
        $(const _: unsafe fn($($argument),*) -> CUresult = sys::$name;)*
    };
}

optional_entries! {
    /// What kernels need. Without it, everything is copied by the driver's own means.
    struct KernelEntries {
        cuModuleLoadData: (*mut CUmodule, *const c_void),
        cuModuleUnload: (CUmodule),
        cuModuleGetFunction: (*mut CUfunction, CUmodule, *const c_char),
        cuLaunchKernel: (
            CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void,
            *mut *mut c_void
        ),
        cuMemHostGetDevicePointer_v2: (*mut CUdeviceptr, *mut c_void, c_uint),
    }
}

/// The library and what it has.
pub(crate) struct Library {
    pub(crate) entries: Entries,
    pub(crate) optional: Optional,
    pub(crate) batch: Batch,
    /// Or what of it is missing.
    pub(crate) kernels: Result<KernelEntries, &'static str>,
    pub(crate) version: i32,
    /// Registered host memory: the driver counts it by process, not by device.
    pub(crate) registry: Registry,
}

/// Why a library is none.
pub(crate) enum NoLibrary {
    Load(String),
    Symbol(&'static str),
    Version(CudaError),
}

/// What the loader says is the cause of what libloading says.
fn why(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

impl Library {
    /// Never unloaded: a driver has threads and state of its own, which an unload would pull the code from under.
    pub(crate) fn load(path: &std::ffi::OsStr) -> Result<&'static Self, NoLibrary> {
        // SAFETY: a driver's initialisers touch nothing of ours.
        let loaded = unsafe { libloading::Library::new(path) };
        let loaded = loaded.map_err(|error| NoLibrary::Load(why(&error)))?;
        let loaded: &'static libloading::Library = Box::leak(Box::new(loaded));
        let entries = Entries::find(loaded).map_err(NoLibrary::Symbol)?;
        let mut version = 0;
        // SAFETY: a place to write to. It may be asked before the driver is initialised.
        let code = unsafe { (entries.cuDriverGetVersion)(&mut version) };
        let batch = Batch::find(loaded, version);
        let optional = Optional::find(loaded);
        let kernels = KernelEntries::find(loaded);
        let library = Self { entries, optional, batch, kernels, version, registry: Registry::default() };
        if code != 0 {
            return Err(NoLibrary::Version(library.error(code)));
        }
        Ok(Box::leak(Box::new(library)))
    }

    pub(crate) fn error(&self, code: u32) -> CudaError {
        let mut name = std::ptr::null();
        // SAFETY: a place to write to; what is not null is a string of the library, which stays.
        let name = unsafe {
            let known = (self.entries.cuGetErrorName)(code, &mut name) == 0 && !name.is_null();
            known.then(|| CStr::from_ptr::<'static>(name))
        };
        let name = name.and_then(|name| name.to_str().ok()).unwrap_or("an error without a name");
        CudaError { code, name }
    }

    pub(crate) fn check(&self, code: u32) -> Result<(), CudaError> {
        if code == 0 { Ok(()) } else { Err(self.error(code)) }
    }
}
