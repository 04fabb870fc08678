//! The machine, step by step; many at once are in the simulation (`cargo xtask sim`).

use std::collections::BTreeMap;

use warren_model::{ForgetPsk, NodeName, PskConflict, PskId, PublicKey, SlotKey};

use super::{
    Concurrency, Event, Machine, NodeKeys, Outcome, Output, Pace, PairReport, PathState, Phase, Progress,
    RotationPhase, RotationSpec, Stragglers, due, half, slots_of,
};

fn name(node: usize) -> NodeName {
    format!("node{node}").into()
}

fn key(node: usize, generation: u64) -> PublicKey {
    let mut bytes = [9; 32];
    bytes[0] = node as u8;
    bytes[1] = generation as u8;
    PublicKey::from_bytes(bytes).unwrap()
}

fn slots(node: usize, generation: u64) -> Vec<SlotKey> {
    let slot = |slot| SlotKey {
        slot,
        port: 51871 + u16::from(slot),
        generation,
        public_key: key(node, generation),
        pre_shared_keys: true,
    };
    slots_of(generation).map(slot).to_vec()
}

fn first_keys(node: usize) -> NodeKeys {
    NodeKeys::none(format!("uid{node}").into())
        .admit(&slots(node, 1), false)
        .unwrap()
}

/// A few nodes whose writes succeed at once.
struct Mesh {
    machine: Machine,
    now: u64,
    keys: Vec<NodeKeys>,
    progress: Progress,
    asked: Vec<(NodeName, u64)>,
    revoked: Vec<NodeName>,
    forgets: Vec<(NodeName, ForgetPsk)>,
}

impl Mesh {
    fn new(nodes: usize) -> Self {
        let mut mesh = Self {
            machine: Machine::default(),
            now: 1_000,
            keys: (0..nodes).map(first_keys).collect(),
            progress: Progress::default(),
            asked: vec![],
            revoked: vec![],
            forgets: vec![],
        };
        mesh.take_over();
        mesh
    }

    /// A new leader: it has what is durable, and the agents come to it.
    fn take_over(&mut self) {
        self.machine = Machine::default();
        for node in 0..self.keys.len() {
            let keys = self.keys[node].clone();
            self.tell(Event::Keys {
                node: name(node),
                keys,
            });
            self.connect(node);
        }
    }

    fn tell(&mut self, event: Event) {
        self.machine.handle(self.now, event);
    }

    fn connect(&mut self, node: usize) {
        self.tell(Event::Connected(name(node)));
        let generations = self.keys[node].generations();
        self.hold(node, &generations.into_iter().collect::<Vec<_>>());
    }

    fn hold(&mut self, node: usize, generations: &[u64]) {
        let keys = generations
            .iter()
            .map(|generation| (*generation, key(node, *generation)))
            .collect();
        self.tell(Event::Held {
            node: name(node),
            keys,
        });
    }

    fn rotate(&mut self, spec: RotationSpec) {
        let progress = Some(self.progress.clone());
        self.tell(Event::Rotation {
            name: "r".into(),
            created: 0,
            spec,
            progress,
        });
        self.poll();
    }

    fn poll(&mut self) {
        // Writes make more to do.
        for _ in 0..5 {
            for output in self.machine.poll(self.now, self.now / 1000) {
                match output {
                    Output::AskKey { node, generation } => self.asked.push((node, generation)),
                    Output::Write { node, was, keys } => {
                        let index = (0..self.keys.len()).find(|index| name(*index) == node).unwrap();
                        assert_eq!(self.keys[index], was, "compare-and-swap");
                        self.keys[index] = keys.clone();
                        self.tell(Event::Keys { node, keys });
                    }
                    Output::Status { progress, .. } => self.progress = progress,
                    Output::Revoke(node) => self.revoked.push(node),
                    Output::Forget { node, forget } => self.forgets.push((node, forget)),
                    Output::Note { .. } => {}
                }
            }
        }
    }

    fn after(&mut self, ms: u64) {
        self.now += ms;
        self.poll();
    }

    fn prove(&mut self, node: usize, generation: u64) {
        let mut held: Vec<_> = self.keys[node].generations().into_iter().collect();
        held.push(generation);
        self.hold(node, &held);
        self.machine
            .proved(&name(node), &slots(node, generation))
            .unwrap();
        self.poll();
    }

    /// One end's report of all paths to a peer. `moved`: it sends on the active ones.
    fn report(&mut self, node: usize, peer: usize, verified: bool, moved: bool, quiet: bool) {
        let (own, other) = (&self.keys[node], &self.keys[peer]);
        let target = match moved {
            true => (own.active, other.active),
            false => (
                *own.generations().first().unwrap(),
                *other.generations().first().unwrap(),
            ),
        };
        let mut paths = vec![];
        for own in own.generations() {
            for peer in other.generations() {
                let sending = (own, peer) == target;
                paths.push(PathState {
                    own,
                    peer,
                    verified,
                    sending,
                    quiet: quiet && !sending,
                    conflict: None,
                });
            }
        }
        let report = PairReport {
            peer: name(peer),
            uid: other.uid.clone(),
            paths,
        };
        self.tell(Event::Report {
            node: name(node),
            pairs: vec![report],
        });
    }

    fn all_report(&mut self, verified: bool, moved: bool, quiet: bool) {
        for node in 0..self.keys.len() {
            for peer in (0..self.keys.len()).filter(|peer| *peer != node) {
                self.report(node, peer, verified, moved, quiet);
            }
        }
        self.poll();
    }

    fn phase(&self, node: usize) -> Option<Phase> {
        self.machine.phase(&name(node))
    }

    fn outcome(&self, node: usize) -> Option<&Outcome> {
        self.progress.plan[&name(node)].outcome.as_ref()
    }
}

fn only(node: usize) -> RotationSpec {
    let mut spec = RotationSpec::default();
    spec.selection.names.insert(name(node));
    spec
}

#[test]
fn a_node_goes_all_the_way() {
    let mut mesh = Mesh::new(3);
    mesh.rotate(only(0));
    assert_eq!(
        (mesh.phase(0), mesh.asked.clone()),
        (Some(Phase::Preparing), vec![(name(0), 2)])
    );
    mesh.prove(0, 2);
    assert_eq!((mesh.phase(0), mesh.keys[0].active), (Some(Phase::Verifying), 1));
    assert_eq!(mesh.keys[0].slots.len(), 4);
    mesh.all_report(true, false, false);
    assert_eq!((mesh.phase(0), mesh.keys[0].active), (Some(Phase::Switching), 2));
    mesh.all_report(true, true, false);
    assert_eq!(mesh.phase(0), Some(Phase::Switching));
    mesh.all_report(true, true, true);
    assert_eq!(mesh.phase(0), Some(Phase::Draining));
    mesh.after(14_999);
    assert_eq!(mesh.phase(0), Some(Phase::Draining));
    mesh.after(1);
    assert_eq!(
        (mesh.phase(0), mesh.keys[0].generations().len()),
        (Some(Phase::Retiring), 1)
    );
    mesh.all_report(true, true, true);
    assert_eq!(mesh.phase(0), Some(Phase::Retiring));
    mesh.hold(0, &[2]);
    mesh.poll();
    assert_eq!(
        (mesh.phase(0), mesh.progress.phase),
        (None, RotationPhase::Succeeded)
    );
    assert_eq!((mesh.keys[1].active, mesh.keys[2].active), (1, 1));
}

#[test]
fn one_end_that_is_silent_keeps_the_old_key_in_use() {
    let mut mesh = Mesh::new(3);
    mesh.rotate(only(0));
    mesh.prove(0, 2);
    mesh.all_report(true, false, false);
    let mut mesh = Mesh::new(3);
    mesh.rotate(only(0));
    mesh.prove(0, 2);
    for (node, peer) in [(0, 1), (1, 0), (0, 2)] {
        mesh.report(node, peer, true, false, false);
    }
    mesh.after(1_000);
    assert_eq!((mesh.phase(0), mesh.keys[0].active), (Some(Phase::Verifying), 1));
    mesh.report(2, 0, true, false, false);
    mesh.poll();
    assert_eq!(mesh.keys[0].active, 2);
}

#[test]
fn a_packet_on_the_old_path_begins_the_drain_anew() {
    let mut mesh = Mesh::new(2);
    mesh.rotate(only(0));
    mesh.prove(0, 2);
    mesh.all_report(true, false, false);
    mesh.all_report(true, true, true);
    mesh.after(10_000);
    mesh.report(1, 0, true, true, false);
    mesh.poll();
    mesh.report(1, 0, true, true, true);
    mesh.after(10_000);
    assert_eq!(mesh.phase(0), Some(Phase::Draining));
    mesh.after(15_000);
    assert_eq!(mesh.phase(0), Some(Phase::Retiring));
}

#[test]
fn past_the_deadline_the_old_key_stays_and_the_number_is_burnt() {
    let mut mesh = Mesh::new(2);
    mesh.rotate(only(0));
    mesh.prove(0, 2);
    mesh.after(600_000);
    assert_eq!(
        (mesh.keys[0].active, mesh.keys[0].last, mesh.keys[0].slots.len()),
        (1, 2, 2)
    );
    assert!(matches!(mesh.outcome(0), Some(Outcome::Failed(_))));
    assert_eq!(mesh.progress.phase, RotationPhase::Failed);
    // Generation 3 would have the half of the active one.
    assert_eq!((mesh.keys[0].next(), half(4)), (4, half(2)));
    assert!(mesh.machine.proved(&name(0), &slots(0, 2)).is_err());
}

#[test]
fn past_the_point_of_no_return_both_keys_stay_until_the_straggler_is_back() {
    let mut mesh = Mesh::new(3);
    mesh.rotate(only(0));
    mesh.prove(0, 2);
    mesh.all_report(true, false, false);
    mesh.tell(Event::Disconnected(name(2)));
    mesh.after(600_000);
    assert!(matches!(mesh.outcome(0), Some(Outcome::Stalled(_))));
    assert_eq!(
        (mesh.progress.phase, mesh.keys[0].slots.len()),
        (RotationPhase::Failed, 4)
    );
    mesh.connect(2);
    mesh.all_report(true, true, true);
    mesh.after(15_000);
    mesh.hold(0, &[2]);
    mesh.all_report(true, true, true);
    assert_eq!(
        (mesh.phase(0), mesh.keys[0].slots.len(), mesh.outcome(0)),
        (None, 2, None)
    );
}

#[test]
fn abort_takes_back_only_what_nobody_sends_with() {
    let mut mesh = Mesh::new(2);
    mesh.rotate(only(0));
    mesh.prove(0, 2);
    let abort = RotationSpec {
        abort: true,
        ..only(0)
    };
    mesh.rotate(abort.clone());
    assert_eq!((mesh.keys[0].active, mesh.keys[0].slots.len()), (1, 2));
    assert_eq!(mesh.progress.phase, RotationPhase::Aborted);

    let mut mesh = Mesh::new(2);
    mesh.rotate(only(0));
    mesh.prove(0, 2);
    mesh.all_report(true, false, false);
    mesh.rotate(abort);
    mesh.all_report(true, true, true);
    mesh.after(15_000);
    assert_eq!((mesh.keys[0].active, mesh.keys[0].slots.len()), (2, 2));
}

#[test]
fn a_new_leader_goes_on_from_what_is_durable() {
    let mut mesh = Mesh::new(3);
    mesh.rotate(RotationSpec::default());
    mesh.prove(0, 2);
    mesh.all_report(true, false, false);
    assert_eq!(mesh.keys[0].active, 2);
    mesh.take_over();
    mesh.rotate(RotationSpec::default());
    assert_eq!(mesh.phase(0), Some(Phase::Switching));
    // What agents said to the leader before counts no more.
    mesh.after(20_000);
    assert_eq!(mesh.keys[0].slots.len(), 4);
    mesh.all_report(true, true, true);
    mesh.after(15_000);
    assert_eq!((mesh.keys[0].slots.len(), mesh.progress.run), (2, 1));
}

#[test]
fn a_write_that_somebody_else_made_impossible_is_decided_anew() {
    let mut mesh = Mesh::new(2);
    mesh.rotate(only(0));
    mesh.prove(0, 2);
    // Another leader has withdrawn the key meanwhile.
    let theirs = mesh.keys[0].only_active();
    mesh.keys[0] = theirs.clone();
    mesh.tell(Event::Keys {
        node: name(0),
        keys: theirs,
    });
    mesh.asked.clear();
    mesh.poll();
    assert_eq!(mesh.asked, [(name(0), 4)]);
}

#[test]
fn a_lost_key_is_replaced_at_once() {
    let mut mesh = Mesh::new(2);
    mesh.tell(Event::Connected(name(0)));
    mesh.hold(0, &[]);
    mesh.poll();
    assert_eq!(mesh.asked, [(name(0), 3)]);
    mesh.hold(0, &[3]);
    mesh.machine.proved(&name(0), &slots(0, 3)).unwrap();
    mesh.poll();
    assert_eq!((mesh.keys[0].active, mesh.keys[0].generations().len()), (3, 1));
    // The same number with another key is lost as well.
    let other = BTreeMap::from([(3, key(7, 7))]);
    mesh.asked.clear();
    mesh.tell(Event::Held {
        node: name(0),
        keys: other,
    });
    mesh.poll();
    assert_eq!(mesh.asked, [(name(0), 5)]);
}

#[test]
fn a_new_node_is_asked_for_its_first_key() {
    let mut mesh = Mesh::new(2);
    mesh.keys.push(NodeKeys::none("uid2".into()));
    let keys = mesh.keys[2].clone();
    mesh.tell(Event::Keys { node: name(2), keys });
    mesh.tell(Event::Connected(name(2)));
    mesh.poll();
    assert!(mesh.asked.is_empty(), "what it has comes first");
    mesh.hold(2, &[]);
    mesh.poll();
    assert_eq!(mesh.asked, [(name(2), 1)]);
    mesh.prove(2, 1);
    assert_eq!(mesh.keys[2].active, 1);
    mesh.all_report(true, true, false);
    assert_eq!(mesh.phase(2), None);
}

#[test]
fn a_window_of_nodes_moves_at_once() {
    let mut mesh = Mesh::new(6);
    let pace = Pace {
        concurrency: Concurrency::Nodes(2),
        ..Pace::default()
    };
    mesh.rotate(RotationSpec {
        pace,
        ..RotationSpec::default()
    });
    assert_eq!(mesh.asked.len(), 2);
    mesh.tell(Event::Gone(name(0)));
    mesh.poll();
    assert_eq!((mesh.asked.len(), mesh.outcome(0)), (3, Some(&Outcome::Gone)));
    assert_eq!(Concurrency::Percent(10).of(500), 50);
    assert_eq!(Concurrency::Percent(10).of(3), 1);
}

#[test]
fn nothing_begins_while_somebody_is_away() {
    for (stragglers, left, revoked) in [
        (Stragglers::Wait, false, false),
        (Stragglers::Leave, true, false),
        (Stragglers::Revoke, false, true),
    ] {
        let mut mesh = Mesh::new(3);
        mesh.tell(Event::Disconnected(name(2)));
        mesh.all_report(false, false, false);
        mesh.rotate(RotationSpec {
            stragglers,
            ..only(0)
        });
        mesh.after(179_000);
        assert!(mesh.asked.is_empty(), "{stragglers:?}");
        // Sessions are dead by now: the straggler has no traffic with anybody.
        mesh.after(1_000);
        assert_eq!(!mesh.asked.is_empty(), left, "{stragglers:?}");
        mesh.after(600_000);
        assert_eq!(mesh.revoked == [name(2)], revoked, "{stragglers:?}");
        assert_eq!(mesh.keys[0].active, 1);
    }
}

#[test]
fn keys_that_were_not_asked_for_are_refused() {
    let mut mesh = Mesh::new(2);
    assert!(mesh.machine.proved(&name(0), &slots(0, 2)).is_err());
    mesh.rotate(only(0));
    assert!(mesh.machine.proved(&name(0), &slots(0, 3)).is_err());
    assert!(mesh.machine.proved(&name(0), &slots(0, 2)[..1]).is_err());
    let mut wrong = slots(0, 2);
    wrong[0].slot = 0;
    assert!(mesh.machine.proved(&name(0), &wrong).is_err());
    assert!(mesh.machine.proved(&name(5), &slots(5, 1)).is_err());
    // What is published already is no news.
    assert_eq!(mesh.machine.proved(&name(0), &slots(0, 1)), Ok(()));
}

#[test]
fn schedules_make_up_for_missed_runs_once() {
    assert_eq!(due(1_000, 400, 600), (true, 400));
    assert_eq!(due(999, 400, 600), (false, 400));
    assert_eq!(due(100_000, 400, 600), (true, 400));
    // The clock was set back: from now on, not never.
    assert_eq!(due(300, 4_000_000, 600), (false, 300));

    let mut mesh = Mesh::new(2);
    let spec = RotationSpec {
        every_seconds: Some(3_600),
        ..only(0)
    };
    mesh.rotate(spec);
    mesh.prove(0, 2);
    mesh.all_report(true, false, false);
    mesh.all_report(true, true, true);
    mesh.after(15_000);
    mesh.hold(0, &[2]);
    mesh.all_report(true, true, true);
    assert_eq!(
        (mesh.progress.phase, mesh.progress.run),
        (RotationPhase::Succeeded, 1)
    );
    mesh.after(10 * 3_600_000);
    assert_eq!(
        (mesh.progress.phase, mesh.progress.run),
        (RotationPhase::Running, 2)
    );
    assert_eq!(mesh.asked.last(), Some(&(name(0), 3)));
}

#[test]
fn both_ends_are_told_which_pre_shared_key_to_forget() {
    let mut mesh = Mesh::new(3);
    let conflict = |own: Option<u8>, peer: Option<u8>| {
        let id = |byte: Option<u8>| byte.map(|byte| PskId([byte; 16]));
        let path = PathState {
            own: 1,
            peer: 1,
            verified: false,
            sending: true,
            quiet: false,
            conflict: Some(PskConflict {
                own: id(own),
                peer: id(peer),
            }),
        };
        vec![PairReport {
            peer: name(1),
            uid: mesh.keys[1].uid.clone(),
            paths: vec![path],
        }]
    };
    let lost = conflict(None, Some(7));
    let differ = conflict(Some(6), Some(7));
    let report = |mesh: &mut Mesh, pairs: &Vec<PairReport>| {
        let (node, pairs) = (name(0), pairs.clone());
        mesh.tell(Event::Report { node, pairs });
        mesh.poll();
        std::mem::take(&mut mesh.forgets)
    };
    let order = |node: usize, peer: usize, byte: u8| {
        let peer = name(peer);
        let id = PskId([byte; 16]);
        (
            name(node),
            ForgetPsk {
                peer,
                own: 1,
                other: 1,
                id,
            },
        )
    };
    assert_eq!(report(&mut mesh, &lost), [order(1, 0, 7)]);
    mesh.after(1_000);
    assert_eq!(mesh.forgets, [], "it has a while");
    mesh.after(5_000);
    assert_eq!(std::mem::take(&mut mesh.forgets), [order(1, 0, 7)]);
    assert_eq!(report(&mut mesh, &differ), [order(0, 1, 6), order(1, 0, 7)]);
    // Whoever is not there is told when it comes.
    mesh.tell(Event::Disconnected(name(1)));
    mesh.after(5_000);
    assert_eq!(std::mem::take(&mut mesh.forgets), [order(0, 1, 6)]);
    mesh.connect(1);
    mesh.after(5_000);
    assert_eq!(std::mem::take(&mut mesh.forgets).len(), 2);
    // It is over, or the one that said so is gone.
    mesh.report(0, 1, true, true, false);
    mesh.after(5_000);
    assert_eq!(mesh.forgets, []);
    assert_eq!(report(&mut mesh, &lost).len(), 1);
    mesh.tell(Event::Disconnected(name(0)));
    mesh.after(5_000);
    assert_eq!(mesh.forgets, []);
}
