//! The brain of a node: takes events, changes its state, emits commands; owns no device.
