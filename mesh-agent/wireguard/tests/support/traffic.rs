//! Traffic between namespaces, from threads that enter them.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};

use nix::sys::socket::{self, MsgFlags};

use super::{Node, PATIENCE, enter};

/// How many datagrams a flow may be behind its rate and catch up.
const LATE: u64 = 64;

/// Runs `body` on a thread in the node's namespace.
pub fn within<T: Send + 'static>(
    node: &Node,
    body: impl FnOnce() -> Result<T> + Send + 'static,
) -> JoinHandle<Result<T>> {
    let namespace = node.namespace.name().to_owned();
    std::thread::spawn(move || {
        enter(&namespace)?;
        body()
    })
}

/// The result of such a thread.
pub fn join<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("a traffic thread panicked"))?
}

/// Sends `bytes` from one node to another over TCP and gets them back.
pub fn tcp_echo(from: &Node, to: &Node, address: IpAddr, bytes: usize) -> Result<()> {
    let (sender, port) = mpsc::channel();
    let server = within(to, move || {
        let listener = TcpListener::bind((address, 0))?;
        sender.send(listener.local_addr()?)?;
        let (mut stream, _) = listener.accept()?;
        let mut writer = stream.try_clone()?;
        std::io::copy(&mut stream, &mut writer)?;
        Ok(())
    });
    let to = port.recv_timeout(PATIENCE).context("the server did not start")?;
    let client = within(from, move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut reader = stream.try_clone()?;
        let data: Vec<u8> = (0..bytes).map(|n| (n % 251) as u8).collect();
        let expected = data.clone();
        let writer = std::thread::spawn(move || {
            stream.write_all(&data)?;
            stream.shutdown(std::net::Shutdown::Write)
        });
        let mut back = Vec::new();
        reader.read_to_end(&mut back)?;
        writer.join().map_err(|_| anyhow!("the writer panicked"))??;
        ensure!(
            back == expected,
            "{} bytes came back, {} were sent, or they differ",
            back.len(),
            expected.len()
        );
        Ok(())
    });
    join(client).with_context(|| format!("TCP to {to}"))?;
    join(server)
}

/// Sends a datagram of `bytes` and gets it back; tries again until it does.
pub fn udp_echo(from: &Node, to: &Node, address: IpAddr, bytes: usize) -> Result<()> {
    let (sender, port) = mpsc::channel();
    let done = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&done);
    let server = within(to, move || {
        let socket = UdpSocket::bind((address, 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        sender.send(socket.local_addr()?)?;
        let mut buffer = vec![0; 65_535];
        while !ended.load(Ordering::Relaxed) {
            match socket.recv_from(&mut buffer) {
                Ok((len, from)) => drop(socket.send_to(&buffer[..len], from)?),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    });
    let to = port.recv_timeout(PATIENCE).context("the server did not start")?;
    let client = within(from, move || {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        let data: Vec<u8> = (0..bytes).map(|n| (n % 253) as u8).collect();
        let mut buffer = vec![0; 65_535];
        let start = Instant::now();
        loop {
            ensure!(
                start.elapsed() < PATIENCE,
                "no datagram of {bytes} bytes came back"
            );
            socket.send(&data)?;
            if let Ok(len) = socket.recv(&mut buffer) {
                ensure!(buffer[..len] == data, "another datagram came back");
                return Ok(());
            }
        }
    });
    let result = join(client).with_context(|| format!("UDP to {to}"));
    done.store(true, Ordering::Relaxed);
    join(server)?;
    result
}

/// `ping` three times; one answer is enough.
pub fn ping(from: &Node, address: IpAddr, bytes: usize) -> Result<()> {
    let (bytes, address) = (bytes.to_string(), address.to_string());
    from.exec(&[
        "ping", "-c", "3", "-i", "0.02", "-W", "20", "-s", &bytes, &address,
    ])
    .map(drop)
}

/// What became of a flow of numbered datagrams.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    pub sent: u64,
    pub lost: u64,
    pub duplicated: u64,
    pub reordered: u64,
}

/// A running flow of numbered datagrams from one node to another.
pub struct Flow {
    pub name: String,
    stop: Arc<AtomicBool>,
    sender: JoinHandle<Result<u64>>,
    receiver: JoinHandle<Result<Figures>>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
}

impl Flow {
    /// Sends `rate` datagrams of `bytes` a second until [`Self::finish`].
    pub fn start(from: &Node, to: &Node, address: IpAddr, rate: u64, bytes: usize) -> Result<Self> {
        Self::start_from(from, None, to, address, rate, bytes)
    }

    /// As [`Self::start`], from this source address.
    pub fn start_from(
        from: &Node,
        source: Option<IpAddr>,
        to: &Node,
        address: IpAddr,
        rate: u64,
        bytes: usize,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (sent, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (announce, port) = mpsc::channel();
        let (ended, counted) = (Arc::clone(&stop), Arc::clone(&received));
        let total = Arc::clone(&sent);
        let receiver = within(to, move || {
            let socket = UdpSocket::bind((address, 0))?;
            enlarge(&socket)?;
            announce.send(socket.local_addr()?)?;
            receive(&socket, &ended, &total, &counted)
        });
        let target = port
            .recv_timeout(PATIENCE)
            .context("the receiver did not start")?;
        let (ended, counted) = (Arc::clone(&stop), Arc::clone(&sent));
        let sender = within(from, move || {
            send(source, target, rate, bytes.max(9), &ended, &counted)
        });
        let name = format!("{} -> {} ({address})", from.number, to.number);
        Ok(Self {
            name,
            stop,
            sender,
            receiver,
            sent,
            received,
        })
    }

    /// Datagrams received so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Datagrams sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Stops the sender, waits for what is under way, and counts.
    pub fn finish(self) -> Result<Figures> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = join(self.sender).with_context(|| self.name.clone())?;
        self.sent.store(sent, Ordering::Relaxed);
        join(self.receiver).with_context(|| self.name.clone())
    }
}

fn send(
    source: Option<IpAddr>,
    to: SocketAddr,
    rate: u64,
    bytes: usize,
    stop: &AtomicBool,
    sent: &AtomicU64,
) -> Result<u64> {
    let any: IpAddr = if to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        [0u16; 8].into()
    };
    let socket = UdpSocket::bind((source.unwrap_or(any), 0))?;
    enlarge(&socket)?;
    socket.connect(to)?;
    let socket_fd = socket.as_raw_fd();
    let mut datagram = vec![0; bytes];
    let (start, mut number, mut skipped) = (Instant::now(), 0u64, 0u64);
    while !stop.load(Ordering::Relaxed) {
        let due = (start.elapsed().as_nanos() * u128::from(rate) / 1_000_000_000) as u64 - skipped;
        // After a pause of the machine the flow goes on at its rate; a burst of all that was missed would be a test of
        // queues.
        let late = due.saturating_sub(number + LATE);
        skipped += late;
        let due = due - late;
        if number >= due {
            std::thread::sleep(Duration::from_micros(500));
            continue;
        }
        datagram[..8].copy_from_slice(&number.to_be_bytes());
        // In two parts, so that the kernel computes the checksum and leaves nothing to the device: wireguard-go writes 0
        // where it must write 0xffff, and one IPv6 datagram in 65,536 is lost (RFC 8200, section 8.1).
        socket::send(
            socket_fd,
            &datagram[..8],
            MsgFlags::from_bits_retain(libc::MSG_MORE),
        )?;
        socket::send(socket_fd, &datagram[8..], MsgFlags::empty())?;
        number += 1;
        sent.store(number, Ordering::Relaxed);
    }
    Ok(number)
}

fn receive(socket: &UdpSocket, stop: &AtomicBool, sent: &AtomicU64, received: &AtomicU64) -> Result<Figures> {
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mut buffer = vec![0; 65_535];
    let mut seen = Seen::default();
    let mut quiet = 0;
    loop {
        match socket.recv(&mut buffer) {
            Ok(len) if len >= 8 => {
                seen.note(u64::from_be_bytes(buffer[..8].try_into()?));
                received.store(seen.distinct, Ordering::Relaxed);
                quiet = 0;
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                quiet += 1;
                // Two seconds of silence after the sender has stopped: what is missing is lost.
                if stop.load(Ordering::Relaxed)
                    && (quiet > 20 || seen.distinct == sent.load(Ordering::Relaxed))
                {
                    break;
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    let sent = sent.load(Ordering::Relaxed);
    Ok(Figures {
        sent,
        lost: sent - seen.distinct,
        duplicated: seen.duplicated,
        reordered: seen.reordered,
    })
}

/// Which numbers arrived.
#[derive(Default)]
struct Seen {
    bits: Vec<u64>,
    distinct: u64,
    duplicated: u64,
    reordered: u64,
    next: u64,
}

impl Seen {
    fn note(&mut self, number: u64) {
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if self.bits.len() <= word {
            self.bits.resize(word + 1, 0);
        }
        if self.bits[word] & bit != 0 {
            self.duplicated += 1;
            return;
        }
        self.bits[word] |= bit;
        self.distinct += 1;
        if number < self.next {
            self.reordered += 1;
        }
        self.next = self.next.max(number + 1);
    }
}

/// Room for what arrives while this thread waits for a CPU.
fn enlarge(socket: &UdpSocket) -> Result<()> {
    socket::setsockopt(socket, socket::sockopt::RcvBufForce, &(8 << 20))?;
    socket::setsockopt(socket, socket::sockopt::SndBufForce, &(8 << 20))?;
    Ok(())
}
