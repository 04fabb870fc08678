//! What is published of objects, and what is said of them.

use warren_model::policy::{
    Action, AddressScope, Direction, Directions, LabelKey, PolicyKind, Ports, Requirement, Subject,
};

use super::*;
use crate::core::tests::config;

fn policy(name: &str) -> PolicyRef {
    PolicyRef {
        kind: PolicyKind::CiliumNetworkPolicy,
        namespace: "shop".into(),
        name: name.into(),
    }
}

fn app(name: &str) -> Selector {
    Selector::new([Requirement::is(LabelKey::parse("app"), name)])
}

fn rule(name: &str, peers: Vec<Peer>) -> Rule {
    Rule {
        policy: policy(name),
        subject: Subject::Pods(app(name)),
        default_deny: Directions {
            ingress: true,
            egress: false,
        },
        statements: vec![Statement {
            place: "spec.ingress[0]".into(),
            direction: Direction::Ingress,
            action: Action::Allow,
            peers: Peers::These(peers),
            ports: Ports::All,
            unenforced: Vec::new(),
        }],
    }
}

fn kinds(changes: &[PolicyChange]) -> Vec<&'static str> {
    let kind = |change: &PolicyChange| match change {
        PolicyChange::Selector { .. } => "selector",
        PolicyChange::Members(_) => "members",
        PolicyChange::Rules { .. } => "rules",
        PolicyChange::Removed(_) => "removed",
        PolicyChange::SelectorGone(_) => "gone",
        PolicyChange::Validity { .. } => "validity",
    };
    changes.iter().map(kind).collect()
}

#[test]
fn selectors_come_before_rules_and_go_after_them() {
    let mut repository = PolicyRepository::new(config());
    let web = rule("web", vec![Peer::Selector(app("api"))]);
    let changes = repository.upsert(&policy("web"), Ok(vec![web.clone()]));
    assert_eq!(kinds(&changes), ["selector", "selector", "rules", "validity"]);
    assert!(
        repository.upsert(&policy("web"), Ok(vec![web])).is_empty(),
        "telling twice changes nothing"
    );
    let other = rule("web", vec![Peer::Selector(app("db"))]);
    let changes = repository.upsert(&policy("web"), Ok(vec![other]));
    assert_eq!(kinds(&changes), ["selector", "rules", "gone"]);
    assert_eq!(kinds(&repository.snapshot()), ["selector", "selector", "rules"]);
    assert_eq!(
        kinds(&repository.remove(&policy("web"))),
        ["removed", "gone", "gone"]
    );
    assert!(repository.remove(&policy("web")).is_empty() && repository.selectors().is_empty());
}

#[test]
fn a_bad_object_enforces_nothing_and_touches_no_other() {
    let mut repository = PolicyRepository::new(config());
    repository.upsert(&policy("web"), Ok(vec![rule("web", vec![])]));
    let before = repository.snapshot();
    let fault = PolicyError::new("spec.ingress[0]", "is wrong");
    let changes = repository.upsert(&policy("bad"), Err(fault.clone()));
    assert_eq!(kinds(&changes), ["validity"]);
    assert_eq!(repository.snapshot(), before);
    let validity = repository.validity(&policy("bad")).unwrap();
    assert!(
        !validity.valid && validity.message.starts_with("spec.ingress[0]: is wrong."),
        "{validity:?}"
    );
    // A good object that turns bad stops being enforced, and says why.
    let changes = repository.upsert(&policy("web"), Err(fault));
    assert_eq!(kinds(&changes), ["removed", "gone", "validity"]);
    let changes = repository.upsert(&policy("web"), Ok(vec![rule("web", vec![])]));
    assert_eq!(kinds(&changes), ["selector", "rules", "validity"]);
}

#[test]
fn groups_are_resolved_and_followed() {
    let mut repository = PolicyRepository::new(config());
    let except: IpNet = "10.1.0.0/16".parse().unwrap();
    let office = Peer::Cidr(CidrSet {
        source: CidrSource::Group("office".into()),
        except: vec![except],
        scope: AddressScope::World,
    });
    repository.upsert(&policy("web"), Ok(vec![rule("web", vec![office])]));
    repository.upsert(&policy("api"), Ok(vec![rule("api", vec![])]));
    let validity = repository.validity(&policy("web")).unwrap();
    assert!(
        validity.valid && validity.message.contains("CiliumCIDRGroup office does not exist"),
        "{validity:?}"
    );
    let prefixes = vec!["10.0.0.0/8".parse().unwrap(), "192.168.0.0/24".parse().unwrap()];
    let changes = repository.set_group("office", Some(Ok(prefixes.clone())));
    assert_eq!(kinds(&changes), ["rules", "validity"]);
    let PolicyChange::Rules { rules, .. } = &changes[0] else {
        panic!()
    };
    let sets: Vec<_> = rules[0].statements[0].cidrs().collect();
    assert!(sets[0].contains("10.2.0.1".parse().unwrap()) && !sets[0].contains("10.1.0.1".parse().unwrap()));
    assert!(sets[1].contains("192.168.0.1".parse().unwrap()) && sets[1].except.is_empty());
    assert!(repository.set_group("office", Some(Ok(prefixes))).is_empty());
    assert!(repository.set_group("nobody", None).is_empty());
    assert_eq!(
        kinds(&repository.set_group("office", None)),
        ["rules", "validity"]
    );
}

#[test]
fn identities_change_only_selectors_that_they_match() {
    let mut repository = PolicyRepository::new(config());
    repository.upsert(
        &policy("web"),
        Ok(vec![rule("web", vec![Peer::Selector(app("api"))])]),
    );
    let api = Labels([("k8s:app".to_owned(), "api".to_owned())].into());
    let changes = repository.upsert_identity(IdentityId(300), &api);
    assert_eq!(kinds(&changes), ["members"]);
    assert_eq!(kinds(&repository.remove_identity(IdentityId(300))), ["members"]);
}

#[test]
fn a_malformed_group_fails_closed() {
    let office = |action| {
        let mut rule = rule(
            "web",
            vec![Peer::Cidr(CidrSet {
                source: CidrSource::Group("office".into()),
                except: vec!["10.1.0.0/16".parse().unwrap()],
                scope: AddressScope::World,
            })],
        );
        rule.statements[0].action = action;
        rule
    };
    let mut repository = PolicyRepository::new(config());
    let fault = PolicyError::new("spec.externalCIDRs[0]", "is no prefix");
    repository.set_group("office", Some(Err(fault)));
    assert_eq!(repository.malformed_groups().count(), 1);
    for (action, covered) in [(Action::Allow, false), (Action::Deny, true)] {
        repository.upsert(&policy("web"), Ok(vec![office(action)]));
        let rules = repository.numbered_rules(&policy("web"));
        for address in ["10.1.2.3", "192.0.2.1", "2001:db8::1"] {
            let address = address.parse().unwrap();
            let holds = rules[0].statements[0].cidrs().any(|set| set.contains(address));
            assert_eq!(holds, covered, "{action:?} {address}");
        }
        let validity = repository.validity(&policy("web")).unwrap();
        assert!(
            validity.valid && validity.message.contains("office is malformed"),
            "{validity:?}"
        );
    }
}

#[test]
fn ignored_labels_are_named() {
    let mut repository = PolicyRepository::new(config());
    let hash = Selector::new([Requirement::is(LabelKey::k8s("pod-template-hash"), "7d9f")]);
    repository.upsert(&policy("web"), Ok(vec![rule("web", vec![Peer::Selector(hash)])]));
    let validity = repository.validity(&policy("web")).unwrap();
    assert!(
        validity
            .message
            .contains("label k8s:pod-template-hash is ignored"),
        "{validity:?}"
    );
}

#[test]
fn a_policy_that_is_too_large_closes_instead_of_stopping_agents() {
    let cidr = |n: usize| {
        Peer::Cidr(CidrSet {
            source: CidrSource::Prefix(format!("10.{}.{}.0/24", n / 256, n % 256).parse().unwrap()),
            except: vec![],
            scope: AddressScope::World,
        })
    };
    let mut large = rule("web", (0..MOST_PARTS).map(cidr).collect());
    let mut deny = large.statements[0].clone();
    deny.action = Action::Deny;
    large.statements.push(deny);
    let mut repository = PolicyRepository::new(config());
    repository.upsert(&policy("web"), Ok(vec![large]));
    let rules = repository.numbered_rules(&policy("web"));
    assert!(rules[0].default_deny.ingress);
    let peers: Vec<_> = rules[0].statements.iter().map(|s| (s.action, &s.peers)).collect();
    assert_eq!(
        peers,
        [
            (Action::Allow, &Peers::These(vec![])),
            (Action::Deny, &Peers::Any)
        ]
    );
    let validity = repository.validity(&policy("web")).unwrap();
    assert!(validity.message.contains("too large"), "{validity:?}");

    let most = rule("web", (0..MOST_PARTS - 1).map(cidr).collect());
    repository.upsert(&policy("web"), Ok(vec![most]));
    let rules = repository.numbered_rules(&policy("web"));
    assert_eq!(rules[0].statements[0].cidrs().count(), MOST_PARTS - 1);
    let bytes = serde_json::to_vec(rules).unwrap().len();
    assert!(bytes < 3 * 1024 * 1024, "{bytes} bytes");
}
