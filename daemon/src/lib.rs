//! kvd, the KV daemon: one per node.
