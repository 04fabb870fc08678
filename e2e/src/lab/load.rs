//! Much traffic from a pod.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{ChildStdout, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::{Pod, process::Process};
use crate::{
    app::load::{LoadReport, Share},
    inside::READY,
};

/// A pod's running traffic.
#[derive(Debug)]
pub struct Load {
    process: Process,
    output: BufReader<ChildStdout>,
}

impl Load {
    /// Starts it; [`Load::wait_ready`] says when it flows.
    pub fn start(from: &Pod, flows: &[Share], tcp: &[Share]) -> Result<Self> {
        let place = from.place();
        let app = place.app.to_string_lossy();
        let list = |shares: &[Share]| shares.iter().map(Share::to_string).collect::<Vec<_>>().join(",");
        let (flows, tcp) = (list(flows), list(tcp));
        let mut command = vec![&app as &str, "load"];
        for (option, shares) in [("--flow", &flows), ("--tcp", &tcp)] {
            if !shares.is_empty() {
                command.extend([option, shares]);
            }
        }
        let log = from.log("load");
        let errors = std::fs::File::options().create(true).append(true).open(&log)?;
        let mut child = place
            .command(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .context("cannot start the load")?;
        let output = BufReader::new(child.stdout.take().context("no pipe")?);
        Ok(Self {
            process: Process::adopt(child, &format!("load from {}", from.name()), &log),
            output,
        })
    }

    /// Waits until every conversation has had an answer and packets flow.
    pub fn wait_ready(&mut self) -> Result<()> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(
            line.trim() == READY,
            "{} did not start: {}",
            self.process.name,
            self.process.tail()
        );
        Ok(())
    }

    /// Stops it; the report may take a while.
    pub fn stop(&mut self) {
        drop(self.process.stdin());
    }

    /// Stops it; what became of it.
    pub fn finish(mut self) -> Result<LoadReport> {
        self.stop();
        let mut text = String::new();
        self.output.read_to_string(&mut text)?;
        self.process.finish()?;
        serde_json::from_str(&text).context("the load's report cannot be read")
    }
}
