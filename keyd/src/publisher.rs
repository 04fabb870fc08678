//! Executes the core's outputs in order: writes objects, signs versions, queues messages for the streams.
//!
//! An object is written before what follows it is sent. A write that fails is repeated for a few seconds, then
//! becomes a problem and is repeated in the background: one object never blocks the others for long.
//! Nothing here ever waits for an agent: a stream whose queue is full is ended, and its agent resumes.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use warren_crds::MeshNodeStatus;
use warren_keyd_api::{
    convert::forget_to_proto,
    proto::{
        AskKey, DirectoryChunk, EndpointResult, Entry, EntryKind, Goodbye, KeyResult, KeydMessage, Manifest,
        SignedManifest, Update, Welcome, keyd_message::Body,
    },
    snapshot::{EntrySet, chunks},
};
use warren_keyd_core::{AgentEvent, CatchUp, Change, Object, Output, SessionId};
use warren_model::{IdentityId, NodeName, NodeUid};

use crate::{
    clock, hub,
    lag::Lag,
    store::{ObjectName, Store},
    trust::Signing,
    wire::encode,
};

/// Messages that may wait for one agent; an update of any size is one.
pub(crate) const QUEUE: usize = 256;
/// Writes that run at the same time.
const PARALLEL_WRITES: usize = 16;
/// How long a failing write is repeated before the rest goes on.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
/// Time between background repetitions.
const REPEAT: Duration = Duration::from_secs(10);

/// What is queued for a stream.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    Message(KeydMessage),
    Updates(Arc<[Update]>),
}

/// The publisher's end of a stream. Dropping it ends the stream.
#[derive(Debug)]
pub(crate) struct SessionHandle {
    pub(crate) uid: NodeUid,
    /// The newest snapshot root that the agent has pinned.
    pub(crate) root: Vec<u8>,
    pub(crate) queue: mpsc::Sender<Item>,
    /// Resolves at the other end when this is dropped: the agent is not listened to any more.
    pub(crate) _alive: oneshot::Sender<()>,
}

/// Input of the publisher.
#[derive(Debug)]
pub(crate) enum Order {
    Register(SessionId, SessionHandle),
    Do(Output),
    /// The agent has left.
    Forget(SessionId),
    /// A message for one agent.
    Tell(SessionId, KeydMessage),
    /// Published entries of some kinds (none = all), in chunks.
    Directory(Vec<EntryKind>, oneshot::Sender<Vec<DirectoryChunk>>),
    /// Answered once everything before it is done: whether this object is written.
    Flush(ObjectName, oneshot::Sender<bool>),
    /// What was last seen of a node. May get lost.
    Status(NodeName, MeshNodeStatus),
    /// This key signs from now on.
    Signing(Arc<Signing>),
}

/// What every version is signed with.
pub(crate) struct Term {
    pub(crate) epoch: u64,
    pub(crate) keyd_id: String,
    pub(crate) signing: Arc<Signing>,
    pub(crate) store: Store,
    pub(crate) expiry_ms: u64,
}

/// The publisher's own state.
pub(crate) struct Publisher {
    term: Term,
    entries: EntrySet,
    manifest: Manifest,
    signed: SignedManifest,
    version: u64,
    snapshot: Option<Arc<[Update]>>,
    waiting: HashMap<SessionId, SessionHandle>,
    sessions: BTreeMap<SessionId, SessionHandle>,
    failed: HashMap<ObjectName, Object>,
    hub: mpsc::WeakSender<hub::Command>,
    lag: Arc<Lag>,
}

impl Publisher {
    pub(crate) fn new(term: Term, hub: &mpsc::Sender<hub::Command>, lag: Arc<Lag>) -> Self {
        Self {
            term,
            entries: EntrySet::default(),
            manifest: Manifest::default(),
            signed: SignedManifest::default(),
            version: 0,
            snapshot: None,
            waiting: HashMap::new(),
            sessions: BTreeMap::new(),
            failed: HashMap::new(),
            hub: hub.downgrade(),
            lag,
        }
    }

    /// Runs until the hub is gone; every stream ends with it.
    pub(crate) async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        let mut repeat = tokio::time::interval(REPEAT);
        repeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                taken = orders.recv_many(&mut batch, 4096) => {
                    if taken == 0 {
                        return;
                    }
                    self.execute(std::mem::take(&mut batch)).await;
                }
                _ = repeat.tick() => self.repeat_failed().await,
            }
        }
    }

    async fn execute(&mut self, orders: Vec<Order>) {
        let mut writes = vec![];
        for order in orders {
            match order {
                Order::Do(Output::Persist(object)) => writes.push(object),
                // Registering shows nothing to anybody: it need not wait for writes.
                Order::Register(session, handle) => drop(self.waiting.insert(session, handle)),
                Order::Forget(session) => {
                    self.sessions.remove(&session);
                    self.waiting.remove(&session);
                }
                Order::Tell(session, message) => self.queue(session, Item::Message(message)),
                Order::Flush(name, reply) => {
                    self.write(std::mem::take(&mut writes)).await;
                    // The asker may be gone; that is its business.
                    let _ = reply.send(!self.failed.contains_key(&name));
                }
                // The asker may be gone; that is its business.
                Order::Directory(kinds, reply) => drop(reply.send(self.directory(&kinds))),
                Order::Status(node, status) => {
                    let store = self.term.store.clone();
                    tokio::spawn(async move {
                        if let Err(error) = store.status(node.as_str(), &status).await {
                            tracing::warn!(%node, "cannot write the status of MeshNode: {error:#}");
                        }
                    });
                }
                Order::Signing(signing) => self.sign_with(signing),
                Order::Do(output) => {
                    self.write(std::mem::take(&mut writes)).await;
                    self.send(output);
                }
            }
        }
        self.write(writes).await;
    }

    /// Writes objects in parallel; of several with one name only the last counts.
    async fn write(&mut self, objects: Vec<Object>) {
        if objects.is_empty() {
            return;
        }
        let newest: BTreeMap<_, _> = objects
            .into_iter()
            .map(|object| (ObjectName::of(&object), object))
            .collect();
        let deadline = Instant::now() + WRITE_PATIENCE;
        let store = self.term.store.clone();
        let results: Vec<_> = stream::iter(newest)
            .map(|(name, object)| {
                let store = store.clone();
                async move {
                    let result = write_until(&store, &object, deadline).await;
                    (name, object, result)
                }
            })
            .buffer_unordered(PARALLEL_WRITES)
            .collect()
            .await;
        for (name, object, result) in results {
            self.written(name, object, result).await;
        }
    }

    async fn written(&mut self, name: ObjectName, object: Object, result: anyhow::Result<()>) {
        let problem = match result {
            Ok(()) => {
                if self.failed.remove(&name).is_none() {
                    return;
                }
                None
            }
            Err(error) => {
                let sentence = format!("cannot store {}: {error:#}", name.0);
                tracing::error!("{sentence}");
                self.failed.insert(name.clone(), object);
                Some(sentence)
            }
        };
        if let Some(hub) = self.hub.upgrade() {
            // The hub never waits for the publisher, so this cannot lock up; a full queue only delays the sentence.
            let _ = hub.try_send(hub::Command::StoreProblem(name.0, problem));
        }
    }

    async fn repeat_failed(&mut self) {
        for (name, object) in self.failed.clone() {
            let result = self.term.store.apply(&object).await;
            self.written(name, object, result).await;
        }
    }

    fn send(&mut self, output: Output) {
        match output {
            // Written before; listed so that a new output is not forgotten.
            Output::Persist(_) => {}
            // The hub's business.
            Output::Validity { .. }
            | Output::WriteKeys { .. }
            | Output::Rotation(_)
            | Output::Note { .. } => {}
            Output::AskKey { session, generation } => {
                let body = Some(Body::AskKey(AskKey { generation }));
                self.queue(session, Item::Message(KeydMessage { body }));
            }
            Output::ForgetPsk { session, forget } => {
                let body = Some(Body::ForgetPsk(forget_to_proto(&forget)));
                self.queue(session, Item::Message(KeydMessage { body }));
            }
            Output::Publish { version, change } => self.publish(version, &change),
            Output::CatchUp {
                session,
                node,
                version,
                from,
            } => {
                tracing::info!(%node, version, snapshot = from == CatchUp::Snapshot, "agent connected");
                self.catch_up(session, from);
            }
            Output::KeyResult {
                session,
                public_key,
                result,
            } => {
                let reason = result.err().unwrap_or_default();
                let body = Body::KeyResult(KeyResult {
                    public_key: public_key.as_bytes().to_vec(),
                    accepted: reason.is_empty(),
                    reason,
                });
                self.queue(session, Item::Message(KeydMessage { body: Some(body) }));
            }
            Output::EndpointResult {
                session,
                request_id,
                result,
            } => {
                let (identity, error, retry) = match result {
                    Ok(identity) => (identity, String::new(), false),
                    Err(error) => (IdentityId::UNKNOWN, error.message, error.retry),
                };
                let result = EndpointResult {
                    request_id,
                    identity: identity.0,
                    error,
                    retry,
                };
                self.queue(
                    session,
                    Item::Message(KeydMessage {
                        body: Some(Body::EndpointResult(result)),
                    }),
                );
            }
            Output::Close {
                session,
                reason,
                retry,
            } => self.close(session, reason, retry),
        }
    }

    fn publish(&mut self, version: u64, change: &Change) {
        let (upserts, removes) = encode(change);
        for entry in &upserts {
            self.entries.upsert(entry.clone());
        }
        for key in &removes {
            self.entries.remove(key);
        }
        self.version = version;
        self.snapshot = None;
        let now = clock::unix_ms();
        self.manifest = Manifest {
            cluster_id: String::new(),
            epoch: self.term.epoch,
            version,
            issued_unix_ms: i64::try_from(now).unwrap_or(i64::MAX),
            expires_unix_ms: i64::try_from(now.saturating_add(self.term.expiry_ms)).unwrap_or(i64::MAX),
            entries: self.entries.len() as u64,
            digest: self.entries.digest_and_keep().to_vec(),
        };
        self.signed = self.term.signing.signer.seal(self.manifest.clone());
        let updates: Arc<[Update]> = chunks(
            (self.term.epoch, version),
            false,
            upserts,
            removes,
            self.signed.clone(),
        )
        .into();
        for session in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.queue(session, Item::Updates(updates.clone()));
        }
        let queues = self.sessions.values();
        self.lag
            .published(queues.map(|handle| QUEUE.saturating_sub(handle.queue.capacity())));
        let (upserts, removes) = (change.upserts.len(), change.removes.len());
        tracing::debug!(
            version,
            upserts,
            removes,
            streams = self.sessions.len(),
            "published"
        );
    }

    /// Agents hear of a new key before they hear anything that it has signed. What those that come now catch up with, it has
    /// signed as well.
    fn sign_with(&mut self, signing: Arc<Signing>) {
        self.term.signing = signing;
        self.snapshot = None;
        if self.version > 0 {
            self.signed = self.term.signing.signer.seal(self.manifest.clone());
        }
        for session in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.queue(session, Item::Message(self.roots()));
        }
    }

    fn roots(&self) -> KeydMessage {
        KeydMessage {
            body: Some(Body::Roots(self.term.signing.roots.to_proto())),
        }
    }

    /// What is published now, at least one chunk.
    fn directory(&self, kinds: &[EntryKind]) -> Vec<DirectoryChunk> {
        let wanted =
            |entry: &Entry| kinds.is_empty() || kinds.iter().any(|kind| i32::from(*kind) == entry.kind);
        let entries = self.entries.iter().filter(wanted);
        chunks(
            (self.term.epoch, self.version),
            true,
            entries,
            [],
            SignedManifest::default(),
        )
        .into_iter()
        .map(|update| DirectoryChunk {
            epoch: update.epoch,
            version: update.version,
            entries: update.upserts,
        })
        .collect()
    }

    fn catch_up(&mut self, session: SessionId, from: CatchUp) {
        let Some(handle) = self.waiting.remove(&session) else {
            return;
        };
        let welcome = Welcome {
            node_uid: handle.uid.to_string(),
            cluster_id: self.term.signing.signer.root().cluster_id(),
            epoch: self.term.epoch,
            keyd_id: self.term.keyd_id.clone(),
        };
        let has_newest = handle.root == self.term.signing.newest().key.as_bytes();
        self.sessions.insert(session, handle);
        self.queue(
            session,
            Item::Message(KeydMessage {
                body: Some(Body::Welcome(welcome)),
            }),
        );
        if !has_newest {
            self.queue(session, Item::Message(self.roots()));
        }
        let position = (self.term.epoch, self.version);
        let updates = match from {
            CatchUp::Snapshot => {
                let (entries, manifest) = (&self.entries, &self.signed);
                let make = || chunks(position, true, entries.iter(), [], manifest.clone()).into();
                self.snapshot.get_or_insert_with(make).clone()
            }
            CatchUp::Increment(change) => {
                let (upserts, removes) = encode(&change);
                chunks(position, false, upserts, removes, self.signed.clone()).into()
            }
        };
        self.queue(session, Item::Updates(updates));
    }

    /// Queues without waiting; a full queue ends the stream.
    fn queue(&mut self, session: SessionId, item: Item) {
        let Some(handle) = self.sessions.get(&session) else {
            return;
        };
        if handle.queue.try_send(item).is_ok() {
            return;
        }
        self.sessions.remove(&session);
        let hub = self.hub.clone();
        // Tells the hub without waiting here: the hub may be waiting for nothing of ours, but stay safe.
        tokio::spawn(async move {
            if let Some(hub) = hub.upgrade() {
                let _ = hub
                    .send(hub::Command::Agent(AgentEvent::Disconnected(session)))
                    .await;
            }
        });
    }

    fn close(&mut self, session: SessionId, reason: String, retry: bool) {
        let handle = self
            .sessions
            .remove(&session)
            .or_else(|| self.waiting.remove(&session));
        if let Some(handle) = handle {
            tracing::info!(%reason, "stream closed");
            let goodbye = KeydMessage {
                body: Some(Body::Goodbye(Goodbye { reason, retry })),
            };
            // A full queue is no reason to keep the stream.
            let _ = handle.queue.try_send(Item::Message(goodbye));
        }
    }
}

async fn write_until(store: &Store, object: &Object, deadline: Instant) -> anyhow::Result<()> {
    let mut pause = Duration::from_millis(50);
    loop {
        let error = match tokio::time::timeout_at(deadline, store.apply(object)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => anyhow::anyhow!("no answer within {WRITE_PATIENCE:?}"),
        };
        if Instant::now() + pause >= deadline {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
}
