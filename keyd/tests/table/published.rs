//! Claims in Node objects, and snapshots that an agent must not take.

use warren_keyd_api::{
    convert::Record,
    proto::{AgentStatus, Entry, Manifest, Update, agent_message::Body as Say},
    snapshot::{Directory, ManifestSigner, SnapshotError, chunks},
};
use warren_model::{IdentityId, Labels};

use crate::{
    Case, case, manifests,
    support::{Keyd, node_with},
};

// Claims in Node objects.
pub(crate) fn claims() -> Vec<Case> {
    let of = ("claim", "Node", "a new node");
    let mut cases = vec![];
    for (claim, cidr, address, word) in [
        (
            "node1's podCIDR",
            "10.244.1.0/24",
            "172.30.0.9",
            "already belongs to node node1",
        ),
        (
            "a part of node1's podCIDR",
            "10.244.1.128/25",
            "172.30.0.9",
            "overlaps 10.244.1.0/24",
        ),
        (
            "a podCIDR around node1's",
            "10.244.0.0/16",
            "172.30.0.9",
            "overlaps",
        ),
        (
            "a podCIDR outside the pools",
            "10.245.0.0/24",
            "172.30.0.9",
            "outside podPools",
        ),
        ("the Services' CIDR", "10.96.0.0/16", "172.30.0.9", ""),
        ("a default route", "0.0.0.0/0", "172.30.0.9", ""),
        (
            "node1's address",
            "10.244.9.0/24",
            "172.30.0.1",
            "172.30.0.1 already belongs",
        ),
        (
            "an address outside the pools",
            "10.244.9.0/24",
            "10.9.9.9",
            "outside nodePools",
        ),
    ] {
        cases.push(case(of, claim, ("ClaimRefused", word), move |world| {
            Box::pin(async move {
                world.keyd.manifests(&manifests(&node_with(9, cidr, address)));
                let refused = |problem: &String| problem.starts_with("node node9");
                let status = world
                    .keyd
                    .status_where("a refusal", |s| s.problems.iter().any(refused))
                    .await;
                let sentence = status.problems.into_iter().find(refused).unwrap();
                world.keyd.manifests(&manifests(""));
                world
                    .keyd
                    .status_where("it is gone", |status| status.nodes.len() == 3)
                    .await;
                Ok(sentence)
            })
        }));
    }
    cases
}

/// An update that continues an agent's directory, sealed by `signer`; with what is to be changed of it before and after.
fn update(
    signer: &ManifestSigner,
    directory: &Directory,
    position: (u64, u64),
    seal: impl FnOnce(&mut Manifest),
) -> Update {
    let entries = directory.entries();
    let mut manifest = Manifest {
        epoch: position.0,
        version: position.1,
        entries: entries.len() as u64,
        digest: entries.digest().to_vec(),
        ..Manifest::default()
    };
    seal(&mut manifest);
    let sealed = signer.seal(manifest);
    chunks(position, true, entries.iter(), [], sealed).remove(0)
}

fn extra() -> Entry {
    Record::Identity(IdentityId(999), Labels::default()).to_entry()
}

// Snapshots that an agent must not take: somebody plays keyd.
pub(crate) fn snapshots() -> Vec<Case> {
    type Forge = fn(&ManifestSigner, &Directory) -> Update;
    let forgeries: [(&str, &str, Forge); 10] = [
        ("signed by a stranger", "snapshot root", |_, d| {
            let stranger = ManifestSigner::generate().unwrap();
            update(&stranger, d, (d.position().0, d.position().1 + 1), |_| {})
        }),
        (
            "a signature with one bit changed",
            "snapshot root",
            |signer, d| {
                let mut update = update(signer, d, (d.position().0, d.position().1 + 1), |_| {});
                update.manifest.as_mut().unwrap().signature[0] ^= 1;
                update
            },
        ),
        ("a manifest with one bit changed", "snapshot root", |signer, d| {
            let mut update = update(signer, d, (d.position().0, d.position().1 + 1), |_| {});
            update.manifest.as_mut().unwrap().manifest[9] ^= 1;
            update
        }),
        ("no signature", "snapshot root", |signer, d| {
            let mut update = update(signer, d, (d.position().0, d.position().1 + 1), |_| {});
            update.manifest.as_mut().unwrap().signature.clear();
            update
        }),
        ("no manifest", "no signed manifest", |signer, d| {
            let mut update = update(signer, d, (d.position().0, d.position().1 + 1), |_| {});
            update.manifest = None;
            update
        }),
        ("an older version, replayed", "goes back", |signer, d| {
            update(signer, d, (d.position().0, d.position().1 - 1), |_| {})
        }),
        ("a newer version of an older epoch", "goes back", |signer, d| {
            update(signer, d, (d.position().0 - 1, d.position().1 + 9), |_| {})
        }),
        ("an old manifest under a new version", "disagree", |signer, d| {
            let mut update = update(signer, d, d.position(), |_| {});
            update.version += 1;
            update
        }),
        ("an entry more than was signed", "digest", |signer, d| {
            let mut update = update(signer, d, (d.position().0, d.position().1 + 1), |_| {});
            update.upserts.push(extra());
            update
        }),
        ("an entry less than was signed", "digest", |signer, d| {
            let mut update = update(signer, d, (d.position().0, d.position().1 + 1), |_| {});
            update.upserts.pop();
            update
        }),
    ];
    let mut cases = vec![];
    for (claim, word, forge) in forgeries {
        cases.push(snapshot_case(claim, word, forge));
    }
    cases.push(snapshot_case(
        "an increment on another epoch",
        "only a snapshot",
        |signer, d| {
            let position = (d.position().0 + 1, 1);
            let mut update = update(signer, d, position, |_| {});
            (update.snapshot, update.upserts) = (false, vec![]);
            update
        },
    ));
    cases.push(snapshot_case(
        "a half of one snapshot and a half of another",
        "digest",
        |signer, d| {
            let mut update = update(signer, d, (d.position().0, d.position().1 + 1), |_| {});
            let half = update.upserts.len() / 2;
            update.upserts.truncate(half);
            update
        },
    ));
    cases
}

fn snapshot_case(
    claim: &'static str,
    word: &'static str,
    forge: fn(&ManifestSigner, &Directory) -> Update,
) -> Case {
    let of = ("publish", "snapshot", "keyd's place");
    case(of, claim, ("SnapshotRefused", word), move |world| {
        Box::pin(async move {
            let signer = signing_key(&world.keyd);
            let before = world.entries();
            let forged = forge(&signer, &world.honest.directory);
            let refused = world.honest.directory.apply(forged);
            assert_eq!(world.entries(), before);
            let error: SnapshotError = match refused {
                Err(error) => error,
                Ok(_) => return Err("it was taken".into()),
            };
            // As the agent reports it.
            world.refused_updates += 1;
            let status = AgentStatus {
                refused_updates: world.refused_updates,
                ..AgentStatus::default()
            };
            world.honest.stream.send(Say::Status(status)).await;
            Ok(error.to_string())
        })
    })
}

fn signing_key(keyd: &Keyd) -> ManifestSigner {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let text = std::fs::read_to_string(keyd.dir.path().join("state/snapshot-signing.key")).unwrap();
    let text: serde_json::Value = serde_json::from_str(&text).unwrap();
    ManifestSigner::from_seed(&STANDARD.decode(text["seed"].as_str().unwrap()).unwrap()).unwrap()
}
