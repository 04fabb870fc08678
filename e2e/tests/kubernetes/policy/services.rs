//! Policy is about pods, also where they are reached through a service: it is judged on the final address.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use warren_e2e::{
    app::ask::Protocol,
    cluster::{ProxyMode, Workload},
    lab::{net::node_address, wait::wait_until},
};

use super::town::{Town, service};
use crate::scene::{PATIENCE, Scene};

/// A NodePort with a backend on node1 only, behind masquerade.
const ONE: u16 = 30090;
/// A NodePort that only nodes with a backend serve, and with the client's address kept.
const KEPT: u16 = 30091;

const POLICY: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints:
    - matchExpressions: [{key: role, operator: In, values: [friend, careful]}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: careful, namespace: shop}
spec:
  endpointSelector: {matchLabels: {role: careful}}
  egress:
  - toEndpoints: [{matchLabels: {index: "1"}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
"#;

const TABLE: &str = "
    friend-1 friend-3 -> server-1:8080 server-2:8080 svc/all:80 svc/one:80 svc/sticky:80 yes
    friend-1 -> node1:30090 node1:30091 node1v6:30090 yes
    enemy-1 enemy-3 -> server-1:8080 server-2:8080 svc/all:80 svc/one:80 svc/sticky:80 no
    enemy-1 enemy-3 -> node1:30090 node2:30090 node3:30090 node1v6:30090 node1:30091 node2:30091 no
    careful -> svc/one:80 server-1:8080 yes
    careful -> svc/two:80 server-2:8080 friend-1:8080 no
    server-1 server-2 -> friend-1:8080 enemy-3:8080 yes
";

fn workloads() -> Vec<Workload> {
    let server = |n: u8| {
        Workload::new("shop", &format!("server-{n}"), &format!("node{n}"))
            .label("app", "server")
            .label("index", &n.to_string())
    };
    let client = |role: &str, n: u8| {
        Workload::new("shop", &format!("{role}-{n}"), &format!("node{n}")).label("role", role)
    };
    vec![
        server(1),
        server(2),
        client("friend", 1),
        client("friend", 3),
        client("enemy", 1),
        client("enemy", 3),
        Workload::new("shop", "careful", "node1").label("role", "careful"),
    ]
}

fn services() -> Vec<Value> {
    let all = json!({"app": "server"});
    let index = |n: &str| json!({"app": "server", "index": n});
    let with = |mut service: Value, changes: &[(&str, Value)]| {
        for (field, value) in changes {
            service["spec"][*field] = value.clone();
        }
        service
    };
    let http = |name: &str, selector: &Value| service("shop", name, selector, &[(80, 8080)]);
    let mut one = with(http("one-outside", &index("1")), &[("type", json!("NodePort"))]);
    one["spec"]["ports"][0]["nodePort"] = ONE.into();
    let mut kept = with(
        http("kept-outside", &all),
        &[
            ("type", json!("NodePort")),
            ("externalTrafficPolicy", json!("Local")),
        ],
    );
    kept["spec"]["ports"][0]["nodePort"] = KEPT.into();
    vec![
        http("all", &all),
        http("one", &index("1")),
        http("two", &index("2")),
        with(http("sticky", &all), &[("sessionAffinity", json!("ClientIP"))]),
        with(http("headless", &all), &[("clusterIP", json!("None"))]),
        one,
        kept,
    ]
}

pub(crate) fn services_with_policy(scene: &mut Scene) -> Result<()> {
    let mut town = Town::build(&scene.cluster, workloads(), &services())?;
    for number in 1..=3 {
        let [v4, v6] = node_address(number).both();
        town.name(&format!("node{number}"), v4);
        town.name(&format!("node{number}v6"), v6);
    }
    town.apply(POLICY)?;
    town.check("services with kube-proxy by nftables", TABLE)?;
    sticky(&town)?;
    headless(&town)?;
    town.raze()
}

/// The same with the other way to translate addresses.
pub(crate) fn services_with_iptables(scene: &mut Scene) -> Result<()> {
    scene.cluster.switch_proxies(ProxyMode::Iptables)?;
    let result = services_with_policy(scene);
    scene.cluster.switch_proxies(ProxyMode::Nftables)?;
    result
}

/// One client always gets the same server.
fn sticky(town: &Town<'_>) -> Result<()> {
    let friend = town.pods.get("friend-3").context("no friend")?;
    for address in town.addresses("svc/sticky")? {
        let mut servers = BTreeSet::new();
        for _ in 0..8 {
            servers.insert(friend.ask(Protocol::Tcp, (address, 80).into(), 64)?.name);
        }
        ensure!(servers.len() == 1, "{address} is answered by {servers:?}");
    }
    Ok(())
}

/// The name of a service without an address stands for its pods, which the table has asked.
fn headless(town: &Town<'_>) -> Result<()> {
    let servers = ["server-1", "server-2"].map(|name| town.addresses(name));
    wait_until(PATIENCE, "the headless service has its servers", || {
        let command = ["exec", "friend-1", "-n", "shop", "--", "nslookup", "-type=a"];
        let name = ["headless.shop.svc.cluster.local"];
        let text = town.cluster.kubectl(command.into_iter().chain(name))?;
        for addresses in &servers {
            let first = addresses.as_ref().ok().and_then(|all| all.first());
            let first = first.context("a server has no address")?.to_string();
            ensure!(text.contains(&first), "{first} is missing in: {text}");
        }
        Ok(())
    })
}
