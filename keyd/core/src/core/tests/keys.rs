//! Keys through the core: writes that fail or come too late, objects that were set back, revocations.

use warren_model::NodeKeys;

use super::{Index, closes, node, public_key, slots};
use crate::{
    event::{AgentEvent, Event, Mode, Output, RotationObject, SourceEvent},
    rotation::{PairReport, PathState, RotationPhase, RotationSpec},
    stored::{Object, Revoked, StoredNode},
};

fn write_of(outputs: &[Output]) -> Option<(NodeKeys, StoredNode)> {
    outputs.iter().find_map(|output| match output {
        Output::WriteKeys { was, node } => Some((was.clone(), StoredNode::clone(node))),
        _ => None,
    })
}

fn results(outputs: &[Output]) -> Vec<bool> {
    let result = |output: &Output| match output {
        Output::KeyResult { result, .. } => Some(result.is_ok()),
        _ => None,
    };
    outputs.iter().filter_map(result).collect()
}

fn notes(outputs: &[Output]) -> Vec<&'static str> {
    let note = |output: &Output| match output {
        Output::Note { reason, .. } => Some(*reason),
        _ => None,
    };
    outputs.iter().filter_map(note).collect()
}

/// A core whose writes are answered by hand, with a key of node1 on its way.
fn with_a_write() -> (Index, NodeKeys, StoredNode) {
    let mut index = Index::synced(Mode::Kubernetes, 2);
    let session = index.connect(1);
    index.core.handle(
        0,
        Event::Agent(AgentEvent::KeyProved {
            session,
            slots: slots(1, 9),
        }),
    );
    let outputs = index.core.poll(0);
    let (was, node) = write_of(&outputs).unwrap();
    assert!(
        results(&outputs).is_empty(),
        "nothing is said before it is durable"
    );
    assert_eq!(index.node(1).unwrap().slots, [], "and nothing is published");
    (index, was, node)
}

#[test]
fn a_key_is_published_and_accepted_once_it_is_written() {
    let (mut index, was, node) = with_a_write();
    let session = super::SessionId(1);
    let again = AgentEvent::KeyProved {
        session,
        slots: slots(1, 10),
    };
    index.core.handle(0, Event::Agent(again));
    let outputs = index.core.poll(0);
    assert_eq!(results(&outputs), [false], "one at a time");
    let stored = index.swap(&was, &node);
    index.core.handle(0, Event::Stored(Box::new(stored)));
    assert_eq!(results(&index.core.poll(0)), [true]);
    assert_eq!(index.node(1).unwrap().slots, slots(1, 9));
}

#[test]
fn a_write_that_another_leader_made_impossible_is_refused_and_its_keys_taken_over() {
    let (mut index, was, node) = with_a_write();
    let mut theirs = node.clone();
    let record = theirs.record.as_mut().unwrap();
    record.slots = slots(1, 11).to_vec();
    assert_eq!(index.swap(&was, &theirs), theirs);
    let stored = index.swap(&was, &node);
    assert_eq!(stored, theirs, "the second one does not write");
    index.core.handle(0, Event::Stored(Box::new(stored)));
    assert_eq!(results(&index.core.poll(0)), [false]);
    assert_eq!(index.node(1).unwrap().slots, slots(1, 11));
}

#[test]
fn an_object_that_was_set_back_is_written_anew() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    let session = index.connect(1);
    index.prove(session, 9).unwrap();
    let old = index.stored.nodes[0].clone();
    index.held(session, &[]);
    index.prove_as(session, 3, 10).unwrap();
    index.core.handle(0, Event::Stored(Box::new(old.clone())));
    let outputs = index.core.poll(0);
    assert_eq!(notes(&outputs), ["MeshNodeSetBack"]);
    assert_eq!(index.core.counters().set_back, 1);
    assert_eq!(index.node(1).unwrap().slots, slots(3, 10), "nobody hears of it");
    let written = outputs.iter().find_map(|output| match output {
        Output::Persist(Object::Node(node)) => Some(node),
        _ => None,
    });
    let written = written.unwrap().over(Some(&old)).unwrap();
    assert_eq!(written.record.unwrap().active, 3);
}

#[test]
fn other_parts_of_a_node_never_touch_its_keys() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    let session = index.connect(1);
    index.prove(session, 9).unwrap();
    let stale = index.stored.nodes[0].clone();
    index.held(session, &[]);
    index.prove_as(session, 3, 10).unwrap();
    let current = index.stored.nodes[0].clone();
    // A former leader writes an address with the keys that it knows.
    let merged = stale.over(Some(&current)).unwrap();
    assert_eq!(
        merged.record.unwrap().keys(),
        current.record.as_ref().unwrap().keys()
    );
    assert_eq!(merged.since, current.since);
    assert_eq!(merged.revoked, current.revoked, "what is revoked stays revoked");
    // A tombstone takes over whatever is there, and nobody gets behind it.
    let tombstone = StoredNode {
        record: None,
        revoked: vec![Revoked {
            uid: "uid1".into(),
            keys: vec![],
        }],
        ..stale.clone()
    };
    let dead = tombstone.over(Some(&current)).unwrap();
    assert!(dead.revoked[0].keys.contains(&public_key(10)));
    assert_eq!(stale.over(Some(&dead)), None);
    assert_eq!(
        current.in_place_of(&current.record.as_ref().unwrap().keys(), Some(&dead)),
        None
    );
}

#[test]
fn a_lost_object_does_not_set_generations_back() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    let session = index.connect(1);
    assert_eq!(index.held(session, &[(4, 9), (5, 10)]), Some(5));
    index.prove_as(session, 5, 10).unwrap();
    assert_eq!(index.node(1).unwrap().active, 5);
}

#[test]
fn nobody_makes_keyd_count_beyond_the_end() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    let session = index.connect(1);
    assert_eq!(index.held(session, &[(u64::MAX, 9)]), Some(1));
    for generation in [u64::MAX, u64::MAX - 1, 1 << 53] {
        let refused = index.prove_as(session, generation, 9).unwrap_err();
        assert!(refused.contains("beyond"), "{refused}");
    }
    let last = (1 << 53) - 1;
    index.prove_as(session, last, 9).unwrap();
    // It does not hold that one: it is asked for another, and there is none.
    let asked = last + 2;
    assert!(index.prove_as(session, asked, 10).unwrap_err().contains("beyond"));
    let many: Vec<_> = (1..=65).map(|generation| (generation, 9)).collect();
    let keys = many
        .iter()
        .map(|(generation, key)| (*generation, public_key(*key)));
    let keys = keys.collect();
    let outputs = index.agent(AgentEvent::Held { session, keys });
    assert!(closes(&outputs)[0].1.contains("more than 64"), "{outputs:?}");
}

#[test]
fn keys_of_a_former_incarnation_are_not_asked_for() {
    let mut index = Index::synced(Mode::Kubernetes, 1);
    let session = index.connect(1);
    index.prove(session, 9).unwrap();
    index.source(SourceEvent::NodeDelete("node1".into()));
    let mut anew = node(1);
    anew.uid = "uid1b".into();
    index.source(SourceEvent::NodeUpsert(anew));
    let session = index.connect(1);
    assert_eq!(index.held(session, &[(1, 9)]), Some(1));
    assert!(index.prove(session, 9).unwrap_err().contains("revoked"));
    index.prove(session, 10).unwrap();
}

#[test]
fn a_revoked_node_is_nobody_until_it_is_registered_anew() {
    let mut index = Index::synced(Mode::Kubernetes, 3);
    let sessions = [1, 2, 3].map(|n| index.connect(n));
    index.prove(sessions[0], 9).unwrap();
    assert!(index.core.revoke(0, &"node7".into(), "x").is_err());
    let uid = index.core.revoke(0, &"node1".into(), "stolen").unwrap();
    assert_eq!(uid.as_str(), "uid1");
    let outputs = index.poll();
    assert_eq!(notes(&outputs), ["KeysRevoked"]);
    assert_eq!(closes(&outputs)[0].0, 1);
    assert_eq!(index.node(1), None);
    let revocation = index.core.revocations().next().unwrap().clone();
    assert_eq!(revocation.version, index.core.version());
    assert_eq!(revocation.keys, [public_key(9)]);
    let acknowledged = |index: &Index| {
        let (done, waiting) = index.core.acknowledged(revocation.version);
        (done.len(), waiting.len())
    };
    assert_eq!(acknowledged(&index), (0, 2));
    index.applied(sessions[1]);
    assert_eq!(acknowledged(&index), (1, 1));
    // The Node is still there: its UID is dead, also for the next leader.
    index.source(SourceEvent::NodeUpsert(node(1)));
    assert_eq!(index.node(1), None);
    index.restart();
    for n in 1..=3 {
        index.source(SourceEvent::NodeUpsert(node(n)));
    }
    index.source(SourceEvent::Synced);
    assert_eq!(index.node(1), None);
    assert_eq!(index.core.revocations().next().unwrap().version, 1);
    let mut anew = node(1);
    anew.uid = "uid1b".into();
    index.source(SourceEvent::NodeUpsert(anew));
    assert_eq!(index.node(1).unwrap().slots, []);
}

/// Both agents say that everything works and that they send with what is active.
fn report_all(index: &mut Index, keys: &[(u64, &[u64], u64)]) {
    for here in 0..keys.len() {
        let pairs = (0..keys.len()).filter(|there| *there != here).map(|there| {
            let (own, peer) = (&keys[here], &keys[there]);
            let path = |own_generation: &u64, peer_generation: &u64| PathState {
                conflict: None,
                own: *own_generation,
                peer: *peer_generation,
                verified: true,
                sending: (*own_generation, *peer_generation) == (own.0, peer.0),
                quiet: *own_generation < own.0 || *peer_generation < peer.0,
            };
            let paths = own.1.iter().flat_map(|a| peer.1.iter().map(move |b| path(a, b)));
            PairReport {
                peer: format!("node{}", there + 1).into(),
                uid: format!("uid{}", there + 1).into(),
                paths: paths.collect(),
            }
        });
        let event = AgentEvent::Paths {
            session: super::SessionId(here as u64 + 1),
            pairs: pairs.collect(),
        };
        index.core.handle(index.now, Event::Agent(event));
    }
    index.poll();
}

#[test]
fn a_rotation_goes_through_the_core_and_survives_a_restart() {
    let mut index = Index::synced(Mode::Kubernetes, 2);
    for n in [1, 2] {
        let session = index.connect(n);
        assert_eq!(index.held(session, &[]), Some(1));
        index.prove(session, 8 + n).unwrap();
        index.held(session, &[(1, 8 + n)]);
    }
    report_all(&mut index, &[(1, &[1], 0), (1, &[1], 0)]);
    let object = |abort| RotationObject {
        name: "r".into(),
        uid: "r-uid".into(),
        generation: 1,
        created: 1,
        reason: String::new(),
        every: String::new(),
        spec: RotationSpec {
            selection: crate::rotation::Selection {
                names: ["node1".into()].into(),
                labels: Default::default(),
            },
            abort,
            ..RotationSpec::default()
        },
    };
    let asked = |outputs: &[Output]| {
        outputs.iter().find_map(|output| match output {
            Output::AskKey { session, generation } => Some((session.0, *generation)),
            _ => None,
        })
    };
    let outputs = index.source(SourceEvent::RotationUpsert(object(false)));
    assert_eq!(asked(&outputs).or_else(|| asked(&index.poll())), Some((1, 2)));
    let session = super::SessionId(1);
    // As agents do: what is on disk is said before it is offered.
    index.held(session, &[(1, 9), (2, 20)]);
    index.prove_as(session, 2, 20).unwrap();
    let progress = index.core.machine().standing("r").unwrap().progress.clone();
    assert_eq!(progress.phase, RotationPhase::Running);

    index.stored.rotations.push(crate::stored::StoredRotation {
        name: "r".into(),
        uid: "r-uid".into(),
        progress: progress.clone(),
    });
    index.restart();
    for n in [1, 2] {
        index.source(SourceEvent::NodeUpsert(node(n)));
    }
    index.source(SourceEvent::RotationUpsert(object(false)));
    index.source(SourceEvent::Synced);
    assert_eq!(*index.core.machine().standing("r").unwrap().progress, progress);
    index.connect(1);
    index.held(session, &[(1, 9), (2, 20)]);
    index.connect(2);
    index.held(super::SessionId(2), &[(1, 10)]);
    report_all(&mut index, &[(1, &[1, 2], 0), (1, &[1], 0)]);
    assert_eq!(index.node(1).unwrap().active, 2, "both ends have verified");
    report_all(&mut index, &[(2, &[1, 2], 0), (1, &[1], 0)]);
    index.now += 20_000;
    index.poll();
    assert_eq!(
        index.node(1).unwrap().slots,
        slots(2, 20),
        "retired after the drain"
    );
    assert!(index.stored.nodes.iter().any(|node| {
        let old = |revoked: &Revoked| revoked.keys.contains(&public_key(9));
        node.revoked.iter().any(old)
    }));
    index.held(session, &[(2, 20)]);
    report_all(&mut index, &[(2, &[2], 0), (1, &[1], 0)]);
    let standing = index.core.machine().standing("r").unwrap();
    assert_eq!(standing.progress.phase, RotationPhase::Succeeded);
    // Its object goes: so does what was stored of it.
    index.source(SourceEvent::RotationDelete("r".into()));
    assert_eq!(index.stored.rotations, []);
}
