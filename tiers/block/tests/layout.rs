//! Plans against a slow reference that walks every byte.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use kv_block::Slice;
use kv_block::layout::{
    Axis, BlockLayout, Content, EngineLayout, EngineOrder, LayoutError, Order, PageIndex, Place, Plan,
    PlanError, Rows, Run, Shape, Step, Strides, TensorIndex, Tensors, cover, heads_of_rank, plan,
};
use proptest::prelude::*;

/// Where an element is along each [`Axis`].
type Index = [u64; 6];

/// Every index into axes of these lengths.
fn every(counts: Index) -> impl Iterator<Item = Index> {
    (0..counts.iter().product()).map(move |mut number: u64| {
        let mut index = [0; 6];
        for (at, count) in counts.into_iter().enumerate().rev() {
            index[at] = number % count;
            number /= count;
        }
        index
    })
}

/// How many elements lie before `index` in a dense tensor whose axes are `order`, outermost first.
fn dense(order: &[Axis], counts: Index, index: Index) -> u64 {
    order.iter().fold(0, |before, &axis| before * counts[axis as usize] + index[axis as usize])
}

fn counts(shape: &Shape) -> Index {
    Axis::ALL.map(|axis| shape.count(axis))
}

/// Where every byte of a block comes from: tensor and offset.
type Bytes = BTreeMap<u64, (u32, u64)>;

/// What a plan must say, where `address` tells the tensor and the byte of an element of the engine.
fn reference(
    address: &dyn Fn(Index) -> (u32, u64),
    shape: &Shape,
    block: &BlockLayout,
    pages: &[PageIndex],
    part: &Slice,
) -> Bytes {
    let of_block = Axis::ALL.map(|axis| block.count(axis));
    let element = u64::from(shape.element_bits / 8);
    let mut bytes = Bytes::new();
    for index in every(of_block) {
        let [_, layer, kv, head, token, dim] = index;
        let layer = layer + u64::from(block.slice().layers.start);
        let head = head + u64::from(block.slice().heads.start);
        if !part.layers.contains(&(layer as u16)) || !part.heads.contains(&(head as u16)) {
            continue;
        }
        let page = pages[(token / u64::from(shape.page_tokens)) as usize].0;
        let (tensor, offset) = address([
            page.into(),
            layer - u64::from(shape.slice.layers.start),
            kv,
            head - u64::from(shape.slice.heads.start),
            token % u64::from(shape.page_tokens),
            dim,
        ]);
        let at = dense(block.order().axes(), of_block, index) * element;
        for byte in 0..element {
            assert!(bytes.insert(at + byte, (tensor, offset + byte)).is_none(), "the reference itself");
        }
    }
    bytes
}

/// The bytes of runs; each of them once.
fn bytes_of(runs: impl IntoIterator<Item = Run>) -> Bytes {
    let mut bytes = Bytes::new();
    for run in runs {
        assert_ne!(run.bytes, 0);
        for byte in 0..run.bytes {
            let from = (run.tensor.0, run.device_offset + byte);
            assert!(
                bytes.insert(run.block_offset + byte, from).is_none(),
                "a byte of the block is named twice"
            );
        }
    }
    let from: BTreeSet<_> = bytes.values().collect();
    assert_eq!(from.len(), bytes.len(), "a byte of the engine is in two places");
    bytes
}

fn runs_of(rows: impl IntoIterator<Item = Rows>) -> impl Iterator<Item = Run> {
    rows.into_iter().flat_map(|rows| (0..rows.count).map(move |at| rows.run(at)))
}

/// The plan is what the reference says, in every form, and in as few runs as there are.
fn check(plan: &Plan<'_>, engine: &EngineLayout, block: &BlockLayout, expected: &Bytes) {
    let runs: Vec<_> = plan.runs().collect();
    assert_eq!(&bytes_of(runs.iter().copied()), expected);
    assert_eq!(plan.bytes(), expected.len() as u64);
    let breaks = expected
        .iter()
        .zip(expected.iter().skip(1))
        .filter(|((at, from), (next, then))| **at + 1 != **next || from.0 != then.0 || from.1 + 1 != then.1);
    assert_eq!(runs.len(), breaks.count() + 1, "not as few runs as there are");
    assert!(runs.is_sorted_by_key(|run| run.block_offset));

    let rows: Vec<_> = plan.rows().collect();
    assert_eq!(&bytes_of(runs_of(rows.iter().copied())), expected);
    assert!(rows.len() <= runs.len());

    let mut by_layer = Bytes::new();
    let mut layers = Vec::new();
    for (layer, one) in plan.layers() {
        layers.push(layer);
        assert_eq!(one.part().layers, layer..layer + 1);
        let bytes = bytes_of(one.runs());
        assert_eq!(bytes.len() as u64, one.bytes());
        let ranges: Vec<_> = block.ranges(one.part()).unwrap().flatten().collect();
        assert_eq!(ranges, bytes.keys().copied().collect::<Vec<_>>());
        by_layer.extend(bytes);
    }
    assert_eq!(layers, plan.part().layers.clone().collect::<Vec<_>>());
    assert_eq!(&by_layer, expected);

    let ranges: Vec<_> = block.ranges(plan.part()).unwrap().collect();
    assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "not as few ranges as there are");
    let in_block: Vec<_> = expected.keys().copied().collect();
    assert_eq!(ranges.into_iter().flatten().collect::<Vec<_>>(), in_block);
    for (tensor, offset) in expected.values() {
        assert!(*tensor < engine.tensor_count() && *offset < engine.tensor_bytes());
    }
    assert!(in_block.iter().all(|at| *at < block.bytes()));
}

/// The address of an element of a cache without gaps in `order`.
fn dense_address(shape: &Shape, order: EngineOrder, tensors: Tensors) -> impl Fn(Index) -> (u32, u64) {
    let (counts, element) = (counts(shape), u64::from(shape.element_bits / 8));
    move |mut index| {
        let [_, layer, kv, ..] = index;
        let tensor = match tensors {
            Tensors::One => 0,
            Tensors::Layers => layer,
            Tensors::Halves => kv,
            Tensors::HalvesOfLayers => kv * counts[Axis::Layer as usize] + layer,
        };
        // A tensor is a view that begins with its own first element.
        if matches!(tensors, Tensors::Layers | Tensors::HalvesOfLayers) {
            index[Axis::Layer as usize] = 0;
        }
        if matches!(tensors, Tensors::Halves | Tensors::HalvesOfLayers) {
            index[Axis::Kv as usize] = 0;
        }
        (tensor as u32, dense(&order.axes(), counts, index) * element)
    }
}

const ENGINES: [(EngineOrder, Tensors); 20] = [
    (EngineOrder::LBHNC, Tensors::Layers),
    (EngineOrder::LBNHC, Tensors::Layers),
    (EngineOrder::LHBNC, Tensors::Layers),
    (EngineOrder::LBHNC, Tensors::One),
    (EngineOrder::BLHNC, Tensors::One),
    (EngineOrder::BLNHC, Tensors::One),
    (EngineOrder::BHLNC, Tensors::One),
    (EngineOrder::BLHNC, Tensors::Layers),
    (EngineOrder::L2BNHD, Tensors::Layers),
    (EngineOrder::L2BHND, Tensors::Layers),
    (EngineOrder::LB2NHD, Tensors::Layers),
    (EngineOrder::LB2HND, Tensors::Layers),
    (EngineOrder::LAYER_FIRST, Tensors::HalvesOfLayers),
    (EngineOrder::LAYER_FIRST, Tensors::Halves),
    (EngineOrder::LAYER_FIRST, Tensors::One),
    (EngineOrder::PAGE_FIRST, Tensors::One),
    (EngineOrder::PAGE_FIRST_DIRECT, Tensors::One),
    (EngineOrder::PAGE_HEAD, Tensors::One),
    (EngineOrder::PAGE_UNIFIED, Tensors::One),
    (EngineOrder::BL2HND, Tensors::One),
];

fn pages(numbers: &[u32]) -> Vec<PageIndex> {
    numbers.iter().copied().map(PageIndex).collect()
}

fn orders() -> Vec<Order> {
    let natives = ENGINES.into_iter().map(|(order, _)| order.block());
    [Order::CANONICAL].into_iter().chain(natives).collect()
}

#[test]
fn every_engine_gives_every_order_of_blocks() {
    let slice = Slice { layers: 1..4, heads: 2..4, layers_total: 5, heads_total: 6 };
    let content = Content::KeyValue;
    let shape = Shape { slice, content, page_count: 7, page_tokens: 2, head_dim: 3, element_bits: 16 };
    let part = Slice { layers: 2..4, heads: 3..4, ..shape.slice.clone() };
    for (order, tensors) in ENGINES {
        let engine = EngineLayout::dense(shape.clone(), order, tensors).unwrap();
        let address = dense_address(&shape, order, tensors);
        for block in orders() {
            for numbers in [&[4][..], &[2, 3, 4], &[5, 0, 1], &[1, 3, 5], &[6, 4, 2]] {
                let pages = pages(numbers);
                let block = engine.block(block, numbers.len() as u32).unwrap();
                for part in [&shape.slice, &part] {
                    let plan = plan(&engine, &block, &pages, part).unwrap();
                    check(&plan, &engine, &block, &reference(&address, &shape, &block, &pages, part));
                }
            }
        }
    }
}

#[test]
fn a_latent_has_no_kv_and_one_head() {
    let (slice, content) = (Slice::whole(3, 1), Content::Latent);
    let shape = Shape { slice, content, page_count: 4, page_tokens: 2, head_dim: 5, element_bits: 8 };
    let latent: Order = "layer,token,dim".parse().unwrap();
    for (order, tensors) in ENGINES {
        let engine = EngineLayout::dense(shape.clone(), order, tensors).unwrap();
        let address = dense_address(&shape, order, tensors);
        for order in [latent, Order::CANONICAL, "token,layer,dim".parse().unwrap()] {
            let block = engine.block(order, 2).unwrap();
            assert_eq!(block.bytes(), 3 * 4 * 5);
            let pages = pages(&[3, 1]);
            let plan = plan(&engine, &block, &pages, &shape.slice).unwrap();
            check(&plan, &engine, &block, &reference(&address, &shape, &block, &pages, &shape.slice));
        }
    }
}

/// Llama-3.1-8B with pages of 16 tokens.
fn llama() -> Shape {
    let (slice, content) = (Slice::whole(32, 8), Content::KeyValue);
    Shape { slice, content, page_count: 2048, page_tokens: 16, head_dim: 128, element_bits: 16 }
}

#[test]
fn known_pages_are_as_few_copies_as_they_can_be() {
    let counts = |order, tensors, block| {
        let engine = EngineLayout::dense(llama(), order, tensors).unwrap();
        let block = engine.block(block, 1).unwrap();
        assert_eq!(block.bytes(), 2 << 20);
        let pages = pages(&[7]);
        let plan = plan(&engine, &block, &pages, &llama().slice).unwrap();
        (plan.runs().count(), plan.rows().count())
    };
    let by_layer = |order: EngineOrder| counts(order, Tensors::Layers, order.block());
    assert_eq!(by_layer(EngineOrder::LBHNC), (32, 32));
    assert_eq!(by_layer(EngineOrder::LBNHC), (32, 32));
    assert_eq!(by_layer(EngineOrder::LHBNC), (32 * 8, 32));
    assert_eq!(by_layer(EngineOrder::L2BNHD), (32 * 2, 32));
    let in_one = |order: EngineOrder| counts(order, Tensors::One, order.block());
    assert_eq!(in_one(EngineOrder::BLHNC), (1, 1));
    assert_eq!(in_one(EngineOrder::BL2HND), (1, 1));
    assert_eq!(in_one(EngineOrder::PAGE_FIRST), (2, 1));
    assert_eq!(in_one(EngineOrder::LAYER_FIRST), (64, 1));
    // To the canonical order: K and V of a token lie apart, and heads do where tokens are outside of them.
    let canonical = |order| counts(order, Tensors::Layers, Order::CANONICAL);
    assert_eq!(canonical(EngineOrder::LBHNC), (32 * 2 * 8 * 16, 32 * 2));
    assert_eq!(canonical(EngineOrder::LBNHC), (32 * 2 * 8 * 16, 32 * 2 * 8));
    assert_eq!(canonical(EngineOrder::LB2HND), (32, 32));
}

#[test]
fn a_copy_is_where_one_would_compute_it_by_hand() {
    // [2, nb, bs, h, d]: V of layer 3, head 5 and token 2 in page 7.
    let engine = EngineLayout::dense(llama(), EngineOrder::L2BNHD, Tensors::Layers).unwrap();
    assert_eq!((engine.tensor_count(), engine.tensor_bytes()), (32, 2 * 2048 * 16 * 8 * 256));
    let block = engine.block(Order::CANONICAL, 1).unwrap();
    let pages = pages(&[7]);
    let plan = plan(&engine, &block, &pages, &llama().slice).unwrap();
    let block_offset = 3 * 65536 + 32768 + 5 * 4096 + 2 * 256;
    assert_eq!(block.offset(3, 1, 5, 2), Some(block_offset));
    let device_offset = 2048 * 32768 + 7 * 32768 + 2 * 2048 + 5 * 256;
    let run = Run { tensor: TensorIndex(3), device_offset, block_offset, bytes: 256 };
    assert!(plan.runs().any(|one| one == run));
    let rows = plan.rows().find(|rows| rows.first.block_offset == block_offset - 2 * 256).unwrap();
    assert_eq!((rows.count, rows.device_stride, rows.block_stride), (16, 2048, 256));
    assert_eq!(rows.run(2), run);
}

#[test]
fn a_block_knows_where_its_parts_are() {
    let slice = Slice { layers: 2..4, heads: 4..8, layers_total: 4, heads_total: 8 };
    let block = BlockLayout::new(Order::CANONICAL, slice.clone(), Content::KeyValue, 16, 64, 16).unwrap();
    assert_eq!(block.bytes(), 2 * 2 * 4 * 16 * 128);
    assert_eq!(block.offset(3, 1, 6, 5), Some((((2 + 1) * 4 + 2) * 16 + 5) * 128));
    let outside = [(1, 0, 4, 0), (4, 0, 4, 0), (2, 2, 4, 0), (2, 0, 3, 0), (2, 0, 8, 0), (2, 0, 4, 16)];
    for (layer, kv, head, token) in outside {
        assert_eq!(block.offset(layer, kv, head, token), None);
    }
    let part = Slice { heads: 6..8, ..slice };
    let ranges: Vec<Range<u64>> = block.ranges(&part).unwrap().collect();
    let head = 16 * 128;
    let of = |nth: u64| (nth * 4 + 2) * head..(nth * 4 + 4) * head;
    assert_eq!(ranges, [of(0), of(1), of(2), of(3)]);
}

#[test]
fn pages_of_one_token_that_lie_together_are_one_run() {
    let (slice, content) = (Slice::whole(2, 4), Content::KeyValue);
    let shape = Shape { slice, content, page_count: 100, page_tokens: 1, head_dim: 8, element_bits: 16 };
    let order = EngineOrder::LAYER_FIRST;
    let engine = EngineLayout::dense(shape.clone(), order, Tensors::HalvesOfLayers).unwrap();
    let block = engine.block(order.block(), 8).unwrap();
    let count = |numbers: Range<u32>, then: Range<u32>| {
        let pages: Vec<_> = numbers.chain(then).map(PageIndex).collect();
        plan(&engine, &block, &pages, &shape.slice).unwrap().runs().count()
    };
    assert_eq!(count(10..18, 0..0), 4);
    assert_eq!(count(10..15, 50..53), 8);
}

#[test]
fn gaps_between_pages_are_left_alone() {
    let dense = EngineLayout::dense(llama(), EngineOrder::LBHNC, Tensors::Layers).unwrap();
    let strides = Strides { page: 80_000, ..*dense.strides() };
    let first = Place { tensor: TensorIndex(5), offset: 512 };
    let engine = EngineLayout::new(llama(), strides, first).unwrap();
    assert_eq!(engine.tensor_count(), 5 + 32);
    assert_eq!(engine.tensor_bytes(), 512 + 2047 * 80_000 + 65536);
    let block = engine.block(EngineOrder::LBHNC.block(), 1).unwrap();
    let pages = pages(&[2047]);
    let plan = plan(&engine, &block, &pages, &llama().slice).unwrap();
    let last = plan.runs().last().unwrap();
    assert_eq!(last.device_offset + last.bytes, engine.tensor_bytes());
    assert_eq!((last.tensor, last.bytes), (TensorIndex(36), 65536));
}

#[test]
fn impossible_engines_are_refused() {
    let shaped = |change: fn(&mut Shape)| {
        let mut shape = llama();
        change(&mut shape);
        EngineLayout::dense(shape, EngineOrder::BLHNC, Tensors::One).unwrap_err()
    };
    assert_eq!(shaped(|s| s.page_count = 0), LayoutError::Zero { what: "page_count" });
    assert_eq!(shaped(|s| s.page_tokens = 0), LayoutError::Zero { what: "page_tokens" });
    assert_eq!(shaped(|s| s.head_dim = 0), LayoutError::Zero { what: "head_dim" });
    assert_eq!(shaped(|s| s.element_bits = 0), LayoutError::Zero { what: "element_bits" });
    assert_eq!(shaped(|s| s.element_bits = 4), LayoutError::SubByte { bits: 4 });
    assert_eq!(shaped(|s| s.element_bits = 12), LayoutError::SubByte { bits: 12 });
    assert!(matches!(shaped(|s| s.slice.layers = 4..4), LayoutError::Slice(error) if error.what == "layer"));
    assert!(matches!(shaped(|s| s.slice.heads = 4..9), LayoutError::Slice(error) if error.what == "head"));
    let huge = |s: &mut Shape| (s.page_count, s.page_tokens, s.head_dim) = (u32::MAX, u32::MAX, u32::MAX);
    assert!(matches!(shaped(huge), LayoutError::Overflow { .. }));

    let good = EngineLayout::dense(llama(), EngineOrder::BLHNC, Tensors::One).unwrap();
    let strided = |change: fn(&mut Strides)| {
        let mut strides = *good.strides();
        change(&mut strides);
        EngineLayout::new(llama(), strides, good.first()).unwrap_err()
    };
    let overlap = |axis, stride, inner| LayoutError::Overlap { axis, stride, inner };
    let page = 2 << 20;
    assert_eq!(strided(|s| s.page -= 1), overlap(Axis::Page, page - 1, page));
    assert_eq!(strided(|s| s.dim = 1), overlap(Axis::Dim, 1, 2));
    assert_eq!(strided(|s| s.head = 0), overlap(Axis::Head, 0, 2));
    assert_eq!(strided(|s| s.layer = Step::Tensors(0)), overlap(Axis::Layer, 0, 1));
    let halves = |s: &mut Strides| (s.layer, s.kv) = (Step::Tensors(1), Step::Tensors(31));
    assert_eq!(strided(halves), overlap(Axis::Kv, 31, 32));
    assert_eq!(strided(|s| s.page = u64::MAX / 3), LayoutError::Overflow { axis: Axis::Page });

    let at = |tensor, offset| {
        let strides = Strides { layer: Step::Tensors(1), ..*good.strides() };
        EngineLayout::new(llama(), strides, Place { tensor: TensorIndex(tensor), offset }).unwrap_err()
    };
    assert!(matches!(at(0, u64::MAX), LayoutError::Overflow { .. }));
    assert!(matches!(at(u32::MAX - 31, 0), LayoutError::Overflow { .. }));

    let long = Shape { page_tokens: 1 << 31, page_count: 1, ..llama() };
    let engine = EngineLayout::dense(long, EngineOrder::BLHNC, Tensors::One).unwrap();
    assert_eq!(engine.block(Order::CANONICAL, 2), Err(LayoutError::Overflow { axis: Axis::Token }));
    assert_eq!(engine.block(Order::CANONICAL, 0), Err(LayoutError::Zero { what: "block_tokens" }));
}

#[test]
fn impossible_blocks_are_refused() {
    let (whole, pair) = (Slice::whole(2, 2), Content::KeyValue);
    let block = |order: &str, slice: &Slice, tokens, dim, bits| {
        BlockLayout::new(order.parse().unwrap(), slice.clone(), pair, tokens, dim, bits).unwrap_err()
    };
    let canonical = "layer,kv,head,token,dim";
    assert_eq!(block(canonical, &whole, 0, 8, 16), LayoutError::Zero { what: "block_tokens" });
    assert_eq!(block(canonical, &whole, 8, 0, 16), LayoutError::Zero { what: "head_dim" });
    assert_eq!(block(canonical, &whole, 8, 8, 0), LayoutError::Zero { what: "element_bits" });
    assert_eq!(block(canonical, &whole, 8, 8, 6), LayoutError::SubByte { bits: 6 });
    let unnamed = |axis, count| LayoutError::Unnamed { axis, count };
    assert_eq!(block("layer,kv,token,dim", &whole, 8, 8, 8), unnamed(Axis::Head, 2));
    assert_eq!(block("layer,token,dim", &Slice::whole(2, 1), 8, 8, 8), unnamed(Axis::Kv, 2));
    assert!(matches!(block(canonical, &Slice::whole(0, 2), 8, 8, 8), LayoutError::Slice(_)));
    let huge = block(canonical, &Slice::whole(9, 9), u32::MAX, u32::MAX, 8);
    assert_eq!(huge, LayoutError::Overflow { axis: Axis::Head });
}

#[test]
fn impossible_plans_are_refused() {
    let engine = EngineLayout::dense(llama(), EngineOrder::BLHNC, Tensors::One).unwrap();
    let whole = llama().slice;
    let block = engine.block(Order::CANONICAL, 2).unwrap();
    let refused = |block: &BlockLayout, numbers: &[u32], part: &Slice| {
        plan(&engine, block, &pages(numbers), part).map(|plan| plan.bytes()).unwrap_err()
    };
    let tokens = |pages| PlanError::Tokens { pages, page_tokens: 16, block_tokens: 32 };
    assert_eq!(refused(&block, &[], &whole), tokens(0));
    assert_eq!(refused(&block, &[1], &whole), tokens(1));
    assert_eq!(refused(&block, &[1, 2, 3], &whole), tokens(3));
    let page = PlanError::Page { page: PageIndex(2048), page_count: 2048 };
    assert_eq!(refused(&block, &[1, 2048], &whole), page);
    assert_eq!(refused(&block, &[7, 7], &whole), PlanError::PageTwice { page: PageIndex(7) });
    let none = Slice { heads: 3..3, ..whole.clone() };
    assert!(matches!(refused(&block, &[1, 2], &none), PlanError::Slice(_)));

    let outside =
        |side, part: &Slice, of: &Slice| PlanError::Outside { side, part: part.clone(), of: of.clone() };
    let other = Slice::whole(32, 4);
    assert_eq!(refused(&block, &[1, 2], &other), outside("engine", &other, &whole));
    let make = |slice: &Slice, content, dim, bits| {
        BlockLayout::new(Order::CANONICAL, slice.clone(), content, 32, dim, bits).unwrap()
    };
    let half = Slice { heads: 0..4, ..whole.clone() };
    let halved = make(&half, Content::KeyValue, 128, 16);
    assert_eq!(refused(&halved, &[1, 2], &whole), outside("block", &whole, &half));
    assert_eq!(halved.ranges(&whole).map(Iterator::count), Err(outside("block", &whole, &half)));

    let differs = |what, engine, block| PlanError::Differs { what, engine, block };
    let longer = make(&whole, Content::KeyValue, 256, 16);
    assert_eq!(refused(&longer, &[1, 2], &whole), differs("head_dim", 128, 256));
    let wider = make(&whole, Content::KeyValue, 128, 32);
    assert_eq!(refused(&wider, &[1, 2], &whole), differs("element_bytes", 2, 4));
    let latent = make(&whole, Content::Latent, 128, 16);
    let content = PlanError::Content { engine: Content::KeyValue, block: Content::Latent };
    assert_eq!(refused(&latent, &[1, 2], &whole), content);
}

/// One worker of an engine: its layout and its memory.
struct Worker {
    layout: EngineLayout,
    order: (EngineOrder, Tensors),
    tensors: Vec<Vec<u8>>,
}

/// The pages of the one block, two tokens each.
const PAGES: [u32; 3] = [4, 1, 2];

/// An element's own bytes; never zeros.
fn element(layer: u64, kv: u64, head: u64, token: u64, dim: u64) -> [u8; 2] {
    (((((layer * 2 + kv) * 8 + head) * 6 + token) * 3 + dim + 1) as u16).to_le_bytes()
}

impl Worker {
    fn new(order: (EngineOrder, Tensors), slice: &Slice) -> Self {
        let (slice, content) = (slice.clone(), Content::KeyValue);
        let shape = Shape { slice, content, page_count: 5, page_tokens: 2, head_dim: 3, element_bits: 16 };
        let layout = EngineLayout::dense(shape, order.0, order.1).unwrap();
        let tensors = vec![vec![0; layout.tensor_bytes() as usize]; layout.tensor_count() as usize];
        Self { layout, order, tensors }
    }

    /// Every element of the pages: tensor, offset and the bytes that it should have.
    fn elements(&self) -> Vec<(usize, usize, [u8; 2])> {
        let shape = self.layout.shape();
        let address = dense_address(shape, self.order.0, self.order.1);
        let mut of_block = counts(shape);
        of_block[Axis::Page as usize] = PAGES.len() as u64;
        let elements = every(of_block).map(|index| {
            let [nth, layer, kv, head, token, dim] = index;
            let (tensor, offset) = address([PAGES[nth as usize].into(), layer, kv, head, token, dim]);
            let layer = layer + u64::from(shape.slice.layers.start);
            let head = head + u64::from(shape.slice.heads.start);
            (tensor as usize, offset as usize, element(layer, kv, head, nth * 2 + token, dim))
        });
        elements.collect()
    }
}

/// Both sides of a run.
fn sides(run: &Run) -> (Range<usize>, Range<usize>) {
    let range = |offset| offset as usize..(offset + run.bytes) as usize;
    (range(run.device_offset), range(run.block_offset))
}

/// A slice for each rank of each stage of a pipeline, whose stages end at these layers.
fn split(stage_ends: &[u16], ranks: u16) -> Vec<Slice> {
    let mut slices = Vec::new();
    let mut start = 0;
    for &end in stage_ends {
        slices.extend((0..ranks).map(|rank| {
            let heads = heads_of_rank(8, ranks, rank).unwrap();
            Slice { layers: start..end, heads, layers_total: 3, heads_total: 8 }
        }));
        start = end;
    }
    slices
}

#[test]
fn what_workers_of_one_engine_stored_workers_of_another_read() {
    let parallel = [
        (split(&[3], 2), split(&[3], 4)),
        (split(&[3], 4), split(&[3], 1)),
        (split(&[3], 8), split(&[3], 2)),
        (split(&[3], 16), split(&[3], 4)),
        (split(&[3], 1), split(&[1, 3], 2)),
        (split(&[1, 3], 4), split(&[3], 2)),
        (split(&[1, 3], 2), split(&[2, 3], 8)),
    ];
    // Every engine writes for another one and reads from another one, by way of another order of blocks.
    for (nth, writers) in ENGINES.into_iter().enumerate() {
        let readers = ENGINES[(nth * 7 + 3) % ENGINES.len()];
        let order = orders()[nth * 2 % orders().len()];
        for (stored, wanted) in &parallel {
            hand_over(writers, stored, order, readers, wanted);
        }
    }
}

/// Stores a block in slices, and reads it in others: into pages, and into blocks of the reader's own.
fn hand_over(
    writers: (EngineOrder, Tensors),
    stored: &[Slice],
    order: Order,
    readers: (EngineOrder, Tensors),
    wanted: &[Slice],
) {
    let pages = pages(&PAGES);
    let store = |slice: &Slice| {
        let mut worker = Worker::new(writers, slice);
        for (tensor, offset, bytes) in worker.elements() {
            worker.tensors[tensor][offset..offset + 2].copy_from_slice(&bytes);
        }
        let layout = worker.layout.block(order, 3).unwrap();
        let mut block = vec![0; layout.bytes() as usize];
        for run in plan(&worker.layout, &layout, &pages, slice).unwrap().runs() {
            let (device, host) = sides(&run);
            block[host].copy_from_slice(&worker.tensors[run.tensor.0 as usize][device]);
        }
        (layout, block)
    };
    let blocks: Vec<_> = stored.iter().map(store).collect();
    for slice in wanted {
        let mut worker = Worker::new(readers, slice);
        let own = worker.layout.block(Order::CANONICAL, 3).unwrap();
        let mut recut = vec![0; own.bytes() as usize];
        for piece in cover(slice, stored).unwrap() {
            let (layout, block) = &blocks[piece.stored];
            let to_pages = plan(&worker.layout, layout, &pages, &piece.part).unwrap();
            for run in runs_of(to_pages.rows()) {
                let (device, host) = sides(&run);
                worker.tensors[run.tensor.0 as usize][device].copy_from_slice(&block[host]);
            }
            let from = EngineLayout::of_block(layout);
            for run in plan(&from, &own, &[PageIndex(0)], &piece.part).unwrap().runs() {
                let (theirs, ours) = sides(&run);
                recut[ours].copy_from_slice(&block[theirs]);
            }
        }
        let elements = worker.elements();
        for &(tensor, offset, bytes) in &elements {
            assert_eq!(worker.tensors[tensor][offset..offset + 2], bytes, "{slice}");
        }
        let all = worker.tensors.iter().flat_map(|tensor| tensor.chunks(2));
        let written = all.filter(|bytes| **bytes != [0, 0]).count();
        assert_eq!(written, elements.len(), "nothing else is touched");
        for index in every([1, own.count(Axis::Layer), 2, own.count(Axis::Head), 6, 3]) {
            let [_, layer, kv, head, token, dim] = index;
            let (layer, head) = (layer as u16 + slice.layers.start, head as u16 + slice.heads.start);
            let at = (own.offset(layer, kv as u8, head, token as u32).unwrap() + dim * 2) as usize;
            assert_eq!(recut[at..at + 2], element(layer.into(), kv, head.into(), token, dim));
        }
    }
}

/// A range within `0..total`.
fn range(total: u16) -> impl Strategy<Value = Range<u16>> {
    (0..total).prop_flat_map(move |start| (start + 1..=total).prop_map(move |end| start..end))
}

/// Of a range.
fn subrange(whole: &Range<u16>) -> impl Strategy<Value = Range<u16>> + use<> {
    let start = whole.start;
    range(whole.len() as u16).prop_map(move |part| start + part.start..start + part.end)
}

/// An engine of any order and padding, with axes of any length.
fn engines() -> impl Strategy<Value = EngineLayout> {
    let lengths = (range(4), range(5), any::<bool>(), 1..6u32, 1..4u32, 1..4u32);
    let order = Just(Axis::ALL.to_vec()).prop_shuffle();
    let padding = prop::array::uniform6(prop_oneof![3 => Just(0u64), 1 => 0..9u64]);
    let rest = (prop::sample::select(vec![8, 16, 32]), any::<[bool; 2]>(), 0..3u32, 0..20u64);
    (lengths, order, padding, rest).prop_map(|(lengths, order, padding, rest)| {
        let (layers, heads, pair, page_count, page_tokens, head_dim) = lengths;
        let (element_bits, [layers_apart, halves_apart], tensor, offset) = rest;
        let slice = Slice { layers, heads, layers_total: 4, heads_total: 5 };
        let content = if pair { Content::KeyValue } else { Content::Latent };
        let shape = Shape { slice, content, page_count, page_tokens, head_dim, element_bits };
        let (mut inner, mut tensors) = (u64::from(element_bits / 8), 1);
        let mut steps = [Step::Bytes(0); 6];
        for axis in order.into_iter().rev() {
            let count = shape.count(axis);
            if (axis == Axis::Layer && layers_apart) || (axis == Axis::Kv && halves_apart) {
                steps[axis as usize] = Step::Tensors(tensors);
                tensors *= count as u32;
            } else {
                inner += padding[axis as usize];
                steps[axis as usize] = Step::Bytes(inner);
                inner *= count;
            }
        }
        let bytes = |axis: Axis| match steps[axis as usize] {
            Step::Bytes(bytes) => bytes,
            Step::Tensors(_) => unreachable!("only layers and halves are apart"),
        };
        let strides = Strides {
            layer: steps[Axis::Layer as usize],
            kv: steps[Axis::Kv as usize],
            page: bytes(Axis::Page),
            head: bytes(Axis::Head),
            token: bytes(Axis::Token),
            dim: bytes(Axis::Dim),
        };
        EngineLayout::new(shape, strides, Place { tensor: TensorIndex(tensor), offset }).unwrap()
    })
}

/// What a plan is made of.
type Request = (EngineLayout, BlockLayout, Vec<PageIndex>, Slice);

/// An engine, a block of any order that has some of it and more, pages in any order, a part that both have.
fn requests() -> impl Strategy<Value = Request> {
    engines().prop_flat_map(|engine| {
        let slice = engine.shape().slice.clone();
        let part = (subrange(&slice.layers), subrange(&slice.heads), prop::array::uniform4(0..3u16));
        let all: Vec<u32> = (0..engine.shape().page_count).collect();
        let some = prop::sample::subsequence(all.clone(), 1..=all.len());
        let pages = prop_oneof![some, Just(all).prop_shuffle()];
        let order = Just(Order::CANONICAL.axes().to_vec()).prop_shuffle();
        (Just(engine), part, pages, order).prop_map(|(engine, (layers, heads, more), pages, order)| {
            let part = Slice { layers, heads, layers_total: 4, heads_total: 5 };
            let slice = Slice {
                layers: part.layers.start.saturating_sub(more[0])..(part.layers.end + more[1]).min(4),
                heads: part.heads.start.saturating_sub(more[2])..(part.heads.end + more[3]).min(5),
                ..part
            };
            let shape = engine.shape();
            let tokens = shape.page_tokens * pages.len() as u32;
            let order = Order::new(&order).unwrap();
            let block =
                BlockLayout::new(order, slice, shape.content, tokens, shape.head_dim, shape.element_bits);
            (engine, block.unwrap(), pages.into_iter().map(PageIndex).collect(), part)
        })
    })
}

/// The sum as the documentation writes it.
fn strided_address(engine: &EngineLayout) -> impl Fn(Index) -> (u32, u64) {
    let (first, strides) = (engine.first(), *engine.strides());
    move |[page, layer, kv, head, token, dim]| {
        let fixed = page * strides.page + head * strides.head + token * strides.token + dim * strides.dim;
        let mut at = (first.tensor.0, first.offset + fixed);
        for (step, index) in [(strides.layer, layer), (strides.kv, kv)] {
            match step {
                Step::Bytes(bytes) => at.1 += bytes * index,
                Step::Tensors(tensors) => at.0 += tensors * index as u32,
            }
        }
        at
    }
}

/// Mostly one that is a slice.
fn any_slice() -> impl Strategy<Value = Slice> {
    let good = (range(4), range(5)).prop_map(|(layers, heads)| Slice { layers, heads, ..Slice::whole(4, 5) });
    let any = any::<[u16; 6]>().prop_map(|[a, b, c, d, layers_total, heads_total]| Slice {
        layers: a..b,
        heads: c..d,
        layers_total,
        heads_total,
    });
    prop_oneof![4 => good, 1 => any]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_strides_and_any_order_are_planned_byte_for_byte((engine, block, pages, part) in requests()) {
        let plan = plan(&engine, &block, &pages, &part).unwrap();
        let expected = reference(&strided_address(&engine), engine.shape(), &block, &pages, &part);
        check(&plan, &engine, &block, &expected);
    }

    #[test]
    fn an_engine_that_is_taken_has_no_two_elements_in_one_byte(
        lengths in prop::array::uniform6(1..3u32),
        strides in prop::array::uniform6(prop_oneof![0..16u64, 0..200u64]),
    ) {
        let [page_count, layers, kv, heads, page_tokens, head_dim] = lengths;
        let content = if kv == 1 { Content::Latent } else { Content::KeyValue };
        let slice = Slice::whole(layers as u16, heads as u16);
        let shape = Shape { slice, content, page_count, page_tokens, head_dim, element_bits: 16 };
        let [page, layer, kv, head, token, dim] = strides;
        let strides = Strides { page, layer: Step::Bytes(layer), kv: Step::Bytes(kv), head, token, dim };
        let first = Place { tensor: TensorIndex(0), offset: 0 };
        if let Ok(engine) = EngineLayout::new(shape.clone(), strides, first) {
            let elements = every(counts(&shape)).map(strided_address(&engine));
            let bytes: Vec<_> = elements.flat_map(|(_, at)| [at, at + 1]).collect();
            let distinct: BTreeSet<_> = bytes.iter().collect();
            prop_assert_eq!(distinct.len(), bytes.len());
            prop_assert_eq!(bytes.into_iter().max(), Some(engine.tensor_bytes() - 1));
        }
    }

    #[test]
    fn no_input_panics_or_leaves_the_memory(
        [slice, part] in prop::array::uniform2(any_slice()),
        lengths in prop::array::uniform4(prop_oneof![3 => 1..5u32, 1 => any::<u32>()]),
        strides in prop::array::uniform6(prop_oneof![0..500u64, any::<u64>()]),
        (bits, tensor, offset) in (any::<[bool; 4]>(), any::<u32>(), any::<u64>()),
        pages in prop::collection::vec(prop_oneof![3 => 0..5u32, 1 => any::<u32>()], 0..4),
    ) {
        let [page_count, page_tokens, head_dim, element_bits] = lengths;
        let content = if bits[0] { Content::Latent } else { Content::KeyValue };
        let element_bits = if bits[1] { 16 } else { element_bits };
        let shape = Shape { slice: slice.clone(), content, page_count, page_tokens, head_dim, element_bits };
        let [page, layer, kv, head, token, dim] = strides;
        let step = |apart, stride| if apart { Step::Tensors(stride as u32) } else { Step::Bytes(stride) };
        let strides = Strides { page, layer: step(bits[2], layer), kv: step(bits[3], kv), head, token, dim };
        let strided = EngineLayout::new(shape.clone(), strides, Place { tensor: TensorIndex(tensor), offset });
        let dense = EngineLayout::dense(shape, EngineOrder::PAGE_HEAD, Tensors::HalvesOfLayers);
        let pages: Vec<_> = pages.into_iter().map(PageIndex).collect();
        for engine in [strided, dense].into_iter().flatten() {
            let Ok(block) = engine.block(Order::CANONICAL, pages.len() as u32) else { continue };
            for part in [&part, &slice] {
                let Ok(plan) = plan(&engine, &block, &pages, part) else { continue };
                for run in plan.runs().take(100).chain(runs_of(plan.rows().take(10)).take(100)) {
                    prop_assert!(run.device_offset + run.bytes <= engine.tensor_bytes());
                    prop_assert!(run.block_offset + run.bytes <= block.bytes());
                    prop_assert!(run.tensor.0 < engine.tensor_count());
                }
            }
        }
    }
}
