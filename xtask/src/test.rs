//! `cargo xtask test`: everything that must hold before a change lands.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Result, bail};

use crate::{
    command::{cargo, command, output, run as execute, stream},
    deps, generate, image, paths,
    setup::{self, Group},
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
}

struct Step {
    name: &'static str,
    about: &'static str,
    needs: &'static [Group],
    work: fn() -> Result<Count>,
}

/// How many checks passed and failed.
#[derive(Clone, Copy, Default)]
struct Count {
    passed: u64,
    failed: u64,
}

/// Cheap ones first.
const STEPS: &[Step] = &[
    Step {
        name: "format",
        about: "rustfmt and gofmt",
        needs: &[],
        work: format,
    },
    Step {
        name: "deps",
        about: "dependencies between our crates point one way",
        needs: &[],
        work: || one(deps::run()),
    },
    Step {
        name: "licences",
        about: "licences, bans and sources",
        needs: &[Group::Checks],
        work: licences,
    },
    Step {
        name: "lint",
        about: "clippy, all targets, warnings denied",
        needs: &[Group::Base, Group::Bpf],
        work: lint,
    },
    Step {
        name: "generated",
        about: "generated files are up to date",
        needs: &[Group::Base],
        work: generated,
    },
    Step {
        name: "chart",
        about: "the chart lints, wrong values are refused",
        needs: &[Group::Kubernetes],
        work: chart,
    },
    Step {
        name: "unit",
        about: "unit, property, eBPF and driver tests of every crate",
        needs: &[Group::Base, Group::Bpf, Group::Peers],
        work: unit,
    },
    Step {
        name: "lab",
        about: "end to end in the stand-alone lab",
        needs: &[Group::Base, Group::Bpf, Group::Peers],
        work: stand_alone,
    },
    Step {
        name: "kubernetes",
        about: "end to end in a real Kubernetes cluster",
        needs: &[Group::Base, Group::Bpf, Group::Kubernetes],
        work: kubernetes,
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
    let start = Instant::now();
    let mut groups = Vec::new();
    for group in steps.iter().flat_map(|step| step.needs) {
        if !groups.contains(group) {
            groups.push(*group);
        }
    }
    setup::ensure(&groups)?;

    let mut report = vec![format!(
        "{:<7}{:<11} {:>5} s",
        "ok",
        "setup",
        start.elapsed().as_secs()
    )];
    let mut total = Count::default();
    for (number, step) in steps.iter().enumerate() {
        println!(
            "\n=== {}/{} {}: {}",
            number + 1,
            steps.len(),
            step.name,
            step.about
        );
        let begun = Instant::now();
        let count = (step.work)().unwrap_or_else(|error| {
            eprintln!("{}: {error:#}", step.name);
            Count { passed: 0, failed: 1 }
        });
        total.passed += count.passed;
        total.failed += count.failed;
        let verdict = if count.failed == 0 { "ok" } else { "FAILED" };
        let (seconds, Count { passed, failed }) = (begun.elapsed().as_secs(), count);
        let line = format!(
            "{verdict:<7}{:<11} {seconds:>5} s  {passed:>4} passed, {failed} failed",
            step.name
        );
        println!("{line}");
        report.push(line);
    }
    println!(
        "\n{}\nall of it: {} s",
        report.join("\n"),
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
    output(command(&helm).args(["template", "charts/warren", "-n", "kube-system", "--set", values]))?;
    let mut count = Count { passed: 2, failed: 0 };
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

/// Every library, program and test file but those of the labs. The whole workspace is selected each time and targets
/// are named: another selection of packages would mean other features, and the dependencies once more.
fn unit() -> Result<Count> {
    let mut names = Vec::new();
    for package in packages()? {
        if package != paths::root().join("e2e") {
            names.extend(test_files(&package)?);
        }
    }
    names.sort();
    names.dedup();
    tests(cargo().args(test_arguments(&["--lib", "--bins"], names)))
}

/// The folders of the workspace's packages.
fn packages() -> Result<Vec<PathBuf>> {
    let metadata = output(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let manifests = metadata["packages"].as_array().into_iter().flatten();
    Ok(manifests
        .filter_map(|package| Path::new(package["manifest_path"].as_str()?).parent())
        .map(Path::to_owned)
        .collect())
}

fn test_arguments(targets: &[&str], names: Vec<String>) -> Vec<String> {
    let mut arguments: Vec<String> = ["test", "--workspace", "--no-fail-fast"]
        .iter()
        .chain(targets)
        .map(|argument| (*argument).to_owned())
        .collect();
    for name in names {
        arguments.extend(["--test".to_owned(), name]);
    }
    arguments
}

/// The labs start our programs as processes, so these must have been built.
fn build() -> Result<()> {
    execute(cargo().args(["build", "--workspace"]))
}

fn stand_alone() -> Result<Count> {
    build()?;
    let mut names = test_files(&paths::root().join("e2e"))?;
    names.retain(|name| name != "kubernetes");
    tests(cargo().args(test_arguments(&[], names)))
}

/// The names of the test files of a package.
fn test_files(package: &Path) -> Result<Vec<String>> {
    let Ok(entries) = std::fs::read_dir(package.join("tests")) else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

fn kubernetes() -> Result<Count> {
    image::build(&[], image::Profile::Dev)?;
    tests(cargo().args(test_arguments(&[], vec!["kubernetes".to_owned()])))
}

/// Runs `cargo test` and adds up what its test binaries say.
fn tests(command: &mut Command) -> Result<Count> {
    let mut count = Count::default();
    let succeeded = stream(command, |line| {
        if let Some(of_binary) = parse(line) {
            count.passed += of_binary.passed;
            count.failed += of_binary.failed;
        }
    })?;
    if !succeeded && count.failed == 0 {
        // It did not compile, or a test binary died before it could count.
        count.failed = 1;
    }
    if succeeded && count.passed == 0 {
        bail!("not a single test ran");
    }
    Ok(count)
}

/// `test result: ok. 3 passed; 0 failed; 0 ignored; ...`; an ignored test is one that did not pass.
fn parse(line: &str) -> Option<Count> {
    let rest = line.trim().strip_prefix("test result: ")?;
    let number = |what: &str| -> Option<u64> {
        let before = rest.split(what).next()?;
        before.split_whitespace().next_back()?.parse().ok()
    };
    Some(Count {
        passed: number(" passed")?,
        failed: number(" failed")? + number(" ignored")?,
    })
}

#[cfg(test)]
mod tests {
    use super::{STEPS, chosen, parse};

    #[test]
    fn result_lines_are_counted() {
        let count = parse("test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out");
        assert_eq!(count.map(|count| (count.passed, count.failed)), Some((3, 3)));
        assert!(parse("test directory::works ... ok").is_none());
    }

    #[test]
    fn steps_are_found_by_name() {
        assert_eq!(chosen(&[]).unwrap().len(), STEPS.len());
        assert_eq!(chosen(&["lint".into()]).unwrap().len(), 1);
        assert!(chosen(&["lynt".into()]).is_err());
    }
}
