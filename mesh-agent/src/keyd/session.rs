//! One session with `keyd`.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use warren_agent_core::Endpoint;
use warren_keyd_api::{
    MAX_MESSAGE_BYTES, PROTOCOL, convert, proof,
    proto::{self, agent_message::Body as Say, keyd_client::KeydClient, keyd_message::Body as Hear},
    snapshot::{Directory, SnapshotError},
    tls,
};
use warren_model::{IdentityId, NodeUid, PublicKey};
use zeroize::Zeroizing;

use super::{Client, End, FromKeyd, Refused, ToKeyd, trust::Material};
use crate::{files::StateDir, policy::ToEnforcer};

/// How long `keyd` may take to welcome us.
const WELCOME_TIME: Duration = Duration::from_secs(10);
/// How often the projected token's file is looked at.
const TOKEN_CHECK: Duration = Duration::from_secs(10);
/// How long after a change the snapshot is written at the latest.
const SAVE_DELAY: Duration = Duration::from_millis(200);
/// Pairs in one report, far below the limit of a message.
const PAIRS_AT_ONCE: usize = 1000;
/// Messages that may wait for the network.
const QUEUE: usize = 1024;

type Reply = oneshot::Sender<Result<IdentityId, Refused>>;

/// What lives as long as a session.
struct Session {
    say: mpsc::Sender<proto::AgentMessage>,
    node_uid: Option<NodeUid>,
    waiting: HashMap<u64, Reply>,
    next_request: u64,
    token: Option<Zeroizing<String>>,
    /// The copy on disk is older than the one in memory.
    unsaved: bool,
}

impl Session {
    fn say(&self, body: Say) -> Result<(), String> {
        let message = proto::AgentMessage { body: Some(body) };
        self.say
            .try_send(message)
            .map_err(|_| "keyd does not read what this node sends".to_owned())
    }
}

impl Client {
    /// Runs one session to its end. The first value tells whether `keyd` welcomed this node.
    pub(super) async fn session(&mut self, address: &str, material: &mut Material) -> (bool, End) {
        let mut welcomed = false;
        let end = match self.converse(address, material, &mut welcomed).await {
            Ok(end) => end,
            Err(reason) => End::Closed(reason),
        };
        (welcomed, end)
    }

    async fn converse(
        &mut self,
        address: &str,
        material: &mut Material,
        welcomed: &mut bool,
    ) -> Result<End, String> {
        let channel = self.connect(address, material).await?;
        let Some(channel) = channel else {
            return Ok(End::Shutdown);
        };
        let directory = match self.directory.take() {
            Some(directory) => directory,
            None => self
                .state
                .load_snapshot(&material.roots)
                .unwrap_or_else(|| Directory::new(material.roots.newest().key)),
        };
        let directory = self.directory.insert(directory);
        directory.set_root(material.roots.newest().key);
        let position = if self.resync { (0, 0) } else { directory.position() };
        self.say_root(material);
        let (resume_epoch, resume_version) = position;
        let (say, queue) = mpsc::channel(QUEUE);
        let token = self
            .config
            .options
            .token_file
            .as_deref()
            .map(read_token)
            .transpose()?;
        let mut session = Session {
            say,
            node_uid: None,
            waiting: HashMap::new(),
            next_request: 1,
            token,
            unsaved: false,
        };
        session.say(Say::Hello(proto::Hello {
            protocol: PROTOCOL,
            node_name: self.config.node.to_string(),
            token: session
                .token
                .as_ref()
                .map(|token| token.to_string())
                .unwrap_or_default(),
            agent_version: env!("CARGO_PKG_VERSION").into(),
            datapath: convert::datapath_to_proto(Some(self.datapath)).into(),
            resume_epoch,
            resume_version,
            snapshot_root: material.roots.newest().key.as_bytes().to_vec(),
        }))?;
        let mut client = KeydClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let opened = tokio::time::timeout(WELCOME_TIME, client.session(ReceiverStream::new(queue))).await;
        let mut hear = opened
            .map_err(|_| format!("keyd at {address} does not answer"))?
            .map_err(|status| format!("keyd at {address}: {}", status.message()))?
            .into_inner();
        let end = self
            .talk(address, material, &mut session, &mut hear, welcomed)
            .await;
        if session.unsaved {
            self.save();
        }
        for (_, reply) in session.waiting.drain() {
            let _ = reply.send(Err(Refused::Unreachable));
        }
        end
    }

    /// Connects, answering meanwhile that `keyd` is away. `None` at shutdown.
    async fn connect(
        &mut self,
        address: &str,
        material: &Material,
    ) -> Result<Option<tonic::transport::Channel>, String> {
        let connecting = tls::connect(
            address,
            &material.trust,
            material.identity.as_ref(),
            self.clock.now_ms().map(|ms| ms / 1000),
        );
        tokio::pin!(connecting);
        loop {
            tokio::select! {
                channel = &mut connecting => return channel.map(Some).map_err(|error| error.to_string()),
                command = self.commands.recv() => match command {
                    Some(command) => super::answer_absent(command),
                    None => return Ok(None),
                },
            }
        }
    }

    async fn talk(
        &mut self,
        address: &str,
        material: &mut Material,
        session: &mut Session,
        hear: &mut tonic::Streaming<proto::KeydMessage>,
        welcomed: &mut bool,
    ) -> Result<End, String> {
        let mut token_check = tokio::time::interval(TOKEN_CHECK);
        let mut save = tokio::time::interval(SAVE_DELAY);
        save.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let welcome_by = tokio::time::Instant::now() + WELCOME_TIME;
        loop {
            tokio::select! {
                heard = hear.message() => {
                    let message = heard.map_err(|status| format!("keyd at {address}: {}", status.message()))?;
                    let Some(message) = message else {
                        return Ok(End::Closed(format!("keyd at {address} closed the stream")));
                    };
                    let Some(body) = message.body else { continue };
                    if let Some(end) = self.hear(address, material, session, body, welcomed)? {
                        return Ok(end);
                    }
                }
                command = self.commands.recv() => match command {
                    Some(command) => self.tell(session, command, *welcomed)?,
                    None => return Ok(End::Shutdown),
                },
                _ = token_check.tick() => self.refresh_token(session)?,
                _ = save.tick(), if session.unsaved => {
                    self.save();
                    session.unsaved = false;
                }
                () = tokio::time::sleep_until(welcome_by), if !*welcomed => {
                    return Err(format!("keyd at {address} did not welcome this node"));
                }
            }
        }
    }

    fn hear(
        &mut self,
        address: &str,
        material: &mut Material,
        session: &mut Session,
        body: Hear,
        welcomed: &mut bool,
    ) -> Result<Option<End>, String> {
        match body {
            Hear::Welcome(welcome) => {
                *welcomed = true;
                let uid = NodeUid::from(welcome.node_uid);
                self.own(&uid)?;
                session.node_uid = Some(uid);
                super::trust::remember_addresses(&self.state, &[address.to_owned()]);
                tracing::info!(%address, keyd = %welcome.keyd_id, "connected to keyd");
                self.say_held(session)?;
                let _ = self.events.send(FromKeyd::Connected {
                    address: address.to_owned(),
                });
            }
            Hear::KeyChallenge(challenge) => self.prove(session, &challenge)?,
            Hear::KeyResult(result) => self.key_result(&result),
            Hear::Roots(roots) => self.follow(roots, material)?,
            Hear::Update(update) => {
                self.update(session, update)?;
                self.say_keyd_fault(None);
            }
            Hear::EndpointResult(result) => {
                if let Some(reply) = session.waiting.remove(&result.request_id) {
                    let answer = match result.error.is_empty() {
                        true => Ok(IdentityId(result.identity)),
                        false => Err(Refused::No {
                            reason: result.error,
                            retry: result.retry,
                        }),
                    };
                    let _ = reply.send(answer);
                }
            }
            Hear::Question(question) => self.question(session, question),
            Hear::AskKey(asked) => self.asked(session, asked.generation)?,
            Hear::ForgetPsk(forget) => match convert::forget_from_proto(&forget) {
                Ok(forget) => drop(self.events.send(FromKeyd::Forget(forget))),
                Err(error) => return Err(format!("keyd at {address}: {error}")),
            },
            Hear::Redirect(redirect) => {
                super::trust::remember_addresses(&self.state, &redirect.addresses);
                return Ok(Some(End::Redirect(redirect.addresses)));
            }
            Hear::Goodbye(goodbye) => {
                return Ok(Some(End::Closed(format!(
                    "keyd at {address} ended the session: {}",
                    goodbye.reason
                ))));
            }
        }
        Ok(None)
    }

    /// Answers an operator's question by the way of the local socket, when the answer is there.
    fn question(&self, session: &Session, question: proto::Question) {
        let (inputs, say) = (self.inputs.clone(), session.say.clone());
        tokio::spawn(async move {
            let answer = crate::query::answer(&inputs, &question.request_json).await;
            let (response_json, error) = match answer {
                Ok(json) => (json, String::new()),
                Err(error) => (String::new(), error),
            };
            let body = Some(Say::Answer(proto::Answer {
                id: question.id,
                response_json,
                error,
            }));
            let _ = say.send(proto::AgentMessage { body }).await;
        });
    }

    /// The keys are those of the Node that `keyd` takes this machine for, or none.
    fn own(&self, uid: &NodeUid) -> Result<(), String> {
        let destroyed = tokio::task::block_in_place(|| self.keys.belong_to(uid));
        if destroyed.map_err(|error| format!("{error:#}"))? {
            tracing::warn!(%uid, "the Node was registered anew: its former keys are revoked and destroyed");
            let _ = self.events.send(FromKeyd::NewKey);
        }
        Ok(())
    }

    fn say_held(&self, session: &Session) -> Result<(), String> {
        session.say(Say::Held(convert::held_to_proto(self.keys.keyring().held())))
    }

    fn offer(&self, session: &Session, generation: u64, key: PublicKey) -> Result<(), String> {
        let port = |slot| self.config.cluster.slot_port(slot);
        let agrees = self.keys.agrees(generation);
        session.say(Say::KeyOffer(convert::key_to_offer(
            generation, key, agrees, port,
        )))
    }

    /// `keyd` asks for the key of a generation. It is on disk, synced, before anybody hears of it.
    fn asked(&self, session: &Session, generation: u64) -> Result<(), String> {
        let is_new = self.keys.keyring().must_make(generation);
        let key =
            match tokio::task::block_in_place(|| self.keys.make(generation, self.config.pre_shared_keys())) {
                Ok(key) => key,
                Err(error) => {
                    // Asked again with the next session; until then the keys that there are go on working.
                    tracing::error!(generation, error = %format!("{error:#}"), "keyd asked for a key");
                    return Ok(());
                }
            };
        if is_new {
            let _ = self.events.send(FromKeyd::NewKey);
            self.say_held(session)?;
        }
        self.offer(session, generation, key)
    }

    fn prove(&self, session: &Session, challenge: &proto::KeyChallenge) -> Result<(), String> {
        let key = PublicKey::try_from(challenge.public_key.as_slice()).ok();
        let key = key.and_then(|key| self.keys.private(&key));
        let (Some((generation, private)), Some(uid)) = (key, &session.node_uid) else {
            return Err("keyd asks for the proof of a key that is not this node's".into());
        };
        let agrees = self.keys.agrees(generation);
        let proof =
            proof::answer(challenge, &private, uid, generation, agrees).map_err(|error| error.to_string())?;
        session.say(Say::KeyProof(proof))
    }

    fn key_result(&self, result: &proto::KeyResult) {
        let key = PublicKey::try_from(result.public_key.as_slice()).ok();
        let Some((generation, _)) = key.and_then(|key| self.keys.private(&key)) else {
            return;
        };
        let refusal = (!result.accepted).then(|| result.reason.clone());
        if let Some(reason) = &refusal {
            tracing::error!(generation, %reason, "keyd refuses this node's key");
        }
        let _ = self.events.send(FromKeyd::Key { generation, refusal });
    }

    fn update(&mut self, session: &mut Session, update: proto::Update) -> Result<(), String> {
        let Some(directory) = &mut self.directory else {
            return Ok(());
        };
        match directory.apply(update) {
            Ok(None) => {}
            Ok(Some(change)) => {
                tracing::debug!(
                    upserts = change.upserts.len(),
                    removes = change.removes.len(),
                    "directory changed"
                );
                self.resync = false;
                let position = directory.position();
                if position < self.floor {
                    let _ = self.events.send(FromKeyd::RefusedUpdate);
                    let (floor, resync) = (self.floor, true);
                    (self.directory, self.resync) = (None, resync);
                    return Err(format!(
                        "keyd's directory {position:?} is older than {floor:?}, which is in force on this node"
                    ));
                }
                let received = self.contents.change(directory, change);
                session.unsaved = true;
                if received.keys_changed {
                    // Devices must never be ahead of the disk: an agent that is killed now goes on from there.
                    tokio::task::block_in_place(|| {
                        if let Some(unsaved) = self.to_disk() {
                            unsaved.save();
                        }
                        if let Err(error) = self.applied.write(position) {
                            tracing::warn!(error = %format!("{error:#}"), "what is applied cannot be noted");
                        }
                    });
                    session.unsaved = false;
                }
                let _ = self.changes.send(ToEnforcer::Directory(received));
            }
            Err(error) => {
                tracing::error!(%error, "an update of the directory is refused; the one before stays in force");
                let _ = self.events.send(FromKeyd::RefusedUpdate);
                if matches!(
                    error,
                    SnapshotError::Digest | SnapshotError::NeedsSnapshot | SnapshotError::Position
                ) {
                    // An increment did not fit: ask for all of it. The copy stays, so that nothing goes back.
                    self.resync = true;
                    return Err(format!("the directory is out of step: {error}"));
                }
                return Err(format!("an update of the directory is refused: {error}"));
            }
        }
        Ok(())
    }

    fn tell(&self, session: &mut Session, command: ToKeyd, welcomed: bool) -> Result<(), String> {
        if !welcomed {
            super::answer_absent(command);
            return Ok(());
        }
        match command {
            ToKeyd::Add(endpoint, reply) => {
                let Some((namespace, pod, uid, addresses)) = parts(&endpoint) else {
                    return Ok(());
                };
                let request_id = session.next_request;
                session.next_request += 1;
                session.waiting.insert(request_id, reply);
                session.say(Say::EndpointAdd(proto::EndpointAdd {
                    request_id,
                    namespace,
                    pod,
                    uid,
                    addresses,
                }))
            }
            ToKeyd::Delete(endpoint) => {
                let Some((namespace, pod, uid, addresses)) = parts(&endpoint) else {
                    return Ok(());
                };
                session.say(Say::EndpointDelete(proto::EndpointDelete {
                    namespace,
                    pod,
                    uid,
                    addresses,
                }))
            }
            ToKeyd::Applied(epoch, version) => session.say(Say::Applied(proto::Applied { epoch, version })),
            ToKeyd::Status(status) => session.say(Say::Status(*status)),
            ToKeyd::Paths(pairs) => pairs
                .chunks(PAIRS_AT_ONCE)
                .try_for_each(|pairs| session.say(Say::Paths(convert::report_to_proto(pairs)))),
            ToKeyd::Held => self.say_held(session),
        }
    }

    fn refresh_token(&self, session: &mut Session) -> Result<(), String> {
        let Some(path) = self.config.options.token_file.as_deref() else {
            return Ok(());
        };
        match read_token(path) {
            Ok(token) if session.token.as_ref() != Some(&token) => {
                session.say(Say::Token(proto::TokenRefresh {
                    token: token.to_string(),
                }))?;
                session.token = Some(token);
            }
            Ok(_) => {}
            // The old one is good for a while yet.
            Err(reason) => tracing::warn!(%reason, "the token cannot be refreshed"),
        }
        Ok(())
    }

    fn save(&self) {
        // A disk that is slow must not hold up what keyd says next. One at a time, in order.
        if let Some(unsaved) = self.to_disk() {
            tokio::task::spawn_blocking(move || unsaved.save());
        }
    }

    fn to_disk(&self) -> Option<Unsaved> {
        let directory = self.directory.as_ref()?;
        Some(Unsaved {
            position: directory.position(),
            bytes: directory.to_file()?,
            state: self.state.clone(),
            newest: self.saving.clone(),
        })
    }
}

/// A copy of the directory on its way to the disk.
struct Unsaved {
    position: (u64, u64),
    bytes: Vec<u8>,
    state: StateDir,
    newest: Arc<Mutex<(u64, u64)>>,
}

impl Unsaved {
    fn save(self) {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if self.position < *newest {
            return;
        }
        match self.state.save_snapshot(&self.bytes) {
            Ok(()) => *newest = self.position,
            Err(error) => {
                tracing::error!(error = %format!("{error:#}"), "the snapshot cannot be kept");
            }
        }
    }
}

fn read_token(path: &Path) -> Result<Zeroizing<String>, String> {
    std::fs::read_to_string(path)
        .map(|text| Zeroizing::new(text.trim().to_owned()))
        .map_err(|error| format!("cannot read the token {}: {error}", path.display()))
}

/// Namespace, name, UID and addresses; `None` for one that was adopted without a name: `keyd` was never told of it.
fn parts(endpoint: &Endpoint) -> Option<(String, String, String, Vec<Vec<u8>>)> {
    let pod = endpoint.pod.clone()?;
    let addresses = endpoint.addresses.iter().copied();
    let addresses = addresses.map(convert::address_to_bytes).collect();
    Some((pod.namespace, pod.name, pod.uid, addresses))
}
