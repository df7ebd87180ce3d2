//! The Python package `kvd`, as far as it is Rust: [`kv_client`] in Python's words.
//!
//! What each class and method means to its callers stands in `kvd/_native.pyi`, where Python's tools look for
//! it. Every call that may wait or copy lets go of the interpreter lock meanwhile.
//!
//! ```text
//!   session.rs  Client, Session, Events: one method for one of kv_client
//!   block.rs    Block and Reservation: buffers over shared memory
//!   buffer.rs   raw memory, ours and Python's
//!   devices.rs  CacheLayout, DeviceCache and what it does; memory of a GPU by its address
//!   names.rs    Scope, Slice, Binding, hashes, Miss
//!   errors.rs   faults as exceptions of kvd/errors.py
//! ```

mod block;
mod buffer;
mod devices;
mod errors;
mod names;
mod session;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(session::connect, module)?)?;
    module.add_class::<session::PyClient>()?;
    module.add_class::<session::PySession>()?;
    module.add_class::<session::PyEvents>()?;
    module.add_class::<session::PyEventBatch>()?;
    module.add_class::<session::PyEvent>()?;
    module.add_class::<session::Described>()?;
    module.add_class::<session::PyLookup>()?;
    module.add_class::<session::PySighting>()?;
    module.add_class::<session::PyPinned>()?;
    module.add_class::<session::PyPrefetched>()?;
    module.add_class::<session::PyEvicted>()?;
    module.add_class::<block::PyBlock>()?;
    module.add_class::<block::PyReservation>()?;
    module.add_class::<devices::PyCacheLayout>()?;
    module.add_class::<devices::PyDeviceCache>()?;
    module.add_class::<devices::PyLayerSave>()?;
    module.add_class::<devices::PyLoad>()?;
    module.add_class::<names::PyScope>()?;
    module.add_class::<names::PySlice>()?;
    module.add_class::<names::PyBinding>()?;
    module.add_class::<names::PyMiss>()?;
    Ok(())
}
