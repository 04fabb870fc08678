//! The rest of scenarios B and C that is about addresses and ports, and what a host may open.

use anyhow::Result;
use serde_json::{Value, json};
use warren_e2e::{
    app::{ask::Protocol, probe::Target},
    lab::{
        Check, Lab, Place, Pod, PodSpec, ServiceSpec, Session, all_as_expected,
        policies::{ccnp, cnp, ports},
    },
    scenario::{PATIENCE, at, two_nodes},
};

fn namespaced(
    lab: &Lab,
    namespace: &str,
    name: &str,
    labels: &[(&str, &str)],
    node: u8,
    ports: &[u16],
) -> Result<Pod> {
    let labels = labels.iter().map(|(key, value)| ((*key).into(), (*value).into()));
    lab.add_pod(PodSpec {
        namespace: namespace.into(),
        labels: labels.collect(),
        ports: ports.to_vec(),
        ..PodSpec::new(name, node)
    })
}

/// TCP and UDP to every address of a pod.
fn ask(from: &Place, to: &Pod, port: u16, allowed: bool) -> Vec<Check> {
    let ends = to.addresses().iter().map(|address| at(*address, port));
    ends.flat_map(|end| [Target::Tcp(end), Target::Udp(end)])
        .map(|target| {
            if allowed {
                Check::allowed(from, target, to.name())
            } else {
                Check::denied(from, target, to.name())
            }
        })
        .collect()
}

fn ask_service(from: &Place, service: &ServiceSpec, allowed: bool) -> Vec<Check> {
    let ends = service.cluster.both().map(|address| at(address, service.port));
    ends.into_iter()
        .flat_map(|end| [Target::Tcp(end), Target::Udp(end)])
        .map(|target| {
            if allowed {
                Check::allowed(from, target, &service.name)
            } else {
                Check::denied(from, target, &service.name)
            }
        })
        .collect()
}

/// Scenario C: the database opens nothing itself, answers whom it may, and is reached by nobody else, from its own and
/// from other namespaces, by address and by Service.
#[test]
fn a_database_answers_and_opens_nothing() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        for namespace in ["database", "backend"] {
            lab.manifests().namespace(namespace)?;
        }
        let postgres = namespaced(
            lab,
            "database",
            "postgres",
            &[("app", "postgres")],
            1,
            &[5432, 8080],
        )?;
        let flask = namespaced(lab, "database", "flask", &[("app", "flask-app")], 2, &[8080])?;
        let debug = namespaced(lab, "database", "debug", &[("app", "debug")], 1, &[8080])?;
        let api = namespaced(lab, "backend", "api", &[("role", "backend-api")], 2, &[8080])?;
        // The right label in the wrong namespace.
        let twin = namespaced(lab, "backend", "twin", &[("app", "flask-app")], 1, &[8080])?;
        let service = ServiceSpec::new(9, "postgres", 5432, 5432, &[postgres.addresses()]);
        lab.serve(std::slice::from_ref(&service))?;
        lab.apply(&[cnp(
            "database",
            "postgres",
            json!({
                "endpointSelector": {"matchLabels": {"app": "postgres"}},
                "ingress": [
                    {"fromEndpoints": [{"matchLabels": {"app": "flask-app"}}], "toPorts": ports(5432)},
                    {
                        "fromEndpoints": [{"matchLabels": {
                            "k8s:io.kubernetes.pod.namespace": "backend",
                            "role": "backend-api",
                        }}],
                        "toPorts": ports(5432),
                    },
                ],
                "egress": [],
            }),
        )])?;
        let mut session = Session::start(&api, Protocol::Tcp, at(postgres.address(true)?, 5432))?;
        let mut checks = Vec::new();
        for (pod, allowed) in [(&flask, true), (&api, true), (&debug, false), (&twin, false)] {
            checks.extend(ask(&pod.place(), &postgres, 5432, allowed));
            checks.extend(ask(&pod.place(), &postgres, 8080, false));
            checks.extend(ask_service(&pod.place(), &service, allowed));
            // It cannot open anything, not even to those who may open connections to it.
            checks.extend(ask(&postgres.place(), pod, 8080, false));
        }
        checks.extend(ask(&debug.place(), &flask, 8080, true));
        all_as_expected(&checks)?;
        session.wait_progress()
    })
}

/// Scenario B: default deny for all namespaces; what a namespace opens itself is open.
#[test]
fn default_deny_for_all_namespaces() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let pods = [
            namespaced(lab, "default", "one", &[("app", "one")], 1, &[8080])?,
            namespaced(lab, "demo", "two", &[("app", "two")], 2, &[8080])?,
            namespaced(lab, "kube-system", "three", &[("app", "three")], 1, &[8080])?,
        ];
        let everybody = |allowed: &dyn Fn(&str, &str) -> bool| {
            let mut checks = Vec::new();
            for from in &pods {
                for to in pods.iter().filter(|to| to.name() != from.name()) {
                    checks.extend(ask(&from.place(), to, 8080, allowed(from.name(), to.name())));
                }
            }
            checks
        };
        all_as_expected(&everybody(&|_, _| true))?;
        let deny = ccnp(
            "default-deny",
            json!({"endpointSelector": {}, "ingress": [{}], "egress": [{}]}),
        );
        lab.apply(std::slice::from_ref(&deny))?;
        all_as_expected(&everybody(&|_, _| false))?;
        let namespace = |name: &str| json!([{"matchLabels": {"k8s:io.kubernetes.pod.namespace": name}}]);
        let open = [
            cnp(
                "default",
                "out",
                json!({"endpointSelector": {}, "egress": [{"toEndpoints": namespace("demo")}]}),
            ),
            cnp(
                "demo",
                "in",
                json!({"endpointSelector": {}, "ingress": [{"fromEndpoints": namespace("default")}]}),
            ),
        ];
        lab.apply(&open)?;
        all_as_expected(&everybody(&|from, to| (from, to) == ("one", "two")))?;
        lab.withdraw(&open)?;
        lab.withdraw(&[deny])?;
        all_as_expected(&everybody(&|_, _| true))
    })
}

/// Host policy in the other direction: what the node itself opens.
#[test]
fn host_policy_limits_what_a_node_opens() -> Result<()> {
    Lab::run(two_nodes(true), |lab| {
        let guarded = lab.node(2);
        lab.describe_node(&guarded, &[("role", "guarded")], &[])?;
        let near = namespaced(lab, "default", "near", &[("app", "near")], 2, &[8080])?;
        let friend = namespaced(lab, "default", "friend", &[("app", "friend")], 1, &[8080])?;
        let stranger = namespaced(lab, "default", "stranger", &[("app", "stranger")], 1, &[8080])?;
        let to = |pod: &Pod, allowed| ask(&guarded.place(), pod, 8080, allowed);
        let all = |stranger_allowed| {
            let mut checks = to(&friend, true);
            checks.extend(to(&stranger, stranger_allowed));
            checks.extend(ask(&near.place(), &stranger, 8080, true));
            checks.extend(ask(&lab.node(1).place(), &stranger, 8080, true));
            checks
        };
        all_as_expected(&all(true))?;
        let endpoints = |name: &str| -> Value {
            json!([{"matchLabels": {"k8s:io.kubernetes.pod.namespace": "default", "app": name}}])
        };
        lab.apply(&[ccnp(
            "guard",
            json!({
                "nodeSelector": {"matchLabels": {"role": "guarded"}},
                "egress": [
                    // keyd: without it the agent would work from its disk.
                    {"toEntities": ["remote-node"], "toPorts": [{"ports": [{"port": "4250", "protocol": "TCP"}]}]},
                    {"toEndpoints": endpoints("friend"), "toPorts": ports(8080)},
                ],
            }),
        )])?;
        all_as_expected(&all(false))?;
        // WireGuard is exempt, keyd is allowed: the mesh lives.
        guarded.kill_agent()?;
        guarded.start_agent()?;
        lab.wait_ready(PATIENCE)?;
        all_as_expected(&all(false))
    })
}
