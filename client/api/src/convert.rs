//! Messages <-> block types. A wrong message stops here with the field named.

use kv_block::code::Code;
use kv_block::layout::{Content, EngineLayout, Place, Shape, Step, Strides, TensorIndex};
use kv_block::{BlockKey, Fault, MissReason, Priority, Scope, ScopeKind, SequenceHash, Slice, Tier};

use crate::v1;

fn bad(message: String) -> Fault {
    Fault::new(Code::BadRequest, message)
}

/// A 16-byte key.
pub fn key(bytes: &[u8]) -> Result<BlockKey, Fault> {
    BlockKey::from_slice(bytes).ok_or_else(|| bad(format!("a key has 16 bytes, not {}", bytes.len())))
}

/// A sequence hash of 8 to 64 bytes.
pub fn sequence_hash(bytes: &[u8]) -> Result<SequenceHash, Fault> {
    SequenceHash::new(bytes)
        .ok_or_else(|| bad(format!("a sequence hash has 8 to 64 bytes, not {}", bytes.len())))
}

/// Blocks as a request names them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Names {
    /// By key.
    Keys(Vec<BlockKey>),
    /// By binding number and sequence hash.
    Hashes {
        /// Binding number; not yet checked against the registry.
        binding: u32,
        /// The engine's hashes, in prefix order.
        hashes: Vec<SequenceHash>,
    },
}

impl Names {
    /// How many blocks are named.
    pub fn len(&self) -> usize {
        match self {
            Self::Keys(keys) => keys.len(),
            Self::Hashes { hashes, .. } => hashes.len(),
        }
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The names in a request; `max` is `limits.keys_per_request_max`.
pub fn names(message: Option<&v1::Names>, max: usize) -> Result<Names, Fault> {
    let message = message.ok_or_else(|| bad("field `names` is missing".into()))?;
    let count = message.keys.len().max(message.sequence_hashes.len());
    if count > max {
        return Err(Fault::new(
            Code::BatchTooLarge,
            format!("{count} blocks named, {max} are allowed at once"),
        ));
    }
    match (message.keys.is_empty(), message.sequence_hashes.is_empty()) {
        (false, true) => {
            Ok(Names::Keys(message.keys.iter().map(|bytes| key(bytes)).collect::<Result<_, _>>()?))
        }
        (true, false) => Ok(Names::Hashes {
            binding: message.binding,
            hashes: message
                .sequence_hashes
                .iter()
                .map(|bytes| sequence_hash(bytes))
                .collect::<Result<_, _>>()?,
        }),
        (true, true) => Err(bad("`names` holds neither keys nor sequence hashes".into())),
        (false, false) => Err(bad("`names` holds both keys and sequence hashes".into())),
    }
}

/// The scope in a request, checked.
pub fn scope(message: Option<v1::Scope>) -> Result<Scope, Fault> {
    let message = message.ok_or_else(|| bad("field `scope` is missing".into()))?;
    let kind = ScopeKind::ALL.into_iter().find(|kind| kind.name() == message.kind).ok_or_else(|| {
        bad(format!("scope field `kind` is `{}`; it is one of kv, embedding, weights", message.kind))
    })?;
    let scope = Scope {
        kind,
        block_tokens: message.block_tokens,
        model: message.model,
        weights: message.weights,
        tokenizer: message.tokenizer,
        dtype: message.dtype,
        attention: message.attention,
        layout: message.layout,
        lora: message.lora,
        tenant: message.tenant,
        salt: message.salt,
    };
    scope.validate().map_err(|error| bad(error.to_string()))?;
    Ok(scope)
}

/// A scope as a message.
pub fn scope_message(scope: &Scope) -> v1::Scope {
    v1::Scope {
        kind: scope.kind.name().into(),
        block_tokens: scope.block_tokens,
        model: scope.model.clone(),
        weights: scope.weights.clone(),
        tokenizer: scope.tokenizer.clone(),
        dtype: scope.dtype.clone(),
        attention: scope.attention.clone(),
        layout: scope.layout.clone(),
        lora: scope.lora.clone(),
        tenant: scope.tenant.clone(),
        salt: scope.salt.clone(),
    }
}

/// The slice in a request, checked.
pub fn slice(message: Option<v1::Slice>) -> Result<Slice, Fault> {
    let message = message.ok_or_else(|| bad("field `slice` is missing".into()))?;
    let number = |field, value: u32| {
        u16::try_from(value)
            .map_err(|_| bad(format!("slice field `{field}` is {value}; at most 65535 is allowed")))
    };
    let slice = Slice {
        layers: number("layer_start", message.layer_start)?..number("layer_end", message.layer_end)?,
        heads: number("head_start", message.head_start)?..number("head_end", message.head_end)?,
        layers_total: number("layers_total", message.layers_total)?,
        heads_total: number("heads_total", message.heads_total)?,
    };
    slice.validate().map_err(|error| bad(error.to_string()))?;
    Ok(slice)
}

/// A slice as a message.
pub fn slice_message(slice: &Slice) -> v1::Slice {
    v1::Slice {
        layer_start: slice.layers.start.into(),
        layer_end: slice.layers.end.into(),
        head_start: slice.heads.start.into(),
        head_end: slice.heads.end.into(),
        layers_total: slice.layers_total.into(),
        heads_total: slice.heads_total.into(),
    }
}

/// How a worker's KV cache lies in its tensors, checked.
pub fn cache_layout(message: Option<v1::CacheLayout>) -> Result<EngineLayout, Fault> {
    let message = message.ok_or_else(|| bad("field `layout` is missing".into()))?;
    let content = match message.content() {
        v1::cache_layout::Content::KeyValue => Content::KeyValue,
        v1::cache_layout::Content::Latent => Content::Latent,
        v1::cache_layout::Content::Unspecified => {
            return Err(bad("layout field `content` is missing or not known".into()));
        }
    };
    let step = |field, step: Option<v1::Step>| match step.and_then(|step| step.step) {
        Some(v1::step::Step::Bytes(bytes)) => Ok(Step::Bytes(bytes)),
        Some(v1::step::Step::Tensors(tensors)) => Ok(Step::Tensors(tensors)),
        None => Err(bad(format!("layout field `{field}` is missing"))),
    };
    let shape = Shape {
        slice: slice(message.slice)?,
        content,
        page_count: message.page_count,
        page_tokens: message.page_tokens,
        head_dim: message.head_dim,
        element_bits: message.element_bits,
    };
    let strides = Strides {
        layer: step("layer", message.layer)?,
        kv: step("kv", message.kv)?,
        page: message.page_stride,
        head: message.head_stride,
        token: message.token_stride,
        dim: message.dim_stride,
    };
    let first = Place { tensor: TensorIndex(message.first_tensor), offset: message.first_offset };
    EngineLayout::new(shape, strides, first).map_err(|error| bad(format!("field `layout`: {error}")))
}

/// How a KV cache lies in its tensors, as a message.
pub fn cache_layout_message(layout: &EngineLayout) -> v1::CacheLayout {
    let (shape, strides, first) = (layout.shape(), layout.strides(), layout.first());
    let content = match shape.content {
        Content::KeyValue => v1::cache_layout::Content::KeyValue,
        Content::Latent => v1::cache_layout::Content::Latent,
    };
    let step = |step| {
        let step = match step {
            Step::Bytes(bytes) => v1::step::Step::Bytes(bytes),
            Step::Tensors(tensors) => v1::step::Step::Tensors(tensors),
        };
        Some(v1::Step { step: Some(step) })
    };
    v1::CacheLayout {
        slice: Some(slice_message(&shape.slice)),
        content: content.into(),
        page_count: shape.page_count,
        page_tokens: shape.page_tokens,
        head_dim: shape.head_dim,
        element_bits: shape.element_bits,
        layer: step(strides.layer),
        kv: step(strides.kv),
        page_stride: strides.page,
        head_stride: strides.head,
        token_stride: strides.token,
        dim_stride: strides.dim,
        first_tensor: first.tensor.0,
        first_offset: first.offset,
    }
}

/// The tier as a message.
pub fn tier_message(tier: Tier) -> v1::Tier {
    match tier {
        Tier::Device => v1::Tier::Device,
        Tier::Host => v1::Tier::Host,
        Tier::Disk => v1::Tier::Disk,
        Tier::Object => v1::Tier::Object,
    }
}

/// The tier with this wire number; `None` for unspecified.
pub fn tier(number: i32) -> Result<Option<Tier>, Fault> {
    match v1::Tier::try_from(number) {
        Ok(v1::Tier::Unspecified) => Ok(None),
        Ok(v1::Tier::Device) => Ok(Some(Tier::Device)),
        Ok(v1::Tier::Host) => Ok(Some(Tier::Host)),
        Ok(v1::Tier::Disk) => Ok(Some(Tier::Disk)),
        Ok(v1::Tier::Object) => Ok(Some(Tier::Object)),
        Err(_) => Err(bad(format!("no tier has the number {number}"))),
    }
}

/// The retention class with this wire number; unspecified means normal.
pub fn priority(number: i32) -> Result<Priority, Fault> {
    match v1::Priority::try_from(number) {
        Ok(v1::Priority::Low) => Ok(Priority::Low),
        Ok(v1::Priority::Normal | v1::Priority::Unspecified) => Ok(Priority::Normal),
        Ok(v1::Priority::High) => Ok(Priority::High),
        Err(_) => Err(bad(format!("no priority has the number {number}"))),
    }
}

/// The retention class as a message.
pub fn priority_message(priority: Priority) -> v1::Priority {
    match priority {
        Priority::Low => v1::Priority::Low,
        Priority::Normal => v1::Priority::Normal,
        Priority::High => v1::Priority::High,
    }
}

/// A miss as a message.
pub fn miss_message(reason: MissReason, fields: Vec<String>) -> v1::Miss {
    v1::Miss { reason: i32::from(reason as u8), fields }
}

/// The reason in a miss; an unknown number from a newer daemon reads as never stored.
pub fn miss_reason(miss: &v1::Miss) -> MissReason {
    u8::try_from(miss.reason).ok().and_then(MissReason::from_wire).unwrap_or(MissReason::NeverStored)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_and_slices_go_there_and_back() {
        let scope_in = Scope { model: "m".into(), tenant: "t".into(), lora: "l".into(), ..Scope::default() };
        assert_eq!(scope(Some(scope_message(&scope_in))), Ok(scope_in));
        let slice_in = Slice { heads: 2..4, ..Slice::whole(3, 8) };
        assert_eq!(slice(Some(slice_message(&slice_in))), Ok(slice_in));
    }

    #[test]
    fn wrong_messages_are_refused_with_the_field_named() {
        let message = |result: Result<Names, Fault>| result.unwrap_err().message;
        assert!(message(names(None, 9)).contains("names"));
        let empty = v1::Names::default();
        assert!(message(names(Some(&empty), 9)).contains("neither"));
        let short = v1::Names { keys: vec![vec![0; 15].into()], ..Default::default() };
        assert!(message(names(Some(&short), 9)).contains("16 bytes, not 15"));
        let many = v1::Names { keys: vec![vec![0; 16].into(); 10], ..Default::default() };
        assert_eq!(names(Some(&many), 9).unwrap_err().code, Code::BatchTooLarge);
        let wide = v1::Slice { heads_total: 70_000, ..slice_message(&Slice::whole(1, 1)) };
        assert!(slice(Some(wide)).unwrap_err().message.contains("heads_total"));
        let nobody = v1::Scope { kind: "kv".into(), model: "m".into(), ..Default::default() };
        assert!(scope(Some(nobody)).unwrap_err().message.contains("tenant"));
    }

    #[test]
    fn wire_numbers_of_reasons_are_those_of_the_protocol() {
        for reason in MissReason::ALL {
            let proto = v1::MissReason::try_from(i32::from(reason as u8)).unwrap();
            let name = proto.as_str_name().trim_start_matches("MISS_REASON_").to_lowercase();
            assert_eq!(name, reason.name());
        }
    }
}
