//! What this node's encryption really is, and how it is told.

use std::{cmp::Ordering, collections::BTreeMap, fmt::Write as _, process::ExitCode, time::Duration};

use ipnet::IpNet;
use warren_agent_api::{
    AgentStatus, EncryptStatus, EndpointStatus, ExchangeStatus, GenerationStatus, InterfaceStatus, KeyPhase,
    KeyState, KeyStatus, PeerStatus, PolicySummary, Request, Response, call,
};
use warren_agent_core::{mismatches, psk::Counters, slot_device};
use warren_keyd_api::{convert, proto};
use warren_model::{Datapath, NodeRecord, PublicKey};
use warren_wireguard::PeerState;

use crate::{
    cli::{Output, StatusOptions},
    clock::boot_ms,
    runner::Runner,
};

/// A handshake that is older proves nothing (WireGuard's reject-after time), seconds.
const FRESH: u64 = 180;
/// How many differences are told; more of the same help nobody.
const MOST_MISMATCHES: usize = 50;
/// How long the agent may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Reads the node and compares it with what is wanted. What differs is told, and then repaired.
pub(crate) async fn encrypt(runner: &mut Runner) -> EncryptStatus {
    let encryption = runner.config.cluster.encryption;
    let mut faults = Vec::new();
    match runner.machine.observe().await {
        Ok(observed) => runner.observed = observed,
        Err(error) => faults.push(format!("the node's state cannot be read: {error:#}")),
    }
    let now = runner.now();
    let due = runner.agent.next_look().is_some_and(|look| look <= now);
    if !runner.agent.plan(&runner.observed, now).is_empty() || due {
        runner.mark_dirty();
    }
    if encryption {
        if runner.agent.directory_version().is_none() {
            faults.push("this node has no directory yet: pods of other nodes are not reachable".into());
        }
        faults.extend(runner.machine.faults().iter().cloned());
        faults.extend(
            runner
                .key_refusals
                .values()
                .map(|reason| format!("keyd refuses this node's key: {reason}")),
        );
        faults.extend(differences(runner));
        faults.extend(awaited(runner));
    }
    if faults.len() > MOST_MISMATCHES {
        let more = faults.len() - MOST_MISMATCHES;
        faults.truncate(MOST_MISMATCHES);
        faults.push(format!("and {more} more differences"));
    }
    let (interfaces, peers) = devices(runner).await;
    EncryptStatus {
        enabled: encryption && faults.is_empty(),
        mismatches: faults,
        datapath: runner.machine.datapath(),
        keys: keys(runner),
        interfaces,
        peers,
        exchanges: exchanges(runner),
        exemptions: exemptions(runner),
        drops: runner.machine.drops().await.into_iter().collect(),
    }
}

/// A peer that was configured a moment ago may have no handshake yet.
fn differences(runner: &mut Runner) -> Vec<String> {
    let mut observed = runner.observed.clone();
    let now = runner.now();
    let places = observed
        .state
        .devices
        .iter()
        .flat_map(|(slot, device)| device.wireguard.peers.keys().map(|key| (*slot, *key)));
    let present: std::collections::BTreeSet<_> = places.collect();
    runner.peers_since.retain(|place, _| present.contains(place));
    for place in present {
        runner.peers_since.entry(place).or_insert(now);
    }
    for (slot, device) in &mut observed.state.devices {
        for (key, peer) in &mut device.wireguard.peers {
            let since = runner.peers_since.get(&(*slot, *key)).copied().unwrap_or(now);
            peer.silent &= now.saturating_sub(since) > Duration::from_secs(FRESH);
        }
    }
    let agent = &runner.agent;
    mismatches(agent.desired(), &observed, |key| {
        agent
            .node_of_key(key)
            .map_or_else(|| "unknown".to_owned(), ToString::to_string)
    })
}

async fn devices(runner: &Runner) -> (Vec<InterfaceStatus>, Vec<PeerStatus>) {
    let (mut interfaces, mut peers) = (Vec::new(), Vec::new());
    let keys = keys(runner).generations;
    for (slot, device) in &runner.observed.state.devices {
        let public_key = device.wireguard.public_key;
        // A device that no path needs is no interface of the mesh, but for the first, which has the routes.
        if public_key.is_none() && *slot != 0 {
            continue;
        }
        let name = slot_device(*slot);
        interfaces.push(InterfaceStatus {
            name: name.clone(),
            slot: *slot,
            port: device.wireguard.port,
            public_key,
            generation: keys
                .iter()
                .find(|key| Some(key.public_key) == public_key)
                .map_or(0, |key| key.generation),
            mtu: device.mtu,
            offloads: runner.machine.offloads(*slot).await,
        });
        let Ok(dump) = runner.machine.dump(*slot).await else {
            continue;
        };
        // Those where pre-shared keys are agreed on carry nothing.
        let of_mesh = dump.peers.into_iter().filter(|peer| !is_exchange(peer));
        peers.extend(of_mesh.map(|peer| {
            let shared = peer.pre_shared_key.is_some();
            let why_not = public_key
                .filter(|_| !shared)
                .map(|own| no_pre_shared_key(runner, &own, &peer.public_key));
            PeerStatus {
                pre_shared_key: shared,
                no_pre_shared_key: why_not,
                node: runner.agent.node_of_key(&peer.public_key).cloned(),
                interface: name.clone(),
                public_key: peer.public_key,
                endpoint: peer.endpoint,
                last_handshake_seconds: runner
                    .machine
                    .handshake_age(*slot, peer.public_key)
                    .map(|age| age.as_secs()),
                received_bytes: peer.received_bytes,
                sent_bytes: peer.sent_bytes,
                allowed_prefixes: peer.allowed_ips,
            }
        }));
    }
    (interfaces, peers)
}

fn is_exchange(peer: &PeerState) -> bool {
    let link_local = |prefix: &IpNet| match prefix {
        IpNet::V4(_) => false,
        IpNet::V6(prefix) => prefix.addr().is_unicast_link_local(),
    };
    !peer.allowed_ips.is_empty() && peer.allowed_ips.iter().all(link_local)
}

/// Why a path has no pre-shared key.
fn no_pre_shared_key(runner: &Runner, own: &PublicKey, peer: &PublicKey) -> String {
    let with = |record: Option<&NodeRecord>, key: &PublicKey| {
        let slot = record?.slots.iter().find(|slot| slot.public_key == *key)?;
        Some((slot.generation, slot.pre_shared_keys))
    };
    let agent = &runner.agent;
    let other = agent.node_of_key(peer).and_then(|name| agent.node(name));
    match (with(agent.own_record(), own), with(other, peer)) {
        (Some((_, false)), _) if !runner.config.cluster.pre_shared_keys => {
            "preSharedKeys is off in the cluster's configuration".into()
        }
        (Some((_, false)), _) if !runner.config.pre_shared_keys() => {
            "this node has no IPv6, which it needs".into()
        }
        (Some((generation, false)), _) => {
            format!("this node's key of generation {generation} was made without: rotate it")
        }
        (Some(_), Some((generation, false))) => {
            format!("the peer's key of generation {generation} was made without: rotate it")
        }
        (Some(_), Some(_)) => "the device has lost it: it is added again".into(),
        (None, _) | (_, None) => "the directory does not know the keys".into(),
    }
}

fn exchanges(runner: &Runner) -> ExchangeStatus {
    let Counters {
        begun,
        agreed,
        failed,
        malformed,
        unexpected,
        refused,
    } = runner.agent.exchange_counters();
    ExchangeStatus {
        awaited: runner.agent.awaited_psks().count(),
        begun,
        agreed,
        failed,
        dropped: malformed + unexpected + refused + runner.links.refused(),
    }
}

/// Peers that wait for a pre-shared key, for as long as a handshake may take.
fn awaited(runner: &Runner) -> Vec<String> {
    let (now, patience) = (runner.now(), Duration::from_secs(FRESH));
    let awaited = runner.agent.awaited_psks();
    let late = awaited.filter(|awaited| now.saturating_sub(awaited.since) > patience || awaited.conflict);
    late.map(|awaited| match awaited.conflict {
        true => format!(
            "a pre-shared key with node {} is lost (a disk was set back): another one is agreed on when keyd has reached both \
             nodes",
            awaited.node
        ),
        false => format!(
            "no pre-shared key with node {} is agreed on: it does not answer on UDP port {} of its addresses",
            awaited.node, awaited.port
        ),
    })
    .collect()
}

/// This node's keys, and how far a change of them is.
fn keys(runner: &Runner) -> KeyStatus {
    let tally = runner.agent.tally(&runner.observed);
    let held = runner.agent.keyring().held();
    let own = runner.agent.own_keys();
    let void = own
        .as_ref()
        .map_or_else(Vec::new, |own| runner.agent.keyring().void(own));
    let mut generations = BTreeMap::new();
    for (generation, key) in held {
        let state = match void.contains(generation) {
            true => KeyState::Void,
            false => KeyState::Offered,
        };
        generations.insert((*generation, *key), state);
    }
    for slot in own.iter().flat_map(|own| &own.slots) {
        let state = match own.as_ref().map(|own| own.active.cmp(&slot.generation)) {
            Some(Ordering::Less) => KeyState::Next,
            Some(Ordering::Greater) => KeyState::Former,
            Some(Ordering::Equal) | None => KeyState::Active,
        };
        generations.insert((slot.generation, slot.public_key), state);
    }
    let has = |wanted| generations.values().any(|state| *state == wanted);
    let phase = match () {
        () if has(KeyState::Former) && tally.switched < tally.pairs => KeyPhase::Switching,
        () if has(KeyState::Former) => KeyPhase::Draining,
        () if has(KeyState::Next) => KeyPhase::Verifying,
        () if has(KeyState::Offered) => KeyPhase::Preparing,
        () if has(KeyState::Void) => KeyPhase::Retiring,
        () if has(KeyState::Active) => KeyPhase::Settled,
        () => KeyPhase::None,
    };
    let generations = generations.into_iter().map(|((generation, public_key), state)| {
        let held = held.get(&generation) == Some(&public_key);
        GenerationStatus {
            generation,
            public_key,
            state,
            held,
        }
    });
    KeyStatus {
        generations: generations.collect(),
        phase,
        pairs: tally.pairs,
        verified: tally.verified,
        switched: tally.switched,
        draining: tally.draining,
    }
}

fn keys_text(out: &mut String, keys: &KeyStatus) {
    let _ = writeln!(out, "Keys: {}", keys.phase);
    for key in &keys.generations {
        let lost = if key.held { "" } else { ", private key lost" };
        let _ = writeln!(
            out,
            "  generation {}: {} ({}{lost})",
            key.generation, key.public_key, key.state
        );
    }
    if keys.generations.len() > 1 || keys.draining > 0 {
        let _ = writeln!(
            out,
            "  peers: {} verified, {} switched, {} draining, of {}",
            keys.verified, keys.switched, keys.draining, keys.pairs
        );
    }
}

fn exemptions(runner: &Runner) -> Vec<String> {
    let config = &runner.config.cluster;
    if !config.encryption {
        return vec!["everything: encryption is off in the cluster's configuration".into()];
    }
    vec![
        format!(
            "WireGuard itself: UDP ports {}-{} between nodes",
            config.wireguard_port,
            config.slot_port(warren_model::node::SLOTS - 1)
        ),
        format!("the nodes' own traffic to keyd: TCP port {}", config.keyd_port),
        format!(
            "the nodes' own traffic to the API server: TCP port {}",
            config.apiserver_port
        ),
        "pods of the same node among each other".into(),
    ]
}

/// State of the agent.
pub(crate) fn agent(runner: &Runner) -> AgentStatus {
    let mut failing = runner.agent.failing();
    failing.extend(runner.shared.report().faults());
    let mut problems = runner.agent.problems().to_vec();
    problems.extend(runner.unreadable.iter().cloned());
    problems.extend(
        runner
            .key_refusals
            .values()
            .map(|reason| format!("keyd refuses this node's key: {reason}")),
    );
    problems.extend(
        runner
            .pod_refusals
            .iter()
            .map(|(pod, reason)| format!("keyd refuses pod {pod}: {reason}")),
    );
    problems.extend(runner.trust_fault.iter().cloned());
    problems.extend(runner.links.problems().cloned());
    problems.extend(expired(runner));
    problems.extend(runner.machine.host_fault().cloned());
    if let Some(fault) = &runner.keyd_fault {
        problems.push(format!("no session with keyd: {fault}"));
    }
    let healthy = failing.is_empty() && problems.is_empty() && runner.machine.faults().is_empty();
    AgentStatus {
        healthy,
        node: runner.config.node.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
        keyd: runner.connected.clone(),
        snapshot: runner.agent.directory_version(),
        root: runner.root.clone(),
        expired_seconds: runner.clock.lock().expired_ms(boot_ms()).map(|ms| ms / 1000),
        trust_fault: runner.trust_fault.clone(),
        refused_updates: runner.refused_updates,
        failing: failing
            .into_iter()
            .chain(runner.machine.faults().iter().cloned())
            .collect(),
        problems,
        endpoints: endpoints(runner),
        policy: policy(runner),
    }
}

fn policy(runner: &Runner) -> PolicySummary {
    let report = runner.shared.report();
    PolicySummary {
        policies: report.policies,
        rules: report.rules,
        revision: report.revision,
        established_flows: report.flows.established,
        new_flows: report.flows.new,
        events_lost: report.events_lost,
    }
}

/// What becomes of a directory whose time is over.
pub(crate) const EXPIRED: &str = "peers stay as they are, new ones are not accepted";

/// A directory whose time is over stays in force for the peers that there are; somebody has to know.
fn expired(runner: &Runner) -> Option<String> {
    let minutes = runner.clock.lock().expired_ms(boot_ms())? / 60_000;
    let what = match runner.config.cluster.snapshot_hard_fail {
        true => "pods of other nodes are not reachable (snapshotHardFail)",
        false => EXPIRED,
    };
    Some(format!(
        "the directory expired {} h {} min ago: {what}; look at keyd",
        minutes / 60,
        minutes % 60
    ))
}

fn endpoints(runner: &Runner) -> Vec<EndpointStatus> {
    let desired = &runner.agent.desired().endpoints;
    let status = |(index, endpoint): (u16, &warren_agent_core::Endpoint)| {
        let known = endpoint
            .addresses
            .iter()
            .find_map(|address| runner.agent.workload(*address));
        EndpointStatus {
            pod: endpoint
                .pod
                .clone()
                .or_else(|| known.map(|workload| workload.pod.clone())),
            addresses: endpoint.addresses.iter().copied().collect(),
            host_ifindex: endpoint.ifindex,
            identity: desired
                .get(&endpoint.ifindex)
                .map_or(endpoint.identity, |entry| entry.identity),
            ready: runner.agent.endpoint_ready(index) && runner.shared.is_written(index),
        }
    };
    runner.agent.endpoints().iter().map(status).collect()
}

/// The report to `keyd`.
pub(crate) fn for_keyd(runner: &Runner, status: &EncryptStatus) -> proto::AgentStatus {
    let own: BTreeMap<&str, _> = status.interfaces.iter().map(|i| (i.name.as_str(), i)).collect();
    // keyd's own time, as far as it is known here: this node's clock may be wrong.
    let now = runner.clock.now_ms().unwrap_or_default() / 1000;
    let peers = status.peers.iter().map(|peer| {
        let interface = own.get(peer.interface.as_str());
        let handshake = peer
            .last_handshake_seconds
            .map_or(0, |age| now.saturating_sub(age).saturating_mul(1000));
        proto::PeerStatus {
            node: peer.node.as_ref().map_or_else(String::new, ToString::to_string),
            slot: interface.map_or(0, |interface| interface.slot.into()),
            own_public_key: interface
                .and_then(|i| i.public_key)
                .map_or_else(Vec::new, |k| k.as_bytes().to_vec()),
            public_key: peer.public_key.as_bytes().to_vec(),
            endpoint: peer
                .endpoint
                .map_or_else(String::new, |endpoint| endpoint.to_string()),
            last_handshake_unix_ms: i64::try_from(handshake).unwrap_or(i64::MAX),
            received_bytes: peer.received_bytes,
            sent_bytes: peer.sent_bytes,
            ready: peer.last_handshake_seconds.is_some_and(|age| age <= FRESH),
            pre_shared_key: peer.pre_shared_key,
            no_pre_shared_key: peer.no_pre_shared_key.clone().unwrap_or_default(),
        }
    });
    let own_keys = runner.agent.own_keys();
    let slots = status.interfaces.iter().filter_map(|interface| {
        Some(proto::Slot {
            slot: interface.slot.into(),
            port: interface.port.into(),
            generation: interface.generation,
            public_key: interface.public_key?.as_bytes().to_vec(),
            pre_shared_keys: own_keys
                .as_ref()
                .is_some_and(|own| own.agrees(interface.generation)),
        })
    });
    let agent = agent(runner);
    let (epoch, version) = agent.snapshot.unwrap_or_default();
    proto::AgentStatus {
        encryption: status.enabled,
        datapath: convert::datapath_to_proto(Some(status.datapath)).into(),
        interface: slot_device(0),
        slots: slots.collect(),
        peers: peers.collect(),
        problems: status
            .mismatches
            .iter()
            .cloned()
            .chain(agent.failing)
            .chain(agent.problems)
            .collect(),
        drops: status.drops.iter().cloned().collect(),
        endpoints: u32::try_from(agent.endpoints.len()).unwrap_or(u32::MAX),
        exemptions: status.exemptions.clone(),
        agent_version: agent.version,
        epoch,
        version,
        root_generation: runner.root.as_ref().map_or(0, |root| root.generation),
        refused_updates: agent.refused_updates,
        trust_fault: agent.trust_fault.unwrap_or_default(),
        expired: agent.expired_seconds.is_some(),
    }
}

/// `mesh-agent encrypt status`: exit code 1 where anything differs from what is wanted.
pub(crate) fn encrypt_main(options: &StatusOptions) -> ExitCode {
    match call(&options.socket, &Request::EncryptStatus, ANSWER_TIME) {
        Ok(Response::EncryptStatus(status)) => {
            print(options.output, &*status, |status| {
                encrypt_text(status, options.verbose)
            });
            if status.mismatches.is_empty() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        other => unexpected(other),
    }
}

/// `mesh-agent status`: exit code 1 where the agent is not healthy.
pub(crate) fn agent_main(options: &StatusOptions) -> ExitCode {
    match call(&options.socket, &Request::Status, ANSWER_TIME) {
        Ok(Response::Status(status)) => {
            print(options.output, &*status, agent_text);
            if status.healthy {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        other => unexpected(other),
    }
}

pub(crate) fn unexpected(response: Result<Response, warren_agent_api::ClientError>) -> ExitCode {
    match response {
        Ok(Response::Error { message, .. }) => eprintln!("mesh-agent: {message}"),
        Ok(_) => eprintln!("mesh-agent: the agent answered something else: is it of another version?"),
        Err(error) => eprintln!("mesh-agent: {error}"),
    }
    ExitCode::FAILURE
}

fn print<T: serde::Serialize>(output: Output, status: &T, text: impl Fn(&T) -> String) {
    match output {
        Output::Text => print!("{}", text(status)),
        Output::Json => match serde_json::to_string_pretty(status) {
            Ok(json) => println!("{json}"),
            Err(error) => eprintln!("mesh-agent: {error}"),
        },
    }
}

/// In the spirit of `wg show`.
fn encrypt_text(status: &EncryptStatus, verbose: bool) -> String {
    let mut out = String::new();
    let state = match (status.enabled, status.mismatches.is_empty()) {
        (true, _) => "WireGuard",
        (false, true) => "Disabled",
        (false, false) => "Degraded",
    };
    let _ = writeln!(out, "Encryption: {state}");
    for mismatch in &status.mismatches {
        let _ = writeln!(out, "  ! {mismatch}");
    }
    let datapath = match status.datapath {
        Datapath::Kernel => "kernel",
        Datapath::Userspace => "userspace",
    };
    let _ = writeln!(out, "Datapath: {datapath}");
    keys_text(&mut out, &status.keys);
    for interface in &status.interfaces {
        let key = interface
            .public_key
            .map_or_else(|| "(none)".to_owned(), |key| key.to_string());
        let peers = status
            .peers
            .iter()
            .filter(|peer| peer.interface == interface.name)
            .count();
        let _ = writeln!(out, "\ninterface: {}", interface.name);
        let _ = writeln!(out, "  public key: {key}");
        let _ = writeln!(out, "  listening port: {}", interface.port);
        let _ = writeln!(out, "  key generation: {}", interface.generation);
        let _ = writeln!(out, "  mtu: {}", interface.mtu);
        let _ = writeln!(out, "  number of peers: {peers}");
        if let Some(offloads) = interface.offloads.as_ref().filter(|_| verbose) {
            let _ = writeln!(out, "  offloads: {offloads}");
        }
    }
    for peer in &status.peers {
        peer_text(&mut out, peer);
    }
    if status.exchanges.awaited > 0 {
        let _ = writeln!(
            out,
            "\nPeers that wait for a pre-shared key: {}",
            status.exchanges.awaited
        );
    }
    let _ = writeln!(out, "\nNot tunnelled:");
    for exemption in &status.exemptions {
        let _ = writeln!(out, "  {exemption}");
    }
    let dropped: Vec<_> = status.drops.iter().filter(|(_, packets)| *packets > 0).collect();
    let _ = writeln!(
        out,
        "\nDropped packets:{}",
        if dropped.is_empty() { " none" } else { "" }
    );
    for (reason, packets) in dropped {
        let _ = writeln!(out, "  {reason}: {packets}");
    }
    out
}

fn peer_text(out: &mut String, peer: &PeerStatus) {
    let node = peer.node.as_ref().map_or("(unknown node)", |node| node.as_str());
    let _ = writeln!(out, "\npeer: {}", peer.public_key);
    let _ = writeln!(out, "  node: {node}");
    let endpoint = peer
        .endpoint
        .map_or_else(|| "(none)".to_owned(), |endpoint| endpoint.to_string());
    let _ = writeln!(out, "  endpoint: {endpoint}");
    let handshake = peer
        .last_handshake_seconds
        .map_or_else(|| "never".to_owned(), ago);
    let _ = writeln!(out, "  latest handshake: {handshake}");
    let (received, sent) = (bytes(peer.received_bytes), bytes(peer.sent_bytes));
    let _ = writeln!(out, "  transfer: {received} received, {sent} sent");
    let prefixes: Vec<_> = peer.allowed_prefixes.iter().map(ToString::to_string).collect();
    let prefixes = if prefixes.is_empty() {
        "(none)".to_owned()
    } else {
        prefixes.join(", ")
    };
    let _ = writeln!(out, "  allowed prefixes: {prefixes}");
    let shared = match (&peer.no_pre_shared_key, peer.pre_shared_key) {
        (_, true) => "post-quantum (ML-KEM-768 + X25519)".to_owned(),
        (Some(why), false) => format!("none ({why})"),
        (None, false) => "none".to_owned(),
    };
    let _ = writeln!(out, "  pre-shared key: {shared}");
}

fn agent_text(status: &AgentStatus) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "Agent: {}",
        if status.healthy { "OK" } else { "not healthy" }
    );
    let _ = writeln!(out, "Node: {}", status.node);
    let _ = writeln!(out, "Version: {}", status.version);
    let _ = writeln!(out, "Keyd: {}", status.keyd.as_deref().unwrap_or("not connected"));
    let snapshot = status
        .snapshot
        .map_or_else(|| "none".to_owned(), |(e, v)| format!("epoch {e}, version {v}"));
    let _ = writeln!(out, "Directory: {snapshot}");
    if let Some(root) = &status.root {
        let _ = writeln!(
            out,
            "Snapshot root: {} (generation {})",
            root.key, root.generation
        );
    }
    let policy = &status.policy;
    let _ = writeln!(
        out,
        "Policy: {} objects, {} statements, revision {}",
        policy.policies, policy.rules, policy.revision
    );
    let _ = writeln!(
        out,
        "Flows: {} established, {} new",
        policy.established_flows, policy.new_flows
    );
    for (title, lines) in [("Failing", &status.failing), ("Problems", &status.problems)] {
        if !lines.is_empty() {
            let _ = writeln!(out, "{title}:");
            for line in lines {
                let _ = writeln!(out, "  ! {line}");
            }
        }
    }
    let _ = writeln!(out, "Pods: {}", status.endpoints.len());
    for endpoint in &status.endpoints {
        let pod = endpoint
            .pod
            .as_ref()
            .map_or_else(|| "(not known yet)".to_owned(), ToString::to_string);
        let addresses: Vec<_> = endpoint.addresses.iter().map(ToString::to_string).collect();
        let identity = match endpoint.identity.reserved_name() {
            Some(name) => format!("{} ({name})", endpoint.identity),
            None => endpoint.identity.to_string(),
        };
        let ready = if endpoint.ready { "ready" } else { "not ready" };
        let _ = writeln!(
            out,
            "  {pod}  {}  identity {identity}  {ready}",
            addresses.join(" ")
        );
    }
    out
}

fn ago(seconds: u64) -> String {
    match seconds {
        0 => "now".into(),
        1 => "1 second ago".into(),
        2..=119 => format!("{seconds} seconds ago"),
        120..=7199 => format!("{} minutes, {} seconds ago", seconds / 60, seconds % 60),
        _ => format!("{} hours, {} minutes ago", seconds / 3600, seconds % 3600 / 60),
    }
}

fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.2} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_sizes_read_well() {
        assert_eq!(ago(0), "now");
        assert_eq!(ago(61), "61 seconds ago");
        assert_eq!(ago(125), "2 minutes, 5 seconds ago");
        assert_eq!(ago(3 * 3600 + 60), "3 hours, 1 minutes ago");
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(5 * 1024 * 1024), "5.00 MiB");
        assert_eq!(bytes(u64::MAX), "16384.00 PiB");
    }

    #[test]
    fn the_text_says_what_is_wrong_first() {
        let status = EncryptStatus {
            enabled: false,
            mismatches: vec!["warren0 is down".into()],
            datapath: Datapath::Userspace,
            keys: KeyStatus::default(),
            interfaces: vec![],
            peers: vec![],
            exchanges: ExchangeStatus::default(),
            exemptions: vec!["x".into()],
            drops: vec![("no-path".into(), 3), ("policy".into(), 0)],
        };
        let text = encrypt_text(&status, true);
        assert!(
            text.starts_with("Encryption: Degraded\n  ! warren0 is down\n"),
            "{text}"
        );
        assert!(text.contains("no-path: 3") && !text.contains("policy"));
    }
}
