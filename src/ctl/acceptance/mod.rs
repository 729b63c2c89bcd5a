//! `kubectl egret test`: whether Egret keeps its promises in a cluster, as a server outside sees it.
//!
//! It starts pods of Egret's own image on nodes of each kind, which ask the server which address it sees, and reads their
//! logs. Everything is in a namespace of its own, and is deleted whatever happens. Of the user's objects it uses one
//! gateway's pool, and nothing else.

mod judge;
mod logs;
mod objects;
mod participants;
mod remedy;
mod report;
mod scene;
mod server;
mod steps;

pub use report::Report;

use super::check::{self, Check};
use super::site::Objects;
use super::state::{self, ClusterState};
use super::status::status;
use crate::cluster::kube::Client;
use crate::cluster::{PodsOf, SourceName};
use crate::signals;
use anyhow::{Context, bail};
use participants::Participants;
use report::Reporter;
use ring::rand::{SecureRandom, SystemRandom};
use scene::Scene;
use server::Server;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// The groups of checks.
const CLUSTER: &str = "cluster";
const TRAFFIC: &str = "traffic";
const END: &str = "end";
/// Interruptions within this time are one. Everything is asked to be deleted meanwhile.
const ONE_CTRL_C: Duration = Duration::from_secs(3);
/// How long the objects may take to be gone.
const GONE: Duration = Duration::from_secs(90);

/// What the user asks for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The server: addresses, a name, or a URL.
    pub server: Vec<String>,
    /// The gateway; `None`: the default one, or the only one.
    pub gateway: Option<String>,
    /// The image of the pods; `None`: that of the DaemonSet.
    pub image: Option<String>,
    /// How many new pods begin at once.
    pub pods: usize,
    /// Whether the objects stay.
    pub keep: bool,
    /// The most time for everything but the end.
    pub timeout: Duration,
}

/// How the progress is shown: each check as soon as it is known.
pub type Show<'a> = &'a dyn Fn(&str);

/// Runs the test. `show` gets text for people, `None`: nothing is shown before the end.
///
/// # Errors
/// It cannot begin: there is no server, no API server, no right to make the objects; or it was interrupted.
pub async fn run(source: &SourceName, options: &Options, show: Option<Show<'_>>) -> anyhow::Result<Report> {
    let SourceName::Kube(of_kube) = source else {
        bail!(
            "the test starts pods, and needs a Kubernetes API; on hosts without one, tests are yours: docs/kubectl.md"
        );
    };
    let server = Server::find(&options.server).await?;
    let client = Client::connect(of_kube).await?;
    let mut reporter = Reporter::new(server.named(), show);
    let Some((participants, image)) = prepare(source, options, &server, &mut reporter).await? else {
        return Ok(reporter.end());
    };
    let (swept, kept) = scene::sweep(&client).await?;
    reporter.found_leftovers(&swept, &kept);
    let scene = Scene { client, name: format!("{}{}", objects::PREFIX, unique()?), image, server };
    reporter.begins(&scene.name);
    let interrupted = signals::stopped()?;
    let outcome = tokio::select! {
        done = within(options.timeout, steps::run(&scene, source, options, &participants, &mut reporter)) => done,
        never = scene.stay_alive() => match never {},
        () = interrupted => Err(anyhow::anyhow!("interrupted")),
    };
    clean_up(&scene, options.keep, &mut reporter).await;
    outcome?;
    Ok(reporter.end())
}

async fn within(limit: Duration, steps: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let late = || format!("the test is not done after {} s; give it more with --timeout", limit.as_secs());
    timeout(limit, steps).await.with_context(late)?
}

/// Deletes everything. A further interruption ends the program, so that it cannot hang here.
async fn clean_up(scene: &Scene, keep: bool, reporter: &mut Reporter<'_>) {
    let by_hand = format!("kubectl delete namespace,egressgateway -l {}=true", objects::LABEL);
    if keep {
        scene.keep().await;
        reporter.add(Check::unknown(END, "everything is deleted", "no: --keep", by_hand));
        return;
    }
    let begun = Instant::now();
    let deleted = async {
        let again = async {
            // One ctrl-C may arrive twice: `timeout` and shells signal the process and its group.
            sleep(ONE_CTRL_C).await;
            match signals::stopped() {
                Ok(interrupted) => interrupted.await,
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            left = scene.delete(GONE) => left,
            () = again => vec!["interrupted once more".to_owned()],
        }
    };
    let left = deleted.await;
    let took = format!("in {:.1} s", begun.elapsed().as_secs_f64());
    reporter.add(match left.first() {
        None => Check::ok(END, "everything is deleted", took),
        Some(first) => Check::failed(END, "everything is deleted", first, by_hand),
    });
}

/// What must be so before anything is made. `None`: something is not, and is reported.
async fn prepare(
    source: &SourceName,
    options: &Options,
    server: &Server,
    reporter: &mut Reporter<'_>,
) -> anyhow::Result<Option<(Participants, String)>> {
    let objects = Objects::open(source).await?;
    let installation = check::installation(&objects).await?;
    let is_missing = installation.checks.iter().any(|check| check.state == check::CheckState::Failed);
    installation.checks.into_iter().for_each(|check| reporter.add(Check { group: CLUSTER, ..check }));
    if is_missing {
        return Ok(None);
    }
    let state = state::read(source, PodsOf::Nobody).await?;
    let Some(image) = options.image.clone().or(installation.image) else {
        let found = "the DaemonSet egret-node was not found, so the pods' image is not known";
        reporter.add(Check::failed(CLUSTER, "the image", found, "name one that has egretd with --image"));
        return Ok(None);
    };
    let status = status(&state, None);
    participants::nodes_without_daemon(&status).into_iter().for_each(|check| reporter.add(check));
    let participants = participants::gateway(&state.cluster, options.gateway.as_deref())
        .and_then(|g| participants::of_gateway(&state, &status, g));
    let participants = match participants {
        Ok(participants) => participants,
        Err(check) => {
            reporter.add(check);
            return Ok(None);
        }
    };
    let nodes = participants.gateway_nodes.join(", ");
    reporter.add(Check::ok(
        CLUSTER,
        "a gateway",
        format!("EgressGateway {}, nodes {nodes} ready", participants.gateway),
    ));
    if let Some(why) = participants::why_inside(&state.cluster, server) {
        let remedy = "run the server on a host outside: `kubectl egret test-server`";
        reporter.add(Check::failed(CLUSTER, "the server is outside", format!("{why}: no policy covers it"), remedy));
        return Ok(None);
    }
    Ok(Some((participants, image)))
}

/// What is wrong now, for remedies.
async fn problems(source: &SourceName) -> anyhow::Result<(ClusterState, Vec<super::problem::Problem>)> {
    let of_site = state::problems_of_site(source).await?;
    let state = ClusterState { of_site, ..state::read(source, PodsOf::Nobody).await? };
    let problems = status(&state, None).problems;
    Ok((state, problems))
}

/// Five letters and digits.
fn unique() -> anyhow::Result<String> {
    let mut random = [0; 5];
    SystemRandom::new().fill(&mut random).ok().context("the system has no random numbers")?;
    let letters = b"abcdefghijklmnopqrstuvwxyz0123456789";
    Ok(random.iter().map(|byte| char::from(letters[usize::from(*byte) % letters.len()])).collect())
}

/// What to run outside, for a user who has named no server.
pub fn how_to_start_a_server(image: Option<&str>) -> String {
    let image = image.unwrap_or("IMAGE-OF-EGRET");
    format!(
        "The test needs a server outside the cluster, which tells pods the address that it sees. On a host that the egress \
         IPs reach, and that is no node, run one of these:\n\n  kubectl-egret test-server\n  docker run --rm --network host \
         {image} test-server\n\nThen: kubectl egret test --server ADDRESS-OF-THAT-HOST\n(of both families, if it has: \
         --server 192.0.2.100 --server 2001:db8::100). A URL that answers with the client's address is enough for a first \
         look: kubectl egret test --server https://ifconfig.example\n"
    )
}

/// The image that the DaemonSet runs, if it can be found.
pub async fn image(source: &SourceName) -> Option<String> {
    let objects = Objects::open(source).await.ok()?;
    timeout(Duration::from_secs(5), check::installation(&objects)).await.ok()?.ok()?.image
}
