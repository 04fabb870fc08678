//! Rotations from the manifest to the last destroyed key, over the real stream, with keyd killed wherever it hurts.

#[path = "support/rotating.rs"]
mod rotating;
#[expect(dead_code, reason = "the other suites use the rest")]
mod support;

use std::{collections::BTreeSet, fs, time::Duration};

use rotating::{Hold, Rotating};
use support::{Keyd, node};
use tokio::{sync::watch, time::timeout};
use warren_keyd_api::proto::{
    ListKeysRequest, ListKeysResponse, RotationStatus, RotationsRequest, keys_client::KeysClient,
};

/// Longer than the shortest deadline of a rotation (30 s) with all that follows.
const PATIENCE: Duration = Duration::from_secs(100);

/// keyd and an agent on each of three nodes, all with their first keys.
struct Lab {
    keyd: Keyd,
    address: watch::Sender<String>,
    agents: Vec<Rotating>,
}

impl Lab {
    async fn new() -> Self {
        let manifests: Vec<_> = (1..=3).map(node).collect();
        let keyd = Keyd::start(&manifests.concat());
        let (address, addresses) = watch::channel(keyd.address.clone());
        let mut agents = vec![];
        for n in 1..=3 {
            let name = format!("node{n}");
            let enrolment = keyd.enroll(&name).await;
            agents.push(Rotating::start(&name, enrolment, addresses.clone()));
        }
        let lab = Self {
            keyd,
            address,
            agents,
        };
        lab.until("everybody has a first key", |lab| {
            lab.agents.iter().all(|agent| {
                (1..=3).all(|n| {
                    agent
                        .sees(&format!("node{n}"))
                        .is_some_and(|keys| keys.active == 1)
                })
            })
        })
        .await;
        lab.keys_where("nobody is on its way", |keys| {
            keys.nodes.iter().all(|node| node.phase == 0)
        })
        .await;
        lab
    }

    /// A KeyRotation in the manifest folder, with the shortest drain time.
    fn rotate(&self, name: &str, spec: &str) {
        let text = format!(
            "apiVersion: warren.dev/v1alpha1\nkind: KeyRotation\nmetadata: {{name: {name}}}\n\
             spec:\n  reason: test\n  pace: {{drainSeconds: 1, deadlineSeconds: 30, concurrency: '3'}}\n{spec}"
        );
        fs::write(self.keyd.dir.path().join(format!("m/{name}.yaml")), text).unwrap();
    }

    fn hold_all(&self, hold: &Hold) {
        self.agents.iter().for_each(|agent| agent.hold(hold.clone()));
    }

    fn restart(&mut self) {
        self.keyd.restart();
        self.address.send_replace(self.keyd.address.clone());
    }

    async fn client(&self) -> KeysClient<tonic::transport::Channel> {
        let channel = warren_keyd_api::admin::channel(&self.keyd.socket())
            .await
            .unwrap();
        KeysClient::new(channel)
    }

    async fn keys(&self) -> ListKeysResponse {
        let request = ListKeysRequest::default();
        self.client().await.list(request).await.unwrap().into_inner()
    }

    async fn rotations(&self) -> Vec<RotationStatus> {
        let request = RotationsRequest::default();
        let response = self.client().await.rotations(request).await.unwrap();
        response.into_inner().rotations
    }

    async fn until(&self, what: &str, wanted: impl Fn(&Self) -> bool) {
        let reached = timeout(PATIENCE, async {
            while !wanted(self) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        if reached.await.is_err() {
            self.fail(what).await;
        }
    }

    async fn keys_where(&self, what: &str, wanted: impl Fn(&ListKeysResponse) -> bool) -> ListKeysResponse {
        let reached = timeout(PATIENCE, async {
            loop {
                let keys = self.keys().await;
                if wanted(&keys) {
                    return keys;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        match reached.await {
            Ok(keys) => keys,
            Err(_) => self.fail(what).await,
        }
    }

    async fn rotation_where(
        &self,
        name: &str,
        what: &str,
        wanted: impl Fn(&RotationStatus) -> bool,
    ) -> RotationStatus {
        let reached = timeout(PATIENCE, async {
            loop {
                let all = self.rotations().await;
                if let Some(one) = all.into_iter().find(|one| one.name == name && wanted(one)) {
                    return one;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        match reached.await {
            Ok(rotation) => rotation,
            Err(_) => self.fail(what).await,
        }
    }

    async fn fail(&self, what: &str) -> ! {
        panic!(
            "never: {what}\nrotations: {:#?}\nkeys: {:#?}\nlog: {:#?}",
            self.rotations().await,
            self.keys().await.nodes,
            self.keyd.log()
        );
    }

    /// Nobody complained, and everybody has exactly these generations: on disk and in the directory.
    async fn all_have(&self, generation: u64) {
        self.until(&format!("everybody has generation {generation} alone"), |lab| {
            lab.agents.iter().all(|agent| {
                agent.held() == BTreeSet::from([generation])
                    && (1..=3).all(|n| {
                        let keys = agent.sees(&format!("node{n}"));
                        keys.is_some_and(|keys| {
                            keys.active == generation && keys.generations() == [generation].into()
                        })
                    })
            })
        })
        .await;
        self.nobody_complains();
    }

    fn nobody_complains(&self) {
        let mut problems: Vec<_> = self.agents.iter().flat_map(Rotating::problems).collect();
        // A write that came too late; the key is asked for again.
        problems.retain(|problem| !problem.contains("it was not stored"));
        assert_eq!(problems, Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_manifest_rotates_every_key() {
    let lab = Lab::new().await;
    lab.rotate("spring", "");
    let done = lab
        .rotation_where("spring", "it succeeds", |one| one.phase == "Succeeded")
        .await;
    let counts = done.counts.unwrap();
    assert_eq!((counts.total, counts.done), (3, 3));
    assert!(done.exceptions.is_empty() && done.started_unix_ms > 0 && done.completed_unix_ms > 0);
    lab.all_have(2).await;
    // And again: the halves change places.
    lab.rotate("summer", "");
    lab.rotation_where("summer", "it succeeds", |one| one.phase == "Succeeded")
        .await;
    lab.all_have(3).await;
}

#[tokio::test]
async fn a_new_leader_goes_on_in_every_phase() {
    let mut lab = Lab::new().await;
    let phases = [
        (2, "asked"),
        (3, "verifying"),
        (4, "moving"),
        (4, "quiet"),
        (6, "destroying"),
    ];
    for (round, (phase, held_back)) in phases.into_iter().enumerate() {
        let hold = Hold {
            asked: held_back == "asked",
            verifying: held_back == "verifying",
            moving: held_back == "moving",
            quiet: held_back == "quiet",
            destroying: held_back == "destroying",
            ..Hold::default()
        };
        lab.hold_all(&hold);
        let name = format!("round{round}");
        lab.rotate(&name, "");
        lab.keys_where(held_back, |keys| {
            keys.nodes.iter().all(|node| node.phase == phase)
        })
        .await;
        lab.restart();
        // The next one knows it from what is stored, before any agent has said a word. That everybody has a new key and
        // only old ones are to be destroyed counts as done.
        lab.rotation_where(&name, held_back, |one| {
            let known = one.phase == "Running" || held_back == "destroying" && one.phase == "Succeeded";
            known && one.run == 1
        })
        .await;
        lab.hold_all(&Hold::default());
        let done = lab
            .rotation_where(&name, "it succeeds", |one| one.phase == "Succeeded")
            .await;
        assert_eq!((done.run, done.counts.unwrap().done), (1, 3), "{held_back}");
        lab.all_have(round as u64 + 2).await;
    }
}

#[tokio::test]
async fn an_abort_takes_back_what_nobody_sends_with_and_finishes_the_rest() {
    let lab = Lab::new().await;
    lab.hold_all(&Hold {
        verifying: true,
        ..Hold::default()
    });
    lab.rotate("first", "");
    lab.keys_where("all verify", |keys| keys.nodes.iter().all(|node| node.phase == 3))
        .await;
    lab.rotate("first", "  abort: true\n");
    let over = lab
        .rotation_where("first", "it is aborted", |one| one.phase == "Aborted")
        .await;
    assert_eq!(over.exceptions.len(), 3);
    lab.hold_all(&Hold::default());
    lab.all_have(1).await;

    // Past the point of no return it is finished. Generation 2 is burnt, 3 is of the half in use.
    let moving = Hold {
        moving: true,
        ..Hold::default()
    };
    lab.hold_all(&moving);
    lab.rotate("second", "");
    lab.keys_where("all switch", |keys| {
        keys.nodes.iter().all(|node| node.phase == 4 && node.active == 4)
    })
    .await;
    lab.rotate("second", "  abort: true\n");
    lab.rotation_where("second", "the abort is seen", |one| one.abort)
        .await;
    lab.hold_all(&Hold::default());
    lab.rotation_where("second", "it is over", |one| one.phase == "Aborted")
        .await;
    lab.all_have(4).await;
}

#[tokio::test]
async fn a_deadline_leaves_the_old_keys_working() {
    let lab = Lab::new().await;
    lab.agents[2].hold(Hold {
        verifying: true,
        ..Hold::default()
    });
    lab.rotate("late", "");
    let over = lab
        .rotation_where("late", "it fails", |one| one.phase == "Failed")
        .await;
    assert_eq!(over.counts.unwrap().failed, 3);
    let sentence = &over.exceptions[0].message;
    assert!(sentence.contains("the old key stays"), "{sentence}");
    lab.agents[2].hold(Hold::default());
    lab.all_have(1).await;
    let log = lab.keyd.log().join("\n");
    assert!(log.contains("KeyRotationFailed"), "{log}");
}

#[tokio::test]
async fn stragglers_are_waited_for_or_revoked() {
    let lab = Lab::new().await;
    lab.agents[2].hold(Hold {
        connected: true,
        ..Hold::default()
    });
    lab.keyd
        .status_where("node3 has left", |status| {
            status.nodes.iter().filter(|node| node.connected).count() == 2
        })
        .await;
    lab.rotate("patient", "  nodes: {names: [node1]}\n");
    let waits = lab
        .rotation_where("patient", "it runs", |one| one.phase == "Running")
        .await;
    assert_eq!(waits.counts.unwrap().total, 1);
    lab.agents[2].hold(Hold::default());
    lab.rotation_where("patient", "it succeeds", |one| one.phase == "Succeeded")
        .await;
    let generations = |n: usize| lab.agents[n].sees(&format!("node{}", n + 1)).unwrap().active;
    assert_eq!((generations(0), generations(1)), (2, 1));

    lab.agents[2].hold(Hold {
        connected: true,
        ..Hold::default()
    });
    lab.keyd
        .status_where("node3 has left again", |status| {
            status.nodes.iter().filter(|node| node.connected).count() == 2
        })
        .await;
    lab.rotate(
        "strict",
        "  stragglers: Revoke\n  nodes: {names: [node1, node2]}\n",
    );
    lab.rotation_where("strict", "it succeeds", |one| one.phase == "Succeeded")
        .await;
    let keys = lab.keys().await;
    assert_eq!(keys.revocations[0].node, "node3");
    let third = keys.nodes.iter().find(|node| node.node == "node3").unwrap();
    assert!(third.keys.is_empty() && third.uid.ends_with("-r1"), "{third:?}");
    lab.nobody_complains();
}

#[tokio::test]
async fn a_lost_key_is_replaced_and_a_deleted_node_left_out() {
    let lab = Lab::new().await;
    lab.agents[0].lose_keys();
    lab.until("node1 has another key in the same half", |lab| {
        lab.agents.iter().all(|agent| {
            let keys = agent.sees("node1");
            keys.is_some_and(|keys| keys.active == 3 && keys.generations() == [3].into())
        })
    })
    .await;
    lab.keys_where("nobody is on its way", |keys| {
        keys.nodes.iter().all(|node| node.phase == 0)
    })
    .await;
    lab.agents[2].hold(Hold {
        verifying: true,
        ..Hold::default()
    });
    lab.rotate("spring", "");
    lab.keys_where("all verify", |keys| keys.nodes.iter().all(|node| node.phase == 3))
        .await;
    lab.keyd.manifests(&[node(1), node(2)].concat());
    let done = lab
        .rotation_where("spring", "it succeeds", |one| one.phase == "Succeeded")
        .await;
    let counts = done.counts.unwrap();
    assert_eq!((counts.done, counts.gone), (2, 1));
    assert_eq!(done.exceptions[0].reason, "Gone");
    lab.until("the others have new keys alone", |lab| {
        let has = |n: usize, generation| {
            let keys = lab.agents[0].sees(&format!("node{n}"));
            keys.is_some_and(|keys| keys.generations() == [generation].into())
        };
        has(1, 4) && has(2, 2) && lab.agents[0].sees("node3").is_none()
    })
    .await;
    lab.nobody_complains();
}

#[tokio::test]
async fn a_mesh_node_that_was_set_back_is_not_believed() {
    let lab = Lab::new().await;
    let file = lab.keyd.dir.path().join("state/state/meshnode-node1.yaml");
    let old = fs::read_to_string(&file).unwrap();
    lab.rotate("first", "");
    lab.rotation_where("first", "it succeeds", |one| one.phase == "Succeeded")
        .await;
    lab.all_have(2).await;
    // A genuine object, signed by keyd, of yesterday.
    fs::write(&file, old).unwrap();
    lab.rotate("second", "");
    lab.rotation_where("second", "it succeeds", |one| one.phase == "Succeeded")
        .await;
    lab.all_have(3).await;
    let log = lab.keyd.log().join("\n");
    assert!(log.contains("MeshNodeSetBack"), "{log}");
    let now = fs::read_to_string(&file).unwrap();
    assert!(now.contains("active: 3"), "{now}");
}

#[tokio::test]
async fn of_two_leaders_the_older_one_publishes_nothing_more() {
    let mut lab = Lab::new().await;
    // Another keyd on the same folders: it begins a term, which the first one does not hear of.
    let mut second = lab.keyd.second();
    lab.rotate("spring", "");
    lab.until("the first one has ended", |lab| {
        let said = "has taken over the state folder";
        lab.keyd.log().iter().any(|line| line.contains(said))
    })
    .await;
    second.swap(&mut lab.keyd);
    lab.address.send_replace(lab.keyd.address.clone());
    lab.rotation_where("spring", "it succeeds", |one| one.phase == "Succeeded")
        .await;
    lab.all_have(2).await;
}
