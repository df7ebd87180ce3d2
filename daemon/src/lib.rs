//! kvd, the KV daemon: one per node.

pub mod check;
pub mod config;
pub mod http;
pub mod listen;
pub mod logging;
pub mod metrics;
pub mod peercred;
pub mod plan;
pub mod resources;
pub mod systemd;
pub mod tls;
pub mod topology;
