//! The control plane: etcd, API server, controller manager, scheduler, in a network namespace of its own.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::{
    address::{self, Families},
    pki::Pki,
    tools,
};
use crate::lab::{
    net::{node_address, pod_pools},
    process::{Place, Process},
    wait::wait_until,
};

/// A running control plane.
pub(super) struct Control {
    place: Place,
    families: Families,
    folder: PathBuf,
    etcd: Process,
    api_server: Process,
    others: Vec<Process>,
}

impl Control {
    /// Starts everything and waits until the API server is ready.
    pub(super) fn start(place: Place, folder: &Path, nodes: u8, families: Families) -> Result<Self> {
        certificates(&folder.join("pki"), nodes)?;
        let etcd = place.spawn(
            [
                "etcd",
                "--data-dir",
                &path(folder, "etcd"),
                "--listen-client-urls=http://127.0.0.1:2379",
                "--advertise-client-urls=http://127.0.0.1:2379",
                "--listen-peer-urls=http://127.0.0.1:2380",
                // Nothing here must survive the machine.
                "--unsafe-no-fsync",
                "--log-level=warn",
            ],
            &folder.join("logs/etcd.log"),
        )?;
        let api_server = start_api_server(&place, folder, families)?;
        let mut control = Self {
            place,
            families,
            folder: folder.to_owned(),
            etcd,
            api_server,
            others: Vec::new(),
        };
        control.wait_ready()?;
        control.start_controllers()?;
        Ok(control)
    }

    /// A kubectl of the administrator.
    pub(super) fn kubectl<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<Vec<String>> {
        let mut command = vec![
            tools::path("kubectl")?,
            "--kubeconfig".into(),
            path(&self.folder, "pki/admin.conf"),
        ];
        command.extend(arguments.into_iter().map(String::from));
        Ok(command)
    }

    /// Where the control plane is.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// Stops the API server and waits until it is gone.
    pub(super) fn stop_api_server(&mut self) -> Result<()> {
        self.api_server.kill()
    }

    /// Starts it again and waits until it is ready.
    pub(super) fn start_api_server(&mut self) -> Result<()> {
        self.api_server = start_api_server(&self.place, &self.folder, self.families)?;
        self.wait_ready()
    }

    /// From now on everything outlives this value.
    pub(super) fn release(&mut self) {
        for process in [&mut self.etcd, &mut self.api_server]
            .into_iter()
            .chain(&mut self.others)
        {
            process.release();
        }
    }

    fn wait_ready(&mut self) -> Result<()> {
        let command = self.kubectl(["get", "--raw", "/readyz"])?;
        wait_until(Duration::from_secs(60), "the API server is ready", || {
            for process in [&mut self.etcd, &mut self.api_server] {
                ensure!(
                    process.running(),
                    "{} ended: {}",
                    process.log.display(),
                    process.tail()
                );
            }
            self.place.run(&command)
        })?;
        Ok(())
    }

    fn start_controllers(&mut self) -> Result<()> {
        let pki = |file: &str| path(&self.folder, &format!("pki/{file}"));
        let identity = |file: &str| {
            let file = pki(file);
            [
                "kubeconfig",
                "authentication-kubeconfig",
                "authorization-kubeconfig",
            ]
            .map(|flag| format!("--{flag}={file}"))
        };
        let mut manager = vec![tools::path("kube-controller-manager")?];
        manager.extend(identity("kcm.conf"));
        manager.extend([
            "--leader-elect=false".into(),
            format!("--service-account-private-key-file={}", pki("sa.key")),
            format!("--root-ca-file={}", pki("ca.crt")),
            format!("--cluster-signing-cert-file={}", pki("ca.crt")),
            format!("--cluster-signing-key-file={}", pki("ca.key")),
            "--use-service-account-credentials=true".into(),
            "--allocate-node-cidrs=true".into(),
            format!(
                "--cluster-cidr={}",
                self.families
                    .order(pod_pools())
                    .map(|pool| pool.to_string())
                    .join(",")
            ),
            format!(
                "--service-cluster-ip-range={}",
                self.families.order(address::SERVICE_CIDRS).join(",")
            ),
            // A node that is powered off is noticed within a test's patience.
            "--node-monitor-grace-period=20s".into(),
        ]);
        let mut scheduler = vec![tools::path("kube-scheduler")?];
        scheduler.extend(identity("scheduler.conf"));
        scheduler.push("--leader-elect=false".into());
        for (name, command) in [("controller-manager", manager), ("scheduler", scheduler)] {
            let log = self.folder.join(format!("logs/{name}.log"));
            self.others.push(
                self.place
                    .spawn(&command, &log)
                    .with_context(|| format!("cannot start the {name}"))?,
            );
        }
        Ok(())
    }
}

fn start_api_server(place: &Place, folder: &Path, families: Families) -> Result<Process> {
    let pki = |file: &str| path(folder, &format!("pki/{file}"));
    let command = [
        tools::path("kube-apiserver")?,
        "--etcd-servers=http://127.0.0.1:2379".into(),
        format!(
            "--advertise-address={}",
            families.order(address::CONTROL.both())[0]
        ),
        "--bind-address=::".into(),
        format!("--secure-port={}", address::API_PORT),
        format!(
            "--service-cluster-ip-range={}",
            families.order(address::SERVICE_CIDRS).join(",")
        ),
        format!("--tls-cert-file={}", pki("apiserver.crt")),
        format!("--tls-private-key-file={}", pki("apiserver.key")),
        format!("--client-ca-file={}", pki("ca.crt")),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
        format!("--service-account-key-file={}", pki("sa.pub")),
        format!("--service-account-signing-key-file={}", pki("sa.key")),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        "--allow-privileged=true".into(),
        format!("--kubelet-certificate-authority={}", pki("ca.crt")),
        format!("--kubelet-client-certificate={}", pki("apiserver-kubelet.crt")),
        format!("--kubelet-client-key={}", pki("apiserver-kubelet.key")),
        "--kubelet-preferred-address-types=InternalIP".into(),
        format!("--requestheader-client-ca-file={}", pki("ca.crt")),
        "--requestheader-allowed-names=front-proxy".into(),
        "--requestheader-username-headers=X-Remote-User".into(),
        "--requestheader-group-headers=X-Remote-Group".into(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
        format!("--proxy-client-cert-file={}", pki("front-proxy.crt")),
        format!("--proxy-client-key-file={}", pki("front-proxy.key")),
        "--profiling=false".into(),
    ];
    place.spawn(&command, &folder.join("logs/apiserver.log"))
}

fn certificates(folder: &Path, nodes: u8) -> Result<()> {
    let pki = Pki::new(folder, address::api_server())?;
    let mut addresses: Vec<IpAddr> = address::CONTROL.both().to_vec();
    addresses.extend(address::API_SERVICE);
    addresses.push([127, 0, 0, 1].into());
    let names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ];
    pki.certificate("apiserver", "kube-apiserver", None, &names, &addresses)?;
    pki.certificate(
        "apiserver-kubelet",
        "kube-apiserver-kubelet",
        Some("system:masters"),
        &[],
        &[],
    )?;
    pki.certificate("front-proxy", "front-proxy", None, &[], &[])?;
    pki.kubeconfig("admin", "admin", Some("system:masters"))?;
    pki.kubeconfig("kcm", "system:kube-controller-manager", None)?;
    pki.kubeconfig("scheduler", "system:kube-scheduler", None)?;
    pki.kubeconfig("proxy", "system:kube-proxy", None)?;
    for n in 1..=nodes {
        let (name, user) = (format!("node{n}"), format!("system:node:node{n}"));
        pki.kubeconfig(&name, &user, Some("system:nodes"))?;
        pki.certificate(
            &format!("{name}-server"),
            &user,
            Some("system:nodes"),
            &[&name],
            &node_address(n).both(),
        )?;
    }
    Ok(())
}

fn path(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}
