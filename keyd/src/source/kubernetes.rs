//! The Kubernetes API as a source: watches of Nodes, Namespaces and Pods, one task each.
//!
//! ServiceAccounts are not watched: an identity holds the name of the account, which stands in the Pod; a
//! permission that nothing needs is not asked for.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::{
    Api, Client, Resource, ResourceExt as _,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use warren_keyd_core::SourceEvent;

use super::{feed::Feed, parse};

/// How many kinds must be complete before the view is.
const KINDS: usize = 3;

/// What the watches share.
#[derive(Clone)]
struct Shared {
    feed: mpsc::Sender<Feed>,
    complete: Arc<AtomicUsize>,
    problems: Arc<Mutex<BTreeMap<(&'static str, String), String>>>,
}

/// (namespace, name); the namespace of a cluster-scoped object is empty.
type Key = (String, String);

/// How objects of one kind become events.
struct Kind<K> {
    name: &'static str,
    upsert: fn(&K) -> Result<SourceEvent, parse::Fault>,
    delete: fn(Key) -> SourceEvent,
}

/// Starts the watches.
pub(crate) fn watch(client: &Client, feed: mpsc::Sender<Feed>) {
    let shared = Shared {
        feed,
        complete: Arc::default(),
        problems: Arc::default(),
    };
    let nodes = Kind::<Node> {
        name: "Node",
        // A Node of the API always has a UID; one without would be refused for its empty one.
        upsert: |node| parse::node(node, |_| String::new()).map(SourceEvent::NodeUpsert),
        delete: |(_, name)| SourceEvent::NodeDelete(name.into()),
    };
    let namespaces = Kind::<Namespace> {
        name: "Namespace",
        upsert: |namespace| parse::namespace(namespace).map(SourceEvent::NamespaceUpsert),
        delete: |(_, name)| SourceEvent::NamespaceDelete(name),
    };
    let pods = Kind::<Pod> {
        name: "Pod",
        upsert: |pod| parse::pod(pod).map(SourceEvent::PodUpsert),
        delete: |(namespace, name)| SourceEvent::PodDelete { namespace, name },
    };
    tokio::spawn(follow(Api::<Node>::all(client.clone()), nodes, shared.clone()));
    tokio::spawn(follow(
        Api::<Namespace>::all(client.clone()),
        namespaces,
        shared.clone(),
    ));
    tokio::spawn(follow(Api::<Pod>::all(client.clone()), pods, shared));
}

/// Follows one kind for ever; a broken watch starts again with a growing pause.
async fn follow<K>(api: Api<K>, kind: Kind<K>, shared: Shared)
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut known: BTreeSet<Key> = BTreeSet::new();
    let mut listed: BTreeSet<Key> = BTreeSet::new();
    let mut complete = false;
    let mut events = pin!(watcher(api, watcher::Config::default()).default_backoff());
    while let Some(event) = events.next().await {
        let alive = match event {
            Ok(watcher::Event::Init) => {
                listed.clear();
                true
            }
            Ok(watcher::Event::InitApply(object)) => {
                let key = key(&object);
                listed.insert(key.clone());
                known.insert(key.clone());
                shared.upsert(&kind, key, &object).await
            }
            Ok(watcher::Event::InitDone) => {
                let gone: Vec<_> = known.difference(&listed).cloned().collect();
                known = std::mem::take(&mut listed);
                let mut alive = true;
                for key in gone {
                    alive &= shared.delete(&kind, key).await;
                }
                if !std::mem::replace(&mut complete, true)
                    && shared.complete.fetch_add(1, Ordering::AcqRel) + 1 == KINDS
                {
                    alive &= shared.send(Feed::Event(SourceEvent::Synced)).await;
                }
                alive
            }
            Ok(watcher::Event::Apply(object)) => {
                let key = key(&object);
                known.insert(key.clone());
                shared.upsert(&kind, key, &object).await
            }
            Ok(watcher::Event::Delete(object)) => {
                let key = key(&object);
                known.remove(&key);
                shared.delete(&kind, key).await
            }
            Err(error) => {
                tracing::warn!("watch of {}s broke, trying again: {error}", kind.name);
                true
            }
        };
        if !alive {
            return;
        }
    }
}

fn key<K: Resource>(object: &K) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

impl Shared {
    /// False where nobody listens any more.
    async fn send(&self, feed: Feed) -> bool {
        self.feed.send(feed).await.is_ok()
    }

    async fn upsert<K>(&self, kind: &Kind<K>, key: Key, object: &K) -> bool {
        match (kind.upsert)(object) {
            Ok(event) => {
                let cleared = self.problem(kind.name, &key, None).await;
                cleared && self.send(Feed::Event(event)).await
            }
            // Its last good content stays in force.
            Err(fault) => self.problem(kind.name, &key, Some(fault)).await,
        }
    }

    async fn delete<K>(&self, kind: &Kind<K>, key: Key) -> bool {
        let cleared = self.problem(kind.name, &key, None).await;
        cleared && self.send(Feed::Event((kind.delete)(key))).await
    }

    async fn problem(&self, kind: &'static str, (namespace, name): &Key, fault: Option<String>) -> bool {
        let id = if namespace.is_empty() {
            name.clone()
        } else {
            format!("{namespace}/{name}")
        };
        let all = {
            let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
            let before = problems.get(&(kind, id.clone())).cloned();
            let sentence = fault.map(|fault| format!("{kind} {id} is malformed: {fault}"));
            if before == sentence {
                return true;
            }
            match sentence {
                Some(sentence) => problems.insert((kind, id), sentence),
                None => problems.remove(&(kind, id)),
            };
            problems.values().cloned().collect()
        };
        self.send(Feed::Problems(all)).await
    }
}
