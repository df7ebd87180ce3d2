//! What Python calls things: scopes, slices, hashes, tiers, reasons.

use std::time::Duration;

use kv_client::{Binding as Bound_, Miss, Priority, Scope, ScopeKind, SequenceHash, Slice, Tier};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};

/// What the bytes of a block mean; see `_native.pyi`.
#[pyclass(name = "Scope", module = "kvd", frozen, eq, hash, from_py_object)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyScope(pub(crate) Scope);

#[pymethods]
impl PyScope {
    #[new]
    #[pyo3(signature = (
        model, *, block_tokens, tenant="default", weights="", tokenizer="", dtype="", attention="full",
        layout="", lora="", salt="", kind="kv"
    ))]
    #[expect(clippy::too_many_arguments, reason = "they are keywords in Python")]
    fn new(
        model: String,
        block_tokens: u32,
        tenant: &str,
        weights: &str,
        tokenizer: &str,
        dtype: &str,
        attention: &str,
        layout: &str,
        lora: &str,
        salt: &str,
        kind: &str,
    ) -> PyResult<Self> {
        let known = ScopeKind::ALL.into_iter().find(|known| known.name() == kind);
        let kind = known
            .ok_or_else(|| PyValueError::new_err(format!("kind `{kind}`: one of kv, embedding, weights")))?;
        let scope = Scope {
            kind,
            block_tokens,
            model,
            weights: weights.into(),
            tokenizer: tokenizer.into(),
            dtype: dtype.into(),
            attention: attention.into(),
            layout: layout.into(),
            lora: lora.into(),
            tenant: tenant.into(),
            salt: salt.into(),
        };
        scope.validate().map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(Self(scope))
    }

    #[getter]
    fn model(&self) -> &str {
        &self.0.model
    }

    #[getter]
    fn block_tokens(&self) -> u32 {
        self.0.block_tokens
    }

    #[getter]
    fn tenant(&self) -> &str {
        &self.0.tenant
    }

    fn __repr__(&self) -> String {
        // Without the salt, which is a secret.
        let Scope { model, tenant, block_tokens, dtype, layout, lora, attention, .. } = &self.0;
        format!(
            "Scope({model:?}, block_tokens={block_tokens}, tenant={tenant:?}, dtype={dtype:?}, \
             attention={attention:?}, layout={layout:?}, lora={lora:?})"
        )
    }
}

/// Which part of a block's tensor a piece is; see `_native.pyi`.
#[pyclass(name = "Slice", module = "kvd", frozen, eq, hash, from_py_object)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PySlice(pub(crate) Slice);

#[pymethods]
impl PySlice {
    #[new]
    #[pyo3(signature = (layers, heads, *, layer_range=None, head_range=None))]
    fn new(
        layers: u16,
        heads: u16,
        layer_range: Option<(u16, u16)>,
        head_range: Option<(u16, u16)>,
    ) -> PyResult<Self> {
        let (from, to) = layer_range.unwrap_or((0, layers));
        let (head_from, head_to) = head_range.unwrap_or((0, heads));
        let slice =
            Slice { layers: from..to, heads: head_from..head_to, layers_total: layers, heads_total: heads };
        slice.validate().map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(Self(slice))
    }

    fn __repr__(&self) -> String {
        format!("<Slice {}>", self.0)
    }
}

/// A registered scope, slice and block length; see `_native.pyi`.
#[pyclass(name = "Binding", module = "kvd", frozen)]
pub(crate) struct PyBinding(pub(crate) Bound_);

#[pymethods]
impl PyBinding {
    #[getter]
    fn block_bytes(&self) -> u32 {
        self.0.block_bytes()
    }

    #[getter]
    fn scope(&self) -> PyScope {
        PyScope(self.0.scope().clone())
    }

    #[getter]
    fn scope_id(&self) -> String {
        self.0.scope_id().to_string()
    }

    fn key<'py>(&self, py: Python<'py>, hash: Hash) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.key(&hash.0).as_bytes())
    }

    fn __repr__(&self) -> String {
        format!("<Binding {} {}, {} bytes>", self.0.scope().model, self.0.slice(), self.0.block_bytes())
    }
}

/// A sequence hash as Python writes it: 8 to 64 bytes, their hex form, or an integer of 64 bits.
#[derive(Clone, Copy)]
pub(crate) struct Hash(pub(crate) SequenceHash);

impl<'py> FromPyObject<'_, 'py> for Hash {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(bytes) = object.cast::<PyBytes>() {
            let bytes = bytes.as_bytes();
            return SequenceHash::new(bytes).map(Self).ok_or_else(|| {
                PyValueError::new_err(format!("a sequence hash has 8 to 64 bytes, not {}", bytes.len()))
            });
        }
        if let Ok(text) = object.cast::<PyString>() {
            let text = text.to_cow()?;
            let hash = text.parse::<SequenceHash>();
            return hash.map(Self).map_err(|error| PyValueError::new_err(format!("hash `{text}`: {error}")));
        }
        if let Ok(number) = object.extract::<u64>() {
            return Ok(Self(number.into()));
        }
        // Some engines write the same 64 bits as a signed number.
        if let Ok(number) = object.extract::<i64>() {
            return Ok(Self((number as u64).into()));
        }
        let class = object.get_type().name()?.to_string();
        Err(PyTypeError::new_err(format!(
            "a sequence hash is bytes, a hex string or an integer of 64 bits, not {class}"
        )))
    }
}

/// Why a block is not there; see `_native.pyi`.
#[pyclass(name = "Miss", module = "kvd", frozen)]
pub(crate) struct PyMiss(pub(crate) Miss);

#[pymethods]
impl PyMiss {
    #[getter]
    fn reason(&self) -> String {
        self.0.reason.to_string()
    }

    #[getter]
    fn fields(&self) -> Vec<String> {
        self.0.fields.clone()
    }

    /// So that `if block:` tells a block from a miss.
    fn __bool__(&self) -> bool {
        false
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        format!("<Miss {}>", self.0)
    }
}

/// A time in seconds, as Python gives it.
pub(crate) fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| PyValueError::new_err(format!("{name}: {value} is not a number of seconds")))
}

/// A retention class by name.
pub(crate) fn priority(name: &str) -> PyResult<Priority> {
    let known = Priority::ALL.into_iter().find(|known| known.name() == name);
    known.ok_or_else(|| {
        let names = Priority::ALL.map(Priority::name).join(", ");
        PyValueError::new_err(format!("priority `{name}`: one of {names}"))
    })
}

/// A tier by name.
pub(crate) fn tier(name: &str) -> PyResult<Tier> {
    let known = Tier::ALL.into_iter().find(|known| known.name() == name);
    known.ok_or_else(|| {
        let names = Tier::ALL.map(Tier::name).join(", ");
        PyValueError::new_err(format!("tier `{name}`: one of {names}"))
    })
}
