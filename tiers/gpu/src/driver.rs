//! Whether this machine has a CUDA driver that can be used, why not, and which devices it has.

use std::ffi::{OsStr, c_char};
use std::fmt;

use cudarc::driver::sys::{CUdevice, CUdevice_P2PAttribute, CUdevice_attribute, CUresult, CUuuid};

use crate::sys::{Batch, CudaError, Entries, Library, NoLibrary};

/// The name under which every driver installs itself. `libcuda.so` alone may be a toolkit's stub.
pub const LIBRARY: &str = "libcuda.so.1";

/// The oldest driver that has all we use: `cuDeviceGetUuid_v2` came last.
const VERSION_MIN: Version = Version(11040);

/// A version, as CUDA counts them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version(i32);

impl fmt::Display for Version {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// Why there is no GPU to use. None of it is an error of ours: the node goes on without.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Absent {
    /// There is no driver's library. In a container: its runtime must pass the GPUs on (`--gpus all`, or
    /// `NVIDIA_DRIVER_CAPABILITIES=compute`).
    #[error("no CUDA driver: {why}")]
    NoLibrary {
        /// In the loader's words.
        why: String,
    },
    /// The library lacks a function.
    #[error("the CUDA driver {library} lacks {symbol}; {VERSION_MIN} or newer is needed")]
    NoSymbol {
        /// Which library.
        library: String,
        /// Which function.
        symbol: &'static str,
    },
    /// The driver is too old.
    #[error("the CUDA driver is for CUDA {version}; {VERSION_MIN} or newer is needed")]
    TooOld {
        /// What it is for.
        version: Version,
    },
    /// The driver does not start. `CUDA_ERROR_SYSTEM_NOT_READY`: the fabric manager has not started;
    /// `CUDA_ERROR_SYSTEM_DRIVER_MISMATCH`: library and kernel module are of different versions;
    /// `CUDA_ERROR_STUB_LIBRARY`: it is a toolkit's stub; `CUDA_ERROR_UNKNOWN`: often no access to `/dev/nvidia*`.
    #[error("the CUDA driver does not start: {error}")]
    Refuses {
        /// What it says.
        error: CudaError,
    },
    /// The driver is there, and no device.
    #[error("the CUDA driver has no device (none is installed, or CUDA_VISIBLE_DEVICES hides them)")]
    NoDevice,
}

/// A device's name for ever, as `nvidia-smi -L` has it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("GPU")?;
        for (at, byte) in self.0.iter().enumerate() {
            let dash = if [0, 4, 6, 8, 10].contains(&at) { "-" } else { "" };
            write!(to, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, to)
    }
}

/// What a device is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// Its number in this process; `CUDA_VISIBLE_DEVICES` changes it.
    pub ordinal: u32,
    /// What it is called.
    pub name: String,
    /// Which one it is, in every process.
    pub uuid: Uuid,
    /// Where it is: domain, bus, device, function, as sysfs has it.
    pub pci: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// Compute capability, such as 9.0.
    pub capability: (u32, u32),
    /// Copies that it does at once beside kernels.
    pub copy_engines: u32,
    /// Whether events can be handed to other processes.
    pub has_shared_events: bool,
    /// Whether its memory can be handed to processes of other machines by fabric handle. The machine may still lack
    /// what that wants (an IMEX channel): making such memory tells.
    pub has_fabric: bool,
}

/// How one device gets at another's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reach {
    /// By itself, over NVLink or PCIe; else copies go over host memory.
    pub is_direct: bool,
    /// Whether atomic operations work across. `None`: the driver does not say.
    pub has_atomics: Option<bool>,
    /// How the driver ranks the link; a lower number is a better one. `None`: it does not say.
    pub rank: Option<u32>,
}

/// The CUDA driver of this machine. Cheap to copy.
///
/// A process that loaded it must not fork and go on in the child: the driver does not survive that.
#[derive(Clone, Copy)]
pub struct Driver {
    pub(crate) calls: &'static Library,
}

impl fmt::Debug for Driver {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "CUDA driver {}", self.version())
    }
}

impl Driver {
    /// The machine's driver, started. Call it once: what it loads is never unloaded.
    ///
    /// The driver reads the environment once, when it starts. By default a process has eight connections to a device,
    /// and streams that share one wait for each other, whatever their priority; a [`crate::Copier`] has eight by default,
    /// a [`crate::Pool`] two, and others come to that. So a program should set `CUDA_DEVICE_MAX_CONNECTIONS` to 32, the
    /// most there may be, before this, while it has one thread.
    pub fn load() -> Result<Self, Absent> {
        Self::load_from(OsStr::new(LIBRARY))
    }

    /// The driver in this library, by its path or by a name for the loader.
    pub fn load_from(path: &OsStr) -> Result<Self, Absent> {
        let library = Library::load(path).map_err(|no_library| match no_library {
            NoLibrary::Load(why) => Absent::NoLibrary { why },
            NoLibrary::Symbol(symbol) => Absent::NoSymbol { library: path.display().to_string(), symbol },
            NoLibrary::Version(error) => Absent::Refuses { error },
        })?;
        let driver = Self { calls: library };
        if driver.version() < VERSION_MIN {
            return Err(Absent::TooOld { version: driver.version() });
        }
        let refuses = |error: CudaError| match error.is(CUresult::CUDA_ERROR_NO_DEVICE) {
            true => Absent::NoDevice,
            false => Absent::Refuses { error },
        };
        // SAFETY: no arguments that matter.
        library.check(unsafe { (library.entries.cuInit)(0) }).map_err(refuses)?;
        match driver.device_count().map_err(refuses)? {
            0 => Err(Absent::NoDevice),
            _ => Ok(driver),
        }
    }

    /// Functions that a library must have to be taken.
    pub fn symbols() -> &'static [&'static str] {
        Entries::NAMES
    }

    /// Which CUDA it is for.
    pub fn version(&self) -> Version {
        Version(self.calls.version)
    }

    /// Whether many pages go in one call.
    pub fn has_batched_copies(&self) -> bool {
        !matches!(self.calls.batch, Batch::None)
    }

    fn device_count(&self) -> Result<u32, CudaError> {
        let mut count = 0;
        // SAFETY: a place to write to.
        self.calls.check(unsafe { (self.calls.entries.cuDeviceGetCount)(&mut count) })?;
        Ok(count.max(0) as u32)
    }

    /// What devices there are. A device that does not answer is an error of all: its number would be another's.
    pub fn devices(&self) -> Result<Vec<Facts>, CudaError> {
        (0..self.device_count()?).map(|ordinal| Ok(self.facts(ordinal)?.1)).collect()
    }

    pub(crate) fn facts(&self, ordinal: u32) -> Result<(CUdevice, Facts), CudaError> {
        let (library, entries) = (self.calls, &self.calls.entries);
        let mut device = 0;
        // SAFETY: a place to write to, here and below; a text is cut to the room that is given.
        library.check(unsafe { (entries.cuDeviceGet)(&mut device, ordinal as i32) })?;
        let text = |ask: unsafe extern "C" fn(*mut c_char, i32, CUdevice) -> u32| {
            let mut room = [0_u8; 256];
            // SAFETY: as above; the last byte is not given away, so the text ends.
            library.check(unsafe { ask(room.as_mut_ptr().cast(), room.len() as i32 - 1, device) })?;
            let text = room.split(|byte| *byte == 0).next().unwrap_or_default();
            Ok(String::from_utf8_lossy(text).into_owned())
        };
        let attribute = |which: CUdevice_attribute| {
            let mut value = 0;
            // SAFETY: as above.
            library.check(unsafe { (entries.cuDeviceGetAttribute)(&mut value, which as u32, device) })?;
            Ok(value.max(0) as u32)
        };
        let mut memory_bytes = 0;
        // SAFETY: as above.
        library.check(unsafe { (entries.cuDeviceTotalMem_v2)(&mut memory_bytes, device) })?;
        let mut uuid = CUuuid { bytes: [0; 16] };
        // SAFETY: as above.
        library.check(unsafe { (entries.cuDeviceGetUuid_v2)(&mut uuid, device) })?;
        let facts = Facts {
            ordinal,
            name: text(entries.cuDeviceGetName)?,
            uuid: Uuid(uuid.bytes.map(|byte| byte as u8)),
            pci: text(entries.cuDeviceGetPCIBusId)?.to_ascii_lowercase(),
            memory_bytes: memory_bytes as u64,
            capability: (
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            copy_engines: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT)?,
            // Drivers before CUDA 12.0 do not know the question, and have such events on Linux.
            has_shared_events: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED)
                != Ok(0),
            // Drivers before CUDA 12.3 do not know the question.
            has_fabric: attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED)
                .is_ok_and(|supported| supported != 0),
        };
        Ok((device, facts))
    }

    /// How device `from` gets at the memory of device `to`. No context is made for it.
    pub fn reach(&self, from: u32, to: u32) -> Result<Reach, CudaError> {
        let (library, entries) = (self.calls, &self.calls.entries);
        let device = |ordinal: u32| {
            let mut device = 0;
            // SAFETY: a place to write to, here and below.
            library.check(unsafe { (entries.cuDeviceGet)(&mut device, ordinal as i32) }).map(|()| device)
        };
        let (from, to) = (device(from)?, device(to)?);
        let mut can = 0;
        // SAFETY: as above.
        library.check(unsafe { (entries.cuDeviceCanAccessPeer)(&mut can, from, to) })?;
        let attribute = |which: CUdevice_P2PAttribute| {
            let mut value = 0;
            let ask = library.optional.cuDeviceGetP2PAttribute?;
            // SAFETY: as above.
            library.check(unsafe { ask(&mut value, which as u32, from, to) }).ok()?;
            Some(value.max(0) as u32)
        };
        let atomics = attribute(CUdevice_P2PAttribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED);
        Ok(Reach {
            is_direct: can != 0,
            has_atomics: atomics.map(|supported| supported != 0),
            rank: attribute(CUdevice_P2PAttribute::CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK),
        })
    }
}
