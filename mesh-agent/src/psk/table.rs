//! The pre-shared keys of one of this node's key generations: one file, replaced as a whole, so that a crash never tears it and
//! many keys cost as many writes as one. What is replaced is overwritten.
//!
//! ```text
//!   warren-psk 1
//!   PEER'S PUBLIC KEY agreed|offered KEY
//! ```

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use warren_agent_core::psk::Record;
use warren_model::{PreSharedKey, PskId, PublicKey};
use warren_wireguard::psk_id;
use zeroize::Zeroizing;

use crate::files::{overwrite, write_private};

const FIRST_LINE: &str = "warren-psk 1\n";
/// Bytes of a line: two keys, the word, two spaces, the end.
const LINE: usize = 44 + 1 + 7 + 1 + 44 + 1;
/// More than a table of all nodes of a cluster ever has.
const LONGEST_FILE: u64 = 16 << 20;

/// What is on disk of a path.
#[derive(Debug, Clone, Default)]
struct Row {
    agreed: Option<(PskId, PreSharedKey)>,
    offered: Option<(PskId, PreSharedKey)>,
}

/// The keys by peer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Table(BTreeMap<PublicKey, Row>);

impl Table {
    /// Reads the file; `None` where there is none. One that is damaged is an error: without it every pair would be cut off.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>> {
        let damaged = || {
            format!(
                "the file of pre-shared keys {} is damaged: restore it, or remove it together with the .key file of its generation \
                 to get new keys",
                path.display()
            )
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => bail!("cannot read {}: {error}", path.display()),
        };
        let metadata = file.metadata().with_context(damaged)?;
        // Grown at once: a buffer that grows leaves copies behind.
        let length = metadata.len().min(LONGEST_FILE);
        let mut bytes = Zeroizing::new(Vec::with_capacity(
            usize::try_from(length + 1).unwrap_or_default(),
        ));
        file.take(length).read_to_end(&mut bytes).with_context(damaged)?;
        if metadata.permissions().mode() & 0o077 != 0 {
            tracing::warn!(file = %path.display(), "the file was readable by others: restricted to root");
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).with_context(damaged)?;
        }
        let text = std::str::from_utf8(&bytes).ok().with_context(damaged)?;
        let rows = text.strip_prefix(FIRST_LINE).with_context(damaged)?;
        let mut table = Self::default();
        for line in rows.lines() {
            table.line(line).with_context(damaged)?;
        }
        Ok(Some(table))
    }

    fn line(&mut self, line: &str) -> Option<()> {
        let mut words = line.split(' ');
        let peer: PublicKey = words.next()?.parse().ok()?;
        let word = words.next()?;
        let mut bytes = Zeroizing::new([0; 33]);
        let length = STANDARD.decode_slice(words.next()?, bytes.as_mut_slice()).ok()?;
        if words.next().is_some() || length != 32 {
            return None;
        }
        let key = PreSharedKey::from_bytes(bytes.first_chunk()?)?;
        let row = self.0.entry(peer).or_default();
        let place = match word {
            "agreed" => &mut row.agreed,
            "offered" => &mut row.offered,
            _ => return None,
        };
        let id = psk_id(key.expose());
        place.replace((id, key)).is_none().then_some(())
    }

    /// Writes it, synced; what was there is overwritten.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let mut text = Zeroizing::new(String::with_capacity(FIRST_LINE.len() + 2 * self.0.len() * LINE));
        text.push_str(FIRST_LINE);
        for (peer, row) in &self.0 {
            for (word, place) in [("agreed", &row.agreed), ("offered", &row.offered)] {
                let Some((_, key)) = place else { continue };
                let mut digits = Zeroizing::new([0; 44]);
                STANDARD
                    .encode_slice(key.expose(), digits.as_mut_slice())
                    .ok()
                    .context("a key has 32 bytes")?;
                text.push_str(&peer.to_string());
                text.push(' ');
                text.push_str(word);
                text.push(' ');
                text.extend(digits.iter().map(|digit| char::from(*digit)));
                text.push('\n');
            }
        }
        let before = OpenOptions::new().write(true).open(path).ok();
        write_private(path, text.as_bytes())?;
        if let Some(before) = before {
            overwrite(&before).with_context(|| format!("the former {} is still on disk", path.display()))?;
        }
        Ok(())
    }

    /// Whether it has no key.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names of what is there.
    pub(crate) fn records(&self) -> impl Iterator<Item = (PublicKey, Record)> {
        let id = |place: &Option<(PskId, PreSharedKey)>| place.as_ref().map(|(id, _)| *id);
        self.0.iter().map(move |(peer, row)| {
            let record = Record {
                agreed: id(&row.agreed),
                offered: id(&row.offered),
            };
            (*peer, record)
        })
    }

    /// The key of a peer by its name.
    pub(crate) fn key(&self, peer: &PublicKey, id: PskId) -> Option<&PreSharedKey> {
        let row = self.0.get(peer)?;
        let places = [&row.agreed, &row.offered];
        places
            .into_iter()
            .flatten()
            .find(|(known, _)| *known == id)
            .map(|(_, key)| key)
    }

    /// Makes a peer's keys those that the record names, each from here or from `computed`. `false` where one is in neither:
    /// then nothing changes.
    pub(crate) fn set(
        &mut self,
        peer: PublicKey,
        record: &Record,
        computed: &BTreeMap<PskId, PreSharedKey>,
    ) -> bool {
        let find = |id: PskId| {
            let key = self.key(&peer, id).or_else(|| computed.get(&id));
            key.map(|key| (id, key.clone()))
        };
        let row = Row {
            agreed: record.agreed.and_then(find),
            offered: record.offered.and_then(find),
        };
        let whole = row.agreed.is_some() == record.agreed.is_some()
            && row.offered.is_some() == record.offered.is_some();
        if whole {
            match *record == Record::default() {
                true => self.0.remove(&peer),
                false => self.0.insert(peer, row),
            };
        }
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn public(n: u8) -> PublicKey {
        PublicKey::from_bytes([n; 32]).unwrap()
    }

    fn key(n: u8) -> PreSharedKey {
        PreSharedKey::from_bytes(&[n; 32]).unwrap()
    }

    fn records(table: &Table) -> Vec<(PublicKey, Record)> {
        table.records().collect()
    }

    #[test]
    fn keys_survive_the_disk_and_are_overwritten_when_they_go() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gen1.psk");
        assert!(Table::read(&path).unwrap().is_none());
        let id = |n| psk_id(&[n; 32]);
        let computed = (1..=3).map(|n| (id(n), key(n))).collect();
        let record = |agreed: Option<u8>, offered: Option<u8>| Record {
            agreed: agreed.map(id),
            offered: offered.map(id),
        };
        let mut table = Table::default();
        assert!(table.set(public(7), &record(Some(1), None), &computed));
        assert!(table.set(public(8), &record(None, Some(2)), &computed));
        assert!(
            !table.set(public(8), &record(Some(9), None), &computed),
            "a key that nobody has"
        );
        table.write(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let mut again = Table::read(&path).unwrap().unwrap();
        assert_eq!(records(&again), records(&table));
        assert!(again.key(&public(7), id(1)) == Some(&key(1)) && again.key(&public(7), id(2)).is_none());
        // What was offered is agreed on, another one goes; a second name of the file shows what became of it.
        let beside = directory.path().join("beside");
        fs::hard_link(&path, &beside).unwrap();
        let none = BTreeMap::new();
        assert!(again.set(public(8), &record(Some(2), None), &none));
        assert!(again.set(public(7), &Record::default(), &none));
        again.write(&path).unwrap();
        assert!(fs::read(&beside).unwrap().iter().all(|byte| *byte == 0));
        let last = Table::read(&path).unwrap().unwrap();
        assert_eq!(records(&last), [(public(8), record(Some(2), None))]);
    }

    #[test]
    fn a_damaged_file_is_an_error_that_does_not_show_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gen1.psk");
        let mut table = Table::default();
        let computed = [(psk_id(&[1; 32]), key(1))].into();
        let record = Record {
            agreed: Some(psk_id(&[1; 32])),
            offered: None,
        };
        table.set(public(7), &record, &computed);
        table.write(&path).unwrap();
        let good = fs::read_to_string(&path).unwrap();
        let secret = STANDARD.encode([1; 32]);
        assert!(good.contains(&secret));
        for bad in [
            String::new(),
            good.replace("warren-psk 1", "warren-psk 2"),
            good.replace("agreed", "agree"),
            good.replace(&secret, "AAAA"),
            good.replace(&secret, &STANDARD.encode([0; 32])),
            good.replace(&secret, &format!("{secret} x")),
            format!("{good}{}", &good[FIRST_LINE.len()..]),
            good[..good.len() - 9].to_owned(),
        ] {
            fs::write(&path, &bad).unwrap();
            let error = format!("{:#}", Table::read(&path).unwrap_err());
            assert!(
                error.contains("gen1.psk") && !error.contains(&secret[..8]),
                "{error}"
            );
        }
    }
}
