//! The client inside engine workers.
