//! S3 and what speaks like it, by `aws-sdk-s3`.
//!
//! - **If absent** is `If-None-Match: *`, on the write itself or on the end of one in parts.
//! - **Checksum**: every body goes up with its CRC-64/NVME, computed here before the SDK sees it, and the store keeps
//!   it. Coming down, a range has no checksum of its own; each block in it does, and that is compared anyway, so the
//!   SDK compares nothing (some servers answer a range with the checksum of the whole).
//! - **In parts** only where it pays: above [`S3Config::parts_above_bytes`] parts go up side by side, at the price of
//!   two requests more and one for each. A write that is given up in the middle leaves parts behind that cost money
//!   and are nowhere listed: give the bucket a lifecycle rule that aborts incomplete uploads after a day.
//! - The SDK's own retries are off: see [`crate::requests`]. TLS is rustls on ring, with the system's certificates.

use std::fmt;
use std::time::Duration;

use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, ResponseChecksumValidation, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart};
use aws_smithy_http_client::tls;
use bytes::Bytes;
use kv_block::{BlockKey, Checksum};

use crate::join::join_all;
use crate::landing::Landing;
use crate::secret::Secret;
use crate::store::{
    Object, PAGE_MAX, Page, Reply, Store, StoreError, check_name, check_prefix, check_range, is_name,
};

/// Keys that do not come from the environment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct S3Keys {
    /// Access key id.
    pub id: String,
    /// Secret access key.
    pub secret: Secret,
    /// Session token of temporary keys.
    pub token: Option<Secret>,
}

/// Where a bucket is and who may use it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct S3Config {
    /// Name of the bucket.
    pub bucket: String,
    /// What all names begin with in the bucket, without a '/' at its end; may be empty.
    pub prefix: String,
    /// `None`: as the environment says, or `us-east-1` where there is an endpoint.
    pub region: Option<String>,
    /// Another server than Amazon's, as `http://host:port`.
    pub endpoint: Option<String>,
    /// The bucket in the path instead of in the host name, as most other servers want it.
    pub path_style: bool,
    /// `None`: the default chain (environment, profile, web identity, container, instance).
    pub keys: Option<S3Keys>,
    /// Longer bodies go up in parts, in bytes.
    pub parts_above_bytes: usize,
    /// Length of a part in bytes; 5 MiB at least.
    pub part_bytes: usize,
}

impl S3Config {
    /// A bucket at Amazon with everything from the environment; parts of 16 MiB above 64 MiB.
    pub fn new(bucket: impl Into<String>) -> Self {
        Self {
            bucket: bucket.into(),
            prefix: String::new(),
            region: None,
            endpoint: None,
            path_style: false,
            keys: None,
            parts_above_bytes: 64 << 20,
            part_bytes: 16 << 20,
        }
    }
}

const PART_BYTES_MIN: usize = 5 << 20;
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// A bucket, or the part of it under a prefix.
pub struct S3 {
    client: aws_sdk_s3::Client,
    bucket: String,
    /// Empty, or with a '/' at its end.
    prefix: String,
    parts_above_bytes: usize,
    part_bytes: usize,
    place: String,
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)
    }
}

impl S3 {
    /// The store that `config` describes. Asks nobody but, where the configuration leaves it open, the environment
    /// about region and credentials.
    pub async fn open(config: S3Config) -> Result<Self, StoreError> {
        if !(config.prefix.is_empty() || is_name(&config.prefix)) {
            return Err(StoreError::invalid(format_args!("`{}` is no prefix", config.prefix)));
        }
        let http = aws_smithy_http_client::Builder::new()
            .tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring))
            .build_https();
        let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT_MAX).build();
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .http_client(http)
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts)
            // An attempt has its own limit, and a body that trickles is cut there.
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
        let region = config.region.or_else(|| config.endpoint.as_ref().map(|_| "us-east-1".to_owned()));
        if let Some(region) = region {
            loader = loader.region(Region::new(region));
        }
        if let Some(S3Keys { id, secret, token }) = config.keys {
            let token = token.map(|token| token.expose().to_owned());
            loader = loader.credentials_provider(Credentials::new(id, secret.expose(), token, None, "kvd"));
        }
        let shared = loader.load().await;
        let mut builder = aws_sdk_s3::config::Builder::from(&shared)
            .force_path_style(config.path_style)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        let mut place = format!("s3://{}/{}", config.bucket, config.prefix);
        if let Some(endpoint) = config.endpoint {
            place += &format!(" at {}", without_user(&endpoint));
            builder = builder.endpoint_url(endpoint);
        }
        Ok(Self {
            client: aws_sdk_s3::Client::from_conf(builder.build()),
            bucket: config.bucket,
            prefix: if config.prefix.is_empty() { String::new() } else { config.prefix + "/" },
            parts_above_bytes: config.parts_above_bytes,
            part_bytes: config.part_bytes.max(PART_BYTES_MIN),
            place,
        })
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    async fn put_whole(&self, name: &str, body: Bytes) -> Result<(), StoreError> {
        let put = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(self.key(name))
            .if_none_match("*")
            .checksum_algorithm(ChecksumAlgorithm::Crc64Nvme)
            .checksum_crc64_nvme(checksum(&body))
            .content_length(body.len() as i64)
            .body(ByteStream::from(body));
        put.send().await.map(drop).map_err(failed)
    }

    async fn put_parts(&self, name: &str, body: Bytes) -> Result<(), StoreError> {
        // Most often that is what a write of so much ends with; cheaper to hear it first.
        match self.head(name).await {
            Err(StoreError::Absent) => {}
            Ok(_) => return Err(StoreError::Exists),
            Err(error) => return Err(error),
        }
        let key = self.key(name);
        let begun = self
            .client
            .create_multipart_upload()
            .bucket(&self.bucket)
            .key(&key)
            .checksum_algorithm(ChecksumAlgorithm::Crc64Nvme)
            .checksum_type(ChecksumType::FullObject)
            .send()
            .await
            .map_err(failed)?;
        let upload = begun.upload_id().ok_or_else(|| StoreError::broken("an upload without an id"))?;
        let result = self.send_parts(&key, upload, &body).await;
        if result.is_err() {
            let abort = self.client.abort_multipart_upload().bucket(&self.bucket).key(&key).upload_id(upload);
            let _ = abort.send().await;
        }
        result
    }

    async fn send_parts(&self, key: &str, upload: &str, body: &Bytes) -> Result<(), StoreError> {
        let starts = (0..body.len()).step_by(self.part_bytes);
        let parts = starts.zip(1..).map(|(from, number)| async move {
            let part = body.slice(from..body.len().min(from + self.part_bytes));
            let sum = checksum(&part);
            let sent = self
                .client
                .upload_part()
                .bucket(&self.bucket)
                .key(key)
                .upload_id(upload)
                .part_number(number)
                .checksum_algorithm(ChecksumAlgorithm::Crc64Nvme)
                .checksum_crc64_nvme(&sum)
                .content_length(part.len() as i64)
                .body(ByteStream::from(part))
                .send()
                .await
                .map_err(failed)?;
            let tag = sent.e_tag().map(str::to_owned);
            let part = CompletedPart::builder().part_number(number).set_e_tag(tag).checksum_crc64_nvme(sum);
            Ok(part.build())
        });
        let parts: Result<Vec<_>, StoreError> = join_all(parts.collect()).await.into_iter().collect();
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts?)).build();
        self.client
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(key)
            .upload_id(upload)
            .if_none_match("*")
            .checksum_crc64_nvme(checksum(body))
            .checksum_type(ChecksumType::FullObject)
            .mpu_object_size(body.len() as i64)
            .multipart_upload(parts)
            .send()
            .await
            .map(drop)
            .map_err(failed)
    }
}

/// CRC-64/NVME as S3 writes it: eight bytes, the highest first, in base64.
fn checksum(body: &[u8]) -> String {
    let key = BlockKey::default();
    let content = Checksum::of(&key, body).content(&key);
    base64(&content.to_be_bytes())
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let word =
            group.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for at in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * at)) as usize & 63];
            text.push(if at <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// An endpoint without what may be a password in it.
fn without_user(endpoint: &str) -> String {
    match (endpoint.split_once("://"), endpoint.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://{host}"),
        _ => endpoint.to_owned(),
    }
}

/// Whether nothing was sent because nobody could say who asks. The SDK tells that from other failures by words alone.
fn is_about_credentials(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut chain = std::iter::successors(Some(error), |error| error.source());
    chain.any(|error| error.to_string().to_lowercase().contains("credential"))
}

/// What an answer says without its words: those may repeat the request, with the signature in it.
#[expect(clippy::needless_pass_by_value, reason = "a function to map an error with")]
fn failed<E: ProvideErrorMetadata>(error: SdkError<E>) -> StoreError {
    let said = match &error {
        SdkError::TimeoutError(_) => return StoreError::Timeout,
        SdkError::ConstructionFailure(_) => return StoreError::invalid("the request could not be made"),
        SdkError::DispatchFailure(failure) if failure.is_timeout() => return StoreError::Timeout,
        SdkError::DispatchFailure(failure) => {
            let error = failure.as_connector_error();
            return match error.is_some_and(|error| is_about_credentials(error)) {
                true => StoreError::Refused { why: "no credentials".to_owned() },
                false => StoreError::broken("the connection failed"),
            };
        }
        SdkError::ResponseError(_) => return StoreError::broken("an answer that makes no sense"),
        SdkError::ServiceError(said) => said,
        _ => return StoreError::broken("an error that is not known"),
    };
    let status = said.raw().status().as_u16();
    let code = said.err().code().unwrap_or_default();
    let header = |name| said.raw().headers().get(name);
    match (status, code) {
        (_, "NoSuchBucket" | "InvalidBucketName") => StoreError::invalid("there is no such bucket"),
        (404, _) => StoreError::Absent,
        (412, _) => StoreError::Exists,
        (416, _) => {
            let bytes = header("content-range").and_then(|range| range.rsplit('/').next()?.parse().ok());
            StoreError::Short { bytes: bytes.unwrap_or(0), wanted: 0 }
        }
        (429 | 503, _) | (_, "SlowDown" | "Throttling" | "ThrottlingException" | "RequestLimitExceeded") => {
            let seconds = header("retry-after").and_then(|seconds| seconds.parse().ok());
            StoreError::Throttled { retry_after: seconds.map(Duration::from_secs) }
        }
        (408, _) | (_, "RequestTimeout") => StoreError::Timeout,
        (401 | 403, _) | (_, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired") => {
            StoreError::Refused { why: format!("{status} {code}") }
        }
        // Two writes met, or a body was damaged on its way.
        (409, _) | (_, "BadDigest" | "XAmzContentChecksumMismatch" | "IncompleteBody" | "NoSuchUpload") => {
            StoreError::broken(format_args!("{status} {code}"))
        }
        (500.., _) => StoreError::broken(format_args!("{status} {code}")),
        _ => StoreError::invalid(format_args!("{status} {code}")),
    }
}

impl Store for S3 {
    fn describe(&self) -> String {
        self.place.clone()
    }

    fn put<'a>(&'a self, name: &'a str, body: Bytes) -> Reply<'a, ()> {
        Box::pin(async move {
            check_name(name)?;
            if body.len() > self.parts_above_bytes {
                self.put_parts(name, body).await
            } else {
                self.put_whole(name, body).await
            }
        })
    }

    fn get<'a>(&'a self, name: &'a str, from: u64, landing: &'a mut Landing<'_>) -> Reply<'a, ()> {
        Box::pin(async move {
            check_name(name)?;
            if landing.is_empty() {
                return Ok(());
            }
            let end = from + landing.len();
            let get = self.client.get_object().bucket(&self.bucket).key(self.key(name));
            let got = get.range(format!("bytes={from}-{}", end - 1)).send().await;
            let got = got.map_err(|error| match failed(error) {
                StoreError::Short { bytes, .. } => StoreError::Short { bytes, wanted: end },
                error => error,
            })?;
            check_range(got.content_range(), from, end)?;
            let mut body = got.body;
            while let Some(chunk) =
                body.try_next().await.map_err(|_| StoreError::broken("the body ended early"))?
            {
                landing.push(&chunk).map_err(StoreError::broken)?;
            }
            if landing.is_full() { Ok(()) } else { Err(StoreError::broken("the body ended early")) }
        })
    }

    fn head<'a>(&'a self, name: &'a str) -> Reply<'a, u64> {
        Box::pin(async move {
            check_name(name)?;
            let head = self.client.head_object().bucket(&self.bucket).key(self.key(name));
            let head = head.send().await.map_err(failed)?;
            let bytes = head.content_length().and_then(|bytes| u64::try_from(bytes).ok());
            bytes.ok_or_else(|| StoreError::broken("an object without a length"))
        })
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> Reply<'a, Page> {
        Box::pin(async move {
            check_prefix(prefix)?;
            let list = self
                .client
                .list_objects_v2()
                .bucket(&self.bucket)
                .prefix(self.key(prefix))
                .max_keys(limit.clamp(1, PAGE_MAX) as i32)
                .set_continuation_token(after.map(str::to_owned));
            let page = list.send().await.map_err(failed)?;
            let objects = page.contents().iter().filter_map(|object| {
                let name = object.key()?.strip_prefix(&self.prefix).filter(|name| is_name(name))?;
                Some(Object { name: name.to_owned(), bytes: u64::try_from(object.size()?).ok()? })
            });
            let objects = objects.collect();
            let next = page.next_continuation_token().filter(|_| page.is_truncated() == Some(true));
            Ok(Page { objects, next: next.map(str::to_owned) })
        })
    }

    fn delete<'a>(&'a self, name: &'a str) -> Reply<'a, ()> {
        Box::pin(async move {
            check_name(name)?;
            let delete = self.client.delete_object().bucket(&self.bucket).key(self.key(name));
            match delete.send().await.map_err(failed) {
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
    fn a_checksum_is_written_as_s3_writes_it() {
        // The catalogue's check value of CRC-64/NVME: ae8b14860a799888.
        assert_eq!(checksum(b"123456789"), "rosUhgp5mIg=");
    }

    #[tokio::test]
    async fn no_key_is_shown() {
        let keys = S3Keys { id: "AKID".into(), secret: "hunter2".into(), token: Some("hunter3".into()) };
        let endpoint = Some("http://user:hunter4@127.0.0.1:1".to_owned());
        let config = S3Config { keys: Some(keys), endpoint, ..S3Config::new("bucket") };
        let shown = format!("{:?}", config.keys);
        let store = S3::open(config).await.unwrap();
        let error = store.head("a").await.unwrap_err();
        for shown in [shown, store.describe(), format!("{store:?}"), format!("{error:?} {error}")] {
            assert!(!shown.contains("hunter"), "{shown}");
        }
        assert_eq!(store.describe(), "s3://bucket/ at http://127.0.0.1:1");
    }
}
