//! Packet capture on the underlay, outside the nodes: a packet socket in the underlay's namespace that sees
//! every bridge port. A frame is counted once, where it leaves a node.

mod classify;
mod socket;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

pub use classify::{Class, Mesh, classify};
pub use socket::Injector;

use crate::lab::Place;

/// What was seen so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// WireGuard: UDP between nodes on one of its ports, fragments included.
    pub encrypted: u64,
    /// Mesh traffic in clear: a pod's address at one end, a pod's or node's at the other.
    pub plaintext: u64,
    /// `keyd` and API server.
    pub control: u64,
    /// ARP and neighbour discovery.
    pub neighbour: u64,
    /// All the rest.
    pub other: u64,
    /// Packets in clear by the bridge port where they left a node.
    pub plaintext_by_port: BTreeMap<String, u64>,
    /// The first few packets in clear, a line each.
    pub plaintext_samples: Vec<String>,
}

impl Counts {
    fn add(&mut self, class: Class, port: &str, describe: impl FnOnce() -> String) {
        match class {
            Class::Encrypted => self.encrypted += 1,
            Class::Control => self.control += 1,
            Class::Neighbour => self.neighbour += 1,
            Class::Other => self.other += 1,
            Class::Plaintext => {
                self.plaintext += 1;
                *self.plaintext_by_port.entry(port.to_owned()).or_default() += 1;
                if self.plaintext_samples.len() < 8 {
                    self.plaintext_samples.push(describe());
                }
            }
        }
    }
}

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    counts: Arc<Mutex<Counts>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<Result<()>>>,
    control: socket::Statistics,
}

impl Capture {
    /// Starts in the namespace of `underlay`.
    pub fn start(underlay: &Place, mesh: Mesh) -> Result<Self> {
        let ports: BTreeMap<usize, String> = socket::ports(underlay)?;
        ensure!(!ports.is_empty(), "the underlay has no ports to capture on");
        let (receiver, control) = socket::Receiver::open(underlay)?;
        let counts = Arc::new(Mutex::new(Counts::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&counts), Arc::clone(&stop));
        let underlay = underlay.clone();
        let reader = thread::spawn(move || read(&receiver, &underlay, ports, &mesh, &shared, &stopped));
        Ok(Self {
            counts,
            stop,
            reader: Some(reader),
            control,
        })
    }

    /// What was seen so far.
    pub fn counts(&self) -> Counts {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Stops and returns what was seen. An error if the kernel had to drop packets: then zero would prove nothing.
    pub fn finish(mut self) -> Result<Counts> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            reader
                .join()
                .map_err(|_| anyhow::anyhow!("the capture panicked"))??;
        }
        let lost = self
            .control
            .lost()
            .context("cannot read the capture's statistics")?;
        ensure!(
            lost == 0,
            "the capture missed {lost} packets: its figures prove nothing"
        );
        Ok(self.counts())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn read(
    receiver: &socket::Receiver,
    underlay: &Place,
    mut ports: BTreeMap<usize, String>,
    mesh: &Mesh,
    counts: &Mutex<Counts>,
    stop: &AtomicBool,
) -> Result<()> {
    let mut buffer = [0; 512];
    loop {
        let Some(frame) = receiver.next(&mut buffer)? else {
            // Nothing is waiting any more: everything sent before the stop has been counted.
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            continue;
        };
        // Outgoing copies were counted when they came in at the sender's port.
        if frame.outgoing {
            continue;
        }
        if !ports.contains_key(&frame.interface) {
            ports = socket::ports(underlay)?;
        }
        let Some(port) = ports.get(&frame.interface) else {
            continue;
        };
        let bytes = &buffer[..frame.length];
        let class = classify(mesh, bytes);
        counts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(class, port, || {
                format!("{port}: {}", classify::describe(mesh, bytes))
            });
    }
}
