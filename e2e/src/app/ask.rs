//! One question, one answer.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::wire::{Answer, ECHO, MAX_UDP, pattern_block, read_block, write_block};

/// How to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Protocol {
    /// The server's own echo protocol.
    Tcp,
    /// A datagram.
    Udp,
    /// `GET /`.
    Http,
}

/// What `warren-lab-app ask` takes.
#[derive(Debug, clap::Args)]
pub struct AskArgs {
    /// How.
    #[arg(long, value_enum)]
    pub protocol: Protocol,
    /// Whom.
    #[arg(long)]
    pub to: SocketAddr,
    /// Own address (UDP only).
    #[arg(long)]
    pub from: Option<IpAddr>,
    /// Bytes of payload; a UDP message is cut to 65,000.
    #[arg(long, default_value_t = 64)]
    pub size: usize,
    /// Milliseconds to wait in all.
    #[arg(long, default_value_t = 5000)]
    pub timeout: u64,
}

/// Asks and waits for the answer; the payload must come back unchanged.
pub fn ask(
    protocol: Protocol,
    to: SocketAddr,
    from: Option<IpAddr>,
    size: usize,
    timeout: Duration,
) -> Result<Answer> {
    let start = Instant::now();
    let (name, bytes) = match protocol {
        Protocol::Tcp => ask_tcp(to, size, timeout)?,
        Protocol::Udp => ask_udp(to, from, size.min(MAX_UDP), timeout)?,
        Protocol::Http => ask_http(to, timeout)?,
    };
    Ok(Answer {
        name,
        bytes,
        micros: start.elapsed().as_micros() as u64,
    })
}

fn connect(to: SocketAddr, timeout: Duration) -> Result<TcpStream> {
    let stream =
        TcpStream::connect_timeout(&to, timeout).with_context(|| format!("cannot connect to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    Ok(stream)
}

fn ask_tcp(to: SocketAddr, size: usize, timeout: Duration) -> Result<(String, usize)> {
    let mut stream = connect(to, timeout)?;
    let payload = pattern_block(u64::from(std::process::id()), size);
    let mut request = ECHO.to_vec();
    write_block(&mut request, &payload)?;
    stream.write_all(&request).context("cannot send")?;
    let name = read_block(&mut stream).context("no answer")?;
    let back = read_block(&mut stream).context("the answer broke off")?;
    ensure!(
        back == payload,
        "{} bytes came back changed ({} were sent)",
        back.len(),
        payload.len()
    );
    Ok((String::from_utf8(name)?, back.len()))
}

fn ask_udp(to: SocketAddr, from: Option<IpAddr>, size: usize, timeout: Duration) -> Result<(String, usize)> {
    let any: IpAddr = if to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0u16; 8].into()
    };
    let socket = UdpSocket::bind((from.unwrap_or(any), 0)).context("cannot bind")?;
    socket.connect(to).with_context(|| format!("cannot reach {to}"))?;
    let deadline = Instant::now() + timeout;
    let payload = pattern_block(u64::from(std::process::id()), size);
    let mut buffer = vec![0; 66_000];
    // The first datagram above the path's MTU is lost to path MTU discovery, as it is anywhere.
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("no answer from {to} within {} ms", timeout.as_millis());
        }
        match socket.send(&payload) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => continue,
            Err(error) => return Err(error).context("cannot send"),
        }
        socket.set_read_timeout(Some(left.min(Duration::from_millis(500))))?;
        match socket.recv(&mut buffer) {
            Ok(length) => {
                let answer = &buffer[..length];
                let end = answer
                    .iter()
                    .position(|b| *b == b'\n')
                    .context("the answer has no name")?;
                let (name, back) = (&answer[..end], &answer[end + 1..]);
                ensure!(
                    back == payload,
                    "{} bytes came back changed ({size} were sent)",
                    back.len()
                );
                return Ok((String::from_utf8(name.to_vec())?, back.len()));
            }
            // Path MTU discovery's answer to our datagram.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) => {}
            Err(error) => return Err(error).with_context(|| format!("{to} refuses")),
        }
    }
}

fn ask_http(to: SocketAddr, timeout: Duration) -> Result<(String, usize)> {
    let mut stream = connect(to, timeout)?;
    write!(
        stream,
        "GET / HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n"
    )
    .context("cannot send")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("no answer")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is no HTTP")?;
    ensure!(
        head.starts_with("HTTP/1.1 200"),
        "{}",
        head.lines().next().unwrap_or_default()
    );
    Ok((body.trim_end().to_owned(), body.len()))
}
