//! gRPC over TCP: mutual TLS works, and nothing listens beyond this machine without it.

mod support;

use kv_client::{Client, ClientOptions, Endpoint, Tls};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use std::path::Path;
use std::process::Command;
use support::Home;

/// A CA, and certificates of a node and a client that it signed; a stranger's CA signs another client.
fn make_certificates(dir: &Path) {
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    for (ca_name, leaves) in [("ca", &["node", "client"][..]), ("stranger", &["intruder"][..])] {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        write(&format!("{ca_name}.pem"), ca.self_signed(&ca_key).unwrap().pem());
        let issuer = Issuer::new(ca, ca_key);
        for leaf in leaves {
            let key = KeyPair::generate().unwrap();
            let mut params =
                CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            write(&format!("{leaf}.pem"), params.signed_by(&key, &issuer).unwrap().pem());
            write(&format!("{leaf}.key"), key.serialize_pem());
        }
    }
}

#[test]
fn callers_over_tcp_must_show_a_certificate_of_our_ca() {
    let certificates = tempfile::tempdir().unwrap();
    let dir = certificates.path();
    make_certificates(dir);
    let path = |name: &str| dir.join(name).display().to_string();
    let home = Home::new("tls")
        .set("listen.tcp=127.0.0.1:0")
        .set(&format!("listen.tls.cert={}", path("node.pem")))
        .set(&format!("listen.tls.key={}", path("node.key")))
        .set(&format!("listen.tls.client_ca={}", path("ca.pem")));
    let _daemon = home.start();
    let address = &home.logged_address("gRPC over TCP");
    let describe = |identity: Option<&str>, scheme: &str| {
        let identity =
            identity.map(|name| (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key"))));
        let tls = (scheme == "https").then(|| Tls {
            ca: dir.join("ca.pem"),
            identity,
            name: Some("localhost".into()),
        });
        let endpoint = Endpoint::Uri { uri: format!("{scheme}://{address}"), tls };
        let options = ClientOptions { endpoint, ..ClientOptions::default() };
        Client::connect(options).wait().and_then(|client| client.describe().wait())
    };
    describe(Some("client"), "https").expect("our client");
    assert!(describe(Some("intruder"), "https").is_err(), "signed by somebody else");
    assert!(describe(None, "https").is_err(), "no certificate");
    assert!(describe(None, "http").is_err(), "no TLS at all");
}

#[test]
fn a_listener_beyond_this_machine_needs_mutual_tls_or_the_word() {
    let refused = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_kvd")).args(["--check"]).args(args).output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (code, words) = refused(&["--set", "listen.tcp=0.0.0.0:7000"]);
    assert_eq!(code, Some(78));
    assert!(words.contains("listen.tcp") && words.contains("listen.tls"), "{words}");
    assert_eq!(refused(&["--set", "listen.tcp=0.0.0.0:7000", "--insecure"]).0, Some(0));
    assert_eq!(refused(&["--set", "listen.tcp=127.0.0.1:7000"]).0, Some(0));
}

#[test]
fn certificates_that_are_not_there_are_a_mistake_in_the_configuration() {
    let certificates = tempfile::tempdir().unwrap();
    let dir = certificates.path();
    make_certificates(dir);
    let path = |name: &str| dir.join(name).display().to_string();
    let mut home = Home::new("tls-missing").set("listen.tcp=127.0.0.1:0");
    for (key, file) in [("cert", "node.pem"), ("key", "node.key"), ("client_ca", "nowhere.pem")] {
        home = home.set(&format!("listen.tls.{key}={}", path(file)));
    }
    let wanted =
        format!("--set listen.tls.client_ca: listen.tls.client_ca: cannot read {}", path("nowhere.pem"));
    let check = Command::new(env!("CARGO_BIN_EXE_kvd")).arg("--check").args(&home.args).output().unwrap();
    let words = String::from_utf8_lossy(&check.stderr);
    assert!(check.status.code() == Some(78) && words.starts_with(&wanted), "{words}");
    assert!(words.contains("No such file"), "{words}");
    assert_eq!(home.start_and_fail().code(), Some(78));
    assert!(home.log().contains(&wanted), "{}", home.log());
    std::fs::copy(path("ca.pem"), path("nowhere.pem")).unwrap();
    let check = Command::new(env!("CARGO_BIN_EXE_kvd")).arg("--check").args(&home.args).output().unwrap();
    assert!(check.status.success() && dir.join("node.key").exists());
}
