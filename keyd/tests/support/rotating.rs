//! Agents that take part in rotations over the real stream. Their devices are imagined: a path whose two keys are there works
//! at once, unless the test holds it back.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};
use warren_keyd_api::{
    convert::{Record, held_to_proto, key_to_offer, report_to_proto},
    proof,
    proto::{Applied, KeyChallenge, agent_message::Body as Say, keyd_message::Body as Heard},
    snapshot::Directory,
    stream::AgentStream,
    tls::Enrolment,
};
use warren_model::{
    NodeKeys, NodeName, NodeUid, PrivateKey, PublicKey,
    keys::{PairReport, PathState},
};

use crate::support::{channel, hello};

/// What an agent is kept from doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hold {
    /// Answering AskKey.
    pub(crate) asked: bool,
    /// Handshakes with a new key.
    pub(crate) verifying: bool,
    /// Moving to a new key.
    pub(crate) moving: bool,
    /// Getting quiet on an old path.
    pub(crate) quiet: bool,
    /// Destroying keys.
    pub(crate) destroying: bool,
    /// Having a stream.
    pub(crate) connected: bool,
}

/// What an agent has, kept over its streams.
#[derive(Default)]
struct Disk {
    uid: Option<NodeUid>,
    keys: BTreeMap<u64, PrivateKey>,
    nodes: BTreeMap<NodeName, NodeKeys>,
    hold: Hold,
    problems: Vec<String>,
}

impl Disk {
    /// Keys that were made under another UID are void.
    fn is_of(&mut self, uid: &NodeUid) {
        if self.uid.as_ref() != Some(uid) {
            self.keys.clear();
            self.uid = Some(uid.clone());
        }
    }
}

/// An agent that reconnects.
pub(crate) struct Rotating {
    name: String,
    disk: Arc<Mutex<Disk>>,
    changed: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Rotating {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Rotating {
    /// Follows keyd to whatever address it has.
    pub(crate) fn start(name: &str, enrolment: Enrolment, addresses: watch::Receiver<String>) -> Self {
        let disk = Arc::<Mutex<Disk>>::default();
        let changed = Arc::<Notify>::default();
        let runner = Runner {
            name: name.to_owned(),
            enrolment,
            disk: disk.clone(),
            changed: changed.clone(),
        };
        Self {
            name: name.to_owned(),
            disk,
            changed,
            task: tokio::spawn(runner.run(addresses)),
        }
    }

    pub(crate) fn hold(&self, hold: Hold) {
        self.disk.lock().unwrap().hold = hold;
        self.changed.notify_one();
    }

    /// The disk is replaced: all keys are lost, and the agent starts again.
    pub(crate) fn lose_keys(&self) {
        self.disk.lock().unwrap().keys.clear();
        self.changed.notify_one();
    }

    /// Generations that are on its disk.
    pub(crate) fn held(&self) -> BTreeSet<u64> {
        self.disk.lock().unwrap().keys.keys().copied().collect()
    }

    /// The keys of a node as this agent has been told.
    pub(crate) fn sees(&self, node: &str) -> Option<NodeKeys> {
        self.disk
            .lock()
            .unwrap()
            .nodes
            .get(&NodeName::from(node))
            .cloned()
    }

    /// What was against the rules, from this agent's point of view.
    pub(crate) fn problems(&self) -> Vec<String> {
        let disk = self.disk.lock().unwrap();
        disk.problems
            .iter()
            .map(|problem| format!("{}: {problem}", self.name))
            .collect()
    }
}

struct Runner {
    name: String,
    enrolment: Enrolment,
    disk: Arc<Mutex<Disk>>,
    changed: Arc<Notify>,
}

impl Runner {
    async fn run(self, mut addresses: watch::Receiver<String>) {
        loop {
            while self.disk.lock().unwrap().hold.connected {
                self.changed.notified().await;
            }
            let address = addresses.borrow_and_update().clone();
            tokio::select! {
                () = self.talk(&address) => {}
                _ = addresses.changed() => {}
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn talk(&self, address: &str) {
        let trust = warren_keyd_api::tls::Trust::Ca(self.enrolment.ca_der.clone().into());
        if warren_keyd_api::tls::connect(address, &trust, Some(&self.enrolment.identity), None)
            .await
            .is_err()
        {
            return;
        }
        let channel = channel(address, &self.enrolment).await;
        let Ok(mut stream) = AgentStream::open(channel, hello(&self.name)).await else {
            return;
        };
        let mut directory = Directory::new(self.enrolment.root());
        let mut uid = NodeUid::from("");
        let mut told = Vec::new();
        let mut said_held = None;
        loop {
            self.say(&stream, &directory, &mut told, &mut said_held).await;
            tokio::select! {
                () = self.changed.notified() => {
                    if self.disk.lock().unwrap().hold.connected {
                        return;
                    }
                }
                heard = stream.receive() => match heard {
                    Ok(Some(Heard::Welcome(welcome))) => {
                        uid = welcome.node_uid.into();
                        self.disk.lock().unwrap().is_of(&uid);
                    }
                    Ok(Some(Heard::Update(update))) => {
                        let applied = directory.apply(update).expect("keyd sends what is signed and whole");
                        if applied.is_some() {
                            self.take(&directory);
                            let (epoch, version) = directory.position();
                            stream.send(Say::Applied(Applied { epoch, version })).await;
                        }
                    }
                    Ok(Some(Heard::AskKey(ask))) => {
                        // Held back: keyd asks again in another stream only.
                        while self.disk.lock().unwrap().hold.asked {
                            self.changed.notified().await;
                            if self.disk.lock().unwrap().hold.connected {
                                return;
                            }
                        }
                        self.offer(&stream, ask.generation, &mut said_held).await;
                    }
                    Ok(Some(Heard::KeyChallenge(challenge))) => self.prove(&stream, &challenge, &uid).await,
                    Ok(Some(Heard::KeyResult(result))) => {
                        if !result.accepted {
                            self.disk.lock().unwrap().problems.push(result.reason);
                        }
                    }
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return,
                },
            }
        }
    }

    async fn offer(&self, stream: &AgentStream, generation: u64, said: &mut Option<Vec<u64>>) {
        let key = {
            let mut disk = self.disk.lock().unwrap();
            let make = || proof::generate_private_key().unwrap();
            let key = disk.keys.entry(generation).or_insert_with(make);
            proof::public_key(key)
        };
        self.say_held(stream, said).await;
        let port = |slot: u8| 51871 + u16::from(slot);
        let offer = key_to_offer(generation, key, false, port);
        stream.send(Say::KeyOffer(offer)).await;
    }

    async fn prove(&self, stream: &AgentStream, challenge: &KeyChallenge, uid: &NodeUid) {
        let found = {
            let disk = self.disk.lock().unwrap();
            let mut keys = disk.keys.iter();
            keys.find(|(_, key)| proof::public_key(key).as_bytes().as_slice() == challenge.public_key)
                .map(|(generation, key)| (*generation, key.clone()))
        };
        if let Some((generation, key)) = found {
            let proof = proof::answer(challenge, &key, uid, generation, false).unwrap();
            stream.send(Say::KeyProof(proof)).await;
        }
    }

    /// Takes the directory in, and checks that nothing in it goes back.
    fn take(&self, directory: &Directory) {
        let nodes: BTreeMap<_, _> = directory
            .records()
            .flatten()
            .filter_map(|record| match record {
                Record::Node(node) => Some((node.name.clone(), node.keys())),
                _ => None,
            })
            .collect();
        let mut disk = self.disk.lock().unwrap();
        let mut problems = vec![];
        for (name, now) in &nodes {
            let Some(before) = disk.nodes.get(name).filter(|before| before.uid == now.uid) else {
                continue;
            };
            if (now.active, now.last) < (before.active, before.last) {
                problems.push(format!("node {name} went back: {before:?} -> {now:?}"));
            }
            let both = before.active != now.active && before.active > 0;
            if both && !(before.lists(now.active) && now.lists(before.active)) && before.lists(before.active)
            {
                // Only a key that its node has lost may be replaced at a stroke.
                if now.active % 2 != before.active % 2 {
                    problems.push(format!("node {name} changed at a stroke: {before:?} -> {now:?}"));
                }
            }
        }
        disk.problems.extend(problems);
        disk.nodes = nodes;
    }

    /// Says what it holds and sees, where that has changed.
    async fn say(
        &self,
        stream: &AgentStream,
        directory: &Directory,
        told: &mut Vec<PairReport>,
        said_held: &mut Option<Vec<u64>>,
    ) {
        let own = NodeName::from(self.name.as_str());
        let live = directory.position() != (0, 0);
        {
            let mut disk = self.disk.lock().unwrap();
            if let Some(keys) = disk
                .nodes
                .get(&own)
                .cloned()
                .filter(|_| live && !disk.hold.destroying)
            {
                disk.keys.retain(|generation, key| match keys.key(*generation) {
                    Some(listed) => listed == proof::public_key(key),
                    None => *generation >= keys.active && *generation > keys.last,
                });
            }
        }
        self.say_held(stream, said_held).await;
        let pairs = self.pairs(&own);
        if live && pairs != *told {
            let gone = told
                .iter()
                .filter(|old| pairs.iter().all(|new| new.peer != old.peer));
            let gone = gone.map(|old| PairReport {
                paths: vec![],
                ..old.clone()
            });
            let changed = pairs.iter().filter(|new| !told.contains(new)).cloned();
            let report: Vec<_> = changed.chain(gone).collect();
            stream.send(Say::Paths(report_to_proto(&report))).await;
            *told = pairs;
        }
    }

    async fn say_held(&self, stream: &AgentStream, said: &mut Option<Vec<u64>>) {
        let keys: BTreeMap<u64, PublicKey> = {
            let disk = self.disk.lock().unwrap();
            let public = |(generation, key): (&u64, &PrivateKey)| (*generation, proof::public_key(key));
            disk.keys.iter().map(public).collect()
        };
        let generations: Vec<_> = keys.keys().copied().collect();
        if said.as_ref() != Some(&generations) {
            stream.send(Say::Held(held_to_proto(&keys))).await;
            *said = Some(generations);
        }
    }

    fn pairs(&self, own: &NodeName) -> Vec<PairReport> {
        let disk = self.disk.lock().unwrap();
        let Some(mine) = disk.nodes.get(own) else {
            return vec![];
        };
        let held = |generation: &u64| {
            let listed = mine.key(*generation);
            listed.is_some() && disk.keys.get(generation).map(proof::public_key) == listed
        };
        let hold = &disk.hold;
        let pair = |(peer, theirs): (&NodeName, &NodeKeys)| {
            let generations = mine.generations().into_iter().filter(held);
            let paths = generations.flat_map(|own| {
                theirs.generations().into_iter().map(move |peer| {
                    let candidate = own > mine.active || peer > theirs.active;
                    let target = (own, peer) == (mine.active, theirs.active);
                    let draining = own < mine.active || peer < theirs.active;
                    let moved = !(hold.moving && (mine.former().is_some() || theirs.former().is_some()));
                    let oldest = Some(&own) == mine.generations().first()
                        && Some(&peer) == theirs.generations().first();
                    PathState {
                        own,
                        peer,
                        verified: !(hold.verifying && candidate),
                        sending: if moved { target } else { oldest },
                        quiet: draining && !hold.quiet,
                        conflict: None,
                    }
                })
            });
            PairReport {
                peer: peer.clone(),
                uid: theirs.uid.clone(),
                paths: paths.collect(),
            }
        };
        let peers = disk
            .nodes
            .iter()
            .filter(|(name, keys)| *name != own && !keys.slots.is_empty());
        peers.map(pair).filter(|pair| !pair.paths.is_empty()).collect()
    }
}
