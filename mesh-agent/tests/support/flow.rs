//! Numbered packets between pods, of which none may be lost or come twice.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{Pod, net::inside};

/// Packets in a second.
const RATE: u64 = 250;

/// A flow in one direction.
pub(crate) struct Flow {
    name: String,
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    /// How often each number came.
    seen: Arc<Mutex<Vec<u8>>>,
    sender: Option<JoinHandle<()>>,
}

/// Flows in both directions and both families.
pub(crate) fn between(first: &Pod, second: &Pod) -> Vec<Flow> {
    [(first, second), (second, first)]
        .into_iter()
        .flat_map(|(from, to)| [&to.v4, &to.v6].map(|address| Flow::start(from, to, address)))
        .collect()
}

impl Flow {
    /// Sends from one pod to another until it is stopped.
    pub(crate) fn start(from: &Pod, to: &Pod, address: &str) -> Self {
        let target = SocketAddr::new(address.parse().unwrap(), 0);
        let any: SocketAddr = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }
            .parse()
            .unwrap();
        let receiver = inside(&to.netns, move || UdpSocket::bind(target).unwrap());
        let target = receiver.local_addr().unwrap();
        let socket = inside(&from.netns, move || UdpSocket::bind(any).unwrap());
        receiver
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let seen: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (ended, marks) = (Arc::downgrade(&stop), seen.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while ended.strong_count() > 0 {
                let Ok(8) = receiver.recv(&mut buffer) else {
                    continue;
                };
                let number = u64::from_be_bytes(buffer[..8].try_into().unwrap()) as usize;
                let mut marks = marks.lock().unwrap_or_else(PoisonError::into_inner);
                let length = marks.len().max(number + 1);
                marks.resize(length, 0);
                marks[number] = marks[number].saturating_add(1);
            }
        });
        let (stopped, count) = (stop.clone(), sent.clone());
        let sender = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                let number = count.load(Ordering::SeqCst);
                socket.send_to(&number.to_be_bytes(), target).unwrap();
                count.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros(1_000_000 / RATE));
            }
        });
        Self {
            name: format!("{} to {target}", from.netns),
            stop,
            sent,
            seen,
            sender: Some(sender),
        }
    }

    /// Stops, and waits until everything has come, once.
    pub(crate) fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.sender.take().unwrap().join().unwrap();
        let sent = self.sent.load(Ordering::SeqCst);
        let lost = || -> Vec<usize> {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            (0..sent as usize)
                .filter(|number| seen.get(*number).is_none_or(|count| *count == 0))
                .collect()
        };
        let patience = Instant::now() + Duration::from_secs(10);
        while !lost().is_empty() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(lost().is_empty(), "{}: of {sent} lost {:?}", self.name, lost());
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(
            seen.iter().all(|count| *count == 1),
            "{}: packets came twice",
            self.name
        );
        sent
    }
}
