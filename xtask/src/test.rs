//! `cargo xtask test`: everything that must hold before a change lands.

mod programs;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use self::programs::Kind;
use crate::{
    command::{cargo, command, output, run as execute},
    deps, disk, generate, paths, permissions,
    setup::{self, Group},
    vm,
};

/// Arguments of `test`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only this step; may be given more than once. `--list` names them.
    #[arg(long, value_name = "STEP")]
    only: Vec<String>,
    /// Name the steps and run none.
    #[arg(long)]
    list: bool,
    /// Test programs that run at the same time, at most one of them with a cluster. Most of their time they wait.
    #[arg(long, value_name = "N", default_value_t = 2)]
    at_once: usize,
}

struct Step {
    name: &'static str,
    about: &'static str,
    needs: &'static [Group],
    work: Work,
}

/// What a step does.
enum Work {
    /// One after the other.
    Check(fn() -> Result<Count>),
    /// Test programs, those of all steps together.
    Programs(Kind),
}

/// How many checks passed and failed.
#[derive(Clone, Copy, Default)]
struct Count {
    passed: u64,
    failed: u64,
}

impl std::ops::Add for Count {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
        }
    }
}

/// Cheap ones first.
const STEPS: &[Step] = &[
    Step {
        name: "format",
        about: "rustfmt and gofmt",
        needs: &[],
        work: Work::Check(format),
    },
    Step {
        name: "deps",
        about: "dependencies between our crates point one way",
        needs: &[],
        work: Work::Check(|| one(deps::run())),
    },
    Step {
        name: "licences",
        about: "licences, bans and sources",
        needs: &[Group::Checks],
        work: Work::Check(licences),
    },
    Step {
        name: "lint",
        about: "clippy, all targets, warnings denied",
        needs: &[Group::Base, Group::Bpf],
        work: Work::Check(lint),
    },
    Step {
        name: "generated",
        about: "generated files are up to date",
        needs: &[Group::Base],
        work: Work::Check(generated),
    },
    Step {
        name: "chart",
        about: "the chart lints, wrong values are refused, every permission is listed",
        needs: &[Group::Kubernetes],
        work: Work::Check(chart),
    },
    Step {
        name: "vm",
        about: "the kernel's WireGuard, in a virtual machine: with the userspace engine, changes under traffic",
        needs: &[Group::Base, Group::Bpf, Group::Vm],
        work: Work::Check(|| one(vm::short())),
    },
    Step {
        name: "unit",
        about: "unit, property, eBPF and driver tests of every crate",
        needs: &[Group::Base, Group::Bpf, Group::Peers],
        work: Work::Programs(Kind::Unit),
    },
    Step {
        name: "lab",
        about: "end to end in the stand-alone lab",
        needs: &[Group::Base, Group::Bpf, Group::Peers],
        work: Work::Programs(Kind::Lab),
    },
    Step {
        name: "kubernetes",
        about: "end to end in a real Kubernetes cluster",
        needs: &[Group::Base, Group::Bpf, Group::Kubernetes],
        work: Work::Programs(Kind::Kubernetes),
    },
];

/// Sets up what the chosen steps need, runs them all, also after one has failed, and counts.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.list {
        for step in STEPS {
            println!("{:<11} {}", step.name, step.about);
        }
        return Ok(());
    }
    let steps = chosen(&arguments.only)?;
    disk::ensure_room()?;
    let start = Instant::now();
    let mut groups = Vec::new();
    for group in steps.iter().flat_map(|step| step.needs) {
        if !groups.contains(group) {
            groups.push(*group);
        }
    }
    setup::ensure(&groups)?;

    let mut report = Report::default();
    report.add("setup", start.elapsed(), None);
    let mut kinds = Vec::new();
    for step in &steps {
        match step.work {
            Work::Programs(kind) => kinds.push((step.name, kind)),
            Work::Check(check) => {
                println!("\n=== {}: {}", step.name, step.about);
                let begun = Instant::now();
                let count = check().unwrap_or_else(|error| failed(step.name, &error));
                report.add(step.name, begun.elapsed(), Some(count));
            }
        }
    }
    if !kinds.is_empty() {
        let (names, kinds): (Vec<_>, Vec<_>) = kinds.into_iter().unzip();
        println!(
            "\n=== {}: {} programs at once",
            names.join(", "),
            arguments.at_once
        );
        match programs::run(&kinds, arguments.at_once) {
            Ok(sums) => {
                for (name, (_, count, time)) in names.into_iter().zip(sums) {
                    report.add(name, time, Some(count));
                }
            }
            Err(error) => report.add("programs", Duration::ZERO, Some(failed("programs", &error))),
        }
    }
    let Report { lines, total } = report;
    println!(
        "\n{}\nall of it: {} s",
        lines.join("\n"),
        start.elapsed().as_secs()
    );
    println!("{} passed, {} failed", total.passed, total.failed);
    if total.failed > 0 {
        bail!("not everything passed; `cargo xtask test --only STEP` runs one step again");
    }
    Ok(())
}

fn chosen(names: &[String]) -> Result<Vec<&'static Step>> {
    if names.is_empty() {
        return Ok(STEPS.iter().collect());
    }
    for name in names {
        if !STEPS.iter().any(|step| step.name == name) {
            bail!("there is no step `{name}`: `cargo xtask test --list` names them");
        }
    }
    Ok(STEPS
        .iter()
        .filter(|step| names.iter().any(|name| name == step.name))
        .collect())
}

/// What there is to say in the end.
#[derive(Default)]
struct Report {
    lines: Vec<String>,
    total: Count,
}

impl Report {
    fn add(&mut self, name: &str, time: Duration, count: Option<Count>) {
        let verdict = match count {
            Some(count) if count.failed > 0 => "FAILED",
            _ => "ok",
        };
        let mut line = format!("{verdict:<7}{name:<11} {:>5} s", time.as_secs());
        if let Some(count) = count {
            line += &format!("  {:>4} passed, {} failed", count.passed, count.failed);
            println!("{line}");
            self.total = self.total + count;
        }
        self.lines.push(line);
    }
}

/// What could not be done counts as one failure.
fn failed(name: &str, error: &anyhow::Error) -> Count {
    eprintln!("{name}: {error:#}");
    Count { passed: 0, failed: 1 }
}

/// A check that passes or fails as a whole.
fn one(result: Result<()>) -> Result<Count> {
    result.map(|()| Count { passed: 1, failed: 0 })
}

fn format() -> Result<Count> {
    execute(cargo().args(["fmt", "--all", "--check"]))?;
    if crate::command::found("gofmt") {
        let wrong = output(command("gofmt").args(["-l", "e2e/kubernetes"]))?;
        if !wrong.trim().is_empty() {
            bail!(
                "not formatted: {}: run `gofmt -w` on them",
                wrong.trim().replace('\n', ", ")
            );
        }
    }
    Ok(Count { passed: 1, failed: 0 })
}

fn lint() -> Result<Count> {
    one(execute(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ])))
}

fn generated() -> Result<Count> {
    one(generate::run(&generate::Arguments { check: true }))
}

/// Advisories are not asked for: their database is a download, and a build must not break by the day.
fn licences() -> Result<Count> {
    let deny = paths::bin()?.join("cargo-deny");
    one(execute(command(deny).args([
        "--workspace",
        "check",
        "bans",
        "licenses",
        "sources",
    ])))
}

fn chart() -> Result<Count> {
    let helm = paths::bin()?.join("helm");
    let values = "podPools={10.244.0.0/16},nodePools={172.30.0.0/24},serviceCIDRs={10.96.0.0/16}";
    execute(command(&helm).args(["lint", "--strict", "charts/warren", "--set", values]))?;
    let rendered =
        output(command(&helm).args(["template", "charts/warren", "-n", "kube-system", "--set", values]))?;
    let mut count = Count { passed: 2, failed: 0 };
    match permissions::check(&rendered) {
        Ok(()) => count.passed += 1,
        Err(error) => {
            eprintln!("chart: {error:#}");
            count.failed += 1;
        }
    }
    for wrong in [
        "encryption.type=ipsec",
        "podPools=10.244.0.0/16",
        "hubble.relay.enabled=true",
        "no.such=value",
    ] {
        let rendered =
            output(command(&helm).args(["template", "charts/warren", "--set", values, "--set", wrong]));
        if rendered.is_ok() {
            eprintln!("chart: `--set {wrong}` is accepted, it must be refused");
            count.failed += 1;
        } else {
            count.passed += 1;
        }
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::{STEPS, chosen};

    #[test]
    fn steps_are_found_by_name() {
        assert_eq!(chosen(&[]).unwrap().len(), STEPS.len());
        assert_eq!(chosen(&["lint".into()]).unwrap().len(), 1);
        assert!(chosen(&["lynt".into()]).is_err());
    }
}
