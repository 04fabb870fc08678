//! Policy where hosts and the world are an end: probes of the kubelet, masquerade, host policy, prefixes, audit mode, and a
//! pod that opens more flows than it may.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use warren_agent_api::EventStatus;
use warren_e2e::{
    app::{ask::Protocol, flood::Flooded, probe::Target},
    lab::{
        Check, Lab, LabOptions, Place, Pod, PodSpec, Process, ServiceSpec, Session, all_as_expected,
        net::{BRIDGE, node_address, pod_cidrs},
        policies::{allow, app, ccnp, cnp, default_deny, ports},
        wait::wait_until,
    },
    scenario::{DropCounter, PATIENCE, at, two_nodes},
};

/// Addresses of the world outside.
const WORLD: [&str; 4] = ["198.51.100.1", "198.51.100.2", "2001:db8:51::1", "2001:db8:51::2"];
/// Where servers of the world and of nodes listen.
const OUTSIDE_PORT: u16 = 9000;

fn role(lab: &Lab, name: &str, role: &str, node: u8) -> Result<Pod> {
    lab.add_pod(PodSpec {
        labels: [("role".to_owned(), role.to_owned())].into(),
        ..PodSpec::new(name, node)
    })
}

/// TCP and UDP to one end, allowed or denied.
fn ask(from: &Place, to: SocketAddr, name: &str, allowed: bool) -> [Check; 2] {
    [Target::Tcp(to), Target::Udp(to)].map(|target| {
        if allowed {
            Check::allowed(from, target, name)
        } else {
            Check::denied(from, target, name)
        }
    })
}

fn ask_pod(from: &Place, to: &Pod, allowed: bool) -> Vec<Check> {
    let ends = to.addresses().iter().map(|address| at(*address, 8080));
    ends.flat_map(|end| ask(from, end, to.name(), allowed)).collect()
}

/// A server of the lab's own on a place's host network.
fn serve(lab: &Lab, place: &Place, name: &str, addresses: &[IpAddr], ports: &[u16]) -> Result<Process> {
    let mut command = vec![
        place.app.to_string_lossy().into_owned(),
        "serve".into(),
        "--name".into(),
        name.into(),
    ];
    for address in addresses {
        for port in ports {
            command.extend(["--listen".into(), at(*address, *port).to_string()]);
        }
    }
    place.spawn(
        command,
        &lab.dir().join("logs").join(format!("{name}-server.log")),
    )
}

#[test]
fn a_host_reaches_its_own_pods_and_no_other_host_does() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let server = lab.add_pod(PodSpec::new("server", 1))?;
        lab.apply(&default_deny("default"))?;
        let mut checks = ask_pod(&lab.node(1).place(), &server, true);
        checks.extend(ask_pod(&lab.node(2).place(), &server, false));
        for address in server.addresses() {
            checks.push(Check::allowed(
                &lab.node(1).place(),
                Target::Icmp(*address),
                "server",
            ));
            checks.push(Check::denied(
                &lab.node(2).place(),
                Target::Icmp(*address),
                "server",
            ));
        }
        all_as_expected(&checks)?;
        // A rule may let the other hosts in.
        lab.apply(&[cnp(
            "default",
            "nodes",
            json!({
                "endpointSelector": {},
                "ingress": [{"fromEntities": ["remote-node"], "toPorts": ports(8080)}],
            }),
        )])?;
        all_as_expected(&ask_pod(&lab.node(2).place(), &server, true))
    })?;
    // Unless the cluster is configured otherwise.
    let options = LabOptions {
        nodes: 1,
        tune: |config| config.host_reaches_pods = false,
        ..two_nodes(true)
    };
    Lab::run(options, |lab| {
        let server = lab.add_pod(PodSpec::new("server", 1))?;
        lab.apply(&default_deny("default"))?;
        all_as_expected(&ask_pod(&lab.node(1).place(), &server, false))?;
        lab.apply(&[cnp(
            "default",
            "probes",
            json!({"endpointSelector": {}, "ingress": [{"fromEntities": ["host"]}]}),
        )])?;
        all_as_expected(&ask_pod(&lab.node(1).place(), &server, true))
    })
}

#[test]
fn a_pod_behind_masquerade_is_still_a_pod() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let server = lab.add_pod(PodSpec::new("server", 1))?;
        let friend = role(lab, "friend", "friend", 1)?;
        let stranger = role(lab, "stranger", "stranger", 1)?;
        let service = ServiceSpec {
            node_port: Some(30_080),
            ..ServiceSpec::new(1, "server", 80, 8080, &[server.addresses()])
        };
        lab.serve(std::slice::from_ref(&service))?;
        lab.apply(&[cnp(
            "default",
            "server",
            json!({
                "endpointSelector": app("server"),
                "ingress": [{"fromEndpoints": [{"matchLabels": {"role": "friend"}}], "toPorts": ports(8080)}],
            }),
        )])?;
        // On this NodePort the packets are masqueraded: they reach the server with the host's address, which may always
        // reach its own pods.
        let mut checks = Vec::new();
        for address in node_address(1).both() {
            let end = at(address, 30_080);
            checks.extend(ask(&friend.place(), end, "server", true));
            checks.extend(ask(&stranger.place(), end, "server", false));
            checks.extend(ask(&lab.node(1).place(), end, "server", true));
        }
        for address in service.cluster.both() {
            checks.extend(ask(&friend.place(), at(address, 80), "server", true));
            checks.extend(ask(&stranger.place(), at(address, 80), "server", false));
        }
        all_as_expected(&checks)
    })
}

#[test]
fn host_policy_guards_a_node_and_no_other() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let guarded = lab.node(2);
        lab.describe_node(&guarded, &[("role", "guarded")], &[])?;
        let friends = [
            role(lab, "near-friend", "friend", 2)?,
            role(lab, "far-friend", "friend", 1)?,
        ];
        let strangers = [
            role(lab, "near", "stranger", 2)?,
            role(lab, "far", "stranger", 1)?,
        ];
        let addresses = node_address(2).both();
        let _servers = [
            serve(lab, &guarded.place(), "node2", &addresses, &[OUTSIDE_PORT, 9001])?,
            serve(
                lab,
                &lab.node(1).place(),
                "node1",
                &node_address(1).both(),
                &[OUTSIDE_PORT],
            )?,
        ];
        // A Service in front of the host's process, as that of the API server is.
        let backends: [&[IpAddr]; 1] = [&addresses];
        let service = ServiceSpec::new(7, "host", 443, OUTSIDE_PORT, &backends);
        lab.serve(std::slice::from_ref(&service))?;
        let checks = |friends_pass: bool, strangers_pass: bool| {
            let mut checks = Vec::new();
            for (pods, allowed) in [(&friends, friends_pass), (&strangers, strangers_pass)] {
                for pod in pods {
                    for address in addresses {
                        checks.extend(ask(&pod.place(), at(address, OUTSIDE_PORT), "node2", allowed));
                    }
                    for address in service.cluster.both() {
                        checks.extend(ask(&pod.place(), at(address, 443), "node2", allowed));
                    }
                    // The other node is in no policy.
                    for address in node_address(1).both() {
                        checks.extend(ask(&pod.place(), at(address, OUTSIDE_PORT), "node1", true));
                    }
                }
            }
            checks
        };
        wait_until(PATIENCE, "the servers listen", || {
            all_as_expected(&checks(true, true))
        })?;
        lab.apply(&[ccnp(
            "guard",
            json!({
                "nodeSelector": {"matchLabels": {"role": "guarded"}},
                "ingress": [{
                    "fromEndpoints": [{"matchLabels": {"k8s:io.kubernetes.pod.namespace": "default", "role": "friend"}}],
                    "toPorts": ports(OUTSIDE_PORT),
                }],
            }),
        )])?;
        all_as_expected(&checks(true, false))?;
        // Another port, another node: denied as well. Pods of the guarded node are not its host.
        let mut more = Vec::new();
        for address in addresses {
            more.extend(ask(&friends[0].place(), at(address, 9001), "node2", false));
            more.extend(ask(&friends[1].place(), at(address, 9001), "node2", false));
            more.extend(ask(
                &lab.node(1).place(),
                at(address, OUTSIDE_PORT),
                "node2",
                false,
            ));
            // What the host says to itself is nobody's business.
            more.extend(ask(&guarded.place(), at(address, 9001), "node2", true));
        }
        more.extend(ask_pod(&strangers[1].place(), &friends[0], true));
        more.extend(ask_pod(&guarded.place(), &friends[1], true));
        all_as_expected(&more)?;
        // The mesh itself lives: WireGuard, keyd's stream, neighbours.
        lab.wait_ready(PATIENCE)
    })
}

/// Gives the outside world addresses and servers, and routes to the pods of node 1 from the first address of each
/// family.
fn world(lab: &Lab) -> Result<(Vec<IpAddr>, Process)> {
    let underlay = lab.underlay();
    let addresses: Vec<IpAddr> = WORLD.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let lines = addresses.iter().map(|address| {
        let nodad = if address.is_ipv6() { " nodad" } else { "" };
        format!(
            "addr add {address}/{} dev {BRIDGE}{nodad}",
            if address.is_ipv4() { 32 } else { 128 }
        )
    });
    underlay.ip(&lines.collect::<Vec<_>>())?;
    let server = serve(lab, underlay, "world", &addresses, &[OUTSIDE_PORT])?;
    Ok((addresses, server))
}

/// From now on the world reaches node 1's pods from its `n`th address.
fn world_speaks_from(lab: &Lab, addresses: &[IpAddr], n: usize) -> Result<()> {
    let lines = pod_cidrs(1)
        .into_iter()
        .zip(node_address(1).both())
        .zip([n, n + 2]);
    let lines: Vec<_> = lines
        .map(|((cidr, gateway), index)| {
            format!("route replace {cidr} via {gateway} src {}", addresses[index])
        })
        .collect();
    lab.underlay().ip(&lines)
}

#[test]
fn prefixes_mean_the_world_with_their_exceptions() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let client = lab.add_pod(PodSpec::new("client", 1))?;
        let other = lab.add_pod(PodSpec::new("other", 2))?;
        let (addresses, _server) = world(lab)?;
        let outwards = |first: bool, second: bool| {
            let mut checks = Vec::new();
            for (address, allowed) in addresses.iter().zip([first, second, first, second]) {
                checks.extend(ask(&client.place(), at(*address, OUTSIDE_PORT), "world", allowed));
            }
            checks
        };
        wait_until(PATIENCE, "the world listens", || {
            all_as_expected(&outwards(true, true))
        })?;
        let sets = json!([
            {"cidr": "198.51.100.0/24", "except": ["198.51.100.2/32"]},
            {"cidr": "2001:db8:51::/48", "except": ["2001:db8:51::2/128"]},
            // Pods and nodes are not the world, whatever a prefix covers.
            {"cidr": "10.0.0.0/8"},
            {"cidr": "fd00::/8"},
        ]);
        lab.apply(&[cnp(
            "default",
            "client",
            json!({
                "endpointSelector": app("client"),
                "egress": [{"toCIDRSet": sets}],
                "ingress": [{"fromCIDRSet": sets}],
            }),
        )])?;
        let mut checks = outwards(true, false);
        checks.extend(ask_pod(&client.place(), &other, false));
        checks.extend(ask_pod(&other.place(), &client, false));
        all_as_expected(&checks)?;
        for (n, allowed) in [(0, true), (1, false)] {
            world_speaks_from(lab, &addresses, n)?;
            all_as_expected(&ask_pod(lab.underlay(), &client, allowed))
                .with_context(|| format!("from {n}"))?;
        }
        // A deny beats an allow, also where the allow is narrower.
        lab.apply(&[cnp(
            "default",
            "deny",
            json!({
                "endpointSelector": app("client"),
                "egressDeny": [{"toCIDR": ["198.51.0.0/16", "2001:db8::/32"]}],
            }),
        )])?;
        all_as_expected(&outwards(false, false))
    })
}

/// Waits for an event that fits.
fn wait_event(lab: &Lab, node: u8, what: &str, fits: impl Fn(&EventStatus) -> bool) -> Result<()> {
    wait_until(PATIENCE, what, || {
        let events = lab.node(node).policy_events()?;
        let last = events.last().cloned();
        ensure!(
            events.iter().any(&fits),
            "{} events, the last: {last:?}",
            events.len()
        );
        Ok(())
    })
}

#[test]
fn audit_mode_reports_and_forwards() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let mut server = lab.add_pod(PodSpec::new("server", 1))?;
        let guest = role(lab, "guest", "guest", 2)?;
        lab.apply(&[cnp(
            "default",
            "server",
            json!({"endpointSelector": app("server"), "ingress": [{}]}),
        )])?;
        let expect = |allowed| all_as_expected(&ask_pod(&guest.place(), &server, allowed));
        expect(false)?;
        let of_guest = |event: &EventStatus| {
            event
                .source
                .is_some_and(|source| guest.addresses().contains(&source.ip()))
        };
        wait_event(lab, 1, "the denial is reported", |event| {
            event.outcome == "dropped" && of_guest(event)
        })?;

        server.annotate(&[("warren.dev/policy-audit", "true")])?;
        lab.wait_in_force()?;
        all_as_expected(&ask_pod(&guest.place(), &server, true)).context("audit mode of the pod")?;
        wait_event(lab, 1, "the violation is reported", |event| {
            event.outcome == "audited" && of_guest(event)
        })?;

        server.annotate(&[])?;
        lab.wait_in_force()?;
        all_as_expected(&ask_pod(&guest.place(), &server, false)).context("no audit mode any more")?;

        let node = lab.node(1);
        lab.describe_node(&node, &[], &[("warren.dev/policy-audit", "true")])?;
        lab.wait_in_force()?;
        all_as_expected(&ask_pod(&guest.place(), &server, true)).context("audit mode of the node")?;
        lab.describe_node(&node, &[], &[])?;
        lab.wait_in_force()?;
        all_as_expected(&ask_pod(&guest.place(), &server, false)).context("no audit mode of the node")
    })?;
    let options = LabOptions {
        tune: |config| config.policy_audit = true,
        ..two_nodes(true)
    };
    Lab::run(options, |lab| {
        let server = lab.add_pod(PodSpec::new("server", 1))?;
        let guest = role(lab, "guest", "guest", 2)?;
        lab.apply(&default_deny("default"))?;
        all_as_expected(&ask_pod(&guest.place(), &server, true)).context("audit mode of the cluster")
    })
}

#[test]
fn a_pod_that_floods_hurts_nobody_but_itself() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let flooder = lab.add_pod(PodSpec::new("flooder", 1))?;
        let sink = lab.add_pod(PodSpec::new("sink", 2))?;
        let client = lab.add_pod(PodSpec::new("client", 1))?;
        let server = lab.add_pod(PodSpec::new("server", 2))?;
        let mut policies = default_deny("default");
        policies.push(allow("default", "flooder", "sink", 8080));
        policies.push(allow("default", "client", "server", 8080));
        lab.apply(&policies)?;
        let mut sessions = Vec::new();
        for (from, to) in [(&flooder, &sink), (&client, &server)] {
            for address in to.addresses() {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    sessions.push(Session::start(from, protocol, at(*address, 8080))?);
                }
            }
        }
        let node = lab.node(1);
        let drops = DropCounter::start(&node)?;
        for address in sink.addresses() {
            let to = at(*address, 8080).to_string();
            let app = flooder.place().app.to_string_lossy().into_owned();
            let text = flooder.place().run([app.as_str(), "flood", "--to", &to])?;
            let flooded: Flooded = serde_json::from_str(&text)?;
            ensure!(flooded.sent > 50_000, "{flooded:?}");
        }
        drops.wait_for(&node, &["flow-limit"], 1000)?;
        // What was there goes on, the flooder's own as well; others open what they like.
        sessions.iter_mut().try_for_each(Session::wait_progress)?;
        all_as_expected(&ask_pod(&client.place(), &server, true))?;
        all_as_expected(&ask_pod(&flooder.place(), &server, false))
    })
}
