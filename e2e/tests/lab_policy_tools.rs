//! The tools of the policy tests, without Warren: a filter of the pod's own stands for policy, so that every tool is
//! seen to tell the difference that it is for.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use warren_e2e::{
    app::{
        ask::Protocol,
        probe::{Outcome, Target},
    },
    lab::{Check, Hammer, Lab, LabOptions, Pod, PodSpec, ServiceSpec, Session, all_as_expected, check},
    scenario::at,
};

fn plain(nodes: u8) -> LabOptions {
    LabOptions {
        nodes,
        warren: false,
        ..LabOptions::default()
    }
}

/// A filter in front of a pod's port 8080.
fn filter(pod: &Pod, verdict: &str) -> Result<()> {
    let rules = format!(
        "add table inet test; flush table inet test; \
         add chain inet test in {{ type filter hook input priority 0; }}; \
         add rule inet test in meta l4proto {{ tcp, udp }} th dport 8080 {verdict}"
    );
    pod.place().run(["nft", &rules]).map(drop)
}

#[test]
fn checks_tell_answers_and_silence_apart() -> Result<()> {
    Lab::run(plain(2), |lab| {
        let client = lab.add_pod(PodSpec::new("client", 1))?;
        let server = lab.add_pod(PodSpec {
            ports: vec![8080, 9090],
            watched: true,
            ..PodSpec::new("server", 2)
        })?;
        filter(&server, "drop")?;
        let (from, mut checks) = (client.place(), Vec::new());
        for address in server.addresses() {
            for target in [Target::Tcp, Target::Udp] {
                checks.push(Check::denied(&from, target(at(*address, 8080)), "server"));
                checks.push(Check::allowed(&from, target(at(*address, 9090)), "server"));
            }
            checks.push(Check::allowed(&from, Target::Icmp(*address), "server"));
        }
        all_as_expected(&checks)?;
        // Silence without anything allowed beside it.
        let alone: Vec<_> = checks
            .iter()
            .filter(|check| check.expected.is_none())
            .cloned()
            .collect();
        all_as_expected(&alone)?;
        // What was denied was seen to arrive, masqueraded by the CNI plugin: the filter is behind the counters.
        let arrivals = server.arrivals()?;
        for v6 in [false, true] {
            for protocol in ["tcp", "udp"] {
                let found = arrivals
                    .keys()
                    .any(|(source, p, port)| source.is_ipv6() == v6 && p == protocol && *port == 8080);
                ensure!(found, "{protocol} {v6}: {arrivals:?}");
            }
        }
        filter(&server, "accept")?;
        let answered = check(&alone)?;
        ensure!(
            answered
                .iter()
                .all(|c| c.outcome == Outcome::Answered("server".into()) && !c.good()),
            "{answered:?}"
        );
        Ok(())
    })
}

#[test]
fn sessions_stall_and_go_on() -> Result<()> {
    Lab::run(plain(1), |lab| {
        let client = lab.add_pod(PodSpec::new("client", 1))?;
        let server = lab.add_pod(PodSpec::new("server", 1))?;
        let mut sessions = Vec::new();
        for address in server.addresses() {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                sessions.push(Session::start(&client, protocol, at(*address, 8080))?);
            }
        }
        filter(&server, "drop")?;
        sessions.iter_mut().try_for_each(Session::wait_stalled)?;
        filter(&server, "accept")?;
        sessions.iter_mut().try_for_each(Session::wait_progress)
    })
}

#[test]
fn services_lead_to_their_backends_from_everywhere() -> Result<()> {
    Lab::run(plain(2), |lab| {
        let near = lab.add_pod(PodSpec::new("near", 1))?;
        let far = lab.add_pod(PodSpec::new("far", 2))?;
        let one = |number, name: &str, backend: &Pod, node_port| ServiceSpec {
            node_port,
            ..ServiceSpec::new(number, name, 80, 8080, &[backend.addresses()])
        };
        let services = [
            one(1, "near", &near, Some(30_001)),
            one(2, "far", &far, Some(30_002)),
        ];
        lab.serve(&services)?;
        let nodes = lab.nodes();
        let mut checks = Vec::new();
        for from in [near.place(), far.place(), nodes[0].place()] {
            for (service, name) in services.iter().zip(["near", "far"]) {
                for v6 in [false, true] {
                    let cluster: SocketAddr = at(service.address(v6), 80);
                    let port = service.node_port.unwrap_or_default();
                    let node: IpAddr = warren_e2e::lab::net::node_address(1).both()[usize::from(v6)];
                    for to in [cluster, at(node, port)] {
                        checks.push(Check::allowed(&from, Target::Tcp(to), name));
                        checks.push(Check::allowed(&from, Target::Udp(to), name));
                    }
                }
            }
        }
        all_as_expected(&checks)
    })
}

#[test]
fn a_hammered_pod_is_met_from_its_first_moment() -> Result<()> {
    Lab::run(plain(1), |lab| {
        let client = lab.add_pod(PodSpec::new("client", 1))?;
        let [v4, v6]: [IpAddr; 2] = ["10.244.1.77".parse()?, "fd00:10:244:1::77".parse()?];
        let hammer = Hammer::start(&client, &[at(v4, 8080), at(v6, 8080)])?;
        let (IpAddr::V4(v4), IpAddr::V6(v6)) = (v4, v6) else {
            anyhow::bail!("the families are mixed up")
        };
        let server = lab.add_pod(PodSpec {
            addresses: Some(warren_e2e::lab::net::DualStack { v4, v6 }),
            watched: true,
            ..PodSpec::new("server", 1)
        })?;
        let arrivals = server.arrivals()?;
        let report = hammer.finish()?;
        ensure!(arrivals.len() == 4, "{arrivals:?}");
        ensure!(
            report.len() == 2 && report.iter().all(|r| r.datagrams > 0 && r.connections > 0),
            "{report:?}"
        );
        Ok(())
    })
}
