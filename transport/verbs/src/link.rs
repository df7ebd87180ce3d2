//! The two ends of a path.
//!
//! ```text
//!   Endpoint::open    a queue pair, and the words that the peer needs       nothing is connected yet
//!   connect(words)    with the peer's words: a VerbsLink                    both ends, in any order
//!   has_answered      the reader's end asked, and the owner's device heard  there is a network between them
//! ```
//! A path that broke is gone for good; to heal it, both sides open a new endpoint, which takes a few system calls.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kv_transport::Micros;
use kv_transport::link::{Link, LinkDone, LinkError, LinkOp, LinkUsage, Wake};
use kv_wire::message::{ReadId, WantId};

use crate::Error;
use crate::device::{Device, Inner};
use crate::engine::{Command, LISTENS, Lane, Permit, refuse};
use crate::flow::{Flow, Limits};
use crate::handles::{Pd, Qp, Route};
use crate::outbox::Outbox;
use crate::probe::{Exposure, Gid, choose_gid, gid_at};
use crate::sys;
use crate::words::{LinkLayer, Role, Words};

/// Time for the device to flush what it has, and for the peer to take a goodbye.
const GRACE_US: u64 = 300_000;

/// One end that is not connected yet.
pub struct Endpoint {
    // In this order: the queue pair ends before its domain and its place.
    qp: Qp,
    pd: Arc<Pd>,
    permit: Permit,
    ours: Words,
    gid: Gid,
    path: u8,
    device: Device,
}

impl Endpoint {
    /// Makes an end, and gives the words that the peer's end needs. `path` is the number under which this node's
    /// control connection knows the path.
    pub fn open(device: &Device, role: Role, path: u8) -> Result<(Self, Vec<u8>), Error> {
        let inner = &device.inner;
        let name = || inner.rail.device.clone();
        let failed = |what: &'static str| move |source| Error::Device { device: name(), what, source };
        let permit = Permit::take(&inner.links, inner.links_max)
            .ok_or_else(|| Error::Full { device: name(), links_max: inner.links_max })?;
        let port = inner.context.port_attr(inner.rail.port).map_err(failed("look at its port"))?;
        let gid = current_gid(inner).filter(|_| port.state == sys::PORT_ACTIVE);
        let gid = gid.ok_or_else(|| Error::PortDown { device: name(), port: inner.rail.port })?;
        // A region of its own is for one peer alone, so where there are no windows each owner's end has its own
        // domain; a window belongs to a queue pair by itself.
        let pd = match (role, inner.exposure) {
            (Role::Owner, Exposure::Regions) => {
                Pd::new(&inner.context).map_err(failed("make a protection domain"))?
            }
            _ => Arc::clone(&inner.pd),
        };
        let sends = inner.config.depth + 2;
        let qp = Qp::new(&pd, &inner.cq, sends, LISTENS).map_err(failed("make a queue pair"))?;
        qp.init(inner.rail.port, role == Role::Owner).map_err(failed("put a queue pair on its port"))?;
        let ethernet = port.link_layer == sys::LINK_LAYER_ETHERNET;
        let able = inner.rail.capabilities.ok_or_else(|| Error::NoDevice { device: name() })?;
        let ours = Words {
            role,
            link_layer: if ethernet { LinkLayer::Ethernet } else { LinkLayer::InfiniBand },
            queue_pair: qp.number(),
            first_packet: chance().map_err(failed("get random numbers"))? & 0xff_ffff,
            gid: gid.address,
            lid: if ethernet { 0 } else { port.lid },
            mtu: port.active_mtu.clamp(1, 5) as u8,
            reads_answered: able.reads_answered,
            reads_asked: able.reads_asked,
        };
        let endpoint = Self { qp, pd, permit, ours, gid, path, device: device.clone() };
        Ok((endpoint, ours.encode()))
    }

    /// Connects it to the end that these words of the peer describe. `wake` is called, from any thread, when the
    /// link has something. A failure ends this end: a new one is made for another try.
    pub fn connect(self, peer: &[u8], wake: Wake) -> Result<VerbsLink, Error> {
        let Self { qp, pd, permit, ours, gid, path, device } = self;
        let inner = &device.inner;
        let theirs = Words::decode(peer)?;
        let why = match () {
            () if theirs.role == ours.role => Some("both are the same end of a path"),
            () if theirs.link_layer != ours.link_layer => Some("one is InfiniBand and the other Ethernet"),
            () => None,
        };
        if let Some(why) = why {
            return Err(Error::Mismatch { why });
        }
        let route = Route {
            port: inner.rail.port,
            gid_index: gid.index,
            traffic_class: inner.config.traffic_class,
            service_level: inner.config.service_level,
            timeout: inner.config.timeout,
            ours,
            theirs,
        };
        qp.connect(&route).map_err(|source| Error::Device {
            device: inner.rail.device.clone(),
            what: "connect a queue pair",
            source,
        })?;
        let limits = Limits {
            depth: inner.config.depth,
            message_bytes_max: inner.config.message_bytes_max,
            path,
            beat: inner.config.beat.as_micros() as u64,
            silence: inner.config.silence.as_micros() as u64,
            grace: GRACE_US,
        };
        let now = Micros(inner.started.elapsed().as_micros() as u64);
        let outbox = Arc::new(Outbox::new(wake));
        let mut flow = Flow::new(limits, now);
        if ours.role == Role::Reader {
            // Should the owner's end not be there yet, the device says it again.
            flow.beat(now);
        }
        let lane = Lane { qp, flow, pd, outbox: Arc::clone(&outbox), permit, failed: false };
        let serial = inner.serial.fetch_add(1, Ordering::Relaxed);
        inner.inbox.send(Command::Attach(serial, Box::new(lane)));
        Ok(VerbsLink {
            role: ours.role,
            serial,
            outbox,
            pending: Vec::new(),
            ended: VecDeque::new(),
            reads: HashMap::new(),
            wants: HashMap::new(),
            in_flight: 0,
            bytes: 0,
            standing: 0,
            said_broken: false,
            device,
        })
    }
}

fn chance() -> std::io::Result<u32> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(u32::from_le_bytes(bytes))
}

/// The port's address: the one that the probe chose if it is still there.
fn current_gid(inner: &Inner) -> Option<Gid> {
    let chosen = inner.rail.gid?;
    let ports = inner.rail.sysfs.join("class/infiniband").join(&inner.rail.device).join("ports");
    let at_port = ports.join(inner.rail.port.to_string());
    if gid_at(&at_port, chosen.index) == Some(chosen.address) {
        return Some(chosen);
    }
    choose_gid(&at_port, inner.rail.link_layer?, None)
}

/// A block that the peer may read, or soon may.
struct Standing {
    bytes: u64,
    exposed: bool,
    concealing: bool,
}

/// One end of a connected path.
pub struct VerbsLink {
    role: Role,
    serial: u32,
    outbox: Arc<Outbox>,
    /// Taken, and not handed over yet.
    pending: Vec<LinkOp>,
    /// Ended here.
    ended: VecDeque<LinkDone>,
    reads: HashMap<ReadId, u64>,
    wants: HashMap<WantId, Standing>,
    in_flight: usize,
    bytes: u64,
    standing: u32,
    said_broken: bool,
    device: Device,
}

impl VerbsLink {
    /// The device that it goes through.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether the peer's device has answered, so that there is a network between both ends. The reader's end asks as
    /// soon as it is connected; `wake` is called when the answer comes. If none comes the link breaks.
    pub fn has_answered(&self) -> bool {
        self.outbox.has_answered()
    }

    fn is_broken(&self) -> bool {
        self.said_broken || self.outbox.is_closed()
    }

    fn has_room(&self) -> bool {
        !self.is_broken() && self.in_flight < self.device.inner.config.ops_max as usize
    }

    fn unsupported(&self, what: &str) -> LinkError {
        LinkError::Unsupported { what: what.to_owned() }
    }

    /// Keeps the books of a completion; false for one of an operation that was not taken.
    fn account(&mut self, done: &LinkDone) -> bool {
        match done {
            LinkDone::Exposed { want, result: Ok(_) } => {
                let Some(standing) = self.wants.get_mut(want) else { return false };
                standing.exposed = true;
                self.in_flight -= 1;
            }
            LinkDone::Exposed { want, result: Err(_) } => {
                let Some(standing) = self.wants.remove(want) else { return false };
                self.in_flight -= 1 + usize::from(standing.concealing);
                self.bytes -= standing.bytes;
                self.standing -= 1;
            }
            LinkDone::Concealed { want, .. } => {
                let Some(standing) = self.wants.remove(want) else { return false };
                self.in_flight -= usize::from(standing.concealing) + usize::from(!standing.exposed);
                self.bytes -= standing.bytes;
                self.standing -= 1;
            }
            LinkDone::Read { read, .. } => {
                let Some(bytes) = self.reads.remove(read) else { return false };
                self.in_flight -= 1;
                self.bytes -= bytes;
            }
            LinkDone::Broken { .. } => {}
        }
        true
    }
}

impl Link for VerbsLink {
    fn submit(&mut self, op: LinkOp) -> Result<(), LinkOp> {
        match &op {
            LinkOp::Expose { want, block } => {
                let full = self.standing >= self.device.inner.config.exposures_max;
                if !self.has_room() || full || self.wants.contains_key(want) {
                    return Err(op);
                }
                let bytes = block.len() as u64;
                self.wants.insert(*want, Standing { bytes, exposed: false, concealing: false });
                self.standing += 1;
                self.in_flight += 1;
                self.bytes += bytes;
                if self.role == Role::Reader {
                    let why = self.unsupported("to expose at the reader's end");
                    self.ended.push_back(LinkDone::Exposed { want: *want, result: Err(why) });
                    return Ok(());
                }
            }
            LinkOp::Read { read, record, .. } => {
                if !self.has_room() || self.reads.contains_key(read) {
                    return Err(op);
                }
                self.reads.insert(*read, record.bytes.into());
                self.in_flight += 1;
                self.bytes += u64::from(record.bytes);
                if self.role == Role::Owner {
                    let result = Err(self.unsupported("to read at the owner's end"));
                    if let LinkOp::Read { read, into, .. } = op {
                        self.ended.push_back(LinkDone::Read { read, into, result });
                    }
                    return Ok(());
                }
            }
            LinkOp::Conceal { want } => {
                // What is not exposed ended by itself, and its completion says so.
                let Some(standing) = self.wants.get_mut(want).filter(|standing| !standing.concealing) else {
                    return Ok(());
                };
                standing.concealing = true;
                self.in_flight += 1;
            }
            LinkOp::Cancel { read } => {
                if !self.reads.contains_key(read) {
                    return Ok(());
                }
            }
        }
        self.pending.push(op);
        Ok(())
    }

    fn kick(&mut self) {
        if !self.pending.is_empty() {
            let ops = std::mem::take(&mut self.pending);
            self.device.inner.inbox.send(Command::Ops(self.serial, Arc::clone(&self.outbox), ops));
        }
    }

    fn poll(&mut self, done: &mut Vec<LinkDone>) {
        let first = done.len();
        done.extend(self.ended.drain(..));
        let mut broken = self.outbox.take(done);
        if broken.is_some() && !self.pending.is_empty() {
            // Taken after the path broke: nobody else has them.
            done.extend(std::mem::take(&mut self.pending).into_iter().filter_map(refuse));
        }
        let mut kept = done.split_off(first);
        kept.retain(|one| self.account(one));
        done.append(&mut kept);
        if let Some((why, abandoned)) = broken.take()
            && !self.said_broken
            && (abandoned || (self.reads.is_empty() && self.wants.is_empty()))
        {
            self.said_broken = true;
            done.push(LinkDone::Broken { why });
        }
    }

    fn usage(&self) -> LinkUsage {
        let in_flight_max = self.device.inner.config.ops_max as usize;
        LinkUsage { in_flight: self.in_flight, in_flight_max, bytes: self.bytes }
    }
}

impl Drop for VerbsLink {
    fn drop(&mut self) {
        self.outbox.orphan();
        self.device.inner.inbox.send(Command::Close(self.serial));
    }
}
