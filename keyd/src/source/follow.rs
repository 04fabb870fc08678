//! Follows one kind of object of the Kubernetes API: lists, watches, tells what changed, and what is wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::StreamExt as _;
use kube::{
    Api, Client, Resource, ResourceExt as _,
    api::ApiResource,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, time::sleep};
use warren_keyd_core::SourceEvent;

use super::{feed::Feed, parse};
use crate::store::is_code;

/// How often the API server is asked whether it serves a kind that it did not serve before.
const LOOK: Duration = Duration::from_secs(5);
/// A kind is believed to be absent only after a second look: an API server that has just begun may not know all of its
/// kinds yet.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// What the watches share.
#[derive(Clone)]
pub(super) struct Shared {
    feed: mpsc::Sender<Feed>,
    /// Kinds that are not complete yet.
    incomplete: Arc<AtomicUsize>,
    problems: Arc<Mutex<BTreeMap<(&'static str, String), String>>>,
}

/// (namespace, name); the namespace of a cluster-scoped object is empty.
pub(crate) type Key = (String, String);

/// What an object says.
type Upsert<K> = dyn Fn(&K) -> Result<Feed, parse::Fault> + Send + Sync;
/// What the end of an object says.
type Delete = dyn Fn(Key) -> Feed + Send + Sync;

/// How objects of one kind become events.
pub(crate) struct Kind<K> {
    pub(crate) name: &'static str,
    pub(crate) upsert: Box<Upsert<K>>,
    pub(crate) delete: Box<Delete>,
}

/// Why a watch ended.
enum End {
    /// Nobody listens any more.
    Unheard,
    /// The API server does not serve the kind any more.
    Absent,
}

/// One kind, followed.
struct Follower<K> {
    kind: Kind<K>,
    shared: Shared,
    known: BTreeSet<Key>,
    listed: BTreeSet<Key>,
    complete: bool,
}

/// Follows a kind that every API server has, for ever; a broken watch starts again with a growing pause.
pub(super) async fn follow<K>(api: Api<K>, config: watcher::Config, kind: Kind<K>, shared: Shared)
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut follower = Follower::new(kind, shared);
    while !matches!(follower.run(api.clone(), config.clone()).await, End::Unheard) {
        sleep(LOOK).await;
    }
}

/// Follows a kind that may be installed later, or removed.
pub(super) async fn follow_custom<K>(
    client: Client,
    resource: ApiResource,
    api: Api<K>,
    kind: Kind<K>,
    shared: Shared,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut follower = Follower::new(kind, shared);
    let mut absent = 0_u32;
    loop {
        match is_served(&client, &resource).await {
            Ok(true) => {
                absent = 0;
                match follower.run(api.clone(), watcher::Config::default()).await {
                    End::Unheard => return,
                    End::Absent => {}
                }
            }
            Ok(false) if absent == 0 => {
                absent = 1;
                sleep(SECOND_LOOK).await;
            }
            Ok(false) => {
                if !follower.none().await {
                    return;
                }
                sleep(LOOK).await;
            }
            Err(error) => {
                tracing::warn!("cannot ask the API server for its kinds, trying again: {error}");
                sleep(SECOND_LOOK).await;
            }
        }
    }
}

/// Whether the API server serves a kind now.
async fn is_served(client: &Client, resource: &ApiResource) -> kube::Result<bool> {
    match client.list_api_group_resources(&resource.api_version).await {
        Ok(list) => Ok(list.resources.iter().any(|served| served.name == resource.plural)),
        Err(error) if is_code(&error, 404) => Ok(false),
        Err(error) => Err(error),
    }
}

impl<K> Follower<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    fn new(kind: Kind<K>, shared: Shared) -> Self {
        Self {
            kind,
            shared,
            known: BTreeSet::new(),
            listed: BTreeSet::new(),
            complete: false,
        }
    }

    async fn run(&mut self, api: Api<K>, config: watcher::Config) -> End {
        let mut events = pin!(watcher(api, config).default_backoff());
        while let Some(event) = events.next().await {
            let alive = match event {
                Ok(event) => self.take(event).await,
                Err(error) if is_absent(&error) => return End::Absent,
                Err(error) => {
                    tracing::warn!("watch of {}s broke, trying again: {error}", self.kind.name);
                    let sentence = format!("cannot watch {}s: {error}", self.kind.name);
                    self.shared
                        .problem(self.kind.name, String::new(), Some(sentence))
                        .await
                }
            };
            if !alive {
                return End::Unheard;
            }
        }
        End::Unheard
    }

    async fn take(&mut self, event: watcher::Event<K>) -> bool {
        match event {
            watcher::Event::Init => {
                self.listed.clear();
                true
            }
            watcher::Event::InitApply(object) => {
                self.listed.insert(key(&object));
                self.upsert(&object).await
            }
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                self.complete_with(listed).await
            }
            watcher::Event::Apply(object) => self.upsert(&object).await,
            watcher::Event::Delete(object) => self.delete(key(&object)).await,
        }
    }

    /// There is nothing of this kind.
    async fn none(&mut self) -> bool {
        self.complete_with(BTreeSet::new()).await
    }

    /// Everything that exists was told: what else is known is gone.
    async fn complete_with(&mut self, listed: BTreeSet<Key>) -> bool {
        let gone: Vec<_> = self.known.difference(&listed).cloned().collect();
        let mut alive = self.shared.problem(self.kind.name, String::new(), None).await;
        for key in gone {
            alive &= self.delete(key).await;
        }
        if !std::mem::replace(&mut self.complete, true) {
            alive &= self.shared.completed().await;
        }
        alive
    }

    async fn upsert(&mut self, object: &K) -> bool {
        let key = key(object);
        self.known.insert(key.clone());
        match (self.kind.upsert)(object) {
            Ok(feed) => self.told(&key, None).await && self.shared.send(feed).await,
            // Its last good content stays in force.
            Err(fault) => self.told(&key, Some(fault)).await,
        }
    }

    async fn delete(&mut self, key: Key) -> bool {
        self.known.remove(&key);
        self.told(&key, None).await && self.shared.send((self.kind.delete)(key)).await
    }

    /// Notes what is wrong with an object, or that nothing is.
    async fn told(&self, (namespace, name): &Key, fault: Option<parse::Fault>) -> bool {
        let id = if namespace.is_empty() {
            name.clone()
        } else {
            format!("{namespace}/{name}")
        };
        let sentence = fault.map(|fault| format!("{} {id} is malformed: {fault}", self.kind.name));
        self.shared.problem(self.kind.name, id, sentence).await
    }
}

fn key<K: Resource>(object: &K) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

/// The API server does not know the kind.
fn is_absent(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => is_code(error, 404),
        watcher::Error::WatchError(status) => status.code == 404,
        watcher::Error::NoResourceVersion => false,
    }
}

impl Shared {
    /// `kinds`: how many must be complete before the view is.
    pub(super) fn new(feed: mpsc::Sender<Feed>, kinds: usize) -> Self {
        Self {
            feed,
            incomplete: Arc::new(AtomicUsize::new(kinds)),
            problems: Arc::default(),
        }
    }

    /// False where nobody listens any more.
    async fn send(&self, feed: Feed) -> bool {
        self.feed.send(feed).await.is_ok()
    }

    /// One more kind is complete; everything of it has been sent before.
    async fn completed(&self) -> bool {
        self.incomplete.fetch_sub(1, Ordering::AcqRel) != 1
            || self.send(Feed::Event(SourceEvent::Synced)).await
    }

    async fn problem(&self, kind: &'static str, id: String, sentence: Option<String>) -> bool {
        let all = {
            let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
            let key = (kind, id);
            if problems.get(&key) == sentence.as_ref() {
                return true;
            }
            match sentence {
                Some(sentence) => problems.insert(key, sentence),
                None => problems.remove(&key),
            };
            problems.values().cloned().collect()
        };
        self.send(Feed::Problems(all)).await
    }
}
