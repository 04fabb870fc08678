//! What is around a cluster: its folder, the process that removes it, the underlay.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::address;
use crate::{
    inside::{DETACH, KEEP_LOGS, Kind, NodeSpec, cgroup},
    lab::{
        self, binaries,
        net::{BRIDGE, DualStack, ROUTER_V4, ROUTER_V6, UPLINK, node_address, node_pools, pod_cidrs},
        process::{NET, Place, Process},
        wait::wait_for,
    },
};

/// What is started there ends with the cluster.
const PID: &[Kind] = &[Kind::Pid];

/// The control plane's processes end with its process 1; files are the machine's: they read the cluster's folder.
const CONTROL: &[Kind] = &[Kind::Net, Kind::Pid];

/// How long everything may take to go away.
const END: Duration = Duration::from_secs(60);

/// The start of every cluster folder's name.
const PREFIX: &str = "warren-cluster-";

/// Folder, reaper and underlay of a cluster.
pub(super) struct Shell {
    pub(super) id: String,
    pub(super) folder: PathBuf,
    pub(super) underlay: Place,
    reaper: Child,
    orders: Option<ChildStdin>,
}

impl Shell {
    /// Makes the folder and starts the reaper, which starts the underlay.
    pub(super) fn start() -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix(PREFIX)
            .rand_bytes(6)
            .tempdir()?
            .keep();
        let id = folder
            .to_string_lossy()
            .rsplit('-')
            .next()
            .unwrap_or_default()
            .to_owned();
        let started = binaries::gather(&folder.join("bin"), &[binaries::LAB_APP, "warren-cluster"])
            .and_then(|()| lab::start_reaper(&folder, &id));
        let (reaper, orders, pid) = started.inspect_err(|_| drop(fs::remove_dir_all(&folder)))?;
        let app = folder.join("bin").join(binaries::LAB_APP);
        let underlay = Place {
            pid,
            kinds: NET,
            app,
            name: format!("the underlay of cluster {id}"),
        };
        Ok(Self {
            id,
            folder,
            underlay,
            reaper,
            orders: Some(orders),
        })
    }

    /// A place in this cluster.
    pub(super) fn place(&self, name: &str, pid: u32, kinds: &'static [Kind]) -> Place {
        Place {
            pid,
            kinds,
            app: self.underlay.app.clone(),
            name: name.to_owned(),
        }
    }

    /// The cluster's pid namespace, and otherwise the machine.
    pub(super) fn outside(&self) -> Place {
        self.place("the cluster", self.underlay.pid, PID)
    }

    /// The cluster's own tool, as the namespaces see it.
    pub(super) fn tool(&self) -> PathBuf {
        self.folder.join("bin/warren-cluster")
    }

    /// Where a process writes its log.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{name}.log"))
    }

    /// Starts a process 1 through its outer process.
    pub(super) fn spawn_init(&self, name: &str, tool: &Path, spec: &Path) -> Result<(Process, u32)> {
        let command = [
            tool.to_string_lossy(),
            "node-outer".into(),
            "--spec".into(),
            spec.to_string_lossy(),
        ];
        Place {
            name: name.to_owned(),
            ..self.outside()
        }
        .spawn_init(command, &self.log(name))
    }

    /// Makes the control plane's namespaces and connects them. Returns the process that holds them, and the place.
    pub(super) fn control(&self, nodes: u8) -> Result<(Process, Place)> {
        let folder = |name: &str| -> Result<PathBuf> {
            let folder = self.folder.join("control").join(name);
            fs::create_dir_all(&folder)?;
            Ok(folder)
        };
        let spec = NodeSpec {
            name: "control".into(),
            cgroup: format!("{}/control", cgroup::tree(&self.id)),
            state: folder("state")?,
            etc: folder("etc")?,
            bin: self.folder.join("bin"),
        };
        let file = self.folder.join("control/spec.json");
        fs::write(&file, serde_json::to_vec(&spec)?)?;
        let (process, pid) = self.spawn_init("control", &self.underlay.app, &file)?;
        let place = self.place("control", pid, CONTROL);
        self.connect(
            &place,
            "control",
            address::CONTROL,
            [0x02, 0x57, 0, 0, 1, 0],
            |line| {
                line.extend(node_pools().map(|pool| format!("route add {pool} dev {UPLINK}")));
                line.extend((1..=nodes).flat_map(routes_to));
            },
        )?;
        Ok((process, place))
    }

    /// Connects node `n` and gives it the routes of a cluster without an overlay: to the others' pods, in clear.
    pub(super) fn connect_node(&self, place: &Place, n: u8, nodes: u8) -> Result<()> {
        self.connect(
            place,
            &place.name,
            node_address(n),
            lab::net::node_mac(n),
            |lines| {
                lines.extend(address::CONTROL_NETS.map(|net| format!("route add {net} dev {UPLINK}")));
                lines.push(format!("route add default via {ROUTER_V4}"));
                lines.push(format!("route add default via {ROUTER_V6}"));
                lines.extend((1..=nodes).filter(|other| *other != n).flat_map(routes_to));
            },
        )
    }

    fn connect(
        &self,
        place: &Place,
        name: &str,
        address: DualStack,
        mac: [u8; 6],
        more: impl FnOnce(&mut Vec<String>),
    ) -> Result<()> {
        self.underlay.ip(&[
            format!(
                "link add p-{name} type veth peer name {UPLINK} netns {}",
                place.pid
            ),
            format!("link set p-{name} master {BRIDGE} up"),
        ])?;
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        let mut lines = vec![
            "link set lo up".to_owned(),
            format!("link set {UPLINK} address {mac}"),
            format!("addr add {}/24 dev {UPLINK}", address.v4),
            format!("addr add {}/64 dev {UPLINK} nodad", address.v6),
            format!("link set {UPLINK} up"),
        ];
        more(&mut lines);
        place.ip(&lines)
    }

    /// The reaper goes on without us until [`down`].
    pub(super) fn detach(&mut self) -> Result<()> {
        let mut orders = self.orders.take().context("the reaper has left")?;
        orders.write_all(&[DETACH]).context("the reaper is gone")
    }

    /// The logs stay when the rest goes.
    pub(super) fn keep_logs(&mut self) -> Result<()> {
        self.orders
            .as_mut()
            .context("the reaper has left")?
            .write_all(&[KEEP_LOGS])
            .context("the reaper is gone")
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        if self.orders.take().is_some() {
            let _ = self.reaper.wait();
        }
    }
}

fn routes_to(n: u8) -> [String; 2] {
    let (address, [v4, v6]) = (node_address(n), pod_cidrs(n));
    [
        format!("route add {v4} via {}", address.v4),
        format!("route add {v6} via {}", address.v6),
    ]
}

/// The folders of this machine's clusters.
pub(super) fn folders() -> Vec<PathBuf> {
    let entries = fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    let mut folders: Vec<_> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX))
        .map(|entry| entry.path())
        .collect();
    folders.sort();
    folders
}

/// Ends a cluster that was left running, and returns when everything is gone.
pub(super) fn down(folder: &Path) -> Result<()> {
    let file = folder.join("reaper.pid");
    let pid: i32 = fs::read_to_string(&file)
        .with_context(|| format!("cannot read {}", file.display()))?
        .trim()
        .parse()?;
    // The number may have been given to another process since.
    let ours = || {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0)
            .any(|word| word == folder.as_os_str().as_encoded_bytes())
    };
    ensure!(
        ours(),
        "the cluster in {} has ended already; remove the folder",
        folder.display()
    );
    kill(Pid::from_raw(pid), Signal::SIGTERM).context("cannot signal the reaper")?;
    wait_for(
        END,
        &format!("the reaper of {} has done its work", folder.display()),
        || !ours(),
    )
}
