//! Azure Blob, by `azure_storage_blob`.
//!
//! - **If absent** is `If-None-Match: *`, on the write itself or on the list of blocks that ends one in parts.
//! - **Access** is an account key, a shared access signature, or Entra. The SDK knows no account keys: with one, each
//!   request carries an account signature of its own that we make here and that is over after an hour.
//! - **Checksum**: every body goes up with its CRC-64/NVME, which is what the service calls its own, as
//!   `x-ms-content-crc64`. The SDK does not offer that, so a policy of ours sets it. (Azurite does not look at it, and
//!   refuses it unless it is started with `--loose`.)
//!   Coming down, each block has its checksum.
//! - **In parts** only where it pays: above [`AzureConfig::parts_above_bytes`]. What a write that is given up leaves
//!   behind, the service forgets after a week.
//! - The SDK's own retries are off: see [`crate::requests`]. TLS is rustls on ring, with the system's certificates.

use std::fmt;
use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use azure_core::credentials::TokenCredential;
use azure_core::error::ErrorKind;
use azure_core::http::headers::HeaderName;
use azure_core::http::policies::{Policy, PolicyResult};
use azure_core::http::request::Body;
use azure_core::http::{ClientOptions, Context, Method, Request, RetryOptions, Transport, Url};
use azure_core::time::{OffsetDateTime, to_rfc3339};
use azure_identity::{
    ClientAssertionCredentialOptions, ClientSecretCredential, ClientSecretCredentialOptions,
    ManagedIdentityCredential, ManagedIdentityCredentialOptions, WorkloadIdentityCredential,
    WorkloadIdentityCredentialOptions,
};
use azure_storage_blob::models::{
    BlobClientDownloadOptions, BlobClientGetPropertiesResultHeaders as _, BlobClientUploadOptions,
    BlobContainerClientListBlobsOptions,
};
use azure_storage_blob::{BlobClient, BlobContainerClient, BlobContainerClientOptions};
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use kv_block::{BlockKey, Checksum};

use crate::landing::Landing;
use crate::secret::Secret;
use crate::store::{
    Object, PAGE_MAX, Page, Reply, Store, StoreError, check_name, check_prefix, check_range, is_name,
};

/// Who asks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AzureAccess {
    /// Whoever has the account's key, in base64.
    Key(Secret),
    /// Whoever has this signature: the query of a signed address, with or without its '?'.
    Sas(Secret),
    /// A pod's workload identity, as its environment says.
    Workload,
    /// The machine's managed identity.
    Managed,
    /// An application of Entra.
    Application {
        /// Tenant id.
        tenant: String,
        /// Client id.
        client: String,
        /// Client secret.
        secret: Secret,
    },
}

/// Where a container is and who may use it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AzureConfig {
    /// Name of the storage account.
    pub account: String,
    /// Name of the container.
    pub container: String,
    /// What all names begin with in the container, without a '/' at its end; may be empty.
    pub prefix: String,
    /// Another address than `https://ACCOUNT.blob.core.windows.net`.
    pub endpoint: Option<String>,
    /// Who asks.
    pub access: AzureAccess,
    /// Bodies carry their checksum. Azure knows what it is; some that speak like Azure do not.
    pub checksums: bool,
    /// Longer bodies go up in parts, in bytes.
    pub parts_above_bytes: usize,
    /// Length of a part in bytes.
    pub part_bytes: usize,
}

impl AzureConfig {
    /// A container at Azure; checksums, and parts of 16 MiB above 64 MiB.
    pub fn new(account: impl Into<String>, container: impl Into<String>, access: AzureAccess) -> Self {
        Self {
            account: account.into(),
            container: container.into(),
            prefix: String::new(),
            endpoint: None,
            access,
            checksums: true,
            parts_above_bytes: 64 << 20,
            part_bytes: 16 << 20,
        }
    }
}

const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How long a signature of ours is good: clocks may differ by as much.
const SIGNATURE_AGE_MAX: Duration = Duration::from_secs(3600);
/// The version of the service that a signature is made for.
const SIGNATURE_VERSION: &str = "2021-12-02";

/// A container, or the part of it under a prefix.
pub struct Azure {
    client: BlobContainerClient,
    /// Empty, or with a '/' at its end.
    prefix: String,
    parts_above_bytes: usize,
    part_bytes: usize,
    place: String,
}

impl fmt::Debug for Azure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)
    }
}

impl Azure {
    /// The store that `config` describes. Asks nobody.
    pub fn open(config: AzureConfig) -> Result<Self, StoreError> {
        let AzureConfig { account, container, prefix, endpoint, access, .. } = config;
        if !(prefix.is_empty() || is_name(&prefix)) {
            return Err(StoreError::invalid(format_args!("`{prefix}` is no prefix")));
        }
        let endpoint = endpoint.unwrap_or_else(|| format!("https://{account}.blob.core.windows.net"));
        // The address as it was given is not repeated: it may hold a signature.
        let address = |_| StoreError::invalid("the endpoint is no address");
        let mut url =
            Url::parse(&format!("{}/{container}", endpoint.trim_end_matches('/'))).map_err(address)?;
        let place = format!("az://{account}/{container}/{prefix} at {}", url.host_str().unwrap_or_default());
        let mut options = ClientOptions {
            retry: RetryOptions::none(),
            transport: Some(Transport::new(Arc::new(http_client()?))),
            ..ClientOptions::default()
        };
        if config.checksums {
            options.per_try_policies.push(Arc::new(Summed));
        }
        let credential = match access {
            AzureAccess::Key(key) => {
                options.per_try_policies.push(Arc::new(Signer::new(account, &key)?));
                None
            }
            AzureAccess::Sas(signature) => {
                url.set_query(Some(signature.expose().trim_start_matches('?')));
                None
            }
            entra => Some(entra_credential(entra, options.clone())?),
        };
        let options = BlobContainerClientOptions { client_options: options, ..Default::default() };
        let client = BlobContainerClient::new(url, credential, Some(options))
            .map_err(|_| StoreError::invalid("the endpoint is no address of a container, or not https"))?;
        Ok(Self {
            client,
            prefix: if prefix.is_empty() { prefix } else { prefix + "/" },
            parts_above_bytes: config.parts_above_bytes,
            part_bytes: config.part_bytes,
            place,
        })
    }

    /// Makes the container, if it is not there. Needs the right to.
    pub async fn make_container(&self) -> Result<(), StoreError> {
        match self.client.create(None).await.map_err(|error| failed(&error)) {
            Ok(_) | Err(StoreError::Exists) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn blob(&self, name: &str) -> BlobClient {
        self.client.blob_client(&format!("{}{name}", self.prefix))
    }
}

fn http_client() -> Result<reqwest::Client, StoreError> {
    use rustls_platform_verifier::BuilderVerifierExt;
    let tls = || StoreError::invalid("the system's certificates cannot be used");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(BuilderVerifierExt::with_platform_verifier)
        .map_err(|_| tls())?
        .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(config)
        .connect_timeout(CONNECT_MAX)
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(|_| tls())
}

fn entra_credential(
    access: AzureAccess,
    options: ClientOptions,
) -> Result<Arc<dyn TokenCredential>, StoreError> {
    let credential: azure_core::Result<Arc<dyn TokenCredential>> = match access {
        AzureAccess::Application { tenant, client, secret } => {
            let options = ClientSecretCredentialOptions { client_options: options };
            let secret = secret.expose().to_owned().into();
            ClientSecretCredential::new(&tenant, client, secret, Some(options))
                .map(|credential| credential as _)
        }
        AzureAccess::Workload => {
            let credential_options = ClientAssertionCredentialOptions { client_options: options };
            let options = WorkloadIdentityCredentialOptions { credential_options, ..Default::default() };
            WorkloadIdentityCredential::new(Some(options)).map(|credential| credential as _)
        }
        _ => {
            let options = ManagedIdentityCredentialOptions { client_options: options, ..Default::default() };
            ManagedIdentityCredential::new(Some(options)).map(|credential| credential as _)
        }
    };
    credential.map_err(|error| StoreError::Refused { why: format!("no identity: {}", error.kind()) })
}

/// Sends the checksum of every body along.
#[derive(Debug)]
struct Summed;

/// CRC-64/NVME as the service writes it: eight bytes, the lowest first, in base64.
fn checksum(body: &[u8]) -> String {
    let key = BlockKey::default();
    azure_core::base64::encode(Checksum::of(&key, body).content(&key).to_le_bytes())
}

#[async_trait::async_trait]
impl Policy for Summed {
    async fn send(&self, context: &Context, request: &mut Request, next: &[Arc<dyn Policy>]) -> PolicyResult {
        if let (Method::Put, Body::Bytes(body)) = (request.method(), request.body())
            && !body.is_empty()
        {
            let sum = checksum(body);
            request.insert_header("x-ms-content-crc64", sum);
        }
        next[0].send(context, request, &next[1..]).await
    }
}

/// Signs each request with the account's key.
struct Signer {
    account: String,
    key: ring::hmac::Key,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.account)
    }
}

impl Signer {
    fn new(account: String, key: &Secret) -> Result<Self, StoreError> {
        let key = azure_core::base64::decode(key.expose())
            .map_err(|_| StoreError::invalid("the account key is not base64"))?;
        Ok(Self { account, key: ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key) })
    }

    /// The parts of an account signature for containers and blobs that is good until `until`.
    fn sign(&self, until: &str) -> [(&'static str, String); 6] {
        let (rights, services, kinds) = ("rwdlac", "b", "co");
        let account = &self.account;
        // Each on a line: start, addresses, protocols and encryption scope are left open.
        let text =
            format!("{account}\n{rights}\n{services}\n{kinds}\n\n{until}\n\n\n{SIGNATURE_VERSION}\n\n");
        let signature = azure_core::base64::encode(ring::hmac::sign(&self.key, text.as_bytes()));
        [
            ("sv", SIGNATURE_VERSION.to_owned()),
            ("ss", services.to_owned()),
            ("srt", kinds.to_owned()),
            ("sp", rights.to_owned()),
            ("se", until.to_owned()),
            ("sig", signature),
        ]
    }
}

#[async_trait::async_trait]
impl Policy for Signer {
    async fn send(&self, context: &Context, request: &mut Request, next: &[Arc<dyn Policy>]) -> PolicyResult {
        let until = OffsetDateTime::now_utc().replace_nanosecond(0).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let signature = self.sign(&to_rfc3339(&(until + SIGNATURE_AGE_MAX)));
        request.url_mut().query_pairs_mut().extend_pairs(&signature);
        next[0].send(context, request, &next[1..]).await
    }
}

/// What an answer says without its words: those may repeat the address, with the signature in it.
fn failed(error: &azure_core::Error) -> StoreError {
    let (status, code, answer) = match error.kind() {
        ErrorKind::HttpResponse { status, error_code, raw_response } => {
            (u16::from(*status), error_code.as_deref().unwrap_or_default(), raw_response)
        }
        ErrorKind::Credential => return StoreError::Refused { why: "no token".to_owned() },
        ErrorKind::Connection => return StoreError::broken("the connection failed"),
        ErrorKind::Io => return StoreError::broken("the connection ended early"),
        kind => return StoreError::broken(kind),
    };
    let header = |name: &'static str| {
        answer.as_ref().and_then(|answer| answer.headers().get_optional_str(&HeaderName::from_static(name)))
    };
    match (status, code) {
        (_, "ContainerNotFound" | "ResourceTypeMismatch" | "InvalidResourceName") => {
            StoreError::invalid("there is no such container")
        }
        (404, _) => StoreError::Absent,
        (412, _) | (409, "BlobAlreadyExists" | "ContainerAlreadyExists") => StoreError::Exists,
        (416, _) => {
            let bytes = header("content-range").and_then(|range| range.rsplit('/').next()?.parse().ok());
            StoreError::Short { bytes: bytes.unwrap_or(0), wanted: 0 }
        }
        (429 | 503, _) | (_, "ServerBusy") => {
            let seconds = header("retry-after").and_then(|seconds| seconds.parse().ok());
            StoreError::Throttled { retry_after: seconds.map(Duration::from_secs) }
        }
        (408, _) | (_, "OperationTimedOut") => StoreError::Timeout,
        (401 | 403, _) => StoreError::Refused { why: format!("{status} {code}") },
        // Two writes met, or a part got lost between them.
        (409 | 500.., _) | (_, "InvalidBlockList" | "Md5Mismatch" | "Crc64Mismatch") => {
            StoreError::broken(format_args!("{status} {code}"))
        }
        _ => StoreError::invalid(format_args!("{status} {code}")),
    }
}

impl Store for Azure {
    fn describe(&self) -> String {
        self.place.clone()
    }

    fn put<'a>(&'a self, name: &'a str, body: Bytes) -> Reply<'a, ()> {
        Box::pin(async move {
            check_name(name)?;
            // In one piece where a part has room for it.
            let whole = body.len() <= self.parts_above_bytes;
            let part = if whole { body.len() } else { self.part_bytes };
            let options = BlobClientUploadOptions {
                partition_size: NonZero::new(part.max(1) as u64),
                ..BlobClientUploadOptions::default()
            };
            let blob = self.blob(name);
            let upload = blob.upload(body.into(), Some(options.if_not_exists()));
            // A future of the SDK is too long to lie in ours.
            Box::pin(upload).await.map(drop).map_err(|error| failed(&error))
        })
    }

    fn get<'a>(&'a self, name: &'a str, from: u64, landing: &'a mut Landing<'_>) -> Reply<'a, ()> {
        Box::pin(async move {
            check_name(name)?;
            if landing.is_empty() {
                return Ok(());
            }
            let end = from + landing.len();
            let options = BlobClientDownloadOptions {
                range: Some((from..end).into()),
                // One request: whoever wants more at once asks for more ranges.
                partition_size: NonZero::new(landing.len() as usize),
                parallel: NonZero::new(1),
                ..BlobClientDownloadOptions::default()
            };
            let got = Box::pin(self.blob(name).download(Some(options))).await;
            let mut got = match got.map_err(|error| failed(&error)) {
                Ok(got) => got,
                Err(StoreError::Short { bytes, .. }) => return Err(StoreError::Short { bytes, wanted: end }),
                // The SDK makes no sense of the answer that an empty blob gives.
                Err(error) if error == StoreError::broken(ErrorKind::DataConversion) => {
                    let bytes = self.head(name).await?;
                    return Err(if bytes < end { StoreError::Short { bytes, wanted: end } } else { error });
                }
                Err(error) => return Err(error),
            };
            check_range(got.headers.get_optional_str(&HeaderName::from_static("content-range")), from, end)?;
            while let Some(chunk) = got.body.try_next().await.map_err(|error| failed(&error))? {
                landing.push(&chunk).map_err(StoreError::broken)?;
            }
            if landing.is_full() { Ok(()) } else { Err(StoreError::broken("the body ended early")) }
        })
    }

    fn head<'a>(&'a self, name: &'a str) -> Reply<'a, u64> {
        Box::pin(async move {
            check_name(name)?;
            let head = self.blob(name).get_properties(None).await.map_err(|error| failed(&error))?;
            let bytes = head.content_length().ok().flatten();
            bytes.ok_or_else(|| StoreError::broken("a blob without a length"))
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> Reply<'a, Page> {
        Box::pin(async move {
            check_prefix(prefix)?;
            let options = BlobContainerClientListBlobsOptions {
                prefix: Some(format!("{}{prefix}", self.prefix)),
                marker: after.map(str::to_owned),
                maxresults: Some(limit.clamp(1, PAGE_MAX) as i32),
                ..BlobContainerClientListBlobsOptions::default()
            };
            let mut pages =
                self.client.list_blobs(Some(options)).map_err(|error| failed(&error))?.into_pages();
            let page = pages.try_next().await.map_err(|error| failed(&error))?;
            let page = page.ok_or_else(|| StoreError::broken("a list without a page"))?;
            let page = page.into_model().map_err(|error| failed(&error))?;
            let objects = page.blob_items.into_iter().filter_map(|blob| {
                let name = blob.name?;
                let name = name.strip_prefix(&self.prefix).filter(|name| is_name(name))?;
                Some(Object { name: name.to_owned(), bytes: blob.properties?.content_length? })
            });
            Ok(Page { objects: objects.collect(), next: page.next_marker.filter(|next| !next.is_empty()) })
        })
    }

    fn delete<'a>(&'a self, name: &'a str) -> Reply<'a, ()> {
        Box::pin(async move {
            check_name(name)?;
            match self.blob(name).delete(None).await.map_err(|error| failed(&error)) {
                Ok(_) | Err(StoreError::Absent) => Ok(()),
                Err(error) => Err(error),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_the_one_that_the_service_expects() {
        let signer = Signer::new("devstoreaccount1".into(), &"aHVudGVyMg==".into()).unwrap();
        let parts = signer.sign("2026-12-01T00:00:00Z");
        let text = "devstoreaccount1\nrwdlac\nb\nco\n\n2026-12-01T00:00:00Z\n\n\n2021-12-02\n\n";
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, b"hunter2");
        let wanted = azure_core::base64::encode(ring::hmac::sign(&key, text.as_bytes()));
        assert_eq!(parts[5], ("sig", wanted));
        assert!(Signer::new("a".into(), &"not base64!".into()).is_err());
    }

    #[test]
    fn a_checksum_is_written_as_the_service_writes_it() {
        // The known answers of Microsoft's own tests.
        assert_eq!(
            (checksum(b"Hello Azure!").as_str(), checksum(b"").as_str()),
            ("DtjZpL9/o8c=", "AAAAAAAAAAA=")
        );
    }

    #[test]
    fn no_key_is_shown() {
        let application =
            AzureAccess::Application { tenant: "t".into(), client: "c".into(), secret: "hunter2".into() };
        for access in [
            AzureAccess::Key("aHVudGVyMg==".into()),
            AzureAccess::Sas("?sv=1&sig=hunter2".into()),
            application,
        ] {
            let config = AzureConfig::new("account", "blocks", access);
            let shown = format!("{config:?}");
            let store = Azure::open(config).unwrap();
            for shown in [shown, store.describe(), format!("{store:?}")] {
                assert!(!shown.contains("hunter2") && !shown.contains("aHVud"), "{shown}");
            }
            assert_eq!(store.describe(), "az://account/blocks/ at account.blob.core.windows.net");
        }
        let signer = Signer::new("account".into(), &"aHVudGVyMg==".into()).unwrap();
        assert_eq!(format!("{signer:?}"), "Signer(account)");
    }

    #[test]
    fn what_cannot_be_is_invalid() {
        let base = AzureConfig::new("account", "blocks", AzureAccess::Key("aHVudGVyMg==".into()));
        for config in [
            AzureConfig { prefix: "/x".into(), ..base.clone() },
            AzureConfig { endpoint: Some("nowhere".into()), ..base.clone() },
            // A token in clear text would be anybody's.
            AzureConfig {
                endpoint: Some("http://127.0.0.1:1".into()),
                access: AzureAccess::Application {
                    tenant: "t".into(),
                    client: "c".into(),
                    secret: "s".into(),
                },
                ..base
            },
        ] {
            assert!(matches!(Azure::open(config), Err(StoreError::Invalid { .. })));
        }
    }
}
