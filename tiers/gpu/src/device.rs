//! A device in use: its primary context, whether it is lost, and what is kept when it is.
//!
//! The driver wants the context current in the thread that calls: `Inner::enter` makes it so for as long as its
//! guard lives, and leaves the thread as it was.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use cudarc::driver::sys::{CUcontext, CUdevice, CUdevice_attribute, CUresult};

use crate::Error;
use crate::driver::{Driver, Facts};
use crate::sys::{CudaError, Entries};

/// A device in use. Cheap to clone; its context ends with the last of its clones, of its memory and of its streams.
#[derive(Clone)]
pub struct Device {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    driver: Driver,
    device: CUdevice,
    context: CUcontext,
    facts: Facts,
    /// Whether it knows registered host memory by the processor's address (not so under WSL 2).
    pub(crate) has_host_addresses: bool,
    lost: OnceLock<(&'static str, CudaError)>,
    /// What the device may still be using. Nothing in it holds the device, or it would never end.
    kept: Mutex<Vec<Box<dyn Any + Send>>>,
}

// SAFETY: the context is a name for the driver, which takes it from any thread; the rest is shareable by itself.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// The device's context is current in this thread as long as this lives.
pub(crate) struct Current<'device> {
    inner: &'device Inner,
    _this_thread: PhantomData<*const ()>,
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let mut popped = ptr::null_mut();
        // SAFETY: a place to write to. What was pushed last is what `enter` pushed: guards of one thread end in the
        // reverse order, and nobody else in this crate pushes.
        let _ = unsafe { (self.inner.entries().cuCtxPopCurrent_v2)(&mut popped) };
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is in them is changed by code that does not panic half way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Driver {
    /// Takes a device into use.
    pub fn open(&self, ordinal: u32) -> Result<Device, Error> {
        let failed = |call| move |source| Error::Cuda { device: ordinal, call, source };
        let (device, facts) = self.facts(ordinal).map_err(failed("cuDeviceGet"))?;
        let mut context = ptr::null_mut();
        // SAFETY: a place to write to.
        let code = unsafe { (self.calls.entries.cuDevicePrimaryCtxRetain)(&mut context, device) };
        self.calls.check(code).map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let mut inner = Inner {
            driver: *self,
            device,
            context,
            facts,
            has_host_addresses: false,
            lost: OnceLock::new(),
            kept: Mutex::default(),
        };
        // One that does not say is asked for its own addresses, which may be the same.
        inner.has_host_addresses = inner
            .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM)
            .is_ok_and(|has| has != 0);
        let inner = Arc::new(inner);
        self.calls.registry.add(&inner);
        Ok(Device { inner })
    }
}

impl Device {
    /// What it is.
    pub fn facts(&self) -> &Facts {
        &self.inner.facts
    }

    /// Its driver.
    pub fn driver(&self) -> Driver {
        self.inner.driver
    }

    /// What it said when it was lost.
    pub fn lost(&self) -> Option<CudaError> {
        self.inner.lost.get().map(|(_, error)| *error)
    }

    /// What is wrong with something of another device.
    pub(crate) fn is_same(&self, other: &Self) -> Result<(), Error> {
        if Arc::ptr_eq(&self.inner, &other.inner) {
            return Ok(());
        }
        Err(Error::OtherDevice { device: self.inner.ordinal(), wanted: other.facts().uuid })
    }

    /// The error that every call gives, once it is lost.
    pub(crate) fn is_there(&self) -> Result<(), Error> {
        let lost = self.inner.lost.get();
        lost.map_or(Ok(()), |(call, source)| {
            Err(Error::Lost { device: self.inner.ordinal(), call, source: *source })
        })
    }

    /// Bytes of its memory that nobody has, in any process.
    pub fn free_bytes(&self) -> Result<u64, Error> {
        let _current = self.inner.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: places to write to.
        let code = unsafe { (self.inner.entries().cuMemGetInfo_v2)(&mut free, &mut total) };
        self.inner.check("cuMemGetInfo", code)?;
        Ok(free as u64)
    }

    /// Asks it something that has to do with no copy and always works. If that fails too, it is lost.
    pub(crate) fn is_well(&self) -> Result<(), Error> {
        match self.free_bytes() {
            Err(Error::Cuda { call, source, .. }) => Err(self.inner.lose(call, source)),
            answer => answer.map(drop),
        }
    }

    /// Whether it can read and write the other's memory by itself, over NVLink or PCIe.
    pub fn can_reach(&self, other: &Self) -> Result<bool, Error> {
        let mut can = 0;
        // SAFETY: a place to write to.
        let code = unsafe {
            (self.inner.entries().cuDeviceCanAccessPeer)(&mut can, self.inner.device, other.inner.device)
        };
        self.inner.check("cuDeviceCanAccessPeer", code)?;
        Ok(can != 0)
    }

    /// Lets it read and write the other's memory by itself; the other way is asked for by itself. Copies between
    /// devices work without, over host memory. Of memory that is mapped in pieces, see
    /// [`crate::DeviceMemory::open_to`].
    pub fn reach(&self, other: &Self) -> Result<(), Error> {
        let _current = self.inner.enter()?;
        // SAFETY: the other's context, which `other` keeps.
        let code = unsafe { (self.inner.entries().cuCtxEnablePeerAccess)(other.inner.context, 0) };
        if code == CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED as u32 {
            return Ok(());
        }
        self.inner.check("cuCtxEnablePeerAccess", code)
    }

    /// Memory operations that are kept because the device never said that it was done with them.
    pub fn kept(&self) -> usize {
        lock(&self.inner.kept).len()
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "GPU {} ({})", self.inner.facts.ordinal, self.inner.facts.uuid)
    }
}

impl Inner {
    pub(crate) fn ordinal(&self) -> u32 {
        self.facts.ordinal
    }

    pub(crate) fn driver(&self) -> &Driver {
        &self.driver
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.get().is_some()
    }

    pub(crate) fn entries(&self) -> &'static Entries {
        &self.driver.calls.entries
    }

    /// Makes the context current. A lost device is not asked again.
    pub(crate) fn enter(&self) -> Result<Current<'_>, Error> {
        if let Some((call, source)) = self.lost.get() {
            return Err(Error::Lost { device: self.ordinal(), call, source: *source });
        }
        // SAFETY: the context is retained as long as `self` lives.
        let code = unsafe { (self.entries().cuCtxPushCurrent_v2)(self.context) };
        self.check("cuCtxPushCurrent", code)?;
        Ok(Current { inner: self, _this_thread: PhantomData })
    }

    /// A number that the driver knows of the device.
    pub(crate) fn attribute(&self, which: CUdevice_attribute) -> Result<i32, Error> {
        let mut value = 0;
        // SAFETY: a place to write to.
        let code = unsafe { (self.entries().cuDeviceGetAttribute)(&mut value, which as u32, self.device) };
        self.check("cuDeviceGetAttribute", code).map(|()| value)
    }

    /// What a call answered.
    pub(crate) fn check(&self, call: &'static str, code: u32) -> Result<(), Error> {
        let device = self.ordinal();
        match self.driver.calls.check(code) {
            Ok(()) => Ok(()),
            Err(source) if source.is_fatal() => Err(self.lose(call, source)),
            Err(source) => Err(Error::Cuda { device, call, source }),
        }
    }

    fn lose(&self, call: &'static str, source: CudaError) -> Error {
        let (call, source) = *self.lost.get_or_init(|| (call, source));
        Error::Lost { device: self.ordinal(), call, source }
    }

    /// Keeps what the device may still be using until its context is gone.
    pub(crate) fn keep(&self, used: Box<dyn Any + Send>) {
        lock(&self.kept).push(used);
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.is_lost() && self.driver.calls.registry.others_use_what_is_of(self) {
            // Its registrations would end with its context. So that stays, and what it may be using is never used again.
            std::mem::take(&mut *lock(&self.kept)).into_iter().for_each(std::mem::forget);
            return;
        }
        // Whoever still has registered memory goes on without the device. Somebody else in this process may hold the
        // context, so it is not left to the context's end.
        let registered = self.driver.calls.registry.take_all_of(self);
        if let Ok(_current) = self.enter() {
            for address in registered {
                let address = ptr::with_exposed_provenance_mut::<c_void>(address);
                // SAFETY: it was registered here and not unregistered since; no copy is under way, for copies hold
                // the device.
                let _ = unsafe { (self.entries().cuMemHostUnregister)(address) };
            }
        }
        // SAFETY: retained once, in `open`.
        let released = unsafe { (self.entries().cuDevicePrimaryCtxRelease_v2)(self.device) } == 0;
        let (mut flags, mut active) = (0, 1);
        // SAFETY: places to write to.
        let told =
            unsafe { (self.entries().cuDevicePrimaryCtxGetState)(self.device, &mut flags, &mut active) };
        if !(released && told == 0 && active == 0) {
            // The context may be there, and with it the device's use of this memory: it is never used again.
            std::mem::take(&mut *lock(&self.kept)).into_iter().for_each(std::mem::forget);
        }
    }
}
