//! Nodes that prove to each other who they are, and nobody else's.

mod support;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kv_api::v1::MissReason;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use support::among::{get, peer, until};
use support::{Door, Home, scope};

const BLOCK: u32 = 64 << 10;

/// An authority, and certificates of these nodes, each with the name that it carries.
fn authority(dir: &Path, ca_name: &str, nodes: &[(&str, &str)]) {
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    write(&format!("{ca_name}.pem"), ca.self_signed(&ca_key).unwrap().pem());
    let issuer = Issuer::new(ca, ca_key);
    for (file, node) in nodes {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![(*node).to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        write(&format!("{file}.pem"), params.signed_by(&key, &issuer).unwrap().pem());
        write(&format!("{file}.key"), key.serialize_pem());
    }
}

/// Homes of nodes `a` and `b`, each with the certificate and the authority of these names; without, plain.
fn pair(story: &str, dir: &Path, shown: [Option<(&str, &str)>; 2]) -> [Home; 2] {
    // Ports that were free a moment ago; both are taken before the first is given back.
    let free = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let ports = free.each_ref().map(|one| one.local_addr().unwrap().port());
    drop(free);
    let names = ["a", "b"];
    std::array::from_fn(|at| {
        let mut home = Home::sized(&format!("{story}-{}", names[at]), "16MiB", None)
            .set(&format!("node.name={}", names[at]))
            .set(&format!("peers.listen=127.0.0.1:{}", ports[at]))
            .set(&format!("peers.members=a=127.0.0.1:{},b=127.0.0.1:{}", ports[0], ports[1]));
        if let Some((node, ca)) = shown[at] {
            let file = |name: String| dir.join(name).display().to_string();
            for (key, name) in [
                ("cert", format!("{node}.pem")),
                ("key", format!("{node}.key")),
                ("client_ca", format!("{ca}.pem")),
            ] {
                home = home.set(&format!("listen.tls.{key}={}", file(name)));
            }
        }
        home
    })
}

/// Nothing comes, whoever asks, until the one that asks leaves the other alone; why, in words of the one that asked.
fn refused_both_ways(story: &str, dir: &Path, shown: [Option<(&str, &str)>; 2]) -> [String; 2] {
    let [a, b] = pair(story, dir, shown);
    let (_a, _b) = (a.start(), b.start());
    let doors = [Door::of(&a), Door::of(&b)];
    let bindings = doors.each_ref().map(|door| door.register(&scope("t"), BLOCK));
    doors[0].put(&scope("t"), bindings[0], 1, BLOCK, false).expect("put");
    doors[1].put(&scope("t"), bindings[1], 2, BLOCK, false).expect("put");
    let why = [(0, "b", 2), (1, "a", 1)].map(|(from, to, number)| {
        until("it is left alone", || {
            let (got, took) = get(&doors[from], bindings[from], number, 3_000, to);
            assert!(matches!(got, Err(MissReason::PeerDown)), "{story}, {from}: {got:?}");
            assert!(took < Duration::from_secs(3), "that is known at once: {took:?}");
            (peer(&doors[from], to).state == "down").then_some(())
        });
        peer(&doors[from], to).reason
    });
    for (door, node) in [(&doors[0], "b"), (&doors[1], "a")] {
        let other = peer(door, node);
        assert_eq!((other.blocks_in, other.blocks_out, other.held), (0, 0, 0), "{story}: {other:?}");
    }
    why
}

#[test]
fn nodes_with_certificates_of_one_authority_read_from_each_other() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path(), "ca", &[("a", "a"), ("b", "b")]);
    let [a, b] = pair("mutual", dir.path(), [Some(("a", "ca")), Some(("b", "ca"))]);
    let (_a, _b) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    let (in_a, in_b) = (at_a.register(&scope("t"), BLOCK), at_b.register(&scope("t"), BLOCK));
    for number in 0..20 {
        at_a.put(&scope("t"), in_a, number, BLOCK, false).expect("put");
        at_b.put(&scope("t"), in_b, 100 + number, BLOCK, false).expect("put");
    }
    for number in 0..20 {
        assert_eq!(get(&at_b, in_b, number, 5_000, "").0, Ok(()));
        assert_eq!(get(&at_a, in_a, 100 + number, 5_000, "b").0, Ok(()));
    }
    assert_eq!((peer(&at_a, "b").blocks_in, peer(&at_b, "a").blocks_in), (20, 20));
    // Somebody without a certificate hears nothing of the protocol.
    let address = a.logged_address("peers are served");
    let mut stranger = support::wire::Wire::on(std::net::TcpStream::connect(address).unwrap());
    stranger.stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stranger.say(&kv_wire::message::DataAsk::Join(0)).unwrap();
    assert!(stranger.hear::<kv_wire::message::DataAnswer>().is_err());
}

#[test]
fn a_certificate_of_another_name_is_nobodys() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path(), "ca", &[("a", "a"), ("other", "c")]);
    let why = refused_both_ways("name", dir.path(), [Some(("a", "ca")), Some(("other", "ca"))]);
    // The one that dials sees the wrong name; the one that is dialled says so.
    assert!(why[0].contains("certificate"), "{why:?}");
    assert!(why[1].contains("does not carry the name b"), "{why:?}");
}

#[test]
fn a_certificate_of_another_authority_is_nobodys() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path(), "ca", &[("a", "a")]);
    authority(dir.path(), "strange", &[("b", "b")]);
    let why = refused_both_ways("authority", dir.path(), [Some(("a", "ca")), Some(("b", "strange"))]);
    assert!(
        why.iter().all(|why| why.contains("no secure connection") || why.contains("ertificate")),
        "{why:?}"
    );
}

#[test]
fn a_node_without_certificates_and_one_with_them_have_nothing_to_say() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path(), "ca", &[("a", "a")]);
    let why = refused_both_ways("plain", dir.path(), [Some(("a", "ca")), None]);
    assert!(why[0].contains("no secure connection"), "{why:?}");
    assert!(why.iter().all(|why| !why.is_empty()), "{why:?}");
}

#[test]
fn peers_beyond_this_machine_need_mutual_tls_or_the_word() {
    let dir = tempfile::tempdir().unwrap();
    authority(dir.path(), "ca", &[("a", "a")]);
    let file = |name: &str| dir.path().join(name).display().to_string();
    let tls = [
        format!("listen.tls.cert={}", file("a.pem")),
        format!("listen.tls.key={}", file("a.key")),
        format!("listen.tls.client_ca={}", file("ca.pem")),
    ];
    let check = |settings: &[&str], insecure: bool| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvd"));
        command.args(["--check", "--set", "node.name=a"]);
        command.args(settings.iter().flat_map(|setting| ["--set", setting]));
        if insecure {
            command.arg("--insecure");
        }
        let out = command.output().unwrap();
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (listen, member) = ("peers.listen=0.0.0.0:9473", "peers.members=b=10.0.0.2:9473");
    for (setting, key) in [
        (listen, "peers.listen"),
        ("peers.listen=[::]:9473", "peers.listen"),
        (member, "peers.members"),
        ("peers.members=b=node-b.example:9473", "peers.members"),
    ] {
        let (code, words) = check(&[setting], false);
        assert_eq!(code, Some(78), "{setting}: {words}");
        assert!(words.contains(key) && words.contains("listen.tls"), "{words}");
        assert_eq!(check(&[setting], true).0, Some(0), "{setting}");
        let (code, words) = check(&[setting, &tls[0], &tls[1], &tls[2]], false);
        assert_eq!(code, Some(0), "{setting}: {words}");
        // A certificate alone does not say whom to believe.
        assert_eq!(check(&[setting, &tls[0], &tls[1]], false).0, Some(78), "{setting}");
    }
    for setting in
        ["peers.listen=127.0.0.1:9473", "peers.members=b=127.0.0.1:9473", "peers.members=a=10.0.0.1:9473"]
    {
        let (code, words) = check(&[setting], false);
        assert_eq!(code, Some(0), "{setting}: {words}");
    }
}
