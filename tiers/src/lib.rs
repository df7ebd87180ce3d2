//! Where blocks live: the catalog, the host tier, eviction, admission and the store trait.

pub mod store;
