//! The engine's UNIX sockets: one per device for the configuration protocol, one for the engine itself.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    os::unix::{
        fs::PermissionsExt as _,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zeroize::Zeroizing;

use super::{
    configure,
    device::Device,
    readers::{Reader, Stop},
};
use crate::uapi::{self, Request};

/// Bytes of the largest request that is read: 60,000 peers.
const REQUEST_LIMIT: u64 = 16 * 1024 * 1024;

/// What a successor begins with.
pub(super) const HANDOVER: &str = "handover ";

/// How long a client may stay silent.
const IDLE: Duration = Duration::from_secs(30);

/// A socket that is served until this is dropped; then its file is removed.
pub(super) struct Served {
    path: PathBuf,
    listener: Arc<UnixListener>,
    serve: Arc<Serve>,
    reader: Option<Reader>,
    /// A successor serves the socket.
    given_up: bool,
}

impl Served {
    /// Serves `path`, a thread per connection. A file left behind by a dead process is replaced.
    pub(super) fn start(
        path: &Path,
        serve: impl Fn(UnixStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        Self::adopt(path, listen(path)?, serve)
    }

    /// Serves a socket that listens already.
    pub(super) fn adopt(
        path: &Path,
        listener: UnixListener,
        serve: impl Fn(UnixStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let mut served = Self {
            path: path.into(),
            listener: Arc::new(listener),
            serve: Arc::new(serve),
            reader: None,
            given_up: false,
        };
        served.resume()?;
        Ok(served)
    }

    /// Takes no more connections: who connects waits.
    pub(super) fn pause(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.stop();
        }
    }

    /// Takes connections again.
    pub(super) fn resume(&mut self) -> io::Result<()> {
        let (listener, serve) = (Arc::clone(&self.listener), Arc::clone(&self.serve));
        let reader = Reader::start("control", move |stop| accept(&listener, &stop, &serve))?;
        self.reader = Some(reader);
        Ok(())
    }

    /// The socket, for a successor.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.listener.as_fd().try_clone_to_owned()
    }

    /// Leaves the socket and its file to a successor.
    pub(super) fn give_up(mut self) {
        self.given_up = true;
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // First the file, so that nobody connects to what nobody serves.
        if !self.given_up {
            let _ = fs::remove_file(&self.path);
        }
        if let Some(reader) = self.reader.take() {
            reader.stop();
        }
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    match UnixStream::connect(path) {
        Ok(_) => {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process serves this socket",
            ));
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

type Serve = dyn Fn(UnixStream) -> io::Result<()> + Send + Sync;

fn accept(listener: &UnixListener, stop: &Stop, serve: &Arc<Serve>) {
    loop {
        let mut fds = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        let polled = poll(&mut fds, PollTimeout::NONE);
        if polled.is_ok() && fds[1].revents().is_some_and(|events| !events.is_empty()) {
            return;
        }
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        let serve = Arc::clone(serve);
        let spawned = std::thread::Builder::new()
            .name("connection".into())
            .spawn(move || {
                // Clients that go away in the middle are no concern of ours.
                if let Err(error) = prepare(&stream).and_then(|()| serve(stream)) {
                    tracing::debug!(%error, "configuration connection ended");
                }
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "a configuration connection was refused: no thread for it");
        }
    }
}

fn prepare(stream: &UnixStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))
}

/// Serves the configuration protocol of a device, as long as the engine has it.
pub(super) fn serve_device(device: &Weak<Device>, stream: UnixStream) -> io::Result<()> {
    let mut writer = stream.try_clone()?;
    let mut reader = Wiping::new(stream);
    while let Some(request) = read_request(&mut reader)? {
        let Some(device) = device.upgrade() else {
            return Ok(());
        };
        let answer = answer(&device, &request);
        drop(request);
        crate::wipe_stack();
        match answer {
            Some(answer) => writer.write_all(answer.as_bytes())?,
            // Let go of, perhaps to a successor: whoever asks again finds out.
            None => return Ok(()),
        }
    }
    Ok(())
}

/// A buffered reader whose buffer is wiped at its end: requests carry private keys.
struct Wiping<R> {
    inner: R,
    buffer: Zeroizing<Vec<u8>>,
    /// What has been read and not been taken.
    filled: std::ops::Range<usize>,
}

impl<R> Wiping<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            buffer: Zeroizing::new(vec![0; 8192]),
            filled: 0..0,
        }
    }
}

impl<R: Read> Read for Wiping<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.read(out)?;
        self.consume(length);
        Ok(length)
    }
}

impl<R: Read> BufRead for Wiping<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.filled.is_empty() {
            self.filled = 0..self.inner.read(&mut self.buffer)?;
        }
        Ok(&self.buffer[self.filled.clone()])
    }

    fn consume(&mut self, length: usize) {
        self.filled.start = (self.filled.start + length).min(self.filled.end);
    }
}

/// `None` where the device was let go of meanwhile.
fn answer(device: &Arc<Device>, request: &str) -> Option<Zeroizing<String>> {
    let refused = |error: &dyn std::fmt::Display, errno| {
        tracing::warn!(device = device.name, %error, "a configuration request was refused; nothing was changed");
        finish(Zeroizing::default(), errno)
    };
    let answer = match uapi::parse_request(request) {
        Ok(Request::Get) => finish(uapi::format_view(&configure::view(device)), 0),
        Ok(Request::Set(request)) => match configure::set(device, *request) {
            Ok(()) => finish(Zeroizing::default(), 0),
            Err(_) if device.is_closed() => return None,
            Err(error) => refused(&error, error.raw_os_error().unwrap_or(libc::EIO)),
        },
        Err(error) => refused(&error, libc::EINVAL),
    };
    (!device.is_closed()).then_some(answer)
}

fn finish(mut text: Zeroizing<String>, errno: i32) -> Zeroizing<String> {
    // `wg` expects errors as the kernel's system calls return them: negative.
    text.push_str(&format!("errno={}\n\n", -errno));
    text
}

/// The lines of one request, up to its empty line; `None` at the end of the stream.
pub(super) fn read_request(reader: &mut impl BufRead) -> io::Result<Option<Zeroizing<String>>> {
    let mut text = Zeroizing::new(String::new());
    let mut limited = reader.take(REQUEST_LIMIT);
    loop {
        let start = text.len();
        // Grown by hand, so that no copy of a key is left behind when the text moves.
        reserve(&mut text);
        match limited.read_line(&mut text) {
            Ok(0) if limited.limit() == 0 => {
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, "request too large"));
            }
            Ok(0) if start == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            // Not UTF-8: no request either. The rest of the stream cannot be told apart from it.
            Err(error) => return Err(error),
        }
        if matches!(&text[start..], "\n" | "\r\n") {
            text.truncate(start);
            if start > 0 {
                return Ok(Some(text));
            }
        }
    }
}

fn reserve(text: &mut Zeroizing<String>) {
    const STEP: usize = 4096;
    if text.capacity() - text.len() < STEP {
        let mut larger = Zeroizing::new(String::with_capacity((text.capacity() * 2).max(2 * STEP)));
        larger.push_str(text);
        *text = larger;
    }
}

/// Serves the engine's own requests: a line each, answered by `answer` with a JSON object. `handover` takes the
/// connection of a successor, which says nothing more before it is answered, with what follows the word.
pub(super) fn serve_engine(
    stream: UnixStream,
    answer: impl Fn(&str) -> serde_json::Value,
    handover: impl FnOnce(&UnixStream, &str) -> io::Result<()>,
) -> io::Result<()> {
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream.try_clone()?).take(REQUEST_LIMIT);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        if let Some(request) = line.strip_prefix(HANDOVER) {
            return handover(&stream, request.trim());
        }
        let mut text = answer(line.trim()).to_string();
        text.push('\n');
        writer.write_all(text.as_bytes())?;
        line.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wiping_reader_reads_like_any_other() {
        let text: Vec<u8> = (0..30_000_u32)
            .flat_map(|number| format!("{number}\n").into_bytes())
            .collect();
        let lines: Vec<String> = Wiping::new(text.as_slice()).lines().map(Result::unwrap).collect();
        assert_eq!(lines.len(), 30_000);
        assert!(
            (0..)
                .zip(&lines)
                .all(|(number, line): (u32, _)| *line == number.to_string())
        );
        let mut all = Vec::new();
        Wiping::new(text.as_slice()).read_to_end(&mut all).unwrap();
        assert_eq!(all, text);
    }

    #[test]
    fn requests_are_cut_at_empty_lines() {
        let mut stream: &[u8] = b"\nget=1\n\nset=1\nlisten_port=1\r\n\r\nget=1\n";
        assert_eq!(read_request(&mut stream).unwrap().unwrap().as_str(), "get=1\n");
        assert_eq!(
            read_request(&mut stream).unwrap().unwrap().as_str(),
            "set=1\nlisten_port=1\r\n"
        );
        assert!(
            read_request(&mut stream).is_err(),
            "a request without its empty line"
        );
        assert!(read_request(&mut &b""[..]).unwrap().is_none());
        assert!(read_request(&mut &b"\xff\xfe\n\n"[..]).is_err());
    }

    #[test]
    fn a_socket_is_not_taken_from_a_living_process_but_from_a_dead_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("warren0.sock");
        let served = Served::start(&path, |_| Ok(())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(listen(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(served);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "left behind");
        listen(&path).unwrap();
    }
}
