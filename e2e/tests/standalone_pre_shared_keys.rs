//! Pre-shared keys go on, are renewed and go off by rotations that lose nothing.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use warren_e2e::{
    bench::rotation::gone::Former,
    lab::{
        Lab, LabOptions, QUICKLY,
        process::find,
        secrets::{Finder, PreShared},
    },
    scenario::{Flows, client_and_server, nothing_in_clear, two_nodes},
};

/// The limit ends a broken run.
const LIMIT: Duration = Duration::from_secs(120);

/// What the cluster's configuration says on all nodes from now on; keys that are there stay as they are.
fn configure(lab: &Lab, pre_shared_keys: bool) -> Result<()> {
    let mut config = lab.config().clone();
    config.pre_shared_keys = pre_shared_keys;
    for node in lab.nodes() {
        fs::write(
            node.dir().join("etc/cluster.yaml"),
            serde_saphyr::to_string(&config)?,
        )?;
        node.kill_agent()?;
        node.start_agent()?;
    }
    lab.wait_ready(LIMIT)
}

/// New keys for all, and nothing is left of those before.
fn rotate(lab: &Lab, prove: bool) -> Result<Former> {
    let former = Former::note(lab, &[1, 2], prove)?;
    lab.rotate(&[&["--all"], &QUICKLY[..]].concat())?;
    ensure!(former.gone(lab)? == 2, "two keys were replaced");
    lab.audit()?;
    Ok(former)
}

/// The pair has no pre-shared key anywhere, and each end says why.
fn none(lab: &Lab, why: &str) -> Result<()> {
    for node in lab.nodes() {
        let dump = node.device_dump()?;
        let set = dump.lines().find_map(|line| line.strip_prefix("preshared_key="));
        ensure!(
            set.is_none_or(|key| key.bytes().all(|digit| digit == b'0')),
            "{} has a pre-shared key on a device",
            node.name
        );
        ensure!(
            node.pre_shared_keys()?.is_empty(),
            "{} has one on disk",
            node.name
        );
        let peers = node.encrypt_status()?.peers;
        ensure!(
            peers.iter().all(|peer| {
                let said = peer.no_pre_shared_key.as_deref().unwrap_or_default();
                !peer.pre_shared_key && said.contains(why)
            }),
            "{}: {peers:?}",
            node.name
        );
    }
    let status = lab.warren_json(&["encrypt", "status"])?;
    ensure!(status["preSharedPairs"] == 0, "{status}");
    Ok(())
}

/// Both ends of the pair have the same key, on disk and on the device, and nobody else has it.
fn shared(lab: &Lab) -> Result<Vec<PreShared>> {
    let mut all = Vec::new();
    for node in lab.nodes() {
        let keys = node.pre_shared_keys()?;
        ensure!(keys.len() == 1, "{}: {keys:?}", node.name);
        all.extend(keys);
        let peers = node.encrypt_status()?.peers;
        ensure!(
            !peers.is_empty() && peers.iter().all(|peer| peer.pre_shared_key),
            "{}: {peers:?}",
            node.name
        );
    }
    for key in &all {
        let finder = Finder::new([key.secret.clone()]);
        for node in lab.nodes() {
            let on_device = finder.find(node.device_dump()?.as_bytes());
            let on_disk = finder.in_files(&node.key_folder(), &|_| false)?;
            ensure!(
                !on_device.is_empty() && !on_disk.is_empty(),
                "{key:?} is not on {}: device {on_device:?}, disk {on_disk:?}",
                node.name
            );
        }
    }
    let finder = Finder::new(all.iter().map(|key| key.secret.clone()));
    let keyd = find(lab.node(1).try_place()?.pid, &["keyd", "run"])?;
    let keyd = keyd.first().context("keyd does not run")?;
    let known = finder.in_process(*keyd)?;
    ensure!(known.is_empty(), "keyd knows it: {known:?}");
    let status = lab.warren_json(&["encrypt", "status"])?;
    ensure!(status["preSharedPairs"] == 1, "{status}");
    Ok(all)
}

#[test]
fn they_go_on_are_renewed_and_go_off_without_losing_a_packet() -> Result<()> {
    let options = LabOptions {
        tune: |config| config.pre_shared_keys = false,
        ..two_nodes(true)
    };
    Lab::run(options, |lab| {
        let capture = lab.capture()?;
        let (client, server) = client_and_server(lab)?;
        none(lab, "preSharedKeys is off")?;
        let flows = [Flows::start(&client, &server)?, Flows::start(&server, &client)?];

        configure(lab, true)?;
        none(lab, "was made without: rotate it")?;
        rotate(lab, false)?;
        let first = shared(lab)?;

        // Here each is found first where it has to be gone afterwards.
        let former = rotate(lab, true)?;
        ensure!(former.shared() == 2, "one at each end: {former:?}");
        let second = shared(lab)?;
        ensure!(
            first
                .iter()
                .all(|old| second.iter().all(|new| new.peer != old.peer)),
            "{second:?}"
        );

        configure(lab, false)?;
        shared(lab)?;
        rotate(lab, false)?;
        none(lab, "preSharedKeys is off")?;

        flows.into_iter().try_for_each(Flows::finish_without_loss)?;
        nothing_in_clear(&capture.finish()?)
    })
}
