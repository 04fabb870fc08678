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
        let problems: Vec<_> = self.agents.iter().flat_map(Rotating::problems).collect();
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
