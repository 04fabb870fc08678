//! The key that signs snapshots and MeshNodes is replaced: agents follow, whether connected or away, and nobody else's word
//! counts.

#[expect(dead_code, reason = "the other suites use the rest")]
mod support;

use std::{fs, path::PathBuf, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use support::{Agent, Keyd, PATIENCE, node};
use tokio::time::timeout;
use warren_keyd_api::{
    proof,
    proto::{
        Manifest, RotateSigningKeyRequest, RotateSigningKeyResponse, SigningKeysRequest, SigningKeysResponse,
        keys_client::KeysClient,
    },
    snapshot::{Followed, ManifestSigner, RootChain, SnapshotError, chunks},
    tls::Enrolment,
};

async fn rotate(keyd: &Keyd) -> RotateSigningKeyResponse {
    let channel = warren_keyd_api::admin::channel(&keyd.socket()).await.unwrap();
    let mut keys = KeysClient::new(channel);
    let rotated = keys.rotate_signing_key(RotateSigningKeyRequest {}).await;
    rotated.unwrap().into_inner()
}

async fn signing_where(keyd: &Keyd, what: &str, wanted: impl Fn(&SigningKeysResponse) -> bool) {
    let reached = timeout(PATIENCE, async {
        loop {
            let channel = warren_keyd_api::admin::channel(&keyd.socket()).await.unwrap();
            let keys = KeysClient::new(channel).signing_keys(SigningKeysRequest {}).await;
            // Right after a start there is no leader yet.
            if keys.is_ok_and(|keys| wanted(keys.get_ref())) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(reached.await.is_ok(), "never: {what}; log: {:#?}", keyd.log());
}

fn generation(keys: &SigningKeysResponse) -> u64 {
    keys.keys.last().map_or(0, |key| key.generation)
}

/// The key that keyd signs with now, as whoever has read its disk has it.
fn stolen_key(keyd: &Keyd) -> ManifestSigner {
    let text = fs::read_to_string(keyd.dir.path().join("state/snapshot-signing.key")).unwrap();
    let text: serde_json::Value = serde_json::from_str(&text).unwrap();
    ManifestSigner::from_seed(&STANDARD.decode(text["seed"].as_str().unwrap()).unwrap()).unwrap()
}

async fn connect(keyd: &Keyd, name: &str, enrolment: &Enrolment) -> Agent {
    let directory = warren_keyd_api::snapshot::Directory::new(enrolment.root());
    let roots = enrolment.roots.clone();
    let agent = Agent::resume((&keyd.address, name), enrolment, directory, roots).await;
    agent.unwrap()
}

fn root_of(agent: &Agent) -> u64 {
    agent.roots.as_ref().unwrap().newest().generation
}

fn mesh_node(keyd: &Keyd) -> PathBuf {
    keyd.dir.path().join("state/state/meshnode-node1.yaml")
}

#[tokio::test]
async fn agents_follow_and_the_replaced_key_is_worth_nothing() {
    let mut keyd = Keyd::start(&[node(1), node(2), node(3)].concat());
    let mut here = connect(&keyd, "node1", &keyd.enroll("node1").await).await;
    assert!(here.prove(&proof::generate_private_key().unwrap()).await.accepted);
    let away_enrolment = keyd.enroll("node2").await;
    let away = connect(&keyd, "node2", &away_enrolment).await;
    let (copy, pinned) = (away.directory.clone(), away.roots.clone().unwrap());
    drop(away);
    let stolen = stolen_key(&keyd);
    let first = pinned.clone();
    let old_node = fs::read(mesh_node(&keyd)).unwrap();

    // One that is connected goes on without an interruption; its position never goes back.
    for generation in 2..=4 {
        let before = here.directory.position();
        let rotated = rotate(&keyd).await;
        assert_eq!(rotated.key.unwrap().generation, generation);
        here.until_directory(|directory| directory.position() >= (rotated.epoch, rotated.version))
            .await;
        assert!(here.directory.position() > before);
        assert_eq!(root_of(&here), generation);
        // The stream is the same, and alive.
        assert!(!here.prove(&proof::generate_private_key().unwrap()).await.accepted);
    }
    signing_where(&keyd, "all MeshNodes are signed anew", |keys| {
        keys.objects_renewed
    })
    .await;
    assert_ne!(fs::read(mesh_node(&keyd)).unwrap(), old_node);

    // One that was away follows over three links at once, and gets an increment, not everything.
    let resumed = Agent::resume(
        (&keyd.address, "node2"),
        &away_enrolment,
        copy.clone(),
        pinned.clone(),
    );
    let mut resumed = resumed.await.unwrap();
    assert_eq!(root_of(&resumed), 4);
    assert!(resumed.directory.position() > copy.position());

    // Who has stolen the first key can sign for those that are away only, never for one that has heard of its successor.
    let forged = |signer: &ManifestSigner, agent: &Agent| {
        let (epoch, version) = agent.directory.position();
        let manifest = signer.seal(Manifest {
            epoch,
            version: version + 100,
            entries: agent.directory.entries().len() as u64,
            digest: agent.directory.entries().digest().to_vec(),
            ..Manifest::default()
        });
        chunks((epoch, version + 100), false, [], [], manifest).remove(0)
    };
    for agent in [&mut here, &mut resumed] {
        let update = forged(&stolen, agent);
        assert_eq!(agent.directory.apply(update), Err(SnapshotError::Signature));
        let thief = ManifestSigner::generate().unwrap();
        let fork = first.with(&stolen, thief.root(), 0).unwrap();
        assert!(agent.roots.as_ref().unwrap().follow(fork).is_err());
    }

    // A MeshNode of before is not believed any more; keyd goes on with its own word after a restart, and signs with the newest.
    drop((here, resumed));
    fs::write(mesh_node(&keyd), old_node).unwrap();
    keyd.restart();
    signing_where(&keyd, "the newest key survives a restart", |keys| {
        generation(keys) == 4
    })
    .await;
    let status = keyd
        .status_where("it is said", |status| !status.problems.is_empty())
        .await;
    assert!(
        status.problems[0].contains("is not signed by keyd"),
        "{:?}",
        status.problems
    );
    let late = Agent::resume((&keyd.address, "node2"), &away_enrolment, copy, pinned)
        .await
        .unwrap();
    assert_eq!(root_of(&late), 4);
    // Who joins now begins with the newest.
    let fresh = keyd.enroll("node3").await;
    assert_eq!(fresh.roots.newest().generation, 4);
    assert_eq!(
        first.follow(fresh.roots.clone()),
        Ok(Followed::Further(fresh.roots.clone()))
    );
}

#[tokio::test]
async fn an_agent_of_other_keys_or_newer_ones_refuses_this_keyd() {
    let mut keyd = Keyd::start(&node(1));
    let enrolment = keyd.enroll("node1").await;
    let agent = connect(&keyd, "node1", &enrolment).await;
    let (copy, pinned) = (agent.directory.clone(), agent.roots.clone().unwrap());
    drop(agent);
    let other = ManifestSigner::generate().unwrap();
    let stranger = RootChain::first(&other, 0);
    let refused = Agent::resume((&keyd.address, "node1"), &enrolment, copy.clone(), stranger);
    let error = refused.await.err().unwrap();
    assert!(
        error.contains("does not continue the pinned snapshot root 1"),
        "{error}"
    );

    // An old backup of keyd's key: it is not followed back.
    let path = keyd.dir.path().join("state/snapshot-signing.key");
    let backup = fs::read(&path).unwrap();
    rotate(&keyd).await;
    let newer = Agent::resume((&keyd.address, "node1"), &enrolment, copy, pinned)
        .await
        .unwrap();
    let (copy, pinned) = (newer.directory.clone(), newer.roots.clone().unwrap());
    assert_eq!(pinned.newest().generation, 2);
    signing_where(&keyd, "the disk is quiet", |keys| keys.objects_renewed).await;
    fs::write(&path, backup).unwrap();
    keyd.restart();
    let refused = Agent::resume((&keyd.address, "node1"), &enrolment, copy, pinned);
    let error = refused.await.err().unwrap();
    assert!(
        error.contains("root 1") && error.contains("root 2 is pinned"),
        "{error}"
    );
}

#[tokio::test]
async fn a_key_that_is_old_is_replaced_by_itself_and_a_crash_loses_none() {
    let mut keyd = Keyd::start_with(&node(1), "signingKeyMaxAgeSeconds: 1\n");
    let enrolment = keyd.enroll("node1").await;
    let agent = connect(&keyd, "node1", &enrolment).await;
    let (mut copy, mut roots) = (agent.directory.clone(), agent.roots.clone().unwrap());
    drop(agent);
    for _ in 0..2 {
        let last = roots.newest().generation;
        // Its age is looked at when a term begins.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        keyd.restart();
        signing_where(&keyd, "a new key", |keys| generation(keys) > last).await;
        let agent = Agent::resume((&keyd.address, "node1"), &enrolment, copy, roots)
            .await
            .unwrap();
        assert!(root_of(&agent) > last);
        (copy, roots) = (agent.directory.clone(), agent.roots.clone().unwrap());
    }
}
