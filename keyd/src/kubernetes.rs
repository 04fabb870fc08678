//! Wiring of `--source kubernetes`: trust in a Secret, the watches, leadership, a term after the other.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use kube::Client;
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
    store::{KubeStore, Store},
    token_review::TokenReviews,
    trust::Trust,
};

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
    let notes = Notes::to_api(client.clone(), &keyd_id, metrics.clone());
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
        notes: notes.clone(),
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
        notes,
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
        let signing = {
            let _turn = self.trust.turn().await;
            let signing = Arc::new(self.trust.stored().await?);
            self.trust.activate(signing.clone());
            signing
        };
        self.trust.publish().await?;
        let loaded = self.store.load().await?;
        let term = publisher::Term {
            epoch,
            keyd_id: self.keyd_id.clone(),
            signing,
            store: Store::Kubernetes(self.store.clone()),
            expiry_ms: self.config.snapshot_expiry_seconds.saturating_mul(1000),
        };
        let settings = Settings::new(self.config.clone(), Mode::Kubernetes, epoch);
        let tasks = begin_term(
            settings,
            loaded,
            term,
            &self.trust,
            &self.metrics,
            self.notes.clone(),
        );
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
        match Trust::in_secret(client, namespace).await {
            Ok(trust) => return trust,
            Err(error) => tracing::warn!("waiting for the cluster's keys: {error:#}"),
        }
        sleep(START_PAUSE).await;
    }
}
