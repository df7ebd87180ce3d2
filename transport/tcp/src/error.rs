//! What keeps a connection from coming about.

use kv_wire::frame::WireError;
use kv_wire::message::Refused;

/// Why a connection does not come about, or a port does not open.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name of a node is nothing that a certificate can carry.
    #[error("`{node}` is no name that a certificate can carry")]
    Name {
        /// The name.
        node: String,
    },
    /// The kernel or the resolver refused.
    #[error("cannot {what} {address}")]
    Io {
        /// `listen at`, `resolve`, `reach`, `talk to`.
        what: &'static str,
        /// Where.
        address: String,
        /// What it said.
        source: std::io::Error,
    },
    /// The certificates do not agree.
    #[error("no secure connection with {address}")]
    Tls {
        /// Where.
        address: String,
        /// What is wrong.
        source: std::io::Error,
    },
    /// It took too long.
    #[error("{address} did not answer in time")]
    TimedOut {
        /// Where.
        address: String,
    },
    /// The other side does not let this connection join.
    #[error("{address} refused: {} ({:?})", refused.text, refused.why)]
    Refused {
        /// Where.
        address: String,
        /// What it said.
        refused: Refused,
    },
    /// The other side speaks something else.
    #[error("{address} does not speak our language")]
    Nonsense {
        /// Where.
        address: String,
        /// What is wrong with it.
        source: WireError,
    },
    /// The other side ended the connection before it had begun.
    #[error("{address} closed the connection")]
    Closed {
        /// Where.
        address: String,
    },
}
