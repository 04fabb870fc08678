//! Looks after keyd's objects in the API server: whatever somebody else has changed, made or deleted is an alarm, and written anew
//! from what keyd knows. Nothing is believed meanwhile: MeshNodes are signed, and what is in force is in memory.
//!
//! An admission policy refuses such writes; this is for clusters without it, and for those who can get past it.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep},
};

use crate::{
    hub,
    store::{KubeStore, Odd},
};

/// How often all objects are looked at.
const LOOK: Duration = Duration::from_secs(10);
/// What is odd is looked at again after this time: a write of our own may have been under way.
const CONFIRM: Duration = Duration::from_secs(2);

/// Looks until the hub is gone.
pub(crate) async fn watch(store: Arc<KubeStore>, hub: mpsc::WeakSender<hub::Command>, keyd_id: String) {
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Each is said once, also where keyd may not undo it (it deletes no MeshNode).
    let mut said = BTreeSet::new();
    loop {
        look.tick().await;
        let found = match confirmed(&store, &keyd_id).await {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!("keyd's objects cannot be looked at: {error:#}");
                continue;
            }
        };
        said.retain(|odd| found.contains(odd));
        let news: Vec<Odd> = found.into_iter().filter(|odd| said.insert(odd.clone())).collect();
        if news.is_empty() {
            continue;
        }
        let Some(hub) = hub.upgrade() else { return };
        if hub.send(hub::Command::Odd(news)).await.is_err() {
            return;
        }
    }
}

async fn confirmed(store: &KubeStore, keyd_id: &str) -> anyhow::Result<BTreeSet<Odd>> {
    let first = store.odd(keyd_id).await?;
    if first.is_empty() {
        return Ok(first);
    }
    sleep(CONFIRM).await;
    let second = store.odd(keyd_id).await?;
    Ok(first.intersection(&second).cloned().collect())
}
