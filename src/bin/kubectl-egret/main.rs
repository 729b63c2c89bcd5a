//! The command `kubectl egret`, also `egretctl`: arguments and wiring only.
//!
//! kubectl runs a program of this name for its subcommand `egret`. The same program under the name `egretctl` is for
//! hosts without Kubernetes.

mod arguments;
mod completion;

use anyhow::Context;
use arguments::{Arguments, Command, Common, Convert};
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};
use egret::cluster::{PodsOf, SourceName};
use egret::ctl::output::{self, Format, Show};
use egret::ctl::state::{self, State};
use egret::ctl::{convert, status};
use egret::telemetry::logs;
use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use tokio::runtime::Builder;
use tokio::time::sleep;

/// With `--watch`, results follow each other at this distance at least.
const PACE: Duration = Duration::from_millis(500);

/// How a command ended that could do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Exit code 0.
    Fine,
    /// It found what a script may want to act on: exit code 2.
    Found,
}

fn main() -> ExitCode {
    let all: Vec<OsString> = std::env::args_os().collect();
    let name = program(&all);
    let command = arguments::named(Arguments::command(), name);
    if let Some(words) = completion::asked(&all) {
        return completion::answer(command, &words);
    }
    let parsed = command.clone().try_get_matches_from(all).and_then(|matches| Arguments::from_arg_matches(&matches));
    let arguments = match parsed {
        Ok(arguments) => arguments,
        Err(e) => {
            let _ = e.print();
            let is_help = matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            // 2 is for what a command has found.
            return if is_help { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
    };
    match run(arguments, command) {
        Ok(Outcome::Fine) => ExitCode::SUCCESS,
        Ok(Outcome::Found) => ExitCode::from(2),
        Err(e) => {
            eprintln!("{name}: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// What the user called the program.
fn program(arguments: &[OsString]) -> &'static str {
    let called = arguments.first().and_then(|path| Path::new(path).file_name()).unwrap_or_default();
    if called == "egretctl" { "egretctl" } else { "kubectl egret" }
}

fn run(arguments: Arguments, command: clap::Command) -> anyhow::Result<Outcome> {
    logs::init(logs::Format::default(), &arguments.common.log_level)?;
    let runtime = Builder::new_current_thread().enable_all().build().context("cannot start the async runtime")?;
    runtime.block_on(async {
        let common = &arguments.common;
        match arguments.command {
            Command::Status(flags) => {
                let source = common.source();
                let namespace = common.namespace_of_list();
                show(common, &source, PodsOf::Nobody, flags.watch, |state| status::status(state, namespace)).await?;
                let found = flags.exit_code
                    && !status::status(&state::read(&source, PodsOf::Nobody).await?, namespace).problems.is_empty();
                Ok(if found { Outcome::Found } else { Outcome::Fine })
            }
            Command::Convert(flags) => convert(common, flags).await,
            Command::Completion { shell } => {
                completion::print(command, shell)?;
                Ok(Outcome::Fine)
            }
        }
    })
}

/// Converts other systems' objects; the notes go to standard error.
async fn convert(common: &Common, flags: Convert) -> anyhow::Result<Outcome> {
    let objects = match flags.from_cluster {
        true => convert::objects_of_cluster(&common.source(), common.namespace_of_list()).await?,
        false => convert::objects_of_files(&flags.files)?,
    };
    let conversion = convert::converted(&objects)?;
    convert::notes(&conversion).iter().for_each(|line| eprintln!("{line}"));
    if conversion.is_empty() {
        eprintln!("Nothing was converted: none of the objects is of an egress system that is known here.");
    } else {
        output::print(&convert::text(&conversion, common.output.unwrap_or_default())?)?;
    }
    let found = flags.exit_code && convert::is_incomplete(&conversion);
    Ok(if found { Outcome::Found } else { Outcome::Fine })
}

/// Shows what follows from the state of the cluster: once, or again after each change.
async fn show<T: Show>(
    common: &Common,
    source: &SourceName,
    pods: PodsOf,
    watch: bool,
    compute: impl Fn(&State) -> T,
) -> anyhow::Result<()> {
    let mut source = state::open(source, pods).await?;
    let format = common.output.unwrap_or_default();
    let mut last = String::new();
    loop {
        source.snapshots.borrow_and_update();
        let text = output::render(&compute(&State::of(&source)), format)?;
        if text != last {
            let redraw = watch && std::io::stdout().is_terminal() && matches!(format, Format::Text | Format::Wide);
            // Erase the display, and move the cursor to its beginning (ECMA-48, ED and CUP).
            let before = match (redraw, last.is_empty()) {
                (true, _) => "\x1b[2J\x1b[H",
                (false, true) => "",
                (false, false) => "\n",
            };
            output::print(&format!("{before}{text}"))?;
        }
        if !watch {
            return Ok(());
        }
        last = text;
        sleep(PACE).await;
        source.snapshots.changed().await.context("the source of cluster state has ended")?;
    }
}
