//! The demonstration: three nodes, a three-tier application, the proof that its traffic is encrypted, policies that
//! close it and open exactly what they say, an agent that is killed while packets flow, and new keys for all nodes while
//! packets flow.

mod flows;
mod policy;

use std::{
    fmt::Display,
    fs,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use self::{
    flows::{restart_during_flows, rotate_during_flows, sentence},
    policy::Zone,
};
use crate::{
    app::ask::Protocol,
    lab::{KEYD_SOCKET, Lab, LabOptions, Pod, PodSpec, wait::wait_until},
    scenario::two_nodes,
};

/// Numbered packets per second and family.
const RATE: u32 = 1000;
/// Bytes of the transfer between two tiers, per family.
const TRANSFER: u64 = 8 << 20;

/// The figures of a run, as `--json` writes them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Figures {
    /// Nodes of the lab.
    pub nodes: usize,
    /// Pods of the application.
    pub pods: usize,
    /// Packets in clear between the nodes, with encryption on.
    pub plaintext_packets: u64,
    /// WireGuard packets between the nodes.
    pub encrypted_packets: u64,
    /// Packets in clear that the same capture saw with encryption off.
    pub power_check_plaintext_packets: u64,
    /// Numbered packets lost while the agent was killed and restarted, both families.
    pub agent_restart_lost_packets: u64,
    /// Numbered packets sent meanwhile, both families.
    pub agent_restart_sent_packets: u64,
    /// Numbered packets lost while all nodes got new keys, both families.
    pub rotation_lost_packets: u64,
    /// Numbered packets sent meanwhile, both families.
    pub rotation_sent_packets: u64,
    /// Nodes with a new key afterwards.
    pub rotation_nodes: u64,
    /// Questions between pods under policy: each must be answered, or must meet silence.
    pub policy_checks: u64,
    /// Of these, not as the policies say.
    pub policy_failures: u64,
    /// How long all of it took, seconds.
    pub seconds: u64,
}

impl Figures {
    /// What is not as it must be, a sentence each.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut require = |holds: bool, fault: String| {
            if !holds {
                faults.push(fault);
            }
        };
        require(
            self.plaintext_packets == 0,
            format!("{} packets crossed in clear", self.plaintext_packets),
        );
        require(
            self.encrypted_packets > 1000,
            format!("only {} encrypted packets were seen", self.encrypted_packets),
        );
        require(
            self.power_check_plaintext_packets > 0,
            "the power check saw no plaintext: the capture proves nothing".into(),
        );
        require(
            self.agent_restart_lost_packets == 0,
            format!(
                "{} packets were lost during the agent's restart",
                self.agent_restart_lost_packets
            ),
        );
        require(
            self.rotation_lost_packets == 0,
            format!(
                "{} packets were lost during the rotation of the keys",
                self.rotation_lost_packets
            ),
        );
        require(
            self.rotation_sent_packets > 0 && self.rotation_nodes == self.nodes as u64,
            format!("only {} nodes got new keys", self.rotation_nodes),
        );
        require(
            self.policy_checks > 100,
            format!("only {} policy checks were made", self.policy_checks),
        );
        require(
            self.policy_failures == 0,
            format!(
                "{} of {} policy checks were not as the policies say",
                self.policy_failures, self.policy_checks
            ),
        );
        faults
    }
}

/// Prints steps with their times.
#[derive(Debug)]
struct Steps {
    start: Instant,
    step: Instant,
    number: u32,
}

impl Steps {
    const TOTAL: u32 = 10;

    fn new() -> Self {
        Self {
            start: Instant::now(),
            step: Instant::now(),
            number: 0,
        }
    }

    fn begin(&mut self, what: impl Display) {
        self.number += 1;
        self.step = Instant::now();
        println!("\n[{}/{}] {what}", self.number, Self::TOTAL);
    }

    fn done(&self, what: impl Display) {
        println!("      {what}  ({:.1} s)", self.step.elapsed().as_secs_f32());
    }
}

/// What the demonstration may be told.
#[derive(Debug, Clone, clap::Args)]
pub struct DemoArgs {
    /// Writes the figures to this file.
    #[arg(long, value_name = "FILE")]
    pub json: Option<std::path::PathBuf>,
    /// Leaves the lab running at the end.
    #[arg(long)]
    pub keep: bool,
}

/// Runs it. `Err` where it could not run to its end; bad figures are in the return value.
pub fn run(args: &DemoArgs) -> Result<Figures> {
    let mut steps = Steps::new();
    let mut figures = Figures::default();
    steps.begin("Three nodes, joined by an underlay bridge; keyd on node1, an agent on each");
    let lab = Lab::start(LabOptions::default())?;
    let outcome = with_encryption(&lab, &mut steps, &mut figures).inspect_err(|_| lab.fail());
    let (mut application, mut zone) = outcome?;

    steps.begin("Power check: the same with encryption off must be seen in clear");
    figures.power_check_plaintext_packets = power_check()?;
    steps.done(format!(
        "{} packets in clear seen by the same capture",
        figures.power_check_plaintext_packets
    ));

    figures.seconds = steps.start.elapsed().as_secs();
    summary(&figures);
    if let Some(file) = &args.json {
        write_json(file, &figures)?;
    }
    if args.keep {
        zone.release();
        keep(lab, &mut application)?;
    }
    Ok(figures)
}

/// The three tiers, each on a node of its own.
fn tiers() -> [PodSpec; 3] {
    [("frontend", 1, 8080), ("api", 2, 5000), ("db", 3, 6379)].map(|(name, node, port)| PodSpec {
        namespace: "demo".into(),
        ports: vec![port],
        ..PodSpec::new(name, node)
    })
}

fn with_encryption(lab: &Lab, steps: &mut Steps, figures: &mut Figures) -> Result<(Vec<Pod>, Zone)> {
    for node in lab.nodes() {
        println!("      {:<6} {}", node.name, node.place().how_to_enter());
    }
    steps.done("all agents enrolled, all peers known");
    let capture = lab.capture()?;

    steps.begin("The application: frontend:8080 -> api:5000 -> db:6379, namespace demo");
    let application = tiers()
        .into_iter()
        .map(|tier| lab.add_pod(tier))
        .collect::<Result<Vec<_>>>()?;
    for pod in &application {
        let addresses: Vec<_> = pod.addresses().iter().map(ToString::to_string).collect();
        println!(
            "      {:<14} on {}  {}",
            pod.full_name(),
            pod.node().name,
            addresses.join("  ")
        );
    }
    steps.done("CNI ADD through ptp and bridge, then warren-cni");
    figures.nodes = lab.nodes().len();
    figures.pods = application.len();

    steps.begin("Traffic between the nodes, IPv4 and IPv6");
    talk(&application)?;
    let counts = capture.counts();
    steps.done(format!(
        "on the wire so far: {} encrypted, {} in clear, {} control, {} ARP/ND",
        counts.encrypted, counts.plaintext, counts.control, counts.neighbour
    ));

    let zone = Zone::start(lab, &application)?;
    steps.begin("Zero trust: default deny for the namespace, both directions");
    zone.close(lab, &application, figures)?;
    steps.done("nothing reaches anything, not even DNS");
    steps.begin("Allow rules: DNS, the namespace -> frontend:8080, frontend -> api:5000, api -> db:6379");
    zone.open(lab, &application, figures)?;
    steps.done("exactly what the rules say passes");

    steps.begin("What a node and the cluster say");
    print_indented(&lab.node(2).run(["mesh-agent", "encrypt", "status"])?);
    println!();
    // A node's report reaches keyd a moment after the fact.
    wait_until(Duration::from_secs(20), "the cluster's status is good", || {
        lab.node(1)
            .run(["warren", "encrypt", "status", "--keyd-socket", KEYD_SOCKET])
            .and_then(|text| {
                if text.trim().is_empty() {
                    anyhow::bail!("it printed nothing")
                } else {
                    Ok(text)
                }
            })
    })
    .map(|text| print_indented(&text))?;
    steps.done("both exit with 0");

    steps.begin(format!(
        "SIGKILL for the agent of node2 during {RATE} packets/s in each family"
    ));
    let reports = restart_during_flows(lab, &application, || zone.still(&application, figures))?;
    for (family, report) in ["IPv4", "IPv6"].iter().zip(&reports) {
        println!("      {family}: {}", sentence(report));
        figures.agent_restart_lost_packets += report.lost;
        figures.agent_restart_sent_packets += report.sent;
    }
    steps.done("policy held without the agent; a new one has taken over");

    steps.begin(format!(
        "New keys for all nodes during {RATE} packets/s in each family: warren keys rotate --all --wait"
    ));
    let reports = rotate_during_flows(lab, &application, figures)?;
    for (family, report) in ["IPv4", "IPv6"].iter().zip(&reports) {
        println!("      {family}: {}", sentence(report));
        figures.rotation_lost_packets += report.lost;
        figures.rotation_sent_packets += report.sent;
    }
    steps.done("both ends of every pair agree; the former keys are gone");

    steps.begin("The capture's verdict");
    let counts = capture.finish()?;
    figures.plaintext_packets = counts.plaintext;
    figures.encrypted_packets = counts.encrypted;
    for sample in &counts.plaintext_samples {
        println!("      in clear: {sample}");
    }
    steps.done(format!(
        "{} encrypted packets, {} in clear",
        counts.encrypted, counts.plaintext
    ));
    Ok((application, zone))
}

fn port(pod: &str) -> u16 {
    match pod {
        "api" => 5000,
        "db" => 6379,
        "dns" => 53,
        _ => 8080,
    }
}

fn talk(application: &[Pod]) -> Result<()> {
    for pair in application.windows(2) {
        let [from, to] = pair else { continue };
        for v6 in [false, true] {
            let target = SocketAddr::new(to.address(v6)?, port(to.name()));
            let protocol = if to.name() == "api" {
                Protocol::Http
            } else {
                Protocol::Tcp
            };
            let answer = from.ask_port(protocol, target, 1400)?;
            ensure!(answer.name == to.name(), "{target} answered as {}", answer.name);
            let report = from.transfer_port(target, TRANSFER)?;
            ensure!(
                report.corrupt_at.is_none(),
                "the transfer to {target} arrived corrupted: {report:?}"
            );
            println!(
                "      {:<8} -> {:<3} {:<28} answered by {:<3} in {:>5} us; {} MiB transferred, every byte right",
                from.name(),
                to.name(),
                target.to_string(),
                answer.name,
                answer.micros,
                TRANSFER >> 20
            );
        }
    }
    Ok(())
}

/// Two nodes without encryption: how many packets in clear the capture sees.
fn power_check() -> Result<u64> {
    let mut seen = 0;
    Lab::run(two_nodes(false), |lab| {
        let capture = lab.capture()?;
        let [frontend, api, _] = tiers();
        let application = [lab.add_pod(frontend)?, lab.add_pod(api)?];
        talk(&application)?;
        seen = capture.finish()?.plaintext;
        Ok(())
    })?;
    Ok(seen)
}

fn print_indented(text: &str) {
    for line in text.lines() {
        println!("      {line}");
    }
}

fn summary(figures: &Figures) {
    println!("\nSummary");
    let line = |what: &str, value: &dyn Display| println!("  {what:<52} {value:>8}");
    line("nodes", &figures.nodes);
    line("pods", &figures.pods);
    line("packets in clear between nodes", &figures.plaintext_packets);
    line("encrypted packets between nodes", &figures.encrypted_packets);
    line(
        "packets in clear with encryption off (power check)",
        &figures.power_check_plaintext_packets,
    );
    line(
        "packets sent during the agent's restart",
        &figures.agent_restart_sent_packets,
    );
    line("of these lost", &figures.agent_restart_lost_packets);
    line(
        "packets sent while all nodes got new keys",
        &figures.rotation_sent_packets,
    );
    line("of these lost", &figures.rotation_lost_packets);
    line(
        "policy checks: answered or silent as they must be",
        &figures.policy_checks,
    );
    line("of these not as the policies say", &figures.policy_failures);
    line("seconds", &figures.seconds);
}

fn write_json(file: &Path, figures: &Figures) -> Result<()> {
    let text = serde_json::to_string_pretty(figures)?;
    fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    println!("  figures written to {}", file.display());
    Ok(())
}

fn keep(lab: Lab, application: &mut [Pod]) -> Result<()> {
    println!("\nThe lab stays. To enter:");
    for line in lab.how_to_enter() {
        println!("  {line}");
    }
    for pod in application {
        println!("  {:<16} {}", pod.full_name(), pod.place().how_to_enter());
        pod.release();
    }
    println!("To remove it: warren-lab down {}", lab.id());
    lab.detach()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_figures_have_no_faults_and_every_bad_one_has_its_own() {
        let good = Figures {
            nodes: 3,
            pods: 3,
            encrypted_packets: 1001,
            power_check_plaintext_packets: 1,
            policy_checks: 101,
            rotation_sent_packets: 1,
            rotation_nodes: 3,
            ..Figures::default()
        };
        assert_eq!(good.faults(), Vec::<String>::new());
        for bad in [
            Figures {
                plaintext_packets: 1,
                ..good.clone()
            },
            Figures {
                encrypted_packets: 1000,
                ..good.clone()
            },
            Figures {
                power_check_plaintext_packets: 0,
                ..good.clone()
            },
            Figures {
                policy_checks: 100,
                ..good.clone()
            },
            Figures {
                policy_failures: 1,
                ..good.clone()
            },
            Figures {
                rotation_lost_packets: 1,
                ..good.clone()
            },
            Figures {
                rotation_nodes: 2,
                ..good.clone()
            },
            Figures {
                agent_restart_lost_packets: 1,
                ..good
            },
        ] {
            assert_eq!(bad.faults().len(), 1, "{bad:?}");
        }
    }
}
