//! The product's pipeline against the oracle.

use std::{collections::BTreeMap, fmt};

use serde_json::{Value, json};
use warren_agent_core::policy::{
    self as engine, FirstNumbers, MapWrite, Maps, PolicyEngine, PolicyEvent, lookup,
};
use warren_keyd_core::{
    Namespace as KeydNamespace, Pod as KeydPod,
    policy::{PolicyChange, PolicyRepository},
    workload_labels,
};
use warren_model::{
    ClusterConfig, IdentityId, Labels,
    policy::{Direction, NamedPorts, NodeFacts, Protocol},
};

use super::{
    cluster::{Cluster, Packet, Party, Pod, Way},
    dice::Dice,
    evaluate::allowed,
    generate, shrink,
};

/// Packets that are drawn for one cluster.
const PACKETS_PER_CLUSTER: u64 = 200;

/// What a run found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Pairs of policy set and packet that were compared.
    pub pairs: u64,
    /// How many the oracle allowed: shows that neither answer is rare.
    pub allowed: u64,
    /// The seed.
    pub seed: u64,
}

/// A packet on which the pipeline and the oracle disagree, shrunk.
#[derive(Debug, Clone)]
pub struct Mismatch {
    /// The seed of the run.
    pub seed: u64,
    /// The cluster.
    pub cluster: Cluster,
    /// The packet.
    pub packet: Packet,
    /// What the oracle says.
    pub oracle: bool,
}

impl std::error::Error for Mismatch {}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |allowed| if allowed { "allows" } else { "denies" };
        writeln!(
            f,
            "seed {}: the oracle {}, the engine {}",
            self.seed,
            word(self.oracle),
            word(!self.oracle)
        )?;
        writeln!(f, "packet: {:?}", self.packet)?;
        write!(f, "{}", self.cluster)
    }
}

/// Compares `pairs` pairs, drawn from a seed. The first disagreement ends the run.
pub fn run(pairs: u64, seed: u64) -> Result<Report, Box<Mismatch>> {
    run_tampered(pairs, seed, |_| ())
}

/// As [`run`], with maps that somebody spoiled: shows that the comparison would notice.
fn run_tampered(pairs: u64, seed: u64, tamper: impl Fn(&mut Maps)) -> Result<Report, Box<Mismatch>> {
    let mut dice = Dice::new(seed);
    let mut report = Report {
        pairs: 0,
        allowed: 0,
        seed,
    };
    while report.pairs < pairs {
        let cluster = generate::cluster(&mut dice);
        let mut subject = Subject::new(&cluster, Some(&mut dice)).unwrap_or_else(|fault| {
            panic!("seed {seed}: the generator made an object that is refused: {fault}")
        });
        tamper(&mut subject.maps);
        for _ in 0..PACKETS_PER_CLUSTER.min(pairs - report.pairs) {
            let packet = generate::packet(&mut dice, &cluster);
            let oracle = allowed(&cluster, &packet);
            if subject.allows(&packet) != oracle {
                return Err(Box::new(shrunk(seed, cluster, packet)));
            }
            report.pairs += 1;
            report.allowed += u64::from(oracle);
        }
    }
    Ok(report)
}

fn shrunk(seed: u64, cluster: Cluster, packet: Packet) -> Mismatch {
    let differs = |candidate: &Cluster| {
        Subject::new(candidate, None)
            .is_ok_and(|subject| subject.allows(&packet) != allowed(candidate, &packet))
    };
    // Where only the order of events shows it, it cannot be shrunk.
    let cluster = if differs(&cluster) {
        shrink::shrink(cluster, &packet, differs)
    } else {
        cluster
    };
    let oracle = allowed(&cluster, &packet);
    Mismatch {
        seed,
        cluster,
        packet,
        oracle,
    }
}

/// The pipeline with a cluster in it: parser, selectors, repository, engine, maps.
pub struct Subject {
    engine: PolicyEngine,
    maps: Maps,
    pods: Vec<IdentityId>,
    apiservers: Vec<bool>,
}

impl Subject {
    /// Feeds a cluster. With dice, in random order and with detours: objects that come and go, identities that come
    /// late. Fails on an object that should be valid and is refused.
    pub fn new(cluster: &Cluster, dice: Option<&mut Dice>) -> Result<Self, String> {
        Self::written(cluster, dice, |_| ())
    }

    /// As [`Subject::new`]; hands out every write to the maps.
    pub fn written(
        cluster: &Cluster,
        dice: Option<&mut Dice>,
        mut write: impl FnMut(&MapWrite),
    ) -> Result<Self, String> {
        let mut numbers: BTreeMap<Labels, IdentityId> = BTreeMap::new();
        let mut pods = Vec::new();
        for pod in &cluster.pods {
            let next = IdentityId(IdentityId::FIRST_ALLOCATED.0 + numbers.len() as u32);
            pods.push(*numbers.entry(identity_labels(cluster, pod)).or_insert(next));
        }
        let mut subject = Self {
            engine: PolicyEngine::new(FirstNumbers::default()),
            maps: Maps::default(),
            pods,
            apiservers: cluster.nodes.iter().map(|node| node.apiserver).collect(),
        };
        for step in subject.steps(cluster, &numbers, dice)? {
            for one in subject.engine.apply(step) {
                subject.maps.apply(&one);
                write(&one);
            }
        }
        if subject.maps != subject.engine.contents() {
            return Err("the maps are not what the engine says".into());
        }
        Ok(subject)
    }

    /// Whether the pipeline allows a packet.
    pub fn allows(&self, packet: &Packet) -> bool {
        lookup(&self.maps, &self.packet(packet)).allows()
    }

    /// The maps, to be loaded into a kernel.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// The packet in the engine's terms: identities instead of parties.
    pub fn packet(&self, packet: &Packet) -> engine::Packet {
        let endpoint = match packet.subject {
            Party::Pod(index) => index as u16 + 1,
            _ => 0,
        };
        let direction = match packet.way {
            Way::In => Direction::Ingress,
            Way::Out => Direction::Egress,
        };
        let peer = self.identity(packet.peer);
        let Packet {
            address,
            protocol,
            port,
            ..
        } = *packet;
        engine::Packet {
            endpoint,
            direction,
            peer,
            address,
            protocol,
            port,
        }
    }

    /// The identity of a party.
    pub fn identity(&self, party: Party) -> IdentityId {
        match party {
            Party::Pod(index) => self.pods[index],
            Party::Node(0) => IdentityId::HOST,
            Party::Node(index) if self.apiservers[index] => IdentityId::KUBE_APISERVER,
            Party::Node(_) => IdentityId::REMOTE_NODE,
            Party::World(_) => IdentityId::WORLD,
            Party::Unknown(_) => IdentityId::UNKNOWN,
            Party::Init(_) => IdentityId::INIT,
            Party::Unmanaged(_) => IdentityId::UNMANAGED,
            Party::Health(_) => IdentityId::HEALTH,
            Party::Ingress(_) => IdentityId::INGRESS,
        }
    }

    /// Events in steps, each of which takes effect as a whole.
    fn steps(
        &self,
        cluster: &Cluster,
        numbers: &BTreeMap<Labels, IdentityId>,
        dice: Option<&mut Dice>,
    ) -> Result<Vec<Vec<PolicyEvent>>, String> {
        let mut repository = PolicyRepository::new(config(cluster));
        let mut steps = vec![vec![node(cluster)]];
        for (name, cidrs) in &cluster.groups {
            let cidrs = cidrs
                .iter()
                .map(|cidr| cidr.parse().map_err(|_| format!("{cidr} is no prefix")));
            let group = Ok(cidrs.collect::<Result<_, _>>()?);
            steps.push(events(repository.set_group(name, Some(group))));
        }
        let mut todo: Vec<Todo<'_>> = Vec::new();
        todo.extend(
            numbers
                .iter()
                .map(|(labels, identity)| Todo::Identity(*identity, labels)),
        );
        todo.extend(cluster.objects.iter().map(|object| Todo::Object(object, true)));
        todo.extend(cluster.broken.iter().map(|object| Todo::Object(object, false)));
        todo.extend((0..cluster.pods.len()).map(Todo::Pod));
        if let Some(dice) = dice {
            // Objects that come and go leave nothing behind.
            for object in &cluster.objects {
                if dice.once_in(3) {
                    todo.push(Todo::Detour(object));
                }
            }
            for index in (1..todo.len()).rev() {
                todo.swap(index, dice.roll(index + 1));
            }
        }
        for one in todo {
            match one {
                Todo::Identity(identity, labels) => {
                    steps.push(events(repository.upsert_identity(identity, labels)))
                }
                Todo::Object(object, valid) => {
                    let policy =
                        warren_crds::cilium::policy_ref(object).map_err(|fault| fault.to_string())?;
                    let outcome = warren_crds::cilium::parse(object, &cluster.name);
                    if outcome.is_ok() != valid {
                        return Err(format!("{outcome:?} of {object}"));
                    }
                    steps.push(events(repository.upsert(&policy, outcome)));
                }
                Todo::Detour(object) => {
                    let mut policy =
                        warren_crds::cilium::policy_ref(object).map_err(|fault| fault.to_string())?;
                    policy.name = "detour".into();
                    let outcome = warren_crds::cilium::parse(object, &cluster.name);
                    steps.push(events(repository.upsert(&policy, outcome)));
                    steps.push(events(repository.remove(&policy)));
                }
                Todo::Pod(index) => steps.push(pod_events(cluster, index, self.pods[index])),
            }
        }
        Ok(steps)
    }
}

enum Todo<'a> {
    Identity(IdentityId, &'a Labels),
    Object(&'a Value, bool),
    Detour(&'a Value),
    Pod(usize),
}

fn pod_events(cluster: &Cluster, index: usize, identity: IdentityId) -> Vec<PolicyEvent> {
    let ports = named_ports(&cluster.pods[index]);
    vec![
        PolicyEvent::PeerPorts {
            identity,
            ports: vec![ports.clone()],
        },
        PolicyEvent::Endpoint {
            index: index as u16 + 1,
            identity,
            ports,
            audit: false,
        },
    ]
}

fn node(cluster: &Cluster) -> PolicyEvent {
    let node = &cluster.nodes[0];
    let labels = node
        .labels
        .iter()
        .map(|(key, value)| (format!("k8s:{key}"), value.clone()));
    PolicyEvent::Node(NodeFacts {
        labels: Labels(labels.collect()),
        runs_apiserver: node.apiserver,
        closed_to_host: cluster.closed_to_host,
        audit: false,
    })
}

/// What an agent makes of what keyd publishes.
pub(crate) fn events(changes: Vec<PolicyChange>) -> Vec<PolicyEvent> {
    let event = |change| match change {
        PolicyChange::Selector {
            id,
            selector,
            members,
        } => Some(PolicyEvent::Selector {
            id,
            selector,
            members,
        }),
        PolicyChange::Members(members) => Some(PolicyEvent::Members {
            id: members.selector,
            added: members.added,
            removed: members.removed,
        }),
        PolicyChange::Rules { policy, rules } => Some(PolicyEvent::Rules { policy, rules }),
        PolicyChange::Removed(policy) => Some(PolicyEvent::RulesGone(policy)),
        PolicyChange::SelectorGone(id) => Some(PolicyEvent::SelectorGone(id)),
        PolicyChange::Validity { .. } => None,
    };
    changes.into_iter().filter_map(event).collect()
}

/// A configuration in which nothing is left out but the name.
pub(crate) fn config(cluster: &Cluster) -> ClusterConfig {
    let given = json!({
        "clusterName": cluster.name,
        "podPools": ["10.244.0.0/16"],
        "nodePools": ["172.30.0.0/16"],
    });
    serde_json::from_value(given).expect("a configuration")
}

fn identity_labels(cluster: &Cluster, pod: &Pod) -> Labels {
    let keyd_pod = KeydPod {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        labels: pod.labels.clone(),
        service_account: pod.service_account.clone(),
        ports: named_ports(pod),
        ..KeydPod::default()
    };
    let labels = cluster
        .namespaces
        .get(&pod.namespace)
        .cloned()
        .unwrap_or_default();
    let namespace = KeydNamespace {
        name: pod.namespace.clone(),
        labels,
    };
    workload_labels(&keyd_pod, Some(&namespace), &config(cluster))
}

fn named_ports(pod: &Pod) -> NamedPorts {
    let protocol = |name: &str| match name {
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        _ => Protocol::Tcp,
    };
    NamedPorts(
        pod.ports
            .iter()
            .map(|(name, (of, n))| (name.clone(), (protocol(of), *n)))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use engine::PeerKind;

    use super::*;

    #[test]
    fn the_engine_and_the_oracle_agree() {
        let seed = std::env::var("WARREN_SEED")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(20_260_101);
        println!("WARREN_SEED={seed}");
        let report = run(20_000, seed).unwrap_or_else(|mismatch| panic!("{mismatch}"));
        assert_eq!(report.pairs, 20_000);
        assert!(
            (4_000..16_000).contains(&report.allowed),
            "{report:?}: one answer is too rare to test anything"
        );
    }

    #[test]
    fn a_spoiled_map_is_noticed() {
        type Tamper = (&'static str, fn(&mut Maps));
        let tampers: [Tamper; 8] = [
            ("denials are lost", |maps| {
                maps.verdicts.retain(|_, value| value.allow)
            }),
            ("strangers are not told apart", |maps| {
                maps.verdicts
                    .retain(|key, _| key.kind != PeerKind::Identity || key.id != 0)
            }),
            ("the host's exception is lost", |maps| {
                maps.verdicts
                    .retain(|key, _| key.kind != PeerKind::Identity || key.id != 1)
            }),
            ("single ports are lost", |maps| {
                maps.ports.retain(|key, _| key.length < 24)
            }),
            ("narrow prefixes are lost", |maps| {
                maps.cidrs.retain(|key, _| key.prefix.prefix_len() < 16)
            }),
            ("prefixes of the world count for pods", |maps| {
                let world: Vec<_> = maps
                    .verdicts
                    .iter()
                    .filter(|(key, _)| key.kind == PeerKind::WorldPrefix)
                    .map(|(k, v)| (*k, *v))
                    .collect();
                maps.verdicts.extend(world.into_iter().map(|(key, value)| {
                    (
                        engine::VerdictKey {
                            kind: PeerKind::MemberPrefix,
                            ..key
                        },
                        value,
                    )
                }));
            }),
            ("everybody is everybody", |maps| {
                maps.verdicts.retain(|key, _| key.kind != PeerKind::Everybody)
            }),
            ("the host has no policy", |maps| {
                maps.endpoints.retain(|index, _| *index != 0)
            }),
        ];
        for (what, tamper) in tampers {
            assert!(
                run_tampered(20_000, 1, tamper).is_err(),
                "{what}, and nobody noticed"
            );
        }
    }

    #[test]
    fn a_difference_is_shrunk_to_what_makes_it() {
        // As if the oracle had forgotten default deny: whatever the engine denies differs.
        let mut dice = Dice::new(7);
        let (cluster, packet) = loop {
            let cluster = generate::cluster(&mut dice);
            let packet = generate::packet(&mut dice, &cluster);
            if cluster.objects.len() > 2 && !Subject::new(&cluster, None).unwrap().allows(&packet) {
                break (cluster, packet);
            }
        };
        let differs = |c: &Cluster| Subject::new(c, None).is_ok_and(|subject| !subject.allows(&packet));
        let small = shrink::shrink(cluster, &packet, differs);
        assert_eq!(small.objects.len(), 1, "{small:?}");
        assert!(small.broken.is_empty() && small.groups.is_empty());
    }
}
