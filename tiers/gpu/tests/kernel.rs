//! The kernels without a GPU: their source runs on the processor against something simpler, and their PTX is what the
//! compiler makes of that source. And, with a GPU or on our driver, checksums of device memory.
#![expect(unsafe_code, reason = "libraries are loaded, and their functions are called")]

mod common;

use std::ffi::{CStr, CString, OsString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr;

use common::{LONG, cuda, fake, low, pattern, write};
use kv_block::{BlockKey, Checksum};
use kv_gpu::{Error, Kernels, sums};

fn kernel(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel").join(file)
}

/// The kernels, compiled for the processor.
struct OnProcessor {
    _dir: tempfile::TempDir,
    cuda: libloading::Library,
}

impl OnProcessor {
    fn build() -> Option<Self> {
        if !kernel("without_gpu.cpp").exists() {
            eprintln!("skipped: the sources are not on this machine");
            return None;
        }
        let compiler = std::env::var_os("CXX").unwrap_or_else(|| OsString::from("c++"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel.so");
        // Bytes are read as words, as on a device.
        let flags =
            ["-std=c++17", "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-o"];
        let mut command = Command::new(&compiler);
        command.args(flags).arg(&path).arg(kernel("without_gpu.cpp"));
        let built = match command.output() {
            Ok(built) => built,
            Err(error) => {
                eprintln!("skipped: {} does not start: {error}", compiler.display());
                return None;
            }
        };
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        // SAFETY: our own library, whose initialisers do nothing.
        let library = unsafe { libloading::Library::new(&path) }.unwrap();
        Some(Self { _dir: dir, cuda: library })
    }

    /// # Safety
    /// The table's addresses are of memory that is there and that nobody else uses meanwhile.
    unsafe fn pages(&self, table: &[[u64; 3]], (blocks, threads): (u32, u32)) {
        type Launch = unsafe extern "C" fn(*const [u64; 3], u32, u32, u32) -> c_int;
        // SAFETY: the signature in `without_gpu.cpp`; the rest is of the caller.
        let fault = unsafe {
            let launch = self.cuda.get::<Launch>("launch_pages").unwrap();
            launch(table.as_ptr(), table.len() as u32, blocks, threads)
        };
        assert_eq!(fault, 0);
    }

    /// # Safety
    /// As above, with seven bytes more on each side.
    unsafe fn checksums(&self, table: &[[u64; 2]], blocks: u32) -> Vec<u64> {
        type Launch = unsafe extern "C" fn(*const [u64; 2], u32, *mut u64, u32, u32) -> c_int;
        let mut sums = vec![0; table.len()];
        // SAFETY: as above; a sum for each.
        let fault = unsafe {
            let launch = self.cuda.get::<Launch>("launch_checksums").unwrap();
            launch(table.as_ptr(), table.len() as u32, sums.as_mut_ptr(), blocks, 256)
        };
        assert_eq!(fault, 0);
        sums
    }
}

/// The fibers of a launch are the library's, and there is one set.
static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Numbers by chance.
fn dice(seed: u64) -> impl FnMut(usize) -> usize {
    let mut bytes = pattern(seed, 4 << 20).into_iter();
    move |limit| bytes.by_ref().take(4).fold(0, |sum, byte| sum << 8 | usize::from(byte)) % limit
}

#[test]
fn pieces_of_any_length_at_any_place_are_copied_to_the_byte() {
    let Some(processor) = OnProcessor::build() else { return };
    let _alone = ONE_AT_A_TIME.lock();
    let mut below = dice(11);
    const BYTES: usize = 200_000;
    let from = pattern(1, BYTES);
    for round in 0..100 {
        let mut to = pattern(2 + round, BYTES);
        let mut model = to.clone();
        let (from_at, to_at) = (from.as_ptr().expose_provenance(), to.as_mut_ptr().expose_provenance());
        // Each byte is written by one piece; between them are gaps, which stay as they are.
        let longest = [1, 2, 17, 300, 5000, 70_000][below(6)];
        let step = [1, 2, 4, 8, 16][below(5)];
        let (mut table, mut at) = (Vec::new(), 0);
        while table.len() < 400 {
            at += below(40) / step * step;
            let bytes = below(longest + 1);
            if at + bytes > BYTES {
                break;
            }
            let there = below(BYTES - bytes + 1) / step * step;
            model[at..at + bytes].copy_from_slice(&from[there..there + bytes]);
            table.push([to_at + at, from_at + there, bytes].map(|it| it as u64));
            at += bytes.next_multiple_of(step);
        }
        // SAFETY: within the two, which are nobody else's here.
        unsafe { processor.pages(&table, (1 + below(3) as u32, 32 * (1 + below(8) as u32))) };
        assert!(to == model, "round {round}");
    }
}

#[test]
fn sums_are_those_of_the_blocks() {
    let Some(processor) = OnProcessor::build() else { return };
    let _alone = ONE_AT_A_TIME.lock();
    let mut below = dice(12);
    const BYTES: usize = 300_000;
    let bytes = pattern(3, BYTES);
    let start = bytes.as_ptr().expose_provenance();
    let round = 256 * 8;
    // Where a run begins, where it ends, and both sides of each whole round.
    let mut runs: Vec<_> = (0..70).flat_map(|bytes| (8..17).map(move |at| (at, bytes))).collect();
    runs.extend(
        (0..4).flat_map(|rounds| (0..40).map(move |over| (8 + over % 9, rounds * round + 2020 + over))),
    );
    runs.extend((0..200).map(|_| {
        let at = 8 + below(BYTES / 2);
        (at, below(BYTES / 2 - 16))
    }));
    let table: Vec<_> = runs.iter().map(|(at, bytes)| [(start + at) as u64, *bytes as u64]).collect();
    // SAFETY: within the bytes, eight from either end.
    let sums = unsafe { processor.checksums(&table, 3) };
    let key = BlockKey([0; 16]);
    for ((at, length), sum) in runs.into_iter().zip(sums) {
        let wanted = Checksum::of(&key, &bytes[at..at + length]).content(&key);
        assert_eq!(sum, wanted, "{length} bytes at {at}");
    }
}

/// NVIDIA's run-time compiler, which needs no GPU: by the path in `KVD_NVRTC`, or where `kernel/generate` put it.
fn nvrtc() -> Option<libloading::Library> {
    let named = std::env::var_os("KVD_NVRTC").map(PathBuf::from);
    let found = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../.cache/nvrtc-11.8/nvidia/cuda_nvrtc/lib/libnvrtc.so.11.2");
    let path = named.or_else(|| found.exists().then_some(found));
    let Some(path) = path else {
        eprintln!(
            "skipped: no NVRTC; `tiers/gpu/kernel/generate` fetches it, or KVD_NVRTC names its library"
        );
        return None;
    };
    // SAFETY: NVIDIA's library, whose initialisers touch nothing of ours.
    Some(unsafe { libloading::Library::new(&path) }.unwrap())
}

fn compile(nvrtc: &libloading::Library, source: &CStr) -> String {
    type Program = *mut c_void;
    type Create = unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int;
    type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
    type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
    type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
    let mut program = ptr::null_mut();
    let options = [c"--gpu-architecture=compute_80", c"--std=c++17"].map(CStr::as_ptr);
    // SAFETY: the signatures of NVRTC; texts that end with a zero, and places to write to, as long as it said.
    unsafe {
        let create = nvrtc.get::<Create>("nvrtcCreateProgram").unwrap();
        let created =
            create(&mut program, source.as_ptr(), c"pages.cu".as_ptr(), 0, ptr::null(), ptr::null());
        assert_eq!(created, 0);
        let text = |size: &str, text: &str| {
            let (size, text) = (nvrtc.get::<Size>(size).unwrap(), nvrtc.get::<Text>(text).unwrap());
            let mut bytes = 0;
            assert_eq!(size(program, &mut bytes), 0);
            let mut room = vec![0_u8; bytes];
            assert_eq!(text(program, room.as_mut_ptr().cast()), 0);
            CStr::from_bytes_until_nul(&room).unwrap().to_str().unwrap().to_owned()
        };
        let compiled = nvrtc.get::<Compile>("nvrtcCompileProgram").unwrap();
        let code = compiled(program, options.len() as c_int, options.as_ptr());
        assert_eq!(code, 0, "{}", text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog"));
        text("nvrtcGetPTXSize", "nvrtcGetPTX")
    }
}

/// With `KVD_KERNEL_WRITE=1` it is written, which is what `kernel/generate` does.
#[test]
fn the_ptx_is_what_the_compiler_makes_of_the_source() {
    let Some(nvrtc) = nvrtc().filter(|_| kernel("pages.cu").exists()) else { return };
    let source = CString::new(std::fs::read(kernel("pages.cu")).unwrap()).unwrap();
    let made = compile(&nvrtc, &source);
    let path = kernel("pages.ptx");
    if std::env::var_os("KVD_KERNEL_WRITE").is_some() {
        std::fs::write(&path, made).unwrap();
        return;
    }
    let release = |ptx: &str| ptx.lines().find(|line| line.contains("release")).map(str::to_owned);
    let kept = std::fs::read_to_string(&path).unwrap();
    if release(&made) != release(&kept) {
        eprintln!("skipped: this NVRTC is another: {:?}, not {:?}", release(&made), release(&kept));
        return;
    }
    assert!(made == kept, "pages.ptx is not of this pages.cu: run tiers/gpu/kernel/generate");
}

/// A driver refuses PTX that is newer than itself.
#[test]
fn the_ptx_is_for_cuda_11_8_and_compute_capability_8_0() {
    let ptx = include_str!("../kernel/pages.ptx");
    for wanted in
        [".version 7.8\n", ".target sm_80\n", ".visible .entry pages(", ".visible .entry checksums("]
    {
        assert!(ptx.contains(wanted), "{wanted}");
    }
}

fn loaded(device: &kv_gpu::Device) -> Option<Kernels> {
    match Kernels::load(device) {
        Ok(kernels) => Some(kernels),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

#[test]
fn checksums_of_device_memory_are_those_of_the_blocks() {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let Some(kernels) = loaded(&device) else { return };
    let stream = low(&device);
    const BYTES: usize = 1 << 20;
    let bytes = pattern(4, BYTES);
    let memory = device.allocate(BYTES as u64).unwrap();
    write(&stream, &memory, &bytes);
    let mut below = dice(13);
    let mut runs: Vec<_> = (0..40_u64).map(|bytes| 3 * bytes..4 * bytes).collect();
    runs.extend([0..BYTES as u64, 1..BYTES as u64, 0..0, 262_144..524_288, 262_143..524_290]);
    runs.extend((0..60).map(|_| {
        let start = below(BYTES) as u64;
        start..start + below(BYTES - start as usize + 1) as u64
    }));
    let room = device.host_buffer(Kernels::checksum_room_bytes(&runs)).unwrap();
    let summing = kernels.checksums(&stream, &memory, &runs, room).map_err(|refused| refused.error);
    let (sums, room) = summing.unwrap().wait(LONG).unwrap().unwrap();
    let key = BlockKey([7; 16]);
    let of = |run: &std::ops::Range<u64>| Checksum::of(&key, &bytes[run.start as usize..run.end as usize]);
    for (run, sum) in runs.iter().zip(&sums) {
        assert_eq!(Checksum::from_content(&key, *sum), of(run), "{run:?}");
    }
    // A block out of pages in some order: its checksum is made of theirs.
    let pages: Vec<_> = (0..16_u64).map(|page| page * 5 % 16 * 4096..page * 5 % 16 * 4096 + 4000).collect();
    let summing = kernels.checksums(&stream, &memory, &pages, room).map_err(|refused| refused.error);
    let (sums, room) = summing.unwrap().wait(LONG).unwrap().unwrap();
    let block: Vec<u8> =
        pages.iter().flat_map(|page| bytes[page.start as usize..page.end as usize].iter().copied()).collect();
    let joined = sums::joined(sums.into_iter().map(|sum| (sum, 4000)));
    assert_eq!(Checksum::from_content(&key, joined), Checksum::of(&key, &block));
    // Nothing is something too.
    let summing = kernels.checksums(&stream, &memory, &[], room).map_err(|refused| refused.error);
    let (sums, room) = summing.unwrap().wait(LONG).unwrap().unwrap();
    assert!(sums.is_empty());
    drop((room, memory, stream, kernels, device));
    cuda.is_clean();
}

/// For a thread that must not wait for a device that does not answer.
#[test]
fn checksums_are_let_go_of_without_a_wait() {
    let Some((fake, driver)) = fake("") else { return };
    let device = driver.open(0).unwrap();
    let Some(kernels) = loaded(&device) else { return };
    let (stream, memory) = (low(&device), device.allocate(4096).unwrap());
    let whole = 0..4096;
    let room = device.host_buffer(Kernels::checksum_room_bytes(std::slice::from_ref(&whole))).unwrap();
    fake.set("hold=1");
    let summing =
        kernels.checksums(&stream, &memory, &[whole], room).map_err(|refused| refused.error).unwrap();
    drop((memory, kernels));
    summing.forget();
    assert_eq!((fake.count("under_way"), fake.count("allocations"), fake.count("registered")), (1, 1, 1));
    fake.set("hold=0");
    assert!(stream.wait(LONG).unwrap());
    drop((stream, device));
    assert_eq!((fake.count("modules"), fake.count("allocations"), fake.count("violations")), (1, 1, 0));
}

#[test]
fn checksums_of_what_is_not_there_are_refused() {
    let Some((fake, driver)) = fake("devices=2") else { return };
    let (device, other) = (driver.open(0).unwrap(), driver.open(1).unwrap());
    let Some(kernels) = loaded(&device) else { return };
    let memory = device.allocate(4096).unwrap();
    let elsewhere = other.allocate(4096).unwrap();
    let streams = [low(&device), low(&other)];
    let refused = |stream: usize, memory, run, room| {
        let refused = kernels.checksums(&streams[stream], memory, &[run], room).err().unwrap();
        assert_eq!(refused.hosts.unwrap().len(), 1);
        refused.error
    };
    let room = || device.host_buffer(4096).unwrap();
    for run in [0..4097, 4097..4097, 0..u64::MAX, u64::MAX - 1..u64::MAX] {
        assert!(matches!(refused(0, &memory, run, room()), Error::Range { .. }));
    }
    let error = refused(0, &memory, 0..1, device.host_buffer(23).unwrap());
    assert_eq!(error, Error::Range { what: "the room for checksums", offset: 0, bytes: 24, within: 23 });
    assert!(matches!(refused(1, &memory, 0..1, room()), Error::OtherDevice { .. }));
    assert!(matches!(refused(0, &elsewhere, 0..1, room()), Error::OtherDevice { .. }));
    // A buffer whose device has gone is memory and no more.
    let third = driver.open(1).unwrap();
    let orphan = third.host_buffer(64).unwrap();
    drop((elsewhere, other, third));
    let [stream, last] = streams;
    drop(last);
    let run = 0..1;
    let refused = kernels.checksums(&stream, &memory, std::slice::from_ref(&run), orphan).err().unwrap();
    assert_eq!(refused.error, Error::NotRegistered { device: 0, host: 0 });
    drop((refused, memory, stream, kernels, device));
    fake.is_clean();
}
