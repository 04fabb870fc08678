//! Policy at work: who reaches whom, by pod address and by Service, on the same node and between nodes, over IPv4 and
//! IPv6. What is denied meets silence; what is allowed at the same time shows that the silence is policy's.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use warren_e2e::{
    app::{ask::Protocol, probe::Target},
    lab::{
        Check, KEYD_SOCKET, Lab, LabOptions, MainPlugin, Pod, PodSpec, ServiceSpec, all_as_expected,
        policies::{allow_dns, app, cnp, default_deny, knp, ports, scenario_b},
    },
    scenario::{DropCounter, answers_as, at, nothing_in_clear, two_nodes},
};

/// A pod of the application, in namespace `demo`.
fn tier(name: &str, node: u8, port: u16) -> PodSpec {
    PodSpec {
        namespace: "demo".into(),
        ports: vec![port],
        ..PodSpec::new(name, node)
    }
}

/// The pod that answers as DNS does: UDP and TCP on 53.
fn dns(node: u8) -> PodSpec {
    PodSpec {
        namespace: "kube-system".into(),
        labels: [("k8s-app".to_owned(), "kube-dns".to_owned())].into(),
        ports: vec![53],
        ..PodSpec::new("dns", node)
    }
}

fn port(name: &str) -> u16 {
    match name {
        "api" => 5000,
        "db" => 6379,
        "dns" => 53,
        _ => 8080,
    }
}

/// TCP and UDP to every address of a list.
fn both_protocols(addresses: &[IpAddr], port: u16) -> Vec<Target> {
    let ends = addresses.iter().map(|address| at(*address, port));
    ends.flat_map(|end: SocketAddr| [Target::Tcp(end), Target::Udp(end)])
        .collect()
}

/// Everybody to everybody, by address and by Service.
fn matrix(pods: &[&Pod], services: &[ServiceSpec], allowed: impl Fn(&str, &str) -> bool) -> Vec<Check> {
    let mut checks = Vec::new();
    for from in pods {
        for to in pods.iter().filter(|to| to.name() != from.name()) {
            let mut addresses = to.addresses().to_vec();
            for service in services.iter().filter(|service| service.name == to.name()) {
                addresses.extend(service.cluster.both());
            }
            for target in both_protocols(&addresses, port(to.name())) {
                checks.push(if allowed(from.name(), to.name()) {
                    Check::allowed(&from.place(), target, to.name())
                } else {
                    Check::denied(&from.place(), target, to.name())
                });
            }
        }
    }
    checks
}

fn services(pods: &[&Pod]) -> Vec<ServiceSpec> {
    (1..)
        .zip(pods)
        .map(|(number, pod)| {
            let port = port(pod.name());
            ServiceSpec::new(number, pod.name(), port, port, &[pod.addresses()])
        })
        .collect()
}

/// The rules of scenario B, seen from the pods of the namespace.
fn scenario_b_allows(from: &str, to: &str) -> bool {
    let inside = from != "dns";
    inside && (to == "dns" || to == "frontend" || matches!((from, to), ("frontend", "api") | ("api", "db")))
}

#[test]
fn default_deny_then_the_rules_of_scenario_b() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let capture = lab.capture()?;
        // Two placements: everybody far from everybody he talks to, then all on one node, with new addresses.
        for (round, nodes) in [[1, 2, 1, 2, 2], [1, 1, 1, 1, 1]].into_iter().enumerate() {
            let [f, a, d, c, n] = nodes;
            let pods = [
                lab.add_pod(tier("frontend", f, 8080))?,
                lab.add_pod(tier("api", a, 5000))?,
                lab.add_pod(tier("db", d, 6379))?,
                lab.add_pod(tier("client", c, 8080))?,
                lab.add_pod(dns(n))?,
            ];
            let list: Vec<&Pod> = pods.iter().collect();
            let services = services(&list);
            lab.serve(&services)?;
            if round == 0 {
                // Without policies everybody reaches everybody.
                all_as_expected(&matrix(&list, &services, |_, _| true))?;
                lab.apply(&default_deny("demo"))?;
                // DNS itself is in no policy, but nobody in the namespace lets it in.
                all_as_expected(&matrix(&list, &services, |_, _| false))?;
                lab.apply(&[allow_dns("demo")])?;
                all_as_expected(&matrix(&list, &services, |from, to| from != "dns" && to == "dns"))?;
                lab.apply(&scenario_b("demo"))?;
            }
            all_as_expected(&matrix(&list, &services, scenario_b_allows))?;
            for pod in pods {
                lab.delete_pod(pod)?;
            }
        }
        nothing_in_clear(&capture.finish()?)
    })
}

/// A server and two clients on each node, all in `default`.
fn friends_and_strangers(lab: &Lab) -> Result<(Pod, [Pod; 4])> {
    let server = lab.add_pod(PodSpec {
        ports: vec![8080, 9090],
        named_ports: vec![("web".into(), 8080)],
        ..PodSpec::new("server", 1)
    })?;
    let client = |name: &str, role: &str, node| {
        lab.add_pod(PodSpec {
            labels: [("role".to_owned(), role.to_owned())].into(),
            ..PodSpec::new(name, node)
        })
    };
    let clients = [
        client("friend1", "friend", 1)?,
        client("stranger1", "stranger", 1)?,
        client("friend2", "friend", 2)?,
        client("stranger2", "stranger", 2)?,
    ];
    Ok((server, clients))
}

/// Who reaches port 8080 and 9090 of the server, and who gets echoes back.
fn expect(server: &Pod, clients: &[Pod], allowed: impl Fn(&str, u16) -> bool, echo: bool) -> Result<()> {
    let mut checks = Vec::new();
    for client in clients {
        let from = client.place();
        for port in [8080, 9090] {
            for target in both_protocols(server.addresses(), port) {
                checks.push(if allowed(client.name(), port) {
                    Check::allowed(&from, target, "server")
                } else {
                    Check::denied(&from, target, "server")
                });
            }
        }
        for address in server.addresses() {
            let target = Target::Icmp(*address);
            checks.push(if echo {
                Check::allowed(&from, target, "server")
            } else {
                Check::denied(&from, target, "server")
            });
        }
    }
    all_as_expected(&checks)
}

fn is_friend(name: &str) -> bool {
    name.starts_with("friend")
}

#[test]
fn rules_of_every_kind_on_the_wire() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (server, clients) = friends_and_strangers(lab)?;
        let rule = |spec: Value| vec![cnp("default", "rule", spec)];
        let friend = json!([{"matchLabels": {"role": "friend"}}]);
        expect(&server, &clients, |_, _| true, true)?;

        // An empty section is default deny.
        lab.apply(&rule(json!({"endpointSelector": app("server"), "ingress": []})))?;
        expect(&server, &clients, |_, _| false, false)?;
        // L3 only: all ports and protocols of friends.
        lab.apply(&rule(
            json!({"endpointSelector": app("server"), "ingress": [{"fromEndpoints": friend}]}),
        ))?;
        let mut checks = Vec::new();
        for client in &clients {
            for target in both_protocols(server.addresses(), 9090) {
                checks.push(if is_friend(client.name()) {
                    Check::allowed(&client.place(), target, "server")
                } else {
                    Check::denied(&client.place(), target, "server")
                });
            }
        }
        all_as_expected(&checks)?;
        // L4 only: one port, anybody; then by its name, for TCP and UDP alike.
        lab.apply(&rule(
            json!({"endpointSelector": app("server"), "ingress": [{"toPorts": ports(8080)}]}),
        ))?;
        expect(&server, &clients, |_, port| port == 8080, false)?;
        // Deny beats allow.
        lab.apply(&rule(json!({
            "endpointSelector": app("server"),
            "ingress": [{"fromEntities": ["all"]}],
            "ingressDeny": [{"fromEndpoints": [{"matchLabels": {"role": "stranger"}}], "toPorts": ports(9090)}],
        })))?;
        expect(
            &server,
            &clients,
            |name, port| port == 8080 || is_friend(name),
            true,
        )?;
        // Echo requests and nothing else.
        lab.apply(&rule(json!({
            "endpointSelector": app("server"),
            "ingress": [{"icmps": [{"fields": [{"family": "IPv4", "type": 8}, {"family": "IPv6", "type": 128}]}]}],
        })))?;
        expect(&server, &clients, |_, _| false, true)?;
        // A rule that exempts itself from default deny closes nothing.
        lab.apply(&rule(json!({
            "endpointSelector": app("server"),
            "enableDefaultDeny": {"ingress": false},
            "ingress": [{"fromEndpoints": friend}],
        })))?;
        expect(&server, &clients, |_, _| true, true)?;
        lab.withdraw(&rule(json!({})))?;

        // Kubernetes' own kind, by namespace and pod, with a named port (TCP only).
        let policy = knp(
            "default",
            "rule",
            json!({
                "podSelector": app("server"),
                "policyTypes": ["Ingress"],
                "ingress": [{
                    "from": [{
                        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "default"}},
                        "podSelector": {"matchLabels": {"role": "friend"}},
                    }],
                    "ports": [{"port": "web", "protocol": "TCP"}],
                }],
            }),
        );
        lab.apply(std::slice::from_ref(&policy))?;
        let mut checks = Vec::new();
        for client in &clients {
            for address in server.addresses() {
                let web = at(*address, 8080);
                let from = client.place();
                checks.push(if is_friend(client.name()) {
                    Check::allowed(&from, Target::Tcp(web), "server")
                } else {
                    Check::denied(&from, Target::Tcp(web), "server")
                });
                checks.push(Check::denied(&from, Target::Udp(web), "server"));
            }
        }
        all_as_expected(&checks)?;
        lab.withdraw(&[policy])?;
        expect(&server, &clients, |_, _| true, true)
    })
}

#[test]
fn service_accounts_and_namespaces_count_labels_cannot_imitate_them() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let server = lab.add_pod(PodSpec::new("server", 1))?;
        let pod = |name: &str, account: &str, namespace: &str, label: (&str, &str)| {
            lab.add_pod(PodSpec {
                namespace: namespace.into(),
                service_account: account.into(),
                labels: [(label.0.to_owned(), label.1.to_owned())].into(),
                ..PodSpec::new(name, 2)
            })
        };
        let payer = pod("payer", "payments", "default", ("app", "x"))?;
        // It says that it is what it is not, in every way that a label can.
        let liar = pod(
            "liar",
            "default",
            "default",
            ("io.cilium.k8s.policy.serviceaccount", "payments"),
        )?;
        let outsider = pod(
            "outsider",
            "payments",
            "demo",
            ("io.kubernetes.pod.namespace", "default"),
        )?;
        lab.apply(&[cnp(
            "default",
            "account",
            json!({
                "endpointSelector": app("server"),
                "ingress": [{"fromEndpoints": [{"matchLabels": {"io.cilium.k8s.policy.serviceaccount": "payments"}}]}],
            }),
        )])?;
        let mut checks = Vec::new();
        for target in both_protocols(server.addresses(), 8080) {
            checks.push(Check::allowed(&payer.place(), target, "server"));
            checks.push(Check::denied(&liar.place(), target, "server"));
            checks.push(Check::denied(&outsider.place(), target, "server"));
        }
        all_as_expected(&checks)
    })
}

#[test]
fn large_messages_pass_where_policy_allows_them() -> Result<()> {
    // 64 KiB datagrams are fragments, and path MTU discovery needs ICMP errors to come back: both belong to a flow
    // that policy allows, though no rule names them.
    Lab::run(two_nodes(true), |lab| {
        let client = lab.add_pod(PodSpec::new("client", 1))?;
        let near = lab.add_pod(PodSpec::new("near", 1))?;
        let far = lab.add_pod(PodSpec::new("far", 2))?;
        let mut policies = default_deny("default");
        for server in ["near", "far"] {
            policies.push(warren_e2e::lab::policies::allow(
                "default", "client", server, 8080,
            ));
        }
        lab.apply(&policies)?;
        for server in [&near, &far] {
            for address in server.addresses() {
                for size in [1400, 64 << 10] {
                    answers_as(&client, Protocol::Udp, *address, size, server.name())?;
                    answers_as(&client, Protocol::Tcp, *address, size, server.name())?;
                }
                let report = client.transfer(*address, 4 << 20)?;
                ensure!(report.corrupt_at.is_none(), "{report:?}");
            }
        }
        // And nothing else does.
        let mut checks = Vec::new();
        for target in both_protocols(client.addresses(), 8080) {
            checks.push(Check::denied(&far.place(), target, "client"));
            checks.push(Check::denied(&near.place(), target, "client"));
        }
        all_as_expected(&checks)
    })
}

#[test]
fn every_drop_is_counted_under_its_reason() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let (server, clients) = friends_and_strangers(lab)?;
        let node = lab.node(1);
        let deny_all = |checks: &mut Vec<Check>| {
            for target in both_protocols(server.addresses(), 8080) {
                checks.push(Check::denied(&clients[3].place(), target, "server"));
            }
        };
        for (spec, reason) in [
            (
                json!({"endpointSelector": app("server"), "ingress": [{}]}),
                "default-deny",
            ),
            (
                json!({"endpointSelector": app("server"), "ingressDeny": [{"fromEntities": ["all"]}]}),
                "policy",
            ),
        ] {
            lab.apply(&[cnp("default", "rule", spec)])?;
            let counter = DropCounter::start(&node)?;
            let mut checks = Vec::new();
            deny_all(&mut checks);
            all_as_expected(&checks)?;
            // Two protocols in two families, each tried at least twice.
            counter.wait_for(&node, &[reason], 8)?;
        }
        Ok(())
    })
}

/// What the command line says about an allowed and a denied connection, and about where policy is enforced.
#[test]
fn the_command_line_explains_what_happens() -> Result<()> {
    let options = LabOptions {
        plugins: vec![MainPlugin::Ptp],
        ..two_nodes(true)
    };
    Lab::run(options, |lab| {
        let (_server, clients) = friends_and_strangers(lab)?;
        lab.apply(&[cnp(
            "default",
            "rule",
            json!({
                "endpointSelector": app("server"),
                "ingress": [{"fromEndpoints": [{"matchLabels": {"role": "friend"}}], "toPorts": ports(8080)}],
            }),
        )])?;
        let warren = |arguments: &[&str]| {
            let mut command = vec!["warren"];
            command.extend(arguments);
            command.extend(["-o", "json", "--keyd-socket", KEYD_SOCKET]);
            let output = lab.node(1).place().output(command)?;
            let code = output.status.code();
            let value: Value = serde_json::from_slice(&output.stdout)
                .map_err(|e| anyhow::anyhow!("{e}: {}", String::from_utf8_lossy(&output.stderr)))?;
            anyhow::Ok((code, value))
        };
        for client in &clients {
            let from = format!("default/{}", client.name());
            let arguments = [
                "policy",
                "trace",
                "--from",
                &from,
                "--to",
                "default/server",
                "--port",
            ];
            for (port, allowed) in [("8080", is_friend(client.name())), ("9090", false)] {
                let (code, value) = warren(&[&arguments[..], &[port]].concat())?;
                let expected = if allowed {
                    (Some(0), "allowed")
                } else {
                    (Some(1), "denied")
                };
                ensure!(
                    code == expected.0 && value["verdict"] == expected.1,
                    "{from} {port}: {code:?} {value:#}"
                );
                let ways = value["ways"].as_array().map_or(0, Vec::len);
                ensure!(ways == 2, "{value:#}");
                if allowed {
                    let rule = value["ways"][0]["ingress"]["maps"]["rule"]
                        .as_str()
                        .unwrap_or_default();
                    ensure!(rule.contains("default/rule spec.ingress[0]"), "{value:#}");
                }
            }
        }
        // A host reaches its own pods, and only those.
        for (from, expected) in [("host:node1", "allowed"), ("host:node2", "denied")] {
            let command = [
                "policy",
                "trace",
                "--from",
                from,
                "--to",
                "default/server",
                "--port",
                "8080",
            ];
            let (_, value) = warren(&command)?;
            ensure!(value["verdict"] == expected, "{from}: {value:#}");
        }
        let (code, value) = warren(&["endpoint", "list"])?;
        let rows = value["endpoints"].as_array().cloned().unwrap_or_default();
        let find = |pod: Value| rows.iter().find(|row| row["pod"] == pod);
        ensure!(code == Some(0) && rows.len() == 7, "{value:#}");
        let server = find("default/server".into()).cloned().unwrap_or_default();
        ensure!(
            server["ingress"] == "enabled" && server["egress"] == "disabled",
            "{server:#}"
        );
        let friend = find("default/friend1".into()).cloned().unwrap_or_default();
        ensure!(
            friend["ingress"] == "disabled" && friend["egress"] == "disabled",
            "{friend:#}"
        );
        let (_, identities) = warren(&["identity", "list"])?;
        let friends: Vec<_> = identities
            .as_array()
            .into_iter()
            .flatten()
            .filter(|identity| identity["labels"]["k8s:role"] == "friend")
            .collect();
        ensure!(
            friends.len() == 1,
            "one identity for equal labels: {identities:#}"
        );
        ensure!(
            friends[0]["pods"].as_array().map(Vec::len) == Some(2),
            "{friends:#?}"
        );
        Ok(())
    })
}
