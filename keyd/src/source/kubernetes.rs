//! The Kubernetes API as a source: which kinds are watched, one task each.
//!
//! ServiceAccounts are not watched: an identity holds the name of the account, which stands in the Pod; a
//! permission that nothing needs is not asked for. Policies are read as plain JSON, so that one that does not parse
//! never hides the others; the kinds of `cilium.io` may be installed at any time.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Mutex, PoisonError},
};

use k8s_openapi::{
    api::{
        core::v1::{Namespace, Node, Pod},
        discovery::v1::EndpointSlice,
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kube::{
    Api, Client, Resource,
    api::{ApiResource, DynamicObject},
    runtime::watcher,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use warren_crds::cilium::{
    self, CiliumCIDRGroup, CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy, policy_ref,
};
use warren_keyd_core::SourceEvent;
use warren_model::policy::{PolicyKind, PolicyRef};

use super::{
    feed::Feed,
    follow::{Kind, Shared, follow, follow_custom},
    parse,
};
use crate::{policy_status::Seen, rotations};

/// How many kinds are watched, all of them below.
const KINDS: usize = 9;
/// The Service whose endpoints are the API servers.
const APISERVER_SELECTOR: &str = "kubernetes.io/service-name=kubernetes";

/// Starts the watches. `cluster` is the cluster's name, which policies may mean.
pub(crate) fn watch(client: &Client, cluster: &str, feed: mpsc::Sender<Feed>) {
    let shared = Shared::new(feed, KINDS);
    let nodes = Kind::<Node> {
        name: "Node",
        // A Node of the API always has a UID; one without would be refused for its empty one.
        upsert: Box::new(|node| {
            parse::node(node, |_| String::new())
                .map(SourceEvent::NodeUpsert)
                .map(Feed::Event)
        }),
        delete: Box::new(|(_, name)| Feed::Event(SourceEvent::NodeDelete(name.into()))),
    };
    let namespaces = Kind::<Namespace> {
        name: "Namespace",
        upsert: Box::new(|namespace| {
            parse::namespace(namespace)
                .map(SourceEvent::NamespaceUpsert)
                .map(Feed::Event)
        }),
        delete: Box::new(|(_, name)| Feed::Event(SourceEvent::NamespaceDelete(name))),
    };
    let pods = Kind::<Pod> {
        name: "Pod",
        upsert: Box::new(|pod| parse::pod(pod).map(SourceEvent::PodUpsert).map(Feed::Event)),
        delete: Box::new(|(namespace, name)| Feed::Event(SourceEvent::PodDelete { namespace, name })),
    };
    let all = watcher::Config::default;
    tokio::spawn(follow(Api::all(client.clone()), all(), nodes, shared.clone()));
    tokio::spawn(follow(
        Api::all(client.clone()),
        all(),
        namespaces,
        shared.clone(),
    ));
    tokio::spawn(follow(Api::all(client.clone()), all(), pods, shared.clone()));
    let slices = Api::<EndpointSlice>::namespaced(client.clone(), "default");
    let of_apiserver = all().labels(APISERVER_SELECTOR);
    tokio::spawn(follow(slices, of_apiserver, apiservers(), shared.clone()));

    let resource = ApiResource::erase::<NetworkPolicy>(&());
    let api = Api::all_with(client.clone(), &resource);
    let kind = policies(PolicyKind::NetworkPolicy, resource, cluster);
    tokio::spawn(follow(api, all(), kind, shared.clone()));
    for (kind, resource) in [
        (
            PolicyKind::CiliumNetworkPolicy,
            ApiResource::erase::<CiliumNetworkPolicy>(&()),
        ),
        (
            PolicyKind::CiliumClusterwideNetworkPolicy,
            ApiResource::erase::<CiliumClusterwideNetworkPolicy>(&()),
        ),
    ] {
        let kind = policies(kind, resource.clone(), cluster);
        custom(client, resource, kind, &shared);
    }
    let resource = ApiResource::erase::<CiliumCIDRGroup>(&());
    custom(client, resource.clone(), groups(resource), &shared);
    let (resource, kind) = rotations::kind();
    let api = Api::all(client.clone());
    tokio::spawn(follow_custom(client.clone(), resource, api, kind, shared));
}

fn custom(client: &Client, resource: ApiResource, kind: Kind<DynamicObject>, shared: &Shared) {
    let api = Api::all_with(client.clone(), &resource);
    tokio::spawn(follow_custom(client.clone(), resource, api, kind, shared.clone()));
}

/// The API servers' addresses: those of all slices of their Service.
fn apiservers() -> Kind<EndpointSlice> {
    let slices = std::sync::Arc::new(Mutex::new(BTreeMap::<String, BTreeSet<IpAddr>>::new()));
    let set = move |name: String, addresses: Option<BTreeSet<IpAddr>>| {
        let mut slices = slices.lock().unwrap_or_else(PoisonError::into_inner);
        match addresses {
            Some(addresses) => slices.insert(name, addresses),
            None => slices.remove(&name),
        };
        Feed::Event(SourceEvent::ApiServers(
            slices.values().flatten().copied().collect(),
        ))
    };
    let forget = set.clone();
    Kind {
        name: "EndpointSlice",
        upsert: Box::new(move |slice| {
            let name = slice.meta().name.clone().unwrap_or_default();
            Ok(set(name, Some(parse::slice_addresses(slice)?)))
        }),
        delete: Box::new(move |(_, name)| forget(name, None)),
    }
}

/// One kind of policies.
fn policies(kind: PolicyKind, resource: ApiResource, cluster: &str) -> Kind<DynamicObject> {
    let cluster = cluster.to_owned();
    Kind {
        name: kind.name(),
        upsert: Box::new(move |object| {
            let value = plain(object, &resource);
            let policy = policy_ref(&value).map_err(|fault| fault.to_string())?;
            Ok(Feed::Policy {
                outcome: cilium::parse(&value, &cluster),
                policy,
                seen: Seen {
                    generation: object.metadata.generation,
                    condition: valid_condition(&object.data),
                },
            })
        }),
        delete: Box::new(move |(namespace, name)| {
            Feed::Event(SourceEvent::PolicyDelete(PolicyRef {
                kind,
                namespace,
                name,
            }))
        }),
    }
}

fn groups(resource: ApiResource) -> Kind<DynamicObject> {
    Kind {
        name: "CiliumCIDRGroup",
        upsert: Box::new(move |object| {
            Ok(Feed::Event(SourceEvent::CidrGroupUpsert {
                name: object.metadata.name.clone().unwrap_or_default(),
                outcome: cilium::parse_group(&plain(object, &resource)).map(|(_, prefixes)| prefixes),
            }))
        }),
        delete: Box::new(|(_, name)| Feed::Event(SourceEvent::CidrGroupDelete(name))),
    }
}

/// The object as a manifest would have it: its kind (items of a list do not name it), name, namespace and content.
fn plain(object: &DynamicObject, resource: &ApiResource) -> Value {
    let mut value = object.data.clone();
    if let Some(members) = value.as_object_mut() {
        members.insert("apiVersion".into(), json!(resource.api_version));
        members.insert("kind".into(), json!(resource.kind));
        let (name, namespace) = (&object.metadata.name, &object.metadata.namespace);
        let mut metadata = json!({"name": name});
        if let Some(namespace) = namespace {
            metadata["namespace"] = json!(namespace);
        }
        members.insert("metadata".into(), metadata);
    }
    value
}

/// The `Valid` condition of an object, where it has one that can be read.
fn valid_condition(object: &Value) -> Option<Condition> {
    let conditions = object.pointer("/status/conditions")?.as_array()?;
    let valid = conditions.iter().find(|condition| condition["type"] == "Valid")?;
    serde_json::from_value(valid.clone()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    fn policy_of(feed: Feed) -> (PolicyRef, bool, Seen) {
        match feed {
            Feed::Policy {
                policy,
                outcome,
                seen,
            } => (policy, outcome.is_ok(), seen),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn policies_are_read_from_items_of_lists_and_from_events() {
        let resource = ApiResource::erase::<CiliumNetworkPolicy>(&());
        let kind = policies(PolicyKind::CiliumNetworkPolicy, resource, "c");
        let mut value = json!({
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": {"name": "web", "namespace": "shop", "generation": 3, "managedFields": []},
            "spec": {"endpointSelector": {}, "ingress": [{}]},
            "status": {"conditions": [{
                "type": "Valid", "status": "True", "reason": "Accepted", "message": "m",
                "observedGeneration": 2, "lastTransitionTime": "2026-01-01T00:00:00Z"
            }]}
        });
        let event = policy_of((kind.upsert)(&object(value.clone())).unwrap());
        let members = value.as_object_mut().unwrap();
        members.remove("apiVersion");
        members.remove("kind");
        let item = policy_of((kind.upsert)(&object(value.clone())).unwrap());
        assert_eq!(event, item);
        let (policy, valid, seen) = item;
        assert!(valid);
        assert_eq!(policy.to_string(), "CiliumNetworkPolicy shop/web");
        assert_eq!(seen.generation, Some(3));
        assert_eq!(seen.condition.unwrap().observed_generation, Some(2));
        value["spec"]["ingress"] = json!("nonsense");
        value["status"] = json!({"conditions": "nonsense"});
        let (same, valid, seen) = policy_of((kind.upsert)(&object(value)).unwrap());
        assert!(same == policy && !valid && seen.condition.is_none());
        match (kind.delete)(("shop".into(), "web".into())) {
            Feed::Event(SourceEvent::PolicyDelete(gone)) => assert_eq!(gone, policy),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn api_servers_are_those_of_all_slices() {
        let kind = apiservers();
        let slice = |name: &str, addresses: &[&str]| -> EndpointSlice {
            let endpoints: Vec<_> = addresses
                .iter()
                .map(|address| json!({"addresses": [address]}))
                .collect();
            serde_json::from_value(json!({
                "metadata": {"name": name}, "addressType": "IPv4", "endpoints": endpoints
            }))
            .unwrap()
        };
        let addresses = |feed: Feed| match feed {
            Feed::Event(SourceEvent::ApiServers(addresses)) => {
                addresses.into_iter().map(|ip| ip.to_string()).collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        };
        let first = (kind.upsert)(&slice("a", &["172.30.0.1", "172.30.0.2"])).unwrap();
        assert_eq!(addresses(first), ["172.30.0.1", "172.30.0.2"]);
        let second = (kind.upsert)(&slice("b", &["fd00::1"])).unwrap();
        assert_eq!(addresses(second), ["172.30.0.1", "172.30.0.2", "fd00::1"]);
        assert_eq!(addresses((kind.delete)((String::new(), "a".into()))), ["fd00::1"]);
    }
}
