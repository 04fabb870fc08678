//! Which devices the engine serves, and its life from start to signal, or to its successor.

mod offer;
mod succeed;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

use super::{
    ENGINE_SOCKET, EngineConfig, EngineError, Implementation,
    control::{self, Served},
    device::Device,
    peer,
    readers::{self, Reader, Stop},
    stamp_clock,
};
use succeed::{Claim, Inherited, InheritedDevice};

/// How often timers run. WireGuard's own are whole seconds.
const TICK: Duration = Duration::from_millis(100);

/// How often the engine looks for devices that it shall serve, for changed MTUs and for what the kernel dropped.
const SCAN: Duration = Duration::from_secs(1);

/// Holds the run directory: locked as long as the engine lives, or its successor.
const LOCK_FILE: &str = "warren-engine.lock";

enum Event {
    /// This device, attached with this number, was deleted.
    Gone(String, u64),
    /// A successor has everything.
    HandedOver,
    Stop,
}

struct Engine {
    run_dir: PathBuf,
    implementation: Implementation,
    wanted: Vec<String>,
    events: Sender<Event>,
    /// Held while timers run and while a handover goes on.
    timers: Mutex<()>,
    devices: Mutex<Devices>,
    /// The engine's own socket.
    control: Mutex<Option<Served>>,
    /// Locked as long as any process has it open.
    lock_file: Mutex<Option<File>>,
    /// How long packets waited when this engine took over from another.
    pause: Mutex<Option<Duration>>,
    /// A successor has everything.
    over: AtomicBool,
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
    tun: Option<Reader>,
    served: Served,
}

/// Serves devices until SIGTERM or SIGINT, or until a successor does. Takes over from an engine that serves the run
/// directory already.
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

    stamp_clock::start(config.clock_file.as_deref());
    let Claim { lock, inherited } = succeed::claim(&config)?;
    let (events, received) = mpsc::channel();
    let engine = Arc::new(Engine {
        run_dir: config.run_dir,
        implementation: config.implementation,
        wanted: config.devices,
        events: events.clone(),
        timers: Mutex::default(),
        devices: Mutex::default(),
        control: Mutex::default(),
        lock_file: Mutex::new(Some(lock)),
        pause: Mutex::default(),
        over: AtomicBool::new(false),
    });
    let listener = match inherited {
        Some(inherited) => Some(engine.inherit(inherited).map_err(EngineError::Start)?),
        None => None,
    };
    engine.serve(listener)?;
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
    if let End::HandedOver = engine.supervise(&received) {
        tracing::info!("a successor serves the devices");
        // Nothing but the request to end means anything here.
        while config.linger && !matches!(received.recv(), Ok(Event::Stop) | Err(_)) {}
        return Ok(());
    }
    let served = engine.served().take();
    drop(served);
    timers.stop();
    engine.detach_all();
    tracing::info!("tunnel engine stopped");
    Ok(())
}

/// Why an engine serves nothing any more.
enum End {
    Told,
    HandedOver,
}

/// A thread that is missing would stop traffic in silence.
fn end_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}

impl Engine {
    fn lock(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn served(&self) -> MutexGuard<'_, Option<Served>> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_file(&self) -> MutexGuard<'_, Option<File>> {
        self.lock_file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps timers from running, and requests that send.
    fn hold_timers(&self) -> MutexGuard<'_, ()> {
        self.timers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers requests to the engine, on a socket of its own or on that of its predecessor.
    fn serve(self: &Arc<Self>, listener: Option<UnixListener>) -> Result<(), EngineError> {
        let path = self.run_dir.join(ENGINE_SOCKET);
        let answering = Arc::clone(self);
        let serve = move |stream| {
            let handover = |stream: &_, request: &_| offer::offer(&answering, stream, request);
            control::serve_engine(stream, |line| answering.answer(line), handover)
        };
        let served = match listener {
            Some(listener) => Served::adopt(&path, listener, serve),
            None => Served::start(&path, serve),
        };
        let served = served.map_err(|source| EngineError::Path { path, source })?;
        *self.served() = Some(served);
        Ok(())
    }

    /// Goes on with what a predecessor has handed over. The socket to answer requests on.
    fn inherit(&self, inherited: Inherited) -> io::Result<UnixListener> {
        let devices = &mut *self.lock();
        let mut lost = Vec::new();
        for InheritedDevice {
            device,
            listener,
            lost: peers,
        } in inherited.devices
        {
            devices.count += 1;
            let (number, name) = (devices.count, device.name.clone());
            let mut readers = device.configure()?;
            device.start_readers(&mut readers)?;
            drop(readers);
            let attached = Attached {
                number,
                tun: Some(self.start_tun(&device, number)?),
                served: self.serve_device(&device, Some(listener))?,
                device: Arc::clone(&device),
            };
            devices.attached.insert(name, attached);
            lost.push((device, peers));
        }
        devices.released.extend(inherited.released);
        let pause = inherited.asked.elapsed();
        *self.pause.lock().unwrap_or_else(PoisonError::into_inner) = Some(pause);
        tracing::info!(?pause, "took over from another engine");
        for (device, peers) in lost {
            device.rekey(peers);
        }
        Ok(inherited.control)
    }

    /// Serves a device's configuration socket.
    fn serve_device(&self, device: &Arc<Device>, listener: Option<UnixListener>) -> io::Result<Served> {
        let path = self.run_dir.join(format!("{}.sock", device.name));
        // Open connections must not keep the TUN device open once we let go of it.
        let serving = Arc::downgrade(device);
        let serve = move |stream| control::serve_device(&serving, stream);
        match listener {
            Some(listener) => Served::adopt(&path, listener, serve),
            None => Served::start(&path, serve),
        }
    }

    /// Starts the thread that reads the TUN device.
    fn start_tun(&self, device: &Arc<Device>, number: u64) -> io::Result<Reader> {
        let (reading, events) = (Arc::clone(device), self.events.clone());
        Reader::start(&format!("{}-tun", device.name), move |stop| {
            if readers::read_tun(&reading, &stop) {
                // The receiver is gone only when the engine has ended.
                let _ = events.send(Event::Gone(reading.name.clone(), number));
            }
        })
    }

    fn supervise(&self, events: &Receiver<Event>) -> End {
        loop {
            stamp_clock::keep_ahead(Instant::now());
            self.scan();
            match events.recv_timeout(SCAN) {
                Ok(Event::Gone(name, number)) => self.lost(&name, number),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Event::HandedOver) => return End::HandedOver,
                Ok(Event::Stop) | Err(RecvTimeoutError::Disconnected) => return End::Told,
            }
        }
    }

    /// Attaches to wanted devices that have appeared, and refreshes those it has.
    fn scan(&self) {
        let mut devices = self.lock();
        if self.over.load(Ordering::Relaxed) {
            return;
        }
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
        if self.over.load(Ordering::Relaxed) {
            return Err("another engine has taken over; ask again".into());
        }
        if devices.attached.contains_key(name) {
            return Ok(());
        }
        let device = Device::open(name, self.implementation).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => format!("{name} is in use by another process; stop it or wait for it"),
            Some(libc::EINVAL) => format!("{name} exists and is no TUN device with one queue; delete it"),
            _ => format!("{name} cannot be opened as a TUN device: {error}"),
        })?;
        let device = Arc::new(device);
        let served = self
            .serve_device(&device, None)
            .map_err(|error| format!("the socket of {name} in {}: {error}", self.run_dir.display()))?;
        devices.count += 1;
        let number = devices.count;
        let tun = self
            .start_tun(&device, number)
            .map_err(|error| format!("no thread for {name}: {error}"))?;
        devices.attached.insert(
            name.into(),
            Attached {
                number,
                device,
                tun: Some(tun),
                served,
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
    fn tick(&self, stop: &Stop) {
        let mut out = peer::buffer();
        while stop.wait(TICK) {
            let _timers = self.hold_timers();
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
            (Some("ping"), None, None) => Ok(self.about()),
            (Some("list"), None, None) => {
                Ok(json!({ "devices": self.lock().attached.keys().collect::<Vec<_>>() }))
            }
            (Some("attach"), Some(name), None) => self.attach(name),
            (Some("detach"), Some(name), None) => self.release(name),
            (Some("stats"), Some(name), None) => self.with(name, stats),
            (Some("rekey"), Some(name), None) => {
                let _timers = self.hold_timers();
                self.with(name, |device| {
                    device.rekey(device.peers());
                    json!({})
                })
            }
            _ => Err("expected: ping | list | attach NAME | detach NAME | stats NAME | rekey NAME".into()),
        };
        result.unwrap_or_else(|error| json!({ "error": error }))
    }

    /// The process, and how many milliseconds packets waited when it took over from another.
    fn about(&self) -> Value {
        let pause = *self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        let milliseconds = pause.map(|pause| pause.as_secs_f64() * 1000.0);
        json!({ "pid": std::process::id(), "took_over_ms": milliseconds })
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
        device, tun, served, ..
    }) = attached
    else {
        return;
    };
    drop(served);
    if let Some(tun) = tun {
        tun.stop();
    }
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
