//! What nodes say to each other, without a daemon.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};

use kv_wire::frame::{HEADER_BYTES, Header, Message};

/// A connection on which whole messages, or less, are said and heard.
pub(crate) struct Wire {
    pub(crate) stream: TcpStream,
}

impl Wire {
    pub(crate) fn on(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self { stream }
    }

    pub(crate) fn say(&mut self, message: &impl Message) -> io::Result<()> {
        self.raw(&encoded(message))
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    pub(crate) fn hear<M: Message>(&mut self) -> io::Result<M> {
        let (header, body) = self.frame()?;
        M::decode(&header, &body).map_err(io::Error::other)
    }

    pub(crate) fn frame(&mut self) -> io::Result<(Header, Vec<u8>)> {
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header)?;
        let header = Header::parse(&header).map_err(io::Error::other)?;
        let mut body = vec![0; header.body_bytes as usize];
        self.stream.read_exact(&mut body)?;
        Ok((header, body))
    }

    /// Says nothing more and listens until the other side hangs up.
    pub(crate) fn listen_for_ever(&mut self) -> io::Result<()> {
        let mut bytes = [0; 4096];
        while self.stream.read(&mut bytes)? > 0 {}
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    pub(crate) fn for_ever(&mut self, bytes: &[u8]) -> io::Result<()> {
        loop {
            self.raw(bytes)?;
        }
    }

    pub(crate) fn hang_up(&mut self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Both)?;
        Err(io::ErrorKind::ConnectionAborted.into())
    }
}

pub(crate) fn encoded(message: &impl Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}
