//! The configuration: one tree, read from several places, each value knowing where it came from.
//!
//! ```text
//! defaults  <  /etc/kvd/kvd.toml, then conf.d/*.toml   <  KVD_HOST__BYTES_MAX=1GiB  <  --set host.bytes_max=1GiB
//!              (or the one file of --config)
//! ```
//!
//! The [`Config`] tree below is the only list of keys: its default is serialised to learn which keys there
//! are and of what type, so a key that is added there is known to files, environment, flags, messages and
//! to the printed form at once. A key nobody knows, or a value that cannot be, is an error that names file,
//! line and column. Reading opens nothing: [`Config::load`] is a pure function of [`Sources`].

pub mod cli;
mod layer;
pub mod units;
mod validate;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use layer::{ConfigError, Facts, Loaded, Origin, Problem, Sources};
use units::{
    Address, Admission, CopyMethod, Engine, FilePath, GpuUse, HugePages, Label, LogFormat, Member, Mode,
    OrAuto, OrOff, Place, Policy, Rdma, Share, Size, SizeOrShare, Span, StoreAt, Sync, UidRule,
};

/// Status with which the daemon ends when its configuration is refused (`EX_CONFIG`).
pub const EXIT_CONFIG: u8 = 78;

/// Words about one key: its name within its section, and the lines of its documentation.
pub type KeyDoc = (&'static str, &'static [&'static str]);

/// A struct of keys with their defaults; what is said about them is kept for [`Loaded::print_effective`].
macro_rules! section {
    ($(#[doc = $about:literal])* $name:ident {
        $($(#[doc = $doc:literal])+ $key:ident: $type:ty = $default:expr,)*
    }) => {
        $(#[doc = $about])*
        #[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name { $($(#[doc = $doc])+ pub $key: $type,)* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($key: $default,)* }
            }
        }

        impl $name {
            /// What is said about each key, in the order in which they are printed.
            pub const DOCS: &'static [KeyDoc] = &[$((stringify!($key), &[$($doc),+])),*];
        }
    };
}

/// All of it.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Which node this is.
    pub node: Node,
    /// Where clients, administrators and scrapers connect.
    pub listen: Listen,
    /// What engine workers may do and how much they get.
    pub workers: Workers,
    /// GPUs, and what is kept in their memory.
    pub gpu: Gpu,
    /// The host tier.
    pub host: Host,
    /// The disk tier.
    pub disk: Disk,
    /// The object tier.
    pub object: Object,
    /// The catalog of all blocks.
    pub catalog: Catalog,
    /// Bounds on what callers may ask for.
    pub limits: Limits,
    /// Users whose blocks lie apart.
    pub principals: BTreeMap<String, Principal>,
    /// Nodes that serve each other's blocks.
    pub peers: Peers,
    /// The door for engines that speak LMCache's protocol.
    pub lmcache: Lmcache,
    /// Quotas by tenant.
    pub tenants: BTreeMap<String, Tenant>,
    /// Log lines.
    pub log: Log,
}

impl Config {
    /// Every section with its keys, in the order in which they are printed. `tenants.*` stands for any tenant.
    pub const SECTIONS: &'static [(&'static str, &'static [KeyDoc])] = &[
        ("node", Node::DOCS),
        ("listen", Listen::DOCS),
        ("listen.tls", Tls::DOCS),
        ("workers", Workers::DOCS),
        ("gpu", Gpu::DOCS),
        ("host", Host::DOCS),
        ("disk", Disk::DOCS),
        ("object", Object::DOCS),
        ("catalog", Catalog::DOCS),
        ("limits", Limits::DOCS),
        ("peers", Peers::DOCS),
        ("lmcache", Lmcache::DOCS),
        ("principals.*", Principal::DOCS),
        ("tenants.*", Tenant::DOCS),
        ("log", Log::DOCS),
    ];
}

section! {
    /// Which node this is.
    Node {
        /// Name of this node, in metrics, events and file names. auto: the host's name.
        name: OrAuto<Label> = OrAuto::Auto,
    }
}

section! {
    /// Where clients, administrators and scrapers connect.
    Listen {
        /// Directory of the sockets `kvd.sock` (gRPC) and `worker.sock` (shared-memory workers).
        /// auto: `/run/kvd` for root, else `$XDG_RUNTIME_DIR/kvd`, else `/tmp/kvd-<uid>`.
        run_dir: OrAuto<FilePath> = OrAuto::Auto,
        /// Permission bits of the sockets.
        socket_mode: Mode = Mode(0o660),
        /// gRPC over TCP too. Beyond this machine it needs `listen.tls` with a client CA.
        tcp: OrOff<Address> = OrOff::Off,
        /// Users who may administer through the socket, besides root.
        admin_uids: Vec<UidRule> = vec![UidRule::Own],
        /// HTTP with /metrics, /livez, /readyz and /startupz. Port 0: any free one.
        http: OrOff<Address> = OrOff::Set(Address(std::net::SocketAddr::new(
            std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
            9472,
        ))),
        /// Allows `listen.http` beyond this machine. It tells health and metrics, in clear text, to anybody.
        http_public: bool = false,
        /// Allows `listen.tcp` beyond this machine without mutual TLS. Anybody who reaches it can read and
        /// write every block.
        insecure: bool = false,
        /// Certificates of the TCP listener.
        tls: Tls = Tls::default(),
    }
}

section! {
    /// Certificates of the TCP listener, in PEM.
    Tls {
        /// Chain of this node, its own certificate first.
        cert: OrOff<FilePath> = OrOff::Off,
        /// Private key of that certificate.
        key: OrOff<FilePath> = OrOff::Off,
        /// Callers must show a certificate signed by one of these.
        client_ca: OrOff<FilePath> = OrOff::Off,
    }
}

section! {
    /// What engine workers may do and how much they get.
    Workers {
        /// Users whose processes may store and read blocks through the sockets, besides root.
        uids: Vec<UidRule> = vec![UidRule::Own],
        /// Of those, users who may fill arena slots in place when they ask for it: they can write into every
        /// block of the arena.
        trusted_uids: Vec<UidRule> = vec![],
        /// Entries of each ring of a session; a power of two.
        ring_entries: u32 = 1024,
        /// Staging memory a session may ask for.
        staging_bytes_max: Size = Size::mib(64),
        /// Blocks a session may read at one moment without asking, per shard.
        hazards_max: u32 = 4096,
    }
}

section! {
    /// GPUs: the daemon copies blocks between its memory and what workers register of a device's, and may keep some in
    /// spare memory of the device.
    Gpu {
        /// Whether GPUs are used: auto (where there is a CUDA driver with a device), off or required.
        enabled: GpuUse = GpuUse::Auto,
        /// The CUDA driver: auto, as the system's loader finds it, or the file of another.
        driver: OrAuto<FilePath> = OrAuto::Auto,
        /// Memory of each device for blocks that are read again and again; 0: none. It is taken at the start: leave it
        /// out of what the engine may use.
        pool_bytes: Size = Size(0),
        /// Memory of a device that a pool leaves to others when it is opened.
        leave_bytes: Size = Size::gib(1),
        /// How pages are copied: auto, kernel, batch or loop.
        method: CopyMethod = CopyMethod::Auto,
        /// Streams of a device in each direction.
        streams: u32 = 2,
        /// Copies that a device has in its queues at one moment...
        copies_max: u32 = 64,
        /// ...and their bytes. A longer copy goes alone.
        in_flight_bytes_max: Size = Size::mib(256),
        /// Copies that wait for that; more are refused with a hint.
        waiting_max: u32 = 4096,
        /// KV caches that one session may register.
        caches_max: u32 = 64,
        /// Threads that sum what came from devices. auto: a quarter of the CPUs, 4 at most.
        sum_threads: OrAuto<u64> = OrAuto::Auto,
    }
}

section! {
    /// The host tier: blocks in shared memory, which survives the daemon.
    Host {
        /// Memory for blocks: a size, a share of the machine's memory, or auto: 25% of it, at most 64GiB.
        bytes_max: OrAuto<SizeOrShare> = OrAuto::Auto,
        /// Unit in which memory goes to one block size; a power of two. auto: 32MiB, less when memory is small.
        region_bytes: OrAuto<Size> = OrAuto::Auto,
        /// Whether that memory lies on huge pages: auto, off or required.
        huge_pages: HugePages = HugePages::Auto,
        /// Mount point of hugetlbfs. auto: the one that is mounted.
        hugetlbfs_dir: OrAuto<FilePath> = OrAuto::Auto,
        /// Which block goes when room is needed: sieve, s3fifo or lru.
        policy: Policy = Policy::Sieve,
        /// Directory of the shared memory files, on a tmpfs.
        /// auto: `/dev/shm/kvd-<node>` for root, else `/dev/shm/kvd-<uid>-<node>`.
        memory_dir: OrAuto<FilePath> = OrAuto::Auto,
        /// Making room begins when less than this share is free...
        free_low_ratio: Share = Share::percent(3),
        /// ...and ends when this share is free.
        free_high_ratio: Share = Share::percent(6),
    }
}

section! {
    /// The disk tier: a checksummed log on local SSD.
    Disk {
        /// Whether to use it, once it has a directory.
        enabled: bool = true,
        /// Directory of the log.
        dir: OrOff<FilePath> = OrOff::Off,
        /// Space for it: a size or a share of the file system.
        bytes_max: SizeOrShare = SizeOrShare::Share(Share::percent(50)),
        /// Unit in which space is written and given back.
        segment_bytes: Size = Size::mib(64),
        /// Kernel interface: auto, uring or threads.
        engine: Engine = Engine::Auto,
        /// Reads and writes under way at one moment, per shard.
        queue_depth: u32 = 64,
        /// An operation slower than this counts against the device; several open its circuit.
        slow_limit: Span = Span::millis(500),
        /// Which blocks are written when they leave host memory: frequency, budget, all or never.
        admission: Admission = Admission::Budget,
        /// When the device's own cache is made durable: always, after each batch of writes, or never.
        sync: Sync = Sync::Always,
    }
}

section! {
    /// The object tier: packs of blocks that all nodes share and that outlive each. Who asks the store is said by the
    /// environment, as its own tools read it; see the documentation of the object tier.
    Object {
        /// Where the packs are: a directory, `s3://BUCKET[/PREFIX]` or `az://ACCOUNT/CONTAINER[/PREFIX]`; behind a `?`
        /// what has to be said besides, as in `?endpoint=http://127.0.0.1:9000&path_style=true` or `?region=eu-central-1`.
        store: OrOff<StoreAt> = OrOff::Off,
        /// Reads that a block needs before it is uploaded, 0 to 3. 0: whatever is old enough goes; for nodes among which
        /// requests are spread without regard to what each has. Pinned blocks and
        /// those of high priority go at once.
        reads_min: u32 = 1,
        /// How long after its first read a block is uploaded, unless it leaves host memory before that.
        age_min: Span = Span::seconds(30),
        /// What expires sooner than this is not worth it.
        life_min: Span = Span::seconds(600),
        /// How long blocks count in the store, if they do not say less. off: as long as they say, and what says
        /// nothing stays for ever.
        ttl: OrOff<Span> = OrOff::Set(Span::seconds(7 * 86400)),
        /// Bytes of blocks that make a pack.
        pack_bytes: Size = Size::mib(48),
        /// How long the first block of a pack waits for others.
        pack_wait: Span = Span::seconds(10),
        /// Bytes of blocks that wait to be written or are being written. Beyond that blocks stay where they are.
        waiting_bytes_max: Size = Size::mib(192),
        /// Bytes of one read, at most. Longer reads are fewer; shorter ones go side by side, and their blocks are here
        /// sooner.
        request_bytes_max: Size = Size::mib(32),
        /// How long a block may be on its way from the store.
        fetch_limit: Span = Span::seconds(10),
        /// How often this node looks for what others wrote. Each look costs two lists.
        refresh: Span = Span::seconds(30),
        /// Whether this node deletes packs that no node uses any more. Any node may, and any number of them.
        collect: bool = true,
        /// Least time between two rounds of collection. A pack goes after a few of them.
        collect_every: Span = Span::seconds(600),
        /// Requests under way at one moment, at most. A store that throttles gets fewer.
        requests_max: u32 = 64,
        /// Blocks of the store known at one moment, about 100 bytes of memory each.
        blocks_max: u64 = 1 << 22,
    }
}

section! {
    /// The catalog: one entry a block, whatever tier it is in.
    Catalog {
        /// Blocks known at one moment, over all shards. auto: from the sizes of the tiers.
        entries_max: OrAuto<u64> = OrAuto::Auto,
        /// Blocks remembered after they are gone, to say why. auto: a quarter of the entries.
        ghosts_max: OrAuto<u64> = OrAuto::Auto,
    }
}

section! {
    /// Bounds on what callers may ask for. Past a bound the answer is a typed rejection with a hint.
    Limits {
        /// Worker sessions at one moment.
        sessions_max: u32 = 64,
        /// Blocks a session may hold leased or reserved.
        leases_per_session_max: u32 = 65536,
        /// Keys in one request.
        keys_per_request_max: u32 = 4096,
        /// Bytes of one gRPC message. Longer blocks come and go in several.
        message_bytes_max: Size = Size::mib(4),
        /// Bytes of blocks on their way in over gRPC at one moment. A longer block goes alone.
        in_flight_bytes_max: Size = Size::mib(256),
        /// Share of host memory that may be pinned.
        pinned_ratio_max: Share = Share::percent(50),
        /// An announced block that has not come after this long is given up.
        pending_ttl: Span = Span::seconds(30),
    }
}

section! {
    /// Nodes that serve each other's blocks.
    Peers {
        /// Where other nodes fetch blocks from this one. Beyond this machine it needs `listen.tls` with a client CA:
        /// the certificate of a node must carry its name.
        listen: OrOff<Address> = OrOff::Off,
        /// The other nodes, each as `<name>=<host>:<port>`. The same list may stand on all of them: a node passes
        /// over itself.
        members: Vec<Member> = vec![],
        /// Connections that large blocks of one peer come by, beside one for small blocks.
        connections: u32 = 4,
        /// How long a block may be on its way from a peer, the search for it included.
        fetch_limit: Span = Span::seconds(10),
        /// How long the peers may take to say whether they have a block.
        probe_limit: Span = Span::millis(500),
        /// How many peers are asked for a block that nobody hinted at.
        probe_peers_max: u32 = 16,
        /// Blocks that one peer may want of this node at one moment.
        wants_max: u32 = 16384,
        /// Bytes of blocks that this node holds for one peer at one moment.
        held_bytes_max: Size = Size::gib(1),
        /// How long a block is held for a peer that does not say that it is done.
        lease_ttl: Span = Span::seconds(30),
        /// Whether blocks move by RDMA where both nodes can: auto, off or required.
        rdma: Rdma = Rdma::Auto,
        /// RDMA device to use, by the kernel's name. auto: those that are up, the nearest first.
        rdma_device: OrAuto<Label> = OrAuto::Auto,
    }
}

section! {
    /// The door for engines that speak LMCache's protocol: kvd in the place of `lmcache server`.
    Lmcache {
        /// Where they connect: an address and port such as 127.0.0.1:6555, or unix:/path/of/a/socket, which LMCache's
        /// own client cannot use. The protocol knows no authentication, so beyond this machine it needs
        /// `listen.insecure`.
        listen: OrOff<Place> = OrOff::Off,
        /// Tokens of a chunk, which is one block; a multiple of the engine's own block.
        chunk_tokens: u32 = 256,
        /// Length of the file through which one engine worker hands over chunks: what one request may load or
        /// store at a time.
        pool_bytes: Size = Size::gib(1),
        /// Permission bits of those files. An engine of another user needs more than its owner's.
        pool_mode: Mode = Mode(0o600),
        /// What those files are called: `/dev/shm/lmcache_l1_pool_<this>_<number>`. auto: kvd-<node>.
        shm_name: OrAuto<Label> = OrAuto::Auto,
        /// Engine workers registered at one moment.
        instances_max: u32 = 8,
        /// Tenant that all of their blocks belong to.
        tenant: String = "default".into(),
        /// What numbers `uint8` elements are, such as fp8_e4m3: vLLM calls its FP8 caches of every kind bytes. It holds
        /// for all engines of this kvd, and is part of the names of their blocks. off: who has such is refused.
        uint8_as: OrOff<Label> = OrOff::Off,
        /// How long a lookup waits for chunks that another engine has announced and not stored yet.
        pending_wait: Span = Span::seconds(1),
        /// How long a lookup waits for chunks that peers of this node or its object store have. 0s: neither is asked.
        peer_wait: Span = Span::seconds(2),
        /// How long chunks that a lookup found are held for the engine to load them.
        hold_ttl: Span = Span::seconds(300),
    }
}

section! {
    /// Users whose blocks lie apart from everybody else's: `[principals.<name>]`.
    Principal {
        /// Its users, by number. They may store and read blocks as those of `workers.uids` may, who are the
        /// default principal together with the network. A user belongs to one principal.
        uids: Vec<u32> = vec![],
        /// Its share of `host.bytes_max` and `disk.bytes_max`. What all leave is the default principal's.
        share: Share = Share::percent(0),
    }
}

section! {
    /// What one tenant gets: `[tenants.<name>]`.
    Tenant {
        /// Host memory the tenant may fill: a size, a share of the tier, or off: no bound of its own.
        /// With several principals, what it may fill in each of them.
        bytes_max: OrOff<SizeOrShare> = OrOff::Off,
    }
}

section! {
    /// Log lines, on standard error.
    Log {
        /// Least level: error, warn, info, debug or trace; or directives such as `info,kv_ssd=debug`.
        level: String = "info".into(),
        /// Shape: text, json, or auto: text on a terminal, JSON elsewhere.
        format: LogFormat = LogFormat::Auto,
    }
}

/// Name of the principal that serves whoever is in no other.
pub const PRINCIPAL_DEFAULT: &str = "default";

impl Config {
    /// Names of all principals; the default one is the first. Elsewhere they go by their place here.
    pub fn principal_names(&self) -> impl Iterator<Item = &str> {
        std::iter::once(PRINCIPAL_DEFAULT).chain(self.principals.keys().map(String::as_str))
    }

    /// The principal, other than the default one, that lists this user.
    pub fn principal_listing(&self, uid: u32) -> Option<usize> {
        self.principals.values().position(|principal| principal.uids.contains(&uid)).map(|at| at + 1)
    }

    /// Name of this node. Settled by [`Config::load`].
    pub fn node_name(&self) -> &str {
        self.node.name.get().map_or("kvd", |label| &label.0)
    }

    /// Directory of the sockets. Settled by [`Config::load`].
    pub fn run_dir(&self) -> PathBuf {
        self.listen.run_dir.get().map_or_else(|| "/run/kvd".into(), |path| path.0.clone())
    }

    /// Directory of the shared memory files. Settled by [`Config::load`].
    pub fn memory_dir(&self) -> PathBuf {
        self.host.memory_dir.get().map_or_else(|| "/dev/shm/kvd".into(), |path| path.0.clone())
    }

    /// The other nodes, without this one.
    pub fn peers(&self) -> impl Iterator<Item = &Member> {
        self.peers.members.iter().filter(|member| member.name != self.node_name())
    }

    /// Whether there is anywhere to look for a block that is not on this node.
    pub fn looks_further(&self) -> bool {
        self.peers().next().is_some() || self.object_store().is_some()
    }

    /// Whether certificates of both sides are checked.
    pub fn has_mutual_tls(&self) -> bool {
        let Tls { cert, key, client_ca } = &self.listen.tls;
        cert.get().is_some() && key.get().is_some() && client_ca.get().is_some()
    }

    /// What the pools of the LMCache door are called. Settled by [`Config::load`].
    pub fn lmcache_shm_name(&self) -> &str {
        self.lmcache.shm_name.get().map_or("kvd", |label| &label.0)
    }

    /// Where the object tier is, where that is on.
    pub fn object_store(&self) -> Option<&kv_object::place::Place> {
        self.object.store.get().map(|at| &at.0)
    }

    /// Directory of the disk tier, where that is on.
    pub fn disk_dir(&self) -> Option<PathBuf> {
        self.disk.dir.get().filter(|_| self.disk.enabled).map(|path| path.0.clone())
    }
}
