//! The loaded eBPF programs against the oracle: the whole pipeline into real maps, then made-up packets through every program
//! that a real one would meet on its way through the node.

use std::{collections::HashSet, fmt, net::IpAddr, path::Path};

use anyhow::{Context as _, Result, anyhow, bail};
use warren_agent_core::policy::{MapWrite, Maps, PeerKind};
use warren_bpf::{
    Datapath, OwnerKind, PolicyDirection, PolicyEndpoint, PolicyPeerKind, PolicyPort, PolicyPortKey,
    PolicyVerdict, PolicyVerdictKey,
};
use warren_model::policy::Direction;

use super::{
    cluster::{Cluster, Party},
    dice::Dice,
    differential::{Report, Subject},
    generate, shrink,
    trip::{Difference, Trip},
};
use crate::kernel::{Node, private};

/// Packets that are drawn for one cluster.
const PACKETS_PER_CLUSTER: u64 = 200;
/// The generator makes no more.
const PODS: u16 = 8;
/// What policy drops is dropped for one of these.
const REASONS_OF_POLICY: [&str; 2] = ["policy", "default-deny"];

/// A packet on which the loaded programs and the oracle disagree; the policies are shrunk.
#[derive(Debug)]
pub struct Mismatch {
    /// The seed of the run.
    pub seed: u64,
    cluster: Cluster,
    trip: Trip,
    difference: Difference,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {}: {}", self.seed, self.difference)?;
        writeln!(f, "{:#?}", self.trip)?;
        write!(f, "{}", self.cluster)
    }
}

/// What a run found, and every mismatch up to some number.
#[derive(Debug)]
pub struct Outcome {
    /// Figures.
    pub report: Report,
    /// How many packets the two disagree on.
    pub mismatches: u64,
    /// The first of them, shrunk.
    pub shown: Vec<Mismatch>,
}

/// How much of what is wrong a run is to find.
#[derive(Debug, Clone, Copy)]
struct Appetite {
    /// Mismatches after which it ends.
    enough: u64,
    /// Mismatches that are shrunk and shown.
    shown: usize,
}

/// More tell nothing new.
const TO_MEND: Appetite = Appetite {
    enough: 100,
    shown: 3,
};

/// Compares `pairs` pairs, drawn from a seed, in namespaces of its own. `tell` is called now and then with the number of
/// pairs so far.
pub fn run(pairs: u64, seed: u64, tell: impl FnMut(u64) + Send) -> Result<Outcome> {
    private(|pins| Run::new(pins, seed)?.compare(pairs, tell))
}

type Tamper = fn(&mut Datapath) -> Result<()>;

struct Run {
    seed: u64,
    dice: Dice,
    node: Node,
    /// Spoils the maps, to see that the comparison notices.
    tamper: Tamper,
    appetite: Appetite,
}

impl Run {
    fn new(pins: &Path, seed: u64) -> Result<Self> {
        let mut node = Node::new(pins, PODS)?;
        for number in [1, 2] {
            let path = warren_bpf::Path {
                ifindex: node.tunnel,
                receive_slots: 1,
            };
            node.datapath.set_path(number, path)?;
        }
        Ok(Self {
            seed,
            dice: Dice::new(seed),
            node,
            tamper: |_| Ok(()),
            appetite: TO_MEND,
        })
    }

    fn compare(&mut self, pairs: u64, mut tell: impl FnMut(u64)) -> Result<Outcome> {
        let mut outcome = Outcome {
            report: Report {
                pairs: 0,
                allowed: 0,
                seed: self.seed,
            },
            mismatches: 0,
            shown: Vec::new(),
        };
        while outcome.report.pairs < pairs && outcome.mismatches < self.appetite.enough {
            let cluster = generate::cluster(&mut self.dice);
            let wanted = PACKETS_PER_CLUSTER.min(pairs - outcome.report.pairs);
            self.one_cluster(&cluster, wanted, &mut outcome)
                .with_context(|| format!("seed {}, with this:\n{cluster}", self.seed))?;
            tell(outcome.report.pairs);
        }
        Ok(outcome)
    }

    fn one_cluster(&mut self, cluster: &Cluster, packets: u64, outcome: &mut Outcome) -> Result<()> {
        let mut loaded = Loaded::new(&mut self.node, cluster, Some(&mut self.dice))?;
        (self.tamper)(&mut loaded.node.datapath)?;
        let mut portless = HashSet::new();
        let mut differing = Vec::new();
        for number in 0..packets {
            let trip = Trip::draw(&mut self.dice, cluster, number as u16);
            // Without ports, a packet the other way would be the reply to one before.
            if !trip.has_ports() && !portless.insert(trip.ends(cluster)) {
                loaded.node.datapath.clear_flows()?;
                portless.clear();
                portless.insert(trip.ends(cluster));
            }
            let result = trip.take(&mut loaded, cluster)?;
            outcome.report.pairs += 1;
            outcome.report.allowed += u64::from(result.allowed);
            if let Some(difference) = result.difference {
                outcome.mismatches += 1;
                differing.push((trip, difference));
            }
        }
        loaded.check_reasons()?;
        loaded.unload()?;
        for (trip, difference) in differing {
            if outcome.shown.len() < self.appetite.shown {
                outcome.shown.push(self.shrunk(cluster, trip, difference));
            }
        }
        Ok(())
    }

    fn shrunk(&mut self, cluster: &Cluster, trip: Trip, difference: Difference) -> Mismatch {
        let (node, tamper) = (&mut self.node, self.tamper);
        let mut last = None;
        let mut differs = |candidate: &Cluster| {
            let found = differs(node, candidate, &trip, tamper).ok().flatten();
            let differs = found.is_some();
            last = found.or(last.take());
            differs
        };
        // Where only what came before shows it, it cannot be shrunk.
        let cluster = if differs(cluster) {
            shrink::shrink(cluster.clone(), &trip.packet, differs)
        } else {
            cluster.clone()
        };
        Mismatch {
            seed: self.seed,
            cluster,
            trip,
            difference: last.unwrap_or(difference),
        }
    }
}

fn differs(node: &mut Node, cluster: &Cluster, trip: &Trip, tamper: Tamper) -> Result<Option<Difference>> {
    let mut loaded = Loaded::new(node, cluster, None)?;
    tamper(&mut loaded.node.datapath)?;
    let result = trip.take(&mut loaded, cluster);
    loaded.unload()?;
    Ok(result?.difference)
}

/// A node with the policies and identities of a cluster.
pub(super) struct Loaded<'a> {
    pub(super) node: &'a mut Node,
    pub(super) subject: Subject,
    drops: Vec<(String, u64)>,
}

impl<'a> Loaded<'a> {
    fn new(node: &'a mut Node, cluster: &Cluster, dice: Option<&mut Dice>) -> Result<Self> {
        node.datapath.clear_flows()?;
        let mut failed = None;
        let datapath = &mut node.datapath;
        let subject = Subject::written(cluster, dice, |one| {
            if failed.is_none() {
                failed = write(datapath, one).err();
            }
        });
        let subject =
            subject.map_err(|fault| anyhow!("the generator made an object that is refused: {fault}"))?;
        if let Some(error) = failed {
            return Err(error);
        }
        let held = node.datapath.policy_contents()?;
        let wanted = subject.maps();
        if (
            held.endpoints.len(),
            held.ports.len(),
            held.verdicts.len(),
            held.cidrs.len(),
        ) != (
            wanted.endpoints.len(),
            wanted.ports.len(),
            wanted.verdicts.len(),
            wanted.cidrs.len(),
        ) {
            bail!("the kernel's maps do not hold what the engine says");
        }
        for (index, pod) in cluster.pods.iter().enumerate() {
            let identity = subject.identity(Party::Pod(index));
            node.set_pod(index as u16 + 1, &pod.addresses, identity.0)?;
        }
        for (index, of) in cluster.nodes.iter().enumerate() {
            let identity = subject.identity(Party::Node(index)).0;
            for address in &of.addresses {
                let kind = if index == 0 {
                    OwnerKind::LocalNode
                } else {
                    OwnerKind::RemoteNode
                };
                node.own(*address, kind, index as u16, identity)?;
                node.datapath.set_node_address(*address, index == 0)?;
            }
        }
        node.datapath.raise_revision()?;
        let drops = node.datapath.drops()?;
        Ok(Self { node, subject, drops })
    }

    /// Every drop since the start was for a reason of policy: else the packets are no test of it.
    fn check_reasons(&self) -> Result<()> {
        let before = &self.drops;
        for (reason, packets) in self.node.datapath.drops()? {
            let known = before
                .iter()
                .find(|(name, _)| *name == reason)
                .map_or(0, |(_, n)| *n);
            if packets > known && !REASONS_OF_POLICY.contains(&&*reason) && !reason.starts_with("stack-") {
                bail!("{} packets were dropped as {reason}", packets - known);
            }
        }
        Ok(())
    }

    /// Takes everything away again.
    fn unload(self) -> Result<()> {
        for one in self.subject.maps().repair(&Maps::default()) {
            write(&mut self.node.datapath, &one)?;
        }
        for endpoint in self.node.datapath.endpoints()? {
            self.node.datapath.remove_endpoint(endpoint.ifindex)?;
        }
        for (prefix, _) in self.node.datapath.owners()? {
            self.node.datapath.remove_owner(prefix)?;
        }
        Ok(())
    }

    /// Makes a party somebody of node 2, for one packet.
    pub(super) fn move_away(&mut self, party: Party, address: IpAddr) -> Result<()> {
        let identity = self.subject.identity(party);
        self.node.own(address, OwnerKind::RemotePod, 2, identity.0)
    }

    /// Undoes it.
    pub(super) fn move_back(&mut self, party: Party, address: IpAddr) -> Result<()> {
        match party {
            Party::Pod(_) => {
                let identity = self.subject.identity(party);
                self.node.own(address, OwnerKind::LocalPod, 0, identity.0)
            }
            _ => Ok(self.node.datapath.remove_owner(address.into())?),
        }
    }
}

/// Gives a node the policies and identities of a cluster, in place of those it had.
pub fn load(node: &mut Node, cluster: &Cluster) -> Result<()> {
    Loaded::new(node, cluster, None).map(drop)
}

/// Carries out a write of the engine, as an agent does. No program runs meanwhile, so there is nothing to wait for.
pub(crate) fn write(datapath: &mut Datapath, one: &MapWrite) -> Result<()> {
    match *one {
        MapWrite::SetVerdict(key, value) => datapath.set_policy_verdict(
            verdict_key(key),
            PolicyVerdict {
                allow: value.allow,
                rule: value.rule,
            },
        )?,
        MapWrite::DeleteVerdict(key) => datapath.remove_policy_verdict(verdict_key(key))?,
        MapWrite::SetPort(key, value) => datapath.set_policy_port(
            port_key(key),
            PolicyPort {
                class: value.class,
                has_cidrs: value.has_cidrs,
            },
        )?,
        MapWrite::DeletePort(key) => datapath.remove_policy_port(port_key(key))?,
        MapWrite::SetCidr(key, number) => datapath.set_policy_cidr(key.table, key.prefix, number)?,
        MapWrite::DeleteCidr(key) => datapath.remove_policy_cidr(key.table, key.prefix)?,
        MapWrite::SetEndpoint(index, value) => datapath.set_policy_endpoint(
            index,
            PolicyEndpoint {
                policy: value.policy,
                cidr_table: value.cidr_table,
                audit: value.audit,
                ingress_open: *value.open.of(Direction::Ingress),
                egress_open: *value.open.of(Direction::Egress),
            },
        )?,
        MapWrite::DeleteEndpoint(index) => datapath.remove_policy_endpoint(index)?,
        MapWrite::Grace => {}
    }
    Ok(())
}

fn verdict_key(key: warren_agent_core::policy::VerdictKey) -> PolicyVerdictKey {
    let kind = match key.kind {
        PeerKind::Identity => PolicyPeerKind::Identity,
        PeerKind::Everybody => PolicyPeerKind::Everybody,
        PeerKind::WorldPrefix => PolicyPeerKind::WorldPrefix,
        PeerKind::MemberPrefix => PolicyPeerKind::MemberPrefix,
    };
    PolicyVerdictKey {
        class: key.class,
        kind,
        id: key.id,
    }
}

fn port_key(key: warren_agent_core::policy::PortKey) -> PolicyPortKey {
    PolicyPortKey {
        policy: key.policy,
        direction: match key.direction {
            Direction::Ingress => PolicyDirection::Ingress,
            Direction::Egress => PolicyDirection::Egress,
        },
        bits: key.bits,
        length: key.length,
    }
}

#[cfg(test)]
mod tests;
