//! Clients and sessions.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kv_client::{
    Client, ClientOptions, Doors, Endpoint, EventCursor, Events, Got, PutOptions, SequenceHash, Sighting,
    Tls, WatchOptions, Worker, WorkerOptions,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use crate::block::{PyBlock, PyReservation};
use crate::buffer::BorrowedBytes;
use crate::devices::{self, PyCacheLayout, PyDeviceCache};
use crate::errors::{exception, raised};
use crate::names::{Hash, PyBinding, PyMiss, PyScope, PySlice, priority, seconds, tier};

/// How long a waiting call goes without looking whether Ctrl-C was pressed.
const SIGNAL_LOOK: Duration = Duration::from_millis(100);

/// A connection to the daemon; see `_native.pyi`.
#[pyclass(name = "Client", module = "kvd", frozen)]
pub(crate) struct PyClient(Client);

/// Connects to the daemon; see `_native.pyi`.
#[pyfunction]
#[pyo3(signature = (endpoint=None, *, deadline=2.0, tls_ca=None, tls_identity=None, tls_name=None))]
pub(crate) fn connect(
    py: Python<'_>,
    endpoint: Option<PathBuf>,
    deadline: f64,
    tls_ca: Option<PathBuf>,
    tls_identity: Option<(PathBuf, PathBuf)>,
    tls_name: Option<String>,
) -> PyResult<PyClient> {
    let tls = tls_ca.map(|ca| Tls { ca, identity: tls_identity, name: tls_name });
    let endpoint = match endpoint {
        None => Endpoint::local(),
        Some(path) => match path.to_str().filter(|text| text.contains("://")) {
            Some(uri) => Endpoint::Uri { uri: uri.to_owned(), tls },
            None => Endpoint::Socket(path),
        },
    };
    let options = ClientOptions { endpoint, deadline: seconds("deadline", deadline)? };
    let client = py.detach(|| Client::connect(options).wait()).map_err(|error| raised(py, &error))?;
    Ok(PyClient(client))
}

#[pymethods]
impl PyClient {
    #[pyo3(signature = (
        name="", *, staging_bytes=None, hazards=None, ring_entries=None, numa_node=None, trusted=false, grpc_only=false
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn session(
        &self,
        py: Python<'_>,
        name: &str,
        staging_bytes: Option<u64>,
        hazards: Option<u32>,
        ring_entries: Option<u32>,
        numa_node: Option<u16>,
        trusted: bool,
        grpc_only: bool,
    ) -> PyResult<PySession> {
        let usual = WorkerOptions::default();
        let options = WorkerOptions {
            name: name.to_owned(),
            staging_bytes: staging_bytes.unwrap_or(usual.staging_bytes),
            hazards: hazards.unwrap_or(usual.hazards),
            ring_entries: ring_entries.unwrap_or(usual.ring_entries),
            numa_node,
            trusted,
            grpc_only,
            ..usual
        };
        let worker = py.detach(|| self.0.worker(options).wait()).map_err(|error| raised(py, &error))?;
        Ok(PySession(worker))
    }

    fn describe(&self, py: Python<'_>) -> PyResult<Described> {
        let told = py.detach(|| self.0.describe().wait()).map_err(|error| raised(py, &error))?;
        Ok(Described {
            node: told.node,
            version: told.version,
            epoch: told.epoch.0,
            shards: told.shards,
            keys_per_request_max: told.keys_per_request_max,
            block_bytes_max: told.block_bytes_max,
            principal: told.principal,
            peers: told.peers,
            object: told.object,
        })
    }

    #[pyo3(signature = (*, tenants=None, cursors=None))]
    fn watch(&self, tenants: Option<Vec<String>>, cursors: Option<Vec<(u16, u64, u64)>>) -> PyEvents {
        let cursor = |(shard, epoch, number): (u16, u64, u64)| EventCursor {
            shard: kv_client::ShardId(shard),
            epoch: kv_client::Epoch(epoch),
            number,
        };
        let cursors = cursors.unwrap_or_default().into_iter().map(cursor).collect();
        let options = WatchOptions { tenants: tenants.unwrap_or_default(), cursors };
        PyEvents(Mutex::new(self.0.watch(options)))
    }

    fn __repr__(&self) -> String {
        format!("<Client {}>", self.0.endpoint())
    }
}

macro_rules! record {
    ($(#[$doc:meta])* $name:ident as $python:literal { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[pyclass(name = $python, module = "kvd", frozen, get_all)]
        pub(crate) struct $name { $($field: $type),* }

        #[pymethods]
        impl $name {
            fn __repr__(&self) -> String {
                let fields = [$(format!(concat!(stringify!($field), "={:?}"), self.$field)),*];
                format!("{}({})", $python, fields.join(", "))
            }
        }
    };
}

record! {
    /// What the daemon says of itself.
    Described as "Description" {
        node: String,
        version: String,
        epoch: u64,
        shards: u32,
        keys_per_request_max: u32,
        block_bytes_max: u32,
        principal: String,
        peers: Vec<String>,
        object: bool,
    }
}
record! {
    /// What a pin did.
    PyPinned as "Pinned" { pinned: u32, absent: u32 }
}
record! {
    /// What a prefetch did.
    PyPrefetched as "Prefetched" { started: u32, resident: u32 }
}
record! {
    /// What an eviction did.
    PyEvicted as "Evicted" { evicted: u32, in_use: u32, absent: u32 }
}
record! {
    /// One event.
    PyEvent as "Event" {
        kind: &'static str,
        key: Option<Vec<u8>>,
        tier: &'static str,
        binding_tag: Option<u64>,
        number: u64,
    }
}

/// What is here of a sequence of blocks; see `_native.pyi`.
#[pyclass(name = "Lookup", module = "kvd", frozen, get_all)]
pub(crate) struct PyLookup {
    prefix: usize,
    tiers: Vec<&'static str>,
    miss: Option<Py<PyMiss>>,
}

#[pymethods]
impl PyLookup {
    fn __repr__(&self) -> String {
        let miss = self.miss.as_ref().map(|miss| miss.get().0.to_string());
        format!("Lookup(prefix={}, miss={miss:?})", self.prefix)
    }
}

/// Where a block is, among this node and its peers; see `_native.pyi`.
#[pyclass(name = "Sighting", module = "kvd", frozen, get_all)]
pub(crate) struct PySighting {
    node: Option<String>,
    tier: Option<&'static str>,
    miss: Option<Py<PyMiss>>,
}

impl PySighting {
    fn of(py: Python<'_>, sighting: Sighting) -> PyResult<Self> {
        let (node, tier, miss) = match sighting {
            Sighting::Here(tier) => (None, Some(tier.name()), None),
            Sighting::At { node, tier } => (Some(node), Some(tier.name()), None),
            Sighting::Expected { node } => (Some(node), None, None),
            Sighting::Absent(miss) => (None, None, Some(Py::new(py, PyMiss(miss))?)),
        };
        Ok(Self { node, tier, miss })
    }
}

#[pymethods]
impl PySighting {
    fn __repr__(&self) -> String {
        let miss = self.miss.as_ref().map(|miss| miss.get().0.to_string());
        format!("Sighting(node={:?}, tier={:?}, miss={miss:?})", self.node, self.tier)
    }
}

/// A worker's session; see `_native.pyi`.
#[pyclass(name = "Session", module = "kvd", frozen)]
pub(crate) struct PySession(Worker);

fn hashes(list: Vec<Hash>) -> Vec<SequenceHash> {
    list.into_iter().map(|hash| hash.0).collect()
}

fn put_options(class: &str, ttl: Option<f64>, durable: bool) -> PyResult<PutOptions> {
    let ttl = ttl.map(|ttl| seconds("ttl", ttl)).transpose()?;
    Ok(PutOptions { priority: priority(class)?, ttl, durable, after: None })
}

#[pymethods]
impl PySession {
    #[getter]
    fn uses_shared_memory(&self) -> bool {
        matches!(self.0.doors(), Doors::SharedMemory { .. })
    }

    #[getter]
    fn doors(&self) -> String {
        match self.0.doors() {
            Doors::SharedMemory { in_place: true } => "shared memory, in place".into(),
            Doors::SharedMemory { in_place: false } => "shared memory".into(),
            Doors::GrpcOnly { why } => format!("gRPC only: {why}"),
        }
    }

    #[getter]
    fn is_connected(&self) -> bool {
        self.0.is_connected()
    }

    #[getter]
    fn epoch(&self) -> u64 {
        self.0.epoch().0
    }

    #[getter]
    fn deadline(&self) -> f64 {
        self.0.deadline().as_secs_f64()
    }

    fn with_deadline(&self, deadline: f64) -> PyResult<Self> {
        Ok(Self(self.0.with_deadline(seconds("deadline", deadline)?)))
    }

    fn wait_until_connected(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let until = Instant::now() + seconds("timeout", timeout)?.min(Duration::from_secs(600));
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if py.detach(|| self.0.with_deadline(left.min(SIGNAL_LOOK)).wait_until_connected()) {
                return Ok(true);
            }
            if left.is_zero() {
                return Ok(false);
            }
            py.check_signals()?;
        }
    }

    #[pyo3(signature = (scope, block_bytes, *, slice=None))]
    fn register(
        &self,
        py: Python<'_>,
        scope: PyScope,
        block_bytes: u32,
        slice: Option<PySlice>,
    ) -> PyResult<PyBinding> {
        let slice = slice.map_or_else(|| kv_client::Slice::whole(1, 1), |slice| slice.0);
        let bound = py.detach(|| self.0.register(scope.0, slice, block_bytes).wait());
        bound.map(PyBinding).map_err(|error| raised(py, &error))
    }

    #[pyo3(signature = (tensors, layout, *, events=None))]
    fn register_kv_cache(
        &self,
        py: Python<'_>,
        tensors: Vec<Bound<'_, PyAny>>,
        layout: PyCacheLayout,
        events: Option<Vec<Vec<u8>>>,
    ) -> PyResult<PyDeviceCache> {
        let event = |event: Vec<u8>| {
            let bytes = event.len();
            <[u8; 64]>::try_from(event)
                .map_err(|_| PyValueError::new_err(format!("a handle of an event has 64 bytes, not {bytes}")))
        };
        let events = events.unwrap_or_default().into_iter().map(event).collect::<PyResult<_>>()?;
        let spec = devices::spec(py, tensors, layout.0, events)?;
        let cache = py.detach(|| self.0.register_cache(spec).wait());
        cache.map(PyDeviceCache).map_err(|error| raised(py, &error))
    }

    fn lookup(&self, py: Python<'_>, binding: &PyBinding, hashes: Vec<Hash>) -> PyResult<PyLookup> {
        let hashes = self::hashes(hashes);
        let found = py.detach(|| self.0.lookup(&binding.0, &hashes)).map_err(|error| raised(py, &error))?;
        let miss = found.first_miss.map(|(_, miss)| Py::new(py, PyMiss(miss))).transpose()?;
        let tiers = found.tiers.into_iter().map(kv_client::Tier::name).collect::<Vec<_>>();
        Ok(PyLookup { prefix: tiers.len(), tiers, miss })
    }

    #[pyo3(signature = (binding, hashes, *, node=None))]
    fn locate(
        &self,
        py: Python<'_>,
        binding: &PyBinding,
        hashes: Vec<Hash>,
        node: Option<String>,
    ) -> PyResult<Vec<PySighting>> {
        let (keys, node) = (binding.0.keys(&self::hashes(hashes)), node.unwrap_or_default());
        let all = py.detach(|| self.0.locate_keys(&keys, node).wait()).map_err(|error| raised(py, &error))?;
        all.into_iter().map(|one| PySighting::of(py, one)).collect()
    }

    #[pyo3(signature = (binding, hashes, *, wait=0.0))]
    fn acquire<'py>(
        &self,
        py: Python<'py>,
        binding: &PyBinding,
        hashes: Vec<Hash>,
        wait: f64,
    ) -> PyResult<Bound<'py, PyList>> {
        let (hashes, wait) = (self::hashes(hashes), seconds("wait", wait)?);
        let all = py.detach(|| self.0.acquire_many(&binding.0, &hashes, wait));
        let list = PyList::empty(py);
        for got in all.map_err(|error| raised(py, &error))? {
            match got {
                Got::Block(guard) => list.append(Py::new(py, PyBlock::new(guard))?)?,
                Got::Miss(miss) => list.append(Py::new(py, PyMiss(miss))?)?,
            }
        }
        Ok(list)
    }

    /// Waits for blocks that others announced; how many are here from the first on.
    fn wait(&self, py: Python<'_>, binding: &PyBinding, hashes: Vec<Hash>, timeout: f64) -> PyResult<usize> {
        let (hashes, timeout) = (self::hashes(hashes), seconds("timeout", timeout)?);
        let all = py.detach(|| {
            let all = self.0.acquire_many(&binding.0, &hashes, timeout)?;
            Ok(all.iter().take_while(|got| got.miss().is_none()).count())
        });
        all.map_err(|error: kv_client::Error| raised(py, &error))
    }

    fn get<'py>(
        &self,
        py: Python<'py>,
        binding: &PyBinding,
        hash: Hash,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let got = py.detach(|| self.0.get(&binding.0, &hash.0)).map_err(|error| raised(py, &error))?;
        Ok(got.map(|bytes| PyBytes::new(py, &bytes)))
    }

    #[pyo3(signature = (binding, hash, data, *, priority="normal", ttl=None, durable=false))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn put(
        &self,
        py: Python<'_>,
        binding: &PyBinding,
        hash: Hash,
        data: &Bound<'_, PyAny>,
        priority: &str,
        ttl: Option<f64>,
        durable: bool,
    ) -> PyResult<bool> {
        let (data, options) = (BorrowedBytes::of(data)?, put_options(priority, ttl, durable)?);
        let stored = py.detach(|| self.0.put_with(&binding.0, &hash.0, data.bytes(), &options));
        stored.map(|stored| !stored.already).map_err(|error| raised(py, &error))
    }

    #[pyo3(signature = (binding, blocks, *, priority="normal", ttl=None, durable=false))]
    fn put_many<'py>(
        &self,
        py: Python<'py>,
        binding: &PyBinding,
        blocks: Vec<(Hash, Bound<'py, PyAny>)>,
        priority: &str,
        ttl: Option<f64>,
        durable: bool,
    ) -> PyResult<Bound<'py, PyList>> {
        let options = put_options(priority, ttl, durable)?;
        let borrow = |(hash, data): (Hash, Bound<'py, PyAny>)| Ok((hash.0, BorrowedBytes::of(&data)?));
        let blocks = blocks.into_iter().map(borrow).collect::<PyResult<Vec<_>>>()?;
        let all = py.detach(|| {
            let blocks: Vec<_> = blocks.iter().map(|(hash, data)| (*hash, data.bytes())).collect();
            self.0.put_many(&binding.0, &blocks, &options)
        });
        let list = PyList::empty(py);
        for one in all.map_err(|error| raised(py, &error))? {
            match one {
                Ok(stored) => list.append(!stored.already)?,
                Err(error) => list.append(exception(py, &error)?)?,
            }
        }
        Ok(list)
    }

    #[pyo3(signature = (binding, hash, *, priority="normal", ttl=None, durable=false))]
    fn reserve(
        &self,
        py: Python<'_>,
        binding: &PyBinding,
        hash: Hash,
        priority: &str,
        ttl: Option<f64>,
        durable: bool,
    ) -> PyResult<Option<PyReservation>> {
        let options = put_options(priority, ttl, durable)?;
        let room = py.detach(|| self.0.reserve_with(&binding.0, &hash.0, &options));
        Ok(room.map_err(|error| raised(py, &error))?.map(PyReservation::new))
    }

    fn pin(&self, py: Python<'_>, binding: &PyBinding, hashes: Vec<Hash>, ttl: f64) -> PyResult<PyPinned> {
        let (hashes, ttl) = (self::hashes(hashes), seconds("ttl", ttl)?);
        let did = py.detach(|| self.0.pin(&binding.0, &hashes, ttl).wait());
        let did = did.map_err(|error| raised(py, &error))?;
        Ok(PyPinned { pinned: did.pinned, absent: did.absent })
    }

    fn unpin(&self, py: Python<'_>, binding: &PyBinding, hashes: Vec<Hash>) -> PyResult<u32> {
        let hashes = self::hashes(hashes);
        py.detach(|| self.0.unpin(&binding.0, &hashes).wait()).map_err(|error| raised(py, &error))
    }

    #[pyo3(signature = (binding, hashes, *, node=None))]
    fn prefetch(
        &self,
        py: Python<'_>,
        binding: &PyBinding,
        hashes: Vec<Hash>,
        node: Option<String>,
    ) -> PyResult<PyPrefetched> {
        let (hashes, node) = (self::hashes(hashes), node.unwrap_or_default());
        let did = py.detach(|| self.0.prefetch_from(&binding.0, &hashes, node).wait());
        let did = did.map_err(|error| raised(py, &error))?;
        Ok(PyPrefetched { started: did.started, resident: did.resident })
    }

    #[pyo3(signature = (binding, hashes, *, tier=None))]
    fn evict(
        &self,
        py: Python<'_>,
        binding: &PyBinding,
        hashes: Vec<Hash>,
        tier: Option<&str>,
    ) -> PyResult<PyEvicted> {
        let (hashes, tier) = (self::hashes(hashes), tier.map(self::tier).transpose()?);
        let did = py.detach(|| self.0.evict(&binding.0, &hashes, tier).wait());
        let did = did.map_err(|error| raised(py, &error))?;
        Ok(PyEvicted { evicted: did.evicted, in_use: did.in_use, absent: did.absent })
    }

    fn explain(&self, py: Python<'_>, binding: &PyBinding, hash: Hash) -> PyResult<Option<PyMiss>> {
        let told = py.detach(|| self.0.explain(&binding.0, &hash.0).wait());
        Ok(told.map_err(|error| raised(py, &error))?.map(PyMiss))
    }

    fn __repr__(&self) -> String {
        let doors = self.doors();
        format!("<Session {} of epoch {}, {doors}>", self.0.session().0, self.0.epoch().0)
    }
}

/// Some events of one shard; see `_native.pyi`.
#[pyclass(name = "EventBatch", module = "kvd", frozen, get_all)]
pub(crate) struct PyEventBatch {
    cursor: (u16, u64, u64),
    snapshot: bool,
    snapshot_end: bool,
    events: Vec<Py<PyEvent>>,
}

/// A subscription; see `_native.pyi`.
#[pyclass(name = "Events", module = "kvd", frozen)]
pub(crate) struct PyEvents(Mutex<Events>);

#[pymethods]
impl PyEvents {
    /// The next batch, or `None` when none came in time.
    fn next(&self, py: Python<'_>, timeout: f64) -> PyResult<Option<PyEventBatch>> {
        let until = Instant::now() + seconds("timeout", timeout)?.min(Duration::from_secs(600));
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let came = py.detach(|| {
                let mut events = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                events.next_within(left.min(SIGNAL_LOOK))
            });
            match came {
                Some(batch) => return batch_of(py, batch.map_err(|error| raised(py, &error))?).map(Some),
                None if left.is_zero() => return Ok(None),
                None => py.check_signals()?,
            }
        }
    }
}

fn batch_of(py: Python<'_>, batch: kv_client::EventBatch) -> PyResult<PyEventBatch> {
    let event = |event: kv_client::BlockEvent| {
        use kv_client::EventKind;
        let (kind, key, tier, binding_tag) = match event.kind {
            EventKind::Stored { key, tag, tier } => ("stored", Some(key), tier, Some(tag.0)),
            EventKind::Removed { key, tier } => ("removed", Some(key), tier, None),
            EventKind::Cleared { tier } => ("cleared", None, tier, None),
        };
        let key = key.map(|key| key.as_bytes().to_vec());
        Py::new(py, PyEvent { kind, key, tier: tier.name(), binding_tag, number: event.number })
    };
    let at = batch.cursor;
    Ok(PyEventBatch {
        cursor: (at.shard.0, at.epoch.0, at.number),
        snapshot: batch.snapshot,
        snapshot_end: batch.snapshot_end,
        events: batch.events.into_iter().map(event).collect::<PyResult<_>>()?,
    })
}
