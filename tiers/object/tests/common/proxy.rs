//! A bad network between a client and a server on loopback: connections that are refused, answered 503 or 500, cut,
//! slow, or have bits flipped on their way in either direction, by seed.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kv_object::random::Random;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What becomes of one direction of a connection.
#[derive(Clone, Copy)]
struct Fate {
    /// It is cut after so many bytes.
    cut_at: u64,
    /// The byte here has a bit flipped.
    flip_at: Option<u64>,
    /// Each piece waits so long.
    wait: Duration,
}

/// The network.
pub struct Proxy {
    /// Where it listens.
    pub at: SocketAddr,
    bad: watch::Sender<bool>,
    faults: Arc<AtomicU64>,
}

impl Proxy {
    /// A network before `server` that is well until it is told otherwise. What goes up keeps its bits when the server
    /// does not compare checksums.
    pub async fn start(server: SocketAddr, seed: u64, server_compares: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (bad, faults) = (watch::Sender::new(false), Arc::new(AtomicU64::new(0)));
        let now = bad.subscribe();
        let proxy = Self { at, bad, faults: faults.clone() };
        let random = Arc::new(Mutex::new(Random::new(seed)));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (random, faults, mut change) = (random.clone(), faults.clone(), now.clone());
                let bad = *change.borrow_and_update();
                tokio::spawn(async move {
                    // A connection that is kept open does not outlive the weather that it began in.
                    tokio::select! {
                        _ = connection(client, server, &random, bad, server_compares, &faults) => {}
                        _ = change.changed() => {}
                    }
                });
            }
        });
        proxy
    }

    /// From now on this bad or well.
    pub fn set_bad(&self, bad: bool) {
        self.bad.send_replace(bad);
    }

    /// Connections that something was done to.
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::SeqCst)
    }
}

async fn connection(
    mut client: TcpStream,
    server: SocketAddr,
    random: &Mutex<Random>,
    bad: bool,
    server_compares: bool,
    faults: &AtomicU64,
) -> std::io::Result<()> {
    let (what, fates) = {
        let mut random = random.lock().unwrap();
        let mut fate = || Fate {
            cut_at: 20_000 + random.below(200_000),
            flip_at: random.per_mille(300).then(|| random.below(100_000)),
            wait: Duration::from_millis(if random.per_mille(200) { random.below(30) } else { 0 }),
        };
        let fates = [fate(), fate()];
        (random.below(10), fates)
    };
    let answer = match what {
        0 => Some(""),
        1 => {
            Some("HTTP/1.1 503 Slow Down\r\nretry-after: 0\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        }
        2 => Some("HTTP/1.1 500 Broken\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"),
        _ => None,
    };
    if let Some(answer) = answer.filter(|_| bad) {
        faults.fetch_add(1, Ordering::SeqCst);
        let _ = client.read(&mut [0; 8192]).await?;
        client.write_all(answer.as_bytes()).await?;
        return client.shutdown().await;
    }
    let well = Fate { cut_at: u64::MAX, flip_at: None, wait: Duration::ZERO };
    let [mut up, down] = if bad { fates } else { [well; 2] };
    up.flip_at = up.flip_at.filter(|_| server_compares);
    faults.fetch_add(u64::from(bad), Ordering::SeqCst);
    let upstream = TcpStream::connect(server).await?;
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = upstream.into_split();
    tokio::select! {
        done = copy(client_read, server_write, up) => done,
        done = copy(server_read, client_write, down) => done,
    }
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, fate: Fate) -> std::io::Result<()> {
    let mut at = 0;
    let mut piece = vec![0; 16 << 10];
    loop {
        let bytes = from.read(&mut piece).await?;
        if bytes == 0 {
            return Ok(());
        }
        tokio::time::sleep(fate.wait).await;
        if let Some(flip) =
            fate.flip_at.and_then(|flip| flip.checked_sub(at)).filter(|flip| *flip < bytes as u64)
        {
            piece[flip as usize] ^= 4;
        }
        let left = fate.cut_at.saturating_sub(at).min(bytes as u64) as usize;
        to.write_all(&piece[..left]).await?;
        at += bytes as u64;
        if at >= fate.cut_at {
            return Ok(());
        }
    }
}
