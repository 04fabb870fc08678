//! The engine that succeeds another: see [`super::offer`].

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::fd::OwnedFd,
    os::unix::{
        fs::{FileExt as _, OpenOptionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;
use zeroize::Zeroizing;

use super::{
    super::{
        ENGINE_SOCKET, EngineConfig, EngineError, Implementation, device::Device, image::Reader,
        lanes::Lanes, passing, peer::Peer,
    },
    LOCK_FILE,
    offer::{GO, READY, VERSION, YOURS, network},
};

/// How long an engine that holds the directory and does not answer is asked again: it starts, or it ends.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long it is waited before asking again.
const PAUSE: Duration = Duration::from_millis(20);

/// How long the other engine may take for one answer.
const ANSWER: Duration = Duration::from_secs(15);

/// Who has the run directory now: this process.
pub(super) struct Claim {
    /// Locked as long as a process has it open.
    pub(super) lock: File,
    /// What another engine has handed over.
    pub(super) inherited: Option<Inherited>,
}

/// What another engine has handed over. It uses nothing of it any more.
pub(super) struct Inherited {
    pub(super) control: UnixListener,
    /// Devices that shall not be attached to on our own.
    pub(super) released: Vec<String>,
    pub(super) devices: Vec<InheritedDevice>,
    /// When the other engine was told to stop its threads.
    pub(super) asked: Instant,
}

pub(super) struct InheritedDevice {
    pub(super) device: Arc<Device>,
    pub(super) listener: UnixListener,
    /// Peers whose sessions could not be handed over.
    pub(super) lost: Vec<Arc<Peer>>,
}

/// Why nothing was handed over.
enum Failure {
    /// The other engine said why.
    Refused(String),
    /// It starts or ends, or it is another one by now.
    Gone,
    /// What it sent cannot be used.
    Useless(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::Other => Self::Useless(error.to_string()),
            _ => Self::Gone,
        }
    }
}

/// Takes the run directory: from nobody, or from the engine that serves it.
pub(super) fn claim(config: &EngineConfig) -> Result<Claim, EngineError> {
    let mut lock = open_lock(&config.run_dir)?;
    let start = Instant::now();
    let inherited = loop {
        match lock.try_lock() {
            Ok(()) => break None,
            Err(fs::TryLockError::WouldBlock) => {}
            Err(fs::TryLockError::Error(source)) => {
                return Err(EngineError::Path {
                    path: config.run_dir.join(LOCK_FILE),
                    source,
                });
            }
        }
        let refused = |reason| EngineError::NotHandedOver {
            run_dir: config.run_dir.clone(),
            reason,
        };
        match take_over(config) {
            Ok((theirs, inherited)) => {
                lock = theirs;
                break Some(inherited);
            }
            Err(Failure::Refused(reason) | Failure::Useless(reason)) => return Err(refused(reason)),
            Err(Failure::Gone) if start.elapsed() < PATIENCE => std::thread::sleep(PAUSE),
            Err(Failure::Gone) => return Err(EngineError::AlreadyRunning(config.run_dir.clone())),
        }
    };
    // For a person who looks; nothing reads it.
    let _ = lock
        .set_len(0)
        .and_then(|()| lock.write_all_at(format!("{}\n", std::process::id()).as_bytes(), 0));
    Ok(Claim { lock, inherited })
}

fn open_lock(run_dir: &Path) -> Result<File, EngineError> {
    let path = run_dir.join(LOCK_FILE);
    let failed = |path: &Path, source| EngineError::Path {
        path: path.into(),
        source,
    };
    fs::create_dir_all(run_dir).map_err(|source| failed(run_dir, source))?;
    fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|source| failed(&path, source))
}

/// Takes everything over from the engine that serves the run directory, with its lock.
fn take_over(config: &EngineConfig) -> Result<(File, Inherited), Failure> {
    // What takes long comes first.
    Lanes::available();
    let mut stream = UnixStream::connect(config.run_dir.join(ENGINE_SOCKET))?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    writeln!(
        stream,
        "{}{VERSION} {}",
        super::super::control::HANDOVER,
        network()?
    )?;
    accepted(&stream)?;
    let (descriptors, image) = passing::receive(&stream)?;
    let mut settings = Settings::read(config.implementation, &image, descriptors)?;
    drop(image);

    let asked = Instant::now();
    stream.write_all(GO)?;
    let (_, image) = passing::receive(&stream)?;
    settings.read_sessions(config.implementation, &image, asked)?;
    drop(image);
    stream.write_all(READY)?;
    let mut said = [0; YOURS.len()];
    stream.read_exact(&mut said)?;
    if said != *YOURS {
        return Err(Failure::Useless("it did not let go".into()));
    }
    Ok((
        settings.lock,
        Inherited {
            control: settings.control,
            released: settings.released,
            devices: settings.devices,
            asked,
        },
    ))
}

/// Reads the line that the other engine answers with, and nothing behind it.
fn accepted(mut stream: &UnixStream) -> Result<(), Failure> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        match byte {
            [b'\n'] => break,
            _ if line.len() > 4096 => return Err(Failure::Useless("its answer is too long".into())),
            [byte] => line.push(byte),
        }
    }
    let answer: Value =
        serde_json::from_slice(&line).map_err(|_| Failure::Useless("its answer is no JSON".into()))?;
    match (answer["error"].as_str(), answer["handover"].as_u64()) {
        (None, Some(version)) if version == u64::from(VERSION) => Ok(()),
        (Some(reason), _) => Err(Failure::Refused(reason.into())),
        (None, version) => Err(Failure::Refused(format!(
            "it speaks handover version {version:?}"
        ))),
    }
}

/// What was handed over first.
struct Settings {
    lock: File,
    control: UnixListener,
    writer: String,
    released: Vec<String>,
    devices: Vec<InheritedDevice>,
}

impl Settings {
    fn read(
        implementation: Implementation,
        image: &Zeroizing<Vec<u8>>,
        descriptors: Vec<OwnedFd>,
    ) -> io::Result<Self> {
        let mut from = Reader::new(image, Instant::now());
        let mut descriptors = descriptors.into_iter();
        let next = |descriptors: &mut std::vec::IntoIter<OwnedFd>| {
            descriptors
                .next()
                .ok_or_else(|| io::Error::other("a descriptor is missing"))
        };
        let lock = next(&mut descriptors)?.into();
        let control = next(&mut descriptors)?.into();
        let writer = from.text().map_err(io::Error::other)?.to_owned();
        let mut released = Vec::new();
        for _ in 0..from.count().map_err(io::Error::other)? {
            released.push(from.text().map_err(io::Error::other)?.to_owned());
        }
        let mut devices = Vec::new();
        for _ in 0..from.count().map_err(io::Error::other)? {
            let listener = next(&mut descriptors)?.into();
            let device = Device::read_settings(implementation, &mut from, &mut descriptors)?;
            devices.push(InheritedDevice {
                device: Arc::new(device),
                listener,
                lost: Vec::new(),
            });
        }
        from.end().map_err(io::Error::other)?;
        Ok(Self {
            lock,
            control,
            writer,
            released,
            devices,
        })
    }

    fn read_sessions(
        &mut self,
        implementation: Implementation,
        image: &Zeroizing<Vec<u8>>,
        asked: Instant,
    ) -> io::Result<()> {
        let same = self.writer == implementation.to_string();
        let mut from = Reader::new(image, asked);
        for inherited in &mut self.devices {
            inherited.lost = inherited
                .device
                .read_sessions(same, &mut from)
                .map_err(io::Error::other)?;
        }
        from.end().map_err(io::Error::other)
    }
}
