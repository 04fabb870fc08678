//! The agent's loop: one task owns core and drivers, everything else sends it inputs.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use futures::StreamExt as _;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
    time::Instant,
};
use warren_agent_api::{Attachment, Request, Response, RootStatus};
use warren_agent_core::{Action, Agent, Endpoint, Observed, Settings, policy::LocalEndpoint, psk::Exchanges};
use warren_keyd_api::snapshot::Directory;
use warren_model::{Datapath, IdentityId, PodRef, PublicKey, policy::NodeFacts};
use warren_net::Net;

use crate::{
    adopt,
    cli::RunOptions,
    clock::{SignedClock, boot_ms},
    cni,
    config::{self, Config},
    files::{Applied, SavedEndpoints, StateDir, make_private_dir},
    keyd::{self, Contents, FromKeyd, Received, Refused, ToKeyd},
    keys::KeyStore,
    machine::Machine,
    metrics::{self, Health},
    policy::{Enforcer, Shared, ToEnforcer},
    psk, query, server, status, tunnel,
};

/// How often the state is reported to `keyd`.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);
/// How often the signed time is kept on disk, milliseconds.
const KEEP_TIME_MS: u64 = 600_000;
/// How often everything is compared though nothing happened.
const COMPARE_INTERVAL: Duration = Duration::from_secs(10);
/// How often somebody else's FORWARD chains are looked at.
const FORWARD_INTERVAL: Duration = Duration::from_secs(60);
/// How long the node's state waits for the policies of its pods.
const POLICY_TIME: Duration = Duration::from_secs(5);
/// How often the node is looked at again at once, as what was done makes more to do; then inputs come first.
const MOST_IN_A_ROW: u32 = 3;
/// How long the end of a pod is told again to a `keyd` that was connected anew.
const REPORT_AGAIN: Duration = Duration::from_secs(15);

/// What can happen.
pub(crate) enum Input {
    /// From the client.
    Keyd(FromKeyd),
    /// A directory whose policy is in force.
    Directory(Received),
    /// Policies were tried again.
    Policy,
    /// From the local socket, or from an operator by way of `keyd`.
    Local(Request, oneshot::Sender<Response>),
    /// `keyd`'s answer about a pod that is being added.
    Identity(
        Box<Attachment>,
        Result<IdentityId, Refused>,
        oneshot::Sender<Response>,
    ),
    /// `keyd`'s answer about a pod that was told to it again.
    Reported(PodRef, Result<IdentityId, Refused>),
    /// Devices, addresses or routes changed.
    Network,
    /// The tunnel process was started anew: it knows nothing.
    TunnelStarted,
    /// A packet of the exchange of pre-shared keys.
    Exchange(psk::Packet),
}

/// What there is to do when nothing has happened for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    /// Compare everything.
    Compare,
    /// A pair may be about to change: a look at the tunnels is enough.
    Look,
    /// An exchange has something to say.
    Exchange,
}

/// A pod whose CNI ADD waits for its programs.
pub(crate) struct Waiting {
    pub(crate) index: u16,
    pub(crate) reply: oneshot::Sender<Response>,
    pub(crate) deadline: Instant,
}

/// Everything that the loop owns.
pub(crate) struct Runner {
    pub(crate) config: Config,
    pub(crate) agent: Agent,
    pub(crate) machine: Machine,
    pub(crate) state: StateDir,
    pub(crate) inputs: mpsc::UnboundedSender<Input>,
    pub(crate) to_keyd: mpsc::UnboundedSender<ToKeyd>,
    pub(crate) enforcer: std::sync::mpsc::Sender<ToEnforcer>,
    pub(crate) shared: Shared,
    pub(crate) health: Arc<Health>,
    /// Where `keyd` is connected.
    pub(crate) connected: Option<String>,
    /// Why it is not.
    pub(crate) keyd_fault: Option<String>,
    /// The snapshot root that is pinned.
    pub(crate) root: Option<RootStatus>,
    /// How the mounted trust differs from what is pinned.
    pub(crate) trust_fault: Option<String>,
    /// What of the directory cannot be read.
    pub(crate) unreadable: Vec<String>,
    /// How old the directory is.
    pub(crate) clock: SignedClock,
    /// When the time was kept last, since boot, milliseconds.
    time_kept: u64,
    /// Updates that were refused: forged, replayed or damaged.
    pub(crate) refused_updates: u64,
    /// This node's private keys.
    keys: KeyStore,
    /// What exchanges of pre-shared keys have in memory.
    secrets: psk::Secrets,
    /// Where their packets come and go.
    pub(crate) links: psk::Links,
    /// `keyd`'s refusals of this node's keys, by generation.
    pub(crate) key_refusals: BTreeMap<u64, String>,
    /// `keyd`'s refusals of pods that are there.
    pub(crate) pod_refusals: BTreeMap<PodRef, String>,
    pub(crate) waiting: Vec<Waiting>,
    /// Pods that are gone, with the time at which `keyd` was told.
    pub(crate) unreported: Vec<(Endpoint, Option<Instant>)>,
    pub(crate) observed: Observed,
    /// When a peer was first seen on the device of a slot, by the core's clock.
    pub(crate) peers_since: BTreeMap<(u8, PublicKey), Duration>,
    /// The version that `keyd` was told to be in force.
    acknowledged: Option<(u64, u64)>,
    /// The endpoints that policy was told of.
    told_endpoints: Option<BTreeMap<u16, LocalEndpoint>>,
    /// The version whose identities policy was told to be in the maps.
    settled: Option<(u64, u64)>,
    saved: SavedEndpoints,
    /// The drivers could not be read: when to try again.
    observe_fault: Option<String>,
    dirty: bool,
    /// The tunnel devices alone are to be looked at.
    look: bool,
    /// Something was changed since everything was read.
    changed: bool,
    started: Instant,
}

/// `mesh-agent run`.
pub(crate) fn main(options: Box<RunOptions>) -> ExitCode {
    let result = Config::load(*options).and_then(|config| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let result = runtime.block_on(run(config));
        // Blocking reads of other namespaces must not hold up the end.
        runtime.shutdown_timeout(Duration::from_secs(1));
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: Config) -> Result<()> {
    let state = StateDir::open(&config.options.state_dir)?;
    make_private_dir(&config.options.run_dir)?;
    let net = Net::open().await?;
    let keys = state.keys()?;
    if keys.keyring().held().is_empty() {
        keys.make(1, config.pre_shared_keys())?;
    }
    let (datapath, changed) = config::choose_datapath(config.cluster.datapath, &state, &net).await?;
    tracing::info!(node = %config.node, %datapath, changed, cluster = ?config.cluster, "starting");
    let settings = Settings {
        config: config.cluster.clone(),
        node: config.node.clone(),
    };
    let events = net.watch()?;
    let machine = Machine::open(net, datapath, &settings, keys.clone(), &config.options)?;
    let (inputs, received) = mpsc::unbounded_channel();
    let (to_keyd, commands) = mpsc::unbounded_channel();
    let (from_keyd, keyd_events) = mpsc::unbounded_channel();
    let applied = Applied::new(&config.options.run_dir);
    let (roots, root) = keyd::snapshot_roots(&config, &state).unzip();
    let directory = roots
        .and_then(|roots| state.load_snapshot(&roots))
        .filter(|directory| is_newest(directory, applied.read()));
    let shared = Shared::new(machine.programs());
    let defaults = NodeFacts {
        closed_to_host: !config.cluster.host_reaches_pods,
        audit: config.cluster.policy_audit,
        ..NodeFacts::default()
    };
    let mut enforcer = Enforcer::new(shared.clone(), config.node.clone(), defaults)
        .context("the policy maps cannot be read")?;
    let (to_enforcer, messages) = std::sync::mpsc::channel();
    let mut agent = Agent::new(settings, keys.keyring());
    agent.restore_pre_shared_keys(Exchanges::new(keys.records(), psk::salt()?));
    let mut runner = Runner::new(
        config.clone(),
        agent,
        machine,
        (state.clone(), keys.clone()),
        inputs.clone(),
        to_keyd,
        (to_enforcer.clone(), shared.clone()),
    );
    runner.root = root;
    let clock = runner.clock.clone();
    let (signed, at) = state.load_time(boot_ms());
    if signed > 0 {
        clock.lock().reached(signed, at);
    }
    let mut contents = Contents::default();
    if let Some(directory) = &directory {
        let received = contents.whole(directory);
        let (epoch, version) = directory.position();
        tracing::info!(epoch, version, "last good snapshot loaded");
        enforcer.directory(&received);
        runner.own_directory(received);
    }
    let to_runner = inputs.clone();
    std::thread::Builder::new()
        .name("policy".into())
        .spawn(move || enforcer.run(&messages, &to_runner))
        .context("no thread for policy")?;
    runner.machine.attach_host();
    shared.watch(config.options.flows_per_pod)?;
    adopt::adopt(&mut runner).await;
    // Nothing else before the node is covered.
    runner.reconcile().await;
    let health = runner.health.clone();
    if datapath == Datapath::Userspace && config.cluster.encryption {
        tunnel::supervise(&config.options, inputs.clone());
    }
    server::listen(&config.options.run_dir.join("agent.sock"), inputs.clone())?;
    tokio::spawn(metrics::serve(config.options.metrics, health));
    let client = keyd::Client {
        config,
        state,
        keys,
        datapath,
        directory,
        contents,
        changes: to_enforcer,
        inputs: inputs.clone(),
        saving: Arc::default(),
        floor: applied.read(),
        applied,
        resync: false,
        clock,
        trust_faults: keyd::TrustFaults::default(),
        events: from_keyd,
        commands,
    };
    tokio::spawn(client.run());
    forward_inputs(events, keyd_events, inputs);
    runner.run(received).await
}

/// Whether the directory on disk is not older than what the devices were made from.
fn is_newest(directory: &Directory, applied: (u64, u64)) -> bool {
    let newest = directory.position() >= applied;
    if !newest {
        tracing::error!(
            disk = ?directory.position(), ?applied,
            "the directory on disk is older than what is in force: the disk was set back; waiting for keyd"
        );
    }
    newest
}

fn forward_inputs(
    mut network: impl futures::Stream<Item = warren_net::LinkEvent> + Send + Unpin + 'static,
    mut keyd: mpsc::UnboundedReceiver<FromKeyd>,
    inputs: mpsc::UnboundedSender<Input>,
) {
    let to = inputs.clone();
    tokio::spawn(async move {
        while network.next().await.is_some() {
            if to.send(Input::Network).is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        while let Some(event) = keyd.recv().await {
            if inputs.send(Input::Keyd(event)).is_err() {
                return;
            }
        }
    });
}

impl Runner {
    fn new(
        config: Config,
        mut agent: Agent,
        machine: Machine,
        (state, keys): (StateDir, KeyStore),
        inputs: mpsc::UnboundedSender<Input>,
        to_keyd: mpsc::UnboundedSender<ToKeyd>,
        (enforcer, shared): (std::sync::mpsc::Sender<ToEnforcer>, Shared),
    ) -> Self {
        let saved = state.load_endpoints();
        agent.restore_endpoints(saved.endpoints.clone());
        let unreported = saved
            .unreported
            .iter()
            .map(|endpoint| (endpoint.clone(), None))
            .collect();
        Self {
            config,
            agent,
            machine,
            state,
            inputs,
            to_keyd,
            health: Arc::new(Health::new(shared.clone())),
            enforcer,
            shared,
            connected: None,
            keyd_fault: None,
            root: None,
            trust_fault: None,
            unreadable: Vec::new(),
            clock: SignedClock::default(),
            time_kept: 0,
            refused_updates: 0,
            keys,
            secrets: psk::Secrets::default(),
            links: psk::Links::default(),
            key_refusals: BTreeMap::new(),
            pod_refusals: BTreeMap::new(),
            waiting: Vec::new(),
            unreported,
            observed: Observed::default(),
            peers_since: BTreeMap::new(),
            acknowledged: None,
            told_endpoints: None,
            settled: None,
            saved,
            observe_fault: None,
            dirty: true,
            look: false,
            changed: false,
            started: Instant::now(),
        }
    }

    /// The core's clock.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    async fn run(mut self, mut inputs: mpsc::UnboundedReceiver<Input>) -> Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
        let mut report = tokio::time::interval(STATUS_INTERVAL);
        let mut compare = tokio::time::interval(COMPARE_INTERVAL);
        let mut forward = tokio::time::interval(FORWARD_INTERVAL);
        loop {
            let (due, wake) = self.due();
            tokio::select! {
                input = inputs.recv() => {
                    let Some(input) = input else { return Ok(()) };
                    self.take(input).await;
                    while let Ok(more) = inputs.try_recv() {
                        self.take(more).await;
                    }
                }
                _ = report.tick() => self.report().await,
                _ = compare.tick() => {
                    self.check_age(false);
                    self.machine.look_closely();
                    self.machine.attach_host();
                    self.dirty = true;
                }
                _ = forward.tick() => self.machine.allow_forward().await,
                () = tokio::time::sleep_until(due) => match wake {
                    Wake::Compare => self.dirty = true,
                    Wake::Look => self.look = true,
                    Wake::Exchange => {}
                },
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
            }
            self.exchange();
            for _ in 0..MOST_IN_A_ROW {
                if self.dirty {
                    self.reconcile().await;
                } else if std::mem::take(&mut self.look) {
                    self.look().await;
                } else {
                    break;
                }
                self.exchange();
            }
            self.health.beat();
        }
        self.save_endpoints();
        self.keep_time();
        tracing::info!("stopping; everything stays in place");
        Ok(())
    }

    /// When something is to be done though nothing happens.
    fn due(&self) -> (Instant, Wake) {
        let at = |time: Duration, wake| (self.started + time, wake);
        let look = self.agent.next_look().map(|look| at(look, Wake::Look));
        let exchange = self.agent.next_exchange();
        let exchange = exchange.map(|time| at(time, Wake::Exchange));
        let compare = (self.due_besides_looks(), Wake::Compare);
        let first = [look, exchange].into_iter().flatten().min_by_key(|(at, _)| *at);
        match first {
            Some(first) if first.0 < compare.0 => first,
            _ => compare,
        }
    }

    fn due_besides_looks(&self) -> Instant {
        let mut due = Instant::now() + COMPARE_INTERVAL;
        if let Some(retry) = self.agent.next_retry() {
            due = due.min(self.started + retry);
        }
        if self.observe_fault.is_some() {
            due = due.min(Instant::now() + Duration::from_secs(1));
        }
        self.waiting
            .iter()
            .map(|waiting| waiting.deadline)
            .fold(due, Instant::min)
    }

    async fn take(&mut self, input: Input) {
        match input {
            Input::Network => self.dirty = true,
            Input::TunnelStarted => {
                self.agent.retry_now();
                self.dirty = true;
            }
            Input::Keyd(event) => self.keyd_event(event),
            Input::Directory(received) => self.directory(received),
            Input::Policy => self.settle(),
            Input::Local(request, reply) => self.local(request, reply).await,
            Input::Identity(attachment, result, reply) => cni::identified(self, *attachment, result, reply),
            Input::Reported(pod, result) => self.reported(pod, result),
            Input::Exchange(packet) => {
                let now = self.now();
                let exchanges = self.agent.exchanges();
                exchanges.received(now, packet.slot, packet.from, &packet.bytes);
            }
        }
    }

    /// Something changed: compare before the next input is waited for.
    pub(crate) fn mark_dirty(&mut self) {
        self.dirty = true;
    }

    fn keyd_event(&mut self, event: FromKeyd) {
        match event {
            FromKeyd::Connected { address } => {
                self.connected = Some(address);
                self.keyd_fault = None;
                self.acknowledged = None;
                self.agent.begin_reports();
                self.tell_pods();
                self.dirty = true;
            }
            FromKeyd::Disconnected { reason } => {
                if self.connected.take().is_some() || self.keyd_fault.as_ref() != Some(&reason) {
                    tracing::warn!(%reason, "no session with keyd; everything stays as it is");
                }
                self.keyd_fault = Some(reason);
            }
            FromKeyd::Key {
                generation,
                refusal: Some(reason),
            } => {
                self.key_refusals.insert(generation, reason);
            }
            FromKeyd::Key {
                generation,
                refusal: None,
            } => {
                self.key_refusals.remove(&generation);
            }
            FromKeyd::Root(root) => self.root = Some(root),
            FromKeyd::Trust { fault } => self.trust_fault = fault,
            FromKeyd::RefusedUpdate => self.refused_updates += 1,
            FromKeyd::NewKey => {
                self.agent.set_keyring(self.keys.keyring());
                self.dirty = true;
            }
            FromKeyd::Forget(forget) => {
                let now = self.now();
                // It is said until it is so.
                if self.agent.forget_psk(now, &forget) {
                    let (peer, own, other) = (&forget.peer, forget.own, forget.other);
                    tracing::warn!(%peer, own, other, "a pre-shared key is forgotten, as keyd says: one end has lost it");
                }
            }
        }
    }

    /// A directory from keyd. One that is over already takes nobody new.
    fn directory(&mut self, received: Received) {
        let (issued, expires) = received.signed;
        if self.clock.lock().would_be_expired(issued, expires, boot_ms()) {
            self.check_age(true);
        }
        self.own_directory(received);
    }

    /// A directory whose policy is in force, from this node's disk or from keyd. One that is about policy alone leaves the node
    /// as it is.
    fn own_directory(&mut self, received: Received) {
        self.unreadable = received.unreadable;
        let (issued, expires) = received.signed;
        self.clock.lock().directory(issued, expires, boot_ms());
        self.agent.change_directory(&received.change);
        self.check_age(false);
        if received.change.concerns_mesh() {
            self.dirty = true;
        } else {
            self.settle();
        }
    }

    /// Notes whether the directory's time is over; `over`: it is.
    fn check_age(&mut self, over: bool) {
        let boot = boot_ms();
        let expired = over || self.clock.lock().expired_ms(boot).is_some();
        if self.agent.set_expired(expired) {
            self.dirty = true;
            match expired {
                true => tracing::error!("the directory's time is over: {}", status::EXPIRED),
                false => tracing::info!("the directory is good again"),
            }
        }
        if boot.saturating_sub(self.time_kept) >= KEEP_TIME_MS || self.time_kept == 0 {
            self.keep_time();
        }
    }

    /// What is known of the real time is not lost with this process, or the machine's clock.
    fn keep_time(&mut self) {
        let boot = boot_ms();
        let Some(now) = self.clock.lock().now(boot) else {
            return;
        };
        self.time_kept = boot;
        if let Err(error) = self.state.save_time(now, boot) {
            tracing::warn!(error = %format!("{error:#}"), "the signed time cannot be kept");
        }
    }

    async fn local(&mut self, request: Request, reply: oneshot::Sender<Response>) {
        let response = match request {
            Request::CniAdd(attachment) => return cni::add(self, attachment, reply).await,
            Request::CniDel(key) => cni::delete(self, &key),
            Request::CniCheck(attachment) => cni::check(self, &attachment),
            Request::CniGc { valid } => cni::collect(self, &valid),
            Request::CniStatus => cni::status(self),
            Request::EncryptStatus if self.dirty => {
                self.reconcile().await;
                Response::EncryptStatus(Box::new(status::encrypt(self).await))
            }
            Request::EncryptStatus => Response::EncryptStatus(Box::new(status::encrypt(self).await)),
            Request::Status => Response::Status(Box::new(status::agent(self))),
            Request::Endpoints => return query::policies(self, None, false, reply),
            Request::Policy { endpoint } => return query::policies(self, endpoint, true, reply),
            Request::PolicyTrace(request) => return query::trace(self, &request, reply),
            Request::Conntrack { endpoint, limit } => return query::conntrack(self, endpoint, limit, reply),
            Request::PolicyEvents { limit } => query::events(self, limit),
        };
        let _ = reply.send(response);
    }

    /// Reads the node, plans, executes; then tells whoever waited for it.
    pub(crate) async fn reconcile(&mut self) {
        self.dirty = false;
        match self.machine.observe().await {
            Ok(observed) => {
                self.observe_fault = None;
                self.observed = observed;
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::error!(%error, "the node's state cannot be read");
                self.observe_fault = Some(error);
                return;
            }
        }
        for endpoint in self.agent.links_seen(&self.observed) {
            tracing::info!(pod = ?endpoint.pod, "a pod's device is gone without a CNI DEL");
            self.tell_gone(endpoint);
        }
        self.act().await;
    }

    /// Looks at the tunnels, for a pair that is about to change. What else there is, is as it was.
    async fn look(&mut self) {
        if self.changed {
            return self.reconcile().await;
        }
        if let Err(error) = self.machine.look(&mut self.observed).await {
            tracing::debug!(error = %format!("{error:#}"), "the tunnels cannot be looked at: looking at everything");
            return self.reconcile().await;
        }
        self.act().await;
    }

    /// Plans and executes what follows from the last observation.
    async fn act(&mut self) {
        let started = self.started;
        let steps = self.agent.plan(&self.observed, self.now());
        // Policy first: a pod is closed until then, and one with a new identity keeps what both allow.
        self.tell_policy().await;
        self.changed = !steps.is_empty();
        if self.changed {
            tracing::debug!(steps = steps.len(), "executing a plan");
            self.machine
                .execute(&mut self.agent, &steps, move || started.elapsed())
                .await;
            if steps.iter().any(Action::changes_identity) {
                let _ = self.enforcer.send(ToEnforcer::Moved);
            }
        }
        let links = self.agent.exchange_links(&self.observed);
        let links = links.filter_map(|(slot, address)| Some((slot, self.machine.ifindex(slot)?, address)));
        self.links.sync(links, &self.inputs);
        // Whoever waits for what was done should not wait for the next look.
        self.look |= self.changed && self.agent.is_opening();
        self.report_paths();
        self.destroy_keys();
        self.save_endpoints();
        self.settle();
        self.health.set_ready(self.not_ready().is_none());
    }

    /// Does what the exchanges of pre-shared keys have to do. What follows from it for devices comes with the next look.
    fn exchange(&mut self) {
        loop {
            let now = self.now();
            let works = self.agent.exchanges().poll(now);
            if works.is_empty() {
                break;
            }
            for done in self.secrets.work(works, &self.keys, &self.links) {
                self.agent.exchanges().done(now, done);
            }
        }
        self.look |= !self.agent.exchanges().take_changed().is_empty();
    }

    /// Tells `keyd` what the devices showed of the paths, where that has changed.
    fn report_paths(&mut self) {
        if self.connected.is_none() {
            return;
        }
        let pairs = self.agent.path_reports(&self.observed, self.now());
        if !pairs.is_empty() {
            tracing::debug!(?pairs, "reporting paths");
            let _ = self.to_keyd.send(ToKeyd::Paths(pairs));
        }
    }

    /// Destroys private keys that are void and on no device any more.
    fn destroy_keys(&mut self) {
        let void = self.agent.void_keys(&self.observed);
        if void.is_empty() {
            return;
        }
        for generation in void {
            if let Err(error) = self.keys.destroy(generation) {
                tracing::error!(generation, error = %format!("{error:#}"), "a void key is still on disk");
            }
            self.key_refusals.remove(&generation);
        }
        self.agent.set_keyring(self.keys.keyring());
        let _ = self.to_keyd.send(ToKeyd::Held);
    }

    /// Tells policy of the endpoints where these changed, and waits until theirs are written.
    async fn tell_policy(&mut self) {
        let endpoints = self.agent.local_endpoints();
        if self.told_endpoints.as_ref() == Some(&endpoints) {
            return;
        }
        let (done, written) = oneshot::channel();
        if self
            .enforcer
            .send(ToEnforcer::Endpoints(endpoints.clone(), done))
            .is_ok()
        {
            self.told_endpoints = Some(endpoints);
            if tokio::time::timeout(POLICY_TIME, written).await.is_err() {
                tracing::warn!("policies take long to be written: going on meanwhile");
            }
        }
    }

    /// Answers what waited for the plan: CNI ADDs, and `keyd` for its acknowledgement.
    fn settle(&mut self) {
        cni::settle(self);
        let version = self.agent.directory_version();
        if version != self.settled
            && self.agent.identities_settled()
            && let Some(position) = version
        {
            let _ = self.enforcer.send(ToEnforcer::Settled(position));
            self.settled = version;
        }
        if self.connected.is_some()
            && self.agent.mapping_settled()
            && version != self.acknowledged
            && let Some((epoch, number)) = version
        {
            let _ = self.to_keyd.send(ToKeyd::Applied(epoch, number));
            self.acknowledged = version;
        }
    }

    /// Why pods cannot be added now; `None` when they can.
    pub(crate) fn not_ready(&self) -> Option<String> {
        if let Some(fault) = &self.observe_fault {
            return Some(fault.clone());
        }
        if self.agent.directory_version().is_none() {
            let why = self
                .keyd_fault
                .clone()
                .unwrap_or_else(|| "keyd has not answered yet".into());
            return Some(format!("this node has no directory yet: {why}"));
        }
        self.agent
            .failing()
            .into_iter()
            .chain(self.machine.faults().iter().cloned())
            .next()
    }

    /// A pod is gone: `keyd` is told now, and again when it was away.
    pub(crate) fn tell_gone(&mut self, endpoint: Endpoint) {
        if endpoint.pod.is_none() {
            return;
        }
        let told = self.connected.is_some().then(Instant::now);
        if told.is_some() {
            let _ = self.to_keyd.send(ToKeyd::Delete(Box::new(endpoint.clone())));
        }
        self.unreported.push((endpoint, told));
    }

    /// A session began: everything that lives here, and what ended while nobody listened.
    fn tell_pods(&mut self) {
        let now = Instant::now();
        for (endpoint, told) in &mut self.unreported {
            let _ = self.to_keyd.send(ToKeyd::Delete(Box::new(endpoint.clone())));
            told.get_or_insert(now);
        }
        let living = self
            .agent
            .endpoints()
            .iter()
            .filter(|(_, endpoint)| !endpoint.deleted);
        for (_, endpoint) in living {
            let Some(pod) = endpoint.pod.clone() else { continue };
            let (reply, answer) = oneshot::channel();
            let _ = self.to_keyd.send(ToKeyd::Add(Box::new(endpoint.clone()), reply));
            let inputs = self.inputs.clone();
            tokio::spawn(async move {
                if let Ok(result) = answer.await {
                    let _ = inputs.send(Input::Reported(pod, result));
                }
            });
        }
    }

    fn reported(&mut self, pod: PodRef, result: Result<IdentityId, Refused>) {
        let found = self
            .agent
            .endpoints()
            .iter()
            .find(|(_, e)| e.pod.as_ref() == Some(&pod) && !e.deleted);
        let index = found.map(|(index, _)| index);
        match (index, result) {
            (Some(index), Ok(identity)) => {
                self.agent.set_identity(index, identity);
                self.pod_refusals.remove(&pod);
                self.dirty = true;
            }
            (Some(_), Err(Refused::No { reason, .. })) => {
                tracing::warn!(%pod, %reason, "keyd refuses a pod that is running");
                self.pod_refusals.insert(pod, reason);
            }
            (Some(_), Err(Refused::Unreachable)) | (None, _) => {}
        }
    }

    pub(crate) fn save_endpoints(&mut self) {
        let living: BTreeSet<&PodRef> = self
            .agent
            .endpoints()
            .iter()
            .filter_map(|(_, e)| e.pod.as_ref())
            .collect();
        self.pod_refusals.retain(|pod, _| living.contains(pod));
        let now = SavedEndpoints {
            endpoints: self.agent.endpoints().clone(),
            unreported: self
                .unreported
                .iter()
                .map(|(endpoint, _)| endpoint.clone())
                .collect(),
            boot_id: self.saved.boot_id.clone(),
        };
        if now != self.saved {
            match self.state.save_endpoints(&now) {
                Ok(()) => self.saved = now,
                Err(error) => tracing::error!(error = %format!("{error:#}"), "the pods cannot be kept"),
            }
        }
    }

    async fn report(&mut self) {
        if self.connected.is_some() {
            self.unreported
                .retain(|(_, told)| told.is_none_or(|at| at.elapsed() < REPORT_AGAIN));
        }
        let status = status::encrypt(self).await;
        let report = status::for_keyd(self, &status);
        self.health.update(&status, &status::agent(self));
        if self.connected.is_some() {
            let _ = self.to_keyd.send(ToKeyd::Status(Box::new(report)));
        }
    }
}
