//! Policy over time: changes reach flows that exist, labels move pods without loss, and no restart, missing agent or
//! missing keyd opens anything.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use warren_e2e::{
    app::{ask::Protocol, probe::Target},
    lab::{
        Check, Hammer, Lab, Pod, PodSpec, Session, all_as_expected,
        net::DualStack,
        policies::{app, cnp, ports},
    },
    scenario::{Flows, PATIENCE, at, nothing_in_clear, two_nodes},
};

/// `server` accepts what a rule says; everything else of the namespace is open.
fn server_accepts(ingress: Value) -> Vec<Value> {
    vec![cnp(
        "default",
        "server",
        json!({"endpointSelector": app("server"), "ingress": ingress}),
    )]
}

fn role(name: &str) -> Value {
    json!({"fromEndpoints": [{"matchLabels": {"role": name}}], "toPorts": ports(8080)})
}

fn client(lab: &Lab, name: &str, role: &str, node: u8) -> Result<Pod> {
    lab.add_pod(PodSpec {
        labels: BTreeMap::from([("role".into(), role.into())]),
        ..PodSpec::new(name, node)
    })
}

/// A conversation per protocol and family.
fn sessions(from: &Pod, to: &Pod) -> Result<Vec<Session>> {
    let mut sessions = Vec::new();
    for address in to.addresses() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            sessions.push(Session::start(from, protocol, at(*address, 8080))?);
        }
    }
    Ok(sessions)
}

/// Checks of one client against the server.
fn checks(client: &Pod, server: &Pod, allowed: bool) -> Vec<Check> {
    let ends = server.addresses().iter().map(|address| at(*address, 8080));
    ends.flat_map(|end| [Target::Tcp(end), Target::Udp(end)])
        .map(|target| {
            if allowed {
                Check::allowed(&client.place(), target, server.name())
            } else {
                Check::denied(&client.place(), target, server.name())
            }
        })
        .collect()
}

#[test]
fn a_policy_change_judges_established_flows_again() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let server = lab.add_pod(PodSpec::new("server", 1))?;
        let clients = [client(lab, "near", "guest", 1)?, client(lab, "far", "guest", 2)?];
        let friends = [
            client(lab, "near-friend", "friend", 1)?,
            client(lab, "far-friend", "friend", 2)?,
        ];
        let (mut guests, mut kept) = (Vec::new(), Vec::new());
        for pod in &clients {
            guests.extend(sessions(pod, &server)?);
        }
        for pod in &friends {
            kept.extend(sessions(pod, &server)?);
        }
        // Denied by default, let in again, denied expressly, let in again by taking the policy away.
        let steps = [
            (server_accepts(json!([role("friend")])), false),
            (server_accepts(json!([role("friend"), role("guest")])), true),
            (
                vec![cnp(
                    "default",
                    "server",
                    json!({
                        "endpointSelector": app("server"),
                        "ingress": [{"fromEntities": ["all"]}],
                        "ingressDeny": [role("guest")],
                    }),
                )],
                false,
            ),
        ];
        for (policies, open) in &steps {
            lab.apply(policies)?;
            for session in &mut guests {
                if *open {
                    session.wait_progress()?;
                } else {
                    session.wait_stalled()?;
                }
            }
            kept.iter_mut().try_for_each(Session::wait_progress)?;
        }
        lab.withdraw(&steps[0].0)?;
        guests
            .iter_mut()
            .chain(&mut kept)
            .try_for_each(Session::wait_progress)?;

        // The same at the other end: egress of the client.
        let egress = [cnp(
            "default",
            "guests",
            json!({"endpointSelector": {"matchLabels": {"role": "guest"}}, "egress": [{}]}),
        )];
        lab.apply(&egress)?;
        guests.iter_mut().try_for_each(Session::wait_stalled)?;
        kept.iter_mut().try_for_each(Session::wait_progress)?;
        lab.withdraw(&egress)?;
        guests
            .iter_mut()
            .chain(&mut kept)
            .try_for_each(Session::wait_progress)
    })
}

#[test]
fn a_label_change_moves_a_pod_without_losing_permitted_flows() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let server = lab.add_pod(PodSpec::new("server", 1))?;
        let mut pods = [
            client(lab, "near", "friend", 1)?,
            client(lab, "far", "friend", 2)?,
        ];
        lab.apply(&server_accepts(json!([role("friend")])))?;
        let flows = pods
            .iter()
            .map(|pod| Flows::start(pod, &server))
            .collect::<Result<Vec<_>>>()?;
        let mut talks = Vec::new();
        for pod in &pods {
            talks.extend(sessions(pod, &server)?);
        }
        // Other labels, another identity, as friendly as before.
        for round in ["1", "2", "3"] {
            for pod in &mut pods {
                pod.relabel(&[("role", "friend"), ("version", round)])?;
            }
            lab.wait_in_force()?;
            talks.iter_mut().try_for_each(Session::wait_progress)?;
        }
        for flow in flows {
            flow.finish_without_loss()?;
        }
        // And now not friendly any more.
        for pod in &mut pods {
            pod.relabel(&[("role", "stranger")])?;
        }
        lab.wait_in_force()?;
        talks.iter_mut().try_for_each(Session::wait_stalled)?;
        for pod in &pods {
            all_as_expected(&checks(pod, &server, false))?;
        }
        Ok(())
    })
}

#[test]
fn nothing_opens_while_agents_or_keyd_are_away() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let capture = lab.capture()?;
        let server = lab.add_pod(PodSpec {
            watched: true,
            ..PodSpec::new("server", 1)
        })?;
        let friends = [
            client(lab, "near-friend", "friend", 1)?,
            client(lab, "far-friend", "friend", 2)?,
        ];
        let strangers = [
            client(lab, "near", "stranger", 1)?,
            client(lab, "far", "stranger", 2)?,
        ];
        lab.apply(&server_accepts(json!([role("friend")])))?;
        let flows = friends
            .iter()
            .map(|pod| Flows::start(pod, &server))
            .collect::<Result<Vec<_>>>()?;
        let ends: Vec<SocketAddr> = server
            .addresses()
            .iter()
            .map(|address| at(*address, 8080))
            .collect();
        let hammers = strangers
            .iter()
            .map(|pod| Hammer::start(pod, &ends))
            .collect::<Result<Vec<_>>>()?;
        let judge = |what: &str| {
            let friends = friends.iter().flat_map(|pod| checks(pod, &server, true));
            let all: Vec<_> = friends
                .chain(strangers.iter().flat_map(|pod| checks(pod, &server, false)))
                .collect();
            all_as_expected(&all).with_context(|| what.to_owned())
        };
        judge("before")?;
        for n in [1, 2] {
            let node = lab.node(n);
            node.kill_agent()?;
            judge("with an agent killed")?;
            node.start_agent()?;
            lab.wait_ready(PATIENCE)?;
            judge("with a new agent")?;
            node.stop_agent()?;
            judge("with an agent stopped")?;
            node.start_agent()?;
            lab.wait_ready(PATIENCE)?;
        }
        let first = lab.node(1);
        first.stop_keyd()?;
        judge("without keyd")?;
        // An agent that starts without keyd lives from its disk.
        first.kill_agent()?;
        first.start_agent()?;
        judge("with an agent that starts without keyd")?;
        first.start_keyd()?;
        lab.wait_ready(PATIENCE)?;
        judge("with everything back")?;
        for flow in flows {
            flow.finish_without_loss()?;
        }
        for hammer in hammers {
            let reports = hammer.finish()?;
            ensure!(
                reports
                    .iter()
                    .all(|r| r.datagrams_answered == 0 && r.connections_accepted == 0),
                "{reports:?}"
            );
            ensure!(
                reports.iter().all(|r| r.datagrams > 100 && r.connections > 100),
                "{reports:?}"
            );
        }
        nobody_else_arrived(&server, &friends)?;
        nothing_in_clear(&capture.finish()?)
    })
}

/// Every packet that has reached the server came from one of these.
fn nobody_else_arrived(server: &Pod, allowed: &[Pod]) -> Result<()> {
    let arrivals = server.arrivals()?;
    let known: Vec<IpAddr> = allowed.iter().flat_map(|pod| pod.addresses().to_vec()).collect();
    ensure!(!arrivals.is_empty(), "the counters saw nothing at all");
    let others: Vec<_> = arrivals
        .iter()
        .filter(|((from, ..), _)| !known.contains(from))
        .collect();
    ensure!(
        others.is_empty(),
        "packets of others reached {}: {others:?}",
        server.name()
    );
    Ok(())
}

#[test]
fn a_new_pod_is_closed_until_its_policy_is_complete() -> Result<()> {
    const STARTS: u8 = 50;
    Lab::run(two_nodes(true), |lab| {
        let friend = client(lab, "friend", "friend", 2)?;
        let strangers = [
            client(lab, "near", "stranger", 1)?,
            client(lab, "far", "stranger", 2)?,
        ];
        lab.apply(&server_accepts(json!([role("friend")])))?;
        for start in 0..STARTS {
            let name = format!("server{start}");
            let addresses = DualStack {
                v4: Ipv4Addr::new(10, 244, 1, 100 + start),
                v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 1, u16::from(start)),
            };
            let ends = addresses.both().map(|address| at(address, 8080));
            let hammers = strangers
                .iter()
                .map(|pod| Hammer::start(pod, &ends))
                .collect::<Result<Vec<_>>>()?;
            let server = lab.add_pod(PodSpec {
                labels: BTreeMap::from([
                    ("app".into(), "server".into()),
                    ("start".into(), start.to_string()),
                ]),
                addresses: Some(addresses),
                watched: true,
                ..PodSpec::new(&name, 1)
            })?;
            // It serves whom it must; the strangers have been trying since before it was there.
            all_as_expected(&checks(&friend, &server, true)).with_context(|| name.clone())?;
            for hammer in hammers {
                let reports = hammer.finish()?;
                ensure!(
                    reports
                        .iter()
                        .all(|r| r.datagrams_answered == 0 && r.connections_accepted == 0),
                    "{name}: {reports:?}"
                );
            }
            nobody_else_arrived(&server, std::slice::from_ref(&friend)).with_context(|| name.clone())?;
            lab.delete_pod(server)?;
        }
        Ok(())
    })
}
