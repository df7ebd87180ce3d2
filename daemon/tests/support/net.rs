//! Machines on a network of their own, each a network namespace: what is dropped or slowed there is nobody else's.
//!
//! ```text
//!   kvd-<pid>-<n>-a          kvd-<pid>-<n>-hub          kvd-<pid>-<n>-b
//!     eth0 10.99.0.1 ---------- bridge --------------- eth0 10.99.0.2
//! ```

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A network. Dropped, it is gone with its namespaces.
pub(crate) struct Net {
    prefix: String,
    hosts: usize,
    iptables: &'static str,
}

impl Net {
    /// A network of so many machines; nothing, and said why, where this process may not make one.
    pub(crate) fn make(hosts: usize) -> Option<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let skip = |why: &str| {
            eprintln!("skipped: {why}");
            None
        };
        if !rustix::process::geteuid().is_root() {
            return skip("only root makes network namespaces");
        }
        let is_there =
            |tool: &&str| Command::new(tool).arg("-V").output().is_ok_and(|out| out.status.success());
        if !is_there(&"ip") || Command::new("tc").arg("-V").output().is_err() {
            return skip("ip and tc are not there; install iproute2");
        }
        let Some(iptables) = ["iptables-legacy", "iptables"].into_iter().find(is_there) else {
            return skip("iptables is not there; install iptables");
        };
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let net = Self { prefix: format!("kvd-{}-{number}", std::process::id()), hosts, iptables };
        match net.build() {
            Ok(()) => Some(net),
            Err(why) => skip(&why),
        }
    }

    fn build(&self) -> Result<(), String> {
        let hub = self.hub();
        run("ip", &["netns", "add", &hub])?;
        self.inside(&hub, "ip", &["link", "add", "bridge", "type", "bridge"])?;
        self.inside(&hub, "ip", &["link", "set", "bridge", "up"])?;
        for host in 0..self.hosts {
            let (netns, port) = (self.netns(host), format!("port{host}"));
            run("ip", &["netns", "add", &netns])?;
            let pair = ["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &netns];
            self.inside(&hub, "ip", &pair)?;
            self.inside(&hub, "ip", &["link", "set", &port, "master", "bridge", "up"])?;
            let address = format!("{}/24", self.address(host));
            self.inside(&netns, "ip", &["address", "add", &address, "dev", "eth0"])?;
            self.inside(&netns, "ip", &["link", "set", "eth0", "up"])?;
            self.inside(&netns, "ip", &["link", "set", "lo", "up"])?;
        }
        // What the stories do must be possible before they begin.
        self.try_rule(0, "-A", &["-m", "statistic", "--mode", "random", "--probability", "0.2"])?;
        self.try_rule(0, "-D", &["-m", "statistic", "--mode", "random", "--probability", "0.2"])
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.prefix)
    }

    pub(crate) fn netns(&self, host: usize) -> String {
        format!("{}-{}", self.prefix, char::from(b'a' + host as u8))
    }

    pub(crate) fn address(&self, host: usize) -> String {
        format!("10.99.0.{}", host + 1)
    }

    fn inside(&self, netns: &str, tool: &str, args: &[&str]) -> Result<(), String> {
        run("ip", &[&["netns", "exec", netns, tool], args].concat())
    }

    fn try_rule(&self, host: usize, change: &str, which: &[&str]) -> Result<(), String> {
        let rule = [&["-w", change, "INPUT", "-i", "eth0"], which, &["-j", "DROP"]].concat();
        self.inside(&self.netns(host), self.iptables, &rule)
    }

    /// Nothing arrives at one machine from another any more.
    pub(crate) fn cut(&self, from: usize, to: usize) {
        self.try_rule(to, "-A", &["-s", &self.address(from)]).expect("a rule");
    }

    /// A part of all packets is lost on its way to each machine.
    pub(crate) fn lose(&self, share: &str) {
        for host in 0..self.hosts {
            let random = ["-m", "statistic", "--mode", "random", "--probability", share];
            self.try_rule(host, "-A", &random).expect("a rule");
        }
    }

    /// Packets that were dropped on their way to a machine.
    pub(crate) fn dropped(&self, host: usize) -> u64 {
        let list = ["netns", "exec", &self.netns(host), self.iptables, "-w", "-nvxL", "INPUT"];
        let out = Command::new("ip").args(list).output().expect("ip");
        let rules = String::from_utf8_lossy(&out.stdout).into_owned();
        let drops = rules.lines().filter(|line| line.contains(" DROP "));
        drops.filter_map(|line| line.split_whitespace().next()?.parse::<u64>().ok()).sum()
    }

    /// Everything arrives again.
    pub(crate) fn heal(&self) {
        for host in 0..self.hosts {
            self.inside(&self.netns(host), self.iptables, &["-w", "-F", "INPUT"]).expect("no rules");
        }
    }

    /// A machine sends no faster than this: `80mbit`.
    pub(crate) fn slow(&self, host: usize, rate: &str) {
        let bucket = [
            "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "64kb", "latency",
            "50ms",
        ];
        self.inside(&self.netns(host), "tc", &bucket).expect("a slower network");
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for netns in (0..self.hosts).map(|host| self.netns(host)).chain([self.hub()]) {
            // With it go its devices; a daemon that still runs there keeps neither name nor network.
            let _ = run("ip", &["netns", "delete", &netns]);
        }
    }
}

fn run(tool: &str, args: &[&str]) -> Result<(), String> {
    let out = Command::new(tool).args(args).output().map_err(|error| format!("{tool}: {error}"))?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("{tool} {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim()))
}
