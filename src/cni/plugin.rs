//! The plugin as a whole: a call comes in, is understood, done and answered.

use super::attachment::{Attachment, PodRef};
use super::config::{self, Config, Fields};
use super::daemon::{Answer, Question};
use super::environment::{Call, Command, Target};
use super::interface::host_end;
use super::offline::{self, Admission};
use super::protocol::{Failure, Verb, codes};
use super::result::PodSide;
use super::uninstalled;
use super::version::Version;
use serde::Serialize;
use std::env;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

/// How long ADD waits for a daemon without which the pod cannot be held. Longer than a daemon takes to start, and shorter than
/// the quarter of a minute after which a kubelet tries again.
const PATIENCE: Duration = Duration::from_secs(5);

/// Serves the one call that this process was started for. Success writes nothing to standard error.
pub fn run() -> ExitCode {
    let mut version = Version::LATEST;
    let (text, code) = match serve(&mut version) {
        Ok(text) => (text, ExitCode::SUCCESS),
        Err(failure) => (failure_text(version, &failure), ExitCode::FAILURE),
    };
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => code,
        // Nobody reads the answer: then it has not been given.
        Err(_) => ExitCode::FAILURE,
    }
}

fn failure_text(version: Version, failure: &Failure) -> String {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Out<'a> {
        cni_version: &'static str,
        #[serde(flatten)]
        failure: &'a Failure,
    }
    let out = Out { cni_version: version.as_str(), failure };
    line(serde_json::to_string(&out).unwrap_or_default())
}

fn line(mut text: String) -> String {
    text.push('\n');
    text
}

/// Returns what goes to standard output. `version` becomes the configuration's as soon as that is known.
fn serve(version: &mut Version) -> Result<String, Failure> {
    // First of all: a runtime may be confused by a plugin that does not take what it is told.
    let input = if io::stdin().is_terminal() { Vec::new() } else { config::read(io::stdin().lock())? };
    let call = Call::read(|name| env::var_os(name))?;
    if call == Call::Version {
        return Ok(versions(&input));
    }
    let command = call.command();
    let fields = Fields::parse(&input)?;
    *version = fields.version(command)?;
    version.allows(command)?;
    let config = Config::read(&fields, command)?;
    if uninstalled::is_marked(config.run_dir()) {
        return Ok(if command == Command::Add { passed_on(&config) } else { String::new() });
    }
    match call {
        Call::Add(target) => add(&config, target),
        Call::Del(id) => {
            let question = Question::new(&config.socket, Verb::Del(id.clone()))?;
            when_offline(&question, |_| offline::del(config.run_dir(), &id))
        }
        Call::Check(target) => check(&config, target),
        Call::Gc => {
            let verb = Verb::Gc { network: config.network.clone(), valid: config.valid.clone() };
            let question = Question::new(&config.socket, verb)?;
            when_offline(&question, |_| offline::gc(config.run_dir(), &config.network, &config.valid))
        }
        // Whatever the daemon does: a runtime that is told no takes the whole node for one without a network, and its
        // pods of all namespaces with it. Pods that a policy can select are held by ADD.
        Call::Status => Ok(String::new()),
        Call::Version => Ok(versions(&input)),
    }
}

/// Asks the daemon, and does `otherwise` while it is away, told why it is thought to be. Nothing is printed.
fn when_offline(
    question: &Question<'_>,
    otherwise: impl FnOnce(&str) -> Result<(), Failure>,
) -> Result<String, Failure> {
    match question.ask() {
        Answer::Done => {}
        Answer::Refused(failure) => return Err(failure),
        Answer::Offline(why) | Answer::Silent(why) => otherwise(&why)?,
    }
    Ok(String::new())
}

/// What ADD prints: the result of the plugin before, as it came.
fn passed_on(config: &Config<'_>) -> String {
    line(config.previous.map(|p| p.get().to_owned()).unwrap_or_default())
}

fn add(config: &Config<'_>, target: Target) -> Result<String, Failure> {
    let side = PodSide::read(config.previous)?;
    let result = passed_on(config);
    let Some(pod) = target.pod.clone() else { return Ok(result) };
    let attachment = attachment(config, target, pod, side)?;
    let question = Question::new(&config.socket, Verb::Add(attachment.clone()))?;
    match question.ask() {
        Answer::Done => return Ok(result),
        Answer::Refused(failure) => return Err(failure),
        Answer::Offline(_) => {}
        Answer::Silent(why) => {
            return match offline::add(config.run_dir(), &config.state_dir, &attachment)? {
                Admission::Recorded => Ok(result),
                Admission::Unprepared(cause) => Err(waits(&cause, &why)),
            };
        }
    }
    let answer = match offline::add(config.run_dir(), &config.state_dir, &attachment)? {
        // Once more: a daemon that came back in the meantime may have read the records before this pod's was there.
        // One that comes back after this reads it.
        Admission::Recorded => match question.ask() {
            Answer::Offline(_) | Answer::Silent(_) => Answer::Done,
            answer => answer,
        },
        Admission::Unprepared(why) => match question.ask_for(PATIENCE) {
            Answer::Offline(_) if uninstalled::is_marked(config.run_dir()) => Answer::Done,
            Answer::Offline(reason) | Answer::Silent(reason) => Answer::Refused(waits(&why, &reason)),
            answer => answer,
        },
    };
    match answer {
        Answer::Refused(failure) => Err(failure),
        _ => Ok(result),
    }
}

fn waits(cause: &str, why_offline: &str) -> Failure {
    let msg = format!("the pod waits for egretd, which is away: {cause}");
    Failure::new(codes::TRY_AGAIN, msg, format!("start egretd on this node; {why_offline}"))
}

fn check(config: &Config<'_>, target: Target) -> Result<String, Failure> {
    let side = PodSide::read(config.previous)?;
    let Some(pod) = target.pod.clone() else { return Ok(String::new()) };
    let attachment = attachment(config, target, pod, side)?;
    let question = Question::new(&config.socket, Verb::Check(attachment.clone()))?;
    when_offline(&question, |why| offline::check(config.run_dir(), &config.state_dir, &attachment, why))
}

fn attachment(config: &Config<'_>, target: Target, pod: PodRef, side: PodSide) -> Result<Attachment, Failure> {
    let mut names = vec![target.id.ifname.as_str()];
    names.extend(side.interfaces.iter().map(String::as_str).filter(|name| *name != target.id.ifname));
    let host = host_end(&target.netns, &names)?;
    Ok(Attachment { id: target.id, network: config.network.clone(), pod, addresses: side.addresses, host })
}

/// Answers VERSION: with the version asked in, if it says one.
fn versions(input: &[u8]) -> String {
    let asked = Fields::parse(input).and_then(|fields| fields.version(Command::Version));
    let version = asked.unwrap_or(Version::LATEST).as_str();
    let supported = Version::SUPPORTED.map(Version::as_str);
    line(serde_json::json!({ "cniVersion": version, "supportedVersions": supported }).to_string())
}
