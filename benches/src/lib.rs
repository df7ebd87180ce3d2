//! Benches of the promised numbers: shared helpers.
