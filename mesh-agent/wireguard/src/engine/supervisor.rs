//! Which devices the engine serves, and its life from start to signal.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::Ordering,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{SigSet, Signal},
};
use serde_json::{Value, json};

use super::{
    ENGINE_SOCKET, EngineConfig, EngineError, Implementation,
    control::{self, Served},
    device::Device,
    peer,
    readers::{self, Reader},
};

/// How often timers run. WireGuard's own are whole seconds.
const TICK: Duration = Duration::from_millis(100);

/// How often the engine looks for devices that it shall serve, for changed MTUs and for what the kernel dropped.
const SCAN: Duration = Duration::from_secs(1);

/// Holds the run directory: locked as long as the process lives.
const LOCK_FILE: &str = "warren-engine.lock";

enum Event {
    /// This device, attached with this number, was deleted.
    Gone(String, u64),
    Stop,
}

struct Engine {
    run_dir: PathBuf,
    implementation: Implementation,
    wanted: Vec<String>,
    events: Sender<Event>,
    devices: Mutex<Devices>,
}

#[derive(Default)]
struct Devices {
    attached: BTreeMap<String, Attached>,
    /// Let go of on request: not attached again on our own.
    released: BTreeSet<String>,
    /// The last complaint per device, so that each is logged once.
    complaints: BTreeMap<String, String>,
    /// Tells a device from a later one of the same name.
    count: u64,
}

struct Attached {
    number: u64,
    device: Arc<Device>,
    tun: Reader,
    _served: Served,
}

/// Serves devices until SIGTERM or SIGINT.
///
/// To be called from the main thread before any other is started: signals are blocked for all threads from here on.
/// Changes the process: it is not dumpable any more (no core dumps, P8), its file mode mask is 077, and a panic in
/// any thread ends it.
pub fn run(config: EngineConfig) -> Result<(), EngineError> {
    let start = |error: nix::errno::Errno| EngineError::Start(error.into());
    nix::sys::prctl::set_dumpable(false).map_err(start)?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().map_err(start)?;
    end_on_panic();

    let _lock = lock(&config.run_dir)?;
    let (events, received) = mpsc::channel();
    let engine = Arc::new(Engine {
        run_dir: config.run_dir,
        implementation: config.implementation,
        wanted: config.devices,
        events: events.clone(),
        devices: Mutex::default(),
    });
    let socket = engine.run_dir.join(ENGINE_SOCKET);
    let answering = Arc::clone(&engine);
    let served = Served::start(&socket, move |stream| {
        control::serve_engine(stream, |line| answering.answer(line))
    })
    .map_err(|source| EngineError::Path { path: socket, source })?;
    let ticking = Arc::clone(&engine);
    let timers = Reader::start("timers", move |stop| ticking.tick(&stop)).map_err(EngineError::Start)?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if signals.wait().is_ok() {
                // The receiver is gone only when the engine has ended.
                let _ = events.send(Event::Stop);
            }
        })
        .map_err(EngineError::Start)?;

    tracing::info!(run_dir = %engine.run_dir.display(), devices = ?engine.wanted, "tunnel engine started");
    engine.supervise(&received);
    drop(served);
    timers.stop();
    engine.detach_all();
    tracing::info!("tunnel engine stopped");
    Ok(())
}

/// A thread that is missing would stop traffic in silence.
fn end_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}

fn lock(run_dir: &Path) -> Result<Flock<fs::File>, EngineError> {
    let path = run_dir.join(LOCK_FILE);
    let failed = |path: &Path, source| EngineError::Path {
        path: path.into(),
        source,
    };
    fs::create_dir_all(run_dir).map_err(|source| failed(run_dir, source))?;
    let file = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|source| failed(&path, source))?;
    let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => EngineError::AlreadyRunning(run_dir.into()),
        errno => failed(&path, errno.into()),
    })?;
    // For a person who looks; nothing reads it.
    let _ = lock
        .set_len(0)
        .and_then(|()| writeln!(lock, "{}", std::process::id()));
    Ok(lock)
}

impl Engine {
    fn lock(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn supervise(&self, events: &Receiver<Event>) {
        loop {
            self.scan();
            match events.recv_timeout(SCAN) {
                Ok(Event::Gone(name, number)) => self.lost(&name, number),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Attaches to wanted devices that have appeared, and refreshes those it has.
    fn scan(&self) {
        let mut devices = self.lock();
        for attached in devices.attached.values() {
            attached.device.refresh();
        }
        for name in &self.wanted {
            let exists = nix::net::if_::if_nametoindex(name.as_str()).is_ok();
            if !exists || devices.attached.contains_key(name) || devices.released.contains(name) {
                continue;
            }
            if let Err(error) = self.attach_locked(&mut devices, name)
                && devices.complaints.insert(name.clone(), error.clone()).as_ref() != Some(&error)
            {
                tracing::warn!(
                    device = name,
                    error,
                    "cannot attach to the device; will try again"
                );
            }
        }
    }

    fn attach_locked(&self, devices: &mut Devices, name: &str) -> Result<(), String> {
        if devices.attached.contains_key(name) {
            return Ok(());
        }
        let device = Device::open(name, self.implementation).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => format!("{name} is in use by another process; stop it or wait for it"),
            Some(libc::EINVAL) => format!("{name} exists and is no TUN device with one queue; delete it"),
            _ => format!("{name} cannot be opened as a TUN device: {error}"),
        })?;
        let device = Arc::new(device);
        let path = self.run_dir.join(format!("{name}.sock"));
        // Open connections must not keep the TUN device open once we let go of it.
        let serving = Arc::downgrade(&device);
        let served = Served::start(&path, move |stream| control::serve_device(&serving, stream))
            .map_err(|error| format!("{}: {error}", path.display()))?;
        devices.count += 1;
        let number = devices.count;
        let (reading, events) = (Arc::clone(&device), self.events.clone());
        let tun = Reader::start(&format!("{name}-tun"), move |stop| {
            if readers::read_tun(&reading, &stop) {
                let _ = events.send(Event::Gone(reading.name.clone(), number));
            }
        })
        .map_err(|error| format!("no thread for {name}: {error}"))?;
        devices.attached.insert(
            name.into(),
            Attached {
                number,
                device,
                tun,
                _served: served,
            },
        );
        devices.released.remove(name);
        devices.complaints.remove(name);
        tracing::info!(device = name, "attached");
        Ok(())
    }

    fn lost(&self, name: &str, number: u64) {
        let mut devices = self.lock();
        if devices
            .attached
            .get(name)
            .is_some_and(|attached| attached.number == number)
        {
            tracing::warn!(
                device = name,
                "the device was deleted; it is served again when it is back"
            );
            detach(devices.attached.remove(name));
        }
    }

    fn detach_all(&self) {
        let attached = std::mem::take(&mut self.lock().attached);
        for attached in attached.into_values() {
            detach(Some(attached));
        }
    }

    /// Runs all devices' timers until told to stop.
    fn tick(&self, stop: &std::os::unix::net::UnixStream) {
        let mut out = peer::buffer();
        // Nothing is ever written to the other end: a read ends with the tick, or with end-of-file.
        if stop.set_read_timeout(Some(TICK)).is_err() {
            return;
        }
        loop {
            match io::Read::read(&mut &*stop, &mut [0]) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                _ => return,
            }
            let devices: Vec<_> = self
                .lock()
                .attached
                .values()
                .map(|attached| Arc::clone(&attached.device))
                .collect();
            for device in devices {
                device.tick(Instant::now(), &mut out);
            }
        }
    }

    /// Answers one request to the engine.
    fn answer(&self, line: &str) -> Value {
        let mut words = line.split_whitespace();
        let request = (words.next(), words.next(), words.next());
        let result = match request {
            (Some("ping"), None, None) => Ok(json!({ "pid": std::process::id() })),
            (Some("list"), None, None) => {
                Ok(json!({ "devices": self.lock().attached.keys().collect::<Vec<_>>() }))
            }
            (Some("attach"), Some(name), None) => self.attach(name),
            (Some("detach"), Some(name), None) => self.release(name),
            (Some("stats"), Some(name), None) => self.with(name, stats),
            (Some("rekey"), Some(name), None) => self.with(name, |device| {
                device.rekey();
                json!({})
            }),
            _ => Err("expected: ping | list | attach NAME | detach NAME | stats NAME | rekey NAME".into()),
        };
        result.unwrap_or_else(|error| json!({ "error": error }))
    }

    fn attach(&self, name: &str) -> Result<Value, String> {
        // The name becomes that of a file.
        if name.contains('/') || name.starts_with('.') || name.len() > 15 {
            return Err(
                "a device name has 1 to 15 characters, no slash, and does not begin with a dot".into(),
            );
        }
        self.attach_locked(&mut self.lock(), name).map(|()| json!({}))
    }

    fn release(&self, name: &str) -> Result<Value, String> {
        let mut devices = self.lock();
        devices.released.insert(name.into());
        detach(devices.attached.remove(name));
        Ok(json!({}))
    }

    fn with(&self, name: &str, action: impl FnOnce(&Device) -> Value) -> Result<Value, String> {
        let device = self
            .lock()
            .attached
            .get(name)
            .map(|attached| Arc::clone(&attached.device));
        device
            .map(|device| action(&device))
            .ok_or_else(|| format!("{name} is not served by this engine; attach it first"))
    }
}

fn detach(attached: Option<Attached>) {
    let Some(Attached {
        device,
        tun,
        _served: served,
        ..
    }) = attached
    else {
        return;
    };
    drop(served);
    tun.stop();
    device.close();
    tracing::info!(device = device.name, "detached");
}

fn stats(device: &Device) -> Value {
    device.refresh();
    let counters = &device.counters;
    let drops: BTreeMap<_, _> = counters.drops().collect();
    json!({
        "handshakes": counters.handshakes.load(Ordering::Relaxed),
        "sent_packets": counters.sent.load(Ordering::Relaxed),
        "received_packets": counters.received.load(Ordering::Relaxed),
        "drops": drops,
        "offloads": device.offloads(),
    })
}
