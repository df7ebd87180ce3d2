//! Azure Blob on an Azurite that the environment names: `KVD_AZURITE=http://host:port/devstoreaccount1`, started
//! with `--loose`. `servers` beside this crate starts one.
#![cfg(feature = "azure")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{NOW, config, hits, offer};
use kv_object::azure::{Azure, AzureAccess, AzureConfig};
use kv_object::contract::Subject;
use kv_object::landing::Landing;
use kv_object::store::{Store, StoreError};
use kv_object::tier::Tier;

/// The account and the key that every Azurite has.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

struct Here(Arc<Azure>);

impl Subject for Here {
    fn store(&self) -> Arc<dyn Store> {
        self.0.clone()
    }
}

/// A place that nobody else uses.
fn place() -> Option<AzureConfig> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let endpoint = std::env::var("KVD_AZURITE").ok()?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let since = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos();
    Some(AzureConfig {
        endpoint: Some(endpoint),
        prefix: format!("run-{since}-{number}"),
        part_bytes: 4 << 20,
        ..AzureConfig::new(ACCOUNT, "blocks", AzureAccess::Key(KEY.into()))
    })
}

async fn here(parts_above_bytes: usize) -> Option<Here> {
    let store = Azure::open(AzureConfig { parts_above_bytes, ..place()? }).unwrap();
    store.make_container().await.unwrap();
    Some(Here(Arc::new(store)))
}

mod whole {
    kv_object::object_contract!(super::here(1 << 30).await);
}

mod in_parts {
    kv_object::object_contract!(super::here(5 << 20).await);
}

fn skipped(what: &str) {
    eprintln!("SKIPPED {what}: no Azurite is named by KVD_AZURITE");
}

#[tokio::test]
async fn wrong_keys_are_refused_and_a_wrong_container_is_invalid() {
    let Some(place) = place() else { return skipped("wrong_keys_are_refused") };
    here(1 << 30).await.unwrap();
    let access = AzureAccess::Key("aHVudGVyMg==".into());
    let error = Azure::open(AzureConfig { access, ..place.clone() }).unwrap().head("a").await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    let access =
        AzureAccess::Sas("?sv=2021-12-02&ss=b&srt=co&sp=r&se=2000-01-01T00:00:00Z&sig=hunter2".into());
    let error = Azure::open(AzureConfig { access, ..place.clone() }).unwrap().head("a").await.unwrap_err();
    assert!(
        matches!(error, StoreError::Refused { .. }) && !format!("{error:?}").contains("hunter2"),
        "{error:?}"
    );
    let container = "no-such-container".to_owned();
    let store = Azure::open(AzureConfig { container, ..place }).unwrap();
    let error = store.list("", None, 10).await.unwrap_err();
    assert!(matches!(error, StoreError::Invalid { .. }), "{error:?}");
}

#[tokio::test]
async fn a_signature_that_was_given_is_enough() {
    let Some(place) = place() else { return skipped("a_signature_that_was_given_is_enough") };
    let store = here(1 << 30).await.unwrap().0;
    store.put("a", vec![1, 2, 3].into()).await.unwrap();
    // For the container, for a year of which this test sees a second.
    let until = "2099-01-01T00:00:00Z";
    let text = format!("{ACCOUNT}\nrl\nb\nco\n\n{until}\n\n\n2021-12-02\n\n");
    let key = azure_core::base64::decode(KEY).unwrap();
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
    let signature = azure_core::base64::encode(ring::hmac::sign(&key, text.as_bytes()));
    let signature = signature.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
    let query = format!("sv=2021-12-02&ss=b&srt=co&sp=rl&se={}&sig={signature}", until.replace(':', "%3A"));
    let access = AzureAccess::Sas(query.as_str().into());
    let reader = Azure::open(AzureConfig { access, ..place }).unwrap();
    let listed = reader.list("", None, 10).await.unwrap();
    assert_eq!(listed.objects, [], "under another prefix");
    let error = reader.put("b", vec![1].into()).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "it only reads: {error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_client_reads_what_was_written_and_the_other_way_round() {
    use object_store::ObjectStoreExt as _;
    let Some(place) = place() else { return skipped("another_client_reads_what_was_written") };
    here(1 << 30).await.unwrap();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let other = object_store::azure::MicrosoftAzureBuilder::new()
        .with_account(ACCOUNT)
        .with_access_key(KEY)
        .with_container_name("blocks")
        .with_endpoint(place.endpoint.clone().unwrap())
        .with_allow_http(true)
        .build()
        .unwrap();
    let body: Vec<u8> = (0..100_000u32).map(|n| (n * 7) as u8).collect();
    let prefix = place.prefix.clone();
    let store = Azure::open(place).unwrap();
    store.put("packs/ours", body.clone().into()).await.unwrap();
    let ours = object_store::path::Path::from(format!("{prefix}/packs/ours"));
    assert!(other.get(&ours).await.unwrap().bytes().await.unwrap() == body);
    assert!(other.get_range(&ours, 500..900).await.unwrap() == body[500..900]);
    let theirs = object_store::path::Path::from(format!("{prefix}/packs/theirs"));
    other.put(&theirs, body.clone().into()).await.unwrap();
    let mut slot = vec![0; 400];
    store.get("packs/theirs", 500, &mut Landing::of(&mut slot)).await.unwrap();
    assert!(slot == body[500..900]);
    assert_eq!(store.list("packs/", None, 10).await.unwrap().objects.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tier_on_azure_is_found_by_another_node() {
    let Some(here) = here(1 << 30).await else { return skipped("a_tier_on_azure_is_found_by_another_node") };
    let store: Arc<dyn Store> = here.0;
    let one = Tier::open(store.clone(), config("a", 1), NOW).await.unwrap().0;
    one.put(NOW, (0..30).map(|n| offer(n, 4000, None, 0)).collect()).await.unwrap();
    one.flush(true).await.unwrap();
    let (two, opened) = Tier::open(store, config("b", 1), NOW).await.unwrap();
    assert_eq!(opened.blocks, 30);
    assert_eq!(hits(&two, &(0..30).collect::<Vec<_>>()).await, 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_network_costs_time_and_blocks_and_never_a_wrong_byte() {
    let Some(place) = place() else { return skipped("a_bad_network_costs_time_and_blocks") };
    here(1 << 30).await.unwrap();
    let endpoint = place.endpoint.clone().unwrap();
    let server = endpoint.strip_prefix("http://").and_then(|rest| rest.split('/').next()).unwrap();
    let proxy = common::proxy::Proxy::start(server.parse().unwrap(), 7, false).await;
    let endpoint = Some(endpoint.replace(server, &proxy.at.to_string()));
    common::storm::weather(Arc::new(Azure::open(AzureConfig { endpoint, ..place }).unwrap()), &proxy).await;
}
