//! The agent as a value: it remembers what events told, and plans from that.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv6Addr, SocketAddr},
    time::Duration,
};

use warren_model::{
    ClusterConfig, ForgetPsk, IdentityId, Labels, NodeKeys, NodeName, NodeRecord, PodRef, PskId, PublicKey,
    directory::{self, Checked},
};

use crate::{
    action::{Action, Gate},
    desired::{Inputs, desired},
    directory::{Change, Directory},
    endpoint::{Endpoint, EndpointKey, Endpoints},
    frozen::Frozen,
    index::NodeIndexes,
    plan::plan,
    policy::LocalEndpoint,
    psk::{Counters, Ends, Exchanges},
    retry::Retries,
    slots::{AwaitedPsk, Keyring, PairReport, Pairs, Seeing, Tally},
    state::{Observed, State},
};

/// What does not change while an agent runs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Settings of the cluster.
    pub config: ClusterConfig,
    /// This node.
    pub node: NodeName,
}

/// The agent's memory.
#[derive(Debug)]
pub struct Agent {
    settings: Settings,
    directory: Option<(Directory, Checked)>,
    /// The directory's time is over.
    frozen: Option<Frozen>,
    endpoints: Endpoints,
    keyring: Keyring,
    pairs: Pairs,
    exchanges: Exchanges,
    indexes: NodeIndexes,
    /// Endpoints that devices were given, by slot and peer: the directory's word is passed on once, so that
    /// roaming survives.
    given: BTreeMap<(u8, PublicKey), SocketAddr>,
    retries: Retries,
    /// Gates that failed in the plan that is being executed.
    shut: BTreeSet<Gate>,
    /// Steps of the last plan that have not succeeded yet, by subject.
    open: BTreeMap<String, Action>,
    /// The directory has changed since the last plan: what is open says nothing of it.
    unplanned: bool,
    desired: State,
    problems: Vec<String>,
    adopted: bool,
}

impl Agent {
    /// An agent that knows nothing yet but the private keys that it has.
    pub fn new(settings: Settings, keyring: Keyring) -> Self {
        Self {
            settings,
            keyring,
            pairs: Pairs::default(),
            exchanges: Exchanges::default(),
            directory: None,
            frozen: None,
            endpoints: Endpoints::default(),
            indexes: NodeIndexes::default(),
            given: BTreeMap::new(),
            retries: Retries::default(),
            shut: BTreeSet::new(),
            open: BTreeMap::new(),
            unplanned: false,
            desired: State::default(),
            problems: Vec::new(),
            adopted: false,
        }
    }

    /// The settings it was made with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The directory changed: this is all of it. The rules are applied here once more, `keyd`'s word is not
    /// enough.
    pub fn set_directory(&mut self, directory: Directory) {
        let checked = self.check(&directory);
        self.directory = Some((directory, checked));
        self.unplanned = true;
    }

    /// The directory changed, by so much; the first change has to be a whole directory.
    pub fn change_directory(&mut self, change: &Change) {
        self.unplanned |= change.concerns_mesh();
        let (mut directory, mut checked) = self.directory.take().unwrap_or_default();
        if directory.apply(change) {
            checked = self.check(&directory);
        }
        self.directory = Some((directory, checked));
    }

    fn check(&self, directory: &Directory) -> Checked {
        let config = &self.settings.config;
        let mut checked = directory::check(config, directory.nodes.values());
        if let Some(frozen) = &self.frozen {
            frozen.apply(&mut checked, &self.settings.node, config.snapshot_hard_fail);
        }
        checked
    }

    /// The directory's time is over, or it is good. While it is over, the peers that there are stay, and changes take none
    /// that is new; with `snapshotHardFail` there are none. Returns whether that is news.
    pub fn set_expired(&mut self, expired: bool) -> bool {
        if expired == self.frozen.is_some() {
            return false;
        }
        let checked = self.directory.as_ref().map(|(_, checked)| checked);
        self.frozen = expired.then(|| Frozen::new(checked));
        if let Some((directory, _)) = self.directory.take() {
            self.set_directory(directory);
        }
        true
    }

    /// The directory's epoch and version; `None` until one is known.
    pub fn directory_version(&self) -> Option<(u64, u64)> {
        self.directory
            .as_ref()
            .map(|(directory, _)| (directory.epoch, directory.version))
    }

    /// Restores endpoints that were saved before a restart.
    pub fn restore_endpoints(&mut self, endpoints: Endpoints) {
        self.endpoints = endpoints;
    }

    /// A pod came (CNI ADD), or was found. Returns its index, `None` when all are in use.
    pub fn add_endpoint(&mut self, endpoint: Endpoint, held: &State) -> Option<u16> {
        self.endpoints.add(endpoint, &held.endpoints)
    }

    /// Indexes that policy maps may hold something of: no new pod gets them.
    pub fn set_occupied(&mut self, occupied: BTreeSet<u16>) {
        self.endpoints.set_occupied(occupied);
    }

    /// The local pods as policy has to know them, as of the last plan.
    pub fn local_endpoints(&self) -> BTreeMap<u16, LocalEndpoint> {
        let local = |(index, endpoint): (u16, &Endpoint)| {
            let entry = self.desired.endpoints.get(&endpoint.ifindex)?;
            let record = entry
                .addresses
                .iter()
                .filter_map(|address| self.workload(*address))
                .find(|workload| workload.node == self.settings.node && workload.identity == entry.identity);
            let local = LocalEndpoint {
                pod: endpoint.pod.as_ref().map(|pod| pod.uid.clone()),
                identity: entry.identity,
                audit: record.is_some_and(|workload| workload.policy_audit),
            };
            Some((index, local))
        };
        self.endpoints.iter().filter_map(local).collect()
    }

    /// Forgets a pod that could not be set up.
    pub fn drop_endpoint(&mut self, index: u16) {
        self.endpoints.remove(index);
    }

    /// CNI DEL: returns the endpoint where there is one that was not deleted before.
    pub fn delete_endpoint(&mut self, key: &EndpointKey) -> Option<Endpoint> {
        self.endpoints.delete(key)
    }

    /// `keyd` named a pod's identity.
    pub fn set_identity(&mut self, index: u16, identity: IdentityId) {
        self.endpoints.set_identity(index, identity);
    }

    /// The pod behind an endpoint that was found by its veth became known.
    pub fn set_pod(&mut self, index: u16, pod: PodRef) {
        self.endpoints.set_pod(index, pod);
    }

    /// Forgets endpoints whose veth is gone; returns those that no CNI DEL had announced.
    pub fn links_seen(&mut self, observed: &Observed) -> Vec<Endpoint> {
        let present: BTreeSet<u32> = observed.links.iter().map(|link| link.ifindex).collect();
        self.endpoints.retain_links(|ifindex| present.contains(&ifindex))
    }

    /// The local pods.
    pub fn endpoints(&self) -> &Endpoints {
        &self.endpoints
    }

    /// This node's own record, where the directory has one.
    pub fn own_record(&self) -> Option<&NodeRecord> {
        self.node(&self.settings.node)
    }

    /// A node's accepted record.
    pub fn node(&self, name: &NodeName) -> Option<&NodeRecord> {
        self.directory
            .as_ref()
            .and_then(|(_, checked)| checked.nodes.get(name))
    }

    /// The node that a key belongs to.
    pub fn node_of_key(&self, key: &PublicKey) -> Option<&NodeName> {
        let (_, checked) = self.directory.as_ref()?;
        checked
            .nodes
            .values()
            .find(|node| node.slots.iter().any(|slot| slot.public_key == *key))
            .map(|node| &node.name)
    }

    /// This node's keys as the directory has them; `None` without a record of it.
    pub fn own_keys(&self) -> Option<NodeKeys> {
        self.own_record().map(NodeRecord::keys)
    }

    /// The private keys that are on disk.
    pub fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    /// A private key was made or destroyed, on disk and synced.
    pub fn set_keyring(&mut self, keyring: Keyring) {
        self.keyring = keyring;
    }

    /// Private keys to destroy now: void, and on no device.
    pub fn void_keys(&self, observed: &Observed) -> Vec<u64> {
        let Some(own) = self.own_keys() else {
            return Vec::new();
        };
        let in_use = |key: &PublicKey| {
            let mut devices = observed.state.devices.values();
            devices.any(|device| device.wireguard.public_key == Some(*key))
        };
        let mut void = self.keyring.void(&own);
        void.retain(|generation| !self.keyring.held().get(generation).is_some_and(in_use));
        void
    }

    /// A stream to `keyd` began: it knows nothing of this node's paths.
    pub fn begin_reports(&mut self) {
        self.pairs.begin_reports();
    }

    /// What has changed of the paths since the last call, for `keyd`.
    pub fn path_reports(&mut self, observed: &Observed, now: Duration) -> Vec<PairReport> {
        let Some((_, checked)) = &self.directory else {
            return Vec::new();
        };
        let own = checked.nodes.get(&self.settings.node).map(NodeRecord::keys);
        let seeing = seeing(&self.settings, own.as_ref(), &self.keyring, &observed.state);
        let peers = peers(&self.settings, checked, &self.indexes);
        self.pairs.reports(now, &seeing, &self.exchanges, peers)
    }

    /// Where the pairs are.
    pub fn tally(&self, observed: &Observed) -> Tally {
        let Some((_, checked)) = &self.directory else {
            return Tally::default();
        };
        let own = checked.nodes.get(&self.settings.node).map(NodeRecord::keys);
        let seeing = seeing(&self.settings, own.as_ref(), &self.keyring, &observed.state);
        let peers = peers(&self.settings, checked, &self.indexes);
        self.pairs.tally(&seeing, peers)
    }

    /// When devices are to be looked at again though nothing happens: a pair is about to change.
    pub fn next_look(&self) -> Option<Duration> {
        self.pairs.next_look()
    }

    /// Takes over the pre-shared keys that are on disk. Before the first directory.
    pub fn restore_pre_shared_keys(&mut self, exchanges: Exchanges) {
        self.exchanges = exchanges;
    }

    /// The exchanges of pre-shared keys: packets and results go in.
    pub fn exchanges(&mut self) -> &mut Exchanges {
        &mut self.exchanges
    }

    /// What the exchanges have done so far.
    pub fn exchange_counters(&self) -> Counters {
        self.exchanges.counters()
    }

    /// The devices that an exchange needs a socket on: slot and link-local address.
    pub fn exchange_links(&self, observed: &Observed) -> impl Iterator<Item = (u8, Ipv6Addr)> {
        let wanted = self.desired.devices.iter();
        wanted.filter_map(|(slot, wanted)| {
            let found = observed.state.devices.get(slot)?;
            let link = wanted.link.filter(|link| found.up && found.link == Some(*link))?;
            Some((*slot, link))
        })
    }

    /// Whether a path waits for the tunnel in which its pre-shared key is agreed on.
    pub fn is_opening(&self) -> bool {
        self.pairs.is_opening()
    }

    /// Peers that are not sent to, as the path's pre-shared key is not agreed on.
    pub fn awaited_psks(&self) -> impl Iterator<Item = AwaitedPsk> {
        let own = self.own_keys();
        let checked = self.directory.as_ref().map(|(_, checked)| checked);
        let others = checked.into_iter().flat_map(|checked| checked.nodes.values());
        others.filter_map(move |node| self.pairs.awaited(own.as_ref()?, node, &self.exchanges))
    }

    /// When an exchange has something to do though nothing happens.
    pub fn next_exchange(&self) -> Option<Duration> {
        self.exchanges.next()
    }

    /// `keyd` says that a pre-shared key is to be forgotten. One that is not meant stays. Returns whether one was.
    pub fn forget_psk(&mut self, now: Duration, forget: &ForgetPsk) -> bool {
        let own = self.own_keys().and_then(|own| own.key(forget.own));
        let peer = self.node(&forget.peer).map(NodeRecord::keys);
        let peer = peer.and_then(|peer| peer.key(forget.other));
        match (own, peer) {
            (Some(own), Some(peer)) => self.exchanges.forget(now, &Ends { own, peer }, forget.id),
            _ => false,
        }
    }

    /// The labels of an identity.
    pub fn labels(&self, identity: IdentityId) -> Option<&Labels> {
        let (directory, _) = self.directory.as_ref()?;
        directory.identities.get(&identity).map(AsRef::as_ref)
    }

    /// The directory's record of a pod's address.
    pub fn workload(&self, address: std::net::IpAddr) -> Option<&warren_model::WorkloadRecord> {
        let (directory, _) = self.directory.as_ref()?;
        directory.workloads.get(&address)
    }

    /// The steps that are due at `now` (any clock that only goes forward). Steps that failed and wait for
    /// their next try are left out; [`Agent::may_run`] tells of each step whether what it rests on is there.
    pub fn plan(&mut self, observed: &Observed, now: Duration) -> Vec<Action> {
        self.refresh(observed, now);
        self.unplanned = false;
        let prune = self.directory.is_some() || !self.settings.config.encryption;
        let steps = plan(&self.desired, &observed.state, prune);
        self.open = steps.iter().map(|step| (step.subject(), step.clone())).collect();
        self.retries.retain(|subject| self.open.contains_key(subject));
        self.shut.clear();
        let mut due = Vec::with_capacity(steps.len());
        for step in steps {
            if self.retries.due(&step.subject(), now) {
                due.push(step);
            } else {
                self.shut.extend(step.guards());
            }
        }
        due
    }

    /// Computes what is wanted from what is known.
    fn refresh(&mut self, observed: &Observed, now: Duration) {
        if let Some((_, checked)) = &self.directory {
            if !self.adopted {
                self.indexes.adopt(
                    checked.nodes.values().filter(|n| n.name != self.settings.node),
                    &observed.state,
                );
            }
            let names = checked.nodes.keys().filter(|name| **name != self.settings.node);
            self.indexes.assign(names, &observed.state);
        }
        let own = self.own_keys();
        if let Some((_, checked)) = self
            .directory
            .as_ref()
            .filter(|_| self.settings.config.encryption)
        {
            let seeing = seeing(&self.settings, own.as_ref(), &self.keyring, &observed.state);
            let peers = peers(&self.settings, checked, &self.indexes);
            self.pairs.update(now, &seeing, &mut self.exchanges, peers);
        }
        let (state, mut problems) = desired(&self.inputs(own.as_ref(), observed));
        self.desired = state;
        if let Some((_, checked)) = &self.directory {
            problems.extend(checked.refused.iter().map(ToString::to_string));
            if !self.adopted {
                self.adopted = true;
                self.adopt_given(observed);
            }
        }
        self.problems = problems;
        self.settle_given(observed);
    }

    fn inputs<'a>(&'a self, own: Option<&'a NodeKeys>, observed: &'a Observed) -> Inputs<'a> {
        Inputs {
            config: &self.settings.config,
            node: &self.settings.node,
            own,
            pairs: &self.pairs,
            directory: self
                .directory
                .as_ref()
                .map(|(directory, checked)| (directory, checked)),
            endpoints: &self.endpoints,
            indexes: &self.indexes,
            given: &self.given,
            links: &observed.links,
            held: &observed.state,
        }
    }

    /// After a start with the directory from disk: peers that devices have already were given that
    /// directory's endpoints by the agent before.
    fn adopt_given(&mut self, observed: &Observed) {
        for (slot, device) in &mut self.desired.devices {
            let Some(found) = observed.state.devices.get(slot) else {
                continue;
            };
            for (key, peer) in &mut device.wireguard.peers {
                if let (Some(endpoint), true) = (peer.endpoint, found.wireguard.peers.contains_key(key)) {
                    self.given.insert((*slot, *key), endpoint);
                    peer.endpoint_is_new = false;
                }
            }
        }
    }

    /// A device that has the wanted endpoint needs not be given it; peers that left are forgotten.
    fn settle_given(&mut self, observed: &Observed) {
        let desired = &self.desired.devices;
        self.given.retain(|(slot, key), _| {
            desired
                .get(slot)
                .is_some_and(|d| d.wireguard.peers.contains_key(key))
        });
        for (slot, device) in &observed.state.devices {
            for (key, found) in &device.wireguard.peers {
                let wanted = desired
                    .get(slot)
                    .and_then(|d| d.wireguard.peers.get(key))
                    .and_then(|p| p.endpoint);
                if let Some(endpoint) = found.endpoint.filter(|_| found.endpoint == wanted) {
                    self.given.insert((*slot, *key), endpoint);
                }
            }
        }
    }

    /// Whether everything that a step rests on succeeded so far in this plan.
    pub fn may_run(&self, step: &Action) -> bool {
        !step.needs().iter().any(|gate| self.shut.contains(gate))
    }

    /// The result of a step at `now`.
    pub fn report(&mut self, step: &Action, result: Result<(), String>, now: Duration) {
        match result {
            Ok(()) => {
                self.retries.succeeded(&step.subject());
                self.open.remove(&step.subject());
                if let Action::SetPeer {
                    slot,
                    peer,
                    endpoint,
                    pre_shared,
                    ..
                } = step
                {
                    if let Some(endpoint) = endpoint {
                        self.given.insert((*slot, *peer), *endpoint);
                    }
                    self.placed(*slot, *peer, *pre_shared);
                }
            }
            Err(reason) => {
                self.retries.failed(&step.subject(), reason, now);
                self.shut.extend(step.guards());
            }
        }
    }

    /// A device has a peer's pre-shared key: whoever waits for it is told at once.
    fn placed(&mut self, slot: u8, peer: PublicKey, pre_shared: Option<PskId>) {
        let own = self.desired.devices.get(&slot);
        if let (Some(own), Some(id)) = (own.and_then(|device| device.wireguard.public_key), pre_shared) {
            self.exchanges.placed(&Ends { own, peer }, id);
        }
    }

    /// Whether the directory's mapping of addresses to nodes is in force: nobody is reached, or believed, under a
    /// mapping of before.
    pub fn mapping_settled(&self) -> bool {
        !self.unplanned && !self.open.values().any(Action::changes_mapping)
    }

    /// Whether owners and endpoints have the identities that the directory gives them.
    pub fn identities_settled(&self) -> bool {
        !self.unplanned && !self.open.values().any(Action::changes_identity)
    }

    /// Whether a local pod is programmed, so that its traffic may flow.
    pub fn endpoint_ready(&self, index: u16) -> bool {
        let Some(endpoint) = self.endpoints.get(index) else {
            return false;
        };
        let throws =
            |prefix: &ipnet::IpNet| endpoint.addresses.iter().any(|address| prefix.contains(address));
        let concerns = |step: &Action| match step {
            Action::SetEndpoint(ifindex, _) | Action::Attach(ifindex, _) => *ifindex == endpoint.ifindex,
            Action::SetRoute(key, crate::state::Route::Throw) => throws(&key.prefix),
            Action::SetFirewall(_) => true,
            _ => false,
        };
        self.desired.endpoints.contains_key(&endpoint.ifindex) && !self.open.values().any(concerns)
    }

    /// How many steps are left to do.
    pub fn outstanding(&self) -> usize {
        self.open.len()
    }

    /// Steps that wait for their next try are due at once: what they rest on has come back.
    pub fn retry_now(&mut self) {
        self.retries.hurry();
    }

    /// Whether a step failed when it was last tried.
    pub fn has_failed(&self, step: &Action) -> bool {
        self.retries.contains(&step.subject())
    }

    /// When a step that failed is due again.
    pub fn next_retry(&self) -> Option<Duration> {
        self.retries.next()
    }

    /// Steps that failed and are tried again: a sentence each.
    pub fn failing(&self) -> Vec<String> {
        self.retries.sentences()
    }

    /// What is wrong with the directory: a sentence each.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// What is wanted, as of the last plan.
    pub fn desired(&self) -> &State {
        &self.desired
    }
}

fn seeing<'a>(
    settings: &Settings,
    own: Option<&'a NodeKeys>,
    keyring: &'a Keyring,
    state: &'a State,
) -> Seeing<'a> {
    Seeing {
        own,
        keyring,
        state,
        keepalive: settings.config.keepalive_seconds,
    }
}

/// All other nodes with their numbers.
fn peers<'a>(
    settings: &'a Settings,
    checked: &'a Checked,
    indexes: &'a NodeIndexes,
) -> impl Iterator<Item = (u16, &'a NodeRecord)> {
    let others = checked.nodes.values().filter(|node| node.name != settings.node);
    others.filter_map(|node| Some((indexes.of(&node.name)?, node)))
}
