//! Looking for secrets where they must not be: memory of processes, files, devices, text.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::{fs::FileExt as _, net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use aho_corasick::AhoCorasick;
use anyhow::{Context as _, Result, bail, ensure};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE},
};
use warren_model::keys::KEY_SLOTS;

use super::{Node, process::find};

/// A secret of 32 bytes, or a shorter one as it is written.
#[derive(Clone)]
pub struct Secret {
    /// For messages.
    pub name: String,
    forms: Vec<(&'static str, Vec<u8>)>,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret({})", self.name)
    }
}

fn hex(bytes: &[u8]) -> Vec<u8> {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .map(|digit| b"0123456789abcdef"[usize::from(digit)])
        .collect()
}

impl Secret {
    /// A key. Either half is enough to be found: the other may be overwritten in part. The outermost bytes are left out,
    /// as a private key may be clamped. Also found: the bytes the other way round, and base64 of something that holds them.
    pub fn key(name: &str, bytes: [u8; 32]) -> Self {
        let mut reversed = bytes;
        reversed.reverse();
        let mut forms = Vec::new();
        for half in [&bytes[1..16], &bytes[16..31], &reversed[1..16], &reversed[16..31]] {
            let decimal: Vec<_> = half.iter().map(u8::to_string).collect();
            let hexadecimal = hex(half);
            forms.push(("bytes", half.to_vec()));
            forms.push(("hex in capitals", hexadecimal.to_ascii_uppercase()));
            forms.push(("hex", hexadecimal));
            forms.push(("a list of numbers", decimal.join(", ").into_bytes()));
            for shift in 0..3 {
                // Where the text begins decides which bits a character has; those at the ends have others' bits as well.
                let padded = [&[0; 2][..shift], half].concat();
                let inner = |text: String| text.into_bytes()[4..16].to_vec();
                forms.push(("base64", inner(STANDARD.encode(&padded))));
                forms.push(("base64url", inner(URL_SAFE.encode(&padded))));
            }
        }
        // Not twice, where no character differs.
        forms.sort();
        forms.dedup_by(|a, b| a.1 == b.1);
        Self {
            name: name.into(),
            forms,
        }
    }

    /// The private half in a key file in PKCS #8 (RFC 5958), PEM or DER: an OCTET STRING of 32 bytes for the curves in use.
    pub fn pkcs8(name: &str, file: &[u8]) -> Result<Self> {
        let text = String::from_utf8_lossy(file);
        let der = match text.starts_with("-----BEGIN") {
            true => {
                let lines = text.lines().filter(|line| !line.starts_with("-----"));
                STANDARD
                    .decode(lines.collect::<String>())
                    .context("a PEM file that is none")?
            }
            false => file.to_vec(),
        };
        let at = der.windows(2).position(|pair| pair == [4, 32]);
        let at = at.with_context(|| format!("{name} is not a key that this looks for"))?;
        let bytes = der.get(at + 2..at + 34).and_then(|bytes| bytes.try_into().ok());
        Ok(Self::key(name, bytes.context("a key that ends early")?))
    }

    /// The seed in keyd's `snapshot-signing.key`.
    pub fn signing_key(name: &str, file: &[u8]) -> Result<Self> {
        let file: serde_json::Value =
            serde_json::from_slice(file).with_context(|| format!("{name} is no JSON"))?;
        let seed = file["seed"]
            .as_str()
            .with_context(|| format!("{name} has no seed"))?;
        let bytes = STANDARD.decode(seed).ok().and_then(|seed| seed.try_into().ok());
        Ok(Self::key(
            name,
            bytes.with_context(|| format!("{name} has no seed of 32 bytes"))?,
        ))
    }

    /// Each form that is looked for, by its name.
    pub fn written(&self) -> impl Iterator<Item = (&'static str, &[u8])> {
        self.forms.iter().map(|(form, bytes)| (*form, bytes.as_slice()))
    }

    /// A token: text.
    pub fn text(name: &str, text: &str) -> Self {
        Self {
            name: name.into(),
            forms: vec![("text", text.as_bytes().to_vec())],
        }
    }
}

/// Finds any of many secrets in one pass.
#[derive(Debug)]
pub struct Finder {
    secrets: Vec<Secret>,
    /// Looks for all forms.
    search: AhoCorasick,
    /// The secret and the form of each pattern of it.
    patterns: Vec<(usize, &'static str)>,
}

impl Finder {
    /// For these secrets.
    pub fn new(secrets: impl IntoIterator<Item = Secret>) -> Self {
        let secrets: Vec<Secret> = secrets.into_iter().collect();
        let (mut patterns, mut texts) = (Vec::new(), Vec::new());
        for (number, secret) in secrets.iter().enumerate() {
            for (form, bytes) in &secret.forms {
                patterns.push((number, *form));
                texts.push(bytes.as_slice());
            }
        }
        let search = AhoCorasick::new(texts).expect("secrets are short and few");
        Self {
            secrets,
            search,
            patterns,
        }
    }

    /// Proof that it finds: every secret in every form is put into a log of this folder, must be found there, and is taken away.
    pub fn power_check(&self, folder: &Path) -> Result<()> {
        let log = folder.join("canary.log");
        let mut lines = Vec::new();
        for (_, bytes) in self.secrets.iter().flat_map(Secret::written) {
            lines.extend([b"2026 TRACE key=", bytes, b"\n"].concat());
        }
        fs::write(&log, lines)?;
        let found = self.in_files(folder, &|_| false);
        fs::remove_file(&log)?;
        let found = found?;
        for secret in &self.secrets {
            for (form, _) in secret.written() {
                let line = format!("{} as {form} at", secret.name);
                ensure!(
                    found.iter().any(|found| found.starts_with(&line)),
                    "{line}: not found in a log"
                );
            }
        }
        Ok(())
    }

    /// What is in `bytes`: a line each.
    pub fn find(&self, bytes: &[u8]) -> Vec<String> {
        let line = |found: aho_corasick::Match| {
            let (secret, form) = self.patterns[found.pattern().as_usize()];
            let (name, at) = (&self.secrets[secret].name, found.start());
            format!("{name} as {form} at {at:#x}")
        };
        self.search.find_overlapping_iter(bytes).map(line).collect()
    }

    /// What is in the memory of a process that can be written: the rest is files.
    pub fn in_process(&self, pid: u32) -> Result<Vec<String>> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))
            .with_context(|| format!("process {pid} is gone"))?;
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        let mut found = Vec::new();
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let (Some(range), Some(rights)) = (words.next(), words.next()) else {
                continue;
            };
            let ends = range.split_once('-').and_then(|(start, end)| {
                Some((
                    u64::from_str_radix(start, 16).ok()?,
                    u64::from_str_radix(end, 16).ok()?,
                ))
            });
            let Some((start, end)) = ends.filter(|_| rights.starts_with("rw")) else {
                continue;
            };
            let mut content = vec![0; usize::try_from(end - start)?];
            // Some ranges (vvar and the like, memory of a device) cannot be read.
            if memory.read_exact_at(&mut content, start).is_ok() {
                let here = self.find(&content);
                found.extend(here.into_iter().map(|what| format!("{what} of {line}")));
            }
            // A key that was found there is not to lie about here.
            content.fill(0);
        }
        Ok(found)
    }

    /// What is in the files of a folder and the folders in it, less those that `skip` names.
    pub fn in_files(&self, folder: &Path, skip: &dyn Fn(&Path) -> bool) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for path in files(folder)? {
            if skip(&path) {
                continue;
            }
            // A file may go while we look.
            let Ok(content) = fs::read(&path) else { continue };
            let here = self.find(&content);
            found.extend(
                here.into_iter()
                    .map(|what| format!("{what} of {}", path.display())),
            );
        }
        Ok(found)
    }
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            all.extend(files(&entry.path())?);
        } else if kind.is_file() {
            all.push(entry.path());
        }
    }
    Ok(all)
}

/// A pre-shared key on a node's disk.
#[derive(Debug, Clone)]
pub struct PreShared {
    /// The generation of the node's own key.
    pub generation: u64,
    /// The peer's public key, hexadecimal.
    pub peer: String,
    /// The key.
    pub secret: Secret,
}

impl Node {
    /// The pre-shared keys on this node's disk.
    pub fn pre_shared_keys(&self) -> Result<Vec<PreShared>> {
        let mut keys = Vec::new();
        for (generation, _) in self.private_keys()? {
            // One that was made without has none.
            let Ok(text) = fs::read_to_string(self.key_folder().join(format!("gen{generation}.psk"))) else {
                continue;
            };
            for line in text.lines().skip(1) {
                let words: Vec<_> = line.split(' ').collect();
                let [peer, "agreed" | "offered", key] = words[..] else {
                    bail!(
                        "{}: a pre-shared key of generation {generation} is no line",
                        self.name
                    );
                };
                let bytes = STANDARD.decode(key).ok().and_then(|bytes| bytes.try_into().ok());
                let bytes = bytes.context("a pre-shared key that is none")?;
                let name = format!(
                    "{}'s pre-shared key of generation {generation} with {peer}",
                    self.name
                );
                keys.push(PreShared {
                    generation,
                    peer: String::from_utf8_lossy(&hex(&STANDARD.decode(peer)?)).into_owned(),
                    secret: Secret::key(&name, bytes),
                });
            }
        }
        Ok(keys)
    }

    /// The private keys on this node's disk, by generation.
    pub fn private_keys(&self) -> Result<Vec<(u64, Secret)>> {
        let mut keys = Vec::new();
        for path in files(&self.key_folder())? {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            let generation = name.as_deref().and_then(|name| {
                let number = name.strip_prefix("gen")?.strip_suffix(".key")?;
                number.parse::<u64>().ok()
            });
            let Some(generation) = generation else { continue };
            let text = fs::read_to_string(&path)?;
            let bytes = STANDARD
                .decode(text.trim())
                .ok()
                .and_then(|bytes| bytes.try_into().ok());
            let bytes = bytes.with_context(|| format!("{} holds no key", path.display()))?;
            let name = format!("{}'s private key of generation {generation}", self.name);
            keys.push((generation, Secret::key(&name, bytes)));
        }
        keys.sort_by_key(|(generation, _)| *generation);
        Ok(keys)
    }

    /// Where the agent keeps its private keys.
    pub fn key_folder(&self) -> PathBuf {
        self.dir().join("state/agent/keys")
    }

    /// The agent and the tunnel, by their ids on the machine.
    pub fn key_holders(&self) -> Result<Vec<u32>> {
        let init = self.try_place()?.pid;
        let mut pids = find(init, &["mesh-agent", "run"])?;
        ensure!(!pids.is_empty(), "no agent runs on {}", self.name);
        pids.extend(find(init, &["mesh-agent", "tunnel"])?);
        Ok(pids)
    }

    /// Everything that the devices say of themselves, private keys and peers, keys in hexadecimal: from the tunnel's
    /// configuration sockets, or from the kernel.
    pub fn device_dump(&self) -> Result<String> {
        let init = self.try_place()?.pid;
        let socket = |slot: u8| format!("/proc/{init}/root/run/wireguard/warren{slot}.sock");
        if !Path::new(&socket(0)).exists() {
            let dump = self.run(["wg", "show", "all", "dump"])?;
            let words = dump.split_whitespace().map(|word| match STANDARD.decode(word) {
                Ok(key) if key.len() == 32 => String::from_utf8_lossy(&hex(&key)).into_owned(),
                _ => word.to_owned(),
            });
            return Ok(words.collect::<Vec<_>>().join("\n"));
        }
        let mut dump = String::new();
        // A slot that no pair has needed yet has no device.
        for slot in (0..KEY_SLOTS).filter(|slot| Path::new(&socket(*slot)).exists()) {
            dump += &ask_device(&socket(slot))
                .with_context(|| format!("{}: warren{slot} does not answer", self.name))?;
        }
        Ok(dump)
    }
}

/// `get` of the cross-platform configuration protocol.
fn ask_device(path: &str) -> std::io::Result<String> {
    let mut socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(Duration::from_secs(10)))?;
    socket.write_all(b"get=1\n\n")?;
    let (mut text, mut chunk) = (Vec::new(), [0; 4096]);
    while !text.ends_with(b"\n\n") {
        match socket.read(&mut chunk)? {
            0 => break,
            length => text.extend_from_slice(&chunk[..length]),
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_found_anywhere_and_nothing_else() {
        let bytes: [u8; 32] = std::array::from_fn(|at| (at * 37 + 11) as u8);
        let finder = Finder::new([
            Secret::key("key", bytes),
            Secret::text("token", "warren1.node.secret"),
        ]);
        let mut reversed = bytes;
        reversed.reverse();
        let mut clamped = bytes;
        (clamped[0], clamped[31]) = (bytes[0] & 248, bytes[31] & 127 | 64);
        for form in [bytes, reversed, clamped] {
            let inside = [b"a".as_slice(), &form, b"b"].concat();
            let texts = [
                form.to_vec(),
                hex(&form),
                hex(&form).to_ascii_uppercase(),
                STANDARD.encode(form).into_bytes(),
                URL_SAFE.encode(form).into_bytes(),
                STANDARD.encode(&inside).into_bytes(),
                STANDARD.encode([b"x", inside.as_slice()].concat()).into_bytes(),
                format!("{form:?}").into_bytes(),
            ];
            for text in texts {
                let around = [b"xy".as_slice(), &text, b"z"].concat();
                assert!(
                    finder.find(&around).len() >= 2,
                    "{}",
                    String::from_utf8_lossy(&text)
                );
            }
        }
        assert_eq!(finder.find(b"a warren1.node.secret").len(), 1);
        let mut other = bytes;
        (other[8], other[20]) = (0, 0);
        assert!(finder.find(&other).is_empty());
        assert!(finder.find(b"").is_empty());
    }
}
