//! The task that owns the index of a term: takes commands, feeds the core, passes its outputs on in order.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use tokio::sync::{mpsc, oneshot};
use warren_keyd_api::proto::{
    AgentStatus, DirectoryChunk, EntryKind, KeydMessage, ListKeysResponse, PairAudit, PolicyStatus, Question,
    RotationStatus, StatusResponse, keyd_message::Body,
};
use warren_keyd_core::{AgentEvent, Core, Event, Output, SessionId, SourceEvent};
use warren_model::{
    Datapath, IdentityId, NodeName, NodeUid,
    policy::{PolicyError, PolicyKind, PolicyRef, Rule},
};

mod audit;
mod keys;
mod report;

pub(crate) use self::keys::Revoked;
use crate::{
    clock, key_writer,
    lag::Lag,
    metrics::Metrics,
    node_status::Statuses,
    notes::{About, Notes},
    policy_status::{PolicyStatuses, Seen},
    publisher::{Order, SessionHandle},
    questions::{AskError, Questions, Reply},
    rotations, signing,
    store::{Kind, Odd},
    trust::Signing,
};

/// How many commands are taken before one version is made of them.
const BATCH: usize = 1024;
/// The core wants to be asked about once a second.
const TICK: Duration = Duration::from_millis(500);
/// Statuses of MeshNodes are compared this often.
const STATUS_EVERY: Duration = Duration::from_secs(5);

/// An authenticated Hello.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) session: SessionId,
    pub(crate) node: NodeName,
    pub(crate) uid: NodeUid,
    pub(crate) datapath: Option<Datapath>,
    pub(crate) resume: (u64, u64),
    pub(crate) agent_version: String,
    /// (namespace, name, UID) of the agent's own pod: its stream ends with it.
    pub(crate) agent_pod: Option<(String, String, String)>,
    pub(crate) handle: SessionHandle,
}

/// Input of the hub.
#[derive(Debug)]
pub(crate) enum Command {
    /// A change in the source.
    Source(SourceEvent),
    /// A policy object appeared or changed, with what it says of itself.
    Policy {
        policy: PolicyRef,
        outcome: Result<Vec<Rule>, PolicyError>,
        seen: Seen,
    },
    /// The source's problems; replaces the former ones.
    SourceProblems(Vec<String>),
    /// Problem with writing an object, or none any more.
    StoreProblem(String, Option<String>),
    /// A new stream.
    Open(Box<Open>),
    /// Anything else that an agent says.
    Agent(AgentEvent),
    /// A key that did not get as far as a proof.
    KeyRefused(NodeName, String),
    /// An agent's report about itself.
    Status(NodeName, SessionId, Box<AgentStatus>),
    /// Under which UID does this node exist?
    NodeUid(NodeName, oneshot::Sender<Option<NodeUid>>),
    /// Everything, for `keyd status`.
    Report(oneshot::Sender<StatusResponse>),
    /// Every policy object.
    Policies(oneshot::Sender<Vec<PolicyStatus>>),
    /// Published entries of some kinds; of all where none is named.
    Directory(Vec<EntryKind>, oneshot::Sender<Vec<DirectoryChunk>>),
    /// A question to the agent of a node.
    Ask(NodeName, String, Reply),
    /// An agent's answer.
    Answer(SessionId, u64, Result<String, String>),
    /// What the store says.
    Core(Event),
    /// Another term has begun, with this epoch: this one is over.
    Fenced(u64),
    /// Keys of some nodes; of all where none is named.
    ListKeys(Vec<NodeName>, oneshot::Sender<ListKeysResponse>),
    /// Some rotations; all where none is named.
    Rotations(Vec<String>, oneshot::Sender<Vec<RotationStatus>>),
    /// Pairs of a node, or all; those that do not agree, or all.
    Audit(Option<NodeName>, bool, oneshot::Sender<Vec<PairAudit>>),
    /// The keys of a node are void from now on, for this reason.
    Revoke(NodeName, String, oneshot::Sender<Result<Revoked, String>>),
    /// Somebody else has written objects of ours.
    Odd(Vec<Odd>),
    /// Somebody wants a new signing key.
    RotateSigningKey(signing::Request),
    /// This key signs from now on.
    Signing(Arc<Signing>, oneshot::Sender<signing::Announced>),
}

/// What is known of an agent beyond the directory.
#[derive(Debug, Default)]
struct Agent {
    session: Option<SessionId>,
    version: String,
    last_seen_unix_ms: u64,
    applied: (u64, u64),
    status: Option<AgentStatus>,
    pod: Option<(String, String, String)>,
}

/// The hub's own state.
pub(crate) struct Hub {
    core: Core,
    orders: mpsc::UnboundedSender<Order>,
    metrics: Metrics,
    agents: BTreeMap<NodeName, Agent>,
    source_problems: Vec<String>,
    store_problems: BTreeMap<String, String>,
    /// Of the term: objects that were not believed.
    load_problems: Vec<String>,
    epoch: u64,
    /// Answered once the source is complete: "does not exist" would be a lie before.
    uid_questions: Vec<(NodeName, oneshot::Sender<Option<NodeUid>>)>,
    questions: Questions,
    /// Only where objects have a status.
    statuses: Option<(Statuses, tokio::time::Instant)>,
    policy_statuses: Option<PolicyStatuses>,
    lag: Arc<Lag>,
    shell: Shell,
    rotation_statuses: rotations::Statuses,
    /// Revocations of this round, with who asked for them.
    revoking: Vec<Revoking>,
    /// Who waits for the version that a new key signs.
    announcing: Vec<oneshot::Sender<signing::Announced>>,
}

/// A node whose keys are revoked, and who is to hear of it.
type Revoking = (NodeName, NodeUid, oneshot::Sender<Result<Revoked, String>>);

/// Where the hub's words go, besides the publisher.
#[derive(Debug)]
pub(crate) struct Shell {
    /// Conditions to write.
    pub(crate) conditions: mpsc::UnboundedSender<(PolicyRef, Condition)>,
    /// Keys to write.
    pub(crate) keys: mpsc::UnboundedSender<key_writer::Write>,
    /// Statuses of rotations to write.
    pub(crate) rotations: mpsc::UnboundedSender<rotations::Wanted>,
    /// Who wants a new signing key.
    pub(crate) signing: mpsc::UnboundedSender<signing::Request>,
    /// Events on Nodes.
    pub(crate) notes: Notes,
}

impl Hub {
    pub(crate) fn new(
        core: Core,
        orders: mpsc::UnboundedSender<Order>,
        metrics: Metrics,
        loaded: (Vec<String>, rotations::Statuses),
        shell: Shell,
        lag: Arc<Lag>,
        (epoch, with_statuses): (u64, bool),
    ) -> Self {
        Self {
            epoch,
            lag,
            uid_questions: vec![],
            questions: Questions::default(),
            shell,
            rotation_statuses: loaded.1,
            revoking: vec![],
            announcing: vec![],
            policy_statuses: with_statuses.then(PolicyStatuses::default),
            statuses: with_statuses.then(|| (Statuses::default(), tokio::time::Instant::now())),
            core,
            orders,
            metrics,
            agents: BTreeMap::new(),
            source_problems: vec![],
            store_problems: BTreeMap::new(),
            load_problems: loaded.0,
        }
    }

    /// Runs until the input ends or the publisher is gone.
    pub(crate) async fn run(mut self, mut input: mpsc::Receiver<Command>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            let mut ticked = false;
            tokio::select! {
                _ = tick.tick() => ticked = true,
                taken = input.recv_many(&mut batch, BATCH) => {
                    if taken == 0 {
                        return;
                    }
                }
            }
            for command in batch.drain(..) {
                if let Command::Fenced(epoch) = command {
                    tracing::warn!(ours = self.epoch, epoch, "another keyd leads: this term is over");
                    return;
                }
                if let Command::Odd(found) = &command
                    && found.iter().any(|odd| odd.kind == Kind::State)
                {
                    self.odd(found);
                    tracing::warn!(
                        "MeshState is not as this keyd has written it: this term is over, another begins"
                    );
                    return;
                }
                self.take(command);
            }
            self.answer_uid_questions();
            self.core.set_unix_time(clock::unix_ms() / 1000);
            for output in self.core.poll(clock::monotonic_ms()) {
                let Some(output) = self.take_keys(output) else {
                    continue;
                };
                match &output {
                    Output::Close { session, .. } => self.disconnected(*session),
                    Output::Validity { policy, validity } => {
                        if let Some(statuses) = &mut self.policy_statuses {
                            statuses.judged(policy.clone(), validity.clone());
                        }
                        continue;
                    }
                    Output::Publish { .. } => self.lag.made(),
                    _ => {}
                }
                if self.orders.send(Order::Do(output)).is_err() {
                    return;
                }
            }
            self.answer_revoked();
            self.answer_announced();
            self.write_conditions();
            self.write_rotations();
            if let Some(pause) = self.lag.pause() {
                tokio::time::sleep(pause).await;
            }
            if ticked {
                self.rotation_statuses.look_again(&self.core);
                self.measure();
                self.write_statuses();
            }
        }
    }

    fn take(&mut self, command: Command) {
        let now = clock::monotonic_ms();
        match command {
            Command::Source(event) => {
                self.end_streams_of_gone_pods(&event);
                if let SourceEvent::NodeDelete(name) = &event {
                    self.agents.remove(name);
                }
                self.core.handle(now, Event::Source(event));
            }
            Command::Policy {
                policy,
                outcome,
                seen,
            } => {
                if let Some(statuses) = &mut self.policy_statuses
                    && policy.kind != PolicyKind::NetworkPolicy
                {
                    statuses.seen(&policy, seen);
                }
                let event = SourceEvent::PolicyUpsert { policy, outcome };
                self.core.handle(now, Event::Source(event));
            }
            Command::SourceProblems(problems) => self.source_problems = problems,
            Command::StoreProblem(name, Some(problem)) => drop(self.store_problems.insert(name, problem)),
            Command::StoreProblem(name, None) => drop(self.store_problems.remove(&name)),
            Command::Open(open) => self.open(*open, now),
            Command::Agent(event) => {
                self.observe(&event);
                self.core.handle(now, Event::Agent(event));
            }
            Command::KeyRefused(node, reason) => self.core.key_refused(now, &node, &reason),
            Command::Status(node, session, status) => {
                if let Some(agent) = self
                    .agents
                    .get_mut(&node)
                    .filter(|agent| agent.session == Some(session))
                {
                    agent.last_seen_unix_ms = clock::unix_ms();
                    let before = agent.status.replace(*status);
                    self.pass_on_alarms(&node, before.as_ref());
                }
            }
            Command::NodeUid(name, reply) => self.uid_questions.push((name, reply)),
            Command::Report(reply) => drop(reply.send(self.report())),
            Command::Policies(reply) => drop(reply.send(self.policies())),
            // A publisher that is gone drops the reply, and the asker hears of it.
            Command::Directory(kinds, reply) => {
                let _ = self.orders.send(Order::Directory(kinds, reply));
            }
            Command::Ask(node, request, reply) => self.ask(&node, request, reply),
            Command::Answer(session, id, answer) => self.questions.answer(session, id, answer),
            Command::Core(event) => self.core.handle(now, event),
            // The loop has ended by then.
            Command::Fenced(_) => {}
            Command::ListKeys(names, reply) => drop(reply.send(self.list_keys(&names))),
            Command::Rotations(names, reply) => drop(reply.send(self.rotations(&names))),
            Command::Audit(node, bad, reply) => drop(reply.send(self.audit(node.as_ref(), bad))),
            Command::Revoke(node, reason, reply) => self.revoke(&node, &reason, reply),
            Command::Odd(found) => self.odd(&found),
            // A keeper that is gone ends with the term, and drops the reply.
            Command::RotateSigningKey(request) => drop(self.shell.signing.send(request)),
            Command::Signing(signing, reply) => {
                // A publisher that is gone ends this task at its next output.
                let _ = self.orders.send(Order::Signing(signing));
                self.core.refresh();
                self.announcing.push(reply);
            }
        }
    }

    fn answer_uid_questions(&mut self) {
        if self.core.is_synced() {
            for (name, reply) in self.uid_questions.drain(..) {
                // The asker may be gone; that is its business.
                let _ = reply.send(self.core.node_uid(&name).cloned());
            }
        }
    }

    /// Objects of ours are not as we wrote them.
    fn odd(&mut self, found: &[Odd]) {
        for odd in found {
            let about = match odd.kind {
                Kind::Node => self.about(&odd.name.as_str().into()),
                Kind::Identity | Kind::State => About::Mesh,
            };
            self.shell.notes.alarm(about, "ObjectTampered", odd.to_string());
            match odd.kind {
                Kind::Node => self.core.rewrite_node(&odd.name.as_str().into()),
                Kind::Identity => match odd.name.parse() {
                    Ok(number) => self.core.rewrite_identity(IdentityId(number)),
                    Err(_) => tracing::warn!("MeshIdentity {} is none of ours: delete it", odd.name),
                },
                // The term is over.
                Kind::State => {}
            }
        }
    }

    fn answer_announced(&mut self) {
        for reply in self.announcing.drain(..) {
            // The asker may be gone; that is its business.
            let _ = reply.send(signing::Announced {
                version: self.core.version(),
                nodes: self.core.stored_nodes(),
            });
        }
    }

    fn ask(&mut self, node: &NodeName, request_json: String, reply: Reply) {
        let session = match self.agents.get(node).and_then(|agent| agent.session) {
            Some(session) => session,
            None => {
                let exists = self.core.node_uid(node).is_some();
                let error = match exists {
                    true => AskError::NotConnected(node.to_string()),
                    false => AskError::UnknownNode(node.to_string()),
                };
                // The asker may be gone; that is its business.
                return drop(reply.send(Err(error)));
            }
        };
        if let Some(id) = self.questions.ask(session, reply) {
            let body = Some(Body::Question(Question { id, request_json }));
            // A publisher that is gone ends this task at its next output.
            let _ = self.orders.send(Order::Tell(session, KeydMessage { body }));
        }
    }

    fn session_of(&self, node: &NodeName) -> Option<SessionId> {
        self.agents.get(node).and_then(|agent| agent.session)
    }

    /// The agent's status, unless it has applied a newer directory since.
    fn status_of_applied(&self, node: &NodeName) -> Option<&AgentStatus> {
        let agent = self.agents.get(node)?;
        let status = agent.status.as_ref()?;
        ((status.epoch, status.version) >= agent.applied).then_some(status)
    }

    fn open(&mut self, open: Open, now: u64) {
        let Open {
            session,
            node,
            uid,
            datapath,
            resume,
            agent_version,
            agent_pod,
            handle,
        } = open;
        let exists = self.core.node_uid(&node) == Some(&uid);
        if self.orders.send(Order::Register(session, handle)).is_err() {
            return;
        }
        if exists {
            let agent = self.agents.entry(node.clone()).or_default();
            *agent = Agent {
                session: Some(session),
                version: agent_version,
                last_seen_unix_ms: clock::unix_ms(),
                applied: (0, 0),
                status: agent.status.take(),
                pod: agent_pod,
            };
        }
        let event = AgentEvent::Connected {
            session,
            node,
            uid,
            datapath,
            resume,
        };
        self.core.handle(now, Event::Agent(event));
    }

    /// Keeps the time and position of what an agent says.
    fn observe(&mut self, event: &AgentEvent) {
        let session = match event {
            AgentEvent::Connected { session, .. }
            | AgentEvent::KeyProved { session, .. }
            | AgentEvent::Held { session, .. }
            | AgentEvent::Paths { session, .. }
            | AgentEvent::EndpointAdd { session, .. }
            | AgentEvent::EndpointDelete { session, .. }
            | AgentEvent::Applied { session, .. } => *session,
            AgentEvent::Disconnected(session) => {
                // A publisher that is gone has forgotten everybody.
                let _ = self.orders.send(Order::Forget(*session));
                return self.disconnected(*session);
            }
        };
        if let Some(agent) = self
            .agents
            .values_mut()
            .find(|agent| agent.session == Some(session))
        {
            agent.last_seen_unix_ms = clock::unix_ms();
            if let AgentEvent::Applied { epoch, version, .. } = event {
                agent.applied = (*epoch, *version);
            }
        }
    }

    fn disconnected(&mut self, session: SessionId) {
        self.questions.left(session);
        if let Some(agent) = self
            .agents
            .values_mut()
            .find(|agent| agent.session == Some(session))
        {
            agent.session = None;
        }
    }

    /// A token is as good as the pod it was made for.
    fn end_streams_of_gone_pods(&mut self, event: &SourceEvent) {
        let (namespace, name, uid) = match event {
            SourceEvent::PodDelete { namespace, name } => (namespace, name, None),
            SourceEvent::PodUpsert(pod) => (&pod.namespace, &pod.name, pod.uid.as_ref()),
            _ => return,
        };
        for agent in self.agents.values_mut() {
            let Some((pod_namespace, pod_name, pod_uid)) = &agent.pod else {
                continue;
            };
            if pod_namespace == namespace
                && pod_name == name
                && uid != Some(pod_uid)
                && let Some(session) = agent.session.take()
            {
                let reason = format!("the agent's pod {namespace}/{name} is gone");
                let close = Output::Close {
                    session,
                    reason,
                    retry: true,
                };
                // A publisher that is gone closes everything itself.
                let _ = self.orders.send(Order::Do(close));
                self.core.handle(
                    clock::monotonic_ms(),
                    Event::Agent(AgentEvent::Disconnected(session)),
                );
            }
        }
    }
}
