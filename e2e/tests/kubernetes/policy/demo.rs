//! Scenario B: a three-tier application, from default deny to exactly what it needs.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use warren_e2e::{cluster::Workload, lab::wait::wait_until};

use super::town::{Town, service};
use crate::scene::{PATIENCE, Scene};

/// Two of each tier on different nodes, so that every pair of tiers meets on one node and across nodes.
fn workloads() -> Vec<Workload> {
    let tier = |name: &str, node: &str, app: &str, port| {
        Workload::new("demo", name, node)
            .label("app", app)
            .ports(&[(app, port)])
    };
    vec![
        tier("frontend-1", "node1", "frontend", 8080),
        tier("frontend-2", "node2", "frontend", 8080),
        tier("api-1", "node2", "api", 5000),
        tier("api-2", "node3", "api", 5000),
        tier("db-1", "node3", "db", 6379),
        tier("db-2", "node1", "db", 6379),
        tier("visitor", "node1", "visitor", 8080),
        // The same labels in another namespace are another identity.
        Workload::new("elsewhere", "impostor", "node2").label("app", "frontend"),
    ]
}

const DENY_INGRESS: &str = r"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: deny-ingress, namespace: demo}
spec:
  endpointSelector: {}
  ingress: [{}]
";

const DENY_EGRESS: &str = r"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: deny-egress, namespace: demo}
spec:
  endpointSelector: {}
  egress: [{}]
";

const DNS: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: dns, namespace: demo}
spec:
  endpointSelector: {}
  egress:
  - toEndpoints:
    - matchLabels:
        k8s:io.kubernetes.pod.namespace: kube-system
        k8s:k8s-app: kube-dns
    toPorts:
    - ports:
      - {port: "53", protocol: UDP}
      - {port: "53", protocol: TCP}
"#;

const TIERS: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: frontend, namespace: demo}
spec:
  endpointSelector: {matchLabels: {app: frontend}}
  ingress:
  - fromEndpoints: [{}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
  egress:
  - toEndpoints: [{matchLabels: {app: api}}]
    toPorts: [{ports: [{port: "5000", protocol: TCP}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: demo}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: frontend}}]
    toPorts: [{ports: [{port: "5000", protocol: TCP}]}]
  egress:
  - toEndpoints: [{matchLabels: {app: db}}]
    toPorts: [{ports: [{port: "6379", protocol: TCP}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: db, namespace: demo}
spec:
  endpointSelector: {matchLabels: {app: db}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: api}}]
    toPorts: [{ports: [{port: "6379", protocol: TCP}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: visitor, namespace: demo}
spec:
  endpointSelector: {matchLabels: {app: visitor}}
  egress:
  - toEndpoints: [{}]
"#;

const EVERYWHERE: &str = r"
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: deny-everywhere}
spec:
  endpointSelector: {}
  ingress: [{}]
  egress: [{}]
";

const OPEN: &str = "
    frontend-1 frontend-2 -> api-1:5000 api-2:5000/udp svc/api:5000 db-1:6379 svc/db:6379 icmp/db-2 yes
    api-1 api-2 -> db-1:6379 db-2:6379 frontend-1:8080 svc/frontend:80 yes
    visitor -> frontend-1:8080 frontend-2:8080 api-1:5000 db-1:6379 svc/db:6379 yes
    impostor -> frontend-1:8080 api-1:5000 svc/db:6379 yes
    db-1 -> impostor:8080 visitor:8080 icmp/impostor yes
";

const CLOSED: &str = "
    frontend-1 frontend-2 -> api-1:5000 api-2:5000/udp svc/api:5000 db-1:6379 svc/db:6379 icmp/db-2 no
    api-1 api-2 -> db-1:6379 db-2:6379 frontend-1:8080 svc/frontend:80 no
    visitor -> frontend-1:8080 frontend-2:8080 api-1:5000 db-1:6379 svc/db:6379 no
    impostor -> frontend-1:8080 frontend-2:8080 api-1:5000 svc/db:6379 icmp/api-2 no
    db-1 -> impostor:8080 visitor:8080 icmp/impostor no
";

/// CoreDNS is another application, in another namespace.
const NO_DNS: &str = "frontend-1 frontend-2 visitor -> dns:53 dns6:53 dns:53/udp dns6:53/udp no";

const ALLOWED: &str = "
    frontend-1 frontend-2 -> api-1:5000 api-2:5000 svc/api:5000 yes
    frontend-1 frontend-2 -> db-1:6379 db-2:6379 svc/db:6379 api-1:5000/udp icmp/api-1 icmp/api-2 no
    api-1 api-2 -> db-1:6379 db-2:6379 svc/db:6379 yes
    api-1 api-2 -> frontend-1:8080 svc/frontend:80 no
    api-1 -> api-2:5000 api-2:5000/udp icmp/api-2 no
    visitor -> frontend-1:8080 frontend-2:8080 svc/frontend:80 yes
    visitor -> api-1:5000 api-2:5000 svc/api:5000 db-1:6379 svc/db:6379 frontend-1:8080/udp no
    impostor -> frontend-1:8080 svc/frontend:80 api-1:5000 api-2:5000 svc/api:5000 db-2:6379 no
    db-1 db-2 -> api-1:5000 api-2:5000 svc/frontend:80 impostor:8080 icmp/impostor no
";

pub(crate) fn three_tiers(scene: &mut Scene) -> Result<()> {
    let cluster = &scene.cluster;
    let services = [
        service("demo", "frontend", &json!({"app": "frontend"}), &[(80, 8080)]),
        service("demo", "api", &json!({"app": "api"}), &[(5000, 5000)]),
        service("demo", "db", &json!({"app": "db"}), &[(6379, 6379)]),
    ];
    let mut town = Town::build(cluster, workloads(), &services)?;
    for (name, address) in ["dns", "dns6"].into_iter().zip(cluster.dns_addresses()) {
        town.name(name, address);
    }
    town.check("without policy everything is open", OPEN)?;
    wait_names(&town)?;

    town.apply(DENY_INGRESS)?;
    town.check(
        "default deny for ingress",
        CLOSED.split("    db-1").next().unwrap_or_default(),
    )?;
    town.apply(DENY_EGRESS)?;
    town.check("default deny for both directions", CLOSED)?;
    town.check("no name can be looked up", NO_DNS)?;
    printed_as_documented(&town)?;

    town.apply(DNS)?;
    wait_names(&town)?;
    town.check("DNS alone opens nothing else", CLOSED)?;

    town.apply(TIERS)?;
    town.check("each tier reaches the next", ALLOWED)?;
    town.recreate()?;
    town.check("the same with new pods at new addresses", ALLOWED)?;
    wait_names(&town)?;
    // kubelet's probes pass all the while: otherwise pods would not be ready.
    cluster.wait_pods(PATIENCE)?;

    for policy in [TIERS, DNS, DENY_EGRESS, DENY_INGRESS] {
        town.delete(policy)?;
    }
    town.check("without policy everything is open again", OPEN)?;
    town.apply(EVERYWHERE)?;
    town.check("default deny in every namespace", CLOSED)?;
    town.delete(EVERYWHERE)?;
    town.check("and open once more", OPEN)?;
    town.raze()
}

fn wait_names(town: &Town<'_>) -> Result<()> {
    wait_until(PATIENCE, "names resolve", || {
        for pod in ["frontend-1", "api-2"] {
            let found = town.resolves(pod, "api.demo.svc.cluster.local")?;
            ensure!(found, "{pod} cannot");
        }
        Ok(())
    })
}

/// `kubectl get cnp` shows NAME, AGE and VALID.
fn printed_as_documented(town: &Town<'_>) -> Result<()> {
    wait_until(PATIENCE, "the policies are valid", || {
        let text = town.cluster.kubectl(["get", "cnp", "-n", "demo"])?;
        let mut lines = text.lines();
        let header: Vec<_> = lines.next().context("nothing")?.split_whitespace().collect();
        ensure!(header == ["NAME", "AGE", "VALID"], "{text}");
        for name in ["deny-ingress", "deny-egress"] {
            let line = text.lines().find(|line| line.starts_with(name));
            let valid = line.and_then(|line| line.split_whitespace().last());
            ensure!(valid == Some("True"), "{text}");
        }
        Ok(())
    })
}
