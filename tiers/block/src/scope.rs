//! What the bytes of a block mean. Two configurations that differ in any field never share a byte.
//!
//! The scope id is BLAKE3 over this canonical record (all integers little-endian):
//! ```text
//! "kvd.scope.v1" | kind u8 | block_tokens u32 | then for each text field, in the order of `fields`:
//! length u32 | bytes
//! ```
//! A new field means a new version string, so an old id can never be derived from a new record.

use serde::{Deserialize, Serialize};

use crate::{BindingTag, BlockKey, Namer, ScopeId, SequenceHash, Slice};

/// What kind of tensor the blocks of a scope are cut from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScopeKind {
    /// Attention keys and values of a token prefix.
    #[default]
    Kv,
    /// An encoder's output, keyed by content.
    Embedding,
    /// A piece of a weights file.
    Weights,
}

impl ScopeKind {
    /// Every kind, in canonical order.
    pub const ALL: [Self; 3] = [Self::Kv, Self::Embedding, Self::Weights];

    /// The kind's name in text and protocol.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::Embedding => "embedding",
            Self::Weights => "weights",
        }
    }
}

/// The record that gives blocks their identity. Empty text means "does not apply", which is a value too.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scope {
    /// What is cut into blocks.
    pub kind: ScopeKind,
    /// Tokens in one block; 0 only where blocks are not made of tokens.
    pub block_tokens: u32,
    /// Model name as the engine was given it.
    pub model: String,
    /// Revision or digest of the weights.
    pub weights: String,
    /// Digest of the tokenizer.
    pub tokenizer: String,
    /// Element type and quantisation of the cached tensor, such as `bf16` or `fp8_e4m3`.
    pub dtype: String,
    /// Attention group: `full`, `sliding:4096`, `mla`, `state:...`.
    pub attention: String,
    /// Memory order of a block, such as `layer,kv,head,token,dim`.
    pub layout: String,
    /// Adapter name and revision, empty without one.
    pub lora: String,
    /// Who pays: `[a-z0-9-]{1,63}`. Quotas and purges are per tenant.
    pub tenant: String,
    /// Secret of the tenant. Goes into the id, never into a log or a file.
    #[serde(skip_serializing)]
    pub salt: String,
}

/// Why a scope was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ScopeError {
    /// The tenant is not a label.
    #[error("tenant `{tenant}` is not of the form [a-z0-9-]{{1,63}}")]
    Tenant {
        /// What was given.
        tenant: String,
    },
    /// A text field is longer than [`Scope::FIELD_BYTES_MAX`].
    #[error("scope field `{field}` has {bytes} bytes, {max} are allowed", max = Scope::FIELD_BYTES_MAX)]
    Long {
        /// Which field.
        field: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// A scope without a model names nothing.
    #[error("scope field `model` is empty")]
    NoModel,
}

impl Scope {
    /// Longest text field accepted.
    pub const FIELD_BYTES_MAX: usize = 1024;
    const VERSION: &'static [u8] = b"kvd.scope.v1";

    fn texts(&self) -> [(&'static str, &str); 9] {
        [
            ("model", &self.model),
            ("weights", &self.weights),
            ("tokenizer", &self.tokenizer),
            ("dtype", &self.dtype),
            ("attention", &self.attention),
            ("layout", &self.layout),
            ("lora", &self.lora),
            ("tenant", &self.tenant),
            ("salt", &self.salt),
        ]
    }

    /// Whether a tenant can have this name: 1 to 63 of a-z, 0-9 and '-'.
    pub fn is_tenant(name: &str) -> bool {
        let label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        (1..=63).contains(&name.len()) && name.bytes().all(label)
    }

    /// Checks what the type alone cannot: lengths, the tenant's form, that there is a model.
    pub fn validate(&self) -> Result<(), ScopeError> {
        for (field, text) in self.texts() {
            if text.len() > Self::FIELD_BYTES_MAX {
                return Err(ScopeError::Long { field, bytes: text.len() });
            }
        }
        if !Self::is_tenant(&self.tenant) {
            return Err(ScopeError::Tenant { tenant: self.tenant.clone() });
        }
        if self.model.is_empty() {
            return Err(ScopeError::NoModel);
        }
        Ok(())
    }

    /// BLAKE3 of the canonical record.
    pub fn id(&self) -> ScopeId {
        let mut hasher = blake3::Hasher::new();
        hasher.update(Self::VERSION);
        hasher.update(&[self.kind as u8]);
        hasher.update(&self.block_tokens.to_le_bytes());
        for (_, text) in self.texts() {
            hasher.update(&(text.len() as u32).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        ScopeId(*hasher.finalize().as_bytes())
    }

    /// Names of the fields in which the two differ, in canonical order. The salt is named, not shown.
    pub fn differing_fields(&self, other: &Self) -> Vec<&'static str> {
        let mut fields = Vec::new();
        if self.kind != other.kind {
            fields.push("kind");
        }
        if self.block_tokens != other.block_tokens {
            fields.push("block_tokens");
        }
        let pairs = self.texts().into_iter().zip(other.texts());
        fields.extend(pairs.filter(|(mine, theirs)| mine.1 != theirs.1).map(|(mine, _)| mine.0));
        fields
    }
}

impl ScopeId {
    /// The key of the block that holds `slice` of the tokens named by `hash`, in this scope.
    pub fn block_key(&self, hash: &SequenceHash, slice: &Slice) -> BlockKey {
        self.namer(slice).key(hash)
    }

    /// What gives the blocks that hold `slice` in this scope their keys.
    pub fn namer(&self, slice: &Slice) -> Namer {
        Namer::new(*self, slice)
    }

    /// What the binding of this scope, `slice` and block length is called across restarts.
    pub fn binding_tag(&self, slice: &Slice, block_bytes: u32) -> BindingTag {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(b"binding");
        hasher.update(&slice.encode());
        hasher.update(&block_bytes.to_le_bytes());
        BindingTag(u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("eight bytes")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope() -> Scope {
        Scope { model: "m".into(), tenant: "a".into(), block_tokens: 16, ..Scope::default() }
    }

    #[test]
    fn every_field_changes_the_id_and_is_named_in_the_difference() {
        let base = scope();
        type Change = fn(&mut Scope);
        let changes: [(&str, Change); 11] = [
            ("kind", |s| s.kind = ScopeKind::Weights),
            ("block_tokens", |s| s.block_tokens = 32),
            ("model", |s| s.model = "n".into()),
            ("weights", |s| s.weights = "1".into()),
            ("tokenizer", |s| s.tokenizer = "1".into()),
            ("dtype", |s| s.dtype = "1".into()),
            ("attention", |s| s.attention = "1".into()),
            ("layout", |s| s.layout = "1".into()),
            ("lora", |s| s.lora = "1".into()),
            ("tenant", |s| s.tenant = "b".into()),
            ("salt", |s| s.salt = "1".into()),
        ];
        let mut seen = std::collections::HashSet::from([base.id()]);
        for (field, change) in changes {
            let mut other = base.clone();
            change(&mut other);
            assert_eq!(base.differing_fields(&other), [field]);
            assert!(seen.insert(other.id()), "{field} does not reach the id");
        }
    }

    #[test]
    fn text_cannot_move_between_fields() {
        let left = Scope { weights: "ab".into(), ..scope() };
        let right = Scope { weights: "a".into(), tokenizer: "b".into(), ..scope() };
        assert_ne!(left.id(), right.id());
    }

    #[test]
    fn scope_ids_are_stable() {
        // Names outlive the program that made them: a change here orphans every stored block.
        assert_eq!(
            scope().id().to_string(),
            "25761cc738ea68c3d55b88042618b715197c530a24c901846bf316c5c571a97f"
        );
        let key = scope().id().block_key(&SequenceHash::from(7), &Slice::whole(2, 4));
        assert_eq!(key.to_string(), "3bac0924c277bdf44f4843f436950f7d");
    }

    #[test]
    fn tenants_are_labels() {
        for bad in ["", "A", "a_b", "a/../b", &"a".repeat(64)] {
            let refused = Scope { tenant: bad.into(), ..scope() }.validate();
            assert_eq!(refused, Err(ScopeError::Tenant { tenant: bad.into() }));
        }
    }
}
