//! A real daemon for black-box stories: started on directories of its own, killed and started again, gone
//! with everything it made when the story ends.
#![allow(dead_code, reason = "each story uses its part")]

pub(crate) mod among;
pub(crate) mod net;
pub(crate) mod wire;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kv_api::v1;
use kv_block::{Scope, SequenceHash, Slice, payload};
use tonic::Status;

/// Directories of one daemon over all its lives.
pub(crate) struct Home {
    root: tempfile::TempDir,
    memory: PathBuf,
    /// The network namespace that it lives in, unless it is ours.
    netns: Option<String>,
    /// Extra arguments of every life.
    pub(crate) args: Vec<String>,
    /// Extra variables of every life.
    env: Vec<(String, String)>,
}

impl Home {
    /// A home with 64 MiB of host memory and a disk of 256 MiB.
    pub(crate) fn new(name: &str) -> Self {
        Self::sized(name, "64MiB", Some("256MiB"))
    }

    /// A home with these sizes; no disk tier without one.
    pub(crate) fn sized(name: &str, host: &str, disk: Option<&str>) -> Self {
        let root = tempfile::Builder::new().prefix("kvd-story-").tempdir().expect("a temporary directory");
        let memory = PathBuf::from(format!("/dev/shm/kvd-story-{name}-{}", std::process::id()));
        let mut args: Vec<String> = ["--host-bytes", host, "--http", "127.0.0.1:0"].map(String::from).into();
        args.extend(
            ["--set", "host.huge_pages=off", "--set", "log.format=text", "--set", "disk.segment_bytes=8MiB"]
                .map(String::from),
        );
        if let Some(bytes) = disk {
            let dir = root.path().join("data").display().to_string();
            args.extend(["--data-dir".into(), dir, "--disk-bytes".into(), bytes.into()]);
            // A build beside the tests can keep a disk busy for seconds; that is none of their business.
            args.extend(["--set", "disk.slow_limit=30s"].map(String::from));
        }
        Self { root, memory, netns: None, args, env: Vec::new() }
    }

    /// With its host memory in this directory, which somebody else made and removes.
    pub(crate) fn with_memory(mut self, dir: &Path) -> Self {
        self.memory = dir.to_owned();
        self
    }

    /// With its life in this network namespace.
    pub(crate) fn inside(mut self, netns: &str) -> Self {
        self.netns = Some(netns.to_owned());
        self
    }

    /// With this variable in its environment.
    pub(crate) fn with_env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// With one more `--set`.
    pub(crate) fn set(mut self, setting: &str) -> Self {
        self.args.extend(["--set".into(), setting.into()]);
        self
    }

    /// With sockets that every user of this machine can open.
    pub(crate) fn open_to_all(self) -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let all = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(self.root.path(), all).expect("our own directory");
        self.set("listen.socket_mode=0666")
    }

    /// Runs the test `test` of this binary as another user, who finds this home by [`home_of_child`] and his
    /// part by [`role`]. False, and said, where we are not root and cannot.
    pub(crate) fn run_as(&self, uid: u32, test: &str, role: &str, numbers: &[(&str, u64)]) -> bool {
        use std::os::unix::process::CommandExt as _;
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root can start a process of another user");
            return false;
        }
        // The original may lie where only we can go.
        let copy = self.root.path().join(format!("as-{uid}-{role}"));
        std::fs::copy(std::env::current_exe().unwrap(), &copy).expect("a copy of this binary");
        let mut command = Command::new(&copy);
        command
            .args([test, "--exact", "--nocapture", "--test-threads=1"])
            .env("KVD_STORY_HOME", self.root.path())
            .env("KVD_STORY_ROLE", role)
            .envs(numbers.iter().map(|(name, number)| (name, number.to_string())))
            .current_dir("/")
            .uid(uid)
            .gid(uid)
            .stdin(Stdio::null());
        let limit = Instant::now() + Duration::from_secs(10);
        let out = loop {
            match command.output() {
                // Another story's child was forked while the copy was open for writing, and has not begun yet.
                Err(error)
                    if error.kind() == std::io::ErrorKind::ExecutableFileBusy && Instant::now() < limit =>
                {
                    std::thread::sleep(Duration::from_millis(10));
                }
                out => break out.expect("a process of another user"),
            }
        };
        let _ = std::fs::remove_file(&copy);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let words = format!("{}{}", text(&out.stdout), text(&out.stderr));
        assert!(out.status.success() && words.contains("1 passed"), "{role} as user {uid}: {words}");
        true
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.root.path().join("run")
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.root.path().join("data")
    }

    pub(crate) fn memory_dir(&self) -> &Path {
        &self.memory
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.root.path().join("log")).unwrap_or_default()
    }

    /// The address in the log line with these words, once it is there.
    pub(crate) fn logged_address(&self, words: &str) -> String {
        let limit = Instant::now() + Duration::from_secs(20);
        while Instant::now() < limit {
            let log = self.log();
            let line = log.lines().rev().find(|line| line.contains(words));
            if let Some(address) = line.and_then(|line| line.split("address=").nth(1)) {
                return address.split_whitespace().next().unwrap_or_default().to_owned();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no line with `{words}` in the log");
    }

    /// Starts a life and waits until it serves.
    pub(crate) fn start(&self) -> Daemon<'_> {
        let daemon = self.spawn();
        daemon.wait_until_serving();
        daemon
    }

    /// Starts a life that ends by itself; gives its exit status.
    pub(crate) fn start_and_fail(&self) -> std::process::ExitStatus {
        self.spawn().child.wait().expect("wait")
    }

    fn spawn(&self) -> Daemon<'_> {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.root.path().join("log")).unwrap();
        // A test that was carried to another machine has it somewhere else.
        let kvd = std::env::var("KVD").unwrap_or_else(|_| env!("CARGO_BIN_EXE_kvd").into());
        let mut command = Command::new(if self.netns.is_some() { "ip" } else { &kvd });
        if let Some(netns) = &self.netns {
            // It becomes kvd, and stays the same process.
            command.args(["netns", "exec", netns, &kvd]);
        }
        let child = command
            .args(["--run-dir", &self.run_dir().display().to_string()])
            .args(["--memory-dir", &self.memory.display().to_string()])
            .args(&self.args)
            // It knows its own, and refuses others of that kind.
            .env_remove("KVD_CUDA")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("kvd starts");
        Daemon { child, home: self }
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log());
        }
        let _ = std::fs::remove_dir_all(&self.memory);
    }
}

/// The home that the parent of this process runs a daemon in; `None` when this is no child of a story.
pub(crate) fn home_of_child() -> Option<PathBuf> {
    std::env::var_os("KVD_STORY_HOME").map(PathBuf::from)
}

/// What a child of a story is to do.
pub(crate) fn role() -> String {
    std::env::var("KVD_STORY_ROLE").unwrap_or_default()
}

/// The raw gRPC door of a daemon, for stories about the protocol itself.
pub(crate) struct Door {
    pub(crate) runtime: tokio::runtime::Runtime,
    pub(crate) channel: tonic::transport::Channel,
}

/// A runtime with a thread of its own: it answers the daemon's pings while a story does something else.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

impl Door {
    pub(crate) fn of(home: &Home) -> Self {
        Self::at(&home.run_dir())
    }

    /// The same door from a process of another user, who knows the run directory alone.
    pub(crate) fn at(run_dir: &Path) -> Self {
        let runtime = runtime();
        let socket = run_dir.join("kvd.sock");
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move {
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(
                    tokio::net::UnixStream::connect(socket).await?,
                ))
            }
        });
        let endpoint = tonic::transport::Endpoint::from_static("http://kvd").timeout(Duration::from_secs(20));
        let channel = runtime.block_on(endpoint.connect_with_connector(connect)).expect("connect");
        Self { runtime, channel }
    }

    /// The door that is open to the network.
    pub(crate) fn over_tcp(uri: &str) -> Self {
        let runtime = runtime();
        let endpoint = tonic::transport::Endpoint::from_shared(uri.to_owned()).unwrap();
        let channel = runtime.block_on(endpoint.timeout(Duration::from_secs(20)).connect()).expect("connect");
        Self { runtime, channel }
    }

    pub(crate) fn blocks(&self) -> v1::blocks_client::BlocksClient<tonic::transport::Channel> {
        v1::blocks_client::BlocksClient::new(self.channel.clone())
    }

    pub(crate) fn worker(&self) -> v1::worker_client::WorkerClient<tonic::transport::Channel> {
        v1::worker_client::WorkerClient::new(self.channel.clone())
    }

    pub(crate) fn events(&self) -> v1::events_client::EventsClient<tonic::transport::Channel> {
        v1::events_client::EventsClient::new(self.channel.clone())
    }

    pub(crate) fn admin(&self) -> v1::admin_client::AdminClient<tonic::transport::Channel> {
        v1::admin_client::AdminClient::new(self.channel.clone())
    }

    /// Registers a scope for a tenant and gives its binding number and what names its blocks.
    pub(crate) fn register(&self, scope: &Scope, block_bytes: u32) -> u32 {
        self.try_register(scope, block_bytes).expect("register")
    }

    /// The same, from a daemon that may be gone.
    pub(crate) fn try_register(&self, scope: &Scope, block_bytes: u32) -> Option<u32> {
        let request = v1::RegisterRequest {
            session: 0,
            scope: Some(kv_api::convert::scope_message(scope)),
            slice: Some(kv_api::convert::slice_message(&slice())),
            block_bytes,
        };
        Some(self.runtime.block_on(self.worker().register(request)).ok()?.into_inner().binding)
    }

    /// Stores the block that the number names, its bytes the keystream of its key.
    pub(crate) fn put(
        &self,
        scope: &Scope,
        binding: u32,
        number: u64,
        bytes: u32,
        durable: bool,
    ) -> Result<bool, Status> {
        let hash = SequenceHash::from(number);
        let mut body = vec![0; bytes as usize];
        payload::fill(&scope.id().block_key(&hash, &slice()), &mut body);
        let header = v1::PutHeader {
            binding,
            sequence_hash: hash.as_bytes().to_vec().into(),
            durable,
            ..v1::PutHeader::default()
        };
        let mut messages = vec![v1::PutRequest { header: Some(header), chunk: bytes::Bytes::new() }];
        messages.extend(
            body.chunks(1 << 20)
                .map(|piece| v1::PutRequest { header: None, chunk: bytes::Bytes::copy_from_slice(piece) }),
        );
        let put = async { self.blocks().put(tokio_stream::iter(messages)).await };
        self.runtime.block_on(put).map(|response| response.into_inner().already)
    }

    /// Reads a block: its bytes checked against the keystream, or why it is missing.
    pub(crate) fn get(&self, scope: &Scope, binding: u32, number: u64) -> Result<v1::Tier, v1::Miss> {
        self.try_get(scope, binding, number).expect("the daemon answers")
    }

    /// The same, from a daemon that may be gone: `None` then.
    pub(crate) fn try_get(
        &self,
        scope: &Scope,
        binding: u32,
        number: u64,
    ) -> Option<Result<v1::Tier, v1::Miss>> {
        let hash = SequenceHash::from(number);
        let key = scope.id().block_key(&hash, &slice());
        self.runtime.block_on(async {
            let names = v1::Names {
                binding,
                sequence_hashes: vec![hash.as_bytes().to_vec().into()],
                ..v1::Names::default()
            };
            let request =
                v1::GetRequest { session: 0, names: Some(names), wait_ms: 10_000, node: String::new() };
            let mut stream = self.blocks().get(request).await.ok()?.into_inner();
            let (mut bytes, mut header) = (Vec::new(), None);
            while let Some(message) = stream.message().await.ok()? {
                match message.what.expect("something") {
                    v1::get_response::What::Header(found) => header = Some(found),
                    v1::get_response::What::Chunk(piece) => bytes.extend_from_slice(&piece),
                    v1::get_response::What::Miss(miss) => return Some(Err(miss)),
                }
            }
            let header = header?;
            if header.bytes as usize != bytes.len() {
                return None; // the daemon went in the middle
            }
            assert_eq!(payload::first_wrong_byte(&key, &bytes), None, "wrong byte in block {number}");
            Some(Ok(header.tier()))
        })
    }

    /// Evicts a block; false when the daemon is gone.
    /// How many blocks went, 0 or 1; `None` when nobody knows.
    pub(crate) fn evict(&self, binding: u32, number: u64) -> Option<u32> {
        let hash = SequenceHash::from(number).as_bytes().to_vec();
        let names = v1::Names { binding, sequence_hashes: vec![hash.into()], ..v1::Names::default() };
        let request = v1::EvictRequest { names: Some(names), ..v1::EvictRequest::default() };
        let answer = self.runtime.block_on(async { self.blocks().evict(request).await });
        answer.ok().map(|answer| answer.into_inner().evicted)
    }

    pub(crate) fn status(&self) -> v1::StatusResponse {
        self.runtime.block_on(self.admin().status(v1::StatusRequest {})).expect("status").into_inner()
    }
}

/// The whole of a small tensor.
pub(crate) fn slice() -> Slice {
    Slice::whole(2, 4)
}

/// A scope of this tenant.
pub(crate) fn scope(tenant: &str) -> Scope {
    Scope {
        model: "story".into(),
        tenant: tenant.into(),
        salt: format!("salt of {tenant}"),
        block_tokens: 16,
        ..Scope::default()
    }
}

/// One life of a daemon; killed when dropped.
pub(crate) struct Daemon<'a> {
    child: Child,
    home: &'a Home,
}

impl Daemon<'_> {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn wait_until_serving(&self) {
        let socket = self.home.run_dir().join("worker.sock");
        let limit = Instant::now() + Duration::from_secs(30);
        let pid_file = self.home.run_dir().join("kvd.lock");
        while Instant::now() < limit {
            let ours =
                std::fs::read_to_string(&pid_file).is_ok_and(|pid| pid.trim() == self.pid().to_string());
            let open =
                || std::os::unix::net::UnixStream::connect(self.home.run_dir().join("kvd.sock")).is_ok();
            if ours && socket.exists() && open() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("kvd did not serve within 30 s:\n{}", self.home.log());
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Asks it to end and waits for that.
    pub(crate) fn terminate(mut self) -> std::process::ExitStatus {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
        let limit = Instant::now() + Duration::from_secs(20);
        while Instant::now() < limit {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("kvd did not end within 20 s of SIGTERM:\n{}", self.home.log());
    }

    /// Whether it still runs.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
