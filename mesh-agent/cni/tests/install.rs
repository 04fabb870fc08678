//! Installing into folders as CNI plugins leave them.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use tempfile::TempDir;

const LIST: &str = r#"{ "name": "lab", "cniVersion": "1.0.0", "disableCheck": true,
  "plugins": [ { "type": "ptp", "ipam": { "type": "host-local" } }, { "type": "portmap" } ] }"#;
const SINGLE: &str = r#"{ "cniVersion": "0.4.0", "name": "lab", "type": "bridge", "bridge": "cni0" }"#;

fn command(arguments: &[&str], folder: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warren-cni"));
    command.args(arguments).env_remove("CNI_COMMAND");
    for (option, name) in [("--cni-conf-dir", "net.d"), ("--cni-bin-dir", "bin")] {
        command.arg(option).arg(folder.path().join(name));
    }
    command
}

fn run(arguments: &[&str], folder: &TempDir) -> Result<String, (i32, String)> {
    let output = command(arguments, folder).output().expect("run");
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err((output.status.code().expect("a code"), said))
}

fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = TempDir::new().expect("folder");
    fs::create_dir(folder.path().join("net.d")).expect("net.d");
    for (name, content) in files {
        fs::write(folder.path().join("net.d").join(name), content).expect("write");
    }
    folder
}

fn types(path: &Path) -> Vec<String> {
    let list: Value = serde_json::from_slice(&fs::read(path).expect("read")).expect("JSON");
    let plugins = list["plugins"].as_array().expect("a list");
    plugins
        .iter()
        .map(|plugin| plugin["type"].as_str().expect("type").to_owned())
        .collect()
}

fn names(folder: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(folder.path().join("net.d")).expect("list");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    names
}

#[test]
fn a_list_gets_the_plugin_once_and_loses_it_again() {
    let folder = folder(&[("10-lab.conflist", LIST), ("20-other.conflist", LIST)]);
    let path = folder.path().join("net.d/10-lab.conflist");
    run(
        &["install", "--socket", "/run/x.sock", "--timeout-seconds=7"],
        &folder,
    )
    .expect("install");
    assert_eq!(types(&path), ["ptp", "portmap", "warren-cni"]);
    let list: Value = serde_json::from_slice(&fs::read(&path).expect("read")).expect("JSON");
    assert_eq!(
        list["plugins"][2],
        json!({ "type": "warren-cni", "socket": "/run/x.sock", "timeoutSeconds": 7 })
    );
    assert_eq!(
        (&list["disableCheck"], &list["name"]),
        (&json!(true), &json!("lab"))
    );
    let other = folder.path().join("net.d/20-other.conflist");
    assert_eq!(
        fs::read_to_string(other).expect("read"),
        LIST,
        "runtimes use the first file only"
    );

    let installed = fs::read(&path).expect("read");
    run(
        &["install", "--socket", "/run/x.sock", "--timeout-seconds", "7"],
        &folder,
    )
    .expect("again");
    assert_eq!(
        fs::read(&path).expect("read"),
        installed,
        "the second time changes nothing"
    );
    run(&["install"], &folder).expect("other settings");
    assert_eq!(types(&path), ["ptp", "portmap", "warren-cni"]);
    let program = folder.path().join("bin/warren-cni");
    assert_eq!(
        fs::read(&program).expect("read"),
        fs::read(env!("CARGO_BIN_EXE_warren-cni")).expect("read")
    );

    run(&["uninstall"], &folder).expect("uninstall");
    assert_eq!(
        fs::read_to_string(&path).expect("read"),
        LIST,
        "the user's own bytes are back"
    );
    assert_eq!(names(&folder), ["10-lab.conflist", "20-other.conflist"]);
    assert!(!program.exists());
    run(&["uninstall"], &folder).expect("twice is no error");
}

#[test]
fn a_single_plugin_becomes_a_list() {
    let folder = folder(&[("10-lab.conf", SINGLE)]);
    run(&["install"], &folder).expect("install");
    assert_eq!(names(&folder), ["10-lab.conf.warren-backup", "10-lab.conflist"]);
    let path = folder.path().join("net.d/10-lab.conflist");
    assert_eq!(types(&path), ["bridge", "warren-cni"]);
    let list: Value = serde_json::from_slice(&fs::read(&path).expect("read")).expect("JSON");
    assert_eq!(
        (&list["cniVersion"], &list["name"]),
        (&json!("0.4.0"), &json!("lab"))
    );
    run(&["install"], &folder).expect("again");
    run(&["uninstall"], &folder).expect("uninstall");
    assert_eq!(names(&folder), ["10-lab.conf"]);
    assert_eq!(
        fs::read_to_string(folder.path().join("net.d/10-lab.conf")).expect("read"),
        SINGLE
    );
}

#[test]
fn a_list_that_its_owner_changed_keeps_the_change() {
    let folder = folder(&[("10-lab.conflist", LIST)]);
    run(&["install"], &folder).expect("install");
    let path = folder.path().join("net.d/10-lab.conflist");
    let changed = fs::read_to_string(&path)
        .expect("read")
        .replace("portmap", "bandwidth");
    fs::write(&path, changed).expect("write");
    run(&["uninstall"], &folder).expect("uninstall");
    assert_eq!(types(&path), ["ptp", "bandwidth"]);
}

#[test]
fn what_cannot_be_used_is_named() {
    let empty = folder(&[]);
    let (code, message) = run(&["install"], &empty).expect_err("nothing there");
    assert!(
        code == 1 && message.contains("there is no network configuration"),
        "{message}"
    );
    let old = folder(&[("10-lab.conf", r#"{ "name": "lab", "type": "bridge" }"#)]);
    let (_, message) = run(&["install"], &old).expect_err("no version");
    assert!(message.contains("plugins cannot be chained"), "{message}");
    // A broken file is passed over, as runtimes do.
    let broken = folder(&[
        ("05-broken.conflist", "{"),
        ("06-note.json", "{}"),
        ("10-lab.conflist", LIST),
    ]);
    run(&["install"], &broken).expect("install");
    assert_eq!(types(&broken.path().join("net.d/10-lab.conflist")).len(), 3);
    for arguments in [
        &["install", "--nonsense"][..],
        &["dance"],
        &["install", "--timeout-seconds", "0"],
    ] {
        let (code, message) = run(arguments, &empty).expect_err("wrong");
        assert_eq!((code, message.lines().count()), (2, 1), "{message}");
    }
}

#[test]
fn waiting_and_watching() {
    let folder = folder(&[]);
    let mut child = command(&["install", "--watch"], &folder)
        .stdout(Stdio::piped())
        .spawn()
        .expect("start");
    let mut lines = BufReader::new(child.stdout.take().expect("output")).lines();
    let mut line = || lines.next().expect("a line").expect("text");
    assert!(line().starts_with("warren-cni: waiting"));
    let path = folder.path().join("net.d/10-lab.conflist");
    fs::write(&path, LIST).expect("write");
    assert!(line().starts_with("warren-cni: added to"));
    // The CNI plugin's own installer writes its file again.
    fs::write(&path, LIST).expect("write");
    assert!(line().starts_with("warren-cni: added to"));
    assert_eq!(types(&path), ["ptp", "portmap", "warren-cni"]);
    child.kill().expect("stop");
    child.wait().expect("stopped");
}
