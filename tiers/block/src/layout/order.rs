//! Orders of memory and their names.
//!
//! A block's order is written as a [`Scope`](crate::Scope) has it, outermost first: `layer,kv,head,token,dim`. An
//! engine's is written as vLLM does, one letter for each axis:
//! ```text
//! L layer   2 K or V   B page (the engine's block)   H head   N token   D dim   C = 2D, K‖V side by side
//! ```

use std::fmt;
use std::str::FromStr;

/// What a tensor of cached keys and values is indexed by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Axis {
    /// The engine's own unit of tokens. Not an axis of a block.
    Page,
    /// Layer of the model.
    Layer,
    /// Key or value.
    Kv,
    /// KV head.
    Head,
    /// Token, within the page or the block.
    Token,
    /// Element of a vector.
    Dim,
}

impl Axis {
    /// Every axis.
    pub const ALL: [Self; 6] = [Self::Page, Self::Layer, Self::Kv, Self::Head, Self::Token, Self::Dim];

    /// The axis in text.
    pub fn name(self) -> &'static str {
        match self {
            Self::Page => "page",
            Self::Layer => "layer",
            Self::Kv => "kv",
            Self::Head => "head",
            Self::Token => "token",
            Self::Dim => "dim",
        }
    }

    fn letter(self) -> char {
        match self {
            Self::Page => 'B',
            Self::Layer => 'L',
            Self::Kv => '2',
            Self::Head => 'H',
            Self::Token => 'N',
            Self::Dim => 'D',
        }
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a name says no order.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OrderError {
    /// No axis of this kind of order.
    #[error("`{name}` is no axis of this order")]
    Unknown {
        /// What was given.
        name: String,
    },
    /// An axis has two places.
    #[error("{axis} is named twice")]
    Twice {
        /// Which.
        axis: Axis,
    },
    /// An engine's order leaves one out.
    #[error("{axis} is not named")]
    Missing {
        /// Which.
        axis: Axis,
    },
}

/// The order of a block: some of layer, kv, head, token and dim, outermost first. An axis that is not named has
/// length 1, such as `kv` and `head` in the blocks of MLA: `layer,token,dim`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Order {
    /// Those without a name first: with length 1 they can stand anywhere.
    axes: [Axis; 5],
    named: usize,
}

impl Order {
    /// `layer,kv,head,token,dim`: a layer, K or V and a head are one run each, whichever engine wrote them, so what
    /// another parallel size wants of a block are few ranges of it.
    pub const CANONICAL: Self =
        Self { axes: [Axis::Layer, Axis::Kv, Axis::Head, Axis::Token, Axis::Dim], named: 5 };

    /// `axes`: outermost first.
    pub fn new(axes: &[Axis]) -> Result<Self, OrderError> {
        let mut order = Self { axes: [Axis::Dim; 5], named: 0 };
        for &axis in axes {
            if axis == Axis::Page {
                return Err(OrderError::Unknown { name: axis.name().into() });
            }
            if order.axes[..order.named].contains(&axis) {
                return Err(OrderError::Twice { axis });
            }
            order.axes[order.named] = axis;
            order.named += 1;
        }
        let named = order.axes;
        let left = Self::CANONICAL.axes.into_iter().filter(|axis| !named[..order.named].contains(axis));
        for (at, axis) in left.chain(named[..order.named].iter().copied()).enumerate() {
            order.axes[at] = axis;
        }
        Ok(order)
    }

    /// Those that are named, outermost first.
    pub fn axes(&self) -> &[Axis] {
        &self.axes[self.axes.len() - self.named..]
    }

    /// All five, those that are not named outermost.
    pub(super) fn all(&self) -> [Axis; 5] {
        self.axes
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, axis) in self.axes().iter().enumerate() {
            if at > 0 {
                f.write_str(",")?;
            }
            f.write_str(axis.name())?;
        }
        Ok(())
    }
}

impl FromStr for Order {
    type Err = OrderError;

    /// Names with a comma between, nothing else.
    fn from_str(text: &str) -> Result<Self, OrderError> {
        let mut axes = Vec::new();
        for name in text.split(',') {
            let known = Self::CANONICAL.axes.into_iter().find(|axis| axis.name() == name);
            let axis = known.ok_or_else(|| OrderError::Unknown { name: name.into() })?;
            if axes.contains(&axis) {
                return Err(OrderError::Twice { axis });
            }
            axes.push(axis);
        }
        Self::new(&axes)
    }
}

/// The order of an engine's memory, outermost first; every axis has its place, also one of length 1.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EngineOrder([Axis; 6]);

use Axis::{Dim, Head, Kv, Layer, Page, Token};

impl EngineOrder {
    /// vLLM since 0.26, logically `[L, B, H, N, C]`: a tensor for each layer, heads outside of tokens (HND).
    pub const LBHNC: Self = Self([Layer, Page, Head, Token, Kv, Dim]);
    /// vLLM: a tensor for each layer, tokens outside of heads (NHD).
    pub const LBNHC: Self = Self([Layer, Page, Token, Head, Kv, Dim]);
    /// vLLM: a head's pages lie together.
    pub const LHBNC: Self = Self([Layer, Head, Page, Token, Kv, Dim]);
    /// vLLM: one tensor, a page of all layers is one run (HND).
    pub const BLHNC: Self = Self([Page, Layer, Head, Token, Kv, Dim]);
    /// vLLM: one tensor, a page of all layers is one run (NHD).
    pub const BLNHC: Self = Self([Page, Layer, Token, Head, Kv, Dim]);
    /// vLLM: one tensor, a page's head of all layers is one run.
    pub const BHLNC: Self = Self([Page, Head, Layer, Token, Kv, Dim]);

    /// vLLM to 0.25, `[2, nb, bs, h, d]` for each layer (NHD).
    pub const L2BNHD: Self = Self([Layer, Kv, Page, Token, Head, Dim]);
    /// vLLM to 0.25, `[2, nb, h, bs, d]` for each layer (HND).
    pub const L2BHND: Self = Self([Layer, Kv, Page, Head, Token, Dim]);
    /// vLLM to 0.25, `[nb, 2, bs, h, d]` for each layer (NHD).
    pub const LB2NHD: Self = Self([Layer, Page, Kv, Token, Head, Dim]);
    /// vLLM to 0.25, `[nb, 2, h, bs, d]` for each layer (HND).
    pub const LB2HND: Self = Self([Layer, Page, Kv, Head, Token, Dim]);

    /// SGLang's `layer_first`, `(2, layer, slot, head, dim)`; its pools on the device too, with a tensor for each
    /// layer of K, then of V.
    pub const LAYER_FIRST: Self = Self([Kv, Layer, Page, Token, Head, Dim]);
    /// SGLang's `page_first`, `(2, slot, layer, head, dim)`.
    pub const PAGE_FIRST: Self = Self([Kv, Page, Token, Layer, Head, Dim]);
    /// SGLang's `page_first_direct`, `(2, page, layer, token, head, dim)`.
    pub const PAGE_FIRST_DIRECT: Self = Self([Kv, Page, Layer, Token, Head, Dim]);
    /// SGLang's `page_head`, `(2, page, head, token, layer, dim)`.
    pub const PAGE_HEAD: Self = Self([Kv, Page, Head, Token, Layer, Dim]);
    /// SGLang's `page_unified` with one group of heads, `(page, layer, 2, token, head, dim)`.
    pub const PAGE_UNIFIED: Self = Self([Page, Layer, Kv, Token, Head, Dim]);

    /// TensorRT-LLM's pool, `[block, layer, 2, head x token x dim]`.
    pub const BL2HND: Self = Self([Page, Layer, Kv, Head, Token, Dim]);

    /// The names of SGLang.
    const ALIASES: [(&'static str, Self); 5] = [
        ("layer_first", Self::LAYER_FIRST),
        ("page_first", Self::PAGE_FIRST),
        ("page_first_direct", Self::PAGE_FIRST_DIRECT),
        ("page_head", Self::PAGE_HEAD),
        ("page_unified", Self::PAGE_UNIFIED),
    ];

    /// `axes`: outermost first.
    pub fn new(axes: [Axis; 6]) -> Result<Self, OrderError> {
        match Axis::ALL.into_iter().find(|axis| !axes.contains(axis)) {
            Some(axis) => Err(OrderError::Missing { axis }),
            None => Ok(Self(axes)),
        }
    }

    /// Outermost first.
    pub fn axes(&self) -> [Axis; 6] {
        self.0
    }

    /// The order of a block that keeps what is contiguous here together.
    pub fn block(&self) -> Order {
        let mut order = Order::CANONICAL;
        for (place, axis) in order.axes.iter_mut().zip(self.0.into_iter().filter(|axis| *axis != Page)) {
            *place = axis;
        }
        order
    }
}

impl fmt::Display for EngineOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        if let [outer @ .., Kv, Dim] = &self.0[..] {
            outer.iter().try_for_each(|axis| f.write_char(axis.letter()))?;
            return f.write_char('C');
        }
        self.0.iter().try_for_each(|axis| f.write_char(axis.letter()))
    }
}

impl FromStr for EngineOrder {
    type Err = OrderError;

    /// Six letters, of which `2D` may be written `C`, or a name of SGLang's.
    fn from_str(text: &str) -> Result<Self, OrderError> {
        if let Some((_, order)) = Self::ALIASES.into_iter().find(|(name, _)| *name == text) {
            return Ok(order);
        }
        let mut axes = Vec::with_capacity(Axis::ALL.len());
        let mut push = |axis| {
            if axes.contains(&axis) {
                return Err(OrderError::Twice { axis });
            }
            axes.push(axis);
            Ok(())
        };
        for letter in text.chars() {
            if letter == 'C' {
                push(Kv)?;
                push(Dim)?;
                continue;
            }
            let known = Axis::ALL.into_iter().find(|axis| axis.letter() == letter);
            push(known.ok_or_else(|| OrderError::Unknown { name: letter.into() })?)?;
        }
        let missing = Axis::ALL.into_iter().find(|axis| !axes.contains(axis));
        let axes = <[Axis; 6]>::try_from(axes);
        axes.map(Self)
            .map_err(|_| OrderError::Missing { axis: missing.expect("six axes, none of them twice") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_canonical_order_is_what_scopes_say() {
        assert_eq!("layer,kv,head,token,dim".parse(), Ok(Order::CANONICAL));
        assert_eq!(Order::CANONICAL.to_string(), "layer,kv,head,token,dim");
    }

    #[test]
    fn names_come_back_as_they_were_said() {
        for name in ["layer,token,dim", "head,layer,token,kv,dim", "dim", "token,layer,kv,head,dim"] {
            assert_eq!(name.parse::<Order>().unwrap().to_string(), name);
        }
        let latent: Order = "layer,token,dim".parse().unwrap();
        assert_eq!(latent.axes(), [Layer, Token, Dim]);
        assert_eq!(latent.all(), [Kv, Head, Layer, Token, Dim]);
        for name in [
            "LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC", "L2BNHD", "L2BHND", "LB2NHD", "LB2HND",
            "2LBNHD", "2BNLHD", "2BLNHD", "2BHNLD", "BL2NHD", "BL2HND", "DN2HBL",
        ] {
            assert_eq!(name.parse::<EngineOrder>().unwrap().to_string(), name);
        }
        for (name, order) in EngineOrder::ALIASES {
            assert_eq!(name.parse(), Ok(order));
            assert_eq!(order.to_string().parse(), Ok(order));
        }
        assert_eq!("LBHN2D".parse(), Ok(EngineOrder::LBHNC));
    }

    #[test]
    fn the_engines_own_names_are_their_orders() {
        for (name, order) in [
            ("LBHNC", EngineOrder::LBHNC),
            ("LBNHC", EngineOrder::LBNHC),
            ("LHBNC", EngineOrder::LHBNC),
            ("BLHNC", EngineOrder::BLHNC),
            ("BLNHC", EngineOrder::BLNHC),
            ("BHLNC", EngineOrder::BHLNC),
            ("L2BNHD", EngineOrder::L2BNHD),
            ("L2BHND", EngineOrder::L2BHND),
            ("LB2NHD", EngineOrder::LB2NHD),
            ("LB2HND", EngineOrder::LB2HND),
            ("BL2HND", EngineOrder::BL2HND),
        ] {
            assert_eq!(name.parse(), Ok(order));
        }
    }

    #[test]
    fn what_says_no_order_is_refused() {
        let unknown = |name: &str| OrderError::Unknown { name: name.into() };
        for (text, error) in [
            ("", unknown("")),
            ("page,layer", unknown("page")),
            ("layer,", unknown("")),
            ("layer, token", unknown(" token")),
            ("Layer", unknown("Layer")),
            ("layer,token,layer", OrderError::Twice { axis: Layer }),
        ] {
            assert_eq!(text.parse::<Order>(), Err(error), "{text}");
        }
        assert_eq!(Order::new(&[Page]), Err(unknown("page")));
        assert_eq!(Order::new(&[Kv, Kv]), Err(OrderError::Twice { axis: Kv }));
        for (text, error) in [
            ("", OrderError::Missing { axis: Page }),
            ("LBHN", OrderError::Missing { axis: Kv }),
            ("LBHND", OrderError::Missing { axis: Kv }),
            ("LBHNCC", OrderError::Twice { axis: Kv }),
            ("LBHNDC", OrderError::Twice { axis: Dim }),
            ("LBHNX", unknown("X")),
            ("lbhnc", unknown("l")),
        ] {
            assert_eq!(text.parse::<EngineOrder>(), Err(error), "{text}");
        }
        assert_eq!(EngineOrder::new([Page; 6]), Err(OrderError::Missing { axis: Layer }));
    }

    #[test]
    fn a_block_in_an_engines_order_leaves_out_the_page() {
        assert_eq!(EngineOrder::LBNHC.block().to_string(), "layer,token,head,kv,dim");
        assert_eq!(EngineOrder::PAGE_HEAD.block().to_string(), "kv,head,token,layer,dim");
    }
}
