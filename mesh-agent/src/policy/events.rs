//! What the programs report: the last events, and counts of all.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    os::fd::AsFd as _,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use warren_agent_api::EventStatus;
use warren_bpf::{Event, Events, Outcome};
use warren_model::IdentityId;

use super::{Shared, answer::direction_name};
use crate::machine;

/// How many events are kept.
const KEPT: usize = 8_192;
/// Events that are read before others have a turn.
const BATCH: usize = 256;
/// The pause before the ring is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// The last events, oldest first.
#[derive(Clone, Default)]
pub(crate) struct EventLog(Arc<Mutex<VecDeque<EventStatus>>>);

impl EventLog {
    /// At most so many of the last, oldest first.
    pub(crate) fn last(&self, limit: usize) -> Vec<EventStatus> {
        let log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        log.iter()
            .skip(log.len().saturating_sub(limit))
            .cloned()
            .collect()
    }

    fn add(&self, events: Vec<EventStatus>) {
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        log.extend(events);
        let excess = log.len().saturating_sub(KEPT);
        log.drain(..excess);
    }
}

/// Reads the ring from now on, in a thread of its own.
pub(super) fn start(shared: &Shared) -> Result<()> {
    let events = shared
        .programs
        .lock()
        .events()
        .context("the programs' events cannot be read")?;
    let shared = shared.clone();
    std::thread::Builder::new()
        .name("events".into())
        .spawn(move || read(events, &shared))
        .context("no thread to read events")?;
    Ok(())
}

fn read(mut events: Events, shared: &Shared) {
    loop {
        let batch: Vec<Event> = std::iter::from_fn(|| events.next()).take(BATCH).collect();
        if !batch.is_empty() {
            take(shared, &batch);
            continue;
        }
        let mut ring = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ring, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                shared.report().events_fault =
                    Some(format!("the programs' events cannot be waited for: {error}"));
                std::thread::sleep(PAUSE);
            }
        }
    }
}

fn take(shared: &Shared, batch: &[Event]) {
    let offset = clock_offset();
    let told = batch.iter().map(|event| status(shared, event, offset)).collect();
    shared.events.add(told);
    let mut report = shared.report();
    report.events_fault = None;
    for event in batch {
        let direction = event
            .direction
            .map(machine::policy_direction)
            .map_or("", direction_name);
        let key = (
            outcome(event.outcome).to_owned(),
            direction.to_owned(),
            event.reason.unwrap_or_default().to_owned(),
        );
        *report.verdicts.entry(key).or_default() += u64::from(event.packets.max(1));
    }
}

/// What is to be added to the monotonic clock for the time since 1970.
fn clock_offset() -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(warren_bpf::monotonic_time())
}

/// What happened, in one word.
fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Allowed => "allowed",
        Outcome::Dropped => "dropped",
        Outcome::Audited => "audited",
    }
}

fn status(shared: &Shared, event: &Event, offset: Duration) -> EventStatus {
    let time = (event.time + offset).as_millis();
    let of = |address: Option<_>, port| address.map(|address| SocketAddr::new(address, port));
    EventStatus {
        time_unix_ms: u64::try_from(time).unwrap_or(u64::MAX),
        outcome: outcome(event.outcome).into(),
        hook: event.hook.into(),
        reason: event.reason.map(Into::into),
        direction: event.direction.map(machine::policy_direction),
        source: of(event.source, event.source_port),
        destination: of(event.destination, event.destination_port),
        protocol: event.protocol,
        source_identity: IdentityId(event.source_identity),
        destination_identity: IdentityId(event.destination_identity),
        rule: shared.names.of(event.rule),
        packets: event.packets,
    }
}
