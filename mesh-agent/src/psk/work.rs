//! Doing what the core's exchanges ask for.

use std::collections::{BTreeMap, HashMap};

use warren_agent_core::{
    psk::{Done, Ends, Nonce, Record, Work},
    slots::begins,
};
use warren_model::{PreSharedKey, PskId};
use warren_wireguard::psk_id;

use super::{
    Links,
    crypto::{self, Offer, Roles},
};
use crate::keys::KeyStore;

/// Secrets that are not on disk: of exchanges under way.
#[derive(Default)]
pub(crate) struct Secrets {
    /// This node's offers.
    offers: HashMap<Ends, (Nonce, Offer)>,
    /// Keys that were computed and not saved yet.
    computed: BTreeMap<PskId, (Ends, PreSharedKey)>,
}

impl Secrets {
    /// Does all of it, with one write to the disk at most for each of this node's keys.
    pub(crate) fn work(&mut self, works: Vec<Work>, keys: &KeyStore, links: &Links) -> Vec<Done> {
        let mut done = vec![];
        let mut records = vec![];
        for work in works {
            done.push(match work {
                Work::Begin { ends, nonce } => Done::Begun(ends, nonce, self.begin(ends, nonce)),
                Work::Answer { ends, nonce, offer } => Done::Answered(ends, nonce, self.answer(ends, &offer)),
                Work::Finish {
                    ends,
                    nonce,
                    answer,
                    id,
                } => Done::Finished(ends, nonce, self.finish(ends, nonce, &answer, id)),
                Work::Send { ends, slot, bytes } => {
                    links.send(slot, &ends.peer, &bytes);
                    continue;
                }
                Work::Save { ends, record } => {
                    records.push((ends, record));
                    continue;
                }
            });
        }
        done.extend(self.save(records, keys));
        done
    }

    fn begin(&mut self, ends: Ends, nonce: Nonce) -> Option<Vec<u8>> {
        let offer = Offer::new().ok()?;
        let public = offer.public().to_vec();
        self.offers.insert(ends, (nonce, offer));
        Some(public)
    }

    fn answer(&mut self, ends: Ends, offer: &[u8]) -> Option<(PskId, Vec<u8>)> {
        let (key, answer) = crypto::answer(roles(ends), offer).ok()?;
        Some((self.keep(ends, key), answer))
    }

    fn finish(&mut self, ends: Ends, nonce: Nonce, answer: &[u8], id: PskId) -> Option<PskId> {
        let (of, offer) = self.offers.remove(&ends)?;
        let key = offer.finish(roles(ends), answer).ok().filter(|_| of == nonce)?;
        (psk_id(key.expose()) == id).then(|| self.keep(ends, key))
    }

    fn keep(&mut self, ends: Ends, key: PreSharedKey) -> PskId {
        let id = psk_id(key.expose());
        self.computed.insert(id, (ends, key));
        id
    }

    fn save(&mut self, records: Vec<(Ends, Record)>, keys: &KeyStore) -> Vec<Done> {
        if records.is_empty() {
            return vec![];
        }
        let of_paths = |(id, (_, key)): (&PskId, &(Ends, PreSharedKey))| (*id, key.clone());
        let computed = self.computed.iter().map(of_paths).collect();
        let results = tokio::task::block_in_place(|| keys.save(&records, &computed));
        for ((ends, record), saved) in records.iter().zip(&results) {
            // What was not chosen is not wanted any more.
            if *saved {
                self.computed.retain(|_, (of, _)| of != ends);
            }
            if *record == Record::default() {
                self.offers.remove(ends);
            }
        }
        let saved = records.into_iter().zip(results);
        saved
            .map(|((ends, record), saved)| Done::Saved(ends, record, saved))
            .collect()
    }
}

fn roles(ends: Ends) -> Roles {
    match begins(ends.own, ends.peer) {
        true => Roles {
            begins: ends.own,
            answers: ends.peer,
        },
        false => Roles {
            begins: ends.peer,
            answers: ends.own,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_stores() -> (tempfile::TempDir, [KeyStore; 2]) {
        let directory = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            let path = directory.path().join(name);
            std::fs::create_dir(&path).unwrap();
            KeyStore::open(&path).unwrap()
        };
        let stores = [open("a"), open("b")];
        (directory, stores)
    }

    /// Two exchanges with everything but the network: both ends have the same key on disk, and nothing else is left.
    #[tokio::test(flavor = "multi_thread")]
    async fn two_nodes_have_the_same_key_on_disk() {
        use warren_agent_core::psk::{Exchanges, PskUse, Seen};
        use warren_model::link_address;

        let (_directory, stores) = two_stores();
        let [a, b] = [0, 1].map(|n| stores[n].make(1, true).unwrap());
        let ends = [Ends { own: a, peer: b }, Ends { own: b, peer: a }];
        let mut exchanges = [0, 1].map(|n: u8| Exchanges::new(BTreeMap::new(), [n + 1; 7]));
        let mut secrets = [Secrets::default(), Secrets::default()];
        let links = Links::default();
        let now = std::time::Duration::from_secs(1);
        for _ in 0..20 {
            for n in [0, 1] {
                let seen = Seen {
                    open: true,
                    ..Seen::default()
                };
                exchanges[n].update(now, [(ends[n], 1, seen)]);
                let works = exchanges[n].poll(now);
                for work in &works {
                    if let Work::Send { bytes, .. } = work {
                        exchanges[1 - n].received(now, 1, link_address(&ends[n].own), bytes);
                    }
                }
                for done in secrets[n].work(works, &stores[n], &links) {
                    exchanges[n].done(now, done);
                }
            }
        }
        let records = [0, 1].map(|n| stores[n].records()[&ends[n]].clone());
        assert_eq!(records[0], records[1]);
        let id = records[0].agreed.unwrap();
        assert!(stores[0].shared(&ends[0], id) == stores[1].shared(&ends[1], id));
        assert!(stores[0].shared(&ends[0], id).is_some());
        assert!(secrets.iter().all(|secrets| secrets.computed.is_empty()));
        let other = usize::from(begins(a, b));
        let psk = exchanges[other].psk(now, &ends[other]);
        assert_eq!(
            psk,
            PskUse::With(id),
            "the end that does not begin waits for nobody"
        );
        // Gone from the directory, gone from the disk.
        for n in [0, 1] {
            exchanges[n].update(now, []);
            let works = exchanges[n].poll(now);
            secrets[n].work(works, &stores[n], &links);
            assert!(stores[n].records().is_empty() && secrets[n].offers.is_empty());
        }
    }

    #[test]
    fn an_answer_to_another_offer_makes_no_key() {
        let (_directory, [a, b]) = two_stores();
        let [a, b] = [a.make(1, true).unwrap(), b.make(1, true).unwrap()];
        let (mut here, mut there) = (Secrets::default(), Secrets::default());
        let (ends, back) = (Ends { own: a, peer: b }, Ends { own: b, peer: a });
        let nonce = |n| Nonce([n; 7]);
        let offer = here.begin(ends, nonce(1)).unwrap();
        let (id, answer) = there.answer(back, &offer).unwrap();
        assert_eq!(here.finish(ends, nonce(2), &answer, id), None);
        assert_eq!(
            here.finish(ends, nonce(1), &answer, id),
            None,
            "an offer is used once"
        );
        let offer = here.begin(ends, nonce(3)).unwrap();
        let (id, answer) = there.answer(back, &offer).unwrap();
        assert_eq!(here.finish(ends, nonce(3), &answer, PskId([1; 16])), None);
        let again = here.begin(ends, nonce(4)).unwrap();
        assert_ne!(offer, again);
        assert_eq!(here.finish(ends, nonce(4), &answer, id), None);
    }
}
