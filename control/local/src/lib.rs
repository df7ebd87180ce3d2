//! kv-local: everything on one machine, and the demo.
//!
//! ```text
//!   kv-local demo  -->  kv-local kvd ...   the real daemon, a process of its own, killed on the way
//!        |                   ^  ^  ^
//!        |  trace.rs         |  |  |       worker sessions over shared memory, one a thread
//!        '-> replay.rs ------'--'--'
//!              request: look the prefix up, read and check what is there, store what is not
//!              tally.rs counts, check.rs knows every byte, audit.rs asks for what was promised durable
//!        report.rs        a table for people, one JSON object for programs
//! ```
//! The daemon is this very program, started again with `kvd` as its first argument, so that there is only one
//! thing to build and a `kill -9` hits a process, not a thread. There may be several (nodes.rs), each other's
//! peers; then a worker has a session with each, and a block that another node has is fetched from there.

pub mod audit;
pub mod check;
pub mod daemon;
pub mod demo;
pub mod nodes;
pub mod places;
pub mod progress;
pub mod replay;
pub mod report;
pub mod stop;
pub mod tally;
pub mod trace;
pub mod up;
