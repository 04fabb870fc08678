//! Medians, ratios and their spread.

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::{Value, json};

/// Which figure is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Better {
    More,
    Less,
}

/// One figure of one run.
#[derive(Debug, Clone)]
pub(super) struct Measured {
    name: &'static str,
    unit: &'static str,
    better: Better,
    value: f64,
    /// CPUs that were busy with something else.
    foreign: Option<f64>,
}

impl Measured {
    pub(super) fn new(name: &'static str, unit: &'static str, better: Better, value: f64) -> Self {
        Self {
            name,
            unit,
            better,
            value,
            foreign: None,
        }
    }

    pub(super) fn value(&self) -> f64 {
        self.value
    }

    /// With what else kept the machine busy meanwhile, in CPUs.
    pub(super) fn beside(self, foreign: f64) -> Self {
        Self {
            foreign: Some(foreign),
            ..self
        }
    }
}

/// All figures: by test, then by implementation (ours first), then by round.
pub(super) struct Report {
    rounds: usize,
    names: Vec<&'static str>,
    /// What the cipher alone could do.
    cipher: Value,
    /// In the order of the first round.
    order: Vec<&'static str>,
    tests: BTreeMap<&'static str, Vec<Vec<Measured>>>,
}

impl Report {
    pub(super) fn new(rounds: usize, names: Vec<&'static str>, cipher: Value) -> Self {
        Self {
            rounds,
            names,
            order: Vec::new(),
            cipher,
            tests: BTreeMap::new(),
        }
    }

    pub(super) fn add(&mut self, round: usize, place: usize, measured: Vec<Measured>) {
        for figure in measured {
            if !self.order.contains(&figure.name) {
                self.order.push(figure.name);
            }
            let count = self.names.len();
            let runs = self
                .tests
                .entry(figure.name)
                .or_insert_with(|| vec![Vec::new(); count]);
            debug_assert!(runs[place].len() <= round);
            runs[place].push(figure);
        }
    }

    /// `rounds`, and `tests.<name>.ours`, `tests.<name>.peers.<peer>.{value,ratio,min,max}`.
    pub(super) fn json(&self) -> Value {
        let mut tests = serde_json::Map::new();
        for (name, runs) in &self.tests {
            let first = &runs[0][0];
            let foreign: Vec<f64> = runs.iter().flatten().filter_map(|run| run.foreign).collect();
            // Some figures are of our engine alone.
            let peers: serde_json::Map<_, _> = (1..runs.len())
                .filter(|place| !runs[*place].is_empty())
                .map(|place| {
                    let (value, ratio) = (middle(&values(&runs[place])), ratios(&runs[0], &runs[place]));
                    let entry = json!({
                        "value": rounded(value),
                        "ratio": rounded(middle(&ratio)),
                        "min": rounded(ratio.iter().copied().fold(f64::INFINITY, f64::min)),
                        "max": rounded(ratio.iter().copied().fold(0.0, f64::max)),
                    });
                    (self.names[place].to_owned(), entry)
                })
                .collect();
            let mut entry = json!({
                "unit": first.unit,
                "better": if first.better == Better::More { "more" } else { "less" },
                "ours": rounded(middle(&values(&runs[0]))),
                "peers": peers,
            });
            if !foreign.is_empty() {
                entry["foreign_cpus"] = rounded(middle(&foreign)).into();
            }
            tests.insert((*name).to_owned(), entry);
        }
        json!({ "rounds": self.rounds, "cipher_alone": self.cipher, "tests": tests })
    }

    /// The same for people.
    pub(super) fn table(&self) -> String {
        let json = self.json();
        let mut out = format!("The ciphers alone, on one CPU, Gb/s: {}\n\n", self.cipher);
        let _ = write!(out, "{:<26}{:>14}", "test", "ours");
        for name in &self.names[1..] {
            let _ = write!(out, "  {name:>14}  {:>18}", "ratio [min, max]");
        }
        out.push('\n');
        for name in &self.order {
            let test = &json["tests"][*name];
            let ours = format!("{} {}", test["ours"], test["unit"].as_str().unwrap_or_default());
            let _ = write!(out, "{name:<26}{ours:>14}");
            for peer in &self.names[1..] {
                let peer = &test["peers"][*peer];
                if peer.is_null() {
                    let _ = write!(out, "  {:>14}  {:>18}", "-", "");
                    continue;
                }
                let ratio = format!("{} [{}, {}]", peer["ratio"], peer["min"], peer["max"]);
                let _ = write!(out, "  {:>14}  {ratio:>18}", peer["value"].to_string());
            }
            if let Some(foreign) = test.get("foreign_cpus") {
                let _ = write!(out, "   (other work: {foreign} CPUs)");
            }
            out.push('\n');
        }
        out
    }
}

fn values(runs: &[Measured]) -> Vec<f64> {
    runs.iter().map(|run| run.value).collect()
}

/// Ours to theirs, round by round.
fn ratios(ours: &[Measured], theirs: &[Measured]) -> Vec<f64> {
    let pairs = ours.iter().zip(theirs);
    pairs
        .map(|(ours, theirs)| ours.value / theirs.value.max(1e-9))
        .collect()
}

fn middle(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 1 => sorted[count / 2],
        count => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
    }
}

/// Three significant digits are more than the measurement is worth.
fn rounded(value: f64) -> f64 {
    let scale = 10f64.powi(2 - value.abs().max(1e-9).log10().floor() as i32);
    (value * scale).round() / scale
}
