//! How the layers of a configuration become one: each source is taken apart into single settings, each
//! setting is checked by itself so that a complaint can name its place, and the last one for a key wins.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::units::{FilePath, Label, OrAuto, Text};
use super::{Config, Principal, Tenant, validate};

/// Where a value came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A file; line and column count from 1.
    File {
        /// As it was named.
        path: PathBuf,
        /// Line.
        line: usize,
        /// Column, in characters.
        column: usize,
    },
    /// This environment variable.
    Env(String),
    /// This flag, as it was written.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line, column } => write!(f, "{}:{line}:{column}", path.display()),
            Self::Env(name) | Self::Flag(name) => f.write_str(name),
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// Where it stands.
    pub origin: Origin,
    /// What is wrong, and what would be right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::Default => f.write_str(&self.message),
            origin => write!(f, "{origin}: {}", self.message),
        }
    }
}

/// All that is wrong with a configuration, one problem a line. The daemon ends with [`super::EXIT_CONFIG`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigError {
    /// Never empty.
    pub problems: Vec<Problem>,
}

impl ConfigError {
    /// One problem that has no place of its own.
    pub fn new(message: impl Into<String>) -> Self {
        Self::at(Origin::Default, message)
    }

    /// One problem at one place.
    pub fn at(origin: Origin, message: impl Into<String>) -> Self {
        Self { problems: vec![Problem { origin, message: message.into() }] }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.problems.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// What `auto` in the configuration is worked out from.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// User the daemon runs as.
    pub uid: u32,
    /// Name of the host.
    pub host_name: String,
    /// `$XDG_RUNTIME_DIR`.
    pub runtime_dir: Option<PathBuf>,
}

impl Facts {
    /// Of this process.
    pub fn of_this_process() -> Self {
        Self {
            uid: rustix::process::getuid().as_raw(),
            host_name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            runtime_dir: std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from),
        }
    }
}

/// All the text that makes a configuration.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// Files, name and text, the later over the earlier.
    pub files: Vec<(PathBuf, String)>,
    /// Environment; names like `KVD_SECTION__KEY` count, and others that begin with `KVD_` are looked at: a
    /// misspelt one must not be passed over in silence.
    pub env: Vec<(String, String)>,
    /// Flags as they were written, with the key and value each stands for.
    pub flags: Vec<(String, String, String)>,
    /// For what is `auto`.
    pub facts: Facts,
}

/// Where the configuration of the machine is looked for.
const SYSTEM_DIR: &str = "/etc/kvd";
const FILE_BYTES_MAX: u64 = 1 << 20;

impl Sources {
    /// Reads what there is: `file`, or `kvd.toml` and `conf.d/*.toml` of `/etc/kvd`, and the environment.
    pub fn of_this_process(file: Option<&Path>) -> Result<Self, ConfigError> {
        let mut files = Vec::new();
        match file {
            Some(path) => files.push((path.to_owned(), read(path)?)),
            None => {
                for path in system_files(Path::new(SYSTEM_DIR))? {
                    let text = read(&path)?;
                    files.push((path, text));
                }
            }
        }
        let text = |part: std::ffi::OsString| part.to_string_lossy().into_owned();
        let env = std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect();
        Ok(Self { files, env, flags: Vec::new(), facts: Facts::of_this_process() })
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let refuse = |why: String| ConfigError::new(format!("{}: {why}", path.display()));
    let bytes = std::fs::metadata(path).map_err(|error| refuse(error.to_string()))?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(refuse(format!("a configuration of {bytes} bytes; at most {FILE_BYTES_MAX} are read")));
    }
    std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))
}

fn system_files(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let mut files = Vec::new();
    let main = dir.join("kvd.toml");
    if main.exists() {
        files.push(main);
    }
    let parts = dir.join("conf.d");
    match std::fs::read_dir(&parts) {
        Ok(entries) => {
            let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
            let mut paths: Vec<_> =
                paths.filter(|path| path.extension().is_some_and(|end| end == "toml")).collect();
            paths.sort();
            files.extend(paths);
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(ConfigError::new(format!("{}: {error}", parts.display()))),
    }
    Ok(files)
}

/// A configuration, and where each value of it came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// What is not wrong and yet should be known.
    pub remarks: Vec<String>,
    origins: BTreeMap<String, Origin>,
}

impl Config {
    /// Puts the layers together, checks them and settles what is `auto` by [`Sources::facts`].
    pub fn load(sources: &Sources) -> Result<Loaded, ConfigError> {
        let mut layers = Layers::default();
        for (path, text) in &sources.files {
            layers.take_file(path, text);
        }
        for (name, value) in &sources.env {
            layers.take_env(name, value);
        }
        for (flag, key, value) in &sources.flags {
            let key: Vec<&str> = key.split('.').collect();
            layers.take_text(&key, value, Origin::Flag(flag.clone()));
        }
        let mut loaded = layers.build(&sources.facts)?;
        loaded.remarks.extend(validate::doubts(&loaded.config));
        let problems: Vec<_> = validate::problems(&loaded.config)
            .into_iter()
            .map(|(key, message)| Problem {
                origin: loaded.origin(&key),
                message: format!("{key}: {message}"),
            })
            .collect();
        if problems.is_empty() { Ok(loaded) } else { Err(ConfigError { problems }) }
    }

    /// The configuration that one file's text alone makes.
    pub fn parse(text: &str) -> Result<Loaded, ConfigError> {
        Self::load(&Sources { files: vec![("kvd.toml".into(), text.to_owned())], ..Sources::default() })
    }
}

impl Loaded {
    /// Where the value of `key` came from, such as `host.bytes_max`.
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// Every key that somebody set, and where.
    pub fn set(&self) -> impl Iterator<Item = (&str, &Origin)> {
        self.origins.iter().map(|(key, origin)| (key.as_str(), origin))
    }

    /// Every key with its value and where that came from, both in words.
    pub fn values(&self) -> Vec<(String, String, String)> {
        fn walk(path: &str, table: &Table, all: &mut Vec<(String, String)>) {
            for (key, value) in table {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match value {
                    Value::Table(inner) => walk(&path, inner, all),
                    value => all.push((path, value.to_string())),
                }
            }
        }
        let tree = Table::try_from(&self.config).expect("a configuration is a table");
        let mut all = Vec::new();
        walk("", &tree, &mut all);
        all.into_iter().map(|(key, value)| (key.clone(), value, self.origin(&key).to_string())).collect()
    }

    /// The whole configuration as TOML that reads back the same, with what each key is for and, when
    /// `origins` is asked for, where its value came from.
    pub fn print_effective(&self, origins: bool) -> String {
        let tree = Table::try_from(&self.config).expect("a configuration is a table");
        let mut text = String::new();
        for (section, keys) in Config::SECTIONS {
            let names = match section.strip_suffix(".*") {
                Some(parent) => match tree.get(parent) {
                    Some(Value::Table(all)) => all.keys().map(|name| format!("{parent}.{name}")).collect(),
                    _ => Vec::new(),
                },
                None => vec![(*section).to_owned()],
            };
            for name in names {
                let values = find(&tree, &name.split('.').collect::<Vec<_>>()).and_then(Value::as_table);
                let values = values.expect("every section is in the tree");
                text.push_str(&format!("{}[{name}]\n", if text.is_empty() { "" } else { "\n" }));
                for (key, about) in *keys {
                    if values[*key].is_table() {
                        continue;
                    }
                    about.iter().for_each(|line| text.push_str(&format!("#{line}\n")));
                    text.push_str(&format!("{key} = {}", values[*key]));
                    if origins {
                        text.push_str(&format!("  # from: {}", self.origin(&format!("{name}.{key}"))));
                    }
                    text.push('\n');
                }
            }
        }
        text
    }
}

/// Sections whose parts have names, and what one of them is.
const NAMED: [(&str, &str); 2] = [("tenants", "tenant"), ("principals", "principal")];

/// Whether a tenant or a principal can have this name: scopes and directories carry them.
fn is_name(name: &str) -> bool {
    kv_block::Scope::is_tenant(name)
}

/// The value at `path`.
fn find<'a>(tree: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (last, parents) = path.split_last()?;
    parents.iter().try_fold(tree, |table, name| table.get(*name)?.as_table())?.get(*last)
}

/// The value at `path`, where tables are made on the way.
fn put(tree: &mut Table, path: &[&str], value: Value) {
    let Some((last, parents)) = path.split_last() else { return };
    let mut table = tree;
    for name in parents {
        let next = table.entry(*name).or_insert_with(|| Value::Table(Table::new()));
        let Value::Table(inner) = next else { return };
        table = inner;
    }
    table.insert((*last).to_owned(), value);
}

struct Layers {
    /// The default tree, with `tenants.*` as the pattern of any tenant, and so for principals.
    known: Table,
    tree: Table,
    origins: BTreeMap<String, Origin>,
    problems: Vec<Problem>,
    remarks: Vec<String>,
}

impl Default for Layers {
    fn default() -> Self {
        let mut pattern = Config::default();
        pattern.tenants.insert("*".into(), Tenant::default());
        pattern.principals.insert("*".into(), Principal::default());
        Self {
            known: Table::try_from(pattern).expect("a configuration is a table"),
            tree: Table::new(),
            origins: BTreeMap::new(),
            problems: Vec::new(),
            remarks: Vec::new(),
        }
    }
}

/// Variables under our name that are not the daemon's: clients, examples and tests read them.
const OF_OTHERS: [&str; 7] = [
    "KVD_SOCKET",
    "KVD_CUDA",
    "KVD_CUDA_LIBRARY",
    "KVD_BINARY",
    "KVD_SEED",
    "KVD_KILL_CYCLES",
    "KVD_VICTIMS",
];

/// Every key as a variable: its section and its own name as they begin and end one, and the whole.
fn variables() -> impl Iterator<Item = (String, String, String)> {
    Config::SECTIONS.iter().flat_map(|(section, keys)| {
        let section = section.replace('*', "<name>").replace('.', "__").to_ascii_uppercase();
        keys.iter().map(move |(key, _)| {
            let key = key.to_ascii_uppercase();
            let parent = section.split("<NAME>").next().unwrap_or_default().trim_end_matches('_');
            (parent.replace("__", "_"), key.clone(), format!("KVD_{section}__{key}"))
        })
    })
}

/// How much `text` looks like a key with its underscores miscounted. Between the two parts may stand the name of
/// a tenant or a principal.
fn likeness(text: &str, parent: &str, key: &str) -> f64 {
    let rest = text.strip_prefix(parent).and_then(|rest| rest.strip_suffix(key));
    let named = NAMED.iter().any(|(named, _)| named.eq_ignore_ascii_case(parent));
    if named && rest.is_some_and(|rest| rest.starts_with('_') && rest.ends_with('_')) {
        return 1.0;
    }
    strsim::jaro_winkler(text, &format!("{parent}_{key}"))
}

/// More are not worth reading.
const PROBLEMS_MAX: usize = 20;

impl Layers {
    fn complain(&mut self, origin: Origin, message: String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(Problem { origin, message });
        }
    }

    fn take_file(&mut self, path: &Path, text: &str) {
        let line_starts: Vec<usize> =
            std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        let place = |offset: usize| {
            let offset = text.floor_char_boundary(offset.min(text.len()));
            let line = line_starts.partition_point(|start| *start <= offset);
            let column = text[line_starts[line - 1]..offset].chars().count() + 1;
            Origin::File { path: path.to_owned(), line, column }
        };
        match DeTable::parse(text) {
            Ok(table) => self.take_table(table.get_ref(), &mut Vec::new(), &place),
            Err(error) => {
                let at = place(error.span().map_or(0, |span| span.start));
                self.complain(at, error.message().to_owned());
            }
        }
    }

    fn take_table<'a>(
        &mut self,
        table: &'a DeTable<'_>,
        path: &mut Vec<&'a str>,
        place: &dyn Fn(usize) -> Origin,
    ) {
        for (key, value) in table {
            if self.problems.len() >= PROBLEMS_MAX {
                return;
            }
            path.push(key.get_ref());
            let origin = place(key.span().start);
            match (self.known_at(path), value.get_ref()) {
                (None, _) => self.complain_unknown(path, origin),
                (Some(known), DeValue::Table(inner)) if known.is_table() => {
                    self.take_table(inner, path, place);
                }
                (Some(known), _) if known.is_table() => {
                    self.complain(origin, format!("{} is a section, not a value", path.join(".")));
                }
                (Some(_), leaf) => match owned(leaf) {
                    Ok(value) => self.set(path, value, origin),
                    Err(message) => self.complain(origin, format!("{}: {message}", path.join("."))),
                },
            }
            path.pop();
        }
    }

    fn take_env(&mut self, name: &str, value: &str) {
        let Some(key) = name.strip_prefix("KVD_") else { return };
        if !key.contains("__") {
            return self.take_stray(name, key);
        }
        let key = key.to_ascii_lowercase();
        self.take_text(&key.split("__").collect::<Vec<_>>(), value, Origin::Env(name.to_owned()));
    }

    /// A variable under our name that sets nothing. One that all but names a key was meant to.
    fn take_stray(&mut self, name: &str, key: &str) {
        // Kubernetes tells every pod of a namespace about a service named kvd.
        let of_a_service = key.contains("SERVICE_") || key.split('_').any(|part| part == "PORT");
        if OF_OTHERS.contains(&name) || of_a_service || name.starts_with("KVD_STORY_") {
            return;
        }
        let near = variables()
            .map(|(parent, leaf, variable)| (likeness(key, &parent, &leaf), variable))
            .max_by(|(a, _), (b, _)| a.total_cmp(b));
        match near {
            Some((likeness, near)) if likeness > 0.9 => {
                let message = format!("it sets nothing; did you mean {near}, with two underscores?");
                self.complain(Origin::Env(name.to_owned()), message);
            }
            _ => self.remarks.push(format!(
                "{name} in the environment sets nothing: keys are set as KVD_<SECTION>__<KEY>, with two underscores"
            )),
        }
    }

    /// Takes a value written as bare text: the type of the default says how to read it.
    fn take_text(&mut self, path: &[&str], text: &str, origin: Origin) {
        let Some(known) = self.known_at(path) else { return self.complain_unknown(path, origin) };
        let text = text.trim();
        let number = |text: &str| text.parse().map(Value::Integer).ok();
        let value = match known {
            Value::Table(_) => {
                return self.complain(origin, format!("{} is a section, not a value", path.join(".")));
            }
            Value::Boolean(_) => text.parse().map(Value::Boolean).ok(),
            Value::Integer(_) => number(text),
            Value::Array(_) => {
                let parts = text.trim_start_matches('[').trim_end_matches(']').split(',');
                let parts = parts.map(|part| part.trim().trim_matches('"')).filter(|part| !part.is_empty());
                Some(parts.map(|part| number(part).unwrap_or_else(|| part.into())).collect::<Vec<_>>().into())
            }
            _ => None,
        };
        self.set(path, value.unwrap_or_else(|| text.into()), origin);
    }

    /// What the default tree holds at `path`.
    fn known_at(&self, path: &[&str]) -> Option<&Value> {
        match path {
            [section, name, rest @ ..] if NAMED.iter().any(|(named, _)| named == section) => {
                is_name(name).then(|| find(&self.known, &[&[*section, "*"], rest].concat()))?
            }
            _ => find(&self.known, path),
        }
    }

    fn complain_unknown(&mut self, path: &[&str], origin: Origin) {
        let key = path.join(".");
        let misnamed = match path {
            [section, name, ..] if !is_name(name) => NAMED.iter().find(|(named, _)| named == section),
            _ => None,
        };
        let message = match (misnamed, path) {
            (Some((_, what)), [_, name, ..]) => {
                format!("`{name}` cannot name a {what}: expected 1 to 63 of a-z, 0-9 and '-'")
            }
            _ => match self.nearest(&key) {
                Some(near) => format!("unknown key {key}; did you mean {near}?"),
                None => format!("unknown key {key}"),
            },
        };
        self.complain(origin, message);
    }

    /// The section or key that looks most like `key`: as a whole, or like the end of one.
    fn nearest(&self, key: &str) -> Option<String> {
        let mut names = Vec::new();
        for (section, keys) in Config::SECTIONS {
            let typed = section
                .strip_suffix('*')
                .and_then(|parent| key.strip_prefix(parent)?.split_once('.'))
                .map(|parts| parts.0);
            let section = section.replace('*', typed.unwrap_or("<name>"));
            names.extend(keys.iter().map(|(name, _)| format!("{section}.{name}")));
            names.push(section);
        }
        let likeness = |name: &str| {
            let tail = name.rsplit('.').next().unwrap_or(name);
            let whole = strsim::jaro_winkler(key, name);
            if key.contains('.') { whole } else { whole.max(strsim::jaro_winkler(key, tail)) }
        };
        let scored = names.iter().map(|name| (likeness(name), name));
        let best = scored.max_by(|(a, _), (b, _)| a.total_cmp(b))?;
        (best.0 > 0.8).then(|| best.1.clone())
    }

    /// Checks one setting by itself and keeps it.
    fn set(&mut self, path: &[&str], value: Value, origin: Origin) {
        let key = path.join(".");
        let mut alone = Table::new();
        put(&mut alone, path, value.clone());
        match Config::deserialize(alone) {
            Ok(_) => {
                put(&mut self.tree, path, value);
                self.origins.insert(key, origin);
            }
            Err(error) => {
                let message = plain(error.message());
                self.complain(origin, format!("{key}: {message}"));
            }
        }
    }

    fn build(self, facts: &Facts) -> Result<Loaded, ConfigError> {
        if !self.problems.is_empty() {
            return Err(ConfigError { problems: self.problems });
        }
        let config = Config::deserialize(self.tree).map_err(|error| ConfigError::new(error.message()))?;
        Ok(Loaded { config: settle(config, facts), remarks: self.remarks, origins: self.origins })
    }
}

/// Serde's words for types, in words for people.
fn plain(message: &str) -> String {
    let words = [
        ("expected u16", "expected a whole number from 0 to 65535"),
        ("expected u32", "expected a whole number from 0 to 4294967295"),
        ("expected a boolean", "expected true or false"),
        ("invalid value: ", ""),
        ("invalid type: ", ""),
        ("expected a sequence", "expected a list"),
    ];
    words.iter().fold(message.trim().to_owned(), |text, (from, to)| text.replace(from, to))
}

/// A parsed value without its place.
fn owned(value: &DeValue<'_>) -> Result<Value, String> {
    Ok(match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Boolean(truth) => Value::Boolean(*truth),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map(Value::Integer)
            .map_err(|_| format!("{} does not fit 64 bits", number.as_str()))?,
        DeValue::Float(number) => number
            .as_str()
            .parse()
            .map(Value::Float)
            .map_err(|_| format!("{} is no number", number.as_str()))?,
        DeValue::Datetime(_) => return Err("a date is expected nowhere; quote it if it is text".into()),
        DeValue::Array(items) => {
            Value::Array(items.iter().map(|item| owned(item.get_ref())).collect::<Result<_, _>>()?)
        }
        DeValue::Table(_) => return Err("expected a value, found a section".into()),
    })
}

/// Gives what is `auto` and depends on the process alone its value.
fn settle(mut config: Config, facts: &Facts) -> Config {
    let Facts { uid, host_name, runtime_dir } = facts;
    if config.node.name == OrAuto::Auto {
        let first = host_name.split('.').next().unwrap_or_default();
        config.node.name = OrAuto::Set(Label::parse(first).unwrap_or_else(|| Label("kvd".into())));
    }
    if config.listen.run_dir == OrAuto::Auto {
        let dir = kv_block::place::run_dir(*uid, runtime_dir.as_deref());
        config.listen.run_dir = OrAuto::Set(FilePath(dir));
    }
    if config.host.memory_dir == OrAuto::Auto {
        let node = config.node_name();
        let name = if *uid == 0 { format!("kvd-{node}") } else { format!("kvd-{uid}-{node}") };
        config.host.memory_dir = OrAuto::Set(FilePath(Path::new("/dev/shm").join(name)));
    }
    if config.lmcache.shm_name == OrAuto::Auto {
        let name = format!("kvd-{}", config.node_name()).chars().take(63).collect();
        config.lmcache.shm_name = OrAuto::Set(Label(name));
    }
    config
}
