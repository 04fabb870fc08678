//! Private network namespaces: they end with their threads, also on panic.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::allow_attributes,
    reason = "each test binary uses its own part"
)]

use std::{
    future::Future,
    net::{IpAddr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    thread::JoinHandle,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use warren_net::netns;

/// Runs a test on a thread with a network namespace of its own.
pub fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        ip("link set lo up");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("runtime");
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Another namespace, held by a thread as long as this value lives.
pub struct Namespace {
    path: PathBuf,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    pub fn new() -> Self {
        let (stop, stopped) = mpsc::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            ip("link set lo up");
            ready.send(nix::unistd::gettid()).expect("the test waits");
            let _ = stopped.recv();
        });
        let tid = is_ready.recv().expect("the thread tells its id");
        let path = PathBuf::from(format!("/proc/{}/task/{tid}/ns/net", std::process::id()));
        Self {
            path,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` inside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::run_in(&self.path, work).expect("enter the namespace")
    }

    /// Runs `ip` inside.
    pub fn ip(&self, arguments: &str) {
        self.run(|| ip(arguments));
    }

    /// A socket of this namespace, bound, with a read timeout.
    pub fn udp(&self, address: &str) -> UdpSocket {
        self.run(|| udp(address))
    }

    /// Id of the thread that holds the namespace, by which `ip` finds it.
    pub fn tid(&self) -> &str {
        self.path
            .iter()
            .nth(4)
            .and_then(|part| part.to_str())
            .expect("path of a thread")
    }

    /// Moves a device of the calling thread's namespace in here.
    pub fn take(&self, device: &str) {
        ip(&format!("link set {device} netns {}", self.tid()));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn udp(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("bind {address}: {error}"));
    socket
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("timeout");
    socket
}

/// Sends a datagram and returns the source that the receiver sees.
pub fn deliver(from: &UdpSocket, to: &UdpSocket, address: &str) -> SocketAddr {
    from.send_to(b"x", address)
        .unwrap_or_else(|error| panic!("send to {address}: {error}"));
    let mut buffer = [0; 16];
    let (_, source) = to
        .recv_from(&mut buffer)
        .unwrap_or_else(|error| panic!("nothing at {address}: {error}"));
    source
}

pub fn source(from: &UdpSocket, to: &UdpSocket, address: &str) -> IpAddr {
    deliver(from, to, address).ip()
}

/// Runs a tool on this thread's namespace and returns what it wrote.
pub fn run(tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(tool)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{tool}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {}: {said}", arguments.join(" "));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn ip(arguments: &str) -> String {
    run("ip", &arguments.split_whitespace().collect::<Vec<_>>())
}

/// Feeds a script to `nft`.
pub fn nft(script: &str) {
    run("nft", &[script]);
}

/// Sets a kernel setting of this thread's namespace.
pub fn sysctl(key: &str, value: &str) {
    warren_net::set_sysctl(key, value).unwrap_or_else(|error| panic!("{error}"));
}
