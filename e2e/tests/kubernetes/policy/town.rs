//! Pods and services of a policy scenario, and the table of who reaches whom.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use warren_e2e::{
    app::probe::{Outcome, Probed, Target},
    cluster::{Cluster, Workload, pod::AppPod},
    lab::wait::wait_until,
};

use crate::scene::PATIENCE;

/// How long a policy may take to be what the table says.
const SETTLED: Duration = Duration::from_secs(60);

/// The pods and services of a scenario.
pub(crate) struct Town<'a> {
    pub(crate) cluster: &'a Cluster,
    workloads: Vec<Workload>,
    pub(crate) pods: BTreeMap<String, AppPod>,
    services: BTreeMap<String, Vec<IpAddr>>,
    /// More targets: a name and an address.
    places: BTreeMap<String, IpAddr>,
}

/// One question of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Question {
    from: String,
    to: String,
    target: Target,
    /// Must it be answered? Otherwise nothing may come back.
    passes: bool,
}

impl<'a> Town<'a> {
    /// Makes namespaces, pods and services, and waits until the pods are ready.
    pub(crate) fn build(cluster: &'a Cluster, workloads: Vec<Workload>, services: &[Value]) -> Result<Self> {
        let mut town = Self {
            cluster,
            workloads,
            pods: BTreeMap::new(),
            services: BTreeMap::new(),
            places: BTreeMap::new(),
        };
        let namespaces = town.namespaces();
        let objects: Vec<_> = namespaces
            .iter()
            .map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
            .collect();
        cluster.apply(&objects)?;
        for namespace in &namespaces {
            // Without it no pod is admitted.
            wait_until(PATIENCE, "the namespace has its service account", || {
                cluster.kubectl(["get", "serviceaccount", "default", "-n", namespace])
            })?;
        }
        if !services.is_empty() {
            cluster.apply(services)?;
        }
        town.start(|_| true)?;
        for service in services {
            let (name, namespace) = (&service["metadata"]["name"], &service["metadata"]["namespace"]);
            let (Some(name), Some(namespace)) = (name.as_str(), namespace.as_str()) else {
                continue;
            };
            if service["kind"] != "Service" {
                continue;
            }
            let object = cluster.get(["service", name, "-n", namespace])?;
            let addresses = object["spec"]["clusterIPs"].as_array().into_iter().flatten();
            let addresses = addresses.filter_map(|text| text.as_str()?.parse().ok()).collect();
            town.services.insert(name.to_owned(), addresses);
        }
        Ok(town)
    }

    fn namespaces(&self) -> BTreeSet<String> {
        self.workloads.iter().map(|pod| pod.namespace.clone()).collect()
    }

    fn start(&mut self, which: impl Fn(&str) -> bool) -> Result<()> {
        let wanted = self.workloads.iter().filter(|pod| which(&pod.name));
        self.cluster
            .apply(&wanted.map(Workload::manifest).collect::<Vec<_>>())?;
        for namespace in self.namespaces() {
            self.cluster.wait_ready(&["pods", "-n", &namespace], PATIENCE)?;
            for pod in self.cluster.app_pods(&namespace)? {
                self.pods.insert(pod.name.clone(), pod);
            }
        }
        Ok(())
    }

    /// More pods.
    pub(crate) fn add(&mut self, workloads: Vec<Workload>) -> Result<()> {
        let names: BTreeSet<_> = workloads.iter().map(|pod| pod.name.clone()).collect();
        self.workloads.extend(workloads);
        self.start(|name| names.contains(name))
    }

    /// Deletes all pods and makes them anew; they must come back with other addresses.
    pub(crate) fn recreate(&mut self) -> Result<()> {
        for namespace in self.namespaces() {
            self.cluster
                .kubectl(["delete", "pod", "--all", "-n", &namespace, "--wait", "--now"])?;
        }
        let before = std::mem::take(&mut self.pods);
        self.start(|_| true)?;
        for (name, pod) in &self.pods {
            let old = &before
                .get(name)
                .context("a pod that was not there before")?
                .addresses;
            ensure!(
                !pod.addresses.iter().any(|address| old.contains(address)),
                "{name} has its old addresses: {old:?}"
            );
        }
        Ok(())
    }

    /// Another name for an address.
    pub(crate) fn name(&mut self, name: &str, address: IpAddr) {
        self.places.insert(name.to_owned(), address);
    }

    /// The addresses behind a name of the table.
    pub(crate) fn addresses(&self, name: &str) -> Result<Vec<IpAddr>> {
        if let Some(service) = name.strip_prefix("svc/") {
            let addresses = self.services.get(service);
            return addresses
                .cloned()
                .with_context(|| format!("no service {service}"));
        }
        if let Some(address) = self.places.get(name) {
            return Ok(vec![*address]);
        }
        let pod = self.pods.get(name).with_context(|| format!("no pod {name}"))?;
        Ok(pod.addresses.clone())
    }

    /// A table: `FROM -> TARGET ... yes|no` in each line; a target is `POD:PORT`, `svc/NAME:PORT`, with `/udp` behind
    /// it if not TCP, or `icmp/POD`. Every target is asked in both families, from the pod FROM.
    fn parse(&self, table: &str) -> Result<Vec<Question>> {
        let mut questions = Vec::new();
        for line in table.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let row = self.row(line).with_context(|| format!("row `{line}`"))?;
            questions.extend(row);
        }
        Ok(questions)
    }

    fn row(&self, line: &str) -> Result<Vec<Question>> {
        let (from, rest) = line.split_once("->").context("no ->")?;
        let (targets, verdict) = rest.trim().rsplit_once(' ').context("no verdict")?;
        let passes = match verdict {
            "yes" => true,
            "no" => false,
            other => bail!("the verdict is {other}, not yes or no"),
        };
        let mut questions = Vec::new();
        for from in from.split_whitespace() {
            for to in targets.split_whitespace() {
                for target in self.targets(to)? {
                    questions.push(Question {
                        from: from.to_owned(),
                        to: to.to_owned(),
                        target,
                        passes,
                    });
                }
            }
        }
        Ok(questions)
    }

    fn targets(&self, text: &str) -> Result<Vec<Target>> {
        if let Some(name) = text.strip_prefix("icmp/") {
            return Ok(self.addresses(name)?.into_iter().map(Target::Icmp).collect());
        }
        let (text, udp) = match text.strip_suffix("/udp") {
            Some(text) => (text, true),
            None => (text, false),
        };
        let (name, port) = text.rsplit_once(':').context("no port")?;
        let port: u16 = port.parse()?;
        let target = |address| {
            let to = SocketAddr::new(address, port);
            if udp { Target::Udp(to) } else { Target::Tcp(to) }
        };
        Ok(self.addresses(name)?.into_iter().map(target).collect())
    }

    /// Asks everything at once; what is not as the table says, a line each.
    fn differences(&self, table: &str) -> Result<Vec<String>> {
        let questions = self.parse(table)?;
        let mut senders: BTreeMap<&str, Vec<&Question>> = BTreeMap::new();
        for question in &questions {
            senders.entry(&question.from).or_default().push(question);
        }
        thread::scope(|scope| {
            let threads: Vec<_> = senders
                .iter()
                .map(|(from, questions)| scope.spawn(move || self.ask(from, questions)))
                .collect();
            let mut wrong = Vec::new();
            for thread in threads {
                wrong.extend(thread.join().map_err(|_| anyhow!("a probe panicked"))??);
            }
            Ok(wrong)
        })
    }

    fn ask(&self, from: &str, questions: &[&Question]) -> Result<Vec<String>> {
        let pod = self.pods.get(from).with_context(|| format!("no pod {from}"))?;
        let targets = |passes| {
            questions
                .iter()
                .filter(move |question| question.passes == passes)
                .map(|question| question.target)
                .collect::<Vec<_>>()
        };
        let probed = pod.probe(&targets(true), &targets(false))?;
        Ok(questions
            .iter()
            .filter_map(|question| self.verdict(question, &probed))
            .collect())
    }

    /// What is wrong with the answer to a question.
    fn verdict(&self, question: &Question, probed: &[Probed]) -> Option<String> {
        let Question {
            from,
            to,
            target,
            passes,
        } = question;
        let found = probed.iter().find(|probed| probed.target == *target);
        let Some(Probed { outcome, .. }) = found else {
            return Some(format!("{from} -> {to} ({target}): no report"));
        };
        let right = match outcome {
            Outcome::Answered(by) => {
                let name = to.rsplit_once(':').map_or("", |(name, _)| name);
                *passes && (by.is_empty() || !self.pods.contains_key(name) || by == name)
            }
            Outcome::Silent => !passes,
            Outcome::Refused(_) => false,
        };
        let wanted = if *passes { "an answer" } else { "silence" };
        (!right).then(|| format!("{from} -> {to} ({target}): wanted {wanted}, {outcome}"))
    }

    /// Waits until everything is as the table says, and sees that it stays so.
    pub(crate) fn check(&self, what: &str, table: &str) -> Result<()> {
        let look = || {
            let wrong = self.differences(table)?;
            ensure!(wrong.is_empty(), "\n    {}", wrong.join("\n    "));
            Ok(())
        };
        wait_until(SETTLED, what, look)?;
        look().with_context(|| format!("{what}: it did not stay so"))
    }

    /// Applies objects from a YAML text.
    pub(crate) fn apply(&self, yaml: &str) -> Result<()> {
        self.cluster.apply_text(yaml)
    }

    /// Removes them.
    pub(crate) fn delete(&self, yaml: &str) -> Result<()> {
        self.cluster.delete_text(yaml)
    }

    /// A name that a pod looks up, as the application in it would.
    pub(crate) fn resolves(&self, pod: &str, name: &str) -> Result<bool> {
        let pod = self.pods.get(pod).with_context(|| format!("no pod {pod}"))?;
        let command = ["exec", &pod.name, "-n", &pod.namespace, "--"];
        let question = ["nslookup", "-type=a", name];
        let output = self.cluster.kubectl_output(command.into_iter().chain(question))?;
        Ok(output.status.success())
    }

    /// Removes the namespaces with everything in them.
    pub(crate) fn raze(self) -> Result<()> {
        let namespaces = self.namespaces();
        let mut command = vec!["delete", "namespace", "--wait"];
        command.extend(
            namespaces
                .iter()
                .map(String::as_str)
                .filter(|name| *name != "default"),
        );
        self.cluster.kubectl(command).map(drop)
    }
}

/// A Service of both families.
pub(crate) fn service(namespace: &str, name: &str, selector: &Value, ports: &[(u16, u16)]) -> Value {
    let ports: Vec<_> = ports
        .iter()
        .map(|(port, target)| json!({"name": format!("p{port}"), "port": port, "targetPort": target}))
        .collect();
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": selector, "ipFamilyPolicy": "RequireDualStack", "ports": ports},
    })
}
