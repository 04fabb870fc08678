//! The application's policies: what times out and what passes.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::Result;

use super::{Figures, port};
use crate::{
    app::probe::Target,
    lab::{
        Check, Checked, KEYD_SOCKET, Lab, Pod, PodSpec, ServiceSpec, check,
        policies::{default_deny, scenario_b},
    },
};

/// The application with what it needs: DNS, and a Service in front of everybody.
#[derive(Debug)]
pub(super) struct Zone {
    dns: Pod,
    services: BTreeMap<String, ServiceSpec>,
}

impl Zone {
    /// Starts the DNS pod and makes the Services.
    pub(super) fn start(lab: &Lab, application: &[Pod]) -> Result<Self> {
        let dns = lab.add_pod(PodSpec {
            namespace: "kube-system".into(),
            labels: [("k8s-app".to_owned(), "kube-dns".to_owned())].into(),
            ports: vec![port("dns")],
            ..PodSpec::new("dns", 1)
        })?;
        let services: BTreeMap<_, _> = (1..)
            .zip(application.iter().chain([&dns]))
            .map(|(number, pod)| {
                let port = port(pod.name());
                let service = ServiceSpec::new(number, pod.name(), port, port, &[pod.addresses()]);
                (pod.name().to_owned(), service)
            })
            .collect();
        lab.serve(&services.values().cloned().collect::<Vec<_>>())?;
        Ok(Self { dns, services })
    }

    /// The pod that stays when the lab does.
    pub(super) fn release(&mut self) {
        self.dns.release();
    }

    /// Applies default deny: nothing may reach anything.
    pub(super) fn close(&self, lab: &Lab, application: &[Pod], figures: &mut Figures) -> Result<()> {
        lab.apply(&default_deny("demo"))?;
        self.prove(application, |_, _| false, figures)
    }

    /// Applies the allow rules: exactly what they say passes.
    pub(super) fn open(&self, lab: &Lab, application: &[Pod], figures: &mut Figures) -> Result<()> {
        lab.apply(&scenario_b("demo"))?;
        self.prove(application, allowed, figures)?;
        explain(lab, "demo/frontend", "demo/db", "6379")
    }

    /// Exactly what the allow rules say passes, still.
    pub(super) fn still(&self, application: &[Pod], figures: &mut Figures) -> Result<()> {
        let checked = check(&self.checks(application, &allowed))?;
        figures.policy_checks += checked.len() as u64;
        figures.policy_failures += failures(&checked);
        Ok(())
    }

    /// Everybody to everybody: by pod address and by Service, over TCP and UDP, IPv4 and IPv6.
    fn checks(&self, application: &[Pod], allowed: &impl Fn(&str, &str) -> bool) -> Vec<Check> {
        let mut checks = Vec::new();
        for from in application {
            let others = application.iter().filter(|to| to.name() != from.name());
            for to in others.chain([&self.dns]) {
                let service = self.services.get(to.name());
                let addresses = to
                    .addresses()
                    .iter()
                    .copied()
                    .chain(service.into_iter().flat_map(|service| service.cluster.both()));
                for address in addresses {
                    let at = SocketAddr::new(address, port(to.name()));
                    for target in [Target::Tcp(at), Target::Udp(at)] {
                        checks.push(Check {
                            from: from.place(),
                            target,
                            what: to.name().to_owned(),
                            expected: allowed(from.name(), to.name()).then(|| to.name().to_owned()),
                        });
                    }
                }
            }
        }
        checks
    }

    fn prove(
        &self,
        application: &[Pod],
        allowed: impl Fn(&str, &str) -> bool,
        figures: &mut Figures,
    ) -> Result<()> {
        let checked = check(&self.checks(application, &allowed))?;
        let failures = failures(&checked);
        figures.policy_checks += checked.len() as u64;
        figures.policy_failures += failures;
        print(application, &checked);
        for bad in checked.iter().filter(|checked| !checked.good()) {
            let Check {
                from, what, target, ..
            } = &bad.check;
            println!("      WRONG: {} -> {what} {target}: {}", from.name, bad.outcome);
        }
        println!(
            "      {} checks (pod address and Service, TCP and UDP, IPv4 and IPv6), {failures} not as they must be",
            checked.len()
        );
        Ok(())
    }
}

/// Why a connection passes or not, as an operator asks.
fn explain(lab: &Lab, from: &str, to: &str, port: &str) -> Result<()> {
    let command = [
        "warren", "policy", "trace", "--from", from, "--to", to, "--port", port,
    ];
    println!("\n      # {}", command.join(" "));
    let socket = ["--keyd-socket", KEYD_SOCKET];
    // Its exit code is the verdict.
    let output = lab.node(1).place().output(command.iter().chain(&socket))?;
    super::print_indented(&String::from_utf8_lossy(&output.stdout));
    Ok(())
}

/// The rules of scenario B.
fn allowed(from: &str, to: &str) -> bool {
    to == "dns" || to == "frontend" || matches!((from, to), ("frontend", "api") | ("api", "db"))
}

fn failures(checked: &[Checked]) -> u64 {
    checked.iter().filter(|checked| !checked.good()).count() as u64
}

/// A row per source, a column per destination.
fn print(application: &[Pod], checked: &[Checked]) {
    let names: Vec<_> = application.iter().map(Pod::name).chain(["dns"]).collect();
    let header: String = names.iter().map(|name| format!("{name:<12}")).collect();
    println!("      {:<12}{}", "from \\ to", header.trim_end());
    for from in application {
        let row: String = names
            .iter()
            .map(|to| format!("{:<12}", cell(checked, &from.place().name, to)))
            .collect();
        println!("      {:<12}{}", from.name(), row.trim_end());
    }
}

fn cell(checked: &[Checked], from: &str, to: &str) -> &'static str {
    use crate::app::probe::Outcome;
    let mut outcomes = checked
        .iter()
        .filter(|checked| checked.check.from.name == from && checked.check.what == to)
        .map(|checked| &checked.outcome);
    let Some(first) = outcomes.next() else {
        return "-";
    };
    let kind = std::mem::discriminant(first);
    if outcomes.any(|outcome| std::mem::discriminant(outcome) != kind) {
        return "mixed";
    }
    match first {
        Outcome::Answered(_) => "passes",
        Outcome::Refused(_) => "refused",
        Outcome::Silent => "times out",
    }
}
