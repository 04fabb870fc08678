//! End to end in a real Kubernetes cluster: the chart installed by Helm, real kubelets, real services and DNS.
//!
//! One cluster for the scenarios of a part, in this order; each leaves it as it found it, except the last. The parts need
//! nothing of each other: `--part policy` and `--part mesh` may run at the same time.

mod failures;
mod hostile;
mod keys;
mod policy;
mod scene;
mod secrets;
mod tampering;
mod traffic;
mod trust;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Result, anyhow};
use scene::Scene;

/// A name and what must hold.
type Scenario = (&'static str, fn(&mut Scene) -> Result<()>);

/// The beginning of every part.
const BEGINNING: &[Scenario] = &[
    (
        "without_encryption_the_capture_sees_the_plaintext",
        traffic::power_check,
    ),
    ("encryption_is_turned_on_by_an_upgrade", traffic::turn_on),
];

/// Scenarios by part.
const PARTS: &[(&str, &[Scenario])] = &[("policy", POLICY), ("mesh", MESH)];

const POLICY: &[Scenario] = &[
    (
        "three_tiers_from_default_deny_to_what_they_need",
        policy::three_tiers,
    ),
    (
        "an_application_stack_in_four_namespaces",
        policy::application_stack,
    ),
    (
        "services_are_judged_on_the_final_address",
        policy::services_with_policy,
    ),
    ("the_same_with_iptables", policy::services_with_iptables),
    ("a_new_pod_is_closed_from_its_first_moment", policy::first_packets),
    ("a_sample_of_cyclonus", policy::cyclonus_sample),
];

const MESH: &[Scenario] = &[
    ("pods_reach_pods_on_other_nodes", traffic::pods_reach_pods),
    ("services_and_dns_work", traffic::services_and_dns),
    ("nodes_and_pods_reach_each_other", traffic::nodes_and_pods),
    ("keys_rotate_under_traffic", keys::rotate),
    ("deleting_an_agent_pod_loses_nothing", failures::agent_pod_deleted),
    ("another_keyd_takes_over", failures::keyd_leader_killed),
    (
        "a_keyd_without_its_lease_lets_its_agents_go",
        failures::keyd_leader_demoted,
    ),
    (
        "nothing_is_lost_without_keyd_and_api_server",
        failures::control_plane_gone,
    ),
    ("a_node_comes_back_after_a_power_cut", failures::power_cut),
    ("the_signing_key_is_replaced", trust::signing_key_replaced),
    (
        "keyd_has_what_it_needs_and_agents_have_nothing",
        trust::permissions,
    ),
    ("keyd_refuses_tokens_that_prove_nothing", hostile::tokens),
    ("only_keyd_writes_its_objects", tampering::foreign_writes),
    (
        "who_gets_past_the_policy_is_not_believed",
        tampering::tampered_objects,
    ),
    // From here on the logs are verbose.
    ("no_secret_is_where_people_look", secrets::nowhere),
    ("a_deleted_node_is_forgotten_and_refused", hostile::node_deleted),
];

fn main() -> ExitCode {
    let mut names = Vec::new();
    let mut part = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--list" => {
                let all = BEGINNING
                    .iter()
                    .chain(PARTS.iter().flat_map(|(_, scenarios)| *scenarios));
                all.for_each(|(name, _)| println!("{name}: test"));
                return ExitCode::SUCCESS;
            }
            "--part" => part = arguments.next(),
            name if name.starts_with('-') => {}
            _ => names.push(argument),
        }
    }
    // As with `cargo test NAME`.
    let wanted = |name: &str| names.is_empty() || names.iter().any(|part| name.contains(part));
    let parts = PARTS
        .iter()
        .filter(|(name, _)| part.as_deref().is_none_or(|part| part == *name));
    let (mut passed, mut failed) = (0, 0);
    for (_, scenarios) in parts {
        let chosen: Vec<_> = scenarios.iter().filter(|(name, _)| wanted(name)).collect();
        if !chosen.is_empty() {
            let chosen: Vec<_> = BEGINNING.iter().chain(chosen).collect();
            println!("\nrunning {} tests", chosen.len());
            let (good, bad) = run(&chosen);
            (passed, failed) = (passed + good, failed + bad);
        }
    }
    if passed + failed == 0 {
        eprintln!("nothing of that name: `--list` shows what there is; parts are policy and mesh");
        return ExitCode::from(2);
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out\n"
    );
    ExitCode::from(u8::from(failed > 0))
}

fn run(scenarios: &[&Scenario]) -> (usize, usize) {
    let mut scene = match Scene::start() {
        Ok(scene) => scene,
        Err(error) => {
            eprintln!("the cluster does not start: {error:#}");
            return (0, scenarios.len());
        }
    };
    let mut passed = 0;
    for (index, (name, scenario)) in scenarios.iter().enumerate() {
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| scenario(&mut scene)))
            .unwrap_or_else(|_| Err(anyhow!("it panicked")));
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                passed += 1;
                println!("test {name} ... ok ({seconds:.1} s)");
            }
            Err(error) => {
                println!("test {name} ... FAILED ({seconds:.1} s)\n  {error:#}");
                scene.failed(name);
                if index < BEGINNING.len() {
                    println!("without this the others mean nothing");
                    break;
                }
            }
        }
    }
    (passed, scenarios.len() - passed)
}
