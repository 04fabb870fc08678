//! New keys for running nodes, step by step as a `keyd` of the test's own says: no packet is lost, none comes twice, and
//! of a former key nothing is left.

mod support;

use std::{ffi::OsString, fs};

use support::{Keyd, Mesh, Node, Pod, eventually, flow, memory::Secret, slots_of_key};
use warren_agent_api::{KeyPhase, KeyState};
use warren_model::{
    NodeRecord, PublicKey,
    keys::{NodeKeys, PathState},
};

fn name(node: &Node) -> String {
    format!("node{}", node.number)
}

/// Publishes other keys of a node.
fn publish(keyd: &Keyd, node: &str, change: impl Fn(&NodeKeys) -> NodeKeys) {
    let mut nodes = keyd.nodes();
    let record = nodes
        .iter_mut()
        .find(|record| record.name.as_str() == node)
        .unwrap();
    let keys = change(&record.keys());
    (record.slots, record.active, record.last) = (keys.slots, keys.active, keys.last);
    keyd.set_nodes(nodes);
}

fn record(keyd: &Keyd, node: &str) -> NodeRecord {
    let nodes = keyd.nodes();
    nodes
        .into_iter()
        .find(|record| record.name.as_str() == node)
        .unwrap()
}

/// Whether every end of every pair of `nodes` says something of its paths.
fn all_say(keyd: &Keyd, nodes: &[String], says: impl Fn(&NodeKeys, &NodeKeys, &[PathState]) -> bool) -> bool {
    nodes.iter().all(|here| {
        nodes.iter().filter(|there| *there != here).all(|there| {
            let (own, other) = (record(keyd, here).keys(), record(keyd, there).keys());
            says(&own, &other, &keyd.paths(here, there))
        })
    })
}

/// The steps of a rotation, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Preparing,
    Verifying,
    Switching,
    Draining,
    Retiring,
}

/// Gives `nodes` new keys, all at once; `at` is called as soon as a phase has begun.
fn rotate(mesh: &mut Mesh, nodes: &[String], mut at: impl FnMut(Phase, &mut Mesh)) {
    let keyd = mesh.keyd.clone();
    let all: Vec<String> = mesh.nodes.iter().map(name).collect();
    let before: Vec<NodeKeys> = nodes.iter().map(|node| record(&keyd, node).keys()).collect();
    let chosen = |mesh: &Mesh| -> Vec<usize> {
        (0..mesh.nodes.len())
            .filter(|n| nodes.contains(&name(&mesh.nodes[*n])))
            .collect()
    };
    let secrets: Vec<Secret> = chosen(mesh)
        .into_iter()
        .zip(&before)
        .map(|(n, keys)| Secret::of(&mesh.nodes[n], keys.active))
        .collect();
    for (n, secret) in chosen(mesh).into_iter().zip(&secrets) {
        assert!(
            secret.is_in_agent(&mesh.nodes[n]),
            "the search finds a key that is in use"
        );
    }
    for (node, keys) in nodes.iter().zip(&before) {
        keyd.ask_key(node, keys.next());
    }
    at(Phase::Preparing, mesh);
    for (node, keys) in nodes.iter().zip(&before) {
        let generation = keys.next();
        eventually(&format!("{node} proves a key"), || {
            keyd.proved(node, generation).is_some()
        });
        let key = keyd.proved(node, generation).unwrap();
        eventually(&format!("{node} holds its key"), || {
            keyd.held(node).get(&generation) == Some(&key)
        });
        publish(&keyd, node, |keys| {
            keys.admit(&slots_of_key(generation, key), false).unwrap()
        });
    }
    at(Phase::Verifying, mesh);
    eventually("all new paths are verified", || {
        all_say(&keyd, &all, |own, other, paths| {
            let newest = |keys: &NodeKeys| keys.candidate().unwrap_or(keys.active);
            let wanted = [
                (newest(own), other.active),
                (own.active, newest(other)),
                (newest(own), newest(other)),
            ];
            wanted
                .iter()
                .all(|pair| paths.iter().any(|p| (p.own, p.peer) == *pair && p.verified))
        })
    });
    for node in nodes {
        publish(&keyd, node, NodeKeys::commit);
    }
    at(Phase::Switching, mesh);
    eventually("all pairs send on the new paths", || {
        all_say(&keyd, &all, |own, other, paths| {
            paths
                .iter()
                .any(|p| (p.own, p.peer) == (own.active, other.active) && p.sending)
        })
    });
    at(Phase::Draining, mesh);
    eventually("the former paths are quiet", || {
        all_say(&keyd, &all, |own, other, paths| {
            let active = |p: &PathState| (p.own, p.peer) == (own.active, other.active);
            paths.iter().any(|p| active(p) && p.sending) && paths.iter().all(|p| active(p) || p.quiet)
        })
    });
    for node in nodes {
        publish(&keyd, node, NodeKeys::only_active);
    }
    at(Phase::Retiring, mesh);
    for (node, keys) in nodes.iter().zip(&before) {
        eventually(&format!("{node} destroys its key"), || {
            keyd.held(node).keys().copied().collect::<Vec<_>>() == [keys.next()]
        });
    }
    for (node, keys) in mesh
        .nodes
        .iter()
        .filter(|node| nodes.contains(&name(node)))
        .zip(&before)
    {
        is_gone(node, keys.active, keys.key(keys.active).unwrap());
    }
    for node in &mesh.nodes {
        eventually("only what is needed is left", || {
            let status = node.encrypt_status();
            let active = record(&keyd, &name(node)).active;
            status.enabled
                && status.keys.phase == KeyPhase::Settled
                && status.peers.len() == mesh.nodes.len() - 1
                && status
                    .interfaces
                    .iter()
                    .all(|i| i.generation == active || i.public_key.is_none())
        });
    }
}

/// Of a former key nothing is left on its node's devices and disk.
fn is_gone(node: &Node, generation: u64, key: PublicKey) {
    let keys = node.home.join("state/keys");
    let files: Vec<_> = fs::read_dir(keys)
        .unwrap()
        .map(|file| file.unwrap().file_name())
        .collect();
    assert!(
        !files.contains(&format!("gen{generation}.key").into()),
        "{files:?}"
    );
    let is_key = |name: &&OsString| name.to_string_lossy().ends_with(".key");
    assert_eq!(files.iter().filter(is_key).count(), 1, "{files:?}");
    let status = node.encrypt_status();
    assert!(
        status
            .interfaces
            .iter()
            .all(|interface| interface.public_key != Some(key))
    );
    assert!(
        status
            .keys
            .generations
            .iter()
            .all(|known| known.state == KeyState::Active && known.held)
    );
}

fn pods(mesh: &mut Mesh) -> Vec<Pod> {
    mesh.start();
    let pods: Vec<Pod> = mesh.nodes.iter_mut().map(|node| node.add_pod(10)).collect();
    for from in &pods {
        for to in pods.iter().filter(|to| to.netns != from.netns) {
            for address in [&to.v4, &to.v6] {
                eventually(&format!("{} reaches {address}", from.netns), || {
                    from.ping(address)
                });
            }
        }
    }
    pods
}

#[test]
fn one_then_the_other_then_both_and_again_without_losing_a_packet() {
    let mut mesh = Mesh::new(2);
    let pods = pods(&mut mesh);
    let flows = flow::between(&pods[0], &pods[1]);
    let [first, second] = [name(&mesh.nodes[0]), name(&mesh.nodes[1])];
    let rounds = [
        vec![first.clone()],
        vec![second.clone()],
        vec![first.clone(), second.clone()],
        vec![first],
    ];
    for nodes in rounds {
        rotate(&mut mesh, &nodes, |_, _| {});
    }
    for flow in flows {
        assert!(flow.end() > 0);
    }
    assert_eq!(mesh.nodes[0].encrypt_status().keys.generations[0].generation, 4);
}

#[test]
fn an_agent_may_die_in_every_phase() {
    let mut mesh = Mesh::new(2);
    let pods = pods(&mut mesh);
    let flows = flow::between(&pods[0], &pods[1]);
    let both = [name(&mesh.nodes[0]), name(&mesh.nodes[1])];
    for victim in 0..2 {
        rotate(&mut mesh, &both, |_, mesh| {
            mesh.nodes[victim].kill_agent();
            mesh.nodes[victim].start();
        });
    }
    for flow in flows {
        assert!(flow.end() > 0);
    }
}

#[test]
fn a_key_that_is_withdrawn_leaves_nothing() {
    let mut mesh = Mesh::new(2);
    let pods = pods(&mut mesh);
    let flows = flow::between(&pods[0], &pods[1]);
    let keyd = mesh.keyd.clone();
    let node = name(&mesh.nodes[0]);
    keyd.ask_key(&node, 2);
    eventually("a key is proved", || keyd.proved(&node, 2).is_some());
    let key = keyd.proved(&node, 2).unwrap();
    publish(&keyd, &node, |keys| {
        keys.admit(&slots_of_key(2, key), false).unwrap()
    });
    eventually("the new path is there", || keyd.paths("node2", &node).len() == 2);
    assert_eq!(mesh.nodes[0].encrypt_status().keys.phase, KeyPhase::Verifying);
    publish(&keyd, &node, NodeKeys::only_active);
    eventually("the key is destroyed", || {
        keyd.held(&node).keys().copied().eq([1])
    });
    is_gone(&mesh.nodes[0], 2, key);
    for flow in flows {
        assert!(flow.end() > 0);
    }
}

#[test]
fn a_disk_that_is_set_back_takes_nothing_back() {
    let mut mesh = Mesh::new(2);
    let pods = pods(&mut mesh);
    let before = fs::read(mesh.nodes[0].home.join("state/snapshot")).unwrap();
    let flows = flow::between(&pods[0], &pods[1]);
    let both = [name(&mesh.nodes[0]), name(&mesh.nodes[1])];
    rotate(&mut mesh, &both, |_, _| {});
    let devices = mesh.nodes[0].encrypt_status().interfaces;
    mesh.nodes[0].kill_agent();
    fs::write(mesh.nodes[0].home.join("state/snapshot"), before).unwrap();
    mesh.nodes[0].start();
    mesh.nodes[0].wait_ready();
    assert_eq!(mesh.nodes[0].encrypt_status().interfaces, devices);
    for flow in flows {
        assert!(flow.end() > 0);
    }
}
