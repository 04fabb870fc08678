//! Who reaches whom: questions from several places at once, each with what must become of it.

use std::thread;

use anyhow::{Context as _, Result, ensure};

use super::{
    Pod,
    process::{Place, Process},
    wait::{patient, wait_for},
};
use crate::app::{
    ask::Protocol,
    hammer::Hammered,
    probe::{Outcome, Probed, Target},
};

/// A question and what must become of it.
#[derive(Debug, Clone)]
pub struct Check {
    /// From where.
    pub from: Place,
    /// What is asked.
    pub target: Target,
    /// For people: what is asked.
    pub what: String,
    /// Name of the one who must answer; `None` = it must meet silence.
    pub expected: Option<String>,
}

impl Check {
    /// `name` must answer.
    pub fn allowed(from: &Place, target: Target, name: &str) -> Self {
        Self {
            from: from.clone(),
            target,
            what: format!("{name} {target}"),
            expected: Some(name.into()),
        }
    }

    /// Nobody may answer.
    pub fn denied(from: &Place, target: Target, name: &str) -> Self {
        Self {
            expected: None,
            ..Self::allowed(from, target, name)
        }
    }
}

/// A check and what became of it.
#[derive(Debug, Clone)]
pub struct Checked {
    /// The check.
    pub check: Check,
    /// What became of it.
    pub outcome: Outcome,
}

impl Checked {
    /// It is as it must be.
    pub fn good(&self) -> bool {
        match (&self.check.expected, &self.outcome) {
            (None, Outcome::Silent) => true,
            // An echo carries no name.
            (Some(name), Outcome::Answered(by)) => by == name || matches!(self.check.target, Target::Icmp(_)),
            _ => false,
        }
    }
}

/// Makes all checks, those of one place in one go and the places at the same time.
pub fn check(checks: &[Check]) -> Result<Vec<Checked>> {
    let mut places: Vec<(&Place, Vec<&Check>)> = Vec::new();
    for check in checks {
        match places.iter_mut().find(|(place, _)| place.pid == check.from.pid) {
            Some((_, list)) => list.push(check),
            None => places.push((&check.from, vec![check])),
        }
    }
    thread::scope(|scope| {
        let threads: Vec<_> = places
            .iter()
            .map(|(place, checks)| scope.spawn(move || check_from(place, checks)))
            .collect();
        let mut done = Vec::new();
        for thread in threads {
            done.extend(thread.join().map_err(|_| anyhow::anyhow!("a check panicked"))??);
        }
        Ok(done)
    })
}

fn check_from(place: &Place, checks: &[&Check]) -> Result<Vec<Checked>> {
    let list = |wanted: bool| {
        let targets = checks.iter().filter(|check| check.expected.is_some() == wanted);
        targets
            .map(|check| check.target.to_string())
            .collect::<Vec<_>>()
            .join(",")
    };
    let app = place.app.to_string_lossy();
    let timeout = patient(std::time::Duration::from_secs(5)).as_millis().to_string();
    let (allow, deny) = (list(true), list(false));
    let mut command = vec![&app as &str, "probe", "--timeout", &timeout];
    for (option, targets) in [("--allow", &allow), ("--deny", &deny)] {
        if !targets.is_empty() {
            command.extend([option, targets]);
        }
    }
    let text = place.run(command)?;
    let probed: Vec<Probed> = serde_json::from_str(&text).context("the probe's report cannot be read")?;
    let ordered = checks
        .iter()
        .filter(|check| check.expected.is_some())
        .chain(checks.iter().filter(|check| check.expected.is_none()));
    Ok(ordered
        .zip(probed)
        .map(|(check, probed)| Checked {
            check: (*check).clone(),
            outcome: probed.outcome,
        })
        .collect())
}

/// Makes all checks; each must be as expected.
pub fn all_as_expected(checks: &[Check]) -> Result<()> {
    let checked = check(checks)?;
    let faults: Vec<_> = checked
        .iter()
        .filter(|checked| !checked.good())
        .map(|checked| {
            let expected = match &checked.check.expected {
                Some(name) => format!("an answer by {name}"),
                None => "silence".into(),
            };
            let Check { from, what, .. } = &checked.check;
            format!(
                "{} -> {what}: {} instead of {expected}",
                from.name, checked.outcome
            )
        })
        .collect();
    ensure!(
        faults.is_empty(),
        "{} of {} checks failed:\n  {}",
        faults.len(),
        checked.len(),
        faults.join("\n  ")
    );
    Ok(())
}

/// A long conversation whose progress is watched.
#[derive(Debug)]
pub struct Session {
    process: Process,
    progress: std::sync::Arc<std::sync::Mutex<Progress>>,
}

#[derive(Debug)]
struct Progress {
    answers: u64,
    last: std::time::Instant,
}

/// A conversation without an answer for this long has stalled: many times its interval.
const STALLED: std::time::Duration = std::time::Duration::from_millis(600);
/// How long to wait for it to stall, or to go on. TCP doubles the time between its attempts.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(20);

impl Session {
    /// Starts one.
    pub fn start(from: &Pod, protocol: Protocol, to: std::net::SocketAddr) -> Result<Self> {
        use std::io::BufRead as _;
        let (place, to) = (from.place(), to.to_string());
        let app = place.app.to_string_lossy();
        let protocol = match protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Http => "http",
        };
        let log = from.log("session");
        let errors = std::fs::File::options().create(true).append(true).open(&log)?;
        let mut child = place
            .command([&app as &str, "session", "--protocol", protocol, "--to", &to])
            .stdout(std::process::Stdio::piped())
            .stderr(errors)
            .spawn()
            .context("cannot start a session")?;
        let lines = std::io::BufReader::new(child.stdout.take().context("no pipe")?).lines();
        let progress = std::sync::Arc::new(std::sync::Mutex::new(Progress {
            answers: 0,
            last: std::time::Instant::now(),
        }));
        let shared = std::sync::Arc::clone(&progress);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut progress = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                progress.answers = line.parse().unwrap_or(progress.answers);
                progress.last = std::time::Instant::now();
            }
        });
        let mut session = Self {
            process: Process::adopt(child, &format!("session from {} to {to}", place.name), &log),
            progress,
        };
        session.wait_progress()?;
        Ok(session)
    }

    fn look(&self) -> (u64, std::time::Duration) {
        let progress = self
            .progress
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        (progress.answers, progress.last.elapsed())
    }

    /// Waits until more answers have come.
    pub fn wait_progress(&mut self) -> Result<()> {
        let (before, _) = self.look();
        wait_for(LIMIT, &format!("{} goes on", self.process.name), || {
            self.look().0 > before + 3
        })
        .with_context(|| format!("running: {}; {}", self.process.running(), self.process.tail()))
    }

    /// Waits until no answers come any more. It must not have been broken off: it would go on if it were let.
    pub fn wait_stalled(&mut self) -> Result<()> {
        wait_for(LIMIT, &format!("{} stalls", self.process.name), || {
            self.look().1 > STALLED
        })?;
        ensure!(
            self.process.running(),
            "{} was broken off instead of meeting silence: {}",
            self.process.name,
            self.process.tail()
        );
        Ok(())
    }
}

/// A client that hammers addresses.
#[derive(Debug)]
pub struct Hammer {
    process: Process,
    output: std::io::BufReader<std::process::ChildStdout>,
}

impl Hammer {
    /// Starts it; returns when every address has been sent to.
    pub fn start(from: &Pod, to: &[std::net::SocketAddr]) -> Result<Self> {
        Self::start_in(&from.place(), &from.log("hammer"), 500, to)
    }

    /// The same from any place, with so many datagrams per second and address.
    pub fn start_in(
        place: &Place,
        log: &std::path::Path,
        rate: u32,
        to: &[std::net::SocketAddr],
    ) -> Result<Self> {
        use std::io::BufRead as _;
        let (rate, log) = (rate.to_string(), log.to_path_buf());
        let to: Vec<_> = to.iter().map(ToString::to_string).collect();
        let app = place.app.to_string_lossy();
        let errors = std::fs::File::options().create(true).append(true).open(&log)?;
        let mut child = place
            .command([&app as &str, "hammer", "--rate", &rate, "--to", &to.join(",")])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(errors)
            .spawn()
            .context("cannot start the hammer")?;
        let mut output = std::io::BufReader::new(child.stdout.take().context("no pipe")?);
        let process = Process::adopt(child, &format!("hammer from {}", place.name), &log);
        let mut line = String::new();
        output.read_line(&mut line)?;
        ensure!(
            line.trim() == crate::inside::READY,
            "{} did not start: {}",
            process.name,
            process.tail()
        );
        Ok(Self { process, output })
    }

    /// Stops it; what came back.
    pub fn finish(mut self) -> Result<Vec<Hammered>> {
        use std::io::Read as _;
        drop(self.process.stdin());
        let mut text = String::new();
        self.output.read_to_string(&mut text)?;
        self.process.finish()?;
        serde_json::from_str(&text).context("the hammer's report cannot be read")
    }
}
