//! kvd: see [`kvd::main`].

fn main() -> std::process::ExitCode {
    kvd::main(std::env::args_os())
}
