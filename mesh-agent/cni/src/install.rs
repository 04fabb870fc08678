//! `warren-cni install` and `uninstall`: puts the plugin at the end of the node's chain of CNI plugins, and takes it
//! out again. The user's own file stays beside ours, with the ending `.warren-backup`.

use std::{
    env, fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::{Value, json};

use crate::spec::VERSIONS;

/// The plugin's type, which is also the name of its file.
const TYPE: &str = "warren-cni";
/// Container runtimes read `.conf`, `.conflist` and `.json` only.
const BACKUP: &str = "warren-backup";

const USAGE: &str = "\
warren-cni is the chained CNI plugin of Warren; container runtimes start it with CNI_COMMAND set.

Usage:
  warren-cni install   [--cni-conf-dir DIR] [--cni-bin-dir DIR] [--socket PATH] [--timeout-seconds N] [--wait | --watch]
  warren-cni uninstall [--cni-conf-dir DIR] [--cni-bin-dir DIR]
  warren-cni --version

install copies this program to the CNI directory and appends it to the first network configuration, which the
container runtime uses. Doing it twice changes nothing.

Options:
  --cni-conf-dir DIR   network configurations [default: /etc/cni/net.d]
  --cni-bin-dir DIR    CNI plugins [default: /opt/cni/bin]
  --socket PATH        the agent's socket [default: /run/warren/agent.sock]
  --timeout-seconds N  how long the agent may take per pod [default: 30]
  --wait               wait for a network configuration where there is none yet
  --watch              stay, and do it again when another plugin rewrites its configuration

Example:
  warren-cni install --wait
";

#[derive(Debug)]
struct Options {
    conf_dir: PathBuf,
    bin_dir: PathBuf,
    socket: String,
    timeout_seconds: u64,
    wait: bool,
    watch: bool,
}

/// Runs the command line; 2 for a wrong one.
pub(crate) fn run(arguments: impl Iterator<Item = String>) -> ExitCode {
    let arguments: Vec<String> = arguments.collect();
    match arguments.first().map(String::as_str) {
        Some("--version") => {
            println!("{TYPE} {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Some("help" | "-h" | "--help") => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let (command, options) = match parse(&arguments) {
        Ok(parsed) => parsed,
        Err(message) => {
            eprintln!("warren-cni: {message}; see warren-cni --help");
            return ExitCode::from(2);
        }
    };
    let result = match command {
        Command::Install => install(&options),
        Command::Uninstall => uninstall(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("warren-cni: {message}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Command {
    Install,
    Uninstall,
}

fn parse(arguments: &[String]) -> Result<(Command, Options), String> {
    let mut arguments = arguments.iter();
    let command = match arguments.next().map(String::as_str) {
        Some("install") => Command::Install,
        Some("uninstall") => Command::Uninstall,
        Some(other) => return Err(format!("{other:?} is no command")),
        None => return Err("a command is missing, and CNI_COMMAND is not set".into()),
    };
    let mut options = Options {
        conf_dir: "/etc/cni/net.d".into(),
        bin_dir: "/opt/cni/bin".into(),
        socket: "/run/warren/agent.sock".into(),
        timeout_seconds: 30,
        wait: false,
        watch: false,
    };
    while let Some(argument) = arguments.next() {
        let (name, inline) = match argument.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (argument.as_str(), None),
        };
        let mut value = || {
            inline
                .clone()
                .or_else(|| arguments.next().cloned())
                .ok_or(format!("{name} needs a value"))
        };
        match name {
            "--cni-conf-dir" => options.conf_dir = value()?.into(),
            "--cni-bin-dir" => options.bin_dir = value()?.into(),
            "--socket" if command == Command::Install => options.socket = value()?,
            "--timeout-seconds" if command == Command::Install => {
                let text = value()?;
                let seconds = text.parse().ok().filter(|seconds| *seconds > 0);
                options.timeout_seconds =
                    seconds.ok_or(format!("{text:?} is no number of seconds above 0"))?;
            }
            "--wait" if command == Command::Install && inline.is_none() => options.wait = true,
            "--watch" if command == Command::Install && inline.is_none() => options.watch = true,
            _ => return Err(format!("{argument:?} is no option of this command")),
        }
    }
    Ok((command, options))
}

fn install(options: &Options) -> Result<(), String> {
    copy_program(&options.bin_dir)?;
    // Watch first, then look: nothing that appears in between is missed.
    let watcher = match options.wait || options.watch {
        true => Some(Watcher::new(&options.conf_dir)?),
        false => None,
    };
    let mut waiting = false;
    loop {
        match append(options)? {
            Appended::Changed(path) => println!("warren-cni: added to {}", path.display()),
            Appended::AlreadyThere(path) if !options.watch => {
                println!("warren-cni: already in {}", path.display());
            }
            Appended::AlreadyThere(_) => {}
            Appended::NoConfiguration => {
                let directory = options.conf_dir.display();
                let Some(watcher) = &watcher else {
                    return Err(format!(
                        "there is no network configuration in {directory}: install a CNI plugin first, or use --wait"
                    ));
                };
                if !waiting {
                    println!("warren-cni: waiting for a network configuration in {directory}");
                    waiting = true;
                }
                watcher.wait()?;
                continue;
            }
        }
        match &watcher {
            Some(watcher) if options.watch => watcher.wait()?,
            _ => return Ok(()),
        }
    }
}

/// Blocks until something in a directory changes.
struct Watcher(Inotify, PathBuf);

impl Watcher {
    fn new(directory: &Path) -> Result<Self, String> {
        let failed = |error: io::Error| format!("cannot watch {}: {error}", directory.display());
        fs::create_dir_all(directory).map_err(failed)?;
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let events = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE;
        inotify
            .add_watch(directory, events)
            .map_err(|errno| failed(errno.into()))?;
        Ok(Self(inotify, directory.to_owned()))
    }

    fn wait(&self) -> Result<(), String> {
        match self.0.read_events() {
            Ok(_) => Ok(()),
            Err(errno) => Err(format!("cannot watch {}: {errno}", self.1.display())),
        }
    }
}

fn copy_program(bin_dir: &Path) -> Result<(), String> {
    let target = bin_dir.join(TYPE);
    let failed = |error: io::Error| format!("cannot install {}: {error}", target.display());
    let program = fs::read(env::current_exe().map_err(failed)?).map_err(failed)?;
    if fs::read(&target).is_ok_and(|installed| installed == program) {
        return Ok(());
    }
    fs::create_dir_all(bin_dir).map_err(failed)?;
    // A container runtime may be running the old one: replace the name, not the content.
    replace(&target, &program, 0o755).map_err(failed)
}

/// Writes a file completely, or not at all.
fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let write = || {
        fs::write(&temporary, content)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(mode))?;
        fs::File::open(&temporary)?.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

#[derive(Debug, PartialEq, Eq)]
enum Appended {
    Changed(PathBuf),
    AlreadyThere(PathBuf),
    NoConfiguration,
}

/// A network configuration, as a list or as a single plugin.
struct Found {
    path: PathBuf,
    content: Value,
    mode: u32,
}

impl Found {
    fn is_list(&self) -> bool {
        self.content["plugins"].is_array()
    }
}

/// Container runtimes take the first file by name that is a network configuration; so do we.
fn configurations(directory: &Path) -> Result<Vec<Found>, String> {
    let failed =
        |path: &Path, error: &dyn std::fmt::Display| format!("cannot read {}: {error}", path.display());
    let mut paths: Vec<PathBuf> = match fs::read_dir(directory) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(failed(directory, &error)),
    };
    paths.retain(|path| {
        path.extension()
            .is_some_and(|ending| ["conf", "conflist", "json"].iter().any(|known| ending == *known))
    });
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        let mode = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => metadata.permissions().mode() & 0o777,
            _ => continue,
        };
        let text = fs::read(&path).map_err(|error| failed(&path, &error))?;
        // Somebody may be writing it right now, and runtimes pass over what they cannot read.
        match serde_json::from_slice::<Value>(&text) {
            Ok(content) if content["plugins"].is_array() || content["type"].is_string() => {
                found.push(Found { path, content, mode });
            }
            Ok(_) => eprintln!(
                "warren-cni: {} is no network configuration: passed over",
                path.display()
            ),
            Err(error) => eprintln!("warren-cni: {}: passed over", failed(&path, &error)),
        }
    }
    Ok(found)
}

fn is_ours(plugin: &Value) -> bool {
    plugin["type"] == TYPE
}

fn append(options: &Options) -> Result<Appended, String> {
    let Some(found) = configurations(&options.conf_dir)?.into_iter().next() else {
        return Ok(Appended::NoConfiguration);
    };
    let version = found.content["cniVersion"].as_str().unwrap_or_default();
    if !VERSIONS.contains(&version) {
        return Err(format!(
            "{} has cniVersion {version:?}, with which plugins cannot be chained: set one of {}",
            found.path.display(),
            VERSIONS.join(", ")
        ));
    }
    let ours = json!({ "type": TYPE, "socket": options.socket, "timeoutSeconds": options.timeout_seconds });
    let list = with_plugin(&found.content, ours);
    if list == found.content {
        return Ok(Appended::AlreadyThere(found.path));
    }
    let target = if found.is_list() {
        found.path.clone()
    } else {
        found.path.with_extension("conflist")
    };
    let failed = |error: io::Error| format!("cannot change {}: {error}", found.path.display());
    if target != found.path && target.exists() {
        return Err(format!(
            "{} and {} are both there: remove one",
            found.path.display(),
            target.display()
        ));
    }
    // Our own earlier entry is no part of the user's file: the backup is made before the first change only.
    if !found.content["plugins"]
        .as_array()
        .is_some_and(|plugins| plugins.iter().any(is_ours))
    {
        let original = fs::read(&found.path).map_err(failed)?;
        replace(&backup(&found.path), &original, found.mode).map_err(failed)?;
    }
    replace(&target, &pretty(&list), found.mode).map_err(failed)?;
    if target != found.path {
        fs::remove_file(&found.path).map_err(failed)?;
    }
    Ok(Appended::Changed(target))
}

/// The configuration as a list with our plugin once, at the end.
fn with_plugin(content: &Value, ours: Value) -> Value {
    let mut list = match &content["plugins"] {
        Value::Array(_) => content.clone(),
        _ => {
            let mut plugin = content.clone();
            let mut list = json!({ "plugins": [] });
            // Name and version belong to the list.
            for key in ["cniVersion", "name"] {
                if let Some(value) = plugin.as_object_mut().and_then(|plugin| plugin.remove(key)) {
                    list[key] = value;
                }
            }
            list["plugins"] = json!([plugin]);
            list
        }
    };
    if let Some(plugins) = list["plugins"].as_array_mut() {
        plugins.retain(|plugin| !is_ours(plugin));
        plugins.push(ours);
    }
    list
}

fn backup(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(BACKUP);
    name.into()
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut text = format!("{value:#}").into_bytes();
    text.push(b'\n');
    text
}

fn uninstall(options: &Options) -> Result<(), String> {
    for found in configurations(&options.conf_dir)? {
        let failed = |error: io::Error| format!("cannot change {}: {error}", found.path.display());
        let mut list = found.content.clone();
        let Some(plugins) = list["plugins"].as_array_mut() else {
            continue;
        };
        let before = plugins.len();
        plugins.retain(|plugin| !is_ours(plugin));
        if plugins.len() == before {
            continue;
        }
        let single = found.path.with_extension("conf");
        let restored = [&found.path, &single]
            .into_iter()
            .find(|path| is_backup_of(&backup(path), &list));
        match restored {
            // The user's own bytes, under their own name.
            Some(path) => {
                fs::rename(backup(path), path).map_err(failed)?;
                if *path != found.path {
                    fs::remove_file(&found.path).map_err(failed)?;
                }
            }
            // The file was changed since: only our entry goes.
            None => replace(&found.path, &pretty(&list), found.mode).map_err(failed)?,
        }
        println!("warren-cni: removed from {}", found.path.display());
    }
    match fs::remove_file(options.bin_dir.join(TYPE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(format!(
            "cannot remove {}: {error}",
            options.bin_dir.join(TYPE).display()
        )),
        _ => Ok(()),
    }
}

/// Whether the backup says the same as `list`, which is ours without our plugin.
fn is_backup_of(backup: &Path, list: &Value) -> bool {
    let content = fs::read(backup)
        .ok()
        .and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    content.is_some_and(|content| {
        let mut same = with_plugin(&content, Value::Null);
        if let Some(plugins) = same["plugins"].as_array_mut() {
            plugins.pop();
        }
        same == *list
    })
}
