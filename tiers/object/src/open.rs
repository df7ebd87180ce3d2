//! From a [`Place`] to the store that is there. Who asks comes from the environment, in the variables that the
//! providers' own tools read.
//!
//! | | |
//! |---|---|
//! | S3 | what the AWS tools take: `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, a profile, web identity, the container's or the instance's role |
//! | Azure | the first that is set of `AZURE_STORAGE_KEY`, `AZURE_STORAGE_SAS_TOKEN`, `AZURE_CLIENT_SECRET` (with `AZURE_TENANT_ID`, `AZURE_CLIENT_ID`), `AZURE_FEDERATED_TOKEN_FILE` (a pod's workload identity); else the machine's managed identity |

use std::sync::Arc;

use crate::dir::Dir;
use crate::place::Place;
use crate::store::{Store, StoreError};

/// Why there is no store.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory cannot be used.
    #[error("using the directory {path}")]
    Dir {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The back end does not begin with it.
    #[error("using {place}")]
    Store {
        /// Where.
        place: String,
        /// Why.
        source: StoreError,
    },
    /// The kind of store is left out of this build.
    #[error("{kind} is left out of this build: build with its feature")]
    LeftOut {
        /// `s3` or `azure`.
        kind: &'static str,
    },
}

/// The store at a place. Apart from a directory, which is made if it is not there, nobody is asked yet: what is wrong
/// with a name or a key shows with the first request.
pub async fn open(place: &Place) -> Result<Arc<dyn Store>, OpenError> {
    match place {
        Place::Dir(path) => {
            let opened = Dir::open(path);
            let wrong = |source| OpenError::Dir { path: path.display().to_string(), source };
            Ok(Arc::new(opened.map_err(wrong)?))
        }
        Place::S3 { .. } => s3(place).await,
        Place::Azure { .. } => azure(place),
    }
}

#[cfg(feature = "s3")]
async fn s3(place: &Place) -> Result<Arc<dyn Store>, OpenError> {
    use crate::s3::{S3, S3Config};

    let Place::S3 { bucket, prefix, region, endpoint, path_style } = place.clone() else {
        return Err(OpenError::LeftOut { kind: "s3" });
    };
    let config = S3Config { prefix, region, endpoint, path_style, ..S3Config::new(bucket) };
    let opened = S3::open(config).await;
    let wrong = |source| OpenError::Store { place: place.to_string(), source };
    Ok(Arc::new(opened.map_err(wrong)?))
}

#[cfg(not(feature = "s3"))]
async fn s3(_: &Place) -> Result<Arc<dyn Store>, OpenError> {
    Err(OpenError::LeftOut { kind: "s3" })
}

#[cfg(feature = "azure")]
fn azure(place: &Place) -> Result<Arc<dyn Store>, OpenError> {
    use crate::azure::{Azure, AzureConfig};

    let Place::Azure { account, container, prefix, endpoint } = place.clone() else {
        return Err(OpenError::LeftOut { kind: "azure" });
    };
    let access = azure_access(|name| std::env::var(name).ok().filter(|word| !word.is_empty()));
    let config = AzureConfig { prefix, endpoint, ..AzureConfig::new(account, container, access) };
    let wrong = |source| OpenError::Store { place: place.to_string(), source };
    Ok(Arc::new(Azure::open(config).map_err(wrong)?))
}

#[cfg(not(feature = "azure"))]
fn azure(_: &Place) -> Result<Arc<dyn Store>, OpenError> {
    Err(OpenError::LeftOut { kind: "azure" })
}

/// Who asks Azure, as an environment says.
#[cfg(feature = "azure")]
fn azure_access(word: impl Fn(&str) -> Option<String>) -> crate::azure::AzureAccess {
    use crate::azure::AzureAccess;
    use crate::secret::Secret;

    if let Some(key) = word("AZURE_STORAGE_KEY") {
        return AzureAccess::Key(Secret::from(key));
    }
    if let Some(token) = word("AZURE_STORAGE_SAS_TOKEN") {
        return AzureAccess::Sas(Secret::from(token));
    }
    let application = (word("AZURE_TENANT_ID"), word("AZURE_CLIENT_ID"), word("AZURE_CLIENT_SECRET"));
    match application {
        (Some(tenant), Some(client), Some(secret)) => {
            AzureAccess::Application { tenant, client, secret: Secret::from(secret) }
        }
        _ if word("AZURE_FEDERATED_TOKEN_FILE").is_some() => AzureAccess::Workload,
        _ => AzureAccess::Managed,
    }
}

#[cfg(all(test, feature = "azure"))]
mod tests {
    use super::*;
    use crate::azure::AzureAccess;

    #[test]
    fn the_environment_says_who_asks_azure() {
        let asks = |words: &[&str]| azure_access(|name| words.contains(&name).then(|| name.to_owned()));
        let application = ["AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"];
        assert!(matches!(asks(&["AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN"]), AzureAccess::Key(_)));
        assert!(matches!(asks(&["AZURE_STORAGE_SAS_TOKEN", "AZURE_TENANT_ID"]), AzureAccess::Sas(_)));
        assert!(matches!(asks(&application), AzureAccess::Application { .. }));
        let pod = ["AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE"];
        assert!(matches!(asks(&pod), AzureAccess::Workload));
        assert!(matches!(asks(&[]), AzureAccess::Managed));
    }
}
