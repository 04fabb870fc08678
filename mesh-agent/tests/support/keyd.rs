//! A small `keyd`: it signs what the test says, believes every agent, and gives every pod an identity of its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    net::SocketAddr,
    os::fd::AsFd as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use nix::sched::{CloneFlags, setns};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream, wrappers::UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use warren_keyd_api::{
    convert::{
        MEMBERS_BLOCK, Record, address_from_bytes, held_from_proto, report_from_proto, slots_from_offer,
    },
    proof::Challenge,
    proto::{
        self,
        agent_message::Body as Say,
        keyd_message::Body as Hear,
        keyd_server::{Keyd as Service, KeydServer},
    },
    snapshot::{Directory, EntrySet, ManifestSigner, RootChain, chunks},
    tls::{Authority, handshake_acceptor, server_config},
};
use warren_model::{
    IdentityId, Labels, NodeRecord, PodRef, PublicKey, WorkloadRecord,
    keys::PathState,
    policy::{NodeFacts, PolicyRef, Rule, Selector, SelectorId, reserved_labels},
};

/// What the test and the agents' sessions share.
#[derive(Clone)]
pub(crate) struct Keyd(Arc<Mutex<State>>);

struct State {
    signer: ManifestSigner,
    authority: Authority,
    entries: EntrySet,
    version: u64,
    nodes: Vec<NodeRecord>,
    facts: BTreeMap<String, NodeFacts>,
    identities: BTreeMap<IdentityId, Labels>,
    /// Records of pods by UID.
    pods: BTreeMap<String, Vec<WorkloadRecord>>,
    labels: BTreeMap<String, BTreeMap<String, String>>,
    selectors: BTreeMap<Selector, SelectorId>,
    rules: BTreeMap<PolicyRef, Vec<Rule<SelectorId>>>,
    audited: BTreeSet<String>,
    /// Identities are told to the agent that asks, but not published.
    held_back: bool,
    sessions: Vec<(String, mpsc::UnboundedSender<Result<proto::KeydMessage, Status>>)>,
    /// Private keys that agents say they have, by node.
    held: BTreeMap<String, BTreeMap<u64, PublicKey>>,
    /// Generations that are asked for, by node.
    asked: BTreeMap<String, u64>,
    /// Keys that agents have proved, by node and generation.
    proved: BTreeMap<(String, u64), PublicKey>,
    /// Open challenges.
    challenges: BTreeMap<PublicKey, Challenge>,
    /// What agents say of their paths, by node and peer.
    paths: BTreeMap<(String, String), Vec<PathState>>,
    /// Answers to questions.
    answers: Vec<proto::Answer>,
    end: Option<oneshot::Sender<()>>,
}

impl Keyd {
    pub(crate) fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        Self(Arc::new(Mutex::new(State {
            signer: ManifestSigner::generate().unwrap(),
            authority: Authority::generate(now).unwrap(),
            entries: EntrySet::default(),
            version: 0,
            nodes: Vec::new(),
            facts: BTreeMap::new(),
            identities: BTreeMap::new(),
            pods: BTreeMap::new(),
            labels: BTreeMap::new(),
            selectors: BTreeMap::new(),
            rules: BTreeMap::new(),
            audited: BTreeSet::new(),
            held_back: false,
            sessions: Vec::new(),
            held: BTreeMap::new(),
            asked: BTreeMap::new(),
            proved: BTreeMap::new(),
            challenges: BTreeMap::new(),
            paths: BTreeMap::new(),
            answers: Vec::new(),
            end: None,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The CA and the snapshot roots, as their files have them.
    pub(crate) fn trust(&self) -> (String, String) {
        let state = self.state();
        (
            state.authority.certificate_pem(),
            RootChain::first(&state.signer, 0).to_text(),
        )
    }

    /// Serves agents in a network namespace until the mesh is gone.
    pub(crate) fn serve(&self, netns: &str, address: SocketAddr) {
        let (end, ended) = oneshot::channel();
        let (chain, key) = {
            let mut state = self.state();
            state.end = Some(end);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
            state.authority.issue_server(now).unwrap()
        };
        let config = server_config(self.state().authority.certificate(), chain, key, || 0).unwrap();
        let namespace = File::open(format!("/run/netns/{netns}")).unwrap();
        let service = self.clone();
        let (ready, listening) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind(address).await.unwrap();
                ready.send(()).unwrap();
                let (accepted, incoming) = mpsc::channel(8);
                tokio::spawn(async move {
                    let acceptor = handshake_acceptor(config);
                    while let Ok((tcp, _)) = listener.accept().await {
                        if let Ok(stream) = acceptor.accept(tcp).await {
                            let _ = accepted.send(Ok::<_, std::io::Error>(stream)).await;
                        }
                    }
                });
                tonic::transport::Server::builder()
                    .add_service(KeydServer::new(service))
                    .serve_with_incoming_shutdown(ReceiverStream::new(incoming), async {
                        let _ = ended.await;
                    })
                    .await
                    .unwrap();
            });
        });
        listening.recv().unwrap();
    }

    /// Ends all sessions; agents find nobody.
    pub(crate) fn stop(&self) {
        let mut state = self.state();
        state.sessions.clear();
        state.end.take();
    }

    /// The nodes are these.
    pub(crate) fn set_nodes(&self, nodes: Vec<NodeRecord>) {
        let mut state = self.state();
        state.nodes = nodes;
        state.publish();
    }

    /// A snapshot as an agent keeps it.
    pub(crate) fn snapshot_file(&self) -> Vec<u8> {
        let state = self.state();
        let mut directory = Directory::new(state.signer.root());
        for update in state.snapshot() {
            directory.apply(update).unwrap();
        }
        directory.to_file().unwrap()
    }

    /// Rules of an object, or none.
    pub(crate) fn set_rules(&self, policy: &PolicyRef, rules: Vec<Rule>) {
        let mut state = self.state();
        if rules.is_empty() {
            state.rules.remove(policy);
        } else {
            let rules = rules
                .into_iter()
                .map(|rule| rule.map(|s| state.number(s)))
                .collect();
            state.rules.insert(policy.clone(), rules);
        }
        state.publish();
    }

    /// What is known of a node.
    pub(crate) fn set_facts(&self, node: &str, facts: NodeFacts) {
        let mut state = self.state();
        state.facts.insert(node.into(), facts);
        state.publish();
    }

    /// Labels that a pod has besides its name, before it starts or while it runs.
    pub(crate) fn set_labels(&self, pod: &str, labels: &[(&str, &str)]) {
        let mut state = self.state();
        let labels = labels.iter().map(|(k, v)| (format!("k8s:{k}"), (*v).to_owned()));
        state.labels.insert(pod.into(), labels.collect());
        state.relabel(pod);
        state.publish();
    }

    /// Identities that pods elsewhere might have.
    pub(crate) fn add_identities(&self, count: u32, label: (&str, &str)) {
        let mut state = self.state();
        let first = 256 + state.identities.len() as u32;
        for number in first..first + count {
            let labels = [
                (format!("k8s:{}", label.0), label.1.to_owned()),
                ("k8s:number".to_owned(), number.to_string()),
            ];
            state.identities.insert(IdentityId(number), Labels(labels.into()));
        }
        state.publish();
    }

    /// Audit mode for a pod.
    pub(crate) fn set_audit(&self, pod: &str) {
        let mut state = self.state();
        state.audited.insert(pod.into());
        state.publish();
    }

    /// A pod's record, as if it ran already.
    pub(crate) fn add_pod(&self, node: &str, pod: &PodRef, addresses: &[std::net::IpAddr]) -> IdentityId {
        let mut state = self.state();
        let identity = state.add_pod(node, pod, addresses);
        state.publish();
        identity
    }

    /// From now on, identities are told to those who ask, but not published; or published again.
    pub(crate) fn hold_back(&self, held_back: bool) {
        let mut state = self.state();
        state.held_back = held_back;
        state.publish();
    }

    /// Asks all agents.
    pub(crate) fn ask(&self, id: u64, request_json: String) {
        let state = self.state();
        state.say(Hear::Question(proto::Question { id, request_json }));
    }

    /// The answer to a question, when it is there.
    pub(crate) fn answer(&self, id: u64) -> Option<proto::Answer> {
        self.state()
            .answers
            .iter()
            .find(|answer| answer.id == id)
            .cloned()
    }
}

impl State {
    fn say_to(&self, node: &str, body: Hear) {
        for (_, session) in self.sessions.iter().filter(|(name, _)| name == node) {
            let body = Some(body.clone());
            let _ = session.send(Ok(proto::KeydMessage { body }));
        }
    }

    fn number(&mut self, selector: Selector) -> SelectorId {
        let next = SelectorId(self.selectors.len() as u32 + 1);
        *self.selectors.entry(selector).or_insert(next)
    }

    fn add_pod(&mut self, node: &str, pod: &PodRef, addresses: &[std::net::IpAddr]) -> IdentityId {
        let record = |ip: std::net::IpAddr| WorkloadRecord {
            ip,
            node: node.into(),
            identity: IdentityId::UNKNOWN,
            pod: pod.clone(),
            policy_audit: false,
        };
        // The newest pod has the address.
        self.pods
            .values_mut()
            .for_each(|records| records.retain(|record| !addresses.contains(&record.ip)));
        let records = addresses.iter().map(|ip| record(*ip)).collect();
        self.pods.insert(pod.uid.clone(), records);
        self.relabel(&pod.name)
    }

    /// Gives a pod the identity of its labels.
    fn relabel(&mut self, pod: &str) -> IdentityId {
        let mut labels = self.labels.get(pod).cloned().unwrap_or_default();
        for (key, value) in [
            ("k8s:name", pod),
            ("k8s:io.kubernetes.pod.namespace", "demo"),
            ("k8s:io.cilium.k8s.policy.cluster", "default"),
        ] {
            labels.insert(key.into(), value.into());
        }
        let labels = Labels(labels);
        let known = self.identities.iter().find(|(_, known)| **known == labels);
        let identity = known.map_or(IdentityId(256 + self.identities.len() as u32), |(id, _)| *id);
        self.identities.insert(identity, labels);
        let records = self.pods.values_mut().flatten();
        records
            .filter(|record| record.pod.name == pod)
            .for_each(|record| record.identity = identity);
        identity
    }

    fn records(&self) -> Vec<Record> {
        let mut out: Vec<Record> = self.nodes.iter().cloned().map(Record::Node).collect();
        let facts = self.facts.iter();
        out.extend(facts.map(|(node, facts)| Record::NodeFacts(node.as_str().into(), facts.clone())));
        let mut known: Vec<(IdentityId, Labels)> = (1..11)
            .map(|n| (IdentityId(n), reserved_labels(IdentityId(n), false)))
            .collect();
        if !self.held_back {
            known.extend(self.identities.iter().map(|(id, labels)| (*id, labels.clone())));
            out.extend(self.pods.values().flatten().cloned().map(|mut record| {
                record.policy_audit = self.audited.contains(&record.pod.name);
                Record::Workload(record)
            }));
        }
        for (selector, id) in &self.selectors {
            out.push(Record::Selector(*id, selector.clone()));
            let mut blocks: BTreeMap<u32, BTreeSet<IdentityId>> = BTreeMap::new();
            for (identity, _) in known.iter().filter(|(_, labels)| selector.matches(labels)) {
                blocks
                    .entry(identity.0 / MEMBERS_BLOCK)
                    .or_default()
                    .insert(*identity);
            }
            out.extend(
                blocks
                    .into_iter()
                    .map(|(block, members)| Record::Members(*id, block, members)),
            );
        }
        let pods = known
            .into_iter()
            .filter(|(id, _)| *id >= IdentityId::FIRST_ALLOCATED);
        out.extend(pods.map(|(id, labels)| Record::Identity(id, labels)));
        let rules = self.rules.iter();
        out.extend(rules.map(|(policy, rules)| Record::Policy(policy.clone(), rules.clone())));
        out
    }

    /// Signs what changed and sends it to all.
    fn publish(&mut self) {
        let mut now = EntrySet::default();
        for record in self.records() {
            now.upsert(record.to_entry());
        }
        let of = |set: &EntrySet| -> BTreeMap<(i32, String), Vec<u8>> {
            set.iter()
                .map(|entry| ((entry.kind, entry.key), entry.value))
                .collect()
        };
        let (before, after) = (of(&self.entries), of(&now));
        let changed = now
            .iter()
            .filter(|entry| before.get(&(entry.kind, entry.key.clone())) != Some(&entry.value));
        let gone = before.keys().filter(|key| !after.contains_key(*key));
        let gone = gone.map(|(kind, key)| proto::EntryKey {
            kind: *kind,
            key: key.clone(),
        });
        let (changed, gone): (Vec<_>, Vec<_>) = (changed.collect(), gone.collect());
        self.entries = now;
        self.version += 1;
        for update in chunks((1, self.version), false, changed, gone, self.manifest()) {
            self.say(Hear::Update(update));
        }
    }

    fn manifest(&self) -> proto::SignedManifest {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
        let now = i64::try_from(now).unwrap();
        self.signer.seal(proto::Manifest {
            epoch: 1,
            version: self.version,
            entries: self.entries.len() as u64,
            digest: self.entries.digest().to_vec(),
            issued_unix_ms: now,
            expires_unix_ms: now + 86_400_000,
            ..proto::Manifest::default()
        })
    }

    fn snapshot(&self) -> Vec<proto::Update> {
        chunks((1, self.version), true, self.entries.iter(), [], self.manifest())
    }

    fn say(&self, body: Hear) {
        for (_, session) in &self.sessions {
            let _ = session.send(Ok(proto::KeydMessage {
                body: Some(body.clone()),
            }));
        }
    }
}

#[tonic::async_trait]
impl Service for Keyd {
    type SessionStream = UnboundedReceiverStream<Result<proto::KeydMessage, Status>>;

    async fn enroll(
        &self,
        _: Request<proto::EnrollRequest>,
    ) -> Result<Response<proto::EnrollResponse>, Status> {
        Err(Status::unimplemented("agents come with a token here"))
    }

    async fn session(
        &self,
        request: Request<Streaming<proto::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut messages = request.into_inner();
        let (out, stream) = mpsc::unbounded_channel();
        let keyd = self.clone();
        tokio::spawn(async move {
            let mut node = String::new();
            while let Some(Ok(message)) = messages.next().await {
                match message.body {
                    Some(Say::Hello(hello)) => {
                        node = hello.node_name;
                        keyd.welcome(&node, &out);
                    }
                    Some(Say::EndpointAdd(add)) => keyd.endpoint(&node, add, &out),
                    Some(Say::Answer(answer)) => keyd.state().answers.push(answer),
                    Some(Say::KeyOffer(offer)) => keyd.offered(&node, &offer),
                    Some(Say::KeyProof(proof)) => keyd.answered(&node, &proof),
                    Some(Say::Held(held)) => {
                        let held = held_from_proto(&held).unwrap();
                        keyd.state().held.insert(node.clone(), held);
                    }
                    Some(Say::Paths(report)) => {
                        for pair in report_from_proto(&report).unwrap() {
                            let place = (node.clone(), pair.peer.to_string());
                            keyd.state().paths.insert(place, pair.paths);
                        }
                    }
                    _ => {}
                }
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(stream)))
    }
}

impl Keyd {
    fn welcome(&self, node: &str, out: &mpsc::UnboundedSender<Result<proto::KeydMessage, Status>>) {
        let mut state = self.state();
        let mut say = vec![Hear::Welcome(proto::Welcome {
            node_uid: node.replace("node", "uid"),
            cluster_id: state.signer.root().cluster_id(),
            epoch: 1,
            keyd_id: "test".into(),
        })];
        say.extend(state.snapshot().into_iter().map(Hear::Update));
        for body in say {
            let _ = out.send(Ok(proto::KeydMessage { body: Some(body) }));
        }
        state.sessions.retain(|(other, _)| other != node);
        state.sessions.push((node.to_owned(), out.clone()));
        state.paths.retain(|(reporter, _), _| reporter != node);
        let asked = state.asked.get(node).copied();
        if let Some(generation) = asked {
            state.say_to(node, Hear::AskKey(proto::AskKey { generation }));
        }
    }

    /// A key is offered: ask for its proof.
    fn offered(&self, node: &str, offer: &proto::KeyOffer) {
        let mut state = self.state();
        let [slot, _] = slots_from_offer(offer).unwrap();
        let uid = node.replace("node", "uid").as_str().into();
        let challenge = Challenge::new(uid, slot.clone()).unwrap();
        let message = challenge.message();
        state.challenges.insert(slot.public_key, challenge);
        state.say_to(node, Hear::KeyChallenge(message));
    }

    fn answered(&self, node: &str, proof: &proto::KeyProof) {
        let mut state = self.state();
        let key = PublicKey::try_from(proof.public_key.as_slice()).unwrap();
        let slot = state.challenges.remove(&key).unwrap().verify(proof).unwrap();
        state.proved.insert((node.to_owned(), slot.generation), key);
        let result = proto::KeyResult {
            public_key: proof.public_key.clone(),
            accepted: true,
            reason: String::new(),
        };
        state.say_to(node, Hear::KeyResult(result));
    }

    /// Asks a node for a key, until it is proved.
    pub(crate) fn ask_key(&self, node: &str, generation: u64) {
        let mut state = self.state();
        state.asked.insert(node.into(), generation);
        state.say_to(node, Hear::AskKey(proto::AskKey { generation }));
    }

    /// The key of a generation, once it is proved.
    pub(crate) fn proved(&self, node: &str, generation: u64) -> Option<PublicKey> {
        let mut state = self.state();
        let key = state.proved.get(&(node.to_owned(), generation)).copied();
        if key.is_some() {
            state.asked.remove(node);
        }
        key
    }

    /// The private keys that a node says it has.
    pub(crate) fn held(&self, node: &str) -> BTreeMap<u64, PublicKey> {
        self.state().held.get(node).cloned().unwrap_or_default()
    }

    /// What a node says of its paths to a peer.
    pub(crate) fn paths(&self, node: &str, peer: &str) -> Vec<PathState> {
        let state = self.state();
        let paths = state.paths.get(&(node.to_owned(), peer.to_owned()));
        paths.cloned().unwrap_or_default()
    }

    /// What is published of the nodes.
    pub(crate) fn nodes(&self) -> Vec<NodeRecord> {
        self.state().nodes.clone()
    }

    fn endpoint(
        &self,
        node: &str,
        add: proto::EndpointAdd,
        out: &mpsc::UnboundedSender<Result<proto::KeydMessage, Status>>,
    ) {
        let mut state = self.state();
        let pod = PodRef {
            namespace: add.namespace,
            name: add.pod,
            uid: add.uid,
        };
        let addresses: Vec<_> = add
            .addresses
            .iter()
            .map(|bytes| address_from_bytes(bytes).unwrap())
            .collect();
        let identity = state.add_pod(node, &pod, &addresses);
        state.publish();
        let body = Some(Hear::EndpointResult(proto::EndpointResult {
            request_id: add.request_id,
            identity: identity.0,
            ..proto::EndpointResult::default()
        }));
        let _ = out.send(Ok(proto::KeydMessage { body }));
    }
}
