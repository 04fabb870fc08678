//! Writes statuses of KeyRotations, each where the stored one is still what this term has read or written last.

use std::{collections::BTreeMap, time::Duration};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use warren_crds::KeyRotationStatus;
use warren_keyd_core::Event;

use super::progress::progress;
use crate::{
    hub,
    store::{RotationStatuses, StatusWritten, Store},
};

/// Pause after a write that failed.
const PAUSE: Duration = Duration::from_secs(1);

/// A status to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) status: KeyRotationStatus,
}

/// Writes until nobody sends any more; of several for one object the newest counts.
pub(crate) async fn write(
    store: Store,
    mut stored: RotationStatuses,
    hub: mpsc::WeakSender<hub::Command>,
    mut wanted: mpsc::UnboundedReceiver<Wanted>,
) {
    let mut waiting: BTreeMap<String, Wanted> = BTreeMap::new();
    let mut not_before = Instant::now();
    loop {
        let ready = !waiting.is_empty();
        tokio::select! {
            biased;
            received = wanted.recv() => match received {
                Some(one) => drop(waiting.insert(one.name.clone(), one)),
                None => return,
            },
            () = sleep_until(not_before), if ready => {
                let Some((_, one)) = waiting.pop_first() else { continue };
                let was = stored.get(&one.name).filter(|(uid, _)| *uid == one.uid).map(|(_, status)| status);
                match store.rotation_status(&one.name, &one.uid, was, &one.status).await {
                    Ok(StatusWritten::Written) => drop(stored.insert(one.name, (one.uid, one.status))),
                    Ok(StatusWritten::Gone) => drop(stored.remove(&one.name)),
                    Ok(StatusWritten::Theirs(theirs)) => {
                        tracing::warn!(rotation = %one.name, "somebody else has written its status: going on from that");
                        let event = Event::Progress {
                            rotation: one.name.clone(),
                            uid: one.uid.clone(),
                            progress: progress(&theirs),
                        };
                        stored.insert(one.name, (one.uid, *theirs));
                        let Some(hub) = hub.upgrade() else { return };
                        if hub.send(hub::Command::Core(event)).await.is_err() {
                            return;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(rotation = %one.name, "cannot write its status, trying again: {error:#}");
                        waiting.entry(one.name.clone()).or_insert(one);
                        not_before = Instant::now() + PAUSE;
                    }
                }
            }
        }
    }
}
