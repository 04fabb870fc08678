//! One long conversation: a question, its answer, the next question. Prints a line per answer.

use std::{
    io::{ErrorKind, Write as _},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use super::{
    ask::Protocol,
    wire::{ECHO, read_block, write_block},
};

/// What `warren-lab-app session` takes.
#[derive(Debug, clap::Args)]
pub struct SessionArgs {
    /// How; TCP keeps one connection, UDP one pair of ports.
    #[arg(long, value_enum)]
    pub protocol: Protocol,
    /// Whom.
    #[arg(long)]
    pub to: SocketAddr,
    /// Milliseconds between an answer and the next question.
    #[arg(long, default_value_t = 20)]
    pub interval: u64,
}

/// Talks until it is killed or the connection breaks. A question without an answer is an end for TCP only if the
/// connection breaks; over UDP the next question follows.
pub fn session(args: &SessionArgs) -> Result<()> {
    let interval = Duration::from_millis(args.interval);
    match args.protocol {
        Protocol::Tcp => tcp(args.to, interval),
        Protocol::Udp => udp(args.to, interval),
        Protocol::Http => bail!("HTTP has one question per connection: use tcp or udp"),
    }
}

fn tcp(to: SocketAddr, interval: Duration) -> Result<()> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"))?;
    stream.set_nodelay(true)?;
    let mut request = ECHO.to_vec();
    write_block(&mut request, b"still there?")?;
    for number in 1u64.. {
        stream.write_all(&request).context("cannot send")?;
        read_block(&mut stream).context("no answer")?;
        read_block(&mut stream).context("the answer broke off")?;
        tell(number)?;
        thread::sleep(interval);
    }
    Ok(())
}

fn udp(to: SocketAddr, interval: Duration) -> Result<()> {
    let any: IpAddr = if to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0u16; 8].into()
    };
    let socket = UdpSocket::bind((any, 0)).context("cannot bind")?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let (mut number, mut buffer) = (0, [0; 2048]);
    loop {
        socket.send(b"still there?").context("cannot send")?;
        match socket.recv(&mut buffer) {
            Ok(_) => {
                number += 1;
                tell(number)?;
            }
            Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) => {}
            Err(error) => return Err(error).context("refused"),
        }
        thread::sleep(interval);
    }
}

fn tell(number: u64) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{number}")?;
    out.flush()?;
    Ok(())
}
