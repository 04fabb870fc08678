//! What runs in the virtual machine: built here, linked into the directory of results, so that a build during a run
//! changes nothing in it.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    command::{cargo, output},
    paths,
};

/// A step: `script` is what the guest runs, with the built programs in `$BIN`; `tests` are those of [`TESTS`] among them.
pub(super) struct Step {
    name: &'static str,
    about: &'static str,
    tests: &'static [&'static str],
    script: &'static str,
}

/// The step that `cargo xtask test` runs.
pub(super) const SHORT: &str = "short";

/// Which kinds of ends the scenarios have.
macro_rules! scenarios {
    ($arguments:literal) => {
        concat!(
            "WARREN_SCENARIO_ENGINES=kernel,warren WARREN_TUNNEL_ENGINE=$BIN/warren-tunnel-engine $BIN/engine ",
            $arguments
        )
    };
}

/// A program that makes a stand-alone lab, here with the kernel's WireGuard; what is waited for may take ten times as long.
macro_rules! lab {
    ($arguments:literal) => {
        concat!(
            "WARREN_LAB_DATAPATH=kernel WARREN_LAB_PATIENCE=10 $BIN/",
            $arguments
        )
    };
}

const STEPS: &[Step] = &[
    Step {
        name: SHORT,
        about: "the kernel with the userspace engine, and changes under traffic: what `cargo xtask test` runs",
        tests: &["engine", "kernel_driver"],
        script: concat!(
            scenarios!("--test-threads=2 private_key::mixed roaming::mixed"),
            " && $BIN/kernel_driver changes_under_traffic"
        ),
    },
    Step {
        name: "driver",
        about: "the driver of the kernel's WireGuard: two namespaces, changes under traffic",
        tests: &["kernel_driver"],
        script: "$BIN/kernel_driver",
    },
    Step {
        name: "scenarios",
        about: "the kernel's own scenarios: kernel with kernel, kernel with the userspace engine",
        tests: &["engine"],
        script: scenarios!("--test-threads=3 alike mixed"),
    },
    Step {
        name: "net",
        about: "devices, routes and rules; the probe for WireGuard",
        tests: &["engine", "routing"],
        script: "$BIN/routing --test-threads=1 && $BIN/engine --test-threads=1 the_kernel_driver",
    },
    Step {
        name: "bpf",
        about: "the eBPF programs pass this kernel's verifier and judge alike",
        tests: &["warren_bpf"],
        script: "$BIN/warren_bpf --test-threads=2",
    },
    Step {
        name: "agent",
        about: "two agents that find the kernel's WireGuard by themselves; one is killed",
        tests: &["two_nodes"],
        // One of them at a time, and not those that end the tunnel's process: there is none.
        script: "$BIN/two_nodes --test-threads=1 pods_talk",
    },
    Step {
        name: "rotation",
        about: "the stand-alone lab on the kernel's WireGuard: keys rotate under traffic, of old ones nothing is left",
        tests: &[],
        script: lab!(
            "warren-bench rotation --nodes 2 --rotations 1 --rate 50 --others 50 --json $WARREN_VM_RESULTS/rotation.json"
        ),
    },
    Step {
        name: "life",
        about: "the stand-alone lab on the kernel's WireGuard: agents are killed under traffic",
        tests: &[],
        script: lab!(
            "warren-bench life --restarts 4 --kills 0 --rate 50 --json $WARREN_VM_RESULTS/life.json"
        ),
    },
    Step {
        name: "demo",
        about: "the stand-alone lab on the kernel's WireGuard: capture, an agent killed under traffic, a rotation",
        tests: &[],
        script: lab!("warren-demo --json $WARREN_VM_RESULTS/demo.json"),
    },
];

/// What the demonstration and the scenarios start.
const PROGRAMS: &[&str] = &[
    "warren-tunnel-engine",
    "warren-demo",
    "warren-bench",
    "warren-lab-app",
    "mesh-agent",
    "keyd",
    "warren",
    "warren-cni",
];

/// Tests and examples, and how cargo builds them: of the whole workspace, as `cargo xtask test` does; another selection
/// would be other features, and the dependencies once more.
const TESTS: &[(&str, &[&str])] = &[
    (
        "kernel_driver",
        &["build", "--workspace", "--example", "kernel_driver"],
    ),
    ("engine", &["test", "--no-run", "--workspace", "--test", "engine"]),
    (
        "routing",
        &["test", "--no-run", "--workspace", "--test", "routing"],
    ),
    (
        "two_nodes",
        &["test", "--no-run", "--workspace", "--test", "two_nodes"],
    ),
    ("warren_bpf", &["test", "--no-run", "--workspace", "--lib"]),
];

pub(super) fn list() {
    for step in STEPS {
        println!("{:<10} {}", step.name, step.about);
    }
}

pub(super) fn chosen(names: &[String]) -> Result<Vec<&'static Step>> {
    if let Some(name) = names
        .iter()
        .find(|name| !STEPS.iter().any(|step| step.name == **name))
    {
        bail!("there is no step `{name}`: `cargo xtask vm --list` names them");
    }
    // The short one is a part of the others.
    let wanted = |step: &&Step| match names {
        [] => step.name != SHORT,
        names => names.iter().any(|name| name == step.name),
    };
    Ok(STEPS.iter().filter(wanted).collect())
}

/// Builds everything and returns the script that runs the steps, all of them, also after one has failed.
pub(super) fn script(steps: &[&Step], results: &Path) -> Result<String> {
    println!("vm: building (minutes the first time) ...");
    crate::command::run(cargo().args(["build", "--quiet", "--workspace"]))?;
    let bin = results.join("bin");
    fs::create_dir(&bin)?;
    for name in PROGRAMS {
        link(&paths::target().join("debug").join(name), &bin.join(name))?;
    }
    for (wanted, arguments) in TESTS {
        if !steps.iter().any(|step| step.tests.contains(wanted)) {
            continue;
        }
        for (name, executable) in built(arguments)? {
            if name == *wanted {
                link(&executable, &bin.join(name))?;
            }
        }
    }
    let mut script = format!("BIN={}\nfailed=0\n", super::quoted(&[bin.display().to_string()]));
    script += "echo \"Linux $(uname -r)\"; modprobe -a wireguard tun || exit 1\n";
    for Step {
        name,
        about,
        script: work,
        ..
    } in steps
    {
        let title = super::quoted(&[format!("=== {name}: {about}")]);
        writeln!(script, "echo; echo {title}; SECONDS=0")?;
        writeln!(
            script,
            "if ( {work} ); then verdict=ok; else verdict=FAILED; failed=$((failed + 1)); fi"
        )?;
        writeln!(script, "echo \"$verdict {name} after $SECONDS s\"")?;
    }
    Ok(script + "exit $failed\n")
}

fn link(from: &Path, to: &Path) -> Result<()> {
    fs::hard_link(from, to)
        .or_else(|_| fs::copy(from, to).map(drop))
        .with_context(|| format!("cannot link {} to {}", from.display(), to.display()))
}

/// What cargo builds with these arguments, by the name of its target.
fn built(arguments: &[&str]) -> Result<Vec<(String, PathBuf)>> {
    let mut command = cargo();
    command.args(arguments).args(["--quiet", "--message-format=json"]);
    let messages = output(&mut command)?;
    let artifacts = messages.lines().filter_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let executable = message.get("executable")?.as_str()?;
        let name = message.get("target")?.get("name")?.as_str()?;
        Some((name.to_owned(), PathBuf::from(executable)))
    });
    Ok(artifacts.collect())
}

#[cfg(test)]
mod tests {
    use super::{SHORT, STEPS, TESTS, chosen};

    #[test]
    fn what_a_step_runs_is_built() {
        for step in STEPS {
            for test in step.tests {
                assert!(
                    TESTS.iter().any(|(name, _)| name == test),
                    "{}: {test}",
                    step.name
                );
                assert!(step.script.contains(test), "{}: {test}", step.name);
            }
            for (name, _) in TESTS {
                let runs = step.script.contains(&format!("$BIN/{name} "));
                assert!(!runs || step.tests.contains(name), "{}: {name}", step.name);
            }
        }
        assert_eq!(chosen(&[SHORT.to_owned()]).unwrap().len(), 1);
        assert_eq!(chosen(&[]).unwrap().len(), STEPS.len() - 1);
    }
}
