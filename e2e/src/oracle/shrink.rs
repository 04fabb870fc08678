//! Makes what differs small: drops objects, members and items for as long as the difference stays.

use serde_json::Value;

use super::cluster::{Cluster, Packet, Party};

/// The smallest cluster found for which `differs` still holds.
pub(super) fn shrink(
    mut cluster: Cluster,
    packet: &Packet,
    mut differs: impl FnMut(&Cluster) -> bool,
) -> Cluster {
    loop {
        match smaller(&cluster, packet)
            .into_iter()
            .find(|candidate| differs(candidate))
        {
            Some(candidate) => cluster = candidate,
            None => return cluster,
        }
    }
}

/// Every cluster that lacks one thing.
fn smaller(cluster: &Cluster, packet: &Packet) -> Vec<Cluster> {
    let mut out = Vec::new();
    let change = |out: &mut Vec<Cluster>, f: &dyn Fn(&mut Cluster)| {
        let mut candidate = cluster.clone();
        f(&mut candidate);
        out.push(candidate);
    };
    for index in 0..cluster.objects.len() {
        change(&mut out, &|c| drop(c.objects.remove(index)));
    }
    if !cluster.broken.is_empty() {
        change(&mut out, &|c| c.broken.clear());
    }
    if !cluster.groups.is_empty() {
        change(&mut out, &|c| c.groups.clear());
    }
    for (index, object) in cluster.objects.iter().enumerate() {
        for section in ["spec", "specs"] {
            for value in without_one(&object[section]) {
                change(&mut out, &|c| c.objects[index][section] = value.clone());
            }
        }
    }
    // The last pod can go where the packet does not name it.
    let needed = |party| matches!(party, Party::Pod(index) if index + 1 == cluster.pods.len());
    if cluster.pods.len() > 1 && !needed(packet.subject) && !needed(packet.peer) {
        change(&mut out, &|c| drop(c.pods.pop()));
    }
    for (index, pod) in cluster.pods.iter().enumerate() {
        for key in pod.labels.keys() {
            change(&mut out, &|c| drop(c.pods[index].labels.remove(key)));
        }
    }
    out
}

/// Every value that lacks one member or item, anywhere inside.
fn without_one(value: &Value) -> Vec<Value> {
    let mut out = Vec::new();
    match value {
        Value::Object(members) => {
            for (name, inner) in members {
                let mut less = members.clone();
                less.remove(name);
                out.push(Value::Object(less));
                for smaller in without_one(inner) {
                    let mut changed = members.clone();
                    changed.insert(name.clone(), smaller);
                    out.push(Value::Object(changed));
                }
            }
        }
        Value::Array(items) => {
            for (index, inner) in items.iter().enumerate() {
                let mut less = items.clone();
                less.remove(index);
                out.push(Value::Array(less));
                for smaller in without_one(inner) {
                    let mut changed = items.clone();
                    changed[index] = smaller;
                    out.push(Value::Array(changed));
                }
            }
        }
        _ => {}
    }
    out
}
