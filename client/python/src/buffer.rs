//! Memory that Python and we look at together: the only place of this crate with raw pointers, because the
//! buffer protocol is made of them.

#![expect(unsafe_code, reason = "the buffer protocol hands out and takes raw pointers")]

use std::ffi::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

/// Bytes of a Python object, borrowed for as long as this lives.
pub(crate) struct BorrowedBytes(PyUntypedBuffer);

impl BorrowedBytes {
    /// The bytes of anything with a contiguous buffer: `bytes`, `memoryview`, arrays of any element type.
    pub(crate) fn of(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object)?;
        if !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err("the buffer is not contiguous; copy it first"));
        }
        Ok(Self(buffer))
    }

    /// The same of something that may be written to.
    pub(crate) fn of_writable(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let borrowed = Self::of(object)?;
        if borrowed.0.readonly() {
            return Err(PyBufferError::new_err("the buffer is read-only"));
        }
        Ok(borrowed)
    }

    /// Copies `bytes` over all of it.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> PyResult<()> {
        let (at, len) = (self.0.buf_ptr().cast::<u8>(), self.0.len_bytes());
        if len != bytes.len() || self.0.readonly() {
            return Err(PyBufferError::new_err(format!("{} bytes do not go into {len}", bytes.len())));
        }
        // SAFETY: the exporter keeps `len` writable bytes at `at` in place until the buffer is released; a copy
        // that may overlap is right even when they are a view of the source.
        unsafe { std::ptr::copy(bytes.as_ptr(), at, len) };
        Ok(())
    }

    /// The bytes. Whoever changes them meanwhile stores a mixture.
    pub(crate) fn bytes(&self) -> &[u8] {
        let (at, len) = (self.0.buf_ptr().cast::<u8>(), self.0.len_bytes());
        if len == 0 {
            return &[];
        }
        // SAFETY: the exporter keeps `len` bytes at `at` in place until the buffer is released, which happens
        // when `self` is dropped. Another Python thread may write to them while we read; they are only ever
        // copied as bytes, for which every value is valid, and the checksum is taken of the copy.
        unsafe { std::slice::from_raw_parts(at, len) }
    }
}

/// How many views of an object Python holds.
#[derive(Default)]
pub(crate) struct Exports(AtomicUsize);

impl Exports {
    /// Refuses to take memory away that somebody looks at.
    pub(crate) fn none(&self, what: &str) -> PyResult<()> {
        match self.0.load(Ordering::Acquire) {
            0 => Ok(()),
            count => Err(PyBufferError::new_err(format!(
                "{count} views of the memory exist; drop them before {what}"
            ))),
        }
    }

    /// One view is gone.
    pub(crate) fn released(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }

    /// Fills `view` with `len` bytes at `at`, which belong to `owner`.
    ///
    /// # Safety
    /// `view` is what Python passed to `__getbuffer__`. The bytes stay where they are while `owner` lives and
    /// counts exports, and may be written unless `readonly`.
    pub(crate) unsafe fn export(
        &self,
        owner: &Bound<'_, PyAny>,
        (at, len): (*mut u8, usize),
        readonly: bool,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        let len = ffi::Py_ssize_t::try_from(len)?;
        // SAFETY: the caller vouches for `view` and the bytes; `owner` is a live object, of which the view
        // takes a reference.
        let filled = unsafe {
            ffi::PyBuffer_FillInfo(view, owner.as_ptr(), at.cast(), len, c_int::from(readonly), flags)
        };
        if filled != 0 {
            return Err(PyErr::fetch(owner.py()));
        }
        self.0.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}
