//! Wiring of `keyd run`.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, atomic::AtomicU64},
};

use anyhow::{Context as _, anyhow};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Mutex, mpsc, watch},
};
use warren_keyd_core::{Core, Mode, Settings};
use warren_model::ClusterConfig;

use crate::{
    admin::{self, AdminService},
    args::{Run, SourceKind},
    auth::Authenticator,
    clock,
    hub::{self, Hub},
    key_writer,
    keys_service::KeysService,
    lag::Lag,
    listener,
    metrics::{self, Metrics},
    notes::{About, Notes},
    policy_status,
    publisher::{self, Publisher},
    rotations::{self, Maker},
    service::{Role, Service},
    signing::Keeper,
    source::{
        feed::{self, Feed},
        manifests::Folder,
    },
    store::{FileStore, Loaded, Store},
    tokens::Tokens,
    trust::Trust,
};

/// Commands that may wait for the hub.
const HUB_QUEUE: usize = 4096;

/// Runs keyd until a signal.
pub(crate) async fn run(args: Run) -> anyhow::Result<()> {
    let config = load_config(&args.config)?;
    tracing::info!(?config, "configuration");
    match args.source {
        SourceKind::Manifests => stand_alone(args, config).await,
        SourceKind::Kubernetes => crate::kubernetes::run(args, config).await,
    }
}

/// Reads and checks the cluster's settings.
fn load_config(path: &Path) -> anyhow::Result<ClusterConfig> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?;
    let config: ClusterConfig = serde_saphyr::from_str(&text).map_err(|error| {
        let line = error.to_string().lines().next().unwrap_or_default().to_owned();
        anyhow!("the configuration {} is malformed: {line}", path.display())
    })?;
    config
        .validate()
        .map_err(|fault| anyhow!("the configuration {}: {fault}", path.display()))?;
    Ok(config)
}

/// What both modes hand to their streams and tools.
pub(crate) struct Shared {
    pub(crate) args: Run,
    pub(crate) config: ClusterConfig,
    pub(crate) trust: Arc<Trust>,
    pub(crate) metrics: Metrics,
    pub(crate) notes: Notes,
    pub(crate) keyd_id: String,
}

impl Shared {
    pub(crate) fn listen(&self) -> SocketAddr {
        self.args
            .listen
            .unwrap_or_else(|| SocketAddr::from(([0_u16; 8], self.config.keyd_port)))
    }

    /// Serves agents, the local socket and metrics until a signal or the first failure.
    pub(crate) async fn serve(
        &self,
        role: watch::Receiver<Role>,
        ready: watch::Receiver<bool>,
        authenticator: Authenticator,
        tokens: Option<Arc<Mutex<Tokens>>>,
        advertise: String,
        maker: Maker,
    ) -> anyhow::Result<()> {
        let service = Service {
            trust: self.trust.clone(),
            role,
            authenticator,
            tokens,
            metrics: self.metrics.clone(),
            notes: self.notes.clone(),
            next_session: Arc::new(AtomicU64::new(1)),
        };
        let admin = AdminService {
            service: service.clone(),
            keyd_id: self.keyd_id.clone(),
            source: match self.args.source {
                SourceKind::Manifests => "manifests",
                SourceKind::Kubernetes => "kubernetes",
            },
            encryption: self.config.encryption,
            advertise,
        };
        let keys = KeysService {
            service: service.clone(),
            maker,
        };
        let http = metrics::serve(self.args.metrics, self.metrics.clone(), ready).await?;
        let (bound, agents) = listener::bind(self.listen(), service).await?;
        let socket = admin::serve(&self.args.admin_socket, admin, keys)?;
        tracing::info!(%bound, id = %self.keyd_id, "keyd serves agents");
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            served = agents => served,
            () = socket => Err(anyhow!("the admin socket ended")),
            () = http => Err(anyhow!("the metrics listener ended")),
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    }
}

/// The tasks of one leadership term; dropped, they end, and with them every stream.
pub(crate) struct TermTasks {
    pub(crate) hub: mpsc::Sender<hub::Command>,
    tasks: [tokio::task::JoinHandle<()>; 7],
}

impl Drop for TermTasks {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Starts a term: core, hub, publisher.
pub(crate) fn begin_term(
    settings: Settings,
    loaded: Loaded,
    term: publisher::Term,
    trust: &Arc<Trust>,
    metrics: &Metrics,
    notes: Notes,
) -> TermTasks {
    metrics.term(Some(term.epoch));
    for problem in &loaded.problems {
        notes.alarm(About::Mesh, "ObjectNotBelieved", problem);
    }
    let hub_terms = (term.epoch, settings.mode == Mode::Kubernetes);
    let (hub, commands) = mpsc::channel(HUB_QUEUE);
    let (orders, ordered) = mpsc::unbounded_channel();
    let (conditions, wanted) = mpsc::unbounded_channel();
    let lag = Arc::new(Lag::default());
    let conditions_of = policy_status::write(term.store.clone(), wanted);
    let (keys, changed) = mpsc::unbounded_channel();
    let keys_of = key_writer::write(term.store.clone(), term.epoch, hub.downgrade(), changed);
    let (rotations, said) = mpsc::unbounded_channel();
    let statuses = rotations::Statuses::new(&loaded.rotations);
    let rotations_of = rotations::write(term.store.clone(), loaded.rotations, hub.downgrade(), said);
    let (signing, wanted_signing) = mpsc::unbounded_channel();
    let keeper = Keeper {
        trust: trust.clone(),
        store: term.store.clone(),
        epoch: term.epoch,
        hub: hub.downgrade(),
        max_age_seconds: settings.config.signing_key_max_age_seconds,
    };
    let keeper = keeper.run(loaded.recovered.nodes.clone(), wanted_signing);
    let guard = term.store.guard(hub.downgrade(), &term.keyd_id);
    let publisher = Publisher::new(term, &hub, lag.clone());
    let core = Core::new(settings, loaded.recovered, clock::monotonic_ms());
    let index = Hub::new(
        core,
        orders,
        metrics.clone(),
        (loaded.problems, statuses),
        hub::Shell {
            conditions,
            keys,
            rotations,
            signing,
            notes,
        },
        lag,
        hub_terms,
    );
    TermTasks {
        hub,
        tasks: [
            tokio::spawn(index.run(commands)),
            tokio::spawn(publisher.run(ordered)),
            tokio::spawn(conditions_of),
            tokio::spawn(keys_of),
            tokio::spawn(rotations_of),
            tokio::spawn(keeper),
            tokio::spawn(guard),
        ],
    }
}

async fn stand_alone(args: Run, config: ClusterConfig) -> anyhow::Result<()> {
    let state = args.state_dir.clone();
    crate::files::make_dir(&state)
        .with_context(|| format!("cannot make the state folder {}", state.display()))?;
    let folder = Folder::open(
        args.manifests
            .clone()
            .context("--source manifests needs --manifests DIR")?,
        state.join("rotations"),
        &config.cluster_name,
    )?;
    let trust = Arc::new(Trust::in_folder(&state).await?);
    let tokens = Tokens::open(state.join("tokens.json"))?;
    let keyd_id = args.id.clone().unwrap_or_else(|| "keyd".into());
    let files = Arc::new(FileStore::open(state.join("state"), trust.clone())?);
    let epoch = files.begin_term(&keyd_id)?;
    let store = Store::Files(files);
    let metrics = Metrics::default();
    let notes = Notes::new(metrics.clone());
    let loaded = store.load().await?;
    let term = publisher::Term {
        epoch,
        keyd_id: keyd_id.clone(),
        signing: trust.signing(),
        store,
        expiry_ms: config.snapshot_expiry_seconds.saturating_mul(1000),
    };
    let tasks = begin_term(
        Settings::new(config.clone(), Mode::StandAlone, epoch),
        loaded,
        term,
        &trust,
        &metrics,
        notes.clone(),
    );

    let (feed, fed) = mpsc::channel(1024);
    let (synced, ready) = watch::channel(false);
    tokio::spawn(feed::run(fed, synced));
    feed.send(Feed::Attach(tasks.hub.clone()))
        .await
        .context("the feed ended")?;
    tokio::spawn(folder.watch(feed));

    let (_role, role) = watch::channel(Role::Leader {
        hub: tasks.hub.clone(),
        epoch,
    });
    let shared = Shared {
        config,
        trust,
        metrics,
        notes,
        keyd_id,
        args,
    };
    let advertise = shared
        .args
        .advertise
        .clone()
        .unwrap_or_else(|| shared.listen().to_string());
    let tokens = Some(Arc::new(Mutex::new(tokens)));
    let maker = Maker::Folder(state.join("rotations"));
    let over = tasks.hub.closed();
    tokio::select! {
        served = shared.serve(role, ready, Authenticator::Certificates, tokens, advertise, maker) => served,
        () = over => Err(anyhow!(
            "another keyd has taken over the state folder {}: this one ends",
            state.display()
        )),
    }
}
