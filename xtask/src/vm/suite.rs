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

/// A step: `script` is what the guest runs, with the built programs in `$BIN`.
pub(super) struct Step {
    name: &'static str,
    about: &'static str,
    script: &'static str,
}

const STEPS: &[Step] = &[
    Step {
        name: "driver",
        about: "the driver of the kernel's WireGuard: two namespaces, changes under traffic",
        script: "$BIN/kernel_driver",
    },
    Step {
        name: "scenarios",
        about: "the kernel's own scenarios: kernel with kernel, kernel with the userspace engine",
        script: "WARREN_SCENARIO_ENGINES=kernel,warren WARREN_TUNNEL_ENGINE=$BIN/warren-tunnel-engine \
                 $BIN/engine --test-threads=3 alike mixed",
    },
    Step {
        name: "net",
        about: "devices, routes and rules; the probe for WireGuard",
        script: "$BIN/routing --test-threads=1 && $BIN/engine --test-threads=1 the_kernel_driver",
    },
    Step {
        name: "bpf",
        about: "the eBPF programs pass this kernel's verifier and judge alike",
        script: "$BIN/warren_bpf --test-threads=2",
    },
    Step {
        name: "agent",
        about: "two agents that find the kernel's WireGuard by themselves; one is killed",
        // One of them at a time, and not those that end the tunnel's process: there is none.
        script: "$BIN/two_nodes --test-threads=1 pods_talk",
    },
    Step {
        name: "demo",
        about: "the stand-alone lab on the kernel's WireGuard: capture, an agent killed under traffic",
        script: "WARREN_LAB_DATAPATH=kernel WARREN_LAB_PATIENCE=10 $BIN/warren-demo --json $WARREN_VM_RESULTS/demo.json",
    },
];

/// What the demonstration and the scenarios start.
const PROGRAMS: &[&str] = &[
    "warren-tunnel-engine",
    "warren-demo",
    "warren-lab-app",
    "mesh-agent",
    "keyd",
    "warren",
    "warren-cni",
];

/// Tests and examples: cargo's arguments, and the names of what is wanted of it.
const TESTS: &[(&[&str], &[&str])] = &[
    (
        &["build", "-p", "warren-wireguard", "--example", "kernel_driver"],
        &["kernel_driver"],
    ),
    (
        &["test", "--no-run", "-p", "warren-wireguard", "--test", "engine"],
        &["engine"],
    ),
    (
        &["test", "--no-run", "-p", "warren-net", "--test", "routing"],
        &["routing"],
    ),
    (
        &["test", "--no-run", "-p", "warren-bpf", "--lib"],
        &["warren_bpf"],
    ),
];

pub(super) fn list() {
    for step in STEPS {
        println!("{:<8} {}", step.name, step.about);
    }
}

pub(super) fn chosen(names: &[String]) -> Result<Vec<&'static Step>> {
    if let Some(name) = names
        .iter()
        .find(|name| !STEPS.iter().any(|step| step.name == **name))
    {
        bail!("there is no step `{name}`: `cargo xtask vm --list` names them");
    }
    let wanted = |step: &&Step| names.is_empty() || names.iter().any(|name| name == step.name);
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
    for (arguments, names) in TESTS {
        for (name, executable) in built(arguments)? {
            if names.contains(&name.as_str()) {
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
