//! The threads that read a device's TUN device and sockets.

use std::{
    io,
    net::UdpSocket,
    os::fd::{AsFd, BorrowedFd},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{device::Device, drops::DropReason, incoming::Intake, outgoing::Outbox, peer, udp::Sockets};

/// The threads that read a device's sockets.
#[derive(Default)]
pub(super) struct Readers(Vec<Reader>);

/// A thread that ends when this is stopped or dropped.
pub(super) struct Reader {
    /// The other end reads end-of-file when this is closed.
    stop: UnixStream,
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Tells a thread when to end.
pub(super) struct Stop {
    stream: UnixStream,
    stopping: Arc<AtomicBool>,
}

impl Stop {
    /// For a thread that always has something to do: whether to end. Cheap.
    pub(super) fn requested(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Waits that long, or until the end is asked for. Whether to go on.
    pub(super) fn wait(&self, time: std::time::Duration) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, time) {
            Ok(ready) => ready == 0,
            Err(error) => error == nix::errno::Errno::EINTR,
        }
    }
}

/// Readable when the thread shall end.
impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Reader {
    /// Runs `body` with a descriptor that becomes readable when it shall end.
    pub(super) fn start(name: &str, body: impl FnOnce(Stop) + Send + 'static) -> io::Result<Self> {
        let (stop, stream) = UnixStream::pair()?;
        let stopping = Arc::new(AtomicBool::new(false));
        let seen = Stop {
            stream,
            stopping: Arc::clone(&stopping),
        };
        // The kernel cuts thread names at 15 bytes.
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || body(seen))?;
        Ok(Self {
            stop,
            stopping,
            thread,
        })
    }

    /// Asks the thread to end, and goes on.
    pub(super) fn ask(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        // Fails for a thread that has ended.
        let _ = self.stop.shutdown(std::net::Shutdown::Both);
    }

    pub(super) fn stop(self) {
        self.ask();
        // It ended either way: a thread that panics ends the process.
        let _ = self.thread.join();
    }
}

impl Readers {
    /// Starts to read sockets.
    pub(super) fn start(device: &Arc<Device>, sockets: &Sockets) -> io::Result<Self> {
        let mut readers = Self::default();
        for socket in sockets.each() {
            let (device, socket) = (Arc::clone(device), Arc::clone(socket));
            let name = format!("{}-udp", device.name);
            readers.0.push(Reader::start(&name, move |stop| {
                read_socket(&device, &socket, &stop)
            })?);
        }
        Ok(readers)
    }

    /// Asks the threads to end, and goes on.
    pub(super) fn ask(&self) {
        for reader in &self.0 {
            reader.ask();
        }
    }

    /// Waits for the threads to end. Must not be called with the device's state locked.
    pub(super) fn stop(self) {
        self.ask();
        for reader in self.0 {
            reader.stop();
        }
    }
}

fn read_socket(device: &Device, socket: &UdpSocket, stop: &Stop) {
    let mut intake = Intake::new();
    while !stop.requested() {
        match intake.receive(device, socket) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !wait(socket.as_fd(), stop) {
                    return;
                }
            }
            // Other errors are those of earlier sends (ICMP): reported once, they mean nothing here.
            Ok(()) | Err(_) => {}
        }
    }
}

/// Reads the TUN device until it is gone or the thread is stopped. Whether it is gone.
pub(super) fn read_tun(device: &Device, stop: &Stop) -> bool {
    let mut outbox = Outbox::new();
    let mut buffer = peer::buffer();
    loop {
        if stop.requested() {
            outbox.flush(device);
            return false;
        }
        match device.tun.read(&mut buffer) {
            Ok(Some((header, packet))) => outbox.take(device, header, packet),
            Ok(None) => device.counters.drop(DropReason::OffloadMalformed),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                outbox.flush(device);
                if !wait(device.tun.as_fd(), stop) {
                    return false;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // EBADFD: the link was deleted. EIO and the rest: no packet will ever come again.
            Err(_) => return true,
        }
    }
}

/// Waits until there is something to read. Whether to go on.
fn wait(fd: BorrowedFd<'_>, stop: &Stop) -> bool {
    let mut fds = [
        PollFd::new(fd, PollFlags::POLLIN),
        PollFd::new(stop.as_fd(), PollFlags::POLLIN),
    ];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return false,
            Ok(_) => return fds[1].revents().is_none_or(|events| events.is_empty()),
        }
    }
}
