//! The binary as a script sees it: what it prints where, and what it exits with.

mod fake;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use fake::{Fake, Mood, key};

/// What came out of one run.
struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn command(endpoint: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvctl"));
    command.env_clear().env("KVCTL_ENDPOINT", endpoint).stdin(Stdio::null());
    command
}

fn ran(output: &Output) -> Ran {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    Ran { code: output.status.code().unwrap(), out: text(&output.stdout), err: text(&output.stderr) }
}

fn kvctl(endpoint: &Path, line: &str) -> Ran {
    ran(&command(endpoint).args(line.split_whitespace()).output().unwrap())
}

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.out, self.err);
        self
    }

    /// Checks that stderr has this cause and some way out, in cargo's style, and stdout nothing.
    #[track_caller]
    fn fails(self, code: i32, cause: &str, way_out: &str) {
        let ran = self.exits(code);
        assert!(ran.err.starts_with("error: ") && ran.err.contains(cause), "{}", ran.err);
        assert!(ran.err.contains(&format!("\nhelp: {way_out}")), "{}", ran.err);
        assert_eq!(ran.out, "");
    }
}

#[test]
fn a_healthy_daemon_is_0_and_a_degraded_one_4() {
    let well = Fake::start(Mood::Well);
    let ran = kvctl(&well.socket(), "status").exits(0);
    assert!(ran.out.starts_with("node     fake  OK  kvd ") && ran.out.lines().count() <= 15, "{}", ran.out);
    assert_eq!(ran.err, "");
    let warn = Fake::start(Mood::Warn);
    let ran = kvctl(&warn.socket(), "status").exits(4);
    assert!(ran.out.contains("KVD-3001 disk: circuit open for 41s"), "{}", ran.out);
}

#[test]
fn a_dead_socket_is_5_and_says_how_to_start_the_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("kvd.sock");
    kvctl(&socket, "status").fails(5, "does not exist", "start it with");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    for line in ["status", "get tiers", "version", "bench", "drain"] {
        kvctl(&socket, line).fails(5, "no daemon listens on", "it has stopped: start it with");
    }
}

#[test]
fn the_exit_code_is_the_same_when_stderr_takes_nothing() {
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let nowhere = Path::new("/nonexistent/kvd.sock");
    let status = command(nowhere).arg("status").stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(5));
}

#[test]
fn a_daemon_that_never_answers_is_5_when_the_time_is_over() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("kvd.sock");
    let _silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    kvctl(&socket, "--timeout 300ms status").exits(5);
}

#[test]
fn what_may_not_be_done_is_6() {
    let fake = Fake::start(Mood::Denies);
    kvctl(&fake.socket(), "status").fails(6, "KVD-1010", "Allow it in the configuration");
    kvctl(&fake.socket(), "get tiers").fails(6, "uid 1000 may not administer", "Allow it");
}

#[test]
fn what_is_not_there_is_3() {
    let fake = Fake::start(Mood::Well);
    let (absent, socket) = (key(9), fake.socket());
    kvctl(&socket, &format!("describe block {absent}")).fails(3, "is not here: never_stored", "`kvctl why");
    kvctl(&socket, "describe block 99999999").fails(3, "no block's key begins with", "give the whole key");
    kvctl(&socket, "describe tenant nobody").fails(3, "no tenant is called `nobody`", "`kvctl get tenants`");
    kvctl(&socket, "describe client 8").fails(3, "no client", "`kvctl get clients`");
    kvctl(&socket, "describe tenant/nobody").fails(3, "no tenant is called `nobody`", "`kvctl get");
    kvctl(&socket, "describe tier object").fails(3, "no tier", "`kvctl get tiers`");
    kvctl(&socket, "explain KVD-9999").fails(3, "nothing is called", "`kvctl explain` lists");
    kvctl(&socket, &format!("evict --yes {absent}")).exits(3);
    kvctl(&socket, &format!("pin {} {absent}", key(1))).exits(3);
    kvctl(&socket, &format!("unpin {absent}")).exits(3);
}

#[test]
fn a_senseless_command_line_is_2() {
    let fake = Fake::start(Mood::Well);
    for line in [
        "",
        "staus",
        "status --bogus",
        "get tiers --sort-by colour",
        "get blocks --prefix xyz",
        "get tiers -o xml",
        "pin nonsense",
        "pin 11111111 --ttl 0s",
        "purge",
        "purge --all --tenant a --yes",
        "quota set team-a much",
        "quota set Team_A 1GiB",
        "purge --tenant Team_A --yes",
        "why --scope /nowhere --hash 0102030405060708",
        "why --hash 0102030405060708",
        "bench --blocks 1000000 --bytes 64MiB",
        "bench --blocks 5 peer node-b",
        "bench peer",
        "bench peer node-b --count 1000000",
        "bench peer node-b --block-bytes 1GiB",
        "--endpoint nowhere status",
        "--timeout soon status",
        "--timeout 99999999999h status",
        "drain --wait 99999999999h",
        "drain --undo --wait 1s",
        "drain --no-move --to node-b",
        "drain --bytes 0",
    ] {
        let ran = kvctl(&fake.socket(), line).exits(2);
        assert_eq!(ran.out, "", "`{line}`");
        assert!(ran.err.contains("error: ") || line.is_empty(), "`{line}`: {}", ran.err);
    }
}

#[test]
fn nothing_is_destroyed_unasked() {
    let fake = Fake::start(Mood::Well);
    let evict = format!("evict {}", key(1));
    for line in [evict.as_str(), "purge --all", "purge --tenant team-a"] {
        kvctl(&fake.socket(), line).fails(2, "nobody is there to confirm it", "add --yes");
        let ran = kvctl(&fake.socket(), &format!("{line} --dry-run")).exits(0);
        assert!(ran.out.contains("would be"), "{}", ran.out);
        kvctl(&fake.socket(), &format!("{line} --yes")).exits(0);
    }
}

#[test]
fn short_keys_and_listed_names_stand_for_blocks() {
    let fake = Fake::start(Mood::Well);
    let socket = fake.socket();
    assert_eq!(kvctl(&socket, "pin 01010101 --ttl 90s").exits(0).out, "1 block pinned for 1m30s\n");
    let names = kvctl(&socket, "get blocks -o name").exits(0).out;
    assert_eq!(names, format!("block/{}\nblock/{}\n", key(1), key(2)));
    let mut child = command(&socket)
        .args(["unpin", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(names.as_bytes()).unwrap();
    let ran = ran(&child.wait_with_output().unwrap()).exits(0);
    assert_eq!(ran.out, "2 blocks unpinned\n");
}

#[test]
fn listings_page_through_and_can_be_limited() {
    let fake = Fake::start(Mood::Well);
    let socket = fake.socket();
    let all = kvctl(&socket, "get blocks").exits(0);
    assert_eq!(all.out.lines().count(), 3, "{}", all.out);
    assert_eq!(all.err, "");
    let one = kvctl(&socket, "get blocks --limit 1 --no-headers").exits(0);
    assert!(one.out.starts_with(&key(1)) && one.out.lines().count() == 1, "{}", one.out);
    assert_eq!(one.err, "", "the hint is for terminals");
    let long = Fake::start(Mood::LongPages);
    let more = kvctl(&long.socket(), "get blocks --limit 1 --no-headers").exits(0);
    assert_eq!(more.out.lines().count(), 2, "the next page begins behind what came: {}", more.out);
    let sorted = kvctl(&socket, "get blocks --sort-by=-key --no-headers").exits(0);
    assert!(sorted.out.starts_with(&key(2)), "{}", sorted.out);
}

#[test]
fn peers_are_listed_and_described() {
    let fake = Fake::start(Mood::Peers);
    let socket = fake.socket();
    let wanted = "\
NODE     STATE   PATHS          RTT     IN   IN-BYTES   OUT   OUT-BYTES   MISSES   STRIKES
node-b   up      mlx5_0,tcp   210us   5321     1.2GiB   100      6.0MiB       18         1
node-c   down    -                -      0         0B     0          0B       12         0
";
    let peers = kvctl(&socket, "get peers").exits(0);
    assert_eq!((peers.out.as_str(), peers.err.as_str()), (wanted, ""), "\n{}", peers.out);
    let wide = kvctl(&socket, "get peer -o wide --sort-by rtt --no-headers").exits(0).out;
    let down = wide.lines().nth(1).unwrap();
    assert!(down.starts_with("node-c") && down.contains("10.0.0.9:9474"), "{wide}");
    assert!(down.ends_with("connection refused; tried again in 4.0s"), "{wide}");
    assert_eq!(kvctl(&socket, "get peers -o name").exits(0).out, "peer/node-b\npeer/node-c\n");
    let json: serde_json::Value =
        serde_json::from_str(&kvctl(&socket, "get peers -o json").exits(0).out).unwrap();
    assert_eq!(json["peers"][0]["misses"], serde_json::json!({ "peer_evicted": 12, "tier_timeout": 6 }));
    let page = kvctl(&socket, "describe peer node-b").exits(0).out;
    assert!(page.contains("\nFrom it\n  Blocks:        5,321 blocks, 1.2GiB\n"), "{page}");
    let (used, unused) = page.split_once("Not used\n").unwrap();
    let order = ["1   mlx5_0   up", "2   tcp      up"].map(|line| used.find(line).unwrap());
    assert!(order[0] < order[1] && unused.contains("mlx5_1   its port is down"), "{page}");
    assert_eq!(kvctl(&socket, "describe peer/node-b").exits(0).out, page);
    let json = kvctl(&socket, "describe peer node-b -o json").exits(0).out;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["peer"]["rtt_us"], &json["paths"][2]["rank"]), (&210.into(), &1.into()));
    kvctl(&socket, "describe peer node-x").fails(3, "no peer is called `node-x`", "`kvctl get peers`");
}

#[test]
fn transfers_are_listed() {
    let fake = Fake::start(Mood::Peers);
    let wanted = format!(
        "\
{:32}   NODE     DIR   STAGE         BYTES    AGE    LEFT   SHARD
{}   -        in    searching    192KiB   12ms   10.0s       0
{}   node-b   in    reading      256KiB   12ms   10.0s       0
{}   node-b   out   granted     64.0KiB   12ms   10.0s       -
",
        "KEY",
        key(3),
        key(4),
        key(1)
    );
    let ran = kvctl(&fake.socket(), "get transfers").exits(0);
    assert_eq!(ran.out, wanted, "\n{}", ran.out);
    let names = kvctl(&fake.socket(), "get transfer -o name --sort-by=-bytes").exits(0).out;
    assert!(names.starts_with(&format!("transfer/{}\n", key(4))), "{names}");
}

#[test]
fn who_has_no_peers_hears_how_to_get_some() {
    let fake = Fake::start(Mood::Well);
    let socket = fake.socket();
    let ran = kvctl(&socket, "get peers --no-headers").exits(0);
    assert!(ran.err.starts_with("no peers: ") && ran.err.contains("peers.members = "), "{}", ran.err);
    assert_eq!(ran.out, "", "a script counts none");
    assert!(kvctl(&socket, "get transfers").exits(0).err.starts_with("no block is on its way"));
    let json = kvctl(&socket, "get peers -o json").exits(0);
    assert_eq!((json.out.as_str(), json.err.as_str()), ("{\n  \"peers\": []\n}\n", ""));
    kvctl(&socket, "describe peer node-b").fails(
        3,
        "this node has none",
        "name the others with peers.members",
    );
    let old = Fake::start(Mood::Old);
    kvctl(&old.socket(), "get peers").fails(1, "does not know this call", "compare the two with");
}

#[test]
fn json_and_yaml_have_the_names_of_the_protocol() {
    let fake = Fake::start(Mood::Well);
    let socket = fake.socket();
    let json: serde_json::Value =
        serde_json::from_str(&kvctl(&socket, "get blocks -o json").exits(0).out).unwrap();
    assert_eq!(json["blocks"][1]["key"], key(2));
    assert_eq!(json["blocks"][0]["tiers"], serde_json::json!(["host"]));
    let yaml = kvctl(&socket, "status -o yaml").exits(0).out;
    assert!(yaml.starts_with("node: fake\n") && yaml.contains("\n- tier: host\n"), "{yaml}");
    let json: serde_json::Value = serde_json::from_str(&kvctl(&socket, "doctor -o json").out).unwrap();
    assert_eq!(
        json[0],
        serde_json::json!({ "check": "socket", "state": "ok", "found": socket, "fix": null })
    );
}

#[test]
fn colour_is_for_terminals_or_for_those_who_force_it() {
    let fake = Fake::start(Mood::Well);
    let plain = kvctl(&fake.socket(), "status").exits(0).out;
    assert!(!plain.contains('\u{1b}'));
    let with = |name: &str| ran(&command(&fake.socket()).arg("status").env(name, "1").output().unwrap());
    assert!(with("CLICOLOR_FORCE").out.contains("\u{1b}[32mOK\u{1b}[0m"));
    assert_eq!(with("NO_COLOR").out, plain);
    let names = kvctl(&fake.socket(), "get clients").exits(0).out;
    assert!(names.contains("rank 0?[31m"), "a client's name steers no terminal: {names:?}");
}

#[test]
fn long_work_reports_its_end_on_stdout_and_its_failure_as_1() {
    let fake = Fake::start(Mood::Well);
    let ran = kvctl(&fake.socket(), "verify").exits(0);
    assert!(ran.out.starts_with("20 blocks read, 1.2MiB in "), "host and disk: {}", ran.out);
    assert_eq!(ran.err, "", "no progress bar without a terminal");
    let broken = Fake::start(Mood::Broken);
    let ran = kvctl(&broken.socket(), "verify --tier disk").exits(1);
    assert!(ran.err.contains("1 block failed the checksum"), "{}", ran.err);
    kvctl(&broken.socket(), "purge --all --yes").fails(
        1,
        "it ended early, after 5 of 10 blocks",
        "run it again",
    );
}

#[test]
fn why_compares_scopes_when_it_is_given_one() {
    let fake = Fake::start(Mood::Well);
    let socket = fake.socket();
    assert!(kvctl(&socket, &format!("why {}", key(1))).exits(0).out.contains("is here"));
    let miss = kvctl(&socket, &format!("why {}", key(9))).exits(0).out;
    assert!(miss.contains("is not here: never_stored"), "{miss}");
    let scope = fake.path().join("scope.toml");
    std::fs::write(&scope, "model = \"m\"\ntenant = \"a\"\ndtype = \"bf16\"\n").unwrap();
    let line = format!("why --scope {} --hash 0102030405060708", scope.display());
    kvctl(&socket, &line).fails(2, "which slice", "add --slice");
    let differs = kvctl(&socket, &format!("{line} --slice 0..2/2,0..8/8")).exits(0).out;
    assert!(
        differs.contains("scope_differs") && differs.contains("dtype (here asked for: bf16)"),
        "{differs}"
    );
}

#[test]
fn why_says_which_peer_has_it() {
    let fake = Fake::start(Mood::Peers);
    let socket = fake.socket();
    let has = kvctl(&socket, &format!("why {}", key(7))).exits(0).out;
    assert!(has.contains("is not here: never_stored\n  But it is on node-b (host): "), "{has}");
    let expects = kvctl(&socket, &format!("why {}", key(8))).exits(0).out;
    assert!(expects.contains("\n  But node-b expects it: "), "{expects}");
    assert!(!kvctl(&socket, &format!("why {}", key(9))).exits(0).out.contains("But"));
    let both = kvctl(&socket, &format!("why {} {}", key(9), key(7))).exits(0).out;
    assert!(!both.contains("node-b"), "only the first absent one is asked for: {both}");
    let json = kvctl(&socket, &format!("why {} -o json", key(7))).exits(0).out;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["elsewhere"], serde_json::json!({ "tier": "host", "node": "node-b" }));
    assert_eq!(json["miss"]["reason"], "never_stored");
}

#[test]
fn status_has_a_line_for_peers_where_there_are_any() {
    let fake = Fake::start(Mood::Peers);
    let page = kvctl(&fake.socket(), "status").exits(0).out;
    assert!(page.contains("\npeers    2, 1 down  in 1.2GiB (5,321 blocks)\n"), "{page}");
    assert!(!kvctl(&Fake::start(Mood::Well).socket(), "status").exits(0).out.contains("peers"));
}

#[test]
fn a_node_that_drains_moves_its_blocks_to_its_peers() {
    const DRAINING: &str = "draining: no new work is taken\n";
    let fake = Fake::start(Mood::Peers);
    let socket = fake.socket();
    let ran = kvctl(&socket, "drain --wait 5s").exits(4);
    assert_eq!(ran.out, format!("{DRAINING}8 blocks with peers now, 512KiB\ndrained\n"));
    assert!(
        ran.err.starts_with("2 of 10 blocks went to no peer; nothing is lost: what is on disk"),
        "{}",
        ran.err
    );
    let ran = kvctl(&socket, "drain --to node-b --bytes 256KiB").exits(0);
    assert_eq!((ran.out, ran.err), (format!("{DRAINING}4 blocks with peers now, 256KiB\n"), String::new()));
    assert_eq!(kvctl(&socket, "drain --no-move").exits(0).out, DRAINING);
    kvctl(&socket, "drain --to node-x").fails(3, "no peer is called `node-x`", "`kvctl get peers`");
    for line in ["undrain", "drain --undo"] {
        assert_eq!(kvctl(&socket, line).exits(0).out, "taking new work\n");
    }
    // Alone, or with a daemon that knows nothing of peers, it drains as ever.
    let well = Fake::start(Mood::Well);
    let ran = kvctl(&well.socket(), "drain --wait 5s").exits(0);
    assert_eq!((ran.out, ran.err), (format!("{DRAINING}drained\n"), String::new()));
    kvctl(&well.socket(), "drain --to node-b").fails(3, "this node has none", "name the others");
    let old = Fake::start(Mood::Old);
    let ran = kvctl(&old.socket(), "drain --wait 5s").exits(0);
    assert_eq!(ran.out, format!("{DRAINING}drained\n"));
    assert!(ran.err.contains("cannot move blocks to peers"), "{}", ran.err);
}

#[test]
fn a_node_that_reaches_no_peer_drains_and_says_so() {
    let down = Fake::start(Mood::PeersDown);
    for line in ["drain --wait 5s", "drain --wait 5s --to node-c"] {
        let ran = kvctl(&down.socket(), line).exits(4);
        assert!(ran.out.ends_with("drained\n"), "{}", ran.out);
        assert!(ran.err.starts_with("error: no peer can be reached, so no block was moved: "), "{}", ran.err);
        assert!(ran.err.contains("node-c is down: connection refused; tried again in 4.0s\nhelp: "));
    }
    // So it is with peers that answer and take nothing, though the blocks are where they were.
    let full = Fake::start(Mood::PeersFull);
    let ran = kvctl(&full.socket(), "drain").exits(4);
    assert!(ran.out.ends_with("\n0 blocks with peers now, 0B\n"), "{}", ran.out);
    assert!(ran.err.starts_with("10 of 10 blocks went to no peer; nothing is lost"), "{}", ran.err);
    let broken = Fake::start(Mood::Broken);
    let ran = kvctl(&broken.socket(), "drain").exits(1);
    assert!(ran.err.contains("it ended early, after 10 of 10 blocks"), "{}", ran.err);
}

#[test]
fn bench_prints_quantiles_and_finds_wrong_bytes() {
    let fake = Fake::start(Mood::Well);
    let line = "bench --blocks 20 --bytes 4KiB --threads 2 --batch 2 --grpc -o json";
    let ran = kvctl(&fake.socket(), line).exits(0);
    let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let operations = json["operations"].as_array().unwrap();
    let names: Vec<&str> = operations.iter().map(|of| of["op"].as_str().unwrap()).collect();
    assert_eq!(names, ["put", "lookup", "get"]);
    assert_eq!((&json["door"], &operations[0]["count"]), (&"grpc".into(), &20.into()));
    assert!(operations[2]["p50_ns"].as_u64().unwrap() > 0 && operations[2]["misses"] == 0);
    // Without the worker socket it goes by gRPC and says so.
    let ran = kvctl(&fake.socket(), "bench --blocks 2 --bytes 4KiB").exits(0);
    assert!(ran.err.contains("without shared memory"), "{}", ran.err);
    let broken = Fake::start(Mood::Broken);
    let ran = kvctl(&broken.socket(), "bench --blocks 3 --bytes 4KiB --grpc").exits(1);
    assert!(ran.err.contains("3 blocks came back with wrong bytes"), "{}", ran.err);
}

#[test]
fn bench_peer_measures_both_ways_and_leaves_nothing() {
    let fake = Fake::start(Mood::Peers);
    let socket = fake.socket();
    let ran = kvctl(&socket, "bench peer node-b --block-bytes 4KiB --count 9 -o json").exits(0);
    let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!((&json["node"], &json["blocks"]), (&"node-b".into(), &9.into()));
    let ways = json["ways"].as_array().unwrap();
    let names: Vec<&str> = ways.iter().map(|way| way["way"].as_str().unwrap()).collect();
    assert_eq!(names, ["out", "in", "single"]);
    for way in ways {
        let seen = ["blocks", "bytes", "misses", "wrong"].map(|field| way[field].as_u64().unwrap());
        assert_eq!(seen, [9, 9 * 4_096, 0, 0], "{way}");
        assert!(way["bytes_per_s"].as_u64().unwrap() > 0, "{way}");
    }
    assert!(ways[1]["p50_ns"].is_null() && ways[2]["p99_ns"].as_u64().unwrap() > 0);
    assert_eq!(fake.stored(), 0, "no block of the bench stays");
    let table = kvctl(&socket, "bench peer peer/node-b --block-bytes 4KiB --count 2").exits(0);
    let ways: Vec<&str> = table.out.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(ways, ["WAY", "out", "in", "single"]);
    assert!(table.err.contains("2 blocks of 4.0KiB, to node-b and back"), "{}", table.err);
}

#[test]
fn bench_peer_says_what_went_wrong() {
    let line = "bench peer node-b --block-bytes 4KiB --count 3";
    let full = Fake::start(Mood::PeersFull);
    kvctl(&full.socket(), line).fails(4, "node-b took none of the blocks", "it has no room for them");
    assert_eq!(full.stored(), 0);
    let down = Fake::start(Mood::PeersDown);
    kvctl(&down.socket(), line).fails(
        4,
        "node-b is down: connection refused",
        "`kvctl describe peer node-b`",
    );
    kvctl(&down.socket(), "bench peer node-x").fails(3, "no peer is called `node-x`", "`kvctl get peers`");
    kvctl(&Fake::start(Mood::Well).socket(), line).fails(3, "this node has none", "name the others with");
    kvctl(&Fake::start(Mood::Old).socket(), line).fails(1, "does not know this call", "compare the two");
    let broken = Fake::start(Mood::Broken);
    let ran = kvctl(&broken.socket(), line).exits(1);
    assert!(ran.err.contains("error: 7 blocks came back with wrong bytes"), "{}", ran.err);
    assert_eq!(broken.stored(), 0);
}

#[test]
fn bench_peer_cleans_up_when_it_is_interrupted() {
    let fake = Fake::start(Mood::PeersSilent);
    let child = command(&fake.socket())
        .args(["bench", "peer", "node-b", "--block-bytes", "4KiB", "--count", "3"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while fake.stored() == 0 {
        assert!(Instant::now() < until, "nothing was put");
        std::thread::sleep(Duration::from_millis(10));
    }
    let interrupted = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(interrupted.success());
    let ran = ran(&child.wait_with_output().unwrap()).exits(1);
    assert!(
        ran.err.contains("error: ended before it was measured\nhelp: its blocks are evicted here"),
        "{}",
        ran.err
    );
    assert_eq!(fake.stored(), 0, "it left something behind");
}

#[test]
fn config_is_printed_by_origin_and_checked_by_the_daemons_own_binary() {
    let fake = Fake::start(Mood::Well);
    let socket = fake.socket();
    assert_eq!(kvctl(&socket, "config print").exits(0).out, "host.bytes_max = \"2GiB\"\n");
    let origins = kvctl(&socket, "config print --effective --origin").exits(0).out;
    assert!(origins.contains("a.b = 1                  # default\n"), "{origins}");
    assert_eq!(kvctl(&socket, "config print --plan").exits(0).out, "the plan\n");
    // A stand-in for the daemon's binary beside kvctl: its words and its exit code come through as they are.
    // Another process writes the programs: a test that forks while we did would keep them busy.
    let bin = fake.path().join("bin");
    let make = |script: &str| {
        let shell =
            Command::new("sh").args(["-c", script, "sh", env!("CARGO_BIN_EXE_kvctl")]).arg(&bin).status();
        assert!(shell.unwrap().success());
    };
    let check = || {
        let mut kvctl = Command::new(bin.join("kvctl"));
        ran(&kvctl.args(["config", "check", "x.toml"]).env("PATH", &bin).output().unwrap())
    };
    make("mkdir $2 && cp $1 $2/kvctl");
    check().fails(1, "cannot run kvd", "the check is made by the daemon's own parser");
    make("printf '#!/bin/sh\necho \"$@\"\necho words >&2\nexit 78\n' > $2/kvd && chmod +x $2/kvd");
    let ran = check().exits(78);
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("--check --config x.toml\n", "words\n"));
}

#[test]
fn watching_repeats_until_it_is_ended_and_pipes_may_close() {
    let fake = Fake::start(Mood::Well);
    let mut child = command(&fake.socket())
        .args(["get", "tiers", "-w=100ms", "-o", "json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    for _ in 0..3 {
        let line = lines.next().unwrap().unwrap();
        assert!(line.starts_with("{\"tiers\":["), "{line}");
    }
    // Nobody reads on: the next line ends it, quietly.
    drop(lines);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn what_needs_no_daemon_works_without_one() {
    let nowhere = Path::new("/nonexistent/kvd.sock");
    for line in ["explain", "explain kvd-1001", "completion bash", "options", "version --client", "--version"]
    {
        assert!(!kvctl(nowhere, line).exits(0).out.is_empty(), "{line}");
    }
    let ran = kvctl(nowhere, "doctor").exits(1);
    assert!(ran.out.contains("missing socket") && ran.out.contains("mend: "), "{}", ran.out);
    let ran = kvctl(nowhere, "doctor -o name").exits(1);
    assert!(ran.out.starts_with("socket\n"), "{}", ran.out);
}

#[test]
fn versions_are_compared() {
    let fake = Fake::start(Mood::Well);
    let own = env!("CARGO_PKG_VERSION");
    assert_eq!(
        kvctl(&fake.socket(), "version --check").exits(0).out,
        format!("kvctl  {own}\nkvd    {own}\n")
    );
}

#[test]
fn the_object_store_is_listed_described_collected_and_counted() {
    let fake = Fake::start(Mood::Object);
    let socket = fake.socket();
    let id = "ab".repeat(32);
    assert_eq!(kvctl(&socket, "get packs -o name").exits(0).out, format!("pack/{id}\n"));
    assert_eq!(kvctl(&socket, "get packs --prefix ac").exits(0).out.lines().count(), 1);
    let all = kvctl(&socket, "object ls").exits(0).out;
    assert!(all.contains("version 2"), "{all}");
    assert!(all.ends_with("2 packs, 33.0MiB, 512 blocks; 1 incompatible\n"), "{all}");
    let json = kvctl(&socket, "object ls -o json").exits(0).out;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["packs"][0]["id"], id);
    assert_eq!(json["packs"][1]["state"], "incompatible");
    for name in ["pack abab", &format!("pack/{id}")] {
        let page = kvctl(&socket, &format!("describe {name}")).exits(0).out;
        assert!(page.contains(&id) && page.contains(&key(2)), "{page}");
    }
    kvctl(&socket, "describe pack 0000").fails(3, "no pack is called `0000`", "`kvctl object ls`");
    kvctl(&socket, "describe pack ab").fails(2, "names no pack", "an id has 64 hex digits");
    assert!(
        kvctl(&socket, "object gc --dry-run")
            .exits(0)
            .out
            .contains(&format!("1 would be deleted, 0B\n  {id}"))
    );
    assert!(kvctl(&socket, "object gc").exits(0).out.contains("too early"));
    let cost = kvctl(&socket, "object cost --put-price 1 --get-price 0.5").exits(0).out;
    assert!(cost.contains("Per million tokens served:  34,180 requests, $24.41"), "{cost}");
    let json = kvctl(&socket, "object cost -o json").exits(0).out;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["tiers"][0]["requests_total"], 35);
    let status = kvctl(&socket, "status").exits(0).out;
    assert!(status.contains("object   35 requests, 64 blocks served; s3://kv-blocks\n"), "{status}");
    let page = kvctl(&socket, "describe tier object").exits(0).out;
    assert!(page.contains("put 10  get 20  list 5") && page.contains("closed; opened 0 times"), "{page}");
    let why = kvctl(&socket, &format!("why {}", key(9))).exits(0).out;
    assert!(why.contains(&format!("But the object store has it, in pack {id}")), "{why}");
    kvctl(&socket, "verify --tier object").exits(0);
}

#[test]
fn what_is_removed_here_stays_in_the_object_store_and_that_is_said() {
    let fake = Fake::start(Mood::Object);
    let evict = format!("evict --yes {}", key(1));
    for line in [&evict, "purge --all --yes"] {
        let ran = kvctl(&fake.socket(), line).exits(0);
        assert!(ran.err.starts_with("note: what lies in the object store stays"), "{}", ran.err);
    }
    assert_eq!(kvctl(&fake.socket(), "purge --tier host --yes").exits(0).err, "");
    let without = Fake::start(Mood::Well);
    assert_eq!(kvctl(&without.socket(), &evict).exits(0).err, "");
}

#[test]
fn without_an_object_store_it_is_said_what_to_set_and_before_it_is_open_to_wait() {
    let (without, opening) = (Fake::start(Mood::Well), Fake::start(Mood::Opening));
    for line in
        ["get packs", "describe pack abab", "object ls", "object gc", "object cost", "verify --tier object"]
    {
        kvctl(&without.socket(), line).fails(3, "this node has no object tier", "set object.store");
    }
    kvctl(&opening.socket(), "object cost").fails(4, "is not open yet: it is being opened", "ask again");
    kvctl(&opening.socket(), "get packs").fails(4, "is not open yet (again in 1.0s)", "It is probed");
    let page = kvctl(&opening.socket(), "describe tier object").exits(0).out;
    assert!(page.contains("opening") && page.contains("Circuit:      -\n"), "{page}");
}

#[test]
fn gpus_are_listed_and_described() {
    let fake = Fake::start(Mood::Gpus);
    let socket = fake.socket();
    let wanted = "\
GPU   NAME          STATE   CACHES   CACHE-BYTES   POOL   COPYING   WAITING        IN      OUT   FAILED
  0   NVIDIA H200   ok           2        110GiB      -        14         3   12.0GiB   5.0GiB        2
  1   NVIDIA H200   lost         0            0B      -         0         0        0B       0B        0
";
    let gpus = kvctl(&socket, "get gpus").exits(0);
    assert_eq!((gpus.out.as_str(), gpus.err.as_str()), (wanted, ""), "\n{}", gpus.out);
    let wide = kvctl(&socket, "get gpu -o wide --sort-by free --no-headers").exits(0).out;
    let lost = wide.lines().nth(1).unwrap();
    assert!(lost.contains("0000:5e:00.0") && lost.ends_with("as cuEventQuery said"), "{wide}");
    let names = kvctl(&socket, "get gpus -o name").exits(0).out;
    assert_eq!(
        names,
        "gpu/GPU-0a1b2c3d-0000-0000-0000-000000000000\ngpu/GPU-0a1b0000-0000-0000-0000-000000000001\n"
    );
    let json: serde_json::Value =
        serde_json::from_str(&kvctl(&socket, "get gpus -o json").exits(0).out).unwrap();
    assert_eq!((&json["driver"], &json["gpus"][0]["bytes_out"]), (&"12.8".into(), &(5u64 << 30).into()));
    assert!(json["gpus"][1]["free_bytes"].is_null(), "nobody can ask it any more");
    let page = kvctl(&socket, "describe gpu 1").exits(0).out;
    assert!(page.contains("as cuEventQuery said\n") && page.contains("  Never ended:       4\n"), "{page}");
    for name in ["gpu GPU-0a1b0", "gpu 0a1b0000", names.lines().nth(1).unwrap()] {
        assert_eq!(kvctl(&socket, &format!("describe {name}")).exits(0).out, page);
    }
    let json = kvctl(&socket, "describe gpu 0 -o json").exits(0).out;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["state"], &json["numa_node"]), (&"ok".into(), &0.into()));
    kvctl(&socket, "describe gpu 2").fails(3, "no gpu is called `2`", "`kvctl get gpus` lists them");
    kvctl(&socket, "describe gpu 0a1b").fails(2, "the UUIDs of 2 GPUs begin with", "give more of it");
    let page = kvctl(&socket, "status").exits(4).out;
    assert!(page.contains("\n         KVD-3007 GPU 1 (0000:5e:00.0): is lost until"), "{page}");
    let line = "\ngpus     2, 1 lost  in 12.0GiB, out 5.0GiB; copies: 14 under way, 3 waiting\n";
    assert!(page.contains(line), "{page}");
}

#[test]
fn without_gpus_the_reason_is_said_and_status_is_silent() {
    let fake = Fake::start(Mood::Well);
    let socket = fake.socket();
    let ran = kvctl(&socket, "get gpus --no-headers").exits(0);
    assert!(ran.err.starts_with("no GPUs: no CUDA driver: libcuda.so.1: "), "{}", ran.err);
    assert_eq!(ran.out, "", "a script counts none");
    let json = kvctl(&socket, "get gpus -o json").exits(0);
    let told: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert!(told["absent"].as_str().unwrap().starts_with("no CUDA driver"), "{told}");
    assert_eq!((&told["gpus"], json.err.as_str()), (&serde_json::json!([]), ""));
    kvctl(&socket, "describe gpu 0").fails(3, "there is no GPU `0`, nor any other", "`kvctl doctor`");
    assert!(!kvctl(&socket, "status").exits(0).out.contains("gpus"));
    let old = Fake::start(Mood::Old);
    kvctl(&old.socket(), "get gpus").fails(1, "does not know this call", "compare the two with");
    assert!(!kvctl(&old.socket(), "status").exits(0).out.contains("gpus"));
}

#[test]
fn doctor_looks_at_gpus_where_there_are_any() {
    let fake = Fake::start(Mood::Gpus);
    let ran = kvctl(&fake.socket(), "doctor").exits(1);
    let line = |check: &str| ran.out.lines().find(|line| line.contains(check)).unwrap_or_default();
    assert!(line("gpu driver").contains("CUDA 12.8, "), "{}", ran.out);
    assert!(line("gpu lost").starts_with("missing gpu lost    GPU 1 (0000:5e:00.0): "), "{}", ran.out);
    assert!(line("gpu ipc").starts_with("ok      gpu ipc     1 worker with 2 registered"), "{}", ran.out);
    let names = kvctl(&fake.socket(), "doctor -o name").exits(1);
    assert!(names.out.lines().any(|name| name == "gpu lost"), "{}", names.out);
    // Whether this machine has one or not: of a daemon that uses none, and of one that knows of none, one line is said.
    for mood in [Mood::Well, Mood::Old] {
        let fake = Fake::start(mood);
        let page = kvctl(&fake.socket(), "doctor").out;
        assert_eq!(page.lines().filter(|line| line.contains(" gpu ")).count(), 1, "{page}");
    }
}
