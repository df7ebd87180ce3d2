//! The order of a block, as a scope says it, and that of an engine's memory, as a worker does.
#![no_main]

use kv_block::layout::{Axis, EngineOrder, Order};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match text.parse::<Order>() {
        Ok(order) => {
            assert_eq!(order.to_string(), text, "one text for one meaning");
            assert_eq!(Order::new(order.axes()), Ok(order));
            assert!(!order.axes().contains(&Axis::Page));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    match text.parse::<EngineOrder>() {
        Ok(order) => {
            assert_eq!(order.to_string().parse(), Ok(order), "{order}");
            assert_eq!(EngineOrder::new(order.axes()), Ok(order));
            assert_eq!(order.block().to_string().parse(), Ok(order.block()));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
