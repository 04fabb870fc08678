//! Stored nodes <-> signed MeshNode objects.

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use warren_crds::{MeshNode, MeshNodeSpec, RevokedKeys, signed_bytes};
use warren_keyd_api::snapshot::ManifestSigner;
use warren_keyd_core::{Revoked, StoredNode};

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

/// Believes an object only with our signature.
pub(crate) fn stored_node(
    name: &str,
    spec: &MeshNodeSpec,
    signer: &ManifestSigner,
) -> anyhow::Result<StoredNode> {
    let signature = STANDARD.decode(&spec.signature).unwrap_or_default();
    signer
        .root()
        .verify(LABEL, &signed_bytes(name, spec), &signature)
        .ok()
        .context("it is not signed by keyd; it is ignored and will be replaced")?;
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

    #[test]
    fn only_signed_objects_are_believed() {
        let signer = ManifestSigner::generate().unwrap();
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
        for record in [Some(record), None] {
            let node = StoredNode {
                name: "a".into(),
                order: 3,
                since: record.iter().map(|_| (1, 1_700_000_000)).collect(),
                record,
                revoked: revoked.clone(),
            };
            let object = mesh_node(&node, &signer);
            assert_eq!(stored_node("a", &object.spec, &signer).unwrap(), node);
            assert!(stored_node("b", &object.spec, &signer).is_err());
            let mut changed = object.spec.clone();
            changed.order = 1;
            assert!(stored_node("a", &changed, &signer).is_err());
            let stranger = ManifestSigner::generate().unwrap();
            assert!(stored_node("a", &object.spec, &stranger).is_err());
        }
    }
}
