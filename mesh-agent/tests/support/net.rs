//! Sockets inside namespaces, without any tool.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd as _,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::sched::{CloneFlags, setns};

/// How long silence has to last to be one.
const SILENCE: Duration = Duration::from_millis(1500);

/// How long what must come may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sockets get the cgroup that the process has when they are made; only one of the tests' threads makes some at a time.
static CGROUP: Mutex<()> = Mutex::new(());

/// Runs something in a network namespace.
pub(crate) fn inside<T: Send + 'static>(netns: &str, f: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = File::open(format!("/run/netns/{netns}")).unwrap();
    std::thread::spawn(move || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        f()
    })
    .join()
    .unwrap()
}

/// Something that echoes what it gets, for as long as the test runs.
pub(crate) struct Echo {
    /// How many connections it has accepted.
    accepted: Arc<AtomicUsize>,
}

impl Echo {
    pub(crate) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

/// Listens in a namespace; its socket belongs to `cgroup` where one is named.
pub(crate) fn echo(netns: &str, address: SocketAddr, cgroup: Option<&Path>) -> Echo {
    let cgroup = cgroup.map(Path::to_owned);
    let listener = inside(netns, move || {
        let _alone = CGROUP.lock().unwrap_or_else(PoisonError::into_inner);
        match cgroup {
            None => TcpListener::bind(address),
            Some(cgroup) => {
                let home = own_cgroup(&cgroup);
                join(&cgroup);
                let listener = TcpListener::bind(address);
                join(&home);
                listener
            }
        }
        .unwrap()
    });
    let accepted = Arc::new(AtomicUsize::new(0));
    let count = accepted.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            count.fetch_add(1, Ordering::SeqCst);
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok(length @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..length]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    Echo { accepted }
}

fn own_cgroup(below: &Path) -> std::path::PathBuf {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap();
    let own = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap();
    below.parent().unwrap().join(own)
}

fn join(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).unwrap();
}

/// Opens a connection; `None` where nobody answers in time.
pub(crate) fn connect(netns: &str, address: SocketAddr) -> Option<Connection> {
    let stream = inside(netns, move || {
        let _alone = CGROUP.lock().unwrap_or_else(PoisonError::into_inner);
        TcpStream::connect_timeout(&address, SILENCE)
    });
    match stream {
        Ok(stream) => {
            stream.set_read_timeout(Some(SILENCE)).unwrap();
            Some(Connection { stream, next: 0 })
        }
        Err(error) => {
            assert!(
                matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock),
                "not silence: {error}"
            );
            None
        }
    }
}

/// Opens a connection that must be possible, if not at once.
pub(crate) fn open(netns: &str, address: SocketAddr) -> Connection {
    let mut opened = None;
    super::eventually("a connection", || {
        opened = connect(netns, address);
        opened.is_some()
    });
    opened.unwrap()
}

/// A connection to an [`Echo`].
pub(crate) struct Connection {
    stream: TcpStream,
    next: u8,
}

impl Connection {
    /// The address of this end.
    pub(crate) fn local_address(&self) -> SocketAddr {
        self.stream.local_addr().unwrap()
    }

    /// Whether something comes back, however slow the machine is.
    pub(crate) fn lives(&mut self) -> bool {
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let lives = self.answers();
        self.stream.set_read_timeout(Some(SILENCE)).unwrap();
        lives
    }

    /// Whether something comes back in time.
    pub(crate) fn answers(&mut self) -> bool {
        self.next = self.next.wrapping_add(1);
        self.stream.write_all(&[self.next]).unwrap();
        let mut byte = [0];
        // What came late is not what was sent now.
        loop {
            match self.stream.read(&mut byte) {
                Ok(1) if byte[0] == self.next => return true,
                Ok(1) => {}
                Ok(_) => panic!("the connection was closed"),
                Err(error) if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                    return false;
                }
                Err(error) => panic!("the connection broke: {error}"),
            }
        }
    }
}
