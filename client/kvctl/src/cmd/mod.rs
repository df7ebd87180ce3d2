//! One file per command: its arguments, its call, and pure functions from the answer to text. `peers` and `gpus` are no
//! commands: they have what several of them say of peers and of GPUs, as `object` has of packs.

pub(crate) mod bench;
pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod describe;
pub(crate) mod doctor;
pub(crate) mod drain;
pub(crate) mod evict;
pub(crate) mod explain;
pub(crate) mod get;
pub(crate) mod gpus;
pub(crate) mod object;
pub(crate) mod options;
pub(crate) mod peers;
pub(crate) mod pin;
pub(crate) mod purge;
pub(crate) mod quota;
pub(crate) mod status;
pub(crate) mod unpin;
pub(crate) mod verify;
pub(crate) mod version;
pub(crate) mod why;
