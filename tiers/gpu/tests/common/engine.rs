//! Memory as an engine has it: made by calls of the driver that are not ours, under the same primary context.

use std::ffi::{c_int, c_void};
use std::path::Path;

use libloading::Library;

/// A page of a device for `cuMemCreate`.
pub(crate) const PAGE: usize = 2 << 20;

/// How memory can be shared, as `CUmemAllocationHandleType` has it.
pub(crate) const NOT: u32 = 0;
pub(crate) const BY_DESCRIPTOR: u32 = 1;
pub(crate) const BY_FABRIC: u32 = 8;

/// The part of an engine that has memory.
pub(crate) struct Engine {
    cuda: Library,
    device: c_int,
    context: *mut c_void,
}

/// Memory at addresses in a row, as PyTorch's expandable segments make it.
pub(crate) struct Segment {
    pub(crate) address: u64,
    reserved: usize,
    mapped: Vec<(u64, usize)>,
}

/// `CUmemAllocationProp` and `CUmemAccessDesc`, as far as they are used.
#[repr(C)]
struct Properties(u32, u32, u32, c_int, usize, [u8; 8]);
#[repr(C)]
struct Access(u32, c_int, u32);

impl Engine {
    pub(crate) fn new(cuda: &super::Cuda, device: c_int) -> Self {
        let path = cuda.fake.as_ref().map_or(Path::new("libcuda.so.1"), super::Fake::path);
        // SAFETY: the driver that is loaded already.
        let library = unsafe { Library::new(path) }.unwrap();
        let mut engine = Self { cuda: library, device, context: std::ptr::null_mut() };
        let mut context = std::ptr::null_mut();
        // SAFETY: of the headers; a place to write to.
        unsafe {
            type Retain = unsafe extern "C" fn(*mut *mut c_void, c_int) -> u32;
            assert_eq!(engine.find::<Retain>("cuDevicePrimaryCtxRetain")(&mut context, device), 0);
        }
        engine.context = context;
        engine
    }

    /// # Safety
    /// The signature is that of the headers.
    unsafe fn find<F: Copy>(&self, name: &str) -> F {
        // SAFETY: of the caller.
        *unsafe { self.cuda.get::<F>(name) }.unwrap()
    }

    fn in_context<T>(&self, work: impl FnOnce() -> T) -> T {
        let mut popped = std::ptr::null_mut();
        // SAFETY: of the headers; the context is retained.
        unsafe {
            let push = self.find::<unsafe extern "C" fn(*mut c_void) -> u32>("cuCtxPushCurrent_v2");
            let pop = self.find::<unsafe extern "C" fn(*mut *mut c_void) -> u32>("cuCtxPopCurrent_v2");
            assert_eq!(push(self.context), 0);
            let done = work();
            assert_eq!(pop(&mut popped), 0);
            done
        }
    }

    pub(crate) fn allocate(&self, bytes: usize) -> u64 {
        let mut address = 0;
        // SAFETY: of the headers; a place to write to.
        let code = self.in_context(|| unsafe {
            self.find::<unsafe extern "C" fn(*mut u64, usize) -> u32>("cuMemAlloc_v2")(&mut address, bytes)
        });
        assert_eq!(code, 0);
        address
    }

    pub(crate) fn free(&self, address: u64) {
        // SAFETY: of the headers; allocated here.
        let code = self
            .in_context(|| unsafe { self.find::<unsafe extern "C" fn(u64) -> u32>("cuMemFree_v2")(address) });
        assert_eq!(code, 0);
    }

    /// Pieces of so many pages, mapped in a row; a piece without a page is a hole of one.
    pub(crate) fn segment(&self, pages: &[usize], kinds: u32) -> Segment {
        type Create = unsafe extern "C" fn(*mut u64, usize, *const Properties, u64) -> u32;
        type Reserve = unsafe extern "C" fn(*mut u64, usize, usize, u64, u64) -> u32;
        type Map = unsafe extern "C" fn(u64, usize, usize, u64, u64) -> u32;
        type Allow = unsafe extern "C" fn(u64, usize, *const Access, usize) -> u32;
        let reserved = pages.iter().map(|pages| pages.max(&1) * PAGE).sum();
        let mut segment = Segment { address: 0, reserved, mapped: Vec::new() };
        // SAFETY: of the headers: places to write to, descriptions, and addresses that are reserved here.
        self.in_context(|| unsafe {
            let reserve = self.find::<Reserve>("cuMemAddressReserve");
            assert_eq!(reserve(&mut segment.address, reserved, 0, 0, 0), 0);
            let mut at = segment.address;
            for bytes in pages.iter().map(|pages| pages * PAGE) {
                if bytes == 0 {
                    at += PAGE as u64;
                    continue;
                }
                let properties = Properties(1, kinds, 1, self.device, 0, [0; 8]);
                let mut handle = 0;
                assert_eq!(self.find::<Create>("cuMemCreate")(&mut handle, bytes, &properties, 0), 0);
                assert_eq!(self.find::<Map>("cuMemMap")(at, bytes, 0, handle, 0), 0);
                assert_eq!(self.find::<unsafe extern "C" fn(u64) -> u32>("cuMemRelease")(handle), 0);
                let access = Access(1, self.device, 3);
                assert_eq!(self.find::<Allow>("cuMemSetAccess")(at, bytes, &access, 1), 0);
                segment.mapped.push((at, bytes));
                at += bytes as u64;
            }
        });
        segment
    }

    pub(crate) fn unmap(&self, segment: &Segment) {
        // SAFETY: of the headers; mapped and reserved in `segment`.
        self.in_context(|| unsafe {
            let unmap = self.find::<unsafe extern "C" fn(u64, usize) -> u32>("cuMemUnmap");
            segment.mapped.iter().for_each(|(at, bytes)| assert_eq!(unmap(*at, *bytes), 0));
            let free = self.find::<unsafe extern "C" fn(u64, usize) -> u32>("cuMemAddressFree");
            assert_eq!(free(segment.address, segment.reserved), 0);
        });
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: of the headers; retained once.
        unsafe {
            self.find::<unsafe extern "C" fn(c_int) -> u32>("cuDevicePrimaryCtxRelease_v2")(self.device)
        };
    }
}
