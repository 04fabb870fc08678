//! One stream of one agent: authentication, key challenges, and the two directions.

use std::{collections::HashMap, future, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep_until, timeout},
};
use tonic::{Code, Status, Streaming};
use warren_keyd_api::{
    PROTOCOL,
    convert::{
        ConvertError, address_from_bytes, datapath_from_proto, held_from_proto, report_from_proto,
        slots_from_offer,
    },
    proof::Challenge,
    proto::{
        AgentMessage, Answer, EndpointAdd, EndpointDelete, EndpointResult, Goodbye, Hello, KeyOffer,
        KeyProof, KeyResult, KeydMessage, Redirect, agent_message, keyd_message::Body,
    },
    tls::CertifiedNode,
};
use warren_keyd_core::{AgentEvent, SessionId};
use warren_model::{NodeName, PodRef, SlotKey};

use crate::{
    auth::{Caller, Unauthenticated},
    hub::{Command, Open},
    notes::About,
    publisher::{Item, QUEUE, SessionHandle},
    service::Service,
};

/// Hello must come within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A message that an agent does not take within this time ends its stream.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// A larger response to a question is refused.
const MAX_RESPONSE_BYTES: usize = 1024 * 1024;
/// Challenges that may be open at a time: one per slot.
const OPEN_CHALLENGES: usize = warren_model::node::SLOTS as usize;

type Out = mpsc::Sender<Result<KeydMessage, Status>>;

/// Why a stream ends from our side.
enum End {
    /// The agent left.
    Gone,
    /// The publisher has ended the stream; what it queued last (Goodbye) still goes out.
    Closed,
    /// What the agent sent is not gRPC of ours, or its connection broke.
    Broken(Box<Caller>, Status),
    /// A sentence for the agent.
    Refused(Status),
    /// The leader is elsewhere.
    Redirect(Vec<String>),
    /// A sentence for an agent that was let in.
    Goodbye(Box<Caller>, Goodbye),
}

impl From<Unauthenticated> for End {
    fn from(error: Unauthenticated) -> Self {
        Self::Refused(match error.retry {
            true => Status::unavailable(error.message),
            false => Status::unauthenticated(error.message),
        })
    }
}

pub(crate) struct Session {
    service: Service,
    certificate: Option<CertifiedNode>,
    out: Out,
}

impl Session {
    pub(crate) fn new(service: Service, certificate: Option<CertifiedNode>, out: Out) -> Self {
        Self {
            service,
            certificate,
            out,
        }
    }

    /// Runs the stream to its end.
    pub(crate) async fn run(self, inbound: Streaming<AgentMessage>) {
        let last = match self.serve(inbound).await {
            End::Gone | End::Closed => return,
            End::Broken(node, status) => {
                // A connection that breaks is none of these.
                if matches!(
                    status.code(),
                    Code::OutOfRange | Code::ResourceExhausted | Code::InvalidArgument | Code::Internal
                ) {
                    let message = format!(
                        "node {} sends what is no message: {}",
                        node.node,
                        status.message()
                    );
                    self.service.notes.alarm(node.about(), "MessageRefused", message);
                }
                Err(status)
            }
            End::Refused(status) => {
                self.service.metrics.refused_authentications.inc();
                match status.code() {
                    // Not the agent's fault.
                    Code::Unavailable => tracing::warn!("agent refused: {}", status.message()),
                    _ => {
                        let (about, reason) = (About::Mesh, "AuthenticationRefused");
                        self.service.notes.alarm(about, reason, status.message());
                    }
                }
                Err(status)
            }
            End::Redirect(addresses) => Ok(message(Body::Redirect(Redirect { addresses }))),
            End::Goodbye(caller, goodbye) => {
                match goodbye.retry {
                    true => tracing::info!(reason = %goodbye.reason, "stream closed"),
                    false => {
                        let message =
                            format!("the stream of node {} is closed: {}", caller.node, goodbye.reason);
                        self.service
                            .notes
                            .alarm(caller.about(), "MessageRefused", message);
                    }
                }
                Ok(message(Body::Goodbye(goodbye)))
            }
        };
        // Whoever does not take even this is gone.
        let _ = timeout(SEND_TIMEOUT, self.out.send(last)).await;
    }

    async fn serve(&self, mut inbound: Streaming<AgentMessage>) -> End {
        let mut hello = match timeout(HELLO_TIMEOUT, inbound.message()).await {
            Ok(Ok(Some(AgentMessage {
                body: Some(agent_message::Body::Hello(hello)),
            }))) => hello,
            Ok(Ok(Some(_))) => {
                return End::Refused(Status::invalid_argument("the first message must be Hello"));
            }
            Ok(Ok(None)) => return End::Gone,
            Ok(Err(status)) => return End::Refused(status),
            Err(_) => return End::Refused(Status::deadline_exceeded("no Hello within 10 seconds")),
        };
        if hello.protocol != PROTOCOL {
            let text = format!(
                "protocol {} is not known: this keyd speaks {PROTOCOL}",
                hello.protocol
            );
            return End::Refused(Status::failed_precondition(text));
        }
        let hub = match self.service.hub() {
            Ok(hub) => hub,
            Err(leader) if leader.is_empty() => {
                return End::Refused(Status::unavailable("no keyd leads at the moment: try again"));
            }
            Err(leader) => return End::Redirect(leader),
        };
        let node = NodeName::from(hello.node_name.as_str());
        let authenticated = self
            .service
            .authenticator
            .authenticate(self.certificate.as_ref(), &hello.token, &node)
            .await;
        let caller = match authenticated {
            Ok(caller) => caller,
            Err(error) => return error.into(),
        };
        let datapath = match datapath_from_proto(hello.datapath) {
            Ok(datapath) => datapath,
            Err(error) => return End::Refused(Status::invalid_argument(error.to_string())),
        };
        let (queue, queued) = mpsc::channel(QUEUE);
        let (alive, closed) = oneshot::channel();
        let session = self.service.new_session();
        let root = std::mem::take(&mut hello.snapshot_root);
        let open = open_command(
            session,
            &caller,
            hello,
            datapath,
            SessionHandle {
                uid: caller.uid.clone(),
                root,
                queue: queue.clone(),
                _alive: alive,
            },
        );
        if hub.send(open).await.is_err() {
            return End::Refused(Status::unavailable("keyd is changing its leader: try again"));
        }
        // The reader keeps only a weak sender: when the publisher drops its end, the writer drains and ends.
        let weak = queue.downgrade();
        drop(queue);
        let writer = tokio::spawn(write(queued, self.out.clone()));
        let mut reader = Reader {
            service: &self.service,
            certificate: self.certificate.as_ref(),
            session,
            caller,
            hub,
            queue: weak,
            challenges: HashMap::new(),
        };
        let end = reader.read(inbound, closed).await;
        // A hub that is gone has forgotten the session already.
        let _ = reader
            .hub
            .send(Command::Agent(AgentEvent::Disconnected(session)))
            .await;
        if matches!(end, End::Closed) {
            // The writer has its own time limit.
            let _ = writer.await;
        } else {
            writer.abort();
        }
        end
    }
}

fn open_command(
    session: SessionId,
    caller: &Caller,
    hello: Hello,
    datapath: Option<warren_model::Datapath>,
    handle: SessionHandle,
) -> Command {
    Command::Open(Box::new(Open {
        session,
        node: caller.node.clone(),
        uid: caller.uid.clone(),
        datapath,
        resume: (hello.resume_epoch, hello.resume_version),
        agent_version: hello.agent_version.chars().take(64).collect(),
        agent_pod: caller.pod.clone(),
        handle,
    }))
}

/// Moves queued items into the stream until the queue's other end is gone or the agent does not take them.
async fn write(mut queued: mpsc::Receiver<Item>, out: Out) {
    while let Some(item) = queued.recv().await {
        let messages: Vec<KeydMessage> = match item {
            Item::Message(message) => vec![message],
            Item::Updates(updates) => updates
                .iter()
                .cloned()
                .map(|update| message(Body::Update(update)))
                .collect(),
        };
        for message in messages {
            if !matches!(timeout(SEND_TIMEOUT, out.send(Ok(message))).await, Ok(Ok(()))) {
                return;
            }
        }
    }
}

fn message(body: Body) -> KeydMessage {
    KeydMessage { body: Some(body) }
}

/// The inbound half.
struct Reader<'a> {
    service: &'a Service,
    certificate: Option<&'a CertifiedNode>,
    session: SessionId,
    caller: Caller,
    hub: mpsc::Sender<Command>,
    queue: mpsc::WeakSender<Item>,
    challenges: HashMap<Vec<u8>, (Challenge, [SlotKey; 2])>,
}

impl Reader<'_> {
    async fn read(&mut self, mut inbound: Streaming<AgentMessage>, mut closed: oneshot::Receiver<()>) -> End {
        loop {
            let until = self.caller.until;
            let expired = async move {
                match until {
                    Some(until) => sleep_until(until).await,
                    None => future::pending().await,
                }
            };
            let received = tokio::select! {
                _ = &mut closed => return End::Closed,
                () = expired => {
                    return self.goodbye(Goodbye { reason: "the agent's token has expired".into(), retry: true });
                }
                received = inbound.message() => received,
            };
            let body = match received {
                Ok(Some(AgentMessage { body: Some(body) })) => body,
                Ok(Some(AgentMessage { body: None })) => {
                    return self.goodbye(Goodbye {
                        reason: "a message without content".into(),
                        retry: false,
                    });
                }
                Ok(None) => return End::Gone,
                Err(status) => {
                    tracing::debug!(node = %self.caller.node, "stream broke: {}", status.message());
                    return End::Broken(self.caller.clone().into(), status);
                }
            };
            if let Some(end) = self.take(body).await {
                return end;
            }
        }
    }

    fn goodbye(&self, goodbye: Goodbye) -> End {
        End::Goodbye(self.caller.clone().into(), goodbye)
    }

    /// Handles one message; `Some` ends the stream.
    async fn take(&mut self, body: agent_message::Body) -> Option<End> {
        use agent_message::Body as Said;
        let session = self.session;
        match body {
            Said::Hello(_) => Some(self.goodbye(Goodbye {
                reason: "a second Hello on one stream".into(),
                retry: false,
            })),
            Said::Token(refresh) => self.refresh(&refresh.token).await,
            Said::KeyOffer(offer) => self.offer(&offer).await,
            Said::KeyProof(proof) => self.proof(&proof).await,
            Said::EndpointAdd(add) => self.endpoint_add(add).await,
            Said::EndpointDelete(delete) => self.endpoint_delete(delete).await,
            Said::Applied(applied) => {
                let (epoch, version) = (applied.epoch, applied.version);
                self.tell(Command::Agent(AgentEvent::Applied {
                    session,
                    epoch,
                    version,
                }))
                .await
            }
            Said::Status(status) => {
                self.tell(Command::Status(
                    self.caller.node.clone(),
                    session,
                    Box::new(status),
                ))
                .await
            }
            Said::Held(held) => {
                self.say(held_from_proto(&held).map(|keys| AgentEvent::Held { session, keys }))
                    .await
            }
            Said::Paths(report) => {
                self.say(report_from_proto(&report).map(|pairs| AgentEvent::Paths { session, pairs }))
                    .await
            }
            Said::Answer(answer) => {
                self.tell(Command::Answer(session, answer.id, response(answer)))
                    .await
            }
        }
    }

    async fn say(&self, event: Result<AgentEvent, ConvertError>) -> Option<End> {
        match event {
            Ok(event) => self.tell(Command::Agent(event)).await,
            Err(error) => Some(self.goodbye(Goodbye {
                reason: error.to_string(),
                retry: false,
            })),
        }
    }

    async fn tell(&self, command: Command) -> Option<End> {
        self.hub.send(command).await.err().map(|_| End::Gone)
    }

    /// Queues an answer of ours; an agent that does not read loses its stream, not our memory.
    fn answer(&self, body: Body) -> Option<End> {
        let queue = self.queue.upgrade()?;
        let full = queue.try_send(Item::Message(message(body))).is_err();
        full.then(|| {
            self.goodbye(Goodbye {
                reason: "the agent does not read its stream".into(),
                retry: true,
            })
        })
    }

    async fn refresh(&mut self, token: &str) -> Option<End> {
        let node = self.caller.node.clone();
        match self
            .service
            .authenticator
            .authenticate(self.certificate, token, &node)
            .await
        {
            Ok(caller) if caller.uid == self.caller.uid => {
                self.caller.until = caller.until;
                None
            }
            Ok(_) => Some(self.goodbye(Goodbye {
                reason: "the token is another node's".into(),
                retry: false,
            })),
            // The old proof still holds until it expires.
            Err(error) if error.retry => None,
            Err(error) => Some(self.goodbye(Goodbye {
                reason: error.message,
                retry: false,
            })),
        }
    }

    async fn offer(&mut self, offer: &KeyOffer) -> Option<End> {
        let slots = match slots_from_offer(offer) {
            Ok(slots) => slots,
            Err(error) => return self.refuse_key(offer.public_key.clone(), error.to_string()).await,
        };
        let [slot, _] = slots.clone();
        let key = slot.public_key.as_bytes().to_vec();
        if self.challenges.len() >= OPEN_CHALLENGES && !self.challenges.contains_key(&key) {
            return self
                .refuse_key(key, "too many keys are offered at a time".into())
                .await;
        }
        match Challenge::new(self.caller.uid.clone(), slot) {
            Ok(challenge) => {
                let question = challenge.message();
                self.challenges.insert(key, (challenge, slots));
                self.answer(Body::KeyChallenge(question))
            }
            Err(error) => self.refuse_key(key, error.to_string()).await,
        }
    }

    async fn proof(&mut self, proof: &KeyProof) -> Option<End> {
        // Used up by one answer, right or wrong.
        let verified = match self.challenges.remove(&proof.public_key) {
            // What was proved is the first slot; the second one is the same key.
            Some((challenge, slots)) => challenge.verify(proof).map(|_| slots),
            None => Err(warren_keyd_api::proof::ProofError::Replay),
        };
        match verified {
            Ok(slots) => {
                let session = self.session;
                self.tell(Command::Agent(AgentEvent::KeyProved { session, slots }))
                    .await
            }
            Err(error) => self.refuse_key(proof.public_key.clone(), error.to_string()).await,
        }
    }

    async fn refuse_key(&self, mut public_key: Vec<u8>, reason: String) -> Option<End> {
        public_key.truncate(32);
        let end = self
            .tell(Command::KeyRefused(self.caller.node.clone(), reason.clone()))
            .await;
        end.or_else(|| {
            self.answer(Body::KeyResult(KeyResult {
                public_key,
                accepted: false,
                reason,
            }))
        })
    }

    async fn endpoint_add(&self, add: EndpointAdd) -> Option<End> {
        let (session, request_id) = (self.session, add.request_id);
        let pod = pod_ref(add.namespace, add.pod, add.uid);
        let addresses = addresses(&add.addresses);
        match pod.and_then(|pod| Ok((pod, addresses?))) {
            Ok((pod, addresses)) => {
                self.tell(Command::Agent(AgentEvent::EndpointAdd {
                    session,
                    request_id,
                    pod,
                    addresses,
                }))
                .await
            }
            Err(error) => {
                let node = &self.caller.node;
                let message = format!("node {node} reports an endpoint that is none: {error}");
                self.service
                    .notes
                    .alarm(self.caller.about(), "MessageRefused", message);
                let result = EndpointResult {
                    request_id,
                    identity: 0,
                    error,
                    retry: false,
                };
                self.answer(Body::EndpointResult(result))
            }
        }
    }

    async fn endpoint_delete(&self, delete: EndpointDelete) -> Option<End> {
        let session = self.session;
        let pod = pod_ref(delete.namespace, delete.pod, delete.uid);
        let addresses = addresses(&delete.addresses);
        match pod.and_then(|pod| Ok((pod, addresses?))) {
            Ok((pod, addresses)) => {
                self.tell(Command::Agent(AgentEvent::EndpointDelete {
                    session,
                    pod,
                    addresses,
                }))
                .await
            }
            Err(reason) => Some(self.goodbye(Goodbye { reason, retry: false })),
        }
    }
}

/// What an agent answers a question: its response, or a sentence why there is none.
fn response(answer: Answer) -> Result<String, String> {
    if !answer.error.is_empty() {
        return Err(answer.error);
    }
    if answer.response_json.len() > MAX_RESPONSE_BYTES {
        return Err(format!("its response is larger than {MAX_RESPONSE_BYTES} bytes"));
    }
    Ok(answer.response_json)
}

fn addresses(list: &[Vec<u8>]) -> Result<Vec<std::net::IpAddr>, String> {
    list.iter()
        .map(|bytes| address_from_bytes(bytes).map_err(|error| error.to_string()))
        .collect()
}

fn pod_ref(namespace: String, name: String, uid: String) -> Result<PodRef, String> {
    crate::source::parse::valid_name(&namespace)?;
    crate::source::parse::valid_name(&name)?;
    if uid.is_empty() || uid.len() > 128 || !uid.chars().all(|c| c.is_ascii_graphic()) {
        return Err("the pod's UID is empty, longer than 128 characters or not printable".into());
    }
    Ok(PodRef { namespace, name, uid })
}
