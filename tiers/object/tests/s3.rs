//! S3 on `s3s-fs` in this process, which checks signatures, and on any other server that the environment names.
//!
//! `KVD_S3=http://host:port,BUCKET,KEY,SECRET` adds a server; `servers` beside this crate starts one.
#![cfg(all(feature = "s3", feature = "azure"))]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{NOW, config, hits, offer};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use kv_object::contract::Subject;
use kv_object::landing::Landing;
use kv_object::s3::{S3, S3Config, S3Keys};
use kv_object::store::{Store, StoreError};
use kv_object::tier::Tier;
use tokio::net::TcpListener;

const BUCKET: &str = "blocks";

/// A server on a port of its own, with an empty bucket; gone with the test.
struct Server {
    at: SocketAddr,
    _files: tempfile::TempDir,
}

impl Server {
    async fn start() -> Self {
        let files = tempfile::tempdir().unwrap();
        std::fs::create_dir(files.path().join(BUCKET)).unwrap();
        let mut service = s3s::service::S3ServiceBuilder::new(s3s_fs::FileSystem::new(files.path()).unwrap());
        service.set_auth(s3s::auth::SimpleAuth::from_single("KEY", "SECRET"));
        let service = service.build();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let _ = Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(socket), service)
                        .await;
                });
            }
        });
        Self { at, _files: files }
    }

    fn config(&self) -> S3Config {
        let keys = S3Keys { id: "KEY".into(), secret: "SECRET".into(), token: None };
        S3Config {
            endpoint: Some(format!("http://{}", self.at)),
            path_style: true,
            keys: Some(keys),
            prefix: "some/where".into(),
            ..S3Config::new(BUCKET)
        }
    }

    async fn store(&self) -> S3 {
        S3::open(self.config()).await.unwrap()
    }
}

struct Here {
    store: Arc<S3>,
    /// `None`: somebody else's.
    server: Option<Server>,
}

impl Subject for Here {
    fn store(&self) -> Arc<dyn Store> {
        self.store.clone()
    }

    fn decides_races(&self) -> bool {
        // s3s-fs looks whether the file is there, and writes then.
        self.server.is_none()
    }
}

async fn here(parts_above_bytes: usize) -> Option<Here> {
    let server = Server::start().await;
    let config = S3Config { parts_above_bytes, part_bytes: 5 << 20, ..server.config() };
    Some(Here { store: Arc::new(S3::open(config).await.unwrap()), server: Some(server) })
}

/// A server that somebody else started, under a prefix that nobody else uses.
async fn elsewhere(parts_above_bytes: usize) -> Option<Here> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let named = std::env::var("KVD_S3").ok()?;
    let [endpoint, bucket, id, secret] = named.split(',').collect::<Vec<_>>()[..] else {
        panic!("KVD_S3 is `http://host:port,BUCKET,KEY,SECRET`");
    };
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let since = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
    let config = S3Config {
        endpoint: Some(endpoint.to_owned()),
        path_style: true,
        keys: Some(S3Keys { id: id.into(), secret: secret.into(), token: None }),
        prefix: format!("run-{since}-{number}"),
        parts_above_bytes,
        part_bytes: 5 << 20,
        ..S3Config::new(bucket)
    };
    Some(Here { store: Arc::new(S3::open(config).await.unwrap()), server: None })
}

mod whole {
    kv_object::object_contract!(super::here(1 << 30).await);
}

mod in_parts {
    kv_object::object_contract!(super::here(6 << 20).await);
}

mod elsewhere_whole {
    kv_object::object_contract!(super::elsewhere(1 << 30).await);
}

mod elsewhere_in_parts {
    kv_object::object_contract!(super::elsewhere(6 << 20).await);
}

#[tokio::test]
async fn wrong_keys_are_refused_and_a_wrong_bucket_is_invalid() {
    let server = Server::start().await;
    let keys = S3Keys { id: "KEY".into(), secret: "hunter2".into(), token: None };
    let store = S3::open(S3Config { keys: Some(keys), ..server.config() }).await.unwrap();
    let error = store.put("a", vec![1].into()).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    assert!(!format!("{error:?}").contains("hunter2"));
    let config = S3Config { bucket: "no-such-bucket".into(), ..server.config() };
    let error = S3::open(config).await.unwrap().list("", None, 10).await.unwrap_err();
    assert!(matches!(error, StoreError::Invalid { .. }), "{error:?}");
}

#[tokio::test]
async fn without_keys_nothing_is_asked_for() {
    let server = Server::start().await;
    // Whatever the environment has is no key of this server.
    let error =
        S3::open(S3Config { keys: None, ..server.config() }).await.unwrap().head("a").await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
}

#[tokio::test]
async fn a_connection_that_ends_may_be_tried_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Some(format!("http://{}", listener.local_addr().unwrap()));
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = tokio::io::AsyncReadExt::read(&mut socket, &mut [0; 8192]).await;
        }
    });
    let server = Server::start().await;
    let store = S3::open(S3Config { endpoint, ..server.config() }).await.unwrap();
    for _ in 0..5 {
        let error = store.put("a", vec![7; 100_000].into()).await.unwrap_err();
        assert!(error.is_passing(), "{error:?}");
        let error = store.get("a", 0, &mut Landing::of(&mut [0; 10])).await.unwrap_err();
        assert!(error.is_passing(), "{error:?}");
    }
}

#[tokio::test]
async fn where_nobody_listens_is_broken() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Some(format!("http://{}", listener.local_addr().unwrap()));
    drop(listener);
    let server = Server::start().await;
    let error =
        S3::open(S3Config { endpoint, ..server.config() }).await.unwrap().head("a").await.unwrap_err();
    assert!(matches!(error, StoreError::Broken { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_client_reads_what_was_written_and_the_other_way_round() {
    use object_store::ObjectStoreExt as _;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let server = Server::start().await;
    let store = server.store().await;
    let other = object_store::aws::AmazonS3Builder::new()
        .with_endpoint(format!("http://{}", server.at))
        .with_allow_http(true)
        .with_region("us-east-1")
        .with_bucket_name(BUCKET)
        .with_access_key_id("KEY")
        .with_secret_access_key("SECRET")
        .build()
        .unwrap();
    let body: Vec<u8> = (0..100_000u32).map(|n| (n * 7) as u8).collect();
    store.put("packs/ours", body.clone().into()).await.unwrap();
    let place = object_store::path::Path::from("some/where/packs/ours");
    assert!(other.get(&place).await.unwrap().bytes().await.unwrap() == body);
    assert!(other.get_range(&place, 500..900).await.unwrap() == body[500..900]);
    let theirs = object_store::path::Path::from("some/where/packs/theirs");
    other.put(&theirs, body.clone().into()).await.unwrap();
    let mut slot = vec![0; 400];
    store.get("packs/theirs", 500, &mut Landing::of(&mut slot)).await.unwrap();
    assert!(slot == body[500..900]);
    assert_eq!(store.list("packs/", None, 10).await.unwrap().objects.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tier_on_s3_is_found_by_another_node() {
    let server = Server::start().await;
    let store: Arc<dyn Store> = Arc::new(server.store().await);
    let one = Tier::open(store.clone(), config("a", 1), NOW).await.unwrap().0;
    one.put(NOW, (0..30).map(|n| offer(n, 4000, None, 0)).collect()).await.unwrap();
    one.flush(true).await.unwrap();
    let (two, opened) = Tier::open(store, config("b", 1), NOW).await.unwrap();
    assert_eq!(opened.blocks, 30);
    assert_eq!(hits(&two, &(0..30).collect::<Vec<_>>()).await, 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_network_costs_time_and_blocks_and_never_a_wrong_byte() {
    let server = Server::start().await;
    let proxy = common::proxy::Proxy::start(server.at, 7, true).await;
    let endpoint = Some(format!("http://{}", proxy.at));
    let store = S3::open(S3Config { endpoint, ..server.config() }).await.unwrap();
    common::storm::weather(Arc::new(store), &proxy).await;
}

#[tokio::test]
async fn what_goes_up_carries_its_checksum_and_a_damaged_body_is_refused() {
    use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
    let server = Server::start().await;
    let body: Vec<u8> = (0..6_000_000u32).map(|n| (n * 7) as u8).collect();
    let parts = S3Config { parts_above_bytes: 1 << 20, part_bytes: 5 << 20, ..server.config() };
    server.store().await.put("whole", body.clone().into()).await.unwrap();
    S3::open(parts).await.unwrap().put("parts", body.clone().into()).await.unwrap();
    let client = aws_sdk_s3::Client::from_conf(
        aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new("us-east-1"))
            .endpoint_url(format!("http://{}", server.at))
            .force_path_style(true)
            .credentials_provider(Credentials::new("KEY", "SECRET", None, None, "test"))
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .build(),
    );
    let key = kv_block::BlockKey::default();
    let sum = kv_block::Checksum::of(&key, &body).content(&key).to_be_bytes();
    let digits = sum.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    for name in ["whole", "parts"] {
        let head = client
            .head_object()
            .bucket(BUCKET)
            .key(format!("some/where/{name}"))
            .checksum_mode(aws_sdk_s3::types::ChecksumMode::Enabled)
            .send()
            .await
            .unwrap();
        let told = head.checksum_crc64_nvme().map(|told| {
            let bytes = azure_core::base64::decode(told).unwrap();
            bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        });
        // Of an object in parts, s3s-fs keeps none.
        assert!(
            told.as_ref().is_none_or(|told| *told == digits) && (told.is_some() || name == "parts"),
            "{told:?}"
        );
    }
    // The server compares: a body that is not what its checksum says is an error. (s3s-fs keeps it all the same, and
    // that is why a tier looks at what was there already before it takes it for its own.)
    let refused = client
        .put_object()
        .bucket(BUCKET)
        .key("some/where/damaged")
        .checksum_algorithm(aws_sdk_s3::types::ChecksumAlgorithm::Crc64Nvme)
        .checksum_crc64_nvme("AAAAAAAAAAA=")
        .body(body.into())
        .send()
        .await;
    assert!(refused.is_err());
}
