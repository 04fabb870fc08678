//! Running the system's own tools.

use std::{io, process::Stdio};

use tokio::{io::AsyncWriteExt as _, process::Command};

use crate::Error;

/// Runs a tool with `input` on its standard input and returns what it wrote to its standard output.
pub(crate) async fn run(tool: &str, arguments: &[&str], input: Option<&str>) -> Result<String, Error> {
    let failed = |source: io::Error| Error::NoTool {
        tool: tool.to_owned(),
        source,
    };
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(if input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let stdin = child.stdin.take();
    let write = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // A tool that ends early says why in its exit status.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let ((), output) = tokio::join!(write, child.wait_with_output());
    let output = output.map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let message = said
        .split('\n')
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("; ");
    let message = if message.is_empty() {
        output.status.to_string()
    } else {
        message
    };
    Err(Error::Tool {
        tool: format!("{tool} {}", arguments.join(" ")),
        message,
    })
}

/// Whether the tool can be found on the search path.
pub(crate) fn exists(tool: &str) -> bool {
    let Some(path) = std::env::var_os("PATH") else {
        return false;
    };
    std::env::split_paths(&path).any(|directory| directory.join(tool).is_file())
}
