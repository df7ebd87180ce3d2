//! Checks of the repository itself: who imports whom, what lies where, and what must not be left behind.
//! `cargo tidy` runs this file alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use kvd::config::Config;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every file that is tracked or would be, by its path from the root; `None` outside a git checkout.
fn files() -> Option<Vec<String>> {
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output();
    let Some(listed) = listed.ok().filter(|listed| listed.status.success()) else {
        eprintln!("skipped: this is no git checkout");
        return None;
    };
    let names = String::from_utf8(listed.stdout).expect("paths are text");
    let there = |name: &&str| !name.is_empty() && root().join(name).is_file();
    Some(names.split('\0').filter(there).map(str::to_owned).collect())
}

/// The text of every file whose name ends in one of `ends`; all text files when there are none.
fn texts(ends: &[&str]) -> Vec<(String, String)> {
    let wanted = |name: &String| ends.is_empty() || ends.iter().any(|end| name.ends_with(end));
    let names = files().unwrap_or_default().into_iter().filter(wanted);
    names.filter_map(|name| Some((name.clone(), std::fs::read_to_string(root().join(name)).ok()?))).collect()
}

fn members() -> Vec<Value> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let told = Command::new(cargo)
        .args(["metadata", "--offline", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    told["packages"].as_array().unwrap().clone()
}

fn none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

/// Who may import which of ours, in flow order. Tests may look further, but never up into `control/`.
const ARROWS: &[(&str, &[&str])] = &[
    ("kv-api", &["kv-block"]),
    ("kv-client", &["kv-api", "kv-arena", "kv-block", "kv-shm"]),
    ("kvctl", &["kv-api", "kv-block", "kv-client"]),
    ("kv-python", &["kv-client", "kv-gpu"]),
    ("kv-node", &["kv-arena", "kv-block", "kv-tiers", "kv-transport", "kv-wire"]),
    // A worker like any other, only inside the daemon: it opens sessions at the daemon's own socket.
    ("kv-lmcache", &["kv-client"]),
    (
        "kvd",
        &[
            "kv-api",
            "kv-arena",
            "kv-block",
            "kv-gpu",
            "kv-lmcache",
            "kv-node",
            "kv-object",
            "kv-shm",
            "kv-ssd",
            "kv-tcp",
            "kv-tiers",
            "kv-transport",
            "kv-verbs",
            "kv-wire",
        ],
    ),
    ("kv-block", &[]),
    ("kv-arena", &["kv-block"]),
    ("kv-tiers", &["kv-arena", "kv-block"]),
    ("kv-ssd", &["kv-arena", "kv-block", "kv-tiers"]),
    ("kv-object", &["kv-block"]),
    ("kv-gpu", &["kv-arena", "kv-block", "kv-tiers"]),
    // Loaded by tests as a driver is, and known to nobody by name.
    ("kv-gpu-fake", &[]),
    ("kv-wire", &["kv-block"]),
    ("kv-transport", &["kv-arena", "kv-block", "kv-wire"]),
    ("kv-tcp", &["kv-arena", "kv-block", "kv-transport", "kv-wire"]),
    ("kv-verbs", &["kv-arena", "kv-block", "kv-transport", "kv-wire"]),
    ("kv-shm", &["kv-block"]),
    // The one composition above the client: everything on one machine.
    ("kv-local", &["kv-api", "kv-block", "kv-client", "kvd"]),
    (
        "kv-benches",
        &["kv-api", "kv-arena", "kv-block", "kv-client", "kv-node", "kv-shm", "kv-ssd", "kv-tiers", "kvd"],
    ),
];

#[test]
fn imports_follow_the_arrows() {
    let members = members();
    let dir = |member: &Value| {
        let manifest = Path::new(member["manifest_path"].as_str().unwrap()).to_owned();
        manifest.parent().unwrap().strip_prefix(root()).unwrap().display().to_string()
    };
    let dirs: BTreeMap<&str, String> =
        members.iter().map(|member| (member["name"].as_str().unwrap(), dir(member))).collect();
    let mut wrong = Vec::new();
    for member in &members {
        let name = member["name"].as_str().unwrap();
        let Some((_, allowed)) = ARROWS.iter().find(|(known, _)| *known == name) else {
            wrong.push(format!("{name} has no line in ARROWS"));
            continue;
        };
        for import in member["dependencies"].as_array().unwrap() {
            let target = import["name"].as_str().unwrap();
            let Some(place) = dirs.get(target) else { continue };
            let in_tests = import["kind"] == "dev";
            let up = place.starts_with("control/") && !dirs[name].starts_with("control/");
            if up || (!in_tests && !allowed.contains(&target)) || (name == "kv-block") {
                wrong.push(format!("{name} may not import {target}"));
            }
        }
        if member["publish"] != Value::Array(vec![]) {
            wrong.push(format!("{name} could be published"));
        }
    }
    let gone = ARROWS.iter().filter(|(known, _)| !dirs.contains_key(known));
    wrong.extend(gone.map(|(known, _)| format!("{known} is in ARROWS, but no member")));
    none("imports", &wrong);
}

/// Folders of the crates that own raw memory or a device, and the one that speaks Python's buffer protocol.
const UNSAFE: [&str; 6] =
    ["tiers/arena/", "tiers/gpu/", "tiers/ssd/", "transport/verbs/", "transport/shm/", "client/python/"];

#[test]
fn unsafe_code_stays_in_the_crates_that_own_memory_or_a_device() {
    let mut wrong = Vec::new();
    for (name, text) in texts(&[".rs"]) {
        let opens = ["allow", "expect", "warn"]
            .iter()
            .any(|word| text.contains(&format!("{word}(unsafe{}", "_code")));
        if opens && !UNSAFE.iter().any(|home| name.starts_with(home)) {
            wrong.push(format!("{name} opens the door to unsafe code"));
        }
    }
    for member in members() {
        let manifest = std::fs::read_to_string(member["manifest_path"].as_str().unwrap()).unwrap();
        if !manifest.contains("[lints]\nworkspace = true") {
            wrong.push(format!("{} does not take the lints of the workspace", member["name"]));
        }
    }
    none("unsafe code", &wrong);
}

#[test]
fn the_top_level_is_the_fixed_one() {
    const TOP: [&str; 11] = [
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "README.md",
        "benches",
        "client",
        "control",
        "daemon",
        "fuzz",
        "tiers",
        "transport",
    ];
    let files = files().unwrap_or_default();
    let tops: BTreeSet<&str> = files.iter().filter_map(|name| name.split('/').next()).collect();
    let wrong: Vec<_> = tops.iter().filter(|top| !top.starts_with('.') && !TOP.contains(top)).collect();
    assert!(wrong.is_empty(), "not of the top level: {wrong:?}");
}

#[test]
fn nothing_is_left_unfinished() {
    // Written in two parts, so that this file does not find itself.
    let leftovers = [
        ("todo", "!("),
        ("unimplemented", "!("),
        ("dbg", "!("),
        ("#[ig", "nore"),
        ("FIX", "ME"),
        ("XX", "X"),
    ];
    let mut wrong = Vec::new();
    for (name, text) in texts(&[".rs"]) {
        for (at, line) in text.lines().enumerate() {
            for (first, second) in leftovers {
                if line.contains(&format!("{first}{second}")) {
                    wrong.push(format!("{name}:{}: {first}{second}", at + 1));
                }
            }
        }
    }
    none("left unfinished", &wrong);
}

#[test]
fn links_in_documents_lead_somewhere() {
    let mut wrong = Vec::new();
    for (name, text) in texts(&[".md"]) {
        let folder = root().join(&name).parent().unwrap().to_owned();
        for part in text.split("](").skip(1) {
            let link = part.split([')', ' ']).next().unwrap_or_default();
            let path = link.split('#').next().unwrap_or_default();
            let elsewhere = link.contains("://") || link.starts_with("mailto:");
            if !elsewhere && !path.is_empty() && !folder.join(path).exists() {
                wrong.push(format!("{name}: {link}"));
            }
        }
    }
    none("broken links", &wrong);
}

#[test]
fn no_machine_and_no_registry_is_named() {
    let paths = [("/wo", "rk/"), ("/fa", "rm/")];
    let hosts = [
        ("static.crates", ".io"),
        ("index.crates", ".io"),
        ("files.python", "hosted.org"),
        ("registry.npm", "js.org"),
        ("deb.deb", "ian.org"),
        (".lib", "rary/"),
    ];
    let mut wrong = Vec::new();
    for (name, text) in texts(&[]).into_iter().filter(|(name, _)| !name.ends_with("Cargo.lock")) {
        for (at, line) in text.lines().enumerate() {
            let host = hosts.iter().any(|(a, b)| line.contains(&format!("{a}{b}")));
            // As a path of its own, not as the middle of a longer one.
            let path = paths.iter().any(|(a, b)| {
                let path = format!("{a}{b}");
                let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
                line.match_indices(&path).any(|(start, _)| start == 0 || !inner(line.as_bytes()[start - 1]))
            });
            if host || path {
                wrong.push(format!("{name}:{}: {}", at + 1, line.trim()));
            }
        }
    }
    none("names of a machine or a registry", &wrong);
}

/// The source of the daemon, less its own tests at the foot of each file and less `without`.
fn daemon_source(without: &[&str]) -> String {
    let sources = texts(&[".rs"]).into_iter().filter(|(name, _)| name.starts_with("daemon/src/"));
    let sources = sources.filter(|(name, _)| !without.iter().any(|part| name.contains(part)));
    sources.map(|(_, text)| text.split("#[cfg(test)]").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn every_key_of_the_configuration_does_something() {
    let source = daemon_source(&["src/config"]);
    if source.is_empty() {
        return;
    }
    let config = std::fs::read_to_string(root().join("daemon/src/config.rs")).unwrap();
    // Accessors of the tree itself, such as `Config::run_dir`.
    let accessors = config.split("\nimpl Config {").last().unwrap();
    let mut unused = Vec::new();
    for (section, keys) in Config::SECTIONS {
        for (key, _) in *keys {
            let read = format!(".{key}");
            if !source.contains(&read) && !accessors.contains(&read) {
                unused.push(format!("{section}.{key}"));
            }
        }
    }
    none("keys that nobody reads", &unused);
}

#[test]
fn every_metric_in_the_documents_exists() {
    let mut unknown = Vec::new();
    for (name, text) in texts(&[".md"]) {
        // A colon is part of the word: an engine's metrics about us are the engine's.
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
        for word in words.filter(|word| word.starts_with("kvd_")) {
            if !kvd::metrics::ALL.iter().any(|metric| metric.name == word) {
                unknown.push(format!("{name}: {word}"));
            }
        }
    }
    none("metrics that nobody records", &unknown);
}

#[test]
fn every_metric_is_recorded_somewhere() {
    let source = daemon_source(&["src/metrics.rs"]);
    if source.is_empty() {
        return;
    }
    let metrics = std::fs::read_to_string(root().join("daemon/src/metrics.rs")).unwrap();
    let recorded_there = metrics.split("/// Starts recording").last().unwrap();
    let constant = |name: &str| {
        let line = metrics.lines().find(|line| line.contains(&format!("\"{name}\""))).unwrap();
        line.split('=').next().unwrap().trim().to_owned()
    };
    let constants = kvd::metrics::ALL.iter().map(|metric| constant(metric.name));
    let unused: Vec<_> = constants
        .filter(|name| !source.contains(name.as_str()) && !recorded_there.contains(name.as_str()))
        .collect();
    none("metrics that are never recorded", &unused);
}
