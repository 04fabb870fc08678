//! Policy through a real keyd with a folder of manifests, and what an operator sees of it.

#[expect(dead_code, reason = "the hostile suite uses the rest")]
mod support;

use std::{collections::BTreeSet, fs};

use support::{Agent, Keyd, node, pod};
use tonic::Code;
use warren_keyd_api::{
    admin,
    convert::Record,
    proto::{
        Answer, AskAgentRequest, DirectoryRequest, EntryKind, PoliciesRequest, agent_message::Body as Say,
        keyd_message::Body as Heard,
    },
    snapshot::Directory,
};
use warren_model::{
    IdentityId,
    policy::{NamedPorts, PolicyRef, SelectorId},
};

const WEB: &str = "---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
    - fromEndpoints: [{matchLabels: {app: api}}]
      toPorts: [{ports: [{port: '8080', protocol: TCP}]}]
    - fromCIDRSet: [{cidrGroupRef: office}]
";

const OTHERS: &str = "---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: bad, namespace: shop}
spec: {endpointSelector: {}, ingress: [{fromCIDR: [nonsense]}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: l7, namespace: shop}
spec:
  endpointSelector: {}
  ingress: [{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{method: GET}]}}]}]
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: nodes}
spec: {nodeSelector: {}, ingress: [{fromEntities: [cluster]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec: {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress]}
---
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {name: office}
spec: {externalCIDRs: [192.0.2.0/24]}
";

/// The names of the policies in a directory. Panics where a rule names a selector that is not there.
fn policies(directory: &Directory) -> BTreeSet<String> {
    let records: Vec<_> = directory.records().map(Result::unwrap).collect();
    let selectors: BTreeSet<SelectorId> = records
        .iter()
        .filter_map(|record| match record {
            Record::Selector(id, _) => Some(*id),
            _ => None,
        })
        .collect();
    let mut names = BTreeSet::new();
    for record in records {
        if let Record::Policy(PolicyRef { name, .. }, rules) = record {
            let named = rules.iter().flat_map(|rule| rule.selectors());
            assert!(
                named.into_iter().all(|id| selectors.contains(id)),
                "{name} names a stranger"
            );
            names.insert(name);
        }
    }
    names
}

fn is_member(directory: &Directory, identity: u32) -> bool {
    directory.records().flatten().any(|record| match record {
        Record::Members(_, _, members) => members.contains(&IdentityId(identity)),
        _ => false,
    })
}

fn names<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

#[tokio::test]
async fn policies_are_part_of_the_first_snapshot_and_changes_follow() {
    let base = [node(1), pod("web", None), pod("api", None)].concat();
    let mut keyd = Keyd::start(&[&base, WEB, OTHERS].concat());
    let enrolment = keyd.enroll("node1").await;
    let mut agent = Agent::connect(&keyd.address, "node1", &enrolment).await;
    assert_eq!(policies(&agent.directory), names(["web", "l7", "nodes", "db"]));
    let facts = agent
        .directory
        .records()
        .flatten()
        .any(|record| matches!(record, Record::NodeFacts(..)));
    assert!(facts);

    // The answer to an ADD comes after its identity and memberships.
    let identity = agent.add("api", "u1", "10.244.1.5").await.identity;
    assert!(identity >= 256 && is_member(&agent.directory, identity));

    let one = WEB.replace("8080", "8081").replace("name: web", "name: more");
    keyd.manifests(&[&base, WEB, &one, OTHERS].concat());
    agent
        .until_directory(|directory| policies(directory).contains("more"))
        .await;
    keyd.manifests(&[&base, WEB].concat());
    agent
        .until_directory(|directory| policies(directory) == names(["web"]))
        .await;
    // A file that is being written is not believed: what it held stays in force.
    keyd.manifests(&[&base, WEB, "---\n{"].concat());
    keyd.status_where("the file is broken", |status| !status.problems.is_empty())
        .await;
    assert_eq!(policies(&agent.directory), names(["web"]));

    // A new term: no agent sees a directory without the policies that exist.
    keyd.manifests(&[&base, WEB, OTHERS].concat());
    keyd.restart();
    let agent = Agent::connect(&keyd.address, "node1", &enrolment).await;
    assert_eq!(policies(&agent.directory), names(["web", "l7", "nodes", "db"]));
    assert!(is_member(&agent.directory, identity));
}

#[tokio::test]
async fn operators_see_every_policy_and_the_directory() {
    let keyd = Keyd::start(&[&node(1), WEB, OTHERS].concat());
    let agent = keyd.agent("node1").await;
    let mut admin = admin::connect(&keyd.socket()).await.unwrap();
    let told = admin
        .policies(PoliciesRequest {})
        .await
        .unwrap()
        .into_inner()
        .policies;
    let of = |name: &str| told.iter().find(|policy| policy.name == name).unwrap();
    assert_eq!(told.len(), 5);
    assert_eq!(
        (of("web").valid, of("web").message.as_str()),
        (true, "The policy is enforced.")
    );
    assert_eq!(
        (of("nodes").kind.as_str(), of("nodes").namespace.as_str()),
        ("CiliumClusterwideNetworkPolicy", "")
    );
    assert!(
        !of("bad").valid && of("bad").message.contains("spec.ingress[0].fromCIDR[0]"),
        "{:?}",
        of("bad")
    );
    assert!(
        of("l7").valid
            && of("l7")
                .message
                .contains("HTTP rules cannot be enforced yet: denied")
    );

    let status = keyd.status().await;
    assert_eq!((status.policies, status.invalid_policies), (5, 1));
    assert!(status.selectors > 0 && status.problems.iter().any(|problem| problem.contains("shop/bad")));

    for kinds in [vec![], vec![EntryKind::EntryPolicy, EntryKind::EntrySelector]] {
        let request = DirectoryRequest {
            kinds: kinds.iter().map(|kind| i32::from(*kind)).collect(),
        };
        let mut chunks = admin.directory(request).await.unwrap().into_inner();
        let mut entries = vec![];
        while let Some(chunk) = chunks.message().await.unwrap() {
            assert_eq!((chunk.epoch, chunk.version), agent.directory.position());
            entries.extend(chunk.entries);
        }
        let wanted = |kind: i32| kinds.is_empty() || kinds.iter().any(|k| i32::from(*k) == kind);
        let expected: Vec<_> = agent
            .directory
            .entries()
            .iter()
            .filter(|e| wanted(e.kind))
            .collect();
        assert_eq!(entries, expected);
    }
    let unknown = admin
        .directory(DirectoryRequest { kinds: vec![99] })
        .await
        .unwrap_err();
    assert_eq!(unknown.code(), Code::InvalidArgument);
}

async fn ask(keyd: &Keyd, node: &str) -> Result<String, tonic::Status> {
    let request = AskAgentRequest {
        node: node.into(),
        request_json: r#"{"request":"endpoints"}"#.into(),
    };
    let mut admin = admin::connect(&keyd.socket()).await.unwrap();
    admin
        .ask_agent(request)
        .await
        .map(|response| response.into_inner().response_json)
}

#[tokio::test]
async fn an_operator_can_ask_an_agent_through_keyd() {
    let keyd = Keyd::start(&[node(1), node(2)].concat());
    let mut agent = keyd.agent("node1").await;
    let question = |heard| match heard {
        Heard::Question(question) => Some(question),
        _ => None,
    };
    let answer = |id, response: &str, error: &str| {
        Say::Answer(Answer {
            id,
            response_json: response.into(),
            error: error.into(),
        })
    };

    let agent_answers = async {
        let asked = agent.until(question).await.unwrap();
        assert_eq!(asked.request_json, r#"{"request":"endpoints"}"#);
        // Nobody asked this one.
        agent.stream.send(answer(asked.id + 7, "stray", "")).await;
        agent.stream.send(answer(asked.id, "[]", "")).await;
    };
    let (response, ()) = tokio::join!(ask(&keyd, "node1"), agent_answers);
    assert_eq!(response.unwrap(), "[]");

    let agent_refuses = async {
        let asked = agent.until(question).await.unwrap();
        agent.stream.send(answer(asked.id, "", "not for you")).await;
    };
    let (response, ()) = tokio::join!(ask(&keyd, "node1"), agent_refuses);
    let refused = response.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(refused.message(), "the agent refuses: not for you");

    let silent = ask(&keyd, "node1").await.unwrap_err();
    assert_eq!(silent.code(), Code::DeadlineExceeded, "{}", silent.message());
    // Too late: nobody waits any more.
    let late = agent.until(question).await.unwrap();
    agent.stream.send(answer(late.id, "late", "")).await;

    let unknown = ask(&keyd, "node9").await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{}", unknown.message());
    let away = ask(&keyd, "node2").await.unwrap_err();
    assert_eq!(away.code(), Code::Unavailable);
    assert!(
        away.message().contains("node2 is not connected"),
        "{}",
        away.message()
    );

    let agent_leaves = async {
        agent.until(question).await.unwrap();
        drop(agent);
    };
    let (response, ()) = tokio::join!(ask(&keyd, "node1"), agent_leaves);
    let left = response.unwrap_err();
    assert_eq!(left.code(), Code::Unavailable, "{}", left.message());
    assert_eq!(left.message(), "the agent left before it answered: try again");
}

#[tokio::test]
async fn a_pods_ports_audit_mode_and_labels_come_from_its_manifest() {
    let web = "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: web\n  namespace: shop\n  \
               labels: {app: web, pod-template-hash: a}\n  annotations: {warren.dev/policy-audit: 'true'}\n\
               spec: {containers: [{name: a, ports: [{name: http, containerPort: 8080}]}]}\n";
    let keyd = Keyd::start(&[&node(1), web].concat());
    let mut agent = keyd.agent("node1").await;
    let identity = agent.add("web", "u1", "10.244.1.5").await.identity;
    let records: Vec<_> = agent.directory.records().map(Result::unwrap).collect();
    let labels = records.iter().find_map(|record| match record {
        Record::Identity(number, labels) if number.0 == identity => Some(labels.clone()),
        _ => None,
    });
    let labels = labels.unwrap();
    assert_eq!(
        NamedPorts::of(&labels).labels().collect::<Vec<_>>(),
        [("port:http".into(), "TCP/8080".into())]
    );
    assert!(labels.0.contains_key("k8s:app") && !labels.0.contains_key("k8s:pod-template-hash"));
    assert!(
        records
            .iter()
            .any(|record| matches!(record, Record::Workload(w) if w.policy_audit))
    );

    // Other labels: the pod moves to its new identity, and the old one stays for a while.
    let manifest = fs::read_to_string(keyd.dir.path().join("m/cluster.yaml")).unwrap();
    keyd.manifests(&manifest.replace("app: web", "app: web2"));
    let moved = |directory: &Directory| {
        directory.records().flatten().find_map(|record| match record {
            Record::Workload(workload) if workload.identity.0 != identity => Some(workload.identity),
            _ => None,
        })
    };
    agent
        .until_directory(|directory| moved(directory).is_some())
        .await;
    let numbers: BTreeSet<_> = agent
        .directory
        .records()
        .flatten()
        .filter_map(|record| match record {
            Record::Identity(number, _) => Some(number),
            _ => None,
        })
        .collect();
    assert_eq!(
        numbers,
        [IdentityId(identity), moved(&agent.directory).unwrap()].into()
    );
}
