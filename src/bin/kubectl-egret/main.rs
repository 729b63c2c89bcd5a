//! The command `kubectl egret`, also `egretctl`: arguments and wiring only.
//!
//! kubectl runs a program of this name for its subcommand `egret`. The same program under the name `egretctl` is for
//! hosts without Kubernetes.

mod arguments;
mod commands;
mod completion;

use anyhow::Context;
use arguments::{Arguments, Command};
use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};
use egret::telemetry::logs;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use tokio::runtime::Builder;

/// How a command ended that could do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CommandResult {
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
        Ok(CommandResult::Fine) => ExitCode::SUCCESS,
        Ok(CommandResult::Found) => ExitCode::from(2),
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

fn run(arguments: Arguments, command: clap::Command) -> anyhow::Result<CommandResult> {
    logs::init(logs::Format::default(), &arguments.common.log_level)?;
    let runtime = Builder::new_current_thread().enable_all().build().context("cannot start the async runtime")?;
    runtime.block_on(async {
        match arguments.command {
            Command::Completion { shell } => completion::print(command, shell).map(|()| CommandResult::Fine),
            command => commands::run(&arguments.common, command).await,
        }
    })
}
