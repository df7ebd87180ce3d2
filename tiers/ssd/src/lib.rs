//! The disk tier: a checksummed segment log over direct I/O on io_uring.
