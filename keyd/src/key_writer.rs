//! Writes changed keys by compare-and-swap and reads the epoch again before anybody hears of them.

use std::time::Duration;

use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};
use warren_keyd_core::{Event, StoredNode};
use warren_model::NodeKeys;

use crate::{hub, store::Store};

/// A store that does not answer within this time has failed.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause after a failure.
const PAUSE: Duration = Duration::from_secs(1);

/// Keys to write.
#[derive(Debug)]
pub(crate) struct Write {
    pub(crate) was: NodeKeys,
    pub(crate) node: Box<StoredNode>,
}

/// Writes until nobody sends any more; at most one write per node is under way (the core's word).
pub(crate) async fn write(
    store: Store,
    epoch: u64,
    hub: mpsc::WeakSender<hub::Command>,
    mut wanted: mpsc::UnboundedReceiver<Write>,
) {
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            received = wanted.recv() => match received {
                Some(write) => drop(running.spawn(one(store.clone(), epoch, write, hub.clone()))),
                None => return,
            },
            Some(_) = running.join_next(), if !running.is_empty() => {}
        }
    }
}

async fn one(store: Store, epoch: u64, write: Write, hub: mpsc::WeakSender<hub::Command>) {
    let stored = swap(&store, &write).await;
    // Whoever leads by now has begun by reading all that was published before: what was written before it began it knows,
    // what was written after that must not be published by us.
    let command = match epoch_now(&store).await {
        now if now == epoch => hub::Command::Core(Event::Stored(Box::new(stored))),
        now => hub::Command::Fenced(now),
    };
    if let Some(hub) = hub.upgrade() {
        // A hub that is gone has ended the term.
        let _ = hub.send(command).await;
    }
}

/// Writes once. A failed write is not repeated, by then it may be wrong: it is found out what is stored, and the core
/// decides anew.
async fn swap(store: &Store, Write { was, node }: &Write) -> StoredNode {
    let name = node.name.as_str();
    let swapped = timeout(PATIENCE, store.swap_keys(was, node)).await;
    let mut found = swapped.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {PATIENCE:?}")));
    loop {
        match found {
            Ok(Some(stored)) => return stored,
            // Nothing is there: as if it were what was there before.
            Ok(None) => {
                let mut before = StoredNode::clone(node);
                let listed = |key| was.slots.iter().any(|slot| slot.public_key == key);
                for revoked in &mut before.revoked {
                    revoked.keys.retain(|key| !listed(*key));
                }
                if let Some(record) = &mut before.record {
                    record.slots.clone_from(&was.slots);
                    (record.active, record.last) = (was.active, was.last);
                }
                return before;
            }
            Err(error) => tracing::warn!(node = name, "cannot store its keys, looking again: {error:#}"),
        }
        sleep(PAUSE).await;
        let read = timeout(PATIENCE, store.node(name)).await;
        found = read.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer within {PATIENCE:?}")));
    }
}

async fn epoch_now(store: &Store) -> u64 {
    loop {
        match timeout(PATIENCE, store.epoch()).await {
            Ok(Ok(epoch)) => return epoch,
            Ok(Err(error)) => tracing::warn!("cannot read the epoch, trying again: {error:#}"),
            Err(_) => tracing::warn!("cannot read the epoch within {PATIENCE:?}, trying again"),
        }
        sleep(PAUSE).await;
    }
}
