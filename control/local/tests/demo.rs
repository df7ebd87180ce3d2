//! The demo as a newcomer runs it, made small: the real program, its real daemon, killed once.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Runs `kv-local demo` with its files in `memory` and `data`.
fn demo(memory: &Path, data: &Path, requests: u32, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kv-local"));
    let sizes = ["--host-bytes", "16MiB", "--disk-bytes", "256MiB", "--block-bytes", "32KiB"];
    command.args(["demo", "--json", "--workers", "2", "--duration", "15"]).args(sizes);
    command.arg("--requests").arg(requests.to_string());
    command.arg("--memory-dir").arg(memory).arg("--data-dir").arg(data).args(more);
    command.stdin(Stdio::null()).output().unwrap()
}

/// The last line of what it printed.
fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let words = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().last().unwrap_or_else(|| panic!("no JSON; it said:\n{words}"));
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}\n{words}"))
}

/// Directories on shared memory and beside it; `None` where there is no shared memory to speak of.
fn dirs() -> Option<(tempfile::TempDir, tempfile::TempDir)> {
    let shm = Path::new("/dev/shm");
    let free = rustix::fs::statvfs(shm).map_or(0, |found| found.f_bavail * found.f_frsize);
    if free < 256 << 20 {
        eprintln!("skipped: /dev/shm has {free} bytes free");
        return None;
    }
    let memory = tempfile::Builder::new().prefix("kvl").tempdir_in(shm).unwrap();
    Some((memory, tempfile::tempdir().unwrap()))
}

#[test]
fn a_killed_daemon_loses_nothing_durable_and_serves_no_wrong_byte_and_nothing_is_left_behind() {
    let Some((memory, data)) = dirs() else { return };
    let output = demo(memory.path(), data.path(), 60, &["--admission", "all"]);
    let report = json(&output);
    assert!(output.status.success(), "{report}\n{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!((&report["wrong_bytes"], &report["lost_durable_blocks"]), (&0.into(), &0.into()), "{report}");
    assert_eq!(report["kills"], 1, "{report}");
    assert!(report["requests"].as_u64() > Some(0), "{report}");
    assert!(report["durable_blocks"].as_u64() > Some(0), "{report}");
    assert!(report["recovered_blocks"].as_u64() > Some(0), "{report}");
    assert!(report["hits"]["host"].as_u64() > Some(0), "{report}");
    assert!(report["disk_bytes_written"].as_u64() > Some(0), "{report}");
    for dir in [&memory, &data] {
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "files are left in {dir:?}");
    }
}

/// A trace of conversations that go on in turns. Their number is odd, so that each goes on at the other of two
/// nodes, and large enough that its turn before is over by then.
fn conversations() -> String {
    let (conversations, turns) = (9, 8);
    let request = |at: u64| {
        let (turn, conversation) = (at / conversations, at % conversations);
        let blocks: Vec<String> =
            (0..3 * (turn + 1)).map(|n| (1000 * conversation + n).to_string()).collect();
        let (tokens, blocks) = (512 * blocks.len(), blocks.join(","));
        format!("{{\"timestamp\":{at},\"input_length\":{tokens},\"hash_ids\":[{blocks}]}}\n")
    };
    (0..conversations * turns).map(request).collect()
}

#[test]
fn nodes_have_blocks_of_each_other_and_one_that_is_killed_loses_nothing_durable() {
    let Some((memory, data)) = dirs() else { return };
    let elsewhere = tempfile::tempdir().unwrap();
    let trace = elsewhere.path().join("trace.jsonl");
    std::fs::write(&trace, conversations()).unwrap();
    let more = ["--nodes", "2", "--admission", "all", "--trace", trace.to_str().unwrap()];
    let output = demo(memory.path(), data.path(), 1000, &more);
    let report = json(&output);
    assert!(output.status.success(), "{report}\n{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!((&report["wrong_bytes"], &report["lost_durable_blocks"]), (&0.into(), &0.into()), "{report}");
    let count = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("no number: {value} in {report}"));
    assert!(count(&report["hits"]["peer"]) > 0, "{report}");
    assert!(count(&report["durable_blocks"]) > 0, "{report}");
    let nodes = report["nodes"].as_array().unwrap();
    let names: Vec<&str> = nodes.iter().filter_map(|node| node["node"].as_str()).collect();
    assert_eq!(names, ["node-1", "node-2"], "{report}");
    let kills: Vec<u64> = nodes.iter().map(|node| count(&node["kills"])).collect();
    assert_eq!((kills, &report["restarts"][0]["node"]), (vec![0, 1], &"node-2".into()), "{report}");
    let sum = |of: &dyn Fn(&Value) -> &Value| nodes.iter().map(|node| count(of(node))).sum::<u64>();
    assert_eq!(sum(&|node| &node["requests"]), 72, "{report}");
    let fetched = sum(&|node| &node["fetched"]["blocks"]);
    assert_eq!(fetched, count(&report["fetched_blocks"]), "{report}");
    assert_eq!(fetched, sum(&|node| &node["served"]["blocks"]), "{report}");
    assert_eq!(count(&report["fetched_bytes"]), fetched * (32 << 10), "{report}");
    for dir in [&memory, &data] {
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "files are left in {dir:?}");
    }
}

#[test]
fn a_wrong_byte_that_was_stored_is_found_and_fails_the_run() {
    let Some((memory, data)) = dirs() else { return };
    let output = demo(memory.path(), data.path(), 20, &["--plant", "--kills", "0"]);
    let report = json(&output);
    assert!(report["wrong_bytes"].as_u64() > Some(0), "{report}");
    assert!(report["first_wrong"].is_string(), "{report}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_trace_that_is_none_is_refused_with_file_and_line() {
    let Some((memory, data)) = dirs() else { return };
    let trace = data.path().join("trace.jsonl");
    std::fs::write(&trace, "{}\n").unwrap();
    let output = demo(memory.path(), data.path(), 1, &["--trace", trace.to_str().unwrap()]);
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(words.contains("trace.jsonl") && words.contains("line 1"), "{words}");
}

#[test]
fn the_daemon_inside_takes_the_daemons_own_flags() {
    let program = || Command::new(env!("CARGO_BIN_EXE_kv-local"));
    let output = program().args(["kvd", "--help"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("--run-dir"), "{text}");
    let output = program().args(["kvd", "--set", "nonsense=1", "--check"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78), "{}", String::from_utf8_lossy(&output.stderr));
}

/// `kv-local up` with its files in `memory` and `data`, once it serves; and the process of its daemon.
fn up(memory: &Path, data: &Path, more: &[&str]) -> (Child, u32) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kv-local"));
    command.args(["up", "--host-bytes", "16MiB", "--disk-bytes", "256MiB", "--http", "off"]);
    command.arg("--memory-dir").arg(memory).arg("--data-dir").arg(data).args(more);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let words = BufReader::new(child.stderr.take().unwrap());
    let mut lines = words.lines().map_while(Result::ok);
    let pid = lines.find_map(|line| line.split_once("process ")?.1.split(':').next()?.parse().ok());
    let Some(pid) = pid else {
        let status = child.wait().unwrap();
        panic!("kv-local up ended with {status}");
    };
    // Nobody may block on a full pipe.
    std::thread::spawn(move || lines.count());
    (child, pid)
}

#[test]
fn a_daemon_of_up_ends_with_a_signal_even_a_doubled_one_and_leaves_nothing_behind() {
    let Some((memory, data)) = dirs() else { return };
    let (mut child, _) = up(memory.path(), data.path(), &[]);
    let mut said = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
    let socket = said.split_once("KVD_SOCKET=").unwrap().1.split_whitespace().next().unwrap().to_owned();
    assert!(Path::new(&socket).join("kvd.sock").exists(), "{said}");
    for _ in 0..2 {
        kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(child.wait().unwrap().success());
    for dir in [&memory, &data] {
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "files are left in {dir:?}");
    }
}

#[test]
fn several_daemons_of_up_have_a_socket_each_and_end_together() {
    let Some((memory, data)) = dirs() else { return };
    let (mut child, _) = up(memory.path(), data.path(), &["--nodes", "2"]);
    let run = std::fs::read_dir(memory.path()).unwrap().next().unwrap().unwrap().path();
    for node in ["node-1", "node-2"] {
        assert!(run.join(node).join("run").join("kvd.sock").exists(), "{node} in {run:?}");
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
    for dir in [&memory, &data] {
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "files are left in {dir:?}");
    }
}

#[test]
fn a_daemon_dies_with_the_program_that_started_it() {
    let Some((memory, data)) = dirs() else { return };
    let (mut child, daemon) = up(memory.path(), data.path(), &[]);
    child.kill().unwrap();
    child.wait().unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    let lives = || {
        let stat = std::fs::read_to_string(format!("/proc/{daemon}/stat"));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    };
    while lives() {
        assert!(Instant::now() < until, "process {daemon} outlives its parent");
        std::thread::sleep(Duration::from_millis(10));
    }
}
