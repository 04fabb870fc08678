//! The engine that is succeeded.
//!
//! ```text
//!   successor                                  this engine
//!   handover VERSION NETWORK         --->      (refuses, or) holds its configuration
//!                                    <---      {"handover":VERSION}, settings and descriptors
//!   go                               --->      stops its threads: packets wait in the kernel
//!                                    <---      sessions
//!   ready                            --->
//!                                    <---      yours      (from here on nothing is sealed or opened here)
//! ```
//!
//! Until it has said `yours` this engine goes on when anything goes wrong or takes too long, and the successor has used
//! nothing of what it was given: no counter is ever used by both.

use std::{
    io::{self, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    os::unix::net::UnixStream,
    sync::{Arc, MutexGuard, atomic::Ordering},
    time::{Duration, Instant},
};

use nix::sys::socket::{getsockopt, sockopt};
use serde_json::json;
use zeroize::Zeroizing;

use super::{
    super::{device::Device, image::Writer, passing, readers::Readers},
    Attached, Devices, Engine, Event,
};

/// The version of everything that is handed over. To be raised by any change of what is written to an image.
pub(super) const VERSION: u32 = 1;

/// What the successor says.
pub(super) const GO: &[u8; 3] = b"go\n";
pub(super) const READY: &[u8; 6] = b"ready\n";
/// What it is told.
pub(super) const YOURS: &[u8; 6] = b"yours\n";

/// How long the successor may take to set devices up, and then, while packets wait, to take sessions over.
const PREPARING: Duration = Duration::from_secs(10);
const TAKING: Duration = Duration::from_secs(2);

/// Names this thread's network namespace: descriptors of another are of no use.
pub(super) fn network() -> io::Result<String> {
    let link = std::fs::read_link("/proc/thread-self/ns/net")?;
    Ok(link.display().to_string())
}

/// Hands everything over to whoever is at the other end, or says why not.
pub(super) fn offer(engine: &Engine, stream: &UnixStream, request: &str) -> io::Result<()> {
    if let Err(reason) = acceptable(stream, request) {
        tracing::warn!(reason, "a successor was refused");
        let mut answer = stream;
        return writeln!(answer, "{}", json!({ "error": reason }));
    }
    // In this order everywhere: timers, devices, configuration.
    let _timers = engine.hold_timers();
    if engine.over.load(Ordering::Relaxed) {
        // Another successor was first; the connection ends, and this one finds that one.
        return Ok(());
    }
    let mut devices = engine.lock();
    let list: Vec<_> = devices
        .attached
        .values()
        .map(|attached| Arc::clone(&attached.device))
        .collect();
    let mut readers = list
        .iter()
        .map(|device| device.configure())
        .collect::<io::Result<Vec<_>>>()?;
    settings(engine, &devices, stream)?;
    heard(stream, GO, PREPARING)?;

    let stopped = Instant::now();
    freeze(engine, &mut devices, &mut readers);
    if let Err(error) = sessions(&list, stream) {
        tracing::warn!(%error, "the successor did not take over; going on");
        resume(engine, &mut devices, &list, &mut readers);
        return Err(error);
    }
    engine.over.store(true, Ordering::Relaxed);
    for device in &list {
        device.give_up();
    }
    for attached in std::mem::take(&mut devices.attached).into_values() {
        attached.served.give_up();
    }
    if let Some(served) = engine.served().take() {
        served.give_up();
    }
    // An engine that lingers must not hold it beyond the successor's life.
    drop(engine.lock_file().take());
    tracing::info!(after = ?stopped.elapsed(), "handed over to a successor");
    // The receiver is gone only when the engine has ended.
    let _ = engine.events.send(Event::HandedOver);
    Ok(())
}

/// Why a successor is none.
fn acceptable(stream: &UnixStream, request: &str) -> Result<(), String> {
    let said = |error: &dyn std::fmt::Display| format!("the successor cannot be judged: {error}");
    let (version, place) = request.split_once(' ').unwrap_or((request, ""));
    if version != VERSION.to_string() {
        return Err(format!(
            "handover version {version} is not known here, only version {VERSION}"
        ));
    }
    if place != network().map_err(|error| said(&error))? {
        return Err("the successor is in another network namespace".into());
    }
    let peer = getsockopt(&stream.as_fd(), sockopt::PeerCredentials).map_err(|error| said(&error))?;
    if peer.uid() != nix::unistd::geteuid().as_raw() {
        return Err("the successor runs as another user".into());
    }
    Ok(())
}

/// Sends what configuration requests change, and all descriptors.
fn settings(engine: &Engine, devices: &Devices, stream: &UnixStream) -> io::Result<()> {
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    match (&*engine.lock_file(), &*engine.served()) {
        (Some(lock), Some(served)) => {
            descriptors.push(lock.as_fd().try_clone_to_owned()?);
            descriptors.push(served.descriptor()?);
        }
        _ => return Err(io::ErrorKind::NotConnected.into()),
    }
    let mut out = Writer::new(Instant::now());
    out.text(&engine.implementation.to_string());
    out.count(devices.released.len());
    for name in &devices.released {
        out.text(name);
    }
    out.count(devices.attached.len());
    for attached in devices.attached.values() {
        descriptors.push(attached.served.descriptor()?);
        attached.device.write_settings(&mut out, &mut descriptors)?;
    }
    stream.set_write_timeout(Some(PREPARING))?;
    let mut answer = stream;
    writeln!(answer, "{}", json!({ "handover": VERSION }))?;
    passing::send(stream, &descriptors, &out.finish())
}

/// Sends the sessions, which nobody uses now. An error for anything but a successor that is ready.
fn sessions(list: &[Arc<Device>], stream: &UnixStream) -> io::Result<()> {
    let mut out = Writer::new(Instant::now());
    for device in list {
        device.write_sessions(&mut out);
    }
    let image: Zeroizing<_> = out.finish();
    stream.set_write_timeout(Some(TAKING))?;
    passing::send(stream, &[], &image)?;
    heard(stream, READY, TAKING)?;
    let mut answer = stream;
    answer.write_all(YOURS)
}

/// Waits for a word.
fn heard<const N: usize>(stream: &UnixStream, word: &[u8; N], time: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(time))?;
    let (mut said, mut reader) = ([0; N], stream);
    io::Read::read_exact(&mut reader, &mut said)?;
    match said == *word {
        true => Ok(()),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Ends every thread that moves packets or takes requests.
fn freeze(engine: &Engine, devices: &mut Devices, readers: &mut [MutexGuard<'_, Readers>]) {
    // All at once, and only then one after the other.
    for attached in devices.attached.values() {
        attached.tun.iter().for_each(|reader| reader.ask());
    }
    for readers in readers.iter() {
        readers.ask();
    }
    for attached in devices.attached.values_mut() {
        if let Some(reader) = attached.tun.take() {
            reader.stop();
        }
    }
    for readers in readers {
        std::mem::take(&mut **readers).stop();
    }
    for attached in devices.attached.values_mut() {
        attached.served.pause();
    }
    if let Some(served) = &mut *engine.served() {
        served.pause();
    }
}

/// Starts what [`freeze`] has ended. A thread that is missing would stop traffic in silence: better an end.
fn resume(
    engine: &Engine,
    devices: &mut Devices,
    list: &[Arc<Device>],
    readers: &mut [MutexGuard<'_, Readers>],
) {
    let started = || -> io::Result<()> {
        for (device, readers) in list.iter().zip(readers) {
            device.start_readers(readers)?;
        }
        for Attached {
            number,
            device,
            tun,
            served,
        } in devices.attached.values_mut()
        {
            *tun = Some(engine.start_tun(device, *number)?);
            served.resume()?;
        }
        if let Some(served) = &mut *engine.served() {
            served.resume()?;
        }
        Ok(())
    };
    #[expect(
        clippy::panic,
        reason = "ends the process, so that whoever supervises it starts it anew"
    )]
    if let Err(error) = started() {
        panic!("threads cannot be started again after a handover that failed: {error}");
    }
}
