//! What an engine says of its chunks when it registers, and how kvd calls their blocks.

use kv_client::{Scope, Slice};

use crate::names::WORLD_MAX;
use crate::wire::RegisterKvCacheEngineDrivenContextRequest as Registration;

/// Element types that say which numbers they are, by the names that torch gives them, and their bytes.
const DTYPES: [(&str, u64); 9] = [
    ("float64", 8),
    ("float32", 4),
    ("float16", 2),
    ("bfloat16", 2),
    ("float8_e4m3fn", 1),
    ("float8_e4m3fnuz", 1),
    ("float8_e5m2", 1),
    ("float8_e5m2fnuz", 1),
    ("float8_e8m0fnu", 1),
];
/// What vLLM calls its FP8 caches of every kind: bytes, read in another way by each.
const BARE: &str = "uint8";
const LAYERS_MAX: i64 = 4096;
const SLOTS_MAX: i64 = 1 << 20;
const HIDDEN_MAX: i64 = 1 << 20;
const MODEL_BYTES_MAX: usize = 1024;

/// Form of the chunks of one instance: `[planes, layers, slots, hidden]` of elements.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    /// 1 where keys and values are one plane (multi-head latent attention, or fused), else 2.
    pub(crate) planes: u32,
    /// Layers.
    pub(crate) layers: u16,
    /// Slots of a chunk: its tokens, or fewer where ranks share them out.
    pub(crate) slots: u32,
    /// Elements of a slot and plane.
    pub(crate) hidden: u32,
    /// Name of the element type, as the engine gives it.
    pub(crate) dtype: &'static str,
    /// What numbers these are, where that name does not say it.
    pub(crate) meaning: Option<String>,
    /// Bytes of a chunk.
    pub(crate) bytes: u32,
}

/// Why an engine cannot be served: which field, and what to do.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum BadLayout {
    /// A number that cannot be.
    #[error("field `{field}` is {value}: expected 1 to {most}")]
    Number {
        /// Which.
        field: &'static str,
        /// What was said.
        value: i64,
        /// The most it may be.
        most: i64,
    },
    /// No model, or a name that is too long.
    #[error("field `model_name` has {bytes} bytes: expected 1 to {MODEL_BYTES_MAX}")]
    Model {
        /// Its length.
        bytes: usize,
    },
    /// An element type that does not say which numbers it is, or is not known.
    #[error(
        "field `dtype_str` is `{dtype}`, which does not say what numbers these are; kvd takes {}",
        known_dtypes()
    )]
    Dtype {
        /// What was said.
        dtype: String,
    },
    /// Bytes that nobody has said the meaning of.
    #[error(
        "field `dtype_str` is `{BARE}`: bytes that fp8_e4m3 and fp8_e5m2 read in different ways; when all engines of \
         this kvd have the same --kv-cache-dtype, say which in lmcache.uint8_as"
    )]
    Bare,
    /// A chunk that kvd cannot keep as one block.
    #[error(
        "a chunk of {layers} layers, {slots} slots and {hidden} elements has {bytes} bytes, and kvd keeps blocks \
         of up to {most}: lower lmcache.chunk_tokens, or raise host.region_bytes"
    )]
    Long {
        /// Layers of it.
        layers: u16,
        /// Slots.
        slots: u32,
        /// Elements of a slot.
        hidden: u32,
        /// Its length.
        bytes: u64,
        /// The most it may have.
        most: u64,
    },
    /// The pool would not hold even one.
    #[error("a chunk has {bytes} bytes and the pool {pool_bytes}: raise lmcache.pool_bytes")]
    Pool {
        /// Its length.
        bytes: u64,
        /// The pool's.
        pool_bytes: u64,
    },
}

fn known_dtypes() -> String {
    DTYPES.map(|(name, _)| name).join(", ")
}

impl Layout {
    /// Reads a registration where chunks have `chunk_tokens`, blocks at most `block_bytes_max` and the pool
    /// `pool_bytes`. `uint8_as`: what bare bytes are, if that was said.
    pub(crate) fn parse(
        said: &Registration,
        chunk_tokens: u32,
        block_bytes_max: u64,
        pool_bytes: u64,
        uint8_as: Option<&str>,
    ) -> Result<Self, BadLayout> {
        let number = |field, value: i64, most: i64| match (1..=most).contains(&value) {
            true => Ok(value as u32),
            false => Err(BadLayout::Number { field, value, most }),
        };
        if !(1..=MODEL_BYTES_MAX).contains(&said.model_name.len()) {
            return Err(BadLayout::Model { bytes: said.model_name.len() });
        }
        number("world_size", said.world_size, i64::from(WORLD_MAX))?;
        number("block_size", said.block_size, SLOTS_MAX)?;
        let layers = number("num_layers", said.num_layers, LAYERS_MAX)? as u16;
        let hidden = number("hidden_dim_size", said.hidden_dim_size, HIDDEN_MAX)?;
        let slots = said.num_physical_slots.unwrap_or(i64::from(chunk_tokens));
        let slots = number("num_physical_slots", slots, SLOTS_MAX)?;
        let known = DTYPES.iter().find(|(name, _)| *name == said.dtype_str);
        let (dtype, meaning, element) = match (known, uint8_as) {
            (Some((name, bytes)), _) => (*name, None, *bytes),
            (None, Some(meaning)) if said.dtype_str == BARE => (BARE, Some(meaning.to_owned()), 1),
            (None, None) if said.dtype_str == BARE => return Err(BadLayout::Bare),
            (None, _) => return Err(BadLayout::Dtype { dtype: said.dtype_str.chars().take(64).collect() }),
        };
        let planes = if said.use_mla { 1 } else { 2 };
        // Bounded by the ranges above: at most 2 * 2^12 * 2^20 * 2^20 * 8.
        let bytes = u64::from(planes) * u64::from(layers) * u64::from(slots) * u64::from(hidden) * element;
        let most = block_bytes_max.min(u64::from(u32::MAX));
        if bytes > most {
            return Err(BadLayout::Long { layers, slots, hidden, bytes, most });
        }
        if bytes > pool_bytes {
            return Err(BadLayout::Pool { bytes, pool_bytes });
        }
        Ok(Self { planes, layers, slots, hidden, dtype, meaning, bytes: bytes as u32 })
    }

    /// Dimensions of a chunk, as the engine views it.
    pub(crate) fn shape(&self) -> Vec<u64> {
        let planes = (self.planes > 1).then_some(u64::from(self.planes));
        let rest = [u64::from(self.layers), u64::from(self.slots), u64::from(self.hidden)];
        planes.into_iter().chain(rest).collect()
    }

    /// The field in which two engines of one model name and world size differ, so that a lookup for the model
    /// could not tell whose blocks it is about. Stages of a pipeline may have more or fewer layers.
    pub(crate) fn conflict(&self, other: &Self) -> Option<&'static str> {
        match () {
            () if (self.dtype, &self.meaning) != (other.dtype, &other.meaning) => Some("dtype_str"),
            () if self.planes != other.planes => Some("use_mla"),
            () if self.hidden != other.hidden => Some("hidden_dim_size"),
            () if self.slots != other.slots => Some("num_physical_slots"),
            () => None,
        }
    }

    /// What the blocks of this layout mean.
    pub(crate) fn scope(&self, model: &str, chunk_tokens: u32, tenant: &str, salt: &str) -> Scope {
        Scope {
            block_tokens: chunk_tokens,
            model: model.to_owned(),
            dtype: match &self.meaning {
                Some(meaning) => format!("{}:{meaning}", self.dtype),
                None => self.dtype.to_owned(),
            },
            attention: if self.planes == 1 { "one plane" } else { "keys, values" }.to_owned(),
            layout: format!(
                "lmcache plane,layer,slot,hidden: {}x{}x{}x{}",
                self.planes, self.layers, self.slots, self.hidden
            ),
            tenant: tenant.to_owned(),
            salt: salt.to_owned(),
            ..Scope::default()
        }
    }

    /// Which part of a token's cache worker `rank` of `world` has.
    pub(crate) fn slice(&self, rank: u32, world: u32) -> Slice {
        Slice {
            layers: 0..self.layers,
            layers_total: self.layers,
            heads: rank as u16..rank as u16 + 1,
            heads_total: world as u16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said() -> Registration {
        Registration {
            instance_id: 1,
            model_name: "m".into(),
            world_size: 2,
            block_size: 32,
            num_layers: 4,
            hidden_dim_size: 256,
            dtype_str: "float32".into(),
            use_mla: true,
            num_physical_slots: Some(64),
        }
    }

    fn parse(said: &Registration) -> Result<Layout, BadLayout> {
        Layout::parse(said, 64, 32 << 20, 64 << 20, None)
    }

    #[test]
    fn a_chunk_has_the_bytes_of_its_shape() {
        let layout = parse(&said()).unwrap();
        assert_eq!((layout.shape(), layout.bytes), (vec![4, 64, 256], 4 * 64 * 256 * 4));
        let layout = parse(&Registration { use_mla: false, num_physical_slots: None, ..said() }).unwrap();
        assert_eq!((layout.shape(), layout.bytes), (vec![2, 4, 64, 256], 2 * 4 * 64 * 256 * 4));
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_field() {
        type Change = fn(&mut Registration);
        let rows: [(Change, &str); 14] = [
            (|said| said.model_name.clear(), "model_name"),
            (|said| said.world_size = 0, "world_size"),
            (|said| said.world_size = 5000, "world_size"),
            (|said| said.block_size = -1, "block_size"),
            (|said| said.num_layers = 0, "num_layers"),
            (|said| said.hidden_dim_size = i64::MAX, "hidden_dim_size"),
            (|said| said.num_physical_slots = Some(0), "num_physical_slots"),
            (|said| said.dtype_str = "complex64".into(), "dtype_str"),
            (|said| said.dtype_str = "load".into(), "dtype_str"),
            (|said| said.dtype_str = "int8".into(), "does not say what numbers these are"),
            (|said| said.dtype_str = "bool".into(), "does not say what numbers these are"),
            (|said| said.dtype_str = "uint8".into(), "lmcache.uint8_as"),
            (|said| said.hidden_dim_size = 1 << 16, "host.region_bytes"),
            (
                |said| {
                    (said.num_layers, said.num_physical_slots, said.hidden_dim_size) =
                        (4096, Some(1 << 20), 1 << 20);
                },
                "lmcache.chunk_tokens",
            ),
        ];
        for (change, words) in rows {
            let mut said = said();
            change(&mut said);
            let refused = parse(&said).unwrap_err().to_string();
            assert!(refused.contains(words), "{refused}");
        }
        let refused = Layout::parse(&said(), 64, 32 << 20, 4096, None).unwrap_err().to_string();
        assert!(refused.contains("lmcache.pool_bytes"), "{refused}");
    }

    #[test]
    fn engines_that_cannot_share_a_name_are_told_apart_by_field() {
        let layout = parse(&said()).unwrap();
        let other = |change: fn(&mut Registration)| {
            let mut said = said();
            change(&mut said);
            layout.conflict(&parse(&said).unwrap())
        };
        assert_eq!(other(|said| said.dtype_str = "float16".into()), Some("dtype_str"));
        assert_eq!(other(|said| said.use_mla = false), Some("use_mla"));
        assert_eq!(other(|said| said.hidden_dim_size = 128), Some("hidden_dim_size"));
        assert_eq!(other(|said| said.num_physical_slots = Some(32)), Some("num_physical_slots"));
        assert_eq!(other(|said| said.num_layers = 3), None);
        assert_eq!(other(|said| said.block_size = 16), None);
    }

    #[test]
    fn bare_bytes_are_called_by_what_the_operator_says_they_are() {
        let bare = Registration { dtype_str: "uint8".into(), ..said() };
        let told = |said, meaning| Layout::parse(said, 64, 32 << 20, 64 << 20, Some(meaning)).unwrap();
        let one = told(&bare, "fp8_e4m3");
        // The engine is told of slots in its own words.
        assert_eq!((one.dtype, one.bytes), ("uint8", 4 * 64 * 256));
        assert_eq!(one.scope("m", 64, "t", "").dtype, "uint8:fp8_e4m3");
        assert_eq!(one.conflict(&told(&bare, "fp8_e5m2")), Some("dtype_str"));
        let name = |layout: &Layout| SequenceHashOf7::key(layout, "m", "t", "", 0, 2);
        assert_ne!(name(&one), name(&told(&bare, "fp8_e5m2")));
        // It says nothing of others.
        assert_eq!(told(&said(), "fp8_e4m3"), parse(&said()).unwrap());
    }

    #[test]
    fn every_part_of_the_meaning_reaches_the_name() {
        let layout = parse(&said()).unwrap();
        let name = SequenceHashOf7::key;
        let base = name(&layout, "m", "t", "", 0, 2);
        let mut other = layout.clone();
        other.layers = 5;
        let all = [
            name(&layout, "n", "t", "", 0, 2),
            name(&layout, "m", "u", "", 0, 2),
            name(&layout, "m", "t", "s", 0, 2),
            name(&layout, "m", "t", "", 1, 2),
            name(&layout, "m", "t", "", 0, 3),
            name(&other, "m", "t", "", 0, 2),
        ];
        let different: std::collections::HashSet<_> = all.iter().chain([&base]).collect();
        assert_eq!(different.len(), all.len() + 1);
    }

    struct SequenceHashOf7;

    impl SequenceHashOf7 {
        fn key(
            layout: &Layout,
            model: &str,
            tenant: &str,
            salt: &str,
            rank: u32,
            world: u32,
        ) -> kv_client::BlockKey {
            let scope = layout.scope(model, 64, tenant, salt);
            let slice = layout.slice(rank, world);
            scope.validate().unwrap();
            slice.validate().unwrap();
            scope.id().block_key(&7.into(), &slice)
        }
    }
}
