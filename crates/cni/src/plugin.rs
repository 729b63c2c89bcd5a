//! The plugin's verbs: reads one call, performs it, and prints its result.

use crate::attachment::{Attachment, PodRef};
use crate::config::{self, Config, Fields};
use crate::daemon::{Client, RequestResult};
use crate::environment::{Call, Command, PodInterface};
use crate::interface::host_end;
use crate::offline::{self, Admission};
use crate::protocol::{CniError, Verb, codes};
use crate::result::PodSide;
use crate::uninstalled;
use crate::version::Version;
use serde::Serialize;
use std::env;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

/// How long ADD waits for the daemon if the pod cannot be quarantined without it. Longer than a daemon takes to
/// start, and shorter than the 15 seconds after which a kubelet tries again.
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
        // The runtime closed the pipe and has not received the result.
        Err(_) => ExitCode::FAILURE,
    }
}

fn failure_text(version: Version, failure: &CniError) -> String {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Out<'a> {
        cni_version: &'static str,
        #[serde(flatten)]
        failure: &'a CniError,
    }
    let out = Out { cni_version: version.as_str(), failure };
    line(serde_json::to_string(&out).unwrap_or_default())
}

fn line(mut text: String) -> String {
    text.push('\n');
    text
}

/// Returns what goes to standard output. `version` becomes the configuration's as soon as that is known.
fn serve(version: &mut Version) -> Result<String, CniError> {
    // Read the input first: a runtime may fail if the plugin ends without reading it.
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
            let client = Client::new(&config.socket, Verb::Del(id.clone()))?;
            when_offline(&client, |_| offline::del(config.run_dir(), &id))
        }
        Call::Check(target) => check(&config, target),
        Call::Gc => {
            let verb = Verb::Gc { network: config.network.clone(), valid: config.valid.clone() };
            let client = Client::new(&config.socket, verb)?;
            when_offline(&client, |_| offline::gc(config.run_dir(), &config.network, &config.valid))
        }
        // STATUS succeeds even while the daemon is away. A runtime that gets an error takes the node as one without a
        // network, and starts no pod at all. ADD alone holds back the pods that a policy can select.
        Call::Status => Ok(String::new()),
        Call::Version => Ok(versions(&input)),
    }
}

/// Sends the request, and calls `otherwise` with the reason if the daemon is away. Nothing is printed.
fn when_offline(client: &Client<'_>, otherwise: impl FnOnce(&str) -> Result<(), CniError>) -> Result<String, CniError> {
    match client.send() {
        RequestResult::Done => {}
        RequestResult::Refused(failure) => return Err(failure),
        RequestResult::Offline(why) | RequestResult::TimedOut(why) => otherwise(&why)?,
    }
    Ok(String::new())
}

/// What ADD prints: the previous plugin's result, unchanged.
fn passed_on(config: &Config<'_>) -> String {
    line(config.previous.map(|p| p.get().to_owned()).unwrap_or_default())
}

fn add(config: &Config<'_>, target: PodInterface) -> Result<String, CniError> {
    let side = PodSide::read(config.previous)?;
    let result = passed_on(config);
    let Some(pod) = target.pod.clone() else { return Ok(result) };
    let attachment = attachment(config, target, pod, side)?;
    let client = Client::new(&config.socket, Verb::Add(attachment.clone()))?;
    match client.send() {
        RequestResult::Done => return Ok(result),
        RequestResult::Refused(failure) => return Err(failure),
        RequestResult::Offline(_) => {}
        RequestResult::TimedOut(why) => {
            return match offline::add(config.run_dir(), &config.state_dir, &attachment)? {
                Admission::Recorded => Ok(result),
                Admission::Unprepared(cause) => Err(waits(&cause, &why)),
            };
        }
    }
    let outcome = match offline::add(config.run_dir(), &config.state_dir, &attachment)? {
        // Send the request again: a daemon that returned meanwhile may have read the records before this pod's was
        // there. A daemon that returns later reads it.
        Admission::Recorded => match client.send() {
            RequestResult::Offline(_) | RequestResult::TimedOut(_) => RequestResult::Done,
            outcome => outcome,
        },
        Admission::Unprepared(why) => match client.send_for(PATIENCE) {
            RequestResult::Offline(_) if uninstalled::is_marked(config.run_dir()) => RequestResult::Done,
            RequestResult::Offline(reason) | RequestResult::TimedOut(reason) => {
                RequestResult::Refused(waits(&why, &reason))
            }
            outcome => outcome,
        },
    };
    match outcome {
        RequestResult::Refused(failure) => Err(failure),
        _ => Ok(result),
    }
}

fn waits(cause: &str, why_offline: &str) -> CniError {
    let msg = format!("the pod waits for egretd, which is away: {cause}");
    CniError::new(codes::TRY_AGAIN, msg, format!("start egretd on this node; {why_offline}"))
}

fn check(config: &Config<'_>, target: PodInterface) -> Result<String, CniError> {
    let side = PodSide::read(config.previous)?;
    let Some(pod) = target.pod.clone() else { return Ok(String::new()) };
    let attachment = attachment(config, target, pod, side)?;
    let client = Client::new(&config.socket, Verb::Check(attachment.clone()))?;
    when_offline(&client, |why| offline::check(config.run_dir(), &config.state_dir, &attachment, why))
}

fn attachment(config: &Config<'_>, target: PodInterface, pod: PodRef, side: PodSide) -> Result<Attachment, CniError> {
    let mut names = vec![target.id.ifname.as_str()];
    names.extend(side.interfaces.iter().map(String::as_str).filter(|name| *name != target.id.ifname));
    let host = host_end(&target.netns, &names)?;
    Ok(Attachment { id: target.id, network: config.network.clone(), pod, addresses: side.addresses, host })
}

/// Responds to VERSION, in the requested version if the input names one.
fn versions(input: &[u8]) -> String {
    let asked = Fields::parse(input).and_then(|fields| fields.version(Command::Version));
    let version = asked.unwrap_or(Version::LATEST).as_str();
    let supported = Version::SUPPORTED.map(Version::as_str);
    line(serde_json::json!({ "cniVersion": version, "supportedVersions": supported }).to_string())
}
