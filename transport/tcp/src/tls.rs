//! Certificates, and whose name the other end carries.
//!
//! Both ends show a certificate of the same authority. The reader takes only an owner whose certificate carries the
//! name that the peer has in its configuration; the owner learns which names the reader's certificate carries and
//! compares them with what its Hello says. TLS 1.3 alone, and no resumption: every connection is proven by itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::ring::cipher_suite::{
    TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, ServerConfig};

/// What both sides name as their protocol, so that no other service of a node that has the same certificate can be
/// taken for this one.
pub(crate) const PROTOCOL: &[u8] = b"kvd-peer/1";

/// How connections are protected.
#[derive(Clone, Debug)]
pub enum Security {
    /// Certificates on both sides.
    Mutual(Tls),
    /// None: for a network where every host is trusted. Every name is believed.
    Plain,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A file holds something else.
    #[error("{} {why}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Key and certificate are not a pair.
    #[error("the key in {} does not belong to the certificate in {}", key.display(), cert.display())]
    Mismatch {
        /// File of the key.
        key: PathBuf,
        /// File of the certificate.
        cert: PathBuf,
    },
}

impl TlsError {
    /// The file that is to be mended.
    pub fn path(&self) -> &Path {
        match self {
            Self::Read { path, .. } | Self::Content { path, .. } => path,
            Self::Mismatch { key, .. } => key,
        }
    }
}

/// A node's certificate and key, and the authority that it believes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tls {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
}

impl Tls {
    /// Reads and tries the PEM files: the node's chain, its key, and the authorities that peers are signed by.
    pub fn load(cert: &Path, key: &Path, ca: &Path) -> Result<Self, TlsError> {
        let provider = Arc::new(provider());
        let chain = certificates(cert)?;
        let der = PrivateKeyDer::from_pem_slice(&read(key)?)
            .map_err(|error| content(key, format!("holds no private key in PEM ({error})")))?;
        let pair = match CertifiedKey::from_der(chain, der, &provider) {
            Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
                return Err(TlsError::Mismatch { key: key.to_owned(), cert: cert.to_owned() });
            }
            pair => pair.map_err(|error| content(key, format!("cannot be used: {error}")))?,
        };
        let pair = Arc::new(SingleCertAndKey::from(pair));

        let refuse = |error: &dyn std::fmt::Display| {
            content(ca, format!("holds a certificate that cannot be used: {error}"))
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates(ca)? {
            roots.add(certificate).map_err(|error| refuse(&error))?;
        }
        let roots = Arc::new(roots);
        let readers = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
        let readers = readers.build().map_err(|error| refuse(&error))?;

        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| content(cert, format!("cannot be used: {error}")))?
            .with_root_certificates(roots)
            .with_client_cert_resolver(Arc::clone(&pair) as _);
        client.resumption = Resumption::disabled();
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| content(cert, format!("cannot be used: {error}")))?
            .with_client_cert_verifier(readers)
            .with_cert_resolver(pair);
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }
}

/// Whose name the other end of a connection carries.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerIdentity {
    /// None for a plain connection.
    certificate: Option<CertificateDer<'static>>,
}

impl PeerIdentity {
    /// Of a plain connection.
    pub(crate) fn plain() -> Self {
        Self { certificate: None }
    }

    /// Of a handshake that was verified.
    pub(crate) fn proven(chain: Option<&[CertificateDer<'static>]>) -> Self {
        // Without a certificate no handshake ends well here; an empty one carries no name at all.
        let first = chain.and_then(|chain| chain.first().cloned());
        Self { certificate: Some(first.unwrap_or_else(|| Vec::new().into())) }
    }

    /// Whether the other end may call itself so: its certificate is valid for the name. Every name is, on a plain
    /// connection; whoever configured it said so.
    pub fn carries(&self, name: &str) -> bool {
        let Some(certificate) = &self.certificate else { return true };
        let Ok(name) = ServerName::try_from(name) else { return false };
        ParsedCertificate::try_from(certificate)
            .is_ok_and(|certificate| verify_server_name(&certificate, &name).is_ok())
    }

    /// Whether that was proven by a certificate.
    pub fn is_proven(&self) -> bool {
        self.certificate.is_some()
    }
}

/// What ring can do, AES with the short key first: it is as safe here, and a third faster.
fn provider() -> CryptoProvider {
    let all = ring::default_provider();
    CryptoProvider {
        cipher_suites: vec![
            TLS13_AES_128_GCM_SHA256,
            TLS13_AES_256_GCM_SHA384,
            TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..all
    }
}

fn content(path: &Path, why: String) -> TlsError {
    TlsError::Content { path: path.to_owned(), why }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    std::fs::read(path).map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    match found {
        Ok(found) if found.is_empty() => Err(content(path, "holds no certificate in PEM".into())),
        Ok(found) => Ok(found),
        Err(error) => Err(content(path, format!("is damaged: {error}"))),
    }
}
