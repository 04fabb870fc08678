//! Hostile nodes as a table: what is tried, with which proof of identity, claiming what. Each attempt is refused with a reason,
//! raises an alarm that is counted and said (in a cluster: an Event; here, where there is no API server, the line of the log that
//! goes with it), and changes nothing of what the other nodes' devices are made from: every entry of their verified directory.

#[path = "table/credentials.rs"]
mod credentials;
#[path = "table/keys.rs"]
mod keys;
#[path = "table/published.rs"]
mod published;
#[path = "table/reports.rs"]
mod reports;
#[expect(dead_code, reason = "the other suites use the rest")]
mod support;

use std::{future::Future, pin::Pin, time::Duration};

use support::{Agent, Keyd, PATIENCE, channel, node, pod};
use tokio::time::timeout;
use warren_keyd_api::{
    convert::Record,
    proof,
    proto::{Hello, agent_message::Body as Say},
    tls::{self, Enrolment},
    token::JoinToken,
};
use warren_model::{IdentityId, PrivateKey, PublicKey};

/// What is tried.
struct Case {
    verb: &'static str,
    object: &'static str,
    /// With which proof of identity.
    proof: &'static str,
    claim: String,
    /// Reason of the alarm.
    alarm: &'static str,
    /// What the refusal says.
    word: &'static str,
    attack: Attack,
}

/// Ends with the refusal; that it succeeded, or that it was not noticed, is an error.
type Attempt<'a> = Pin<Box<dyn Future<Output = Result<String, String>> + 'a>>;
type Attack = Box<dyn for<'a> Fn(&'a mut World) -> Attempt<'a>>;

/// node1 is honest and watches; node2 is the attacker's; node3 is a victim that is not connected; node4 was deleted.
struct World {
    keyd: Keyd,
    honest: Agent,
    honest_key: PrivateKey,
    /// The attacker's stream, opened anew where an attack has ended it.
    hostile: Option<Agent>,
    hostile_key: PrivateKey,
    enrolment: Enrolment,
    victim_key: PublicKey,
    dead: (Enrolment, PrivateKey),
    refused_updates: u64,
}

fn manifests(more: &str) -> String {
    let pods = [
        pod("web", Some("node1")),
        pod("db", Some("node2")),
        pod("cache", Some("node3")),
    ];
    [node(1), node(2), node(3), pods.concat(), more.to_owned()].concat()
}

fn new_key() -> PrivateKey {
    proof::generate_private_key().unwrap()
}

impl World {
    async fn new() -> Self {
        let keyd = Keyd::start(&manifests(&node(4)));
        let mut honest = keyd.agent("node1").await;
        let honest_key = new_key();
        assert!(honest.prove(&honest_key).await.accepted);
        assert_eq!(honest.add("web", "u1", "10.244.1.5").await.error, "");
        let mut victim = keyd.agent("node3").await;
        let victim_key = new_key();
        assert!(victim.prove(&victim_key).await.accepted);
        assert_eq!(victim.add("cache", "u3", "10.244.3.5").await.error, "");
        drop(victim);
        let dead_enrolment = keyd.enroll("node4").await;
        let dead_key = new_key();
        let mut dead = Agent::connect(&keyd.address, "node4", &dead_enrolment).await;
        assert!(dead.prove(&dead_key).await.accepted);
        drop(dead);
        keyd.manifests(&manifests(""));
        keyd.status_where("three nodes", |status| status.nodes.len() == 3)
            .await;
        let enrolment = keyd.enroll("node2").await;
        let hostile_key = new_key();
        let mut world = Self {
            honest,
            honest_key,
            hostile: None,
            hostile_key: new_key(),
            enrolment,
            victim_key: proof::public_key(&victim_key),
            dead: (dead_enrolment, dead_key),
            refused_updates: 0,
            keyd,
        };
        assert!(world.hostile().await.prove(&hostile_key).await.accepted);
        assert_eq!(
            world.hostile().await.add("db", "u2", "10.244.2.5").await.error,
            ""
        );
        world.hostile_key = hostile_key;
        world
    }

    /// The attacker's stream.
    async fn hostile(&mut self) -> &mut Agent {
        if self.hostile.is_none() {
            self.hostile = Some(Agent::connect(&self.keyd.address, "node2", &self.enrolment).await);
        }
        self.hostile.as_mut().unwrap()
    }

    /// Opens a stream with this Hello and, perhaps, another node's certificate.
    async fn open(&self, enrolment: &Enrolment, hello: Hello) -> Result<String, String> {
        let channel = channel(&self.keyd.address, enrolment).await;
        match Agent::open(channel, hello, enrolment.root()).await {
            Ok(_) => Err("it was welcomed".into()),
            Err(reason) => Ok(reason),
        }
    }

    async fn enroll(&self, token: &JoinToken) -> Result<String, String> {
        match tls::enroll(&self.keyd.address, token).await {
            Ok(_) => Err("it was enrolled".into()),
            Err(error) => Ok(error.to_string()),
        }
    }

    /// Says something that must end the stream; returns keyd's last word.
    async fn ends(&mut self, body: Say) -> Result<String, String> {
        let agent = self.hostile().await;
        agent.stream.send(body).await;
        let reason = agent.until(|_| None::<()>).await.unwrap_err();
        self.hostile = None;
        Ok(reason)
    }

    /// Says something that keyd does not answer.
    async fn says(&mut self, body: Say) -> Result<String, String> {
        self.hostile().await.stream.send(body).await;
        Ok(String::new())
    }

    /// What the honest node's devices are made from.
    fn entries(&self) -> Vec<Record> {
        self.honest.directory.records().map(Result::unwrap).collect()
    }

    /// The honest node has all that is published.
    async fn settle(&mut self) {
        let version = self.keyd.status().await.directory_version;
        self.honest
            .until_directory(|directory| directory.position().1 >= version)
            .await;
    }

    async fn alarms(&self, reason: &str) -> u64 {
        self.keyd.alarms().await.get(reason).copied().unwrap_or_default()
    }
}

fn case(
    (verb, object, proof): (&'static str, &'static str, &'static str),
    claim: impl Into<String>,
    (alarm, word): (&'static str, &'static str),
    attack: impl for<'a> Fn(&'a mut World) -> Attempt<'a> + 'static,
) -> Case {
    Case {
        verb,
        object,
        proof,
        claim: claim.into(),
        alarm,
        word,
        attack: Box::new(attack),
    }
}

#[tokio::test]
async fn every_attempt_of_the_table_is_refused_with_an_alarm_and_changes_nothing() {
    let mut world = World::new().await;
    world.settle().await;
    let before = world.entries();
    let cases: Vec<Case> = [
        credentials::enrolments(),
        credentials::streams(),
        keys::offers(),
        keys::proofs(),
        reports::endpoints(),
        reports::reports(),
        published::snapshots(),
        published::claims(),
    ]
    .into_iter()
    .flatten()
    .collect();
    println!(
        "| # | verb | object | proof of identity | claim | alarm | refusal |\n|---|---|---|---|---|---|---|"
    );
    for (number, case) in cases.iter().enumerate() {
        let what = format!("{} {} as {}: {}", case.verb, case.object, case.proof, case.claim);
        let alarms = world.alarms(case.alarm).await;
        let refusal = (case.attack)(&mut world).await;
        let refusal = refusal.unwrap_or_else(|error| panic!("{what}: not refused: {error}"));
        assert!(refusal.contains(case.word), "{what}: {refusal}");
        let counted = timeout(PATIENCE, async {
            while world.alarms(case.alarm).await <= alarms {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        assert!(counted.await.is_ok(), "{what}: no alarm {}", case.alarm);
        world.settle().await;
        assert_eq!(world.entries(), before, "{what}");
        println!(
            "| {} | {} | {} | {} | {} | {} | {} |",
            number + 1,
            case.verb,
            case.object,
            case.proof,
            case.claim,
            case.alarm,
            refusal.lines().next().unwrap_or_default()
        );
    }
    let log = world.keyd.log();
    for case in &cases {
        let said = log
            .iter()
            .any(|line| line.contains(&format!("reason=\"{}\"", case.alarm)));
        assert!(said, "{} was counted but not said", case.alarm);
    }
    println!("{} attempts, {} refused, {} changes", cases.len(), cases.len(), 0);
    assert!(cases.len() >= 60, "{}", cases.len());
    // And what is right still works.
    assert!(
        world.hostile().await.add("db", "u2", "10.244.2.5").await.identity >= IdentityId::FIRST_ALLOCATED.0
    );
}

/// Two nodes prove the same key at the same moment: one has it, and everybody hears of one.
#[tokio::test]
async fn of_two_that_race_for_a_key_one_has_it() {
    let keyd = Keyd::start(&[node(1), node(2), node(3)].concat());
    let mut watcher = keyd.agent("node1").await;
    for round in 0..4 {
        let key = new_key();
        let public = proof::public_key(&key);
        let mut racers = vec![];
        for name in ["node2", "node3"] {
            racers.push(keyd.agent(name).await);
        }
        let mut answers = vec![];
        for racer in &mut racers {
            let challenge = racer.challenge(public).await;
            let uid = racer.uid.as_str().into();
            answers.push(proof::answer(&challenge, &key, &uid, 1, challenge.pre_shared_keys).unwrap());
        }
        let [second, third] = &mut racers[..] else {
            unreachable!()
        };
        let (one, other) = tokio::join!(
            second.answer(answers[0].clone()),
            third.answer(answers[1].clone())
        );
        let accepted = u8::from(one.accepted) + u8::from(other.accepted);
        match round {
            0 => assert_eq!(accepted, 1, "{one:?} {other:?}"),
            // Both, or one of them, have a key by then and were not asked for another.
            _ => assert!(accepted <= 1, "{one:?} {other:?}"),
        }
        let version = keyd.status().await.directory_version;
        watcher
            .until_directory(|directory| directory.position().1 >= version)
            .await;
        let owners = watcher
            .directory
            .records()
            .flatten()
            .filter(|record| match record {
                Record::Node(node) => node.slots.iter().any(|slot| slot.public_key == public),
                _ => false,
            });
        assert_eq!(owners.count(), usize::from(accepted));
    }
    assert!(keyd.alarms().await["KeyRefused"] >= 1);
}
