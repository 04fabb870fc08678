//! The harness itself, without Warren: a plain routed cluster whose packets the capture must see in clear.

use std::{path::Path, time::Duration};

use anyhow::{Result, ensure};
use warren_e2e::{
    app::ask::Protocol,
    lab::{Lab, LabOptions, PodSpec, running, wait::wait_for},
};

fn plain(nodes: u8) -> LabOptions {
    LabOptions {
        nodes,
        warren: false,
        ..LabOptions::default()
    }
}

#[test]
fn a_plain_lab_carries_everything_in_clear() -> Result<()> {
    Lab::run(plain(2), |lab| {
        let capture = lab.capture()?;
        let near = lab.add_pod(PodSpec::new("near", 1))?;
        let far = lab.add_pod(PodSpec::new("far", 2))?;
        for v6 in [false, true] {
            let to = far.address(v6)?;
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Http] {
                let answer = near.ask(protocol, to, 64 << 10)?;
                ensure!(answer.name == "far", "{protocol:?}: {answer:?}");
            }
            let pings = near.ping(to, 2, 1400)?;
            ensure!(pings.received >= 1, "{pings:?}");
            ensure!(near.transfer(to, 4 << 20)?.corrupt_at.is_none());
            let flow = near.flow(to, 1000)?;
            let before = capture.counts().plaintext;
            // Stragglers of the transfer are seen as well: wait for more than the flow must have sent.
            wait_for(Duration::from_secs(10), "the flow is seen", || {
                capture.counts().plaintext > before + 500
            })?;
            let report = flow.finish()?;
            ensure!(
                report.sent >= 200 && report.lost == 0 && report.receiver == "far",
                "{report:?}"
            );
        }
        lab.delete_pod(far)?;
        let counts = capture.finish()?;
        ensure!(counts.plaintext > 400 && counts.encrypted == 0, "{counts:?}");
        Ok(())
    })
}

#[test]
fn a_node_survives_a_power_cycle_and_nothing_survives_the_lab() -> Result<()> {
    let lab = Lab::start(plain(2))?;
    let node = lab.node(2);
    let dir = lab.dir().to_path_buf();
    let pod = lab.add_pod(PodSpec::new("doomed", 2))?;
    let pid = pod.place().pid;
    node.run(["touch", "/var/lib/warren/kept", "/run/lost", "/sys/fs/bpf"])?;
    node.power_off()?;
    ensure!(
        !Path::new(&format!("/proc/{pid}")).exists(),
        "the pod outlived its node"
    );
    node.boot()?;
    lab.connect(&node)?;
    ensure!(node.run(["ls", "/run", "/var/lib/warren"])?.contains("kept"));
    ensure!(node.run(["ls", "/run/lost"]).is_err(), "/run survived");
    let again = lab.add_pod(PodSpec::new("again", 2))?;
    let near = lab.add_pod(PodSpec::new("near", 1))?;
    ensure!(near.ask(Protocol::Tcp, again.address(true)?, 1)?.name == "again");
    let pids = [near.place().pid, lab.underlay().pid];
    drop(lab);
    ensure!(!dir.exists(), "{} is left", dir.display());
    for pid in pids {
        ensure!(
            !Path::new(&format!("/proc/{pid}")).exists(),
            "process {pid} is left"
        );
    }
    Ok(())
}

#[test]
fn a_panic_removes_the_lab() {
    let (send, receive) = std::sync::mpsc::channel();
    let died = std::thread::spawn(move || {
        let lab = Lab::start(plain(1)).expect("a lab");
        send.send((lab.dir().to_path_buf(), lab.underlay().pid))
            .expect("a listener");
        panic!("on purpose");
    })
    .join();
    assert!(died.is_err());
    let (dir, pid) = receive.recv().expect("the lab started");
    assert!(!dir.join("bin").exists() && !Path::new(&format!("/proc/{pid}")).exists());
    assert!(dir.join("logs/lab.log").exists(), "logs of a failed lab are kept");
    std::fs::remove_dir_all(dir).expect("ours");
}

#[test]
fn sigkill_of_the_harness_removes_the_lab() -> Result<()> {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_warren-lab"));
    let mut child = command
        .args(["up", "--nodes", "1", "--plain"])
        .stdout(std::process::Stdio::null())
        .spawn()?;
    let mine = || {
        let parent = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
        let is_mine = |pid: u32| {
            parent(pid).and_then(|stat| {
                stat.rsplit(')')
                    .next()?
                    .split_whitespace()
                    .nth(1)?
                    .parse::<u32>()
                    .ok()
            }) == Some(child.id())
        };
        running()
            .ok()?
            .into_iter()
            .find(|lab| is_mine(lab.reaper) && lab.dir.join("node1").exists())
    };
    wait_for(Duration::from_secs(30), "the lab is up", || mine().is_some())?;
    let lab = mine().expect("just seen");
    child.kill()?;
    child.wait()?;
    wait_for(Duration::from_secs(20), "the lab is gone", || {
        !lab.dir.exists() && !Path::new(&format!("/proc/{}", lab.reaper)).exists()
    })
}
