//! Replaces the key that signs snapshots and MeshNodes: on request, and when it is old. Notes the time that is signed.
//!
//! ```text
//! stored (new key and the old one's word for it, one write)
//!   -> the epoch is still this term's -> active -> agents are told, then sent a version that it signs
//!   -> MeshNodes are signed anew, one by one -> those of the old key are not believed any more (stored)
//! ```
//! After a crash the next term goes on from what is stored. A leader that is none any more sends nothing that a key signs
//! which its successor may not have read: the successor raises the epoch first and reads the keys then.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, bail};
use futures::{StreamExt as _, stream};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use warren_keyd_core::StoredNode;

use crate::{
    clock, hub,
    store::Store,
    trust::{Signing, Trust},
};

/// How often the age of the key is looked at.
const LOOK: Duration = Duration::from_secs(60);
/// MeshNodes that are signed anew at the same time.
const PARALLEL: usize = 4;
/// Pause after a failure.
const PAUSE: Duration = Duration::from_secs(2);
/// The store answers within this time, or has failed.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who wants a new key, and hears of it.
pub(crate) type Request = oneshot::Sender<Result<Rotated, String>>;

/// A key that signs.
#[derive(Debug, Clone)]
pub(crate) struct Rotated {
    pub(crate) signing: Arc<Signing>,
    pub(crate) epoch: u64,
    /// The first version that it signs.
    pub(crate) version: u64,
}

/// What the hub says once agents are on their way to a new key.
#[derive(Debug)]
pub(crate) struct Announced {
    pub(crate) version: u64,
    /// All nodes and tombstones.
    pub(crate) nodes: Vec<StoredNode>,
}

/// What a term's keeper works with.
pub(crate) struct Keeper {
    pub(crate) trust: Arc<Trust>,
    pub(crate) store: Store,
    pub(crate) epoch: u64,
    pub(crate) hub: mpsc::WeakSender<hub::Command>,
    /// Seconds after which the key is replaced by itself; 0: never.
    pub(crate) max_age_seconds: u64,
}

impl Keeper {
    /// Keeps the key until the hub is gone. `nodes` are those that were stored at the begin of the term.
    pub(crate) async fn run(self, nodes: Vec<StoredNode>, mut requests: mpsc::UnboundedReceiver<Request>) {
        let keeper = Arc::new(self);
        let mut renewals = JoinSet::new();
        if !keeper.trust.signing().is_renewed() {
            renewals.spawn(Arc::clone(&keeper).renew(nodes));
        }
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut note = interval(keeper.store.note_every());
        note.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let request = tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => Some(request),
                    None => return,
                },
                _ = look.tick() => None,
                _ = note.tick() => {
                    keeper.note_time().await;
                    continue;
                }
                Some(_) = renewals.join_next(), if !renewals.is_empty() => continue,
            };
            if request.is_none() && !keeper.is_due() {
                continue;
            }
            let outcome = match keeper.rotate().await {
                Ok((rotated, nodes)) => {
                    // Whatever was being renewed is renewed with the new key.
                    renewals.abort_all();
                    renewals.spawn(Arc::clone(&keeper).renew(nodes));
                    Ok(rotated)
                }
                Err(error) => {
                    tracing::error!("the signing key cannot be replaced: {error:#}");
                    Err(format!("the signing key cannot be replaced: {error:#}"))
                }
            };
            if let Some(request) = request {
                // The asker may be gone; that is its business.
                let _ = request.send(outcome);
            }
        }
    }

    /// A process that comes later, with a clock that is wrong, goes on from here.
    async fn note_time(&self) {
        let noted = patiently(self.store.note_time(self.epoch, clock::unix_ms())).await;
        if let Err(error) = noted {
            tracing::warn!("the time cannot be noted: {error:#}");
        }
    }

    fn is_due(&self) -> bool {
        let made = self.trust.signing().newest().made_unix_ms;
        is_due(made, clock::unix_ms(), self.max_age_seconds)
    }

    async fn rotate(&self) -> anyhow::Result<(Rotated, Vec<StoredNode>)> {
        let _turn = self.trust.turn().await;
        let was = self.trust.signing();
        let stored = patiently(self.trust.stored()).await?;
        let signing = match stored.generation() > was.generation() {
            // Stored before, but never used: by a term that ended, or a write whose answer was lost.
            true => Arc::new(stored),
            false => patiently(self.trust.store_next()).await?,
        };
        if patiently(self.store.epoch()).await? != self.epoch {
            bail!("another keyd leads by now: ask that one");
        }
        self.trust.activate(signing.clone());
        let (reply, announced) = oneshot::channel();
        let hub = self.hub.upgrade().context("this term is over: try again")?;
        let command = hub::Command::Signing(signing.clone(), reply);
        hub.send(command)
            .await
            .ok()
            .context("this term is over: try again")?;
        let Announced { version, nodes } = announced.await.context("this term is over: try again")?;
        tracing::info!(
            generation = signing.generation(),
            root = %signing.newest().key.to_base64(),
            version,
            "snapshots are signed with a new key"
        );
        let epoch = self.epoch;
        Ok((
            Rotated {
                signing,
                epoch,
                version,
            },
            nodes,
        ))
    }

    /// Signs all nodes anew, then lets go of the former keys for good.
    async fn renew(self: Arc<Self>, mut nodes: Vec<StoredNode>) {
        while let Err(error) = patiently(self.trust.publish()).await {
            tracing::warn!("new agents cannot be told of the signing key yet: {error:#}");
            sleep(PAUSE).await;
        }
        while !nodes.is_empty() {
            let store = &self.store;
            let one = |node: StoredNode| async move {
                match patiently(store.renew(&node)).await {
                    Ok(()) => None,
                    Err(error) => {
                        tracing::warn!(node = %node.name, "its MeshNode cannot be signed anew yet: {error:#}");
                        Some(node)
                    }
                }
            };
            let results = stream::iter(nodes).map(one).buffer_unordered(PARALLEL);
            nodes = results.filter_map(std::future::ready).collect().await;
            if !nodes.is_empty() {
                sleep(PAUSE).await;
            }
        }
        while let Err(error) = self.let_go().await {
            tracing::warn!("former signing keys are still believed for MeshNodes: {error:#}");
            sleep(PAUSE).await;
        }
        tracing::info!("all MeshNodes are signed with the newest key");
    }

    async fn let_go(&self) -> anyhow::Result<()> {
        let _turn = self.trust.turn().await;
        patiently(self.trust.store_renewed()).await
    }
}

/// Old enough, or made by a clock that was far ahead: then its age could not be told for as long.
fn is_due(made_unix_ms: i64, now_unix_ms: u64, max_age_seconds: u64) -> bool {
    let made = u64::try_from(made_unix_ms).unwrap_or_default();
    let limit = max_age_seconds.saturating_mul(1000);
    max_age_seconds > 0 && now_unix_ms.abs_diff(made) >= limit
}

async fn patiently<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let answer = timeout(PATIENCE, work).await;
    answer.with_context(|| format!("no answer within {PATIENCE:?}"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_replaced_when_it_is_old_or_from_a_far_future() {
        let day = 86_400_000;
        assert!(!is_due(day, day as u64 + 999, 1));
        assert!(is_due(day, day as u64 + 1000, 1));
        assert!(is_due(30 * day, day as u64, 86_400));
        assert!(!is_due(day + 1000, day as u64, 86_400));
        assert!(!is_due(0, u64::MAX, 0));
    }
}
