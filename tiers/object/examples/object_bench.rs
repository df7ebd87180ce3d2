//! How fast blocks go into a store and come back, and at how many requests.
//!
//!   cargo run --release -p kv-object --example object_bench -- [PLACE] [BLOCKS] [BLOCK_BYTES] [RUNS]
//!
//! PLACE is a directory, or `s3`: the server that `KVD_S3=http://host:port,BUCKET,KEY,SECRET` names, or else s3s-fs inside
//! this process, on a temporary directory. Without one: in memory, which is the cost of the tier itself. Reads are
//! prefixes of 64 blocks, all checked, by a second node that knows nothing at first. Beside the tier, in turn with it,
//! stand the same bytes as large objects without one: on `s3`, one after the other by a bare client of the SDK, which
//! checks nothing; in a directory, through the same back end.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kv_block::{BlockKey, Checksum, Epoch, Priority, Record, ScopeId, Slice, payload};
use kv_object::Store;
use kv_object::dir::Dir;
use kv_object::landing::Landing;
use kv_object::memory::Memory;
use kv_object::pack::Binding;
use kv_object::tier::{Got, Offer, Tier, TierConfig, Want};
use tokio::time::Instant;

type Failed = Box<dyn std::error::Error>;

const PREFIX: u64 = 64;
const OBJECT_BYTES: usize = 32 << 20;

fn key(number: u64) -> BlockKey {
    BlockKey::from_halves([number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, number])
}

/// MiB a second.
fn rate(bytes: u64, began: Instant) -> f64 {
    bytes as f64 / f64::from(1 << 20) / began.elapsed().as_secs_f64()
}

/// Large objects without a tier.
enum Plain {
    /// In memory that would be no copy at all.
    None,
    Dir(Arc<dyn Store>),
    #[cfg(feature = "s3")]
    Sdk(s3::Bare),
}

impl Plain {
    /// Writes and reads so many objects; the rates.
    async fn run(&self, count: u64, run: u64) -> Result<Option<(f64, f64)>, Failed> {
        let total = count * OBJECT_BYTES as u64;
        let body = Bytes::from(vec![7; OBJECT_BYTES]);
        let name = |number: u64| format!("plain/{run}-{number}");
        match self {
            Self::None => Ok(None),
            Self::Dir(store) => {
                let began = Instant::now();
                for number in 0..count {
                    store.put(&name(number), body.clone()).await?;
                }
                let (put, mut slot, began) = (rate(total, began), vec![0; OBJECT_BYTES], Instant::now());
                for number in 0..count {
                    store.get(&name(number), 0, &mut Landing::of(&mut slot)).await?;
                }
                Ok(Some((put, rate(total, began))))
            }
            #[cfg(feature = "s3")]
            Self::Sdk(bare) => {
                let began = Instant::now();
                for number in 0..count {
                    bare.put(&name(number), body.clone()).await?;
                }
                let (put, began) = (rate(total, began), Instant::now());
                for number in 0..count {
                    assert_eq!(bare.get(&name(number)).await?, OBJECT_BYTES);
                }
                Ok(Some((put, rate(total, began))))
            }
        }
    }
}

#[cfg(feature = "s3")]
mod s3 {
    use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
    use bytes::Bytes;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use hyper_util::server::conn::auto::Builder;
    use kv_object::s3::{S3, S3Config, S3Keys};

    use super::Failed;

    /// The SDK as anybody would use it.
    pub(super) struct Bare {
        client: aws_sdk_s3::Client,
        bucket: String,
        prefix: String,
    }

    impl Bare {
        pub(super) async fn put(&self, name: &str, body: Bytes) -> Result<(), Failed> {
            let put = self.client.put_object().bucket(&self.bucket).key(format!("{}/{name}", self.prefix));
            put.body(body.into()).send().await?;
            Ok(())
        }

        pub(super) async fn get(&self, name: &str) -> Result<usize, Failed> {
            let get = self.client.get_object().bucket(&self.bucket).key(format!("{}/{name}", self.prefix));
            let (mut body, mut bytes) = (get.send().await?.body, 0);
            while let Some(chunk) = body.try_next().await? {
                bytes += chunk.len();
            }
            Ok(bytes)
        }
    }

    /// The server that the environment names, or one in this process; what keeps its files comes with it.
    pub(super) async fn open() -> Result<(S3, Bare, Option<tempfile::TempDir>), Failed> {
        let (named, files) = match std::env::var("KVD_S3") {
            Ok(named) => (named, None),
            Err(_) => {
                let files = tempfile::tempdir()?;
                (serve(files.path()).await?, Some(files))
            }
        };
        let [endpoint, bucket, id, secret] = named.split(',').collect::<Vec<_>>()[..] else {
            return Err("KVD_S3 is `http://host:port,BUCKET,KEY,SECRET`".into());
        };
        let prefix = format!("bench-{}", std::time::UNIX_EPOCH.elapsed()?.as_nanos());
        let config = S3Config {
            endpoint: Some(endpoint.to_owned()),
            path_style: true,
            keys: Some(S3Keys { id: id.into(), secret: secret.into(), token: None }),
            prefix: prefix.clone(),
            ..S3Config::new(bucket)
        };
        let bare = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .endpoint_url(endpoint)
            .force_path_style(true)
            .credentials_provider(Credentials::new(id, secret, None, None, "bench"))
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .build();
        let client = aws_sdk_s3::Client::from_conf(bare);
        Ok((S3::open(config).await?, Bare { client, bucket: bucket.to_owned(), prefix }, files))
    }

    /// Starts s3s-fs; what `KVD_S3` would say of it.
    async fn serve(files: &std::path::Path) -> Result<String, Failed> {
        std::fs::create_dir(files.join("blocks"))?;
        let files = s3s_fs::FileSystem::new(files).map_err(|error| format!("{error:?}"))?;
        let mut service = s3s::service::S3ServiceBuilder::new(files);
        service.set_auth(s3s::auth::SimpleAuth::from_single("KEY", "SECRET"));
        let service = service.build();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let at = listener.local_addr()?;
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let server = Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Ok(format!("http://{at},blocks,KEY,SECRET"))
    }
}

fn with_ratio(rate: f64, plain: Option<f64>) -> String {
    let ratio = plain.map_or(String::new(), |plain| format!(", {:.2} of plain", rate / plain));
    format!("{rate:7.0} MiB/s{ratio}")
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), Failed> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let word = |at: usize| words.get(at).map(String::as_str).filter(|word| !word.is_empty());
    let blocks: u64 = word(1).unwrap_or("4096").parse()?;
    let bytes: u32 = word(2).unwrap_or("65536").parse()?;
    let runs: u64 = word(3).unwrap_or("1").parse()?;
    let mut _files = None;
    let (store, plain): (Arc<dyn Store>, Plain) = match word(0) {
        #[cfg(feature = "s3")]
        Some("s3") => {
            let (store, bare, files) = s3::open().await?;
            _files = files;
            (Arc::new(store), Plain::Sdk(bare))
        }
        Some(place) => {
            let store: Arc<dyn Store> = Arc::new(Dir::open(Path::new(place))?);
            (store.clone(), Plain::Dir(store))
        }
        None => {
            _files = None::<tempfile::TempDir>;
            (Arc::new(Memory::new()), Plain::None)
        }
    };
    println!("{}: {blocks} blocks of {bytes} bytes", store.describe());
    for run in 0..runs {
        one_run(&store, &plain, blocks, bytes, run).await?;
    }
    Ok(())
}

async fn one_run(
    store: &Arc<dyn Store>,
    plain: &Plain,
    blocks: u64,
    bytes: u32,
    run: u64,
) -> Result<(), Failed> {
    let total = blocks * u64::from(bytes);
    let about = String::new();
    let binding =
        Arc::new(Binding { scope: ScopeId([7; 32]), slice: Slice::whole(2, 4), block_bytes: bytes, about });
    // Other names in each run: what is there already is not written again.
    let first_key = run * blocks.next_multiple_of(PREFIX);
    let offers: Vec<Offer> = (first_key..first_key + blocks)
        .map(|number| {
            let (key, mut content) = (key(number), vec![0; bytes as usize]);
            payload::fill(&key, &mut content);
            let checksum = Checksum::of(&key, &content);
            let priority = Priority::Normal;
            let record = Record { key, checksum, bytes, tag: binding.tag(), priority, expires_at: 0 };
            let parent = (!number.is_multiple_of(PREFIX)).then(|| self::key(number - 1));
            Offer { binding: binding.clone(), record, parent, bytes: content.into() }
        })
        .collect();

    let beside = plain.run(total.div_ceil(OBJECT_BYTES as u64), run).await?;
    if let Some((put, get)) = beside {
        println!("plain put   {put:7.0} MiB/s\nplain get   {get:7.0} MiB/s");
    }

    let one = Tier::open(store.clone(), TierConfig::new("one", Epoch(1 + run)), 1).await?.0;
    let before = requests(&one);
    let began = Instant::now();
    for some in offers.chunks(PREFIX as usize) {
        one.put(1, some.to_vec()).await?;
    }
    one.flush(true).await?;
    println!("tier put    {}", with_ratio(rate(total, began), beside.map(|(put, _)| put)));
    one.refresh(1).await?;

    let began = Instant::now();
    let (two, opened) = Tier::open(store.clone(), TierConfig::new("two", Epoch(1 + run)), 1).await?;
    println!("tier open   {:7.1} ms, {} blocks found", began.elapsed().as_secs_f64() * 1e3, opened.blocks);
    let mut slots = vec![vec![0; bytes as usize]; PREFIX as usize];
    let began = Instant::now();
    let mut hits = 0;
    for first in (0..blocks).step_by(PREFIX as usize) {
        let numbers = first_key + first..first_key + blocks.min(first + PREFIX);
        let mut wants: Vec<Want<'_>> =
            numbers.zip(&mut slots).map(|(number, slot)| Want { key: key(number), into: slot }).collect();
        let got = two.read(1, Duration::from_secs(60), &mut wants).await;
        hits += got.iter().filter(|got| matches!(got, Got::Read(_))).count();
    }
    let read = with_ratio(rate(total, began), beside.map(|(_, get)| get));
    println!("tier read   {read}, {hits} of {blocks} hit");
    let totals = two.report().totals;
    println!(
        "requests    {:.4} a block written, {:.4} a block read",
        (requests(&one) - before) as f64 / blocks as f64,
        requests(&two) as f64 / blocks as f64
    );
    println!(
        "read        {:.3} bytes for each that was used",
        totals.bytes_read as f64 / totals.bytes_used as f64
    );
    Ok(())
}

/// How often a tier has asked the store.
fn requests(tier: &Tier) -> u64 {
    tier.report().requests.counts.values().map(|count| count.requests).sum()
}
