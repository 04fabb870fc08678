//! How full the maps are.

use aya::Pod;

use crate::{
    Datapath, Error, Usage,
    maps::{Prefixes, Table, Trie},
};

impl Datapath {
    /// How full every map of limited size is. What only this process writes is counted again only after a change; the
    /// others are counted now, some milliseconds for a hundred thousand entries.
    pub fn usage(&self) -> Result<Vec<Usage>, Error> {
        let maps = &self.maps;
        let mut found = vec![
            table(&maps.devices)?,
            table(&maps.endpoints)?,
            table(&maps.identities)?,
            table(&maps.paths)?,
            table(&maps.nodes)?,
            table(&maps.policy.endpoints)?,
            trie(&maps.policy.ports)?,
            table(&maps.policy.verdicts)?,
            trie(&maps.policy.cidrs.v4)?,
            trie(&maps.policy.cidrs.v6)?,
            written_by_programs(&maps.flows.established)?,
            written_by_programs(&maps.flows.new)?,
            written_by_programs(&maps.flows.fragments)?,
        ];
        found.extend(prefixes(&maps.owners)?);
        found.extend(prefixes(&maps.pools)?);
        Ok(found)
    }
}

fn table<K: Pod, V: Copy>(table: &Table<K, V>) -> Result<Usage, Error> {
    Ok(Usage {
        map: table.name,
        entries: table.count()?,
        limit: table.limit,
    })
}

fn written_by_programs<K: Pod, V: Copy>(table: &Table<K, V>) -> Result<Usage, Error> {
    Ok(Usage {
        map: table.name,
        entries: table.count_now()?,
        limit: table.limit,
    })
}

fn trie<K: Pod, V: Copy>(trie: &Trie<K, V>) -> Result<Usage, Error> {
    Ok(Usage {
        map: trie.name,
        entries: trie.count()?,
        limit: trie.limit,
    })
}

fn prefixes<V: Copy>(prefixes: &Prefixes<V>) -> Result<[Usage; 2], Error> {
    Ok([trie(&prefixes.v4)?, trie(&prefixes.v6)?])
}
