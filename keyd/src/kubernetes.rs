//! Wiring of `--source kubernetes`: trust in a Secret, the watches, leadership, a term after the other.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep},
};
use warren_keyd_core::{Mode, Settings};
use warren_model::ClusterConfig;

use crate::{
    args::Run,
    auth::Authenticator,
    leader::{Candidate, INTERVAL, RENEW_DEADLINE, Standing},
    metrics::Metrics,
    notes::Notes,
    publisher,
    rotations::Maker,
    run::{Shared, TermTasks, begin_term},
    service::Role,
    source::{
        feed::{self, Feed},
        kubernetes,
    },
    store::{KubeStore, MANAGER, Store, is_code},
    token_review::TokenReviews,
    trust::{Trust, TrustText},
};

const SECRET: &str = "warren-keyd";
const TRUST: &str = "warren-trust";
/// Pause after an API server that does not answer at the start.
const START_PAUSE: Duration = Duration::from_secs(2);

/// Runs keyd in (or against) a Kubernetes cluster: in-cluster configuration, or KUBECONFIG.
pub(crate) async fn run(args: Run, config: ClusterConfig) -> anyhow::Result<()> {
    // kube picks its crypto from the process's default: there is only one.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let client = Client::try_default()
        .await
        .context("no Kubernetes configuration: run in a cluster, or set KUBECONFIG")?;
    let keyd_id = match args.id.clone() {
        Some(id) => id,
        None => host_name()?,
    };
    let advertise = args.advertise.clone().ok_or_else(|| {
        anyhow!("--source kubernetes needs --advertise HOST:PORT: followers send agents there")
    })?;
    let trust = Arc::new(trust(&client, &args.namespace).await);
    let account = args
        .agent_account
        .clone()
        .unwrap_or_else(|| format!("system:serviceaccount:{}:mesh-agent", args.namespace));

    let (feed, fed) = mpsc::channel(1024);
    let (synced, mut source_synced) = watch::channel(false);
    tokio::spawn(feed::run(fed, synced));
    kubernetes::watch(&client, &config.cluster_name, feed.clone());

    let metrics = Metrics::default();
    let (role_set, role) = watch::channel(Role::Follower { leader: vec![] });
    let (ready_set, ready) = watch::channel(false);
    let terms = Terms {
        store: Arc::new(KubeStore::new(client.clone(), trust.clone())),
        trust: trust.clone(),
        config: config.clone(),
        keyd_id: keyd_id.clone(),
        metrics: metrics.clone(),
        feed,
        role: role_set,
        ready: ready_set,
        notes: Notes::to_api(client.clone(), &keyd_id),
    };
    let maker = Maker::Kubernetes(client.clone());
    let mut candidate = Candidate::new(
        client.clone(),
        &args.namespace,
        keyd_id.clone(),
        advertise.clone(),
    );
    let authenticator = Authenticator::Tokens(TokenReviews::new(client, account));
    let shared = Shared {
        args,
        config,
        trust,
        metrics,
        keyd_id,
    };
    let lead = async {
        // Whoever leads must know the cluster.
        let _ = source_synced.wait_for(|synced| *synced).await;
        terms.lead(&mut candidate).await;
    };
    let served = tokio::select! {
        served = shared.serve(role, ready, authenticator, None, advertise, maker) => served,
        () = lead => Err(anyhow!("the leadership loop ended")),
    };
    if let Err(error) = candidate.release().await {
        tracing::debug!("the Lease was not given back: {error:#}");
    }
    served
}

fn host_name() -> anyhow::Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .context("cannot read the host's name (give --id)")?;
    Ok(text.trim().to_owned())
}

/// What a term needs.
struct Terms {
    store: Arc<KubeStore>,
    trust: Arc<Trust>,
    config: ClusterConfig,
    keyd_id: String,
    metrics: Metrics,
    feed: mpsc::Sender<Feed>,
    role: watch::Sender<Role>,
    ready: watch::Sender<bool>,
    notes: Notes,
}

impl Terms {
    /// Follows the lease for ever: begins a term when it is ours, ends it when it is not, or cannot be renewed.
    async fn lead(&self, candidate: &mut Candidate) {
        let mut term: Option<TermTasks> = None;
        let mut renewed = Instant::now();
        loop {
            let before = Instant::now();
            if term.as_ref().is_some_and(|term| term.hub.is_closed()) {
                // The epoch is another's; if the Lease is ours all the same, the next term begins with what is stored.
                term = None;
                self.metrics.term(None);
                self.role.send_replace(Role::Follower { leader: vec![] });
                self.ready.send_replace(false);
            }
            match candidate.look().await {
                Ok(Standing::Ours) => {
                    renewed = before;
                    if term.is_none() {
                        term = self.begin().await;
                    }
                }
                Ok(Standing::Theirs(leader)) => {
                    if term.take().is_some() {
                        tracing::warn!("another keyd holds the Lease: this one follows");
                        self.metrics.term(None);
                    }
                    let known = !leader.is_empty();
                    self.role.send_replace(Role::Follower { leader });
                    self.ready.send_replace(known);
                }
                Err(error) => tracing::warn!("{error:#}"),
            }
            if term.is_some() && renewed.elapsed() >= RENEW_DEADLINE {
                tracing::warn!("the Lease could not be renewed: this keyd steps down");
                term = None;
                self.metrics.term(None);
                self.role.send_replace(Role::Follower { leader: vec![] });
                self.ready.send_replace(false);
            }
            sleep(INTERVAL).await;
        }
    }

    async fn begin(&self) -> Option<TermTasks> {
        match self.try_begin().await {
            Ok((tasks, epoch)) => {
                tracing::info!(epoch, "this keyd leads");
                self.role.send_replace(Role::Leader {
                    hub: tasks.hub.clone(),
                    epoch,
                });
                self.ready.send_replace(true);
                Some(tasks)
            }
            Err(error) => {
                tracing::warn!("cannot begin a term: {error:#}");
                None
            }
        }
    }

    async fn try_begin(&self) -> anyhow::Result<(TermTasks, u64)> {
        // The fence first: what is read after it no former leader can make older.
        let epoch = self.store.begin_term(&self.keyd_id).await?;
        let loaded = self.store.load().await?;
        let term = publisher::Term {
            epoch,
            keyd_id: self.keyd_id.clone(),
            trust: self.trust.clone(),
            store: Store::Kubernetes(self.store.clone()),
            expiry_ms: self.config.snapshot_expiry_seconds.saturating_mul(1000),
        };
        let settings = Settings::new(self.config.clone(), Mode::Kubernetes, epoch);
        let tasks = begin_term(settings, loaded, term, &self.metrics, self.notes.clone());
        self.feed
            .send(Feed::Attach(tasks.hub.clone()))
            .await
            .context("the feed ended")?;
        Ok((tasks, epoch))
    }
}

/// The cluster's keys from the Secret; the first keyd makes them. Waits for the API server as long as it takes.
async fn trust(client: &Client, namespace: &str) -> Trust {
    loop {
        match try_trust(client, namespace).await {
            Ok(trust) => return trust,
            Err(error) => tracing::warn!("waiting for the cluster's keys: {error:#}"),
        }
        sleep(START_PAUSE).await;
    }
}

async fn try_trust(client: &Client, namespace: &str) -> anyhow::Result<Trust> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let trust = match secrets
        .get_opt(SECRET)
        .await
        .context("cannot read the Secret warren-keyd")?
    {
        Some(secret) => from_secret(secret)?,
        None => {
            let trust = Trust::generate()?;
            let created = secrets.create(&PostParams::default(), &to_secret(&trust)?).await;
            match created {
                Ok(_) => trust,
                // Another replica was first.
                Err(error) if is_code(&error, 409) => from_secret(secrets.get(SECRET).await?)?,
                Err(error) => return Err(error).context("cannot create the Secret warren-keyd"),
            }
        }
    };
    let public = ConfigMap {
        metadata: ObjectMeta {
            name: Some(TRUST.into()),
            ..ObjectMeta::default()
        },
        data: Some(BTreeMap::from([
            ("ca.crt".to_owned(), trust.authority.certificate_pem()),
            ("snapshot-root.pub".to_owned(), trust.signer.root().to_base64()),
        ])),
        ..ConfigMap::default()
    };
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    maps.patch(
        TRUST,
        &PatchParams::apply(MANAGER).force(),
        &Patch::Apply(&public),
    )
    .await
    .context("cannot write the ConfigMap warren-trust")?;
    Ok(trust)
}

fn to_secret(trust: &Trust) -> anyhow::Result<Secret> {
    let text = trust.to_text()?;
    let entry = |name: &str, content: String| (name.to_owned(), ByteString(content.into_bytes()));
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some(SECRET.into()),
            ..ObjectMeta::default()
        },
        type_: Some("Opaque".into()),
        data: Some(BTreeMap::from([
            entry("ca.crt", text.ca_crt),
            entry("ca.key", text.ca_key),
            entry("snapshot-signing.key", text.signing_key),
        ])),
        ..Secret::default()
    })
}

fn from_secret(secret: Secret) -> anyhow::Result<Trust> {
    let mut data = secret.data.unwrap_or_default();
    let mut take = |name: &str| {
        let bytes = data
            .remove(name)
            .with_context(|| format!("the Secret warren-keyd has no {name}: restore it"))?;
        String::from_utf8(bytes.0).with_context(|| format!("{name} in the Secret warren-keyd is not text"))
    };
    let text = TrustText {
        ca_crt: take("ca.crt")?,
        ca_key: take("ca.key")?,
        signing_key: take("snapshot-signing.key")?,
    };
    Trust::from_text(&text).context("the keys in the Secret warren-keyd are damaged: restore them")
}
