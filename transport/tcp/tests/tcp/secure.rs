//! Certificates.

use kv_tcp::{End, Error, Limits, Security, Tls};
use kv_wire::message::{Ask, DataAnswer, DataAsk};

use crate::support::{Authority, Bare, Nodes, SESSION, block_on, hello, patient};

/// What becomes of a control connection, seen from the reader: whether the owner got it.
fn tries(owner: Security, reader: Security, node: &str) -> Result<(), String> {
    let mut nodes =
        Nodes::new(owner, reader, Limits { handshake: std::time::Duration::from_secs(5), ..patient() });
    let address = nodes.address().to_string();
    block_on(&nodes.runtime, async {
        let control = nodes.dialer.control(&address, node).await.map_err(|error| match error {
            Error::Tls { source, .. } => source.to_string(),
            other => other.to_string(),
        })?;
        let (mut says, mut hears) = control.split();
        // The owner's verdict about a certificate of ours comes with what we hear next.
        let _ = says.say(&[Ask::Hello(hello())]).await;
        tokio::select! {
            end = hears.hear() => Err(match end.unwrap_err() {
                End::Io(error) => error.to_string(),
                other => other.to_string(),
            }),
            come = nodes.accepted.recv() => come.map(|_| ()).ok_or_else(|| "no listener".into()),
        }
    })
}

#[test]
fn certificates_that_do_not_fit_are_refused() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let (owner, reader) = (ours.node("owner"), ours.node("reader"));
    assert_eq!(tries(owner.clone(), reader.clone(), "owner"), Ok(()));
    let wrong_name = tries(owner.clone(), reader.clone(), "another").unwrap_err();
    assert!(wrong_name.contains("not valid for name"), "{wrong_name}");

    let stranger = theirs.node("reader");
    let unknown = tries(owner.clone(), stranger.clone(), "owner").unwrap_err();
    assert!(unknown.contains("UnknownIssuer"), "{unknown}");
    // A reader that would believe the owner, with a certificate of another authority.
    theirs.sign("guest", &["reader"], |_| {});
    let guest = theirs.load("guest", &ours.path("ca.pem"));
    let refused = tries(owner.clone(), guest, "owner").unwrap_err();
    assert!(
        refused.contains("certificate") || refused.contains("reset") || refused.contains("CA"),
        "{refused}"
    );
    let unknown = tries(stranger, reader.clone(), "reader").unwrap_err();
    assert!(unknown.contains("UnknownIssuer"), "{unknown}");

    ours.sign("old", &["owner", "reader"], |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    });
    let old = ours.load("old", &ours.path("ca.pem"));
    let expired = tries(old.clone(), reader.clone(), "owner").unwrap_err();
    assert!(expired.contains("xpired"), "{expired}");
    let expired = tries(owner.clone(), old, "owner").unwrap_err();
    assert!(expired.contains("xpired") || expired.contains("reset"), "{expired}");

    assert!(tries(owner, Security::Plain, "owner").is_err(), "plain to one that wants certificates");
    assert!(tries(Security::Plain, reader, "owner").is_err(), "certificates to one that has none");
}

#[test]
fn a_name_is_carried_or_not() {
    let authority = Authority::new("ours");
    authority.sign("many", &["reader", "gpu-07.rack.example"], |_| {});
    let many = authority.load("many", &authority.path("ca.pem"));
    let mut nodes = Nodes::new(authority.node("owner"), many, patient());
    let (_says, _hears, come) = nodes.control();
    let identity = come.control.identity();
    assert!(identity.is_proven());
    for (name, carried) in [
        ("reader", true),
        ("gpu-07.rack.example", true),
        ("gpu-08.rack.example", false),
        ("", false),
        ("a b", false),
    ] {
        assert_eq!(identity.carries(name), carried, "{name}");
    }
    let mut plain = Nodes::plain(patient());
    let (_says, _hears, come) = plain.control();
    assert!(come.control.identity().carries("anybody") && !come.control.identity().is_proven());
}

#[test]
fn a_session_is_joined_only_by_its_own_reader() {
    let authority = Authority::new("ours");
    let nodes = Nodes::new(authority.node("owner"), authority.node("thief"), patient());
    let _owner = nodes.owner_link();
    let mut thief = nodes.reader_link();
    let why = thief.broken().to_string();
    assert!(why.contains("no such session"), "{why}");
    // Nor by somebody without a certificate.
    let mut bare = Bare::dial(nodes.address());
    bare.say(&DataAsk::Join(SESSION));
    bare.assert_closed();
    let plain = Nodes::plain(patient());
    let _owner = plain.owner_link();
    let mut bare = Bare::dial(plain.address());
    bare.say(&DataAsk::Join(SESSION));
    assert_eq!(bare.hear::<DataAnswer>(), DataAnswer::Joined);
}

#[test]
fn wrong_files_are_named() {
    let authority = Authority::new("ours");
    authority.sign("node", &["node"], |_| {});
    authority.sign("other", &["other"], |_| {});
    let put = |name: &str, text: &str| std::fs::write(authority.path(name), text).unwrap();
    put("empty.pem", "");
    put("torn.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n");
    put("junk.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let rows = [
        ("node.pem", "node.key", "ca.pem", None),
        ("node.pem", "other.key", "ca.pem", Some("does not belong to the certificate")),
        ("none.pem", "node.key", "ca.pem", Some("cannot read")),
        ("empty.pem", "node.key", "ca.pem", Some("empty.pem holds no certificate")),
        ("torn.pem", "node.key", "ca.pem", Some("torn.pem is damaged")),
        ("node.pem", "empty.pem", "ca.pem", Some("empty.pem holds no private key")),
        ("node.pem", "node.pem", "ca.pem", Some("node.pem holds no private key")),
        ("node.pem", "node.key", "empty.pem", Some("empty.pem holds no certificate")),
        ("node.pem", "node.key", "junk.pem", Some("junk.pem holds a certificate that cannot be used")),
        ("node.pem", "node.key", "none.pem", Some("cannot read")),
    ];
    for (cert, key, ca, wanted) in rows {
        let [cert, key, ca] = [cert, key, ca].map(|name| authority.path(name));
        match (Tls::load(&cert, &key, &ca), wanted) {
            (Ok(_), None) => {}
            (Err(error), Some(part)) => {
                assert!(error.to_string().contains(part), "{error}, wanted {part}");
                assert!(error.path().starts_with(authority.folder.path()));
            }
            (found, wanted) => panic!("{:?}, wanted {wanted:?}", found.map(|_| ())),
        }
    }
}
