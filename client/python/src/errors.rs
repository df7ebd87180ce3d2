//! Faults as Python exceptions: one class for each thing that a caller should do, in `kvd/errors.py`.

use kv_client::{Error, FaultKind};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

fn class_name(kind: FaultKind) -> &'static str {
    match kind {
        FaultKind::NotFound => "NotFound",
        FaultKind::Busy => "Busy",
        FaultKind::Full => "Full",
        FaultKind::Moved => "Moved",
        FaultKind::Fenced => "Fenced",
        FaultKind::LeaseExpired => "LeaseExpired",
        FaultKind::Corrupt => "Corrupt",
        FaultKind::Invalid => "Invalid",
        FaultKind::Unsupported => "Unsupported",
        FaultKind::Timeout => "DeadlineExceeded",
        FaultKind::Unavailable => "Unavailable",
        FaultKind::Denied => "Denied",
        FaultKind::Internal => "Internal",
    }
}

/// The exception object for an error, not raised.
pub(crate) fn exception<'py>(py: Python<'py>, error: &Error) -> PyResult<Bound<'py, PyAny>> {
    let class = py.import("kvd.errors")?.getattr(class_name(error.kind()))?;
    let named = PyDict::new(py);
    named.set_item("code", error.code().map(|code| code.to_string()))?;
    named.set_item("retry_after", error.retry_after().map(|wait| wait.as_secs_f64()))?;
    class.call((PyString::new(py, &error.to_string()),), Some(&named))
}

/// An exception of one of those classes, to be raised where no fault of the daemon's is behind it.
pub(crate) fn of_class(py: Python<'_>, class: &str, message: &str) -> PyErr {
    let made = py.import("kvd.errors").and_then(|errors| errors.getattr(class)?.call1((message,)));
    made.map_or_else(|other| other, PyErr::from_value)
}

/// An error, to be raised.
pub(crate) fn raised(py: Python<'_>, error: &Error) -> PyErr {
    match exception(py, error) {
        Ok(exception) => PyErr::from_value(exception),
        Err(other) => PyRuntimeError::new_err(format!("{error} (and its class is missing: {other})")),
    }
}
