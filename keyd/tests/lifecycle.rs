//! keyd's life: restarts, resuming agents, slow agents, bad input, tools.

#[expect(dead_code, reason = "the hostile suite uses the rest")]
mod support;

use std::{fs, path::Path, process::Command};

use support::{Agent, Keyd, channel, hello, node, pod};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use warren_keyd_api::{
    convert::Record,
    proof,
    proto::{Hello, keyd_message::Body as Heard},
    snapshot::{Directory, RootChain},
};
use warren_model::IdentityId;

fn node_of(agent: &Agent, name: &str) -> warren_model::NodeRecord {
    let found = agent
        .directory
        .records()
        .flatten()
        .find_map(|record| match record {
            Record::Node(node) if node.name.as_str() == name => Some(node),
            _ => None,
        });
    found.unwrap()
}

#[tokio::test]
async fn a_killed_keyd_comes_back_with_keys_endpoints_and_a_higher_epoch() {
    let mut keyd = Keyd::start(&[node(1), node(2), pod("web", None)].concat());
    let enrolment = keyd.enroll("node1").await;
    let mut agent = Agent::connect(&keyd.address, "node1", &enrolment).await;
    let key = proof::generate_private_key().unwrap();
    assert!(agent.prove(&key).await.accepted);
    let identity = agent.add("web", "u1", "10.244.1.5").await.identity;
    agent
        .until_directory(|d| d.records().flatten().any(|r| matches!(r, Record::Workload(_))))
        .await;
    let old = agent.directory.position();

    keyd.restart();
    // The first to come back is another agent: it must see everything at once.
    let other = keyd.agent("node2").await;
    assert!(other.directory.position().0 > old.0);
    assert_eq!(
        node_of(&other, "node1").slots[0].public_key,
        proof::public_key(&key)
    );
    let workload = other
        .directory
        .records()
        .flatten()
        .find_map(|record| match record {
            Record::Workload(workload) => Some(workload),
            _ => None,
        });
    assert_eq!(workload.unwrap().identity, IdentityId(identity));
    // The old certificate and the old copy of the directory are still good.
    let resumed = Hello {
        resume_epoch: old.0,
        resume_version: old.1,
        ..hello("node1")
    };
    let channel = channel(&keyd.address, &enrolment).await;
    let agent = Agent::open_on(channel, resumed, agent.directory.clone())
        .await
        .unwrap();
    assert_eq!(agent.directory.entries(), other.directory.entries());
    assert_eq!(keyd.status().await.problems, Vec::<String>::new());
}

#[tokio::test]
async fn a_resuming_agent_gets_only_what_it_lacks() {
    let keyd = Keyd::start(&[node(1), node(2)].concat());
    let enrolment = keyd.enroll("node1").await;
    let first = Agent::connect(&keyd.address, "node1", &enrolment).await;
    let copy: Directory = first.directory.clone();
    drop(first);
    let mut other = keyd.agent("node2").await;
    assert!(
        other
            .prove(&proof::generate_private_key().unwrap())
            .await
            .accepted
    );

    let (resume_epoch, resume_version) = copy.position();
    let resumed = Hello {
        resume_epoch,
        resume_version,
        ..hello("node1")
    };
    let channel = channel(&keyd.address, &enrolment).await;
    let mut stream = warren_keyd_api::stream::AgentStream::open(channel.clone(), resumed.clone())
        .await
        .unwrap();
    let update = loop {
        match stream.receive().await.unwrap().unwrap() {
            Heard::Update(update) => break update,
            Heard::Welcome(_) | Heard::Roots(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert!(!update.snapshot && update.upserts.len() == 1, "{update:?}");
    let mut agent = Agent::open_on(channel, resumed, copy).await.unwrap();
    assert_eq!(node_of(&agent, "node2").slots.len(), 2);
    assert!(
        agent
            .prove(&proof::generate_private_key().unwrap())
            .await
            .accepted
    );
}

#[tokio::test]
async fn an_agent_that_does_not_read_blocks_nobody() {
    let keyd = Keyd::start(&[node(1), node(2)].concat());
    let mut honest = keyd.agent("node1").await;
    let enrolment = keyd.enroll("node2").await;
    // Says Hello and never reads again.
    let _deaf =
        warren_keyd_api::stream::AgentStream::open(channel(&keyd.address, &enrolment).await, hello("node2"))
            .await
            .unwrap();
    keyd.status_where("node2 is connected", |status| {
        status.nodes.iter().filter(|node| node.connected).count() == 2
    })
    .await;
    for n in 1..=250_u32 {
        let result = honest
            .add(&format!("p{n}"), &format!("u{n}"), &format!("10.244.1.{n}"))
            .await;
        assert_eq!(result.error, "");
    }
    // More versions than the deaf agent's queue holds.
    for n in 1..=250_u32 {
        honest.delete(&format!("p{n}"), &format!("u{n}")).await;
    }
    keyd.status_where("no workload", |status| status.workloads == 0)
        .await;
    assert!(
        honest
            .prove(&proof::generate_private_key().unwrap())
            .await
            .accepted
    );
}

#[tokio::test]
async fn malformed_manifests_are_named_and_the_rest_works() {
    let keyd = Keyd::start(&node(1));
    let mut agent = keyd.agent("node1").await;
    let dir = keyd.dir.path().join("m");
    fs::write(
        dir.join("broken.yaml"),
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: [x\n",
    )
    .unwrap();
    fs::write(
        dir.join("nocidr.yaml"),
        "apiVersion: v1\nkind: Node\nmetadata: {name: bare}\n",
    )
    .unwrap();
    fs::write(dir.join("good.yaml"), pod("web", None)).unwrap();
    let status = keyd
        .status_where("three problems", |status| status.problems.len() == 3)
        .await;
    for sentence in [
        "manifest broken.yaml, line ",
        "node bare has no podCIDRs",
        "node bare has no InternalIP",
    ] {
        assert!(
            status.problems.iter().any(|problem| problem.contains(sentence)),
            "{sentence}: {:?}",
            status.problems
        );
    }
    assert!(status.problems.iter().all(|problem| !problem.contains('\n')));
    assert!(agent.add("web", "u1", "10.244.1.5").await.identity >= 256);
    fs::remove_file(dir.join("broken.yaml")).unwrap();
    fs::remove_file(dir.join("nocidr.yaml")).unwrap();
    keyd.status_where("no problems", |status| status.problems.is_empty())
        .await;
}

#[tokio::test]
async fn status_tokens_metrics_and_health_are_served() {
    let keyd = Keyd::start(&node(1));
    keyd.status_where("one node", |status| status.nodes.len() == 1)
        .await;
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_keyd"))
            .args(args)
            .arg("--socket")
            .arg(keyd.socket())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let json: serde_json::Value = serde_json::from_str(&run(&["status", "-o", "json"])).unwrap();
    assert_eq!(json["leader"], true);
    assert_eq!(json["nodes"][0]["name"], "node1");
    assert!(run(&["status"]).contains("node1"));
    assert!(run(&["token", "create", "node1"]).starts_with("warren1.node1."));
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(keyd.socket()).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);

    let line = keyd
        .log()
        .into_iter()
        .find(|line| line.contains("metrics="))
        .unwrap();
    let address = line.split("metrics=").nth(1).unwrap().trim().to_owned();
    for (path, wanted) in [
        ("/healthz", "ok"),
        ("/readyz", "ready"),
        ("/metrics", "\nwarren_keyd_leader 1\n"),
        ("/metrics", "\nwarren_keyd_refused_keys_total 0\n"),
    ] {
        let mut tcp = tokio::net::TcpStream::connect(&address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        tcp.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.contains(wanted),
            "{path}: {answer}"
        );
    }
}

#[tokio::test]
async fn secrets_are_0600_and_in_no_log() {
    let keyd = Keyd::start(&node(1));
    let token = keyd.join_token("node1", 0).await;
    warren_keyd_api::tls::enroll(&keyd.address, &token).await.unwrap();
    let state = keyd.dir.path().join("state");
    let key = fs::read_to_string(state.join("snapshot-signing.key")).unwrap();
    let key: serde_json::Value = serde_json::from_str(&key).unwrap();
    for line in keyd.log() {
        assert!(
            !line.contains(token.expose_secret()) && !line.contains(key["seed"].as_str().unwrap()),
            "{line}"
        );
    }
    for path in files(&state) {
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o077, 0, "{}", path.display());
    }
    let roots = RootChain::from_text(&fs::read_to_string(state.join("snapshot-roots")).unwrap());
    assert!(roots.is_ok());
}

fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = vec![];
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path))
        } else {
            found.push(path)
        }
    }
    found
}

/// Runs keyd where it cannot start; the sentence that it says.
fn refused_start(dir: &Path, args: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_keyd"))
        .current_dir(dir)
        .args([
            "run",
            "--listen",
            "127.0.0.1:0",
            "--metrics",
            "127.0.0.1:0",
            "--admin-socket",
            "keyd.sock",
        ])
        .args(args)
        .env("RUST_LOG", "off")
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn wrong_flags_files_and_settings_are_one_clear_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    fs::create_dir(path.join("m")).unwrap();
    let write = |name: &str, text: &str| fs::write(path.join(name), text).unwrap();
    write(
        "good.yaml",
        "podPools: [10.244.0.0/16]\nnodePools: [172.30.0.0/24]\n",
    );
    write(
        "typo.yaml",
        "podPool: [10.244.0.0/16]\nnodePools: [172.30.0.0/24]\n",
    );
    write(
        "overlap.yaml",
        "podPools: [10.244.0.0/16]\nnodePools: [10.244.1.0/24]\n",
    );
    fs::create_dir(path.join("half")).unwrap();
    write("half/ca.crt", "x");
    fs::create_dir(path.join("damaged")).unwrap();
    for name in ["ca.crt", "ca.key", "snapshot-signing.key"] {
        write(&format!("damaged/{name}"), "x");
    }
    let start = |config: &str, manifests: &str, state: &str| {
        let args = [
            "--source",
            "manifests",
            "--config",
            config,
            "--manifests",
            manifests,
            "--state-dir",
            state,
        ];
        refused_start(path, &args)
    };
    for ((code, said), word) in [
        (
            start("none.yaml", "m", "s"),
            "cannot read the configuration none.yaml",
        ),
        (start("typo.yaml", "m", "s"), "podPool"),
        (start("overlap.yaml", "m", "s"), "overlaps"),
        (
            start("good.yaml", "nowhere", "s"),
            "cannot read the manifest folder nowhere",
        ),
        (start("good.yaml", "m", "half"), "only some of"),
        (start("good.yaml", "m", "damaged"), "damaged"),
        (start("good.yaml", "m", "good.yaml"), "state folder"),
    ] {
        assert_eq!(code, 1, "{said}");
        assert!(said.contains(word), "{word}: {said}");
        assert_eq!(said.trim().lines().count(), 1, "{said}");
    }
    let (code, said) = refused_start(path, &["--source", "manifests", "--config", "good.yaml"]);
    assert_eq!(code, 2);
    assert!(said.contains("--manifests"), "{said}");
    let (code, _) = refused_start(path, &["--source", "elsewhere", "--config", "good.yaml"]);
    assert_eq!(code, 2);
}
