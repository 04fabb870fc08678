//! Keys that may not be offered, and proofs that prove nothing.

use warren_keyd_api::{
    proof,
    proto::{KeyProof, KeyResult, keyd_message::Body as Heard},
};
use warren_model::PrivateKey;

use crate::{Case, World, case, new_key};

// Keys that may not be offered.
pub(crate) fn offers() -> Vec<Case> {
    let of = ("offer", "key", "node2's stream");
    let no = |word| ("KeyRefused", word);
    let mut cases = vec![];
    let mut prime = [0xff; 32];
    (prime[0], prime[31]) = (0xed, 0x7f);
    let changed = |at: usize, by: i16| {
        let mut bytes = prime;
        bytes[at] = (i16::from(bytes[at]) + by) as u8;
        bytes.to_vec()
    };
    let mut one = vec![0; 32];
    one[0] = 1;
    let mut high = one.clone();
    high[31] = 0x80;
    let points = [
        ("zero", vec![0; 32], "zero"),
        ("a point of order 1", one, "low-order"),
        ("the same with its top bit set", high, "low-order"),
        ("p - 1", changed(0, -1), "low-order"),
        ("p", prime.to_vec(), "low-order"),
        ("p + 1", changed(0, 1), "low-order"),
        ("31 bytes", vec![7; 31], "32 bytes"),
        ("33 bytes", vec![7; 33], "32 bytes"),
        ("no bytes", vec![], "32 bytes"),
    ];
    for (claim, bytes, word) in points {
        cases.push(case(of, claim, no(word), move |world| {
            let bytes = bytes.clone();
            Box::pin(async move { refused_offer(world, 0, 1, bytes).await })
        }));
    }
    for (slot, generation) in [(1, 1), (2, 1), (0, 2), (3, 1), (u32::MAX, 1), (0, 0)] {
        let claim = format!("slot {slot} for generation {generation}");
        cases.push(case(of, claim, no(""), move |world| {
            Box::pin(async move {
                let key = proof::public_key(&new_key()).as_bytes().to_vec();
                refused_offer(world, slot, generation, key).await
            })
        }));
    }
    cases.push(case(of, "nine keys at a time", no("too many"), |world| {
        Box::pin(async move {
            let mut last = Err("all were challenged".into());
            for _ in 0..9 {
                let key = proof::public_key(&new_key()).as_bytes().to_vec();
                last = refused_offer(world, 0, 1, key).await;
            }
            world.hostile = None;
            last
        })
    }));
    cases
}

async fn refused_offer(
    world: &mut World,
    slot: u32,
    generation: u64,
    key: Vec<u8>,
) -> Result<String, String> {
    match world.hostile().await.offer(slot, generation, key).await? {
        Heard::KeyResult(result) if !result.accepted => Ok(result.reason),
        other => Err(format!("{other:?}")),
    }
}

// Proofs that prove nothing.
pub(crate) fn proofs() -> Vec<Case> {
    let of = ("prove", "key", "node2's stream");
    let no = |word| ("KeyRefused", word);
    let not_held = "does not hold the private key";
    vec![
        case(of, "node1's key, a made-up answer", no(not_held), |world| {
            Box::pin(async move {
                let stolen = proof::public_key(&world.honest_key);
                let challenge = world.hostile().await.challenge(stolen).await;
                answer(
                    world,
                    KeyProof {
                        public_key: challenge.public_key,
                        nonce: challenge.nonce,
                        mac: vec![7; 32],
                    },
                )
                .await
            })
        }),
        case(of, "node1's key, its own key's answer", no(not_held), |world| {
            Box::pin(async move {
                let (stolen, own) = (proof::public_key(&world.honest_key), new_key());
                let uid = world.hostile().await.uid.as_str().into();
                let mut challenge = world.hostile().await.challenge(stolen).await;
                challenge.public_key = proof::public_key(&own).as_bytes().to_vec();
                let mut forged = proof::answer(&challenge, &own, &uid, 1, challenge.pre_shared_keys).unwrap();
                forged.public_key = stolen.as_bytes().to_vec();
                answer(world, forged).await
            })
        }),
        case(
            of,
            "node1's key, whose private half leaked",
            no("already belongs to node node1"),
            |world| {
                Box::pin(async move {
                    let key = PrivateKey::from_bytes(*world.honest_key.expose());
                    refused_proof(world, &key).await
                })
            },
        ),
        case(of, "a deleted node's key", no("revoked"), |world| {
            Box::pin(async move {
                let key = PrivateKey::from_bytes(*world.dead.1.expose());
                refused_proof(world, &key).await
            })
        }),
        case(of, "a second key nobody asked for", no(""), |world| {
            Box::pin(async move { refused_proof(world, &new_key()).await })
        }),
        case(of, "an answer that was used", no("not open"), |world| {
            Box::pin(async move {
                let (key, answered) = fresh(world, 1, None).await;
                let mut wrong = answered.clone();
                wrong.mac[0] ^= 1;
                answer(world, wrong).await?;
                drop(key);
                answer(world, answered).await
            })
        }),
        case(of, "an old answer to a new challenge", no("not open"), |world| {
            Box::pin(async move {
                let (key, old) = fresh(world, 1, None).await;
                world.hostile().await.challenge(proof::public_key(&key)).await;
                answer(world, old).await
            })
        }),
        case(of, "an answer for node1's UID", no(not_held), |world| {
            Box::pin(async move {
                let uid = world.honest.uid.clone();
                let (_, forged) = fresh(world, 1, Some(uid)).await;
                answer(world, forged).await
            })
        }),
        case(of, "an answer for another generation", no(not_held), |world| {
            Box::pin(async move {
                let (_, forged) = fresh(world, 2, None).await;
                answer(world, forged).await
            })
        }),
        case(
            of,
            "an answer for the other word on pre-shared keys",
            no(not_held),
            |world| {
                Box::pin(async move {
                    let key = new_key();
                    let agent = world.hostile().await;
                    let uid = agent.uid.as_str().into();
                    let mut challenge = agent.challenge(proof::public_key(&key)).await;
                    challenge.pre_shared_keys = !challenge.pre_shared_keys;
                    let forged = proof::answer(&challenge, &key, &uid, 1, true).unwrap();
                    answer(world, forged).await
                })
            },
        ),
        case(of, "half an answer", no(not_held), |world| {
            Box::pin(async move {
                let (_, mut forged) = fresh(world, 1, None).await;
                forged.mac.truncate(16);
                answer(world, forged).await
            })
        }),
        case(of, "an answer to no challenge", no("not open"), |world| {
            Box::pin(async move {
                answer(
                    world,
                    KeyProof {
                        public_key: vec![1; 32],
                        nonce: vec![],
                        mac: vec![],
                    },
                )
                .await
            })
        }),
        case(
            of,
            "with its first stream's challenge on a second",
            no("not open"),
            |world| {
                Box::pin(async move {
                    let (_, kept) = fresh(world, 1, None).await;
                    world.hostile = None;
                    answer(world, kept).await
                })
            },
        ),
    ]
}

/// A key with the answer to a challenge, for a UID (its own unless given) and generation.
async fn fresh(world: &mut World, generation: u64, uid: Option<String>) -> (PrivateKey, KeyProof) {
    let key = new_key();
    let challenge = world.hostile().await.challenge(proof::public_key(&key)).await;
    let own = world.hostile().await.uid.clone();
    let uid = uid.unwrap_or(own).as_str().into();
    let answer = proof::answer(&challenge, &key, &uid, generation, challenge.pre_shared_keys).unwrap();
    (key, answer)
}

async fn answer(world: &mut World, proof: KeyProof) -> Result<String, String> {
    refusal(world.hostile().await.answer(proof).await)
}

async fn refused_proof(world: &mut World, key: &PrivateKey) -> Result<String, String> {
    refusal(world.hostile().await.prove(key).await)
}

fn refusal(result: KeyResult) -> Result<String, String> {
    match result.accepted {
        true => Err("it was accepted".into()),
        false => Ok(result.reason),
    }
}
