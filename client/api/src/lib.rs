//! The gRPC contract: protocol buffers, conversions and faults.
