//! The Kubernetes API: Warren's own workloads, and a command in the leader's pod.

use std::collections::BTreeSet;

use anyhow::{Context as _, anyhow, bail};
use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment},
        coordination::v1::Lease,
        core::v1::{Pod, PodSpec},
    },
    apimachinery::pkg::apis::meta::v1::Status,
};
use kube::{
    Api, Client, Config,
    api::{AttachParams, ListParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use warren_keyd_api::status::ClusterStatus;

use crate::{args::Target, components::Component, keyd::Keyd};

/// All of Warren's objects have this label.
const PART_OF: &str = "app.kubernetes.io/part-of=warren";
/// The pods of keyd.
const KEYD: &str = "app.kubernetes.io/name=keyd";
/// Held by the leading keyd.
const LEASE: &str = "warren-keyd";

/// Connects its streams with keyd's local socket; the pods of keyd have this program.
const TUNNEL: [&str; 2] = ["warren", "keyd-tunnel"];

/// A connection to a cluster.
pub(crate) struct Cluster {
    client: Client,
    namespace: String,
}

impl Cluster {
    /// Connects as `kubectl` would.
    pub(crate) async fn connect(target: &Target) -> anyhow::Result<Self> {
        let options = KubeConfigOptions {
            context: target.context.clone(),
            ..KubeConfigOptions::default()
        };
        let config = match &target.kubeconfig {
            Some(path) => {
                let file = Kubeconfig::read_from(path)
                    .with_context(|| format!("cannot read the kubeconfig {}", path.display()))?;
                Config::from_custom_kubeconfig(file, &options).await
            }
            None if target.context.is_some() => Config::from_kubeconfig(&options).await,
            None => {
                let config = Config::infer().await.context(
                    "there is neither a keyd socket on this machine nor a usable kubeconfig: use --keyd-socket or \
                     --kubeconfig",
                )?;
                return Self::with(config, target);
            }
        };
        Self::with(config.context("the kubeconfig cannot be used")?, target)
    }

    fn with(config: Config, target: &Target) -> anyhow::Result<Self> {
        let client = Client::try_from(config).context("cannot set up the connection to the API server")?;
        Ok(Self {
            client,
            namespace: target.namespace.clone(),
        })
    }

    fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The pods of keyd, the holder of the lease first.
    async fn keyd_pods(&self) -> anyhow::Result<Vec<String>> {
        let pods = self
            .api::<Pod>()
            .list(&ListParams::default().labels(KEYD))
            .await
            .map_err(reason)?;
        let holder = self.holder().await?;
        let mut names: Vec<String> = pods
            .items
            .into_iter()
            .filter_map(|pod| pod.metadata.name)
            .collect();
        if names.is_empty() {
            bail!(
                "there is no pod of keyd in the namespace {}: is Warren installed there?",
                self.namespace
            );
        }
        names.sort_by_key(|name| {
            !holder
                .as_ref()
                .is_some_and(|holder| holder.contains(name.as_str()))
        });
        Ok(names)
    }

    /// Asks the pods of keyd, the holder of the lease first, until one says that it leads.
    pub(crate) async fn keyd_status(&self) -> anyhow::Result<ClusterStatus> {
        let (mut follower, mut failed) = (None, None);
        for name in self.keyd_pods().await? {
            match self.ask(&name).await {
                Ok(status) if status.leader => return Ok(status),
                Ok(status) => follower = Some(status),
                Err(error) => failed = Some(error.context(format!("pod {name}"))),
            }
        }
        follower.ok_or_else(|| failed.unwrap_or_else(|| anyhow!("no pod of keyd answered")))
    }

    /// A connection to the admin service of the leading keyd, through a command in its pod.
    pub(crate) async fn keyd(&self) -> anyhow::Result<Keyd> {
        let mut failed = None;
        for name in self.keyd_pods().await? {
            match self.tunnel(&name).await {
                Ok(Some(keyd)) => return Ok(keyd),
                Ok(None) => {}
                Err(error) => failed = Some(error.context(format!("pod {name}"))),
            }
        }
        Err(failed.unwrap_or_else(|| anyhow!("no pod of keyd leads at the moment: try again")))
    }

    /// A connection to keyd in a pod; none where it does not lead.
    async fn tunnel(&self, pod: &str) -> anyhow::Result<Option<Keyd>> {
        let parameters = AttachParams::default()
            .stdin(true)
            .stdout(true)
            .stderr(false)
            .container("keyd");
        let mut process = self
            .api::<Pod>()
            .exec(pod, TUNNEL, &parameters)
            .await
            .map_err(reason)?;
        let (Some(input), Some(output)) = (process.stdin(), process.stdout()) else {
            bail!("the API server opened no streams");
        };
        let mut keyd = Keyd::over(tokio::io::join(output, input), process).await?;
        Ok(keyd.leads().await?.then_some(keyd))
    }

    async fn holder(&self) -> anyhow::Result<Option<String>> {
        let lease = self.api::<Lease>().get_opt(LEASE).await.map_err(reason)?;
        Ok(lease.and_then(|lease| lease.spec?.holder_identity))
    }

    /// Runs `keyd status` in a pod.
    async fn ask(&self, pod: &str) -> anyhow::Result<ClusterStatus> {
        let parameters = AttachParams::default()
            .stdin(false)
            .stdout(true)
            .stderr(true)
            .container("keyd");
        let command = ["keyd", "status", "-o", "json"];
        let mut process = self
            .api::<Pod>()
            .exec(pod, command, &parameters)
            .await
            .map_err(reason)?;
        let (stdout, stderr, ended) = (process.stdout(), process.stderr(), process.take_status());
        let (stdout, stderr) = tokio::join!(read(stdout), read(stderr));
        let ended = match ended {
            Some(ended) => ended.await,
            None => None,
        };
        if !ended.as_ref().is_some_and(succeeded) {
            let said = stderr.trim();
            let why = ended
                .and_then(|status| status.message)
                .unwrap_or_else(|| "the connection broke".into());
            bail!(
                "keyd status failed: {}",
                if said.is_empty() { &why } else { said }
            );
        }
        serde_json::from_str(&stdout).context("keyd status printed something else than its status")
    }

    /// Warren's workloads with what is wrong with their pods.
    pub(crate) async fn components(&self) -> anyhow::Result<Vec<Component>> {
        let list = ListParams::default().labels(PART_OF);
        let (deployment_api, daemonset_api, pod_api) = (
            self.api::<Deployment>(),
            self.api::<DaemonSet>(),
            self.api::<Pod>(),
        );
        let (deployments, daemonsets, pods) = tokio::try_join!(
            deployment_api.list(&list),
            daemonset_api.list(&list),
            pod_api.list(&list)
        )
        .map_err(reason)?;
        let mut components: Vec<Component> = deployments.iter().map(of_deployment).collect();
        components.extend(daemonsets.iter().map(of_daemonset));
        if components.is_empty() {
            bail!(
                "nothing of Warren is installed in the namespace {}: use --namespace",
                self.namespace
            );
        }
        for component in &mut components {
            let mine = pods.iter().filter(|pod| {
                let labels = pod.metadata.labels.as_ref();
                labels.and_then(|labels| labels.get("app.kubernetes.io/name")) == Some(&component.name)
            });
            component.problems.extend(mine.flat_map(pod_problems));
        }
        components.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(components)
    }
}

/// The API server's own sentence.
fn reason(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => anyhow!("the API server refused: {}", status.message),
        error => anyhow::Error::new(error).context("cannot reach the API server"),
    }
}

fn succeeded(status: &Status) -> bool {
    status.status.as_deref() == Some("Success")
}

async fn read(stream: Option<impl AsyncRead + Unpin>) -> String {
    let mut text = Vec::new();
    if let Some(mut stream) = stream {
        // A connection that breaks is seen in the exit status.
        let _ = stream.read_to_end(&mut text).await;
    }
    String::from_utf8_lossy(&text).into_owned()
}

fn images(spec: Option<&PodSpec>) -> Vec<String> {
    let images: BTreeSet<String> = spec
        .into_iter()
        .flat_map(|spec| &spec.containers)
        .filter_map(|container| container.image.clone())
        .collect();
    images.into_iter().collect()
}

fn count(number: Option<i32>) -> u32 {
    number
        .and_then(|number| u32::try_from(number).ok())
        .unwrap_or_default()
}

fn of_deployment(deployment: &Deployment) -> Component {
    let spec = deployment.spec.as_ref();
    let status = deployment.status.clone().unwrap_or_default();
    Component {
        name: deployment.metadata.name.clone().unwrap_or_default(),
        kind: "Deployment".into(),
        desired: spec.map_or(0, |spec| count(spec.replicas.or(Some(1)))),
        updated: count(status.updated_replicas),
        ready: count(status.ready_replicas),
        available: count(status.available_replicas),
        observed: status.observed_generation >= deployment.metadata.generation,
        images: images(spec.and_then(|spec| spec.template.spec.as_ref())),
        problems: Vec::new(),
    }
}

fn of_daemonset(daemonset: &DaemonSet) -> Component {
    let spec = daemonset.spec.as_ref();
    let status = daemonset.status.clone().unwrap_or_default();
    // The tunnels are only replaced when somebody deletes them: an old one is no problem.
    let on_delete = spec
        .and_then(|spec| spec.update_strategy.as_ref()?.type_.as_deref())
        .is_some_and(|strategy| strategy == "OnDelete");
    let desired = count(Some(status.desired_number_scheduled));
    Component {
        name: daemonset.metadata.name.clone().unwrap_or_default(),
        kind: "DaemonSet".into(),
        desired,
        updated: if on_delete {
            desired
        } else {
            count(status.updated_number_scheduled)
        },
        ready: count(Some(status.number_ready)),
        available: count(status.number_available),
        observed: status.observed_generation >= daemonset.metadata.generation,
        images: images(spec.and_then(|spec| spec.template.spec.as_ref())),
        problems: Vec::new(),
    }
}

/// Why a pod is not running: its containers' waiting reasons, or the scheduler's.
fn pod_problems(pod: &Pod) -> Vec<String> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let Some(status) = &pod.status else {
        return Vec::new();
    };
    let containers = status
        .init_container_statuses
        .iter()
        .chain(&status.container_statuses)
        .flatten();
    let waiting = containers.filter_map(|container| {
        let state = container.state.as_ref()?.waiting.as_ref()?;
        let reason = state
            .reason
            .as_deref()
            .filter(|reason| !matches!(*reason, "PodInitializing" | "ContainerCreating"))?;
        let last = container
            .last_state
            .as_ref()
            .and_then(|state| state.terminated.as_ref());
        let code = last
            .map(|last| format!(", last exit code {}", last.exit_code))
            .unwrap_or_default();
        Some(format!(
            "pod {name}: container {}: {reason}{code}",
            container.name
        ))
    });
    let unscheduled = status.conditions.iter().flatten().filter_map(|condition| {
        let unscheduled = condition.type_ == "PodScheduled" && condition.status == "False";
        unscheduled.then(|| {
            format!(
                "pod {name}: {}",
                condition.message.as_deref().unwrap_or("not scheduled")
            )
        })
    });
    waiting.chain(unscheduled).collect()
}
