//! Durable state as Kubernetes objects. MeshNodes, MeshState and statuses of KeyRotations are written by compare-and-swap
//! (resource version): two leaders may believe in themselves. The others are server-side applies of whole objects, forced:
//! nobody else writes them.

use std::{collections::BTreeSet, sync::Arc};

use anyhow::Context as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use kube::{
    Api, Client, Resource,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::json;
use warren_crds::{
    KeyRotation, KeyRotationStatus, MeshIdentity, MeshNode, MeshNodeStatus, MeshState, MeshStateSpec,
    STATE_NAME,
    cilium::{CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy},
};
use warren_keyd_core::{Object, StoredNode, next_epoch};
use warren_model::{
    NodeKeys,
    policy::{PolicyKind, PolicyRef},
};

use super::{
    Loaded, StatusWritten, needs_write, objects,
    objects::Believed,
    odd::{Kind, Odd, Written},
    renewal,
};
use crate::{clock, trust::Trust};

/// Field manager of every write.
pub(crate) const MANAGER: &str = "warren-keyd";
/// Objects per page of a list.
const PAGE: u32 = 500;
/// How often a write is tried that somebody else always comes before.
const ATTEMPTS: u32 = 10;

/// The API server as a store.
pub(crate) struct KubeStore {
    client: Client,
    trust: Arc<Trust>,
    written: Written,
}

/// Whether an API error is this HTTP code.
pub(crate) fn is_code(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

impl KubeStore {
    pub(crate) fn new(client: Client, trust: Arc<Trust>) -> Self {
        Self {
            client,
            trust,
            written: Written::default(),
        }
    }

    /// Starts a term by compare-and-swap on the one MeshState object: whoever lost the race gets an error.
    pub(crate) async fn begin_term(&self, holder: &str) -> anyhow::Result<u64> {
        let api: Api<MeshState> = Api::all(self.client.clone());
        let stored = api.get_opt(STATE_NAME).await.context("cannot read MeshState")?;
        let last = stored
            .as_ref()
            .map(|state| state.spec.clone())
            .unwrap_or_default();
        clock::anchor(last.signed_unix_ms);
        let signed_unix_ms = clock::unix_ms();
        let epoch = next_epoch(last.epoch, signed_unix_ms);
        let spec = MeshStateSpec {
            epoch,
            holder: holder.to_owned(),
            signed_unix_ms,
        };
        match stored {
            None => {
                let state = MeshState::new(STATE_NAME, spec);
                let created = api.create(&PostParams::default(), &state).await;
                let created = created.context("cannot create MeshState")?;
                self.written.note(Kind::State, &created.metadata);
            }
            Some(mut state) => {
                // The resource version in the metadata makes this the compare-and-swap.
                state.spec = spec;
                let replaced = api.replace(STATE_NAME, &PostParams::default(), &state).await;
                let replaced = replaced.context("cannot raise the epoch in MeshState")?;
                self.written.note(Kind::State, &replaced.metadata);
            }
        }
        Ok(epoch)
    }

    /// Notes the time, unless the term is over.
    pub(crate) async fn note_time(&self, epoch: u64, signed_unix_ms: u64) -> anyhow::Result<()> {
        let api: Api<MeshState> = Api::all(self.client.clone());
        let stored = api.get_opt(STATE_NAME).await.context("cannot read MeshState")?;
        let Some(mut state) = stored.filter(|state| state.spec.epoch == epoch) else {
            return Ok(());
        };
        state.spec.signed_unix_ms = signed_unix_ms.max(state.spec.signed_unix_ms);
        match api.replace(STATE_NAME, &PostParams::default(), &state).await {
            // Another term has begun meanwhile, most likely.
            Ok(written) => {
                self.written.note(Kind::State, &written.metadata);
                Ok(())
            }
            Err(error) if !is_code(&error, 409) => Err(error).context("cannot write MeshState"),
            Err(_) => Ok(()),
        }
    }

    /// What somebody else has done to our objects since they were read or written. `keyd_id`: who we are.
    pub(crate) async fn odd(&self, keyd_id: &str) -> anyhow::Result<BTreeSet<Odd>> {
        fn metadata<K: Resource>(objects: Vec<K>) -> Vec<ObjectMeta> {
            let meta = |object: &K| object.meta().clone();
            objects.iter().map(meta).collect()
        }
        let states = list(Api::<MeshState>::all(self.client.clone())).await?;
        // In another keyd's term its objects are not ours to judge.
        if states.iter().any(|state| state.spec.holder != keyd_id) {
            return Ok(BTreeSet::new());
        }
        let mut odd = self.written.odd(Kind::State, &metadata(states));
        let nodes = list(Api::<MeshNode>::all(self.client.clone())).await?;
        odd.extend(self.written.odd(Kind::Node, &metadata(nodes)));
        let identities = list(Api::<MeshIdentity>::all(self.client.clone())).await?;
        odd.extend(self.written.odd(Kind::Identity, &metadata(identities)));
        Ok(odd)
    }

    pub(crate) async fn load(&self) -> anyhow::Result<Loaded> {
        let mut loaded = Loaded::default();
        let signing = self.trust.signing();
        self.written.begin();
        for node in list(Api::<MeshNode>::all(self.client.clone()))
            .await
            .context("cannot list MeshNodes")?
        {
            let name = node.metadata.name.clone().unwrap_or_default();
            match objects::stored_node(&name, &node.spec, &signing) {
                Ok(believed) => {
                    self.written.note(Kind::Node, &node.metadata);
                    loaded.recovered.nodes.push(believed.node);
                }
                Err(error) => loaded.problems.push(format!("MeshNode {name}: {error:#}")),
            }
        }
        let identities = list(Api::<MeshIdentity>::all(self.client.clone())).await;
        for identity in identities.context("cannot list MeshIdentities")? {
            self.written.note(Kind::Identity, &identity.metadata);
            loaded.recovered.identities.push(identity.identity());
        }
        self.load_rotations(&mut loaded).await?;
        Ok(loaded)
    }

    /// Writes what `decide` makes of the stored node; returns what is stored then. An object without our signature counts as
    /// none and is replaced.
    async fn write_node(
        &self,
        name: &str,
        decide: impl Fn(Option<&Believed>) -> Option<StoredNode>,
    ) -> anyhow::Result<Option<StoredNode>> {
        let api: Api<MeshNode> = Api::all(self.client.clone());
        for attempt in 1.. {
            let found = api.get_opt(name).await?;
            let signing = self.trust.signing();
            let current = found
                .as_ref()
                .and_then(|found| objects::stored_node(name, &found.spec, &signing).ok());
            let wanted = decide(current.as_ref()).filter(|new| needs_write(current.as_ref(), new));
            let Some(new) = wanted else {
                return Ok(current.map(|current| current.node));
            };
            let mut object = objects::mesh_node(&new, &signing.signer);
            let params = PostParams {
                field_manager: Some(MANAGER.into()),
                ..PostParams::default()
            };
            let written = match found {
                Some(found) => {
                    // With the resource version of what was read: this is the compare-and-swap.
                    object.metadata = found.metadata;
                    object.metadata.managed_fields = None;
                    api.replace(name, &params, &object).await
                }
                None => api.create(&params, &object).await,
            };
            match written {
                Ok(written) => {
                    self.written.note(Kind::Node, &written.metadata);
                    return Ok(Some(new));
                }
                Err(error) if is_code(&error, 409) && attempt < ATTEMPTS => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    pub(crate) async fn swap_keys(
        &self,
        was: &NodeKeys,
        node: &StoredNode,
    ) -> anyhow::Result<Option<StoredNode>> {
        self.write_node(node.name.as_str(), |current| {
            node.in_place_of(was, current.map(|current| &current.node))
        })
        .await
    }

    pub(crate) async fn renew(&self, node: &StoredNode) -> anyhow::Result<()> {
        self.write_node(node.name.as_str(), |current| renewal(node, current))
            .await
            .map(drop)
    }

    pub(crate) async fn node(&self, name: &str) -> anyhow::Result<Option<StoredNode>> {
        let api: Api<MeshNode> = Api::all(self.client.clone());
        let found = api.get_opt(name).await?;
        let signing = self.trust.signing();
        let believed = found.and_then(|found| objects::stored_node(name, &found.spec, &signing).ok());
        Ok(believed.map(|believed| believed.node))
    }

    pub(crate) async fn epoch(&self) -> anyhow::Result<u64> {
        let api: Api<MeshState> = Api::all(self.client.clone());
        let state = api.get_opt(STATE_NAME).await.context("cannot read MeshState")?;
        Ok(state.context("MeshState is gone")?.spec.epoch)
    }

    pub(crate) async fn rotation_status(
        &self,
        name: &str,
        uid: &str,
        was: Option<&KeyRotationStatus>,
        status: &KeyRotationStatus,
    ) -> anyhow::Result<StatusWritten> {
        let api: Api<KeyRotation> = Api::all(self.client.clone());
        for attempt in 1.. {
            let found = api.get_opt(name).await?;
            let Some(mut object) = found.filter(|found| found.metadata.uid.as_deref() == Some(uid)) else {
                return Ok(StatusWritten::Gone);
            };
            if object.status.as_ref() != was {
                return Ok(StatusWritten::Theirs(Box::new(object.status.unwrap_or_default())));
            }
            object.status = Some(status.clone());
            object.metadata.managed_fields = None;
            match api.replace_status(name, &PostParams::default(), &object).await {
                Ok(_) => return Ok(StatusWritten::Written),
                // Its spec was edited meanwhile, most likely.
                Err(error) if is_code(&error, 409) && attempt < ATTEMPTS => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(StatusWritten::Gone)
    }

    async fn load_rotations(&self, loaded: &mut Loaded) -> anyhow::Result<()> {
        let rotations = match list(Api::<KeyRotation>::all(self.client.clone())).await {
            // A cluster whose definitions are older than keyd.
            Err(error) if is_code(&error, 404) => return Ok(()),
            listed => listed.context("cannot list KeyRotations")?,
        };
        for rotation in rotations {
            let (Some(name), Some(uid)) = (rotation.metadata.name, rotation.metadata.uid) else {
                continue;
            };
            if let Some(status) = rotation.status {
                loaded.rotation(name, uid, status);
            }
        }
        Ok(())
    }

    fn identities(&self) -> Api<MeshIdentity> {
        Api::all(self.client.clone())
    }

    async fn delete_identity(&self, name: &str) -> anyhow::Result<()> {
        match self.identities().delete(name, &DeleteParams::default()).await {
            Err(error) if !is_code(&error, 404) => Err(error.into()),
            _ => {
                self.written.forget(Kind::Identity, name);
                Ok(())
            }
        }
    }

    pub(crate) async fn apply(&self, object: &Object) -> anyhow::Result<()> {
        let params = PatchParams::apply(MANAGER).force();
        match object {
            Object::Node(node) => drop(
                self.write_node(node.name.as_str(), |current| {
                    node.over(current.map(|current| &current.node))
                })
                .await?,
            ),
            Object::Identity(number, labels) => {
                let (object, name) = (MeshIdentity::of(*number, labels), number.to_string());
                let (api, apply) = (self.identities(), Patch::Apply(&object));
                let mut written = api.patch(&name, &params, &apply).await;
                // The API server lets labels never change: one that somebody else has made goes first.
                let foreign = match &written {
                    Ok(written) => written.spec != object.spec,
                    Err(error) => is_code(error, 422),
                };
                if foreign {
                    self.delete_identity(&name).await?;
                    written = api.patch(&name, &params, &apply).await;
                }
                self.written.note(Kind::Identity, &written?.metadata);
            }
            Object::IdentityDelete(number) => self.delete_identity(&number.to_string()).await?,
            // The API knows pod addresses; the status of a rotation goes with it.
            Object::Endpoint(_) | Object::EndpointDelete(_) | Object::RotationDelete(_) => {}
        }
        Ok(())
    }

    /// Writes the `Valid` condition of a policy object, by server-side apply: other conditions are others'.
    pub(crate) async fn policy_status(
        &self,
        policy: &PolicyRef,
        condition: &Condition,
    ) -> anyhow::Result<()> {
        let resource = match policy.kind {
            PolicyKind::CiliumNetworkPolicy => ApiResource::erase::<CiliumNetworkPolicy>(&()),
            PolicyKind::CiliumClusterwideNetworkPolicy => {
                ApiResource::erase::<CiliumClusterwideNetworkPolicy>(&())
            }
            PolicyKind::NetworkPolicy => return Ok(()),
        };
        let api: Api<DynamicObject> = match policy.namespace.as_str() {
            "" => Api::all_with(self.client.clone(), &resource),
            namespace => Api::namespaced_with(self.client.clone(), namespace, &resource),
        };
        let patch = json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": {"name": policy.name},
            "status": {"conditions": [condition]},
        });
        let params = PatchParams::apply(MANAGER).force();
        match api
            .patch_status(&policy.name, &params, &Patch::Apply(&patch))
            .await
        {
            // It is gone.
            Err(error) if !is_code(&error, 404) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Writes what was last seen of a node.
    pub(crate) async fn status(&self, name: &str, status: &MeshNodeStatus) -> anyhow::Result<()> {
        let api: Api<MeshNode> = Api::all(self.client.clone());
        let patch = json!({ "status": status });
        match api
            .patch_status(name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
        {
            // The object comes with the node's next change.
            Err(error) if !is_code(&error, 404) => Err(error.into()),
            _ => Ok(()),
        }
    }
}

async fn list<K>(api: Api<K>) -> kube::Result<Vec<K>>
where
    K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let mut params = ListParams::default().limit(PAGE);
    let mut all = vec![];
    loop {
        let page = api.list(&params).await?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(all),
        }
    }
}
