//! Keys in Kubernetes: the Secret `warren-keyd`, and the ConfigMap `warren-trust` with what is public of them.

use std::collections::BTreeMap;

use anyhow::Context as _;
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use zeroize::Zeroizing;

use super::{CA_CRT, CA_KEY, ROOTS, SIGNING_KEY, TrustText};
use crate::store::{MANAGER, is_code};

const SECRET: &str = "warren-keyd";
const PUBLIC: &str = "warren-trust";
/// How often a write is tried that somebody else always comes before.
const ATTEMPTS: u32 = 10;

/// The Secret and the ConfigMap.
#[derive(Clone)]
pub(super) struct KeydSecret {
    secrets: Api<Secret>,
    maps: Api<ConfigMap>,
}

impl KeydSecret {
    pub(super) fn new(client: &Client, namespace: &str) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), namespace),
            maps: Api::namespaced(client.clone(), namespace),
        }
    }

    async fn found(&self) -> anyhow::Result<Option<Secret>> {
        let found = self.secrets.get_opt(SECRET).await;
        found.with_context(|| format!("cannot read the Secret {SECRET}"))
    }

    async fn existing(&self) -> anyhow::Result<Secret> {
        let found = self.found().await?;
        found.with_context(|| format!("the Secret {SECRET} is gone: restore it"))
    }

    /// The three entries; `None` where there is no Secret yet.
    pub(super) async fn read(&self) -> anyhow::Result<Option<TrustText>> {
        self.found().await?.as_ref().map(text).transpose()
    }

    /// Creates the Secret. Another keyd's entries where it was first.
    pub(super) async fn create(&self, content: &TrustText) -> anyhow::Result<Option<TrustText>> {
        let entry = |name: &str, content: &str| (name.to_owned(), ByteString(content.into()));
        let secret = Secret {
            metadata: named(SECRET),
            type_: Some("Opaque".into()),
            data: Some(BTreeMap::from([
                entry(CA_CRT, &content.ca_crt),
                entry(CA_KEY, &content.ca_key),
                entry(SIGNING_KEY, &content.signing_key),
            ])),
            ..Secret::default()
        };
        match self.secrets.create(&PostParams::default(), &secret).await {
            Ok(_) => Ok(None),
            Err(error) if is_code(&error, 409) => text(&self.existing().await?).map(Some),
            Err(error) => Err(error).with_context(|| format!("cannot create the Secret {SECRET}")),
        }
    }

    pub(super) async fn signing_key(&self) -> anyhow::Result<Zeroizing<String>> {
        entry(&self.existing().await?, SIGNING_KEY).map(Zeroizing::new)
    }

    /// Replaces the signing key if the stored one is as expected; whether it was.
    pub(super) async fn swap(
        &self,
        expected: impl Fn(&str) -> anyhow::Result<bool>,
        new: &str,
    ) -> anyhow::Result<bool> {
        for attempt in 1.. {
            let mut secret = self.existing().await?;
            if !expected(&entry(&secret, SIGNING_KEY)?)? {
                return Ok(false);
            }
            let data = secret.data.get_or_insert_default();
            data.insert(SIGNING_KEY.into(), ByteString(new.into()));
            secret.metadata.managed_fields = None;
            // With the resource version of what was read: this is the compare-and-swap.
            match self
                .secrets
                .replace(SECRET, &PostParams::default(), &secret)
                .await
            {
                Ok(_) => return Ok(true),
                Err(error) if is_code(&error, 409) && attempt < ATTEMPTS => {}
                Err(error) => return Err(error).with_context(|| format!("cannot write the Secret {SECRET}")),
            }
        }
        Ok(false)
    }

    pub(super) async fn publish(&self, ca: &str, roots: &str) -> anyhow::Result<()> {
        let public = ConfigMap {
            metadata: named(PUBLIC),
            data: Some(BTreeMap::from([
                (CA_CRT.to_owned(), ca.to_owned()),
                (ROOTS.to_owned(), roots.to_owned()),
            ])),
            ..ConfigMap::default()
        };
        let params = PatchParams::apply(MANAGER).force();
        let patched = self.maps.patch(PUBLIC, &params, &Patch::Apply(&public)).await;
        patched.with_context(|| format!("cannot write the ConfigMap {PUBLIC}"))?;
        Ok(())
    }
}

fn named(name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.into()),
        ..ObjectMeta::default()
    }
}

fn entry(secret: &Secret, name: &str) -> anyhow::Result<String> {
    let data = secret.data.as_ref();
    let bytes = data
        .and_then(|data| data.get(name))
        .with_context(|| format!("the Secret {SECRET} has no {name}: restore it"))?;
    String::from_utf8(bytes.0.clone())
        .ok()
        .with_context(|| format!("{name} in the Secret {SECRET} is not text"))
}

fn text(secret: &Secret) -> anyhow::Result<TrustText> {
    Ok(TrustText {
        ca_crt: entry(secret, CA_CRT)?,
        ca_key: entry(secret, CA_KEY)?,
        signing_key: entry(secret, SIGNING_KEY).map(Zeroizing::new)?,
    })
}
