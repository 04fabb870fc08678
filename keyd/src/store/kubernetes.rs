//! Durable state as Kubernetes objects. All writes are server-side applies of whole objects, forced: nobody else
//! writes them.

use std::sync::Arc;

use anyhow::Context as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::json;
use warren_crds::{
    MeshIdentity, MeshNode, MeshNodeStatus, MeshState, MeshStateSpec, STATE_NAME,
    cilium::{CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy},
};
use warren_keyd_core::{Object, next_epoch};
use warren_model::policy::{PolicyKind, PolicyRef};

use super::{Loaded, objects};
use crate::{clock, trust::Trust};

/// Field manager of every write.
pub(crate) const MANAGER: &str = "warren-keyd";
/// Objects per page of a list.
const PAGE: u32 = 500;

/// The API server as a store.
pub(crate) struct KubeStore {
    client: Client,
    trust: Arc<Trust>,
}

/// Whether an API error is this HTTP code.
pub(crate) fn is_code(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

impl KubeStore {
    pub(crate) fn new(client: Client, trust: Arc<Trust>) -> Self {
        Self { client, trust }
    }

    /// Starts a term by compare-and-swap on the one MeshState object: whoever lost the race gets an error.
    pub(crate) async fn begin_term(&self, holder: &str) -> anyhow::Result<u64> {
        let api: Api<MeshState> = Api::all(self.client.clone());
        let stored = api.get_opt(STATE_NAME).await.context("cannot read MeshState")?;
        let last = stored.as_ref().map_or(0, |state| state.spec.epoch);
        let epoch = next_epoch(last, clock::unix_ms());
        let spec = MeshStateSpec {
            epoch,
            holder: holder.to_owned(),
        };
        match stored {
            None => drop(
                api.create(&PostParams::default(), &MeshState::new(STATE_NAME, spec))
                    .await
                    .context("cannot create MeshState")?,
            ),
            Some(mut state) => {
                // The resource version in the metadata makes this the compare-and-swap.
                state.spec = spec;
                let replaced = api.replace(STATE_NAME, &PostParams::default(), &state).await;
                replaced.context("cannot raise the epoch in MeshState")?;
            }
        }
        Ok(epoch)
    }

    pub(crate) async fn load(&self) -> anyhow::Result<Loaded> {
        let mut loaded = Loaded::default();
        for node in list(Api::<MeshNode>::all(self.client.clone()))
            .await
            .context("cannot list MeshNodes")?
        {
            let name = node.metadata.name.clone().unwrap_or_default();
            match objects::stored_node(&name, &node.spec, &self.trust.signer) {
                Ok(node) => loaded.recovered.nodes.push(node),
                Err(error) => loaded.problems.push(format!("MeshNode {name}: {error:#}")),
            }
        }
        let identities = list(Api::<MeshIdentity>::all(self.client.clone())).await;
        for identity in identities.context("cannot list MeshIdentities")? {
            loaded.recovered.identities.push(identity.identity());
        }
        Ok(loaded)
    }

    pub(crate) async fn apply(&self, object: &Object) -> anyhow::Result<()> {
        let params = PatchParams::apply(MANAGER).force();
        match object {
            Object::Node(node) => {
                let object = objects::mesh_node(node, &self.trust.signer);
                let api: Api<MeshNode> = Api::all(self.client.clone());
                api.patch(node.name.as_str(), &params, &Patch::Apply(&object))
                    .await?;
            }
            Object::Identity(number, labels) => {
                let object = MeshIdentity::of(*number, labels);
                let api: Api<MeshIdentity> = Api::all(self.client.clone());
                api.patch(&number.to_string(), &params, &Patch::Apply(&object))
                    .await?;
            }
            Object::IdentityDelete(number) => {
                let api: Api<MeshIdentity> = Api::all(self.client.clone());
                match api.delete(&number.to_string(), &DeleteParams::default()).await {
                    Err(error) if !is_code(&error, 404) => return Err(error.into()),
                    _ => {}
                }
            }
            // The API knows pod addresses.
            Object::Endpoint(_) | Object::EndpointDelete(_) => {}
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
