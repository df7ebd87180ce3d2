//! The configuration as people meet it: which layer wins, what is said of a mistake, what is printed.

use kvd::config::units::{OrAuto, OrOff, Size, SizeOrShare, Text, UidRule};
use kvd::config::{Config, Facts, Loaded, Origin, Sources};
use proptest::prelude::*;

fn sources(file: &str, env: &[(&str, &str)], set: &[(&str, &str)]) -> Sources {
    let text = |part: &str| part.to_owned();
    Sources {
        files: vec![("kvd.toml".into(), file.to_owned())],
        env: env.iter().map(|(name, value)| (text(name), text(value))).collect(),
        flags: set.iter().map(|(key, value)| (format!("--set {key}"), text(key), text(value))).collect(),
        facts: Facts { uid: 7, host_name: "gpu-a.example".into(), runtime_dir: None },
    }
}

fn refused(file: &str, env: &[(&str, &str)], set: &[(&str, &str)]) -> String {
    Config::load(&sources(file, env, set)).err().map(|error| error.to_string()).unwrap_or_default()
}

fn bytes_max(loaded: &Loaded) -> String {
    loaded.config.host.bytes_max.to_string()
}

#[test]
fn later_layers_win_and_are_remembered() {
    let file = "\n[host]\nbytes_max = '1GiB'\n";
    let env = [("KVD_HOST__BYTES_MAX", "2GiB")];
    let set = [("host.bytes_max", "3GiB")];
    let load = |sources: &Sources| Config::load(sources).unwrap();

    let nothing = load(&sources("", &[], &[]));
    assert_eq!((bytes_max(&nothing).as_str(), nothing.origin("host.bytes_max")), ("auto", Origin::Default));
    let from_file = load(&sources(file, &[], &[]));
    let place = Origin::File { path: "kvd.toml".into(), line: 3, column: 1 };
    assert_eq!((bytes_max(&from_file).as_str(), from_file.origin("host.bytes_max")), ("1GiB", place));
    let from_env = load(&sources(file, &env, &[]));
    assert_eq!(bytes_max(&from_env), "2GiB");
    assert_eq!(from_env.origin("host.bytes_max").to_string(), "KVD_HOST__BYTES_MAX");
    let from_flag = load(&sources(file, &env, &set));
    assert_eq!(bytes_max(&from_flag), "3GiB");
    assert_eq!(from_flag.origin("host.bytes_max").to_string(), "--set host.bytes_max");

    let mut two_files = sources(file, &[], &[]);
    two_files.files.push(("conf.d/9.toml".into(), "host = { bytes_max = \"50%\" }".into()));
    let second = load(&two_files);
    assert_eq!(bytes_max(&second), "50%");
    assert_eq!(second.origin("host.bytes_max").to_string(), "conf.d/9.toml:1:10");
}

#[test]
fn a_mistake_is_named_with_its_place_and_what_was_meant() {
    let rows: &[(&str, &str)] = &[
        (
            "[host]\nbyts_max = '1GiB'",
            "kvd.toml:2:1: unknown key host.byts_max; did you mean host.bytes_max?",
        ),
        ("host.byts_max = 1", "kvd.toml:1:6: unknown key host.byts_max; did you mean host.bytes_max?"),
        ("\n\n[hots]\n", "kvd.toml:3:2: unknown key hots; did you mean host?"),
        ("socket_mod = '0660'", "kvd.toml:1:1: unknown key socket_mod; did you mean listen.socket_mode?"),
        ("zzz = 1", "kvd.toml:1:1: unknown key zzz"),
        (
            "[tenants.a]\nbyts_max = 1",
            "kvd.toml:2:1: unknown key tenants.a.byts_max; did you mean tenants.a.bytes_max?",
        ),
        (
            "[tenants.A_B]\nbytes_max = 1",
            "kvd.toml:1:10: `A_B` cannot name a tenant: expected 1 to 63 of a-z, 0-9 and '-'",
        ),
        (
            "[principals.a]\nuid = [7]",
            "kvd.toml:2:1: unknown key principals.a.uid; did you mean principals.a.uids?",
        ),
        (
            "[principals.'../b']\nuids = [7]",
            "kvd.toml:1:13: `../b` cannot name a principal: expected 1 to 63 of a-z, 0-9 and '-'",
        ),
        (
            "[principals.a]\nshare = '10%'\nuids = ['self']",
            "kvd.toml:3:1: principals.a.uids: string \"self\", expected a whole number from 0 to 4294967295",
        ),
        ("host = 3", "kvd.toml:1:1: host is a section, not a value"),
        (
            "[host]\nbytes_max = '64G'",
            "kvd.toml:2:1: host.bytes_max: string \"64G\", expected a size such as 64GiB or a share such as 25%, or auto",
        ),
        (
            "host.huge_pages = 'maybe'",
            "kvd.toml:1:6: host.huge_pages: string \"maybe\", expected one of auto, off, required",
        ),
        (
            "limits.sessions_max = 'x'",
            "kvd.toml:1:8: limits.sessions_max: string \"x\", expected a whole number from 0 to 4294967295",
        ),
        (
            "limits.sessions_max = -1",
            "kvd.toml:1:8: limits.sessions_max: integer `-1`, expected a whole number from 0 to 4294967295",
        ),
        ("limits.sessions_max = 0", "kvd.toml:1:8: limits.sessions_max: 0 is not from 1 to 65535"),
        ("listen.insecure = 'yes'", "kvd.toml:1:8: listen.insecure: string \"yes\", expected true or false"),
        ("disk.dir = 'data'", "kvd.toml:1:6: disk.dir: string \"data\", expected an absolute path, or off"),
        (
            "disk.segment_bytes = 4194305",
            "kvd.toml:1:6: disk.segment_bytes: 4194305B is not a multiple of 4KiB",
        ),
        (
            "host.region_bytes = '3MiB'",
            "kvd.toml:1:6: host.region_bytes: 3MiB is not a power of two from 2MiB to 1GiB",
        ),
        (
            "log.level = 'loud'",
            "kvd.toml:1:5: log.level: `loud` is not error, warn, info, debug, trace or off, nor a directive such as kv_ssd=debug",
        ),
        (
            "node.name = 2026-11-23",
            "kvd.toml:1:6: node.name: a date is expected nowhere; quote it if it is text",
        ),
        (
            "host.bytes_max = 99999999999999999999",
            "kvd.toml:1:6: host.bytes_max: 99999999999999999999 does not fit 64 bits",
        ),
    ];
    for (file, wanted) in rows {
        assert_eq!(refused(file, &[], &[]), *wanted, "{file}");
    }
    let text = refused("[host]\nbytes_max = ", &[], &[]);
    assert!(text.starts_with("kvd.toml:2:13: "), "{text}");
    let columns = refused("['ä'.b]\nc = 1", &[], &[]);
    assert!(columns.starts_with("kvd.toml:1:2: unknown key ä"), "{columns}");
}

#[test]
fn mistakes_in_the_environment_and_in_flags_name_the_variable_and_the_flag() {
    let near = "unknown key host.byts_max; did you mean host.bytes_max?";
    assert_eq!(refused("", &[("KVD_HOST__BYTS_MAX", "1")], &[]), format!("KVD_HOST__BYTS_MAX: {near}"));
    assert_eq!(refused("", &[], &[("host.byts_max", "1")]), format!("--set host.byts_max: {near}"));
    assert_eq!(
        refused("", &[("KVD_LIMITS__SESSIONS_MAX", "many")], &[]),
        "KVD_LIMITS__SESSIONS_MAX: limits.sessions_max: string \"many\", expected a whole number from 0 to 4294967295"
    );
    assert_eq!(refused("", &[], &[("host", "1")]), "--set host: host is a section, not a value");
    assert!(refused("", &[], &[("", "1")]).contains("unknown key"));
}

#[test]
fn a_variable_that_all_but_names_a_key_is_refused_and_others_under_our_name_are_remarked_on() {
    for (typed, meant) in [
        ("KVD_HOST_BYTES_MAX", "KVD_HOST__BYTES_MAX"),
        ("KVD_HOST_BYTES", "KVD_HOST__BYTES_MAX"),
        ("KVD_LISTEN_TLS_CERT", "KVD_LISTEN__TLS__CERT"),
        ("KVD_TENANTS_TEAM_A_BYTES_MAX", "KVD_TENANTS__<NAME>__BYTES_MAX"),
    ] {
        let words = refused("", &[(typed, "1GiB")], &[]);
        let wanted = format!("{typed}: it sets nothing; did you mean {meant}, with two underscores?");
        assert_eq!(words, wanted);
    }
    let remarks = |env: &[(&str, &str)]| Config::load(&sources("", env, &[])).unwrap().remarks;
    for stray in ["KVD_VERSION", "KVD_IMAGE_TAG", "KVD_NODE_EXPORTER_NAME", "KVD_HOME"] {
        let [remark] = &remarks(&[(stray, "7")])[..] else { panic!("one remark") };
        assert!(remark.contains(stray) && remark.contains("sets nothing"), "{remark}");
    }
    // What others put into the environment under our name is not ours.
    let others = [
        ("KVD_SOCKET", "/run/kvd/kvd.sock"),
        ("KVD_SEED", "7"),
        ("KVD_KILL_CYCLES", "9"),
        ("KVD_PORT", "tcp://10.0.0.1:9473"),
        ("KVD_PORT_9473_TCP_ADDR", "10.0.0.1"),
        ("KVD_SERVICE_HOST", "10.0.0.1"),
        ("KVD", "1"),
        ("HOST__BYTES", "1"),
    ];
    assert!(remarks(&others).is_empty());
}

#[test]
fn every_mistake_is_told_at_once() {
    let file = "[host]\nbyts_max = 1\nhuge_pages = 1\n[lgo]\n";
    assert_eq!(refused(file, &[("KVD_A__B", "")], &[]).lines().count(), 4);
    let many: String = (0..1000).map(|number| format!("k{number} = 1\n")).collect();
    assert_eq!(refused(&many, &[], &[]).lines().count(), 20);
    // Values that contradict each other too, each at its own place.
    let file = "limits.sessions_max = 0\nlisten.tcp = '0.0.0.0:1'";
    let text = refused(file, &[], &[]);
    assert!(
        text.contains("kvd.toml:1:8: ") && text.contains("kvd.toml:2:8: listen.tcp: 0.0.0.0:1 can be"),
        "{text}"
    );
}

#[test]
fn text_of_flags_and_environment_takes_the_type_of_its_key() {
    let env = [
        ("KVD_LISTEN__INSECURE", "true"),
        ("KVD_LISTEN__TLS__CERT", "/c"),
        ("KVD_LISTEN__TLS__KEY", "/k"),
        ("KVD_LIMITS__SESSIONS_MAX", "9"),
        ("KVD_LISTEN__ADMIN_UIDS", "[self, 7]"),
        ("KVD_TENANTS__ALPHA__BYTES_MAX", "3GiB"),
        ("KVD_CATALOG__ENTRIES_MAX", "1000"),
    ];
    let set = [("workers.uids", "1000,any"), ("workers.trusted_uids", ""), ("listen.http", "0")];
    let config = Config::load(&sources("", &env, &set)).unwrap().config;
    assert!(config.listen.insecure);
    assert_eq!(config.limits.sessions_max, 9);
    assert_eq!(config.listen.admin_uids, [UidRule::Own, UidRule::Uid(7)]);
    assert_eq!(config.workers.uids, [UidRule::Uid(1000), UidRule::Any]);
    assert_eq!(config.workers.trusted_uids, []);
    assert_eq!(config.tenants["alpha"].bytes_max, OrOff::Set(SizeOrShare::Size(Size::gib(3))));
    assert_eq!(config.catalog.entries_max, OrAuto::Set(1000));
    assert_eq!(config.listen.http.to_string(), "127.0.0.1:0");
}

#[test]
fn what_is_auto_is_settled_for_root_and_for_others() {
    let settled = |uid, runtime_dir: Option<&str>, host_name: &str| {
        let facts = Facts { uid, host_name: host_name.into(), runtime_dir: runtime_dir.map(Into::into) };
        let config = Config::load(&Sources { facts, ..Sources::default() }).unwrap().config;
        let text = |path: std::path::PathBuf| path.display().to_string();
        (config.node_name().to_owned(), text(config.run_dir()), text(config.memory_dir()))
    };
    let wanted = |name: &str, run: &str, memory: &str| (name.to_owned(), run.to_owned(), memory.to_owned());
    assert_eq!(settled(0, Some("/run/user/0"), "a.b"), wanted("a", "/run/kvd", "/dev/shm/kvd-a"));
    assert_eq!(settled(7, Some("/run/user/7"), "a"), wanted("a", "/run/user/7/kvd", "/dev/shm/kvd-7-a"));
    assert_eq!(settled(7, None, "(none)"), wanted("kvd", "/tmp/kvd-7", "/dev/shm/kvd-7-kvd"));

    let file = "node.name = 'n1'\nhost.memory_dir = '/m'\nlisten.run_dir = '/r'\ndisk.dir = '/d'";
    let config = Config::load(&sources(file, &[], &[])).unwrap().config;
    assert_eq!((config.node_name(), config.disk_dir()), ("n1", Some("/d".into())));
    assert_eq!((config.run_dir(), config.memory_dir()), ("/r".into(), "/m".into()));
    let off = Config::load(&sources(file, &[], &[("disk.enabled", "false")])).unwrap().config;
    assert_eq!(off.disk_dir(), None);
}

#[test]
fn the_printed_configuration_reads_back_and_tells_where_from() {
    let file = "[tenants.alpha]\nbytes_max = '10%'\n[workers]\nuids = ['self', 7]\n[disk]\ndir = '/a \"b'\nsync = 'always'";
    let loaded = Config::load(&sources(file, &[("KVD_LOG__LEVEL", "debug")], &[])).unwrap();
    let text = loaded.print_effective(false);
    let again = Config::load(&sources(&text, &[], &[])).unwrap();
    assert_eq!(again.config, loaded.config, "{text}");

    let text = loaded.print_effective(true);
    assert_eq!(Config::load(&sources(&text, &[], &[])).unwrap().config, loaded.config);
    for line in [
        "[tenants.alpha]",
        "bytes_max = \"10%\"  # from: kvd.toml:2:1",
        "level = \"debug\"  # from: KVD_LOG__LEVEL",
        "# Entries of each ring of a session; a power of two.",
        "ring_entries = 1024  # from: default",
        "[listen.tls]",
    ] {
        assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
    }
}

#[test]
fn every_key_is_in_the_printed_configuration() {
    let text = "tenants.t.bytes_max = 1\nprincipals.p = { uids = [7], share = '10%' }";
    let text = Config::parse(text).unwrap().print_effective(false);
    let printed = text.lines().filter(|line| line.contains(" = ") && !line.starts_with('#')).count();
    // All keys but `listen.tls`, which is a section of its own.
    let known: usize = Config::SECTIONS.iter().map(|(_, keys)| keys.len()).sum();
    assert_eq!(printed, known - 1);
}

#[test]
fn a_user_belongs_to_one_principal_and_the_shares_leave_something_over() {
    let refused = |text: &str| Config::parse(text).unwrap_err().to_string();
    let rows = [
        (
            "[principals.a]\nshare = '10%'\nuids = [7]\n[principals.b]\nshare = '10%'\nuids = [8, 7]",
            "kvd.toml:6:1: principals.b.uids: user 7 is in principals.a.uids as well; take it out of one of the two",
        ),
        (
            "workers.uids = ['self', 7]\n[principals.a]\nshare = '10%'\nuids = [7]",
            "kvd.toml:4:1: principals.a.uids: user 7 is in workers.uids as well; take it out of one of the two",
        ),
        (
            "[principals.a]\nshare = '10%'\nuids = []",
            "kvd.toml:3:1: principals.a.uids: a principal without users: list their numbers, as in [1001]",
        ),
        ("[principals.a]\nuids = [7]", "principals.a.share: a principal without a share"),
        (
            "[principals.default]\nshare = '10%'\nuids = [7]",
            "kvd.toml:3:1: principals.default.uids: `default` is whoever is in no other principal",
        ),
        (
            "[principals.a]\nshare = '60%'\nuids = [7]\n[principals.b]\nshare = '40%'\nuids = [8]",
            "kvd.toml:5:1: principals.b.share: 40% leaves nothing for the default principal (workers.uids and the \
             network): with those before it, less than 40% is to be had",
        ),
    ];
    for (text, wanted) in rows {
        let found = refused(text);
        assert!(found.contains(wanted), "{found}");
    }
    let text = "[principals.a]\nshare = '10%'\nuids = [7, 7]\n[principals.b]\nshare = '89.5%'\nuids = [8]";
    let loaded = Config::parse(text).unwrap();
    assert_eq!(loaded.config.principal_names().collect::<Vec<_>>(), ["default", "a", "b"]);
    let listing = [6, 7, 8].map(|uid| loaded.config.principal_listing(uid));
    assert_eq!(listing, [None, Some(1), Some(2)]);
    let printed = loaded.print_effective(false);
    assert_eq!(Config::parse(&printed).unwrap().config, loaded.config, "{printed}");
}

#[test]
fn help_fits_a_small_terminal() {
    use clap::CommandFactory;
    let text = kvd::config::cli::Flags::command().render_help().to_string();
    assert!(text.lines().count() <= 24 && text.lines().all(|line| line.chars().count() <= 80), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_the_parser_fall(text in "\\PC{0,200}") {
        let _ = Config::parse(&text);
    }

    #[test]
    fn no_setting_makes_the_parser_fall(key in "[a-z_.]{0,30}", value in "\\PC{0,30}") {
        let _ = Config::load(&sources("", &[(&format!("KVD_{key}"), &value)], &[(&key, &value)]));
    }

    #[test]
    fn sizes_read_back(bytes in any::<u64>()) {
        let size = Size(bytes);
        prop_assert_eq!(Size::parse(&size.to_string()), Some(size));
        prop_assert_eq!(SizeOrShare::parse(&size.to_string()), Some(SizeOrShare::Size(size)));
    }
}

#[test]
fn a_list_of_nodes_that_is_likely_a_mistake_is_remarked() {
    let remarks = |members: &str| {
        let set = [("node.name", "a"), ("peers.listen", "127.0.0.1:9474"), ("peers.members", members)];
        Config::load(&sources("", &[], &set)).unwrap().remarks
    };
    assert!(remarks("").is_empty());
    assert!(remarks("a=127.0.0.1:9474,b=127.0.0.1:9475").is_empty());
    for (members, wanted) in [
        ("a=127.0.0.1:9474,b=127.0.0.1:9,c=127.0.0.1:9", "c=127.0.0.1:9 is where node b is said to be"),
        (
            "a=127.0.0.1:1,b=127.0.0.1:9474",
            "b=127.0.0.1:9474 is peers.listen of this node, which is called a",
        ),
        ("b=127.0.0.1:9475", "this node is not listed as a"),
    ] {
        let remarks = remarks(members);
        assert!(matches!(&remarks[..], [one] if one.contains(wanted)), "{members}: {remarks:?}");
    }
}

#[test]
fn no_more_principals_than_can_be_told_have_peers() {
    let mut text =
        String::from("node.name = 'a'\npeers.members = ['a=127.0.0.1:9474', 'b=127.0.0.1:9475']\n");
    for number in 0..63 {
        text += &format!("[principals.p{number}]\nshare = '1%'\nuids = [{}]\n", 1000 + number);
    }
    assert_eq!(refused(&text, &[], &[]), "");
    text += "[principals.more]\nshare = '1%'\nuids = [2000]\n";
    let said = refused(&text, &[], &[]);
    assert!(said.contains("peers.members: with 65 principals a node has no peers; 64 can"), "{said}");
    let alone = text.lines().filter(|line| !line.starts_with("peers.members"));
    assert_eq!(refused(&alone.collect::<Vec<_>>().join("\n"), &[], &[]), "");
}
