//! Shell completion: scripts for the shells, and the answers that kubectl asks its plugins for.
//!
//! kubectl runs `kubectl_complete-egret` with the words of the command line
//! (<https://kubernetes.io/docs/tasks/extend-kubectl/kubectl-plugins/>), and that script runs this program with
//! `__complete`. The answer is cobra's: a candidate a line, then a directive.

use clap::Command;
use clap_complete::Shell;
use std::ffi::OsString;
use std::process::ExitCode;

/// Cobra's directive "do not complete file names" (`ShellCompDirectiveNoFileComp`, completions.go).
const NO_FILES: &str = ":4";

/// The words that are to be completed, if this is asked.
pub fn asked(arguments: &[OsString]) -> Option<Vec<String>> {
    (arguments.get(1)? == "__complete")
        .then(|| arguments[2..].iter().map(|word| word.to_string_lossy().into_owned()).collect())
}

/// Answers what could stand in place of the last word.
pub fn answer(command: Command, words: &[String]) -> ExitCode {
    let (last, before) = words.split_last().map_or(("", &[][..]), |(last, before)| (last.as_str(), before));
    let mut all: Vec<String> = candidates(&command, before, last);
    all.push(NO_FILES.to_owned());
    match egret::ctl::output::print(&(all.join("\n") + "\n")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The subcommands, flags and values that begin with `last`, each with its help after a tab.
fn candidates(command: &Command, before: &[String], last: &str) -> Vec<String> {
    let chosen = before.iter().find_map(|word| command.find_subcommand(word));
    let at = chosen.unwrap_or(command);
    let flags = at.get_arguments().chain(command.get_arguments().filter(|flag| flag.is_global_set()));
    let mut found = Vec::new();
    let line = |word: String, help: Option<&clap::builder::StyledStr>| match help {
        Some(help) => format!("{word}\t{}", help.to_string().lines().next().unwrap_or_default()),
        None => word,
    };
    if last.starts_with('-') {
        let flags = flags.filter(|flag| !flag.is_hide_set() && !flag.is_positional());
        found.extend(flags.filter_map(|flag| Some(line(format!("--{}", flag.get_long()?), flag.get_help()))));
    } else if chosen.is_none() {
        let commands = command.get_subcommands().filter(|command| !command.is_hide_set());
        found.extend(commands.map(|command| line(command.get_name().to_owned(), command.get_about())));
    } else {
        let values = at.get_positionals().flat_map(|value| value.get_possible_values());
        found.extend(values.map(|value| line(value.get_name().to_owned(), value.get_help())));
    }
    found.retain(|candidate| candidate.starts_with(last));
    found
}

/// Prints a shell's script.
///
/// # Errors
/// Standard output cannot be written.
pub fn print(mut command: Command, shell: Shell) -> anyhow::Result<()> {
    let name = command.get_name().replace(' ', "-");
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    egret::ctl::output::print(&String::from_utf8_lossy(&script))
}
