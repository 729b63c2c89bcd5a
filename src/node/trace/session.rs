//! One trace: from the request until the connection closes, or the time is over.

use super::filter::Filter;
use super::rules::{self, Rules};
use super::{TraceContext, TraceRequest};
use crate::datapath::names::TRACES;
use crate::datapath::netlink_reader::{NetlinkReader, Read};
use crate::datapath::pod_veth;
use crate::datapath::probe;
use crate::datapath::{probe_packet, trace_table};
use crate::model::trace::{Armed, GO, MAX_SECONDS, TraceEvent, TraceSpec, TraceStep};
use anyhow::{Context, Result, bail};
use egret_nft::Nftables;
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use egret_nft::table::TableName;
use egret_nft::trace::{self, Kind};
use egret_nft::uapi::NFPROTO_INET;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWrite, AsyncWriteExt, Lines};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};

/// Room for the messages of some hundred steps.
const RECEIVE_BUFFER: usize = 1 << 20;
/// How long the last line may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// The tables that are in use: as many traces can run at the same time as there are names.
#[derive(Clone, Default)]
pub struct Slots(Arc<Mutex<[bool; TRACES.len()]>>);

/// A table in use.
struct Slot {
    slots: Slots,
    at: usize,
}

impl Slots {
    fn take(&self) -> Option<Slot> {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = used.iter().position(|used| !used)?;
        used[at] = true;
        Some(Slot { slots: self.clone(), at })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.0.lock().unwrap_or_else(PoisonError::into_inner)[self.at] = false;
    }
}

/// Serves a request for a trace on its connection. It returns when the connection closes or the time is over.
///
/// # Errors
/// The connection failed.
pub async fn serve(
    request: TraceSpec,
    read: impl AsyncBufRead + Unpin,
    mut write: impl AsyncWrite + Unpin,
    requests: &mpsc::Sender<TraceRequest>,
    slots: &Slots,
) -> io::Result<()> {
    let (response, known) = oneshot::channel();
    let sent = requests.send(TraceRequest { request: request.clone(), response }).await;
    let (Ok(()), Ok(known)) = (sent, known.await) else { return Ok(()) };
    let time = Duration::from_secs(request.seconds.clamp(1, MAX_SECONDS));
    let last = match timeout(time, run(&request, known, read.lines(), &mut write, slots)).await {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(e)) => TraceEvent::Refused { message: format!("{e:#}") },
        Err(_) => TraceEvent::Ended,
    };
    // A command that does not read is not waited for.
    timeout(FAREWELL, say(&mut write, &last)).await.unwrap_or(Ok(()))
}

async fn say(write: &mut (impl AsyncWrite + Unpin), event: &TraceEvent) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    write.write_all(&line).await
}

async fn run(
    request: &TraceSpec,
    mut known: TraceContext,
    mut lines: Lines<impl AsyncBufRead + Unpin>,
    write: &mut (impl AsyncWrite + Unpin),
    slots: &Slots,
) -> Result<()> {
    let Some(slot) = slots.take() else {
        bail!("{} traces run on node {} already; try again in {MAX_SECONDS} s", TRACES.len(), known.armed.node);
    };
    let veth = veth(request, &mut known).await?;
    let name = TableName { family: NFPROTO_INET, name: TRACES[slot.at] };
    let mut socket = Socket::open(NETLINK_NETFILTER)?;
    socket.set_buffers(RECEIVE_BUFFER)?;
    trace::subscribe(&mut socket).context("the kernel tells nothing of packets' ways")?;
    let mut table = Nftables::open()?;
    let wanted = trace_table::table(request, known.armed.interface.as_deref());
    table.apply(&[(name, wanted)]).with_context(|| format!("cannot make the table {}", name.name))?;
    let armed = TraceEvent::Armed(known.armed.clone());
    let mut watch = Watch {
        reader: NetlinkReader::new(socket)?,
        filter: Filter::new(request.clone(), name.name),
        rules: Rules::new(known)?,
        began: Instant::now(),
    };
    say(write, &armed).await?;
    let mut sending = None;
    loop {
        tokio::select! {
            line = lines.next_line() => match line?.as_deref() {
                Some(GO) => {
                    let Some(veth) = veth else { bail!("the pod is not on this node") };
                    sending = Some(Box::pin(send(request, veth)));
                }
                Some(_) => bail!("the daemon knows no other line than {GO:?}"),
                None => return Ok(()),
            },
            // The probe's first steps come before its device is removed, for which the kernel may take seconds.
            sent = async { sending.as_mut().expect("it is sent").await }, if sending.is_some() => {
                sending = None;
                sent?;
                say(write, &TraceEvent::Sent).await?;
            }
            events = watch.next() => {
                for event in events? {
                    say(write, &event).await?;
                }
            }
        }
    }
}

/// The index of the host's end of the pod's veth, on the pod's node.
async fn veth(request: &TraceSpec, known: &mut TraceContext) -> Result<Option<u32>> {
    let Armed { node, interface, .. } = &mut known.armed;
    if request.node != *node {
        *interface = None;
        return Ok(None);
    }
    if interface.is_none() {
        // No policy selects the pod, and the plugin has not set it up.
        *interface = pod_veth::find_pod_veth(&known.routes, request.source).await?.map(|veth| veth.name);
    }
    let Some(name) = interface.as_deref() else {
        bail!(
            "no veth of node {node} leads to pod {}/{} ({}); only pods behind a veth can be traced",
            request.namespace,
            request.pod,
            request.source
        );
    };
    let index = nix::net::if_::if_nametoindex(name).with_context(|| format!("interface {name}"))?;
    Ok(Some(index))
}

async fn send(request: &TraceSpec, veth: u32) -> Result<()> {
    let Some(source_port) = request.source_port else { bail!("there is no probe: the command waits for a packet") };
    let (request, sequence) = (request.clone(), RandomState::new().hash_one(source_port) as u32);
    let frame = move |from, to| probe_packet::frame(&request, source_port, sequence, from, to);
    // The kernel takes some milliseconds to remove a device, and seconds while it removes many others.
    tokio::task::spawn_blocking(move || probe::send(veth, frame)).await?.context("cannot send the probe")
}

/// Reads what the kernel tells.
struct Watch {
    reader: NetlinkReader,
    filter: Filter,
    rules: Rules,
    began: Instant,
}

impl Watch {
    /// Waits for the next steps. It is cancel-safe.
    async fn next(&mut self) -> io::Result<Vec<TraceEvent>> {
        self.reader.readable().await?;
        let mut steps = Vec::new();
        let read = self.reader.read(|message| steps.extend(trace::parse(&message)))?;
        let mut events: Vec<TraceEvent> =
            steps.iter().filter_map(|step| self.event(step)).map(TraceEvent::Step).collect();
        if read == Read::Lost {
            events.push(TraceEvent::Lost);
        }
        Ok(events)
    }

    fn event(&mut self, step: &trace::Step) -> Option<TraceStep> {
        let seen = self.filter.recognise(step)?;
        let (rule, verdict) = match &step.kind {
            Kind::Rule { handle, verdict } => {
                (Some(self.rules.text(step.family, &step.table, &step.chain, *handle)), verdict.to_string())
            }
            Kind::Return => (None, "return".to_owned()),
            Kind::Policy(verdict) => (None, verdict.to_string()),
        };
        let interface = |index: Option<u32>| Some(nix::net::if_::if_indextoname(index?).ok()?.to_string_lossy().into());
        let packet = step.packet.as_ref();
        Some(TraceStep {
            at: u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX),
            packet: step.id,
            is_reply: seen.is_reply,
            table: format!("{} {}", rules::family(step.family), step.table),
            chain: step.chain.clone(),
            rule,
            verdict,
            flow: seen.flow,
            input: interface(packet.and_then(|packet| packet.iif)),
            output: interface(packet.and_then(|packet| packet.oif)),
        })
    }
}
