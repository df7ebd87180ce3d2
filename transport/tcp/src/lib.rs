//! The path that every machine has: TCP, plain or with certificates on both sides.
//!
//! ```text
//!   reader's node                                                     owner's node
//!     Dialer::control  -- Hello ------------------------------------->  Listener -> Accepted
//!     Control          <------------- messages, batched ------------->  Control
//!     Dialer::link     -- Join(session) ----------------------------->  Listener -> OwnerLink of that session
//!     ReaderLink       -- Read(wants) ------------------------------->  table: want -> held block
//!       slot           <------------------------- header, bytes ------    straight from the arena
//! ```
//! Both kinds of connection come in at one port; the first frame says which kind it is. A link has several
//! connections: one for small reads, so that they never queue behind large ones, and some for all others.
//!
//! Every connection is one task (control: two halves) of one of the two runtimes that were given; nothing else runs here.
//! The bytes of a block are copied by the kernel from the owner's arena and by the kernel into the reader's slot; the
//! checksum is taken on the way, while the piece is in the cache. Without `unsafe`, there is no memory that a
//! connection could still write after it has given it back.
//!
//! ```text
//!   limits.rs   every bound, with its default
//!   tls.rs      certificates, and whose name the other end carries
//!   stream.rs   a socket with or without TLS, and what is set on it
//!   inbox.rs    frames out of a stream of bytes
//!   control.rs  a control connection: a half that says, a half that hears
//!   dial.rs     opening connections
//!   door.rs     who is let in while how many are inside: plain values
//!   listen.rs   taking connections, and telling them apart
//!   runtimes.rs the threads that all of it runs on
//!   reader.rs   the link of the end that reads (its connections: reading.rs)
//!   owner.rs    the link of the end that has the blocks (its connections: serving.rs)
//! ```

mod control;
mod dial;
mod door;
mod error;
mod inbox;
mod limits;
mod listen;
mod owner;
mod reader;
mod reading;
mod runtimes;
mod serving;
mod stream;
mod tls;

pub use control::{Control, ControlReader, ControlWriter, End};
pub use dial::Dialer;
pub use error::Error;
pub use limits::Limits;
pub use listen::{Accepted, Listener, Sessions};
pub use owner::OwnerLink;
pub use reader::ReaderLink;
pub use runtimes::{Runtimes, bulk_runtime};
pub use tls::{PeerIdentity, Security, Tls, TlsError};
