//! Certificates of the TCP listener. They are read and tried before the listener opens, so that a wrong file
//! is named at start rather than met as a failed handshake.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{InconsistentKeys, RootCertStore};
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

use crate::config::Tls;

/// Why the certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{key}: cannot read {}", path.display())]
    Read {
        /// The key that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A file holds something else.
    #[error("{key}: {} {why}", path.display())]
    Content {
        /// The key that names it.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Key and certificate are not a pair.
    #[error("listen.tls: the key in {} does not belong to the certificate in {}", key.display(), cert.display())]
    Mismatch {
        /// File of the key.
        key: PathBuf,
        /// File of the certificate.
        cert: PathBuf,
    },
}

impl TlsError {
    /// The key of the configuration that is to be mended.
    pub fn key(&self) -> &'static str {
        match self {
            Self::Read { key, .. } | Self::Content { key, .. } => key,
            Self::Mismatch { .. } => "listen.tls.key",
        }
    }
}

/// Reads and tries the certificates; nothing where none are set.
pub fn load(tls: &Tls) -> Result<Option<ServerTlsConfig>, TlsError> {
    let (Some(cert), Some(key)) = (tls.cert.get(), tls.key.get()) else { return Ok(None) };
    let (cert, key) = (&*cert.0, &*key.0);
    let provider = Arc::new(rustls::crypto::ring::default_provider());

    let cert_pem = read("listen.tls.cert", cert)?;
    let chain = certificates("listen.tls.cert", cert, &cert_pem)?;
    let key_pem = read("listen.tls.key", key)?;
    let key_der = PrivateKeyDer::from_pem_slice(&key_pem)
        .map_err(|error| content("listen.tls.key", key, format!("holds no private key in PEM ({error})")))?;
    match rustls::sign::CertifiedKey::from_der(chain, key_der, &provider) {
        Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            return Err(TlsError::Mismatch { key: key.to_owned(), cert: cert.to_owned() });
        }
        Err(error) => return Err(content("listen.tls.key", key, format!("cannot be used: {error}"))),
        Ok(_) => {}
    }
    let mut config = ServerTlsConfig::new().identity(Identity::from_pem(cert_pem, key_pem));

    if let Some(ca) = tls.client_ca.get() {
        let ca = &*ca.0;
        let pem = read("listen.tls.client_ca", ca)?;
        let refuse = |error: &dyn std::fmt::Display| {
            content("listen.tls.client_ca", ca, format!("holds a certificate that cannot be used: {error}"))
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates("listen.tls.client_ca", ca, &pem)? {
            roots.add(certificate).map_err(|error| refuse(&error))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        verifier.build().map_err(|error| refuse(&error))?;
        config = config.client_ca_root(Certificate::from_pem(pem));
    }
    Ok(Some(config))
}

fn content(key: &'static str, path: &Path, why: String) -> TlsError {
    TlsError::Content { key, path: path.to_owned(), why }
}

fn read(key: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { key, path: path.to_owned(), source })
}

fn certificates(
    key: &'static str,
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(content(key, path, "holds no certificate in PEM".into())),
        Ok(found) => Ok(found),
        Err(error) => Err(content(key, path, format!("is damaged: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::units::{FilePath, OrOff};

    struct Files(tempfile::TempDir);

    impl Files {
        fn put(&self, name: &str, text: &str) -> OrOff<FilePath> {
            let path = self.0.path().join(name);
            std::fs::write(&path, text).unwrap();
            OrOff::Set(FilePath(path))
        }
    }

    #[test]
    fn wrong_files_are_named() {
        let files = Files(tempfile::tempdir().unwrap());
        let node = rcgen::generate_simple_self_signed(["node".to_owned()]).unwrap();
        let other = rcgen::generate_simple_self_signed(["other".to_owned()]).unwrap();
        let cert = files.put("cert.pem", &node.cert.pem());
        let key = files.put("key.pem", &node.signing_key.serialize_pem());
        let other_key = files.put("other.pem", &other.signing_key.serialize_pem());
        let empty = files.put("empty.pem", "");
        let torn = files.put("torn.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n");
        let junk = files.put("junk.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
        let none = OrOff::Set(FilePath(files.0.path().join("none.pem")));
        let off = || OrOff::Off;

        let rows = [
            (off(), off(), off(), Ok(false)),
            (cert.clone(), key.clone(), off(), Ok(true)),
            (cert.clone(), key.clone(), cert.clone(), Ok(true)),
            (cert.clone(), other_key, off(), Err("does not belong to the certificate")),
            (none.clone(), key.clone(), off(), Err("listen.tls.cert: cannot read")),
            (empty.clone(), key.clone(), off(), Err("empty.pem holds no certificate")),
            (torn.clone(), key.clone(), off(), Err("torn.pem is damaged")),
            (cert.clone(), empty.clone(), off(), Err("empty.pem holds no private key")),
            (cert.clone(), cert.clone(), off(), Err("cert.pem holds no private key")),
            (cert.clone(), key.clone(), empty, Err("listen.tls.client_ca:")),
            (cert.clone(), key.clone(), junk, Err("junk.pem holds a certificate that cannot be used")),
            (cert, key, none, Err("listen.tls.client_ca: cannot read")),
        ];
        for (cert, key, client_ca, wanted) in rows {
            let found = load(&Tls { cert, key, client_ca });
            match (found, wanted) {
                (Ok(found), Ok(some)) => assert_eq!(found.is_some(), some),
                (Err(error), Err(part)) => {
                    assert!(error.to_string().contains(part), "{error}, wanted {part}");
                }
                (found, wanted) => panic!("{:?}, wanted {wanted:?}", found.map(|tls| tls.is_some())),
            }
        }
    }
}
