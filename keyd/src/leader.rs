//! Leadership by a Lease.
//!
//! ```text
//!            lease free or expired, update won
//! Follower ------------------------------------> Leader (one term, one epoch)
//!     ^                                            |
//!     '--- lease taken, or not renewed for 10 s ---'
//! ```
//! The holder's clock is not trusted: a lease is expired when it has not changed for its duration *as this
//! process saw it*. A lease does not fence; the epoch does (`KubeStore::begin_term`).

use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::time::{Instant, timeout};

/// Name of the Lease.
const NAME: &str = "warren-keyd";
/// Annotation with the holder's host:port.
const ADDRESS: &str = "warren.dev/address";
/// How long a lease holds without renewal.
const DURATION: Duration = Duration::from_secs(15);
/// A leader that could not renew for this long steps down: before anybody else may take over.
pub(crate) const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Time between two looks at the lease.
pub(crate) const INTERVAL: Duration = Duration::from_secs(2);
/// One look takes no longer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// What a look at the lease says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Standing {
    /// We hold it, renewed just now.
    Ours,
    /// Another one holds it, reachable there.
    Theirs(Vec<String>),
}

/// One candidate.
pub(crate) struct Candidate {
    api: Api<Lease>,
    id: String,
    address: String,
    /// The last version of the lease and when it was first seen.
    seen: Option<(String, Instant)>,
}

impl Candidate {
    pub(crate) fn new(client: Client, namespace: &str, id: String, address: String) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            id,
            address,
            seen: None,
        }
    }

    /// Looks at the lease; renews it, or takes it where it is free.
    pub(crate) async fn look(&mut self) -> anyhow::Result<Standing> {
        timeout(REQUEST_TIMEOUT, self.try_look())
            .await
            .context("the API server does not answer")?
    }

    async fn try_look(&mut self) -> anyhow::Result<Standing> {
        let Some(lease) = self.api.get_opt(NAME).await.context("cannot read the Lease")? else {
            let lease = self.claim(Lease {
                metadata: ObjectMeta {
                    name: Some(NAME.into()),
                    ..ObjectMeta::default()
                },
                spec: None,
            });
            self.api
                .create(&PostParams::default(), &lease)
                .await
                .context("cannot create the Lease")?;
            return Ok(Standing::Ours);
        };
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let unchanged_for = match &self.seen {
            Some((seen, since)) if *seen == version => since.elapsed(),
            _ => {
                self.seen = Some((version, Instant::now()));
                Duration::ZERO
            }
        };
        let holder = lease
            .spec
            .as_ref()
            .and_then(|spec| spec.holder_identity.clone())
            .unwrap_or_default();
        if holder != self.id && !holder.is_empty() && unchanged_for < DURATION {
            let address = lease
                .metadata
                .annotations
                .and_then(|mut annotations| annotations.remove(ADDRESS));
            return Ok(Standing::Theirs(address.into_iter().collect()));
        }
        // The resource version makes this a compare-and-swap.
        let lease = self.claim(lease);
        self.api
            .replace(NAME, &PostParams::default(), &lease)
            .await
            .context("cannot update the Lease")?;
        Ok(Standing::Ours)
    }

    /// The lease with us as its holder.
    fn claim(&self, mut lease: Lease) -> Lease {
        let now = MicroTime(Timestamp::now());
        let old = lease.spec.take().unwrap_or_default();
        let ours = old.holder_identity.as_deref() == Some(&self.id);
        lease.metadata.managed_fields = None;
        lease
            .metadata
            .annotations
            .get_or_insert_default()
            .insert(ADDRESS.into(), self.address.clone());
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.id.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: if ours { old.acquire_time } else { Some(now.clone()) },
            renew_time: Some(now),
            lease_transitions: Some(old.lease_transitions.unwrap_or(0) + i32::from(!ours)),
            ..LeaseSpec::default()
        });
        lease
    }

    /// Gives the lease back, so that the next one need not wait for its expiry.
    pub(crate) async fn release(&mut self) -> anyhow::Result<()> {
        let release = async {
            let Some(mut lease) = self.api.get_opt(NAME).await? else {
                return Ok(());
            };
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() == Some(&self.id) {
                spec.holder_identity = Some(String::new());
                self.api.replace(NAME, &PostParams::default(), &lease).await?;
            }
            Ok::<_, kube::Error>(())
        };
        timeout(Duration::from_secs(2), release)
            .await
            .context("the API server does not answer")??;
        Ok(())
    }
}
