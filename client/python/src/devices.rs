//! KV caches in device memory: how they lie, where they are, and what the daemon copies to and from them.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kv_client::layout::{
    Axis, Content, EngineLayout, EngineOrder, Order, Place, Shape, Step, Strides, TensorIndex, Tensors,
};
use kv_client::{
    DeviceCache, DeviceCacheSpec, LayerSave, Load, LoadOptions, MemoryPiece, PagedBlock, SaveOptions, Stored,
    TensorHandles,
};
use kv_gpu::{Driver, Exported, ExportedMemory, SharedPiece};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::errors::{exception, of_class, raised};
use crate::names::{Hash, PyBinding, PyMiss, PySlice, priority, seconds};

/// Names the driver's library where it is not the machine's: tests have one of their own.
const LIBRARY: &str = "KVD_CUDA_LIBRARY";

/// How an engine's KV cache lies in its tensors; see `_native.pyi`.
#[pyclass(name = "CacheLayout", module = "kvd", frozen, eq, from_py_object)]
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PyCacheLayout(pub(crate) EngineLayout);

fn wrong(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

fn one_of<T: Copy>(what: &str, text: &str, known: &[(&str, T)]) -> PyResult<T> {
    let found = known.iter().find(|(name, _)| *name == text);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
        wrong(format!("{what} `{text}`: one of {}", names.join(", ")))
    })
}

fn content(text: &str) -> PyResult<Content> {
    one_of("content", text, &[("key_value", Content::KeyValue), ("latent", Content::Latent)])
}

fn shape(
    slice: PySlice,
    content: &str,
    (page_count, page_tokens, head_dim, element_bits): (u32, u32, u32, u32),
) -> PyResult<Shape> {
    let content = self::content(content)?;
    Ok(Shape { slice: slice.0, content, page_count, page_tokens, head_dim, element_bits })
}

/// Takes the entry of an axis out of `steps`.
fn taken(steps: &Bound<'_, PyDict>, axis: Axis) -> PyResult<Option<u64>> {
    let Some(value) = steps.get_item(axis.name())? else { return Ok(None) };
    steps.del_item(axis.name())?;
    value
        .extract()
        .map(Some)
        .map_err(|_| wrong(format!("{}: {value} is no number of bytes or tensors", axis.name())))
}

#[pymethods]
impl PyCacheLayout {
    #[new]
    #[pyo3(signature = (
        order, *, slice, page_count, page_tokens, head_dim, element_bits, content="key_value", tensors="layers"
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn new(
        order: &str,
        slice: PySlice,
        page_count: u32,
        page_tokens: u32,
        head_dim: u32,
        element_bits: u32,
        content: &str,
        tensors: &str,
    ) -> PyResult<Self> {
        let lengths = (page_count, page_tokens, head_dim, element_bits);
        let shape = shape(slice, content, lengths)?;
        let named = order.parse::<EngineOrder>();
        let named = named.map_err(|error| wrong(format!("order `{order}`: {error}")))?;
        let known = [
            ("one", Tensors::One),
            ("layers", Tensors::Layers),
            ("halves", Tensors::Halves),
            ("halves_of_layers", Tensors::HalvesOfLayers),
        ];
        let tensors = one_of("tensors", tensors, &known)?;
        EngineLayout::dense(shape, named, tensors).map(Self).map_err(wrong)
    }

    #[staticmethod]
    #[pyo3(signature = (
        strides, tensors=None, *, slice, page_count, page_tokens, head_dim, element_bits, content="key_value",
        first=None
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn strided(
        strides: &Bound<'_, PyDict>,
        tensors: Option<&Bound<'_, PyDict>>,
        slice: PySlice,
        page_count: u32,
        page_tokens: u32,
        head_dim: u32,
        element_bits: u32,
        content: &str,
        first: Option<(u32, u64)>,
    ) -> PyResult<Self> {
        let shape = shape(slice, content, (page_count, page_tokens, head_dim, element_bits))?;
        let strides = strides.copy()?;
        let tensors = tensors.map_or_else(|| Ok(PyDict::new(strides.py())), PyDictMethods::copy)?;
        let bytes = |axis: Axis| match taken(&strides, axis)? {
            Some(bytes) => Ok(bytes),
            None if shape.count(axis) == 1 => Ok(0),
            None => Err(wrong(format!("strides: `{}` is missing", axis.name()))),
        };
        let step = |axis: Axis| match taken(&tensors, axis)? {
            None => bytes(axis).map(Step::Bytes),
            Some(_) if strides.contains(axis.name())? => {
                Err(wrong(format!("`{}` steps by bytes or from tensor to tensor, not both", axis.name())))
            }
            Some(tensors) => u32::try_from(tensors).map(Step::Tensors).map_err(wrong),
        };
        let strides_ = Strides {
            layer: step(Axis::Layer)?,
            kv: step(Axis::Kv)?,
            page: bytes(Axis::Page)?,
            head: bytes(Axis::Head)?,
            token: bytes(Axis::Token)?,
            dim: bytes(Axis::Dim)?,
        };
        for (what, left) in [("strides", strides), ("tensors", tensors)] {
            if let Some(name) = left.keys().iter().next() {
                let axes = if what == "tensors" { "layer, kv" } else { "layer, kv, page, head, token, dim" };
                return Err(wrong(format!("{what}: unknown axis `{name}`; one of {axes}")));
            }
        }
        let (tensor, offset) = first.unwrap_or_default();
        let first = Place { tensor: TensorIndex(tensor), offset };
        EngineLayout::new(shape, strides_, first).map(Self).map_err(wrong)
    }

    #[getter]
    fn tensor_count(&self) -> u32 {
        self.0.tensor_count()
    }

    #[getter]
    fn tensor_bytes(&self) -> u64 {
        self.0.tensor_bytes()
    }

    fn block_bytes(&self, pages: u32) -> PyResult<u64> {
        // A block is dense: its order does not change its length.
        self.0.block(Order::CANONICAL, pages).map(|block| block.bytes()).map_err(wrong)
    }

    fn __repr__(&self) -> String {
        let shape = self.0.shape();
        format!(
            "<CacheLayout {}, {} pages of {} tokens, {} tensors of {} bytes>",
            shape.slice,
            shape.page_count,
            shape.page_tokens,
            self.0.tensor_count(),
            self.0.tensor_bytes()
        )
    }
}

/// Where a tensor is: its first byte, and one past its last.
#[derive(Clone, Copy, Debug)]
struct Range {
    start: u64,
    end: u64,
}

impl Range {
    fn new(start: u64, bytes: u64) -> PyResult<Self> {
        let end = start.checked_add(bytes).filter(|_| start > 0 && bytes > 0);
        let end = end.ok_or_else(|| wrong(format!("{bytes} bytes at address {start:#x} are no memory")))?;
        Ok(Self { start, end })
    }

    /// Of an object with `__cuda_array_interface__`, or of a pair of an address and a length.
    fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        if let Ok(pair) = object.cast::<PyTuple>() {
            let (address, bytes) = pair.extract()?;
            return Self::new(address, bytes);
        }
        let Some(interface) = object.getattr_opt("__cuda_array_interface__")? else {
            let class = object.get_type().name()?;
            let text = format!(
                "a tensor is an object with __cuda_array_interface__ or a pair of address and bytes, not {class}"
            );
            return Err(PyTypeError::new_err(text));
        };
        let field = |name: &str| {
            interface.get_item(name).map_err(|_| wrong(format!("__cuda_array_interface__ has no `{name}`")))
        };
        let (address, read_only): (u64, bool) = field("data")?.extract()?;
        if read_only {
            return Err(wrong("the tensor is read-only; blocks are loaded into it"));
        }
        let typestr: String = field("typestr")?.extract()?;
        let item = typestr.trim_start_matches(|letter: char| !letter.is_ascii_digit()).parse::<u64>();
        let item = item.map_err(|_| wrong(format!("typestr `{typestr}` says no length")))?;
        let shape: Vec<u64> = field("shape")?.extract()?;
        let strides = interface.get_item("strides").ok().filter(|strides| !strides.is_none());
        let beyond = || wrong("the tensor leads beyond what an address can say");
        let bytes = match strides {
            None => shape.iter().try_fold(item, |bytes, count| bytes.checked_mul(*count)),
            Some(_) if shape.contains(&0) => Some(0),
            Some(strides) => {
                let strides = strides.extract::<Vec<u64>>();
                let strides = strides.map_err(|_| wrong("strides of a tensor are not negative"))?;
                if strides.len() != shape.len() {
                    return Err(wrong("the tensor has another number of strides than of lengths"));
                }
                shape.iter().zip(strides).try_fold(item, |bytes, (count, stride)| {
                    stride.checked_mul(count - 1).and_then(|more| bytes.checked_add(more))
                })
            }
        };
        Self::new(address, bytes.ok_or_else(beyond)?)
    }
}

/// Ranges that together are `all`, none of which meet: what shares memory is of one allocation, and handed over as one.
fn apart(all: &[Range]) -> Vec<Range> {
    let mut sorted = all.to_vec();
    sorted.sort_unstable_by_key(|range| range.start);
    let mut apart: Vec<Range> = Vec::new();
    for range in sorted {
        match apart.last_mut() {
            Some(last) if range.start < last.end => last.end = last.end.max(range.end),
            _ => apart.push(range),
        }
    }
    apart
}

/// The driver, from whenever there is one.
fn driver(py: Python<'_>) -> PyResult<Driver> {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    if let Some(driver) = DRIVER.get() {
        return Ok(*driver);
    }
    let loaded = py.detach(|| match std::env::var_os(LIBRARY).filter(|path| !path.is_empty()) {
        Some(path) => Driver::load_from(&path),
        None => Driver::load(),
    });
    let driver = loaded.map_err(|absent| of_class(py, "Unsupported", &absent.to_string()))?;
    Ok(*DRIVER.get_or_init(|| driver))
}

/// What the driver says against handing memory over.
fn refused(py: Python<'_>, error: &kv_gpu::Error) -> PyErr {
    use kv_gpu::Error::{ManyPieces, NoCall, NoFabric, NoMemory, NotShared, Range};
    let cause = std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
    let words = format!("{error}{cause}");
    match error {
        NoMemory { .. } | Range { .. } | ManyPieces { .. } => of_class(py, "Invalid", &words),
        NotShared { .. } | NoFabric { .. } | NoCall { .. } => of_class(py, "Unsupported", &words),
        _ => PyRuntimeError::new_err(words),
    }
}

fn handles(memory: ExportedMemory) -> TensorHandles {
    let piece = |piece| match piece {
        SharedPiece::Descriptor { fd, bytes } => MemoryPiece::Descriptor { fd: Arc::new(fd), bytes },
        SharedPiece::Fabric { handle, bytes } => MemoryPiece::Fabric { handle, bytes },
    };
    match memory {
        ExportedMemory::Ipc(whole) => TensorHandles::ipc(whole.handle, whole.offset, whole.bytes),
        ExportedMemory::Pieces { pieces, offset, bytes } => {
            TensorHandles { pieces: pieces.into_iter().map(piece).collect(), offset, bytes }
        }
    }
}

/// What a worker registers of these tensors.
pub(crate) fn spec(
    py: Python<'_>,
    tensors: Vec<Bound<'_, PyAny>>,
    layout: EngineLayout,
    events: Vec<[u8; 64]>,
) -> PyResult<DeviceCacheSpec> {
    let ranges = tensors.into_iter().map(|tensor| Range::of(&tensor)).collect::<PyResult<Vec<_>>>()?;
    if ranges.len() != layout.tensor_count() as usize {
        let text = format!("the layout is of {} tensors, {} are given", layout.tensor_count(), ranges.len());
        return Err(wrong(text));
    }
    let driver = driver(py)?;
    let export = |range: &Range| driver.export_address(range.start, range.end - range.start);
    let wholes = apart(&ranges);
    let exported = py.detach(|| wholes.iter().map(export).collect::<Result<Vec<Exported>, _>>());
    let exported = exported.map_err(|error| refused(py, &error))?;
    let Some(device) = exported.first().map(|one| one.device) else {
        return Err(wrong("a cache without a tensor"));
    };
    if exported.iter().any(|one| one.device != device) {
        return Err(wrong("the tensors are of several devices; register a cache for each"));
    }
    let shared: Vec<TensorHandles> = exported.into_iter().map(|one| handles(one.memory)).collect();
    let part = |range: &Range| {
        let at = wholes.partition_point(|whole| whole.end <= range.start);
        shared[at].part(range.start - wholes[at].start, range.end - range.start)
    };
    let tensors = ranges.iter().map(part).collect();
    Ok(DeviceCacheSpec { device: device.0, tensors, layout, events })
}

fn paged(blocks: Vec<(Hash, Vec<u32>)>) -> Vec<PagedBlock> {
    blocks.into_iter().map(|(hash, pages)| PagedBlock { hash: hash.0, pages }).collect()
}

fn stored<'py>(
    py: Python<'py>,
    saved: Result<Vec<Result<Stored, kv_client::Error>>, kv_client::Error>,
) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for one in saved.map_err(|error| raised(py, &error))? {
        match one {
            Ok(stored) => list.append(!stored.already)?,
            Err(error) => list.append(exception(py, &error)?)?,
        }
    }
    Ok(list)
}

/// A KV cache that the daemon knows; see `_native.pyi`.
#[pyclass(name = "DeviceCache", module = "kvd", frozen)]
pub(crate) struct PyDeviceCache(pub(crate) DeviceCache);

fn save_options(
    class: &str,
    ttl: Option<f64>,
    durable: bool,
    after: Option<Hash>,
    event: Option<u32>,
) -> PyResult<SaveOptions> {
    let ttl = ttl.map(|ttl| seconds("ttl", ttl)).transpose()?;
    Ok(SaveOptions { priority: priority(class)?, ttl, durable, after: after.map(|hash| hash.0), event })
}

#[pymethods]
impl PyDeviceCache {
    #[getter]
    fn deadline(&self) -> f64 {
        self.0.deadline().as_secs_f64()
    }

    fn with_deadline(&self, deadline: f64) -> PyResult<Self> {
        Ok(Self(self.0.with_deadline(seconds("deadline", deadline)?)))
    }

    #[pyo3(signature = (
        binding, blocks, *, priority="normal", ttl=None, durable=false, after=None, event=None
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn save<'py>(
        &self,
        py: Python<'py>,
        binding: &PyBinding,
        blocks: Vec<(Hash, Vec<u32>)>,
        priority: &str,
        ttl: Option<f64>,
        durable: bool,
        after: Option<Hash>,
        event: Option<u32>,
    ) -> PyResult<Bound<'py, PyList>> {
        let options = save_options(priority, ttl, durable, after, event)?;
        let saved = py.detach(|| self.0.save(&binding.0, &paged(blocks), &options).wait());
        stored(py, saved)
    }

    #[pyo3(signature = (binding, blocks, *, priority="normal", ttl=None, durable=false, after=None))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn save_by_layer(
        &self,
        py: Python<'_>,
        binding: &PyBinding,
        blocks: Vec<(Hash, Vec<u32>)>,
        priority: &str,
        ttl: Option<f64>,
        durable: bool,
        after: Option<Hash>,
    ) -> PyResult<PyLayerSave> {
        let options = save_options(priority, ttl, durable, after, None)?;
        let begun = py.detach(|| self.0.save_by_layer(&binding.0, &paged(blocks), &options).wait());
        let save = begun.map_err(|error| raised(py, &error))?;
        Ok(PyLayerSave(Mutex::new(Some(save))))
    }

    #[pyo3(signature = (binding, blocks, *, wait=0.0, node=None, by_layer=false, event=None, events=None))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn load(
        &self,
        py: Python<'_>,
        binding: &PyBinding,
        blocks: Vec<(Hash, Vec<u32>)>,
        wait: f64,
        node: Option<String>,
        by_layer: bool,
        event: Option<u32>,
        events: Option<Vec<u32>>,
    ) -> PyResult<PyLoad> {
        let (wait, node) = (seconds("wait", wait)?, node.unwrap_or_default());
        let options = LoadOptions { wait, node, by_layer, event, events: events.unwrap_or_default() };
        let begun = py.detach(|| self.0.load(&binding.0, &paged(blocks), &options).wait());
        let mut load = begun.map_err(|error| raised(py, &error))?;
        let found = PyList::empty(py);
        for one in std::mem::take(&mut load.found) {
            match one {
                Ok(tier) => found.append(tier.name())?,
                Err(miss) => found.append(Py::new(py, PyMiss(miss))?)?,
            }
        }
        Ok(PyLoad { found: found.unbind(), load: Mutex::new(Some(load)) })
    }

    fn quiesce(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.quiesce().wait()).map_err(|error| raised(py, &error))
    }

    fn forget(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.forget().wait()).map_err(|error| raised(py, &error))
    }

    fn __repr__(&self) -> String {
        let spec = self.0.spec();
        format!(
            "<DeviceCache {}, {} events>",
            PyCacheLayout(spec.layout.clone()).__repr__(),
            spec.events.len()
        )
    }
}

/// Blocks that are stored layer by layer; see `_native.pyi`.
#[pyclass(name = "LayerSave", module = "kvd", frozen)]
pub(crate) struct PyLayerSave(Mutex<Option<LayerSave>>);

impl PyLayerSave {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<LayerSave>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn over(what: &str) -> PyErr {
    PyValueError::new_err(format!("the {what} is over"))
}

#[pymethods]
impl PyLayerSave {
    #[pyo3(signature = (layers, event=None))]
    fn ready(&self, py: Python<'_>, layers: u32, event: Option<u32>) -> PyResult<()> {
        let said = py.detach(|| self.lock().as_mut().map(|save| save.ready(layers, event)));
        said.ok_or_else(|| over("save"))?.map_err(|error| raised(py, &error))
    }

    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let save = py.detach(|| self.lock().take()).ok_or_else(|| over("save"))?;
        stored(py, py.detach(|| save.finish().wait()))
    }

    fn abort(&self, py: Python<'_>) {
        py.detach(|| drop(self.lock().take()));
    }
}

/// Blocks on their way into pages; see `_native.pyi`.
#[pyclass(name = "Load", module = "kvd", frozen)]
pub(crate) struct PyLoad {
    found: Py<PyList>,
    /// `None` once it was waited for to the end.
    load: Mutex<Option<Load>>,
}

impl PyLoad {
    fn with<T>(&self, what: impl FnOnce(&Load) -> T) -> PyResult<T> {
        let load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        load.as_ref().map(what).ok_or_else(|| over("load"))
    }
}

#[pymethods]
impl PyLoad {
    #[getter]
    fn found(&self, py: Python<'_>) -> Py<PyList> {
        self.found.clone_ref(py)
    }

    #[getter]
    fn layers_arrived(&self) -> PyResult<u32> {
        self.with(Load::layers_arrived)
    }

    fn wait_for_layers(&self, py: Python<'_>, layers: u32) -> PyResult<()> {
        let call = self.with(|load| load.wait_for_layers(layers))?;
        py.detach(|| call.wait()).map_err(|error| raised(py, &error))
    }

    fn finish(&self, py: Python<'_>) -> PyResult<()> {
        let load = self.load.lock().unwrap_or_else(PoisonError::into_inner).take();
        let load = load.ok_or_else(|| over("load"))?;
        py.detach(|| load.finish().wait()).map_err(|error| raised(py, &error))
    }
}
