//! Threads run and memory lies where the plan says, on a machine with several NUMA nodes. On one with a
//! single node there is nothing to see, and the story says so.
//!
//! A machine without several nodes can have them in a virtual one: `daemon/tests/vm/numa`.

mod support;

use std::collections::BTreeMap;

use support::{Door, Home};

#[test]
fn threads_are_pinned_and_pages_are_bound_where_planned() {
    if !kv_arena::numa::has_several_nodes() {
        eprintln!("skipped: this machine has one NUMA node (run daemon/tests/vm/numa for two)");
        return;
    }
    let home = Home::sized("numa", "64MiB", None);
    let daemon = home.start();
    // Blocks in every shard, so that the daemon has touched pages of every arena.
    let (door, scope) = (Door::of(&home), support::scope("numa"));
    let binding = door.register(&scope, 64 << 10);
    (0..200).for_each(|number| assert!(!door.put(&scope, binding, number, 64 << 10, false).unwrap()));
    let proc = format!("/proc/{}", daemon.pid());

    let mut cpus_of = BTreeMap::new();
    for task in std::fs::read_dir(format!("{proc}/task")).unwrap() {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.trim().to_owned()
        };
        cpus_of.insert(field("Name:"), field("Cpus_allowed_list:"));
    }
    let maps =
        kv_arena::numa::parse_numa_maps(&std::fs::read_to_string(format!("{proc}/numa_maps")).unwrap());
    let topology = kvd::topology::Topology::of_this_machine(1 << 40);
    let nodes: Vec<_> = topology.nodes.iter().filter(|node| !node.cpus.is_empty()).collect();
    assert!(nodes.len() > 1, "several nodes with CPUs");
    for (shard, node) in nodes.iter().enumerate() {
        let allowed = kvd::topology::cpu_list(&cpus_of[&format!("shard-{shard}")]).unwrap();
        assert!(
            allowed.iter().all(|cpu| node.cpus.contains(cpu)),
            "shard {shard} may run on {allowed:?}, node {} has {:?}",
            node.number,
            node.cpus
        );
        let arena = home.memory_dir().join(format!("shard-{shard}.data"));
        let map = maps.iter().find(|map| map.file.as_deref() == Some(&*arena));
        let map = map.unwrap_or_else(|| panic!("{} is not mapped", arena.display()));
        assert_eq!(map.policy, format!("bind:{}", node.number), "policy of shard {shard}");
        let share = map.share_on(node.number).expect("pages of the arena were touched");
        assert!(share > 0.99, "{share} of shard {shard}'s pages lie on node {}", node.number);
        eprintln!("shard {shard}: cpus {allowed:?}, {} -> {:?}", map.policy, map.pages);
    }
    assert!(daemon.terminate().success());
}
