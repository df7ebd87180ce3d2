//! The driver that the tests run on: ours over host memory, or with `KVD_CUDA=real` the machine's.
#![expect(unsafe_code, reason = "a library is loaded, and its functions are called")]
#![allow(dead_code, reason = "each test file uses what it needs")]

pub(crate) mod engine;
pub(crate) mod other;

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kv_gpu::{Absent, Device, DeviceMemory, Driver, HostBuffer, PageCopy, Priority, Sink, Source, Stream};

/// Nothing here takes so long.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// A driver of a test's own.
pub(crate) struct Fake {
    _dir: tempfile::TempDir,
    path: PathBuf,
    control: libloading::Library,
}

impl Fake {
    /// Each is a copy: the loader takes a file for one library however often it is loaded, and tests that run beside
    /// each other want a driver each.
    ///
    /// `KVD_CUDA_WITHOUT` names symbols that all of these lack, with commas between them.
    pub(crate) fn new(settings: &str) -> Self {
        let missing = std::env::var("KVD_CUDA_WITHOUT").unwrap_or_default();
        let missing: Vec<_> = missing.split(',').filter(|symbol| !symbol.is_empty()).collect();
        Self::without(&missing, settings)
    }

    /// Lacks these symbols.
    pub(crate) fn without(symbols: &[&str], settings: &str) -> Self {
        let built = std::env::current_exe().unwrap().with_file_name("libfake_cuda.so");
        let mut library = std::fs::read(&built).expect("the fake driver lies beside the tests");
        library.truncate(loaded_bytes(&library));
        for symbol in symbols {
            // In the table of names, which comes first in the file, there is another name now, and the table of
            // hashes does not lead to it.
            let name = [b"\0", symbol.as_bytes(), b"\0"].concat();
            let at = find(&library, &name).unwrap_or_else(|| panic!("{symbol} is not in the fake driver"));
            library[at + 1] = b'!';
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libcuda.so.1");
        std::fs::write(&path, library).unwrap();
        // SAFETY: our own library, whose initialisers do nothing. It stays loaded while anything of it is used:
        // what the driver loads is never unloaded.
        let control = unsafe { libloading::Library::new(&path) }.unwrap();
        let fake = Self { _dir: dir, path, control };
        fake.set(settings);
        fake
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn driver(&self) -> Result<Driver, Absent> {
        Driver::load_from(self.path.as_os_str())
    }

    pub(crate) fn set(&self, settings: &str) {
        let text = CString::new(settings).unwrap();
        // SAFETY: the signature of the fake driver, and a string that ends with a zero.
        let code = unsafe {
            let set =
                self.control.get::<unsafe extern "C" fn(*const std::ffi::c_char) -> u32>("fake_cuda_set");
            set.unwrap()(text.as_ptr())
        };
        assert_eq!(code, 0, "{settings}");
    }

    pub(crate) fn count(&self, what: &str) -> u64 {
        let text = CString::new(what).unwrap();
        // SAFETY: as above.
        let count = unsafe {
            let count =
                self.control.get::<unsafe extern "C" fn(*const std::ffi::c_char) -> u64>("fake_cuda_count");
            count.unwrap()(text.as_ptr())
        };
        assert_ne!(count, u64::MAX, "{what}");
        count
    }

    /// Nothing is left of what was made, and no memory was given up under a copy.
    pub(crate) fn is_clean(&self) {
        self.is_clean_but_for(&[]);
    }

    pub(crate) fn is_clean_but_for(&self, there: &[&str]) {
        let memory = ["allocations", "imports", "mapped", "pieces", "reserved", "bytes", "registered"];
        let others = ["contexts", "streams", "events", "modules", "violations"];
        for what in memory.iter().chain(&others).filter(|what| !there.contains(what)) {
            assert_eq!(self.count(what), 0, "{what}");
        }
    }
}

/// How much of a library the loader looks at. The rest is for debuggers, and nine tenths of it.
fn loaded_bytes(library: &[u8]) -> usize {
    let word = |at: usize| usize::from(u16::from_le_bytes([library[at], library[at + 1]]));
    let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| library[at + byte])) as usize;
    // The program headers of an ELF file: where, how long one is, how many; in each a kind, an offset and a length.
    let headers = (0..word(56)).map(|header| long(32) + header * word(54));
    const LOAD: usize = 1;
    let loaded = headers.filter(|at| word(*at) == LOAD).map(|at| long(at + 8) + long(at + 32));
    loaded.max().expect("a library has something to load")
}

/// By the C library: a search of megabytes in a build that is not optimised takes seconds.
fn find(text: &[u8], wanted: &[u8]) -> Option<usize> {
    // SAFETY: two slices.
    let found =
        unsafe { libc::memmem(text.as_ptr().cast(), text.len(), wanted.as_ptr().cast(), wanted.len()) };
    (!found.is_null()).then(|| found as usize - text.as_ptr() as usize)
}

/// A driver, and what commands it when it is ours.
pub(crate) struct Cuda {
    pub(crate) driver: Driver,
    pub(crate) fake: Option<Fake>,
}

pub(crate) fn is_real() -> bool {
    match std::env::var("KVD_CUDA").as_deref() {
        Ok("real") => true,
        Ok(other) => panic!("KVD_CUDA={other}: only `real` means something"),
        Err(_) => false,
    }
}

/// For tests that hold on every driver.
pub(crate) fn cuda() -> Cuda {
    if is_real() {
        let driver = Driver::load().expect("KVD_CUDA=real asks for the machine's driver");
        return Cuda { driver, fake: None };
    }
    let fake = Fake::new("");
    Cuda { driver: fake.driver().unwrap(), fake: Some(fake) }
}

/// For tests that want something of the driver which only ours does.
pub(crate) fn fake(settings: &str) -> Option<(Fake, Driver)> {
    if is_real() {
        eprintln!("skipped: a real driver does not fail on purpose");
        return None;
    }
    let fake = Fake::new(settings);
    let driver = fake.driver().unwrap();
    Some((fake, driver))
}

impl Cuda {
    pub(crate) fn set(&self, settings: &str) {
        self.fake.iter().for_each(|fake| fake.set(settings));
    }

    pub(crate) fn is_clean(&self) {
        self.fake.iter().for_each(Fake::is_clean);
    }
}

/// Bytes that differ everywhere and by seed.
pub(crate) fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

pub(crate) fn low(device: &Device) -> Stream {
    device.stream(Priority::Low).unwrap()
}

pub(crate) fn filled(device: &Device, bytes: &[u8]) -> HostBuffer {
    let mut buffer = device.host_buffer(bytes.len()).unwrap();
    buffer.copy_from_slice(bytes);
    buffer
}

/// All of one host memory, from the beginning of the device's.
pub(crate) fn whole(bytes: usize) -> [PageCopy; 1] {
    [PageCopy { host: 0, host_offset: 0, device_offset: 0, bytes: bytes as u64 }]
}

pub(crate) fn up<H: Source>(stream: &Stream, to: &DeviceMemory, from: Vec<H>, pages: &[PageCopy]) -> Vec<H> {
    let mut copying = stream.onboard(to, from, pages).map_err(|refused| refused.error).unwrap();
    copying.wait(LONG).unwrap().expect("it is done")
}

pub(crate) fn down<H: Sink>(stream: &Stream, from: &DeviceMemory, to: Vec<H>, pages: &[PageCopy]) -> Vec<H> {
    let mut copying = stream.offload(from, to, pages).map_err(|refused| refused.error).unwrap();
    copying.wait(LONG).unwrap().expect("it is done")
}

/// What the device has there.
pub(crate) fn read(stream: &Stream, memory: &DeviceMemory) -> Vec<u8> {
    let bytes = memory.bytes() as usize;
    let buffer = stream.device().host_buffer(bytes).unwrap();
    down(stream, memory, vec![buffer], &whole(bytes))[0].to_vec()
}

/// Gives the device these bytes.
pub(crate) fn write(stream: &Stream, memory: &DeviceMemory, bytes: &[u8]) {
    up(stream, memory, vec![filled(stream.device(), bytes)], &whole(bytes.len()));
}
