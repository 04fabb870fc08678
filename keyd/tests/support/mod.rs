//! A real keyd process over real TLS on loopback, and agents of every kind.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::timeout;
use tonic::transport::Channel;
use warren_keyd_api::{
    PROTOCOL,
    convert::address_to_bytes,
    proof,
    proto::{
        Applied, CreateJoinTokenRequest, Datapath, EndpointAdd, EndpointDelete, EndpointResult, Hello,
        KeyChallenge, KeyOffer, KeyProof, KeyResult, Roots, StatusRequest, StatusResponse,
        agent_message::Body as Say, keyd_message::Body as Heard,
    },
    snapshot::{Directory, Followed, RootChain, SnapshotRoot},
    stream::AgentStream,
    tls::{self, ClientIdentity, Enrolment, Trust},
    token::JoinToken,
};
use warren_model::{PrivateKey, PublicKey};

/// Longer than anything takes; reaching it is a failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

const CONFIG: &str = "\
podPools: [10.244.0.0/16, 'fd00:10:244::/48']
podsMayAudit: true
nodePools: [172.30.0.0/24]
serviceCidrs: [10.96.0.0/16]
";

/// keyd with its folders; killed and removed at the end.
pub(crate) struct Keyd {
    child: Child,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) address: String,
    metrics: String,
    log: Arc<Mutex<Vec<String>>>,
}

impl Keyd {
    /// Starts keyd on a free port with these manifests.
    pub(crate) fn start(manifests: &str) -> Self {
        Self::start_with(manifests, "")
    }

    pub(crate) fn start_with(manifests: &str, config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("m")).unwrap();
        fs::write(dir.path().join("cluster.yaml"), format!("{CONFIG}{config}")).unwrap();
        fs::write(dir.path().join("m/cluster.yaml"), manifests).unwrap();
        let Spawned {
            child,
            address,
            metrics,
            log,
        } = spawn(dir.path());
        Self {
            child,
            dir,
            address,
            metrics,
            log,
        }
    }

    /// Kills keyd without warning and starts it again on the same state (and another port).
    pub(crate) fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let spawned = spawn(self.dir.path());
        self.child = spawned.child;
        self.address = spawned.address;
        self.metrics = spawned.metrics;
        self.log = spawned.log;
    }

    /// How often each alarm was counted, by its reason.
    pub(crate) async fn alarms(&self) -> BTreeMap<String, u64> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::TcpStream::connect(&self.metrics).await.unwrap();
        let request = b"GET /metrics HTTP/1.0\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let alarms = text.lines().filter_map(|line| {
            let rest = line.strip_prefix("warren_keyd_alarms_total{reason=\"")?;
            let (reason, count) = rest.split_once("\"} ")?;
            Some((reason.to_owned(), count.parse().ok()?))
        });
        alarms.collect()
    }

    /// Starts another keyd on the same folders, as if nobody had noticed that there is one.
    pub(crate) fn second(&self) -> Second {
        let Spawned {
            child,
            address,
            metrics,
            log,
        } = spawn(self.dir.path());
        Second {
            child: Some(child),
            address,
            metrics,
            log,
        }
    }

    pub(crate) fn manifests(&self, text: &str) {
        fs::write(self.dir.path().join("m/cluster.yaml"), text).unwrap();
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("keyd.sock")
    }

    pub(crate) async fn join_token(&self, node: &str, ttl_seconds: u64) -> JoinToken {
        let request = CreateJoinTokenRequest {
            node_name: node.into(),
            ttl_seconds,
        };
        let mut admin = warren_keyd_api::admin::connect(&self.socket()).await.unwrap();
        admin
            .create_join_token(request)
            .await
            .unwrap()
            .into_inner()
            .token
            .parse()
            .unwrap()
    }

    pub(crate) async fn status(&self) -> StatusResponse {
        let mut admin = warren_keyd_api::admin::connect(&self.socket()).await.unwrap();
        admin.status(StatusRequest {}).await.unwrap().into_inner()
    }

    /// Waits until keyd's status is as wanted.
    pub(crate) async fn status_where(
        &self,
        what: &str,
        wanted: impl Fn(&StatusResponse) -> bool,
    ) -> StatusResponse {
        let mut last = None;
        let found = timeout(PATIENCE, async {
            loop {
                let status = self.status().await;
                if wanted(&status) {
                    return status;
                }
                last = Some(status);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await;
        match found {
            Ok(status) => status,
            Err(_) => panic!(
                "keyd never said: {what}; last status: {last:?}; log: {:#?}",
                self.log()
            ),
        }
    }

    pub(crate) async fn enroll(&self, node: &str) -> Enrolment {
        let token = self.join_token(node, 0).await;
        tls::enroll(&self.address, &token).await.unwrap()
    }

    /// Enrols, connects and has the whole directory.
    pub(crate) async fn agent(&self, node: &str) -> Agent {
        let enrolment = self.enroll(node).await;
        Agent::connect(&self.address, node, &enrolment).await
    }

    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

/// A keyd without folders of its own.
pub(crate) struct Second {
    child: Option<Child>,
    address: String,
    metrics: String,
    log: Arc<Mutex<Vec<String>>>,
}

impl Second {
    /// Takes the place of the first one, which has to end by itself.
    pub(crate) fn swap(&mut self, first: &mut Keyd) {
        if let Some(child) = self.child.take() {
            let mut old = std::mem::replace(&mut first.child, child);
            let status = old.wait().unwrap();
            assert!(!status.success(), "{status}");
        }
        first.address.clone_from(&self.address);
        first.metrics.clone_from(&self.metrics);
        first.log = self.log.clone();
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Keyd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process, where it listens, and what it says.
struct Spawned {
    child: Child,
    address: String,
    metrics: String,
    log: Arc<Mutex<Vec<String>>>,
}

fn spawn(dir: &Path) -> Spawned {
    let mut child = Command::new(env!("CARGO_BIN_EXE_keyd"))
        .arg("run")
        .args([
            "--source",
            "manifests",
            "--listen",
            "127.0.0.1:0",
            "--metrics",
            "127.0.0.1:0",
        ])
        .arg("--config")
        .arg(dir.join("cluster.yaml"))
        .arg("--manifests")
        .arg(dir.join("m"))
        .arg("--state-dir")
        .arg(dir.join("state"))
        .arg("--admin-socket")
        .arg(dir.join("keyd.sock"))
        .env("RUST_LOG", "info")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut early = vec![];
    let mut metrics = None;
    let address = loop {
        let Some(Ok(line)) = lines.next() else {
            panic!("keyd ended: {early:#?}")
        };
        let word = |key: &str| {
            let rest = line.split(key).nth(1)?;
            rest.split(' ').next().map(str::to_owned)
        };
        metrics = word("metrics=").or(metrics);
        let bound = word("bound=");
        early.push(line);
        if let Some(bound) = bound {
            break bound;
        }
    };
    let log = Arc::new(Mutex::new(early));
    let sink = log.clone();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            sink.lock().unwrap().push(line);
        }
    });
    Spawned {
        child,
        address,
        metrics: metrics.expect("keyd says where its metrics are"),
        log,
    }
}

/// A Node manifest.
pub(crate) fn node(n: u8) -> String {
    node_with(n, &format!("10.244.{n}.0/24"), &format!("172.30.0.{n}"))
}

pub(crate) fn node_with(n: u8, cidr: &str, address: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Node\nmetadata: {{name: node{n}}}\nspec: {{podCIDRs: [\"{cidr}\"]}}\n\
         status: {{addresses: [{{type: InternalIP, address: \"{address}\"}}]}}\n"
    )
}

/// A Pod manifest in namespace `shop` with the label `app`.
pub(crate) fn pod(name: &str, node: Option<&str>) -> String {
    let place = node.map_or_else(String::new, |node| format!("nodeName: {node}, "));
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}\n\
         spec: {{{place}containers: []}}\n"
    )
}

/// What keyd's refusal says.
pub(crate) type Refused = String;

/// A channel with a client certificate.
pub(crate) async fn channel(address: &str, enrolment: &Enrolment) -> Channel {
    let trust = Trust::Ca(enrolment.ca_der.clone().into());
    tls::connect(address, &trust, Some(&enrolment.identity), None)
        .await
        .unwrap()
}

pub(crate) fn hello(node: &str) -> Hello {
    Hello {
        protocol: PROTOCOL,
        node_name: node.into(),
        token: String::new(),
        agent_version: "test".into(),
        datapath: Datapath::Userspace.into(),
        resume_epoch: 0,
        resume_version: 0,
        snapshot_root: vec![],
    }
}

/// An agent on a stream; honest unless told otherwise.
pub(crate) struct Agent {
    pub(crate) stream: AgentStream,
    pub(crate) directory: Directory,
    /// The snapshot roots that it has pinned; `None` follows nobody.
    pub(crate) roots: Option<RootChain>,
    pub(crate) uid: String,
    /// Answers each update with Applied.
    pub(crate) acknowledge: bool,
    request_id: u64,
}

impl Agent {
    pub(crate) async fn connect(address: &str, node: &str, enrolment: &Enrolment) -> Self {
        Self::open(channel(address, enrolment).await, hello(node), enrolment.root())
            .await
            .unwrap()
    }

    /// Says this Hello; waits for the first update.
    pub(crate) async fn open(channel: Channel, hello: Hello, root: SnapshotRoot) -> Result<Self, Refused> {
        Self::open_on(channel, hello, Directory::new(root)).await
    }

    /// As [`Self::open_on`], with pinned roots.
    pub(crate) async fn resume(
        (address, node): (&str, &str),
        enrolment: &Enrolment,
        directory: Directory,
        roots: RootChain,
    ) -> Result<Self, Refused> {
        let (resume_epoch, resume_version) = directory.position();
        let hello = Hello {
            resume_epoch,
            resume_version,
            snapshot_root: roots.newest().key.as_bytes().to_vec(),
            ..hello(node)
        };
        Self::begin(channel(address, enrolment).await, hello, directory, Some(roots)).await
    }

    /// As [`Self::open`], on a directory that may hold something already.
    pub(crate) async fn open_on(
        channel: Channel,
        hello: Hello,
        directory: Directory,
    ) -> Result<Self, Refused> {
        Self::begin(channel, hello, directory, None).await
    }

    async fn begin(
        channel: Channel,
        hello: Hello,
        directory: Directory,
        roots: Option<RootChain>,
    ) -> Result<Self, Refused> {
        let stream = AgentStream::open(channel, hello)
            .await
            .map_err(|status| status.message().to_owned())?;
        let mut agent = Self {
            stream,
            directory,
            roots,
            uid: String::new(),
            acknowledge: true,
            request_id: 0,
        };
        match agent.next().await? {
            Heard::Welcome(welcome) => agent.uid = welcome.node_uid,
            other => panic!("expected Welcome, got {other:?}"),
        }
        loop {
            match agent.next().await? {
                Heard::Update(_) => return Ok(agent),
                Heard::Roots(_) => {}
                other => panic!("expected Update, got {other:?}"),
            }
        }
    }

    /// The next message; updates are applied first. The end of the stream and refusals are errors.
    pub(crate) async fn next(&mut self) -> Result<Heard, Refused> {
        let heard = timeout(PATIENCE, self.stream.receive())
            .await
            .expect("keyd says nothing");
        let body = heard
            .map_err(|status| status.message().to_owned())?
            .ok_or("the stream ended")?;
        match &body {
            Heard::Roots(roots) => self.follow(roots.clone())?,
            Heard::Update(update) => {
                let applied = self
                    .directory
                    .apply(update.clone())
                    .map_err(|error| error.to_string())?;
                if applied.is_some() && self.acknowledge {
                    let (epoch, version) = self.directory.position();
                    self.stream.send(Say::Applied(Applied { epoch, version })).await;
                }
            }
            Heard::Goodbye(goodbye) => return Err(goodbye.reason.clone()),
            _ => {}
        }
        Ok(body)
    }

    /// What an agent makes of a chain of roots.
    fn follow(&mut self, roots: Roots) -> Result<(), Refused> {
        let offered = RootChain::parse(roots.roots).map_err(|error| error.to_string())?;
        let Some(pinned) = &self.roots else { return Ok(()) };
        let followed = pinned.follow(offered).map_err(|error| error.to_string())?;
        if let Followed::Further(roots) = followed {
            self.directory.set_root(roots.newest().key);
            self.roots = Some(roots);
        }
        Ok(())
    }

    /// Reads until a message is as wanted.
    pub(crate) async fn until<T>(&mut self, wanted: impl Fn(Heard) -> Option<T>) -> Result<T, Refused> {
        loop {
            if let Some(found) = wanted(self.next().await?) {
                return Ok(found);
            }
        }
    }

    /// Reads updates until the directory is as wanted.
    pub(crate) async fn until_directory(&mut self, wanted: impl Fn(&Directory) -> bool) {
        while !wanted(&self.directory) {
            self.next().await.unwrap();
        }
    }

    pub(crate) async fn offer(
        &mut self,
        slot: u32,
        generation: u64,
        public_key: Vec<u8>,
    ) -> Result<Heard, Refused> {
        let offer = KeyOffer {
            slot,
            port: 51871 + slot.min(9),
            generation,
            public_key,
            pre_shared_keys: false,
        };
        self.stream.send(Say::KeyOffer(offer)).await;
        self.until(|heard| matches!(heard, Heard::KeyChallenge(_) | Heard::KeyResult(_)).then_some(heard))
            .await
    }

    pub(crate) async fn challenge(&mut self, key: PublicKey) -> KeyChallenge {
        match self.offer(0, 1, key.as_bytes().to_vec()).await.unwrap() {
            Heard::KeyChallenge(challenge) => challenge,
            other => panic!("expected a challenge, got {other:?}"),
        }
    }

    pub(crate) async fn answer(&mut self, proof: KeyProof) -> KeyResult {
        self.stream.send(Say::KeyProof(proof)).await;
        let result = |heard| {
            if let Heard::KeyResult(result) = heard {
                Some(result)
            } else {
                None
            }
        };
        self.until(result).await.unwrap()
    }

    /// Offers and proves a key of its own.
    pub(crate) async fn prove(&mut self, private: &PrivateKey) -> KeyResult {
        let challenge = self.challenge(proof::public_key(private)).await;
        let uid = self.uid.as_str().into();
        self.answer(proof::answer(&challenge, private, &uid, 1, false).unwrap())
            .await
    }

    pub(crate) async fn send_add(&mut self, pod: &str, uid: &str, address: &str) -> u64 {
        self.request_id += 1;
        let addresses = vec![address_to_bytes(address.parse().unwrap())];
        let (request_id, namespace) = (self.request_id, "shop".to_owned());
        let add = EndpointAdd {
            request_id,
            namespace,
            pod: pod.into(),
            uid: uid.into(),
            addresses,
        };
        self.stream.send(Say::EndpointAdd(add)).await;
        request_id
    }

    pub(crate) async fn add(&mut self, pod: &str, uid: &str, address: &str) -> EndpointResult {
        let id = self.send_add(pod, uid, address).await;
        let result = |heard| match heard {
            Heard::EndpointResult(result) if result.request_id == id => Some(result),
            _ => None,
        };
        self.until(result).await.unwrap()
    }

    pub(crate) async fn delete(&mut self, pod: &str, uid: &str) {
        let (namespace, pod, uid) = ("shop".to_owned(), pod.to_owned(), uid.to_owned());
        self.stream
            .send(Say::EndpointDelete(EndpointDelete {
                namespace,
                pod,
                uid,
                addresses: vec![],
            }))
            .await;
    }
}

/// An identity of another cluster's CA.
pub(crate) fn foreign_identity(node: &str, uid: &str) -> ClientIdentity {
    let authority = tls::Authority::generate(1_800_000_000).unwrap();
    let (key_der, csr) = tls::generate_client_key().unwrap();
    let (certificate, _) = authority
        .issue_client(&csr, &node.into(), &uid.into(), 1_800_000_000)
        .unwrap();
    ClientIdentity {
        certificate_der: certificate.to_vec(),
        key_der,
    }
}
