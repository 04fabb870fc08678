//! Nanoseconds per packet, by `BPF_PROG_TEST_RUN`. Two nodes that differ in their number of rules only are measured in
//! turn, so that the machine's moods meet both.

use std::{collections::BTreeMap, net::IpAddr};

use anyhow::{Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use super::median;
use crate::{
    kernel::{Frame, Hook, Node, Seen, private},
    oracle::{Cluster, Pod, loaded::load},
};

/// Rules on the server, in and out.
const FEW: usize = 16;
const MANY: usize = 16_000;
/// Times that both nodes are measured.
const ROUNDS: usize = 15;
/// Runs of a program on the same packet.
const REPEAT: u32 = 100_000;
/// Flows that are opened in a round, each by one run.
const OPENED: u16 = 2_000;

const SERVER: u16 = 1;
const PORT: u16 = 443;

/// Nanoseconds per packet of one program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Costs {
    /// Of a flow that has seen packets both ways.
    pub established_ns: f64,
    /// Opens a flow that policy allows. Each is one run, with the kernel's two looks at the clock.
    pub new_allowed_ns: f64,
    /// Denied.
    pub denied_ns: f64,
}

/// What the programs cost.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Programs {
    /// `to_pod` with 16,000 rules: its figures are the main ones.
    #[serde(flatten)]
    pub main: Costs,
    /// The largest of the ratios of 16,000 over 16 rules: new flows and denials, of `to_pod` and of `from_pod`.
    pub ratio_16k_over_16: f64,
    /// Figures by program and number of rules.
    pub by_program: BTreeMap<String, Costs>,
    /// Entries of the policy maps with 16,000 rules each way.
    pub policy_entries: BTreeMap<&'static str, u32>,
}

pub(super) fn measure() -> Result<Programs> {
    private(|pins| {
        let mut few = Bench::new(&pins.join("few"), FEW)?;
        let mut many = Bench::new(&pins.join("many"), MANY)?;
        let mut samples: BTreeMap<(&str, usize), Samples> = BTreeMap::new();
        for _ in 0..ROUNDS {
            for (bench, rules) in [(&mut few, FEW), (&mut many, MANY)] {
                for hook in [Hook::ToPod(SERVER), Hook::FromPod(SERVER)] {
                    bench.round(hook, samples.entry((hook.name(), rules)).or_default())?;
                }
            }
        }
        let costs: BTreeMap<_, _> = samples
            .into_iter()
            .map(|(of, samples)| (of, samples.median()))
            .collect();
        let ratios = ["to_pod", "from_pod"].into_iter().flat_map(|hook| {
            let (few, many) = (costs[&(hook, FEW)], costs[&(hook, MANY)]);
            [
                many.new_allowed_ns / few.new_allowed_ns,
                many.denied_ns / few.denied_ns,
            ]
        });
        Ok(Programs {
            main: costs[&("to_pod", MANY)],
            ratio_16k_over_16: ratios.fold(0.0, f64::max),
            by_program: costs
                .into_iter()
                .map(|((hook, rules), costs)| (format!("{hook}, {rules} rules"), costs))
                .collect(),
            policy_entries: many.entries()?,
        })
    })
}

#[derive(Default)]
struct Samples {
    established: Vec<f64>,
    new_allowed: Vec<f64>,
    denied: Vec<f64>,
}

impl Samples {
    fn median(mut self) -> Costs {
        Costs {
            established_ns: median(&mut self.established),
            new_allowed_ns: median(&mut self.new_allowed),
            denied_ns: median(&mut self.denied),
        }
    }
}

/// A node with a server that many rules select.
struct Bench {
    node: Node,
    cluster: Cluster,
}

impl Bench {
    fn new(pins: &std::path::Path, rules: usize) -> Result<Self> {
        std::fs::create_dir(pins)?;
        let mut node = Node::new(pins, 3)?;
        let cluster = cluster(rules);
        load(&mut node, &cluster)?;
        Ok(Self { node, cluster })
    }

    fn entries(&self) -> Result<BTreeMap<&'static str, u32>> {
        let usage = self.node.datapath.usage()?.into_iter();
        Ok(usage
            .filter(|usage| usage.map.starts_with("POLICY_"))
            .map(|usage| (usage.map, usage.entries))
            .collect())
    }

    /// From the friend or the enemy to the server, or the other way.
    fn frame(&self, hook: Hook, other: u16, port: u16) -> (Frame, Seen) {
        let address = |index: u16| self.cluster.pods[usize::from(index) - 1].addresses[0];
        let (from, to, mark) = match hook {
            Hook::FromPod(_) => (SERVER, other, 0),
            _ => (other, SERVER, self.node.judged(other)),
        };
        let frame = Frame {
            mac: Node::mac(from),
            source: address(from),
            destination: address(to),
            protocol: 6,
            source_port: port,
            port: PORT,
            tcp_flags: Frame::SYN,
        };
        let seen = Seen {
            ingress_ifindex: self.node.device(from),
            mark,
        };
        (frame, seen)
    }

    fn round(&mut self, hook: Hook, samples: &mut Samples) -> Result<()> {
        const FRIEND: u16 = 2;
        const ENEMY: u16 = 3;
        self.node.datapath.clear_flows()?;
        let back = match hook {
            Hook::FromPod(index) => Hook::ToPod(index),
            _ => Hook::FromPod(SERVER),
        };
        // One flow, opened and answered; then its packets.
        let (open, seen) = self.frame(hook, FRIEND, 999);
        self.run(hook, &open, seen, 1, true)?;
        let reply = open.reply(match hook {
            Hook::FromPod(_) => Node::mac(FRIEND),
            _ => Node::mac(SERVER),
        });
        let way_back = match back {
            Hook::ToPod(_) => Seen {
                ingress_ifindex: self.node.device(FRIEND),
                mark: self.node.judged(FRIEND),
            },
            _ => Seen {
                ingress_ifindex: self.node.device(SERVER),
                mark: 0,
            },
        };
        self.run(back, &reply, way_back, 1, true)?;
        let later = Frame {
            tcp_flags: Frame::ACK,
            ..open
        };
        samples
            .established
            .push(self.run(hook, &later, seen, REPEAT, true)?);
        let mut opened = Vec::new();
        for number in 0..OPENED {
            let (frame, seen) = self.frame(hook, FRIEND, 10_000 + number);
            opened.push(self.run(hook, &frame, seen, 1, true)?);
        }
        samples.new_allowed.push(median(&mut opened));
        let (denied, seen) = self.frame(hook, ENEMY, 999);
        samples.denied.push(self.run(hook, &denied, seen, REPEAT, false)?);
        Ok(())
    }

    /// Nanoseconds per run.
    fn run(&self, hook: Hook, frame: &Frame, seen: Seen, repeat: u32, passes: bool) -> Result<f64> {
        let answer = self.node.repeat(hook, &frame.bytes(), seen, repeat)?;
        ensure!(
            answer.passed == passes,
            "{hook:?} answered {} to what it should {}",
            answer.action,
            if passes { "let pass" } else { "deny" }
        );
        Ok(answer.duration.as_nanos() as f64)
    }
}

/// A server that `rules` rules let others in to, and as many let out: half of them name prefixes, half a label and a port.
fn cluster(rules: usize) -> Cluster {
    let pod = |name: &str, last: u8| Pod {
        namespace: "default".into(),
        name: name.into(),
        labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
        addresses: vec![IpAddr::from([10, 244, 1, last])],
        ..Pod::default()
    };
    Cluster {
        name: "bench".into(),
        namespaces: BTreeMap::from([("default".to_owned(), BTreeMap::new())]),
        pods: vec![pod("server", 2), pod("friend", 3), pod("enemy", 4)],
        nodes: Vec::from([crate::oracle::Node {
            labels: BTreeMap::new(),
            addresses: vec![IpAddr::from([192, 168, 0, 1])],
            apiserver: false,
        }]),
        objects: (0..rules.div_ceil(500))
            .map(|object| policy(object, rules.min(500)))
            .collect(),
        ..Cluster::default()
    }
}

fn policy(object: usize, rules: usize) -> Value {
    let section = |endpoints: &str, cidr: &str| {
        let mut elements = vec![json!({
            endpoints: [{"matchLabels": {"app": "friend"}}],
            "toPorts": [{"ports": [{"port": PORT.to_string(), "protocol": "TCP"}]}],
        })];
        elements.extend((1..rules).map(|index| {
            let number = object * 500 + index;
            if number.is_multiple_of(2) {
                json!({
                    cidr: [format!("10.{}.{}.0/24", number / 256, number % 256)],
                    "toPorts": [{"ports": [{"port": PORT.to_string(), "protocol": "TCP"}]}],
                })
            } else {
                json!({
                    endpoints: [{"matchLabels": {"app": "friend"}}],
                    "toPorts": [{"ports": [{"port": (1024 + number).to_string(), "protocol": "TCP"}]}],
                })
            }
        }));
        elements
    };
    json!({
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": format!("rules{object}"), "namespace": "default"},
        "spec": {
            "endpointSelector": {"matchLabels": {"app": "server"}},
            "ingress": section("fromEndpoints", "fromCIDR"),
            "egress": section("toEndpoints", "toCIDR"),
        },
    })
}
