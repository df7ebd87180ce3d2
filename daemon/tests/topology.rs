//! From sysfs trees of machines we do not have to the plan they would run.
//!
//! A fixture is a text file: `path=content` makes a file, `path/` a folder, `#` begins a remark.

use std::path::Path;

use kvd::check;
use kvd::config::{Config, Loaded};
use kvd::plan::{Plan, Resources, plan};
use kvd::topology::{DeviceKind, Topology, allowed_cpus, cpu_list, print_cpus};

const GIB: u64 = 1 << 30;

fn unpack(name: &str) -> tempfile::TempDir {
    let temp = tempfile::tempdir().unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sysfs").join(name);
    let text = std::fs::read_to_string(&fixture).unwrap();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        match line.split_once('=') {
            Some((path, content)) => {
                let path = temp.path().join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, format!("{content}\n")).unwrap();
            }
            None => std::fs::create_dir_all(temp.path().join(line)).unwrap(),
        }
    }
    temp
}

fn topology(name: &str, allowed: &[u32]) -> Topology {
    Topology::read(unpack(name).path(), allowed, 8 * GIB)
}

fn all_cpus() -> Vec<u32> {
    (0..256).collect()
}

fn resources(topology: &Topology) -> Resources {
    Resources { ram_bytes: topology.nodes.iter().map(|node| node.memory_bytes).sum(), ..Resources::default() }
}

fn config(text: &str) -> Loaded {
    Config::parse(text).unwrap()
}

fn planned(topology: &Topology, text: &str) -> Plan {
    plan(topology, &config(text), &resources(topology)).unwrap()
}

fn refused(topology: &Topology, text: &str, resources: &Resources) -> String {
    plan(topology, &config(text), resources).unwrap_err().to_string()
}

#[test]
fn cpu_lists_are_read_and_printed() {
    for (text, cpus) in [
        ("0-3,8,10-11\n", Some(vec![0, 1, 2, 3, 8, 10, 11])),
        ("7", Some(vec![7])),
        ("\n", Some(vec![])),
        ("3-1", None),
        ("0-99999999", None),
        ("x", None),
        ("1-", None),
    ] {
        let found = cpu_list(text).map(|cpus| cpus.into_iter().collect::<Vec<_>>());
        assert_eq!(found, cpus, "{text}");
        if let Some(cpus) = cpus {
            assert_eq!(print_cpus(&cpus), text.trim());
        }
    }
}

#[test]
fn a_small_machine_is_one_node_and_its_threads_are_not_pinned_to_one_cpu() {
    let machine = topology("one-node.txt", &all_cpus());
    assert_eq!(machine.nodes.len(), 1);
    assert_eq!((machine.nodes[0].cpus.clone(), machine.nodes[0].memory_bytes), (vec![0, 1, 2, 3], 16 * GIB));
    let devices: Vec<_> = machine.devices.iter().map(|d| (d.kind, d.name.as_str(), d.node)).collect();
    assert_eq!(devices, [(DeviceKind::Nic, "eth0", 0), (DeviceKind::Gpu, "0000:00:03.0", 0)]);

    let plan = planned(&machine, "");
    assert_eq!(plan.shards.len(), 1);
    let shard = &plan.shards[0];
    assert_eq!(
        (shard.numa_node, &shard.shard_cpus, &shard.disk_cpus),
        (None, &vec![0, 1, 2, 3], &vec![0, 1, 2, 3])
    );
    assert_eq!((shard.arena_bytes, plan.region_bytes, shard.regions), (4 * GIB, 32 << 20, 128));
    assert_eq!(plan.control_threads, 1);
    assert_eq!(shard.disk, None);
}

#[test]
fn a_server_with_two_sockets_gets_a_shard_on_each_with_its_own_devices() {
    let machine = topology("two-sockets-eight-gpus.txt", &all_cpus());
    let count = |kind, node| machine.devices.iter().filter(|d| d.kind == kind && d.node == node).count();
    // The management display and the misplaced card count as node 0.
    assert_eq!((count(DeviceKind::Gpu, 0), count(DeviceKind::Gpu, 1)), (5, 4));
    assert_eq!((count(DeviceKind::Nvme, 0), count(DeviceKind::Nvme, 1)), (4, 4));
    assert_eq!((count(DeviceKind::Nic, 0), count(DeviceKind::Nic, 1)), (5, 4));
    assert_eq!((machine.distance(0, 1), machine.distance(1, 1), machine.distance(0, 7)), (21, 10, 20));
    assert_eq!(machine.nodes[0].huge_free_bytes, GIB);

    let plan = planned(&machine, "disk = { dir = '/data', bytes_max = '1TiB' }\nhost.bytes_max = '25%'");
    assert_eq!(plan.shards.len(), 2);
    for (index, shard) in plan.shards.iter().enumerate() {
        assert_eq!((shard.numa_node, &shard.serves), (Some(index as u32), &vec![index as u32]));
        let disk = shard.disk.as_ref().unwrap();
        assert_eq!(disk.dir, Path::new(&format!("/data/shard-{index}")));
        assert_eq!((disk.segments_max, disk.segment_bytes), (8192, 64 << 20));
        assert!(shard.devices.contains(&format!("nvme{}", index * 4)), "{:?}", shard.devices);
    }
    assert_eq!((&plan.shards[0].shard_cpus, &plan.shards[0].disk_cpus), (&vec![166], &vec![167]));
    assert_eq!((&plan.shards[1].shard_cpus, &plan.shards[1].disk_cpus), (&vec![222], &vec![223]));
    assert_eq!(plan.shards[0].arena_bytes, plan.shards[1].arena_bytes);
    assert_eq!(plan.shards[0].arena_bytes, 252 * GIB);
    assert_eq!((plan.home_shard(1), plan.home_shard(9), plan.control_threads), (1, 0, 8));

    // Without a word, a large machine gives no more than the documented bound.
    let arenas = |plan: Plan| plan.shards.iter().map(|shard| shard.arena_bytes).sum::<u64>();
    assert_eq!(arenas(planned(&machine, "")), 64 * GIB);
}

#[test]
fn the_affinity_of_the_process_decides_which_nodes_serve() {
    let first_socket: Vec<u32> = (0..20).collect();
    let machine = topology("two-sockets-eight-gpus.txt", &first_socket);
    let plan = planned(&machine, "");
    assert_eq!(plan.shards.len(), 1);
    assert_eq!((plan.shards[0].numa_node, plan.shards[0].serves.as_slice()), (Some(0), &[0, 1][..]));
    assert_eq!(plan.shards[0].shard_cpus, [18]);
    assert_eq!(plan.notes, ["NUMA node 1 has no CPUs that this process may use; shard 0 serves it"]);
}

#[test]
fn nodes_without_memory_or_without_cpus_are_served_by_the_nearest_shard() {
    let machine = topology("node-without-memory.txt", &all_cpus());
    let plan = planned(&machine, "host.bytes_max = '48GiB'");
    let homes: Vec<_> = plan.shards.iter().map(|shard| (shard.numa_node, shard.serves.clone())).collect();
    assert_eq!(homes, [(Some(0), vec![0, 1]), (Some(2), vec![2, 3])]);
    assert_eq!(plan.shards[0].devices, ["nvme0"]);
    assert_eq!(plan.shards.iter().map(|shard| shard.arena_bytes).collect::<Vec<_>>(), [24 * GIB, 24 * GIB]);
    assert_eq!(
        plan.notes,
        ["NUMA node 1 has no memory; shard 0 serves it", "NUMA node 3 has no CPUs; shard 1 serves it"]
    );

    // Only CPUs of the node without memory are ours: the nearest memory serves, wherever its own CPUs are.
    let machine = topology("node-without-memory.txt", &[4, 5]);
    let plan = planned(&machine, "");
    assert_eq!((plan.shards.len(), plan.shards[0].numa_node), (1, Some(0)));
    assert!(plan.shards[0].shard_cpus.is_empty(), "any CPU of ours");
}

#[test]
fn holes_in_lists_and_numbers_are_kept_and_nonsense_is_left_out() {
    let machine = topology("holes.txt", &all_cpus());
    let nodes: Vec<_> = machine.nodes.iter().map(|node| (node.number, node.cpus.clone())).collect();
    assert_eq!(nodes, [(0, vec![0, 1, 2, 3, 8, 10, 11]), (8, vec![16, 17, 18, 19]), (9, vec![])]);
    let plan = planned(&machine, "");
    let homes: Vec<_> = plan.shards.iter().map(|shard| (shard.numa_node, shard.serves.clone())).collect();
    assert_eq!(homes, [(Some(0), vec![0, 9]), (Some(8), vec![8])]);
    assert_eq!((plan.home_shard(8), plan.home_shard(0)), (1, 0));
}

#[test]
fn without_sysfs_there_is_one_node_with_what_we_may_use() {
    let nothing = tempfile::tempdir().unwrap();
    let machine = Topology::read(&nothing.path().join("none"), &[2, 5], 8 * GIB);
    assert!(machine.guessed);
    assert_eq!((machine.nodes.len(), &machine.nodes[0].cpus), (1, &vec![2, 5]));
    let plan = planned(&machine, "");
    assert_eq!((plan.shards[0].numa_node, &plan.shards[0].shard_cpus), (None, &vec![2, 5]));
    assert_eq!((plan.shards[0].arena_bytes, plan.notes.len()), (2 * GIB, 1));
}

#[test]
fn memory_is_split_by_what_the_nodes_have() {
    let mut machine = topology("node-without-memory.txt", &all_cpus());
    machine.nodes[2].memory_bytes = 16 * GIB;
    let plan = planned(&machine, "host = { bytes_max = '10GiB', region_bytes = '1GiB' }");
    assert_eq!(plan.shards.iter().map(|shard| shard.regions).collect::<Vec<_>>(), [8, 2]);
    // The smallest still gets one region.
    machine.nodes[2].memory_bytes = GIB;
    let plan = planned(&machine, "host = { bytes_max = '10GiB', region_bytes = '1GiB' }");
    assert_eq!(plan.shards.iter().map(|shard| shard.regions).collect::<Vec<_>>(), [9, 1]);
}

#[test]
fn what_cannot_be_is_refused_with_the_key_and_the_way_out() {
    let machine = topology("two-sockets-eight-gpus.txt", &all_cpus());
    let have = resources(&machine);
    let small = Resources { memory_dir_bytes: Some(64 << 20), disk_bytes: Some(100 * GIB), ..have.clone() };
    let rows: [(&str, &Resources, &str); 7] = [
        (
            "host.bytes_max = '1MiB'",
            &have,
            "kvd.toml:1:6: host.bytes_max: 1MiB is less than one region of 2MiB for each of 2",
        ),
        (
            "host.bytes_max = '99TiB'",
            &have,
            "kvd.toml:1:6: host.bytes_max: 99TiB is more than the 1.97TiB of memory",
        ),
        (
            "host.bytes_max = '1GiB'",
            &small,
            "a file system of 64MiB: enlarge it (`mount -o remount,size=...`",
        ),
        (
            "disk = { dir = '/d', bytes_max = '100MiB' }",
            &have,
            "is less than 4 segments of 64MiB for each of 2",
        ),
        ("disk.dir = '/d'", &have, "disk.bytes_max: 50% of /d, whose size cannot be told"),
        (
            "disk = { dir = '/d', bytes_max = '100TiB', segment_bytes = '4MiB' }",
            &have,
            "disk.segment_bytes: 4MiB makes more than",
        ),
        ("host.bytes_max = '0'", &have, "host.bytes_max: 0B is less than one region"),
    ];
    for (text, resources, wanted) in rows {
        let found = refused(&machine, text, resources);
        assert!(found.contains(wanted), "{found}");
    }
}

#[test]
fn a_small_shared_memory_file_system_makes_a_small_arena_not_an_error() {
    let machine = topology("one-node.txt", &all_cpus());
    let small = Resources { memory_dir_bytes: Some(64 << 20), ..resources(&machine) };
    let plan = plan(&machine, &config(""), &small).unwrap();
    assert_eq!((plan.region_bytes, plan.shards[0].arena_bytes), (2 << 20, 50 << 20));
    assert!(plan.notes[0].contains("docker run --shm-size"), "{:?}", plan.notes);
}

#[test]
fn the_catalog_follows_the_tiers_or_the_configuration() {
    let machine = topology("two-sockets-eight-gpus.txt", &all_cpus());
    let plan = planned(&machine, "catalog = { entries_max = 1000000, ghosts_max = 100 }");
    assert_eq!((plan.shards[0].table_entries_max, plan.shards[0].ghosts_max), (500_050, 50));
    let plan = planned(&machine, "disk = { dir = '/d', bytes_max = '10TiB' }");
    assert_eq!(plan.shards[0].table_entries_max, (16 << 20) * 5 / 8);
    let plan = planned(&machine, "host.bytes_max = '64MiB'");
    assert_eq!(plan.shards[1].table_entries_max, (1 << 16) * 5 / 8);
}

#[test]
fn the_budget_has_a_line_for_each_owner_and_says_when_the_sum_is_too_large() {
    let machine = topology("one-node.txt", &all_cpus());
    let plan = planned(&machine, "workers.staging_bytes_max = '1GiB'");
    let line = |owner| plan.budget.iter().find(|line| line.owner == owner).unwrap().bytes;
    assert_eq!(line("host arenas"), 4 * GIB);
    assert_eq!(line("staging"), 64 * GIB);
    assert_eq!(plan.memory_bytes(), plan.budget.iter().map(|line| line.bytes).sum::<u64>());
    assert!(plan.notes.iter().any(|note| note.contains("the machine has 16GiB")), "{:?}", plan.notes);
    assert_eq!(planned(&machine, "").notes, Vec::<String>::new());
}

#[test]
fn limits_of_the_process_that_bind_are_told() {
    let machine = topology("one-node.txt", &all_cpus());
    let tight = Resources {
        memlock_bytes: Some(8 << 20),
        descriptors_max: Some(256),
        disk_bytes: Some(GIB),
        ..resources(&machine)
    };
    let plan = plan(&machine, &config("disk = { dir = '/d', bytes_max = '2GiB' }"), &tight).unwrap();
    for part in ["LimitNOFILE", "CAP_IPC_LOCK", "the disk tier may grow to 2GiB"] {
        assert!(plan.notes.iter().any(|note| note.contains(part)), "{part}: {:?}", plan.notes);
    }
}

#[test]
fn the_plan_is_printed_as_tables() {
    let machine = topology("two-sockets-eight-gpus.txt", &all_cpus());
    let loaded = config("disk = { dir = '/data', bytes_max = '1TiB' }\nnode.name = 'gpu-a'");
    let have = resources(&machine);
    let text = check::report(&loaded, &machine, &have, &plan(&machine, &loaded, &have).unwrap());
    for line in [
        "node      gpu-a",
        "numa node  cpus            memory   huge free  gpus  nvme  nics  home shard",
        "1          56-111,168-223  1008GiB  0B         4     4     4     1",
        "shard  numa node  cpu  disk cpu  arena  regions       entries   pinned  disk",
        "1      1          222  223       32GiB  1024 x 32MiB  10485760  16GiB   512GiB",
        "disk.dir        kvd.toml:1:10",
        "the configuration is good",
    ] {
        assert!(text.lines().any(|found| found == line), "no `{line}` in\n{text}");
    }
    assert!(text.lines().all(|line| line.trim_end() == line));
}

#[test]
fn each_principal_gets_a_shard_on_each_node_and_its_share_of_everything() {
    let machine = topology("two-sockets-eight-gpus.txt", &all_cpus());
    let tiers = "host.bytes_max = '64GiB'\ndisk = { dir = '/data', bytes_max = '1TiB' }\n\
                 catalog = { entries_max = 1000000, ghosts_max = 100000 }\n";
    let principals =
        "[principals.b]\nuids = [1001, 1002]\nshare = '25%'\n[principals.a]\nuids = [7]\nshare = '12.5%'\n";
    let text = format!("{tiers}{principals}");
    let alone = planned(&machine, tiers);
    let plan = planned(&machine, &text);

    // Whose, which of his, on which node; host regions; disk segments; entries, ghosts; pinned.
    let shard = |at: usize| {
        let shard = &plan.shards[at];
        assert_eq!(usize::from(shard.index), at);
        let tiers = (shard.regions, shard.disk.as_ref().unwrap().segments_max);
        let table = (shard.table_entries_max, shard.ghosts_max, shard.pinned_bytes_max / GIB);
        (shard.principal, shard.home, shard.numa_node.unwrap(), tiers, table)
    };
    assert_eq!(shard(0), (0, 0, 0, (640, 5120), (343_750, 31_250, 10)));
    assert_eq!(shard(1), (0, 1, 1, (640, 5120), (343_750, 31_250, 10)));
    assert_eq!(shard(2), (1, 0, 0, (128, 1024), (68_750, 6_250, 2)));
    assert_eq!(shard(3), (1, 1, 1, (128, 1024), (68_750, 6_250, 2)));
    assert_eq!(shard(4), (2, 0, 0, (256, 2048), (137_500, 12_500, 4)));
    assert_eq!(shard(5), (2, 1, 1, (256, 2048), (137_500, 12_500, 4)));
    assert_eq!(plan.shards.len(), 6);
    let whose: Vec<_> = plan.principals.iter().map(|one| (one.name.as_str(), one.shards.clone())).collect();
    assert_eq!(whose, [("default", 0..2), ("a", 2..4), ("b", 4..6)]);
    let regions = |plan: &Plan| plan.shards.iter().map(|shard| shard.regions).sum::<u32>();
    assert_eq!(regions(&plan), regions(&alone), "nothing is lost");

    // Files of their own, and those of the default principal where they always were.
    let files = |plan: &Plan, at: usize| {
        let shard = &plan.shards[at];
        let memory = shard.memory_dir.join(format!("shard-{}", shard.home));
        (memory, shard.disk.as_ref().unwrap().dir.clone())
    };
    let base = alone.shards[0].memory_dir.clone();
    for at in 0..2 {
        assert_eq!(files(&plan, at), files(&alone, at));
        assert_eq!(files(&plan, at), (base.join(format!("shard-{at}")), format!("/data/shard-{at}").into()));
    }
    assert_eq!(files(&plan, 5), (base.join("principal-b/shard-1"), "/data/principal-b/shard-1".into()));
    // Threads of their own, where a node has CPUs enough.
    let cpus: Vec<_> = plan.shards.iter().map(|shard| (shard.shard_cpus[0], shard.disk_cpus[0])).collect();
    assert_eq!(cpus, [(166, 167), (222, 223), (164, 165), (220, 221), (162, 163), (218, 219)]);

    let loaded = config(&text);
    let printed = check::report(&loaded, &machine, &resources(&machine), &plan);
    for line in [
        "principal  users                  share  shards  host   disk",
        "default    workers.uids, network  rest   0,1     40GiB  640GiB",
        "b          1001,1002              25%    4,5     16GiB  256GiB",
    ] {
        assert!(printed.lines().any(|found| found == line), "no `{line}` in\n{printed}");
    }
    let without = check::report(&config(tiers), &machine, &resources(&machine), &alone);
    assert!(!without.contains("principal"), "{without}");
}

#[test]
fn a_share_too_small_for_a_shard_is_refused_where_it_was_set() {
    let machine = topology("two-sockets-eight-gpus.txt", &all_cpus());
    let have = resources(&machine);
    let rows = [
        (
            "host = { bytes_max = '1GiB', region_bytes = '256MiB' }\n[principals.b]\nuids = [7]\nshare = '25%'",
            "kvd.toml:4:1: principals.b.share: too little host memory for principal b: less than one region of 256MiB",
        ),
        (
            "host = { bytes_max = '1GiB', region_bytes = '256MiB' }\n[principals.b]\nuids = [7]\nshare = '75%'",
            "kvd.toml:1:10: host.bytes_max: too little host memory for principal default",
        ),
        (
            "disk = { dir = '/d', bytes_max = '1GiB' }\n[principals.b]\nuids = [7]\nshare = '20%'",
            "kvd.toml:4:1: principals.b.share: too little disk for principal b: less than 4 segments of 64MiB",
        ),
    ];
    for (text, wanted) in rows {
        let found = refused(&machine, text, &have);
        assert!(found.contains(wanted), "{found}");
    }
    // Regions are small enough for the smallest.
    let plan = planned(&machine, "host.bytes_max = '1GiB'\n[principals.b]\nuids = [7]\nshare = '1%'");
    assert_eq!((plan.region_bytes, plan.shards[2].regions, plan.shards[3].regions), (2 << 20, 2, 3));
}

#[test]
fn this_machine_is_read_and_planned() {
    let machine = Topology::of_this_machine(8 * GIB);
    assert!(!machine.nodes.is_empty());
    let cpus: Vec<u32> = machine.nodes.iter().flat_map(|node| node.cpus.clone()).collect();
    assert!(cpus.iter().all(|cpu| allowed_cpus().contains(cpu)) && !cpus.is_empty());
    let (_, _, plan) =
        check::plan_here(&config("host.bytes_max = '4MiB'\nhost.memory_dir = '/tmp/none'")).unwrap();
    assert!(!plan.shards.is_empty());
}
