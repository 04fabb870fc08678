//! Scenario C: an application stack in four namespaces; clients outside the cluster; service accounts.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use warren_e2e::{
    app::ask::Protocol,
    cluster::Workload,
    lab::{
        ask_from,
        net::{BRIDGE, node_address},
        wait::wait_until,
    },
};

use super::town::{Town, service};
use crate::scene::{PATIENCE, Scene};

fn workloads() -> Vec<Workload> {
    let app = |namespace: &str, name: &str, node: &str, role: &str| {
        Workload::new(namespace, name, node)
            .label("app", role)
            .label("role", role)
    };
    vec![
        app("frontend", "web", "node1", "frontend").ports(&[("http", 80), ("https", 443)]),
        app("backend", "backend-api", "node2", "backend-api"),
        app("backend", "batch", "node3", "batch"),
        app("database", "postgres", "node3", "postgres").ports(&[("sql", 5432)]),
        app("database", "flask", "node3", "flask-app"),
        app("database", "flask-far", "node1", "flask-app"),
        app("database", "debug", "node2", "debug"),
        app("kafka", "kafka", "node1", "kafka").ports(&[("kafka", 9092)]),
        app("kafka", "producer", "node2", "producer").label("kafka-client", "internal"),
        app("kafka", "stranger", "node1", "stranger"),
        // The same pod but for its account.
        app("backend", "trusted", "node1", "job").account("trusted"),
        app("backend", "untrusted", "node1", "job"),
    ]
}

const FRONTEND: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: frontend}
spec:
  endpointSelector: {matchLabels: {app: frontend}}
  ingress:
  - toPorts: [{ports: [{port: "443", protocol: TCP}]}]
"#;

const FRONTEND_FROM_CIDR: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: frontend}
spec:
  endpointSelector: {matchLabels: {app: frontend}}
  ingress:
  - fromCIDR: [10.0.0.0/24, "fd00:a::/64"]
    toPorts: [{ports: [{port: "443", protocol: TCP}]}]
"#;

const BACKEND: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: backend-api, namespace: backend}
spec:
  endpointSelector: {matchLabels: {app: backend-api}}
  ingress:
  - fromEndpoints:
    - matchLabels: {role: frontend, "k8s:io.kubernetes.pod.namespace": frontend}
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
"#;

const POSTGRES: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: postgres, namespace: database}
spec:
  endpointSelector: {matchLabels: {app: postgres}}
  ingress:
  - fromEndpoints:
    - matchLabels: {role: backend-api, "k8s:io.kubernetes.pod.namespace": backend}
    toPorts: [{ports: [{port: "5432", protocol: TCP}]}]
  egress: []
"#;

const FLASK: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: postgres, namespace: database}
spec:
  endpointSelector: {matchLabels: {app: postgres}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: flask-app}}]
    toPorts: [{ports: [{port: sql, protocol: TCP}]}]
"#;

const KAFKA: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: kafka, namespace: kafka}
spec:
  endpointSelector: {matchLabels: {app: kafka}}
  ingress:
  - fromEndpoints: [{matchLabels: {kafka-client: internal}}]
    toPorts: [{ports: [{port: "9092", protocol: TCP}]}]
  - fromCIDRSet: [{cidr: 10.20.30.0/24, except: [10.20.30.128/25]}, {cidr: "fd00:b::/64"}]
    toPorts: [{ports: [{port: "9092", protocol: TCP}]}]
"#;

const ACCOUNT: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: account, namespace: backend}
spec:
  endpointSelector: {matchLabels: {app: batch}}
  ingress:
  - fromEndpoints: [{matchLabels: {io.cilium.k8s.policy.serviceaccount: trusted}}]
"#;

const ALLOWED: &str = "
    backend-api trusted debug -> web:443 svc/web:443 yes
    backend-api trusted debug -> web:80 web:443/udp icmp/web no
    web -> backend-api:8080 svc/backend-api:8080 yes
    web -> backend-api:8080/udp icmp/backend-api no
    batch debug flask -> backend-api:8080 svc/backend-api:8080 no
    backend-api -> postgres:5432 svc/postgres:5432 yes
    web batch flask flask-far debug stranger -> postgres:5432 svc/postgres:5432 no
    backend-api -> postgres:5432/udp icmp/postgres no
    postgres -> backend-api:8080 debug:8080 flask:8080 svc/web:443 kafka:9092 icmp/debug no
    producer -> kafka:9092 svc/kafka:9092 yes
    stranger backend-api debug -> kafka:9092 svc/kafka:9092 no
    trusted -> batch:8080 batch:8080/udp icmp/batch yes
    untrusted web debug backend-api -> batch:8080 icmp/batch no
";

const FLASK_ALLOWED: &str = "
    flask flask-far -> postgres:5432 svc/postgres:5432 yes
    flask flask-far -> postgres:5432/udp icmp/postgres no
    debug batch backend-api stranger -> postgres:5432 svc/postgres:5432 no
    postgres -> debug:8080 flask:8080 yes
";

pub(crate) fn application_stack(scene: &mut Scene) -> Result<()> {
    let cluster = &scene.cluster;
    let objects = [
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "trusted", "namespace": "backend"}}),
        service(
            "frontend",
            "web",
            &json!({"app": "frontend"}),
            &[(443, 443), (80, 80)],
        ),
        service(
            "backend",
            "backend-api",
            &json!({"app": "backend-api"}),
            &[(8080, 8080)],
        ),
        service(
            "database",
            "postgres",
            &json!({"app": "postgres"}),
            &[(5432, 5432)],
        ),
        service("kafka", "kafka", &json!({"app": "kafka"}), &[(9092, 9092)]),
    ];
    let mut town = Town::build(cluster, workloads(), &objects)?;
    for policy in [FRONTEND, BACKEND, POSTGRES, KAFKA, ACCOUNT] {
        town.apply(policy)?;
    }
    town.check("each namespace's rules", ALLOWED)?;
    town.recreate()?;
    town.check("the same with new pods at new addresses", ALLOWED)?;
    town.apply(FLASK)?;
    town.check("a database only for the flask application", FLASK_ALLOWED)?;
    outside(&town)?;
    town.raze()
}

/// Clients outside the cluster, known by their addresses only.
fn outside(town: &Town<'_>) -> Result<()> {
    town.apply(FRONTEND_FROM_CIDR)?;
    town.check(
        "a pod is never in a CIDR",
        "backend-api trusted debug -> web:443 svc/web:443 no",
    )?;
    for (source, pod, port, passes) in [
        ("10.0.0.7", "web", 443, true),
        ("fd00:a::7", "web", 443, true),
        ("10.0.0.7", "web", 80, false),
        ("10.0.1.7", "web", 443, false),
        ("fd00:a:0:1::7", "web", 443, false),
        ("10.20.30.7", "kafka", 9092, true),
        ("fd00:b::7", "kafka", 9092, true),
        ("10.20.30.129", "kafka", 9092, false),
        ("10.20.31.7", "kafka", 9092, false),
    ] {
        from_outside(town, source.parse()?, pod, port, passes)
            .with_context(|| format!("{source} -> {pod}:{port}, should pass: {passes}"))?;
    }
    Ok(())
}

/// The world outside is the underlay's own network namespace, with an address for the purpose.
fn from_outside(town: &Town<'_>, source: IpAddr, pod: &str, port: u16, passes: bool) -> Result<()> {
    let world = town.cluster.underlay();
    let pod = town.pods.get(pod).with_context(|| format!("no pod {pod}"))?;
    let same_family = |address: &&IpAddr| address.is_ipv4() == source.is_ipv4();
    let to = *pod.addresses.iter().find(same_family).context("no address")?;
    let number: u8 = pod.node.trim_start_matches("node").parse()?;
    let gateways = node_address(number).both();
    let gateway = gateways.iter().find(same_family).context("no gateway")?;
    let length = if source.is_ipv4() { 32 } else { 128 };
    let add = [
        format!(
            "addr add {source}/{length} dev {BRIDGE}{}",
            if source.is_ipv6() { " nodad" } else { "" }
        ),
        format!("route add {to} via {gateway} src {source}"),
    ];
    world.ip(&add)?;
    let asked = wait_until(PATIENCE, "the policy holds", || {
        let answer = ask_from(world, Protocol::Tcp, (to, port).into(), 64, 1500);
        ensure!(answer.is_ok() == passes, "{answer:?}");
        if let Err(error) = answer {
            let why = format!("{error:#}");
            ensure!(!why.contains("refused"), "it was refused, not ignored: {why}");
        }
        Ok(())
    });
    world.ip(&[
        format!("route del {to}"),
        format!("addr del {source}/{length} dev {BRIDGE}"),
    ])?;
    asked
}
