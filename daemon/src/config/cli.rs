//! The command line of `kvd`.

use std::path::PathBuf;

use clap::Parser;

use super::{Config, ConfigError, Loaded, Sources};

/// The KV daemon: keeps blocks of KV cache in host memory and on disk, one per node.
#[derive(Parser, Clone, Debug, Default)]
#[command(
    name = "kvd",
    version,
    max_term_width = 80,
    disable_help_subcommand = true,
    after_help = "Every key of the configuration can also be set as KVD_<SECTION>__<KEY>.\n\
                  Precedence: defaults < files < environment < flags."
)]
pub struct Flags {
    /// Read this file instead of those in /etc/kvd
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the plan for this machine; opens nothing
    #[arg(long)]
    pub check: bool,
    /// Print the configuration in force
    #[arg(long)]
    pub print_config: bool,
    /// With --print-config: where each value came from
    #[arg(long, requires = "print_config")]
    pub origin: bool,
    /// Set any key of the configuration; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Sockets [listen.run_dir]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<String>,
    /// Shared memory files [host.memory_dir]
    #[arg(long, value_name = "DIR")]
    pub memory_dir: Option<String>,
    /// Disk tier, or off [disk.dir]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<String>,
    /// Host memory, as 4GiB or 25% [host.bytes_max]
    #[arg(long, value_name = "SIZE")]
    pub host_bytes: Option<String>,
    /// Disk space, as 100GiB or 50% [disk.bytes_max]
    #[arg(long, value_name = "SIZE")]
    pub disk_bytes: Option<String>,
    /// Metrics and health, or off [listen.http]
    #[arg(long, value_name = "ADDRESS")]
    pub http: Option<String>,
    /// LMCache's protocol, or off [lmcache.listen]
    #[arg(long, value_name = "ADDR")]
    pub lmcache_listen: Option<String>,
    /// Allow TCP without mutual TLS [listen.insecure]
    #[arg(long)]
    pub insecure: bool,
}

impl Flags {
    /// The settings among the flags: as written, key, value. `--set` comes last and so wins.
    pub fn settings(&self) -> Result<Vec<(String, String, String)>, ConfigError> {
        let named = [
            ("--run-dir", "listen.run_dir", &self.run_dir),
            ("--memory-dir", "host.memory_dir", &self.memory_dir),
            ("--data-dir", "disk.dir", &self.data_dir),
            ("--host-bytes", "host.bytes_max", &self.host_bytes),
            ("--disk-bytes", "disk.bytes_max", &self.disk_bytes),
            ("--http", "listen.http", &self.http),
            ("--lmcache-listen", "lmcache.listen", &self.lmcache_listen),
        ];
        let named = named.into_iter().filter_map(|(flag, key, value)| Some((flag, key, value.as_deref()?)));
        let insecure = self.insecure.then_some(("--insecure", "listen.insecure", "true"));
        let mut settings: Vec<_> =
            named.chain(insecure).map(|(f, k, v)| (f.to_owned(), k.to_owned(), absolute(k, v))).collect();
        for text in &self.set {
            let (key, value) = text.split_once('=').ok_or_else(|| {
                ConfigError::new(format!("--set {text}: expected KEY=VALUE, such as host.bytes_max=1GiB"))
            })?;
            settings.push((format!("--set {key}"), key.to_owned(), value.to_owned()));
        }
        Ok(settings)
    }

    /// The configuration of this process: files, environment and these flags.
    pub fn load(&self) -> Result<Loaded, ConfigError> {
        let mut sources = Sources::of_this_process(self.config.as_deref())?;
        sources.flags = self.settings()?;
        Config::load(&sources)
    }
}

/// A directory given as a flag may be relative to where the command was typed.
fn absolute(key: &str, value: &str) -> String {
    let names_dir = key.ends_with("dir") || (key == "object.store" && !value.contains("://"));
    let is_dir = names_dir && value != "off" && value != "auto";
    match std::path::absolute(value) {
        Ok(path) if is_dir => path.display().to_string(),
        _ => value.to_owned(),
    }
}
