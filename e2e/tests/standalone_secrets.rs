//! A search for secrets in everything that an operator or a log collector can see, at the most verbose level, while keys rotate,
//! processes die and commands fail.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use warren_e2e::{
    bench::rotation::load::pods,
    lab::{
        KEYD_SOCKET, Lab, LabOptions, QUICKLY,
        secrets::{Finder, Secret},
    },
    scenario::{answers, two_nodes},
};

/// The limit ends a broken run.
const LIMIT: Duration = Duration::from_secs(120);

/// Where keyd keeps its keys.
fn keyd_state(lab: &Lab) -> std::path::PathBuf {
    lab.node(1).dir().join("state/keyd")
}

/// The key that signs now.
fn signing_key(lab: &Lab, name: &str) -> Result<Secret> {
    Secret::signing_key(name, &fs::read(keyd_state(lab).join("snapshot-signing.key"))?)
}

/// The nodes' own keys as they are on disk now.
fn node_keys(lab: &Lab) -> Result<Vec<Secret>> {
    let mut keys = Vec::new();
    for node in lab.nodes() {
        keys.extend(node.private_keys()?.into_iter().map(|(_, key)| key));
        keys.extend(node.pre_shared_keys()?.into_iter().map(|key| key.secret));
    }
    Ok(keys)
}

/// What does not change: the CA's key, clients' keys, join tokens.
fn credentials(lab: &Lab) -> Result<Vec<Secret>> {
    let mut secrets = vec![Secret::pkcs8(
        "the CA's key",
        &fs::read(keyd_state(lab).join("ca.key"))?,
    )?];
    for node in lab.nodes() {
        let name = format!("{}'s client key", node.name);
        let key = fs::read(node.dir().join("state/agent/trust/client.key.der"))?;
        secrets.push(Secret::pkcs8(&name, &key)?);
        let token = fs::read_to_string(node.dir().join("etc/join-token"))?;
        let secret = token.trim().split('.').nth(2).context("a token has four parts")?;
        secrets.push(Secret::text(&format!("{}'s join token", node.name), secret));
    }
    Ok(secrets)
}

#[test]
fn no_secret_is_in_logs_metrics_status_or_manifests() -> Result<()> {
    let options = LabOptions {
        verbose: true,
        ..two_nodes(true)
    };
    Lab::run(options, |lab| {
        let pods = pods(lab)?;
        let mut secrets = node_keys(lab)?;
        secrets.push(signing_key(lab, "the first signing key")?);
        lab.rotate(&[&["--all"], &QUICKLY[..]].concat())?;
        lab.warren(&["keys", "rotate-signing"])?;
        secrets.push(signing_key(lab, "the second signing key")?);
        secrets.extend(node_keys(lab)?);
        // What fails says more than what works.
        lab.warren(&["keys", "rotate", "--node", "nobody", "--wait", "--timeout", "2s"])?;
        for node in lab.nodes() {
            node.kill_agent()?;
            node.start_agent()?;
        }
        lab.node(1).kill_keyd()?;
        lab.node(1).start_keyd()?;
        lab.wait_ready(LIMIT)?;
        secrets.extend(node_keys(lab)?);
        secrets.extend(credentials(lab)?);
        ensure!(secrets.len() >= 11, "{secrets:?}");
        let finder = Finder::new(secrets);
        power_check(lab, &finder)?;
        // A keyd whose keys are damaged says so, and not what is left of them.
        let damaged = lab.node(1).dir().join("state/damaged");
        fs::create_dir_all(&damaged)?;
        for (name, keep) in [("ca.crt", 1), ("ca.key", 2), ("snapshot-signing.key", 2)] {
            let content = fs::read(keyd_state(lab).join(name))?;
            fs::write(damaged.join(name), &content[..content.len() / keep])?;
        }

        let mut found = finder.in_files(&lab.dir().join("logs"), &|_| false)?;
        found.extend(finder.in_files(lab.manifests().dir(), &|_| false)?);
        for node in lab.nodes() {
            // Each secret is in the file that is made for it, and nowhere else.
            let own = |path: &Path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                path.starts_with(node.key_folder())
                    || ["client.key.der", "ca.key", "snapshot-signing.key"].contains(&&*name)
            };
            found.extend(finder.in_files(&node.dir().join("state"), &own)?);
        }
        let said = everything_said(lab)?;
        ensure!(
            said.iter().all(|(_, text)| !text.is_empty()),
            "something said nothing"
        );
        for (what, text) in &said {
            let here = finder.find(text.as_bytes()).into_iter();
            found.extend(here.map(|found| format!("{found} of {what}")));
        }
        ensure!(found.is_empty(), "{found:#?}");
        for log in ["node1-agent.log", "node1-keyd.log"] {
            let logged = fs::read_to_string(lab.dir().join("logs").join(log))?;
            ensure!(logged.contains("TRACE"), "{log} is not at its most verbose level");
        }
        answers(&pods[0], &pods[1])
    })
}

/// The search must find what is there: every secret in its own file, and each in a log into which it was put.
fn power_check(lab: &Lab, finder: &Finder) -> Result<()> {
    let node = lab.node(1);
    let places = [
        node.key_folder(),
        node.dir().join("etc"),
        node.dir().join("state/agent/trust"),
        keyd_state(lab),
    ];
    for place in places {
        let found = finder.in_files(&place, &|_| false)?;
        ensure!(!found.is_empty(), "it finds nothing in {}", place.display());
    }
    finder.power_check(&lab.dir().join("logs"))
}

/// What every program says, by what it is.
fn everything_said(lab: &Lab) -> Result<Vec<(String, String)>> {
    let mut said = Vec::new();
    for node in lab.nodes() {
        let mut commands: Vec<Vec<&str>> = [
            vec!["mesh-agent", "encrypt", "status", "-o", "json"],
            vec!["mesh-agent", "encrypt", "status", "-v"],
            vec!["mesh-agent", "status", "-o", "json"],
            vec!["mesh-agent", "endpoints", "-o", "json"],
            vec!["mesh-agent", "policy", "-o", "json"],
            vec!["mesh-agent", "conntrack", "-o", "json"],
            vec!["mesh-agent", "events", "-o", "json"],
            vec!["wg", "show", "all"],
        ]
        .into();
        if node.number == 1 {
            let damaged = "/var/lib/warren/damaged";
            commands.push(vec![
                "keyd",
                "run",
                "--config",
                "/etc/warren/cluster.yaml",
                "--source",
                "manifests",
                "--manifests",
                damaged,
                "--state-dir",
                damaged,
            ]);
            commands.push(vec!["curl", "-sS", "http://127.0.0.1:9964/metrics"]);
            commands.push(vec!["keyd", "status", "-o", "json", "--socket", KEYD_SOCKET]);
        }
        for command in commands {
            let output = node.place().output(&command)?;
            let text = [output.stdout, output.stderr].concat();
            let what = format!("{}: {}", node.name, command.join(" "));
            said.push((what, String::from_utf8_lossy(&text).into_owned()));
        }
    }
    for command in [
        &["keys", "list"][..],
        &["keys", "audit"],
        &["keys", "rotations"],
        &["keys", "signing"],
        &["encrypt", "status"],
        &["status"],
        &["endpoint", "list"],
        &["identity", "list"],
    ] {
        for format in ["text", "json"] {
            let output = lab.warren(&[command, &["-o", format]].concat())?;
            let text = [output.stdout, output.stderr].concat();
            said.push((command.join(" "), String::from_utf8_lossy(&text).into_owned()));
        }
    }
    Ok(said)
}
