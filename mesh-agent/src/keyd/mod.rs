//! The agent's side of `keyd`: one stream, kept open, with a verified copy of the directory.
//!
//! Nothing here is needed for traffic to flow: with `keyd` gone, everything stays as it is.

mod contents;
mod session;
mod trust;

use std::{
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};
use warren_agent_api::RootStatus;
use warren_agent_core::{Endpoint, slots::PairReport};
use warren_keyd_api::{proto, snapshot::Directory};
use warren_model::{Datapath, ForgetPsk, IdentityId};

use crate::{
    clock::SignedClock,
    config::Config,
    files::{Applied, StateDir},
    keys::KeyStore,
    policy::ToEnforcer,
    runner::Input,
};

pub(crate) use contents::{Contents, Received};
pub(crate) use trust::{TrustFaults, snapshot_roots};

/// The first pause between attempts to connect.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest: a new leader is found soon after it is there.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A session that lasted so long went well.
const LASTING: Duration = Duration::from_secs(5);

/// What the agent tells `keyd`.
#[derive(Debug)]
pub(crate) enum ToKeyd {
    /// A pod came; the answer names its identity.
    Add(Box<Endpoint>, oneshot::Sender<Result<IdentityId, Refused>>),
    /// A pod went.
    Delete(Box<Endpoint>),
    /// Everything up to this epoch and version is in force.
    Applied(u64, u64),
    /// State of this node.
    Status(Box<proto::AgentStatus>),
    /// What has changed of the paths to peers.
    Paths(Vec<PairReport>),
    /// A private key was destroyed.
    Held,
}

/// Why a pod has no identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refused {
    /// `keyd` cannot be asked now.
    Unreachable,
    /// `keyd` said no: the sentence, and whether the same question may be answered otherwise later.
    No { reason: String, retry: bool },
}

/// What the client tells the agent.
#[derive(Debug)]
pub(crate) enum FromKeyd {
    /// A session began.
    Connected { address: String },
    /// There is no session.
    Disconnected { reason: String },
    /// `keyd`'s verdict on the key of a generation of this node; `None` is good.
    Key {
        generation: u64,
        refusal: Option<String>,
    },
    /// A private key was made.
    NewKey,
    /// A pre-shared key is to be forgotten.
    Forget(ForgetPsk),
    /// Another snapshot root is pinned.
    Root(RootStatus),
    /// What is mounted, or what `keyd` names, is not what is pinned; or is again.
    Trust { fault: Option<String> },
    /// An update was refused: forged, replayed or damaged.
    RefusedUpdate,
}

/// The client.
pub(crate) struct Client {
    pub(crate) config: Config,
    pub(crate) state: StateDir,
    pub(crate) keys: KeyStore,
    pub(crate) datapath: Datapath,
    /// The verified copy, from disk at first; `None` until the snapshot root is known.
    pub(crate) directory: Option<Directory>,
    /// What of it cannot be read.
    pub(crate) contents: Contents,
    /// Where an operator's questions go.
    pub(crate) inputs: mpsc::UnboundedSender<Input>,
    /// Where changes of the directory go first.
    pub(crate) changes: std::sync::mpsc::Sender<ToEnforcer>,
    /// Epoch and version of the copy on disk; held while one is written.
    pub(crate) saving: Arc<Mutex<(u64, u64)>>,
    /// Which directory the devices were made from.
    pub(crate) applied: Applied,
    /// What was in force at the start: nothing older is taken.
    pub(crate) floor: (u64, u64),
    /// The next session asks for all of the directory, not for what is new.
    pub(crate) resync: bool,
    /// What is known of the real time.
    pub(crate) clock: SignedClock,
    pub(crate) trust_faults: TrustFaults,
    pub(crate) events: mpsc::UnboundedSender<FromKeyd>,
    pub(crate) commands: mpsc::UnboundedReceiver<ToKeyd>,
}

/// How a session ended.
#[derive(Debug)]
enum End {
    /// A follower named the leader.
    Redirect(Vec<String>),
    /// The stream broke, or `keyd` ended it.
    Closed(String),
    /// The agent is shutting down.
    Shutdown,
}

impl Client {
    /// Keeps a session open until the agent ends.
    pub(crate) async fn run(mut self) {
        let mut failures = 0u32;
        let mut next: Vec<String> = Vec::new();
        loop {
            let mut material = match self.trust().await {
                Ok(material) => material,
                Err(reason) => {
                    if self.pause(&mut failures, reason).await.is_none() {
                        return;
                    }
                    continue;
                }
            };
            let address = match next.pop() {
                Some(address) => address,
                None => {
                    next = self.addresses();
                    next.reverse();
                    match next.pop() {
                        Some(address) => address,
                        None => {
                            let reason = "no address of keyd is known: name it with --keyd".to_owned();
                            if self.pause(&mut failures, reason).await.is_none() {
                                return;
                            }
                            continue;
                        }
                    }
                }
            };
            let begun = tokio::time::Instant::now();
            let (welcomed, end) = self.session(&address, &mut material).await;
            // One that ends at once would end again.
            if welcomed && begun.elapsed() >= LASTING {
                failures = 0;
            }
            match end {
                End::Shutdown => return,
                // Two that name each other must not be asked in a tight loop.
                End::Redirect(leaders) if !leaders.is_empty() && failures == 0 => {
                    tracing::info!(?leaders, "keyd at {address} is a follower");
                    failures = 1;
                    next.extend(leaders.into_iter().rev());
                }
                End::Redirect(_) => {
                    if self
                        .pause(
                            &mut failures,
                            format!("keyd at {address} is a follower, and no leader answers"),
                        )
                        .await
                        .is_none()
                    {
                        return;
                    }
                }
                End::Closed(reason) => {
                    if !next.is_empty() {
                        self.disconnected(reason);
                        continue;
                    }
                    if self.pause(&mut failures, reason).await.is_none() {
                        return;
                    }
                }
            }
        }
    }

    fn disconnected(&self, reason: String) {
        let _ = self.events.send(FromKeyd::Disconnected { reason });
    }

    /// Waits before the next attempt, answering meanwhile that `keyd` is away. `None` at shutdown.
    async fn pause(&mut self, failures: &mut u32, reason: String) -> Option<()> {
        self.disconnected(reason);
        let pause = FIRST_PAUSE
            .saturating_mul(1 << (*failures).min(10))
            .min(LONGEST_PAUSE);
        *failures = failures.saturating_add(1);
        let end = tokio::time::Instant::now() + pause.mul_f64(jitter());
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(end) => return Some(()),
                command = self.commands.recv() => answer_absent(command?),
            }
        }
    }

    /// Configured addresses first, then those that worked before.
    fn addresses(&self) -> Vec<String> {
        let mut all = self.config.options.keyd.clone();
        for address in trust::known_addresses(&self.state) {
            if !all.contains(&address) {
                all.push(address);
            }
        }
        all
    }
}

fn answer_absent(command: ToKeyd) {
    if let ToKeyd::Add(_, reply) = command {
        let _ = reply.send(Err(Refused::Unreachable));
    }
}

/// 0.5 to 1.5, so that agents do not come back all at once.
fn jitter() -> f64 {
    let random = RandomState::new().build_hasher().finish();
    0.5 + (random % 1000) as f64 / 1000.0
}
