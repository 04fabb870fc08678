//! Test programs: built by cargo at once, then run a few at a time, the longest first. Most of their time they wait; only a
//! cluster of the Kubernetes lab is so large that it has no other beside it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::Count;
use crate::{
    command::{cargo, output, run as execute},
    image, paths,
};

/// How often it says what it is waiting for.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a test program needs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing but this machine.
    Unit,
    /// The stand-alone lab.
    Lab,
    /// The Kubernetes lab.
    Kubernetes,
}

/// A test program that cargo has built.
struct Program {
    kind: Kind,
    name: String,
    path: PathBuf,
    arguments: &'static [&'static str],
    /// Its package's folder, in which cargo would run it.
    directory: PathBuf,
}

/// What came of a program.
struct Outcome {
    kind: Kind,
    name: String,
    count: Count,
    time: Duration,
    complaints: Vec<String>,
}

/// Counts and the sum of the times of each kind.
pub(super) type Sums = Vec<(Kind, Count, Duration)>;

/// Builds all test programs and runs those of the kinds, `at_once` at the same time.
pub(super) fn run(kinds: &[Kind], at_once: usize) -> Result<Sums> {
    let mut programs = build()?;
    programs.retain(|program| kinds.contains(&program.kind));
    if kinds.iter().any(|kind| *kind != Kind::Unit) {
        // The labs start our programs as processes.
        execute(cargo().args(["build", "--workspace"]))?;
    }
    if kinds.contains(&Kind::Kubernetes) {
        image::build(&[], image::Profile::Dev)?;
    }
    let mut times = Times::load();
    programs.sort_by_key(|program| std::cmp::Reverse(times.of(program)));
    let outcomes = run_all(programs, at_once);
    for outcome in outcomes.iter().filter(|outcome| outcome.count.failed == 0) {
        times.seconds.insert(outcome.name.clone(), outcome.time.as_secs());
    }
    times.save();
    let slowest = outcomes.iter().map(|outcome| (outcome.time, &outcome.name));
    let mut slowest: Vec<_> = slowest.collect();
    slowest.sort_unstable_by(|a, b| b.cmp(a));
    println!("\nthe longest test programs:");
    for (time, name) in slowest.iter().take(8) {
        println!("{:>5} s  {name}", time.as_secs());
    }
    for outcome in &outcomes {
        for complaint in &outcome.complaints {
            println!("FAILED {}: {complaint}", outcome.name);
        }
    }
    Ok(kinds
        .iter()
        .map(|kind| {
            let of_kind = outcomes.iter().filter(|outcome| outcome.kind == *kind);
            let nothing = (*kind, Count::default(), Duration::ZERO);
            of_kind.fold(nothing, |(kind, count, time), outcome| {
                (kind, count + outcome.count, time + outcome.time)
            })
        })
        .collect())
}

/// Every library, program and test file. The whole workspace is selected: another selection of packages would mean
/// other features, and the dependencies once more.
fn build() -> Result<Vec<Program>> {
    let messages = output(
        cargo()
            .args(["test", "--workspace", "--no-run", "--lib", "--bins", "--tests"])
            .args(["--message-format", "json-render-diagnostics"])
            .stderr(Stdio::inherit()),
    )?;
    let programs: Vec<_> = messages
        .lines()
        .filter_map(program)
        .flat_map(Program::parts)
        .collect();
    if programs.is_empty() {
        bail!("cargo built not a single test program");
    }
    Ok(programs)
}

/// The test program that a message of cargo's is about.
fn program(message: &str) -> Option<Program> {
    let message: Value = serde_json::from_str(message).ok()?;
    let path = PathBuf::from(message["executable"].as_str()?);
    if message["profile"]["test"] != Value::Bool(true) {
        return None;
    }
    let directory = Path::new(message["manifest_path"].as_str()?).parent()?.to_owned();
    let target = &message["target"];
    let (name, kind) = (target["name"].as_str()?, target["kind"][0].as_str()?);
    let in_labs = kind == "test" && directory == paths::root().join("e2e");
    let place = crate::command::relative(&directory);
    Some(Program {
        kind: match (in_labs, name) {
            (false, _) => Kind::Unit,
            (true, "kubernetes") => Kind::Kubernetes,
            (true, _) => Kind::Lab,
        },
        name: match kind {
            "test" => format!("{place}/tests/{name}"),
            "bin" => format!("{place} ({name})"),
            _ => place,
        },
        path,
        arguments: match (directory.ends_with("mesh-agent/wireguard"), name) {
            // Nearly all of their time they wait for each other.
            (true, "engine") => &["--test-threads", "6"],
            _ => &[],
        },
        directory,
    })
}

fn run_all(programs: Vec<Program>, at_once: usize) -> Vec<Outcome> {
    let total = programs.len();
    let queue = Mutex::new(Queue {
        waiting: programs,
        cluster_runs: false,
    });
    let done = Mutex::new(Vec::with_capacity(total));
    let worker = || loop {
        // Where only clusters are left, whoever runs one goes on with the next.
        let next = locked(&queue).next();
        let Some(program) = next else { return };
        let outcome = program.run();
        locked(&queue).ended(program.kind);
        locked(&done).push(outcome);
    };
    thread::scope(|scope| {
        for _ in 0..at_once.max(1) {
            scope.spawn(worker);
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Programs that have not been started.
struct Queue {
    waiting: Vec<Program>,
    cluster_runs: bool,
}

impl Queue {
    /// The first that may run beside those that do.
    fn next(&mut self) -> Option<Program> {
        let may_run = |program: &Program| program.kind != Kind::Kubernetes || !self.cluster_runs;
        let at = self.waiting.iter().position(may_run)?;
        let program = self.waiting.remove(at);
        self.cluster_runs |= program.kind == Kind::Kubernetes;
        Some(program)
    }

    fn ended(&mut self, kind: Kind) {
        self.cluster_runs &= kind != Kind::Kubernetes;
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Program {
    /// The clusters of the Kubernetes lab, each with scenarios of its own.
    fn parts(self) -> Vec<Self> {
        let parts: &[&[&str]] = match self.kind {
            Kind::Kubernetes => &[&["--part", "policy"], &["--part", "mesh"]],
            Kind::Unit | Kind::Lab => return vec![self],
        };
        let part = |arguments: &&'static [&'static str]| Self {
            name: format!("{} {}", self.name, arguments.join(" ")),
            path: self.path.clone(),
            directory: self.directory.clone(),
            kind: self.kind,
            arguments,
        };
        parts.iter().map(part).collect()
    }

    /// Runs it to its end, then shows what it printed, all at once, and counts.
    fn run(&self) -> Outcome {
        let start = Instant::now();
        let (count, text) = self.printed().unwrap_or_else(|error| {
            let failed = Count { passed: 0, failed: 1 };
            (failed, format!("Error: {error:#}\n"))
        });
        let time = start.elapsed();
        println!("\n     Running {} ({} s)\n{text}", self.name, time.as_secs());
        Outcome {
            kind: self.kind,
            name: self.name.clone(),
            count,
            time,
            complaints: if count.failed > 0 {
                complaints(&text)
            } else {
                Vec::new()
            },
        }
    }

    fn printed(&self) -> Result<(Count, String)> {
        let log = paths::target().join("tests");
        fs::create_dir_all(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let log = log.join(format!("{}.log", self.name.replace(['/', ' '], "-")));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        // Labs have limits of time, so what only computes lets them go first.
        let nice = if self.kind == Kind::Unit { "5" } else { "0" };
        // Where this run is ended, they end; what they have made goes with them.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "nice", "-n", nice])
            .arg(&self.path)
            .args(self.arguments)
            .current_dir(&self.directory)
            .env("CARGO_MANIFEST_DIR", &self.directory)
            // Where a panic came from is worth its lines; errors say themselves what happened.
            .env("RUST_LIB_BACKTRACE", "0")
            .stdin(Stdio::null())
            .stderr(file.try_clone()?)
            .stdout(file)
            .spawn()
            .with_context(|| format!("cannot start {}", self.path.display()))?;
        let mut told = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if told.elapsed() > PATIENCE {
                told = Instant::now();
                println!("     waiting for {}; it writes to {}", self.name, log.display());
            }
            thread::sleep(Duration::from_millis(50));
        };
        let text = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let mut count = text
            .lines()
            .filter_map(parse)
            .fold(Count::default(), std::ops::Add::add);
        if !status.success() && count.failed == 0 {
            // It died before it could count.
            count.failed = 1;
        }
        Ok((count, text))
    }
}

/// `test result: ok. 3 passed; 0 failed; 0 ignored; ...`; an ignored test is one that did not pass.
fn parse(line: &str) -> Option<Count> {
    let rest = line.trim().strip_prefix("test result: ")?;
    let number = |what: &str| -> Option<u64> {
        let before = rest.split(what).next()?;
        before.split_whitespace().next_back()?.parse().ok()
    };
    Some(Count {
        passed: number(" passed")?,
        failed: number(" failed")? + number(" ignored")?,
    })
}

/// What failed tests say, in short: a whole run's output is long, and this is what one looks for first.
fn complaints(text: &str) -> Vec<String> {
    let mut lines = text.lines().peekable();
    let (mut test, mut found) = (String::new(), Vec::new());
    while let Some(line) = lines.next() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let said = match words.as_slice() {
            ["----", name, "stdout", "----"] => {
                (*name).clone_into(&mut test);
                None
            }
            // A scenario of the Kubernetes lab: what it says follows.
            ["test", name, "...", "FAILED", _, "s)"] => {
                (*name).clone_into(&mut test);
                lines.peek().copied()
            }
            ["Error:", ..] => Some(line),
            _ if line.contains(" panicked at ") => lines.peek().copied(),
            _ => None,
        };
        if let Some(said) = said {
            found.push(format!("{test}: {}", said.trim()));
        }
    }
    found
}

/// How long programs took the last time they passed, seconds. Only decides on their order.
#[derive(Default)]
struct Times {
    seconds: BTreeMap<String, u64>,
}

impl Times {
    fn path() -> PathBuf {
        paths::target().join("tests/seconds.json")
    }

    fn load() -> Self {
        let text = fs::read_to_string(Self::path()).unwrap_or_default();
        let seconds = serde_json::from_str(&text).unwrap_or_default();
        Self { seconds }
    }

    /// One that has not run yet may take long, clusters longest and unit tests least.
    fn of(&self, program: &Program) -> u64 {
        let guess = match program.kind {
            Kind::Kubernetes => 600,
            Kind::Lab => 100,
            Kind::Unit => 30,
        };
        self.seconds.get(&program.name).copied().unwrap_or(guess)
    }

    fn save(&self) {
        let text = serde_json::to_string(&self.seconds).unwrap_or_default();
        if let Err(error) = fs::write(Self::path(), text) {
            eprintln!("cannot write {}: {error}", Self::path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Kind, Program, Queue, complaints, parse, paths, program};

    #[test]
    fn result_lines_are_counted() {
        let count = parse("test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out");
        assert_eq!(count.map(|count| (count.passed, count.failed)), Some((3, 3)));
        assert!(parse("test directory::works ... ok").is_none());
    }

    #[test]
    fn failed_tests_are_quoted() {
        let text = "test a ... FAILED\n\n---- a stdout ----\nError: lost 3\n\n---- m::b stdout ----\n\
                    thread 'm::b' (7) panicked at src/lib.rs:3:1:\nassertion failed\n\
                    test c ... FAILED (9.5 s)\n  the node is away\ntest d ... ok (1.0 s)\n";
        let expected = [
            "a: Error: lost 3",
            "m::b: assertion failed",
            "c: the node is away",
        ];
        assert_eq!(complaints(text), expected);
    }

    #[test]
    fn clusters_run_one_after_the_other() {
        let program = |name: &str, kind| Program {
            kind,
            name: name.to_owned(),
            path: paths::root(),
            arguments: &[],
            directory: paths::root(),
        };
        let mut queue = Queue {
            waiting: vec![
                program("a", Kind::Kubernetes),
                program("b", Kind::Kubernetes),
                program("c", Kind::Lab),
            ],
            cluster_runs: false,
        };
        let mut next = || queue.next().map(|program| program.name);
        assert_eq!(
            [next(), next(), next()],
            [Some("a".into()), Some("c".into()), None]
        );
        queue.ended(Kind::Lab);
        assert!(queue.next().is_none());
        queue.ended(Kind::Kubernetes);
        assert_eq!(queue.next().map(|program| program.name), Some("b".into()));
    }

    #[test]
    fn programs_are_told_apart() {
        let message = |package: &str, kind: &str, name: &str, test: bool| {
            let manifest = paths::root().join(package).join("Cargo.toml");
            json!({"executable": "/x", "manifest_path": manifest, "profile": {"test": test},
                "target": {"kind": [kind], "name": name}})
            .to_string()
        };
        let found = |package, kind, name| {
            let program = program(&message(package, kind, name, true)).unwrap();
            (program.kind, program.name)
        };
        assert!(found("e2e", "test", "kubernetes") == (Kind::Kubernetes, "e2e/tests/kubernetes".into()));
        assert!(found("e2e", "test", "lab") == (Kind::Lab, "e2e/tests/lab".into()));
        assert!(found("e2e", "lib", "warren_e2e") == (Kind::Unit, "e2e".into()));
        assert!(found("keyd", "bin", "keyd") == (Kind::Unit, "keyd (keyd)".into()));
        assert!(program(&message("keyd", "bin", "keyd", false)).is_none());
        assert!(program("{}").is_none() && program("Compiling").is_none());
    }
}
