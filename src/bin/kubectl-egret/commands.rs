//! Runs a command: reads what it needs, and shows the result.

use super::CommandResult;
use super::arguments::{Command, Common, Convert, Plan, Pods, Status, Test, Trace, Wait, Why};
use anyhow::{Context, bail};
use egret::cluster::{OverlayVerb, PodsOf, SourceName};
use egret::ctl::moves::{self, MoveCommand};
use egret::ctl::output::{self, Format, Show};
use egret::ctl::plan::{self, File};
use egret::ctl::state::{self, ClusterState};
use egret::ctl::subject::{self, Subject};
use egret::ctl::{acceptance, check, convert, ip, pods, status, trace, why};
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::sleep;

/// With `--watch`, results follow each other at this distance at least.
const PACE: Duration = Duration::from_millis(500);

/// Runs the command.
///
/// # Errors
/// It cannot do its work.
pub async fn run(common: &Common, command: Command) -> anyhow::Result<CommandResult> {
    let source = common.source();
    match command {
        Command::Status(flags) => run_status(common, &source, &flags).await,
        Command::Pods(flags) => run_pods(common, &source, &flags).await,
        Command::Ip(flags) => {
            let pods = ip::pods_of(&state::read(&source, PodsOf::Nobody).await?.cluster, flags.address);
            show(common, &source, pods, flags.watch, |state| ip::ip(state, flags.address)).await?;
            Ok(CommandResult::Fine)
        }
        Command::Check(flags) => {
            let checks = check::check(&source, flags.before).await?;
            print(common, &checks)?;
            Ok(found(checks.has_failed()))
        }
        Command::Test(flags) => run_test(common, &source, flags).await,
        Command::TestServer(flags) => flags.run().await.map(|()| CommandResult::Fine),
        Command::Why(flags) => run_why(common, &source, &flags).await,
        Command::Trace(flags) => run_trace(common, &source, &flags).await,
        Command::Plan(flags) => run_plan(common, &source, &flags).await,
        Command::Move(flags) => steer(common, &source, MoveCommand::Move(flags.what, flags.to), &flags.wait).await,
        Command::Drain(flags) => steer(common, &source, MoveCommand::Drain(flags.node, !flags.undo), &flags.wait).await,
        Command::Rebalance(flags) => {
            steer(common, &source, MoveCommand::Rebalance(flags.gateway, !flags.undo), &flags.wait).await
        }
        Command::Convert(flags) => convert(common, flags).await,
        Command::Completion { .. } => Ok(CommandResult::Fine),
    }
}

async fn run_test(common: &Common, source: &SourceName, flags: Test) -> anyhow::Result<CommandResult> {
    if flags.server.is_empty() {
        let image = flags.image.or(acceptance::image(source).await);
        bail!("no server is named.\n{}", acceptance::how_to_start_a_server(image.as_deref()));
    }
    let options = acceptance::Options {
        server: flags.server,
        gateway: flags.gateway,
        image: flags.image,
        pods: usize::try_from(flags.pods).unwrap_or(usize::MAX),
        keep: flags.keep,
        timeout: Duration::from_secs(flags.timeout),
    };
    // A closed pipe does not end the test: it has to clean up.
    let show = |text: &str| drop(output::print(text));
    let is_text = matches!(common.output, None | Some(Format::Text | Format::Wide));
    let report = acceptance::run(source, &options, is_text.then_some(&show)).await?;
    print(common, &report)?;
    Ok(found(report.has_failed()))
}

/// Converts other systems' objects; the notes go to standard error.
async fn convert(common: &Common, flags: Convert) -> anyhow::Result<CommandResult> {
    let objects = match flags.from_cluster {
        true => convert::objects_of_cluster(&common.source(), common.namespace.as_deref()).await?,
        false => convert::objects_of_files(&flags.files)?,
    };
    let conversion = convert::converted(&objects)?;
    convert::notes(&conversion).iter().for_each(|line| eprintln!("{line}"));
    if conversion.is_empty() {
        eprintln!("Nothing was converted: none of the objects is of an egress system that is known here.");
    } else {
        output::print(&convert::text(&conversion, common.output.unwrap_or_default())?)?;
    }
    Ok(found(flags.exit_code && convert::is_incomplete(&conversion)))
}

fn found(is: bool) -> CommandResult {
    if is { CommandResult::Found } else { CommandResult::Fine }
}

async fn run_status(common: &Common, source: &SourceName, flags: &Status) -> anyhow::Result<CommandResult> {
    let namespace = common.namespace.as_deref();
    let of_site = state::problems_of_site(source).await?;
    let compute =
        |state: &ClusterState| status::status(&ClusterState { of_site: of_site.clone(), ..state.clone() }, namespace);
    if !flags.exit_code {
        show(common, source, PodsOf::Nobody, flags.watch, compute).await?;
        return Ok(CommandResult::Fine);
    }
    let status = compute(&state::read(source, PodsOf::Nobody).await?);
    print(common, &status)?;
    Ok(found(!status.problems.is_empty()))
}

async fn run_pods(common: &Common, source: &SourceName, flags: &Pods) -> anyhow::Result<CommandResult> {
    let namespace = common.namespace(source).await?;
    let (subject, of) = match &flags.what {
        Some(text) => {
            let cluster = state::read(source, PodsOf::Nobody).await?.cluster;
            let subject = Subject::find(&cluster, text, &namespace)?;
            let of = subject.pods(&cluster);
            (Some(subject), of)
        }
        None if common.all_namespaces => (None, PodsOf::All),
        None => (None, PodsOf::Namespace(namespace.clone())),
    };
    let within = (subject.is_none() && !common.all_namespaces).then_some(namespace.as_str());
    show(common, source, of, flags.watch, |state| pods::pods(state, subject.as_ref(), within)).await?;
    Ok(CommandResult::Fine)
}

async fn run_why(common: &Common, source: &SourceName, flags: &Why) -> anyhow::Result<CommandResult> {
    let pod = subject::pod(&flags.pod, &common.namespace(source).await?);
    let mut explained = why::explain(source, &pod, flags.to, &flags.direct).await?;
    explained.ask_daemon(source, &flags.run_dir).await;
    print(common, &explained)?;
    Ok(CommandResult::Fine)
}

async fn run_trace(common: &Common, source: &SourceName, flags: &Trace) -> anyhow::Result<CommandResult> {
    let asked = flags.asked(subject::pod(&flags.pod, &common.namespace(source).await?))?;
    let traced = trace::trace(source, &asked, &|line| eprintln!("{line}")).await?;
    print(common, &traced)?;
    Ok(found(traced.outcome != trace::PacketOutcome::Answered))
}

async fn run_plan(common: &Common, source: &SourceName, flags: &Plan) -> anyhow::Result<CommandResult> {
    let mut files = Vec::new();
    for path in &flags.filename {
        read_files(path, &mut files)?;
    }
    let verb = if flags.delete { OverlayVerb::Delete } else { OverlayVerb::Apply };
    let namespace = common.namespace(source).await?;
    let state = state::read(source, PodsOf::All).await?;
    let plan = plan::plan(&state, verb, &files, &namespace);
    print(common, &plan)?;
    if !plan.rejected.is_empty() {
        bail!("some objects would be rejected; correct them");
    }
    Ok(found(flags.exit_code && plan.changes_anything()))
}

/// The manifests of a file, of a directory, or of standard input.
fn read_files(path: &Path, files: &mut Vec<File>) -> anyhow::Result<()> {
    let cannot = || format!("cannot read {}", path.display());
    if path == Path::new("-") {
        let mut text = Vec::new();
        std::io::stdin().read_to_end(&mut text).context("cannot read standard input")?;
        files.push(File { name: "standard input".to_owned(), text });
    } else if path.is_dir() {
        let entries = std::fs::read_dir(path).with_context(cannot)?;
        let mut paths: Vec<PathBuf> =
            entries.map(|e| Ok(e?.path())).collect::<std::io::Result<_>>().with_context(cannot)?;
        paths.sort();
        let is_manifest = |path: &PathBuf| path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        for path in paths.iter().filter(|path| is_manifest(path)) {
            read_files(path, files)?;
        }
    } else {
        files.push(File { name: path.display().to_string(), text: std::fs::read(path).with_context(cannot)? });
    }
    Ok(())
}

async fn steer(
    common: &Common,
    source: &SourceName,
    request: MoveCommand,
    wait: &Wait,
) -> anyhow::Result<CommandResult> {
    let namespace = common.namespace(source).await?;
    let is_text = matches!(common.output, None | Some(Format::Text | Format::Wide));
    let say = |line: &str| {
        if is_text {
            // A closed pipe does not end the command.
            let _ = output::print(&format!("{line}\n"));
        } else {
            eprintln!("{line}");
        }
    };
    print(common, &moves::run(source, &request, &namespace, wait.patience(), &say).await?)?;
    Ok(CommandResult::Fine)
}

fn print<T: Show>(common: &Common, value: &T) -> anyhow::Result<()> {
    output::print(&output::render(value, common.output.unwrap_or_default())?)
}

/// Shows what follows from the state of the cluster: once, or again after each change.
async fn show<T: Show>(
    common: &Common,
    source: &SourceName,
    pods: PodsOf,
    watch: bool,
    compute: impl Fn(&ClusterState) -> T,
) -> anyhow::Result<()> {
    let mut source = state::open(source, pods).await?;
    let format = common.output.unwrap_or_default();
    let mut last = String::new();
    loop {
        source.snapshots.borrow_and_update();
        let text = output::render(&compute(&ClusterState::of(&source)), format)?;
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
