//! Stored nodes <-> signed MeshNode objects.

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use warren_crds::{MeshNode, MeshNodeSpec, RevokedKeys, signed_bytes};
use warren_keyd_api::snapshot::ManifestSigner;
use warren_keyd_core::{Revoked, StoredNode};

use crate::trust::Signing;

/// Domain separation of a MeshNode's signature.
const LABEL: &[u8] = b"warren-meshnode-v1";

/// The signed object of a node.
pub(crate) fn mesh_node(node: &StoredNode, signer: &ManifestSigner) -> MeshNode {
    let mut spec = match &node.record {
        Some(record) => MeshNodeSpec::of(record, node.order),
        None => MeshNodeSpec {
            node_uid: node
                .revoked
                .last()
                .map(|revoked| revoked.uid.to_string())
                .unwrap_or_default(),
            order: node.order,
            retired: true,
            ..MeshNodeSpec::default()
        },
    };
    spec.revoked = node
        .revoked
        .iter()
        .map(|revoked| RevokedKeys {
            node_uid: revoked.uid.to_string(),
            public_keys: revoked.keys.iter().map(ToString::to_string).collect(),
        })
        .collect();
    for slot in &mut spec.slots {
        slot.since = node.since.get(&slot.generation).copied().unwrap_or_default();
    }
    let name = node.name.as_str();
    spec.signature = STANDARD.encode(signer.sign(LABEL, &signed_bytes(name, &spec)));
    MeshNode::new(name, spec)
}

/// A node that is believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Believed {
    pub(crate) node: StoredNode,
    /// Signed by the key that signs now, not by one before it.
    pub(crate) renewed: bool,
}

/// Believes an object only with our signature.
pub(crate) fn stored_node(name: &str, spec: &MeshNodeSpec, signing: &Signing) -> anyhow::Result<Believed> {
    let signature = STANDARD.decode(&spec.signature).unwrap_or_default();
    let signer = signing
        .object_signer(LABEL, &signed_bytes(name, spec), &signature)
        .context("it is not signed by keyd; it is ignored and will be replaced")?;
    Ok(Believed {
        node: unsigned_node(name, spec)?,
        renewed: signer == signing.generation(),
    })
}

fn unsigned_node(name: &str, spec: &MeshNodeSpec) -> anyhow::Result<StoredNode> {
    let revoked = spec.revoked.iter().map(|revoked| {
        Ok(Revoked {
            uid: revoked.node_uid.as_str().into(),
            keys: revoked.keys()?,
        })
    });
    Ok(StoredNode {
        name: name.into(),
        order: spec.order,
        record: spec.record(name)?,
        since: spec
            .slots
            .iter()
            .map(|slot| (slot.generation, slot.since))
            .collect(),
        revoked: revoked.collect::<Result<_, warren_crds::SpecError>>()?,
    })
}

#[cfg(test)]
mod tests {
    use warren_model::{NodeRecord, SlotKey};

    use super::*;
    use crate::trust::Trust;

    #[tokio::test]
    async fn only_signed_objects_are_believed() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let trust = Trust::in_folder(folders[0].path()).await.unwrap();
        let stranger = Trust::in_folder(folders[1].path()).await.unwrap().signing();
        let signing = trust.signing();
        let record = NodeRecord {
            name: "a".into(),
            uid: "u".into(),
            endpoints: vec![],
            addresses: vec![],
            prefixes: vec!["10.1.0.0/24".parse().unwrap()],
            slots: vec![SlotKey {
                slot: 0,
                port: 51871,
                generation: 1,
                public_key: warren_model::PublicKey::from_bytes([8; 32]).unwrap(),
                pre_shared_keys: true,
            }],
            active: 1,
            last: 2,
            datapath: None,
        };
        let key = warren_model::PublicKey::from_bytes([7; 32]).unwrap();
        let revoked = vec![Revoked {
            uid: "old".into(),
            keys: vec![key],
        }];
        let next = trust.store_next().await.unwrap();
        for record in [Some(record), None] {
            let node = StoredNode {
                name: "a".into(),
                order: 3,
                since: record.iter().map(|_| (1, 1_700_000_000)).collect(),
                record,
                revoked: revoked.clone(),
            };
            let object = mesh_node(&node, &signing.signer);
            let believed =
                |name: &str, spec: &MeshNodeSpec, signing: &Signing| stored_node(name, spec, signing);
            let mut expected = Believed { node, renewed: true };
            assert_eq!(believed("a", &object.spec, &signing).unwrap(), expected);
            assert!(believed("b", &object.spec, &signing).is_err());
            let mut changed = object.spec.clone();
            changed.order = 1;
            assert!(believed("a", &changed, &signing).is_err());
            assert!(believed("a", &object.spec, &stranger).is_err());
            // The next key's keyd still believes it, and knows that it is to be signed anew.
            expected.renewed = false;
            assert_eq!(believed("a", &object.spec, &next).unwrap(), expected);
        }
    }
}
