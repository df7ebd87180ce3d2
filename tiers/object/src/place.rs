//! Where an object store is, in one word:
//!
//! ```text
//! /var/lib/kvd/objects                                              a directory
//! s3://bucket/prefix?region=eu-central-1                            S3
//! s3://bucket?endpoint=http://127.0.0.1:9000&path_style=true        what speaks like it
//! az://account/container/prefix                                     Azure Blob
//! az://devstoreaccount1/blocks?endpoint=http://127.0.0.1:10000/devstoreaccount1
//! ```
//! It holds no secret: who asks comes from elsewhere. A key or a password in it is refused.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::store::is_name;

/// Where an object store is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Place {
    /// A directory.
    Dir(PathBuf),
    /// A bucket.
    S3 {
        /// Its name.
        bucket: String,
        /// What names begin with; may be empty.
        prefix: String,
        /// Where it is, if that is said.
        region: Option<String>,
        /// Another server than Amazon's.
        endpoint: Option<String>,
        /// The bucket in the path instead of in the host name.
        path_style: bool,
    },
    /// A container.
    Azure {
        /// Its account.
        account: String,
        /// Its name.
        container: String,
        /// What names begin with; may be empty.
        prefix: String,
        /// Another address than the account's.
        endpoint: Option<String>,
    },
}

/// Why a text is no place. It is not repeated: there may be a key in it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlaceError {
    /// It is neither a path nor an address of a store.
    #[error("not a path, s3://BUCKET[/PREFIX] or az://ACCOUNT/CONTAINER[/PREFIX]")]
    Form,
    /// A part of it cannot be.
    #[error("its {part} cannot be")]
    Part {
        /// Which.
        part: &'static str,
    },
    /// Something behind the '?' is not known here.
    #[error("its option `{name}` is not known")]
    Option {
        /// Its name.
        name: String,
    },
}

impl FromStr for Place {
    type Err = PlaceError;

    fn from_str(text: &str) -> Result<Self, PlaceError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return if text.is_empty() { Err(PlaceError::Form) } else { Ok(Self::Dir(text.into())) };
        };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut options = Options::default();
        query.split('&').filter(|pair| !pair.is_empty()).try_for_each(|pair| options.take(scheme, pair))?;
        let Options { region, endpoint, path_style } = options;
        match scheme {
            "s3" => {
                let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
                let (bucket, prefix) = (label(bucket, "bucket")?, prefix_of(prefix)?);
                Ok(Self::S3 { bucket, prefix, region, endpoint, path_style })
            }
            "az" => {
                let (account, path) = path.split_once('/').ok_or(PlaceError::Form)?;
                let (container, prefix) = path.split_once('/').unwrap_or((path, ""));
                let (account, container) = (label(account, "account")?, label(container, "container")?);
                Ok(Self::Azure { account, container, prefix: prefix_of(prefix)?, endpoint })
            }
            _ => Err(PlaceError::Form),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = |prefix: &str| if prefix.is_empty() { String::new() } else { format!("/{prefix}") };
        let mut options = Vec::new();
        match self {
            Self::Dir(path) => return path.display().fmt(f),
            Self::S3 { bucket, prefix, region, endpoint, path_style } => {
                write!(f, "s3://{bucket}{}", slash(prefix))?;
                options.extend(region.as_ref().map(|region| format!("region={region}")));
                options.extend(endpoint.as_ref().map(|endpoint| format!("endpoint={endpoint}")));
                options.extend(path_style.then(|| "path_style=true".to_owned()));
            }
            Self::Azure { account, container, prefix, endpoint } => {
                write!(f, "az://{account}/{container}{}", slash(prefix))?;
                options.extend(endpoint.as_ref().map(|endpoint| format!("endpoint={endpoint}")));
            }
        }
        let mark = if options.is_empty() { "" } else { "?" };
        write!(f, "{mark}{}", options.join("&"))
    }
}

impl Place {
    /// A part of this place: what is there has names of its own.
    #[must_use]
    pub fn within(&self, part: &str) -> Self {
        let mut place = self.clone();
        match &mut place {
            Self::Dir(path) => path.push(part),
            Self::S3 { prefix, .. } | Self::Azure { prefix, .. } if prefix.is_empty() => {
                part.clone_into(prefix);
            }
            Self::S3 { prefix, .. } | Self::Azure { prefix, .. } => *prefix += &format!("/{part}"),
        }
        place
    }

    /// What kind of store it is: `dir`, `s3` or `azure`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Dir(_) => "dir",
            Self::S3 { .. } => "s3",
            Self::Azure { .. } => "azure",
        }
    }
}

#[derive(Default)]
struct Options {
    region: Option<String>,
    endpoint: Option<String>,
    path_style: bool,
}

impl Options {
    fn take(&mut self, scheme: &str, pair: &str) -> Result<(), PlaceError> {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        match (scheme, name, value) {
            ("s3", "region", value) => self.region = Some(label(value, "region")?),
            ("s3", "path_style", "true") => self.path_style = true,
            ("s3", "path_style", "false") => self.path_style = false,
            (_, "endpoint", value) => {
                let address = value.strip_prefix("http://").or_else(|| value.strip_prefix("https://"));
                let sound = address.is_some_and(|address| !address.is_empty() && !address.contains('@'));
                self.endpoint = Some(value).filter(|_| sound).map(str::to_owned);
                self.endpoint.as_ref().ok_or(PlaceError::Part { part: "endpoint" })?;
            }
            // Not the value.
            _ => return Err(PlaceError::Option { name: name.to_owned() }),
        }
        Ok(())
    }
}

/// A name of a host's part: what buckets, accounts, containers and regions are.
fn label(text: &str, part: &'static str) -> Result<String, PlaceError> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    let sound = (1..=63).contains(&text.len()) && text.bytes().all(inner);
    if sound { Ok(text.to_owned()) } else { Err(PlaceError::Part { part }) }
}

fn prefix_of(text: &str) -> Result<String, PlaceError> {
    let text = text.strip_suffix('/').unwrap_or(text);
    if text.is_empty() || is_name(text) {
        Ok(text.to_owned())
    } else {
        Err(PlaceError::Part { part: "prefix" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_written_as_it_is_read_and_has_parts() {
        for text in [
            "/var/lib/objects",
            "s3://bucket",
            "s3://bucket/some/where?region=eu-central-1&endpoint=http://127.0.0.1:9000&path_style=true",
            "az://account/blocks/x?endpoint=http://127.0.0.1:10000/account",
        ] {
            let place: Place = text.parse().unwrap();
            assert_eq!(place.to_string(), text);
            let part = place.within("principals/a");
            assert_eq!(part.to_string().parse(), Ok(part.clone()));
            assert!(part.to_string().contains("/principals/a"), "{part}");
        }
    }

    #[test]
    fn every_kind_of_place_is_read() {
        assert_eq!("/var/lib/x y".parse(), Ok(Place::Dir("/var/lib/x y".into())));
        assert_eq!("objects".parse(), Ok(Place::Dir("objects".into())));
        let text =
            "s3://bucket/some/where/?endpoint=http://127.0.0.1:9000&path_style=true&region=eu-central-1";
        let wanted = Place::S3 {
            bucket: "bucket".into(),
            prefix: "some/where".into(),
            region: Some("eu-central-1".into()),
            endpoint: Some("http://127.0.0.1:9000".into()),
            path_style: true,
        };
        assert_eq!(text.parse(), Ok(wanted));
        let text = "az://devstoreaccount1/blocks?endpoint=http://127.0.0.1:10000/devstoreaccount1";
        let wanted = Place::Azure {
            account: "devstoreaccount1".into(),
            container: "blocks".into(),
            prefix: String::new(),
            endpoint: Some("http://127.0.0.1:10000/devstoreaccount1".into()),
        };
        assert_eq!(text.parse(), Ok(wanted));
    }

    #[test]
    fn what_is_no_place_is_refused_without_repeating_it() {
        for text in [
            "",
            "gs://bucket",
            "s3://",
            "s3://Bucket",
            "s3://KEY:hunter2@bucket",
            "s3://bucket/../up",
            "az://account",
            "az://account/",
            "az://account/blocks?region=eu",
            "s3://bucket?secret_key=hunter2",
            "s3://bucket?path_style=hunter2",
            "s3://bucket?endpoint=hunter2",
            "s3://bucket?endpoint=http://user:hunter2@host",
        ] {
            let error = text.parse::<Place>().unwrap_err();
            assert!(!format!("{error:?} {error}").contains("hunter2"), "{text}: {error}");
        }
    }
}
