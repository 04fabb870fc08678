//! Requests and answers, one at a time: how long each takes, idle and beside a TCP stream.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    pair::Pair,
    report::{Better, Measured},
    support::{
        PATIENCE,
        traffic::{join, within},
    },
};

/// Bytes of a request and of its answer.
const REQUEST: usize = 64;

/// Names of the figures: 50th and 99th percentile.
type Names = [&'static str; 2];

/// Requests over TCP and UDP for so long, without and with a stream.
pub(super) fn measure(pair: &Pair, seconds: u64) -> Result<Vec<Measured>> {
    let time = Duration::from_secs(seconds);
    let mut measured = tcp(pair, time, ["tcp_rr_p50_us", "tcp_rr_p99_us"])?;
    measured.extend(udp(pair, time, ["udp_rr_p50_us", "udp_rr_p99_us"])?);
    std::thread::scope(|scope| {
        // Longer than both, and a moment to begin.
        let stream = scope.spawn(|| pair.iperf(2 * seconds + 2, &[]));
        std::thread::sleep(Duration::from_secs(1));
        measured.extend(tcp(pair, time, ["tcp_rr_loaded_p50_us", "tcp_rr_loaded_p99_us"])?);
        measured.extend(udp(pair, time, ["udp_rr_loaded_p50_us", "udp_rr_loaded_p99_us"])?);
        stream
            .join()
            .map_err(|_| anyhow::anyhow!("the thread of iperf3 panicked"))??;
        Ok(measured)
    })
}

fn percentiles(names: Names, mut times: Vec<Duration>) -> Result<Vec<Measured>> {
    ensure!(!times.is_empty(), "no request was answered");
    times.sort();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e6;
    Ok(names
        .into_iter()
        .zip([50, 99])
        .map(|(name, share)| Measured::new(name, "us", Better::Less, at(share)))
        .collect())
}

fn tcp(pair: &Pair, time: Duration, names: Names) -> Result<Vec<Measured>> {
    let (announce, port) = mpsc::channel();
    let address = pair.receiver().inner_v4();
    let server = within(pair.receiver(), move || {
        let listener = TcpListener::bind((address, 0))?;
        announce.send(listener.local_addr()?)?;
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut buffer = [0; REQUEST];
        while stream.read_exact(&mut buffer).is_ok() {
            stream.write_all(&buffer)?;
        }
        Ok(())
    });
    let to: SocketAddr = port.recv_timeout(PATIENCE).context("the server did not start")?;
    let times = join(within(pair.sender(), move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (mut times, mut buffer, start) = (Vec::new(), [7; REQUEST], Instant::now());
        while start.elapsed() < time {
            let asked = Instant::now();
            stream.write_all(&buffer)?;
            stream.read_exact(&mut buffer)?;
            times.push(asked.elapsed());
        }
        Ok(times)
    }))?;
    join(server)?;
    percentiles(names, times)
}

fn udp(pair: &Pair, time: Duration, names: Names) -> Result<Vec<Measured>> {
    let (announce, port) = mpsc::channel();
    let address = pair.receiver().inner_v4();
    let done = Arc::new(AtomicBool::new(false));
    let ended = Arc::clone(&done);
    let server = within(pair.receiver(), move || {
        let socket = UdpSocket::bind((address, 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        announce.send(socket.local_addr()?)?;
        let mut buffer = [0; REQUEST];
        while !ended.load(Ordering::Relaxed) {
            if let Ok((len, from)) = socket.recv_from(&mut buffer) {
                socket.send_to(&buffer[..len], from)?;
            }
        }
        Ok(())
    });
    let to = port.recv_timeout(PATIENCE).context("the server did not start")?;
    let times = join(within(pair.sender(), move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(to)?;
        // What is lost under load counts as this long.
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        let (mut times, mut number, start) = (Vec::new(), 0u64, Instant::now());
        while start.elapsed() < time {
            let (asked, mut buffer) = (Instant::now(), [7; REQUEST]);
            number += 1;
            buffer[..8].copy_from_slice(&number.to_be_bytes());
            socket.send(&buffer)?;
            let mut answer = [0; REQUEST];
            // An answer to an earlier one is late, not ours.
            while socket.recv(&mut answer).is_ok() && answer[..8] != buffer[..8] {}
            times.push(asked.elapsed());
        }
        Ok(times)
    }));
    done.store(true, Ordering::Relaxed);
    join(server)?;
    percentiles(names, times?)
}
