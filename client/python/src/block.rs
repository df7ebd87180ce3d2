//! Blocks open for reading, and room for blocks to come: both are buffers.

#![expect(unsafe_code, reason = "the methods of the buffer protocol are unsafe by their signature")]

use std::ffi::c_int;
use std::sync::{Mutex, PoisonError};

use kv_client::{BlockGuard, Reservation};
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::buffer::{BorrowedBytes, Exports};
use crate::errors::raised;

/// A block open for reading; see `_native.pyi`.
#[pyclass(name = "Block", module = "kvd", frozen)]
pub(crate) struct PyBlock {
    /// `None` once released.
    guard: Mutex<Option<BlockGuard>>,
    exports: Exports,
}

impl PyBlock {
    pub(crate) fn new(guard: BlockGuard) -> Self {
        Self { guard: Mutex::new(Some(guard)), exports: Exports::default() }
    }

    fn with<T>(&self, what: impl FnOnce(&BlockGuard) -> T) -> PyResult<T> {
        let guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        guard.as_ref().map(what).ok_or_else(|| PyValueError::new_err("the block was released"))
    }
}

#[pymethods]
impl PyBlock {
    #[getter]
    fn key<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.with(|guard| PyBytes::new(py, guard.key().as_bytes()))
    }

    #[getter]
    fn is_zero_copy(&self) -> PyResult<bool> {
        self.with(BlockGuard::is_zero_copy)
    }

    #[getter]
    fn is_valid(&self) -> PyResult<bool> {
        self.with(BlockGuard::still_valid)
    }

    fn verify(&self, py: Python<'_>) -> PyResult<bool> {
        py.detach(|| self.with(BlockGuard::verify))
    }

    fn tobytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        self.with(|guard| PyBytes::new(py, guard))
    }

    fn copy_into(&self, py: Python<'_>, target: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut target = BorrowedBytes::of_writable(target)?;
        py.detach(|| self.with(|guard| target.write(guard)))?
    }

    fn release(&self) -> PyResult<()> {
        let mut guard = self.guard.lock().unwrap_or_else(PoisonError::into_inner);
        self.exports.none("the block is released")?;
        *guard = None;
        Ok(())
    }

    fn __len__(&self) -> PyResult<usize> {
        self.with(|guard| guard.len())
    }

    fn __bool__(&self) -> bool {
        true
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __exit__(
        &self,
        _class: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.release()
    }

    fn __repr__(&self) -> String {
        self.with(|guard| format!("<Block {}, {} bytes>", guard.key(), guard.len()))
            .unwrap_or_else(|_| "<Block, released>".into())
    }

    unsafe fn __getbuffer__(slf: &Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let guard = this.guard.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = guard.as_deref().ok_or_else(|| PyBufferError::new_err("the block was released"))?;
        let place = (bytes.as_ptr().cast_mut(), bytes.len());
        // SAFETY: `view` is Python's. The guard keeps the bytes in place and is not taken out while there are
        // exports (`release` asks, under the same lock); the view is read-only.
        unsafe { this.exports.export(slf.as_any(), place, true, view, flags) }
    }

    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.exports.released();
    }
}

/// Room for one announced block; see `_native.pyi`.
#[pyclass(name = "Reservation", module = "kvd", frozen)]
pub(crate) struct PyReservation {
    /// `None` once committed or taken back.
    room: Mutex<Option<Reservation>>,
    exports: Exports,
}

impl PyReservation {
    pub(crate) fn new(room: Reservation) -> Self {
        Self { room: Mutex::new(Some(room)), exports: Exports::default() }
    }

    fn take(&self, what: &str) -> PyResult<Option<Reservation>> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        self.exports.none(what)?;
        Ok(room.take())
    }
}

fn over() -> PyErr {
    PyValueError::new_err("the reservation is over: it was committed or taken back")
}

#[pymethods]
impl PyReservation {
    #[getter]
    fn key<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let room = room.as_ref().ok_or_else(over)?;
        Ok(PyBytes::new(py, room.key().as_bytes()))
    }

    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let data = BorrowedBytes::of(data)?;
        py.detach(|| {
            let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
            let room = room.as_mut().ok_or_else(over)?;
            if data.bytes().len() != room.len() {
                let text = format!("{} bytes for a block of {}", data.bytes().len(), room.len());
                return Err(PyValueError::new_err(text));
            }
            room.write(data.bytes());
            Ok(())
        })
    }

    fn commit(&self, py: Python<'_>) -> PyResult<bool> {
        let room = self.take("the block is committed")?.ok_or_else(over)?;
        let stored = py.detach(|| room.commit()).map_err(|error| raised(py, &error))?;
        Ok(!stored.already)
    }

    fn abort(&self, py: Python<'_>) -> PyResult<()> {
        let room = self.take("the reservation is taken back")?;
        py.detach(|| drop(room));
        Ok(())
    }

    fn __len__(&self) -> PyResult<usize> {
        let room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        room.as_ref().map(|room| room.len()).ok_or_else(over)
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// Takes back what was not committed.
    fn __exit__(
        &self,
        py: Python<'_>,
        _class: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.abort(py)
    }

    unsafe fn __getbuffer__(slf: &Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let mut room = this.room.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = room.as_deref_mut().ok_or_else(over)?;
        let place = (bytes.as_mut_ptr(), bytes.len());
        // SAFETY: `view` is Python's. The room keeps the bytes in place and is not taken out while there are
        // exports (`take` asks, under the same lock). They are nobody else's until the block is committed.
        unsafe { this.exports.export(slf.as_any(), place, false, view, flags) }
    }

    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.exports.released();
    }
}
