//! Compiles the protocol buffers in pure Rust: nobody needs protoc.

use std::path::PathBuf;

use prost::Message as _;

const PROTOS: [&str; 6] = [
    "kv/v1/blocks.proto",
    "kv/v1/devices.proto",
    "kv/v1/worker.proto",
    "kv/v1/events.proto",
    "kv/v1/admin.proto",
    "kv/v1/fault.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".kv.v1").compile_fds(descriptors)?;
    Ok(())
}
