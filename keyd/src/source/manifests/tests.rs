//! A folder in a temporary directory, scanned by hand.

use super::*;

struct Lab {
    dir: tempfile::TempDir,
    folder: Folder,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path().to_owned(), dir.path().join("requests"), "test").unwrap();
        Self { dir, folder }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    /// Scans twice, so that deletions are believed; the problems are the second reading's.
    fn settle(&mut self) -> (Vec<String>, Vec<String>) {
        let (mut events, _) = self.folder.scan();
        let (more, problems) = self.folder.scan();
        events.extend(more);
        (events.iter().map(short).collect(), problems)
    }
}

fn short(event: &SourceEvent) -> String {
    match event {
        SourceEvent::NodeUpsert(node) => format!("+node {}", node.name),
        SourceEvent::NodeDelete(name) => format!("-node {name}"),
        SourceEvent::NamespaceUpsert(namespace) => format!("+ns {}", namespace.name),
        SourceEvent::NamespaceDelete(name) => format!("-ns {name}"),
        SourceEvent::PodUpsert(pod) => format!("+pod {}/{}", pod.namespace, pod.name),
        SourceEvent::PodDelete { namespace, name } => format!("-pod {namespace}/{name}"),
        SourceEvent::PolicyUpsert { policy, outcome } => {
            format!("+{policy} {}", if outcome.is_ok() { "valid" } else { "invalid" })
        }
        SourceEvent::PolicyDelete(policy) => format!("-{policy}"),
        SourceEvent::CidrGroupUpsert { name, outcome } => {
            format!("+group {name} {}", outcome.as_ref().map_or(0, Vec::len))
        }
        SourceEvent::CidrGroupDelete(name) => format!("-group {name}"),
        SourceEvent::ApiServers(addresses) => format!("api servers {addresses:?}"),
        SourceEvent::RotationUpsert(rotation) => format!("+rotation {}", rotation.name),
        SourceEvent::RotationDelete(name) => format!("-rotation {name}"),
        SourceEvent::Synced => "synced".into(),
    }
}

fn node(name: &str) -> String {
    format!("apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\nspec:\n  podCIDRs: [10.244.1.0/24]\n")
}

fn pod(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: shop\n  labels: {{app: web}}\nspec:\n  containers: []\n"
    )
}

#[test]
fn documents_of_several_files_and_formats_are_read() {
    let mut lab = Lab::new();
    lab.write(
        "a.yaml",
        &format!("# nodes\n---\n{}---\n{}", node("node1"), node("node2")),
    );
    lab.write("b.yml", &pod("web"));
    lab.write("c.json", r#"{"apiVersion":"v1","kind":"List","items":[{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"shop"}}]}"#);
    lab.write("notes.txt", "not a manifest");
    lab.write(
        "other.yaml",
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n",
    );
    let (events, problems) = lab.settle();
    assert_eq!(
        events,
        ["+ns shop", "+node node1", "+node node2", "+pod shop/web"]
    );
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!(lab.settle().0, Vec::<String>::new(), "nothing changed");
}

#[test]
fn a_malformed_document_is_one_sentence_and_hides_no_other() {
    let mut lab = Lab::new();
    lab.write(
        "a.yaml",
        &format!("{}---\nkind: [unclosed\n---\n{}", node("node1"), pod("web")),
    );
    let (events, problems) = lab.settle();
    assert_eq!(events, ["+node node1", "+pod shop/web"]);
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].starts_with("manifest a.yaml, line "), "{problems:?}");
    assert!(!problems[0].contains('\n'));
    lab.write(
        "b.yaml",
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: node9\nspec:\n  podCIDRs: [10.244.1.0/99]\n",
    );
    lab.write(
        "c.yaml",
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: ../evil\n",
    );
    let (events, problems) = lab.settle();
    assert_eq!(events, Vec::<String>::new());
    assert_eq!(problems.len(), 3, "{problems:?}");
}

#[test]
fn a_wrong_type_names_its_line() {
    let (_, problems) = parse_file(
        "a.yaml",
        "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: x\n  labels: 7\n",
        "test",
    );
    assert_eq!(problems.len(), 1);
    assert!(
        problems[0].starts_with("manifest a.yaml, line 6: "),
        "{problems:?}"
    );
}

#[test]
fn a_file_that_stops_parsing_keeps_its_last_good_content() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &format!("{}---\n{}", node("node1"), node("node2")));
    lab.settle();
    for partial in [
        "",
        "apiVersion: v1\nkind: No",
        "kind: [",
        &format!("{}---\nkind: {{", node("node1")),
    ] {
        lab.write("a.yaml", partial);
        let (events, _) = lab.settle();
        assert_eq!(events, Vec::<String>::new(), "{partial:?}");
    }
    lab.write("a.yaml", &node("node1"));
    let (events, problems) = lab.settle();
    assert_eq!(events, ["-node node2"]);
    assert_eq!(problems, Vec::<String>::new());
}

#[test]
fn a_vanished_file_deletes_its_objects_but_not_at_once() {
    let mut lab = Lab::new();
    lab.write("a.yaml", &node("node1"));
    lab.settle();
    fs::remove_file(lab.dir.path().join("a.yaml")).unwrap();
    assert_eq!(lab.folder.scan().0, []);
    lab.write("b.yaml", &pod("web"));
    let (events, _) = lab.folder.scan();
    assert_eq!(
        events.iter().map(short).collect::<Vec<_>>(),
        ["-node node1", "+pod shop/web"]
    );
    // A file that is moved away and back between two readings was never gone.
    fs::rename(lab.dir.path().join("b.yaml"), lab.dir.path().join("b")).unwrap();
    assert_eq!(lab.folder.scan().0, []);
    fs::rename(lab.dir.path().join("b"), lab.dir.path().join("b.yaml")).unwrap();
    assert_eq!(lab.folder.scan().0, []);
    assert_eq!(lab.folder.scan().0, []);
}

#[test]
fn an_object_in_two_files_is_the_first_files() {
    let mut lab = Lab::new();
    lab.write("b.yaml", &node("node1").replace("10.244.1.0", "10.244.9.0"));
    lab.settle();
    lab.write("c.yaml", &node("node1"));
    let (events, problems) = lab.settle();
    assert_eq!(events, Vec::<String>::new());
    assert_eq!(
        problems,
        ["manifest c.yaml: Node node1 is already in b.yaml; that one counts"]
    );
}

#[test]
fn derived_uids_depend_on_name_and_file() {
    assert_eq!(derived_uid("a", "f"), derived_uid("a", "f"));
    assert_ne!(derived_uid("a", "f"), derived_uid("b", "f"));
    assert_ne!(derived_uid("a", "f"), derived_uid("a", "g"));
}

#[test]
fn policies_and_groups_are_read_and_a_wrong_one_is_told_as_wrong() {
    let policy = |name: &str, ingress: &str| {
        format!(
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec:\n  endpointSelector: {{}}\n  ingress: {ingress}\n"
        )
    };
    let network_policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: web}\n\
                          spec: {podSelector: {}, ingress: [{ports: [{port: 8080}]}]}\n";
    let group = "apiVersion: cilium.io/v2\nkind: CiliumCIDRGroup\nmetadata: {name: office}\n\
                 spec: {externalCIDRs: [10.0.0.0/8, '2001:db8::/32']}\n";
    let mut lab = Lab::new();
    let all = [
        policy("good", "[{}]"),
        policy("bad", "nonsense"),
        network_policy.into(),
        group.into(),
    ];
    lab.write("policies.yaml", &all.join("---\n"));
    let (mut events, problems) = lab.settle();
    events.sort();
    assert_eq!(
        events,
        [
            "+CiliumNetworkPolicy shop/bad invalid",
            "+CiliumNetworkPolicy shop/good valid",
            "+NetworkPolicy default/web valid",
            "+group office 2",
        ]
    );
    assert_eq!(
        problems,
        Vec::<String>::new(),
        "what is wrong with a policy is said with the policy"
    );
    lab.write("policies.yaml", &policy("bad", "[{}]"));
    let (mut events, _) = lab.settle();
    events.sort();
    assert_eq!(
        events,
        [
            "+CiliumNetworkPolicy shop/bad valid",
            "-CiliumNetworkPolicy shop/good",
            "-NetworkPolicy default/web",
            "-group office",
        ]
    );
}
