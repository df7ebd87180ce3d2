//! What the driver knows, and what a test wants it to do.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::CUresult;

use crate::Code;
use crate::kernel::Kernels;
use crate::memory::Mapping;
use crate::stream::{End, Event, Health, Stream};

/// Device addresses begin here. No processor takes such an address, so code that reads device memory by itself
/// ends at once, as it should.
pub(crate) const DEVICE_ADDRESSES: u64 = 0x1000_0000_0000_0000;
/// Allocations are this far apart and aligned to it.
pub(crate) const ALIGNED: u64 = 2 << 20;

/// Memory at a device address.
pub(crate) struct Block {
    pub(crate) device: usize,
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) origin: Origin,
}

/// How memory came to its address, and so how it goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// `cuMemAlloc`.
    Allocated,
    /// Another process', opened so often.
    Opened(u32),
    /// `cuMemMap`; devices can use it after `cuMemSetAccess`, each with a bit here.
    Mapped { used_by: u64, imported: bool },
}

/// Memory without an address: `cuMemCreate`, or another process' by descriptor.
pub(crate) struct Piece {
    pub(crate) device: usize,
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) imported: bool,
}

/// Whether there are handles for other machines.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fabric {
    None,
    /// The device could, and the machine does not let it.
    Forbidden,
    There,
}

#[derive(Default)]
pub(crate) struct Device {
    pub(crate) retained: u32,
    pub(crate) used_bytes: u64,
    pub(crate) health: Arc<Health>,
}

pub(crate) struct State {
    pub(crate) initialised: bool,
    pub(crate) devices: Vec<Device>,
    pub(crate) memory: BTreeMap<u64, Block>,
    /// What `cuMemCreate` gave, by handle, and addresses that are reserved for such.
    pub(crate) pieces: HashMap<u64, Piece>,
    pub(crate) reserved: BTreeMap<u64, Arc<Mapping>>,
    /// Registered host memory: where, how long, and by which device, with whose context it ends.
    pub(crate) hosts: BTreeMap<usize, (usize, usize)>,
    pub(crate) streams: HashMap<usize, Arc<Stream>>,
    pub(crate) events: HashMap<usize, Arc<Event>>,
    pub(crate) memory_bytes: u64,
    pub(crate) version: i32,
    pub(crate) has_peers: bool,
    pub(crate) has_mps: bool,
    pub(crate) fabric: Fabric,
    /// Whether questions about addresses want a context.
    pub(crate) asks_in_context: bool,
    /// Said in place of the truth.
    pub(crate) lie_range_bytes: Option<usize>,
    /// By name: which call from now on fails, and how.
    fails: HashMap<String, (u64, u32)>,
    calls: HashMap<&'static str, u64>,
    /// Memory that was given up while a copy used it: what no caller may do.
    pub(crate) violations: u64,
    next_address: u64,
    next_handle: usize,
    pub(crate) kernels: Kernels,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| {
    let mut state = State {
        initialised: false,
        devices: vec![Device::default()],
        memory: BTreeMap::new(),
        pieces: HashMap::new(),
        reserved: BTreeMap::new(),
        hosts: BTreeMap::new(),
        streams: HashMap::new(),
        events: HashMap::new(),
        memory_bytes: 256 << 20,
        version: 13000,
        has_peers: true,
        has_mps: false,
        fabric: Fabric::There,
        asks_in_context: false,
        lie_range_bytes: None,
        fails: HashMap::new(),
        calls: HashMap::new(),
        violations: 0,
        next_address: DEVICE_ADDRESSES,
        next_handle: 0x100,
        kernels: Kernels::default(),
    };
    if let Ok(settings) = std::env::var("FAKE_CUDA") {
        state.set(&settings).expect("FAKE_CUDA is understood");
    }
    Mutex::new(state)
});

pub(crate) fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// Contexts of this thread, the current one last.
    pub(crate) static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// A context is called by its device's number.
const CONTEXTS: usize = 0x10;

pub(crate) fn context(device: usize) -> usize {
    CONTEXTS + device
}

pub(crate) fn context_device(context: usize) -> Option<usize> {
    context.checked_sub(CONTEXTS)
}

impl State {
    /// Counts a call, and says how it is to fail.
    pub(crate) fn enter(&mut self, name: &'static str) -> Result<(), Code> {
        *self.calls.entry(name).or_default() += 1;
        if let Some((left, code)) = self.fails.get_mut(name) {
            if *left == 0 {
                return Err(Code(*code));
            }
            *left -= 1;
            if *left == 0 {
                let code = *code;
                self.fails.remove(name);
                return Err(Code(code));
            }
        }
        let early = ["cuInit", "cuDriverGetVersion", "cuGetErrorName", "cuGetProcAddress_v2"];
        if !self.initialised && !early.contains(&name) {
            return Err(Code::of(CUresult::CUDA_ERROR_NOT_INITIALIZED));
        }
        Ok(())
    }

    /// Changes what was asked for; see the crate's comment.
    pub(crate) fn set(&mut self, settings: &str) -> Result<(), String> {
        for setting in settings.split(';').map(str::trim).filter(|setting| !setting.is_empty()) {
            let (key, value) = setting.split_once('=').ok_or_else(|| format!("{setting:?} has no value"))?;
            let number = |text: &str| text.parse::<u64>().map_err(|error| format!("{setting:?}: {error}"));
            match key {
                "devices" => self.devices = (0..number(value)?).map(|_| Device::default()).collect(),
                "memory" => self.memory_bytes = number(value)?,
                "version" => self.version = number(value)? as i32,
                "mps" => self.has_mps = number(value)? != 0,
                "peers" => self.has_peers = number(value)? != 0,
                "fabric" => {
                    self.fabric = match number(value)? {
                        0 => Fabric::None,
                        1 => Fabric::There,
                        _ => Fabric::Forbidden,
                    }
                }
                "ask_in_context" => self.asks_in_context = number(value)? != 0,
                "delay_us" => {
                    let delay_us = number(value)?;
                    self.devices
                        .iter()
                        .for_each(|device| device.health.delay_us.store(delay_us, Ordering::Relaxed));
                }
                "flip" => {
                    let flips = number(value)?;
                    self.devices
                        .iter()
                        .for_each(|device| device.health.flips.store(flips, Ordering::Relaxed));
                }
                "lie_range" => self.lie_range_bytes = Some(number(value)? as usize),
                "lose" => {
                    let (device, code) = value.split_once(':').ok_or("lose=DEVICE:CODE")?;
                    let device = self.devices.get(number(device)? as usize).ok_or("no such device")?;
                    device.health.lose(number(code)? as u32);
                }
                "fail" => {
                    let mut parts = value.split(':');
                    let (Some(name), Some(nth), Some(code)) = (parts.next(), parts.next(), parts.next())
                    else {
                        return Err("fail=NAME:WHICH:CODE".into());
                    };
                    self.fails.insert(name.to_owned(), (number(nth)?, number(code)? as u32));
                }
                "hold" => {
                    let (only, value) = match value.split_once(':') {
                        Some((device, value)) => (Some(number(device)? as usize), value),
                        None => (None, value),
                    };
                    let holds = number(value)? != 0;
                    let meant = |device: &usize| only.is_none_or(|only| only == *device);
                    let devices = self.devices.iter().enumerate().filter(|(device, _)| meant(device));
                    devices.for_each(|(_, device)| device.health.holds.store(holds, Ordering::SeqCst));
                }
                "reach_hosts" => self.kernels.can_reach_hosts = number(value)? != 0,
                "host_addresses" => self.kernels.has_host_addresses = number(value)? != 0,
                "fail_launch" => {
                    let (nth, code) = value.split_once(':').ok_or("fail_launch=WHICH:CODE")?;
                    self.kernels.fail(number(nth)?, number(code)? as u32);
                }
                _ => return Err(format!("{key:?} is unknown")),
            }
        }
        Ok(())
    }

    /// How many there are of what is asked for: `calls:NAME`, or one of the words below.
    pub(crate) fn count(&self, what: &str) -> Option<u64> {
        let of = |wanted: fn(&Origin) -> bool| {
            self.memory.values().filter(|block| wanted(&block.origin)).count() as u64
        };
        Some(match what {
            "allocations" => of(|origin| *origin == Origin::Allocated),
            "imports" => of(|origin| matches!(origin, Origin::Opened(_))),
            "mapped" => of(|origin| matches!(origin, Origin::Mapped { .. })),
            "pieces" => self.pieces.len() as u64,
            "reserved" => self.reserved.len() as u64,
            "bytes" => self.devices.iter().map(|device| device.used_bytes).sum(),
            "registered" => self.hosts.len() as u64,
            "streams" => self.streams.len() as u64,
            "events" => self.events.len() as u64,
            "contexts" => self.devices.iter().map(|device| u64::from(device.retained)).sum(),
            "under_way" => self.streams.values().map(|stream| stream.copies() as u64).sum(),
            "modules" => self.kernels.modules() as u64,
            "violations" => {
                let found = |device: &Device| device.health.violations.load(Ordering::SeqCst);
                self.violations + self.devices.iter().map(found).sum::<u64>()
            }
            _ => self.calls.get(what.strip_prefix("calls:")?).copied().unwrap_or_default(),
        })
    }

    pub(crate) fn device(&self, device: i32) -> Result<usize, Code> {
        let there = usize::try_from(device).ok().filter(|device| *device < self.devices.len());
        there.ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_DEVICE))
    }

    /// The device of the current context, when it is there and well.
    pub(crate) fn current(&self) -> Result<usize, Code> {
        let context = CURRENT.with_borrow(|contexts| contexts.last().copied());
        let device = context
            .and_then(context_device)
            .filter(|device| self.devices.get(*device).is_some_and(|device| device.retained > 0));
        let device = device.ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_CONTEXT))?;
        self.devices[device].health.check()?;
        Ok(device)
    }

    pub(crate) fn handle(&mut self) -> usize {
        self.next_handle += 1;
        self.next_handle
    }

    pub(crate) fn stream(&self, handle: usize) -> Result<Arc<Stream>, Code> {
        // The legacy default stream is not played.
        let stream = self.streams.get(&handle).ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_HANDLE))?;
        stream.health.check()?;
        Ok(Arc::clone(stream))
    }

    pub(crate) fn event(&self, handle: usize) -> Result<Arc<Event>, Code> {
        let event = self.events.get(&handle).ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_HANDLE))?;
        event.health.check()?;
        Ok(Arc::clone(event))
    }

    /// Puts memory at an address of its own.
    pub(crate) fn place(&mut self, block: Block) -> u64 {
        let address = self.reserve(block.mapping.bytes);
        self.memory.insert(address, block);
        address
    }

    /// Addresses that were nobody's. So many bytes were mapped, so they do not run out.
    pub(crate) fn reserve(&mut self, bytes: usize) -> u64 {
        let address = self.next_address;
        self.next_address += (bytes as u64).next_multiple_of(ALIGNED);
        address
    }

    /// The reserved addresses in which all of this lies: where they begin, and what is there.
    pub(crate) fn reservation(&self, address: u64, bytes: usize) -> Result<(u64, &Arc<Mapping>), Code> {
        let below = self.reserved.range(..=address).next_back();
        let fits = |(start, region): &(&u64, &Arc<Mapping>)| {
            let end = address.checked_add(bytes as u64);
            end.is_some_and(|end| end <= **start + region.bytes as u64)
        };
        let (start, region) = below.filter(fits).ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_VALUE))?;
        Ok((*start, region))
    }

    /// The pieces mapped in a row that are just this range.
    pub(crate) fn mapped(&self, address: u64, bytes: usize) -> Result<Vec<u64>, Code> {
        let invalid = Code::of(CUresult::CUDA_ERROR_INVALID_VALUE);
        let end = address.checked_add(bytes as u64).filter(|_| bytes > 0).ok_or(invalid)?;
        let (mut at, mut found) = (address, Vec::new());
        while at < end {
            let block = self.memory.get(&at).ok_or(invalid)?;
            if !matches!(block.origin, Origin::Mapped { .. }) {
                return Err(invalid);
            }
            found.push(at);
            at += block.mapping.bytes as u64;
        }
        if at == end { Ok(found) } else { Err(invalid) }
    }

    /// Memory without an address is given back when it has neither handle nor address any more.
    pub(crate) fn settle(&mut self, device: usize, mapping: &Arc<Mapping>, imported: bool) {
        let is_same = |other: &Arc<Mapping>| Arc::ptr_eq(other, mapping);
        let has_handle = self.pieces.values().any(|piece| is_same(&piece.mapping));
        if !imported && !has_handle && !self.memory.values().any(|block| is_same(&block.mapping)) {
            self.devices[device].used_bytes -= mapping.bytes as u64;
        }
    }

    /// What lies at a device address.
    pub(crate) fn block(&self, address: u64) -> Result<(u64, &Block), Code> {
        let invalid = Code::of(CUresult::CUDA_ERROR_INVALID_VALUE);
        let (&base, block) = self.memory.range(..=address).next_back().ok_or(invalid)?;
        if address - base >= block.mapping.bytes as u64 {
            return Err(invalid);
        }
        Ok((base, block))
    }

    /// The end of a copy in device memory: all of it.
    pub(crate) fn on_device(&self, address: u64, bytes: usize) -> Result<End, Code> {
        let invalid = Code::of(CUresult::CUDA_ERROR_INVALID_VALUE);
        let (base, block) = self.block(address)?;
        if matches!(block.origin, Origin::Mapped { .. }) {
            return self.on_pieces(address, bytes);
        }
        let offset = (address - base) as usize;
        if bytes > block.mapping.bytes - offset {
            return Err(invalid);
        }
        Ok(End::Device(Arc::clone(&block.mapping), offset))
    }

    /// The same in pieces that are mapped in a row: each must let the device of the current context use it.
    fn on_pieces(&self, address: u64, bytes: usize) -> Result<End, Code> {
        let invalid = Code::of(CUresult::CUDA_ERROR_INVALID_VALUE);
        let (device, end) = (self.current()?, address.checked_add(bytes as u64).ok_or(invalid)?);
        let (start, region) = self.reservation(address, bytes)?;
        let mut at = address;
        loop {
            let (base, block) = self.block(at)?;
            match block.origin {
                Origin::Mapped { used_by, .. } if used_by >> device & 1 == 1 => {}
                _ => return Err(invalid),
            }
            at = base + block.mapping.bytes as u64;
            if at >= end {
                return Ok(End::Device(Arc::clone(region), (address - start) as usize));
            }
        }
    }

    pub(crate) fn is_registered(&self, address: usize, bytes: usize) -> bool {
        let below = self.hosts.range(..=address).next_back();
        below.is_some_and(|(start, (length, _))| address + bytes <= start + length)
    }

    /// Whether any of this is registered.
    pub(crate) fn touches_registered(&self, address: usize, bytes: usize) -> bool {
        let below = self.hosts.range(..address + bytes).next_back();
        below.is_some_and(|(start, (length, _))| start + length > address)
    }

    /// The end of a copy on either side, as the batched copies take it.
    pub(crate) fn anywhere(&self, address: u64, bytes: usize) -> Result<End, Code> {
        if address >= DEVICE_ADDRESSES {
            return self.on_device(address, bytes);
        }
        let is_known = self.kernels.has_host_addresses && self.is_registered(address as usize, bytes);
        if !is_known {
            return Err(Code::of(CUresult::CUDA_ERROR_INVALID_VALUE));
        }
        Ok(End::Host(address as usize))
    }

    /// What goes with the last use of a device.
    pub(crate) fn destroy_context(&mut self, device: usize) {
        let health = Arc::clone(&self.devices[device].health);
        self.streams.retain(|_, stream| {
            let stays = stream.device != device;
            if !stays {
                stream.stop();
            }
            stays
        });
        self.events.retain(|_, event| !Arc::ptr_eq(&event.health, &health));
        self.memory.retain(|_, block| block.device != device);
        self.pieces.retain(|_, piece| piece.device != device);
        self.devices[device].used_bytes = 0;
        let gone: Vec<_> = self.hosts.extract_if(.., |_, (_, by)| *by == device).collect();
        for (start, (bytes, _)) in gone {
            self.kernels.unregistered(start);
            if self.streams.values().any(|stream| stream.touches_host(&(start..start + bytes))) {
                self.violations += 1;
            }
        }
        self.kernels.destroy_context(device);
    }
}
