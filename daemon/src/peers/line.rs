//! A connection to one peer: two halves that pass words on, and nothing else.

use std::net::SocketAddr;

use kv_node::PeerId;
use kv_tcp::{Dialer, End};
use kv_wire::message::{Answer, Ask};
use tokio::sync::mpsc;

use crate::config::units::Member;

/// Words to a peer that wait to be sent. More means that it does not read.
const SAY_MAX: usize = 1024;

/// Something about one connection.
pub(super) struct FromLine {
    pub(super) peer: PeerId,
    /// Its number: what an older one still says does not count.
    pub(super) connection: u64,
    pub(super) what: Word,
}

pub(super) enum Word {
    /// It stands; what is put in here is said.
    Open { say: mpsc::Sender<Ask>, address: SocketAddr },
    /// The peer said something.
    Heard(Answer),
    /// The peer said something that is no message.
    Nonsense(String),
    /// It is gone, or did not come about.
    Gone(String),
}

/// Opens a connection and serves it to its end. May be dropped at any time.
pub(super) async fn run(
    dialer: Dialer,
    member: Member,
    peer: PeerId,
    connection: u64,
    words: mpsc::Sender<FromLine>,
) {
    let tell = async |what| {
        // Whoever listens may be gone with the daemon.
        let _ = words.send(FromLine { peer, connection, what }).await;
    };
    let control = match dialer.control(&place(&member), &member.name).await {
        Ok(control) => control,
        Err(error) => return tell(Word::Gone(chain(&error))).await,
    };
    let address = control.peer();
    let (writer, mut reader) = control.split();
    let (say, queue) = mpsc::channel(SAY_MAX);
    tell(Word::Open { say, address }).await;
    let hear = async {
        loop {
            match reader.hear().await {
                Ok(answer) => tell(Word::Heard(answer)).await,
                Err(End::Nonsense(error)) => return Word::Nonsense(chain(&error)),
                Err(end) => return Word::Gone(chain(&end)),
            }
        }
    };
    let say = async {
        match writer.drain(queue).await {
            // Nobody says anything more: the exchange hung up, and hears no more of this connection.
            Ok(()) => std::future::pending().await,
            Err(end) => Word::Gone(chain(&end)),
        }
    };
    let last = tokio::select! {
        last = hear => last,
        last = say => last,
    };
    tell(last).await;
}

/// Where a member is dialled.
pub(super) fn place(member: &Member) -> String {
    let Member { host, port, .. } = member;
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// An error with its causes, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
