//! What every path must keep, over both kinds of connection.

use std::sync::Arc;
use std::time::Duration;

use kv_arena::Slab;
use kv_tcp::{Limits, Security};
use kv_transport::contract::Subject;
use kv_transport::link::Link;

use crate::support::{Authority, Bell, Nodes, SESSION, patient};

/// Two nodes and one bell for both ends of every path between them.
struct Tcp {
    nodes: Nodes,
    bell: Arc<Bell>,
    session: u128,
}

impl Tcp {
    fn new(owner: Security, reader: Security) -> Self {
        // A case drops the reader's end before it has connected: the owner's waits for that long.
        let handshake = Duration::from_secs(3);
        let limits = Limits { bulk_connections: 2, handshake, ..patient() };
        Self { nodes: Nodes::new(owner, reader, limits), bell: Arc::default(), session: SESSION }
    }

    fn plain() -> Self {
        Self::new(Security::Plain, Security::Plain)
    }

    fn secure() -> Self {
        let authority = Authority::new("ours");
        Self::new(authority.node("owner"), authority.node("reader"))
    }
}

impl Subject for Tcp {
    fn pair(&mut self, _owner: &Slab, _reader: &Slab) -> (Box<dyn Link>, Box<dyn Link>) {
        self.session += 1;
        let owner = self.nodes.listener.sessions().link(self.session, "reader", self.bell.wake());
        let to = self.nodes.address();
        let reader = self.nodes.dialer.link(to, "owner", self.session, self.bell.wake());
        (Box::new(owner), Box::new(reader.expect("the name is one")))
    }

    fn wait(&mut self) {
        self.bell.wait_a_moment(Duration::from_millis(5));
    }
}

mod plain {
    kv_transport::link_contract!(super::Tcp::plain());
}

mod secure {
    kv_transport::link_contract!(super::Tcp::secure());
}
