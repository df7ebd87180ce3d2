//! Worker to its own daemon: shared rings, the handshake, passed descriptors.
