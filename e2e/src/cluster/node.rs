//! A node of the cluster, seen from outside.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use super::{
    address::Families,
    cgroup,
    config::{self, ProxyMode},
    inside::NodeSpec,
    shell::Shell,
    tools,
};
use crate::lab::{
    net::{node_address, pod_cidrs},
    process::{ALL, Place, Process},
    wait::wait_until,
};

/// The daemon whose mode can change.
const PROXY: &str = "kube-proxy";

/// A node.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Inside of it.
    pub place: Place,
    outside: Place,
    number: u8,
    of: u8,
    families: Families,
    spec: PathBuf,
    folder: PathBuf,
    tool: PathBuf,
    logs: PathBuf,
    id: String,
    init: Process,
    daemons: Vec<Process>,
}

impl Node {
    /// Boots it and starts containerd, kubelet and kube-proxy; does not wait for the node to be ready.
    pub(super) fn start(
        shell: &Shell,
        number: u8,
        of: u8,
        families: Families,
        images: &[PathBuf],
    ) -> Result<Self> {
        let name = format!("node{number}");
        let folder = shell.folder.join(&name);
        fs::create_dir_all(&folder)?;
        let spec = folder.join("spec.json");
        let description = NodeSpec {
            id: shell.id.clone(),
            name: name.clone(),
            state: folder.join("state"),
        };
        fs::write(&spec, serde_json::to_vec(&description)?)?;
        configure(shell, &folder, &name, number, families)?;
        let (init, pid) = shell.spawn_init(&name, &shell.tool(), &spec)?;
        let mut node = Self {
            place: shell.place(&name, pid, ALL),
            outside: shell.outside(),
            name,
            number,
            of,
            families,
            spec,
            folder,
            tool: shell.tool(),
            logs: shell.folder.join("logs"),
            id: shell.id.clone(),
            init,
            daemons: Vec::new(),
        };
        node.start_daemons(shell, images)
            .with_context(|| format!("{} does not start", node.name))?;
        Ok(node)
    }

    /// Cuts the power: every process of the node dies at once, as do its pods.
    pub fn power_off(&mut self) -> Result<()> {
        // The kernel ends the rest of a pid namespace before it lets go of its process 1.
        kill(Pid::from_raw(i32::try_from(self.place.pid)?), Signal::SIGKILL)
            .context("cannot cut the power")?;
        self.init.kill()?;
        self.daemons.clear();
        cgroup::remove_node(&self.id, &self.name)
    }

    /// Powers it on again with the disk it had.
    pub(super) fn power_on(&mut self, shell: &Shell) -> Result<()> {
        let (init, pid) = shell.spawn_init(&self.name, &self.tool, &self.spec)?;
        self.init = init;
        self.place.pid = pid;
        self.start_daemons(shell, &[])
    }

    fn start_daemons(&mut self, shell: &Shell, images: &[PathBuf]) -> Result<()> {
        shell.connect_node(&self.place, self.number, self.of)?;
        self.install_cni()?;
        let folder = self.folder.clone();
        let file = |name: &str| folder.join(name).display().to_string();
        self.daemon(
            "containerd",
            &["containerd".into(), "-c".into(), file("containerd.toml")],
        )?;
        wait_until(Duration::from_secs(120), "containerd answers", || {
            self.place.run(["ctr", "version"])
        })?;
        for image in images {
            let image = image.display().to_string();
            self.place
                .run(["ctr", "-n", "k8s.io", "images", "import", &image])?;
        }
        let addresses = self.families.order(node_address(self.number).both());
        let kubeconfig = shell
            .folder
            .join(format!("pki/{}.conf", self.name))
            .display()
            .to_string();
        self.daemon(
            "kubelet",
            &[
                tools::path("kubelet")?,
                format!("--config={}", file("kubelet.yaml")),
                format!("--kubeconfig={kubeconfig}"),
                format!("--hostname-override={}", self.name),
                format!("--node-ip={},{}", addresses[0], addresses[1]),
                "--root-dir=/var/lib/kubelet".into(),
                "--v=2".into(),
            ],
        )?;
        self.start_proxy()
    }

    fn start_proxy(&mut self) -> Result<()> {
        let config = self.folder.join("proxy.yaml").display().to_string();
        self.daemon(PROXY, &[tools::path("kube-proxy")?, format!("--config={config}")])
    }

    /// Starts kube-proxy anew in another mode; returns when its rules of the old one are gone and those of the new one there.
    pub(super) fn switch_proxy(
        &mut self,
        kubeconfig: &Path,
        mode: ProxyMode,
        families: Families,
    ) -> Result<()> {
        let old = self
            .daemons
            .iter()
            .position(|daemon| daemon.name.starts_with(PROXY));
        let mut old = self.daemons.remove(old.context("kube-proxy does not run")?);
        old.kill()?;
        let config = config::kube_proxy(&self.name, kubeconfig, mode, families);
        fs::write(self.folder.join("proxy.yaml"), config.to_string())?;
        self.start_proxy()?;
        wait_until(
            Duration::from_secs(60),
            "kube-proxy works in the new mode",
            || {
                self.check()?;
                let tables = self.place.run(["nft", "list", "tables"])?;
                let chains = self.place.run(["iptables-save", "-t", "nat"])?;
                let nftables = tables.contains("kube-proxy");
                let iptables = chains.contains("-A KUBE-SERVICES ");
                let wanted = match mode {
                    ProxyMode::Nftables => nftables && !iptables,
                    ProxyMode::Iptables => iptables && !nftables,
                };
                ensure!(wanted, "rules of nftables: {nftables}, of iptables: {iptables}");
                Ok(())
            },
        )
    }

    /// Starts a process inside the node's control groups and namespaces.
    fn daemon(&mut self, name: &str, command: &[String]) -> Result<()> {
        let mut joined = vec![
            self.tool.display().to_string(),
            "join".into(),
            "--spec".into(),
            self.spec.display().to_string(),
            "--target".into(),
            self.place.pid.to_string(),
            "--".into(),
        ];
        joined.extend(command.iter().cloned());
        // From the machine's mount namespace, which the control groups can be entered from.
        let outside = Place {
            name: format!("{name} of {}", self.name),
            ..self.outside.clone()
        };
        let log = self.logs.join(format!("{}-{name}.log", self.name));
        self.daemons.push(outside.spawn(joined, &log)?);
        Ok(())
    }

    /// The plugins of the machine, in a folder of the node's own: an agent installs its plugin there.
    fn install_cni(&self) -> Result<()> {
        let conflist = self.folder.join("cni.conflist").display().to_string();
        let script = format!(
            "mkdir -p /etc/cni/net.d /opt/cni/bin && ln -sf /usr/lib/cni/* /opt/cni/bin/ \
             && if [ ! -e /etc/cni/net.d/10-lab.conflist ]; then cp {conflist} /etc/cni/net.d/10-lab.conflist; fi"
        );
        self.place.run(["sh", "-ec", &script]).map(drop)
    }

    /// The processes in its pods whose command line begins with these words, by their ids on the machine; only those of
    /// one container where its id is given.
    pub fn processes(&self, container: &str, words: &[&str]) -> Result<Vec<u32>> {
        let group = format!("/{}/{}/kubepods", cgroup::tree(&self.id), self.name);
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // A process may end while we look.
            let groups = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line: Vec<_> = line
                .split(|byte| *byte == 0)
                .map(String::from_utf8_lossy)
                .collect();
            let same = words.len() <= line.len()
                && words
                    .iter()
                    .zip(&line)
                    .all(|(word, part)| part.rsplit('/').next() == Some(*word));
            if same && groups.contains(&group) && groups.contains(container) {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// Do its daemons run? An error names the first that does not.
    pub fn check(&mut self) -> Result<()> {
        for daemon in &mut self.daemons {
            ensure!(daemon.running(), "{} ended: {}", daemon.name, daemon.tail());
        }
        Ok(())
    }

    /// From now on it outlives this value.
    pub(super) fn release(&mut self) {
        self.init.release();
        self.daemons.iter_mut().for_each(Process::release);
    }
}

fn configure(shell: &Shell, folder: &Path, name: &str, number: u8, families: Families) -> Result<()> {
    let pki = shell.folder.join("pki");
    let resolv = folder.join("resolv.conf");
    fs::write(&resolv, "")?;
    fs::write(folder.join("containerd.toml"), config::containerd())?;
    let write = |file: &str, value: &Value| fs::write(folder.join(file), value.to_string());
    write(
        "cni.conflist",
        &config::cni(number.is_multiple_of(3), &pod_cidrs(number)),
    )?;
    write("kubelet.yaml", &config::kubelet(name, &pki, &resolv, families))?;
    let proxy = config::kube_proxy(name, &pki.join("proxy.conf"), ProxyMode::Nftables, families);
    write("proxy.yaml", &proxy)?;
    Ok(())
}
