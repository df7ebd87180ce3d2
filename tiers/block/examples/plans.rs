//! What a plan costs: a page of 32 layers, 8 heads and 16 tokens, in the orders of engines.
//!
//! ```sh
//! cargo run --release -p kv-block --example plans
//! ```
//! Microseconds, the median of 1,000: to make the plan, to walk all its rows, and to walk all its copies.

#![expect(clippy::disallowed_methods, reason = "this program measures")]

use std::hint::black_box;
use std::time::Instant;

use kv_block::Slice;
use kv_block::layout::{Content, EngineLayout, EngineOrder, Order, PageIndex, Shape, Tensors, plan};

fn main() {
    let (slice, content) = (Slice::whole(32, 8), Content::KeyValue);
    let shape = Shape { slice, content, page_count: 2048, page_tokens: 16, head_dim: 128, element_bits: 16 };
    println!("engine | block                   |   plan |  rows      us | copies      us");
    for (order, tensors) in [
        (EngineOrder::LBHNC, Tensors::Layers),
        (EngineOrder::LBNHC, Tensors::Layers),
        (EngineOrder::BLHNC, Tensors::One),
        (EngineOrder::L2BNHD, Tensors::Layers),
        (EngineOrder::LAYER_FIRST, Tensors::HalvesOfLayers),
        (EngineOrder::PAGE_FIRST, Tensors::One),
    ] {
        let engine = EngineLayout::dense(shape.clone(), order, tensors).expect("a layout");
        for stored in [order.block(), Order::CANONICAL] {
            let block = engine.block(stored, 1).expect("a layout");
            let pages = [PageIndex(7)];
            let make = || plan(&engine, &block, &pages, &shape.slice).expect("a plan");
            let ready = make();
            println!(
                "{order:<6} | {stored:<23} | {:>6.2} | {:>5} {:>7.2} | {:>6} {:>7.2}",
                median_us(make),
                ready.rows().count(),
                median_us(|| ready
                    .rows()
                    .map(|rows| rows.first.device_offset ^ rows.first.block_offset)
                    .fold(0, u64::wrapping_add)),
                ready.runs().count(),
                median_us(|| ready
                    .runs()
                    .map(|run| run.device_offset ^ run.block_offset)
                    .fold(0, u64::wrapping_add)),
            );
        }
    }
}

fn median_us<T>(call: impl Fn() -> T) -> f64 {
    let mut times: Vec<_> = (0..1_000)
        .map(|_| {
            let began = Instant::now();
            black_box(call());
            began.elapsed().as_nanos() as f64 / 1e3
        })
        .collect();
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}
